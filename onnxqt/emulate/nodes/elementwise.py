"""Operators that treat every element alone: sums and products of two tensors, activation functions, clamps."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from onnxqt import numerics
from onnxqt.emulate import fast
from onnxqt.emulate.graph import (
    Graph,
    NotIntegerError,
    array,
    attributes_of,
    constant,
    is_constant,
    quantized,
    read_names,
)
from onnxqt.emulate.kernels import add, hardswish, leaky, multiply, tables
from onnxqt.emulate.kernels import softmax as softmax_kernels
from onnxqt.emulate.steps import Detail, NodeInfo, Tensor
from onnxqt.emulate.tail import Tail, emit, follow, integer, widened
from onnxqt.numerics import Array, IntArray, QParams
from onnxqt.requantize import ScaleError, requantization, requantize
from onnxqt.runtime import Session

FUNCTIONS = frozenset(
    (
        *("Abs", "Celu", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log"),
        *("Max", "Min", "Mish", "Neg", "PRelu", "Pow", "Reciprocal", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign"),
        *("Sqrt", "Tanh", "ThresholdedRelu", "Add", "Sub", "Mul", "Clip", "Relu"),
    )
)
_WIDEST_TABLE = 16  # bits
_TABLE = "table of codes"


def regrid(graph: Graph, source: QParams, target: QParams) -> tuple[Callable[[Array], Array], Array | None]:
    """Stored codes on the `target` grid from those on the `source` grid, and the table; none for equal grids."""
    if tables.same_grid(source, target):
        return (lambda codes: codes), None
    rule = graph.arithmetic.transfer
    if rule in tables.TRANSFER_RULES:
        table = tables.TRANSFER_RULES[rule](source, target)
    else:
        try:
            how = requantization(rule, source.scale, np.ones((), np.float32), target)
        except ScaleError as reason:
            raise NotIntegerError(f"its codes cannot be moved to another grid: {reason}") from reason
        table = requantize(tables.every_code(source) - source.zero_point, how)
    return fast.lookup(table, source, target), table


# Two tensors


def binary(graph: Graph, node: NodeProto) -> None:
    """Add, Sub or Mul of two quantized tensors; one of them with itself or constants only is a function."""
    if _is_function(graph, node):
        function(graph, node)
        return
    a, b, tail = quantized(graph, node, 0), quantized(graph, node, 1), follow(graph, node)
    arithmetic = graph.arithmetic
    rule = arithmetic.multiply if node.op_type == "Mul" else arithmetic.add
    if rule == "none":
        raise NotIntegerError(f"the back end computes {node.op_type} in float")
    rules = multiply.RULES if node.op_type == "Mul" else add.RULES
    params = (a.params, _negative(b.params) if node.op_type == "Sub" else b.params)
    sign = -1 if node.op_type == "Sub" else 1

    def kernel(x: IntArray, y: IntArray) -> IntArray:
        return rules[rule](x, sign * y, params, tail.params, arithmetic.quantize)

    detail = Detail(attributes_of(node), clamp=tail.clamp)
    if graph.reference or not fast.has_qlinear(a.params, b.params):
        emit(graph, (a, b), tail, widened(kernel, tail), (integer(node, rule, "numpy"), detail))
    elif node.op_type == "Add" and fast.has_qlinear_add(rule, a.params, b.params, tail.params):
        run = fast.qlinear_add(a.params, b.params, tail.params)
        info = integer(node, rule, "ONNX Runtime QLinearAdd")
        emit(graph, (a, b), tail, lambda x, y: (tail.within(run(x, y)),), (info, detail))
    else:
        pairs = fast.pairs(lambda x, y: tail.limit(kernel(x, y)), a.params, b.params, tail.params)
        info = integer(node, rule, "table of pairs of codes")
        emit(graph, (a, b), tail, lambda x, y: (pairs(x, y),), (info, detail))


def _negative(params: QParams) -> QParams:
    return replace(params, zero_point=-params.zero_point)


# Functions of one tensor


def function(graph: Graph, node: NodeProto) -> None:
    """An activation function, of one node or several: a table of what each code becomes.

    table[c] = clip(round(f((c - z_in) s_in) / s_out) + z_out)

    f is what ONNX Runtime computes in float32, or the back end where its own form is known; the rounding is its own.
    """
    rule = graph.arithmetic.table
    if rule == "float":
        raise NotIntegerError("the back end computes activation functions in float")
    x, unit, last = _unit(graph, node)
    if rule == "tflite" and x.params.grid.bits > 8:
        raise NotIntegerError("the back end interpolates in a table for 16-bit codes, which is not modelled")
    if x.params.grid.bits > _WIDEST_TABLE:
        raise NotIntegerError(f"a table for {x.params.grid.bits}-bit codes is too large")
    tail = follow(graph, last)
    every = numerics.dequantize(tables.every_code(x.params), x.params)
    own = tables.FUNCTIONS.get(node.op_type) if rule in ("tflite", "xnnpack") and len(unit) == 1 else None
    if own is not None and attributes_of(node).get("approximate", "none") == "none":
        real: Array = own(every)
    else:
        real = _evaluate(graph, unit, _source_of(graph, node), every)
    table = tail.limit(tables.TABLE_RULES[rule](real, tail.params))
    graph.done.update(part.output[0] for part in unit)
    operators = " ".join(part.op_type for part in unit)
    note = f"one table for {operators}" if len(unit) > 1 else ""
    _emit_table(graph, x, tail, table, integer(node, f"table {rule}", _TABLE, note), attributes_of(node))


def _source_of(graph: Graph, node: NodeProto) -> str:
    moving = [name for name in dict.fromkeys(filter(None, node.input)) if not is_constant(graph, name)]
    if len(moving) != 1:
        raise NotIntegerError("it reads more than one tensor")
    return str(moving[0])


def _is_function(graph: Graph, node: NodeProto) -> bool:
    """Whether a node of two operands is an activation function of one of them."""
    moving = {name for name in node.input if name and not is_constant(graph, name)}
    small = all(constant(graph, name).size == 1 for name in node.input if name and is_constant(graph, name))
    return len(moving) == 1 and small


def _unit(graph: Graph, node: NodeProto) -> tuple[Tensor, list[NodeProto], NodeProto]:
    """The tensor, the nodes and the last of them, of an activation function that `node` is the first node of."""
    source = _source_of(graph, node)
    if source not in graph.tensors or graph.tensors[source].params.axis is not None:
        raise NotIntegerError(f"its input '{source}' is not quantized per tensor")
    unit = next(_units_from(graph, node, source), [node])
    for part in unit:
        if any(is_constant(graph, name) and constant(graph, name).size != 1 for name in part.input if name):
            raise NotIntegerError("it has a constant of several values")
    return graph.tensors[source], unit, unit[-1]


def _units_from(graph: Graph, node: NodeProto, source: str) -> Iterator[list[NodeProto]]:
    """The functions of `source` that hold `node` and end before a quantizer, the shortest first."""
    values = {source}  # functions of the source, value by value
    for other in graph.proto.graph.node:
        if other.op_type not in FUNCTIONS or not _reads_only(graph, other, values):
            continue
        values.add(other.output[0])
        if _is_quantized_next(graph, other.output[0]):
            unit = _ancestors(graph, other, source)
            if any(part is node for part in unit) and _is_closed(graph, unit):
                yield unit


def _is_quantized_next(graph: Graph, name: str) -> bool:
    """Whether a value goes, through clamps at most, to one quantizer."""
    users = graph.consumers.get(name, [])
    if len(users) == 1 and users[0].op_type in ("Relu", "Clip"):
        return _is_quantized_next(graph, users[0].output[0])
    return len(users) == 1 and users[0].op_type == "QuantizeLinear"


def _reads_only(graph: Graph, node: NodeProto, values: set[str]) -> bool:
    moving = [name for name in node.input if name and not is_constant(graph, name)]
    return bool(moving) and values.issuperset(moving)


def _ancestors(graph: Graph, last: NodeProto, source: str) -> list[NodeProto]:
    """The nodes between `source` and the result of `last`, in order."""
    needed, unit = {last.output[0]}, []
    for other in reversed(graph.proto.graph.node):
        if needed.intersection(other.output):
            unit.append(other)
            needed.update(name for name in other.input if name != source and not is_constant(graph, name))
    return unit[::-1]


def _is_closed(graph: Graph, unit: list[NodeProto]) -> bool:
    """Whether nothing outside reads what is computed before the last node."""
    members = [id(part) for part in unit]
    inner = [name for part in unit[:-1] for name in part.output]
    return all(id(user) in members for name in inner for user in graph.consumers.get(name, []))


def _evaluate(graph: Graph, unit: list[NodeProto], source: str, values: Array) -> Array:
    """What the nodes of a function make of real values, in ONNX Runtime."""
    names = dict.fromkeys(name for part in unit for name in read_names(part) if is_constant(graph, name))
    constants = [numpy_helper.from_array(np.asarray(constant(graph, name)), name) for name in names]
    inputs = [helper.make_tensor_value_info(source, onnx.TensorProto.FLOAT, [None])]
    outputs = [helper.make_empty_tensor_value_info(unit[-1].output[0])]
    inner = helper.make_graph(unit, "function", inputs, outputs, constants)
    model = helper.make_model(inner, opset_imports=graph.proto.opset_import, ir_version=10)
    with np.errstate(all="ignore"):
        (real,) = Session(model, optimize=False).run({source: values}).values()
    if not np.isfinite(real).all():
        raise NotIntegerError("it has no finite value for some codes of its input")
    return np.asarray(real).reshape(-1)


def leaky_relu(graph: Graph, node: NodeProto) -> None:
    """LeakyRelu: a table of the function, or of the fixed-point form of the back end."""
    rule = graph.arithmetic.leaky
    if rule not in leaky.RULES:
        function(graph, node)
        return
    x, tail = quantized(graph, node, 0), follow(graph, node)
    if x.params.grid.bits > _WIDEST_TABLE:
        raise NotIntegerError(f"a table for {x.params.grid.bits}-bit codes is too large")
    alpha, rounding = np.float32(attributes_of(node).get("alpha", 0.01)), graph.arithmetic.quantize
    table = leaky.RULES[rule](tables.every_code(x.params), alpha, (x.params, None), tail.params, rounding)
    _emit_table(graph, x, tail, tail.limit(table), integer(node, rule, _TABLE), attributes_of(node))


def prelu(graph: Graph, node: NodeProto) -> None:
    """PRelu with constant slopes on a grid of their own, in the fixed-point form of the back end."""
    rule = graph.arithmetic.leaky
    if _is_function(graph, node):
        function(graph, node)
        return
    if rule not in leaky.PRELU_RULES:
        raise NotIntegerError("the back end computes PRelu in float")
    x, tail, slope = quantized(graph, node, 0), follow(graph, node), graph.tensors.get(node.input[1])
    if slope is None or slope.codes not in graph.constants or slope.params.axis is not None:
        raise NotIntegerError(f"its slope '{node.input[1]}' is not a constant quantized per tensor")
    if x.params.grid.bits > 8:
        raise NotIntegerError("the back end has PRelu for 8-bit codes alone")
    alpha, grids, rounding = array(graph, slope.codes), (x.params, slope.params), graph.arithmetic.quantize

    def kernel(codes: IntArray) -> IntArray:
        return leaky.PRELU_RULES[rule](codes, alpha, grids, tail.params, rounding)

    detail = Detail(
        attributes_of(node),
        weights=alpha,
        weight_scale=slope.params.scale,
        weight_bits=slope.params.grid.bits,
        weight_zero_point=int(slope.params.zero_point),
        clamp=tail.clamp,
    )
    emit(graph, (x,), tail, widened(kernel, tail), (integer(node, rule, "numpy"), detail))


def _emit_table(
    graph: Graph, x: Tensor, tail: Tail, table: Array, info: NodeInfo, attributes: Mapping[str, Any]
) -> None:
    run = fast.lookup(table, x.params, tail.params)
    emit(graph, (x,), tail, lambda codes: (run(codes),), (info, Detail(attributes, clamp=tail.clamp, table=table)))


def hard_swish(graph: Graph, node: NodeProto) -> None:
    """A table of the function, or of the fixed-point form of the back end."""
    if graph.arithmetic.hard_swish == "table":
        function(graph, node)
        return
    x, tail = quantized(graph, node, 0), follow(graph, node)
    if x.params.grid.bits > 8:
        raise NotIntegerError("the back end has HardSwish for 8-bit codes alone")
    table = tail.limit(hardswish.hard_swish(tables.every_code(x.params), x.params, tail.params))
    _emit_table(graph, x, tail, table, integer(node, graph.arithmetic.hard_swish, _TABLE), attributes_of(node))


def softmax(graph: Graph, node: NodeProto) -> None:
    """The integer form of the back end, where it has one."""
    rule = graph.arithmetic.softmax
    if rule == "float":
        raise NotIntegerError("the back end computes Softmax in float")
    x, tail = quantized(graph, node, 0), follow(graph, node)
    axis = attributes_of(node).get("axis", -1)
    if x.params.grid.bits > 8:
        raise NotIntegerError("the back end has Softmax for 8-bit codes alone")

    def kernel(codes: IntArray) -> IntArray:
        if axis not in (-1, codes.ndim - 1):
            moved = softmax_kernels.RULES[rule](np.moveaxis(codes, axis, -1), x.params, tail.params)
            return np.moveaxis(moved, -1, axis)
        return softmax_kernels.RULES[rule](codes, x.params, tail.params)

    detail = Detail({"axis": axis}, clamp=tail.clamp)
    emit(graph, (x,), tail, widened(kernel, tail), (integer(node, rule, "numpy"), detail))


def clip(graph: Graph, node: NodeProto) -> None:
    """A free-standing Clip: codes on the grid of the result, limited."""
    x, tail = quantized(graph, node, 0), follow(graph, node)
    run, table = regrid(graph, x.params, tail.params)
    detail = Detail(attributes_of(node), clamp=tail.clamp, table=table)
    info = integer(node, graph.arithmetic.transfer, _TABLE)
    emit(graph, (x,), tail, lambda codes: (tail.stored(run(codes)),), (info, detail))
