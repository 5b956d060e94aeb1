"""DICOM files without what identifies a patient: the Basic Application Level Confidentiality Profile of PS3.15.

Which attributes go, and how, is Table E.1-1 as the package dicom-anonymizer carries it (edition 2026c). It is applied
here, and not by that package, which leaves nested sequences as they are: names would stay in them, and segmentations
and structure sets would lose what they refer to.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import uuid
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.datadict import dictionary_has_tag, dictionary_VM, dictionary_VR, keyword_for_tag, repeater_has_tag
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.multival import MultiValue
from pydicom.tag import BaseTag
from pydicom.uid import UID, ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from medvit.data.headers import IMAGE_CLASSES, looks_like_dicom
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries
from medvit.writers.base import atomic

_EDITION = "dicomfields_2026c"
# What is done with attributes of each kind. Where the table leaves a choice by type, the strictest that keeps the
# object valid whatever the type: an empty value for Type 2 or 3, a dummy for Type 1 or 3.
_ACTIONS = {
    **{"X_TAGS": "remove", "Z_TAGS": "empty", "X_Z_TAGS": "empty", "X_Z_U_STAR_TAGS": "clean"},
    **{"D_TAGS": "dummy", "Z_D_TAGS": "dummy", "X_D_TAGS": "dummy", "X_Z_D_TAGS": "dummy", "U_TAGS": "clean"},
}
_DUMMY: dict[str, Any] = {
    **dict.fromkeys(("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UT"), "ANONYMIZED"),
    **{"AS": "000Y", "DA": "19000101", "TM": "000000", "DT": "19000101000000", "UR": "http://anonymized.invalid"},
    **dict.fromkeys(("DS", "IS"), "0"),
    **dict.fromkeys(("US", "SS", "UL", "SL", "UV", "SV", "AT"), 0),
    **dict.fromkeys(("FL", "FD"), 0.0),
}
_TEXT = ("AE", "CS", "LO", "LT", "PN", "SH", "ST", "UC", "UR", "UT")
_BYTES = ("OB", "UN")
_NUMERIC, _NUMBERS = ("AS", "DA", "DS", "DT", "IS", "TM"), re.compile(r"[\d+.:eEDWMY-]*")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1a\x1c-\x1f]")  # none is in text, and any element's header has some
_HEADER = re.compile(  # of an element of a common group with its VR
    rb"[\x02\x08\x10\x18\x20\x28\x29\x32\x38\x40\x54\x70\x88]\x00..(AE|AS|CS|DA|DS|DT|IS|LO|LT|PN|SH|ST|TM|UC|UI|UN|UT)",
    re.DOTALL,
)
_PUBLIC_UIDS = "1.2.840.10008."
# UIDs that name what is the same for everybody: kinds of objects, code systems
_SHARED_UIDS = ("CodingSchemeUID", "ContextUID", "MappingResourceUID")
_PIXELS = (0x7FE00008, 0x7FE00009, 0x7FE00010)

_CLASS = "1.2.840.10008.5.1.4.1.1."
_REFERRING = frozenset(_CLASS + tail for tail in ("66.1", "66.3", "66.4", "66.7", "30", "481.2", "481.3"))
# Ultrasound, secondary capture and what cameras take: names are often part of the picture, faces may be.
_CAPTURED = tuple(_CLASS + tail for tail in ("3.1", "6.1", "6.2", "7", "7.", "77.1.1", "77.1.2", "77.1.4", "77.1.6"))
_SCREENS = re.compile(r"SCREEN|CAPTURE|PROT$|DOSE|REPORT", re.IGNORECASE)

# Attributes of the table whose values are looked for in what is kept; what others say (a protocol, a body part) is no
# secret of its own.
_IDENTITY = re.compile(
    r"(IDs?|Identifier|Numbers?|Address|Name|Names)$|^Patient.*(Phone|Telecom|Telephone)|Institution|Physician|Station"
)
_NO_IDENTITY = re.compile(r"Protocol|Sequence|Instance|Acquisition(ID)?$|Frame|^Patient(Sex|Age|Size|Weight)")
_SHORTEST_VALUE, _SHORTEST_WORD, _SHORTEST_CODE = 4, 3, 5  # characters; less would eat words such as "T1"


@dataclass(frozen=True)
class Deidentified:
    """What became of one file: ``target`` is None where none was written, ``code`` and ``reason`` then say why.

    ``notes``: as :meth:`Deidentifier.write` returns them.
    """

    source: Path
    target: Path | None
    code: str | None = None
    reason: str | None = None
    notes: tuple[str, ...] = ()


class Deidentifier:
    """Writes DICOM files without identifiers; equal UIDs and patients stay equal within one instance, or one key.

    Removed or replaced at every level: all of Table E.1-1, private attributes, attributes that the standard does not
    know, overlays and curves, the preamble. Dates and times are removed, not shifted. UIDs become others, except those
    of the standard, code systems and object classes. PatientID and PatientName become one pseudonym. Pixels are not
    changed: neither faces that a volume of the head would show, nor text that nobody declared; files that are likely
    to have such text are refused.

    Args:
        key: 16 bytes or more; the same key gives the same UIDs and pseudonyms, in other processes too. Whoever has it
            can tell whether a UID or a PatientID that they know is the one behind another. None: a random one.
    """

    def __init__(self, key: bytes | None = None):
        if key is not None and len(key) < 16:
            raise ValueError(f"a key needs 16 bytes or more, got {len(key)}")
        self._key = key or secrets.token_bytes(32)
        self._written: dict[str, dict[str, int]] = {}  # study and series UID: files

    def write(self, source: Path, target: Path, *, overwrite: bool = False) -> tuple[str, ...]:
        """Write one file without identifiers, whole or not at all.

        Returns:
            Sentences about attributes that the profile keeps: those that repeated what it removes were replaced, those
            that could not be read were left out.

        Raises:
            UnreadableFile: not DICOM, or corrupt.
            UnreadableSeries: ``burned-in``: its pixels may show names; ``not-an-image``: an object of text or unknown
                data.
            OutputError: see :func:`medvit.writers.base.atomic`.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ds = _read(source)
                _check(source, ds)
                dropped = _drop_unreadable(ds)
                found = _secrets(ds)
                pseudonym = self._pseudonym(str(ds.get("PatientID") or ds.get("PatientName") or ""))
                self._clean(ds)
                repeated = _remove_residue(ds, found)
                _declare(ds, pseudonym)
                ds.file_meta, ds.preamble = self._meta(ds), bytes(128)
                with atomic(target, overwrite=overwrite) as part:
                    ds.save_as(part, enforce_file_format=True)
        except MedvitError:
            raise
        except Exception as error:  # a corrupt element can raise nearly anything from inside pydicom, and quote itself
            reason = f"corrupt DICOM header ({type(error).__name__}), nothing was written; get the file again"
            raise UnreadableFile(source, reason) from error
        return (
            *(f"{keyword} held no value of its kind and was left out" for keyword in sorted(dropped)),
            *(f"{keyword} repeated what identifies a person and was replaced" for keyword in sorted(repeated)),
        )

    def write_all(self, sources: Iterable[Path], folder: Path, *, overwrite: bool = False) -> Iterator[Deidentified]:
        """Write files to ``folder/<study>/<series>/<n>.dcm``, numbered from 1 as they come; one record for each.

        A file that fails is a record, never an exception, and its number goes to the next.
        """
        for source in sources:
            try:
                study, series = _place(source)
                known = self._written.setdefault(study, {})
                number = known.setdefault(series, 0) + 1
                numbers = (list(self._written).index(study) + 1, list(known).index(series) + 1)
                target = folder.joinpath(*map(str, numbers), f"{number}.dcm")
                notes = self.write(source, target, overwrite=overwrite)
            except MedvitError as error:
                yield Deidentified(source, None, error.code, str(error))
            else:
                known[series] = number
                yield Deidentified(source, target, notes=notes)

    def _digest(self, kind: str, text: str) -> bytes:
        return hmac.new(self._key, f"{kind}:{text}".encode(), hashlib.sha256).digest()

    def _pseudonym(self, patient: str) -> str:
        return "ANON" + self._digest("patient", patient.strip()).hex()[:12].upper() if patient.strip() else ""

    def _uid(self, old: str) -> str:
        if not old or old.startswith(_PUBLIC_UIDS):
            return old
        return f"2.25.{uuid.UUID(bytes=self._digest('uid', old.strip())[:16], version=4).int}"

    def _clean(self, ds: Dataset, everything: bool = False) -> None:
        """Apply the profile to a data set and all below; ``everything``: to each attribute, whatever the table says."""
        for tag in list(ds.keys()):
            action = _action(tag)
            if tag in _PIXELS:
                continue
            if action == "remove":
                del ds[tag]
                continue
            action = "dummy" if everything else action
            element = ds[tag]
            if element.VR == "SQ":
                self._clean_sequence(element, action)
            elif element.VR == "UI":
                if not _shared(element):
                    element.value = [self._uid(uid) for uid in _values(element)]
            elif element.keyword == "ROIName":  # one that is empty would not tell structures apart
                element.value = f"ROI {ds.get('ROINumber', '')}"
            elif action == "empty":
                ds[tag] = DataElement(tag, dictionary_VR(tag), None)
            elif action == "dummy" or element.VR == "PN":
                ds[tag] = DataElement(tag, element.VR, _DUMMY.get(element.VR, b""))

    def _clean_sequence(self, sequence: DataElement, action: str) -> None:
        if action == "empty":
            sequence.value = []
        for item in sequence.value or ():
            self._clean(item, everything=action == "dummy")

    def _meta(self, ds: Dataset) -> FileMetaDataset:
        meta = FileMetaDataset()
        syntax = getattr(ds.file_meta, "TransferSyntaxUID", None)
        if syntax is None:
            implicit, little = ds.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            syntax = ImplicitVRLittleEndian if implicit else explicit
        meta.TransferSyntaxUID = syntax
        meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.SOPInstanceUID = ds.get("SOPInstanceUID") or self._uid(secrets.token_hex(16))
        meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        return meta


