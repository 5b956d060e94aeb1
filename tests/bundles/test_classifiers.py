"""Bundles that say something of an image as a whole: X-rays from file to table, through both doors."""

import csv
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from bundle_synthetic import BUNDLES, edit_json
from data_synthetic import make_affine, phantom, write_dicom_series, write_nifti
from radiographs_synthetic import (
    MONAI_RUN,
    command,
    rows_of,
    shadows,
    tree,
    write_png,
    write_radiograph,
    write_x_rays,
)

from medvit.adapt.embeddings import Embeddings
from medvit.adapt.metrics import auroc
from medvit.bundle import Bundle, classes
from medvit.data.listing import listed_images
from medvit.errors import BundleError, NothingFound
from medvit.pretrain.images import CachedImages, WholeView

ROOT = BUNDLES / "cxr_mae"
REAL = BUNDLES.parents[1] / "shared/data"

# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


def table(folder):
    return rows_of(folder / "predictions.csv")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A study of X-rays of all kinds, with much else in it; its results through our door."""
    base = tmp_path_factory.mktemp("cxr")
    pixels = shadows()
    write_png(base / "in/plain.png", pixels)
    write_radiograph(base / "in/dicom/one.dcm", pixels)
    write_radiograph(base / "in/dicom/two.dcm", 255 - pixels, 2, PhotometricInterpretation="MONOCHROME1")
    write_radiograph(base / "in/dicom/three.dcm", shadows(seed=5), 3)
    write_radiograph(base / "in/mammography/breast.dcm", pixels, 4, Modality="MG", SeriesInstanceUID="1.2.6")
    write_dicom_series(base / "in/ct", phantom(), make_affine(), modality="CT")
    write_nifti(base / "in/head.nii.gz", phantom(), make_affine())
    write_png(base / "in/colours.png", np.stack([pixels, 255 - pixels, pixels], -1))
    (base / "in/broken.dcm").write_bytes(b"\0" * 128 + b"DICMxx")
    (base / "in/notes.txt").write_text("no image")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner = Bundle(ROOT).runner(
            dataset_dir=[base / "in"], output_dir=base / "out", formats=["scores", "embedding"], device_name="cpu"
        )
        return base, list(runner.records())


def test_every_x_ray_is_a_row_and_nothing_else_is(run):
    base, records = run
    assert {record["case"]: record["code"] for record in records} == {
        "broken": "unreadable", "colours": "colour", "dicom/3_chest": None, "dicom/3_chest_2": None,
        "dicom/3_chest_3": None, "plain": None,
    }  # fmt: skip
    rows = table(base / "out")
    assert list(next(iter(rows.values()))) == ["case", "file", *classes(Bundle(ROOT).metadata)]
    assert {name: row["file"] for name, row in rows.items()} == {
        "dicom/3_chest": "one.dcm", "dicom/3_chest_2": "three.dcm", "dicom/3_chest_3": "two.dcm", "plain": "plain.png",
    }  # fmt: skip
    for row in rows.values():
        assert float(row["bacteria"]) + float(row["virus"]) == pytest.approx(1, abs=2e-6)


def test_the_format_of_an_x_ray_does_not_matter(run):
    base, _ = run
    rows = table(base / "out")
    plain, same, inverted = (float(rows[name]["virus"]) for name in ("plain", "dicom/3_chest", "dicom/3_chest_3"))
    assert plain == pytest.approx(same, abs=1e-5) == pytest.approx(inverted, abs=1e-5)
    assert abs(plain - float(rows["dicom/3_chest_2"]["virus"])) > 1e-4


def test_no_patient_is_named(run):
    base, _ = run
    for path, data in tree(base / "out").items():
        assert "zyxwvut" not in path.lower() and b"zyxwvut" not in data.lower(), path


def test_embeddings_are_those_of_the_encoder_and_say_so(run):
    base, _ = run
    network = Bundle(ROOT).network()
    embeddings = Embeddings.load(base / "out/embeddings.safetensors", network.encoder)
    assert embeddings.cases == tuple(sorted(table(base / "out")))
    (vector,) = embeddings.of(["plain"])
    seen = Bundle(ROOT).parser().get_parsed_content("preprocessing")({"image": str(base / "in/plain.png")})["image"]
    crops = [WholeView(96, mean=0, std=1, middle=part)(seen.as_tensor()[None]) for part in (1.0, 0.95, 0.9)]
    with torch.inference_mode():
        scores = torch.stack([network(crop) for crop in crops]).mean(0).softmax(1)[0]
        expected = torch.stack([network.encoder.embed(crop) for crop in crops]).mean(0)[0]
    torch.testing.assert_close(vector, expected, rtol=1e-5, atol=1e-5)
    assert float(scores[1]) == pytest.approx(float(table(base / "out")["plain"]["virus"]), abs=1e-5)
    assert np.array_equal(np.load(base / "out/plain_embedding.npy"), vector.numpy())


def test_monais_door_gives_the_same_bytes(run, tmp_path):
    base, _ = run
    shutil.copytree(base / "in/dicom", tmp_path / "in")
    options = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "monai", "device_name": "cpu"}
    said = command(tmp_path, *MONAI_RUN, bundle_root=ROOT, config_file=ROOT / "configs/inference.json", **options)
    assert " - medvit - INFO - case 3 of 3, 3_chest_3: ok" in said and "zyxwvut" not in said.lower()
    options["output_dir"] = tmp_path / "ours"
    Bundle(ROOT).runner(**options).run()
    assert tree(tmp_path / "monai") == tree(tmp_path / "ours")
    assert sorted(tree(tmp_path / "ours")) == [
        "3_chest_2_scores.json", "3_chest_3_scores.json", "3_chest_scores.json", "manifest.jsonl", "predictions.csv",
    ]  # fmt: skip


def test_without_x_rays_nothing_is_done(tmp_path):
    write_dicom_series(tmp_path / "in", phantom(), make_affine(), modality="CT")
    sought = "no photograph and no DICOM radiograph of modality CR or DX found; there is: DICOM series: 1, not"
    with pytest.raises(NothingFound, match=sought):
        Bundle(ROOT).runner(dataset_dir=tmp_path / "in", output_dir=tmp_path / "out")


# ---- what the network sees


@pytest.mark.parametrize("size", [(224, 224), (300, 220), (131, 400)])
def test_inference_sees_what_the_network_was_trained_on(size, tmp_path):
    path = write_png(tmp_path / "a.png", shadows(*size))
    seen = Bundle(ROOT).parser().get_parsed_content("preprocessing")({"image": str(path)})["image"]
    recipe = Bundle(ROOT).parser("finetune")
    kept = CachedImages([{"image": str(path)}], recipe.get_parsed_content("preprocessing"))
    learned = recipe.get_parsed_content("whole_view")(kept.batch([0])["image"])[0]
    assert seen.shape == learned.shape == (1, 128, 128) and seen.dtype == torch.float32
    torch.testing.assert_close(seen.as_tensor(), learned, atol=2e-5, rtol=0)


def test_an_image_keeps_its_rows_and_is_squeezed(tmp_path):
    pixels = np.zeros((400, 200), np.uint8)
    pixels[:100, :50] = 255  # the upper left quarter of each side
    path = write_png(tmp_path / "a.png", pixels)
    seen = Bundle(ROOT).parser().get_parsed_content("preprocessing")({"image": str(path)})["image"][0]
    expected = torch.full((128, 128), -2.0)
    expected[:32, :32] = 2
    inner = [slice(0, 30), slice(34, 128)]
    for rows in inner:
        for columns in inner:
            torch.testing.assert_close(seen.as_tensor()[rows, columns], expected[rows, columns], atol=0.3, rtol=0)


def test_the_network_is_the_one_that_the_recipe_trains():
    inference, recipe = (Bundle(ROOT).parser(name) for name in ("inference", "finetune"))
    one, two = (parser.get_parsed_content("network_def") for parser in (inference, recipe))
    shapes = [{key: value.shape for key, value in net.state_dict().items()} for net in (one, two)]
    assert shapes[0] == shapes[1]
    for key in ("square", "cached_size", "image_size", "crops", "mean", "std"):
        assert inference.get(key) == recipe.get(key)
    labels = {str(number): name for name, number in recipe.get("classes").items()}
    assert labels == Bundle(ROOT).metadata["network_data_format"]["outputs"]["pred"]["channel_def"]


def test_classes_must_name_every_channel():
    metadata = json.loads((ROOT / "configs/metadata.json").read_text(encoding="utf-8"))
    metadata["network_data_format"]["outputs"]["pred"]["num_channels"] = 3
    for wrong in (metadata, {}):
        with pytest.raises(BundleError, match="must name its channels 0, 1 and so on"):
            classes(wrong)


def test_verify_notices_a_network_of_other_classes(tmp_path):
    root = shutil.copytree(ROOT, tmp_path / "cxr_mae")
    path = root / "configs/metadata.json"
    data = json.loads(path.read_text(encoding="utf-8"))["network_data_format"]
    data["outputs"]["pred"] |= {"num_channels": 3, "channel_def": {"0": "a", "1": "b", "2": "c"}}
    edit_json(path, network_data_format=data)
    wrong = {name: reason for name, reason in Bundle(root).verify() if reason}
    assert wrong == {"network": "by the metadata the network returns (1, 3), it returns (1, 2)"}


# ---- real images


@pytest.fixture(scope="module")
def labelled():
    """Validation cases with their labels."""
    if not (REAL / "cxr_pneumonia224/cases.csv").is_file():
        pytest.skip("the data set is not beside this checkout")
    recipe = Bundle(ROOT).parser("finetune", dataset_dir=REAL)
    names = recipe.get("classes")
    options = {"where": {recipe.get("label"): list(names)}, "label": recipe.get("label"), "classes": names}
    return listed_images(REAL, recipe.get("sets"), splits=["val"], **options)


def scores_of(cases, folder):
    """Probability of the second class of each case, by ``medvit predict``'s objects."""
    (folder / "in").mkdir()
    for case in cases:
        (folder / "in" / f"{case['case']}{Path(case['image']).suffix}").symlink_to(case["image"])
    Bundle(ROOT).runner(dataset_dir=folder / "in", output_dir=folder / "out", device_name="cpu").run()
    rows = table(folder / "out")
    return torch.tensor([float(rows[case["case"]]["virus"]) for case in cases])


