"""Windowed attention as scaled-dot-product attention of many windows at a time, on any device torch supports.

Memory beyond the result is bounded, in training too: attention weights are made anew in the backward pass, a few
windows at a time (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; Rabe and Staats, "Self-attention
Does Not Need O(n^2) Memory", 2021).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medvit.kernels.bias import Bias, dense_bias
from medvit.kernels.pieces import Piece, pieces
from medvit.kernels.windows import WindowGeometry, constant

# Logits at a time. Backward they are in memory: few enough for a CPU's cache, and enough to keep a GPU busy.
LOGITS = 1 << 24
LOGITS_BACKWARD = {"cpu": 1 << 19, "cuda": 1 << 26}


def supports(q: Tensor, geometry: WindowGeometry, dropout: float = 0.0) -> str | None:
    """Why this backend cannot run, or None: it always can."""
    return None


def run(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Bias = None, dropout: float = 0.0) -> Tensor:
    """See :func:`medvit.kernels.attention.windowed_attention`."""
    table = dense_bias(bias, geometry)
    grid = q.shape[1 : 1 + len(geometry.size)]
    if not geometry.stride:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return _masked(q, k, v, geometry, table, dropout)
        if not geometry.mask_padding:
            k, v = geometry.pad(k), geometry.pad(v)
    parts = pieces(geometry, grid, k.shape[1 : 1 + len(grid)], q.device)
    qs, ks, vs = (t.flatten(1, len(grid)) for t in (q, k, v))
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, table))
    if wanted and dropout == 0.0 and not torch.compiler.is_compiling():
        out: Tensor = _Recomputed.apply(qs, ks, vs, table, parts)
    else:
        out = _attend(qs, ks, vs, table, parts, dropout)
    return out.reshape(q.shape)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parts: list[Piece], dropout: float = 0.0) -> Tensor:
    """``(B, tokens, heads, head_dim)``; see :func:`run`."""
    q, k, v = (t.contiguous() for t in (q, k, v))  # index_select would copy all of them for each piece
    out = torch.empty_like(q)
    for piece in parts:
        offsets = piece.offsets(bias, q.dtype)
        if offsets is not None:
            offsets = offsets[None]  # torch has no fast path on the CPU for a mask of three axes
        for queries, keys in _chunks(piece, q, LOGITS):
            qs, ks, vs = _heads_first(q, queries), _heads_first(k, keys), _heads_first(v, keys)
            y = F.scaled_dot_product_attention(qs, ks, vs, attn_mask=offsets, dropout_p=dropout)
            out.index_copy_(1, queries.flatten(), _tokens_first(y, q.shape[0]))
    return out


def _heads_first(x: Tensor, numbers: Tensor) -> Tensor:
    """Tokens ``(B, tokens, heads, C)`` by their numbers ``(windows, n)`` to ``(B * windows, heads, n, C)``."""
    windows, n = numbers.shape
    return x.index_select(1, numbers.flatten()).reshape(x.shape[0] * windows, n, *x.shape[2:]).transpose(1, 2)


def _tokens_first(x: Tensor, batch: int) -> Tensor:
    """``(B * windows, heads, n, C)`` to ``(B, windows * n, heads, C)``."""
    return x.transpose(1, 2).reshape(batch, -1, x.shape[1], x.shape[3])


def _chunks(piece: Piece, q: Tensor, most: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Queries and keys of a few windows at a time, of about that many logits."""
    count = max(1, most // (q.shape[0] * q.shape[2] * piece.queries.shape[1] * piece.keys.shape[1]))
    for first in range(0, piece.queries.shape[0], count):
        yield piece.queries[first : first + count], piece.keys[first : first + count]


class _Recomputed(torch.autograd.Function):
    """Attention that keeps its inputs and output only."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, parts: list[Piece]) -> Tensor:
        # torch takes its slow path for a mask that looks as if it wanted a gradient
        out = _attend(q, k, v, None if bias is None else bias.detach(), parts)
        ctx.save_for_backward(q, k, v, bias, out)
        ctx.parts = parts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, out = ctx.saved_tensors
        q, k, v, grad = (t.contiguous() for t in (q, k, v, grad))
        dq, dk, dv = (torch.zeros_like(t) for t in (q, k, v))
        dbias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if ctx.needs_input_grad[3] else None
        delta = (grad * out).sum(-1, dtype=_wide(q.dtype), keepdim=True)
        for piece in ctx.parts:
            _backward(piece, (q, k, v, bias), (grad, delta), (dq, dk, dv, dbias))
        return dq, dk, dv, None if dbias is None else dbias.to(bias.dtype), None


def _backward(
    piece: Piece,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    grads: tuple[Tensor, Tensor],
    results: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Add a piece's part to the gradients of q, k, v and the bias."""
    q, k, v, bias = inputs
    dq, dk, dv, dbias = results
    wide, scale = _wide(q.dtype), q.shape[-1] ** -0.5
    offsets = piece.offsets(bias, wide)
    most = LOGITS_BACKWARD.get(q.device.type, LOGITS)
    for queries, keys in _chunks(piece, q, most):
        # (B * windows, heads, n or m, head_dim)
        qs, dout, delta = (_heads_first(t, queries).to(wide) for t in (q, *grads))
        ks, vs = (_heads_first(t, keys).to(wide) for t in (k, v))
        parts = [torch.empty_like(t) for t in (qs, ks, vs)]
        count = max(1, most // (qs.shape[0] * qs.shape[2] * ks.shape[2]))
        for some in [slice(i, i + count) for i in range(0, q.shape[2], count)]:
            asked, given = qs[:, some] * scale, dout[:, some]
            logits = asked @ ks[:, some].transpose(-2, -1)
            weights = torch.softmax(logits if offsets is None else logits.add_(offsets[some]), -1)
            parts[2][:, some] = weights.transpose(-2, -1) @ given
            dlogits = torch.matmul(given, vs[:, some].transpose(-2, -1), out=logits)
            dlogits.sub_(delta[:, some]).mul_(weights)
            if dbias is not None:
                each = dlogits.sum(0) if len(dlogits) > 1 else dlogits[0]
                if piece.pairs is None:
                    dbias[some] += each
                else:  # where a pair is forbidden its gradient is 0
                    dbias[some].flatten(1).index_add_(1, piece.pairs.clamp(min=0).flatten(), each.flatten(1))
            parts[0][:, some] = (dlogits @ ks[:, some]).mul_(scale)
            parts[1][:, some] = dlogits.transpose(-2, -1) @ asked
        for total, part, numbers in zip((dq, dk, dv), parts, (queries, keys, keys), strict=True):
            total.index_add_(1, numbers.flatten(), _tokens_first(part, q.shape[0]).to(total.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _masked(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Tensor | None, dropout: float) -> Tensor:
    """Blocked windows by a roll, a permutation and a mask: sizes may be symbols, as graphs that are compiled need."""
    grid = q.shape[1 : 1 + len(geometry.size)]
    q, k, v = (geometry.group(t).transpose(1, 2) for t in (q, k, v))
    mask = None if bias is None else bias.to(q.dtype)[None]
    if geometry.is_masked(grid):
        allowed = _additive_mask(geometry, tuple(grid), str(q.device), q.dtype)
        mask = allowed if mask is None else mask + allowed
        mask = mask.expand(q.shape[0] // mask.shape[0], *mask.shape).flatten(0, 1)  # windows of all images in turn
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    # export (torch 2.15) sees other strides than its ONNX step
    out = out.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    return geometry.ungroup(out, grid)


@constant(maxsize=16)
def _additive_mask(geometry: WindowGeometry, grid: tuple[int, ...], device: str, dtype: torch.dtype) -> Tensor:
    """``(windows, 1, tokens, tokens)``: 0 where two tokens may attend, -inf elsewhere."""
    regions = geometry.regions(grid, device)
    forbidden = regions[:, :, None] != regions[:, None, :]
    return torch.zeros(forbidden.shape, dtype=dtype, device=device).masked_fill(forbidden, float("-inf"))[:, None]
