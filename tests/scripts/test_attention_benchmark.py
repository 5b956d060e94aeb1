"""The benchmark of attention runs, agrees with MONAI and reports what it promises. Times are printed, never tested."""

import json
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.upstream
def test_it_writes_what_it_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts" / "benchmarks"))
    threads = torch.get_num_threads()
    from attention import main

    output = tmp_path / "attention.json"
    main(["--size", "32", "--feature-size", "12", "--repeats", "1", "--threads", "1", "--output", str(output)])
    torch.set_num_threads(threads)
    for name in ("attention", "measure"):
        sys.modules.pop(name, None)
    found = json.loads(output.read_text(encoding="utf-8"))
    assert [(row["grid"], row["part"], row["mode"]) for row in found["rows"]] == [
        (grid, part, mode) for grid in (16, 8, 4, 2) for part in ("attention", "block") for mode in ("forward", "train")
    ]
    assert max(row["max_difference"] for row in found["rows"]) < 1e-5
    assert found["rows"][1]["peak_bytes"]["medvit"] < found["rows"][1]["peak_bytes"]["monai"]
    assert found["backends"]["dense"] != "chosen"
    assert "| 16³ | 12 | attention | train |" in capsys.readouterr().out
