"""Referee: the TOSA reference model, on a graph built from the codes of a case. `python tosa_model.py CASES`.

Operators are lowered as TensorFlow Lite's are to TOSA: products to CONV2D, DEPTHWISE_CONV2D or MATMUL and a RESCALE,
sums to two RESCALEs, ADD and RESCALE, products of activations to MUL and RESCALE, means to REDUCE_SUM and RESCALE.
Every RESCALE has 32-bit multipliers and single rounding; they are computed here from the scales. TOSA has channels
last, so that TRANSPOSE stands around what looks at channels.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import folders
import numpy as np
import tosa_reference_model
import tosa_serializer
from tosa_serializer import DType, Op

Node = Mapping[str, Any]
LIMIT = 1 << 31
TYPES = {DType.INT4: np.int8, DType.INT8: np.int8, DType.INT16: np.int16, DType.INT32: np.int32}
SIGNED = {4: DType.INT4, 8: DType.INT8, 16: DType.INT16}


def run(case: folders.Case) -> folders.Outcome:
    """Codes of every value."""
    graph = Graph(case)
    nodes = []
    for node in case.nodes:
        lower = LOWERINGS.get(node["op_type"])
        if lower is None:
            raise folders.NotExpressible(f"{node['name']}: no lowering of {node['op_type']}")
        start = len(graph.operators)
        tensor = clamped(graph, lower(graph, node, [graph.tensors[name] for name in node["inputs"]]), node)
        graph.tensors[node["output"]] = graph.op(Op.IDENTITY, [tensor], tensor.shape, tensor.dtype)
        kernels = [name for name in graph.operators[start:] if name not in ("IDENTITY", "TRANSPOSE", "RESHAPE")]
        executed = ", ".join(dict.fromkeys(kernels)) or "IDENTITY"
        nodes.append({"name": node["name"], "executed_by": executed, "integer": True})
    return folders.Outcome(graph.run(), tuple(nodes))


class Graph:
    """A TOSA graph that grows; its tensors lie as in ONNX between two nodes of the case."""

    def __init__(self, case: folders.Case):
        self.case = case
        self.serializer = tosa_serializer.TosaSerializer("")
        self.operators: list[str] = []
        self.tensors: dict[str, Any] = {}
        for name in case.inputs:
            value = case.values[name]
            if not value["signed"]:
                raise folders.NotExpressible(f"{name}: unsigned codes")
            tensor = tosa_serializer.TosaSerializerTensor(name, value["shape"], SIGNED[value["bits"]])
            self.serializer.addInputTensor(tensor)
            self.tensors[name] = tensor

    def const(self, values: Any, dtype: Any) -> Any:
        """A constant tensor."""
        array = np.asarray(values, TYPES[dtype])
        return self.serializer.addConst(list(array.shape), dtype, array)

    def shape(self, values: Sequence[int]) -> Any:
        """A constant shape."""
        return self.serializer.addConst([len(values)], DType.SHAPE, np.asarray(values, np.int64))

    def op(self, op: Any, inputs: Sequence[Any], shape: Sequence[int], dtype: Any, *attribute: Any) -> Any:
        """The output of a new operator; `attribute` are the arguments of its attribute."""
        output = self.serializer.addIntermediate(list(shape), dtype)
        attributes = tosa_serializer.TosaSerializerAttribute()
        getattr(attributes, ATTRIBUTES[op.name] + "Attribute")(*attribute)
        self.serializer.addOperator(op, [tensor.name for tensor in inputs], [output.name], attributes)
        self.operators.append(op.name)
        return output

    def transpose(self, x: Any, perm: Sequence[int]) -> Any:
        """Axes of `x` in another order."""
        if list(perm) == list(range(len(perm))):
            return x
        return self.op(Op.TRANSPOSE, [x], [x.shape[i] for i in perm], x.dtype, list(perm))

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """`x` in another shape."""
        return self.op(Op.RESHAPE, [x, self.shape(shape)], shape, x.dtype)

    def rescale(self, x: Any, real: folders.Array, zero_points: tuple[int, int], dtype: Any) -> Any:
        """`x` less a zero point, times `real` (one or per last axis), plus the other."""
        multipliers, shifts = zip(*[fixed_point(float(value)) for value in np.atleast_1d(real)], strict=True)
        inputs = [
            x,
            self.const(multipliers, DType.INT32),
            self.const(shifts, DType.INT8),
            self.const([zero_points[0]], x.dtype),
            self.const([zero_points[1]], dtype),
        ]
        rounding = tosa_serializer.RoundingMode.SINGLE_ROUND
        return self.op(Op.RESCALE, inputs, x.shape, dtype, True, rounding, len(multipliers) > 1, False, False)

    def scale(self, name: str) -> float:
        """Scale of a value, as float32 has it."""
        return float(np.float32(self.case.values[name]["scale"]))

    def zero_point(self, name: str) -> int:
        """Zero point of a value."""
        return int(self.case.values[name]["zero_point"])

    def target(self, node: Node) -> tuple[float, int, Any]:
        """Scale, zero point and type of the output of `node`."""
        value = self.case.values[node["output"]]
        return self.scale(node["output"]), int(value["zero_point"]), SIGNED[value["bits"]]

    def run(self) -> dict[str, folders.Array]:
        """Codes of every value."""
        names = [name for name in self.tensors if name not in self.case.inputs]
        for name in names:
            self.serializer.addOutputTensor(self.tensors[name])
        feeds = [self.case.arrays[f"codes:{name}"].astype(TYPES[self.tensors[name].dtype]) for name in self.case.inputs]
        results, status = tosa_reference_model.run(self.serializer.serialize(), feeds)
        if status != tosa_reference_model.GraphStatus.TOSA_VALID:
            raise RuntimeError(f"the reference model says {status.name}")
        codes = {}
        for name, result in zip(names, results, strict=True):
            kind = TYPES[self.tensors[name].dtype]
            codes[name] = np.frombuffer(result.tobytes(), kind).reshape(self.case.values[name]["shape"])
        return codes


ATTRIBUTES = {
    "ADD": "Add",
    "AVG_POOL2D": "AvgPool2d",
    "CLAMP": "Clamp",
    "CONCAT": "Concat",
    "CONV2D": "Conv2d",
    "DEPTHWISE_CONV2D": "DepthwiseConv2d",
    "GREATER_EQUAL": "GreaterEqual",
    "IDENTITY": "Identity",
    "MATMUL": "MatMul",
    "MAX_POOL2D": "MaxPool2d",
    "MUL": "Mul",
    "PAD": "Pad",
    "REDUCE_SUM": "ReduceSum",
    "RESCALE": "Rescale",
    "RESHAPE": "Reshape",
    "SELECT": "Select",
    "SLICE": "Slice",
    "SUB": "Sub",
    "TABLE": "Table",
    "TRANSPOSE": "Transpose",
    "TRANSPOSE_CONV2D": "TransposeConv2d",
}


def fixed_point(real: float) -> tuple[int, int]:
    """(multiplier, shift) with `real` about multiplier / 2^shift and 2^30 <= multiplier < 2^31."""
    fraction, exponent = math.frexp(real)
    multiplier = math.floor(fraction * LIMIT + 0.5)
    if multiplier == LIMIT:
        multiplier, exponent = LIMIT // 2, exponent + 1
    if not 2 <= 31 - exponent <= 62:
        raise folders.NotExpressible(f"the multiplier {real} needs a shift of {31 - exponent}, not in [2, 62]")
    return multiplier, 31 - exponent


def clamped(graph: Graph, tensor: Any, node: Node) -> Any:
    """`tensor` within the clamp of `node`."""
    low, high = graph.case.clamp(node)
    kind = TYPES[tensor.dtype]
    if low <= np.iinfo(kind).min and high >= np.iinfo(kind).max:
        return tensor
    ends = [list(kind(end).tobytes()) for end in (low, high)]
    nan = tosa_serializer.NanPropagationMode.PROPAGATE
    return graph.op(Op.CLAMP, [tensor], tensor.shape, tensor.dtype, *ends, nan)


def window(node: Node, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
    """(pads top, bottom, left, right; strides; dilations) of two axes; one axis is the second of two."""
    attributes, rank = node["attributes"], len(kernel)
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise folders.NotExpressible(f"{node['name']}: auto_pad")
    pads = list(attributes.get("pads") or [0] * 2 * rank)
    strides, dilations = (list(attributes.get(name) or [1] * rank) for name in ("strides", "dilations"))
    if rank == 1:
        pads, strides, dilations = [0, pads[0], 0, pads[1]], [1, *strides], [1, *dilations]
    return [pads[0], pads[2], pads[1], pads[3]], strides, dilations


def channels_last(graph: Graph, x: Any) -> Any:
    """NCHW or NCW to NHWC."""
    if len(x.shape) == 3:
        x = graph.reshape(x, [*x.shape[:2], 1, x.shape[2]])
    if len(x.shape) != 4:
        raise folders.NotExpressible(f"{x.name}: {len(x.shape)} axes where a window needs four")
    return graph.transpose(x, [0, 2, 3, 1])


def channels_first(graph: Graph, x: Any, node: Node) -> Any:
    """NHWC to the shape of the output of `node`."""
    return like_output(graph, graph.transpose(x, [0, 3, 1, 2]), node)


def like_output(graph: Graph, x: Any, node: Node) -> Any:
    """`x` in the shape of the output of `node`."""
    shape = graph.case.values[node["output"]]["shape"]
    return x if list(x.shape) == list(shape) else graph.reshape(x, shape)


def output_size(
    x: Any, kernel: Sequence[int], pads: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> list[int]:
    """Height and width of what a window leaves of NHWC."""
    return [
        (x.shape[1 + i] + pads[2 * i] + pads[2 * i + 1] - dilations[i] * (kernel[i] - 1) - 1) // strides[i] + 1
        for i in (0, 1)
    ]


def trimmed(
    graph: Graph, x: Any, kernel: Sequence[int], pads: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[Any, list[int]]:
    """NHWC and pads without what the last window does not reach: TOSA wants strides to divide exactly."""
    pads, sizes = list(pads), list(x.shape)
    for i in (0, 1):
        room = x.shape[1 + i] + pads[2 * i] + pads[2 * i + 1] - dilations[i] * (kernel[i] - 1) - 1
        unused = room % strides[i]
        from_pad = min(unused, pads[2 * i + 1])
        pads[2 * i + 1] -= from_pad
        sizes[1 + i] -= unused - from_pad
    if sizes != list(x.shape):
        x = graph.op(Op.SLICE, [x, graph.shape([0] * 4), graph.shape(sizes)], sizes, x.dtype)
    return x, pads


def weights_of(graph: Graph, node: Node) -> tuple[folders.Array, Any]:
    """Weight codes of `node` and their type."""
    weights = graph.case.array("weights", node["name"])
    if weights is None:
        raise folders.NotExpressible(f"{node['name']}: its weights are not constant")
    return weights, DType.INT4 if node.get("weight_bits", 8) == 4 and weights.min() >= -7 else DType.INT8


def bias_of(graph: Graph, node: Node, outputs: int) -> folders.Array:
    """Bias codes of `node`, zeros where it has none."""
    bias = graph.case.array("bias", node["name"])
    return np.zeros(outputs, np.int32) if bias is None else bias


def multipliers(graph: Graph, node: Node) -> folders.Array:
    """s_in s_w / s_out of `node` in float64."""
    weight = np.atleast_1d(graph.case.arrays[f"weight_scale:{node['name']}"]).astype(np.float64)
    return graph.scale(node["inputs"][0]) * weight / graph.scale(node["output"])


def conv(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """CONV2D, DEPTHWISE_CONV2D or one CONV2D per group, then RESCALE."""
    weights, kind = weights_of(graph, node)
    if weights.ndim == 3:
        weights = weights[:, :, None]
    group, outputs, kernel = int(node["attributes"].get("group", 1)), len(weights), weights.shape[2:]
    x = channels_last(graph, inputs[0])
    pads, strides, dilations = window(node, kernel if len(inputs[0].shape) == 4 else kernel[1:])
    x, pads = trimmed(graph, x, kernel, pads, strides, dilations)
    height, width = output_size(x, kernel, pads, strides, dilations)
    zero_points = [graph.const([graph.zero_point(node["inputs"][0])], x.dtype), graph.const([0], kind)]
    bias = bias_of(graph, node, outputs)
    attribute = (pads, strides, dilations, False, DType.INT32)

    def convolve(op: Any, part: Any, w: folders.Array, b: folders.Array) -> Any:
        operands = [part, graph.const(w, kind), graph.const(b, DType.INT32), *zero_points]
        return graph.op(op, operands, [x.shape[0], height, width, len(b)], DType.INT32, *attribute)

    if group == x.shape[3] and group > 1:
        spread = weights.reshape(group, outputs // group, *kernel).transpose(2, 3, 0, 1)
        acc = convolve(Op.DEPTHWISE_CONV2D, x, spread, bias)
    else:
        parts = []
        size, depth = outputs // group, weights.shape[1]
        for i in range(group):
            rows = slice(i * size, (i + 1) * size)
            part = x
            if group > 1:
                cut = [x.shape[0], x.shape[1], x.shape[2], depth]
                part = graph.op(Op.SLICE, [x, graph.shape([0, 0, 0, i * depth]), graph.shape(cut)], cut, x.dtype)
            parts.append(convolve(Op.CONV2D, part, weights[rows].transpose(0, 2, 3, 1), bias[rows]))
        acc = parts[0]
        if group > 1:
            acc = graph.op(Op.CONCAT, parts, [x.shape[0], height, width, outputs], DType.INT32, 3)
    _, zero_point, dtype = graph.target(node)
    return channels_first(graph, graph.rescale(acc, multipliers(graph, node), (0, zero_point), dtype), node)


def conv_transpose(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """TRANSPOSE_CONV2D, then RESCALE."""
    weights, kind = weights_of(graph, node)
    attributes = node["attributes"]
    if int(attributes.get("group", 1)) != 1 or max(attributes.get("dilations") or [1]) != 1:
        raise folders.NotExpressible(f"{node['name']}: TRANSPOSE_CONV2D has neither groups nor dilation")
    if weights.ndim == 3:
        weights = weights[:, :, None]
    x = channels_last(graph, inputs[0])
    one = len(inputs[0].shape) == 3
    (top, bottom, left, right), strides, _ = window(node, weights.shape[3:] if one else weights.shape[2:])
    extra = list(attributes.get("output_padding") or [0] * (1 if one else 2))
    extra = [0, *extra] if one else extra
    out_pad = [-top, extra[0] - bottom, -left, extra[1] - right]
    shape = [x.shape[0], 0, 0, weights.shape[1]]
    for i in (0, 1):
        span = (x.shape[1 + i] - 1) * strides[i] + weights.shape[2 + i]
        shape[1 + i] = span + out_pad[2 * i] + out_pad[2 * i + 1]
    operands = [
        x,
        graph.const(weights.transpose(1, 2, 3, 0), kind),
        graph.const(bias_of(graph, node, weights.shape[1]), DType.INT32),
        graph.const([graph.zero_point(node["inputs"][0])], x.dtype),
        graph.const([0], kind),
    ]
    acc = graph.op(Op.TRANSPOSE_CONV2D, operands, shape, DType.INT32, out_pad, strides, False, DType.INT32)
    _, zero_point, dtype = graph.target(node)
    return channels_first(graph, graph.rescale(acc, multipliers(graph, node), (0, zero_point), dtype), node)


def dense(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """A constant matrix as a CONV2D of one place, two activations as MATMUL; then RESCALE."""
    _, zero_point, dtype = graph.target(node)
    if len(inputs) == 2:
        return matmul(graph, node, inputs)
    weights, kind = weights_of(graph, node)
    if weights.ndim != 2:
        raise folders.NotExpressible(f"{node['name']}: a constant of {weights.ndim} axes")
    depth, outputs = weights.shape
    rows = math.prod(inputs[0].shape) // depth
    x = graph.reshape(inputs[0], [rows, 1, 1, depth])
    operands = [
        x,
        graph.const(weights.T.reshape(outputs, 1, 1, depth), kind),
        graph.const(bias_of(graph, node, outputs), DType.INT32),
        graph.const([graph.zero_point(node["inputs"][0])], x.dtype),
        graph.const([0], kind),
    ]
    acc = graph.op(Op.CONV2D, operands, [rows, 1, 1, outputs], DType.INT32, [0] * 4, [1, 1], [1, 1], False, DType.INT32)
    return like_output(graph, graph.rescale(acc, multipliers(graph, node), (0, zero_point), dtype), node)


def matmul(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """MATMUL of two activations, then RESCALE."""
    scale, zero_point, dtype = graph.target(node)
    if list(inputs[0].shape[:-2]) != list(inputs[1].shape[:-2]):
        raise folders.NotExpressible(f"{node['name']}: MATMUL does not broadcast")
    batch = math.prod(inputs[0].shape[:-2])
    flat = [graph.reshape(x, [batch, *x.shape[-2:]]) for x in inputs]
    zeros = [graph.const([graph.zero_point(name)], x.dtype) for name, x in zip(node["inputs"], inputs, strict=True)]
    shape = [batch, flat[0].shape[1], flat[1].shape[2]]
    acc = graph.op(Op.MATMUL, [*flat, *zeros], shape, DType.INT32)
    real = graph.scale(node["inputs"][0]) * graph.scale(node["inputs"][1]) / scale
    return like_output(graph, graph.rescale(acc, np.array(real), (0, zero_point), dtype), node)


def operands_32(graph: Graph, node: Node, inputs: Sequence[Any], reals: Sequence[float]) -> list[Any]:
    """Both operands less their zero points times `reals`, in 32 bits and of the output's rank."""
    rank = len(graph.case.values[node["output"]]["shape"])
    results = []
    for name, x, real in zip(node["inputs"], inputs, reals, strict=True):
        lifted = graph.rescale(x, np.array(real), (graph.zero_point(name), 0), DType.INT32)
        missing = rank - len(x.shape)
        results.append(graph.reshape(lifted, [1] * missing + list(x.shape)) if missing else lifted)
    return results


