"""Images of two ranks to tokens and positions: each rank by its own weights, nothing by the other's."""

import re

import pytest
import torch
from torch.nn import functional as F

from medvit.layers.position import resize_position, sincos_position
from medvit.layers.unified_patch import UnifiedPatchEmbed, UnifiedPosition

PATCH = {2: (4, 3), 3: (4, 3, 2)}


def embedding():
    torch.manual_seed(0)
    return UnifiedPatchEmbed({2: 3, 3: 1}, 8, PATCH)


@pytest.mark.parametrize("spatial", [(8, 6), (11, 8), (8, 6, 4), (9, 7, 5), (4, 3, 2)])
def test_a_token_is_a_linear_map_of_its_patch_and_remainders_are_left_out(spatial):
    embed, rank = embedding(), len(spatial)
    x = torch.randn(2, embed.in_channels[rank], *spatial)
    grid = tuple(n // p for n, p in zip(spatial, PATCH[rank], strict=True))
    tokens = embed(x)
    assert tokens.shape == (2, *grid, 8)
    assert embed.grid(x) == grid
    for cell in ((0,) * rank, tuple(g - 1 for g in grid)):
        voxels = x[(..., *[slice(c * p, c * p + p) for c, p in zip(cell, PATCH[rank], strict=True)])].flatten(1)
        token = F.linear(voxels, embed[str(rank)].weight.flatten(1), embed[str(rank)].bias)
        torch.testing.assert_close(tokens[(slice(None), *cell)], token, rtol=0, atol=1e-5)


def test_the_ranks_share_no_weights():
    embed = embedding()
    embed(torch.randn(2, 1, 8, 6, 4)).square().sum().backward()
    assert [name for name, p in embed.named_parameters() if p.grad is not None] == ["3.weight", "3.bias"]


def test_a_volume_of_depth_one_has_the_tokens_of_its_slice():
    embed = UnifiedPatchEmbed({2: 3, 3: 3}, 8, {2: (4, 3), 3: (4, 3, 1)})
    embed["3"].load_state_dict({"weight": embed["2"].weight[..., None], "bias": embed["2"].bias})
    x = torch.randn(2, 3, 8, 9)
    torch.testing.assert_close(embed(x[..., None]), embed(x)[..., None, :], rtol=0, atol=1e-6)


TAKES = "this network takes images (B, 3, 2 spatial axes) or (B, 1, 3 spatial axes), got shape "


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1, 8, 6), TAKES + "(1, 1, 8, 6)"),
        ((1, 3, 8, 6, 4), TAKES + "(1, 3, 8, 6, 4)"),
        ((3, 8), TAKES + "(3, 8)"),
        ((1, 1, 8, 6, 4, 2), TAKES + "(1, 1, 8, 6, 4, 2)"),
        ((1, 3, 8, 2), "no side may be smaller than the patch (4, 3), got (8, 2); pad the image"),
        ((1, 1, 8, 6, 1), "no side may be smaller than the patch (4, 3, 2), got (8, 6, 1); pad the image"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        embedding()(torch.zeros(shape))


# --- positions


def test_tables_are_frozen_sine_cosine_ones_and_resized_to_the_grid_that_comes():
    position = UnifiedPosition(24, {2: (3, 4), 3: (3, 4, 2)})
    for grid in ((3, 4), (3, 4, 2)):
        assert torch.equal(position(grid), sincos_position(24, grid))
        other = tuple(2 * n for n in grid)
        assert torch.equal(position(other), resize_position(sincos_position(24, grid), grid, other))
    assert not any(p.requires_grad for p in position.parameters())
    assert sorted(position.state_dict()) == ["2", "3"]


def test_a_table_can_be_zero_for_one_rank():
    position = UnifiedPosition(24, {2: (3, 4), 3: (3, 4, 2)}, zero=(3,))
    assert not position((3, 4, 2)).any()
    assert position((3, 4)).any()
