"""Radiographs and volumes through one reader, for networks that take both."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import ImageReader

from medvit.data.radiograph import RadiographReader
from medvit.data.reader import VolumeReader
from medvit.data.study import discover


class AnyRankReader(ImageReader):  # type: ignore[misc]  # MONAI ships no types
    """MONAI image reader: a picture, or a DICOM file without a place in the patient, as 2D, all else as a volume.

    Arrays are ``(x, y)`` in [0, 1] as :class:`~medvit.data.radiograph.RadiographReader` gives them, or ``(i, j, k)`` as
    :class:`~medvit.data.reader.VolumeReader` does, with its meta data and errors. Which of both it is follows from
    headers, by the same rule as the kind of a case in :func:`medvit.data.list_cases`.

    Args:
        voi: see :class:`~medvit.data.radiograph.RadiographReader`.
    """

    def __init__(self, voi: bool = True):
        super().__init__()
        self.radiographs, self.volumes = RadiographReader(voi), VolumeReader()

    def verify_suffix(self, filename: Any) -> bool:
        """True: files are judged by content."""
        return True

    def read(self, data: Any, **kwargs: Any) -> tuple[Path, ...]:
        """The paths; everything else happens in :meth:`get_data`, since MONAI goes on to other readers after errors."""
        return (Path(data),) if isinstance(data, str | Path) else tuple(Path(path) for path in data)

    def get_data(self, img: Sequence[Path]) -> tuple[np.ndarray, dict[str, Any]]:
        """Array and meta data of the image that the paths of :meth:`read` hold; raises as the reader for it does."""
        return (self.radiographs if _is_flat(img) else self.volumes).get_data(img)


def _is_flat(files: Sequence[Path]) -> bool:
    """Whether the files are one picture or one image without a place in the patient."""
    if len(files) != 1 or not files[0].is_file():
        return False
    series = discover(files[0]).series
    return bool(series) and all(one.kind == "raster" or not one.placed for one in series)
