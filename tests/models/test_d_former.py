"""D-Former as a network: any size, three scales, and what weights files depend on."""

import hashlib
import re
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvit.errors import WeightsMismatch
from medvit.models.account import take_stock
from medvit.models.d_former import LAYOUTS, OFFICIAL_KEYS, DFormer
from medvit.models.encoder import Encoder
from medvit.models.reshape import Reshape
from medvit.models.weights import load_weights

SMALL = {
    "in_channels": 1,
    "out_channels": 2,
    "spatial_dims": 2,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": (2, 2, 2, 2),
    "num_heads": (1, 2, 2, 4),
    "group_size": 3,
    "intervals": (4, 2, 2, 1),
}


def network(seed=0, **options):
    torch.manual_seed(seed)
    return DFormer(**{**SMALL, **options}).eval()


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- what weights files depend on


@pytest.mark.parametrize("deep_supervision", [True, False])
def test_the_published_size(deep_supervision):
    with torch.device("meta"):
        model = DFormer(1, 14, deep_supervision=deep_supervision, official_quirks=not deep_supervision)
    heads = sum(p.numel() for p in model.heads.parameters())
    assert heads == 6_203_904
    assert sum(p.numel() for p in model.parameters()) - heads == 44_353_344


@pytest.mark.parametrize(
    ("options", "tensors", "digest"),
    [
        ({}, 218, "42b4eb1e6413d649"),
        ({"spatial_dims": 3, "deep_supervision": True, "depths": (1, 2, 1, 3)}, 190, "633834edaadead49"),
        ({"qkv_bias": False, "patch_norm": False, "in_channels": 3}, 202, "2f7f040189b13ccd"),
    ],
)
def test_names_and_shapes_of_weights_are_frozen(options, tensors, digest):
    with torch.device("meta"):
        state = DFormer(**{**SMALL, **options}).state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    # a bundle's model.pt holds these names: a change here needs a conversion for every released file
    assert (len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]) == (tensors, digest)


def official_name(key):
    """The authors' name of one of our parameters."""
    rules = [
        (r"heads\.(\d)\.expand\.", r"final.\1.0."),
        (r"heads\.(\d)\.project\.", r"final.\1.1."),
        (r"encoder\.stages\.", "model_down.layers."),
        (r"encoder\.merges\.(\d)", r"model_down.layers.\1.downsample"),
        (r"encoder\.", "model_down."),
        (r"decoder\.norm\.", "model_down.norm_up."),
        (r"decoder\.expands\.0\.", "model_down.layers_up.0."),
        (r"decoder\.expands\.(\d)\.", r"model_down.layers_up.\1.upsample."),
        (r"decoder\.fuses\.(\d)", lambda m: f"model_down.concat_back_dim.{int(m[1]) + 1}"),
        (r"decoder\.stages\.(\d)", lambda m: f"model_down.layers_up.{int(m[1]) + 1}"),
        (r"\.position\.conv\.", ".pos_block.proj.0."),
    ]
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def test_an_official_file_names_every_parameter_and_tells_the_architecture():
    options = {
        **{k: v for k, v in SMALL.items() if k not in ("num_heads", "group_size", "intervals")},
        **{"patch_size": (2, 3), "depths": (1, 2, 3, 1), "deep_supervision": True},
        **{"mlp_ratio": 2.5, "qkv_bias": False, "patch_norm": False, "in_channels": 3},
    }
    state = DFormer(**options, num_heads=(1, 2, 2, 4), group_size=3).state_dict()
    official = {official_name(key): value for key, value in state.items()}
    assert OFFICIAL_KEYS.apply(official).keys() == state.keys()
    (layout,) = LAYOUTS
    assert layout.infer(official) == options
    assert all(any(re.fullmatch(mark, key) for key in official) for mark in layout.marks)


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_authors_three_heads_fit_whatever_deep_supervision_says(deep_supervision):
    trained, fresh = network(deep_supervision=True), network(seed=1, deep_supervision=deep_supervision)
    official = {official_name(key): value for key, value in trained.state_dict().items()}
    (layout,) = LAYOUTS
    load_weights(fresh, official, layout)
    x = image(1, 1, 20, 30)
    assert torch.equal(fresh(x), trained(x))
    account, _ = take_stock(layout, official, fresh, Reshape(), allow_partial=False)
    assert account.problem() is None
    assert len(account.dropped) == (0 if deep_supervision else 8)
    with pytest.raises(WeightsMismatch, match="1 unexpected"):
        load_weights(fresh, {**official, "final.3.1.weight": torch.zeros(1)}, layout)


