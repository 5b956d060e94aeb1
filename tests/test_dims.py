"""The one switch between ranks."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medvit import dims


@pytest.mark.parametrize(
    ("value", "spatial_dims", "expected"),
    [
        (7, 3, (7, 7, 7)),
        (np.int64(7), 2, (7, 7)),
        ([4, 5], 2, (4, 5)),
        (torch.Size((1, 2, 3)), 3, (1, 2, 3)),
        (np.array([6, 7]), 2, (6, 7)),
        ([3], 1, (3,)),
    ],
)
def test_ntuple_repeats_one_number_and_keeps_a_sequence_of_the_right_length(value, spatial_dims, expected):
    entries = dims.ntuple(value, spatial_dims)
    assert entries == expected
    assert all(type(entry) is int for entry in entries)


@pytest.mark.parametrize("value", [(7, 7), (7, 7, 7, 7), (), 2.5, (7, 7, 2.5), "777", None])
def test_ntuple_refuses_other_lengths_and_anything_but_integers(value):
    with pytest.raises(ValueError, match=r"^window_size needs one int or 3 of them, got "):
        dims.ntuple(value, 3, "window_size")


@pytest.mark.parametrize("value", [0, (7, 7, 0), (-1, 7, 7)])
def test_ntuple_refuses_sizes_below_one(value):
    with pytest.raises(ValueError, match=r"^patch_size must be at least 1 on every axis, got "):
        dims.ntuple(value, 3, "patch_size")


@pytest.mark.parametrize("spatial_dims", [1, 2, 3])
def test_layers_have_the_rank_asked_for(spatial_dims):
    x = torch.randn(2, 3, *(4, 6, 8)[:spatial_dims])
    assert isinstance(dims.conv(spatial_dims, 3, 5, 3, padding=1), getattr(nn, f"Conv{spatial_dims}d"))
    assert dims.conv(spatial_dims, 3, 5, 3, padding=1)(x).shape == (2, 5, *x.shape[2:])
    assert dims.conv_transpose(spatial_dims, 3, 5, 2, stride=2)(x).shape == (2, 5, *[2 * n for n in x.shape[2:]])
    assert type(dims.instance_norm(spatial_dims, 3)) is getattr(nn, f"InstanceNorm{spatial_dims}d")
    assert type(dims.batch_norm(spatial_dims, 3)) is getattr(nn, f"BatchNorm{spatial_dims}d")
    ramp = torch.arange(4.0).reshape(1, 1, 4, *[1] * (spatial_dims - 1))
    up = F.interpolate(
        ramp,
        scale_factor=(2.0,) + (1.0,) * (spatial_dims - 1),
        mode=dims.interpolation(spatial_dims),
        align_corners=False,
    )
    torch.testing.assert_close(up.flatten(), torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3]))


@pytest.mark.parametrize(
    "make", [dims.conv, dims.conv_transpose, dims.instance_norm, dims.batch_norm, dims.interpolation]
)
def test_other_ranks_are_refused(make):
    with pytest.raises(ValueError, match=r"^spatial_dims must be one of \[1, 2, 3\], got 4$"):
        make(4)


def gradients_in_bfloat16(layer, x):
    """Output and gradients under autocast, of memory that was last used for NaN."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    towards = torch.linspace(-1, 1, out.numel()).reshape(out.shape).bfloat16()
    used = [torch.full((n,), torch.nan, dtype=torch.bfloat16) for n in (1_000, 20_000, 300_000)]
    del used
    return out, *torch.autograd.grad(out, [x, *layer.parameters()], towards)


@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((2, 4, 2), {"kernel_size": 3, "padding": 1}),
        ((2, 2, 2), {"kernel_size": 3, "padding": 1, "bias": False}),
        ((4, 5, 5), {"kernel_size": 5, "padding": 2}),
        ((6, 6, 2), {"kernel_size": 2, "stride": 2}),
        ((4, 6, 6), {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 16}),
    ],
)
@pytest.mark.parametrize("cast", [False, True])
def test_a_3d_convolution_of_small_maps_in_bfloat16_is_the_one_in_float32(spatial, options, cast):
    layer, x = dims.conv(3, 16, 32, **options), torch.randn(2, 16, *spatial)
    x = x.bfloat16() if cast else x
    out, *found = gradients_in_bfloat16(layer, x)
    assert out.dtype == torch.bfloat16
    expected = layer(x.float())
    assert torch.equal(out, expected.bfloat16())
    towards = torch.linspace(-1, 1, out.numel()).reshape(out.shape).bfloat16().float()
    inputs = x.float().requires_grad_()
    for value, right in zip(
        found, torch.autograd.grad(layer(inputs), [inputs, *layer.parameters()], towards), strict=True
    ):
        torch.testing.assert_close(value, right.to(value.dtype), rtol=1e-6, atol=1e-6)


def test_a_3d_convolution_of_other_maps_is_torchs():
    layer, x = dims.conv(3, 16, 16, 3, padding=1), torch.randn(1, 16, 4, 6, 8)
    assert torch.equal(layer(x), nn.Conv3d.forward(layer, x))
    assert torch.equal(layer(x[..., :2, :2, :2]), nn.Conv3d.forward(layer, x[..., :2, :2, :2]))  # float32 is right
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert torch.equal(out, F.conv3d(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16(), padding=1))
    assert layer.bfloat16()(x.bfloat16()[..., :3]).dtype == torch.bfloat16
