"""Photographs from file to file, through both doors, with a network whose answer is known."""

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from photographs_synthetic import colours, labels_of, make_photograph_bundle, write_picture
from PIL import Image, ImageOps
from test_cli import _loggers, failure, manifest, medvit, tree  # noqa: F401  a fixture for every test

from medvit.bundle import Bundle
from medvit.data import list_cases, read_volume

# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_photograph_bundle(tmp_path_factory.mktemp("bundles"))


@pytest.fixture
def album(tmp_path):
    """Four photographs in all formats, one of them turned; smaller and larger than the window."""
    folder = tmp_path / "in"
    write_picture(folder / "p1/left.png", colours(70, 45))
    write_picture(folder / "p1/right.jpg", colours(50, 90, seed=1), 6, quality=95)
    write_picture(folder / "p2/small.tif", colours(20, 16, seed=2), 8)
    write_picture(folder / "p2/zoom.bmp", colours(33, 100, seed=3))
    return folder


def stored(path):
    """Pixels (row, column, 3) as they are in the file: pillow turns a TIFF when it reads it."""
    image = Image.open(path)
    turn = image.tag_v2.get(274) if image.format == "TIFF" else None
    return np.rot90(np.asarray(image), -1) if turn == 8 else np.asarray(image)


def mask(out, name):
    return np.asarray(Image.open(out / f"{name}_seg.png"))


def test_predict_writes_masks_on_the_stored_pixels(bundle, album, tmp_path):
    out = tmp_path / "out"
    before = tree(album)
    result = medvit("predict", bundle, album, "--output", out)
    names = ("p1/left", "p1/right", "p2/small", "p2/zoom")
    assert set(tree(out)) == {"manifest.jsonl", "volumes.csv", "volumes.json"} | {
        f"{name}_{suffix}" for name in names for suffix in ("seg.png", "overlay.png")
    }
    rows = []
    for path in sorted(path for path in album.rglob("*") if path.is_file()):
        name = path.relative_to(album).with_suffix("").as_posix()
        expected = labels_of(stored(path))
        np.testing.assert_array_equal(mask(out, name), expected)
        for label, structure in ((1, "anterior hippocampus"), (2, "posterior hippocampus")):
            area = int((expected == label).sum())
            assert area > 10
            rows.append([name, structure, "-", str(area), str(round(area / expected.size, 6))])
    table = [line.split("\t") for line in result.stdout.splitlines()]
    assert table == [["case", "structure", "volume mm³", "area px", "fraction"], *rows]
    assert (out / "volumes.csv").read_text().splitlines()[1] == (
        f"p1/left,1,anterior hippocampus,{rows[0][3]},,{rows[0][3]},{rows[0][4]}"
    )
    assert tree(album) == before
    record = manifest(out)[1]
    assert (record["case"], record["kind"], record["files"], record["modality"]) == ("p1/right", "raster", 1, "")
    assert (record["shape"], record["spacing_mm"], record["orientation"]) == ([50, 90, 1], None, None)
    assert record["notes"] == ["its EXIF orientation is 6; it was turned upright, results lie on its pixels as stored"]
    assert record["volumes"][0]["volume_mm3"] is None


def test_mask_and_photograph_turn_together(bundle, album, tmp_path):
    medvit("predict", bundle, album / "p1/right.jpg", "-o", tmp_path / "out", "-f", "png")
    shown, turned = (
        ImageOps.exif_transpose(Image.open(path)) for path in (album / "p1/right.jpg", tmp_path / "out/right_seg.png")
    )
    assert shown.size == turned.size == (90, 50)
    np.testing.assert_array_equal(np.asarray(turned), labels_of(np.asarray(shown)))


def test_a_network_sees_the_upright_picture(bundle, tmp_path):
    pixels = colours(40, 24)
    upright = write_picture(tmp_path / "a.png", pixels)
    turned = write_picture(tmp_path / "b.png", np.rot90(pixels), 6)
    preprocessing = Bundle(bundle).parser().get_parsed_content("preprocessing")
    one, other = (preprocessing({"image": str(path)})["image"] for path in (upright, turned))
    assert one.shape == (3, 40, 24, 1)
    np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(one[..., 0], pixels.transpose(2, 1, 0))


