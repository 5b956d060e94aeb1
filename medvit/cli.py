"""The ``medvit`` command. Thin: every command is a call into the library, a table, and an exit status."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvit.cli_evaluate import evaluate
from medvit.cli_weights import weights
from medvit.errors import MedvitError, NothingFound, OutputError
from medvit.terminal import console, emit, errors, progress, quiet, say, table

if TYPE_CHECKING:
    from medvit.data.regrid import Repairs
    from medvit.data.study import Inventory, Series
    from medvit.inference.batch import FolderRunner

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Segment and classify medical images with MONAI bundles, and look at what is in a folder of images first.\n\n"
    "Exit status: 0 everything succeeded, 1 something failed, 2 wrong usage. No command uses the network.",
)
app.add_typer(weights, name="weights")
app.command()(evaluate)


class Format(StrEnum):
    """Output formats of ``predict``."""

    nifti = "nifti"
    dicom_seg = "dicom-seg"
    png = "png"
    overlay = "overlay"
    dicom_seg_labelmap = "dicom-seg-labelmap"
    rtstruct = "rtstruct"
    secondary_capture = "secondary-capture"
    report = "report"
    scores = "scores"
    embedding = "embedding"
    patches = "patches"


class Tilt(StrEnum):
    """What becomes of slices sheared by gantry tilt."""

    keep = "keep"
    resample = "resample"
    refuse = "refuse"


class Uneven(StrEnum):
    """What becomes of slices at uneven distances."""

    refuse = "refuse"
    resample = "resample"
    apart = "split"  # a name that str does not have


Inputs = Annotated[list[Path], typer.Argument(help="DICOM, NIfTI or photographs, or folders searched to any depth.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the results; made if needed.")]
BundleName = Annotated[str, typer.Argument(help="A bundle's folder or name (see `medvit bundles`).")]


@app.callback()
def _common(
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Log what is done, and tracebacks of failures.")
    ] = False,
) -> None:
    # Of other libraries nothing is shown: their remarks may quote headers, and so name patients.
    logging.getLogger().addHandler(logging.NullHandler())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logger = logging.getLogger("medvit")
    logger.handlers = [handler]
    logger.setLevel(logging.DEBUG if verbose else logging.WARNING)


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
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep finished cases of an earlier run, do the rest.")
    ] = False,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward pass.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bfloat16: faster, labels can differ at borders.")] = False,
) -> None:
    """Segment, classify or embed every image found in INPUTS, as BUNDLE does.

    Segmentation: for each case a label map on the source's own grid (NIfTI; DICOM SEG for DICOM sources; PNG for
    photographs) and an overlay picture, for the run `volumes.csv` and `volumes.json`. Classification: `predictions.csv`
    with a row per image; embeddings: `embeddings.csv`. All: `manifest.jsonl`, one line per case, with the reason of
    every failure. One bad case never stops the others.

    Example: `medvit predict hippocampus_swin_unetr study/ --output results/`
    """
    if overwrite and resume:
        raise typer.BadParameter("--overwrite and --resume exclude each other")
    # as paths: in a text MONAI would read '#' and '$' as syntax
    overrides: dict[str, Any] = {
        "dataset_dir": [path.absolute() for path in inputs],
        "output_dir": output.absolute(),
        "device_name": device,
        "existing": "overwrite" if overwrite else "resume" if resume else "refuse",
    }
    if formats:
        overrides["formats"] = [f.value for f in formats]
    if batch_size:
        overrides["batch_size"] = batch_size
    if amp:
        overrides["amp"] = True
    with errors(), quiet():
        runner = _runner(bundle, output, overrides)
        records = list(progress(runner.records(), "cases", len(runner.cases), "case"))
        table(*_sizes(records))
        for record in records:
            if record["status"] == "failed":
                say(f"failed: {record['case']} ({record['code']}): {record['reason']}")
        failed = sum(record["status"] == "failed" for record in records)
        skipped = sum(record["status"] == "skipped" for record in records)
        done = len(records) - failed - skipped
        say(f"{done} done, {skipped} skipped, {failed} failed; results and manifest.jsonl in {output}")
    raise typer.Exit(1 if failed else 0)


@app.command()
def inspect(
    inputs: Inputs,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output instead of tables.")] = False,
) -> None:
    """Show which images INPUTS hold, which of them can be used and why not.

    Reads headers; pixels only of DICOM files that claim to be copies of each other. Exit status 1 if an image cannot be
    used or a file cannot be read.

    Example: `medvit inspect study/`
    """
    with errors():
        inventory = _discover(inputs)
        usable = [s for s in inventory.series if s.problem is None]
        broken = [s for s in inventory.series if s.problem is not None]
        if as_json:
            for line in _inventory_lines(inventory):
                emit(line)
        else:
            table(
                ("image", "kind", "modality", "shape", "spacing mm", "axes", "files"),
                [(s.name, s.kind, s.modality or "-", *_grid(s), len(s.origins)) for s in usable],
            )
            table(
                ("cannot be used", "code", "why"),
                [(s.name, s.problem.code, str(s.problem)) for s in broken if s.problem],
            )
            table(("set aside", "code", "why"), [(a.path, a.code, a.reason) for a in inventory.set_aside])
            for series in usable:
                for note in series.notes:
                    say(f"note: {series.name}: {note}")
            say(f"{len(usable)} usable, {len(broken)} not usable, {len(inventory.set_aside)} files set aside")
        _require_images(inventory, inputs)
    raise typer.Exit(1 if broken or not usable else 0)


@app.command()
def convert(
    inputs: Inputs,
    output: Output,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON line per series on standard output.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    four_d: Annotated[bool, typer.Option("--4d", help="One 4D file for the volumes of a series.")] = False,
    tilt: Annotated[Tilt, typer.Option(help="Gantry tilt: a sheared grid, an upright one, or none.")] = Tilt.keep,
    uneven: Annotated[Uneven, typer.Option(help="Slices at uneven distances, or with gaps.")] = Uneven.refuse,
    deidentify: Annotated[
        bool, typer.Option("--deidentify", help="DICOM files without identifiers (PS3.15 basic profile), not NIfTI.")
    ] = False,
) -> None:
    """Write every usable image of INPUTS as NIfTI, one file per volume, in its own voxel grid.

    Time points, echoes and diffusion weightings of one series become volumes of their own, in order of acquisition.
    Projections and captures become 2D images without a place in the patient. A series whose geometry cannot be proven
    is rejected with a reason; the others are written all the same. Exit status 1 if anything was rejected.

    Example: `medvit convert study/ --output nifti/`
    """
    from medvit.data.regrid import Repairs
    from medvit.writers.convert import convert as to_nifti
    from medvit.writers.convert import deidentify as without_identifiers

    if deidentify and (four_d, tilt, uneven) != (False, Tilt.keep, Uneven.refuse):
        raise typer.BadParameter("--deidentify copies DICOM files; --4d, --tilt and --uneven are for NIfTI")
    with errors():
        repairs = Repairs(tilt.value, uneven.value)
        inventory = _discover(inputs, exclude=output, repairs=repairs, unpack=not deidentify)
        records = []
        total = len(inventory.series) + len(inventory.set_aside)
        if deidentify:
            total = len(inventory.set_aside) + len({file for one in inventory.series for file in one.files})
            outcomes = without_identifiers(inventory, output, overwrite=overwrite)
        else:
            outcomes = to_nifti(inventory, output, overwrite=overwrite, four_d=four_d)
        for record in progress(outcomes, "series", total, "series"):
            records.append(record)
            if as_json:
                emit(record)
        if not as_json:
            shown = [r for r in records if r["series"]]
            table(
                ("series", "status", "output", "reason"),
                [(r["series"], r["status"], r["output"] or "-", r["reason"] or "") for r in shown],
            )
        written = sum(r["output"] is not None for r in records)
        failed = sum(r["status"] == "rejected" for r in records)
        say(f"{written} written, {failed} rejected, {len(records) - written - failed} set aside")
        if not records:
            _require_images(inventory, inputs)
    raise typer.Exit(1 if failed else 0)


@app.command()
def bundles() -> None:
    """List the bundles that `predict` and `verify` know by name."""
    from medvit.bundle import list_bundles

    rows, broken = [], 0
    for bundle in list_bundles():
        try:
            rows.append(
                (bundle.name, bundle.metadata.get("version", "?"), bundle.metadata.get("task", "?"), bundle.root)
            )
        except MedvitError as error:
            broken += 1
            rows.append((bundle.name, "-", str(error), bundle.root))
    table(("bundle", "version", "task", "folder"), rows)
    if not rows:
        say("no bundles found; set MEDVIT_BUNDLES to a folder of bundles")
    raise typer.Exit(1 if broken else 0)


@app.command()
def verify(bundle: BundleName) -> None:
    """Check that a bundle is whole: files, metadata, weights against their sha256, network, configs.

    Example: `medvit verify hippocampus_swin_unetr`
    """
    from medvit.bundle import find_bundle

    with errors(), quiet():
        checks = list(find_bundle(bundle).verify())
        table(("check", "result"), [(name, wrong or "ok") for name, wrong in checks])
    raise typer.Exit(1 if any(wrong for _, wrong in checks) else 0)


def main() -> None:
    """Entry point of the ``medvit`` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a pipe of another encoding must not end a run
            stream.reconfigure(errors="backslashreplace")
    app()


