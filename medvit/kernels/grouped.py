"""Windowed attention as one scaled-dot-product attention per window, on any device torch supports."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medvit.kernels.windows import WindowGeometry, constant


def supports(q: Tensor, geometry: WindowGeometry) -> str | None:
    """Why this backend cannot run, or None: it always can."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """See :func:`medvit.kernels.attention.windowed_attention`."""
    grid = q.shape[1 : 1 + len(geometry.size)]
    q, k, v = (geometry.group(t).transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)[None]
    if geometry.is_masked(grid):
        allowed = _additive_mask(geometry, tuple(grid), str(q.device), q.dtype)
        mask = allowed if mask is None else mask + allowed
        mask = mask.expand(q.shape[0] // mask.shape[0], *mask.shape).flatten(0, 1)  # windows of all images in turn
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    out = out.transpose(1, 2)
    if torch.compiler.is_compiling():  # torch 2.15: export sees other strides than its ONNX step
        out = out.clone(memory_format=torch.contiguous_format)
    return geometry.ungroup(out, grid)


@constant(maxsize=16)
def _additive_mask(geometry: WindowGeometry, grid: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """``(windows, 1, tokens, tokens)``: 0 where two tokens may attend, -inf elsewhere."""
    regions = geometry.regions(grid, device)
    forbidden = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(forbidden.shape, dtype=dtype, device=device).masked_fill(forbidden, float("-inf"))[:, None]
