"""How good a network is on cases that it is not trained on, while it trains: watchers for supervised objectives."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medvit.pretrain.agreement import Agreement, agreement, columns_of, dice, spacing_of
from medvit.pretrain.health import Inferer, Metric, View, at_once, evaluation, images_of


class Predictions:
    """Watcher for supervised training: scores on cases that are not trained on.

    Args:
        data: source with ``batch(indices)`` and labels.
        view: images of a batch to what the inferer takes.
        metrics: labels and scores to a number, by name; see :class:`FeatureHealth`.
        inferer: called with viewed images and the network, such as :class:`~medvit.inference.crops.MeanOverCrops`.
        activation: logits to scores; None: softmax over the classes. Of two classes the second one's score is kept.
            With several labels, ``(N, L)`` of 0 and 1, it is ``torch.sigmoid``.
        table: CSV file of case, label and scores, written at each call; None: none. Needs ``data.cases``, as
            :class:`~medvit.pretrain.images.CachedImages` has them.
        batch_size: images at a time.

    Attributes:
        scores: of the last call, float32 ``(N,)`` or ``(N, classes)``, in the order of ``data``; None before.
    """

    def __init__(
        self,
        data: Any,
        view: View,
        metrics: Mapping[str, Metric],
        *,
        inferer: Inferer = at_once,
        activation: Callable[[Tensor], Tensor] | None = None,
        table: str | Path | None = None,
        batch_size: int = 128,
    ):
        self.data, self.view, self.metrics, self.batch_size = data, view, dict(metrics), batch_size
        self.inferer = inferer
        self.activation, self.table = activation, None if table is None else Path(table)
        self.scores: Tensor | None = None

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        """Each metric, named ``val_NAME``."""
        network: Any = objective.network
        device = next(network.parameters()).device
        logits, labels = [], []
        with evaluation(objective), torch.no_grad():
            for first in range(0, len(self.data), self.batch_size):
                batch = self.data.batch(range(first, min(first + self.batch_size, len(self.data))))
                logits.append(self.inferer(self.view(images_of(batch).to(device)), network).float().cpu())
                labels.append(batch["label"])
        joined = torch.cat(logits)
        scores = self.activation(joined) if self.activation else joined.softmax(1)
        truth = torch.cat(labels)
        two_classes = truth.dim() == 1 and scores.shape[1:] == (2,)
        self.scores = scores[:, 1] if two_classes else scores
        if self.table is not None:
            write_table(self.table, self.data.cases, {**columns("label", truth), **columns("score", self.scores)})
        return {f"val_{name}": float(metric(truth, self.scores)) for name, metric in self.metrics.items()}


class Segmentations:
    """Watcher for segmentation: each structure of each case, on whole images, by its overlap and its surface.

    A structure that neither the reference nor the prediction of a case holds has no scores there, and means leave it
    out; see :class:`~medvit.pretrain.agreement.Agreement`.

    Args:
        data: items ``image`` ``(C, *spatial)`` and ``label`` ``(1, *spatial)`` of class numbers, of sizes the network
            takes; a MONAI data set, whose ``data`` names the cases. Spacing is that of the label, a MetaTensor.
        structures: names of the classes from 1.
        table: CSV file of scores per case, written at each call; None: none. Columns: Dice under the structure's own
            name, then ``surface_dice_NAME`` and ``hd95_NAME`` (mm).
        tolerance: mm, of surface Dice.

    Raises:
        TypeError: in a call, a label without a spacing, where there is a table.
    """

    def __init__(
        self, data: Any, structures: Sequence[str], *, table: str | Path | None = None, tolerance: float = 1.0
    ):
        self.data, self.structures, self.tolerance = data, tuple(structures), tolerance
        self.table = None if table is None else Path(table)

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        """Mean Dice over the cases, ``val_dice_NAME``, and over these, ``val_dice``."""
        network: Any = objective.network
        device = next(network.parameters()).device
        rows = []
        with evaluation(objective), torch.no_grad():
            for item in self.data:
                image, label = (torch.as_tensor(item[key]).as_subclass(Tensor) for key in ("image", "label"))
                found = network(image[None].to(device)).argmax(1)[0].cpu()
                masks = [(found == i, label[0] == i) for i in range(1, len(self.structures) + 1)]
                rows.append([self._scores(item["label"], *pair) for pair in masks])
        if self.table is not None:
            write_table(self.table, self.data.data, columns_of(self.structures, rows))
        scores = torch.tensor([[score.dice for score in row] for row in rows], dtype=torch.float64)
        means = {f"val_dice_{name}": float(scores[:, i].nanmean()) for i, name in enumerate(self.structures)}
        return {**means, "val_dice": float(torch.tensor(list(means.values())).nanmean())}

    def _scores(self, label: Tensor, found: Tensor, truth: Tensor) -> Agreement:
        if self.table is None:
            return Agreement(dice(found, truth), math.nan, math.nan)
        return agreement(found, truth, spacing_of(label), self.tolerance)


def columns(name: str, values: Tensor) -> dict[str, Tensor]:
    """``(N,)`` as the column ``name``, ``(N, K)`` as ``name_0`` and so on."""
    return {name: values} if values.dim() == 1 else {f"{name}_{i}": column for i, column in enumerate(values.T)}


def write_table(path: Path, cases: Sequence[Mapping[str, Any]], values: Mapping[str, Tensor]) -> None:
    """A CSV file with a row per case, for ``medvit evaluate``; written by the first process only, whole or not at all.

    Args:
        path: replaced.
        cases: each with the name ``case``, and all with ``group``, such as the patient, or none.
        values: columns ``(N,)``; NaN is an empty cell.
    """
    if dist.is_initialized() and dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        names = [name for name in ("case", "group") if name in cases[0]]
        table.writerow([*names, *values])
        for case, *row in zip(cases, *(column.tolist() for column in values.values()), strict=True):
            table.writerow(
                [
                    *(case[n] for n in names),
                    *("" if math.isnan(value) else repr(value).removesuffix(".0") for value in row),
                ]
            )
    part.replace(path)
