"""Overlap and surfaces of masks against their definitions, voxel by voxel."""

import itertools
import math

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medvit.pretrain.agreement import Agreement, agreement, dice, spacing_of


def slow_surface(mask):
    """Indices of voxels with a neighbour, across a face, that is not in the mask or not in the image."""
    out = []
    for place in itertools.product(*map(range, mask.shape)):
        steps = [(axis, step) for axis in range(mask.ndim) for step in (-1, 1)]
        near = [tuple(p + step * (a == axis) for a, p in enumerate(place)) for axis, step in steps]
        inside = [all(0 <= p < n for p, n in zip(q, mask.shape, strict=True)) and mask[q] for q in near]
        if mask[place] and not all(inside):
            out.append(place)
    return out


def slow_agreement(found, truth, spacing, tolerance):
    mine, theirs = slow_surface(found), slow_surface(truth)

    def away(place, others):
        return min(math.dist(np.multiply(place, spacing), np.multiply(other, spacing)) for other in others)

    there, back = [away(p, theirs) for p in mine], [away(p, mine) for p in theirs]
    near = [distance <= tolerance for distance in there + back]
    overlap = 2 * (found & truth).sum() / (found.sum() + truth.sum())
    return overlap, np.mean(near), max(np.percentile(there, 95), np.percentile(back, 95))


def blob(shape, seed):
    """A ragged ellipsoid that may touch the end of the image."""
    rng = np.random.default_rng(seed)
    places = np.stack(np.meshgrid(*[np.linspace(0, 1, n) for n in shape], indexing="ij"), -1)
    centre, radius = rng.uniform(0.3, 0.7, len(shape)), rng.uniform(0.25, 0.6, len(shape))
    return (((places - centre) / radius) ** 2).sum(-1) + rng.uniform(-0.3, 0.3, shape) < 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "spacing", "tolerance"),
    [((11, 13), (0.7, 1.9), 1.0), ((9, 8, 5), (0.8, 1.1, 3.1), 1.5), ((7, 7, 7), (1, 1, 1), 0.0)],
)
def test_of_two_masks_by_definition(shape, spacing, tolerance, seed):
    found, truth = blob(shape, seed), blob(shape, seed + 100)
    ours = agreement(torch.from_numpy(found), torch.from_numpy(truth), spacing, tolerance)
    assert ours == pytest.approx(slow_agreement(found, truth, spacing, tolerance), rel=1e-5)


@pytest.mark.upstream
@pytest.mark.filterwarnings("ignore::FutureWarning")  # MONAI's of MONAI
@pytest.mark.parametrize("seed", range(3))
def test_of_two_masks_as_monai_does_it(seed):
    from monai.metrics import compute_hausdorff_distance, compute_surface_dice

    shape, spacing = (20, 16, 9), [0.8, 1.1, 3.1]
    masks = [torch.from_numpy(blob(shape, number)) for number in (seed, seed + 100)]
    theirs = [
        compute_surface_dice(
            masks[0][None, None], masks[1][None, None], [1.5], include_background=True, spacing=spacing
        ),
        compute_hausdorff_distance(
            *(m[None, None] for m in masks), include_background=True, percentile=95, spacing=spacing
        ),
    ]
    assert agreement(*masks, spacing, 1.5)[1:] == pytest.approx([float(value) for value in theirs], rel=1e-5)


def test_of_a_mask_with_itself_and_with_nothing():
    mask = torch.from_numpy(blob((9, 8, 5), 0))
    nothing = torch.zeros_like(mask)
    assert agreement(mask, mask, (1, 1, 2), 0.0) == (1, 1, 0)
    assert agreement(mask, nothing, (1, 1, 2)) == agreement(nothing, mask, (1, 1, 2)) == (0, 0, math.inf)
    assert all(map(math.isnan, agreement(nothing, nothing, (1, 1, 2))))
    assert math.isnan(dice(nothing, nothing)) and dice(mask, nothing) == 0 and dice(mask, mask) == 1


def test_a_shift_is_as_far_as_it_is_in_mm():
    mask = torch.zeros(12, 12, 12, dtype=torch.bool)
    mask[3:8, 3:8, 3:8] = True
    found = agreement(mask.roll(2, 2), mask, (1.0, 1.0, 2.5), 4.9)
    assert isinstance(found, Agreement) and found.hd95 == 5.0 and found.dice == pytest.approx(0.6)
    assert found.surface_dice < 1 == agreement(mask.roll(2, 2), mask, (1.0, 1.0, 2.5), 5.0).surface_dice


def test_spacing_is_the_affines():
    turned = torch.tensor([[0, -2.0, 0, 5], [0.5, 0, 0, 6], [0, 0, 3, 7], [0, 0, 0, 1]])
    assert spacing_of(MetaTensor(torch.zeros(1, 2, 3, 4), affine=turned)) == [0.5, 2.0, 3.0]
    assert spacing_of(MetaTensor(torch.zeros(1, 2, 3), affine=turned)) == [0.5, 2.0]
    with pytest.raises(TypeError, match="need an image that knows its spacing, a MetaTensor, got Tensor; load it"):
        spacing_of(torch.zeros(1, 2, 3))


@pytest.mark.parametrize(
    ("shapes", "spacing", "tolerance", "message"),
    [
        (((3, 3), (3, 4)), (1, 1), 1, r"of one shape, got \(3, 3\) and \(3, 4\)"),
        (((3,), (3,)), (1,), 1, "must be 2D or 3D"),
        (((3, 3), (3, 3)), (1, 1, 1), 1, r"2 positive numbers, mm per axis, got \(1, 1, 1\)"),
        (((3, 3), (3, 3)), (1, 0), 1, r"got \(1, 0\)"),
        (((3, 3), (3, 3)), (1, 1), math.nan, "0 or more, got nan; use 1.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(shapes, spacing, tolerance, message):
    with pytest.raises(ValueError, match=message):
        agreement(*(torch.ones(shape, dtype=torch.bool) for shape in shapes), spacing, tolerance)
