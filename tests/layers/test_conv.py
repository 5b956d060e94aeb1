"""Convolution blocks of the UNETR family against MONAI's, with copied weights."""

import re

import pytest
import torch

from medvit.dims import conv, conv_transpose
from medvit.layers.conv import ResidualBlock, UpBlock, convolve, image_norm, upsample
from medvit.layers.norm import channels_last


def randomised(module, seed=0):
    """The module in evaluation mode with weights and running statistics of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand(tensor.shape, generator=generator))
    return module.eval()


def monais_residual(key):
    """MONAI's name of a residual block's tensor."""
    key = re.sub(r"^(conv\d)\.", r"\1.conv.", key)
    return key.replace("shortcut.0.", "conv3.conv.").replace("shortcut.1.", "norm3.")


@pytest.mark.upstream
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("widths", [(4, 4), (3, 6)])
@pytest.mark.parametrize("spatial", [(7, 9), (4, 5, 6)])
def test_a_residual_block_is_monais(spatial, widths, norm):
    from monai.networks.blocks.dynunet_block import UnetResBlock

    ours = randomised(ResidualBlock(len(spatial), *widths, norm))
    monai = UnetResBlock(len(spatial), *widths, kernel_size=3, stride=1, norm_name=norm).eval()
    monai.load_state_dict({monais_residual(k): v for k, v in ours.state_dict().items()})
    x = torch.randn(2, widths[0], *spatial)
    torch.testing.assert_close(ours(x), monai(x), rtol=0, atol=1e-5)


@pytest.mark.upstream
@pytest.mark.parametrize("spatial", [(3, 5), (3, 2, 4)])
def test_an_up_block_is_monais(spatial):
    from monai.networks.blocks import UnetrUpBlock

    ours = randomised(UpBlock(len(spatial), 8, 4))
    monai = UnetrUpBlock(len(spatial), 8, 4, 3, 2, "instance", res_block=True).eval()
    monai.load_state_dict(
        {
            "conv_block." + monais_residual(k[6:]) if k.startswith("block.") else "transp_conv.conv.weight": v
            for k, v in ours.state_dict().items()
        }
    )
    x, skip = torch.randn(2, 8, *spatial), torch.randn(2, 4, *[2 * n for n in spatial])
    torch.testing.assert_close(ours(x, skip), monai(x, skip), rtol=0, atol=1e-5)


@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("widths", [(4, 4), (3, 6)])
@pytest.mark.parametrize("spatial", [(11,), (7, 9), (4, 5, 6)])
def test_writing_over_maps_changes_no_number(spatial, widths, norm, monkeypatch):
    block = randomised(ResidualBlock(len(spatial), *widths, norm)).double()
    x = torch.randn(2, widths[0], *spatial, dtype=torch.float64, requires_grad=True)
    kept = x.detach().clone()
    found = outcome(block, x)
    assert torch.equal(x, kept)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # the definition, out of place
    agree(found, outcome(block, x))


def outcome(block, *maps):
    """Output and all gradients."""
    out = block(*maps)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), [*maps, *block.parameters()])]


def agree(found, expected, tolerance=1e-9):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("coarse", "scale", "widths"),
    [
        ((120,), 2, (6, 3)),
        ((17, 15), 2, (2, 3)),
        ((10, 31), (4, 1), (3, 2)),
        ((9, 7, 8), 2, (2, 2)),
        ((5, 10, 9), (1, 4, 2), (1, 3)),
    ],
)
def test_a_joint_kernel_is_the_two_convolutions(coarse, scale, widths, monkeypatch):
    block = randomised(UpBlock(len(coarse), *widths, scale=scale)).double()
    scales = block.up.stride
    x = torch.randn(2, widths[0], *coarse, dtype=torch.float64, requires_grad=True)
    skip = torch.randn(2, widths[1], *[n * s for n, s in zip(coarse, scales, strict=True)], dtype=torch.float64)
    skip.requires_grad_()
    calls = concatenations(monkeypatch)
    found = outcome(block, x, skip)
    assert calls == []
    monkeypatch.setattr(UpBlock, "_joins", lambda *_: False)
    agree(found, outcome(block, x, skip))
    assert calls != []
    monkeypatch.setattr("medvit.layers.conv.upsample", lambda x, _: block.up(x))
    agree(found, outcome(block, x, skip))


def concatenations(monkeypatch):
    """A list that grows with each."""
    calls, plain = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *args: calls.append(args) or plain(*args))
    return calls


@pytest.mark.parametrize(
    ("coarse", "joint"),
    [
        ((14, 14, 14), True),  # 28 ** 3 voxels, more than 4 * 64 * 85
        ((13, 14, 14), False),
        ((2, 60, 60), False),  # tiny maps, see medvit.dims.Conv3d
    ],
)
def test_a_joint_kernel_is_made_for_large_maps_only(coarse, joint, monkeypatch):
    block = UpBlock(3, 85, 1)
    calls = concatenations(monkeypatch)
    with torch.no_grad():
        block(torch.randn(1, 85, *coarse), torch.randn(1, 1, *[2 * n for n in coarse]))
    assert (calls == []) == joint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("joint", [True, False])
def test_autocast_reaches_every_convolution(joint, dtype, monkeypatch):
    monkeypatch.setattr(UpBlock, "_joins", lambda *_: joint)
    block, x, skip = randomised(UpBlock(2, 8, 4)), torch.randn(2, 8, 9, 9), torch.randn(2, 4, 18, 18)
    expected = block(x, skip)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        out = block(x, skip)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.1)


@pytest.mark.parametrize(("coarse", "scale"), [((5,), 3), ((4, 3), (2, 1)), ((2, 3, 4), (1, 2, 3))])
def test_upsampling_is_the_transposed_convolution(coarse, scale):
    layer = conv_transpose(len(coarse), 3, 5, scale, stride=scale, bias=False)
    x = torch.randn(2, 3, *coarse)
    out = upsample(x, layer.weight)
    torch.testing.assert_close(out, layer(x))
    assert channels_last(out) is out


@pytest.mark.parametrize(("channels", "size"), [(1, 3), (4, 3), (20, 3), (5, 1), (20, 1)])
@pytest.mark.parametrize("spatial", [(9,), (8, 7), (4, 5, 6)])
def test_a_convolution_is_the_layers_whoever_computes_it(spatial, channels, size):
    layer = conv(len(spatial), channels, 3, size, padding=size // 2)
    x = torch.randn(2, channels, *spatial, requires_grad=True)
    found, expected = (
        torch.autograd.grad(out.sum(), [x, *layer.parameters()]) for out in (convolve(layer, x), layer(x))
    )
    torch.testing.assert_close(convolve(layer, x), layer(x))
    agree(found, expected, 1e-4)


def test_where_channels_are_few_they_stay_last():
    x = channels_last(torch.randn(1, 1, 5, 6, 7))
    out = convolve(conv(3, 1, 4, 3, padding=1), x)
    assert channels_last(out) is out


@pytest.mark.parametrize("spatial", [(20,), (8, 9), (4, 5, 6)])
def test_maps_are_handed_on_with_their_channels_last(spatial):
    out = ResidualBlock(len(spatial), 3, 4)(torch.randn(1, 3, *spatial))
    assert channels_last(out) is out


@pytest.mark.parametrize("widths", [(4, 4), (3, 6)])
def test_one_slice_in_3d_is_2d_with_the_middle_of_the_kernels(widths):
    flat, deep = randomised(ResidualBlock(2, *widths)), randomised(ResidualBlock(3, *widths), seed=1)
    with torch.no_grad():
        for key, kernel in flat.state_dict().items():
            middle = deep.state_dict()[key].shape[2] // 2
            deep.state_dict()[key][:, :, middle] = kernel  # what lies beyond the only slice is zero padding
    x = torch.randn(2, widths[0], 7, 9)
    torch.testing.assert_close(deep(x[:, :, None]), flat(x)[:, :, None], rtol=0, atol=1e-5)


def test_upsampling_may_differ_by_axis():
    block = UpBlock(3, 8, 4, scale=(1, 2, 4))
    assert block(torch.randn(1, 8, 3, 3, 3), torch.randn(1, 4, 3, 6, 12)).shape == (1, 4, 3, 6, 12)


def test_the_skip_comes_after_what_was_upsampled():
    block = UpBlock(2, 2, 1)
    seen = []
    block.block.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, skip = torch.randn(1, 2, 3, 3), torch.randn(1, 1, 6, 6)
    block(x, skip)
    torch.testing.assert_close(seen[0], torch.cat([block.up(x), skip], 1))


def test_instance_norm_has_no_weights_and_batch_norm_has():
    assert not image_norm(2, 4, "instance").state_dict()
    assert set(image_norm(2, 4, "batch").state_dict()) == {
        "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    }  # fmt: skip
    x = torch.randn(2, 4, 9, 9) * 3 + 5
    out = image_norm(2, 4, "instance")(x)
    expected = (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_another_norm_is_refused():
    with pytest.raises(ValueError, match=r"^norm must be one of \['batch', 'instance'\], got 'layer'$"):
        ResidualBlock(2, 4, 4, "layer")


@pytest.mark.parametrize("side", [2, 4])
def test_gradients_of_small_maps_in_bfloat16(side):
    """See medvit.dims.Conv3d."""
    torch.manual_seed(0)
    block, image = ResidualBlock(3, 16, 16), torch.randn(2, 16, side, 2 * side, side)
    (expected,) = torch.autograd.grad(block(image).square().sum(), [block.conv2.weight])
    for _ in range(5):  # what is uninitialised is wrong now and then only
        with torch.autocast("cpu", torch.bfloat16):
            out = block(image)
        (found,) = torch.autograd.grad(out.float().square().sum(), [block.conv2.weight])
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1 * float(expected.abs().max()))
