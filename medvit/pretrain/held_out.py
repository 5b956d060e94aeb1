"""The loss of images that a network is not trained on, image by image: how runs without labels are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvit.pretrain.health import evaluation
from medvit.pretrain.scores import write_table
from medvit.pretrain.stream import seed_everything


class HeldOutLoss:
    """Watcher for a :class:`~medvit.pretrain.trainer.Trainer`: every part of the objective's loss on held-out images.

    Image n is seen with the random numbers of (seed, n), so that all runs have to guess the same hidden patches. An
    objective that needs several images at a time, such as those with a contrast, cannot be asked so.

    Args:
        data: source with ``batch(indices)`` and ``cases``, such as :class:`~medvit.pretrain.images.CachedImages`; or
            several, e.g. one per rank.
        view: a batch to what the objective takes.
        table: CSV file of every part by case, for ``medvit evaluate``, written at each call; with several sources one
            file each, ``NAME_KEY.csv``, KEY as the source's batches call the images. None: none.
        seed: of what is hidden.
    """

    def __init__(
        self,
        data: Any,
        view: Callable[[dict[str, Tensor]], Mapping[str, Tensor]],
        *,
        table: str | Path | None = None,
        seed: int = 0,
    ):
        self.sources = list(data) if isinstance(data, list | tuple) else [data]
        self.view, self.seed, self.table = view, seed, None if table is None else Path(table)

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        """The mean over images of each part, ``val_NAME``."""
        found: dict[str, float] = {}
        with evaluation(objective), torch.no_grad(), torch.random.fork_rng():
            for source in self.sources:
                parts = self._parts(objective, source)
                found |= {f"val_{name}": float(values.mean()) for name, values in parts.items()}
                if self.table is not None:
                    write_table(self._path(source), source.cases, parts)
        return found

    def _parts(self, objective: nn.Module, source: Any) -> dict[str, Tensor]:
        """Float64 ``(N,)`` by name."""
        device = next(objective.parameters()).device
        rows: list[dict[str, Tensor]] = []
        for number in range(len(source)):
            batch = {key: value.to(device) for key, value in source.batch([number]).items()}
            seed_everything(self.seed, number)
            rows.append(objective(dict(self.view(batch)), 1.0).parts)
        return {name: torch.tensor([float(row[name]) for row in rows], dtype=torch.float64) for name in rows[0]}

    def _path(self, source: Any) -> Path:
        assert self.table is not None
        return self.table if len(self.sources) == 1 else self.table.with_stem(f"{self.table.stem}_{source.key}")
