"""Output formats by name, as users and bundles spell them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from medvit.inference.report import OverlayWriter
from medvit.inference.vectors import EMBEDDING, PATCHES, SCORES, ArrayWriter, ScoresWriter
from medvit.writers.base import Writer
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter
from medvit.writers.raster import RasterLabelWriter
from medvit.writers.rtstruct import RtStructWriter
from medvit.writers.secondary_capture import SecondaryCaptureWriter
from medvit.writers.structured_report import ReportWriter

FORMATS = (
    *("nifti", "dicom-seg", "png", "overlay"),
    *("dicom-seg-labelmap", "rtstruct", "secondary-capture", "report"),
)


def make_writers(formats: Sequence[str], algorithm_name: str, algorithm_version: str) -> list[Writer]:
    """Writers for ``formats``, in that order, a report behind the DICOM SEG that it refers to.

    Args:
        formats: at least one, and naming one twice is naming it once. A case gets those that apply to its source:
            ``"nifti"`` (label map on the grid of a volume), ``"png"`` (label map on the pixels of a photograph),
            ``"overlay"`` (a picture), and for DICOM sources ``"dicom-seg"``, ``"dicom-seg-labelmap"`` (small, read by
            recent software), ``"rtstruct"`` (contours), ``"secondary-capture"`` (a zip file of pictures for any
            viewer) and ``"report"`` (structured report of volumes; a DICOM SEG comes with it).
        algorithm_name: what DICOM objects name as their maker.
        algorithm_version: likewise.

    Raises:
        ValueError: an unknown format, or none.
    """
    unknown = [f for f in formats if f not in FORMATS]
    if unknown or not formats:
        raise ValueError(f"formats must be some of {', '.join(FORMATS)}, got {list(formats)}")
    chosen = dict.fromkeys(formats)
    if "report" in chosen:  # it refers to a SEG, which has to be there first
        del chosen["report"]
        chosen |= dict.fromkeys(("dicom-seg", "report"))
    segmentation = DicomSegWriter(algorithm_name, algorithm_version)
    makers: dict[str, Callable[[], Writer]] = {
        "nifti": NiftiLabelWriter,
        "dicom-seg": lambda: segmentation,
        "png": RasterLabelWriter,
        "overlay": OverlayWriter,
        "dicom-seg-labelmap": lambda: DicomSegWriter(
            algorithm_name, algorithm_version, "_labelmap.dcm", kind="LABELMAP"
        ),
        "rtstruct": lambda: RtStructWriter(algorithm_name, algorithm_version),
        "secondary-capture": lambda: SecondaryCaptureWriter(algorithm_name, algorithm_version),
        "report": lambda: ReportWriter(segmentation),
    }
    return [makers[f]() for f in chosen]


def make_vector_writers(formats: Sequence[str], classes: Sequence[str]) -> list[ScoresWriter | ArrayWriter]:
    """Writers for ``formats`` of a network that says something of an image as a whole, each once, in that order.

    Args:
        formats: at least one; of a network with classes ``"scores"`` (probabilities) and ``"embedding"`` (the encoder's
            summary), of one without ``"embedding"`` and ``"patches"`` (the encoder's map).
        classes: names of the classes, none for a network that gives an embedding.

    Raises:
        ValueError: an unknown format, or none.
    """
    known = (SCORES, EMBEDDING) if classes else (EMBEDDING, PATCHES)
    if not formats or not set(formats) <= set(known):
        raise ValueError(f"formats must be some of {', '.join(known)}, got {list(formats)}")
    return [ScoresWriter(classes) if f == SCORES else ArrayWriter(f) for f in dict.fromkeys(formats)]
