"""RAD-DINO against the installed transformers and timm, and what a user may do with it."""

import json
import re

import pytest
import torch
from official import translate
from scipy import stats

from medvit import create_model
from medvit.errors import WeightsMismatch
from medvit.models.rad_dino import LAYOUTS, RadDino
from medvit.models.weights import load_weights

HUGGINGFACE, ORIGINAL = LAYOUTS
SMALL = {"img_size": 28, "patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 3}


def network(seed=0, **options):
    """A small network, every tensor away from its initial value."""
    torch.manual_seed(seed)
    return perturbed(create_model("rad_dino", **{**SMALL, **options}).eval())


def perturbed(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours_from(state):
    """A state dict of transformers under our names."""
    return HUGGINGFACE.keys.apply(HUGGINGFACE.transform(dict(state)))


# --- transformers


def config(registers=0, **options):
    from transformers import Dinov2Config, Dinov2WithRegistersConfig

    options = {
        "image_size": 28,
        "patch_size": 7,
        "hidden_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        **options,
    }
    if not registers:
        return Dinov2Config(**options)
    return Dinov2WithRegistersConfig(**options, num_register_tokens=registers)


def twins(seed=0, registers=0, **options):
    """A network of transformers and ours with its weights, built through the documented names."""
    from transformers import Dinov2Model, Dinov2WithRegistersModel

    torch.manual_seed(seed)
    theirs = (Dinov2WithRegistersModel if registers else Dinov2Model)(config(registers, **options))
    theirs = perturbed(theirs.eval())
    ours = like(theirs.config, interpolation="antialias" if registers else "size")
    load_weights(ours, theirs.state_dict(), HUGGINGFACE)
    return ours, theirs


def like(theirs, **options):
    names = (
        *("hidden_size", "num_hidden_layers", "num_attention_heads", "mlp_ratio", "layer_norm_eps", "image_size"),
        *("patch_size", "num_channels", "qkv_bias", "layerscale_value", "use_swiglu_ffn", "use_mask_token"),
        *("num_register_tokens", "drop_path_rate"),
    )
    values = {name: getattr(theirs, name) for name in names if hasattr(theirs, name)}
    return create_model("rad_dino", **translate("docs/rad_dino.md", values), **options).eval()


CONFIGS = [
    {},
    {"num_hidden_layers": 3, "num_attention_heads": 4, "num_channels": 1, "layer_norm_eps": 1e-3},
    {"qkv_bias": False, "mlp_ratio": 3, "patch_size": 4, "layerscale_value": 1e-5},
    {"use_swiglu_ffn": True, "hidden_size": 32, "num_attention_heads": 2, "use_mask_token": False},
    {"registers": 4},
    {"registers": 1, "use_swiglu_ffn": True, "mlp_ratio": 2, "image_size": 21},
]
SIZES = [(28, 28), (35, 56), (14, 56), (57, 29), (7, 84)]


@pytest.mark.upstream
@torch.no_grad()
@pytest.mark.parametrize("options", CONFIGS, ids=json.dumps)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_tokens_are_those_of_transformers(options, size):
    ours, theirs = twins(**options)
    x = image(2, ours.in_channels, *size)
    golden = theirs(x, output_hidden_states=True)
    torch.testing.assert_close(ours.tokens(x), golden.last_hidden_state, rtol=0, atol=2e-5)
    torch.testing.assert_close(ours.embed(x), golden.pooler_output, rtol=0, atol=2e-5)
    states = ours.hidden_states(x)
    assert len(states) == len(golden.hidden_states) == len(ours.blocks) + 1
    for mine, other in zip(states, golden.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_statistics_of_blocks_are_of_the_patches_alone(registers):
    model = network(num_register_tokens=registers)
    x = image(2, model.in_channels, 28, 42)
    after = [state[:, 1 + registers :].double() for state in model.hidden_states(x)[1:]]
    found = model.block_statistics(x).double().unflatten(1, (len(after), 4, -1))
    for state, moments in zip(after, found.unbind(1), strict=True):
        mean, deviation, skewness, kurtosis = moments.unbind(1)
        torch.testing.assert_close(mean, state.mean(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deviation, state.std(1, correction=0), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(skewness, torch.from_numpy(stats.skew(state, axis=1)), rtol=1e-2, atol=1e-3)
        torch.testing.assert_close(kurtosis, torch.from_numpy(stats.kurtosis(state, 1, False)), rtol=1e-2, atol=1e-3)


@pytest.mark.upstream
@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 2])
def test_masked_patches_are_those_of_transformers(registers):
    ours, theirs = twins(registers=registers)
    x, mask = image(2, 3, 35, 28), image(2, 20) > 0
    golden = theirs(x, bool_masked_pos=mask).last_hidden_state
    torch.testing.assert_close(ours.tokens(x, mask), golden, rtol=0, atol=2e-5)
    assert (ours.tokens(x) - golden).abs().max() > 0.1


@pytest.mark.upstream
@torch.no_grad()
def test_the_feature_map_is_that_of_transformers_backbone():
    from transformers import Dinov2Backbone

    torch.manual_seed(0)
    theirs = perturbed(Dinov2Backbone(config()).eval())
    ours = like(theirs.config)
    load_weights(ours, theirs.state_dict(), HUGGINGFACE)
    x = image(2, 3, 35, 50)
    (features,) = ours(x)
    assert features.shape == (2, 24, 5, 7)
    torch.testing.assert_close(features, theirs(x).feature_maps[0], rtol=0, atol=2e-5)


@pytest.mark.upstream
@pytest.mark.parametrize("options", [{}, {"registers": 2, "use_swiglu_ffn": True}], ids=json.dumps)
def test_gradients_are_those_of_transformers(options):
    ours, theirs = twins(**options)
    x, mask = image(2, 3, 35, 28), image(2, 20) > 0
    for tokens in (ours.tokens(x, mask), theirs(x, bool_masked_pos=mask).last_hidden_state):
        (tokens * image(*tokens.shape, seed=1)).sum().backward()
    golden = ours_from({name: p.grad for name, p in theirs.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == golden.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        scale = golden[name].abs().max()
        torch.testing.assert_close(gradient, golden[name], rtol=0, atol=2e-5 * float(scale) + 1e-6, msg=name)


@pytest.mark.upstream
@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 3])
def test_a_classification_heads_weights_are_left_out(registers):
    from transformers import Dinov2ForImageClassification, Dinov2WithRegistersForImageClassification

    head = Dinov2WithRegistersForImageClassification if registers else Dinov2ForImageClassification
    theirs = perturbed(head(config(registers)).eval())
    state = theirs.state_dict()
    assert sum(key.startswith("classifier.") for key in state) == 2
    ours = like(theirs.config, interpolation="antialias" if registers else "size")
    load_weights(ours, state, HUGGINGFACE)
    x = image(1, 3, 28, 28)
    torch.testing.assert_close(ours.tokens(x), theirs.base_model(x).last_hidden_state, rtol=0, atol=2e-5)


@pytest.mark.upstream
@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"registers": 2}, {"use_swiglu_ffn": True}], ids=json.dumps)
def test_files_that_transformers_writes_are_read(options, tmp_path):
    """Files have older names than the modules in memory: separate weights_in, attention.attention.query, ..."""
    from safetensors.torch import load_file

    ours, theirs = twins(**options)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    assert "encoder.layer.0.attention.attention.query.weight" in state
    again = like(theirs.config, interpolation=ours.interpolation)
    load_weights(again, state, HUGGINGFACE)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


