"""NIfTI-1 and NIfTI-2 files (``.nii``, ``.nii.gz``, ``.hdr`` with ``.img``): headers through nibabel, all else checked.

nibabel mends odd headers without a word (a voxel size of 0 becomes 1 mm), so headers are taken as they are in the file.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import UnreadableFile, UnreadableSeries

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")

_GZIP = b"\x1f\x8b"
_MAX_GZIP_RATIO = 1032  # what deflate can do at most
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}  # xyzt_units & 7; 2 is mm, 0 unknown
_SECONDS = {8: 1.0, 16: 1e-3, 24: 1e-6}  # xyzt_units & 56
_CODES = range(6)  # of sform and qform: unknown, scanner, aligned, Talairach, MNI, another template
# Several values per voxel: matrices, vectors, points, triangles, quaternions, colours
_VECTOR_INTENTS = (1004, 1005, 1006, 1007, 1008, 1009, 1010, 2003, 2004)
_SHEAR = np.sin(np.radians(0.1))
_EXACT = 2**24  # float32 holds every whole number up to here
_KEPT = 1 << 30  # bytes of an unpacked file that stay in memory between two of its volumes


@dataclass(frozen=True)
class NiftiHeader:
    """A checked header.

    Args:
        voxels: the file with the voxels, of a pair the ``.img``.
        space: grid of one volume, three axes whatever the file has.
        notes: what a person should know, one sentence each.
        volumes: along the fourth axis, 1 for a 3D image.
        time_step: seconds from one volume to the next; None where the header does not say so.
    """

    voxels: Path
    space: Space
    notes: tuple[str, ...]
    volumes: int = 1
    time_step: float | None = None


@dataclass(frozen=True)
class _Layout:
    """How the voxels are packed: ``volumes`` times ``shape``, the first axis fastest."""

    shape: tuple[int, int, int]
    volumes: int
    dtype: np.dtype[Any]
    offset: int
    slope: float
    inter: float

    @property
    def end(self) -> int:
        """Bytes that the file must have, unpacked."""
        return self.offset + self.volumes * int(np.prod(self.shape, dtype=object)) * self.dtype.itemsize


def stem(path: Path) -> str:
    """File name without its NIfTI extension, of one or two parts; the whole name where nothing else would be left."""
    for suffix in sorted(SUFFIXES, key=len, reverse=True):
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)] or path.name
    return path.stem


def read_nifti_header(path: str | Path) -> NiftiHeader:
    """Check a file's header, without reading its voxels.

    The affine is the sform if its code is above 0, else the qform; its numbers are kept exactly as nibabel gives them.

    Raises:
        UnreadableFile: not NIfTI, corrupt, or shorter than its header promises.
        UnreadableSeries: ``singular-affine``, ``five-dimensional``, ``vectors``, ``colour``, ``complex``,
            ``pixel-type``, ``empty``, ``units``.
    """
    return _checked(Path(path))[0]


def read_nifti(path: str | Path, name: str = "", index: int | None = None) -> Volume:
    """Read one volume: ``(i, j, k)`` in the file's own order, float32, scaled by scl_slope and scl_inter.

    NaN and infinite voxels become 0, with a note that counts them. A packed file is read to its end, where its
    checksum is.

    Args:
        path: NIfTI file; for a pair, either of the two.
        name: stem for outputs.
        index: which volume of a 4D file, from 0; may be None where there is only one.

    Raises:
        UnreadableFile: as :func:`read_nifti_header`, and where the voxels end early.
        UnreadableSeries: as :func:`read_nifti_header`, ``four-dimensional`` for several volumes without ``index``, and
            ``not-finite`` when no voxel holds a finite number.
        ValueError: an ``index`` that the file does not have.
    """
    path = Path(path)
    known, layout = _checked(path)
    if index is None and known.volumes > 1:
        reason = f"one 3D volume is needed, but the file holds {known.volumes} of {known.space.shape} voxels"
        raise UnreadableSeries(path, "four-dimensional", f"{reason}; say which one (0 to {known.volumes - 1})")
    number = index or 0
    if not 0 <= number < known.volumes:
        raise ValueError(f"{path} has the volumes 0 to {known.volumes - 1}, got index={index}")
    stored, surplus = _stored(path, known.voxels, layout, number)
    array, rounded = as_float32(stored, layout.slope, layout.inter)
    notes = known.notes + surplus_note(surplus) + rounded + made_finite(path, array)
    frames = (number,) if known.volumes > 1 else ()
    return Volume(array, known.space, Source("nifti", (path,), name=name or stem(path), frames=frames), notes)


def as_float32(stored: np.ndarray, slope: float = 1, inter: float = 0) -> tuple[np.ndarray, tuple[str, ...]]:
    """``stored * slope + inter`` of ``(i, j, k)`` as float32, and a note on whole numbers that it cannot hold."""
    array, rounded = np.empty(stored.shape, np.float32, order="F"), 0
    scaled = (slope, inter) != (1, 0)
    with np.errstate(all="ignore"):  # what overflows becomes infinite, and is counted elsewhere
        for k in range(stored.shape[2]):
            plane = stored[..., k]
            array[..., k] = plane.astype(np.float64) * slope + inter if scaled else plane
            if not scaled and plane.dtype.kind in "iu" and plane.dtype.itemsize > 2:
                rounded += int(np.count_nonzero(array[..., k] != plane.astype(np.float64)))
    if not rounded:
        return array, ()
    return array, (f"{rounded} voxels hold whole numbers beyond {_EXACT}, which were rounded to 24 bits",)


def made_finite(path: Path, array: np.ndarray) -> tuple[str, ...]:
    """Set voxels that are NaN or infinite to 0, in place, and say how many they were.

    Raises:
        UnreadableSeries: ``not-finite``: all of them.
    """
    bad = array.size - sum(int(np.count_nonzero(np.isfinite(plane))) for plane in np.moveaxis(array, -1, 0))
    if bad == array.size:
        raise UnreadableSeries(
            path, "not-finite", f"none of its {bad} voxels holds a finite number; get the file again"
        )
    if not bad:
        return ()
    array[~np.isfinite(array)] = 0
    return (f"{bad} of {array.size} voxels were NaN or infinite and count as 0",)


# ---- the header


def raw_header(path: str | Path) -> Any:
    """The header as it is in a file, as nibabel's ``Nifti1Header`` or ``Nifti2Header``; nothing is mended or checked.

    Raises:
        UnreadableFile: as :func:`read_nifti_header`.
    """
    return _raw_header(Path(path))[0]


def _raw_header(path: Path) -> tuple[Any, Path, bool]:
    """The header as it is, its file, and whether the voxels follow it there."""
    home = _header_file(path)
    try:
        with _opened(home) as stream:
            raw, single = _parsed(path, stream)
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno:
            raise UnreadableFile(path, f"cannot be opened: {error.strerror}") from error
        reason = f"its gzip data end, or are corrupt, within the header ({type(error).__name__}); get it again"
        raise UnreadableFile(path, f"not a readable NIfTI file: {reason}") from error
    return raw, home, single


@np.errstate(all="ignore")  # numbers that are none are looked for, not stumbled over
def _checked(path: Path) -> tuple[NiftiHeader, _Layout]:
    raw, home, single = _raw_header(path)
    layout = _layout(path, raw, single)
    voxels = home if single else _voxel_file(path, home)
    notes = _check_size(path, voxels, layout)
    affine, more = _affine(path, raw, layout.shape)
    try:
        space = Space.from_affine(layout.shape, affine)
    except ValueError as error:
        raise UnreadableSeries(path, "singular-affine", f"{error}; repair its sform or qform") from error
    known = NiftiHeader(voxels, space, more + shear_note(space) + notes, layout.volumes, _time_step(raw))
    return known, layout


def _header_file(path: Path) -> Path:
    """The file with the header: of a pair the ``.hdr``."""
    for end in (".img", ".img.gz"):
        if path.name.lower().endswith(end):
            dot = len(path.name) - len(end)
            packed = path.name[dot + 4 :]
            names = (path.name[:dot] + hdr for hdr in (".hdr", ".HDR", ".hdr" + packed, ".hdr.gz"))
            # a NIfTI file of one piece may be called .img too
            return next((path.with_name(name) for name in names if path.with_name(name).is_file()), path)
    return path


def _voxel_file(path: Path, home: Path) -> Path:
    """The ``.img`` that belongs to a header alone."""
    dot = home.name.lower().rfind(".hdr")
    if dot < 0:
        reason = "it is the header of a pair, with voxels in a file of their own, but its name does not end in .hdr"
        raise UnreadableFile(path, f"not a readable NIfTI file: {reason}")
    wanted = home.name[:dot] + (".IMG" if home.name[dot : dot + 4] == ".HDR" else ".img") + home.name[dot + 4 :]
    names = (wanted, home.name[:dot] + ".img", home.name[:dot] + ".img.gz")
    found = next((home.with_name(name) for name in names if home.with_name(name).is_file()), None)
    if found is None:
        raise UnreadableFile(path, f"its voxels should be in {wanted}, which does not exist")
    return found


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked if it is gzip inside, whatever its name."""
    with file.open("rb") as raw:
        packed = raw.read(2) == _GZIP
        raw.seek(0)
        if packed:
            with gzip.GzipFile(fileobj=raw) as stream:
                yield stream  # type: ignore[misc]
        else:
            yield raw


