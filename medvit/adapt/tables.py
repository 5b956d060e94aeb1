"""Tables with one row per case, as evaluation reads them: CSV with a header, nothing missing, nothing guessed.

| columns | what they are |
|---|---|
| ``case_id`` (or ``case``) | names of the cases, all different |
| ``label`` and ``score`` | two classes: 0 or 1, and a score that is higher for 1 |
| ``label`` and ``score_NAME`` ... | several classes: the label is one of the NAMEs |
| ``label_NAME`` and ``score_NAME`` ... | several labels: 0 or 1 for each NAME |
| ``group`` | optional: the patient, where several cases belong to one |
| ``split`` | optional: part of the data |
| others | numbers per case, such as Dice, or anything that is not asked for |
"""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medvit.adapt.metrics import Floats
from medvit.errors import UnreadableFile

CASE = ("case_id", "case")
LABEL, SCORE = "label_", "score_"


@dataclass(frozen=True)
class Predictions:
    """Labels and scores of N cases.

    Attributes:
        kind: ``"binary"``, ``"classes"`` or ``"labels"``.
        names: of the C classes or labels; of ``"binary"`` one empty name.
        labels: ``(N, C)``, 0 or 1; of ``"classes"`` one 1 per case.
        scores: ``(N, C)``.
    """

    kind: str
    names: tuple[str, ...]
    labels: NDArray[np.int64]
    scores: Floats


class Table:
    """Rows of a file, in its order; cells are checked when they are asked for.

    Args:
        path: of the file, for messages.
        columns: cells by column, without spaces around.
        lines: line of the file that each row ends on.

    Attributes:
        cases: names of the cases.
        groups: names of their groups, or None.

    Raises:
        UnreadableFile: no column of cases, no case, a case or group without a name, a case that comes twice.
    """

    def __init__(self, path: Path, columns: dict[str, list[str]], lines: list[int]):
        self.path, self.columns, self.lines = path, columns, lines
        named = [name for name in CASE if name in columns]
        if not named:
            raise UnreadableFile(path, f"needs a column case_id, has {', '.join(columns)}")
        if not lines:
            raise UnreadableFile(path, "holds no cases")
        self.cases = self._filled(named[0])
        if twice := [case for case, times in Counter(self.cases).items() if times > 1]:
            raise UnreadableFile(path, f"every case must come once, {some(twice)} come several times")
        self.groups = self._filled("group") if "group" in columns else None

    def splits(self) -> list[str]:
        """The parts of the data that rows belong to; none without a column ``split``."""
        return sorted(set(self._filled("split"))) if "split" in self.columns else []

    def take(self, rows: Sequence[int]) -> Table:
        """These rows, in this order."""
        columns = {name: [cells[i] for i in rows] for name, cells in self.columns.items()}
        return Table(self.path, columns, [self.lines[i] for i in rows])

    def of_split(self, split: str) -> Table:
        """The rows of one part of the data."""
        return self.take([i for i, name in enumerate(self._filled("split")) if name == split])

    def in_order_of(self, other: Table) -> Table:
        """The same cases in the order of another table, and columns of its names in its order.

        Raises:
            UnreadableFile: other cases, or other groups of them, or groups in one table only.
        """
        for mine, theirs, which in ((self, other, "lacks"), (other, self, "also holds")):
            held = set(mine.cases)
            if missing := [case for case in theirs.cases if case not in held]:
                raise UnreadableFile(
                    self.path, f"must hold the cases of {other.path}; it {which} {some(missing)}, {len(missing)} in all"
                )
        place = {case: i for i, case in enumerate(self.cases)}
        columns = {name: self.columns[name] for name in [*other.columns, *self.columns] if name in self.columns}
        table = Table(self.path, columns, self.lines).take([place[case] for case in other.cases])
        if table.groups != other.groups:
            raise UnreadableFile(self.path, f"must have the groups of {other.path}; {_differing(table, other)}")
        return table

    def numbers(self, column: str) -> Floats:
        """A column of finite numbers, ``(N,)``.

        Raises:
            UnreadableFile: no such column, or a cell that is empty, no number, NaN or infinite; names its line.
        """
        values = np.empty(len(self.lines))
        for i, cell in enumerate(self._column(column)):
            try:
                values[i] = float(cell)
            except ValueError:
                values[i] = math.nan
            if not math.isfinite(values[i]):
                raise UnreadableFile(
                    self.path,
                    f"line {self.lines[i]}: {column} of case {self.cases[i]} must be a finite number, got {cell!r}; "
                    "fill it, or leave the case out of every table",
                )
        return values

    def predictions(self) -> Predictions | None:
        """Labels and scores, or None if the table has no labels.

        Raises:
            UnreadableFile: labels without scores, cells that are no labels or scores, both ways of naming labels.
        """
        several = [c.removeprefix(LABEL) for c in self.columns if c.startswith(LABEL)]
        scored = [c.removeprefix(SCORE) for c in self.columns if c.startswith(SCORE)]
        if "label" not in self.columns:
            return self._one_by_one("labels", several, LABEL, SCORE) if several else None
        if several:
            raise UnreadableFile(self.path, f"needs either label or {LABEL}NAME, has both")
        if "score" in self.columns:
            return self._one_by_one("binary", [""], "label", "score")
        if len(scored) < 2:
            raise UnreadableFile(self.path, f"needs score, or {SCORE}NAME for every class, beside label")
        classes = {name: i for i, name in enumerate(scored)}
        cells = self._filled("label")
        for i, cell in enumerate(cells):
            if cell not in classes:
                where = f"line {self.lines[i]}: label of case {self.cases[i]}"
                raise UnreadableFile(self.path, f"{where} must be one of {', '.join(scored)}, got {cell!r}")
        labels = np.eye(len(scored), dtype=np.int64)[[classes[cell] for cell in cells]]
        return Predictions("classes", tuple(scored), labels, np.stack([self.numbers(SCORE + n) for n in scored], 1))

    def _one_by_one(self, kind: str, names: list[str], label: str, score: str) -> Predictions:
        scores = np.stack([self.numbers(score + name) for name in names], 1)
        return Predictions(kind, tuple(names), np.stack([self._binary(label + name) for name in names], 1), scores)

    def _binary(self, column: str) -> NDArray[np.int64]:
        values = self.numbers(column)
        for i in np.flatnonzero((values != 0) & (values != 1))[:1]:
            where = f"line {self.lines[i]}: {column} of case {self.cases[i]}"
            raise UnreadableFile(self.path, f"{where} must be 0 or 1, got {self.columns[column][i]!r}")
        return values.astype(np.int64)

    def _filled(self, column: str) -> list[str]:
        cells = self._column(column)
        if "" in cells:
            raise UnreadableFile(self.path, f"line {self.lines[cells.index('')]}: {column} must not be empty")
        return cells

    def _column(self, name: str) -> list[str]:
        if name not in self.columns:
            raise UnreadableFile(self.path, f"needs a column {name}, has {', '.join(self.columns)}")
        return self.columns[name]


