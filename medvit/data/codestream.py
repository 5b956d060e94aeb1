"""Compressed pixels before they are decoded: fragments put together to frames, and what a frame says about itself."""

from __future__ import annotations

from dataclasses import dataclass

_END_OF_IMAGE = b"\xff\xd9"  # of JPEG and JPEG-LS, and of the codestreams of JPEG 2000

_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_JP2 = b"\x00\x00\x00\x0cjP  "
_STARTS = (b"\xff\xd8\xff", b"\xff\x4f\xff\x51", _JP2)  # JPEG and JPEG-LS, JPEG 2000 and HTJ2K, these in a JP2 file
_SOF = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # 0xF7 is that of JPEG-LS
_LOSSLESS = 0xC3
_COLOUR_MARKERS = {0xE0: b"JFIF\0", 0xEE: b"Adobe"}
_SOT = b"\xff\x90"


@dataclass(frozen=True)
class Codestream:
    """What one JPEG, JPEG-LS, JPEG 2000 or HTJ2K stream says about itself.

    Args:
        precision: bits per sample, of the first component.
        lossless: lossless JPEG (process 14); False for any other kind.
        names_colours: the stream tells its colour space, by a JFIF or Adobe marker or components called R, G, B.
    """

    rows: int
    columns: int
    samples: int
    precision: int
    lossless: bool = False
    names_colours: bool = False


def split_frames(data: bytes, count: int, *, streams: bool) -> list[bytes]:
    """The frames of encapsulated pixel data, PS3.5 A.4.

    Offset tables are not consulted, as they are often absent and sometimes wrong: of streams that know where they
    begin, a frame is what lies between two beginnings; run-length frames are one fragment each.

    Args:
        data: the value of PixelData.
        count: NumberOfFrames.
        streams: the frames are of the JPEG family, not run-length encoded.

    Raises:
        ValueError: a fragment is cut short, or there are more or fewer frames.
    """
    frames: list[list[bytes]] = []
    for fragment in _fragments(data)[1:]:  # the first holds the offset table
        if streams and frames and not fragment.startswith(_STARTS):
            frames[-1].append(fragment)
        else:
            frames.append([fragment])
    if len(frames) != count:
        raise ValueError(f"{count} frames are needed, but its pixels hold {len(frames)}")
    return [b"".join(frame) for frame in frames]


def read_codestream(frame: bytes) -> Codestream:
    """Read what a stream says about itself, and check that its end is there.

    Raises:
        ValueError: not such a stream, or cut short.
    """
    if frame.startswith(_JP2):
        start = frame.find(_STARTS[1])
        return _read_jpeg2000(frame[start:] if start > 0 else b"")
    return _read_jpeg2000(frame) if frame.startswith(_STARTS[1]) else _read_jpeg(frame)


def _fragments(data: bytes) -> list[bytes]:
    fragments, position = [], 0
    while position < len(data) and not data.startswith(_END, position):
        begin = position + 8
        position = begin + int.from_bytes(data[position + 4 : begin], "little")
        if not data.startswith(_ITEM, begin - 8) or begin > len(data):
            raise ValueError("they are not in fragments, as compressed pixels must be")
        if position > len(data):
            raise ValueError("the file is cut short")
        fragments.append(data[begin:position])
    return fragments


def _read_jpeg(frame: bytes) -> Codestream:
    if not frame.startswith(b"\xff\xd8"):
        raise ValueError("a compressed frame does not begin like one")
    if _END_OF_IMAGE not in frame.rstrip(b"\0")[-8:]:
        raise ValueError("a compressed frame is cut short")
    position, names_colours = 2, False
    while position + 4 <= len(frame) and frame[position] == 0xFF:
        marker = frame[position + 1]
        if marker == 0xFF:  # padding
            position += 1
            continue
        length = int.from_bytes(frame[position + 2 : position + 4], "big")
        segment = frame[position + 4 : position + 2 + length]
        if marker in _SOF and len(segment) >= 6:
            samples = segment[5]
            components = segment[6 : 6 + 3 * samples : 3]
            return Codestream(
                int.from_bytes(segment[1:3], "big"),
                int.from_bytes(segment[3:5], "big"),
                samples,
                segment[0],
                marker == _LOSSLESS,
                names_colours or components.upper() == b"RGB",
            )
        # shorter ones are not recognised by libjpeg either
        if segment.startswith(_COLOUR_MARKERS.get(marker, b"-")) and len(segment) >= 12:
            names_colours = True
        position += 2 + length
    raise ValueError("a compressed frame has no header")


def _read_jpeg2000(frame: bytes) -> Codestream:
    """ISO 15444-1 A.4.2, A.5.1; the marker of the end must follow where the tile parts end."""
    if len(frame) < 43:
        raise ValueError("a compressed frame has no header")
    right, bottom, left, top = (int.from_bytes(frame[n : n + 4], "big") for n in (8, 12, 16, 20))
    position = 2
    while position + 4 <= len(frame) and frame[position : position + 2] != _SOT:
        position += 2 + int.from_bytes(frame[position + 2 : position + 4], "big")
    while frame.startswith(_SOT, position):
        length = int.from_bytes(frame[position + 6 : position + 10], "big")
        # 0: all that is left
        position = position + max(length, 12) if length else frame.rfind(_END_OF_IMAGE)
    if not frame.startswith(_END_OF_IMAGE, position):
        raise ValueError("a compressed frame is cut short")
    return Codestream(bottom - top, right - left, int.from_bytes(frame[40:42], "big"), (frame[42] & 0x7F) + 1)