def add(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """Two RESCALEs to a common scale, ADD or SUB, RESCALE."""
    scale, zero_point, dtype = graph.target(node)
    first, second = (graph.scale(name) for name in node["inputs"])
    lift = 15 if dtype == DType.INT16 else 20
    common = 2.0 * max(first, second)
    reals = [first / common * 2.0**lift, second / common * 2.0**lift]
    op = Op.SUB if node["op_type"] == "Sub" else Op.ADD
    shape = graph.case.values[node["output"]]["shape"]
    total = graph.op(op, operands_32(graph, node, inputs, reals), shape, DType.INT32)
    return graph.rescale(total, np.array(common / (2.0**lift * scale)), (0, zero_point), dtype)


def multiply(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """MUL of codes less their zero points, RESCALE."""
    scale, zero_point, dtype = graph.target(node)
    shape = graph.case.values[node["output"]]["shape"]
    operands = [*operands_32(graph, node, inputs, (1.0, 1.0)), graph.const([0], DType.INT8)]
    product = graph.op(Op.MUL, operands, shape, DType.INT32)
    real = graph.scale(node["inputs"][0]) * graph.scale(node["inputs"][1]) / scale
    return graph.rescale(product, np.array(real), (0, zero_point), dtype)


def pool(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """AVG_POOL2D or MAX_POOL2D; both need one grid."""
    kernel = list(node["attributes"]["kernel_shape"])
    pads, strides, dilations = window(node, kernel)
    kernel = kernel if len(kernel) == 2 else [1, *kernel]
    average = node["op_type"] == "AveragePool"
    if max(dilations) > 1 or node["attributes"].get("ceil_mode", 0):
        raise folders.NotExpressible(f"{node['name']}: pooling has neither dilation nor ceil_mode")
    if average and node["attributes"].get("count_include_pad", 0) and any(pads):
        raise folders.NotExpressible(f"{node['name']}: AVG_POOL2D does not count padding")
    source = node["inputs"][0]
    require_one_grid(graph, node)
    x, pads = trimmed(graph, channels_last(graph, inputs[0]), kernel, pads, strides, dilations)
    shape = [x.shape[0], *output_size(x, kernel, pads, strides, dilations), x.shape[3]]
    if average:
        zeros = [graph.const([graph.zero_point(source)], x.dtype) for _ in range(2)]
        y = graph.op(Op.AVG_POOL2D, [x, *zeros], shape, x.dtype, kernel, strides, pads, DType.INT32)
    else:
        nan = tosa_serializer.NanPropagationMode.PROPAGATE
        y = graph.op(Op.MAX_POOL2D, [x], shape, x.dtype, kernel, strides, pads, nan)
    return channels_first(graph, y, node)


def mean(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """RESCALE to 32 bits, REDUCE_SUM over each axis, RESCALE by s_in / (s_out n)."""
    scale, zero_point, dtype = graph.target(node)
    rank = len(inputs[0].shape)
    given = node["attributes"].get("axes")
    axes = list(range(2, rank)) if node["op_type"] == "GlobalAveragePool" else [axis % rank for axis in given]
    source = node["inputs"][0]
    total = graph.rescale(inputs[0], np.array(1.0), (graph.zero_point(source), 0), DType.INT32)
    count = math.prod(inputs[0].shape[axis] for axis in axes)
    for axis in axes:
        shape = [1 if i == axis else n for i, n in enumerate(total.shape)]
        total = graph.op(Op.REDUCE_SUM, [total], shape, DType.INT32, axis)
    y = graph.rescale(total, np.array(graph.scale(source) / (scale * count)), (0, zero_point), dtype)
    return like_output(graph, y, node)


def leaky(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """Two RESCALEs, one for each sign, and SELECT."""
    scale, zero_point, dtype = graph.target(node)
    source, x = node["inputs"][0], inputs[0]
    alpha = float(np.float32(node["attributes"].get("alpha", 0.01)))
    ratio = graph.scale(source) / scale
    zeros = (graph.zero_point(source), zero_point)
    sides = [graph.rescale(x, np.array(real), zeros, dtype) for real in (ratio, ratio * alpha)]
    lifted = graph.rescale(x, np.array(1.0), (zeros[0], 0), DType.INT32)
    zero = graph.const(np.zeros([1] * len(x.shape)), DType.INT32)
    positive = graph.op(Op.GREATER_EQUAL, [lifted, zero], x.shape, DType.BOOL)
    return graph.op(Op.SELECT, [positive, *sides], x.shape, dtype)


def table(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """TABLE of 256 entries."""
    entries = graph.case.array("table", node["name"])
    if entries is None or entries.size != 256:
        raise folders.NotExpressible(f"{node['name']}: no table of 256 entries")
    return graph.op(Op.TABLE, [inputs[0], graph.const(entries.reshape(-1), DType.INT8)], inputs[0].shape, DType.INT8)


def regridded(graph: Graph, node: Node, name: str, x: Any) -> Any:
    """`x` on the grid of the output of `node`."""
    scale, zero_point, dtype = graph.target(node)
    if scale == graph.scale(name) and zero_point == graph.zero_point(name):
        return x
    return graph.rescale(x, np.array(graph.scale(name) / scale), (graph.zero_point(name), zero_point), dtype)


def concat(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """RESCALE of what is on another grid, CONCAT."""
    parts = [regridded(graph, node, name, x) for name, x in zip(node["inputs"], inputs, strict=True)]
    shape = graph.case.values[node["output"]]["shape"]
    return graph.op(Op.CONCAT, parts, shape, parts[0].dtype, int(node["attributes"]["axis"]) % len(shape))


def one_value(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """A change of grid, Relu and Clip: the clamp follows."""
    return regridded(graph, node, node["inputs"][0], inputs[0])


def require_one_grid(graph: Graph, node: Node) -> None:
    """Refuse a node whose output has another grid than its input."""
    name = node["inputs"][0]
    if graph.scale(name) != graph.scale(node["output"]) or graph.zero_point(name) != graph.zero_point(node["output"]):
        raise folders.NotExpressible(f"{node['name']}: its input and output have different grids")


def moved(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """TRANSPOSE, or RESHAPE for every other change of shape."""
    x = inputs[0]
    if node["op_type"] == "Transpose":
        x = graph.transpose(x, node["attributes"].get("perm") or list(range(len(x.shape)))[::-1])
    return like_output(graph, regridded(graph, node, node["inputs"][0], x), node)


def cut(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """SLICE of steps 1."""
    x, attributes = inputs[0], node["attributes"]
    if any(step != 1 for step in attributes.get("steps") or [1]):
        raise folders.NotExpressible(f"{node['name']}: SLICE has no steps")
    starts, sizes = [0] * len(x.shape), list(x.shape)
    axes = attributes.get("axes") or range(len(attributes["starts"]))
    for axis, start, end in zip(axes, attributes["starts"], attributes["ends"], strict=True):
        first, last, _ = slice(start, end).indices(x.shape[axis])
        starts[axis], sizes[axis] = first, last - first
    return graph.op(Op.SLICE, [x, graph.shape(starts), graph.shape(sizes)], sizes, x.dtype)


def pad(graph: Graph, node: Node, inputs: Sequence[Any]) -> Any:
    """PAD with the zero point."""
    x, attributes = inputs[0], node["attributes"]
    pads, rank = attributes["pads"], len(inputs[0].shape)
    if attributes.get("mode", "constant") != "constant" or len(pads) != 2 * rank:
        raise folders.NotExpressible(f"{node['name']}: PAD only with a constant, along every axis")
    pairs = [pads[i + side * rank] for i in range(rank) for side in (0, 1)]
    fill = graph.const([graph.zero_point(node["inputs"][0])], x.dtype)
    return graph.op(Op.PAD, [x, graph.shape(pairs), fill], graph.case.values[node["output"]]["shape"], x.dtype)


LOWERINGS: Mapping[str, Callable[[Graph, Node, Sequence[Any]], Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    **dict.fromkeys(("Gemm", "MatMul"), dense),
    **dict.fromkeys(("Add", "Sub"), add),
    "Mul": multiply,
    **dict.fromkeys(("AveragePool", "MaxPool"), pool),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), mean),
    "LeakyRelu": leaky,
    **dict.fromkeys(("Sigmoid", "Tanh", "HardSwish", "HardSigmoid", "Gelu", "Elu", "Mish", "Softplus"), table),
    "Concat": concat,
    **dict.fromkeys(("Relu", "Clip", "Identity", "QuantizeLinear"), one_value),
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose"), moved),
    "Slice": cut,
    "Pad": pad,
}


if __name__ == "__main__":
    sys.exit(folders.main("TOSA reference model", version("tosa-tools"), run))
