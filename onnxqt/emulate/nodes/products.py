"""Sums of products: Conv, ConvTranspose, Gemm and MatMul, with static or run-time activation scales."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from onnx import NodeProto, helper, numpy_helper

from onnxqt import numerics
from onnxqt.emulate import fast
from onnxqt.emulate.graph import (
    BIAS_GRID,
    Graph,
    NotIntegerError,
    array,
    attributes_of,
    constant,
    is_constant,
    node_name,
    one_node_run,
    quantized,
    window_of,
)
from onnxqt.emulate.kernels import products
from onnxqt.emulate.kernels.products import Product, ProductKind, in_blocks
from onnxqt.emulate.steps import Detail, NodeInfo, Run, Step, storage
from onnxqt.emulate.tail import Tail, emit, follow
from onnxqt.numerics import Array, FloatArray, Grid, IntArray, QParams
from onnxqt.profiles import Accumulator, Arithmetic
from onnxqt.requantize import FLOAT_BIAS, Requantization, ScaleError, requantization, requantize

_BIAS_TOLERANCE = 2.0**-20  # a bias scale computed in another order than ours is off by a few 2**-24
_BYTES = 255  # the largest difference of a byte and its zero point
_WIDE = Accumulator(64, "wrap")  # of 16-bit activations
Accumulate = Callable[[Array], tuple[Array, int]]  # stored codes -> accumulators, how many pairs saturated


def conv(graph: Graph, node: NodeProto) -> None:
    """Conv and ConvTranspose."""
    transposed = node.op_type == "ConvTranspose"
    codes, params = _weights(graph, node, 1 if transposed else 0)
    weights = codes - numerics.along_axis(params.zero_point, params.axis, codes.ndim)
    attributes = attributes_of(node)
    group, window = attributes.get("group", 1), window_of(attributes, weights.shape[2:])
    if transposed and (window.auto_pad != "NOTSET" or "output_shape" in attributes):
        raise NotIntegerError("it has auto_pad or output_shape")
    extra = tuple(attributes.get("output_padding", (0,) * len(window.kernel)))

    def float32(part: IntArray) -> Callable[[FloatArray], Array]:
        bare = helper.make_node(node.op_type, node.input[:2], node.output)
        bare.attribute.extend(node.attribute)
        stored = numpy_helper.from_array(part.astype(np.float32), node.input[1])
        run = one_node_run(bare, [stored], graph.proto.opset_import, {node.input[0]: None}, threads=1)
        return lambda x: run(x)[0]

    def exact(x: Array, dtype: Any) -> Array:
        if transposed:
            return products.conv_transpose(x, weights, window, extra, group, dtype)
        return products.conv(x, weights, window, group, dtype)

    def saturating(x: Array, zero_point: int) -> tuple[Array, int]:
        return products.saturating_conv(x, weights, window, group, zero_point)

    product = Product(
        weights,
        params.scale,
        int(transposed),
        1,
        float32,
        exact,
        None if transposed else saturating,
        group if transposed else 1,
        kind=_kind_of(transposed, group, weights),
    )
    _multiply(graph, node, product, params.grid.bits)


def _kind_of(transposed: bool, group: int, weights: IntArray) -> ProductKind:
    """What devices distinguish: transposed convolutions run like depthwise ones where either is special."""
    if transposed or (group > 1 and weights.shape[1] == 1):
        return "depthwise"
    return "grouped" if group > 1 else "plain"


def gemm(graph: Graph, node: NodeProto) -> None:
    """Gemm without transA, alpha and beta."""
    attributes = attributes_of(node)
    if attributes.get("transA", 0) or {attributes.get("alpha", 1.0), attributes.get("beta", 1.0)} != {1.0}:
        raise NotIntegerError("it has transA, alpha or beta")
    transposed = bool(attributes.get("transB", 0))
    codes, params = _weights(graph, node, 0 if transposed else 1)
    _dense(graph, node, codes.T if transposed else codes, replace(params, axis=None if params.axis is None else 1))


def matmul(graph: Graph, node: NodeProto) -> None:
    """MatMul with a constant matrix, or of two activations."""
    if is_constant(graph, node.input[1]):
        _dense(graph, node, *_weights(graph, node, -1))
        return
    if graph.arithmetic.batched == "none":
        raise NotIntegerError("the back end multiplies two activations in float")
    a, b, tail = quantized(graph, node, 0), quantized(graph, node, 1), follow(graph, node)
    wide = max(a.params.grid.bits, b.params.grid.bits) > 8
    rule = _batched_rule(graph.arithmetic, wide, int(b.params.zero_point))
    how = _requantization(rule, a.params.scale, np.asarray(b.params.scale), tail.params)
    register = _WIDE if wide else graph.arithmetic.accumulator
    if register.pair_bits:
        raise NotIntegerError("its products of two activations saturate in an order that is not documented")
    largest = products.reach(a.params) * products.reach(b.params)
    integer = None if graph.reference or wide else fast.matmul_codes(a.params, b.params)

    def run(x: Array, y: Array) -> tuple[Array, ...]:
        bound, overflows = largest * x.shape[-1], 0
        if integer is not None and bound <= products.INT32_MAX:
            acc = integer(x, y)
        else:
            left, right = (c.astype(np.int32) - p.params.zero_point for c, p in ((x, a), (y, b)))
            acc = products.matmul(left, right, bound)
        if bound > _largest(register):
            acc, overflows = products.accumulate_within(acc, register.bits, register.overflow)
        return tail.stored(requantize(acc, how)), np.asarray(overflows)

    info = NodeInfo(
        node_name(node),
        node.op_type,
        "integer",
        rule=rule,
        accumulator=_register(register),
        implementation="float32, float64 or int64 by length" if integer is None else "ONNX Runtime MatMulInteger",
    )
    emit(graph, (a, b), tail, run, (info, Detail(attributes_of(node), requantization=how, clamp=tail.clamp)))


def _batched_rule(arithmetic: Arithmetic, wide: bool, zero_point: int) -> str:
    """The requantization rule of a product of two activations, the second with this zero point."""
    if wide and arithmetic.product16:
        return arithmetic.product16
    if arithmetic.batched == "xnnpack":
        return "gemmlowp_double" if zero_point else "float32_even"
    return arithmetic.batched or arithmetic.product


def _dense(graph: Graph, node: NodeProto, codes: IntArray, params: QParams) -> None:
    """A product with a constant matrix (inputs, channels) or a stack of them."""
    weights = codes - numerics.along_axis(params.zero_point, params.axis, codes.ndim)

    def float32(part: IntArray) -> Callable[[FloatArray], Array]:
        matrix = part.astype(np.float32)
        return lambda x: x @ matrix

    def exact(x: Array, dtype: Any) -> Array:
        return np.asarray(x.astype(dtype) @ weights.astype(dtype))

    def saturating(x: Array, zero_point: int) -> tuple[Array, int]:
        acc, clipped = products.saturating_matmul(x, weights)
        return acc - zero_point * weights.sum(axis=-2, keepdims=True, dtype=np.int64), clipped

    product = Product(weights, params.scale, -1, -1, float32, exact, saturating, kind="dense")
    _multiply(graph, node, product, params.grid.bits)


def _weights(graph: Graph, node: NodeProto, axis: int) -> tuple[IntArray, QParams]:
    """Codes and grid of constant weights: () or (channels along `axis`,)."""
    tensor = graph.tensors.get(node.input[1])
    if tensor is None or tensor.codes not in graph.constants:
        raise NotIntegerError(f"its weights '{node.input[1]}' are not constants quantized per tensor or channel")
    codes, params = array(graph, tensor.codes), tensor.params
    if codes.ndim < 2:
        raise NotIntegerError(f"its weights '{node.input[1]}' are a vector")
    if params.axis is not None and (params.axis - axis) % codes.ndim:
        raise NotIntegerError(f"its weights '{node.input[1]}' are quantized along axis {params.axis}: expected {axis}")
    return codes.astype(np.int32), params


@dataclass(frozen=True, eq=False, slots=True)
class _Sums:
    """What is known of the accumulators of a node with constant weights.

    Attributes:
        product: the weights and the ways to multiply with them.
        x: grid of the input.
        scale: of the weights, () or one for every output channel.
        bias: in accumulator units, or None.
        bound: no accumulator and no partial sum exceeds it.
        register: what sums the products.
        how: how they become codes.
    """

    product: Product
    x: QParams
    scale: FloatArray
    bias: IntArray | None
    bound: int
    register: Accumulator
    how: Requantization

    @property
    def may_overflow(self) -> bool:
        """Whether the register is too narrow for some inputs."""
        return self.bound > _largest(self.register)

    def with_bias(self, acc: Array) -> Array:
        """Accumulators plus the bias."""
        if self.bias is None:
            return acc
        bias = numerics.along_axis(self.bias, self.product.channel, acc.ndim)
        return np.asarray(acc + bias.astype(acc.dtype))


def _multiply(graph: Graph, node: NodeProto, product: Product, weight_bits: int) -> None:
    """Accumulate, add the bias, requantize."""
    if node.input[0] not in graph.tensors and graph.arithmetic.dynamic != "float":
        _multiply_dynamic(graph, node, product)
        return
    x, tail = quantized(graph, node, 0), follow(graph, node, with_bias=node.op_type == "MatMul")
    sums, note = _sums(graph, node, product, x.params, tail)
    detail = Detail(
        attributes_of(node),
        weights=product.weights,
        weight_scale=sums.scale,
        weight_bits=weight_bits,
        bias=sums.bias,
        requantization=sums.how,
        clamp=tail.clamp,
    )
    run, implementation = _fused(graph, node, sums, tail) or _accumulated(graph, node, sums, tail)
    info = NodeInfo(
        node_name(node),
        node.op_type,
        "integer",
        note=note,
        rule=sums.how.rule,
        accumulator=_register(sums.register),
        bound=sums.bound,
        implementation=implementation,
    )
    emit(graph, (x,), tail, run, (info, detail))


def _sums(graph: Graph, node: NodeProto, product: Product, x: QParams, tail: Tail) -> tuple[_Sums, str]:
    """The accumulators of a node under the arithmetic of the back end, and what had to be decided for the bias."""
    arithmetic, wide = graph.arithmetic, x.grid.bits > 8
    register = _WIDE if wide else arithmetic.accumulator
    if register.pair_bits and product.saturating is None:
        raise NotIntegerError("how its products saturate is not documented")
    scale = np.tile(product.scale, product.groups) if product.scale.ndim else product.scale
    reaches = np.tile(products.channel_sums(product.weights, product.axis), product.groups)
    named = node.input[2] if len(node.input) > 2 else tail.bias
    rule = _rule(arithmetic, product, wide)
    if rule == "ruy_vectors":  # which channel it is decides how it rounds
        scale = np.broadcast_to(scale, reaches.shape)
    bias, note, in_float = None, "", None
    if rule in FLOAT_BIAS:
        in_float = _float_bias(graph, named, reaches.shape)
    else:
        bias, note = _bias(graph, named, np.broadcast_to(x.scale * scale, reaches.shape))
    how = _requantization(rule, x.scale, scale, tail.params, in_float)
    bound = products.accumulator_bound(reaches, products.reach(x), bias)
    return _Sums(product, x, scale, bias, bound, register, how), note


def _rule(arithmetic: Arithmetic, product: Product, wide: bool) -> str:
    """The requantization rule of a product with constant weights."""
    narrow = {
        "dense": arithmetic.dense,
        "depthwise": arithmetic.depthwise,
        "grouped": arithmetic.grouped,
    }.get(product.kind, "")
    if wide:
        dense = arithmetic.dense16 if product.kind == "dense" else ""
        return dense or arithmetic.product16 or narrow or arithmetic.product
    return narrow or arithmetic.product


def _requantization(
    rule: str, source: FloatArray, weight: FloatArray, target: QParams, bias: FloatArray | None = None
) -> Requantization:
    try:
        return requantization(rule, source, weight, target, bias)
    except ScaleError as reason:
        raise NotIntegerError(f"its accumulators cannot be requantized: {reason}") from reason


def _register(accumulator: Accumulator) -> str:
    pairs = f", pairs saturate at int{accumulator.pair_bits}" if accumulator.pair_bits else ""
    return f"int{accumulator.bits} {accumulator.overflow}{pairs}"


def _largest(register: Accumulator) -> int:
    return (1 << (register.bits - 1)) - 1


# The ways to accumulate, all with the same result


def _fused(graph: Graph, node: NodeProto, sums: _Sums, tail: Tail) -> tuple[Run, str] | None:
    """ONNX Runtime's operator for the whole node, where it computes exactly this rule."""
    exact = sums.bound <= products.INT32_MAX and sums.register.bits == 32 and not sums.register.pair_bits
    if graph.reference or sums.how.rule != "float32_even" or not exact or not fast.has_qlinear(sums.x, tail.params):
        return None
    if not _fits_int8(sums.product.weights):
        return None
    weights = (sums.product.weights, sums.scale)
    if node.op_type == "Conv":
        codes_of = fast.qlinear_conv(node.attribute, weights, sums.bias, sums.x, tail.params)
        implementation = "ONNX Runtime QLinearConv"
    elif node.op_type in ("Gemm", "MatMul") and sums.product.weights.ndim == 2:
        codes_of = fast.qgemm(weights, sums.bias, sums.x, tail.params)
        implementation = "ONNX Runtime QGemm"
    else:
        return None
    return lambda codes: (tail.within(codes_of(codes)), np.asarray(0)), implementation


