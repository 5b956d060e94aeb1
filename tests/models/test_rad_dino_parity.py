"""Golden tensors of transformers' Dinov2Model and of the original DINOv2, kept beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import translate
from safetensors.torch import load_file

from medvit import create_model
from medvit.models.rad_dino import LAYOUTS
from medvit.models.weights import load_weights

PARITY = Path(__file__).parents[3] / "shared" / "parity"
NAMES = [name for name in ("raddino", "raddino_fbkeys") if (PARITY / f"{name}.json").is_file()]
HUGGINGFACE, ORIGINAL = LAYOUTS
pytestmark = pytest.mark.skipif(not NAMES, reason="the golden tensors of ../shared/parity are not beside this checkout")
RULES = {"offset0.1": "offset", "offset0": "size"}


def loaded(name: str, **options):
    case = json.loads((PARITY / f"{name}.json").read_text())
    state = {k: v.float() for k, v in load_file(PARITY / f"{name}.weights.safetensors").items()}
    assert len(state) == case["n_weight_tensors"]
    model = create_model("rad_dino", **translate("docs/rad_dino.md", case["config"]["hf_config"]), **options).eval()
    load_weights(model, state, HUGGINGFACE if case["config"]["kind"] == "hf" else ORIGINAL)
    return model, load_file(PARITY / f"{name}.io.safetensors"), case["tolerance_abs"]


def compare(io, prefix, computed, tolerance):
    """Every stored tensor under the prefix is computed, and near; returns their names."""
    # "offset0." begins "offset0.1." too
    stored = [key for key in io if key.startswith(prefix) and key[len(prefix)].isalpha()]
    for key in stored:
        got = computed[key.removeprefix(prefix)]
        assert got.shape == io[key].shape, key
        assert (got - io[key]).abs().max() <= tolerance, key
    return set(stored)


def outputs(model, x, mask):
    tokens, states = model.tokens(x, mask), model.hidden_states(x, mask)
    grid = [n // p for n, p in zip(x.shape[2:], model.strides[0], strict=True)]
    position = model.positions(grid)
    return {
        "last_hidden_state": tokens,
        "pooler_output": tokens[:, 0] if mask is not None else model.embed(x),
        "position_embeddings_used": position,
        **{f"hidden_states.{i}": state for i, state in enumerate(states)},
        "x_norm_clstoken": tokens[:, 0],
        "x_norm_patchtokens": tokens[:, 1:] if mask is not None else model(x)[0].flatten(2).transpose(1, 2),
        "x_prenorm": states[-1],
        "pos_embed_used": position,
    }


def inputs(io):
    for key, x in io.items():
        if key.startswith("in.") and not key.startswith("in.mask."):
            name = key.removeprefix("in.")
            mask = io.get(f"in.mask.{name}")
            yield name, x, None if mask is None else mask.bool()


@torch.no_grad()
def test_every_stored_tensor_of_transformers_is_reproduced():
    model, io, tolerance = loaded("raddino")
    seen = set()
    for name, x, mask in inputs(io):
        seen |= compare(io, f"out.{name}.", outputs(model, x, mask), tolerance)
    assert seen == {key for key in io if key.startswith("out.")} and len(seen) == 26


@torch.no_grad()
def test_every_stored_tensor_of_the_original_is_reproduced():
    seen = set()
    for theirs, ours in RULES.items():
        model, io, tolerance = loaded("raddino_fbkeys", interpolation=ours)
        for name, x, mask in inputs(io):
            seen |= compare(io, f"out.{name}.{theirs}.", outputs(model, x, mask), tolerance)
    assert seen == {key for key in io if key.startswith("out.")} and len(seen) == 35


def test_both_files_hold_the_same_network():
    ours = [loaded(name)[0].state_dict() for name in NAMES]
    assert ours[0].keys() == ours[-1].keys()
    assert all(torch.equal(ours[0][key], ours[-1][key]) for key in ours[0])
