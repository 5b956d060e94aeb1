"""Masked autoencoder against the installed transformers, in 3D against itself in 2D, and what a user may do with it."""

import re

import pytest
import torch

from medvit import create_model
from medvit.models.encoder import Encoder
from medvit.models.mae import LAYOUTS
from medvit.models.weights import load_weights

SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def network(seed=0, shake=0.1, **options):
    """A small network with every tensor away from its initial value, positions too."""
    torch.manual_seed(seed)
    model = create_model("mae", **{**SMALL, **options}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return model


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def noise(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- transformers


def from_transformers(name):
    """A name of ViTMAEForPreTraining as the authors spell it; q, k and v stay apart."""
    for pattern, ours in [
        (r"(vit\.embeddings|decoder)\.(cls_token|mask_token|decoder_pos_embed)", r"\2"),
        (r"vit\.embeddings\.position_embeddings", "pos_embed"),
        (r"vit\.embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (r"vit\.layernorm\.(\w+)", r"norm.\1"),
        (r"decoder\.(decoder_(?:embed|norm|pred)\.\w+)", r"\1"),
    ]:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    name = name.replace("vit.layers", "blocks").replace("decoder.decoder_layers", "decoder_blocks")
    name = name.replace("layernorm_before", "norm1").replace("layernorm_after", "norm2")
    return name.replace("attention.o_proj", "attn.proj")


def fused(state):
    """The authors' state dict of a transformers one."""
    state = {from_transformers(k): v for k, v in state.items()}
    for key in [k for k in state if "attention.q_proj" in k]:
        parts = [state.pop(key.replace("q_proj", f"{p}_proj")) for p in "qkv"]
        state[key.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return state


@pytest.mark.upstream
@pytest.mark.parametrize(
    ("options", "ratio"),
    [
        ({}, 0.75),
        ({"norm_pix_loss": True, "in_channels": 1, "img_size": 24}, 0.6),
        ({"patch_size": 8, "mlp_ratio": 2.0, "depth": 1, "decoder_depth": 3, "img_size": 32}, 0.0625),
    ],
)
def test_outputs_and_gradients_are_those_of_transformers(options, ratio):
    transformers = pytest.importorskip("transformers")
    o = {"in_channels": 3, "norm_pix_loss": False, "mlp_ratio": 4.0, **SMALL, **options}
    config = transformers.ViTMAEConfig(
        hidden_size=o["embed_dim"],
        num_hidden_layers=o["depth"],
        num_attention_heads=o["num_heads"],
        intermediate_size=int(o["embed_dim"] * o["mlp_ratio"]),
        decoder_hidden_size=o["decoder_embed_dim"],
        decoder_num_hidden_layers=o["decoder_depth"],
        decoder_num_attention_heads=o["decoder_num_heads"],
        decoder_intermediate_size=int(o["decoder_embed_dim"] * o["mlp_ratio"]),
        image_size=o["img_size"],
        patch_size=o["patch_size"],
        num_channels=o["in_channels"],
        norm_pix_loss=o["norm_pix_loss"],
        mask_ratio=ratio,
        layer_norm_eps=1e-6,
    )
    torch.manual_seed(0)
    theirs = transformers.ViTMAEForPreTraining(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours = create_model("mae", **o, mask_ratio=ratio).eval()
    load_weights(ours, fused(theirs.state_dict()), LAYOUTS[0].keys)

    x = image(2, o["in_channels"], o["img_size"], o["img_size"])
    order = noise(2, (o["img_size"] // o["patch_size"]) ** 2)
    expected, out = theirs(x, noise=order), ours(x, noise=order)
    torch.testing.assert_close(out.pred, expected.logits, rtol=0, atol=1e-4)
    assert torch.equal(out.mask, expected.mask)
    assert torch.equal(out.ids_restore, expected.ids_restore)
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    out.loss.backward()
    wanted = LAYOUTS[0].keys.apply(fused({k: p.grad for k, p in theirs.named_parameters() if p.grad is not None}))
    for name, parameter in ours.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    # another size than the positions are for
    larger, order = image(1, o["in_channels"], 40, 24), noise(1, 40 * 24 // o["patch_size"] ** 2)
    latent = theirs.vit(larger, noise=order, interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(ours(larger, noise=order).latent, latent, rtol=0, atol=1e-4)


# --- any rank


def test_one_slice_in_3d_is_the_2d_network():
    flat = network(img_size=(16, 12), in_channels=2)
    deep = network(img_size=(1, 16, 12), patch_size=(1, 4, 4), spatial_dims=3, in_channels=2, seed=1)
    state = flat.state_dict()
    kernel = "encoder.patch_embed.proj.weight"
    load_weights(deep, {**state, kernel: state[kernel][:, :, None]})
    for spatial in ((16, 12), (8, 20)):
        x, order = image(2, 2, *spatial), noise(2, spatial[0] * spatial[1] // 16)
        for name, value in flat(x, noise=order)._asdict().items():
            torch.testing.assert_close(deep(x[:, :, None], noise=order)._asdict()[name], value, rtol=0, atol=1e-5)


def test_volumes_are_reconstructed_patch_by_patch():
    model = network(spatial_dims=3, img_size=(8, 16, 8), in_channels=2)
    x = image(2, 2, 8, 16, 8)
    out = model(x, 0.5)
    assert out.pred.shape == (2, 16, 4**3 * 2)
    assert out.latent.shape == (2, 1 + 8, 24)
    assert torch.equal(model.unpatchify(model.patchify(x)), x)
    hidden = (model.unpatchify(out.pred - model.patchify(x)) ** 2)[
        model.unpatchify(out.mask[..., None].expand(-1, -1, 128)) == 1
    ]
    torch.testing.assert_close(out.loss, hidden.mean())  # fmt: skip


def test_other_sizes_unpatchify_when_told():
    model, x = network(), image(1, 3, 8, 24)
    assert torch.equal(model.unpatchify(model.patchify(x), (8, 24)), x)


# --- masking


def test_the_encoder_sees_nothing_of_hidden_patches():
    model, order = network(), noise(1, 16)
    x = image(1, 3, 16, 16).requires_grad_()
    out = model(x, noise=order)
    out.latent.square().sum().backward()
    touched = model.patchify(x.grad).abs().sum(-1) > 0
    assert torch.equal(touched, out.mask == 0)
    assert out.mask.sum() == 12


def test_every_patch_keeps_its_place():
    """Visible tokens are those the whole-image path would start from, in the order of the noise."""
    model, x, order = network(depth=0), image(2, 3, 16, 16), noise(2, 16)
    out = model(x, 0.5, noise=order)
    whole = model.encoder.tokens(x)
    expected = whole[:, 1:].gather(1, order.argsort(1)[:, :8, None].expand(-1, -1, 24))
    torch.testing.assert_close(out.latent, torch.cat([whole[:, :1], expected], 1), rtol=0, atol=1e-6)


def test_noise_comes_from_the_generator_or_from_torch():
    model, x = network(), image(2, 3, 16, 16)
    first, again = (model(x, generator=torch.Generator().manual_seed(3)).ids_restore for _ in range(2))
    assert torch.equal(first, again)
    torch.manual_seed(3)
    expected = torch.rand(2, 16).argsort(1).argsort(1)
    torch.manual_seed(3)
    assert torch.equal(model(x).ids_restore, expected)
    assert not torch.equal(model(x).ids_restore, expected)


def test_the_ratio_of_the_constructor_holds_unless_told_otherwise():
    model, x = network(mask_ratio=0.5), image(1, 3, 16, 16)
    assert model(x).mask.sum() == 8
    assert model(x, 0.25).mask.sum() == 4
    assert model(x, 0.0).mask.sum() == 0


def test_the_encoder_alone_hides_nothing():
    encoder, x = network().encoder, image(2, 3, 16, 24)
    assert isinstance(encoder, Encoder)
    (features,) = encoder(x)
    assert features.shape == (2, 24, 4, 6)
    assert torch.equal(encoder.embed(x), encoder.tokens(x)[:, 0])


# --- sizes, precision, training


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"embed_dim": 384, "num_heads": 6, "decoder_depth": 2}, 28_663_936),
        ({"embed_dim": 384, "num_heads": 6, "decoder_depth": 2, "decoder_embed_dim": 128}, 22_236_160),
        ({}, 111_907_840),
        ({"decoder_depth": 2}, 92_993_536),
        ({"embed_dim": 1024, "depth": 24, "num_heads": 16}, 329_541_888),
    ],
    ids=["ViT-S", "ViT-S small decoder", "ViT-B", "ViT-B shallow decoder", "ViT-L"],
)
def test_published_sizes(options, count):
    with torch.device("meta"):
        model = create_model("mae", **options)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("dims", "size"), [(2, 16), (3, 8)])
def test_every_parameter_gets_a_gradient_but_the_fixed_positions(dims, size):
    model = network(spatial_dims=dims, img_size=size).train()
    model(image(4, 3, *(size,) * dims)).loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == ["encoder.pos_embed", "decoder.pos_embed"]


def test_a_few_steps_lower_the_loss():
    model = network(shake=0.0).train()
    x, order = image(4, 3, 16, 16), noise(4, 16)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(8):
        optimiser.zero_grad()
        loss = model(x, noise=order).loss
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_autocast_stays_near_float32():
    model, x, order = network(shake=0.02), image(2, 3, 16, 24), noise(2, 24)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        low = model(x, noise=order)
    full = model(x, noise=order)
    assert low.loss.dtype == torch.float32
    torch.testing.assert_close(low.loss, full.loss, rtol=0.02, atol=0)
    torch.testing.assert_close(low.pred.float(), full.pred, rtol=0.05, atol=0.05)


def test_fresh_weights_are_the_authors():
    torch.manual_seed(0)
    model = create_model("mae", **{**SMALL, "embed_dim": 96, "decoder_embed_dim": 96})
    bound = {
        "encoder.patch_embed.proj.weight": (6 / (96 + 48)) ** 0.5,
        "encoder.blocks.0.attn.qkv.weight": (6 / (96 + 288)) ** 0.5,
        "decoder.pred.weight": (6 / (96 + 48)) ** 0.5,
    }
    parameters = dict(model.named_parameters())
    for name, expected in bound.items():
        assert parameters[name].abs().max().item() == pytest.approx(expected, rel=0.01), name
        assert parameters[name].abs().max() <= expected, name
    for name in ("encoder.cls_token", "decoder.mask_token"):
        assert parameters[name].std().item() == pytest.approx(0.02, rel=0.3), name


# --- weights


@pytest.mark.parametrize(("dims", "size"), [(2, 16), (3, 8)])
def test_constructor_values_follow_from_the_weights(dims, size):
    ours = network(spatial_dims=dims, img_size=size, in_channels=1, mlp_ratio=2.0)
    state = {k.removeprefix("encoder."): v for k, v in ours.state_dict().items() if k.startswith("encoder.")}
    for key, value in ours.state_dict().items():
        if key.startswith("decoder."):
            rest = key.removeprefix("decoder.")
            state[rest if rest == "mask_token" else f"decoder_{rest}"] = value
    layout = LAYOUTS[0]
    assert all(any(re.fullmatch(mark, key) for key in state) for mark in layout.marks)
    again = create_model("mae", **layout.infer(state), num_heads=3, decoder_num_heads=2).eval()
    load_weights(again, state, layout.keys)
    x, order = image(1, 1, *(size,) * dims), noise(1, (size // 4) ** dims)
    assert torch.equal(again(x, noise=order).loss, ours(x, noise=order).loss)


@pytest.mark.parametrize(("width", "heads"), [(128, 16), (512, 16), (16, None)])
def test_the_decoders_heads_are_known_at_published_widths_and_asked_for_at_others(width, heads):
    layout = LAYOUTS[0]
    state = {"decoder_embed.weight": torch.zeros(width, 24)}
    for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight", "pos_embed"):
        state[name] = network().state_dict()[f"encoder.{name}"]
    assert layout.infer(state).get("decoder_num_heads") == heads
    assert set(layout.ask) == {"num_heads", "decoder_num_heads"}


# --- refusals


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (1, 3, 16, 18),
            {},
            "every side of the image must be a multiple of the patch (4, 4), got (16, 18); use (16, 20)",
        ),
        (
            (2, 3, 16, 16),
            {"noise": torch.zeros(1, 16)},
            "noise must be (B, tokens) = (2, 16) for this batch, got (1, 16)",
        ),
        (
            (1, 3, 16, 16),
            {"mask_ratio": 0.95},
            "mask_ratio must lie in [0, 1) and leave a token visible, got 0.95 of 16 tokens; use 0.75",
        ),
        (
            (1, 1, 16, 16),
            {},
            "this network needs (B, 3, 2 spatial axes), got shape (1, 1, 16, 16); "
            "repeat the channel of a grey image 3 times",
        ),
    ],
)
def test_input_that_does_not_fit_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        network()(torch.zeros(shape), **options)


def test_heads_of_the_decoder_must_divide_its_width():
    with pytest.raises(ValueError, match=re.escape("num_heads must divide the width 16, got 3; use 2")):
        network(decoder_num_heads=3)
