import warnings
from io import BytesIO

import numpy as np
import pydicom
import pytest
from pixels_synthetic import compressed, dataset, encoded, grey, save
from pydicom.dataset import Dataset
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from medvit.data import gdcm_process
from medvit.data.pixels import decode
from medvit.errors import MedvitError, UnreadableFile


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image.dcm"


# --- how samples are stored


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"])
def test_every_integer(path, syntax, dtype):
    frames = grey((2, 3, 3), dtype, 8 * np.dtype(dtype).itemsize - 1)
    stored = decode(save(path, dataset(frames), syntax)).stored
    assert stored.dtype == np.dtype(dtype) and not decode(path).frame(1).flags.writeable
    np.testing.assert_array_equal(stored, frames)


@pytest.mark.parametrize("dtype", ["u1", "i2", "u4"])
@pytest.mark.parametrize("vr", ["OB", "OW"])
def test_big_endian(path, dtype, vr):
    frames = grey((3, 3, 3), dtype, 8)  # of odd length
    ds = dataset(frames)
    data = frames.astype(np.dtype(dtype).newbyteorder(">")).tobytes()
    data += b"\0" * (len(data) % 2)
    if dtype == "u1" and vr == "OW":  # words, swapped
        data = np.frombuffer(data, "<u2").byteswap().tobytes()
    elif vr == "OB" and dtype != "u1":
        pytest.skip("more than 8 bits are words")
    ds.add_new(0x7FE00010, vr, data)
    np.testing.assert_array_equal(decode(save(path, ds, ExplicitVRBigEndian)).stored, frames)


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "f4"), ("DoubleFloatPixelData", "f8")])
def test_floats(path, keyword, dtype):
    frames = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(dtype)
    ds = dataset(frames.view(dtype.replace("f", "u")), PixelData=None, BitsStored=None, PixelRepresentation=None)
    setattr(ds, keyword, frames.tobytes())
    ds.RescaleSlope, ds.RescaleIntercept = 2, 1
    pixels = decode(save(path, ds))
    assert pixels.stored.dtype == np.dtype(dtype) and keyword not in pixels.ds
    np.testing.assert_array_equal(pixels.stored, frames)
    np.testing.assert_array_equal(pixels.rescaled(1), frames[1].astype(np.float64) * 2 + 1)


def test_bits_that_cross_bytes(path):
    frames = grey((3, 3, 5), np.uint8, 1)  # 15 bits each
    ds = dataset(frames, BitsAllocated=1, BitsStored=1, HighBit=0)
    packed = np.packbits(frames.ravel(), bitorder="little").tobytes()
    ds.PixelData = packed + b"\0" * (len(packed) % 2)
    np.testing.assert_array_equal(decode(save(path, ds)).stored, frames)


@pytest.mark.parametrize("dtype", ["u2", "i2"])
@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEGLSLossless, JPEG2000Lossless, JPEGLosslessSV1]
)
def test_rubbish_above_the_stored_bits_is_masked(path, tmp_path, dtype, syntax):
    """As overlays in pixels are: they are never burnt in."""
    frames = grey((1, 34, 37), dtype)
    rubbish = np.random.default_rng(1).integers(0, 16, frames.shape, dtype=np.uint16) << 12
    cells = (frames.view("u2") & 0x0FFF | rubbish).view(dtype)
    ds = dataset(cells) if syntax == ExplicitVRLittleEndian else encoded(tmp_path, cells, syntax, 16)[0]
    ds.BitsStored, ds.HighBit = 12, 11
    stored = decode(save(path, ds, syntax)).stored
    assert stored.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(stored, frames)


@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("photometric", ["RGB", "YBR_FULL"])
def test_planes_and_colours(path, planar, photometric):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    ds = dataset(frames, PlanarConfiguration=planar, PhotometricInterpretation=photometric)
    order = frames.transpose(0, 3, 1, 2) if planar else frames
    ds.PixelData = np.ascontiguousarray(order).tobytes()
    stored = decode(save(path, ds)).stored
    assert stored.dtype == np.uint8
    if photometric == "YBR_FULL":  # PS3.3 C.7.6.3.1.2
        y, b, r = np.moveaxis(frames.astype(float), -1, 0) - np.array([0, 128, 128])[:, None, None, None]
        rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], axis=-1)
        np.testing.assert_allclose(stored, np.clip(rgb, 0, 255), atol=1.01)
    else:
        np.testing.assert_array_equal(stored, frames)


def test_missing_number_of_frames_is_one(path):
    frames = grey((1, 4, 6))
    np.testing.assert_array_equal(decode(save(path, dataset(frames, 12, NumberOfFrames=None))).stored, frames)
    np.testing.assert_array_equal(decode(save(path, dataset(frames, 12, NumberOfFrames=""))).stored, frames)


