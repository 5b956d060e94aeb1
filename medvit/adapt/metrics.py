"""What a table of predictions is worth: discrimination, decisions, calibration. Exact, ties included.

Labels are 0 or 1 per case, or class numbers where said; a metric that the cases at hand leave undefined (one class
only, say) raises :class:`Undefined`, it is never a silent 0 or NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

Floats = NDArray[np.float64]
Truths = NDArray[np.bool_]


class Undefined(ValueError):
    """The cases at hand do not define the metric, though each of them is sound."""


def check_binary(labels: ArrayLike, scores: ArrayLike) -> tuple[Truths, Floats]:
    """Labels ``(N,)`` of 0 and 1 as bool, and scores ``(..., N)`` as float64.

    Raises:
        ValueError: other labels, other lengths, no case, scores that are not finite.
    """
    y, s = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if y.ndim != 1 or not y.size or not s.ndim or s.shape[-1] != y.size:
        raise ValueError(f"labels and scores need one value per case, got shapes {y.shape} and {s.shape}")
    if y.dtype != np.bool_ and not ((y == 0) | (y == 1)).all():
        raise ValueError(f"labels must be 0 or 1, got {_some(y[(y != 0) & (y != 1)])}")
    if not np.isfinite(s).all():
        raise ValueError(f"scores must be finite, got {_some(s[~np.isfinite(s)])}")
    return y.astype(bool), s


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Area under the ROC curve: the chance that a positive scores above a negative, ties counting one half.

    Raises:
        Undefined: one class only.
        ValueError: see :func:`check_binary`.
    """
    y, s = check_binary(labels, scores)
    positive = int(y.sum())
    negative = y.size - positive
    if not positive or not negative:
        raise Undefined(f"AUROC needs positive and negative cases, got {positive} positive of {y.size}")
    rank_sum = rankdata(s)[y].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * negative))


def mean_auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """AUROC of scores ``(N, C)``: of two classes the second's, of more each against the others, averaged.

    Args:
        labels: class numbers ``(N,)``; or ``(N, C)`` of 0 and 1, several labels, of which those that are the same in
            all cases are left out of the mean.
        scores: higher is likelier; ``(N,)``: of the second of two classes.

    Raises:
        Undefined: a class that no case has, or no label that tells cases apart.
        ValueError: a class without scores; see :func:`check_binary`.
    """
    y, s = np.asarray(labels), np.asarray(scores)
    if s.ndim == 1:
        return auroc(y, s)
    if y.ndim == 1 and y.size and y.max() >= s.shape[1]:
        raise ValueError(f"every class needs a column of scores, got {s.shape[1]} of them and the class {y.max()}")
    if y.ndim == 2:
        told = [(truth, score) for truth, score in zip(y.T, s.T, strict=True) if 0 < truth.sum() < len(truth)]
        if not told:
            raise Undefined(f"AUROC needs a label with positive and negative cases, none of {y.shape[1]} has both")
    else:
        told = [(y == number, score) for number, score in enumerate(s.T)][1 if s.shape[1] == 2 else 0 :]
    return float(np.mean([auroc(truth, score) for truth, score in told]))


def average_precision(labels: ArrayLike, scores: ArrayLike) -> float:
    """Precision summed over the steps of recall, equal scores being one step; no interpolation.

    Raises:
        Undefined: no positive case.
        ValueError: see :func:`check_binary`.
    """
    y, s = check_binary(labels, scores)
    if not y.any():
        raise Undefined(f"average precision needs a positive case, got {y.size} negative ones")
    order = np.argsort(-s, kind="stable")
    last = np.append(np.flatnonzero(np.diff(s[order])), y.size - 1)  # of each run of equal scores
    hits = np.cumsum(y[order])[last]
    return float((np.diff(hits, prepend=0) * hits / (last + 1)).sum() / hits[-1])


