import itertools

import numpy as np
import pytest
from scipy import stats

from medvit.adapt.metrics import Undefined, auroc
from medvit.adapt.statistics import (
    bootstrap,
    bootstrap_difference,
    delong,
    delong_interval,
    delong_test,
    holm,
    wilcoxon,
)


def binormal(seed, positive=30, negative=40, runs=1, distance=1.0, shared=0.5):
    """Labels and correlated scores of several runs, coarse enough for ties."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([1, 0], [positive, negative])
    common = rng.normal(size=labels.size) * shared**0.5
    noise = rng.normal(size=(runs, labels.size)) * (1 - shared) ** 0.5
    return labels, np.round(common + noise + distance * labels, 1)


# --- bootstrap


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_interval_of_a_mean_agrees_with_scipy(method):
    values = np.random.default_rng(1).exponential(size=40)
    ours = bootstrap(lambda i: values[i].mean(), 40, method=method, resamples=2000, seed=5)
    theirs = stats.bootstrap(  # which draws the same cases from the same generator
        (values,), np.mean, method=method, n_resamples=2000, rng=np.random.default_rng(5)
    ).confidence_interval
    assert ours.point == values.mean()
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


def test_bca_corrects_a_biased_statistic_as_scipy_does():
    values = np.random.default_rng(2).normal(size=25)
    ours = bootstrap(lambda i: values[i].var(), 25, method="bca", resamples=5000)
    theirs = stats.bootstrap(
        (values,), np.var, method="bca", n_resamples=5000, rng=np.random.default_rng(0)
    ).confidence_interval
    plain = bootstrap(lambda i: values[i].var(), 25, resamples=5000)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.high > plain.high + 0.1  # which the correction is there for


def test_the_draws_are_those_of_the_seed():
    values = np.random.default_rng(3).random(20)
    call = lambda seed: bootstrap(lambda i: values[i].mean(), 20, resamples=200, seed=seed)  # noqa: E731
    assert call(0) == call(0)
    assert call(0) != call(1)
    rng = np.random.default_rng(7)
    slow = [values[rng.integers(20, size=20)].mean() for _ in range(200)]
    assert call(7)[1:] == pytest.approx(np.quantile(slow, [0.025, 0.975]))


def test_level_counts():
    values = np.random.default_rng(4).random(20)
    wide = bootstrap(lambda i: values[i].mean(), 20, resamples=500)
    narrow = bootstrap(lambda i: values[i].mean(), 20, resamples=500, level=0.5)
    assert wide.low < narrow.low < narrow.point < narrow.high < wide.high


def test_cases_of_a_group_are_drawn_together():
    groups = ["a", "b", "a", "c", "b", "a"]
    seen = []
    bootstrap(lambda i: float(seen.append(np.bincount(i, minlength=6)) or i.size), 6, groups=groups, resamples=200)
    everything, *draws = seen
    assert everything.tolist() == [1] * 6
    sizes = set()
    for count in draws:
        assert count[0] == count[2] == count[5]
        assert count[1] == count[4]
        assert count[0] + count[1] + count[3] == 3  # as many groups as there are
        sizes.add(count.sum())
    assert len(sizes) > 1


def test_groups_of_one_case_are_the_plain_bootstrap():
    values = np.random.default_rng(5).random(12)
    plain = bootstrap(lambda i: values[i].mean(), 12, resamples=300, method="bca")
    assert bootstrap(lambda i: values[i].mean(), 12, resamples=300, method="bca", groups=range(12)) == plain


def test_undefined_draws_are_drawn_anew_and_too_many_are_refused():
    labels, scores = binormal(6, positive=4, negative=40)
    found = bootstrap(lambda i: auroc(labels[i], scores[0][i]), labels.size, resamples=500)
    assert 0 < found.low < found.point < found.high <= 1
    few = np.r_[1, np.zeros(40, int)]
    with pytest.raises(ValueError, match=r"more than one draw in ten is undefined \(AUROC needs .* too few cases"):
        bootstrap(lambda i: auroc(few[i], np.arange(41)[i]), 41, resamples=500)
    with pytest.raises(Undefined, match="AUROC needs positive and negative cases, got 5 positive of 5"):
        bootstrap(lambda i: auroc(np.ones(5)[i], np.arange(5)[i]), 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 1.0}, "level must lie between 0 and 1, got 1.0; use 0.95"),
        ({"resamples": 99}, "resamples must be at least 100, got 99"),
        ({"method": "basic"}, "method must be one of .*, got 'basic'"),
        ({"groups": list("aab")}, "groups need one name per case, got 3 for 4 cases"),
        ({"groups": list("aaaa")}, "at least two independent groups, got 1"),
    ],
)
def test_bootstrap_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(lambda i: float(i.mean()), 4, **options)


def test_bootstrap_refuses_single_cases_and_impossible_corrections():
    with pytest.raises(ValueError, match="at least two independent cases, got 1"):
        bootstrap(lambda i: 1.0, 1)
    with pytest.raises(ValueError, match="at least two independent cases, got 0"):
        bootstrap(lambda i: 1.0, 0)
    calls = itertools.count()
    with pytest.raises(ValueError, match="all draws lie on one side of the estimate; use method='percentile'"):
        bootstrap(lambda i: float(next(calls) == 0), 5, resamples=100, method="bca")
    labels = np.repeat([1, 0], [1, 5])

    def alone(indices):  # defined for draws, not for what leaves out the one positive case
        if indices.size < 6:
            raise Undefined("a positive case is needed")
        return float(labels[indices].mean())

    with pytest.raises(ValueError, match="BCa leaves out each case once, then a positive case is needed; use method="):
        bootstrap(alone, 6, resamples=100, method="bca")


def test_bca_of_equal_values_is_the_value():
    assert bootstrap(lambda i: 0.5, 5, resamples=100, method="bca") == (0.5, 0.5, 0.5)


# --- does 95 % mean 95 %?

TRIALS = 400


def coverage(trial):
    """Fraction of seeded trials whose interval ``(low, high)`` holds the truth ``(low, high, truth)``."""
    held = [low <= truth <= high for low, high, truth in map(trial, range(TRIALS))]
    return float(np.mean(held))


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_coverage_of_the_mean(method):
    def trial(seed):
        values = np.random.default_rng(seed).beta(8, 2, 30)
        found = bootstrap(lambda i: values[i].mean(), 30, resamples=300, seed=seed, method=method)
        return found.low, found.high, 0.8

    assert 0.89 <= coverage(trial) <= 0.98


def test_coverage_of_the_area_under_the_curve():
    truth = stats.norm.cdf(1 / 2**0.5)

    def delong_trial(seed):
        labels, scores = binormal(seed)
        return (*delong_interval(labels, scores[0])[1:], truth)

    assert 0.91 <= coverage(delong_trial) <= 0.98


def test_coverage_where_patients_have_several_cases():
    def trial(grouped):
        def one(seed):
            rng = np.random.default_rng(seed)
            patients = np.repeat(np.arange(20), 6)
            values = rng.normal(size=20)[patients] + 0.3 * rng.normal(size=120)
            options = {"groups": patients} if grouped else {}
            found = bootstrap(lambda i: values[i].mean(), 120, resamples=200, seed=seed, **options)
            return found.low, found.high, 0.0

        return one

    assert 0.88 <= coverage(trial(True)) <= 0.98
    assert coverage(trial(False)) < 0.7  # what taking cases for patients costs


def test_a_paired_comparison_of_equals_rejects_at_its_level():
    def trial(seed):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=(2, 40)) + rng.normal(size=40)
        found = bootstrap_difference(
            lambda i: first[i].mean(), lambda i: second[i].mean(), 40, resamples=200, seed=seed
        )
        assert (found.p <= 0.05) == (not found.low <= 0 <= found.high) or 0.03 < found.p < 0.07
        return found.low, found.high, 0.0

    assert 0.90 <= coverage(trial) <= 0.98


# --- paired differences


def test_paired_draws_are_the_same_for_both_runs():
    rng = np.random.default_rng(8)
    first = rng.normal(size=30)
    constant = bootstrap_difference(lambda i: (first[i] + 0.25).mean(), lambda i: first[i].mean(), 30, resamples=500)
    assert constant[:3] == pytest.approx((0.25, 0.25, 0.25))
    assert constant.p == pytest.approx(2 / 501)
    other = bootstrap(lambda i: first[i].mean(), 30, resamples=500)
    paired = bootstrap_difference(lambda i: first[i].mean(), lambda i: 0.0, 30, resamples=500)
    assert paired[:3] == pytest.approx(other)


def test_no_difference_has_p_one():
    values = np.random.default_rng(9).random(10)
    mean = lambda i: values[i].mean()  # noqa: E731
    assert bootstrap_difference(mean, mean, 10, resamples=100) == (0, 0, 0, 1)


def test_bootstrap_p_is_near_that_of_the_t_test():
    rng = np.random.default_rng(10)
    first = rng.normal(0.25, 1, 80)
    found = bootstrap_difference(lambda i: first[i].mean(), lambda i: 0.0, 80)
    assert found.p == pytest.approx(stats.ttest_1samp(first, 0).pvalue, abs=0.03)


# --- DeLong


def slow_delong(labels, scores):
    """DeLong's equations as printed: structural components from all pairs."""
    runs = len(scores)
    placed = []
    for run in scores:
        x, y = run[labels == 1], run[labels == 0]
        psi = (x[:, None] > y) + 0.5 * (x[:, None] == y)
        placed.append((psi.mean(), psi.mean(1), psi.mean(0)))
    covariance = np.zeros((runs, runs))
    for r, s in itertools.product(range(runs), repeat=2):
        for k in (1, 2):
            a, b = placed[r][k] - placed[r][0], placed[s][k] - placed[s][0]
            covariance[r, s] += (a * b).sum() / (len(a) - 1) / len(a)
    return np.array([p[0] for p in placed]), covariance


