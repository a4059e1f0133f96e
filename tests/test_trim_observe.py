"""Moving averages of the activations' ranges, and their way through a file."""

from pathlib import Path

import numpy as np
import pytest
from conftest import Digits

from onnxqt.calibrate import BINS, RANGE_METHODS, RangeMethod, RangeTable, TensorRange, activation_params, observe
from onnxqt.numerics import Array, FloatArray
from onnxqt.schemes import parse_scheme
from onnxqt.trim import job as jobs
from onnxqt.trim.observe import Observer
from onnxqt.trim.quantizers import statistics

MEMORY = 0.75  # a sum of powers of two: products of few such numbers are exact


def values(seed: int, largest: float = 3.0, count: int = 1000) -> FloatArray:
    return np.random.default_rng(seed).uniform(-1, largest, count).astype(np.float32)


def table(**arrays: Array) -> RangeTable:
    return RangeTable({name: observe(x) for name, x in arrays.items()}, 4)


def given_out(**arrays: Array) -> dict[str, Array]:
    """What a step's training graph gives out, with all values as the sample."""
    outputs: dict[str, Array] = {}
    for name, x in arrays.items():
        names = statistics(name)
        outputs |= {names.low: np.asarray(x.min()), names.high: np.asarray(x.max()), names.sample: x}
    return outputs


def shares(seen: TensorRange) -> Array:
    return np.asarray(seen.counts / seen.counts.sum())


def test_start_is_the_calibrated_range() -> None:
    a = values(0)
    observer = Observer(table(a=a), MEMORY)
    seen = observer.table.tensors["a"]
    assert (seen.count, seen.min, seen.max, seen.limit) == (1, a.min(), a.max(), 4.0)
    assert seen.counts.sum() == pytest.approx(1, abs=1e-12)  # float64: a thousand terms
    assert observer.table.samples == 4


def test_values_that_stay_are_a_fixed_point() -> None:
    a, b = values(0), values(1, largest=100.0)
    observer = Observer(table(a=a, b=b), 0.99)
    before = observer.table.tensors
    for _ in range(50):
        observer.update(given_out(a=a, b=b))
    for name, seen in observer.table.tensors.items():
        # float64: m x + (1 - m) x is off by at most 2^-52 of x each time
        assert (seen.min, seen.max) == pytest.approx((before[name].min, before[name].max), rel=50 * 2.0**-52)
        assert seen.limit == before[name].limit
        np.testing.assert_allclose(seen.counts, before[name].counts, rtol=50 * 2.0**-51, atol=0)


def test_moving_average_against_its_formula() -> None:
    """Two steps; the second has values twice as large as the histogram reached before."""
    start, first, second = values(0), values(1), values(2, largest=7.5)
    observer = Observer(table(a=start), MEMORY)
    observer.update(given_out(a=first))
    observer.update(given_out(a=second))
    seen = observer.table.tensors["a"]
    m = MEMORY

    def average(parts: list[float]) -> float:
        return m * (m * parts[0] + (1 - m) * parts[1]) + (1 - m) * parts[2]

    each = (start, first, second)
    assert seen.min == average([float(x.min()) for x in each])  # exactly: float32 values times powers of two
    assert seen.max == average([float(x.max()) for x in each])
    assert (seen.count, seen.limit) == (1, 8.0)
    weights = (m * m, m * (1 - m), 1 - m)
    wide = TensorRange(0, 0.0, 0.0, 8.0, np.zeros(BINS, np.int64))  # brings every histogram to the same bins
    expected = sum(w * shares(observe(x).merge(wide)) for w, x in zip(weights, each, strict=True))
    np.testing.assert_allclose(seen.counts, expected, rtol=0, atol=4 * 2.0**-52)


