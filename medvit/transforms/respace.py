"""Another spacing on an exact lattice. (Another orientation is MONAI's ``Orientationd``: exact as it is.)"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import floor
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import InvertibleTransform, LazyTransform, MapTransform

from medvit.transforms.lattice import TIE, LatticeResample, Line, modes_of, sides

ANCHORS = ("centre", "face")
# A ratio of spacings this close to k or 1 / k is that: headers round, and 0.1 is no binary number.
WHOLE = 1e-5


class Respaced(MapTransform, InvertibleTransform, LazyTransform):  # type: ignore[misc]  # MONAI ships no types
    """Give images the spacing wanted along their own axes; oblique and sheared grids keep their directions.

    Unlike MONAI's ``Spacingd`` it can smooth before it thins out (``antialias``), keeps either the first voxel or the
    field of view exactly (``anchor``), takes whole ratios as whole, and makes no grid of coordinates.

    - ``anchor="centre"``: the centre of the first voxel stays; the last point lies within the last centre, so that
      nothing is extrapolated: ``floor((n - 1) / ratio) + 1`` points. Where the ratio of the new spacing to the old is k
      or 1 / k, the lattices share voxels, and these keep their values bit for bit (k: unless smoothed). So respacing by
      1 / k and then by k returns the very same image.
    - ``anchor="face"``: the outer face of the first voxel stays; ``round(n / ratio)`` points cover the field of view
      up to half a new voxel. By 1 / k and then by k returns the same grid, and with ``"nearest"`` the same image.

    A ratio within 1e-5 of k or 1 / k counts as that, so that the spacing can be off by as much of what was asked; the
    affine says what it is. Invertible, and lazy as :class:`~medvit.transforms.lattice.LatticeResample` is.

    Args:
        keys: MetaTensors ``(C, *spatial)``; each is treated by its own affine.
        spacing: along the array axes, in the unit of the affine (mm), or one for all; 0 leaves an axis as it is.
        mode: ``"linear"``, ``"cubic"`` or ``"nearest"`` (labels), for all keys or per key; see
            :func:`~medvit.transforms.lattice.resample`.
        anchor: see above.
        antialias: smooth where the new spacing is larger, as wide as it is: wanted where detail is lost, not where
            shared voxels must keep their values.
        allow_missing_keys: skip absent entries instead of raising KeyError.
        lazy: see MONAI's lazy resampling.

    Raises:
        ValueError: arguments that make no sense, or as many spacings as the image has no axes.
        TypeError: an image that is no MetaTensor, so without a spacing.
    """

    def __init__(
        self,
        keys: KeysCollection,
        spacing: float | Sequence[float],
        mode: str | Sequence[str] = "linear",
        anchor: str = "centre",
        antialias: bool = False,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ):
        MapTransform.__init__(self, keys, allow_missing_keys)
        LazyTransform.__init__(self, lazy=lazy)
        if anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {anchor!r}")
        self.spacing = tuple(spacing) if isinstance(spacing, Sequence) else (spacing,)
        if not all(np.isfinite(s) and s >= 0 for s in self.spacing):
            raise ValueError(f"spacing must be positive, or 0 to leave an axis as it is, got {spacing}")
        self.modes, self.anchor = modes_of(mode, self.keys), anchor
        self.resampler = LatticeResample(antialias)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """A copy of ``data`` with respaced images."""
        item = dict(data)
        for key, mode in self.key_iterator(item, self.modes):
            lines = self._lines(item[key], str(key))
            item[key] = self.resampler(item[key], lines, mode, lazy=self.lazy if lazy is None else lazy)
        return item

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` on the grids of before."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.resampler.inverse(item[key])
        return item

    def _lines(self, image: Any, key: str) -> list[Line]:
        if not isinstance(image, MetaTensor):
            raise TypeError(f"{key!r} must be a MetaTensor that knows its spacing, got {type(image).__name__}")
        shape = sides(image)
        wanted = self.spacing * len(shape) if len(self.spacing) == 1 else self.spacing
        if len(wanted) != len(shape):
            raise ValueError(f"spacing must be one number or {len(shape)} for {key!r}, got {self.spacing}")
        affine = np.asarray(torch.as_tensor(image.peek_pending_affine()).cpu(), dtype=np.float64)
        here = np.linalg.norm(affine[:-1, : len(shape)], axis=0)
        return [_line(n, _whole(s / h) if s else 1.0, self.anchor) for n, s, h in zip(shape, wanted, here, strict=True)]


def _whole(ratio: float) -> float:
    """``ratio``, or the k or 1 / k that it nearly is."""
    nearest = 1 / max(1, round(1 / ratio)) if ratio < 1 else float(round(ratio))
    return nearest if abs(ratio / nearest - 1) <= WHOLE else float(ratio)


def _line(n: int, ratio: float, anchor: str) -> Line:
    if anchor == "centre":
        return Line(0.0, ratio, floor((n - 1) / ratio + TIE) + 1)
    return Line((ratio - 1) / 2, ratio, max(1, floor(n / ratio + 0.5)))
