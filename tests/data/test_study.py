import gc
import json
import os
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from dicom_synthetic import (
    UIDS,
    arrays_of,
    measures_group,
    orientation_group,
    position_group,
    write_flat,
    write_multiframe,
    write_volumes,
)
from photographs_synthetic import colours, write_picture
from PIL import ImageFile
from pydicom.data import get_testdata_file

from medvit.data import workers
from medvit.data.grouping import Group
from medvit.data.headers import read_header
from medvit.data.lost import LostFiles
from medvit.data.reader import read_volume
from medvit.data.study import _uniquely_named, discover
from medvit.errors import MedvitError, NothingFound, OutputError, UnreadableFile, UnreadableSeries

BUNDLED = Path(get_testdata_file("MR_small.dcm", download=False)).parent


@pytest.fixture
def tree(tmp_path):
    """Two patients; the same image as DICOM and NIfTI; a scout, a report, junk."""
    array = phantom()
    write_dicom_series(tmp_path / "p1" / "mr", array, make_affine("oblique"))
    write_nifti(tmp_path / "p1" / "twin.nii.gz", array, make_affine("oblique"))
    write_dicom_series(
        tmp_path / "p2", array, make_affine("sagittal"), modality="CT", SeriesDescription="Ax/ial  Ü 3.0"
    )
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_dicom_series(tmp_path / "p2", phantom((7, 6, 1)), make_affine(), prefix="scout", ImageType=scout)
    shutil.copy(BUNDLED / "reportsi.dcm", tmp_path / "p2")
    (tmp_path / "notes.txt").write_text("nothing")
    return tmp_path


def test_finds_every_series_and_names_the_rest(tree):
    counts = []
    inventory = discover(tree, progress=counts.append)
    assert [one.name for one in inventory.series] == ["p1/mr/3_T1_test", "p1/twin", "p2/3_Ax_ial_Ü_3.0"]
    assert [(one.kind, one.modality, len(one.files)) for one in inventory.series] == [
        ("dicom", "MR", 5),
        ("nifti", "", 1),
        ("dicom", "CT", 5),
    ]
    assert all(one.problem is None and one.notes == () for one in inventory.series)
    assert [(aside.path.name, aside.code) for aside in inventory.set_aside] == [
        ("notes.txt", "not-an-image"),
        ("reportsi.dcm", "not-an-image"),
        ("scout0000.dcm", "localizer"),
    ]
    assert counts == list(range(1, 15))


def test_headers_tell_the_space_that_reading_gives(tree):
    for one in discover(tree).series:
        volume = one.read()
        assert volume.space == one.space and volume.source.files == one.files and volume.source.name == one.name
        assert (volume.source.study_uid, volume.source.series_uid) == (one.study_uid, one.series_uid)


def test_twins_of_two_formats_lie_on_one_grid(tree):
    dicom, nifti = (one.read() for one in discover(tree / "p1").series)
    dicom.space.require_same(nifti.space)
    np.testing.assert_array_equal(dicom.array, nifti.array)


