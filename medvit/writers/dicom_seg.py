"""DICOM SEG out, through highdicom: one segment per structure, every frame on a plane of the source.

highdicom is given the planes of the source as plain single-frame headers, whatever they came from; which instance and
frame each of them is gets written into the result afterwards. So classic series, volumes of a 4D series, enhanced
objects and mosaics take one road, and after writing the file must say what the label map says.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.uid import ExplicitVRLittleEndian, RLELossless

from medvit.data.labels import LabelMap, Structure
from medvit.data.segmentations import read_dicom_seg, stored_frames
from medvit.errors import OutputError
from medvit.writers.base import atomic, with_suffix
from medvit.writers.dicom_source import (
    NEAR,
    DicomSource,
    SourceSlice,
    concept,
    dicom_source,
    instance_references,
    moments,
    numbered,
    quiet,
    require_equal,
)

Kind = Literal["BINARY", "LABELMAP", "FRACTIONAL"]
KINDS = ("BINARY", "LABELMAP", "FRACTIONAL")

# What highdicom takes a plane for: classes whose rules it knows, with and without a place in the patient.
_PLACED, _UNPLACED = "1.2.840.10008.5.1.4.1.1.4", "1.2.840.10008.5.1.4.1.1.7"
# Stands in for a missing Frame of Reference UID, which highdicom insists on; it is taken out again before writing.
_NO_FRAME = "2.25.0"
SERIES_OFFSET = 1000  # puts a segmentation behind the images in a viewer's list of series


class DicomSegWriter:
    """Label maps of DICOM images as DICOM Segmentation objects.

    Labels become segments 1..n in the order of ``label_map.structures``; a structure without voxels keeps its
    description. Flipped and cropped label maps are put back on the source's grid. The SEG of a source without a Frame
    of Reference UID has none either, as the standard provides: its frames are placed by the images they name. That of a
    plain X-ray has no place at all, but the pixels of the X-ray. Frames of a mosaic's SEG name the mosaic's instance
    and lie where the label map says.

    Args:
        algorithm_name: what made the segmentation, e.g. the bundle's name; at most 64 characters.
        algorithm_version: its version; at most 64 characters.
        suffix: what is put behind the stem.
        kind: ``"BINARY"``: one bit per voxel and segment, read everywhere; ``"LABELMAP"``: one number per voxel,
            RLE-compressed, small, but read by recent software only (DICOM Supplement 243); ``"FRACTIONAL"``: occupancy
            of 0 or 255, for software that asks for it.

    Raises:
        ValueError: another ``kind``.
    """

    def __init__(self, algorithm_name: str, algorithm_version: str, suffix: str = "_seg.dcm", *, kind: Kind = "BINARY"):
        if kind not in KINDS:
            raise ValueError(f"the kind of a DICOM SEG must be one of {', '.join(KINDS)}, got {kind!r}")
        self.algorithm_name = algorithm_name
        self.algorithm_version = algorithm_version
        self.suffix = suffix
        self.kind = kind

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a source that is not DICOM.

        Raises:
            OutputError: the file cannot be written or exists; or the source does not allow a SEG (UIDs missing or
                mixed, planes that are not those of the label map); or what was written does not read back equal.
            UnreadableFile: a source file is gone or damaged.
        """
        if label_map.source.kind != "dicom":
            return None
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            source = dicom_source(label_map)
            try:
                with quiet():
                    seg = self._build(label_map.structures, source)
                    _refer(seg, source)
                    if self.kind == "LABELMAP":  # by pydicom's own encoder: GDCM's can abort the interpreter
                        seg.compress(RLELossless, encoding_plugin="pydicom", generate_instance_uid=False)
                    seg.save_as(part, enforce_file_format=True)
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                # not quoting the error: it may hold a value of the patient's
                raise OutputError(
                    f"{path}: highdicom cannot make a DICOM SEG of this series ({type(error).__name__} over an "
                    f"attribute of {label_map.source.files[0]}); write NIfTI instead"
                ) from error
            require_equal(path, part, "DICOM SEG", lambda: _differences(part, source, label_map))
        return path

    def _build(self, structures: Sequence[Structure], source: DicomSource) -> Any:
        import highdicom

        return highdicom.seg.Segmentation(
            source_images=_planes(source),
            pixel_array=numbered(source.labels, structures),
            segmentation_type=highdicom.seg.SegmentationTypeValues(self.kind),
            segment_descriptions=[self._describe(n, s) for n, s in enumerate(structures, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=SERIES_OFFSET + abs(int(source.header.get("SeriesNumber") or 0)),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="medvit",
            manufacturer_model_name=self.algorithm_name,
            software_versions=self.algorithm_version,
            device_serial_number=self.algorithm_version,
            fractional_type=highdicom.seg.SegmentationFractionalTypeValues.OCCUPANCY,
            transfer_syntax_uid=ExplicitVRLittleEndian,
            content_label="SEGMENTATION",
            content_description=f"Segmentation by {self.algorithm_name}"[:64],
            series_description=f"Segmentation by {self.algorithm_name}"[:64],
        )

    def _describe(self, number: int, structure: Structure) -> Any:
        import highdicom
        from pydicom.sr.codedict import codes

        segment = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=structure.name,
            segmented_property_category=concept(structure.category),
            segmented_property_type=concept(structure.type),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name=self.algorithm_name, family=codes.cid7162.ArtificialIntelligence, version=self.algorithm_version
            ),
            tracking_uid=highdicom.UID(),
            tracking_id=structure.name,
            display_color=highdicom.color.CIELabColor.from_rgb(*structure.color),
        )
        if structure.modifier is not None:  # highdicom has no argument for it
            modifier = concept(structure.modifier)
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        return segment


