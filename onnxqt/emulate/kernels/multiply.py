"""Products of two tensors: Mul.

With `p = (a - z_a) (b - z_b)`, an exact integer:

| rule | code, before the grid clips it |
|---|---|
| ort | round_half_even(float32(p) * float32(float32(s_a s_b) / s_out) + z), the zero point before rounding |
| tflite | M(p, float32(float32(s_a s_b) / s_out)) + z |
| xnnpack | round_half_even(float32(p) * float32(float32(s_a s_b) / s_out)) + z |
| tosa | M(p, float64(s_a s_b / s_out)) + z, rounded once, half up |
| float | round(float32(float32 a * float32 b) / s_out) + z |

`M(p, m)` multiplies by a fixed-point multiplier (`requantize.quantize_multiplier`).

Sources: ONNX Runtime's qlmul.cpp on x86 (ort); TensorFlow Lite's mul.cc and reference/integer_ops/mul.h (tflite);
XNNPACK's `xnn_init_qs8_mul_minmax_scalar_params` in microparams-init.c (xnnpack); the lowering of MUL to MUL and
RESCALE, and apply_scale_32 of the TOSA specification (tosa).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxqt import numerics
from onnxqt.emulate.kernels.add import apply_scale_32
from onnxqt.numerics import Array, IntArray, QParams, Rounding
from onnxqt.requantize import multiply_by_quantized_multiplier, quantize_multiplier

Rule = Callable[[IntArray, IntArray, tuple[QParams, QParams], QParams, Rounding], IntArray]


def multiply(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the product as ONNX Runtime's QLinearMul computes it on x86; see the module."""
    del rounding
    steps = _product(a, b, params).astype(np.float32) * _ratio(params, target)
    codes = numerics.round_half_even(steps + np.float32(target.zero_point))
    return np.clip(codes, target.grid.qmin, target.grid.qmax).astype(np.int32)


def multiply_tflite(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the product as TensorFlow Lite computes it; see the module."""
    del rounding
    mantissa, exponent = quantize_multiplier(_ratio(params, target))
    steps = multiply_by_quantized_multiplier(_product(a, b, params), mantissa, exponent)
    return numerics.saturated(steps + target.zero_point, target.grid)


def multiply_xnnpack(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the product as XNNPACK's qs8-vmul computes it on x86; see the module.

    Beyond the ratios that XNNPACK takes, [2^-16, 2^8), and for 16 bits, TensorFlow Lite's own kernel runs.
    """
    if target.grid.bits > 8 or not 2.0**-16 <= _ratio(params, target) < 2.0**8:
        return multiply_tflite(a, b, params, target, rounding)
    steps = numerics.round_half_even(_product(a, b, params).astype(np.float32) * _ratio(params, target))
    return numerics.saturated(steps + target.zero_point.astype(np.float32), target.grid)


def multiply_tosa(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the product from TOSA's MUL and RESCALE with single rounding; see the module."""
    del rounding
    real = np.float64(params[0].scale) * np.float64(params[1].scale) / np.float64(target.scale)
    steps = apply_scale_32(_product(a, b, params), *quantize_multiplier(np.asarray(real)))
    return numerics.saturated(steps + target.zero_point, target.grid)


def multiply_float(
    a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of the float32 product of both operands."""
    real = numerics.dequantize(a, params[0]) * numerics.dequantize(b, params[1])
    return numerics.quantize(real, target, rounding)


def _product(a: IntArray, b: IntArray, params: tuple[QParams, QParams]) -> Array:
    """`(a - z_a) (b - z_b)`, int64."""
    left, right = (codes.astype(np.int64) - int(p.zero_point) for codes, p in zip((a, b), params, strict=True))
    return np.asarray(left * right)


def _ratio(params: tuple[QParams, QParams], target: QParams) -> Any:
    """`float32(float32(s_a s_b) / s_out)`."""
    return np.float32(params[0].scale) * np.float32(params[1].scale) / np.float32(target.scale)


RULES: Mapping[str, Rule] = {
    "ort": multiply,
    "tflite": multiply_tflite,
    "xnnpack": multiply_xnnpack,
    "tosa": multiply_tosa,
    "float": multiply_float,
}
