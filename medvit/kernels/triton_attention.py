"""Windowed attention fused into Triton kernels, forward and backward, straight from the token grid.

Nothing is rolled, masked or cut into windows in memory: kernels find tokens, regions and bias entries by index
arithmetic (``triton_windows.py``). Beside the output one float32 per token and head is kept for the backward pass.
Sums are float32, weights are rounded to the type of ``q`` before they meet values, as in torch's fused kernels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from medvit.kernels.bias import Bias, BiasTable
from medvit.kernels.windows import WindowGeometry

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_FEATURES = 256
# programs that keep a large GPU busy while each still sums many windows
BIAS_PROGRAMS = 2048

Triple = tuple[int, int, int]


class Plan(NamedTuple):
    """What kernels are compiled for; everything per axis has three entries, those of missing axes come first.

    Attributes:
        size, stride, dilation, shift: of the geometry; ``stride`` counts for neighbourhoods only.
        tile: places that programs share out among them: a whole blocked window, or a box of neighbouring queries.
        window: the window that the bias table is made for.
        sliding: neighbourhoods, else blocked windows.
        roll_first: the geometry's.
        bias: ``"none"``, ``"dense"``, or how a table is read: ``"exact"``, ``"prefix"``.
        head_dim: as it is; ``features`` is the next power of two that matrix units take.
        scale: of the logits.
        rows, columns: tokens a program owns, and those it passes over at a time.
        panels: programs to a tile.
        warps: of a program.
        wide: entries of a dense bias are counted in 64 bits.
        interpreted: Triton's interpreter multiplies in float32, since it cannot in bfloat16.
    """

    size: Triple
    stride: Triple
    dilation: Triple
    shift: Triple
    tile: Triple
    window: Triple
    sliding: bool
    roll_first: bool
    bias: str
    head_dim: int
    features: int
    scale: float
    rows: int
    columns: int
    panels: int
    warps: int
    wide: bool
    interpreted: bool


def supports(q: Tensor, geometry: WindowGeometry, dropout: float = 0.0) -> str | None:
    """Why this backend cannot run, or None."""
    if not (q.is_cuda or _interpreted()):
        return f"runs on CUDA devices, elsewhere only with TRITON_INTERPRET=1 (for tests), got q on {q.device.type}"
    if find_spec("triton") is None:
        return "needs Triton, which is not installed"
    if q.is_cuda and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "needs a GPU of compute capability 8.0 or more"
    if q.dtype not in DTYPES:
        return f"takes float32, bfloat16 and float16, got {q.dtype}; 'grouped' and 'dense' take every type"
    if q.shape[-1] > MOST_FEATURES:
        return f"takes a head_dim up to {MOST_FEATURES}, got {q.shape[-1]}"
    if len(geometry.size) > 3:
        return f"takes grids of up to three axes, got {len(geometry.size)}"
    if dropout > 0.0:
        return "has no dropout"
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "cannot be traced"
    if torch.are_deterministic_algorithms_enabled():
        return "sums the gradient of the bias in no fixed order"
    return None


def run(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Bias = None, dropout: float = 0.0) -> Tensor:
    """See :func:`medvit.kernels.attention.windowed_attention`.

    Raises:
        ValueError: dropout, or a bias table for a smaller window.
    """
    if dropout > 0.0:
        raise ValueError(f"the triton backend has no dropout, got {dropout}; use backend='grouped'")
    if not geometry.mask_padding:
        k, v = geometry.pad(k), geometry.pad(v)
    grid = tuple(q.shape[1:-2])
    table, form, window = _table(bias, geometry)
    plan = _plan(geometry, grid, q.shape[-1], q.dtype, form, window)
    missing = (slice(None), *(None,) * (3 - len(grid)))
    out: Tensor = _Attention.apply(q[missing], k[missing], v[missing], table, plan, _triple(geometry.padded(grid), 1))
    return out.reshape(q.shape)


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _table(bias: Bias, geometry: WindowGeometry) -> tuple[Tensor | None, str, tuple[int, ...]]:
    """Entries of the bias ``(heads, entries)``, how kernels find theirs, and the window that the entries are for."""
    if isinstance(bias, BiasTable):
        larger = any(n > w for n, w in zip(geometry.size, bias.window, strict=True))
        if bias.clamp == "exact" and not larger:
            return bias.table.t().contiguous(), "exact", bias.window
        if bias.clamp == "prefix" and geometry.tokens <= prod(bias.window) and not geometry.stride:
            return bias.table.t().contiguous(), "prefix", bias.window
        bias = bias.dense(geometry)  # raises if the table is too small
    if bias is None:
        return None, "none", geometry.size
    return bias.flatten(1).contiguous(), "dense", geometry.size


@lru_cache(maxsize=256)
def _plan(
    geometry: WindowGeometry,
    grid: tuple[int, ...],
    head_dim: int,
    dtype: torch.dtype,
    bias: str,
    window: tuple[int, ...],
) -> Plan:
    features = _power_of_two(head_dim, MOST_FEATURES)
    # chosen by the registers that the kernels take on a Hopper GPU; float32 products run on ordinary units
    most = 64 if features <= 128 and dtype != torch.float32 else 32
    lengths = [-(-length // d) for length, d in zip(grid, geometry.dilation, strict=True)]
    tile = _box(lengths, most) if geometry.stride else geometry.size
    rows = _power_of_two(prod(tile), most)
    return Plan(
        size=_triple(geometry.size, 1),
        stride=_triple(geometry.stride or geometry.size, 1),
        dilation=_triple(geometry.dilation, 1),
        shift=_triple(geometry.shift, 0),
        tile=_triple(tile, 1),
        window=_triple(window, 1),
        sliding=bool(geometry.stride),
        roll_first=geometry.roll_first,
        bias=bias,
        head_dim=head_dim,
        features=features,
        scale=head_dim**-0.5,
        rows=rows,
        columns=_power_of_two(geometry.tokens, 32),
        panels=-(-prod(tile) // rows),
        warps=4 if features <= 64 else 8,
        wide=geometry.tokens**2 >= 2**31,
        interpreted=_interpreted(),
    )


def _triple(values: Sequence[int], missing: int) -> Triple:
    first, second, third = (*(missing,) * (3 - len(values)), *values)
    return first, second, third


def _power_of_two(n: int, most: int) -> int:
    """The next one from ``n`` on, from 16 (the least that matrix units take) up to ``most``."""
    return int(min(max(16, 1 << (n - 1).bit_length()), most))


def _box(lengths: Sequence[int], most: int) -> tuple[int, ...]:
    """As near to a cube of ``most`` tokens as the lengths of the axes allow; sides are powers of two."""
    box = [1] * len(lengths)
    while prod(box) < most:
        short = [a for a in reversed(range(len(box))) if box[a] < lengths[a]]
        if not short:
            break
        box[min(short, key=lambda a: box[a])] *= 2
    return tuple(box)


class _Attention(torch.autograd.Function):
    """Attention ``(B, *three axes, heads, head_dim)`` that keeps its inputs, its output and one number per row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, table: Tensor | None, plan: Plan, padded: Triple) -> Tensor:
        from medvit.kernels import triton_kernels

        q, k, v = (_unit_stride(t) for t in (q, k, v))
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        sums = _numbers(q)
        tensors = (q, k, v, q if table is None else table, out, sums)
        sizes = (*_strides(q, k, v, out, sums), *_sizes(q, k, table, padded))
        _launch(triton_kernels.forward, _programs(q, plan, padded), plan, *tensors, *sizes)
        ctx.save_for_backward(q, k, v, table, out, sums)
        ctx.plan, ctx.padded = plan, padded
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from medvit.kernels import triton_kernels

        q, k, v, table, out, sums = ctx.saved_tensors
        plan, padded = ctx.plan, ctx.padded
        grad, deltas = _unit_stride(grad), _numbers(q)
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        inputs = (q, k, v, q if table is None else table, sums, deltas)
        sizes, programs = _sizes(q, k, table, padded), _programs(q, plan, padded)
        strides = _strides(q, k, v, out, grad, sums)
        _launch(triton_kernels.backward_queries, programs, plan, *inputs, out, grad, dq, *strides, *sizes)  # and deltas
        strides = _strides(q, k, v, grad, dk, sums)
        _launch(triton_kernels.backward_keys, programs, plan, *inputs, grad, dk, dv, *strides, *sizes)
        if not ctx.needs_input_grad[3]:
            return dq, dk, dv, None, None, None
        d_table = torch.zeros(table.shape, dtype=torch.float32, device=q.device)
        programs, shares = _bias_programs(q, plan, padded)
        strides = _strides(q, k, v, grad, sums)
        arguments = (*inputs, grad, d_table, *strides, *sizes, *shares)
        _launch(triton_kernels.backward_bias, programs, plan._replace(warps=8), *arguments)  # for the registers
        return dq, dk, dv, d_table.to(table.dtype), None, None


