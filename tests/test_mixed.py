"""Bits within a budget: against all choices there are, and against measurements of a small network."""

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from helpers import build, inputs_of, normal, prepare, run

from onnxqt.calibrate import make_quantizers, overridden
from onnxqt.errors import UsageError
from onnxqt.export import quantized_model
from onnxqt.mixed import Mixed, Sensitivity, measure_sensitivities, within_error, within_size
from onnxqt.schemes import parse_scheme

SIZES = {"a": 100, "b": 100, "c": 100, "d": 100}
# Squared error by bits: a hardly matters, d matters most.
ERRORS = {
    "a": {8: 0.0, 4: 0.1, 2: 0.5},
    "b": {8: 0.0, 4: 1.0, 2: 9.0},
    "c": {8: 0.0, 4: 3.0, 2: 50.0},
    "d": {8: 0.0, 4: 40.0, 2: 900.0},
}


def additive(bits: Mapping[str, int]) -> float:
    return 0.25 + sum(ERRORS[name][width] for name, width in bits.items())


def measured(sizes: Mapping[str, int] = SIZES) -> tuple[Sensitivity, ...]:
    return measure_sensitivities(sizes, (2, 4, 8), additive)


def mean(bits: Mapping[str, int], sizes: Mapping[str, int] = SIZES) -> float:
    return sum(width * sizes[name] for name, width in bits.items()) / sum(sizes.values())


ALL = [dict(zip(SIZES, widths, strict=True)) for widths in itertools.product((2, 4, 8), repeat=4)]


def test_each_weight_is_measured_alone() -> None:
    asked: list[dict[str, int]] = []
    done: list[tuple[int, str]] = []

    def measure(bits: Mapping[str, int]) -> float:
        asked.append(dict(bits))
        return additive(bits)

    found = measure_sensitivities(SIZES, (8, 2, 4), measure, lambda count, name: done.append((count, name)))
    assert [(s.tensor, s.size) for s in found] == list(SIZES.items())
    for sensitivity in found:
        assert sensitivity.errors == {w: pytest.approx(0.25 + e) for w, e in ERRORS[sensitivity.tensor].items()}
    assert len(asked) == 1 + 4 * 2
    assert all(sum(width < 8 for width in bits.values()) <= 1 for bits in asked)
    assert done == [(1, "a"), (2, "b"), (3, "c"), (4, "d")]


@pytest.mark.parametrize("budget", [2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0, 7.0, 8.0, 11.0])
def test_the_least_damage_within_a_size(budget: float) -> None:
    """With weights of one size, and errors that add up and grow faster from width to width, greedy is best."""
    chosen = within_size(measured(), budget, additive)
    assert chosen.mean_bits == mean(chosen.bits) <= budget
    assert chosen.error == additive(chosen.bits) == min(additive(bits) for bits in ALL if mean(bits) <= budget)


@pytest.mark.parametrize("limit", [0.25, 0.3, 0.36, 1.5, 5.0, 13.0, 60.0, 2000.0])
def test_the_least_size_within_an_error(limit: float) -> None:
    asked = []

    def measure(bits: Mapping[str, int]) -> float:
        asked.append(bits)
        return additive(bits)

    chosen = within_error(measured(), limit, measure)
    assert chosen.error == pytest.approx(additive(chosen.bits))
    assert chosen.error <= limit
    assert len(asked) <= 4  # of eight moves
    # One step of the narrowest kind is all that a better choice could save: moves are taken in the order of their cost.
    least = min(mean(bits) for bits in ALL if additive(bits) <= limit)
    assert chosen.mean_bits <= least + 1.0


def test_a_large_weight_is_narrowed_before_a_small_one_of_the_same_damage() -> None:
    sizes = {"small": 10, "large": 1000}
    errors = {8: 0.0, 4: 1.0}
    found = measure_sensitivities(sizes, (4, 8), lambda bits: sum(errors[width] for width in bits.values()))
    assert within_size(found, 5.0, lambda bits: 0.0).bits == {"small": 8, "large": 4}