def _planes(source: DicomSource) -> list[Dataset]:
    """The slices of the source as headers of single-frame images, numbered so that they can be told apart again."""
    planes = []
    for number, plane in enumerate(source.slices):
        image = copy.deepcopy(source.header) if number == 0 else Dataset()  # highdicom copies from the first
        image.StudyInstanceUID, image.SeriesInstanceUID = (
            source.header.StudyInstanceUID,
            source.header.SeriesInstanceUID,
        )
        image.SOPClassUID, image.SOPInstanceUID = _PLACED if source.placed else _UNPLACED, _stand_in(number)
        image.Rows, image.Columns = plane.size
        image.pop("SpacingBetweenSlices", None)  # often the gap, or signed: highdicom works it out from the positions
        if source.placed:
            image.PixelSpacing = [_decimal(v) for v in plane.spacing]
            image.FrameOfReferenceUID = source.header.get("FrameOfReferenceUID") or _NO_FRAME
            image.PositionReferenceIndicator = source.header.get("PositionReferenceIndicator") or ""
            image.ImagePositionPatient = [_decimal(v) for v in plane.position]
            # Scanners write orientations with rounding noise; highdicom compares exactly. The difference is bounded.
            image.ImageOrientationPatient = [_decimal(v) for v in source.slices[0].orientation]
            image.SliceThickness = _decimal(plane.thickness or _step(source.slices) or 1.0)
        planes.append(image)
    if not source.placed:
        planes[0].pop("FrameOfReferenceUID", None)
    return planes


def _stand_in(number: int) -> str:
    return f"2.25.{number + 1}"


def _decimal(value: float) -> Any:
    from pydicom.valuerep import DSfloat

    return DSfloat(value, auto_format=True)


def _step(slices: Sequence[SourceSlice]) -> float:
    """Distance in mm between slices along their normal; 0 for a single one."""
    if len(slices) < 2:
        return 0.0
    normal = np.cross(*np.reshape(slices[0].orientation, (2, 3)))
    return float(abs(np.subtract(slices[-1].position, slices[0].position) @ normal)) / (len(slices) - 1)