def test_samples_per_pixel_follow_from_the_photometric_interpretation(path):
    assert decode(save(path, dataset(grey(), 12, SamplesPerPixel=None))).shape == (3, 5, 7)


@pytest.mark.parametrize("implicit", [True, False])
def test_without_meta_header(path, implicit):
    frames = grey()
    ds = dataset(frames, 12)
    buffer = BytesIO()
    pydicom.dcmwrite(buffer, Dataset(ds), implicit_vr=implicit, little_endian=True)
    path.write_bytes(buffer.getvalue())
    assert buffer.getvalue()[128:132] != b"DICM"
    np.testing.assert_array_equal(decode(path).stored, frames)


# --- measurements


def group(**values):
    item, transform = Dataset(), Dataset()
    for keyword, value in values.items():
        setattr(transform, keyword, value)
    item.PixelValueTransformationSequence = [transform] if values else []
    return item


def test_each_frame_has_its_own_rescaling(path):
    frames = grey()
    ds = dataset(frames, 12, RescaleSlope=9, RescaleIntercept=9)
    pixels = decode(save(path, ds))
    assert pixels.rescaled(2).dtype == np.float64
    np.testing.assert_array_equal(pixels.rescaled(2), frames[2] * 9.0 + 9)
    ds.SharedFunctionalGroupsSequence = [group(RescaleSlope="0.25", RescaleIntercept=-5)]
    np.testing.assert_array_equal(decode(save(path, ds)).rescaled(2), frames[2] * 0.25 - 5)
    ds.PerFrameFunctionalGroupsSequence = [group(RescaleSlope=n + 1, RescaleIntercept=-n) for n in range(3)]
    for n in range(3):
        np.testing.assert_array_equal(decode(save(path, ds)).rescaled(n), frames[n] * (n + 1.0) - n)
    ds.PerFrameFunctionalGroupsSequence = [group(), group(RescaleSlope=3, RescaleIntercept=0), Dataset()]
    pixels = decode(save(path, ds))
    for n, slope, intercept in ((0, 0.25, -5), (1, 3, 0), (2, 0.25, -5)):
        np.testing.assert_array_equal(pixels.rescaled(n), frames[n] * slope + intercept)


@pytest.mark.parametrize(
    ("tags", "slope", "intercept"),
    [
        ({}, 1, 0),
        ({"RescaleSlope": 0.5}, 0.5, 0),
        ({"RescaleIntercept": -1024}, 1, -1024),
        ({"RescaleSlope": ""}, 1, 0),
    ],
)
def test_what_is_missing_does_nothing(path, tags, slope, intercept):
    frames = grey((1, 4, 6), "i2", 16)
    rescaled = decode(save(path, dataset(frames, **tags))).rescaled(0)
    np.testing.assert_array_equal(rescaled, frames[0] * float(slope) + intercept)


def modality_lut(table, first, bits=16):
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table) % (1 << 16), first % (1 << 16), bits])
    item.ModalityLUTType = "HU"
    item.add_new("LUTData", "OW", np.asarray(table, "<u2").tobytes())
    return [item]


def test_a_modality_look_up_table(path):
    table = np.arange(600)[::-1] * 100
    frames = np.array([[[-400, -300, -299, 0, 299, 2000]]], np.int16)
    ds = dataset(frames, ModalityLUTSequence=modality_lut(table, -300, 12))  # pydicom refuses tables of 12 bits
    expected = table[[0, 0, 1, 300, 599, 599]]
    np.testing.assert_array_equal(decode(save(path, ds)).rescaled(0)[0], expected)
    ds.RescaleSlope, ds.RescaleIntercept = 2, 0  # forbidden together with it; numbers are safer than a table
    np.testing.assert_array_equal(decode(save(path, ds)).rescaled(0), frames[0] * 2.0)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"RescaleSlope": [1, 2]}, "RescaleSlope needs one number, got 2"),
        ({"RescaleIntercept": "1e400"}, "RescaleIntercept is inf"),
        ({"ModalityLUTSequence": [Dataset()]}, "AttributeError"),
        ({"ModalityLUTSequence": modality_lut(range(9), 0)}, "promises 300 entries, but has 18"),
        ({"PerFrameFunctionalGroupsSequence": [group(RescaleSlope=1)]}, "it describes 1 frames of 3"),
    ],
)
def test_rescaling_that_makes_no_sense(path, tags, message):
    ds = dataset(grey(), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for keyword, value in tags.items():
            setattr(ds, keyword, value)
        if "300" in message:
            ds.ModalityLUTSequence[0].LUTDescriptor = [300, 0, 16]
        save(path, ds)
    pixels = decode(path)
    assert pixels.frame(2).shape == (5, 7)
    with pytest.raises(
        UnreadableFile, match=f"what turns its pixels into measurements is damaged \\(.*{message}"
    ) as caught:
        pixels.rescaled(2)
    assert caught.value.path == path


def test_colours_are_not_rescaled(path):
    frames = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3), dtype=np.uint8)
    pixels = decode(save(path, dataset(frames, RescaleSlope=2, RescaleIntercept=1)))
    assert pixels.rescaled(1).dtype == np.uint8
    np.testing.assert_array_equal(pixels.rescaled(1), frames[1])