def _parsed(path: Path, stream: BinaryIO) -> tuple[Any, bool]:
    block = stream.read(540)
    size = {int.from_bytes(block[:4], order): mark for order, mark in (("little", "<"), ("big", ">"))}  # type: ignore[arg-type]
    if 540 in size and len(block) == 540 and block[4:7] in (b"n+2", b"ni2"):
        return nibabel.Nifti2Header(block, size[540], check=False), block[5:6] == b"+"
    if 348 in size and len(block) >= 348:
        if block[344:348] in (b"n+1\0", b"ni1\0"):
            return nibabel.Nifti1Header(block[:348], size[348], check=False), block[345:346] == b"+"
        reason = "it has no magic number of NIfTI; Analyze files are like that and do not say where left and right are"
        raise UnreadableFile(path, f"not a readable NIfTI file: {reason}; convert it to NIfTI")
    what = "empty" if not block else "neither a header of NIfTI-1 nor of NIfTI-2 at its beginning"
    raise UnreadableFile(path, f"not a readable NIfTI file: {what}; get it again")


def _layout(path: Path, raw: Any, single: bool) -> _Layout:
    shape, volumes = _shape(path, raw)
    try:
        dtype = raw.get_data_dtype()
        slope, inter = raw.get_slope_inter()
    except (KeyError, HeaderDataError) as error:
        reason = f"its data type is {int(raw['datatype'])}, its scale {raw['scl_slope']:g} and {raw['scl_inter']:g}"
        raise UnreadableFile(path, f"corrupt header: {reason}; get the file again") from error
    _check_type(path, dtype)
    if int(raw["bitpix"]) != 8 * dtype.itemsize:
        found = (
            f"its header says {int(raw['bitpix'])} bits per voxel, but its data type {dtype} has {8 * dtype.itemsize}"
        )
        raise UnreadableFile(path, f"corrupt header: {found}; get the file again")
    least = int(raw.single_vox_offset) if single else 0
    offset = float(raw["vox_offset"]) or float(least)
    if not (offset >= least and offset.is_integer()):
        reason = f"corrupt header: its voxels cannot begin at byte {offset:g}, a whole number from {least} is needed"
        raise UnreadableFile(path, f"{reason}; get the file again")
    return _Layout(shape, volumes, dtype, int(offset), 1.0 if slope is None else slope, 0.0 if slope is None else inter)