def _launch(kernel: Any, programs: int, plan: Plan, *arguments: Any) -> None:
    """Run so many instances; no tokens or no images make none."""
    if programs:
        with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
            kernel[(programs,)](*arguments, plan, num_warps=plan.warps, num_stages=2)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _numbers(q: Tensor) -> Tensor:
    """Room for a float32 per token and head, ``(B, *grid, heads)``, heads apart."""
    image, *grid, heads = q.shape[:-1]
    return torch.empty(image, heads, *grid, dtype=torch.float32, device=q.device).movedim(1, -1)


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """Of image, three axes and head."""
    return tuple(t.stride()[:5] for t in tensors)


def _sizes(q: Tensor, k: Tensor, table: Tensor | None, padded: Triple) -> tuple[Any, ...]:
    """What kernels are not compiled for: grids of queries and of keys, whole windows, heads, entries of the bias."""
    return tuple(q.shape[1:4]), tuple(k.shape[1:4]), padded, q.shape[4], 0 if table is None else table.shape[1]


def _tiles(plan: Plan, padded: Triple) -> int:
    """Of one image and head."""
    lengths = (-(-length // d) for length, d in zip(padded, plan.dilation, strict=True))
    return prod(plan.dilation) * prod(-(-n // t) for n, t in zip(lengths, plan.tile, strict=True))


def _programs(q: Tensor, plan: Plan, padded: Triple) -> int:
    return q.shape[0] * q.shape[4] * _tiles(plan, padded) * plan.panels


def _bias_programs(q: Tensor, plan: Plan, padded: Triple) -> tuple[int, tuple[int, int, int, int]]:
    """Programs of the gradient of the bias, and what they share out: images, tiles of all, of each, blocks of keys."""
    images, heads = q.shape[0], q.shape[4]
    items = images * _tiles(plan, padded)
    # places that the windows of a tile's queries span
    spans = (-(-(t - 1) // s) * s + n for t, s, n in zip(plan.tile, plan.stride, plan.size, strict=True))
    blocks = -(-prod(spans if plan.sliding else plan.size) // plan.columns)
    pairs = heads * plan.panels * blocks
    share = -(-items // max(1, min(items, BIAS_PROGRAMS // pairs)))
    return pairs * -(-items // max(1, share)), (images, items, share, blocks)
