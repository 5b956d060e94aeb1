"""Swin UNETR of MONAI, plain and with its flag for fused attention, against medvit's, on the same weights and image.

    python scripts/benchmarks/swin_unetr.py --size 96 --feature-size 48 --threads 2 --output swin_unetr.json

Modes: "forward" (float32, no gradients), "bf16" (the same under autocast, MONAI's float32 beside it), "train" (forward,
cross-entropy, backward, AdamW) with its peak memory, "compile" (torch.compile of both). On a GPU every mode but
"forward" computes in bfloat16. On a CPU nothing is timed unless the float32 logits agree.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, interleaved, peak_memory
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn
from torch.nn import functional as F

from medvit import create_model
from medvit.models.swin_unetr import MONAI_KEYS
from medvit.models.weights import load_weights

PLAIN, FLAG, OURS = "monai plain", "monai", "medvit"  # "monai" has its fastest settings
MODES = ("forward", "bf16", "train", "compile")
TOLERANCE = 1e-3  # of float32 logits
Step = Callable[[], Tensor]


def networks(dims: int, feature_size: int, classes: int, device: str) -> dict[str, nn.Module]:
    """The three of them, with the same random weights, biases away from zero."""
    torch.manual_seed(0)
    options = {"in_channels": 1, "out_channels": classes, "feature_size": feature_size, "spatial_dims": dims}
    found: dict[str, nn.Module] = {
        PLAIN: SwinUNETR(**options),
        FLAG: SwinUNETR(**options, use_flash_attention=True),
        OURS: create_model("swin_unetr", **options),
    }
    with torch.no_grad():
        for parameter in found[PLAIN].parameters():
            if parameter.dim() == 1:
                parameter.add_(0.02 * torch.randn_like(parameter))
    found[FLAG].load_state_dict(found[PLAIN].state_dict())
    load_weights(found[OURS], found[PLAIN].state_dict(), MONAI_KEYS)
    return {name: net.to(device).eval() for name, net in found.items()}


def forward(net: nn.Module, x: Tensor, reduced: bool) -> Step:
    """One forward pass without gradients, under bfloat16 autocast if ``reduced``."""

    def step() -> Tensor:
        with torch.no_grad(), torch.autocast(x.device.type, torch.bfloat16, enabled=reduced):
            return net(x)

    return step


def train(net: nn.Module, x: Tensor, target: Tensor, reduced: bool) -> Step:
    """One training step, gradients made anew."""
    optimizer = torch.optim.AdamW(net.parameters(), 1e-5)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=reduced):
            loss = F.cross_entropy(net(x).float(), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def agreement(expected: Tensor, found: Tensor) -> dict[str, float]:
    """Largest difference of two logit maps and the share of voxels with the same label."""
    return {
        "max_abs_diff": (expected.float() - found.float()).abs().max().item(),
        "argmax_agreement": (expected.argmax(1) == found.argmax(1)).float().mean().item(),
    }


def steps(mode: str, nets: dict[str, nn.Module], x: Tensor, classes: int) -> dict[str, Step]:
    """What a mode compares, by name."""
    cuda = x.device.type == "cuda"
    if mode == "forward":
        return {name: forward(net, x, False) for name, net in nets.items()}
    if mode == "bf16":
        reduced = {f"{name} bf16": forward(nets[name], x, True) for name in (FLAG, OURS)}
        return {FLAG: forward(nets[FLAG], x, False), **reduced}
    if mode == "compile":
        return {f"{name} compiled": forward(torch.compile(nets[name]), x, cuda) for name in (FLAG, OURS)}
    target = torch.randint(classes, (x.shape[0], *x.shape[2:]), device=x.device)
    for name in (FLAG, OURS):
        nets[name].train()
    return {name: train(nets[name], x, target, cuda) for name in (FLAG, OURS)}


def measure(mode: str, options: argparse.Namespace) -> dict[str, Any]:
    """One mode: agreement with MONAI's float32 logits, seconds, and for training the peak memory.

    Raises:
        RuntimeError: float32 logits that differ from MONAI's by more than the tolerance.
    """
    nets = networks(options.spatial_dims, options.feature_size, options.classes, options.device)
    x = torch.randn(options.batch, 1, *[options.size] * options.spatial_dims, device=options.device)
    expected = forward(nets[PLAIN], x, False)()
    exact = agreement(expected, forward(nets[OURS], x, False)())
    if options.device == "cpu" and exact["max_abs_diff"] > TOLERANCE:
        raise RuntimeError(f"logits differ from MONAI's by {exact['max_abs_diff']:.2g}, more than {TOLERANCE:g}")
    compared = steps(mode, nets, x, options.classes)
    row: dict[str, Any] = {"mode": mode, "agreement": {}}
    if mode != "train":
        row["agreement"] = {name: agreement(expected, step()) for name, step in compared.items()}
    row["seconds"] = interleaved(compared, options.repeats, options.device)
    if mode == "train":
        row["peak_bytes"] = {name: peak_memory(step, options.device) for name, step in compared.items()}
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Medians, the ratio of each to the last one (medvit's), and what else was found."""
    lines = [
        f"{'mode':8} {'network':16} {'median s':>9} {'ratio':>6} {'max diff':>9} {'same label':>10} {'peak MB':>8}"
    ]
    for row in rows:
        ours = median(list(row["seconds"].values())[-1])
        for name, seconds in row["seconds"].items():
            found = row["agreement"].get(name, {})
            diff = f"{found['max_abs_diff']:.1e}" if found else ""
            same = f"{100 * found['argmax_agreement']:.3f} %" if found else ""
            peak = f"{row['peak_bytes'][name] / 1e6:.0f}" if "peak_bytes" in row else ""
            time = median(seconds)
            lines.append(f"{row['mode']:8} {name:16} {time:9.3f} {time / ours:6.2f} {diff:>9} {same:>10} {peak:>8}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="voxels a side, a multiple of 32 from 64 on")
    parser.add_argument("--spatial-dims", type=int, default=3)
    parser.add_argument("--feature-size", type=int, default=48)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES[:3]))
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for mode in options.modes:
        rows.append(measure(mode, options))
        print(table(rows[-1:]), flush=True)
    if options.output:
        asked = {k: v for k, v in vars(options).items() if k != "output"}
        found = {"options": asked, "environment": environment(options.device), "rows": rows}
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
