"""DICOM RT Structure Set out: closed planar contours along pixel edges, on the planes of the source."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.tag import Tag
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from medvit.data.contours import outlines
from medvit.data.labels import LabelMap, Structure
from medvit.data.segmentations import contour_points, read_rtstruct
from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix
from medvit.writers.dicom_source import (
    NEAR,
    PATIENT_AND_STUDY,
    DicomSource,
    SourceSlice,
    concept,
    dicom_source,
    moments,
    numbered,
    quiet,
    require_equal,
)

_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
_STUDY_CLASS = "1.2.840.10008.3.1.2.3.1"  # retired, and what the standard and every reader expect here
_SERIES_OFFSET = 1100  # behind the images and the SEG in a viewer's list of series


class RtStructWriter:
    """Label maps of DICOM images as RT Structure Sets.

    Structures become ROIs 1..n in the order of ``label_map.structures``, also those without voxels. Every part of a
    structure on a slice is one CLOSED_PLANAR contour along the edges of its pixels; holes are keyholes (PS3.3
    C.8.8.6.3). So software that unites the contours of a slice and software that combines them by exclusive or both
    find the mask, and rasterising at voxel centres gives it back exactly. Encoded as Implicit VR Little Endian: other
    encodings limit a contour to 64 kB.

    Args:
        algorithm_name: what made the segmentation, e.g. the bundle's name; at most 64 characters.
        algorithm_version: its version; at most 64 characters.
        suffix: what is put behind the stem.
    """

    def __init__(self, algorithm_name: str, algorithm_version: str, suffix: str = "_rtstruct.dcm"):
        self.algorithm_name = algorithm_name
        self.algorithm_version = algorithm_version
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a source that is not DICOM.

        Raises:
            OutputError: the file cannot be written or exists; or the source does not allow contours (no place in the
                patient, no Frame of Reference UID, UIDs missing or mixed, planes that are not those of the label map);
                or what was written does not read back equal.
            UnreadableFile: a source file is gone or damaged.
        """
        if label_map.source.kind != "dicom":
            return None
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            source = dicom_source(label_map)
            if not source.placed or not source.header.get("FrameOfReferenceUID"):
                lack = "Frame of Reference UID" if source.placed else "place in the patient"
                raise OutputError(
                    f"{label_map.source.files[0]}: contours of an RT Structure Set lie in a frame of reference, but "
                    f"this image has no {lack}; write a DICOM SEG instead"
                )
            with quiet():
                self._build(label_map.structures, source).save_as(part, enforce_file_format=True)
            require_equal(path, part, "RT Structure Set", lambda: _differences(part, source, label_map))
        return path

    def _build(self, structures: Sequence[Structure], source: DicomSource) -> FileDataset:
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ImplicitVRLittleEndian, pydicom.uid.UID(_CLASS)
        meta.MediaStorageSOPInstanceUID = generate_uid()
        ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        for keyword in PATIENT_AND_STUDY:
            if keyword in source.header:
                setattr(ds, keyword, source.header[keyword].value)
        now = datetime.datetime.now()
        ds.SOPClassUID, ds.SOPInstanceUID = _CLASS, meta.MediaStorageSOPInstanceUID
        ds.Modality, ds.SeriesInstanceUID = "RTSTRUCT", generate_uid()
        ds.SeriesNumber = _SERIES_OFFSET + abs(int(source.header.get("SeriesNumber") or 0))
        ds.SeriesDescription = f"Contours by {self.algorithm_name}"[:64]
        ds.OperatorsName = ""
        ds.Manufacturer, ds.ManufacturerModelName = "medvit", self.algorithm_name
        ds.SoftwareVersions = ds.DeviceSerialNumber = self.algorithm_version
        ds.StructureSetLabel, ds.StructureSetName = "SEGMENTATION", ds.SeriesDescription
        ds.InstanceCreationDate = ds.StructureSetDate = now.strftime("%Y%m%d")
        ds.InstanceCreationTime = ds.StructureSetTime = now.strftime("%H%M%S")
        ds.ApprovalStatus = "UNAPPROVED"
        ds.FrameOfReferenceUID = source.header.FrameOfReferenceUID
        ds.PositionReferenceIndicator = source.header.get("PositionReferenceIndicator") or ""
        ds.ReferencedFrameOfReferenceSequence = [_frame_of_reference(source)]
        ds.StructureSetROISequence = [self._roi(n, s, source) for n, s in enumerate(structures, 1)]
        from scipy.ndimage import find_objects

        labels = numbered(source.labels, structures)
        boxes = find_objects(labels, len(structures))
        ds.ROIContourSequence = [
            _roi_contours(number, structure, labels, box, source)
            for number, (structure, box) in enumerate(zip(structures, boxes, strict=True), 1)
        ]
        ds.RTROIObservationsSequence = [_observation(n, s) for n, s in enumerate(structures, 1)]
        return ds

    def _roi(self, number: int, structure: Structure, source: DicomSource) -> Dataset:
        roi = Dataset()
        roi.ROINumber, roi.ROIName = number, structure.name
        roi.ReferencedFrameOfReferenceUID = source.header.FrameOfReferenceUID
        roi.ROIGenerationAlgorithm = "AUTOMATIC"
        roi.ROIGenerationDescription = f"{self.algorithm_name} {self.algorithm_version}"[:64]
        return roi