def _runner(bundle: str, output: Path, overrides: dict[str, Any]) -> FolderRunner:
    """The bundle's runner; if there is none the manifest says why."""
    from medvit.bundle import find_bundle

    found = find_bundle(bundle)
    try:
        with console().status("loading the bundle and reading headers"):
            return found.runner(**overrides)
    except OutputError:  # a folder that is not to be written to, for instance since it is an input
        raise
    except MedvitError as error:
        from medvit.inference.batch import record_failed_run

        with suppress(OutputError):  # the first error is the one to mend
            record_failed_run(output, error)
        raise


def _discover(
    inputs: Sequence[Path], exclude: Path | None = None, repairs: Repairs | None = None, unpack: bool = True
) -> Inventory:
    from medvit.data.regrid import AS_IT_IS
    from medvit.data.study import discover

    options: dict[str, Any] = {"exclude": exclude, "repairs": repairs or AS_IT_IS, "unpack": unpack}

    screen = console()
    with quiet():
        if not screen.is_terminal:
            return discover(inputs, **options)
        with screen.status("reading headers") as status:

            def show(files: int) -> None:
                if files % 100 == 0:
                    status.update(f"reading headers: {files} files")

            return discover(inputs, **options, progress=show)


def _require_images(inventory: Inventory, inputs: Sequence[Path]) -> None:
    if not inventory.series:
        where = ", ".join(map(str, inputs))
        raise NothingFound(f"{where}: no DICOM series, NIfTI file or photograph found; check the path")


