"""From accumulators to codes: the rule of each device, in exact integer arithmetic or in the floats it uses.

An accumulator `acc` is an exact integer on the grid `s_in s_w`; its code is about `acc M + z`, where

    M = s_in * s_w / s_out

is real and no device has it exactly. The rules differ in how `M` is represented and where a tie goes:

| rule | code, before the zero point is added and the grid clips it |
|---|---|
| float32_even | round_half_even(float32(acc) * float32(float32(s_in s_w) / s_out)) |
| float32_away | the same, ties away from zero |
| float64_away | round_half_away(float64(acc) * M), M in float64 |
| gemmlowp_double | (acc 2^max(e, 0)) q / 2^31 rounded half up, then / 2^n rounded half away from zero |
| ruy_double | the same, both rounded half up |
| ruy_vectors | channels in whole vectors of 8 as ruy_double, the ones left over as gemmlowp_double |
| fixed31_single | (acc q) / 2^(31 - e) rounded half up |
| fixed15_single | (acc q15) / 2^(15 - e) rounded half up |
| fixed16_away | (acc q15) / 2^(15 - e) rounded half away from zero |
| shift_up | acc / 2^n rounded half up; M is a power of two |
| ncnn | round_half_away((float32(acc) / (s_in s_w) + bias) * s_out), s the reciprocal scales, all float32 |
| float32_bias | round_half_even((float32(acc) * float32(s_in s_w) + bias) / s_out), all float32 |
| openvino | round_half_even(fma(float32(acc) * float32(s_in s_w) + bias, factor, shift)) - z, see `openvino_scaling` |

`M = q 2^e / 2^31` with `2^30 <= q < 2^31` (QuantizeMultiplier of TensorFlow Lite, `quantization_util.cc`);
`n = max(-e, 0)`; `q15` is q rounded to 16 bits. Sources: gemmlowp's fixedpoint.h and TensorFlow Lite's common.h
(gemmlowp_double), ruy's apply_multiplier.cc (ruy_double), the TOSA specification's apply_scale_32 and apply_scale_16
(fixed31_single, fixed15_single), NVDLA's precision.rst (fixed16_away), Vitis AI's Quant_Config.md (shift_up).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt.numerics import Array, FloatArray, IntArray, QParams, affine, round_half_away, round_half_even, saturated

Fixed = tuple[Array, Array]  # q, int64; e, int32
_SHORT = ("fixed15_single", "fixed16_away")  # rules with a mantissa of 16 bits
_WIDEST = 1 << 32  # int64 holds its product with a mantissa of 31 bits; what lies beyond saturates on any grid


@dataclass(frozen=True, eq=False, slots=True)
class Requantization:
    """How the accumulators of one node become codes.

    Attributes:
        rule: see the module.
        target: the grid of the codes, per tensor.
        multiplier: M as the rule has it, float32 or float64, () or (channels,).
        mantissa: q (or q15) of the fixed-point rules, int64, like `multiplier`; None elsewhere.
        exponent: e of the fixed-point rules, int32, like `multiplier`; None elsewhere.
        bias: of the rules that add it in float: float32 (channels,); None elsewhere.
    """

    rule: str
    target: QParams
    multiplier: Array
    mantissa: Array | None = None
    exponent: Array | None = None
    bias: FloatArray | None = None

    def spread(self, axis: int, rank: int) -> "Requantization":
        """The same with per-channel values along `axis` of accumulators of rank `rank`."""
        shape = [-1 if i == axis % rank else 1 for i in range(rank)]

        def along(values: Any) -> Any:
            return values if values is None or not values.ndim else values.reshape(shape)

        parts = (self.multiplier, self.mantissa, self.exponent, self.bias)
        return Requantization(self.rule, self.target, *map(along, parts))


class ScaleError(Exception):
    """Why a rule cannot have these scales; completes "its accumulators cannot be requantized: "."""


def requantization(
    rule: str, source: FloatArray, weight: FloatArray, target: QParams, bias: FloatArray | None = None
) -> Requantization:
    """What a rule makes of the scales of a node.

    Args:
        rule: see the module.
        source: scale of the input, float32 ().
        weight: scale of the weights, float32 () or (channels,).
        target: grid of the output.
        bias: float bias (channels,) for the rules that add it in float, on accumulators without it.

    Raises:
        ScaleError: if the rule cannot have these scales.
    """
    if rule in ("float32_even", "float32_away"):
        product = np.float32(source) * np.asarray(weight, np.float32)
        return Requantization(rule, target, np.asarray(product / np.float32(target.scale), np.float32))
    if rule == "ncnn":
        inverse = (np.float32(1) / np.float32(source)) * (np.float32(1) / np.asarray(weight, np.float32))
        return Requantization(rule, target, np.asarray(np.float32(1) / inverse, np.float32), bias=bias)
    if rule in ("float32_bias", "openvino"):
        return Requantization(rule, target, np.asarray(np.float32(source) * weight, np.float32), bias=bias)
    real = np.asarray(np.float64(source) * np.asarray(weight, np.float64) / np.float64(target.scale))
    if rule == "float64_away":
        return Requantization(rule, target, real)
    if rule == "shift_up":
        fraction, exponent = np.frexp(real)
        if np.any(fraction != 0.5):
            raise ScaleError("its scales are not powers of two")
        return Requantization(rule, target, real, np.ones_like(exponent, np.int64), exponent - 1)
    mantissa, exponent = quantize_multiplier(real)
    if rule in _SHORT:
        mantissa = np.where(mantissa >= 0x7FFF0000, 0x7FFF, (mantissa + (1 << 15)) >> 16)
    return Requantization(rule, target, real, mantissa, exponent)


def quantize_multiplier(real: Array) -> Fixed:
    """(q, e) with `real = q 2^e / 2^31`, 2^30 <= q < 2^31; (0, 0) where e would be under -31.

    QuantizeMultiplier of TensorFlow Lite (`tflite/kernels/internal/quantization_util.cc`).
    """
    fraction, exponent = np.frexp(np.asarray(real, np.float64))
    mantissa = np.asarray(round_half_away(fraction * 2.0**31)).astype(np.int64)
    over = mantissa == 1 << 31
    mantissa, exponent = np.where(over, mantissa // 2, mantissa), np.where(over, exponent + 1, exponent)
    tiny = exponent < -31
    return np.where(tiny, 0, mantissa), np.where(tiny, 0, exponent).astype(np.int32)


def effective_multiplier(how: Requantization) -> Array:
    """M as the rule represents it, float64."""
    if how.mantissa is None or how.exponent is None:
        return np.asarray(how.multiplier, np.float64)
    bits = 15 if how.rule in _SHORT else 0 if how.rule == "shift_up" else 31
    return np.ldexp(how.mantissa.astype(np.float64), how.exponent.astype(np.int64) - bits)


def requantize(acc: Array, how: Requantization) -> IntArray:
    """Codes of exact integer accumulators, int32, same shape; see the module for the formulas.

    The per-channel values of `how` must broadcast to `acc` (see `Requantization.spread`).
    """
    steps = rounded(acc, how)
    zero_point = how.target.zero_point
    return saturated(steps + zero_point.astype(steps.dtype), how.target.grid)


def rounded(acc: Array, how: Requantization) -> Array:
    """The integer that a rule makes of each accumulator, before the zero point and the limits of the grid."""
    return _RULES[how.rule](acc, how)


def _float32_even(acc: Array, how: Requantization) -> Array:
    steps = acc.astype(np.float32)
    steps *= how.multiplier
    return round_half_even(steps)


def _float32_away(acc: Array, how: Requantization) -> Array:
    return round_half_away(acc.astype(np.float32) * how.multiplier)


def _float64_away(acc: Array, how: Requantization) -> Array:
    return round_half_away(acc.astype(np.float64) * how.multiplier)


def _ncnn(acc: Array, how: Requantization) -> Array:
    real = acc.astype(np.float32) * how.multiplier
    if how.bias is not None:
        real = real + how.bias
    return round_half_away(real * (np.float32(1) / np.float32(how.target.scale)))


def _float32_bias(acc: Array, how: Requantization) -> Array:
    real = acc.astype(np.float32) * how.multiplier
    if how.bias is not None:
        real = real + how.bias
    return round_half_even(real / np.float32(how.target.scale))


def _openvino(acc: Array, how: Requantization) -> Array:
    """See `openvino_scaling`; the product of a scaled sum and the step is fused with the addition of the shift."""
    ratio, shift = openvino_scaling(how)
    real = acc.astype(np.float32) * (ratio if how.bias is None else how.multiplier)
    if how.bias is None:
        codes = real + shift
    else:
        codes = ((real + how.bias).astype(np.float64) * ratio + shift).astype(np.float32)
    return round_half_even(codes) - how.target.zero_point.astype(np.float32)


def openvino_scaling(how: Requantization) -> tuple[Array, Array]:
    """(factor, shift) of the FakeQuantize that OpenVINO makes of a QuantizeLinear, float32.

    lo = (qmin - z) s_out,  hi = (qmax - z) s_out,  n = qmax - qmin
    with a bias      factor = n / (hi - lo),          shift = -lo n / (hi - lo) + qmin
    without          factor = n / (hi / M - lo / M),  shift = z

    so that neither is exactly 1 / s_out or z. Without a bias M, the scale of the accumulators, moves into the
    FakeQuantize. (OpenVINO's FakeQuantize node and its low precision transformations.)
    """
    if how.bias is not None:
        return affine(how.target)
    low, high = how.target.range
    steps = np.float32(how.target.grid.qmax - how.target.grid.qmin)
    ratio = steps / (high / how.multiplier - low / how.multiplier)
    return np.asarray(ratio, np.float32), how.target.zero_point.astype(np.float32)


def _fixed(how: Requantization) -> Fixed:
    if how.mantissa is None or how.exponent is None:
        raise ValueError(f"rule {how.rule} needs a mantissa and an exponent")
    return how.mantissa, how.exponent.astype(np.int64)


def _gemmlowp_double(acc: Array, how: Requantization) -> Array:
    mantissa, exponent = _fixed(how)
    return multiply_by_quantized_multiplier(acc, mantissa, exponent)


def multiply_by_quantized_multiplier(acc: Array, mantissa: Array, exponent: Array) -> Array:
    """`acc q 2^e / 2^31`, rounded half up, then half away from zero, int64 (MultiplyByQuantizedMultiplier).

    high = trunc((acc 2^max(e, 0) q + (2^30 or, below zero, 1 - 2^30)) / 2^31);  high / 2^n, n = max(-e, 0)
    """
    product = acc.astype(np.int64)
    if np.any(exponent > 0):
        product = np.clip(product << np.maximum(exponent, 0), -_WIDEST, _WIDEST)
    product = product * mantissa
    negative = product < 0
    high = (np.abs(product) + np.where(negative, (1 << 30) - 1, 1 << 30)) >> 31
    np.negative(high, out=high, where=negative)
    return rounding_divide_by_power_of_two(high, np.maximum(-np.asarray(exponent), 0))


def rounding_divide_by_power_of_two(values: Array, shift: Array) -> Array:
    """`values / 2^shift` rounded half away from zero, in integers (gemmlowp's RoundingDivideByPOT)."""
    shift = np.asarray(shift, np.int64)
    mask = (np.int64(1) << shift) - 1
    return np.asarray((values >> shift) + ((values & mask) > (mask >> 1) + (values < 0)))


def _ruy_double(acc: Array, how: Requantization) -> Array:
    mantissa, exponent = _fixed(how)
    return multiply_half_up(acc, mantissa, exponent)


def multiply_half_up(acc: Array, mantissa: Array, exponent: Array) -> Array:
    """`acc q 2^e / 2^31`, rounded half up twice, int64 (ruy; TensorFlow Lite's vector code with vqrdmulh and vrshl)."""
    exponent = np.asarray(exponent, np.int64)
    lifted = np.clip(acc.astype(np.int64) << np.maximum(exponent, 0), -_WIDEST, _WIDEST)
    high = (lifted * mantissa + (1 << 30)) >> 31
    return shift_half_up(high, np.maximum(-exponent, 0))


def _ruy_vectors(acc: Array, how: Requantization) -> Array:
    """Channels in whole vectors of 8 as ruy_double, the ones left over as gemmlowp_double.

    TensorFlow Lite's optimized depthwise and transposed convolutions (`Quantize` of optimized/optimized_ops.h): its
    vector code, which x86 has through NEON_2_SSE, rounds with vrshl, the loop for the rest as the reference does.
    """
    mantissa, exponent = _fixed(how)
    if mantissa.size != max(mantissa.shape, default=0):
        raise ValueError(f"rule {how.rule} needs one scale per channel along one axis, got shape {mantissa.shape}")
    vectors = np.arange(mantissa.size).reshape(mantissa.shape) < mantissa.size // 8 * 8
    half_up = multiply_half_up(acc, mantissa, exponent)
    return np.where(vectors, half_up, multiply_by_quantized_multiplier(acc, mantissa, exponent))


def _fixed31_single(acc: Array, how: Requantization) -> Array:
    mantissa, exponent = _fixed(how)
    return shift_half_up(acc.astype(np.int64) * mantissa, 31 - exponent)


def _fixed15_single(acc: Array, how: Requantization) -> Array:
    mantissa, exponent = _fixed(how)
    return shift_half_up(acc.astype(np.int64) * mantissa, 15 - exponent)


def _fixed16_away(acc: Array, how: Requantization) -> Array:
    mantissa, exponent = _fixed(how)
    return rounding_divide_by_power_of_two(acc.astype(np.int64) * mantissa, 15 - exponent)


def _shift_up(acc: Array, how: Requantization) -> Array:
    _, exponent = _fixed(how)
    return shift_half_up(acc.astype(np.int64) << np.maximum(exponent, 0), np.maximum(-exponent, 0))


def shift_half_up(values: Array, shift: Array) -> Array:
    """`values / 2^shift` rounded half up, in integers."""
    shift = np.asarray(shift, np.int64)
    return np.asarray((values + ((np.int64(1) << shift) >> 1)) >> shift)


_RULES: Mapping[str, Callable[[Array, Requantization], Array]] = {
    "float32_even": _float32_even,
    "float32_away": _float32_away,
    "float64_away": _float64_away,
    "gemmlowp_double": _gemmlowp_double,
    "ruy_double": _ruy_double,
    "ruy_vectors": _ruy_vectors,
    "fixed31_single": _fixed31_single,
    "fixed15_single": _fixed15_single,
    "fixed16_away": _fixed16_away,
    "shift_up": _shift_up,
    "ncnn": _ncnn,
    "float32_bias": _float32_bias,
    "openvino": _openvino,
}
RULES = tuple(_RULES)
FLOAT_BIAS = ("ncnn", "float32_bias", "openvino")  # rules that add the bias in float