def _frame_of_reference(source: DicomSource) -> Dataset:
    """The frame of reference with the study, the series and all images that the contours were made on."""
    images: dict[tuple[str, str], Dataset] = {}
    for plane in source.slices:
        image = images.setdefault((plane.sop_class, plane.instance_uid), _image(plane))
        if plane.frame is not None:
            image.ReferencedFrameNumber = sorted({*_as_list(image.ReferencedFrameNumber), plane.frame})
    series = Dataset()
    series.SeriesInstanceUID = source.header.SeriesInstanceUID
    series.ContourImageSequence = list(images.values())
    study = Dataset()
    study.ReferencedSOPClassUID, study.ReferencedSOPInstanceUID = _STUDY_CLASS, source.header.StudyInstanceUID
    study.RTReferencedSeriesSequence = [series]
    frame = Dataset()
    frame.FrameOfReferenceUID = source.header.FrameOfReferenceUID
    frame.RTReferencedStudySequence = [study]
    return frame


def _as_list(value: int | Sequence[int]) -> list[int]:
    return [value] if isinstance(value, int) else list(value)


def _image(plane: SourceSlice) -> Dataset:
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = plane.sop_class, plane.instance_uid
    if plane.frame is not None:
        image.ReferencedFrameNumber = plane.frame
    return image


def _roi_contours(
    number: int, structure: Structure, labels: np.ndarray, box: tuple[slice, ...] | None, source: DicomSource
) -> Dataset:
    """Contours of one structure; ``box`` holds all its voxels, (slice, row, column), None if there are none."""
    item = Dataset()
    item.ReferencedROINumber, item.ROIDisplayColor = number, list(structure.color)
    if box is None:
        return item
    contours: list[Dataset] = []
    for k in range(box[0].start, box[0].stop):
        mask = np.equal(labels[k][box[1:]].T, number)
        for polygon in outlines(mask):
            contour = Dataset()
            if not source.mosaic:  # a tile cannot be named
                contour.ContourImageSequence = [_image(source.slices[k])]
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(polygon)
            contour.ContourNumber = len(contours) + 1
            columns, rows = polygon.T
            _add_points(contour, source.slices[k].points(columns + box[2].start, rows + box[1].start))
            contours.append(contour)
    item.ContourSequence = contours
    return item


def _add_points(contour: Dataset, points: np.ndarray) -> None:
    """ContourData, to 0.1 µm; as bytes, because pydicom's objects for millions of numbers take minutes."""
    text = "\\".join(f"{value:.4f}" for value in points.ravel()).encode("ascii")
    text += b" " * (len(text) % 2)
    tag = Tag("ContourData")
    contour[tag] = RawDataElement(tag, "DS", len(text), text, 0, True, True)


def _observation(number: int, structure: Structure) -> Dataset:
    item = Dataset()
    item.ObservationNumber = item.ReferencedROINumber = number
    item.ROIObservationLabel = structure.name[:16]
    item.RTROIInterpretedType, item.ROIInterpreter = "", ""
    item.RTROIIdentificationCodeSequence = [concept(structure.type)]
    return item


def _differences(part: Path, source: DicomSource, label_map: LabelMap) -> list[str]:
    ds = pydicom.dcmread(part)
    wrong = [] if ds.StudyInstanceUID == source.header.StudyInstanceUID else ["StudyInstanceUID"]
    found = read_rtstruct(part, label_map.space)
    expected = numbered(label_map.array, label_map.structures)
    if voxels := int(np.count_nonzero(found.array != expected)):
        wrong.append(f"{voxels} voxels")
    centres = moments(expected, label_map.space, len(label_map.structures))[1:]
    pixel = source.slices[0].spacing[0] * source.slices[0].spacing[1]
    for number, (item, (*sums, voxels)) in enumerate(zip(ds.ROIContourSequence, centres, strict=True), 1):
        area, centre = _area_and_centre(contour_points(c) for c in item.get("ContourSequence") or ())
        if not abs(area - voxels * pixel) <= 1e-2 * pixel * max(voxels, 1):
            wrong.append(f"area of structure {number} {area:.6g} mm² instead of {voxels * pixel:.6g}")
        elif voxels and not np.linalg.norm(centre - np.array(sums) / voxels) <= NEAR * min(label_map.space.spacing):
            wrong.append(f"centre of structure {number}")
    return wrong


def _area_and_centre(polygons: Iterator[np.ndarray]) -> tuple[float, np.ndarray]:
    """Total area (mm²) and centre of gravity (mm) of closed planar polygons ``(n, 3)``, those of keyholes included."""
    total, moment = 0.0, np.zeros(3)
    for points in polygons:
        fan = points - points[0]
        triangles = np.cross(fan, np.roll(fan, -1, axis=0)) / 2
        whole = triangles.sum(0)
        area = float(np.linalg.norm(whole))
        signed = triangles @ (whole / area)
        total += area
        moment += area * points[0] + signed @ (fan + np.roll(fan, -1, axis=0)) / 3
    return total, moment / total if total else moment
