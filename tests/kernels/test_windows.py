"""Windows over token grids: each method against its definition in plain Python, and against MONAI's."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvit.kernels import WindowGeometry


@st.composite
def geometries(draw, most=(40, 12, 7)):
    """A geometry of rank 1 to 3 and a grid for it, mostly ragged; not fitted."""
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, 5)) for _ in range(dims))
    shift = tuple(draw(st.integers(0, n - 1)) for n in size)
    grid = tuple(draw(st.integers(1, most[dims - 1])) for _ in range(dims))
    return WindowGeometry(size, shift), grid


def cells(sizes):
    return itertools.product(*map(range, sizes))


def origin(geometry, grid, window, member):
    """Place in the padded grid, before the roll, of one member of one window: the definition of grouping."""
    padded = [-(-g // n) * n for g, n in zip(grid, geometry.size, strict=True)]
    return tuple(
        (w * n + m + s) % p for w, m, n, s, p in zip(window, member, geometry.size, geometry.shift, padded, strict=True)
    )


# --- group, ungroup


@given(geometries(), st.integers(1, 2))
def test_ungroup_undoes_group(case, batch):
    geometry, grid = case
    x = torch.randn(batch, *grid, 2, 3)
    grouped = geometry.group(x)
    windows = torch.tensor(geometry.windows(grid)).prod()
    assert grouped.shape == (batch * windows, geometry.tokens, 2, 3)
    assert torch.equal(geometry.ungroup(grouped, grid), x)


@given(geometries(most=(12, 7, 5)))
def test_group_follows_the_definition(case):
    geometry, grid = case
    x = torch.arange(1, torch.Size(grid).numel() + 1).reshape(grid)
    expected = []
    for window in cells(geometry.windows(grid)):
        places = [origin(geometry, grid, window, member) for member in cells(geometry.size)]
        expected.append([int(x[p]) if all(a < g for a, g in zip(p, grid, strict=True)) else 0 for p in places])
    assert geometry.group(x[None]).tolist() == expected


def test_images_of_a_batch_follow_each_other():
    geometry = WindowGeometry((2,), (1,))
    x = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    assert geometry.group(x).tolist() == [[1, 2], [3, 0], [11, 12], [13, 10]]


def test_padding_is_zero_and_at_the_end():
    x = torch.tensor([[[1, 2, 3]]])
    assert WindowGeometry((2, 2), (0, 0)).pad(x).tolist() == [[[1, 2, 3, 0], [0, 0, 0, 0]]]
    assert WindowGeometry((1, 3), (0, 0)).pad(x) is x
    assert WindowGeometry((2, 2), (0, 0)).padded((1, 3)) == (2, 4)


# --- regions


@given(geometries(most=(12, 7, 5)))
def test_regions_part_what_the_roll_brought_together(case):
    geometry, grid = case
    regions = geometry.regions(grid)
    assert regions.dtype == torch.int64
    for row, window in zip(regions.tolist(), cells(geometry.windows(grid)), strict=True):
        places = [origin(geometry, grid, window, member) for member in cells(geometry.size)]
        # bit a: the token lay before the shift on axis a, so it was carried round to the end
        wrapped = [
            sum(2**a for a, (p, s) in enumerate(zip(place, geometry.shift, strict=True)) if p < s) for place in places
        ]
        assert row == wrapped


def test_without_shift_there_is_one_region():
    assert not WindowGeometry.swin(4, 3).regions((9, 8, 7)).any()


@pytest.mark.upstream
@given(geometries())
def test_regions_forbid_what_monais_mask_forbids(case):
    from monai.networks.nets.swin_unetr import compute_mask, get_window_size

    geometry, grid = case
    if len(grid) == 1:  # MONAI has no 1D: the same with a second axis of one token
        geometry, grid = WindowGeometry((*geometry.size, 1), (*geometry.shift, 0)), (*grid, 1)
    fitted = geometry.fit(grid)
    assert (fitted.size, fitted.shift) == get_window_size(grid, geometry.size, geometry.shift)
    regions = fitted.regions(grid)
    ours = (regions[:, :, None] != regions[:, None, :]) * -100.0
    assert torch.equal(ours, compute_mask(fitted.padded(grid), fitted.size, fitted.shift, "cpu"))


# --- relative positions


@given(geometries(), st.data())
def test_relative_index_is_the_offset_in_the_base_of_the_table(case, data):
    size = case[0].size
    window = tuple(data.draw(st.integers(n, 6)) for n in size)
    index = case[0].relative_index(window)
    points = list(cells(size))
    q, k = data.draw(st.integers(0, len(points) - 1)), data.draw(st.integers(0, len(points) - 1))
    row = 0
    for a, b, w in zip(points[q], points[k], window, strict=True):
        row = row * (2 * w - 1) + (a - b) + (w - 1)
    assert index[q, k] == row
    assert index.min() >= 0
    assert index.max() < torch.tensor([2 * w - 1 for w in window]).prod()


@pytest.mark.upstream
@pytest.mark.parametrize("window", [(7, 7), (3, 5), (7, 7, 7), (2, 3, 4), (1, 4, 4)])
def test_relative_index_is_monais(window):
    from monai.networks.nets.swin_unetr import WindowAttention

    monai = WindowAttention(3, 3, window)
    assert torch.equal(WindowGeometry.swin(window, len(window)).relative_index(), monai.relative_position_index)


@pytest.mark.parametrize("window", [(3, 5), (4, 4, 4), (4,), ()])
def test_a_table_for_a_smaller_window_is_refused(window):
    message = f"windows of (4, 4) need a table for at least that window, got one for {window}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        WindowGeometry.swin(4, 2).relative_index(window)


# --- construction and fitting


def test_swin_shifts_by_half_a_window_rounded_down():
    assert WindowGeometry.swin(7, 3, shifted=True) == WindowGeometry((7, 7, 7), (3, 3, 3))
    assert WindowGeometry.swin((1, 4), 2, shifted=True) == WindowGeometry((1, 4), (0, 2))
    assert WindowGeometry.swin(7, 2) == WindowGeometry((7, 7), (0, 0))
    assert WindowGeometry.full((3, 4)) == WindowGeometry((3, 4), (0, 0))
    assert WindowGeometry.full((3, 4)).tokens == 12


@pytest.mark.parametrize(
    ("grid", "size", "shift"),
    [
        ((8, 8), (7, 7), (3, 3)),
        ((7, 8), (7, 7), (0, 3)),  # as long as the window: one window, no shift
        ((3, 8), (3, 7), (0, 3)),
        ((1, 1), (1, 1), (0, 0)),
    ],
)
def test_fit_clamps_each_axis_by_itself(grid, size, shift):
    assert WindowGeometry.swin(7, 2, shifted=True).fit(grid) == WindowGeometry(size, shift)


@given(geometries())
def test_fitting_again_changes_nothing(case):
    geometry, grid = case
    fitted = geometry.fit(grid)
    assert fitted.fit(grid) == fitted.fit(fitted.padded(grid)) == fitted


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowGeometry((4, 4), (0,)), "size and shift need one entry per axis, got size=(4, 4), shift=(0,)"),
        (lambda: WindowGeometry((), ()), "size and shift need one entry per axis, got size=(), shift=()"),
        (lambda: WindowGeometry((4, 0), (0, 0)), "window size must be at least 1 on every axis, got (4, 0)"),
        (lambda: WindowGeometry((4,), (4,)), "shift must lie in [0, size) on every axis, got shift=(4,) for size=(4,)"),
        (
            lambda: WindowGeometry((4,), (-1,)),
            "shift must lie in [0, size) on every axis, got shift=(-1,) for size=(4,)",
        ),
        (lambda: WindowGeometry.swin((4, 4), 3), "window needs one int or 3 of them, got (4, 4)"),
        (
            lambda: WindowGeometry.swin(4, 2).fit((8, 8, 8)),
            "a 2D window geometry needs as many grid axes, got grid=(8, 8, 8)",
        ),
    ],
)
def test_what_cannot_be_a_geometry_is_refused(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_tables_first_made_in_inference_mode_serve_training():
    geometry = WindowGeometry((5, 3), (1, 2))  # not used elsewhere: nothing is cached for it yet
    with torch.inference_mode():
        tables = [geometry.regions((11, 13)), geometry.relative_index((6, 6))]
    assert not any(t.is_inference() for t in tables)
    assert geometry.regions((11, 13)) is tables[0]
    assert geometry.relative_index((6, 6)) is tables[1]


def test_a_default_device_does_not_reach_the_tables():
    geometry = WindowGeometry((3, 5), (1, 2))
    with torch.device("meta"):
        assert geometry.relative_index().device.type == geometry.regions((9, 9)).device.type == "cpu"
    assert geometry.relative_index(device="meta").is_meta
