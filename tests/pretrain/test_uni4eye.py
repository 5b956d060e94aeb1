"""The Uni4Eye objective against explicit Sobel kernels and loops, and both ranks in one step."""

import itertools
import re

import pytest
import torch

from medvit.models.uni4eye import Uni4EyeMAE
from medvit.pretrain.masking import BlockMask
from medvit.pretrain.objective import Objective
from medvit.pretrain.uni4eye import Uni4EyeObjective

SMALL = {
    "in_channels": {2: 3, 3: 1},
    "img_size": {2: 16, 3: (8, 8, 8)},
    "patch_size": {2: 4, 3: 4},
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 24,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def objective(seed=0, weights=None, masking=None, **options):
    torch.manual_seed(seed)
    return Uni4EyeObjective(Uni4EyeMAE(**{**SMALL, **options}), weights=weights, masking=masking)


def smooth(*shape, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for axis in range(2, len(shape)):
        for _ in range(2):
            x = (x + x.roll(1, axis) + x.roll(-1, axis)) / 3
    return 3 * x


BOTH = {"image2d": smooth(2, 3, 16, 16), "image3d": smooth(2, 1, 8, 8, 8, seed=1)}


def slow_sobel(x):
    """Every voxel by its neighbours: [-1, 0, 1] / 2 along one axis, [1, 2, 1] / 4 across, edges repeated."""
    sides, out = x.shape[2:], torch.zeros_like(x)
    for place in itertools.product(*map(range, sides)):
        squares = 0
        for axis in range(len(sides)):
            derivative = 0
            for offset in itertools.product((-1, 0, 1), repeat=len(sides)):
                weight = 1.0
                for other, step in enumerate(offset):
                    weight *= step / 2 if other == axis else (2 - abs(step)) / 4
                near = [min(max(p + s, 0), n - 1) for p, s, n in zip(place, offset, sides, strict=True)]
                derivative = derivative + weight * x[(..., *near)]
            squares = squares + derivative**2
        out[(..., *place)] = squares.sqrt()
    return out


def slow_error(target, pred, mask):
    errors, grid = [], [n // 4 for n in target.shape[2:]]
    for b in range(len(target)):
        for number, at in enumerate(itertools.product(*map(range, grid))):
            if mask[b, number]:
                cut = target[b][(slice(None), *[slice(4 * i, 4 * i + 4) for i in at])]
                errors.append((cut.movedim(0, -1).flatten() - pred[b, number]).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize("keys", [("image2d",), ("image3d",), ("image2d", "image3d")])
@pytest.mark.parametrize("masking", [None, BlockMask()])
def test_the_loss_is_the_weighted_sum_over_ranks_of_image_and_explicit_sobel(keys, masking):
    weights = {"image2d": 0.5, "image3d": 2.0}
    task = objective(weights=weights, masking=masking, gradient_weight=0.7, mask_ratio=0.75)
    seen = []
    task.model.register_forward_hook(lambda module, inputs, out: seen.append(out))
    losses = task({key: BOTH[key] for key in keys}, 0.5)
    total = 0
    for key, out in zip(keys, seen, strict=True):
        x = BOTH[key]
        image = slow_error(x, out.image, out.mask)
        gradient = slow_error(slow_sobel(x), out.gradient, out.mask)
        torch.testing.assert_close(losses.parts[f"{key}_image"], image.detach())
        torch.testing.assert_close(losses.parts[f"{key}_gradient"], gradient.detach())
        total = total + weights[key] * (image + 0.7 * gradient)
        assert out.mask.sum(1).tolist() == [out.mask.shape[1] * 0.75] * 2
    torch.testing.assert_close(losses.loss, total)
    assert sorted(losses.parts) == sorted(f"{key}_{part}" for key in keys for part in ("image", "gradient"))


def test_gradients_of_both_ranks_add_up():
    def gradient(batch):
        task = objective()
        torch.manual_seed(5)
        task(batch, 0.0).loss.backward()
        return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}

    flat, both = gradient({"image2d": BOTH["image2d"]}), gradient(BOTH)
    only_3d = [name for name in both if name not in flat]
    assert only_3d
    assert all("3" in name.split(".") for name in only_3d)
    blocks = [name for name in flat if ".blocks." in name]
    assert blocks
    assert all(not torch.equal(flat[name], both[name]) for name in blocks if both[name].any())


def test_it_is_an_objective_whose_encoder_is_the_networks():
    task = objective()
    assert isinstance(task, Objective)
    assert task.encoder is task.model.encoder
    task.after_step(0.1)


def test_a_few_steps_lower_every_part():
    task = objective(mask_ratio=0.5)
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 3e-3)
    parts = []
    for _ in range(25):
        torch.manual_seed(0)
        losses = task(BOTH, 0.0)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        parts.append({name: float(value) for name, value in losses.parts.items()})
    assert all(parts[-1][name] < 0.8 * parts[0][name] for name in parts[0])


def test_pictures_can_be_saved():
    pictures = objective().pictures(BOTH)
    shapes = {name: tuple(picture.shape) for name, picture in pictures.items()}
    flat, deep = (16, 48, 3), (8, 24, 3)
    expected = {"image2d_image": flat, "image2d_gradient": flat, "image3d_image": deep, "image3d_gradient": deep}
    assert shapes == expected
    assert all(0 <= picture.min() <= picture.max() <= 1 for picture in pictures.values())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"image": BOTH["image2d"]}, "the batch must hold one of ['image2d', 'image3d'] or both, got ['image']"),
        ({"image3d": BOTH["image2d"]}, "image3d must have 3 spatial axes, got shape (2, 3, 16, 16)"),
        ({"image2d": torch.zeros(1, 3, 16, 18)}, "multiple of the patch (4, 4), got (16, 18); use (16, 20)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective()(batch, 0.0)


@pytest.mark.parametrize("weights", [{"image2d": 1.0}, {"image2d": 1.0, "image3d": -1.0}])
def test_weights_must_name_both_ranks(weights):
    with pytest.raises(ValueError, match=re.escape(f"for each of ['image2d', 'image3d'], got {weights}")):
        objective(weights=weights)
