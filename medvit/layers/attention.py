"""Multi-head self-attention within the windows of a token grid."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from medvit.kernels import BiasTable, WindowGeometry, windowed_attention


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
        clamp: what a window smaller than ``window`` reads from the table, see :class:`~medvit.kernels.BiasTable`.
            ``"prefix"`` is what MONAI does and what its released weights were trained with.

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

    def forward(self) -> BiasTable:
        """What :func:`~medvit.kernels.windowed_attention` takes as bias."""
        return BiasTable(self.table, self.window, self.clamp)


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
        # padding is attended with the keys and values that a zero token has, and asks nothing
        q, k, v = self.qkv(geometry.pad(x)).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        dropout = self.attn_drop if self.training else 0.0
        out = windowed_attention(geometry.crop(q, grid), k, v, geometry, bias=self.relative_bias(), dropout=dropout)
        y: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return y
