"""DINOv2's objective against plain loops, torch's weight norm, and two processes against one."""

import copy
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from medvit.models.rad_dino import RadDino
from medvit.pretrain.dino import (
    Centre,
    DINOObjective,
    PrototypeHead,
    WeightNormLinear,
    cls_attention,
    crop_loss,
    koleo,
    patch_loss,
    sinkhorn,
)
from medvit.pretrain.masking import RandomMask, SemanticMask
from medvit.pretrain.objective import Objective

HEAD = {"prototypes": 12, "hidden_dim": 16, "bottleneck_dim": 8}


def encoder(dims=2, **options):
    small = {"in_channels": 1, "spatial_dims": dims, "img_size": 16, "patch_size": 4, "embed_dim": 24, "depth": 2}
    return RadDino(**{**small, "num_heads": 3, **options})


def objective(seed=0, shake=0.0, body=None, **options):
    torch.manual_seed(seed)
    task = DINOObjective(body or encoder(), **{**HEAD, **options})
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(shake * torch.randn_like(parameter))
    return task


def crops(images=4, dims=2, views=2, local=3, seed=0):
    """Overlapping parts of smooth images, each with a pattern of its own."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    phase = torch.rand(images, dims, generator=generator) * 6
    for kind, count, side in (("global", views, 16), ("local", local, 8)):
        for i in range(count):
            places = torch.meshgrid(*[torch.arange(side) / 16.0] * dims, indexing="ij")
            start = torch.rand(images, dims, generator=generator) * 0.3
            waves = [
                torch.sin(
                    6 * (p + start[:, axis].reshape(-1, *[1] * dims)) * (1 + phase[:, axis].reshape(-1, *[1] * dims))
                )
                for axis, p in enumerate(places)
            ]
            batch[f"image_{kind}_{i}"] = torch.stack(waves).sum(0)[:, None]
    return batch


def logits(*shape, seed=0, scale=1.0):
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- parts


def slow_sinkhorn(scores, temperature, iterations):
    q = np.exp(scores.double().numpy() / temperature)
    n, k = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        for j in range(k):
            q[:, j] = q[:, j] / q[:, j].sum() / k
        for i in range(n):
            q[i] = q[i] / q[i].sum() / n
    return q * n


@pytest.mark.parametrize(("n", "k"), [(1, 5), (6, 4), (5, 9)])
@pytest.mark.parametrize("iterations", [1, 3])
def test_sinkhorn_is_the_plain_iteration(n, k, iterations):
    scores = logits(n, k, scale=0.3)
    out = sinkhorn(scores, 0.07, iterations)
    np.testing.assert_allclose(out.numpy(), slow_sinkhorn(scores, 0.07, iterations), rtol=2e-4, atol=1e-7)
    torch.testing.assert_close(out.sum(1), torch.ones(n))


def test_sinkhorn_uses_all_prototypes_equally_in_the_end():
    out = sinkhorn(logits(40, 8), 0.5, 200)
    torch.testing.assert_close(out.sum(0), torch.full((8,), 5.0), rtol=1e-4, atol=1e-4)


def test_sinkhorn_takes_logits_that_overflow_and_no_samples():
    scores = logits(6, 4)
    torch.testing.assert_close(sinkhorn(scores + 1000, 0.5), sinkhorn(scores, 0.5), rtol=1e-3, atol=1e-4)
    assert sinkhorn(scores * 100, 0.04).isfinite().all()
    assert sinkhorn(scores[:0], 0.04).shape == (0, 4)
    assert not sinkhorn(scores.requires_grad_(), 0.5).requires_grad


def test_the_centre_is_used_and_then_moved():
    centre = Centre(3, momentum=0.75).train()
    first, second = logits(5, 3), logits(7, 3, seed=1)
    torch.testing.assert_close(centre(first, 0.1), (first / 0.1).softmax(1))
    moved = 0.25 * first.mean(0)
    torch.testing.assert_close(centre.centre, moved)
    torch.testing.assert_close(centre(second, 0.1), ((second - moved) / 0.1).softmax(1))
    torch.testing.assert_close(centre.centre, 0.75 * moved + 0.25 * second.mean(0))


def test_the_centre_stays_without_samples_and_in_evaluation():
    centre = Centre(3)
    centre(logits(5, 3), 0.1)
    before = centre.centre.clone()
    centre(logits(0, 3), 0.1)
    centre.eval()(logits(5, 3), 0.1)
    assert torch.equal(centre.centre, before)


def cross_entropy(student, target, temperature):
    """Of one sample, number by number."""
    weights = [math.exp(float(s) / temperature) for s in student]
    return -sum(float(t) * math.log(w / sum(weights)) for t, w in zip(target, weights, strict=True))


@pytest.mark.parametrize(("views", "local"), [(2, 0), (2, 3), (3, 2)])
def test_the_crop_loss_is_the_mean_over_pairs_of_different_crops(views, local):
    student, teacher = logits(views + local, 4, 6, scale=0.3), logits(views, 4, 6, seed=1).softmax(-1)
    pairs = [(s, g) for g in range(views) for s in range(views + local) if s != g]
    slow = np.mean([cross_entropy(student[s, b], teacher[g, b], 0.2) for s, g in pairs for b in range(4)])
    assert crop_loss(student, teacher, 0.2).item() == pytest.approx(slow, rel=1e-5)


def test_the_patch_loss_is_the_mean_of_means_and_unmasked_images_count():
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 0]]).bool()
    student, teacher = logits(4, 6, scale=0.3), logits(4, 6, seed=1).softmax(-1)
    each = [cross_entropy(student[i], teacher[i], 0.1) for i in range(4)]
    assert patch_loss(student, teacher, mask).item() == pytest.approx((np.mean(each[:3]) + 0 + each[3]) / 3, rel=1e-5)
    nothing = patch_loss(student[:0].requires_grad_(), teacher[:0], torch.zeros(2, 4, dtype=torch.bool))
    nothing.backward()
    assert nothing.item() == 0


def test_koleo_is_a_double_loop():
    x = logits(7, 5)
    unit = x.double() / x.double().norm(dim=1, keepdim=True)
    slow = -np.mean([math.log(min(float((unit[i] - unit[j]).norm()) for j in range(7) if j != i)) for i in range(7)])
    assert koleo(x).item() == pytest.approx(slow, rel=1e-5)
    twins = torch.ones(2, 5, requires_grad=True)
    koleo(twins).backward()
    assert twins.grad.isfinite().all()


def test_koleo_needs_a_neighbour():
    with pytest.raises(ValueError, match="needs two images in a batch, got 1; use a larger batch or koleo_weight=0"):
        koleo(logits(1, 5))


def test_the_last_layer_is_torchs_weight_norm():
    ours = WeightNormLinear(5, 7)
    with torch.no_grad():
        ours.weight_g.mul_(torch.rand(7, 1) + 0.5)
    theirs = nn.utils.parametrizations.weight_norm(nn.Linear(5, 7, bias=False))
    with torch.no_grad():
        theirs.parametrizations.weight.original0.copy_(ours.weight_g)
        theirs.parametrizations.weight.original1.copy_(ours.weight_v)
    x = logits(3, 5)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    torch.testing.assert_close(ours.weight_v.grad, theirs.parametrizations.weight.original1.grad)
    torch.testing.assert_close(ours.weight_g.grad, theirs.parametrizations.weight.original0.grad)


def test_the_head_is_the_authors():
    torch.manual_seed(0)
    head = PrototypeHead(6, prototypes=10, hidden_dim=7, bottleneck_dim=4)
    names = [
        "last_layer.weight_g",
        "last_layer.weight_v",
        *[f"mlp.{i}.{p}" for i in (0, 2, 4) for p in ("bias", "weight")],
    ]
    assert sorted(head.state_dict()) == sorted(names)
    assert torch.equal(head.last_layer.weight_g, torch.ones(10, 1))
    x = logits(3, 6)
    h = x
    for i in (0, 2, 4):
        h = h @ head.mlp[i].weight.T + head.mlp[i].bias
        h = F.gelu(h) if i < 4 else h / h.norm(dim=1, keepdim=True)
    v = head.last_layer.weight_v
    torch.testing.assert_close(head(x), h @ (v / v.norm(dim=1, keepdim=True)).T)
    assert len(PrototypeHead(6, layers=1, **HEAD).mlp) == 1


def test_attention_is_that_of_the_block():
    torch.manual_seed(0)
    block, tokens, grabbed = encoder().blocks[0], logits(2, 9, 24), []
    with torch.no_grad():
        block.attn.qkv.weight.mul_(20)
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, inputs, out: grabbed.append(out))
    block(tokens)
    torch.testing.assert_close(cls_attention(block, tokens), grabbed[0][:, :, 0].mean(1))


# --- the objective


def slow_objective(task, batch, mask, progress):
    """All of it from tokens on, by the functions above."""
    start, end = task.teacher_temperature
    temperature = end if progress >= 0.3 else start + (end - start) * progress / 0.3
    globals_ = [batch["image_global_0"], batch["image_global_1"]]
    locals_ = [batch[f"image_local_{i}"] for i in range(3)]
    b = len(globals_[0])
    student, teacher = task.student, task.teacher
    rows = mask.split(b)
    with torch.no_grad():
        slow = [teacher.encoder.tokens(x) for x in globals_]
        cls = torch.cat([teacher.dino_head(t[:, 0]) for t in slow])
        head = teacher.ibot_head or teacher.dino_head
        patches = torch.cat([head(t[:, 1:][m]) for t, m in zip(slow, rows, strict=True)])
        assign = [torch.tensor(slow_sinkhorn(x, temperature, 3)).float() for x in (cls, patches)]
        tokens = [student.encoder.tokens(x, m) for x, m in zip(globals_, rows, strict=True)]
        seen = [student.dino_head(t[:, 0]) for t in tokens]
        seen += [student.dino_head(student.encoder.tokens(x)[:, 0]) for x in locals_]
        targets = assign[0].split(b)
        pairs = [(s, g) for g in range(2) for s in range(5) if s != g]
        dino = np.mean([cross_entropy(seen[s][i], targets[g][i], 0.1) for s, g in pairs for i in range(b)])
        head = student.ibot_head or student.dino_head
        guesses = torch.cat([head(t[:, 1:][m]) for t, m in zip(tokens, rows, strict=True)])
        each = [cross_entropy(g, t, 0.1) for g, t in zip(guesses, assign[1], strict=True)]
        images, at = [], 0
        for count in mask.sum(1).tolist():
            images.append(np.mean(each[at : at + count]) if count else 0.0)
            at += count
        spread = sum(koleo(t[:, 0]).item() for t in tokens)
        return dino, np.mean(images), spread


@pytest.mark.parametrize("separate", [True, False])
@pytest.mark.parametrize("progress", [0.0, 0.15, 0.8])
def test_the_loss_is_the_slow_one(separate, progress):
    task = objective(shake=0.2, separate_head=separate, dino_weight=0.9, ibot_weight=0.6, koleo_weight=0.3)
    batch = crops()
    torch.manual_seed(3)
    losses = task(batch, progress)
    torch.manual_seed(3)
    mask = task.masks(8, (4, 4))
    dino, ibot, spread = slow_objective(task, batch, mask, progress)
    assert mask.any(1).sum() == 4  # half of the global crops
    assert losses.parts["dino"].item() == pytest.approx(dino, rel=2e-4)
    assert losses.parts["ibot"].item() == pytest.approx(ibot, rel=2e-4)
    assert losses.parts["koleo"].item() == pytest.approx(spread / 2, rel=2e-4)
    assert losses.loss.item() == pytest.approx(0.9 * dino + 0.6 * ibot + 0.3 * spread, rel=2e-4)


def test_softmax_centring_moves_a_centre_for_each_head():
    task, batch = objective(shake=0.2, centring="softmax"), crops()
    torch.manual_seed(3)
    loss = task(batch, 0.5).loss
    cls = torch.cat([task.teacher.dino_head(task.encoder.embed(batch[f"image_global_{i}"])) for i in range(2)])
    torch.testing.assert_close(task.dino_centre.centre, 0.1 * cls.mean(0))
    assert task.ibot_centre.centre.any()
    torch.manual_seed(3)
    assert task(batch, 0.5).loss != loss  # now centred
    assert "dino_centre.centre" in task.state_dict()


def test_the_teacher_is_a_copy_that_moves_as_an_average_and_no_other_way():
    task, batch = objective(shake=0.0), crops()
    for slow, fast in zip(task.teacher.parameters(), task.student.parameters(), strict=True):
        assert torch.equal(slow, fast)
        assert slow.data_ptr() != fast.data_ptr()
    before = copy.deepcopy(task.teacher.state_dict())
    task(batch, 0.5).loss.backward()
    assert all(p.grad is None for p in task.teacher.parameters())
    with torch.no_grad():
        for parameter in task.student.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[k], v) for k, v in task.teacher.state_dict().items())
    task.after_step(0.25)
    m = 1 - 0.008 * (1 + math.cos(math.pi / 4)) / 2
    assert task.teacher_momentum(0.25) == pytest.approx(m)
    for name, value in task.teacher.state_dict().items():
        expected = m * before[name].double() + (1 - m) * task.student.state_dict()[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6)
    held = copy.deepcopy(task.teacher.state_dict())
    task.after_step(1.0)
    assert all(torch.equal(held[k], v) for k, v in task.teacher.state_dict().items())


def test_what_is_scheduled():
    task = objective(momentum=(0.9, 1.0), teacher_temperature=(0.04, 0.07), warm_up=0.3)
    assert [task.teacher_momentum(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.95, 1.0])
    assert [task.temperature(p) for p in (0.0, 0.15, 0.3, 1.0)] == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert objective(warm_up=0.0).temperature(0.0) == 0.07


def test_prototypes_wait_at_the_start():
    task = objective(freeze_last_layer=0.1, shake=0.2)
    for progress, moves in ((0.05, False), (0.1, True)):
        task.zero_grad()
        task(crops(), progress).loss.backward()
        for head in (task.student.dino_head, task.student.ibot_head):
            assert bool(head.last_layer.weight_v.grad.any()) is moves
            assert head.mlp[0].weight.grad.any()


def test_every_trainable_parameter_gets_a_gradient():
    task = objective(body=encoder(num_register_tokens=2))
    task(crops(), 0.5).loss.backward()
    assert [name for name, p in task.named_parameters() if p.requires_grad and p.grad is None] == []


def test_the_teacher_is_never_in_training_mode_and_is_what_is_exported():
    task = objective(body=encoder(drop_path_rate=0.5)).train()
    assert isinstance(task, Objective)
    assert task.student.training
    assert not any(module.training for module in task.teacher.modules())
    assert task.encoder is task.teacher.encoder
    assert task.encoder.blocks[1].drop_path1.drop_prob == 0.5


def test_masks_spread_their_ratios():
    task = objective(mask_probability=0.5, mask_ratio=(0.2, 0.6), masking=RandomMask())
    torch.manual_seed(0)
    counts = sorted(task.masks(16, (10, 10)).sum(1).tolist())
    assert counts[:8] == [0] * 8
    for i, count in enumerate(counts[8:]):
        assert 20 + 5 * i - 1 <= count <= 25 + 5 * i
    torch.manual_seed(0)
    places = [task.masks(4, (4, 4)).any(1).tolist() for _ in range(50)]
    assert len({tuple(p) for p in places}) == 6  # any two of four


@pytest.mark.parametrize("options", [{"ibot_weight": 0.0}, {"koleo_weight": 0.0}, {"separate_head": False}])
def test_losses_can_be_left_out(options):
    body = encoder(use_mask_token=False) if "ibot_weight" in options else None
    losses = objective(body=body, **options)(crops(local=0), 0.5)
    absent = {name.removesuffix("_weight") for name in options if name.endswith("_weight")}
    assert losses.parts.keys() == {"dino", "ibot", "koleo"} - absent


@pytest.mark.parametrize(("dims", "centring"), [(2, "sinkhorn"), (2, "softmax"), (3, "sinkhorn")])
def test_a_few_steps_lower_the_loss(dims, centring):
    task = objective(shake=0.2, body=encoder(dims), centring=centring, koleo_weight=0.0).train()
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 2e-3)
    batch, values = crops(dims=dims, local=1), []
    for _ in range(8):
        torch.manual_seed(0)
        losses = task(batch, 0.5)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        task.after_step(0.5)
        values.append({"loss": losses.loss.item(), **{name: part.item() for name, part in losses.parts.items()}})
    assert all(values[-1][name] < 0.85 * values[0][name] for name in ("loss", "dino", "ibot"))


def test_autocast_stays_near_float32():
    task, batch = objective(shake=0.1), crops()
    torch.manual_seed(0)
    expected = task(batch, 0.5).loss
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        low = task(batch, 0.5).loss
    assert low.dtype == torch.float32
    assert low.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("dims", [2, 3])
def test_pictures_show_where_the_cls_token_looks(dims):
    task = objective(body=encoder(dims))
    picture = task.pictures(crops(dims=dims))["attention"]
    assert picture.shape == (16, 32, 3)
    assert 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centring": "mean"}, "centring must be one of ('sinkhorn', 'softmax'), got 'mean'"),
        ({"body": encoder(use_mask_token=False)}, "iBOT needs an encoder with a mask token"),
        ({"mask_ratio": (0.5, 0.1)}, "got 0.5 and (0.5, 0.1); use 0.5 and (0.1, 0.5)"),
        ({"mask_probability": 1.5}, "got 1.5 and (0.1, 0.5)"),
        ({"layers": 0}, "layers must be at least 1, got 0; use 3"),
        ({"masking": SemanticMask()}, "SemanticMask needs weights, which the views of DINO lack"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(**options)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_global_1": None}, "2 or more global crops of one shape, of the same images, are needed"),
        ({"image_global_1": torch.zeros(4, 1, 8, 8)}, "2 or more global crops of one shape"),
        ({"image_local_0": torch.zeros(4, 1, 12, 12)}, "0 or more local crops of one shape"),
        (
            {"image_local_0": torch.zeros(2, 1, 8, 8), "image_local_1": None},
            "local crops of one shape, of the same images",
        ),
    ],
)
def test_batches_that_do_not_fit_are_refused(change, message):
    batch = {name: value for name, value in {**crops(), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(message)):
        objective()(batch, 0.5)


# --- several processes

TWO = """
import os, sys
import torch
from torch import distributed as dist
from medvit.pretrain.dino import Centre, koleo, sinkhorn
from medvit.pretrain.swin import nt_xent

