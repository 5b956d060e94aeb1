"""The quick reader finds what pydicom finds, or leaves the file to it."""

import io
import random
from pathlib import Path

import pydicom
import pytest
from pydicom.data import get_testdata_file
from pydicom.filereader import read_partial

from medvit.data.attributes import _value
from medvit.data.elements import MEDIA_CLASS, SYNTAX, scan
from medvit.data.headers import _ALL_TAGS, _PIXEL_TAGS, looks_like_dicom

BUNDLED = Path(get_testdata_file("MR_small.dcm", download=False)).parent
USUAL = ["CT_small.dcm", "MR_small.dcm", "693_J2KI.dcm", "MR_small_implicit.dcm", "JPEG-lossy.dcm", "rtdose.dcm"]


def both(data):
    """(elements, where the file then stands) of the quick reader, None if it leaves them; and of pydicom."""
    file = io.BytesIO(data)
    found = scan(file, _ALL_TAGS, _PIXEL_TAGS)
    quick = found and (*found, file.tell())
    file = io.BytesIO(data)
    ds = read_partial(file, lambda tag, vr, length: tag in _PIXEL_TAGS, force=True, specific_tags=list(_ALL_TAGS))
    return quick, (ds, file.tell())


def require_same(quick, slow):
    meta, elements, implicit, end = quick
    ds, place = slow
    assert end == place and ds.original_encoding == (implicit, True)
    assert _value(meta, SYNTAX) == ds.file_meta.get("TransferSyntaxUID")
    assert _value(meta, MEDIA_CLASS) == ds.file_meta.get("MediaStorageSOPClassUID")
    raw = {int(tag): element for tag, element in ds.items() if tag != 0x00080005}
    assert elements.keys() == raw.keys()
    for tag, element in elements.items():
        assert (element.VR, element.length, element.value or b"", element.is_implicit_VR, element.is_little_endian) == (
            *(raw[tag].VR, raw[tag].length, raw[tag].value or b"", implicit, True),
        )


def test_it_agrees_with_pydicom_on_its_own_files():
    left = []
    for path in sorted(BUNDLED.rglob("*.dcm")):
        data = path.read_bytes()
        if looks_like_dicom(data[:132]):
            try:
                quick, slow = both(data)
            except Exception:  # pydicom cannot read it
                assert scan(io.BytesIO(data), _ALL_TAGS, _PIXEL_TAGS) is None
                continue
            if quick is None:
                left.append(path.name)
            else:
                require_same(quick, slow)
    assert {"MR_small_bigendian.dcm", "image_dfl.dcm", "UN_sequence.dcm"} <= set(left)
    assert not set(USUAL) & set(left) and len(left) < 20


@pytest.mark.filterwarnings("ignore")
def test_it_agrees_with_pydicom_on_damaged_files():
    random.seed(0)
    taken = 0
    for name in USUAL:
        whole = (BUNDLED / name).read_bytes()
        for _ in range(150):
            data = bytearray(whole[:4000])
            for _ in range(random.randint(1, 3)):
                data[random.randrange(132, len(data))] = random.randrange(256)
            data = bytes(data[: random.choice([len(data), random.randrange(140, len(data))])])
            try:
                quick, slow = both(data)
            except Exception:  # whatever pydicom stumbles over
                continue
            if quick is not None:
                taken += 1
                require_same(quick, slow)
    assert taken > 300


def encoded(change):
    ds = pydicom.dcmread(BUNDLED / "CT_small.dcm")
    change(ds)
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def nested():
    inner, outer = pydicom.Dataset(), pydicom.Dataset()
    inner.CodeValue, inner.is_undefined_length_sequence_item = "1", True
    outer.PurposeOfReferenceCodeSequence = [inner, pydicom.Dataset(), inner]
    outer["PurposeOfReferenceCodeSequence"].is_undefined_length = True
    outer.is_undefined_length_sequence_item = True
    return outer


def test_sequences_of_undefined_length_are_skipped():
    def change(ds):
        ds.ReferencedImageSequence = [nested(), pydicom.Dataset(), nested()]
        ds["ReferencedImageSequence"].is_undefined_length = True

    data = encoded(change)
    assert data.count(b"\xfe\xff\x0d\xe0") == 6 and data.count(b"\xfe\xff\xdd\xe0") == 3
    quick, slow = both(data)
    require_same(quick, slow)
    assert 0x00081140 not in quick[1] and 0x00280010 in quick[1]


@pytest.mark.parametrize("end", [b"\xfe\xff\x0d\xe0", b"\xfe\xff\xdd\xe0"])
def test_sequences_without_an_end_are_left_to_pydicom(end):
    def change(ds):
        ds.ReferencedImageSequence = [nested()]
        ds["ReferencedImageSequence"].is_undefined_length = True

    data = encoded(change)
    last = data.rfind(end)
    assert scan(io.BytesIO(data[:last]), _ALL_TAGS, _PIXEL_TAGS) is None
    assert scan(io.BytesIO(data[:last] + b"\x08\x00\x18\x00" + data[last + 4 :]), _ALL_TAGS, _PIXEL_TAGS) is None


def test_a_wanted_sequence_of_undefined_length_is_left_to_pydicom():
    def change(ds):
        ds.SequenceOfUltrasoundRegions = [pydicom.Dataset()]
        ds["SequenceOfUltrasoundRegions"].is_undefined_length = True

    assert scan(io.BytesIO(encoded(change)), _ALL_TAGS, _PIXEL_TAGS) is None


def test_other_elements_of_undefined_length_are_left_to_pydicom():
    data = encoded(lambda ds: ds.add_new(0x00091010, "OB", b"1234"))
    place = data.index(b"\x09\x00\x10\x10OB")
    undefined = data[: place + 8] + b"\xff" * 4 + data[place + 12 :]
    assert scan(io.BytesIO(data), _ALL_TAGS, _PIXEL_TAGS) is not None
    assert scan(io.BytesIO(undefined), _ALL_TAGS, _PIXEL_TAGS) is None


@pytest.mark.parametrize("cut", [3, 9])
def test_a_file_cut_in_the_middle_of_an_element_is_left_to_pydicom(cut):
    data = encoded(lambda ds: None)
    place = data.index(b"\x10\x00\x10\x00PN")
    assert scan(io.BytesIO(data[:place]), _ALL_TAGS, _PIXEL_TAGS) is not None
    assert scan(io.BytesIO(data[: place + cut]), _ALL_TAGS, _PIXEL_TAGS) is None


def test_tags_behind_the_pixels_before_them_are_left_to_pydicom():
    data = encoded(lambda ds: None)
    place = data.index(b"\xe0\x7f\x10\x00OW")
    assert scan(io.BytesIO(data[:place] + b"\xfc\xff\xfc\xffOB" + bytes(6)), _ALL_TAGS, _PIXEL_TAGS) is None
