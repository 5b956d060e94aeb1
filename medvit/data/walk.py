"""Every file below some paths, each once, through symbolic links."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from medvit.errors import NothingFound, OutputError

_MANIFEST = "manifest.jsonl"
_STAGING = ".medvit-"  # folders that an interrupted run left behind


@dataclass(frozen=True)
class Found:
    """One file, the input it was found under, the manifest of the run that made it; whether an archive held it."""

    path: Path
    base: Path
    manifest: Path | None = None
    archived: bool = False


def is_folder(path: Path) -> bool:
    """True for a folder; unlike ``Path.is_dir`` False, and no exception, for a link to where there is no access."""
    return os.path.isdir(path)  # noqa: PTH112


def absolute(inputs: str | Path | Iterable[str | Path], exclude: str | Path | None) -> list[Path]:
    """The inputs as absolute paths, so that those of one series have a common folder.

    Raises:
        NothingFound: an input path does not exist.
        OutputError: ``exclude`` is an input.
    """
    given = [Path(inputs)] if isinstance(inputs, str | Path) else [Path(path) for path in inputs]
    for path in given:
        if not os.path.lexists(path):
            raise NothingFound(f"{path}: no such file or folder")
        if exclude is not None and path.resolve() == Path(exclude).resolve():
            raise OutputError(f"{exclude}: is an input too; choose another output folder, inside it if you like")
    return [path.absolute() for path in given]


def files_of(paths: Iterable[Path], exclude: str | Path | None = None) -> Iterator[Found]:
    """Files below ``paths``, each once and each folder once, in sorted order, and folders that cannot be listed.

    Args:
        paths: files and folders, absolute.
        exclude: a folder that is not entered.
    """
    seen_files: set[Path] = set()
    seen_folders: set[tuple[int, int]] = set()
    results: dict[Path, Path] = {}
    if exclude is not None and is_folder(Path(exclude)):
        status = Path(exclude).stat()
        seen_folders.add((status.st_dev, status.st_ino))
    for path in paths:
        if not is_folder(path):
            candidates: Iterable[Path] = [path]
            base = path.parent
        else:
            candidates, base = _walk(path, seen_folders, results), path
        for file in candidates:
            if file not in seen_files:
                seen_files.add(file)
                yield Found(file, base, results.get(file))


def _walk(folder: Path, seen: set[tuple[int, int]], results: dict[Path, Path]) -> Iterator[Path]:
    """Files below ``folder``, and folders that cannot be listed; manifests on the way are added to ``results``."""
    closed: list[OSError] = []
    for root, folders, names in os.walk(folder, followlinks=True, onerror=closed.append):
        status = Path(root).stat()
        if (status.st_dev, status.st_ino) in seen:  # a link back up, an input inside another, or excluded
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(_STAGING))
        if _MANIFEST in names:
            manifest = Path(root) / _MANIFEST
            results.update(dict.fromkeys(_outputs(manifest), manifest))
        for name in sorted(names):
            yield Path(root) / name
    yield from (Path(str(error.filename)) for error in closed)


def _outputs(manifest: Path) -> Iterator[Path]:
    """Files that the records of a run name as its outputs; lines that are none of such records do not count."""
    try:
        if not manifest.is_file():  # a pipe would block for ever
            return
        lines = manifest.read_bytes().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            outputs = json.loads(line)["outputs"]
            yield from [manifest.parent / output for output in outputs]
        except (ValueError, KeyError, TypeError, RecursionError):  # failed cases have no outputs; damaged lines
            continue
