"""The fast engine: the same codes as the definition, from ONNX Runtime's integer operators and from tables.

What may stand for the definition, and why it is equal:

- QLinearConv and QGemm compute `float32_even` on exact INT32 accumulators (`ort_cpu` in VALIDATION.md);
- ConvInteger and MatMulInteger give exact INT32 accumulators, for any rule behind them; codes of 16 bits are two
  bytes, `x = 256 high + low`, whose accumulators add up in INT64;
- pairs of products saturate at 16 bits only where both weights have one sign and add up to more than 128, so these
  few alone are computed pair by pair and their excess is taken out of the exact accumulators;
- a function of one 8-bit code, or of two, has 256 or 65,536 values: a table made by the definition itself;
- QLinearAdd computes rule `ort` on x86;
- signed codes are run as unsigned ones, 128 higher with a zero point 128 higher, which changes no real value
  (ONNX Runtime's kernels for signed activations are many times slower).

The tests compare each with the definition on the same inputs.
"""

import platform
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from onnxqt import numerics
from onnxqt.emulate.graph import one_node_run
from onnxqt.emulate.kernels import tables
from onnxqt.emulate.kernels.products import in_blocks
from onnxqt.emulate.kernels.windows import Window, taps
from onnxqt.emulate.steps import storage
from onnxqt.numerics import Array, IntArray, QParams
from onnxqt.requantize import Requantization, effective_multiplier, rounded

_X86 = platform.machine().lower() in ("x86_64", "amd64")
_OPSETS = (helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1))


def operator(node: NodeProto, inputs: Sequence[str], constants: dict[str, Array]) -> Callable[..., Array]:
    """One node of ONNX Runtime on one thread: the values of `inputs`, in order -> its output."""
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    run = one_node_run(node, stored, _OPSETS, dict.fromkeys(inputs), optimize=False, threads=1)
    return lambda *values: run(*values)[0]


# Sums of products


def unsigned(codes: Array) -> Array:
    """8-bit codes as unsigned ones: signed codes are moved up by 128."""
    return codes if codes.dtype == np.uint8 else np.ascontiguousarray(codes).view(np.uint8) ^ np.uint8(128)


def restored(codes: Array, params: QParams) -> Array:
    """Codes of a grid from what `unsigned` made of them."""
    return (codes ^ np.uint8(128)).view(np.int8) if params.grid.signed else codes


def offset(params: QParams) -> int:
    """What `unsigned` adds to the codes of a grid."""
    return 128 if params.grid.signed else 0


def conv_integer(attributes: Sequence[onnx.AttributeProto], weights: IntArray, x: QParams) -> Callable[[Array], Array]:
    """Accumulators of a convolution of stored codes, INT32, or INT64 of 16 bits; `weights` within [-128, 127]."""
    node = helper.make_node("ConvInteger", ["x", "w", "zx", "zw"], ["y"])
    node.attribute.extend(attributes)
    constants = {"w": (weights + 128).astype(np.uint8), "zw": np.asarray(128, np.uint8)}
    return _by_bytes(node, constants, x)


def matmul_integer(weights: IntArray, x: QParams) -> Callable[[Array], Array]:
    """Accumulators of stored codes times a matrix (or stack) within [-128, 127], INT32, or INT64 of 16 bits."""
    node = helper.make_node("MatMulInteger", ["x", "w", "zx"], ["y"])
    return _by_bytes(node, {"w": weights.astype(np.int8)}, x)


