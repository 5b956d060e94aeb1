"""Windowed attention: known answers, and the fast backend against the one that is the definition."""

import re

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from medvit.kernels import BiasTable, WindowGeometry, explain, windowed_attention
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


def natten(length, size, stride, dilation):
    """Whom each position of a line attends to, spelled out from NATTEN's documentation: (first, last) by position."""
    seen = {}
    for position in range(length):
        line = [p for p in range(length) if p % dilation == position % dilation]
        place = line.index(position)
        leader = min(place - place % stride + stride // 2, len(line) - 1)  # of its stride group: the middle, or the end
        first, last = leader - size // 2, leader + (size - 1) // 2
        while first < 0:
            first, last = first + 1, last + 1
        while last >= len(line):
            first, last = first - 1, last - 1
        seen[position] = [line[place] for place in range(first, last + 1)]
    return seen


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("length", "size", "stride", "dilation"),
    [
        (9, 3, 1, 1),
        (9, 4, 1, 1),
        (9, 5, 3, 1),
        (11, 4, 4, 1),
        (10, 3, 1, 3),
        (11, 2, 2, 3),
        (12, 4, 3, 2),
        (7, 7, 2, 1),
    ],
)
def test_neighbourhoods_are_nattens(backend, length, size, stride, dilation):
    geometry = WindowGeometry.neighborhood(size, 1, stride=stride, dilation=dilation)
    seen = natten(length, size, stride, dilation)
    expected = torch.tensor([sum(seen[p]) / size for p in range(length)])
    torch.testing.assert_close(windowed_attention(*positions((length,)), geometry, backend=backend).flatten(), expected)
    # in 2D a neighbourhood is the product of those of its axes
    geometry = WindowGeometry.neighborhood((size, 3), 2, stride=(stride, 1), dilation=(dilation, 1))
    rows = torch.tensor([[sum(5 * a + b for a in seen[p] for b in natten(5, 3, 1, 1)[c]) for c in range(5)]
                         for p in range(length)]) / (3 * size)  # fmt: skip
    out = windowed_attention(*positions((length, 5)), geometry, backend=backend)
    torch.testing.assert_close(out.reshape(length, 5), rows)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbourhood_that_was_moved_inward_reads_the_bias_of_its_true_offsets(backend):
    table = torch.zeros(5, 1)
    table[0], table[4] = -1e4, 1e4  # a key two places after the query counts for nothing, one two before it for all
    geometry = WindowGeometry.neighborhood(3, 1)
    out = windowed_attention(*positions((5,)), geometry, bias=BiasTable(table, (3,)), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5, 1.0, 2.0, 3.0, 2.0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_may_have_keys_and_values_of_its_own(backend):
    geometry, (q, k, v) = WindowGeometry.swin(4, 1, shifted=True), positions((6,))
    keys, values = geometry.pad(k), geometry.pad(v)
    values[:, 6:] = 10
    out = windowed_attention(q, keys, values, geometry, backend=backend)
    # {2, 3, 4, 5} and {padding, padding | 0, 1}
    torch.testing.assert_close(out.flatten(), torch.tensor([0.5] * 2 + [3.5] * 4))
    out = windowed_attention(q, keys, values, WindowGeometry.swin(4, 1), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([1.5] * 4 + [29 / 4] * 2))


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
    if draw(st.booleans()):
        return WindowGeometry(size, shift, dilation, draw(st.booleans()), draw(st.booleans())), grid
    stride = tuple(draw(st.integers(1, n)) for n in size)
    grid = tuple(max(g, n * d) if d > 1 else g for g, n, d in zip(grid, size, dilation, strict=True))
    return WindowGeometry(size, (0,) * dims, dilation, stride=stride), grid


@settings(max_examples=160)
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
    with torch.inference_mode():
        results[1].append(attend(leaves, geometry, "grouped"))
    results[0].append(results[0][0])
    for dense, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, dense, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("geometry", "grid"),
    [
        (WindowGeometry.swin(3, 2, shifted=True), (4, 5)),
        (WindowGeometry.dformer_global(2, 2, (5, 3)), (5, 3)),
        (WindowGeometry.neighborhood(3, 2, stride=(1, 2)), (4, 5)),
        (WindowGeometry.neighborhood(2, 1, dilation=2), (7,)),
    ],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_the_function(geometry, grid, bias):
    leaves = random_case(geometry, grid, batch=1, bias=bias)
    assert torch.autograd.gradcheck(lambda *leaves: attend(leaves, geometry, "grouped"), leaves)


@pytest.mark.parametrize("chunk", [1, 100])
def test_the_result_does_not_depend_on_how_many_windows_go_together(monkeypatch, chunk):
    geometry, grid = WindowGeometry.swin(3, 2, shifted=True), (10, 8)
    leaves = random_case(geometry, grid)

    def results():
        out = attend(leaves, geometry, "grouped")
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    expected = results()
    monkeypatch.setattr(module.grouped, "LOGITS", chunk)
    monkeypatch.setattr(module.grouped, "LOGITS_BACKWARD", {"cpu": chunk})
    for got, want in zip(results(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_training_keeps_memory_in_proportion_to_the_tokens():
    geometry, grid = WindowGeometry.swin(7, 2, shifted=True), (35, 35)
    leaves = random_case(geometry, grid, batch=1, heads=4, dim=8)
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        out = attend(leaves, geometry, "grouped")
    # q, k, v, the bias and the result; the weights of all windows alone would be 6 times that
    assert sum(saved.values()) <= sum(t.nbytes for t in leaves) + out.nbytes


@pytest.mark.parametrize("clamp", ["exact", "prefix"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_is_the_bias_made_of_it_and_gets_its_gradient(backend, clamp):
    geometry, grid = WindowGeometry.swin(4, 2, shifted=True), (3, 9)
    q, k, v = random_case(geometry, grid, bias=False)
    table = torch.randn(49, 2, dtype=torch.float64, requires_grad=True)
    rows = BiasTable(table, (4, 4), clamp).index(geometry.fit(grid))
    results = []
    for bias in (table[rows].permute(2, 0, 1), BiasTable(table, (4, 4), clamp)):
        out = windowed_attention(q, k, v, geometry, bias=bias, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), (q, table))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("table", "window", "clamp", "message"),
    [
        ((49, 2), (4, 4), "corner", "clamp must be 'exact' or 'prefix', got 'corner'"),
        ((50, 2), (4, 4), "exact", "a table for windows of (4, 4) is (49, heads), got (50, 2)"),
        ((49,), (4, 4), "exact", "a table for windows of (4, 4) is (49, heads), got (49,)"),
    ],
)
def test_a_table_that_cannot_be_one_is_refused(table, window, clamp, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        BiasTable(torch.zeros(table), window, clamp)


def test_a_table_that_does_not_fit_is_refused():
    q = torch.zeros(1, 9, 9, 2, 3)
    with pytest.raises(ValueError, match=r"^the bias table needs 2 heads and 2 axes, got 3 and 2$"):
        windowed_attention(q, q, q, WindowGeometry.swin(4, 2), bias=BiasTable(torch.zeros(49, 3), (4, 4)))
    with pytest.raises(ValueError, match=r"^windows of \(4, 4\) need a table for as many, got one for \(3, 3\)$"):
        windowed_attention(q, q, q, WindowGeometry.swin(4, 2), bias=BiasTable(torch.zeros(25, 2), (3, 3), "prefix"))


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
            [shaped(1, 7, 8, 2, 3), shaped(1, 9, 8, 2, 3), shaped(1, 9, 8, 2, 3)],
            {},
            "k and v need q's shape (B, *grid, heads, head_dim), with one of the grids [(7, 8), (8, 8)], "
            "got (1, 7, 8, 2, 3), (1, 9, 8, 2, 3), (1, 9, 8, 2, 3)",
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
            "unknown backend 'flash': use 'auto' or one of ['dense', 'grouped', 'triton']",
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
    monkeypatch.setattr(module, "BACKENDS", {"grouped": module.grouped, "dense": module.dense})
    monkeypatch.setattr(module.grouped, "supports", lambda q, geometry, dropout: "is resting")
    assert torch.equal(attend(leaves, geometry, "auto"), expected)
    assert explain(leaves[0], geometry) == {"grouped": "is resting", "dense": "chosen"}
    with pytest.raises(ValueError, match=r"^no backend can run this: \{'grouped': 'is resting'\}$"):
        attend(leaves, geometry, "grouped")
    monkeypatch.setattr(module.dense, "supports", lambda q, geometry, dropout: "is away")
    with pytest.raises(ValueError, match=r"^no backend can run this: \{'grouped': 'is resting', 'dense': 'is away'\}$"):
        attend(leaves, geometry, "auto")


def test_auto_prefers_grouped(monkeypatch):
    ran = []
    plain = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: ran.append(1) or plain(*a, **k))
    leaves = random_case(geometry := WindowGeometry.full((5,)), (5,))
    attend(leaves, geometry, "auto")
    assert ran == [1]
    fates = windowed_attention.explain(leaves[0], geometry)
    assert fates["grouped"] == "chosen" and fates["dense"] == "not needed"
