"""Spacing on an exact lattice: places, corners, whole ratios, the way back; and MONAI's own where it does the same."""

import nibabel
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, Orientationd, Spacingd

from medvit.transforms import Respaced


def rotated(spacing, angle=0.5) -> torch.Tensor:
    c, s = np.cos(angle), np.sin(angle)
    turn = np.array([[c, -s, 0], [s * 0.6, c * 0.6, -0.8], [s * 0.8, c * 0.8, 0.6]])
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = turn * spacing, (-71.3, 20.9, 1234.5)
    return torch.tensor(affine)


def places(affine, shape) -> torch.Tensor:
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"))
    return torch.tensordot(affine[:3, : len(shape)], index, 1) + affine[:3, -1].view(3, *[1] * len(shape))


def located(shape, affine) -> MetaTensor:
    return MetaTensor(places(affine, shape), affine=affine)


def spacing_of(image) -> torch.Tensor:
    return image.affine[:3, :3].norm(dim=0)


def respaced(image, spacing, **kwargs):
    return Respaced("x", spacing, **kwargs)({"x": image})["x"]


@pytest.mark.parametrize("anchor", ["centre", "face"])
@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.31, 2.9, 5.0), (1.4, 0.35, 2.5), 0.83], ids=str)
def test_values_affine_and_spacing_agree(anchor, antialias, spacing):
    image = located((23, 30, 14), rotated((0.7, 0.7, 2.5)))
    out = respaced(image, spacing, anchor=anchor, antialias=antialias)
    wanted = torch.tensor(spacing, dtype=torch.float64).expand(3)
    torch.testing.assert_close(spacing_of(out), wanted, rtol=0, atol=1e-9)
    inner = tuple(slice(int(np.ceil(s / w)) + 9, -int(np.ceil(s / w)) - 9) if w < s else slice(2, -2)
                  for s, w in zip((0.7, 0.7, 2.5), wanted.tolist(), strict=True))  # fmt: skip
    error = (out.as_tensor() - places(out.affine, out.shape[1:])).abs()[(slice(None), *inner)]
    # a widened kernel, sampled at voxels, has its centre where it should only nearly
    assert error.numel() and error.max() < (0.1 * wanted.max() if antialias else 1e-9)
    corner = torch.tensor([0.0, 0, 0, 1] if anchor == "centre" else [-0.5, -0.5, -0.5, 1]).double()
    torch.testing.assert_close(out.affine @ corner, image.affine @ corner, rtol=0, atol=1e-9)
    last = torch.tensor([*(n - (1 if anchor == "centre" else 0.5) for n in out.shape[1:]), 1]).double()
    reached = torch.linalg.inv(image.affine) @ out.affine @ last  # in voxels of the source
    end = torch.tensor([22.0, 29, 13] if anchor == "centre" else [22.5, 29.5, 13.5]).double()
    short = (end - reached[:3]) / (wanted / torch.tensor([0.7, 0.7, 2.5]).double())  # in new voxels
    low, high = (0, 1) if anchor == "centre" else (-0.5, 0.5)
    assert (short >= low - 1e-9).all() and (short <= high + 1e-9).all()


@pytest.mark.parametrize("k", [(2, 2, 2), (3, 1, 5), (49, 1, 1)], ids=str)
@pytest.mark.parametrize("mode", ["linear", "cubic", "nearest"])
@pytest.mark.parametrize("anchor", ["centre", "face"])
def test_finer_by_whole_factors_and_back_is_where_it_was(k, mode, anchor):
    spacing = np.array((0.7, 0.7, 2.5))
    generator = torch.Generator().manual_seed(0)
    image = MetaTensor(torch.randn(1, 4, 5, 3, generator=generator), affine=rotated(spacing))
    fine = respaced(image, tuple(spacing / k), mode=mode, anchor=anchor)
    sides = [(n - 1) * f + 1 if anchor == "centre" else n * f for n, f in zip((4, 5, 3), k, strict=True)]
    assert fine.shape[1:] == tuple(sides)
    back = respaced(fine, tuple(spacing), mode=mode, anchor=anchor)
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, image.affine, rtol=0, atol=1e-9)
    if anchor == "centre":
        assert torch.equal(fine.as_tensor()[:, :: k[0], :: k[1], :: k[2]], image.as_tensor())
        assert torch.equal(back.as_tensor(), image.as_tensor())
    elif mode == "nearest":
        assert torch.equal(back.as_tensor(), image.as_tensor())


def test_coarser_by_whole_factors_is_every_kth_voxel():
    image = MetaTensor(torch.randn(1, 13, 10, 7), affine=rotated((1.0, 1.0, 2.0)))
    out = respaced(image, (3.0, 2.0, 2.0), mode="cubic")
    assert torch.equal(out.as_tensor(), image.as_tensor()[:, ::3, ::2])
    smooth = respaced(image, (3.0, 2.0, 2.0), mode="cubic", antialias=True)
    assert smooth.shape == out.shape and smooth.std() < 0.7 * out.std()


