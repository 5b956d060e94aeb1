"""Is a network learning anything? Measured on its features while it trains, cheaply, and without leaving a trace."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from medvit.pretrain.record import logger

# vectors (N, D) and labels (N,) to learn from, vectors (M, D) to judge; probabilities (M, classes)
Probe = Callable[[Tensor, Tensor, Tensor], Tensor]
Metric = Callable[[Tensor, Tensor], float]
View = Callable[[Tensor], Tensor]
Inferer = Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]  # images and a network to what it says of them


def at_once(images: Tensor, network: Callable[[Tensor], Tensor]) -> Tensor:
    """The plainest inferer: what a network says of images as they are."""
    return network(images)


def effective_rank(x: Tensor) -> float:
    """Number of directions that vectors ``(N, D)`` spread over: exp of the entropy of their singular values' shares.

    The mean is taken off first. 1 of vectors on a line, D of a ball, 0 if all are equal, NaN if one is not
    finite. Roy & Vetterli, "The effective rank" (EUSIPCO 2007).
    """
    if not x.isfinite().all():
        return math.nan
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    total = values.sum()
    if total <= 1e-12 * x.abs().sum():
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def dead_dimensions(x: Tensor, threshold: float = 0.01) -> int:
    """How many components of vectors ``(N, D)`` hardly vary: by less than ``threshold`` of the root mean variance."""
    variance = x.double().var(0, correction=0)
    return int((variance <= threshold**2 * variance.mean()).sum())


def assignment_entropy(probabilities: Tensor) -> tuple[float, float]:
    """Entropy of assignments ``(N, K)`` to prototypes, over ``log(K)``: of each, averaged, and of their mean.

    The first near 1: every sample gets the uniform distribution. The second near 0: all get the same prototype. Both
    are ways to collapse.
    """
    p = probabilities.double()
    most = math.log(p.shape[1])
    return float(torch.special.entr(p).sum(1).mean()) / most, float(torch.special.entr(p.mean(0)).sum()) / most


class FeatureHealth:
    """Watcher for a :class:`~medvit.pretrain.trainer.Trainer`: what the encoder's vectors are like and good for.

    Logged are ``effective_rank`` and ``dead_dimensions`` of the vectors of ``train``, ``teacher_entropy`` and
    ``teacher_usage`` (see :func:`assignment_entropy`) of an objective that has a ``teacher`` with a ``dino_head``, and
    ``NAME`` for each probe: fitted to ``train``, scored on ``val``.

    Args:
        train: source with ``batch(indices)``, such as :class:`~medvit.pretrain.images.CachedImages`; with labels if
            there are probes.
        view: images of a batch to what the encoder takes.
        val: like ``train``; needed by probes.
        probes: vectors, labels and other vectors to probabilities ``(M, classes)``, by name.
        metric: labels and scores to a number, e.g. AUROC; of two classes the scores are the probability of the second,
            of more, and of several labels, all probabilities.
        limit: images taken of each source, drawn once with ``seed``.
        batch_size: images embedded at a time.
        seed: see ``limit``.
        prefix: of all names in the log, where several speak of one run.

    Raises:
        ValueError: probes without labels, ``val`` or ``metric``.
    """

    def __init__(
        self,
        train: Any,
        view: View,
        *,
        val: Any = None,
        probes: Mapping[str, Probe] | None = None,
        metric: Metric | None = None,
        limit: int = 1000,
        batch_size: int = 128,
        seed: int = 0,
        prefix: str = "",
    ):
        if probes and (val is None or metric is None):
            raise ValueError("probes need val, to be scored on, and metric, which scores them")
        if probes and any(getattr(source, "labels", True) is None for source in (train, val)):
            raise ValueError("probes need train and val with labels; give their source labels, or leave out the probes")
        self.train, self.val, self.view = train, val, view
        self.probes, self.metric = dict(probes or {}), metric
        self.limit, self.batch_size, self.seed, self.prefix = limit, batch_size, seed, prefix

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        """The numbers; modes of all modules and the random generators are as before."""
        encoder: Any = objective.encoder
        with evaluation(objective), torch.no_grad():
            vectors, labels = self._embed(encoder, self.train)
            found = {"effective_rank": effective_rank(vectors), "dead_dimensions": float(dead_dimensions(vectors))}
            found |= self._teacher(getattr(objective, "teacher", None))
            if self.probes:
                queries, truth = self._embed(encoder, self.val)
                found |= {
                    name: self._scored(probe, vectors, labels, queries, truth) for name, probe in self.probes.items()
                }
        return {f"{self.prefix}{name}": value for name, value in found.items()}

    def _images(self, source: Any) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed)
        chosen = torch.randperm(len(source), generator=generator)[: self.limit].sort().values.tolist()
        return [chosen[i : i + self.batch_size] for i in range(0, len(chosen), self.batch_size)]

    def _embed(self, encoder: Any, source: Any) -> tuple[Tensor, Tensor]:
        """Float32 vectors and labels on the CPU; of a source without labels these are empty."""
        device = next(encoder.parameters()).device
        vectors, labels = [], []
        for indices in self._images(source):
            batch = source.batch(indices)
            vectors.append(encoder.embed(self.view(images_of(batch).to(device))).float().cpu())
            labels.append(batch.get("label", torch.empty(0)))
        return torch.cat(vectors), torch.cat(labels)

    def _teacher(self, teacher: Any) -> dict[str, float]:
        """Entropies of a teacher's assignments, centred on this sample, at DINO's final temperature."""
        if not hasattr(teacher, "dino_head"):
            return {}
        device = next(teacher.parameters()).device
        batches = (images_of(self.train.batch(indices)).to(device) for indices in self._images(self.train))
        logits = torch.cat(
            [teacher.dino_head(teacher.encoder.embed(self.view(batch))).float().cpu() for batch in batches]
        )
        each, mean = assignment_entropy(((logits - logits.mean(0)) / 0.07).softmax(1))
        return {"teacher_entropy": each, "teacher_usage": mean}

    def _scored(self, probe: Probe, vectors: Tensor, labels: Tensor, queries: Tensor, truth: Tensor) -> float:
        assert self.metric is not None
        if not (vectors.isfinite().all() and queries.isfinite().all()):
            return math.nan
        try:
            scores = probe(vectors, labels, queries)
            two_classes = truth.dim() == 1 and scores.shape[1:] == (2,)
            return float(self.metric(truth, scores[:, 1] if two_classes else scores))
        except ValueError as error:  # such as fewer images than neighbours, or one class; no reason to stop a training
            logger.warning("a probe of the features gives no number: %s", error)
            return math.nan


def images_of(batch: Mapping[str, Tensor]) -> Tensor:
    """The one entry that is no label."""
    (images,) = [value for name, value in batch.items() if name != "label"]
    return images


@contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
