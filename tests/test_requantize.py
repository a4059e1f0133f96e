"""Every rule from accumulators to codes, against the same rule written here with Python integers and fractions."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, cached_property

import numpy as np
import pytest

from onnxqt.numerics import Array, Grid, QParams
from onnxqt.requantize import (
    FLOAT_BIAS,
    RULES,
    Requantization,
    ScaleError,
    effective_multiplier,
    multiply_by_quantized_multiplier,
    multiply_half_up,
    quantize_multiplier,
    requantization,
    requantize,
    rounded,
    rounding_divide_by_power_of_two,
    shift_half_up,
)

S8, U8 = Grid(8, signed=True), Grid(8, signed=False)
BEYOND = 1 << 20  # steps that saturate on any grid
INT32 = ((1 << 31) - 1, -(1 << 31))


# The rules a second time. Reals are fractions; every rounding is written out.


def half_up(x: Fraction) -> int:
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def nearest(x: Fraction | int, bits: int) -> Fraction:
    """The nearest number with `bits` significant bits, ties to even."""
    x = Fraction(x)
    digits = abs(x.numerator).bit_length() - x.denominator.bit_length()  # 2^(digits - 1) < |x| < 2^(digits + 1)
    above = abs(x) >= power(digits)
    unit = power(digits + above - bits)
    return round(x / unit) * unit


def power(exponent: int) -> Fraction:
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


def f32(x: Fraction | int) -> Fraction:
    return nearest(x, 24)


def f64(x: Fraction | int) -> Fraction:
    return nearest(x, 53)


@dataclass(frozen=True)
class Scales:
    """Scales of one channel, exact values of float32 numbers, and what else a rule reads of it.

    Attributes:
        real: M in float64; the product of two float32 is exact there.
        fixed: (q, e), `M = q 2^e / 2^31`.
        short: the same with q of 16 bits and 2^15.
    """

    source: Fraction
    weight: Fraction
    target: Fraction
    zero_point: int
    grid: Grid
    bias: Fraction | None
    channel: int
    channels: int

    @cached_property
    def real(self) -> Fraction:
        return f64(self.source * self.weight / self.target)

    @cached_property
    def fixed(self) -> tuple[int, int]:
        exponent = 0
        while self.real >= power(exponent):
            exponent += 1
        while self.real < power(exponent - 1):
            exponent -= 1
        mantissa = half_away(self.real / power(exponent - 31))
        if mantissa == 2**31:
            mantissa, exponent = mantissa // 2, exponent + 1
        return (0, 0) if exponent < -31 else (mantissa, exponent)

    @cached_property
    def short(self) -> tuple[int, int]:
        mantissa, exponent = self.fixed
        return min(half_up(Fraction(mantissa, 2**16)), 2**15 - 1), exponent

    @cached_property
    def float32_even(self) -> Fraction:
        return f32(f32(self.source * self.weight) / self.target)

    @cached_property
    def ncnn(self) -> Fraction:
        return f32(1 / f32(f32(1 / self.source) * f32(1 / self.weight)))

    @cached_property
    def openvino(self) -> tuple[Fraction, Fraction, Fraction]:
        """Factor of the accumulator, factor and shift of the FakeQuantize."""
        scale, steps = f32(self.source * self.weight), self.grid.qmax - self.grid.qmin
        low, high = (f32((code - self.zero_point) * self.target) for code in (self.grid.qmin, self.grid.qmax))
        if self.bias is None:
            return f32(steps / f32(f32(high / scale) - f32(low / scale))), Fraction(1), Fraction(self.zero_point)
        span = f32(high - low)
        return scale, f32(steps / span), f32(f32(f32(-low * steps) / span) + self.grid.qmin)


def float32_product(acc: int, s: Scales) -> Fraction:
    return f32(f32(acc) * s.float32_even)


def doubling_high_product(a: int, b: int) -> int:
    """gemmlowp's: a nudge of half a unit towards the sign, then a division of C, which drops the fraction."""
    product = a * b
    nudged = product + (2**30 if product >= 0 else 1 - 2**30)
    return nudged // 2**31 if nudged >= 0 else -(-nudged // 2**31)


def gemmlowp(acc: int, s: Scales) -> int:
    mantissa, exponent = s.fixed
    high = doubling_high_product(acc * 2 ** max(exponent, 0), mantissa)
    return half_away(Fraction(high, 2 ** max(-exponent, 0)))


def ruy(acc: int, s: Scales) -> int:
    mantissa, exponent = s.fixed
    high = half_up(Fraction(acc * 2 ** max(exponent, 0) * mantissa, 2**31))
    return half_up(Fraction(high, 2 ** max(-exponent, 0)))


