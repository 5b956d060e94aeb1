# mypy: ignore-errors
"""Triton kernels of windowed attention: forward, and backward for queries, for keys and values, and for the bias.

A program owns ``P.rows`` tokens of one tile, head and image, in rows, and passes over those that its tokens attend to,
or that attend to them, ``P.columns`` at a time, in columns. Weights never leave it: the forward pass keeps the
logarithm of each row's sum (Dao, "FlashAttention-2", 2023), from which the backward passes make them anew.

Tensors are ``(B, *grid, heads, head_dim)`` with any strides but the last, which is 1; ``sums`` and ``deltas`` are
``(B, *grid, heads)`` float32. Grids, of queries and of keys, have three axes.
"""

import triton
import triton.language as tl

from medvit.kernels.triton_windows import (
    attending,
    head_of,
    keys,
    keys_seen,
    load,
    load_numbers,
    locate,
    logits,
    program,
    queries,
    queries_seeing,
    store,
    store_numbers,
)


@triton.jit
def product(a, b):
    """Matrix product in the type of ``b``, summed in float32."""
    return tl.dot(a.to(b.dtype), b, input_precision="ieee")


@triton.jit
def forward(
    q, k, v, table, out, sums,
    q_strides, k_strides, v_strides, out_strides, sum_strides,
    q_grid, k_grid, padded, heads, entries,
    P: tl.constexpr,
):  # fmt: skip
    """Output of a panel of queries, and the logarithm to base 2 of each one's sum of weights."""
    panel, head, image, residue, count, first = program(heads, padded, P)
    across, down = tl.arange(0, P.features)[None, :], tl.arange(0, P.features)[:, None]
    row = (panel * P.rows + tl.arange(0, P.rows))[:, None]
    at, region, window, entry = queries(row, first, P.tile, residue, count, q_grid, padded, P)
    asked = load(head_of(q, q_strides, image, head), q_strides, at, region, across, P)
    k, v = head_of(k, k_strides, image, head), head_of(v, v_strides, image, head)
    table += head.to(tl.int64) * entries

    most = tl.full([P.rows, 1], float("-inf"), tl.float32)
    total = tl.full([P.rows, 1], 0.0, tl.float32)
    result = tl.full([P.rows, P.features], 0.0, tl.float32)
    low, span = keys_seen(first, count, P)
    for begin in range(0, span[0] * span[1] * span[2], P.columns):
        column = (begin + tl.arange(0, P.columns))[None, :]
        key_at, key_region, place, key_entry = keys(column, low, span, residue, k_grid, padded, P)
        pairs = attending(region, window, key_region, place, P)
        x = product(asked, load(k, k_strides, key_at, key_region, down, P))
        x = logits(x, pairs, table, entry, key_entry, P)
        new = tl.maximum(most, tl.max(x, 1, keep_dims=True))
        base = tl.where(new == float("-inf"), 0.0, new)  # rows that have attended to nothing so far
        weights = tl.exp2(x - base)
        decay = tl.exp2(most - base)
        total = total * decay + tl.sum(weights, 1, keep_dims=True)
        values = load(v, v_strides, key_at, key_region, down, P)
        result = result * decay + product(weights, tl.trans(values))
        most = new

    total = tl.where(region >= 0, total, 1.0)
    most = tl.where(region >= 0, most, 0.0)
    store(head_of(out, out_strides, image, head), out_strides, at, region, across, result / total, P)
    sums = head_of(sums, sum_strides, image, head)
    store_numbers(sums, sum_strides, at, region, most + tl.log2(total))


@triton.jit
def backward_queries(
    q, k, v, table, sums, deltas, out, grad, q_grad,
    q_strides, k_strides, v_strides, out_strides, grad_strides, sum_strides,
    q_grid, k_grid, padded, heads, entries,
    P: tl.constexpr,
):  # fmt: skip
    """Gradient of a panel of queries, and each one's delta, the product of its output and the output's gradient."""
    panel, head, image, residue, count, first = program(heads, padded, P)
    across, down = tl.arange(0, P.features)[None, :], tl.arange(0, P.features)[:, None]
    row = (panel * P.rows + tl.arange(0, P.rows))[:, None]
    at, region, window, entry = queries(row, first, P.tile, residue, count, q_grid, padded, P)
    asked = load(head_of(q, q_strides, image, head), q_strides, at, region, across, P)
    d_out = load(head_of(grad, grad_strides, image, head), grad_strides, at, region, across, P)
    told = load(head_of(out, out_strides, image, head), out_strides, at, region, across, P)
    delta = tl.sum(d_out.to(tl.float32) * told.to(tl.float32), 1, keep_dims=True)
    store_numbers(head_of(deltas, sum_strides, image, head), sum_strides, at, region, delta)
    total = load_numbers(head_of(sums, sum_strides, image, head), sum_strides, at, region)
    k, v = head_of(k, k_strides, image, head), head_of(v, v_strides, image, head)
    table += head.to(tl.int64) * entries

    result = tl.full([P.rows, P.features], 0.0, tl.float32)
    low, span = keys_seen(first, count, P)
    for begin in range(0, span[0] * span[1] * span[2], P.columns):
        column = (begin + tl.arange(0, P.columns))[None, :]
        key_at, key_region, place, key_entry = keys(column, low, span, residue, k_grid, padded, P)
        pairs = attending(region, window, key_region, place, P)
        answers = load(k, k_strides, key_at, key_region, down, P)
        weights = tl.exp2(logits(product(asked, answers), pairs, table, entry, key_entry, P) - total)
        d_weights = product(d_out, load(v, v_strides, key_at, key_region, down, P))
        result += product(weights * (d_weights - delta), tl.trans(answers))

    q_grad = head_of(q_grad, out_strides, image, head)
    store(q_grad, out_strides, at, region, across, result * P.scale, P)


