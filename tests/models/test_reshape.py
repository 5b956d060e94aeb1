"""Weights of another size: what they still compute."""

import re

import pytest
import torch
from checkpoint_synthetic import SWIN, random_model
from torch import nn
from torch.nn import functional as F

from medvit import create_model
from medvit.models.reshape import Reshape, adapt_channels, grid_of, inflate, resize_patches

# --- kernels


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_mean_kernel_gives_for_equal_slices_what_each_gave(depth):
    kernel, image = torch.randn(4, 3, 2, 2), torch.randn(1, 3, 6, 6)
    flat = F.conv2d(image, kernel, stride=2)
    volume = image[:, :, None].expand(-1, -1, 6, -1, -1)
    deep = F.conv3d(volume, inflate(kernel, depth, "mean"), stride=(depth, 2, 2))
    for z in range(deep.shape[2]):
        torch.testing.assert_close(deep[:, :, z], flat)


@pytest.mark.parametrize(("depth", "middle"), [(1, 0), (2, 1), (3, 1), (4, 2)])
def test_a_centred_kernel_gives_for_each_slice_what_it_gave_alone(depth, middle):
    kernel, volume = torch.randn(4, 3, 2, 2), torch.randn(1, 3, 2 * depth, 6, 6)
    deep = F.conv3d(volume, inflate(kernel, depth, "center"), stride=(depth, 2, 2))
    for z in range(2):
        torch.testing.assert_close(deep[:, :, z], F.conv2d(volume[:, :, z * depth + middle], kernel, stride=2))


def test_repeated_channels_give_what_they_gave():
    kernel, image = torch.randn(4, 2, 3, 3), torch.randn(1, 2, 6, 6)
    for copies in (1, 2, 3):
        torch.testing.assert_close(
            F.conv2d(image.repeat(1, copies, 1, 1), adapt_channels(kernel, 2 * copies, "repeat")),
            F.conv2d(image, kernel),
        )
    assert torch.equal(adapt_channels(kernel, 3, "repeat")[:, 2], kernel[:, 0] * (2 / 3))


@pytest.mark.parametrize(("old", "new"), [(3, 1), (1, 3), (3, 4), (2, 2)])
def test_averaged_channels_give_for_grey_images_what_they_gave(old, new):
    kernel, grey = torch.randn(4, old, 3, 3, 3), torch.randn(1, 1, 6, 6, 6)
    torch.testing.assert_close(
        F.conv3d(grey.expand(-1, new, -1, -1, -1), adapt_channels(kernel, new, "average")),
        F.conv3d(grey.expand(-1, old, -1, -1, -1), kernel),
    )


@pytest.mark.parametrize(("old", "new"), [((4, 4), (6, 8)), ((2, 3, 4), (4, 3, 5))])
def test_enlarged_patches_give_what_the_patches_gave(old, new):
    kernel, patch = torch.randn(5, 3, *old, dtype=torch.float64), torch.randn(2, 3, *old, dtype=torch.float64)
    larger = patch
    for axis, n in enumerate(new, 2):
        last = larger.movedim(axis, -1)
        plane = F.interpolate(
            last.reshape(1, 1, -1, last.shape[-1]), size=(last[..., 0].numel(), n), mode="bicubic", antialias=True
        )
        larger = plane.reshape(*last.shape[:-1], n).movedim(-1, axis)
    expected = torch.einsum("oc...,bc...->bo", kernel.flatten(2), patch.flatten(2))
    got = torch.einsum("oc...,bc...->bo", resize_patches(kernel, new).flatten(2), larger.flatten(2))
    torch.testing.assert_close(got, expected)


