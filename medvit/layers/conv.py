"""Convolution blocks of the UNETR family, over images ``(B, C, *spatial)``."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor, nn

from medvit.dims import batch_norm, conv, conv_transpose, instance_norm

M = TypeVar("M", bound=nn.Module)
_NORMS = {"instance": instance_norm, "batch": batch_norm}


def image_norm(spatial_dims: int, channels: int, name: str) -> nn.Module:
    """``"instance"`` (no affine, eps 1e-5) or ``"batch"`` normalisation.

    Raises:
        ValueError: another name.
    """
    if name not in list(_NORMS):  # MONAI's names with arguments cannot be looked up
        raise ValueError(f"norm must be one of {sorted(_NORMS)}, got {name!r}")
    return _NORMS[name](spatial_dims, channels)


def float32_on_tiny_maps(forward: Callable[[M, Tensor], Tensor]) -> Callable[[M, Tensor], Tensor]:
    """Decorator of a ``forward`` that keeps maps with a side below 3 out of bfloat16 autocast on the CPU.

    Where a side is 2, torch 2.15 leaves uninitialised memory in the bfloat16 weight gradient of a 3-wide convolution,
    grouped or not; maps this small cost nothing in float32.
    """

    @wraps(forward)
    def guarded(self: M, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and min(x.shape[2:]) < 3 and torch.is_autocast_enabled("cpu"):
            with torch.autocast("cpu", enabled=False):
                return forward(self, x.float() if x.dtype == torch.bfloat16 else x)
        return forward(self, x)

    return guarded


class ResidualBlock(nn.Module):
    """conv 3, norm, LeakyReLU, conv 3, norm, plus the input (projected where widths differ), LeakyReLU; no conv bias.

    Args:
        spatial_dims: rank of the image.
        in_channels, out_channels: widths.
        norm: see :func:`image_norm`.

    Source: MONAI ``UnetResBlock`` (Isensee et al., nnU-Net).
    """

    def __init__(self, spatial_dims: int, in_channels: int, out_channels: int, norm: str = "instance"):
        super().__init__()
        self.conv1 = conv(spatial_dims, in_channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = conv(spatial_dims, out_channels, out_channels, 3, padding=1, bias=False)
        self.norm1 = image_norm(spatial_dims, out_channels, norm)
        self.norm2 = image_norm(spatial_dims, out_channels, norm)
        self.act = nn.LeakyReLU(0.01, inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv(spatial_dims, in_channels, out_channels, 1, bias=False),
                image_norm(spatial_dims, out_channels, norm),
            )

    @float32_on_tiny_maps
    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``."""
        out = self.act(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        total: Tensor = self.act(out + self.shortcut(x))
        return total


class UpBlock(nn.Module):
    """Transposed convolution that raises the resolution ``scale`` times, concatenation with the skip, residual block.

    Args:
        spatial_dims: rank of the image.
        in_channels: width of the coarse map.
        out_channels: width of the skip and of the result.
        norm: see :func:`image_norm`.
        scale: upsampling factor, per axis.

    Source: MONAI ``UnetrUpBlock`` (Hatamizadeh et al., UNETR).
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        norm: str = "instance",
        scale: int | tuple[int, ...] = 2,
    ):
        super().__init__()
        self.up = conv_transpose(spatial_dims, in_channels, out_channels, scale, stride=scale, bias=False)
        self.block = ResidualBlock(spatial_dims, 2 * out_channels, out_channels, norm)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` and ``(B, out_channels, *finer)`` to ``(B, out_channels, *finer)``."""
        out: Tensor = self.block(torch.cat((self.up(x), skip), 1))
        return out