def _accumulated(graph: Graph, node: NodeProto, sums: _Sums, tail: Tail) -> tuple[Run, str]:
    """Accumulators first, then their codes."""
    accumulate, implementation = _accumulate(graph, node, sums)
    channel = sums.product.channel
    guess = None if graph.reference else fast.requantizer(sums.how, channel)

    def finish(acc: Array) -> Array:
        if not sums.may_overflow:
            acc = sums.with_bias(acc)
        if guess is None:
            return tail.stored(requantize(acc, sums.how.spread(channel, acc.ndim)))
        steps = guess(acc)
        steps += tail.params.zero_point.astype(steps.dtype)
        return np.asarray(np.clip(steps, tail.low, tail.high, out=steps)).astype(storage(tail.params.grid))

    def run(codes: Array) -> tuple[Array, ...]:
        acc, overflows = accumulate(codes)
        if sums.may_overflow:
            exact = sums.with_bias(acc.astype(np.int64))
            acc, count = products.accumulate_within(exact, sums.register.bits, sums.register.overflow)
            overflows += count
        return in_blocks(finish, acc), np.asarray(overflows)

    return run, implementation


def _accumulate(graph: Graph, node: NodeProto, sums: _Sums) -> tuple[Accumulate, str]:
    """Exact accumulators without their bias, how many pairs of products saturated; and how they are computed."""
    x, product = sums.x, sums.product
    zero_point, saturating = int(x.zero_point), product.saturating
    integer = None if graph.reference else _integer(node, sums)
    if sums.register.pair_bits and saturating is not None:
        quick = None if integer is None else _saturating(node, product, integer)
        if quick is not None:
            return quick, "ONNX Runtime ConvInteger, the pairs that may saturate in numpy"
        moved = zero_point + fast.offset(x)
        return lambda codes: saturating(fast.unsigned(codes).astype(np.int32), moved), "numpy, pairs of products"
    if integer is not None:
        name = "ConvInteger" if node.op_type == "Conv" else "MatMulInteger"
        return lambda codes: (integer(codes), 0), f"ONNX Runtime {name}"
    add_up, implementation = products.accumulator(product, products.reach(x), sums.bound, graph.reference)
    return lambda codes: (add_up(codes.astype(np.int32) - zero_point), 0), implementation


