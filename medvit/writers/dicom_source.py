"""What a result in DICOM refers to: the images that were segmented, plane by plane, and the label map on those planes.

SEG, RTSTRUCT, secondary captures and reports all need the same of their source: which instance and which frame each
slice is, where that lies, one study and one frame of reference, and the patient's attributes to copy. Classic slices,
frames of an enhanced object and tiles of a mosaic are told apart here and nowhere else.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pydicom
from pydicom import Dataset
from pydicom.valuerep import DA, TM, validate_value

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.space import Space
from medvit.errors import MedvitError, OutputError, UnreadableFile

_NEEDED = ("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID")
_COPIED_GROUPS = (0x0008, 0x0010, 0x0012, 0x0018, 0x0032, 0x0038, 0x0040)  # patient, study, trial, equipment
_COPIED = (
    *("StudyInstanceUID", "SeriesInstanceUID", "StudyID", "SeriesNumber", "LossyImageCompression"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "PatientOrientation", "Laterality"),
    *("LossyImageCompressionRatio", "LossyImageCompressionMethod"),
)
# Type-2 attributes that highdicom reads from the source without asking: empty is allowed, absent is not.
_MAY_BE_EMPTY = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex"),
    *("StudyID", "StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName"),
)
PATIENT_AND_STUDY = ("StudyInstanceUID", "SpecificCharacterSet", *_MAY_BE_EMPTY)
NEAR = 0.1  # voxels: farther from a voxel of the source is another grid


@dataclass(frozen=True)
class SourceSlice:
    """One plane of the source.

    Args:
        file: where its header came from, for messages.
        sop_class, instance_uid: what to refer to.
        frame: 1-based frame number to refer to; None for a single-frame instance and for a tile of a mosaic.
        position: LPS mm of the centre of the first pixel.
        orientation: ImageOrientationPatient: direction of growing column index, then of growing row index.
        spacing: PixelSpacing: mm between rows, then between columns.
        size: rows, columns.
        thickness: mm.
    """

    file: Path
    sop_class: str
    instance_uid: str
    frame: int | None
    position: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing: tuple[float, float]
    size: tuple[int, int]
    thickness: float

    def points(self, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """LPS mm ``(..., 3)`` of fractional pixel coordinates."""
        across, down = np.reshape(self.orientation, (2, 3))
        steps = columns[..., None] * (self.spacing[1] * across) + rows[..., None] * (self.spacing[0] * down)
        return np.asarray(np.array(self.position) + steps)


@dataclass(frozen=True)
class DicomSource:
    """The images behind a label map.

    Args:
        slices: planes of the source; at least one.
        labels: the label map on them, ``(slice, row, column)``.
        header: patient, study and equipment of the source with every attribute that must not be absent; no pixels.
        placed: False for an image without a place in the patient (a plain X-ray); the positions are then zeros.
        mosaic: the slices are tiles of one picture: their instance can be named, but no frame in it.
    """

    slices: tuple[SourceSlice, ...]
    labels: np.ndarray
    header: Dataset
    placed: bool
    mosaic: bool

    @property
    def instances(self) -> list[tuple[str, str]]:
        """SOP class and instance UID of every source instance, once each, in slice order."""
        return list(dict.fromkeys((s.sop_class, s.instance_uid) for s in self.slices))


def numbered(labels: np.ndarray, structures: Sequence[Structure]) -> np.ndarray:
    """``labels`` renumbered to 1..n in the order of ``structures``, as DICOM numbers segments."""
    table = np.zeros(int(np.iinfo(labels.dtype).max) + 1, dtype=labels.dtype)
    for number, structure in enumerate(structures, 1):
        if structure.label < len(table):  # a label that the array's type cannot hold does not occur in it
            table[structure.label] = number
    return np.ascontiguousarray(table[labels])


def moments(labels: np.ndarray, space: Space, count: int) -> np.ndarray:
    """Per label 0..count the sums of x, y, z (LPS mm) over its voxels and their number, ``(count + 1, 4)``."""
    voxels = np.array(np.nonzero(labels))
    points = space.world(voxels.T) * (-1, -1, 1)
    found = labels[tuple(voxels)]
    columns = (*points.T, np.ones(len(points)))
    return np.stack([np.bincount(found, column, count + 1) for column in columns], 1)


def concept(code: Code) -> Any:
    """A code as highdicom wants it."""
    import highdicom

    return highdicom.sr.CodedConcept(code.value, code.scheme, code.meaning)


@contextmanager
def quiet() -> Iterator[None]:
    """Without opinions of pydicom and highdicom on values copied from the source: they quote the patient's name."""
    loggers = [logging.getLogger(name) for name in ("pydicom", "highdicom")]
    before = [logger.propagate for logger in loggers]
    silence = logging.NullHandler()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:  # what their modules log ends here, also of those not imported yet
            logger.addHandler(silence)
            logger.propagate = False
        try:
            yield
        finally:
            for logger, propagate in zip(loggers, before, strict=True):
                logger.removeHandler(silence)
                logger.propagate = propagate


