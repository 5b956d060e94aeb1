import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Flipd

from medvit.errors import SpaceMismatch, UnsuitableImage
from medvit.transforms import ForegroundCropd
from medvit.transforms.foreground import otsu

AFFINE = torch.tensor([[0, -2.0, 0, 40], [1.5, 0, 0, -30], [0, 0, -4, 77], [0, 0, 0, 1]], dtype=torch.float64)


def body(shape=(20, 18, 12)) -> MetaTensor:
    """Air at -1000 with noise, and in voxels (5..11, 6..9, 3..7) a body at 50."""
    values = torch.full((1, *shape), -1000.0) + 20 * torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    values[0, 5:12, 6:10, 3:8] += 1050
    return MetaTensor(values, affine=AFFINE)


@pytest.mark.upstream
@pytest.mark.parametrize("seed", range(5))
def test_otsu_is_scikit_images(seed):
    from skimage.filters import threshold_otsu

    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.normal(0, 1 + seed, 500), rng.normal(6, 2, 100 * (seed + 1))])
    half = np.ptp(values) / 512  # theirs is the centre of a bin, ours its upper edge
    assert otsu(torch.from_numpy(values)) == pytest.approx(threshold_otsu(values) + half, rel=1e-12)
    with_holes = torch.from_numpy(np.append(values, [np.nan, np.inf]))
    assert otsu(with_holes) == otsu(torch.from_numpy(values))


def test_otsu_of_one_value_lets_nothing_pass():
    assert otsu(torch.ones(5)) == float("inf") and otsu(torch.full((3,), torch.nan)) == float("inf")


# spacing is 1.5, 2 and 4 mm
@pytest.mark.parametrize(
    ("margin", "box"),
    [
        (0, [(5, 12), (6, 10), (3, 8)]),
        (4, [(2, 15), (4, 12), (2, 9)]),
        (4.1, [(2, 15), (3, 13), (1, 10)]),
        ((1.5, 0, 8), [(4, 13), (6, 10), (1, 10)]),
        (1000, [(0, 20), (0, 18), (0, 12)]),
    ],
)
@pytest.mark.parametrize("threshold", [-500, "otsu"])
def test_the_box_and_its_margin_in_mm(margin, box, threshold):
    image = body()
    label = MetaTensor((image.as_tensor() > 0).to(torch.uint8), affine=AFFINE)
    out = ForegroundCropd(["image", "label"], "image", threshold, margin)({"image": image, "label": label})
    cut = (slice(None), *(slice(*ends) for ends in box))
    assert torch.equal(out["image"].as_tensor(), image.as_tensor()[cut])
    assert torch.equal(out["label"].as_tensor(), label.as_tensor()[cut]) and out["label"].dtype == torch.uint8
    first = torch.tensor([*(start for start, _ in box), 1]).double()
    torch.testing.assert_close(out["image"].affine[:, 3], AFFINE @ first, rtol=0, atol=1e-9)
    assert torch.equal(out["image"].affine[:3, :3], AFFINE[:3, :3])


def test_2d_plain_tensors_count_pixels():
    image = torch.zeros(2, 9, 9)
    image[1, 4, 5] = 1
    assert ForegroundCropd("x", "x", margin=2)({"x": image})["x"].shape == (2, 5, 5)


def test_inverse_and_lazy_in_a_compose():
    image = body()
    steps = Compose([ForegroundCropd("x", "x", "otsu", 4)])
    back = steps.inverse(steps({"x": image}))["x"]
    torch.testing.assert_close(back.affine, AFFINE, rtol=0, atol=1e-9)
    expected = torch.zeros_like(image.as_tensor())
    cut = (slice(None), slice(2, 15), slice(4, 12), slice(2, 9))
    expected[cut] = image.as_tensor()[cut]
    assert torch.equal(back.as_tensor(), expected)
    chain = [Flipd("x", 0), ForegroundCropd("x", "x", "otsu", 4), Flipd("x", 1)]
    eager, lazy = (Compose(chain, lazy=flag)({"x": image})["x"] for flag in (False, True))
    assert torch.equal(eager.as_tensor(), lazy.as_tensor())
    torch.testing.assert_close(eager.affine, lazy.affine, rtol=0, atol=1e-9)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"^threshold must be a number or 'otsu', got 'li'$"):
        ForegroundCropd("x", "x", "li")
    for margin in (-1, (0, float("nan"), 0)):
        with pytest.raises(ValueError, match=r"^margin must be no less than 0, got"):
            ForegroundCropd("x", "x", margin=margin)
    with pytest.raises(ValueError, match=r"^margin must be one number or 3 for 'x', got \(1, 2\)$"):
        ForegroundCropd("x", "x", -500, margin=(1, 2))({"x": body()})
    with pytest.raises(SpaceMismatch, match="cropped together"):
        ForegroundCropd("y", "x", -500)({"x": body(), "y": body((20, 18, 13))})
    with pytest.raises(UnsuitableImage, match=r"^'x' must have foreground, but no voxel is above 3000$"):
        ForegroundCropd("x", "x", 3000)({"x": body()})
    with pytest.raises(UnsuitableImage, match=r"no voxel is above inf$"):
        ForegroundCropd("x", "x", "otsu")({"x": torch.ones(1, 4, 4)})


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_labels_of_any_type_can_be_the_source(dtype):
    labels = MetaTensor((body().as_tensor() > -500).to(dtype), affine=AFFINE)
    out = ForegroundCropd("label", "label", threshold=0)({"label": labels})["label"]
    assert out.shape == (1, 7, 4, 5) and out.dtype == dtype
