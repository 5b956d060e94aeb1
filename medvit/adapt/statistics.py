"""How sure a number is: intervals over cases, and paired comparisons of two runs on the same cases.

Every interval speaks of other patients of the same kind, with the network as it is; it does not hold the spread of
another training. Where several cases belong to one patient, ``groups`` names the patient: resampling and tests then
take patients, not cases, as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats
from scipy.stats import rankdata

from medvit.adapt.metrics import Floats, Undefined, check_binary

Indices = NDArray[np.intp]
Statistic = Callable[[Indices], float]
METHODS = ("percentile", "bca")
MOST_UNDEFINED = 0.1  # of all draws


class Interval(NamedTuple):
    """An estimate and the bounds of its interval."""

    point: float
    low: float
    high: float


class Comparison(NamedTuple):
    """First run minus second: estimate, bounds of its interval, two-sided p of no difference."""

    difference: float
    low: float
    high: float
    p: float


# --- bootstrap


def bootstrap(
    statistic: Statistic,
    cases: int,
    *,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    method: str = "percentile",
) -> Interval:
    """Bootstrap interval of any statistic of cases.

    A draw for which the statistic is :class:`~medvit.adapt.metrics.Undefined` (no positive case in it) is drawn anew.

    Args:
        statistic: of the cases with these indices, repeats included.
        cases: their number N.
        groups: N names; all cases of a name are drawn together. None: every case by itself.
        level: coverage.
        resamples: bootstrap draws.
        seed: of the draws; equal seeds draw equal cases, whatever the statistic.
        method: ``"percentile"``, or ``"bca"``: corrected for bias and skewness by a jackknife over cases or groups.

    Raises:
        ValueError: fewer than two cases or groups; values out of range; BCa where it has no value.
        Undefined: the statistic of all cases, or more than one draw in ten.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapters 13 and 14.
    """
    _check_choices(level, resamples)
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}")
    units = _Units(cases, groups)
    point = statistic(units.everything)
    draws = _draws(statistic, units, resamples, seed)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        tails = _bca_tails(tails, point, draws, statistic, units)
    low, high = np.quantile(draws, tails)
    return Interval(float(point), float(low), float(high))


def bootstrap_difference(
    first: Statistic,
    second: Statistic,
    cases: int,
    *,
    groups: Sequence[Any] | NDArray[Any] | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Paired comparison: both statistics on the same draws of cases.

    The interval is the percentile one, and p its inversion: the least level at which the interval leaves out 0, no
    smaller than ``2 / (resamples + 1)``.

    Args:
        first: statistic of one run.
        second: statistic of the other run, of the same cases in the same order.
        cases: see :func:`bootstrap`, as for what follows.
        groups: names of groups.
        level: coverage.
        resamples: bootstrap draws.
        seed: of the draws.

    Raises:
        ValueError, Undefined: see :func:`bootstrap`.
    """
    _check_choices(level, resamples)
    units = _Units(cases, groups)

    def difference(indices: Indices) -> float:
        return first(indices) - second(indices)

    draws = _draws(difference, units, resamples, seed)
    low, high = np.quantile(draws, ((1 - level) / 2, (1 + level) / 2))
    tail = min((draws <= 0).sum(), (draws >= 0).sum())
    p = min(1.0, 2 * (float(tail) + 1) / (resamples + 1))
    return Comparison(float(difference(units.everything)), float(low), float(high), p)


class _Units:
    """What is drawn: groups of cases, or single cases; laid out one after the other."""

    def __init__(self, cases: int, groups: Sequence[Any] | NDArray[Any] | None):
        if groups is not None and len(groups) != cases:
            raise ValueError(f"groups need one name per case, got {len(groups)} for {cases} cases")
        self.everything = np.arange(cases)
        number = np.unique(np.asarray(groups), return_inverse=True)[1] if groups is not None else self.everything
        self.order: Indices = np.argsort(number, kind="stable")
        self.counts = np.bincount(number) if cases else np.zeros(0, dtype=np.intp)
        self.starts = np.cumsum(self.counts) - self.counts
        if len(self.counts) < 2:
            what = "cases" if groups is None else "groups"
            raise ValueError(f"an interval needs at least two independent {what}, got {len(self.counts)}")

    def cases(self, picks: Indices) -> Indices:
        """Indices of all cases of the units ``picks``."""
        counts = self.counts[picks]
        ends = np.cumsum(counts)
        within = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
        chosen: Indices = self.order[np.repeat(self.starts[picks], counts) + within]
        return chosen


def _draws(statistic: Statistic, units: _Units, resamples: int, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    number = len(units.counts)
    values, undefined = np.empty(resamples), 0
    for i in range(resamples):
        while True:
            try:
                values[i] = statistic(units.cases(rng.integers(number, size=number)))
                break
            except Undefined as error:
                undefined += 1
                if undefined > MOST_UNDEFINED * resamples:
                    raise Undefined(
                        f"more than one draw in ten is undefined ({error}): too few cases of a class for an interval"
                    ) from error
    return values


def _bca_tails(tails: Floats, point: float, draws: Floats, statistic: Statistic, units: _Units) -> Floats:
    """Levels of the percentiles to take, Efron and Tibshirani eq. 14.10; draws equal to the point count one half."""
    below = (np.mean(draws < point) + np.mean(draws <= point)) / 2
    everyone = np.arange(len(units.counts))
    try:
        left_out = np.array([statistic(units.cases(np.delete(everyone, i))) for i in everyone])
    except Undefined as error:
        raise ValueError(f"BCa leaves out each case once, then {error}; use method='percentile'") from error
    if not 0 < below < 1:
        raise ValueError("BCa has no value where all draws lie on one side of the estimate; use method='percentile'")
    away = left_out.mean() - left_out
    spread = (away**2).sum() ** 1.5
    acceleration = (away**3).sum() / (6 * spread) if spread else 0.0
    bias = stats.norm.ppf(below)
    shifted = bias + stats.norm.ppf(tails)
    levels: Floats = stats.norm.cdf(bias + shifted / (1 - acceleration * shifted))
    return levels


def _check_choices(level: float, resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}; use 0.95")
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}; use 10000")


