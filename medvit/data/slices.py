"""From the places of single 2D slices to one volume grid, or to the reason why there is none; knows no files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medvit.data.space import LPS_TO_RAS
from medvit.errors import UnreadableSeries

Vector = tuple[float, float, float]

# Scanners round cosines and spacings differently from slice to slice (1e-6 to 1e-4 is usual). Below SAME_* that is
# noise and is averaged; above OTHER_* it is another image (a scout); in between the series contradicts itself: refused.
SAME_DIRECTION, OTHER_DIRECTION = 1e-3, 1e-2
SAME_SPACING, OTHER_SPACING = 1e-3, 1e-2
SAME_POSITION_MM = 5e-3  # closer slices are at one place
ROUNDING_MM = 2e-3  # a sideways drift of the whole stack below this is rounding of decimal strings
TILT_DEGREES = 0.1


@dataclass(frozen=True)
class Plane:
    """Where one 2D image lies, in DICOM's patient coordinates (LPS+ mm).

    Args:
        shape: pixels along ``(i, j)`` = (columns, rows).
        position: centre of the first pixel.
        across: unit vector in which the column index ``i`` grows.
        down: unit vector in which the row index ``j`` grows.
        spacing: mm between pixel centres along ``(i, j)``.
    """

    shape: tuple[int, int]
    position: Vector
    across: Vector
    down: Vector
    spacing: tuple[float, float]

    @classmethod
    def from_dicom(
        cls,
        rows: int,
        columns: int,
        position: Sequence[float],
        orientation: Sequence[float],
        pixel_spacing: Sequence[float],
    ) -> Plane:
        """Plane of ImagePositionPatient, ImageOrientationPatient and PixelSpacing (row distance first).

        Raises:
            ValueError: with a reason in the tags' own names, when they do not place an image.
        """
        values = np.array([*position, *orientation, *pixel_spacing], dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"ImagePositionPatient, ImageOrientationPatient or PixelSpacing is not finite: {values.tolist()}"
            )
        if min(pixel_spacing) <= 0:
            raise ValueError(f"PixelSpacing must be positive, got {list(pixel_spacing)}")
        across, down = values[3:6], values[6:9]
        lengths = np.linalg.norm(across), np.linalg.norm(down)
        if max(abs(length - 1) for length in lengths) > 1e-2 or abs(across @ down) > 5e-3:
            raise ValueError(f"ImageOrientationPatient must hold two orthogonal unit vectors, got {list(orientation)}")
        return cls(
            (columns, rows),
            _vector(values[:3]),
            _vector(across / lengths[0]),
            _vector(down / lengths[1]),
            (float(pixel_spacing[1]), float(pixel_spacing[0])),
        )

    def is_like(self, other: Plane) -> bool:
        """True if the two may be slices of one volume: same matrix, nearly the same orientation and pixel spacing."""
        return (
            self.shape == other.shape
            and _distance((*self.across, *self.down), (*other.across, *other.down)) <= OTHER_DIRECTION
            and all(abs(a - b) <= OTHER_SPACING * b for a, b in zip(self.spacing, other.spacing, strict=True))
        )


@dataclass(frozen=True)
class Stack:
    """Slices in order: plane ``order[k]`` becomes slice ``k``; ``affine`` maps (i, j, k) to RAS+ mm.

    ``tilt`` is the angle in degrees by which the slices are sheared (gantry tilt), 0 if they are stacked upright.
    """

    order: tuple[int, ...]
    affine: np.ndarray
    notes: tuple[str, ...] = ()
    tilt: float = 0.0


def arrange(planes: Sequence[Plane], series: str, thickness: float | None = None) -> Stack:
    """Order ``planes`` along their normal, cross(across, down), and prove that they form one regular grid.

    Every position must lie within max(0.02 mm, 1 % of the step) of a straight line with equal steps.

    Args:
        planes: at least one, of one matrix size.
        series: what the error calls them.
        thickness: mm, the slice step to assume where there is only one slice.

    Raises:
        UnreadableSeries: ``orientation-varies``, ``spacing-varies``, ``single-slice`` (without a thickness),
            ``four-dimensional``, ``duplicate-positions``, ``missing-slice``, ``uneven-slices``, ``shifted-slices``.
            Reasons give positions along the normal in mm.
    """
    across, down, spacing = common_orientation(planes, series)
    normal = np.cross(across, down)
    normal /= np.linalg.norm(normal)
    positions = np.array([plane.position for plane in planes])
    heights = positions @ normal
    order = np.argsort(heights, kind="stable")
    notes: tuple[str, ...] = ()
    if len(planes) == 1:
        if thickness is None or not 0 < thickness < np.inf:
            reason = "one slice without a SliceThickness has no extent across the slice; give the complete series"
            raise UnreadableSeries(series, "single-slice", reason)
        origin, step, tilt = positions[0], thickness * normal, 0.0
        notes = (f"a single slice: its thickness of {thickness:g} mm stands for the distance between slices",)
    else:
        _require_one_slice_per_position(heights[order], series)
        origin, step, tilt = _fit_line(positions[order], normal, series)
    affine = np.eye(4)
    affine[:3] = np.column_stack([across * spacing[0], down * spacing[1], step, origin])
    return Stack(tuple(int(n) for n in order), LPS_TO_RAS @ affine, notes, tilt)


def common_orientation(planes: Sequence[Plane], series: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean directions and spacing of planes that agree up to rounding; raises as :func:`arrange`."""
    directions = np.array([(*plane.across, *plane.down) for plane in planes])
    spacings = np.array([plane.spacing for plane in planes])
    if (difference := float(np.ptp(directions, axis=0).max())) > SAME_DIRECTION:
        reason = (
            f"slices of one volume must be parallel, but ImageOrientationPatient varies by {difference:.2g}"
            f" between {len(planes)} slices; they cannot be stacked without resampling"
        )
        raise UnreadableSeries(series, "orientation-varies", reason)
    if float((np.ptp(spacings, axis=0) / spacings.min(axis=0)).max()) > SAME_SPACING:
        low, high = spacings.min(axis=0).tolist(), spacings.max(axis=0).tolist()
        reason = f"slices of one volume must share one pixel spacing, but it varies from {low} to {high} mm"
        raise UnreadableSeries(series, "spacing-varies", reason)
    direction, spacing = _mean(directions), _mean(spacings)
    across, down = direction[:3] / np.linalg.norm(direction[:3]), direction[3:] / np.linalg.norm(direction[3:])
    return across, down, spacing


