"""Convolution blocks of the UNETR family, over images ``(B, C, *spatial)``.

They work with the channels last in memory, where torch's convolutions on a CPU are about twice as fast and where tokens
become maps without a copy, and they hand such maps on.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]
from torch.nn import functional as F

from medvit.dims import batch_norm, conv, conv_transpose, instance_norm
from medvit.layers.norm import channels_last, instance_norm_act

_NORMS = {"instance": instance_norm, "batch": batch_norm}


def image_norm(spatial_dims: int, channels: int, name: str) -> nn.Module:
    """``"instance"`` (no affine, eps 1e-5) or ``"batch"`` normalisation.

    Raises:
        ValueError: another name.
    """
    if name not in list(_NORMS):  # MONAI's names with arguments cannot be looked up
        raise ValueError(f"norm must be one of {sorted(_NORMS)}, got {name!r}")
    return _NORMS[name](spatial_dims, channels)


def norm_act(norm: nn.Module, x: Tensor, residual: Tensor | None = None, slope: float = 0.01) -> Tensor:
    """``leaky_relu(norm(x) + residual)``; may overwrite ``x``, see :func:`~medvit.layers.norm.instance_norm_act`."""
    if _eager_on_cpu(x) and isinstance(norm, nn.InstanceNorm1d | nn.InstanceNorm2d | nn.InstanceNorm3d):
        return instance_norm_act(x, residual, slope, norm.eps)
    x = norm(x)
    x = x if residual is None else x + residual
    return x if slope == 1 else F.leaky_relu(x, slope)


def _eager_on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or is_tracing())  # type: ignore[no-untyped-call]


def convolve(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` for a convolution of stride 1 that keeps the size; fast also where torch is not."""
    kernel = getattr(layer, "weight", None)  # a head may have been replaced by anything
    if kernel is None or torch.is_autocast_enabled("cpu") or not _unfolds(x, kernel):
        out: Tensor = layer(x)
        return out
    return _by_onednn(x, kernel, getattr(layer, "bias", None))


def _by_onednn(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    padding, once = [n // 2 for n in kernel.shape[2:]], [1] * (x.dim() - 2)
    return torch.mkldnn_convolution(x, kernel, bias, padding, once, once, 1)


def _unfolds(x: Tensor, kernel: Tensor) -> bool:
    """Whether torch, left alone, would unfold ``x`` on a CPU, which is several times slower and puts channels first.

    It does where the channels are few or the kernel is a point.
    """
    few = kernel.shape[1] < 16 or kernel[0, 0].numel() == 1
    if not few or x.dim() < 4 or not x.dtype == kernel.dtype == torch.float32 or not _eager_on_cpu(x):
        return False
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


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
        self.shortcut: nn.Sequential | None = None
        if in_channels != out_channels:
            self.shortcut = nn.Sequential(
                conv(spatial_dims, in_channels, out_channels, 1, bias=False),
                image_norm(spatial_dims, out_channels, norm),
            )

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, *spatial)`` to ``(B, out_channels, *spatial)``."""
        x = channels_last(x)
        return self.complete(convolve(self.conv1, x), convolve(self.shortcut[0], x) if self.shortcut else x)

    def complete(self, first: Tensor, side: Tensor) -> Tensor:
        """The rest of the block, from what its first convolution and that of its shortcut (or nothing) gave."""
        second = self.conv2(norm_act(self.norm1, first))
        if self.shortcut:
            side = norm_act(self.shortcut[1], side, slope=1)
        return norm_act(self.norm2, second, side)


class UpBlock(nn.Module):
    """Transposed convolution that raises the resolution ``scale`` times, concatenation with the skip, residual block.

    Args:
        spatial_dims: rank of the image.
        in_channels: width of the coarse map.
        out_channels: width of the skip and of the result.
        norm: see :func:`image_norm`.
        scale: upsampling factor, per axis.

    The convolution of a concatenation is a sum of two, and a transposed convolution followed by a convolution is one
    transposed convolution with a larger kernel. Where the map is large beside the kernels, that one is made first, and
    neither the upsampled map nor the concatenation ever exists: a third of the multiplications for that half.

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
        block, up = self.block, self.up.get_parameter("weight")
        if block.shortcut is None or not self._joins(x, skip):
            out: Tensor = block(torch.cat((upsample(x, up), skip), 1))
            return out
        x, skip = (_as_autocast(channels_last(m)) for m in (x, skip))
        first, side = (
            convolve_both(x, skip, up, layer.get_parameter("weight")) for layer in (block.conv1, block.shortcut[0])
        )
        return block.complete(first, side)

    def _joins(self, x: Tensor, skip: Tensor) -> bool:
        """Whether making the joint kernel is little beside using it, and no map is tiny."""
        coarse, _, *scale = self.up.get_parameter("weight").shape
        making = coarse * prod([n + 2 for n in scale])  # a list: graphs are traced through here
        return 4 * making < skip[:, 0].numel() and min(*x.shape[2:], *skip.shape[2:]) > 2


def upsample(x: Tensor, kernel: Tensor) -> Tensor:
    """Transposed convolution whose stride is its kernel's size, as a product of voxels and weights: no boxes overlap.

    Args:
        x: ``(B, C, *spatial)``.
        kernel: ``(C, D, *scale)``.

    Returns:
        ``(B, D, *(spatial * scale))``, channels last in memory.
    """
    (channels, width, *scale), rank = kernel.shape, kernel.dim() - 2
    boxes = x.movedim(1, -1) @ kernel.movedim(1, -1).reshape(channels, -1)
    order = [0, *[v for axis in range(rank) for v in (1 + axis, 1 + rank + axis)], 1 + 2 * rank]
    finer = [n * f for n, f in zip(x.shape[2:], scale, strict=True)]
    return boxes.view(*boxes.shape[:-1], *scale, width).permute(order).reshape(-1, *finer, width).movedim(-1, 1)


def convolve_both(x: Tensor, skip: Tensor, up: Tensor, kernel: Tensor) -> Tensor:
    """``kernel`` over the concatenation of ``skip`` to what ``up`` makes of ``x``, without either.

    Args:
        x: coarse map ``(B, C, *spatial)``.
        skip: ``(B, E, *(spatial * scale))``.
        up: ``(C, D, *scale)``, a transposed convolution whose stride is ``scale``.
        kernel: ``(F, D + E, *edges)`` of odd edges, with zero padding.

    Returns:
        ``(B, F, *(spatial * scale))``.
    """
    width, reach = up.shape[1], [n - 1 for n in kernel.shape[2:]]
    wide = torch.promote_types(up.dtype, torch.float32)  # see medvit.dims.Conv3d: an upsampling kernel is a small map
    joint = _convolve(up.to(wide), kernel[:, :width].to(wide), padding=reach).to(x.dtype)
    middle = [n // 2 for n in reach]
    rest = kernel[:, width:].to(x.dtype)
    own = _by_onednn(skip, rest) if _unfolds(skip, rest) else _convolve(skip, rest, padding=middle)
    if not any(reach):
        return own.add_(upsample(x, joint))
    return own.add_(_convolve(x, joint, stride=up.shape[2:], padding=middle, transposed=True))


def _convolve(
    x: Tensor, kernel: Tensor, *, padding: Sequence[int], stride: Sequence[int] = (), transposed: bool = False
) -> Tensor:
    once, none = [1] * len(padding), [0] * len(padding)
    return torch.convolution(x, kernel, None, stride or once, padding, once, transposed, none, 1)


def _as_autocast(x: Tensor) -> Tensor:
    """``x`` as autocast hands it to a convolution; ``torch.convolution`` itself is below autocast on a CPU."""
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x
