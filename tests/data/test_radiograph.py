import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from data_synthetic import make_affine, phantom, slice_dataset, write_dicom_series
from PIL import Image
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian

from medvit.data import RadiographReader, read_radiograph
from medvit.errors import MedvitError, UnreadableFile, UnreadableSeries, UnsuitableImage

# MONAI warns about optional packages of its own when LoadImage is built
pytestmark = pytest.mark.filterwarnings("ignore:NvImgCodecPydicomReader:UserWarning")
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"
DX = "1.2.840.10008.5.1.4.1.1.1.1"
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"


def stored(shape=(7, 5), bits=12, seed=0):
    """Random stored values ``(x, y)``; no symmetry that could hide a flip."""
    return np.random.default_rng(seed).integers(0, 1 << bits, shape, dtype=np.uint16)


def write(path, pixels=None, **tags):
    """A DX file of ``pixels`` (x, y), 12 bits stored."""
    pixels = stored() if pixels is None else pixels
    ds = slice_dataset(pixels)
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DX
    ds.Modality, ds.PresentationLUTShape = "DX", "IDENTITY"
    ds.StudyInstanceUID, ds.SeriesInstanceUID = "1.2.3", "1.2.3.4"
    if pixels.dtype == np.uint16:
        ds.BitsStored, ds.HighBit = 12, 11
    for keyword, value in tags.items():
        setattr(ds, keyword, value)
    ds.save_as(path, enforce_file_format=True)
    return path


def voi_lut(table, first=0, bits=16, packed=None):
    """A VOI LUT sequence of one item; ``packed`` as bytes of that type instead of a list of numbers."""
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(table) % (1 << 16), first, bits])
    if packed is None:
        item.add_new("LUTData", "US", [int(v) for v in table])
    else:
        item.add_new("LUTData", "OW", np.asarray(table, packed).tobytes())
    return [item]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "chest.dcm"


def values(path, **options):
    array = read_radiograph(path, **options).array
    assert array.dtype == np.float32
    return array


def scaled(pixels):
    return (pixels - pixels.min()) / float(pixels.max() - pixels.min())


# --- contrast


def test_without_window_the_range_is_spread(path):
    radiograph = read_radiograph(write(path))
    np.testing.assert_allclose(radiograph.array, scaled(stored().astype(float)), atol=1e-7)
    assert radiograph.contrast == "range" and radiograph.array.shape == (7, 5)


def test_columns_come_first(path):
    pixels = np.zeros((4, 3), np.uint16)
    pixels[3, 1] = 100  # column 3, row 1
    array = values(write(path, pixels))
    assert array[3, 1] == 1 and array.sum() == 1


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (None, [0, 0, 49 / 99, 51 / 99, 1, 1]),
        ("LINEAR", [0, 0, 49 / 99, 51 / 99, 1, 1]),
        ("LINEAR_EXACT", [0, 0, 0.49, 0.51, 1, 1]),
        ("SIGMOID", [1 / (1 + np.exp(x)) for x in (4, 2, 0.04, -0.04, -2, -4)]),
    ],
)
def test_a_window_of_each_function(path, function, expected):
    pixels = np.array([[900, 950, 999, 1001, 1050, 1100]], np.uint16)
    tags = {} if function is None else {"VOILUTFunction": function}
    write(path, pixels, WindowCenter=1000, WindowWidth=100, **tags)
    if function in (None, "LINEAR"):  # PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5)
        expected = np.clip((pixels[0] - 999.5) / 99 + 0.5, 0, 1)
    np.testing.assert_allclose(values(path)[0], expected, atol=1e-6)
    assert read_radiograph(path).contrast == "window"


def test_a_window_of_width_one_is_a_threshold(path):
    write(path, np.array([[99, 100, 101]], np.uint16), WindowCenter=100, WindowWidth=1)
    assert values(path).tolist() == [[0, 1, 1]]


def test_of_several_windows_the_first_counts_after_rescaling(path):
    pixels = np.array([[0, 500, 1000]], np.uint16)
    tags = {"RescaleSlope": 2, "RescaleIntercept": -1000, "VOILUTFunction": "LINEAR_EXACT"}
    write(path, pixels, WindowCenter=[0, 77], WindowWidth=[4000, 3], **tags)
    np.testing.assert_allclose(values(path), [[0.25, 0.5, 0.75]], atol=1e-6)


