import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medvit.adapt.metrics import (
    Undefined,
    accuracy,
    auroc,
    average_precision,
    brier,
    calibration_error,
    mean_auroc,
    reliability,
    sensitivity,
    specificity,
)


def pairs_won(labels, scores):
    """AUROC by its definition: every positive against every negative."""
    pairs = [
        (p, n) for p, y in zip(scores, labels, strict=True) if y for n, z in zip(scores, labels, strict=True) if not z
    ]
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


def stepwise_precision(labels, scores):
    """Average precision by its definition: threshold after threshold."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        taken = [y for y, s in zip(labels, scores, strict=True) if s >= threshold]
        now = sum(taken) / sum(labels)
        total += (now - recall) * sum(taken) / len(taken)
        recall = now
    return total


def tied(seed, n=60, levels=7):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    return labels, (rng.integers(0, levels, n) + labels) / 4


@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30))
@settings(max_examples=60, deadline=None)
def test_discrimination_is_its_definition_with_any_ties(cases):
    labels, scores = [int(y) for y, _ in cases], [float(s) for _, s in cases]
    if 0 < sum(labels) < len(labels):
        assert auroc(labels, scores) == pytest.approx(pairs_won(labels, scores), abs=1e-12)
    if any(labels):
        assert average_precision(labels, scores) == pytest.approx(stepwise_precision(labels, scores), abs=1e-12)


@pytest.mark.upstream
def test_metrics_agree_with_scikit_learn():
    theirs = pytest.importorskip("sklearn.metrics")
    labels, scores = tied(3, 500)
    assert auroc(labels, scores) == pytest.approx(theirs.roc_auc_score(labels, scores), abs=1e-12)
    assert average_precision(labels, scores) == pytest.approx(theirs.average_precision_score(labels, scores), abs=1e-12)
    p = scores / scores.max()
    assert brier(labels, p) == pytest.approx(theirs.brier_score_loss(labels, p), abs=1e-12)
    assert sensitivity(labels, p > 0.5) == pytest.approx(theirs.recall_score(labels, p > 0.5), abs=1e-12)
    assert specificity(labels, p > 0.5) == pytest.approx(theirs.recall_score(labels, p > 0.5, pos_label=0), abs=1e-12)


def test_a_perfect_order_and_its_reverse():
    assert auroc([0, 0, 1, 1], [-3, 0, 1, 9]) == 1
    assert auroc([1, 1, 0, 0], [-3, 0, 1, 9]) == 0
    assert auroc([0, 1, 0, 1], [2, 2, 2, 2]) == 0.5
    assert average_precision([0, 1, 0, 1], [2, 2, 2, 2]) == 0.5


def test_decisions():
    labels, predictions = [1, 1, 1, 0, 0], [1, 0, 1, 0, 1]
    assert accuracy(labels, predictions) == pytest.approx(3 / 5)
    assert sensitivity(labels, predictions) == pytest.approx(2 / 3)
    assert specificity(labels, predictions) == pytest.approx(1 / 2)
    assert accuracy(["a", "b", "c"], ["a", "c", "c"]) == pytest.approx(2 / 3)


# --- calibration


def test_brier_of_two_and_of_several_classes():
    assert brier([1, 0], [0.8, 0.4]) == pytest.approx((0.04 + 0.16) / 2)
    assert brier([2, 0], [[0.1, 0.2, 0.7], [0.5, 0.5, 0.0]]) == pytest.approx((0.01 + 0.04 + 0.09 + 0.25 + 0.25) / 2)
    # the sum over two classes is twice that of one
    p = np.array([0.8, 0.4, 0.1])
    assert brier([1, 0, 0], np.stack([1 - p, p], 1)) == pytest.approx(2 * brier([1, 0, 0], p))


def test_bins_hold_as_many_cases_each():
    p = np.random.default_rng(0).random(100)
    table = reliability(np.arange(100) % 2, p)
    assert [b.n for b in table] == [10] * 10
    slow = np.sort(p).reshape(10, 10)
    assert np.allclose([b.predicted for b in table], slow.mean(1))
    assert np.allclose([(b.low, b.high) for b in table], slow[:, [0, -1]])


def test_equal_probabilities_share_a_bin_whatever_the_order():
    p, y = np.array([0.2] * 7 + [0.9] * 3), np.array([1, 0, 0, 0, 0, 0, 0, 1, 1, 0])
    table = reliability(y, p, 5)
    assert [(b.n, b.predicted, b.observed) for b in table] == [
        (7, pytest.approx(0.2), pytest.approx(1 / 7)),
        (3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    assert reliability(y[::-1], p[::-1], 5) == [pytest.approx(b) for b in table]
    expected = 0.7 * abs(0.2 - 1 / 7) + 0.3 * abs(0.9 - 2 / 3)
    assert calibration_error(y, p, 5) == pytest.approx(expected)


def test_a_calibrated_forecast_has_less_error_than_a_bold_one():
    rng = np.random.default_rng(1)
    p = rng.random(20_000)
    y = rng.random(20_000) < p
    bold = np.clip(2 * p - 0.5, 0, 1)
    assert calibration_error(y, p) < 0.015
    assert calibration_error(y, bold) == pytest.approx(np.abs(bold - p).mean(), abs=0.01)


def test_of_several_classes_it_is_the_likeliest():
    p = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.1, 0.4]])
    assert reliability([0, 2, 0], p, 1) == [(0.5, 0.7, 3, pytest.approx(0.6), pytest.approx(2 / 3))]
    assert math.isclose(calibration_error([0, 2, 0], p, 1), 2 / 3 - 0.6)


# --- refusals


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([1, 1], [0.1, 0.2]), "AUROC needs positive and negative cases, got 2 positive of 2"),
        (lambda: auroc([0, 0], [0.1, 0.2]), "got 0 positive of 2"),
        (lambda: average_precision([0, 0], [0.1, 0.2]), "average precision needs a positive case"),
        (lambda: sensitivity([0, 0], [0, 1]), "sensitivity needs a positive case"),
        (lambda: specificity([1, 1], [0, 1]), "specificity needs a negative case"),
    ],
)  # fmt: skip
def test_what_the_cases_leave_undefined(call, message):
    with pytest.raises(Undefined, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auroc([0, 2, 1], [1, 2, 3]), "labels must be 0 or 1, got 2"),
        (lambda: auroc([0, 1], [1, np.nan]), "scores must be finite, got nan"),
        (lambda: auroc([0, 1], [1, 2, 3]), r"one value per case, got shapes \(2,\) and \(3,\)"),
        (lambda: auroc([], []), "one value per case"),
        (lambda: accuracy([0, 1], [1]), r"got shapes \(2,\) and \(1,\)"),
        (lambda: brier([0, 1], [0.5, 1.5]), r"must lie in \[0, 1\], got 1.5; apply the sigmoid"),
        (lambda: brier([0, 1], [0.5, np.nan]), r"must lie in \[0, 1\], got nan"),
        (lambda: brier([0, 2], [[0.5, 0.5], [1, 0]]), "one class number below 2 per case, got 0, 2"),
        (lambda: brier([0, 1], [[0.5, 0.5], [1, 0.5]]), "must sum to 1, got 1.0, 1.5; apply the softmax"),
        (lambda: reliability([0, 1], [0.5, 0.5], 0), "bins must be at least 1, got 0"),
    ],
)  # fmt: skip
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert not isinstance(caught.value, Undefined)


def test_every_class_needs_scores_and_of_two_one_column_is_enough():
    with pytest.raises(ValueError, match="every class needs a column of scores, got 2 of them and the class 2"):
        mean_auroc([0, 1, 2, 0], np.eye(4)[:, :2])
    scores = np.array([0.2, 0.9, 0.4, 0.6])
    assert mean_auroc([0, 1, 0, 1], scores) == mean_auroc([0, 1, 0, 1], np.stack([1 - scores, scores], 1)) == 1


def test_auroc_of_classes_and_of_labels_is_averaged():
    labels, scores = np.arange(30) % 3, np.random.default_rng(0).random((30, 3))
    each = [auroc(labels == i, scores[:, i]) for i in range(3)]
    assert mean_auroc(labels, scores) == pytest.approx(sum(each) / 3)
    assert mean_auroc(labels > 0, scores[:, :2]) == pytest.approx(auroc(labels > 0, scores[:, 1]))
    yes = np.stack([labels == 0, labels > 0, labels > 5], 1)  # the last tells nothing
    assert mean_auroc(yes, scores) == pytest.approx((each[0] + auroc(labels > 0, scores[:, 1])) / 2)
    with pytest.raises(Undefined, match="none of 3 has both"):
        mean_auroc(np.zeros((30, 3)), scores)
