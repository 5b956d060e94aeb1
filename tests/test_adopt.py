"""Bundles of public weights: one command, and what it makes gives what transformers gives."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from bundle_synthetic import BUNDLES, edit_json
from radiographs_synthetic import MONAI_RUN, command, rows_of, shadows, tree, write_png, write_radiograph
from typer.testing import CliRunner

from medvit.adopt import adopt
from medvit.bundle import Bundle
from medvit.cli import app
from medvit.errors import BundleError, OutputError, WeightsMismatch
from medvit.models.checkpoints import read_checkpoint
from medvit.models.convert import convert
from medvit.transforms import rad_dino_preprocessing

TEMPLATE = BUNDLES / "cxr_rad_dino"
SCHEMA = Path(__file__).parent / "bundles/meta_schema_20240725.json"
STD = 0.2583

# MONAI advertises an optional package whenever LoadImaged is made
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader")


@pytest.fixture(scope="module", autouse=True)
def _loggers():
    """The command sets up the logger of its process."""
    logger, root = logging.getLogger("medvit"), logging.getLogger()
    before = logger.handlers, logger.level, root.handlers[:]
    yield
    logger.handlers, logger.level, root.handlers[:] = before


def medvit(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.replace("│", " ").split())


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A small Dinov2 of transformers, as published: the network and its file."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = {"image_size": 28, "patch_size": 7, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3}
    network = Dinov2Model(Dinov2Config(**config)).eval()
    with torch.no_grad():
        for value in network.parameters():
            value += 0.1 * torch.randn_like(value)
    folder = tmp_path_factory.mktemp("public")
    network.save_pretrained(folder)
    return network, folder / "model.safetensors"


@pytest.fixture(scope="module")
def adopted(public, tmp_path_factory):
    """The bundle that the documented command makes of it; three heads leave no trace in a file."""
    output = tmp_path_factory.mktemp("adopted") / "my_rad_dino"
    words = ("--model", "rad_dino", "--bundle", TEMPLATE, "--output", output, "--set", "num_heads=3")
    assert f"written to {output}" in medvit("weights", "convert", public[1], *words)
    return Bundle(output)


def conversion(file, **arguments):
    return convert(read_checkpoint(file), "rad_dino", {"num_heads": 3, **arguments})


def test_the_new_folder_is_a_whole_bundle(adopted, public):
    assert [wrong for _, wrong in adopted.verify() if wrong] == []
    assert sorted(tree(adopted.root)) == [
        "LICENSE", "configs/inference.json", "configs/logging.conf", "configs/metadata.json", "docs/README.md",
        "models/model.pt",
    ]  # fmt: skip
    config = adopted.parser().get()
    assert {key: config[key] for key in ("image_size", "cached_size", "channels", "mean", "std")} == {
        "image_size": 28, "cached_size": 28, "channels": 3, "mean": 0.5307, "std": STD,
    }  # fmt: skip
    encoder = config["network_def"]["encoder"]
    assert [encoder[key] for key in ("img_size", "in_channels")] == ["@image_size", "@channels"]
    assert encoder["interpolation"] == "size"
    stored = json.loads((adopted.root / "configs/inference.json").read_text(encoding="utf-8"))
    assert stored["bundle_root"]["name"] == "my_rad_dino"


def test_its_metadata_are_honest(adopted, public):
    metadata = adopted.metadata
    jsonschema.validate(metadata, json.loads(SCHEMA.read_text(encoding="utf-8")))
    assert metadata["medvit"]["source_sha256"] == read_checkpoint(public[1]).sha256
    assert metadata["medvit"]["source"] == "model.safetensors" and "adopts" not in metadata["medvit"]
    assert "eval_metrics" not in metadata and metadata["medvit"]["weights_licence"] == "that of their publisher"
    assert "Not meant for clinical practice" in metadata["intended_use"] and "their publisher" in metadata["copyright"]
    assert not any("Kermany" in json.dumps(value) for value in metadata.values())
    image, pred = (metadata["network_data_format"][side] for side in ("inputs", "outputs"))
    assert (image["image"]["num_channels"], image["image"]["spatial_shape"]) == (3, [28, 28])
    assert pred["pred"]["num_channels"] == 24
    for path in ("configs/inference.json", "configs/metadata.json"):
        text = (adopted.root / path).read_text(encoding="utf-8")
        assert text == json.dumps(json.loads(text), indent=4, ensure_ascii=False) + "\n"


@pytest.mark.upstream
def test_predict_gives_what_transformers_gives(adopted, public, tmp_path):
    write_png(tmp_path / "in/plain.png", shadows())
    write_radiograph(tmp_path / "in/one.dcm", shadows())
    words = ["predict", adopted.root, tmp_path / "in", "-o", tmp_path / "out", "--device", "cpu"]
    medvit(*words, "-f", "embedding", "-f", "patches")
    prepare = adopted.parser().get_parsed_content("preprocessing")
    for name, file in (("plain", "plain.png"), ("3_chest", "one.dcm")):
        pixels = prepare({"image": str(tmp_path / "in" / file)})["image"].as_tensor()
        published = rad_dino_preprocessing(size=28)({"image": str(tmp_path / "in" / file)})["image"].as_tensor()
        # the same but for the rounding to whole grey values
        torch.testing.assert_close(pixels, published, rtol=0, atol=0.51 / 255 / STD)
        with torch.inference_mode():
            tokens = public[0](pixel_values=pixels[None]).last_hidden_state[0]
        vector = np.load(tmp_path / f"out/{name}_embedding.npy")
        patches = np.load(tmp_path / f"out/{name}_patches.npy")
        np.testing.assert_allclose(vector, tokens[0].numpy(), rtol=0, atol=2e-5)
        np.testing.assert_allclose(patches, tokens[1:].T.reshape(24, 4, 4).numpy(), rtol=0, atol=2e-5)
    assert list(rows_of(tmp_path / "out/embeddings.csv")) == ["3_chest", "plain"]


def test_monais_door_opens_too(adopted, tmp_path):
    write_png(tmp_path / "in/plain.png", shadows())
    options = {"dataset_dir": tmp_path / "in", "output_dir": tmp_path / "monai", "device_name": "cpu"}
    config = adopted.root / "configs/inference.json"
    command(tmp_path, *MONAI_RUN, bundle_root=adopted.root, config_file=config, **options)
    options = {"output": tmp_path / "ours", "device": "cpu"}
    command(tmp_path, "-m", "medvit.cli", "predict", adopted.root, tmp_path / "in", **options)  # with as many threads
    assert tree(tmp_path / "monai") == tree(tmp_path / "ours")


# ---- refusals; nothing is left behind


def refused(error, match, folder, *arguments):
    with pytest.raises(error, match=match):
        adopt(*arguments)
    assert list(folder.iterdir()) == []


def test_what_a_template_does_not_take(public, tmp_path):
    converted, output = conversion(public[1]), tmp_path / "new"
    refused(BundleError, r"uni4eye: takes no weights of rad_dino, but none but its own; leave --bundle out", tmp_path,
            Bundle(BUNDLES / "uni4eye"), converted, output)  # fmt: skip
    other = replace(converted, layout=replace(converted.layout, model="uni4eye"))
    refused(BundleError, "takes no weights of uni4eye, but those of rad_dino", tmp_path,
            Bundle(TEMPLATE), other, output)  # fmt: skip
    refused(BundleError, "letters, digits, '_', '-' and '.', got 'a#b'", tmp_path,
            Bundle(TEMPLATE), converted, tmp_path / "a#b")  # fmt: skip
    # as many patches as in the file, in another order
    refused(BundleError, r"makes images square, but img_size of these weights is \[56, 14\]", tmp_path,
            Bundle(TEMPLATE), conversion(public[1], img_size=[56, 14]), output)  # fmt: skip


def test_weights_that_are_not_whole(public, tmp_path):
    converted = conversion(public[1])
    partial = replace(converted, account=replace(converted.account, allowed=("norm.weight",)))
    refused(WeightsMismatch, "lacks 1 tensors of rad_dino, which would stay random; a bundle needs a whole", tmp_path,
            Bundle(TEMPLATE), partial, tmp_path / "new")  # fmt: skip
    refused(WeightsMismatch, "does not fit this rad_dino", tmp_path,
            Bundle(TEMPLATE), conversion(public[1], depth=3), tmp_path / "new")  # fmt: skip


def test_a_folder_is_never_replaced(adopted, public, tmp_path):
    before = tree(adopted.root)
    with pytest.raises(OutputError, match="my_rad_dino: exists already; choose another output"):
        adopt(Bundle(TEMPLATE), conversion(public[1]), adopted.root)
    assert tree(adopted.root) == before
    words = ("--model", "rad_dino", "--bundle", TEMPLATE, "--output", tmp_path / "new", "--overwrite")
    assert "a bundle never replaces a folder" in medvit("weights", "convert", public[1], *words, code=2)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OutputError, match=r"new: cannot be written \(File exists\)|Not a directory"):
        adopt(Bundle(TEMPLATE), conversion(public[1]), tmp_path / "file/new")


def test_a_bundle_that_would_not_verify_is_not_written(public, tmp_path):
    template = shutil.copytree(TEMPLATE, tmp_path / "templates/cxr_rad_dino")
    data = json.loads((template / "configs/metadata.json").read_text(encoding="utf-8"))["network_data_format"]
    data["outputs"]["pred"]["type"] = "image"
    edit_json(template / "configs/metadata.json", network_data_format=data)
    (tmp_path / "out").mkdir()
    refused(BundleError, r"new: was not written, since it would not verify \(metadata\): the metadata lack",
            tmp_path / "out", Bundle(template), conversion(public[1]), tmp_path / "out/new")  # fmt: skip
