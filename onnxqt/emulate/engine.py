"""From a QDQ file to an integer program: what runs on integers, what stays float and why.

`load_program` reads the graph once and decides, node by node, what runs: an integer kernel on codes, or the
node itself in float with the reason why. `Program.run` then only executes. An operator runs on integers when
its inputs come from DequantizeLinear and its output goes, through an optional activation, to QuantizeLinear:

    DequantizeLinear -> Conv -> Relu -> QuantizeLinear      one integer node

A clamp before a quantizer is a clamp of the codes, because quantization is monotone:
`quantize(clip(x, lo, hi)) = clip(quantize(x), quantize(lo), quantize(hi))`. Operators that only move or
select values (Reshape, MaxPool, Relu ...) pass the codes and their grid on and need no quantizer. A Clip of the
codes between QuantizeLinear and DequantizeLinear makes their grid narrower.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from onnxqt import numerics
from onnxqt.emulate import kernels
from onnxqt.emulate.graph import (
    BIAS_GRID,
    Graph,
    NotIntegerError,
    array,
    attributes_of,
    constant,
    declared,
    fixed,
    is_constant,
    node_name,
    one_node_run,
    onnxruntime_run,
    open_graph,
    per_tensor,
    quantized,
    quantizer_params,
    read_file,
    read_names,
    storage,
)
from onnxqt.emulate.kernels import Product, Window
from onnxqt.emulate.program import NodeInfo, Program, Run, Step, Tensor, execute
from onnxqt.numerics import Array, FloatArray, Grid, IntArray, QParams

_BIAS_TOLERANCE = 2.0**-20  # a bias scale computed in another order than ours is off by a few 2**-24


def load_program(model: str | Path | ModelProto, *, reference: bool = False) -> Program:
    """Reads a quantized model (QuantizeLinear/DequantizeLinear, opset 13 to 21).

    Args:
        model: path or loaded model.
        reference: accumulate in int64 by the definition everywhere, instead of the fastest exact way.

    Raises:
        EmulatorError: if the file is not a valid model, or has a quantizer without integer meaning here.
    """
    proto = read_file(model)
    graph = open_graph(proto, reference)
    for node in proto.graph.node:
        _fold(graph, node)
    for node in proto.graph.node:
        if node.output[0] not in graph.done:
            _decide(graph, node)
    return _program(graph)


def _program(graph: Graph) -> Program:
    proto = graph.proto.graph
    inputs = {value.name: declared(graph, value) for value in proto.input if value.name not in graph.constants}
    outputs: dict[str, Any] = {}
    for name in (value.name for value in proto.output):
        moving = name in graph.tensors and not is_constant(graph, name)
        kept_in = storage(graph.grids[name]) if name in graph.grids else None
        outputs[name] = graph.tensors[name] if moving else kept_in
    needed = {name for step in graph.steps for name in step.inputs}
    constants = {name: array(graph, name) for name in needed & graph.constants.keys()}
    constants |= {name: constant(graph, name) for name in outputs if is_constant(graph, name)}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if tensor.codes in graph.grids}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.codes not in graph.constants}
    return Program(tuple(graph.steps), inputs, outputs, tensors, constants)


# Quantizers and constants


def _fold(graph: Graph, node: NodeProto) -> None:
    """Replaces a node whose inputs are all constant by its value."""
    names = read_names(node)
    if node.op_type != "Constant" and not (names and all(is_constant(graph, n) for n in names)):
        return
    params = quantizer_params(graph, node) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if params is not None and node.op_type == "DequantizeLinear":
        graph.tensors[node.output[0]] = Tensor(node.input[0], params)
    elif params is not None:
        codes = numerics.quantize(array(graph, node.input[0]), params)
        graph.constants[node.output[0]] = numpy_helper.from_array(codes, node.output[0])
        graph.grids[node.output[0]] = params.grid
    elif node.op_type == "Reshape" and (stacked := _restacked(graph, node)):
        graph.tensors[node.output[0]] = stacked
    elif node.op_type == "Constant" and node.attribute[0].name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.constants[node.output[0]] = tensor
    else:
        results = tuple(filter(None, node.output))
        step = Step(NodeInfo(node_name(node), node.op_type, "float"), (), results, onnxruntime_run(graph, node, []))
        values = zip(results, execute(step, {}), strict=True)
        graph.constants.update((name, numpy_helper.from_array(value, name)) for name, value in values)
    graph.done.add(node.output[0])


def _restacked(graph: Graph, node: NodeProto) -> Tensor | None:
    """Constant codes in another shape; None where that would spread a channel of its own scale over several."""
    tensor = graph.tensors.get(node.input[0])
    if tensor is None:
        return None
    codes = array(graph, tensor.codes)
    allow_zero = bool(attributes_of(node).get("allowzero", 0))
    reshaped = kernels.reshape(codes, array(graph, node.input[1]), allow_zero)
    axis = tensor.params.axis
    if axis is not None and (axis != codes.ndim - 1 or reshaped.shape[-1:] != codes.shape[-1:]):
        return None
    name = f"{node.output[0]}/codes"
    graph.constants[name] = numpy_helper.from_array(reshaped, name)
    return Tensor(name, replace(tensor.params, axis=None if axis is None else reshaped.ndim - 1))


# One step per node


def _decide(graph: Graph, node: NodeProto) -> None:
    """Writes down the step of one node, and what the graph knows of the node's outputs."""
    dynamic = [name for name in read_names(node) if not is_constant(graph, name)]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and not _is_static(graph, node):
        _float(graph, node, "its scale or zero point is computed at run time")
    elif node.op_type == "QuantizeLinear":
        _quantize(graph, node)
    elif node.op_type == "DequantizeLinear" and node.input[0] in graph.grids:
        graph.tensors[node.output[0]] = Tensor(node.input[0], per_tensor(graph, node))
    elif node.op_type == "Shape":
        _shape(graph, node)
    elif dynamic and graph.shapes.issuperset(dynamic):
        graph.shapes.update(node.output)
        _float(graph, node, "")
    else:
        try:
            _integer(graph, node)
        except NotIntegerError as reason:
            _float(graph, node, str(reason))