def _shape(path: Path, raw: Any) -> tuple[tuple[int, int, int], int]:
    axes = int(raw["dim"][0])
    if not 1 <= axes <= 7:
        raise UnreadableFile(path, f"corrupt header: an image has 1 to 7 axes, got {axes}; get the file again")
    sizes = tuple(int(n) for n in raw["dim"][1 : axes + 1])
    if min(sizes) < 1:
        raise UnreadableSeries(path, "empty", f"an image needs sizes of at least 1 along each axis, got {sizes}")
    while len(sizes) > 3 and sizes[-1] == 1:
        sizes = sizes[:-1]
    if len(sizes) > 4:
        reason = f"3D volumes are needed, one or a series of them, but the file holds {sizes} voxels; split it"
        raise UnreadableSeries(path, "five-dimensional", reason)
    i, j, k, volumes = sizes + (1,) * (4 - len(sizes))
    intent = int(raw["intent_code"])
    if volumes > 1 and intent in _VECTOR_INTENTS:
        reason = f"one value per voxel is needed, but its {volumes} are parts of one (intent code {intent})"
        raise UnreadableSeries(path, "vectors", f"{reason}; save one of them, or their magnitude, as its own file")
    return (i, j, k), volumes


def _check_type(path: Path, dtype: np.dtype[Any]) -> None:
    if dtype.names is not None:
        reason = f"grey values are needed, but its voxels are colours ({', '.join(dtype.names)})"
        raise UnreadableSeries(path, "colour", f"{reason}; save them as grey values")
    if dtype.kind == "c":
        reason = f"real values are needed, but its voxels are complex ({dtype})"
        raise UnreadableSeries(path, "complex", f"{reason}; save magnitude or phase as its own file")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        reason = f"whole or real numbers of at most 64 bits are needed, but its voxels are {dtype}"
        raise UnreadableSeries(path, "pixel-type", f"{reason}; save them as float32 or integers")


