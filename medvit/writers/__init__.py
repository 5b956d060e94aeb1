"""Results to files: NIfTI and PNG label maps, DICOM SEG, tables; each whole under its name or not there at all."""

from medvit.writers.base import Writer, atomic
from medvit.writers.convert import convert
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter, write_volume
from medvit.writers.raster import RasterLabelWriter
from medvit.writers.table import write_volumes

__all__ = [
    "DicomSegWriter",
    "NiftiLabelWriter",
    "RasterLabelWriter",
    "Writer",
    "atomic",
    "convert",
    "write_volume",
    "write_volumes",
]
