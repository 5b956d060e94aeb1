"""Patches and merging: orders as numbers, since weights are tied to them."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medvit.layers.patch import PatchEmbed, PatchExpand, PatchMerging, merging_offsets


def bare(module):
    """A merging layer that only concatenates."""
    module.norm = module.reduction = nn.Identity()
    return module


def numbered(*grid):
    """A grid of one channel whose token at (d, h, w) is 100 d + 10 h + w."""
    x = torch.zeros(grid)
    for axis, n in enumerate(grid):
        x = x * 10 + torch.arange(float(n)).reshape([-1 if a == axis else 1 for a in range(len(grid))])
    return x[None, ..., None]


def legacy_of_monai_before_1_5(x):
    """The eight sub-grids of MONAI 0.9 to 1.4, written out: two occur twice, (1, 1, 0) and (0, 1, 1) never."""
    d, h, w = x.shape[1:-1]
    x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
    x0 = x[:, 0::2, 0::2, 0::2, :]
    x1 = x[:, 1::2, 0::2, 0::2, :]
    x2 = x[:, 0::2, 1::2, 0::2, :]
    x3 = x[:, 0::2, 0::2, 1::2, :]
    x4 = x[:, 1::2, 0::2, 1::2, :]
    x5 = x[:, 0::2, 1::2, 0::2, :]
    x6 = x[:, 0::2, 0::2, 1::2, :]
    x7 = x[:, 1::2, 1::2, 1::2, :]
    return torch.cat([x0, x1, x2, x3, x4, x5, x6, x7], -1)


@pytest.mark.parametrize(
    ("spatial_dims", "order", "expected"),
    [
        (3, "merging", [0, 100, 10, 1, 110, 101, 11, 111]),
        (3, "mergingv2", [0, 1, 10, 11, 100, 101, 110, 111]),
        (3, "merging_legacy", [0, 100, 10, 1, 101, 10, 1, 111]),
        (2, "merging", [0, 10, 1, 11]),
        (2, "mergingv2", [0, 10, 1, 11]),
        (2, "merging_legacy", [0, 10, 1, 11]),
        (1, "merging", [0, 1]),
    ],
)
def test_neighbours_are_concatenated_in_the_order_of_that_name(spatial_dims, order, expected):
    merge = bare(PatchMerging(spatial_dims, 1, order))
    assert merge(numbered(*[2] * spatial_dims)).flatten().tolist() == expected


def test_odd_sides_are_padded_at_the_end():
    merged = bare(PatchMerging(2, 1))(numbered(3, 3))
    assert merged.shape == (1, 2, 2, 4)
    assert merged[0].flatten(0, 1).tolist() == [[0, 10, 1, 11], [2, 12, 0, 0], [20, 0, 21, 0], [22, 0, 0, 0]]


@pytest.mark.parametrize("grid", [(4, 2, 6), (5, 4, 3), (1, 3, 7)])
def test_the_legacy_order_is_that_of_monai_before_1_5(grid):
    x = torch.randn(2, *grid, 3)
    assert torch.equal(bare(PatchMerging(3, 3, "merging_legacy"))(x), legacy_of_monai_before_1_5(x))


@pytest.mark.upstream
@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (4, 2, 6), (5, 4, 3), (1, 3, 7)])
@pytest.mark.parametrize("order", ["merging", "mergingv2"])
def test_merging_is_monais(order, grid):
    from monai.networks.nets.swin_unetr import MERGING_MODE

    torch.manual_seed(0)
    monai = MERGING_MODE[order](5, spatial_dims=len(grid))
    nn.init.normal_(monai.norm.weight)
    nn.init.normal_(monai.norm.bias)
    ours = PatchMerging(len(grid), 5, order)
    ours.load_state_dict(monai.state_dict())
    x = torch.randn(2, *grid, 5)
    torch.testing.assert_close(ours(x), monai(x), rtol=0, atol=1e-6)


def test_the_orders_differ_where_it_matters():
    assert len({merging_offsets(3, order) for order in ("merging", "mergingv2", "merging_legacy")}) == 3
    assert len({merging_offsets(2, order) for order in ("merging", "mergingv2", "merging_legacy")}) == 1


def test_another_order_is_refused():
    message = r"^merging order must be one of \('merging', 'mergingv2', 'merging_legacy'\), got 'timm'$"
    with pytest.raises(ValueError, match=message):
        PatchMerging(3, 4, "timm")


# --- patch embedding


@pytest.mark.parametrize(
    ("spatial", "patch"), [((7,), (2,)), ((7, 9), (2, 4)), ((5, 6, 7), (2, 3, 4)), ((4, 8), (2, 4))]
)
@pytest.mark.parametrize("norm", [False, True])
def test_a_patch_is_a_linear_map_of_its_voxels_and_zeros_beyond_the_edge(spatial, patch, norm):
    torch.manual_seed(0)
    embed = PatchEmbed(len(spatial), 3, 8, patch, norm=norm)
    x = torch.randn(2, 3, *spatial)
    grid = tuple(-(-n // p) for n, p in zip(spatial, patch, strict=True))
    canvas = torch.zeros(2, 3, *[g * p for g, p in zip(grid, patch, strict=True)])
    canvas[(..., *[slice(n) for n in spatial])] = x
    out = embed(x)
    assert out.shape == (2, *grid, 8)
    for cell in ((0,) * len(grid), tuple(g - 1 for g in grid)):
        voxels = canvas[(..., *[slice(c * p, c * p + p) for c, p in zip(cell, patch, strict=True)])].flatten(1)
        token = F.linear(voxels, embed.proj.weight.flatten(1), embed.proj.bias)
        token = F.layer_norm(token, (8,)) if norm else token
        torch.testing.assert_close(out[(slice(None), *cell)], token, rtol=0, atol=1e-5)


def test_patches_of_depth_one_are_those_of_2d():
    flat, deep = PatchEmbed(2, 3, 8, (2, 4)), PatchEmbed(3, 3, 8, (1, 2, 4))
    deep.load_state_dict({k: v.unsqueeze(2) if k == "proj.weight" else v for k, v in flat.state_dict().items()})
    x = torch.randn(2, 3, 7, 9)
    torch.testing.assert_close(deep(x[:, :, None]), flat(x)[:, None], rtol=0, atol=1e-6)


# --- patch expanding


@pytest.mark.parametrize(
    ("grid", "factor"), [((3,), (4,)), ((3, 2), (2, 5)), ((2, 3, 4), (2, 2, 2)), ((1, 2, 1), (1, 3, 2))]
)
def test_a_token_becomes_a_box_in_raster_order_channels_fastest(grid, factor):
    torch.manual_seed(0)
    expand = PatchExpand(6, 5, factor)
    nn.init.normal_(expand.norm.weight)
    nn.init.normal_(expand.norm.bias)
    x = torch.randn(2, *grid, 6)
    out = expand(x)
    assert out.shape == (2, *[n * f for n, f in zip(grid, factor, strict=True)], 5)
    for row, offset in enumerate(product(*map(range, factor))):
        weight = expand.expand.weight[5 * row : 5 * row + 5]
        expected = F.layer_norm(x @ weight.T, (5,), expand.norm.weight, expand.norm.bias)
        got = out[(slice(None), *[slice(o, None, f) for o, f in zip(offset, factor, strict=True)])]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_expanding_by_depth_one_is_that_of_2d():
    flat, deep = PatchExpand(8, 4, (2, 3)), PatchExpand(8, 4, (1, 2, 3))
    deep.load_state_dict(flat.state_dict())
    x = torch.randn(2, 3, 4, 8)
    torch.testing.assert_close(deep(x[:, None]), flat(x)[:, None], rtol=0, atol=1e-6)
