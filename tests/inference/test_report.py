import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine
from photographs_synthetic import colours, write_picture
from PIL import Image, ImageOps

from medvit.data.labels import Code, LabelMap, Structure
from medvit.data.reader import read_volume
from medvit.data.space import Space
from medvit.data.volume import Source
from medvit.errors import OutputError, SpaceMismatch
from medvit.inference import report
from medvit.inference.report import OverlayWriter, overlay

RED, GREEN = (255, 0, 0), (0, 255, 0)


def _structures(*colors):
    code = Code("1", "99T", "thing")
    return tuple(Structure(n, f"structure {n}", code, code, color) for n, color in enumerate(colors, 1))


def _label_map(array, affine, colors=(RED, GREEN)):
    return LabelMap(array, Space.from_affine(array.shape, affine), Source("nifti", ()), _structures(*colors))


def _box(shape, affine, low, high):
    """1 where a voxel's centre lies in the box ``low``..``high`` (RAS mm)."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in shape], indexing="ij"), -1)
    points = Space.from_affine(shape, affine).world(voxels)
    return ((points >= low) & (points <= high)).all(-1).astype(np.uint8)


def _planes(image, label_map):
    """Labels of the axial, coronal and sagittal picture, rows from the top, and mm per pixel."""
    low, high = report._bounds(label_map.space)
    center = report._center(label_map, low, high)
    pictures = [
        report._sample(report._points(plane, center, low, high), image, label_map, (0, 1))[1]
        for plane in report._PLANES
    ]
    return pictures, float((high - low).max()) / report._PIXELS


def _extent(mask):
    rows, columns = np.nonzero(mask)
    return (columns.max() - columns.min() + 1, rows.max() - rows.min() + 1)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_millimetres_are_true_in_any_orientation(orientation):
    shape, spacing = (60, 50, 30), (0.9, 1.1, 2.0)
    affine = make_affine(orientation, spacing, origin=(0, 0, 0))
    middle = Space.from_affine(shape, affine).world((np.array(shape) - 1) / 2)
    size = np.array((12.0, 20.0, 16.0))  # of the structure along R, A, S
    array = _box(shape, affine, middle - size / 2, middle + size / 2)
    label_map = _label_map(array, affine)
    (axial, coronal, sagittal), step = _planes(np.zeros(shape, np.float32), label_map)
    for picture, axes in ((axial, (0, 1)), (coronal, (0, 2)), (sagittal, (1, 2))):
        found = np.array(_extent(picture == 1)) * step
        assert np.abs(found - size[list(axes)]).max() <= 3.5  # a voxel may lie askew at either end


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_sides_follow_the_radiological_convention(orientation):
    shape = (40, 40, 40)
    affine = make_affine(orientation, (1, 1, 1), origin=(0, 0, 0))
    middle = Space.from_affine(shape, affine).world(np.array((19.5, 19.5, 19.5)))
    # a block at the middle, with a smaller one off to the right, anterior and superior touching all three planes
    array = _box(shape, affine, middle - 4, middle + 4)
    array[_box(shape, affine, middle - 2 + (10, 0, 0), middle + 2 + (10, 0, 0)) == 1] = 2  # right
    array[_box(shape, affine, middle - 2 + (0, 10, 0), middle + 2 + (0, 10, 0)) == 1] = 3  # anterior
    array[_box(shape, affine, middle - 2 + (0, 0, 10), middle + 2 + (0, 0, 10)) == 1] = 4  # superior
    label_map = _label_map(array, affine, (RED, GREEN, RED, GREEN))
    (axial, coronal, sagittal), _ = _planes(np.zeros(shape, np.float32), label_map)

    def at(picture, label):
        return np.argwhere(picture == label).mean(0)  # row, column

    assert at(axial, 2)[1] < at(axial, 1)[1]  # the patient's right is on the left
    assert at(axial, 3)[0] < at(axial, 1)[0]  # anterior on top
    assert at(coronal, 2)[1] < at(coronal, 1)[1]
    assert at(coronal, 4)[0] < at(coronal, 1)[0]  # superior on top
    assert at(sagittal, 3)[1] < at(sagittal, 1)[1]  # anterior on the left
    assert at(sagittal, 4)[0] < at(sagittal, 1)[0]
    assert [plane.letters for plane in report._PLANES] == ["RLAP", "RLSI", "APSI"]


def test_the_planes_show_every_structure():
    array = np.zeros((20, 30, 20), np.uint8)
    array[8:12, 4:12, 3:9] = 1
    array[8:12, 12:26, 7:16] = 2
    (axial, coronal, sagittal), _ = _planes(np.zeros(array.shape, np.float32), _label_map(array, np.eye(4)))
    for picture in (axial, sagittal):
        assert set(np.unique(picture)) == {0, 1, 2}
    assert set(np.unique(coronal)) >= {0}


def test_outside_the_image_is_black_and_without_labels():
    array = np.ones((10, 10, 10), np.uint8)
    affine = make_affine("oblique", (1, 1, 1))
    low, high = report._bounds(Space.from_affine(array.shape, affine))
    points = report._points(report._PLANES[0], (low + high) / 2, low, high)
    gray, labels = report._sample(points, np.ones(array.shape, np.float32), _label_map(array, affine), (0, 1))
    assert gray[0, 0] == labels[0, 0] == 0
    middle = tuple(n // 2 for n in gray.shape)
    assert (gray[middle], labels[middle]) == (1, 1)
    assert ((gray > 0) == (labels > 0)).all()


def _picture(path):
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_the_picture_has_colours_and_equal_bytes(tmp_path):
    array = np.zeros((16, 14, 12), np.uint8)
    array[4:8, 4:10, 4:8] = 1
    array[8:12, 4:10, 4:8] = 2
    image = np.random.default_rng(0).normal(100, 20, array.shape).astype(np.float32)
    label_map = _label_map(array, make_affine(spacing=(1, 1, 1.5)))
    first = overlay(image, label_map, tmp_path / "new" / "a.png")
    second = overlay(image, label_map, tmp_path / "b.png")
    assert first.read_bytes() == second.read_bytes()
    picture = _picture(first)
    for color in (RED, GREEN):
        # contours and the legend's patch are pure
        assert (np.abs(picture - color).max(-1) < 30).sum() > 500
    assert b"matplotlib" not in first.read_bytes()


def test_an_existing_picture_is_kept(tmp_path):
    label_map = _label_map(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    path = overlay(
        np.zeros((4, 4, 4), np.float32), label_map, tmp_path / "a.png"
    )  # empty and constant: still a picture
    with pytest.raises(OutputError, match=r"a\.png: exists already"):
        overlay(np.zeros((4, 4, 4)), label_map, path)
    assert overlay(np.zeros((4, 4, 4)), label_map, path, overwrite=True) == path


@pytest.mark.parametrize("shape", [(1, 30, 20), (40, 1, 1), (200, 4, 3)])
def test_flat_and_long_images(tmp_path, shape):
    path = overlay(np.zeros(shape), _label_map(np.ones(shape, np.uint8), np.eye(4)), tmp_path / "a.png")
    assert _picture(path).any()


def test_a_long_legend_is_cut(tmp_path):
    array = np.zeros((40, 3, 3), np.uint8)
    array[:30, 1, 1] = np.arange(1, 31)
    label_map = _label_map(array, np.eye(4), [(n * 8, 100, 200) for n in range(30)])
    assert _picture(overlay(np.zeros(array.shape), label_map, tmp_path / "a.png")).shape[1] < 2000


def test_the_image_must_fit_the_labels(tmp_path):
    label_map = _label_map(np.zeros((4, 5, 6), np.uint8), np.eye(4))
    with pytest.raises(SpaceMismatch, match=r"needs an image of shape \(4, 5, 6\), got \(6, 5, 4\)"):
        overlay(np.zeros((6, 5, 4)), label_map, tmp_path / "a.png")


# ---- photographs


def _photograph(orientation, tmp_path, size=(600, 400)):
    path = write_picture(tmp_path / f"{orientation}.png", colours(*size), orientation)
    volume = read_volume(path)
    array = (volume.array[..., 0] > 128).astype(np.uint8)
    code = Code("1", "99T", "thing")
    vessel = (Structure(1, "vessel", code, code, GREEN),)
    return volume.array, LabelMap(array, volume.space, Source("raster", (path,)), vessel)


@pytest.mark.parametrize("orientation", [1, 2, 6, 8])
def test_a_photograph_is_shown_upright_beside_its_structures(tmp_path, orientation):
    image, label_map = _photograph(orientation, tmp_path)
    figure = report._photograph(image, label_map)
    plain, painted = (axes.get_images()[0].get_array() for axes in figure.axes)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(tmp_path / f"{orientation}.png")))
    np.testing.assert_array_equal(plain, shown)
    mask = shown[..., 0] > 128
    np.testing.assert_array_equal(painted[~mask], shown[~mask])
    np.testing.assert_allclose(painted[mask], 0.3 * shown[mask] + 0.7 * np.array(GREEN), atol=0.51)
    box = [axes.get_position().size * figure.get_size_inches() for axes in figure.axes]
    np.testing.assert_allclose(box, [np.array(shown.shape[1::-1]) * 7 / 600] * 2)


def test_the_picture_of_a_photograph_has_equal_bytes_and_names_areas(tmp_path):
    image, label_map = _photograph(1, tmp_path)
    first, second = (overlay(image, label_map, tmp_path / f"{n}/a.png") for n in "12")
    assert first.read_bytes() == second.read_bytes()
    row = label_map.volumes()[0]
    assert report._size(row) == f"{row['area_px']:,} px ({row['fraction']:.2%})"
    assert OverlayWriter().write(label_map, tmp_path / "b").read_bytes() == first.read_bytes()


def test_large_photographs_are_reduced_and_grey_ones_windowed(tmp_path):
    image, label_map = _photograph(1, tmp_path, (2400, 160))
    panels = report._photograph(image[..., 0] * 257, label_map).axes  # 16 bits
    plain = np.asarray(panels[0].get_images()[0].get_array())
    assert plain.shape == (70, 1050, 3)
    assert (plain[..., 0] == plain[..., 2]).all() and plain.min() < 20 and plain.max() > 235
