"""The batches of a run as a function of one seed: which items, in which order, with which random numbers.

Nothing here remembers anything. Batch ``m`` of a run is the same whether the run came there in one go, was killed and
resumed, or is spread over several processes; and its random transforms are the same with any number of workers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

ORDER, ITEM, BATCH = range(3)  # purposes of random numbers, so that no two share a stream


def seed_everything(*key: int) -> None:
    """Seed the generators of torch (all devices), numpy and Python from a key of whole numbers >= 0."""
    words = np.random.SeedSequence(key).generate_state(4)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:])  # noqa: NPY002  # the global generator is what third-party transforms draw from
    random.seed(int(words[3]))


class Key(NamedTuple):
    """One item of a run: of which source, in which epoch, at which index of the source."""

    source: int
    epoch: int
    item: int


class Stream:
    """Batches of one or several sources.

    Several sources take turns: batch ``m`` is all of source ``m % len(sources)``, so that they may differ in shape and
    rank. Each source is an endless sequence of seeded permutations, cut into batches; no item is dropped.

    Args:
        sources: data sets. An item is a mapping whose tensors, arrays and numbers are stacked and whose other entries
            are left out. A source that has a method ``batch(indices) -> Mapping[str, Tensor]`` makes whole batches
            itself, and must then draw no random numbers.
        batch_size: items per batch over all processes.
        seed: of everything.
        rank, world: which of how many processes this is; each gets its contiguous part of every batch.
        num_workers: processes that load ahead; 0: none.

    Raises:
        ValueError: no source, an empty one, or a batch that the processes cannot share evenly.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        batch_size: int,
        *,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
    ):
        if not sources or not all(len(source) for source in sources):
            raise ValueError(f"every source of data needs items, got sizes {[len(source) for source in sources]}")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"{world} processes must share a batch evenly, got {batch_size} items; use {world} or 2x")
        self.sources, self.batch_size, self.seed = list(sources), batch_size, seed
        self.rank, self.world, self.num_workers = rank, world, num_workers
        self._order: tuple[tuple[int, int], list[int]] = ((-1, -1), [])

    def batches_in(self, epochs: float) -> int:
        """Batches, all sources together, in which the first source is seen ``epochs`` times; rounded up."""
        return ceil(epochs * len(self.sources[0]) / self.batch_size) * len(self.sources)

    def epochs_in(self, batches: int) -> float:
        """How often the first source has been seen after ``batches`` batches."""
        return ceil(batches / len(self.sources)) * self.batch_size / len(self.sources[0])

    def keys(self, number: int) -> list[Key]:
        """What this process loads for batch ``number`` of the run."""
        turn, source = divmod(number, len(self.sources))
        size, part = len(self.sources[source]), self.batch_size // self.world
        first = turn * self.batch_size + self.rank * part
        return [
            Key(source, place // size, self._permutation(source, place // size)[place % size])
            for place in range(first, first + part)
        ]

    def _permutation(self, source: int, epoch: int) -> list[int]:
        if self._order[0] != (source, epoch):  # the last one is kept
            key = np.random.SeedSequence((self.seed, ORDER, source, epoch))
            order = np.random.default_rng(key).permutation(len(self.sources[source]))
            self._order = (source, epoch), order.tolist()
        return self._order[1]

    def batches(self, first: int, end: int, *, pin_memory: bool = False) -> Iterator[dict[str, Tensor]]:
        """Batches ``first`` to ``end - 1`` of the run, this process's part."""
        loader: DataLoader[dict[str, Tensor]] = DataLoader(
            _Items(self.sources, self.seed),  # type: ignore[arg-type]  # a Dataset is what can be indexed
            batch_sampler=(self.keys(number) for number in range(first, end)),
            collate_fn=_as_is,
            num_workers=self.num_workers,
            pin_memory=pin_memory,
        )
        return iter(loader)


class _Items:
    """All sources as one map-style data set, whose every item has random numbers of its own."""

    def __init__(self, sources: Sequence[Any], seed: int):
        self.sources, self.seed = sources, seed

    def __getitems__(self, keys: Sequence[Key]) -> dict[str, Tensor]:
        source = self.sources[keys[0].source]
        make: Callable[[list[int]], Mapping[str, Tensor]] | None = getattr(source, "batch", None)
        if make is not None:
            return dict(make([key.item for key in keys]))
        items: dict[str, Tensor] = default_collate([self._item(source, key) for key in keys])
        return items

    def _item(self, source: Any, key: Key) -> dict[str, Tensor]:
        seed_everything(self.seed, ITEM, *key)
        _seed_transforms(source)
        return {name: _plain(value) for name, value in source[key.item].items() if _is_number(value)}


def _seed_transforms(source: Any) -> None:
    """MONAI's transforms have generators of their own; those of a data set, and of the ones that it is made of."""
    seed = getattr(getattr(source, "transform", None), "set_random_state", None)
    if seed is not None:
        seed(seed=random.getrandbits(32))
    for inner in (getattr(source, "dataset", None), *getattr(source, "datasets", ())):  # Subset, ConcatDataset
        if inner is not None:
            _seed_transforms(inner)


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor | np.ndarray | np.number | int | float)


def _plain(value: Any) -> Tensor:
    """Without what a subclass, such as MONAI's MetaTensor, carries along."""
    return torch.as_tensor(value).as_subclass(Tensor)


def _as_is(batch: Any) -> Any:
    return batch
