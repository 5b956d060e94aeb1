from __future__ import annotations

import pytest
import torch
from monai.inferers import SimpleInferer

from medvit.inference.mirror import Mirror


def lopsided(x: torch.Tensor) -> torch.Tensor:
    """A network that is not symmetric: each voxel plus its position along every axis."""
    for axis in range(2, x.dim()):
        ramp = torch.arange(x.shape[axis], dtype=x.dtype) * 10.0 ** (axis - 2)
        x = x + ramp.reshape([-1 if a == axis else 1 for a in range(x.dim())])
    return x


@pytest.mark.parametrize("shape", [(1, 2, 5, 4), (2, 1, 3, 4, 5)])
@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 1)])
def test_the_mean_over_mirror_images_has_a_known_answer(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    image = torch.randn(shape, dtype=torch.float64)
    expected = lopsided(image)
    for axis in axes:  # a ramp and its mirror image average to the ramp's middle
        n, step = shape[2 + axis], 10.0**axis
        ramp = (torch.arange(n, dtype=torch.float64) * step).reshape(
            [-1 if a == 2 + axis else 1 for a in range(len(shape))]
        )
        expected = expected - ramp + step * (n - 1) / 2
    torch.testing.assert_close(Mirror(SimpleInferer(), axes)(image, lopsided), expected)


def test_the_result_is_symmetric_whatever_the_network() -> None:
    image = torch.randn(1, 1, 6, 5, 4)
    mirror = Mirror(SimpleInferer(), [0])
    torch.testing.assert_close(mirror(image.flip(2), lopsided), mirror(image, lopsided).flip(2))


def test_each_combination_of_axes_is_run_once() -> None:
    calls: list[int] = []

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x

    Mirror(SimpleInferer(), [0, 1, 2])(torch.zeros(1, 1, 2, 2, 2), counting)
    assert len(calls) == 8


@pytest.mark.parametrize("axes", [[0, 0], [-1]])
def test_axes_that_make_no_sense_are_refused(axes: list[int]) -> None:
    with pytest.raises(ValueError, match="different spatial axes, counted from 0, got"):
        Mirror(SimpleInferer(), axes)


def test_an_axis_that_the_image_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"must have every axis to mirror, \(2,\), got shape \(1, 1, 4, 4\)"):
        Mirror(SimpleInferer(), [2])(torch.zeros(1, 1, 4, 4), lopsided)
