"""Label maps of synthetic DICOM images of every kind, and validators, for tests of results in DICOM."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, slice_dataset, write_dicom_series
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.data.volume import Source

SHAPE = (9, 7, 6)  # odd products: frames of 63 bits do not end on a byte
ANATOMY, HIPPOCAMPUS = Code("91723000", "SCT", "Anatomical Structure"), Code("5366008", "SCT", "Hippocampus")
STRUCTURES = (
    Structure(1, "anterior", ANATOMY, HIPPOCAMPUS, (230, 159, 0), Code("255549009", "SCT", "Anterior")),
    Structure(2, "posterior", ANATOMY, HIPPOCAMPUS, (86, 180, 233), Code("255551008", "SCT", "Posterior")),
    Structure(3, "absent", ANATOMY, HIPPOCAMPUS, (0, 0, 255)),
)
KINDS = ("classic", "enhanced", "enhanced-4d", "mosaic")


def labels(shape=SHAPE, seed=0):
    """Labels 0 to 2 without any symmetry; the second slice empty."""
    array = np.random.default_rng(seed).choice(3, shape, p=(0.7, 0.2, 0.1)).astype(np.uint8)
    array[:, :, 1 : 2 if shape[2] > 1 else 1] = 0
    return array


def label_map_of(files, array, affine, structures=STRUCTURES, **source):
    """A label map on a grid of one frame of reference with its source ``files``."""
    first = pydicom.dcmread(files[0], stop_before_pixels=True)
    space = Space.from_affine(array.shape, affine, first.get("FrameOfReferenceUID"))
    uids = first.get("StudyInstanceUID", ""), first.get("SeriesInstanceUID", "")
    return LabelMap(array, space, Source("dicom", tuple(files), "MR", *uids, **source), structures)


def synthetic(folder, orientation="axial", array=None, affine=None, kind="classic", **options):
    """A label map of a synthetic image; ``kind`` is one of :data:`KINDS`."""
    array = labels() if array is None else array
    affine = make_affine(orientation) if affine is None else affine
    if kind == "classic":
        return label_map_of(write_dicom_series(folder, phantom(array.shape), affine, **options), array, affine)
    if kind == "mosaic":
        file = write_mosaic(folder, array.shape)
        return label_map_of([file] * array.shape[2], array, affine, frames=tuple(range(array.shape[2])), mosaic=True)
    file, frames = write_enhanced(folder, array.shape, affine, volumes=2 if kind == "enhanced-4d" else 1)
    return label_map_of([file] * array.shape[2], array, affine, frames=frames)


def write_enhanced(folder, shape, affine, volumes=1):
    """An enhanced MR object, every functional group per frame, frames in any order; the last volume's frame numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    order = np.random.default_rng(3).permutation(shape[2] * volumes)
    ds = slice_dataset(np.zeros((shape[0], shape[1] * len(order)), np.int16))
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = (generate_uid() for _ in range(3))
    ds.Rows, ds.Columns, ds.NumberOfFrames = shape[1], shape[0], len(order)
    ds.SharedFunctionalGroupsSequence = [Dataset()]
    frames = []
    for k in order % shape[2]:
        measures, orientation, position, frame = (Dataset() for _ in range(4))
        measures.PixelSpacing, measures.SliceThickness = [float(steps[1]), float(steps[0])], float(steps[2])
        orientation.ImageOrientationPatient = [round(float(v), 10) for v in (lps[:3, :2] / steps[:2]).T.ravel()]
        position.ImagePositionPatient = [round(float(v), 6) for v in lps[:3] @ (0, 0, k, 1)]
        frame.PixelMeasuresSequence, frame.PlaneOrientationSequence = [measures], [orientation]
        frame.PlanePositionSequence = [position]
        frames.append(frame)
    ds.PerFrameFunctionalGroupsSequence = frames
    path = folder / "enhanced.dcm"
    ds.save_as(path, enforce_file_format=True)
    numbers = np.argsort(order)[-shape[2] :]  # where the slices of the last volume stand
    return path, tuple(int(n) for n in numbers)


def write_mosaic(folder, shape):
    """A file of one big picture that holds all slices; only its identity matters."""
    (file,) = write_dicom_series(folder, phantom((shape[0] * 3, shape[1] * 2, 1)), make_affine())
    return file


def write_radiograph(folder, shape=(9, 7)):
    """A plain X-ray without a place in the patient, as a label map of its pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    ds = slice_dataset(phantom((*shape, 1))[:, :, 0])
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality = generate_uid(), generate_uid(), "CR"
    ds.save_as(folder / "cr.dcm", enforce_file_format=True)
    array = labels((*shape, 1))
    space = Space.from_affine(array.shape, np.diag([0.2, 0.3, 1, 1]))
    source = Source("dicom", (folder / "cr.dcm",), "CR", ds.StudyInstanceUID, ds.SeriesInstanceUID)
    return LabelMap(array, space, source, STRUCTURES)


def errors_of(path):
    """Errors of dciodvfy (Debian's dicom3tools); the test is skipped where it is not installed."""
    if not shutil.which("dciodvfy"):
        pytest.skip("dciodvfy (Debian's dicom3tools) is not installed")
    run = subprocess.run(["dciodvfy", "-new", path], capture_output=True, text=True, errors="replace", check=False)
    return [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("Error")]


def no_files(folder: Path):
    """True if nothing was left behind beside folders."""
    return not [path for path in folder.iterdir() if path.is_file()]
