"""Masking, patches of pixels and the loss on them: small cases whose answers can be read off."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medvit.layers.masking import hidden_patch_loss, patchify, random_masking, unpatchify


def uniform(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


# --- which tokens


def test_the_smallest_noise_stays_visible_in_ascending_order():
    masking = random_masking(torch.tensor([[0.5, 0.1, 0.9, 0.3], [0.0, 0.2, 0.1, 0.3]]), 0.5)
    assert masking.keep.tolist() == [[1, 3], [0, 2]]
    assert masking.mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    assert masking.restore.tolist() == [[2, 0, 3, 1], [0, 2, 1, 3]]
    assert masking.mask.dtype == torch.float32


@pytest.mark.parametrize(("count", "ratio", "kept"), [(100, 0.9, 9), (196, 0.9, 19), (25, 0.75, 6), (196, 0.75, 49)])
def test_the_number_kept_truncates_in_floating_point(count, ratio, kept):
    assert random_masking(uniform(2, count), ratio).keep.shape == (2, kept)


def test_ratio_zero_still_shuffles():
    masking = random_masking(torch.tensor([[0.5, 0.1, 0.3]]), 0.0)
    assert masking.keep.tolist() == [[1, 2, 0]]
    assert not masking.mask.any()


def test_equal_noise_keeps_raster_order():
    assert random_masking(torch.zeros(1, 50), 0.5).keep.tolist() == [list(range(25))]


@given(st.integers(1, 3), st.integers(1, 40), st.floats(0, 0.99), st.integers(0, 9))
def test_fill_undoes_select(batch, count, ratio, seed):
    if int(count * (1 - ratio)) < 1:
        return
    masking = random_masking(uniform(batch, count, seed=seed), ratio)
    tokens = 1 + uniform(batch, count, 3, seed=seed + 1)
    filled = masking.fill(masking.select(tokens), torch.full((1, 1, 3), -1.0))
    assert torch.equal(filled, torch.where(masking.mask[..., None] == 1, -1.0, tokens))


@pytest.mark.parametrize(
    ("ratio", "count", "use"), [(-0.1, 1, "0"), (1.0, 2, "0.25"), (0.8, 4, "0.625"), (0.9, 9, "0.75")]
)
def test_a_ratio_that_leaves_nothing_is_refused(ratio, count, use):
    message = f"mask_ratio must lie in [0, 1) and leave a token visible, got {ratio} of {count} tokens; use {use}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        random_masking(uniform(1, count), ratio)
    assert random_masking(uniform(1, count), float(use)).keep.shape[1] >= 1


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 0)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=re.escape(f"noise must be (B, tokens), got shape {shape}")):
        random_masking(torch.zeros(shape), 0.5)


# --- pixels


def test_a_patch_is_its_pixels_in_raster_order_channel_fastest():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)  # pixel (c, h, w) is 24 c + 6 h + w
    patches = patchify(image, (2, 3))
    assert patches.shape == (1, 4, 12)
    assert patches[0, 0].tolist() == [0, 24, 1, 25, 2, 26, 6, 30, 7, 31, 8, 32]
    assert patches[0, 1, :2].tolist() == [3, 27]  # the next along the last axis
    assert patches[0, 2, :2].tolist() == [12, 36]


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3), st.integers(1, 3))
def test_unpatchify_undoes_patchify(axes, channels):
    grid, patch = zip(*axes, strict=True)
    images = uniform(2, channels, *[n * p for n, p in axes])
    assert torch.equal(unpatchify(patchify(images, patch), patch, grid), images)


def test_a_volume_of_one_slice_has_the_patches_of_the_image():
    images = uniform(2, 3, 4, 6)
    assert torch.equal(patchify(images[:, :, None], (1, 2, 2)), patchify(images, (2, 2)))


# --- loss


def test_only_hidden_patches_count():
    pred = torch.tensor([[[1.0, 3.0], [9.0, 9.0], [0.0, 0.0]]])
    loss = hidden_patch_loss(pred, torch.zeros(1, 3, 2), torch.tensor([[1.0, 0.0, 1.0]]))
    assert loss.item() == pytest.approx((5.0 + 0.0) / 2)


def test_targets_can_be_normalised_by_unbiased_statistics():
    target = torch.tensor([[[1.0, 2.0, 3.0]]])  # mean 2, unbiased variance 1
    loss = hidden_patch_loss(torch.zeros(1, 1, 3), target, torch.ones(1, 1), norm_pix=True)
    assert loss.item() == pytest.approx(2 / 3, abs=1e-5)
    flat = hidden_patch_loss(torch.zeros(1, 1, 3), torch.full((1, 1, 3), 7.0), torch.ones(1, 1), norm_pix=True)
    assert flat.item() == 0


def test_the_loss_is_float32_whatever_comes():
    pred, target = uniform(1, 4, 8), uniform(1, 4, 8, seed=1)
    low = hidden_patch_loss(pred.bfloat16(), target, torch.ones(1, 4))
    assert low.dtype == torch.float32
    assert low.item() == hidden_patch_loss(pred.bfloat16().float(), target, torch.ones(1, 4)).item()
