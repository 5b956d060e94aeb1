import pytest
import torch
from monai.inferers import SimpleInferer

from medvit.inference import precision
from medvit.inference.precision import Autocast
from medvit.inference.sliding import SlidingWindow


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    """A CPU that computes in 16 bits fast, wherever the tests run."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


class Spy(torch.nn.Conv3d):
    """Notes the type in which it computes."""

    def forward(self, image):
        output = super().forward(image)
        self.seen = output.dtype
        return output


def _spy():
    torch.manual_seed(0)
    return Spy(1, 3, 3, padding=1)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_computes_in_reduced_precision_and_returns_float32(dtype):
    network, image = _spy(), torch.randn(1, 1, 6, 7, 8)
    exact = network(image)
    logits = Autocast(SimpleInferer(), dtype=dtype)(image, network)
    assert network.seen == getattr(torch, dtype)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, exact)
    assert torch.allclose(logits, exact, atol=0.03)


def test_disabled_it_changes_nothing():
    network, image = _spy(), torch.randn(1, 1, 6, 7, 8)
    assert torch.equal(Autocast(SimpleInferer(), enabled=False)(image, network), network(image))
    assert network.seen == torch.float32


def test_windows_are_summed_in_float32():
    network, image = _spy(), torch.randn(1, 1, 9, 9, 9)
    window = SlidingWindow((6, 6, 6), overlap=0.5, blend="gaussian")
    with torch.inference_mode():
        logits = Autocast(window)(image, network)
        assert network.seen == torch.bfloat16
        assert logits.dtype == torch.float32
        # a sum in bfloat16 would leave its 8 bits behind in every value
        assert not torch.equal(logits, logits.bfloat16().float())
        assert torch.allclose(logits, window(image, network), atol=0.03)


def test_arguments_reach_the_network():
    double = Autocast(SimpleInferer(), enabled=False)(torch.ones(1, 1, 2), lambda x, by: x * by, by=2)
    assert double.tolist() == [[[2, 2]]]


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match=r"must be one of \['bfloat16', 'float16'\], got 'float64'"):
        Autocast(SimpleInferer(), dtype="float64")


def test_every_scale_of_deep_supervision_comes_in_float32():
    scales = Autocast(SimpleInferer())(torch.ones(1, 1, 4, 4), lambda x: [x.bfloat16(), x[..., ::2].bfloat16()])
    assert [(y.dtype, tuple(y.shape)) for y in scales] == [(torch.float32, (1, 1, 4, 4)), (torch.float32, (1, 1, 4, 2))]


def test_a_cpu_that_is_slow_in_16_bits_computes_in_float32_and_says_so_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    precision._slow.cache_clear()
    network, image = _spy(), torch.randn(1, 1, 6, 7, 8)
    for _ in range(2):
        assert torch.equal(Autocast(SimpleInferer())(image, network), network(image))
    assert network.seen == torch.float32
    assert caplog.messages == ["this CPU (AVX2) is slow in 16 bits; float32 is used instead"]