def ncnn(acc: int, s: Scales) -> int:
    real = f32(f32(acc) * s.ncnn)
    if s.bias is not None:
        real = f32(real + s.bias)
    return half_away(f32(real * f32(1 / s.target)))


def float32_bias(acc: int, s: Scales) -> int:
    real = f32(f32(acc) * f32(s.source * s.weight))
    if s.bias is not None:
        real = f32(real + s.bias)
    return round(f32(real / s.target))


def openvino(acc: int, s: Scales) -> int:
    scale, factor, shift = s.openvino
    real = f32(f32(acc) * scale)
    if s.bias is not None:
        real = f32(real + s.bias)
    return round(f32(real * factor + shift)) - s.zero_point


def short(acc: int, s: Scales) -> Fraction:
    mantissa, exponent = s.short
    return acc * mantissa * power(exponent - 15)


EXACT: Mapping[str, Callable[[int, Scales], int]] = {
    "float32_even": lambda acc, s: round(float32_product(acc, s)),
    "float32_away": lambda acc, s: half_away(float32_product(acc, s)),
    "float64_away": lambda acc, s: half_away(f64(acc * s.real)),
    "gemmlowp_double": gemmlowp,
    "ruy_double": ruy,
    "ruy_vectors": lambda acc, s: (ruy if s.channel < s.channels // 8 * 8 else gemmlowp)(acc, s),
    "fixed31_single": lambda acc, s: half_up(acc * s.fixed[0] * power(s.fixed[1] - 31)),
    "fixed15_single": lambda acc, s: half_up(short(acc, s)),
    "fixed16_away": lambda acc, s: half_away(short(acc, s)),
    "shift_up": lambda acc, s: half_up(acc * s.real),
    "ncnn": ncnn,
    "float32_bias": float32_bias,
    "openvino": openvino,
}


def test_each_rule_is_written_twice() -> None:
    assert set(EXACT) == set(RULES)


# Test data


@dataclass(frozen=True, eq=False)
class Case:
    """Scales of a node with some channels; the accumulators follow from them."""

    source: Array
    weight: Array
    target: QParams
    bias: Array | None = None

    @property
    def pow2(self) -> bool:
        return bool(np.all(np.frexp(self.source * self.weight / self.target.scale)[0] == 0.5))

    def scales(self) -> list[Scales]:
        """Of each channel."""
        count, grid = self.weight.size, self.target.grid
        biases: list[Fraction | None] = [None] * count if self.bias is None else [Fraction(float(b)) for b in self.bias]
        source, target = Fraction(float(self.source)), Fraction(float(self.target.scale))
        return [
            Scales(source, Fraction(float(w)), target, int(self.target.zero_point), grid, biases[i], i, count)
            for i, w in enumerate(self.weight.reshape(-1))
        ]

    def accumulators(self) -> Array:
        """(values, channels): random ones, those next to each tie, small ones, and the ends of int32."""
        rng = np.random.default_rng(int(1e6 * float(self.target.scale)))
        columns = []
        for s in self.scales():
            m = s.source * s.weight / s.target
            ties = [math.floor((k + Fraction(1, 2)) / m) + i for k in range(-9, 9) for i in (-1, 0, 1)]
            widest = min(int(400 / m), INT32[0])
            drawn = rng.integers(-widest, widest + 1, 40).tolist()
            small = [-3, -2, -1, 0, 1, 2, 3]
            ends = [end - sign * i for sign, end in zip((1, -1), INT32, strict=True) for i in range(3)]
            column = [*ties, *drawn, *small, *ends, 2**24 + 1, -(2**24) - 1, 2**24 + 3]
            columns.append([min(max(acc, INT32[1]), INT32[0]) for acc in column])
        return np.array(columns, np.int64).T

    def how(self, rule: str) -> Requantization:
        bias = self.bias if rule in FLOAT_BIAS else None
        return requantization(rule, self.source, self.weight, self.target, bias)


def qparams(scale: float, zero_point: int, grid: Grid = S8) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), grid)


def f4(*values: float) -> Array:
    return np.array(values if len(values) > 1 else values[0], np.float32)


def random_weights(channels: int, seed: int, low: float = 2e-4, high: float = 0.02) -> Array:
    return np.random.default_rng(seed).uniform(low, high, channels).astype(np.float32)


