"""What a QDQ file says: its constants, its grids, who reads what; and one of its nodes run by ONNX Runtime."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, TypeProto, helper, inliner, numpy_helper

from onnxqt import numerics
from onnxqt.emulate.kernels.windows import Window
from onnxqt.emulate.steps import Run, Step, Tensor, storage
from onnxqt.errors import EmulatorError, first_line
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.profiles import Arithmetic
from onnxqt.runtime import Session

_OPSETS = range(13, 22)
_GRIDS: Mapping[int, Grid] = {
    TensorProto.INT4: Grid(4, signed=True),
    TensorProto.UINT4: Grid(4, signed=False),
    TensorProto.INT8: Grid(8, signed=True),
    TensorProto.UINT8: Grid(8, signed=False),
    TensorProto.INT16: Grid(16, signed=True),
    TensorProto.UINT16: Grid(16, signed=False),
}
BIAS_GRID = Grid(32, signed=True)
_ALL_GRIDS: Mapping[int, Grid] = {**_GRIDS, TensorProto.INT32: BIAS_GRID}


class NotIntegerError(Exception):
    """Raised by a builder whose node has no integer form; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Graph:
    """What is known of a graph while its steps are decided, in topological order."""

    proto: ModelProto
    arithmetic: Arithmetic
    reference: bool
    constants: dict[str, TensorProto]
    consumers: dict[str, list[NodeProto]]
    grids: dict[str, Grid] = field(default_factory=dict)  # of values that are codes in the file
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shapes: set[str] = field(default_factory=set)  # integers computed from shapes
    levels: set[str] = field(default_factory=set)  # of a logarithmic grid
    done: set[str] = field(default_factory=set)  # first outputs of nodes that need no step of their own
    steps: list[Step] = field(default_factory=list)


def read_file(model: str | Path | ModelProto) -> ModelProto:
    """A checked model without local functions."""
    where = "the model" if isinstance(model, ModelProto) else f"'{model}'"
    try:
        proto = model if isinstance(model, ModelProto) else onnx.load(model, format="protobuf")
        onnx.checker.check_model(proto if isinstance(model, ModelProto) else str(model))
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise EmulatorError(f"cannot read {where} as ONNX: {first_line(error)}") from error
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in _OPSETS:
        raise EmulatorError(
            f"{where} has opset {opset}: expected {_OPSETS[0]} to {_OPSETS[-1]}; convert it with onnx.version_converter"
        )
    return inliner.inline_local_functions(proto) if proto.functions else proto


def open_graph(proto: ModelProto, arithmetic: Arithmetic, reference: bool) -> Graph:
    """A graph of which nothing is decided yet."""
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        for name in read_names(node):
            consumers.setdefault(name, []).append(node)
    for output in proto.graph.output:
        consumers.setdefault(output.name, []).append(NodeProto(op_type="graph output"))
    graph = Graph(proto, arithmetic, reference, constants, consumers)
    for value in proto.graph.input:
        if value.name not in constants and value.type.tensor_type.elem_type in _GRIDS:
            graph.grids[value.name] = _GRIDS[value.type.tensor_type.elem_type]
    return graph


def declared(graph: Graph, value: onnx.ValueInfoProto) -> tuple[Any, tuple[int | None, ...] | None]:
    """Numpy type and shape of a graph input."""
    kind = value.type.tensor_type
    grid = graph.grids.get(value.name)
    dtype = storage(grid) if grid else helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if not kind.HasField("shape"):
        return dtype, None
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)


def read_names(node: NodeProto) -> list[str]:
    """Every tensor that a node reads, its subgraphs (If, Loop, Scan) included."""
    inner = [graph for a in node.attribute for graph in ((a.g,) if a.HasField("g") else a.graphs)]
    return list(dict.fromkeys(filter(None, (*node.input, *(name for graph in inner for name in _captured(graph))))))


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Tensors that a subgraph reads from the graphs around it."""
    local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        yield from (name for name in read_names(node) if name not in local)
        local.update(node.output)
    yield from (value.name for value in graph.output if value.name not in local)


def node_name(node: NodeProto) -> str:
    """How messages call a node."""
    return node.name or next(filter(None, node.output), node.op_type)


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Attributes as plain values."""
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def array(graph: Graph, name: str) -> Array:
    """A constant of the file; codes as int32 whatever their storage."""
    tensor = graph.constants[name]
    values: Array = numpy_helper.to_array(tensor)
    return values.astype(np.int32) if tensor.data_type in _GRIDS else values


def stored(graph: Graph, name: str) -> Array:
    """A constant of the file, in the type that steps pass it in."""
    tensor = graph.constants[name]
    values: Array = numpy_helper.to_array(tensor)
    return values.astype(storage(_GRIDS[tensor.data_type])) if tensor.data_type in _GRIDS else values


def is_constant(graph: Graph, name: str) -> bool:
    """Whether a tensor has the same value in every run."""
    return (graph.tensors[name].codes if name in graph.tensors else name) in graph.constants


def constant(graph: Graph, name: str) -> Array:
    """The value of a constant, real where it is quantized."""
    if name in graph.tensors:
        tensor = graph.tensors[name]
        return numerics.dequantize(array(graph, tensor.codes), tensor.params)
    return array(graph, name)


