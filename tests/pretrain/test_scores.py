import csv
import math

import pytest
import torch
from monai.data import MetaTensor
from torch import nn
from torch.nn import functional as F

from medvit.adapt.evaluation import Settings, evaluate
from medvit.adapt.metrics import auroc
from medvit.adapt.probe import fit_linear_probe
from medvit.adapt.tables import read_table
from medvit.pretrain.images import CachedImages, to_unit
from medvit.pretrain.objective import Losses, Objective
from medvit.pretrain.optimizer import adamw, parameter_groups, set_rates
from medvit.pretrain.schedule import Constant
from medvit.pretrain.scores import Predictions, Segmentations, write_table
from medvit.pretrain.supervised import Supervised


class Classifier(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
        self.head = nn.Linear(3, classes)

    def forward(self, x):
        return self.head(self.encoder(x))


class Source:
    def __init__(self, count, classes):
        self.images, self.labels = torch.rand(count, 1, 2, 2), torch.arange(count) % classes
        self.cases = [{"case": f"case {i}"} for i in range(count)]

    def __len__(self):
        return len(self.images)

    def batch(self, indices):
        return {"image": self.images[indices], "label": self.labels[indices]}


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_supervised_is_an_objective():
    network = Classifier(3)
    objective = Supervised(network, nn.CrossEntropyLoss())
    batch = Source(5, 3).batch(slice(None))
    losses = objective(batch, 0.5)
    assert isinstance(objective, Objective) and isinstance(losses, Losses)
    torch.testing.assert_close(losses.loss, F.cross_entropy(network(batch["image"]), batch["label"]))
    assert objective.encoder is network.encoder and objective.exports == {"network": network}
    with pytest.raises(ValueError, match="the batch must hold 'label'"):
        objective({"image": batch["image"]}, 0.0)


@pytest.mark.parametrize("classes", [2, 3])
def test_predictions_are_scored_and_written(tmp_path, classes):
    data, objective = Source(7, classes), Supervised(Classifier(classes), nn.CrossEntropyLoss())
    expected = objective.network(data.images).softmax(1).detach()
    expected = expected[:, 1] if classes == 2 else expected
    seen = {}

    def metric(labels, scores):
        seen.update(labels=labels, scores=scores)
        return 0.25

    watcher = Predictions(data, nn.Identity(), {"metric": metric}, table=tmp_path / "p.csv", batch_size=3)
    assert watcher(objective) == {"val_metric": 0.25}
    torch.testing.assert_close(seen["scores"], expected)
    assert torch.equal(seen["labels"], data.labels) and objective.training
    table = rows(tmp_path / "p.csv")
    assert [row["case"] for row in table] == [f"case {i}" for i in range(7)]
    assert list(table[0]) == ["case", "label", *(["score"] if classes == 2 else [f"score_{i}" for i in range(3)])]
    last = expected[6] if classes == 2 else expected[6, 0]
    assert float(table[6]["score" if classes == 2 else "score_0"]) == pytest.approx(float(last), rel=1e-5)


def test_predictions_are_what_an_inferer_gives():
    data, objective = Source(7, 3), Supervised(Classifier(3), nn.CrossEntropyLoss())
    watcher = Predictions(
        data, nn.Identity(), {}, inferer=lambda images, network: (network(images) + network(images.flip(3))) / 2
    )
    watcher(objective)
    expected = (objective.network(data.images) + objective.network(data.images.flip(3))) / 2
    torch.testing.assert_close(watcher.scores, expected.softmax(1).detach())


def test_several_labels_from_cached_images_to_an_evaluated_table(tmp_path):
    generator = torch.Generator().manual_seed(0)
    cases = [{"image": i, "case": f"c{i}", "found": [float(i % 2), float(i % 3 == 0)]} for i in range(24)]
    pixels = torch.rand(24, 1, 2, 2, generator=generator) / 2
    pixels[:, 0, 0] += torch.tensor([case["found"] for case in cases]) / 2  # two bright pixels, one for each
    data = CachedImages(cases, lambda case: {"image": pixels[case["image"]]}, labels="found")
    objective = Supervised(Classifier(2), nn.BCEWithLogitsLoss())
    optimizer = torch.optim.Adam(objective.parameters(), 0.05)
    for _ in range(150):
        batch = data.batch(range(24))
        optimizer.zero_grad()
        objective({**batch, "image": batch["image"] / 255}, 0.0).loss.backward()
        optimizer.step()

    def each(labels, scores):
        return sum(auroc(labels[:, i].numpy(), scores[:, i].numpy()) for i in range(2)) / 2

    path = tmp_path / "predictions.csv"
    watcher = Predictions(data, to_unit, {"auroc": each}, activation=torch.sigmoid, table=path)
    value = watcher(objective)["val_auroc"]
    assert watcher.scores.shape == (24, 2) and value > 0.95
    found = evaluate(read_table(path), ["auroc"], Settings(resamples=100))
    assert [row["target"] for row in found] == ["0", "1", "macro"]
    assert found[-1]["value"] == pytest.approx(value)
    probe = fit_linear_probe(data.images.flatten(1).float(), data.labels, l2=0.01)
    assert probe.multi_label and each(data.labels, probe.probabilities(data.images.flatten(1).float())) > 0.95


class Cases(list):
    data = ({"case": "a"}, {"case": "b"})


class Threshold(nn.Module):
    """Class 1 above 0.5, class 2 above 1.5."""

    def __init__(self):
        super().__init__()
        self.at = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return torch.cat([-(x - i).abs() for i in range(3)], 1) + self.at


def test_structures_are_scored_case_by_case_in_mm(tmp_path):
    image, spacing = torch.tensor([[[0.0, 1.0, 1.0, 2.0]]]), torch.diag(torch.tensor([2.0, 0.5, 3.0, 1.0]))
    labels = torch.tensor([[[0, 1, 2, 2]]]), torch.tensor([[[0, 1, 1]]])
    items = Cases(
        [
            {"image": image, "label": MetaTensor(labels[0], affine=spacing)},
            {"image": image[..., :3], "label": MetaTensor(labels[1], affine=spacing)},
        ]
    )
    objective = Supervised(Threshold(), nn.MSELoss())
    found = Segmentations(items, ["one", "two"], table=tmp_path / "dice.csv", tolerance=0.4)(objective)
    one, two = (2 / 3 + 1) / 2, 2 / 3
    assert found == pytest.approx({"val_dice_one": one, "val_dice_two": two, "val_dice": (one + two) / 2})
    assert found == Segmentations(
        [dict(item, label=label) for item, label in zip(items, labels, strict=True)], ["one", "two"]
    )(objective)
    # of one: two voxels and one of them, of two: one voxel and it with a neighbour; centres are 0.5 mm apart
    names = ["one", "two", "surface_dice_one", "surface_dice_two", "hd95_one", "hd95_two"]
    first = dict(zip(names, [*[repr(2 / 3)] * 4, "0.475", "0.475"], strict=True))
    second = dict(zip(names, ["1", "", "1", "", "0", ""], strict=True))
    assert rows(tmp_path / "dice.csv") == [{"case": "a", **first}, {"case": "b", **second}]
    plain = Cases([{"image": image, "label": labels[0]}])
    with pytest.raises(TypeError, match="need an image that knows its spacing, a MetaTensor, got Tensor"):
        Segmentations(plain, ["one", "two"], table=tmp_path / "dice.csv")(objective)


def test_a_table_names_the_patients_where_they_are_known(tmp_path):
    cases = [{"case": "a", "group": "p"}, {"case": "b", "group": "p"}]
    write_table(tmp_path / "t.csv", cases, {"x": torch.tensor([0.5, math.nan])})
    assert rows(tmp_path / "t.csv") == [{"case": "a", "group": "p", "x": "0.5"}, {"case": "b", "group": "p", "x": ""}]


def test_what_decays():
    network = nn.Module()
    network.body = nn.Conv3d(1, 2, 3)
    network.norm = nn.LayerNorm(4)
    network.cls_token, network.pos_embed = nn.Parameter(torch.zeros(1, 1, 4)), nn.Parameter(torch.zeros(1, 9, 4))
    network.register_tokens = nn.Parameter(torch.zeros(1, 2, 4))
    network.relative_bias = nn.Module()
    network.relative_bias.table = nn.Parameter(torch.zeros(9, 2))
    network.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)
    decaying, others = parameter_groups(network)
    assert [p is network.body.weight for p in decaying["params"]] == [True]
    assert len(others["params"]) == 7
    scaled = [decaying, {**others, "lr_scale": 0.5}]
    optimizer = adamw(scaled, (0.9, 0.95), 1e-8)
    set_rates(optimizer, Constant(0.2), Constant(0.05), 0.5)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.2, 0.05), (0.1, 0.0)]