def _check_size(path: Path, file: Path, layout: _Layout) -> tuple[str, ...]:
    """Refuse, before memory is asked for, a file that cannot hold what the header promises; note what is too much."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            packed = stream.read(2) == _GZIP
    except OSError as error:
        raise UnreadableFile(path, f"its voxels in {file.name} cannot be opened: {error.strerror}") from error
    needed = layout.end
    if packed:
        if needed > size * _MAX_GZIP_RATIO:
            reason = f"{needed} bytes of voxels cannot be in a gzip file of {size}; get the file again"
            raise UnreadableFile(path, reason)
        return ()
    if size < needed:
        raise UnreadableFile(path, f"the file is cut short: {size} of {needed} bytes are there; get it again")
    return surplus_note(size - needed)


def surplus_note(count: int) -> tuple[str, ...]:
    """What to say about bytes behind the voxels; nothing if there are none."""
    return (f"{count} bytes behind its voxels, which its header does not mention, were not read",) if count else ()


# ---- geometry


def _affine(path: Path, raw: Any, shape: tuple[int, int, int]) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine that counts, and what a person should know about it."""
    unit = int(raw["xyzt_units"]) & 7
    if unit in _LENGTH_UNITS:
        reason = f"lengths must be in mm, but its header says {_LENGTH_UNITS[unit]}; correct xyzt_units or the affine"
        raise UnreadableSeries(path, "units", reason)
    codes = {name: int(raw[f"{name}_code"]) for name in ("sform", "qform")}
    for name, code in codes.items():
        if code not in _CODES:
            reason = f"corrupt header: its {name}_code must be 0 to {_CODES[-1]}, got {code}; get the file again"
            raise UnreadableFile(path, reason)
    axes = min(int(raw["dim"][0]), 3)
    steps = [float(step) for step in raw["pixdim"][1 : 1 + axes]]
    measured = all(np.isfinite(step) and step > 0 for step in steps)
    header = raw.copy()
    header["pixdim"][0] = raw["pixdim"][0] or 1  # as the standard says
    header["pixdim"][1 + axes : 4] = 1  # of axes that are not there
    if codes["sform"]:
        sform = np.asarray(header.get_sform())
        return sform, _disagreement(sform, codes["qform"], header, shape, steps, measured)
    if not measured:
        reason = f"the sizes of its voxels must be above 0, got {', '.join(f'{step:g}' for step in steps)}, and it has"
        raise UnreadableSeries(path, "singular-affine", f"{reason} no sform; repair pixdim or set an sform")
    if not codes["qform"]:
        return np.asarray(header.get_base_affine()), ("its orientation is unknown: neither sform nor qform is set",)
    if float(raw["pixdim"][0]) not in (-1, 0, 1):
        reason = (
            f"its qform needs a pixdim[0] of -1, 0 or 1, got {float(raw['pixdim'][0]):g}; repair it or set an sform"
        )
        raise UnreadableSeries(path, "singular-affine", reason)
    try:
        return np.asarray(header.get_qform()), ()
    except (HeaderDataError, ValueError) as error:
        values = ", ".join(f"{float(raw[f'quatern_{part}']):g}" for part in "bcd")
        reason = f"the quaternion ({values}) of its qform is no rotation; repair it or set an sform"
        raise UnreadableSeries(path, "singular-affine", reason) from error


