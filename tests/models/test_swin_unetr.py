"""Swin UNETR against the installed MONAI, forward and backward, and what a user may do with it."""

import hashlib
import re
import warnings

import pytest
import torch
from torch.nn import functional as F

from medvit import create_model
from medvit.kernels.pieces import _pieces
from medvit.models.swin_unetr import MONAI_KEYS, SwinUNETR
from medvit.models.weights import load_weights

SMALL = {"in_channels": 1, "out_channels": 2, "spatial_dims": 2, "feature_size": 12, "window_size": 4}


def network(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("swin_unetr", **{**SMALL, **options}).eval()


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- MONAI


def legacy_merging():
    """MONAI's merging class as it was before 1.5."""
    from monai.networks.nets.swin_unetr import PatchMergingV2

    class Legacy(PatchMergingV2):
        def forward(self, x):
            d, h, w = x.shape[1:-1]
            x = F.pad(x, (0, 0, 0, w % 2, 0, h % 2, 0, d % 2))
            starts = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
            return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in starts], -1)))

    return Legacy


def twins(seed=0, **options):
    """MONAI's network with every tensor away from its initial value, and medvit's with the same weights."""
    from monai.networks.nets import SwinUNETR as Monai

    options = {"in_channels": 1, "out_channels": 2, "feature_size": 12, **options}
    torch.manual_seed(seed)
    downsample = (
        legacy_merging() if options.get("downsample") == "merging_legacy" else options.get("downsample", "merging")
    )
    monai = Monai(**{**options, "downsample": downsample}).eval()
    with torch.no_grad():
        for parameter in monai.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for buffer in monai.buffers():  # running statistics
            if buffer.is_floating_point():
                buffer.add_(torch.rand_like(buffer))
    ours = create_model("swin_unetr", **options).eval()
    load_weights(ours, monai.state_dict(), MONAI_KEYS)
    return ours, monai


CONFIGS = [
    ((64, 96), {"window_size": 7}),
    ((32, 64), {"window_size": (3, 5), "patch_norm": True, "mlp_ratio": 2.0}),
    ((64, 32), {"window_size": 16, "use_v2": True}),  # larger than every grid
    ((96, 64), {"depths": (1, 3, 2, 1), "num_heads": (2, 4, 6, 12), "normalize": False, "qkv_bias": False}),
    ((64, 64), {"in_channels": 12, "downsample": "mergingv2", "norm_name": "batch"}),
    ((32, 32), {"norm_name": "batch", "use_v2": True}),  # one cell of 32
    ((32, 64, 32), {"window_size": 7, "out_channels": 3}),
    ((64, 32, 32), {"window_size": (2, 7, 4), "downsample": "mergingv2", "patch_norm": True}),
    ((32, 32, 64), {"window_size": (4, 4, 20), "use_v2": True}),
    ((32, 64, 32), {"window_size": 3, "downsample": "merging_legacy", "in_channels": 2}),
]


@pytest.mark.upstream
@pytest.mark.parametrize(("spatial", "options"), CONFIGS, ids=lambda value: str(value))
def test_logits_are_monais(spatial, options):
    ours, monai = twins(spatial_dims=len(spatial), **options)
    # double precision: instance norms over a few voxels magnify rounding
    x = image(2 if len(spatial) == 2 else 1, ours.in_channels, *spatial).double()
    with torch.no_grad():
        out, golden = ours.double()(x), monai.double()(x)
    assert out.shape == (len(x), options.get("out_channels", 2), *spatial)
    torch.testing.assert_close(out, golden, rtol=1e-9, atol=1e-9)


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("spatial", "options"), [((64, 96), {"window_size": 5}), ((32, 32, 64), {"window_size": (3, 4, 5), "use_v2": True})]
)
def test_gradients_are_monais(spatial, options):
    ours, monai = twins(spatial_dims=len(spatial), **options)
    x = image(1, 1, *spatial).double()
    for net in (ours, monai):
        net.double().train()
        out = net(x)
        (out * image(*out.shape, seed=1)).mean().backward()
    golden = MONAI_KEYS.apply({name: p.grad for name, p in monai.named_parameters()})
    gradients = {name: p.grad for name, p in ours.named_parameters()}
    assert gradients.keys() == golden.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, golden[name], rtol=1e-6, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.upstream
def test_monais_names_are_all_known():
    from monai.networks.nets import SwinUNETR as Monai

    state = Monai(1, 2, feature_size=12).state_dict()
    assert len(state) == 159
    dropped = [key for key in state if MONAI_KEYS.rename(key) is None]
    assert len(dropped) == 8
    assert all(key.endswith(".attn.relative_position_index") for key in dropped)