def _is_static(graph: Graph, quantizer: NodeProto) -> bool:
    """Whether the grid of a QuantizeLinear or DequantizeLinear is constant."""
    return all(is_constant(graph, name) for name in quantizer.input[1:] if name)


def _integer(graph: Graph, node: NodeProto) -> None:
    """Writes down an integer step.

    Raises:
        NotIntegerError: if the node has no integer form.
    """
    if node.op_type in _BUILDERS and node.domain in ("", "ai.onnx"):
        _BUILDERS[node.op_type](graph, node)
    elif node.op_type in _MOVES and node.domain in ("", "ai.onnx"):
        x = quantized(graph, node, 0)
        if any(node.output[1:]):
            raise NotIntegerError("it has more than one output")
        run = _MOVES[node.op_type](graph, node, x.params)
        graph.tensors[node.output[0]] = Tensor(node.output[0], x.params)
        others = node.input[1:] if node.op_type in ("Reshape", "Slice") else []
        info = NodeInfo(node_name(node), node.op_type, "integer", implementation="codes")
        inputs = (x.codes, *filter(None, others))
        graph.steps.append(Step(info, inputs, (node.output[0],), lambda codes, *rest: (run(codes, *rest),)))
    else:
        raise NotIntegerError(f"no integer kernel for {node.op_type}")


def _quantize(graph: Graph, node: NodeProto) -> None:
    """A quantizer between floats and codes, or between two grids."""
    codes, params, clip = _narrowed(graph, node)
    graph.grids[codes] = params.grid
    graph.done.update(clip)
    source = graph.tensors.get(node.input[0])
    info = NodeInfo(node_name(node), node.op_type, "boundary", implementation="table" if source else "quantize")
    if source is None:
        step = Step(info, (node.input[0],), (codes,), lambda x: (numerics.quantize(x, params),))
    else:
        grid = source.params
        step = Step(info, (source.codes,), (codes,), lambda x: (kernels.transfer(x, grid, params),))
    graph.steps.append(step)


def _narrowed(graph: Graph, node: NodeProto) -> tuple[str, QParams, tuple[str, ...]]:
    """The codes that a QuantizeLinear makes, their grid, and the Clip of codes behind it, if there is one."""
    params, codes = per_tensor(graph, node), node.output[0]
    users = graph.consumers.get(codes, [])
    if (
        len(users) != 1
        or users[0].op_type != "Clip"
        or not all(is_constant(graph, name) for name in users[0].input[1:])
    ):
        return codes, params, ()
    low, high = (fixed(graph, users[0], i, end) for i, end in ((1, params.grid.qmin), (2, params.grid.qmax)))
    for bits in range(2, params.grid.bits):
        grid = Grid(bits, params.grid.signed)
        if (grid.qmin, grid.qmax) == (int(low), int(high)):
            clipped = users[0].output[0]
            return clipped, replace(params, grid=grid), (clipped,)
    return codes, params, ()