def dicom_source(label_map: LabelMap) -> DicomSource:
    """Read the headers of the source and put the label map back on its planes.

    A label map that is a flipped, permuted or cropped part of the source's grid is put back on the whole of it.

    Raises:
        OutputError: UIDs that are missing or mixed, or a label map that does not lie on the planes of its source.
        UnreadableFile: a source file is gone or damaged.
    """
    try:
        with quiet():
            return _assembled(label_map)
    except MedvitError:
        raise
    except Exception as error:  # a damaged attribute raises whatever the parser trips over, and may be quoted
        raise UnreadableFile(
            label_map.source.files[0], f"its header cannot be used for results in DICOM ({type(error).__name__})"
        ) from error


def _assembled(label_map: LabelMap) -> DicomSource:
    source, space = label_map.source, label_map.space
    images = {file: _read_header(file) for file in dict.fromkeys(source.files)}
    _check_identity(label_map, images)
    first = images[source.files[0]]
    header = _patient_and_study(first)
    frames = source.frames or (0,) * len(source.files)
    if source.mosaic:
        return DicomSource(_tiles(label_map, first), label_map.array.transpose(2, 1, 0), header, True, True)
    if space.unit == "px" or not _has_place(first, frames[0]):
        return _unplaced(label_map, first, header)
    slices = tuple(_slice(file, images[file], frame) for file, frame in zip(source.files, frames, strict=True))
    labels = _put_back(label_map, slices)
    return DicomSource(slices, labels.transpose(2, 1, 0), header, True, False)


def instance_references(source: DicomSource) -> list[Dataset]:
    """Items that name every instance of the source, once each."""
    references = []
    for sop_class, uid in source.instances:
        item = Dataset()
        item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
        references.append(item)
    return references


def require_equal(path: Path, part: Path, what: str, differences: Callable[[], list[str]]) -> None:
    """Refuse to keep ``part``, written for ``path``, where reading it back finds differences or fails.

    Raises:
        OutputError: naming the differences; it never quotes an error that is not ours, which may quote the header.
    """
    try:
        with quiet():
            found = differences()
    except MedvitError as error:
        found = [str(error).replace(str(part), "it")]
    except Exception as error:
        found = [type(error).__name__]
    if found:
        raise OutputError(
            f"{path}: the {what} did not read back as it was meant ({', '.join(found[:5])}) and was not kept; "
            "write NIfTI instead and report this"
        )


def _read_header(file: Path) -> Dataset:
    try:
        return pydicom.dcmread(file, stop_before_pixels=True, force=True)  # the reader proved that it is DICOM
    except Exception as error:  # damaged files raise whatever the parser trips over
        raise UnreadableFile(
            file, f"the source header is needed to write results in DICOM ({type(error).__name__})"
        ) from error


def _check_identity(label_map: LabelMap, images: dict[Path, Dataset]) -> None:
    source, first = label_map.source, label_map.source.files[0]
    for file, image in images.items():
        missing = [keyword for keyword in _NEEDED if not image.get(keyword)]
        if missing:
            raise OutputError(
                f"{file}: a result in DICOM must refer to this file, but it has no {missing}; write NIfTI instead"
            )
    expected = {
        "StudyInstanceUID": source.study_uid,
        "SeriesInstanceUID": source.series_uid,
        "FrameOfReferenceUID": label_map.space.frame_of_reference or "",
    }
    for keyword, known in expected.items():
        values = {str(image.get(keyword) or "") for image in images.values()} | ({known} if known else set())
        if len(values) > 1:
            raise OutputError(f"{first}: the source of a result in DICOM must have one {keyword}, got {sorted(values)}")
    if len({str(image.SOPInstanceUID) for image in images.values()}) < len(images):
        raise OutputError(
            f"{first}: several slices share one SOPInstanceUID, so no result in DICOM can refer to them; write NIfTI"
        )


