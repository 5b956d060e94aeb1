"""Every recipe runs: on made-up images, with the smallest networks, for a step or two."""

import inspect
import json
import os
import pydoc
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from medvit.errors import MedvitError, NothingFound
from medvit.models.weights import read_state
from medvit.pretrain.images import WholeView

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("configs/*/*.json"))
PUBLISHED = [path for path in RECIPES if path.stem.endswith("_published")]  # each laid over a small one
SMALL = {"embed_dim": 24, "depth": 1, "num_heads": 2}
TINY = {
    "mae_cxr": {"network_def": {**SMALL, "decoder_embed_dim": 24, "decoder_depth": 1, "decoder_num_heads": 2}},
    "dino_cxr": {"network_def": SMALL, "objective": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8}},
    "uni4eye_mixed": {"network_def": {**SMALL, "decoder_embed_dim": 24}, "volume_size": [16, 16, 16]},
    "mae_3d": {"network_def": {**SMALL, "decoder_embed_dim": 24}, "volume_size": [16, 16, 16]},
    "swin_hippocampus": {},
    "cxr_viral": {"network_def": SMALL, "encoder": "", "head": "fresh"},
    "cxr_rad_dino": {
        **{f"network_def#encoder#{key}": value for key, value in SMALL.items()},
        "encoder": "",
        "head": "fresh",
    },
    "hippocampus_segmentation": {"encoder": "", "labelled": 2},
    "mae_cxr_published": {
        "network_def": {**SMALL, "decoder_embed_dim": 32},
        "image_size": 64,
        "cached_size": 72,
        "precision": "float32",
    },
    "dino_cxr_published": {
        "network_def": SMALL,
        "objective": {"prototypes": 16, "hidden_dim": 16, "bottleneck_dim": 8},
        "image_size": 28,
        "local_size": 14,
        "cached_size": 32,
        "precision": "float32",
        "num_workers": 0,
        "steps": 1,
    },
    "uni4eye_published": {
        "network_def": {**SMALL, "decoder_embed_dim": 32, "decoder_depth": 1},
        "image_size": 32,
        "cached_size": 40,
        "volume_size": [32, 32, 16],
        "precision": "float32",
    },
    "swin_published": {
        "network_def": {"feature_size": 12},
        "volume_size": [32, 32, 64],
        "precision": "float32",
        "num_workers": 0,
        "steps": 1,
        "sets": ["msd_hippocampus"],
    },
    "cxr_published": {
        "network_def": SMALL,
        "encoder": "",
        "image_size": 32,
        "cached_size": 40,
        "precision": "float32",
    },
}
# what the sources say, whether it stands in the overlay or in the recipe below it
FACTS = {
    "mae_cxr_published": {
        "epochs": 800,
        "batch_size": 2048,
        "base_rate": 1.5e-4,
        "image_size": 224,
        "network_def#patch_size": 16,
        "network_def#mask_ratio": 0.9,
        "network_def#norm_pix_loss": False,
        "views#scale": [0.5, 1.0],
        "views#flips": [0.0, 0.5],
        "trainer#learning_rate#warmup": 40 / 800,
        "trainer#weight_decay": 0.05,
        "trainer#betas": [0.9, 0.95],
    },
    "dino_cxr_published": {
        "image_size": 518,
        "mean": 0.5307,
        "std": 0.2583,
        "network_def#patch_size": 14,
        "network_def#layer_scale_init": 1.0,
        "objective#prototypes": 65536,
        "global_views#scale": [0.32, 1.0],
        "local_views#scale": [0.05, 0.32],
        "local_crops": 8,
        "trainer#learning_rate#warmup": 80 / 500,
        "trainer#learning_rate#final": 1e-6,
        "trainer#weight_decay#peak": 0.04,
        "trainer#weight_decay#final": 0.2,
        "trainer#betas": [0.9, 0.999],
        "trainer#clip": 3.0,
    },
    "uni4eye_published": {
        "volume_size": [224, 224, 112],
        "rate": 1e-3 * 64 / 256,
        "network_def#embed_dim": 1024,
        "network_def#mask_ratio": 0.5,
        "augment#views#image2d#scale": [0.2, 1.0],
        "trainer#learning_rate#warmup": 40 / 200,
        "trainer#weight_decay": 0.05,
        "trainer#betas": [0.9, 0.95],
    },
    "swin_published": {
        "steps": 100_000,
        "batch_size": 8 * 2,
        "learning_rate": 6e-6,
        "volume_size": [96, 96, 96],
        "network_def#feature_size": 48,
        "network_def#window_size": 7,
        "objective#plane": [0, 1],
        "trainer#learning_rate#warmup": 500 / 100_000,
        "trainer#weight_decay": 0.1,
        "trainer#betas": [0.9, 0.999],
    },
    "cxr_published": {
        "epochs": 75,
        "batch_size": 1024,
        "learning_rate": 2.5e-4 * 1024 / 256,
        "layer_decay": 0.55,
        "weight_decay": 0.05,
        "drop_path": 0.2,
        "randaugment#policy": "rand-m6-mstd0.5-inc1",
        "network_def#reads": "embed",
        "views#scale": [0.08, 1.0],
        "views#flips": [0.0, 0.5],
        "trainer#learning_rate#final": 1e-5,
        "trainer#learning_rate#warmup": 5 / 75,
        "trainer#betas": [0.9, 0.999],
    },
}
FINDINGS = ("No Finding", "Mass", "Mass|Edema", "Effusion|Hernia")


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory):
    """Sets of the names that recipes use, with X-rays and volumes of noise."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name in ("cxr_pneumonia224", "cxr_nih1000", "cxr_hannover_covid"):
        (root / name).mkdir()
        rows = [
            f"{name}{i},{i}.png,{'val' if i % 3 == 0 else 'train'},{('bacteria', 'virus')[i % 2]},{FINDINGS[i % 4]},"
            f"{('PA', 'AP')[i % 2]},{i}"
            for i in range(18)
        ]
        for i in range(18):
            Image.fromarray(rng.integers(0, 256, (40, 50), dtype=np.uint8)).save(root / name / f"{i}.png")
        (root / name / "cases.csv").write_text(
            "\n".join(["case_id,image,split,subtype,findings,view,patient_group", *rows]) + "\n"
        )
    folder = root / "msd_hippocampus"
    folder.mkdir()
    for i in range(4):
        nib.save(nib.Nifti1Image(rng.normal(size=(35, 50, 30)).astype(np.float32), np.eye(4)), folder / f"{i}.nii.gz")
        label = rng.integers(0, 3, (35, 50, 30), dtype=np.uint8)
        nib.save(nib.Nifti1Image(label, np.eye(4)), folder / f"{i}_label.nii.gz")
    rows = [f"h{i},{i}.nii.gz,{i}_label.nii.gz,{'val' if i == 3 else 'train'}" for i in range(4)]
    (folder / "cases.csv").write_text("\n".join(["case_id,image,label,split", *rows]) + "\n")
    return root


def commands(text):
    """The words of each command in a text that runs a recipe; lines that end in a backslash go on."""
    found = re.findall(
        r"^(?:python|torchrun .*?) -m monai\.bundle run (?:\w+ )?(--(?:.*\\\n)*.*)", text, flags=re.MULTILINE
    )
    return [shlex.split(command.replace("\\\n", " ")) for command in found]


def config_files(words):
    """The recipe of a command: one file or several, the later laid over the earlier."""
    value = words[words.index("--config_file") + 1]
    return [ROOT / name for name in re.findall(r"[^\s\[\],']+", value)]


def load(path):
    """A recipe as its own command loads it."""
    bundle = pytest.importorskip("monai.bundle")
    about = "\n".join(json.loads(path.read_text(encoding="utf-8"))["_about"])
    parser = bundle.ConfigParser()
    parser.read_config([str(file) for file in config_files(commands(about)[0])])
    return parser


def parsed(path, **overrides):
    """A recipe with overrides, dictionaries merged into the recipe's own."""
    parser = load(path)
    for key, value in overrides.items():
        assert key in parser, key
        parser[key] = parser[key] | value if isinstance(value, dict) else value
    return parser


