"""A series of pictures for people: the image in greys with the structures over it, one secondary capture per slice."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian

from medvit.data.labels import LabelMap, Structure
from medvit.data.pixels import decode
from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix
from medvit.writers.dicom_source import DicomSource, SourceSlice, dicom_source, quiet

_SERIES_OFFSET = 1200  # behind images, SEG and contours in a viewer's list of series
_ENOUGH_VOXELS = 1_000_000  # to find the window


class SecondaryCaptureWriter:
    """Label maps of DICOM images drawn over them, for viewers that show pictures only.

    One RGB Secondary Capture instance per source slice, in slice order, together in one zip file, which appears whole
    or not at all. The structures are burnt into the pixels on purpose: Series Description and Derivation Description
    say so, Image Type is DERIVED, SECONDARY, and Burned In Annotation is NO, since no text is drawn that could identify
    a patient. Greys run from the 1st to the 99.5th percentile of the image. For looking, not for measuring: pictures
    have pixel spacing, but no place in the patient.

    Args:
        algorithm_name: what made the segmentation, e.g. the bundle's name; at most 64 characters.
        algorithm_version: its version; at most 64 characters.
        suffix: what is put behind the stem.
        opacity: of the structures, 0 to 1.
    """

    def __init__(
        self, algorithm_name: str, algorithm_version: str, suffix: str = "_overlay.zip", *, opacity: float = 0.4
    ):
        self.algorithm_name = algorithm_name
        self.algorithm_version = algorithm_version
        self.suffix = suffix
        self.opacity = opacity

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a source that is not DICOM.

        Raises:
            OutputError: the file cannot be written or exists; or the source cannot be referred to (see
                :class:`~medvit.writers.dicom_seg.DicomSegWriter`) or read again as it was.
            UnreadableFile, UnreadableSeries: the source is gone or damaged.
        """
        if label_map.source.kind != "dicom":
            return None
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            source = dicom_source(label_map)
            pictures = _pictures(_image(label_map, source), source.labels, label_map.structures, self.opacity)
            try:
                with quiet():
                    self._save(pictures, source, part)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # not quoting the error: it may hold a value of the patient's
                raise OutputError(
                    f"{path}: highdicom cannot make secondary captures of this series ({type(error).__name__} over an "
                    f"attribute of {label_map.source.files[0]}); choose the format overlay instead"
                ) from error
        return path

    def _save(self, pictures: np.ndarray, source: DicomSource, part: Path) -> None:
        import highdicom

        series = highdicom.UID()
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for number, (picture, plane) in enumerate(zip(pictures, source.slices, strict=True), 1):
                capture = highdicom.sc.SCImage.from_ref_dataset(
                    source.header,
                    np.ascontiguousarray(picture),
                    photometric_interpretation="RGB",
                    bits_allocated=8,
                    coordinate_system="PATIENT",
                    patient_orientation=_patient_orientation(plane) if source.placed else ("L", "F"),
                    pixel_spacing=plane.spacing,
                    series_instance_uid=series,
                    series_number=_SERIES_OFFSET + abs(int(source.header.get("SeriesNumber") or 0)),
                    sop_instance_uid=highdicom.UID(),
                    instance_number=number,
                    manufacturer="medvit",
                    manufacturer_model_name=self.algorithm_name,
                    software_versions=self.algorithm_version,
                    device_serial_number=self.algorithm_version,
                    series_description=f"Burnt-in structures by {self.algorithm_name}"[:64],
                    transfer_syntax_uid=ExplicitVRLittleEndian,
                )
                _describe(capture, plane, source)
                stream = io.BytesIO()
                capture.save_as(stream, enforce_file_format=True)
                archive.writestr(f"IM{number:05d}.dcm", stream.getvalue())


def _describe(capture: Any, plane: SourceSlice, source: DicomSource) -> None:
    """What highdicom has no arguments for."""
    capture.BurnedInAnnotation = "NO"
    capture.Laterality = source.header.get("Laterality") or ""
    capture.DerivationDescription = "Image windowed to 8 bits, structures drawn over it"
    if not source.placed:
        capture.PatientOrientation = source.header.get("PatientOrientation")  # None: unknown, which is allowed
    origin = Dataset()
    origin.ReferencedSOPClassUID, origin.ReferencedSOPInstanceUID = plane.sop_class, plane.instance_uid
    if plane.frame is not None:
        origin.ReferencedFrameNumber = plane.frame
    capture.SourceImageSequence = [origin]


def _patient_orientation(plane: SourceSlice) -> tuple[str, str]:
    """Nearest anatomical direction of growing column index and of growing row index."""
    letters = (("L", "R"), ("P", "A"), ("H", "F"))
    across, down = np.reshape(plane.orientation, (2, 3))
    row, column = (letters[int(np.abs(v).argmax())][int(v[np.abs(v).argmax()] < 0)] for v in (across, down))
    return row, column


def _image(label_map: LabelMap, source: DicomSource) -> np.ndarray:
    """The image that was segmented, ``(slice, row, column)`` or ``(slice, row, column, 3)``, brighter for higher."""
    if source.mosaic:
        from medvit.data.reader import read_again

        image = np.swapaxes(read_again(label_map.source).array, 0, 2)
    else:
        image = np.stack(list(_frames(source)))
    if image.shape[:3] != source.labels.shape:
        raise OutputError(
            f"{label_map.source.files[0]}: the image must read as it did when it was segmented, "
            f"{' x '.join(map(str, source.labels.shape[::-1]))} voxels, but has "
            f"{' x '.join(map(str, image.shape[2::-1]))}; predict again"
        )
    return image


def _frames(source: DicomSource) -> Iterator[np.ndarray]:
    """Slice by slice from the planes themselves, since a tilted series or one of several volumes has no other grid."""
    pixels = None
    for number, plane in enumerate(source.slices):
        if pixels is None or plane.file != source.slices[number - 1].file:
            pixels = decode(plane.file)
        values = pixels.rescaled((plane.frame or 1) - 1).astype(np.float32)
        yield -values if pixels.ds.PhotometricInterpretation == "MONOCHROME1" else values


def _pictures(image: np.ndarray, labels: np.ndarray, structures: Sequence[Structure], opacity: float) -> np.ndarray:
    """``(slice, row, column, 3)`` uint8."""
    if image.ndim == 4:
        pictures = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    else:
        low, high = np.percentile(image.ravel()[:: 1 + image.size // _ENOUGH_VOXELS], (1, 99.5))
        grey = np.clip((image - low) * (255 / max(high - low, 1e-6)), 0, 255)
        pictures = np.repeat(np.rint(grey).astype(np.uint8)[..., None], 3, axis=-1)
    for structure in structures:
        where = labels == structure.label
        pictures[where] = np.rint((1 - opacity) * pictures[where] + opacity * np.array(structure.color))
    return np.asarray(pictures)
