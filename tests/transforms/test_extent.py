from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medvit.errors import UnsuitableImage
from medvit.transforms.extent import RequireExtentd


def image(shape: tuple[int, ...], spacing: tuple[float, ...], turn: float = 0.0) -> MetaTensor:
    affine = np.diag([*spacing, 1.0])
    c, s = np.cos(turn), np.sin(turn)
    affine[:3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ affine[:3]
    return MetaTensor(torch.zeros(1, *shape), affine=torch.tensor(affine))


CHECK = RequireExtentd("image", [20, 30, 20], [60, 80, 60], "crop it first")


@pytest.mark.parametrize("turn", [0.0, 0.4])
def test_an_image_within_the_limits_passes_unchanged(turn: float) -> None:
    item = {"image": image((40, 25, 20), (1.0, 2.0, 3.0), turn), "case": "a"}  # 40 x 50 x 60 mm: the limit is within
    out = CHECK(item)
    assert out["image"] is item["image"] and out["case"] == "a"


@pytest.mark.parametrize(
    ("shape", "spacing", "found"),
    [
        ((181, 217, 181), (1, 1, 1), "181 × 217 × 181"),
        ((40, 50, 9), (1, 1, 2), "40 × 50 × 18"),
        ((40, 50, 1), (1, 1, 3), "40 × 50 × 3"),
    ],
)
def test_too_much_and_too_little_are_refused_with_what_was_found(shape, spacing, found) -> None:
    with pytest.raises(UnsuitableImage) as error:
        CHECK({"image": image(shape, spacing)})
    assert str(error.value) == (
        "the field of view must be 20-60 × 30-80 × 20-60 mm for this network, "
        f"but the image covers {found} mm; crop it first"
    )
    assert error.value.code == "unsuitable"
