"""HBFormer: its encoder against the installed timm, its weights' layouts, and what a user may do with it."""

import re
import warnings

import pytest
import torch
from torch.nn import functional as F

from medvit import create_model
from medvit.errors import WeightsMismatch
from medvit.models.encoder import Encoder
from medvit.models.hbformer import (
    HBFORMER_KEYS,
    LAYOUTS,
    MICROSOFT_KEYS,
    TIMM_KEYS,
    HBFormer,
    HBFormerEncoder,
)
from medvit.models.weights import load_weights

SMALL = {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (2, 1, 2, 1), "num_heads": (1, 2, 2, 4)}


def network(seed=0, **options):
    torch.manual_seed(seed)
    model = create_model("hbformer", **{"out_channels": 2, **SMALL, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in [*model.parameters(), *model.buffers()]:
            if value.is_floating_point():
                value.add_(0.1 * torch.rand(value.shape, generator=generator))
    return model.eval()


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- timm


def twins(img_size, seed=0, **options):
    """timm's Swin with every tensor away from its initial value, and the encoder with the same weights."""
    from timm.models.swin_transformer import SwinTransformer

    options = {"embed_dim": 8, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "window_size": 4, **options}
    torch.manual_seed(seed)
    timm = SwinTransformer(img_size=img_size, num_classes=5, drop_path_rate=0.0, **options).eval()
    with torch.no_grad():
        for parameter in timm.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    ours = HBFormerEncoder(img_size=img_size, drop_path_rate=0.0, **options).eval()
    with torch.no_grad():
        ours.input_proj.weight.copy_(torch.eye(3)[:, :, None, None])
        ours.input_proj.bias.zero_()
    load_weights(ours, with_input_projection(ours, TIMM_KEYS.apply(timm.state_dict())))
    return ours, timm


def with_input_projection(encoder, state):
    own = {k: v for k, v in encoder.state_dict().items() if k.startswith("input_proj")}
    return own | {k.removeprefix("encoder."): v for k, v in state.items()}


def timm_features(timm, x):
    x, features = timm.patch_embed(x), []
    for layer in timm.layers:
        x = layer(x)
        features.append(x.movedim(-1, 1))
    return features


CONFIGS = [
    ((160, 160), {"window_size": 8}),  # padding 4 and 6 tokens under a roll of 4
    ((96, 160), {"window_size": 5}),
    ((64, 224), {"window_size": (3, 7), "mlp_ratio": 2.0}),
    ((192, 96), {"window_size": (7, 4), "depths": (1, 2, 3, 2)}),
    ((128, 64), {"window_size": 12, "embed_dim": 12, "num_heads": (3, 6, 12, 24)}),  # larger than most grids
]


@pytest.mark.upstream
@pytest.mark.parametrize(("img_size", "options"), CONFIGS, ids=str)
def test_features_and_gradients_are_timms(img_size, options):
    ours, timm = twins(img_size, **options)
    x = image(2, 3, *img_size).double()
    features, golden = ours.double()(x), timm_features(timm.double(), x)
    for ours_i, timm_i in zip(features, golden, strict=True):
        torch.testing.assert_close(ours_i, timm_i, rtol=1e-9, atol=1e-9)
    for maps in (features, golden):
        sum((m * image(*m.shape, seed=i)).sum() for i, m in enumerate(maps)).backward()
    theirs = {n: p.grad for n, p in timm.named_parameters() if p.grad is not None}
    gradients = dict(ours.named_parameters())
    for name, gradient in TIMM_KEYS.apply(theirs).items():
        torch.testing.assert_close(gradients[name.removeprefix("encoder.")].grad, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.upstream
def test_the_order_of_roll_and_padding_matters_there():
    ours, timm = twins((160, 160), window_size=8)
    for module in ours.modules():
        if hasattr(module, "geometry"):
            module.geometry = type(module.geometry)(module.geometry.size, module.geometry.shift)  # MONAI's order
    x = image(1, 3, 160, 160)
    with torch.no_grad():
        differences = [(a - b).abs().max() for a, b in zip(ours(x), timm_features(timm, x), strict=True)]
    # grids of 40, 20, 10 and 5: no padding, as much as the roll of 4, more than the roll, and what follows from it
    assert max(differences[:2]) < 1e-4
    assert min(differences[2:]) > 0.1


# --- layouts


@pytest.mark.upstream
def test_both_names_of_patch_merging_load_alike():
    ours, timm = twins((64, 64))
    microsoft = {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", k): v
        for k, v in timm.state_dict().items()
    }
    microsoft["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    microsoft["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    microsoft = {k.replace("head.fc.", "head."): v for k, v in microsoft.items()}
    state = with_input_projection(ours, MICROSOFT_KEYS.apply(microsoft))
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in ours.state_dict().items())
    with pytest.raises(WeightsMismatch, match=r"^3 of .* keys are not of the swin-timm layout: layers\.0\.downsample"):
        TIMM_KEYS.apply(microsoft)


def official(model):
    """The state dict of ``model`` in the authors' names, unused tensors included."""
    state = {}
    for key, value in model.state_dict().items():
        key = re.sub(r"^encoder\.input_proj", "input_proj", key)
        key = re.sub(r"^encoder\.patch_embed", "MWAencoder.backbone.patch_embed", key)
        key = re.sub(r"^encoder\.stages\.(\d)\.merge", r"MWAencoder.backbone.layers.\1.downsample", key)
        key = re.sub(r"^encoder\.stages", "MWAencoder.backbone.layers", key)
        key = key.replace("relative_bias.table", "relative_position_bias_table")
        key = re.sub(r"^projections\.(\d)", lambda m: f"proj_enc{int(m[1]) + 1}", key)
        key = re.sub(r"^fusions\.(\d)", lambda m: f"MFF_decoder{4 - int(m[1])}", key)
        key = key.replace(".up.", ".transp_conv.").replace(".shortcut.", ".conv_skip.")
        key = re.sub(r"\.lrd\.norm(\d)", r".LRD_block.bn\1", key).replace(".lrd.", ".LRD_block.")
        key = re.sub(r"\.(branch|expert)_gate\.(\d)", lambda m: f".{m[1]}_attention.{int(m[2]) + 1}", key)
        key = re.sub(r"\.branches\.(\d)\.depthwise", r".dw_experts.\1", key)
        key = re.sub(r"\.branches\.(\d)\.pointwise", r".pw_experts.\1", key)
        key = re.sub(r"\.branches\.(\d)\.norm", r".bns.\1", key)
        key = key.replace(".dspp.attention.", ".dspp.eca.").replace(".dspp.norm.", ".dspp.fuse_bn.")
        key = key.replace(".dspp.", ".Med_DSPP.")
        key = re.sub(r"^(MFF_decoder\d)\.norm", r"\1.BN", key)
        state[re.sub(r"^head\.", "out.", key)] = value
    wide = model.encoder.channels[-1]
    unused = {"proj_enc4.weight": (wide // 2, wide, 1, 1), "proj_enc4.bias": (wide // 2,)}
    unused |= {f"MWAencoder.backbone.norm.{name}": (wide,) for name in ("weight", "bias")}
    return state | {name: torch.zeros(shape, device="meta") for name, shape in unused.items()}


@pytest.mark.parametrize(("options", "published"), [({}, 36_712_129), ({"img_size": 224}, 36_704_401)])
def test_published_sizes(options, published):
    with torch.device("meta"):
        model = HBFormer(**options)
        state = official(model)
    assert len(state) == 480
    parameters = sum(p.numel() for p in model.parameters())
    unused = [key for key in state if HBFORMER_KEYS.rename(key) is None]
    assert sorted(unused) == [
        "MWAencoder.backbone.norm.bias",
        "MWAencoder.backbone.norm.weight",
        "proj_enc4.bias",
        "proj_enc4.weight",
    ]
    assert parameters + sum(state[key].numel() for key in unused) == published


def test_the_authors_names_load_strictly():
    ours, other = network(), network(seed=1)
    load_weights(other, official(ours), HBFORMER_KEYS)
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(other(x), ours(x))
    state = official(ours)
    state["MFF_decoder4.bicubic.weight"] = torch.zeros(1)
    with pytest.raises(WeightsMismatch, match=r"1 of \d+ keys are not of the hbformer layout: MFF_decoder4\.bicubic"):
        load_weights(other, state, HBFORMER_KEYS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": 160, "window_size": 8, "in_channels": 1, "feature_size": 6, "mlp_ratio": 2.0},
        {"img_size": 96, "window_size": 12, "out_channels": 9},
        {"img_size": 256, "window_size": 7},
    ],
)
def test_constructor_values_follow_from_the_weights(options):
    model = network(**options)
    values = LAYOUTS[0].infer(official(model))
    again = create_model("hbformer", **values).eval()
    load_weights(again, model.state_dict())
    x = image(1, model.encoder.in_channels, 70, 64)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


def test_windows_that_are_not_square_are_left_to_the_user():
    values = LAYOUTS[0].infer(official(network(window_size=(3, 4))))
    assert "window_size" not in values
    assert "img_size" not in values
    assert values["embed_dim"] == 8


# --- windows


@pytest.mark.parametrize(
    ("img_size", "window"), [(256, 8), (224, 7), (448, 7), (160, 8), (192, 8), (96, 8), (120, 6), (80, 5), (16, 4)]
)
def test_the_authors_window_divides_the_token_grid(img_size, window):
    encoder = HBFormerEncoder(img_size=img_size, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    assert encoder.stages[0].blocks[0].attn.geometry.size == (min(window, -(-img_size // 32) * 8),) * 2


def test_tables_are_as_large_as_the_grid_lets_windows_be():
    encoder = HBFormerEncoder(img_size=(160, 96), window_size=8, **{k: SMALL[k] for k in ("embed_dim", "num_heads")})
    sizes = [stage.blocks[0].attn.geometry.size for stage in encoder.stages]
    assert sizes == [(8, 8), (8, 8), (8, 6), (5, 3)]
    assert encoder.stages[3].blocks[1].attn.geometry.shift == (2, 1)
    assert encoder.stages[3].blocks[1].attn.relative_bias.table.shape == (9 * 5, 4)


def test_depth_rises_linearly_to_the_drop_path_rate():
    encoder = HBFormerEncoder(img_size=64, embed_dim=8, num_heads=(1, 1, 1, 1), drop_path_rate=0.22)
    rates = [block.drop_path.rate for stage in encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.02 * i for i in range(12)], abs=1e-6)


# --- sizes


@pytest.mark.parametrize(("dims", "spatial"), [(2, (45, 70)), (2, (1, 33)), (2, (128, 32)), (3, (33, 20, 40))])
@torch.no_grad()
def test_any_size_is_padded_at_its_end_and_cropped(dims, spatial):
    model, x = network(spatial_dims=dims, in_channels=1, img_size=32), image(2, 1, *spatial)
    out = model(x)
    assert out.shape == (2, 2, *spatial)
    whole = F.pad(x, [v for n in reversed(spatial) for v in (0, -n % 32)])
    assert torch.equal(out, model(whole)[(..., *[slice(n) for n in spatial])])


@pytest.mark.parametrize(("dims", "spatial"), [(2, (45, 70)), (3, (33, 20, 40))])
@torch.no_grad()
def test_the_encoder_keeps_its_contract(dims, spatial):
    encoder, x = network(spatial_dims=dims, in_channels=2).encoder, image(3, 2, *spatial)
    assert isinstance(encoder, Encoder)
    assert (encoder.spatial_dims, encoder.in_channels) == (dims, 2)
    assert encoder.channels == (8, 16, 32, 64)
    assert encoder.strides == tuple((s,) * dims for s in (4, 8, 16, 32))
    maps = encoder(x)
    for found, channels, strides in zip(maps, encoder.channels, encoder.strides, strict=True):
        assert found.shape == (3, channels, *[-(-n // s) for n, s in zip(spatial, strides, strict=True)])
    assert encoder.embed_dim == 64
    torch.testing.assert_close(encoder.embed(x), maps[-1].flatten(2).mean(-1), rtol=0, atol=1e-6)


@torch.no_grad()
def test_one_network_takes_any_size_in_any_order():
    model, sizes = network(), [(64, 96), (32, 64), (50, 61)]
    first = [model(image(1, 3, *size)) for size in sizes]
    again = [model(image(1, 3, *size)) for size in reversed(sizes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    model, x = network(), image(3, 3, 64, 96)
    torch.testing.assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), rtol=0, atol=1e-5)


# --- errors


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 64, 64), {}, "this network needs (B, 3, 2 spatial axes), got shape (1, 64, 64)"),
        (
            (1, 1, 64, 64),
            {},
            "this network needs (B, 3, 2 spatial axes), got shape (1, 1, 64, 64); repeat the channel of a grey image "
            "3 times",
        ),
        ((1, 3, 64, 0), {}, "this network needs (B, 3, 2 spatial axes), got shape (1, 3, 64, 0); no axis may be empty"),
        (
            (1, 1, 64, 64),
            {"spatial_dims": 3, "in_channels": 1},
            "this network needs (B, 1, 3 spatial axes), got shape (1, 1, 64, 64)",
        ),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape, options, message):
    model = network(**options)
    for module in (model, model.encoder):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            module(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"depths": (2, 2, 2)},
            "HBFormer has four stages, got depths=(2, 2, 2) and num_heads=(1, 2, 2, 4); "
            "the authors use depths=(2, 2, 6, 2) and num_heads=(3, 6, 12, 24)",
        ),
        (
            {"img_size": 44, "window_size": None},
            "without window_size the first of (7, 8, 6, 5, 4) that divides img_size[0] // 4 is taken; "
            "none does for img_size=(44, 44); give window_size, e.g. 7",
        ),
        (
            {"img_size": 3, "window_size": None},
            "without window_size the first of (7, 8, 6, 5, 4) that divides img_size[0] // 4 is taken; "
            "none does for img_size=(3, 3); give window_size, e.g. 7",
        ),
        ({"img_size": (64, 0)}, "img_size must be at least 1 on every axis, got (64, 0)"),
        ({"img_size": (64, 64, 64)}, "img_size needs one int or 2 of them, got (64, 64, 64)"),
        ({"window_size": 0}, "window_size must be at least 1 on every axis, got 0"),
        ({"num_heads": (3, 6, 12, 24)}, "num_heads must divide the width 8, got 3; use 2"),
        ({"feature_size": 0}, "feature_size must be positive, got 0; the authors use embed_dim // 2"),
        ({"spatial_dims": 4}, "spatial_dims must be one of [1, 2, 3], got 4"),
        ({"drop_path_rate": 1.0}, "a drop-path rate must lie in [0, 1), got 1.0"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network(**options)


# --- training


@pytest.mark.parametrize(("dims", "options"), [(2, {"feature_size": 5}), (3, {})])
def test_every_parameter_gets_a_gradient(dims, options):
    model = network(spatial_dims=dims, drop_path_rate=0.0, **options).train()
    out = model(image(2, 3, *[33] * dims))
    (out * image(*out.shape, seed=1)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert dead == []


def test_a_few_steps_of_training_lower_the_loss():
    model = network(drop_path_rate=0.0).train()
    x = F.interpolate(image(2, 3, 8, 4), scale_factor=8)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_stochastic_depth_acts_in_training_only():
    model, plain = network(drop_path_rate=0.9), network(drop_path_rate=0.0)
    x = image(1, 3, 64, 64)
    assert torch.equal(model(x), plain(x))
    torch.manual_seed(0)
    assert not torch.allclose(model.train()(x), plain.train()(x))


# --- use

SHALLOW = {"depths": (2, 1, 1, 1)}


@torch.no_grad()
def test_bfloat16_autocast():
    model, x = network(), image(1, 3, 64, 96)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.03 * exact.abs().mean() + 0.01


@torch.no_grad()
def test_a_jit_trace_reproduces_the_network_on_any_batch():
    model, x = network(**SHALLOW), image(1, 3, 32, 64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes become constants, as they should
        warnings.filterwarnings("ignore", "`torch.jit.trace", category=FutureWarning)
        traced = torch.jit.trace(model, x)
        for other in (x, image(2, 3, 32, 64, seed=1)):
            torch.testing.assert_close(traced(other), model(other), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_exported_graph_reproduces_the_network_on_any_batch():
    model, example = network(**SHALLOW), image(2, 3, 32, 64)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)).module()
    x = image(3, 3, 32, 64, seed=1)
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_the_compiled_network_is_one_graph():
    model, x = network(**SHALLOW), image(1, 3, 50, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-5)


def test_a_meta_forward_leaves_real_ones_alone():
    with torch.device("meta"):
        assert HBFormer(**SMALL)(torch.empty(1, 3, 100, 64)).shape == (1, 9, 100, 64)
    assert network()(image(1, 3, 100, 64)).isfinite().all()