def test_spacings_rounded_by_a_header_are_whole_all_the_same():
    header = float(np.float32(0.3))  # 0.30000001192...
    image = MetaTensor(torch.randn(1, 1001, 3), affine=torch.diag(torch.tensor([header, 1, 1, 1]).double()))
    out = respaced(image, (1.5, 1.0))
    assert torch.equal(out.as_tensor(), image.as_tensor()[:, ::5])
    assert out.affine[0, 0].item() == header * 5  # what it is, not what was asked
    back = respaced(out, (0.3, 0))
    assert back.shape == image.shape and torch.equal(back.as_tensor()[:, ::5], out.as_tensor())
    assert not torch.equal(respaced(image, (1.50003, 1.0)).as_tensor(), out.as_tensor())


@pytest.mark.upstream
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.4, 3.1)], ids=str)
def test_centre_without_smoothing_is_monais_spacing(spacing):
    image = MetaTensor(
        torch.rand(1, 12, 15, 9, generator=torch.Generator().manual_seed(0)), affine=rotated((0.7, 0.9, 2.0))
    )
    ours = respaced(image, spacing)
    theirs = Spacingd("x", spacing)({"x": image})["x"]
    torch.testing.assert_close(ours.affine, theirs.affine, rtol=0, atol=1e-9)
    common = tuple(slice(0, min(a, b)) for a, b in zip(ours.shape, theirs.shape, strict=True))
    assert all(0 <= b - a <= 1 for a, b in zip(ours.shape, theirs.shape, strict=True))  # MONAI rounds up from a half
    torch.testing.assert_close(ours.as_tensor()[common], theirs.as_tensor()[common], rtol=0, atol=1e-5)


def test_several_keys_each_by_its_own_affine_and_mode():
    labels = torch.randint(0, 9, (1, 8, 8, 8), dtype=torch.uint8)
    item = {"image": located((20, 20, 20), rotated((1, 1, 1))), "label": MetaTensor(labels, affine=rotated((2, 2, 2)))}
    out = Respaced(["image", "label", "none"], 1.0, mode=["linear", "nearest", "linear"], allow_missing_keys=True)(item)
    assert out["image"].shape == (3, 20, 20, 20) and out["label"].shape == (1, 15, 15, 15)
    assert out["label"].dtype == torch.uint8 and item["label"].shape == (1, 8, 8, 8)


def test_inverse_and_lazy_in_a_compose():
    image = located((20, 18, 12), rotated((1.0, 1.0, 2.0)))
    steps = Compose([Respaced("x", (1.4, 0.6, 1.0), anchor="face")])
    out = steps({"x": image})
    back = steps.inverse(out)["x"]
    assert back.shape == image.shape
    torch.testing.assert_close(back.affine, image.affine, rtol=0, atol=1e-9)
    inner = (slice(None), slice(3, -3), slice(3, -3), slice(3, -3))
    torch.testing.assert_close(back.as_tensor()[inner], image.as_tensor()[inner], rtol=0, atol=1e-9)
    chain = [Orientationd("x", "RAS", labels=None), Respaced("x", (1.4, 0.6, 1.0), anchor="face"), Respaced("x", 1.3)]
    eager, lazy = (Compose(chain, lazy=flag)({"x": image})["x"] for flag in (False, True))
    assert not lazy.pending_operations and lazy.shape == eager.shape
    torch.testing.assert_close(lazy.affine, eager.affine, rtol=0, atol=1e-9)
    inner = (slice(None), slice(3, -3), slice(3, -3), slice(3, -3))
    torch.testing.assert_close(lazy.as_tensor()[inner], eager.as_tensor()[inner].float(), rtol=0, atol=2e-3)


@pytest.mark.upstream
@pytest.mark.parametrize("codes", ["RAS", "LPS", "SAR", "AIL"])
def test_monais_orientation_is_exact_so_there_is_none_of_ours(codes):
    image = located((7, 6, 5), rotated((0.7, 0.9, 2.0)))
    out = Orientationd("x", codes, labels=None)({"x": image})["x"]
    assert "".join(nibabel.aff2axcodes(out.affine.numpy())) == codes
    torch.testing.assert_close(out.as_tensor().double(), places(out.affine, out.shape[1:]), rtol=0, atol=1e-9)


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match=r"^anchor must be one of centre, face, got 'corner'$"):
        Respaced("x", 1.0, anchor="corner")
    for spacing in (-1.0, (1, float("nan"), 1)):
        with pytest.raises(ValueError, match=r"^spacing must be positive, or 0 to leave an axis as it is, got"):
            Respaced("x", spacing)
    with pytest.raises(ValueError, match=r"^spacing must be one number or 3 for 'x', got \(1.0, 1.0\)$"):
        respaced(located((4, 4, 4), rotated((1, 1, 1))), (1.0, 1.0))
    with pytest.raises(TypeError, match=r"^'x' must be a MetaTensor that knows its spacing, got Tensor$"):
        respaced(torch.zeros(1, 4, 4, 4), 1.0)
    with pytest.raises(KeyError):
        Respaced("x", 1.0)({})
