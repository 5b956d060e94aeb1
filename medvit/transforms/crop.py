"""Random crops resized to one size, in any rank: one for an image and its labels, or the many views of DINO."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import exp, log, prod
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, LazyTransform, MapTransform, Randomizable

from medvit.dims import ntuple
from medvit.transforms.lattice import LatticeResample, Line, common_sides, modes_of

Size = int | Sequence[int]


class RandomBox:
    """Boxes by volume and shape, the generalisation of torchvision's ``RandomResizedCrop`` to any rank.

    A box has a share of the image's volume, drawn uniformly from ``scale``, and sides in proportion to the size wanted,
    each times a jitter: these are uniform in log space, their product is 1 and no two differ by more than the factor
    ``aspect``. So up to the jitter nothing is distorted. A side that would exceed the image is cut to it, and the
    others grow instead: the volume stays. Sides are rounded to voxels; every place in the image is as likely. Where the
    box fits, in 2D, its law is torchvision's with ``ratio=(1 / aspect, aspect)``.

    Args:
        size: voxels per axis of what the box will be resized to, or one number for all.
        scale: least and greatest share of the volume, in (0, 1].
        aspect: at least 1.

    Raises:
        ValueError: anything else.
    """

    def __init__(self, size: Size, scale: Sequence[float], aspect: float):
        self.size, self.scale, self.aspect = size, (float(scale[0]), float(scale[-1])), float(aspect)
        ntuple(size, 1 if isinstance(size, int) else len(size), "size")
        if len(scale) != 2 or not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale must be two shares of the volume in (0, 1], the lesser first, got {scale}")
        if not self.aspect >= 1:
            raise ValueError(f"aspect must be at least 1, the factor between two sides of the box, got {aspect}")

    def draw(self, random: np.random.RandomState, shape: Sequence[int]) -> list[Line]:
        """The points of a new box in an image of ``shape``: its voxels' faces become those of the resized box.

        Raises:
            ValueError: a size for another rank.
        """
        size = ntuple(self.size, len(shape), "size")
        share = random.uniform(*self.scale)
        shares = [n * exp(j) for n, j in zip(size, _jitter(random, len(shape), log(self.aspect)), strict=True)]
        lines = []
        for side, n, points in zip(_fitted(shares, shape, share * prod(shape)), shape, size, strict=True):
            voxels = min(max(round(side), 1), n)
            step = voxels / points
            lines.append(Line(random.randint(0, n - voxels + 1) + (step - 1) / 2, step, points))
        return lines


def _jitter(random: np.random.RandomState, rank: int, width: float) -> np.ndarray:
    """Uniform among the vectors within ``width / 2`` of 0 on every axis whose sum is 0."""
    while True:
        first = random.uniform(-width / 2, width / 2, rank - 1)
        if abs(first.sum()) <= width / 2:
            return np.append(first, -first.sum())


def _fitted(proportions: Sequence[float], limits: Sequence[int], volume: float) -> list[float]:
    """Sides of a box of ``volume``, in ``proportions`` as far as the limits allow."""
    fitted = [0.0] * len(limits)
    free = list(range(len(limits)))
    while free:
        unit = (volume / prod(proportions[axis] for axis in free)) ** (1 / len(free))
        full = [axis for axis in free if proportions[axis] * unit >= limits[axis]]
        for axis in full or free:
            fitted[axis] = float(limits[axis]) if full else proportions[axis] * unit
            volume /= fitted[axis]
        free = [axis for axis in free if axis not in full] if full else []
    return fitted


class RandResizedCropd(Randomizable, MapTransform, InvertibleTransform, LazyTransform):  # type: ignore[misc]
    """Crop a random box, see :class:`RandomBox`, and resize it; all keys get the same one.

    At the faces of the box the kernels draw on the voxels beyond it, where torchvision's crop has forgotten them.
    Invertible, and lazy as :class:`~medvit.transforms.lattice.LatticeResample` is.

    Args:
        keys: images ``(C, *spatial)`` of one shape.
        size: voxels per axis of the result, or one number for all.
        scale, aspect: see :class:`RandomBox`; the defaults are torchvision's.
        mode: ``"linear"``, ``"cubic"`` or ``"nearest"`` (labels), for all keys or per key.
        antialias: smooth where the box is made smaller.
        allow_missing_keys: skip absent entries instead of raising KeyError.
        lazy: see MONAI's lazy resampling.

    Raises:
        ValueError: arguments that make no sense, or a size for another rank.
        SpaceMismatch: images of several shapes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        size: Size,
        scale: Sequence[float] = (0.08, 1.0),
        aspect: float = 4 / 3,
        mode: str | Sequence[str] = "linear",
        antialias: bool = True,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ):
        MapTransform.__init__(self, keys, allow_missing_keys)
        LazyTransform.__init__(self, lazy=lazy)
        self.box, self.modes = RandomBox(size, scale, aspect), modes_of(mode, self.keys)
        self.resampler = LatticeResample(antialias)

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """A copy of ``data`` with the box in place of each image."""
        item = dict(data)
        present = list(self.key_iterator(item, self.modes))
        if present:
            lines = self.box.draw(self.R, common_sides(item, [key for key, _ in present]))
        for key, mode in present:
            item[key] = self.resampler(item[key], lines, mode, lazy=self.lazy if lazy is None else lazy)
        return item

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` on the grids of before, 0 outside of the box."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = self.resampler.inverse(item[key])
        return item


class MultiCropd(Randomizable, MapTransform):  # type: ignore[misc]
    """The views of DINO: a few large crops and many small ones of each image, under keys of their own.

    ``image`` gives ``image_global_0``, ``image_global_1``, ``image_local_0``, ...: tensors with affines of their own,
    which any dictionary transform can go on with, one view unlike the other. ``image`` itself stays. All keys get the
    same boxes. Neither lazy (what is pending is applied first, once for all views) nor invertible.

    Args:
        keys: images ``(C, *spatial)`` of one shape.
        global_size, local_size: voxels per axis of the views, or one number for all.
        n_global, n_local: how many.
        global_scale, local_scale, aspect: see :class:`RandomBox`; the defaults are DINOv2's.
        mode: ``"linear"``, ``"cubic"`` or ``"nearest"`` (labels), for all keys or per key.
        antialias: smooth where the box is made smaller.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: arguments that make no sense, or a size for another rank.
        SpaceMismatch: images of several shapes.
    """

    def __init__(
        self,
        keys: KeysCollection,
        global_size: Size,
        local_size: Size,
        n_global: int = 2,
        n_local: int = 8,
        global_scale: Sequence[float] = (0.32, 1.0),
        local_scale: Sequence[float] = (0.05, 0.32),
        aspect: float = 4 / 3,
        mode: str | Sequence[str] = "cubic",
        antialias: bool = True,
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        if n_global < 1 or n_local < 0:
            raise ValueError(f"at least one global view and no less than 0 local ones, got {n_global} and {n_local}")
        large, small = RandomBox(global_size, global_scale, aspect), RandomBox(local_size, local_scale, aspect)
        self.views = {f"global_{i}": large for i in range(n_global)} | {f"local_{i}": small for i in range(n_local)}
        self.modes = modes_of(mode, self.keys)
        self.resampler = LatticeResample(antialias)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with the views added."""
        item = dict(data)
        present = list(self.key_iterator(item, self.modes))
        for name, box in self.views.items() if present else ():
            lines = box.draw(self.R, common_sides(item, [key for key, _ in present]))
            for key, mode in present:
                item[f"{key}_{name}"] = self.resampler(item[key], lines, mode)
        return item
