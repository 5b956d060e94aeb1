import csv

import numpy as np
import pytest
from scipy import stats

from medvit.adapt import metrics as m
from medvit.adapt.evaluation import METRICS, Settings, calibration, compare, evaluate
from medvit.adapt.statistics import bootstrap, bootstrap_difference, delong_interval, delong_test, holm, wilcoxon
from medvit.adapt.tables import read_table
from medvit.errors import UnreadableFile

FAST = Settings(resamples=300)
N = 60


def write(folder, name="table.csv", **columns):
    path = folder / name
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["case_id", *columns])
        out.writerows(zip((f"c{i}" for i in range(len(next(iter(columns.values()))))), *columns.values(), strict=True))
    return read_table(path)


def binary(seed=0, quality=1.0):
    """Labels that do not depend on the seed, and probabilities that do."""
    labels = np.arange(N) % 3 == 0
    logits = quality * (2 * labels - 1) + np.random.default_rng(seed).normal(size=N)
    return labels.astype(int), 1 / (1 + np.exp(-logits))


def three():
    """Class numbers and probabilities of three classes."""
    y = np.arange(N) % 3
    logits = np.random.default_rng(0).normal(size=(N, 3)) + np.eye(3)[y]
    p = np.exp(logits)
    return y, p / p.sum(1, keepdims=True)


def test_every_metric_of_two_classes(tmp_path):
    y, p = binary()
    rows = evaluate(write(tmp_path, label=y, score=p), METRICS, FAST)
    decided = (p >= 0.5).astype(float)
    expected = {
        "auroc": m.auroc(y, p),
        "average_precision": m.average_precision(y, p),
        "accuracy": m.accuracy(y, decided),
        "sensitivity": m.sensitivity(y, decided),
        "specificity": m.specificity(y, decided),
        "brier": m.brier(y, p),
        "ece": m.calibration_error(y, p),
    }
    assert {row["metric"]: row["value"] for row in rows} == pytest.approx(expected)
    assert all(row["low"] < row["value"] < row["high"] for row in rows if row["metric"] != "ece")
    assert all((row["n"], row["groups"], row["target"]) == (N, None, "") for row in rows)
    assert [row["interval"] for row in rows] == ["delong"] + ["bootstrap"] * 6


def test_intervals_are_those_of_the_library(tmp_path):
    y, p = binary()
    table = write(tmp_path, label=y, score=p, dice=p)
    area, precision, dice = evaluate(table, ["auroc", "average_precision", "dice"], Settings(resamples=400, seed=3))
    assert (area["value"], area["low"], area["high"]) == pytest.approx(delong_interval(y, p))
    expected = bootstrap(lambda i: m.average_precision(y[i], p[i]), N, resamples=400, seed=3)
    assert (precision["value"], precision["low"], precision["high"]) == pytest.approx(expected)
    expected = bootstrap(lambda i: p[i].mean(), N, resamples=400, seed=3)
    assert (dice["value"], dice["low"], dice["high"]) == pytest.approx(expected)


def test_the_threshold_decides_from_there_on(tmp_path):
    table = write(tmp_path, label=[1, 1, 0, 0], score=[0.5, 0.2, 0.2, 0.1])
    for threshold, expected in ((0.5, 0.5), (0.2, 1.0), (0.51, 0.0)):
        (row,) = evaluate(table, ["sensitivity"], Settings(resamples=100, threshold=threshold))
        assert row["value"] == expected


def test_cases_of_a_patient_are_not_independent(tmp_path):
    y, p = binary()
    groups = np.arange(N) // 4
    table = write(tmp_path, label=y, score=p, group=groups, dice=p)
    area, dice = evaluate(table, ["auroc", "dice"], FAST)
    expected = bootstrap(lambda i: m.auroc(y[i], p[i]), N, groups=groups, resamples=300)
    assert (area["value"], area["low"], area["high"]) == pytest.approx(expected, abs=0.03)  # group names sort as text
    assert (area["interval"], area["groups"], dice["groups"]) == ("bootstrap by group", 15, 15)
    assert dice["interval"] == "bootstrap by group"
    single = write(tmp_path, label=y, score=p, group=range(N))
    assert evaluate(single, ["auroc"], FAST) == evaluate(write(tmp_path, label=y, score=p), ["auroc"], FAST)


def test_several_classes(tmp_path):
    y, p = three()
    names = np.array(["ant", "bee", "cow"])
    table = write(tmp_path, label=names[y], **{f"score_{name}": p[:, c] for c, name in enumerate(names)})
    rows = {(r["metric"], r["target"]): r for r in evaluate(table, METRICS, FAST)}
    guess = p.argmax(1)
    areas = [m.auroc(y == c, p[:, c]) for c in range(3)]
    assert [rows["auroc", name]["value"] for name in names] == pytest.approx(areas)
    assert rows["auroc", "bee"]["interval"] == "delong"
    assert rows["auroc", "macro"]["value"] == pytest.approx(np.mean(areas))
    expected = bootstrap(lambda i: np.mean([m.auroc(y[i] == c, p[i, c]) for c in range(3)]), N, resamples=300)
    assert (rows["auroc", "macro"]["low"], rows["auroc", "macro"]["high"]) == pytest.approx(expected[1:])
    assert rows["accuracy", ""]["value"] == pytest.approx((guess == y).mean())
    assert rows["brier", ""]["value"] == pytest.approx(m.brier(y, p))
    assert rows["ece", ""]["value"] == pytest.approx(m.calibration_error(y, p))
    assert rows["sensitivity", "cow"]["value"] == pytest.approx((guess[y == 2] == 2).mean())
    assert rows["specificity", "cow"]["value"] == pytest.approx((guess[y != 2] != 2).mean())
    assert len(rows) == 4 * 4 + 3


