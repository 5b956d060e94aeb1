"""Sizes of all structures as tables: one CSV for spreadsheets, one JSON for programs."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvit.writers.base import atomic

COLUMNS = ("case", "label", "structure", "voxels", "volume_mm3")
PHOTOGRAPHS = ("area_px", "fraction")  # further columns of a table with photographs in it


def write_volumes(rows: Sequence[Mapping[str, Any]], folder: Path, *, overwrite: bool = False) -> tuple[Path, Path]:
    """Write ``volumes.csv`` and ``volumes.json`` (a list of objects) into ``folder``; equal rows give equal bytes.

    Args:
        rows: one per case and structure with exactly the keys of :data:`COLUMNS`, or these and :data:`PHOTOGRAPHS`, as
            :meth:`LabelMap.volumes` gives them plus ``case``; their order is kept. None is an empty cell of the CSV, as
            is what a row lacks. No rows leave a CSV with its header and an empty list.
        folder: created if needed.
        overwrite: replace existing files.

    Returns:
        The paths of the CSV and of the JSON file.

    Raises:
        OutputError: a file cannot be written, or exists and ``overwrite`` is False.
        ValueError: a row with other keys.
    """
    every = (*COLUMNS, *PHOTOGRAPHS)
    for number, row in enumerate(rows):
        if set(row) not in (set(COLUMNS), set(every)):
            raise ValueError(f"row {number} of the table of volumes needs the keys {list(COLUMNS)}, got {sorted(row)}")
    ordered = [{column: row[column] for column in every if column in row} for row in rows]
    columns = every if any(len(row) == len(every) for row in rows) else COLUMNS
    as_csv, as_json = folder / "volumes.csv", folder / "volumes.json"
    with (
        atomic(as_csv, overwrite=overwrite) as part,
        part.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        table = csv.DictWriter(file, columns, lineterminator="\n")
        table.writeheader()
        table.writerows(ordered)
    with atomic(as_json, overwrite=overwrite) as part:
        text = json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"
        part.write_text(text, encoding="utf-8", errors="backslashreplace")  # bytes of a file name that are no UTF-8
    return as_csv, as_json
