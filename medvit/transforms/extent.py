"""Refusing images that a network was not made for: another field of view, other channels."""

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
    put it behind ``Orientationd`` to speak of left-right, back-front and foot-head. Of a photograph it is in pixels.

    Args:
        keys: MetaTensors ``(C, *spatial)`` to check.
        low, high: least and greatest extent per axis, mm or pixels.
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
                found, unit = " × ".join(f"{e:.4g}" for e in extent), image.meta.get("medvit_unit", "mm")
                raise UnsuitableImage(
                    f"the field of view must be {limits} {unit} for this network, "
                    f"but the image covers {found} {unit}; {self.advice}"
                )
        return dict(data)


class RequireChannelsd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Raises unless the image has the channels that a network takes; passes the data on unchanged.

    Args:
        keys: images ``(C, *spatial)`` to check.
        channels: how many there must be.
        advice: what to do about it, a sentence without a full stop.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        UnsuitableImage: with the number found.
    """

    def __init__(self, keys: KeysCollection, channels: int, advice: str, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.channels, self.advice = channels, advice

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """``data`` as it is."""
        for key in self.key_iterator(data):
            found = len(data[key])
            if found != self.channels:
                raise UnsuitableImage(
                    f"this network takes images of {self.channels} channels, but this one has {found}; {self.advice}"
                )
        return dict(data)
