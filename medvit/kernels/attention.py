"""The one call: attention within the windows of a token grid."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from medvit.kernels import dense, grouped, triton_attention
from medvit.kernels.bias import Bias, BiasTable
from medvit.kernels.windows import WindowGeometry

# In order of preference for backend="auto". The fused kernels agree in the interpreter and compile for a GPU, but none
# has run them yet: until then they are there by name only.
BACKENDS: dict[str, ModuleType] = {"grouped": grouped, "triton": triton_attention, "dense": dense}


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: WindowGeometry,
    *,
    bias: Bias = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention of each token over the tokens that share its window and region.

    Args:
        q: queries ``(B, *grid, heads, head_dim)``; logits are scaled by ``head_dim ** -0.5``.
        k: keys, of the same shape; for windows whose padding is attended also on the padded grid, see
            :meth:`~medvit.kernels.WindowGeometry.pad`, if padding tokens have other keys than zero.
        v: values, of the shape of ``k``.
        geometry: windows, fitted to the grid here. A grid that is not a whole number of windows is padded with zero
            tokens, attended unless the geometry masks them.
        bias: ``(heads, tokens, tokens)`` added to the logits of every window (the tokens of a fitted window), or the
            :class:`~medvit.kernels.BiasTable` that it is made from, or None.
        dropout: probability of dropping an attention weight; a layer passes 0 in evaluation.
        backend: ``"auto"`` or one of the names that :func:`explain` lists.

    Returns:
        ``(B, *grid, heads, head_dim)``.

    Raises:
        ValueError: an unknown backend or one that cannot run, tensors whose rank or shapes do not fit, a bias of
            another shape.
    """
    geometry = _check(q, k, v, geometry, bias)
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}: use 'auto' or one of {sorted(BACKENDS)}")
    reasons = {}
    for name in BACKENDS if backend == "auto" else (backend,):
        reason = _reason(name, q, geometry, dropout)
        if reason is None:
            out: Tensor = BACKENDS[name].run(q, k, v, geometry, bias, dropout)
            return out
        reasons[name] = reason
    raise ValueError(f"no backend can run this: {reasons}")


def explain(q: Tensor, geometry: WindowGeometry, *, dropout: float = 0.0) -> dict[str, str]:
    """What :func:`windowed_attention` would do with ``backend="auto"``: of each backend, in order, its fate.

    Args:
        q: queries ``(B, *grid, heads, head_dim)``; only shape, type and device matter.
        geometry: windows.
        dropout: see :func:`windowed_attention`.

    Returns:
        ``"chosen"``, ``"not needed"`` (could run too) or the reason why it cannot run, by name.
    """
    geometry = _check(q, q, q, geometry, None)
    reasons = {name: _reason(name, q, geometry, dropout) for name in BACKENDS}
    chosen = next(name for name, reason in reasons.items() if reason is None)
    return {name: "chosen" if name == chosen else reason or "not needed" for name, reason in reasons.items()}


windowed_attention.explain = explain  # type: ignore[attr-defined]


def _reason(name: str, q: Tensor, geometry: WindowGeometry, dropout: float) -> str | None:
    reason: str | None = BACKENDS[name].supports(q, geometry, dropout)
    return reason


def _check(q: Tensor, k: Tensor, v: Tensor, geometry: WindowGeometry, bias: Bias) -> WindowGeometry:
    """The fitted geometry."""
    dims = len(geometry.size)
    if q.dim() != dims + 3 or k.dim() != q.dim() or k.shape != v.shape:
        raise ValueError(
            f"a {dims}D geometry needs q, k, v of one shape (B, {dims} grid axes, heads, head_dim), "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    grid = q.shape[1 : 1 + dims]
    geometry = geometry.fit(grid)
    grids = [tuple(grid)] if geometry.mask_padding else [tuple(grid), geometry.padded(grid)]
    apart = (q.shape[0], *q.shape[1 + dims :]) != (k.shape[0], *k.shape[1 + dims :])
    if apart or tuple(k.shape[1 : 1 + dims]) not in grids:
        raise ValueError(
            f"k and v need q's shape (B, *grid, heads, head_dim), with one of the grids {grids}, "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if isinstance(bias, BiasTable):
        if bias.heads != q.shape[-2] or len(bias.window) != dims:
            raise ValueError(
                f"the bias table needs {q.shape[-2]} heads and {dims} axes, got {bias.heads} and {len(bias.window)}"
            )
    elif bias is not None and tuple(bias.shape) != (wanted := (q.shape[-2], geometry.tokens, geometry.tokens)):
        raise ValueError(f"bias must be (heads, tokens, tokens) = {wanted}, got {tuple(bias.shape)}")
    return geometry
