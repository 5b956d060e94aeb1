"""DICOM SEG out, through highdicom: one binary segment per structure, every frame on a plane of the source series.

What highdicom takes on trust is settled here: which file is which slice, that all of them share study, series and frame
of reference, attributes it copies without asking whether they are there, and, after writing, that the file says what
the label map says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.errors import OutputError, UnreadableFile
from medvit.writers.base import atomic, with_suffix

if TYPE_CHECKING:
    from pydicom import Dataset

# Type-2 attributes that highdicom reads from the source without asking: empty is allowed, absent is not.
_MAY_BE_EMPTY = {
    **dict.fromkeys(("PatientID", "PatientName", "PatientBirthDate", "PatientSex"), ""),
    **dict.fromkeys(("StudyID", "StudyDate", "StudyTime", "AccessionNumber"), ""),
}
_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
# Stands in for a missing Frame of Reference UID, which highdicom insists on; it is taken out again before writing.
_NO_FRAME = "2.25.0"
_SERIES_OFFSET = 1000  # puts a segmentation behind the images in a viewer's list of series


class DicomSegWriter:
    """Label maps of DICOM series as DICOM Segmentation objects (BINARY, Explicit VR Little Endian).

    Labels become segments 1..n in the order of ``label_map.structures``; a structure without voxels keeps its
    description. The SEG of a series without a Frame of Reference UID has none either, as the standard provides: its
    frames are placed by the images they name.

    Args:
        algorithm_name: what made the segmentation, e.g. the bundle's name; at most 64 characters.
        algorithm_version: its version; at most 64 characters.
        suffix: what is put behind the stem.
    """

    def __init__(self, algorithm_name: str, algorithm_version: str, suffix: str = "_seg.dcm"):
        self.algorithm_name = algorithm_name
        self.algorithm_version = algorithm_version
        self.suffix = suffix

    def write(self, label_map: LabelMap, stem: Path, *, overwrite: bool = False) -> Path | None:
        """Write to ``stem`` + suffix and return that path, or None for a source that is not DICOM.

        Raises:
            OutputError: the file cannot be written or exists; or the source files do not allow a SEG (not one file per
                slice, UIDs missing or mixed, planes that are not those of the label map); or what was written does not
                read back equal.
            UnreadableFile: a source file is gone or damaged.
        """
        if label_map.source.kind != "dicom":
            return None
        path = with_suffix(stem, self.suffix)
        with atomic(path, overwrite=overwrite) as part:
            images = _source_images(label_map)
            segments = _segment_numbers(label_map)
            try:
                with warnings.catch_warnings():
                    # opinions of pydicom and highdicom on values copied from the source
                    warnings.simplefilter("ignore")
                    seg = self._build(label_map.structures, images, segments)
                    _drop_stand_in([seg, *images])
                    seg.save_as(part, enforce_file_format=True)
            except (AttributeError, TypeError, ValueError) as error:
                # not quoting the error: it may hold a value of the patient's
                raise OutputError(
                    f"{path}: highdicom cannot make a DICOM SEG of this series ({type(error).__name__} over an "
                    f"attribute of {label_map.source.files[0]}); write NIfTI instead"
                ) from error
            _verify(part, images, segments, path)
        return path

    def _build(self, structures: Sequence[Structure], images: list[Dataset], segments: np.ndarray) -> Any:
        import highdicom
        from pydicom.uid import ExplicitVRLittleEndian

        return highdicom.seg.Segmentation(
            source_images=images,
            pixel_array=segments,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=[self._describe(n, s) for n, s in enumerate(structures, 1)],
            series_instance_uid=highdicom.UID(),
            series_number=_SERIES_OFFSET + abs(int(images[0].get("SeriesNumber") or 0)),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="medvit",
            manufacturer_model_name=self.algorithm_name,
            software_versions=self.algorithm_version,
            device_serial_number=self.algorithm_version,
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
            segmented_property_category=_concept(structure.category),
            segmented_property_type=_concept(structure.type),
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name=self.algorithm_name, family=codes.cid7162.ArtificialIntelligence, version=self.algorithm_version
            ),
            tracking_uid=highdicom.UID(),
            tracking_id=structure.name,
            display_color=highdicom.color.CIELabColor.from_rgb(*structure.color),
        )
        if structure.modifier is not None:  # highdicom has no argument for it
            modifier = _concept(structure.modifier)
            segment.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [modifier]
        return segment


def _concept(code: Code) -> Any:
    import highdicom

    return highdicom.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _segment_numbers(label_map: LabelMap) -> np.ndarray:
    """Segment numbers as frames ``(slice, row, column)``: labels renumbered to 1..n as DICOM wants them."""
    table = np.zeros(int(np.iinfo(label_map.array.dtype).max) + 1, dtype=label_map.array.dtype)
    for number, structure in enumerate(label_map.structures, 1):
        if structure.label < len(table):  # a label that the array's type cannot hold does not occur in it
            table[structure.label] = number
    return np.ascontiguousarray(table[label_map.array.transpose(2, 1, 0)])


def _source_images(label_map: LabelMap) -> list[Dataset]:
    """Headers of the source files, slice ``k`` at place ``k``, checked and completed for a SEG to refer to."""
    files, space = label_map.source.files, label_map.space
    if len(files) != space.shape[2]:
        raise OutputError(
            f"{files[0]}: a DICOM SEG refers to one file per slice, but this image has {space.shape[2]} slices from "
            f"{len(files)} files (multi-frame or mosaic); write NIfTI instead"
        )
    images = [_read_header(file) for file in files]
    _check_identity(label_map, images)
    for k, (file, image) in enumerate(zip(files, images, strict=True)):
        _check_plane(file, image, space, k)
    for image in images:
        _complete(image, images[0], space)
    return images


def _read_header(file: Path) -> Dataset:
    import pydicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return pydicom.dcmread(file, stop_before_pixels=True, force=True)  # the reader proved that it is DICOM
    except Exception as error:  # damaged files raise whatever the parser trips over
        raise UnreadableFile(
            file, f"the source header is needed to write a DICOM SEG ({type(error).__name__})"
        ) from error


def _check_identity(label_map: LabelMap, images: list[Dataset]) -> None:
    source, first = label_map.source, label_map.source.files[0]
    for file, image in zip(source.files, images, strict=True):
        missing = [keyword for keyword in _NEEDED if not image.get(keyword)]
        if missing:
            raise OutputError(
                f"{file}: a DICOM SEG must refer to this file, but it has no {missing}; write NIfTI instead"
            )
    expected = {
        "StudyInstanceUID": source.study_uid,
        "SeriesInstanceUID": source.series_uid,
        "FrameOfReferenceUID": label_map.space.frame_of_reference or "",
    }
    for keyword, known in expected.items():
        values = {str(image.get(keyword) or "") for image in images} | ({known} if known else set())
        if len(values) > 1:
            raise OutputError(f"{first}: the source of a DICOM SEG must have one {keyword}, got {sorted(values)}")
    if len({str(image.SOPInstanceUID) for image in images}) < len(images):
        raise OutputError(
            f"{first}: several slices share one SOPInstanceUID, so a DICOM SEG cannot refer to them; write NIfTI"
        )


def _check_plane(file: Path, image: Dataset, space: Space, k: int) -> None:
    """Slice ``k`` of ``space`` must be the plane of ``image``, corner by corner, to a tenth of a voxel."""
    columns, rows, _ = space.shape
    if (image.get("Columns"), image.get("Rows")) != (columns, rows):
        raise OutputError(
            f"{file}: the label map has {columns} x {rows} pixels per slice, "
            f"the source file {image.get('Columns')} x {image.get('Rows')}; predict again from this series"
        )
    along_row, along_column = np.reshape(image.ImageOrientationPatient, (2, 3)).astype(float)
    row_step, column_step = map(float, image.PixelSpacing)  # between rows, then between columns
    corners = np.array([(0, 0), (columns - 1, 0), (0, rows - 1), (columns - 1, rows - 1)])
    own = np.array(image.ImagePositionPatient, float) + corners * (column_step, row_step) @ (along_row, along_column)
    ours = (np.c_[corners, np.full(4, k), np.ones(4)] @ space.lps_affine.T)[:, :3]
    distance = np.linalg.norm(own - ours, axis=1).max()
    if not distance <= 0.1 * min(space.spacing):
        raise OutputError(
            f"{file}: slice {k} of the label map must lie on this file's plane, but is {distance:.3g} mm away; "
            "predict again from this series"
        )


def _complete(image: Dataset, first: Dataset, space: Space) -> None:
    """Settle, on this copy of a header, what highdicom would trip over."""
    from pydicom.valuerep import DA, TM

    for keyword, empty in _MAY_BE_EMPTY.items():
        if image.get(keyword) is None:
            setattr(image, keyword, empty)
    for keyword, parse in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            parse(image.get(keyword))
        except ValueError:  # not a date: cannot be written again. Its value is the patient's and goes nowhere else.
            setattr(image, keyword, "")
    if image.PatientSex not in ("", "M", "F", "O"):
        image.PatientSex = ""
    # Scanners write orientations with rounding noise; highdicom compares exactly. _check_plane bounded the difference.
    image.ImageOrientationPatient = first.ImageOrientationPatient
    if not image.get("SliceThickness"):
        image.SliceThickness = f"{space.spacing[2]:.6g}"
    if "SpacingBetweenSlices" in image:  # often the gap, or signed: highdicom then works it out from the positions
        del image.SpacingBetweenSlices
    if not image.get("FrameOfReferenceUID"):
        image.FrameOfReferenceUID = _NO_FRAME


def _drop_stand_in(datasets: Iterable[Dataset]) -> None:
    for dataset in datasets:
        if dataset.FrameOfReferenceUID == _NO_FRAME:
            del dataset.FrameOfReferenceUID
            dataset.pop("PositionReferenceIndicator", None)  # the rest of the frame's module


def _verify(part: Path, images: list[Dataset], segments: np.ndarray, path: Path) -> None:
    """Read the file back; OutputError unless identity, every frame's place and every voxel are what they had to be."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            differences = _differences(part, images, segments)
    except Exception as error:  # whatever highdicom's reader objects to, e.g. segments that overlap
        differences = [f"{type(error).__name__}: {error}"]
    if differences:
        raise OutputError(
            f"{path}: the DICOM SEG did not read back as it was meant ({', '.join(differences[:5])}) and was not kept; "
            "write NIfTI instead and report this"
        )


def _differences(part: Path, images: list[Dataset], segments: np.ndarray) -> list[str]:
    import highdicom

    seg = highdicom.seg.segread(part)
    wrong = [key for key in ("StudyInstanceUID", "FrameOfReferenceUID") if seg.get(key) != images[0].get(key)]
    orientation = seg.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence[0].ImageOrientationPatient
    wrong += [] if np.allclose(orientation, images[0].ImageOrientationPatient, atol=1e-6) else ["orientation"]
    by_uid = {image.SOPInstanceUID: image for image in images}
    for number, frame in enumerate(seg.PerFrameFunctionalGroupsSequence, 1):
        image = by_uid[frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID]
        position = frame.PlanePositionSequence[0].ImagePositionPatient
        wrong += [] if np.allclose(position, image.ImagePositionPatient, atol=1e-4) else [f"position of frame {number}"]
    pixels = seg.get_pixels_by_source_instance(
        list(by_uid), combine_segments=True, assert_missing_frames_are_empty=True
    )
    voxels = int(np.count_nonzero(pixels != segments))
    return [*wrong, f"{voxels} voxels"] if voxels else wrong
