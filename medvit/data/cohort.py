"""Labelled cohorts: a ``cases.csv`` beside its images, with one row per case and a fixed split."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from medvit.data.space import Space
from medvit.data.study import Series, discover
from medvit.errors import NothingFound, SpaceMismatch, UnreadableFile, UnreadableSeries

_COLUMNS = ("case_id", "image", "label", "split")


def labelled_cases(dataset_dir: str | Path, split: str, others: Sequence[str] = ()) -> list[dict[str, str]]:
    """Cases of one split, for a MONAI ``Dataset``.

    Args:
        dataset_dir: folder with ``cases.csv``; its ``image`` and ``label`` columns are paths relative to that folder.
        split: value of the ``split`` column, e.g. ``"train"`` or ``"val"``.
        others: further columns with paths of masks, such as ``["fov"]`` for the field of view of photographs.

    Returns:
        ``{"image": path, "label": path, "case": case_id}``, and each of ``others``, per case, in the table's order.

    Raises:
        NothingFound: no table, a column that lacks, no case in that split, or a file of one that is not there.
        SpaceMismatch: an image and its label or mask that, by their headers, do not lie on one grid.
        UnreadableFile, UnreadableSeries: a file that cannot be used or holds several volumes; a label or mask in
            colours.
    """
    table = Path(dataset_dir) / "cases.csv"
    if not table.is_file():
        raise NothingFound(
            f"{table}: no such table; dataset_dir must hold a cases.csv with columns {', '.join(_COLUMNS)}"
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
    needed = (*_COLUMNS, *others)
    if lacking := [column for column in needed if column not in (reader.fieldnames or ())]:
        raise NothingFound(f"{table}: lacks the columns {', '.join(lacking)}; it must have {', '.join(needed)}")
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        found = ", ".join(sorted({repr(row["split"]) for row in rows})) or "no rows"
        raise NothingFound(f"{table}: no case in split {split!r}; the table has {found}")
    folder = table.parent
    columns = ("image", "label", *others)
    for row in chosen:
        for column in columns:
            if not (folder / row[column]).is_file():
                raise NothingFound(
                    f"{folder / row[column]}: no such file, but {table} names it as {column} of {row['case_id']}"
                )
        _, image = _header(folder / row["image"])
        for column in columns[1:]:
            _require_mask(folder / row[column], image, f"{table}: image and {column} of {row['case_id']}")
    return [{**{column: str(folder / row[column]) for column in columns}, "case": row["case_id"]} for row in chosen]


def _require_mask(file: Path, image: Space, what: str) -> None:
    """Check, by headers, that a label or mask has one value per voxel and lies on the grid of its image."""
    series, space = _header(file)
    if series.channels > 1:
        reason = f"a label needs one value per pixel, but this has {series.channels}: colours, or a palette"
        raise UnreadableSeries(file, "colour", f"{reason}; save it as grey values")
    try:
        image.require_same(space, what=what)
    except SpaceMismatch as error:
        raise SpaceMismatch(f"{error}; correct the table, or resample the label to its image") from error


def _header(file: Path) -> tuple[Series, Space]:
    """What one file is and its grid, by its header."""
    series = discover(file).series
    if not series:
        raise UnreadableFile(
            file, "an image is needed, but this is neither DICOM nor NIfTI nor a photograph; correct the table"
        )
    if len(series) > 1:
        reason = f"one volume is needed, but the file holds {len(series)}; save the one that is meant alone"
        raise UnreadableSeries(file, "four-dimensional", reason)
    problem, space = series[0].problem, series[0].space
    if problem is not None or space is None:
        raise problem or AssertionError("a series has a space or a problem")
    return series[0], space
