"""Preprocessing of chest radiographs as RAD-DINO was published with it, from the file to the network's input."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from monai.transforms import (
    CenterSpatialCropd,
    Compose,
    EnsureChannelFirstd,
    LoadImaged,
    MapTransform,
    NormalizeIntensityd,
    RepeatChanneld,
)
from torch import Tensor
from torch.nn import functional as F

from medvit.data.radiograph import RadiographReader

MEAN, STD = 0.5307, 0.2583  # of the training images, in [0, 1]; all three channels
PATCH = 14


def rad_dino_preprocessing(keys: KeysCollection = "image", *, size: int = 518, voi: bool = True) -> Compose:
    """From paths of radiographs to RAD-DINO's input, as Hugging Face's image processor of the published weights.

    Reads DICOM, PNG or JPEG (:class:`~medvit.data.radiograph.RadiographReader`), resizes the shorter side to ``size``
    (bicubic, antialiased), crops the centre, subtracts the mean and divides by the standard deviation of the training
    images, and repeats the grey channel.

    Args:
        keys: entries of the item, paths; ``Compose`` takes and returns dictionaries.
        size: side of the square, a multiple of 14; published with 518.
        voi: False: ignore the VOI LUT or window of DICOM files.

    Returns:
        A MONAI ``Compose``; images come out ``(3, row, column)`` = ``(3, size, size)``, float32, the orientation the
        network was trained with (MONAI's own would be column first).

    Raises:
        ValueError: another size.
    """
    if size <= 0 or size % PATCH:
        raise ValueError(f"size must be a positive multiple of the patch, {PATCH}, got {size}; published with 518")
    return Compose(
        [
            LoadImaged(keys, reader=RadiographReader(voi=voi)),
            EnsureChannelFirstd(keys),
            ResizeShorterSided(keys, size),
            CenterSpatialCropd(keys, size),
            RowsFirstd(keys),
            NormalizeIntensityd(keys, subtrahend=MEAN, divisor=STD),
            RepeatChanneld(keys, 3),
        ]
    )


class ResizeShorterSided(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Resize 2D images in [0, 1] so that the shorter side has a given length; the longer is rounded down.

    Bicubic with antialiasing, where MONAI's own resizing smooths by a Gaussian first. One axis after the other, x
    before y, clipped to [0, 1] after each, as Pillow and torchvision do it to 8-bit images; here nothing is rounded.
    The affine follows.

    Args:
        keys: images ``(C, x, y)``, floating point.
        size: length of the shorter side.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: an image of another rank or type.
    """

    def __init__(self, keys: KeysCollection, size: int, allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.size = size

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with resized images."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = _resized(item[key], self.size, str(key))
        return item


class RowsFirstd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Images ``(C, x, y)`` to ``(C, row, column)``, the order that networks for pictures are trained with.

    The affine follows, which MONAI's ``Transposed`` leaves as it was.

    Args:
        keys: images ``(C, x, y)``.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: an image of another rank.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with turned images."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[key]
            if image.ndim != 3:
                raise ValueError(f"{key!r} must be an image (C, x, y), got shape {tuple(image.shape)}")
            plain = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
            item[key] = _placed(plain.transpose(1, 2), image, [[0, 1, 0], [1, 0, 0], [0, 0, 1]])
        return item


def _placed(pixels: Tensor, image: Any, matrix: Sequence[Sequence[float]]) -> Tensor:
    """``pixels`` with the meta data of ``image``, if it has any; ``matrix`` leads from their indices to its own."""
    if not isinstance(image, MetaTensor):
        return pixels
    step = to_affine_nd(len(image.affine) - 1, torch.tensor(matrix, dtype=image.affine.dtype))
    out: Any = MetaTensor(pixels).copy_meta_from(image)
    out.affine = image.affine @ step
    placed: Tensor = out
    return placed


def _resized(image: Tensor, size: int, key: str) -> Tensor:
    plain = image.as_tensor() if isinstance(image, MetaTensor) else torch.as_tensor(image)
    if plain.dim() != 3 or not plain.is_floating_point():
        raise ValueError(
            f"{key!r} must be a floating-point image (C, x, y), got {plain.dtype} of shape {tuple(plain.shape)}"
        )
    width, height = plain.shape[1:]
    # integer division: the same everywhere
    new_width, new_height = (size * n // min(width, height) for n in (width, height))
    out = plain[None]
    for sides in ((new_width, height), (new_width, new_height)):
        out = F.interpolate(out, sides, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    # centres of pixels lie half a pixel inside
    x, y = width / new_width, height / new_height
    return _placed(out[0], image, [[x, 0, (x - 1) / 2], [0, y, (y - 1) / 2], [0, 0, 1]])
