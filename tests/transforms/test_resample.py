"""resample_labels against brute force, scipy, and hand-made cases; every target voxel is asked in world coordinates."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.ndimage import map_coordinates

from medvit.data.space import Space
from medvit.errors import SpaceMismatch
from medvit.transforms import resample, resample_labels

ORIENTATIONS = list(itertools.product(itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)))


def random_labels(shape, seed=0, dtype=np.uint8, top=5):
    return np.random.default_rng(seed).integers(0, top, shape).astype(dtype)


def random_space(rng, shape=None, shear=0.0):
    """A grid around the origin with a random rotation, spacing, handedness and, if wanted, shear."""
    shape = shape or tuple(int(n) for n in rng.integers(4, 14, 3))
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    linear = rotation @ (np.eye(3) + shear * np.triu(rng.uniform(-1, 1, (3, 3)), 1)) @ np.diag(rng.uniform(0.6, 2.5, 3))
    affine = np.eye(4)
    affine[:3, :3] = linear
    affine[:3, 3] = rng.uniform(-2, 2, 3) - linear @ ((np.array(shape) - 1) / 2)
    return Space.from_affine(shape, affine)


def by_brute_force(labels, source, target):
    """One voxel at a time, from the definition; with each coordinate's distance to the nearest border of a voxel."""
    result, margin = np.zeros(target.shape, labels.dtype), np.zeros(target.shape)
    for voxel in np.ndindex(*target.shape):
        at = source.voxels_of(target.world(np.array(voxel)))
        margin[voxel] = np.abs(at - np.floor(at) - 0.5).min()
        nearest = np.floor(at + 0.5).astype(int)
        if all(0 <= n < size for n, size in zip(nearest, source.shape, strict=True)):
            result[voxel] = labels[tuple(nearest)]
    return result, margin


def reoriented(labels, space, order, signs, crop=((0, 0),) * 3):
    """The same voxels with axes permuted, flipped and then cropped (negative: padded); affine to match."""
    array = labels.transpose(order)[tuple(slice(None, None, s) for s in signs)]
    affine = space.affine @ np.eye(4)[:, [*order, 3]]
    flip = np.diag([*map(float, signs), 1.0])
    flip[:3, 3] = [n - 1 if s < 0 else 0 for n, s in zip(array.shape, signs, strict=True)]
    shift = np.eye(4)
    shift[:3, 3] = [low for low, _ in crop]
    for axis, (low, high) in enumerate(crop):
        pad = [(0, 0)] * 3
        pad[axis] = (max(-low, 0), max(-high, 0))
        array = np.pad(array.take(range(max(low, 0), array.shape[axis] - max(high, 0)), axis), pad)
    return array, Space.from_affine(array.shape, affine @ flip @ shift)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_all_48_axis_orientations_are_exact_both_ways(order, signs):
    labels, space = random_labels((4, 5, 6)), random_space(np.random.default_rng(3), (4, 5, 6), shear=0.2)
    turned, turned_space = reoriented(labels, space, order, signs)
    np.testing.assert_array_equal(resample_labels(labels, space, turned_space), turned)
    np.testing.assert_array_equal(resample_labels(turned, turned_space, space), labels)


@given(
    orientation=st.sampled_from(ORIENTATIONS),
    crop=st.lists(st.tuples(st.integers(-3, 2), st.integers(-3, 2)), min_size=3, max_size=3),
    noise=st.floats(0, 5e-4),
    seed=st.integers(0, 99),
)
def test_crop_and_padding_on_the_same_lattice_are_exact(orientation, crop, noise, seed):
    rng = np.random.default_rng(seed)
    labels, space = random_labels((7, 6, 8), seed), random_space(rng, (7, 6, 8))
    expected, target = reoriented(labels, space, *orientation, crop)
    moved = target.affine.copy()
    moved[:3, 3] += noise * min(space.spacing) / np.sqrt(3)
    np.testing.assert_array_equal(resample_labels(labels, space, Space.from_affine(target.shape, moved)), expected)