def _inventory_lines(inventory: Inventory) -> Iterator[dict[str, Any]]:
    """What ``convert`` would say of each series and file, as far as headers tell; the same keys but ``output``."""
    from medvit.writers.convert import about

    for series in inventory.series:
        problem = series.problem
        yield {
            "status": "rejected" if problem else "warning" if series.notes else "ok",
            "code": problem.code if problem else "notes" if series.notes else None,
            "reason": str(problem) if problem else "; ".join(series.notes) or None,
            **dict.fromkeys(("shape", "spacing", "orientation")),
            **about(series),
        }
    for aside in inventory.set_aside:
        unknown = dict.fromkeys(("series", "modality", "shape", "spacing", "orientation"))
        yield {"status": "set-aside", "code": aside.code, "reason": aside.reason, "files": [str(aside.path)], **unknown}


def _grid(series: Series) -> tuple[str, str, str]:
    """Shape, spacing and axes of a series, or the size and channels of a photograph."""
    space = series.space
    if space is None:
        return "-", "-", "-"
    if space.unit == "px":
        return f"{space.shape[0]}×{space.shape[1]}, {'colour' if series.channels > 1 else 'grey'}", "-", "-"
    return "×".join(map(str, space.shape)), "×".join(f"{v:.3g}" for v in space.spacing), space.orientation


def _sizes(records: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[Sequence[Any]]]:
    """Header and rows of what a run found: probabilities, vectors, volumes, or areas of photographs among the cases."""
    scored = [(r["case"], r["scores"]) for r in records if "scores" in r]
    if scored:
        return ("case", *scored[0][1]), [(case, *scores.values()) for case, scores in scored]
    described = [r for r in records if "vectors" in r]
    if described:
        return ("case", "image", "numbers"), [
            (r["case"], "×".join(map(str, r["shape"])), ", ".join(f"{n} ({k})" for k, n in r["vectors"].items()))
            for r in described
        ]
    rows = [(r["case"], v) for r in records for v in r.get("volumes", ())]
    volumes = [f"{v['volume_mm3']:.1f}" if v["volume_mm3"] is not None else "-" for _, v in rows]
    header: tuple[str, ...] = ("case", "structure", "volume mm³")
    cells: list[Sequence[Any]] = [
        (case, v["structure"], volume) for (case, v), volume in zip(rows, volumes, strict=True)
    ]
    if not any("area_px" in v for _, v in rows):
        return header, cells
    areas = [(v.get("area_px", "-"), v.get("fraction", "-")) for _, v in rows]
    return (*header, "area px", "fraction"), [(*cell, *area) for cell, area in zip(cells, areas, strict=True)]


if __name__ == "__main__":
    main()
