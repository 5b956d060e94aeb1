"""A bundle over weights that are not ours: the preprocessing of one that ships, the weights of a public file."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from medvit.bundle import WEIGHTS, Bundle
from medvit.errors import BundleError, OutputError, WeightsMismatch
from medvit.models.convert import Conversion
from medvit.models.weights import file_sha256

# what of a bundle holds for other weights too; its card and its data licence do not, nor does how it was trained
_KEPT = ("LICENSE", "configs/logging.conf")


def adopt(template: Bundle, conversion: Conversion, output: str | Path) -> Bundle:
    """Write a new bundle: ``template`` with the converted weights in its network, and with metadata that say so.

    What the template's metadata hold under ``medvit.adopts`` decides: ``model``, whose weights it takes; ``knobs`` of
    its ``inference.json`` that are arguments of that network, by name; ``card``, the new ``docs/README.md``;
    ``metadata`` that replace its own. No numbers that were measured with the template's weights are taken over.

    Args:
        template: a bundle whose network is an ``embedder``.
        conversion: of a whole encoder, see :func:`medvit.models.convert.convert`.
        output: the new folder, whose name is that of the bundle; it appears whole or not at all.

    Raises:
        BundleError: the template takes no such weights, the name does not serve, or the new bundle does not verify.
        WeightsMismatch: the account of the conversion is not clean, or part of the network would stay random.
        OutputError: the folder exists or cannot be written.
    """
    output, model = Path(output).absolute(), conversion.layout.model
    rules = template.metadata.get("medvit", {}).get("adopts", {})
    if rules.get("model") != model:
        takes = f"those of {rules['model']}" if rules else "none but its own"
        raise BundleError(f"{template.name}: takes no weights of {model}, but {takes}; leave --bundle out")
    if not re.fullmatch(r"\w[\w.-]*", output.name):
        raise BundleError(f"a bundle is called by its folder: letters, digits, '_', '-' and '.', got {output.name!r}")
    conversion.check()
    if conversion.account.allowed:
        raise WeightsMismatch(
            f"{conversion.checkpoint.path}: lacks {len(conversion.account.allowed)} tensors of {model}, which would "
            "stay random; a bundle needs a whole encoder"
        )
    if output.exists():
        raise OutputError(f"{output}: exists already; choose another output")
    knobs = {knob: _number(conversion.config[name], name) for knob, name in rules["knobs"].items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".medvit-", dir=output.parent) as staging:
            root = Path(staging) / output.name
            _write(root, template, conversion, rules, knobs)
            for check, wrong in Bundle(root).verify():
                if wrong:
                    raise BundleError(f"{output}: was not written, since it would not verify ({check}): {wrong}")
            root.rename(output)
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"{output}: cannot be written ({reason}); choose a writable folder with free space"
        ) from error
    return Bundle(output)


def _write(
    root: Path, template: Bundle, conversion: Conversion, rules: Mapping[str, Any], knobs: Mapping[str, int]
) -> None:
    for folder in ("configs", "docs", "models"):
        (root / folder).mkdir(parents=True)
    for name in _KEPT:
        shutil.copyfile(template.root / name, root / name)
    shutil.copyfile(template.root / rules["card"], root / "docs/README.md")
    torch.save({f"encoder.{name}": value for name, value in conversion.tensors.items()}, root / WEIGHTS)

    # an argument that is a knob stands there once; where several knobs are one argument, the first
    references = {name: f"@{knob}" for knob, name in reversed(rules["knobs"].items())}
    encoder = {"name": conversion.layout.model, **conversion.config, **references}
    inference = json.loads((template.root / "configs/inference.json").read_text(encoding="utf-8"))
    inference |= {**rules.get("settings", {}), **knobs}
    inference["bundle_root"]["name"] = root.name
    inference["network_def"]["encoder"] = encoder
    _write_json(root / "configs/inference.json", inference)
    _write_json(root / "configs/metadata.json", _metadata(root, template, conversion, rules["metadata"]))


def _metadata(root: Path, template: Bundle, conversion: Conversion, replaced: Mapping[str, Any]) -> dict[str, Any]:
    """The template's, but for what it replaces, for numbers measured with its weights, and for sizes of the network."""
    source = conversion.checkpoint
    metadata: dict[str, Any] = json.loads(json.dumps({**template.metadata, **replaced}))
    metadata.pop("eval_metrics", None)
    metadata["name"], version = root.name, "0.1.0"
    metadata["version"], metadata["changelog"] = version, {version: f"converted from {source.path.name}"}
    shapes = metadata["network_data_format"]
    sides = conversion.config["img_size"]
    shapes["inputs"]["image"] |= {
        "num_channels": conversion.config["in_channels"],
        "spatial_shape": [sides] * conversion.config["spatial_dims"] if isinstance(sides, int) else list(sides),
    }
    shapes["outputs"]["pred"]["num_channels"] = conversion.config["embed_dim"]
    metadata["medvit"] = {
        "weights_sha256": file_sha256(root / WEIGHTS),
        **replaced.get("medvit", {}),
        "source": source.path.name,
        "source_sha256": source.sha256,
    }
    return metadata


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=4, ensure_ascii=False) + "\n", encoding="utf-8")


def _number(value: int | Sequence[int], name: str) -> int:
    """One number for an argument that may have one per axis.

    Raises:
        BundleError: they differ.
    """
    values = {value} if isinstance(value, int) else set(value)
    if len(values) > 1:
        raise BundleError(
            f"this bundle makes images square, but {name} of these weights is {value}; use the network alone"
        )
    return values.pop()
