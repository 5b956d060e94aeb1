"""Images on other lattices along their own axes: separable resampling of any rank, antialiased, with honest affines.

Every crop-and-resize and every change of spacing is one evenly spaced line of points per axis. The weights are Pillow's
(a kernel as wide as the step, normalised over the voxels there are), which torch has for 2D only and MONAI not at all.
A point that falls on a voxel takes its value bit for bit, unless it is smoothed.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, LazyTransform
from monai.utils.enums import LazyAttr, TraceKeys
from torch import Tensor

from medvit.errors import SpaceMismatch

# half width of the kernel, in voxels
SUPPORT = {"nearest": 0.5, "linear": 1.0, "cubic": 2.0}
# the nearest relatives among the modes of MONAI's lazy resampling; 3 is a cubic spline
_LAZY_MODES = {"nearest": "nearest", "linear": "bilinear", "cubic": 3}
# In voxels: above the rounding of start + step * j. A point this close to a voxel is on it, and one this close to the
# border of two voxels belongs to the one of higher index.
TIE = 1e-6


class Line(NamedTuple):
    """Points of one axis, ``start + step * j`` for ``j = 0 ... size - 1``, in voxel indices of the source."""

    start: float
    step: float
    size: int

    def inverse(self, size: int) -> Line:
        """Where the first ``size`` voxels of the source lie, in indices of these points."""
        return Line(-self.start / self.step, 1 / self.step, size)


def resample(values: Tensor, lines: Sequence[Line], mode: str, *, antialias: bool, outside: bool = True) -> Tensor:
    """Values at the points of a lattice.

    Args:
        values: ``(C, *spatial)``.
        lines: one per spatial axis, steps greater than 0.
        mode: ``"nearest"`` (for labels; the dtype stays), ``"linear"`` or ``"cubic"`` (Keys, a = -0.5; overshoots at
            edges), which compute in float32, or in float64 where the values are.
        antialias: where the step exceeds 1, the linear or cubic kernel is widened by it.
        outside: points beyond the faces of the image take the value there; False: 0.

    Returns:
        ``(C, *(line.size for line in lines))``.
    """
    if mode != "nearest" and values.dtype != torch.float64:
        values = values.float()
    sizes = values.shape[1:]
    taps = [_taps(line, n, mode, antialias) for line, n in zip(lines, sizes, strict=True)]
    for axis, (index, _) in enumerate(taps):  # leave out what no point needs
        low, high = int(index.min()), int(index.max())
        values = values.narrow(axis + 1, low, high - low + 1)
        index -= low
    # the axis that shrinks most goes first: less to do for the others
    for axis in sorted(range(len(lines)), key=lambda a: lines[a].size / values.shape[a + 1]):
        values = _along(values, axis + 1, *taps[axis])
    if not outside:
        for axis, (line, n) in enumerate(zip(lines, sizes, strict=True)):
            points = _points(line)
            inside = (points >= -0.5 - TIE) & (points <= n - 0.5 + TIE)
            values = values * _beside(inside, values, axis + 1)
    return values.contiguous()


def _points(line: Line) -> np.ndarray:
    points = line.start + line.step * np.arange(line.size, dtype=np.float64)
    whole = np.rint(points)
    return np.asarray(np.where(np.abs(points - whole) <= TIE, whole, points))


def _taps(line: Line, size: int, mode: str, antialias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Per point the voxels it draws on and their weights, ``(size, taps)`` int64 and float64; weights sum to 1."""
    points = np.clip(_points(line), -0.5, size - 0.5)
    if mode == "nearest":
        index = np.clip(np.floor(points + (0.5 + TIE)).astype(np.int64), 0, size - 1)[:, None]
        return index, np.ones(index.shape)
    width = max(1.0, line.step) if antialias else 1.0
    reach = SUPPORT[mode] * width
    index = np.ceil(points - reach).astype(np.int64)[:, None] + np.arange(int(2 * reach) + 1)
    weight = _kernel(np.abs(index - points[:, None]) / width, mode)
    weight[(index < 0) | (index >= size)] = 0
    weight /= weight.sum(1, keepdims=True)
    index = np.where(weight == 0, np.clip(np.rint(points), 0, size - 1).astype(np.int64)[:, None], index)
    used = weight.any(0)
    return index[:, used], weight[:, used]


def _kernel(distance: np.ndarray, mode: str) -> np.ndarray:
    if mode == "linear":
        return np.asarray(np.maximum(0.0, 1 - distance))
    d = distance
    near, far = (1.5 * d - 2.5) * d * d + 1, ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.asarray(np.where(d < 1, near, np.where(d < 2, far, 0.0)))


