"""The pixels of one DICOM file: decoded frame by frame, and rescaled to what they measure.

Frames are decoded when they are asked for, so that objects of thousands of frames need the memory of one. What can be
known without decoding is checked when the file is opened: attributes, number of bytes, number of frames.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue

from medvit.data.codestream import split_frames
from medvit.data.headers import looks_like_dicom
from medvit.data.lookup import apply_palette, read_table
from medvit.data.storage import NATIVE, HeaderError, Layout, attribute, decode_frame, missing_package, read_layout
from medvit.errors import MedvitError, UnreadableFile

_KEYWORDS = ("PixelData", "FloatPixelData", "DoubleFloatPixelData")
_MAX_COMPRESSION = 20_000  # bytes of pixels per byte of file; more is a forged header, not an image


class Pixels:
    """The frames of one DICOM file; made by :func:`decode`.

    Attributes:
        ds: the data set, without its pixels.
        shape: ``(frames, rows, columns)``, for colours ``(frames, rows, columns, 3)``.
        padding: PixelPaddingValue as it is in :meth:`frame`, None where the file has none.
    """

    def __init__(self, path: Path, ds: Dataset, layout: Layout, data: bytes | list[bytes], vr: str):
        self.ds = ds
        self._path, self._layout, self._data, self._vr = path, layout, data, vr
        self._syntax = ds.file_meta.TransferSyntaxUID
        self._little = self._syntax != uid.ExplicitVRBigEndian
        colour = (3,) if layout.photometric == "PALETTE COLOR" or layout.samples == 3 else ()
        self.shape: tuple[int, ...] = (layout.frames, layout.rows, layout.columns, *colour)
        self.padding = self.stored_value("PixelPaddingValue")
        self._latest: tuple[int, np.ndarray] | None = None

    @property
    def stored(self) -> np.ndarray:
        """All frames, of :attr:`shape`; decoded anew each time. Raises as :meth:`frame`."""
        return np.stack([self.frame(number) for number in range(self.shape[0])])

    def frame(self, number: int) -> np.ndarray:
        """Stored values of the 0-based frame ``number``: (rows, columns), for colours (rows, columns, 3); read-only.

        Integers (floats for FloatPixelData and DoubleFloatPixelData) of BitsStored bits, whatever stands in the bits
        above. Palettes and YBR are turned to RGB; these are uint8, other colours as they were stored.

        Raises:
            UnreadableFile: pixels that cannot be decoded.
        """
        if not 0 <= number < self.shape[0]:
            raise IndexError(f"frame {number} of {self.shape[0]}")
        latest = self._latest
        if latest is None or latest[0] != number:
            with quietly(), _decoding(self._path, self._syntax, number if self.shape[0] > 1 else None):
                frame = self._decode(number)
                if frame.shape != self.shape[1:]:
                    raise ValueError(f"they decode to shape {frame.shape}, but its header needs {self.shape[1:]}")
            frame.flags.writeable = False
            self._latest = latest = number, frame
        return latest[1]

    def rescaled(self, number: int) -> np.ndarray:
        """Frame ``number`` through its own modality transform, (rows, columns) float64; colours as in :meth:`frame`.

        That is the PixelValueTransformationSequence of the frame, else the one shared by all, else RescaleSlope and
        RescaleIntercept, else the ModalityLUTSequence, else none. Real world value maps are not applied, and padding is
        scaled like the rest.

        Raises:
            UnreadableFile: pixels that cannot be decoded, or a transform that makes no sense.
        """
        frame = self.frame(number)
        if frame.ndim == 3:
            return frame
        try:
            with quietly():
                source = self._transform(number)
                plain = all(source.get(keyword) in (None, "") for keyword in ("RescaleSlope", "RescaleIntercept"))
                if plain and source.get("ModalityLUTSequence"):
                    item = source.ModalityLUTSequence[0]
                    table = read_table(
                        item.LUTDescriptor, item.LUTData, signed=self._layout.signed, little=self._little
                    )
                    return table(frame).astype(np.float64)
                slope, intercept = _number(source, "RescaleSlope", 1.0), _number(source, "RescaleIntercept", 0.0)
        except Exception as error:  # a corrupt element can raise nearly anything, and its text may quote the header
            detail = str(error) if isinstance(error, HeaderError) else type(error).__name__
            reason = f"what turns its pixels into measurements is damaged ({detail}); export it again"
            raise UnreadableFile(self._path, reason) from error
        return frame.astype(np.float64) * slope + intercept

    def stored_value(self, keyword: str) -> int | None:
        """A pixel value in the header, such as PixelPaddingValue, in the bits and the sign that pixels have."""
        try:
            with quietly():
                value = int(self.ds[keyword].value)
        except Exception:  # missing, empty, or damaged
            return None
        bits = self._layout.stored  # it may have been read with the other sign, or with rubbish above these bits
        value &= (1 << bits) - 1
        return value - (1 << bits) if self._layout.signed and value >> (bits - 1) else value

    def _transform(self, number: int) -> Dataset:
        """The data set that holds what rescales a frame."""
        per_frame = self.ds.get("PerFrameFunctionalGroupsSequence") or []
        if per_frame and number >= len(per_frame):
            raise HeaderError(f"it describes {len(per_frame)} frames of {self.shape[0]}")
        shared = self.ds.get("SharedFunctionalGroupsSequence") or []
        for group in (*per_frame[number : number + 1], *shared[:1]):
            if sequence := group.get("PixelValueTransformationSequence"):
                transform: Dataset = sequence[0]
                return transform
        return self.ds

    def _decode(self, number: int) -> np.ndarray:
        layout, data, words = self._layout, self._data, self._vr == "OW"
        if isinstance(data, list):
            data, number = data[number], 0
        array = decode_frame(data, number, layout, self._syntax, words=words)
        if layout.photometric == "PALETTE COLOR":
            array = apply_palette(self.ds, array, signed=layout.signed, little=self._little)
        return array if array.flags.owndata else array.copy()


def decode(path: str | Path) -> Pixels:
    """Open one DICOM file and check all that can be known of its pixels without decoding them.

    Raises:
        UnreadableFile: not DICOM, corrupt or truncated, without pixels, with attributes of pixels that are missing or
            impossible or do not fit their bytes, with another number of frames than its header says, or in a transfer
            syntax that is private, unknown, or needs a package which is not installed.
    """
    path = Path(path)
    try:
        with quietly():
            return _open(path)
    except MedvitError:
        raise
    except OSError as error:
        raise UnreadableFile(path, f"cannot be opened: {error.strerror or error}") from error
    except Exception as error:  # a corrupt header can raise nearly anything from inside pydicom, and be quoted by it
        raise UnreadableFile(path, f"corrupt DICOM header ({type(error).__name__}); get the file again") from error


def _open(path: Path) -> Pixels:
    ds = _read(path)
    keywords = [keyword for keyword in _KEYWORDS if keyword in ds]
    if len(keywords) != 1:
        raise UnreadableFile(path, f"one element of pixels is needed, but this {_class(ds)} has {len(keywords)}")
    try:
        layout = read_layout(ds, keywords[0])
    except HeaderError as error:
        raise UnreadableFile(path, f"its pixels cannot be understood: {error}; export it again") from error
    element = ds[keywords[0]]
    data, vr = element.value, str(element.VR)
    if not isinstance(data, bytes):
        raise UnreadableFile(path, "its pixels are no bytes; get the file again")
    syntax = ds.file_meta.TransferSyntaxUID
    _check_syntax(path, syntax, bool(element.is_undefined_length))
    if syntax in NATIVE:
        _check_length(path, layout, data)
        frames: bytes | list[bytes] = data
    else:
        needed = layout.frame_bits * layout.frames // 8
        if needed > _MAX_COMPRESSION * len(data):
            reason = f"its header promises {needed} bytes of pixels in {len(data)}; it is corrupt"
            raise UnreadableFile(path, reason)
        with _decoding(path, syntax):
            frames = split_frames(data, layout.frames, streams=syntax != uid.RLELossless)
    del ds[keywords[0]]
    return Pixels(path, ds, layout, frames, vr)


def _read(path: Path) -> Dataset:
    """The whole data set, with a transfer syntax."""
    with path.open("rb") as file:
        if not looks_like_dicom(file.read(132)):
            raise UnreadableFile(path, "not a DICOM file")
        file.seek(0)
        ds = pydicom.dcmread(file, force=True)
    implicit, little = ds.original_encoding  # as pydicom found out where no transfer syntax tells
    guess = NATIVE[0] if implicit else NATIVE[1] if little else NATIVE[2]
    syntax = str(ds.file_meta.get("TransferSyntaxUID") or guess).strip("\0 ")
    ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
    return ds


def _check_syntax(path: Path, syntax: uid.UID, undefined_length: bool) -> None:
    if syntax in NATIVE:
        if undefined_length:
            reason = "its pixels are compressed, but its transfer syntax is missing or not of compressed pixels"
            raise UnreadableFile(path, f"{reason}; export it again")
        return
    if not syntax.startswith("1.2.840.10008."):
        name = f"private transfer syntax {syntax}" if syntax.is_valid else "transfer syntax of no valid UID"
        raise UnreadableFile(path, f"its pixels have a {name}; export it uncompressed")
    missing = missing_package(syntax)
    if missing is None:
        reason = f"its pixels are stored as {syntax.name} ({syntax}), which is not supported; export it uncompressed"
        raise UnreadableFile(path, reason)
    if missing:
        reason = f"its pixels are compressed as {syntax.name}, which nothing installed decodes; install {missing}"
        raise UnreadableFile(path, f"{reason}, or export it uncompressed")


def _check_length(path: Path, layout: Layout, data: bytes) -> None:
    needed = -(-layout.frame_bits * layout.frames // 8)
    if len(data) < needed:
        reason = f"the file is cut short: {len(data)} of {needed} bytes of pixels are there; get it again"
        raise UnreadableFile(path, reason)
    # a byte makes the length even; more of them may be padding, but no more than a row of the image
    row = layout.frame_bits // layout.rows
    if len(data) > needed + 1 and (data[needed:].strip(b"\0") or 8 * (len(data) - needed) > row):
        reason = (
            f"its header needs {needed} bytes of pixels ({layout.frames} x {layout.rows} x {layout.columns}), but "
            f"{len(data)} are there; export it again"
        )
        raise UnreadableFile(path, reason)


@contextmanager
def quietly() -> Iterator[None]:
    """Without pydicom's warnings, which quote the header; also it reads elements only when they are asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _decoding(path: Path, syntax: uid.UID, number: int | None = None) -> Iterator[None]:
    """Whatever a decoder raises on a corrupt stream becomes an :class:`UnreadableFile`."""
    try:
        yield
    except Exception as error:
        detail = " ".join(str(error).split())[:300] or type(error).__name__
        which = "" if number is None else f" of frame {number + 1}"
        reason = f"its {syntax.name} pixels{which} cannot be decoded: {detail}; get the file again"
        raise UnreadableFile(path, reason) from error


def _class(ds: Dataset) -> str:
    sop_class = ds.get("SOPClassUID")
    return sop_class.name if isinstance(sop_class, uid.UID) and sop_class.is_valid else "object of no known class"


def _number(ds: Dataset, keyword: str, default: float) -> float:
    value = attribute(ds, keyword)
    if value is None or value == "":
        return default
    if isinstance(value, MultiValue):
        raise HeaderError(f"{keyword} needs one number, got {len(value)}")
    number = float(value)
    if not np.isfinite(number) or (keyword == "RescaleSlope" and number == 0):
        raise HeaderError(f"{keyword} is {number:g}")
    return number