def cause_of(error):
    while error is not None and not isinstance(error, MedvitError):
        error = error.__cause__
    return error


@pytest.mark.filterwarnings("ignore")  # of MONAI, which warns about readers that are not installed
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs(path, dataset_dir, tmp_path):
    overrides = {"batch_size": 2, "epochs": 0.1} | TINY[path.stem]
    parser = parsed(path, dataset_dir=str(dataset_dir), output_dir=str(tmp_path), device="cpu", **overrides)
    result = parser.get_parsed_content("trainer").run()
    assert np.isfinite(result["loss"])
    watched = "@health" in parser["trainer"]["watchers"]
    assert watched == ("effective_rank" in result)
    assert watched or "published" in path.stem or path.parent.name != "pretrain" or "uni4eye" in path.stem
    written = "encoder" if path.parent.name == "pretrain" else "network"
    assert read_state(tmp_path / f"{written}.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_options_say_where_an_encoder_and_a_head_start(dataset_dir, tmp_path):
    def parser(name, **overrides):
        path = next(path for path in RECIPES if path.stem == name)
        return parsed(path, dataset_dir=str(dataset_dir), output_dir=str(tmp_path), device="cpu", **overrides)

    first = parser("mae_cxr", batch_size=2, epochs=0.1, **TINY["mae_cxr"])
    first["trainer"]["watchers"] = []
    first.get_parsed_content("trainer").run()
    weights = tmp_path / "encoder.safetensors"
    again = parser("mae_cxr", start=str(weights), **TINY["mae_cxr"]).get_parsed_content("objective")
    encoder = read_state(weights)
    assert encoder.keys() == again.model.encoder.state_dict().keys()
    assert all(torch.equal(value, encoder[key]) for key, value in again.model.encoder.state_dict().items())
    options = TINY["cxr_viral"] | {"encoder": str(weights)}
    heads = [
        parser("cxr_viral", **options | {"head": how}).get_parsed_content("objective") for how in ("fresh", "probe")
    ]
    fresh, probed = (objective.network.head.weight.norm() for objective in heads)
    assert fresh < 1e-3 < probed


@pytest.mark.parametrize(
    ("name", "middles", "mirrored"),
    [
        ("cxr_viral", [1.0, 0.95, 0.9], False),
        ("cxr_rad_dino", [1.0, 0.95, 0.9], True),
        ("cxr_published", [224 / 256], False),
    ],
)
def test_scores_probes_and_the_start_of_the_head_see_the_same_views(name, middles, mirrored):
    recipe = parsed(ROOT / f"configs/finetune/{name}.json")
    for part in ("started", "predictions", "frozen"):
        assert (recipe[part]["view"], recipe[part]["inferer"]) == ("@whole_view", "@inferer"), part
    image = torch.randint(0, 256, (2, 1, recipe["cached_size"], recipe["cached_size"]), dtype=torch.uint8)
    seen = []

    def network(x):
        seen.append(x)
        return x.flatten(1)

    recipe.get_parsed_content("inferer")(recipe.get_parsed_content("whole_view")(image), network)
    norm = {"mean": recipe["mean"], "std": recipe["std"]}
    views = [WholeView(recipe["image_size"], **norm, middle=middle)(image) for middle in middles]
    expected = [turned for view in views for turned in ([view, view.flip(3)] if mirrored else [view])]
    assert len(seen) == len(expected)
    for found, wanted in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_missing_data_are_told_with_what_to_do(path, tmp_path):
    parser = parsed(path, dataset_dir=str(tmp_path), **TINY[path.stem])
    with pytest.raises(RuntimeError) as failure:
        parser.get_parsed_content("trainer")
    cause = cause_of(failure.value)
    assert isinstance(cause, NothingFound) and "no such table" in str(cause)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_says_what_it_is(path):
    about = json.loads(path.read_text(encoding="utf-8"))["_about"]
    (command,) = commands("\n".join(about))
    assert config_files(command)[-1] == path
    assert f"`{path.parent.name}/{path.name}`" in (ROOT / "docs/pretraining.md").read_text(encoding="utf-8")
    assert load(path)["output_dir"] == f"./runs/{path.stem}"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_says_what_it_costs_and_gave(path):
    about = json.loads(path.read_text(encoding="utf-8"))["_about"]
    below = config_files(commands("\n".join(about))[0])[0]
    assert about[0].startswith(f"Laid over {below.name}: ") and below.parent == path.parent
    assert [sum(line.startswith(word) for line in about) for word in ("Cost: ", "Published")] == [1, 1]
    assert f"recipe='{path.stem}'" in load(path)["trainer#description"]


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_published_recipe_has_the_numbers_of_its_source(path):
    recipe = load(path)
    for key, value in FACTS[path.stem].items():
        assert recipe[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-3)), key


