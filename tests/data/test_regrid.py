import numpy as np
import pytest
from data_synthetic import make_affine, phantom, write_dicom_series
from dicom_synthetic import sphere, tilted_affine
from scipy.ndimage import center_of_mass, map_coordinates

from medvit.data.dicom import read_dicom
from medvit.data.regrid import Repairs, between, even_heights, straighten
from medvit.data.space import Space
from medvit.data.study import discover
from medvit.data.volume import Source, Volume
from medvit.errors import UnreadableSeries

SHEARED_NOTE = "slices are sheared by {:.2f} degrees (gantry tilt), and so is its grid: programs that take it for"


def only(folder, **repairs):
    (one,) = discover(folder, repairs=Repairs(**repairs)).series
    return one


def centre_in_mm(volume):
    """Of the ball, in RAS+ mm, by the grid's own affine; and its size in mm³."""
    inside = volume.array > 550
    return volume.space.world(np.array(center_of_mass(inside))), inside.sum() * volume.space.voxel_volume


# ---- gantry tilt


@pytest.mark.parametrize("orientation", ["axial", "oblique", "feet-first"])
@pytest.mark.parametrize("degrees", [-25, -3, 0.7, 14, 30])
def test_tilt_is_kept(tmp_path, orientation, degrees):
    """The frames lie exactly where they lay, and no voxel is touched."""
    affine, array = tilted_affine(degrees, orientation=orientation), phantom((8, 7, 12))
    files = write_dicom_series(tmp_path, array, affine, modality="CT")
    one = only(tmp_path)
    assert one.problem is None and one.notes[0].startswith(SHEARED_NOTE.format(abs(degrees)))
    volume = one.read()
    np.testing.assert_array_equal(volume.array, array - 1024.0)
    np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
    assert volume.space == one.space and volume.source.files == tuple(files)


@pytest.mark.parametrize("orientation", ["axial", "oblique"])
@pytest.mark.parametrize("degrees", [-25, -3, 14, 30])
def test_a_ball_stays_at_its_place_when_tilt_is_resampled(tmp_path, orientation, degrees):
    shape = (70, 70, 24)
    affine = tilted_affine(degrees, (1.0, 0.8, 3.0), orientation)
    centre = affine[:3] @ (31, 37, 11.3, 1)
    write_dicom_series(tmp_path, sphere(affine, shape, centre, 18), affine, RescaleIntercept=0, modality="CT")
    kept, straight = only(tmp_path).read(), only(tmp_path, tilt="resample").read()
    axes = straight.space.affine[:3, :3] / np.linalg.norm(straight.space.affine[:3, :3], axis=0)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(straight.space.spacing[:2], (1.0, 0.8), atol=1e-6)
    assert straight.space.spacing[2] == pytest.approx(3, abs=1e-5) and straight.space.shape[2] == 24
    for volume in (kept, straight):
        found, size = centre_in_mm(volume)
        np.testing.assert_allclose(found, centre, atol=0.3)
        assert size == pytest.approx(4 / 3 * np.pi * 18**3, rel=0.02)
    note = "its slices are sheared (gantry tilt) and were resampled to an upright grid"
    assert straight.notes == (note,) and straight.space.frame_of_reference == kept.space.frame_of_reference
    assert straight.array.dtype == np.float32
    # every voxel of the sheared grid is found at its own place in mm
    rng = np.random.default_rng(0)
    voxels = np.column_stack([rng.uniform(1, n - 2, 500) for n in shape[:2]] + [rng.integers(0, shape[2], 500)])
    values = [
        map_coordinates(v.array, v.space.voxels_of(kept.space.world(voxels)).T, order=1, mode="nearest")
        for v in (kept, straight)
    ]
    assert np.abs(values[0] - values[1]).max() < 120 and np.abs(values[0] - values[1]).mean() < 2


