"""What is hidden: counts, laws of drawing and corruptions against slow references."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.layers.masking import patchify, random_masking
from medvit.pretrain.masking import (
    BlockMask,
    FrequencyMask,
    GroupMask,
    GroupReplacement,
    RandomMask,
    SemanticMask,
    ranking,
)

STRATEGIES = [RandomMask(), BlockMask(), GroupMask(), GroupMask((0.2, 1.0)), SemanticMask(2.0)]


def drawn(strategy, grid, hidden, seed=0, progress=1.0, weights=None):
    torch.manual_seed(seed)
    if weights is None:
        weights = torch.rand(len(hidden), math.prod(grid))
    return strategy(grid, hidden, progress, weights)


# --- token masks


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@settings(max_examples=25)
@given(st.lists(st.integers(1, 7), min_size=1, max_size=3), st.data())
def test_exactly_as_many_are_hidden_as_asked_for(strategy, grid, data):
    count = math.prod(grid)
    hidden = data.draw(st.lists(st.integers(0, count), min_size=1, max_size=4))
    mask = drawn(strategy, grid, hidden, seed=data.draw(st.integers(0, 99)))
    assert mask.dtype == torch.bool
    assert mask.shape == (len(hidden), count)
    assert mask.sum(1).tolist() == hidden


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_torchs_generator_alone_decides(strategy):
    a, b, c = (drawn(strategy, (6, 5), [9, 12], seed=seed) for seed in (3, 3, 4))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
@pytest.mark.parametrize("hidden", [[3, 13], [-1]])
def test_more_than_there_are_cannot_be_hidden(strategy, hidden):
    with pytest.raises(ValueError, match=re.escape(f"of 12 patches 0 to 12 can be hidden, got {hidden}")):
        drawn(strategy, (3, 4), hidden)


def test_each_patch_is_as_likely_at_random():
    mask = drawn(RandomMask(), (3, 4), [3] * 20000)
    torch.testing.assert_close(mask.double().mean(0), torch.full((12,), 0.25).double(), rtol=0, atol=0.012)


def boxes_of(strategy, grid, left, count, seed=0):
    torch.manual_seed(seed)
    boxes = [strategy._box(grid, left) for _ in range(count)]
    return [[(s.start, s.stop - s.start) for s in box] for box in boxes if box is not None]


def test_blocks_have_the_authors_sizes_and_shapes():
    """One box: uniform volume and log-uniform aspect, rounded, as DINOv2's generator draws it."""
    edges = np.array([[edge for _, edge in box] for box in boxes_of(BlockMask(), (64, 64), 200, 3000)])
    generator = np.random.default_rng(0)
    volume, aspect = generator.uniform(4, 200, 100000), np.exp(generator.uniform(np.log(0.3), -np.log(0.3), 100000))
    expected = np.stack([np.round(np.sqrt(volume * aspect)), np.round(np.sqrt(volume / aspect))], 1)
    for quantile in (0.05, 0.25, 0.5, 0.75, 0.95):
        np.testing.assert_allclose(np.quantile(edges, quantile, 0), np.quantile(expected, quantile, 0), atol=1)
    np.testing.assert_allclose(edges.mean(0), expected.mean(0), rtol=0.03)
    product, wanted = edges.prod(1), expected.prod(1)
    assert product.mean() == pytest.approx(wanted.mean(), rel=0.03)


def test_blocks_in_3d_keep_volume_and_ratios():
    edges = np.array([[edge for _, edge in box] for box in boxes_of(BlockMask(), (40, 40, 40), 800, 2000)])
    assert edges.prod(1).mean() == pytest.approx((4 + 800) / 2, rel=0.05)
    spread = np.log(edges.max(1) / edges.min(1))
    assert spread.max() < 2 * math.log(1 / 0.3) + 0.8  # two ratios, and rounding of short edges
    np.testing.assert_allclose(edges.mean(0), edges.mean(), rtol=0.05)  # no axis is special


def test_a_few_blocks_fill_a_mask():
    """Hidden patches have far more hidden neighbours than at random."""

    def neighbours(mask):
        m = mask.reshape(-1, 14, 14).float()
        pairs = (m[:, 1:] * m[:, :-1]).sum() + (m[:, :, 1:] * m[:, :, :-1]).sum()
        return float(pairs / (2 * m.sum()))

    hidden = [60] * 50
    assert neighbours(drawn(RandomMask(), (14, 14), hidden)) < 0.35
    assert neighbours(drawn(BlockMask(), (14, 14), hidden)) > 0.6
    assert neighbours(drawn(GroupMask(), (14, 14), hidden)) > 0.6


@pytest.mark.parametrize("grid", [(9, 8, 1), (9, 1, 8), (1, 9, 8)])
def test_a_volume_of_one_slice_is_masked_as_its_slice(grid):
    assert torch.equal(drawn(BlockMask(), grid, [30, 5, 70]), drawn(BlockMask(), (9, 8), [30, 5, 70]))