def _shape(graph: Graph, node: NodeProto) -> None:
    """The shape of a tensor, which its codes share."""
    attributes, name = attributes_of(node), node.input[0]
    cut = slice(attributes.get("start", 0), attributes.get("end"))
    graph.shapes.update(node.output)
    info = NodeInfo(node_name(node), node.op_type, "shape")
    source = graph.tensors[name].codes if name in graph.tensors else name
    outputs = tuple(node.output)
    graph.steps.append(Step(info, (source,), outputs, lambda x: (np.asarray(x.shape[cut], np.int64),)))


def _float(graph: Graph, node: NodeProto, reason: str) -> None:
    """The node itself in ONNX Runtime; without a `reason` it only computes shapes."""
    names = [name for name in read_names(node) if not is_constant(graph, name)]
    values = [_real(graph, name) for name in names]
    types = [storage(graph.grids[name]) if name in graph.grids else None for name in names]
    execute = onnxruntime_run(graph, node, names)

    def run(*arrays: Array) -> tuple[Array, ...]:
        return execute(*(a.astype(t) if t else a for a, t in zip(arrays, types, strict=True)))

    kind: Literal["float", "shape"] = "float" if reason else "shape"
    info = NodeInfo(node_name(node), node.op_type, kind, reason, implementation="ONNX Runtime")
    graph.steps.append(Step(info, tuple(values), tuple(filter(None, node.output)), run))


def _real(graph: Graph, name: str) -> str:
    """The value that holds the reals of tensor `name`; dequantizes it where it exists as codes only."""
    if name not in graph.tensors:
        return name
    tensor, real = graph.tensors[name], f"{name}/real"
    if real not in graph.done:
        graph.done.add(real)
        info = NodeInfo(real, "DequantizeLinear", "boundary", implementation="dequantize")
        params = tensor.params
        graph.steps.append(Step(info, (tensor.codes,), (real,), lambda codes: (numerics.dequantize(codes, params),)))
    return real


# What follows a node, up to the quantizer


@dataclass(frozen=True, slots=True)
class _Tail:
    """The quantizer that a node feeds, the clamp and the bias before it, and the nodes that all this took."""

    codes: str
    params: QParams
    low: int
    high: int
    bias: str
    taken: tuple[str, ...]

    def limit(self, codes: IntArray) -> IntArray:
        """The activation, on codes."""
        if (self.low, self.high) == (self.params.grid.qmin, self.params.grid.qmax):
            return codes
        return np.clip(codes, self.low, self.high)


def _tail(graph: Graph, node: NodeProto, with_bias: bool = False) -> _Tail:
    """Follows the output of `node` to its quantizer.

    Raises:
        NotIntegerError: if anything else reads a value on the way.
    """
    name, bias, taken = node.output[0], "", []
    clips = [node] if node.op_type == "Clip" else []
    while True:
        users = graph.consumers.get(name, [])
        if len(users) != 1 or users[0].op_type not in ("QuantizeLinear", "Relu", "Clip", "Add"):
            raise NotIntegerError("its output goes elsewhere than to one quantizer")
        user = users[0]
        taken.append(user.output[0])
        if user.op_type == "QuantizeLinear":
            if not _is_static(graph, user):
                raise NotIntegerError("its output goes to a quantizer whose scale is computed at run time")
            break
        if user.op_type == "Add":
            other = user.input[1 - list(user.input).index(name)]
            if not with_bias or bias or clips or not is_constant(graph, other):
                raise NotIntegerError("its output goes elsewhere than to one quantizer")
            bias = other
        else:
            clips.append(user)
        name = user.output[0]
    codes, params, clip_of_codes = _narrowed(graph, user)
    taken += clip_of_codes
    low, high = params.grid.qmin, params.grid.qmax
    for clip in clips:
        first, last = _clamp(graph, clip, params)
        low, high = (min(max(code, first), last) for code in (low, high))
    return _Tail(codes, params, low, high, bias, tuple(taken))


def _clamp(graph: Graph, node: NodeProto, params: QParams) -> tuple[int, int]:
    """Codes of the bounds of a Relu or Clip."""
    bounds = [0.0, None] if node.op_type == "Relu" else [fixed(graph, node, i) for i in (1, 2)]
    codes = [None if b is None else int(numerics.quantize(np.asarray(b, np.float32), params)) for b in bounds]
    low, high = codes
    return params.grid.qmin if low is None else low, params.grid.qmax if high is None else high


