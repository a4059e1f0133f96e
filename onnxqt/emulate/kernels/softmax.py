"""Softmax of 8-bit codes along the last axis, to a grid of scale 1/256.

| rule | how |
|---|---|
| tflite | fixed point: exp in Q5.26, the sum with 12 integer bits, its reciprocal by three Newton steps |
| ruy | float32: a table of exp of every difference, a sum in order, one reciprocal, half away from zero |

Both subtract the largest code of the row first, so the zero point of the input does not matter.

Sources: TensorFlow Lite's reference/softmax.h with gemmlowp's fixedpoint.h (tflite), optimized/optimized_ops.h (ruy).

The two differ for some inputs, so a float table cannot stand for the reference kernel.
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from onnxqt import numerics
from onnxqt.numerics import Array, IntArray, QParams
from onnxqt.requantize import multiply_by_quantized_multiplier, quantize_multiplier, rounding_divide_by_power_of_two

Rule = Callable[[IntArray, QParams, QParams], IntArray]
Int64Array = npt.NDArray[np.int64]

_INTEGER_BITS = 5  # of the scaled differences: Q5.26
_SUM_BITS = 12  # integer bits of the sum
_ONE = (1 << 31) - 1  # the real 1 in Q0.31, saturated
# exp(-1/4), exp(-1/2), exp(-1), ... exp(-16) in Q0.31, for the bits of a difference from 1/4 upward (gemmlowp).
_EXP_OF_BITS = (1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)
_EXP_EIGHTH = 1895147668  # exp(-1/8) in Q0.31
_THIRD = 715827883  # 1/3 in Q0.31
_48_17, _32_17 = 1515870810, 1010580540  # 48/17 and 32/17 in Q2.29: the first guess of Newton's division


def softmax(codes: IntArray, source: QParams, target: QParams) -> IntArray:
    """Codes of Softmax along the last axis as TensorFlow Lite's reference kernel computes it, in fixed point.

    d = (c - max of the row) * s_in, in Q5.26;  code = -128 + round(exp(d) / sum of exp(d) * 256)

    Differences beyond what Q5.26 holds count as nothing. LiteRT 2.3.0 ends the process where the sum of a row
    reaches 512; here the formula goes on.
    """
    differences = codes.astype(np.int64) - codes.max(axis=-1, keepdims=True)
    real = min(float(source.scale) * (1 << (31 - _INTEGER_BITS)), (1 << 31) - 1.0)
    mantissa, exponent = quantize_multiplier(np.asarray(real))
    radius = ((1 << _INTEGER_BITS) - 1) * (1 << (31 - _INTEGER_BITS)) / (1 << int(exponent))
    width = 1 << source.grid.bits
    every = -np.arange(width, dtype=np.int64)
    counted = every >= -int(radius)
    scaled = multiply_by_quantized_multiplier(np.where(counted, every, 0), mantissa, exponent)
    table = np.where(counted, exp_of_negative(scaled), 0)
    exps = table[-differences]
    parts = np.where(counted, rounding_divide_by_power_of_two(table, np.asarray(_SUM_BITS)), 0)
    reciprocal, over_unit = _reciprocal(parts[-differences].sum(axis=-1, keepdims=True))
    shift = over_unit + 31 - 8
    steps = rounding_divide_by_power_of_two(_high_product(reciprocal, exps), shift)
    return numerics.saturated(np.where(exps > 0, steps, 0) + target.zero_point, target.grid)


def exp_of_negative(values: Int64Array) -> Int64Array:
    """The exponential of numbers <= 0 in Q5.26, in Q0.31 (gemmlowp's exp_on_negative_values).

    The part in [-1/4, 0) goes through a polynomial around -1/8, the bits above multiply by constants.
    """
    quarter = 1 << (31 - _INTEGER_BITS - 2)
    rest = (values & (quarter - 1)) - quarter
    result = _exp_of_quarter(rest << _INTEGER_BITS)
    remainder = rest - values
    for i, factor in enumerate(_EXP_OF_BITS):
        result = np.where(remainder & (quarter << i), _high_product(result, factor), result)
    return np.where(values == 0, np.int64(_ONE), result)


def _exp_of_quarter(values: Int64Array) -> Int64Array:
    """The exponential in [-1/4, 0), Q0.31, with x = value + 1/8: e^(-1/8) (1 + x + x^2/2 + x^3/6 + x^4/24)."""
    x = values + (1 << 28)
    square = _high_product(x, x)
    cube, fourth = _high_product(square, x), _high_product(square, square)
    quartered = rounding_divide_by_power_of_two(fourth, np.asarray(2))
    inner = _high_product(quartered + cube, _THIRD) + square
    powers = rounding_divide_by_power_of_two(inner, np.asarray(1))
    return _EXP_EIGHTH + _high_product(np.asarray(x + powers), _EXP_EIGHTH)


def _reciprocal(total: Int64Array) -> tuple[Int64Array, Int64Array]:
    """(2^h / total in Q0.31, how many bits the total is over one), h so that the quotient is in (1/2, 1].

    gemmlowp's GetReciprocal and one_over_one_plus_x_for_x_in_0_1.
    """
    bits = np.floor(np.log2(total)).astype(np.int64) + 1  # exact: a float64 holds the total
    headroom = 32 - bits
    fraction = (total << headroom) - (1 << 31)
    half = (fraction + _ONE + 1) >> 1  # a positive half sum, rounded half up
    guess = _48_17 + _high_product(half, -_32_17)
    for _ in range(3):
        error = (1 << 29) - _high_product(half, guess)
        guess = guess + _saturated32(_high_product(guess, error) << 2)
    return _saturated32(guess << 1), _SUM_BITS - headroom


def _high_product(a: Array, b: Array | int) -> Int64Array:
    """`a b / 2^31` rounded half up (gemmlowp's SaturatingRoundingDoublingHighMul on values that do not saturate)."""
    product: Int64Array = np.asarray(a * b, np.int64)
    return (product + (1 << 30)) >> 31


def _saturated32(values: Int64Array) -> Int64Array:
    return np.clip(values, -(1 << 31), _ONE)


def softmax_ruy(codes: IntArray, source: QParams, target: QParams) -> IntArray:
    """Codes of Softmax along the last axis as TensorFlow Lite's optimized kernel computes it on x86, in float32.

    code = round_half_away(exp(d) * (1 / (sum of exp(d) * s_out))) + z_out,  d = -s_in (max of the row - c)

    The sum runs from the first element to the last.
    """
    differences = codes.max(axis=-1, keepdims=True) - codes.astype(np.int64)
    every = np.arange(1 << source.grid.bits, dtype=np.float32) * -np.float32(source.scale)
    table = np.exp(every.astype(np.float64)).astype(np.float32)
    exps = table[differences]
    total = np.add.accumulate(exps, axis=-1)[..., -1:]
    steps = numerics.round_half_away(exps * (np.float32(1) / (total * np.float32(target.scale))))
    return numerics.saturated(steps + target.zero_point.astype(np.float32), target.grid)


RULES: Mapping[str, Rule] = {"tflite": softmax, "ruy": softmax_ruy}