@pytest.mark.parametrize(
    ("dtype", "bits", "vr", "value", "padding"),
    [
        ("i2", 16, "SS", -2000, -2000),
        ("i2", 16, "US", 63536, -2000),  # read with the other sign
        ("u2", 16, "SS", -2000, 63536),
        ("u2", 16, "US", 63536, 63536),
        ("u2", 12, "US", 0xF830, 0x0830),  # as the pixels themselves, whose upper bits are masked
        ("i2", 12, "US", 0x0830, -2000),
    ],
)
def test_padding_is_as_pixels_are(path, dtype, bits, vr, value, padding):
    ds = dataset(grey((1, 4, 6), dtype, bits), bits)
    cells = np.full((1, 4, 6), value & 0xFFFF, np.uint16)
    ds.PixelData = cells.tobytes()
    ds.add_new("PixelPaddingValue", vr, value)
    pixels = decode(save(path, ds))
    assert pixels.padding == padding and (pixels.frame(0) == padding).all()


def test_no_padding(path):
    assert decode(save(path, dataset(grey()))).padding is None
    assert decode(save(path, dataset(grey(), PixelPaddingValue=None or ""))).padding is None


# --- what is refused


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        *(({keyword: None}, f"its pixels cannot be understood: {keyword} is missing; export it again") for keyword in (
            "Rows", "Columns", "BitsAllocated", "BitsStored", "PixelRepresentation",
        )),
        ({"PhotometricInterpretation": None}, "PhotometricInterpretation is missing, or not one of grey values"),
        ({"PhotometricInterpretation": "CMYK"}, "PhotometricInterpretation is missing, or not one of grey values"),
        ({"PhotometricInterpretation": "RGB"}, "SamplesPerPixel is 1 for RGB"),
        ({"SamplesPerPixel": 3}, "PlanarConfiguration is missing"),
        ({"Rows": 0}, "an image needs Rows and Columns of at least 1, got 0 x 7"),
        ({"BitsAllocated": 24}, "BitsAllocated is 24, which PixelData cannot have"),
        ({"BitsStored": 17}, "BitsAllocated 16, BitsStored 17, HighBit 11, PixelRepresentation 0, .* contradict"),
        ({"BitsStored": 0}, "contradict each other"),
        ({"HighBit": 10}, "contradict each other"),
        ({"HighBit": 15}, "contradict each other"),
        ({"BitsStored": 11}, "contradict each other"),
        ({"PixelRepresentation": 2}, "contradict each other"),
        ({"NumberOfFrames": -3}, "NumberOfFrames is no number from 0"),
        ({"Rows": [5, 6]}, "Rows is no number from 0"),
        ({"NumberOfFrames": 4}, "the file is cut short: 210 of 280 bytes of pixels are there; get it again"),
        ({"Rows": 6}, "the file is cut short: 210 of 252 bytes of pixels are there"),
        ({"Rows": 65535, "Columns": 65535, "NumberOfFrames": 1000}, "210 of 8589672450000 bytes of pixels are there"),
        ({"NumberOfFrames": 2}, r"its header needs 140 bytes of pixels \(2 x 5 x 7\), but 210 are there; exp"),
        ({"NumberOfFrames": None}, r"its header needs 70 bytes of pixels \(1 x 5 x 7\), but 210 are there"),
        ({"Columns": 6}, r"its header needs 180 bytes of pixels \(3 x 5 x 6\), but 210 are there"),
        ({"PixelData": None}, "one element of pixels is needed, but this MR Image Storage has 0"),
        ({"FloatPixelData": b"1234"}, "one element of pixels is needed, but this MR Image Storage has 2"),
    ],
)  # fmt: skip
def test_attributes_that_are_missing_or_contradict(path, tags, message):
    with pytest.raises(UnreadableFile, match=message):
        decode(save(path, dataset(grey(), 12, **tags)))


def test_padding_behind_the_pixels_is_no_image(path):
    frames = grey()
    ds = dataset(frames)
    for more in (1, 2, 7):  # up to a row
        ds.PixelData = frames.tobytes() + bytes(2 * more)
        np.testing.assert_array_equal(decode(save(path, ds)).stored, frames)
    for more in (bytes(16), bytes(70), b"\0\1"):
        ds.PixelData = frames.tobytes() + more
        with pytest.raises(UnreadableFile, match=r"but 2.. are there; export it again"):
            decode(save(path, ds))