@triton.jit
def backward_keys(
    q, k, v, table, sums, deltas, grad, k_grad, v_grad,
    q_strides, k_strides, v_strides, grad_strides, kv_grad_strides, sum_strides,
    q_grid, k_grid, padded, heads, entries,
    P: tl.constexpr,
):  # fmt: skip
    """Gradients of a panel of keys and of their values: keys in rows, queries in columns."""
    panel, head, image, residue, count, first = program(heads, padded, P)
    across, down = tl.arange(0, P.features)[None, :], tl.arange(0, P.features)[:, None]
    row = (panel * P.rows + tl.arange(0, P.rows))[:, None]
    key_at, key_region, place, key_entry = keys(row, first, P.tile, residue, k_grid, padded, P)
    answers = load(head_of(k, k_strides, image, head), k_strides, key_at, key_region, across, P)
    values = load(head_of(v, v_strides, image, head), v_strides, key_at, key_region, across, P)
    q, grad = head_of(q, q_strides, image, head), head_of(grad, grad_strides, image, head)
    sums = head_of(sums, sum_strides, image, head)
    deltas = head_of(deltas, sum_strides, image, head)
    table += head.to(tl.int64) * entries

    k_result = tl.full([P.rows, P.features], 0.0, tl.float32)
    v_result = tl.full([P.rows, P.features], 0.0, tl.float32)
    low, span = queries_seeing(first, count, P)
    for begin in range(0, span[0] * span[1] * span[2], P.columns):
        column = (begin + tl.arange(0, P.columns))[None, :]
        at, region, window, entry = queries(column, low, span, residue, count, q_grid, padded, P)
        pairs = attending(region, window, key_region, place, P)
        asked = load(q, q_strides, at, region, down, P)
        total = load_numbers(sums, sum_strides, at, region)
        weights = tl.exp2(logits(product(answers, asked), pairs, table, entry, key_entry, P) - total)
        d_out = load(grad, grad_strides, at, region, down, P)
        v_result += product(weights, tl.trans(d_out))
        delta = load_numbers(deltas, sum_strides, at, region)
        d_logits = weights * (product(values, d_out) - delta)
        k_result += product(d_logits, tl.trans(asked))

    k_grad = head_of(k_grad, kv_grad_strides, image, head)
    v_grad = head_of(v_grad, kv_grad_strides, image, head)
    store(k_grad, kv_grad_strides, key_at, key_region, across, k_result * P.scale, P)
    store(v_grad, kv_grad_strides, key_at, key_region, across, v_result, P)


@triton.jit
def backward_bias(
    q, k, v, table, sums, deltas, grad, table_grad,
    q_strides, k_strides, v_strides, grad_strides, sum_strides,
    q_grid, k_grid, padded, heads, entries, images, items, share, blocks,
    P: tl.constexpr,
):  # fmt: skip
    """Gradient of the bias from one block of pairs of a tile, summed over a share of all tiles of all images.

    Pairs of a blocked window have the same entries in every window: they are summed here, then added to the result
    once. Those of neighbourhoods have not where grids end: they are added after every tile.
    """
    number = tl.program_id(0)
    panel, block = number % P.panels, number // P.panels % blocks
    number = number // P.panels // blocks
    head, part = number % heads, number // heads
    across, down = tl.arange(0, P.features)[None, :], tl.arange(0, P.features)[:, None]
    row = (panel * P.rows + tl.arange(0, P.rows))[:, None]
    column = (block * P.columns + tl.arange(0, P.columns))[None, :]
    table += head.to(tl.int64) * entries
    table_grad += head.to(tl.int64) * entries

    result = tl.full([P.rows, P.columns], 0.0, tl.float32)
    end = tl.minimum((part + 1) * share, items)
    for item in range(part * share, end):
        image, tile = item % images, item // images
        residue, count, first = locate(tile, padded, P)
        low, span = keys_seen(first, count, P)
        at, region, window, entry = queries(row, first, P.tile, residue, count, q_grid, padded, P)
        key_at, key_region, place, key_entry = keys(column, low, span, residue, k_grid, padded, P)
        pairs = attending(region, window, key_region, place, P)
        asked = load(head_of(q, q_strides, image, head), q_strides, at, region, across, P)
        answers = load(head_of(k, k_strides, image, head), k_strides, key_at, key_region, down, P)
        total = load_numbers(head_of(sums, sum_strides, image, head), sum_strides, at, region)
        weights = tl.exp2(logits(product(asked, answers), pairs, table, entry, key_entry, P) - total)
        d_out = load(head_of(grad, grad_strides, image, head), grad_strides, at, region, across, P)
        values = load(head_of(v, v_strides, image, head), v_strides, key_at, key_region, down, P)
        delta = load_numbers(head_of(deltas, sum_strides, image, head), sum_strides, at, region)
        result += weights * (product(d_out, values) - delta)
        last = item + 1 == end
        if P.sliding:
            last = last | (image + 1 == images)
        else:
            tokens = P.size[0] * P.size[1] * P.size[2]
            pairs = (row < tokens) & (column < tokens)
        if last:
            tl.atomic_add(table_grad + (entry + key_entry), result, mask=pairs, sem="relaxed")
            result = tl.full([P.rows, P.columns], 0.0, tl.float32)
