import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, SobelGradients

from medvit.models.uni4eye import gradient_map
from medvit.transforms import GradientMagnituded


@pytest.mark.parametrize("shape", [(2, 17), (3, 9, 12), (1, 7, 8, 5), (1, 1, 8, 5)], ids=str)
def test_it_is_the_length_of_monais_derivatives_and_the_target_of_uni4eye(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1])).double()
    item = Compose([GradientMagnituded("x")])({"x": MetaTensor(x, affine=affine)})
    out = item["x_gradient"]
    assert torch.equal(item["x"].as_tensor(), x) and torch.equal(out.affine, affine) and out.dtype == torch.float32
    by_axis = torch.cat([SobelGradients(spatial_axes=a, padding_mode="replicate")(x)[None] for a in range(x.dim() - 1)])
    torch.testing.assert_close(out.as_tensor(), by_axis.norm(dim=0).as_subclass(torch.Tensor), rtol=0, atol=1e-6)
    torch.testing.assert_close(out.as_tensor(), gradient_map(x[None])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.float64])
def test_types_and_keys(dtype):
    x = torch.arange(20).reshape(1, 4, 5).to(dtype)
    out = GradientMagnituded("x", suffix="")({"x": x})
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert list(out) == ["x"] and out["x"].dtype == wanted and type(out["x"]) is torch.Tensor
    torch.testing.assert_close(out["x"][0, 1:-1, 1:-1], torch.full((2, 3), 26**0.5, dtype=wanted))
    with pytest.raises(KeyError):
        GradientMagnituded("x")({})
