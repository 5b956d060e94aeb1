"""Where voxels are: the pixel-free geometry that every part of the patient tower exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from medvit.errors import SpaceMismatch

# NIfTI's world is RAS+ (right, anterior, superior are positive), DICOM's is LPS+: the first two axes flip sign.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
UNITS = ("mm", "px")


@dataclass(frozen=True)
class Space:
    """A voxel grid in the patient, or of a photograph: frozen, hashable, without pixels.

    Args:
        shape: voxels along the three array axes ``(i, j, k)``.
        matrix: 4 x 4 affine as nested tuples: ``(i, j, k, 1)``, voxel centres, to RAS+ millimetres, or to pixels of
            the upright picture. Build a Space with :meth:`from_affine` rather than by hand.
        frame_of_reference: DICOM Frame of Reference UID, or None where the source has none. Two grids with different
            UIDs are not comparable, whatever their numbers say.
        unit: ``"mm"``, or ``"px"`` for a photograph: its place in a patient and its physical size are unknown, and its
            world is the upright picture, x to the right, y downwards, one per pixel of the file. All lengths below are
            in this unit.

    Raises:
        ValueError: a shape that is not three positive integers, a matrix that is not finite, not affine or singular, or
            another unit.
    """

    shape: tuple[int, int, int]
    matrix: tuple[tuple[float, ...], ...]
    frame_of_reference: str | None = None
    unit: str = "mm"

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ValueError(f"the unit of a Space must be one of {', '.join(UNITS)}, got {self.unit!r}")
        if len(self.shape) != 3 or any(n < 1 for n in self.shape):
            raise ValueError(f"a Space needs three sizes of at least 1, got shape={self.shape}")
        affine = np.array(self.matrix)
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"a Space needs a finite 4 x 4 affine, got {self.matrix}")
        if not np.array_equal(affine[3], (0, 0, 0, 1)):
            raise ValueError(f"the last row of an affine must be 0 0 0 1, got {affine[3].tolist()}")
        steps = np.linalg.norm(affine[:3, :3], axis=0)
        # the volume of a voxel relative to that of a box with the same edges: 1 orthogonal, 0 flat
        if steps.min() == 0 or abs(np.linalg.det(affine[:3, :3])) < 1e-3 * steps.prod():
            raise ValueError(f"the affine is singular: its columns {affine[:3, :3].T.tolist()} do not span a volume")

    @classmethod
    def from_affine(
        cls, shape: Sequence[int], affine: np.ndarray, frame_of_reference: str | None = None, unit: str = "mm"
    ) -> Space:
        """Space of an array of ``shape`` whose voxel centres ``affine`` (4 x 4, RAS+ mm or pixels) places."""
        rows = tuple(tuple(float(v) + 0.0 for v in row) for row in np.asarray(affine, dtype=np.float64))
        return cls((int(shape[0]), int(shape[1]), int(shape[2])), rows, frame_of_reference, unit)

    @cached_property
    def affine(self) -> np.ndarray:
        """4 x 4 float64, voxel centre to RAS+ mm. Read-only."""
        affine = np.array(self.matrix, dtype=np.float64)
        affine.setflags(write=False)
        return affine

    @property
    def lps_affine(self) -> np.ndarray:
        """The same map in DICOM's patient coordinates (LPS+ mm)."""
        return np.asarray(LPS_TO_RAS @ self.affine)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance between voxel centres along each array axis, mm."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def voxel_volume(self) -> float:
        """Volume of one voxel in mm³; right for sheared grids too."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    @property
    def orientation(self) -> str:
        """Anatomical direction that each array axis points to, e.g. ``"RAS"``; ``""`` if the unit is pixels."""
        if self.unit == "px":
            return ""
        import nibabel

        return "".join(nibabel.orientations.aff2axcodes(self.affine))

    def world(self, voxels: np.ndarray) -> np.ndarray:
        """Voxel coordinates ``(..., 3)`` to RAS+ mm ``(..., 3)``."""
        return np.asarray(np.asarray(voxels) @ self.affine[:3, :3].T + self.affine[:3, 3])

    def voxels_of(self, world: np.ndarray) -> np.ndarray:
        """RAS+ mm ``(..., 3)`` to fractional voxel coordinates ``(..., 3)``."""
        return np.asarray((np.asarray(world) - self.affine[:3, 3]) @ np.linalg.inv(self.affine[:3, :3]).T)

    def distance_to(self, other: Space) -> float:
        """Largest distance in mm between equally numbered corner voxels of two grids; infinite if shapes differ."""
        if self.shape != other.shape:
            return float("inf")
        corners = np.stack(np.meshgrid(*[(0, n - 1) for n in self.shape], indexing="ij"), -1).reshape(-1, 3)
        return float(np.linalg.norm(self.world(corners) - other.world(corners), axis=1).max())

    def require_same(self, other: Space, *, tolerance: float = 1e-3, what: str = "the two images") -> None:
        """Check that units and shapes agree, corners lie within ``tolerance``, and known frames of reference are equal.

        Raises:
            SpaceMismatch: they do not; ``what`` names the two.
        """
        if self.unit != other.unit:
            raise SpaceMismatch(
                f"{what} must share one grid, but one lies in {self.unit} and the other in {other.unit}; "
                "a photograph has no place in millimetres"
            )
        if self.shape != other.shape:
            raise SpaceMismatch(f"{what} must share one grid, but have shapes {self.shape} and {other.shape}")
        distance = self.distance_to(other)
        if not distance <= tolerance:
            raise SpaceMismatch(
                f"{what} must share one grid within {tolerance} {self.unit}, but corners are {distance:.4g} "
                f"{self.unit} apart"
            )
        mine, theirs = self.frame_of_reference, other.frame_of_reference
        if mine and theirs and mine != theirs:
            raise SpaceMismatch(f"{what} lie in different frames of reference: {mine} and {theirs}")
