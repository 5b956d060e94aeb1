import logging
import math

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch.nn import functional as F

from medvit.adapt import probe as module
from medvit.adapt.metrics import auroc
from medvit.adapt.probe import draw_shots, few_shot, fit_linear_probe, grouped_folds, knn


def clouds(n=90, dim=5, classes=3, seed=0, distance=1.5):
    """Class numbers and Gaussian vectors around their centres, of unequal scales."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    centres = distance * torch.randn(classes, dim, generator=torch.Generator().manual_seed(99))
    x = centres[y] + torch.randn(n, dim, generator=generator)
    return x * torch.logspace(-2, 2, dim) + 3, y


# --- linear probe


def penalised(flat, x, y, l2, outputs):
    """The objective as it is written down, for scipy to minimise."""
    w = flat.reshape(outputs, -1)
    logits = x @ w[:, :-1].T + w[:, -1]
    if y.ndim == 1:
        loss = (np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]).mean()
    else:
        loss = (np.log1p(np.exp(logits)) - y * logits).sum(1).mean()
    return loss + l2 / 2 * (w[:, :-1] ** 2).sum()


@pytest.mark.parametrize("labels", ["classes", "labels"])
def test_a_probe_is_the_minimum_of_its_objective(labels):
    x, y = clouds(60, 3)
    if labels == "labels":
        y = torch.stack([y == 0, y < 2], 1).float()
    probe = fit_linear_probe(x, y, l2=0.05)
    outputs = 3 if labels == "classes" else 2
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).double().numpy()
    found = torch.cat([probe.weight, probe.bias[:, None]], 1).flatten().numpy()
    best = optimize.minimize(
        penalised, np.zeros(outputs * 4), (standard, y.numpy(), 0.05, outputs), options={"gtol": 1e-7}
    )
    assert penalised(found, standard, y.numpy(), 0.05, outputs) <= best.fun + 1e-9
    logits = standard @ best.x.reshape(outputs, 4)[:, :3].T + best.x.reshape(outputs, 4)[:, 3]
    theirs = torch.tensor(logits)
    theirs = theirs.softmax(1) if labels == "classes" else theirs.sigmoid()
    assert torch.allclose(probe.probabilities(x), theirs, atol=1e-4)


@pytest.mark.parametrize("labels", ["classes", "labels"])
def test_vectors_longer_than_their_number_have_the_same_minimum(labels):
    x, y = clouds(30, 150)
    if labels == "labels":
        y = torch.stack([y == 0, y < 2], 1).double()
    x = ((x - x.mean(0)) / x.std(0, correction=0)).double()
    outputs = 3 if labels == "classes" else 2
    found = module._solve(x, y, outputs, 0.05).requires_grad_(True)
    loss = module._cross_entropy(module._apply(found, x), y).mean() + 0.05 / 2 * found[:, :-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, found)  # of the whole problem, in all 150 directions
    assert gradient.abs().max() < 1e-7 and found[:, :-1].abs().max() > 1e-3
    elsewhere = torch.randn(found.shape, dtype=found.dtype)
    again = module._solve(x, y, outputs, 0.05, start=elsewhere)
    torch.testing.assert_close(again[:, :-1], found[:, :-1].detach(), atol=1e-6, rtol=0)  # the biases have a free sum


@pytest.mark.upstream
def test_a_probe_agrees_with_scikit_learn():
    linear = pytest.importorskip("sklearn.linear_model")
    x, y = clouds()
    standard = ((x - x.mean(0)) / x.std(0, correction=0)).numpy()
    theirs = linear.LogisticRegression(C=1 / (0.01 * len(x)), tol=1e-8, max_iter=1000).fit(standard, y.numpy())
    ours = fit_linear_probe(x, y, l2=0.01).probabilities(x).numpy()
    assert np.allclose(ours, theirs.predict_proba(standard), atol=1e-4)


def test_labels_are_fitted_each_by_itself():
    x, y = clouds(60)
    both = torch.stack([y == 0, y == 1], 1).long()
    probe = fit_linear_probe(x, both, l2=0.1)
    assert probe.multi_label
    for label in (0, 1):
        single = fit_linear_probe(x, both[:, [label]], l2=0.1)
        assert torch.allclose(probe.probabilities(x)[:, [label]], single.probabilities(x), atol=1e-5)


def test_scale_offset_and_constant_components_do_not_matter():
    x, y = clouds()
    plain = fit_linear_probe(x, y, l2=0.1).probabilities(x)
    moved = torch.cat([1000 * x - 70, torch.full((len(x), 1), 0.3)], 1)
    assert torch.allclose(fit_linear_probe(moved, y, l2=0.1).probabilities(moved), plain, atol=1e-4)
    assert fit_linear_probe(x.bfloat16(), y, l2=0.1).weight.dtype == torch.float64


def test_the_penalty_is_the_one_that_predicts_left_out_patients_best(monkeypatch):
    torch.manual_seed(0)
    x, y = clouds(60, classes=2, distance=0.4)
    x = torch.cat([x, torch.randn(60, 30)], 1)  # what a weak penalty would overfit
    groups = [f"p{i // 3}" for i in range(60)]
    fold = grouped_folds(60, 5, seed=3, groups=groups)
    losses = {}
    for l2 in module.L2:
        total = 0.0
        for number in range(5):
            fitted = fit_linear_probe(x[fold != number], y[fold != number], l2=l2)
            total += F.cross_entropy(fitted.logits(x[fold == number]), y[fold == number], reduction="sum").item()
        losses[l2] = total
    chosen = fit_linear_probe(x, y, groups=groups, folds=5, seed=3)
    assert chosen.l2 == min(losses, key=losses.get)
    assert 1e-4 < chosen.l2 < 10
    direct = fit_linear_probe(x, y, l2=chosen.l2)
    assert torch.equal(chosen.weight, direct.weight)
    tried = []
    solve = module._solve
    monkeypatch.setattr(module, "_solve", lambda *given, **start: tried.append(given[3]) or solve(*given, **start))
    fit_linear_probe(x, y, groups=groups, folds=5, seed=3)
    assert set(tried) == set(module.L2[: module.L2.index(chosen.l2) + 2])  # one weaker, which is worse, and no more


def test_folds_keep_groups_together_and_are_of_one_size():
    groups = [i % 20 for i in range(100)]
    fold = grouped_folds(100, 4, seed=1, groups=groups)
    assert torch.bincount(fold).tolist() == [25] * 4
    assert len({(g, f) for g, f in zip(groups, fold.tolist(), strict=True)}) == 20
    assert torch.equal(fold, grouped_folds(100, 4, seed=1, groups=groups))
    assert not torch.equal(fold, grouped_folds(100, 4, seed=2, groups=groups))
    assert torch.bincount(grouped_folds(11, 3)).tolist() == [4, 4, 3]


def test_a_class_that_is_not_there_can_be_announced():
    x, y = clouds(classes=2)
    probabilities = fit_linear_probe(x, y, l2=0.1, classes=4).probabilities(x)
    assert probabilities.shape == (90, 4)
    assert probabilities[:, 2:].max() < 0.05


def test_a_fit_that_stops_early_says_so(monkeypatch, caplog):
    monkeypatch.setattr(module, "TOLERANCE", 1e-30)
    x, y = clouds()
    with caplog.at_level(logging.WARNING, "medvit"):
        fit_linear_probe(x, y, l2=0.1)
    assert "linear probe with l2=0.1: L-BFGS stopped at a gradient of" in caplog.text


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: fit_linear_probe(x, y[:5]), r"need as many labels, got shapes \(90, 5\) and \(5,\)"),
        (lambda x, y: fit_linear_probe(x[:0], y[:0]), "need as many labels"),
        (lambda x, y: fit_linear_probe(x * torch.nan, y), "vectors must be finite"),
        (lambda x, y: fit_linear_probe(x, y.float()), r"whole numbers from 0, \(N,\), got torch.float32"),
        (lambda x, y: fit_linear_probe(x, y - 1), "whole numbers from 0"),
        (lambda x, y: fit_linear_probe(x, torch.stack([y, y], 1)), r"labels \(N, L\) must be 0 or 1, got \[0, 1, 2\]"),
        (lambda x, y: fit_linear_probe(x, y, classes=2), "must be below classes=2, got 2"),
        (lambda x, y: fit_linear_probe(x, y, l2=0.0), "l2 must be above 0, got 0.0"),
        (lambda x, y: fit_linear_probe(x, y, groups=["a"] * 90), "got 5 folds of 1 groups; use fewer folds"),
        (lambda x, y: grouped_folds(4, 1), "folds must be at least 2"),
        (lambda x, y: grouped_folds(4, 2, groups="abc"), "groups need one name per case, got 3 for 4 cases"),
    ],
)  # fmt: skip
def test_a_probe_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call(*clouds())


# --- nearest neighbours


def slow_knn(x, y, query, k, temperature, classes):
    cosines = [float(F.cosine_similarity(query, v, dim=0)) for v in x]
    votes = [0.0] * classes
    for i in sorted(range(len(x)), key=lambda i: -cosines[i])[:k]:
        votes[int(y[i])] += math.exp(cosines[i] / temperature)
    return [v / sum(votes) for v in votes]


def test_neighbours_vote_by_their_cosine():
    x, y = clouds(40)
    queries, _ = clouds(15, seed=1)
    found = knn(x, y, queries, k=7, temperature=0.2)
    slow = torch.tensor([slow_knn(x.double(), y, q.double(), 7, 0.2, 3) for q in queries])
    assert torch.allclose(found, slow.double(), atol=1e-6)
    assert torch.allclose(knn(x, y, 1000 * queries, k=7, temperature=0.2), found)


def test_votes_of_labels_are_their_weighted_mean(monkeypatch):
    x, y = clouds(40)
    queries, _ = clouds(15, seed=1)
    classes = knn(x, y, queries, k=5)
    monkeypatch.setattr(module, "ROWS", 4)  # which only bounds the memory
    assert torch.allclose(knn(x, y, queries, k=5), classes)
    assert torch.allclose(knn(x, torch.stack([y == 0, y > 0], 1), queries, k=5)[:, 0], classes[:, 0])
    assert knn(x, y, queries, k=5, classes=6).shape == (15, 6)
    assert knn(x, y, queries[:0], k=5).shape == (0, 3)


def test_a_vector_finds_itself():
    x, y = clouds(40)
    assert torch.equal(knn(x, y, x, k=1).argmax(1), y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k must be from 1 to the number of vectors 90, got 0"),
        ({"k": 91}, "got 91"),
        ({"queries": torch.zeros(3, 4)}, r"queries must be finite, \(M, 5\), got shape \(3, 4\)"),
        ({"queries": torch.full((3, 5), torch.nan)}, "queries must be finite"),
    ],
)
def test_neighbours_refuse(change, message):
    x, y = clouds()
    with pytest.raises(ValueError, match=message):
        knn(x, y, **({"queries": x} | change))


# --- few shots


def test_draws_have_k_cases_of_each_class():
    y = torch.tensor([0] * 30 + [1] * 8 + [5] * 6)
    shots = draw_shots(y, 4, 50, seed=2)
    assert all(torch.bincount(y[s]).tolist() == [4, 4, 0, 0, 0, 4] for s in shots)
    assert all(len(set(s.tolist())) == 12 for s in shots)
    assert [s.tolist() for s in draw_shots(y, 4, 50, seed=2)] == [s.tolist() for s in shots]
    often = torch.bincount(torch.cat(shots), minlength=len(y))
    assert (often[30:38].min() > 10) and (often[38:].min() > 20)  # each is drawn, about as often
    assert [s.tolist() for s in draw_shots(y, 4, 50, seed=3)] != [s.tolist() for s in shots]


def test_the_shots_of_a_class_are_of_different_patients():
    y = torch.tensor([0, 1] * 12)
    groups = [i // 4 for i in range(24)]
    seen = set()
    for shot in draw_shots(y, 6, 30, groups=groups):
        for label in (0, 1):
            assert sorted(groups[i] for i in shot.tolist() if y[i] == label) == [0, 1, 2, 3, 4, 5]
        seen |= set(shot.tolist())
    assert seen == set(range(24))
    with pytest.raises(ValueError, match="k=7 needs as many cases or groups of every class, class 0 has 6"):
        draw_shots(y, 7, 1, groups=groups)


def test_few_shots_are_probes_on_the_draws():
    x, y = clouds(80, classes=2, distance=1.0)
    test_x, test_y = clouds(60, classes=2, seed=1, distance=1.0)

    def metric(labels, probabilities):
        return auroc(labels, probabilities[:, 1])

    found = few_shot(x, y, test_x, test_y, metric, k=5, draws=6, seed=4, l2=0.1)
    slow = []
    for shot in draw_shots(y, 5, 6, seed=4):
        slow.append(auroc(test_y, fit_linear_probe(x[shot], y[shot], l2=0.1).probabilities(test_x)[:, 1]))
    assert found.values == pytest.approx(slow)
    interval = stats.t.interval(0.95, 5, np.mean(slow), np.std(slow, ddof=1) / 6**0.5)
    assert (found.low, found.high) == pytest.approx(interval)
    assert (found.mean, found.deviation) == pytest.approx((np.mean(slow), np.std(slow, ddof=1)))
    chosen = few_shot(x, y, test_x, test_y, metric, k=5, draws=2, seed=4, groups=range(80))
    assert len(chosen.values) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draws": 1}, "at least 2 of them, got 1; use 20"),
        ({"k": 0}, "k and draws must be at least 1, got k=0"),
        ({"k": 46}, "k=46 needs as many cases or groups of every class, class 0 has 45"),
        ({"k": 1}, "5 folds of 2 groups; use fewer folds, or give l2"),
        ({"groups": [1, 2]}, "groups need one name per case, got 2 for 90 cases"),
    ],
)
def test_few_shots_refuse(options, message):
    x, y = clouds(classes=2)
    with pytest.raises(ValueError, match=message):
        few_shot(x, y, x, y, lambda y, p: 0.0, **({"k": 2} | options))
    with pytest.raises(ValueError, match=r"got shape \(90, 2\); draw for one label at a time"):
        draw_shots(torch.stack([y, y], 1), 1, 1)