def _integer(node: NodeProto, sums: _Sums) -> Callable[[Array], Array] | None:
    """ONNX Runtime's integer operator for the accumulators, where there is one and INT32 holds them."""
    weights = sums.product.weights
    largest = products.accumulator_bound(products.channel_sums(weights, sums.product.axis), _BYTES, None)
    if largest > products.INT32_MAX or not _fits_int8(weights):
        return None
    if sums.x.grid.bits <= 8 and sums.bound > products.INT32_MAX:
        return None
    if node.op_type == "Conv":
        return fast.conv_integer(node.attribute, weights, sums.x)
    if node.op_type in ("Gemm", "MatMul"):
        return fast.matmul_integer(weights, sums.x)
    return None


def _saturating(node: NodeProto, product: Product, exact: Callable[[Array], Array]) -> Accumulate | None:
    """The accumulators of x86 without VNNI from exact ones."""
    if node.op_type == "Conv":
        attributes = attributes_of(node)
        window = window_of(attributes, product.weights.shape[2:])
        return fast.saturating_conv(exact, product.weights, window, attributes.get("group", 1))
    return fast.saturating_matmul(exact, product.weights) if product.weights.ndim == 2 else None


def _fits_int8(weights: IntArray) -> bool:
    return bool(weights.min(initial=0) >= -128 and weights.max(initial=0) <= 127)