@pytest.mark.upstream
@pytest.mark.parametrize("size", [(8, 8), (24, 20), (16, 16)])
def test_patches_are_resized_as_timm_does_it(size):
    from timm.layers import resample_patch_embed

    kernel = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(
        resize_patches(kernel, size), resample_patch_embed(kernel, list(size)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: inflate(torch.zeros(1, 1, 2, 2), 2, "copy"), "inflate must be one of ('mean', 'center'), got 'copy'"),
        (
            lambda: adapt_channels(torch.zeros(1, 1, 2, 2), 2, "copy"),
            "channels must be one of ('repeat', 'average'), got 'copy'",
        ),
        (
            lambda: adapt_channels(torch.zeros(1, 3, 2, 2), 1, "repeat"),
            "channels='repeat' makes more channels, got 1 of 3; use 'average'",
        ),
        (lambda: Reshape(inflate="both"), "inflate must be one of (None, 'mean', 'center'), got 'both'"),
        (lambda: Reshape(channels="sum"), "channels must be one of (None, 'repeat', 'average'), got 'sum'"),
    ],
)
def test_unknown_choices(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        call()


# --- tables


@pytest.mark.parametrize(
    ("rows", "like", "flat", "expected"),
    [
        (196, (16, 16), False, (14, 14)),
        (8 * 6, (4, 3), False, (8, 6)),  # the proportions of the grid wanted
        (36, (4, 3), False, (6, 6)),  # or a square
        (1372, (16, 16, 8), False, (14, 14, 7)),
        (64, (8, 8, 8), False, (4, 4, 4)),
        (64, (4, 8, 8), True, (1, 8, 8)),
        (35, (4, 4), False, None),
        (35, (2, 4, 4), True, None),
    ],
)
def test_the_grid_of_a_table(rows, like, flat, expected):
    assert grid_of(rows, like, flat=flat) == expected


VIT = {"in_channels": 2, "embed_dim": 12, "depth": 1, "num_heads": 2}


def fit(network, key, value, **options):
    return Reshape(**options).fit(value, key, network)


def test_a_position_table_is_resized_as_published_code_does_it():
    network = create_model("vit", img_size=(24, 24), patch_size=4, **VIT)
    table = torch.randn(1, 1 + 16, 12)
    fitted = fit(network, "encoder.pos_embed", table, positions=True)
    plane = table[:, 1:].reshape(1, 4, 4, 12).permute(0, 3, 1, 2)
    expected = F.interpolate(plane, size=(6, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(fitted.value[:, 1:], expected.permute(0, 2, 3, 1).flatten(1, 2), atol=1e-5, rtol=0)
    assert torch.equal(fitted.value[:, :1], table[:, :1])
    assert (fitted.done, fitted.helps) == (("resized from 4x4 to 6x6",), ())


def test_a_decoders_table_is_resized_to_its_own_grid():
    network = create_model("mae", img_size=(24, 16), patch_size=4, decoder_embed_dim=8, decoder_num_heads=2, **VIT)
    fitted = fit(network, "decoder.pos_embed", torch.randn(1, 1 + 9, 8), positions=True)
    assert fitted.value.shape == (1, 1 + 24, 8)
    assert fitted.done == ("resized from 3x3 to 6x4",)


def test_tables_by_rank():
    network = create_model("uni4eye", img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=4)
    fitted = fit(network, "pos_embed.3", torch.randn(1, 1 + 6 * 6 * 3, 24), positions=True)
    assert fitted.value.shape == (1, 1 + 4 * 4 * 2, 24)
    assert fitted.done == ("resized from 6x6x3 to 4x4x2",)


def test_a_relative_bias_table_is_resized_over_offsets():
    network = create_model("swin_unetr", spatial_dims=2, **{**SWIN, "window_size": 4})
    key = "encoder.stages.1.blocks.0.attn.relative_bias.table"
    table = torch.randn(25, 2)
    fitted = fit(network, key, table, positions=True)
    expected = F.interpolate(table.T.reshape(1, 2, 5, 5), size=(7, 7), mode="bicubic", align_corners=False)
    torch.testing.assert_close(fitted.value, expected.flatten(2)[0].T, atol=1e-5, rtol=0)
    assert fitted.done == ("resized from 5x5 to 7x7",)


def test_a_plane_of_positions_is_repeated_over_depth():
    network = create_model("vit", spatial_dims=3, img_size=(8, 16, 16), patch_size=4, **VIT)
    table = torch.randn(1, 1 + 16, 12)
    fitted = fit(network, "encoder.pos_embed", table, positions=True, inflate="mean")
    assert fitted.done == ("resized from 1x4x4 to 2x4x4",)
    for z in range(2):
        torch.testing.assert_close(fitted.value[:, 1 + 16 * z :][:, :16], table[:, 1:], atol=1e-6, rtol=0)


def test_a_2d_swin_bias_is_repeated_over_depth():
    network = create_model("swin_unetr", **{**SWIN, "window_size": (2, 3, 3)})
    table = torch.randn(25, 1)
    fitted = fit(network, "encoder.stages.0.blocks.0.attn.relative_bias.table", table, positions=True, inflate="mean")
    torch.testing.assert_close(fitted.value, table.repeat(3, 1), atol=1e-6, rtol=0)


# --- nothing is done unasked, and what is asked reaches nothing else


@pytest.mark.parametrize(
    ("key", "shape", "helps"),
    [
        ("encoder.pos_embed", (1, 1 + 9, 12), ("--resize-positions",)),
        ("encoder.patch_embed.proj.weight", (12, 2, 4, 4), ("--inflate",)),
        ("encoder.patch_embed.proj.weight", (12, 1, 4, 4, 4), ("--channels",)),
        ("encoder.patch_embed.proj.weight", (12, 1, 4, 4), ("--inflate", "--channels")),
        ("encoder.patch_embed.proj.weight", (12, 2, 8, 8), ("--resize-patches", "--inflate")),
        ("encoder.patch_embed.proj.weight", (12, 1, 8, 4, 4), ("--resize-patches", "--channels")),
        ("encoder.patch_embed.proj.weight", (16, 2, 8, 8), ()),
        ("encoder.patch_embed.proj.weight", (16, 2, 4, 4, 4), ()),
        ("encoder.patch_embed.proj.bias", (16,), ()),
        ("encoder.pos_embed", (1, 1 + 9, 16), ()),
        ("encoder.blocks.0.mlp.fc1.weight", (48, 8), ()),
    ],
)
def test_without_leave_nothing_changes_and_the_option_is_named(key, shape, helps):
    network = create_model("vit", spatial_dims=3, img_size=8, patch_size=4, **VIT)
    value = torch.randn(shape)
    fitted = fit(network, key, value)
    assert fitted.value is value
    assert (fitted.done, fitted.helps) == ((), helps)


def test_depth_and_channels_together():
    network = create_model("vit", spatial_dims=3, img_size=8, patch_size=4, **VIT)
    kernel = torch.randn(12, 1, 4, 4)
    fitted = fit(network, "encoder.patch_embed.proj.weight", kernel, inflate="mean", channels="repeat")
    torch.testing.assert_close(fitted.value, kernel[:, :, None].expand(12, 2, 4, 4, 4) / 8)
    assert fitted.done == ("inflated to depth 4 (mean)", "1 channels to 2 (repeat)")


def test_patches_are_resized_before_they_are_inflated():
    network = create_model("vit", spatial_dims=3, img_size=8, patch_size=(2, 4, 4), **VIT)
    kernel = torch.randn(12, 2, 8, 8)
    fitted = fit(network, "encoder.patch_embed.proj.weight", kernel, inflate="mean", patches=True)
    assert fitted.done == ("patches resized from 8x8 to 4x4", "inflated to depth 2 (mean)")
    assert torch.equal(fitted.value, inflate(resize_patches(kernel, (4, 4)), 2, "mean"))


def test_fewer_channels_by_repeating_is_not_done():
    network = create_model("vit", img_size=8, patch_size=4, **VIT)
    fitted = fit(network, "encoder.patch_embed.proj.weight", torch.randn(12, 3, 4, 4), channels="repeat")
    assert (fitted.value.shape, fitted.helps) == ((12, 3, 4, 4), ("--channels average",))


def test_a_grid_that_cannot_be_told_is_left():
    network = create_model("vit", img_size=16, patch_size=4, **VIT)
    fitted = fit(network, "encoder.pos_embed", torch.randn(1, 1 + 15, 12), positions=True)
    assert (fitted.value.shape, fitted.done, fitted.helps) == ((1, 16, 12), (), ())


def test_only_convolutions_that_read_the_image_change_channels():
    network = create_model("swin_unetr", spatial_dims=2, **{**SWIN, "window_size": 3})
    key = "ups.0.block.conv1.weight"
    assert isinstance(network.get_submodule(key.removesuffix(".weight")), nn.Conv2d)
    value = network.get_parameter(key)[:, :7]
    assert fit(network, key, value, channels="average").value is value


def test_the_network_itself_is_not_touched():
    network = random_model("vit", img_size=8, patch_size=4, **VIT)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    fit(network, "encoder.pos_embed", torch.randn(1, 1 + 9, 12), positions=True)
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