def test_groups_are_boxes_of_bounded_edges():
    boxes = boxes_of(GroupMask((0.1, 0.3)), (20, 10), 99, 4000)
    assert {edge for (_, edge), _ in boxes} == set(range(1, 7))  # 2 to 6, cut off at the border
    assert {edge for _, (_, edge) in boxes} == {1, 2, 3}
    inner = [edge for (start, edge), _ in boxes if start <= 14]
    counts = np.bincount(inner, minlength=7)[2:7]
    np.testing.assert_allclose(counts / len(inner), 0.2, atol=0.03)
    assert {start for (start, _), _ in boxes} == set(range(20))


def inclusion(probabilities, count):
    """Chance of each to be among ``count`` draws without replacement."""
    n = len(probabilities)
    out = np.zeros(n)
    for order in itertools.permutations(range(n), count):
        chance, rest = 1.0, 1.0
        for i in order:
            chance *= probabilities[i] / rest
            rest -= probabilities[i]
        out[list(order)] += chance
    return out


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_weights_come_in_step_by_step(progress):
    weights = torch.tensor([[1.0, 2.0, 3.0, 6.0, 12.0]])
    powers = weights[0].double().numpy() ** (1.5 * progress)
    mask = drawn(SemanticMask(1.5), (5,), [2] * 20000, progress=progress, weights=weights.expand(20000, -1))
    np.testing.assert_allclose(mask.double().mean(0), inclusion(powers / powers.sum(), 2), atol=0.012)