def _by_bytes(node: NodeProto, constants: dict[str, Array], x: QParams) -> Callable[[Array], Array]:
    """Accumulators of stored codes through an operator on unsigned bytes."""
    if x.grid.bits <= 8:
        run = operator(node, ["x"], {**constants, "zx": _zero_point(x)})
        return lambda codes: run(unsigned(codes))
    zero = int(x.zero_point) + (1 << 15 if x.grid.signed else 0)
    high, low = (
        operator(node, ["x"], {**constants, "zx": np.asarray(byte, np.uint8)}) for byte in (zero >> 8, zero & 255)
    )

    def accumulate(codes: Array) -> Array:
        moved = np.ascontiguousarray(codes).view(np.uint16) ^ np.uint16(1 << 15 if x.grid.signed else 0)
        acc = high((moved >> 8).astype(np.uint8)).astype(np.int64)
        acc *= 256
        acc += low((moved & 255).astype(np.uint8))
        return acc

    return accumulate


def saturating_conv(
    exact: Callable[[Array], Array], weights: IntArray, window: Window, group: int
) -> Callable[[Array], tuple[Array, int]]:
    """`products.saturating_conv` of stored 8-bit codes, from exact accumulators of the same."""
    outs, channels = weights.shape[0] // group, weights.shape[1]
    risky = _risky_pairs(np.moveaxis(weights, 1, -1))  # (out channel, *tap, channel) -> where a pair begins
    by_tap: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for out, *tap, channel in risky.tolist():
        by_tap.setdefault(tuple(tap), []).append((out, channel))

    def run(codes: Array) -> tuple[Array, int]:
        acc, count = exact(codes), 0
        if not by_tap:
            return acc, 0
        for tap, view in taps(unsigned(codes).astype(np.int32), window, 0):
            for out, channel in by_tap.get(tap, ()):
                first = out // outs * channels + channel
                pair = view[:, first] * weights[(out, channel, *tap)]
                pair += view[:, first + 1] * weights[(out, channel + 1, *tap)]
                count += _take_out(acc[:, out], pair)
        return acc, count

    return run


def saturating_matmul(exact: Callable[[Array], Array], weights: IntArray) -> Callable[[Array], tuple[Array, int]]:
    """`products.saturating_matmul` of stored 8-bit codes and a constant matrix, from exact accumulators of the same."""
    risky = _risky_pairs(weights.T).tolist()

    def run(codes: Array) -> tuple[Array, int]:
        acc, count = exact(codes), 0
        values = unsigned(codes).astype(np.int32)
        for out, channel in risky:
            pair = values[..., channel] * weights[channel, out] + values[..., channel + 1] * weights[channel + 1, out]
            count += _take_out(acc[..., out], pair)
        return acc, count

    return run