CASES: Mapping[str, Case] = {
    "random": Case(f4(0.0213), f4(0.00371), qparams(0.0457, 11)),
    "random, unsigned": Case(f4(0.0571), f4(0.00123), qparams(0.0391, 133, U8)),
    "random, 4 bits": Case(f4(0.0571), f4(0.00123), qparams(0.391, -3, Grid(4, signed=True))),
    "random, narrow": Case(f4(0.0183), f4(0.00471), qparams(0.0217, 0, Grid(8, signed=True, narrow=True))),
    "random, 16 bits": Case(f4(0.0013), f4(0.00123), qparams(0.0391, 0, Grid(16, signed=True))),
    "random, per channel": Case(f4(0.0321), random_weights(11, 1), qparams(0.0531, -7)),
    "random, unequal channels": Case(f4(0.0321), 4.0 ** -np.arange(1, 10, dtype=np.float32), qparams(0.0531, 5)),
    "powers of two": Case(f4(2.0**-5), f4(2.0**-7), qparams(2.0**-4, -3)),
    "powers of two, per channel": Case(f4(2.0**-5), 2.0 ** -np.arange(3, 14, dtype=np.float32), qparams(2.0**-4, 7)),
    "powers of two, unsigned": Case(f4(2.0**-6), f4(2.0**-6, 2.0**-3), qparams(2.0**-5, 101, U8)),
    "large accumulators": Case(f4(2.0**-9), f4(2.0**-9), qparams(1.0, 3)),
    "large accumulators, random": Case(f4(0.0019), f4(0.0021), qparams(1.7, -9)),
    "a multiplier of one": Case(f4(0.5), f4(0.5), qparams(0.25, 1)),
    "a multiplier over one": Case(f4(0.77), f4(0.91, 0.53), qparams(0.25, -5)),
    "a multiplier well over one": Case(f4(7.7), f4(0.91), qparams(0.025, 3)),
    "powers of two over one": Case(f4(4.0), f4(2.0, 0.5), qparams(0.5, 3)),
    "almost a power of two": Case(np.nextafter(f4(0.5), f4(0)), f4(2.0**-6), qparams(0.5, 3)),
    "far below one": Case(f4(2.3e-4), f4(3.1e-5, 1.7e-6), qparams(1.3, 3)),
    "powers of two far below one": Case(f4(2.0**-12), f4(2.0**-16, 2.0**-18), qparams(1.0, 3)),
    "too small for a mantissa": Case(f4(2.0**-20), f4(2.0**-20), qparams(1.0, -3)),
    "a bias": Case(f4(0.0213), random_weights(5, 2), qparams(0.0457, 11), random_weights(5, 3, -3, 3)),
    "a bias, powers of two": Case(f4(2.0**-5), f4(2.0**-7), qparams(2.0**-4, -3), f4(0.40625).reshape(1)),
}


@cache
def expected(name: str, rule: str) -> tuple[tuple[int, ...], ...]:
    """Steps of each row of accumulators, by the rule written here."""
    case, exact = CASES[name], EXACT[rule]
    scales = case.scales()
    return tuple(
        tuple(exact(acc, s) for acc, s in zip(row, scales, strict=True)) for row in case.accumulators().tolist()
    )


def takes(rule: str, case: Case) -> bool:
    """Whether a rule can have the scales of a case: shifts need powers of two, ruy_vectors knows channels alone."""
    if rule == "shift_up":
        return case.pow2
    return rule != "ruy_vectors" or case.weight.ndim == 1


PAIRS = [(rule, name) for rule in RULES for name in CASES if takes(rule, CASES[name])]


@pytest.mark.parametrize(("rule", "name"), PAIRS)
def test_rule_is_its_definition_in_exact_arithmetic(rule: str, name: str) -> None:
    case = CASES[name]
    acc, how = case.accumulators(), case.how(rule)
    steps = np.array(expected(name, rule), object)
    seen = np.abs(steps) < BEYOND
    np.testing.assert_array_equal(rounded(acc, how)[seen].astype(np.int64), steps[seen].astype(np.int64))
    grid = case.target.grid
    codes = requantize(acc, how)
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes, np.clip(steps + int(case.target.zero_point), grid.qmin, grid.qmax))
    assert {grid.qmin, grid.qmax} <= set(codes.ravel().tolist()) or "far below" in name or "too small" in name


