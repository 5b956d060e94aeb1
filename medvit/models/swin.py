"""Swin transformer encoder over 2D and 3D images, with MONAI's numerics.

Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (ICCV 2021);
Hatamizadeh et al., "Swin UNETR" (BrainLes 2021); Project-MONAI/MONAI ``SwinTransformer``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from medvit.dims import ntuple
from medvit.kernels import WindowGeometry
from medvit.layers.block import SwinBlock
from medvit.layers.conv import ResidualBlock
from medvit.layers.patch import PatchEmbed, PatchMerging
from medvit.models.encoder import check_image


class SwinStage(nn.Module):
    """Blocks with alternating unshifted and shifted windows, then patch merging.

    Args:
        spatial_dims: rank of the grid.
        dim: channels in; ``2 * dim`` come out.
        depth: number of blocks; every second one is shifted.
        num_heads: attention heads.
        window: per-axis window edge in tokens.
        drop_path: stochastic depth rate of each block.
        downsample: patch-merging order, see :func:`~medvit.layers.patch.merging_offsets`.
        conv_first: a residual convolution block before the others.
        use_checkpoint: recompute blocks in the backward pass.
        **block: further arguments of :class:`~medvit.layers.block.SwinBlock`.
    """

    def __init__(
        self,
        spatial_dims: int,
        dim: int,
        depth: int,
        num_heads: int,
        window: tuple[int, ...],
        drop_path: Sequence[float],
        downsample: str,
        conv_first: bool,
        use_checkpoint: bool,
        **block: float | bool | str,
    ):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.conv: nn.Module = ResidualBlock(spatial_dims, dim, dim) if conv_first else nn.Identity()
        self.blocks = nn.ModuleList(
            SwinBlock(
                dim,
                num_heads,
                WindowGeometry.swin(window, spatial_dims, shifted=j % 2 == 1),
                drop_path=drop_path[j],
                **block,  # type: ignore[arg-type]
            )
            for j in range(depth)
        )
        self.merge = PatchMerging(spatial_dims, dim, downsample)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, dim, *grid)`` to ``(B, 2 * dim, *ceil(grid / 2))``."""
        x = self.conv(x).movedim(1, -1)
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        out: Tensor = self.merge(x).movedim(-1, 1)
        return out


class SwinEncoder(nn.Module):
    """Patch embedding and one stage per entry of ``depths``; features after the embedding and after each stage.

    Args:
        spatial_dims: 2 or 3.
        in_channels: image channels.
        feature_size: channels after the patch embedding; each stage doubles them.
        patch_size: patch edge, per axis.
        depths, num_heads: blocks and heads of each stage.
        window_size: window edge in tokens, per axis.
        qkv_bias, mlp_ratio: see :class:`~medvit.layers.block.SwinBlock`.
        drop_rate, attn_drop_rate: dropout of projections and of attention weights.
        dropout_path_rate: stochastic depth of the last block; rises linearly from 0.
        normalize: returned features pass a LayerNorm over channels without affine (the next stage sees them without).
        patch_norm: LayerNorm after the patch embedding.
        downsample: patch-merging order, see :func:`~medvit.layers.patch.merging_offsets`.
        use_v2: a residual convolution block before each stage (SwinUNETR-V2, He et al., MICCAI 2023).
        use_checkpoint: recompute blocks in the backward pass instead of keeping their activations.
        clamp: see :class:`~medvit.layers.attention.RelativePositionBias`; ``"prefix"`` is what MONAI computes.

    Raises:
        ValueError: sizes, heads, rates or names that do not fit.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        feature_size: int,
        *,
        patch_size: int | Sequence[int] = 2,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        dropout_path_rate: float = 0.0,
        normalize: bool = True,
        patch_norm: bool = False,
        downsample: str = "merging",
        use_v2: bool = False,
        use_checkpoint: bool = False,
        clamp: str = "prefix",
    ):
        super().__init__()
        if not (isinstance(depths, Sequence) and isinstance(num_heads, Sequence) and len(depths) == len(num_heads)):
            raise ValueError(
                f"depths and num_heads need one entry per stage, got depths={depths} and num_heads={num_heads}"
            )
        patch = ntuple(patch_size, spatial_dims, "patch_size")
        window = ntuple(window_size, spatial_dims, "window_size")
        self.spatial_dims, self.in_channels, self.normalize = spatial_dims, in_channels, normalize
        self.channels = tuple(feature_size * 2**i for i in range(len(depths) + 1))
        self.strides = tuple(tuple(p * 2**i for p in patch) for i in range(len(depths) + 1))
        self.embed_dim = self.channels[-1]
        self.patch_embed = PatchEmbed(spatial_dims, in_channels, feature_size, patch, norm=patch_norm)
        self.drop = nn.Dropout(drop_rate)
        rates = torch.linspace(0, dropout_path_rate, sum(depths), device="cpu").tolist()
        self.stages = nn.ModuleList(
            SwinStage(
                spatial_dims,
                self.channels[i],
                depth,
                num_heads[i],
                window,
                rates[sum(depths[:i]) : sum(depths[: i + 1])],
                downsample,
                use_v2,
                use_checkpoint,
                mlp_ratio=mlp_ratio,
                qkv_bias=qkv_bias,
                clamp=clamp,
                drop=drop_rate,
                attn_drop=attn_drop_rate,
            )
            for i, depth in enumerate(depths)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """``(B, in_channels, *spatial)`` to maps ``(B, channels[i], *ceil(spatial / strides[i]))``, finest first."""
        check_image(x, self.in_channels, self.spatial_dims)
        x = self.drop(self.patch_embed(x).movedim(-1, 1))
        features = [self._out(x)]
        for stage in self.stages:
            x = stage(x)
            features.append(self._out(x))
        return features

    def embed(self, x: Tensor) -> Tensor:
        """Mean over the deepest map, ``(B, embed_dim)``."""
        deepest: Tensor = self(x)[-1]
        return deepest.flatten(2).mean(-1)

    def _out(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.movedim(1, -1), x.shape[1:2]).movedim(-1, 1) if self.normalize else x
