import csv
import json

import pytest

from medvit.errors import OutputError
from medvit.writers.table import write_volumes

ROWS = [
    {"case": "b/twin", "label": 1, "structure": "anterior, left", "voxels": 10, "volume_mm3": 12.345},
    {"case": "a", "structure": "hintere Hälfte", "label": 2, "voxels": 0, "volume_mm3": 0.0},
]


def test_both_tables_hold_the_rows_in_their_order(tmp_path):
    as_csv, as_json = write_volumes(ROWS, tmp_path / "new")
    assert as_csv.read_bytes().decode() == (
        'case,label,structure,voxels,volume_mm3\nb/twin,1,"anterior, left",10,12.345\na,2,hintere Hälfte,0,0.0\n'
    )
    assert json.loads(as_json.read_text(encoding="utf-8")) == ROWS
    assert sorted(p.name for p in as_csv.parent.iterdir()) == ["volumes.csv", "volumes.json"]


def test_no_rows_leave_a_header(tmp_path):
    as_csv, as_json = write_volumes([], tmp_path)
    assert list(csv.reader(as_csv.read_text().splitlines())) == [["case", "label", "structure", "voxels", "volume_mm3"]]
    assert json.loads(as_json.read_text()) == []


def test_a_row_with_other_keys_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 of the table of volumes needs the keys .*, got \['case'\]"):
        write_volumes([ROWS[0], {"case": "x"}], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_tables_are_kept_unless_asked(tmp_path):
    write_volumes(ROWS, tmp_path)
    with pytest.raises(OutputError, match=r"volumes\.csv: exists already"):
        write_volumes([], tmp_path)
    assert json.loads((tmp_path / "volumes.json").read_text()) == ROWS
    write_volumes(ROWS[:1], tmp_path, overwrite=True)
    assert json.loads((tmp_path / "volumes.json").read_text()) == ROWS[:1]
