"""A normalised float model: its graph, what is known about each tensor, and how it is edited."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, numpy_helper
from onnx_graphsurgeon.logger import G_LOGGER

from onnxqt.data import InputSpec
from onnxqt.errors import ModelError
from onnxqt.numerics import Array
from onnxqt.ops import Attributes
from onnxqt.runtime import MAX_IR_VERSION
from onnxqt.tensors import FileValues, is_external, values_of, with_large, without_large

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

    @property
    def is_large(self) -> bool:
        """Whether it has weights outside of it: too many to be held as one protobuf message."""
        return any(is_external(tensor) for tensor in self.proto.graph.initializer)

    def with_weights(self, weights: dict[str, Array]) -> "Model":
        """The same model with the named initializers replaced by float32 arrays of the same shape."""
        proto = onnx.ModelProto()
        proto.CopyFrom(self.proto)
        for initializer in proto.graph.initializer:
            if initializer.name in weights:
                value = np.asarray(weights[initializer.name], np.float32, order="C")
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
        return None if initializer is None else values_of(initializer)

    def shape(self, tensor: str) -> tuple[int | None, ...] | None:
        """Dimensions, None where symbolic; None altogether if not even the rank is known."""
        if tensor in self.initializers:
            return tuple(self.initializers[tensor].dims)
        kind = self._types.get(tensor)
        if kind is None or not kind.HasField("shape"):
            return None
        return _dimensions(kind.shape)

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
    """What the samples must look like.

    Raises:
        ModelError: naming an input that no array of numbers can feed.
    """
    return [_input_spec(value) for value in model.proto.graph.input if value.name in model.graph.inputs]


def _input_spec(value: onnx.ValueInfoProto) -> InputSpec:
    tensor = value.type.tensor_type  # ingest refuses everything else
    if tensor.elem_type == TensorProto.STRING:
        raise ModelError(f"input '{value.name}' takes strings: export the model with tensors of numbers as its inputs")
    if not tensor.HasField("shape"):
        raise ModelError(f"input '{value.name}' has no known rank: export the model with the shapes of its inputs")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return InputSpec(value.name, dtype, _dimensions(tensor.shape))


def _dimensions(shape: onnx.TensorShapeProto) -> tuple[int | None, ...]:
    return tuple(d.dim_value if d.HasField("dim_value") else None for d in shape.dim)


def opset_of(proto: onnx.ModelProto) -> int:
    """Version of the default operator set, 1 where the model names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1)


def editable(proto: onnx.ModelProto) -> gs.Graph:
    """A graph to edit; the model stays as it is."""
    graph = gs.import_onnx(proto)
    graph.import_domains = list(proto.opset_import)  # graphsurgeon would add to the model's own list
    tensors = graph.tensors()
    for initializer in proto.graph.initializer:
        if is_external(initializer) and initializer.name in tensors:
            tensors[initializer.name].values = FileValues(initializer)
            tensors[initializer.name].data_location = None  # graphsurgeon would give it to values written anew
    return graph


def finish(graph: gs.Graph) -> onnx.ModelProto:
    """The ONNX form of an edited graph: shapes inferred, an IR version that ONNX Runtime reads."""
    name_nodes(graph)
    proto = gs.export_onnx(graph)
    proto.ir_version = ir_version_for(proto)
    proto.producer_name, proto.producer_version = "onnxqt", ""
    return infer_shapes(proto)


def ir_version_for(proto: onnx.ModelProto) -> int:
    """An IR version that knows the model's opset and that ONNX Runtime reads."""
    needed = onnx.helper.find_min_ir_version_for(proto.opset_import, ignore_unknown=True)
    return min(MAX_IR_VERSION, max(8, needed, proto.ir_version))


def infer_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with all shapes inferred anew; only what foreign operators give out stays as the file has it."""
    foreign = {tensor for node in proto.graph.node if not is_onnx(node) for tensor in node.output}
    kept = [value for value in proto.graph.value_info if value.name in foreign]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    lean = without_large(proto)
    inferred = onnx.shape_inference.infer_shapes(lean, data_prop=True)
    return inferred if lean is proto else with_large(inferred, proto)


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


def is_onnx(node: gs.Node | onnx.NodeProto, *op_types: str) -> bool:
    """Whether a node is one of these operators, or any, of ONNX itself and not of a foreign domain."""
    op_type = node.op_type if isinstance(node, onnx.NodeProto) else node.op
    return node.domain in (None, "", "ai.onnx") and (not op_types or op_type in op_types)


def name_nodes(graph: gs.Graph) -> None:
    """Give every node of the main graph a name of its own, in place."""
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
        tensor for attribute in node.attribute for subgraph in subgraphs_of(attribute) for tensor in _captured(subgraph)
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


def subgraphs_of(attribute: onnx.AttributeProto) -> Iterable[onnx.GraphProto]:
    """The graphs that an attribute holds."""
    return (attribute.g,) if attribute.HasField("g") else attribute.graphs


def graphs_of(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, then its subgraphs at every depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for subgraph in subgraphs_of(attribute):
                yield from graphs_of(subgraph)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The nodes of a graph, then those of its subgraphs."""
    for part in graphs_of(graph):
        yield from part.node


def _captured(graph: onnx.GraphProto) -> Iterator[str]:
    """Tensors that a subgraph reads from the graphs around it."""
    local = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    for proto in graph.node:
        node = _node(proto)
        yield from (tensor for tensor in (*node.inputs, *node.captured) if tensor and tensor not in local)
        local.update(node.outputs)
    yield from (value.name for value in graph.output if value.name not in local)
