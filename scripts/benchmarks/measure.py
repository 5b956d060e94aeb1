"""How the benchmarks measure: interleaved repetitions, peak memory, and what the numbers were taken on."""

from __future__ import annotations

import gc
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Function = Callable[[], object]


def interleaved(functions: dict[str, Function], repeats: int, device: str = "cpu") -> dict[str, list[float]]:
    """Seconds of each function, ``repeats`` times, all of them in turn: whatever disturbs the machine, disturbs all.

    Every function runs once before, unmeasured; the order turns round with every repetition. On a CUDA device the
    seconds are between two events of its stream, else on the wall.

    Raises:
        ValueError: ``repeats`` below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}; use 5")
    clock = _cuda_seconds if torch.device(device).type == "cuda" else _wall_seconds
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats):
        for name in list(functions)[:: -1 if turn % 2 else 1]:
            seconds[name].append(clock(functions[name]))
    return seconds


def peak_memory(function: Function, device: str = "cpu") -> int:
    """Most bytes torch held at once during ``function()``, beyond what it held before.

    On a CUDA device by the allocator's own count; on a CPU from the allocations torch's profiler saw, so what other
    libraries take for themselves is not in it.
    """
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        function()
    # the profiler's tables leave out allocations inside an operator, its raw events have all of them
    results = seen.profiler.kineto_results if seen.profiler else None
    events = [e for e in results.events() if e.name() == "[memory]"] if results else []
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def environment(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, threads and commit (``+`` where the checkout has changes), for a benchmark's JSON."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{package: _version(package) for package in ("triton", "monai", "medvit")},
        "commit": _commit(),
    }


def _wall_seconds(function: Function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Function) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
