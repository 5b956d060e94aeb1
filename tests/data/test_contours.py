import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medvit.data.contours import even_odd, fill, outlines


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)))
def test_contours_of_a_mask_are_the_mask_for_every_way_of_reading_them(mask):
    polygons = outlines(mask)
    united, exclusive = np.zeros_like(mask), np.zeros_like(mask)
    for polygon in polygons:
        united |= even_odd(polygon, mask.shape)
        exclusive ^= even_odd(polygon, mask.shape)
    np.testing.assert_array_equal(united, mask)
    np.testing.assert_array_equal(exclusive, mask)
    for xor in (False, True):
        filled, notes = fill(polygons, mask.shape, xor)
        np.testing.assert_array_equal(filled, mask)
        assert notes == []


@given(arrays(bool, array_shapes(min_dims=2, max_dims=2, max_side=9)), st.randoms())
def test_contours_run_along_pixel_edges_and_enclose_the_area(mask, _):
    area = 0.0
    for polygon in outlines(mask):
        np.testing.assert_array_equal(polygon % 1, 0.5)
        steps = np.roll(polygon, -1, axis=0) - polygon
        assert (np.count_nonzero(steps, axis=1) == 1).all()
        (x, y), (u, v) = polygon.T, np.roll(polygon, -1, axis=0).T
        area += (x * v - u * y).sum() / 2
    assert area == mask.sum()


def test_one_pixel_is_a_square_of_four_corners():
    mask = np.zeros((4, 3), bool)
    mask[2, 1] = True
    (square,) = outlines(mask)
    assert sorted(map(tuple, square)) == [(1.5, 0.5), (1.5, 1.5), (2.5, 0.5), (2.5, 1.5)]


def test_a_hole_is_reached_by_a_keyhole_and_parts_that_touch_at_a_corner_are_two():
    ring = np.ones((5, 5), bool)
    ring[2, 2] = False
    (walk,) = outlines(ring)
    assert len(walk) == 4 + 4 + 2  # outer corners, those of the hole, and both ends of the way there and back
    diagonal = np.eye(2, dtype=bool)
    assert [len(polygon) for polygon in outlines(diagonal)] == [4, 4]


def _square(low, high):
    return np.array([(low, low), (high, low), (high, high), (low, high)], float)


def test_contours_within_contours_are_holes_and_islands():
    nested = [_square(0.5, 9.5), _square(2.5, 7.5), _square(4.5, 5.5)]
    mask, notes = fill(nested[::-1], (12, 12))
    assert (mask.sum(), mask[1, 1], mask[3, 3], mask[5, 5], notes) == (81 - 25 + 1, True, False, True, [])


def test_contours_that_overlap_in_part_are_united_or_exclusive_by_their_type():
    crossing = [_square(-0.5, 3.5), _square(1.5, 5.5)]
    mask, notes = fill(crossing, (8, 8))
    assert (mask.sum(), notes) == (28, ["1 contours overlap others in part; they were united"])
    mask, notes = fill(crossing, (8, 8), xor=True)
    assert (mask.sum(), notes) == (24, [])


def test_copies_and_contours_between_centres_are_told():
    mask, notes = fill([_square(0.5, 2.5), _square(0.5, 2.5), _square(4.1, 4.9)], (6, 6))
    assert mask.sum() == 4
    assert notes == [
        "1 contours that occur twice were read once",
        "1 contours hold no voxel centre and were left out",
    ]


@pytest.mark.parametrize("shift", [(0, 0), (0.3, -0.2)])
def test_polygons_off_the_pixel_edges(shift):
    angle = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    center = np.array((20.0, 15.0)) + shift
    circle = center + 9.3 * np.stack([np.cos(angle), np.sin(angle)], 1)
    i, j = np.mgrid[:40, :30]
    expected = np.hypot(i - center[0], j - center[1]) < 9.3
    assert np.count_nonzero(even_odd(circle, (40, 30)) != expected) <= 1


def test_what_lies_outside_is_cut_off():
    assert even_odd(_square(-5, 2.5), (4, 4)).sum() == 9
    mask, _ = fill([_square(-9, -5), _square(2.5, 20)], (4, 4))
    assert np.argwhere(mask).tolist() == [[3, 3]]
