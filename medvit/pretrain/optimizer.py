"""AdamW as vision transformers are trained with it: what decays, what does not, and rates that follow schedules."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medvit.pretrain.schedule import Schedule

# Vectors (biases, norms, layer scale) never decay; these are tables and tokens of more axes that must not either.
NO_DECAY = r"(.*\.)?(\w*tokens?|pos_embed\w*|relative_bias\.table)(\..*)?"


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices and kernels, not to vectors, tokens and position tables."""
    return parameter.ndim > 1 and re.fullmatch(NO_DECAY, name) is None


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups, those that decay and those that do not.

    Returns:
        Groups for a torch optimizer. :func:`set_rates` reads two entries: ``lr_scale``, a factor on the learning rate,
        and ``weight_decay``, where 0 means never. :func:`medvit.adapt.layer_decay.layer_decay_groups` makes such groups
        with a rate for each layer.
    """
    groups: list[dict[str, Any]] = [{"params": [], "lr_scale": 1.0, "weight_decay": float(d)} for d in (True, False)]
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[not decays(name, parameter)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def adamw(groups: Sequence[dict[str, Any]], betas: tuple[float, ...], eps: float) -> torch.optim.AdamW:
    """AdamW whose rates wait for :func:`set_rates`.

    Raises:
        ValueError: nothing is trainable.
    """
    marked = [{**group, "decay": group["weight_decay"] > 0} for group in groups]
    if not any(group["params"] for group in marked):
        raise ValueError("no parameter requires a gradient, there is nothing to train; check what is frozen")
    return torch.optim.AdamW(marked, lr=0.0, betas=betas, eps=eps)  # type: ignore[arg-type]


def set_rates(optimizer: torch.optim.Optimizer, lr: Schedule, weight_decay: Schedule, progress: float) -> None:
    """Give every group its learning rate and weight decay for the coming step."""
    for group in optimizer.param_groups:
        group["lr"] = lr(progress) * group["lr_scale"]
        group["weight_decay"] = weight_decay(progress) if group["decay"] else 0.0
