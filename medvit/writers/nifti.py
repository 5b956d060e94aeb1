"""NIfTI out: label maps and images on exactly the grid they came with."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np

from medvit.data.labels import LabelMap
from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import UnreadableFile
from medvit.writers.base import atomic, with_suffix

# The header fields that place voxels, and nothing that could describe a patient (descrip, db_name, extensions, ...).
_GEOMETRY = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z"),
)
_SCANNER, _MM = 1, 2  # NIfTI codes: scanner coordinates, millimetres
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
        _write(label_map.array, label_map.space, label_map.source, path, overwrite)
        return path


def write_volume(volume: Volume, path: Path, *, overwrite: bool = False) -> Path:
    """Write an image as NIfTI: integers of 16 or 32 bits where these hold its values exactly, float32 elsewhere.

    Args:
        volume: ``(i, j, k)``; its grid is kept exactly.
        path: ``.nii``, or ``.nii.gz`` to compress.
        overwrite: replace an existing file.

    Raises:
        OutputError: see :func:`medvit.writers.base.atomic`.
    """
    array = volume.array
    _write(array.astype(_lossless_type(array), copy=False), volume.space, volume.source, path, overwrite)
    return path


def _lossless_type(array: np.ndarray) -> np.dtype[Any]:
    low, high = array.min(), array.max()
    if np.isfinite([low, high]).all() and max(-low, high) <= _EXACT and all((s == np.rint(s)).all() for s in array):
        for candidate in (np.int16, np.uint16, np.int32):
            if np.iinfo(candidate).min <= low and high <= np.iinfo(candidate).max:
                return np.dtype(candidate)
    return np.dtype(np.float32)


def _write(array: np.ndarray, space: Space, source: Source, path: Path, overwrite: bool) -> None:
    header = _header(space, source)
    header.set_data_dtype(array.dtype)
    header.set_data_shape(array.shape)
    image = _image_class(header)(array, None, header)
    image.header.set_slope_inter(1, 0)
    with atomic(path, overwrite=overwrite) as part, part.open("wb") as raw:
        if path.suffix == ".gz":
            # no file name and no time in the gzip header: equal runs give equal bytes
            with gzip.GzipFile(filename="", mode="wb", compresslevel=4, fileobj=raw, mtime=0) as packed:
                image.to_stream(packed)
        else:
            image.to_stream(raw)


def _image_class(header: Any) -> Any:
    import nibabel

    return nibabel.Nifti2Image if isinstance(header, nibabel.Nifti2Header) else nibabel.Nifti1Image


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


def _source_header(space: Space, file: Path) -> Any:
    """A clean header with the geometry fields of ``file`` and the shape of ``space``."""
    import nibabel
    from nibabel.filebasedimages import ImageFileError

    try:
        old = nibabel.load(file).header
    except (OSError, ImageFileError) as error:
        raise UnreadableFile(file, f"the source header is needed to write a result on its grid: {error}") from error
    header = nibabel.Nifti2Header() if isinstance(old, nibabel.Nifti2Header) else nibabel.Nifti1Header()
    header.set_data_shape(space.shape)
    for field in _GEOMETRY:
        header[field] = old[field]
    header["pixdim"][:4] = old["pixdim"][:4]
    header["xyzt_units"] = int(old["xyzt_units"]) & 0b111  # the lower bits are the unit of space, the others of time
    return header
