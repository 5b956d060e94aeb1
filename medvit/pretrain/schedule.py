"""Numbers that change over a run: learning rate, weight decay, momentum of a teacher, temperatures.

A schedule is any callable from progress, 0 at the first step and 1 at the last, to a number. It keeps no state, so that
there is none to save: a resumed run reads the same values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, pi, sqrt

Schedule = Callable[[float], float]


def progress_of(step: int, steps: int) -> float:
    """Where step ``step`` (from 0) of a run of ``steps`` stands: 0 at the first, exactly 1 at the last."""
    return min(step / max(steps - 1, 1), 1.0)


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up from ``start`` to ``peak``, then half a cosine to ``final``; exact at these three points.

    Loshchilov & Hutter, "SGDR" (ICLR 2017), per step as MAE and DINOv2 have it. It may rise as well as fall: a
    teacher's momentum is ``Cosine(0.992, 1.0)``.

    Args:
        peak: value after the warm-up.
        final: value at the last step.
        warmup: fraction of the run, ``0 <= warmup < 1``; MAE's 40 of 800 epochs are 0.05.
        start: value at the first step, if there is a warm-up.

    Raises:
        ValueError: a warm-up that is no such fraction.
    """

    peak: float
    final: float = 0.0
    warmup: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be a fraction of the run, 0 <= warmup < 1, got {self.warmup}; use 0.05")

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        if progress < self.warmup:
            return self.start + (self.peak - self.start) * progress / self.warmup
        if progress >= 1:
            return self.final
        fallen = (1 - cos(pi * (progress - self.warmup) / (1 - self.warmup))) / 2
        return self.peak + (self.final - self.peak) * fallen


@dataclass(frozen=True)
class Linear:
    """From ``start`` in a straight line to ``final``, reached after the fraction ``until`` of the run, and kept.

    DINO's teacher temperature: ``Linear(0.04, 0.07, until=0.3)``.

    Raises:
        ValueError: ``until`` not in (0, 1].
    """

    start: float
    final: float
    until: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.until <= 1:
            raise ValueError(f"until must be a fraction of the run, 0 < until <= 1, got {self.until}; use 1")

    def __call__(self, progress: float) -> float:
        """The value at ``progress`` in [0, 1]."""
        if progress >= self.until:
            return self.final
        return self.start + (self.final - self.start) * progress / self.until


@dataclass(frozen=True)
class Constant:
    """The same value throughout."""

    value: float

    def __call__(self, progress: float) -> float:
        """The value."""
        return self.value


def as_schedule(value: float | Schedule) -> Schedule:
    """A schedule from a number, which then does not change, or from a schedule."""
    return value if callable(value) else Constant(float(value))


def sampled(schedule: Schedule) -> list[float]:
    """Its values at nine points of a run, which tell it from others."""
    return [float(schedule(i / 8)) for i in range(9)]


def scaled_rate(base: float, batch_size: int, *, reference: int = 256, rule: str = "linear") -> float:
    """Learning rate for a batch, from the rate published for a batch of ``reference``.

    Args:
        base: published rate.
        batch_size: images per optimizer step, over all processes and accumulated batches.
        reference: images per step that ``base`` speaks of: 256 for MAE, 1024 for DINOv2.
        rule: ``"linear"`` (Goyal et al. 2017; MAE) or ``"sqrt"`` (DINOv2).

    Raises:
        ValueError: another rule, or sizes below 1.
    """
    if rule not in ("linear", "sqrt"):
        raise ValueError(f"rule must be 'linear' or 'sqrt', got {rule!r}; MAE uses linear, DINOv2 sqrt")
    if min(batch_size, reference) < 1:
        raise ValueError(f"batch_size and reference must be at least 1, got {batch_size} and {reference}")
    ratio = batch_size / reference
    return base * (ratio if rule == "linear" else sqrt(ratio))
