"""Stage 1, ingest: any ONNX file -> one normalised, checked float graph.

Normalisation is the ordered tuple `PASSES`. Each pass edits the graph in place, is idempotent, and
returns one line for each thing it changed.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import TensorProto, external_data_helper, inliner, numpy_helper, version_converter
from onnx_graphsurgeon.logger import G_LOGGER

from onnxqt.data import InputSpec
from onnxqt.errors import ModelError, first_line
from onnxqt.numerics import Array
from onnxqt.ops import Attributes, Kind, lookup, weight_axis
from onnxqt.runtime import MAX_IR_VERSION, MAX_OPSET

MIN_OPSET = 17
_QUANTIZED = (
    "QuantizeLinear",
    "DequantizeLinear",
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
)

_MAX_BYTES = 2**31  # of a protobuf message
_CONSTANT_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}

G_LOGGER.severity = G_LOGGER.CRITICAL  # it prints to stdout, which is the caller's


@dataclass(frozen=True, eq=False)
class Model:
    """A normalised float model; `proto` is never mutated.

    Attributes:
        proto: one main graph, unique node names, topological order, opset 17 to 21, shapes inferred.
        sha256: of the user's file, with its external data.
        changes: what ingest changed, one line each.
    """

    proto: onnx.ModelProto
    sha256: str
    changes: tuple[str, ...] = ()

    @cached_property
    def graph(self) -> "GraphIndex":
        """Look-ups into the main graph."""
        return GraphIndex(self.proto)

    @property
    def opset(self) -> int:
        """Version of the default operator set."""
        return opset_of(self.proto)

    def with_weights(self, weights: dict[str, Array]) -> "Model":
        """The same model with the named initializers replaced by float32 arrays of the same shape."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for initializer in proto.graph.initializer:
            if initializer.name in weights:
                value = np.ascontiguousarray(weights[initializer.name], np.float32)
                initializer.CopyFrom(numpy_helper.from_array(value, initializer.name))
        return Model(proto, self.sha256, self.changes)


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the main graph with its attributes as plain values."""

    name: str
    op_type: str
    domain: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Attributes = field(repr=False)
    captured: tuple[str, ...] = ()  # tensors of the main graph that its subgraphs read

    @property
    def label(self) -> str:
        """How messages call it."""
        return f"{self.op_type} '{self.name}'"


class GraphIndex:
    """Who produces and who consumes each tensor of a graph, and what is known about it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        graph = proto.graph
        self.nodes = tuple(_node(node) for node in graph.node)
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = tuple(value.name for value in graph.input if value.name not in self.initializers)
        self.outputs = tuple(value.name for value in graph.output)
        self.producer = {tensor: node for node in self.nodes for tensor in node.outputs if tensor}
        consumers: defaultdict[str, list[Node]] = defaultdict(list)
        for node in self.nodes:
            for tensor in dict.fromkeys((*node.inputs, *node.captured)):
                consumers[tensor].append(node)
        self.consumers = {tensor: tuple(nodes) for tensor, nodes in consumers.items()}
        self._types = {value.name: value.type.tensor_type for value in (*graph.input, *graph.output, *graph.value_info)}

    def constant(self, tensor: str) -> Array | None:
        """Value of an initializer, None for anything computed."""
        initializer = self.initializers.get(tensor)
        return None if initializer is None else numpy_helper.to_array(initializer)

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Dimensions, None where symbolic; None altogether if not even the rank is known."""
        if tensor in self.initializers:
            return tuple(self.initializers[tensor].dims)
        kind = self._types.get(tensor)
        if kind is None or not kind.HasField("shape"):
            return None
        return tuple(d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim)

    def is_float(self, tensor: str) -> bool:
        """Whether the tensor holds float32 values."""
        if tensor in self.initializers:
            return bool(self.initializers[tensor].data_type == TensorProto.FLOAT)
        kind = self._types.get(tensor)
        return kind is not None and kind.elem_type == TensorProto.FLOAT

    def is_typed(self, tensor: str) -> bool:
        """Whether the element type of a tensor is known; shape inference knows none for foreign operators."""
        kind = self._types.get(tensor)
        return tensor in self.initializers or (kind is not None and kind.elem_type != TensorProto.UNDEFINED)

    def dtype(self, tensor: str) -> np.dtype[np.generic]:
        """Element type of a graph input or output."""
        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self._types[tensor].elem_type))


def input_specs(model: Model) -> list[InputSpec]:
    """What the samples must look like."""
    graph = model.graph
    return [InputSpec(name, graph.dtype(name), graph.shape(name) or ()) for name in graph.inputs]


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the default operator set, 1 where the model names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)


def ingest(path: Path) -> Model:
    """Read, check and normalise a model.

    Raises:
        ModelError: naming the node and a remedy, for a file that cannot be read or handled.
    """
    proto = _load(path)
    files = [path, *_external_files(path, proto)]
    digest = _sha256(path, files)
    _load_external_data(path, proto)
    _check(path, proto)
    try:
        proto, changes = _normalise(proto)
    except ModelError as error:
        raise ModelError(f"'{path}': {error}") from error
    return Model(proto, digest, tuple(changes))


def _normalise(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    changes = []
    if proto.functions:
        changes.append(f"inlined {len(proto.functions)} model-local function(s)")
        proto = inliner.inline_local_functions(proto)
    proto, converted = _convert_opset(proto)
    changes += converted
    proto.ir_version = _ir_version(proto)
    graph = editable(_infer_shapes(proto))
    _name_nodes(graph)
    for normalise in PASSES:
        changes += normalise(graph)
    graph.cleanup().toposort()
    normalised = finish(graph)
    normalised.metadata_props.extend(proto.metadata_props)
    try:
        onnx.checker.check_model(normalised)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"a pass broke the graph ({first_line(error)}): report the model") from error
    return normalised, changes


def editable(proto: onnx.ModelProto) -> gs.Graph:
    """A graph to edit; the model stays as it is."""
    graph = gs.import_onnx(proto)
    graph.import_domains = list(proto.opset_import)  # graphsurgeon would add to the model's own list
    return graph


def finish(graph: gs.Graph) -> onnx.ModelProto:
    """The ONNX form of an edited graph: shapes inferred, an IR version that ONNX Runtime reads."""
    _name_nodes(graph)
    proto = gs.export_onnx(graph)
    proto.ir_version = _ir_version(proto)
    proto.producer_name, proto.producer_version = "onnxqt", ""
    return _infer_shapes(proto)


def _ir_version(proto: onnx.ModelProto) -> int:
    """An IR version that knows the model's opset and that ONNX Runtime reads."""
    needed = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    return min(MAX_IR_VERSION, max(8, needed, proto.ir_version))


