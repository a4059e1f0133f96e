"""Integer kernels: pure functions from codes to codes.

Codes are int32 arrays whatever the width of their grid; accumulators are int32 or int64. Float appears in
two places only, both stated where they occur: a requantization multiplier, which the rule of ONNX Runtime
defines in float32, and sums of products whose every partial sum is proven to be an integer that the float
type represents exactly.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt import numerics
from onnxqt.numerics import Array, FloatArray, IntArray, QParams

INT32_MAX = (1 << 31) - 1
FLOAT32_EXACT = 1 << 24  # every integer up to here is a float32
FLOAT64_EXACT = 1 << 53
_BLOCK = 1 << 16  # elements; float64 temporaries of this size fit a second-level cache


# Accumulators


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


def wrap_int32(acc: Array) -> tuple[IntArray, int]:
    """`acc` as a 32-bit register holds it (two's complement), and how many values it changed."""
    wrapped = acc.astype(np.int32)
    return wrapped, int(np.count_nonzero(wrapped != acc))


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
        groups: how often the channels of `weights` repeat in the output (ConvTranspose).
    """

    weights: IntArray
    scale: FloatArray
    axis: int
    channel: int
    float32: Callable[[IntArray], Callable[[FloatArray], Array]]
    exact: Callable[[Array, Any], Array]
    groups: int = 1


def accumulator(
    product: Product, input_reach: int, bound: int, reference: bool
) -> tuple[Callable[[IntArray], Array], str]:
    """The fastest exact way to accumulate `code - zero_point`, and its name.

    float32 in one or two parts where `exact_parts` allows it, else float64, else int64; with `reference`
    always int64. The accumulators are int32 if `bound` fits, else int64.
    """
    kind = np.int32 if bound <= INT32_MAX else np.int64
    parts = () if reference else exact_parts(product.weights, product.axis, input_reach)
    if not parts:
        wide = np.int64 if reference or bound > FLOAT64_EXACT else np.float64
        return lambda x: product.exact(x, wide).astype(kind), np.dtype(wide).name
    terms = [(factor, product.float32(part)) for factor, part in parts]

    def accumulate(x: IntArray) -> Array:
        values = x.astype(np.float32)
        acc: Array = terms[-1][1](values).astype(kind)
        for factor, term in terms[:-1]:
            acc += factor * term(values).astype(kind)
        return acc

    return accumulate, "float32" if len(parts) == 1 else "float32 by nibbles"


def multiplier(input_scale: FloatArray, weight_scale: FloatArray, output_scale: FloatArray) -> FloatArray:
    """Requantization multiplier of a sum of products, float32 at each step as in ONNX Runtime.

    m = float32(float32(s_in * s_w) / s_out)
    """
    product: FloatArray = np.float32(input_scale) * np.asarray(weight_scale, np.float32)
    return np.asarray(product / np.float32(output_scale), np.float32)


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


# Sliding windows


@dataclass(frozen=True, slots=True)
class Window:
    """Geometry of Conv, ConvTranspose, MaxPool and AveragePool over the spatial axes.

    `pads` holds the begins, then the ends (ONNX order); it is read only where `auto_pad` is NOTSET.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    ceil_mode: bool = False


def place(window: Window, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(padding before, output size) of each spatial axis for an input of size `spatial`.

    NOTSET  output = floor((size + pads - span) / stride) + 1,  span = dilation * (kernel - 1) + 1
    SAME_*  output = ceil(size / stride); an odd pad goes to the end (UPPER) or to the beginning (LOWER)

    With `ceil_mode` the quotient is rounded up. Up to opset 21 this keeps a last window that starts beyond
    the input, where it holds no element.
    """
    begins, sizes = [], []
    rank = len(spatial)
    for axis, size in enumerate(spatial):
        stride = window.strides[axis]
        span = window.dilations[axis] * (window.kernel[axis] - 1) + 1
        if window.auto_pad.startswith("SAME"):
            count = -(-size // stride)
            total = max((count - 1) * stride + span - size, 0)
            begin = (total + (window.auto_pad == "SAME_LOWER")) // 2
        else:
            padded = window.auto_pad == "NOTSET"
            begin = window.pads[axis] if padded else 0
            room = size + (begin + window.pads[rank + axis] if padded else 0) - span
            count = (-(-room // stride) if window.ceil_mode else room // stride) + 1
        begins.append(begin)
        sizes.append(count)
    return tuple(begins), tuple(sizes)


def taps(x: Array, window: Window, fill: float) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Every kernel position with the values that it meets, in row-major order.

    Args:
        x: (batch, channels, *spatial).
        window: geometry.
        fill: what stands in the padding.

    Yields:
        (position in the kernel, view (batch, channels, *output)).
    """
    spatial = x.shape[2:]
    begins, sizes = place(window, spatial)
    margins = [(0, 0), (0, 0)]
    for axis, size in enumerate(spatial):
        last = (sizes[axis] - 1) * window.strides[axis] + window.dilations[axis] * (window.kernel[axis] - 1)
        margins.append((begins[axis], max(last + 1 - begins[axis] - size, 0)))
    padded = np.pad(x, margins, constant_values=fill) if any(map(any, margins)) else x
    for tap in np.ndindex(*window.kernel):
        yield tap, padded[_met(tap, window, sizes)]


def _met(tap: tuple[int, ...], window: Window, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Index of the padded values that kernel position `tap` meets on its way over `sizes` places."""
    begins = [at * dilation for at, dilation in zip(tap, window.dilations, strict=True)]
    ways = zip(begins, sizes, window.strides, strict=True)
    return (..., *[slice(begin, begin + (size - 1) * stride + 1, stride) for begin, size, stride in ways])


# Sums of products


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
        acc[_met(tap, window, spatial)] += products.reshape(batch, -1, *spatial)
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


# From codes to codes


def same_grid(a: QParams, b: QParams) -> bool:
    """Whether equal codes mean equal reals."""
    return bool(a.grid == b.grid and a.scale == b.scale and a.zero_point == b.zero_point)


def transfer(codes: IntArray, source: QParams, target: QParams) -> IntArray:
    """Codes on the `target` grid of codes on the `source` grid; a table of every source code.

    code = clip(round_half_even(float32((c - z_in) * s_in) / s_out) + z_out)

    ONNX Runtime builds the same table for QLinearConcat, and computes the same where it leaves a
    DequantizeLinear and a QuantizeLinear in the graph.
    """
    if same_grid(source, target):
        return codes
    every = np.arange(source.grid.qmin, source.grid.qmax + 1, dtype=np.int32)
    table = numerics.quantize(numerics.dequantize(every, source), target)
    return table[codes - source.grid.qmin]


def add(a: IntArray, b: IntArray, params: tuple[QParams, QParams], target: QParams) -> IntArray:
    """Codes of the sum of two tensors, as ONNX Runtime's QLinearAdd computes it with AVX2.

    code = clip(round_half_even(fma(a, r_a, fma(b, r_b, z - fma(r_a, z_a, r_b * z_b))))),  r = s / s_out

    Products and sums are float32 and `fma` rounds once. Here `fma` is computed in float64 and rounded to
    float32. The product of a code (8 bits and sign) and a float32 is exact in float64. Every term is a
    multiple of `g`, the last bit of the smaller ratio, `g >= 2**-24 * min(r_a, r_b)`, and every sum is below
    `2**11 * max(r_a, r_b, 1)`; so the sum too is exact, and rounded once, while
    `max(r_a, r_b, 1) < 2**18 * min(r_a, r_b)`. Beyond, two roundings could differ in the last bit from one.

    The second operand enters the sum first; so does a first operand that is broadcast along the last axis.
    """
    if _is_row_constant(a.shape, b.shape):
        a, b, params = b, a, params[::-1]
    source_a, source_b = params
    ratio_a: Any = source_a.scale / target.scale
    ratio_b: Any = source_b.scale / target.scale
    offset = _fma(source_a.zero_point, ratio_a, ratio_b * np.float32(source_b.zero_point))
    fixed: Any = np.float32(target.zero_point) - offset
    total = numerics.round_half_even(_fma(a, ratio_a, _fma(b, ratio_b, fixed)))
    return np.clip(total, target.grid.qmin, target.grid.qmax).astype(np.int32)


def _is_row_constant(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Whether ONNX Runtime takes the operand of shape `a` for a scalar: 1 in the last axis that is not 1 in both."""
    sizes = zip(reversed(a), reversed(b), strict=False)
    return next((n == 1 for n, m in sizes if (n, m) != (1, 1)), True)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """`float32(a * b + c)` with one rounding; see `add` for when."""
    product = np.multiply(a, b, dtype=np.float64)
    return np.add(product, c, dtype=np.float64).astype(np.float32)


def max_pool(codes: IntArray, window: Window, qmin: int) -> IntArray:
    """Largest code under each window; the padding never wins."""
    views = (view for _, view in taps(codes, window, qmin))
    best = next(views).copy()
    for view in views:
        np.maximum(best, view, out=best)
    return best


def average_pool(
    codes: IntArray, window: Window, count_include_pad: bool, source: QParams, target: QParams
) -> IntArray:
    """Codes of the mean under each window, as ONNX Runtime's QLinearAveragePool computes it.

    code = clip(round_half_even(float32(sum of (c - z_in) * s_in) / n / s_out + z_out))

    The sum runs in float32 in row-major order over the window and the zero point is added BEFORE rounding,
    unlike everywhere else. n is the kernel size with `count_include_pad`, else the elements that are not
    padding; a window without any gives the zero point.
    """
    total: Any = np.float32(0)
    for _, view in taps(numerics.dequantize(codes, source), window, 0.0):
        total = total + view
    count: Any = np.float32(np.prod(window.kernel))
    if not count_include_pad:
        inside = np.ones((1, 1, *codes.shape[2:]), np.float32)
        count = np.maximum(sum(view for _, view in taps(inside, window, 0.0)), np.float32(1))
    steps = total / count / np.float32(target.scale) + np.float32(target.zero_point)
    limited = np.clip(numerics.round_half_even(steps), target.grid.qmin, target.grid.qmax)
    return np.asarray(limited).astype(np.int32)


def mean(codes: IntArray, axes: tuple[int, ...], keepdims: bool, params: tuple[QParams, QParams]) -> IntArray:
    """Codes of the mean over `axes`: ONNX Runtime's QLinearGlobalAveragePool, for any axes.

    code = requantize(sum of (c - z_in), float32(s_in / float32(s_out * n)))
    """
    source, target = params
    total = np.asarray(np.sum(codes, axis=axes, keepdims=keepdims, dtype=np.int64))
    count = int(np.prod([codes.shape[axis] for axis in axes]))
    factor = np.float32(source.scale) / (np.float32(target.scale) * np.float32(count))
    return numerics.requantize(total - count * int(source.zero_point), np.asarray(factor), target)


def pad(codes: IntArray, pads: Array, axes: Array | None, mode: str, zero_point: int) -> IntArray:
    """ONNX Pad on codes; `mode` "constant" pads with the real 0, whose code is the zero point.

    `pads` holds the begins, then the ends of `axes` (all axes if None).
    """
    along = range(codes.ndim) if axes is None else [int(axis) % codes.ndim for axis in axes]
    widths = [(0, 0)] * codes.ndim
    for i, axis in enumerate(along):
        widths[axis] = (int(pads[i]), int(pads[len(along) + i]))
    if mode == "constant":
        return np.pad(codes, widths, constant_values=zero_point)
    return np.pad(codes, widths, mode=mode)  # type: ignore[call-overload, no-any-return]


def slice_along(x: Array, starts: Array, ends: Array, axes: Array, steps: Array) -> Array:
    """ONNX Slice (opset 13): bounds clamped to the tensor, negative ones counted from the end."""
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        first, last = (int(i) + size if i < 0 else int(i) for i in (start, end))
        if step > 0:
            cut[axis] = slice(max(first, 0), max(last, 0), int(step))
        else:
            cut[axis] = slice(max(min(first, size - 1), 0), None if last < 0 else last, int(step))
    return x[tuple(cut)]


def reshape(x: Array, shape: Array, allow_zero: bool) -> Array:
    """ONNX Reshape: a 0 keeps the size of that axis unless `allow_zero`."""
    sizes = [int(n) if n or allow_zero else x.shape[i] for i, n in enumerate(shape)]
    return x.reshape(sizes)