def test_pixels_are_not_read(tree, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("pixels were read")

    monkeypatch.setattr(pydicom.FileDataset, "pixel_array", property(forbidden))
    monkeypatch.setattr("nibabel.arrayproxy.ArrayProxy.__array__", forbidden)
    assert len(discover(tree).series) == 3


def test_is_deterministic(tree):
    assert discover(tree) == discover(tree)


def test_several_inputs_files_and_overlaps(tree):
    names = [one.name for one in discover([tree / "p1" / "twin.nii.gz", tree / "p1", tree / "p1"]).series]
    assert names == ["mr/3_T1_test", "twin"]
    one_file = discover(str(tree / "p1" / "twin.nii.gz")).series
    assert [one.name for one in one_file] == ["twin"]


def test_equal_names_are_numbered(tmp_path):
    for name in ("a.nii", "a.nii.gz", "A.nii.gz", "a_2.nii"):
        write_nifti(tmp_path / name, phantom(), make_affine())
    names = [one.name for one in discover(tmp_path).series]
    assert len({name.lower() for name in names}) == 4 and "a_2" in names
    write_dicom_series(tmp_path / "d", phantom(), make_affine(), prefix="x")
    write_dicom_series(tmp_path / "d", phantom(), make_affine(), prefix="y")
    assert [one.name for one in discover(tmp_path / "d").series] == ["3_T1_test", "3_T1_test_2"]


def test_problems_carry_the_unique_name(tmp_path):
    for prefix in "xy":
        files = write_dicom_series(tmp_path / "d", phantom(), make_affine(), prefix=prefix)
        files[2].unlink()
    first, second = discover(tmp_path).series
    assert str(first.problem).startswith("d/3_T1_test: ") and str(second.problem).startswith("d/3_T1_test_2: ")


def test_a_missing_path():
    with pytest.raises(NothingFound, match="/no/such/place: no such file or folder"):
        discover("/no/such/place")


def test_an_empty_folder_is_an_empty_inventory(tmp_path):
    assert discover(tmp_path) == discover([tmp_path, tmp_path])
    assert discover(tmp_path).series == () and discover(tmp_path).set_aside == ()


def test_content_decides_not_the_name(tmp_path):
    array = phantom()
    for file in write_dicom_series(tmp_path, array, make_affine()):
        file.rename(file.with_suffix(".nii"))
    (one,) = discover(tmp_path).series
    assert one.kind == "dicom"
    np.testing.assert_array_equal(one.read().array, array)


def test_names_hold_no_patient_data(tmp_path):
    write_dicom_series(tmp_path, phantom(), make_affine(), SeriesDescription="", SeriesNumber=None, Modality="")
    (one,) = discover(tmp_path).series
    assert one.name == "series"


def test_symbolic_link_loops_and_dead_links(tmp_path):
    write_nifti(tmp_path / "a" / "x.nii", phantom(), make_affine())
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "dead.nii").symlink_to(tmp_path / "nowhere")
    good, dead = discover(tmp_path).series
    assert (good.name, good.problem) == ("a/x", None)
    assert (dead.name, dead.kind) == ("dead.nii", "nifti")
    for read in (dead.read, lambda: read_volume(dead.files)):
        with pytest.raises(UnreadableFile, match=r"dead\.nii: cannot be opened: No such file"):
            read()
    assert discover(tmp_path / "dead.nii").series[0].problem is not None


def test_pipes_do_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe.dcm")
    assert discover(tmp_path).set_aside[0].reason == "not a regular file"


def test_a_closed_folder_is_named(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    scandir = os.scandir

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(closed))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    for inputs, name in ((tmp_path, "closed"), (closed, "closed")):
        (one,) = discover(inputs).series
        assert (one.files, one.name) == ((closed,), name)
        with pytest.raises(UnreadableFile, match="closed: the folder cannot be listed; get it again, or move it"):
            read_volume(one.files)


def test_files_of_operating_systems(tmp_path):
    for name in ("._x.nii.gz", ".DS_Store", "Thumbs.db"):
        (tmp_path / name).write_bytes(b"\0\5\x16\7")
    inventory = discover(tmp_path)
    assert inventory.series == () and {aside.code for aside in inventory.set_aside} == {"not-an-image"}


def test_a_broken_nifti_is_a_candidate_with_a_problem(tmp_path):
    write_nifti(tmp_path / "good.nii.gz", phantom(), make_affine())
    (tmp_path / "bad.nii.gz").write_bytes(b"junk")
    bad, good = discover(tmp_path).series
    assert good.problem is None and isinstance(bad.problem, UnreadableFile)
    with pytest.raises(UnreadableFile, match=r"bad\.nii\.gz: not a readable NIfTI"):
        bad.read()


def test_a_dicom_file_without_a_readable_header_is_a_candidate_with_a_problem(tmp_path):
    write_dicom_series(tmp_path, phantom(), make_affine())
    (tmp_path / "cut.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0")
    good, bad = discover(tmp_path).series
    assert bad.name == "cut" and isinstance(bad.problem, UnreadableFile)
    assert good.problem is None  # its name is none of a slice
    (tmp_path / "cut.dcm").rename(tmp_path / "IM0005.dcm")
    good, bad = discover(tmp_path).series
    assert good.problem is not None and good.problem.code == "incomplete" and "(IM0005.dcm)" in str(good.problem)


@pytest.mark.parametrize("k", [0, 2, 4])
@pytest.mark.parametrize("content", [b"", b"\0" * 5000])
def test_an_emptied_slice_is_not_lost_in_silence(tmp_path, k, content):
    """The first and the last one leave no gap."""
    files = write_dicom_series(tmp_path / "a", phantom(), make_affine())
    write_dicom_series(tmp_path / "b", phantom(), make_affine())
    files[k].write_bytes(content)
    series, lost, other = discover(tmp_path).series
    assert other.problem is None
    assert (lost.name, lost.files) == (f"a/{files[k].name}", (files[k],))
    assert lost.problem is not None and lost.problem.code == "unreadable" and "named like DICOM" in str(lost.problem)
    assert series.problem is not None and series.problem.code == "incomplete" and series.space is None
    reason = f"of the files beside it 1 cannot be read ({files[k].name}), and may be its first or last slice; get them"
    assert reason in str(series.problem)
    for one in (series, lost):  # what `predict` does comes to the same as what discovery says
        with pytest.raises(MedvitError) as caught:
            read_volume(one.files)
        assert caught.value.code == one.problem.code and files[k].name in str(caught.value)


