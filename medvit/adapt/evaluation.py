"""From a table of cases to metrics with intervals, and from two tables to paired differences with p values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvit.adapt.metrics import (
    Bin,
    Floats,
    Undefined,
    accuracy,
    auroc,
    average_precision,
    brier,
    calibration_error,
    reliability,
    sensitivity,
    specificity,
)
from medvit.adapt.statistics import (
    Comparison,
    Interval,
    Statistic,
    bootstrap,
    bootstrap_difference,
    delong_interval,
    delong_test,
    holm,
    wilcoxon,
)
from medvit.adapt.tables import Predictions, Table, check_same_labels
from medvit.errors import MedvitError, UnreadableFile

Metric = Callable[[NDArray[Any], NDArray[Any]], float]
RANKING: dict[str, Metric] = {"auroc": auroc, "average_precision": average_precision}
DECIDING: dict[str, Metric] = {"accuracy": accuracy, "sensitivity": sensitivity, "specificity": specificity}
CALIBRATION: dict[str, Metric] = {"brier": brier, "ece": calibration_error}
METRICS = (*RANKING, *DECIDING, *CALIBRATION)
MACRO = "macro"


@dataclass(frozen=True)
class Measure:
    """One number of a table.

    Attributes:
        metric: its name.
        target: the class or label it speaks of; :data:`MACRO`: the mean over all of them; empty: the table has one.
        statistic: the number for any of the cases, by their indices.
        ranked: labels and scores of an AUROC, for which DeLong's formulas hold; None: another metric.
        per_case: the values whose mean it is, for Wilcoxon's test; None: it is no mean over a column.
    """

    metric: str
    target: str
    statistic: Statistic
    ranked: tuple[NDArray[Any], Floats] | None = None
    per_case: Floats | None = None


@dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
        resamples, seed: see :func:`~medvit.adapt.statistics.bootstrap`.
        threshold: scores from here on are a positive decision, for two classes and for labels.
    """

    resamples: int = 10_000
    seed: int = 0
    threshold: float = 0.5


