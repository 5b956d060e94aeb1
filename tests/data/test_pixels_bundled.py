"""Every DICOM file that comes with pydicom, and those of real scanners: what each must give."""

import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk

from medvit.data.pixels import decode
from medvit.errors import UnreadableFile

SHARED = Path(__file__).parents[3] / "shared" / "data"
BUNDLED = Path(pydicom.__file__).parent / "data" / "test_files"


def by_simpleitk(path, shape):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path))).reshape(shape)


FLAT = [  # shape and type, equal to SimpleITK, and to pydicom where it can
    ("693_J2KI.dcm", (1, 512, 512), "i2"),
    ("CT_small.dcm", (1, 128, 128), "i2"),
    ("ExplVR_BigEnd.dcm", (1, 60, 80, 3), "u1"),
    ("GDCMJ2K_TextGBR.dcm", (1, 400, 400, 3), "u1"),
    ("J2K_pixelrep_mismatch.dcm", (1, 512, 512), "i2"),
    ("JPEG-lossy.dcm", (1, 1024, 256), "u2"),
    ("JPEG2000.dcm", (1, 1024, 256), "i2"),
    ("JPEGLSNearLossless_08.dcm", (1, 45, 10), "u1"),
    ("JPEGLSNearLossless_16.dcm", (1, 50, 10), "u2"),
    ("JPGExtended.dcm", (1, 1024, 256), "u2"),
    *((f"MR_small{tail}.dcm", (1, 64, 64), "i2") for tail in (
        "", "_RLE", "_bigendian", "_expb", "_implicit", "_jp2klossless", "_jpeg_ls_lossless", "_padded",
    )),
    *((f"SC_{name}.dcm", (1, 256, 256, 3), "u1") for name in (
        "jpeg_no_color_transform", "jpeg_no_color_transform_2", "rgb_jpeg", "rgb_jpeg_app14_dcmd", "rgb_jpeg_dcmd",
    )),
    *((f"SC_rgb_{name}.dcm", (1, 100, 100, 3), "u1") for name in (
        "dcmtk_+eb+cr", "dcmtk_+eb+cy+n1", "dcmtk_+eb+cy+n2", "dcmtk_+eb+cy+np", "dcmtk_+eb+cy+s2", "dcmtk_+eb+cy+s4",
        "gdcm_KY", "jls_lossy_line", "jls_lossy_sample", "jpeg_dcmtk", "jpeg_gdcm", "jpeg_lossy_gdcm", "rle",
    )),
    ("SC_rgb_rle_2frame.dcm", (2, 100, 100, 3), "u1"),
    *((f"SC_rgb_small_odd{tail}.dcm", (1, 3, 3, 3), "u1") for tail in ("", "_big_endian", "_jpeg")),
    ("SC_ybr_full_422_uncompressed.dcm", (1, 100, 100, 3), "u1"),
    ("examples_jpeg2k.dcm", (1, 480, 640, 3), "u1"),
    ("examples_overlay.dcm", (1, 300, 484), "u2"),
    ("examples_palette.dcm", (1, 350, 800, 3), "u1"),
    ("examples_rgb_color.dcm", (1, 240, 320, 3), "u1"),
    ("examples_ybr_color.dcm", (30, 240, 320, 3), "u1"),
    ("image_dfl.dcm", (1, 512, 512), "u1"),
    ("rtdose.dcm", (15, 10, 10), "u4"),
    ("rtdose_rle.dcm", (15, 10, 10), "u4"),
    *((f"dicomdirtests/77654033/CT2/{n}", (1, 16, 16), "i2") for n in (17106, 17136, 17166, 17196)),
    *((f"dicomdirtests/98892001/CT2N/{n}", (1, 16, 16), "i2") for n in (6293, 6924)),
    *((f"dicomdirtests/98892001/CT5N/{n}", (1, 16, 16), "i2") for n in (2062, 2392, 2693, 3023, 3353)),
    *((f"dicomdirtests/98892003/{n}", (1, 16, 16), "i2") for n in (
        "MR1/15820", "MR1/4919", "MR1/5641", "MR2/15970", "MR2/4950", "MR2/4981", "MR2/5011", "MR2/6273", "MR2/6605",
        "MR2/6935", "MR700/4467", "MR700/4528", "MR700/4558", "MR700/4588", "MR700/4618", "MR700/4648", "MR700/4678",
    )),
]  # fmt: skip
NOT_BY_PYDICOM = ("JPEG-lossy.dcm", "JPGExtended.dcm", "examples_palette.dcm")  # 12-bit JPEG; colours left to the user


@pytest.mark.parametrize(("name", "shape", "dtype"), FLAT, ids=[row[0] for row in FLAT])
def test_bundled_file_against_simpleitk_and_pydicom(name, shape, dtype):
    pixels = decode(BUNDLED / name)
    stored = pixels.stored
    assert (pixels.shape, stored.shape, stored.dtype) == (shape, shape, np.dtype(dtype))
    assert "PixelData" not in pixels.ds
    rescaled = np.stack([pixels.rescaled(number) for number in range(shape[0])])
    np.testing.assert_allclose(rescaled, by_simpleitk(BUNDLED / name, shape), rtol=1e-6)
    if name not in NOT_BY_PYDICOM:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            np.testing.assert_array_equal(stored, pydicom.dcmread(BUNDLED / name).pixel_array.reshape(shape))


