"""What is in a folder: every image series and every file that is none, found by content and from headers only."""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from medvit.data import archives, dicom, grouping, itk, nifti, raster
from medvit.data.frames import Label
from medvit.data.headers import Header, NotAnImage, looks_like_dicom, read_header
from medvit.data.lost import LostFiles, name_pattern
from medvit.data.regrid import AS_IT_IS, Repairs
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.data.walk import Found, absolute, files_of
from medvit.data.walk import is_folder as is_folder
from medvit.data.workers import Workers
from medvit.errors import MedvitError, UnreadableFile

_DICOM_SUFFIXES = (".dcm", ".dicom", ".ima")
_JUNK = ("._", ".ds_store", "thumbs.db", "desktop.ini")
_BLANK = "nothing in it but zero bytes"
_UNKNOWN = "no DICOM, NIfTI, NRRD, MetaImage, PNG, JPEG, TIFF or BMP file"
_START = 262  # bytes at the beginning of a file that tell what it is; of tar archives the last five of them


class _Archive:
    """An archive that stays unpacked as long as anything refers to this object."""

    def __init__(self, path: Path):
        stack = ExitStack()
        self.unpacked = stack.enter_context(archives.unpacked(path))
        weakref.finalize(self, stack.close)


@dataclass(frozen=True)
class Series:
    """One candidate image, known from headers: a volume, or a 2D image that needs no place in a patient.

    Args:
        kind: ``"dicom"``, ``"nifti"``, ``"itk"`` or ``"raster"`` (a photograph); by its name for a file that cannot be
            opened.
        files: in slice order for DICOM whose geometry is proven, else sorted by path. Those of an ``incomplete`` series
            end with the unreadable files beside it, so that reading them fails as :meth:`read` does.
        name: stem for outputs, unique in its inventory; mirrors the input tree with ``/``. Folder and file names are
            kept as they are; no tag that identifies a patient is used.
        modality, description, study_uid, series_uid: from DICOM; ``""`` where unknown.
        space: its grid, None when it cannot be proven.
        problem: why it cannot be used as a volume, photograph or projection, None if it can (as far as headers tell).
        notes: what a person should know, one sentence each.
        channels: values per voxel: 3 for photographs in colour.
        base: the name of all volumes of its series or file.
        volume, volumes: the number of this volume, from 0, and how many there are of them.
        parameters: what tells it from these, such as ``echo_time_ms``; see :data:`medvit.data.frames.LABELS`.
        placed: False for DICOM images without a place in the patient (projections, captures).
        time_step: seconds from one volume to the next, None if unknown.
    """

    kind: str
    files: tuple[Path, ...]
    name: str
    modality: str = ""
    description: str = ""
    study_uid: str = ""
    series_uid: str = ""
    space: Space | None = None
    problem: MedvitError | None = None
    notes: tuple[str, ...] = ()
    channels: int = 1
    base: str = ""
    volume: int = 0
    volumes: int = 1
    parameters: dict[str, Label] = field(default_factory=dict)
    placed: bool = True
    time_step: float | None = None
    assembly: dicom.Assembly | None = field(default=None, repr=False)
    archive: _Archive | None = field(default=None, repr=False)

    def read(self) -> Volume:
        """Read the voxels; raises ``problem`` if there is one, else what the format's reader raises."""
        if self.problem is not None:
            raise self.problem
        if self.assembly is not None:
            source = Source("dicom", (), self.modality, self.study_uid, self.series_uid, self.name)
            volume = self.assembly.load(source)
        elif self.kind == "nifti":
            volume = nifti.read_nifti(self.files[0], self.name, self.volume if self.volumes > 1 else None)
        elif self.kind == "itk":
            volume = itk.read_itk(self.files[0], self.name)
        else:
            volume = raster.read_raster(self.files[0], self.name)
        return replace(volume, notes=tuple(dict.fromkeys((*self.notes, *volume.notes))))

    @property
    def origins(self) -> tuple[Path, ...]:
        """Every file once; those of an archive by the archive's path and their names in it."""
        files = dict.fromkeys(self.files)
        return tuple(self.archive.unpacked.original(file) for file in files) if self.archive else tuple(files)


