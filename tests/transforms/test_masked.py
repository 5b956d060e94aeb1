import numpy as np
import pytest
import torch
from monai.transforms import Compose
from monai.utils import set_determinism
from scipy.stats import kstest

from medvit.layers.masking import random_masking
from medvit.transforms import RandPatchMaskd


def masks(n, image, *args, **kwargs) -> torch.Tensor:
    draw = RandPatchMaskd("x", *args, **kwargs).set_random_state(0)
    return torch.stack([draw({"x": image})["x_mask"] for _ in range(n)])


@pytest.mark.parametrize("ratio", [0, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("block", [1, 2, 3])
def test_the_number_is_that_of_random_masking_and_it_is_its_noise(ratio, block):
    mask = masks(3, torch.zeros(1, 20, 30), (2, 3), ratio, block=block)
    assert mask.shape == (3, 10, 10) and mask.dtype == torch.float32 and set(mask.unique().tolist()) <= {0, 1}
    masking = random_masking(mask.flatten(1), ratio)
    assert torch.equal(masking.mask, mask.flatten(1))


def test_every_patch_is_as_likely_and_draws_differ():
    mask = masks(2000, torch.zeros(1, 8, 8, 4), (2, 2, 1), 0.5)
    assert mask.shape == (2000, 4, 4, 4) and (mask.flatten(1).sum(1) == 32).all()
    assert abs(mask.mean(0) - 0.5).max() < 5 * 0.5 / 2000**0.5
    assert len(mask.flatten(1).unique(dim=0)) == 2000


def test_blocks_are_hidden_whole_but_one():
    mask = masks(50, torch.zeros(1, 12, 10), 1, 0.6, block=(4, 5))
    by_block = mask.reshape(50, 3, 4, 2, 5).permute(0, 1, 3, 2, 4).reshape(50, 6, 20).sum(2)
    assert (by_block.sum(1) == 72).all()  # 120 - int(48.0...)
    assert ((by_block == 0) | (by_block == 20)).sum(1).eq(5).all()
    ragged = masks(50, torch.zeros(1, 7, 7), 1, 0.5, block=4)  # blocks of 16, 12, 12 and 9
    assert (ragged.flatten(1).sum(1) == 25).all()


def test_a_ratio_from_a_range_is_uniform():
    share = masks(1000, torch.zeros(1, 50, 50), 1, (0.1, 0.5)).flatten(1).mean(1).numpy()
    assert kstest(share, "uniform", (0.1, 0.4)).pvalue > 0.01


def test_seeds_decide():
    item = {"x": torch.zeros(1, 32, 32), "y": torch.zeros(1, 16)}
    runs = []
    for _ in range(2):
        set_determinism(7)
        runs.append(Compose([RandPatchMaskd(["x", "y"], 4, suffix=".hidden")])(item))
    set_determinism(None)
    assert list(runs[0]) == ["x", "y", "x.hidden", "y.hidden"]
    for name in ("x.hidden", "y.hidden"):
        assert torch.equal(runs[0][name], runs[1][name])
    a, b = (RandPatchMaskd("x", 4).set_random_state(state=np.random.RandomState(s))(item)["x_mask"] for s in (0, 1))
    assert not torch.equal(a, b)


def test_what_makes_no_sense_is_refused():
    for ratio in (1.0, -0.1, (0.5, 0.1), (0.1, 0.2, 0.3)):
        with pytest.raises(
            ValueError, match=r"^ratio must be a fraction in \[0, 1\), or two of them, the lesser first"
        ):
            RandPatchMaskd("x", 4, ratio)
    with pytest.raises(ValueError, match=r"^the sides of 'x' must be multiples of the patch \(4, 4\), got \(8, 9\)$"):
        RandPatchMaskd("x", 4)({"x": torch.zeros(1, 8, 9)})
