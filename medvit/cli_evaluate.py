"""``medvit evaluate``: metrics of a table of cases with their intervals, and paired differences between two runs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medvit.terminal import emit, errors, quiet, say, table

if TYPE_CHECKING:
    from medvit.adapt.tables import Table

RESERVED = {"case", "case_id", "group", "split", "label", "score"}  # columns of a table that mean something else
METRICS = ("auroc", "average_precision", "accuracy", "sensitivity", "specificity", "brier", "ece")


def evaluate(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="TABLE", help="CSV with one row per case; or, with --truth, a folder of label maps."),
    ],
    against: Annotated[Path | None, typer.Option(help="A second table of the same cases: another run.")] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option("--metric", "-m", help=f"{', '.join(METRICS)}, or a column of numbers; repeat for several."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Use the rows with this value of the column `split`.")] = None,
    threshold: Annotated[float, typer.Option(help="Scores from here on are positive decisions.")] = 0.5,
    calibration: Annotated[
        bool, typer.Option("--calibration", help="Also predicted against observed frequency, in ten bins.")
    ] = False,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap draws.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the bootstrap draws.")] = 0,
    truth: Annotated[Path | None, typer.Option(help="Folder of reference label maps, to make TABLE from.")] = None,
    structures: Annotated[str, typer.Option(help="With --truth: names of the labels 1, 2, ..., by commas.")] = "",
    tolerance: Annotated[float, typer.Option(min=0, help="With --truth: of surface Dice, mm.")] = 1.0,
    write: Annotated[Path | None, typer.Option(help="With --truth: the CSV file to write.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines on standard output instead of tables.")] = False,
) -> None:
    """Print metrics of TABLE, each with its number of cases and 95 % interval; with --against the paired difference.

    Columns: `case_id`; `label` and `score` (two classes), `label` and `score_NAME` (several classes), or `label_NAME`
    and `score_NAME` (several labels); numbers per case such as Dice under any name; optionally `group`, the patient,
    where several cases belong to one, and `split`. A table with missing values is refused, never shortened.

    Intervals of AUROC are DeLong's, others bootstrapped; with groups all are bootstrapped by group. The p value is
    DeLong's for AUROC, Wilcoxon's for columns, the bootstrap's for others, and adjusted by Holm for all rows. Where
    the cases are too few for a class or label it has no interval, and the reason; `macro` is the mean of the others'
    values and of its own, if it has one.

    Example: `medvit evaluate mae.csv --against scratch.csv --metric auroc`

    With --truth, TABLE is a folder of label maps, which are compared with those of the same file names (the `_seg` that
    medvit predict puts behind is left off), case by case, on grids that must agree: Dice, `surface_dice_NAME` and
    `hd95_NAME` (mm) of each structure go to the file --write. A structure that neither image holds leaves empty cells;
    one that a single image holds has Dice 0 and a distance of `inf`. Neither has a mean: leave such cases out of all
    tables, or fill the cells with what they shall cost.

    Example: `medvit evaluate OUT --truth LABELS --structures anterior,posterior --write run.csv -m hd95_anterior`
    """
    if truth is not None:
        predictions = _compared(predictions, truth, structures, tolerance, write)
        if not metrics:
            return
    with errors(), quiet():
        from medvit.adapt.evaluation import Settings, compare
        from medvit.adapt.evaluation import calibration as bins_of
        from medvit.adapt.evaluation import evaluate as evaluate_table

        settings = Settings(resamples, seed, threshold)
        first = _read(predictions, split)
        chosen = _chosen(first, metrics)
        if against is None:
            rows = evaluate_table(first, chosen, settings)
        else:
            rows = compare(first, _read(against, split), chosen, settings)
        bins = bins_of(first) if calibration else []
    if any(row["low"] is not None and row["low"] == row["high"] for row in rows):
        say("note: where a metric is 0 or 1 its interval may be a point, however few the cases; it is wider in truth")
    if as_json:
        for row in rows:
            emit(row)
        for target, found in bins:
            emit({"calibration": target, **found._asdict()})
        return
    _show(rows)
    table(
        ("target", "predicted from", "to", "n", "mean", "observed"),
        [(t or "-", _number(b.low), _number(b.high), b.n, _number(b.predicted), _number(b.observed)) for t, b in bins],
    )


def _compared(found: Path, truth: Path, structures: str, tolerance: float, table: Path | None) -> Path:
    names = [name.strip() for name in structures.split(",") if name.strip()]
    if table is None or not names:
        raise typer.BadParameter("--truth needs --structures, the names of the labels, and --write, a CSV file")
    if len(set(names)) < len(names) or not RESERVED.isdisjoint(names):
        raise typer.BadParameter(f"--structures must be different names, none of {', '.join(sorted(RESERVED))}")
    with errors(), quiet():
        from medvit.inference.label_maps import paired, read_pair
        from medvit.pretrain.agreement import agreement, columns_of
        from medvit.pretrain.scores import write_table

        rows, cases = [], paired(found, truth)
        for files in cases.values():
            ours, theirs, spacing = read_pair(*files)
            rows.append([agreement(ours == i, theirs == i, spacing, tolerance) for i in range(1, len(names) + 1)])
        write_table(table, [{"case": case} for case in cases], columns_of(names, rows))
    say(f"{len(cases)} cases: {table}")
    return table


def _read(path: Path, split: str | None) -> Table:
    from medvit.adapt.tables import read_table

    found = read_table(path)
    splits = found.splits()
    if split is not None and split not in splits:
        raise typer.BadParameter(f"--split must be one of {', '.join(splits) or 'none'} for {path}, got {split!r}")
    if split is None and len(splits) > 1:
        raise typer.BadParameter(f"{path} has the splits {', '.join(splits)}; choose one with --split")
    return found if split is None else found.of_split(split)


def _chosen(found: Table, metrics: Sequence[str] | None) -> Sequence[str]:
    if not metrics:
        if "label" in found.columns or any(name.startswith("label_") for name in found.columns):
            return ["auroc"]
        raise typer.BadParameter(f"--metric must name one of the columns {', '.join(found.columns)}")
    for metric in metrics:
        if metric not in METRICS and metric not in found.columns:
            known = f"one of {', '.join(METRICS)}, or a column ({', '.join(found.columns)})"
            raise typer.BadParameter(f"--metric must be {known}, got {metric!r}")
    return list(dict.fromkeys(metrics))


def _show(rows: Sequence[dict[str, Any]]) -> None:
    header = ["metric", "target", "n", "groups", "value", "95 % interval", "by"]
    paired = "p" in rows[0]
    if paired:
        header += ["against", "difference", "95 % interval", "p", "by", "p (Holm)"]
    cells = []
    for row in rows:
        line = [row["metric"], row["target"] or "-", row["n"], row["groups"] or "-", _number(row["value"])]
        line += [_between(row["low"], row["high"]), row["interval"]]
        if paired:
            apart = _between(row["difference_low"], row["difference_high"], "+")
            line += [_number(row["against"]), _number(row["difference"], "+.4f"), apart]
            line += [_number(row["p"], ".3g"), row["test"], _number(row["p_holm"], ".3g")]
        cells.append(line)
    table(header, cells)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else f"{value:{form}}"


def _between(low: float | None, high: float | None, sign: str = "") -> str:
    return "-" if low is None or high is None else f"{low:{sign}.4f} to {high:{sign}.4f}"