# --- timm


@pytest.mark.upstream
@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_tokens_are_those_of_timm(registers):
    import timm

    ours = network(patch_size=14, img_size=56, embed_dim=48, num_register_tokens=registers, layer_scale_init=1e-5)
    name = "vit_small_patch14_reg4_dinov2" if registers else "vit_small_patch14_dinov2"
    theirs = timm.create_model(name, img_size=56, embed_dim=48, depth=2, num_heads=3, num_classes=0).eval()
    state = {k.replace("patch_embed.", "patch_embed.proj."): v for k, v in ours.state_dict().items()}
    del state["mask_token"]
    if registers:  # timm's table has no row for cls, which carries it instead
        state["reg_token"] = state.pop("register_tokens")
        state["cls_token"] = state["cls_token"] + state["pos_embed"][:, :1]
        state["pos_embed"] = state["pos_embed"][:, 1:]
    theirs.load_state_dict(state, strict=True)
    x = image(2, 3, 56, 56)
    torch.testing.assert_close(ours.tokens(x), theirs.forward_features(x), rtol=0, atol=2e-5)


# --- names of weights


def original_names(model, chunk=None):
    """The state dict of ours in the original's names; with ``chunk`` blocks in pieces of that many."""
    out = {}
    for key, value in model.state_dict().items():
        key = key.replace("patch_embed.", "patch_embed.proj.")
        if model.blocks[0].mlp.fc1.out_features != model.blocks[0].mlp.fc2.in_features:
            key = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunk:
            key = re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // chunk}.{m[1]}", key)
        out[key] = value
    return out


