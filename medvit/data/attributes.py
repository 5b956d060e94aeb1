"""Attributes of a DICOM file, where many files of few series are read one after the other."""

from __future__ import annotations

from collections.abc import Set
from functools import cache, lru_cache
from typing import Any, BinaryIO

from pydicom.charset import convert_encodings, default_encoding
from pydicom.datadict import dictionary_VR, tag_for_keyword
from pydicom.dataelem import DataElement, RawDataElement, convert_raw_data_element
from pydicom.dataset import Dataset
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import UID

from medvit.data.elements import MEDIA_CLASS, SYNTAX, Elements, scan

_LONGEST = 256  # bytes of a value that is remembered
_CHARACTERS = 0x00080005
_Raw = tuple[int, str | None, int, bytes | None, bool, bool, tuple[str, ...]]


def read_attributes(file: BinaryIO, wanted: Set[int], until: Set[int]) -> Attributes:
    """Read the ``wanted`` tags of a file, up to the first tag of ``until``, before which it then stands.

    Raises:
        Exception: what pydicom raises on a file that is no DICOM or corrupt; one without a preamble is read.
    """
    if found := scan(file, wanted | {_CHARACTERS}, until):
        return _attributes(*found)
    file.seek(0)
    ds = read_partial(file, lambda tag, vr, length: tag in until, force=True, specific_tags=list(wanted))
    media_class = getattr(ds.file_meta, "MediaStorageSOPClassUID", "")
    return Attributes(ds, getattr(ds.file_meta, "TransferSyntaxUID", None), str(media_class))


class Attributes:
    """Looks attributes up as :class:`pydicom.Dataset` does, to the same values, but many times as fast.

    Most values of a file are, byte for byte, those of the file before it; what pydicom made of the bytes is remembered.
    Values are shared, and must not be changed.

    Attributes:
        dataset: the data set.
        syntax: its transfer syntax, None if the file does not say.
        media_class: the MediaStorageSOPClassUID of the file, ``""`` if it does not say.
    """

    def __init__(self, dataset: Dataset, syntax: UID | None = None, media_class: str = ""):
        self.dataset, self.syntax, self.media_class = dataset, syntax, media_class
        self._elements = {int(tag): element for tag, element in dataset.items()}
        encodings = dataset.original_character_set
        self._encodings = (encodings,) if isinstance(encodings, str) else tuple(encodings)

    def __contains__(self, key: str | int) -> bool:
        return (_known(key)[0] if isinstance(key, str) else key) in self._elements

    def get(self, key: str | int) -> Any:
        """The value of a keyword, the element of a tag; None where it is missing. Raises what pydicom raises."""
        tag, plain = _known(key) if isinstance(key, str) else (key, False)
        element = self._elements.get(tag)
        if element is None:
            return None
        if plain and isinstance(element, RawDataElement) and element.VR not in ("SQ", "UN"):
            value, length = element.value, element.length
            if length <= _LONGEST and length == len(value or b""):
                order = element.is_implicit_VR, element.is_little_endian
                return _converted((tag, element.VR, length, value, *order, self._encodings))
        return self.dataset.get(key)

    def is_cut(self, keyword: str) -> bool:
        """True where the file ends before this value does."""
        element = self._elements.get(_known(keyword)[0])
        return isinstance(element, RawDataElement) and element.length > len(element.value or b"")


def _attributes(meta: Elements, elements: Elements, implicit: bool) -> Attributes:
    ds = Dataset({element.tag: element for element in elements.values()})
    characters = _value(elements, _CHARACTERS) if _CHARACTERS in elements else default_encoding
    ds.set_original_encoding(implicit, True, convert_encodings(characters))
    return Attributes(ds, _value(meta, SYNTAX), str(_value(meta, MEDIA_CLASS) or ""))


def _value(elements: Elements, tag: int) -> Any:
    if tag not in elements:
        return None
    element = elements[tag]
    known = element.VR, element.length, element.value, element.is_implicit_VR, True
    return _converted((tag, *known, (default_encoding,)))


@cache
def _known(keyword: str) -> tuple[int, bool]:
    """Tag of a keyword, and whether its values depend on no other element and hold none."""
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    vr = dictionary_VR(tag)
    return tag, len(vr) == 2 and vr not in ("SQ", "UN")


@lru_cache(maxsize=4096)
def _converted(raw: _Raw) -> Any:
    tag, vr, length, value, implicit, little, encodings = raw
    element = RawDataElement(BaseTag(tag), vr, length, value, 0, implicit, little)
    converted: DataElement = convert_raw_data_element(element, encoding=list(encodings))
    return converted.value
