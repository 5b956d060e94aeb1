"""Separable resampling against torch's and scipy's, and the geometry of its array transform."""

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms.lazy.functional import apply_pending
from scipy.ndimage import map_coordinates
from torch.nn import functional as F

from medvit.errors import SpaceMismatch
from medvit.transforms.lattice import LatticeResample, Line, common_sides, modes_of, resample

AFFINE = torch.tensor([[0.1, -2.0, 0.3, 40], [1.5, 0.2, 0, -30], [0, 0.4, -4, 77], [0, 0, 0, 1]], dtype=torch.float64)


def resized(n: int, size: int) -> Line:
    """The faces of the image stay where they are."""
    return Line((n / size - 1) / 2, n / size, size)


def places(affine, shape) -> torch.Tensor:
    """World position of each voxel, ``(3, *shape)`` float64, of a 2D or 3D grid."""
    index = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float64) for n in shape], indexing="ij"))
    return torch.tensordot(affine[:3, : len(shape)], index, 1) + affine[:3, -1].view(3, *[1] * len(shape))


def located(shape, affine=AFFINE) -> MetaTensor:
    return MetaTensor(places(affine, shape), affine=affine)


def off(image) -> torch.Tensor:
    """How far each voxel of a (resampled) image of :func:`located` is from where its affine says."""
    return (image.as_tensor().double() - places(image.affine, image.shape[1:])).abs().amax(0)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("size", [(7, 9), (40, 31), (5, 60), (13, 17), (1, 2)], ids=str)
