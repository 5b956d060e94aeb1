"""Preprocessing that depends on whether an image is 2D or 3D."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from monai.config import KeysCollection
from monai.transforms import InvertibleTransform, MapTransform, Randomizable
from monai.utils import MAX_SEED

from medvit.errors import UnsuitableImage


class ByRankd(MapTransform, InvertibleTransform, Randomizable):  # type: ignore[misc]  # MONAI ships no types
    """Applies what is meant for the rank of an image: other steps for pictures than for volumes, in one ``Compose``.

    Args:
        keys: images ``(C, *spatial)``, whose number of spatial axes chooses; with several keys all of one rank.
        transforms: dictionary transforms by rank, applied to the whole item; the ranks may be text, as JSON's keys are.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Random transforms in it are seeded with it; ``CacheDataset`` would keep what they drew first, as it takes the whole
    for one that is not random. The inverse is that of the transform of the images' rank.

    Raises:
        UnsuitableImage: an image of a rank that no transform is for, or images of several ranks.
    """

    def __init__(
        self,
        keys: KeysCollection,
        transforms: Mapping[int | str, Callable[[Any], Any]],
        allow_missing_keys: bool = False,
    ):
        super().__init__(keys, allow_missing_keys)
        self.transforms = {int(rank): transform for rank, transform in transforms.items()}

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """What the transform of the images' rank makes of ``data``."""
        chosen = self._chosen(data)
        out: dict[Hashable, Any] = dict(data) if chosen is None else chosen(dict(data))
        return out

    def inverse(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Undo it, as far as the transform of the images' rank can be undone."""
        chosen = self._chosen(data)
        out: dict[Hashable, Any] = chosen.inverse(dict(data)) if isinstance(chosen, InvertibleTransform) else dict(data)
        return out

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> ByRankd:
        """Seed every random transform in it, each from this one's state."""
        super().set_random_state(seed, state)
        for transform in self.transforms.values():
            if isinstance(transform, Randomizable):
                transform.set_random_state(seed=int(self.R.randint(MAX_SEED, dtype="uint32")))
        return self

    def _chosen(self, data: Mapping[Hashable, Any]) -> Callable[[Any], Any] | None:
        ranks = {data[key].ndim - 1 for key in self.key_iterator(dict(data))}
        if not ranks:
            return None
        if len(ranks) > 1 or not ranks <= self.transforms.keys():
            takes, found = (" or ".join(map(str, sorted(each))) for each in (self.transforms, ranks))
            raise UnsuitableImage(
                f"images must have {takes} spatial axes, all of an item equally many, but here are {found}; give others"
            )
        return self.transforms[ranks.pop()]