def is_argument(recipe, key):
    """Whether a nested key that a recipe leaves out is an argument of the component above it."""
    component, _, argument = key.rpartition("#")
    target = recipe[component].get("_target_") if component in recipe and isinstance(recipe[component], dict) else None
    return target is not None and argument in inspect.signature(pydoc.locate(target)).parameters


def test_every_documented_command_names_recipes_and_their_keys():
    texts = [path.read_text(encoding="utf-8") for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])]
    texts += ["\n".join(json.loads(path.read_text(encoding="utf-8"))["_about"]) for path in RECIPES]
    documented = [
        words for text in texts for words in commands(text) if "configs/" in words[1] and "bundles" not in words[1]
    ]
    assert len(documented) > len(RECIPES)
    for words in documented:
        recipe = load(config_files(words)[-1])
        keys = [word.removeprefix("--") for word in words if word.startswith("--") and word != "--config_file"]
        assert all(key in recipe or is_argument(recipe, key) for key in keys), words


@pytest.mark.slow
def test_published_recipes_run_by_their_commands_from_another_folder(dataset_dir, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    small = {"network_def#embed_dim": 384, "network_def#depth": 1, "batch_size": 2, "epochs": 0.1, "image_size": 64}
    small |= {"cached_size": 72, "precision": "float32", "device": "cpu"}

    def run(path, out, **options):
        (words,) = commands("\n".join(json.loads(path.read_text(encoding="utf-8"))["_about"]))
        places = {"DATA": str(dataset_dir), "OUT": str(tmp_path / out)}
        places["OUT/encoder.safetensors"] = str(tmp_path / "encoder/encoder.safetensors")
        words = [places.get(word, word.replace("'configs/", f"'{ROOT}/configs/")) for word in words]
        words += [word for key, value in (small | options).items() for word in (f"--{key}", str(value))]
        command = [sys.executable, "-m", "monai.bundle", "run", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    run(ROOT / "configs/pretrain/mae_cxr_published.json", "encoder", **{"health#probes": "{}"})
    note = json.loads((tmp_path / "encoder/encoder.safetensors.json").read_text(encoding="utf-8"))
    assert note["recipe"] == "mae_cxr_published" and note["image_size"] == 64
    run(ROOT / "configs/finetune/cxr_published.json", "network")
    table = (tmp_path / "network/predictions.csv").read_text(encoding="utf-8").splitlines()
    assert table[0].split(",")[-1] == "score_13" and len(table) == 1 + 6
