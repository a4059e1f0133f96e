"""Sums of two tensors: Add, and Sub as the sum of `a` and `-b`.

| rule | code, before the grid clips it |
|---|---|
| ort | round_half_even(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b z_b)))), r = s / s_out, all float32 |
| tflite | M(M((a - z_a) 2^k, s_a / t) + M((b - z_b) 2^k, s_b / t), t / (2^k s_out)) + z, t = 2 max(s_a, s_b) |
| xnnpack | ((a - z_a) A + (b - z_b) B + 2^(n-1)) >> n, + z, A = rint(2^n s_a / s_out), B likewise |
| tosa | as tflite, but every M rounds once, half up |
| float | round((float32 a + float32 b) / s_out) + z |

`M(x, m)` multiplies by a fixed-point multiplier (`requantize.quantize_multiplier`), k is 20, for 16 bits 15, and
`n = 20 - floor(log2(max(s_a, s_b) / s_out))`.

For a difference, TensorFlow Lite and XNNPACK negate the second multiplier. That is the same integer product as with
`-(b - z_b)`, so Sub needs no rule of its own: negate the codes and the zero point of `b`.

Sources: ONNX Runtime's qladd.cpp (ort); TensorFlow Lite's add.cc, sub.cc and reference/add.h (tflite); XNNPACK's
`xnn_init_qs8_add_minmax_scalar_params` in microparams-init.c (xnnpack); the lowering of ADD to RESCALE, and
apply_scale_32 of the TOSA specification (tosa).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from onnxqt import numerics
from onnxqt.numerics import Array, Grid, IntArray, QParams, Rounding
from onnxqt.requantize import multiply_by_quantized_multiplier, quantize_multiplier, shift_half_up

Rule = Callable[[IntArray, IntArray, tuple[QParams, QParams], QParams, Rounding], IntArray]
Multiply = Callable[[Array, Array, Array], Array]  # (values, mantissa, exponent) -> rounded products


def add(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the sum of two tensors, as ONNX Runtime's QLinearAdd computes it with AVX2.

    code = clip(round_half_even(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b * z_b))))),  r = s / s_out

    Products and sums are float32 and `fma` rounds once. Here `fma` is computed in float64 and rounded to
    float32. The product of a code (8 bits and sign) and a float32 is exact in float64. Every term is a
    multiple of `g`, the last bit of the smaller ratio, `g >= 2**-24 * min(r_a, r_b)`, and every sum is below
    `2**11 * max(r_a, r_b, 1)`; so the sum too is exact, and rounded once, while
    `max(r_a, r_b, 1) < 2**18 * min(r_a, r_b)`. Beyond, two roundings could differ in the last bit from one.

    The second operand enters the sum first; so does a first operand that is broadcast along the last axis. Signed codes
    are added as unsigned ones, 128 higher with zero points 128 higher, as ONNX Runtime does on x86.
    """
    del rounding  # the rule has its own
    if target.grid.signed and target.grid.bits <= 8:
        raised = add(a + 128, b + 128, (_raised(params[0]), _raised(params[1])), _raised(target))
        return np.clip(raised - 128, target.grid.qmin, target.grid.qmax)
    if _is_row_constant(a.shape, b.shape):
        a, b, params = b, a, params[::-1]
    source_a, source_b = params
    ratio_a: Any = source_a.scale / target.scale
    ratio_b: Any = source_b.scale / target.scale
    offset = _fma(source_a.zero_point, ratio_a, ratio_b * np.float32(source_b.zero_point))
    fixed: Any = np.float32(target.zero_point) - offset
    total = numerics.round_half_even(_fma(a, ratio_a, _fma(b, ratio_b, fixed)))
    return np.clip(total, target.grid.qmin, target.grid.qmax).astype(np.int32)


def _raised(params: QParams) -> QParams:
    """The grid of codes that are 128 higher."""
    return replace(params, zero_point=params.zero_point + np.int32(128), grid=Grid(8, signed=False))


def _is_row_constant(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether ONNX Runtime takes the operand of shape `a` for a scalar: 1 in the last axis that is not 1 in both."""
    sizes = zip(reversed(a), reversed(b), strict=False)
    return next((n == 1 for n, m in sizes if (n, m) != (1, 1)), True)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """`float32(a * b + c)` with one rounding; see `add` for when."""
    product = np.multiply(a, b, dtype=np.float64)
    return np.add(product, c, dtype=np.float64).astype(np.float32)


def add_tflite(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the sum as TensorFlow Lite computes it (add.cc); see the module."""
    del rounding
    return _on_common_scale(a, b, params, target, multiply_by_quantized_multiplier)


def add_tosa(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the sum from TOSA's RESCALE, ADD, RESCALE with single rounding; see the module."""
    del rounding
    return _on_common_scale(a, b, params, target, apply_scale_32)


def _on_common_scale(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, multiply: Multiply
) -> IntArray:
    """Both operands on the grid `2 max(s_a, s_b) / 2^k`, added there, then on the grid of the output."""
    shift = 15 if target.grid.bits > 8 else 20
    scales = [np.float64(p.scale) for p in params]
    twice = 2.0 * max(scales)
    total: Any = 0
    for codes, p, scale in zip((a, b), params, scales, strict=True):
        lifted = (codes.astype(np.int64) - int(p.zero_point)) << shift
        total = total + multiply(lifted, *quantize_multiplier(np.asarray(scale / twice)))
    real = twice / (2.0**shift * np.float64(target.scale))
    steps = multiply(total, *quantize_multiplier(np.asarray(real)))
    return numerics.saturated(steps + target.zero_point, target.grid)


def apply_scale_32(values: Array, mantissa: Array, exponent: Array) -> Array:
    """`values q 2^e / 2^31` rounded half up, once (TOSA's apply_scale_32 with single rounding), int64."""
    return shift_half_up(values.astype(np.int64) * mantissa, 31 - np.asarray(exponent, np.int64))


def add_xnnpack(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the sum as XNNPACK's qs8-vadd computes it, with multipliers of at most 21 bits; see the module.

    Beyond the ratios that XNNPACK takes, [2^-10, 2^8), and for 16 bits, TensorFlow Lite's own kernel runs.
    """
    ratios = [np.float32(p.scale) / np.float32(target.scale) for p in params]
    if target.grid.bits > 8 or not all(2.0**-10 <= ratio < 2.0**8 for ratio in ratios):
        return add_tflite(a, b, params, target, rounding)
    shift = 21 - int(np.frexp(max(ratios))[1])
    total: Any = 0
    for codes, p, ratio in zip((a, b), params, ratios, strict=True):
        total = total + (codes.astype(np.int64) - int(p.zero_point)) * int(np.rint(np.ldexp(ratio, shift)))
    steps = shift_half_up(total, np.asarray(shift))
    return numerics.saturated(steps + target.zero_point, target.grid)


def add_float(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the float32 sum of both operands."""
    real = numerics.dequantize(a, params[0]) + numerics.dequantize(b, params[1])
    return numerics.quantize(real, target, rounding)


RULES: Mapping[str, Rule] = {
    "ort": add,
    "tflite": add_tflite,
    "xnnpack": add_xnnpack,
    "tosa": add_tosa,
    "float": add_float,
}
