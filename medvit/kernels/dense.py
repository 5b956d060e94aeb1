"""The oracle: windowed attention straight from its definition, quadratic in the whole grid. For tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medvit.kernels.bias import Bias, dense_bias
from medvit.kernels.windows import WindowGeometry


def supports(q: Tensor, geometry: WindowGeometry, dropout: float = 0.0) -> str | None:
    """Why this backend cannot run, or None: it always can."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Bias = None, dropout: float = 0.0) -> Tensor:
    """See :func:`medvit.kernels.attention.windowed_attention`; every pair is scored, then most are forbidden."""
    grid = q.shape[1 : 1 + len(geometry.size)]
    q, k, v = (geometry.pad(t).flatten(1, len(grid)).transpose(1, 2) for t in (q, k, v))
    allowed, pair = pairs(geometry, grid, q.device)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    table = dense_bias(bias, geometry)
    if table is not None:
        logits = logits + table.flatten(1)[:, pair]
    weights = F.dropout(logits.masked_fill(~allowed, float("-inf")).softmax(-1), dropout).to(v.dtype)
    out = (weights @ v).transpose(1, 2)
    return geometry.crop(out.reshape(out.shape[0], *geometry.padded(grid), *out.shape[2:]), grid)


def pairs(geometry: WindowGeometry, grid: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Of each pair of tokens of the padded grid: whether it is allowed, and its entry among a window's pairs.

    Both ``(tokens, tokens)``; the entry is ``query member * window's tokens + key member``, 0 where not allowed.
    """
    padded = geometry.padded(grid)
    allowed = torch.ones(1, 1, dtype=torch.bool, device=device)
    query, key = torch.zeros(2, 1, 1, dtype=torch.int64, device=device)
    for axis, size in enumerate(geometry.size):
        line, place, start = _axis(geometry, axis, padded[axis], device)
        member = place[None, :] - start[:, None]
        seen = (line[:, None] == line[None, :]) & (member >= 0) & (member < size)
        allowed = _outer(allowed, seen, torch.logical_and)
        query = _outer(query * size, (place - start)[:, None].expand_as(member), torch.add)
        key = _outer(key * size, member, torch.add)
    if geometry.mask_padding:
        real = geometry.pad(torch.ones((1, *grid), dtype=torch.bool, device=device)).flatten()
        allowed = allowed & (real[:, None] == real[None, :])  # padding sees padding alone
    return allowed, torch.where(allowed, query * geometry.tokens + key, 0)


def _axis(geometry: WindowGeometry, axis: int, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position on an axis: its line, its place on it, and the place where its window starts."""
    size, shift, dilation = geometry.size[axis], geometry.shift[axis], geometry.dilation[axis]
    position = torch.arange(length, device=device)
    rolled = (position - shift) % length
    residue, place = rolled % dilation, rolled // dilation
    if not geometry.stride:
        return residue * 2 + (position < shift), place, place // size * size
    stride = geometry.stride[axis]
    end = (length - residue + dilation - 1) // dilation
    leader = torch.minimum(place // stride * stride + stride // 2, end - 1)
    return residue, place, (leader - size // 2).clamp(min=0).minimum(end - size)


def _outer(grid: Tensor, axis: Tensor, combine: torch._ops.OpOverloadPacket | object) -> Tensor:
    """Pairs of tokens of a grid and of one more axis, to pairs of tokens of both."""
    both = combine(grid[:, None, :, None], axis[None, :, None, :])  # type: ignore[operator]
    out: Tensor = both.reshape(grid.shape[0] * axis.shape[0], -1)
    return out
