"""One function over many items: by several processes where there are thousands, with results in the items' order.

The processes are plain children that talk through pipes. Unlike those of ``multiprocessing`` they need no ``__main__``
guard, work in notebooks, and copy no threads and locks of a process that runs torch.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from typing import IO, TypeVar

ENOUGH = 2048  # items for which processes pay, which take half a second to start
_CHUNK = 64  # items of one request
_MOST = 8  # processes; disks are hardly faster for more
_SIZE = struct.Struct("<Q")  # bytes that follow
_SCRIPT = "import sys; sys.path[:] = {path!r}; from medvit.data.workers import serve; serve()"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Workers:
    """Processes that start when they pay, and end with the ``with`` block.

    Args:
        processes: how many. 1: this process does everything itself. None: one for each processor that it may use, at
            most 8; none in children of ``multiprocessing``, like those of a ``DataLoader``.
    """

    def __init__(self, processes: int | None = None):
        self._count = _affordable() if processes is None else processes
        self._started: list[_Process] = []
        self._idle: queue.SimpleQueue[_Process | None] = queue.SimpleQueue()
        self._threads: ThreadPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._started:
            process.kill()
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)
        for process in self._started:
            process.close()

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[tuple[_Item, _Result]]:
        """Every item with its result, in order. Items are taken as they are needed, and few are under way at a time.

        What a process cannot do, since it does not start, ends, or meets an exception, is done here.

        Args:
            function: of a module, where processes find it by its name, as they do the types of items and results.
            items: any number.

        Raises:
            Exception: what the function raises.
        """
        items = iter(items)
        first = list(islice(items, ENOUGH)) if self._count > 1 else []
        items = chain(first, items)
        if len(first) < ENOUGH:
            yield from ((item, function(item)) for item in items)
            return
        threads = self._start()
        ready = threads.submit(self._ask, pickle.dumps((function, [])))
        for item in items:
            yield item, function(item)
            if ready.done():
                break
        under_way: deque[tuple[list[_Item], Future[bytes]]] = deque()
        while True:
            while len(under_way) < 2 * self._count and (chunk := list(islice(items, _CHUNK))):
                under_way.append((chunk, threads.submit(self._ask, pickle.dumps((function, chunk)))))
            if not under_way:
                return
            chunk, future = under_way.popleft()
            answer = future.result()
            yield from zip(chunk, pickle.loads(answer) if answer else map(function, chunk), strict=True)

    def _start(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self._count, "medvit-workers")
            for _ in range(self._count):
                try:
                    self._started.append(_Process())
                    self._idle.put(self._started[-1])
                except OSError:
                    self._idle.put(None)
        return self._threads

    def _ask(self, request: bytes) -> bytes:
        """The answer of an idle process; empty where there is none."""
        process = self._idle.get()
        try:
            return process.ask(request) if process else b""
        except (OSError, EOFError):
            process = None
            return b""
        finally:
            self._idle.put(process)


class _Process:
    """A process that runs :func:`serve`."""

    def __init__(self) -> None:
        command = [sys.executable, "-W", "ignore", "-c", _SCRIPT.format(path=sys.path)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

    def ask(self, request: bytes) -> bytes:
        """Raises OSError or EOFError where it has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        _send(self._process.stdin, request)
        return _receive(self._process.stdout)

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        self._process.communicate()  # waits for it, and closes the pipes


def serve() -> None:
    """Answer requests on standard input until it ends; for a process of its own."""
    answers: IO[bytes] = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints must not mix with the answers
    while True:
        try:
            request = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            function, chunk = pickle.loads(request)
            answer = pickle.dumps([function(item) for item in chunk])
        except Exception:  # met again, and raised, where the items are done again
            answer = b""
        _send(answers, answer)


def _send(pipe: IO[bytes], data: bytes) -> None:
    pipe.write(_SIZE.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    size = pipe.read(_SIZE.size)
    data = pipe.read(_SIZE.unpack(size)[0]) if len(size) == _SIZE.size else b""
    if len(size) < _SIZE.size or len(data) < _SIZE.unpack(size)[0]:
        raise EOFError
    return data


def _affordable() -> int:
    if multiprocessing.parent_process() is not None:
        return 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(allowed or 1, _MOST)