@pytest.mark.parametrize("extension", ["", ".5", ".xyz"])
def test_an_emptied_slice_is_known_by_the_names_of_its_neighbours(tmp_path, extension):
    files = [
        file.rename(file.with_suffix(extension)) for file in write_dicom_series(tmp_path, phantom(), make_affine())
    ]
    files[4].write_bytes(b"")
    for name in ("LOCKFILE", "1.txt"):
        (tmp_path / name).touch()
    inventory = discover(tmp_path)
    assert sorted(one.problem.code for one in inventory.series) == ["incomplete", "unreadable"]
    assert {aside.path.name: aside.reason for aside in inventory.set_aside} == dict.fromkeys(
        ("LOCKFILE", "1.txt"), "nothing in it but zero bytes"
    )


def test_junk_and_broken_nifti_beside_a_series_do_not_spoil_it(tmp_path):
    write_dicom_series(tmp_path, phantom(), make_affine())
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "dead.nii").symlink_to(tmp_path / "nowhere")
    assert [one.problem is None for one in discover(tmp_path).series] == [True, False]


@pytest.mark.parametrize("name", [".nii", ".nii.gz", ".dcm"])
def test_a_name_that_is_an_extension_only(tmp_path, name):
    if name == ".dcm":
        (tmp_path / name).touch()
    else:
        write_nifti(tmp_path / name, phantom(), make_affine())
    (one,) = discover(tmp_path).series
    assert one.name == name and (one.problem is None) == (name != ".dcm")


def test_a_series_below_a_relative_and_an_absolute_input(tmp_path, monkeypatch):
    files = write_dicom_series(tmp_path / "a", phantom(), make_affine())
    (tmp_path / "b").mkdir()
    files[0].rename(tmp_path / "b" / files[0].name)
    monkeypatch.chdir(tmp_path)
    (one,) = discover(["a", tmp_path / "b"]).series
    assert one.problem is None and len(one.files) == 5 and all(file.is_absolute() for file in one.files)

    def on_two_drives(paths):
        raise ValueError("Paths don't have the same drive")

    monkeypatch.setattr(os.path, "commonpath", on_two_drives)
    assert discover(["a", tmp_path / "b"]).series[0].name == "3_T1_test"


def test_results_of_earlier_runs_are_set_aside(tmp_path):
    for name in ("scan.nii", "run/p1/scan_seg.nii", "run/p1/mine.nii", "run/.medvit-x/scan_seg.nii", "a/scan_seg.nii"):
        write_nifti(tmp_path / name, phantom(), make_affine())
    lines = (b"[1]", b'"x"', b'{"outputs": 3}', b'{"outputs": [4]}', b'{"half', b"\xff", b"[" * 100_000, b"")
    record = {"case": "p1/scan", "status": "ok", "outputs": ["p1/scan_seg.nii", "p1/gone.png", "../scan.nii"]}
    (tmp_path / "run/manifest.jsonl").write_bytes(b"\n".join((*lines, json.dumps(record).encode(), b'{"case": "y"}')))
    (tmp_path / "a/manifest.jsonl").mkdir()
    inventory = discover(tmp_path)
    assert [one.name for one in inventory.series] == ["a/scan_seg", "run/p1/mine", "scan"]
    (result,) = [aside for aside in inventory.set_aside if aside.code == "result"]
    assert result.path == tmp_path / "run/p1/scan_seg.nii"
    assert result.reason == f"a result of an earlier run, listed in {tmp_path / 'run/manifest.jsonl'}"
    # who names a result means it
    assert [one.name for one in discover(tmp_path / "run/p1/scan_seg.nii").series] == ["scan_seg"]


def test_the_excluded_folder_cannot_be_an_input(tmp_path, monkeypatch):
    write_nifti(tmp_path / "a/scan.nii", phantom(), make_affine())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("a")
    for inputs in ("a", [tmp_path, tmp_path / "a"], "link"):
        with pytest.raises(OutputError, match="a: is an input too; choose another output folder, inside it if you"):
            discover(inputs, exclude="a")
    assert [one.name for one in discover("a", exclude="a/out").series] == ["scan"]


