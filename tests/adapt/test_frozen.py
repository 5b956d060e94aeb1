import csv

import numpy as np
import pytest
import torch
from monai.inferers import SimpleInferer
from torch import nn
from training_synthetic import Encoder, Told

from medvit.adapt.embeddings import Embeddings
from medvit.adapt.frozen import FrozenEvaluation
from medvit.adapt.metrics import auroc, mean_auroc
from medvit.adapt.probe import few_shot, fit_linear_probe, grouped_folds, knn
from medvit.inference.crops import MeanOverCrops
from medvit.models.heads import as_encoder


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def evaluation(folder, labels, encoder=None, **options):
    torch.manual_seed(0)
    network = nn.Module()
    network.encoder = encoder or Encoder()
    sources = Told(60, labels), Told(24, labels, seed=1)
    options = {"batch_size": 7, "neighbours": 5, "shots": 3} | options
    return FrozenEvaluation(network, *sources, lambda x: x / 2, folder, **options)


def test_scores_are_those_of_the_probes_on_the_encoders_vectors(tmp_path):
    made = evaluation(tmp_path, lambda i: (i // 2) % 2)
    found = made.run()
    encoder, sources = made.network.encoder, {"train": made.train, "val": made.val}
    kept = {name: Embeddings.load(tmp_path / f"{name}.safetensors", encoder) for name in sources}
    x, queries = (kept[name].of([case["case"] for case in source.cases]) for name, source in sources.items())
    with torch.no_grad():
        torch.testing.assert_close(queries, encoder.embed(made.val.images / 2))
    groups = [case["group"] for case in made.train.cases]
    expected = {
        "linear": fit_linear_probe(x, made.train.labels, groups=groups).probabilities(queries)[:, 1],
        "knn": knn(x, made.train.labels, queries, k=5)[:, 1],
    }
    for probe, scores in expected.items():
        table = rows(tmp_path / f"embed/{probe}.csv")
        assert [(row["case"], row["group"]) for row in table] == [(c["case"], c["group"]) for c in made.val.cases]
        assert [float(row["score"]) for row in table] == pytest.approx(scores.tolist(), rel=1e-4)
        assert found[f"embed_{probe}"] == pytest.approx(auroc(made.val.labels, scores))
    draws = [float(row["auroc"]) for row in rows(tmp_path / "embed/few_shot.csv")]
    assert len(draws) == 20 and found["embed_few_shot"] == pytest.approx(sum(draws) / 20)
    assert found["embed_few_shot_low"] < found["embed_few_shot"] < found["embed_few_shot_high"]
    assert found["embed_linear"] > 0.75  # brightness is told


def test_vectors_are_what_an_inferer_makes_of_the_views(tmp_path):
    def both(images, network):
        return (network(images) + network(images.flip(3))) / 2

    made = evaluation(tmp_path, lambda i: (i // 2) % 2, inferer=both, features=["embed", "pixels"], shots=0)
    made.run()
    kept, x = Embeddings.load(tmp_path / "val.safetensors").vectors, made.val.images / 2
    with torch.no_grad():
        embed = made.network.encoder.embed
        torch.testing.assert_close(kept["embed"], (embed(x) + embed(x.flip(3))) / 2)
    torch.testing.assert_close(kept["pixels"], ((x + x.flip(3)) / 2).flatten(1))


def test_a_map_is_what_the_encoder_gives_and_its_mean_over_crops_is_refused(tmp_path):
    inferer = MeanOverCrops(SimpleInferer(), tuple(Told(1, lambda i: i).images.shape[2:]))
    with pytest.raises(ValueError, match=r"a vector per image, \(B, K\), got shape \(7, 12, "):
        evaluation(tmp_path, lambda i: (i // 2) % 2, inferer=inferer, features=["map"]).run()


def test_shots_are_of_different_patients(tmp_path, monkeypatch):
    seen = []

    def spied(*args, **options):
        seen.append(options["groups"])
        return few_shot(*args, **options)

    monkeypatch.setattr("medvit.adapt.frozen.few_shot", spied)
    made = evaluation(tmp_path, lambda i: (i // 2) % 2)
    made.run()
    assert seen == [[case["group"] for case in made.train.cases]]


def test_a_class_of_held_out_cases_alone_is_scored_and_judged(tmp_path):
    made = evaluation(tmp_path, lambda i: (i // 2) % 2, shots=0)
    made.val.labels = torch.arange(24) // 2 % 3
    found = made.run()
    for probe in ("linear", "knn"):
        table = rows(tmp_path / f"embed/{probe}.csv")
        scores = np.array([[float(row[f"score_{i}"]) for i in range(3)] for row in table])
        assert found[f"embed_{probe}"] == pytest.approx(mean_auroc(made.val.labels, scores))


def test_patches_may_be_added_to_the_summary(tmp_path):
    made = evaluation(tmp_path, lambda i: (i // 2) % 2, features=["embed", "embed+patches", "map"])
    found = made.run()
    assert {"embed_linear", "embed+patches_linear", "map_linear"} <= found.keys()
    kept = Embeddings.load(tmp_path / "train.safetensors").vectors
    both = kept["embed+patches"]
    with torch.no_grad():
        (patches,) = made.network.encoder(made.train.images / 2)
    torch.testing.assert_close(both[:, 12:], patches.mean((2, 3)))
    torch.testing.assert_close(kept["map"], patches.flatten(1))
    assert len(rows(tmp_path / "embed+patches/knn.csv")) == 24


@pytest.mark.parametrize("name", ["vit", "rad_dino"])
def test_every_block_may_be_added_to_the_summary(tmp_path, name):
    size = tuple(Told(1, lambda i: i).images.shape[2:])
    encoder = as_encoder(
        {"name": name, "in_channels": 1, "img_size": size, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2}
    )
    made = evaluation(tmp_path, lambda i: (i // 2) % 2, encoder, features=["embed+blocks"])
    assert made.run().keys() >= {"embed+blocks_linear", "embed+blocks_knn"}
    kept, x = Embeddings.load(tmp_path / "train.safetensors").vectors["embed+blocks"], made.train.images / 2
    with torch.no_grad():
        expected = torch.cat([encoder.embed(x), encoder.block_statistics(x)], 1)
    assert kept.shape[1] == 8 + 4 * 2 * 8
    torch.testing.assert_close(kept, expected, rtol=1e-4, atol=1e-5)


def test_an_encoder_without_blocks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"^embed\+blocks needs an encoder with block_statistics, got Encoder; use a"):
        evaluation(tmp_path, lambda i: i % 2, features=["embed+blocks"])


def test_several_classes_and_several_labels(tmp_path):
    three = evaluation(tmp_path / "three", lambda i: (i // 2) % 3).run()
    assert three["embed_linear"] > 0.75 and "embed_few_shot" in three
    assert list(rows(tmp_path / "three/embed/linear.csv")[0])[2:] == ["label", "score_0", "score_1", "score_2"]
    several = evaluation(tmp_path / "two", lambda i: torch.stack([i // 2 % 2, i // 4 % 2], 1)).run()
    assert several["embed_linear"] > 0.65 and "embed_few_shot" not in several
    assert list(rows(tmp_path / "two/embed/knn.csv")[0])[2:] == ["label_0", "label_1", "score_0", "score_1"]


@pytest.mark.parametrize("labels", [lambda i: (i // 2) % 2, lambda i: torch.stack([i // 2 % 2, i // 4 % 2], 1)])
def test_a_cross_validated_case_is_scored_by_probes_that_saw_nothing_of_its_patient(tmp_path, labels):
    made = evaluation(tmp_path, labels, features=["pixels"], folds=3, seed=2, shots=0)
    made.val.cases = [{"case": f"v{i}", "group": f"p{i // 2 + 28}"} for i in range(24)]  # two patients are in both
    found = made.run()
    cases = [*made.train.cases, *made.val.cases]
    y, groups = torch.cat([made.train.labels, made.val.labels]), [case["group"] for case in cases]
    x = torch.cat([made.train.images, made.val.images]).flatten(1) / 2
    table = rows(tmp_path / "pixels/cross.csv")
    assert [(row["case"], row["group"]) for row in table] == [(case["case"], case["group"]) for case in cases]
    several = y.dim() == 2
    scores = torch.tensor([[float(row[name]) for name in row if name.startswith("score")] for row in table])
    for number in range(3):
        fold = grouped_folds(84, 3, seed=2, groups=groups) == number
        others = [name for name, left_out in zip(groups, fold, strict=True) if not left_out]
        assert not set(others) & {name for name, left_out in zip(groups, fold, strict=True) if left_out}
        probe = fit_linear_probe(x[~fold], y[~fold], groups=others, seed=2)
        expected = probe.probabilities(x[fold]) if several else probe.probabilities(x[fold])[:, 1:]
        torch.testing.assert_close(scores[fold].double(), expected, rtol=1e-3, atol=1e-5)
    expected = mean_auroc(y, scores) if several else auroc(y, scores[:, 0])
    assert found["pixels_cross"] == pytest.approx(expected, abs=1e-6)
    assert found.keys() == {"pixels_linear", "pixels_knn", "pixels_cross"}


def test_without_folds_nothing_is_cross_validated(tmp_path):
    found = evaluation(tmp_path, lambda i: (i // 2) % 2).run()
    assert "embed_cross" not in found and not (tmp_path / "embed/cross.csv").exists()


def test_features_must_be_known(tmp_path):
    message = r"features must be some of embed, embed\+patches, embed\+blocks, map, pixels, got \['cls'\]"
    with pytest.raises(ValueError, match=message):
        evaluation(tmp_path, lambda i: i % 2, features=["cls"])
