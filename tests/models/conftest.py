"""The golden tensors of windowed networks, through every backend of windowed attention."""

import os

import pytest
import torch

from medvit.kernels import attention


@pytest.fixture(params=list(attention.BACKENDS))
def backend(request, monkeypatch):
    """The one backend there is."""
    if request.param == "dense" and "swinunetr3d" in request.node.name:
        pytest.skip("takes a minute; the 2D network and the blocks in 3D go through it")
    if request.param == "triton" and os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        pytest.skip("no GPU, and tests/kernels/test_triton.py runs these in Triton's interpreter")
    monkeypatch.setattr(attention, "BACKENDS", {request.param: attention.BACKENDS[request.param]})
