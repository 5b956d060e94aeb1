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
    assert type(dims.conv(spatial_dims, 3, 5, 3, padding=1)) is getattr(nn, f"Conv{spatial_dims}d")
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