def test_no_voxel_is_cut_off_when_tilt_is_resampled():
    """The grid is as large as all slices together, filled with the lowest value."""
    affine = tilted_affine(20, (1, 1, 3))
    array = phantom((6, 5, 8)).astype(np.float32) + 5
    volume = Volume(array, Space.from_affine(array.shape, affine), Source("dicom", ()))
    straight = straighten(volume)
    slip = 7 * 3 * np.tan(np.radians(20))
    assert straight.space.shape == (6, 5 + np.ceil(slip), 8)
    assert straight.array.min() == array.min()
    for k in range(8):
        first = straight.space.voxels_of(volume.space.world((0, 0, k)))
        last = straight.space.voxels_of(volume.space.world((5, 4, k)))
        assert first[2] == pytest.approx(k) and first[1] > -1e-6 and last[1] < straight.space.shape[1] - 1 + 1e-6
    np.testing.assert_allclose(straight.array[:, :5, 0], array[:, :, 0], atol=1e-3)  # nothing slips at the first slice


def test_tilt_of_whole_pixels_moves_whole_pixels():
    affine = make_affine("axial", (1, 1, 4))
    affine[1, 2] = -2.0  # two pixels along the rows at each slice
    array = phantom((6, 5, 4)).astype(np.float32)
    straight = straighten(Volume(array, Space.from_affine(array.shape, affine), Source("dicom", ())))
    expected = np.full((6, 11, 4), array.min(), np.float32)
    for k in range(4):
        start = 2 * k if np.sign(affine[1, 1]) == np.sign(affine[1, 2]) else 6 - 2 * k
        expected[:, start : start + 5, k] = array[:, :, k]
    np.testing.assert_allclose(straight.array, expected, atol=1e-2)


def test_tilt_is_refused_on_request_and_by_networks(tmp_path):
    affine = tilted_affine(14)
    files = write_dicom_series(tmp_path, phantom((8, 7, 12)), affine, modality="CT")
    one = only(tmp_path, tilt="refuse")
    assert one.problem.code == "gantry-tilt" and one.space is None
    words = "must be stacked at a right angle, but these are sheared by 14.00 degrees (gantry tilt); resample the"
    with pytest.raises(UnreadableSeries) as caught:
        read_dicom(files)
    for message in (str(one.problem), str(caught.value)):
        assert words in message and "(medvit convert --tilt resample)" in message
    assert caught.value.code == "gantry-tilt"


def test_the_angle_is_that_of_the_positions_not_of_the_tag(tmp_path):
    """GantryDetectorTilt lies after anonymisation, and in resampled series."""
    write_dicom_series(tmp_path, phantom((8, 7, 12)), make_affine(), modality="CT", GantryDetectorTilt=20)
    assert only(tmp_path, tilt="refuse").problem is None
    write_dicom_series(tmp_path, phantom((8, 7, 12)), tilted_affine(9), modality="CT", GantryDetectorTilt=0)
    assert only_problem(tmp_path) == ["gantry-tilt"]


def only_problem(folder):
    series = discover(folder, repairs=Repairs(tilt="refuse")).series
    return [one.problem.code for one in series if one.problem]


# ---- uneven slices


def write_at(folder, heights, array=None, **tags):
    """One slice at each of these heights, in units of 2.5 mm; returns array and affine of an even grid."""
    affine = make_affine("oblique")
    array = phantom((7, 6, len(heights))) if array is None else array
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine

    def edit(ds, k):
        ds.ImagePositionPatient = [round(float(v), 6) for v in lps[:3] @ (0, 0, heights[k], 1)]

    write_dicom_series(folder, array, affine, edit=edit, **tags)
    return array, affine


def test_uneven_slices_are_refused_unless_asked(tmp_path):
    write_at(tmp_path / "gap", [0, 1, 2, 4, 5])
    write_at(tmp_path / "odd", [0, 1, 2, 3.3, 4.3])
    gap, odd = only(tmp_path / "gap").problem, only(tmp_path / "odd").problem
    assert gap.code == "missing-slice" and "1 of 6 slices are missing: slices are 2.5 mm apart" in str(gap)
    assert odd.code == "uneven-slices" and "distances run from 2.5 to 3.25 mm (usual 2.5; 3.25 between" in str(odd)