@dataclass(frozen=True)
class SetAside:
    """A file that is no candidate.

    ``not-an-image``, ``localizer``, ``duplicate``, ``archive`` (its members are candidates), ``result`` of an earlier
    run.
    """

    path: Path
    code: str
    reason: str


@dataclass(frozen=True)
class Inventory:
    """All that was found, both parts sorted: series by name, files by path."""

    series: tuple[Series, ...]
    set_aside: tuple[SetAside, ...]


_Entry = Header | Series | SetAside


def discover(
    inputs: str | Path | Iterable[str | Path],
    *,
    exclude: str | Path | None = None,
    progress: Callable[[int], None] | None = None,
    repairs: Repairs = AS_IT_IS,
    unpack: bool = False,
    processes: int | None = None,
) -> Inventory:
    """List the images in files and folder trees, by content and not by name, without reading pixels.

    Never raises for a bad file: a broken image, and a file or folder that cannot be opened, is a :class:`Series` with a
    ``problem``; anything else is set aside, as are the outputs that a ``manifest.jsonl`` below an input lists.
    Pixels are read only of DICOM files that claim to be copies of each other.

    Args:
        inputs: one path or several; folders are walked, through symbolic links too.
        exclude: a folder that is not entered, such as the one that results go to.
        progress: called with the number of files seen so far.
        repairs: what becomes of DICOM slices that are sheared or at uneven distances.
        unpack: look into archives (zip, tar); the files of their series are there as long as the series are.
        processes: how many share the work where there are thousands of files, see :class:`medvit.data.workers.Workers`.

    Raises:
        NothingFound: an input path does not exist.
        OutputError: ``exclude`` is an input.
    """
    found: dict[Path, Found] = {}
    origins: dict[Path, _Archive] = {}
    headers: list[Header] = []
    series: list[Series] = []
    set_aside: list[SetAside] = []
    with Workers(processes) as workers:
        entries = _entries(files_of(absolute(inputs, exclude), exclude), workers, origins if unpack else None)
        for count, (one, entry) in enumerate(entries, start=1):
            found[one.path] = one
            for part in entry if isinstance(entry, list) else [entry]:
                if isinstance(part, Header):
                    headers.append(part)
                elif isinstance(part, SetAside):
                    set_aside.append(part)
                else:
                    series.append(part)
            if progress is not None:
                progress(count)
    blank = _blank_slices(set_aside, headers)
    series += [_unreadable(found[path], "empty or damaged, among DICOM files named alike") for path in blank]
    broken = [one.files[0] for one in series if one.kind == "dicom"]
    named: list[tuple[str, Series | grouping.Group]] = [(one.name, one) for one in series if one.kind != "raster"]
    groups = grouping.group_series(headers)
    lost = LostFiles((path for path in broken if not is_folder(path)), groups)
    known = {aside.path for aside in set_aside}
    for group in groups:
        if group.first.localizer:
            scouts = {header.path for header in group.headers} - known
            known |= scouts
            set_aside += [SetAside(path, "localizer", "a scout image, made to plan others") for path in scouts]
        else:
            named.append((_dicom_name(group, found[group.first.path].base), group))
    volumes: list[Series] = []
    for name, candidate in _uniquely_named(named):
        if isinstance(candidate, Series):
            volumes += _each_volume(replace(candidate, name=name, base=name))
        else:
            kept, dropped = grouping.without_duplicates(candidate)
            set_aside += [SetAside(path, "duplicate", "a copy of another file") for path in dropped]
            volumes += _dicom_series(kept, name, lost.of(candidate), repairs, dropped)
    # x_v0 of a series x may be the name of another one
    volumes = [replace(one, name=name) for name, one in _uniquely_named([(one.name, one) for one in volumes])]
    # named after the volumes, whose names a picture beside them must not change
    pictures = _uniquely_named([(one.name, one) for one in series if one.kind == "raster"], [v.name for v in volumes])
    complete = sorted(
        [*volumes, *(replace(one, name=name) for name, one in pictures)], key=lambda one: _order(one.name)
    )
    kept_aside = [_with_origin(aside, origins) for aside in set_aside if aside.path not in blank]
    return Inventory(
        tuple(replace(one, archive=origins.get(one.files[0]), base=one.base or one.name) for one in complete),
        tuple(sorted(kept_aside, key=lambda aside: aside.path)),
    )