# Biases


def _bias(graph: Graph, name: str, scale: FloatArray) -> tuple[IntArray | None, str]:
    """The bias on the grid of the accumulator, (channels,) int32, and what had to be decided for it."""
    if not name:
        return None, ""
    real = _real_bias(graph, name, scale.shape)
    tensor = graph.tensors.get(name)
    if tensor is not None and tensor.params.grid == BIAS_GRID:
        given = np.broadcast_to(tensor.params.scale, scale.shape)
        if np.all(np.abs(given - scale) <= _BIAS_TOLERANCE * scale):
            codes = array(graph, tensor.codes).reshape(-1) - tensor.params.zero_point
            return np.broadcast_to(codes, scale.shape), ""
    flat = np.broadcast_to(real.reshape(-1), scale.shape)
    grid = QParams(scale, np.zeros(scale.shape, np.int32), BIAS_GRID, 0)
    return numerics.quantize(flat, grid), f"bias '{name}' rounded to int32 at the scale of the accumulator"


def _real_bias(graph: Graph, name: str, shape: tuple[int, ...]) -> Array:
    if not is_constant(graph, name):
        raise NotIntegerError(f"its bias '{name}' is not constant")
    real = constant(graph, name)
    if real.size != 1 and (*real.shape[-1:], real.size) != shape * 2:
        raise NotIntegerError(f"its bias '{name}' has shape {list(real.shape)}: expected {list(shape)}")
    return real


