import math

import numpy as np
import pytest

from onnxqt.trim.schedule import Schedule

DEFAULT = Schedule(steps=20_000)
OTHER = Schedule(steps=20_000, warmup=0.25, bend=0.5, full=0.625, knee=0.5)
PEAK = 0.125

both = pytest.mark.parametrize("schedule", [DEFAULT, OTHER], ids=["default", "other"])


def blends(schedule: Schedule) -> list[float]:
    return [schedule.blend(step) for step in range(schedule.steps)]


def at(schedule: Schedule, fraction: float) -> float:
    return schedule.blend(round(fraction * schedule.steps))


@both
def test_float_in_the_warm_up(schedule: Schedule) -> None:
    values = blends(schedule)
    rise = round(schedule.warmup * schedule.steps)
    assert values[: rise + 1] == [0.0] * (rise + 1)
    assert values[rise + 1] > 0.0


@both
def test_exactly_one_in_the_hold_part(schedule: Schedule) -> None:
    values = blends(schedule)
    top = round(schedule.full * schedule.steps)
    assert values[top:] == [1.0] * (schedule.steps - top)
    assert values[top - 1] < 1.0


@both
def test_monotone_and_continuous(schedule: Schedule) -> None:
    jumps = np.diff(blends(schedule))
    # The steepest slopes, at the upper ends of the ramps, times du = 1 / steps; a gap at a joint would be larger.
    quartic = 4 * schedule.knee / (schedule.bend - schedule.warmup)
    quadratic = 2 * (1 - schedule.knee) / (schedule.full - schedule.bend)
    assert jumps.min() >= 0
    assert jumps.max() <= max(quartic, quadratic) / schedule.steps


@both
def test_knee_and_the_middle_of_each_ramp(schedule: Schedule) -> None:
    tolerance = 1e-12  # a handful of float64 roundings of numbers below 1
    knee = schedule.knee
    assert at(schedule, schedule.bend) == pytest.approx(knee, abs=tolerance)
    assert at(schedule, (schedule.warmup + schedule.bend) / 2) == pytest.approx(knee / 2**4, abs=tolerance)
    middle = (schedule.bend + schedule.full) / 2
    assert at(schedule, middle) == pytest.approx(knee + (1 - knee) / 2**2, abs=tolerance)


def test_default_shape() -> None:
    assert (DEFAULT.warmup, DEFAULT.bend, DEFAULT.full, DEFAULT.knee) == (0.1, 0.4, 0.7, 0.2)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_short_runs_stay_within_bounds(steps: int) -> None:
    schedule = Schedule(steps)
    assert all(0 <= value <= 1 for value in blends(schedule))
    assert all(0 < schedule.learning_rate(step, PEAK) <= PEAK for step in range(steps))


def test_learning_rate_rises_linearly_over_the_first_twentieth() -> None:
    schedule = Schedule(steps=200)
    rates = [schedule.learning_rate(step, PEAK) for step in range(10)]
    assert rates == [PEAK * (step + 1) / 10 for step in range(10)]


def test_learning_rate_falls_along_a_cosine_to_a_hundredth() -> None:
    schedule = Schedule(steps=200)
    rates = np.array([schedule.learning_rate(step, PEAK) for step in range(10, 201)])
    phase = np.linspace(0, math.pi, len(rates))
    # float64: about ten roundings of numbers below 1
    np.testing.assert_allclose(rates, PEAK * (0.01 + 0.99 * (1 + np.cos(phase)) / 2), rtol=1e-13, atol=0)
    assert np.all(np.diff(rates) < 0)