@pytest.mark.parametrize("chunk", [None, 1, 2])
@pytest.mark.parametrize("options", [{}, {"num_register_tokens": 2, "use_swiglu_ffn": True}], ids=json.dumps)
def test_the_originals_names_in_chunks_or_not(options, chunk):
    ours = network(depth=5, **options)
    state = {**original_names(ours, chunk), "dino_head.last_layer.weight_v": torch.zeros(2)}
    again = network(seed=1, depth=5, **options)
    load_weights(again, state, ORIGINAL)
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_every_tensor_of_the_published_file_is_accounted_for():
    pytest.importorskip("transformers")
    from transformers import Dinov2Config, Dinov2Model

    with torch.device("meta"):
        theirs = Dinov2Model(Dinov2Config(image_size=518)).state_dict()
        ours = create_model("rad_dino")
    assert len(theirs) == 223
    assert sum(v.numel() for v in theirs.values()) == sum(p.numel() for p in ours.parameters()) == 86_580_480
    translated = ours_from(theirs)
    assert {k: v.shape for k, v in translated.items()} == {k: v.shape for k, v in ours.state_dict().items()}
    assert len(translated) == 223 - 12 * 4  # q, k and v of twelve blocks, weight and bias, are one here


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("encoder.layer.1.attention.attention.key.bias"),
            r"2 of \d+ keys are not of the dinov2_huggingface layout: "
            r"encoder\.layer\.1\.attention\.attention\.(query|value)\.bias, encoder\.layer\.1\.[a-z.]+\.bias;",
        ),
        (lambda s: s.pop("embeddings.mask_token"), r"1 missing \(mask_token\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 of \d+ keys are not of the dinov2_huggingface layout: extra;"),
        (
            lambda s: s.update({"embeddings.position_embeddings": torch.zeros(1, 26, 24)}),
            r"1 of another shape \(pos_embed: network \(1, 17, 24\), weights \(1, 26, 24\)\)",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(change, message):
    ours = network()
    state = huggingface_names(ours)
    load_weights(ours, state, HUGGINGFACE)
    change(state)
    with pytest.raises(WeightsMismatch, match=message):
        load_weights(ours, state, HUGGINGFACE)


def huggingface_names(model):
    """The state dict of ours as transformers' files have it."""
    out = {}
    for key, value in model.state_dict().items():
        if ".attn.qkv." in key:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                name = key.replace("attn.qkv", f"attention.attention.{part}")
                out[name.replace("blocks.", "encoder.layer.")] = rows
            continue
        key = key.replace("attn.proj", "attention.output.dense").replace("blocks.", "encoder.layer.")
        key = re.sub(r"ls([12])\.gamma", r"layer_scale\1.lambda1", key)
        key = re.sub(r"^norm\.", "layernorm.", key)
        key = key.replace("pos_embed", "embeddings.position_embeddings")
        key = key.replace("patch_embed.", "embeddings.patch_embeddings.projection.")
        out[re.sub(r"^(\w+_token)", r"embeddings.\1", key)] = value
    return out


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"img_size": 35, "in_channels": 1, "qkv_bias": False, "use_mask_token": False, "mlp_ratio": 3.0},
        {"num_register_tokens": 3, "interpolation": "antialias"},
        {"spatial_dims": 3, "img_size": (16, 8, 8), "patch_size": (4, 2, 2), "depth": 3},
        {"use_swiglu_ffn": True, "mlp_ratio": 2.0, "embed_dim": 27},
    ],
    ids=json.dumps,
)
def test_a_networks_arguments_follow_from_its_weights(options):
    ours = network(**options)
    for layout, rule, state in (
        (HUGGINGFACE, "size", huggingface_names(ours)),
        (ORIGINAL, "offset", original_names(ours)),
    ):
        if layout is HUGGINGFACE and options.get("use_swiglu_ffn"):
            state = {
                k.replace("mlp.fc1", "mlp.weights_in").replace("mlp.fc2", "mlp.weights_out"): v
                for k, v in state.items()
            }
        found = layout.infer(state)
        assert found["interpolation"] == ("antialias" if options.get("num_register_tokens") else rule)
        assert "num_heads" not in found and "num_heads" in layout.ask
        again = RadDino(**found, num_heads=3)
        load_weights(again, state, layout)
        sides = (17, 8, 10) if options.get("spatial_dims") else (35, 42)
        x = image(1, ours.in_channels, *sides)
        with torch.no_grad():
            if again.interpolation == ours.interpolation:
                assert torch.equal(again.eval().tokens(x), ours.tokens(x))


