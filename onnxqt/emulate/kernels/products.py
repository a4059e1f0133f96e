"""Sums of products: exact accumulators of Conv, ConvTranspose, Gemm and MatMul.

Float appears only where every partial sum is proven to be an integer that the float type represents exactly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxqt.emulate.kernels.windows import Window, met, place, taps
from onnxqt.numerics import Array, FloatArray, IntArray, QParams

ProductKind = Literal["plain", "depthwise", "grouped", "dense"]

INT32_MAX = (1 << 31) - 1
FLOAT32_EXACT = 1 << 24  # every integer up to here is a float32
FLOAT64_EXACT = 1 << 53
_BLOCK = 1 << 16  # elements; float64 temporaries of this size fit a second-level cache


def reach(params: QParams) -> int:
    """Largest `|code - zero_point|` that the grid can hold."""
    zero_point = int(params.zero_point)
    return max(params.grid.qmax - zero_point, zero_point - params.grid.qmin)


def channel_sums(weights: IntArray, axis: int) -> Array:
    """`sum |w|` of each channel along `axis`, int64: (channels,)."""
    rows = np.moveaxis(weights, axis, 0).reshape(weights.shape[axis], -1)
    return np.asarray(np.abs(rows.astype(np.int64)).sum(axis=1))


def accumulator_bound(sums: Array, input_reach: int, bias: IntArray | None) -> int:
    """No accumulator and no partial sum of one can exceed it, in any order of summation.

    bound = max over channels of (sum |w| * input_reach + |bias|)

    Args:
        sums: `channel_sums` of the weights less their zero point, (channels,).
        input_reach: `reach` of the input.
        bias: (channels,) int32, or None.
    """
    bounds = sums * input_reach
    if bias is not None:
        bounds = bounds + np.abs(bias.astype(np.int64))
    return int(bounds.max(initial=0))


def exact_parts(weights: IntArray, axis: int, input_reach: int) -> tuple[tuple[int, IntArray], ...]:
    """A way to write the weights so that float32 accumulates them exactly: `w = sum factor * part`.

    One part `(1, w)` where `max sum |w| * input_reach <= 2**24`, the high and low nibbles
    `((16, h), (1, l))` with l in [-8, 7] where that holds for each of them, and none otherwise. Within the
    bound all products and all partial sums are integers of at most 24 bits, so that neither the order of
    summation nor fused multiply-add can change them.

    Args:
        weights: `code - zero_point`.
        axis: the axis of output channels.
        input_reach: `reach` of the input.
    """
    low = ((weights + 8) & 15) - 8
    ways: tuple[tuple[tuple[int, IntArray], ...], ...] = (
        ((1, weights),),
        ((16, (weights - low) >> 4), (1, low)),
    )
    for parts in ways:
        if all(int(channel_sums(w, axis).max(initial=0)) * input_reach <= FLOAT32_EXACT for _, w in parts):
            return parts
    return ()


@dataclass(frozen=True, slots=True)
class Product:
    """A sum of products with constant weights, and the two ways to run it.

    Attributes:
        weights: `code - zero_point`.
        scale: of the weights, () or one per channel along `axis`.
        axis: the axis of output channels in `weights`.
        channel: the same in the output.
        float32: a part of the weights -> the product in float32.
        exact: (input, dtype) -> the accumulators in `dtype`.
        saturating: (unsigned codes, their zero point) -> the accumulators as x86 without VNNI makes them, and how many
            pairs saturated; None where that is not known.
        groups: how often the channels of `weights` repeat in the output (ConvTranspose).
        kind: what devices distinguish.
    """

    weights: IntArray
    scale: FloatArray
    axis: int
    channel: int
    float32: Callable[[IntArray], Callable[[FloatArray], Array]]
    exact: Callable[[Array, Any], Array]
    saturating: Callable[[Array, int], tuple[Array, int]] | None = None
    groups: int = 1
    kind: ProductKind = "plain"


def accumulator(
    product: Product, input_reach: int, bound: int, reference: bool
) -> tuple[Callable[[IntArray], Array], str]:
    """The fastest exact way to accumulate `code - zero_point`, and its name.

    float32 in one or two parts where `exact_parts` allows it, else float64, else int64; with `reference` by the
    definition in numpy, in float64 below 2**53, which is exact. The accumulators are int32 if `bound` fits, else int64.
    """
    kind = np.int32 if bound <= INT32_MAX else np.int64
    parts = () if reference else exact_parts(product.weights, product.axis, input_reach)
    if not parts:
        wide = np.int64 if bound > FLOAT64_EXACT else np.float64
        return lambda x: product.exact(x, wide).astype(kind), np.dtype(wide).name
    terms = [(factor, product.float32(part)) for factor, part in parts]

    def accumulate(x: IntArray) -> Array:
        values = x.astype(np.float32)
        acc: Array = terms[-1][1](values).astype(kind)
        for factor, term in terms[:-1]:
            acc += factor * term(values).astype(kind)
        return acc

    return accumulate, "float32" if len(parts) == 1 else "float32 by nibbles"


def in_blocks(function: Callable[..., Array], *arrays: Array) -> Array:
    """`function(*arrays)`, computed for a few samples at a time so that its temporaries stay in the cache.

    `function` must treat every index of the first axis alone. Several times faster on large batches.
    """
    samples = len(arrays[0]) if arrays[0].ndim > 1 else 0
    if samples < 2 or any(a.shape != arrays[0].shape for a in arrays):
        return function(*arrays)
    block = max(1, _BLOCK * samples // max(arrays[0].size, 1))
    starts = range(0, samples, block)
    return np.concatenate([function(*[a[i : i + block] for a in arrays]) for i in starts])


def conv(x: Array, w: Array, window: Window, group: int, dtype: Any = np.int64) -> Array:
    """Accumulators of a convolution (ONNX Conv), the definition: (batch, out channels, *output) of `dtype`.

    acc[n, m, p] = sum over c, t of w[m, c, t] * x[n, c, p * stride + t * dilation - pad]

    Args:
        x: (batch, channels, *spatial), `code - zero_point`; padding is 0, the code of the real 0.
        w: (out channels, channels / group, *kernel), `code - zero_point`.
        window: geometry.
        group: number of groups.
        dtype: what to add up in; float64 is exact below 2**53 and uses a fast matrix product.
    """
    batch, channels = x.shape[:2]
    _, sizes = place(window, x.shape[2:])
    matrices = w.reshape(group, w.shape[0] // group, *w.shape[1:]).astype(dtype)
    acc: Any = 0
    for tap, view in taps(x.astype(dtype), window, 0):
        columns = view.reshape(batch, group, channels // group, -1)
        acc = acc + matrices[_last(tap)] @ columns
    return np.asarray(acc).reshape(batch, w.shape[0], *sizes)


def conv_transpose(
    x: Array, w: Array, window: Window, output_padding: tuple[int, ...], group: int, dtype: Any = np.int64
) -> Array:
    """Accumulators of ONNX ConvTranspose, the definition: (batch, out channels, *output) of `dtype`.

    acc[n, m, p * stride + t * dilation - pad] += w[c, m, t] * x[n, c, p]

    Shapes and `dtype` as in `conv`, but `w` is (channels, out channels / group, *kernel).
    """
    batch, channels = x.shape[:2]
    spatial, rank = x.shape[2:], x.ndim - 2
    matrices = w.reshape(group, channels // group, *w.shape[1:]).swapaxes(1, 2).astype(dtype)
    columns = x.reshape(batch, group, channels // group, -1).astype(dtype)
    full = [
        (size - 1) * stride + dilation * (kernel - 1) + 1 + extra
        for size, stride, dilation, kernel, extra in zip(
            spatial, window.strides, window.dilations, window.kernel, output_padding, strict=True
        )
    ]
    acc = np.zeros((batch, group * w.shape[1], *full), dtype)
    for tap in np.ndindex(*window.kernel):
        products = matrices[_last(tap)] @ columns
        acc[met(tap, window, spatial)] += products.reshape(batch, -1, *spatial)
    return np.asarray(acc[_last([slice(window.pads[i], full[i] - window.pads[rank + i]) for i in range(rank)])])


def _last(index: Iterable[Any]) -> tuple[Any, ...]:
    """`index` into the last axes."""
    return (..., *index)


def matmul(a: Array, b: Array, bound: int) -> Array:
    """`a @ b` (numpy broadcasting) of integer arrays, exact, int64.

    `bound` limits every partial sum; it decides whether the product may run in float32 or float64.
    """
    dtype = np.float32 if bound <= FLOAT32_EXACT else np.float64 if bound <= FLOAT64_EXACT else np.int64
    return np.asarray(a.astype(dtype) @ b.astype(dtype), np.int64)


def saturating_conv(x: Array, w: Array, window: Window, group: int, zero_point: int) -> tuple[Array, int]:
    """Accumulators of a convolution on x86 without VNNI, and how many pairs saturated: as `conv`, and a count.

    acc[n, m, p] = sum over t, pairs (c, c + 1) of clip(w[m, c, t] u[c] + w[m, c + 1, t] u[c + 1], -2**15, 2**15 - 1)
                   - zero_point * sum over c, t of w[m, c, t]

    `u` are the raw unsigned codes (VPMADDUBSW multiplies u8 by s8), not `code - zero_point`: the zero point is taken
    out of the finished sum. A signed code enters as `code + 128`, with the zero point moved likewise. Pairs are the
    channels (0, 1), (2, 3) ... of each group at one kernel position; the last of an odd number stands alone. Padding
    enters neither sum. One product of a u8 and an s8 fits 16 bits, so a depthwise convolution is exact.

    Measured with OpenVINO 2026.4.1 under ONEDNN_MAX_CPU_ISA=AVX512_CORE. Under AVX2 the padding enters as the zero
    point and its pairs saturate too: pad `x` with `zero_point` first and give a window without pads.

    Args:
        x: (batch, channels, *spatial), unsigned codes.
        w: (out channels, channels / group, *kernel), signed codes with zero point 0.
        window: geometry.
        group: number of groups.
        zero_point: of `x`.
    """
    batch, channels = x.shape[:2]
    _, sizes = place(window, x.shape[2:])
    matrices = w.reshape(group, w.shape[0] // group, *w.shape[1:]).astype(np.int64)
    inside = np.ones((1, 1, *x.shape[2:]), np.int64)
    acc: Any = 0
    count = 0
    for (tap, view), (_, valid) in zip(taps(x.astype(np.int64), window, 0), taps(inside, window, 0), strict=True):
        columns = view.reshape(batch, group, channels // group, -1)
        sums, clipped = saturating_matmul(matrices[_last(tap)], columns)
        offsets = matrices[_last(tap)].sum(axis=-1, keepdims=True) * (zero_point * valid.reshape(-1))
        acc = acc + (sums - offsets)
        count += clipped
    return np.asarray(acc).reshape(batch, w.shape[0], *sizes), count


def saturating_matmul(a: Array, b: Array) -> tuple[Array, int]:
    """`a @ b` where the sum of each pair of products saturates at 16 bits, int64, and how many pairs saturated.

    sum over pairs (k, k + 1) of clip(a[k] b[k] + a[k + 1] b[k + 1], -2**15, 2**15 - 1),  k = 0, 2, 4 ...

    One operand holds raw unsigned codes, the other signed weights; see `saturating_conv`.
    """
    a, b = a.astype(np.int32), b.astype(np.int32)
    acc: Any = 0
    count = 0
    for k in range(0, a.shape[-1], 2):
        pair = a[..., k, None] * b[..., k, None, :]
        if k + 1 < a.shape[-1]:
            pair = pair + a[..., k + 1, None] * b[..., k + 1, None, :]
        limited = np.clip(pair, -(1 << 15), (1 << 15) - 1)
        count += int(np.count_nonzero(limited != pair))
        acc = acc + limited.astype(np.int64)
    return np.asarray(acc), count


def accumulate_within(acc: Array, bits: int, overflow: str) -> tuple[Array, int]:
    """What a register of `bits` bits holds of the exact sums `acc`, int64, and how many values it changed.

    "wrap" keeps the low bits (two's complement), in whatever order the sum was formed. "saturate" limits the finished
    sum to [-2**(bits - 1), 2**(bits - 1) - 1] (NVDLA rounds and saturates 34 bits to 32 behind its accumulator;
    nvdla/doc, unit_description.rst). "error" leaves `acc` as it is: the caller ends the run if the count is not 0.
    """
    acc = acc.astype(np.int64)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    limited = np.clip(acc, low, high)
    count = int(np.count_nonzero(limited != acc))
    if overflow == "wrap":
        span = 64 - bits
        return (acc << span) >> span, count
    return (limited if overflow == "saturate" else acc), count
