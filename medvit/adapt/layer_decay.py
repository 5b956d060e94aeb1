"""Layer-wise learning-rate decay: the deeper a layer lies below the head, the slower it moves.

Clark et al., "ELECTRA" (ICLR 2020), Bao et al., "BEiT" (ICLR 2022); layers of plain networks as in
lambert-x/medical_mae (``util/lr_decay.py``), of hierarchical ones as in microsoft/SimMIM.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import ParametrizationList

from medvit.adapt.lora import LowRank
from medvit.models.heads import as_encoder

# whose matrices and kernels decay; all else is a token, a table of positions or biases, a gain
_DECAYING = (nn.Linear, _ConvNd, LowRank, ParametrizationList)


def layer_ids(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter of an encoder, or of a network around one.

    0 is what comes before the blocks: patch embedding, tokens, positions. Blocks count from 1 through all stages.
    Between blocks (patch merging, a stage's convolution of positions) the number is that of the block before. One more
    than the last block: norms after it, and whatever the network has around the encoder.

    Args:
        model: see :func:`~medvit.models.heads.as_encoder`; the encoder has ``blocks``, or ``stages`` that have them.

    Returns:
        Name of the parameter in ``model`` to its number.

    Raises:
        ValueError: a network without an encoder, or an encoder without blocks.
    """
    encoder = as_encoder(model)
    parts, blocks = _parts(encoder)
    (root,) = (name for name, module in model.named_modules() if module is encoder)
    root = f"{root}." if root else ""

    def of(name: str) -> int:
        if not name.startswith(root):
            return blocks + 1
        pieces = name.removeprefix(root).split(".")
        within = (".".join(pieces[:n]) for n in range(len(pieces), 0, -1))
        return next((parts[part] for part in within if part in parts), 0)

    return {name: of(name) for name, _ in model.named_parameters()}


def layer_decay_groups(
    model: nn.Module, *, lr: float, decay: float, weight_decay: float = 0.05
) -> list[dict[str, Any]]:
    """Parameter groups of an optimizer for the parameters that are trained.

    Args:
        model: see :func:`layer_ids`.
        lr: rate of the head.
        decay: factor from each layer to the one below: ``lr * decay ** (last - id)``; 1: one rate for all.
        weight_decay: of matrices and kernels; biases, norms, tokens, tables and gains have none.

    Returns:
        Groups with ``params``, ``lr``, ``weight_decay``, ``lr_scale`` (of this layer's rate to ``lr``) and ``layer``,
        the first layers first.

    Raises:
        ValueError: see :func:`layer_ids`; ``decay`` outside of (0, 1], or nothing to train.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}; ViT-B is fine-tuned with 0.55 to 0.75")
    ids = layer_ids(model)
    last = _parts(as_encoder(model))[1] + 1
    decaying = set(_decaying(model))
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer, decays = ids[name], name in decaying
        scale = decay ** (last - layer)
        group = groups.setdefault(
            (layer, decays),
            {
                "params": [],
                "lr": lr * scale,
                "weight_decay": weight_decay if decays else 0.0,
                "lr_scale": scale,
                "layer": layer,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("there is nothing to train: every parameter is frozen")
    return [groups[key] for key in sorted(groups)]


def _parts(encoder: nn.Module) -> tuple[dict[str, int], int]:
    """Numbers of an encoder's parts by name, where they are not 0, and the number of blocks."""
    parts: dict[str, int] = {}
    count = 0
    ends = []
    stages = dict(encoder.named_children()).get("stages")
    for prefix, stage in [(f"stages.{i}.", s) for i, s in stages.named_children()] if stages else [("", encoder)]:
        for name, part in stage.named_children():
            if name == "blocks":
                for j, _ in part.named_children():
                    count += 1
                    parts[f"{prefix}blocks.{j}"] = count
            else:
                parts[prefix + name] = count
        ends.append(count)
    if not count:
        raise ValueError(
            f"layers are counted by `blocks`, or `stages` with `blocks`; {type(encoder).__name__} has none"
        )
    after = False
    for name, part in encoder.named_children():  # in the order of their definition, which is that of the computation
        if name in ("blocks", "stages"):
            after = True
        elif name == "merges":  # merge i follows stage i
            parts.update({f"merges.{i}": ends[int(i)] for i, _ in part.named_children()})
        else:
            parts[name] = count + 1 if after else 0
    return parts, count


def _decaying(model: nn.Module) -> Iterator[str]:
    for root, module in model.named_modules():
        if isinstance(module, _DECAYING):
            for name, parameter in module.named_parameters(root, recurse=False):
                if parameter.dim() > 1:
                    yield name
