"""The benchmark of ingestion runs, agrees with MONAI and reports what it promises. Times are printed, never tested."""

import json
import sys
from pathlib import Path

import pytest


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs it; returns its JSON and what it printed."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
    import ingest

    def call(*arguments):
        output = tmp_path / "ingest.json"
        ingest.main([*map(str, arguments), "--repeats", "1", "--output", str(output)])
        return json.loads(output.read_text(encoding="utf-8")), capsys.readouterr().out

    call.module = ingest
    yield call
    for name in ("ingest", "measure"):
        sys.modules.pop(name, None)


@pytest.mark.upstream
def test_it_writes_what_it_measured(run):
    found, printed = run("--files", 205, "--slices", 3, "--size", 16)
    discovery, volume = found["discovery"], found["volume"]
    assert (discovery["files"], discovery["series"], volume["shape"]) == (205, 2, [16, 16, 3])
    ways = set(discovery["files_per_second"])
    assert {"medvit, 1 process", "medvit, 2 processes", "pydicom, headers only"} <= ways
    assert min(discovery["files_per_second"].values()) > 0
    assert set(discovery["peak_bytes"]) == {"medvit, 1 process", "medvit, 2 processes"}
    assert {"medvit", "medvit, discovered before", "MONAI PydicomReader"} <= set(volume["seconds"]["read"])
    assert "medvit convert, .nii.gz" in volume["seconds"]["convert"] and volume["max_difference"] == 0
    assert "| discovery of 205 files |" in printed and "| read | MONAI PydicomReader |" in printed


def test_its_headers_are_of_the_size_of_real_ones(run, tmp_path):
    run.module.synthesise(tmp_path / "x", 201, 8)
    ct, mr = (min((tmp_path / "x" / name).iterdir()) for name in ("series0000", "series0001"))
    assert 2_000 < ct.stat().st_size < 4_000 and 90_000 < mr.stat().st_size < 100_000
    import pydicom

    assert [len(pydicom.dcmread(path)) for path in (ct, mr)] == [78, 87]


@pytest.mark.upstream
def test_the_largest_series_of_a_folder_is_read(run, tmp_path):
    run.module.write_series(tmp_path / "in" / "a", "CT", 8, 2)
    run.module.write_series(tmp_path / "in" / "b", "MR", 8, 5)
    found, _ = run(tmp_path / "in")
    assert (found["discovery"]["files"], found["discovery"]["series"]) == (7, 2)
    assert found["volume"]["shape"] == [8, 8, 5] and found["volume"]["max_difference"] == 0


def test_a_folder_without_a_volume(run, tmp_path):
    with pytest.raises(SystemExit, match="needs a DICOM series that makes a volume, none was found"):
        run(tmp_path)
