"""Synthetic DICOM series and NIfTI files in any orientation, shared by tests (``from data_synthetic import ...``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

SOP_CLASSES = {
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
}


def _rotation(x: float, y: float, z: float) -> np.ndarray:
    """Rotation by degrees about x, then y, then z."""
    result = np.eye(3)
    for axis, degrees in enumerate((x, y, z)):
        a, b = [n for n in range(3) if n != axis]
        turn = np.eye(3)
        turn[[a, b], [a, b]] = np.cos(np.radians(degrees))
        turn[a, b], turn[b, a] = -np.sin(np.radians(degrees)), np.sin(np.radians(degrees))
        result = turn @ result
    return result


_AXIS = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}


def _directions(code: str) -> np.ndarray:
    return np.array([_AXIS[letter] for letter in code], dtype=float).T


# Columns: unit directions of (column i, row j, slice k) in RAS+. All but "reversed" are right-handed, as medvit reads
# DICOM.
ORIENTATIONS: dict[str, np.ndarray] = {
    "axial": _directions("LPS"),
    "sagittal": _directions("PIR"),
    "coronal": _directions("LIP"),
    "prone": _directions("RAS"),
    "feet-first": _directions("RPI"),
    "oblique": _rotation(20, -13, 31) @ _directions("LPS"),
    "oblique-sagittal": _rotation(-9, 17, 5) @ _directions("PIR"),
    "reversed": _directions("LPI"),  # left-handed: a DICOM reader returns it with the slice axis turned round
}


def make_affine(
    orientation: str = "axial",
    spacing: tuple[float, float, float] = (0.75, 1.25, 2.5),
    origin: tuple[float, float, float] = (-31.5, 17.25, -60.0),
) -> np.ndarray:
    """4 x 4 RAS+ affine of a named orientation; spacing (i, j, k) and origin in mm."""
    affine = np.eye(4)
    affine[:3, :3] = ORIENTATIONS[orientation] * np.array(spacing)
    affine[:3, 3] = origin
    return affine


def phantom(shape: tuple[int, int, int] = (7, 6, 5), seed: int = 0) -> np.ndarray:
    """Random int16 voxels ``(i, j, k)`` in 0..2000: no symmetry that could hide a flip."""
    return np.random.default_rng(seed).integers(0, 2000, shape, dtype=np.int16)


def slice_dataset(image: np.ndarray, modality: str = "MR") -> FileDataset:
    """A 2D image ``(column i, row j)`` of an integer type as a DICOM data set with everything but its geometry."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = SOP_CLASSES[modality]
    ds = FileDataset(None, Dataset(), file_meta=meta, preamble=b"\0" * 128)  # type: ignore[arg-type]
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = SOP_CLASSES[modality], generate_uid(), modality
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if modality == "CT" else "OTHER"]
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = "Doe^Jane", "SECRET-ID", "19700101", "F"
    ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "SECRET-ACC", ""
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20200102"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "101112"
    ds.SeriesNumber, ds.AcquisitionNumber, ds.SeriesDescription = 3, 1, "T1 test"
    ds.Manufacturer, ds.Laterality, ds.PatientPosition, ds.PositionReferenceIndicator = "medvit", "", "HFS", ""
    if modality == "MR":
        ds.ScanningSequence, ds.SequenceVariant, ds.ScanOptions, ds.MRAcquisitionType = "GR", "NONE", "", "3D"
        ds.EchoTime, ds.RepetitionTime, ds.EchoTrainLength = 3, 8, 1
    if modality == "CT":
        ds.KVP, ds.RescaleSlope, ds.RescaleIntercept = 120, 1, -1024
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = image.shape[1], image.shape[0]
    ds.BitsAllocated = ds.BitsStored = image.dtype.itemsize * 8
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(image.dtype.kind == "i")
    data = np.ascontiguousarray(image.T).tobytes()
    ds.add_new(0x7FE00010, "OB" if ds.BitsAllocated == 8 else "OW", data + b"\0" * (len(data) % 2))
    return ds


def write_dicom_series(
    folder: str | Path,
    array_ijk: np.ndarray,
    affine_ras: np.ndarray,
    *,
    modality: str = "MR",
    prefix: str = "IM",
    edit: Callable[[FileDataset, int], Any] | None = None,
    **tags: Any,
) -> list[Path]:
    """Write one DICOM file per slice ``k`` of ``array_ijk`` (column i, row j, slice k); return paths in slice order.

    File names and InstanceNumbers are shuffled relative to position. Stored values are the array's integers.

    Args:
        folder: created if absent.
        array_ijk: int16, uint16, int8 or uint8.
        affine_ras: 4 x 4, voxel centres to RAS+ mm; its third column may be sheared (gantry tilt) or left-handed.
        modality: ``"MR"``, ``"CT"`` (with RescaleIntercept -1024) or ``"PT"``.
        prefix: of the file names, to put several series into one folder.
        edit: called with each data set and its k right before it is written; for changes to pixels or uneven tags.
        **tags: DICOM keywords to set (``RescaleSlope=2``), None removes the attribute.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine_ras, dtype=float)
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    directions = lps[:3, :3] / steps
    uids = {name: generate_uid() for name in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID")}
    numbers = np.random.default_rng(7).permutation(array_ijk.shape[2])
    paths = []
    for k in range(array_ijk.shape[2]):
        ds = slice_dataset(array_ijk[:, :, k], modality)
        ds.update(uids)
        ds.ImageOrientationPatient = [round(float(v), 10) + 0.0 for v in (*directions[:, 0], *directions[:, 1])]
        ds.ImagePositionPatient = [round(float(v), 6) + 0.0 for v in lps[:3] @ (0, 0, k, 1)]
        ds.PixelSpacing = [round(float(steps[1]), 10), round(float(steps[0]), 10)]
        ds.SliceThickness = round(float(steps[2]), 6)
        ds.InstanceNumber = int(numbers[k]) + 1
        for keyword, value in tags.items():
            if value is not None:
                setattr(ds, keyword, value)
            elif keyword in ds:
                delattr(ds, keyword)
        if edit is not None:
            edit(ds, k)
        paths.append(folder / f"{prefix}{numbers[k]:04d}.dcm")
        ds.save_as(paths[-1], enforce_file_format=True)
    return paths


def write_nifti(path: str | Path, array: np.ndarray, affine: np.ndarray, **header: Any) -> Path:
    """Write ``array`` (i, j, k) with ``affine`` (RAS+ mm) as sform and qform of code 1; returns the path.

    Args:
        path: ``.nii`` or ``.nii.gz``; its folder is created.
        array: any type NIfTI-1 can hold.
        affine: 4 x 4.
        **header: raw header fields to overwrite after that, e.g. ``sform_code=0``; they reach the file as given.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    sheared = np.abs(np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))[1] - 1).max() > 1e-6
    image.set_sform(affine, 1)
    image.set_qform(None if sheared else affine, 0 if sheared else 1)
    for name, value in header.items():
        image.header[name] = value
    if header:
        image = nibabel.Nifti1Image(array, None, image.header)
    image.to_filename(path)
    return path
