"""What a user of a recipe sees last when it fails: MONAI's own runner, in a process of its own."""

import json
import subprocess
import sys

import pytest

RECIPE = {
    "initialize": [{"_target_": "medvit.terminal.end_with_cause"}],
    "cases": {"_target_": "medvit.data.listing.listed_images", "dataset_dir": "/no/such/folder", "sets": ["cxr"]},
    "mask": {"_target_": "medvit.pretrain.masking.BlockMask", "min_size": 0},
    "run": ["$len(@cases)"],
    "mask_alone": ["$@mask"],
}


def failed(tmp_path, entry):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(RECIPE))
    command = [sys.executable, "-W", "ignore", "-m", "monai.bundle", "run", entry, "--config_file", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    return done.stderr


@pytest.mark.slow
def test_missing_data_are_the_last_word_and_there_is_no_traceback(tmp_path):
    said = failed(tmp_path, "run")
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("medvit: /no/such/folder/cxr/cases.csv: no such table; dataset_dir must hold")
    assert last.endswith("docs/pretraining.md says how to get them")


@pytest.mark.slow
def test_the_cause_of_another_failure_comes_last(tmp_path):
    said = failed(tmp_path, "mask_alone")
    assert "Failed to instantiate component" in said
    last = said.strip().splitlines()[-1]
    assert last.startswith("medvit: the cause was ValueError: min_size must be at least 1")
