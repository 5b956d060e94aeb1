import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundle_synthetic import write_cohort
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti

from medvit.data.cohort import labelled_cases
from medvit.errors import MedvitError, NothingFound, SpaceMismatch, UnreadableFile, UnreadableSeries


def _table(folder: Path, *lines: str, encoding: str = "utf-8") -> Path:
    (folder / "cases.csv").write_text("\n".join(lines) + "\n", encoding=encoding)
    return folder


def test_cases_come_in_the_order_of_the_table_with_whole_paths(tmp_path):
    write_cohort(tmp_path, train=2, val=1)
    assert labelled_cases(tmp_path, "train") == [
        {"image": str(tmp_path / f"image/{c}.nii.gz"), "label": str(tmp_path / f"label/{c}.nii.gz"), "case": c}
        for c in ("case0", "case1")
    ]
    assert [case["case"] for case in labelled_cases(str(tmp_path), "val")] == ["case2"]


def test_other_columns_their_order_and_a_byte_order_mark_do_not_matter(tmp_path):
    write_nifti(tmp_path / "a.nii", phantom(), make_affine())
    _table(tmp_path, "split,age,label,image,case_id", "val,70,a.nii,a.nii,x", encoding="utf-8-sig")
    assert [case["case"] for case in labelled_cases(tmp_path, "val")] == ["x"]


def test_no_table(tmp_path):
    with pytest.raises(
        NothingFound, match=r"cases\.csv: no such table; dataset_dir must hold .* case_id, image, label"
    ):
        labelled_cases(tmp_path, "train")


@pytest.mark.parametrize("lines", [("case_id,image",), ("case_id,image", "a,b"), ("",)])
def test_missing_columns_are_named_even_without_rows(tmp_path, lines):
    _table(tmp_path, *lines)
    with pytest.raises(
        NothingFound, match=r"lacks the columns .*label, split; it must have case_id, image, label, split"
    ):
        labelled_cases(tmp_path, "train")


def test_an_unknown_split_lists_those_there_are(tmp_path):
    write_cohort(tmp_path, train=1, val=1)
    with pytest.raises(NothingFound, match="no case in split 'test'; the table has 'train', 'val'"):
        labelled_cases(tmp_path, "test")
    _table(tmp_path, "case_id,image,label,split")
    with pytest.raises(NothingFound, match="no case in split 'test'; the table has no rows"):
        labelled_cases(tmp_path, "test")


def test_a_missing_file_is_named_before_training_starts(tmp_path):
    write_cohort(tmp_path, train=2, val=1)
    (tmp_path / "label/case1.nii.gz").unlink()
    with pytest.raises(
        NothingFound, match=r"label/case1.nii.gz: no such file, but .*cases.csv names it as label of case1"
    ):
        labelled_cases(tmp_path, "train")
    assert len(labelled_cases(tmp_path, "val")) == 1


def test_a_short_row_is_a_missing_file(tmp_path):
    with (tmp_path / "cases.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["split", "case_id", "image", "label"], ["train", "a"]])
    with pytest.raises(NothingFound, match="names it as image of a"):
        labelled_cases(tmp_path, "train")


def test_image_and_label_must_share_a_grid(tmp_path):
    write_cohort(tmp_path, train=2, val=1)
    label = tmp_path / "label/case1.nii.gz"
    affine = make_affine("axial", (1, 1, 1))
    affine[0, 3] += 2
    write_nifti(label, np.zeros((20, 28, 20), np.uint8), affine)
    with pytest.raises(SpaceMismatch, match=r"label of case1 must share .* 2 mm apart; correct the table, or resample"):
        labelled_cases(tmp_path, "train")
    write_nifti(label, np.zeros((20, 28, 21), np.uint8), make_affine("axial", (1, 1, 1)))
    with pytest.raises(SpaceMismatch, match=r"case1 .* shapes \(20, 28, 20\) and \(20, 28, 21\)"):
        labelled_cases(tmp_path, "train")


def test_grids_are_compared_without_reading_voxels(tmp_path, monkeypatch):
    write_cohort(tmp_path, train=2, val=1)
    monkeypatch.setattr("nibabel.arrayproxy.ArrayProxy.__array__", lambda *_, **__: pytest.fail("voxels were read"))
    assert len(labelled_cases(tmp_path, "train")) == 2


def test_files_that_cannot_be_used_are_named_before_training_starts(tmp_path):
    (slice_,) = write_dicom_series(tmp_path, phantom((7, 6, 1)), make_affine())
    shutil.copy(slice_, tmp_path / "b.dcm")
    write_nifti(tmp_path / "four.nii", np.zeros((3, 3, 3, 2), np.int16), np.eye(4))
    (tmp_path / "c.txt").write_text("hello")
    rows = (f"x,dicom,{slice_.name},b.dcm", "y,four,four.nii,four.nii", "z,text,c.txt,c.txt")
    _table(tmp_path, "case_id,split,image,label", *rows)
    assert len(labelled_cases(tmp_path, "dicom")) == 1
    cases: list[tuple[str, type[MedvitError], str]] = [
        ("four", UnreadableSeries, "one 3D volume is needed"),
        ("text", UnreadableFile, "c.txt: an image is needed"),
    ]
    for split, error, message in cases:
        with pytest.raises(error, match=message):
            labelled_cases(tmp_path, split)
