"""Processes change how long it takes and nothing else. What they evaluate are texts, so that they need no module."""

import multiprocessing
import os
import time
from itertools import count

import pytest

from medvit.data import workers
from medvit.data.workers import Workers

WHERE = "__import__('os').getpid()"


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(workers, "ENOUGH", 10)
    monkeypatch.setattr(workers, "_CHUNK", 4)


def slowly(items, here=60):
    """Items that come slowly until the processes have started."""
    for number, item in enumerate(items):
        if number < here:
            time.sleep(0.03)
        yield item


def test_few_items_are_done_here():
    with Workers(2) as pool:
        assert list(pool.map(eval, [WHERE] * 9)) == [(WHERE, os.getpid())] * 9
        assert pool._started == []
    with Workers(1) as pool:
        assert {where for _, where in pool.map(eval, [WHERE] * 30)} == {os.getpid()}


def test_results_come_in_order_from_several_processes():
    items = [f"({n}, {WHERE})" for n in range(200)]
    with Workers(2) as pool:
        found = list(pool.map(eval, slowly(items)))
        assert [process._process.poll() for process in pool._started] == [None, None]
    assert [item for item, _ in found] == items and [number for _, (number, _) in found] == list(range(200))
    assert len({where for _, (_, where) in found}) == 3 and found[-1][1][1] != os.getpid()
    assert all(process._process.returncode is not None for process in pool._started)


def test_few_items_are_under_way_at_a_time():
    taken = count()

    def items():
        while True:
            next(taken)
            time.sleep(0.002)
            yield "1"

    with Workers(2) as pool:
        found = pool.map(eval, items())
        for _ in range(500):
            next(found)
        assert next(taken) - 500 <= 4 * 4 + 10
        found.close()


def test_exceptions_are_those_of_one_process():
    items = ["1"] * 100 + ["1 / 0"] + ["1"] * 100
    done = []
    with pytest.raises(ZeroDivisionError), Workers(2) as pool:
        done.extend(pool.map(eval, slowly(items)))
    assert len(done) == 100 or done == []
    with Workers(2) as pool:
        found = pool.map(eval, slowly(items))
        for _ in range(100):
            next(found)
        with pytest.raises(ZeroDivisionError):
            next(found)


def test_what_a_process_cannot_do_is_done_here():
    crash = f"{WHERE} == {os.getpid()} or __import__('os')._exit(1)"
    unknown = "(lambda: 1)() if 0 else (lambda: 1)"  # a result that cannot be sent
    items = ["1"] * 80 + [crash] * 20 + [unknown] + ["1"] * 50
    with Workers(2) as pool:
        found = [value for _, value in pool.map(eval, slowly(items))]
    assert found[:100] == [1] * 80 + [True] * 20 and found[100]() == 1 and found[101:] == [1] * 50


def test_processes_that_do_not_start(monkeypatch):
    monkeypatch.setattr(workers.sys, "executable", "/no/such/python")
    with Workers(2) as pool:
        assert [value for _, value in pool.map(eval, ["1 + 1"] * 50)] == [2] * 50
    monkeypatch.undo()
    monkeypatch.setattr(workers, "ENOUGH", 10)
    monkeypatch.setattr(workers, "_SCRIPT", "raise SystemExit(1) # {path}")
    with Workers(2) as pool:
        assert [value for _, value in pool.map(eval, slowly(["1 + 1"] * 50, 5))] == [2] * 50


def test_what_functions_print_does_not_mix_with_answers():
    items = ["print('noise')"] * 150
    with Workers(2) as pool:
        found = pool.map(eval, slowly(items))
        assert [value for _, value in found] == [None] * 150


def test_several_maps_share_the_processes():
    with Workers(2) as pool:
        outer = pool.map(eval, slowly(["1"] * 120))
        head = [next(outer) for _ in range(90)]
        inner = list(pool.map(eval, ["2"] * 60))
        tail = list(outer)
        assert len(pool._started) == 2
    assert head + tail == [("1", 1)] * 120 and inner == [("2", 2)] * 60


def test_an_interrupt_ends_the_processes():
    with pytest.raises(KeyboardInterrupt), Workers(2) as pool:
        for number, _ in enumerate(pool.map(eval, slowly([WHERE] * 300))):
            if number == 150:
                raise KeyboardInterrupt
    assert all(process._process.returncode is not None for process in pool._started) and pool._started


def test_children_of_multiprocessing_do_it_themselves(monkeypatch):
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: set(range(32)), raising=False)
    assert workers._affordable() == 8 and Workers()._count == 8
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: object())
    assert workers._affordable() == 1
