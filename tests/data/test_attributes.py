"""Attributes are what pydicom makes of them, whoever read the file and whichever came before."""

import io
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.datadict import keyword_for_tag
from pydicom.uid import ImplicitVRLittleEndian

from medvit.data import attributes
from medvit.data.attributes import read_attributes
from medvit.data.headers import _ALL_TAGS, _PIXEL_TAGS, looks_like_dicom

CT = get_testdata_file("CT_small.dcm", download=False)


def read(data):
    return read_attributes(io.BytesIO(data), _ALL_TAGS, _PIXEL_TAGS)


def encoded(ds, **options):
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True, **options)
    return buffer.getvalue()


def outcome(get, key):
    try:
        return repr(get(key))
    except Exception as error:
        return type(error)


@pytest.mark.filterwarnings("ignore")
def test_values_are_those_of_pydicom():
    compared = 0
    for _ in range(2):  # the second time from memory
        for path in sorted(Path(CT).parent.rglob("*.dcm")):
            data = path.read_bytes()
            if not looks_like_dicom(data[:132]):
                continue
            try:
                ds = pydicom.dcmread(io.BytesIO(data), force=True)
                found = read(data)
            except Exception:  # broken on purpose
                continue
            for tag in _ALL_TAGS:
                key = keyword_for_tag(tag) or tag
                assert (key in found) == (key in ds), (path.name, key)
                assert outcome(found.get, key) == outcome(ds.get, key), (path.name, key)
                compared += key in ds
            assert found.syntax == ds.file_meta.get("TransferSyntaxUID")
            assert found.media_class == str(ds.file_meta.get("MediaStorageSOPClassUID") or "")
            assert found.dataset.original_encoding == ds.original_encoding
    assert compared > 3000


def test_equal_bytes_are_converted_once(monkeypatch):
    attributes._converted.cache_clear()
    converted = []
    original = attributes.convert_raw_data_element

    def counting(raw, **options):
        converted.append(raw.tag)
        return original(raw, **options)

    monkeypatch.setattr(attributes, "convert_raw_data_element", counting)
    data = Path(CT).read_bytes()
    for _ in range(3):
        assert read(data).get("ImageOrientationPatient") == [1, 0, 0, 0, 1, 0]
    assert converted.count(0x00200037) == 1


def test_equal_bytes_in_other_characters_are_other_text():
    ds = pydicom.dcmread(CT)
    values = []
    for characters in (b"ISO_IR 100", b"ISO_IR 101"):
        ds.SpecificCharacterSet, ds.SeriesDescription = "ISO_IR 100", "a\xf8b "
        values.append(read(encoded(ds).replace(b"ISO_IR 100", characters)).get("SeriesDescription"))
    assert values == ["aøb", "ařb"]


def test_a_private_value_of_unknown_type_stays_bytes():
    ds = pydicom.dcmread(CT)
    ds.private_block(0x0043, "GEMS_PARM_01").add_new(0x39, "IS", ["1000", "0"])
    assert read(encoded(ds)).get(0x00431039).value == [1000, 0]
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    found = read(encoded(ds, implicit_vr=True, little_endian=True))
    assert found.syntax == ImplicitVRLittleEndian and found.dataset.original_encoding == (True, True)
    assert found.get(0x00431039).value == b"1000\\0"


def test_what_is_missing_or_no_keyword():
    found = read(Path(CT).read_bytes())
    assert found.get("EchoTime") is None and "EchoTime" not in found and found.get(0x00431039) is None
    with pytest.raises(KeyError, match="NoSuchKeyword"):
        found.get("NoSuchKeyword")
