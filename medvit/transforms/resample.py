"""Label maps from one voxel grid to another: nearest neighbour in the world, exact where the lattices coincide."""

from __future__ import annotations

import itertools

import numpy as np

from medvit.data.space import Space
from medvit.errors import SpaceMismatch

# In voxels of the source grid. A turn or an overhang below TOLERANCE is none: affines are multiplied and rounded.
# Centres within TIE of the border between two voxels count as on it: rounding of float32 affines stays below.
TOLERANCE = 1e-3
TIE = 1e-4
# Target voxels whose coordinates are held at once; about 100 MB of float64 and index arrays.
SLAB_VOXELS = 1 << 20


def resample_labels(labels: np.ndarray, source: Space, target: Space) -> np.ndarray:
    """The label at each voxel centre of ``target``: that of the nearest voxel of ``source``.

    Axis flips, permutations, crops and padding come out exact. A target centre that lies outside the outermost voxels
    of ``source`` (more than half a voxel from the last centre) is 0; one on the border between two voxels takes the one
    of the higher index. Coordinates are float64 and made slab by slab.

    Args:
        labels: ``(i, j, k)`` on ``source``, integers with 0 for background.
        source: grid of ``labels``; any invertible affine, sheared ones too.
        target: grid wanted.

    Returns:
        ``target.shape``, C-contiguous, same dtype as ``labels``.

    Raises:
        SpaceMismatch: ``labels`` do not fill ``source``, or the two grids have different frames of reference or units.
        TypeError: labels that are not integers.
    """
    if labels.dtype.kind not in "iub":
        raise TypeError(f"labels must be integers, got {labels.dtype}; take the argmax before resampling")
    if labels.shape != source.shape:
        raise SpaceMismatch(f"labels of shape {labels.shape} do not fill their grid of shape {source.shape}")
    if source.unit != target.unit:
        raise SpaceMismatch(f"labels lie in {source.unit} and cannot be placed in {target.unit}")
    here, there = source.frame_of_reference, target.frame_of_reference
    if here and there and here != there:
        raise SpaceMismatch(f"labels lie in the frame of reference {here} and cannot be placed in another one, {there}")
    result = np.zeros(target.shape, dtype=labels.dtype)
    box = _occupied(labels)
    if box is None:
        return result
    to_source = np.linalg.inv(source.affine) @ target.affine
    region = _image_of(box, np.linalg.inv(to_source), target.shape)
    if all(r.start < r.stop for r in region):
        _fill(result, region, labels, to_source)
    return result


def _fill(result: np.ndarray, region: tuple[slice, ...], labels: np.ndarray, to_source: np.ndarray) -> None:
    """Write the labels of ``region``, a box of ``result``; ``to_source`` maps its voxels to those of ``labels``."""
    along = _axis_pairs(to_source, result.shape)
    if along is not None:
        _fill_separable(result, region, labels, to_source, along)
        return
    first, second, third = (np.arange(r.start, r.stop, dtype=np.float64) for r in region)
    flat_labels = labels.reshape(-1)
    thickness = max(1, SLAB_VOXELS // (len(second) * len(third)))
    for begin in range(0, len(first), thickness):
        slab = first[begin : begin + thickness]
        inside = np.ones((len(slab), len(second), len(third)), dtype=bool)
        flat = np.zeros(inside.shape, dtype=np.int64)
        for (i, j, k, offset), size in zip(to_source[:3], labels.shape, strict=True):
            coordinate = (i * slab)[:, None, None] + (j * second)[:, None] + (k * third + offset)
            index, valid = _nearest(coordinate, size)
            inside &= valid
            flat *= size
            flat += index
        start = region[0].start + begin
        result[start : start + len(slab), region[1], region[2]] = np.where(inside, flat_labels[flat], 0)


def _fill_separable(
    result: np.ndarray, region: tuple[slice, ...], labels: np.ndarray, to_source: np.ndarray, along: tuple[int, ...]
) -> None:
    """As :func:`_fill`, with one index vector per axis instead of three coordinates per voxel."""
    box, picked = list(region), [np.empty(0, dtype=np.int64)] * 3  # both in the target's axis order
    for axis, target_axis in enumerate(along):
        steps = np.arange(region[target_axis].start, region[target_axis].stop, dtype=np.float64)
        index, valid = _nearest(to_source[axis, target_axis] * steps + to_source[axis, 3], labels.shape[axis])
        picked[target_axis] = index[valid]
        # the coordinate runs one way, so what is inside is one run
        start = region[target_axis].start + int(np.argmax(valid))
        box[target_axis] = slice(start, start + int(valid.sum()))
    result[tuple(box)] = labels.transpose(np.argsort(along))[np.ix_(*picked)]


def _axis_pairs(to_source: np.ndarray, target_shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """For each source axis the one target axis it follows, or None if the grids are turned against each other.

    A turn counts if it moves any voxel of the target by more than TOLERANCE.
    """
    linear = to_source[:3, :3]
    along = tuple(int(a) for a in np.abs(linear).argmax(axis=1))
    if sorted(along) != [0, 1, 2]:
        return None
    rest = np.abs(linear)
    rest[np.arange(3), along] = 0
    return along if (rest @ (np.array(target_shape) - 1)).max() <= TOLERANCE else None


def _nearest(coordinate: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest of ``size`` voxels (clipped), and whether the coordinate lies in one of them."""
    # TIE sends ties one way; without it rounding errors choose their side, voxel by voxel
    index = np.floor(coordinate + (0.5 + TIE)).astype(np.int64)
    inside = (coordinate >= -0.5 - TOLERANCE) & (coordinate <= size - 0.5 + TOLERANCE)
    return np.clip(index, 0, size - 1), inside


def _occupied(labels: np.ndarray) -> tuple[tuple[int, int], ...] | None:
    """First and last index per axis of the non-zero labels; None if there are none."""
    box = []
    for axis in range(3):
        hits = np.flatnonzero(labels.any(axis=tuple(a for a in range(3) if a != axis)))
        if not len(hits):
            return None
        box.append((int(hits[0]), int(hits[-1])))
    return tuple(box)


def _image_of(box: tuple[tuple[int, int], ...], to_target: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Target voxels that the voxels of a source box can reach; everything else is background."""
    edges = [(first - 0.5, last + 0.5) for first, last in box]
    corners = np.array(list(itertools.product(*edges))) @ to_target[:3, :3].T + to_target[:3, 3]
    low, high = np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0)) + 1
    return tuple(slice(int(np.clip(a, 0, n)), int(np.clip(b, 0, n))) for a, b, n in zip(low, high, shape, strict=True))
