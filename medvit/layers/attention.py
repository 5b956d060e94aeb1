"""Multi-head self-attention within the windows of a token grid."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from medvit.kernels import WindowGeometry, windowed_attention


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the width.

    Raises:
        ValueError: names the largest number below that does.
    """
    if num_heads < 1 or dim % num_heads:
        fits = max((heads for heads in range(1, num_heads) if dim % heads == 0), default=1)
        raise ValueError(f"num_heads must divide the width {dim}, got {num_heads}; use {fits}")


class RelativePositionBias(nn.Module):
    """Learned logit offset for each relative position in a window and each head.

    Args:
        window: per-axis window the table is made for.
        num_heads: attention heads.
        clamp: what a window smaller than ``window`` reads from the table. ``"exact"``: the entries of its true offsets.
            ``"prefix"``: the first n x n corner of the full window's index, whatever the offsets; MONAI does this and
            its released weights were trained so.

    Raises:
        ValueError: another ``clamp``.

    Source: Liu et al., "Swin Transformer" (ICCV 2021), eq. 4.
    """

    def __init__(self, window: tuple[int, ...], num_heads: int, clamp: str = "exact"):
        super().__init__()
        if clamp not in ("exact", "prefix"):
            raise ValueError(f"clamp must be 'exact' or 'prefix', got {clamp!r}")
        self.window, self.clamp = tuple(window), clamp
        self.table = nn.Parameter(torch.empty(prod(2 * w - 1 for w in window), num_heads))
        nn.init.trunc_normal_(self.table, std=0.02)

    def forward(self, geometry: WindowGeometry) -> Tensor:
        """Bias ``(heads, tokens, tokens)`` for the windows of a fitted geometry."""
        n, device = geometry.tokens, self.table.device
        if self.clamp == "prefix":
            index = WindowGeometry.full(self.window).relative_index(device=device)[:n, :n]
        else:
            index = geometry.relative_index(self.window, device)
        # contiguous: a permuted bias would make every mask built from it a strided copy
        return self.table[index.flatten()].reshape(n, n, -1).permute(2, 0, 1).contiguous()


class WindowAttention(nn.Module):
    """Swin's window attention: qkv, relative position bias, output projection.

    Args:
        dim: channels.
        num_heads: must divide ``dim``.
        geometry: windows before fitting to a grid; its size also sizes the bias table.
        qkv_bias: bias of the qkv projection; zero padding tokens enter attention carrying it.
        clamp: see :class:`RelativePositionBias`.
        attn_drop: dropout of attention weights.
        proj_drop: dropout after the output projection.

    Shapes: ``(B, *grid, dim)`` to the same.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        geometry: WindowGeometry,
        *,
        qkv_bias: bool = True,
        clamp: str = "exact",
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.geometry, self.attn_drop = num_heads, geometry, attn_drop
        self.relative_bias = RelativePositionBias(geometry.size, num_heads, clamp)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within windows; see the class."""
        grid = x.shape[1:-1]
        geometry = self.geometry.fit(grid)
        q, k, v = self.qkv(geometry.pad(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        dropout = self.attn_drop if self.training else 0.0
        out = windowed_attention(q, k, v, geometry, bias=self.relative_bias(geometry), dropout=dropout)
        y: Tensor = self.proj_drop(self.proj(geometry.crop(out.flatten(-2), grid)))
        return y
