"""From a QDQ file to an integer program, and from samples to results.

`load_program` reads the graph once and decides, node by node, what runs: an integer kernel on codes, or the
node itself in float with the reason why. `Program.run` then only executes. An operator runs on integers when
its inputs come from DequantizeLinear and its output goes, through an optional activation, to QuantizeLinear:

    DequantizeLinear -> Conv -> Relu -> QuantizeLinear      one integer node

A clamp before a quantizer is a clamp of the codes, because quantization is monotone:
`quantize(clip(x, lo, hi)) = clip(quantize(x), quantize(lo), quantize(hi))`. Operators that only move or
select values (Reshape, MaxPool, Relu ...) pass the codes and their grid on and need no quantizer.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

from onnxqt import numerics
from onnxqt.emulate import kernels
from onnxqt.emulate.kernels import Product, Window
from onnxqt.errors import EmulatorError
from onnxqt.numerics import Array, FloatArray, Grid, IntArray, QParams

_OPSETS = range(13, 22)
_BIAS_TOLERANCE = 2.0**-20  # a bias scale computed in another order than ours is off by a few 2**-24
_GRIDS: Mapping[int, Grid] = {
    TensorProto.INT4: Grid(4, signed=True),
    TensorProto.UINT4: Grid(4, signed=False),
    TensorProto.INT8: Grid(8, signed=True),
    TensorProto.UINT8: Grid(8, signed=False),
    TensorProto.INT16: Grid(16, signed=True),
    TensorProto.UINT16: Grid(16, signed=False),
}
_BIAS_GRID = Grid(32, signed=True)
_ALL_GRIDS: Mapping[int, Grid] = {**_GRIDS, TensorProto.INT32: _BIAS_GRID}

Run = Callable[..., tuple[Array, ...]]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """How one node runs.

    Attributes:
        name: the node's name, or the name of its output where it has none.
        op_type: its operator.
        kind: "integer" on codes; "float" through ONNX Runtime; "boundary" for a quantizer that stands
            between floats and codes or between two grids; "shape" for what only computes sizes.
        reason: why the node is float, else empty.
        note: what the file leaves open and was decided here, else empty.
        bound: limit of the accumulator and of all its partial sums, None where nothing is accumulated.
        implementation: how the result is computed.
    """

    name: str
    op_type: str
    kind: Literal["integer", "float", "boundary", "shape"]
    reason: str = ""
    note: str = ""
    bound: int | None = None
    implementation: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to execute: `outputs = run(*inputs)`, values by name.

    `overflows` names the output, if any, that counts the accumulators that wrapped.
    """

    info: NodeInfo
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run
    overflows: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A real tensor that exists as codes: the value `codes` on the grid `params`."""

    codes: str
    params: QParams


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes (int32) and their grid."""

    codes: IntArray
    params: QParams