@pytest.mark.parametrize(
    ("written", "kept", "name"),
    [
        ("T1 DOE JOHN", "T1", "3_T1"),
        ("doe_john^T1-axial", "T1-axial", "3_T1-axial"),
        ("T1 (Doe) AB 4711-x 19700102 Roe", "T1 () AB -x", "3_T1_AB_-x"),
        ("Doe", "", "3_MR"),
        ("T1  Doenitz", "T1  Doenitz", "3_T1_Doenitz"),
    ],
)
def test_descriptions_that_name_the_patient(tmp_path, written, kept, name):
    write_dicom_series(
        tmp_path,
        phantom(),
        make_affine(),
        SeriesDescription=written,
        PatientName="Doe^John^AB",
        PatientID="4711",
        PatientBirthDate="19700102",
        OtherPatientNames=["Smith^John", "Roe^John"],
    )
    (one,) = discover(tmp_path).series
    assert (one.description, one.name) == (kept, name)


def test_a_truncated_slice_spoils_its_series_only(tmp_path):
    files = write_dicom_series(tmp_path / "a", phantom(), make_affine())
    write_dicom_series(tmp_path / "b", phantom(), make_affine())
    files[4].write_bytes(files[4].read_bytes()[:-10])
    a, b = discover(tmp_path).series
    assert b.problem is None and a.problem is not None and a.problem.code == "truncated"
    assert sorted(a.files) == sorted(files) and a.space is None
    assert f"{files[4].name} of 5 files: the file is cut short" in str(a.problem)
    with pytest.raises(UnreadableSeries, match=files[4].name):
        a.read()


def test_copies_in_two_folders_make_one_series(tmp_path):
    write_dicom_series(tmp_path / "a", phantom(), make_affine())
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (one,) = discover(tmp_path).series
    assert len(one.files) == 5 and one.name == "3_T1_test"
    assert one.notes[0].startswith("duplicates of other files ignored: 5 (")


def test_without_series_uid_a_folder_is_a_series(tmp_path):
    for name in "ab":
        write_dicom_series(tmp_path / name, phantom(), make_affine(), SeriesInstanceUID=None, StudyInstanceUID=None)
    series = discover(tmp_path).series
    assert [(one.name, len(one.files)) for one in series] == [("a/3_T1_test", 5), ("b/3_T1_test", 5)]
    assert series[0].notes == ("no SeriesInstanceUID: those of its folder and SeriesNumber were taken together",)


def test_an_image_file_of_a_pair_is_not_a_second_image(tmp_path):
    import nibabel

    nibabel.Nifti1Pair(phantom(), make_affine()).to_filename(tmp_path / "x.img")
    inventory = discover(tmp_path)
    assert [one.name for one in inventory.series] == ["x"]
    assert inventory.set_aside[0].reason == "the voxels of x.hdr"


def test_pydicoms_own_zoo():
    inventory = discover(BUNDLED)
    assert all(one.space is not None or one.problem is not None for one in inventory.series)
    names = {one.name for one in inventory.series}
    assert len(names) == len(inventory.series)
    heart = next(one for one in inventory.series if "SmartScore" in one.name)
    assert heart.problem is None and heart.space.shape == (16, 16, 5) and heart.space.spacing[2] == pytest.approx(2.5)
    brain = next(one for one in inventory.series if "Routine_Brain" in one.name)
    assert brain.problem.code == "missing-slice"
    damaged = {}
    usable = [one for one in inventory.series if one.problem is None]
    for one in usable:
        try:
            array = one.read().array
        except UnreadableFile as error:  # what headers cannot tell
            damaged[error.path.name] = str(error)
            continue
        assert array.shape == one.space.shape + ((3,) if one.channels == 3 else ())
        assert np.isfinite(array).all()
    assert list(damaged) == ["JPEG2000-embedded-sequence-delimiter.dcm"]
    assert "3722445056" in damaged["JPEG2000-embedded-sequence-delimiter.dcm"]
    assert len(usable) >= 40


# ---- photographs


@pytest.fixture
def album(tmp_path):
    write_picture(tmp_path / "left/eye.jpg", colours(70, 45), 6)
    write_picture(tmp_path / "left/eye.png", colours(70, 45)[..., 0])
    write_picture(tmp_path / "scan.0001", colours(24, 16), format="BMP")  # told by content
    write_nifti(tmp_path / "brain.nii", phantom(), make_affine())
    return tmp_path


def test_photographs_are_listed_with_size_and_channels(album, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("pixels were decoded"))
    inventory = discover(album)
    assert [(one.name, one.kind, one.channels, one.space.shape) for one in inventory.series] == [
        ("brain", "nifti", 1, (7, 6, 5)),
        ("left/eye", "raster", 3, (70, 45, 1)),
        ("left/eye_2", "raster", 1, (70, 45, 1)),
        ("scan.0001", "raster", 3, (24, 16, 1)),
    ]
    assert [one.space.unit for one in inventory.series] == ["mm", "px", "px", "px"]
    assert inventory.series[1].notes[0].startswith("its EXIF orientation is 6")
    assert inventory.set_aside == ()


