"""Windowed attention: known answers, and the fast backend against the one that is the definition."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvit.kernels import WindowGeometry, windowed_attention
from medvit.kernels import attention as module

BACKENDS = ["dense", "grouped"]


def random_case(geometry, grid, *, batch=2, heads=2, dim=3, bias=True, dtype=torch.float64, seed=0):
    """Leaf tensors q, k, v and a bias (or None)."""
    generator = torch.Generator().manual_seed(seed)
    qkv = [torch.randn(batch, *grid, heads, dim, generator=generator, dtype=dtype) for _ in range(3)]
    tokens = geometry.fit(grid).tokens
    tables = [torch.randn(heads, tokens, tokens, generator=generator, dtype=dtype)] if bias else []
    return [t.requires_grad_() for t in [*qkv, *tables]]


def attend(leaves, geometry, backend, **options):
    return windowed_attention(*leaves[:3], geometry, bias=leaves[3] if leaves[3:] else None, backend=backend, **options)


def positions(grid):
    """Values equal to the raster position, one head of one channel; queries and keys that weigh all tokens alike."""
    v = torch.arange(float(torch.Size(grid).numel())).reshape(1, *grid, 1, 1)
    return torch.zeros_like(v), torch.zeros_like(v), v


# --- answers known beforehand


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniform_attention_averages_each_window_and_its_padding(backend):
    out = windowed_attention(*positions((6,)), WindowGeometry((4,), (0,)), backend=backend)
    # windows {0, 1, 2, 3} and {4, 5, padding, padding}: zero padding is attended
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5] * 4 + [9 / 4] * 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shifted_windows_do_not_reach_across_the_seam(backend):
    out = windowed_attention(*positions((6,)), WindowGeometry((4,), (2,)), backend=backend)
    # padded to 8 and rolled: {2, 3, 4, 5} and {padding, padding | 0, 1}, the last parted by the seam
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5] * 2 + [3.5] * 4))


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_padding_is_not_attended(backend):
    out = windowed_attention(*positions((6,)), WindowGeometry((4,), (0,), mask_padding=True), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5] * 4 + [4.5] * 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_dilated_groups_reach_across_the_grid(backend):
    out = windowed_attention(*positions((7,)), WindowGeometry.dformer_global(4, 4, (7,)), backend=backend)
    # padded to 8 and two apart: {0, 2, 4, 6} and {1, 3, 5, masked}
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0] * 7))
    out = windowed_attention(*positions((6,)), WindowGeometry.dformer_global(4, 4, (6,)), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([2.0, 3, 2, 3, 2, 3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rolling_first_keeps_the_padding_apart_from_the_seam(backend):
    geometry = WindowGeometry.swin(4, 1, shifted=True, roll_first=True)
    out = windowed_attention(*positions((6,)), geometry, backend=backend)
    # rolled to 2 3 4 5 0 1, then padded: {2, 3, 4, 5} and {0, 1 | padding, padding}, parted where the last two begin
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5] * 2 + [3.5] * 4))
    out = windowed_attention(*positions((7,)), geometry, backend=backend)
    # 2 3 4 5 6 0 1 and one zero of padding: {2, 3, 4, 5}, {6, 0 | 1, padding}: timm's seam counts from the padded end
    torch.testing.assert_close(out.flatten(), torch.tensor([3.0, 0.5, 3.5, 3.5, 3.5, 3.5, 3.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_axes_shift_independently(backend):
    out = windowed_attention(*positions((4, 4)), WindowGeometry((2, 2), (1, 0)), backend=backend)
    rows = torch.tensor([[0.5, 0.5, 2.5, 2.5], [6.5, 6.5, 8.5, 8.5], [6.5, 6.5, 8.5, 8.5], [12.5, 12.5, 14.5, 14.5]])
    torch.testing.assert_close(out.reshape(4, 4), rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_rows_are_queries_and_columns_keys(backend):
    bias = torch.zeros(1, 3, 3)
    for query, key in ((0, 1), (1, 2), (2, 0)):
        bias[0, query, key] = 1e4
    out = windowed_attention(*positions((6,)), WindowGeometry((3,), (0,)), bias=bias, backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.0, 2, 0, 4, 5, 3]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(9,), (3, 4), (2, 3, 2)])
def test_one_window_over_the_grid_is_plain_attention(backend, grid):
    leaves = random_case(geometry := WindowGeometry.full(grid), grid, bias=False)
    q, k, v = (t.flatten(1, len(grid)).transpose(1, 2) for t in leaves)
    weights = (q @ k.transpose(-2, -1) / 3**0.5).softmax(-1)
    expected = (weights @ v).transpose(1, 2).reshape(leaves[0].shape)
    torch.testing.assert_close(attend(leaves, geometry, backend), expected, rtol=0, atol=1e-12)


# --- the fast backend against the definition


@st.composite
def cases(draw):
    dims = draw(st.integers(1, 3))
    size = tuple(draw(st.integers(1, (7, 4, 3)[dims - 1])) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from((1, 1, 2, 3))) for _ in range(dims))
    shift = tuple(draw(st.integers(0, n * d - 1)) for n, d in zip(size, dilation, strict=True))
    grid = tuple(draw(st.integers(1, (24, 9, 5)[dims - 1])) for _ in range(dims))
    return WindowGeometry(size, shift, dilation, draw(st.booleans()), draw(st.booleans())), grid


@settings(max_examples=80)
@given(cases(), st.booleans(), st.integers(1, 2), st.integers(0, 99))
@example((WindowGeometry((3, 3, 3), (1, 1, 1)), (5, 4, 7)), True, 2, 0)  # ragged, shifted on every axis
@example((WindowGeometry((4, 4), (2, 2)), (3, 9)), True, 2, 0)  # clamped and unshifted on one axis only
@example((WindowGeometry((4, 4), (2, 2)), (9, 9)), False, 2, 0)  # shifted without bias
def test_grouped_is_dense_forward_and_backward(case, bias, batch, seed):
    geometry, grid = case
    results = []
    for backend in BACKENDS:
        leaves = random_case(geometry, grid, batch=batch, bias=bias, seed=seed)
        out = attend(leaves, geometry, backend)
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=out.dtype)
        results.append([out, *torch.autograd.grad((out * weights).sum(), leaves)])
    for dense, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_a_float32_bias_goes_with_every_dtype(dtype, tolerance):
    geometry, grid = WindowGeometry.swin(4, 2, shifted=True), (7, 6)
    q, k, v, bias = (t.detach() for t in random_case(geometry, grid))
    exact = windowed_attention(q, k, v, geometry, bias=bias, backend="dense")
    for backend in BACKENDS:
        out = windowed_attention(q.to(dtype), k.to(dtype), v.to(dtype), geometry, bias=bias.float(), backend=backend)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0, atol=tolerance)


def test_each_image_of_a_batch_is_by_itself():
    geometry, grid = WindowGeometry.swin(4, 2, shifted=True), (9, 6)
    leaves = random_case(geometry, grid, batch=3)
    alone = [attend([t[i : i + 1] for t in leaves[:3]] + leaves[3:], geometry, "auto") for i in range(3)]
    torch.testing.assert_close(attend(leaves, geometry, "auto"), torch.cat(alone), rtol=0, atol=1e-12)


def test_a_mask_first_made_in_inference_mode_serves_training():
    geometry, grid = WindowGeometry((5, 3), (3, 1)), (8, 10)  # not used elsewhere: nothing is cached for it yet
    leaves = random_case(geometry, grid, bias=False)
    with torch.inference_mode():
        attend(leaves, geometry, "grouped")
    attend(leaves, geometry, "grouped").sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


# --- dropout


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropout_drops_weights_and_keeps_their_expectation(backend):
    geometry = WindowGeometry((4,), (0,))
    out = windowed_attention(
        *[t.expand(4000, -1, -1, -1) for t in positions((4,))], geometry, dropout=0.5, backend=backend
    )
    sums = set(out.flatten().mul(2).round(decimals=4).tolist())
    assert sums == {0, 1, 2, 3, 4, 5, 6}  # every sum of a subset of {0, 1, 2, 3}: weights of 1/4 become 0 or 1/2
    assert abs(out.mean() - 1.5) < 0.05


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dropout_by_default(backend):
    leaves = random_case(geometry := WindowGeometry((3,), (1,)), (8,))
    assert torch.equal(attend(leaves, geometry, backend), attend(leaves, geometry, backend))


# --- guards


def shaped(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("qkv", "options", "message"),
    [
        (
            [shaped(1, 8, 2, 3)] * 3,
            {},
            "a 2D geometry needs q, k, v of one shape (B, 2 grid axes, heads, head_dim), "
            "got (1, 8, 2, 3), (1, 8, 2, 3), (1, 8, 2, 3)",
        ),
        (
            [shaped(1, 8, 8, 2, 3), shaped(1, 8, 8, 2, 4), shaped(1, 8, 8, 2, 3)],
            {},
            "a 2D geometry needs q, k, v of one shape (B, 2 grid axes, heads, head_dim), "
            "got (1, 8, 8, 2, 3), (1, 8, 8, 2, 4), (1, 8, 8, 2, 3)",
        ),
        (
            [shaped(1, 8, 8, 2, 3), shaped(1, 8, 8, 2, 3), shaped(1, 8, 7, 2, 3)],
            {},
            "a 2D geometry needs q, k, v of one shape (B, 2 grid axes, heads, head_dim), "
            "got (1, 8, 8, 2, 3), (1, 8, 8, 2, 3), (1, 8, 7, 2, 3)",
        ),
        (
            [shaped(1, 3, 8, 2, 3)] * 3,
            {"bias": shaped(2, 16, 16)},  # the window is clamped to 3 x 4
            "bias must be (heads, tokens, tokens) = (2, 12, 12), got (2, 16, 16)",
        ),
        (
            [shaped(1, 8, 8, 2, 3)] * 3,
            {"bias": shaped(1, 16, 16)},
            "bias must be (heads, tokens, tokens) = (2, 16, 16), got (1, 16, 16)",
        ),
        (
            [shaped(1, 8, 8, 2, 3)] * 3,
            {"backend": "flash"},
            "unknown backend 'flash': use 'auto' or one of ['dense', 'grouped']",
        ),
    ],
)
def test_what_does_not_fit_is_refused(qkv, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        windowed_attention(*qkv, WindowGeometry.swin(4, 2), **options)


def test_auto_takes_the_first_backend_that_can_and_says_why_none_can(monkeypatch):
    geometry = WindowGeometry.full((5,))
    leaves = random_case(geometry, (5,))
    expected = attend(leaves, geometry, "dense")
    monkeypatch.setattr(module.grouped, "supports", lambda q, geometry: "is resting")
    assert torch.equal(attend(leaves, geometry, "auto"), expected)
    with pytest.raises(ValueError, match=r"^no backend can run this: \{'grouped': 'is resting'\}$"):
        attend(leaves, geometry, "grouped")
    monkeypatch.setattr(module.dense, "supports", lambda q, geometry: "is away")
    with pytest.raises(ValueError, match=r"^no backend can run this: \{'grouped': 'is resting', 'dense': 'is away'\}$"):
        attend(leaves, geometry, "auto")


def test_auto_prefers_grouped(monkeypatch):
    ran = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: ran.append(1) or plain(*a, **k))
    leaves = random_case(geometry := WindowGeometry.full((5,)), (5,))
    attend(leaves, geometry, "auto")
    assert ran == [1]