# --- what weights files depend on


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({"feature_size": 12}, 4_078_220),
        ({"feature_size": 24}, 15_703_304),
        ({"feature_size": 48}, 62_187_296),
        ({"feature_size": 48, "in_channels": 4, "out_channels": 3}, 62_191_941),
        ({"feature_size": 48, "use_v2": True}, 72_762_656),
    ],
)
def test_published_sizes(options, parameters):
    with torch.device("meta"):
        model = SwinUNETR(**{"in_channels": 1, "out_channels": 14, **options})
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("options", "tensors", "digest"),
    [
        ({}, 151, "2c6b9ef3b70fc30e"),
        ({"use_v2": True, "patch_norm": True}, 161, "8f8eed302d3510a9"),
        ({"spatial_dims": 2, "norm_name": "batch", "in_channels": 2}, 281, "d00892f9b5941eb2"),
    ],
)
def test_names_and_shapes_of_weights_are_frozen(options, tensors, digest):
    with torch.device("meta"):
        state = SwinUNETR(**{"in_channels": 1, "out_channels": 14, "feature_size": 12, **options}).state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert len(lines) == tensors
    # a bundle's model.pt holds these names: a change here needs a conversion for every released file
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


# --- errors


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (1, 1, 64, 90),
            {},
            "every side must be a multiple of (32, 32) and the image larger than one such cell, got (64, 90); "
            "pad to (64, 96), or use a sliding window with such a roi",
        ),
        (
            (1, 1, 64, 30),
            {"patch_size": (4, 1)},
            "every side must be a multiple of (64, 16) and the image larger than one such cell, got (64, 30); "
            "pad to (64, 32), or use a sliding window with such a roi",
        ),
        (
            (1, 1, 32, 32),
            {},
            "every side must be a multiple of (32, 32) and the image larger than one such cell, got (32, 32); "
            "pad to (64, 64), or use a sliding window with such a roi",
        ),
        (
            (1, 1, 0, 64),
            {},
            "this network needs (B, 1, 2 spatial axes), got shape (1, 1, 0, 64); no axis may be empty",
        ),
        (
            (1, 1, 20, 32),
            {"norm_name": "batch"},
            "every side must be a multiple of (32, 32), got (20, 32); "
            "pad to (32, 32), or use a sliding window with such a roi",
        ),
        ((1, 64, 64), {}, "this network needs (B, 1, 2 spatial axes), got shape (1, 64, 64)"),
        ((1, 1, 64, 64, 64), {}, "this network needs (B, 1, 2 spatial axes), got shape (1, 1, 64, 64, 64)"),
        ((1, 3, 64, 64), {}, "this network needs (B, 1, 2 spatial axes), got shape (1, 3, 64, 64)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network(**options)(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 1, 64, 90), (1, 1, 30, 32), (1, 1, 1, 1), (1, 1, 33, 300)])
def test_the_size_an_error_names_works(shape):
    model = network()
    with pytest.raises(ValueError, match="pad to") as caught:
        model(torch.zeros(shape))
    fits = [int(n) for n in re.search(r"pad to \(([^)]*)\)", str(caught.value))[1].split(",")]
    with torch.no_grad():
        assert model(image(1, 1, *fits)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 2, 2), "num_heads": (3, 6, 12)}, r"Swin UNETR has four stages, got depths=\(2, 2, 2\)"),
        ({"depths": 2}, "Swin UNETR has four stages, got depths=2"),
        ({"num_heads": 3}, r"depths and num_heads need one entry per stage, got depths=\(2, 2, 2, 2\) and num_heads=3"),
        ({"feature_size": 16}, "num_heads must divide the width 16, got 3; use 2"),
        ({"norm_name": "group"}, r"norm must be one of \['batch', 'instance'\], got 'group'"),
        (
            {"norm_name": ("instance", {"affine": True})},
            r"norm must be one of \['batch', 'instance'\], got \('instance', .*\)",
        ),
        ({"spatial_dims": 4}, r"spatial_dims must be one of \[1, 2, 3\], got 4"),
    ],
)
def test_what_cannot_be_built_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        network(**options)


# --- training


@pytest.mark.parametrize("options", [{}, {"use_v2": True, "patch_norm": True}, {"norm_name": "batch"}])
def test_every_parameter_gets_a_gradient(options):
    model = network(**options).train()
    out = model(image(2, 1, 64, 64))
    (out * image(*out.shape, seed=1)).sum().backward()
    dead = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any() or not p.grad.isfinite().all()]
    assert dead == []


