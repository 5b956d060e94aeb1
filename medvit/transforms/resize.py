"""Bringing pictures of any size to one scale."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform, Resize

_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


class ResizeLongestSided(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Resize images linearly so that the longest side has a given length; the affine follows.

    Where pixels have no size in mm, this makes what fills the picture (a retina, a face) equally large in all of them.
    Unlike MONAI's ``Resized(size_mode="longest")`` an axis of one voxel stays one: a photograph ``(C, x, y, 1)`` keeps
    its one slice. Smoothed before it is made smaller, as MONAI does it.

    Args:
        keys: images ``(C, *spatial)`` to resize, floating point.
        size: length of the longest side, voxels; other sides are rounded.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, keys: KeysCollection, size: int, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        if size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with resized images."""
        item = dict(data)
        for key in self.key_iterator(item):
            sides = tuple(int(n) for n in item[key].shape[1:])
            wanted = [n if n == 1 else max(1, round(n * self.size / max(sides))) for n in sides]
            item[key] = Resize(wanted, mode=_LINEAR[len(sides)], anti_aliasing=True)(item[key])
        return item
