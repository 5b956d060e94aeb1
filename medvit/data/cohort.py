"""Labelled cohorts: a ``cases.csv`` beside its images, with one row per case and a fixed split."""

from __future__ import annotations

import csv
from pathlib import Path

from medvit.data.space import Space
from medvit.data.study import discover
from medvit.errors import NothingFound, SpaceMismatch, UnreadableFile

_COLUMNS = ("case_id", "image", "label", "split")


def labelled_cases(dataset_dir: str | Path, split: str) -> list[dict[str, str]]:
    """Cases of one split, for a MONAI ``Dataset``.

    Args:
        dataset_dir: folder with ``cases.csv``; its ``image`` and ``label`` columns are paths relative to that folder.
        split: value of the ``split`` column, e.g. ``"train"`` or ``"val"``.

    Returns:
        ``{"image": path, "label": path, "case": case_id}`` per case, in the order of the table.

    Raises:
        NothingFound: no table, a column that lacks, no case in that split, or a file of one that is not there.
        SpaceMismatch: an image and its label that, by their headers, do not lie on one voxel grid.
        UnreadableFile, UnreadableSeries: an image or label that cannot be used.
    """
    table = Path(dataset_dir) / "cases.csv"
    if not table.is_file():
        raise NothingFound(
            f"{table}: no such table; dataset_dir must hold a cases.csv with columns {', '.join(_COLUMNS)}"
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
    if lacking := [column for column in _COLUMNS if column not in (reader.fieldnames or ())]:
        raise NothingFound(f"{table}: lacks the columns {', '.join(lacking)}; it must have {', '.join(_COLUMNS)}")
    chosen = [row for row in rows if row["split"] == split]
    if not chosen:
        found = ", ".join(sorted({repr(row["split"]) for row in rows})) or "no rows"
        raise NothingFound(f"{table}: no case in split {split!r}; the table has {found}")
    folder = table.parent
    for row in chosen:
        for column in ("image", "label"):
            if not (folder / row[column]).is_file():
                raise NothingFound(
                    f"{folder / row[column]}: no such file, but {table} names it as {column} of {row['case_id']}"
                )
        try:
            what = f"{table}: image and label of {row['case_id']}"
            _space(folder / row["image"]).require_same(_space(folder / row["label"]), what=what)
        except SpaceMismatch as error:
            raise SpaceMismatch(f"{error}; correct the table, or resample the label to its image") from error
    return [
        {"image": str(folder / row["image"]), "label": str(folder / row["label"]), "case": row["case_id"]}
        for row in chosen
    ]


def _space(file: Path) -> Space:
    """The grid of one file, from its header."""
    series = discover(file).series
    if not series:
        raise UnreadableFile(file, "an image is needed, but this is neither DICOM nor NIfTI; correct the table")
    problem, space = series[0].problem, series[0].space
    if problem is not None or space is None:
        raise problem or AssertionError("a series has a space or a problem")
    return space