@pytest.mark.parametrize("heights", [[0, 1, 2, 4, 5], [0, 1.5, 2.5, 3.5, 5], [0, 1, 3, 5, 6, 8]])
def test_uneven_slices_resampled(tmp_path, heights):
    """Straight lines between neighbours, at the smallest distance; given slices that fall on the grid are exact."""
    array, affine = write_at(tmp_path, heights)
    one = only(tmp_path, uneven="resample")
    volume = one.read()
    count = round((heights[-1] - heights[0]) / np.diff(heights).min()) + 1
    places = np.linspace(heights[0], heights[-1], count)
    assert volume.notes == (f"its {len(heights)} slices at uneven distances were resampled to {count} even ones",)
    assert volume.array.shape == one.space.shape == (7, 6, count)
    expected = np.stack([[np.interp(places, heights, line) for line in row] for row in array.astype(float)])
    np.testing.assert_allclose(volume.array, expected, rtol=1e-5, atol=1e-2)
    for k in (0, count - 1):
        np.testing.assert_allclose(volume.space.world((0, 0, k)), affine[:3] @ (0, 0, places[k], 1), atol=1e-5)
    np.testing.assert_allclose(volume.space.affine[:3, :2], affine[:3, :2], atol=2e-6)


def test_a_ball_stays_at_its_place_when_slices_are_resampled(tmp_path):
    heights = np.array([0, 1, 2, 2.7, 4, 5.3, 6, 7, 8, 9, 10.4, 11, 12, 13.1, 14])
    affine = make_affine("oblique", (1, 1, 2.5))
    centre = affine[:3] @ (15, 17, 7.2, 1)
    slices = []
    for height in heights:
        moved = affine.copy()
        moved[:3, 3] = affine[:3] @ (0, 0, height, 1)
        slices.append(sphere(moved, (30, 32, 1), centre, 12)[:, :, 0])

    def edit(ds, k):
        position = np.diag([-1, -1, 1]) @ (affine[:3] @ (0, 0, heights[k], 1))
        ds.ImagePositionPatient = [round(float(v), 6) for v in position]

    write_dicom_series(tmp_path, np.stack(slices, -1), affine, edit=edit)
    found, size = centre_in_mm(only(tmp_path, uneven="resample").read())
    np.testing.assert_allclose(found, centre, atol=0.4)
    assert size == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.05)


def test_uneven_slices_split_into_even_stacks(tmp_path):
    heights = [0, 1, 2, 3, 6, 7, 8, 8.5, 9, 9.5]
    array, affine = write_at(tmp_path, heights)
    series = discover(tmp_path, repairs=Repairs(uneven="split")).series
    assert [one.parameters for one in series] == [{"stack": float(n)} for n in range(len(series))]
    assert sorted(file for one in series for file in one.files) == sorted(tmp_path.iterdir())
    at = 0
    for one in series:
        volume = one.read()
        count = volume.array.shape[2]
        np.testing.assert_array_equal(volume.array, array[:, :, at : at + count])
        np.testing.assert_allclose(volume.space.world((0, 0, 0)), affine[:3] @ (0, 0, heights[at], 1), atol=1e-5)
        step = heights[at + 1] - heights[at]
        assert volume.space.spacing[2] == pytest.approx(2.5 * step, abs=1e-5)
        at += count
    assert [one.space.shape[2] for one in series] == [4, 3, 3] and at == len(heights)


def test_repairs_leave_an_even_series_alone(tmp_path):
    array, affine = write_at(tmp_path, [0, 1, 2, 3, 4])
    for options in ({"tilt": "resample", "uneven": "resample"}, {"tilt": "refuse", "uneven": "split"}):
        volume = only(tmp_path, **options).read()
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.space.affine, affine, atol=2e-6)
        assert volume.notes == ()


