import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import colours, write_picture

from medvit.data.cases import list_cases
from medvit.data.reader import read_volume
from medvit.errors import MedvitError, NothingFound, OutputError, UnreadableFile, UnreadableSeries


@pytest.fixture
def folder(tmp_path):
    write_dicom_series(tmp_path / "p1", phantom(), make_affine("oblique"), SeriesDescription="T1")
    write_dicom_series(tmp_path / "p1", phantom(), make_affine(), prefix="ct", modality="CT", SeriesDescription="Head")
    write_nifti(tmp_path / "p2" / "twin.nii.gz", phantom(), make_affine())
    (tmp_path / "readme.txt").write_text("hello")
    return tmp_path


def test_lists_everything_by_name(folder):
    cases = list_cases(folder)
    assert [case["case"] for case in cases] == ["p1/3_Head", "p1/3_T1", "p2/twin"]
    assert cases[2]["image"] == str(folder / "p2" / "twin.nii.gz")
    assert len(cases[1]["image"]) == 5 and all(isinstance(file, str) for file in cases[1]["image"])
    for case in cases:
        assert read_volume(case["image"]).array.shape == (7, 6, 5)


def test_other_modalities_are_skipped_with_a_line(folder, caplog):
    with caplog.at_level(logging.INFO, "medvit"):
        cases = list_cases(folder, ["mr"], key="t1")
    assert [case["case"] for case in cases] == ["p1/3_T1", "p2/twin"] and set(cases[0]) == {"t1", "case", "notes"}
    assert "p1/3_Head: skipped, its modality is CT and not MR" in caplog.text
    assert "readme.txt: set aside (not-an-image)" in caplog.text


def test_unknown_modality_is_not_guessed(tmp_path, caplog):
    write_dicom_series(tmp_path, phantom(), make_affine(), Modality=None)
    write_nifti(tmp_path / "x.nii", phantom(), make_affine())
    assert [case["case"] for case in list_cases(tmp_path, ["MR"])] == ["x"]
    assert "its modality is unknown and not MR" in caplog.text


def test_broken_candidates_are_listed_so_that_they_fail(folder):
    bad = folder / "p2" / "bad.nii.gz"
    bad.write_bytes(b"junk")
    cut = folder / "p2" / "cut.dcm"
    cut.write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\0\0UL\4\0")
    for file in read_volume(list_cases(folder, ["MR"])[0]["image"]).source.files[2:3]:
        file.unlink()
    cases = {case["case"]: case["image"] for case in list_cases(folder, ["MR"])}
    assert list(cases) == ["p1/3_T1", "p2/bad", "p2/cut", "p2/twin"]
    for name in ("p1/3_T1", "p2/bad", "p2/cut"):
        with pytest.raises(MedvitError):
            read_volume(cases[name])


def test_unreadable_files_are_cases_that_fail(folder):
    (folder / "p1" / "zero.dcm").touch()
    cases = {case["case"]: case["image"] for case in list_cases(folder, ["MR"])}
    assert list(cases) == ["p1/3_T1", "p1/zero.dcm", "p2/twin"]
    with pytest.raises(UnreadableFile, match=r"zero\.dcm: the file is empty"):
        read_volume(cases["p1/zero.dcm"])
    assert read_volume(cases["p1/3_T1"]).array.shape == (7, 6, 5)  # its name is none of a slice
    (folder / "p1" / "zero.dcm").rename(folder / "p1" / "IM0005.dcm")
    cases = {case["case"]: case["image"] for case in list_cases(folder, ["MR"])}
    with pytest.raises(UnreadableSeries, match=r"1 cannot be read \(IM0005\.dcm\)") as caught:
        read_volume(cases["p1/3_T1"])
    assert caught.value.code == "incomplete"


def test_notes_of_discovery_come_along(folder):
    write_nifti(folder / "p2" / "hole.nii", phantom(), make_affine(), sform_code=0, qform_code=0)
    notes = {case["case"]: case["notes"] for case in list_cases(folder)}
    assert notes == {
        "p1/3_Head": [],
        "p1/3_T1": [],
        "p2/hole": ["its orientation is unknown: neither sform nor qform is set"],
        "p2/twin": [],
    }


def test_the_output_folder_cannot_be_the_input(folder):
    with pytest.raises(OutputError, match="is an input too; choose another output folder"):
        list_cases(folder, exclude=folder)


def test_nothing_found_says_what_was_looked_for_and_what_is_there(folder, tmp_path):
    with pytest.raises(NothingFound) as caught:
        list_cases(folder / "p1", ["PT", "NM"])
    message = str(caught.value)
    assert message.startswith(
        f"{folder / 'p1'}: no DICOM series of modality NM or PT and no NIfTI file and no MetaImage"
    )
    assert "series of other modalities: CT, MR" in message
    (tmp_path / "junk").mkdir()
    with pytest.raises(NothingFound, match="there is: nothing at all"):
        list_cases(tmp_path / "junk")
    for n in range(5):
        (tmp_path / "junk" / f"{n}.txt").write_text("x")
    with pytest.raises(
        NothingFound,
        match=r"0\.txt: no DICOM, NIfTI, NRRD, MetaImage, .* or BMP file; .*; and 2 more files that are no images",
    ):
        list_cases([tmp_path / "junk"])


