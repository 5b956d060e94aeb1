"""Which tokens of a grid attend to which, as data: no tensors are stored, every rank from 1D up has one code path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    """Non-overlapping windows over a token grid, optionally shifted cyclically (Swin).

    The grid is zero-padded at the end of each axis to a multiple of ``size``, rolled by ``-shift``, cut into windows.
    Padding tokens take part in attention: released Swin weights expect it. Two tokens attend to each other iff they lie
    in the same window and in the same :meth:`regions`, i.e. on the same side of the cyclic seam.

    Args:
        size: window edge per axis, in tokens.
        shift: roll per axis, ``0 <= shift < size``.

    Source: Liu et al., "Swin Transformer" (ICCV 2021); padding before the roll as in MONAI's ``SwinTransformer``.
    """

    size: tuple[int, ...]
    shift: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.size) != len(self.shift) or not self.size:
            raise ValueError(f"size and shift need one entry per axis, got size={self.size}, shift={self.shift}")
        if any(n < 1 for n in self.size):
            raise ValueError(f"window size must be at least 1 on every axis, got {self.size}")
        if any(not 0 <= s < n for s, n in zip(self.shift, self.size, strict=True)):
            raise ValueError(f"shift must lie in [0, size) on every axis, got shift={self.shift} for size={self.size}")

    @classmethod
    def swin(cls, window: int | Sequence[int], spatial_dims: int, *, shifted: bool = False) -> Self:
        """Swin's windows; ``shifted`` rolls by half a window, rounded down."""
        size = ntuple(window, spatial_dims, "window")
        return cls(size, tuple(n // 2 if shifted else 0 for n in size))

    @classmethod
    def full(cls, grid: Sequence[int]) -> Self:
        """One window over the whole grid: plain self-attention."""
        return cls(tuple(grid), (0,) * len(grid))

    def fit(self, grid: Sequence[int]) -> WindowGeometry:
        """The geometry used on ``grid``: an axis no longer than the window becomes one unshifted window.

        Raises:
            ValueError: a grid of another rank.
        """
        if len(grid) != len(self.size):
            raise ValueError(f"a {len(self.size)}D window geometry needs as many grid axes, got grid={tuple(grid)}")
        pairs = [(g, 0) if g <= n else (n, s) for g, n, s in zip(grid, self.size, self.shift, strict=True)]
        return WindowGeometry(tuple(n for n, _ in pairs), tuple(s for _, s in pairs))

    @property
    def tokens(self) -> int:
        """Tokens in one window."""
        return prod(self.size)

    def padded(self, grid: Sequence[int]) -> tuple[int, ...]:
        """``grid`` rounded up to whole windows."""
        return tuple(-(-g // n) * n for g, n in zip(grid, self.size, strict=True))

    def windows(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Number of windows along each axis."""
        return tuple(-(-g // n) for g, n in zip(grid, self.size, strict=True))

    def pad(self, x: Tensor) -> Tensor:
        """Zero-pad ``(B, *grid, ...)`` at the end of each grid axis to whole windows."""
        dims = len(self.size)
        grid = x.shape[1 : 1 + dims]
        extra = [p - g for g, p in zip(grid, self.padded(grid), strict=True)]
        if not any(extra):
            return x
        trailing = [0, 0] * (x.dim() - 1 - dims)
        return F.pad(x, trailing + [v for e in reversed(extra) for v in (0, e)])

    def group(self, x: Tensor) -> Tensor:
        """``(B, *grid, ...)`` to ``(B * windows, tokens, ...)``; windows and tokens in raster order."""
        dims = len(self.size)
        axes = tuple(range(1, 1 + dims))
        x = self.pad(x)
        if any(self.shift):
            x = x.roll([-s for s in self.shift], axes)
        counts = self.windows(x.shape[1 : 1 + dims])
        rest = x.shape[1 + dims :]
        x = x.reshape(x.shape[0], *[v for pair in zip(counts, self.size, strict=True) for v in pair], *rest)
        order = [0, *range(1, 1 + 2 * dims, 2), *range(2, 2 + 2 * dims, 2), *range(1 + 2 * dims, x.dim())]
        return x.permute(order).reshape(-1, self.tokens, *rest)

    def ungroup(self, x: Tensor, grid: Sequence[int]) -> Tensor:
        """Inverse of :meth:`group`: ``(B * windows, tokens, ...)`` back to ``(B, *grid, ...)``, padding cropped."""
        dims = len(self.size)
        counts, rest = self.windows(grid), x.shape[2:]
        x = x.reshape(-1, *counts, *self.size, *rest)
        order = [0, *[v for i in range(dims) for v in (1 + i, 1 + dims + i)], *range(1 + 2 * dims, x.dim())]
        x = x.permute(order).reshape(x.shape[0], *self.padded(grid), *rest)
        if any(self.shift):
            x = x.roll(list(self.shift), tuple(range(1, 1 + dims)))
        return x[(slice(None), *[slice(g) for g in grid])]

    def regions(self, grid: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Region of each grouped token, ``(windows, tokens)`` int64: bit ``a`` is set where axis ``a`` wrapped round.

        Cached per (geometry, grid, device); do not write into it.
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