def fixed(graph: Graph, node: NodeProto, index: int, default: Any = None) -> Any:
    """A constant input; `default` where the node does not have it."""
    if index >= len(node.input) or not node.input[index]:
        return default
    if not is_constant(graph, node.input[index]):
        raise NotIntegerError(f"its input '{node.input[index]}' is not constant")
    return constant(graph, node.input[index])


def quantizer_params(graph: Graph, node: NodeProto) -> QParams | None:
    """Grid of a QuantizeLinear or DequantizeLinear; None where it is neither per tensor nor per channel.

    Raises:
        EmulatorError: if the scale is not constant, not float32 or not positive, or the type is unknown.
    """
    where = f"node '{node_name(node)}' ({node.op_type})"
    if any(name and name not in graph.constants for name in node.input[1:]):
        raise EmulatorError(f"{where} has a scale or zero point that is not constant: quantize statically")
    scale = array(graph, node.input[1])
    zero_point, kind = np.zeros(scale.shape, np.int32), int(TensorProto.UINT8)
    if len(node.input) > 2 and node.input[2]:
        zero_point = array(graph, node.input[2]).astype(np.int32)
        kind = graph.constants[node.input[2]].data_type
    elif node.op_type == "QuantizeLinear":
        kind = attributes_of(node).get("output_dtype", 0) or kind
    elif node.input[0] in graph.constants:
        kind = graph.constants[node.input[0]].data_type
    grid = _ALL_GRIDS.get(kind)
    if node.op_type == "DequantizeLinear":
        grid = graph.grids.get(node.input[0], grid)
    if grid is None or scale.dtype != np.float32:
        kinds = f"type {TensorProto.DataType.Name(kind)} and a {scale.dtype} scale"
        raise EmulatorError(f"{where} has {kinds}: expected 4, 8 or 16-bit integers and a float32 scale")
    attributes = attributes_of(node)
    if scale.ndim > 1 or attributes.get("block_size", 0):
        return None
    axis = attributes.get("axis", 1) if scale.size > 1 else None
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    try:
        return QParams(scale, zero_point, grid, axis)
    except ValueError as error:
        raise EmulatorError(f"{where}: {error}") from error


def per_tensor(graph: Graph, node: NodeProto) -> QParams:
    """Grid of the quantizer of an activation, which must have one scale."""
    params = quantizer_params(graph, node)
    if params is None or params.axis is not None:
        raise EmulatorError(
            f"node '{node_name(node)}' ({node.op_type}) quantizes an activation per channel or block:"
            " expected one scale per tensor"
        )
    return params


def quantized(graph: Graph, node: NodeProto, index: int) -> Tensor:
    """Input `index` as codes on one grid."""
    name = node.input[index]
    if name not in graph.tensors or graph.tensors[name].params.axis is not None:
        raise NotIntegerError(f"its input '{name}' is not quantized per tensor")
    return graph.tensors[name]


def window_of(attributes: Mapping[str, Any], kernel: Sequence[int]) -> Window:
    """Geometry of a convolution or a pool from its attributes."""
    ones = (1,) * len(kernel)
    return Window(
        tuple(kernel),
        tuple(attributes.get("strides", ones)),
        tuple(attributes.get("dilations", ones)),
        tuple(attributes.get("pads", (0, 0) * len(kernel))),
        attributes.get("auto_pad", "NOTSET"),
        bool(attributes.get("ceil_mode", 0)),
    )


def onnxruntime_run(graph: Graph, node: NodeProto, names: Sequence[str]) -> Run:
    """Runs `node` alone: values of the inputs `names` -> its outputs. Its other inputs are constants.

    Without optimizations, which for some nodes (Conv) choose kernels that round in another order: the results are
    those of the file as it is written.
    """
    constants = [
        graph.constants[name] if name in graph.constants else numpy_helper.from_array(constant(graph, name), name)
        for name in read_names(node)
        if name not in names
    ]
    types = {value.name: value.type for value in graph.proto.graph.value_info}
    inputs = {name: types.get(name) for name in names}
    return one_node_run(node, constants, graph.proto.opset_import, inputs, optimize=False, threads=1)


def one_node_run(
    node: NodeProto,
    constants: Sequence[TensorProto],
    opsets: Any,
    inputs: Mapping[str, TypeProto | None],
    optimize: bool = True,
    threads: int = 0,
) -> Run:
    """One node in ONNX Runtime; a session per combination of input types.

    `inputs` are the values that it gets, with their types in the file, which say what a sequence holds.
    """
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]

    @functools.cache
    def session(kinds: tuple[int | None, ...]) -> Session:
        infos = [
            helper.make_tensor_value_info(name, kind, None) if kind else onnx.ValueInfoProto(name=name, type=declared)
            for (name, declared), kind in zip(inputs.items(), kinds, strict=True)
        ]
        inner = helper.make_graph([node], "node", infos, outputs, constants)
        return Session(helper.make_model(inner, opset_imports=opsets, ir_version=10), optimize, threads=threads)

    def run(*values: Array) -> tuple[Array, ...]:
        kinds = tuple(
            helper.np_dtype_to_tensor_dtype(value.dtype) if isinstance(value, np.ndarray) else None for value in values
        )
        return tuple(session(kinds).run(dict(zip(inputs, values, strict=True))).values())

    return run