def test_delong_equals_the_pairwise_definition_with_ties():
    labels, scores = binormal(11, runs=3)
    assert len(np.unique(scores)) < scores.size / 3
    order = np.random.default_rng(0).permutation(labels.size)
    areas, covariance = slow_delong(labels, scores)
    found = delong(labels[order], scores[:, order])
    assert found.auroc == pytest.approx(areas, abs=1e-12)
    assert found.covariance == pytest.approx(covariance, abs=1e-14)
    assert found.auroc == pytest.approx([auroc(labels, run) for run in scores], abs=1e-12)


def test_delong_interval_and_test_follow_from_the_covariance():
    labels, scores = binormal(12, runs=2)
    (a, b), covariance = slow_delong(labels, scores)
    z = stats.norm.ppf(0.975)
    assert delong_interval(labels, scores[0]) == pytest.approx(
        (a, a - z * covariance[0, 0] ** 0.5, min(1, a + z * covariance[0, 0] ** 0.5))
    )
    deviation = (covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) ** 0.5
    found = delong_test(labels, scores[0], scores[1])
    assert found == pytest.approx(
        (a - b, a - b - z * deviation, a - b + z * deviation, 2 * stats.norm.sf(abs(a - b) / deviation))
    )
    back = delong_test(labels, scores[1], scores[0])
    assert (back.difference, back.low, back.high, back.p) == pytest.approx(
        (-found.difference, -found.high, -found.low, found.p)
    )


