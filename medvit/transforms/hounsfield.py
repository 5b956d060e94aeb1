"""CT through several windows at once, one channel each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform


class HounsfieldWindowsd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """CT in Hounsfield units to one channel per window, each clipped to [0, 1].

    A window of centre c and width w is linear from c - w / 2 (0) to c + w / 2 (1): DICOM's LINEAR_EXACT. What is not a
    number stays so. One transform for what takes MONAI a copy, a ``ScaleIntensityRanged`` and a key per window.

    Args:
        keys: images ``(1, *spatial)`` in HU; float32 ``(len(windows), *spatial)`` comes out.
        windows: pairs of centre and width in HU, one per channel, e.g. lung ``(-600, 1500)``, soft tissue
            ``(40, 400)``, bone ``(400, 1800)``.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: no windows, widths that are not positive, or an image of several channels.
    """

    def __init__(self, keys: KeysCollection, windows: Sequence[tuple[float, float]], allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        if not windows or any(len(window) != 2 or not window[1] > 0 for window in windows):
            raise ValueError(f"windows must be pairs (centre, width > 0) in HU, got {windows}; use [(40, 400)]")
        self.windows = [(float(centre), float(width)) for centre, width in windows]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with channels in place of HU."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            plain = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
            if plain.shape[0] != 1:
                raise ValueError(f"{key!r} must have one channel, HU, got shape {tuple(plain.shape)}")
            low, width = (
                torch.tensor(values, device=plain.device).view(-1, *[1] * (plain.dim() - 1))
                for values in ([c - w / 2 for c, w in self.windows], [w for _, w in self.windows])
            )
            shown = ((plain.float() - low) / width).clamp(0, 1)
            item[key] = MetaTensor(shown).copy_meta_from(image) if isinstance(image, MetaTensor) else shown
        return item
