"""A grid's windows as tables of token numbers, sorted so that those in one table need the same mask: mostly none.

A shifted or padded window is cut along its regions, so that what remains attends in full; neither a roll nor a copy of
the padded grid is needed. Neighbourhoods are taken several queries at a time, with the union of their keys.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
from torch import Tensor

from medvit.kernels.windows import WindowGeometry

Numbers = tuple[int, ...]


@dataclass(frozen=True)
class Piece:
    """Windows with one pattern.

    Attributes:
        queries: numbers of the windows' queries on the grid, raster order, ``(windows, n)`` int64.
        keys: numbers of their keys on the keys' grid, ``(windows, m)``.
        pairs: entry of each pair in a matrix ``(tokens, tokens)`` of window members, ``(n, m)`` int64, -1 where a pair
            may not attend; None: the matrix as it is.
        masked: whether any may not.
    """

    queries: Tensor
    keys: Tensor
    pairs: Tensor | None
    masked: bool

    def offsets(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What to add to the logits, ``(heads or 1, n, m)``: the entries of a bias ``(heads, tokens, tokens)``."""
        if self.pairs is None:
            return None if bias is None else bias.to(dtype)
        if bias is None and not self.masked:
            return None
        if bias is None:
            out = torch.zeros(1, *self.pairs.shape, dtype=dtype, device=self.pairs.device)
        else:
            out = bias.to(dtype).flatten(1).index_select(1, self.pairs.clamp(min=0).flatten())
            out = out.reshape(-1, *self.pairs.shape)
        return out.masked_fill(self.pairs < 0, float("-inf")) if self.masked else out


@dataclass(frozen=True)
class _Pattern:
    """What windows along one axis have in common.

    Attributes:
        queries: window members of the queries.
        keys: of each query, or once for all, the window members of the keys; -1 where it may not attend.
    """

    queries: Numbers
    keys: tuple[Numbers, ...]

    def is_whole(self, size: int) -> bool:
        """Whether all of a window's members attend to all."""
        return self.queries == tuple(range(size)) and set(self.keys) == {self.queries}


Window = tuple[Numbers, Numbers]  # positions along one axis: of the queries, and of the keys


def pieces(geometry: WindowGeometry, grid: Sequence[int], keys: Sequence[int], device: torch.device) -> list[Piece]:
    """Cut a grid into pieces; cached.

    Args:
        geometry: fitted to ``grid``.
        grid: tokens per axis that ask.
        keys: tokens per axis that are asked: ``grid``, or the grid padded to whole windows.
        device: where the tables lie.
    """
    return _pieces(geometry, tuple(grid), tuple(keys), str(device))


@lru_cache(maxsize=128)
@torch.inference_mode(False)  # training may need the tables next
def _pieces(geometry: WindowGeometry, grid: Numbers, keys: Numbers, device: str) -> list[Piece]:
    runs = [_axis(geometry, axis, grid[axis], keys[axis]) for axis in range(len(grid))]
    return [_outer(geometry, grid, keys, axes, device) for axes in product(*(r.items() for r in runs))]


def _outer(
    geometry: WindowGeometry,
    grid: Numbers,
    key_grid: Numbers,
    axes: Sequence[tuple[_Pattern, list[Window]]],
    device: str,
) -> Piece:
    """The windows that have one given pattern along each axis."""
    queries, keys = torch.zeros(2, 1, 1, dtype=torch.int64, device="cpu")
    for axis, (_, runs) in enumerate(axes):
        queries = _ravel(queries, _table(q for q, _ in runs), grid[axis])
        keys = _ravel(keys, _table(k for _, k in runs), key_grid[axis])
    patterns = [pattern for pattern, _ in axes]
    if all(pattern.is_whole(size) for pattern, size in zip(patterns, geometry.size, strict=True)):
        return Piece(queries.to(device), keys.to(device), None, False)
    pairs = _pairs(patterns, geometry)
    return Piece(queries.to(device), keys.to(device), pairs.to(device), bool((pairs < 0).any()))


