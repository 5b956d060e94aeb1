"""The one call: attention within the windows of a token grid."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from medvit.kernels import dense, grouped
from medvit.kernels.windows import WindowGeometry

# in order of preference for backend="auto"
BACKENDS: dict[str, ModuleType] = {"grouped": grouped, "dense": dense}


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: WindowGeometry,
    *,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each token over the tokens that share its window and region.

    Args:
        q: queries ``(B, *grid, heads, head_dim)``; logits are scaled by ``head_dim ** -0.5``.
        k: keys, of the same shape.
        v: values, of the same shape.
        geometry: windows, fitted to the grid here. A grid that is not a whole number of windows is padded with zero
            tokens, attended unless the geometry masks them.
        bias: ``(heads, tokens, tokens)`` added to the logits of every window, or None; the tokens of a fitted window.
        dropout: probability of dropping an attention weight; a layer passes 0 in evaluation.
        backend: ``"auto"``, ``"grouped"`` (torch SDPA per window) or ``"dense"`` (the definition, for tests).

    Returns:
        ``(B, *grid, heads, head_dim)``.

    Raises:
        ValueError: an unknown backend, tensors whose rank or shapes do not fit, a bias of another shape.
    """
    dims = len(geometry.size)
    if q.dim() != dims + 3 or q.shape != k.shape or q.shape != v.shape:
        raise ValueError(
            f"a {dims}D geometry needs q, k, v of one shape (B, {dims} grid axes, heads, head_dim), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    geometry = geometry.fit(q.shape[1 : 1 + dims])
    wanted = (q.shape[-2], geometry.tokens, geometry.tokens)
    if bias is not None and tuple(bias.shape) != wanted:
        raise ValueError(f"bias must be (heads, tokens, tokens) = {wanted}, got {tuple(bias.shape)}")
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: use 'auto' or one of {sorted(BACKENDS)}")
    reasons = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = BACKENDS[name].supports(q, geometry)
        if reason is None:
            out: Tensor = BACKENDS[name].run(q, k, v, geometry, bias, dropout)
            return out
        reasons[name] = reason
    raise ValueError(f"no backend can run this: {reasons}")
