"""What a frozen encoder is good for: linear probe, neighbours and a few shots, on vectors that are computed once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvit.adapt.embeddings import Embeddings, extract
from medvit.adapt.metrics import mean_auroc
from medvit.adapt.probe import few_shot, fit_linear_probe, grouped_folds, knn
from medvit.models.heads import as_encoder
from medvit.pretrain.health import Inferer, at_once
from medvit.pretrain.record import tracked
from medvit.pretrain.scores import columns, write_table

FEATURES = ("embed", "embed+patches", "embed+blocks", "map", "pixels")


class FrozenEvaluation:
    """Probes of an encoder whose weights stay as they are.

    Written are, per kind of features, ``linear.csv`` and ``knn.csv`` with the scores of the held-out cases and
    ``few_shot.csv`` with a row per draw, for ``medvit evaluate``; and ``train.safetensors`` and ``val.safetensors``,
    the vectors (:class:`~medvit.adapt.embeddings.Embeddings`). With ``folds`` also ``cross.csv``: scores of the cases
    of both sources, each by a linear probe that saw none of its fold, for where there are few held-out cases.

    Args:
        network: an encoder, or a network that has one.
        train: source of whole batches with labels and ``cases``, such as
            :class:`~medvit.pretrain.images.CachedImages`; labels ``(N,)`` are classes, ``(N, L)`` several yes or no.
        val: likewise, what is judged on.
        view: images of a batch to what the inferer takes.
        output_dir: of the files; a folder per kind of features below it.
        inferer: called with viewed images and with what makes vectors of them, such as
            :class:`~medvit.inference.crops.MeanOverCrops`, which refuses maps; the plainest one: ``view`` gives what
            the encoder takes.
        features: ``"embed"`` (the encoder's own summary), ``"embed+patches"`` (that and the mean of the last map, as
            DINOv2 is evaluated), ``"embed+blocks"`` (the summary, and four moments of the patches after every block, of
            encoders with ``block_statistics``), ``"map"`` (the whole map, for what depends on where something is; of
            images of one size), ``"pixels"`` (what the encoder is given: what is gained by none), or several.
        shots: cases per class of the few-shot probes; of several labels there are none.
        draws: of the shots.
        neighbours: that vote.
        folds: of the cross-validation, by the cases' groups; 0: none.
        seed: of draws and folds.
        batch_size: images at a time.

    Raises:
        ValueError: unknown features, none, or some that this encoder does not have.
    """

    def __init__(
        self,
        network: nn.Module,
        train: Any,
        val: Any,
        view: Callable[[Tensor], Tensor],
        output_dir: str | Path,
        *,
        inferer: Inferer = at_once,
        features: Sequence[str] = ("embed",),
        shots: int = 16,
        draws: int = 20,
        neighbours: int = 20,
        folds: int = 0,
        seed: int = 0,
        batch_size: int = 256,
    ):
        if not features or not set(features) <= set(FEATURES):
            raise ValueError(f"features must be some of {', '.join(FEATURES)}, got {list(features)}")
        if "embed+blocks" in features and not hasattr(as_encoder(network), "block_statistics"):
            raise ValueError(
                f"embed+blocks needs an encoder with block_statistics, got {type(as_encoder(network)).__name__}; use a "
                "plain vision transformer, or the features embed+patches"
            )
        self.network, self.train, self.val, self.view, self.inferer = network, train, val, view, inferer
        self.output_dir, self.features, self.batch_size = Path(output_dir), tuple(features), batch_size
        self.shots, self.draws, self.neighbours, self.folds, self.seed = shots, draws, neighbours, folds, seed

    def run(self) -> dict[str, float]:
        """Embed, probe, write; the mean AUROC over classes of each, such as ``embed_linear``.

        They are printed too, and written to ``probes.json``.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        train, val = self._embedded(self.train, "train"), self._embedded(self.val, "val")
        found: dict[str, float] = {}
        y, truth, groups = self.train.labels, self.val.labels, groups_of(self.train.cases)
        classes = int(max(y.max(), truth.max(), 1)) + 1 if y.dim() == 1 else None  # of either source
        for name in self.features:
            x, queries = train.vectors[name], val.vectors[name]
            scores = {
                "linear": fit_linear_probe(x, y, classes=classes, seed=self.seed, groups=groups).probabilities(queries),
                "knn": knn(x, y, queries, k=self.neighbours, classes=classes),
            }
            for probe, probabilities in scores.items():
                found[f"{name}_{probe}"] = self._judged(name, probe, self.val.cases, truth, probabilities)
            if self.folds:
                cases, known = [*self.train.cases, *self.val.cases], torch.cat([y, truth])
                crossed = self._crossed(torch.cat([x, queries]), known, groups_of(cases))
                found[f"{name}_cross"] = self._judged(name, "cross", cases, known, crossed)
            if self.shots and y.dim() == 1:
                few = few_shot(
                    x,
                    y,
                    queries,
                    truth,
                    mean_auroc,
                    k=self.shots,
                    draws=self.draws,
                    seed=self.seed,
                    groups=groups,
                    l2=0.1,
                )
                drawn = [{"case": f"draw {i}"} for i in range(self.draws)]
                self._write(name, "few_shot", drawn, {"auroc": torch.tensor(few.values)})
                found |= {
                    f"{name}_few_shot": few.mean,
                    f"{name}_few_shot_low": few.low,
                    f"{name}_few_shot_high": few.high,
                }
        text = json.dumps({name: round(value, 6) for name, value in found.items()}, indent=4) + "\n"
        (self.output_dir / "probes.json").write_text(text, encoding="utf-8")
        print(text, end="")
        return found

    def _embedded(self, source: Any, name: str) -> Embeddings:
        body: Any = as_encoder(self.network)
        makers: dict[str, Callable[[Tensor], Tensor]] = {
            "embed": body.embed,
            "embed+patches": lambda x: torch.cat([body.embed(x), body(x)[-1].flatten(2).mean(2)], 1),
            "embed+blocks": lambda x: torch.cat([body.embed(x), body.block_statistics(x)], 1),
            "map": lambda x: body(x)[-1],
            "pixels": lambda x: x.flatten(1),
        }
        wanted = {kind: makers[kind] for kind in self.features}
        batches = viewed(source, self.view, self.batch_size)
        made = extract(
            body, batches, lambda images: {kind: self.inferer(images, make).flatten(1) for kind, make in wanted.items()}
        )
        made.save(self.output_dir / f"{name}.safetensors")
        return made

    def _crossed(self, x: Tensor, y: Tensor, groups: list[str] | None) -> Tensor:
        """Of each case the probabilities of the probe that was fitted on the other folds."""
        fold = grouped_folds(len(x), self.folds, seed=self.seed, groups=groups)
        classes = int(y.max()) + 1 if y.dim() == 1 else None
        parts = []
        for number in range(self.folds):
            inside = fold != number
            known = None if groups is None else [name for name, seen in zip(groups, inside, strict=True) if seen]
            probe = fit_linear_probe(x[inside], y[inside], classes=classes, seed=self.seed, groups=known)
            parts.append(probe.probabilities(x[~inside]))
        scores = torch.empty(len(x), parts[0].shape[1], dtype=parts[0].dtype)
        for number, part in enumerate(parts):
            scores[fold == number] = part
        return scores

    def _judged(
        self, features: str, probe: str, cases: Sequence[Mapping[str, Any]], truth: Tensor, probabilities: Tensor
    ) -> float:
        """Write the table of scores; the mean AUROC."""
        kept = probabilities[:, 1] if truth.dim() == 1 and probabilities.shape[1] == 2 else probabilities
        self._write(features, probe, cases, {**columns("label", truth), **columns("score", kept)})
        return mean_auroc(truth, probabilities)

    def _write(
        self, features: str, probe: str, cases: Sequence[Mapping[str, Any]], values: Mapping[str, Tensor]
    ) -> None:
        write_table(self.output_dir / features / f"{probe}.csv", cases, values)


def viewed(source: Any, view: Callable[[Tensor], Tensor], batch_size: int) -> Iterator[tuple[list[str], Tensor]]:
    """Names and viewed images of all cases of a source, in order, ``batch_size`` at a time."""
    for first in tracked(range(0, len(source), batch_size), "embedding"):
        chosen = list(range(first, min(first + batch_size, len(source))))
        yield [source.cases[n]["case"] for n in chosen], view(source.batch(chosen)["image"])


def groups_of(cases: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The ``group`` of each case, such as the patient; None where cases have none."""
    return [case["group"] for case in cases] if "group" in cases[0] else None