def test_a_header_that_promises_too_much_of_a_compressed_file(path, tmp_path):
    ds, _ = encoded(tmp_path, grey((1, 34, 37)), JPEG2000Lossless, 12)
    ds.Rows = ds.Columns = 65535
    with pytest.raises(UnreadableFile, match=r"promises 8589672450 bytes of pixels in \d+; it is corrupt"):
        decode(save(path, ds, JPEG2000Lossless))


@pytest.mark.parametrize(
    ("syntax", "message"),
    [
        ("1.2.840.113619.5.2", "its pixels have a private transfer syntax 1.2.840.113619.5.2; export it uncompressed"),
        ("Doe^Jane", "its pixels have a transfer syntax of no valid UID; export it uncompressed"),
        ("1.2.840.10008.1.2.4.100", r"stored as MPEG2 Main Profile .* \(1.2.840.10008.1.2.4.100\), which is not supp"),
        ("1.2.840.10008.1.2.8.1", r"\(1.2.840.10008.1.2.8.1\), which is not supported; export it uncompressed"),
        ("1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2 .* which is not supported"),
        ("1.2.840.10008.1.2.1", "compressed, but its transfer syntax is missing or not of compressed pixels"),
    ],
)
def test_a_transfer_syntax_that_is_not_decoded(path, syntax, message):
    ds = compressed(dataset(grey((1, 34, 37))), JPEG2000Lossless, [b"\xff\x4f\xff\x51" + bytes(200)])
    save(path, ds, JPEG2000Lossless)
    data, old = path.read_bytes(), b"1.2.840.10008.1.2.4.90"
    assert data.count(old) == 1 and len(old) == 22
    at = data.index(old)
    uid = syntax.encode()
    uid += b"\0" * (len(uid) % 2)
    data = data[: at - 2] + len(uid).to_bytes(2, "little") + uid + data[at + 22 :]
    group_length = 128 + 4 + 8
    length = int.from_bytes(data[group_length : group_length + 4], "little") + len(uid) - 22
    path.write_bytes(data[:group_length] + length.to_bytes(4, "little") + data[group_length + 4 :])
    with pytest.raises(UnreadableFile, match=message) as caught:
        decode(path)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize(
    ("syntax", "package"),
    [
        (JPEGLosslessSV1, "python-gdcm"),
        (JPEGLSLossless, "pyjpegls"),
        (JPEG2000Lossless, "pylibjpeg and pylibjpeg-openjpeg"),
        (UID("1.2.840.10008.1.2.4.201"), "pylibjpeg and pylibjpeg-openjpeg"),
    ],
)
def test_a_missing_package_is_named(path, monkeypatch, syntax, package):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(gdcm_process, "find_spec", lambda name: None)
    monkeypatch.setattr(Decoder, "available_plugins", ())
    save(path, compressed(dataset(grey((1, 34, 37))), syntax, [b"x" * 100]), syntax)
    message = (
        f"compressed as {syntax.name}, which nothing installed decodes; install {package}, or export it uncompressed"
    )
    with pytest.raises(UnreadableFile) as caught:
        decode(path)
    assert message in str(caught.value)


def test_files_that_are_no_dicom(tmp_path):
    for content in (b"", b"a note", bytes(500)):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UnreadableFile, match="x: not a DICOM file"):
            decode(tmp_path / "x")
    with pytest.raises(UnreadableFile, match="cannot be opened: No such file or directory"):
        decode(tmp_path / "none")
    with pytest.raises(UnreadableFile, match="cannot be opened: Is a directory"):
        decode(tmp_path)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLosslessSV1])
def test_mutations_are_read_or_refused(path, tmp_path, syntax):
    """Nothing else is ever raised, and nothing of the patient is said."""
    ds = dataset(grey((2, 34, 37)), 12, RescaleSlope=2, PixelPaddingValue=5)
    if syntax != ExplicitVRLittleEndian:
        ds, _ = encoded(tmp_path, grey((2, 34, 37)), syntax, 12)
    whole = save(path, ds, syntax).read_bytes()
    random = np.random.default_rng(0)
    outcomes = {"read": 0, "refused": 0}
    for _ in range(250):
        data = bytearray(whole)
        for at in random.integers(132, len(data), random.integers(1, 8)):
            data[at] = random.integers(256)
        path.write_bytes(data[: random.integers(200, len(data))] if random.random() < 0.2 else data)
        try:
            pixels = decode(path)
            for number in range(pixels.shape[0]):
                assert pixels.rescaled(number).shape == pixels.shape[1:]
            outcomes["read"] += 1
        except MedvitError as error:
            outcomes["refused"] += 1
            assert "Doe" not in str(error) and "SECRET" not in str(error)
    assert min(outcomes.values()) > 25, outcomes