def test_a_negative_slope_turns_the_contrast(path):
    pixels = np.array([[0, 500, 1000]], np.uint16)
    tags = {"RescaleSlope": -1, "RescaleIntercept": 1000, "VOILUTFunction": "LINEAR_EXACT"}
    write(path, pixels, WindowCenter=500, WindowWidth=1000, **tags)
    np.testing.assert_allclose(values(path), [[1, 0.5, 0]], atol=1e-6)


def test_a_look_up_table_comes_before_the_window(path):
    table = np.arange(100) ** 2
    pixels = np.array([[0, 40, 50, 139, 200]], np.uint16)
    write(path, pixels, VOILUTSequence=voi_lut(table, first=40, bits=14), WindowCenter=1, WindowWidth=1)
    np.testing.assert_allclose(values(path), [np.array([0, 0, 100, 9801, 9801]) / 9801], atol=1e-6)
    assert read_radiograph(path).contrast == "lut"


def test_without_voi_neither_counts(path):
    write(path, VOILUTSequence=voi_lut([3, 4]), WindowCenter=1, WindowWidth=1)
    radiograph = read_radiograph(path, voi=False)
    np.testing.assert_allclose(radiograph.array, scaled(stored().astype(float)), atol=1e-7)
    assert radiograph.contrast == "range"


