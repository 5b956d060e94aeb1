"""Output formats by name, as users and bundles spell them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medvit.inference.report import OverlayWriter
from medvit.writers.base import Writer
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter
from medvit.writers.raster import RasterLabelWriter

FORMATS = ("nifti", "dicom-seg", "png", "overlay")


def make_writers(formats: Sequence[str], algorithm_name: str, algorithm_version: str) -> list[Writer]:
    """Writers for ``formats``, in that order.

    Args:
        formats: any of ``"nifti"`` (label map on the grid of a volume), ``"dicom-seg"`` (for DICOM sources), ``"png"``
            (label map on the pixels of a photograph) and ``"overlay"`` (a picture); at least one, and naming one twice
            is naming it once. A case gets those that apply to its source.
        algorithm_name: what a DICOM SEG names as its maker.
        algorithm_version: likewise.

    Raises:
        ValueError: an unknown format, or none.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {list(formats)}")
    makers: dict[str, Callable[[], Writer]] = {
        "nifti": NiftiLabelWriter,
        "dicom-seg": lambda: DicomSegWriter(algorithm_name, algorithm_version),
        "png": RasterLabelWriter,
        "overlay": OverlayWriter,
    }
    return [makers[f]() for f in dict.fromkeys(formats)]
