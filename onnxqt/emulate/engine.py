"""From a QDQ file to an integer program: what runs on integers, what stays float and why.

`load_program` reads the graph once and decides, node by node, what runs: an integer kernel on codes, or the
node itself in float with the reason why. `Program.run` then only executes. An operator runs on integers when
its inputs come from DequantizeLinear and its output goes, through an optional activation, to QuantizeLinear:

    DequantizeLinear -> Conv -> Relu -> QuantizeLinear      one integer node

A clamp before a quantizer is a clamp of the codes, because quantization is monotone:
`quantize(clip(x, lo, hi)) = clip(quantize(x), quantize(lo), quantize(hi))`. Operators that only move or
select values (Reshape, MaxPool, Relu ...) pass the codes and their grid on and need no quantizer. A Clip of the
codes between QuantizeLinear and DequantizeLinear makes their grid narrower. How an integer node computes is said
by the arithmetic of a back end (`onnxqt.profiles`); `emulate/nodes/` has a builder for each operator.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnxqt import numerics
from onnxqt.emulate import logarithmic
from onnxqt.emulate.graph import (
    Graph,
    NotIntegerError,
    array,
    attributes_of,
    constant,
    declared,
    is_constant,
    node_name,
    onnxruntime_run,
    open_graph,
    per_tensor,
    quantizer_params,
    read_file,
    read_names,
    stored,
)
from onnxqt.emulate.kernels import moves
from onnxqt.emulate.nodes import build
from onnxqt.emulate.nodes.elementwise import regrid
from onnxqt.emulate.program import Program, execute
from onnxqt.emulate.steps import Detail, NodeInfo, Step, Tensor, storage
from onnxqt.emulate.tail import is_static, narrowed
from onnxqt.numerics import Array
from onnxqt.profiles import PROFILES, Arithmetic

_ONNX_RUNTIME = replace(PROFILES["ort_cpu"].arithmetic, dynamic="float")  # a QDQ file asks for no run-time scales


def load_program(
    model: str | Path | ModelProto, arithmetic: Arithmetic = _ONNX_RUNTIME, *, reference: bool = False
) -> Program:
    """Reads a quantized model (QuantizeLinear/DequantizeLinear, opset 13 to 21).

    Args:
        model: path or loaded model.
        arithmetic: how the back end computes; by default as ONNX Runtime does.
        reference: compute everywhere by the definition in numpy, which shares no kernel with ONNX Runtime, instead of
            the fastest way that gives the same.

    Raises:
        EmulatorError: if the file is not a valid model, or has a quantizer without integer meaning here.
    """
    proto = read_file(model)
    graph = open_graph(proto, arithmetic, reference)
    for node in proto.graph.node:
        _fold(graph, node)
    for node in proto.graph.node:
        if node.output[0] not in graph.done:
            _decide(graph, node)
    program = _program(graph)
    graph.steps.clear()  # which refer to the graph: so a program is freed as soon as it is dropped
    return program


def _program(graph: Graph) -> Program:
    proto = graph.proto.graph
    inputs = {value.name: declared(graph, value) for value in proto.input if value.name not in graph.constants}
    outputs: dict[str, Any] = {}
    for name in (value.name for value in proto.output):
        moving = name in graph.tensors and not is_constant(graph, name)
        kept_in = storage(graph.grids[name]) if name in graph.grids else None
        outputs[name] = graph.tensors[name] if moving else kept_in
    needed = {name for step in graph.steps for name in step.inputs}
    constants = {name: stored(graph, name) for name in needed & graph.constants.keys()}
    constants |= {name: constant(graph, name) for name in outputs if is_constant(graph, name)}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if tensor.codes in graph.grids}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.codes not in graph.constants}
    values = {tensor.codes: tensor.params for tensor in graph.tensors.values()}
    values = {name: params for name, params in values.items() if name not in graph.constants}
    overflow = graph.arithmetic.accumulator.overflow
    return Program(tuple(graph.steps), inputs, outputs, tensors, values, constants, overflow)


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
        codes = numerics.quantize(array(graph, node.input[0]), params).astype(storage(params.grid))
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
    codes = stored(graph, tensor.codes)
    allow_zero = bool(attributes_of(node).get("allowzero", 0))
    reshaped = moves.reshape(codes, array(graph, node.input[1]), allow_zero)
    axis = tensor.params.axis
    if axis is not None and (axis != codes.ndim - 1 or reshaped.shape[-1:] != codes.shape[-1:]):
        return None
    name = f"{node.output[0]}/codes"
    graph.constants[name] = numpy_helper.from_array(reshaped, name)
    return Tensor(name, replace(tensor.params, axis=None if axis is None else reshaped.ndim - 1))


# One step per node


def _decide(graph: Graph, node: NodeProto) -> None:
    """Writes down the step of one node, and what the graph knows of the node's outputs."""
    moving = [name for name in read_names(node) if not is_constant(graph, name)]
    if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
        _decide_quantizer(graph, node)
    elif node.op_type == "Shape":
        _shape(graph, node)
    elif moving and graph.shapes.issuperset(moving):
        graph.shapes.update(node.output)
        _float(graph, node, "")
    elif graph.arithmetic.levels != "uniform":
        logarithmic.decide(graph, node)
    else:
        _build(graph, node)


