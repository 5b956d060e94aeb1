"""How well a mask agrees with a reference: their overlap, and how far apart their surfaces are, in mm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion, distance_transform_edt
from torch import Tensor


class Agreement(NamedTuple):
    """Of two masks of one structure.

    A structure that neither holds has none of the three: NaN. One that a single one holds is missed altogether: Dice
    and surface Dice are 0, and its distance is infinite.

    Attributes:
        dice: ``2 |A and B| / (|A| + |B|)``.
        surface_dice: the share of both surfaces' voxels that lie within the tolerance of the other surface.
        hd95: mm; the 95th percentile of the distances from one surface's voxels to the other surface, of the two
            directions the larger.
    """

    dice: float
    surface_dice: float
    hd95: float


def agreement(found: Tensor, truth: Tensor, spacing: Sequence[float], tolerance: float = 1.0) -> Agreement:
    """Compare two masks on one grid.

    A voxel of the surface is one of the mask with a face to what is not, or to the end of the image. Distances are
    between centres of voxels, so that a finer grid tells more: compare numbers of one grid only.

    Args:
        found: bool ``(*spatial)``, 2D or 3D.
        truth: likewise, the reference.
        spacing: mm per axis, of axes at right angles.
        tolerance: mm, see ``surface_dice``.

    Raises:
        ValueError: masks of other shapes or ranks, a spacing or tolerance that is none.

    Source: surface Dice: Nikolov et al., "Clinically Applicable Segmentation of Head and Neck Anatomy for Radiotherapy"
    (JMIR 2021), here with voxels in place of their areas.
    """
    if found.shape != truth.shape or found.dim() not in (2, 3):
        raise ValueError(f"masks must be 2D or 3D and of one shape, got {tuple(found.shape)} and {tuple(truth.shape)}")
    if len(spacing) != found.dim() or not all(0 < s < math.inf for s in spacing):
        raise ValueError(f"spacing must be {found.dim()} positive numbers, mm per axis, got {tuple(spacing)}")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be a distance in mm, 0 or more, got {tolerance}; use 1.0")
    if not (found.any() and truth.any()):
        one = bool(found.any() or truth.any())
        return Agreement(0.0, 0.0, math.inf) if one else Agreement(math.nan, math.nan, math.nan)
    box = tuple(slice(int(n.min()), int(n.max()) + 1) for n in (found | truth).nonzero().T)  # all that there is
    a, b = (_surface(mask[box].numpy(force=True)) for mask in (found, truth))
    there, back = (distance_transform_edt(~other, spacing)[one] for one, other in ((a, b), (b, a)))
    near = (there <= tolerance).sum() + (back <= tolerance).sum()
    farthest = max(np.percentile(there, 95), np.percentile(back, 95))
    return Agreement(dice(found, truth), float(near / (there.size + back.size)), float(farthest))


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    inner: NDArray[np.bool_] = binary_erosion(mask)
    return mask & ~inner


def columns_of(structures: Sequence[str], scores: Sequence[Sequence[Agreement]]) -> dict[str, Tensor]:
    """Columns of a table of cases: Dice under a structure's own name, then ``surface_dice_NAME`` and ``hd95_NAME``.

    Args:
        structures: S names.
        scores: of each case, of each structure.
    """
    values = torch.tensor(scores, dtype=torch.float64).reshape(-1, len(structures), 3)
    kinds = zip(("", "surface_dice_", "hd95_"), values.unbind(2), strict=True)
    return {f"{prefix}{name}": of_kind[:, i] for prefix, of_kind in kinds for i, name in enumerate(structures)}


def dice(found: Tensor, truth: Tensor) -> float:
    """Dice of two boolean masks, ``2 |A and B| / (|A| + |B|)``; NaN if both are empty."""
    total = int(found.sum()) + int(truth.sum())
    return 2 * int((found & truth).sum()) / total if total else math.nan


def spacing_of(image: Tensor) -> list[float]:
    """Distance of neighbouring voxels along each axis of a MONAI MetaTensor ``(C, *spatial)``, mm, by its affine.

    Raises:
        TypeError: a tensor without an affine.
    """
    affine = getattr(image, "affine", None)
    if affine is None:
        raise TypeError(
            f"distances in mm need an image that knows its spacing, a MetaTensor, got {type(image).__name__}; "
            "load it with LoadImaged and keep its meta data"
        )
    columns = torch.as_tensor(affine).double()[:-1, : image.dim() - 1]
    return [float(length) for length in columns.norm(dim=0)]