def _float_bias(graph: Graph, name: str, shape: tuple[int, ...]) -> FloatArray | None:
    if not name:
        return None
    return np.broadcast_to(_real_bias(graph, name, shape).reshape(-1).astype(np.float32), shape)


# Activation scales that are computed at run time


def _multiply_dynamic(graph: Graph, node: NodeProto, product: Product) -> None:
    """A float input is rounded to 8 bits as it comes, multiplied with the weights, and scaled back to float."""
    way = graph.arithmetic.dynamic
    scale = np.tile(product.scale, product.groups) if product.scale.ndim else product.scale
    name = node.input[2] if len(node.input) > 2 else ""
    bias = _float_bias(graph, name, (product.weights.shape[product.axis] * product.groups,))
    rows = product.channel == -1
    reach = 255 if way == "tensor" else 127
    sums = products.channel_sums(product.weights, product.axis)
    bound = products.accumulator_bound(sums, reach, None)
    accumulate, implementation = products.accumulator(product, reach, bound, graph.reference)

    def run(x: Array) -> tuple[Array, ...]:
        codes, row_scale = _round_rows(x, rows) if way == "row" else _round_tensor(x)
        acc = accumulate(codes)
        along = numerics.along_axis(scale, product.channel if scale.ndim else None, acc.ndim)
        real = acc.astype(np.float32) * (row_scale * along).astype(np.float32)
        if bias is not None:
            real = real + numerics.along_axis(bias, product.channel, acc.ndim)
        return (real.astype(np.float32, copy=False),)

    info = NodeInfo(
        node_name(node),
        node.op_type,
        "integer",
        note=f"activation scale per {way}, at run time",
        rule=f"dynamic {way}",
        accumulator="int32 wrap",
        bound=bound,
        implementation=implementation,
    )
    detail = Detail(attributes_of(node), weights=product.weights, weight_scale=scale)
    graph.steps.append(Step(info, (node.input[0],), (node.output[0],), run, detail=detail))


def _round_tensor(x: Array) -> tuple[IntArray, FloatArray]:
    """`code - zero_point` of unsigned 8-bit codes and their scale (ONNX DynamicQuantizeLinear).

    s = (max - min) / 255 with min <= 0 <= max;  z = clip(round_half_even(-min / s))
    """
    low, high = np.float32(min(x.min(initial=0), 0)), np.float32(max(x.max(initial=0), 0))
    scale = np.asarray((high - low) / np.float32(255), np.float32)
    if scale == 0:
        return np.zeros(x.shape, np.int32), np.float32(1) * np.ones((), np.float32)
    zero_point = np.asarray(np.clip(np.rint(-low / scale), 0, 255), np.int32)
    codes = numerics.quantize(x, QParams(scale, zero_point, Grid(8, signed=False)))
    return codes - zero_point, scale


def _round_rows(x: Array, rows: bool) -> tuple[IntArray, FloatArray]:
    """Symmetric codes in [-127, 127] and their scale, one for each row of a matrix or sample of a convolution.

    s = max|x| / 127;  code = round_half_away(x / s)      (TensorFlow Lite's hybrid kernels)
    """
    axes = (x.ndim - 1,) if rows else tuple(range(1, x.ndim))
    largest = np.abs(x).max(axis=axes, keepdims=True)
    scale = np.where(largest > 0, largest / np.float32(127), np.float32(1)).astype(np.float32)
    inverse = np.where(largest > 0, np.float32(127) / np.where(largest > 0, largest, 1), np.float32(1))
    codes = numerics.round_half_away(x * inverse.astype(np.float32))
    return np.clip(codes, -127, 127).astype(np.int32), scale