def _entries(
    files: Iterable[Found], workers: Workers, origins: dict[Path, _Archive] | None
) -> Iterator[tuple[Found, _Entry | list[_Entry]]]:
    """Every file with what it is, those of archives after the archive; ``origins`` learns which these came from."""
    for one, entry in workers.map(_examine, files):
        if origins is None and isinstance(entry, SetAside) and entry.code == "archive":
            entry = replace(entry, reason="an archive, which is not looked into here; unpack it first")
        if origins is None or not (isinstance(entry, SetAside) and entry.code == "archive"):
            yield one, entry
            continue
        try:
            archive = _Archive(one.path)
        except MedvitError as error:
            name = _relative(one.path.with_name(archives.stem(one.path)), one.base)
            yield one, Series("archive", (one.path,), name, problem=error)
            continue
        inside: list[_Entry] = [entry]
        for number, problem in enumerate(archive.unpacked.problems):
            name = _relative(one.path.with_name(f"{archives.stem(one.path)}_{number}"), one.base)
            inside.append(Series("archive", (one.path,), name, problem=problem))
        yield one, inside
        members = (replace(member, archived=True) for member in files_of([archive.unpacked.folder]))
        for member, what in workers.map(_examine, members):
            origins[member.path] = archive
            yield member, what


def _with_origin(aside: SetAside, origins: dict[Path, _Archive]) -> SetAside:
    archive = origins.get(aside.path)
    return replace(aside, path=archive.unpacked.original(aside.path)) if archive else aside


def is_photograph(path: Path, start: bytes) -> bool:
    """True if a file, by its first 132 bytes, is a photograph, and neither DICOM as well nor in place of a slice."""
    return (
        raster.sniff(start) is not None
        and start[128:132] != b"DICM"  # a TIFF may be
        and not path.name.lower().endswith(_DICOM_SUFFIXES)
    )


def _examine(found: Found) -> _Entry:
    """What one file is."""
    path = found.path
    lower = path.name.lower()
    if lower.startswith(_JUNK):
        return SetAside(path, "not-an-image", "a file of the operating system")
    if found.manifest is not None:
        return SetAside(path, "result", f"a result of an earlier run, listed in {found.manifest}")
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _unreadable(found, "the folder cannot be listed")
        if not stat.S_ISREG(mode):  # a pipe would block for ever
            return SetAside(path, "not-an-image", "not a regular file")
        with path.open("rb") as file:
            start = file.read(_START)
    except OSError as error:
        return _unreadable(found, f"cannot be opened: {error.strerror or error}")
    if archives.is_archive(path, start):
        reason = "an archive inside an archive" if found.archived else "an archive; its members are images of their own"
        return SetAside(path, "archive", reason)
    if start[128:132] != b"DICM" and lower.endswith((*nifti.SUFFIXES, *itk.SUFFIXES)):
        return _volume_series(found)
    if is_photograph(path, start):
        return _raster_series(found)
    if looks_like_dicom(start):
        try:
            return read_header(path)
        except NotAnImage as error:
            missing = archives.missing_of_dicomdir(path) if path.name.upper() == "DICOMDIR" else []
            if missing:
                reason = f"lists {len(missing)} files that are not there, such as {missing[0].name}; get them too"
                return _unreadable(found, reason)
            return SetAside(path, error.code, error.reason)
        except UnreadableFile as error:
            if start[128:132] == b"DICM":  # surely meant to be DICOM: a broken candidate, not a stray file
                return Series("dicom", (path,), _relative(path.with_suffix(""), found.base), problem=error)
    if lower.endswith(_DICOM_SUFFIXES):
        return _unreadable(found, "named like DICOM, but " + ("not DICOM inside" if start else "empty"))
    if lower.endswith(raster.SUFFIXES):
        inside = "no PNG, JPEG, TIFF or BMP inside" if start else "empty"
        return _unreadable(found, f"named like a photograph, but {inside}")
    return SetAside(
        path,
        "not-an-image",
        _UNKNOWN if start.strip(b"\0") else _BLANK,
    )


