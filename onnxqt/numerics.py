"""Integer grids and how reals are rounded to them, in plain numpy.

All rounding of reals happens here, that of accumulators in `requantize`. A real value and its integer code are
related by

    real = (code - zero_point) * scale,    code in [qmin, qmax]

(ONNX QuantizeLinear/DequantizeLinear, opset 21).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
Tie = Literal["even", "away", "up"]  # where a tie goes
Rounding = Literal[Tie, "affine"]  # how a real becomes a code: see `quantize`


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
        scale: float32, finite and > 0; shape () per tensor, (channels,) per channel; per block that of the tensor,
            with ceil(size / block_size) along `axis`.
        zero_point: int32, same shape as `scale`, within [qmin, qmax].
        grid: the codes.
        axis: the channel axis of the quantized tensor, None per tensor; per block the axis that is cut into blocks.
        block_size: consecutive values along `axis` that share a scale, the last of which may be fewer (ONNX
            DequantizeLinear, opset 21); None where there are no blocks.
    """

    scale: FloatArray
    zero_point: IntArray
    grid: Grid
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if not (np.isfinite(self.scale).all() and (self.scale > 0).all()):
            raise ValueError(f"scale must be finite and > 0, got {self.scale}")
        if self.block_size is None:
            return
        if self.block_size < 1 or self.axis is None:
            raise ValueError(f"blocks of {self.block_size} along axis {self.axis}: expected an axis and a size >= 1")
        if self.scale.ndim < 1 or self.scale.shape != self.zero_point.shape:
            raise ValueError(
                f"blocks have scales {self.scale.shape} and zero points {self.zero_point.shape}: expected one shape, "
                "of the rank of the tensor"
            )

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


def spread(values: Array, params: QParams, shape: tuple[int, ...]) -> Array:
    """The scales or zero points of a grid as they broadcast over a tensor of this shape.

    Raises:
        ValueError: if there are not ceil(size / block_size) blocks along the axis, and as many as values elsewhere.
    """
    if params.block_size is None:
        return along_axis(values, params.axis, len(shape))
    axis = (params.axis or 0) % len(shape)
    blocks = tuple(-(-size // params.block_size) if i == axis else size for i, size in enumerate(shape))
    if values.shape != blocks:
        raise ValueError(
            f"blocks of {params.block_size} along axis {axis} of {shape} take scales {blocks}: got {values.shape}"
        )
    return np.repeat(values, params.block_size, axis)[tuple(slice(size) for size in shape)]


def round_half_even(x: Array) -> Array:
    """Nearest integer, ties to even: -1.5 -> -2, -0.5 -> 0, 0.5 -> 0 (ONNX QuantizeLinear)."""
    return np.rint(x)


def round_half_away(x: Array) -> Array:
    """Nearest integer, ties away from zero: -1.5 -> -2, -0.5 -> -1, 0.5 -> 1 (C `round`).

    round(x) = trunc(x + sign(x) h),  h the largest float below 1/2

    With 1/2 itself the largest float below 1/2 would round up; with h a tie still does, as the sum rounds to even.
    """
    x = np.asarray(x)
    below_half = np.nextafter(x.dtype.type(0.5), x.dtype.type(0))
    return np.asarray(np.trunc(x + np.copysign(below_half, x)))


def round_half_up(x: Array) -> Array:
    """Nearest integer, ties upward: -1.5 -> -1, -0.5 -> 0, 0.5 -> 1 (an addition of one half, then a shift)."""
    below = np.floor(x)
    return np.asarray(below + (x - below >= 0.5)).astype(x.dtype, copy=False)


ROUNDINGS: Mapping[str, Callable[[Array], Array]] = {
    "even": round_half_even,
    "away": round_half_away,
    "up": round_half_up,
}


def quantize(x: Array, params: QParams, rounding: Rounding = "even") -> IntArray:
    """Codes of `x`, int32, same shape.

    code = clip(round(x / scale) + zero_point, qmin, qmax)

    The division is float32, as ONNX Runtime does it; values beyond the grid saturate. `rounding` says where ties go;
    "affine" is the FakeQuantize of OpenVINO, per tensor, in float32, whose zero point enters before rounding:

    code = clip(round_half_even(x (n / (hi - lo)) + ((-lo n) / (hi - lo) + qmin))),  n = qmax - qmin,  [lo, hi] = range
    """
    if rounding == "affine":
        factor, shift = affine(params)
        return saturated(round_half_even(x.astype(np.float32, copy=False) * factor + shift), params.grid)
    scale = spread(params.scale, params, x.shape)
    zero_point = spread(params.zero_point, params, x.shape)
    steps = ROUNDINGS[rounding](x.astype(np.float32, copy=False) / scale)
    codes = steps + zero_point.astype(np.float32)  # exact where it matters: larger sums saturate
    return saturated(codes, params.grid)


def affine(params: QParams) -> tuple[FloatArray, FloatArray]:
    """(n / (hi - lo), -lo n / (hi - lo) + qmin) of a grid, float32: what "affine" rounding multiplies and adds."""
    low, high = params.range
    steps, span = np.float32(params.grid.qmax - params.grid.qmin), high - low
    shift = -low * steps / span + np.float32(params.grid.qmin)
    return np.asarray(steps / span, np.float32), np.asarray(shift, np.float32)


def dequantize(codes: Array, params: QParams) -> FloatArray:
    """Reals of `codes`, float32, same shape: `(code - zero_point) * scale`."""
    scale = spread(params.scale, params, codes.shape)
    zero_point = spread(params.zero_point, params, codes.shape)
    real: FloatArray = (codes.astype(np.int32) - zero_point).astype(np.float32) * scale
    return real


def fake_quantize(x: Array, params: QParams) -> FloatArray:
    """`dequantize(quantize(x))`: `x` moved onto the grid."""
    return dequantize(quantize(x, params), params)


def saturated(codes: Array, grid: Grid) -> IntArray:
    """`codes` limited to the grid, int32."""
    kind = np.float32 if grid.bits <= 24 else np.float64  # which holds the ends of the grid exactly
    clipped: IntArray = np.clip(codes.astype(kind, copy=False), kind(grid.qmin), kind(grid.qmax)).astype(np.int32)
    return clipped
