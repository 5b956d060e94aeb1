"""One frame of DICOM pixels: how it is stored, and its samples.

Which decoder takes a compressed frame is decided here, by name: GDCM, which would take most of them, can abort the
interpreter, and is left to :mod:`medvit.data.gdcm_process`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image
from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import convert_color_space

from medvit.data.codestream import Codestream, read_codestream
from medvit.data.gdcm_process import DecoderProcess

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
_JPEG = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEGLossless, uid.JPEGLosslessSV1)
# pydicom's plugin for each, and what to install. GDCM, which would take most, can abort the interpreter.
_PLUGINS = {
    uid.RLELossless: ("pydicom", "numpy"),
    **dict.fromkeys((uid.JPEGLSLossless, uid.JPEGLSNearLossless), ("pyjpegls", "pyjpegls")),
    **dict.fromkeys(
        (uid.JPEG2000Lossless, uid.JPEG2000, uid.HTJ2KLossless, uid.HTJ2KLosslessRPCL, uid.HTJ2K),
        ("pylibjpeg", "pylibjpeg and pylibjpeg-openjpeg"),
    ),
}
_GREY, _COLOUR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")

_GDCM = DecoderProcess()


class HeaderError(ValueError):
    """Attributes that are missing or make no sense. The message quotes no text of the header, which may name people."""


@dataclass(frozen=True)
class Layout:
    """What group 0028 says about how pixels are stored.

    Args:
        stored: BitsStored, as ``allocated`` is BitsAllocated.
        planar: 1: the red plane comes first, then green and blue.
        keyword: the element that holds the pixels.
    """

    rows: int
    columns: int
    samples: int
    frames: int
    allocated: int
    stored: int
    signed: bool
    planar: int
    photometric: str
    keyword: str

    @property
    def frame_bits(self) -> int:
        """Bits of one frame without compression."""
        subsampled = self.photometric == "YBR_FULL_422"
        return self.rows * self.columns * (2 if subsampled else self.samples) * self.allocated

    def options(self, **changes: Any) -> dict[str, Any]:
        """For pydicom's decoders."""
        return {
            "rows": self.rows,
            "columns": self.columns,
            "samples_per_pixel": self.samples,
            "number_of_frames": self.frames,
            "bits_allocated": self.allocated,
            "bits_stored": self.stored,
            "pixel_representation": int(self.signed),
            "planar_configuration": self.planar,
            "photometric_interpretation": self.photometric,
            "pixel_keyword": self.keyword,
            **changes,
        }


def read_layout(ds: Dataset, keyword: str) -> Layout:
    """Read and check group 0028.

    Args:
        ds: the data set.
        keyword: of the element that holds its pixels.

    Raises:
        HeaderError: an attribute is missing, or they contradict each other.
    """
    photometric = str(attribute(ds, "PhotometricInterpretation") or "").strip().upper()
    rows, columns, allocated = (_count(ds, tag) for tag in ("Rows", "Columns", "BitsAllocated"))
    integers = keyword == "PixelData"
    stored = _count(ds, "BitsStored") if integers else allocated
    high = _count(ds, "HighBit", stored - 1)
    signed = _count(ds, "PixelRepresentation", None if integers else 1)
    samples = _count(ds, "SamplesPerPixel", 1 if photometric in (*_GREY, "PALETTE COLOR") else 3)
    frames = _count(ds, "NumberOfFrames", 1) or 1
    compressed = ds.file_meta.TransferSyntaxUID not in NATIVE
    planar = _count(ds, "PlanarConfiguration", None if samples == 3 and not compressed else 0)
    if photometric not in (*_GREY, *_COLOUR, "PALETTE COLOR"):
        raise HeaderError("PhotometricInterpretation is missing, or not one of grey values, palette, RGB or YBR")
    if samples != (3 if photometric in _COLOUR else 1):
        raise HeaderError(f"SamplesPerPixel is {samples} for {photometric}")
    if not (rows and columns):
        raise HeaderError(f"an image needs Rows and Columns of at least 1, got {rows} x {columns}")
    if allocated not in ((1, 8, 16, 32, 64) if integers else (32 if keyword == "FloatPixelData" else 64,)):
        raise HeaderError(f"BitsAllocated is {allocated}, which {keyword} cannot have")
    # HighBit once told where in their words samples stand; now it must say the same as BitsStored
    if not (0 < stored == high + 1 <= allocated and signed in (0, 1) and planar in (0, 1)):
        raise HeaderError(
            f"BitsAllocated {allocated}, BitsStored {stored}, HighBit {high}, PixelRepresentation {signed}, "
            f"PlanarConfiguration {planar} contradict each other"
        )
    return Layout(rows, columns, samples, frames, allocated, stored, bool(signed), planar, photometric, keyword)