def _patient_and_study(image: Dataset) -> Dataset:
    """A header with what results copy, settled where highdicom would trip over it."""
    header = Dataset()
    keywords = {int(pydicom.tag.Tag(keyword)) for keyword in (*_COPIED, *_MAY_BE_EMPTY)}
    for tag in list(image.keys()):
        if tag in keywords or tag.group in _COPIED_GROUPS:
            try:
                element = image[tag]
                if tag not in keywords and element.VM == 1:  # a value that breaks its rules is not passed on
                    validate_value(element.VR, element.value, pydicom.config.RAISE)
                header.add(element)
            except Exception:  # an attribute that cannot be parsed cannot be copied; none is needed but those below
                continue
    for keyword in _MAY_BE_EMPTY:
        if header.get(keyword) is None:
            setattr(header, keyword, "")
    for keyword, parse in (("PatientBirthDate", DA), ("StudyDate", DA), ("StudyTime", TM)):
        try:
            parse(header.get(keyword))
        except ValueError:  # not a date: cannot be written again. Its value is the patient's and goes nowhere else.
            setattr(header, keyword, "")
    if header.PatientSex not in ("", "M", "F", "O"):
        header.PatientSex = ""
    return header


def _group(image: Dataset, frame: int, sequence: str) -> Dataset:
    """Where the attributes of a functional group stand: per frame, shared, or at the top of a classic header."""
    per_frame = image.get("PerFrameFunctionalGroupsSequence") or ()
    shared = image.get("SharedFunctionalGroupsSequence") or ()
    for item in (*per_frame[frame : frame + 1], *shared[:1]):
        if item.get(sequence):
            found: Dataset = item[sequence].value[0]
            return found
    return image


def _has_place(image: Dataset, frame: int) -> bool:
    return bool(
        _group(image, frame, "PlanePositionSequence").get("ImagePositionPatient")
        and _group(image, frame, "PlaneOrientationSequence").get("ImageOrientationPatient")
    )


def _slice(file: Path, image: Dataset, frame: int) -> SourceSlice:
    measures = _group(image, frame, "PixelMeasuresSequence")
    position = _group(image, frame, "PlanePositionSequence").get("ImagePositionPatient") or ()
    orientation = _group(image, frame, "PlaneOrientationSequence").get("ImageOrientationPatient") or ()
    try:
        spacing = tuple(map(float, measures.get("PixelSpacing") or ()))
        numbers = np.array([*map(float, position), *map(float, orientation), *spacing])
        thickness = float(measures.get("SliceThickness") or 0)
    except (TypeError, ValueError):
        numbers, thickness = np.empty(0), 0.0
    if numbers.shape != (11,) or not np.isfinite(numbers).all() or numbers[9:].min() <= 0:
        raise OutputError(
            f"{file}: a result in DICOM needs ImagePositionPatient, ImageOrientationPatient and PixelSpacing of frame "
            f"{frame + 1}; write NIfTI instead"
        )
    multi = "PerFrameFunctionalGroupsSequence" in image or int(image.get("NumberOfFrames") or 1) > 1
    return SourceSlice(
        file,
        str(image.SOPClassUID),
        str(image.SOPInstanceUID),
        frame + 1 if multi else None,
        tuple(numbers[:3].tolist()),
        tuple(numbers[3:9].tolist()),
        (float(numbers[9]), float(numbers[10])),
        (int(image.get("Rows") or 0), int(image.get("Columns") or 0)),
        thickness,
    )


def _tiles(label_map: LabelMap, image: Dataset) -> tuple[SourceSlice, ...]:
    """Slices of a mosaic, placed by the label map's own grid."""
    affine, spacing = label_map.space.lps_affine, label_map.space.spacing
    directions = affine[:3, :2] / np.array(spacing[:2])
    columns, rows, count = label_map.space.shape
    return tuple(
        SourceSlice(
            label_map.source.files[0],
            str(image.SOPClassUID),
            str(image.SOPInstanceUID),
            None,
            tuple((affine[:3, 3] + k * affine[:3, 2]).tolist()),
            tuple(directions.T.ravel().tolist()),
            (spacing[1], spacing[0]),
            (rows, columns),
            spacing[2],
        )
        for k in range(count)
    )


