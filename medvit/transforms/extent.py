"""Refusing images whose field of view a network was not made for."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform

from medvit.errors import UnsuitableImage


class RequireExtentd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Raises unless the image covers an extent within limits; passes the data on unchanged.

    The extent of an axis is its number of voxels times their spacing, in mm, along the axes of the image as it is now:
    put it behind ``Orientationd`` to speak of left-right, back-front and foot-head.

    Args:
        keys: MetaTensors ``(C, *spatial)`` to check.
        low, high: least and greatest extent per axis, mm.
        advice: what to do about it, a sentence without a full stop.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        UnsuitableImage: with the extent found.
    """

    def __init__(
        self,
        keys: KeysCollection,
        low: Sequence[float],
        high: Sequence[float],
        advice: str,
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        self.low, self.high, self.advice = tuple(low), tuple(high), advice

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` as it is."""
        for key in self.key_iterator(data):
            image = data[key]
            affine = np.asarray(torch.as_tensor(image.affine), dtype=np.float64)
            spacing = np.linalg.norm(affine[:-1, :-1], axis=0)
            extent = spacing * image.shape[1:]
            if any(not a <= e <= b for a, e, b in zip(self.low, extent, self.high, strict=True)):
                limits = " × ".join(f"{a:g}-{b:g}" for a, b in zip(self.low, self.high, strict=True))
                found = " × ".join(f"{e:.4g}" for e in extent)
                raise UnsuitableImage(
                    f"the field of view must be {limits} mm for this network, "
                    f"but the image covers {found} mm; {self.advice}"
                )
        return dict(data)