def _pairs(patterns: Sequence[_Pattern], geometry: WindowGeometry) -> Tensor:
    """See :class:`Piece`."""
    query, key = torch.zeros(2, 1, 1, dtype=torch.int64, device="cpu")
    allowed = torch.ones(1, 1, dtype=torch.int64, device="cpu")
    for pattern, size in zip(patterns, geometry.size, strict=True):
        asked = _table(pattern.keys).expand(len(pattern.queries), -1)
        query = _ravel(query, _table([pattern.queries]).T.expand_as(asked), size)
        key = _ravel(key, asked.clamp(min=0), size)
        allowed = _ravel(allowed, (asked >= 0).long(), 2)
    return torch.where(allowed == 2 ** (1 + len(patterns)) - 1, query * geometry.tokens + key, -1)


def _table(rows: Iterable[Numbers]) -> Tensor:
    return torch.tensor(list(rows), device="cpu")  # whatever the default device is


def _ravel(grid: Tensor, axis: Tensor, length: int) -> Tensor:
    """Numbers of windows and tokens over one more axis: all combinations of the rows, and of the columns."""
    both = grid[:, None, :, None] * length + axis[None, :, None, :]
    return both.reshape(grid.shape[0] * axis.shape[0], -1)


def _axis(geometry: WindowGeometry, axis: int, length: int, key_length: int) -> dict[_Pattern, list[Window]]:
    """Windows along one axis by their pattern."""
    cut = _sliding if geometry.stride else _blocked
    runs: dict[_Pattern, list[Window]] = defaultdict(list)
    for pattern, window in cut(geometry, axis, length, key_length):
        runs[pattern].append(window)
    return runs


def _blocked(geometry: WindowGeometry, axis: int, length: int, key_length: int) -> list[tuple[_Pattern, Window]]:
    """Windows cut along their regions, without masked padding."""
    size, shift, dilation = geometry.size[axis], geometry.shift[axis], geometry.dilation[axis]
    period = size * dilation
    padded = -(-length // period) * period
    # of each group: (member, position) of its tokens
    asks: dict[Numbers, list[tuple[int, int]]] = defaultdict(list)
    asked: dict[Numbers, list[tuple[int, int]]] = defaultdict(list)
    for rolled in range(padded):
        position = (rolled + shift) % padded  # on the padded axis
        # where padding follows the roll, the axis was rolled, padded and rolled back
        source = (rolled + shift) % length if geometry.roll_first and rolled < length else position
        real = rolled < length if geometry.roll_first else position < length
        group: Numbers = (rolled // period, rolled % dilation, int(position < shift))
        member = rolled // dilation % size
        if real:
            asks[group].append((member, source))
        if key_length == padded or real:
            asked[group].append((member, position if key_length == padded else source))
    out = []
    for group, queries in asks.items():
        members, positions = zip(*queries, strict=True)
        key_members, key_positions = zip(*asked[group], strict=True)
        out.append((_Pattern(members, (key_members,)), (positions, key_positions)))
    return out


def _sliding(geometry: WindowGeometry, axis: int, length: int, key_length: int) -> list[tuple[_Pattern, Window]]:
    """Neighbourhoods of a few queries at a time, with the union of their keys."""
    size, stride, dilation = geometry.size[axis], geometry.stride[axis], geometry.dilation[axis]
    together = max(1, size // 2 // stride) * stride
    out = []
    for residue in range(dilation):
        places = range(-(-(length - residue) // dilation))
        end = len(places)
        starts = [max(0, min(min(t // stride * stride + stride // 2, end - 1) - size // 2, end - size)) for t in places]
        for first in range(0, end, together):
            asks = places[first : first + together]
            asked = range(starts[asks[0]], starts[asks[-1]] + size)
            members = tuple(
                tuple(t - starts[a] if starts[a] <= t < starts[a] + size else -1 for t in asked) for a in asks
            )
            pattern = _Pattern(tuple(a - starts[a] for a in asks), members)
            positions, key_positions = (tuple(t * dilation + residue for t in ts) for ts in (asks, asked))
            out.append((pattern, (positions, key_positions)))
    return out
