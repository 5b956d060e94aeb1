"""Cropping to what is not background."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import Crop, Cropd
from monai.transforms.utils import generate_spatial_bounding_box
from torch import Tensor

from medvit.errors import UnsuitableImage
from medvit.transforms.lattice import common_sides

BINS = 256


class ForegroundCropd(Cropd):  # type: ignore[misc]  # MONAI ships no types
    """Crop images to the box of the voxels above a threshold, and a margin.

    What MONAI's ``CropForegroundd`` lacks: a margin in mm, which is the same in every scan, and Otsu's threshold. The
    crop is MONAI's own, so it is invertible (0 outside) and can be lazy; being guided by values, it has what is pending
    applied first.

    Args:
        keys: images ``(C, *spatial)`` to crop, on the grid of the source.
        source_key: the image that decides, any of its channels.
        threshold: voxels above it are foreground; ``"otsu"``: Otsu's, of the source.
        margin: beyond the outermost foreground voxel, in the unit of the affine (mm) along the array axes, or one for
            all; rounded up to voxels, and ends at the image.
        allow_missing_keys: skip absent entries instead of raising KeyError.
        lazy: see MONAI's lazy resampling.

    Raises:
        ValueError: a threshold or margin that makes no sense.
        SpaceMismatch: images of several shapes.
        UnsuitableImage: nothing is above the threshold.
    """

    def __init__(
        self,
        keys: KeysCollection,
        source_key: str,
        threshold: float | str = 0.0,
        margin: float | Sequence[float] = 0.0,
        allow_missing_keys: bool = False,
        lazy: bool = False,
    ):
        super().__init__(keys, cropper=Crop(lazy=lazy), allow_missing_keys=allow_missing_keys, lazy=lazy)
        if isinstance(threshold, str) and threshold != "otsu":
            raise ValueError(f"threshold must be a number or 'otsu', got {threshold!r}")
        self.margin = tuple(margin) if isinstance(margin, Sequence) else (margin,)
        if not all(m >= 0 for m in self.margin):
            raise ValueError(f"margin must be no less than 0, got {margin}")
        self.source_key, self.threshold = source_key, threshold

    @property
    def requires_current_data(self) -> bool:
        """True: the box depends on values."""
        return True

    def __call__(self, data: Mapping[Hashable, Any], lazy: bool | None = None) -> dict[Hashable, Any]:
        """A copy of ``data`` with cropped images."""
        item = dict(data)
        keys = list(self.key_iterator(item))
        common_sides(item, [self.source_key, *keys])
        start, end = self._box(item[self.source_key])
        slices = self.cropper.compute_slices(roi_start=start, roi_end=end)
        for key in keys:
            item[key] = self.cropper(item[key], slices=slices, lazy=self.lazy if lazy is None else lazy)
        return item

    def _box(self, source: Tensor) -> tuple[list[int], list[int]]:
        rank = source.dim() - 1
        if len(self.margin) not in (1, rank):
            raise ValueError(f"margin must be one number or {rank} for {self.source_key!r}, got {self.margin}")
        spacing = np.ones(rank)
        if isinstance(source, MetaTensor):
            affine = np.asarray(torch.as_tensor(source.affine).cpu(), dtype=np.float64)
            spacing = np.linalg.norm(affine[:-1, :rank], axis=0)
        plain = source.as_tensor() if isinstance(source, MetaTensor) else torch.as_tensor(source)
        if plain.dtype in (torch.uint16, torch.uint32, torch.uint64):  # which torch cannot compare
            plain = plain.long()
        threshold = otsu(plain) if isinstance(self.threshold, str) else self.threshold
        if not (plain > threshold).any():
            raise UnsuitableImage(f"{self.source_key!r} must have foreground, but no voxel is above {threshold:g}")
        margin = [ceil(m / s - 1e-6) for m, s in zip(self.margin * (rank // len(self.margin)), spacing, strict=True)]
        start, end = generate_spatial_bounding_box(plain, lambda x: x > threshold, margin=margin, allow_smaller=True)
        return [int(n) for n in start], [int(n) for n in end]


def otsu(values: Tensor) -> float:
    """The threshold that parts values into two classes of greatest variance between them, by 256 bins of their range.

    Otsu, "A threshold selection method from gray-level histograms" (1979). The upper edge of the lower class's last bin
    (scikit-image gives that bin's centre, which cuts it in two); infinite if there are not two values. Values that are
    not finite are left out.
    """
    array: np.ndarray = np.asarray(values.detach().cpu(), dtype=np.float64).reshape(-1)
    array = array[np.isfinite(array)]
    if not array.size or array.min() == array.max():
        return float("inf")
    counts, edges = np.histogram(array, BINS)
    centres = (edges[:-1] + edges[1:]) / 2
    lower, moment = np.cumsum(counts), np.cumsum(counts * centres)
    upper = lower[-1] - lower[:-1]
    difference = moment[:-1] / lower[:-1] - (moment[-1] - moment[:-1]) / upper
    return float(edges[1 + np.argmax(lower[:-1] * upper * difference**2)])