@dataclass(frozen=True, slots=True)
class Result:
    """What a run returns.

    Attributes:
        outputs: real values of each graph output; codes where the file's output is itself an integer.
        codes: codes of each graph output that is quantized, and of the tensors asked for.
        overflows: accumulators that did not fit 32 bits and wrapped, by node name.
    """

    outputs: dict[str, Array]
    codes: dict[str, Codes]
    overflows: dict[str, int]


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """The integer program of one file.

    Attributes:
        steps: in the order of execution.
        inputs: numpy type and shape (None where dynamic) of each graph input.
        outputs: each graph output as codes, or the numpy type of one that is not quantized (None: any).
        tensors: the tensors of the file that are quantized, by name: outputs of DequantizeLinear.
        constants: constant values that steps read.
    """

    steps: tuple[Step, ...]
    inputs: Mapping[str, tuple[Any, tuple[int | None, ...] | None]]
    outputs: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Array]

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """How each node runs, in the order of execution."""
        return tuple(step.info for step in self.steps)

    @property
    def integer_nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that run on integers."""
        return tuple(info for info in self.nodes if info.kind == "integer")

    @property
    def float_nodes(self) -> tuple[tuple[str, str, str], ...]:
        """(name, op_type, reason) of each node that runs in float."""
        return tuple((info.name, info.op_type, info.reason) for info in self.nodes if info.kind == "float")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Real values of the graph outputs; see `run_codes`."""
        return self.run_codes(inputs).outputs

    def run_codes(
        self,
        inputs: Mapping[str, Array],
        tensors: Sequence[str] = (),
        forced: Mapping[str, Array] | None = None,
    ) -> Result:
        """Executes the program.

        Args:
            inputs: every graph input by name, float32 (or what the file declares).
            tensors: names of further quantized tensors whose codes to return.
            forced: codes of quantized tensors with which to go on in place of those computed, so that an
                error shows only where it arises. The result holds the computed ones.

        Raises:
            EmulatorError: if the inputs do not fit the graph, a tensor named is not quantized, or a node
                fails.
        """
        for name in (*tensors, *(forced or ())):
            if name not in self.tensors:
                raise EmulatorError(f"tensor '{name}' is not quantized in this file: name one that is")
        wanted = {name: value for name, value in self.outputs.items() if isinstance(value, Tensor)}
        wanted |= {name: self.tensors[name] for name in tensors}
        replaced = {self.tensors[name].codes: codes for name, codes in (forced or {}).items()}
        values = {**self.constants, **_checked_inputs(self.inputs, inputs)}
        computed = self._execute(values, {*self.outputs, *(t.codes for t in wanted.values())}, replaced)
        codes = {name: Codes(computed[tensor.codes], tensor.params) for name, tensor in wanted.items()}
        outputs = {
            name: numerics.dequantize(codes[name].codes, codes[name].params)
            if name in wanted
            else computed[name].astype(dtype or computed[name].dtype)
            for name, dtype in self.outputs.items()
        }
        overflows = {s.info.name: int(computed[s.overflows]) for s in self.steps if s.overflows}
        return Result(outputs, codes, overflows)

    def _execute(self, values: dict[str, Array], keep: set[str], replaced: Mapping[str, Array]) -> dict[str, Array]:
        """Runs all steps on `values` (inputs and constants); the values in `keep`, and the overflow counters."""
        computed = {name: values[name] for name in keep & values.keys()}
        for step, unused in zip(self.steps, _last_uses(self.steps), strict=True):
            results = dict(zip(step.outputs, _executed(step, values), strict=True))
            computed |= {name: value for name, value in results.items() if name in keep or name == step.overflows}
            values.update((name, np.asarray(replaced.get(name, value))) for name, value in results.items())
            for name in unused:
                del values[name]
        return computed


def _last_uses(steps: Sequence[Step]) -> list[set[str]]:
    """For each step, the values that no later step reads."""
    seen: set[str] = set()
    unused = []
    for step in reversed(steps):
        unused.append(set(step.inputs) - seen)
        seen |= unused[-1]
    return unused[::-1]


def _executed(step: Step, values: Mapping[str, Array]) -> tuple[Array, ...]:
    try:
        return step.run(*[values[name] for name in step.inputs])
    except Exception as error:
        cause = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EmulatorError(f"node '{step.info.name}' ({step.info.op_type}) failed: {cause}") from error


def _checked_inputs(
    expected: Mapping[str, tuple[Any, tuple[int | None, ...] | None]], given: Mapping[str, Array]
) -> dict[str, Array]:
    """The graph inputs in the types that the file declares.

    Raises:
        EmulatorError: if a name is missing or unknown, or a shape does not fit.
    """
    if given.keys() != expected.keys():
        raise EmulatorError(f"inputs {sorted(given)} do not fit the graph: expected {sorted(expected)}")
    for name, (_, shape) in expected.items():
        actual = np.shape(given[name])
        if shape is not None and (
            len(actual) != len(shape) or any(n not in (None, m) for n, m in zip(shape, actual, strict=True))
        ):
            raise EmulatorError(f"input '{name}' has shape {list(actual)}: expected {_shown(shape)}")
    return {name: np.asarray(given[name]).astype(dtype) for name, (dtype, _) in expected.items()}


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"


# From the file to the program


class _NotIntegerError(Exception):
    """Raised by a builder whose node has no integer form; the message is the reason."""


@dataclass(frozen=True, slots=True)
class _Graph:
    """What is known of a graph while its steps are decided, in topological order."""

    proto: ModelProto
    reference: bool
    constants: dict[str, TensorProto]
    consumers: dict[str, list[NodeProto]]
    grids: dict[str, Grid] = field(default_factory=dict)  # of values that are codes in the file
    tensors: dict[str, Tensor] = field(default_factory=dict)
    shapes: set[str] = field(default_factory=set)  # integers computed from shapes
    done: set[str] = field(default_factory=set)  # first outputs of nodes that need no step of their own
    steps: list[Step] = field(default_factory=list)


