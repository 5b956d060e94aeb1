import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import nn
from training_synthetic import Encoder

from medvit.adapt.metrics import auroc
from medvit.pretrain.health import FeatureHealth, assignment_entropy, dead_dimensions, effective_rank


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    x = np.random.default_rng(0).normal(size=(50, 6)) * [9, 4, 2, 1, 0.5, 0.1] + 7
    values = np.sqrt(np.linalg.eigvalsh(np.cov(x.T)))
    assert effective_rank(torch.tensor(x)) == pytest.approx(math.exp(entropy(values / values.sum())), rel=1e-9)


def test_effective_rank_of_known_shapes():
    corners = torch.cat([torch.eye(5), -torch.eye(5)])
    assert effective_rank(corners) == pytest.approx(5)
    assert effective_rank(torch.linspace(0, 1, 9)[:, None] * torch.ones(4)) == pytest.approx(1)
    assert effective_rank(torch.full((8, 3), 0.1)) == 0


def test_dead_dimensions_are_those_that_hardly_vary():
    x = torch.randn(400, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1.0, 1e-3, 1.0, 0.0]) + 50
    assert dead_dimensions(x) == 2
    assert dead_dimensions(torch.zeros(9, 5)) == 5


def test_entropies_tell_the_two_collapses_apart():
    uniform, one, spread = torch.full((8, 4), 0.25), torch.eye(4)[[1] * 8], torch.eye(4).repeat(2, 1)
    assert assignment_entropy(uniform) == pytest.approx((1, 1))
    assert assignment_entropy(one) == pytest.approx((0, 0))
    assert assignment_entropy(spread) == pytest.approx((0, 1))
    p = torch.rand(7, 5).softmax(1)
    each, mean = assignment_entropy(p)
    assert each == pytest.approx(entropy(p.numpy(), axis=1).mean() / math.log(5), rel=1e-5)
    assert mean == pytest.approx(entropy(p.numpy().mean(0)) / math.log(5), rel=1e-5)


class Source:
    def __init__(self, count, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 2
        self.images = torch.rand(count, 1, 8, 8, generator=generator) + self.labels[:, None, None, None]
        self.asked = []

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        self.asked += indices
        return {"image": self.images[indices], "label": self.labels[indices]}


class Objective(nn.Module):
    def __init__(self, teacher=False):
        super().__init__()
        self.encoder, self.drop = Encoder(), nn.Dropout(0.5)
        self.drop.eval()
        if teacher:
            self.teacher = nn.Module()
            self.teacher.encoder, self.teacher.dino_head = self.encoder, nn.Linear(12, 16)


def nearest_centre(x, y, queries):
    centres = torch.stack([x[y == k].mean(0) for k in range(2)])
    return (-torch.cdist(queries, centres)).softmax(1)


def accuracy(labels, scores):
    assert scores.dim() == 1
    return float(((scores > 0.5) == labels.bool()).float().mean())


def test_health_of_an_encoder():
    train, val, objective = Source(40), Source(20, seed=1), Objective(teacher=True)
    check = FeatureHealth(
        train, nn.Identity(), val=val, probes={"centre": nearest_centre}, metric=accuracy, limit=30, batch_size=7
    )
    before = torch.get_rng_state()
    found = check(objective)
    with torch.no_grad():
        chosen = sorted(torch.randperm(40, generator=torch.Generator().manual_seed(0))[:30].tolist())
        vectors = objective.encoder.embed(train.images[chosen])
        logits = objective.teacher.dino_head(vectors)
        p = ((logits - logits.mean(0)) / 0.07).softmax(1)
        scores = nearest_centre(vectors, train.labels[chosen], objective.encoder.embed(val.images))[:, 1]
    assert found == pytest.approx(
        {
            "effective_rank": effective_rank(vectors),
            "dead_dimensions": dead_dimensions(vectors),
            "teacher_entropy": assignment_entropy(p)[0],
            "teacher_usage": assignment_entropy(p)[1],
            "centre": accuracy(val.labels, scores),
        },
        rel=1e-4,
    )
    assert found["centre"] > 0.9
    assert train.asked[:30] == chosen and sorted(val.asked) == list(range(20))
    assert objective.training and not objective.drop.training  # as they were
    assert torch.equal(torch.get_rng_state(), before)


def test_vectors_that_are_not_finite_give_no_number():
    objective = Objective()
    objective.encoder.patch.bias.data.fill_(math.nan)
    source = Source(8)
    check = FeatureHealth(source, nn.Identity(), val=source, probes={"centre": nearest_centre}, metric=accuracy)
    found = check(objective)
    assert math.isnan(found["centre"]) and math.isnan(found["effective_rank"])


def test_a_sample_with_one_class_gives_no_number_and_stops_nothing(caplog):
    source = Source(8)
    source.labels = torch.zeros(8, dtype=torch.int64)
    probes = {"constant": lambda x, y, queries: torch.full((len(queries), 2), 0.5)}
    check = FeatureHealth(source, nn.Identity(), val=source, probes=probes, metric=auroc, prefix="image2d_")
    found = check(Objective())
    assert "a probe of the features gives no number: AUROC needs positive and negative cases" in caplog.text
    assert math.isnan(found["image2d_constant"]) and found["image2d_effective_rank"] > 1


def test_probes_need_something_to_be_scored_on():
    unlabelled = Source(4)
    unlabelled.labels = None
    with pytest.raises(ValueError, match="probes need train and val with labels"):
        FeatureHealth(Source(4), nn.Identity(), val=unlabelled, probes={"centre": nearest_centre}, metric=accuracy)
    with pytest.raises(ValueError, match="probes need val"):
        FeatureHealth(Source(4), nn.Identity(), probes={"centre": nearest_centre}, metric=accuracy)


def test_of_two_labels_the_metric_sees_both():
    source, seen = Source(8), []
    source.labels = torch.stack([source.labels, 1 - source.labels], 1)
    check = FeatureHealth(
        source,
        nn.Identity(),
        val=source,
        probes={"constant": lambda x, y, queries: torch.full((len(queries), 2), 0.5)},
        metric=lambda labels, scores: seen.append((labels, scores)) or 0.25,
    )
    assert check(Objective())["constant"] == 0.25
    assert torch.equal(seen[0][0], source.labels) and seen[0][1].shape == (8, 2)
