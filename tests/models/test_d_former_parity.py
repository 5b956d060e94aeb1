"""Golden tensors of the authors' code (kkk55596/D-Former), kept beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import translate
from safetensors.torch import load_file

from medvit.layers.d_former import DFormerBlock, PositionBlock
from medvit.layers.patch import PatchExpand, PatchMerging
from medvit.models.d_former import OFFICIAL_KEYS, DFormer, PatchHead
from medvit.models.weights import load_weights

PARITY = Path(__file__).parents[3] / "shared" / "parity"
pytestmark = [
    pytest.mark.usefixtures("backend"),
    pytest.mark.skipif(
        not (PARITY / "dformer_seg.json").is_file(),
        reason="the golden tensors of ../shared/parity are not beside this checkout",
    ),
]

# where medvit computes what the fixture names, and whether that is channels-last
NETWORK = {
    "patch_embed": ("encoder.patch_embed", True),
    "enc0.pos_block": ("encoder.stages.0.position", False),
    "enc0.block0": ("encoder.stages.0.blocks.0", False),
    "enc0.block1": ("encoder.stages.0.blocks.1", False),
    "enc_out0": ("encoder.merges.0", True),
    "enc_out1": ("encoder.merges.1", True),
    "enc_out2": ("encoder.merges.2", True),
    "enc_out3": ("encoder.stages.3", True),
    "bottleneck_norm": ("encoder.norm", False),
    "up0": ("decoder.expands.0", False),
    "up1": ("decoder.expands.1", False),
    "up2": ("decoder.expands.2", False),
    "up3": ("decoder.stages.2", False),
    "up_norm": ("decoder.norm", False),
}


def stored(name: str):
    case = json.loads((PARITY / f"{name}.json").read_text())
    weights = load_file(PARITY / f"{name}.weights.safetensors")
    return case, {k: v.float() for k, v in weights.items()}, load_file(PARITY / f"{name}.io.safetensors")


@torch.no_grad()
def test_every_tensor_of_the_network_is_reproduced():
    case, weights, io = stored("dformer_seg")
    options = translate("docs/d_former.md", case["config"]["constructor"])
    model = DFormer(out_channels=14, official_quirks=True, **options).eval()
    load_weights(model, weights, OFFICIAL_KEYS)
    assert len(weights) == case["n_weight_tensors"] == len(model.state_dict())

    seen: dict[str, torch.Tensor] = {}

    def keep(key: str, channel_first: bool):
        return lambda _m, _i, out: seen.update({key: out.movedim(-1, 1) if channel_first else out})

    for key, (module, channel_first) in NETWORK.items():
        model.get_submodule(module).register_forward_hook(keep(key, channel_first))
    model.decoder.register_forward_hook(lambda _m, _i, out: seen.update(head_quarter=model.heads[2](out[2])))
    seen["out0"], seen["out1"] = model(io["in.input"])
    golden = {k.removeprefix("out."): v for k, v in io.items() if k.startswith("out.")}
    assert golden.keys() == seen.keys()
    for key, value in golden.items():
        assert seen[key].shape == value.shape, key
        assert (seen[key] - value).abs().max() <= case["tolerance_abs"], key


@torch.no_grad()
def test_by_default_this_network_gives_the_same_logits_cropped():
    """Its groups are clamped on every axis at once and no global group pads depth only, so that no quirk shows."""
    case, weights, io = stored("dformer_seg")
    options = translate("docs/d_former.md", case["config"]["constructor"])
    model = DFormer(out_channels=14, **options)
    load_weights(model, weights, OFFICIAL_KEYS)
    full, half, quarter = model(io["in.input"])
    assert [tuple(y.shape[2:]) for y in (full, half, quarter)] == [(8, 15, 31), (4, 8, 16), (2, 4, 8)]
    for got, key in ((full, "out0"), (half, "out1"), (quarter, "head_quarter")):
        golden = io[f"out.{key}"][(..., *[slice(n) for n in got.shape[2:]])]
        assert (got - golden).abs().max() <= case["tolerance_abs"], key
    assert torch.equal(model.eval()(io["in.input"]), full)


def block_case(name: str, **options):
    case, weights, io = stored("dformer_blocks")
    wanted = case["config"]["blocks"][name]
    block = DFormerBlock(
        wanted["dim"], wanted["heads"], tuple(wanted["group"]), wanted["interval"] if wanted["gsm"] else None, **options
    ).eval()
    prefix = f"block.{name}."
    load_weights(block, {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    branches: list[torch.Tensor] = []
    block.attn.register_forward_hook(lambda _m, _i, out: branches.append(out))
    with torch.no_grad():
        out = block(io[f"in.{name}"])
    return [
        (got - golden).abs().max().item() / case["tolerance_abs"]
        for got, golden in ((out, io[f"out.{name}"]), (branches[0], io[f"out.{name}.attn_branch"]))
    ]


CASES = ("ls_pad_all", "gs_pad_hw", "gs_pad_d_only", "gs_fallback", "gs_effective_group", "ls_small_w")


def test_the_cases_are_all_there():
    assert set(CASES) == set(stored("dformer_blocks")[0]["config"]["blocks"])


@pytest.mark.parametrize("name", CASES)
def test_every_block_is_reproduced(name):
    assert max(block_case(name, official_quirks=True)) <= 1


@pytest.mark.parametrize("name", CASES)
def test_by_default_a_block_differs_only_where_the_authors_attend_padding(name):
    off = block_case(name)
    assert (max(off) > 100) == (name == "gs_pad_d_only")


@torch.no_grad()
def test_every_part_is_reproduced():
    case, weights, io = stored("dformer_blocks")
    dim, patch = case["config"]["merge_dim"], tuple(case["config"]["final_patch_size"])
    parts = {
        "merge": ("patch_merging", PatchMerging(3, dim, "mergingv2")),
        "expand": ("patch_expand", PatchExpand(dim, dim // 2, (2, 2, 2))),
        "pos": ("pos_cnn", PositionBlock(3, dim)),
        "final": ("final_expand", PatchHead(dim, 14, patch).expand),
    }
    for prefix, (key, part) in parts.items():
        state = {k.removeprefix(prefix + "."): v for k, v in weights.items() if k.startswith(prefix + ".")}
        if prefix == "pos":
            state = {k.replace("proj.0", "conv"): v for k, v in state.items()}
        load_weights(part, state)
        out = part(io["in.merge"])
        out = out.movedim(-1, 1) if prefix == "final" else out
        assert out.shape == io[f"out.{key}"].shape, key
        assert (out - io[f"out.{key}"]).abs().max() <= case["tolerance_abs"], key
