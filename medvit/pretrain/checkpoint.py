"""What a run leaves on disk: states to go on from, whole or absent, and the encoder to go on with.

States hold tensors, numbers and text only; they are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medvit.errors import OutputError, WeightsMismatch
from medvit.models.weights import file_sha256, load_weights, read_state

_NAME = re.compile(r"step-(\d{9})\.pt")


class Checkpoints:
    """States of one run in a folder, ``step-000000100.pt`` after 100 steps.

    Args:
        folder: made when first written to.
        keep: how many of the newest stay.
        settings: what decides about the course of the run; a state of other settings is refused.

    Raises:
        ValueError: ``keep`` below 1.
    """

    def __init__(self, folder: str | Path, keep: int, settings: Mapping[str, Any]):
        if keep < 1:
            raise ValueError(f"keep must be at least 1, or there is nothing to resume from; got {keep}")
        self.folder, self.keep, self.settings = Path(folder), keep, dict(settings)

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Write a state; a process killed meanwhile leaves the earlier ones as they were."""
        path = self.folder / f"step-{step:09d}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            torch.save({"step": step, "settings": self.settings, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        for old in self._all()[: -self.keep]:
            old.unlink()
        return path

    def latest(self) -> dict[str, Any] | None:
        """The newest state, on the CPU, or None.

        Raises:
            OutputError: it is of a run with other settings, or cannot be read.
        """
        found = self._all()
        if not found:
            return None
        try:
            state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
            then = state["settings"]
        except Exception as error:
            raise OutputError(
                f"{found[-1]}: not a state of a run ({type(error).__name__}); delete it to go on"
            ) from error
        if differ := sorted(key for key in {*then, *self.settings} if then.get(key) != self.settings.get(key)):
            was = ", ".join(f"{key}: {then.get(key)} there, {self.settings.get(key)} now" for key in differ)
            raise OutputError(
                f"{found[-1]}: of a run with other settings ({was}); take another output_dir, or resume=False"
            )
        return state

    def clear(self) -> None:
        """Delete all states: a run that starts anew must not find those of another."""
        for path in self._all():
            path.unlink()

    def _all(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


def export(state: Mapping[str, Tensor], path: str | Path, description: Mapping[str, Any]) -> Path:
    """Write a network's weights as safetensors, and beside them ``<path>.json``: ``description`` and their sha256.

    Args:
        state: of the network.
        path: of the weights, ``.safetensors``.
        description: JSON values: how the network is made, what it was trained on.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_suffix(".part"), path.with_name(path.name + ".json")
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, part)
    text = json.dumps({**description, "sha256": file_sha256(part)}, indent=4) + "\n"
    note_part = note.with_suffix(".part")
    note_part.write_text(text, encoding="utf-8")
    part.replace(path)
    note_part.replace(note)
    return path


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """State dict in which what is parametrised, such as a weight with a low-rank adapter, is its value, under its name.

    A network without parametrisations loads it.
    """
    state: dict[str, Tensor] = dict(module.state_dict())
    for name, part in module.named_modules():
        if parametrize.is_parametrized(part):
            root = f"{name}." if name else ""
            for own in list(part.parametrizations):
                for key in [key for key in state if key.startswith(f"{root}parametrizations.{own}.")]:
                    del state[key]
                state[root + own] = getattr(part, own).detach()
    return state


def load_encoder(
    network: nn.Module,
    path: str | Path,
    *,
    rename: Mapping[str, str] | None = None,
    drop: str | None = None,
    fresh: str | None = None,
) -> nn.Module:
    """Put exported weights into an encoder, every key accounted for.

    Args:
        network: changed in place; one that has an ``encoder`` gets them there.
        path: from :func:`export`; checked against the sha256 in the JSON beside it, if that is there. Empty:
            nothing is loaded, to train from scratch.
        rename: regular expressions in names of the file and what takes the place of each, for an encoder of another
            kind; all of it comes before ``drop``.
        drop: regular expression of whole names in the file that the encoder does not take.
        fresh: regular expression of whole names of the encoder that the file lacks.

    Returns:
        What was given.

    Raises:
        WeightsMismatch: no such file, a note without sha256 or with another, one name for two tensors, or keys and
            shapes that do not agree.
    """
    if not str(path):
        return network
    path, body = Path(path), getattr(network, "encoder", network)
    if not path.is_file():
        raise WeightsMismatch(
            f"{path}: no such weights; pre-train first (docs/pretraining.md), or train from scratch with an empty path"
        )
    state = _renamed(read_state(path, _noted_sha256(path)), rename or {}, path)
    state = {key: value for key, value in state.items() if not (drop and re.fullmatch(drop, key))}
    kept = {key: value for key, value in body.state_dict().items() if fresh and re.fullmatch(fresh, key)}
    load_weights(body, kept | state)
    return network


def _noted_sha256(path: Path) -> str | None:
    note = path.with_name(path.name + ".json")
    if not note.is_file():
        return None
    try:
        return str(json.loads(note.read_text(encoding="utf-8"))["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsMismatch(
            f"{note}: must say the sha256 of {path.name}, as export does; delete it to load them unchecked"
        ) from error


def _renamed(state: Mapping[str, Tensor], rename: Mapping[str, str], path: Path) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in rename.items():
            key = re.sub(pattern, replacement, key)
        if key in renamed:
            raise WeightsMismatch(f"{path}: rename gives two tensors the name {key!r}; use a narrower expression")
        renamed[key] = value
    return renamed