def test_headers_of_photographs_tell_the_space_that_reading_gives(album):
    for one in discover(album / "left").series:
        volume = one.read()
        assert (volume.space, volume.source.name, volume.source.files) == (one.space, one.name, one.files)
        assert volume.notes == one.notes and volume.array.ndim == (4 if one.channels == 3 else 3)


def test_what_is_named_like_a_photograph_and_is_none_is_a_failure(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "b.PNG").write_text("hello")
    write_picture(tmp_path / "c.tif", colours(), tiffinfo={254: 1})
    (tmp_path / "d.bmp").symlink_to(tmp_path / "nowhere")
    again = "; get it again, or move it elsewhere if it is no image"
    found = [(one.kind, one.problem.code, str(one.problem).split(": ", 1)[1]) for one in discover(tmp_path).series]
    assert found == [
        ("raster", "unreadable", f"named like a photograph, but empty{again}"),
        ("raster", "unreadable", f"named like a photograph, but no PNG, JPEG, TIFF or BMP inside{again}"),
        ("raster", "multi-frame", found[2][2]),
        ("raster", "unreadable", f"cannot be opened: No such file or directory{again}"),
    ]


def test_a_picture_named_like_dicom_is_a_lost_slice(tmp_path):
    files = write_dicom_series(tmp_path, phantom(), make_affine())
    write_picture(tmp_path / "x.png", colours()).replace(files[0])
    broken, series = sorted(discover(tmp_path).series, key=lambda one: len(one.files))
    assert "named like DICOM, but not DICOM inside" in str(broken.problem)
    assert series.problem.code == "incomplete"
    with pytest.raises(UnreadableFile, match="not a DICOM file"):
        read_volume(broken.files)


def test_a_dicom_file_that_is_a_tiff_as_well_is_dicom(tmp_path):
    for file in write_dicom_series(tmp_path, phantom(), make_affine()):
        file.write_bytes(b"II*\0".ljust(128, b"\0") + file.read_bytes()[128:])
    (one,) = discover(tmp_path).series
    assert (one.kind, one.problem) == ("dicom", None)
    np.testing.assert_array_equal(one.read().array, phantom())


def test_a_picture_beside_a_volume_does_not_change_its_name(tmp_path):
    for name in ("scan.nii", "scan.nii.gz"):
        write_nifti(tmp_path / name, phantom(), make_affine())
    before = [one.name for one in discover(tmp_path).series]
    for name in ("Scan.jpg", "scan.bmp", "scan_2.png"):
        write_picture(tmp_path / name, colours())
    after = discover(tmp_path).series
    assert [one.name for one in after if one.kind == "nifti"] == before == ["scan", "scan_2"]
    assert [(one.name, one.files[0].name) for one in after if one.kind == "raster"] == [
        ("scan_2_2", "scan_2.png"),
        ("Scan_3", "Scan.jpg"),
        ("scan_4", "scan.bmp"),
    ]
    assert [one.name.lower() for one in after] == sorted(one.name.lower() for one in after)


# ---- what real folders hold


def accounted(inventory, folder):
    """Every file below ``folder``, by what became of it; fails for one that is named nowhere, or twice as usable."""
    used = [file for one in inventory.series if one.problem is None for file in one.origins]
    refused = {file for one in inventory.series if one.problem is not None for file in one.origins}
    aside = [one.path for one in inventory.set_aside]
    there = {path for path in folder.rglob("*") if path.is_file()}
    assert {*used, *refused, *aside} == there
    assert not refused & set(aside) and not set(used) & set(aside) and not set(used) & refused
    assert len(aside) == len(set(aside))
    return used, refused, aside


def test_a_flat_folder_of_several_patients_studies_and_series(tmp_path):
    """Names in any order, without extensions; equal descriptions, numbers and frames of reference."""
    arrays, n = {}, 0
    for patient in range(2):
        for study in range(2):
            for number in (3, 4):
                uid = f"1.2.{patient}.{study}.{number}"
                array = phantom(seed=n)
                known = {
                    "PatientID": str(patient),
                    "StudyInstanceUID": f"1.2.{patient}.{study}",
                    "SeriesNumber": number,
                }
                for file in write_dicom_series(
                    tmp_path, array, make_affine("oblique"), prefix=f"x{n}", SeriesInstanceUID=uid, **known
                ):
                    file.rename(file.with_name(f"{(int(file.stem[-4:]) * 37 + n * 11) % 101:03d}-{n}"))
                arrays[uid] = array
                n += 1
    inventory = discover(tmp_path)
    assert len(inventory.series) == len(arrays) == 8
    assert len({one.name for one in inventory.series}) == 8
    for one in inventory.series:
        assert one.problem is None
        np.testing.assert_array_equal(one.read().array, arrays[one.series_uid])
        np.testing.assert_allclose(one.space.affine, make_affine("oblique"), atol=2e-6)
    used, refused, aside = accounted(inventory, tmp_path)
    assert (len(used), len(refused), len(aside)) == (40, 0, 0)


