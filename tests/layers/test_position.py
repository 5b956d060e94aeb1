"""Position tables: values from the definition, resizing against torch's bicubic and against itself in other ranks."""

import math
import re

import pytest
import torch
from torch.nn import functional as F

from medvit.layers.position import resize_position, sincos_position


def table(grid, dim=6, prefix=1, seed=0):
    return torch.randn(1, prefix + math.prod(grid), dim, generator=torch.Generator().manual_seed(seed))


def as_map(table, grid, prefix=1):
    return table[0, prefix:].T.reshape(1, -1, *grid)


# --- sincos


@pytest.mark.parametrize(("dim", "grid"), [(8, (5,)), (8, (3, 4)), (12, (2, 3, 4)), (16, (3, 2, 2)), (10, (2, 5))])
def test_each_axis_has_sines_then_cosines_of_its_index_last_axis_first(dim, grid):
    rank = len(grid)
    m = dim // (2 * rank)
    out = sincos_position(dim, grid, prefix=0)
    assert out.shape == (1, math.prod(grid), dim)
    assert out.dtype == torch.float32
    for row, index in zip(out[0].tolist(), torch.cartesian_prod(*[torch.arange(n) for n in grid]), strict=True):
        expected = []
        for i in reversed(index.reshape(rank).tolist()):
            angles = [i * 10000 ** (-k / m) for k in range(m)]
            expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        assert row == pytest.approx(expected + [0.0] * (dim - 2 * m * rank), abs=1e-7)


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_prefix_rows_are_zero(prefix):
    out = sincos_position(8, (2, 3), prefix)
    assert out.shape == (1, prefix + 6, 8)
    assert not out[:, :prefix].any()
    assert out[:, prefix:].square().sum(-1).allclose(torch.tensor(4.0))  # sin² + cos² of four frequencies


@pytest.mark.parametrize(("dim", "unused"), [(768, 0), (1024, 4), (512, 2)])
def test_published_widths_work_in_3d(dim, unused):
    out = sincos_position(dim, (2, 3, 2))
    assert (out.abs().sum((0, 1)) == 0).sum() == unused
    assert out[0, 1:].unique(dim=0).shape[0] == 12  # no two places alike


def test_values_exist_on_the_meta_device_too():
    with torch.device("meta"):
        out = sincos_position(8, (2, 2))
    assert torch.equal(out, sincos_position(8, (2, 2)))


def test_too_few_channels_are_refused():
    message = "a sin-cos table needs 2 channels per axis, so 6 for 3 axes, got dim=5"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        sincos_position(5, (2, 2, 2))
    assert sincos_position(6, (2, 2, 2)).shape == (1, 9, 6)


# --- resizing


@pytest.mark.parametrize("new", [(7, 7), (3, 3), (4, 9), (2, 5), (1, 1)])
@pytest.mark.parametrize(("offset", "scale"), [(None, None), (0.1, 0.1)])
def test_2d_is_torchs_bicubic(new, offset, scale):
    old = (4, 5)
    source = table(old, prefix=2)
    how = {"size": new} if scale is None else {"scale_factor": [(n + scale) / o for n, o in zip(new, old, strict=True)]}
    expected = F.interpolate(as_map(source, old, 2), **how, mode="bicubic", align_corners=False)
    out = resize_position(source, old, new, prefix=2, offset=offset)
    assert torch.equal(out[:, :2], source[:, :2])
    torch.testing.assert_close(as_map(out, new, 2), expected, rtol=0, atol=2e-6)


def test_the_offset_changes_values():
    source = table((4, 4))
    assert (
        resize_position(source, (4, 4), (6, 6), offset=0.1) - resize_position(source, (4, 4), (6, 6))
    ).abs().max() > 0.01


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_axis_of_length_one_makes_3d_the_2d_case(axis):
    old, new = [4, 5], [6, 3]
    flat = resize_position(table(old), old, new)
    old.insert(axis, 1)
    new.insert(axis, 1)
    torch.testing.assert_close(resize_position(table(old), old, new), flat, rtol=0, atol=1e-6)


def test_a_table_that_varies_along_one_axis_resizes_along_it_alone():
    line = table((4,), prefix=0)
    volume = line[0, :, None].expand(4, 6, 6).reshape(1, 24, 6)  # (4, 2, 3) tokens
    out = resize_position(volume, (4, 2, 3), (7, 5, 2), prefix=0)[0].reshape(7, 10, 6)
    expected = resize_position(line, (4,), (7,), prefix=0)[0]
    torch.testing.assert_close(out, expected[:, None].expand(7, 10, 6), rtol=0, atol=1e-6)


def test_there_is_no_antialiasing():
    stripes = torch.tensor([1.0, -1.0] * 8)[None, :, None]
    assert resize_position(stripes, (16,), (4,), prefix=0).abs().max() < 1e-6  # the middle between two stripes
    assert resize_position(stripes, (16,), (5,), prefix=0).abs().max() > 0.5


def test_equal_grids_give_the_table_itself():
    source = table((2, 3, 4))
    assert resize_position(source, (2, 3, 4), [2, 3, 4]) is source


def test_resizing_is_in_float32_and_keeps_the_dtype_and_gradients():
    source = table((3, 3)).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resize_position(source, (3, 3), (5, 4))
    assert torch.equal(out, resize_position(source.float(), (3, 3), (5, 4)).bfloat16())
    out.sum().backward()
    assert (source.grad != 0).all()


@pytest.mark.parametrize(("old", "new"), [((3, 3), (4, 4)), ((2, 4), (2, 2, 2))])
def test_a_table_of_another_grid_is_refused(old, new):
    message = (
        f"a table for 1 prefix rows and a grid of {old} has {1 + math.prod(old)} rows and resizes to a grid of 2 axes, "
        f"got 9 rows and a new grid of {new}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        resize_position(table((2, 4)), old, new)
