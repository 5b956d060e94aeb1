"""Public checkpoints to medvit's: recognised, accounted for key by key, written with what they are."""

from __future__ import annotations

import inspect
import json
import re
import struct
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medvit.errors import WeightsMismatch
from medvit.models.account import Account, drawn_together, take_stock
from medvit.models.checkpoints import Checkpoint, read_checkpoint
from medvit.models.reshape import Reshape
from medvit.models.weights import Layout, load_weights
from medvit.registry import create_model, list_models, model_class

# Public files that one could take for ours: a mark among the keys, and what they are.
_NOT_OURS = {
    r"model\.encoder\..*": "keys model.encoder.*: the DenseNet masked autoencoder of medical_mae, no network of medvit",
}

_NEEDED = object()  # stands for an argument without default


@dataclass(frozen=True)
class Setting:
    """One constructor argument: its value, and whether it was given, found in the file, or is the default.

    Attributes:
        name, value: of the argument.
        origin: ``"given"``, ``"file"`` or ``"default"``.
        disputed: the file tells another value, ``found``, than was given.
    """

    name: str
    value: Any
    origin: str
    disputed: bool = False
    found: Any = None


@dataclass(frozen=True)
class Conversion:
    """A checkpoint as weights of a network of medvit, ready to be written if the account is clean.

    Attributes:
        checkpoint: where it came from.
        layout: how it was read.
        settings: every constructor argument of the network.
        account: of every key.
        tensors: by the network's names, in its types.
    """

    checkpoint: Checkpoint
    layout: Layout
    settings: tuple[Setting, ...]
    account: Account
    tensors: dict[str, Tensor]

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, complete: later defaults change nothing."""
        return {setting.name: setting.value for setting in self.settings}

    def check(self) -> None:
        """Raise WeightsMismatch unless every key is accounted for."""
        problem = self.account.problem()
        if problem:
            raise WeightsMismatch(
                f"{self.checkpoint.path}: does not fit this {self.layout.model} ({self.layout.name} layout): {problem}"
            )

    def save(self, path: str | Path) -> None:
        """Write safetensors; the same conversion gives the same bytes. Replaces what is there, and not in one step.

        The header holds ``model``, ``config`` (JSON), ``layout``, ``source`` (file name), ``source_sha256``,
        ``medvit_version``, ``adapted`` and ``missing`` (JSON).

        Raises:
            WeightsMismatch: the account is not clean.
        """
        self.check()
        header = {
            "format": "pt",
            "model": self.layout.model,
            "config": json.dumps(self.config, sort_keys=True),
            "layout": self.layout.name,
            "source": self.checkpoint.path.name,
            "source_sha256": self.checkpoint.sha256,
            "medvit_version": version("medvit"),
            "adapted": json.dumps(self.account.adapted),
            "missing": json.dumps(self.account.allowed),
        }
        _write(Path(path), self.tensors, header)


def layouts(model: str | None = None) -> list[Layout]:
    """Every layout that a model file declares, or those of one model."""
    modules = dict.fromkeys(model_class(name).__module__ for name in list_models())
    found = [layout for module in modules for layout in getattr(sys.modules[module], "LAYOUTS", ())]
    return [layout for layout in found if model in (None, layout.model)]


def recognise(state: Mapping[str, Tensor]) -> list[Layout]:
    """Layouts whose marks the keys bear: those that explain every key, or all, fewest unexplained keys first."""
    marked = [
        layout for layout in layouts() if all(any(re.fullmatch(mark, key) for key in state) for mark in layout.marks)
    ]
    counts = {(layout.model, layout.name): len(unexplained(layout, state)) for layout in marked}
    marked.sort(key=lambda layout: counts[layout.model, layout.name])
    return [layout for layout in marked if not counts[layout.model, layout.name]] or marked


def unexplained(layout: Layout, state: Mapping[str, Tensor]) -> list[str]:
    """Keys (after the layout's transform) that its table does not know."""
    out = []
    for key in layout.prepared(state):
        try:
            layout.keys.rename(key)
        except KeyError:
            out.append(key)
    return out


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a file is, as far as names and shapes tell; builds no network. Fit for JSON."""
    state = checkpoint.state
    converted = checkpoint.header if _is_converted(checkpoint) else None
    known = [] if converted else recognise(state)
    return {
        "file": str(checkpoint.path),
        "format": checkpoint.format,
        "sha256": checkpoint.sha256,
        "unwrapped": list(checkpoint.unwrapped),
        "set_aside": list(checkpoint.set_aside),
        "tensors": len(state),
        "dtypes": dict(sorted(Counter(str(v.dtype).removeprefix("torch.") for v in state.values()).items())),
        "parameters": sum(v.numel() for v in state.values() if v.is_floating_point()),
        "converted": converted,
        "layouts": [
            {
                "layout": layout.name,
                "model": layout.model,
                "config": _inferred(layout, state),
                "ask": [name for name in layout.ask if name not in _inferred(layout, state)],
                "unexplained": unexplained(layout, state),
            }
            for layout in known
        ],
        "unexplained": [] if known or converted else list(state),
        "note": _not_ours(state),
    }


def convert(
    checkpoint: Checkpoint,
    model: str,
    config: Mapping[str, Any] | None = None,
    *,
    layout: str | None = None,
    reshape: Reshape | None = None,
    allow_partial: bool = False,
    drop: Sequence[str] = (),
) -> Conversion:
    """Account for a checkpoint as weights of a network.

    Args:
        checkpoint: see :func:`~medvit.models.checkpoints.read_checkpoint`.
        model: name for :func:`medvit.create_model`.
        config: its arguments. Those that follow from the file need not be given; those given win.
        layout: which of the model's layouts the file has; None: the one it is recognised as.
        reshape: what may be done to tensors of another shape; None: nothing.
        allow_partial: let the network keep fresh weights where the layout lacks them by nature (a file of an encoder).
        drop: regular expressions of whole keys of the file to leave out.

    Returns:
        The conversion with its account, clean or not: see :meth:`Conversion.check`.

    Raises:
        WeightsMismatch: no layout, or none that is certain; a file converted already; arguments that lack, are unknown
            or are refused.
        ValueError: an unknown model.
    """
    chosen = _choose(checkpoint, model, layout)
    state = {k: v for k, v in checkpoint.state.items() if not any(re.fullmatch(pattern, k) for pattern in drop)}
    settings = _settings(chosen, state, dict(config or {}))
    try:
        with torch.device("meta"):  # shapes only
            network = create_model(model, **{s.name: s.value for s in settings})
    except (TypeError, ValueError) as error:
        raise WeightsMismatch(f"{checkpoint.path}: {model} refuses these arguments: {error}") from error
    account, tensors = take_stock(chosen, state, network, reshape or Reshape(), allow_partial)
    left_out = [key for key in checkpoint.state if key not in state]
    account = replace(account, dropped=(*account.dropped, *left_out))
    return Conversion(checkpoint, chosen, settings, account, tensors)


def load_converted(path: str | Path, *, allow_partial: bool = False) -> nn.Module:
    """Build the network that a converted file belongs to, with its weights, in evaluation mode.

    Args:
        path: what :meth:`Conversion.save` or ``medvit weights convert`` wrote.
        allow_partial: accept a file that lacks part of the network, which then keeps fresh weights.

    Raises:
        WeightsMismatch: no such file, no converted file, one that lacks a part, or one that does not fit its network.
    """
    checkpoint = read_checkpoint(path)
    header, state = checkpoint.header, checkpoint.state
    if not _is_converted(checkpoint):
        raise WeightsMismatch(f"{path}: names no network in its header; `medvit weights convert` writes files that do")
    missing = json.loads(header.get("missing", "[]"))
    if missing and not allow_partial:
        raise WeightsMismatch(
            f"{path}: lacks {len(missing)} tensors of {header['model']} ({drawn_together(missing)}), which would stay "
            "random; train them, and say allow_partial=True to start from here"
        )
    network = create_model(header["model"], **read_config(header["config"]))
    own = network.state_dict()
    load_weights(network, {k: own[k] for k in missing if k in own} | state)
    return network.eval()


def _is_converted(checkpoint: Checkpoint) -> bool:
    return "model" in checkpoint.header and "config" in checkpoint.header


def read_config(text: str) -> dict[str, Any]:
    """Constructor arguments from JSON, in which keys that are numbers had to become text.

    Raises:
        ValueError: no JSON, or no object.
    """
    config = json.loads(text, object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()})
    if not isinstance(config, dict):
        raise ValueError(f"a JSON object of constructor arguments is needed, got {text!r}")
    return config


def _choose(checkpoint: Checkpoint, model: str, name: str | None) -> Layout:
    model_class(model)  # an unknown name is said so
    if _is_converted(checkpoint):
        raise WeightsMismatch(
            f"{checkpoint.path}: is converted already, to {checkpoint.header['model']}; `load_converted` builds it"
        )
    own = {layout.name: layout for layout in layouts(model)}
    if name is not None:
        if name not in own:
            raise WeightsMismatch(f"{model} has no layout {name!r}; it has {sorted(own)}")
        return own[name]
    known = recognise(checkpoint.state)
    fitting = [layout for layout in known if layout.model == model]
    clean = [layout for layout in fitting if not unexplained(layout, checkpoint.state)]
    if len(clean or fitting) == 1:
        return (clean or fitting)[0]
    if fitting:
        names = [layout.name for layout in clean or fitting]
        raise WeightsMismatch(f"{checkpoint.path}: may have any of the layouts {names}; say which (--layout)")
    reason = _not_ours(checkpoint.state) or (
        f"the keys are of {', '.join(f'{layout.name} ({layout.model})' for layout in known)}"
        if known
        else f"no public layout has keys like {drawn_together(list(checkpoint.state), 4)}"
    )
    raise WeightsMismatch(f"{checkpoint.path}: no weights of {model}: {reason}; {model} takes {sorted(own)}")


def _not_ours(state: Mapping[str, Tensor]) -> str | None:
    return next((what for mark, what in _NOT_OURS.items() if any(re.fullmatch(mark, key) for key in state)), None)


def _inferred(layout: Layout, state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor values that follow from the file, as JSON has them; none if it lacks what they are read from."""
    if layout.infer is None:
        return {}
    try:
        return read_config(json.dumps(layout.infer(state)))
    except (KeyError, IndexError, WeightsMismatch):
        return {}


def _settings(layout: Layout, state: Mapping[str, Tensor], given: dict[str, Any]) -> tuple[Setting, ...]:
    """Every argument of the network's constructor, from the best source there is."""
    found = _inferred(layout, state)
    asked = {name: reason for name, reason in layout.ask.items() if name not in given and name not in found}
    if asked:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in asked.items())
        say = " ".join(f"--set {name}=..." for name in asked)
        raise WeightsMismatch(f"{layout.model} needs to know {reasons}; say {say}")
    defaults = _defaults(layout.model, [*given, *found])
    lacking = [name for name, value in defaults.items() if value is _NEEDED and name not in {**given, **found}]
    if lacking:
        raise WeightsMismatch(
            f"{layout.model} needs {', '.join(lacking)}, which this file does not tell; say "
            + " ".join(f"--set {name}=..." for name in lacking)
        )
    settings = []
    for name, default in defaults.items():
        if name in given:
            disputed = name in found and not _same(given[name], found[name])
            settings.append(Setting(name, given[name], "given", disputed, found.get(name)))
        elif name in found:
            settings.append(Setting(name, found[name], "file"))
        else:
            settings.append(Setting(name, default, "default"))
    return tuple(settings)


