"""Functions of one code: a table of what every code of the source grid becomes.

| transfer rule | code on another grid |
|---|---|
| ort | round_half_even(float32((c - z_in) s_in) / s_out) + z_out (ONNX Runtime's DequantizeLinear and QuantizeLinear) |
| affine | the real value, rounded as `numerics.quantize` does "affine" (OpenVINO) |
| xnnpack | ((c - z_in) m + 128) >> 8, + z_out, m = rint(256 float32(s_in / s_out)) |

| table rule | code of a real f |
|---|---|
| even, away, up | round(f / s_out) + z_out, ties as the name says |
| tflite | round_half_away(f float32(1 / s_out)) + z_out |
| xnnpack | round_half_even(f float32(1 / s_out) + z_out) |

Sources: XNNPACK's qs8-vcvt (xnnpack), TensorFlow Lite's lookup tables (`LUTPopulate`, tflite).
"""

import functools
import math
from collections.abc import Callable, Mapping

import numpy as np

from onnxqt import numerics
from onnxqt.numerics import Array, FloatArray, IntArray, QParams
from onnxqt.requantize import shift_half_up


def same_grid(a: QParams, b: QParams) -> bool:
    """Whether equal codes mean equal reals."""
    return bool(a.grid == b.grid and a.scale == b.scale and a.zero_point == b.zero_point)


def every_code(params: QParams) -> IntArray:
    """All codes of a grid, the smallest first, int32."""
    return np.arange(params.grid.qmin, params.grid.qmax + 1, dtype=np.int32)


def transfer_ort(source: QParams, target: QParams) -> IntArray:
    """The code on the target grid of every code of the source grid; see the module."""
    return numerics.quantize(numerics.dequantize(every_code(source), source), target)


def transfer_affine(source: QParams, target: QParams) -> IntArray:
    """The code on the target grid of every code of the source grid; see the module."""
    return numerics.quantize(numerics.dequantize(every_code(source), source), target, "affine")


def transfer_xnnpack(source: QParams, target: QParams) -> IntArray:
    """The code on the target grid of every code of the source grid; see the module."""
    multiplier = int(np.rint(np.float32(256) * (np.float32(source.scale) / np.float32(target.scale))))
    steps = shift_half_up((every_code(source).astype(np.int64) - int(source.zero_point)) * multiplier, np.asarray(8))
    return numerics.saturated(steps + target.zero_point, target.grid)


def entries_tflite(real: Array, target: QParams) -> IntArray:
    """Codes of the values of a function; see the module."""
    steps = numerics.round_half_away(real.astype(np.float32) * (np.float32(1) / np.float32(target.scale)))
    return numerics.saturated(steps + target.zero_point.astype(np.float32), target.grid)


def entries_xnnpack(real: Array, target: QParams) -> IntArray:
    """Codes of the values of a function; see the module."""
    inverse = np.float32(1) / np.float32(target.scale)
    steps = real.astype(np.float32) * inverse + target.zero_point.astype(np.float32)
    return numerics.saturated(numerics.round_half_even(steps), target.grid)


def gelu(x: FloatArray) -> FloatArray:
    """`0.5 x erfc(-x / sqrt(2))` in float32."""
    return np.asarray(np.float32(0.5) * x * _by_libm(math.erfc, -x * np.float32(math.sqrt(0.5))), np.float32)


def sigmoid(x: FloatArray) -> FloatArray:
    """`1 / (1 + exp(-x))` in float32."""
    return np.asarray(np.float32(1) / (np.float32(1) + _by_libm(math.exp, np.minimum(-x, np.float32(80)))), np.float32)


def tanh(x: FloatArray) -> FloatArray:
    """`tanh(x)` in float32."""
    return _by_libm(math.tanh, x)


def _by_libm(function: Callable[[float], float], x: FloatArray) -> FloatArray:
    """A function of the C library in double precision, rounded to float32."""
    return np.asarray([function(float(value)) for value in x], np.float32)


TRANSFER_RULES: Mapping[str, Callable[[QParams, QParams], IntArray]] = {
    "ort": transfer_ort,
    "affine": transfer_affine,
    "xnnpack": transfer_xnnpack,
}
# How TensorFlow Lite and XNNPACK write functions whose values differ from ONNX Runtime's in the last bit.
FUNCTIONS: Mapping[str, Callable[[FloatArray], FloatArray]] = {"Gelu": gelu, "Sigmoid": sigmoid, "Tanh": tanh}
TABLE_RULES: Mapping[str, Callable[[Array, QParams], IntArray]] = {
    "even": functools.partial(numerics.quantize, rounding="even"),
    "away": functools.partial(numerics.quantize, rounding="away"),
    "up": functools.partial(numerics.quantize, rounding="up"),
    "tflite": entries_tflite,
    "xnnpack": entries_xnnpack,
}
