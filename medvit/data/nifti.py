"""NIfTI-1 and NIfTI-2 files (``.nii``, ``.nii.gz``, ``.hdr`` with ``.img``), read with nibabel and then checked."""

from __future__ import annotations

import gzip
import logging
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.imageglobals import logger
from nibabel.nifti1 import Nifti1Pair
from nibabel.spatialimages import HeaderDataError

from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import UnreadableFile, UnreadableSeries

SUFFIXES = (".nii", ".nii.gz", ".hdr", ".hdr.gz", ".img", ".img.gz")

_MAX_GZIP_RATIO = 1032  # what deflate can do at most
_LENGTH_UNITS = {1: "metres", 3: "micrometres"}  # xyzt_units & 7; 2 is mm, 0 unknown


@dataclass(frozen=True)
class NiftiHeader:
    """A checked header: the file with the voxels, their grid (three axes, whatever the file has), notes for people."""

    voxels: Path
    space: Space
    notes: tuple[str, ...]


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
        UnreadableSeries: ``singular-affine``, ``four-dimensional``, ``colour``, ``complex``, ``empty``, ``units``.
    """
    with _quiet():
        return _checked(Path(path))[1]


def read_nifti(path: str | Path, name: str = "") -> Volume:
    """Read one file whole: ``(i, j, k)`` in the file's own order, float32, scaled by scl_slope and scl_inter.

    NaN and infinite voxels become 0, with a note that counts them.

    Args:
        path: NIfTI file; for a pair, either of the two.
        name: stem for outputs.

    Raises:
        UnreadableFile: as :func:`read_nifti_header`, and where the voxels end early.
        UnreadableSeries: as :func:`read_nifti_header`, and ``not-finite`` when no voxel holds a finite number.
    """
    path = Path(path)
    with _quiet():
        image, header = _checked(path)
        try:
            _require_intact(header.voxels)
            array = np.asarray(image.dataobj, dtype=np.float32).reshape(header.space.shape)
        except (OSError, EOFError, ValueError, zlib.error, MemoryError) as error:
            raise UnreadableFile(path, f"its voxels cannot be read ({_words(error)}); get the file again") from error
    finite = np.isfinite(array)
    bad = int(finite.size - np.count_nonzero(finite))
    if bad == finite.size:
        raise UnreadableSeries(
            path, "not-finite", f"none of its {bad} voxels holds a finite number; get the file again"
        )
    notes = header.notes
    if bad:
        array[~finite] = 0
        notes += (f"{bad} of {finite.size} voxels were NaN or infinite and count as 0",)
    return Volume(array, header.space, Source("nifti", (path,), name=name or stem(path)), notes)


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings and log lines of nibabel and numpy on odd headers and overflows: what matters is checked here."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _checked(path: Path) -> tuple[Any, NiftiHeader]:
    try:
        image = nibabel.load(path, mmap=False)
    except OSError as error:
        reason = error.strerror or str(error)
        closed = error.errno or isinstance(error, FileNotFoundError)  # nibabel's own has no number
        raise UnreadableFile(path, f"{'cannot be opened' if closed else 'corrupt NIfTI file'}: {reason}") from error
    except (ImageFileError, HeaderDataError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise UnreadableFile(path, f"not a readable NIfTI file ({_words(error)})") from error
    if not isinstance(image, Nifti1Pair):
        reason = f"NIfTI is needed, but this is {type(image).__name__}, which does not say where left and right are"
        raise UnreadableFile(path, f"{reason}; convert it to NIfTI")
    shape = _shape(image, path)
    _check_type(image, path)
    voxels = _check_size(image, path)
    affine, notes = _affine(image, path)
    try:
        space = Space.from_affine(shape, affine)
    except ValueError as error:
        raise UnreadableSeries(path, "singular-affine", f"{error}; repair its sform or qform") from error
    return image, NiftiHeader(voxels, space, notes)


def _shape(image: Any, path: Path) -> tuple[int, int, int]:
    shape = tuple(int(n) for n in image.shape)
    if not shape or min(shape) < 1:
        raise UnreadableSeries(path, "empty", f"an image needs sizes of at least 1 along each axis, got {shape}")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) > 3:
        reason = f"one 3D volume is needed, but the file holds {shape} voxels; split it and give one of its volumes"
        raise UnreadableSeries(path, "four-dimensional", reason)
    i, j, k = shape + (1,) * (3 - len(shape))
    return i, j, k


def _check_type(image: Any, path: Path) -> None:
    dtype = image.get_data_dtype()
    if dtype.names is not None or dtype.kind not in "iufc":
        raise UnreadableSeries(
            path, "colour", f"grey values are needed, but its voxels are colours (data type {dtype})"
        )
    if dtype.kind == "c":
        reason = (
            f"real values are needed, but its voxels are complex ({dtype}); save magnitude or phase as its own file"
        )
        raise UnreadableSeries(path, "complex", reason)


def _check_size(image: Any, path: Path) -> Path:
    """The file with the voxels; refused before memory is asked for if it cannot hold what the header promises."""
    file = Path(image.file_map["image"].filename)
    if not file.is_file():
        raise UnreadableFile(path, f"its voxels should be in {file.name}, which does not exist")
    needed = int(image.dataobj.offset) + int(np.prod(image.shape, dtype=object)) * image.get_data_dtype().itemsize
    size = file.stat().st_size
    if file.name.lower().endswith(".gz"):
        if needed > size * _MAX_GZIP_RATIO:
            raise UnreadableFile(
                path, f"{needed} bytes of voxels cannot be in a gzip file of {size}; get the file again"
            )
    elif size < needed:
        raise UnreadableFile(path, f"the file is cut short: {size} of {needed} bytes are there; get it again")
    return file


def _require_intact(file: Path) -> None:
    """Read a gzip file to its end: only there is its checksum, which nibabel never reaches."""
    if file.name.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            while stream.read(1 << 20):
                pass


def _affine(image: Any, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """The affine that counts, and what a person should know about it."""
    header = image.header
    unit = int(header["xyzt_units"]) & 7
    if unit in _LENGTH_UNITS:
        reason = f"lengths must be in mm, but its header says {_LENGTH_UNITS[unit]}; correct xyzt_units or the affine"
        raise UnreadableSeries(path, "units", reason)
    sform = header.get_sform(coded=True)[0]
    try:
        qform = header.get_qform(coded=True)[0]
    except (HeaderDataError, ValueError):  # no rotation; nibabel has refused the file already if there is no sform
        qform = None
    if sform is None and qform is None:
        return np.asarray(header.get_base_affine()), ("its orientation is unknown: neither sform nor qform is set",)
    if sform is None or qform is None:
        return np.asarray(qform if sform is None else sform), ()
    notes: tuple[str, ...] = ()
    corner = np.array([*(n - 1 for n in (*image.shape, 1, 1)[:3]), 1])
    apart = max(float(np.linalg.norm((sform - qform) @ c)) for c in (corner, np.array([0, 0, 0, 1])))
    if not apart <= 0.01:
        notes = (f"its sform and qform place voxels up to {apart:.3g} mm apart; the sform counts",)
    return np.asarray(sform), notes


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
