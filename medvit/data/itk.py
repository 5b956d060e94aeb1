"""MetaImage (``.mha``, ``.mhd``) and NRRD (``.nrrd``, ``.nhdr``) files.

Not read by SimpleITK: it takes zeros for voxels that are missing, 1 mm for a spacing that is, 0 for text in place of a
number, and it prints to the console. The tests compare with it.
"""

from __future__ import annotations

import bz2
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medvit.data.nifti import as_float32, made_finite, shear_note, surplus_note
from medvit.data.space import LPS_TO_RAS, Space
from medvit.data.volume import Source, Volume
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries

SUFFIXES = (".mha", ".mhd", ".nrrd", ".nhdr")

_LONGEST = 1 << 20  # bytes of text in front of the voxels
_META_TYPES = {
    **{"MET_CHAR": "i1", "MET_UCHAR": "u1", "MET_SHORT": "i2", "MET_USHORT": "u2", "MET_INT": "i4", "MET_UINT": "u4"},
    **{"MET_LONG": "i4", "MET_ULONG": "u4", "MET_LONG_LONG": "i8", "MET_ULONG_LONG": "u8"},
    **{"MET_FLOAT": "f4", "MET_DOUBLE": "f8"},
}
_NRRD_TYPES = {
    **dict.fromkeys(("signed char", "int8", "int8_t"), "i1"),
    **dict.fromkeys(("uchar", "unsigned char", "uint8", "uint8_t"), "u1"),
    **dict.fromkeys(("short", "short int", "signed short", "signed short int", "int16", "int16_t"), "i2"),
    **dict.fromkeys(("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"), "u2"),
    **dict.fromkeys(("int", "signed int", "int32", "int32_t"), "i4"),
    **dict.fromkeys(("uint", "unsigned int", "uint32", "uint32_t"), "u4"),
    **dict.fromkeys(("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"), "i8"),
    **dict.fromkeys(("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"), "u8"),
    **{"float": "f4", "double": "f8"},
}
_NRRD_ENCODINGS = {"raw": "raw", "gz": "zlib", "gzip": "zlib", "bz2": "bz2", "bzip2": "bz2"}
# World coordinates to RAS+. Files that do not name theirs are taken for LPS, as ITK does.
_NRRD_SPACES = {
    **dict.fromkeys(("", "lps", "left-posterior-superior"), LPS_TO_RAS),
    **dict.fromkeys(("ras", "right-anterior-superior"), np.eye(4)),
    **dict.fromkeys(("las", "left-anterior-superior"), np.diag([-1.0, 1, 1, 1])),
}
_UNPLACED = "its place in the patient is unknown: its header does not say where it lies and which way its axes run"


@dataclass(frozen=True)
class ItkHeader:
    """A checked header: the file with the voxels, their grid, notes for people."""

    voxels: Path
    space: Space
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Text:
    """What the text in front of the voxels says.

    Args:
        sizes: voxels along each axis of space, the first fastest.
        channels: values per voxel.
        dtype: of one value, with its byte order.
        voxels: the file they are in.
        offset: bytes in front of them; below 0: they are at the end.
        encoding: ``"raw"``, ``"zlib"`` (with or without the header of gzip) or ``"bz2"``.
        vectors: (axis, world) steps from voxel to voxel, mm.
        origin: of the first voxel, None where it is not stated.
        to_ras: 4 x 4, from these coordinates.
        notes: what a person should know.
    """

    sizes: tuple[int, ...]
    channels: int
    dtype: np.dtype[Any]
    voxels: Path
    offset: int
    encoding: str
    vectors: np.ndarray
    origin: np.ndarray | None
    to_ras: np.ndarray
    notes: tuple[str, ...]

    @property
    def count(self) -> int:
        """Bytes of all voxels."""
        return int(np.prod(self.sizes, dtype=object)) * self.channels * self.dtype.itemsize


def read_itk_header(path: str | Path) -> ItkHeader:
    """Check a file's header, without reading its voxels.

    Raises:
        UnreadableFile: not MetaImage or NRRD, corrupt, or shorter than its header promises.
        UnreadableSeries: ``four-dimensional``, ``colour``, ``vectors``, ``several-files``, ``empty``, ``units``,
            ``pixel-type``, ``encoding``, ``no-geometry`` (no spacing, or unknown coordinates), ``singular-affine``.
    """
    return _checked(Path(path))[0]


