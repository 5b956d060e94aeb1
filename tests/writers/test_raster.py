import numpy as np
import pytest
from photographs_synthetic import colours, write_picture
from PIL import Image, ImageOps

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.reader import read_volume
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import OutputError
from medvit.writers.dicom_seg import DicomSegWriter
from medvit.writers.nifti import NiftiLabelWriter
from medvit.writers.raster import RasterLabelWriter

CODE = Code("1", "99T", "thing")
STRUCTURES = tuple(
    Structure(n, f"s{n}", CODE, CODE, color) for n, color in ((1, (255, 0, 0)), (7, (1, 2, 3)), (300, (4, 5, 6)))
)
ROWS = np.random.default_rng(0).choice(np.array([0, 1, 7], np.uint8), (16, 24))  # (row, column)


def label_map(space=None, rows=ROWS, kind="raster"):
    array = np.ascontiguousarray(rows.T[:, :, None])
    space = space or Space.from_affine(array.shape, np.eye(4), unit="px")
    return LabelMap(array, space, Source(kind, ()), STRUCTURES)


def test_a_pixel_is_its_label_and_has_the_colour_of_its_structure(tmp_path):
    path = RasterLabelWriter().write(label_map(), tmp_path / "new/eye.1")
    assert path == tmp_path / "new/eye.1_seg.png"
    image = Image.open(path)
    assert (image.mode, image.size, image.info) == ("P", (24, 16), {})
    np.testing.assert_array_equal(np.asarray(image), ROWS)
    painted = np.asarray(image.convert("RGB"))
    for label, color in ((0, (0, 0, 0)), (1, (255, 0, 0)), (7, (1, 2, 3))):
        assert (painted[label == ROWS] == color).all()
    assert path.read_bytes()[24] == 8  # bits, though three colours need two


def test_labels_above_255_become_grey_of_16_bits(tmp_path):
    rows = np.where(ROWS == 7, np.uint16(300), ROWS)
    image = Image.open(RasterLabelWriter().write(label_map(rows=rows), tmp_path / "a"))
    assert image.mode == "I;16"
    np.testing.assert_array_equal(np.asarray(image), rows)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_mask_and_file_lie_on_each_other_as_stored_and_as_shown(tmp_path, orientation, name):
    pixels = colours(24, 16)
    path = write_picture(tmp_path / name, pixels, orientation)
    space = read_volume(path).space
    rows = (pixels[..., 0] > 128).astype(np.uint8)
    mask = Image.open(RasterLabelWriter().write(label_map(space, rows), tmp_path / "a"))
    np.testing.assert_array_equal(np.asarray(mask), rows)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    np.testing.assert_array_equal(np.asarray(ImageOps.exif_transpose(mask)), shown[..., 0] > 128)


def test_equal_labels_give_equal_bytes_and_an_existing_file_is_kept(tmp_path):
    one, two = (RasterLabelWriter().write(label_map(), tmp_path / name) for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(OutputError, match=r"a_seg\.png: exists already"):
        RasterLabelWriter().write(label_map(rows=np.zeros_like(ROWS)), tmp_path / "a")
    assert one.read_bytes() == two.read_bytes()
    RasterLabelWriter().write(label_map(rows=np.zeros_like(ROWS)), tmp_path / "a", overwrite=True)
    assert not np.asarray(Image.open(one)).any()


def test_formats_apply_to_volumes_or_to_photographs(tmp_path):
    volume = label_map(Space.from_affine((24, 16, 1), np.eye(4)), kind="nifti")
    assert RasterLabelWriter().write(volume, tmp_path / "a") is None
    for writer in (NiftiLabelWriter(), DicomSegWriter("net", "1")):
        assert writer.write(label_map(), tmp_path / "a") is None
    assert list(tmp_path.iterdir()) == []
