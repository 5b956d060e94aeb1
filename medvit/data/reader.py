"""medvit's readers behind MONAI's ``LoadImaged``."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader
from monai.utils import MetaKeys, SpaceKeys

from medvit.data import itk, nifti, raster
from medvit.data.dicom import read_dicom, read_dicom_again
from medvit.data.headers import looks_like_dicom
from medvit.data.study import discover, is_folder, is_photograph
from medvit.data.volume import Source, Volume
from medvit.errors import NothingFound, UnreadableSeries

_log = logging.getLogger("medvit")


def read_volume(paths: str | Path | Sequence[str | Path], volume: int | None = None) -> Volume:
    """Read one NIfTI, MetaImage or NRRD file or photograph, the DICOM files of one series, or a folder with one series.

    Photographs in a folder do not count; they are read by their own names.

    Args:
        paths: file or folder, or the files of a series.
        volume: which one, from 0, where a series or file holds several (echoes, time points, diffusion weightings).
            None: the first, with a note that says so.

    Raises:
        NothingFound: a path that does not exist, or a folder without a usable series.
        UnreadableSeries: several series where one is needed, no such volume, or one that cannot be placed.
        UnreadableFile: a file that cannot be read.
    """
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    for file in files:
        if not os.path.lexists(file):  # a link to nothing is a file that cannot be read
            raise NothingFound(f"{file}: no such file or folder")
    if len(files) == 1 and is_folder(files[0]):
        return _read_only_series(files[0], volume)
    kinds = {file: _kind(file) for file in files}
    whole = [file for file, kind in kinds.items() if kind != "dicom"]
    if not whole:
        return read_dicom(files, volume=volume)
    if len(files) > 1:
        reason = f"one file of its kind makes an image, but {len(files)} files came together"
        raise UnreadableSeries(whole[0], "several-files", f"{reason}; load them one by one")
    kind = kinds[whole[0]]
    if kind == "nifti":
        return _read_nifti(whole[0], volume)
    if volume:
        reason = f"volume {volume} is asked for, but the file holds one, counted from 0"
        raise UnreadableSeries(whole[0], "no-such-volume", reason)
    return itk.read_itk(whole[0]) if kind == "itk" else raster.read_raster(whole[0])


def read_again(source: Source) -> Volume:
    """Read the volume that ``source`` was made for once more; raises as :func:`read_volume`."""
    if source.kind == "dicom":
        return read_dicom_again(source)
    return read_volume(source.files, source.frames[0] if source.frames else None)


def _read_nifti(file: Path, volume: int | None) -> Volume:
    count = nifti.read_nifti_header(file).volumes
    if not 0 <= (volume or 0) < count:
        reason = f"volume {volume} is asked for, but the file holds {count}, counted from 0"
        raise UnreadableSeries(file, "no-such-volume", reason)
    found = nifti.read_nifti(file, index=volume or 0)
    if volume is None and count > 1:
        found = replace(found, notes=(*found.notes, f"the first of the {count} volumes of its file"))
    return found


class VolumeReader(ImageReader):  # type: ignore[misc]
    """MONAI image reader for everything :func:`read_volume` reads: ``LoadImaged(keys, reader=VolumeReader())``.

    The array is ``(i, j, k)`` float32 without a channel, or ``(column, row, 1, 3)`` for a photograph in colour
    (``EnsureChannelFirstd`` knows both), the affine RAS+ mm, or pixels of the upright picture. Meta data holds MONAI's
    own keys and ``medvit_kind``, ``medvit_unit`` (``"mm"`` or ``"px"``), ``modality``, ``study_uid``, ``series_uid``,
    ``medvit_notes`` (strings, ``""`` if unknown), ``medvit_files`` (list of paths as strings, DICOM in slice order),
    ``medvit_frames`` and ``medvit_mosaic`` (see :class:`~medvit.data.volume.Source`) and ``frame_of_reference`` where
    the source has one.

    Args:
        volume: see :func:`read_volume`.
    """

    def __init__(self, volume: int | None = None):
        super().__init__()
        self.volume = volume

    def verify_suffix(self, filename: Any) -> bool:
        """True: files are judged by content."""
        return True

    def read(self, data: Any, **kwargs: Any) -> tuple[Path, ...]:
        """The paths; everything else happens in :meth:`get_data`.

        ``LoadImage`` catches whatever ``read`` raises and goes on to its default readers, which return a wrong volume
        for just those series that medvit refuses. What ``get_data`` raises reaches the user.
        """
        return (Path(data),) if isinstance(data, str | Path) else tuple(Path(path) for path in data)

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Array and meta data of the one volume that the paths of :meth:`read` hold; raises as :func:`read_volume`."""
        volume = read_volume(img, self.volume)
        space, source = volume.space, volume.source
        for note in volume.notes:
            _log.warning("%s: %s", img[0] if len(img) == 1 else img[0].parent, note)
        meta: dict[str, Any] = {
            MetaKeys.AFFINE.value: np.array(space.affine),
            MetaKeys.ORIGINAL_AFFINE.value: np.array(space.affine),
            MetaKeys.SPATIAL_SHAPE.value: np.array(space.shape),
            MetaKeys.SPACE.value: SpaceKeys.RAS.value,
            MetaKeys.ORIGINAL_CHANNEL_DIM.value: -1 if volume.array.ndim == 4 else "no_channel",
            "filename_or_obj": str(img[0]),
            "medvit_kind": source.kind,
            "medvit_unit": space.unit,
            "medvit_files": [str(file) for file in source.files],
            "medvit_frames": list(source.frames),
            "medvit_mosaic": source.mosaic,
            "modality": source.modality,
            "study_uid": source.study_uid,
            "series_uid": source.series_uid,
            "medvit_notes": "\n".join(volume.notes),
        }
        if space.frame_of_reference:
            meta["frame_of_reference"] = space.frame_of_reference
        return volume.array, meta


def _read_only_series(folder: Path, volume: int | None) -> Volume:
    series = [one for one in discover(folder).series if one.kind != "raster" and one.placed and one.channels == 1]
    usable = [one for one in series if one.problem is None]
    bases = list(dict.fromkeys(one.base for one in usable))
    if len(bases) == 1:
        files = list(dict.fromkeys(file for one in series if one.base == bases[0] for file in one.files))
        return read_volume(files, volume)
    if len(bases) > 1:
        names = ", ".join(bases[:10]) + (", ..." if len(bases) > 10 else "")
        reason = (
            f"a folder with exactly one image series is needed, but it holds {len(bases)}: {names}; give one of them"
        )
        raise UnreadableSeries(folder, "several-series", reason)
    if len(series) == 1 and series[0].problem is not None:
        raise series[0].problem
    problems = "; ".join(str(one.problem) for one in series[:3])
    found = f" {len(series)} were found, none of them usable: {problems}" if series else ""
    raise NothingFound(f"{folder}: no DICOM series or NIfTI file that makes a 3D volume.{found}")


def _kind(file: Path) -> str:
    """``"dicom"``, ``"nifti"`` or ``"raster"``, as :func:`medvit.data.study.discover` tells them apart."""
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError:  # the reader will say so
        start = b""
    for kind, suffixes in (("nifti", nifti.SUFFIXES), ("itk", itk.SUFFIXES)):
        if file.name.lower().endswith(suffixes) and start[128:] != b"DICM":
            return kind
    named = file.name.lower().endswith(raster.SUFFIXES) and not looks_like_dicom(start)
    return "raster" if is_photograph(file, start) or named else "dicom"