def _emit(graph: Graph, node: NodeProto, inputs: Sequence[Tensor], tail: _Tail, run: Run, **info: Any) -> None:
    """Adds an integer step up to the quantizer of `tail`.

    `run` gives the codes and, for a sum of products, how many accumulators wrapped.
    """
    graph.done.update(tail.taken)
    graph.grids[tail.codes] = tail.params.grid
    about = NodeInfo(node_name(node), node.op_type, "integer", **info)
    counter = f"{tail.codes}/overflows" if node.op_type in _PRODUCTS else ""
    outputs = tuple(filter(None, (tail.codes, counter)))
    graph.steps.append(Step(about, tuple(x.codes for x in inputs), outputs, run, counter))


# Sums of products


def _conv(graph: Graph, node: NodeProto) -> None:
    transposed = node.op_type == "ConvTranspose"
    weights, scale = _weights(graph, node, 1 if transposed else 0)
    attributes = attributes_of(node)
    group, window = attributes.get("group", 1), _window(attributes, weights.shape[2:])
    if transposed and (window.auto_pad != "NOTSET" or "output_shape" in attributes):
        raise NotIntegerError("it has auto_pad or output_shape")
    extra = tuple(attributes.get("output_padding", (0,) * len(window.kernel)))

    def float32(part: IntArray) -> Callable[[FloatArray], Array]:
        bare = helper.make_node(node.op_type, node.input[:2], node.output)
        bare.attribute.extend(node.attribute)
        constant = numpy_helper.from_array(part.astype(np.float32), node.input[1])
        run = one_node_run(bare, [constant], graph.proto.opset_import, {node.input[0]: None})
        return lambda x: run(x)[0]

    def exact(x: Array, dtype: Any) -> Array:
        if transposed:
            return kernels.conv_transpose(x, weights, window, extra, group, dtype)
        return kernels.conv(x, weights, window, group, dtype)

    product = Product(weights, scale, int(transposed), 1, float32, exact, group if transposed else 1)
    _multiply(graph, node, product)


def _gemm(graph: Graph, node: NodeProto) -> None:
    attributes = attributes_of(node)
    if attributes.get("transA", 0) or {attributes.get("alpha", 1.0), attributes.get("beta", 1.0)} != {1.0}:
        raise NotIntegerError("it has transA, alpha or beta")
    transposed = bool(attributes.get("transB", 0))
    weights, scale = _weights(graph, node, 0 if transposed else 1)
    _multiply(graph, node, _matrix(weights.T if transposed else weights, scale))


def _matmul(graph: Graph, node: NodeProto) -> None:
    if is_constant(graph, node.input[1]):
        _multiply(graph, node, _matrix(*_weights(graph, node, -1)))
        return
    a, b, tail = quantized(graph, node, 0), quantized(graph, node, 1), _tail(graph, node)
    factor = kernels.multiplier(a.params.scale, b.params.scale, tail.params.scale)
    largest = kernels.reach(a.params) * kernels.reach(b.params)

    def run(x: IntArray, y: IntArray) -> tuple[Array, ...]:
        x, y = x - a.params.zero_point, y - b.params.zero_point
        acc, overflows = kernels.wrap_int32(kernels.matmul(x, y, largest * x.shape[-1]))
        return tail.limit(numerics.requantize(acc, factor, tail.params)), np.asarray(overflows)

    _emit(graph, node, (a, b), tail, run, implementation="float32 or float64 by length")


def _matrix(weights: IntArray, scale: FloatArray) -> Product:
    """Product with a matrix (inputs, channels)."""

    def float32(part: IntArray) -> Callable[[FloatArray], Array]:
        matrix = part.astype(np.float32)
        return lambda x: x @ matrix

    def exact(x: Array, dtype: Any) -> Array:
        return np.asarray(x.astype(dtype) @ weights.astype(dtype))

    return Product(weights, scale, -1, -1, float32, exact)


def _weights(graph: Graph, node: NodeProto, axis: int) -> tuple[IntArray, FloatArray]:
    """Weights less their zero point, and their scale: () or (channels along `axis`,)."""
    tensor = graph.tensors.get(node.input[1])
    if tensor is None or tensor.codes not in graph.constants:
        raise NotIntegerError(f"its weights '{node.input[1]}' are not constants quantized per tensor or channel")
    codes, params = array(graph, tensor.codes), tensor.params
    if codes.ndim < 2:
        raise NotIntegerError(f"its weights '{node.input[1]}' are a vector")
    if params.axis is not None and (params.axis - axis) % codes.ndim:
        raise NotIntegerError(f"its weights '{node.input[1]}' are quantized along axis {params.axis}: expected {axis}")
    return codes - numerics.along_axis(params.zero_point, params.axis, codes.ndim), params.scale


