"""What one DICOM file says about itself, pixels apart."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.uid import UID

from medvit.data.slices import Plane
from medvit.errors import MedvitError, UnreadableFile

# Storage classes whose objects are images of a patient. Everything else (reports, segmentations, structures, dose,
# presentation states, raw data) is set aside, however much it may look like pixels.
_CLASS = "1.2.840.10008.5.1.4.1.1."
_CR_DX = "1 1.1 1.1.1 1.2 1.2.1 1.3 1.3.1"  # with mammography and intra-oral
_TOMOGRAPHIC = "2 2.1 2.2 4 4.1 4.3 4.4 128 128.1 130 20"  # CT, MR, PET, NM
_ULTRASOUND_CAPTURE = "3.1 6.1 6.2 7 7.1 7.2 7.3 7.4"
_ANGIOGRAPHIC = "12.1 12.1.1 12.2 12.2.1 13.1.1 13.1.2 13.1.3"  # with fluoroscopy and tomosynthesis
_VISIBLE_LIGHT = "77.1.1 77.1.2 77.1.4 77.1.5.1 77.1.5.2 77.1.5.4 77.1.6 481.1"  # with OCT and RT image
IMAGE_CLASSES = frozenset(
    _CLASS + tail
    for family in (_CR_DX, _TOMOGRAPHIC, _ULTRASOUND_CAPTURE, _ANGIOGRAPHIC, _VISIBLE_LIGHT)
    for tail in family.split()
)

_TAGS = [
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
]

# Read to be compared with the description, never kept: operators type names and numbers of patients into it.
_PATIENT_TAGS = ("PatientName", "PatientID", "PatientBirthDate", "OtherPatientNames", "OtherPatientIDs")
_SHORTEST_SECRET = 3  # characters; less would eat words such as "T1" of a patient called so

_PIXEL_TAGS = (0x7FE00008, 0x7FE00009, 0x7FE00010)
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
        plane: where it lies, or None: ``defect`` then says why.
        thickness: SliceThickness in mm, None where it is missing or makes no sense.
        localizer: the image is a scout, made to plan others.
        defect: (code, reason) why this file cannot be a slice of a volume, None if it can.
        matrix: (rows, columns, samples per pixel).
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
    plane: Plane | None
    thickness: float | None
    defect: tuple[str, str] | None


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
            file.seek(0)
            ds = pydicom.dcmread(
                file, stop_before_pixels=True, force=start[128:132] != b"DICM", specific_tags=[*_TAGS, *_PATIENT_TAGS]
            )
            return _header(path, ds, file)
    except MedvitError:
        raise
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # a corrupt header can raise nearly anything from inside pydicom
        raise UnreadableFile(path, f"corrupt DICOM header ({type(error).__name__}); get the file again") from error


def _header(path: Path, ds: Dataset, file: BinaryIO) -> Header:
    sop_class = _text(ds, "SOPClassUID") or str(getattr(ds.file_meta, "MediaStorageSOPClassUID", ""))
    if sop_class and sop_class not in IMAGE_CLASSES:
        raise NotAnImage(path, f"a DICOM object that is not an image: {UID(sop_class).name}")
    rows, columns = _integer(ds, "Rows") or 0, _integer(ds, "Columns") or 0
    if not sop_class and not (rows and columns):
        raise UnreadableFile(path, "DICOM data without a SOP class or an image; get the file again")
    matrix = (rows, columns, _integer(ds, "SamplesPerPixel") or 1)
    image_type = [part.upper() for part in _text(ds, "ImageType").split("\\")]
    defect = _defect(ds, sop_class, image_type, matrix, file)
    plane = None
    if defect is None:
        try:
            position, orientation = _numbers(ds, "ImagePositionPatient", 3), _numbers(ds, "ImageOrientationPatient", 6)
            plane = Plane.from_dicom(rows, columns, position, orientation, _numbers(ds, "PixelSpacing", 2))
        except ValueError as error:
            defect = (
                "no-geometry",
                f"its place in the patient is unknown: {error}; export the series again with these tags",
            )
    try:
        thickness: float | None = number_of(ds, "SliceThickness", 0.0)
    except ValueError:
        thickness = None
    return Header(
        path,
        _text(ds, "StudyInstanceUID"),
        _text(ds, "SeriesInstanceUID"),
        _text(ds, "SOPInstanceUID"),
        sop_class,
        _text(ds, "Modality").upper(),
        _description(ds),
        _integer(ds, "SeriesNumber"),
        _text(ds, "FrameOfReferenceUID") or None,
        matrix,
        "LOCALIZER" in image_type,
        plane,
        thickness if thickness and thickness > 0 else None,
        defect,
    )


def _defect(
    ds: Dataset, sop_class: str, image_type: list[str], matrix: tuple[int, int, int], file: BinaryIO
) -> tuple[str, str] | None:
    """Why the file cannot be one slice, except for its geometry."""
    rows, columns, samples = matrix
    frames = _integer(ds, "NumberOfFrames") or 1
    if shortfall := _pixel_shortfall(ds, rows * columns * samples * frames, file):
        return "truncated", shortfall
    if rows == 0 or columns == 0:
        return "no-geometry", f"an image needs Rows and Columns of at least 1, got {rows} x {columns}"
    if "MOSAIC" in image_type or "VFRAME" in image_type:
        return (
            "mosaic",
            f"{columns} x {rows} pixels hold many slices side by side (mosaic); convert it to single slices first",
        )
    photometric = _text(ds, "PhotometricInterpretation").upper()
    if samples != 1 or photometric.startswith(("RGB", "YBR", "PALETTE")):
        return (
            "colour",
            f"grey values are needed, but this is a colour image ({photometric or f'{samples} samples per pixel'})",
        )
    if frames > 1 or UID(sop_class).name.startswith(("Enhanced", "Legacy Converted")):
        return "multi-frame", f"a multi-frame object of {frames} frames; convert it to single-frame files first"
    return None


def _pixel_shortfall(ds: Dataset, samples: int, file: BinaryIO) -> str | None:
    """What is missing of the pixels, judged without reading them; ``file`` stands where the pixels should begin."""
    syntax = getattr(ds.file_meta, "TransferSyntaxUID", None)
    if syntax is not None and syntax.is_deflated:
        return None
    implicit, little = ds.original_encoding
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


def _description(ds: Dataset) -> str:
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


def _text(ds: Dataset, keyword: str) -> str:
    value = ds.get(keyword)
    if value is None:
        return ""
    return "\\".join(str(part) for part in value) if isinstance(value, MultiValue) else str(value).strip()


def _integer(ds: Dataset, keyword: str) -> int | None:
    try:
        return int(ds.get(keyword))
    except (TypeError, ValueError):
        return None


def _numbers(ds: Dataset, keyword: str, count: int) -> tuple[float, ...]:
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


def number_of(ds: Dataset, keyword: str, default: float) -> float:
    """One finite float; ``default`` where the tag is missing or empty."""
    if ds.get(keyword) in (None, ""):
        return default
    (number,) = _numbers(ds, keyword, 1)
    if not np.isfinite(number) or (keyword == "RescaleSlope" and number == 0):
        raise ValueError(f"{keyword} is {number:g}")
    return number
