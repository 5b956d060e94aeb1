"""Studies in ``.zip``, ``.tar`` and ``.tar.gz`` files, unpacked for as long as they are needed; DICOMDIRs."""

from __future__ import annotations

import shutil
import stat
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import pydicom
from pydicom.multival import MultiValue

from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz")

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_GZIP = b"\x1f\x8b"
_MAX_MEMBERS = 1_000_000
_MAX_RATIO = 200  # of bytes unpacked to bytes packed, once there are many: label maps reach some 500, studies 20
_HARMLESS = 1 << 30  # bytes that may come of any archive
_SPARE = 1 << 30  # bytes that stay free on the disk of temporary files
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Unpacked:
    """What came out of an archive.

    Args:
        archive: the archive.
        folder: temporary; holds one folder, named as the archive without its extension, with the members in their
            folders: names of outputs relative to ``folder`` begin with the archive's name.
        problems: members that could not be unpacked, by their names in the archive.
    """

    archive: Path
    folder: Path
    problems: tuple[UnreadableSeries, ...]

    def original(self, file: Path) -> Path:
        """What to call an unpacked file in messages and records: the archive's path with the member's behind it."""
        return self.archive.joinpath(*file.relative_to(self.folder).parts[1:])


def is_archive(path: Path, start: bytes) -> bool:
    """True if a file is an archive of files, by its name and its first 262 bytes or more.

    By both: documents, Python packages and arrays are zip files too.
    """
    name = path.name.lower()
    if name.endswith(".zip"):
        return start.startswith(_ZIP)
    return name.endswith(SUFFIXES) and (start.startswith(_GZIP) or start[257:262] == b"ustar")