def test_moves_that_are_not_needed_are_taken_back() -> None:
    """The small weight goes first, as it costs nothing; the large one alone is enough then."""
    sizes = {"small": 10, "large": 1000}
    errors = {"small": {8: 0.0, 4: 0.001}, "large": {8: 0.0, 4: 5.0}}
    found = measure_sensitivities(sizes, (4, 8), lambda bits: sum(errors[name][width] for name, width in bits.items()))
    assert within_size(found, 4.05, lambda bits: 0.0).bits == {"small": 8, "large": 4}


@pytest.mark.parametrize("widths", [(8,), (4, 4), (1, 8), (4, 16), ()])
def test_widths_that_leave_no_choice_are_refused(widths: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"^bits \[.*\] leave no choice: give at least two of 2 to 8$"):
        measure_sensitivities(SIZES, widths, additive)


def test_what_cannot_be_had_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^a mean of 1.5 bits cannot be had, the least is 2: allow more, or fewer bits$"
    ):
        within_size(measured(), 1.5, additive)
    with pytest.raises(UsageError, match=r"^a mean of nan bits cannot be had"):
        within_size(measured(), float("nan"), additive)
    with pytest.raises(UsageError, match=r"^an error of 0.1 cannot be had, that of the most bits is 0.25: allow more"):
        within_error(measured(), 0.1, additive)
    with pytest.raises(UsageError, match=r"^an error of nan cannot be had"):
        within_error(measured(), float("nan"), additive)
    with pytest.raises(UsageError, match=r"^the model has no quantized weight whose bits could be chosen"):
        measure_sensitivities({}, (4, 8), additive)
    with pytest.raises(UsageError, match=r"^the outputs with 'b' narrowed are not finite: choose more bits, or check"):
        measure_sensitivities(SIZES, (4, 8), lambda bits: float("nan") if bits["b"] == 4 else 0.0)


def test_a_choice_becomes_overrides_of_the_weights_that_differ() -> None:
    rules = Mixed({"a": 4, "b[0]": 8, "c*": 2}, 5.0, 0.0).overrides(4).rules
    assert [rule.weight_bits for rule in rules] == [8, 2]
    assert rules[0].matches("b[0]")
    assert not rules[0].matches("b0")
    assert rules[1].matches("c*")
    assert not rules[1].matches("cd")


def test_a_small_network_gets_its_bits_where_they_matter() -> None:
    """The weights of the last layer are far larger than what reads them can bear at 2 bits."""
    text = "(float[n,8] x) => (float[] y) { a = Gemm(x, w) r = Relu(a) d = Gemm(r, v) e = Relu(d) y = Gemm(e, u) }"
    weights = {"w": normal(8, 16), "v": normal(16, 12, seed=1), "u": normal(12, 4, seed=2)}
    net = prepare(build(text, weights))
    scheme, inputs = parse_scheme("w8a8-asym-pc").grids, inputs_of(net.original, batch=32)
    expected = run(net.original, inputs)["y"]

    def measure(bits: Mapping[str, int]) -> float:
        grids = overridden(scheme, net.plan, Mixed(dict(bits), 0.0, 0.0).overrides(8))
        quantizers = make_quantizers(net.model, net.plan, net.ranges, grids, "mse")
        got = run(quantized_model(net.model, net.plan, quantizers), inputs)["y"]
        return float(np.sum((got.astype(np.float64) - expected) ** 2))

    sizes = {name: value.size for name, value in weights.items()}
    found = measure_sensitivities(sizes, (2, 4, 8), measure)
    assert all(s.errors[2] > s.errors[4] > s.errors[8] for s in found)
    chosen = within_size(found, 5.0, measure)
    assert chosen.mean_bits <= 5.0
    assert chosen.error == measure(chosen.bits)
    # No better than what measuring every choice within the size would find, and not far from it.
    every = [dict(zip(sizes, widths, strict=True)) for widths in itertools.product((2, 4, 8), repeat=3)]
    best = min(measure(bits) for bits in every if mean(bits, sizes) <= 5.0)
    worst = max(measure(bits) for bits in every if 4.0 <= mean(bits, sizes) <= 5.0)
    assert best <= chosen.error <= 1.5 * best < worst
    assert within_error(found, chosen.error, measure).mean_bits <= chosen.mean_bits + 1