def _disagreement(
    sform: np.ndarray, qcode: int, header: Any, shape: tuple[int, int, int], steps: list[float], measured: bool
) -> tuple[str, ...]:
    """What else the header says about its geometry, where that differs from the sform."""
    if not qcode or not np.isfinite(sform).all():
        lengths = np.linalg.norm(sform[:3, : len(steps)], axis=0)
        if measured and not np.allclose(lengths, steps, rtol=0.01):
            told = [", ".join(f"{step:.4g}" for step in each) for each in (steps, lengths)]
            return (f"its voxels measure {told[0]} mm by pixdim, but {told[1]} by its sform, which counts",)
        return ()
    try:
        qform = header.get_qform() if measured else None
    except (HeaderDataError, ValueError):
        qform = None
    if qform is None or not np.isfinite(qform).all():
        return ("its qform makes no sense; the sform counts",)
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in shape], [1], indexing="ij"), -1).reshape(-1, 4)
    apart = float(np.linalg.norm(corners @ (sform - qform).T, axis=1).max())
    return (f"its sform and qform place voxels up to {apart:.3g} mm apart; the sform counts",) if apart > 0.01 else ()


def shear_note(space: Space) -> tuple[str, ...]:
    """What to say about axes that are not perpendicular; nothing if they are within 0.1 degrees."""
    directions = space.affine[:3, :3] / np.array(space.spacing)
    cosine = np.abs(directions.T @ directions - np.eye(3)).max()
    if cosine <= _SHEAR:
        return ()
    angle = np.degrees(np.arcsin(min(cosine, 1)))
    return (f"its axes are not perpendicular (by up to {angle:.2g} degrees); the affine is kept as it is",)


def _time_step(raw: Any) -> float | None:
    seconds = _SECONDS.get(int(raw["xyzt_units"]) & 56)
    step = float(raw["pixdim"][4])
    return step * seconds if seconds and np.isfinite(step) and step > 0 else None


# ---- the voxels


def _stored(path: Path, file: Path, layout: _Layout, index: int) -> tuple[np.ndarray, int]:
    """One volume in the file's own type, and how many bytes lie behind the last; the latter of packed files only."""
    count = int(np.prod(layout.shape))
    start = layout.offset + index * count * layout.dtype.itemsize
    try:
        with file.open("rb") as stream:
            packed = stream.read(2) == _GZIP
        if not packed:
            values = np.fromfile(file, layout.dtype, count, offset=start)
            return values.reshape(layout.shape, order="F"), 0
        unpack = _unpacked_and_kept if layout.volumes > 1 and layout.end <= _KEPT else _unpacked
        data, surplus = unpack(file, layout.end, file.stat().st_mtime_ns)
        if len(data) < layout.end:
            reason = f"the file is cut short: {len(data)} of {layout.end} bytes are in its gzip data; get it again"
            raise UnreadableFile(path, reason)
        return np.frombuffer(data, layout.dtype, count, start).reshape(layout.shape, order="F"), surplus
    except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
        raise UnreadableFile(path, f"its voxels cannot be read ({_words(error)}); get the file again") from error


def _unpacked(file: Path, end: int, _modified: int) -> tuple[bytes, int]:
    """The first ``end`` bytes of a gzip file, and how many follow; read to its end, as only there is its checksum."""
    with gzip.open(file) as stream:
        data, surplus = stream.read(end), 0
        while more := stream.read(1 << 20):
            surplus += len(more)
    return data, surplus


_unpacked_and_kept = lru_cache(maxsize=1)(_unpacked)  # a series of volumes is read one after the other


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