def read_itk(path: str | Path, name: str = "") -> Volume:
    """Read one file whole: ``(i, j, k)`` in the file's own order, float32; a 2D image has one slice.

    NaN and infinite voxels become 0, with a note that counts them.

    Args:
        path: the file with the header.
        name: stem for outputs.

    Raises:
        UnreadableFile: as :func:`read_itk_header`, and where packed voxels end early or have a wrong checksum.
        UnreadableSeries: as :func:`read_itk_header`, and ``not-finite`` when no voxel holds a finite number.
    """
    path = Path(path)
    known, text = _checked(path)
    array, rounded = as_float32(_stored(path, text).reshape(known.space.shape, order="F"))
    notes = known.notes + rounded + made_finite(path, array)
    return Volume(array, known.space, Source("itk", (path,), name=name or path.stem), notes)


def _checked(path: Path) -> tuple[ItkHeader, _Text]:
    fields, end = _fields(path)
    try:
        text = _nrrd(path, fields, end) if _is_nrrd(path) else _meta(path, fields, end)
    except MedvitError:
        raise
    except KeyError as error:
        raise UnreadableFile(path, f"corrupt header: {error.args[0]!r} is missing; get the file again") from error
    except (ValueError, IndexError, OverflowError) as error:
        raise UnreadableFile(path, "corrupt header: a number that is none; get the file again") from error
    surplus = _check_size(path, text)
    axes = len(text.sizes)
    affine = np.eye(4)
    affine[:axes, :axes] = text.vectors.T
    affine[:axes, 3] = 0 if text.origin is None else text.origin
    try:
        space = Space.from_affine((*text.sizes, 1)[:3], text.to_ras @ affine)
    except ValueError as error:
        raise UnreadableSeries(path, "singular-affine", f"{error}; repair its spacing or directions") from error
    return ItkHeader(text.voxels, space, text.notes + shear_note(space) + surplus), text


# ---- the text in front of the voxels


def _is_nrrd(path: Path) -> bool:
    return path.suffix.lower() in (".nrrd", ".nhdr")


def _fields(path: Path) -> tuple[dict[str, str], int]:
    """The lines ``key = value`` (MetaImage) or ``key: value`` (NRRD), keys in lower case, and where they end."""
    try:
        with path.open("rb") as file:
            start = file.read(_LONGEST)
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    nrrd = _is_nrrd(path)
    if nrrd and not start.startswith(b"NRRD000"):
        raise UnreadableFile(path, "not an NRRD file: it does not begin with NRRD000" if start else "the file is empty")
    fields: dict[str, str] = {}
    position = 0
    while position < len(start):
        end = start.find(b"\n", position)
        line = start[position : len(start) if end < 0 else end].decode("latin-1").strip()
        position = len(start) if end < 0 else end + 1
        if nrrd and not line:
            break
        key, mark, value = line.partition(":" if nrrd else "=")
        if line.startswith(("#", "NRRD000")) or (nrrd and value.startswith("=")):  # comments; key:=value pairs
            continue
        if not mark:
            kind = "NRRD" if nrrd else "MetaImage"
            raise UnreadableFile(path, f"not a readable {kind} file: no header; get it again")
        fields[key.strip().lower()] = value.strip()
        if not nrrd and key.strip().lower() == "elementdatafile":
            break
    return fields, position


def _meta(path: Path, fields: dict[str, str], end: int) -> _Text:
    sizes = _sizes(path, fields["dimsize"], fields["ndims"])
    _check_kind(path, sizes, int(fields.get("elementnumberofchannels", 1)), fields["elementtype"] == "MET_UCHAR")
    spacing = _spacing(path, fields.get("elementspacing") or fields.get("elementsize") or "", len(sizes))
    matrix = next((fields[key] for key in ("transformmatrix", "rotation", "orientation") if key in fields), None)
    origin = next((fields[key] for key in ("offset", "position", "origin") if key in fields), None)
    # each row of the text is the direction of one axis
    rows = np.eye(len(sizes)) if matrix is None else _numbers(matrix, len(sizes) ** 2).reshape(len(sizes), -1)
    lengths = np.linalg.norm(rows, axis=1)
    if np.abs(lengths - 1).max() > 1e-3:
        reason = f"the directions of its axes must have length 1, got {', '.join(f'{n:.4g}' for n in lengths)}"
        raise UnreadableSeries(path, "singular-affine", f"{reason}; repair its TransformMatrix")
    scale = [float(fields.get(f"elementtointensityfunction{part}", n)) for part, n in (("slope", 1), ("offset", 0))]
    if scale != [1, 0]:
        reason = f"its values are to be scaled by {scale[0]:g} and {scale[1]:g}, which few programs do"
        raise UnreadableSeries(path, "pixel-type", f"{reason}; save them scaled")
    _require_mm(path, fields.get("distanceunits", "mm"))
    if _flag(fields, "binarydata", True) is False:
        raise UnreadableSeries(path, "encoding", "its voxels are written as text; save them binary")
    notes: tuple[str, ...] = () if matrix is not None and origin is not None and len(sizes) == 3 else (_UNPLACED,)
    dtype = _type(path, _META_TYPES, fields["elementtype"])
    order = _flag(fields, "binarydatabyteordermsb", _flag(fields, "elementbyteordermsb", None))
    if order is None and dtype.itemsize > 1:
        notes += ("its byte order is not stated; the usual one, the least significant byte first, was taken",)
    place = fields["elementdatafile"]
    local = place.upper() == "LOCAL"
    return _Text(
        sizes,
        1,
        dtype.newbyteorder(">" if order else "<"),
        path if local else _data_file(path, place),
        end if local else int(fields.get("headersize", 0)),
        "zlib" if _flag(fields, "compresseddata", False) else "raw",
        rows * spacing[:, None],
        None if origin is None else _numbers(origin, len(sizes)),
        LPS_TO_RAS,
        notes,
    )


