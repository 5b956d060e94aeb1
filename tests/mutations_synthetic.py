"""Damage to DICOM and NIfTI files, byte by byte, the same for the same seed (``from mutations_synthetic import ...``).

Files are edited as bytes, so that nothing but the damage changes. Each edit says whether, and why, no reader could see
it: that is the whole list of excuses for a volume that differs in silence.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from pydicom.datadict import keyword_for_tag

_LONG = {b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"SQ", b"UN", b"UT", b"UC", b"UR"}
_TEXT = {b"AE", b"AS", b"CS", b"DA", b"DS", b"DT", b"IS", b"LO", b"LT", b"PN", b"SH", b"ST", b"TM", b"UI", b"UT"}
_UNDEFINED = 0xFFFFFFFF
_ITEM_END, _SEQUENCE_END = 0xFFFEE00D, 0xFFFEE0DD

# Elements that decide what a volume is, the more often the more times; any other element is hit now and then.
_DECISIVE = (
    *("SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns", "BitsAllocated"),
    *("BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "InstanceNumber"),
    *("ImageType", "Modality", "EchoTime", "SliceThickness", "SamplesPerPixel", "PhotometricInterpretation"),
    *("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "PixelMeasuresSequence"),
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelValueTransformationSequence", "PixelData"),
    *("TransferSyntaxUID", "SpacingBetweenSlices", "MediaStorageSOPClassUID", "AcquisitionNumber", "ContentTime"),
)
_IDENTITY = ("ImageType = b'LOCALIZER'", "SOPClassUID", "StudyInstanceUID", "SeriesInstanceUID", "cut to")
_UNSIGNED = (0, 1, 2, 3, 7, 8, 10, 11, 12, 13, 16, 32, 255, 4096, 65535)
_WORDS = (b"LOCALIZER", b"DERIVED\\SECONDARY", b"ORIGINAL\\PRIMARY\\MOSAIC", b"MONOCHROME1", b"RGB", b"PALETTE COLOR")
_UIDS = (
    *(b"1.2.840.10008.5.1.4.1.1.2", b"1.2.840.10008.5.1.4.1.1.4", b"1.2.840.10008.5.1.4.1.1.7"),
    *(b"1.2.840.10008.5.1.4.1.1.66.4", b"1.2.840.10008.5.1.4.1.1.4.1", b"1.2.840.10008.5.1.4.1.1.88.11"),
    *(b"1.2.840.10008.1.2", b"1.2.840.10008.1.2.1", b"1.2.840.10008.1.2.2", b"1.2.840.10008.1.2.1.99"),
    *(b"1.2.840.10008.1.2.5", b"1.2.840.10008.1.2.4.80", b"1.2.840.10008.1.2.4.90", b"1.2.3.4.5", b"no uid", b""),
)


class Element(NamedTuple):
    """One element of a file: its bytes are ``start:end``, those of its value ``value:end``.

    ``lengths`` is where the lengths of the sequences and items around it stand.
    """

    keyword: str
    vr: bytes
    start: int
    value: int
    end: int
    lengths: tuple[int, ...]


@dataclass(frozen=True)
class Study:
    """Sound files of one series.

    Args:
        files: content by name.
        kind: ``"slices"`` (one file per slice), ``"whole"`` (one file) or ``"nifti"``.
        ends: files that are the first or last slice of the only volume.
        excused: keywords of elements whose other valid values nothing in the files contradicts, with the reason.
        head: bytes of a file that are mostly struck.
    """

    name: str
    files: dict[str, bytes]
    kind: str = "slices"
    ends: tuple[str, ...] = ()
    excused: dict[str, str] = field(default_factory=dict)
    head: int = 1 << 40


@dataclass
class Damage:
    """What was done to a study; ``excuses`` are why a reader may not see it.

    ``lone``: a file may have lost what tells where it belongs.
    """

    files: dict[str, bytes]
    rng: Random
    study: Study
    steps: list[str] = field(default_factory=list)
    excuses: list[str] = field(default_factory=list)
    touched: set[str] = field(default_factory=set)
    lone: bool = False

    def done(self, name: str, what: str, excuse: str | None = None) -> None:
        self.steps.append(f"{name}: {what}")
        self.lone |= len(self.steps) > 1 or any(keyword in what for keyword in _IDENTITY)
        self.touched.add(name)
        if excuse:
            self.excuses.append(excuse)


def damage(study: Study, seed: int) -> Damage:
    """One edit of the study, of every fifth seed two."""
    rng = Random(f"{study.name} {seed}")
    result = Damage(dict(study.files), rng, study)
    edits = _NIFTI_EDITS if study.kind == "nifti" else _SLICE_EDITS if study.kind == "slices" else _FILE_EDITS
    for _ in range(1 + (rng.random() < 0.2)):
        if all(result.files.values()):  # nothing is left to be struck in an empty file
            rng.choices([edit for edit, _ in edits], [weight for _, weight in edits])[0](result)
    return result


def elements(data: bytes) -> list[Element]:
    """Elements of a DICOM file in explicit VR little endian, each sequence before what it holds.

    Of a file that is damaged already those before the damage.
    """
    found: list[Element] = []
    with suppress(struct.error):
        _walk(data, 132, len(data), (), found)
    return [element for element in found if element.end <= len(data)]


def _walk(data: bytes, at: int, stop: int, lengths: tuple[int, ...], found: list[Element]) -> int:
    """Append the elements of a data set to ``found``; returns where it ends."""
    while at + 12 <= stop:
        tag, length = _head(data, at)
        if tag in (_ITEM_END, _SEQUENCE_END):
            return at + 8
        vr = data[at + 4 : at + 6]
        value = at + (12 if vr in _LONG else 8)
        if vr not in _LONG:
            (length,) = struct.unpack_from("<H", data, at + 6)
        elif vr != b"SQ":
            (length,) = struct.unpack_from("<I", data, at + 8)
            length = stop - value if length == _UNDEFINED else length
        keyword = keyword_for_tag(tag) or f"{tag:08x}"
        place = len(found)
        end = _walk_items(data, at, stop, lengths, found) if vr == b"SQ" else value + length
        found.insert(place, Element(keyword, vr, at, value, end, lengths))
        at = end
    return stop


def _walk_items(data: bytes, at: int, stop: int, lengths: tuple[int, ...], found: list[Element]) -> int:
    (length,) = struct.unpack_from("<I", data, at + 8)
    lengths = lengths if length == _UNDEFINED else (*lengths, at + 8)
    at += 12
    end = stop if length == _UNDEFINED else at + length
    while at + 8 <= end:
        tag, size = _head(data, at)
        if tag == _SEQUENCE_END:
            return at + 8
        if size == _UNDEFINED:
            at = _walk(data, at + 8, end, lengths, found)
        else:
            _walk(data, at + 8, at + 8 + size, (*lengths, at + 4), found)
            at += 8 + size
    return end


def _head(data: bytes, at: int) -> tuple[int, int]:
    group, number, length = struct.unpack_from("<HHI", data, at)
    return (group << 16) + number, length


def _pick(damaged: Damage, name: str) -> Element | None:
    """An element, mostly a decisive one; None of a file in which nothing can be told any more."""
    found = elements(damaged.files[name])
    decisive = [element for element in found if element.keyword in _DECISIVE]
    some = decisive if decisive and damaged.rng.random() < 0.85 else found
    return damaged.rng.choice(some) if some else None


def _name(damaged: Damage) -> str:
    """A file; an end slice as often as all others."""
    ends = [name for name in damaged.study.ends if name in damaged.files]
    return damaged.rng.choice(ends if ends and damaged.rng.random() < 0.5 else sorted(damaged.files))


def _splice(damaged: Damage, name: str, element: Element, value: bytes | None) -> None:
    """Another value, or none and no element; lengths are corrected."""
    data = bytearray(damaged.files[name])
    if value is None:
        new = b""
    else:
        value += (b"\0" if element.vr in (b"UI", b"OB", b"UN") else b" ") * (len(value) % 2)
        long = element.vr in _LONG
        head = bytes(data[element.start : element.value - (4 if long else 2)])
        new = head + struct.pack("<I" if long else "<H", len(value)) + value
    for place in element.lengths:
        (length,) = struct.unpack_from("<I", data, place)
        longer = length + len(new) - (element.end - element.start)
        struct.pack_into("<I", data, place, longer & _UNDEFINED)  # a damaged length may be less than what it holds
    data[element.start : element.end] = new
    damaged.files[name] = bytes(data)


def _excuse(damaged: Damage, element: Element) -> str | None:
    """Why another valid value of an element may go unseen."""
    return damaged.study.excused.get(element.keyword)


def _remove(damaged: Damage) -> None:
    name = _name(damaged)
    element = _pick(damaged, name)
    if element is None:
        return
    _splice(damaged, name, element, None)
    damaged.done(name, f"{element.keyword} removed", damaged.study.excused.get(f"no {element.keyword}"))


def _replace(damaged: Damage) -> None:
    name = _name(damaged)
    element = _pick(damaged, name)
    if element is None:
        return
    value = _other(damaged.rng, element, damaged.files[name][element.value : element.end])
    _splice(damaged, name, element, value)
    damaged.done(name, f"{element.keyword} = {value[:80]!r}", _excuse(damaged, element))


def _other(rng: Random, element: Element, old: bytes) -> bytes:
    """A value of the same type that is not the old one, valid or nearly so."""
    vr = element.vr
    if rng.random() < 0.08:
        return b""
    if vr in (b"DS", b"IS"):
        return _other_number(rng, old, whole=vr == b"IS")
    if vr in (b"US", b"SS"):
        return struct.pack("<H", rng.choice([*_UNSIGNED, (int.from_bytes(old[:2], "little") + 1) % 65536]))
    if vr == b"UI":
        return rng.choice([*_UIDS, old.rstrip(b"\0") + b".1", old[: len(old) // 2]])
    if vr == b"CS":
        return rng.choice([*_WORDS, old[:-2], old + b"\\OTHER"])
    if vr == b"SQ":
        return b""
    if vr in _TEXT:
        return bytes(rng.choice(b"0123456789ABC.") for _ in range(rng.randrange(1, 12)))
    return old[: rng.randrange(len(old) + 1)]


def _other_number(rng: Random, old: bytes, whole: bool) -> bytes:
    parts = old.strip(b" \0").split(b"\\")
    n = rng.randrange(len(parts))
    try:
        number = float(parts[n])
        number = number if abs(number) < 1e9 else 1.0
    except ValueError:  # damaged before
        number = 1.0
    kinds: tuple[Callable[[], bytes], ...] = (
        lambda: b"%d" % (int(number) + rng.choice((-10, -2, -1, 1, 2, 10))),
        lambda: b"%d" % -int(number or 1),
        lambda: b"0",
        lambda: b"%d" % int(number) if whole else b"%.6g" % (number * rng.choice((1.1, 0.5, 2, 1.005, 1000))),
        lambda: rng.choice((b"nan", b"inf", b"-inf", b"abc", b"1e30", b"1e-30", b"1,5", b"--1", b"2147483648")),
        lambda: parts[n] + b"\\" + parts[n],
    )
    parts[n] = rng.choice(kinds)()
    return b"\\".join(parts)


def _digit(damaged: Damage) -> None:
    """One digit of a number in text changed: it still parses."""
    name = _name(damaged)
    found = [e for e in elements(damaged.files[name]) if e.vr in (b"DS", b"IS") and e.end > e.value]
    if not found:
        return
    element = damaged.rng.choice(found)
    data = bytearray(damaged.files[name])
    digits = [n for n in range(element.value, element.end) if chr(data[n]).isdigit()]
    if digits:
        at = damaged.rng.choice(digits)
        data[at] = damaged.rng.choice([d for d in b"0123456789" if d != data[at]])
        damaged.files[name] = bytes(data)
        value = bytes(data[element.value : element.end])
        damaged.done(name, f"a digit of {element.keyword} = {value!r}", _excuse(damaged, element))


def _rubbish(damaged: Damage) -> None:
    name = _name(damaged)
    element = _pick(damaged, name)
    if element is None:
        return
    size = element.end - element.value
    value = bytes(damaged.rng.randrange(256) for _ in range(size))
    data = damaged.files[name]
    damaged.files[name] = data[: element.value] + value + data[element.end :]
    damaged.done(name, f"{element.keyword} is rubbish", _excuse(damaged, element))


def _swap(damaged: Damage) -> None:
    """The values of one element exchanged between two files."""
    if len(damaged.files) < 2:
        return
    one, two = damaged.rng.sample(sorted(damaged.files), 2)
    first = _pick(damaged, one)
    second = [e for e in elements(damaged.files[two]) if first and e.keyword == first.keyword and not e.lengths]
    if first is None or first.lengths or not second:
        return
    values = [damaged.files[n][e.value : e.end] for n, e in ((one, first), (two, second[0]))]
    _splice(damaged, one, first, values[1])
    _splice(damaged, two, second[0], values[0])
    excuse = damaged.study.excused.get(f"swapped {first.keyword}") or _excuse(damaged, first)
    damaged.done(one, f"{first.keyword} swapped with {two}", excuse)


def _flip(damaged: Damage) -> None:
    """Some bits of some bytes."""
    name = _name(damaged)
    data = bytearray(damaged.files[name])
    for _ in range(damaged.rng.choice((1, 1, 1, 2, 5))):
        at = _place(damaged, len(data))
        data[at] ^= damaged.rng.randrange(1, 256)
        excuse, which = _where(damaged, name, at, at + 1)
        damaged.done(name, f"byte {at}{which} is {data[at]}", excuse)
    damaged.files[name] = bytes(data)


def _place(damaged: Damage, size: int) -> int:
    """Where to strike: mostly in the header, however large the pixels are."""
    return damaged.rng.randrange(min(size, damaged.study.head) if damaged.rng.random() < 0.9 else size)


def _zero(damaged: Damage) -> None:
    """A block of zeros."""
    name = _name(damaged)
    data = damaged.files[name]
    at = _place(damaged, len(data))
    size = min(damaged.rng.choice((1, 2, 8, 64, 512, 4096)), len(data) - at)
    damaged.files[name] = data[:at] + bytes(size) + data[at + size :]
    excuse, which = _where(damaged, name, at, at + size)
    damaged.done(name, f"bytes {at} to {at + size}{which} are zero", excuse)


def _where(damaged: Damage, name: str, start: int, end: int) -> tuple[str | None, str]:
    """The excuse of the elements that hold these bytes, whose heads count as their values; and what they are."""
    if damaged.study.kind == "nifti":
        excuses = [why for (low, high), why in _NIFTI_EXCUSES.items() if start < high and low < end]
        return (excuses[0] if excuses else None), ""
    hit = [e for e in elements(damaged.study.files.get(name, b"")) if start < e.end and e.start < end]
    excuses = [why for e in hit if (why := _excuse(damaged, e))]
    damaged.lone |= start < 132 or len(hit) > 1  # not recognised as DICOM, or many elements
    return (excuses[0] if excuses else None), f" ({', '.join(e.keyword for e in hit)})"


def _truncate(damaged: Damage) -> None:
    name = _name(damaged)
    data = damaged.files[name]
    at = damaged.rng.choice((damaged.rng.randrange(len(data)), len(data) - damaged.rng.randrange(1, 20)))
    damaged.files[name] = data[: max(at, 0)]
    damaged.done(name, f"cut to {at} bytes")


def _delete(damaged: Damage) -> None:
    name = _name(damaged)
    del damaged.files[name]
    damaged.done(name, "deleted", "nothing counts the slices beyond the last" if name in damaged.study.ends else None)


def _copy(damaged: Damage) -> None:
    name = _name(damaged)
    copy = f"copy_{name}"
    damaged.files[copy] = damaged.files[name]
    damaged.done(copy, "a copy")


def _overwrite(damaged: Damage) -> None:
    """One file in place of another."""
    if len(damaged.files) > 1:
        one, two = damaged.rng.sample(sorted(damaged.files), 2)
        damaged.files[one] = damaged.files[two]
        lost = "nothing counts the slices beyond the last" if one in damaged.study.ends else None
        damaged.done(one, f"overwritten with {two}", lost)


def _field(damaged: Damage) -> None:
    """A field of a NIfTI header set to another number."""
    name = _name(damaged)
    offset, form = damaged.rng.choice(_NIFTI_FIELDS)
    data = bytearray(damaged.files[name])
    if data[:2] == b"\x1f\x8b" or len(data) < 352:
        return _flip(damaged)
    (old,) = struct.unpack_from(form, data, offset)
    values = (0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 256, 512, old + 1, -old, 2 * old, float("nan"), float("inf"), 1e30)
    value = damaged.rng.choice([v for v in values if form == "<f" or (v == v and abs(v) < 30000)])
    struct.pack_into(form, data, offset, value if form == "<f" else int(value))
    damaged.files[name] = bytes(data)
    damaged.done(name, f"field {offset} = {value}", _where(damaged, name, offset, offset + struct.calcsize(form))[0])
    return None


_FILE_EDITS = ((_remove, 6), (_replace, 10), (_digit, 3), (_rubbish, 4), (_flip, 6), (_zero, 3), (_truncate, 3))
_FILE_EDITS += ((_copy, 1),)
_SLICE_EDITS = (*_FILE_EDITS, (_swap, 4), (_delete, 2), (_overwrite, 1), (_copy, 1))
_NIFTI_EDITS = ((_flip, 5), (_zero, 2), (_truncate, 2), (_field, 8))
_NIFTI_FIELDS = (
    *[(40 + 2 * n, "<h") for n in range(8)],  # dim
    *[(70, "<h"), (72, "<h"), (252, "<h"), (254, "<h")],  # datatype, bitpix, qform_code, sform_code
    *[(76 + 4 * n, "<f") for n in range(5)],  # pixdim
    *[(108, "<f"), (112, "<f"), (116, "<f")],  # vox_offset, scl_slope, scl_inter
    *[(256 + 4 * n, "<f") for n in range(18)],  # quaternion and offsets, srow_x, srow_y, srow_z
)
_NIFTI_EXCUSES = {
    (70, 72): "another type of the same size reads the same bytes, and no checksum tells",
    (112, 120): "the scale of all voxels stands here only",
    (352, 1 << 40): "voxels have no checksum",
}
