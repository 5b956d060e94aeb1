"""Results to files: NIfTI, PNG, DICOM objects and tables; each whole under its name or not there at all."""

from medvit.writers.base import Writer, atomic
from medvit.writers.convert import convert
from medvit.writers.deidentify import Deidentifier
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter, write_series, write_volume
from medvit.writers.raster import RasterLabelWriter
from medvit.writers.rtstruct import RtStructWriter
from medvit.writers.secondary_capture import SecondaryCaptureWriter
from medvit.writers.structured_report import ReportWriter
from medvit.writers.table import write_volumes

__all__ = [
    "Deidentifier",
    "DicomSegWriter",
    "NiftiLabelWriter",
    "RasterLabelWriter",
    "ReportWriter",
    "RtStructWriter",
    "SecondaryCaptureWriter",
    "Writer",
    "atomic",
    "convert",
    "write_series",
    "write_volume",
    "write_volumes",
]
