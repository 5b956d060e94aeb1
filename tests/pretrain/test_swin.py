"""Swin UNETR's pre-training against definitions and MONAI's contrastive loss; its encoder in the network it is for."""

import math
import re

import pytest
import torch

from medvit.errors import WeightsMismatch
from medvit.models.swin import SwinEncoder
from medvit.models.swin_unetr import LAYOUTS, SwinUNETR
from medvit.models.weights import load_weights
from medvit.pretrain.masking import FrequencyMask
from medvit.pretrain.objective import Objective
from medvit.pretrain.swin import SwinObjective, nt_xent

SMALL = {"feature_size": 6, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 3}
SSL = next(layout for layout in LAYOUTS if layout.name == "monai-ssl")


def objective(dims=2, seed=0, channels=1, body=None, **options):
    torch.manual_seed(seed)
    return SwinObjective(SwinEncoder(dims, channels, **{**SMALL, **(body or {})}), projection=8, **options)


def smooth(*shape, seed=0):
    """Slopes and waves: no image looks like itself when turned."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.meshgrid(*[torch.linspace(0, 1, n) for n in shape[2:]], indexing="ij")
    images = []
    for _ in range(shape[0]):
        weights, phase = torch.rand(len(places), generator=generator), 6 * torch.rand((), generator=generator)
        images.append(places[0] + sum(0.3 * torch.sin(5 * w * p + phase) for w, p in zip(weights, places, strict=True)))
    return torch.stack(images)[:, None].expand(-1, shape[1], *[-1] * len(places)).clone()


def vectors(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- contrast


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_by_its_definition(temperature):
    a, b = vectors(3, 5).double(), vectors(3, 5, seed=1).double()
    z = [row / row.norm() for row in (*a, *b)]
    total = 0.0
    for i in range(6):
        chances = [math.exp(float(z[i] @ z[k]) / temperature) if k != i else 0.0 for k in range(6)]
        total -= math.log(chances[(i + 3) % 6] / sum(chances))
    assert nt_xent(a.float(), b.float(), temperature).item() == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.upstream
def test_nt_xent_is_monais():
    losses = pytest.importorskip("monai.losses")
    a, b = vectors(6, 7), vectors(6, 7, seed=1)
    torch.testing.assert_close(nt_xent(a, b, 0.5), losses.ContrastiveLoss(temperature=0.5)(a, b))


# --- the objective


@pytest.mark.parametrize("dims", [2, 3])
def test_the_loss_is_made_of_its_three_parts(dims):
    task, x = objective(dims, weights=(0.5, 2.0, 3.0)), smooth(3, 1, 64, 64, 32)
    x = x[..., 0] if dims == 2 else x[:2]
    seen = {}
    for name in ("encoder", "image_head", "rotation_head", "contrastive_head"):
        getattr(task, name).register_forward_hook(
            lambda m, inputs, out, name=name: seen.update({name: (inputs[0], out)})
        )
    whole = []
    turned = task.turned

    def remembered(images):
        whole.append(turned(images))
        return whole[-1]

    task.turned = remembered
    losses = task({"image": x}, 0.0)

    images, turns = (torch.cat(both) for both in zip(*whole, strict=True))
    for i, (image, turn) in enumerate(zip(images, turns.tolist(), strict=True)):
        expected = x[i % len(x)]
        for _ in range(turn):  # a quarter: (i, j) -> (j, -i)
            expected = expected.transpose(1, 2).flip(1)
        assert torch.equal(image, expected)
    corrupted, maps = seen["encoder"]
    changed = (corrupted != images).any(1).float().flatten(1).mean(1)
    assert 0 < changed.max() <= 0.6 + 1e-3
    deepest = maps[-1]
    summary = torch.stack([deepest[i].reshape(deepest.shape[1], -1).mean(1) for i in range(len(deepest))])
    torch.testing.assert_close(seen["rotation_head"][0], summary)
    assert seen["image_head"][1].shape == images.shape
    inpainting = (seen["image_head"][1] - images).abs().mean()
    chances = seen["rotation_head"][1].softmax(1)
    rotation = -torch.stack([chances[i, turn].log() for i, turn in enumerate(turns.tolist())]).mean()
    first, second = seen["contrastive_head"][1].chunk(2)
    contrast = nt_xent(first, second, 0.5)
    torch.testing.assert_close(losses.parts["inpainting"], inpainting.detach())
    torch.testing.assert_close(losses.parts["rotation"], rotation.detach())
    torch.testing.assert_close(losses.parts["contrast"], contrast.detach())
    torch.testing.assert_close(losses.loss, 0.5 * inpainting + 2 * rotation + 3 * contrast)


def test_all_four_turns_come_and_the_plane_is_the_one_asked_for():
    task = objective(3, plane=(0, 2))
    torch.manual_seed(0)
    x = vectors(400, 1, 3, 4, 3)
    images, turns = task.turned(x)
    assert sorted(set(turns.tolist())) == [0, 1, 2, 3]
    quarter = turns.tolist().index(1)
    assert torch.equal(images[quarter], x[quarter].transpose(1, 3).flip(1))


def test_corruptions_can_be_exchanged():
    task = objective(corruptions=[FrequencyMask(3.0, 1.0)])
    x = smooth(2, 1, 64, 64)
    torch.testing.assert_close(task.corrupted(x), FrequencyMask(3.0, 1.0)(x).image)
    assert objective(corruptions=[]).corrupted(x) is x


def test_it_is_an_objective_whose_every_parameter_is_trained():
    task = objective()
    assert isinstance(task, Objective)
    task({"image": smooth(2, 1, 64, 64)}, 0.0).loss.backward()
    assert [name for name, p in task.named_parameters() if p.grad is None] == []
    task.after_step(0.3)


def test_the_image_head_narrows_as_the_encoder_widens():
    head = objective(3, channels=2, body={"patch_size": (2, 2, 1)}).image_head
    widths = [tuple(m.weight.shape[:2]) for m in head if hasattr(m, "weight") and m.weight is not None]
    assert widths == [(48, 96), (24, 48), (12, 24), (6, 12), (6, 6), (2, 6)]
    assert [m.scale_factor for m in head if hasattr(m, "scale_factor")] == [(2.0, 2.0, 2.0)] * 4 + [(2.0, 2.0, 1.0)]


@pytest.mark.parametrize(("dims", "sides", "steps"), [(2, (64, 64), 10), (3, (32, 32, 64), 5)])
def test_a_few_steps_lower_the_loss(dims, sides, steps):
    task = objective(dims)
    batch = {"image": smooth(2, 1, *sides)}
    optimizer = torch.optim.AdamW(task.parameters(), 4e-3)
    values = []
    for _ in range(steps):
        torch.manual_seed(0)
        losses = task(batch, 0.0)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        values.append({"loss": losses.loss.item(), **{name: part.item() for name, part in losses.parts.items()}})
    assert all(values[-1][name] < 0.95 * values[0][name] for name in ("loss", "inpainting", "rotation"))


@pytest.mark.parametrize("dims", [2, 3])
def test_the_segmentation_network_loads_what_is_exported(dims):
    body = {"patch_norm": True}
    task = objective(dims, body=body)
    with torch.no_grad():
        for parameter in task.encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    network = SwinUNETR(1, 2, spatial_dims=dims, **SMALL, **body)
    decoder = {k: v.clone() for k, v in network.state_dict().items() if not k.startswith("encoder.")}
    load_weights(network, task.export(), SSL)
    own = network.state_dict()
    for name, value in task.encoder.state_dict().items():
        assert torch.equal(own[f"encoder.{name}"], value)
    assert all(torch.equal(own[name], value) for name, value in decoder.items())
    other = SwinUNETR(1, 2, spatial_dims=dims, **SMALL, **body)
    load_weights(other.encoder, task.encoder.state_dict())
    assert all(torch.equal(other.encoder.state_dict()[k], v) for k, v in task.encoder.state_dict().items())


def test_what_the_layout_lacks_is_not_exported():
    with pytest.raises(WeightsMismatch, match="conv"):
        objective(body={"use_v2": True}).export()


@pytest.mark.parametrize(("dims", "sides"), [(2, (64, 64)), (3, (64, 64, 32))])
def test_pictures_can_be_saved(dims, sides):
    picture = objective(dims).pictures({"image": smooth(2, 1, *sides)})["inpainting"]
    assert picture.shape == (64, 192, 3)
    assert 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": (1.0, 1.0)}, "weights must be three numbers that are not negative, got (1.0, 1.0)"),
        ({"weights": (1.0, 1.0, -1.0)}, "three numbers that are not negative"),
        ({"plane": (0, 2)}, "plane must be two of the 2 axes, got (0, 2); use (0, 1)"),
        ({"plane": (1, 1)}, "plane must be two of the 2 axes, got (1, 1)"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective(**options)


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (
            (32, 32),
            "must be a multiple of (32, 32) and the image larger than one such cell, got (32, 32); use (64, 64)",
        ),
        ((64, 60), "got (64, 60); use (64, 64)"),
        ((64, 32), "the image must be square in the plane (0, 1) in which it is turned, got (64, 32)"),
    ],
)
def test_images_that_do_not_fit_are_refused(sides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective()({"image": torch.zeros(2, 1, *sides)}, 0.0)
