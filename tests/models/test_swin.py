"""The Swin encoder: what it promises to heads, how it is wired, and MONAI's numbers on sizes that do not divide."""

import pytest
import torch
from torch.nn import functional as F

from medvit.kernels import WindowGeometry
from medvit.models.encoder import Encoder
from medvit.models.swin import SwinEncoder
from medvit.models.swin_unetr import MONAI_KEYS
from medvit.models.weights import load_weights


def encoder(spatial_dims=2, seed=0, **options):
    """A small encoder in evaluation mode, every parameter away from 0 and 1."""
    torch.manual_seed(seed)
    network = SwinEncoder(spatial_dims, 1, 12, **{"window_size": 4, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return network.eval()


@pytest.mark.parametrize(
    ("spatial", "options", "channels", "strides"),
    [
        ((70,), {}, (12, 24, 48, 96, 192), (2, 4, 8, 16, 32)),
        ((33, 70), {}, (12, 24, 48, 96, 192), (2, 4, 8, 16, 32)),
        ((17, 20, 33), {"depths": (1, 2), "num_heads": (3, 6)}, (12, 24, 48), (2, 4, 8)),
    ],
)
def test_it_is_an_encoder(spatial, options, channels, strides):
    network = encoder(len(spatial), **options)
    assert isinstance(network, Encoder)
    assert network.spatial_dims == len(spatial)
    assert network.channels == channels
    assert network.strides == tuple((s,) * len(spatial) for s in strides)
    with torch.no_grad():
        features = network(torch.randn(2, 1, *spatial))
    expected = [(2, c, *[-(-n // s) for n in spatial]) for c, s in zip(channels, strides, strict=True)]
    assert [tuple(f.shape) for f in features] == expected


def test_strides_follow_the_patch_on_each_axis():
    network = encoder(2, patch_size=(1, 4), depths=(1, 1), num_heads=(1, 1))
    assert network.strides == ((1, 4), (2, 8), (4, 16))
    assert [f.shape[2:] for f in network(torch.randn(1, 1, 8, 32))] == [(8, 8), (4, 4), (2, 2)]


def test_features_are_normalised_on_their_way_out_only():
    x = torch.randn(1, 1, 48, 40)
    plain, normalised = encoder(normalize=False)(x), encoder()(x)
    for raw, out in zip(plain, normalised, strict=True):
        expected = F.layer_norm(raw.movedim(1, -1), (raw.shape[1],)).movedim(-1, 1)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


def test_every_second_block_is_shifted():
    network = encoder(2, depths=(3, 1), num_heads=(3, 6), window_size=(7, 4))
    shifts = [[block.attn.geometry.shift for block in stage.blocks] for stage in network.stages]
    assert shifts == [[(0, 0), (3, 2), (0, 0)], [(0, 0)]]


def test_stochastic_depth_rises_linearly_over_all_blocks():
    network = encoder(2, dropout_path_rate=0.7)
    rates = [block.drop_path.rate for stage in network.stages for block in stage.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7])


def test_dropout_rates_reach_every_block():
    network = encoder(2, drop_rate=0.1, attn_drop_rate=0.2)
    blocks = [block for stage in network.stages for block in stage.blocks]
    assert network.drop.p == 0.1
    assert {(b.attn.attn_drop, b.attn.proj_drop.p, b.mlp.drop.p) for b in blocks} == {(0.2, 0.1, 0.1)}


@pytest.mark.parametrize("option", ["drop_rate", "attn_drop_rate", "dropout_path_rate"])
def test_dropout_acts_in_training_only(option):
    x = torch.randn(2, 1, 32, 32)
    network = encoder(2, **{option: 0.5})
    assert torch.equal(network(x)[-1], encoder(2)(x)[-1])
    network.train()
    assert not torch.allclose(network(x)[-1], network(x)[-1])


def test_a_volume_one_slice_deep_goes_through_the_blocks_as_an_image():
    # up to the first merging: that one pads a single slice to two, so the depths must part there
    flat = encoder(2, depths=(2,), num_heads=(3,), use_v2=False)
    deep = encoder(3, depths=(2,), num_heads=(3,), patch_size=(1, 2, 2), window_size=(1, 4, 4), seed=1)
    deep.patch_embed.load_state_dict(
        {k: v.unsqueeze(2) if k == "proj.weight" else v for k, v in flat.patch_embed.state_dict().items()}
    )
    deep.stages[0].blocks.load_state_dict(flat.stages[0].blocks.state_dict())
    x = torch.randn(1, 1, 36, 20)
    tokens, volume = flat.patch_embed(x), deep.patch_embed(x[:, :, None])
    for a, b in zip(flat.stages[0].blocks, deep.stages[0].blocks, strict=True):
        tokens, volume = a(tokens), b(volume)
        torch.testing.assert_close(volume, tokens[:, None], rtol=0, atol=1e-5)


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((50, 37), {"window_size": (4, 4), "patch_size": (2, 2)}),
        ((45, 66), {"window_size": (3, 5), "patch_size": (1, 3), "use_v2": True}),
        ((21, 34, 27), {"window_size": (2, 4, 3), "patch_size": (2, 2, 1), "patch_norm": True}),
    ],
)
def test_features_are_monais_on_any_size(spatial, options):
    from monai.networks.nets.swin_unetr import SwinTransformer

    torch.manual_seed(0)
    heads = {"depths": (2, 1, 1, 1), "num_heads": (3, 3, 6, 6)}
    monai = SwinTransformer(1, 12, **heads, **options, spatial_dims=len(spatial)).eval()
    ours = SwinEncoder(len(spatial), 1, 12, **heads, **options).eval()
    with torch.no_grad():
        for parameter in monai.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    state = MONAI_KEYS.apply({f"swinViT.{k}": v for k, v in monai.state_dict().items()})
    load_weights(ours, {k.removeprefix("encoder."): v for k, v in state.items()})
    x = torch.randn(2, 1, *spatial)
    with torch.no_grad():
        for feature, golden in zip(ours(x), monai(x), strict=True):
            torch.testing.assert_close(feature, golden, rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"depths": (2, 2)},
            r"depths and num_heads need one entry per stage, got depths=\(2, 2\) and num_heads=\(3, 6, 12, 24\)",
        ),
        ({"window_size": (7, 7, 7)}, r"window_size needs one int or 2 of them, got \(7, 7, 7\)"),
        ({"patch_size": (2,)}, r"patch_size needs one int or 2 of them, got \(2,\)"),
        ({"num_heads": (5, 6, 12, 24)}, "num_heads must divide the width 12, got 5; use 4"),
        ({"downsample": "max"}, "merging order must be one of .*, got 'max'"),
        ({"clamp": "wrap"}, "clamp must be 'exact' or 'prefix', got 'wrap'"),
        ({"dropout_path_rate": 1.0}, r"a drop-path rate must lie in \[0, 1\), got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        encoder(2, **options)


def test_the_geometry_of_a_stage_is_that_of_its_window_on_every_rank():
    for dims in (1, 2, 3):
        network = encoder(dims, window_size=5, depths=(2,), num_heads=(3,))
        assert network.stages[0].blocks[1].attn.geometry == WindowGeometry((5,) * dims, (2,) * dims)