def test_antialiased_is_torchs_in_2d(mode, size):
    x = torch.rand(2, 23, 17, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    golden = F.interpolate(x[None], size, mode=f"bi{mode}", antialias=True, align_corners=False)[0]
    lines = [resized(n, s) for n, s in zip(x.shape[1:], size, strict=True)]
    torch.testing.assert_close(resample(x, lines, mode, antialias=True), golden, rtol=0, atol=1e-12)
    single = resample(x.float(), lines, mode, antialias=True)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, golden.float(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["linear", "cubic"])
def test_antialiased_in_3d_is_2d_axis_by_axis(mode):
    x = torch.rand(1, 12, 20, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    size = (5, 26, 4)
    golden = F.interpolate(x, (26, 4), mode=f"bi{mode}", antialias=True)  # the first axis as channels
    golden = F.interpolate(golden.permute(0, 2, 1, 3), (5, 4), mode=f"bi{mode}", antialias=True).permute(0, 2, 1, 3)
    lines = [resized(n, s) for n, s in zip(x.shape[1:], size, strict=True)]
    torch.testing.assert_close(resample(x, lines, mode, antialias=True), golden, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_linear_at_any_points_is_scipys(rank):
    rng = np.random.default_rng(rank)
    shape = (11, 8, 6)[:rank]
    x = torch.from_numpy(rng.normal(size=shape))
    lines = [Line(rng.uniform(-3, 2), rng.uniform(0.1, 2.5), 7 + axis) for axis in range(rank)]
    points = np.meshgrid(*[line.start + line.step * np.arange(line.size) for line in lines], indexing="ij")
    golden = map_coordinates(x.numpy(), points, order=1, mode="nearest")
    ours = resample(x[None], lines, "linear", antialias=False)[0]
    np.testing.assert_allclose(ours, golden, rtol=0, atol=1e-12)
    inside = np.logical_and.reduce([(p >= -0.5) & (p <= n - 0.5) for p, n in zip(points, shape, strict=True)])
    cut = resample(x[None], lines, "linear", antialias=False, outside=False)[0]
    np.testing.assert_allclose(cut, np.where(inside, golden, 0), rtol=0, atol=1e-12)
    assert rank == 1 or 0 < inside.mean() < 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.bool, torch.float16])
@pytest.mark.parametrize("antialias", [False, True])
def test_nearest_is_torchs_and_keeps_the_type(dtype, antialias):
    x = torch.randint(0, 2 if dtype == torch.bool else 100, (1, 12, 9, 7), generator=torch.Generator().manual_seed(2))
    for size in [(6, 3, 20), (24, 10, 7), (5, 9, 1)]:
        golden = F.interpolate(x[None].double(), size, mode="nearest-exact")[0]
        lines = [resized(n, s) for n, s in zip(x.shape[1:], size, strict=True)]
        ours = resample(x.to(dtype), lines, "nearest", antialias=antialias)
        assert ours.dtype == dtype and torch.equal(ours.double(), golden)


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("k", [2, 3, 49, 107])
def test_a_point_on_a_voxel_has_its_value_bit_for_bit(mode, k):
    x = torch.randn(1, 6, 5, generator=torch.Generator().manual_seed(k))
    fine = resample(x, [Line(0, 1 / k, 5 * k + 1), Line(0, 1, 5)], mode, antialias=True)
    assert torch.equal(fine[:, ::k], x)
    assert torch.equal(resample(fine, [Line(0, k, 6), Line(0, 1, 5)], mode, antialias=False), x)


def test_a_volume_one_voxel_thick_is_a_picture():
    x = torch.rand(2, 9, 14)
    lines = [Line(0.3, 1.7, 5), Line(-1, 0.4, 30)]
    for mode in ("nearest", "linear", "cubic"):
        flat = resample(x[:, None], [Line(0, 1, 1), *lines], mode, antialias=True)
        assert torch.equal(flat[:, 0], resample(x, lines, mode, antialias=True))


def test_it_hands_out_memory_of_its_own():
    x = torch.rand(1, 4, 4)
    out = resample(x, [Line(0, 1, 4)] * 2, "linear", antialias=True)
    assert torch.equal(out, x) and out.data_ptr() != x.data_ptr()


LINES = [Line(2.25, 1.3, 9), Line(1.0, 0.6, 14), Line(3.5, 2.0, 5)]


@pytest.mark.parametrize("mode", ["linear", "cubic"])
@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("antialias", [False, True])
def test_values_and_affine_tell_of_the_same_places(mode, rank, antialias):
    image = located((20, 17, 15)[:rank])
    out = LatticeResample(antialias)(image, LINES[:rank], mode)
    assert out.shape[1:] == tuple(line.size for line in LINES[:rank]) and out.affine.dtype == torch.float64
    # a widened kernel, sampled at voxels, has its centre where it should only nearly
    assert off(out).max() < (0.2 if antialias else 1e-9)
    expected = AFFINE[:3, :3] @ torch.tensor([2.25, 1.0, 3.5 if rank == 3 else 0.0]).double() + AFFINE[:3, 3]
    torch.testing.assert_close(out.affine[:3, 3], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(image.affine, AFFINE, rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_the_inverse_is_on_the_old_grid_with_nothing_outside(mode):
    image, transform = located((20, 17, 15)), LatticeResample(antialias=False)
    out = transform(image, LINES, mode)
    back = transform.inverse(out)
    torch.testing.assert_close(back.affine, image.affine, rtol=0, atol=1e-9)
    assert back.shape == image.shape and not back.applied_operations
    kept = back.as_tensor().abs().sum(0) > 0
    i, j, k = (np.flatnonzero(kept.any(1 if a == 0 else 0).any(0 if a == 2 else 1)) for a in range(3))
    # from half a new voxel before the first point to as much behind the last one
    assert (i[0], i[-1], j[0], j[-1], k[0], k[-1]) == (2, 13, 1, 9, 3, 12)
    inner = off(back)[3:12, 2:8, 4:11]
    assert inner.max() < (1e-9 if mode == "linear" else 8)


def test_lazily_the_places_are_the_same():
    image = located((20, 17, 15))
    transform = LatticeResample(antialias=False)
    pending = transform(image, LINES, "linear", lazy=True)
    assert pending.shape == image.shape and len(pending.pending_operations) == 1
    eager, done = transform(image, LINES, "linear"), apply_pending(pending)[0]
    torch.testing.assert_close(done.affine, eager.affine, rtol=0, atol=1e-9)
    torch.testing.assert_close(done.as_tensor(), eager.as_tensor().float(), rtol=0, atol=1e-3)
    assert transform.inverse(done).shape == image.shape
    labels = MetaTensor(torch.randint(0, 5, (1, 20, 17, 15)), affine=AFFINE)
    untied = [line._replace(start=line.start + 0.1) for line in LINES]  # MONAI sends ties to the even voxel
    done = apply_pending(transform(labels, untied, "nearest", lazy=True))[0]
    assert torch.equal(done.as_tensor().long(), transform(labels, untied, "nearest").as_tensor())


def test_a_plain_tensor_stays_one():
    out = LatticeResample(antialias=True)(torch.rand(1, 20, 17, 15), LINES, "linear", lazy=True)
    assert type(out) is torch.Tensor and out.shape == (1, 9, 14, 5)


def test_what_does_not_fit_together_is_refused():
    item = {"a": torch.zeros(1, 4, 5), "b": torch.zeros(2, 4, 5), "c": torch.zeros(1, 5, 4)}
    assert common_sides(item, ["a", "b"]) == (4, 5)
    with pytest.raises(SpaceMismatch, match=r"one grid, got the shapes \{'a': \(4, 5\), 'c': \(5, 4\)\}$"):
        common_sides(item, ["a", "c"])
    assert modes_of("cubic", ("a", "b")) == ("cubic", "cubic") and modes_of(["linear"], ("a",)) == ("linear",)
    for wrong in ("bilinear", ["linear"], ["linear", "area"]):
        with pytest.raises(ValueError, match=r"^mode must be one of nearest, linear, cubic, or one of them per key"):
            modes_of(wrong, ("a", "b"))
