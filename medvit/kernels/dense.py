"""The oracle: windowed attention straight from its definition, quadratic in the whole grid. For tests."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from medvit.kernels.windows import WindowGeometry


def supports(q: Tensor, geometry: WindowGeometry) -> str | None:
    """Why this backend cannot run, or None: it always can."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Tensor | None, dropout: float = 0.0) -> Tensor:
    """See :func:`medvit.kernels.attention.windowed_attention`; every pair is scored, then most are forbidden."""
    grid = q.shape[1 : 1 + len(geometry.size)]
    q, k, v = (geometry.pad(t).flatten(1, len(grid)).transpose(1, 2) for t in (q, k, v))
    window, member = _place(geometry, grid, q.device)
    logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    if bias is not None:
        logits = logits + bias[:, member[:, None], member[None, :]]
    logits = logits.masked_fill(window[:, None] != window[None, :], float("-inf"))
    weights = F.dropout(logits.softmax(-1), dropout).to(v.dtype)
    out = (weights @ v).transpose(1, 2)
    return geometry.crop(out.reshape(out.shape[0], *geometry.padded(grid), *out.shape[2:]), grid)


def _place(geometry: WindowGeometry, grid: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each token of the padded grid: an id shared by those it may see, and its index within the window."""
    padded = geometry.padded(grid)
    window = torch.zeros(padded, dtype=torch.int64, device=device)
    member = torch.zeros_like(window)
    axes = zip(padded, geometry.size, geometry.shift, geometry.dilation, strict=True)
    for axis, (length, size, shift, dilation) in enumerate(axes):
        position = torch.arange(length, device=device)
        rolled = (position - shift) % length
        shape = [-1 if a == axis else 1 for a in range(len(padded))]
        seen = (rolled // (size * dilation) * dilation + rolled % dilation) * 2 + (position < shift)
        window = window * (2 * length) + seen.reshape(shape)
        member = member * size + (rolled // dilation % size).reshape(shape)
    if geometry.mask_padding:
        real = geometry.pad(torch.ones((1, *grid), dtype=torch.bool, device=device))[0]
        window = torch.where(real, window, -1 - window)  # padding sees padding alone
    return window.flatten(), member.flatten()
