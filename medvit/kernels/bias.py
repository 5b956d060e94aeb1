"""What is added to the logits of every window: a matrix, or the table of relative positions it is made from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from torch import Tensor

from medvit.kernels.windows import WindowGeometry


@dataclass(frozen=True)
class BiasTable:
    """Logit offset for each relative position in a window and each head; a backend may read it inside its kernel.

    Args:
        table: ``(prod(2 * window - 1), heads)``, raster order of offsets query minus key.
        window: per-axis window that the table is made for.
        clamp: what a smaller window reads. ``"exact"``: the rows of its true offsets. ``"prefix"``: its members are
            counted in raster order and taken for those of ``window`` with the same numbers, as MONAI does.

    Raises:
        ValueError: another ``clamp``, or a table of another shape.

    Source: Liu et al., "Swin Transformer" (ICCV 2021), eq. 4.
    """

    table: Tensor
    window: tuple[int, ...]
    clamp: str = "exact"

    def __post_init__(self) -> None:
        if self.clamp not in ("exact", "prefix"):
            raise ValueError(f"clamp must be 'exact' or 'prefix', got {self.clamp!r}")
        rows = prod([2 * w - 1 for w in self.window])  # a list: graphs are traced through here
        if self.table.dim() != 2 or self.table.shape[0] != rows:
            raise ValueError(f"a table for windows of {self.window} is ({rows}, heads), got {tuple(self.table.shape)}")

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.table.shape[1]

    def index(self, geometry: WindowGeometry) -> Tensor:
        """Row of the table for each pair of a fitted window's tokens, ``(tokens, tokens)`` int64.

        Raises:
            ValueError: a window larger than the table's.
        """
        n, device = geometry.tokens, self.table.device
        if self.clamp == "prefix":
            if n > prod(self.window):
                raise ValueError(f"windows of {geometry.size} need a table for as many, got one for {self.window}")
            return WindowGeometry.full(self.window).relative_index(device=device)[:n, :n]
        return geometry.relative_index(self.window, device)

    def dense(self, geometry: WindowGeometry) -> Tensor:
        """``(heads, tokens, tokens)`` for the windows of a fitted geometry."""
        # heads first, so that nothing has to be permuted afterwards
        rows = self.table.t().contiguous().index_select(1, self.index(geometry).flatten())
        return rows.reshape(-1, geometry.tokens, geometry.tokens)


Bias = Tensor | BiasTable | None


def dense_bias(bias: Bias, geometry: WindowGeometry) -> Tensor | None:
    """``(heads, tokens, tokens)`` for a fitted geometry, or None."""
    return bias.dense(geometry) if isinstance(bias, BiasTable) else bias
