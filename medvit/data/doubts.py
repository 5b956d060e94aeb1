"""What does not fit together in files that make a volume all the same: a person should look before it is trusted.

Damage to one file of many leaves the others sound, and one slice that left its series at an end leaves no gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medvit.data.attributes import Attributes
from medvit.data.slices import SAME_POSITION_MM, Plane

# What scanners write alike into all files of a series. A value that differs is legal and changes what is read.
TAGS = ("Modality", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation")
_SCALE = ("RescaleSlope", "RescaleIntercept")
_SHARED = ("FrameOfReferenceUID", "SOPClassUID")
_FEW = 2  # images; more in a row are a stack of their own


def alike(ds: Attributes) -> tuple[str, ...]:
    """Of one file what its series should agree on, in the order of :data:`TAGS`."""
    return tuple("" if (value := ds.get(keyword)) is None else str(value).strip() for keyword in TAGS)


def disagreements(files: Sequence[tuple[str, ...]], scales: Sequence[tuple[float | None, ...]]) -> tuple[str, ...]:
    """A note on what images of one series should agree on and do not.

    Args:
        files: what :func:`alike` has of each file.
        scales: slope and intercept of each image, None where it has none. In CT one scale for all is the rule;
            elsewhere that there is one.
    """
    differing = [TAGS[n] for n, values in enumerate(zip(*files, strict=True)) if len(set(values)) > 1]
    for name, values in zip(_SCALE, zip(*scales, strict=True), strict=False):
        known = {value if "CT" in files[0][:1] else value is None for value in values}
        differing += [name] if len(known) > 1 else []
    if not differing:
        return ()
    return (f"its images disagree on {', '.join(differing)}: one may be damaged, or of another series",)


def set_apart(
    groups: Sequence[tuple[Plane | None, int, tuple[object, ...]]], uids: Sequence[tuple[str, str]]
) -> list[tuple[str, ...]]:
    """Notes on groups of one series that are alike but for what all of a series should share, for each group.

    Args:
        groups: a place, the number of images, and what else tells groups apart. For one or two images there are
            :func:`strays`.
        uids: FrameOfReferenceUID and SOPClassUID of each.
    """
    notes: list[tuple[str, ...]] = [()] * len(groups)
    many = [(n, plane, known) for n, (plane, count, known) in enumerate(groups) if plane and count > _FEW]
    for n, plane, known in many:
        differing: dict[str, None] = {}
        for m, place, other in many:
            names = [name for name, a, b in zip(_SHARED, uids[n], uids[m], strict=True) if a != b]
            if names and known == other and plane.is_like(place):
                differing |= dict.fromkeys(names)
        if differing:
            what = " or ".join(differing)
            notes[n] = (f"its series has more images like these, which are left out, since their {what} is another",)
    return notes


def strays(groups: Sequence[Sequence[tuple[Path, Plane]]]) -> list[tuple[str, ...]]:
    """Notes on images outside a stack that lie exactly where a slice of it would, for each group.

    Args:
        groups: files and places of images that were taken together. One or two images in the folder of a larger group
            are looked at.
    """
    notes: list[tuple[str, ...]] = [()] * len(groups)
    few = [(n, file, plane) for n, group in enumerate(groups) if len(group) <= _FEW for file, plane in group]
    if not few:
        return notes
    places = np.array([plane.position for _, _, plane in few])
    for n, group in enumerate(groups):
        folders = {file.parent for file, _ in group}
        next_to = [few[m] for m in _continuing([plane for _, plane in group], places)]
        found = [(m, file) for m, file, _ in next_to if len(groups[m]) < len(group) and file.parent in folders]
        for m, _ in found:
            notes[m] = ("it lies exactly where a slice of another series in its folder would, and may be one",)
        if found:
            names = ", ".join(file.name for _, file in found)
            notes[n] += (
                f"{names}, which does not share its tags, lies exactly where a slice is missing or the next one "
                "would be; if it is one, the volume is a slice short",
            )
    return notes


def _continuing(planes: Sequence[Plane], places: np.ndarray) -> list[int]:
    """Which of ``places`` (n, 3) lie in a gap of the stack of ``planes``, or one step before or behind it."""
    if len(planes) < 2:
        return []
    normal = np.cross(planes[0].across, planes[0].down)
    positions = np.array([plane.position for plane in planes])
    positions = positions[np.argsort(positions @ normal, kind="stable")]
    positions = positions[np.diff(positions @ normal, prepend=-np.inf) > SAME_POSITION_MM]
    if len(positions) < 2:
        return []
    steps = np.diff(positions @ normal)
    count = max(round(float(steps.sum() / np.median(steps))), 1)  # from the first to the last
    step = (positions[-1] - positions[0]) / count
    taken, numbers = (np.rint((some - positions[0]) @ step / (step @ step)) for some in (positions, places))
    off = np.linalg.norm(places - positions[0] - numbers[:, None] * step, axis=1)
    near = off <= max(0.02, 0.01 * float(np.linalg.norm(step)))
    free = (numbers >= -1) & (numbers <= count + 1) & ~np.isin(numbers, taken)
    return [int(n) for n in np.flatnonzero(near & free)]
