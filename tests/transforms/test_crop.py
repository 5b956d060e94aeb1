"""Random boxes by their law, resized crops by their places, and the views of DINO."""

import math

import numpy as np
import pytest
import torch
from monai.data import DataLoader, Dataset, MetaTensor, list_data_collate
from monai.transforms import Compose, RandShiftIntensityd
from monai.utils import set_determinism
from scipy.stats import ks_2samp, kstest
from torch.nn import functional as F

from medvit.errors import SpaceMismatch
from medvit.transforms import MultiCropd, RandResizedCropd
from medvit.transforms.crop import RandomBox, _fitted


def places(affine, shape) -> torch.Tensor:
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"))
    return torch.tensordot(affine[:3, : len(shape)], index, 1) + affine[:3, -1].view(3, *[1] * len(shape))


AFFINE = torch.tensor([[0.1, -2.0, 0.3, 40], [1.5, 0.2, 0, -30], [0, 0.4, -4, 77], [0, 0, 0, 1]], dtype=torch.float64)


def located(shape) -> MetaTensor:
    return MetaTensor(places(AFFINE, shape), affine=AFFINE)


def off(image) -> torch.Tensor:
    return (image.as_tensor().double() - places(image.affine, image.shape[1:])).abs().amax(0)


def drawn(box, shape, n, seed=0) -> np.ndarray:
    """Sides and first voxels of n boxes, ``(n, 2, rank)``."""
    random = np.random.RandomState(seed)
    out = []
    for _ in range(n):
        lines = box.draw(random, shape)
        sides = [line.step * line.size for line in lines]
        out.append((sides, [line.start + 0.5 - line.step / 2 for line in lines]))
    return np.array(out)


@pytest.mark.upstream
def test_in_2d_the_law_is_torchvisions():
    from torchvision.transforms import RandomResizedCrop

    torch.manual_seed(0)
    shape, scale = (300, 400), (0.1, 0.4)  # every box fits, so that torchvision never has to try again
    golden = np.array(
        [RandomResizedCrop.get_params(torch.zeros(1, *shape), list(scale), [3 / 4, 4 / 3]) for _ in range(3000)]
    )
    ours = drawn(RandomBox((64, 64), scale, 4 / 3), shape, 3000)
    (h, w), (top, left) = ours[:, 0].T, ours[:, 1].T
    for mine, theirs in [
        (h * w, golden[:, 2] * golden[:, 3]),
        (h / w, golden[:, 2] / golden[:, 3]),
        (top / (shape[0] - h), golden[:, 0] / (shape[0] - golden[:, 2])),
        (left / (shape[1] - w), golden[:, 1] / (shape[1] - golden[:, 3])),
    ]:
        assert ks_2samp(mine, theirs).pvalue > 0.01


@pytest.mark.parametrize("size", [(64, 64, 64), (96, 96, 32)], ids=str)
def test_in_3d_the_volume_is_uniform_and_no_axis_is_favoured(size):
    shape, aspect = (900, 900, 900), 1.5
    boxes = drawn(RandomBox(size, (0.02, 0.1), aspect), shape, 3000)
    sides, first = boxes[:, 0], boxes[:, 1]
    assert kstest(sides.prod(1) / 900**3, "uniform", (0.02, 0.08)).pvalue > 0.01
    jitter = np.log(sides / size)
    jitter -= jitter.mean(1, keepdims=True)
    assert (np.ptp(jitter, axis=1) <= math.log(aspect) + 0.02).all()
    assert np.ptp(jitter, axis=1).max() > 0.95 * math.log(aspect)
    for a, b in [(0, 1), (1, 2)]:
        assert ks_2samp(jitter[:1500, a], jitter[1500:, b]).pvalue > 0.01
    assert (first >= -1e-9).all() and (first + sides <= np.array(shape) + 1e-9).all()
    assert kstest((first / (900 - sides)).ravel(), "uniform").pvalue > 0.01