@pytest.mark.parametrize("seed", range(8))
def test_random_oblique_and_sheared_grids_equal_brute_force(seed):
    rng = np.random.default_rng(seed)
    source, target = random_space(rng, shear=0.3 * (seed % 2)), random_space(rng, shear=0.3 * (seed % 2))
    labels = random_labels(source.shape, seed)
    expected, margin = by_brute_force(labels, source, target)
    clear = margin > 2e-3
    assert (expected[clear] > 0).sum() > 50
    np.testing.assert_array_equal(resample_labels(labels, source, target)[clear], expected[clear])


@pytest.mark.upstream
@pytest.mark.parametrize("seed", range(4))
def test_oblique_grids_equal_scipy(seed, monkeypatch):
    monkeypatch.setattr(resample, "SLAB_VOXELS", 3000)  # several slabs, the last one thinner
    rng = np.random.default_rng(100 + seed)
    source, target = random_space(rng, (30, 34, 25), shear=0.2), random_space(rng, (41, 37, 40), shear=0.2)
    labels = random_labels(source.shape, seed, np.uint16, 700)
    at = source.voxels_of(target.world(np.moveaxis(np.indices(target.shape), 0, -1)))
    expected = map_coordinates(labels, np.moveaxis(at, -1, 0), order=0, mode="grid-constant", cval=0)
    clear = np.abs(at - np.floor(at) - 0.5).min(axis=-1) > 2e-3
    result = resample_labels(labels, source, target)
    assert result.dtype == np.uint16
    assert clear.mean() > 0.95
    np.testing.assert_array_equal(result[clear], expected[clear])


@pytest.mark.parametrize("seed", range(4))
def test_separable_grids_equal_the_general_path(seed, monkeypatch):
    rng = np.random.default_rng(seed)
    source = random_space(rng, (9, 11, 8), shear=0.2)
    order, signs = ORIENTATIONS[7 * seed + 3]
    _, turned = reoriented(np.zeros(source.shape, np.uint8), source, order, signs)
    affine = turned.affine @ np.diag([*rng.uniform(0.4, 2.2, 3), 1.0])
    affine[:3, 3] += affine[:3, :3] @ rng.uniform(-3, 3, 3)
    target, labels = Space.from_affine((10, 9, 12), affine), random_labels(source.shape, seed)
    separable = resample_labels(labels, source, target)
    monkeypatch.setattr(resample, "_axis_pairs", lambda *_: None)
    np.testing.assert_array_equal(separable, resample_labels(labels, source, target))
    expected, margin = by_brute_force(labels, source, target)
    np.testing.assert_array_equal(separable[margin > 2e-3], expected[margin > 2e-3])


def line(values, spacing, n, origin=0.0):
    """A row of 1 mm voxels from 0, resampled to ``n`` voxels of ``spacing`` whose first centre lies at ``origin``."""
    source = Space.from_affine((len(values), 1, 1), np.eye(4))
    affine = np.diag([spacing, 1.0, 1.0, 1.0])
    affine[0, 3] = origin
    return resample_labels(np.array(values)[:, None, None], source, Space.from_affine((n, 1, 1), affine))[
        :, 0, 0
    ].tolist()


def test_ties_go_to_the_higher_index_whatever_the_rounding():
    assert line([1, 2, 3, 4], 0.5, 7) == [1, 2, 2, 3, 3, 4, 4]
    for jitter in (-3e-5, -1e-12, 1e-12, 3e-5):
        assert line([1, 2, 3, 4], 0.5, 7, jitter) == [1, 2, 2, 3, 3, 4, 4]


def test_outside_begins_half_a_voxel_beyond_the_last_centre():
    assert line([1, 2, 3], 1, 7, origin=-2) == [0, 0, 1, 2, 3, 0, 0]
    assert line([1, 2, 3], 1, 5, origin=-0.6) == [0, 1, 2, 3, 0]
    # a centre exactly on the outer face still belongs to the image on both sides
    assert line([1, 2, 3], 3, 2, origin=-0.5) == [1, 3]
    assert line([1, 2, 3], 3, 2, origin=-0.502) == [0, 3]
    assert line([1, 2, 3], 3, 2, origin=-0.498) == [1, 0]