def _infer_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all shapes inferred anew; only what foreign operators give out stays as the file has it."""
    foreign = {tensor for node in proto.graph.node if not _is_onnx(node) for tensor in node.output}
    kept = [value for value in proto.graph.value_info if value.name in foreign]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return onnx.shape_inference.infer_shapes(proto, data_prop=True)


def _load(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"'{path}' is not a file: give the path of an ONNX model")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ModelError(f"'{path}' is not an ONNX model or is truncated: export it again") from error
    except OSError as error:
        raise ModelError(f"'{path}' cannot be read ({error.strerror}): check its permissions") from error
    if not proto.ir_version or not proto.graph.output:
        raise ModelError(f"'{path}' is not an ONNX model (it has no graph with outputs): export it again")
    return proto


def _external_files(path: Path, proto: onnx.ModelProto) -> list[Path]:
    """The files beside the model that hold its weights.

    Raises:
        ModelError: if one is missing or lies elsewhere, or the model is larger than protobuf can handle.
    """
    folder = path.parent.resolve()
    found: dict[Path, None] = {}
    for tensor in _tensors(proto.graph):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        file = (folder / location).resolve()
        if not file.is_relative_to(folder):
            raise ModelError(
                f"weight '{tensor.name}' of '{path}' points to '{location}', outside the model's folder: "
                "move the data file next to the model and save the model again"
            )
        if not file.is_file():
            raise ModelError(
                f"weight '{tensor.name}' of '{path}' is in the file '{location}', which is missing: "
                "put it back next to the model"
            )
        found[file] = None
    size = sum(file.stat().st_size for file in (path, *found))
    if size >= _MAX_BYTES:
        raise ModelError(f"'{path}' has {size / 2**30:.1f} GiB with its weights: models must be smaller than 2 GiB")
    return list(found)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every constant of a graph and its subgraphs: initializers, and tensors in attributes."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from ((attribute.t,) if attribute.HasField("t") else attribute.tensors)
            for subgraph in _subgraphs(attribute):
                yield from _tensors(subgraph)


def _load_external_data(path: Path, proto: onnx.ModelProto) -> None:
    try:
        external_data_helper.load_external_data_for_model(proto, str(path.parent))
    except Exception as error:  # the helper raises whatever numpy, the file system or its own checks raise
        raise ModelError(
            f"the external data of '{path}' cannot be read ({first_line(error)}): save the model again"
        ) from error


def _sha256(path: Path, files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    try:
        for file in files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    digest.update(chunk)
    except OSError as error:
        raise ModelError(
            f"the external data of '{path}' cannot be read ({error.strerror}): check its permissions"
        ) from error
    return digest.hexdigest()


def _check(path: Path, proto: onnx.ModelProto) -> None:
    if proto.graph.sparse_initializer:
        name = proto.graph.sparse_initializer[0].values.name
        raise ModelError(f"weight '{name}' of '{path}' is sparse: export the model with dense weights")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"'{path}' is not a valid ONNX model ({first_line(error)}): export it again") from error
    for node in proto.graph.node:
        if node.op_type in _QUANTIZED:
            raise ModelError(
                f"{node.op_type} '{node.name}' of '{path}' is already quantized: give the float model instead"
            )


def _convert_opset(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    current = opset_of(proto)
    wanted = min(MAX_OPSET, max(MIN_OPSET, current))
    if wanted == current:
        return proto, []
    return convert_opset(proto, wanted), [f"converted opset {current} to {wanted}"]


def convert_opset(proto: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The same model in another version of the default operator set.

    Raises:
        ModelError: if onnx has no conversion for one of the operators.
    """
    try:
        return version_converter.convert_version(proto, version)
    except Exception as error:  # the converter raises RuntimeError and C++ assertion texts
        raise ModelError(
            f"opset {opset_of(proto)} cannot be converted to {version} ({first_line(error)}): "
            f"export the model with opset {version}"
        ) from error


