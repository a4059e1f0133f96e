"""What a model is made of: its parameters, its operators and its layers, and how each is treated."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import onnx
from onnx import TensorProto

from onnxqt.model import GraphIndex, Model, Node, subgraphs_of
from onnxqt.ops import Gradient, lookup
from onnxqt.plan import QuantPlan
from onnxqt.survey.macs import UnknownMacsError, bodies, macs, multiplies
from onnxqt.survey.sizes import Sizes
from onnxqt.tensors import nbytes
from onnxqt.trim import Reach

Treatment = Literal["integer", "fused", "float"]

_FLOATS = tuple(
    TensorProto.DataType.Value(name)
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16"),
        *("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
    )
)


_SETTINGS = ("Clip", "Pad", "Resize")  # whose constants say what to do: they are no layers


@dataclass(frozen=True)
class Parameter:
    """A constant tensor of floats, counted once however many nodes read it.

    Attributes:
        tensor: its name.
        shape: its shape.
        bytes: its size in the float model.
        kind: "weight" and "bias" are quantized, to the scheme's bits and to INT32; "float" stays as it is.
        reason: why it stays float; empty for the others.
    """

    tensor: str
    shape: tuple[int, ...]
    bytes: int
    kind: Literal["weight", "bias", "float"]
    reason: str = ""

    @property
    def count(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Operator:
    """How the nodes of one operator are treated.

    Attributes:
        op_type: its name.
        domain: its operator set, empty for ONNX's own.
        integer: nodes that run on integers.
        fused: nodes fused into one of these.
        float: nodes that stay float.
        trained: nodes with a weight that training moves.
        stopped: nodes that no gradient passes.
        gradient: where the gradient of the operator comes from.
        reason: why gradients stop.
    """

    op_type: str
    domain: str
    integer: int
    fused: int
    float: int
    trained: int
    stopped: int
    gradient: Gradient
    reason: str

    @property
    def count(self) -> int:
        """Number of nodes."""
        return self.integer + self.fused + self.float


@dataclass(frozen=True)
class Layer:
    """A node that multiplies or has parameters.

    Attributes:
        node: its name.
        op_type: its operator.
        output: the tensor that it, with what is fused behind it, gives out.
        output_shape: for one batch of the smallest size; None where unknown.
        weight: its weight, or else its largest parameter; None if it has none.
        weight_shape: the shape of that.
        parameters: number of float constants that it reads, with what is fused behind it.
        macs: per sample; None if not known.
        macs_reason: why they are not known.
        quantized: whether it runs on integers.
        quantized_reason: why not.
        trained: whether training moves its weight.
        trained_reason: why not.
    """

    node: str
    op_type: str
    output: str
    output_shape: tuple[int | None, ...] | None
    weight: str | None
    weight_shape: tuple[int, ...] | None
    parameters: int
    macs: int | None
    macs_reason: str | None
    quantized: bool
    quantized_reason: str | None
    trained: bool
    trained_reason: str | None


@dataclass(frozen=True, eq=False)
class Parts:
    """A model and all that was decided about it."""

    model: Model
    plan: QuantPlan
    reach: Reach
    sizes: Sizes

    @cached_property
    def treatment(self) -> dict[str, Treatment]:
        """How each node takes part in the integer network, by name."""
        treatment: dict[str, Treatment] = {node.name: "float" for node in self.plan.float_nodes}
        for node in self.plan.integer_nodes:
            treatment[node.name] = "integer"
            treatment.update(dict.fromkeys(node.followers, "fused"))
        return treatment

    @cached_property
    def reasons(self) -> dict[str, str]:
        """Why a node stays float, by name."""
        return {node.name: node.reason for node in self.plan.float_nodes}

    @property
    def graph(self) -> GraphIndex:
        """The main graph."""
        return self.model.graph


def find_parameters(parts: Parts) -> tuple[Parameter, ...]:
    """The parameters of a model, those of its subgraphs included, each once."""
    weights = {site.tensor for site in parts.plan.weights}
    biases = {node.bias for node in parts.plan.integer_nodes}
    found = []
    for name, tensor in parts.graph.initializers.items():
        if tensor.data_type not in _FLOATS:
            continue
        if name in weights or name in biases:
            kind: Literal["weight", "bias"] = "weight" if name in weights else "bias"
            found.append(Parameter(name, tuple(tensor.dims), nbytes(tensor), kind))
        else:
            found.append(Parameter(name, tuple(tensor.dims), nbytes(tensor), "float", _read_by(parts, name)))
    for node in parts.graph.nodes:
        for tensor in _inner_constants(node):
            reason = f"belongs to a subgraph of {node.label}"
            found.append(Parameter(tensor.name, tuple(tensor.dims), nbytes(tensor), "float", reason))
    return tuple(found)


def find_operators(parts: Parts) -> tuple[Operator, ...]:
    """The operators of the main graph, the most frequent first."""
    by_type: defaultdict[tuple[str, str], list[Node]] = defaultdict(list)
    for node in parts.graph.nodes:
        by_type[node.op_type, node.domain].append(node)
    operators = [_operator(parts, nodes) for nodes in by_type.values()]
    return tuple(sorted(operators, key=lambda operator: -operator.count))


def find_layers(parts: Parts) -> tuple[Layer, ...]:
    """The layers of the main graph in topological order."""
    followers = {node.name: node.followers for node in parts.plan.integer_nodes}
    outputs = {node.name: node.output for node in parts.plan.integer_nodes}
    by_name = {node.name: node for node in parts.graph.nodes}
    layers = []
    for node in parts.graph.nodes:
        if parts.treatment[node.name] == "fused":
            continue
        chain = [node, *(by_name[name] for name in followers.get(node.name, ()))]
        sizes = _parameter_sizes(parts.graph, chain)
        owns = node.op_type not in _SETTINGS and any(size > 1 for size in sizes.values())
        if multiplies(node) or owns:
            layers.append(_layer(parts, node, outputs.get(node.name, node.outputs[0]), sizes))
    return tuple(layers)


def _layer(parts: Parts, node: Node, output: str, sizes: dict[str, int]) -> Layer:
    weight = _weight(parts, node, sizes)
    dims = parts.graph.initializers[weight].dims if weight in parts.graph.initializers else ()
    products, macs_reason = _macs(parts, node)
    trained = weight is not None and weight in parts.reach.trained
    return Layer(
        node=node.name,
        op_type=node.op_type,
        output=output,
        output_shape=parts.sizes.graph.shape(output),
        weight=weight,
        weight_shape=None if weight is None else tuple(dims),
        parameters=sum(sizes.values()),
        macs=products,
        macs_reason=macs_reason,
        quantized=parts.treatment[node.name] != "float",
        quantized_reason=parts.reasons.get(node.name),
        trained=trained,
        trained_reason=None if trained else _untrained(parts, node, weight),
    )


def _weight(parts: Parts, node: Node, sizes: dict[str, int]) -> str | None:
    outer = {name: size for name, size in sizes.items() if name in parts.graph.initializers}
    if multiplies(node) and len(node.inputs) > 1 and node.inputs[1] in outer:
        return node.inputs[1]
    return max(outer, key=lambda name: outer[name], default=None)


def _macs(parts: Parts, node: Node) -> tuple[int | None, str | None]:
    """MACs of a node per sample, or why they are not known."""
    try:
        return math.ceil(macs(node, parts.sizes.graph.shape) / parts.sizes.batch), None
    except UnknownMacsError as error:
        return None, str(error)


def _untrained(parts: Parts, node: Node, weight: str | None) -> str:
    if weight is None:
        return "has no weight"
    if weight in parts.reach.untouched:
        return parts.reach.untouched[weight]
    return "stays float: only weights and biases of integer nodes are trained"


def _operator(parts: Parts, nodes: list[Node]) -> Operator:
    first = nodes[0]
    row = lookup(first.op_type, first.domain)
    treatments = [parts.treatment[node.name] for node in nodes]
    weights = {node.name: node.weight.tensor for node in parts.plan.integer_nodes if node.weight}
    gradients = [_gradient(parts, node) for node in nodes]
    needed = [gradient for gradient in gradients if gradient[0] is not Gradient.NOT_NEEDED]
    return Operator(
        op_type=first.op_type,
        domain=first.domain,
        integer=treatments.count("integer"),
        fused=treatments.count("fused"),
        float=treatments.count("float"),
        trained=sum(weights.get(node.name) in parts.reach.trained for node in nodes),
        stopped=sum(gradient is Gradient.STOPPED for gradient, _ in gradients),
        gradient=row.gradient if needed else Gradient.NOT_NEEDED,
        reason=next((reason for _, reason in gradients if reason), ""),
    )


def _gradient(parts: Parts, node: Node) -> tuple[Gradient, str]:
    """Where the gradient of a node comes from, and why it has none."""
    row = lookup(node.op_type, node.domain)
    graph = parts.graph
    for reason in parts.reach.untouched.values():
        head, _, why = reason.partition(", because it ")
        if head == f"no gradient passes {node.label}":
            return Gradient.STOPPED, why
    if all(graph.is_typed(tensor) and not graph.is_float(tensor) for tensor in node.outputs if tensor):
        return Gradient.NOT_NEEDED, ""
    return row.gradient, row.reason if row.gradient is Gradient.STOPPED else ""


def _read_by(parts: Parts, tensor: str) -> str:
    """Why a parameter stays float."""
    readers = parts.graph.consumers.get(tensor, ())
    if not readers:
        return "is an output of the model"
    reader = min(readers, key=lambda node: node.name not in parts.reasons)
    reason = parts.reasons.get(reader.name)
    return f"{reader.label}: {reason}" if reason else f"is a setting of {reader.label}"


def _parameter_sizes(graph: GraphIndex, nodes: Iterable[Node]) -> dict[str, int]:
    """Elements of the float constants that some nodes read, by name, each once."""
    sizes = {}
    for node in nodes:
        for name in (*node.inputs, *node.captured):
            tensor = graph.initializers.get(name)
            if tensor is not None and tensor.data_type in _FLOATS:
                sizes[name] = math.prod(tensor.dims)
        for number, tensor in enumerate(_inner_constants(node)):
            sizes[f"{node.name}:{number}"] = math.prod(tensor.dims)
    return sizes


def _inner_constants(node: Node) -> Iterator[TensorProto]:
    """The float constants of a node's subgraphs."""
    for body in bodies(node):
        yield from _constants(body)


def _constants(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    yield from (tensor for tensor in graph.initializer if tensor.data_type in _FLOATS)
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "value" and attribute.t.data_type in _FLOATS:
                named = TensorProto()
                named.CopyFrom(attribute.t)
                named.name = node.output[0]
                yield named
            for body in subgraphs_of(attribute):
                yield from _constants(body)