def test_real_x_rays_get_what_the_training_code_makes_of_them(labelled, tmp_path):
    cases = labelled[:: len(labelled) // 6]
    recipe = Bundle(ROOT).parser("finetune")
    data = CachedImages(cases, recipe.get_parsed_content("preprocessing"))
    with torch.inference_mode():
        view = recipe.get_parsed_content("whole_view")(data.batch(range(len(cases)))["image"])
        expected = recipe.get_parsed_content("inferer")(view, Bundle(ROOT).network()).softmax(1)[:, 1]
    torch.testing.assert_close(scores_of(cases, tmp_path), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_the_metadata_tell_the_measured_auroc(labelled, tmp_path):
    stated = Bundle(ROOT).metadata["eval_metrics"]["val_auroc_viral_against_bacterial"]
    truth = torch.tensor([case["label"] for case in labelled])
    assert float(auroc(truth, scores_of(labelled, tmp_path))) == pytest.approx(stated, abs=1e-3)


# ---- training, on a few small images


@pytest.mark.slow
def test_from_images_to_a_bundle_with_the_commands_of_the_card(tmp_path):
    write_x_rays(tmp_path / "data/tiny")
    bundle = shutil.copytree(ROOT, tmp_path / "cxr_mae")
    common = {"bundle_root": bundle, "dataset_dir": tmp_path / "data", "sets": "['tiny']", "epochs": 1, "batch_size": 4}
    recipe = (tmp_path, *MONAI_RUN)
    command(
        *recipe, **common, config_file=bundle / "configs/pretrain.json", output_dir="pre", **{"trainer#watchers": "[]"}
    )
    encoder = tmp_path / "pre/encoder.safetensors"
    command(*recipe, **common, config_file=bundle / "configs/finetune.json", output_dir="fine", encoder=encoder)
    before = Bundle(bundle).metadata["medvit"]["weights_sha256"]
    command(tmp_path, BUNDLES.parent / "scripts/freeze_weights.py", bundle, "fine/network.safetensors", "--half")
    assert Bundle(bundle).metadata["medvit"]["weights_sha256"] != before
    assert {name: wrong for name, wrong in Bundle(bundle).verify() if wrong} == {}
    Bundle(bundle).runner(dataset_dir=tmp_path / "data/tiny/images", output_dir=tmp_path / "out").run()
    assert len(table(tmp_path / "out")) == 12
    with (tmp_path / "fine/predictions.csv").open(newline="", encoding="utf-8") as file:
        trained = {row["case"]: float(row["score"]) for row in csv.DictReader(file)}
    assert len(trained) == 4
    for case, score in trained.items():  # half precision keeps three digits
        assert float(table(tmp_path / "out")[case]["virus"]) == pytest.approx(score, abs=2e-3)