# --- any size


@cache
def network_of(rank):
    return network(spatial_dims=rank, patch_size=(2, 3, 2)[:rank], group_size=(2, 3, 2)[:rank], deep_supervision=True)


@settings(max_examples=25)
@given(
    st.one_of(
        st.lists(st.integers(1, 70), min_size=2, max_size=2), st.lists(st.integers(1, 24), min_size=3, max_size=3)
    )
)
@torch.no_grad()
def test_logits_have_the_size_of_the_image(spatial):
    model, x = network_of(len(spatial)), image(1, 1, *spatial)
    out = model.eval()(x)
    assert out.shape == (1, 2, *spatial)
    assert out.isfinite().all()
    scales = model.train()(x)
    assert [tuple(y.shape[2:]) for y in scales] == [tuple(-(-n // s) for n in spatial) for s in (1, 2, 4)]
    assert torch.equal(scales[0], out)
    maps = model.encoder(x)
    sizes = [tuple(-(-n // s) for n, s in zip(spatial, stride, strict=True)) for stride in model.encoder.strides]
    assert [tuple(m.shape[1:]) for m in maps] == [(c, *g) for c, g in zip(model.encoder.channels, sizes, strict=True)]


def test_the_encoder_keeps_its_promise():
    encoder = network(spatial_dims=3, patch_size=(1, 2, 4)).encoder
    assert isinstance(encoder, Encoder)
    assert (encoder.spatial_dims, encoder.in_channels, encoder.embed_dim) == (3, 1, 64)
    assert encoder.channels == (8, 16, 32, 64)
    assert encoder.strides == ((1, 2, 4), (2, 4, 8), (4, 8, 16), (8, 16, 32))
    x = image(2, 1, 9, 15, 31)
    torch.testing.assert_close(encoder.embed(x), encoder(x)[-1].mean((2, 3, 4)))


@torch.no_grad()
def test_one_network_takes_any_size_in_any_order():
    model, sizes = network(), [(64, 96), (3, 5), (33, 70)]
    first = [model(image(1, 1, *size)) for size in sizes]
    again = [model(image(1, 1, *size)) for size in reversed(sizes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    model, x = network(), image(3, 1, 37, 50)
    torch.testing.assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("spatial", [(48, 72), (24, 24, 48)])
def test_the_authors_quirks_do_not_show_on_divisible_grids(spatial):
    """Every grid is a whole number of groups and intervals on every axis, down to the last."""
    options = {"spatial_dims": len(spatial), "patch_size": 1, "deep_supervision": True, "intervals": (2, 1, 1, 1)}
    model, quirky = network(**options), network(**options, official_quirks=True)
    out = quirky(image(1, 1, *spatial))
    assert len(out) == 2
    scales = model.train()(image(1, 1, *spatial))
    assert all(torch.equal(a, b) for a, b in zip(scales, out, strict=False))
    assert torch.equal(model.eval()(image(1, 1, *spatial)), out[0])


@torch.no_grad()
def test_the_authors_do_not_crop_and_always_build_three_heads():
    quirky = network(official_quirks=True)
    assert len(quirky.heads) == 3
    assert quirky(image(1, 1, 31, 64)).shape == (1, 2, 32, 64)
    assert len(network().heads) == 1


# --- errors


@pytest.mark.parametrize("shape", [(1, 64, 64), (1, 1, 8, 8, 8), (1, 3, 64, 64), (1, 1, 0, 64)])
def test_an_image_that_does_not_fit_is_refused(shape):
    hint = "; no axis may be empty" if 0 in shape else ""
    message = f"this network needs (B, 1, 2 spatial axes), got shape {shape}{hint}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"depths": (2, 2, 2)},
            r"depths needs one number above 0 for each of the four levels, got \(2, 2, 2\)",
        ),
        ({"num_heads": (1, 2, 2, 0)}, r"num_heads needs one number above 0 .* got \(1, 2, 2, 0\)"),
        ({"intervals": (8, 4, 2, 0)}, r"intervals needs one number above 0 .* got \(8, 4, 2, 0\)"),
        ({"num_heads": 2}, r"num_heads needs one number above 0 for each of the four levels, got 2"),
        ({"num_heads": (3, 3, 3, 3)}, "num_heads must divide the width 8, got 3; use 2"),
        ({"patch_size": (2, 2, 2)}, r"patch_size needs one int or 2 of them, got \(2, 2, 2\)"),
        ({"group_size": (2, 0)}, r"group_size must be at least 1 on every axis, got \(2, 0\)"),
        ({"spatial_dims": 4, "patch_size": 2}, r"spatial_dims must be one of \[1, 2, 3\], got 4"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        network(**options)


# --- training


@pytest.mark.parametrize("options", [{}, {"deep_supervision": True}, {"spatial_dims": 3, "drop_path_rate": 0.1}])
def test_every_parameter_gets_a_gradient(options):
    model = network(**options).train()
    size = (24, 18, 20)[: model.encoder.spatial_dims]
    out = model(image(2, 1, *size))
    for y in out if isinstance(out, list) else [out]:
        (y * image(*y.shape, seed=1)).sum().backward(retain_graph=True)
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert dead == []


def test_deep_supervision_feeds_monais_loss():
    from monai.losses import DeepSupervisionLoss, DiceCELoss

    model = network(deep_supervision=True).train()
    loss = DeepSupervisionLoss(DiceCELoss(to_onehot_y=True, softmax=True))
    value = loss(model(image(2, 1, 31, 45)), torch.ones(2, 1, 31, 45))
    value.backward()
    assert value.isfinite()


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for use_checkpoint in (False, True):
        model = network(use_checkpoint=use_checkpoint, drop_rate=0.1, attn_drop_rate=0.1, drop_path_rate=0.1).train()
        torch.manual_seed(1)
        out = model(image(2, 1, 40, 33))
        (out * image(*out.shape, seed=1)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_checkpointed_blocks_run_twice_and_only_where_gradients_are_wanted():
    runs = []
    model = network(use_checkpoint=True)
    model.decoder.stages[0].blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(image(1, 1, 20, 20))
    assert len(runs) == 1
    model(image(1, 1, 20, 20)).sum().backward()
    assert len(runs) == 3


def test_dropout_needs_training_mode():
    model, plain = network(drop_rate=0.5, attn_drop_rate=0.5, drop_path_rate=0.5), network()
    assert torch.equal(model(image(1, 1, 20, 30)), plain(image(1, 1, 20, 30)))
    rates = [block.drop_path.rate for stage in model.encoder.stages for block in stage.blocks]
    assert rates == pytest.approx([0.5 * i / 7 for i in range(8)])
    mirrored = [block.drop_path.rate for stage in reversed(model.decoder.stages) for block in stage.blocks]
    assert mirrored == rates[:6]


def test_a_few_steps_of_training_lower_the_loss():
    model = network().train()
    x = image(2, 1, 32, 30)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- precision and export


@torch.no_grad()
def test_bfloat16_autocast():
    model, x = network(), image(1, 1, 50, 70)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.03 * exact.abs().mean()


@torch.no_grad()
def test_double_precision_agrees():
    model, x = network(), image(1, 1, 50, 70)
    single = model(x)
    torch.testing.assert_close(single.double(), model.double()(x.double()), rtol=0, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("spatial", [(37, 50), (9, 14, 11)])
def test_an_exported_graph_reproduces_the_network_and_leaves_it_usable(spatial):
    model, x = network(spatial_dims=len(spatial), depths=(2, 1, 1, 1)), image(2, 1, *spatial)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    more = image(3, *x.shape[1:], seed=1)
    torch.testing.assert_close(exported(more), model(more), rtol=0, atol=1e-5)


def test_training_after_inference_mode():
    model = network(group_size=5)  # not used elsewhere: nothing is cached for it yet
    with torch.inference_mode():
        model(image(1, 1, 37, 50))
    model(image(1, 1, 37, 50)).sum().backward()
