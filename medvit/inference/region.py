"""Where in its source image a grid of patches lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd

from medvit.errors import MedvitError


@dataclass(frozen=True)
class Region:
    """The box of a source image that a grid of patches covers, without gaps, one entry per axis of the grid.

    Args:
        grid: patches along each axis.
        axes: the axis of the source, as its reader gives it, that each axis of the grid runs along.
        start: where the first patch begins on that axis: in pixels (voxels) of the source, from the outer face of its
            first one.
        stop: where the last patch ends; less than ``start`` where the grid runs backwards. What lies below 0 or beyond
            the source is padding.
    """

    grid: tuple[int, ...]
    axes: tuple[int, ...]
    start: tuple[float, ...]
    stop: tuple[float, ...]

    @classmethod
    def of(cls, image: MetaTensor, grid: Sequence[int]) -> Region:
        """The region of an image ``(C, *spatial)`` as a network sees it, whose patches make ``grid``.

        The image's affine says where its voxels are, and ``original_affine`` of its meta data where those of the source
        are; without one, the affine leads to pixels of the source.

        Raises:
            MedvitError: patches that leave a rest, or preprocessing that turns the image by less than a right angle.
        """
        sides = tuple(int(n) for n in image.shape[1:])
        if len(grid) != len(sides) or any(n % g for n, g in zip(sides, grid, strict=True)):
            raise MedvitError(
                f"a patch map needs images of whole patches, but {tuple(grid)} patches leave a rest of an image of "
                f"{sides}; choose an image size that is a multiple of the patch"
            )
        here = _affine(image.affine, len(sides))
        source = _affine(image.meta.get("original_affine", np.eye(len(sides) + 1)), len(sides))
        matrix = np.linalg.inv(source) @ here  # from indices as the network sees them to indices of the source
        linear, shift = matrix[:-1, :-1], matrix[:-1, -1]
        axes = np.abs(linear).argmax(0)
        scale = linear[axes, range(len(sides))]
        aside = linear.copy()
        aside[axes, range(len(sides))] = 0
        if len(set(axes)) < len(sides) or np.abs(aside).max() > 1e-3 * np.abs(scale).min():
            raise MedvitError(
                "a patch map needs preprocessing that keeps the axes of the image, but this one turns them; "
                "resample along the image's own axes"
            )
        start = shift[axes] - scale / 2 + 0.5  # the face of a voxel is half a voxel before its centre
        stop = start + scale * sides
        rounded = (tuple(round(float(v), 3) + 0.0 for v in ends) for ends in (start, stop))
        return cls(tuple(int(g) for g in grid), tuple(int(a) for a in axes), *rounded)


def _affine(matrix: Any, rank: int) -> np.ndarray:
    """``(rank + 1, rank + 1)`` float64, of any affine."""
    affine: np.ndarray = to_affine_nd(rank, np.asarray(torch.as_tensor(matrix).cpu(), dtype=np.float64))
    return affine
