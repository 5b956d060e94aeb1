"""Look-up tables of DICOM: modality, VOI and palettes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydicom.dataset import Dataset

from medvit.data.storage import HeaderError, attribute

_DISCRETE, _LINEAR, _INDIRECT = 0, 1, 2  # kinds of segments
_MOST_ENTRIES = 1 << 16


@dataclass(frozen=True)
class Table:
    """Entry ``n`` is what the value ``first + n`` becomes; values beyond either end take the entry there."""

    first: int
    entries: np.ndarray

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Look up values of any shape, rounded to integers; the result has the type of the entries."""
        index = np.clip(np.rint(values).astype(np.float64) - self.first, 0, len(self.entries) - 1)
        return np.asarray(self.entries[index.astype(np.intp)])


def read_table(descriptor: Sequence[int], data: Any, *, signed: bool, little: bool) -> Table:
    """A table from LUTDescriptor and LUTData, PS3.3 C.11.1.1.

    Not ``pydicom.pixels.apply_modality_lut`` or ``apply_voi_lut``, which take indices modulo the type of pixels or
    entries and refuse tables of 12 bits.

    Args:
        descriptor: number of entries (0: 65536), first value, bits per entry. Entries of 8 bits may come in 16.
        data: bytes, or integers.
        signed: the values to look up may be negative; a first value that was read as unsigned is then made so.
        little: bytes are little endian.

    Raises:
        HeaderError: damaged, or fewer entries than promised.
    """
    try:
        count, first = int(descriptor[0]) & 0xFFFF or _MOST_ENTRIES, int(descriptor[1])
        entries = _words(data, count, little)[:count]
    except Exception as error:  # not of numbers
        raise HeaderError(f"is damaged ({type(error).__name__})") from error
    if len(entries) < count:
        raise HeaderError(f"promises {count} entries, but has {len(entries)}")
    return Table(first - (1 << 16) if signed and first >= 1 << 15 else first, entries)


def apply_palette(ds: Dataset, stored: np.ndarray, *, signed: bool, little: bool) -> np.ndarray:
    """Colours (..., 3) uint8 of the stored values of a PALETTE COLOR image, PS3.3 C.7.6.3.1.5 and C.7.9.

    Entries of 16 bits keep their upper eight.

    Raises:
        HeaderError: a table is missing, too short or damaged.
    """
    tables = [_palette_table(ds, colour, signed, little) for colour in ("Red", "Green", "Blue")]
    # many writers declare 16 bits and fill 8
    shift = 8 if max(int(table.entries.max()) for table in tables) > 255 else 0
    return np.stack([(table(stored) >> shift).astype(np.uint8) for table in tables], axis=-1)


def _palette_table(ds: Dataset, colour: str, signed: bool, little: bool) -> Table:
    descriptor = attribute(ds, f"{colour}PaletteColorLookupTableDescriptor")
    data = attribute(ds, f"{colour}PaletteColorLookupTableData")
    segments = attribute(ds, f"Segmented{colour}PaletteColorLookupTableData")
    if descriptor is None or not (data or segments):
        raise HeaderError(f"its {colour.lower()} palette is missing")
    if not data:
        data = _expand(descriptor, segments, little)
    try:
        return read_table(descriptor, data, signed=signed, little=little)
    except HeaderError as error:
        raise HeaderError(f"its {colour.lower()} palette {error}") from error


def _words(data: Any, count: int, little: bool) -> np.ndarray:
    """``count`` entries or more as uint16, from integers or from bytes that hold one or two bytes each."""
    if not isinstance(data, bytes):
        return np.asarray(data, dtype=np.int64).reshape(-1).astype(np.uint16)
    even = data[: len(data) // 2 * 2]
    if len(even) >= 2 * count:
        return np.frombuffer(even, "<u2" if little else ">u2").astype(np.uint16)
    # entries of 8 bits, two in a word
    packed = np.frombuffer(data, np.uint8) if little else np.frombuffer(even, "u2").byteswap().view(np.uint8)
    return packed.astype(np.uint16)


def _expand(descriptor: Sequence[int], data: bytes, little: bool) -> list[int]:
    """Entries of a segmented table, PS3.3 C.7.9.2, of words of 16 bits or 8."""
    try:
        wide = int(descriptor[2]) > 8
        words = _words(data, len(data) // 2 if wide else len(data), little).tolist()
    except Exception as error:
        raise HeaderError(f"its segmented palette is damaged ({type(error).__name__})") from error
    entries: list[int] = []

    def run(position: int, segments: float, copying: bool) -> None:
        while segments and position + 1 < len(words):
            kind, length = words[position : position + 2]
            position, segments = position + 2, segments - 1
            if kind == _DISCRETE:
                entries.extend(words[position : position + length])
                position += length
            elif kind == _LINEAR and entries and position < len(words) and length:
                last, end = entries[-1], words[position]
                entries.extend(int(v) for v in np.rint(last + (end - last) * np.arange(1, length + 1) / length))
                position += 1
            elif kind == _INDIRECT and not copying:
                parts = words[position : position + (2 if wide else 4)]
                offset = sum(part << (16 if wide else 8) * n for n, part in enumerate(parts))
                run(offset // 2 if wide else offset, length, True)
                position += len(parts)
            else:
                raise HeaderError("its segmented palette is damaged")
            if len(entries) > _MOST_ENTRIES:
                raise HeaderError("its segmented palette is damaged: it makes more than 65536 entries")

    run(0, float("inf"), False)
    return entries