def decode_frame(data: bytes, number: int, layout: Layout, syntax: uid.UID, *, words: bool = False) -> np.ndarray:
    """Decode one frame: (rows, columns), or (rows, columns, 3) of RGB.

    Values have the sign and the BitsStored bits of ``layout``, whatever stands in the bits above; palettes are not
    looked up.

    Args:
        data: where ``syntax`` is of :data:`NATIVE`, all frames; else this one as it is compressed.
        number: of the frame in ``data``, 0-based; 0 where it is compressed.
        layout: how it is stored.
        syntax: transfer syntax, one for which :func:`missing_package` returns "".
        words: pixels of 8 bits are stored two in a word, of OW, which is other than OB in big endian.

    Raises:
        Exception: whatever a decoder raises on a corrupt stream; ValueError where the stream contradicts ``layout``.
    """
    if syntax in NATIVE:
        big = syntax == uid.ExplicitVRBigEndian
        array, filled = _decode_native(data, number, layout, ">" if big else "<", big and words), layout.allocated
    else:
        array, filled = _decode_compressed(data, layout, syntax)
    if layout.keyword != "PixelData" or layout.allocated == 1:
        return array
    return _within_bits(array, layout.stored, filled)


def missing_package(syntax: uid.UID) -> str | None:
    """What must be installed to decode a transfer syntax: "" for nothing, None where nothing would help."""
    if syntax in NATIVE:
        return ""
    if syntax in _JPEG:
        return "" if DecoderProcess.available() else "python-gdcm"
    if syntax not in _PLUGINS:
        return None
    plugin, package = _PLUGINS[syntax]
    return "" if plugin in get_decoder(syntax).available_plugins else package


