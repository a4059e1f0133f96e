"""Integer grids and every rounding rule, in plain numpy.

All rounding of the package happens here. A real value and its integer code are related by

    real = (code - zero_point) * scale,    code in [qmin, qmax]

(ONNX QuantizeLinear/DequantizeLinear, opset 21).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Grid:
    """The codes of a quantizer before a scale is known: `bits` wide, signed or unsigned.

    `narrow` drops the most negative code, so that the grid is symmetric about zero, as compilers want
    their weights (TensorFlow Lite quantization specification: weights in [-127, 127]).
    """

    bits: int
    signed: bool
    narrow: bool = False

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) + int(self.narrow) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


@dataclass(frozen=True, eq=False, slots=True)
class QParams:
    """A grid with its place on the real line.

    Attributes:
        scale: float32, finite and > 0; shape () per tensor, (channels,) per channel.
        zero_point: int32, same shape as `scale`, within [qmin, qmax].
        grid: the codes.
        axis: the channel axis of the quantized tensor, None per tensor.
    """

    scale: FloatArray
    zero_point: IntArray
    grid: Grid
    axis: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"scale must be finite and > 0, got {self.scale}")

    @property
    def range(self) -> tuple[FloatArray, FloatArray]:
        """The real interval that the grid covers: `((qmin - zp) s, (qmax - zp) s)`."""
        lo = (self.grid.qmin - self.zero_point).astype(np.float32) * self.scale
        hi = (self.grid.qmax - self.zero_point).astype(np.float32) * self.scale
        return lo, hi


def along_axis(values: Array, axis: int | None, rank: int) -> Array:
    """Reshape per-channel `values` (channels,) so that they broadcast along `axis` of a rank-`rank` tensor."""
    if axis is None:
        return values
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def round_half_even(x: Array) -> Array:
    """Nearest integer, ties to even: -1.5 -> -2, 0.5 -> 0 (ONNX QuantizeLinear)."""
    return np.rint(x)


def quantize(x: Array, params: QParams) -> IntArray:
    """Codes of `x`, int32, same shape.

    code = clip(round_half_even(x / scale) + zero_point, qmin, qmax)

    The division is float32, as ONNX Runtime does it; values beyond the grid saturate.
    """
    scale = along_axis(params.scale, params.axis, x.ndim)
    zero_point = along_axis(params.zero_point, params.axis, x.ndim)
    steps = round_half_even(x.astype(np.float32, copy=False) / scale)
    codes = steps + zero_point.astype(np.float32)  # exact where it matters: larger sums saturate
    return _saturated(codes, params.grid)


def dequantize(codes: Array, params: QParams) -> FloatArray:
    """Reals of `codes`, float32, same shape: `(code - zero_point) * scale`."""
    scale = along_axis(params.scale, params.axis, codes.ndim)
    zero_point = along_axis(params.zero_point, params.axis, codes.ndim)
    real: FloatArray = (codes.astype(np.int32) - zero_point).astype(np.float32) * scale
    return real


def fake_quantize(x: Array, params: QParams) -> FloatArray:
    """`dequantize(quantize(x))`: `x` moved onto the grid."""
    return dequantize(quantize(x, params), params)


def requantize(acc: Array, multiplier: FloatArray, params: QParams) -> IntArray:
    """Codes of exact integer accumulators, int32.

    code = clip(round_half_even(float32(acc) * multiplier) + zero_point, qmin, qmax)

    `multiplier` is float32 and broadcasts to `acc`; for a convolution it is `s_in * s_w / s_out`.
    This is the float32 rule of ONNX Runtime, OpenVINO and XNNPACK.
    """
    steps = round_half_even(acc.astype(np.float32) * multiplier)
    return _saturated(steps + params.zero_point.astype(np.float32), params.grid)


def _saturated(codes: Array, grid: Grid) -> IntArray:
    kind = np.float32 if grid.bits <= 24 else np.float64  # which holds the ends of the grid exactly
    clipped: IntArray = np.clip(codes.astype(kind, copy=False), kind(grid.qmin), kind(grid.qmax)).astype(np.int32)
    return clipped