def test_a_round_trip_through_a_finer_grid_is_the_identity():
    rng = np.random.default_rng(5)
    coarse = random_space(rng, (6, 7, 8))
    fine = Space.from_affine((18, 21, 24), coarse.affine @ np.diag([1 / 3, 1 / 3, 1 / 3, 1]) @ np.eye(4))
    centred = fine.affine.copy()
    centred[:3, 3] -= fine.affine[:3, :3].sum(axis=1)  # three fine voxels within each coarse one
    fine, labels = Space.from_affine(fine.shape, centred), random_labels((6, 7, 8))
    there = resample_labels(labels, coarse, fine)
    np.testing.assert_array_equal(there, labels.repeat(3, 0).repeat(3, 1).repeat(3, 2))
    np.testing.assert_array_equal(resample_labels(there, fine, coarse), labels)


def test_an_oblique_box_keeps_its_volume():
    rng = np.random.default_rng(11)
    source, target = random_space(rng, (40, 40, 40)), random_space(rng, (80, 80, 80))
    labels = np.zeros(source.shape, np.uint8)
    labels[10:30, 12:28, 11:29] = 1
    fits = target.voxels_of(source.world(np.array(list(itertools.product((9, 30), (11, 28), (10, 29))))))
    assert (fits > 0).all()
    assert (fits < 79).all()
    volume = resample_labels(labels, source, target).sum() * target.voxel_volume
    assert volume == pytest.approx(labels.sum() * source.voxel_volume, rel=0.01)


def test_grids_that_do_not_meet_and_empty_maps_give_background():
    source = Space.from_affine((4, 4, 4), np.eye(4))
    far = np.eye(4)
    far[:3, 3] = 100
    target = Space.from_affine((5, 6, 7), far)
    assert not resample_labels(np.ones((4, 4, 4), np.uint8), source, target).any()
    empty = resample_labels(np.zeros((4, 4, 4), np.uint16), source, Space.from_affine((5, 6, 7), np.eye(4)))
    assert (empty.shape, empty.dtype, int(empty.sum())) == ((5, 6, 7), np.uint16, 0)


def test_arrays_in_any_memory_order_and_integer_dtype():
    rng = np.random.default_rng(2)
    source, target = random_space(rng, (8, 9, 10)), random_space(rng, (9, 8, 7))
    labels = random_labels(source.shape)
    expected = resample_labels(labels, source, target)
    for variant in (np.asfortranarray(labels), labels[::-1][::-1], labels.astype(np.int64)):
        result = resample_labels(variant, source, target)
        np.testing.assert_array_equal(result, expected)
        assert result.dtype == variant.dtype
        assert result.flags.c_contiguous
    assert resample_labels(labels > 2, source, target).dtype == bool


def test_guards():
    space = Space.from_affine((2, 2, 2), np.eye(4), "1.2.3")
    with pytest.raises(
        SpaceMismatch, match=re.escape("labels of shape (2, 2, 3) do not fill their grid of shape (2, 2, 2)")
    ):
        resample_labels(np.zeros((2, 2, 3), np.uint8), space, space)
    with pytest.raises(TypeError, match="labels must be integers, got float32; take the argmax before resampling"):
        resample_labels(np.zeros((2, 2, 2), np.float32), space, space)
    other = Space.from_affine((2, 2, 2), np.eye(4), "1.2.4")
    with pytest.raises(
        SpaceMismatch, match=re.escape("frame of reference 1.2.3 and cannot be placed in another one, 1.2.4")
    ):
        resample_labels(np.zeros((2, 2, 2), np.uint8), space, other)
    unknown = Space.from_affine((2, 2, 2), np.eye(4))
    assert resample_labels(np.ones((2, 2, 2), np.uint8), space, unknown).all()


def test_pixels_and_millimetres_do_not_meet():
    photograph, volume = (Space.from_affine((4, 3, 1), np.eye(4), unit=unit) for unit in ("px", "mm"))
    labels = random_labels((4, 3, 1))
    np.testing.assert_array_equal(resample_labels(labels, photograph, photograph), labels)
    with pytest.raises(SpaceMismatch, match="labels lie in px and cannot be placed in mm"):
        resample_labels(labels, photograph, volume)