def _risky_pairs(weights: IntArray) -> Array:
    """Indices of the first weight of each pair along the last axis that may saturate with codes up to 255."""
    even, odd = weights[..., : weights.shape[-1] // 2 * 2 : 2], weights[..., 1::2]
    found = np.argwhere(np.abs(even + odd) > (1 << 15) // 255)
    found[:, -1] *= 2
    return found


def _take_out(acc: Array, pair: Array) -> int:
    """Takes what is beyond 16 bits out of accumulators, in place; how many pairs saturated."""
    excess = pair - np.clip(pair, -(1 << 15), (1 << 15) - 1)
    count = int(np.count_nonzero(excess))
    if count:
        acc -= excess
    return count


def matmul_codes(a: QParams, b: QParams) -> Callable[[Array, Array], Array]:
    """INT32 accumulators of the product of two tensors of stored 8-bit codes."""
    node = helper.make_node("MatMulInteger", ["a", "b", "za", "zb"], ["y"])
    constants = {
        "za": _zero_point(a),
        "zb": _zero_point(b),
    }
    run = operator(node, ["a", "b"], constants)
    return lambda x, y: run(unsigned(x), unsigned(y))


def has_qlinear(*grids: QParams) -> bool:
    """Whether ONNX Runtime's fused operators take these grids: 8-bit storage."""
    return max(params.grid.bits for params in grids) <= 8


def _zero_point(params: QParams) -> Array:
    """The zero point of `unsigned` codes."""
    return np.asarray(int(params.zero_point) + offset(params), np.uint8)


def qlinear_conv(
    attributes: Sequence[onnx.AttributeProto],
    weights: tuple[IntArray, Array],
    bias: Array | None,
    x: QParams,
    target: QParams,
) -> Callable[[Array], Array]:
    """Codes of a convolution under `float32_even`, before any clamp to less than the storage.

    `weights` are codes less their zero point, within [-128, 127], and their scales.
    """
    names = ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", *(["b"] if bias is not None else [])]
    node = helper.make_node("QLinearConv", names, ["y"])
    node.attribute.extend(attributes)
    run = operator(node, ["x"], _linear(weights, bias, x, target))
    return lambda codes: restored(run(unsigned(codes)), target)


def qgemm(weights: tuple[IntArray, Array], bias: Array | None, x: QParams, target: QParams) -> Callable[[Array], Array]:
    """Codes of a matrix product under `float32_even`; the rows are all axes but the last."""
    names = ["x", "sx", "zx", "w", "sw", "zw", "b" if bias is not None else "", "sy", "zy"]
    node = helper.make_node("QGemm", names, ["y"], domain="com.microsoft")
    run = operator(node, ["x"], _linear(weights, bias, x, target))

    def product(codes: Array) -> Array:
        rows = unsigned(np.ascontiguousarray(codes)).reshape(-1, codes.shape[-1])
        return restored(run(rows), target).reshape(*codes.shape[:-1], -1)

    return product


def _linear(weights: tuple[IntArray, Array], bias: Array | None, x: QParams, target: QParams) -> dict[str, Array]:
    codes, scale = weights
    constants = {
        "sx": np.asarray(x.scale, np.float32),
        "zx": _zero_point(x),
        "w": codes.astype(np.int8),
        "sw": np.asarray(scale, np.float32),
        "zw": np.zeros(np.shape(scale), np.int8),
        "sy": np.asarray(target.scale, np.float32),
        "zy": _zero_point(target),
    }
    return constants if bias is None else {**constants, "b": bias.astype(np.int32)}


# Requantization

_LARGEST = 2.0**10  # an 8-bit code is decided by steps below it: those beyond saturate, whatever the zero point
_ERRORS = 4 * 2.0**-24 * _LARGEST  # of three float32 operations on such a step
_WORTHWHILE = 2.0**-5  # share of values near a tie up to which guessing is faster
_DOUBLE = ("gemmlowp_double", "ruy_double")
_GUESSED = (*_DOUBLE, "fixed31_single", "fixed16_away", "float64_away", "shift_up")


def requantizer(how: Requantization, channel: int) -> Callable[[Array], Array]:
    """Accumulators -> integer steps, as `requantize.rounded`, several times faster for fixed-point rules.

    The step is guessed in float32, and computed by the rule where the guess lies near a rounding tie:

        v = float32(acc) * float32(M);   the rule itself where |v - rint(v)| > 1/2 - t,   else rint(v)

    A rule differs from `acc M` by at most t before its last rounding: `4 * 2**-24 |v|` for the three float32
    operations (M's own representation included), and `2**-(n + 1)` more where it rounds twice, n bits apart. Steps of
    more than 2**10 saturate on an 8-bit grid either way.
    """
    if how.rule not in _GUESSED or how.target.grid.bits > 8:
        return lambda acc: rounded(acc, how.spread(channel, acc.ndim))
    margin = np.full(how.multiplier.shape, _ERRORS)
    if how.rule in _DOUBLE and how.exponent is not None:
        margin = margin + 2.0 ** -(np.maximum(-how.exponent, 0) + 1.0)
    if margin.max(initial=0) > _WORTHWHILE:
        return lambda acc: rounded(acc, how.spread(channel, acc.ndim))
    multiplier = effective_multiplier(how).astype(np.float32)
    threshold = np.float32(0.5 - margin.max(initial=0))

    def guess(acc: Array) -> Array:
        steps = acc.astype(np.float32, order="C")  # so that flat positions below are in place
        steps *= numerics.along_axis(multiplier, channel if multiplier.ndim else None, acc.ndim)
        nearest = np.rint(steps)
        steps -= nearest
        np.abs(steps, out=steps)
        close = np.flatnonzero(steps >= threshold)
        if close.size:
            nearest.reshape(-1)[close] = rounded(acc.reshape(-1)[close], _at(how, channel, acc.shape, close))
        return nearest

    return guess


def _at(how: Requantization, channel: int, shape: tuple[int, ...], positions: Array) -> Requantization:
    """The per-channel values of some positions of accumulators of this shape."""
    axis = channel % len(shape)
    inner = int(np.prod(shape[axis + 1 :], dtype=np.int64))
    channels = positions // inner % shape[axis]

    def pick(values: Array | None) -> Array | None:
        return values if values is None or not values.ndim else values[channels]

    return replace(
        how,
        multiplier=how.multiplier[channels] if how.multiplier.ndim else how.multiplier,
        mantissa=pick(how.mantissa),
        exponent=pick(how.exponent),
    )


# Tables


def lookup(table: Array, source: QParams, target: QParams) -> Callable[[Array], Array]:
    """Stored codes -> stored codes, by a table from the smallest code of the source grid on.

    Codes that the storage holds beyond the grid become what the nearest code of the grid does.
    """
    kind = storage(source.grid)
    limits = np.iinfo(kind)
    every = np.arange(limits.max + 1 if limits.min == 0 else -limits.min, dtype=np.int64)
    index = np.concatenate([every, np.arange(limits.min, 0)]) if limits.min else every
    within = np.clip(index, source.grid.qmin, source.grid.qmax) - source.grid.qmin
    by_bits = np.asarray(table)[within].astype(storage(target.grid))
    view = np.dtype(f"uint{8 * kind.itemsize}")
    return lambda codes: by_bits[np.ascontiguousarray(codes).view(view)]


def pairs(
    kernel: Callable[[IntArray, IntArray], IntArray], a: QParams, b: QParams, target: QParams
) -> Callable[[Array, Array], Array]:
    """Stored codes of two tensors that broadcast -> stored codes, by a table of all pairs of 8-bit codes."""
    codes_a, codes_b = tables.every_code(a), tables.every_code(b)
    grid = np.meshgrid(codes_a, codes_b, indexing="ij")
    every = kernel(np.ascontiguousarray(grid[0]), np.ascontiguousarray(grid[1])).astype(storage(target.grid)).ravel()
    low_a, low_b, count = a.grid.qmin, b.grid.qmin, len(codes_b)

    def run(x: Array, y: Array) -> Array:
        index = np.subtract(x, low_a, dtype=np.intp)
        index *= count
        index = index + np.subtract(y, low_b, dtype=np.intp)
        return np.asarray(every[index])

    return lambda x, y: in_blocks(run, x, y)


def has_qlinear_add(rule: str, a: QParams, b: QParams, target: QParams) -> bool:
    """Whether ONNX Runtime's QLinearAdd computes this sum by `rule`."""
    return rule == "ort" and _X86 and has_qlinear(a, b, target)


def qlinear_add(a: QParams, b: QParams, target: QParams) -> Callable[[Array, Array], Array]:
    """Codes of a sum under rule `ort`, before any clamp to less than the storage."""
    names = [f"{part}{tensor}" for tensor in "abc" for part in ("", "s", "z")]
    node = helper.make_node("QLinearAdd", [*names[:6], "sc", "zc"], ["c"], domain="com.microsoft")
    constants: dict[str, Array] = {}
    for tensor, params in (("a", a), ("b", b), ("c", target)):
        constants[f"s{tensor}"] = np.asarray(params.scale, np.float32)
        constants[f"z{tensor}"] = _zero_point(params)
    run = operator(node, ["a", "b"], constants)
    return lambda x, y: restored(run(unsigned(x), unsigned(y)), target)
