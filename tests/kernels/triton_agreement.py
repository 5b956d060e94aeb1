"""Triton's kernels against the definition, forward and backward; started by ``test_triton.py``.

Triton decides when it is imported whether kernels are compiled or interpreted: hence a process of its own, with
TRITON_INTERPRET=1 where there is no GPU. The interpreter takes tens of milliseconds for each program: sizes are small.
"""

import os
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.kernels import BiasTable, WindowGeometry, windowed_attention
from medvit.kernels import triton_attention as module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    interpreted: set[str] = set()

    def call(self, *args, **kwargs):
        """The interpreter makes the language anew at every call of a function, a third of the time; once will do."""
        if self.fn.__module__ not in interpreted:
            interpreted.add(self.fn.__module__)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call

swin, neighborhood = WindowGeometry.swin, WindowGeometry.neighborhood
local, spread = WindowGeometry.dformer_local, WindowGeometry.dformer_global


@pytest.fixture(autouse=True)
def few_bias_programs(monkeypatch):
    """So that each of them sums several windows of such small grids, as it does for large ones."""
    monkeypatch.setattr(module, "BIAS_PROGRAMS", 5)


def draw(shape, seed, dtype=torch.float32):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return values.to(DEVICE, dtype)


def leaves_of(geometry, grid, form, *, batch=1, heads=2, dim=3, dtype=torch.float32, window=None):
    """A qkv projection ``(B, *grid, 3, heads, head_dim)``, a bias or None, and what makes the bias of its values."""
    geometry, qkv = geometry.fit(grid), draw((batch, *grid, 3, heads, dim), 0, dtype)
    if form == "none":
        return [qkv], lambda: None
    if form == "dense":
        return [qkv, draw((heads, geometry.tokens, geometry.tokens), 1)], lambda values: values
    window = window or geometry.size
    rows = torch.Size(2 * w - 1 for w in window).numel()
    return [qkv, draw((rows, heads), 1)], lambda values: BiasTable(values, window, form)


def results(backend, geometry, leaves, make, dtype=None, parts=lambda qkv: qkv.unbind(-3)):
    """Output, and gradients of the leaves."""
    leaves = [t.to(dtype or t.dtype).requires_grad_() for t in leaves]
    q, k, v = parts(leaves[0])
    out = windowed_attention(q, k, v, geometry, bias=make(*leaves[1:]), backend=backend)
    weights = draw(out.shape, 2, out.dtype)
    return [out, *torch.autograd.grad((out * weights).sum(), leaves)]


def agree(geometry, leaves, make, **options):
    tolerance = TOLERANCE[leaves[0].dtype]
    exact = results("dense", geometry, leaves, make, torch.float64, **options)
    for value, leaf, wanted in zip(
        results("triton", geometry, leaves, make, **options), [leaves[0], *leaves], exact, strict=True
    ):
        assert value.dtype == leaf.dtype
        torch.testing.assert_close(value.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("geometry", "grid", "form", "dim"),
    [
        # 1D
        (swin(5, 1, shifted=True), (8,), "exact", 3),
        (swin(5, 1, shifted=True, roll_first=True), (8,), "dense", 16),
        (WindowGeometry((3,), (5,), (2,), True, True), (4,), "none", 5),  # rolled round more than once
        (neighborhood(4, 1, stride=3, dilation=2), (17,), "exact", 3),
        # 2D
        (swin((4, 3), 2, shifted=True), (7, 5), "prefix", 5),
        (WindowGeometry((4, 3), (1, 2), (1, 2), True), (7, 5), "dense", 3),
        (WindowGeometry((4, 3), (1, 2), (1, 2), True, True), (7, 5), "exact", 3),
        (local(3, 2), (7, 4), "none", 16),
        (spread(2, 2, (3, 4)), (3, 4), "exact", 3),
        (WindowGeometry((9, 8), (4, 0)), (10, 8), "exact", 3),  # more tokens than a program owns
        (neighborhood(3, 2), (9, 4), "dense", 5),
        (neighborhood((5, 4), 2, stride=(2, 4), dilation=(1, 2)), (9, 8), "prefix", 3),
        # 3D
        (swin(2, 3, shifted=True), (3, 4, 2), "exact", 3),
        (spread(2, 2, (3, 4, 1)), (3, 4, 1), "dense", 3),
        (neighborhood(3, 3, stride=(1, 2, 3)), (3, 4, 5), "exact", 16),
        (neighborhood((2, 3, 2), 3, dilation=(1, 1, 2)), (2, 4, 5), "none", 3),
        (WindowGeometry.full((2, 3, 2)), (2, 3, 2), "none", 3),
    ],
)
def test_is_dense_forward_and_backward(geometry, grid, form, dim):
    agree(geometry, *leaves_of(geometry, grid, form, dim=dim, batch=1 + (len(grid) == 1)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("geometry", "grid"), [(swin(4, 2, shifted=True), (6, 4)), (neighborhood(3, 2, stride=2), (5, 6))]
)
def test_low_precision_sums_in_float32(geometry, grid, dtype):
    agree(geometry, *leaves_of(geometry, grid, "exact", dim=16, dtype=dtype))


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, (7, 4, 2)[dims - 1])) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from((1, 1, 2))) for _ in range(dims))
    grid = tuple(draw(st.integers(1, (12, 6, 4)[dims - 1])) for _ in range(dims))
    if draw(st.booleans()):
        grid = tuple(max(length, n * d) for length, n, d in zip(grid, size, dilation, strict=True))
        stride = tuple(draw(st.integers(1, n)) for n in size)
        return neighborhood(size, dims, stride=stride, dilation=dilation), grid
    shift = tuple(draw(st.integers(0, n * d - 1)) for n, d in zip(size, dilation, strict=True))
    return WindowGeometry(size, shift, dilation, draw(st.booleans()), draw(st.booleans())), grid


