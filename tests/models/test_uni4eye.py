"""Uni4Eye: one encoder for two ranks, two decoders, and the public code's dynamic head."""

import hashlib
import inspect
import re

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from medvit import create_model
from medvit.layers.masking import patchify, random_masking, unpatchify
from medvit.layers.position import resize_position
from medvit.models import uni4eye, uni4eye_pp
from medvit.models.uni4eye import UNI4EYE_KEYS, Uni4Eye, Uni4EyeMAE, gradient_map
from medvit.models.uni4eye_pp import PP_KEYS, Uni4EyePPMAE
from medvit.models.weights import load_weights

ENCODER = {"img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 4}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
IMAGE, VOLUME, SLAB = (2, 3, 16, 16), (2, 3, 16, 16, 8), (2, 1, 16, 3, 16)
BASE = {"embed_dim": 768, "depth": 12, "num_heads": 12}


def encoder(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("uni4eye", **{**ENCODER, **options}).eval()


def two_decoders(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("uni4eye_mae", **{**ENCODER, **DECODER, **options})


def dynamic(seed=0, **options):
    torch.manual_seed(seed)
    return create_model("uni4eye_pp_mae", **{**ENCODER, **DECODER, **options})


def image(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# --- the encoder


@torch.no_grad()
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_the_feature_map_is_the_patch_tokens_in_raster_order(shape):
    model, x = encoder(), image(shape)
    tokens, (features,) = model.tokens(x), model(x)
    grid = tuple(n // 4 for n in shape[2:])
    assert features.shape == (2, 24, *grid)
    flat = np.ravel_multi_index(tuple(g - 1 - (axis == 0) for axis, g in enumerate(grid)), grid)
    last = features[(..., *[g - 1 - (axis == 0) for axis, g in enumerate(grid)])]
    torch.testing.assert_close(last, tokens[:, 1 + flat], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.embed(x), tokens[:, 0], rtol=0, atol=1e-6)


def test_what_heads_need_to_know_speaks_of_the_rank_asked_for():
    options = {"in_channels": {2: 3, 3: 1}, "patch_size": {2: 4, 3: (4, 4, 2)}}
    for rank, channels, stride in ((2, 3, (4, 4)), (3, 1, (4, 4, 2))):
        model = encoder(spatial_dims=rank, **options)
        assert (model.spatial_dims, model.in_channels, model.strides) == (rank, channels, (stride,))
        assert (model.channels, model.embed_dim) == ((24,), 24)
        assert model(image((1, 3, 16, 16)))[0].shape == (1, 24, 4, 4)
        assert model(image((1, 1, 16, 16, 8)))[0].shape == (1, 24, 4, 4, 4)


def test_the_rank_may_be_text_as_in_json():
    model = encoder(in_channels={"2": 3, "3": 1}, img_size={"2": 16, "3": [16, 16, 8]})
    assert model(image((1, 1, 16, 16, 8)))[0].shape == (1, 24, 4, 4, 2)


def swapped(volume, patch=4):
    """Two patches of a volume exchanged."""
    out = volume.clone()
    out[..., :patch, :patch, :patch] = volume[..., -patch:, -patch:, -patch:]
    out[..., -patch:, -patch:, -patch:] = volume[..., :patch, :patch, :patch]
    return out


@torch.no_grad()
def test_volumes_know_where_their_patches_are_unless_the_table_is_the_authors():
    x = image(VOLUME)
    order = torch.arange(33)
    order[[1, 32]] = order[[32, 1]]
    placed, bag = encoder(), encoder(positions="official")
    torch.testing.assert_close(bag.tokens(swapped(x)), bag.tokens(x)[:, order], rtol=0, atol=1e-5)
    assert (placed.embed(swapped(x)) - placed.embed(x)).abs().max() > 1e-3
    assert (placed.tokens(swapped(x)) - placed.tokens(x)[:, order]).abs().max() > 1e-1
    # of images both know
    torch.testing.assert_close(bag.tokens(image(IMAGE)), placed.tokens(image(IMAGE)))


@torch.no_grad()
def test_a_volume_of_depth_one_is_its_slice():
    model = encoder(patch_size={2: 4, 3: (4, 4, 1)}, img_size={2: 16, 3: (16, 16, 1)})
    model.patch_embed["3"].weight.copy_(model.patch_embed["2"].weight[..., None])
    model.patch_embed["3"].bias.copy_(model.patch_embed["2"].bias)
    model.pos_embed.get_parameter("3").copy_(model.pos_embed.get_parameter("2"))
    for shape in (IMAGE, (1, 3, 24, 12)):  # the second resizes the tables
        x = image(shape)
        torch.testing.assert_close(model.tokens(x[..., None]), model.tokens(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_another_size_resizes_the_table_and_remainders_are_left_out():
    model = encoder()
    for shape, grid in (((1, 3, 24, 8), (6, 2)), ((1, 3, 8, 16, 12), (2, 4, 3))):
        rank = len(grid)
        table = resize_position(model.pos_embed.get_parameter(str(rank)), (4, 4, 2)[:rank], grid)
        made = encoder(img_size={2: 16, 3: (16, 16, 8), rank: shape[2:]})
        made.load_state_dict({**model.state_dict(), f"pos_embed.{rank}": table})
        x = image(shape)
        torch.testing.assert_close(model.tokens(x), made.tokens(x), rtol=0, atol=1e-6)
        wider = F.pad(x, [0, 3] * rank, value=7.0)
        assert torch.equal(model.tokens(wider), model.tokens(x))


@torch.no_grad()
def test_only_the_patches_that_stay_visible_are_encoded_in_their_order():
    model, x = encoder(), image(VOLUME)
    everything = random_masking(uniform(2, 32), 0.0)
    shuffled, plain = model.tokens(x, everything), model.tokens(x)
    torch.testing.assert_close(everything.fill(shuffled[:, 1:], torch.zeros(1, 1, 24)), plain[:, 1:], rtol=0, atol=1e-5)
    masking = random_masking(uniform(2, 32), 0.75)
    hidden = unpatchify(masking.mask[..., None].expand(-1, -1, 3 * 64), (4, 4, 4), (4, 4, 2))
    assert torch.equal(model.tokens(x, masking), model.tokens(x + 5 * hidden, masking))
    assert model.tokens(x, masking).shape == (2, 9, 24)


# --- one training run


def test_one_step_on_both_ranks_trains_one_set_of_blocks():
    x, y = image(IMAGE), image(VOLUME)
    both, flat, deep = two_decoders(), two_decoders(), two_decoders()
    noise = {2: uniform(2, 16), 3: uniform(2, 32)}
    (both(x, noise=noise[2]).loss + both(y, noise=noise[3]).loss).backward()
    flat(x, noise=noise[2]).loss.backward()
    deep(y, noise=noise[3]).loss.backward()
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert {n for n, g in gradients(both).items() if g.any() and g.isfinite().all()} == trained
    other = {"2": "3", "3": "2"}
    for rank, alone in (("2", flat), ("3", deep)):
        own = {n for n in trained if not re.search(rf"(patch_embed|pred)\.{other[rank]}\.", n)}
        assert gradients(alone).keys() == own
    for name, gradient in gradients(both).items():
        parts = [gradients(alone)[name] for alone in (flat, deep) if name in gradients(alone)]
        assert len(parts) == (1 if re.search(r"(patch_embed|pred)\.[23]\.", name) else 2), name
        torch.testing.assert_close(gradient, sum(parts), rtol=1e-4, atol=1e-6)


def test_a_few_steps_on_alternating_ranks_lower_both_losses():
    model = two_decoders().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    batches = [(image(IMAGE), uniform(2, 16)), (image(VOLUME), uniform(2, 32))]
    losses = []
    for step in range(40):
        x, noise = batches[step % 2]
        out = model(x, noise=noise)
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append((out.image_loss.item(), out.gradient_loss.item()))
    for rank in (0, 1):
        for part in (0, 1):
            assert losses[38 + rank][part] < 0.97 * losses[rank][part]


@torch.no_grad()
@pytest.mark.parametrize("norm_pix_loss", [False, True])
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_the_losses_are_those_of_image_and_gradient_map(shape, norm_pix_loss):
    rank = len(shape) - 2
    model = two_decoders(norm_pix_loss=norm_pix_loss, gradient_weight=0.5, mask_ratio=0.75)
    x = image(shape)
    out = model(x, noise=uniform(2, model.encoder.tokens(x).shape[1] - 1))
    hidden = out.mask.bool()
    assert hidden.float().mean() == 0.75
    assert out.latent.shape[1] == 1 + 0.25 * hidden.shape[1]
    target = patchify(x, (4,) * rank)[hidden]
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    steep = patchify(gradient_map(x), (4,) * rank)[hidden]
    torch.testing.assert_close(out.image_loss, F.mse_loss(out.image[hidden], target))
    torch.testing.assert_close(out.gradient_loss, F.mse_loss(out.gradient[hidden], steep))
    torch.testing.assert_close(out.loss, out.image_loss + 0.5 * out.gradient_loss)
    assert out.image.shape == out.gradient.shape == (2, hidden.shape[1], 3 * 4**rank)


@torch.no_grad()
@pytest.mark.parametrize("make", [two_decoders, dynamic])
def test_noise_is_drawn_where_none_is_given(make):
    model, x = make().eval(), image(IMAGE)
    a, b = (model(x, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.mask, b.mask)
    assert torch.equal(a.mask, model(x, noise=uniform(2, 16, seed=3)).mask)
    assert (a.mask.sum(1) == 8).all()
    assert (model(x, 0.25).mask.sum(1) == 4).all()
    assert len({tuple(model(x).mask.flatten().tolist()) for _ in range(4)}) > 1


# --- the gradient map


@pytest.mark.parametrize("spatial", [(9,), (7, 6), (5, 6, 7), (6, 1, 5)])
def test_the_gradient_map_is_scipys_sobel_in_intensity_per_voxel(spatial):
    x = image((2, 3, *spatial)).double()
    rank = len(spatial)
    got = gradient_map(x)
    for b in range(2):
        for c in range(3):
            slopes = [ndimage.sobel(x[b, c].numpy(), axis) / (2 * 4 ** (rank - 1)) for axis in range(rank)]
            golden = torch.from_numpy(np.sqrt(sum(s**2 for s in slopes)))
            torch.testing.assert_close(got[b, c], golden, rtol=1e-12, atol=1e-12)


def test_a_ramp_has_its_slope_in_every_rank_and_a_flat_image_none():
    for rank in (1, 2, 3):
        ramp = torch.arange(6.0).reshape(-1, *[1] * (rank - 1)).expand(*[6] * rank)[None, None] * 2
        inner = (slice(None), slice(None), *[slice(1, -1)] * rank)
        torch.testing.assert_close(gradient_map(ramp)[inner], torch.full_like(ramp, 2.0)[inner])
        assert not gradient_map(torch.full_like(ramp, 3.0)).any()


def test_a_slice_has_one_gradient_map_as_image_and_as_volume():
    x = image((1, 2, 6, 7))
    torch.testing.assert_close(gradient_map(x[..., None])[..., 0], gradient_map(x))
    assert gradient_map(x.bfloat16()).dtype == torch.float32


# --- the public code's network


@torch.no_grad()
@pytest.mark.parametrize("shape", [IMAGE, SLAB])
def test_the_dynamic_head_is_a_linear_map_over_patches_made_of_rectified_tokens(shape):
    model, x, task = dynamic().eval(), image(shape), torch.tensor([4, 1])
    seen = {}
    model.decoder.blocks[0].register_forward_pre_hook(lambda _m, args: seen.update(tokens=args[0]))
    out = model(x, task_id=task, noise=uniform(2, 16))
    assert seen["tokens"].min() == 0
    kernel, offset = model.head.controller.weight[..., 0], model.head.controller.bias
    for b in range(2):
        code = torch.zeros(7)
        code[task[b]] = 1
        made = kernel @ torch.cat([seen["tokens"][b].mean(-1), code]) + offset
        mixed = made[:256].reshape(16, 16) @ out.pred[b] + made[256:, None]
        torch.testing.assert_close(out.logits[b], mixed, rtol=1e-4, atol=1e-5)
    patch = (4, 4) if len(shape) == 4 else (4, 3, 4)
    hidden = out.mask.bool()
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits[hidden], patchify(x, patch)[hidden]))


@torch.no_grad()
def test_the_task_moves_logits_only_and_none_is_a_code_of_zeros():
    model, x, noise = dynamic(num_tasks=3).eval(), image(IMAGE), uniform(2, 16)
    outs = [model(x, task_id=task, noise=noise) for task in (None, torch.tensor([0, 0]), torch.tensor([2, 2]))]
    assert all(torch.equal(outs[0].pred, out.pred) for out in outs)
    assert len({out.loss.item() for out in outs}) == 3
    model.head.controller.weight[:, -3:] = 0
    torch.testing.assert_close(model(x, noise=noise).logits, model(x, task_id=torch.tensor([1, 2]), noise=noise).logits)


@torch.no_grad()
def test_patches_without_entropy_stay_visible_and_the_loss_is_taken_before_the_head():
    model, x, entropy = dynamic().eval(), image(IMAGE), torch.ones(2, 16)
    entropy[:, 3:9] = 0
    out = model(x, noise=uniform(2, 16), entropy=entropy)
    assert not out.mask[:, 3:9].any()
    hidden = out.mask.bool()
    torch.testing.assert_close(out.loss, F.mse_loss(out.pred[hidden], patchify(x, (4, 4))[hidden]))


def test_any_number_of_patches_will_do():
    model = dynamic(img_size=20)
    assert model.head.controller.weight.shape == (25 * 25 + 25, 1 + 25 + 7, 1)
    (model(image((2, 3, 20, 20))).loss + model(image((2, 1, 20, 3, 20))).loss).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {n for n, g in gradients(model).items() if g.any() and g.isfinite().all()} == trained


@torch.no_grad()
def test_the_published_embedding_encodes_volumes_and_refuses_to_reconstruct_them():
    model = dynamic(volume="cube").eval()
    assert model.encoder(image(VOLUME))[0].shape == (2, 24, 4, 4, 2)
    assert model(image(IMAGE)).loss.isfinite()
    message = (
        "the decoder predicts 48 values per patch and (4, 4, 4) patches have 192: volumes in cubes are encoded only "
        "(`encoder`); reconstruct them with volume='slab' or with 'uni4eye_mae'"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model(image(VOLUME))


# --- weights


@pytest.mark.parametrize(
    ("options", "encoder_count", "count"), [(BASE, 96_291_072, 131_515_078), ({}, 317_291_520, 352_646_598)]
)
def test_published_sizes(options, encoder_count, count):
    with torch.device("meta"):
        alone, whole = Uni4Eye(**options), Uni4EyePPMAE(volume="cube", **options)
    assert sum(p.numel() for p in alone.parameters()) == encoder_count
    # theirs declares Linear(51200, 2) and never uses it
    assert sum(p.numel() for p in whole.parameters()) + 51200 * 2 + 2 == count
    assert sum(p.numel() for p in whole.head.parameters()) == 7_915_460
    assert alone.pos_embed.get_parameter("3").shape == (1, 1 + 1372, alone.embed_dim)
    # at these widths a checkpoint tells every argument
    found = uni4eye_pp.LAYOUTS[0].infer(theirs(whole))
    defaults = {name: p.default for name, p in inspect.signature(Uni4EyePPMAE).parameters.items()}
    assert found == {name: {**defaults, **options, "volume": "cube"}[name] for name in found}
    assert found.keys() >= {"num_heads", "decoder_num_heads", "img_size", "num_tasks", *BASE}


@pytest.mark.parametrize(
    ("network", "tensors", "digest"),
    [(Uni4Eye, 33, "3a3cf9aa10b113e0"), (Uni4EyeMAE, 79, "54fe1528e7177692"), (Uni4EyePPMAE, 58, "03fe9a06d1e0b0ce")],
)
def test_names_and_shapes_of_weights_are_frozen(network, tensors, digest):
    with torch.device("meta"):
        state = network(**ENCODER, **({} if network is Uni4Eye else DECODER)).state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert len(lines) == tensors
    # checkpoints hold these names: a change here needs a conversion for every one of them
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == digest


def theirs(model, *, ranks=True):
    """The authors' state dict for a network of the public code, the unused layer included."""
    names = [
        (r"encoder\.patch_embed\.", r"patch_embed.proj"),
        (r"encoder\.pos_embed\.", r"pos_embed"),
        (r"encoder\.", ""),
        (r"decoder\.(blocks|embed|norm)\.", r"decoder_\1."),
        (r"decoder\.(pos_embed|pred)\.", r"decoder_\1"),
        (r"decoder\.", ""),
        (r"head\.", ""),
    ]
    state = {"mlp.weight": torch.zeros(2, 51200), "mlp.bias": torch.zeros(2)}
    for key, value in model.state_dict().items():
        pattern, new = next((p, n) for p, n in names if re.match(p, key))
        name = re.sub(f"^{pattern}", new, key)
        of_rank = re.search(r"(?:embed|proj|pred)([23])(?=\.|$)", name)
        if ranks or not of_rank:
            state[name] = value
        elif of_rank[1] == "2":
            state[name[: of_rank.start(1)] + name[of_rank.end(1) :]] = value
    return state


@pytest.mark.parametrize("layout", [*uni4eye.LAYOUTS, *uni4eye_pp.LAYOUTS], ids=lambda layout: layout.name)
@pytest.mark.parametrize("volume", ["slab", "cube"])
def test_every_layout_explains_every_key(layout, volume):
    ranks = not layout.name.endswith("_2d")
    source = dynamic(volume=volume, img_size=20, decoder_depth=2)
    state = theirs(source, ranks=ranks)
    assert ("pos_embed2" in state) == ranks
    assert all(any(re.fullmatch(mark, key) for key in state) for mark in layout.marks)
    arguments = layout.infer(state)
    heads = {"num_heads": 4, "decoder_num_heads": 2}
    assert layout.ask.keys() == (heads.keys() if layout.model == "uni4eye_pp_mae" else {"num_heads"})
    heads = {"num_heads": 4} if layout.model == "uni4eye" else heads
    model = create_model(layout.model, **arguments, **heads)
    own, given = model.state_dict(), layout.keys.apply(state)
    lacking = own.keys() - given.keys()
    assert not given.keys() - own.keys()
    if layout.partial is None:
        assert not lacking
    else:
        assert lacking == {key for key in own if re.fullmatch(layout.partial, key)}
    assert all(own[key].shape == value.shape for key, value in given.items())
    if layout.name == "uni4eye_pp":
        load_weights(model, state, PP_KEYS)
        x, noise = image((1, 3, 20, 20)), uniform(1, 25)
        with torch.no_grad():
            assert torch.equal(model.eval()(x, noise=noise).logits, source.eval()(x, noise=noise).logits)


def test_names_that_are_not_the_authors_are_unknown():
    for key in ("fc_norm.weight", "head.weight", "blocks.0.attn.q.weight", "pos_embed4", "module.cls_token"):
        with pytest.raises(KeyError):
            UNI4EYE_KEYS.rename(key)
        with pytest.raises(KeyError):
            PP_KEYS.rename(key)


# --- use


@torch.no_grad()
@pytest.mark.parametrize("shape", [IMAGE, VOLUME])
def test_images_of_a_batch_do_not_see_each_other(shape):
    model, x = encoder(), image((3, *shape[1:]))
    torch.testing.assert_close(model(x)[0], torch.cat([model(x[i : i + 1])[0] for i in range(3)]), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("make", "shape"), [(two_decoders, IMAGE), (two_decoders, VOLUME), (dynamic, SLAB)])
def test_bfloat16_autocast(make, shape):
    model, x = make().eval(), image(shape)
    noise = uniform(2, model.encoder.tokens(x).shape[1] - 1)
    exact = model(x, noise=noise)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x, noise=noise)
    assert out.loss.dtype == torch.float32
    assert torch.equal(out.mask, exact.mask)
    assert (out.loss - exact.loss).abs() < 0.02 * exact.loss


@torch.no_grad()
@pytest.mark.parametrize("shape", [IMAGE, (1, 3, 8, 16, 12)])
def test_the_encoder_compiles_without_breaks_and_exports(shape):
    model, x = encoder(), image(shape)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], model(x)[0], rtol=0, atol=1e-5)
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x)[0], model(x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("make", "shape", "patches"), [(two_decoders, VOLUME, 32), (dynamic, SLAB, 16)])
def test_a_training_step_compiles_without_breaks(make, shape, patches):
    torch._dynamo.reset()
    model, x, noise = make(depth=1), image(shape), uniform(2, patches)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, noise=noise).loss, model(x, noise=noise).loss)


def test_a_meta_forward_leaves_real_ones_alone():
    with torch.device("meta"):
        ghost = Uni4EyeMAE(**ENCODER, **DECODER)
        assert ghost(torch.empty(VOLUME), noise=torch.empty(2, 32)).image.shape == (2, 32, 192)
    assert encoder()(image(VOLUME))[0].isfinite().all()


# --- errors


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (encoder, {"spatial_dims": 1}, "spatial_dims must be one of (2, 3), got 1"),
        (encoder, {"positions": "learned"}, "positions must be one of ('sincos', 'official'), got 'learned'"),
        (encoder, {"patch_size": {3: 4}}, "patch_size by rank needs the keys (2, 3), got {3: 4}"),
        (encoder, {"in_channels": {2: 1, 4: 1}}, "in_channels by rank needs the keys (2, 3), got {2: 1, 4: 1}"),
        (encoder, {"patch_size": (4, 4)}, "patch_size of rank 3 needs one int or 3 of them, got (4, 4)"),
        (
            encoder,
            {"img_size": 6},
            "img_size must hold a patch on every axis, got img_size={2: (6, 6), 3: (6, 6, 3)} "
            "for patch_size={2: (4, 4), 3: (4, 4, 4)}",
        ),
        (encoder, {"num_heads": 5}, "num_heads must divide the width 24, got 5; use 4"),
        (two_decoders, {"decoder_num_heads": 3}, "num_heads must divide the width 16, got 3; use 2"),
        (dynamic, {"volume": "ball"}, "volume must be one of ('slab', 'cube'), got 'ball'"),
    ],
)
def test_what_cannot_be_built_is_refused(make, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make(**options)


@pytest.mark.parametrize(
    ("make", "shape", "message"),
    [
        (two_decoders, (1, 3, 16, 18), "every side must be a multiple of the patch (4, 4), got (16, 18); use (16, 20)"),
        (
            two_decoders,
            (1, 3, 16, 16, 9),
            "every side must be a multiple of the patch (4, 4, 4), got (16, 16, 9); use (16, 16, 12)",
        ),
        (dynamic, (1, 3, 16, 20), "the dynamic head mixes 16 patches: sides (16, 16), got (16, 20)"),
        (dynamic, (1, 1, 16, 6, 16), "the dynamic head mixes 16 patches: sides (16, 3, 16), got (16, 6, 16)"),
    ],
)
def test_an_image_that_does_not_fit_is_refused(make, shape, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()(torch.zeros(shape))


def test_noise_entropy_and_task_that_do_not_fit_are_refused():
    message = r"^one number per patch is needed, \(2, 16\) for the grid \(4, 4\), got \(2, 15\)$"
    with pytest.raises(ValueError, match=message):
        two_decoders()(image(IMAGE), noise=uniform(2, 15))
    with pytest.raises(ValueError, match=message):
        dynamic()(image(IMAGE), entropy=uniform(2, 15))
    with pytest.raises(ValueError, match=r"^task_id must be one number of the 7 tasks per image, \(2,\), got \(3,\)$"):
        dynamic()(image(IMAGE), task_id=torch.tensor([0, 1, 2]))
    for task in (7, -1):
        with pytest.raises(ValueError, match=rf"^task_id must lie in 0 to 6, got \[0, {task}\]$"):
            dynamic()(image(IMAGE), task_id=torch.tensor([0, task]))
    with pytest.raises(ValueError, match="mask_ratio must lie in"):
        two_decoders()(image(IMAGE), 1.0)
