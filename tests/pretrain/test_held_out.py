import csv
import random

import numpy as np
import torch
from torch import nn

from medvit.pretrain.held_out import HeldOutLoss
from medvit.pretrain.objective import Losses


class Source:
    def __init__(self, key, values):
        self.key, self.values, self.cases = key, values, [{"case": f"{key}_{i}"} for i in range(len(values))]

    def __len__(self):
        return len(self.values)

    def batch(self, indices):
        return {self.key: self.values[indices]}


class Objective(nn.Module):
    """Says what it was shown, and which random numbers it drew."""

    def __init__(self):
        super().__init__()
        self.weight, self.modes = nn.Parameter(torch.ones(())), []

    def forward(self, batch, progress):
        ((key, x),) = batch.items()
        assert len(x) == 1 and progress == 1.0 and not torch.is_grad_enabled()
        self.modes.append(self.training)
        loss = self.weight * x.sum()
        return Losses(loss, {f"{key}_sum": loss, f"{key}_drawn": torch.rand(()) + np.random.rand() + random.random()})  # noqa: NPY002


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_each_image_has_its_own_loss_and_its_own_numbers(tmp_path):
    flat, deep = Source("flat", torch.arange(3.0)[:, None]), Source("deep", torch.arange(2.0)[:, None] + 10)
    watcher = HeldOutLoss([flat, deep], lambda b: {k: 2 * v for k, v in b.items()}, table=tmp_path / "loss.csv")
    objective = Objective()
    before = torch.get_rng_state()
    found = watcher(objective)
    assert torch.equal(torch.get_rng_state(), before) and objective.training and not any(objective.modes)
    assert found["val_flat_sum"] == 2.0 and found["val_deep_sum"] == 21.0
    table = rows(tmp_path / "loss_flat.csv")
    assert [row["case"] for row in table] == ["flat_0", "flat_1", "flat_2"]
    assert [float(row["flat_sum"]) for row in table] == [0.0, 2.0, 4.0]
    drawn = [row["flat_drawn"] for row in table]
    assert len(set(drawn)) == 3  # other patches are hidden in each image
    torch.rand(5), np.random.rand(5), random.random()  # noqa: NPY002
    assert watcher(objective) == found  # and the same whenever it is asked
    assert [row["deep_drawn"] for row in rows(tmp_path / "loss_deep.csv")] == drawn[:2]
    other = HeldOutLoss(flat, dict, table=tmp_path / "one.csv", seed=1)(objective)
    assert other["val_flat_sum"] == 1.0 and other["val_flat_drawn"] != found["val_flat_drawn"]
    assert len(rows(tmp_path / "one.csv")) == 3
