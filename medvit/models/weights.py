"""Loading weights so that every key is accounted for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from medvit.errors import WeightsMismatch

_ARITHMETIC = re.compile(r"\{(\d+)([+-])(\d+)\}")


@dataclass(frozen=True)
class KeyMap:
    """A total table from another library's parameter names to medvit's.

    Args:
        name: of the foreign layout, for messages.
        table: regular expression of the whole foreign key to a replacement template, or to None for keys dropped on
            purpose. In a template ``{a-b}`` and ``{a+b}`` are evaluated after substitution (``layers1`` is stage 0).
    """

    name: str
    table: Mapping[str, str | None]

    def rename(self, key: str) -> str | None:
        """The name in medvit, or None if the key is dropped on purpose.

        Raises:
            KeyError: no pattern explains the key.
        """
        for pattern, template in self.table.items():
            match = re.fullmatch(pattern, key)
            if match:
                if template is None:
                    return None
                return _ARITHMETIC.sub(_evaluate, match.expand(template))
        raise KeyError(key)

    def apply(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a whole state dict.

        Raises:
            WeightsMismatch: keys that no pattern explains, listed, or two keys that land on one name.
        """
        out: dict[str, Tensor] = {}
        unknown = []
        for key, value in state.items():
            try:
                new = self.rename(key)
            except KeyError:
                unknown.append(key)
                continue
            if new in out:
                raise WeightsMismatch(f"two keys of the {self.name} layout become {new!r}, the second is {key!r}")
            if new is not None:
                out[new] = value
        if unknown:
            raise WeightsMismatch(
                f"{len(unknown)} of {len(state)} keys are not of the {self.name} layout: {_some(unknown)}; "
                "these weights belong to another network or wrapper"
            )
        return out


@dataclass(frozen=True)
class Layout:
    """A public form of a model's weights: how to know it, and its total key table.

    Args:
        name: of the layout, as ``--layout`` takes it.
        model: registry name of the network that it becomes.
        keys: the table.
        marks: regular expressions; the layout is recognised iff each matches some whole key (after unwrapping).
        partial: regular expression of the whole names of ours that such a file may lack (a file of an encoder only
            lacks the decoder); None: nothing may lack.
        transform: run on the state dict before renaming, for what is not one to one (q, k and v fused into qkv).
        infer: constructor values of ours that follow from names and shapes; takes the state dict before ``transform``,
            and raises KeyError where a key that it reads is not there.
        ask: constructor arguments that decide what the weights compute, though no key and no shape tells them; with the
            reason to give to people. One that ``infer`` does not return must be given.
        surplus: regular expression of the whole names of ours that such a file holds even where the network has not
            (heads used in training only): these are dropped on purpose. None: there are none.
    """

    name: str
    model: str
    keys: KeyMap
    marks: tuple[str, ...]
    partial: str | None = None
    transform: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    infer: Callable[[Mapping[str, Tensor]], dict[str, Any]] | None = None
    ask: Mapping[str, str] = field(default_factory=dict)
    surplus: str | None = None

    def prepared(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict that the key table speaks of, after ``transform``."""
        return self.transform(dict(state)) if self.transform else dict(state)

    def is_surplus(self, name: str) -> bool:
        """Whether a network without the parameter ``name`` may leave it out."""
        return self.surplus is not None and re.fullmatch(self.surplus, name) is not None


def load_weights(model: nn.Module, state: Mapping[str, Tensor], layout: Layout | KeyMap | None = None) -> None:
    """Copy a state dict into a model; every key and shape must agree. Nothing is copied otherwise.

    Args:
        model: receives the weights, converted to its own dtype.
        state: tensors by name, medvit's names or, with ``layout``, a foreign layout's.
        layout: the foreign layout, or its key map alone. What a layout calls partial may be missing from the state
            and stays as it is in the model.

    Raises:
        WeightsMismatch: missing or unexpected keys, or other shapes; the message lists them.
    """
    if layout is None:
        given = dict(state)
    else:
        given = layout.keys.apply(layout.prepared(state)) if isinstance(layout, Layout) else layout.apply(state)
    own = model.state_dict()
    if isinstance(layout, Layout):
        given = {k: v for k, v in given.items() if k in own or not layout.is_surplus(k)}
        if layout.partial is not None:
            given = {k: v for k, v in own.items() if re.fullmatch(layout.partial, k)} | given
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    shapes = [
        f"{k}: network {tuple(own[k].shape)}, weights {tuple(given[k].shape)}"
        for k in sorted(own.keys() & given.keys())
        if own[k].shape != given[k].shape
    ]
    if missing or unexpected or shapes:
        parts = [("missing", missing), ("unexpected", unexpected), ("of another shape", shapes)]
        account = "; ".join(f"{len(keys)} {what} ({_some(keys)})" for what, keys in parts if keys)
        raise WeightsMismatch(f"the weights do not fit the network: {account}. Check that both are of the same bundle")
    model.load_state_dict(given, strict=True)


def read_state(path: str | Path, sha256: str | None = None) -> dict[str, Tensor]:
    """Read a plain state dict of tensors (``.pt`` with ``weights_only=True``, or ``.safetensors``), on the CPU.

    Args:
        path: the file.
        sha256: expected hash of the file, hexadecimal.

    Raises:
        WeightsMismatch: no such file, another hash, or contents that are not a flat dict of tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsMismatch(f"{path}: no such weights file")
    if sha256 is not None and (found := file_sha256(path)) != sha256.lower():
        raise WeightsMismatch(
            f"{path}: the weights are not those the metadata names: expected sha256 {sha256}, found {found}; "
            "restore the file, or record the new weights in the metadata"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to run the file's code
        raise WeightsMismatch(
            f"{path}: damaged, or holds Python objects besides tensors, whose code is not run; "
            "convert the checkpoint to a flat dict of tensors first"
        ) from error
    except Exception as error:
        raise WeightsMismatch(f"{path}: not readable as plain tensors ({type(error).__name__}: {error})") from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()
    ):
        raise WeightsMismatch(f"{path}: must hold a flat dict of tensors, nothing else; convert the checkpoint first")
    return dict(state)


def file_sha256(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _some(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f", and {len(items) - most} more" if len(items) > most else "")


def _evaluate(match: re.Match[str]) -> str:
    left, sign, right = match.groups()
    return str(int(left) + int(right) * (1 if sign == "+" else -1))
