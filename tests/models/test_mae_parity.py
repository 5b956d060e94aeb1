"""Golden tensors of medical_mae, kept beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import translate
from safetensors.torch import load_file

from medvit import create_model
from medvit.layers.position import resize_position, sincos_position
from medvit.models.mae import MAE_KEYS
from medvit.models.vit import CLASSIFIER_KEYS
from medvit.models.weights import load_weights

PARITY = Path(__file__).parents[3] / "shared" / "parity"
pytestmark = pytest.mark.skipif(
    not (PARITY / "medmae_vit.json").is_file(), reason="the golden tensors of ../shared/parity are not here"
)


def fixture(name: str):
    """Description, stored tensors and weights of a case; our constructor arguments through the documented names."""
    case = json.loads((PARITY / f"{name}.json").read_text())
    io = load_file(PARITY / f"{name}.io.safetensors")
    state = {k: v.float() for k, v in load_file(PARITY / f"{name}.weights.safetensors").items()}
    return case, io, state, translate("docs/mae.md", case["config"]["constructor"])


def record(model, modules):
    """Outputs of modules by the fixture's name, filled in by the next forward."""
    seen = {}
    for name, module in modules.items():
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.update({name: out}))
    return seen


def compare(seen, wanted, tolerance):
    assert set(seen) == set(wanted)
    for name, golden in wanted.items():
        got = torch.as_tensor(seen[name]).reshape(golden.shape)
        assert got.dtype == golden.dtype, name
        assert (got.double() - golden.double()).abs().max() <= tolerance, name


def test_mae_reproduces_every_stored_tensor() -> None:
    case, io, state, arguments = fixture("medmae_pretrain")
    wanted = {k.removeprefix("out."): v for k, v in io.items() if k.startswith("out.")}
    seen = {}
    for norm_pix in (True, False):
        model = create_model("mae", **arguments, norm_pix_loss=norm_pix).eval()
        seen["init.pos_embed_sincos"] = model.encoder.pos_embed.detach().clone()
        seen["init.decoder_pos_embed_sincos"] = model.decoder.pos_embed.detach().clone()
        load_weights(model, state, MAE_KEYS)
        blocks = {f"enc_block{i}": block for i, block in enumerate(model.encoder.blocks)}
        blocks |= {f"dec_block{i}": block for i, block in enumerate(model.decoder.blocks)}
        for ratio in case["config"]["mask_ratios"]:
            inner = record(model, blocks)
            with torch.no_grad():
                out = model(io["in.imgs"], ratio, noise=io["in.noise"])
            seen[f"r{ratio}.loss_norm_pix" if norm_pix else f"r{ratio}.loss"] = out.loss
            rest = {**out._asdict(), **inner, "pred_unpatchified": model.unpatchify(out.pred)}
            seen |= {f"r{ratio}.{k}": v for k, v in rest.items() if f"r{ratio}.{k}" in wanted and k != "loss"}
    seen["patchified"] = model.patchify(io["in.imgs"])
    compare(seen, wanted, case["tolerance_abs"])


def test_fixed_positions_are_the_authors_to_the_bit() -> None:
    _, io, _, _ = fixture("medmae_pretrain")
    assert torch.equal(sincos_position(32, (5, 5)), io["out.init.pos_embed_sincos"])
    assert torch.equal(sincos_position(24, (5, 5)), io["out.init.decoder_pos_embed_sincos"])


def test_vit_reproduces_every_stored_tensor() -> None:
    case, io, state, arguments = fixture("medmae_vit")
    seen = {}
    for theirs, pool, norm in (("global_pool", "avg", "fc_norm"), ("cls_token", "cls", "norm")):
        model = create_model("vit", **arguments, global_pool=pool).eval()
        load_weights(model, {k.replace("fc_norm", norm): v for k, v in state.items()}, CLASSIFIER_KEYS)
        inner = record(model, {f"block{i}": block for i, block in enumerate(model.encoder.blocks)})
        patches = record(model, {"patch_embed": model.encoder.patch_embed})
        with torch.no_grad():
            seen[f"{theirs}.logits"] = model(io["in.imgs"])
            seen[f"{theirs}.features"] = model.encoder.embed(io["in.imgs"])
        seen |= inner | {"patch_embed": patches["patch_embed"].flatten(1, -2)}
    for edge in case["config"]["pos_embed_grids"]:
        seen[f"pos_embed_to_{edge}x{edge}"] = resize_position(state["pos_embed"], (4, 4), (edge, edge))
    wanted = {k.removeprefix("out."): v for k, v in io.items() if k.startswith("out.")}
    compare(seen, wanted, case["tolerance_abs"])
