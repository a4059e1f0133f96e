import math

import numpy as np
import pytest

from onnxqt.errors import UsageError
from onnxqt.trim.schedule import Schedule

STEPS = 20_000
DEFAULT = Schedule()
OTHER = Schedule(warmup=0.25, bend=0.5, full=0.625, knee=0.5, rise=0.125, floor=0.25)
PEAK = 0.125

both = pytest.mark.parametrize("schedule", [DEFAULT, OTHER], ids=["default", "other"])


def blends(schedule: Schedule, steps: int = STEPS) -> list[float]:
    return [schedule.blend(step, steps) for step in range(steps)]


def at(schedule: Schedule, fraction: float) -> float:
    return schedule.blend(round(fraction * STEPS), STEPS)


@both
def test_float_in_the_warm_up(schedule: Schedule) -> None:
    values = blends(schedule)
    rise = round(schedule.warmup * STEPS)
    assert values[: rise + 1] == [0.0] * (rise + 1)
    assert values[rise + 1] > 0.0


@both
def test_exactly_one_in_the_hold_part(schedule: Schedule) -> None:
    values = blends(schedule)
    top = round(schedule.full * STEPS)
    assert values[top:] == [1.0] * (STEPS - top)
    assert values[top - 1] < 1.0


@both
def test_monotone_and_continuous(schedule: Schedule) -> None:
    jumps = np.diff(blends(schedule))
    # The steepest slopes, at the upper ends of the ramps, times du = 1 / steps; a gap at a joint would be larger.
    quartic = 4 * schedule.knee / (schedule.bend - schedule.warmup)
    quadratic = 2 * (1 - schedule.knee) / (schedule.full - schedule.bend)
    assert jumps.min() >= 0
    assert jumps.max() <= max(quartic, quadratic) / STEPS


@both
def test_corners_and_the_middle_of_each_ramp(schedule: Schedule) -> None:
    tolerance = 1e-12  # a handful of float64 roundings of numbers below 1
    knee = schedule.knee
    assert at(schedule, schedule.warmup) == 0.0  # exactly: 0^4
    assert at(schedule, schedule.bend) == knee  # exactly: knee + (1 - knee) 0^2
    assert at(schedule, schedule.full) == 1.0
    assert at(schedule, (schedule.warmup + schedule.bend) / 2) == pytest.approx(knee / 2**4, abs=tolerance)
    middle = (schedule.bend + schedule.full) / 2
    assert at(schedule, middle) == pytest.approx(knee + (1 - knee) / 2**2, abs=tolerance)


def test_default_shape() -> None:
    assert (DEFAULT.warmup, DEFAULT.bend, DEFAULT.full, DEFAULT.knee) == (0.02, 0.1, 0.25, 0.2)
    assert (DEFAULT.rise, DEFAULT.floor) == (0.05, 0.01)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7])
def test_short_runs_stay_within_bounds(steps: int) -> None:
    assert all(0 <= value <= 1 for value in blends(DEFAULT, steps))
    assert all(0 < DEFAULT.learning_rate(step, steps, PEAK) <= PEAK for step in range(steps))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Schedule(warmup=0, bend=0, full=0), [1.0] * 8),
        (Schedule(warmup=1, bend=1, full=1), [0.0] * 8),
        (Schedule(warmup=0.5, bend=0.5, full=0.5), [0.0] * 4 + [1.0] * 4),
        (Schedule(warmup=0, bend=0, full=0.5, knee=0.25), [0.25, 0.25 + 0.75 / 16, 0.4375, 0.671875] + [1.0] * 4),
        (Schedule(warmup=0, bend=0.5, full=0.5, knee=0.5), [0.5 * (i / 4) ** 4 for i in range(4)] + [1.0] * 4),
    ],
    ids=["all-quantized", "all-float", "a-jump", "no-quartic-ramp", "no-quadratic-ramp"],
)
def test_parts_of_no_length(schedule: Schedule, expected: list[float]) -> None:
    """No division by zero; all numbers are sums of few powers of two, so exact."""
    assert blends(schedule, 8) == expected


@both
def test_learning_rate_rises_linearly(schedule: Schedule) -> None:
    steps = 200
    rise = round(schedule.rise * steps)
    assert rise > 1
    rates = [schedule.learning_rate(step, steps, PEAK) for step in range(rise)]
    assert rates == [PEAK * (step + 1) / rise for step in range(rise)]


@both
def test_learning_rate_falls_along_a_cosine_to_its_floor(schedule: Schedule) -> None:
    steps = 200
    rise = round(schedule.rise * steps)
    rates = np.array([schedule.learning_rate(step, steps, PEAK) for step in range(rise, steps + 1)])
    phase = np.linspace(0, math.pi, len(rates))
    floor = schedule.floor
    # float64: about ten roundings of numbers below 1
    np.testing.assert_allclose(rates, PEAK * (floor + (1 - floor) * (1 + np.cos(phase)) / 2), rtol=1e-13, atol=0)
    assert np.all(np.diff(rates) < 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"warmup": 0.5}, r"the schedule has warmup 0.5, bend 0.1, full 0.25: give fractions of the run in this order"),
        ({"bend": 0.8}, r"bend 0.8, full 0.25: give"),
        ({"full": 1.01}, r"full 1.01: give .* between 0 and 1"),
        ({"warmup": -0.1}, r"warmup -0.1"),
        ({"full": math.nan}, r"full nan"),
        ({"knee": 1.5}, r"the schedule has knee 1.5: give a number between 0 and 1"),
        ({"rise": -1.0}, r"the schedule has rise -1: give"),
        ({"floor": math.nan}, r"the schedule has floor nan: give"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_no_schedule_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(**wrong)
