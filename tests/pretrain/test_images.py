import pytest
import torch
from torch.nn import functional as F

from medvit.pretrain.images import Augment, CachedImages, RandomViews, WholeView, crop, to_unit


def slow_crop(image, low, high, size):
    """One channel, pixel by pixel: linear interpolation between pixel centres, the border repeated."""
    out = torch.zeros(size)
    for place in torch.cartesian_prod(*map(torch.arange, size)).reshape(-1, len(size)).tolist():
        value, corners = 0.0, [()]
        at = [
            (lo + (hi - lo) * (p + 0.5) / n) * s - 0.5
            for p, n, s, lo, hi in zip(place, size, image.shape, low, high, strict=True)
        ]
        for _ in size:
            corners = [(*c, side) for c in corners for side in (0, 1)]
        for corner in corners:
            weight, index = 1.0, []
            for a, side, s in zip(at, corner, image.shape, strict=True):
                floor = torch.tensor(a).floor().item()
                weight *= a - floor if side else 1 - (a - floor)
                index.append(int(min(max(floor + side, 0), s - 1)))
            value += weight * image[tuple(index)].item()
        out[tuple(place)] = value
    return out


@pytest.mark.parametrize(("spatial", "size"), [((9, 7), (5, 6)), ((6, 5, 4), (3, 4, 5))])
def test_crops_interpolate_linearly(spatial, size):
    images = torch.rand(3, 2, *spatial)
    low, high = torch.rand(3, len(size)) * 0.4, 0.6 + torch.rand(3, len(size)) * 0.4
    low[1, 0], high[1, 0] = high[1, 0].clone(), low[1, 0].clone()  # a flip
    views = crop(images, low, high, size)
    for b in range(3):
        for c in range(2):
            expected = slow_crop(images[b, c], low[b].tolist(), high[b].tolist(), size)
            torch.testing.assert_close(views[b, c], expected, rtol=1e-4, atol=1e-4)


def test_one_slice_of_a_volume_is_cropped_as_the_image():
    image, low, high = torch.rand(2, 1, 8, 9), torch.tensor([[0.1, 0.2]] * 2), torch.tensor([[0.9, 0.7]] * 2)
    whole = F.pad(low, (1, 0)), F.pad(high, (1, 0), value=1.0)
    torch.testing.assert_close(crop(image[:, :, None], *whole, (1, 5, 6))[:, :, 0], crop(image, low, high, (5, 6)))


def test_the_whole_view_is_the_normalised_image():
    image = torch.randint(0, 256, (2, 1, 6, 6), dtype=torch.uint8)
    torch.testing.assert_close(WholeView(6, mean=0.4, std=0.2)(image), (image / 255 - 0.4) / 0.2)
    half = F.interpolate(image / 255, (3, 3), mode="area")
    torch.testing.assert_close(WholeView(3, mean=0.0, std=1.0)(image), half)


@pytest.mark.parametrize("rank", [2, 3])
def test_boxes_cover_the_fraction_and_lie_within(rank):
    low, high = RandomViews(8, scale=(0.2, 0.5), stretch=1.2).boxes(4000, rank)
    volume = (high - low).prod(1)
    assert (low >= 0).all() and (high <= 1 + 1e-6).all()
    assert 0.2 - 1e-6 <= volume.min() < 0.21 and 0.49 < volume.max() <= 0.5 + 1e-6
    assert volume.mean() == pytest.approx(0.35, abs=0.01)
    ratio = (high - low).amax(1) / (high - low).amin(1)
    assert 1.15 < ratio.max() <= 1.2 + 1e-5
    assert ((low + high) / 2).mean(0).tolist() == pytest.approx([0.5] * rank, abs=0.01)


def test_flips_happen_as_often_as_asked():
    ramp = torch.linspace(0, 1, 8).expand(2000, 1, 8, 8)
    views = RandomViews(8, scale=(1, 1), stretch=1, flips=(0.0, 0.25), mean=0, std=1)(ramp)
    turned = views[:, 0, 0, 0] > views[:, 0, 0, -1]
    assert turned.float().mean().item() == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(views[turned][0], ramp[0].flip(2))
    torch.testing.assert_close(views[~turned][0], ramp[0])


