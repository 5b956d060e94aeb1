"""Draw whom a token attends to under each window pattern, for the page docs/windows.md.

    python scripts/draw_windows.py docs/images/windows.png

What is drawn is what the definition computes (medvit/kernels/dense.py), not a sketch.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import torch

from medvit.kernels import WindowGeometry
from medvit.kernels.dense import pairs

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GRID = (10, 11)
PATTERNS = {
    "full(grid)": (WindowGeometry.full(GRID), (4, 5)),
    "swin(4)": (WindowGeometry.swin(4, 2), (9, 5)),
    "swin(4, shifted=True)": (WindowGeometry.swin(4, 2, shifted=True), (4, 5)),
    "swin(4, shifted=True), at the seam": (WindowGeometry.swin(4, 2, shifted=True), (1, 1)),
    "dformer_local(4)": (WindowGeometry.dformer_local(4, 2), (9, 9)),
    "dformer_global(4, interval=2)": (WindowGeometry.dformer_global(4, 2, GRID), (4, 6)),
    "neighborhood(5)": (WindowGeometry.neighborhood(5, 2), (4, 5)),
    "neighborhood(5), at the edge": (WindowGeometry.neighborhood(5, 2), (0, 9)),
    "neighborhood(5, stride=3)": (WindowGeometry.neighborhood(5, 2, stride=3), (4, 5)),
    "neighborhood(3, dilation=3)": (WindowGeometry.neighborhood(3, 2, dilation=3), (4, 5)),
}
NOTHING, REAL, SEEN, SEEN_PADDING, QUERY = range(5)
COLOURS = ["#f4f4f4", "#cfd8e3", "#3b76af", "#a9c4de", "#d1495b"]


def panel(geometry: WindowGeometry, query: tuple[int, int]) -> torch.Tensor:
    """What each token of the padded grid is to ``query``."""
    fitted = geometry.fit(GRID)
    padded = fitted.padded(GRID)
    allowed, _ = pairs(fitted, torch.Size(GRID), torch.device("cpu"))
    seen = allowed[query[0] * padded[1] + query[1]].reshape(padded)
    kinds = torch.full(padded, NOTHING)
    kinds[: GRID[0], : GRID[1]] = REAL
    kinds = torch.where(seen, torch.where(kinds == REAL, SEEN, SEEN_PADDING), kinds)
    kinds[query] = QUERY
    return kinds


def main() -> None:
    """Draw all patterns into one picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.png")
    options = parser.parse_args()
    figure, axes = plt.subplots(2, 5, figsize=(14, 6.2), layout="constrained")
    for ax, (name, (geometry, query)) in zip(axes.flat, PATTERNS.items(), strict=True):
        kinds = panel(geometry, query)
        colours = matplotlib.colors.ListedColormap(COLOURS)
        ax.pcolormesh(kinds, cmap=colours, vmin=0, vmax=4, edgecolors="white", linewidth=1.2)
        ax.set_title(name, fontsize=10)
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.invert_yaxis()
        ax.set_frame_on(False)
    legend = {"query": QUERY, "attended": SEEN, "padding, attended": SEEN_PADDING, "token": REAL, "padding": NOTHING}
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[kind]) for kind in legend.values()]
    figure.legend(handles, list(legend), ncols=5, loc="outside lower center", frameon=False)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.out, dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()