def test_scouts_inside_the_same_series_uid(tmp_path):
    """Other orientation, spacing, matrix, or labelled: the volume is whole, and its spacing its own."""
    array = phantom((7, 6, 9))
    write_dicom_series(tmp_path, array, make_affine("axial"), **UIDS)
    scout = phantom((7, 6, 1), seed=1)
    write_dicom_series(tmp_path, scout, make_affine("coronal"), prefix="A", **UIDS)
    write_dicom_series(tmp_path, scout, make_affine(spacing=(0.817, 1.25, 2.5)), prefix="B", **UIDS)
    write_dicom_series(tmp_path, phantom((9, 6, 1)), make_affine(), prefix="C", **UIDS)
    labelled = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write_dicom_series(tmp_path, scout, make_affine(), prefix="D", ImageType=labelled, **UIDS)
    inventory = discover(tmp_path)
    volumes = {one.space.shape: one for one in inventory.series if len(one.files) > 1}
    assert list(volumes) == [(7, 6, 9)] and len(inventory.series) == 4
    np.testing.assert_array_equal(volumes[7, 6, 9].read().array, array)
    np.testing.assert_allclose(volumes[7, 6, 9].space.affine, make_affine("axial"), atol=2e-6)
    assert [(a.path.name[0], a.code, a.reason) for a in inventory.set_aside] == [
        ("D", "localizer", "a scout image, made to plan others")
    ]
    accounted(inventory, tmp_path)


def test_every_kind_of_file_at_once(tmp_path):
    """Images beside reports, segmentations, junk, copies, lost and damaged files: each is named exactly once."""
    good = write_dicom_series(tmp_path / "good", phantom(), make_affine())
    shutil.copy(good[1], tmp_path / "good" / "copy.dcm")
    gap = write_dicom_series(tmp_path / "gap", phantom(), make_affine("coronal"))
    gap[2].unlink()
    cut = write_dicom_series(tmp_path / "cut", phantom(), make_affine())
    cut[3].write_bytes(cut[3].read_bytes()[:-7])
    lost = write_dicom_series(tmp_path / "lost", phantom(), make_affine())
    lost[0].write_bytes(b"")
    echoes = [{"EchoTime": 3}, {"EchoTime": 6}]
    write_volumes(tmp_path / "echoes", arrays_of(2), make_affine(), *echoes, StudyInstanceUID="1.5")
    write_flat(tmp_path / "xray" / "a", np.zeros((1, 6, 7), np.uint8), "1.1", "DX")
    for name in ("reportsi.dcm", "liver_1frame.dcm", "rtdose.dcm", "rtplan.dcm", "rtstruct.dcm"):
        if (BUNDLED / name).is_file():
            shutil.copy(BUNDLED / name, tmp_path)
    write_nifti(tmp_path / "scan.nii.gz", phantom(), make_affine())
    write_picture(tmp_path / "photo.jpg", colours())
    for name, content in (
        ("Thumbs.db", b"x"),
        ("._a.dcm", b"\0\5"),
        ("notes.txt", b"hello"),
        ("zeros.bin", b"\0" * 99),
    ):
        (tmp_path / name).write_bytes(content)
    inventory = discover(tmp_path)
    used, refused, _ = accounted(inventory, tmp_path)
    problems = {one.name: one.problem.code for one in inventory.series if one.problem}
    assert problems == {
        "cut/3_T1_test": "truncated",
        "gap/3_T1_test": "missing-slice",
        f"lost/{lost[0].name}": "unreadable",
        "lost/3_T1_test": "incomplete",
    }
    assert {path.parent.name for path in refused} == {"gap", "cut", "lost"} and len(refused) == 4 + 5 + 5
    assert len(used) == 5 + 10 + 1 + 1 + 1
    codes = {a.path.name: a.code for a in inventory.set_aside}
    assert codes["copy.dcm" if "copy.dcm" in codes else good[1].name] == "duplicate"
    for name in ("Thumbs.db", "._a.dcm", "notes.txt", "zeros.bin", "reportsi.dcm", "liver_1frame.dcm"):
        assert codes[name] == "not-an-image"
    assert all(one.reason for one in inventory.set_aside)


