"""Slices that lie askew or at uneven distances, resampled to an upright, even grid; linear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medvit.data.space import Space
from medvit.data.volume import Volume

TILT = ("keep", "resample", "refuse")
UNEVEN = ("refuse", "resample", "split")


@dataclass(frozen=True)
class Repairs:
    """What becomes of series that are no upright, even grid as they come.

    Args:
        tilt: of slices sheared by gantry tilt: ``"keep"`` gives the sheared grid, no voxel touched, ``"resample"`` an
            upright one, ``"refuse"`` none.
        uneven: of slices at uneven distances, or with gaps: ``"refuse"``, ``"resample"`` to the smallest distance, or
            ``"split"`` into stacks of even ones.

    Raises:
        ValueError: another word.
    """

    tilt: str = "keep"
    uneven: str = "refuse"

    def __post_init__(self) -> None:
        for name, value, known in (("tilt", self.tilt, TILT), ("uneven", self.uneven, UNEVEN)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


AS_IT_IS = Repairs()


def straighten(volume: Volume) -> Volume:
    """A sheared volume on an upright grid: each slice is moved within its plane, none is lost; air around it.

    The grid keeps the in-plane axes, spacing and slice distance, and is as large as all slices together.
    """
    from scipy.ndimage import shift

    affine = volume.space.affine
    across, down, step = affine[:3, 0], affine[:3, 1], affine[:3, 2]
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal)
    upright = (step @ normal) * normal
    slip = np.linalg.lstsq(np.column_stack([across, down]), step - upright, rcond=None)[0]  # pixels per slice
    shifts = np.arange(volume.space.shape[2])[:, None] * slip
    low, high = np.floor(shifts.min(0) + 1e-9).astype(int), np.ceil(shifts.max(0) - 1e-9).astype(int)
    columns, rows, slices = volume.space.shape
    array = np.full((columns + high[0] - low[0], rows + high[1] - low[1], slices), volume.array.min(), np.float32)
    for k in range(slices):
        room = array[:, :, k]
        room[-low[0] : columns - low[0], -low[1] : rows - low[1]] = volume.array[:, :, k]
        array[:, :, k] = shift(room, shifts[k], order=1, mode="nearest")
    moved = affine.copy()
    moved[:3, 2] = upright
    moved[:3, 3] += low[0] * across + low[1] * down
    space = Space.from_affine(array.shape, moved, volume.space.frame_of_reference)
    note = "its slices are sheared (gantry tilt) and were resampled to an upright grid"
    return replace(volume, array=array, space=space, notes=(*volume.notes, note))


def even_heights(heights: Sequence[float]) -> np.ndarray:
    """Heights from the lowest to the highest, as far apart as the closest two, or a little less to end exactly."""
    low, high = heights[0], heights[-1]
    count = max(1, round((high - low) / float(np.diff(heights).min()))) + 1
    return np.linspace(low, high, count)


def between(array: np.ndarray, heights: Sequence[float]) -> np.ndarray:
    """Slices of ``array`` ``(i, j, k)`` at ``heights``, interpolated at :func:`even_heights`."""
    wanted = even_heights(heights)
    upper = np.clip(np.searchsorted(heights, wanted), 1, len(heights) - 1)
    lower = upper - 1
    given = np.asarray(heights)
    share = (wanted - given[lower]) / (given[upper] - given[lower])
    mixed: np.ndarray = array[..., lower] * (1 - share) + array[..., upper] * share
    return mixed.astype(np.float32)