def _nrrd(path: Path, fields: dict[str, str], end: int) -> _Text:
    sizes = _sizes(path, fields["sizes"], fields["dimension"])
    stated = re.findall(r"none|\([^)]*\)", fields.get("space directions", ""), re.IGNORECASE)
    kinds = fields.get("kinds", "").lower().split()
    if stated and len(stated) != len(sizes):
        raise ValueError
    # an axis that is none of space holds the values of a voxel
    inner = [axis for axis, vector in enumerate(stated) if vector.lower() == "none"]
    inner = inner or [axis for axis, kind in enumerate(kinds) if kind not in ("domain", "space", "time", "???", "none")]
    outer = [axis for axis in range(len(sizes)) if axis not in inner]
    channels = int(np.prod([sizes[axis] for axis in inner], dtype=object)) if inner else 1
    grid = tuple(sizes[axis] for axis in outer)
    dtype = _type(path, _NRRD_TYPES, fields["type"].lower())
    _check_kind(path, grid, channels, dtype == np.uint8)
    space = fields.get("space", "").lower()
    if space not in _NRRD_SPACES:
        reason = f"coordinates LPS, RAS or LAS are needed, but its space is {space[:40]!r}"
        raise UnreadableSeries(path, "no-geometry", f"{reason}; save it in one of these")
    for unit in (fields.get("space units") or fields.get("units") or "mm").replace('"', " ").split():
        _require_mm(path, unit)
    if stated:
        vectors = np.array([_vector(stated[axis], len(outer)) for axis in outer])
    else:
        steps = fields.get("spacings", "").split()
        vectors = np.diag(_spacing(path, " ".join(step for n, step in enumerate(steps) if n not in inner), len(outer)))
    origin = fields.get("space origin")
    placed = stated and origin and space and len(grid) == 3
    place = fields.get("data file", fields.get("datafile"))
    encoding, offset = _nrrd_encoding(path, fields, 0 if place else end)
    little = fields.get("endian", "little" if dtype.itemsize == 1 else "").lower()
    if little not in ("little", "big"):
        raise KeyError("endian")
    return _Text(
        grid,
        1,
        dtype.newbyteorder("<" if little == "little" else ">"),
        _data_file(path, place) if place else path,
        offset,
        encoding,
        vectors,
        None if origin is None else _vector(origin, len(outer)),
        _NRRD_SPACES[space],
        () if placed else (_UNPLACED,),
    )


def _nrrd_encoding(path: Path, fields: dict[str, str], begin: int) -> tuple[str, int]:
    """How the voxels are packed, and where they begin."""
    encoding = _NRRD_ENCODINGS.get(fields["encoding"].lower())
    if encoding is None:
        reason = f"its voxels must be raw or gzip or bzip2 data, but their encoding is {fields['encoding'][:20]!r}"
        raise UnreadableSeries(path, "encoding", f"{reason}; save them so")
    skip, lines = (int(fields.get(f"{what} skip", fields.get(f"{what}skip", 0))) for what in ("byte", "line"))
    if lines or (skip and encoding != "raw"):
        reason = f"a header that skips {lines} lines and {skip} bytes of {encoding} data is not read"
        raise UnreadableSeries(path, "encoding", f"{reason}; save it without")
    return encoding, skip if skip < 0 else skip + begin


def _sizes(path: Path, text: str, axes: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split())
    if len(sizes) != int(axes) or not sizes:
        raise ValueError
    if min(sizes) < 1:
        raise UnreadableSeries(path, "empty", f"an image needs sizes of at least 1 along each axis, got {sizes}")
    return sizes


def _numbers(text: str, count: int) -> np.ndarray:
    numbers = np.array([float(number) for number in text.split()])
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise ValueError
    return numbers


