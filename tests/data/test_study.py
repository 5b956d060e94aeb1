import json
import os
import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import colours, write_picture
from PIL import ImageFile
from pydicom.data import get_testdata_file

from medvit.data.reader import read_volume
from medvit.data.study import discover
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
    assert good.problem is not None and good.problem.code == "incomplete" and "(cut.dcm)" in str(good.problem)


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
    assert a.files == tuple(sorted(files)) and a.space is None
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
    assert series[0].notes == ("no SeriesInstanceUID: the files of its folder were taken together",)


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
    usable = [one for one in inventory.series if one.problem is None]
    assert len(usable) >= 10
    for one in usable:
        assert one.read().array.shape == one.space.shape


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
