from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from medvit.errors import UnsuitableImage
from medvit.transforms.extent import RequireChannelsd, RequireExtentd


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


def test_limits_of_a_photograph_are_pixels() -> None:
    photograph = image((700, 450, 1), (1, 1, 1))
    photograph.meta["medvit_unit"] = "px"
    check = RequireExtentd("image", [256, 256, 1], [4000, 4000, 1], "resize it")
    assert check({"image": photograph})["image"] is photograph
    photograph = photograph[:, :100]
    with pytest.raises(UnsuitableImage, match=r"256-4000 × 256-4000 × 1-1 px .* covers 100 × 450 × 1 px; resize it"):
        check({"image": photograph})


def test_channels_must_be_those_of_the_network() -> None:
    check = RequireChannelsd("image", 3, "give it in colour")
    item = {"image": torch.zeros(3, 8, 8, 1), "case": "a"}
    assert check(item)["image"] is item["image"]
    for channels in (1, 4):
        with pytest.raises(UnsuitableImage) as error:
            check({"image": torch.zeros(channels, 8, 8, 1)})
        assert str(error.value) == (
            f"this network takes images of 3 channels, but this one has {channels}; give it in colour"
        )
        assert error.value.code == "unsuitable"
    with pytest.raises(KeyError):
        check({})
    assert RequireChannelsd("image", 3, "", allow_missing_keys=True)({}) == {}
