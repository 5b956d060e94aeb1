from dataclasses import replace

import numpy as np
import pytest
from data_synthetic import ORIENTATIONS, make_affine
from hypothesis import given
from hypothesis import strategies as st

from medvit.data.slices import Plane, arrange
from medvit.data.space import LPS_TO_RAS
from medvit.errors import UnreadableSeries


def planes_of(affine, n=6, shape=(8, 7)):
    """Planes of a right-handed RAS+ affine, in slice order."""
    lps = LPS_TO_RAS @ affine
    steps = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = (lps[:3, :3] / steps).T
    orientation = [*cosines[0], *cosines[1]]
    return [
        Plane.from_dicom(shape[1], shape[0], lps[:3] @ (0, 0, k, 1), orientation, (steps[1], steps[0]))
        for k in range(n)
    ]


def moved(plane, offset):
    return replace(plane, position=tuple(np.array(plane.position) + offset))


def refusal(planes, thickness=None):
    with pytest.raises(UnreadableSeries) as caught:
        arrange(planes, "p1/series", thickness)
    assert str(caught.value).startswith("p1/series: ")
    return caught.value.code, caught.value.reason


@given(
    st.sampled_from(sorted(set(ORIENTATIONS) - {"reversed"})),
    st.tuples(*[st.floats(0.1, 12)] * 3),
    st.tuples(*[st.floats(-400, 400)] * 3),
    st.permutations(range(9)),
)
def test_any_order_gives_the_affine_back(name, spacing, origin, shuffled):
    affine = make_affine(name, spacing, origin)
    planes = planes_of(affine, 9)
    stack = arrange([planes[n] for n in shuffled], "s")
    assert [shuffled[n] for n in stack.order] == list(range(9))
    np.testing.assert_allclose(stack.affine, affine, atol=1e-9)
    assert stack.notes == ()


def test_slice_axis_runs_along_the_normal_whatever_the_files_say():
    stack = arrange(planes_of(make_affine("reversed")), "s")
    assert stack.order == (5, 4, 3, 2, 1, 0)
    expected = make_affine("axial")
    expected[2, 3] = -60 - 5 * 2.5
    np.testing.assert_allclose(stack.affine, expected, atol=1e-9)


def test_plain_numbers_stay_plain():
    affine = make_affine("axial", (1, 1, 1), (0, 0, 1))
    np.testing.assert_array_equal(arrange(planes_of(affine, 32), "s").affine, affine)


def test_rounding_noise_of_orientation_and_spacing_is_averaged():
    rng = np.random.default_rng(0)
    affine = make_affine("oblique")
    noisy = []
    for plane in planes_of(affine, 40):
        wobble = rng.uniform(-1e-4, 1e-4, 8)
        noisy.append(
            Plane.from_dicom(
                7,
                8,
                np.round(plane.position, 3),
                np.array([*plane.across, *plane.down]) + wobble[:6],
                np.array(plane.spacing[::-1]) * (1 + wobble[6:]),
            )
        )
    stack = arrange(noisy, "s")
    corner = np.array([7, 6, 39, 1])
    assert np.linalg.norm((stack.affine - affine) @ corner) < 5e-3


def test_a_stack_that_drifts_by_less_than_rounding_is_orthogonal():
    affine = make_affine("oblique")
    planes = [moved(p, np.array(p.across) * 1e-4 * k) for k, p in enumerate(planes_of(affine))]
    axes = arrange(planes, "s").affine[:3, :3]
    assert abs(axes[:, 0] @ axes[:, 2]) < 1e-12


def test_a_slight_true_tilt_is_kept_in_the_affine():
    planes = [moved(p, np.array(p.down) * 2e-3 * k) for k, p in enumerate(planes_of(make_affine("axial"), 20))]
    stack = arrange(planes, "s")  # 0.046 degrees
    assert stack.tilt == 0
    np.testing.assert_allclose((stack.affine @ (0, 0, 19, 1))[:3], LPS_TO_RAS[:3, :3] @ planes[19].position, atol=1e-9)


@pytest.mark.parametrize("degrees", [-14, -0.5, 0.5, 2, 20])
def test_gantry_tilt(degrees):
    planes = planes_of(make_affine("axial", (0.5, 0.5, 5)), 24)
    shift = 5 * np.tan(np.radians(degrees))
    tilted = [moved(p, np.array(p.down) * shift * k) for k, p in enumerate(planes)]
    stack = arrange(tilted[::-1], "s")
    assert stack.tilt == pytest.approx(abs(degrees), abs=1e-9) and stack.order == tuple(range(23, -1, -1))
    for k in (0, 11, 23):
        for i, j in ((0, 0), (7, 6)):
            place = np.array(tilted[k].position) + 0.5 * (i * np.array(tilted[k].across) + j * np.array(tilted[k].down))
            np.testing.assert_allclose((stack.affine @ (i, j, k, 1))[:3], place * (-1, -1, 1), atol=1e-9)


