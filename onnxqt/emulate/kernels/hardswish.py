"""HardSwish of 8-bit codes in TensorFlow Lite's 16-bit fixed point, which is not a table of the exact function.

Source: TensorFlow Lite's reference/hard_swish.h and `HardSwishPrepare` of activations.cc, gemmlowp's fixedpoint.h.
"""

import numpy as np
import numpy.typing as npt

from onnxqt import numerics
from onnxqt.numerics import IntArray, QParams
from onnxqt.requantize import quantize_multiplier, rounding_divide_by_power_of_two

Int64Array = npt.NDArray[np.int64]


def hard_swish(codes: IntArray, source: QParams, target: QParams) -> IntArray:
    """Codes of `x clip(x + 3, 0, 6) / 6` as all kernels of TensorFlow Lite compute it.

    x = (c - z_in) 2^7, 16 bits
    r = (x / 2^15 on the scale where 2^15 is 3, saturated to 16 bits, + 2^15) >> 1
    code = round(trunc(r (x s_in / (2^7 s_out))' / 2^15) / 2^n) + z_out,  ' with a 15-bit multiplier, n its exponent

    Raises:
        ValueError: if `s_in / (128 s_out)` is 1 or more, which TensorFlow Lite refuses.
    """
    x = (codes.astype(np.int64) - int(source.zero_point)) << 7
    fine = np.float32(source.scale) * np.float32(1 / 128)
    factor, shift = _multiplier16(fine / np.float32(target.scale))
    if shift > 0:
        raise ValueError(
            f"HardSwish takes an output scale over 1/128 of the input's, got {target.scale:.6g} for {source.scale:.6g}"
        )
    moved = _rounded_high(x, factor)
    factor, exponent = _multiplier16(fine / np.float32(3 / 32768))
    share = x
    if exponent > 0:
        share = _saturated16(share << (exponent - 1))
    share = _rounded_high(share, factor)
    share = rounding_divide_by_power_of_two(share, np.asarray(max(-exponent, 0)))
    if exponent > 0:
        share = _saturated16(share << 1)
    share = (share + (1 << 15)) >> 1
    product = share * moved
    steps = rounding_divide_by_power_of_two(np.sign(product) * (np.abs(product) >> 15), np.asarray(-shift))
    return numerics.saturated(steps + target.zero_point, target.grid)


def _multiplier16(real: np.float32) -> tuple[int, int]:
    """(q, e) with `real` about `q 2^e / 2^15`, q of 16 bits (DownScaleInt32ToInt16Multiplier)."""
    mantissa, exponent = quantize_multiplier(np.asarray(real))
    return min((int(mantissa) + (1 << 15)) >> 16, (1 << 15) - 1), int(exponent)


def _rounded_high(values: Int64Array, factor: int) -> Int64Array:
    """`values factor / 2^15` rounded half up (SQRDMULH on 16 bits)."""
    return (values * factor + (1 << 14)) >> 15


def _saturated16(values: Int64Array) -> Int64Array:
    return np.clip(values, -(1 << 15), (1 << 15) - 1)
