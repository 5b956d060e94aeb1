"""Windows over token grids: each method against its definition in plain Python, and against MONAI's."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvit.kernels import WindowGeometry


@st.composite
def geometries(draw, most=(40, 12, 7), plain=False):
    """A geometry of rank 1 to 3 and a grid for it, mostly ragged; not fitted. ``plain``: MONAI's, as far as it goes."""
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, 5)) for _ in range(dims))
    dilation = (1,) * dims if plain else tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(dims))
    shift = tuple(draw(st.integers(0, n * d - 1)) for n, d in zip(size, dilation, strict=True))
    grid = tuple(draw(st.integers(1, most[dims - 1])) for _ in range(dims))
    mask_padding, roll_first = (False, False) if plain else (draw(st.booleans()), draw(st.booleans()))
    return WindowGeometry(size, shift, dilation, mask_padding, roll_first), grid


def cells(sizes):
    return itertools.product(*map(range, sizes))


def members(geometry, grid):
    """For each window, for each member, per axis: (place on the rolled, padded axis, token of the grid or None)."""
    padded = geometry.padded(grid)
    tiles = [p // (n * d) for p, n, d in zip(padded, geometry.size, geometry.dilation, strict=True)]
    for tile, offset in itertools.product(list(cells(tiles)), list(cells(geometry.dilation))):
        yield [
            [token(geometry, grid, axis, tile[axis], m, offset[axis]) for axis, m in enumerate(member)]
            for member in cells(geometry.size)
        ]


def token(geometry, grid, axis, tile, member, offset):
    size, dilation, shift = geometry.size[axis], geometry.dilation[axis], geometry.shift[axis]
    length, padded = grid[axis], geometry.padded(grid)[axis]
    place = (tile * size + member) * dilation + offset
    if geometry.roll_first:
        return place, (place + shift) % length if place < length else None
    before = (place + shift) % padded
    return place, before if before < length else None


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
    expected = [
        [0 if None in (at := tuple(t for _, t in axes)) else int(x[at]) for axes in window]
        for window in members(geometry, grid)
    ]
    assert geometry.group(x[None]).tolist() == expected


@given(geometries())
def test_crop_undoes_pad(case):
    geometry, grid = case
    x = torch.randn(2, *grid, 3)
    padded = geometry.pad(x)
    assert padded.shape[1:-1] == geometry.padded(grid)
    assert torch.equal(geometry.crop(padded, grid), x)
    assert torch.equal(geometry.group(padded), geometry.group(x))  # a layer may pad by itself


def test_rolling_first_puts_the_padding_behind_the_wrapped_tokens():
    x = torch.tensor([[1, 2, 3, 4, 5]])
    assert WindowGeometry.swin(4, 1, shifted=True).group(x).tolist() == [[3, 4, 5, 0], [0, 0, 1, 2]]
    rolled_first = WindowGeometry.swin(4, 1, shifted=True, roll_first=True)
    assert rolled_first.group(x).tolist() == [[3, 4, 5, 1], [2, 0, 0, 0]]


def test_dilated_groups_take_every_nth_token():
    assert WindowGeometry((2,), (0,), (3,)).group(torch.arange(6)[None]).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_images_of_a_batch_follow_each_other():
    geometry = WindowGeometry((2,), (1,))
    x = torch.tensor([[0, 1, 2, 3], [10, 11, 12, 13]])
    assert geometry.group(x).tolist() == [[1, 2], [3, 0], [11, 12], [13, 10]]


def test_padding_is_zero_and_at_the_end():
    x = torch.tensor([[[1, 2, 3]]])
    assert WindowGeometry((2, 2), (0, 0)).pad(x).tolist() == [[[1, 2, 3, 0], [0, 0, 0, 0]]]
    assert WindowGeometry((1, 3), (0, 0)).pad(x) is x
    assert WindowGeometry((2, 2), (0, 0)).padded((1, 3)) == (2, 4)


# --- D-Former's groups


@given(st.integers(1, 6), st.integers(1, 9), st.lists(st.integers(1, 30), min_size=1, max_size=3))
def test_global_groups_span_the_grid(group, interval, grid):
    geometry = WindowGeometry.dformer_global(group, interval, grid)
    for length, size, dilation, period in zip(grid, geometry.size, geometry.dilation, geometry.period, strict=True):
        assert dilation == max(1, -(-length // interval) * interval // group)
        assert length <= period < length + interval + dilation  # one tile covers the axis, with little padding
        assert size >= group or dilation == 1
    assert all(w == d for w, d in zip(geometry.windows(grid), geometry.dilation, strict=True))


def test_an_interval_below_one_is_refused():
    with pytest.raises(ValueError, match="the interval of global groups must be at least 1, got 0"):
        WindowGeometry.dformer_global(2, 0, (4, 4))


# --- regions


@given(geometries(most=(12, 7, 5)))
def test_regions_part_what_the_roll_brought_together(case):
    geometry, grid = case
    regions, padded = geometry.regions(grid), geometry.padded(grid)
    assert regions.dtype == torch.int64
    for row, window in zip(regions.tolist(), members(geometry, grid), strict=True):
        # bit a: the place lies among the last ``shift`` of axis a, which the roll brought there from its front
        expected = [
            sum(2**a for a, (place, _) in enumerate(axes) if place >= padded[a] - geometry.shift[a]) for axes in window
        ]
        if geometry.mask_padding:
            expected = [-1 if None in [t for _, t in axes] else e for e, axes in zip(expected, window, strict=True)]
        assert row == expected
    assert geometry.is_masked(grid) or not regions.any()


def test_without_shift_there_is_one_region():
    assert not WindowGeometry.swin(4, 3).regions((9, 8, 7)).any()


@pytest.mark.upstream
@given(geometries(plain=True))
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


@pytest.mark.upstream
@pytest.mark.parametrize("window", [(7, 7), (3, 5), (8, 4)])
def test_relative_index_is_timms(window):
    from timm.models.swin_transformer import WindowAttention

    timm = WindowAttention(4, 2, window_size=window)
    assert torch.equal(WindowGeometry.swin(window, 2).relative_index(), timm.relative_position_index)


@pytest.mark.upstream
@pytest.mark.parametrize(("grid", "window"), [((14, 14), 7), ((8, 16), 4), ((9, 6), 3)])
def test_regions_forbid_what_timms_mask_forbids(grid, window):
    from timm.models.swin_transformer import SwinTransformerBlock

    shift = window // 2
    timm = SwinTransformerBlock(4, grid, 2, window_size=window, shift_size=shift).attn_mask
    regions = WindowGeometry.swin(window, 2, shifted=True).fit(grid).regions(grid)
    assert torch.equal(regions[:, :, None] != regions[:, None, :], timm != 0)


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
        (
            lambda: WindowGeometry((4, 4), (0,)),
            "size, shift and dilation need one entry per axis, got size=(4, 4), shift=(0,), dilation=(1, 1)",
        ),
        (
            lambda: WindowGeometry((), ()),
            "size, shift and dilation need one entry per axis, got size=(), shift=(), dilation=()",
        ),
        (
            lambda: WindowGeometry((4, 0), (0, 0)),
            "window size and dilation must be at least 1 on every axis, got (4, 0) and (1, 1)",
        ),
        (
            lambda: WindowGeometry((4,), (0,), (0,)),
            "window size and dilation must be at least 1 on every axis, got (4,) and (0,)",
        ),
        (
            lambda: WindowGeometry((4,), (4,)),
            "shift must lie in [0, size * dilation) on every axis, got shift=(4,) for size=(4,)",
        ),
        (
            lambda: WindowGeometry((4,), (-1,)),
            "shift must lie in [0, size * dilation) on every axis, got shift=(-1,) for size=(4,)",
        ),
        (
            lambda: WindowGeometry((4, 4), (0, 0), stride=(2,)),
            "stride must lie in [1, size] on every axis, got stride=(2,) for size=(4, 4)",
        ),
        (
            lambda: WindowGeometry.neighborhood(4, 1, stride=5),
            "stride must lie in [1, size] on every axis, got stride=(5,) for size=(4,)",
        ),
        (
            lambda: WindowGeometry((4,), (1,), stride=(2,)),
            "neighbourhoods are neither shifted nor padded: leave shift, mask_padding and roll_first",
        ),
        (
            lambda: WindowGeometry.neighborhood(4, 2, dilation=(1, 3)).fit((3, 11)),
            "neighbourhoods need size * dilation tokens on every axis, here (3, 12), got grid=(3, 11); "
            "use a dilation up to (1, 2)",
        ),
        (
            lambda: WindowGeometry.neighborhood(3, 1).group(torch.zeros(1, 9, 2)),
            "neighbourhoods overlap and cannot be grouped; use windowed_attention",
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
