"""Label maps of photographs as PNG, pixel by pixel on the file they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medvit.data.labels import LabelMap
from medvit.data.raster import EXIF_ORIENTATION, exif_orientation
from medvit.writers.base import atomic, with_suffix


class RasterLabelWriter:
    """Label maps of photographs as PNG of the photograph's stored size; not of volumes.

    8 bits with a palette: the number of a pixel is its label, its colour that of the structure, background is black.
    Labels above 255 give a grey PNG of 16 bits. A photograph with an EXIF orientation passes it on, so that programs
    which turn the one turn the other too.

    Args:
        suffix: what is put behind the stem.
    """

    def __init__(self, suffix: str = "_seg.png"):
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for what is no photograph.

        Raises:
            OutputError: see :func:`medvit.writers.base.atomic`.
        """
        if label_map.source.kind != "raster":
            return None
        rows = np.ascontiguousarray(label_map.array[:, :, 0].T)
        image = Image.fromarray(rows)
        options: dict[str, Any] = {}
        if rows.dtype == np.uint8:
            palette = np.zeros((256, 3), np.uint8)
            for structure in label_map.structures:
                if structure.label < len(palette):
                    palette[structure.label] = structure.color
            image.putpalette(palette.tobytes())
            options["bits"] = 8
        turn = exif_orientation(label_map.space)
        if turn != 1:
            exif = Image.Exif()
            exif[EXIF_ORIENTATION] = turn
            options["exif"] = exif
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            image.save(part, format="PNG", **options)
        return path
