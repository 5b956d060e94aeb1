"""DICOM objects of the harder kinds, shared by tests (``from dicom_synthetic import ...``).

Several volumes in one series, multi-frame objects with functional groups, mosaics, images without a place.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from data_synthetic import make_affine, phantom, slice_dataset, write_dicom_series
from pydicom.dataset import Dataset, FileDataset
from pydicom.uid import generate_uid

UIDS = {"StudyInstanceUID": "1.2", "SeriesInstanceUID": "1.2.3", "FrameOfReferenceUID": "1.2.4"}
CLASS = "1.2.840.10008.5.1.4.1.1."
_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def arrays_of(count: int, shape: tuple[int, int, int] = (7, 6, 5)) -> list[np.ndarray]:
    """Different volumes of one shape."""
    return [phantom(shape, seed=n) for n in range(count)]


def write_volumes(
    folder: Path,
    arrays: Sequence[np.ndarray],
    affine: np.ndarray,
    *tags: Mapping[str, Any],
    edit: Callable[[FileDataset, int, int], Any] | None = None,
    **common: Any,
) -> list[Path]:
    """Volumes of one series, one file per slice; ``tags[n]`` tell volume ``n`` from the others.

    ``edit`` is called with each data set, its volume and its slice. Returns the files volume by volume.
    """
    files = []
    for n, array in enumerate(arrays):
        known = UIDS | common | (dict(tags[n]) if tags else {})
        change = None if edit is None else lambda ds, k, n=n: edit(ds, n, k)
        files += write_dicom_series(folder, array, affine, prefix=f"v{n}_", edit=change, **known)
    return files


def nested(**tags: Any) -> Dataset:
    """A data set of these attributes; a data set among them becomes a sequence of one item."""
    ds = Dataset()
    for keyword, value in tags.items():
        setattr(ds, keyword, [value] if isinstance(value, Dataset) else value)
    return ds


def measures_group(affine: np.ndarray) -> dict[str, Dataset]:
    """Functional group of pixel spacing and thickness."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return {"PixelMeasuresSequence": nested(PixelSpacing=[float(y), float(x)], SliceThickness=float(z))}


def orientation_group(affine: np.ndarray) -> dict[str, Dataset]:
    """Functional group of the orientation."""
    return {"PlaneOrientationSequence": nested(ImageOrientationPatient=orientation_of(affine))}


def position_group(affine: np.ndarray, k: int) -> dict[str, Dataset]:
    """Functional group of the position of slice ``k``."""
    return {"PlanePositionSequence": nested(ImagePositionPatient=position_of(affine, k))}


def orientation_of(affine: np.ndarray) -> list[float]:
    """ImageOrientationPatient of a grid."""
    columns = (_LPS @ affine)[:3, :2]
    return [round(float(v), 10) + 0.0 for v in (columns / np.linalg.norm(columns, axis=0)).T.ravel()]


def position_of(affine: np.ndarray, k: float, i: float = 0, j: float = 0) -> list[float]:
    """ImagePositionPatient of the image whose first pixel is voxel ``(i, j, k)``."""
    return [round(float(v), 8) + 0.0 for v in (_LPS @ affine)[:3] @ (i, j, k, 1)]