def _decode_native(data: bytes, number: int, layout: Layout, order: str, swapped: bool) -> np.ndarray:
    """Not by pydicom, which loses pixels of 1-bit frames that do not begin with a byte.

    ``order`` of the bytes of a sample is "<" or ">"; where ``swapped``, samples of 8 bits are stored in such words.
    """
    size, kind = layout.frame_bits, {"PixelData": "ui"[layout.signed]}.get(layout.keyword, "f")
    begin, end = number * size // 8, -(-(number + 1) * size // 8)
    if layout.allocated == 1:
        bits = np.unpackbits(np.frombuffer(data[begin:end], np.uint8), bitorder="little")
        cells = bits[number * size % 8 :][:size]
    elif layout.allocated == 8 and swapped:
        words = np.frombuffer(data[begin // 2 * 2 : -(-end // 2) * 2], "u2").byteswap()
        cells = words.view(f"{kind}1")[begin % 2 :][: end - begin]
    else:
        cells = np.frombuffer(data[begin:end], f"{order}{kind}{layout.allocated // 8}")
        cells = cells.astype(cells.dtype.newbyteorder("="))
    if layout.samples == 1:
        return cells.reshape(layout.rows, layout.columns)
    if layout.photometric == "YBR_FULL_422":  # Y1 Y2 Cb Cr of two pixels
        frame = cells.reshape(layout.rows, -1, 4)[..., [0, 2, 3, 1, 2, 3]].reshape(layout.rows, layout.columns, 3)
    elif layout.planar:
        frame = cells.reshape(3, layout.rows, layout.columns).transpose(1, 2, 0)
    else:
        frame = cells.reshape(layout.rows, layout.columns, 3)
    return convert_color_space(frame, "YBR_FULL", "RGB") if layout.photometric.startswith("YBR") else frame


def _decode_compressed(frame: bytes, layout: Layout, syntax: uid.UID) -> tuple[np.ndarray, int]:
    """One compressed frame, (row, column) or (row, column, 3), and the bits that its decoder fills."""
    if syntax == uid.RLELossless:
        return _decode_run_lengths(frame, layout), layout.allocated
    stream = read_codestream(frame)
    found = stream.rows, stream.columns, stream.samples
    needed = layout.rows, layout.columns, layout.samples
    if found != needed:
        raise ValueError(f"(rows, columns, samples) are {found} in the stream, but {needed} in the header")
    if stream.precision > layout.allocated:
        raise ValueError(f"its stream has {stream.precision} bits, but BitsAllocated is {layout.allocated}")
    if syntax not in _JPEG:
        return _decode_by_plugin(frame, layout, syntax), stream.precision
    dtype = f"{'i' if layout.signed else 'u'}{layout.allocated // 8}"
    return _decode_jpeg(frame, layout, stream).astype(dtype), stream.precision


def _decode_run_lengths(frame: bytes, layout: Layout) -> np.ndarray:
    """Run lengths do not know the shape of their image, and pydicom only warns where they hold more than it."""
    with suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("error")
        return _decode_by_plugin(frame, layout, uid.RLELossless)
    array = _decode_by_plugin(frame, layout, uid.RLELossless)
    try:
        _decode_by_plugin(frame, replace(layout, rows=layout.rows + 1), uid.RLELossless)
    except Exception:  # it is padding, of less than a row
        return array
    raise ValueError(f"there are more than {layout.rows} rows")


def _decode_by_plugin(frame: bytes, layout: Layout, syntax: uid.UID) -> np.ndarray:
    plugin = _PLUGINS[syntax][0]
    options = layout.options(number_of_frames=1, correct_unused_bits=False)
    return get_decoder(syntax).as_array(
        encapsulate([frame]), index=0, validate=False, decoding_plugin=plugin, **options
    )[0]


def _decode_jpeg(frame: bytes, layout: Layout, stream: Codestream) -> np.ndarray:
    """Unsigned samples. Which decoder is decided by the stream, as the transfer syntax of real files may be wrong."""
    shape: Sequence[int] = (layout.rows, layout.columns, *((3,) if layout.samples == 3 else ()))
    if not stream.lossless and stream.precision == 8:
        with Image.open(BytesIO(frame), formats=("JPEG",)) as image:
            # a stream that is silent about its colours counts as YBR, unless DICOM says otherwise
            if layout.samples == 3 and layout.photometric == "RGB" and not stream.names_colours:
                image.draft("YCbCr", image.size)  # as they are
            return np.array(image)
    pixels = _GDCM.decode(
        frame,
        lossless=stream.lossless,
        rows=layout.rows,
        columns=layout.columns,
        samples=layout.samples,
        precision=stream.precision,
    )
    array = np.frombuffer(pixels, np.uint8 if stream.precision <= 8 else "<u2").reshape(shape)
    return convert_color_space(array, "YBR_FULL", "RGB") if layout.photometric.startswith("YBR") else array


def _within_bits(array: np.ndarray, stored: int, filled: int) -> np.ndarray:
    """Only the lowest ``stored`` bits, with their sign; ``filled`` is how many bits the decoder has filled."""
    unused = 8 * array.dtype.itemsize - stored
    done = unused <= 0 or (array.dtype.kind == "u" and filled <= stored)
    return array if done else (array << unused) >> unused


def attribute(ds: Dataset, keyword: str) -> Any:
    """The value of an attribute, None where it is missing.

    Raises:
        HeaderError: pydicom cannot make sense of it.
    """
    try:
        return ds.get(keyword)
    except Exception as error:  # nearly anything, as elements are parsed when they are asked for
        raise HeaderError(f"{keyword} is damaged ({type(error).__name__})") from error


def _count(ds: Dataset, keyword: str, default: int | None = None) -> int:
    """One integer from 0; ``default`` where the attribute is missing or empty, HeaderError where that is None."""
    value = attribute(ds, keyword)
    if value is None or value == "":
        if default is None:
            raise HeaderError(f"{keyword} is missing")
        return default
    if not isinstance(value, int) or value < 0:  # what it is instead is not quoted
        raise HeaderError(f"{keyword} is no number from 0")
    return int(value)
