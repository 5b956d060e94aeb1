"""Golden tensors of MONAI 1.6.1, kept beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from official import translate
from safetensors.torch import load_file

from medvit import create_model
from medvit.models.swin_unetr import MONAI_KEYS
from medvit.models.weights import load_weights

PARITY = Path(__file__).parents[3] / "shared" / "parity"
VARIANTS = {
    "v1": {},
    "v2": {"use_v2": True},
    "v1_mergingv2": {"downsample": "mergingv2"},
    "v1_legacy_merging": {"downsample": "merging_legacy"},
    "v1_unnormalised": {"normalize": False},
    "v1_flash": {"use_flash_attention": True},
}
CASES = [
    (name, variant)
    for name in ("swinunetr3d", "swinunetr2d")
    if (PARITY / f"{name}.json").is_file()
    for variant in json.loads((PARITY / f"{name}.json").read_text())["config"]["variants"]
]


def module_name(monai: str) -> str:
    """medvit's module that computes what the fixture calls ``monai``."""
    fixed = {"encoder1": "stem", "encoder10": "bottleneck", "out": ""}
    if monai in fixed:
        return fixed[monai]
    if monai.startswith("encoder"):
        return f"skips.{int(monai[7:]) - 2}"
    if monai.startswith("decoder"):
        return f"ups.{5 - int(monai[7:])}"
    layer, _, block = monai.partition(".block")
    if layer.endswith("c"):
        return f"encoder.stages.{int(layer[6:-1]) - 1}.conv"
    return f"encoder.stages.{int(layer[6:]) - 1}.blocks.{block}"


@pytest.mark.usefixtures("backend")
@pytest.mark.skipif(not CASES, reason="the golden tensors of ../shared/parity are not beside this checkout")
@pytest.mark.parametrize(("name", "variant"), CASES)
def test_every_stored_tensor_is_reproduced(name: str, variant: str) -> None:
    case = json.loads((PARITY / f"{name}.json").read_text())
    io = load_file(PARITY / f"{name}.io.safetensors")
    state = {
        k: v.float() if v.is_floating_point() else v
        for k, v in load_file(PARITY / f"{name}.weights.safetensors").items()
    }
    if not VARIANTS[variant].get("use_v2"):
        state = {k: v for k, v in state.items() if not any(f"layers{i}c." in k for i in range(1, 5))}
    arguments = translate("docs/swin_unetr.md", {**case["config"]["constructor"], **VARIANTS[variant]})
    model = create_model("swin_unetr", **arguments).eval()
    load_weights(model, state, MONAI_KEYS)

    seen: dict[str, torch.Tensor] = {}

    def keep(key: str, token_grid: bool):
        return lambda _m, _i, out: seen.update({key: out.movedim(-1, 1) if token_grid else out})

    wanted = {k.removeprefix(f"out.{variant}."): v for k, v in io.items() if k.startswith(f"out.{variant}.")}
    for key in wanted:
        stem = key.partition("@")[0]
        if not stem.startswith("hidden_states"):
            model.get_submodule(module_name(stem)).register_forward_hook(keep(stem, ".block" in stem))
    model.encoder.register_forward_hook(
        lambda _m, _i, out: seen.update({f"hidden_states.{i}": f for i, f in enumerate(out)})
    )
    with torch.no_grad():
        model(io["in.input"])
    assert wanted
    for key, golden in wanted.items():
        stem, _, stride = key.partition("@s")
        step = int(stride or 1)
        got = seen[stem][(slice(None), slice(None), *[slice(None, None, step)] * (golden.dim() - 2))]
        assert got.shape == golden.shape, key
        assert (got - golden).abs().max() <= case["tolerance_abs"], key
