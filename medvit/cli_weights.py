"""``medvit weights``: look at public checkpoints, and convert them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvit.registry import list_models
from medvit.terminal import emit, errors, quiet, say, table

if TYPE_CHECKING:
    from medvit.models.convert import Conversion

weights = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Look at public checkpoints and convert them; nothing of a file is ever executed.",
)


class Inflation(StrEnum):
    """Choices of ``--inflate``."""

    mean = "mean"
    middle = "center"


class Channels(StrEnum):
    """Choices of ``--channels``."""

    repeat = "repeat"
    average = "average"


File = Annotated[Path, typer.Argument(help="A checkpoint: safetensors, or what torch.save wrote.")]
Entry = Annotated[str | None, typer.Option("--entry", help="Which entry of FILE holds the weights, if several could.")]


@weights.command()
def inspect(
    file: File,
    entry: Entry = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")] = False,
) -> None:
    """Show what FILE holds: tensors, types, the public layout it has, and what that tells of the network.

    Example: `medvit weights inspect model_swinvit.pt`
    """
    with errors(), quiet():
        from medvit.models.account import drawn_together
        from medvit.models.checkpoints import read_checkpoint
        from medvit.models.convert import describe

        found = describe(read_checkpoint(file, entry))
        if as_json:
            emit(found)
            return
        plain = ("file", "format", "sha256", "tensors", "parameters")
        types = ", ".join(f"{name} ({count})" for name, count in found["dtypes"].items())
        rows = [(name, found[name]) for name in plain] + [("types", types)]
        rows += [(name.replace("_", " "), ", ".join(found[name])) for name in ("unwrapped", "set_aside") if found[name]]
        if found["converted"]:
            rows.append(("converted to", f"{found['converted']['model']} {found['converted']['config']}"))
        table(("what", "value"), rows)
        table(
            ("layout", "model", "told by the file", "to be said", "unexplained keys"),
            [
                (
                    layout["layout"],
                    layout["model"],
                    _arguments(layout["config"]),
                    ", ".join(layout["ask"]) or "-",
                    drawn_together(layout["unexplained"]) or "-",
                )
                for layout in found["layouts"]
            ],
        )
        if not found["layouts"] and not found["converted"]:
            say(f"no public layout: {found['note'] or drawn_together(found['unexplained'])}")


@weights.command()
def convert(
    file: File,
    model: Annotated[str, typer.Option("--model", "-m", help="The network, a name for `medvit.create_model`.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The safetensors file, or folder of a bundle, to write.")
    ],
    bundle: Annotated[
        str | None,
        typer.Option(
            help="Write a bundle: the preprocessing of this one, by folder or name, with the weights of FILE."
        ),
    ] = None,
    config: Annotated[str | None, typer.Option(help="The network's arguments: JSON, or a file of it.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="One argument as name=value (JSON or text); repeat for several.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="The layout of FILE; default: the one it is recognised as.")
    ] = None,
    entry: Entry = None,
    allow_partial: Annotated[
        bool, typer.Option("--allow-partial", help="Write what FILE has of the network, if it is known to be a part.")
    ] = False,
    drop: Annotated[
        list[str] | None, typer.Option(help="Leave out keys that this regular expression matches; repeatable.")
    ] = None,
    resize_positions: Annotated[
        bool, typer.Option("--resize-positions", help="Interpolate position tables to the network's size.")
    ] = False,
    resize_patches: Annotated[
        bool, typer.Option("--resize-patches", help="Resample patch embeddings to the network's patch size.")
    ] = False,
    inflate: Annotated[Inflation | None, typer.Option(help="Make 2D kernels 3D: spread, or in the middle.")] = None,
    channels: Annotated[Channels | None, typer.Option(help="Adapt kernels to other image channels.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT if it exists.")] = False,
) -> None:
    """Write FILE as weights of a network of medvit, if every key is accounted for.

    Arguments that shapes tell need not be given. The account says what became of each key; with a key missing, left
    over or of another shape nothing is written, unless an option allows it.

    With `--bundle` OUTPUT is the folder of a new bundle, for `medvit predict`.

    Example: `medvit weights convert pretrained.pt -m swin_unetr -o swin.safetensors --set downsample=merging_legacy`
    """
    arguments = _config(config) | dict(_setting(text) for text in settings or ())
    _check_usage(model, output, drop or (), bundle, overwrite)
    with errors(), quiet():
        from medvit.adopt import adopt
        from medvit.bundle import find_bundle
        from medvit.models.checkpoints import read_checkpoint
        from medvit.models.convert import convert as convert_checkpoint
        from medvit.models.reshape import Reshape
        from medvit.writers.base import atomic

        conversion = convert_checkpoint(
            read_checkpoint(file, entry),
            model,
            arguments,
            layout=layout,
            reshape=Reshape(
                positions=resize_positions,
                patches=resize_patches,
                inflate=inflate and inflate.value,
                channels=channels and channels.value,
            ),
            allow_partial=allow_partial,
            drop=drop or (),
        )
        _show(conversion)
        conversion.check()
        if bundle is not None:
            adopt(find_bundle(bundle), conversion, output)
        else:
            with atomic(output, overwrite=overwrite) as part:
                conversion.save(part)
        say(f"{len(conversion.tensors)} tensors written to {output}")


def _check_usage(model: str, output: Path, drop: Sequence[str], bundle: str | None, overwrite: bool) -> None:
    if model not in list_models():
        raise typer.BadParameter(f"no model named {model!r}; there are {', '.join(list_models())}")
    if bundle is not None and overwrite:
        raise typer.BadParameter("--overwrite is for files; a bundle never replaces a folder")
    if bundle is None and output.suffix != ".safetensors":
        raise typer.BadParameter(f"--output must end in .safetensors, got {output}")
    for pattern in drop:
        try:
            re.compile(pattern)
        except re.error as error:
            raise typer.BadParameter(f"--drop takes a regular expression, got {pattern!r}: {error}") from error


def _show(conversion: Conversion) -> None:
    checkpoint = conversion.checkpoint
    table(
        ("source", "layout", "model", "unwrapped", "set aside"),
        [
            (
                checkpoint.path,
                conversion.layout.name,
                conversion.layout.model,
                ", ".join(checkpoint.unwrapped) or "-",
                ", ".join(checkpoint.set_aside) or "-",
            )
        ],
    )
    table(
        ("argument", "value", "from"),
        [
            (s.name, json.dumps(s.value), s.origin + (f"; the file says {json.dumps(s.found)}" if s.disputed else ""))
            for s in conversion.settings
        ],
    )
    table(("keys", "number", "which"), conversion.account.rows())


def _arguments(config: dict[str, Any]) -> str:
    return ", ".join(f"{name}={json.dumps(value)}" for name, value in config.items()) or "-"


def _config(text: str | None) -> dict[str, Any]:
    from medvit.models.convert import read_config

    if text is None:
        return {}
    try:
        return read_config(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"--config takes JSON or a file of it, got {text!r}: {error}") from error


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not name or not equals:
        raise typer.BadParameter(f"--set takes name=value, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