SAME = [  # what SimpleITK misreads or cannot read, and the file with the same image, times a factor
    ("SC_rgb_rle_16bit.dcm", "SC_rgb_rle.dcm", 0x101),
    ("SC_rgb_rle_32bit.dcm", "SC_rgb_rle.dcm", 0x1010101),
    ("SC_rgb_rle_16bit_2frame.dcm", "SC_rgb_rle_2frame.dcm", 0x101),
    ("SC_rgb_rle_32bit_2frame.dcm", "SC_rgb_rle_2frame.dcm", 0x1010101),
    ("rtdose_expb.dcm", "rtdose.dcm", 1),
    ("rtdose_expb_1frame.dcm", "rtdose_1frame.dcm", 1),
    ("rtdose_rle_1frame.dcm", "rtdose_1frame.dcm", 1),
    ("liver_expb_1frame.dcm", "liver_1frame.dcm", 1),
]


@pytest.mark.parametrize(("name", "other", "factor"), SAME, ids=[row[0] for row in SAME])
def test_bundled_file_against_another(name, other, factor):
    stored, reference = decode(BUNDLED / name).stored, decode(BUNDLED / other).stored
    np.testing.assert_array_equal(stored, reference.astype(np.int64) * factor)
    assert stored.max() > 0


def test_bundled_one_bit_and_monochrome1():
    liver = decode(BUNDLED / "liver_1frame.dcm").frame(0)
    np.testing.assert_array_equal(liver, by_simpleitk(BUNDLED / "liver_1frame.dcm", liver.shape) // 255)
    np.testing.assert_array_equal(
        decode(BUNDLED / "rtdose.dcm").frame(0), decode(BUNDLED / "rtdose_1frame.dcm").frame(0)
    )
    for name in ("CR1/6154", "CR2/6247", "CR3/6278"):  # SimpleITK inverts, within the range of BitsStored
        pixels = decode(BUNDLED / "dicomdirtests/77654033" / name)
        assert pixels.ds.PhotometricInterpretation == "MONOCHROME1" and pixels.frame(0).dtype == np.uint16
        raw = pydicom.dcmread(BUNDLED / "dicomdirtests/77654033" / name)
        np.testing.assert_array_equal(pixels.frame(0).ravel(), np.frombuffer(raw.PixelData, "<u2"))


REFUSED = {
    "JPEG2000-embedded-sequence-delimiter.dcm": r"\(rows, columns, samples\) are \(1024, .*\) in the stream",
    "MR_truncated.dcm": "the file is cut short: 8130 of 8192 bytes of pixels are there; get it again",
    "badVR.dcm": "NumberOfFrames is no number from 0",
    "meta_missing_tsyntax.dcm": "Rows is missing",
    "no_meta.dcm": "not a DICOM file",  # one byte has been lost in front
    "no_meta_group_length.dcm": "this object of no known class has 0",
    "reportsi.dcm": "one element of pixels is needed, but this Basic Text SR Storage has 0",
    "rtplan.dcm": "this RT Plan Storage has 0",
    "rtstruct.dcm": "this RT Structure Set Storage has 0",
    "waveform_ecg.dcm": "this 12-lead ECG Waveform Storage has 0",
    "dicomdirtests/DICOMDIR": "this object of no known class has 0",
    "dicomdirtests/DICOMDIR-bigEnd": "this object of no known class has 0",
    "dicomdirtests/TINY_ALPHA/PT000000/ST000000/SE000000/IM000000": "this CT Image Storage has 0",
    "README.txt": "not a DICOM file",
    "zipMR.gz": "not a DICOM file",
    "test1.json": "not a DICOM file",
}


@pytest.mark.parametrize(("name", "message"), REFUSED.items())
def test_bundled_file_that_is_refused(name, message):
    with pytest.raises(UnreadableFile, match=message) as caught:
        decode(BUNDLED / name).frame(0)
    assert caught.value.path == BUNDLED / name


def test_every_bundled_file_is_read_or_refused():
    known = {row[0] for row in FLAT}
    for file in BUNDLED.rglob("*"):
        if file.is_file() and file.relative_to(BUNDLED).as_posix() not in known:
            try:
                assert decode(file).frame(0).size
            except UnreadableFile:
                continue


@pytest.mark.skipif(not (SHARED / "dicom_scanner").is_dir(), reason="the shared scanner series are not here")
@pytest.mark.parametrize("series", ["dicom_scanner", "dicom_hippocrop"])
def test_real_scanner_files(series):
    count = 0
    for folder in (SHARED / series).iterdir():
        for file in sorted(folder.iterdir())[:3] if folder.is_dir() else []:
            try:
                pixels = decode(file)
            except UnreadableFile as error:
                assert error.reason == "not a DICOM file" and file.suffix != ".dcm"
                continue
            rescaled = np.stack([pixels.rescaled(number) for number in range(pixels.shape[0])])
            np.testing.assert_allclose(rescaled, by_simpleitk(file, pixels.shape), rtol=1e-6, atol=1e-3)
            count += 1
    assert count >= 9
