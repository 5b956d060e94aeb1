"""Grey values of radiographs from any reader to [0, 1]: bone bright, whatever frame is burnt in."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform

from medvit.errors import UnsuitableImage

# where MONAI's PydicomReader (prune_metadata=False) and ITKReader put it
_PHOTOMETRIC = ("00280004", "0028|0004", "PhotometricInterpretation")
# An outer line of pixels is frame if all but OUTLIERS of its values differ by less than this share of what those of the
# image do; percentages at each end, so that markers and dead pixels decide neither.
FLAT, OUTLIERS = 0.01, 5


class RadiographRanged(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Grey values to [0, 1] between two percentiles of the picture within its frame, inverted where white is 0.

    Outer lines of pixels without content (padding, a shutter, a black or white frame; of any width) take no part in the
    percentiles, unlike in MONAI's ``ScaleIntensityRangePercentilesd``; beyond the percentiles values are clipped, which
    small markers and dead pixels are. A marker that covers more than the percentiles leave out decides the range, and
    one over more than a twentieth of a frame's line makes that line part of the picture. Where both percentiles agree,
    the least and the greatest value take their place.

    VOI LUTs and windows are the reader's: :class:`~medvit.data.radiograph.RadiographReader` applies them, and inverts.
    An image that it read is not inverted again.

    Args:
        keys: images ``(C, *spatial)``, all channels alike; float32 comes out.
        lower, upper: percentiles, 0 to 100.
        invert: ``"meta"``: where the meta data say MONOCHROME1, as MONAI's DICOM readers pass it on (PydicomReader with
            ``prune_metadata=False``); or True or False.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: percentiles or ``invert`` that make no sense.
        UnsuitableImage: an image that is blank, or not finite.
    """

    def __init__(
        self,
        keys: KeysCollection,
        lower: float = 0.5,
        upper: float = 99.5,
        invert: bool | str = "meta",
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        if not 0 <= lower < upper <= 100:
            raise ValueError(f"percentiles must rise within 0 to 100, got lower={lower} and upper={upper}")
        if invert not in (True, False, "meta"):
            raise ValueError(f"invert must be True, False or 'meta', got {invert!r}")
        self.lower, self.upper, self.invert = lower, upper, invert

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with images in [0, 1]."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            meta = image.meta if isinstance(image, MetaTensor) else {}
            values = np.asarray(torch.as_tensor(image).detach().cpu(), dtype=np.float64)
            low, high = self._range(values, str(key))
            shown = np.clip((values - low) / (high - low), 0, 1)
            if _is_inverse(meta) if self.invert == "meta" else self.invert:
                shown = 1 - shown
            plain = torch.as_tensor(shown, dtype=torch.float32, device=torch.as_tensor(image).device)
            item[key] = MetaTensor(plain).copy_meta_from(image) if isinstance(image, MetaTensor) else plain
        return item

    def _range(self, values: np.ndarray, key: str) -> tuple[float, float]:
        if not np.isfinite(values).all() or values.min() == values.max():
            raise UnsuitableImage(f"{key!r} must show something, but its values are blank or not finite")
        picture = values[within_frame(values)]
        low, high = np.percentile(picture, (self.lower, self.upper))
        if low == high:
            low, high = picture.min(), picture.max()
        return float(low), float(high)


def within_frame(values: np.ndarray) -> tuple[slice, ...]:
    """The box of an image ``(C, *spatial)`` without its outer lines (planes, in 3D) of nearly one value."""
    flat = FLAT * _spread(values, None)
    box = [slice(None)] * values.ndim
    for axis in range(1, values.ndim):
        inner = values[tuple(box)]
        others = tuple(a for a in range(values.ndim) if a != axis)
        content = np.flatnonzero(_spread(inner, others) > flat)
        if len(content):  # an image that changes along one axis only has no lines of content across it
            box[axis] = slice(int(content[0]), int(content[-1]) + 1)
    return tuple(box)


def _spread(values: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    low, high = np.percentile(values, (OUTLIERS, 100 - OUTLIERS), axis=axes)
    return np.asarray(high - low)


def _is_inverse(meta: Mapping[str, Any]) -> bool:
    if "medvit_contrast" in meta:  # RadiographReader's: as displayed
        return False
    values = [meta[name] for name in _PHOTOMETRIC if name in meta]
    if not values:
        return False
    value = values[0].get("Value", [""])[0] if isinstance(values[0], Mapping) else values[0]
    return str(value).strip().upper() == "MONOCHROME1"
