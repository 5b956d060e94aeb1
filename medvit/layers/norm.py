"""Instance normalisation with what follows it, written over its input.

On a CPU the passes over a map cost, not the arithmetic: ``leaky_relu(instance_norm(x) + residual)`` as torch has it
walks through the map nine times and allocates it three times. Here it is read twice and written once, into the memory
of ``x``, in slabs that stay in the cache. Nor does the backward pass need ``x``: the activation can be inverted, so the
output, which the next convolution keeps anyway, tells what the normalised map was.

Source: Rota Bulò et al., "In-Place Activated BatchNorm for Memory-Optimized Training of DNNs" (CVPR 2018).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_SLAB = 2**20  # numbers worked on at a time: few enough for the cache, so many that starting an operation costs nothing


def channels_last(x: Tensor) -> Tensor:
    """The map ``(B, C, *spatial)``, of any rank, with its memory laid out as ``(B, *spatial, C)``; ``x`` if it is so.

    A single channel counts as last only if its stride says so, as torch's convolutions see it.
    """
    tokens = x.movedim(1, -1)
    if tokens.is_contiguous() and x.stride(1) == 1:
        return x
    return tokens.contiguous().flatten().view(tokens.shape).movedim(-1, 1)


def instance_norm_act(x: Tensor, residual: Tensor | None = None, slope: float = 0.01, eps: float = 1e-5) -> Tensor:
    """``leaky_relu(instance_norm(x) + residual)``; the norm has no affine, its statistics are float32 or wider.

    Args:
        x: ``(B, C, *spatial)``. Overwritten where it is :func:`channels_last`, so whatever made it must not need it any
            more; a convolution does not.
        residual: of the shape of ``x``, or None.
        slope: of the activation below zero, positive since the backward pass divides by it; 1 is no activation.
        eps: added to the variance.

    Returns:
        A :func:`channels_last` tensor of the shape and dtype of ``x``. It can be differentiated once.

    Raises:
        ValueError: a slope that is not positive, maps of one voxel, a residual of another shape.
    """
    if slope <= 0:
        raise ValueError(f"slope must be positive, got {slope}; use 0.01, or 1 for no activation")
    if x[0, 0].numel() < 2:
        raise ValueError(f"instance norm needs maps of two voxels or more, got shape {tuple(x.shape)}")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")
        residual = channels_last(residual.to(x.dtype))
    out: Tensor = _InstanceNormAct.apply(x, residual, slope, eps)
    return out


class _InstanceNormAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, slope: float, eps: float) -> Tensor:
        y = channels_last(x)
        scales = []
        for tokens, *added in _images(y, residual):
            mean, variance = _moments(tokens)
            scales.append((variance + eps).rsqrt())
            _apply(tokens, added, scales[-1], -mean * scales[-1], slope)
        if y is x:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y, residual, *scales)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        y, residual, *scales = ctx.saved_tensors
        inner = torch.empty_like(y)  # gradient of what was activated, so of the residual
        outer = inner if residual is None else torch.empty_like(y)
        images = _images(channels_last(gradient), y, inner, outer, residual)
        for scale, (given, out, before, through, *added) in zip(scales, images, strict=True):
            _backward(given, out, before, through, added, scale, ctx.slope)
        return outer, None if residual is None else inner, None, None


def _apply(tokens: Tensor, added: list[Tensor], scale: Tensor, offset: Tensor, slope: float) -> None:
    """Write ``leaky_relu(tokens * scale + offset + added)`` over ``tokens``."""
    room = _room(tokens, scale.dtype)
    for slab, *others in _slabs(tokens, *added):
        wide = slab if slab.dtype == scale.dtype else room[: len(slab)].copy_(slab)
        torch.addcmul(offset, wide, scale, out=wide)
        for other in others:
            wide += other
        if slope != 1:
            F.leaky_relu_(wide, slope)
        if wide is not slab:
            slab.copy_(wide)


def _backward(
    given: Tensor, out: Tensor, before: Tensor, through: Tensor, added: list[Tensor], scale: Tensor, slope: float
) -> None:
    """From the gradient ``given`` of ``out``, write those ``before`` the activation and ``through`` the norm."""
    normalised, gradient = _room(out, scale.dtype), _room(out, scale.dtype)
    mean, slant = torch.zeros_like(scale), torch.zeros_like(scale)
    for g, y, d, *others in _slabs(given, out, before, *added):
        torch.ops.aten.leaky_relu_backward.grad_input(g, y, slope, True, grad_input=d)
        wide = gradient[: len(d)].copy_(d)
        mean += wide.sum(0)
        slant += wide.mul_(_normalised(y, others, slope, normalised)).sum(0)
    mean, slant = mean * scale / len(out), slant * scale / len(out)
    for d, y, target, *others in _slabs(before, out, through, *added):
        part = _normalised(y, others, slope, normalised).mul_(slant).add_(mean)
        target.copy_(gradient[: len(d)].copy_(d).mul_(scale).sub_(part))


def _normalised(out: Tensor, added: list[Tensor], slope: float, room: Tensor) -> Tensor:
    """What ``added`` was added to before the activation gave ``out``, written into ``room``."""
    normalised = room[: len(out)].copy_(out)
    if slope != 1:
        F.leaky_relu_(normalised, 1 / slope)
    for other in added:
        normalised -= other
    return normalised


def _moments(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``(C,)``, merged from those of the slabs so that nothing cancels (Chan et al., 1983)."""
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    room = _room(tokens, dtype)
    counts, means, squares = [], [], []
    for (slab,) in _slabs(tokens):
        wide = slab if slab.dtype == dtype else room[: len(slab)].copy_(slab)
        counts.append(len(slab))
        means.append(wide.mean(0))
        squares.append(torch.sub(wide, means[-1], out=room[: len(slab)]).square_().sum(0))
    count = torch.tensor(counts, dtype=dtype, device=tokens.device)[:, None]
    mean, square = torch.stack(means), torch.stack(squares)
    total = (count * mean).sum(0) / len(tokens)
    return total, (square + count * (mean - total).square()).sum(0) / len(tokens)


def _images(*maps: Tensor | None) -> Iterator[tuple[Tensor, ...]]:
    """Tokens ``(N, C)`` of all maps there are, one image of the batch after the other."""
    return zip(*(m.movedim(1, -1).flatten(1, -2) for m in maps if m is not None), strict=True)


def _slabs(*tokens: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same few tokens of all maps at a time."""
    return zip(*(torch.split(t, _step(t)) for t in tokens), strict=True)


def _room(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a slab, used again and again: to get new pages from the system costs more than to fill them."""
    return torch.empty(min(_step(tokens), len(tokens)), tokens.shape[1], dtype=dtype, device=tokens.device)


def _step(tokens: Tensor) -> int:
    return max(1, _SLAB // tokens.shape[1])