def load_program(model: str | Path | ModelProto, *, reference: bool = False) -> Program:
    """Reads a quantized model (QuantizeLinear/DequantizeLinear, opset 13 to 21).

    Args:
        model: path or loaded model.
        reference: accumulate in int64 by the definition everywhere, instead of the fastest exact way.

    Raises:
        EmulatorError: if the file is not a valid model, or has a quantizer without integer meaning here.
    """
    proto = _read(model)
    graph = _opened(proto, reference)
    for node in proto.graph.node:
        _fold(graph, node)
    for node in proto.graph.node:
        if node.output[0] not in graph.done:
            _decide(graph, node)
    return _program(graph)


def _read(model: str | Path | ModelProto) -> ModelProto:
    """A checked model without local functions."""
    where = "the model" if isinstance(model, ModelProto) else f"'{model}'"
    try:
        proto = model if isinstance(model, ModelProto) else onnx.load(model)
        onnx.checker.check_model(proto if isinstance(model, ModelProto) else str(model))
    except (OSError, DecodeError, onnx.checker.ValidationError) as error:
        raise EmulatorError(f"cannot read {where} as ONNX: {str(error).splitlines()[0]}") from error
    opset = next((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), 0)
    if opset not in _OPSETS:
        raise EmulatorError(
            f"{where} has opset {opset}: expected {_OPSETS[0]} to {_OPSETS[-1]}; convert it with onnx.version_converter"
        )
    for node in proto.graph.node:
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute):
            raise EmulatorError(f"node '{_name(node)}' ({node.op_type}) holds a subgraph: export without it")
    return inliner.inline_local_functions(proto) if proto.functions else proto


def _opened(proto: ModelProto, reference: bool) -> _Graph:
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    consumers: dict[str, list[NodeProto]] = {}
    for node in proto.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    for output in proto.graph.output:
        consumers.setdefault(output.name, []).append(NodeProto(op_type="graph output"))
    graph = _Graph(proto, reference, constants, consumers)
    for value in proto.graph.input:
        if value.name not in constants and value.type.tensor_type.elem_type in _GRIDS:
            graph.grids[value.name] = _GRIDS[value.type.tensor_type.elem_type]
    return graph


def _program(graph: _Graph) -> Program:
    proto = graph.proto.graph
    inputs = {value.name: _declared(graph, value) for value in proto.input if value.name not in graph.constants}
    outputs: dict[str, Any] = {}
    for name in (value.name for value in proto.output):
        moving = name in graph.tensors and not _is_constant(graph, name)
        storage = _storage(graph.grids[name]) if name in graph.grids else None
        outputs[name] = graph.tensors[name] if moving else storage
    needed = {name for step in graph.steps for name in step.inputs}
    constants = {name: _array(graph, name) for name in needed & graph.constants.keys()}
    constants |= {name: _constant(graph, name) for name in outputs if _is_constant(graph, name)}
    tensors = {name: tensor for name, tensor in graph.tensors.items() if tensor.codes in graph.grids}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor.codes not in graph.constants}
    return Program(tuple(graph.steps), inputs, outputs, tensors, constants)


def _declared(graph: _Graph, value: onnx.ValueInfoProto) -> tuple[Any, tuple[int | None, ...] | None]:
    """Numpy type and shape of a graph input; int32 for codes."""
    kind = value.type.tensor_type
    dtype = np.int32 if value.name in graph.grids else helper.tensor_dtype_to_np_dtype(kind.elem_type)
    if not kind.HasField("shape"):
        return dtype, None
    return dtype, tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)


def _storage(grid: Grid) -> Any:
    """The numpy type that holds codes outside the program."""
    return np.dtype(f"{'' if grid.signed else 'u'}int{max(8, grid.bits)}")


def _name(node: NodeProto) -> str:
    return node.name or next(filter(None, node.output), node.op_type)


def _attributes(node: NodeProto) -> dict[str, Any]:
    values = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in values.items()}


def _array(graph: _Graph, name: str) -> Array:
    """A constant of the file; codes as int32 whatever their storage."""
    tensor = graph.constants[name]
    values: Array = numpy_helper.to_array(tensor)
    return values.astype(np.int32) if tensor.data_type in _GRIDS else values


