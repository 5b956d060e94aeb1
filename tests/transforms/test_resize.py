"""Resizing by the longest side: sizes, values on a ramp, and the way back to the source."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medvit.transforms.resize import ResizeLongestSided
from medvit.transforms.restore import RestoreLabelsd


def resized(image, size):
    return ResizeLongestSided("image", size)({"image": image})["image"]


@pytest.mark.parametrize(
    ("sides", "size", "expected"),
    [
        ((30, 20, 1), 60, (60, 40, 1)),
        ((20, 31, 1), 16, (10, 16, 1)),
        ((7, 1, 100), 50, (4, 1, 50)),
        ((3, 100), 10, (1, 10)),
        ((5, 8, 4), 8, (5, 8, 4)),
        ((9,), 5, (5,)),
    ],
)
def test_the_longest_side_gets_the_length_and_flat_axes_stay(sides, size, expected):
    assert resized(torch.rand(3, *sides), size).shape == (3, *expected)


@pytest.mark.parametrize("size", [15, 60, 97])
def test_values_and_affine_tell_of_the_same_places(size):
    affine = torch.tensor([[0.0, -1, 0, 19], [1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=torch.float64)
    x, y = torch.meshgrid(torch.arange(30.0), torch.arange(20.0), indexing="ij")
    world = torch.stack([19 - y, x])[..., None]  # each pixel holds its own place
    out = resized(MetaTensor(world, affine=affine), size)
    index = torch.stack(torch.meshgrid(*[torch.arange(float(n)) for n in out.shape[1:]], indexing="ij"))
    place = (
        torch.einsum("ij,jxyz->ixyz", out.affine[:2, :3].float(), index) + out.affine[:2, 3, None, None, None].float()
    )
    inner = (slice(None), slice(4, -4), slice(4, -4))  # borders are clamped
    torch.testing.assert_close(out.as_tensor()[inner], place[inner], rtol=0, atol=0.02)


def test_labels_of_the_resized_image_come_back_to_the_source():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.integers(0, 2, (1, 30, 20, 1))).float()
    meta = {"original_affine": np.eye(4), "spatial_shape": np.array((30, 20, 1)), "medvit_unit": "px"}
    image = MetaTensor(labels, affine=torch.eye(4, dtype=torch.float64), meta=meta)
    large = resized(image, 90)
    restored = RestoreLabelsd("pred")({"image": large, "pred": (large > 0.5).as_tensor().to(torch.uint8)})["pred"]
    assert torch.equal(restored.as_tensor().float(), labels)


def test_a_size_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"^size must be at least 1, got 0$"):
        ResizeLongestSided("image", 0)