def _window(attributes: Mapping[str, Any], kernel: Sequence[int]) -> Window:
    ones = (1,) * len(kernel)
    return Window(
        tuple(kernel),
        tuple(attributes.get("strides", ones)),
        tuple(attributes.get("dilations", ones)),
        tuple(attributes.get("pads", (0, 0) * len(kernel))),
        attributes.get("auto_pad", "NOTSET"),
        bool(attributes.get("ceil_mode", 0)),
    )


def _multiply(graph: Graph, node: NodeProto, product: Product) -> None:
    """Accumulate, add the bias, requantize."""
    x, tail = quantized(graph, node, 0), _tail(graph, node, with_bias=node.op_type == "MatMul")
    scale = np.tile(product.scale, product.groups) if product.scale.ndim else product.scale
    sums = np.tile(kernels.channel_sums(product.weights, product.axis), product.groups)
    named = node.input[2] if len(node.input) > 2 else tail.bias
    bias, note = _bias(graph, named, np.broadcast_to(x.params.scale * scale, sums.shape))
    bound = kernels.accumulator_bound(sums, kernels.reach(x.params), bias)
    accumulate, implementation = kernels.accumulator(product, kernels.reach(x.params), bound, graph.reference)
    factor = kernels.multiplier(x.params.scale, scale, tail.params.scale)

    def requantize(acc: Array) -> IntArray:
        spread = numerics.along_axis(factor, product.channel if factor.ndim else None, acc.ndim)
        return tail.limit(numerics.requantize(acc, spread, tail.params))

    def run(codes: IntArray) -> tuple[Array, ...]:
        acc, overflows = accumulate(codes - x.params.zero_point), 0
        if bias is not None:
            acc += numerics.along_axis(bias, product.channel, acc.ndim)
        if bound > kernels.INT32_MAX:
            acc, overflows = kernels.wrap_int32(acc)
        return kernels.in_blocks(requantize, acc), np.asarray(overflows)

    _emit(graph, node, (x,), tail, run, note=note, bound=bound, implementation=implementation)


def _bias(graph: Graph, name: str, scale: FloatArray) -> tuple[IntArray | None, str]:
    """The bias on the grid of the accumulator, (channels,) int32, and what had to be decided for it."""
    if not name:
        return None, ""
    if not is_constant(graph, name):
        raise NotIntegerError(f"its bias '{name}' is not constant")
    real = constant(graph, name)
    if real.size != 1 and (*real.shape[-1:], real.size) != scale.shape * 2:
        raise NotIntegerError(f"its bias '{name}' has shape {list(real.shape)}: expected {list(scale.shape)}")
    tensor = graph.tensors.get(name)
    if tensor is not None and tensor.params.grid == BIAS_GRID:
        given = np.broadcast_to(tensor.params.scale, scale.shape)
        if np.all(np.abs(given - scale) <= _BIAS_TOLERANCE * scale):
            codes = array(graph, tensor.codes).reshape(-1) - tensor.params.zero_point
            return np.broadcast_to(codes, scale.shape), ""
    flat = np.broadcast_to(real.reshape(-1), scale.shape)
    grid = QParams(scale, np.zeros(scale.shape, np.int32), BIAS_GRID, 0)
    return numerics.quantize(flat, grid), f"bias '{name}' rounded to int32 at the scale of the accumulator"


# Other operators that end in a quantizer


def _add(graph: Graph, node: NodeProto) -> None:
    a, b, tail = quantized(graph, node, 0), quantized(graph, node, 1), _tail(graph, node)
    params = (a.params, b.params)

    def add(x: IntArray, y: IntArray) -> IntArray:
        return tail.limit(kernels.add(x, y, params, tail.params))

    def run(x: IntArray, y: IntArray) -> tuple[Array, ...]:
        return (kernels.in_blocks(add, x, y),)

    _emit(graph, node, (a, b), tail, run, implementation="float32 fma")


