"""Which tokens of a grid attend to which, as data: no tensors are stored, every rank from 1D up has one code path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps
from math import prod
from typing import ParamSpec, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from medvit.dims import ntuple

P = ParamSpec("P")


def constant(maxsize: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorator that remembers tensors made of sizes alone; nobody may write into them.

    What is remembered is an ordinary tensor even if made in inference mode (training may need it next); while a graph
    is traced or compiled nothing is remembered, since sizes may be symbols and tensors may be fake there.
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        remembered = lru_cache(maxsize)(torch.inference_mode(False)(make))

        @wraps(make)
        def get(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                return make(*args, **kwargs)
            return remembered(*args, **kwargs)  # type: ignore[arg-type]

        return get

    return decorate


@dataclass(frozen=True)
class WindowGeometry:
    """Which tokens attend to which: windows over a grid, shifted (Swin) or dilated (D-Former), or neighbourhoods.

    Blocked, without ``stride``. Along one axis the grid is zero-padded at its end to a multiple of ``size * dilation``
    and rolled by ``-shift``. The token at position ``(tile * size + member) * dilation + offset`` is then that member
    of group ``(tile, offset)``. Two tokens attend to each other iff they lie in the same group and in the same
    :meth:`regions`.

    Sliding, with ``stride``. Along one axis the tokens ``dilation`` apart form a line of their own. A line is cut into
    runs of ``stride`` tokens; all tokens of a run attend to the same ``size`` tokens around the run's middle one (the
    right one of two), moved inward where the line ends. Nothing is padded.

    Args:
        size: tokens of a window along each axis.
        shift: roll per axis, ``0 <= shift < size * dilation``; 0 for neighbourhoods.
        dilation: distance between neighbours of a window, per axis; by default 1, contiguous windows.
        mask_padding: padding tokens are not attended. By default they are: released Swin weights expect it.
        roll_first: roll the grid as it is and pad what comes out, as timm does; by default padding comes first, as in
            MONAI. The two differ only where padding is needed.
        stride: tokens that share one neighbourhood, per axis, at most ``size``; by default windows are blocked.

    Raises:
        ValueError: entries missing or out of range.

    Source: Liu et al., "Swin Transformer" (ICCV 2021); Wu et al., "D-Former" (2022); Hassani et al., "Neighborhood
    Attention Transformer" (CVPR 2023) and "Generalized Neighborhood Attention" (2025), SHI-Labs/NATTEN.
    """

    size: tuple[int, ...]
    shift: tuple[int, ...]
    dilation: tuple[int, ...] = ()
    mask_padding: bool = False
    roll_first: bool = False
    stride: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.dilation:
            object.__setattr__(self, "dilation", (1,) * len(self.size))
        if not self.size or not len(self.size) == len(self.shift) == len(self.dilation):
            raise ValueError(
                f"size, shift and dilation need one entry per axis, got size={self.size}, shift={self.shift}, "
                f"dilation={self.dilation}"
            )
        if any(n < 1 for n in (*self.size, *self.dilation)):
            raise ValueError(
                f"window size and dilation must be at least 1 on every axis, got {self.size} and {self.dilation}"
            )
        if any(not 0 <= s < p for s, p in zip(self.shift, self.period, strict=True)):
            raise ValueError(
                f"shift must lie in [0, size * dilation) on every axis, got shift={self.shift} for size={self.size}"
            )
        if self.stride:
            self._check_stride()

    def _check_stride(self) -> None:
        if len(self.stride) != len(self.size) or any(
            not 1 <= s <= n for s, n in zip(self.stride, self.size, strict=False)
        ):
            raise ValueError(
                f"stride must lie in [1, size] on every axis, got stride={self.stride} for size={self.size}"
            )
        if any(self.shift) or self.mask_padding or self.roll_first:
            raise ValueError("neighbourhoods are neither shifted nor padded: leave shift, mask_padding and roll_first")

    @classmethod
    def swin(
        cls, window: int | Sequence[int], spatial_dims: int, *, shifted: bool = False, roll_first: bool = False
    ) -> Self:
        """Swin's windows; ``shifted`` rolls by half a window, rounded down."""
        size = ntuple(window, spatial_dims, "window")
        return cls(size, tuple(n // 2 if shifted else 0 for n in size), roll_first=roll_first)

    @classmethod
    def full(cls, grid: Sequence[int]) -> Self:
        """One window over the whole grid: plain self-attention."""
        return cls(tuple(grid), (0,) * len(grid))

    @classmethod
    def dformer_local(cls, group: int | Sequence[int], spatial_dims: int) -> Self:
        """D-Former's local groups: contiguous, padding masked."""
        size = ntuple(group, spatial_dims, "group")
        return cls(size, (0,) * spatial_dims, mask_padding=True)

    @classmethod
    def dformer_global(cls, group: int | Sequence[int], interval: int, grid: Sequence[int]) -> Self:
        """D-Former's global groups on one grid: every n-th token, so that each group spans the grid; padding masked.

        With P the axis padded to a multiple of ``interval``, neighbours are ``P // group`` apart and a group takes as
        many tokens as that needs to cover P: at least ``group`` of them, unless the axis is shorter.

        Raises:
            ValueError: an interval below 1.
        """
        if interval < 1:
            raise ValueError(f"the interval of global groups must be at least 1, got {interval}")
        padded = [-(-length // interval) * interval for length in grid]
        dilation = [max(1, p // n) for p, n in zip(padded, ntuple(group, len(grid), "group"), strict=True)]
        size = tuple(-(-p // d) for p, d in zip(padded, dilation, strict=True))
        return cls(size, (0,) * len(size), tuple(dilation), mask_padding=True)

    @classmethod
    def neighborhood(
        cls,
        kernel_size: int | Sequence[int],
        spatial_dims: int,
        *,
        stride: int | Sequence[int] = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Self:
        """NATTEN's neighbourhoods of ``kernel_size`` tokens: plain, strided, dilated."""
        size = ntuple(kernel_size, spatial_dims, "kernel_size")
        strides, dilations = ntuple(stride, spatial_dims, "stride"), ntuple(dilation, spatial_dims, "dilation")
        return cls(size, (0,) * spatial_dims, dilations, stride=strides)

    def fit(self, grid: Sequence[int]) -> WindowGeometry:
        """The geometry used on ``grid``: an axis no longer than an undilated window becomes one unshifted window.

        Raises:
            ValueError: a grid of another rank, or too short for dilated neighbourhoods.
        """
        if len(grid) != len(self.size):
            raise ValueError(f"a {len(self.size)}D window geometry needs as many grid axes, got grid={tuple(grid)}")
        axes = zip(grid, self.size, self.shift, self.dilation, strict=True)
        pairs = [(g, 0) if d == 1 and g <= n else (n, s) for g, n, s, d in axes]
        size = tuple(n for n, _ in pairs)
        stride = tuple(min(s, n) for s, n in zip(self.stride, size, strict=False))
        fitted = replace(self, size=size, shift=tuple(s for _, s in pairs), stride=stride)
        if stride and any(p > g for p, g in zip(fitted.period, grid, strict=True)):
            most = tuple(max(1, g // n) for g, n in zip(grid, size, strict=True))
            raise ValueError(
                f"neighbourhoods need size * dilation tokens on every axis, here {fitted.period}, got "
                f"grid={tuple(grid)}; use a dilation up to {most}"
            )
        return fitted

    @property
    def tokens(self) -> int:
        """Tokens in one window."""
        return prod(self.size)

    @property
    def period(self) -> tuple[int, ...]:
        """Extent of one window per axis, ``size * dilation``, in tokens of the grid."""
        return tuple(n * d for n, d in zip(self.size, self.dilation, strict=True))

    def padded(self, grid: Sequence[int]) -> tuple[int, ...]:
        """``grid`` rounded up to whole windows; neighbourhoods pad nothing."""
        if self.stride:
            return tuple(grid)
        return tuple(-(-g // p) * p for g, p in zip(grid, self.period, strict=True))

    def windows(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Number of windows along each axis; of blocked windows."""
        return tuple(p // n for p, n in zip(self.padded(grid), self.size, strict=True))

    def pad(self, x: Tensor) -> Tensor:
        """Zero-pad ``(B, *grid, ...)`` to whole windows at the end of each axis, rolled already if ``roll_first``."""
        dims = len(self.size)
        grid = x.shape[1 : 1 + dims]
        extra = [p - g for g, p in zip(grid, self.padded(grid), strict=True)]
        if not any(extra):
            return x
        trailing = [0, 0] * (x.dim() - 1 - dims)
        x = F.pad(self._roll(x, -1), trailing + [v for e in reversed(extra) for v in (0, e)])
        return self._roll(x, 1)

    def crop(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Inverse of :meth:`pad`: ``(B, *padded, ...)`` to ``(B, *grid, ...)``."""
        if tuple(x.shape[1 : 1 + len(self.size)]) == tuple(grid):
            return x
        return self._roll(self._roll(x, -1)[(slice(None), *[slice(g) for g in grid])], 1)

    def _roll(self, x: Tensor, sign: int) -> Tensor:
        """Roll by the shift where it happens before padding, so that the roll after padding only undoes this one."""
        if not (self.roll_first and any(self.shift)):
            return x
        return x.roll([sign * s for s in self.shift], tuple(range(1, 1 + len(self.shift))))

    def group(self, x: Tensor) -> Tensor:
        """``(B, *grid, ...)`` to ``(B * windows, tokens, ...)``; tiles, offsets and tokens each in raster order.

        Raises:
            ValueError: neighbourhoods: they overlap.
        """
        if self.stride:
            raise ValueError("neighbourhoods overlap and cannot be grouped; use windowed_attention")
        dims = len(self.size)
        axes = tuple(range(1, 1 + dims))
        x = self.pad(x)
        if any(self.shift):
            x = x.roll([-s for s in self.shift], axes)
        split = zip(x.shape[1 : 1 + dims], self.period, self.size, self.dilation, strict=True)
        rest = x.shape[1 + dims :]
        x = x.reshape(x.shape[0], *[v for length, p, n, d in split for v in (length // p, n, d)], *rest)
        tile, member, offset = (range(1 + i, 1 + 3 * dims, 3) for i in range(3))
        order = [0, *tile, *offset, *member, *range(1 + 3 * dims, x.dim())]
        return x.permute(order).reshape(-1, self.tokens, *rest)

    def ungroup(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Inverse of :meth:`group`: ``(B * windows, tokens, ...)`` back to ``(B, *grid, ...)``, padding cropped."""
        dims = len(self.size)
        padded, rest = self.padded(grid), x.shape[2:]
        tiles = [length // p for length, p in zip(padded, self.period, strict=True)]
        x = x.reshape(-1, *tiles, *self.dilation, *self.size, *rest)
        order = [0, *[v for i in range(dims) for v in (1 + i, 1 + 2 * dims + i, 1 + dims + i)]]
        x = x.permute([*order, *range(1 + 3 * dims, x.dim())]).reshape(x.shape[0], *padded, *rest)
        if any(self.shift):
            x = x.roll(list(self.shift), tuple(range(1, 1 + dims)))
        return self.crop(x, grid)

    def is_masked(self, grid: Sequence[int]) -> bool:
        """Whether any window of a fitted geometry holds tokens of more than one region."""
        return any(self.shift) or (self.mask_padding and self.padded(grid) != tuple(grid))

    def regions(self, grid: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Region of each grouped token, ``(windows, tokens)`` int64.

        Bit ``a`` is set where axis ``a`` wrapped round; masked padding is -1. Cached per (geometry, grid, device); do
        not write into it.
        """
        return _regions(self, tuple(grid), str(device))

    def relative_index(self, window: Sequence[int] | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Row of a relative-position table for each token pair of one window, ``(tokens, tokens)`` int64.

        Args:
            window: the window the table was made for (``prod(2 * w - 1)`` rows, raster order of offsets query minus
                key); default: this geometry's own size.
            device: where the result lies; cached per device, do not write into it.

        Raises:
            ValueError: a table of another rank, or for a smaller window: it lacks the larger offsets.
        """
        table = self.size if window is None else tuple(window)
        if len(table) != len(self.size) or any(w < n for w, n in zip(table, self.size, strict=True)):
            raise ValueError(f"windows of {self.size} need a table for at least that window, got one for {table}")
        return _relative_index(self.size, table, str(device))


@constant(maxsize=256)
def _regions(geometry: WindowGeometry, grid: tuple[int, ...], device: str) -> Tensor:
    region = torch.zeros(geometry.padded(grid), dtype=torch.int64, device=device)
    for axis, shift in enumerate(geometry.shift):
        wrapped = torch.arange(region.shape[axis], device=device) < shift
        region |= wrapped.long().reshape([-1 if a == axis else 1 for a in range(region.dim())]) << axis
    if geometry.mask_padding:
        real = geometry.pad(torch.ones((1, *grid), dtype=torch.int64, device=device))[0]
        region = torch.where(real == 1, region, -1)
    return geometry.group(region[None])


@constant(maxsize=256)
def _relative_index(size: tuple[int, ...], window: tuple[int, ...], device: str) -> Tensor:
    axes = [torch.arange(n, device=device) for n in size]
    points = torch.stack(torch.meshgrid(axes, indexing="ij"), -1).reshape(-1, len(size))
    offset = points[:, None] - points[None, :]
    index = torch.zeros(offset.shape[:2], dtype=torch.int64, device=device)
    for axis, n in enumerate(window):
        index = index * (2 * n - 1) + offset[..., axis] + n - 1
    return index
