"""Groups against the authors' published ones, and against what each encoder computes one after the other."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from official import translate
from torch import nn

from medvit import create_model
from medvit.adapt.layer_decay import layer_decay_groups, layer_ids
from medvit.adapt.lora import add_lora
from medvit.models.vit import CLASSIFIER_KEYS

PARITY = Path(__file__).parents[3] / "shared" / "parity"
VIT = {"in_channels": 1, "img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 2}
SWIN = {"feature_size": 4, "num_heads": [1, 1, 1, 1], "depths": [2, 1, 1, 1], "window_size": 2}
NETWORKS = {
    "vit": {**VIT, "num_classes": 2},
    "mae": {**VIT, "decoder_embed_dim": 12, "decoder_depth": 1, "decoder_num_heads": 2},
    "uni4eye": VIT,
    "rad_dino": {**VIT, "num_register_tokens": 2},
    "swin_unetr": {**SWIN, "in_channels": 1, "out_channels": 2, "spatial_dims": 2, "use_v2": True},
    "d_former": {
        "in_channels": 1,
        "out_channels": 2,
        "spatial_dims": 2,
        "embed_dim": 4,
        "depths": [2, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
        "group_size": 2,
    },
    "hbformer": {
        "in_channels": 1,
        "embed_dim": 4,
        "img_size": 64,
        "window_size": 2,
        "depths": [2, 1, 1, 1],
        "num_heads": [1, 1, 1, 1],
    },
}


def network(name):
    return create_model(name, **NETWORKS[name])


def rate_of(groups, model):
    """(rate, decay) of every trained parameter by name."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))  # each parameter once
    return dict(found)


@pytest.mark.skipif(
    not (PARITY / "medmae_vit.json").is_file(), reason="the golden tensors of ../shared/parity are not here"
)
def test_groups_are_those_the_authors_fine_tune_with():
    case = json.loads((PARITY / "medmae_vit.json").read_text())
    published = case["layer_decay_groups"]
    model = create_model("vit", **translate("docs/mae.md", case["config"]["constructor"]), global_pool="avg")
    groups = layer_decay_groups(
        model, lr=2.0, decay=published["layer_decay"], weight_decay=published["base_weight_decay"]
    )
    wanted = {CLASSIFIER_KEYS.rename(k): v for k, v in published["params"].items()}
    assert layer_ids(model) == {name: v["layer_id"] for name, v in wanted.items()}
    found = rate_of(groups, model)
    assert found.keys() == wanted.keys()
    for name, (rate, weight_decay) in found.items():
        assert math.isclose(rate, 2 * wanted[name]["lr_scale"], rel_tol=1e-12), name
        assert weight_decay == wanted[name]["weight_decay"], name


@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_has_a_layer_and_the_last_is_the_head(name):
    model = network(name)
    ids = layer_ids(model)
    assert ids.keys() == dict(model.named_parameters()).keys()
    blocks = 2 if name in ("vit", "mae", "uni4eye", "rad_dino") else 5
    around = [n for n in ids if model is not getattr(model, "encoder", model) and not n.startswith("encoder.")]
    assert set(ids.values()) == set(range(blocks + 1 + bool(around or any(n.endswith("norm.weight") for n in ids))))
    assert {ids[n] for n in around} <= {blocks + 1}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rad_dino", {"cls_token": 0, "register_tokens": 0, "patch_embed.bias": 0, "blocks.1.ls2.gamma": 2}),
        ("uni4eye", {"pos_embed.3": 0, "patch_embed.2.weight": 0, "blocks.0.norm1.weight": 1, "norm.bias": 3}),
        ("mae", {"encoder.norm.weight": 3, "encoder.pos_embed": 0, "decoder.blocks.0.norm1.weight": 3}),
        (
            "swin_unetr",
            {
                "encoder.patch_embed.proj.weight": 0,
                "encoder.stages.0.conv.conv1.weight": 0,
                "encoder.stages.0.blocks.1.attn.relative_bias.table": 2,
                "encoder.stages.0.merge.reduction.weight": 2,
                "encoder.stages.1.conv.conv1.weight": 2,
                "encoder.stages.1.blocks.0.attn.qkv.weight": 3,
                "encoder.stages.3.blocks.0.mlp.fc1.bias": 5,
                "encoder.stages.3.merge.norm.weight": 5,
                "stem.conv1.weight": 6,
            },
        ),
        (
            "d_former",
            {
                "encoder.patch_embed.norm.weight": 0,
                "encoder.stages.0.position.conv.weight": 0,
                "encoder.stages.0.blocks.1.attn.qkv.weight": 2,
                "encoder.merges.0.reduction.weight": 2,
                "encoder.stages.1.position.conv.weight": 2,
                "encoder.merges.2.norm.weight": 4,
                "encoder.stages.3.blocks.0.norm1.weight": 5,
                "encoder.norm.weight": 6,
                "decoder.norm.weight": 6,
            },
        ),
        (
            "hbformer",
            {
                "encoder.input_proj.weight": 0,
                "encoder.stages.0.blocks.0.norm1.weight": 1,
                "encoder.stages.1.merge.reduction.weight": 2,
                "encoder.stages.1.blocks.0.norm1.weight": 3,
                "encoder.stages.3.merge.norm.weight": 4,
                "projections.0.weight": 6,
            },
        ),
    ],
)  # fmt: skip
def test_layers_follow_the_computation(name, expected):
    ids = layer_ids(network(name))
    assert {n: ids[n] for n in expected} == expected


