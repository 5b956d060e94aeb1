"""The ``medvit`` command. Thin: every command is a call into the library, a table, and an exit status."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvit.errors import MedvitError

if TYPE_CHECKING:
    from rich.console import Console

    from medvit.data.study import Inventory

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Segment medical images with MONAI bundles, and look at what is in a folder of DICOM or NIfTI first.\n\n"
    "Exit status: 0 everything succeeded, 1 something failed, 2 wrong usage. No command uses the network.",
)


class Format(StrEnum):
    """Output formats of ``predict``."""

    nifti = "nifti"
    dicom_seg = "dicom-seg"
    overlay = "overlay"


Inputs = Annotated[list[Path], typer.Argument(help="DICOM or NIfTI files, or folders searched to any depth.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if needed.")]
BundleName = Annotated[str, typer.Argument(help="A bundle's folder or name (see `medvit bundles`).")]


@app.callback()
def _common(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log what is done, and tracebacks of failures.")] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("medvit").setLevel(logging.DEBUG if verbose else logging.WARNING)


@app.command()
def predict(
    bundle: BundleName,
    inputs: Inputs,
    output: Output,
    formats: Annotated[
        list[Format] | None, typer.Option("--format", "-f", help="Repeat for several; default: all that apply.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that exist.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Keep finished cases of an earlier run, do the rest.")] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward pass.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16: faster, labels can differ at borders.")] = False,
) -> None:
    """Segment every image found in INPUTS.

    Writes for each case a label map on the source's own voxel grid (NIfTI; DICOM SEG for DICOM sources) and an overlay
    picture, and for the run `volumes.csv`, `volumes.json` and `manifest.jsonl` (one line per case, with the reason of
    every failure). One bad case never stops the others.

    Example: `medvit predict hippocampus_swin_unetr study/ --output results/`
    """
    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other")
    from medvit.bundle import find_bundle

    overrides: dict[str, Any] = {
        "dataset_dir": [str(path.absolute()) for path in inputs],
        "output_dir": str(output.absolute()),
        "device_name": device,
        "existing": "overwrite" if overwrite else "resume" if resume else "refuse",
        "amp": amp,
    }
    if formats:
        overrides["formats"] = [f.value for f in formats]
    if batch_size:
        overrides["batch_size"] = batch_size
    with _errors(), _quiet():
        with _status("loading the bundle and reading headers"):
            runner = find_bundle(bundle).runner(**overrides)
        records = list(_progress(runner.records(), "cases", len(runner.cases)))
        _table(
            ("case", "structure", "volume mm³"),
            [(r["case"], v["structure"], f"{v['volume_mm3']:.1f}") for r in records for v in r.get("volumes", ())],
        )
        for record in records:
            if record["status"] == "failed":
                _say(f"failed: {record['case']} ({record['code']}): {record['reason']}")
        failed = sum(record["status"] == "failed" for record in records)
        skipped = sum(record["status"] == "skipped" for record in records)
        done = len(records) - failed - skipped
        _say(f"{done} done, {skipped} skipped, {failed} failed; results and manifest.jsonl in {output}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def inspect(
    inputs: Inputs,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output instead of tables.")] = False,
) -> None:
    """Show which images INPUTS hold, which of them can be used and why not. Reads headers, no pixels.

    Exit status 1 if an image cannot be used or a file cannot be read.

    Example: `medvit inspect study/`
    """
    with _errors():
        inventory = _discover(inputs)
        usable = [s for s in inventory.series if s.problem is None]
        broken = [s for s in inventory.series if s.problem is not None]
        unreadable = [a for a in inventory.set_aside if a.code == "unreadable"]
        if as_json:
            for line in _inventory_lines(inventory):
                _emit(line)
        else:
            _table(
                ("image", "kind", "modality", "shape", "spacing mm", "axes", "files"),
                [
                    (s.name, s.kind, s.modality or "-", *(_grid(s.space) if s.space else ("-", "-", "-")), len(s.files))
                    for s in usable
                ],
            )
            _table(("cannot be used", "code", "why"), [(s.name, s.problem.code, str(s.problem)) for s in broken if s.problem])
            _table(("set aside", "code", "why"), [(a.path, a.code, a.reason) for a in inventory.set_aside])
            for series in usable:
                for note in series.notes:
                    _say(f"note: {series.name}: {note}")
            _say(f"{len(usable)} usable, {len(broken)} not usable, {len(inventory.set_aside)} files set aside")
    raise typer.Exit(1 if broken or unreadable or not usable else 0)


@app.command()
def convert(
    inputs: Inputs,
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per series on standard output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
) -> None:
    """Write every usable image of INPUTS as NIfTI, one file per volume, in its own voxel grid.

    A series whose geometry cannot be proven is rejected with a reason; the others are written all the same.

    Example: `medvit convert study/ --output nifti/`
    """
    from medvit.writers.convert import convert as convert_inventory

    with _errors():
        inventory = _discover(inputs)
        records = []
        total = len(inventory.series) + len(inventory.set_aside)
        for record in _progress(convert_inventory(inventory, output, overwrite=overwrite), "series", total):
            records.append(record)
            if as_json:
                _emit(record)
        if not as_json:
            shown = [r for r in records if r["status"] != "set-aside"]
            _table(
                ("series", "status", "output", "reason"),
                [(r["series"], r["status"], r["output"] or "-", r["reason"] or "") for r in shown],
            )
        written = sum(r["output"] is not None for r in records)
        failed = sum(r["status"] == "rejected" or r["code"] == "unreadable" for r in records)
        _say(f"{written} written, {failed} rejected or unreadable, {len(records) - written - failed} set aside")
    raise typer.Exit(1 if failed or not written else 0)


@app.command()
def bundles() -> None:
    """List the bundles that `predict` and `verify` know by name."""
    from medvit.bundle import list_bundles

    with _errors():
        found = list_bundles()
        _table(
            ("bundle", "version", "task", "folder"),
            [(b.name, b.metadata.get("version", "?"), b.metadata.get("task", "?"), b.root) for b in found],
        )
        if not found:
            _say("no bundles found; set MEDVIT_BUNDLES to a folder of bundles")


@app.command()
def verify(bundle: BundleName) -> None:
    """Check that a bundle is whole: files, metadata, weights against their sha256, network, configs.

    Example: `medvit verify hippocampus_swin_unetr`
    """
    from medvit.bundle import find_bundle

    with _errors(), _quiet():
        checks = list(find_bundle(bundle).verify())
        _table(("check", "result"), [(name, wrong or "ok") for name, wrong in checks])
    raise typer.Exit(1 if any(wrong for _, wrong in checks) else 0)


def main() -> None:
    """Entry point of the ``medvit`` command."""
    app()


@contextmanager
def _errors() -> Iterator[None]:
    """One line instead of a traceback for what a user can mend."""
    try:
        yield
    except MedvitError as error:
        logging.getLogger("medvit").debug("traceback", exc_info=True)
        typer.echo(f"medvit: {error}", err=True)
        raise typer.Exit(1) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep MONAI's remarks about optional packages off the terminal."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"monai\..*")
        yield


def _discover(inputs: Sequence[Path]) -> Inventory:
    from medvit.data.study import discover

    console = _console()
    if not console.is_terminal:
        return discover(inputs)
    with console.status("reading headers") as status:
        return discover(inputs, progress=lambda n: status.update(f"reading headers: {n} files"))


def _inventory_lines(inventory: Inventory) -> Iterator[dict[str, Any]]:
    for series in inventory.series:
        space, problem = series.space, series.problem
        yield {
            "status": "rejected" if problem else "warning" if series.notes else "ok",
            "code": problem.code if problem else "",
            "reason": str(problem) if problem else " ".join(series.notes),
            "series": series.name,
            "files": [str(f) for f in series.files],
            "modality": series.modality,
            "shape": list(space.shape) if space else None,
            "spacing": list(space.spacing) if space else None,
            "orientation": space.orientation if space else None,
        }
    for aside in inventory.set_aside:
        yield {"status": "set-aside", "code": aside.code, "reason": aside.reason, "files": [str(aside.path)]}


def _grid(space: Any) -> tuple[str, str, str]:
    return "×".join(map(str, space.shape)), "×".join(f"{v:.3g}" for v in space.spacing), space.orientation


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)


@contextmanager
def _status(text: str) -> Iterator[None]:
    with _console().status(text):
        yield


def _progress(items: Iterable[dict[str, Any]], what: str, total: int) -> Iterator[dict[str, Any]]:
    """A bar on a terminal, nothing when piped."""
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = _console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TextColumn(what), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        yield from progress.track(items, total=total, description="")


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table on a terminal; tab-separated lines when piped; nothing without rows."""
    if not rows:
        return
    if not sys.stdout.isatty():
        for row in (header, *rows):
            typer.echo("\t".join(str(v) for v in row))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header)
    for row in rows:
        table.add_row(*(Text(str(v)) for v in row))
    Console().print(table)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _emit(record: dict[str, Any]) -> None:
    typer.echo(json.dumps(record, ensure_ascii=False))
