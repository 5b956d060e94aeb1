"""The MAE objective against a loop over hidden patches, and as the trainer meets it."""

import re

import pytest
import torch

from medvit.models.mae import MAE
from medvit.pretrain.mae import MAEObjective, painted_in
from medvit.pretrain.masking import BlockMask, FrequencyMask, GroupReplacement, SemanticMask
from medvit.pretrain.objective import Objective

SMALL = {
    "in_channels": 1,
    "img_size": 16,
    "patch_size": 4,
    "embed_dim": 24,
    "depth": 2,
    "num_heads": 3,
    "decoder_embed_dim": 24,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def objective(seed=0, masking=None, **options):
    torch.manual_seed(seed)
    return MAEObjective(MAE(**{**SMALL, **options}), masking=masking)


def blobs(*shape, seed=0):
    """Smooth bright spots on a dark ground, as images are and noise is not."""
    generator = torch.Generator().manual_seed(seed)
    places = torch.stack(torch.meshgrid(*[torch.linspace(0, 1, n) for n in shape[2:]], indexing="ij"))
    out = torch.zeros(shape)
    for b in range(shape[0]):
        for _ in range(4):
            centre, width = (
                torch.rand(len(places), generator=generator),
                0.1 + 0.2 * torch.rand((), generator=generator),
            )
            squares = (places - centre.reshape(-1, *[1] * len(places))).square().sum(0)
            out[b] += torch.exp(-squares / (2 * width**2))
    return out


def slow_loss(model, x, mask, pred, norm_pix):
    """Mean squared error of hidden patches, patch by patch."""
    patch, errors = model.encoder.patch_size, []
    grid = [n // p for n, p in zip(x.shape[2:], patch, strict=True)]
    for b in range(len(x)):
        for number in mask[b].nonzero()[:, 0].tolist():
            place = torch.unravel_index(torch.tensor(number), grid)
            cut = x[b][(slice(None), *[slice(int(i) * p, (int(i) + 1) * p) for i, p in zip(place, patch, strict=True)])]
            values = cut.movedim(0, -1).flatten()
            if norm_pix:
                values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            errors.append((pred[b, number] - values).square().mean())
    return torch.stack(errors).mean()


@pytest.mark.parametrize(
    ("options", "sides", "hidden"),
    [
        ({}, (16, 16), 12),
        ({"mask_ratio": 0.9}, (16, 16), 15),
        ({"spatial_dims": 3, "img_size": (8, 8, 16)}, (8, 8, 16), 12),
    ],
)
@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("masking", [None, BlockMask()])
def test_the_loss_is_that_of_a_loop_over_hidden_patches(options, sides, hidden, norm_pix, masking):
    task = objective(norm_pix_loss=norm_pix, masking=masking, **options)
    x, seen = blobs(2, 1, *sides), []
    task.model.register_forward_hook(lambda module, inputs, out: seen.append(out))
    torch.manual_seed(1)
    losses = task({"image": x}, 0.3)
    assert seen[0].mask.sum(1).tolist() == [hidden, hidden]
    torch.testing.assert_close(losses.loss, slow_loss(task.model, x, seen[0].mask, seen[0].pred, norm_pix))
    assert losses.parts["reconstruction"].item() == losses.loss.item()
    assert not losses.parts["reconstruction"].requires_grad


def test_it_is_an_objective_whose_encoder_is_the_networks():
    task = objective()
    assert isinstance(task, Objective)
    assert task.encoder is task.model.encoder
    before = {k: v.clone() for k, v in task.state_dict().items()}
    task.after_step(0.5)
    assert all(torch.equal(before[k], v) for k, v in task.state_dict().items())


def test_torchs_generator_decides_what_is_hidden():
    task, batch = objective(), {"image": blobs(2, 1, 16, 16)}

    def loss(seed):
        torch.manual_seed(seed)
        return task(batch, 0.0).loss.item()

    assert loss(1) == loss(1) != loss(2)


def test_weights_beside_the_image_are_heeded():
    task, x = objective(masking=SemanticMask(50.0), mask_ratio=0.5), blobs(2, 1, 16, 16)
    weights = torch.full_like(x, 1e-3)
    weights[:, :, 8:] = 1.0  # the lower half
    seen = []
    task.model.register_forward_hook(lambda module, inputs, out: seen.append(out.mask))
    task({"image": x, "image_weights": weights}, 1.0)
    assert torch.equal(seen[0], torch.tensor([[0.0] * 8 + [1.0] * 8] * 2))


@pytest.mark.parametrize("dims", [2, 3])
def test_a_few_steps_lower_the_loss(dims):
    task = objective(spatial_dims=dims, mask_ratio=0.5)
    batch = {"image": blobs(8, 1, *[16] * dims)}
    optimizer = torch.optim.AdamW([p for p in task.parameters() if p.requires_grad], 3e-3)
    values = []
    for _ in range(25):
        torch.manual_seed(0)
        loss = task(batch, 0.0).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]


@pytest.mark.parametrize("norm_pix", [False, True])
def test_right_predictions_paint_the_image(norm_pix):
    x = blobs(2, 1, 8, 8)
    patches = torch.stack([x[:, 0, i : i + 4, j : j + 4].flatten(1) for i in (0, 4) for j in (0, 4)], 1)
    pred = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0]])
    holes, painted = painted_in(x, pred if norm_pix else patches, mask, (4, 4), norm_pix=norm_pix)
    torch.testing.assert_close(painted, x)
    assert torch.equal(holes[0, 0, :4, :4], x[0].min().expand(4, 4))
    assert torch.equal(holes[0, 0, :4, 4:], x[0, 0, :4, 4:])


@pytest.mark.parametrize(("dims", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_pictures_can_be_saved(dims, channels):
    task = objective(spatial_dims=dims, in_channels=channels)
    picture = task.pictures({"image": blobs(2, channels, *[16] * dims)})["reconstruction"]
    assert picture.shape == (16, 48, 3)
    assert 0 <= picture.min() <= picture.max() <= 1


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"picture": torch.zeros(1, 1, 16, 16)}, "the batch must hold 'image', got ['picture']"),
        ({"image": torch.zeros(1, 1, 16, 18)}, "must be a multiple of the patch (4, 4), got (16, 18); use (16, 20)"),
        ({"image": torch.zeros(1, 2, 16, 16)}, "needs (B, 1, 2 spatial axes)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        objective()(batch, 0.0)


@pytest.mark.parametrize("corruption", [FrequencyMask(4), GroupReplacement((0.1, 0.3), "noise")])
def test_what_changes_images_is_no_mask_of_patches(corruption):
    with pytest.raises(ValueError, match=f"{type(corruption).__name__} changes images and hides no patches; use it as"):
        objective(masking=corruption)