def accuracy(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Fraction of cases whose prediction is the label; classes of any kind.

    Raises:
        ValueError: other lengths, or no case.
    """
    y, predicted = np.asarray(labels), np.asarray(predictions)
    if y.ndim != 1 or y.shape != predicted.shape or not y.size:
        raise ValueError(f"labels and predictions need one value per case, got shapes {y.shape} and {predicted.shape}")
    return float((y == predicted).mean())


def sensitivity(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Fraction of the positive cases that are predicted positive.

    Raises:
        Undefined: no positive case.
        ValueError: see :func:`check_binary`.
    """
    y, predicted = check_binary(labels, predictions)
    if not y.any():
        raise Undefined(f"sensitivity needs a positive case, got {y.size} negative ones")
    return float((predicted[y] == 1).mean())


def specificity(labels: ArrayLike, predictions: ArrayLike) -> float:
    """Fraction of the negative cases that are predicted negative.

    Raises:
        Undefined: no negative case.
        ValueError: see :func:`check_binary`.
    """
    y, predicted = check_binary(labels, predictions)
    if y.all():
        raise Undefined(f"specificity needs a negative case, got {y.size} positive ones")
    return float((predicted[~y] == 0).mean())


# --- calibration


def check_probabilities(labels: ArrayLike, probabilities: ArrayLike) -> tuple[NDArray[Any], Floats]:
    """Labels ``(N,)`` with probabilities ``(N,)`` of the positive class, or class numbers with ``(N, C)``.

    Raises:
        ValueError: other labels, lengths or shapes, probabilities outside of [0, 1], rows that do not sum to 1.
    """
    p = np.asarray(probabilities, dtype=np.float64)
    if p.size and not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"probabilities must lie in [0, 1], got {_some(p[~((p >= 0) & (p <= 1))])}; apply the sigmoid")
    if p.ndim != 2:
        y, _ = check_binary(labels, p)
        return y, p
    y = np.asarray(labels)
    if y.shape != p.shape[:1] or not y.size or not np.isin(y, np.arange(p.shape[1])).all():
        raise ValueError(f"probabilities {p.shape} need one class number below {p.shape[1]} per case, got {_some(y)}")
    if not np.allclose(p.sum(axis=1), 1, atol=1e-3):
        raise ValueError(f"probabilities of the classes must sum to 1, got {_some(p.sum(axis=1))}; apply the softmax")
    return y.astype(np.int64), p


def brier(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean squared error of the probabilities; of several classes, summed over these (Brier 1950: 0 to 2).

    Raises:
        ValueError: see :func:`check_probabilities`.
    """
    y, p = check_probabilities(labels, probabilities)
    if p.ndim == 1:
        return float(((p - y) ** 2).mean())
    return float(((p - np.eye(p.shape[1])[y]) ** 2).sum(axis=1).mean())


class Bin(NamedTuple):
    """Cases of like probability.

    Attributes:
        low, high: least and greatest probability in the bin.
        n: number of cases.
        predicted: their mean probability.
        observed: the fraction of them for which it came true.
    """

    low: float
    high: float
    n: int
    predicted: float
    observed: float


def reliability(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> list[Bin]:
    """Predicted against observed frequency, in adaptive bins: as many cases in each, equal probabilities together.

    Of several classes it is the probability of the likeliest class, and whether that is the label.

    Args:
        labels: see :func:`check_probabilities`.
        probabilities: likewise.
        bins: number of bins; fewer come back where probabilities repeat.

    Raises:
        ValueError: no bins; see :func:`check_probabilities`.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}; use 10")
    y, p = check_probabilities(labels, probabilities)
    if p.ndim == 2:
        y, p = p.argmax(axis=1) == y, p.max(axis=1)
    edges = np.quantile(p, np.arange(1, bins) / bins, method="inverted_cdf")
    number = np.searchsorted(edges, p)
    parts = [(p[number == i], y[number == i]) for i in np.unique(number)]
    return [Bin(float(q.min()), float(q.max()), q.size, float(q.mean()), float(t.mean())) for q, t in parts]


def calibration_error(labels: ArrayLike, probabilities: ArrayLike, bins: int = 10) -> float:
    """Expected calibration error: mean distance of predicted and observed frequency over the bins, by their cases.

    It is never below 0, so that a bootstrap interval of a small error lies above it.

    Args:
        labels: see :func:`check_probabilities`.
        probabilities: likewise.
        bins: see :func:`reliability`.

    Source: Nguyen and O'Connor, "Posterior calibration and exploratory analysis for natural language processing
    models" (EMNLP 2015), adaptive bins.
    """
    table = reliability(labels, probabilities, bins)
    return sum(b.n * abs(b.predicted - b.observed) for b in table) / sum(b.n for b in table)


def _some(values: NDArray[Any], most: int = 5) -> str:
    shown = np.unique(values)[:most].tolist()
    return ", ".join(map(str, shown)) + (", ..." if np.unique(values).size > most else "")