def stem(path: Path) -> str:
    """File name without the extension of an archive, of one or two parts."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)] or path.name
    return path.name


@contextmanager
def unpacked(path: str | Path, *, progress: Callable[[int], None] | None = None) -> Iterator[Unpacked]:
    """Unpack an archive to a temporary folder, which is gone when the block ends.

    Only regular files are made, with names inside the folder, neither executable nor links. Archives inside the archive
    are not unpacked, but named as problems, and so are links, damaged and encrypted members and names that come twice.

    Args:
        path: the archive.
        progress: called with the number of members unpacked so far.

    Raises:
        UnreadableFile: no archive, damaged as a whole, or no room to unpack it.
        UnreadableSeries: ``unsafe-archive``: a member would leave the folder; ``too-large``: it unpacks to more than
            the disk holds, or to so much more than its own size that it was made to do harm; ``encrypted``: all of it.
    """
    path = Path(path)
    with tempfile.TemporaryDirectory(prefix="medvit-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            work = _Work(path, folder / stem(path), progress)
            work.root.mkdir()
            with path.open("rb") as file:
                packed = file.read(4) in _ZIP
            (_unzip if packed else _untar)(work)
        except MedvitError:
            raise
        except OSError as error:
            if isinstance(error, tarfile.TarError) or not error.errno:
                raise UnreadableFile(path, _DAMAGED) from error
            raise UnreadableFile(path, f"cannot be unpacked: {error.strerror}") from error
        except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, ValueError) as error:
            raise UnreadableFile(path, _DAMAGED) from error
        yield Unpacked(path, folder, tuple(work.problems))


def missing_of_dicomdir(path: str | Path) -> list[Path]:
    """Files that a DICOMDIR lists and that are not there; names may differ in case, as on CDs. Never raises."""
    path = Path(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            records = pydicom.dcmread(path, force=True).get("DirectoryRecordSequence") or ()
            listed = [record.get("ReferencedFileID") for record in records]
        parts = [tuple(str(part) for part in (one if isinstance(one, MultiValue) else [one])) for one in listed if one]
        present: dict[Path, dict[str, Path]] = {}
        return [path.parent.joinpath(*names) for names in dict.fromkeys(parts) if not _exists(path, names, present)]
    except Exception:  # a corrupt directory can raise nearly anything from inside pydicom
        return []


def _exists(dicomdir: Path, names: tuple[str, ...], present: dict[Path, dict[str, Path]]) -> bool:
    place = dicomdir.parent
    for name in names:
        if place not in present:
            present[place] = {entry.name.casefold(): entry for entry in place.iterdir()} if place.is_dir() else {}
        found = present[place].get(name.casefold())
        if found is None:
            return False
        place = found
    return place.is_file()


# ---- unpacking

_DAMAGED = "a damaged archive, or none; get it again"


class _Work:
    """One archive on its way to a folder: what was written, and what could not be."""

    def __init__(self, path: Path, root: Path, progress: Callable[[int], None] | None):
        self.path, self.root, self.progress = path, root, progress
        self.problems: list[UnreadableSeries] = []
        self._members = self._bytes = 0
        self._packed = path.stat().st_size
        self._most = shutil.disk_usage(root.parent).free - _SPARE

    def place(self, name: str) -> Path:
        """Where a member goes; refuses the whole archive for a name that leads elsewhere."""
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if not parts or parts[0] == "/" or ".." in parts or ":" in parts[0] or "\0" in name:
            reason = f"one of its members is to be written to {name[:80]!r}, outside its folder; do not trust it"
            raise UnreadableSeries(self.path, "unsafe-archive", reason)
        return self.root.joinpath(*parts)

    def problem(self, name: str, code: str, reason: str) -> None:
        self.problems.append(UnreadableSeries(f"{self.path}/{name}", code, reason))

    def expect(self, count: int) -> None:
        """Refuse before it is written what will be too much."""
        if count > self._most:
            reason = f"it unpacks to {count} bytes, but {max(self._most, 0)} are free for temporary files"
            raise UnreadableSeries(self.path, "too-large", f"{reason}; make room or unpack it elsewhere")
        if count > _HARMLESS and count > _MAX_RATIO * self._packed:
            reason = f"its {self._packed} bytes unpack to {count} or more, over {_MAX_RATIO} times as many"
            raise UnreadableSeries(self.path, "too-large", f"{reason}; if you trust it, unpack it yourself")

    def write(self, name: str, source: IO[bytes]) -> None:
        """Copy one member; what is read counts, whatever the archive says about sizes."""
        self._members += 1
        if self._members > _MAX_MEMBERS:
            reason = f"it has more than {_MAX_MEMBERS} members; if you trust it, unpack it yourself"
            raise UnreadableSeries(self.path, "too-large", reason)
        target = self.place(name)
        if target.exists():
            self.problem(name, "duplicate-member", "its name comes twice in the archive; only the first was read")
            return
        block = source.read(_BLOCK)
        if is_archive(target, block):
            self.problem(name, "nested-archive", "an archive inside an archive; unpack the outer one yourself")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            while block:
                self._bytes += len(block)
                self.expect(self._bytes)
                file.write(block)
                block = source.read(_BLOCK)
        if self.progress is not None:
            self.progress(self._members)


def _unzip(work: _Work) -> None:
    with zipfile.ZipFile(work.path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        for member in members:
            work.place(member.filename)
        work.expect(sum(member.file_size for member in members))
        if members and all(member.flag_bits & 1 for member in members):
            raise UnreadableSeries(work.path, "encrypted", "it is encrypted; unpack it yourself, with its password")
        for member in members:
            if member.flag_bits & 1:
                work.problem(member.filename, "encrypted", "it is encrypted; unpack it yourself, with its password")
            elif stat.S_ISLNK(member.external_attr >> 16):
                work.problem(member.filename, "link", "a link and no file; pack the file itself")
            else:
                _copy(work, member.filename, lambda member=member: archive.open(member))  # type: ignore[misc]


def _untar(work: _Work) -> None:
    with tarfile.open(work.path, "r:*") as archive:
        for member in archive:
            work.place(member.name)
            if member.isdir():
                continue
            if not member.isreg():
                work.problem(member.name, "link", "a link or device and no file; pack the file itself")
                continue
            _copy(work, member.name, lambda member=member: archive.extractfile(member))  # type: ignore[misc]
        # tarfile takes a damaged header, and the end of a file that was cut short, for the end of the archive
        rest: Any = archive.fileobj
        rest.seek(archive.offset)
        if rest.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UnreadableFile(work.path, "the archive is damaged or cut short: its end is missing; get it again")
        while rest.read(_BLOCK):  # to the checksum of gzip
            pass


def _copy(work: _Work, name: str, open_member: Callable[[], Any]) -> None:
    """Unpack one member; one that is damaged costs only itself."""
    try:
        with open_member() as source:
            work.write(name, source)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        work.place(name).unlink(missing_ok=True)
        work.problem(name, "unreadable", f"damaged, or packed in an unknown way ({type(error).__name__}); get it again")