def _require_one_slice_per_position(heights: np.ndarray, series: str) -> None:
    starts = np.flatnonzero(np.diff(heights, prepend=-np.inf) > SAME_POSITION_MM)
    counts = np.diff(starts, append=len(heights))
    if counts.max() == 1:
        return
    if counts.min() == counts.max():
        reason = (
            f"{len(heights)} slices lie at {len(counts)} positions, {counts[0]} at each: several volumes (time points,"
            " echoes or diffusion weightings) in one series, where one 3D volume is needed; give one of them"
        )
        raise UnreadableSeries(series, "four-dimensional", reason)
    twice = heights[starts[counts > 1]]
    reason = (
        f"one slice per position is needed, but {len(twice)} of {len(counts)} positions hold several different ones"
        f" (at {_listed(twice)} mm along the normal); remove what does not belong to the volume"
    )
    raise UnreadableSeries(series, "duplicate-positions", reason)


def _fit_line(positions: np.ndarray, normal: np.ndarray, series: str) -> tuple[np.ndarray, np.ndarray, float]:
    """Origin, step and tilt of the straight, evenly divided line through ``positions`` (n, 3), sorted by ``normal``."""
    k = np.arange(len(positions)) - (len(positions) - 1) / 2
    step = k @ positions / (k @ k)
    residuals = positions - positions.mean(axis=0) - k[:, None] * step
    height = float(step @ normal)
    tolerance = max(0.02, 0.01 * height)
    if np.abs(residuals @ normal).max() > tolerance:
        _refuse_uneven(positions @ normal, series)
    if (off := np.linalg.norm(residuals, axis=1)).max() > tolerance:
        worst = positions[off.argmax()].tolist()
        reason = (
            f"slice positions must lie on one straight line, but the slice at {worst} (LPS mm) is {off.max():.3g} mm"
            " beside it; parts of different acquisitions may be mixed"
        )
        raise UnreadableSeries(series, "shifted-slices", reason)
    step, tilt = settled_step(step, normal, len(positions))
    return positions.mean(axis=0) + k[0] * step, step, tilt


def settled_step(step: np.ndarray, normal: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """The step between ``count`` slices, along the normal where its drift is rounding, and its tilt in degrees."""
    height = float(step @ normal)
    sideways = float(np.linalg.norm(step - height * normal))
    drift, tilt = sideways * (count - 1), float(np.degrees(np.arctan2(sideways, height)))
    tilted = tilt > TILT_DEGREES and drift > max(0.02, 0.01 * height)
    return height * normal if drift <= ROUNDING_MM else step, tilt if tilted else 0.0


def _refuse_uneven(heights: np.ndarray, series: str) -> None:
    steps = np.diff(heights)
    usual = float(np.median(steps))
    multiples = np.rint(steps / usual)
    gaps = np.flatnonzero(multiples > 1)
    whole = bool((np.abs(steps - multiples * usual) <= max(0.02, 0.01 * usual)).all())
    if whole and len(gaps):
        where = ", ".join(f"{heights[g]:.4g} and {heights[g + 1]:.4g}" for g in gaps[:3])
        missing = int((multiples[gaps] - 1).sum())
        reason = (
            f"{missing} of {len(heights) + missing} slices are missing: slices are {usual:.4g} mm apart, but there is"
            f" a gap between {where} mm along the normal; get the complete series"
        )
        raise UnreadableSeries(series, "missing-slice", reason)
    odd = int(np.abs(steps - usual).argmax())
    reason = (
        f"slices must be evenly spaced within max(0.02 mm, 1 %), but distances run from {steps.min():.4g} to"
        f" {steps.max():.4g} mm (usual {usual:.4g}; {steps[odd]:.4g} between {heights[odd]:.4g} and"
        f" {heights[odd + 1]:.4g} mm along the normal); resample the series first"
    )
    raise UnreadableSeries(series, "uneven-slices", reason)


def _mean(rows: np.ndarray) -> np.ndarray:
    """Mean over the first axis; exactly the common row where all are equal, which a sum's rounding would miss."""
    return np.asarray(rows.mean(axis=0) if np.ptp(rows, axis=0).any() else rows[0])


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{value:.4g}" for value in values[:4]) + (", ..." if len(values) > 4 else "")


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _vector(values: np.ndarray) -> Vector:
    return float(values[0]), float(values[1]), float(values[2])
