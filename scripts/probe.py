"""Frozen features judged: linear probe and 16-shot of a fine-tuning recipe's encoder, on its validation cases.

    python scripts/probe.py configs/finetune/cxr_viral.json DATA --encoder OUT/encoder.safetensors --output probe.csv

Network, images, view and labels are those of the recipe; ``--encoder ''`` judges the random one. The table is for
``medvit evaluate``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from monai.bundle import ConfigParser
from monai.utils import set_determinism
from torch import Tensor

from medvit.adapt.embeddings import Embeddings, extract
from medvit.adapt.metrics import auroc
from medvit.adapt.probe import few_shot, fit_linear_probe, knn

BATCH = 256


def parsed(recipe: Path, data: Path, encoder: str) -> ConfigParser:
    """The recipe with its data and encoder."""
    parser = ConfigParser()
    parser.read_config(str(recipe))
    parser.update({"dataset_dir": str(data), "encoder": encoder})
    return parser


def embedded(encoder: Any, images: Any, view: Any) -> tuple[Embeddings, Tensor]:
    """Vectors of all cases and their labels."""

    def batches() -> Iterator[tuple[Sequence[str], Tensor]]:
        for first in range(0, len(images), BATCH):
            chosen = range(first, min(first + BATCH, len(images)))
            yield [images.cases[n]["case"] for n in chosen], view(images.batch(list(chosen))["image"])

    return extract(encoder, batches()), images.labels


def main(arguments: list[str] | None = None) -> None:
    """Embed, probe, print, write."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("recipe", type=Path)
    options.add_argument("data", type=Path)
    options.add_argument("--encoder", default="", help="encoder.safetensors of a pre-training; '': random weights")
    options.add_argument("--shots", type=int, default=16, help="cases per class (default 16)")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--output", type=Path, help="CSV: case, label, score of the linear probe")
    given = options.parse_args(arguments)
    set_determinism(given.seed)
    recipe = parsed(given.recipe, given.data, given.encoder)
    network, view = recipe.get_parsed_content("network"), recipe.get_parsed_content("whole_view")
    train, y = embedded(network.encoder, recipe.get_parsed_content("train_data"), view)
    val, truth = embedded(network.encoder, recipe.get_parsed_content("val_data"), view)
    x, test = train.of(train.cases), val.of(val.cases)

    def judge(labels: Tensor, probabilities: Tensor) -> float:
        return auroc(labels.numpy(), probabilities[:, 1].numpy())

    scores = fit_linear_probe(x, y, seed=given.seed).probabilities(test)
    shots = few_shot(x, y, test, truth, judge, k=given.shots, seed=given.seed, l2=0.1)
    print(f"{len(y)} training and {len(truth)} validation cases, {x.shape[1]} dimensions; AUROC")
    print(f"linear probe {judge(truth, scores):.4f}")
    print(f"kNN          {judge(truth, knn(x, y, test)):.4f}")
    print(f"{given.shots}-shot      {shots.mean:.4f} [{shots.low:.4f}, {shots.high:.4f}] over 20 draws")
    if given.output:
        with given.output.open("w", newline="", encoding="utf-8") as file:
            rows = zip(val.cases, truth.tolist(), scores[:, 1].tolist(), strict=True)
            csv.writer(file).writerows([("case", "label", "score"), *rows])


if __name__ == "__main__":
    main()
