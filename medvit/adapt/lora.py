"""Low-rank adapters: a frozen network learns small factors, which are kept in a file of their own.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (ICLR 2022). The adapter changes what a layer's
``weight`` reads as, so that code which takes a kernel without calling its layer sees it too, and any stride, padding or
rank of image is the layer's own business. The price over the paper's two small layers: a training step also makes one
gradient of the size of each adapted weight.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize

from medvit.adapt.finetune import matching, train_only
from medvit.adapt.fingerprint import state_sha256
from medvit.errors import UnreadableFile, WeightsMismatch


class LowRank(nn.Module):
    """Parametrisation ``weight + alpha / rank * up @ down`` of a weight seen as a matrix, first axis by all others.

    It starts as the identity: ``up`` is zero, ``down`` uniform (Kaiming).

    Args:
        weight: what is adapted; factors are float32 on its device.
        rank: of the change; at most the smaller side of the matrix.
        alpha: see above.

    Raises:
        ValueError: a rank that does not fit.
    """

    merged: Tensor | None

    def __init__(self, weight: Tensor, rank: int, alpha: float):
        super().__init__()
        rows, columns = weight.flatten(1).shape
        if not 1 <= rank <= min(rows, columns):
            raise ValueError(f"rank must be from 1 to {min(rows, columns)} for a {rows} x {columns} weight, got {rank}")
        self.rank, self.alpha = rank, alpha
        self.down = nn.Parameter(torch.empty(rank, columns, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.register_buffer("merged", None, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, of the same shape and type."""
        return self.combined(weight) if self.merged is None else self.merged

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Take merging back: what was merged is of the weights before."""
        super()._load_from_state_dict(*args, **kwargs)
        if self.merged is not None:
            self.merged = None
            self.requires_grad_(True)

    def combined(self, weight: Tensor) -> Tensor:
        """Base and change together; the change is made in float32 under autocast too, as merging makes it."""
        with torch.autocast(weight.device.type, enabled=False):
            change = self.alpha / self.rank * (self.up @ self.down)
        return weight + change.view_as(weight).to(weight.dtype)


def add_lora(
    model: nn.Module, targets: Sequence[str], *, rank: int = 8, alpha: float = 16.0, trainable: Sequence[str] = ()
) -> list[str]:
    """Freeze a network and give layers of it adapters. Load its weights first: adapted layers have other names.

    Args:
        model: changed in place.
        targets: regular expressions of whole names of linear and convolution layers, e.g. ``[r".*attn\\.(qkv|proj)"]``.
        rank: see :class:`LowRank`.
        alpha: see :class:`LowRank`.
        trainable: regular expressions of whole names of parameters that are trained beside, e.g. ``[r"head\\..*"]``.

    Returns:
        Names of the adapted layers.

    Raises:
        ValueError: an expression without a match, a rank that does not fit, a network that has adapters.
    """
    if adapters(model):
        raise ValueError("this network has adapters; bake() them in before adding others")
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | _ConvNd)}
    chosen = matching(layers, targets)
    made = [LowRank(layers[name].weight, rank, alpha) for name in chosen]
    train_only(model, trainable)
    for name, adapter in zip(chosen, made, strict=True):
        parametrize.register_parametrization(layers[name], "weight", adapter)
    return chosen


def adapters(model: nn.Module) -> dict[str, LowRank]:
    """The adapters of a network by the name of their layer."""
    return {name: adapter for name, (_, adapter) in _adapted(model).items()}


def merge(model: nn.Module) -> None:
    """Compute the adapted weights once, for inference; costs their memory, and :func:`unmerge` takes it back exactly.

    State dicts and :func:`save_lora` do not change by it. While merged, adapters are not trained.
    """
    for layer, adapter in _adapted(model).values():
        if adapter.merged is None:
            adapter.merged = layer.weight.detach().clone()
            adapter.requires_grad_(False)


def unmerge(model: nn.Module) -> None:
    """Undo :func:`merge`: base weights and factors are apart, and trained, again."""
    for adapter in adapters(model).values():
        if adapter.merged is not None:
            adapter.merged = None
            adapter.requires_grad_(True)


def bake(model: nn.Module) -> None:
    """Make adapted layers plain ones again that hold the adapted weights under their former names. Not undone.

    Copies of the network keep their adapters: torch's ``remove_parametrizations`` would change the class they share.
    """
    for layer, _ in _adapted(model).values():
        trained = layer.parametrizations["weight"].original.requires_grad
        weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=trained)
        layer.__class__ = type(layer).__bases__[0]
        del layer.parametrizations
        layer.weight = weight


def save_lora(model: nn.Module, path: str | Path) -> None:
    """Write the factors, and what else is trained, to a safetensors file, whole or not at all; it may exist.

    The base is not in it, only its sha256. Buffers, such as the statistics of batch norms, are not either.

    Raises:
        ValueError: a network without adapters.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    # copies: FSDP2 cannot free on a CPU what a file was written from
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in _own_state(model).items()}
    save_file(state, part, {name: json.dumps(value) for name, value in _description(model).items()})
    part.replace(path)


