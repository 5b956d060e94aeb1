"""Plain ViT against the installed timm, in 3D against itself in 2D, and what a user may do with it."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from medvit import create_model
from medvit.models.encoder import Encoder
from medvit.models.vit import CLASSIFIER_KEYS, LAYOUTS, MAE_TO_AVG_KEYS, MAE_TO_CLS_KEYS, ViTEncoder
from medvit.models.weights import load_weights

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 3}


def network(seed=0, **options):
    """A small network with every tensor away from its initial value."""
    torch.manual_seed(seed)
    return shaken(create_model("vit", **{**SMALL, **options}).eval())


def shaken(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def named(layout):
    return next(candidate for candidate in LAYOUTS if candidate.name == layout)


# --- timm


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("spatial", "options"),
    [
        ((16, 16), {"num_classes": 5, "global_pool": "avg"}),
        ((16, 16), {"num_classes": 5, "global_pool": "cls"}),
        ((12, 20), {"num_classes": 0, "global_pool": "avg", "mlp_ratio": 2.5, "patch_size": (2, 4)}),
        ((24, 8), {"num_classes": 1, "global_pool": "cls", "qkv_bias": False, "in_channels": 1, "depth": 3}),
        ((16, 16), {"num_classes": 3, "embed_dim": 40, "num_heads": 5, "patch_size": 8, "in_channels": 4}),
    ],
)
def test_outputs_and_gradients_are_timms(spatial, options):
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    options = {**SMALL, "img_size": spatial, **options}
    pool = options.get("global_pool", "avg")
    timms = {"in_chans" if k == "in_channels" else k: v for k, v in options.items() if k != "global_pool"}
    torch.manual_seed(0)
    theirs = VisionTransformer(
        **timms, global_pool={"cls": "token"}.get(pool, pool), norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)
    )
    theirs = shaken(theirs.eval())
    ours = create_model("vit", **options).eval()
    load_weights(ours, theirs.state_dict(), CLASSIFIER_KEYS)

    x, y = (image(2, options.get("in_channels", 3), *spatial).requires_grad_() for _ in range(2))
    torch.testing.assert_close(ours(x), theirs(y), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.encoder.tokens(x), theirs.forward_features(y), rtol=0, atol=2e-5)
    ours(x).square().sum().backward()
    theirs(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-5)
    expected = CLASSIFIER_KEYS.apply({k: p.grad for k, p in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.upstream
def test_stochastic_depth_grows_as_timms():
    ours = network(drop_path_rate=0.3, depth=4)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in ours.encoder.blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3])


# --- any rank


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_one_slice_in_3d_is_the_2d_network(pool):
    flat = network(global_pool=pool, num_classes=3, img_size=(16, 12))
    deep = network(global_pool=pool, num_classes=3, img_size=(1, 16, 12), patch_size=(1, 4, 4), spatial_dims=3, seed=1)
    state = flat.state_dict()
    kernel = "encoder.patch_embed.proj.weight"
    load_weights(deep, {**state, kernel: state[kernel][:, :, None]})
    for x in (image(2, 3, 16, 12), image(2, 3, 20, 8)):  # the second resizes positions
        torch.testing.assert_close(deep(x[:, :, None]), flat(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(deep.encoder(x[:, :, None])[0][:, :, 0], flat.encoder(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dims", "spatial"), [(2, (16, 16)), (2, (8, 24)), (3, (8, 16, 4))])
def test_the_encoder_keeps_the_contract(dims, spatial):
    encoder = network(spatial_dims=dims, in_channels=2).encoder
    assert isinstance(encoder, Encoder)
    assert (encoder.spatial_dims, encoder.in_channels, encoder.embed_dim) == (dims, 2, 24)
    assert (encoder.channels, encoder.strides) == ((24,), ((4,) * dims,))
    x = image(2, 2, *spatial)
    (features,) = encoder(x)
    assert features.shape == (2, 24, *[n // 4 for n in spatial])
    tokens = encoder.tokens(x)
    assert torch.equal(features.flatten(2).transpose(1, 2), tokens[:, 1:])
    assert torch.equal(encoder.embed(x), encoder.fc_norm(tokens[:, 1:].mean(1)))


def test_without_classes_the_classifier_gives_the_embedding():
    model, x = network(global_pool="cls"), image(2, 3, 16, 16)
    assert torch.equal(model(x), model.encoder.tokens(x)[:, 0])


@pytest.mark.parametrize(("dims", "spatial"), [(2, (16, 12)), (3, (8, 12, 4))])
def test_a_head_may_read_four_moments_of_every_block(dims, spatial):
    model, x = network(reads="blocks", num_classes=2, depth=3, spatial_dims=dims), image(2, 3, *spatial)
    after = []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda module, given, out: after.append(out.detach().double().numpy()))
    logits = model(x)
    moments = (np.mean, np.std, stats.skew, partial(stats.kurtosis, fisher=False))
    expected = torch.from_numpy(np.concatenate([moment(out[:, 1:], axis=1) for out in after for moment in moments], 1))
    assert expected.shape == (2, 4 * 3 * 24)
    torch.testing.assert_close(model.encoder.block_statistics(x).double(), expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits.double(), model.head.double()(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_the_head_reads_is_of_the_networks_type(dtype):
    model = network(reads="blocks", num_classes=2)
    expected = model(image(2, 3, 16, 16))
    found = model.to(dtype)(image(2, 3, 16, 16).to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_patches_that_are_all_alike_have_a_gradient():
    model = network(reads="blocks", num_classes=2)
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
    model(torch.ones(1, 3, 16, 16)).sum().backward()
    _, deviation, skewness, kurtosis = model.encoder.block_statistics(torch.ones(1, 3, 16, 16))[0, : 4 * 24].chunk(4)
    assert deviation.max() < 0.01 and skewness.abs().max() < 1e-3 and kurtosis.max() < 1e-3
    assert all(p.grad.isfinite().all() for p in model.encoder.blocks.parameters())


def test_a_feature_lies_over_its_patch():
    model = network(depth=0, position="sincos")
    with torch.no_grad():
        before = model.encoder(torch.zeros(1, 3, 16, 24))[0]
        x = torch.zeros(1, 3, 16, 24)
        x[:, :, 5, 18] = 1  # row 1, column 4 of patches
        changed = (model.encoder(x)[0] != before).any(1)[0]
    assert changed.nonzero().tolist() == [[1, 4]]


def test_other_sizes_resize_the_positions_and_nothing_else():
    model, x = network(), image(1, 3, 24, 8)
    stored = model.encoder.pos_embed.clone()
    model(x)
    assert torch.equal(model.encoder.pos_embed, stored)
    assert not torch.equal(model(x), model(x.transpose(2, 3)))


# --- sizes, precision, training


@pytest.mark.parametrize(
    ("options", "count"), [({"embed_dim": 384, "num_heads": 6}, 21_671_054), ({}, 85_809_422)], ids=["ViT-S", "ViT-B"]
)
def test_published_sizes(options, count):
    with torch.device("meta"):
        model = create_model("vit", num_classes=14, **options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("pool", ["avg", "cls"])
def test_every_parameter_gets_a_gradient(pool):
    model = network(global_pool=pool, num_classes=2, drop_path_rate=0.1).train()
    model(image(8, 3, 16, 16)).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_fixed_positions_are_not_trained():
    model = network(position="sincos")
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["encoder.pos_embed"]


def test_autocast_stays_near_float32():
    model, x = network(num_classes=3), image(2, 3, 16, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), model(x), rtol=0.05, atol=0.05)


def test_fresh_weights_are_the_authors():
    torch.manual_seed(0)
    model = create_model("vit", num_classes=64, img_size=64, patch_size=8, embed_dim=96, depth=2, num_heads=3)
    std = {n: p.std().item() for n, p in model.named_parameters()}
    for name in ("encoder.pos_embed", "encoder.blocks.1.attn.qkv.weight", "encoder.blocks.0.mlp.fc2.weight"):
        assert std[name] == pytest.approx(0.02, rel=0.1), name
    assert std["encoder.cls_token"] == pytest.approx(0.02, rel=0.4)
    assert std["head.weight"] == pytest.approx(2e-5, rel=0.1)
    biases = [n for n, p in model.named_parameters() if n.endswith("bias") and "patch_embed" not in n and p.any()]
    assert biases == []


# --- export


def test_export_takes_any_size():
    model = network(num_classes=2)
    rows, columns = torch.export.Dim("rows", min=2, max=64), torch.export.Dim("columns", min=2, max=64)
    program = torch.export.export(
        model, (image(2, 3, 24, 20),), dynamic_shapes={"x": {2: 4 * rows, 3: 4 * columns}}
    ).module()
    for spatial in ((16, 16), (24, 20), (8, 36)):
        x = image(2, 3, *spatial)
        torch.testing.assert_close(program(x), model(x), rtol=0, atol=1e-5)


# --- weights


def official_mae(seed=0):
    """A pre-training checkpoint of the same sizes, in the authors' names."""
    from medvit.models.mae import MAE_KEYS

    mae = shaken(create_model("mae", **SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2))
    pairs = ["patch_embed.proj", "norm", *[f"decoder_{part}" for part in ("embed", "norm", "pred")]]
    for block in ("blocks.0", "blocks.1", "decoder_blocks.0"):
        pairs += [f"{block}.{part}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")]
    names = ["cls_token", "pos_embed", "mask_token", "decoder_pos_embed"]
    names += [f"{pair}.{kind}" for pair in pairs for kind in ("weight", "bias")]
    own = mae.state_dict()
    state = {name: own[MAE_KEYS.rename(name)] for name in names}
    assert len(state) == len(own)
    return mae, state


