"""Position tables ``(1, prefix + N, C)`` of plain ViTs: made, and resized to another grid.

The ``N`` rows of a grid are in raster order (last axis fastest); the ``prefix`` rows before them belong to cls and
register tokens, which have no place in the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_position(dim: int, grid: Sequence[int], prefix: int = 1) -> Tensor:
    """Fixed sine-cosine table for a grid of any rank.

    The channels are cut into one equal part per axis, **last axis first** (2D: column, then row; 3D: width, height,
    depth). With ``m = dim // (2 * rank)`` frequencies ``w_k = 10000 ** (-k / m)``, the part of an axis is
    ``[sin(i * w_0), ..., sin(i * w_(m-1)), cos(i * w_0), ..., cos(i * w_(m-1))]`` of the token's index ``i`` there.
    Channels left over by the division (4 of 1024 in 3D) are zero, and so are the prefix rows.

    Args:
        dim: channels C.
        grid: tokens per axis.
        prefix: rows before the grid's.

    Returns:
        float32 ``(1, prefix + prod(grid), dim)``, computed in float64.

    Raises:
        ValueError: fewer than two channels per axis.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (CVPR 2022), whose 2D table this is, value
    for value; the rule for other ranks is medvit's.
    """
    rank = len(grid)
    m = dim // (2 * rank)
    if m == 0:
        raise ValueError(f"a sin-cos table needs 2 channels per axis, so {2 * rank} for {rank} axes, got dim={dim}")
    # named device: under torch.device("meta") too the table has values
    frequencies = 10000.0 ** (-torch.arange(m, dtype=torch.float64, device="cpu") / m)
    index = torch.meshgrid(*[torch.arange(n, dtype=torch.float64, device="cpu") for n in grid], indexing="ij")
    angles = [i.flatten().outer(frequencies) for i in reversed(index)]
    table = torch.cat([part for a in angles for part in (a.sin(), a.cos())], dim=1)
    return F.pad(table, (0, dim - table.shape[1], prefix, 0)).float()[None]


def resize_position(
    table: Tensor,
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    *,
    prefix: int = 1,
    offset: float | None = None,
    antialias: bool = False,
) -> Tensor:
    """Position table of one grid, interpolated to another: cubic along each axis, in float32.

    In 2D this is bicubic interpolation (``align_corners=False``); other ranks are its separable
    generalisation, so that an axis of length one changes nothing.

    Args:
        table: ``(1, prefix + prod(old_grid), C)``.
        old_grid: tokens per axis of ``table``.
        new_grid: tokens per axis wanted.
        prefix: leading rows, returned unchanged.
        offset: None, and rows are ``old / new`` apart (MAE, DeiT, Hugging Face); or a number, and they are
            ``old / (new + offset)`` apart: the original DINOv2 passes 0.1.
        antialias: widen the kernel where the table shrinks, as DINOv2 with registers does; torch then also takes
            another cubic kernel (a = -0.5 instead of -0.75), so that growing tables differ too.

    Returns:
        ``(1, prefix + prod(new_grid), C)`` of ``table``'s dtype; ``table`` itself where the grids are equal.

    Raises:
        ValueError: grids of different rank, or a table that does not belong to ``old_grid``.
    """
    if len(old_grid) != len(new_grid) or table.shape[1] != prefix + prod(old_grid):
        raise ValueError(
            f"a table for {prefix} prefix rows and a grid of {tuple(old_grid)} has {prefix + prod(old_grid)} rows and "
            f"resizes to a grid of {len(old_grid)} axes, got {table.shape[1]} rows and a new grid of {tuple(new_grid)}"
        )
    # a symbolic size (torch.export) is never compared, which would fix it: interpolation to the same size is exact
    if all(isinstance(new, int) and new == old for old, new in zip(old_grid, new_grid, strict=True)):
        return table
    rows = table[0, prefix:].float().reshape(*old_grid, -1)
    for axis, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
        scale = None if offset is None else (new + offset) / old
        rows = _cubic(rows.movedim(axis, -1), new, scale, antialias).movedim(-1, axis)
    return torch.cat([table[:, :prefix], rows.flatten(0, -2)[None].to(table.dtype)], dim=1)


def _cubic(x: Tensor, size: int, scale: float | None, antialias: bool) -> Tensor:
    """Cubic interpolation of the last axis: bicubic over a plane whose other axis stays as it is."""
    plane = x.reshape(1, 1, -1, x.shape[-1])
    if scale is None:
        out = F.interpolate(plane, size=(plane.shape[2], size), mode="bicubic", antialias=antialias)
    else:
        out = F.interpolate(plane, scale_factor=(1.0, scale), mode="bicubic", antialias=antialias)
    return out.reshape(*x.shape[:-1], size)
