"""Between images ``(B, C, *spatial)`` and token grids ``(B, *grid, C)``, and between token grids of two resolutions."""

from __future__ import annotations

from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from medvit.dims import conv
from medvit.layers.norm import channels_last

Offsets = tuple[tuple[int, ...], ...]

# Weights are tied to the order they were trained with.
_MERGING_3D: Offsets = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
# MONAI before 1.5 read two sub-grids twice and two never; all checkpoints published before January 2025 are trained so.
_LEGACY_3D: Offsets = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
MERGING_ORDERS = ("merging", "mergingv2", "merging_legacy")


def merging_offsets(spatial_dims: int, order: str) -> Offsets:
    """Parities of the ``2 ** spatial_dims`` sub-grids in the order in which patch merging concatenates them.

    Args:
        spatial_dims: rank of the grid.
        order: ``"merging"`` (MONAI >= 1.5), ``"mergingv2"`` (last axis fastest) or ``"merging_legacy"`` (MONAI < 1.5).
            They differ in 3D only; other ranks have one order, first axis fastest.

    Raises:
        ValueError: an unknown order.
    """
    if order not in MERGING_ORDERS:
        raise ValueError(f"merging order must be one of {MERGING_ORDERS}, got {order!r}")
    raster = tuple(product((0, 1), repeat=spatial_dims))
    if spatial_dims != 3:
        return tuple(offset[::-1] for offset in raster)
    return {"merging": _MERGING_3D, "mergingv2": raster, "merging_legacy": _LEGACY_3D}[order]


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens.

    Args:
        spatial_dims: rank of the image.
        in_channels, dim: channels in and out.
        patch_size: per-axis patch edge in voxels; the image is zero-padded at the end to whole patches.
        norm: LayerNorm over the tokens' channels.

    Shapes: ``(B, in_channels, *spatial)`` to ``(B, *ceil(spatial / patch_size), dim)``.
    """

    def __init__(self, spatial_dims: int, in_channels: int, dim: int, patch_size: tuple[int, ...], norm: bool = False):
        super().__init__()
        self.patch_size = patch_size
        self.proj = conv(spatial_dims, in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Embed; see the class."""
        extra = [-n % p for n, p in zip(x.shape[2:], self.patch_size, strict=True)]
        if any(extra):
            x = F.pad(x, [v for e in reversed(extra) for v in (0, e)])
        tokens: Tensor = self.norm(self.proj(channels_last(x)).movedim(1, -1))
        return tokens


class PatchMerging(nn.Module):
    """Halve a token grid and double its channels: concatenate neighbours, LayerNorm, linear without bias.

    Args:
        spatial_dims: rank of the grid.
        dim: channels in; ``2 * dim`` come out.
        order: see :func:`merging_offsets`.

    Shapes: ``(B, *grid, dim)`` to ``(B, *ceil(grid / 2), 2 * dim)``; odd sides are zero-padded at the end.
    """

    def __init__(self, spatial_dims: int, dim: int, order: str = "merging"):
        super().__init__()
        self.offsets = merging_offsets(spatial_dims, order)
        self.norm = nn.LayerNorm(2**spatial_dims * dim)
        self.reduction = nn.Linear(2**spatial_dims * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Merge; see the class."""
        odd = [n % 2 for n in x.shape[1:-1]]
        if any(odd):
            x = F.pad(x, [0, 0] + [v for e in reversed(odd) for v in (0, e)])
        parts = [x[(slice(None), *[slice(o, None, 2) for o in offset])] for offset in self.offsets]
        merged: Tensor = self.reduction(self.norm(torch.cat(parts, -1)))
        return merged


class PatchExpand(nn.Module):
    """Refine a token grid: each token becomes a box of tokens, by a linear map without bias and a LayerNorm.

    Args:
        dim, out_dim: channels in and out.
        factor: tokens of the box along each axis; its length is the rank.

    Shapes: ``(B, *grid, dim)`` to ``(B, *(grid * factor), out_dim)``; the linear map's outputs are the box in raster
    order, channels fastest.

    Source: Cao et al., "Swin-Unet" (ECCV-W 2022); in 3D, Wu et al., "D-Former" (2022).
    """

    def __init__(self, dim: int, out_dim: int, factor: tuple[int, ...]):
        super().__init__()
        self.factor = factor
        self.expand = nn.Linear(dim, prod(factor) * out_dim, bias=False)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Expand; see the class."""
        rank = len(self.factor)
        finer = [n * f for n, f in zip(x.shape[1:-1], self.factor, strict=True)]
        boxes = self.expand(x).unflatten(-1, (*self.factor, -1))
        order = [0, *[v for axis in range(rank) for v in (1 + axis, 1 + rank + axis)], 1 + 2 * rank]
        expanded: Tensor = self.norm(boxes.permute(order).reshape(x.shape[0], *finer, -1))
        return expanded