@pytest.mark.parametrize(("rule", "name"), PAIRS)
def test_int32_accumulators_give_the_same_codes(rule: str, name: str) -> None:
    acc, how = CASES[name].accumulators(), CASES[name].how(rule)
    np.testing.assert_array_equal(requantize(acc.astype(np.int32), how), requantize(acc, how))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_per_channel_values_are_spread_along_their_axis(rule: str, axis: int) -> None:
    case = Case(f4(2.0**-5), 2.0 ** -np.arange(3, 14, dtype=np.float32), qparams(2.0**-4, 7), random_weights(11, 4))
    acc = np.moveaxis(np.random.default_rng(0).integers(-9000, 9000, (3, 4, 11)), -1, axis)
    codes = requantize(acc, case.how(rule).spread(axis, 3))
    scales = case.scales()
    if rule not in FLOAT_BIAS:
        scales = [replace(s, bias=None) for s in scales]
    for channel, s in enumerate(scales):
        steps = [EXACT[rule](value, s) + 7 for value in np.take(acc, channel, axis).ravel().tolist()]
        np.testing.assert_array_equal(np.take(codes, channel, axis).ravel(), np.clip(steps, -128, 127))


def test_spreading_leaves_one_scale_alone() -> None:
    how = CASES["random"].how("gemmlowp_double").spread(1, 4)
    assert how.mantissa is not None
    assert (how.multiplier.shape, how.mantissa.shape) == ((), ())


# One rule is not another


SAME = {
    frozenset(("fixed31_single", "shift_up")): "a power of two has the mantissa 2^30, which is one shift",
    frozenset(("fixed15_single", "shift_up")): "a power of two has the mantissa 2^14, which is one shift",
}


@pytest.mark.parametrize(("first", "second"), [*itertools.combinations(RULES, 2)])
def test_two_rules_differ_somewhere_in_the_test_data(first: str, second: str) -> None:
    """So that one cannot stand for the other unnoticed."""

    def codes(rule: str, name: str) -> Array:
        return requantize(CASES[name].accumulators(), CASES[name].how(rule))

    both = [name for name, case in CASES.items() if takes(first, case) and takes(second, case)]
    differing = [name for name in both if np.any(codes(first, name) != codes(second, name))]
    assert both
    assert bool(differing) is (frozenset((first, second)) not in SAME)