def _along(values: Tensor, axis: int, index: np.ndarray, weight: np.ndarray) -> Tensor:
    total = None
    for column, share in zip(index.T, weight.T, strict=True):
        part = values.index_select(axis, torch.as_tensor(column, device=values.device))
        if (share != 1).any():
            part = part * _beside(share, values, axis)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _beside(numbers: np.ndarray, values: Tensor, axis: int) -> Tensor:
    """``numbers``, one per index of ``axis``, in the dtype of ``values`` and so that they multiply it."""
    shape = [1] * values.dim()
    shape[axis] = -1
    return torch.as_tensor(numbers, device=values.device).to(values.dtype).view(shape)


class LatticeResample(InvertibleTransform, LazyTransform):  # type: ignore[misc]  # MONAI ships no types
    """:func:`resample` for images with meta data: what the transforms of this package that resample are made of.

    A MetaTensor's affine follows and the step is noted, so that :meth:`inverse` can undo it: onto the grid of before,
    without smoothing, and with 0 where nothing was kept. Asked to be lazy, it leaves the interpolation to MONAI, with
    the affine and shape of the eager result but without antialiasing, and "cubic" as a spline; "nearest" then comes out
    float32, and takes the other of two voxels where a point lies halfway between them. Plain tensors come out as plain
    tensors, at once.

    Args:
        antialias: see :func:`resample`.
        lazy: see MONAI's lazy resampling.
    """

    def __init__(self, antialias: bool, lazy: bool = False):
        LazyTransform.__init__(self, lazy=lazy)
        self.antialias = antialias

    def __call__(self, img: Tensor, lines: Sequence[Line], mode: str, lazy: bool | None = None) -> Tensor:
        """``img`` ``(C, *spatial)`` at ``lines``."""
        if not isinstance(img, MetaTensor):
            return resample(torch.as_tensor(img), lines, mode, antialias=self.antialias)
        info = self.get_transform_info()
        extra = {"lines": [list(line) for line in lines], "mode": mode}
        if self.lazy if lazy is None else lazy:
            info |= {LazyAttr.INTERP_MODE: _LAZY_MODES[mode], LazyAttr.PADDING_MODE: "border"}
            return self._tracked(img, img.as_tensor(), lines, info, extra, lazy=True)
        values = resample(img.as_tensor(), lines, mode, antialias=self.antialias)
        return self._tracked(img, values, lines, info, extra)

    def inverse(self, img: MetaTensor) -> Tensor:
        """The last step of this object undone."""
        done = self.pop_transform(img)
        extra, size = done[TraceKeys.EXTRA_INFO], done[TraceKeys.ORIG_SIZE]
        lines = [Line(*line).inverse(int(n)) for line, n in zip(extra["lines"], size, strict=True)]
        values = resample(img.as_tensor(), lines, extra["mode"], antialias=False, outside=False)
        with self.trace_transform(False):
            return self._tracked(img, values, lines, self.get_transform_info(), {})

    def _tracked(
        self,
        img: MetaTensor,
        values: Tensor,
        lines: Sequence[Line],
        info: dict[str, Any],
        extra: dict[str, Any],
        lazy: bool = False,
    ) -> Tensor:
        """``values`` with the meta data of ``img``, the affine of ``lines``, and a note of what was done."""
        shape = [line.size for line in lines]
        meta = self.track_transform_meta(
            img, sp_size=shape, affine=_affine(lines), extra_info=extra, transform_info=info, lazy=lazy
        )
        out: Tensor = MetaTensor(values).copy_meta_from(meta)
        return out


def _affine(lines: Sequence[Line]) -> Tensor:
    """Indices of points to voxel indices of the source, float64."""
    matrix = np.diag([*(line.step for line in lines), 1.0])
    matrix[:-1, -1] = [line.start for line in lines]
    return torch.from_numpy(matrix)


def sides(img: Tensor) -> tuple[int, ...]:
    """Spatial shape of ``(C, *spatial)``, after what is pending."""
    shape = img.peek_pending_shape() if isinstance(img, MetaTensor) else img.shape[1:]
    return tuple(int(n) for n in shape)


def common_sides(item: Mapping[Hashable, Any], keys: Sequence[Hashable]) -> tuple[int, ...]:
    """The spatial shape that the images of all ``keys`` have.

    Raises:
        SpaceMismatch: they have several.
    """
    shapes = {key: sides(item[key]) for key in keys}
    if len(set(shapes.values())) != 1:
        raise SpaceMismatch(f"images that are cropped together must share one grid, got the shapes {shapes}")
    return shapes[keys[0]]


def modes_of(mode: str | Sequence[str], keys: Sequence[Hashable]) -> tuple[str, ...]:
    """One mode per key.

    Raises:
        ValueError: another number of modes, or one that :func:`resample` does not know.
    """
    modes = (mode,) * len(keys) if isinstance(mode, str) else tuple(mode)
    if len(modes) != len(keys) or not set(modes) <= set(SUPPORT):
        raise ValueError(f"mode must be one of {', '.join(SUPPORT)}, or one of them per key of {keys}, got {mode!r}")
    return modes
