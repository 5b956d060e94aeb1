"""D-Former's blocks over token grids ``(B, *grid, C)``: groups near and far, positions from a convolution.

Wu et al., "D-Former: A U-shaped Dilated Transformer for 3D Medical Image Segmentation" (2022), kkk55596/D-Former.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medvit.dims import conv
from medvit.kernels import WindowGeometry, windowed_attention
from medvit.layers.attention import check_heads
from medvit.layers.block import DropPath, Mlp


class PositionBlock(nn.Module):
    """Position encoding from the tokens themselves: a depthwise convolution of 3 is added to them.

    Shapes: ``(B, *grid, dim)`` to the same. Source: Chu et al., "Conditional Positional Encodings for Vision
    Transformers" (2021).
    """

    def __init__(self, spatial_dims: int, dim: int):
        super().__init__()
        self.conv = conv(spatial_dims, dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        """Add positions; see the class."""
        out: Tensor = x + self.conv(x.movedim(-1, 1)).movedim(1, -1)
        return out


class GroupAttention(nn.Module):
    """Multi-head self-attention within local or global groups, without a position bias.

    Args:
        dim: channels.
        num_heads: must divide ``dim``.
        group: tokens of a group, per axis.
        interval: None for local groups (boxes of neighbours); a number for global ones (every n-th token, see
            :meth:`~medvit.kernels.WindowGeometry.dformer_global`), of which the padded grid is a multiple.
        qkv_bias: bias of the qkv projection.
        attn_drop, proj_drop: dropout of attention weights, and after the output projection.
        official_quirks: compute what the authors' code does. Where the second last axis is shorter than its group all
            tokens become one group, instead of that axis alone being clamped; and where global groups pad only axes
            before the last two, padding tokens are attended (they carry the qkv bias), instead of being masked.

    Shapes: ``(B, *grid, dim)`` to the same, for any grid.

    Raises:
        ValueError: heads that do not divide the channels.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group: tuple[int, ...],
        interval: int | None = None,
        *,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        official_quirks: bool = False,
    ):
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads, self.group, self.interval = num_heads, group, interval
        self.attn_drop, self.official_quirks = attn_drop, official_quirks
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Attend within groups; see the class."""
        grid = tuple(x.shape[1:-1])
        geometry = self.geometry(grid)
        if self.official_quirks and self.interval is not None and geometry.padded(grid)[-2:] == grid[-2:]:
            x = geometry.pad(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)
        out = windowed_attention(q, k, v, geometry, dropout=self.attn_drop if self.training else 0.0)
        y: Tensor = self.proj_drop(self.proj(geometry.crop(out.flatten(-2), grid)))
        return y

    def geometry(self, grid: tuple[int, ...]) -> WindowGeometry:
        """The groups of a grid."""
        if self.official_quirks and grid[-2] < self.group[-2]:
            return WindowGeometry.full(grid)
        if self.interval is None:
            return WindowGeometry.dformer_local(self.group, len(self.group)).fit(grid)
        return WindowGeometry.dformer_global(self.group, self.interval, grid)


class DFormerBlock(nn.Module):
    """Pre-norm group attention and MLP, each with a residual.

    Args:
        dim, num_heads, group, interval, qkv_bias, attn_drop, official_quirks: see :class:`GroupAttention`.
        mlp_ratio: hidden width of the MLP over ``dim``.
        drop: dropout of the projections.
        drop_path: probability of dropping a residual branch.

    Shapes: ``(B, *grid, dim)`` to the same.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        group: tuple[int, ...],
        interval: int | None = None,
        *,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        official_quirks: bool = False,
    ):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = GroupAttention(
            dim,
            num_heads,
            group,
            interval,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=drop,
            official_quirks=official_quirks,
        )
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """One block; see the class."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out


class DFormerStage(nn.Module):
    """Positions, then blocks of local and global groups in turn, local first.

    Args:
        spatial_dims: rank of the grid.
        dim, num_heads, group, interval: see :class:`GroupAttention`; the interval is that of the global groups.
        drop_path: stochastic depth rate of each block; its length is the number of blocks.
        use_checkpoint: recompute blocks in the backward pass.
        **block: further arguments of :class:`DFormerBlock`.

    Shapes: ``(B, *grid, dim)`` to the same.
    """

    def __init__(
        self,
        spatial_dims: int,
        dim: int,
        num_heads: int,
        group: tuple[int, ...],
        interval: int,
        drop_path: Sequence[float],
        use_checkpoint: bool = False,
        **block: float | bool,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.position = PositionBlock(spatial_dims, dim)
        self.blocks = nn.ModuleList(
            DFormerBlock(dim, num_heads, group, interval if j % 2 else None, drop_path=rate, **block)  # type: ignore[arg-type]
            for j, rate in enumerate(drop_path)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One stage; see the class."""
        x = self.position(x)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x
