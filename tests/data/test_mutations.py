"""Damaged series: whatever is done to their files, no crash, and no volume that differs without a word.

``MEDVIT_SEEDS=5000 pytest tests/data/test_mutations.py`` sweeps that many seeds of each study; by default a few.
"""

from __future__ import annotations

import os
import shutil
from collections import Counter
from itertools import product
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from dicom_synthetic import (
    measures_group,
    nested,
    orientation_group,
    position_group,
    position_of,
    write_multiframe,
    write_siemens_mosaic,
    write_uih_mosaic,
)
from mutations_synthetic import Study, damage, elements
from pydicom.uid import JPEGLSLossless, RLELossless

from medvit.data.study import discover
from medvit.writers.convert import convert

SEEDS = int(os.environ.get("MEDVIT_SEEDS", "40"))
FIRST = int(os.environ.get("MEDVIT_FIRST_SEED", "0"))
SCANNER = Path(__file__).parents[3] / "shared" / "data" / "dicom_scanner"
SHAPE = (6, 5, 6)

_PIXELS = {
    "PixelData": "pixels have no checksum",
    "swapped PixelData": "pixels do not say where they belong",
    "swapped ImagePositionPatient": "nothing else says where a slice lies",
}
_ALONE = "holds for the whole file, and nothing else says it"
_PER_IMAGE = dict.fromkeys(("RescaleSlope", "RescaleIntercept"), "images have scales of their own")


def _classic(folder, orientation="axial", **options):
    write_dicom_series(folder, phantom(SHAPE), make_affine(orientation), **options)
    return _slices(folder, {})


def _slices(folder, excused, one_stack=True):
    """A study of one file per slice, with UIDs that are the same in every run."""
    heights = {}
    for n, path in enumerate(sorted(folder.iterdir())):
        ds = _with_fixed_uids(path, n)
        heights[path.name] = np.dot(ds.ImagePositionPatient, np.cross(*np.reshape(ds.ImageOrientationPatient, (2, 3))))
    ranked = sorted(heights, key=heights.__getitem__)
    return Study(
        folder.name, _contents(folder), "slices", (ranked[0], ranked[-1]) if one_stack else (), _PIXELS | excused
    )


def _whole(path, excused, **known):
    """A study of one file that holds all slices."""
    _with_fixed_uids(path, 0)
    alone = dict.fromkeys(("PixelSpacing", "ImageOrientationPatient", "PixelRepresentation"), _ALONE)
    return Study(path.parent.name, _contents(path.parent), "whole", (), _PIXELS | alone | excused, **known)


def _with_fixed_uids(path, number):
    ds = pydicom.dcmread(path)
    for n, keyword in enumerate(("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "SOPInstanceUID")):
        setattr(ds, keyword, f"1.2.826.0.1.3680043.8.498.{12345678901234567890 + 100 * n + number * (n == 3)}")
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.save_as(path)
    return ds


def _contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ct(folder):
    return _classic(folder, modality="CT")


def mr(folder):
    return _classic(folder, "oblique")


def rle(folder):
    return _compressed(folder, RLELossless, "pydicom")


def jpegls(folder):
    return _compressed(folder, JPEGLSLossless, "pyjpegls")


def _compressed(folder, syntax, plugin):
    """Files without an extension, 12 of 16 bits."""

    def edit(ds, k):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0
        ds.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False)

    write_dicom_series(folder, phantom(SHAPE) % 100, make_affine("sagittal"), edit=edit)
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(""))
    return _slices(folder, {})


def pet(folder):
    """Each slice with a scale of its own."""

    def edit(ds, k):
        ds.RescaleSlope, ds.RescaleIntercept = 0.5 + 0.25 * k, 0

    write_dicom_series(folder, phantom(SHAPE), make_affine("coronal"), modality="PT", edit=edit)
    return _slices(folder, _PER_IMAGE)


