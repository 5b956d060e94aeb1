import csv
from pathlib import Path

import pytest
from bundle_synthetic import write_cohort

from medvit.data.cohort import labelled_cases
from medvit.errors import NothingFound


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
    (tmp_path / "a.nii").touch()
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