def _decide_quantizer(graph: Graph, node: NodeProto) -> None:
    """Writes down the step of a QuantizeLinear or DequantizeLinear."""
    if not is_static(graph, node):
        _float(graph, node, "its scale or zero point is computed at run time")
    elif graph.arithmetic.levels != "uniform":
        logarithmic.quantizer(graph, node)
    elif node.op_type == "QuantizeLinear":
        _quantize(graph, node)
    elif node.input[0] in graph.grids:
        graph.tensors[node.output[0]] = Tensor(node.input[0], per_tensor(graph, node))
    else:
        _build(graph, node)


def _build(graph: Graph, node: NodeProto) -> None:
    """An integer step where the node has one, else a float one with the reason."""
    try:
        build(graph, node)
    except NotIntegerError as reason:
        _float(graph, node, str(reason))


def _quantize(graph: Graph, node: NodeProto) -> None:
    """A quantizer between floats and codes, or between two grids."""
    codes, params, clip = narrowed(graph, node)
    graph.grids[codes] = params.grid
    graph.done.update(clip)
    source = graph.tensors.get(node.input[0])
    rounding, kind = graph.arithmetic.quantize, storage(params.grid)

    def quantize(x: Array) -> tuple[Array, ...]:
        return (numerics.quantize(x, params, rounding).astype(kind),)

    if source is None:
        info = NodeInfo(node_name(node), node.op_type, "boundary", rule=f"half {rounding}", implementation="quantize")
        graph.steps.append(Step(info, (node.input[0],), (codes,), quantize))
        return
    try:
        run, table = regrid(graph, source.params, params)
    except NotIntegerError as reason:
        info = NodeInfo(node_name(node), node.op_type, "float", str(reason), implementation="quantize")
        graph.steps.append(Step(info, (_real(graph, node.input[0]),), (codes,), quantize))
        return
    info = NodeInfo(
        node_name(node), node.op_type, "boundary", rule=graph.arithmetic.transfer, implementation="table of codes"
    )
    graph.steps.append(Step(info, (source.codes,), (codes,), lambda x: (run(x),), detail=Detail(table=table)))


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
    execute = onnxruntime_run(graph, node, names)
    kind: Literal["float", "shape"] = "float" if reason else "shape"
    info = NodeInfo(node_name(node), node.op_type, kind, reason, implementation="ONNX Runtime")
    graph.steps.append(Step(info, tuple(values), tuple(filter(None, node.output)), execute))


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