def test_recomputing_activations_changes_no_gradient():
    gradients = []
    for use_checkpoint in (False, True):
        model = network(use_checkpoint=use_checkpoint, drop_rate=0.1, attn_drop_rate=0.1, dropout_path_rate=0.1).train()
        torch.manual_seed(1)
        out = model(image(2, 1, 64, 32))
        (out * image(*out.shape, seed=1)).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_checkpointed_blocks_run_twice_and_only_where_gradients_are_wanted():
    runs = []
    model = network(use_checkpoint=True)
    model.encoder.stages[0].blocks[0].norm1.register_forward_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(image(1, 1, 64, 32))
    assert len(runs) == 1
    model(image(1, 1, 64, 32)).sum().backward()
    assert len(runs) == 3


def test_training_after_inference_mode():
    model = network(window_size=6)  # not used elsewhere: nothing is cached for it yet
    with torch.inference_mode():
        model(image(1, 1, 96, 64))
    model(image(1, 1, 96, 64)).sum().backward()


def test_a_few_steps_of_training_lower_the_loss():
    model = network().train()
    x = image(2, 1, 64, 32)
    target = (x[:, 0] > 0).long()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(8):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# --- use


@torch.no_grad()
def test_images_of_a_batch_do_not_see_each_other():
    model, x = network(), image(3, 1, 64, 96)
    torch.testing.assert_close(model(x), torch.cat([model(x[i : i + 1]) for i in range(3)]), rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_network_takes_any_size_in_any_order():
    model, sizes = network(), [(64, 96), (32, 64), (160, 32)]
    first = [model(image(1, 1, *size)) for size in sizes]
    again = [model(image(1, 1, *size)) for size in reversed(sizes)]
    assert all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


@torch.no_grad()
def test_the_exact_clamp_differs_only_where_the_prefix_reads_other_offsets():
    prefix, exact = network(), network(clamp="exact")
    for size in ((64, 64), (32, 64)):  # the last grid is a whole window, or one clamped along the first axis
        assert torch.equal(prefix(image(1, 1, *size)), exact(image(1, 1, *size)))
    assert not torch.allclose(prefix(image(1, 1, 64, 32)), exact(image(1, 1, 64, 32)))


@torch.no_grad()
def test_bfloat16_autocast():
    model, x = network(), image(1, 1, 64, 96)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() < 0.02 * exact.abs().mean() + 0.01


@torch.no_grad()
def test_double_precision_agrees():
    model, x = network(), image(1, 1, 64, 96)
    single = model(x)
    torch.testing.assert_close(single.double(), model.double()(x.double()), rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_jit_trace_reproduces_the_network():
    model, x = network(), image(1, 1, 64, 96)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # sizes become constants, as they should
        warnings.filterwarnings("ignore", "`torch.jit.trace", category=FutureWarning)
        traced = torch.jit.trace(model, x)
        other = image(2, 1, 64, 96, seed=1)
        torch.testing.assert_close(traced(x), model(x), rtol=0, atol=1e-5)
        torch.testing.assert_close(traced(other), model(other), rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_exported_graph_reproduces_the_network_and_leaves_it_usable():
    model, x = network(), image(1, 1, 64, 96)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), model(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_compiled_stage_is_one_graph():
    stage, x = network().encoder.stages[0], image(1, 12, 9, 14)
    compiled = torch.compile(stage, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stage(x), rtol=0, atol=1e-5)


def test_a_meta_forward_leaves_real_ones_alone():
    with torch.device("meta"):
        ghost = SwinUNETR(**{**SMALL, "window_size": 5})
        assert ghost(torch.empty(1, 1, 96, 128)).shape == (1, 2, 96, 128)
    assert network(window_size=5)(image(1, 1, 96, 128)).isfinite().all()


def test_tables_of_windows_are_made_once_per_size():
    model = network(window_size=3)
    with torch.no_grad():
        model(image(1, 1, 64, 96))
        made = _pieces.cache_info().misses
        model(image(1, 1, 64, 96, seed=1))
        assert _pieces.cache_info().misses == made
        model(image(1, 1, 64, 160))
        assert _pieces.cache_info().misses > made


def test_dropout_needs_training_mode():
    model, plain = network(drop_rate=0.5, attn_drop_rate=0.5, dropout_path_rate=0.5), network()
    assert torch.equal(model(image(1, 1, 64, 32)), plain(image(1, 1, 64, 32)))