def evaluate(table: Table, metrics: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Each metric with its interval.

    Args:
        table: one row per case.
        metrics: names of :data:`METRICS`, or columns of numbers, whose means are taken.
        settings: see :class:`Settings`.

    Returns:
        One mapping for each metric and target: ``metric``, ``target``, ``n`` cases, ``groups`` (their number, or None),
        ``value``, ``low``, ``high`` (95 %) and ``interval``, how it was made: ``delong``; ``bootstrap``, or ``bootstrap
        by group``, in which all cases of a group are drawn together. Where the cases are too few for a class or label
        the bounds are None, and the value too if it has none, and ``interval`` says why. :data:`MACRO` is the mean
        over those that have a value, in every draw anew.

    Raises:
        UnreadableFile: the table does not hold what the metrics need, or is too small for any interval.
    """
    return _told(
        table, [_row(table, measure, settings) for metric in metrics for measure in _measures(table, metric, settings)]
    )


def compare(table: Table, other: Table, metrics: Sequence[str], settings: Settings) -> list[dict[str, Any]]:
    """Each metric of two runs over the same cases, and their paired difference.

    Args:
        table: of the run in question.
        other: of the run it is compared with.
        metrics: see :func:`evaluate`.
        settings: see :class:`Settings`.

    Returns:
        As of :func:`evaluate`, with ``against``, the value of the other run, ``difference``, ``difference_low``,
        ``difference_high`` (95 %), ``p``, ``test`` (``delong``, ``wilcoxon`` or ``bootstrap``) and ``p_holm``, adjusted
        for the number of rows; None where the cases are too few.

    Raises:
        UnreadableFile: other cases, groups or labels in the two tables, or not what the metrics need, or too few cases.
    """
    other = other.in_order_of(table)
    ours, theirs = table.predictions(), other.predictions()
    if ours and theirs:
        check_same_labels(table, other, ours, theirs)
    rows = []
    for metric in metrics:
        if metric in table.columns or metric in other.columns:
            for one in (table, other):  # it must not be a metric of the labels in one of them
                one.numbers(metric)
        pairs = zip(_measures(table, metric, settings), _measures(other, metric, settings), strict=True)
        rows += [{**_row(table, a, settings), **_paired(table, other, a, b, settings)} for a, b in pairs]
    adjusted = iter(holm([row["p"] for row in rows if row["p"] is not None]))
    return _told(table, [{**row, "p_holm": None if row["p"] is None else next(adjusted)} for row in rows])


def calibration(table: Table, bins: int = 10) -> list[tuple[str, Bin]]:
    """Reliability table of each label, or of the likeliest class of several; see
    :func:`~medvit.adapt.metrics.reliability`.

    Raises:
        UnreadableFile: a table without labels, or scores that are no probabilities.
    """
    found = _needed(table)
    try:
        if found.kind == "classes":
            return [("", b) for b in reliability(found.labels.argmax(axis=1), found.scores, bins)]
        targets = enumerate(found.names)
        return [(n, b) for i, n in targets for b in reliability(found.labels[:, i], found.scores[:, i], bins)]
    except ValueError as error:
        raise UnreadableFile(table.path, str(error)) from error


# --- measures


def _measures(table: Table, metric: str, settings: Settings) -> list[Measure]:
    if metric in METRICS and metric not in table.columns:
        return list(_predicted(_needed(table), metric, settings.threshold))
    values = table.numbers(metric)
    return [Measure(metric, "", lambda i: float(values[i].mean()), per_case=values)]


def _needed(table: Table) -> Predictions:
    found = table.predictions()
    if found is None:
        raise UnreadableFile(table.path, f"needs labels and scores, has {', '.join(table.columns)}")
    return found


def _predicted(found: Predictions, metric: str, threshold: float) -> Iterator[Measure]:
    """Measures of labels and scores: one per target, then their mean; of several classes as a whole one measure."""
    labels, scores = found.labels, found.scores
    whole = found.kind == "classes" and (metric == "accuracy" or metric in CALIBRATION)
    if found.kind == "classes" and metric in DECIDING:
        likeliest = scores.argmax(axis=1)
        scores = np.eye(len(found.names))[likeliest]
    elif metric in DECIDING:
        scores = (scores >= threshold).astype(np.float64)
    if whole:
        numbers = labels.argmax(axis=1)
        given = scores.argmax(axis=1) if metric in DECIDING else scores
        yield Measure(metric, "", _statistic(metric, numbers, given))
        return
    single = [_statistic(metric, labels[:, c], scores[:, c]) for c in range(len(found.names))]
    for c, (name, statistic) in enumerate(zip(found.names, single, strict=True)):
        yield Measure(metric, name, statistic, (labels[:, c], scores[:, c]) if metric == "auroc" else None)
    if len(single) > 1:
        yield Measure(metric, MACRO, lambda i: _mean_of_defined(single, i))


def _mean_of_defined(statistics: Sequence[Statistic], cases: NDArray[np.intp]) -> float:
    values = []
    for statistic in statistics:
        try:
            values.append(statistic(cases))
        except Undefined as error:
            reason = error
    if not values:
        raise reason
    return float(np.mean(values))


def _statistic(metric: str, labels: NDArray[Any], scores: NDArray[Any]) -> Statistic:
    function = {**RANKING, **DECIDING, **CALIBRATION}[metric]
    return lambda i: function(labels[i], scores[i])


# --- rows


def _row(table: Table, measure: Measure, settings: Settings) -> dict[str, Any]:
    groups = _grouped(table)
    try:
        if measure.ranked and groups is None:
            found, how = delong_interval(*measure.ranked), "delong"
        else:
            found = bootstrap(
                measure.statistic, len(table.cases), groups=groups, resamples=settings.resamples, seed=settings.seed
            )
            how = "bootstrap" if groups is None else "bootstrap by group"
        bounds: tuple[float | None, ...] = Interval(*found)
    except Undefined as error:
        bounds, how = (_value(measure, len(table.cases)), None, None), str(error)
    except ValueError as error:
        raise _refusal(table, measure, error) from error
    return {
        "metric": measure.metric,
        "target": measure.target,
        "n": len(table.cases),
        "groups": None if groups is None else len(set(groups)),
        **dict(zip(("value", "low", "high"), bounds, strict=True)),
        "interval": how,
    }


def _value(measure: Measure, cases: int) -> float | None:
    try:
        return float(measure.statistic(np.arange(cases)))
    except Undefined:
        return None


def _told(table: Table, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, unless none of them has an interval."""
    if rows and all(row["low"] is None for row in rows):
        of = f" of {rows[0]['target']}" if rows[0]["target"] else ""
        raise UnreadableFile(table.path, f"{rows[0]['metric']}{of}: {rows[0]['interval']}")
    return rows


def _paired(table: Table, other: Table, first: Measure, second: Measure, settings: Settings) -> dict[str, Any]:
    groups = _grouped(table)
    against = _value(second, len(other.cases))
    names = ("difference", "difference_low", "difference_high", "p")
    try:
        found, test = _tested(first, second, len(table.cases), groups, settings)
        if first.per_case is not None and second.per_case is not None:
            found, test = found._replace(p=wilcoxon(first.per_case, second.per_case, groups=groups)), "wilcoxon"
    except Undefined as error:
        return {"against": against, **dict.fromkeys(names), "test": str(error)}
    except ValueError as error:
        raise _refusal(other, second, error) from error
    return {"against": against, **dict(zip(names, found, strict=True)), "test": test}


def _tested(
    first: Measure, second: Measure, cases: int, groups: Sequence[str] | None, settings: Settings
) -> tuple[Comparison, str]:
    if first.ranked and second.ranked and groups is None:
        try:
            return delong_test(first.ranked[0], first.ranked[1], second.ranked[1]), "delong"
        except Undefined:  # without variance; too few cases are so for the bootstrap too
            pass
    found = bootstrap_difference(
        first.statistic, second.statistic, cases, groups=groups, resamples=settings.resamples, seed=settings.seed
    )
    return found, "bootstrap"


def _grouped(table: Table) -> list[str] | None:
    """Groups, if any holds several cases; otherwise cases are independent as they are."""
    return table.groups if table.groups and len(set(table.groups)) < len(table.groups) else None


def _refusal(table: Table, measure: Measure, error: ValueError) -> MedvitError:
    of = f" of {measure.target}" if measure.target else ""
    return UnreadableFile(table.path, f"{measure.metric}{of}: {error}")