def test_extremes_come_from_all_values_and_the_histogram_from_the_sample() -> None:
    start = values(0)
    observer = Observer(table(a=start), MEMORY)
    names = statistics("a")
    sample = np.array([0.5, 0.5, np.inf, np.nan], np.float32)  # what is not finite falls in no bin
    observer.update({names.low: np.array(-8.0), names.high: np.array(16.0), names.sample: sample})
    seen = observer.table.tensors["a"]
    assert seen.min == MEMORY * float(start.min()) + (1 - MEMORY) * -8
    assert seen.max == MEMORY * float(start.max()) + (1 - MEMORY) * 16
    grown = seen.counts - MEMORY * shares(observe(start))
    assert grown[BINS // 2 + BINS // 16] == pytest.approx(1 - MEMORY, abs=1e-12)  # 0.5 of 4
    assert seen.counts.sum() == pytest.approx(1, abs=1e-12)


def test_state_comes_back_and_goes_on_identically() -> None:
    start = table(a=values(0), b=values(1, largest=50.0))
    observer, other = Observer(start, 0.99), Observer(start, 0.99)
    observer.update(given_out(a=values(2, largest=9.0), b=values(3)))
    other.restore(observer.arrays())
    for _ in range(2):
        for name, seen in observer.table.tensors.items():
            back = other.table.tensors[name]
            assert (back.count, back.min, back.max, back.limit) == (seen.count, seen.min, seen.max, seen.limit)
            np.testing.assert_array_equal(back.counts, seen.counts)
        for each in (observer, other):
            each.update(given_out(a=values(4), b=values(5, largest=200.0)))


def test_what_is_not_given_out_stays() -> None:
    observer = Observer(table(a=values(0), b=values(1)), MEMORY)
    before = observer.table.tensors
    observer.update(given_out(a=values(2, largest=9.0)))
    assert observer.table.tensors["b"] is before["b"]
    assert observer.table.tensors["a"].max > before["a"].max


def test_no_activations_are_a_state_too() -> None:
    observer = Observer(RangeTable({}, 4), 0.99)
    observer.restore(observer.arrays())
    observer.update({})
    assert observer.table.tensors == {}


def test_a_table_that_was_taken_does_not_change() -> None:
    observer = Observer(table(a=values(0)), MEMORY)
    before = observer.table
    low, counts = before.tensors["a"].min, before.tensors["a"].counts.copy()
    observer.update(given_out(a=values(1, largest=30.0)))
    assert before.tensors["a"].min == low
    np.testing.assert_array_equal(before.tensors["a"].counts, counts)


# calibrate's divergence divides by max(sum, 1), so it normalises counts but not shares.
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_averages_give_the_grids_of_calibration_where_nothing_has_moved(
    method: RangeMethod, torch_digits: Digits
) -> None:
    """Histograms that sum up to 1 instead of the number of values lie under the same grids."""
    grids = parse_scheme("w4a4-asym-pt").grids
    plan = torch_digits.plan
    expected = activation_params(plan, torch_digits.ranges, grids, method)
    found = activation_params(plan, Observer(torch_digits.ranges, 0.99).table, grids, method)
    alone = [site.tensor for site in plan.activations if sum(s.group == site.group for s in plan.activations) == 1]
    assert len(alone) > 4
    for tensor in alone:
        assert (found[tensor].scale, found[tensor].zero_point) == (expected[tensor].scale, expected[tensor].zero_point)


def test_ranges_come_back_from_their_file(torch_digits: Digits, tmp_path: Path) -> None:
    jobs.write_ranges(tmp_path, torch_digits.ranges)
    back = jobs.read_ranges(tmp_path)
    assert back.samples == torch_digits.ranges.samples
    assert list(back.tensors) == list(torch_digits.ranges.tensors)
    for name, seen in torch_digits.ranges.tensors.items():
        found = back.tensors[name]
        assert (found.count, found.min, found.max, found.limit) == (seen.count, seen.min, seen.max, seen.limit)
        np.testing.assert_array_equal(found.counts, seen.counts)


@pytest.mark.parametrize("scheme", ["w8a8-sym-pc", "w4a4-asym-pt"])
def test_activation_parameters_come_back_from_their_arrays(scheme: str, torch_digits: Digits, tmp_path: Path) -> None:
    params = activation_params(torch_digits.plan, torch_digits.ranges, parse_scheme(scheme).grids, "mse")
    np.savez(tmp_path / "params.npz", **jobs.params_arrays(params))  # type: ignore[arg-type]
    with np.load(tmp_path / "params.npz") as file:
        back = jobs.params_of(file)
    assert list(back) == list(params)
    for name, given in params.items():
        assert (back[name].scale, back[name].zero_point) == (given.scale, given.zero_point)
        assert (back[name].grid, back[name].axis) == (given.grid, given.axis)
        assert back[name].scale.dtype == np.dtype(np.float32)
        assert back[name].zero_point.dtype == np.dtype(np.int32)