x = torch.load(sys.argv[1], weights_only=True)
rank = int(sys.argv[3])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
rows = slice(0, 4) if rank == 0 else slice(4, 8)
uneven = slice(0, 8) if rank == 0 else slice(8, 8)
a, b = (x[k][rows].clone().requires_grad_() for k in "ab")
centre = Centre(x["a"].shape[1])
centre(x["a"][uneven], 0.1)
contrast, spread = nt_xent(a, b), koleo(a)
(contrast + spread).backward()
out = {
    "even": sinkhorn(x["a"][rows], 0.3), "uneven": sinkhorn(x["a"][uneven], 0.3), "centre": centre.centre,
    "loss": torch.stack([contrast, spread]).detach(), "grad_a": a.grad, "grad_b": b.grad,
}
torch.save(out, sys.argv[1] + sys.argv[3])
dist.destroy_process_group()
"""


def test_two_processes_are_one(tmp_path):
    from medvit.pretrain.swin import nt_xent

    x = {"a": logits(8, 5), "b": logits(8, 5, seed=1)}
    torch.save(x, tmp_path / "x")
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", TWO, str(tmp_path / "x"), str(tmp_path / "store")]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    running = [subprocess.Popen([*command, str(r)], env=environment, stderr=subprocess.PIPE, text=True) for r in (0, 1)]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    parts = [torch.load(tmp_path / f"x{r}", weights_only=True) for r in (0, 1)]

    a, b, centre = x["a"].clone().requires_grad_(), x["b"].clone().requires_grad_(), Centre(5)
    centre(x["a"], 0.1)
    contrast, spread = nt_xent(a, b), koleo(a)
    (contrast + spread).backward()
    whole = sinkhorn(x["a"], 0.3)
    torch.testing.assert_close(torch.cat([p["even"] for p in parts]), whole)
    torch.testing.assert_close(torch.cat([p["uneven"] for p in parts]), whole)
    assert all(torch.allclose(p["centre"], centre.centre, atol=1e-7) for p in parts)
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, torch.stack([contrast, spread]).detach())
    # data parallel training averages gradients
    torch.testing.assert_close(torch.cat([p["grad_a"] for p in parts]) / 2, a.grad)
    torch.testing.assert_close(torch.cat([p["grad_b"] for p in parts]) / 2, b.grad)