# --- passes ---------------------------------------------------------------------------------------------


def _fold_constants(graph: gs.Graph) -> list[str]:
    """What can be computed from constants and known shapes.

    The shape folding of graphsurgeon stays off: it takes Cast to float, Mul by 0.5, Cast to integer for an
    integer product, and multiplies by 0.
    """
    before = len(graph.nodes)
    for part in (graph, *graph.subgraphs(recursive=True)):
        part.ir_version = graph.ir_version  # a subgraph has none, and the newest is refused by ONNX Runtime
        for node in part.nodes:
            _type_constant(node)
            _fold_shape(node)
    graph.fold_constants(fold_shapes=False, error_ok=True).cleanup().toposort()
    folded = before - len(graph.nodes)
    return [f"folded {folded} constant node(s)"] if folded else []


def _type_constant(node: gs.Node) -> None:
    """Numbers of a Constant node as a tensor of the type that ONNX gives them; graphsurgeon makes them float64."""
    if not _is_onnx(node, "Constant"):
        return
    for name, dtype in _CONSTANT_TYPES.items():
        if name in node.attrs:
            node.attrs["value"] = gs.Constant("", np.array(node.attrs.pop(name), dtype))


def _fold_shape(node: gs.Node) -> None:
    if not _is_onnx(node, "Shape"):
        return
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return
    end = node.attrs.get("end", len(shape))
    node.outputs[0].to_constant(np.array(shape[node.attrs.get("start", 0) : end], np.int64))
    node.outputs.clear()


def _remove_identities(graph: gs.Graph) -> list[str]:
    """Identity, and Dropout in its inference form, between two tensors of the same graph."""
    kept_names = {tensor.name for tensor in graph.outputs}
    removed = 0
    for node in graph.nodes:
        if not _is_onnx(node, "Identity", "Dropout"):
            continue
        if node.op == "Dropout" and _trains(node):
            raise ModelError(f"Dropout '{node.name}' is in training mode: export the model in inference mode")
        source, (result, *mask) = node.inputs[0], node.outputs
        if result.name in kept_names or isinstance(source, gs.Constant):
            continue
        if any(tensor.outputs or tensor.name in kept_names for tensor in mask):
            continue
        for consumer in list(result.outputs):
            consumer.inputs = [source if tensor is result else tensor for tensor in consumer.inputs]
        node.outputs.clear()
        removed += 1
    graph.cleanup()
    return [f"removed {removed} Identity/Dropout node(s)"] if removed else []


def _trains(dropout: gs.Node) -> bool:
    """Whether the third input of a Dropout, `training_mode`, is or could be true."""
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return False
    mode = dropout.inputs[2]
    return not isinstance(mode, gs.Constant) or bool(mode.values.any())