def _unplaced(label_map: LabelMap, image: Dataset, header: Dataset) -> DicomSource:
    """A single image without a place in the patient: the result has its pixels, and no place either."""
    file, shape = label_map.source.files[0], label_map.space.shape
    size = int(image.get("Rows") or 0), int(image.get("Columns") or 0)
    if shape != (size[1], size[0], 1):
        raise OutputError(
            f"{file}: this image has no place in the patient, so a result in DICOM needs its one frame of {size[1]} x "
            f"{size[0]} pixels, but the label map has {' x '.join(map(str, shape))} voxels; write NIfTI or PNG instead"
        )
    columns, rows = label_map.space.spacing[:2]
    alone = SourceSlice(
        file,
        str(image.SOPClassUID),
        str(image.SOPInstanceUID),
        None,
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.0, 0.0, 1.0, 0.0),
        (rows, columns),
        size,
        0.0,
    )
    return DicomSource((alone,), label_map.array.transpose(2, 1, 0), header, False, False)


def _put_back(label_map: LabelMap, slices: Sequence[SourceSlice]) -> np.ndarray:
    """The label map's array on the whole grid of the source, ``(column, row, slice)``."""
    space, first = label_map.space, slices[0]
    rows, columns = first.size
    for other in slices:
        if other.size != first.size or not np.allclose(other.spacing, first.spacing, rtol=1e-3):
            raise OutputError(f"{other.file}: all slices of the source must be of one size and spacing; write NIfTI")
    linear, offset = _voxels_in_source(space, slices)
    nearest, start = np.rint(linear).astype(int), np.rint(offset).astype(int)
    ends = np.array(np.meshgrid(*[(0, n - 1) for n in space.shape], indexing="ij")).reshape(3, -1)
    lattice = (np.abs(nearest).sum(0) == 1).all() and (np.abs(nearest).sum(1) == 1).all()
    off = np.abs(linear @ ends + offset[:, None] - nearest @ ends - start[:, None]).max()
    if not lattice or not off <= NEAR:
        _refuse(label_map, slices[0], "its voxels are not those of the source")
    corners = nearest @ ends + start[:, None]
    low, high = corners.min(1), corners.max(1) + 1
    shape = (columns, rows, len(slices))
    if low.min() < 0 or (high > shape).any():
        _refuse(label_map, slices[0], f"it reaches beyond the {' x '.join(map(str, shape))} voxels of the source")
    for k in range(low[2], high[2]):  # slices need not lie on one straight line: each is checked on its own
        _check_plane(label_map, slices[k], k, np.linalg.inv(nearest), start, corners)
    signs = nearest.sum(1)
    moved = label_map.array.transpose(np.abs(nearest).argmax(1))[tuple(slice(None, None, int(s)) for s in signs)]
    whole = np.zeros(shape, label_map.array.dtype)
    whole[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = moved
    return whole


def _voxels_in_source(space: Space, slices: Sequence[SourceSlice]) -> tuple[np.ndarray, np.ndarray]:
    """Matrix (3, 3) and offset (3,) from voxels of ``space`` to (column, row, slice) of the source."""
    first, last = slices[0], slices[-1]
    across, down = np.reshape(first.orientation, (2, 3))
    ours = space.lps_affine
    if len(slices) > 1:
        step = (np.array(last.position) - first.position) / (len(slices) - 1)
    else:  # of a single slice the reader chose the step; only its direction is given
        normal = np.cross(across, down)
        step = normal * np.abs(normal @ ours[:3, :3]).max()
    source = np.column_stack([across * first.spacing[1], down * first.spacing[0], step])
    if not abs(np.linalg.det(source)) > 1e-6 * np.linalg.norm(source, axis=0).prod():
        raise OutputError(f"{first.file}: the slices of the source do not span a volume; write NIfTI instead")
    inverse = np.linalg.inv(source)
    return inverse @ ours[:3, :3], inverse @ (ours[:3, 3] - first.position)


def _check_plane(
    label_map: LabelMap, plane: SourceSlice, k: int, inverse: np.ndarray, start: np.ndarray, corners: np.ndarray
) -> None:
    """Slice ``k`` of the source must be where the label map has its voxels, to a tenth of a voxel at the corners."""
    here = corners.copy()
    here[2] = k
    voxels = inverse @ (here - start[:, None])
    ours = label_map.space.world(voxels.T) * (-1, -1, 1)
    distance = np.linalg.norm(plane.points(here[0], here[1]) - ours, axis=1).max()
    if not distance <= NEAR * min(label_map.space.spacing):
        _refuse(label_map, plane, f"there it is {distance:.3g} mm away from slice {k}")


def _refuse(label_map: LabelMap, plane: SourceSlice, why: str) -> NoReturn:
    shape = " x ".join(map(str, label_map.space.shape))
    raise OutputError(
        f"{plane.file}: the label map ({shape} voxels) must lie on the planes of its source, whole, cropped, flipped "
        f"or turned by right angles, but {why}; predict again from this series, or write NIfTI instead"
    )
