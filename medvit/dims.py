"""The only place that knows how torch's layers differ between one, two and three spatial dimensions."""

from __future__ import annotations

from collections.abc import Iterable
from operator import index
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
Layers = dict[int, type[nn.Module]]


class Conv3d(nn.Conv3d):
    """``torch.nn.Conv3d`` that computes small maps in float32 where it would in bfloat16 on a CPU.

    There torch leaves uninitialised memory in the gradient of the weight if the first side of a map that it pads is
    smaller than the kernel (oneDNN 3.12, ``avx512_core_bf16``), and is wrong forward if the last side of a strided
    output is 1 (pytorch/pytorch#169688, on AMX). Maps of a side below kernel plus stride cost nothing in float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """``(B, in_channels, D, H, W)`` to ``(B, out_channels, *out)``, in the type that torch's layer gives."""
        if not (_in_bfloat16_on_cpu(input) and self._is_small(input)):
            out: Tensor = super().forward(input)
            return out
        bias = None if self.bias is None else self.bias.float()
        with torch.autocast("cpu", enabled=False):
            out = self._conv_forward(input.float(), self.weight.float(), bias)
        return out.bfloat16()

    def _is_small(self, x: Tensor) -> bool:
        per_axis = zip(x.shape[2:], self.kernel_size, self.dilation, self.stride, strict=True)
        return any(k > 1 and n < (k - 1) * d + 1 + s for n, k, d, s in per_axis)


def _in_bfloat16_on_cpu(x: Tensor) -> bool:
    if x.device.type != "cpu":
        return False
    autocast = torch.is_autocast_enabled("cpu")
    return (torch.get_autocast_dtype("cpu") if autocast else x.dtype) == torch.bfloat16


_CONV: Layers = {1: nn.Conv1d, 2: nn.Conv2d, 3: Conv3d}
_CONV_TRANSPOSE: Layers = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_INSTANCE_NORM: Layers = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_BATCH_NORM: Layers = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INTERPOLATION = {1: "linear", 2: "bilinear", 3: "trilinear"}


def _pick(table: dict[int, T], spatial_dims: int) -> T:
    if spatial_dims not in table:
        raise ValueError(f"spatial_dims must be one of {sorted(table)}, got {spatial_dims!r}")
    return table[spatial_dims]


def ntuple(value: SupportsIndex | Iterable[SupportsIndex], spatial_dims: int, name: str = "value") -> tuple[int, ...]:
    """``value`` once per axis: an int is repeated, a sequence must have ``spatial_dims`` entries.

    Raises:
        ValueError: a sequence of another length, or anything but positive integers; the message names ``name``.
    """
    entries = value if isinstance(value, Iterable) else (value,) * spatial_dims
    try:
        axes = tuple(index(entry) for entry in entries)
    except TypeError:
        axes = ()
    if len(axes) != spatial_dims:
        raise ValueError(f"{name} needs one int or {spatial_dims} of them, got {value!r}")
    if any(n < 1 for n in axes):
        raise ValueError(f"{name} must be at least 1 on every axis, got {value!r}")
    return axes


def conv(spatial_dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """``torch.nn.ConvNd(*args, **kwargs)`` of that many dimensions; in 3D see :class:`Conv3d`."""
    return _pick(_CONV, spatial_dims)(*args, **kwargs)


def conv_transpose(spatial_dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """``torch.nn.ConvTransposeNd(*args, **kwargs)`` of that many dimensions."""
    return _pick(_CONV_TRANSPOSE, spatial_dims)(*args, **kwargs)


def instance_norm(spatial_dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """``torch.nn.InstanceNormNd(*args, **kwargs)`` of that many dimensions."""
    return _pick(_INSTANCE_NORM, spatial_dims)(*args, **kwargs)


def batch_norm(spatial_dims: int, *args: Any, **kwargs: Any) -> nn.Module:
    """``torch.nn.BatchNormNd(*args, **kwargs)`` of that many dimensions."""
    return _pick(_BATCH_NORM, spatial_dims)(*args, **kwargs)


def interpolation(spatial_dims: int) -> str:
    """Name of (multi)linear interpolation in ``torch.nn.functional.interpolate``."""
    return _pick(_INTERPOLATION, spatial_dims)
