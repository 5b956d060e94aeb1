"""What every exported transform of images promises: plain tensors and MetaTensors, seeds, laziness, honest affines."""

import copy

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd, Randomizable
from monai.transforms.traits import LazyTrait
from monai.utils import set_determinism

import medvit.transforms
from medvit.transforms import (
    ArgmaxLabelsd,
    ByRankd,
    ForegroundCropd,
    GradientMagnituded,
    HounsfieldWindowsd,
    MultiCropd,
    RadiographRanged,
    RandPatchMaskd,
    RandResizedCropd,
    ResizeShorterSided,
    Respaced,
    RowsFirstd,
)

AFFINE = torch.tensor([[0, -2.0, 0.3, 40], [1.5, 0.2, 0, -30], [0, 0.4, 4, 77], [0, 0, 0, 1]], dtype=torch.float64)
# makes the transform; shape of the image; keys of what comes out
CASES = {
    "ArgmaxLabelsd": (lambda: ArgmaxLabelsd("x"), (3, 24, 18, 16)),
    "ByRankd": (lambda: ByRankd("x", {"3": Flipd("x", 0)}), (1, 24, 18, 16)),
    "ForegroundCropd": (lambda: ForegroundCropd("x", "x", 0.415, margin=1.0), (1, 24, 18, 16)),
    "GradientMagnituded": (lambda: GradientMagnituded("x"), (1, 24, 18, 16)),
    "HounsfieldWindowsd": (lambda: HounsfieldWindowsd("x", [(0.5, 1), (0.2, 0.1)]), (1, 24, 18, 16)),
    "MultiCropd": (lambda: MultiCropd("x", 12, 6, n_local=2, mode="linear", antialias=False), (1, 24, 18, 16)),
    "RadiographRanged": (lambda: RadiographRanged("x"), (1, 24, 18)),
    "RandPatchMaskd": (lambda: RandPatchMaskd("x", (8, 6, 8)), (1, 24, 18, 16)),
    "RandResizedCropd": (lambda: RandResizedCropd("x", 12, antialias=False), (1, 24, 18, 16)),
    "RandResizedCropd-2d": (lambda: RandResizedCropd("x", 12, antialias=False), (1, 24, 18)),
    "ResizeShorterSided": (lambda: ResizeShorterSided("x", 9), (1, 24, 18)),
    "RowsFirstd": (lambda: RowsFirstd("x"), (1, 24, 18)),
    "Respaced": (lambda: Respaced("x", (1.5, 4.0, 0)), (1, 24, 18, 16)),
}
MOVING = {
    "ByRankd",
    "ForegroundCropd",
    "MultiCropd",
    "RandResizedCropd",
    "ResizeShorterSided",
    "Respaced",
    "RowsFirstd",
}
WRAPPED = {"ByRankd", "ForegroundCropd"}  # MONAI's own flip and crop make MetaTensors of plain tensors
NEEDS_META = {"Respaced"}  # without an affine there is no spacing
ELSEWHERE = {"RestoreLabelsd", "rad_dino_preprocessing", "resample_labels"}  # of files and grids: tested with these


def smooth(shape):
    """Values in [0, 1] that say where they are: along a line in the world, with a hill upon it."""
    axes = np.meshgrid(*[np.arange(n) for n in shape[1:]], indexing="ij")
    ramp = sum(axis / n for axis, n in zip(axes, shape[1:], strict=True)) / (len(shape) - 1)
    return torch.from_numpy(np.stack([np.roll(ramp, channel, 0) for channel in range(shape[0])])).float()


def item(case, meta=True):
    values = smooth(CASES[case][1])
    return {"x": MetaTensor(values, affine=AFFINE) if meta else values}


def made(case, data, lazy=False, seed=3):
    steps = Compose([CASES[case][0]()], lazy=lazy)
    steps.set_random_state(seed)
    return steps(data)


def entries(out):
    return {key: value for key, value in out.items() if isinstance(value, torch.Tensor)}


def test_every_exported_transform_is_here():
    assert {case.split("-")[0] for case in CASES} | ELSEWHERE == set(medvit.transforms.__all__)


@pytest.mark.parametrize("case", [case for case in CASES if case not in NEEDS_META])
def test_plain_tensors_get_the_values_of_metatensors_in_any_unit(case):
    plain, meta = made(case, item(case, meta=False)), made(case, {"x": MetaTensor(item(case)["x"].as_tensor())})
    assert plain.keys() == meta.keys()
    for key, value in entries(plain).items():
        assert type(value) is torch.Tensor or case in WRAPPED
        value = value.as_subclass(torch.Tensor)
        assert torch.equal(value, torch.as_tensor(meta[key]).as_subclass(torch.Tensor))


@pytest.mark.parametrize("case", CASES)
def test_it_leaves_its_input_as_it_was(case):
    data = item(case)
    before = copy.deepcopy(data)
    made(case, data)
    assert data.keys() == before.keys()
    assert torch.equal(data["x"].as_tensor(), before["x"].as_tensor())
    assert torch.equal(data["x"].affine, before["x"].affine) and not data["x"].applied_operations


@pytest.mark.parametrize("case", CASES)
def test_seeds_decide(case):
    def run(seed):
        set_determinism(seed)
        try:
            out = entries(Compose([CASES[case][0]()])(item(case)))
            return {key: torch.as_tensor(value).as_subclass(torch.Tensor) for key, value in out.items()}
        finally:
            set_determinism(None)

    first, again, other = run(5), run(5), run(6)
    assert all(torch.equal(first[key], again[key]) for key in first)
    same = all(first[key].shape == other[key].shape and torch.equal(first[key], other[key]) for key in first)
    assert same is (case in WRAPPED or not isinstance(CASES[case][0](), Randomizable))


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(CASES[case][0](), LazyTrait)])
def test_lazily_it_lands_where_it_lands_at_once(case):
    now, later = made(case, item(case))["x"], made(case, item(case), lazy=True)["x"]
    assert now.shape == later.shape and not later.pending_operations
    torch.testing.assert_close(now.affine, later.affine, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_affines_tell_where_values_came_from(case):
    """Of an image whose channels are its own places in the world, scaled into [0, 1]."""
    shape = CASES[case][1][1:]
    world = places(AFFINE, shape)
    low, span = world.min(), world.max() - world.min()
    image = (world - low) / span
    image = image[:1] if case in ("HounsfieldWindowsd", "ForegroundCropd") else image
    out = made(case, {"x": MetaTensor(image, affine=AFFINE)})
    found = [v for key, v in entries(out).items() if isinstance(v, MetaTensor) and (key, case) != ("x", "MultiCropd")]
    assert found or case == "RandPatchMaskd"
    for value in found:
        if case.split("-")[0] in MOVING:
            inner = (slice(None), *[slice(2, -2)] * len(shape))  # at its end an image is smoothed with itself
            expected = places(value.affine, value.shape[1:])[: len(image)][inner]
            torch.testing.assert_close(value.as_tensor()[inner].double() * span + low, expected, rtol=0, atol=1e-4)
            assert value.shape[1:] != shape or not torch.equal(value.affine, AFFINE)
        else:
            assert value.shape[1:] == shape and torch.equal(value.affine, AFFINE)


def places(affine, shape):
    """World coordinates of all voxels, ``(3, *shape)``."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"))
    return torch.tensordot(affine[:3, : len(shape)], index, 1) + affine[:3, -1].view(3, *[1] * len(shape))