# ---- what a file is


def _place(source: Path) -> tuple[str, str]:
    """UIDs of study and series."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = _read(source, ["StudyInstanceUID", "SeriesInstanceUID"])
            return str(ds.get("StudyInstanceUID") or ""), str(ds.get("SeriesInstanceUID") or "")
    except MedvitError:
        raise
    except Exception as error:
        raise UnreadableFile(source, f"corrupt DICOM header ({type(error).__name__}); get it again") from error


def _read(source: Path, tags: list[str] | None = None) -> FileDataset:
    try:
        with source.open("rb") as file:
            start = file.read(132)
            if not looks_like_dicom(start):
                raise UnreadableFile(source, "not a DICOM file" if start else "the file is empty")
            file.seek(0)
            options = {"specific_tags": tags, "stop_before_pixels": True} if tags else {}
            return pydicom.dcmread(file, force=start[128:132] != b"DICM", **options)  # type: ignore[arg-type]
    except OSError as error:
        raise UnreadableFile(source, f"cannot be opened: {error.strerror or error}") from error


def _check(source: Path, ds: Dataset) -> None:
    """Refuse what the profile cannot make safe."""
    kind = str(ds.get("SOPClassUID") or "")
    if kind not in IMAGE_CLASSES | _REFERRING:
        known = UID(kind).name if re.fullmatch(r"[\d.]{1,64}", kind) else ""  # a damaged one may go on over the header
        reason = f"{known or 'an object of no class'}: what it says in words may name the patient"
        raise UnreadableSeries(source, "not-an-image", f"{reason}; only images and what refers to them are written")
    if str(ds.get("BurnedInAnnotation") or "").upper() == "YES":
        raise UnreadableSeries(source, "burned-in", "text is burned into its pixels, which may name the patient")
    image_type = "\\".join(_values(ds["ImageType"])) if "ImageType" in ds else ""
    captured = kind in _CAPTURED or kind.startswith(_CLASS + "7.") or str(ds.get("Modality")) in ("US", "IVUS")
    if captured or ds.get("ConversionType") or _SCREENS.search(image_type):
        what = "an ultrasound image, a photograph or a capture of a screen"
        raise UnreadableSeries(source, "burned-in", f"{what}: its pixels may show the patient's name or face")


@cache
def _table() -> tuple[dict[int, str], tuple[tuple[int, int, int, int], ...]]:
    """Tag to action; and (group, element, masks of both) of repeating groups, all of which are removed."""
    from dicomanonymizer import dicomfields_selector  # type: ignore[import-untyped]

    tags: dict[int, str] = {}
    masked = []
    table = dicomfields_selector.dicom_anonymization_database_selector(_EDITION)
    for kind, action in _ACTIONS.items():
        for entry in table[kind]:
            if len(entry) == 2:
                tags[(entry[0] << 16) | entry[1]] = action
            else:
                masked.append(entry)
    return tags, tuple(masked)


def _action(tag: BaseTag) -> str:
    """``remove``, ``empty``, ``dummy`` or ``clean``: keep, but for what is inside and what names a person."""
    tags, masked = _table()
    overlay = tag.group & 0xFF00 in (0x5000, 0x6000)  # all of it: without its pixels an overlay is none
    if tag.is_private or overlay or tag.group < 8 or not dictionary_has_tag(tag):  # repeating groups are retired
        return "remove"
    if any(tag.group & m[2] == m[0] & m[2] and tag.element & m[3] == m[1] & m[3] for m in masked):
        return "remove"
    if tag in (0xFFFCFFFC, 0x04000561):  # padding behind the data; what was there before a change
        return "remove"
    return tags.get(int(tag), "clean")


def _declare(ds: Dataset, pseudonym: str) -> None:
    ds.PatientName = ds.PatientID = pseudonym
    ds.PatientIdentityRemoved = "YES"
    ds.LongitudinalTemporalInformationModified = "REMOVED"
    ds.DeidentificationMethod = "medvit: PS3.15 Basic Application Level Confidentiality Profile"
    code = Dataset()
    code.CodeValue, code.CodingSchemeDesignator = "113100", "DCM"
    code.CodeMeaning = "Basic Application Confidentiality Profile"
    ds.DeidentificationMethodCodeSequence = [code]


# ---- residue


@dataclass(frozen=True)
class _Secrets:
    """What must not be anywhere: UIDs, whole values, words of names; the latter two in lower case."""

    uids: frozenset[str]
    values: frozenset[str]
    words: frozenset[str]


def _drop_unreadable(ds: Dataset) -> set[str]:
    """Remove what pydicom cannot make sense of, as it cannot be checked either; keywords of what it was."""
    dropped: set[str] = set()
    for tag in list(ds.keys()):
        if tag in _PIXELS or _action(tag) == "remove":
            continue
        try:
            element = ds[tag]
            items = element.value if element.VR == "SQ" else ()
            sound = _is_sound(element)
        except Exception:
            items, sound = (), False
        if not sound and _action(tag) == "clean":
            del ds[tag]
            dropped.add(keyword_for_tag(tag))
        elif not sound:  # to be replaced anyway
            ds[tag] = DataElement(tag, dictionary_VR(tag), None)
        dropped.update(*(_drop_unreadable(item) for item in items or ()))
    return dropped


def _is_sound(element: DataElement) -> bool:
    """False where a value cannot be one of its kind: pydicom keeps text where a number should be, and where a damaged
    length reaches too far, the elements behind it as a value, which nothing here would read.
    """
    if element.VR == "SQ":
        return True
    if isinstance(element.value, bytes):
        return not _HEADER.search(element.value)
    if element.VR not in (*dictionary_VR(element.tag).split(" or "), "UN"):
        return False
    values = _values(element)
    if element.VR in _NUMERIC:
        return all(map(_NUMBERS.fullmatch, values))
    if element.VR in (*_TEXT, "UI"):
        return not any(map(_CONTROL.search, values))
    return not isinstance(element.value, list | MultiValue) or len(element.value) <= _most(element.tag)


def _most(tag: BaseTag) -> float:
    """How many values an attribute may have."""
    most = dictionary_VM(tag).split("-")[-1]
    return int(most) if most.isdigit() else float("inf")


def _secrets(ds: Dataset) -> _Secrets:
    uids, values, words = set[str](), set[str](), set[str]()
    for element in _elements(ds):
        parts = _values(element)
        if element.VR == "UI" and not _shared(element):
            uids.update(part for part in parts if not part.startswith(_PUBLIC_UIDS))
        elif element.VR == "PN":
            words.update(_words(" ".join(parts), _SHORTEST_WORD))
        if element.VR == "PN" or element.keyword == "PatientBirthDate" or _identifying(element):
            values.update(part.casefold() for part in parts if len(part) >= _SHORTEST_VALUE)
    return _Secrets(frozenset(uids), frozenset(values), frozenset(words))


def _identifying(element: DataElement) -> bool:
    known = _IDENTITY.search(element.keyword) and not _NO_IDENTITY.search(element.keyword)
    return bool(known and element.VR in _TEXT and _action(element.tag) != "clean")


def _elements(ds: Dataset) -> Iterator[DataElement]:
    """All elements that the standard knows, at every level, except pixels and what the profile removes unread."""
    for tag in list(ds.keys()):
        if tag in _PIXELS or not (dictionary_has_tag(tag) or repeater_has_tag(int(tag))):
            continue
        try:
            element = ds[tag]
        except Exception:  # to be removed; of what stays see _drop_unreadable
            continue
        if element.VR == "SQ":
            for item in element.value or ():
                yield from _elements(item)
        else:
            yield element


def _remove_residue(ds: Dataset, found: _Secrets) -> set[str]:
    """Replace what repeats a secret in attributes that the profile keeps; keywords of what it was."""
    pattern = "|".join(rf"(?<![^\W_]){re.escape(value)}(?![^\W_])" for value in sorted(found.values))
    values = re.compile(pattern or "(?!)")
    hit: set[str] = set()
    for element in _elements(ds):
        if element.VR not in (*_TEXT, *_BYTES) or not element.value:
            continue
        text = "\\".join(_values(element))
        words = _words(text, _SHORTEST_CODE if element.VR == "CS" else _SHORTEST_WORD)
        uids = found.uids.intersection(re.findall(r"\d[\d.]+\d", text))
        if uids or values.search(text.casefold()) or (element.VR in _TEXT and words & found.words):
            element.value = _DUMMY.get(element.VR, b"")
            hit.add(element.keyword)
    return hit


def _words(text: str, least: int) -> set[str]:
    return {word for word in re.findall(r"[^\W_]+", text.casefold()) if len(word) >= least}


def _shared(element: DataElement) -> bool:
    """True for UIDs that are the same for everybody."""
    known = "SOPClassUID" in element.keyword or element.keyword in _SHARED_UIDS
    return known and all(re.fullmatch(r"[\d.]+", value) for value in _values(element))


def _values(element: DataElement) -> list[str]:
    """The values of an element as text, without those that are empty."""
    value = element.value
    if isinstance(value, bytes):
        return [value.decode("latin-1")]
    several = value if isinstance(value, list | MultiValue) else [value]
    return [text for one in several if (text := str(one or "").strip())]
