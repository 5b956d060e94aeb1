"""Recipes in bundles are those of the project, and train the networks that the bundles run."""

import json

import pytest
from bundle_synthetic import BUNDLES

from medvit.bundle import Bundle, classes
from medvit.models.heads import as_encoder

# (bundle, config): what it is a copy of
RECIPES = {
    ("cxr_mae", "finetune"): "finetune/cxr_viral",
    ("cxr_mae", "pretrain"): "pretrain/mae_cxr",
    ("cxr_rad_dino", "pretrain"): "pretrain/dino_cxr",
    ("uni4eye", "pretrain"): "pretrain/uni4eye_mixed",
}
# a bundle's own: where it is, what it writes and starts from, and what is squeezed as the published images were
OWN = {"_about", "bundle_root", "output_dir", "encoder", "square"}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def steps(recipe):
    """The preprocessing without the squeezing that some bundles begin with."""
    return [step for step in recipe["preprocessing"]["transforms"] if step.get("spatial_size") != "@square"]


@pytest.mark.parametrize(("bundle", "name"), RECIPES)
def test_recipes_are_those_of_the_project(bundle, name):
    ours = load(BUNDLES / bundle / f"configs/{name}.json")
    theirs = load(BUNDLES.parent / f"configs/{RECIPES[bundle, name]}.json")
    left_out = OWN | {"preprocessing"}
    assert {k: v for k, v in ours.items() if k not in left_out} == {
        k: v for k, v in theirs.items() if k not in left_out
    }
    assert steps(ours) == steps(theirs)


def test_every_recipe_is_compared():
    alone = {path.parent.parent for path in BUNDLES.glob("*/configs/inference.json")} - {
        path.parent.parent for path in BUNDLES.glob("*/configs/train.json")
    }
    found = {(root.name, path.stem) for root in alone for path in (root / "configs").glob("*.json")}
    assert {(root, name) for root, name in found if name not in ("inference", "metadata")} == set(RECIPES)


@pytest.mark.parametrize(
    ("bundle", "name"), [pair for pair in RECIPES if not classes(Bundle(BUNDLES / pair[0]).metadata)]
)
def test_a_recipe_trains_the_encoder_that_the_bundle_runs(bundle, name):
    parsers = [Bundle(BUNDLES / bundle).parser(stem) for stem in ("inference", name)]
    encoders = [as_encoder(parser.get_parsed_content("network_def")) for parser in parsers]
    shapes = [{key: value.shape for key, value in encoder.state_dict().items()} for encoder in encoders]
    assert shapes[0] == shapes[1]
    inference, recipe = (parser.get() for parser in parsers)
    for knob in ("cached_size", "image_size", "volume_size", "mean", "std"):
        assert inference.get(knob) == recipe.get(knob), knob