def test_runs_give_equal_bytes_through_both_doors(bundle, album, tmp_path):
    for out in ("one", "two"):
        medvit("predict", bundle, album, "-o", tmp_path / out)
    (tmp_path / "elsewhere").mkdir()
    command = [sys.executable, "-m", "monai.bundle", "run", "--bundle_root", bundle, "--config_file"]
    options = [bundle / "configs/inference.json", "--dataset_dir", album, "--output_dir", tmp_path / "three"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    done = subprocess.run(
        [*command, *options], cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert tree(tmp_path / "one") == tree(tmp_path / "two") == tree(tmp_path / "three")
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_bad_photograph_costs_no_other(bundle, album, tmp_path):
    cut = album / "p1/cut.jpg"
    cut.write_bytes((album / "p1/right.jpg").read_bytes()[:-1500])
    (album / "p1/empty.png").write_bytes(b"")
    write_picture(album / "p2/grey.png", colours()[..., 0])
    write_picture(album / "p2/tiny.png", colours(7, 16))
    write_picture(album / "p2/window.png", np.dstack([colours(), colours()[..., 0]]))
    write_picture(album / "p2/print.jpg", colours(), mode="CMYK")
    out = tmp_path / "out"
    result = medvit("predict", bundle, album, "-o", out, "-f", "png", code=1)
    assert "4 done, 0 skipped, 6 failed" in result.stderr
    assert failure(out, "p1/cut")[0] == failure(out, "p1/empty.png")[0] == "unreadable"
    assert str(cut) in failure(out, "p1/cut")[1] and "cut short" in failure(out, "p1/cut")[1]
    assert failure(out, "p2/grey") == (
        "unsuitable",
        "this network takes images of 3 channels, but this one has 1; give the photograph in colour",
    )
    assert (
        failure(out, "p2/tiny")[0] == "unsuitable" and "covers 7 × 16 × 1 px; resize it" in failure(out, "p2/tiny")[1]
    )
    assert failure(out, "p2/window")[0] == "transparent"
    assert failure(out, "p2/print")[0] == "pixel-type"
    assert len([name for name in tree(out) if name.endswith(".png")]) == 4


def test_a_second_run_refuses_resumes_or_overwrites(bundle, album, tmp_path):
    out = tmp_path / "out"
    command = ("predict", bundle, album, "-o", out, "-f", "png")
    medvit(*command)
    before = tree(out)
    result = medvit(*command, code=1)
    assert "left_seg.png: exists already; resume to keep finished cases" in result.stderr
    assert "0 done, 4 skipped, 0 failed" in medvit(*command, "--resume").stderr
    write_picture(album / "p1/left.png", colours(70, 45, seed=9))
    assert "was made with other input_sha256" in medvit(*command, "--resume", code=1).stderr
    medvit(*command, "--overwrite")
    np.testing.assert_array_equal(mask(out, "p1/left"), labels_of(colours(70, 45, seed=9)))
    assert tree(out)["p1/right_seg.png"] == before["p1/right_seg.png"]


def test_results_beside_the_photographs_are_no_photographs(bundle, album, tmp_path):
    for run in ("first", "second"):
        medvit("predict", bundle, album, "-o", album / run)
        assert len(manifest(album / run)) == 4


def test_volumes_are_skipped_with_a_line_and_photographs_by_other_bundles(bundle, album, tmp_path):
    write_nifti(album / "brain.nii.gz", phantom(), make_affine())
    write_dicom_series(album / "mr", phantom(), make_affine())
    result = medvit("predict", bundle, album, "-o", tmp_path / "out", "-f", "png")
    assert "brain: skipped, it is a NIfTI file and not a photograph" in result.stderr
    assert "mr/3_T1_test: skipped, it is a DICOM series and not a photograph" in result.stderr
    assert len(manifest(tmp_path / "out")) == 4
    result = medvit("predict", "hippocampus_swin_unetr", album / "p1", "-o", tmp_path / "other", code=1)
    assert "no NIfTI file and no MetaImage or NRRD file found; there is: photograph: 2, not taken here" in result.stderr
    result = medvit("predict", bundle, album / "mr", "-o", tmp_path / "other", code=1)
    assert "no photograph found; there is: DICOM series: 1, not taken here" in result.stderr


def test_formats_of_volumes_do_not_apply(bundle, album, tmp_path):
    out = tmp_path / "out"
    result = medvit("predict", bundle, album, "-o", out, "-f", "nifti", "-f", "dicom-seg")
    assert set(tree(out)) == {"manifest.jsonl", "volumes.csv", "volumes.json"}
    assert "p2/zoom: none of the formats asked for applies to it, so nothing was written" in result.stderr


def test_overwriting_with_nothing_keeps_what_is_there(bundle, album, tmp_path):
    command = ("predict", bundle, album / "p1/left.png", "-o", tmp_path / "out")
    medvit(*command)
    before = tree(tmp_path / "out")
    medvit(*command, "-f", "nifti", "--overwrite")
    after = tree(tmp_path / "out")
    assert before.pop("manifest.jsonl") != after.pop("manifest.jsonl") and before == after
    assert "0 done, 1 skipped, 0 failed" in medvit(*command, "--resume").stderr


def test_nothing_of_the_exif_data_gets_out(bundle, tmp_path):
    exif = Image.Exif()
    exif[274], exif[0x010E], exif[0x013B] = 6, "Zyxwvut Qponmlk", "Zyxwvut"
    write_picture(tmp_path / "in/a.jpg", colours(), exif=exif)
    (tmp_path / "in/b.jpg").write_bytes((tmp_path / "in/a.jpg").read_bytes()[:-900])
    result = medvit("predict", bundle, tmp_path / "in", "-o", tmp_path / "out", code=1)
    assert not [name for name, data in tree(tmp_path / "out").items() if b"Zyxwvut" in data]
    assert "Zyxwvut" not in result.output


# ---- the demo


def test_the_demo_photograph_is_one(tmp_path):
    pytest.importorskip("skimage", reason="the photograph is in the scikit-image wheel")
    script = Path(__file__).parents[1] / "scripts/make_demo_study.py"
    for _ in range(2):
        subprocess.run([sys.executable, script, "--retina", tmp_path / "demo"], check=True)
    (case,) = list_cases(tmp_path / "demo", kinds=["raster"])
    volume = read_volume(case["image"])
    assert (case["case"], volume.array.shape, volume.notes) == ("left_eye", (1411, 1411, 1, 3), ())
    assert volume.array[..., 0].mean() > 2 * volume.array[..., 2].mean()  # a retina is red
    assert "CC0" in (tmp_path / "demo/left_eye.txt").read_text(encoding="utf-8")


# ---- inspect and convert


def test_inspect_lists_photographs(album):
    write_picture(album / "p1/grey.png", colours(9, 8)[..., 0])
    (album / "p1/lost.jpg").write_bytes(b"")
    result = medvit("inspect", album, code=1)
    assert [line.split("\t") for line in result.stdout.splitlines()] == [
        ["image", "kind", "modality", "shape", "spacing mm", "axes", "files"],
        ["p1/grey", "raster", "-", "9×8, grey", "-", "-", "1"],
        ["p1/left", "raster", "-", "70×45, colour", "-", "-", "1"],
        ["p1/right", "raster", "-", "50×90, colour", "-", "-", "1"],
        ["p2/small", "raster", "-", "20×16, colour", "-", "-", "1"],
        ["p2/zoom", "raster", "-", "33×100, colour", "-", "-", "1"],
        ["cannot be used", "code", "why"],
        ["p1/lost.jpg", "unreadable", f"{album / 'p1/lost.jpg'}: named like a photograph, but empty; get it again, or "
                                      "move it elsewhere if it is no image"],
    ]  # fmt: skip
    assert "note: p2/small: its EXIF orientation is 8" in result.stderr
    lines = [json.loads(line) for line in medvit("inspect", album, "--json", code=1).stdout.splitlines()]
    assert lines[1] == {
        "status": "ok",
        "code": None,
        "reason": None,
        "series": "p1/left",
        "files": [str(album / "p1/left.png")],
        "modality": "",
        "shape": [70, 45, 1],
        "spacing": None,
        "orientation": None,
        "channels": 3,
    }


def test_convert_leaves_photographs_out(album, tmp_path):
    write_nifti(album / "brain.nii.gz", phantom(), make_affine())
    result = medvit("convert", album, "-o", tmp_path / "out")
    assert set(tree(tmp_path / "out")) == {"brain.nii.gz"}
    assert np.array_equal(np.asarray(nibabel.load(tmp_path / "out/brain.nii.gz").dataobj), phantom())
    assert "p1/left\tset-aside\t-\ta photograph: it has no place in millimetres" in result.stdout
    assert result.stderr.splitlines()[-1] == "1 written, 0 rejected, 4 set aside"
    medvit("convert", album / "p1", "-o", tmp_path / "none")
