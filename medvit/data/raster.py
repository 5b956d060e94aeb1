"""Photographs: PNG, JPEG, TIFF and BMP files, read with pillow and then checked; they lie in no patient's space."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from medvit.data.space import Space
from medvit.data.volume import Source, Volume
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries

SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")
_MAGIC = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0\x08\0\0\0", b"MM\0+\0\x08\0\0"), "TIFF"),
}
_BMP_HEADERS = (12, 40, 52, 56, 64, 108, 124)  # sizes of the header that follows "BM" and 12 bytes
_GREY = dict.fromkeys(("1", "L", "LA", "I;16", "I;16L", "I;16B"), 1)
_COLOUR = dict.fromkeys(("RGB", "RGBA", "P", "PA"), 3)
_ALPHA = {"LA": "LA", "RGBA": "RGBA", "PA": "RGBA"}

_FULL_BITS = 15  # of 16; fewer are those of a detector

# EXIF tag 274: which way (column, row) as stored run in the upright picture, x to the right and y downwards.
EXIF_ORIENTATION = 274
_TURNS = {
    1: ((1, 0), (0, 1)),
    2: ((-1, 0), (0, 1)),
    3: ((-1, 0), (0, -1)),
    4: ((1, 0), (0, -1)),
    5: ((0, 1), (1, 0)),
    6: ((0, -1), (1, 0)),
    7: ((0, -1), (-1, 0)),
    8: ((0, 1), (-1, 0)),
}
_TIFF_SUBFILE, _TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_SUBIFDS = 254, 256, 257, 330
_TIFF_BITS, _TIFF_PHOTOMETRIC, _TIFF_SAMPLE_FORMAT = 258, 262, 339


@dataclass(frozen=True)
class RasterHeader:
    """A checked header: the grid of stored pixels ``(columns, rows, 1)``, 1 or 3 channels, notes for people."""

    space: Space
    channels: int
    notes: tuple[str, ...]


def sniff(start: bytes) -> str | None:
    """Name of the format that a file's first 18 bytes or more are those of, None if it is none of ours."""
    if start[:2] == b"BM" and int.from_bytes(start[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    return next((name for magic, name in _MAGIC.items() if start.startswith(magic)), None)


def stem(path: Path) -> str:
    """File name without the extension of a photograph; the whole name where it has none."""
    return path.stem if path.suffix.lower() in SUFFIXES else path.name


def read_raster_header(path: str | Path) -> RasterHeader:
    """Check a file's header, without decoding its pixels.

    Raises:
        UnreadableFile: none of the four formats, corrupt, or too large.
        UnreadableSeries: ``multi-frame``, or ``pixel-type``: neither grey nor RGB, colours of 16 bits, or
            values that pillow would misread.
    """
    path = Path(path)
    with _opened(path) as image:
        return _checked(image, path)


def read_raster(path: str | Path, name: str = "") -> Volume:
    """Read one photograph: ``(column, row, 1)``, for colours ``(column, row, 1, 3)``, float32, pixels as stored.

    Values are those of the file, 0 to 255 or, for 16-bit grey, to 65535; grey of fewer than 8 bits is spread over 0 to
    255, palettes give their colours. Colour profiles are not applied. An EXIF orientation turns no pixel: it is in the
    affine, which leads to the upright picture (x to the right, y downwards, in pixels).

    Args:
        path: PNG, JPEG, TIFF or BMP file.
        name: stem for outputs.

    Raises:
        UnreadableFile: as :func:`read_raster_header`, and where pixels are missing or a checksum is wrong.
        UnreadableSeries: as :func:`read_raster_header`, and ``transparent``.
    """
    path = Path(path)
    _require_whole(path)
    with _opened(path) as image:
        header = _checked(image, path)
        turn = _orientation(image)
        image.load()
        if image.format == "PNG" and "exif" in image.info and _orientation(image) != turn:
            reason = "its EXIF orientation stands behind its pixels, where few programs look; save it again, upright"
            raise UnreadableFile(path, reason)
        pixels, notes = _pixels(image, path)
    if pixels.dtype != np.uint8 and (bits := int(pixels.max()).bit_length()) < _FULL_BITS:
        notes += (f"its 16-bit values use {bits} bits, up to {pixels.max()}: dark where 65535 counts as white",)
    columns_first = pixels.swapaxes(0, 1)
    if image.format == "TIFF":  # pillow has turned it already
        columns_first = _as_stored(columns_first, header.space)
    array = np.ascontiguousarray(columns_first[:, :, None], dtype=np.float32)
    return Volume(array, header.space, Source("raster", (path,), name=name or stem(path)), header.notes + notes)


def upright(array: np.ndarray, space: Space) -> np.ndarray:
    """``(column, row, ...)`` as stored to ``(x, y, ...)`` of the upright picture; a view."""
    x, y = space.affine[:2, :2]
    if x[0] == 0:
        array = array.swapaxes(0, 1)
    return array[:: int(x.sum()), :: int(y.sum())]


def exif_orientation(space: Space) -> int:
    """The EXIF orientation, 1 to 8, that a photograph with this ``space`` has."""
    linear = tuple(tuple(int(v) for v in row) for row in space.affine[:2, :2])
    return next(number for number, turn in _TURNS.items() if turn == linear)


def _as_stored(array: np.ndarray, space: Space) -> np.ndarray:
    """The inverse of :func:`upright`."""
    x, y = space.affine[:2, :2]
    array = array[:: int(x.sum()), :: int(y.sum())]
    return array.swapaxes(0, 1) if x[0] == 0 else array


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file as pillow's image, undecoded; whatever pillow raises inside becomes an :class:`UnreadableFile`."""
    lenient, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False  # others may have set it
    try:
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd tags and large pictures
            with Image.open(file, formats=_FORMATS) as image:
                yield image
    except (MedvitError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise UnreadableFile(path, f"a photograph may have {most} pixels at most; reduce or cut it") from error
    except Exception as error:  # a corrupt file can raise nearly anything from inside pillow
        if isinstance(error, OSError) and error.errno:
            raise UnreadableFile(path, f"cannot be opened: {error.strerror}") from error
        # not quoting the error, which may hold what a tag says
        what = f"cut short, corrupt or of a kind that pillow does not read ({type(error).__name__})"
        raise UnreadableFile(path, f"no readable {', '.join(_FORMATS)} file: {what}; get it again") from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = lenient


def _checked(image: Any, path: Path) -> RasterHeader:
    tags = image.tag_v2 if image.format == "TIFF" else {}
    frames = getattr(image, "n_frames", 1)
    # a reduced picture, or pictures inside a picture: a camera's raw file or a pyramid, whose first is a thumbnail
    if (frames > 1 and image.format != "MPO") or _TIFF_SUBIFDS in tags or tags.get(_TIFF_SUBFILE, 0) & 1:
        reason = "one picture is needed, but the file holds several; save the one you mean as its own file"
        raise UnreadableSeries(path, "multi-frame", reason)
    width, height = (tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]) if tags else image.size  # pillow's size is the upright one
    turn = _orientation(image)
    notes: tuple[str, ...] = ()
    if turn != 1:
        notes = (f"its EXIF orientation is {turn}; it was turned upright, results lie on its pixels as stored",)
    if image.format == "MPO":
        notes += (f"a camera's file of {frames} pictures; the first, which viewers show, was read",)
    space = Space.from_affine((width, height, 1), _affine(turn, width, height), unit="px")
    return RasterHeader(space, _channels(image, path), notes)


def _channels(image: Any, path: Path) -> int:
    channels = (_GREY | _COLOUR).get(image.mode)
    if image.mode == "I" and image.format == "PNG":  # 16 bits in older versions of pillow
        channels = 1
    what = f"are of pillow's mode {image.mode}"
    deep = image.mode.startswith("I")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    # of channels in separate planes pillow does not say how they are packed, and reads 16 bits as 8
    bits = max(tags.get(_TIFF_BITS, (1,)))
    if channels and not deep and (bits > 8 or any(";16" in raw for raw in _raw_modes(image))):
        channels, what = None, "have 16 bits per channel, which pillow would cut to 8"
    elif channels and deep and tags.get(_TIFF_PHOTOMETRIC) == 0:
        channels, what = None, "are of 16 bits with 0 for white, which pillow would not turn"
    elif channels and any(kind not in (1, 4) for kind in tags.get(_TIFF_SAMPLE_FORMAT, ())):
        channels, what = None, "have a sign, which pillow would not heed"
    if channels is None:
        needed = "grey values of at most 16 bits or RGB of 8 are needed"
        raise UnreadableSeries(path, "pixel-type", f"{needed}, but its pixels {what}; save it as 8-bit RGB or grey")
    return channels


def _raw_modes(image: Any) -> Iterator[str]:
    """How the pixels are packed in the file, tile by tile, in pillow's words."""
    for tile in image.tile:
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        yield str(arguments[0])


def _orientation(image: Any) -> int:
    """The EXIF orientation 1 to 8; 1 where there is none that makes sense."""
    try:
        exif = Image.Exif()
        if image.format == "PNG":  # pillow would decode the pixels to look behind them
            exif.load(image.info.get("exif", b""))
        else:
            exif = image.getexif()
        turn = exif.get(EXIF_ORIENTATION, 1)
    except Exception:  # viewers take no notice of damaged EXIF data either
        return 1
    return turn if turn in _TURNS else 1


def _affine(turn: int, width: int, height: int) -> np.ndarray:
    """4 x 4: stored (column, row, 0) to the pixel (x, y, 0) of the upright picture."""
    affine = np.eye(4)
    affine[:2, :2] = _TURNS[turn]
    last = np.array((width - 1, height - 1))
    affine[:2, 3] = np.maximum(-affine[:2, :2], 0) @ last
    return affine


def _pixels(image: Any, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Rows of pixels, ``(row, column)`` or ``(row, column, 3)``, and what a person should know."""
    alpha = _ALPHA.get(image.mode)
    if "transparency" in image.info and alpha is None and image.mode in ("1", "L", "RGB", "P"):
        alpha = "LA" if image.mode in ("1", "L") else "RGBA"
    if alpha is None:
        plain = {"1": "L", "P": "RGB"}.get(image.mode, image.mode)
        pixels = np.asarray(image.convert(plain))
        opaque = pixels != image.info.get("transparency", -1)  # one value of 16-bit grey; of other modes see above
    else:
        pixels = np.asarray(image.convert(alpha))
        opaque = pixels[..., -1] == 255
    if not opaque.all():
        share = 100 * (1 - opaque.mean())
        reason = f"{share:.3g} % of its pixels are transparent, and what lies behind is unknown; save it without alpha"
        raise UnreadableSeries(path, "transparent", reason)
    if alpha is None:
        return pixels, ()
    colours = pixels[..., 0] if alpha == "LA" else pixels[..., :3]
    return colours, ("its alpha channel, opaque everywhere, was left out",)


def _require_whole(path: Path) -> None:
    """Check what pillow does not: the checksums and the end of a PNG, the end of a JPEG."""
    with _opened(path) as image:
        if image.format == "PNG":
            image.verify()
    if image.format in ("JPEG", "MPO"):
        data = path.read_bytes()
        if data.find(b"\xff\xd9", _first_scan(data)) < 0:
            raise UnreadableFile(path, "the file is cut short: its end-of-image marker is missing; get it again")


def _first_scan(data: bytes) -> int:
    """Where the first scan of a JPEG begins; markers before it belong to a thumbnail."""
    position = 2
    while position + 4 <= len(data) and data[position + 1] != 0xDA:
        # a marker may have any number of FF in front; its segment's length counts the two bytes of the length
        position += 1 if data[position + 1] == 0xFF else 2 + int.from_bytes(data[position + 2 : position + 4], "big")
    return position
