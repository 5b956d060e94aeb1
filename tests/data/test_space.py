import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine
from hypothesis import given
from hypothesis import strategies as st

from medvit.data.space import Space
from medvit.errors import SpaceMismatch

CODES = {
    "axial": "LPS",
    "sagittal": "PIR",
    "coronal": "LIP",
    "prone": "RAS",
    "feet-first": "RPI",
    "oblique": "LPS",
    "oblique-sagittal": "PIR",
    "reversed": "LPI",
}


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_orientation_spacing_and_volume(name):
    space = Space.from_affine((7, 6, 5), make_affine(name))
    assert space.orientation == CODES[name]
    assert space.spacing == pytest.approx((0.75, 1.25, 2.5))
    assert space.voxel_volume == pytest.approx(0.75 * 1.25 * 2.5)


def test_is_hashable_equal_by_value_and_read_only():
    a, b = (Space.from_affine((7, 6, 5), make_affine("oblique"), "1.2.3") for _ in range(2))
    assert a == b and hash(a) == hash(b) and len({a, b}) == 1
    assert a != Space.from_affine((7, 6, 5), make_affine("oblique"), "1.2.4")
    with pytest.raises(ValueError, match="read-only"):
        a.affine[0, 0] = 3


def test_minus_zero_does_not_make_another_space():
    affine = np.eye(4)
    affine[0, 1] = -0.0
    assert hash(Space.from_affine((1, 1, 1), affine)) == hash(Space.from_affine((1, 1, 1), np.eye(4)))


@pytest.mark.parametrize(
    ("shape", "change", "message"),
    [
        ((7, 6, 0), {}, r"three sizes of at least 1, got shape=\(7, 6, 0\)"),
        ((7, 6, 5), {(0, 3): np.nan}, "finite 4 x 4"),
        ((7, 6, 5), {(3, 0): 1.0}, r"last row .* 0 0 0 1, got \[1.0, 0.0, 0.0, 1.0\]"),
        ((7, 6, 5), {(2, 2): 0.0}, "singular"),
        ((7, 6, 5), {(0, 2): 1.0, (2, 2): 1e-5}, "singular"),
    ],
)
def test_refuses_what_is_no_grid(shape, change, message):
    affine = np.eye(4)
    for index, value in change.items():
        affine[index] = value
    with pytest.raises(ValueError, match=message):
        Space.from_affine(shape, affine)


def test_volume_and_spacing_of_a_tilted_grid():
    affine = np.diag([1.0, 1.0, 5.0, 1.0])
    affine[1, 2] = 5 * np.tan(np.radians(14))
    space = Space.from_affine((4, 4, 4), affine)
    assert space.voxel_volume == pytest.approx(5)  # shearing does not change a volume
    assert space.spacing[2] == pytest.approx(5 / np.cos(np.radians(14)))


@given(
    st.sampled_from(sorted(ORIENTATIONS)),
    st.tuples(*[st.floats(0.05, 20)] * 3),
    st.tuples(*[st.floats(-500, 500)] * 3),
    st.tuples(*[st.floats(-100, 600)] * 3),
)
def test_world_and_back(name, spacing, origin, voxel):
    space = Space.from_affine((9, 8, 7), make_affine(name, spacing, origin))
    world = space.world(np.array([voxel, (0, 0, 0)]))
    np.testing.assert_allclose(world[1], origin, atol=1e-9)
    np.testing.assert_allclose(space.voxels_of(world)[0], voxel, atol=1e-6)


def test_lps_affine_negates_right_and_anterior():
    affine = make_affine("oblique")
    expected = affine * np.array([-1, -1, 1, 1])[:, None]
    np.testing.assert_array_equal(Space.from_affine((2, 2, 2), affine).lps_affine, expected)


def test_distance_is_that_of_the_farthest_corner():
    a = Space.from_affine((11, 2, 3), np.eye(4))
    assert a.distance_to(Space.from_affine((11, 2, 3), np.diag([1.1, 1, 1, 1]))) == pytest.approx(1.0)
    assert a.distance_to(Space.from_affine((11, 2, 4), np.eye(4))) == float("inf")


def test_require_same():
    a = Space.from_affine((3, 3, 3), np.eye(4), "1.2")
    moved = np.eye(4)
    moved[0, 3] = 0.5
    a.require_same(Space.from_affine((3, 3, 3), np.eye(4)))  # an unknown frame of reference contradicts nothing
    with pytest.raises(
        SpaceMismatch, match=r"mask and image must share one grid, but have shapes \(3, 3, 3\) and \(3, 3, 4\)"
    ):
        a.require_same(Space.from_affine((3, 3, 4), np.eye(4)), what="mask and image")
    with pytest.raises(SpaceMismatch, match=r"within 0.001 mm, but corners are 0.5 mm apart"):
        a.require_same(Space.from_affine((3, 3, 3), moved))
    a.require_same(Space.from_affine((3, 3, 3), moved), tolerance=0.6)
    with pytest.raises(SpaceMismatch, match=r"different frames of reference: 1.2 and 1.3"):
        a.require_same(Space.from_affine((3, 3, 3), np.eye(4), "1.3"))


def test_a_photograph_lies_in_pixels():
    space = Space.from_affine((4, 3, 1), np.eye(4), unit="px")
    assert (space.unit, space.orientation, space.voxel_volume) == ("px", "", 1.0)
    assert space != Space.from_affine((4, 3, 1), np.eye(4)) and len({space, space}) == 1
    assert Space.from_affine((4, 3, 1), np.eye(4)).unit == "mm"
    with pytest.raises(ValueError, match="unit of a Space must be one of mm, px, got 'cm'"):
        Space.from_affine((4, 3, 1), np.eye(4), unit="cm")


def test_pixels_and_millimetres_are_no_one_grid():
    photograph, volume = (Space.from_affine((4, 3, 1), np.eye(4), unit=unit) for unit in ("px", "mm"))
    with pytest.raises(SpaceMismatch, match="mask must share one grid, but one lies in px and the other in mm"):
        photograph.require_same(volume, what="image and mask")
    moved = np.eye(4)
    moved[0, 3] = 2
    with pytest.raises(SpaceMismatch, match=r"within 0\.001 px, but corners are 2 px apart"):
        photograph.require_same(Space.from_affine((4, 3, 1), moved, unit="px"))