def test_the_heads_of_published_widths_are_known():
    with torch.device("meta"):
        state = create_model("rad_dino", depth=1).state_dict()
    assert ORIGINAL.infer({k.replace("patch_embed.", "patch_embed.proj."): v for k, v in state.items()}) == {
        **{"in_channels": 3, "spatial_dims": 2, "img_size": (518, 518), "patch_size": (14, 14), "embed_dim": 768},
        **{"depth": 1, "mlp_ratio": 4.0, "qkv_bias": True, "use_swiglu_ffn": False, "num_register_tokens": 0},
        **{"use_mask_token": True, "interpolation": "offset", "num_heads": 12},
    }


# --- what it computes


@torch.no_grad()
def test_a_volume_of_depth_one_is_its_slice():
    flat = network()
    deep = network(seed=1, spatial_dims=3, img_size=(1, 28, 28), patch_size=(1, 7, 7))
    state = flat.state_dict()
    load_weights(deep, {**state, "patch_embed.weight": state["patch_embed.weight"][:, :, None]})
    x = image(2, 3, 35, 50)
    torch.testing.assert_close(deep.tokens(x[:, :, None]), flat.tokens(x), rtol=0, atol=1e-5)
    assert deep(x[:, :, None])[0].shape == (2, 24, 1, 5, 7)


@torch.no_grad()
def test_the_rules_agree_on_the_tables_own_grid_and_nowhere_else():
    models = {rule: network(interpolation=rule) for rule in ("size", "offset", "antialias")}
    native, larger, smaller = (
        {rule: model.positions(grid) for rule, model in models.items()} for grid in ((4, 4), (6, 5), (3, 2))
    )
    assert all(torch.equal(native["size"], table) for table in native.values())
    for tables in (larger, smaller):
        assert all(torch.equal(table[:, :1], native["size"][:, :1]) for table in tables.values())
        assert (tables["size"] - tables["offset"]).abs().max() > 1e-3
        assert (tables["size"] - tables["antialias"]).abs().max() > 1e-2


@torch.no_grad()
def test_voxels_beyond_the_last_whole_patch_are_not_seen():
    model, x = network(), image(1, 3, 34, 29)
    assert model(x)[0].shape == (1, 24, 4, 4)
    assert torch.equal(model.tokens(x), model.tokens(x[:, :, :28, :28]))


