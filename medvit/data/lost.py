"""Files that cannot be read, and the series that may miss them: a lost first or last slice leaves no gap to be seen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from medvit.data.dicom import Group

_SERIES_UID = re.compile(rb"\x20\x00\x0e\x00(?:UI..|..\x00\x00)([0-9.]{3,64})", re.DOTALL)
_HEAD = 1 << 16  # bytes in which the UID stands, if at all


@dataclass(frozen=True)
class _Lost:
    path: Path
    series_uid: str


class LostFiles:
    """The unreadable files of an inventory.

    Args:
        paths: of files that may have been DICOM images.
    """

    def __init__(self, paths: Iterable[Path]):
        self._files: dict[Path, list[_Lost]] = {}
        for path in paths:
            self._files.setdefault(path.parent, []).append(_Lost(path, _series_uid(path)))

    def of(self, group: Group, groups: Sequence[Group]) -> tuple[list[Path], list[Path]]:
        """Files that a group probably misses, and files that it may miss though others of ``groups`` may as well.

        A file belongs where the UID it still shows says; one that shows none, where files beside it are named alike.
        Images that are complete in one file miss nothing.
        """
        if group.first.flat or group.first.mosaic or any(len(header.frames) > 1 for header in group.headers):
            return [], []
        probable: list[Path] = []
        possible: list[Path] = []
        for folder in sorted({header.path.parent for header in group.headers}):
            for lost in self._files.get(folder, ()):
                if lost.series_uid:
                    probable += [lost.path] if lost.series_uid == group.first.series_uid else []
                elif _has_alike(group, lost.path):
                    alone = sum(_has_alike(other, lost.path) for other in groups) == 1
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


def _has_alike(group: Group, path: Path) -> bool:
    """Whether files of the group lie beside ``path`` with the same name but for its numbers."""
    pattern = _pattern(path)
    return any(header.path.parent == path.parent and _pattern(header.path) == pattern for header in group.headers)


def _pattern(path: Path) -> str:
    return re.sub(r"[0-9]+", "#", path.name.lower())
