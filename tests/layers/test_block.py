"""Transformer blocks, against their formulas and against MONAI's."""

import pytest
import torch
from torch.nn import functional as F

from medvit.kernels import WindowGeometry
from medvit.layers.block import EFFN, DropPath, Mlp, SwinBlock


def randomised(module, seed=0):
    """The module in evaluation mode with every parameter away from 0 and 1, norms included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def test_mlp_is_linear_exact_gelu_linear():
    mlp = randomised(Mlp(6, 10))
    x = torch.randn(2, 3, 6)
    hidden = x @ mlp.fc1.weight.T + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.T + mlp.fc2.bias, rtol=0, atol=1e-5)


def test_effn_convolves_the_hidden_tokens_before_the_activation():
    effn = randomised(EFFN(2, 6, 10))
    x = torch.randn(2, 5, 7, 6)
    hidden = (x @ effn.fc1.weight.T + effn.fc1.bias).permute(0, 3, 1, 2)
    hidden = F.conv2d(hidden, effn.depthwise.weight, effn.depthwise.bias, padding=1, groups=10)
    hidden = F.conv2d(hidden, effn.pointwise.weight, effn.pointwise.bias).permute(0, 2, 3, 1)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(effn(x), hidden @ effn.fc2.weight.T + effn.fc2.bias, rtol=0, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_block_with_effn_takes_the_rank_of_its_windows(rank):
    block = randomised(SwinBlock(6, 2, WindowGeometry.swin(3, rank, shifted=True), mlp_ratio=2.0, mlp="effn"))
    x = torch.randn(2, *[5, 4, 7][:rank], 6)
    y = x + block.attn(F.layer_norm(x, (6,), block.norm1.weight, block.norm1.bias))
    y = y + block.mlp(F.layer_norm(y, (6,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-5)


def test_another_mlp_is_refused():
    with pytest.raises(ValueError, match=r"^mlp must be 'mlp' or 'effn', got 'conv'$"):
        SwinBlock(6, 2, WindowGeometry.swin(3, 2), mlp="conv")


# --- stochastic depth


def test_drop_path_drops_whole_samples_and_keeps_the_expectation():
    torch.manual_seed(0)
    out = DropPath(0.3).train()(torch.ones(20000, 2, 3))
    per_sample = out[:, 0, 0]
    assert torch.equal(out, per_sample[:, None, None].expand_as(out))
    assert per_sample.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert abs(out.mean() - 1) < 0.02


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero():
    x = torch.randn(4, 3)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5])
def test_drop_path_refuses_rates_that_would_leave_nothing(rate):
    with pytest.raises(ValueError, match=rf"^a drop-path rate must lie in \[0, 1\), got {rate}$"):
        DropPath(rate)


# --- Swin block


def test_a_block_is_two_residuals_after_norms():
    block = randomised(SwinBlock(12, 3, WindowGeometry.swin(4, 2, shifted=True), mlp_ratio=2.5))
    assert block.mlp.fc1.out_features == 30
    x = torch.randn(2, 7, 9, 12)
    y = x + block.attn(F.layer_norm(x, (12,), block.norm1.weight, block.norm1.bias))
    y = y + block.mlp(F.layer_norm(y, (12,), block.norm2.weight, block.norm2.bias))
    torch.testing.assert_close(block(x), y, rtol=0, atol=1e-5)


def test_drop_path_of_a_block_drops_both_branches():
    torch.manual_seed(0)
    block = SwinBlock(4, 1, WindowGeometry((2,), (0,)), drop_path=0.5).train()
    x = torch.randn(400, 4, 4)
    untouched = (block(x) == x).flatten(1).all(1).float().mean()
    assert abs(untouched - 0.25) < 0.08


@pytest.mark.parametrize("shifted", [False, True])
def test_depth_one_is_2d_with_the_same_weights(shifted):
    flat = randomised(SwinBlock(12, 3, WindowGeometry.swin(4, 2, shifted=shifted)))
    deep = SwinBlock(12, 3, WindowGeometry.swin((1, 4, 4), 3, shifted=shifted)).eval()
    deep.load_state_dict(flat.state_dict())
    x = torch.randn(2, 7, 9, 12)
    torch.testing.assert_close(deep(x[:, None]), flat(x)[:, None], rtol=0, atol=1e-5)


def monais_name(key):
    return key.replace("mlp.fc", "mlp.linear").replace("relative_bias.table", "relative_position_bias_table")


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("window", "grid"),
    [
        ((4, 4), (8, 8)),
        ((4, 4), (7, 10)),
        ((3, 5), (2, 11)),
        ((7, 7), (6, 6)),
        ((2, 3, 4), (5, 5, 5)),
        ((4, 4, 4), (3, 9, 4)),
        ((4, 3, 2), (3, 2, 1)),
    ],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_block_is_monais(window, grid, shifted):
    from monai.networks.nets.swin_unetr import SwinTransformerBlock, compute_mask, get_window_size

    geometry = WindowGeometry.swin(window, len(window), shifted=shifted)
    ours = randomised(SwinBlock(12, 3, geometry, clamp="prefix"))
    monai = SwinTransformerBlock(12, 3, window, geometry.shift).eval()
    state = {monais_name(k): v for k, v in ours.state_dict().items()}
    missing, unexpected = monai.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["attn.relative_position_index"], [])
    size, shift = get_window_size(grid, window, geometry.shift)
    mask = compute_mask([-(-g // n) * n for g, n in zip(grid, size, strict=True)], size, shift, "cpu")
    x = torch.randn(2, *grid, 12)
    torch.testing.assert_close(ours(x), monai(x, mask), rtol=0, atol=1e-5)
