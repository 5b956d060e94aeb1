import json
import logging
import math

import numpy as np
import torch
from matplotlib.image import imread

from medvit.pretrain.record import Record, memory_mb, tracked


def on_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def test_numbers_become_lines_of_json_that_any_reader_takes(tmp_path, caplog):
    caplog.set_level(logging.INFO, "medvit")
    record = Record(tmp_path / "run", 9, True)
    assert record.open(0) == 0
    record.write(3, {"loss": 1 / 3, "lost": math.nan, "far": -math.inf, "count": 2})
    assert lines(tmp_path / "run") == [{"step": 3, "loss": 0.333333, "lost": "nan", "far": "-inf", "count": 2}]
    assert "step 3 of 9: loss 0.3333" in caplog.text


def test_lines_after_the_state_and_one_that_was_cut_short_are_dropped(tmp_path):
    record = Record(tmp_path, 9, True)
    record.open(0)
    for step in (2, 4, 6):
        record.write(step, {})
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    assert record.open(4) == 4 and [line["step"] for line in lines(tmp_path)] == [2, 4]
    assert record.open(0) == 0 and lines(tmp_path) == []  # from the beginning


def test_speed_is_of_the_time_since_the_last_call(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 14.0, 18.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    record = Record(tmp_path, 9, False)
    record.open(0)
    record.advance(6)
    record.advance(2)
    assert record.speed() == 2.0 and record.speed() == 0.0


def test_other_processes_are_silent(tmp_path):
    record = Record(tmp_path / "run", 9, False)
    record.open(0)
    record.write(1, {"loss": 1.0})
    record.pictures(1, {"a": torch.zeros(2, 2)})
    record.close()
    assert not (tmp_path / "run").exists()


def test_pictures_are_cut_to_what_can_be_shown(tmp_path):
    Record(tmp_path, 9, True).pictures(7, {"a": torch.tensor([[-1.0, 0.5], [1.0, 2.0]])})
    grey = imread(tmp_path / "pictures/a-000000007.png")[..., 0]
    np.testing.assert_allclose(grey, [[0, 0.5], [1, 1]], atol=0.01)


def test_a_terminal_sees_how_far_the_run_is(tmp_path, monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    record = Record(tmp_path, 4, True)
    record.open(1)
    record.advance(1)
    record.write(2, {"loss": 0.25})
    record.close()
    out, said = capsys.readouterr()
    assert "50%" in said and "loss 0.25" in said and not out


def test_a_terminal_sees_how_far_a_loop_is(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    assert list(tracked(range(3), "embedding")) == [0, 1, 2]
    out, said = capsys.readouterr()
    assert "embedding" in said and "100%" in said and not out


def test_of_several_processes_the_first_one_shows_it(monkeypatch, capsys):
    on_a_terminal(monkeypatch)
    monkeypatch.setenv("RANK", "1")
    assert list(tracked(range(3), "embedding")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_pipe_sees_nothing_of_a_loop(capsys):
    assert list(tracked(range(3), "embedding")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_memory_is_that_of_the_process():
    assert 50 < memory_mb(torch.device("cpu")) < 1e6