def read_table(path: str | Path) -> Table:
    """Read a CSV file in UTF-8.

    Raises:
        UnreadableFile: no such file, not CSV, rows longer or shorter than the header; see :class:`Table`.
    """
    path = Path(path)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip() for name in next(reader, [])]
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UnreadableFile(path, f"not readable as a table ({error})") from error
    if len(set(header)) < len(header) or not header:
        raise UnreadableFile(path, f"needs a header of different names, got {some(header) or 'nothing'}")
    for line, row in rows:
        if len(row) != len(header):
            raise UnreadableFile(path, f"line {line}: needs {len(header)} cells as the header has, got {len(row)}")
    columns = {name: [row[i] for _, row in rows] for i, name in enumerate(header)}
    return Table(path, columns, [line for line, _ in rows])


def check_same_labels(table: Table, other: Table, ours: Predictions, theirs: Predictions) -> None:
    """Refuse two tables of the same cases that do not agree about the truth.

    Raises:
        UnreadableFile: other classes, or another label of a case.
    """
    if (ours.kind, ours.names) != (theirs.kind, theirs.names):
        raise UnreadableFile(
            other.path, f"must have the labels of {table.path}: {some(ours.names)}; it has {some(theirs.names)}"
        )
    for i in np.flatnonzero((ours.labels != theirs.labels).any(axis=1))[:1]:
        raise UnreadableFile(other.path, f"must have the labels of {table.path}; that of case {table.cases[i]} differs")


def some(names: Sequence[Any], most: int = 5) -> str:
    """The first of many names."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")


def _differing(table: Table, other: Table) -> str:
    if table.groups is None or other.groups is None:
        return "only one of them has a column group"
    triples = zip(table.cases, table.groups, other.groups, strict=True)
    return next(f"that of case {case} is {a!r} here, {b!r} there" for case, a, b in triples if a != b)