@settings(max_examples=3)
@given(cases(), st.sampled_from(["none", "dense", "exact", "prefix"]), st.integers(1, 2))
def test_is_dense_for_any_geometry(case, form, heads):
    geometry, grid = case
    agree(geometry, *leaves_of(geometry, grid, form, heads=heads, window=geometry.size))


# --- the ways tensors come


def test_the_table_of_a_larger_window_serves_a_clamped_one():
    geometry = swin(4, 2, shifted=True)
    for form in ("exact", "prefix"):
        agree(geometry, *leaves_of(geometry, (3, 6), form, window=(4, 4)))
    # members of neighbourhoods have no fixed place: the prefix is read through the matrix
    agree(neighborhood(2, 2), *leaves_of(neighborhood(2, 2), (3, 4), "prefix", window=(3, 3)))


def test_padding_may_come_with_keys_of_its_own():
    geometry, grid = swin(4, 2, shifted=True), (6, 7)
    leaves, make = leaves_of(geometry, geometry.fit(grid).padded(grid), "exact")

    def parts(qkv):
        q, k, v = qkv.unbind(-3)
        return geometry.crop(q, grid), k, v

    agree(geometry, leaves, make, parts=parts)


@pytest.mark.parametrize("order", [(4, 0, 3, 1, 2, 5), (3, 0, 1, 2, 5, 4)], ids=["heads first", "features not last"])
def test_any_strides_are_read(order):
    geometry, grid = swin(3, 2, shifted=True), (4, 5)
    leaves, make = leaves_of(geometry, grid, "exact")
    stored = leaves[0].permute(order).contiguous()  # another order of (B, y, x, 3, heads, head_dim) in memory
    agree(
        geometry, [stored, leaves[1]], make, parts=lambda x: x.permute(torch.tensor(order).argsort().tolist()).unbind(3)
    )


def test_a_gradient_may_be_expanded():
    geometry, grid = swin(3, 1), (5,)
    leaves, _ = leaves_of(geometry, grid, "none")
    found = []
    for backend in ("dense", "triton"):
        qkv = leaves[0].clone().requires_grad_()
        windowed_attention(*qkv.unbind(-3), geometry, backend=backend).sum().backward()
        found.append(qkv.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_bias_without_gradient_gets_none():
    geometry, grid = swin(3, 1), (5,)
    leaves, _ = leaves_of(geometry, grid, "dense")
    q, k, v = leaves[0].requires_grad_().unbind(-3)
    windowed_attention(q, k, v, geometry, bias=leaves[1], backend="triton").sum().backward()
    assert leaves[0].grad.isfinite().all()
    assert leaves[1].grad is None


@pytest.mark.parametrize("programs", [1, 2048])
def test_the_gradient_of_the_bias_does_not_depend_on_how_windows_are_shared_out(programs, monkeypatch):
    monkeypatch.setattr(module, "BIAS_PROGRAMS", programs)
    for geometry in (swin(3, 1, shifted=True), neighborhood(3, 1)):
        agree(geometry, *leaves_of(geometry, (7,), "exact", batch=2))


def test_no_images_give_no_output():
    geometry, grid = swin(3, 1), (5,)
    leaves, make = leaves_of(geometry, grid, "exact", batch=0)
    agree(geometry, leaves, make)


def test_a_table_for_a_smaller_window_is_refused():
    geometry, grid = swin(4, 1), (8,)
    leaves, _ = leaves_of(geometry, grid, "none")
    table = BiasTable(draw((5, 2), 1), (3,))
    with pytest.raises(ValueError, match=f"^{re.escape('windows of (4,) need a table for at least that window')}"):
        windowed_attention(*leaves[0].unbind(-3), geometry, bias=table, backend="triton")