def _is_constant(graph: _Graph, name: str) -> bool:
    return (graph.tensors[name].codes if name in graph.tensors else name) in graph.constants


def _constant(graph: _Graph, name: str) -> Array:
    """The value of a constant, real where it is quantized."""
    if name in graph.tensors:
        tensor = graph.tensors[name]
        return numerics.dequantize(_array(graph, tensor.codes), tensor.params)
    return _array(graph, name)


def _fixed(graph: _Graph, node: NodeProto, index: int, default: Any = None) -> Any:
    """A constant input; `default` where the node does not have it."""
    if index >= len(node.input) or not node.input[index]:
        return default
    if not _is_constant(graph, node.input[index]):
        raise _NotIntegerError(f"its input '{node.input[index]}' is not constant")
    return _constant(graph, node.input[index])


# Quantizers and constants


def _fold(graph: _Graph, node: NodeProto) -> None:
    """Replaces a node whose inputs are all constant by its value."""
    names = [name for name in node.input if name]
    if node.op_type != "Constant" and not (names and all(_is_constant(graph, n) for n in names)):
        return
    params = _params(graph, node) if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None
    if params is not None and node.op_type == "DequantizeLinear":
        graph.tensors[node.output[0]] = Tensor(node.input[0], params)
    elif params is not None:
        codes = numerics.quantize(_array(graph, node.input[0]), params)
        graph.constants[node.output[0]] = numpy_helper.from_array(codes, node.output[0])
        graph.grids[node.output[0]] = params.grid
    elif node.op_type == "Constant" and node.attribute[0].name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(node.attribute[0].t)
        tensor.name = node.output[0]
        graph.constants[node.output[0]] = tensor
    else:
        results = tuple(filter(None, node.output))
        step = Step(NodeInfo(_name(node), node.op_type, "float"), (), results, _onnxruntime(graph, node, []))
        values = zip(results, _executed(step, {}), strict=True)
        graph.constants.update((name, numpy_helper.from_array(value, name)) for name, value in values)
    graph.done.add(node.output[0])


def _params(graph: _Graph, node: NodeProto) -> QParams | None:
    """Grid of a QuantizeLinear or DequantizeLinear; None where it is neither per tensor nor per channel.

    Raises:
        EmulatorError: if the scale is not constant, not float32 or not positive, or the type is unknown.
    """
    where = f"node '{_name(node)}' ({node.op_type})"
    if any(name and name not in graph.constants for name in node.input[1:]):
        raise EmulatorError(f"{where} has a scale or zero point that is not constant: quantize statically")
    scale = _array(graph, node.input[1])
    zero_point, kind = np.zeros(scale.shape, np.int32), int(TensorProto.UINT8)
    if len(node.input) > 2 and node.input[2]:
        zero_point = _array(graph, node.input[2]).astype(np.int32)
        kind = graph.constants[node.input[2]].data_type
    elif node.op_type == "QuantizeLinear":
        kind = _attributes(node).get("output_dtype", 0) or kind
    elif node.input[0] in graph.constants:
        kind = graph.constants[node.input[0]].data_type
    grid = _ALL_GRIDS.get(kind)
    if node.op_type == "DequantizeLinear":
        grid = graph.grids.get(node.input[0], grid)
    if grid is None or scale.dtype != np.float32:
        kinds = f"type {TensorProto.DataType.Name(kind)} and a {scale.dtype} scale"
        raise EmulatorError(f"{where} has {kinds}: expected 4, 8 or 16-bit integers and a float32 scale")
    if scale.ndim > 1:
        return None
    axis = _attributes(node).get("axis", 1) if scale.size > 1 else None
    if axis is None:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    try:
        return QParams(scale, zero_point, grid, axis)
    except ValueError as error:
        raise EmulatorError(f"{where}: {error}") from error


def _per_tensor(graph: _Graph, node: NodeProto) -> QParams:
    params = _params(graph, node)
    if params is None or params.axis is not None:
        raise EmulatorError(
            f"node '{_name(node)}' ({node.op_type}) quantizes an activation per channel or block:"
            " expected one scale per tensor"
        )
    return params


# One step per node


