import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from bundle_synthetic import write_cohort
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import colours, write_picture

from medvit.data.cohort import labelled_cases
from medvit.data.reader import read_volume
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
        ("four", UnreadableSeries, "one volume is needed, but the file holds 2; save the one that is meant"),
        ("text", UnreadableFile, "c.txt: an image is needed"),
    ]
    for split, error, message in cases:
        with pytest.raises(error, match=message):
            labelled_cases(tmp_path, split)


# ---- photographs


def _album(folder: Path, fov: bool = True) -> Path:
    for n in range(2):
        write_picture(folder / f"image/{n}.jpg", colours(seed=n))
        for column in ("label", "fov"):
            write_picture(folder / f"{column}/{n}.png", colours(seed=n)[..., 0] // 128 * 255)
    rows = [f"eye{n},image/{n}.jpg,label/{n}.png,{'train' if n else 'val'}" + fov * f",fov/{n}.png" for n in range(2)]
    return _table(folder, "case_id,image,label,split" + fov * ",fov", *rows)


def test_photographs_with_further_masks(tmp_path: Path) -> None:
    assert labelled_cases(_album(tmp_path), "train", others=["fov"]) == [
        {
            "image": str(tmp_path / "image/1.jpg"),
            "label": str(tmp_path / "label/1.png"),
            "fov": str(tmp_path / "fov/1.png"),
            "case": "eye1",
        }
    ]
    assert set(labelled_cases(tmp_path, "val")[0]) == {"image", "label", "case"}


def test_further_masks_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(NothingFound, match="lacks the columns fov; it must have case_id, image, label, split, fov"):
        labelled_cases(_album(tmp_path, fov=False), "train", ["fov"])
    _album(tmp_path)
    write_picture(tmp_path / "fov/1.png", np.zeros((45, 71), np.uint8))
    with pytest.raises(SpaceMismatch, match=r"image and fov of eye1 must share .* \(70, 45, 1\) and \(71, 45, 1\)"):
        labelled_cases(tmp_path, "train", ["fov"])
    (tmp_path / "fov/1.png").unlink()
    with pytest.raises(NothingFound, match=r"fov/1\.png: no such file, but .* names it as fov of eye1"):
        labelled_cases(tmp_path, "train", ["fov"])


def test_a_label_in_colours_is_refused(tmp_path: Path) -> None:
    write_picture(_album(tmp_path) / "label/1.png", colours()[..., 0], mode="P")
    with pytest.raises(UnreadableSeries, match=r"label/1\.png: a label needs one value per pixel, .* has 3: colours"):
        labelled_cases(tmp_path, "train")


def test_an_image_that_is_turned_and_its_label_are_no_pair(tmp_path: Path) -> None:
    write_picture(_album(tmp_path) / "image/1.jpg", colours(), 3)
    with pytest.raises(SpaceMismatch, match=r"image and label of eye1 .* px apart; correct the table"):
        labelled_cases(tmp_path, "train")


def test_a_photograph_and_a_volume_are_no_pair(tmp_path: Path) -> None:
    write_nifti(_album(tmp_path) / "label/1.nii", np.zeros((70, 45, 1), np.uint8), np.eye(4))
    _table(tmp_path, "case_id,image,label,split", "eye1,image/1.jpg,label/1.nii,train")
    with pytest.raises(SpaceMismatch, match="one lies in px and the other in mm"):
        labelled_cases(tmp_path, "train")


def test_the_retina_data_set_is_served() -> None:
    folder = Path(__file__).parents[3] / "shared/data/retina_vessels"
    if not (folder / "cases.csv").is_file():
        pytest.skip("the data set is not beside this checkout")
    cases = {split: labelled_cases(folder, split, others=["fov"]) for split in ("train", "val")}
    assert {split: len(found) for split, found in cases.items()} == {"train": 20, "val": 4}
    assert read_volume(cases["val"][0]["image"]).array.shape == (1168, 779, 1, 3)
    assert read_volume(cases["val"][0]["fov"]).array.shape == (1168, 779, 1)
