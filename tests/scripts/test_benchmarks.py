"""The benchmarks run, agree with MONAI and report what they promise. Times are printed, never tested."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "scripts" / "benchmarks"


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the scripts first on the path, as when one of them is run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for name in ("measure", "swin_unetr"):
        sys.modules.pop(name, None)


# --- measure


def test_functions_are_timed_in_turn_and_the_order_turns_round(scripts):
    from measure import interleaved

    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: (calls.append("b"), time.sleep(0.01))}, 3)
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3}
    assert min(seconds["b"]) >= 0.01


def test_no_repetition_is_refused(scripts):
    from measure import interleaved

    with pytest.raises(ValueError, match=r"^repeats must be at least 1, got 0; use 5$"):
        interleaved({}, 0)


def test_peak_memory_is_what_was_held_at_once(scripts):
    from measure import peak_memory

    megabyte = 1 << 20

    def one_after_the_other():
        for _ in range(3):
            torch.empty(megabyte, dtype=torch.uint8)

    def together():
        return [torch.empty(megabyte, dtype=torch.uint8) for _ in range(3)]

    assert peak_memory(one_after_the_other) == megabyte
    assert peak_memory(together) == 3 * megabyte


def test_the_environment_says_what_was_measured_on(scripts):
    from measure import environment

    found = environment()
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    assert {"monai", "medvit", "triton", "python", "commit"} < found.keys()


# --- Swin UNETR


SMALL = ["--spatial-dims", "2", "--size", "64", "--feature-size", "12", "--classes", "2", "--threads", "1"]


@pytest.mark.upstream
def test_the_swin_unetr_benchmark_writes_what_it_measured(scripts, tmp_path, capsys):
    from swin_unetr import main

    output = tmp_path / "swin_unetr.json"
    main([*SMALL, "--repeats", "1", "--modes", "forward", "bf16", "train", "--output", str(output)])
    found = json.loads(output.read_text())
    assert found["options"]["size"] == 64
    rows = {row["mode"]: row for row in found["rows"]}
    assert list(rows) == ["forward", "bf16", "train"]
    assert list(rows["forward"]["seconds"]) == ["monai plain", "monai", "medvit"]
    assert rows["forward"]["agreement"]["medvit"]["max_abs_diff"] < 1e-3
    assert list(rows["bf16"]["seconds"]) == ["monai", "monai bf16", "medvit bf16"]
    assert rows["bf16"]["agreement"]["medvit bf16"]["argmax_agreement"] > 0.9
    assert min(rows["train"]["peak_bytes"].values()) > 1_000_000
    assert "medvit bf16" in capsys.readouterr().out


@pytest.mark.upstream
def test_networks_that_disagree_are_not_timed(scripts, monkeypatch):
    import swin_unetr

    monkeypatch.setattr(swin_unetr, "TOLERANCE", 0.0)
    with pytest.raises(RuntimeError, match=r"logits differ from MONAI's by .*, more than 0$"):
        swin_unetr.main([*SMALL, "--modes", "forward"])
