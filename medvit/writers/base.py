"""What every output format has in common: its name beside a stem, and a file that appears whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

from medvit.data.labels import LabelMap
from medvit.errors import OutputError


class Writer(Protocol):
    """One output format of a segmentation."""

    @property
    def suffix(self) -> str:
        """What is put behind a stem to name the file, e.g. ``"_seg.nii.gz"``."""
        ...

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write ``label_map`` to ``stem`` + :attr:`suffix`, creating folders as needed.

        Returns:
            The file, or None where the format does not apply to this source (a DICOM SEG of a NIfTI image).

        Raises:
            OutputError: it cannot be written, or exists and ``overwrite`` is False; what was there before is untouched.
        """
        ...


def with_suffix(stem: Path, suffix: str) -> Path:
    """``stem`` with ``suffix`` appended; dots in the stem stay, other than with :meth:`Path.with_suffix`."""
    return stem.with_name(stem.name + suffix)


@contextmanager
def atomic(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a temporary path beside ``path`` to write to; it takes the final name only when the block succeeds.

    The temporary file has no meaningful extension: say the format explicitly where a library guesses it from the name.

    Args:
        path: the final file; its folders are created.
        overwrite: replace an existing file. Without it, one that exists is left alone and the block is not entered.

    Raises:
        OutputError: the file exists, or the system refuses to create, write or rename it; names ``path``.
    """
    _refuse_existing(path, overwrite)
    part = path.with_name(f".medvit-{secrets.token_hex(8)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.touch(exist_ok=False)  # fail before the work, not after it
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())  # or a crash may leave the new name on an empty file
        _refuse_existing(path, overwrite)  # it may have appeared meanwhile
        part.replace(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"{path}: cannot be written ({reason}); choose a writable folder with free space") from error
    finally:
        with suppress(OSError):  # the folder may be gone, or never have been one; the error that led here says more
            part.unlink()


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and (path.is_dir() or not overwrite):
        what = "is a folder" if path.is_dir() else "exists already"
        raise OutputError(f"{path}: {what}; choose another output, or allow to overwrite files")
