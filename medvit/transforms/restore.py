"""From a network's output to a label map on the grid of the file it came from, as MONAI dictionary transforms."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import numpy as np
import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from torch import Tensor

from medvit.data.space import Space
from medvit.errors import MedvitError, SpaceMismatch
from medvit.transforms.resample import resample_labels


class ArgmaxLabelsd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Class scores ``(K, *grid)`` to a label map ``(1, *grid)``, uint8 up to 256 classes and uint16 above.

    Works plane by plane, so that no int64 map of the whole grid is made. Meta data of a MetaTensor are kept.

    Args:
        keys: entries to convert.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        ValueError: fewer than two classes, or more than 65536.
        MedvitError: scores that are not numbers.
    """

    def __init__(self, keys: KeysCollection = "pred", allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with label maps in place of scores."""
        item = dict(data)
        for key in self.key_iterator(item):
            item[key] = _argmax(item[key], str(key))
        return item


class RestoreLabelsd(MapTransform):  # type: ignore[misc]  # MONAI ships no types
    """Label maps from the network's grid back to the grid of the source file, in one nearest-neighbour step.

    The image says where both grids are: MONAI transforms keep its ``affine`` up to date through every reorientation,
    resampling, crop and padding, and its meta data still hold ``original_affine`` and ``spatial_shape`` of the file. No
    transform history is undone. Voxels of the file that the network did not see are 0.

    Input: labels ``(1, i, j, k)``, integers in any dtype, on the grid of ``item[source_key]`` as it is now. Output:
    MetaTensor ``(1, *source shape)`` on the CPU with the image's meta data and ``affine`` = ``original_affine``; uint8,
    or uint16 where the input was uint16 or has a label above 255.

    Args:
        keys: label maps to restore.
        source_key: the preprocessed image, a MetaTensor.
        allow_missing_keys: skip absent entries instead of raising KeyError.

    Raises:
        SpaceMismatch: labels and image have different shapes.
        TypeError: an image without meta data.
        ValueError: meta data that lack the source grid, images that are not 3D, values that are not labels.
    """

    def __init__(self, keys: KeysCollection = "pred", source_key: str = "image", allow_missing_keys: bool = False):
        super().__init__(keys, allow_missing_keys)
        self.source_key = source_key

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """A copy of ``data`` with restored label maps."""
        item = dict(data)
        for key in self.key_iterator(item):
            image = item[self.source_key]
            seen, source = _grids(image, self.source_key)
            labels = _labels(item[key], str(key))
            if labels.shape != seen.shape:
                raise SpaceMismatch(
                    f"{key!r} must lie on the grid of {self.source_key!r}, but has shape {labels.shape} and the image "
                    f"{seen.shape}; restore before any other spatial transform of either"
                )
            restored = torch.from_numpy(resample_labels(labels, seen, source)[None])
            meta = {k: v for k, v in image.meta.items() if k != "affine"}
            item[key] = MetaTensor(restored, affine=torch.tensor(source.affine), meta=meta)
        return item


def _argmax(scores: Tensor, key: str) -> Tensor:
    classes, *grid = scores.shape
    if not 2 <= classes <= 1 << 16:
        raise ValueError(
            f"{key!r} must be scores (classes, *grid) of 2 to 65536 classes, got shape {tuple(scores.shape)}; a "
            "network with a single output needs a threshold (monai.transforms.AsDiscreted), and labels need no argmax"
        )
    plain = scores.as_tensor() if isinstance(scores, MetaTensor) else scores
    dtype = torch.uint8 if classes <= 1 << 8 else torch.uint16
    labels = torch.empty((1, *grid), dtype=dtype, device=plain.device)
    broken = torch.zeros((), dtype=torch.bool, device=plain.device)
    for plane in range(grid[0]):
        best, index = plain[:, plane].max(dim=0)  # one NaN among the classes makes the best one NaN
        labels[0, plane] = index.to(dtype)
        broken |= best.isnan().any()
    if broken:
        raise MedvitError(
            f"{key!r} must hold finite scores, but some are NaN, which have no best class; run the network in "
            "float32 and check that image and weights are finite"
        )
    return MetaTensor(labels).copy_meta_from(scores) if isinstance(scores, MetaTensor) else labels


def _grids(image: Any, key: str) -> tuple[Space, Space]:
    """The grid of the preprocessed image and that of its file."""
    if not isinstance(image, MetaTensor):
        raise TypeError(
            f"{key!r} must be a MetaTensor that knows its grid, got {type(image).__name__}; load it with LoadImaged "
            "and keep its meta data through preprocessing"
        )
    missing = [name for name in ("original_affine", "spatial_shape") if name not in image.meta]
    if missing:
        raise ValueError(
            f"the meta data of {key!r} must hold the grid of its file, but lack {' and '.join(missing)}; load it with "
            "LoadImaged"
        )
    seen, source = tuple(image.shape[1:]), tuple(int(n) for n in image.meta["spatial_shape"])
    if len(seen) != 3 or len(source) != 3:
        raise ValueError(f"{key!r} must be a 3D image (1, i, j, k) of a 3D file, got sizes {seen} and {source}")
    here, there = (
        np.asarray(torch.as_tensor(affine).cpu(), dtype=np.float64)
        for affine in (image.affine, image.meta["original_affine"])
    )
    unit = str(image.meta.get("medvit_unit", "mm"))
    return Space.from_affine(seen, here, unit=unit), Space.from_affine(source, there, unit=unit)


def _labels(values: Tensor, key: str) -> np.ndarray:
    """``(1, *grid)`` of any dtype to a uint8 or uint16 array ``(*grid)``."""
    array: np.ndarray = np.asarray(torch.as_tensor(values).detach().cpu())
    if array.ndim != 4 or len(array) != 1:
        raise ValueError(
            f"{key!r} must be one label map (1, i, j, k), got shape {array.shape}; use ArgmaxLabelsd first"
        )
    if array.dtype not in (np.uint8, np.uint16):
        low, high = array.min(), array.max()
        # written so that NaN fails too
        if not (low >= 0 and high < 1 << 16 and (array.dtype.kind != "f" or (array == np.floor(array)).all())):
            raise ValueError(
                f"{key!r} must hold whole labels from 0 to 65535, got {array.dtype} values from {low} to {high}; use "
                "ArgmaxLabelsd first"
            )
        array = array.astype(np.uint8 if high < 1 << 8 else np.uint16)
    return array.reshape(array.shape[1:])