def test_the_log_names_no_patient(folder, caplog):
    with caplog.at_level(logging.DEBUG):
        list_cases(folder, ["MR"])
    assert caplog.text and not any(secret in caplog.text for secret in ("Doe", "SECRET", "1970"))


def test_importing_the_package_imports_neither_monai_nor_torch():
    code = "import sys, medvit.data as d; d.discover; d.list_cases; assert not {'monai', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_public_names():
    import medvit.data

    assert all(getattr(medvit.data, name) is not None for name in medvit.data.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = medvit.data.nonsense


def test_results_below_the_input_folder_are_no_inputs(tmp_path: Path) -> None:
    write_nifti(tmp_path / "image.nii.gz", np.zeros((4, 5, 6), np.float32), np.eye(4))
    write_nifti(tmp_path / "results" / "image_seg.nii.gz", np.zeros((4, 5, 6), np.uint8), np.eye(4))
    assert [case["case"] for case in list_cases(tmp_path)] == ["image", "results/image_seg"]
    assert [case["case"] for case in list_cases(tmp_path, exclude=tmp_path / "results")] == ["image"]
    assert [case["case"] for case in list_cases(tmp_path, exclude=tmp_path / "absent")] == [
        "image",
        "results/image_seg",
    ]


# ---- volumes and photographs


def test_photographs_are_no_cases_where_volumes_are_wanted(folder, caplog):
    before = list_cases(folder)
    write_picture(folder / "p1/screenshot.png", colours())
    (folder / "p1/broken.jpg").write_bytes(b"")
    with caplog.at_level(logging.INFO, "medvit"):
        assert list_cases(folder) == before
    said = [(record.levelname, record.message) for record in caplog.records if "skipped" in record.message]
    kinds = "a DICOM series or a NIfTI file or a MetaImage or NRRD file"
    assert said == [
        ("INFO", f"p1/{name}: skipped, it is a photograph and not {kinds}") for name in ("broken.jpg", "screenshot")
    ]


def test_volumes_are_no_cases_where_photographs_are_wanted(folder, caplog):
    picture = write_picture(folder / "p1/eye.png", colours(), 3)
    (folder / "p1/broken.jpg").write_bytes(b"")
    with caplog.at_level(logging.INFO, "medvit"):
        broken, eye = list_cases(folder, kinds=["raster"])
    assert (eye["image"], eye["case"]) == (str(picture), "p1/eye")
    assert "its EXIF orientation is 3" in eye["notes"][0]
    assert broken["image"] == str(folder / "p1/broken.jpg")  # will fail, and must be seen to
    said = [(record.levelname, record.message) for record in caplog.records if "skipped" in record.message]
    assert said == [
        ("WARNING", "p1/3_Head: skipped, it is a DICOM series and not a photograph"),
        ("WARNING", "p1/3_T1: skipped, it is a DICOM series and not a photograph"),
        ("WARNING", "p2/twin: skipped, it is a NIfTI file and not a photograph"),
    ]
    assert [case["case"] for case in list_cases(folder, kinds=["raster", "nifti"])] == [
        "p1/broken.jpg", "p1/eye", "p2/twin",
    ]  # fmt: skip


def test_nothing_of_the_kind(folder, tmp_path):
    with pytest.raises(
        NothingFound, match=r"no photograph found; there is: DICOM series: 2, not taken here; NIfTI file: 1"
    ):
        list_cases(folder, kinds=["raster"])
    write_picture(tmp_path / "album/eye.png", colours())
    with pytest.raises(
        NothingFound, match=r"no NIfTI file and no MetaImage or NRRD file found; .*: photograph: 1, not taken here"
    ):
        list_cases(tmp_path / "album")


def test_a_closed_folder_may_hold_photographs(folder, monkeypatch):
    write_picture(folder / "eye.png", colours())
    (folder / "closed").mkdir()
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert [case["case"] for case in list_cases(folder, kinds=["raster"])] == ["closed", "eye"]


def test_a_photograph_of_a_format_that_is_not_read_is_told_loudly(tmp_path, caplog):
    write_picture(tmp_path / "eye.png", colours())
    (tmp_path / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (tmp_path / "readme.txt").write_text("hello")
    with caplog.at_level(logging.WARNING, "medvit"):
        assert [case["case"] for case in list_cases(tmp_path, kinds=["raster"])] == ["eye"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "phone.HEIC: set aside (not-an-image): no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF or BMP" in line


@pytest.mark.parametrize("kinds", [[], ["png"], ["raster", "PHOTO"]])
def test_unknown_kinds(folder, kinds):
    with pytest.raises(ValueError, match=r"kinds must be some of dicom, nifti, itk, raster, projection, got \["):
        list_cases(folder, kinds=kinds)
