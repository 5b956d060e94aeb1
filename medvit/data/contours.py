"""Masks of one slice to closed contours along the edges of pixels, and back; neither way loses anything."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Steps of a walk along pixel edges with the mask on the right hand side (rows grow downwards): right, down, left, up.
_STEPS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])


def outlines(mask: np.ndarray) -> list[np.ndarray]:
    """Closed contours around the pixels of a mask, one for each part that holds together by edges.

    Contours run along pixel edges. A hole is joined to the contour around it by a keyhole, a passage of no width walked
    there and back, so that every contour stands for itself: software that unites the contours of a slice and software
    that combines them by exclusive or both find the mask, and :func:`fill` finds it exactly.

    Args:
        mask: ``(column, row)`` bool.

    Returns:
        ``(n, 2)`` float each: column and row of the corners, pixel centres being whole numbers; the last point is to be
        joined to the first.
    """
    from scipy.ndimage import label

    filled = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(filled[0]):
        return []
    corner = np.array([filled[0][0], filled[1][0]])
    box = np.pad(mask[corner[0] : filled[0][-1] + 1, corner[1] : filled[1][-1] + 1], 1).astype(bool)
    parts, _ = label(box)  # of pixels that share an edge
    rings: dict[int, list[list[tuple[int, int]]]] = {}
    for ring, part in _rings(box, parts):
        rings.setdefault(part, []).append(ring)
    # in the padded box lattice point (0, 0) is the upper left corner of the pixel at corner - 1
    return [np.array(_straightened(_joined(group))) + corner - 1.5 for group in rings.values()]


def _rings(box: np.ndarray, parts: np.ndarray) -> list[tuple[list[tuple[int, int]], int]]:
    """All boundaries as lattice points in walking order, each with the number of its part.

    ``box`` has a margin of one pixel; lattice point ``(x, y)`` is the upper left corner of pixel ``(x, y)``.
    """
    columns, rows = box.shape
    outgoing = np.zeros((4, columns, rows), bool)  # an edge in this direction begins at this lattice point
    here, left, above, corner = box[1:, 1:], box[:-1, 1:], box[1:, :-1], box[:-1, :-1]
    outgoing[:, 1:, 1:] = here & ~above, left & ~here, corner & ~left, above & ~corner
    directions, xs, ys = np.nonzero(outgoing)
    ends = np.stack([xs, ys], 1) + _STEPS[directions]
    turns = np.full(len(xs), 3)  # left, unless straight on, unless right: at a crossing of two parts each keeps its own
    turns[outgoing[directions, ends[:, 0], ends[:, 1]]] = 0
    turns[outgoing[(directions + 1) % 4, ends[:, 0], ends[:, 1]]] = 1
    numbers = np.zeros(outgoing.shape, np.int64)
    numbers[directions, xs, ys] = np.arange(len(xs))
    following = numbers[(directions + turns) % 4, ends[:, 0], ends[:, 1]].tolist()
    # the pixel on the right hand side of each edge, relative to where the edge begins
    inside = np.array([(0, 0), (-1, 0), (-1, -1), (0, -1)])[directions] + np.stack([xs, ys], 1)
    owners = parts[inside[:, 0], inside[:, 1]]
    points, seen, found = list(zip(xs.tolist(), ys.tolist(), strict=True)), [False] * len(xs), []
    for start in range(len(xs)):
        ring, edge = [], start
        while not seen[edge]:
            seen[edge] = True
            ring.append(points[edge])
            edge = following[edge]
        if ring:
            found.append((ring, int(owners[start])))
    return found


def _joined(rings: list[list[tuple[int, int]]]) -> list[tuple[int, int]]:
    """The rings of one part, holes and outer boundary, as a single walk with keyholes."""
    # the outer boundary reaches farthest left; a keyhole leads left from a hole, so what it meets is joined already
    first, *holes = sorted(rings, key=min)
    walk = first
    reached = set(walk)
    for hole in holes:
        start = hole.index(min(hole))
        x, y = hole[start]
        passage = []
        while (x, y) not in reached:
            passage.append((x, y))
            x -= 1
        place = walk.index((x, y))
        round_trip = hole[start:] + hole[:start]
        walk = [*walk[: place + 1], *passage[::-1], *round_trip[1:], *passage, *walk[place:]]
        reached.update(hole, passage)
    return walk


def _straightened(walk: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Without points on the way straight on; turning points of keyholes stay."""
    points = np.array(walk)
    points = points[(points != np.roll(points, 1, axis=0)).any(1)]
    arriving, leaving = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    return [tuple(point) for point in points[(arriving != leaving).any(1)].tolist()]


def fill(polygons: Sequence[np.ndarray], shape: Sequence[int], xor: bool = False) -> tuple[np.ndarray, list[str]]:
    """Pixels of one slice whose centres lie inside closed contours.

    Args:
        polygons: ``(n, 2)`` each, fractional (column, row); the last point is joined to the first.
        shape: columns, rows.
        xor: contours are combined by exclusive or, as those of DICOM's type CLOSEDPLANAR_XOR are. Else one that lies
            wholly within others is a hole, and those that overlap in part are united.

    Returns:
        ``(column, row)`` bool, and what a person should know of the contours.
    """
    notes = []
    unique = list({polygon.tobytes(): polygon for polygon in polygons}.values())
    if len(unique) < len(polygons):
        notes.append(f"{len(polygons) - len(unique)} contours that occur twice were read once")
    masks = sorted((_filled(polygon, shape) for polygon in unique), key=lambda m: m[1].sum(), reverse=True)
    whole = np.zeros(tuple(shape), bool)
    small = partial = 0
    for box, mask in masks:
        inside, size = int((whole[box] & mask).sum()), int(mask.sum())
        small += size == 0
        if xor or inside == size:
            whole[box] ^= mask
        else:
            partial += inside > 0
            whole[box] |= mask
    if small:
        notes.append(f"{small} contours hold no voxel centre and were left out")
    if partial:
        notes.append(f"{partial} contours overlap others in part; they were united")
    return whole, notes


def _filled(polygon: np.ndarray, shape: Sequence[int]) -> tuple[tuple[slice, slice], np.ndarray]:
    """The box of pixels around a polygon and, ``(column, row)`` in it, those whose centres are inside."""
    low = np.clip(np.floor(polygon.min(0)), 0, shape).astype(int)
    high = np.clip(np.ceil(polygon.max(0)) + 1, low, shape).astype(int)
    return (slice(low[0], high[0]), slice(low[1], high[1])), even_odd(polygon - low, high - low)


def even_odd(polygon: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """Pixels ``(column, row)`` whose centres are inside one closed polygon ``(n, 2)`` by the even-odd rule."""
    columns, rows = shape
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    # of each edge the rows whose centre line it crosses, its upper end included and its lower end not
    first, last = np.ceil(np.minimum(y0, y1)), np.ceil(np.maximum(y0, y1))
    first, last = np.clip(first, 0, rows).astype(int), np.clip(last, 0, rows).astype(int)
    counts = last - first
    edge = np.repeat(np.arange(len(polygon)), counts)
    row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + first[edge]
    crossing = x0[edge] + (row - y0[edge]) * (x1 - x0)[edge] / (y1 - y0)[edge]
    toggles = np.zeros((columns + 1, rows), np.int64)
    np.add.at(toggles, (np.clip(np.ceil(crossing), 0, columns).astype(int), row), 1)
    return np.asarray(np.cumsum(toggles, axis=0)[:columns] % 2 == 1)