def _concat(graph: Graph, node: NodeProto) -> None:
    parts, tail = [quantized(graph, node, i) for i in range(len(node.input))], _tail(graph, node)
    axis = attributes_of(node)["axis"]

    def run(*codes: IntArray) -> tuple[Array, ...]:
        moved = [kernels.transfer(c, p.params, tail.params) for c, p in zip(codes, parts, strict=True)]
        return (tail.limit(np.concatenate(moved, axis)),)

    _emit(graph, node, parts, tail, run, implementation="table")


def _clip(graph: Graph, node: NodeProto) -> None:
    x, tail = quantized(graph, node, 0), _tail(graph, node)

    def run(codes: IntArray) -> tuple[Array, ...]:
        return (tail.limit(kernels.transfer(codes, x.params, tail.params)),)

    _emit(graph, node, (x,), tail, run, implementation="table")


def _average_pool(graph: Graph, node: NodeProto) -> None:
    x, tail, attributes = quantized(graph, node, 0), _tail(graph, node), attributes_of(node)
    window, count = _window(attributes, attributes["kernel_shape"]), bool(attributes.get("count_include_pad", 0))

    def run(codes: IntArray) -> tuple[Array, ...]:
        return (tail.limit(kernels.average_pool(codes, window, count, x.params, tail.params)),)

    _emit(graph, node, (x,), tail, run, implementation="float32 mean")


def _mean(graph: Graph, node: NodeProto) -> None:
    x, tail, attributes = quantized(graph, node, 0), _tail(graph, node), attributes_of(node)
    given = attributes.get("axes") or fixed(graph, node, 1, ())
    noop = bool(attributes.get("noop_with_empty_axes", 0))
    first = 2 if node.op_type == "GlobalAveragePool" else 0
    keepdims, params = bool(attributes.get("keepdims", 1)), (x.params, tail.params)

    def run(codes: IntArray) -> tuple[Array, ...]:
        axes = tuple(int(a) for a in given) or tuple(range(codes.ndim if noop else first, codes.ndim))
        return (tail.limit(kernels.mean(codes, axes, keepdims, params)),)

    _emit(graph, node, (x,), tail, run, implementation="int64 sum")


# Operators that move or select codes and keep their grid


def _relu(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    return lambda codes: np.maximum(codes, params.zero_point)


def _max_pool(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    attributes = attributes_of(node)
    window = _window(attributes, attributes["kernel_shape"])
    return lambda codes: kernels.max_pool(codes, window, params.grid.qmin)


def _identity(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    if fixed(graph, node, 2, False):
        raise NotIntegerError("it drops values at random")
    return lambda codes: codes


def _reshape(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    allow_zero = bool(attributes_of(node).get("allowzero", 0))
    return lambda codes, shape: kernels.reshape(codes, shape, allow_zero)


def _flatten(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    axis = attributes_of(node).get("axis", 1)
    return lambda codes: codes.reshape(int(np.prod(codes.shape[: axis if axis >= 0 else codes.ndim + axis])), -1)


def _transpose(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    order = attributes_of(node).get("perm")
    return lambda codes: np.transpose(codes, order)


def _squeeze(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    given = fixed(graph, node, 1)
    axes = None if given is None else tuple(int(a) for a in given)
    if node.op_type == "Squeeze":
        return lambda codes: np.squeeze(codes, axes)
    return lambda codes: np.expand_dims(codes, axes or ())


def _slice(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    axes, steps = fixed(graph, node, 3), fixed(graph, node, 4)

    def run(codes: IntArray, starts: Array, ends: Array, *_: Array) -> Array:
        along = np.arange(len(starts)) if axes is None else axes
        return kernels.slice_along(codes, starts, ends, along, np.ones_like(starts) if steps is None else steps)

    return run


def _pad(graph: Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    pads, value, axes = (fixed(graph, node, i) for i in (1, 2, 3))
    mode = attributes_of(node).get("mode", "constant")
    if (mode == "constant" and value is not None and np.any(value != 0)) or np.any(pads < 0) or mode == "wrap":
        raise NotIntegerError("it pads with another value than 0, or crops")
    return lambda codes: kernels.pad(codes, pads, axes, mode, int(params.zero_point))


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BUILDERS: Mapping[str, Callable[[Graph, NodeProto], None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Concat": _concat,
    "Clip": _clip,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _mean,
    "ReduceMean": _mean,
}
_MOVES: Mapping[str, Callable[[Graph, NodeProto, QParams], Callable[..., Array]]] = {
    "Relu": _relu,
    "MaxPool": _max_pool,
    "Identity": _identity,
    "Dropout": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Slice": _slice,
    "Pad": _pad,
}
