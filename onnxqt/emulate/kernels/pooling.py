"""Largest and mean values: MaxPool, AveragePool, GlobalAveragePool, ReduceMean.

Averages under a window, of n elements:

| rule | code, before the grid clips it |
|---|---|
| ort | round_half_even(float32 sum of the reals / n / s_out + z_out), the zero point before rounding |
| tflite | sum of the codes / n, rounded half away from zero; one grid |
| tosa | ((sum of (c - z)) m + 2^(s-1)) >> s, + z, with m / 2^s about 1 / n; one grid |
| dpu | sum of (c - z_in) * m / 2^s * s_in / s_out, rounded half up, + z_out; m / 2^s about 1 / n |
| openvino | round_half_even(float32(sum of (c - z_in)) / n * factor + z_out), factor about s_in / s_out |
| float | round(float32(sum of (c - z_in)) * s_in / n / s_out) + z_out |

Means over whole axes, of n elements:

| rule | code, before the grid clips it |
|---|---|
| ort | round_half_even(float32(sum of (c - z_in)) * float32(s_in / float32(s_out n))) + z_out |
| tflite | M(sum of (c - z_in), q) + z_out, q the multiplier of s_in / s_out, its mantissa divided by n |
| ruy | over both spatial axes: M(sum of c, float32(s_in / (n s_out))) + z_out - round(z_in s_in / s_out) |
|  | else as tflite |
| xnnpack | round_half_even(float32(sum of c) * m + float32(z_out - n z_in m)), m = float32(s_in / s_out * (1 / n)) |
| tosa | fixed31_single(sum of (c - z_in), s_in / (s_out n)) + z_out |
| openvino, float | as the average |

`M(x, m)` multiplies by a fixed-point multiplier (`requantize.quantize_multiplier`).

Sources: ONNX Runtime's QLinearAveragePool and QLinearGlobalAveragePool (ort); TensorFlow Lite's
reference/integer_ops/pooling.h and reference/reduce.h (tflite), optimized/integer_ops/mean.h (ruy); XNNPACK's
operators/reduce-nd.c (xnnpack); the TOSA specification, AVG_POOL2D and reciprocal_scale (tosa); Vitis AI's pooling.py
(dpu).
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from onnxqt import numerics
from onnxqt.emulate.kernels.tables import same_grid
from onnxqt.emulate.kernels.windows import Window, taps
from onnxqt.numerics import Array, IntArray, QParams
from onnxqt.profiles import Arithmetic
from onnxqt.requantize import (
    Requantization,
    multiply_by_quantized_multiplier,
    multiply_half_up,
    openvino_scaling,
    quantize_multiplier,
    requantization,
    requantize,
    shift_half_up,
)

AverageRule = Callable[[IntArray, Window, bool, tuple[QParams, QParams], Arithmetic], IntArray]
MeanRule = Callable[[IntArray, tuple[int, ...], bool, tuple[QParams, QParams], Arithmetic], IntArray]
# Kernels whose 1 / n the DPU has as a fixed fraction (m, s) of its own, m / 2^s (Vitis AI, pooling.py).
_DPU_FRACTIONS: Mapping[tuple[int, ...], tuple[int, int]] = {
    (3, 3): (7, 6),
    (5, 5): (10, 8),
    (6, 6): (7, 8),
    (3, 6): (7, 7),
    (6, 3): (7, 7),
    (7, 7): (21, 10),
    (14, 14): (21, 12),
}


def max_pool(codes: IntArray, window: Window, qmin: int) -> IntArray:
    """Largest code under each window; the padding never wins."""
    views = (view for _, view in taps(codes, window, qmin))
    best = next(views).copy()
    for view in views:
        np.maximum(best, view, out=best)
    return best


def average_pool(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window, as ONNX Runtime's QLinearAveragePool computes it.

    code = clip(round_half_even(float32(sum of (c - z_in) * s_in) / n / s_out + z_out))

    The sum runs in float32 in row-major order over the window and the zero point is added BEFORE rounding,
    unlike everywhere else. n is the kernel size with `count_include_pad`, else the elements that are not
    padding; a window without any gives the zero point.
    """
    del arithmetic  # the rule has its own rounding
    source, target = params
    total: Any = np.float32(0)
    for _, view in taps(numerics.dequantize(codes, source), window, 0.0):
        total = total + view
    count = _elements(codes, window, count_include_pad).astype(np.float32)
    steps = total / count / np.float32(target.scale) + np.float32(target.zero_point)
    limited = np.clip(numerics.round_half_even(steps), target.grid.qmin, target.grid.qmax)
    return np.asarray(limited).astype(np.int32)