def test_patches_without_weight_come_last_in_the_end_and_not_before():
    weights = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0]]).expand(200, -1)
    assert torch.equal(drawn(SemanticMask(), (5,), [3] * 200, weights=weights), weights > 0)
    assert drawn(SemanticMask(), (5,), [3] * 200, progress=0.0, weights=weights)[:, 0].any()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (None, "needs a weight for every patch, (2, 6), got None"),
        (torch.ones(2, 5), "needs a weight for every patch, (2, 6), got (2, 5)"),
        (torch.full((2, 6), -1.0), "weights must be finite and not negative"),
        (torch.full((2, 6), float("nan")), "weights must be finite and not negative"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SemanticMask()((2, 3), [1, 1], 0.5, weights)


# --- as noise


class Fixed:
    """Hides what it is told, and remembers what it was asked."""

    def __init__(self, mask):
        self.mask = mask

    def __call__(self, *asked):
        self.asked = asked
        return self.mask


@settings(max_examples=40)
@given(st.integers(2, 60), st.floats(0, 0.99), st.integers(0, 9))
def test_what_a_strategy_hides_the_network_hides(count, ratio, seed):
    if int(count * (1 - ratio)) < 1:
        return
    torch.manual_seed(seed)
    noise = ranking(RandomMask(), torch.zeros(3, 1, count), (1,), ratio, 0.0)
    assert torch.equal(random_masking(noise, ratio).mask, (noise >= 1).float())


def test_weights_of_a_patch_are_the_mean_over_its_voxels():
    strategy, weights = Fixed(torch.zeros(2, 6, dtype=torch.bool)), torch.rand(2, 1, 4, 6)
    ranking(strategy, torch.zeros(2, 3, 4, 6), (2, 2), 0.75, 0.25, weights)
    grid, hidden, progress, per_patch = strategy.asked
    assert (grid, hidden, progress) == ((2, 3), [5, 5], 0.25)  # int(6 * 0.25) = 1 stays
    slow = [
        [weights[b, 0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].mean() for i in range(2) for j in range(3)] for b in (0, 1)
    ]
    torch.testing.assert_close(per_patch, torch.tensor(slow))


def test_a_map_beside_the_image_is_refused():
    with pytest.raises(ValueError, match=re.escape("must be a map (1, 1, 4, 4) like the image, got (1, 1, 2, 2)")):
        ranking(SemanticMask(), torch.zeros(1, 3, 4, 4), (2, 2), 0.5, 0.0, torch.ones(1, 1, 2, 2))


# --- in images


@pytest.mark.parametrize(("sides", "cell"), [((12, 8), 1), ((12, 8), (4, 2)), ((8, 8, 4), 2)])
@pytest.mark.parametrize("fill", ["noise", "image"])
def test_the_mask_says_what_was_replaced_and_cells_are_whole(sides, cell, fill):
    torch.manual_seed(0)
    x = torch.rand(4, 2, *sides)
    out = GroupReplacement((0.5, 0.5), fill, cell)(x)
    assert torch.equal((out.image != x).any(1, keepdim=True), out.mask)
    edges = (cell,) * len(sides) if isinstance(cell, int) else cell
    share = patchify(out.mask.float(), edges).mean(-1)
    assert torch.equal(share, share.round())
    assert share.sum(1).tolist() == [share.shape[1] / 2] * 4  # the ratio, exactly


def test_ratios_are_uniform_in_their_range():
    torch.manual_seed(0)
    shares = [float(GroupReplacement((0.2, 0.6))(torch.rand(1, 1, 10, 10)).mask.float().mean()) for _ in range(300)]
    assert min(shares) >= 0.2 - 0.005
    assert max(shares) <= 0.6 + 0.005
    assert np.mean(shares) == pytest.approx(0.4, abs=0.02)
    assert np.std(shares) == pytest.approx(0.4 / math.sqrt(12), abs=0.01)


def test_another_image_gives_the_same_place():
    torch.manual_seed(0)
    x = torch.arange(3.0).reshape(3, 1, 1, 1) * 100 + torch.rand(1, 1, 8, 8)
    out = GroupReplacement((0.5, 0.5), "image")(x)
    filled = (out.image - x).masked_select(out.mask).round()
    assert set(filled.tolist()) <= {100.0, 200.0, -100.0, -200.0}  # never itself, never elsewhere


def test_noise_has_the_images_mean_and_deviation():
    torch.manual_seed(0)
    x = torch.tensor([[10.0, -3.0]]).reshape(1, 2, 1, 1) + torch.tensor([2.0, 0.5]).reshape(1, 2, 1, 1) * torch.randn(
        1, 2, 128, 128
    )
    out = GroupReplacement((1.0, 1.0))(x).image
    torch.testing.assert_close(out.mean((2, 3)), x.mean((2, 3)), rtol=0, atol=0.06)
    torch.testing.assert_close(out.std((2, 3)), x.std((2, 3)), rtol=0.03, atol=0)


def slow_filter(image, radius, low):
    """Fourier sums, one frequency at a time."""
    sides = image.shape
    out = np.zeros(sides, dtype=complex)
    places = np.stack(np.meshgrid(*map(np.arange, sides), indexing="ij"))
    for k in itertools.product(*map(range, sides)):
        signed = [i if i < (n + 1) // 2 else i - n for i, n in zip(k, sides, strict=True)]
        if (sum(i * i for i in signed) < radius**2) == low:
            phase = sum(i * p / n for i, p, n in zip(k, places, sides, strict=True))
            coefficient = (image * np.exp(-2j * np.pi * phase)).sum() / image.size
            out += coefficient * np.exp(2j * np.pi * phase)
    return out.real


@pytest.mark.parametrize("sides", [(6, 5), (4, 3, 5)])
@pytest.mark.parametrize("low_pass", [0.0, 1.0])
def test_frequencies_are_taken_away_as_by_a_plain_sum(sides, low_pass):
    torch.manual_seed(0)
    x = torch.randn(2, 2, *sides, dtype=torch.float64)
    out = FrequencyMask(1.7, low_pass)(x)
    for b, c in itertools.product(range(2), range(2)):
        slow = slow_filter(x[b, c].numpy(), 1.7, bool(low_pass))
        np.testing.assert_allclose(out.image[b, c].numpy(), slow, atol=2e-6)
    assert out.mask.shape == (2, 1, *sides)
    assert bool(out.mask[0, 0].flatten()[0]) is not bool(low_pass)  # the mean is a low frequency


def test_the_authors_radius_in_shifted_order():
    """Within a circle about the middle of the shifted spectrum, as the authors draw it."""
    removed = FrequencyMask(5, 1.0)(torch.zeros(1, 1, 16, 15)).mask[0, 0]
    y, x = np.mgrid[:16, :15]
    far = (x - 15 // 2) ** 2 + (y - 16 // 2) ** 2 >= 25
    np.testing.assert_array_equal(torch.fft.fftshift(removed).numpy(), far)


def test_images_choose_between_low_and_high():
    torch.manual_seed(0)
    low = ~FrequencyMask(2, 0.25)(torch.zeros(2000, 1, 4, 4)).mask[:, 0, 0, 0]
    assert float(low.float().mean()) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BlockMask(min_size=0), "min_size must be at least 1 and min_aspect in (0, 1], got 0 and 0.3"),
        (lambda: BlockMask(min_aspect=2.0), "got 4 and 2.0; use 4 and 0.3"),
        (lambda: GroupMask((0.5, 0.2)), "edges must be two fractions, the smaller first, got (0.5, 0.2)"),
        (lambda: SemanticMask(-1.0), "strength must not be negative, got -1.0; use 1.0"),
        (lambda: GroupReplacement((0.1, 1.2)), "ratio must be two fractions, the smaller first, got (0.1, 1.2)"),
        (lambda: GroupReplacement(fill="zero"), "fill must be one of ('noise', 'image'), got 'zero'"),
        (lambda: GroupReplacement(cell=4)(torch.zeros(1, 1, 8, 6)), "multiple of the cell (4, 4), got (8, 6)"),
        (lambda: GroupReplacement(fill="image")(torch.zeros(1, 1, 8, 8)), "needs two images in a batch, got 1"),
        (lambda: FrequencyMask(0), "radius must be positive and low_pass in [0, 1], got 0 and 0.5"),
        (lambda: FrequencyMask(low_pass=1.5), "got 16.0 and 1.5; use 16 and 0.5"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