def write_multiframe(
    path: Path,
    images: Sequence[np.ndarray],
    per_frame: Sequence[Mapping[str, Any]] = (),
    shared: Mapping[str, Any] | None = None,
    sop_class: str = "4.1",
    **tags: Any,
) -> Path:
    """One object of ``images`` (column, row) with functional groups; ``sop_class`` is the end of its UID."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = slice_dataset(np.concatenate(images, axis=1))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CLASS + sop_class
    ds.update(UIDS)
    ds.Columns, ds.Rows, ds.NumberOfFrames = *images[0].shape, len(images)
    if shared is not None:
        ds.SharedFunctionalGroupsSequence = [nested(**shared)]
    if per_frame:
        ds.PerFrameFunctionalGroupsSequence = [nested(**groups) for groups in per_frame]
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def tiled(array: np.ndarray, square: bool = True) -> np.ndarray:
    """Slices ``(i, j, k)`` side by side in one image, row after row; the square of tiles is filled up, or not."""
    columns, rows, count = array.shape
    side = ceil(sqrt(count))
    image = np.zeros((columns * side, rows * (side if square else ceil(count / side))), array.dtype)
    for k in range(count):
        down, across = divmod(k, side)
        image[across * columns : (across + 1) * columns, down * rows : (down + 1) * rows] = array[:, :, k]
    return image


def csa_header(**tags: tuple[str, Sequence[object]]) -> bytes:
    """A Siemens CSA2 header of ``name=(value representation, values)``."""
    parts = [b"SV10\4\3\2\1", struct.pack("<2I", len(tags), 77)]
    for name, (vr, values) in tags.items():
        parts.append(struct.pack("<64si4s3i", name.encode(), len(values), vr.encode(), 0, len(values), 77))
        for value in values:
            text = str(value).encode() + b"\0"
            parts += [struct.pack("<4i", len(text), len(text), 77, len(text)), text + b"\0" * (-len(text) % 4)]
    return b"".join(parts)


def write_siemens_mosaic(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray,
    *,
    upwards: bool = True,
    csa: bytes | None = None,
    edit: Callable[[FileDataset], Any] | None = None,
    **tags: Any,
) -> Path:
    """A Siemens mosaic of ``array``; its tiles run against the normal of the image unless ``upwards``.

    ``csa`` replaces the private header.
    """
    count = array.shape[2]
    image = tiled(array if upwards else array[:, :, ::-1])
    corner = 0 if upwards else count - 1
    columns, rows = ((full - part) / 2 for full, part in zip(image.shape, array.shape, strict=False))
    step = (_LPS @ affine)[:3, 2]
    normal = step / np.linalg.norm(step) * (1 if upwards else -1)
    ds = slice_dataset(image)
    ds.update(UIDS)
    ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], 1
    ds.ImagePositionPatient = position_of(affine, corner, -columns, -rows)
    ds.ImageOrientationPatient = orientation_of(affine)
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    ds.PixelSpacing, ds.SliceThickness, ds.SpacingBetweenSlices = [float(y), float(x)], float(z) - 0.5, float(z)
    ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
    known = csa_header(NumberOfImagesInMosaic=("US", [count]), SliceNormalVector=("FD", [f"{v:.8f}" for v in normal]))
    ds.add_new(0x00291010, "OB", known if csa is None else csa)
    return _save(ds, path, tags, edit)


def write_uih_mosaic(path: Path, array: np.ndarray, affine: np.ndarray, **tags: Any) -> Path:
    """A UIH mosaic of ``array``: a sequence says where each tile lies."""
    ds = slice_dataset(tiled(array, square=False))
    ds.update(UIDS)
    ds.ImageType, ds.InstanceNumber = ["ORIGINAL", "PRIMARY", "M", "VFRAME"], 1
    ds.ImagePositionPatient, ds.ImageOrientationPatient = position_of(affine, 0), orientation_of(affine)
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    ds.PixelSpacing, ds.SliceThickness = [float(y), float(x)], float(z)
    ds.add_new(0x00650010, "LO", "Image Private Header")
    places = [nested(ImagePositionPatient=position_of(affine, k)) for k in range(array.shape[2])]
    ds.add_new(0x00651050, "DS", str(array.shape[2]))
    ds.add_new(0x00651051, "SQ", places)
    return _save(ds, path, tags, None)


def write_flat(path: Path, frames: np.ndarray, sop_class: str, modality: str, **tags: Any) -> Path:
    """Images without a place, (frames, rows, columns) or (frames, rows, columns, 3); tags of None are left out."""
    ds = slice_dataset(np.zeros((1, 1), frames.dtype))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CLASS + sop_class
    ds.update(UIDS | {"SeriesInstanceUID": generate_uid()})
    ds.Modality, ds.InstanceNumber, ds.NumberOfFrames = modality, 1, len(frames)
    ds.Rows, ds.Columns = frames.shape[1:3]
    if frames.ndim == 4:
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
    data = np.ascontiguousarray(frames).tobytes()
    ds.add_new(0x7FE00010, "OB" if frames.itemsize == 1 else "OW", data + b"\0" * (len(data) % 2))
    del ds.FrameOfReferenceUID
    return _save(ds, path, tags, None)


def sphere(affine: np.ndarray, shape: tuple[int, int, int], centre: Sequence[float], radius: float) -> np.ndarray:
    """A ball of 1000 on 100 as int16, ``centre`` in RAS+ mm, ``radius`` in mm; smooth over 2 mm at its border."""
    voxels = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    distance = np.linalg.norm(voxels @ affine[:3, :3].T + affine[:3, 3] - centre, axis=-1)
    return np.rint(100 + 900 * np.clip((radius - distance) / 2 + 0.5, 0, 1)).astype(np.int16)


def tilted_affine(
    degrees: float, spacing: tuple[float, float, float] = (1.0, 1.0, 3.0), orientation: str = "axial"
) -> np.ndarray:
    """A grid whose slices are sheared along the columns by so many degrees."""
    affine = make_affine(orientation, spacing)
    down = affine[:3, 1] / np.linalg.norm(affine[:3, 1])
    affine[:3, 2] += down * spacing[2] * np.tan(np.radians(degrees))
    return affine


def _save(ds: FileDataset, path: Path, tags: Mapping[str, Any], edit: Callable[[FileDataset], Any] | None) -> Path:
    for keyword, value in tags.items():
        if value is not None:
            setattr(ds, keyword, value)
        elif keyword in ds:
            delattr(ds, keyword)
    if edit is not None:
        edit(ds)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)
    return path