@pytest.mark.parametrize(
    ("gone", "count", "where"),
    [([3], 1, "-55 and -50 mm"), ([2, 3], 2, "-57.5 and -50 mm"), ([2, 6], 2, "-57.5 and -52.5")],
)
def test_missing_slices(gone, count, where):
    planes = planes_of(make_affine("axial"), 10)
    code, reason = refusal([p for k, p in enumerate(planes) if k not in gone])
    assert code == "missing-slice"
    assert f"{count} of 10 slices are missing: slices are 2.5 mm apart" in reason
    assert where.replace(" mm", "") in reason


def test_uneven_slices():
    planes = planes_of(make_affine("axial", (1, 1, 2)), 8)
    planes[4] = moved(planes[4], (0, 0, 0.7))
    code, reason = refusal(planes)
    assert code == "uneven-slices"
    assert "distances run from 1.3 to 2.7 mm" in reason and "usual 2;" in reason


@pytest.mark.parametrize(("spacing", "allowed"), [(0.5, 0.02), (2.0, 0.02), (5.0, 0.05)])
def test_the_tolerance_is_the_larger_of_002_mm_and_one_percent(spacing, allowed):
    for factor, accepted in ((0.9, True), (1.3, False)):
        planes = planes_of(make_affine("axial", (1, 1, spacing)), 101)
        planes[50] = moved(planes[50], (0, 0, factor * allowed))
        if accepted:
            assert arrange(planes, "s").affine[2, 2] == pytest.approx(spacing, rel=1e-9)
        else:
            assert refusal(planes)[0] == "uneven-slices"


def test_a_slice_beside_the_line():
    planes = planes_of(make_affine("axial"), 8)
    planes[3] = moved(planes[3], (0, 4.0, 0))
    code, reason = refusal(planes)
    assert code == "shifted-slices"
    assert f"{planes[3].position[1]}" in reason and "mm beside it" in reason


def test_several_volumes_at_the_same_positions():
    code, reason = refusal(planes_of(make_affine("oblique"), 5) * 3)
    assert code == "four-dimensional"
    assert "15 slices lie at 5 positions, 3 at each" in reason


def test_one_position_taken_twice():
    planes = planes_of(make_affine("axial"), 5)
    code, reason = refusal([*planes, planes[2]])
    assert code == "duplicate-positions"
    assert "1 of 5 positions" in reason and "(at -55 mm along the normal)" in reason


def test_one_slice_needs_a_thickness():
    planes = planes_of(make_affine("oblique"), 1)
    for thickness in (None, 0.0, float("inf")):
        assert refusal(planes, thickness)[0] == "single-slice"
    stack = arrange(planes, "s", 2.5)
    np.testing.assert_allclose(stack.affine, make_affine("oblique"), atol=1e-9)
    assert stack.notes == ("a single slice: its thickness of 2.5 mm stands for the distance between slices",)


def test_orientation_and_spacing_that_vary_too_much_to_be_noise():
    planes = planes_of(make_affine("axial"), 5)
    turned = Plane.from_dicom(7, 8, planes[1].position, (1, 0.004, 0, -0.004, 1, 0), (1.25, 0.75))
    assert turned.is_like(planes[1])
    code, reason = refusal([planes[0], turned, *planes[2:]])
    assert code == "orientation-varies" and "varies by 0.004" in reason
    wider = replace(planes[1], spacing=(0.755, 1.25))
    assert wider.is_like(planes[1])
    code, reason = refusal([planes[0], wider, *planes[2:]])
    assert code == "spacing-varies" and "from [0.75, 1.25] to [0.755, 1.25] mm" in reason


def test_what_is_like_what():
    plane = planes_of(make_affine("axial"), 1)[0]
    assert plane.is_like(moved(plane, (100, 3, 7)))
    assert not plane.is_like(replace(plane, shape=(8, 8)))
    assert not plane.is_like(replace(plane, spacing=(0.817, 1.25)))
    assert not plane.is_like(planes_of(make_affine("coronal"), 1)[0])


@pytest.mark.parametrize(
    ("position", "orientation", "spacing", "message"),
    [
        ((0, 0, np.inf), (1, 0, 0, 0, 1, 0), (1, 1), "not finite"),
        ((0, 0, 0), (1, 0, 0, 0, 1, 0), (0, 1), r"PixelSpacing must be positive, got \[0, 1\]"),
        ((0, 0, 0), (1, 0, 0, 0, 1, 0), (1, -1), "PixelSpacing must be positive"),
        ((0, 0, 0), (1, 0, 0, 1, 0, 0), (1, 1), "two orthogonal unit vectors"),
        ((0, 0, 0), (0, 0, 0, 0, 1, 0), (1, 1), "two orthogonal unit vectors"),
        ((0, 0, 0), (1.1, 0, 0, 0, 1, 0), (1, 1), "two orthogonal unit vectors"),
    ],
)
def test_tags_that_do_not_place_an_image(position, orientation, spacing, message):
    with pytest.raises(ValueError, match=message):
        Plane.from_dicom(7, 8, position, orientation, spacing)


def test_pixel_spacing_is_row_distance_first():
    plane = Plane.from_dicom(7, 8, (0, 0, 0), (1, 0, 0, 0, 1, 0), (1.25, 0.75))
    assert plane.shape == (8, 7) and plane.spacing == (0.75, 1.25)
