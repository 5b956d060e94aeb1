"""Foreign checkpoint files: read without running anything in them, and unwrapped down to one flat dict of tensors."""

from __future__ import annotations

import re
import warnings
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medvit.errors import WeightsMismatch
from medvit.models.weights import file_sha256

# Entries under which training scripts keep the weights. DINOv2 writes both networks and evaluates the teacher.
ENTRIES = ("state_dict", "model", "model_state_dict", "network", "teacher", "student")
_HEADS = r"(dino_head|ibot_head)\..*"  # what DINOv2 keeps beside its backbone

_scalar: Callable[..., object] = np.float32(0).__reduce__()[0]  # type: ignore[assignment]
# All that a pickled checkpoint may hold besides tensors and plain containers. A Namespace is an object with attributes
# (the `args` of MAE checkpoints); a numpy scalar is a number (the `best_acc` of MONAI's Swin UNETR checkpoints), under
# its module's name before and since numpy 2. Making either calls nothing that the file names.
_HARMLESS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    Namespace,
    np.dtype,
    *[type(np.dtype(code)) for code in ("f2", "f4", "f8", "i4", "i8", "?")],
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file under the names they were published with.

    Attributes:
        path: the file.
        format: ``"safetensors"``, ``"zip"`` (``torch.save`` since 1.6) or ``"pickle"`` (before).
        sha256: of the file's bytes.
        state: the tensors, in the types they are stored in, on the CPU.
        unwrapped: what was taken off, in order, e.g. ``("entry 'model'", "prefix 'module.'")``.
        set_aside: other entries of the file, e.g. ``("epoch", "optimizer")``; no part of the weights.
        header: metadata of a safetensors file.
    """

    path: Path
    format: str
    sha256: str
    state: dict[str, Tensor]
    unwrapped: tuple[str, ...]
    set_aside: tuple[str, ...]
    header: dict[str, str]


def read_checkpoint(path: str | Path, entry: str | None = None) -> Checkpoint:
    """Read a checkpoint of any public layout. Of pickled files no code is run (``weights_only=True``).

    Args:
        path: safetensors, or what ``torch.save`` wrote.
        entry: which entry of the file holds the weights, where it has several that could.

    Raises:
        WeightsMismatch: no such file, one that is damaged or holds other objects than tensors, numbers and text, or
            one in which the weights cannot be told from the rest.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsMismatch(f"{path}: no such weights file")
    kind = _kind(path)
    contents, header = _safetensors(path) if kind == "safetensors" else (_unpickle(path), {})
    if not isinstance(contents, Mapping):
        raise WeightsMismatch(f"{path}: holds a {type(contents).__name__}; a dict of tensors is needed")
    steps: list[str] = []
    aside: list[str] = []
    state = _strip(_descend(path, contents, entry, steps, aside), steps)
    return Checkpoint(path, kind, file_sha256(path), state, tuple(steps), tuple(aside), header)


def _kind(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return "zip"
    # safetensors: eight bytes of length, then JSON
    return "safetensors" if start[8:] == b"{" else "pickle"


def _safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise WeightsMismatch(f"{path}: not a whole safetensors file ({error}); fetch it again") from error


def _unpickle(path: Path) -> object:
    try:
        with torch.serialization.safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats
            return torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:  # torch's own message advises to run the file's code
        found = re.search(r"(?:GLOBAL|global:?|class) ([\w.]+\.\w+)", str(error))
        what = f"it asks for {found[1]}, and" if found else "it is damaged or no checkpoint;"
        raise WeightsMismatch(
            f"{path}: not read: {what} nothing but tensors, numbers and text is taken from a pickled file, whose code "
            "is never run; ask for a file of plain tensors, or save one where you trust it"
        ) from error
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise WeightsMismatch(
            f"{path}: not readable as a checkpoint ({type(error).__name__}: {reason}); fetch it again if it is damaged"
        ) from error


def _descend(
    path: Path, contents: Mapping[Any, Any], entry: str | None, steps: list[str], aside: list[str]
) -> dict[str, Tensor]:
    """The flat dict of tensors within nested entries."""
    while True:
        nested = [k for k, v in contents.items() if isinstance(v, Mapping) and _holds_tensors(v)]
        flat = any(isinstance(v, Tensor) for v in contents.values())
        if entry is None and flat and not set(nested) & set(ENTRIES):
            break
        chosen = _choose(path, nested, list(contents), entry)
        entry = None
        steps.append(f"entry {chosen!r}")
        aside += [str(k) for k in contents if k != chosen]
        contents = contents[chosen]
    aside += [str(k) for k, v in contents.items() if not isinstance(v, Tensor)]
    return {str(k): v for k, v in contents.items() if isinstance(v, Tensor)}


def _choose(path: Path, nested: list[Any], keys: list[Any], entry: str | None) -> str:
    if entry is not None:
        if entry not in nested:
            raise WeightsMismatch(f"{path}: no weights under the entry {entry!r}; there are {nested}")
        return entry
    known = [k for k in ENTRIES if k in nested]
    if known == ["teacher", "student"]:
        return "teacher"
    if len(known) == 1:
        return known[0]
    if known:
        raise WeightsMismatch(f"{path}: weights under several entries, {known}; say which with `entry` (--entry)")
    raise WeightsMismatch(
        f"{path}: no tensors, and none of the entries {list(ENTRIES)} holds any; the file has {keys[:8]}"
        + (f"; if the weights are one of {nested}, say so with `entry` (--entry)" if nested else "")
    )


def _holds_tensors(value: Mapping[Any, Any]) -> bool:
    """Weights, possibly wrapped again; an optimizer's state is numbered, not named."""
    inner = [v for k, v in value.items() if k in ENTRIES and isinstance(v, Mapping)]
    return any(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items()) or any(
        map(_holds_tensors, inner)
    )


def _strip(state: dict[str, Tensor], steps: list[str]) -> dict[str, Tensor]:
    """Names without what data-parallel, compiled and wrapping modules put before them."""
    while True:
        for prefix in ("module.", "_orig_mod.", "backbone."):
            rest = [k for k in state if not k.startswith(prefix)]
            # DINOv2's heads stand beside its backbone
            whole = len(rest) < len(state) and all(prefix == "backbone." and re.fullmatch(_HEADS, k) for k in rest)
            if whole:
                state = {k.removeprefix(prefix): v for k, v in state.items()}
                steps.append(f"prefix {prefix!r}")
                break
        else:
            return state