def test_several_labels(tmp_path):
    y, p = binary()
    columns = {"label_x": y, "score_x": p, "label_y": 1 - y, "score_y": p}
    rows = evaluate(write(tmp_path, **columns), ["auroc", "brier"], FAST)
    area = m.auroc(y, p)
    found = {(r["metric"], r["target"]): r["value"] for r in rows}
    assert found == pytest.approx(
        {
            ("auroc", "x"): area,
            ("auroc", "y"): 1 - area,
            ("auroc", "macro"): 0.5,
            ("brier", "x"): m.brier(y, p),
            ("brier", "y"): m.brier(1 - y, p),
            ("brier", "macro"): (m.brier(y, p) + m.brier(1 - y, p)) / 2,
        }
    )


# --- two runs


def test_two_runs_are_compared_in_pairs(tmp_path):
    y, p = binary(0, 1.2)
    _, q = binary(1, 0.4)
    order = np.random.default_rng(5).permutation(N)
    first = write(tmp_path, label=y, score=p, dice=p)
    second = write(tmp_path, "second.csv", label=y, score=q, dice=q)
    shuffled = second.take(order.tolist())
    rows = compare(first, shuffled, ["auroc", "accuracy", "dice"], FAST)
    area, right, dice = rows

    def found(row):
        return tuple(row[name] for name in ("difference", "difference_low", "difference_high", "p"))

    assert found(area) == pytest.approx(delong_test(y, p, q))
    hit, miss = (p >= 0.5) == y, (q >= 0.5) == y
    expected = bootstrap_difference(lambda i: hit[i].mean(), lambda i: miss[i].mean(), N, resamples=300)
    assert found(right) == pytest.approx(expected)
    expected = bootstrap_difference(lambda i: p[i].mean(), lambda i: q[i].mean(), N, resamples=300)
    assert found(dice)[:3] == pytest.approx(expected[:3])
    assert dice["p"] == pytest.approx(stats.wilcoxon(p, q).pvalue)
    assert [r["test"] for r in rows] == ["delong", "bootstrap", "wilcoxon"]
    assert [r["p_holm"] for r in rows] == pytest.approx(holm([r["p"] for r in rows]))
    assert [r["against"] for r in rows] == pytest.approx([m.auroc(y, q), miss.mean(), q.mean()])
    assert [r["value"] for r in rows] == pytest.approx([m.auroc(y, p), hit.mean(), p.mean()])
    assert compare(first, second, ["auroc", "accuracy", "dice"], FAST) == rows  # whatever the order of the file


def test_two_runs_with_patients(tmp_path):
    y, p = binary(0, 1.2)
    _, q = binary(1, 0.4)
    groups = np.arange(N) // 4
    first = write(tmp_path, label=y, score=p, dice=p, group=groups)
    second = write(tmp_path, "second.csv", label=y, score=q, dice=q, group=groups)
    area, dice = compare(first, second, ["auroc", "dice"], FAST)
    assert (area["test"], dice["test"]) == ("bootstrap", "wilcoxon")
    assert dice["p"] == pytest.approx(wilcoxon(p, q, groups=groups))
    assert dice["p"] != pytest.approx(wilcoxon(p, q))


def test_a_run_does_not_differ_from_itself(tmp_path):
    y, p = binary()
    table = write(tmp_path, label=y, score=p, dice=p)
    for row in compare(table, table, [*METRICS, "dice"], FAST):
        assert (row["difference"], row["difference_low"], row["difference_high"], row["p"]) == (0, 0, 0, 1)


# --- calibration


def test_calibration_of_each_label_and_of_the_likeliest_class(tmp_path):
    y, p = binary()
    assert calibration(write(tmp_path, label=y, score=p)) == [("", b) for b in m.reliability(y, p)]
    columns = {"label_x": y, "score_x": p, "label_y": 1 - y, "score_y": 1 - p}
    assert [t for t, _ in calibration(write(tmp_path, **columns), 3)] == ["x"] * 3 + ["y"] * 3
    y, p = three()
    columns = {"label": [str(v) for v in y], **{f"score_{c}": p[:, c] for c in range(3)}}
    assert calibration(write(tmp_path, **columns)) == [("", pytest.approx(b)) for b in m.reliability(y, p)]


# --- refusals