WRONG: Mapping[str, Callable[[Sequence[int]], list[int]]] = {
    "one LSB": lambda steps: [step + 1 for step in steps],
    "one LSB below zero": lambda steps: [step - (step < 0) for step in steps],
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_off_by_one_lsb_is_noticed(rule: str, wrong: str) -> None:
    """Codes that are wrong by one do not hide behind the limits of the grid."""
    name = "powers of two, per channel"
    right = np.array(expected(name, rule))
    other = np.array([WRONG[wrong](row) for row in right.tolist()])
    z = int(CASES[name].target.zero_point)
    assert np.any(np.clip(right + z, -128, 127) != np.clip(other + z, -128, 127))


# Multipliers


@pytest.mark.parametrize(
    "real", [0.3, 0.5, 1.0, 0.999999999999, 1 - 2.0**-33, 1e-4, 3.7, 1000.3, 2.0**-31, 2.0**-32, 2.0]
)
def test_multiplier_is_the_nearest_fraction_with_31_bits(real: float) -> None:
    mantissa, exponent = (int(part) for part in quantize_multiplier(np.array(real)))
    assert 1 << 30 <= mantissa < 1 << 31
    ulp = Fraction(2) ** (exponent - 31)
    assert abs(mantissa * ulp - Fraction(real)) <= ulp / 2


def test_multiplier_of_a_tie_is_rounded_away_from_zero() -> None:
    real = (2**30 + 1) / 2**31 + 2.0**-32
    assert int(quantize_multiplier(np.array(real))[0]) == 2**30 + 2


def test_multiplier_that_rounds_up_to_one_gets_another_exponent() -> None:
    assert [int(part) for part in quantize_multiplier(np.array(1 - 2.0**-40))] == [1 << 30, 1]


def test_tiny_multiplier_is_zero() -> None:
    mantissa, exponent = quantize_multiplier(np.array([2.0**-33, 2.0**-32, 1e-30, 0.0]))
    np.testing.assert_array_equal(mantissa, [0, 1 << 30, 0, 0])
    np.testing.assert_array_equal(exponent, [0, -31, 0, 0])
    assert exponent.dtype == np.int32


@pytest.mark.parametrize(("rule", "name"), PAIRS)
def test_effective_multiplier_is_what_the_rule_holds(rule: str, name: str) -> None:
    effective = effective_multiplier(CASES[name].how(rule)).reshape(-1)
    for value, s in zip(effective.tolist(), CASES[name].scales(), strict=True):
        if rule in ("fixed15_single", "fixed16_away"):
            real = s.short[0] * Fraction(2) ** (s.short[1] - 15)
        elif rule in ("gemmlowp_double", "ruy_double", "ruy_vectors", "fixed31_single"):
            real = s.fixed[0] * Fraction(2) ** (s.fixed[1] - 31)
        elif rule in ("float64_away", "shift_up"):
            real = s.real
        elif rule == "ncnn":
            real = s.ncnn
        else:
            real = f32(s.source * s.weight)
            real = f32(real / s.target) if rule in ("float32_even", "float32_away") else real
        assert Fraction(value) == real


def test_a_mantissa_of_16_bits_saturates() -> None:
    case = Case(f4(1 - 2.0**-18), f4(0.5), qparams(1.0, 0))  # M rounds to 2^15 / 2^16, one too many for 15 bits
    mantissa = case.how("fixed16_away").mantissa
    assert mantissa is not None
    assert int(mantissa) == (1 << 15) - 1


# Parts that other kernels use too


VALUES = np.array([0, 1, -1, 2, -2, 3, -3, 5, -5, 6, -6, 7, -7, 1023, -1023, 1 << 30, -(1 << 30), *INT32], np.int64)


@pytest.mark.parametrize("shift", [0, 1, 2, 3, 8, 31, 46, 62])
def test_shifts_round_ties_as_their_names_say(shift: int) -> None:
    exact = [Fraction(value, 1 << shift) for value in VALUES.tolist()]
    np.testing.assert_array_equal(shift_half_up(VALUES, np.array(shift)), [half_up(x) for x in exact])
    away = rounding_divide_by_power_of_two(VALUES, np.array(shift))
    np.testing.assert_array_equal(away, [half_away(x) for x in exact])


@pytest.mark.parametrize("exponent", [-31, -9, -1, 0, 1])
def test_products_with_a_fixed_point_multiplier(exponent: int) -> None:
    for mantissa in (0, 1 << 30, (1 << 30) + 1, 1518500250, (1 << 31) - 1):
        parts = np.array(mantissa), np.array(exponent)
        left, right = 1 << max(exponent, 0), 1 << max(-exponent, 0)
        highs = [doubling_high_product(value * left, mantissa) for value in VALUES.tolist()]
        away = [half_away(Fraction(high, right)) for high in highs]
        np.testing.assert_array_equal(multiply_by_quantized_multiplier(VALUES, *parts), away)
        highs = [half_up(Fraction(value * left * mantissa, 1 << 31)) for value in VALUES.tolist()]
        up = [half_up(Fraction(high, right)) for high in highs]
        np.testing.assert_array_equal(multiply_half_up(VALUES, *parts), up)


# Errors


@pytest.mark.parametrize("weight", [f4(0.3), f4(0.5, 0.25, 0.3), np.nextafter(f4(0.5), f4(1))])
def test_shifts_need_powers_of_two(weight: Array) -> None:
    with pytest.raises(ScaleError, match="its scales are not powers of two"):
        requantization("shift_up", f4(0.5), weight, qparams(0.25, 0))


def test_fixed_point_rule_without_its_mantissa() -> None:
    how = Requantization("gemmlowp_double", qparams(0.1, 0), np.array(0.5))
    with pytest.raises(ValueError, match="rule gemmlowp_double needs a mantissa and an exponent"):
        requantize(np.array([1]), how)


def test_depthwise_rule_needs_channels_along_one_axis() -> None:
    how = Case(f4(0.1), f4(0.1), qparams(0.1, 0)).how("ruy_vectors")
    square = Requantization(how.rule, how.target, *(np.full((2, 3), x) for x in (how.multiplier, 1 << 30, 0)))
    with pytest.raises(ValueError, match=r"rule ruy_vectors needs one scale per channel along one axis, got shape"):
        requantize(np.ones((4, 2, 3)), square)


def test_float_bias_is_added_to_the_real_accumulator() -> None:
    """2 * 0.5 * 0.5 + 0.25 is 3 steps of 0.25. On the grid of the accumulator the bias of 0.1 would be 0."""
    target = QParams(f4(0.25), np.array(3, np.int32), S8)
    acc = np.array([2, 2, 2, -2], np.int32)
    bias = f4(0.25, 0.1, 0.125, -0.125)
    how = requantization("float32_bias", f4(0.5), f4(0.5), target, bias)
    assert how.bias is not None
    np.testing.assert_array_equal(requantize(acc, how), [6, 5, 5, 1])  # 2.5 and -2.5 steps are ties: to even
    without = requantization("float32_bias", f4(0.5), f4(0.5), target)
    np.testing.assert_array_equal(requantize(acc, without), [5, 5, 5, 1])
