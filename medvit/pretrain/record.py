"""What a run tells while it goes on: JSON lines, a line on the terminal, pictures."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger("medvit")
T = TypeVar("T")


class Record:
    """``log.jsonl`` in a folder and a progress line; silent in every process but the first.

    Args:
        folder: of the run.
        steps: of the whole run.
        active: whether this process writes.
    """

    def __init__(self, folder: str | Path, steps: int, active: bool):
        self.folder, self.steps, self.active = Path(folder), steps, active
        self._since, self._seen = time.perf_counter(), 0
        self._bar: Any = None

    def open(self, step: int) -> int:
        """Begin at ``step``: lines of later steps, from a run that was killed before it saved, are dropped.

        Returns:
            The step of the last line that stays, 0 if there is none.
        """
        self._since = time.perf_counter()
        if not self.active:
            return 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        kept = [line for line in lines if _step_of(line) <= step]
        part = path.with_suffix(".part")
        part.write_text("".join(f"{line}\n" for line in kept) if step else "", encoding="utf-8")
        part.replace(path)
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

            said = (TextColumn("{task.fields[said]}"), TimeElapsedColumn(), TimeRemainingColumn())
            columns = (*Progress.get_default_columns()[:3], *said)
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task("train", total=self.steps, completed=step, said="")
        return int(_step_of(kept[-1])) if kept and step else 0

    def advance(self, images: int) -> None:
        """A step over ``images`` images is done."""
        self._seen += images
        if self._bar is not None:
            self._bar.update(self._task, advance=1)

    def speed(self) -> float:
        """Images per second since the last call."""
        now = time.perf_counter()
        rate = self._seen / max(now - self._since, 1e-9)
        self._since, self._seen = now, 0
        return rate

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """One line of JSON; numbers that are not finite become text, as JSON has none."""
        if not self.active:
            return
        line = {"step": step, **{key: _json(value) for key, value in values.items()}}
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        said = "  ".join(f"{key} {value:.4g}" for key, value in line.items() if isinstance(value, float))
        if self._bar is not None:
            self._bar.update(self._task, said=said[:100])
        else:
            logger.info("step %d of %d: %s", step, self.steps, said)

    def pictures(self, step: int, pictures: Mapping[str, Tensor]) -> None:
        """Save each of ``pictures``, ``(rows, columns)`` or ``(rows, columns, 3)`` in [0, 1], as a PNG."""
        if not self.active or not pictures:
            return
        from matplotlib.image import imsave

        folder = self.folder / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            values = picture.detach().float().clamp(0, 1).cpu().numpy()
            imsave(folder / f"{name}-{step:09d}.png", values, cmap="gray", vmin=0, vmax=1)

    def close(self) -> None:
        """Free the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def tracked(items: Sequence[T], what: str) -> Iterator[T]:
    """The items in turn; on a terminal, and of the first process, with a bar on standard error that says ``what``."""
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":  # torchrun's; the group is not open yet
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, console=Console(stderr=True), transient=True)


def memory_mb(device: torch.device) -> float:
    """The most memory used so far: of the device, or of the process on a CPU; MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # a line cut short by a kill
        return float("inf")


def _json(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if abs(value) < float("inf") else str(value)
    return value
