from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from monai.inferers import SimpleInferer

from medvit.inference.crops import MeanOverCrops
from medvit.pretrain.images import WholeView

SHAPES = [(2, 1, 12, 9), (3, 2, 7, 10, 8)]


def told(x: torch.Tensor) -> torch.Tensor:
    """A network that is neither linear nor symmetric."""
    ramp = torch.linspace(-1, 1, x[0, 0].numel(), dtype=x.dtype).reshape(x.shape[2:])
    return torch.stack([(x.square() * ramp).sum(1).flatten(1).sum(1), x.flatten(1).amax(1)], 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_crops_are_those_that_the_views_of_training_make(shape: tuple[int, ...]) -> None:
    image = torch.rand(shape)
    views = [WholeView(6, mean=0.0, std=1.0, middle=fraction)(image) for fraction in (1.0, 0.8, 0.55)]
    expected = torch.stack([told(view) for view in views]).mean(0)
    found = MeanOverCrops(SimpleInferer(), 6, fractions=[1.0, 0.8, 0.55])(image, told)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, told(views[0]), rtol=1e-2)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)])
def test_every_crop_is_mirrored_along_the_axes(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    image, one = torch.rand(shape, dtype=torch.float64), MeanOverCrops(SimpleInferer(), 6, fractions=[1.0, 0.8])
    images = [image]
    for axis in axes:
        images += [seen.flip(2 + axis) for seen in images]
    expected = torch.stack([one(seen, told) for seen in images]).mean(0)
    found = MeanOverCrops(SimpleInferer(), 6, fractions=[1.0, 0.8], mirror_axes=axes)
    torch.testing.assert_close(found(image, told), expected)
    torch.testing.assert_close(found(image.flip(2 + axes[0]), told), expected)
    assert not torch.allclose(one(image, told), expected, rtol=1e-3)


def test_the_whole_of_an_image_of_the_networks_size_is_the_image() -> None:
    image = torch.rand(2, 1, 5, 7, dtype=torch.float64)
    torch.testing.assert_close(MeanOverCrops(SimpleInferer(), (5, 7), fractions=[1.0])(image, told), told(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_half_precision_moves_no_pixel(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    image = torch.rand(shape).to(dtype)

    def seen(x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)

    exact = MeanOverCrops(SimpleInferer(), 6, fractions=[0.9, 0.8])(image.double(), seen)
    found = MeanOverCrops(SimpleInferer(), 6, fractions=[0.9, 0.8])(image, seen)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, atol=torch.finfo(dtype).eps, rtol=0)


def test_autocast_moves_no_pixel() -> None:
    image, crops = torch.rand(1, 1, 128, 128), MeanOverCrops(SimpleInferer(), 96)
    with torch.autocast("cpu", torch.bfloat16):
        found = crops(image, lambda x: x.flatten(1))
    torch.testing.assert_close(found, crops(image, lambda x: x.flatten(1)))


def test_a_single_view_may_be_of_maps() -> None:
    image = torch.rand(1, 1, 6, 8)
    found = MeanOverCrops(SimpleInferer(), (6, 8), fractions=[1.0])(image, lambda x: x * 2)
    torch.testing.assert_close(found, image * 2)


def test_it_runs_another_inferer() -> None:
    def other(inputs: torch.Tensor, network: object, factor: float) -> torch.Tensor:
        return told(inputs) * factor

    image = torch.rand(2, 1, 6, 6)
    expected = MeanOverCrops(SimpleInferer(), 6)(image, told) * 3
    torch.testing.assert_close(MeanOverCrops(other, 6)(image, told, 3.0), expected)


@pytest.mark.parametrize("fractions", [[], [0.0], [1.0, 1.1], [float("nan")], 0.9])
def test_fractions_that_make_no_sense_are_refused(fractions: list[float]) -> None:
    with pytest.raises(ValueError, match=r"fractions must be a list of numbers in \(0, 1\], got"):
        MeanOverCrops(SimpleInferer(), 6, fractions=fractions)


@pytest.mark.parametrize("axes", [[0, 0], [-1], 1])
def test_axes_that_make_no_sense_are_refused(axes: list[int]) -> None:
    with pytest.raises(ValueError, match="mirror_axes must be a list of different spatial axes, counted from 0, got"):
        MeanOverCrops(SimpleInferer(), 6, mirror_axes=axes)


def test_an_axis_that_the_image_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have every axis to mirror, \(2,\), got \(1, 1, 4, 4\)"):
        MeanOverCrops(SimpleInferer(), 4, mirror_axes=[2])(torch.zeros(1, 1, 4, 4), told)


@pytest.mark.parametrize(
    ("said", "got"), [(lambda x: x, r"shape \(1, 1, 4, 4\)"), (lambda x: [x], "list")], ids=["map", "list of maps"]
)
def test_means_of_maps_are_refused(said: Callable[[torch.Tensor], torch.Tensor], got: str) -> None:
    sought = rf"a vector per image, \(B, K\), got {got}; run maps on the whole image, with fractions \[1.0\]"
    with pytest.raises(ValueError, match=sought):
        MeanOverCrops(SimpleInferer(), 4)(torch.zeros(1, 1, 4, 4), said)


@pytest.mark.parametrize("image", [torch.zeros(1, 1, 4), torch.zeros(1, 1, 4, 4, dtype=torch.uint8)])
def test_what_is_no_image_is_refused(image: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must be \(B, C, \*spatial\) in 2D or 3D, of floating numbers, got"):
        MeanOverCrops(SimpleInferer(), 4)(image, told)