def _fold_batch_norm(graph: gs.Graph) -> list[str]:
    """BatchNormalization into the weights before it, else into Mul and Add.

    y = gamma (x - mean) / sqrt(var + eps) + beta = a x + b
    (ONNX BatchNormalization-15, inference form).
    """
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if _is_onnx(node, "BatchNormalization")]:
        label = f"BatchNormalization '{node.name}'"
        if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
            raise ModelError(f"{label} is in training mode: export the model in inference mode (model.eval())")
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
            raise ModelError(f"{label} has computed statistics: export the model in inference mode")
        gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:])
        a = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        b = beta - mean * a
        target = _scalable_producer(graph, node.inputs[0])
        if target is None:
            _replace_by_affine(graph, names, node, (a, b))
            changes.append(f"wrote {label} as Mul and Add")
            continue
        _scale_output(names, target, a, b)
        target.outputs, node.outputs = node.outputs[:], []
        changes.append(f"folded {label} into {target.op} '{target.name}'")
    graph.cleanup().toposort()
    return changes


def _fold_affine(graph: gs.Graph) -> list[str]:
    """Mul and Add by constants per channel, which exporters make of a batch norm, into the weights before them."""
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if _is_onnx(node, "Mul", "Add")]:
        constant = next((tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)), None)
        data = next((tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)), None)
        target = _scalable_producer(graph, data) if constant is not None and data is not None else None
        if target is None or (factors := _per_channel(constant, target)) is None:
            continue
        ones, zeros = np.ones(factors.shape), np.zeros(factors.shape)
        _scale_output(names, target, *((factors, zeros) if node.op == "Mul" else (ones, factors)))
        target.outputs, node.outputs = node.outputs[:], []
        changes.append(f"folded {node.op} '{node.name}' into {target.op} '{target.name}'")
    graph.cleanup().toposort()
    return changes


def _per_channel(constant: gs.Constant, node: gs.Node) -> Array | None:
    """The values of a constant for each output channel of `node`; None if it has or varies along other axes."""
    weight = node.inputs[1]
    channels = weight.shape[weight_axis(node.op, node.attrs, len(weight.shape))]
    channels *= node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
    rank, behind = (2, 0) if node.op == "Gemm" else (len(weight.shape), len(weight.shape) - 2)
    shape = (*[1] * (rank - len(constant.shape)), *constant.shape)
    if len(shape) != rank or shape[1] not in (1, channels):
        return None
    if any(size != 1 for size in (*shape[:1], *shape[rank - behind :])):
        return None
    return np.broadcast_to(constant.values.reshape(-1), (channels,)).astype(np.float64)


def _scalable_producer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node whose constant weight and bias can take an affine map of its output channels."""
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or any(tensor is t for t in graph.outputs):
        return None
    node = tensor.inputs[0]
    if not _is_onnx(node, "Conv", "ConvTranspose", "Gemm"):
        return None
    return node if all(isinstance(operand, gs.Constant) for operand in node.inputs[1:]) else None


def _scale_output(names: "Names", node: gs.Node, a: Array, b: Array) -> None:
    """Give `node` new constants so that channel c of its output becomes `a[c] y + b[c]`."""
    weight = node.inputs[1].values.astype(np.float64)
    bias = node.inputs[2].values.astype(np.float64) if len(node.inputs) > 2 else np.zeros(1)
    if node.op == "ConvTranspose":  # weight (I, O / groups, ...): channel o of group g is row block g, column o
        groups = node.attrs.get("group", 1)
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        weight = (blocks * a.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        axis = weight_axis(node.op, node.attrs, weight.ndim)
        weight = weight * a.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    if node.op == "Gemm":
        weight, bias = weight * node.attrs.pop("alpha", 1.0), bias * node.attrs.pop("beta", 1.0)
    _set_constant(names, node, 1, weight)
    _set_constant(names, node, 2, a * bias + b)


def _set_constant(names: "Names", node: gs.Node, position: int, value: Array) -> None:
    """Give one node a constant of its own, of the weight's type; other users of the old one keep it."""
    suffix = ("weight", "bias")[position - 1]
    constant = gs.Constant(names.new(f"{node.outputs[0].name}.{suffix}"), value.astype(node.inputs[1].dtype))
    if position < len(node.inputs):
        node.inputs[position] = constant
    else:
        node.inputs.append(constant)


def _replace_by_affine(graph: gs.Graph, names: "Names", node: gs.Node, factors: tuple[Array, Array]) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if x.shape is None:
        raise ModelError(f"BatchNormalization '{node.name}' has an input of unknown rank: export with shapes")
    shape = [-1] + [1] * (len(x.shape) - 2)
    scale, shift = (
        gs.Constant(names.new(f"{y.name}.{name}"), value.reshape(shape).astype(x.dtype))
        for name, value in zip(("scale", "shift"), factors, strict=True)
    )
    scaled = gs.Variable(names.new(f"{y.name}.scaled"), x.dtype)
    node.outputs = []
    graph.nodes.append(gs.Node("Mul", f"{node.name}.scale", inputs=[x, scale], outputs=[scaled]))
    graph.nodes.append(gs.Node("Add", f"{node.name}.shift", inputs=[scaled, shift], outputs=[y]))


