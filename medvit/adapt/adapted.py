"""How much of a pre-trained network a fine-tuning trains, by one word in a recipe."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from medvit.adapt.finetune import train_only
from medvit.adapt.lora import adapters, add_lora, save_lora
from medvit.models.heads import as_encoder

WAYS = ("full", "lora", "frozen")
ATTENTION = (r".*attn\.(qkv|proj)",)


def adapted(
    network: nn.Module, how: str = "full", *, targets: Sequence[str] = ATTENTION, rank: int = 8, alpha: float = 16.0
) -> nn.Module:
    """Decide what of a network is trained. Load its weights first.

    Args:
        network: changed in place; see :func:`~medvit.models.heads.as_encoder`. What it has around the encoder, such as
            a head, is always trained.
        how: ``"full"``: all of it. ``"frozen"``: nothing of the encoder, which stays in evaluation mode.
            ``"lora"``: of the encoder adapters only, see :func:`~medvit.adapt.lora.add_lora`.
        targets: which layers of the encoder get adapters, regular expressions of whole names in it.
        rank: of the adapters.
        alpha: likewise.

    Returns:
        What was given.

    Raises:
        ValueError: another way, nothing around the encoder to train, targets or a rank that do not fit.
    """
    if how not in WAYS:
        raise ValueError(f"how must be one of {', '.join(WAYS)}, got {how!r}")
    if how == "full":
        return network
    encoder = as_encoder(network)
    inside = {id(parameter) for parameter in encoder.parameters()}
    around = [re.escape(name) for name, parameter in network.named_parameters() if id(parameter) not in inside]
    if not around:
        raise ValueError(f"{type(network).__name__} has nothing around its encoder to train; use how='full'")
    if how == "lora":
        (root,) = (name for name, module in network.named_modules() if module is encoder)
        add_lora(network, [rf"{re.escape(root)}\.(?:{t})" for t in targets], rank=rank, alpha=alpha, trainable=around)
        return network
    train_only(network, around)
    encoder.eval()
    encoder.train = lambda mode=True: encoder  # type: ignore[method-assign]  # it stays there
    return network


class LoraFile:
    """Watcher for a :class:`~medvit.pretrain.trainer.Trainer`: adapters, and what is trained beside, in their own file.

    Without adapters in the network nothing is written.

    Args:
        path: see :func:`~medvit.adapt.lora.save_lora`.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def __call__(self, objective: nn.Module) -> dict[str, float]:
        """Write; there is nothing to log."""
        network: Any = objective.network
        if adapters(network) and not (dist.is_initialized() and dist.get_rank()):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_lora(network, self.path)
        return {}
