"""One image with its place in the patient and a note of where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medvit.data.space import Space


@dataclass(frozen=True)
class Source:
    """What a volume was read from; enough to write results that refer to it, and nothing that names a patient.

    Args:
        kind: ``"dicom"``, ``"nifti"``, ``"raster"`` (a photograph) or another reader's name.
        files: every file the volume was made of; for DICOM the file of each slice, in slice order, so that a file of
            many frames is there many times.
        modality: DICOM Modality (``"MR"``, ``"CT"``, ...); ``""`` where the format does not say.
        study_uid, series_uid: DICOM UIDs; ``""`` where there are none.
        name: stem for outputs, without extension; made of folder and file names, never of tags that identify a patient.
        frames: for DICOM the number of each slice's frame in its file, from 0 (empty: the first of each); for a NIfTI
            file of several volumes the number of this one.
        mosaic: these are numbers of tiles, since each file holds one image with all slices side by side.
    """

    kind: str
    files: tuple[Path, ...]
    modality: str = ""
    study_uid: str = ""
    series_uid: str = ""
    name: str = ""
    frames: tuple[int, ...] = ()
    mosaic: bool = False


@dataclass(frozen=True)
class Volume:
    """An image on a voxel grid.

    Args:
        array: ``(i, j, k)`` in the source's own axis order (DICOM: column, row, slice), float32; CT in HU, others in
            the source's rescaled units. ``(i, j, k, channel)`` where there are several channels, as in the colours of a
            photograph, which has one slice: ``(column, row, 1, 3)``.
        space: the grid of ``array``.
        source: where it came from.
        notes: warnings a person should see (a repaired header, an ignored duplicate, ...), one sentence each.
    """

    array: np.ndarray
    space: Space
    source: Source
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.array.shape[:3] != self.space.shape or self.array.ndim > 4:
            raise ValueError(f"array of shape {self.array.shape} does not fill a space of shape {self.space.shape}")
