import csv
import json
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ignite.engine import Engine
from scipy.stats import bootstrap

from medvit.errors import OutputError
from medvit.inference.evaluation import DiceReport, bootstrap_interval


def test_interval_agrees_with_scipy():
    values = np.random.default_rng(1).beta(8, 2, 85)
    ours = bootstrap_interval(values)
    theirs = bootstrap(
        (values,), np.mean, method="percentile", random_state=np.random.default_rng(5)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=2e-3)
    assert ours[0] < values.mean() < ours[1]


def test_interval_is_reproducible_and_its_level_counts():
    values = np.random.default_rng(2).random(20)
    assert bootstrap_interval(values) == bootstrap_interval(values)
    assert bootstrap_interval(values) != bootstrap_interval(values, seed=1)
    low, high = bootstrap_interval(values)
    narrow_low, narrow_high = bootstrap_interval(values, level=0.5)
    assert low < narrow_low < narrow_high < high


def test_interval_of_equal_values_and_of_one():
    assert bootstrap_interval(np.full(9, 0.5)) == (0.5, 0.5)
    assert bootstrap_interval(np.array([0.25])) == (0.25, 0.25)


@pytest.mark.parametrize("values", [[], [0.5, np.nan], [np.inf], [[0.5, 0.5]]])
def test_interval_needs_finite_values_in_a_row(values):
    with pytest.raises(ValueError, match=re.escape(f"one per case, got {values}")):
        bootstrap_interval(np.array(values))


def _finished(dice):
    return SimpleNamespace(state=SimpleNamespace(metric_details={"val_mean_dice": torch.tensor(dice)}))


def _written(folder):
    with (folder / "dice.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    return rows, json.loads((folder / "dice.json").read_text(encoding="utf-8"))


def test_report_per_case_and_in_summary(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "medvit"):
        DiceReport(["a", "b"], ["front", "back"], tmp_path / "new")(_finished([[0.5, 0.75], [0.7, 0.25]]))
    rows, summary = _written(tmp_path / "new")
    assert rows == [
        ["case", "front", "back", "mean"],
        ["a", "0.500000", "0.750000", "0.625000"],
        ["b", "0.700000", "0.250000", "0.475000"],
    ]
    assert summary["cases"] == 2
    assert summary["front"] == {"cases": 2, "mean": 0.6, "interval_95": [0.5, 0.7], "min": 0.5}
    assert summary["back"] == {"cases": 2, "mean": 0.5, "interval_95": [0.25, 0.75], "min": 0.25}
    assert summary["mean"]["mean"] == 0.55
    assert "front: {'cases': 2, 'mean': 0.6" in caplog.text


def test_structures_that_a_reference_lacks_are_left_out(tmp_path):
    nan = float("nan")
    DiceReport(["a", "b", "c"], ["x", "y", "z"], tmp_path)(
        _finished([[0.5, nan, nan], [0.7, 0.9, nan], [nan, nan, nan]])
    )
    rows, summary = _written(tmp_path)
    assert rows[1:] == [
        ["a", "0.500000", "", "", "0.500000"],
        ["b", "0.700000", "0.900000", "", "0.800000"],
        ["c", "", "", "", ""],
    ]
    assert summary["x"]["cases"] == 2
    assert summary["y"] == {"cases": 1, "mean": 0.9, "interval_95": [0.9, 0.9], "min": 0.9}
    assert summary["z"] == {"cases": 0}
    assert summary["mean"]["mean"] == 0.65


def test_scores_must_belong_to_the_cases(tmp_path):
    with pytest.raises(OutputError, match=r"expected Dice of 3 cases and 2 structures, got shape \(1, 2\)"):
        DiceReport(["a", "b", "c"], ["x", "y"], tmp_path)(_finished([[0.5, 0.5]]))
    assert list(tmp_path.iterdir()) == []


def test_it_runs_when_an_evaluation_is_complete(tmp_path):
    def step(engine, batch):
        engine.state.metric_details = {"dice": torch.tensor([[1.0]])}

    engine = Engine(step)
    DiceReport(["a"], ["x"], tmp_path, metric="dice").attach(engine)
    engine.run([0])
    assert _written(tmp_path)[0][1] == ["a", "1.000000", "1.000000"]
    engine.run([0])  # replaces the earlier report