# --- DeLong


class DeLong(NamedTuple):
    """AUROCs of R runs on the same cases.

    Attributes:
        auroc: ``(R,)``.
        covariance: ``(R, R)``, of these estimates.
    """

    auroc: Floats
    covariance: Floats


def delong(labels: ArrayLike, scores: ArrayLike) -> DeLong:
    """AUROCs with their covariance over cases, from mid-ranks.

    Args:
        labels: ``(N,)``, 0 or 1; at least two of each.
        scores: ``(R, N)``, of R runs.

    Raises:
        Undefined: fewer than two cases of a class.
        ValueError: see :func:`~medvit.adapt.metrics.check_binary`.

    Source: DeLong et al. (Biometrics 1988); Sun and Xu, "Fast Implementation of DeLong's Algorithm for Comparing the
    Areas Under Correlated ROC Curves" (IEEE Signal Processing Letters 2014).
    """
    y, s = check_binary(labels, scores)
    if s.ndim != 2:
        raise ValueError(f"scores must be (runs, cases), got shape {s.shape}")
    m, n = int(y.sum()), int((~y).sum())
    if m < 2 or n < 2:
        raise Undefined(f"DeLong's variance needs two cases of each class, got {m} positive and {n} negative")
    ranks = rankdata(s, axis=1)
    # share of the other class below each case: its rank among all less that among its own
    positive = (ranks[:, y] - rankdata(s[:, y], axis=1)) / n
    negative = 1 - (ranks[:, ~y] - rankdata(s[:, ~y], axis=1)) / m
    covariance = np.cov(positive).reshape(len(s), -1) / m + np.cov(negative).reshape(len(s), -1) / n
    return DeLong(positive.mean(axis=1), covariance)


def delong_interval(labels: ArrayLike, scores: ArrayLike, level: float = 0.95) -> Interval:
    """AUROC of one run, with DeLong's normal interval cut to [0, 1].

    At an AUROC of 0 or 1 the estimated variance is 0 and the interval a point, whatever the number of cases.

    Args:
        labels: ``(N,)``, 0 or 1; at least two of each.
        scores: ``(N,)``.
        level: coverage.

    Raises:
        Undefined, ValueError: see :func:`delong`; another level.
    """
    _check_choices(level, 100)
    found = delong(labels, np.asarray(scores)[None])
    point, reach = float(found.auroc[0]), _reach(found.covariance[0, 0], level)
    return Interval(point, max(0.0, point - reach), min(1.0, point + reach))


def delong_test(labels: ArrayLike, first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Comparison:
    """Paired comparison of two AUROCs: difference, normal interval, two-sided p.

    Args:
        labels: ``(N,)``.
        first: ``(N,)``, scores of one run.
        second: ``(N,)``, scores of the other run on the same cases.
        level: coverage.

    Raises:
        Undefined: see :func:`delong`; unequal AUROCs without variance, such as of a perfect and a constant run.
        ValueError: see :func:`delong`.
    """
    _check_choices(level, 100)
    found = delong(labels, np.stack([np.asarray(first), np.asarray(second)]))
    difference = float(found.auroc[0] - found.auroc[1])
    contrast = np.array([1.0, -1.0])
    variance = float(contrast @ found.covariance @ contrast)
    if variance <= 1e-15:  # what is left of equal numbers by rounding
        if abs(difference) > 1e-7:
            raise Undefined(f"DeLong's test needs a variance, got 0 at a difference of {difference:.4g}")
        return Comparison(difference, difference, difference, 1.0)
    reach = _reach(variance, level)
    p = float(2 * stats.norm.sf(abs(difference) / variance**0.5))
    return Comparison(difference, max(-1.0, difference - reach), min(1.0, difference + reach), p)


def _reach(variance: float, level: float) -> float:
    return float(stats.norm.ppf((1 + level) / 2) * max(variance, 0.0) ** 0.5)


# --- further tests


def wilcoxon(first: ArrayLike, second: ArrayLike, *, groups: Sequence[Any] | NDArray[Any] | None = None) -> float:
    """Two-sided p of Wilcoxon's signed-rank test on values of the same cases, such as Dice of two runs.

    Args:
        first: ``(N,)``, finite, of one run.
        second: ``(N,)``, of the other.
        groups: N names; the mean difference of a group counts once. None: every case by itself.

    Returns:
        p; 1 where no case differs.

    Raises:
        ValueError: other shapes, no case, values that are not finite.
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.ndim != 1 or a.shape != b.shape or not a.size or not np.isfinite([a, b]).all():
        raise ValueError(f"the runs need finite values, one per case, got shapes {a.shape} and {b.shape}")
    differences = a - b
    if groups is not None:
        _, number = np.unique(np.asarray(groups), return_inverse=True)
        differences = np.bincount(number, differences) / np.bincount(number)
    return float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0


def holm(p: ArrayLike) -> list[float]:
    """Adjust the p values of several tests so that the chance of any false rejection stays below the level.

    Raises:
        ValueError: a value outside of [0, 1].

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure" (1979).
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0) & (values <= 1)).all():
        raise ValueError(f"p values must lie in [0, 1], got {values.tolist()}")
    order = np.argsort(values, kind="stable")
    adjusted = np.empty_like(values)
    steps = values[order] * np.arange(values.size, 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return [float(v) for v in adjusted]