def test_a_box_too_long_for_the_image_keeps_its_volume():
    assert _fitted([1, 1, 1], [10, 100, 100], 8000) == pytest.approx([10, 800**0.5, 800**0.5])
    assert _fitted([1, 4, 1], [10, 20, 50], 8000) == pytest.approx([10, 20, 40])
    assert _fitted([3, 1], [10, 10], 100) == pytest.approx([10, 10])
    assert _fitted([1, 2, 3], [9, 9, 9], 6) == pytest.approx([1, 2, 3])
    sides = drawn(RandomBox(32, (0.25, 0.25), 4 / 3), (24, 400, 300), 200)[:, 0]
    assert (sides[:, 0] == 24).all()
    assert sides.prod(1) / (24 * 400 * 300) == pytest.approx(0.25, abs=0.003)  # up to rounding to voxels


def test_the_whole_image_is_resized_as_torch_does():
    x = torch.rand(1, 40, 30)
    out = RandResizedCropd("x", (16, 12), scale=(1, 1), aspect=1, mode="cubic")({"x": x})["x"]
    golden = F.interpolate(x[None], (16, 12), mode="bicubic", antialias=True)[0]
    torch.testing.assert_close(out, golden, rtol=0, atol=1e-5)
    flat = RandResizedCropd("x", (16, 12, 1), scale=(1, 1), aspect=1, mode="cubic")({"x": x[..., None]})["x"]
    torch.testing.assert_close(flat[..., 0], golden, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(50, 61), (40, 33, 28)], ids=str)
def test_values_affine_and_labels_tell_of_the_same_places(shape):
    labels = torch.randint(0, 5, (1, *shape), dtype=torch.uint8)
    item = {"image": located(shape), "label": MetaTensor(labels, affine=AFFINE)}
    crop = RandResizedCropd(["image", "label"], 24, (0.05, 0.5), mode=["linear", "nearest"], antialias=False)
    for seed in range(5):
        out = crop.set_random_state(seed)(item)
        assert out["image"].shape[1:] == out["label"].shape[1:] == (24,) * len(shape)
        assert torch.equal(out["image"].affine, out["label"].affine) and out["label"].dtype == torch.uint8
        inside = (slice(1, -1),) * len(shape)  # where a face of the box is one of the image, outer points repeat it
        assert off(out["image"])[inside].max() < 1e-9
        # each label is that of the voxel in whose middle its affine puts it
        world = places(out["label"].affine, out["label"].shape[1:]).flatten(1)
        index = torch.linalg.pinv(AFFINE[:3, : len(shape)]) @ (world - AFFINE[:3, 3:])
        index = torch.floor(index + 0.5 + 1e-6).long().clamp(min=0)
        index = torch.minimum(index, torch.tensor(shape)[:, None] - 1)
        assert torch.equal(labels[0][tuple(index)], out["label"].as_tensor()[0].flatten())
    assert item["image"].shape[1:] == shape


def test_seeds_decide_alone_and_in_a_compose():
    item = {"x": torch.rand(1, 40, 40)}
    crop = RandResizedCropd("x", 8)
    first, second = (crop.set_random_state(seed)(item)["x"] for seed in (3, 4))
    assert torch.equal(crop.set_random_state(3)(item)["x"], first) and not torch.equal(first, second)
    assert not torch.equal(crop(item)["x"], crop(item)["x"])
    runs = []
    for _ in range(2):
        set_determinism(5)
        steps = Compose([RandResizedCropd("x", 8), MultiCropd("x", 6, 4, n_local=2)])
        runs.append([steps(item)[name] for name in ("x", "x_global_1", "x_local_1")])
    set_determinism(None)
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_inverse_and_lazy_in_a_compose():
    image = located((40, 33, 28))
    steps = Compose([RandResizedCropd("x", 30, (0.2, 0.6), antialias=False)])
    out = steps({"x": image})
    back = steps.inverse(out)["x"]
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, AFFINE, rtol=0, atol=1e-9)
    seen = back.as_tensor().abs().sum(0) > 0
    assert 0.1 < seen.double().mean() < 0.8  # elsewhere 0
    deep = -F.max_pool3d(-F.pad(seen[None].double(), (3,) * 6), 7, 1)[0] > 0  # borders repeat
    assert deep.any() and off(back)[deep].max() < 1e-9
    lazy = Compose([RandResizedCropd("x", 30, (0.2, 0.6), antialias=False)], lazy=True).set_random_state(1)
    eager = Compose([RandResizedCropd("x", 30, (0.2, 0.6), antialias=False)]).set_random_state(1)
    a, b = lazy({"x": image})["x"], eager({"x": image})["x"]
    torch.testing.assert_close(a.affine, b.affine, rtol=0, atol=1e-9)
    torch.testing.assert_close(a.as_tensor(), b.as_tensor().float(), rtol=0, atol=2e-3)


