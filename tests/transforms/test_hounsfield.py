import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, ScaleIntensityRange

from medvit.transforms import HounsfieldWindowsd

WINDOWS = [(-600, 1500), (40, 400), (400, 1800)]


@pytest.mark.parametrize("shape", [(9,), (5, 6), (4, 5, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.int16, torch.float32, torch.float64])
def test_each_channel_is_a_window_as_monai_scales_it(shape, dtype):
    hu = torch.linspace(-2000, 3000, 1 + torch.Size(shape).numel())[1:].reshape(1, *shape).to(dtype)
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1]))
    out = Compose([HounsfieldWindowsd("ct", WINDOWS)])({"ct": MetaTensor(hu, affine=affine)})["ct"]
    assert out.shape == (3, *shape) and out.dtype == torch.float32
    assert torch.equal(out.affine, affine.double())
    for channel, (centre, width) in zip(out.as_tensor(), WINDOWS, strict=True):
        golden = ScaleIntensityRange(centre - width / 2, centre + width / 2, 0, 1, clip=True)(hu[0].float())
        torch.testing.assert_close(channel, torch.as_tensor(golden).as_subclass(torch.Tensor), rtol=0, atol=1e-6)


def test_edges_of_the_window_are_0_and_1_and_a_plain_tensor_stays_one():
    out = HounsfieldWindowsd("ct", [(40, 400)])({"ct": torch.tensor([[-1024.0, -160, 40, 240, 3071, torch.nan]])})
    assert type(out["ct"]) is torch.Tensor
    assert out["ct"][0, :5].tolist() == [0, 0, 0.5, 1, 1] and out["ct"][0, 5].isnan()


def test_what_makes_no_sense_is_refused():
    for windows in ([], [(40, 0)], [(40, -1)], [(40, float("nan"))], [(40,)]):
        with pytest.raises(ValueError, match=r"^windows must be pairs \(centre, width > 0\) in HU, got .*; use \[\(40"):
            HounsfieldWindowsd("ct", windows)
    with pytest.raises(ValueError, match=r"^'ct' must have one channel, HU, got shape \(3, 4, 4\)$"):
        HounsfieldWindowsd("ct", WINDOWS)({"ct": torch.zeros(3, 4, 4)})
