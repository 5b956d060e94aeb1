"""The 2D images of one DICOM file: one of a classic file, many of a multi-frame object or a mosaic.

Of each: where it lies, and what tells it from images at the same place (echo, time, diffusion weighting, ...).
Sources: DICOM PS3.3 C.7.6.16 (functional groups); nibabel, "Siemens format DICOM with CSA header"; private tags as
dcm2niix documents them (Li et al., 2016).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from math import ceil, isfinite, sqrt
from typing import Any

import numpy as np
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medvit.data.attributes import Attributes
from medvit.data.slices import Plane

Label = float | str
Place = Dataset | Attributes  # where attributes stand: at the top level, or in an item

# What may tell volumes at the same place apart, in the order in which it is tried. The first kinds are different
# images, which may cover different slices; the others are repetitions of one image.
KINDS = ("image_type", "component", "rescale_type", "kernel", "kvp", "stack")
REPETITIONS = (
    *("echo_time_ms", "inversion_time_ms", "flip_angle", "b_value", "b_vector", "temporal_position"),
    *("trigger_time_ms", "dimension", "acquisition", "instance"),
)
LABELS = KINDS + REPETITIONS

_CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f]")
_SIEMENS, _GE, _PHILIPS, _UIH = 0x0019, 0x0043, 0x2001, 0x0065
_B_VALUES = {_SIEMENS: 0x100C, _GE: 0x1039, _PHILIPS: 0x1003, _UIH: 0x1009}
_GE_B_VALUE_OFFSET = 1_000_000_000  # added by scanners that store the direction of the weighting elsewhere
_PRIVATE = [(group << 16) + element for group, element in _B_VALUES.items()]
_CSA, _UIH_SLICES, _UIH_COUNT = 0x00291010, 0x00651051, 0x00651050
MOSAIC_TAGS = (_CSA, 0x00290010, _UIH_SLICES, _UIH_COUNT, 0x00650010)

TAGS: tuple[str | int, ...] = (
    *("InstanceNumber", "AcquisitionNumber", "AcquisitionDateTime", "AcquisitionDate", "AcquisitionTime"),
    *("ContentDate", "ContentTime", "EchoTime", "InversionTime", "FlipAngle", "KVP", "ConvolutionKernel", "StackID"),
    *("ComplexImageComponent", "RescaleType", "TemporalPositionIdentifier", "TemporalPositionIndex", "TriggerTime"),
    *("NominalCardiacTriggerDelayTime", "DiffusionBValue", "DiffusionGradientOrientation", "SpacingBetweenSlices"),
    *("DetectorInformationSequence", "SliceVector"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "DimensionIndexSequence"),
    *("RescaleSlope", "RescaleIntercept"),
    *_PRIVATE,
)


class NoPlace(ValueError):
    """Why a frame has no place in the patient, in the tags' own names."""


@dataclass(frozen=True)
class Frame:
    """One 2D image.

    Args:
        number: of the frame in its file, or of the tile in its mosaic, from 0.
        plane: where it lies, None if that is unknown.
        labels: values of :data:`LABELS`, None where unknown.
        time: seconds of its acquisition on some clock, None if unknown.
        thickness: SliceThickness in mm, None where it is missing or makes no sense.
        scale: (RescaleSlope, RescaleIntercept), None where missing.
        written: seconds at which the image was made of what was acquired; known only where ``time`` is not.
        apart: SpacingBetweenSlices in mm, None where it is missing or less than the thickness, as if it were the gap.
    """

    number: int
    plane: Plane | None
    labels: tuple[Label | None, ...]
    time: float | None
    thickness: float | None
    scale: tuple[float | None, float | None] = (None, None)
    written: float | None = None
    apart: float | None = None

    def label(self, name: str) -> Label | None:
        """Value of one of :data:`LABELS`."""
        return self.labels[LABELS.index(name)]


def single_frame(ds: Attributes, matrix: Sequence[int], plane: bool = True) -> Frame:
    """The image of a classic file, ``matrix`` = (rows, columns, ...); without a plane if that is not asked for.

    Raises:
        NoPlace: a plane is asked for, and its tags do not give one.
    """
    groups = _Groups(ds, (ds,))
    return _frame(groups, _plane(groups, matrix) if plane else None)


def functional_frames(ds: Attributes, count: int, matrix: Sequence[int], plane: bool = True) -> tuple[Frame, ...]:
    """Frames of a multi-frame object: per-frame functional groups before shared ones before the top level.

    Raises:
        NoPlace: planes are asked for, and a frame has none.
    """
    shared = tuple(ds.get("SharedFunctionalGroupsSequence") or ())
    each = tuple(ds.get("PerFrameFunctionalGroupsSequence") or ())
    if plane and len(each) != count:
        raise NoPlace(f"NumberOfFrames is {count}, but PerFrameFunctionalGroupsSequence describes {len(each)}")
    frames = []
    for number in range(count):
        groups = _Groups(ds, (*each[number : number + 1], *shared[:1], ds), number)
        frames.append(_frame(groups, _plane(groups, matrix) if plane else None))
    return tuple(frames)


