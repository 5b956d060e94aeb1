"""Window attention as a layer: relative positions by hand, depth one, dropout, padding."""

import pytest
import torch

from medvit.kernels import WindowGeometry
from medvit.layers.attention import RelativePositionBias, WindowAttention


def numbered_bias(window, clamp):
    """A bias whose table entry is its row number."""
    bias = RelativePositionBias(window, 1, clamp)
    bias.table.data = torch.arange(float(len(bias.table)))[:, None]
    return bias


def attention(dim, heads, geometry, seed=0, **options):
    torch.manual_seed(seed)
    layer = WindowAttention(dim, heads, geometry, **options)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer.eval()


# --- relative position bias


def test_the_table_has_a_row_per_offset_and_a_column_per_head():
    torch.manual_seed(0)
    bias = RelativePositionBias((7, 7, 7), 6)
    assert bias.table.shape == (13**3, 6)
    assert abs(bias.table.std() - 0.02) < 1e-3
    assert bias().dense(WindowGeometry.swin(7, 3)).shape == (6, 343, 343)


def test_exact_reads_true_offsets_and_prefix_the_corner_of_the_full_index():
    # window 2 x 3, so row (dh + 1) * 5 + (dw + 2); on a grid two wide the window is 2 x 2
    fitted = WindowGeometry((2, 2), (0, 0))
    exact = [[7, 6, 2, 1], [8, 7, 3, 2], [12, 11, 7, 6], [13, 12, 8, 7]]
    # the first four tokens of the full window are (0, 0), (0, 1), (0, 2), (1, 0)
    prefix = [[7, 6, 5, 2], [8, 7, 6, 3], [9, 8, 7, 4], [12, 11, 10, 7]]
    assert numbered_bias((2, 3), "exact")().dense(fitted)[0].tolist() == exact
    assert numbered_bias((2, 3), "prefix")().dense(fitted)[0].tolist() == prefix


def test_both_agree_on_the_full_window_and_on_a_window_clamped_along_the_first_axis():
    for size in ((4, 3), (2, 3), (1, 3)):  # the first tokens in raster order are then the clamped window
        fitted = WindowGeometry(size, (0, 0))
        assert torch.equal(
            numbered_bias((4, 3), "exact")().dense(fitted), numbered_bias((4, 3), "prefix")().dense(fitted)
        )


def test_heads_read_their_own_column():
    bias = RelativePositionBias((3,), 2)
    bias.table.data = torch.tensor([[0.0, 10], [1, 11], [2, 12], [3, 13], [4, 14]])
    out = bias().dense(WindowGeometry.full((3,)))
    assert out.tolist() == [[[2, 1, 0], [3, 2, 1], [4, 3, 2]], [[12, 11, 10], [13, 12, 11], [14, 13, 12]]]


def test_another_clamp_is_refused():
    with pytest.raises(ValueError, match=r"^clamp must be 'exact' or 'prefix', got 'crop'$"):
        RelativePositionBias((3,), 2, "crop")


# --- the layer


def test_heads_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"^num_heads must divide the width 12, got 5; use 4$"):
        WindowAttention(12, 5, WindowGeometry.swin(4, 2))


@pytest.mark.parametrize("clamp", ["exact", "prefix"])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 9), (2, 3)])
def test_depth_one_is_2d_with_the_same_weights(grid, shifted, clamp):
    flat = attention(12, 3, WindowGeometry.swin(4, 2, shifted=shifted), clamp=clamp)
    deep = attention(12, 3, WindowGeometry.swin((1, 4, 4), 3, shifted=shifted), seed=1, clamp=clamp)
    deep.load_state_dict(flat.state_dict())
    x = torch.randn(2, *grid, 12)
    torch.testing.assert_close(deep(x[:, None]), flat(x)[:, None], rtol=0, atol=1e-5)


def test_windows_one_slice_deep_treat_slices_as_images():
    flat = attention(12, 3, WindowGeometry.swin(4, 2, shifted=True))
    deep = attention(12, 3, WindowGeometry.swin((1, 4, 4), 3, shifted=True))
    x = torch.randn(1, 5, 7, 9, 12)
    torch.testing.assert_close(deep(x), torch.stack([flat(x[:, i]) for i in range(5)], 1), rtol=0, atol=1e-5)


def test_padding_tokens_carry_the_qkv_bias_into_attention():
    layer = attention(4, 1, WindowGeometry((2,), (0,)))
    layer.relative_bias.table.data.zero_()
    x = torch.randn(1, 3, 4)
    q, _, v = layer.qkv(x[0, 2]).split(4)
    _, k0, v0 = layer.qkv(torch.zeros(4)).split(4)
    k = layer.qkv(x[0, 2])[4:8]
    weights = (torch.stack([q @ k, q @ k0]) / 2).softmax(0)
    torch.testing.assert_close(layer(x)[0, 2], layer.proj(weights[0] * v + weights[1] * v0), rtol=0, atol=1e-5)


def test_qkv_bias_can_be_left_out():
    assert attention(4, 1, WindowGeometry((2,), (0,)), qkv_bias=False).qkv.bias is None


@pytest.mark.parametrize("option", ["attn_drop", "proj_drop"])
def test_dropout_acts_in_training_only(option):
    geometry = WindowGeometry.swin(4, 2, shifted=True)
    plain, dropping = attention(12, 3, geometry), attention(12, 3, geometry, **{option: 0.5})
    x = torch.randn(2, 7, 9, 12)
    assert torch.equal(dropping(x), plain(x))
    plain.train()
    dropping.train()
    assert torch.equal(plain(x), plain(x))
    assert not torch.allclose(dropping(x), dropping(x))


def test_every_weight_of_the_table_that_is_read_gets_a_gradient():
    layer = attention(12, 3, WindowGeometry.swin(4, 2, shifted=True))
    layer(torch.randn(1, 9, 9, 12)).square().sum().backward()
    assert (layer.relative_bias.table.grad != 0).all()


def test_forward_leaves_the_layer_as_it_was():
    layer = attention(12, 3, WindowGeometry.swin(4, 2, shifted=True))
    large, small = torch.randn(1, 9, 9, 12), torch.randn(1, 3, 2, 12)
    before = layer(large)
    layer(small)
    assert layer.geometry == WindowGeometry((4, 4), (2, 2))
    assert torch.equal(layer(large), before)