def test_the_mask_token_gets_a_gradient_from_masks_alone():
    model, x = network(), image(1, 3, 28, 28)
    model(x)[0].square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["mask_token"]
    model.tokens(x, image(1, 16) > 0).square().sum().backward()
    assert model.mask_token.grad.any()


def test_drop_path_needs_training_mode():
    model, plain, x = network(drop_path_rate=0.5), network(), image(4, 3, 28, 28)
    with torch.no_grad():
        assert torch.equal(model.tokens(x), plain.tokens(x))
        assert not torch.allclose(model.train().tokens(x), plain.train().tokens(x))


@torch.no_grad()
@pytest.mark.parametrize("rule", ["size", "antialias"])
def test_exports_with_dynamic_size(rule):
    model = network(interpolation=rule, num_register_tokens=1)
    sides = {n: 7 * torch.export.Dim(name, min=2, max=64) for n, name in ((2, "height"), (3, "width"))}
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=8), **sides}}
    exported = torch.export.export(model, (image(2, 3, 42, 56),), dynamic_shapes=shapes).module()
    for x in (image(1, 3, 28, 28), image(3, 3, 14, 70)):
        torch.testing.assert_close(exported(x)[0], model(x)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_bfloat16_autocast_with_registers_and_mask():
    model, x, mask = network(num_register_tokens=2), image(2, 3, 28, 28), image(2, 16) > 0
    exact = model.tokens(x, mask)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model.tokens(x, mask)
    assert (rough - exact).norm() < 0.03 * exact.norm()


@pytest.mark.slow
@torch.no_grad()
def test_the_published_size_runs():
    (features,) = create_model("rad_dino", depth=2)(image(1, 3, 518, 518))
    assert features.shape == (1, 768, 37, 37)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide the width 24, got 5; use 4"),
        ({"num_heads": 0}, "num_heads must divide the width 24, got 0; use 1"),
        (
            {"interpolation": "bicubic"},
            "interpolation must be one of ['antialias', 'offset', 'size'], got 'bicubic'",
        ),
        ({"layer_scale_init": 0.0}, "layer_scale_init must not be 0; DINOv2 trains from 1e-5, RAD-DINO has 1.0"),
        ({"img_size": (28, 6)}, "img_size must hold at least one patch of (7, 7), got (28, 6)"),
        ({"patch_size": (7, 7, 7)}, "patch_size needs one int or 2 of them, got (7, 7, 7)"),
        ({"spatial_dims": 4}, "spatial_dims must be one of [1, 2, 3], got 4"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        create_model("rad_dino", **{**SMALL, **options})


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 28), "this network needs (B, 3, 2 spatial axes), got shape (1, 3, 28)"),
        ((3, 28, 28), "this network needs (B, 3, 2 spatial axes), got shape (3, 28, 28)"),
        ((1, 4, 28, 28), "this network needs (B, 3, 2 spatial axes), got shape (1, 4, 28, 28)"),
        (
            (1, 1, 28, 28),
            "this network needs (B, 3, 2 spatial axes), got shape (1, 1, 28, 28); "
            "repeat the channel of a grey image 3 times",
        ),
        ((1, 3, 28, 6), "every side must hold at least one patch of (7, 7), got (28, 6)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape, message):
    for use in (RadDino.forward, RadDino.embed, RadDino.hidden_states):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            use(network(), torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "mask", "message"),
    [
        ({}, torch.zeros(1, 15).bool(), r"bool, one value per patch \(1, 16\), got torch.bool of shape \(1, 15\)"),
        ({}, torch.zeros(1, 16), r"bool, one value per patch \(1, 16\), got torch.float32 of shape \(1, 16\)"),
        ({"use_mask_token": False}, torch.zeros(1, 16).bool(), "no mask token; build it with use_mask_token=True"),
    ],
)  # fmt: skip
def test_a_mask_that_does_not_fit_is_refused(options, mask, message):
    with pytest.raises(ValueError, match=message):
        network(**options).tokens(image(1, 3, 28, 28), mask)