def _frame(groups: _Groups, plane: Plane | None) -> Frame:
    slope, intercept = (
        _exact(groups.get(keyword, "PixelValueTransformationSequence"))
        for keyword in ("RescaleSlope", "RescaleIntercept")
    )
    thickness, apart = _thickness(groups), _exact(groups.get("SpacingBetweenSlices", "PixelMeasuresSequence"))
    apart = apart if apart and apart >= (thickness or 0) else None
    time = _time(groups)
    written = _moment(groups, "Content") if time is None else None
    return Frame(groups.number, plane, _labels(groups), time, thickness, (slope, intercept), written, apart)


def tomo_frames(ds: Attributes, count: int, matrix: Sequence[int]) -> tuple[Frame, ...]:
    """Slices of a reconstructed nuclear medicine tomogram, of which only the first is placed.

    The others follow along the normal, or against it where SpacingBetweenSlices is negative (PS3.3 C.8.4.15).

    Raises:
        NoPlace: the detector does not place the first slice, or what tells the place of the others is missing.
    """
    detectors = list(ds.get("DetectorInformationSequence") or ())
    groups = _Groups(ds, (*detectors[:1], ds))
    first, step = _plane(groups, matrix), _exact(groups.get("SpacingBetweenSlices"))
    if not step:
        raise NoPlace(f"slices of a tomogram need SpacingBetweenSlices, got {step}")
    order = _numbers(groups.get("SliceVector"), "SliceVector", count)
    if sorted(order) != list(range(1, count + 1)):
        raise NoPlace(f"SliceVector must number {count} slices from 1")
    normal = np.cross(first.across, first.down)
    whole = _frame(groups, None)
    positions = [np.array(first.position) + (number - 1) * step * normal for number in order]
    return tuple(replace(whole, number=n, plane=_at(first, first.shape, at)) for n, at in enumerate(positions))


def is_mosaic(image_type: Sequence[str]) -> bool:
    """Whether ImageType says that the slices of a volume lie side by side in one image."""
    return "MOSAIC" in image_type or "VFRAME" in image_type


def mosaic_frames(ds: Dataset, matrix: Sequence[int]) -> tuple[Frame, ...]:
    """Tiles of a Siemens or UIH mosaic; each plane has the shape of a tile.

    Raises:
        NoPlace: the private header that places the tiles is missing or contradicts the image.
    """
    slices = list(ds.get(_UIH_SLICES).value or ()) if _UIH_SLICES in ds else []
    places = _uih_places(ds, slices, matrix) if slices else _siemens_places(ds, matrix)
    groups = _Groups(ds, (ds,))
    whole = _frame(groups, None)
    return tuple(replace(whole, number=n, plane=plane, scale=(None, None)) for n, plane in enumerate(places))


def _siemens_places(ds: Dataset, matrix: Sequence[int]) -> list[Plane]:
    from nibabel.nicom import csareader

    try:
        csa = csareader.get_csa_header(ds, "image")
        count = int(csareader.get_n_mosaic(csa) or 0) if csa else 0
        given = csareader.get_slice_normal(csa) if csa else None
    except Exception as error:  # damaged private headers raise whatever the parser trips over
        raise NoPlace(
            f"the Siemens CSA header that places the tiles of a mosaic is damaged ({type(error).__name__})"
        ) from error
    if not count or given is None:
        raise NoPlace("the Siemens CSA header with NumberOfImagesInMosaic and SliceNormalVector is missing")
    whole = _plane(_Groups(ds, (ds,)), matrix)
    across, down, spacing = np.array(whole.across), np.array(whole.down), whole.spacing
    normal = np.cross(across, down)
    if abs(abs(float(normal @ np.asarray(given, float))) - 1) > 1e-3:
        raise NoPlace(f"SliceNormalVector {np.round(given, 4).tolist()} is not at a right angle to the image")
    step = _exact(ds.get("SpacingBetweenSlices")) or _exact(ds.get("SliceThickness"))
    if count > 1 and (step is None or step <= 0):
        raise NoPlace(f"the tiles of a mosaic need SpacingBetweenSlices, got {step}")
    shape = _tile(matrix, count, full=True)
    # ImagePositionPatient is that of a tile as large as the mosaic, around the same centre
    corner = np.array(whole.position)
    for axis, (direction, full, part) in enumerate(zip((across, down), whole.shape, shape, strict=True)):
        corner = corner + direction * spacing[axis] * (full - part) / 2
    upwards = np.sign(normal @ np.asarray(given, float)) * normal
    return [_at(whole, shape, corner + n * (step or 0.0) * upwards) for n in range(count)]