def _decide(graph: _Graph, node: NodeProto) -> None:
    """Writes down the step of one node, and what the graph knows of the node's outputs."""
    dynamic = [name for name in node.input if name and not _is_constant(graph, name)]
    if node.op_type == "QuantizeLinear":
        _quantize(graph, node)
    elif node.op_type == "DequantizeLinear" and node.input[0] in graph.grids:
        graph.tensors[node.output[0]] = Tensor(node.input[0], _per_tensor(graph, node))
    elif node.op_type == "Shape":
        _shape(graph, node)
    elif dynamic and graph.shapes.issuperset(dynamic):
        graph.shapes.update(node.output)
        _float(graph, node, "")
    else:
        try:
            _integer(graph, node)
        except _NotIntegerError as reason:
            _float(graph, node, str(reason))


def _integer(graph: _Graph, node: NodeProto) -> None:
    """Writes down an integer step.

    Raises:
        _NotIntegerError: if the node has no integer form.
    """
    if node.op_type in _BUILDERS and node.domain in ("", "ai.onnx"):
        _BUILDERS[node.op_type](graph, node)
    elif node.op_type in _MOVES and node.domain in ("", "ai.onnx"):
        x = _quantized(graph, node, 0)
        if any(node.output[1:]):
            raise _NotIntegerError("it has more than one output")
        run = _MOVES[node.op_type](graph, node, x.params)
        graph.tensors[node.output[0]] = Tensor(node.output[0], x.params)
        others = node.input[1:] if node.op_type in ("Reshape", "Slice") else []
        info = NodeInfo(_name(node), node.op_type, "integer", implementation="codes")
        inputs = (x.codes, *filter(None, others))
        graph.steps.append(Step(info, inputs, (node.output[0],), lambda codes, *rest: (run(codes, *rest),)))
    else:
        raise _NotIntegerError(f"no integer kernel for {node.op_type}")


def _quantize(graph: _Graph, node: NodeProto) -> None:
    """A quantizer between floats and codes, or between two grids."""
    params = _per_tensor(graph, node)
    graph.grids[node.output[0]] = params.grid
    source = graph.tensors.get(node.input[0])
    info = NodeInfo(_name(node), node.op_type, "boundary", implementation="table" if source else "quantize")
    if source is None:
        step = Step(info, (node.input[0],), (node.output[0],), lambda x: (numerics.quantize(x, params),))
    else:
        grid = source.params
        step = Step(info, (source.codes,), (node.output[0],), lambda x: (kernels.transfer(x, grid, params),))
    graph.steps.append(step)


def _shape(graph: _Graph, node: NodeProto) -> None:
    """The shape of a tensor, which its codes share."""
    attributes, name = _attributes(node), node.input[0]
    cut = slice(attributes.get("start", 0), attributes.get("end"))
    graph.shapes.update(node.output)
    info = NodeInfo(_name(node), node.op_type, "shape")
    source = graph.tensors[name].codes if name in graph.tensors else name
    outputs = tuple(node.output)
    graph.steps.append(Step(info, (source,), outputs, lambda x: (np.asarray(x.shape[cut], np.int64),)))


def _float(graph: _Graph, node: NodeProto, reason: str) -> None:
    """The node itself in ONNX Runtime; without a `reason` it only computes shapes."""
    names = [name for name in dict.fromkeys(node.input) if name and not _is_constant(graph, name)]
    values = [_real(graph, name) for name in names]
    types = [_storage(graph.grids[name]) if name in graph.grids else None for name in names]
    execute = _onnxruntime(graph, node, names)

    def run(*arrays: Array) -> tuple[Array, ...]:
        return execute(*(a.astype(t) if t else a for a, t in zip(arrays, types, strict=True)))

    kind: Literal["float", "shape"] = "float" if reason else "shape"
    info = NodeInfo(_name(node), node.op_type, kind, reason, implementation="ONNX Runtime")
    graph.steps.append(Step(info, tuple(values), tuple(filter(None, node.output)), run))


def _real(graph: _Graph, name: str) -> str:
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


def _onnxruntime(graph: _Graph, node: NodeProto, names: Sequence[str]) -> Run:
    """Runs `node` alone: values of the inputs `names` -> its outputs. Its other inputs are constants."""
    constants = [
        graph.constants[name] if name in graph.constants else numpy_helper.from_array(_constant(graph, name), name)
        for name in dict.fromkeys(node.input)
        if name and name not in names
    ]
    return _one_node(node, names, constants, graph.proto.opset_import)