def test_a_dicomdir_beside_its_files_is_set_aside(tmp_path):
    shutil.copytree(BUNDLED / "dicomdirtests", tmp_path / "cd")
    inventory = discover(tmp_path)
    (directory,) = [one for one in inventory.set_aside if one.path == tmp_path / "cd" / "DICOMDIR"]
    assert directory.code == "not-an-image" and "Media Storage Directory" in directory.reason
    assert len(accounted(inventory, tmp_path)[0]) > 20


def test_a_dicomdir_alone_is_refused(tmp_path):
    shutil.copy(BUNDLED / "dicomdirtests" / "DICOMDIR", tmp_path)
    inventory = discover(tmp_path)
    (one,) = inventory.series
    assert one.problem.code == "unreadable" and one.files == (tmp_path / "DICOMDIR",)
    assert re.search(r"lists \d+ files that are not there, such as \w+; get them too", str(one.problem))
    accounted(inventory, tmp_path)


def test_a_study_in_an_archive(tmp_path):
    """Its members are images with names below the archive's; nothing of it is read unless asked."""
    arrays = arrays_of(2)
    write_volumes(tmp_path / "in" / "p1", arrays, make_affine("oblique"), {"EchoTime": 3}, {"EchoTime": 6})
    write_nifti(tmp_path / "in" / "p2" / "scan.nii", phantom(seed=5), make_affine())
    (tmp_path / "in" / "readme.txt").write_text("hello")
    shutil.make_archive(str(tmp_path / "out" / "study"), "zip", tmp_path / "in")
    closed = discover(tmp_path / "out")
    assert closed.series == () and [a.code for a in closed.set_aside] == ["archive"]
    inventory = discover(tmp_path / "out", unpack=True)
    assert [one.name for one in inventory.series] == ["study/p1/3_T1_test_v0", "study/p1/3_T1_test_v1", "study/p2/scan"]
    for one, array in zip(inventory.series, [*arrays, phantom(seed=5)], strict=True):
        np.testing.assert_array_equal(one.read().array, array)
    archive = tmp_path / "out" / "study.zip"
    assert [(a.path, a.code) for a in inventory.set_aside] == [
        (archive, "archive"),
        (archive / "readme.txt", "not-an-image"),
    ]
    named = {path for one in inventory.series for path in one.origins} | {a.path for a in inventory.set_aside}
    inside = {archive / path.relative_to(tmp_path / "in") for path in (tmp_path / "in").rglob("*") if path.is_file()}
    assert named == inside | {archive}
    unpacked = inventory.series[0].files[0]
    assert unpacked.is_file()
    del inventory, one
    gc.collect()
    assert not unpacked.exists()  # as long as the series are there, and no longer


@pytest.mark.parametrize("content", [b"PK\x03\x04 no archive at all", b""])
def test_a_damaged_archive_is_a_failure(tmp_path, content):
    (tmp_path / "study.zip").write_bytes(content)
    inventory = discover(tmp_path, unpack=True)
    if content:
        (one,) = inventory.series
        assert one.problem.code == "unreadable" and "study.zip: a damaged archive" in str(one.problem)
    accounted(inventory, tmp_path)


def test_names_of_volumes_never_meet(tmp_path):
    """``x_v0`` of a series ``x`` beside a file that is called so; and where case does not count."""
    arrays = [*arrays_of(2), phantom(seed=7), phantom(seed=8)]
    write_nifti(tmp_path / "x.nii", np.stack(arrays[:2], -1), make_affine())
    write_nifti(tmp_path / "x_v0.nii", arrays[2], make_affine())
    write_nifti(tmp_path / "X_V1.nii", arrays[3], make_affine())
    series = discover(tmp_path).series
    assert len({one.name.lower() for one in series}) == 4
    found = {one.files[0].name + str(one.volume if one.volumes > 1 else ""): one.read().array for one in series}
    for name, array in zip(("x.nii0", "x.nii1", "x_v0.nii0", "X_V1.nii0"), arrays, strict=True):
        np.testing.assert_array_equal(found[name if name in found else name[:-1]], array)


def test_unreadable_files_that_may_belong_to_several_series_are_a_note(tmp_path):
    """Two series in one folder, files named alike: which of them misses a slice is not known."""
    for number in (3, 4):
        files = write_dicom_series(tmp_path, phantom(), make_affine(), SeriesNumber=number, prefix=f"IM{number}")
    (tmp_path / "IM99999.dcm").write_bytes(b"")
    lost, *series = sorted(discover(tmp_path).series, key=lambda one: one.problem is None)
    assert lost.problem.code == "unreadable" and len(series) == 2 and len(files) == 5
    note = "files beside it cannot be read and may be its first or last slice: 1 (IM99999.dcm)"
    for one in series:
        assert one.problem is None and one.notes == (note,) and one.read().notes == (note,)


