"""Golden tensors of the authors' code, kept beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import translate
from safetensors.torch import load_file
from torch import nn

from medvit import create_model
from medvit.layers.masking import patchify, random_masking
from medvit.models.uni4eye import UNI4EYE_KEYS
from medvit.models.uni4eye_pp import PP_KEYS
from medvit.models.weights import load_weights

PARITY = Path(__file__).parents[3] / "shared" / "parity"
DOCUMENT = "docs/uni4eye.md"


def cases(kind: str) -> list[str]:
    found = sorted(PARITY.glob("uni4eye*.json"))
    return [p.stem for p in found if json.loads(p.read_text())["config"]["kind"] == kind]


def read(name: str) -> tuple[dict, dict, dict, dict]:
    """Stored case, constructor arguments in our words, tensors, weights."""
    case = json.loads((PARITY / f"{name}.json").read_text())
    io, state = (load_file(PARITY / f"{name}.{part}.safetensors") for part in ("io", "weights"))
    state = {k: v.float() for k, v in state.items()}
    if "controller.weight.u" in state:
        u, v = state.pop("controller.weight.u"), state.pop("controller.weight.v")
        state["controller.weight"] = (u[:, None] * v[torch.arange(len(u)) % len(v)])[..., None]
    return case, translate(DOCUMENT, case["config"]["constructor"]), io, state


def recorded(seen: dict[str, torch.Tensor], key: str, module: nn.Module, *, before: bool = False) -> None:
    """Keep a module's output, or its input, in ``seen`` whenever it runs."""
    if before:
        module.register_forward_pre_hook(lambda _m, args: seen.update({key: args[0]}))
    else:
        module.register_forward_hook(lambda _m, _i, out: seen.update({key: out}))


def compare(case: dict, io: dict[str, torch.Tensor], seen: dict[str, torch.Tensor]) -> None:
    """Every stored output was computed, and within its tolerance."""
    assert seen.keys() == {key.removeprefix("out.") for key in io if key.startswith("out.")}
    for key, got in seen.items():
        golden = io[f"out.{key}"]
        assert got.numel() == golden.numel(), key
        got = got.reshape(golden.shape)
        if golden.is_floating_point():
            assert (got - golden).abs().max() <= case["tolerance_abs"], key
        else:
            assert torch.equal(got, golden), key


@pytest.mark.skipif(not PARITY.is_dir(), reason="the golden tensors of ../shared/parity are not beside this checkout")
@pytest.mark.parametrize("name", cases("encoder"))
@torch.no_grad()
def test_the_encoder_is_the_authors(name: str) -> None:
    case, arguments, io, state = read(name)
    arguments = {k: v for k, v in arguments.items() if not k.startswith("decoder_")}
    model = create_model("uni4eye", positions="official", **arguments).eval()
    seen = {
        "init.pos_embed2_sincos": model.pos_embed.get_parameter("2").clone(),
        "init.pos_embed3": model.pos_embed.get_parameter("3").clone(),
    }
    load_weights(model, state, UNI4EYE_KEYS)
    for rank in (2, 3):
        made: dict[str, torch.Tensor] = {}
        recorded(made, "patch_tokens", model.patch_embed)
        for j, block in enumerate(model.blocks):
            recorded(made, f"block{j}", block)
        x = io[f"in.imgs{rank}d"]
        made["latent_all"] = model.tokens(x)
        made["patch_tokens"] = made["patch_tokens"].flatten(1, -2)
        seen |= {f"{rank}d.{key}": value for key, value in made.items()}
        masking = random_masking(io[f"in.noise{rank}d"], case["config"]["mask_ratio"])
        seen[f"{rank}d.latent_masked"] = model.tokens(x, masking)
        seen |= {f"{rank}d.mask": masking.mask, f"{rank}d.ids_restore": masking.restore}
    p = arguments["patch_size"]
    seen["patchify2d"] = patchify(io["in.imgs2d"], (p, p))
    seen["patchify3d"] = patchify(io["in.vol_p3"], (p, 3, p))
    compare(case, io, seen)


@pytest.mark.skipif(not PARITY.is_dir(), reason="the golden tensors of ../shared/parity are not beside this checkout")
@pytest.mark.parametrize("name", cases("mae"))
@torch.no_grad()
def test_the_autoencoder_with_the_dynamic_head_is_the_authors(name: str) -> None:
    case, arguments, io, state = read(name)
    model = create_model("uni4eye_pp_mae", **arguments).eval()
    load_weights(model, state, PP_KEYS)
    made: dict[str, torch.Tensor] = {}
    recorded(made, "controller_out", model.head.controller)
    recorded(made, "decoder_block0_input", model.decoder.blocks[0], before=True)
    given = {"mask_ratio": case["config"]["mask_ratio"], "noise": io["in.noise"], "task_id": io["in.task_id"]}
    seen: dict[str, torch.Tensor] = {}
    for rank in (2, 3):
        model.norm_pix_loss = True
        seen[f"{rank}d.loss_norm_pix"] = model(io[f"in.imgs{rank}d"], **given).loss
        model.norm_pix_loss = False
        out = model(io[f"in.imgs{rank}d"], **given)
        seen |= {f"{rank}d.{key}": value for key, value in out._asdict().items()}
        seen[f"{rank}d.controller_out@s97"] = made["controller_out"].flatten(1)[:, ::97]
        seen[f"{rank}d.decoder_block0_input"] = made["decoder_block0_input"].clone()
    out = model(io["in.imgs2d"], entropy=io["in.imgen"], **given)
    seen |= {"imgen.loss": out.loss, "imgen.mask": out.mask, "imgen.pred@L7": out.pred[:, ::7]}
    compare(case, io, seen)
