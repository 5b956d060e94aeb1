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


AREAS = [
    {"case": "eye", "label": 1, "structure": "vessel", "voxels": 9, "volume_mm3": None, "area_px": 9, "fraction": 0.25}
]


def test_photographs_have_areas_in_further_columns(tmp_path):
    as_csv, as_json = write_volumes(AREAS, tmp_path)
    assert as_csv.read_text() == ("case,label,structure,voxels,volume_mm3,area_px,fraction\neye,1,vessel,9,,9,0.25\n")
    assert json.loads(as_json.read_text()) == AREAS


def test_volumes_beside_photographs_have_empty_cells(tmp_path):
    as_csv, as_json = write_volumes([ROWS[1], *AREAS], tmp_path)
    assert as_csv.read_text(encoding="utf-8").splitlines()[1:] == [
        "a,2,hintere Hälfte,0,0.0,,",
        "eye,1,vessel,9,,9,0.25",
    ]
    assert json.loads(as_json.read_text(encoding="utf-8")) == [ROWS[1], *AREAS]


def test_half_of_the_further_columns_is_refused(tmp_path):
    with pytest.raises(ValueError, match="row 0 of the table of volumes needs the keys"):
        write_volumes([{key: value for key, value in AREAS[0].items() if key != "fraction"}], tmp_path)
