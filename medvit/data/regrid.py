"""Slices that lie askew or at uneven distances, resampled to an upright, even grid; linear interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medvit.data.slices import Plane, Stack, common_orientation, settled_step
from medvit.data.space import LPS_TO_RAS, Space
from medvit.data.volume import Volume
from medvit.errors import UnreadableSeries

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
    air = float(volume.array.min())
    array = np.full((columns + high[0] - low[0], rows + high[1] - low[1], slices), air, np.float32)
    for k in range(slices):
        room = array[:, :, k]
        room[-low[0] : columns - low[0], -low[1] : rows - low[1]] = volume.array[:, :, k]
        array[:, :, k] = shift(room, shifts[k], order=1, mode="grid-constant", cval=air)
    moved = affine.copy()
    moved[:3, 2] = upright
    moved[:3, 3] += low[0] * across + low[1] * down
    space = Space.from_affine(array.shape, moved, volume.space.frame_of_reference)
    note = "its slices are sheared (gantry tilt) and were resampled to an upright grid"
    return replace(volume, array=array, space=space, notes=(*volume.notes, note))


def even_stack(planes: Sequence[Plane], series: str) -> tuple[Stack, tuple[float, ...]]:
    """Planes at uneven heights as a stack of :func:`even_heights`, and the heights at which they are, in its order.

    Raises:
        UnreadableSeries: ``shifted-slices``: they do not lie on one straight line; else as
            :func:`medvit.data.slices.arrange`.
    """
    across, down, spacing = common_orientation(planes, series)
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal)
    positions = np.array([plane.position for plane in planes])
    order = np.argsort(positions @ normal, kind="stable")
    positions = positions[order]
    heights = tuple(float(height) for height in positions @ normal)
    share = (np.array(heights) - heights[0]) / (heights[-1] - heights[0])
    beside = np.linalg.norm(positions - positions[0] - share[:, None] * (positions[-1] - positions[0]), axis=1)
    count = len(even_heights(heights))
    step, tilt = settled_step((positions[-1] - positions[0]) / (count - 1), normal, count)
    if beside.max() > max(0.02, 0.01 * float(np.linalg.norm(step))):
        worst = positions[beside.argmax()].tolist()
        reason = (
            f"slice positions must lie on one straight line, but the slice at {worst} (LPS mm) is {beside.max():.3g} mm"
            " beside it; parts of different acquisitions may be mixed"
        )
        raise UnreadableSeries(series, "shifted-slices", reason)
    affine = np.eye(4)
    affine[:3] = np.column_stack([across * spacing[0], down * spacing[1], step, positions[0]])
    note = f"its {len(heights)} slices at uneven distances were resampled to {count} even ones"
    return Stack(tuple(map(int, order)), LPS_TO_RAS @ affine, (note,), tilt), heights


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
