"""Preprocessing that depends on whether an image is 2D or 3D."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

from monai.config import KeysCollection
from monai.transforms import MapTransform

from medvit.errors import UnsuitableImage


class ByRankd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Applies what is meant for the rank of an image: other steps for pictures than for volumes, in one ``Compose``.

    Args:
        keys: images ``(C, *spatial)``, whose number of spatial axes chooses; with several keys all of one rank.
        transforms: dictionary transforms by rank, applied to the whole item; the ranks may be text, as JSON's keys are.
        allow_missing_keys: skip absent entries instead of raising KeyError.

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
        ranks = {data[key].ndim - 1 for key in self.key_iterator(dict(data))}
        if not ranks:
            return dict(data)
        if len(ranks) > 1 or not ranks <= self.transforms.keys():
            takes, found = (" or ".join(map(str, sorted(each))) for each in (self.transforms, ranks))
            raise UnsuitableImage(
                f"images must have {takes} spatial axes, all of an item equally many, but here are {found}; give others"
            )
        out: dict[Hashable, Any] = self.transforms[ranks.pop()](dict(data))
        return out
