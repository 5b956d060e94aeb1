"""The probing script, on made-up images that random features tell apart."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]


@pytest.mark.filterwarnings("ignore")  # of MONAI, which warns about readers that are not installed
def test_it_judges_frozen_features(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from probe import main

    folder = tmp_path / "cxr_pneumonia224"
    folder.mkdir()
    rng, rows = np.random.default_rng(0), ["case_id,image,split,subtype"]
    for i in range(48):
        pixels = rng.integers(0, 128, (70, 80), dtype=np.uint8)
        if i % 2:
            pixels[:, :40] += 100
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(f"c{i},{i}.png,{'val' if i >= 36 else 'train'},{('bacteria', 'virus')[i % 2]}")
    (folder / "cases.csv").write_text("\n".join(rows) + "\n")
    table = tmp_path / "probe.csv"
    recipe = ROOT / "configs/finetune/cxr_viral.json"
    main([str(recipe), str(tmp_path), "--shots", "4", "--output", str(table)])
    sys.modules.pop("probe", None)
    printed = capsys.readouterr().out
    assert "36 training and 12 validation cases, 192 dimensions" in printed
    assert "linear probe 1.0000" in printed
    with table.open() as file:
        found = list(csv.DictReader(file))
    assert [row["case"] for row in found] == [f"c{i}" for i in range(36, 48)]
    assert all((float(row["score"]) > 0.5) == (row["label"] == "1") for row in found)
