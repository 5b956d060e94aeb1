"""The triton backend: when it can run, that its kernels compile for a GPU, and that they agree with the definition."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from medvit.kernels import BiasTable, WindowGeometry
from medvit.kernels import triton_attention as module

HERE = Path(__file__).parent


@pytest.mark.parametrize(
    "interpret",
    [
        pytest.param("1", id="interpreter"),
        pytest.param(
            "0", id="gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
def test_agrees_with_dense(interpret):
    pytest.importorskip("triton")
    done = run_tests(interpret, str(HERE / "triton_agreement.py"))
    assert re.search(r"\d+ passed", done)
    assert "skipped" not in done


def test_the_golden_tensors_of_blocks_come_out_of_it():
    pytest.importorskip("triton")
    files = [str(HERE.parent / "models" / f"test_{name}_parity.py") for name in ("hbformer", "d_former")]
    done = run_tests("1", *files, "-k", "triton and (block or stage)")
    if "passed" not in done:
        pytest.skip("the golden tensors of ../shared/parity are not beside this checkout")
    assert "skipped" not in done


def run_tests(interpret, *arguments):
    """What pytest prints of these tests, all of which have to pass, with Triton's interpreter or without."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *arguments]
    environment = os.environ | {"TRITON_INTERPRET": interpret, "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1"}
    if interpret == "1":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(command, env=environment, cwd=HERE.parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# --- when it can run


def query(**changes):
    """What ``supports`` looks at of a tensor on a GPU."""
    wanted = {
        "is_cuda": True,
        "device": torch.device("cuda"),
        "dtype": torch.float32,
        "shape": torch.Size((1, 8, 2, 16)),
    }
    return SimpleNamespace(**wanted | changes)


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a GPU, as far as ``supports`` can see."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(module, "find_spec", lambda name: object())
    return monkeypatch


def test_runs_on_a_gpu(hopper):
    assert module.supports(query(), WindowGeometry.swin(4, 1)) is None


@pytest.mark.parametrize(
    ("changes", "dropout", "reason"),
    [
        (
            {"is_cuda": False, "device": torch.device("cpu")},
            0.0,
            "runs on CUDA devices, elsewhere only with TRITON_INTERPRET=1 (for tests), got q on cpu",
        ),
        (
            {"dtype": torch.float64},
            0.0,
            "takes float32, bfloat16 and float16, got torch.float64; 'grouped' and 'dense' take every type",
        ),
        ({"shape": torch.Size((1, 8, 2, 320))}, 0.0, "takes a head_dim up to 256, got 320"),
        ({}, 0.1, "has no dropout"),
    ],
)
def test_says_what_it_cannot_take(hopper, changes, dropout, reason):
    hopper.delenv("TRITON_INTERPRET", raising=False)
    assert module.supports(query(**changes), WindowGeometry.swin(4, 1), dropout) == reason


def test_says_what_is_missing(hopper):
    def reason():
        return module.supports(query(), WindowGeometry.swin(4, 1))

    with hopper.context() as changed:
        changed.setattr(module, "find_spec", lambda name: None)
        assert reason() == "needs Triton, which is not installed"
    with hopper.context() as changed:
        changed.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
        assert reason() == "needs a GPU of compute capability 8.0 or more"
    with hopper.context() as changed:
        changed.setattr(torch.compiler, "is_compiling", lambda: True)
        assert reason() == "cannot be traced"
    with hopper.context() as changed:
        changed.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert reason() == "sums the gradient of the bias in no fixed order"


def test_takes_up_to_three_axes(hopper):
    geometry = WindowGeometry.full((2, 2, 2, 2))
    assert module.supports(query(), geometry) == "takes grids of up to three axes, got 4"


def test_refuses_dropout():
    q = torch.zeros(1, 8, 2, 3)
    message = "the triton backend has no dropout, got 0.1; use backend='grouped'"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        module.run(q, q, q, WindowGeometry.swin(4, 1), None, dropout=0.1)


# --- how work is laid out


def plan(geometry, grid, dtype=torch.bfloat16, head_dim=32, bias="none"):
    geometry = geometry.fit(grid)
    return module._plan(geometry, tuple(grid), head_dim, dtype, bias, geometry.size)


def test_a_tile_is_a_window_or_a_box_of_queries():
    blocked = plan(WindowGeometry.swin(7, 3, shifted=True), (48, 48, 48))
    assert (blocked.tile, blocked.rows, blocked.panels) == ((7, 7, 7), 64, 6)
    assert plan(WindowGeometry.neighborhood(7, 3), (48, 48, 48)).tile == (4, 4, 4)
    assert plan(WindowGeometry.neighborhood(7, 2), (56, 56)).tile == (1, 8, 8)
    assert plan(WindowGeometry.neighborhood(3, 2), (4, 64)).tile == (1, 4, 16)
    assert plan(WindowGeometry.neighborhood(3, 2), (3, 3)).tile == (1, 4, 4)
    assert plan(WindowGeometry.neighborhood(9, 1), (500,), torch.float32).tile == (1, 1, 32)


def test_entries_of_large_matrices_are_counted_in_64_bits():
    assert not plan(WindowGeometry.full((46340,)), (46340,)).wide
    assert plan(WindowGeometry.full((46341,)), (46341,)).wide


def test_a_table_goes_to_the_kernel_as_it_is():
    geometry = WindowGeometry.swin(4, 2)
    table = BiasTable(torch.randn(49, 3), (4, 4), "prefix")
    entries, form, window = module._table(table, geometry.fit((3, 8)))
    assert (form, window) == ("prefix", (4, 4))
    assert torch.equal(entries, table.table.T)


# --- compilation: the interpreter takes more than the compiler does


@pytest.mark.slow
@pytest.mark.parametrize(
    ("geometry", "grid", "heads", "dim", "dtype", "clamp"),
    [
        (WindowGeometry.swin(7, 3, shifted=True), (14, 14, 14), 3, 16, torch.bfloat16, "exact"),
        (WindowGeometry((8, 8), (4, 4), (1, 1), True, True), (10, 30), 2, 32, torch.float16, "prefix"),
        (WindowGeometry.neighborhood(7, 2, dilation=2), (28, 28), 2, 128, torch.bfloat16, None),
        (WindowGeometry.swin(1, 1), (4,), 1, 1, torch.float32, "exact"),  # ones become part of the code
    ],
)
def test_kernels_compile_for_hopper(geometry, grid, heads, dim, dtype, clamp, monkeypatch, tmp_path):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget

    compiled = {}

    def compile_only(kernel, programs, plan, *arguments):
        made = kernel.warmup(*arguments, plan, grid=(programs,), num_warps=plan.warps, num_stages=2)
        compiled[kernel.__name__] = made.asm["ptx"]

    pretended = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: -1,
        get_current_stream=lambda device: 0,
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", pretended)
    monkeypatch.setattr(module, "_launch", compile_only)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    geometry = geometry.fit(grid)
    qkv = torch.zeros(1, *grid, 3, heads, dim, dtype=dtype, requires_grad=True)
    table = torch.zeros(torch.Size(2 * n - 1 for n in geometry.size).numel(), heads, requires_grad=True)
    bias = clamp and BiasTable(table, geometry.size, clamp)
    module.run(*qkv.unbind(-3), geometry, bias).sum().backward()
    assert list(compiled) == ["forward", "backward_queries", "backward_keys", "backward_bias"][: 4 if clamp else 3]
    for code in compiled.values():
        assert ("wgmma" in code) == (dtype != torch.float32)  # matrix units at work