def load_lora(model: nn.Module, path: str | Path) -> None:
    """Copy what :func:`save_lora` wrote into a network with the same base and the same adapters; it is then unmerged.

    Raises:
        UnreadableFile: no such file, or no adapters in it.
        WeightsMismatch: other layers, rank, alpha or base, other parameters trained beside; nothing is copied then.
        ValueError: a network without adapters.
    """
    own, expected = _own_state(model), _description(model)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: json.loads(metadata[name]) for name in expected}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except KeyError as error:
        raise UnreadableFile(path, f"holds no adapters: its metadata lacks {error}") from error
    except (OSError, SafetensorError, ValueError) as error:
        raise UnreadableFile(path, f"holds no adapters that can be read ({error})") from error
    for name, value in expected.items():
        if found[name] != value:
            raise WeightsMismatch(f"{path}: the adapters do not fit: {_difference(name, found[name], value)}")
    if {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in own.items()}:
        raise WeightsMismatch(f"{path}: the adapters do not fit: tensors of other names or shapes than the network's")
    unmerge(model)
    with torch.no_grad():
        for name, value in state.items():
            own[name].copy_(value)


def _adapted(model: nn.Module) -> dict[str, tuple[Any, LowRank]]:
    found = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            adapter = module.parametrizations["weight"][0]
            if isinstance(adapter, LowRank):
                found[name] = (module, adapter)
    return found


def _own_state(model: nn.Module) -> dict[str, Tensor]:
    """Factors by their layer's name, and the parameters trained beside them by their own."""
    found = adapters(model)
    factors: dict[str, Tensor] = {
        f"{name}.{part}": value for name, a in found.items() for part, value in a.named_parameters()
    }
    ours = {id(value) for value in factors.values()}
    return factors | {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours}


def _description(model: nn.Module) -> dict[str, Any]:
    """What must agree before factors are loaded."""
    found = _adapted(model)
    if not found:
        raise ValueError("this network has no adapters; call add_lora() with the targets, rank and alpha first")
    first = next(adapter for _, adapter in found.values())
    names = {f"{name}.{part}" for name in found for part in ("down", "up")}
    base = {name: layer.parametrizations["weight"].original for name, (layer, _) in found.items()}
    return {
        "rank": first.rank,
        "alpha": first.alpha,
        "targets": sorted(found),
        "trained": sorted(_own_state(model).keys() - names),
        "base_sha256": state_sha256(base),
    }


def _difference(name: str, found: Any, expected: Any) -> str:
    if not isinstance(expected, list) or not isinstance(found, list):
        return f"{name} is {found} in the file, {expected} in the network"
    only = [sorted(set(a) - set(b))[:3] for a, b in ((found, expected), (expected, found))]
    return f"{name} differ, only in the file {only[0]}, only in the network {only[1]}"
