"""Shifted-window attention of MONAI's fastest settings against medvit's, on the same weights, at Swin UNETR's stages.

    python scripts/benchmarks/attention.py --threads 2 --output attention.json

Of each stage: "attention" is norm, windows, attention, projection; "block" adds the MLP and both residuals. MONAI's
mask is part of both, since MONAI makes it anew in every forward pass. Stages whose grid is one window are not shifted.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, interleaved, peak_memory
from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask
from torch import Tensor, nn

from medvit.kernels import WindowGeometry, explain
from medvit.layers.block import SwinBlock

WINDOW = 7
HEADS = (3, 6, 12, 24)
PEER, OURS = "monai", "medvit"


@dataclass(frozen=True)
class Stage:
    """Shapes of one stage: ``(1, grid, grid, grid, dim)``."""

    grid: int
    dim: int
    heads: int


def stages(size: int, feature_size: int) -> list[Stage]:
    """The four stages of a Swin UNETR over an image of ``size`` voxels a side."""
    return [Stage(size // 2 ** (i + 1), feature_size * 2**i, heads) for i, heads in enumerate(HEADS)]


def blocks(stage: Stage, device: str) -> tuple[nn.Module, nn.Module]:
    """MONAI's shifted block and medvit's with its weights."""
    window = (WINDOW,) * 3
    shift = tuple(n // 2 for n in window)
    theirs = SwinTransformerBlock(stage.dim, stage.heads, window, shift, qkv_bias=True, use_flash_attention=True)
    ours = SwinBlock(stage.dim, stage.heads, WindowGeometry.swin(WINDOW, 3, shifted=True), clamp="prefix")
    names = {"linear": "fc", "relative_position_bias_table": "relative_bias.table"}
    state = {}
    for name, value in theirs.state_dict().items():
        for old, new in names.items():
            name = name.replace(old, new)
        if "relative_position_index" not in name:
            state[name] = value
    ours.load_state_dict(state)
    return theirs.to(device).eval(), ours.to(device).eval()


def functions(stage: Stage, theirs: Any, ours: Any, device: str) -> dict[str, dict[str, Callable[[Tensor], Tensor]]]:
    """By part, then by side."""
    window = min(WINDOW, stage.grid)
    padded = -(-stage.grid // window) * window
    shift = WINDOW // 2 if stage.grid > WINDOW else 0

    def mask() -> Tensor | None:
        return compute_mask([padded] * 3, (window,) * 3, (shift,) * 3, torch.device(device)) if shift else None

    return {
        "attention": {PEER: lambda x: theirs.forward_part1(x, mask()), OURS: lambda x: ours.attn(ours.norm1(x))},
        "block": {PEER: lambda x: theirs(x, mask()), OURS: ours},
    }


def measure(stage: Stage, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each part and mode."""
    theirs, ours = blocks(stage, options.device)
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    cast = torch.autocast(torch.device(options.device).type, dtype) if options.bf16 else nullcontext()
    x = torch.randn(1, *(stage.grid,) * 3, stage.dim, device=options.device)
    rows = []
    for part, sides in functions(stage, theirs, ours, options.device).items():
        with torch.inference_mode(), cast:
            difference = (sides[PEER](x).float() - sides[OURS](x).float()).abs().max().item()

        def forward(run: Callable[[Tensor], Tensor]) -> None:
            with torch.inference_mode(), cast:
                run(x)

        def train(run: Callable[[Tensor], Tensor]) -> None:
            leaf = x.clone().requires_grad_()
            with cast:
                out = run(leaf)
            out.float().square().mean().backward()

        for mode in options.modes:
            step = {"forward": forward, "train": train}[mode]
            calls = {side: lambda run=run, step=step: step(run) for side, run in sides.items()}
            seconds = {side: median(s) for side, s in interleaved(calls, options.repeats, options.device).items()}
            memory = {side: peak_memory(call, options.device) for side, call in calls.items()}
            rows.append(
                {
                    "grid": stage.grid, "dim": stage.dim, "heads": stage.heads, "part": part, "mode": mode,
                    "max_difference": difference, "seconds": seconds, "peak_bytes": memory,
                    "speedup": seconds[PEER] / seconds[OURS], "memory_ratio": memory[OURS] / max(1, memory[PEER]),
                }
            )  # fmt: skip
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Rows for people."""
    lines = [
        "| grid | dim | part | mode | MONAI s | medvit s | faster | MONAI MB | medvit MB | memory | max difference |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        seconds, memory = r["seconds"], r["peak_bytes"]
        lines.append(
            f"| {r['grid']}³ | {r['dim']} | {r['part']} | {r['mode']} | {seconds[PEER]:.4f} | {seconds[OURS]:.4f} | "
            f"{r['speedup']:.2f}x | {memory[PEER] / 1e6:.0f} | {memory[OURS] / 1e6:.0f} | {r['memory_ratio']:.2f} | "
            f"{r['max_difference']:.1e} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=96, help="image side in voxels (default 96)")
    parser.add_argument("--feature-size", type=int, default=48, help="width of the first stage (default 48)")
    parser.add_argument("--modes", nargs="+", choices=("forward", "train"), default=["forward", "train"])
    parser.add_argument("--repeats", type=int, default=5, help="interleaved repetitions (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under bfloat16 autocast")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    rows = []
    for stage in stages(options.size, options.feature_size):
        rows += measure(stage, options)

    q = torch.empty(1, *(options.size // 2,) * 3, HEADS[0], 16, device=options.device)
    chosen = explain(q, WindowGeometry.swin(WINDOW, 3, shifted=True))
    result = {**environment(options.device), "backends": chosen, "bf16": options.bf16, "rows": rows}
    print(f"\n{table(rows)}\n\n{result['device']}, {options.threads} threads, backends {chosen}")
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