def test_two_images_at_one_place_are_never_resampled(tmp_path):
    write_at(tmp_path, [0, 1, 1, 2, 3], InstanceNumber=1, ContentTime="")
    for uneven in ("resample", "split", "refuse"):
        assert only(tmp_path, uneven=uneven).problem.code == "duplicate-positions"


@pytest.mark.parametrize("words", [{"tilt": "drop"}, {"uneven": "keep"}])
def test_unknown_words(words):
    with pytest.raises(ValueError, match=r"must be one of .*, got '(drop|keep)'"):
        Repairs(**words)


def test_even_heights_end_exactly():
    np.testing.assert_allclose(even_heights([0, 2, 3, 6]), [0, 1, 2, 3, 4, 5, 6])
    np.testing.assert_allclose(even_heights([-1, 0, 2.6]), np.linspace(-1, 2.6, 5))
    array = np.array([[[10.0, 20.0, 50.0]]])
    np.testing.assert_allclose(between(array, [0, 1, 3])[0, 0], [10, 20, 35, 50])


def moved_slices(k, offset):
    """An edit that moves slice ``k`` by ``offset`` (LPS mm)."""

    def edit(ds, number):
        if number == k:
            ds.ImagePositionPatient = [float(a) + b for a, b in zip(ds.ImagePositionPatient, offset, strict=True)]

    return edit


def test_slices_beside_the_line_are_not_resampled(tmp_path):
    """Two faults at once: a gap, and a slice that another acquisition left there."""
    files = write_dicom_series(tmp_path, phantom((7, 6, 9)), make_affine(), edit=moved_slices(6, (0, 4, 0)))
    files[2].unlink()
    problem = only(tmp_path, uneven="resample").problem
    assert problem.code == "shifted-slices" and "is 4 mm beside it" in str(problem)


@pytest.mark.parametrize("tilt", ["keep", "resample", "refuse"])
def test_tilted_slices_with_a_gap(tmp_path, tilt):
    shape, affine = (60, 60, 20), tilted_affine(15, (1, 1, 2.5))
    centre = affine[:3] @ (28, 30, 9.4, 1)
    files = write_dicom_series(tmp_path, sphere(affine, shape, centre, 15), affine)
    files[4].unlink()
    one = only(tmp_path, tilt=tilt, uneven="resample")
    if tilt == "refuse":
        assert one.problem.code == "gantry-tilt" and "15.00 degrees" in str(one.problem)
        return
    volume = one.read()
    found, size = centre_in_mm(volume)
    np.testing.assert_allclose(found, centre, atol=0.4)
    assert size == pytest.approx(4 / 3 * np.pi * 15**3, rel=0.04)
    words = {"keep": "so is its grid", "resample": "were resampled to an upright grid"}[tilt]
    assert volume.notes[0] == "its 19 slices at uneven distances were resampled to 20 even ones"
    assert words in volume.notes[1] and volume.array.shape[2] == 20
    if tilt == "keep":
        np.testing.assert_allclose(volume.space.affine, affine, atol=1e-5)


def test_colours_are_not_interpolated(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 7, 6, 3), dtype=np.uint8)

    def edit(ds, k):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit, ds.PixelRepresentation = 7, 0
        ds.PixelData = np.ascontiguousarray(colour[:, :, k].transpose(1, 0, 2)).tobytes()

    files = write_dicom_series(tmp_path, np.zeros((6, 7, 6), np.uint8), tilted_affine(15), edit=edit)
    one = only(tmp_path, tilt="resample", uneven="resample")
    assert one.channels == 3 and "so is its grid" in one.notes[0]
    np.testing.assert_array_equal(one.read().array, colour)
    files[2].unlink()
    assert only(tmp_path, tilt="resample", uneven="resample").problem.code == "missing-slice"
