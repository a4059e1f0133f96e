"""LeakyRelu and PRelu in fixed point.

With `x = c - z_in` and the slope `alpha`, or `(a - z_a) s_a` for PRelu:

| rule | x | code, before the grid clips it |
|---|---|---|
| tflite | x >= 0 | M(x, float32(s_in / s_out)) + z_out |
|  | x < 0 | LeakyRelu: sign(alpha) M(x, abs float32(float32(s_in alpha) / s_out)) + z_out |
|  | x < 0 | PRelu: M(x (a - z_a), float32(float32(s_in s_a) / s_out)) + z_out |
| xnnpack | x >= 0 | (x m + 128) >> 8, + z_out, m = rint(256 r), r = float32(s_in / s_out) |
|  | x < 0 | (x m + 128) >> 8, + z_out, m = rint(256 float32(r alpha)) |
| tosa | any | fixed31_single(x, s_in / s_out), below zero of s_in alpha / s_out, + z_out |

`M(x, m)` multiplies by a fixed-point multiplier (`requantize.quantize_multiplier`). XNNPACK's multiplier has 8 bits
after the point, so its codes can be one off the real function's. It has no PRelu for 8 bits: TensorFlow Lite's own
kernel runs instead.

Sources: TensorFlow Lite's activations.cc, reference/leaky_relu.h and reference/prelu.h (tflite); XNNPACK's
`xnn_init_qs8_lrelu_scalar_params` in microparams-init.c and src/qs8-vlrelu (xnnpack).
"""

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt

from onnxqt import numerics
from onnxqt.numerics import IntArray, QParams, Rounding
from onnxqt.requantize import (
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    requantization,
    rounded,
    shift_half_up,
)

LeakyRule = Callable[[IntArray, np.float32, tuple[QParams, QParams | None], QParams, Rounding], IntArray]
PreluRule = Callable[[IntArray, IntArray, tuple[QParams, QParams], QParams, Rounding], IntArray]


def leaky_relu_tflite(
    codes: IntArray,
    alpha: np.float32,
    params: tuple[QParams, QParams | None],
    target: QParams,
    rounding: Rounding = "even",
) -> IntArray:
    """Codes of LeakyRelu as TensorFlow Lite computes it; see the module. Only the first of `params` is read."""
    del rounding
    x = codes.astype(np.int64) - int(params[0].zero_point)
    scale, slope = np.float32(params[0].scale), np.float32(alpha)
    above = _scaled(x, scale / np.float32(target.scale))
    below = _scaled(x, np.abs(scale * slope / np.float32(target.scale)))
    steps = np.where(x >= 0, above, below if slope >= 0 else -below)
    return numerics.saturated(steps + target.zero_point, target.grid)


def leaky_relu_xnnpack(
    codes: IntArray,
    alpha: np.float32,
    params: tuple[QParams, QParams | None],
    target: QParams,
    rounding: Rounding = "even",
) -> IntArray:
    """Codes of LeakyRelu as XNNPACK computes it; see the module. Only the first of `params` is read.

    Beyond the ratios that XNNPACK takes (1/256 to 128, for the slope in size too), and for 16 bits, TensorFlow Lite's
    own kernel runs.
    """
    above = np.float32(params[0].scale) / np.float32(target.scale)
    below = above * np.float32(alpha)
    smallest, largest, most_negative = np.float32(2**-8), np.float32(128), np.float32(-127.99609375)
    taken = smallest <= above <= largest and smallest <= abs(below) and most_negative <= below <= largest
    if target.grid.bits > 8 or not taken:
        return leaky_relu_tflite(codes, alpha, params, target, rounding)
    x = codes.astype(np.int64) - int(params[0].zero_point)
    multiplier = np.where(x >= 0, int(np.rint(np.float32(256) * above)), int(np.rint(np.float32(256) * below)))
    steps = shift_half_up(x * multiplier, np.asarray(8))
    return numerics.saturated(steps + target.zero_point, target.grid)


def prelu_tflite(
    codes: IntArray, alpha: IntArray, params: tuple[QParams, QParams], target: QParams, rounding: Rounding = "even"
) -> IntArray:
    """Codes of PRelu as TensorFlow Lite computes it; see the module. `alpha` are codes that broadcast to `codes`."""
    del rounding
    source, slope = params
    x = codes.astype(np.int64) - int(source.zero_point)
    scale, out = np.float32(source.scale), np.float32(target.scale)
    above = _scaled(x, scale / out)
    product = x * (alpha.astype(np.int64) - int(slope.zero_point))
    below = _scaled(product, scale * np.float32(slope.scale) / out)
    steps = np.where(x >= 0, above, below)
    return numerics.saturated(steps + target.zero_point, target.grid)


def _scaled(values: npt.NDArray[np.int64], multiplier: np.float32) -> npt.NDArray[np.int64]:
    """`values` times a fixed-point multiplier >= 0, int64."""
    return np.asarray(multiply_by_quantized_multiplier(values, *quantize_multiplier(np.asarray(multiplier))), np.int64)


def leaky_relu_tosa(
    codes: IntArray,
    alpha: np.float32,
    params: tuple[QParams, QParams | None],
    target: QParams,
    rounding: Rounding = "even",
) -> IntArray:
    """Codes of LeakyRelu as two TOSA RESCALEs with single rounding; see the module. Only the first of `params` is read.

    For a slope below zero the rule is not defined: the magnitude is scaled and the sign put back.
    """
    del rounding
    x = codes.astype(np.int64) - int(params[0].zero_point)
    one, size = np.ones((), np.float32), np.asarray(abs(np.float32(alpha)), np.float32)
    above = rounded(x, requantization("fixed31_single", params[0].scale, one, target))
    below = rounded(x, requantization("fixed31_single", params[0].scale, size, target))
    steps = np.where(x >= 0, above, below if alpha >= 0 else -below)
    return numerics.saturated(steps + target.zero_point, target.grid)


RULES: Mapping[str, LeakyRule] = {
    "tflite": leaky_relu_tflite,
    "xnnpack": leaky_relu_xnnpack,
    "tosa": leaky_relu_tosa,
}
PRELU_RULES: Mapping[str, PreluRule] = {"tflite": prelu_tflite, "xnnpack": prelu_tflite}