def test_contrast_and_brightness_stay_within_limits():
    image = torch.rand(500, 1, 8, 8) * 0.2 + 0.4
    views = RandomViews(8, scale=(1, 1), stretch=1, mean=0, std=1, contrast=0.3, brightness=0.1)(image)
    shift = (views.mean((1, 2, 3)) - image.mean((1, 2, 3))).abs()
    factor = views.std((1, 2, 3)) / image.std((1, 2, 3))
    assert 0.09 < shift.max() <= 0.1 + 1e-5
    assert 0.7 - 1e-4 <= factor.min() < 0.72 and 1.28 < factor.max() <= 1.3 + 1e-4


def test_augment_names_views_and_keeps_the_rest():
    batch = {"image": torch.rand(2, 1, 8, 8), "label": torch.tensor([0, 1])}
    made = Augment(
        {"image_global_0": RandomViews(8), "image_global_1": RandomViews(8), "image_local_0": RandomViews(4)}
    )(batch)
    assert {name: tuple(value.shape) for name, value in made.items()} == {
        "label": (2,),
        "image_global_0": (2, 1, 8, 8),
        "image_global_1": (2, 1, 8, 8),
        "image_local_0": (2, 1, 4, 4),
    }
    assert not torch.equal(made["image_global_0"], made["image_global_1"])
    turns = Augment({"image2d": WholeView(4, key="image2d"), "image3d": WholeView(4, key="image3d")})
    assert turns({"image3d": torch.rand(1, 1, 8, 8, 8)})["image3d"].shape == (1, 1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"one of \['image2d', 'image3d'\], got \['image'\]"):
        turns({"image": batch["image"]})


def test_each_image_is_decoded_once_and_kept_as_bytes():
    calls = []

    def transform(case):
        calls.append(case["image"])
        return {"image": torch.full((1, 2, 2), case["value"])}

    cases = [{"image": f"{i}.png", "value": i / 4, "label": i % 2} for i in range(5)]
    cached = CachedImages(cases, transform, labels="label", key="image2d")
    batch = cached.batch([4, 1])
    assert batch["image2d"].dtype == torch.uint8 and batch["image2d"][:, 0, 0, 0].tolist() == [255, 64]
    assert batch["label"].tolist() == [0, 1] and len(cached) == 5
    cached.batch([0])
    assert len(calls) == len(set(calls)) == 5
    torch.testing.assert_close(to_unit(batch["image2d"])[1], torch.full((1, 2, 2), 64 / 255))


def test_cases_without_a_label_are_told_before_anything_is_decoded():
    cases = [{"image": "a", "label": 1}, {"image": "b"}]
    with pytest.raises(ValueError, match="every case needs the label 'label', b has none"):
        CachedImages(cases, lambda case: 1 / 0, labels="label")


def test_a_view_of_the_middle():
    image = torch.arange(64.0).reshape(1, 1, 8, 8) / 64
    made = WholeView(4, mean=0.0, std=1.0, middle=0.5)(image)
    torch.testing.assert_close(made, image[..., 2:6, 2:6])
    with pytest.raises(ValueError, match=r"middle must be a fraction in \(0, 1\], got 1.5"):
        WholeView(4, middle=1.5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no cases to cache"),
        ([torch.zeros(1, 2, 2), torch.zeros(1, 2, 3)], r"one shape, b has \(1, 2, 3\) and the first one \(1, 2, 2\)"),
        ([torch.full((1, 2, 2), 200.0)], r"\[0, 1\], a has 200 to 200"),
        ([torch.full((1, 2, 2), torch.nan)], "a has nan to nan"),
    ],
)
def test_images_that_cannot_be_cached(images, message):
    cases = [{"image": name, "pixels": image} for name, image in zip("ab", images, strict=False)]
    with pytest.raises(ValueError, match=message):
        CachedImages(cases, lambda case: {"image": case["pixels"]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.6, 0.5)}, r"got \(0.6, 0.5\)"),
        ({"scale": (0, 1)}, "two fractions"),
        ({"stretch": 0.5}, "and 0.5;"),
    ],
)
def test_views_that_are_none(arguments, message):
    with pytest.raises(ValueError, match=message):
        RandomViews(8, **arguments)


def test_flips_of_another_rank():
    with pytest.raises(ValueError, match=r"each of 3 axes, got \(0.5, 0.5\)"):
        RandomViews(4, flips=(0.5, 0.5))(torch.rand(1, 1, 8, 8, 8))
