"""D-Former's blocks against their definition, written out over real tokens only: padding has no place in it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.layers.d_former import DFormerBlock, DFormerStage, GroupAttention, PositionBlock


def randomised(module, seed=0):
    """The module in evaluation mode with every parameter away from 0 and 1, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tokens(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups_of(grid, group, interval):
    """For each token of the grid in raster order, the group it belongs to on each axis."""
    axes = []
    for length, size in zip(grid, group, strict=True):
        position = torch.arange(length)
        if interval is None:
            axes.append(position // size)
        else:
            padded = -(-length // interval) * interval
            axes.append(position % max(1, padded // size))
    return torch.stack(torch.meshgrid(axes, indexing="ij"), -1).reshape(-1, len(grid))


def attention_by_definition(layer, x, same):
    """Every pair of tokens is scored; those of different groups are forbidden."""
    q, k, v = layer.qkv(x.flatten(1, -2)).unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    logits = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).masked_fill(~same, float("-inf"))
    return layer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(-2)).reshape(x.shape)


@st.composite
def grids(draw):
    rank = draw(st.sampled_from([2, 3]))
    longest = 13 if rank == 2 else 8
    grid = tuple(draw(st.integers(1, longest)) for _ in range(rank))
    group = tuple(draw(st.integers(1, 5)) for _ in range(rank))
    return grid, group, draw(st.sampled_from([None, 1, 2, 3, 4, 8]))


@settings(max_examples=60)
@given(grids())
@torch.no_grad()
def test_attention_is_its_definition_on_any_grid(case):
    grid, group, interval = case
    layer = randomised(GroupAttention(6, 2, group, interval))
    place = groups_of(grid, group, interval)
    same = (place[:, None] == place[None, :]).all(-1)
    x = tokens(2, *grid, 6)
    torch.testing.assert_close(layer(x), attention_by_definition(layer, x, same), rtol=0, atol=2e-5)


def test_a_global_group_spans_the_grid():
    geometry = GroupAttention(4, 1, (2, 8, 8), 8).geometry((24, 32, 30))
    assert geometry.size == (2, 8, 8)
    assert geometry.dilation == (12, 4, 4)
    # 24 is a multiple of the interval; groups have 8 members though 7 were asked for, so that three times 8 covers it
    assert GroupAttention(4, 1, (7,), 8).geometry((24,)).size == (8,)


@pytest.mark.parametrize("interval", [None, 4])
def test_a_block_is_two_residuals_after_norms(interval):
    block = randomised(DFormerBlock(8, 2, (2, 3), interval, mlp_ratio=2.5))
    assert block.mlp.fc1.out_features == 20
    x = tokens(2, 5, 7, 8)
    y = x + block.attn(block.norm1(x))
    torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_positions_are_a_depthwise_convolution_and_the_tokens():
    layer = randomised(PositionBlock(2, 3))
    x = tokens(1, 4, 5, 3)
    around = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    for c in range(3):
        expected = (around[0, 2:5, 3:6, c] * layer.conv.weight[c, 0]).sum() + layer.conv.bias[c] + x[0, 2, 3, c]
        assert layer(x)[0, 2, 3, c] == pytest.approx(expected.item(), abs=1e-5)


def test_local_and_global_groups_take_turns():
    stage = DFormerStage(2, 4, 1, (3, 3), 5, [0.0, 0.1, 0.2])
    assert [block.attn.interval for block in stage.blocks] == [None, 5, None]
    assert [block.drop_path.rate for block in stage.blocks] == [0.0, 0.1, 0.2]


@pytest.mark.parametrize("interval", [1, 4, 8])
def test_a_stage_of_depth_one_is_that_of_2d(interval):
    """Not so whole networks: merging in 3D takes eight neighbours, four of them padding, into its norm."""
    flat = randomised(DFormerStage(2, 8, 2, (3, 4), interval, [0.0] * 4))
    deep = DFormerStage(3, 8, 2, (1, 3, 4), interval, [0.0] * 4).eval()
    state = flat.state_dict()
    kernel = torch.zeros(8, 1, 3, 3, 3)
    kernel[:, :, 1] = state["position.conv.weight"]
    deep.load_state_dict({**state, "position.conv.weight": kernel})
    x = tokens(2, 7, 10, 8)
    torch.testing.assert_close(deep(x[:, None]), flat(x)[:, None], rtol=0, atol=2e-5)


# --- the authors' quirks


def test_the_authors_give_up_groups_where_height_alone_is_short():
    quirky = GroupAttention(4, 1, (2, 4, 4), 2, official_quirks=True)
    assert quirky.geometry((6, 3, 9)).size == (6, 3, 9)
    assert quirky.geometry((6, 4, 3)) == GroupAttention(4, 1, (2, 4, 4), 2).geometry((6, 4, 3))
    assert GroupAttention(4, 1, (2, 4, 4)).geometry((6, 3, 9)).size == (2, 3, 4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "differs"), [((5, 8, 4), True), ((5, 7, 4), False), ((5, 8, 3), False), ((8, 8, 4), False)]
)
def test_the_authors_attend_padding_where_only_depth_is_padded(grid, differs):
    layer = randomised(GroupAttention(4, 2, (2, 2, 2), 4))
    quirky = GroupAttention(4, 2, (2, 2, 2), 4, official_quirks=True).eval()
    quirky.load_state_dict(layer.state_dict())
    x = tokens(1, *grid, 4)
    with_zeros = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 0, 0, 8 - grid[0]))
    expected = layer(with_zeros)[:, : grid[0]] if differs else layer(x)
    torch.testing.assert_close(quirky(x), expected, rtol=0, atol=1e-6)
    assert differs != torch.allclose(quirky(x), layer(x), atol=1e-3)


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"^num_heads must divide the width 8, got 3; use 2$"):
        GroupAttention(8, 3, (2, 2))


@pytest.mark.parametrize("grid", [(2, 4, 4), (2, 2), (4, 5)])
def test_gradients_of_positions_under_bfloat16(grid):
    """Where a side is 2, torch 2.15 on the CPU would return uninitialised memory."""
    layer = randomised(PositionBlock(len(grid), 16))
    x, seed = tokens(2, *grid, 16), tokens(2, *grid, 16, seed=1)
    gradients = []
    for enabled in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = layer(x)
        (out * seed).sum().backward()
        gradients.append(layer.conv.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=0.1)