def _unreadable(found: Found, reason: str) -> Series:
    """A file that may be an image, or a folder that may hold some: it must count as a failure and not vanish."""
    lower = found.path.name.lower()
    kind = "nifti" if lower.endswith(nifti.SUFFIXES) else "raster" if lower.endswith(raster.SUFFIXES) else "dicom"
    problem = UnreadableFile(found.path, f"{reason}; get it again, or move it elsewhere if it is no image")
    return Series(kind, (found.path,), _relative(found.path, found.base), problem=problem)


def _blank_slices(set_aside: Iterable[SetAside], headers: Iterable[Header]) -> dict[Path, None]:
    """Files that are no image any more, but named like DICOM files in the same folder: lost slices.

    The same name but for its numbers; for files of zero bytes only, a number and the same extension will do.
    """

    def place(path: Path) -> tuple[Path, str]:
        # an extension has letters: of a name like 1.2.840.5 the last number is none
        return path.parent, path.suffix.lower() if any(c.isalpha() for c in path.suffix) else ""

    unknown = [aside for aside in set_aside if aside.reason in (_BLANK, _UNKNOWN)]
    if not unknown:
        return {}
    files = [header.path for header in headers]
    occupied = {place(path) for path in files}
    alike = {(path.parent, name_pattern(path)) for path in files}
    lost: dict[Path, None] = {}
    for aside in unknown:
        path = aside.path
        numbered = any(c.isdigit() for c in path.name)
        blank = aside.reason == _BLANK and place(path) in occupied
        if numbered and (blank or (path.parent, name_pattern(path)) in alike):
            lost[path] = None
    return lost


def _volume_series(found: Found) -> Series | SetAside:
    """A NIfTI, MetaImage or NRRD file, of one volume or several; voxels beside their header are set aside."""
    path = found.path
    known: nifti.NiftiHeader | itk.ItkHeader
    nifti_like = path.name.lower().endswith(nifti.SUFFIXES)
    kind = "nifti" if nifti_like else "itk"
    stem = path.with_name(nifti.stem(path)) if nifti_like else path.with_suffix("")
    name = _relative(stem, found.base)
    if path.name.lower().endswith((".img", ".img.gz")):
        header = path.with_name(path.name.replace(".img", ".hdr").replace(".IMG", ".HDR"))
        if header.exists():
            return SetAside(path, "not-an-image", f"the voxels of {header.name}")
    try:
        known = nifti.read_nifti_header(path) if nifti_like else itk.read_itk_header(path)
    except MedvitError as problem:
        return Series(kind, (path,), name, problem=problem)
    series = Series(kind, (path,), name, space=known.space, notes=known.notes)
    count = known.volumes if isinstance(known, nifti.NiftiHeader) else 1
    if not isinstance(known, nifti.NiftiHeader) or count == 1:
        return series
    return replace(series, volumes=count, time_step=known.time_step)