@pytest.mark.parametrize(
    ("pool", "keys", "layout"), [("avg", MAE_TO_AVG_KEYS, "mae_encoder"), ("cls", MAE_TO_CLS_KEYS, "mae_encoder_cls")]
)
def test_the_encoder_of_an_mae_checkpoint_becomes_a_classifier(pool, keys, layout):
    mae, state = official_mae()
    model = network(global_pool=pool, num_classes=2, seed=5)
    given = keys.apply(state)
    missing = set(model.state_dict()) - set(given)
    assert given.keys() <= model.state_dict().keys()
    assert missing
    assert all(re.fullmatch(named(layout).partial, name) for name in missing)
    load_weights(model, {**model.state_dict(), **given})
    x = image(2, 3, 16, 16)
    tokens = model.encoder.tokens(x)
    normed = tokens if pool == "cls" else mae.encoder.norm(tokens)
    torch.testing.assert_close(normed, mae.encoder.tokens(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["avg", "cls"])
@pytest.mark.parametrize(("dims", "size"), [(2, 16), (3, 8)])
def test_constructor_values_follow_from_a_classifiers_weights(pool, dims, size):
    ours = network(global_pool=pool, num_classes=3, spatial_dims=dims, img_size=size, in_channels=1, mlp_ratio=2.0)
    state = {k.removeprefix("encoder."): v for k, v in ours.state_dict().items()}
    layout = named("medical_mae_classifier")
    assert all(any(re.fullmatch(mark, key) for key in state) for mark in layout.marks)
    again = create_model("vit", **layout.infer(state), num_heads=3).eval()
    load_weights(again, state, layout.keys)
    x = image(1, 1, *(size,) * dims)
    assert torch.equal(again(x), ours(x))


def test_an_image_size_that_shapes_do_not_tell_is_left_out():
    ours = network(img_size=(8, 12), num_classes=3)
    state = {k.removeprefix("encoder."): v for k, v in ours.state_dict().items()}
    assert "img_size" not in named("medical_mae_classifier").infer(state)


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide the width 24, got 5; use 4"),
        ({"num_heads": 0}, "num_heads must divide the width 24, got 0; use 1"),
        (
            {"img_size": (8, 9)},
            "every side of img_size must be a multiple of the patch (4, 4), got (8, 9); use (8, 12)",
        ),
        ({"global_pool": "token"}, "global_pool must be one of ('avg', 'cls'), got 'token'"),
        ({"position": "rope"}, "position must be one of ('learned', 'sincos'), got 'rope'"),
        ({"patch_size": (4, 4, 4)}, "patch_size needs one int or 2 of them, got (4, 4, 4)"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        ViTEncoder(**{**SMALL, **options})


def test_a_head_reads_one_of_two():
    with pytest.raises(ValueError, match=r"^reads must be one of \('embed', 'blocks'\), got 'map'$"):
        network(reads="map")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 16, 17), "every side of the image must be a multiple of the patch (4, 4), got (16, 17); use (16, 20)"),
        ((1, 3, 3, 16), "every side of the image must be a multiple of the patch (4, 4), got (3, 16); use (4, 16)"),
        ((1, 3, 0, 16), "this network needs (B, 3, 2 spatial axes), got shape (1, 3, 0, 16); no axis may be empty"),
        (
            (1, 1, 16, 16),
            "this network needs (B, 3, 2 spatial axes), got shape (1, 1, 16, 16); "
            "repeat the channel of a grey image 3 times",
        ),
        ((1, 3, 16, 16, 16), "this network needs (B, 3, 2 spatial axes), got shape (1, 3, 16, 16, 16)"),
    ],
)
def test_images_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network()(torch.zeros(shape))