def _refer(seg: Any, source: DicomSource) -> None:
    """Name the real instances and frames where highdicom wrote those of the plain headers."""
    slices = {_stand_in(number): plane for number, plane in enumerate(source.slices)}
    frames = seg.PerFrameFunctionalGroupsSequence
    items = [frame.DerivationImageSequence[0].SourceImageSequence[0] for frame in frames]
    for item in {id(item): item for item in items}.values():  # frames of one plane share theirs
        plane = slices[item.ReferencedSOPInstanceUID]
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = plane.sop_class, plane.instance_uid
        if plane.frame is not None:
            item.ReferencedFrameNumber = plane.frame
        if source.mosaic:
            item.SpatialLocationsPreserved = "NO"  # the picture's pixels are those of all tiles
    references = instance_references(source)
    seg.SourceImageSequence = references
    seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence = references
    if not source.placed:  # the standard wants to know which side is which, and takes nothing for an answer
        seg.PatientOrientation = source.header.get("PatientOrientation")
    if seg.get("FrameOfReferenceUID") == _NO_FRAME:
        del seg.FrameOfReferenceUID
        seg.pop("PositionReferenceIndicator", None)  # the rest of the frame's module


def _differences(part: Path, source: DicomSource, label_map: LabelMap) -> list[str]:
    seg = pydicom.dcmread(part, stop_before_pixels=True)
    header, wrong = source.header, []
    if seg.StudyInstanceUID != header.StudyInstanceUID:
        wrong.append("StudyInstanceUID")
    if source.placed and (seg.get("FrameOfReferenceUID") or "") != (header.get("FrameOfReferenceUID") or ""):
        wrong.append("FrameOfReferenceUID")
    wrong += _misplaced(seg, stored_frames(part), source, label_map)
    if not wrong:
        expected = numbered(label_map.array, label_map.structures)
        voxels = int(np.count_nonzero(read_dicom_seg(part, label_map.space).array != expected))
        wrong += [f"{voxels} voxels"] if voxels else []
    return wrong


def _misplaced(seg: Dataset, pixels: Iterable[np.ndarray], source: DicomSource, label_map: LabelMap) -> list[str]:
    """Frames that do not lie where the frame they name lies, and segments with another centre of gravity."""
    planes = {(plane.instance_uid, plane.frame): plane for plane in source.slices}
    shared = seg.SharedFunctionalGroupsSequence[0]
    wrong = []
    found = np.zeros((len(label_map.structures) + 1, 4))  # per segment: sum of LPS mm, voxels
    frames = zip(seg.PerFrameFunctionalGroupsSequence, pixels, strict=True)
    for number, (frame, values) in enumerate(frames, 1):
        named = frame.DerivationImageSequence[0].SourceImageSequence[0]
        plane = planes.get((named.ReferencedSOPInstanceUID, named.get("ReferencedFrameNumber")))
        if plane is None:
            wrong.append(f"reference of frame {number}")
        if plane is None or not source.placed:
            continue
        own = replace(
            plane,
            position=tuple(map(float, frame.PlanePositionSequence[0].ImagePositionPatient)),
            orientation=tuple(map(float, shared.PlaneOrientationSequence[0].ImageOrientationPatient)),
            spacing=_pair(shared.PixelMeasuresSequence[0].PixelSpacing),
        )
        if not source.mosaic and not np.allclose(own.position, plane.position, rtol=0, atol=1e-3):
            wrong.append(f"position of frame {number}")
        rows, columns = np.nonzero(values)
        segments = values[rows, columns]
        if seg.SegmentationType != "LABELMAP":
            (identity,) = (frame if "SegmentIdentificationSequence" in frame else shared).SegmentIdentificationSequence
            segments = np.full_like(segments, identity.ReferencedSegmentNumber, dtype=np.int64)
        np.add.at(found, segments, np.c_[own.points(columns, rows), np.ones(len(rows))])
    return wrong + (_moved(found, label_map) if source.placed else [])


def _pair(values: Sequence[float]) -> tuple[float, float]:
    return float(values[0]), float(values[1])


def _moved(found: np.ndarray, label_map: LabelMap) -> list[str]:
    """Segments whose ``found`` centre (sum of LPS mm, voxels) is not that of the label map."""
    expected = moments(numbered(label_map.array, label_map.structures), label_map.space, len(found) - 1)
    wrong = []
    for number, (ours, theirs) in enumerate(zip(found[1:], expected[1:], strict=True), 1):
        if not (ours[3] or theirs[3]):
            continue
        apart = np.linalg.norm(ours[:3] / max(ours[3], 1) - theirs[:3] / max(theirs[3], 1))
        if not apart <= NEAR * min(label_map.space.spacing):
            wrong.append(f"centre of segment {number} {apart:.3g} mm away")
    return wrong