def _one_node(node: NodeProto, names: Sequence[str], constants: Sequence[TensorProto], opsets: Any) -> Run:
    """The only use of onnxruntime; a session per combination of input types."""
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]

    @functools.cache
    def session(types: tuple[int, ...]) -> Any:
        inputs = [helper.make_tensor_value_info(n, kind, None) for n, kind in zip(names, types, strict=True)]
        inner = helper.make_graph([node], "node", inputs, outputs, constants)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Each session has threads of its own: without this they burn the cores that the next step needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        model = helper.make_model(inner, opset_imports=opsets, ir_version=10)
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(*values: Array) -> tuple[Array, ...]:
        types = tuple(helper.np_dtype_to_tensor_dtype(value.dtype) for value in values)
        return tuple(session(types).run(None, dict(zip(names, values, strict=True))))

    return run


def _quantized(graph: _Graph, node: NodeProto, index: int) -> Tensor:
    """Input `index` as codes on one grid."""
    name = node.input[index]
    if name not in graph.tensors or graph.tensors[name].params.axis is not None:
        raise _NotIntegerError(f"its input '{name}' is not quantized per tensor")
    return graph.tensors[name]


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


def _tail(graph: _Graph, node: NodeProto, with_bias: bool = False) -> _Tail:
    """Follows the output of `node` to its quantizer.

    Raises:
        _NotIntegerError: if anything else reads a value on the way.
    """
    name, bias, taken = node.output[0], "", []
    clips = [node] if node.op_type == "Clip" else []
    while True:
        users = graph.consumers.get(name, [])
        if len(users) != 1 or users[0].op_type not in ("QuantizeLinear", "Relu", "Clip", "Add"):
            raise _NotIntegerError("its output goes elsewhere than to one quantizer")
        user = users[0]
        taken.append(user.output[0])
        if user.op_type == "QuantizeLinear":
            break
        if user.op_type == "Add":
            other = user.input[1 - list(user.input).index(name)]
            if not with_bias or bias or clips or not _is_constant(graph, other):
                raise _NotIntegerError("its output goes elsewhere than to one quantizer")
            bias = other
        else:
            clips.append(user)
        name = user.output[0]
    params = _per_tensor(graph, user)
    low, high = params.grid.qmin, params.grid.qmax
    for clip in clips:
        first, last = _clamp(graph, clip, params)
        low, high = (min(max(code, first), last) for code in (low, high))
    return _Tail(user.output[0], params, low, high, bias, tuple(taken))


def _clamp(graph: _Graph, node: NodeProto, params: QParams) -> tuple[int, int]:
    """Codes of the bounds of a Relu or Clip."""
    bounds = [0.0, None] if node.op_type == "Relu" else [_fixed(graph, node, i) for i in (1, 2)]
    codes = [None if b is None else int(numerics.quantize(np.asarray(b, np.float32), params)) for b in bounds]
    low, high = codes
    return params.grid.qmin if low is None else low, params.grid.qmax if high is None else high


def _emit(graph: _Graph, node: NodeProto, inputs: Sequence[Tensor], tail: _Tail, run: Run, **info: Any) -> None:
    """Adds an integer step up to the quantizer of `tail`.

    `run` gives the codes and, for a sum of products, how many accumulators wrapped.
    """
    graph.done.update(tail.taken)
    graph.grids[tail.codes] = tail.params.grid
    about = NodeInfo(_name(node), node.op_type, "integer", **info)
    counter = f"{tail.codes}/overflows" if node.op_type in _PRODUCTS else ""
    outputs = tuple(filter(None, (tail.codes, counter)))
    graph.steps.append(Step(about, tuple(x.codes for x in inputs), outputs, run, counter))


# Sums of products


def _conv(graph: _Graph, node: NodeProto) -> None:
    transposed = node.op_type == "ConvTranspose"
    weights, scale = _weights(graph, node, 1 if transposed else 0)
    attributes = _attributes(node)
    group, window = attributes.get("group", 1), _window(attributes, weights.shape[2:])
    if transposed and (window.auto_pad != "NOTSET" or "output_shape" in attributes):
        raise _NotIntegerError("it has auto_pad or output_shape")
    extra = tuple(attributes.get("output_padding", (0,) * len(window.kernel)))

    def float32(part: IntArray) -> Callable[[FloatArray], Array]:
        bare = helper.make_node(node.op_type, node.input[:2], node.output)
        bare.attribute.extend(node.attribute)
        constant = numpy_helper.from_array(part.astype(np.float32), node.input[1])
        run = _one_node(bare, node.input[:1], [constant], graph.proto.opset_import)
        return lambda x: run(x)[0]

    def exact(x: Array, dtype: Any) -> Array:
        if transposed:
            return kernels.conv_transpose(x, weights, window, extra, group, dtype)
        return kernels.conv(x, weights, window, group, dtype)

    product = Product(weights, scale, int(transposed), 1, float32, exact, group if transposed else 1)
    _multiply(graph, node, product)