def test_views_have_keys_boxes_and_affines_of_their_own():
    image = located((60, 50))
    views = MultiCropd("x", 24, (8, 10), n_global=2, n_local=3, mode="linear", antialias=False)
    out = views.set_random_state(0)({"x": image, "case": 7})
    names = ["x_global_0", "x_global_1", "x_local_0", "x_local_1", "x_local_2"]
    assert list(out) == ["x", "case", *names] and out["x"] is image
    shares = []
    for name in names:
        assert out[name].shape == (3, *((24, 24) if "global" in name else (8, 10)))
        assert off(out[name])[1:-1, 1:-1].max() < 1e-9
        step = torch.linalg.pinv(AFFINE[:3, :2]) @ out[name].affine[:3, :2]
        shares.append((step.diagonal() * torch.tensor(out[name].shape[1:])).prod().item() / 3000)
    assert len(set(shares)) == 5
    # up to rounding to voxels
    assert all(0.3 < s <= 1 for s in shares[:2]) and all(0.04 < s < 0.34 for s in shares[2:])


def test_views_pass_on_to_dictionary_transforms_and_batches():
    steps = Compose(
        [
            MultiCropd(["x", "y"], 8, 4, n_local=1, mode=["cubic", "nearest"]),
            RandShiftIntensityd("x_global_0", 0.5, prob=1),
        ]
    )
    data = [{"x": located((20, 30 + i)), "y": MetaTensor(torch.ones(1, 20, 30 + i))} for i in range(2)]
    items = [{k: v for k, v in item.items() if k not in ("x", "y")} for item in map(steps.set_random_state(0), data)]
    batch = next(iter(DataLoader(Dataset(items), batch_size=2, collate_fn=list_data_collate)))
    assert batch["x_global_0"].shape == (2, 3, 8, 8) and batch["y_local_0"].shape == (2, 1, 4, 4)
    assert (batch["y_global_1"] == 1).all()


def test_what_makes_no_sense_is_refused():
    for scale in [(0, 1), (0.5, 0.4), (0.5, 1.1), (0.5,), (0.1, 0.2, 0.3)]:
        with pytest.raises(ValueError, match=r"^scale must be two shares of the volume in \(0, 1\], the lesser first"):
            RandResizedCropd("x", 8, scale=scale)
    for aspect in (0.75, float("nan")):
        with pytest.raises(ValueError, match=r"^aspect must be at least 1"):
            RandResizedCropd("x", 8, aspect=aspect)
    with pytest.raises(ValueError, match=r"^size must be at least 1 on every axis, got 0$"):
        RandResizedCropd("x", 0)
    with pytest.raises(ValueError, match=r"^size needs one int or 3 of them, got \(8, 8\)$"):
        RandResizedCropd("x", (8, 8))({"x": torch.zeros(1, 9, 9, 9)})
    with pytest.raises(SpaceMismatch, match="cropped together"):
        RandResizedCropd(["x", "y"], 8)({"x": torch.zeros(1, 9, 9), "y": torch.zeros(1, 9, 8)})
    with pytest.raises(SpaceMismatch, match="cropped together"):
        MultiCropd(["x", "y"], 8, 4)({"x": torch.zeros(1, 9, 9), "y": torch.zeros(1, 9, 8)})
    with pytest.raises(ValueError, match=r"^at least one global view and no less than 0 local ones, got 0 and 8$"):
        MultiCropd("x", 8, 4, n_global=0)
    for kind in (RandResizedCropd("x", 8), MultiCropd("x", 8, 4)):
        with pytest.raises(KeyError):
            kind({})
    for kind in (RandResizedCropd("x", 8, allow_missing_keys=True), MultiCropd("x", 8, 4, allow_missing_keys=True)):
        assert kind({}) == {}
