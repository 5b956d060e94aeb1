"""Every recipe runs: on made-up images, with the smallest networks, for a step or two."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medvit.errors import MedvitError, NothingFound
from medvit.models.weights import read_state

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("configs/*/*.json"))
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}
TINY = {
    "mae_cxr": {"network_def": {**SMALL, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}},
    "mae_cxr_published": {
        "network_def": {**SMALL, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2},
        "image_size": 64,
        "cached_size": 72,
        "precision": "float32",
    },
    "dino_cxr": {"network_def": SMALL, "objective": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}},
    "uni4eye_mixed": {"network_def": {**SMALL, "decoder_embed_dim": 24}, "volume_size": [16, 16, 16]},
    "mae_3d": {"network_def": {**SMALL, "decoder_embed_dim": 24}, "volume_size": [16, 16, 16]},
    "swin_hippocampus": {},
    "cxr_viral": {"network_def": SMALL, "encoder": ""},
    "hippocampus_segmentation": {"encoder": "", "labelled": 2},
}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    """Sets of the names that recipes use, with X-rays and volumes of noise."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("cxr_pneumonia224", "cxr_nih1000", "cxr_hannover_covid"):
        (root / name).mkdir()
        rows = [
            f"{name}{i},{i}.png,{'val' if i % 3 == 0 else 'train'},{('bacteria', 'virus')[i % 2]}" for i in range(18)
        ]
        for i in range(18):
            Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(root / name / f"{i}.png")
        (root / name / "cases.csv").write_text("\n".join(["case_id,image,split,subtype", *rows]) + "\n")
    folder = root / "msd_hippocampus"
    folder.mkdir()
    for i in range(4):
        nib.save(nib.Nifti1Image(rng.normal(size=(35, 50, 30)).astype(np.float32), np.eye(4)), folder / f"{i}.nii.gz")
        label = rng.integers(0, 3, (35, 50, 30), dtype=np.uint8)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{i}_label.nii.gz")
    rows = [f"h{i},{i}.nii.gz,{i}_label.nii.gz,{'val' if i == 3 else 'train'}" for i in range(4)]
    (folder / "cases.csv").write_text("\n".join(["case_id,image,label,split", *rows]) + "\n")
    return root


@pytest.fixture
def parsed():
    """A recipe with overrides, dictionaries merged into the recipe's own."""
    bundle = pytest.importorskip("monai.bundle")

    def parse(path, **overrides):
        config = json.loads(path.read_text(encoding="utf-8"))
        for key, value in overrides.items():
            assert key in config, key
            config[key] = config[key] | value if isinstance(value, dict) else value
        parser = bundle.ConfigParser(config)
        parser.parse()
        return parser

    return parse


def cause_of(error):
    while error is not None and not isinstance(error, MedvitError):
        error = error.__cause__
    return error


@pytest.mark.filterwarnings("ignore")  # of MONAI, which warns about readers that are not installed
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path, dataset_dir, tmp_path, parsed):
    overrides = {"batch_size": 2, "epochs": 0.1} | TINY[path.stem]
    config = json.loads(path.read_text(encoding="utf-8"))
    overrides = {key: value for key, value in overrides.items() if key in config}
    parser = parsed(path, dataset_dir=str(dataset_dir), output_dir=str(tmp_path), device="cpu", **overrides)
    if "health" in config:
        parser["health"]["probes"].pop("knn")  # wants more neighbours than there are images
    result = parser.get_parsed_content("trainer").run()
    assert np.isfinite(result["loss"])
    written = "encoder" if path.parent.name == "pretrain" else "network"
    assert read_state(tmp_path / f"{written}.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_missing_data_are_told_with_what_to_do(tmp_path, parsed):
    for path in RECIPES:
        parser = parsed(path, dataset_dir=str(tmp_path), **({"encoder": ""} if path.parent.name == "finetune" else {}))
        with pytest.raises(RuntimeError) as failure:
            parser.get_parsed_content("trainer")
        cause = cause_of(failure.value)
        assert isinstance(cause, NothingFound) and "no such table" in str(cause), path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is(path):
    config, docs = (
        json.loads(path.read_text(encoding="utf-8")),
        (ROOT / "docs/pretraining.md").read_text(encoding="utf-8"),
    )
    assert f"configs/{path.parent.name}/{path.name}" in " ".join(config["_about"])
    assert f"`{path.parent.name}/{path.name}`" in docs
    assert config["output_dir"] == f"./runs/{path.stem}"