def _uih_places(ds: Dataset, slices: Sequence[Dataset], matrix: Sequence[int]) -> list[Plane]:
    count = ds.get(_UIH_COUNT)
    if count is not None and _exact(count.value) != len(slices):
        raise NoPlace(f"its private header places {len(slices)} tiles and counts {_exact(count.value)}")
    shape = _tile(matrix, len(slices), full=False)
    return [_plane(_Groups(ds, (one, ds)), (shape[1], shape[0])) for one in slices]


def _tile(matrix: Sequence[int], count: int, full: bool) -> tuple[int, int]:
    """(columns, rows) of a tile: as many tiles side by side as a square of them needs, and as few rows as hold them.

    ``full``: the square is filled up, as Siemens does, unless only fewer rows give square tiles.
    """
    side = ceil(sqrt(count))
    rows, columns = matrix[0], matrix[1]
    ways = (side, ceil(count / side)) if full else (ceil(count / side),)
    for down in ways:
        if columns % side == 0 and rows % down == 0 and (down == ways[0] or rows // down == columns // side):
            return columns // side, rows // down
    raise NoPlace(f"{columns} x {rows} pixels cannot hold {count} slices in rows of {side}")


def _at(plane: Plane, shape: tuple[int, int], position: np.ndarray) -> Plane:
    x, y, z = map(float, position)
    return Plane(shape, (x, y, z), plane.across, plane.down, plane.spacing)


class _Groups:
    """Attributes of one frame, wherever they stand: in its own groups, the shared ones, or at the top level."""

    def __init__(self, ds: Place, places: Sequence[Place], number: int = 0):
        self.ds, self.places, self.number = ds, places, number

    def get(self, keyword: str | int, *sequences: str) -> Any:
        """Value of ``keyword`` in the first place that has it, in one of these sequences or as it is, else None."""
        try:
            return self.require(keyword, *sequences)
        except Exception:  # values are parsed when they are asked for, and raise what they like
            return None

    def require(self, keyword: str | int, *sequences: str) -> Any:
        """The same; raises what a damaged value raises."""
        for place in self.places:
            for item in self._items(place, sequences):
                value = item.get(keyword)
                value = value.value if isinstance(value, DataElement) else value  # of a tag that has no keyword
                if value is not None and value != "":
                    return value
        return None

    def _items(self, place: Place, sequences: Sequence[str]) -> Iterator[Place]:
        for name in sequences:
            items = place.get(name)
            if items:
                yield items[0]
        yield place


def _plane(groups: _Groups, matrix: Sequence[int]) -> Plane:
    def numbers(keyword: str, sequence: str, count: int) -> tuple[float, ...]:
        try:
            value = groups.require(keyword, sequence)
        except Exception as error:
            raise NoPlace(f"{keyword} holds no numbers") from error
        return _numbers(value, keyword, count)

    position = numbers("ImagePositionPatient", "PlanePositionSequence", 3)
    orientation = numbers("ImageOrientationPatient", "PlaneOrientationSequence", 6)
    spacing = numbers("PixelSpacing", "PixelMeasuresSequence", 2)
    try:
        return Plane.from_dicom(matrix[0], matrix[1], position, orientation, spacing)
    except ValueError as error:
        raise NoPlace(str(error)) from error


def _numbers(value: Any, keyword: str, count: int) -> tuple[float, ...]:
    if value is None or value == "":
        raise NoPlace(f"{keyword} is missing")
    try:
        numbers = tuple(float(part) for part in (value if isinstance(value, MultiValue | list | tuple) else [value]))
    except (TypeError, ValueError, OverflowError) as error:
        raise NoPlace(f"{keyword} holds no numbers") from error
    if len(numbers) != count:
        raise NoPlace(f"{keyword} needs {count} numbers, got {len(numbers)}")
    return numbers


def _thickness(groups: _Groups) -> float | None:
    thickness = _exact(groups.get("SliceThickness", "PixelMeasuresSequence"))
    return thickness if thickness and thickness > 0 else None


def _labels(groups: _Groups) -> tuple[Label | None, ...]:
    frame_types = ("MRImageFrameTypeSequence", "CTImageFrameTypeSequence", "PETFrameTypeSequence")
    content = "FrameContentSequence"
    image_type = groups.get("FrameType", *frame_types) or groups.get("ImageType")
    return (
        _text(image_type),
        _text(groups.get("ComplexImageComponent", *frame_types)),
        _text(groups.get("RescaleType", "PixelValueTransformationSequence")),
        _text(groups.get("ConvolutionKernel", "CTReconstructionSequence")),
        _number(groups.get("KVP", "CTXRayDetailsSequence")),
        _text(groups.get("StackID", content)),
        _number(_either(groups.get("EffectiveEchoTime", "MREchoSequence"), groups.get("EchoTime"))),
        _number(_either(groups.get("InversionTimes", "MRModifierSequence"), groups.get("InversionTime"))),
        _number(groups.get("FlipAngle", "MRTimingAndRelatedParametersSequence")),
        _b_value(groups),
        _b_vector(groups),
        _number(_either(groups.get("TemporalPositionIndex", content), groups.get("TemporalPositionIdentifier"))),
        _number(
            _either(
                groups.get("NominalCardiacTriggerDelayTime", "CardiacSynchronizationSequence"),
                groups.get("TriggerTime"),
            )
        ),
        _dimension(groups),
        _number(_either(groups.get("FrameAcquisitionNumber", content), groups.get("AcquisitionNumber"))),
        _number(groups.get("InstanceNumber")),
    )


def _either(value: Any, other: Any) -> Any:
    return other if value is None else value  # the value may be 0


def _b_value(groups: _Groups) -> float | None:
    known = _number(groups.get("DiffusionBValue", "MRDiffusionSequence"))
    if known is not None:
        return known
    for group, tag in zip(_B_VALUES, _PRIVATE, strict=True):
        value = _number(groups.get(tag))
        if value is not None:
            return value % _GE_B_VALUE_OFFSET if group == _GE else value
    return None


def _b_vector(groups: _Groups) -> str | None:
    directions = groups.get("DiffusionGradientDirectionSequence", "MRDiffusionSequence")
    try:
        nested = directions[0].get("DiffusionGradientOrientation") if directions else None
        value = groups.get("DiffusionGradientOrientation") if nested is None else nested
        return None if value is None else " ".join(f"{float(part):.4g}" for part in value)
    except (TypeError, ValueError):
        return None


def _dimension(groups: _Groups) -> str | None:
    """Dimension index values of a frame but those that say where it lies."""
    values = groups.get("DimensionIndexValues", "FrameContentSequence")
    pointers = [item.get("DimensionIndexPointer") for item in groups.get("DimensionIndexSequence") or ()]
    values = values if isinstance(values, MultiValue | list) else [values]
    if not pointers or len(values) != len(pointers):
        return None
    place = {0x00200032, 0x00209057, 0x00209056, 0x00201041}  # position, in-stack position, stack, slice location
    kept = [str(value) for value, pointer in zip(values, pointers, strict=True) if pointer not in place]
    return "-".join(kept) or None


def _time(groups: _Groups) -> float | None:
    stamp = groups.get("FrameAcquisitionDateTime", "FrameContentSequence") or groups.get("AcquisitionDateTime")
    seconds = _seconds(str(stamp or ""))
    return _moment(groups, "Acquisition") if seconds is None else seconds


def _moment(groups: _Groups, what: str) -> float | None:
    return _seconds(f"{groups.get(f'{what}Date') or '19000101'}{groups.get(f'{what}Time') or ''}")


def _seconds(text: str) -> float | None:
    """Of a DICOM date and time ``YYYYMMDDHHMMSS.ffffff``; None without a time of day."""
    whole, _, fraction = text.strip().partition(".")
    try:
        moment = datetime.strptime(whole[:14], "%Y%m%d%H%M%S")
        digits = fraction.partition("+")[0].partition("-")[0][:6]
        return (moment - datetime(1900, 1, 1)) / timedelta(seconds=1) + float(f"0.{digits or 0}")
    except ValueError:
        return None


def text_of(value: Any) -> str:
    """A value as text, ``""`` for None.

    It ends at the first control character: what follows is another element, which a damaged length made part of this
    one, and may name the patient.
    """
    parts = value if isinstance(value, MultiValue | list) else ["" if value is None else value]
    return _CONTROL.split("\\".join(map(str, parts)).strip("\0 "), maxsplit=1)[0].strip()


def _text(value: Any) -> str | None:
    return text_of(value) or None


def _number(value: Any) -> float | None:
    """First number of a value, rounded so that equal settings compare equal; None if there is none."""
    number = _exact(value)
    return None if number is None else round(number, 3)


def _exact(value: Any) -> float | None:
    """First finite number of a value, None if there is none."""
    if isinstance(value, MultiValue | list | tuple):
        value = value[0] if len(value) else None
    if isinstance(value, bytes):  # a private tag whose type is unknown
        text = bool(value.strip(b"\0")) and not value.strip(b" 0123456789.-\\\0")
        value = value.decode().partition("\\")[0].strip("\0 ") if text else _binary(value)
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def _binary(value: bytes) -> float | None:
    kind = {8: "<f8", 4: "<f4"}.get(len(value))
    return float(np.frombuffer(value, kind)[0]) if kind else None
