"""Files that cannot be read, and the series that may miss them: a lost first or last slice leaves no gap to be seen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medvit.data.grouping import Group

_SERIES_UID = re.compile(rb"\x20\x00\x0e\x00(?:UI..|..\x00\x00)([0-9.]{3,64})", re.DOTALL)
_NUMBER = re.compile(r"\b(?=[a-f]*[0-9])[0-9a-f]+\b|[0-9]+")
_HEAD = 1 << 16  # bytes in which the UID stands, if at all


@dataclass(frozen=True)
class _Lost:
    path: Path
    series_uid: str


class LostFiles:
    """The unreadable files of an inventory.

    Args:
        paths: of files that may have been DICOM images.
        groups: all images that were read.
    """

    def __init__(self, paths: Iterable[Path], groups: Sequence[Group]):
        self._files: dict[Path, list[_Lost]] = defaultdict(list)
        for path in paths:
            self._files[path.parent].append(_Lost(path, _series_uid(path)))
        some = groups if self._files else ()
        self._known = {group.first.series_uid for group in some} - {""}
        self._named = Counter(name for group in some for name in _names(group))  # how many have files named so

    def of(self, group: Group) -> tuple[list[Path], list[Path]]:
        """Files that a group probably misses, and files that it may miss though others may as well.

        A file belongs where the UID it still shows says; where that is gone, to files beside it that are named alike. A
        UID that no series has may be a damaged one, or that of a series which is lost as a whole. Images that are
        complete in one file miss nothing.
        """
        complete = group.first.flat or group.first.mosaic or any(len(header.frames) > 1 for header in group.headers)
        probable: list[Path] = []
        possible: list[Path] = []
        if complete or not self._files:
            return probable, possible
        named = _names(group)
        for folder in sorted({header.path.parent for header in group.headers}):
            for lost in self._files.get(folder, ()):
                name = (folder, name_pattern(lost.path))
                if lost.series_uid in self._known:
                    probable += [lost.path] if lost.series_uid == group.first.series_uid else []
                elif name in named:
                    alone = not lost.series_uid and self._named[name] == 1
                    (probable if alone else possible).append(lost.path)
        return probable, possible


def _series_uid(path: Path) -> str:
    """The SeriesInstanceUID in a damaged file, ``""`` where none is left."""
    try:
        with path.open("rb") as file:
            found = _SERIES_UID.search(file.read(_HEAD))
    except OSError:
        return ""
    return found[1].decode() if found else ""


def _names(group: Group) -> set[tuple[Path, str]]:
    return {(header.path.parent, name_pattern(header.path)) for header in group.headers}


def name_pattern(path: Path) -> str:
    """What files of one series have in common in their names: all but numbers, hexadecimal ones too."""
    return _NUMBER.sub("#", path.name.lower())
