import pytest
import torch
from skimage import data

from medvit.pretrain.images import RandomViews
from medvit.pretrain.randaugment import RandAugment
from medvit.pretrain.stream import seed_everything


def photograph(channels, count=6):
    """Copies of one real photograph, ``(count, channels, 64, 64)`` in [0, 1]."""
    pixels = torch.from_numpy(data.astronaut()[128:192, 192:256]).movedim(-1, 0) / 255
    return (pixels if channels == 3 else pixels.mean(0, keepdim=True)).expand(count, -1, -1, -1)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_change_each_in_its_way_and_stay_images(channels):
    views = photograph(channels)
    seed_everything(1)
    out = RandAugment()(views)
    assert out.shape == views.shape and out.dtype == torch.float32
    assert out.min() >= 0 and out.max() <= 1
    assert len({image.numpy().tobytes() for image in out}) > 3
    for image, original in zip(out, views, strict=True):  # still a picture of the same thing, mostly
        assert (image - original).abs().mean() < 0.6


def test_the_seed_of_the_batch_decides():
    views, augment = photograph(1), RandAugment()
    made = []
    for seed in (3, 4, 3):
        seed_everything(seed)
        made.append(augment(views))
    assert torch.equal(made[0], made[2]) and not torch.equal(made[0], made[1])


def test_operations_are_timms():
    turn = RandAugment("rand-m9-mstd3-n1-inc1", fill=0.25)
    seed_everything(0)
    outs = torch.cat([turn(photograph(1)) for _ in range(30)])
    inverted = 1 - photograph(1)[0]
    assert any(torch.allclose(image, inverted, atol=2 / 255) for image in outs)  # one of its operations, alone
    corners = torch.stack([image[0, 0, 0] for image in outs])
    assert (corners == 64 / 255).any()  # turned or shifted in from outside


def test_views_are_augmented_before_they_are_normalised():
    images = torch.randint(0, 256, (4, 1, 32, 32), dtype=torch.uint8)
    seen = []

    def darker(views):
        seen.append(views)
        return views / 2

    torch.manual_seed(0)
    plain = RandomViews(16, mean=0.25, std=0.5)(images)
    torch.manual_seed(0)
    made = RandomViews(16, mean=0.25, std=0.5, augment=darker)(images)
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    torch.testing.assert_close(made * 0.5 + 0.25, (plain * 0.5 + 0.25) / 2)


def test_refusals():
    for shape in ((2, 1, 8, 8, 8), (2, 2, 8, 8)):
        with pytest.raises(ValueError, match=r"needs images \(B, 1 or 3, rows, columns\), got shape"):
            RandAugment()(torch.zeros(shape))
    for policy in ("augmix-m3", "rand-mm", "rand-m10-inc1", "rand-m6"):
        with pytest.raises(ValueError, match=f"m0 to m9 and inc1, got '{policy}'"):
            RandAugment(policy)