def average_pool_tflite(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window, as TensorFlow Lite computes it: an integer division of the codes.

    code = trunc((sum + n/2 (below zero: - n/2)) / n),  n/2 rounded down

    Raises:
        ValueError: if input and output have different grids, which AVERAGE_POOL_2D does not take.
    """
    del arithmetic
    source, target = _one_grid(params)
    total = _window_sum(codes, window, int(source.zero_point) if count_include_pad else 0)
    count = _elements(codes, window, count_include_pad)
    magnitude = (np.abs(total) + count // 2) // count
    return numerics.saturated(np.sign(total) * magnitude, target.grid)


def average_pool_tosa(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window, as TOSA's AVG_POOL2D computes it.

    code = ((sum of (c - z)) m + 2^(s-1)) >> s, + z;  m = floor((2^30 + 1) 2^k / n), s = 30 + k, k the bits of n - 1

    Raises:
        ValueError: if input and output have different grids, which AVG_POOL2D does not take.
    """
    del arithmetic
    source, target = _one_grid(params)
    total = _window_sum(codes, window, int(source.zero_point)) - _kernel_size(window) * int(source.zero_point)
    count = _elements(codes, window, count_include_pad)
    bits = np.vectorize(lambda n: int(n - 1).bit_length(), otypes=[np.int64])(count)
    mantissa = (((1 << 30) + 1) << bits) // count
    return numerics.saturated(shift_half_up(total * mantissa, 30 + bits) + target.zero_point, target.grid)


def average_pool_dpu(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window, as the DPU approximates it: an integer factor and a shift.

    code = (sum of (c - z_in)) m 2^(k - s) rounded half up, + z_out;  s_in / s_out = 2^k

    m / 2^s is the device's own for some kernels, else the nearest fraction to 1 / n with `s < log2(128 n)`. Padding
    counts as the real 0, in n too.

    Raises:
        ValueError: if the scales are not powers of two.
    """
    del count_include_pad, arithmetic  # the device divides by the size of the kernel
    source, target = params
    fraction, exponent = np.frexp(np.float64(source.scale) / np.float64(target.scale))
    if fraction != 0.5:
        raise ValueError(
            f"the dpu average needs scales that are powers of two, got {source.scale:.6g} and {target.scale:.6g}"
        )
    total = _window_sum(codes, window, int(source.zero_point)) - _kernel_size(window) * int(source.zero_point)
    factor, shift = dpu_fraction(window.kernel)
    shift -= int(exponent) - 1
    steps = shift_half_up((total * factor) << max(-shift, 0), np.asarray(max(shift, 0)))
    return numerics.saturated(steps + target.zero_point, target.grid)


def dpu_fraction(kernel: tuple[int, ...]) -> tuple[int, int]:
    """(m, s) with `m / 2^s` about one over the size of the kernel (Vitis AI, pooling.py)."""
    if kernel in _DPU_FRACTIONS:
        return _DPU_FRACTIONS[kernel]
    size = int(np.prod(kernel))
    ways = [(round((1 << s) / size), s) for s in range((128 * size - 1).bit_length())]
    return min(ways, key=lambda way: abs(way[0] / (1 << way[1]) - 1 / size))


def average_pool_float(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window: an exact sum, the rest in float32, rounded once."""
    zero_point = int(params[0].zero_point)
    total = _window_sum(codes, window, zero_point) - _kernel_size(window) * zero_point
    return _float_mean(total, _elements(codes, window, count_include_pad), params, arithmetic)


def average_pool_openvino(
    codes: IntArray, window: Window, count_include_pad: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean under each window, as OpenVINO computes it; see `_openvino_mean`."""
    del arithmetic
    zero_point = int(params[0].zero_point)
    total = _window_sum(codes, window, zero_point) - _kernel_size(window) * zero_point
    return _openvino_mean(total, _elements(codes, window, count_include_pad), params)


def _openvino_mean(total: Array, count: Any, params: tuple[QParams, QParams]) -> IntArray:
    """Codes of sums of `c - z_in`: their mean in float32, its scale within the FakeQuantize that follows.

    code = round_half_even(float32(total) / n * factor + z_out);  see `requantize.openvino_scaling`
    """
    factor, shift = openvino_scaling(Requantization("openvino", params[1], np.asarray(params[0].scale, np.float32)))
    mean_codes = np.asarray(total, np.float32) / np.asarray(count, np.float32)
    return numerics.saturated(numerics.round_half_even(np.asarray(mean_codes * factor + shift)), params[1].grid)


def _float_mean(total: Array, count: Any, params: tuple[QParams, QParams], arithmetic: Arithmetic) -> IntArray:
    real = total.astype(np.float32) * np.float32(params[0].scale) / np.asarray(count, np.float32)
    return numerics.quantize(np.asarray(real), params[1], arithmetic.quantize)


def _one_grid(params: tuple[QParams, QParams]) -> tuple[QParams, QParams]:
    if not same_grid(*params):
        raise ValueError(
            f"this average needs one grid for input and output, got scales {params[0].scale:.6g} and "
            f"{params[1].scale:.6g}: let pooling keep the grid of its input"
        )
    return params


def _window_sum(codes: IntArray, window: Window, fill: int) -> Array:
    """Sum of the codes under each window, int64, the padding as `fill`."""
    total: Any = np.int64(0)
    for _, view in taps(codes.astype(np.int64), window, fill):
        total = total + view
    return np.asarray(total)


def _kernel_size(window: Window) -> int:
    return int(np.prod(window.kernel))


def _elements(codes: IntArray, window: Window, count_include_pad: bool) -> Array:
    """How many elements each window averages, int64, at least 1: all with `count_include_pad`, else those inside."""
    if count_include_pad:
        return np.asarray(_kernel_size(window), np.int64)
    inside: Any = sum(view for _, view in taps(np.ones((1, 1, *codes.shape[2:]), np.int64), window, 0))
    return np.asarray(np.maximum(inside, 1))


def mean(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`: ONNX Runtime's QLinearGlobalAveragePool, for any axes.

    code = requantize(sum of (c - z_in), float32(s_in / float32(s_out * n)))
    """
    del arithmetic
    source, target = params
    total, count = _axis_sum(codes, axes, keepdims)
    factor = np.float32(source.scale) / (np.float32(target.scale) * np.float32(count))
    how = Requantization("float32_even", target, np.asarray(factor))
    return requantize(total - count * int(source.zero_point), how)


def mean_tflite(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`, as TensorFlow Lite's reference kernel computes it.

    code = M(sum of (c - z_in), (q 2^h / n) 2^(e - h)) + z_out;  h = min(floor(log2 n), 32, 31 + e)

    (q, e) is the multiplier of s_in / s_out and `q 2^h / n` is rounded down.
    """
    del arithmetic
    source, target = params
    total, count = _axis_sum(codes, axes, keepdims)
    real = np.float64(source.scale) / np.float64(target.scale)
    mantissa, exponent = quantize_multiplier(np.asarray(real))
    shift = min(count.bit_length() - 1, 32, 31 + int(exponent))
    mantissa = np.asarray((int(mantissa) << shift) // count, np.int64)
    steps = multiply_by_quantized_multiplier(total - count * int(source.zero_point), mantissa, exponent - shift)
    return numerics.saturated(steps + target.zero_point, target.grid)


def mean_ruy(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`, as TensorFlow Lite's optimized kernels compute it on x86.

    Both spatial axes of 4-D codes of 8 bits, kept as ones, take their own kernel; any other mean is the reference's:

    code = M(sum of c, float32(s_in / (n s_out))) + z_out - trunc(b + 1/2 (below zero: b - 1/2)),  b = z_in s_in / s_out

    Its vectors of 16 channels round the second step of M half up, the channels that are left over half away.
    """
    source, target = params
    if not (keepdims and codes.ndim == 4 and sorted(axes) == [2, 3] and source.grid.bits == 8):
        return mean_tflite(codes, axes, keepdims, params, arithmetic)
    total, count = _axis_sum(codes, axes, keepdims)
    s_in, s_out = np.float32(source.scale), np.float32(target.scale)
    moved = np.float32(source.zero_point) * s_in / s_out
    offset = int(target.zero_point) - int(moved + np.copysign(np.float32(0.5), moved))
    mantissa, exponent = quantize_multiplier(np.asarray(s_in / (np.float32(count) * s_out)))
    vectors = total.shape[1] // 16 * 16
    head = multiply_half_up(total[:, :vectors], mantissa, exponent)
    tail = multiply_by_quantized_multiplier(total[:, vectors:], mantissa, exponent)
    return numerics.saturated(np.concatenate([head, tail], axis=1) + offset, target.grid)


def mean_xnnpack(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`, as XNNPACK computes it: one float32 factor and the zero points before rounding.

    code = round_half_even(float32(sum of c) m + float32(z_out - float32(n z_in m)));  m = float32(s_in / s_out) (1 / n)

    For 16 bits TensorFlow Lite's own kernel runs.
    """
    source, target = params
    if target.grid.bits > 8:
        return mean_tflite(codes, axes, keepdims, params, arithmetic)
    total, count = _axis_sum(codes, axes, keepdims)
    factor = np.float32(source.scale) / np.float32(target.scale) * (np.float32(1) / np.float32(count))
    offset = np.float32(target.zero_point) - np.float32(count * int(source.zero_point)) * factor
    codes_out = numerics.round_half_even(np.asarray(total.astype(np.float32) * factor + offset))
    return numerics.saturated(codes_out, target.grid)


def mean_tosa(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`, as a sum and one TOSA RESCALE with single rounding.

    code = fixed31_single(sum of (c - z_in), s_in / (s_out n)) + z_out
    """
    del arithmetic
    source, target = params
    total, count = _axis_sum(codes, axes, keepdims)
    how = requantization("fixed31_single", source.scale, np.asarray(1 / count), target)
    return requantize(total - count * int(source.zero_point), how)


def mean_openvino(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`, as OpenVINO computes it; see `_openvino_mean`."""
    del arithmetic
    total, count = _axis_sum(codes, axes, keepdims)
    return _openvino_mean(total - count * int(params[0].zero_point), count, params)


def mean_float(
    codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams], arithmetic: Arithmetic
) -> IntArray:
    """Codes of the mean over `axes`: an exact sum, the rest in float32, rounded once."""
    total, count = _axis_sum(codes, axes, keepdims)
    return _float_mean(total - count * int(params[0].zero_point), count, params, arithmetic)


def _axis_sum(codes: IntArray, axes: tuple[int, ...], keepdims: bool) -> tuple[Array, int]:
    """Sum of the codes over `axes`, int64, and of how many."""
    total = np.asarray(np.sum(codes, axis=axes, keepdims=keepdims, dtype=np.int64))
    return total, int(np.prod([codes.shape[axis] for axis in axes]))


AVERAGE_RULES: Mapping[str, AverageRule] = {
    "ort": average_pool,
    "tflite": average_pool_tflite,
    "tosa": average_pool_tosa,
    "dpu": average_pool_dpu,
    "openvino": average_pool_openvino,
    "float": average_pool_float,
}
MEAN_RULES: Mapping[str, MeanRule] = {
    "ort": mean,
    "tflite": mean_tflite,
    "ruy": mean_ruy,
    "xnnpack": mean_xnnpack,
    "tosa": mean_tosa,
    "openvino": mean_openvino,
    "float": mean_float,
}
