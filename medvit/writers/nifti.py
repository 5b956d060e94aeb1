"""NIfTI out: label maps and images on exactly the grid they came with."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvit.data.labels import LabelMap
from medvit.data.raster import upright
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix

# The header fields that place voxels, and nothing that could describe a patient (descrip, db_name, extensions, ...).
_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_SCANNER, _MM, _SECONDS = 1, 2, 8  # NIfTI codes: scanner coordinates, millimetres, seconds
_RGB = np.dtype([(channel, np.uint8) for channel in "RGB"])
_FLOAT = np.dtype(np.float32)
_EXACT = 2**24  # float32 holds every integer up to here


class NiftiLabelWriter:
    """Label maps as integer NIfTI (uint8 or uint16 as the array is), gzip without a time stamp; not of photographs.

    A NIfTI source passes on its sform, qform, their codes and its units bit for bit; a DICOM source gives an sform and,
    unless the grid is sheared, a qform of code "scanner".
    """

    def __init__(self, suffix: str = "_seg.nii.gz"):
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a photograph, which has no place in mm."""
        if label_map.source.kind == "raster":
            return None
        path = with_suffix(stem, self.suffix)
        _write([label_map.array], _header(label_map.space, label_map.source), path, overwrite)
        return path


def write_volume(volume: Volume, path: Path, *, overwrite: bool = False, placed: bool | None = None) -> Path:
    """Write an image as NIfTI: integers of 16 or 32 bits where these hold its values exactly, float32 elsewhere.

    Args:
        volume: ``(i, j, k)``; its grid is kept exactly. Colours ``(i, j, k, 3)`` become RGB24.
        path: ``.nii``, or ``.nii.gz`` to compress.
        overwrite: replace an existing file.
        placed: False where position and orientation are unknown: both codes are 0 then, and only the spacing is
            stated. None: as the unit of the grid says; a photograph (``"px"``), which is turned upright, states none.

    Raises:
        OutputError: colours that are no whole numbers of 0 to 255; see :func:`medvit.writers.base.atomic` too.
    """
    return write_series([volume], path, overwrite=overwrite, placed=placed)


def write_series(
    volumes: Sequence[Volume],
    path: Path,
    *,
    overwrite: bool = False,
    time_step: float | None = None,
    placed: bool | None = None,
) -> Path:
    """Write volumes on one grid as one NIfTI file, 4D if they are several, in the smallest type exact for all.

    Args:
        volumes: in the order of the fourth axis.
        path: ``.nii``, or ``.nii.gz`` to compress.
        overwrite: replace an existing file.
        time_step: seconds from one volume to the next, for pixdim[4]; None where the fourth axis is not time.
        placed: see :func:`write_volume`.

    Raises:
        SpaceMismatch: volumes that do not share one grid.
        OutputError: several colour volumes; see :func:`write_volume` too.
    """
    first = volumes[0]
    for number, other in enumerate(volumes[1:], start=1):
        first.space.require_same(other.space, what=f"volumes 0 and {number} of a series")
    in_pixels = first.space.unit == "px"
    arrays = [upright(volume.array, volume.space) if in_pixels else volume.array for volume in volumes]
    if any(array.ndim == 4 for array in arrays):
        arrays = [_colours(array, path) for array in arrays]
        if len(arrays) > 1:
            raise OutputError(f"{path}: a series of {len(arrays)} colour images fits no NIfTI file; write each alone")
    else:
        types = {_lossless_type(array) for array in arrays}
        # whole numbers of all three integer types are below what float32 holds exactly
        dtype = _FLOAT if _FLOAT in types else np.result_type(*types)
        arrays = [array.astype(dtype, copy=False) for array in arrays]
    if placed is False or in_pixels:
        header = _unplaced_header(arrays[0].shape, first.space)
    else:
        header = _header(first.space, first.source)
    if len(arrays) > 1:
        header.set_data_shape((*arrays[0].shape, len(arrays)))
        header["pixdim"][4] = time_step or 1
        header["xyzt_units"] = int(header["xyzt_units"]) | (_SECONDS if time_step else 0)
    _write(arrays, header, path, overwrite)
    return path


