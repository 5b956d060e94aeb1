import pytest
import torch
from monai.transforms import Compose, ScaleIntensityRanged

from medvit.errors import UnsuitableImage
from medvit.transforms import ByRankd


def plus(number):
    return Compose([ScaleIntensityRanged("image", 0, 1, number, number + 1)])


@pytest.mark.parametrize("ranks", [(2, 3), ("2", "3")])
def test_the_rank_chooses(ranks):
    transform = ByRankd("image", dict(zip(ranks, (plus(1), plus(2)), strict=True)))
    for rank, number in ((2, 1.0), (3, 2.0)):
        item = {"image": torch.zeros(1, *[4] * rank), "case": "x"}
        out = transform(item)
        assert out["case"] == "x" and out["image"].shape == item["image"].shape
        assert out["image"].unique().tolist() == [number] and not item["image"].any()


def test_another_rank_is_refused_and_so_are_several():
    transform = ByRankd(["image", "label"], {"2": plus(1), "3": plus(2)}, allow_missing_keys=True)
    with pytest.raises(UnsuitableImage, match=r"images must have 2 or 3 spatial axes, .*, but here are 1;"):
        transform({"image": torch.zeros(1, 4)})
    with pytest.raises(UnsuitableImage, match="but here are 2 or 3;"):
        transform({"image": torch.zeros(1, 4, 4), "label": torch.zeros(1, 4, 4, 4)})
    assert transform({"other": 1}) == {"other": 1}
    with pytest.raises(KeyError):
        ByRankd("image", {"2": plus(1)})({})
