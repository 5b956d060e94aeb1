"""What one DICOM file says about itself, pixels apart."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag, Tag
from pydicom.uid import UID

from medvit.data import doubts, frames
from medvit.data.attributes import Attributes, read_attributes
from medvit.data.frames import Frame
from medvit.data.slices import Plane
from medvit.errors import MedvitError, UnreadableFile

# Storage classes whose objects are images of a patient. Everything else (reports, segmentations, structures, dose,
# presentation states, raw data) is set aside, however much it may look like pixels.
_CLASS = "1.2.840.10008.5.1.4.1.1."
_TOMOGRAPHIC = "2 2.1 2.2 4 4.1 4.3 4.4 128 128.1 130 13.1.3 6.2 77.1.5.4"  # CT, MR, PET, tomosynthesis, 3D US, OCT
_CR_DX = "1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1"  # with mammography and intra-oral
_ULTRASOUND_CAPTURE = "3.1 6 6.1 7 7.1 7.2 7.3 7.4 20 3"  # with planar nuclear medicine
_NUCLEAR, _PET = _CLASS + "20", _CLASS + "128"
_ANGIOGRAPHIC = "12.1 12.1.1 12.2 12.2.1 13.1.1 13.1.2"  # with fluoroscopy
_VISIBLE_LIGHT = "77.1.1 77.1.2 77.1.4 77.1.2.1 77.1.4.1 77.1.1.1 77.1.5.1 77.1.5.2 77.1.6 481.1"  # with RT image


def _classes(*families: str) -> frozenset[str]:
    return frozenset(_CLASS + tail for family in families for tail in family.split())


# Images that need no place in the patient to be used: projections, captures, photographs.
FLAT_CLASSES = _classes(_CR_DX, _ULTRASOUND_CAPTURE, _ANGIOGRAPHIC, _VISIBLE_LIGHT)
IMAGE_CLASSES = FLAT_CLASSES | _classes(_TOMOGRAPHIC)
_RECENT_CLASSES = _classes("66.7 66.8")  # label maps and height maps, which pydicom has not heard of
_FLAT_MODALITIES = ("CR", "DX", "MG", "IO", "PX", "RG", "RF", "XA", "US", "OP", "XC", "ES", "GM", "SM", "OT")

_TAGS: list[BaseTag] = [
    Tag(tag)
    for tag in (
        "SOPClassUID",
        "SOPInstanceUID",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "FrameOfReferenceUID",
        "Modality",
        "ImageType",
        "SeriesNumber",
        "SeriesDescription",
        "Rows",
        "Columns",
        "NumberOfFrames",
        "SamplesPerPixel",
        "PhotometricInterpretation",
        "BitsAllocated",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
        "SliceThickness",
        "ImagerPixelSpacing",
        "NominalScannedPixelSpacing",
        "NumberOfSlices",
        "SequenceOfUltrasoundRegions",
        *frames.TAGS,
        *doubts.TAGS,
    )
]

# Read to be compared with the description, never kept: operators type names and numbers of patients into it.
_PATIENT_TAGS = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientNames", "OtherPatientIDs")
_SHORTEST_SECRET = 3  # characters; less would eat words such as "T1" of a patient called so

_ALL_TAGS = frozenset(int(tag) for tag in (*_TAGS, *map(Tag, _PATIENT_TAGS)))
_PIXEL_TAGS = frozenset((0x7FE00008, 0x7FE00009, 0x7FE00010))
_UNDEFINED_LENGTH = 0xFFFFFFFF
_MAX_COMPRESSION = 20_000  # bytes of pixels per byte of file; more is a forged header, not an image


class NotAnImage(UnreadableFile):
    """A well-formed DICOM file that is no image of a patient: a report, a segmentation, a DICOMDIR, ..."""

    code = "not-an-image"


@dataclass(frozen=True)
class Header:
    """What one DICOM image file says about itself, pixels apart.

    Args:
        description: SeriesDescription without the words that are part of the patient's name, number or birth date.
        matrix: (rows, columns, samples per pixel) of each image, of a tile for a mosaic; a palette gives 3 samples.
        localizer: the image is a scout, made to plan others.
        frames: its images; without planes where ``flat``, none where there is a defect.
        mosaic: the images are tiles of one.
        flat: images without a place in the patient, which need none: projections, captures, photographs.
        pixel_spacing: of a flat image, mm between (columns, rows), None where unknown.
        notes: what a person should know.
        defect: (code, reason) why this file cannot be used, None if it can.
        alike: what the files of its series should agree on, see :func:`medvit.data.doubts.alike`.
        slices: of a PET series, how many it has at each time; others use the attribute for what they like.
    """

    path: Path
    study_uid: str
    series_uid: str
    instance_uid: str
    sop_class: str
    modality: str
    description: str
    series_number: int | None
    frame_of_reference: str | None
    matrix: tuple[int, int, int]
    localizer: bool
    frames: tuple[Frame, ...] = ()
    mosaic: bool = False
    flat: bool = False
    pixel_spacing: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    defect: tuple[str, str] | None = None
    alike: tuple[str, ...] = ()
    slices: int | None = None

    @property
    def plane(self) -> Plane | None:
        """Where the first of its images lies."""
        return self.frames[0].plane if self.frames else None


def looks_like_dicom(start: bytes) -> bool:
    """True if a file's first 132 bytes or more are those of a DICOM file, with or without its preamble."""
    if start[128:132] == b"DICM":
        return True
    # Without a preamble a data set begins with group 0002 or 0008; in the latter's first elements VRs are known.
    if start[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x02", b"\x00\x08") or len(start) < 132:
        return False
    explicit = start[4:6] in (b"UL", b"UI", b"CS", b"OB", b"DA", b"TM", b"SH", b"LO")
    return explicit or (
        start[:2] in (b"\x02\x00", b"\x08\x00") and start[3] == 0 and 0 < start[4] <= 64 and start[5:8] == b"\0\0\0"
    )


def read_header(path: str | Path) -> Header:
    """Read everything but the pixels of one file.

    Raises:
        NotAnImage: DICOM, but not an image.
        UnreadableFile: not DICOM, corrupt, or without permission.
    """
    path = Path(path)
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            start = file.read(132)
            if not looks_like_dicom(start):
                raise UnreadableFile(path, "not a DICOM file" if start else "the file is empty")
            return _header(path, read_attributes(file, _ALL_TAGS, _PIXEL_TAGS), file)
    except MedvitError:
        raise
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # a corrupt header can raise nearly anything from inside pydicom
        raise UnreadableFile(path, f"corrupt DICOM header ({type(error).__name__}); get the file again") from error


def _header(path: Path, ds: Attributes, file: BinaryIO) -> Header:
    sop_class = _text(ds, "SOPClassUID") or ds.media_class
    damaged = _is_damaged(sop_class)
    if sop_class and sop_class not in IMAGE_CLASSES and not damaged:
        raise NotAnImage(path, f"a DICOM object that is not an image: {_named(sop_class)}")
    rows, columns = _integer(ds, "Rows") or 0, _integer(ds, "Columns") or 0
    if not sop_class and not (rows and columns):
        raise UnreadableFile(path, "DICOM data without a SOP class or an image; get the file again")
    matrix = (rows, columns, _integer(ds, "SamplesPerPixel") or 1)
    image_type = [part.upper() for part in _text(ds, "ImageType").split("\\")]
    series = "" if ds.is_cut("SeriesInstanceUID") else _text(ds, "SeriesInstanceUID")
    content = _Content(matrix)
    try:
        if damaged:
            raise _Defect("unknown-class", "its SOPClassUID is none that DICOM knows; get the file again")
        count = _integer(ds, "NumberOfFrames") or 1
        if shortfall := _pixel_shortfall(ds, rows * columns * matrix[2] * count, file):
            raise _Defect("truncated", shortfall)
        content = _content(ds, sop_class, image_type, matrix, count, path)
        defect = None
    except _Defect as found:
        if not series and (found.code in ("truncated", "unknown-class") or not (rows and columns)):
            raise UnreadableFile(path, found.reason) from found  # whatever it was a slice of
        defect = (found.code, found.reason)
    return Header(
        path,
        _text(ds, "StudyInstanceUID"),
        series,
        _text(ds, "SOPInstanceUID"),
        sop_class,
        _text(ds, "Modality").upper(),
        _description(ds),
        _integer(ds, "SeriesNumber"),
        _text(ds, "FrameOfReferenceUID") or None,
        content.matrix,
        "LOCALIZER" in image_type,
        content.frames,
        content.mosaic,
        content.flat,
        content.pixel_spacing,
        content.notes,
        defect,
        doubts.alike(ds),
        _integer(ds, "NumberOfSlices") if sop_class == _PET else None,
    )


@lru_cache(maxsize=256)
def _is_damaged(sop_class: str) -> bool:
    """True for what cannot be the class of an object; private ones are possible."""
    uid = UID(sop_class)
    unheard_of = uid.startswith("1.2.840.10008.") and uid.type != "SOP Class"  # in the root of the standard itself
    return bool(sop_class) and uid not in _RECENT_CLASSES and (not uid.is_valid or unheard_of)


class _Defect(Exception):
    """Why a file cannot be used; never leaves this module."""

    def __init__(self, code: str, reason: str):
        self.code, self.reason = code, reason
        super().__init__(reason)


@dataclass(frozen=True)
class _Content:
    """The images of a file; see :class:`Header`."""

    matrix: tuple[int, int, int]
    frames: tuple[Frame, ...] = ()
    mosaic: bool = False
    flat: bool = False
    pixel_spacing: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


def _content(
    ds: Attributes, sop_class: str, image_type: list[str], matrix: tuple[int, int, int], count: int, path: Path
) -> _Content:
    """Raises _Defect where the images have no place but need one."""
    rows, columns, samples = matrix
    if rows == 0 or columns == 0:
        raise _Defect("no-geometry", f"an image needs Rows and Columns of at least 1, got {rows} x {columns}")
    if _text(ds, "PhotometricInterpretation").upper() == "PALETTE COLOR":
        matrix = (rows, columns, 3)
    flat = sop_class in FLAT_CLASSES or (not sop_class and _text(ds, "Modality").upper() in _FLAT_MODALITIES)
    grouped = "PerFrameFunctionalGroupsSequence" in ds or _is_enhanced(sop_class)
    try:
        if frames.is_mosaic(image_type) and count == 1:
            tiles = frames.mosaic_frames(_with_private(path), matrix)
            columns, rows = tiles[0].plane.shape if tiles[0].plane else (columns, rows)
            stacked = len(tiles) > 1 and "VFRAME" not in image_type and not ds.get("SpacingBetweenSlices")
            return _Content((rows, columns, samples), tiles, mosaic=True, notes=(_NO_STEP,) if stacked else ())
        if count == 1 and not grouped:
            return _Content(matrix, (frames.single_frame(ds, matrix),))
        if grouped:
            return _Content(matrix, frames.functional_frames(ds, count, matrix))
        if sop_class == _NUCLEAR and image_type[2:3] == ["RECON TOMO"]:
            return _Content(matrix, frames.tomo_frames(ds, count, matrix))
        if not flat:
            raise _Defect(
                "multi-frame",
                f"a multi-frame object of {count} frames without functional groups says not where they lie; convert it "
                "to single-frame files first",
            )
    except frames.NoPlace as error:
        if frames.is_mosaic(image_type):
            reason = (
                f"{columns} x {rows} pixels hold many slices side by side (mosaic), but {error}; convert it to single"
            )
            raise _Defect("mosaic", f"{reason} slices at the scanner") from error
        if not flat:
            reason = f"its place in the patient is unknown: {error}; export the series again with these tags"
            raise _Defect("no-geometry", reason) from error
    images = (
        frames.functional_frames(ds, count, matrix, plane=False)
        if grouped
        else tuple(replace(frames.single_frame(ds, matrix, plane=False), number=n) for n in range(count))
    )
    spacing, note = _flat_spacing(ds)
    return _Content(matrix, images, flat=True, pixel_spacing=spacing, notes=note)


@lru_cache(maxsize=256)
def _named(sop_class: str) -> str:
    """Its name; a damaged one may go on over the header, and is not quoted."""
    return UID(sop_class).name if UID(sop_class).is_valid else "of no known class"


def _is_enhanced(sop_class: str) -> bool:
    return UID(sop_class).name.startswith(("Enhanced", "Legacy Conv"))


def _with_private(path: Path) -> Dataset:
    """The data set with the private headers that place the tiles of a mosaic; large, so read for mosaics only."""
    return pydicom.dcmread(
        path, stop_before_pixels=True, force=True, specific_tags=[*_TAGS, *map(Tag, frames.MOSAIC_TAGS)]
    )


_NO_STEP = "SpacingBetweenSlices is missing; SliceThickness stands for the distance between its slices"
_CM = 3  # code of a unit in ultrasound regions


def _flat_spacing(ds: Attributes) -> tuple[tuple[float, float] | None, tuple[str, ...]]:
    """Spacing (columns, rows) in mm of an image without a place, and what to know of it."""
    unplaced = "its position and orientation in the patient are unknown"
    for keyword, note in (
        ("PixelSpacing", ""),
        ("ImagerPixelSpacing", ", and its spacing is that at the detector, so that lengths in the patient are smaller"),
        ("NominalScannedPixelSpacing", ", and its spacing is that of the film"),
    ):
        try:
            row_step, column_step = _numbers(ds, keyword, 2)
        except ValueError:
            continue
        if min(row_step, column_step) > 0 and np.isfinite(max(row_step, column_step)):
            return (column_step, row_step), (unplaced + note,)
    regions = ds.get("SequenceOfUltrasoundRegions") or ()
    deltas = {
        (region.get("PhysicalDeltaX"), region.get("PhysicalDeltaY"))
        for region in regions
        if (region.get("PhysicalUnitsXDirection"), region.get("PhysicalUnitsYDirection")) == (_CM, _CM)
    }
    if len(deltas) == 1 and len(regions) == 1:
        x, y = deltas.pop()
        if x and y and np.isfinite([x, y]).all():
            return (10 * abs(float(x)), 10 * abs(float(y))), (unplaced,)
    return None, (f"{unplaced}, and so is the size of a pixel",)


def _pixel_shortfall(ds: Attributes, samples: int, file: BinaryIO) -> str | None:
    """What is missing of the pixels, judged without reading them; ``file`` stands where the pixels should begin."""
    syntax = ds.syntax
    if syntax is not None and syntax.is_deflated:
        return None
    implicit, little = ds.dataset.original_encoding
    order: Literal["little", "big"] = "little" if little else "big"
    begin = file.tell()
    element = file.read(12)
    implicit = implicit or not element[4:6].isalpha()  # some writers drop the VR here only
    size = file.seek(0, 2)
    tag = (int.from_bytes(element[:2], order) << 16) + int.from_bytes(element[2:4], order)
    if len(element) < 8 or tag not in _PIXEL_TAGS:
        return "the file ends before its pixels; get it again"
    expected = samples * (_integer(ds, "BitsAllocated") or 8) // 8
    declared = int.from_bytes(element[4:8] if implicit else element[8:12], order)
    if declared == _UNDEFINED_LENGTH:
        forged = expected > _MAX_COMPRESSION * size
        return f"its header promises {expected} bytes of pixels in a file of {size}; it is corrupt" if forged else None
    present = size - begin - (8 if implicit else 12)
    native = syntax is None or not syntax.is_compressed
    subsampled = _text(ds, "PhotometricInterpretation").upper().endswith(("422", "420"))
    if present < declared or (declared < expected and native and not subsampled):
        needed = max(declared, expected)
        return f"the file is cut short: {max(present, 0)} of {needed} bytes of pixels are there; get it again"
    return None


def _description(ds: Attributes) -> str:
    description = _text(ds, "SeriesDescription")
    secrets: set[str] = set()
    for keyword in _PATIENT_TAGS if description else ():
        try:
            secrets.update(re.findall(r"[^\W_]+", _text(ds, keyword).casefold()))
        except Exception:  # what cannot be decoded cannot be compared, and is no reason to lose an image
            continue
    secrets = {secret for secret in secrets if len(secret) >= _SHORTEST_SECRET}
    kept = re.sub(r"[^\W_]+", lambda word: "" if word[0].casefold() in secrets else word[0], description)
    return description if kept == description else " ".join(kept.split()).strip(" ^_-,;")


def _text(ds: Attributes, keyword: str) -> str:
    return frames.text_of(ds.get(keyword))


def _integer(ds: Attributes, keyword: str) -> int | None:
    try:
        return int(ds.get(keyword))
    except (TypeError, ValueError):
        return None


def _numbers(ds: Attributes, keyword: str, count: int) -> tuple[float, ...]:
    """Exactly ``count`` floats; ValueError with a readable reason otherwise."""
    try:
        value = ds.get(keyword)
        if value is None or value == "":
            raise ValueError(f"{keyword} is missing")
        numbers = tuple(float(part) for part in (value if isinstance(value, MultiValue) else [value]))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{keyword} holds no numbers") from error
    if len(numbers) != count:
        raise ValueError(f"{keyword} needs {count} numbers, got {len(numbers)}")
    return numbers