def _defaults(model: str, names: Sequence[str]) -> dict[str, Any]:
    """A constructor's arguments with their defaults; ``names`` too where it hands further ones on."""
    parameters = inspect.signature(model_class(model)).parameters.values()
    out = {
        p.name: _NEEDED if p.default is p.empty else p.default
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    for name in names:
        if name not in out:
            if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                near = get_close_matches(name, out, 1)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {list(out)}"
                raise WeightsMismatch(f"{model} has no argument {name!r}; {hint}")
            out[name] = _NEEDED
    return out


def _same(given: Any, found: Any) -> bool:
    """Whether two arguments mean the same: one number stands for one per axis."""
    given, found = (json.loads(json.dumps(value)) for value in (given, found))
    if isinstance(given, list) != isinstance(found, list):
        many, one = (given, found) if isinstance(given, list) else (found, given)
        return all(value == one for value in many)
    return bool(given == found)


def _write(path: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Safetensors with its header's entries in order: the library's own differs from run to run."""
    from safetensors.torch import save

    body = save(tensors)
    (size,) = struct.unpack("<Q", body[:8])
    names = json.loads(body[8 : 8 + size])
    text = json.dumps({"__metadata__": dict(sorted(header.items())), **names}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.write(memoryview(body)[8 + size :])