@pytest.mark.parametrize("packed", [None, "<u2", "u1"])
def test_a_table_of_8_bit_entries_longer_than_256(path, packed):
    """pydicom's apply_voi_lut takes these indices modulo 256."""
    table = np.minimum(np.arange(4096) // 16, 255)
    write(path, np.array([[0, 1000, 4095]], np.uint16), VOILUTSequence=voi_lut(table, bits=8, packed=packed))
    np.testing.assert_allclose(values(path), [[0, 62 / 255, 1]], atol=1e-6)


def test_a_table_of_65536_entries_in_big_endian(path):
    table = np.arange(65536)[::-1]
    pixels = np.array([[0, 1000, 4095]], np.uint16)
    ds = slice_dataset(pixels)
    ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
    ds.PixelData = pixels.T.astype(">u2").tobytes()
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = DX
    ds.VOILUTSequence = voi_lut(table, packed=">u2")
    dcmwrite(path, ds, implicit_vr=False, little_endian=False)
    np.testing.assert_allclose(values(path), [table[pixels[0]] / 65535], atol=1e-6)


def test_a_modality_look_up_table_comes_first(path):
    item = voi_lut(np.arange(4096)[::-1] // 2)
    item[0].ModalityLUTType = "US"
    pixels = np.array([[0, 2095, 4095]], np.uint16)  # become 2047, 1000, 0
    write(path, pixels, ModalityLUTSequence=item, WindowCenter=1000, WindowWidth=2000, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(values(path), [[1, 0.5, 0]], atol=1e-6)


def test_a_table_that_begins_below_zero(path):
    """Its first value is read as unsigned where the VR is US; rescaled values may be negative all the same."""
    pixels = np.array([[0, 1000, 1500, 4000]], np.uint16)  # become -1000, 0, 500, 3000
    table = voi_lut(np.arange(501), first=0)
    table[0].LUTDescriptor = [501, 65536 - 1000, 16]
    write(path, pixels, VOILUTSequence=table, RescaleSlope=1, RescaleIntercept=-1000)
    np.testing.assert_allclose(values(path), [[0, 1, 1, 1]], atol=1e-6)
    table[0].LUTDescriptor = [501, 65536 - 500, 16]
    write(path, pixels, VOILUTSequence=table, RescaleSlope=1, RescaleIntercept=-1000)
    np.testing.assert_allclose(values(path), [[0, 1, 1, 1]], atol=1e-6)


# --- compressed


def test_a_jpeg_of_12_bits(path):
    """pydicom decodes none; SimpleITK does."""
    import SimpleITK as sitk

    ds = dcmread(BUNDLED / "JPEG-lossy.dcm")
    ds.SOPClassUID, ds.Modality = DX, "DX"
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = 50, 100, "LINEAR_EXACT"
    ds.PhotometricInterpretation = "MONOCHROME1"
    ds.save_as(path)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(BUNDLED / "JPEG-lossy.dcm")))[0]
    np.testing.assert_allclose(values(path).T, 1 - np.clip(expected / 100, 0, 1), atol=1e-6)


# --- inversion


@pytest.mark.parametrize(
    ("photometric", "shape", "inverted"),
    [
        ("MONOCHROME2", "IDENTITY", False),
        ("MONOCHROME1", "INVERSE", True),  # one demands the other: once, not twice
        ("MONOCHROME1", None, True),
        ("MONOCHROME2", "INVERSE", True),
    ],
)
@pytest.mark.parametrize("contrast", ["range", "window", "lut"])
def test_inversion(path, photometric, shape, inverted, contrast):
    tags = {
        "range": {},
        "window": {"WindowCenter": 2000, "WindowWidth": 3000},
        "lut": {"VOILUTSequence": voi_lut(np.arange(4096) // 2, bits=12)},
    }[contrast]
    plain = values(write(path, **tags))
    write(path, **tags, PhotometricInterpretation=photometric, PresentationLUTShape=shape or "")
    np.testing.assert_allclose(values(path), 1 - plain if inverted else plain, atol=1e-7)
    assert read_radiograph(path).contrast == contrast


# --- padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_out_of_the_range(path, photometric):
    pixels = np.array([[0, 0, 1000, 1500, 2000]], np.uint16)
    write(path, pixels, PixelPaddingValue=0, PhotometricInterpretation=photometric)
    image = [0, 0.5, 1] if photometric == "MONOCHROME2" else [1, 0.5, 0]
    np.testing.assert_allclose(values(path), [[0, 0, *image]], atol=1e-7)


def test_a_range_of_padding_in_either_order(path):
    pixels = np.array([[10, 1000, 1500, 2000, 4090, 4095]], np.uint16)
    for ends in ((4090, 4095), (4095, 4090)):
        write(path, pixels, PixelPaddingValue=ends[0], PixelPaddingRangeLimit=ends[1])
        np.testing.assert_allclose(values(path), [[0, 990 / 1990, 1490 / 1990, 1, 0, 0]], atol=1e-6)


def test_padding_is_a_stored_value_not_a_rescaled_one(path):
    pixels = np.array([[-2000, 0, 500, 1000]], np.int16)
    write(path, pixels, PixelPaddingValue=-2000, RescaleSlope=1, RescaleIntercept=-2000)
    np.testing.assert_allclose(values(path), [[0, 0, 0.5, 1]], atol=1e-7)


def test_padding_under_a_window(path):
    pixels = np.array([[4095, 1000, 1500]], np.uint16)
    write(path, pixels, PixelPaddingValue=4095, WindowCenter=1500, WindowWidth=1000, VOILUTFunction="LINEAR_EXACT")
    np.testing.assert_allclose(values(path), [[0, 0, 0.5]], atol=1e-7)


# --- other readers


@pytest.mark.upstream
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize(
    "tags",
    [
        {"WindowCenter": 2100.5, "WindowWidth": 1234},
        {"WindowCenter": 2100.5, "WindowWidth": 1234, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": 2100.5, "WindowWidth": 1234, "VOILUTFunction": "LINEAR_EXACT"},
        {"WindowCenter": 100, "WindowWidth": 300, "RescaleSlope": 0.25, "RescaleIntercept": -200},
        {"VOILUTSequence": voi_lut(np.arange(3000) * 65535 // 2999, first=500)},
    ],
    ids=lambda tags: "-".join(tags),
)
def test_pydicom_and_highdicom_show_the_same(path, photometric, tags):
    import highdicom
    from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

    inverse = photometric == "MONOCHROME1"
    shape = "INVERSE" if inverse else "IDENTITY"
    write(path, stored((31, 17)), PhotometricInterpretation=photometric, PresentationLUTShape=shape, **tags)
    ds, ours = pydicom.dcmread(path), values(path)
    rescaled = apply_modality_lut(ds.pixel_array, ds)
    # pydicom leaves the range to the reader: that of the table's entries, or of the stored values, rescaled
    low, high = (v * tags.get("RescaleSlope", 1) + tags.get("RescaleIntercept", 0) for v in (0, 4095))
    low, high = (low, high) if "WindowWidth" in tags else (0, 65535)
    shown = (apply_voi_lut(rescaled, ds) - low) / (high - low)
    np.testing.assert_allclose(ours.T, 1 - shown if inverse else shown, atol=1e-5)
    if "RescaleSlope" not in tags:  # highdicom brings the window to stored values, without the half value of LINEAR
        image = highdicom.Image.from_dataset(ds)
        theirs = image.get_frame(1, apply_voi_transform=True, apply_presentation_lut=True, dtype=np.float64)
        np.testing.assert_allclose(ours.T, theirs, atol=1e-5)


# --- PNG, JPEG, TIFF


@pytest.mark.parametrize(("mode", "white"), [("L", 255), ("RGB", 255), ("RGBA", 255), ("LA", 255), ("I;16", 65535)])
@pytest.mark.parametrize("kind", ["png", "tif"])
def test_grey_pictures(tmp_path, mode, white, kind):
    pixels = np.random.default_rng(0).integers(0, white + 1, (5, 7)).astype(np.uint16 if mode == "I;16" else np.uint8)
    picture = Image.fromarray(pixels)
    picture = picture if mode == "I;16" else picture.convert(mode)
    picture.save(tmp_path / f"x.{kind}")
    radiograph = read_radiograph(tmp_path / f"x.{kind}")
    np.testing.assert_array_equal(radiograph.array, pixels.T.astype(np.float32) / np.float32(white))
    assert (radiograph.contrast, radiograph.source.kind, radiograph.source.name) == ("full", "raster", "x")


def test_a_picture_is_turned_upright(tmp_path):
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    exif = Image.Exif()
    exif[274] = 6  # a quarter turn clockwise makes it upright
    Image.fromarray(pixels).save(tmp_path / "x.tif", exif=exif)
    np.testing.assert_allclose(values(tmp_path / "x.tif").T * 255, np.rot90(pixels, -1), atol=1e-4)


def test_a_coloured_picture_is_refused(tmp_path):
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[1, 2, 0] = 1
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with pytest.raises(UnreadableSeries, match="grey values are needed, but this is a colour image") as caught:
        read_radiograph(tmp_path / "x.png")
    assert caught.value.code == "colour"


# --- what is refused


@pytest.mark.parametrize(
    ("tags", "error", "code", "message"),
    [
        ({"NumberOfFrames": 5, "Rows": 1}, UnreadableSeries, "multi-frame", "a multi-frame object of 5 frames"),
        (
            {"PhotometricInterpretation": "PALETTE COLOR"},
            UnreadableSeries,
            "colour",
            r"this is a colour image \(PALETTE COLOR\)",
        ),
        (
            {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.2", "Modality": "CT"},
            UnsuitableImage,
            "unsuitable",
            r"a projection radiograph is needed \(CR, DX, MG, .*\), but this is CT Image Storage of modality CT",
        ),
        (
            {"SOPClassUID": SECONDARY_CAPTURE, "Modality": "OT"},
            UnsuitableImage,
            "unsuitable",
            "this is Secondary Capture Image Storage of modality OT",
        ),
        ({"Rows": 500}, UnreadableFile, "unreadable", "the file is cut short: 70 of 7000 bytes of pixels are there"),
        (
            {"WindowCenter": 5, "WindowWidth": 0},
            UnreadableFile,
            "unreadable",
            "its window of centre 5 and width 0 is none; try voi=False",
        ),
        (
            {"WindowCenter": 5, "WindowWidth": 0.5},
            UnreadableFile,
            "unreadable",
            "its window of centre 5 and width 0.5 is none",
        ),
        (
            {"WindowCenter": 5, "WindowWidth": 9, "VOILUTFunction": "CUBIC"},
            UnreadableFile,
            "unreadable",
            "its VOI LUT function is 'CUBIC', which DICOM does not define",
        ),
        (
            {"VOILUTSequence": [Dataset()]},
            UnreadableFile,
            "unreadable",
            r"what says how to display it is damaged \(AttributeError\); try voi=False",
        ),
        (
            {"VOILUTSequence": voi_lut([5, 5, 5])},
            UnreadableFile,
            "unreadable",
            "its VOI LUT turns every value into 5; try voi=False",
        ),
    ],
)
def test_what_is_no_radiograph_is_refused_by_name(path, tags, error, code, message):
    write(path, **tags)
    with pytest.raises(error, match=message) as caught:
        read_radiograph(path)
    assert caught.value.code == code and str(path) in str(caught.value)


def test_the_entries_of_a_table_are_spread_whatever_bits_it_declares(path):
    table = np.arange(4096)  # 12 bits declared as 16
    shown = values(write(path, VOILUTSequence=voi_lut(table, bits=16)))
    np.testing.assert_allclose(shown, stored() / 4095, atol=1e-6)


def test_a_table_shorter_than_promised(path):
    sequence = voi_lut([1, 2, 3])
    sequence[0].LUTDescriptor = [4, 0, 16]
    with pytest.raises(UnreadableFile, match="promises 4 entries, but has 3; try voi=False"):
        read_radiograph(write(path, VOILUTSequence=sequence))


@pytest.mark.parametrize("tags", [{}, {"PixelPaddingValue": 7}])
def test_a_blank_image_is_refused(path, tags):
    write(path, np.full((4, 4), 7, np.uint16), **tags)
    with pytest.raises(UnsuitableImage, match="blank: every pixel has the same value"):
        read_radiograph(path)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "notes.txt").write_text("a note")
    with pytest.raises(UnreadableFile, match="neither DICOM nor a PNG, JPEG, TIFF or BMP file"):
        read_radiograph(tmp_path / "notes.txt")
    with pytest.raises(UnreadableFile, match="cannot be opened: No such file or directory"):
        read_radiograph(tmp_path / "none.dcm")


def test_a_slice_of_a_series_is_refused(tmp_path):
    files = write_dicom_series(tmp_path / "mr", phantom(), make_affine())
    with pytest.raises(UnsuitableImage, match="this is MR Image Storage of modality MR"):
        read_radiograph(files[0])


def test_a_secondary_capture_of_a_radiograph_is_read(path):
    write(path, SOPClassUID=SECONDARY_CAPTURE, Modality="CR")
    np.testing.assert_allclose(values(path), scaled(stored().astype(float)), atol=1e-7)


# --- MONAI


def load(image, **options):
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    return Compose([LoadImaged("image", reader=RadiographReader(**options)), EnsureChannelFirstd("image")])(
        {"image": image}
    )["image"]


def test_through_load_imaged(path):
    write(path, WindowCenter=2000, WindowWidth=3000)
    for image in (path, str(path), [str(path)]):
        tensor = load(image)
        assert tensor.shape == (1, 7, 5)
        np.testing.assert_array_equal(tensor[0], values(path))
    np.testing.assert_array_equal(load(path, voi=False)[0], values(path, voi=False))
    meta = load(path).meta
    assert (meta["medvit_kind"], meta["medvit_contrast"], meta["modality"]) == ("dicom", "window", "DX")
    assert (meta["study_uid"], meta["series_uid"]) == ("1.2.3", "1.2.3.4")
    assert meta["filename_or_obj"] == str(path) and meta["spatial_shape"].tolist() == [7, 5]
    assert "affine" not in RadiographReader().get_data((path,))[1]  # MONAI's identity stands for none


@pytest.mark.parametrize("tags", [{"NumberOfFrames": 5, "Rows": 1}, {"WindowCenter": 5, "WindowWidth": 0}])
def test_what_is_refused_does_not_fall_through_to_monais_readers(path, tags):
    write(path, **tags)
    with pytest.raises(RuntimeError) as caught:
        load(path)
    causes = []
    error = caught.value
    while error is not None:
        causes.append(error)
        error = error.__cause__
    assert any(isinstance(error, MedvitError) for error in causes)


def test_several_files_are_no_radiograph(path):
    reader = RadiographReader()
    assert reader.verify_suffix("anything")
    with pytest.raises(UnreadableSeries, match="one radiograph is one file, got 2; load each") as caught:
        reader.get_data(reader.read([path, path]))
    assert caught.value.code == "several-files"


def test_no_tag_of_the_patient_is_kept(path, caplog):
    with caplog.at_level(logging.DEBUG):
        _, meta = RadiographReader().get_data((write(path),))
    assert "Doe" not in str(meta) and "SECRET" not in str(meta) and "Doe" not in caplog.text