def test_what_a_table_cannot_answer(tmp_path):
    y, p = binary()
    single = write(tmp_path, label=np.ones(N, int), score=p)
    with pytest.raises(UnreadableFile, match=r"table.csv: auroc: DeLong's variance needs two cases of each class"):
        evaluate(single, ["auroc"], FAST)
    with pytest.raises(UnreadableFile, match="specificity: specificity needs a negative case, got 60 positive ones"):
        evaluate(single, ["specificity"], FAST)
    grouped = write(tmp_path, label=np.ones(N, int), score=p, group=np.arange(N) // 2)
    with pytest.raises(UnreadableFile, match="auroc: AUROC needs positive and negative cases, got 60 positive of 60"):
        evaluate(grouped, ["auroc"], FAST)
    logits = write(tmp_path, label=y, score=5 * p)
    with pytest.raises(UnreadableFile, match=r"brier: probabilities must lie in \[0, 1\], got"):
        evaluate(logits, ["brier"], FAST)
    with pytest.raises(UnreadableFile, match=r"probabilities must lie in \[0, 1\]"):
        calibration(logits)
    with pytest.raises(UnreadableFile, match="average_precision: average precision needs a positive case, got 60"):
        evaluate(write(tmp_path, label=np.zeros(N, int), score=p), ["average_precision"], FAST)
    plain = write(tmp_path, dice=p)
    with pytest.raises(UnreadableFile, match="needs labels and scores, has case_id, dice"):
        evaluate(plain, ["auroc"], FAST)
    with pytest.raises(UnreadableFile, match="needs labels and scores"):
        calibration(plain)
    with pytest.raises(UnreadableFile, match="dice: an interval needs at least two independent cases, got 1"):
        evaluate(plain.take([0]), ["dice"], FAST)


def test_what_two_tables_cannot_answer(tmp_path):
    y, p = binary()
    table = write(tmp_path, label=y, score=p, accuracy=p)
    turned = write(tmp_path, "second.csv", label=1 - y, score=p, accuracy=p)
    with pytest.raises(UnreadableFile, match="that of case c0 differs"):
        compare(table, turned, ["auroc"], FAST)
    bare = write(tmp_path, "second.csv", label=y, score=p)
    with pytest.raises(UnreadableFile, match=r"second.csv: needs a column accuracy"):
        compare(table, bare, ["accuracy"], FAST)
    with pytest.raises(UnreadableFile, match=r"it lacks c0, c1, c2, c3, c4, \.\.\., 30 in all"):
        compare(table, table.take(range(30, 60)), ["auroc"], FAST)
    perfect = write(tmp_path, label=y, score=y)
    reverse = write(tmp_path, "second.csv", label=y, score=1 - y)
    (row,) = compare(perfect, reverse, ["auroc"], FAST)  # DeLong's variance is 0
    assert (row["test"], row["difference"]) == ("bootstrap", 1.0) and row["p"] < 0.01
    named = write(tmp_path, "second.csv", label=y, score=p, accuracy=p)
    for pair in ((bare, named), (named, bare)):
        with pytest.raises(UnreadableFile, match="needs a column accuracy"):
            compare(*pair, ["accuracy"], FAST)


def test_labels_with_too_few_cases_have_a_reason_and_the_others_their_numbers(tmp_path):
    y, p = binary()
    rare, never = np.zeros(N, int), np.zeros(N, int)
    rare[0] = 1
    columns = {f"label_{n}": v for n, v in {"x": y, "rare": rare, "never": never}.items()}
    scores = {f"score_{n}": p for n in ("x", "rare", "never")}
    table = write(tmp_path, **columns, **scores)
    for metric in ("auroc", "average_precision"):
        common, single, none, macro = evaluate(table, [metric], FAST)
        alone = evaluate(write(tmp_path, "x.csv", label=y, score=p), [metric], FAST)[0]
        assert (common["value"], common["low"]) == pytest.approx((alone["value"], alone["low"]))
        assert single["value"] is not None and single["low"] is None and "positive" in single["interval"]
        assert none["value"] is None and none["high"] is None and "positive" in none["interval"]
        assert macro["value"] == pytest.approx((common["value"] + single["value"]) / 2)
        assert macro["low"] < macro["value"] < macro["high"]
    other = write(tmp_path, "second.csv", **columns, **{name: 1 - score for name, score in scores.items()})
    rows = compare(table, other, ["auroc"], FAST)
    assert [row["p"] is None for row in rows] == [False, True, True, False]
    assert [row["p_holm"] is None for row in rows] == [False, True, True, False]
    assert rows[0]["p_holm"] == pytest.approx(min(2 * rows[0]["p"], 1))


def test_columns_may_come_in_another_order(tmp_path):
    p = binary()[1]
    names = np.array(["x", "y", "z"])[np.arange(N) % 3]
    scores = {f"score_{n}": (names == n) * 0.5 + p / 2 for n in "xyz"}
    table = write(tmp_path, label=names, **scores)
    turned = write(tmp_path, "second.csv", label=names, **dict(reversed(scores.items())))
    assert all(row["difference"] == 0 for row in compare(table, turned, ["auroc", "accuracy"], FAST))