@pytest.mark.parametrize(
    ("names", "lost"),
    [
        (["3fa85f64.dcm", "b4c1d2e9.dcm", "00ff13aa.dcm", "7e57d004.dcm", "5ca1ab1e.dcm"], "0ddba115.dcm"),
        (["1.2.840.11", "1.2.840.12", "1.2.840.9", "1.2.840.10", "1.2.840.13"], "1.2.840.8"),
        (["a1-f0", "b2-c3", "0d-9e", "77-a0", "e9-2b"], "c0-1d"),
    ],
)
def test_a_lost_file_is_known_by_its_name_among_others_named_alike(tmp_path, names, lost):
    """Numbers, UIDs and hashes; it may be the first or last slice, which leaves no gap."""
    for file, name in zip(write_dicom_series(tmp_path, phantom(), make_affine()), names, strict=True):
        file.rename(tmp_path / name)
    (tmp_path / lost).write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0")
    series = {one.problem.code: one for one in discover(tmp_path).series}
    assert sorted(series) == ["incomplete", "unreadable"] and lost in str(series["incomplete"].problem)


def test_thousands_of_lost_files_take_no_time(tmp_path):
    (file,) = write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine())
    header = read_header(file)
    groups = [
        Group(tuple((replace(header, path=tmp_path / f"{c}{k}.dcm"), header.frames[0]) for k in range(100)))
        for c in range(100)
    ]
    paths = [tmp_path / f"{name}{n}.dcm" for name in "x7" for n in range(1000)]
    start = time.perf_counter()
    lost = LostFiles(paths, groups)
    found = [lost.of(group) for group in groups]
    assert time.perf_counter() - start < 5  # 0.3 s on an idle core
    assert [(len(probable), len(possible)) for probable, possible in found] == [(0, 1000)] * 100


def test_copies_of_a_multi_frame_file_are_dropped(tmp_path):
    affine = make_affine("oblique")
    shared = {**measures_group(affine), **orientation_group(affine)}
    groups = [position_group(affine, k) for k in range(5)]
    path = write_multiframe(tmp_path / "a.dcm", list(np.moveaxis(phantom(), 2, 0)), groups, shared)
    shutil.copy(path, tmp_path / "b.dcm")
    inventory = discover(tmp_path)
    (one,) = inventory.series
    assert one.problem is None and [(a.path.name, a.code) for a in inventory.set_aside] == [("b.dcm", "duplicate")]
    np.testing.assert_array_equal(one.read().array, phantom())
    accounted(inventory, tmp_path)


def told(inventory):
    """An inventory as values that compare, without the temporary folders of archives."""
    unequal = dict.fromkeys(("problem", "assembly", "archive"))
    series = [
        (replace(one, **unequal, files=one.origins), type(one.problem), str(one.problem).rpartition("/")[2])
        for one in inventory.series
    ]
    return series, inventory.set_aside


def test_processes_find_the_same(tree, tmp_path, monkeypatch):
    shutil.copytree(BUNDLED, tmp_path / "zoo")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tree / "p2")
    (tmp_path / "\udcffname.dcm").write_bytes(b"")
    monkeypatch.setattr(workers, "ENOUGH", 10)
    monkeypatch.setattr(workers, "_CHUNK", 8)
    asked = []

    def ask(self, request):
        asked.append(len(answer := answers(self, request)))
        return answer

    answers = workers.Workers._ask
    monkeypatch.setattr(workers.Workers, "_ask", ask)
    counts = []

    def progress(count):  # gives the processes time to start
        counts.append(count)
        time.sleep(0.03 if count < 60 else 0)

    one = told(discover(tmp_path, unpack=True, processes=1))
    assert not asked
    two = told(discover(tmp_path, unpack=True, processes=2, progress=progress))
    assert one[0] == two[0] and one[1] == two[1]
    assert len(asked) > 10 and min(asked) > 0 and counts == list(range(1, len(counts) + 1))
    assert any(kind is UnreadableFile for _, kind, _ in two[0])
    assert any("packed.zip" in str(one.files) for one, _, _ in two[0])


def test_equal_names_by_the_thousand_are_numbered_quickly():
    start = time.process_time()
    names = [name for name, _ in _uniquely_named([("x", n) for n in range(20_000)] + [("x_7", -1)])]
    assert len(set(names)) == 20_001 and names[:3] == ["x", "x_2", "x_3"]
    assert time.process_time() - start < 5  # seconds; 40 if each counted from one