def _gemm(graph: _Graph, node: NodeProto) -> None:
    attributes = _attributes(node)
    if attributes.get("transA", 0) or {attributes.get("alpha", 1.0), attributes.get("beta", 1.0)} != {1.0}:
        raise _NotIntegerError("it has transA, alpha or beta")
    transposed = bool(attributes.get("transB", 0))
    weights, scale = _weights(graph, node, 0 if transposed else 1)
    _multiply(graph, node, _matrix(weights.T if transposed else weights, scale))


def _matmul(graph: _Graph, node: NodeProto) -> None:
    if _is_constant(graph, node.input[1]):
        _multiply(graph, node, _matrix(*_weights(graph, node, -1)))
        return
    a, b, tail = _quantized(graph, node, 0), _quantized(graph, node, 1), _tail(graph, node)
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


def _weights(graph: _Graph, node: NodeProto, axis: int) -> tuple[IntArray, FloatArray]:
    """Weights less their zero point, and their scale: () or (channels along `axis`,)."""
    tensor = graph.tensors.get(node.input[1])
    if tensor is None or tensor.codes not in graph.constants:
        raise _NotIntegerError(f"its weights '{node.input[1]}' are not constants quantized per tensor or channel")
    codes, params = _array(graph, tensor.codes), tensor.params
    if codes.ndim < 2:
        raise _NotIntegerError(f"its weights '{node.input[1]}' are a vector")
    if params.axis is not None and (params.axis - axis) % codes.ndim:
        raise _NotIntegerError(f"its weights '{node.input[1]}' are quantized along axis {params.axis}: expected {axis}")
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


def _multiply(graph: _Graph, node: NodeProto, product: Product) -> None:
    """Accumulate, add the bias, requantize."""
    x, tail = _quantized(graph, node, 0), _tail(graph, node, with_bias=node.op_type == "MatMul")
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


def _bias(graph: _Graph, name: str, scale: FloatArray) -> tuple[IntArray | None, str]:
    """The bias on the grid of the accumulator, (channels,) int32, and what had to be decided for it."""
    if not name:
        return None, ""
    if not _is_constant(graph, name):
        raise _NotIntegerError(f"its bias '{name}' is not constant")
    real = _constant(graph, name)
    if real.size != 1 and (*real.shape[-1:], real.size) != scale.shape * 2:
        raise _NotIntegerError(f"its bias '{name}' has shape {list(real.shape)}: expected {list(scale.shape)}")
    tensor = graph.tensors.get(name)
    if tensor is not None and tensor.params.grid == _BIAS_GRID:
        given = np.broadcast_to(tensor.params.scale, scale.shape)
        if np.all(np.abs(given - scale) <= _BIAS_TOLERANCE * scale):
            codes = _array(graph, tensor.codes).reshape(-1) - tensor.params.zero_point
            return np.broadcast_to(codes, scale.shape), ""
    flat = np.broadcast_to(real.reshape(-1), scale.shape)
    grid = QParams(scale, np.zeros(scale.shape, np.int32), _BIAS_GRID, 0)
    return numerics.quantize(flat, grid), f"bias '{name}' rounded to int32 at the scale of the accumulator"


# Other operators that end in a quantizer


def _add(graph: _Graph, node: NodeProto) -> None:
    a, b, tail = _quantized(graph, node, 0), _quantized(graph, node, 1), _tail(graph, node)
    params = (a.params, b.params)

    def add(x: IntArray, y: IntArray) -> IntArray:
        return tail.limit(kernels.add(x, y, params, tail.params))

    def run(x: IntArray, y: IntArray) -> tuple[Array, ...]:
        return (kernels.in_blocks(add, x, y),)

    _emit(graph, node, (a, b), tail, run, implementation="float32 fma")