def _vector(text: str, count: int) -> np.ndarray:
    if not (text.startswith("(") and text.endswith(")")):
        raise ValueError
    return _numbers(text[1:-1].replace(",", " "), count)


def _flag(fields: dict[str, str], key: str, default: bool | None) -> bool | None:
    value = fields.get(key)
    return default if value is None else {"true": True, "1": True, "false": False, "0": False}[value.lower()]


def _spacing(path: Path, text: str, axes: int) -> np.ndarray:
    steps = text.split()
    if len(steps) != axes or not all(0 < float(step) < np.inf for step in steps):
        reason = f"a spacing above 0 along each of its {axes} axes is needed, got {text[:60] or 'none'}"
        raise UnreadableSeries(path, "no-geometry", f"{reason}; save it with its spacing")
    return np.array([float(step) for step in steps])


def _type(path: Path, types: dict[str, str], name: str) -> np.dtype[Any]:
    if name not in types:
        reason = f"whole or real numbers of 8 to 64 bits are needed, but its type is {name[:40]!r}"
        raise UnreadableSeries(path, "pixel-type", f"{reason}; save them as float32 or integers")
    return np.dtype(types[name])


def _require_mm(path: Path, unit: str) -> None:
    if unit.lower() not in ("mm", "millimeter", "millimeters", "millimetre", "millimetres", "", "???", "none"):
        raise UnreadableSeries(path, "units", f"lengths must be in mm, but its header says {unit[:20]!r}; convert it")


def _data_file(path: Path, name: str) -> Path:
    if name.split()[0].upper() == "LIST" or "%" in name:
        raise UnreadableSeries(path, "several-files", "its voxels are spread over several files; save it as one")
    place = Path(name)
    if place.is_absolute() or ".." in place.parts or "\0" in name:
        raise UnreadableFile(path, "its voxels must be beside it or below, but its header points elsewhere; edit it")
    return path.parent / place


def _check_kind(path: Path, sizes: tuple[int, ...], channels: int, small: bool) -> None:
    if channels in (3, 4) and small:
        raise UnreadableSeries(path, "colour", "grey values are needed, but its voxels are colours; save grey values")
    if channels != 1:
        reason = f"one value per voxel is needed, but it has {channels}; save one of them as its own file"
        raise UnreadableSeries(path, "vectors", reason)
    if len(sizes) not in (2, 3):
        reason = f"a 2D image or a 3D volume is needed, but the file holds {sizes} voxels; split it"
        raise UnreadableSeries(path, "four-dimensional", reason)


# ---- the voxels


def _check_size(path: Path, text: _Text) -> tuple[str, ...]:
    """Refuse a file that cannot hold what its header promises; note what is too much."""
    try:
        size = text.voxels.stat().st_size
    except OSError as error:
        raise UnreadableFile(path, f"its voxels should be in {text.voxels.name}, which does not exist") from error
    if text.encoding != "raw":
        return ()
    needed = max(text.offset, 0) + text.count
    if size < needed:
        raise UnreadableFile(path, f"the file is cut short: {size} of {needed} bytes are there; get it again")
    return surplus_note(size - needed) if text.offset >= 0 else ()


def _stored(path: Path, text: _Text) -> np.ndarray:
    """All voxels in the file's own type, one after the other."""
    try:
        if text.encoding == "raw":
            start = text.offset if text.offset >= 0 else text.voxels.stat().st_size - text.count
            values = np.fromfile(text.voxels, text.dtype, text.count // text.dtype.itemsize, offset=start)
            whole = values.nbytes == text.count
            return values if whole else _cut_short(path, values.nbytes, text.count)
        unpack: Any = zlib.decompressobj(zlib.MAX_WBITS | 32) if text.encoding == "zlib" else bz2.BZ2Decompressor()
        parts: list[bytes] = []
        found = 0
        with text.voxels.open("rb") as file:
            file.seek(max(text.offset, 0))
            # one byte too many is enough to know, and a bomb must not fill the memory
            while not unpack.eof and found <= text.count and (chunk := file.read(1 << 16)):
                parts.append(unpack.decompress(chunk))
                found += len(parts[-1])
    except (OSError, zlib.error, EOFError, ValueError) as error:
        raise UnreadableFile(path, f"its voxels are corrupt ({type(error).__name__}); get it again") from error
    if found != text.count or not unpack.eof:
        return _cut_short(path, found, text.count)
    return np.frombuffer(b"".join(parts), text.dtype)


def _cut_short(path: Path, found: int, needed: int) -> np.ndarray:
    reason = f"{found} of {needed} bytes are in its voxels, or their end is missing"
    raise UnreadableFile(path, f"the file is cut short: {reason}; get it again")
