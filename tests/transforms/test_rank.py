import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor
from monai.transforms import Compose, Flipd, RandGaussianNoised, ScaleIntensityRanged
from monai.utils import set_determinism

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


def test_random_transforms_in_it_follow_the_seed_and_differ_by_epoch_and_worker():
    def noise():
        return ByRankd("image", {2: RandGaussianNoised("image", prob=1.0), 3: plus(1)})

    def drawn(workers):
        set_determinism(3)
        try:
            data = Dataset([{"image": torch.zeros(1, 2, 2)} for _ in range(4)], Compose([noise()]))
            loader = DataLoader(data, batch_size=1, num_workers=workers)
            return [float(batch["image"].sum()) for _ in range(2) for batch in loader]
        finally:
            set_determinism(None)

    for workers in (0, 2):
        first = drawn(workers)
        assert first == drawn(workers) and len(set(first)) == 8
    seeded = [noise().set_random_state(5)({"image": torch.zeros(1, 2, 2)})["image"] for _ in range(2)]
    assert torch.equal(*seeded)


def test_it_is_undone_by_the_transform_of_the_rank():
    image = MetaTensor(torch.arange(24.0).reshape(1, 4, 6))
    both = Compose([ByRankd("image", {2: Flipd("image", 1), 3: plus(1)})])
    made = both({"image": image})
    assert not torch.equal(made["image"], image) and torch.equal(both.inverse(made)["image"], image)
