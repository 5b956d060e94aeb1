"""Which patches masked modelling hides, drawn where the data are loaded."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.transforms import MapTransform, Randomizable

from medvit.dims import ntuple


class RandPatchMaskd(Randomizable, MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Draw for each image a mask over its patches; MONAI's ``RandCoarseDropoutd`` hides boxes that know no patches.

    Of N patches ``N - int(N * (1 - ratio))`` are hidden, the number of :func:`~medvit.layers.masking.random_masking`,
    whose noise the mask can be: ``network(image, ratio, noise=mask.flatten(1))`` hides just these. With a ratio drawn
    per image their numbers differ, which token dropping cannot take and mask tokens can.

    Args:
        keys: images ``(C, *spatial)`` whose sides are multiples of the patch.
        patch_size: voxels per axis, or one number for all.
        ratio: fraction hidden, in [0, 1); or least and greatest, drawn uniformly per image.
        block: patches per axis that are hidden together, blocks starting at the image's first patch; the last one
            drawn may be hidden in part, so that the number is right.
        suffix: of the keys that get the masks: float32 ``(*grid)``, 1 where hidden.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: a ratio out of range, or a patch that does not divide the image.
    """

    def __init__(
        self,
        keys: KeysCollection,
        patch_size: int | Sequence[int],
        ratio: float | Sequence[float] = 0.75,
        block: int | Sequence[int] = 1,
        suffix: str = "_mask",
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        self.ratio = tuple(ratio) if isinstance(ratio, Sequence) else (ratio, ratio)
        if len(self.ratio) != 2 or not 0 <= self.ratio[0] <= self.ratio[1] < 1:
            raise ValueError(f"ratio must be a fraction in [0, 1), or two of them, the lesser first, got {ratio}")
        self.patch_size, self.block, self.suffix = patch_size, block, suffix

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with the masks added."""
        item = dict(data)
        for key in self.key_iterator(item):
            shape = tuple(int(n) for n in item[key].shape[1:])
            patch = ntuple(self.patch_size, len(shape), "patch_size")
            if any(n % p for n, p in zip(shape, patch, strict=True)):
                raise ValueError(f"the sides of {key!r} must be multiples of the patch {patch}, got {shape}")
            grid = tuple(n // p for n, p in zip(shape, patch, strict=True))
            item[f"{key}{self.suffix}"] = torch.from_numpy(self._mask(grid))
        return item

    def _mask(self, grid: tuple[int, ...]) -> np.ndarray:
        ratio = self.R.uniform(*self.ratio) if self.ratio[0] < self.ratio[1] else self.ratio[0]
        block = ntuple(self.block, len(grid), "block")
        of_block = self.R.random_sample([-(-n // b) for n, b in zip(grid, block, strict=True)])
        for axis, (n, b) in enumerate(zip(grid, block, strict=True)):
            of_block = of_block.repeat(b, axis).take(range(n), axis)
        count = prod(grid)
        order = np.lexsort((self.R.random_sample(count), of_block.reshape(-1)))
        mask = np.zeros(count, dtype=np.float32)
        mask[order[int(count * (1 - ratio)) :]] = 1
        return mask.reshape(grid)
