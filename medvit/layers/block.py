"""Transformer blocks over token grids ``(B, *grid, C)``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medvit.dims import conv
from medvit.kernels import WindowGeometry
from medvit.layers.attention import WindowAttention

# In evaluation MLPs take so many tokens at a time: their hidden layer stays in a CPU's cache.
TOKENS = 4096


class Mlp(nn.Module):
    """Linear, exact GELU, linear, over the last axis."""

    def __init__(self, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., dim)`` to the same."""
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_cuda:
            return self._whole(x)
        return torch.cat([self._whole(part) for part in torch.split(x.flatten(0, -2), TOKENS)]).reshape(x.shape)

    def _whole(self, x: Tensor) -> Tensor:
        out: Tensor = self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
        return out


class EFFN(nn.Module):
    """HBFormer's enhanced feed-forward: linear, depthwise conv 3, conv 1, exact GELU, linear, over a token grid.

    Args:
        spatial_dims: rank of the grid.
        dim, hidden: widths.
        drop: dropout after the activation and at the end.

    Shapes: ``(B, *grid, dim)`` to the same. Source: Zheng et al., "HBFormer" (BIBM 2025).
    """

    def __init__(self, spatial_dims: int, dim: int, hidden: int, drop: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.depthwise = conv(spatial_dims, hidden, hidden, 3, padding=1, groups=hidden)
        self.pointwise = conv(spatial_dims, hidden, hidden, 1)
        self.act, self.drop = nn.GELU(), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """Mix neighbours and channels; see the class."""
        hidden = self.pointwise(self.depthwise(self.fc1(x).movedim(-1, 1))).movedim(1, -1)
        out: Tensor = self.drop(self.fc2(self.drop(self.act(hidden))))
        return out


class DropPath(nn.Module):
    """Drops a whole residual branch per sample in training.

    Args:
        rate: probability of dropping, ``0 <= rate < 1``.

    Shapes: ``(B, ...)`` to the same.

    Raises:
        ValueError: a rate outside that range.

    Source: Huang et al., "Deep Networks with Stochastic Depth" (ECCV 2016).
    """

    def __init__(self, rate: float = 0.0):
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"a drop-path rate must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Zero the branch with probability ``rate``, scale it up otherwise; identity in evaluation."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        return x * (x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(keep) / keep)


class SwinBlock(nn.Module):
    """Pre-norm window attention and MLP, each with a residual.

    Args:
        dim: channels.
        num_heads: attention heads.
        geometry: windows, shifted or not.
        mlp_ratio: hidden width of the MLP over ``dim``.
        mlp: ``"mlp"``, or ``"effn"`` for :class:`EFFN`, which sees neighbouring tokens.
        qkv_bias, clamp: see :class:`~medvit.layers.attention.WindowAttention`.
        drop, attn_drop: dropout of the projections and of attention weights.
        drop_path: probability of dropping a residual branch.

    Shapes: ``(B, *grid, dim)`` to the same.

    Raises:
        ValueError: another ``mlp``, or what the attention refuses.

    Source: Liu et al., "Swin Transformer" (ICCV 2021).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        geometry: WindowGeometry,
        *,
        mlp_ratio: float = 4.0,
        mlp: str = "mlp",
        qkv_bias: bool = True,
        clamp: str = "exact",
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ):
        super().__init__()
        if mlp not in ("mlp", "effn"):
            raise ValueError(f"mlp must be 'mlp' or 'effn', got {mlp!r}")
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(
            dim, num_heads, geometry, qkv_bias=qkv_bias, clamp=clamp, attn_drop=attn_drop, proj_drop=drop
        )
        self.norm2 = nn.LayerNorm(dim)
        hidden = int(dim * mlp_ratio)
        self.mlp = Mlp(dim, hidden, drop) if mlp == "mlp" else EFFN(len(geometry.size), dim, hidden, drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """One block; see the class."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        out: Tensor = x + self.drop_path(self.mlp(self.norm2(x)))
        return out