def _fold_gemm_factors(graph: gs.Graph) -> list[str]:
    """Gemm alpha and beta into constant weights and bias: alpha A B + beta C."""
    changes = []
    names = Names(graph)
    for node in graph.nodes:
        if not _is_onnx(node, "Gemm"):
            continue
        for position, factor in ((1, "alpha"), (2, "beta")):
            value = node.attrs.get(factor, 1.0)
            has_constant = position < len(node.inputs) and isinstance(node.inputs[position], gs.Constant)
            if value == 1.0 or not has_constant:
                continue
            _set_constant(names, node, position, node.inputs[position].values * np.float32(value))
            node.attrs[factor] = 1.0
            changes.append(f"folded {factor} = {value:g} into Gemm '{node.name}'")
    return changes


def _separate_weights(graph: gs.Graph) -> list[str]:
    """A weight whose users disagree about its channel axis gets one copy for each axis.

    Per-channel scales belong to one axis: Gemm with transB=1 and with transB=0 read the same matrix along
    different ones. Biases shared with a weight, and weights read by other operators, are copied likewise.
    """
    changes = []
    names = Names(graph)
    constants = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    for constant in constants:
        users: defaultdict[int | None, list[tuple[gs.Node, int]]] = defaultdict(list)
        for node in dict.fromkeys(map(_ById, constant.outputs)):
            for position, tensor in enumerate(node.node.inputs):
                if tensor is constant:
                    users[_axis_of_use(node.node, position, constant)].append((node.node, position))
        for axis in list(users)[1:]:
            name = f"{constant.name}.axis_{'none' if axis is None else axis}"
            copy = gs.Constant(names.new(name), constant.values)
            for node, position in users[axis]:
                node.inputs[position] = copy
            changes.append(f"duplicated weight '{constant.name}' for {users[axis][0][0].op} (other axis)")
    return changes


class _ById:
    """A graph node hashed by identity (gs.Node compares by value and does not hash)."""

    def __init__(self, node: gs.Node) -> None:
        self.node = node

    def __hash__(self) -> int:
        return id(self.node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.node is self.node


def _axis_of_use(node: gs.Node, position: int, constant: gs.Constant) -> int | None:
    """Channel axis along which a node reads a constant as its weight; None for any other use."""
    if position != 1 or lookup(node.op, node.domain or "").kind is not Kind.WEIGHTED:
        return None
    return weight_axis(node.op, node.attrs, len(constant.shape))


PASSES: tuple[Callable[[gs.Graph], list[str]], ...] = (
    _fold_constants,
    _remove_identities,
    _fold_batch_norm,
    _fold_affine,
    _fold_gemm_factors,
    _separate_weights,
)


# --- helpers --------------------------------------------------------------------------------------------


class Names:
    """Names for new tensors, each unlike every other of a graph and its subgraphs."""

    def __init__(self, graph: gs.Graph) -> None:
        self._taken = {name for part in (graph, *graph.subgraphs(recursive=True)) for name in part.tensors()}

    def new(self, name: str) -> str:
        """`name`, with underscores behind it until no other tensor is called so."""
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _is_onnx(node: gs.Node | onnx.NodeProto, *op_types: str) -> bool:
    """Whether a node is one of these operators, or any, of ONNX itself and not of a foreign domain."""
    op_type = node.op_type if isinstance(node, onnx.NodeProto) else node.op
    return node.domain in (None, "", "ai.onnx") and (not op_types or op_type in op_types)


def _name_nodes(graph: gs.Graph) -> None:
    seen: Counter[str] = Counter()
    for index, node in enumerate(graph.nodes):
        name = node.name or f"{node.op}_{index}"
        while seen[name]:
            name = f"{name}_{index}"
        seen[name] += 1
        node.name = name


def _node(node: onnx.NodeProto) -> Node:
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    captured = {
        tensor for attribute in node.attribute for subgraph in _subgraphs(attribute) for tensor in _captured(subgraph)
    }
    return Node(
        node.name,
        node.op_type,
        node.domain,
        tuple(node.input),
        tuple(node.output),
        attributes,
        tuple(sorted(captured)),
    )


def _subgraphs(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    return (attribute.g,) if attribute.HasField("g") else attribute.graphs


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Tensors that a subgraph reads from the graphs around it."""
    local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for proto in graph.node:
        node = _node(proto)
        yield from (tensor for tensor in (*node.inputs, *node.captured) if tensor and tensor not in local)
        local.update(node.outputs)
    yield from (value.name for value in graph.output if value.name not in local)