def _colours(array: np.ndarray, path: Path) -> np.ndarray:
    """``(i, j, k, 3)`` to RGB24 ``(i, j, k)``."""
    if array.ndim != 4 or array.shape[3] != 3:
        raise OutputError(f"{path}: colours need three channels, got an array of shape {array.shape}; write each alone")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 255 and (array == np.rint(array)).all()):
        found = f"got values from {low:g} to {high:g}"
        raise OutputError(f"{path}: colours must be whole numbers of 0 to 255, {found}; scale them to 8 bits first")
    return np.ascontiguousarray(array, dtype=np.uint8).view(_RGB)[..., 0]


def _lossless_type(array: np.ndarray) -> np.dtype[Any]:
    low, high = array.min(), array.max()
    if np.isfinite([low, high]).all() and max(-low, high) <= _EXACT and all((s == np.rint(s)).all() for s in array):
        for candidate in (np.int16, np.uint16, np.int32):
            if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
                return np.dtype(candidate)
    return _FLOAT


def _write(arrays: Sequence[np.ndarray], header: Any, path: Path, overwrite: bool) -> None:
    header.set_data_dtype(arrays[0].dtype)
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset)
    with atomic(path, overwrite=overwrite) as part, part.open("wb") as raw:
        if path.suffix == ".gz":
            # no file name and no time in the gzip header: equal runs give equal bytes
            with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
                _stream(arrays, header, packed)
        else:
            _stream(arrays, header, raw)


def _stream(arrays: Sequence[np.ndarray], header: Any, file: Any) -> None:
    """Header, then voxels, the first axis fastest, one slice after the other to spare memory."""
    header.write_to(file)  # with the four bytes that say there is no extension
    for array in arrays:
        for k in range(array.shape[2]):
            file.write(array[:, :, k].tobytes(order="F"))


def _header(space: Space, source: Source) -> Any:
    """Header that places an array of ``space``: with the source's own fields where these say the same."""
    if source.kind == "nifti":
        header = _source_header(space, source.files[0])
        if np.allclose(header.get_best_affine(), space.affine, rtol=0, atol=1e-6 * np.abs(space.affine).max()):
            return header
    return _new_header(space)


def _new_header(space: Space) -> Any:
    import nibabel

    header = nibabel.Nifti2Header() if max(space.shape) > np.iinfo(np.int16).max else nibabel.Nifti1Header()
    header.set_data_shape(space.shape)
    header.set_qform(space.affine, code=_SCANNER)  # sets the spacing too; drops shear, which a quaternion cannot hold
    if not np.allclose(header.get_qform(), space.affine, rtol=0, atol=1e-4 * min(space.spacing)):
        header["qform_code"] = 0
    header.set_sform(space.affine, code=_SCANNER)
    header["xyzt_units"] = _MM
    return header


def _unplaced_header(shape: tuple[int, ...], space: Space) -> Any:
    """Header without sform and qform, so that no reader takes the image to have a place in a patient."""
    import nibabel

    header = nibabel.Nifti2Header() if max(shape) > np.iinfo(np.int16).max else nibabel.Nifti1Header()
    header.set_data_shape(shape)
    header["pixdim"][1:4] = space.spacing
    header["xyzt_units"] = _MM if space.unit == "mm" else 0
    return header


def _source_header(space: Space, file: Path) -> Any:
    """A clean header with the geometry fields of ``file`` and the shape of ``space``."""
    import nibabel

    from medvit.data.nifti import raw_header

    old = raw_header(file)
    header = nibabel.Nifti2Header() if isinstance(old, nibabel.Nifti2Header) else nibabel.Nifti1Header()
    header.set_data_shape(space.shape)
    for field in _GEOMETRY:
        header[field] = old[field]
    header["pixdim"][:4] = old["pixdim"][:4]
    header["pixdim"][0] = old["pixdim"][0] or 1  # as the standard says; nibabel takes no 0
    header["xyzt_units"] = int(old["xyzt_units"]) & 0b111  # the lower bits are the unit of space, the others of time
    return header
