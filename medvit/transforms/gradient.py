"""The second target of Uni4Eye: where the image changes, and how much."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from scipy.ndimage import generic_gradient_magnitude, sobel


class GradientMagnituded(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Length of the Sobel gradient, channel by channel, in intensity per voxel; any rank.

    Half the difference of the neighbours along an axis, smoothed 1:2:1 across it, borders repeated: the target that
    :class:`~medvit.models.uni4eye.Uni4EyeMAE` makes for itself, here for pictures and other objectives. (MONAI's
    ``SobelGradientsd`` gives the derivatives one by one.)

    Args:
        keys: images ``(C, *spatial)``; the same shape comes out, float32 (float64 stays).
        suffix: of the keys that get the maps; empty: they take the place of the images.
        allow_missing_keys: skip absent entries instead of raising KeyError.
    """

    def __init__(self, keys: KeysCollection, suffix: str = "_gradient", allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.suffix = suffix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with gradient maps."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            plain = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
            plain = plain if plain.dtype == torch.float64 else plain.float()
            lengths = [generic_gradient_magnitude(c, sobel, mode="nearest") for c in plain.cpu().numpy()]
            weight = 2 * 4 ** (plain.dim() - 2)  # of scipy's kernels, -1 0 1 and 1 2 1
            length = torch.from_numpy(np.stack(lengths)).to(plain.device) / weight
            item[f"{key}{self.suffix}"] = (
                MetaTensor(length).copy_meta_from(image) if isinstance(image, MetaTensor) else length
            )
        return item