def _concat(graph: _Graph, node: NodeProto) -> None:
    parts, tail = [_quantized(graph, node, i) for i in range(len(node.input))], _tail(graph, node)
    axis = _attributes(node)["axis"]

    def run(*codes: IntArray) -> tuple[Array, ...]:
        moved = [kernels.transfer(c, p.params, tail.params) for c, p in zip(codes, parts, strict=True)]
        return (tail.limit(np.concatenate(moved, axis)),)

    _emit(graph, node, parts, tail, run, implementation="table")


def _clip(graph: _Graph, node: NodeProto) -> None:
    x, tail = _quantized(graph, node, 0), _tail(graph, node)

    def run(codes: IntArray) -> tuple[Array, ...]:
        return (tail.limit(kernels.transfer(codes, x.params, tail.params)),)

    _emit(graph, node, (x,), tail, run, implementation="table")


def _average_pool(graph: _Graph, node: NodeProto) -> None:
    x, tail, attributes = _quantized(graph, node, 0), _tail(graph, node), _attributes(node)
    window, count = _window(attributes, attributes["kernel_shape"]), bool(attributes.get("count_include_pad", 0))

    def run(codes: IntArray) -> tuple[Array, ...]:
        return (tail.limit(kernels.average_pool(codes, window, count, x.params, tail.params)),)

    _emit(graph, node, (x,), tail, run, implementation="float32 mean")


def _mean(graph: _Graph, node: NodeProto) -> None:
    x, tail, attributes = _quantized(graph, node, 0), _tail(graph, node), _attributes(node)
    given = attributes.get("axes") or _fixed(graph, node, 1, ())
    noop = bool(attributes.get("noop_with_empty_axes", 0))
    first = 2 if node.op_type == "GlobalAveragePool" else 0
    keepdims, params = bool(attributes.get("keepdims", 1)), (x.params, tail.params)

    def run(codes: IntArray) -> tuple[Array, ...]:
        axes = tuple(int(a) for a in given) or tuple(range(codes.ndim if noop else first, codes.ndim))
        return (tail.limit(kernels.mean(codes, axes, keepdims, params)),)

    _emit(graph, node, (x,), tail, run, implementation="int64 sum")


# Operators that move or select codes and keep their grid


def _relu(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    return lambda codes: np.maximum(codes, params.zero_point)


def _max_pool(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    attributes = _attributes(node)
    window = _window(attributes, attributes["kernel_shape"])
    return lambda codes: kernels.max_pool(codes, window, params.grid.qmin)


def _identity(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    if _fixed(graph, node, 2, False):
        raise _NotIntegerError("it drops values at random")
    return lambda codes: codes


def _reshape(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    allow_zero = bool(_attributes(node).get("allowzero", 0))
    return lambda codes, shape: kernels.reshape(codes, shape, allow_zero)


def _flatten(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    axis = _attributes(node).get("axis", 1)
    return lambda codes: codes.reshape(int(np.prod(codes.shape[: axis if axis >= 0 else codes.ndim + axis])), -1)


def _transpose(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    order = _attributes(node).get("perm")
    return lambda codes: np.transpose(codes, order)


def _squeeze(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    given = _fixed(graph, node, 1)
    axes = None if given is None else tuple(int(a) for a in given)
    if node.op_type == "Squeeze":
        return lambda codes: np.squeeze(codes, axes)
    return lambda codes: np.expand_dims(codes, axes or ())


def _slice(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    axes, steps = _fixed(graph, node, 3), _fixed(graph, node, 4)

    def run(codes: IntArray, starts: Array, ends: Array, *_: Array) -> Array:
        along = np.arange(len(starts)) if axes is None else axes
        return kernels.slice_along(codes, starts, ends, along, np.ones_like(starts) if steps is None else steps)

    return run


def _pad(graph: _Graph, node: NodeProto, params: QParams) -> Callable[..., Array]:
    pads, value, axes = (_fixed(graph, node, i) for i in (1, 2, 3))
    mode = _attributes(node).get("mode", "constant")
    if (mode == "constant" and value is not None and np.any(value != 0)) or np.any(pads < 0) or mode == "wrap":
        raise _NotIntegerError("it pads with another value than 0, or crops")
    return lambda codes: kernels.pad(codes, pads, axes, mode, int(params.zero_point))


_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BUILDERS: Mapping[str, Callable[[_Graph, NodeProto], None]] = {
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
_MOVES: Mapping[str, Callable[[_Graph, NodeProto, QParams], Callable[..., Array]]] = {
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