def echoes(folder):
    """Two echoes in one series."""
    affine = make_affine("coronal")

    def edit(ds, k):
        ds.EchoTime, ds.InstanceNumber = (3, 8)[k // SHAPE[2]], k + 1
        ds.ImagePositionPatient = position_of(affine, k % SHAPE[2])

    write_dicom_series(folder, phantom((*SHAPE[:2], 2 * SHAPE[2])), affine, edit=edit)
    return _slices(folder, {"swapped EchoTime": "nothing else says which echo an image is"}, one_stack=False)


def enhanced(folder):
    """One file, frames in any order, geometry and scale in functional groups."""
    array, affine, order = phantom(SHAPE), make_affine("oblique"), [4, 1, 5, 0, 3, 2]
    scales = [nested(RescaleSlope=2 + k, RescaleIntercept=5, RescaleType="US") for k in order]
    groups = [
        position_group(affine, k) | {"PixelValueTransformationSequence": scale}
        for k, scale in zip(order, scales, strict=True)
    ]
    shared = measures_group(affine) | orientation_group(affine)
    path = write_multiframe(folder / "enhanced.dcm", [array[:, :, k] for k in order], groups, shared)
    return _whole(path, _PER_IMAGE)


def siemens_mosaic(folder):
    path = write_siemens_mosaic(folder / "mosaic.dcm", phantom(SHAPE), make_affine("axial"))
    empty = dict.fromkeys(("Rows", "Columns"), "zeros behind the pixels, here empty tiles, may be padding")
    return _whole(path, empty | dict.fromkeys(("ImagePositionPatient", "SpacingBetweenSlices", "00291010"), _ALONE))


def uih_mosaic(folder):
    path = write_uih_mosaic(folder / "mosaic.dcm", phantom(SHAPE), make_affine("coronal"))
    ds = pydicom.dcmread(path)
    ds.add_new(0x00651050, "DS", str(SHAPE[2]))  # as scanners count the tiles
    ds.save_as(path)
    return _whole(path, {})


def scanner_mosaic(folder):
    if not SCANNER.is_dir():
        pytest.skip("the shared folder with scanner files is not there")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(SCANNER / "mosaic_uih" / "00000001.dcm", folder / "mosaic.dcm")
    return _whole(folder / "mosaic.dcm", {}, head=15_000)


def nii(folder):
    write_nifti(folder / "image.nii", phantom(SHAPE), make_affine("oblique"))
    return Study(folder.name, _contents(folder), "nifti")


def nii_gz(folder):
    write_nifti(folder / "image.nii.gz", phantom(SHAPE), make_affine("oblique"))
    return Study(folder.name, _contents(folder), "nifti")


STUDIES = (ct, mr, rle, jpegls, pet, echoes, enhanced, siemens_mosaic, uih_mosaic, scanner_mosaic, nii, nii_gz)


def _converted(files, folder):
    """Records, and what they wrote: (voxels, affine) or None."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "in").mkdir(parents=True)
    for name, content in files.items():
        (folder / "in" / name).write_bytes(content)
    records = list(convert(discover(folder / "in"), folder / "out"))
    written = [nibabel.load(one["output"]) if one["output"] else None for one in records]
    return records, [None if one is None else (np.asanyarray(one.dataobj), one.affine) for one in written]


def _equal(one, other):
    """The same voxels, at the same places up to what rounding of decimal strings does."""
    corners = np.array(list(product(*((0, n - 1) for n in one[0].shape), (1,)))).T
    return (
        one[0].shape == other[0].shape
        and np.array_equal(one[0], other[0])
        and np.abs((one[1] - other[1]) @ corners).max() < 0.05
    )


def _verdict(damaged, intact, folder):
    """What became of a damaged study, and why.

    ``same``: the volumes of the intact one. ``said``: others, or none, with a warning or a refusal that the intact one
    has not. ``aside``: others without one, but the damaged file itself is refused or set aside with a reason.
    ``silent``: none of these. ``crash``: also where the patient is named.
    """
    try:
        records, volumes = _converted(damaged.files, folder)
    except Exception as error:
        return "crash", repr(error)
    if internal := [one["reason"] for one in records if one["code"] == "internal"]:
        return "crash", internal[0]
    if any(word in str(records) for word in ("Doe", "Jane", "SECRET", "19700101")):
        return "crash", "the patient is named"
    named = {Path(file).name for one in records for file in one["files"]}
    if lost := set(damaged.files) - named:
        return "silent", f"no line names {sorted(lost)}"
    written = [(one, volume) for one, volume in zip(records, volumes, strict=True) if volume is not None]
    wrong = [one for one, volume in written if not any(_equal(volume, good) for good in intact)]
    if not wrong and all(any(_equal(volume, good) for _, volume in written) for good in intact):
        return "same", ""
    told = [one for one in records if one["status"] in ("warning", "rejected")]
    if told and all(one["status"] == "warning" for one in wrong):
        return "said", told[0]["reason"]
    reasons = [
        one["reason"] for one in records if one["reason"] and damaged.touched & {Path(f).name for f in one["files"]}
    ]
    return ("aside", reasons[0]) if reasons else ("silent", f"{[one['shape'] for one in wrong]} of {len(intact)}")


@pytest.mark.parametrize("make", STUDIES)
def test_no_damage_goes_unseen(make, tmp_path):
    study = make(tmp_path / make.__name__)
    records, intact = _converted(study.files, tmp_path / "work")
    assert [one["status"] for one in records] == ["ok"] * len(records)
    tally, found = Counter(), []
    for seed in range(FIRST, FIRST + SEEDS):
        damaged = damage(study, seed)
        verdict, reason = _verdict(damaged, intact, tmp_path / "work")
        if verdict in ("silent", "aside") and damaged.excuses:
            verdict = "excused"
        if verdict == "crash" or verdict == "silent" or (verdict == "aside" and not damaged.lone):
            found.append(f"seed {seed}: {verdict}: {'; '.join(damaged.steps)} -> {reason}")
        tally[verdict] += 1
    print(study.name, dict(tally))
    assert not found, "\n".join(found)
    assert tally["said"] > SEEDS // 5


def _with_value(study, name, keyword, value):
    """Files of a study with the bytes of one value replaced; None removes the element."""
    data = bytearray(study.files[name])
    (element,) = [one for one in elements(bytes(data)) if one.keyword == keyword]
    if value is None:
        del data[element.start : element.end]
    else:
        data[element.value - 2 : element.end] = len(value).to_bytes(2, "little") + value
    return study.files | {name: bytes(data)}


@pytest.mark.parametrize("keyword", ["SeriesDescription", "Modality", "SeriesInstanceUID", "ImageType"])
def test_a_length_that_swallows_the_next_elements_names_no_patient(tmp_path, keyword):
    study = ct(tmp_path / "ct")
    for name, content in study.files.items():
        (element,) = [one for one in elements(content) if one.keyword == keyword]
        (patient,) = [one for one in elements(content) if one.keyword == "PatientBirthDate"]
        length = (max(patient.end - element.value, 8)).to_bytes(2, "little")
        study.files[name] = content[: element.value - 2] + length + content[element.value :]
    records, _ = _converted(study.files, tmp_path / "work")
    assert not [word for word in ("Doe", "Jane", "SECRET", "19700101") if word in str(records)]
    assert {Path(file).name for one in records for file in one["files"]} == set(study.files)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("SOPClassUID", b"1.2.840.10008.5.1.4.1.1.999 ", "its SOPClassUID is none that DICOM knows"),
        ("SOPClassUID", b"1.2.840.10008.1.2.1.99", "its SOPClassUID is none that DICOM knows"),  # a transfer syntax
        ("SOPClassUID", b"rubbish ", "its SOPClassUID is none that DICOM knows"),
        ("Rows", None, "an image needs Rows and Columns of at least 1, got 0 x 6"),
        ("Columns", b"\0\0", "an image needs Rows and Columns of at least 1, got 5 x 0"),
        ("ImageType", b"ORIGINAL\\PRIMARY\\MOSAIC ", "hold many slices side by side (mosaic)"),
    ],
)
def test_an_end_slice_that_broke_is_missed_by_its_series(tmp_path, keyword, value, reason):
    study = ct(tmp_path / "ct")
    files = _with_value(study, study.ends[1], keyword, value)
    (record,), _ = _converted(files, tmp_path / "work")
    assert record["status"] == "rejected"
    assert f"{study.ends[1]} of 6 files: " in record["reason"]
    assert reason in record["reason"]


def test_a_file_cut_within_the_uid_of_its_series_belongs_to_no_other(tmp_path):
    study = ct(tmp_path / "ct")
    (uid,) = [one for one in elements(study.files[study.ends[0]]) if one.keyword == "SeriesInstanceUID"]
    study.files[study.ends[0]] = study.files[study.ends[0]][: uid.end - 5]
    records, _ = _converted(study.files, tmp_path / "work")
    (record,) = [one for one in records if [Path(file).name for file in one["files"]] == [study.ends[0]]]
    assert (record["status"], record["code"]) == ("rejected", "unreadable")  # and no series of a UID cut short
    assert "the file ends before its pixels" in record["reason"]


def test_a_siemens_mosaic_without_a_distance_between_slices_says_what_stands_for_it(tmp_path):
    study = siemens_mosaic(tmp_path / "mosaic")
    (record,), _ = _converted(_with_value(study, "mosaic.dcm", "SpacingBetweenSlices", None), tmp_path / "work")
    assert (record["status"], record["spacing"]) == ("warning", [0.75, 1.25, 2.0])
    assert record["reason"].startswith("SpacingBetweenSlices is missing; SliceThickness stands for the distance")


def test_a_uih_mosaic_that_lost_tiles_is_refused(tmp_path):
    study = uih_mosaic(tmp_path / "mosaic")
    (record,), _ = _converted(_with_value(study, "mosaic.dcm", "00651050", b"5 "), tmp_path / "work")
    assert record["status"] == "rejected"
    assert "its private header places 6 tiles and counts 5.0" in record["reason"]


def test_an_enhanced_frame_without_the_scale_that_others_have_is_told(tmp_path):
    enhanced(tmp_path / "enhanced")
    ds = pydicom.dcmread(tmp_path / "enhanced" / "enhanced.dcm")
    del ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence
    ds.save_as(tmp_path / "enhanced" / "enhanced.dcm")
    (record,), _ = _converted(_contents(tmp_path / "enhanced"), tmp_path / "work")
    assert record["reason"].startswith("its images disagree on RescaleSlope, RescaleIntercept: ")
