"""Where the head of a classifier starts: at random, or from the linear probe of what it will read."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from medvit.adapt.embeddings import extract
from medvit.adapt.frozen import groups_of, viewed
from medvit.adapt.probe import fit_linear_probe
from medvit.pretrain.health import Inferer, View, at_once

HEADS = ("fresh", "probe")
logger = logging.getLogger("medvit")


def start_head(
    network: nn.Module,
    how: str,
    data: Any,
    view: View,
    *,
    inferer: Inferer = at_once,
    l2: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> nn.Module:
    """Decide where the head starts. Load the encoder's weights first.

    A head that starts from the linear probe leaves fine-tuning only what a frozen encoder cannot do, and spares the
    encoder the gradients of a random head, which distort it (LP-FT: Kumar et al., ICLR 2022, arXiv:2202.10054).

    Args:
        network: changed in place; its ``head`` is a :class:`torch.nn.Linear` with a bias.
        how: ``"fresh"``: as it is. ``"probe"``: the weights of :func:`~medvit.adapt.probe.fit_linear_probe` on what the
            head is given, the standardisation folded in, so that the network's outputs are the probe's logits.
        data: source of whole batches with labels and ``cases``, such as
            :class:`~medvit.pretrain.images.CachedImages`; labels ``(N,)`` are classes, ``(N, L)`` several yes or no.
        view: images of a batch to what the inferer takes; whole images, nothing at random.
        inferer: called with viewed images and the network, such as :class:`~medvit.inference.crops.MeanOverCrops`: the
            probe is fitted on the mean of what the head is given.
        l2: penalty of the probe; None: chosen on folds by the training cases' groups.
        seed: of the folds.
        batch_size: images at a time.

    Returns:
        What was given.

    Raises:
        ValueError: another way, no such head, or outputs that are not the classes or labels.
    """
    if how not in HEADS:
        raise ValueError(f"how must be one of {', '.join(HEADS)}, got {how!r}")
    if how == "fresh":
        return network
    head = getattr(network, "head", None)
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise ValueError(
            f"a head that starts from a probe is a linear layer with a bias named head; that of "
            f"{type(network).__name__} is {head}; use how='fresh'"
        )
    given = _inputs(network, head, data, view, inferer, batch_size)
    labels = data.labels
    classes = head.out_features if labels.dim() == 1 else None
    probe = fit_linear_probe(given, labels, l2=l2, classes=classes, groups=groups_of(data.cases), seed=seed)
    if probe.weight.shape != head.weight.shape:
        raise ValueError(f"the head has {head.out_features} outputs, but the labels make {len(probe.weight)}")
    with torch.no_grad():
        head.weight.copy_(probe.weight / probe.scale)
        head.bias.copy_(probe.bias - (probe.weight / probe.scale) @ probe.mean)
    logger.info("the head starts from a linear probe of %d cases, penalty %g", len(given), probe.l2)
    return network


def _inputs(network: nn.Module, head: nn.Linear, data: Any, view: View, inferer: Inferer, batch_size: int) -> Tensor:
    """What the head is given of each case, ``(N, D)``, in evaluation mode."""
    given: list[Tensor] = []

    def reads(images: Tensor) -> Tensor:
        network(images)
        return given.pop()

    hook = head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    try:
        batches = viewed(data, view, batch_size)
        return extract(network, batches, lambda images: {"given": inferer(images, reads)}).vectors["given"]
    finally:
        hook.remove()
