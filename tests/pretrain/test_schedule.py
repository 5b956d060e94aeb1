import math

import numpy as np
import pytest

from medvit.pretrain.schedule import Constant, Cosine, Linear, as_schedule, progress_of, scaled_rate


def test_cosine_equals_the_published_formula():
    """MAE's lr_sched.adjust_learning_rate, with the epoch as a real number; here the last step is the end."""
    steps, warm, peak, final = 1001, 50, 1.5e-3, 1e-5
    schedule = Cosine(peak, final, warmup=warm / (steps - 1))
    for step in range(steps):
        if step < warm:
            expected = peak * step / warm
        else:
            expected = final + (peak - final) * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - 1 - warm)))
        assert schedule(progress_of(step, steps)) == pytest.approx(expected, rel=1e-12, abs=1e-18)


def test_ends_are_exact():
    schedule = Cosine(0.1, 0.003, warmup=0.25, start=0.007)
    assert (schedule(0.0), schedule(0.25), schedule(1.0)) == (0.007, 0.1, 0.003)
    assert (Cosine(0.992, 1.0)(0.0), Cosine(0.992, 1.0)(1.0)) == (0.992, 1.0)
    line = Linear(0.04, 0.07, until=0.3)
    assert (line(0.0), line(0.3), line(1.0)) == (0.04, 0.07, 0.07)
    assert line(0.15) == pytest.approx(0.055)


def test_it_rises_and_falls_without_a_step_back():
    values = [Cosine(1.0, 0.1, warmup=0.2)(p) for p in np.linspace(0, 1, 501)]
    top = int(np.argmax(values))
    assert top == 100
    assert (np.diff(values[: top + 1]) > 0).all() and (np.diff(values[top:]) < 0).all()


def test_numbers_are_schedules():
    assert as_schedule(0.3)(0.7) == Constant(0.3)(0.0) == 0.3
    schedule = Cosine(1.0)
    assert as_schedule(schedule) is schedule


def test_rates_scale_with_the_batch():
    assert scaled_rate(1.5e-4, 2048) == pytest.approx(1.2e-3)  # of medical_mae
    assert scaled_rate(4e-3, 64, reference=1024, rule="sqrt") == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Cosine(1.0, warmup=1.0), "0 <= warmup < 1, got 1.0"),
        (lambda: Cosine(1.0, warmup=-0.1), "got -0.1; use 0.05"),
        (lambda: Linear(0, 1, until=0), "0 < until <= 1, got 0"),
        (lambda: scaled_rate(1.0, 8, rule="cubic"), "'linear' or 'sqrt', got 'cubic'"),
        (lambda: scaled_rate(1.0, 0), "at least 1, got 0 and 256"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