def test_delong_is_near_the_bootstrap():
    labels, (scores,) = binormal(13, positive=60, negative=80)
    asymptotic = delong_interval(labels, scores)
    drawn = bootstrap(lambda i: auroc(labels[i], scores[i]), labels.size, resamples=2000)
    assert drawn == pytest.approx(asymptotic, abs=0.02)


def test_delong_of_equal_and_of_perfect_runs():
    labels, (scores,) = binormal(14)
    assert delong_test(labels, scores, 3 * scores + 1) == (0, 0, 0, 1)
    perfect = labels * 1.0
    assert delong_interval(labels, perfect) == (1, 1, 1)
    with pytest.raises(ValueError, match="needs a variance, got 0 at a difference of 1"):
        delong_test(labels, perfect, -perfect)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: delong([1, 0, 0], [[1, 2, 3]]), Undefined, "two cases of each class, got 1 positive and 2 negative"),
        (lambda: delong([1, 1, 0], [[1, 2, 3]]), Undefined, "two cases of each class, got 2 positive and 1 negative"),
        (lambda: delong([1, 0], [1, 2]), ValueError, r"scores must be \(runs, cases\), got shape \(2,\)"),
        (lambda: delong([1, 0], [[1, np.inf]]), ValueError, "scores must be finite, got inf"),
        (lambda: delong_interval([1, 0], [1, 0], 2), ValueError, "level must lie between 0 and 1, got 2"),
    ],
)  # fmt: skip
def test_delong_refuses(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- further tests


def test_wilcoxon_is_scipys_and_takes_patients_for_units():
    rng = np.random.default_rng(15)
    first, second = rng.normal(0.3, 1, 24), rng.normal(size=24)
    assert wilcoxon(first, second) == pytest.approx(stats.wilcoxon(first, second).pvalue)
    groups = np.repeat(list("abcdefgh"), 3)[rng.permutation(24)]
    means = [(first - second)[groups == g].mean() for g in "abcdefgh"]
    assert wilcoxon(first, second, groups=groups) == pytest.approx(stats.wilcoxon(means).pvalue)
    assert wilcoxon(first, first) == 1


@pytest.mark.parametrize("second", [[1.0], [1.0, np.nan]])
def test_wilcoxon_refuses(second):
    with pytest.raises(ValueError, match="finite values, one per case"):
        wilcoxon([1.0, 2.0], second)


def test_holm_steps_down():
    # the smallest times 4, then the next times 3, never falling, never above 1
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1, 1]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


@pytest.mark.parametrize("p", [1.1, -0.1, float("nan")])
def test_holm_refuses(p):
    with pytest.raises(ValueError, match=r"p values must lie in \[0, 1\]"):
        holm([0.5, p])
