"""Instance norm over its input against torch's, forward and backward, and what it does to memory."""

import re

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medvit.layers import norm
from medvit.layers.norm import channels_last, instance_norm_act

SHAPES = [(2, 5, 11), (1, 3, 4, 7), (3, 4, 5, 6), (2, 3, 4, 5, 6), (1, 1, 2, 1, 1)]
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 0.05}


def plain(x, residual, slope):
    """The definition, in float64."""
    x = F.instance_norm(x.double())
    return F.leaky_relu(x if residual is None else x + residual.double(), slope)


def draw(*shape, seed=0, dtype=torch.float64):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (3 * x + torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))).to(dtype)  # other means, other channels


@pytest.fixture(params=[1, 2**19])
def slab(request, monkeypatch):
    """A voxel at a time, or a map this small at once."""
    monkeypatch.setattr(norm, "_SLAB", request.param)


@pytest.mark.usefixtures("slab")
@pytest.mark.parametrize("layout", [channels_last, torch.clone])
@pytest.mark.parametrize("slope", [0.01, 1])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape, dtype, added, slope, layout):
    x, residual = draw(*shape, dtype=dtype).requires_grad_(), draw(*shape, seed=1, dtype=dtype).requires_grad_()
    weight = draw(*shape, seed=2, dtype=dtype)
    sources = (x, residual) if added else (x,)
    golden = plain(x, residual if added else None, slope)
    expected = torch.autograd.grad((golden * weight.double()).sum(), sources)
    out = instance_norm_act(layout(x * 1), residual if added else None, slope)
    found = torch.autograd.grad((out * weight).sum(), sources)
    assert out.dtype == dtype
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(out.double(), golden, rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(found, expected, strict=True):
        scale = wanted.abs().max().item()
        torch.testing.assert_close(gradient.double(), wanted.double(), rtol=tolerance, atol=tolerance * (1 + scale))


@pytest.mark.usefixtures("slab")
@pytest.mark.parametrize("added", [False, True])
def test_gradients_are_those_of_finite_differences(added):
    x, residual = draw(2, 3, 4, 3).requires_grad_(), draw(2, 3, 4, 3, seed=1).requires_grad_()

    def function(x, residual):
        return instance_norm_act(channels_last(x * 1), residual if added else None, 0.2)

    assert torch.autograd.gradcheck(function, (x, residual))


def test_a_map_that_is_channels_last_is_overwritten_and_any_other_kept():
    x = draw(2, 3, 4, 5)
    kept, overwritten = x.clone(), channels_last(x)
    assert instance_norm_act(overwritten) is overwritten
    out = instance_norm_act(x)
    assert torch.equal(x, kept)
    assert torch.equal(out, overwritten)
    assert channels_last(out) is out


def test_what_the_backward_pass_keeps_is_the_output_and_the_residual():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x, residual = channels_last(draw(1, 3, 8, 8).requires_grad_() * 1), channels_last(draw(1, 3, 8, 8))
        kept.clear()
        out = instance_norm_act(x, residual)
    maps = {t.data_ptr() for t in kept if t.numel() == out.numel()}
    assert maps == {out.data_ptr(), residual.data_ptr()}


def test_writing_over_the_output_is_noticed():
    x = draw(1, 3, 4, 4).requires_grad_()
    out = instance_norm_act(channels_last(x * 1))
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_large_constant_background_spoils_no_statistics():
    # summed up one after the other in float32, a million equal numbers are off by several per mille
    x = torch.full((1, 2, 1, 1 << 20), 0.0123)
    x[..., :1000] = draw(1, 2, 1, 1000, dtype=torch.float32)
    torch.testing.assert_close(instance_norm_act(x.clone()).double(), plain(x, None, 0.01), rtol=1e-4, atol=1e-5)


def test_an_offset_far_beyond_the_deviation_spoils_no_statistics():
    x = draw(1, 2, 16, 16, dtype=torch.float32) + 1000
    torch.testing.assert_close(instance_norm_act(x.clone()).double(), plain(x, None, 0.01), rtol=0, atol=1e-3)


def test_epsilon_is_that_of_the_layer():
    x = draw(2, 3, 4, 5)
    found = instance_norm_act(x.clone(), slope=1, eps=0.5)
    torch.testing.assert_close(found, nn.InstanceNorm2d(3, eps=0.5)(x))


@pytest.mark.parametrize("shape", SHAPES)
def test_channels_last_is_a_layout_and_changes_no_value(shape):
    x = draw(*shape)
    out = channels_last(x)
    assert torch.equal(out, x)
    assert out.movedim(1, -1).is_contiguous()
    assert out.stride(1) == 1
    assert channels_last(out) is out


def test_one_channel_is_last_where_its_stride_says_so():
    x = torch.zeros(2, 1, 3, 4)
    assert channels_last(x).stride() == (12, 1, 4, 1)
    assert channels_last(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3, 4), {"slope": 0}, "slope must be positive, got 0; use 0.01, or 1 for no activation"),
        ((2, 3, 1, 1), {}, "instance norm needs maps of two voxels or more, got shape (2, 3, 1, 1)"),
        (
            (2, 3, 4, 4),
            {"residual": torch.zeros(2, 1, 4, 4)},
            "residual must have the shape of x, (2, 3, 4, 4), got (2, 1, 4, 4)",
        ),
    ],
)
def test_what_does_not_fit_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        instance_norm_act(torch.zeros(shape), **options)
