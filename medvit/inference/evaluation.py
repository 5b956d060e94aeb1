"""Dice with its uncertainty, per case and per structure."""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medvit.errors import OutputError
from medvit.writers.base import atomic

logger = logging.getLogger("medvit")


def bootstrap_interval(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean over cases.

    Args:
        values: one number per case, finite.
        level: coverage.
        resamples: bootstrap draws.
        seed: of the draws.

    Returns:
        Lower and upper bound; both are the value itself where there is one case only.

    Raises:
        ValueError: no value, or one that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f"an interval needs finite values, one per case, got {values.tolist()}")
    if values.size == 1:
        return float(values[0]), float(values[0])
    rng = np.random.default_rng(seed)
    means = [rng.choice(values, values.size).mean() for _ in range(resamples)]
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    return float(low), float(high)


class DiceReport:
    """Ignite handler: writes ``dice.csv`` (per case) and ``dice.json`` (means with 95 % intervals) after an evaluation.

    A structure that a case's reference does not hold has no Dice there: its cell stays empty and means leave it out.

    Args:
        cases: names in the order of the data loader, which is not distributed over processes.
        structures: names of the foreground classes in order.
        folder: where to write; files of an earlier evaluation are replaced.
        metric: name of the MONAI ``MeanDice`` metric that excludes the background.
    """

    def __init__(
        self, cases: Sequence[str], structures: Sequence[str], folder: str | Path, metric: str = "val_mean_dice"
    ):
        self.cases, self.structures, self.folder, self.metric = list(cases), list(structures), Path(folder), metric

    def attach(self, engine: Any) -> None:
        """Register with an evaluator."""
        from ignite.engine import Events

        engine.add_event_handler(Events.COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write the report of a finished evaluation.

        Raises:
            OutputError: the scores do not belong to the cases.
        """
        dice = np.asarray(engine.state.metric_details[self.metric].cpu(), dtype=np.float64)
        if dice.shape != (len(self.cases), len(self.structures)):
            raise OutputError(
                f"{self.folder}: expected Dice of {len(self.cases)} cases and {len(self.structures)} structures, "
                f"got shape {dice.shape}"
            )
        present = np.isfinite(dice)
        counts = present.sum(axis=1)
        means = np.full(len(dice), np.nan)
        np.divide(np.where(present, dice, 0).sum(axis=1), counts, out=means, where=counts > 0)
        columns = {**dict(zip(self.structures, dice.T, strict=True)), "mean": means}
        summary = {"cases": len(self.cases)} | {name: _summary(values) for name, values in columns.items()}
        with (
            atomic(self.folder / "dice.csv", overwrite=True) as part,
            part.open("w", newline="", encoding="utf-8") as file,
        ):
            table = csv.writer(file, lineterminator="\n")
            table.writerow(["case", *columns])
            for case, *scores in zip(self.cases, *columns.values(), strict=True):
                table.writerow([case, *("" if np.isnan(score) else f"{score:.6f}" for score in scores)])
        with atomic(self.folder / "dice.json", overwrite=True) as part:
            part.write_text(json.dumps(summary, indent=4) + "\n", encoding="utf-8")
        for name, entry in summary.items():
            logger.info("%s: %s", name, entry)


def _summary(values: np.ndarray) -> dict[str, Any]:
    scores = values[np.isfinite(values)]
    if not scores.size:
        return {"cases": 0}
    low, high = bootstrap_interval(scores)
    return {
        "cases": len(scores),
        "mean": round(float(scores.mean()), 4),
        "interval_95": [round(low, 4), round(high, 4)],
        "min": round(float(scores.min()), 4),
    }
