"""Images listed in a ``cases.csv`` with what the table says of each, for training on whole images."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medvit.errors import NothingFound


def listed_images(
    dataset_dir: str | Path,
    sets: Sequence[str] = (".",),
    *,
    splits: Sequence[str] = ("train",),
    where: Mapping[str, Sequence[str]] | None = None,
    label: str | None = None,
    classes: Mapping[str, Any] | None = None,
    separator: str | None = None,
    group: str | None = None,
) -> list[dict[str, Any]]:
    """Cases of one or several folders, in the tables' order.

    Args:
        dataset_dir: the folder of ``sets``.
        sets: folders in it, each with a ``cases.csv`` of the columns ``case_id``, ``image`` (path relative to the
            table), ``split``, and others.
        splits: values of ``split`` that are taken.
        where: by column, the values that are taken.
        label: column of the label; None: cases have none.
        classes: what its values become, e.g. ``{"bacteria": 0, "virus": 1}``; values not named are an error, leave them
            out by ``where``. None: numbers.
        separator: of several labels in one value, such as ``"|"`` in ``"Edema|Effusion"``; what ``classes`` names then
            are places in a row of 0 and 1, and None for what stands for no label, such as ``{"No Finding": None}``.
        group: column of what several cases may have in common, such as the patient; None: cases have none.

    Returns:
        ``{"image": path, "case": case_id}`` per case, and ``"label"`` and ``"group"``, if asked for.

    Raises:
        NothingFound: no table, column, case or file.
        ValueError: a label that ``classes`` does not name.
    """
    cases = []
    for folder in (Path(dataset_dir) / name for name in sets):
        needed = {"case_id", "image", "split", *(where or {}), *([label] if label else []), *([group] if group else [])}
        for row in _rows(folder / "cases.csv", needed):
            if row["split"] in splits and all(row[column] in values for column, values in (where or {}).items()):
                case: dict[str, Any] = {"image": str(folder / row["image"]), "case": row["case_id"]}
                case |= {"label": _label(row[label], classes, separator, f"{folder}: {label}")} if label else {}
                cases.append(case | ({"group": row[group]} if group else {}))
    if not cases:
        raise NothingFound(
            f"{dataset_dir}: no case in splits {list(splits)} of {', '.join(sets)}"
            + (f" with {dict(where)}" if where else "")
        )
    for case in cases:
        if not Path(case["image"]).is_file():
            raise NothingFound(
                f"{case['image']}: no such file, but its folder's cases.csv names it; fetch the set again"
            )
    return cases


def _rows(table: Path, needed: set[str]) -> list[dict[str, str]]:
    if not table.is_file():
        raise NothingFound(
            f"{table}: no such table; dataset_dir must hold the folders of the sets, each with a cases.csv of columns "
            f"{', '.join(sorted(needed))}, docs/pretraining.md says how to get them"
        )
    with table.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets put a byte order mark in front
        reader = csv.DictReader(file, restval="")
        rows = list(reader)
    if lacking := sorted(needed - set(reader.fieldnames or ())):
        raise NothingFound(
            f"{table}: lacks the columns {', '.join(lacking)}; it has {', '.join(reader.fieldnames or ())}"
        )
    return rows


def _label(value: str, classes: Mapping[str, Any] | None, separator: str | None, column: str) -> Any:
    if classes is None:
        return float(value)
    names = [value] if separator is None else value.split(separator)
    if unknown := [name for name in names if name not in classes]:
        raise ValueError(f"{column} {unknown[0]!r} is none of {sorted(classes)}; leave it out by `where`")
    if separator is None:
        return classes[value]
    places = {classes[name] for name in names}
    return [float(place in places) for place in sorted(number for number in classes.values() if number is not None)]