def _each_volume(series: Series) -> list[Series]:
    """A series for each volume of a file."""
    name, count = series.name, series.volumes
    if count == 1:
        return [series]
    return [
        replace(series, name=_numbered(name, n, count), volume=n, parameters={"time_point": float(n)})
        for n in range(count)
    ]


def _numbered(name: str, number: int, count: int) -> str:
    return f"{name}_v{number:0{len(str(count - 1))}d}" if count > 1 else name


def _raster_series(found: Found) -> Series:
    path = found.path
    name = _relative(path.with_name(raster.stem(path)), found.base)
    try:
        known = raster.read_raster_header(path)
    except MedvitError as problem:
        return Series("raster", (path,), name, problem=problem)
    return Series("raster", (path,), name, space=known.space, notes=known.notes, channels=known.channels)


def _dicom_name(group: grouping.Group, base: Path) -> str:
    first = group.first
    title = first.description or first.modality or ("" if first.series_number is not None else "series")
    parts = ["" if first.series_number is None else str(first.series_number), _sanitised(title)]
    try:
        folder = Path(os.path.commonpath([header.path.parent for header in group.headers]))
    except ValueError:  # on two drives
        folder = first.path.parent
    return _relative(folder / "_".join(part for part in parts if part), base)


def _dicom_series(
    group: grouping.Group, name: str, lost: tuple[list[Path], list[Path]], repairs: Repairs, dropped: Sequence[Path]
) -> list[Series]:
    first, (probable, possible) = group.first, lost
    found = dicom.assemble(group, name, probable, repairs)
    notes: tuple[str, ...] = (grouping.duplicates_note(dropped),) if dropped else ()
    if possible:
        names = ", ".join(path.name for path in possible[:3]) + (", ..." if len(possible) > 3 else "")
        notes += (f"files beside it cannot be read and may be its first or last slice: {len(possible)} ({names})",)
    if not first.series_uid:
        notes += ("no SeriesInstanceUID: those of its folder and SeriesNumber were taken together",)
    return [
        Series(
            "dicom",
            assembly.files,
            _numbered(name, number, len(found)),
            first.modality,
            first.description,
            first.study_uid,
            first.series_uid,
            assembly.space,
            assembly.problem,
            (*notes, *assembly.notes),
            3 if assembly.colour else 1,
            name,
            number,
            len(found),
            assembly.parameters,
            not assembly.flat,
            assembly=assembly,
        )
        for number, assembly in enumerate(found)
    ]


def _relative(path: Path, base: Path) -> str:
    if path != base and path.is_relative_to(base):
        return path.relative_to(base).as_posix()
    return path.name  # a series whose files lie under several inputs; a folder that cannot be listed


def _sanitised(text: str) -> str:
    """Letters, digits, dots and dashes of any script; runs of all else become one underscore. At most 64 characters."""
    kept = "".join(c if c.isalnum() or c in ".-" else " " for c in text)
    return "_".join(kept.split())[:64].strip("._")


_Named = TypeVar("_Named")


def _order(name: str) -> tuple[str, str]:
    return name.lower(), name


def _uniquely_named(named: Iterable[tuple[str, _Named]], used: Iterable[str] = ()) -> list[tuple[str, _Named]]:
    """Sort by name and number names that are equal to others or to ``used`` ones.

    So are names that differ in case only: some file systems do not see that.
    """
    ordered = sorted(named, key=lambda pair: _order(pair[0]))
    taken = {name.lower() for name, _ in ordered}
    seen = {name.lower() for name in used}
    latest: dict[str, int] = {}  # number of each name, to go on from
    result = []
    for name, one in ordered:
        unique, number = name, latest.get(name.lower(), 1)
        while unique.lower() in seen or (number > 1 and unique.lower() in taken):
            number += 1
            unique = f"{name}_{number}"
        latest[name.lower()] = number
        seen.add(unique.lower())
        result.append((unique, one))
    return result