def test_a_classifier_and_an_encoder_alone_count_alike():
    encoder = network("swin_unetr").encoder
    alone = layer_ids(encoder)
    around = layer_ids(create_model("classifier", encoder=encoder, num_classes=2))
    assert {n.removeprefix("encoder."): i for n, i in around.items() if n.startswith("encoder.")} == alone
    assert {around[n] for n in ("norm.weight", "head.weight")} == {6}


@pytest.mark.parametrize("name", NETWORKS)
def test_only_matrices_and_kernels_decay(name):
    model = network(name)
    found = rate_of(layer_decay_groups(model, lr=1.0, decay=0.5, weight_decay=0.1), model)
    never = ("bias", "table", "token", "tokens", "gamma", "pos_embed")
    for parameter, (_, weight_decay) in found.items():
        shape = model.get_parameter(parameter).shape
        free = len(shape) == 1 or parameter.endswith(never)
        assert weight_decay == (0.0 if free else 0.1), parameter


def test_groups_run_an_optimizer_and_leave_out_what_is_frozen():
    model = network("mae")
    groups = layer_decay_groups(model, lr=1e-3, decay=0.75)
    found = rate_of(groups, model)
    assert "encoder.pos_embed" not in found  # fixed
    assert [g["layer"] for g in groups] == sorted(g["layer"] for g in groups)
    assert all(math.isclose(g["lr"], 1e-3 * g["lr_scale"]) for g in groups)
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(2, 1, 8, 8)).loss.backward()
    optimizer.step()
    assert {g["layer"] for g in optimizer.param_groups} == {0, 1, 2, 3}


def test_without_decay_there_is_one_rate():
    groups = layer_decay_groups(network("vit"), lr=0.3, decay=1)
    assert {g["lr"] for g in groups} == {0.3}


def test_adapters_have_the_rate_of_their_layer_and_decay():
    model = network("vit")
    add_lora(model, [r".*qkv"], rank=2, trainable=[r"head\..*"])
    found = rate_of(layer_decay_groups(model, lr=1.0, decay=0.5, weight_decay=0.1), model)
    block = "encoder.blocks.0.attn.qkv.parametrizations.weight.0"
    assert found[f"{block}.up"] == found[f"{block}.down"] == (0.25, 0.1)
    assert set(found) == {
        *(f"encoder.blocks.{i}.attn.qkv.parametrizations.weight.0.{part}" for i in (0, 1) for part in ("up", "down")),
        "head.weight",
        "head.bias",
    }


@pytest.mark.parametrize("decay", [0, 1.5, -1])
def test_the_factor_is_a_fraction(decay):
    with pytest.raises(ValueError, match=f"decay must be above 0 and at most 1, got {decay}"):
        layer_decay_groups(network("vit"), lr=1.0, decay=decay)


def test_what_cannot_be_grouped():
    with pytest.raises(ValueError, match="every parameter is frozen"):
        layer_decay_groups(network("vit").requires_grad_(False), lr=1.0, decay=0.5)
    with pytest.raises(ValueError, match="an encoder needs"):
        layer_ids(nn.Linear(2, 2))

    class Flat(nn.Module):
        spatial_dims, in_channels, channels, strides, embed_dim = 2, 1, (1,), ((1, 1),), 1

        def embed(self, x):
            return x

    with pytest.raises(ValueError, match=r"layers are counted by `blocks`, or `stages` .* Flat has none"):
        layer_ids(Flat())
