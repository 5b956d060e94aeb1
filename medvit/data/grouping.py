"""Which images of DICOM files may form volumes together, before anything is said of their places in order."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from medvit.data import doubts
from medvit.data.frames import Frame
from medvit.data.headers import Header
from medvit.data.pixels import decode
from medvit.errors import MedvitError

Image = tuple[Header, Frame]
_AGREED = ("frame_of_reference", "sop_class", "series_number")
_ANY_MATRIX = ("truncated", "unknown-class")  # defects by which a matrix is not to be trusted


@dataclass(frozen=True)
class Group:
    """Images of one series that may form volumes together, and broken files that may have been slices of them.

    ``notes`` are what a person should know of how they were grouped.
    """

    images: tuple[Image, ...]
    broken: tuple[Header, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def first(self) -> Header:
        """A header that stands for all of them."""
        return self.images[0][0] if self.images else self.broken[0]

    @property
    def headers(self) -> tuple[Header, ...]:
        """Of each file once, the broken ones last."""
        return tuple({header.path: header for header in (*(h for h, _ in self.images), *self.broken)}.values())


def group_series(headers: Iterable[Header]) -> list[Group]:
    """Images that may form volumes together, sorted by their first file.

    Grouped by study and series UID, then split by matrix, frame of reference, kind of image, orientation and pixel
    spacing, so that scouts do not mix with the series they were made for; by series number too, which tells series
    apart whose UIDs are missing or were all made one. A broken file joins the largest group of its series: a slice that
    is lost must be seen. Flat images are groups of their own.
    """
    by_uid: dict[tuple[str, str], list[Header]] = defaultdict(list)
    for header in sorted(headers, key=lambda h: h.path):
        by_uid[header.study_uid, header.series_uid or f"folder {header.path.parent}"].append(header)
    groups: list[Group] = []
    for members in by_uid.values():
        groups += _split(members)
    places = [[(header.path, frame.plane) for header, frame in group.images if frame.plane] for group in groups]
    strays = doubts.strays(places)
    groups = [replace(group, notes=group.notes + notes) for group, notes in zip(groups, strays, strict=True)]
    return sorted(groups, key=lambda group: group.headers[0].path)


def _split(members: Sequence[Header]) -> list[Group]:
    """Split one series UID by what slices of one volume must share."""
    members = _in_one_frame(members)
    clusters: dict[Any, list[list[Image]]] = defaultdict(list)
    values = {name: {value for one in members if (value := getattr(one, name))} for name in _AGREED}
    agreed = {name: some.pop() for name, some in values.items() if len(some) == 1}
    for header in members:
        kind = _kind(header, agreed)
        for frame in () if header.defect else header.frames:
            _join(clusters[kind], (header, frame))
    groups = [Group(tuple(cluster)) for alike in clusters.values() for cluster in alike]
    shared = [(g.first.plane, len(g.images), (g.first.series_number, g.first.localizer)) for g in groups]
    uids = [(g.first.frame_of_reference or "", g.first.sop_class) for g in groups]
    groups = [replace(group, notes=notes) for group, notes in zip(groups, doubts.set_apart(shared, uids), strict=True)]
    kinds: dict[Any, list[Header]] = defaultdict(list)
    for header in members:
        if header.defect:
            home = _home(header, groups)
            if home is None:
                kinds[header.matrix, header.defect[0], header.localizer].append(header)
            else:
                groups[home] = replace(groups[home], broken=(*groups[home].broken, header))
    return groups + [Group((), tuple(broken)) for broken in kinds.values()]


def _in_one_frame(members: Sequence[Header]) -> Sequence[Header]:
    """The files without their frames of reference if each has one of its own, as some anonymisation leaves them."""
    frames = {header.frame_of_reference for header in members}
    if None in frames or len(frames) < max(3, len(members)) or any(h.flat or len(h.frames) > 1 for h in members):
        return members
    note = "each of its files has a FrameOfReferenceUID of its own; their positions were taken to be in one frame"
    return [replace(header, frame_of_reference=None, notes=(*header.notes, note)) for header in members]


def _kind(header: Header, agreed: dict[str, str]) -> tuple[object, ...]:
    """What images of one volume share; a file that does not say is taken to agree where all others agree."""
    alone = header.path if header.flat else None
    shared = (agreed.get(name, getattr(header, name)) for name in _AGREED)
    return header.matrix, *shared, header.localizer, header.mosaic, alone


def _join(clusters: list[list[Image]], image: Image) -> None:
    plane = image[1].plane
    for cluster in clusters:
        first = cluster[0][1].plane
        if plane is None or first is None or plane.is_like(first):
            cluster.append(image)
            return
    clusters.append([image])


def _home(header: Header, groups: Sequence[Group]) -> int | None:
    """Number of the group that a broken file was probably a part of."""
    homes = [n for n, group in enumerate(groups) if group.first.matrix == header.matrix]
    homes = [n for n in homes if groups[n].first.series_number == header.series_number] or homes
    if not homes and header.defect and (header.defect[0] in _ANY_MATRIX or 0 in header.matrix):
        homes = list(range(len(groups)))
    return max(homes, key=lambda n: len(groups[n].images), default=None)


def without_duplicates(group: Group) -> tuple[Group, tuple[Path, ...]]:
    """The group without copies of a file: same place, same labels and time, and same pixels; and these copies.

    Pixels are read for suspects only. Copies may be compressed otherwise, or have new instance UIDs.
    """
    suspects: dict[Any, list[Header]] = defaultdict(list)
    for header in {header.path: header for header, _ in group.images}.values():
        first = header.frames[0]
        place = first.plane and first.plane.position
        time = first.written if first.time is None else first.time
        suspects[place, first.labels, time, len(header.frames)].append(header)
    dropped: dict[Path, None] = {}  # in order, and quick to ask
    for copies in suspects.values():
        if len(copies) > 1 and copies[0].plane:
            seen: set[bytes] = set()
            for header in copies:
                pixels = _digest(header.path)
                if pixels is not None and pixels in seen:
                    dropped[header.path] = None
                elif pixels is not None:
                    seen.add(pixels)
    kept = tuple((header, frame) for header, frame in group.images if header.path not in dropped)
    return (replace(group, images=kept) if dropped else group), tuple(dropped)


def duplicates_note(dropped: Sequence[Path]) -> str:
    """What to say of copies that :func:`without_duplicates` dropped."""
    return f"duplicates of other files ignored: {len(dropped)} ({dropped[0].name}{', ...' if len(dropped) > 1 else ''})"


def _digest(path: Path) -> bytes | None:
    """Of all values of a file, None if they cannot be read: what is corrupt is no proven copy."""
    try:
        pixels = decode(path)
        digest = hashlib.sha256()
        for number in range(pixels.shape[0]):
            digest.update(pixels.rescaled(number).tobytes())
        return digest.digest()
    except MedvitError:
        return None


def describe(header: Header) -> str:
    """A series in a few words, e.g. ``series 3 "T1 test" (MR, 64 x 64)``."""
    number = "series" if header.series_number is None else f"series {header.series_number}"
    description = f' "{header.description}"' if header.description else ""
    return f"{number}{description} ({header.modality or 'no modality'}, {header.matrix[1]} x {header.matrix[0]})"
