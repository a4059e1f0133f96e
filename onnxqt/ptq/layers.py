"""What the steps of post-training quantization share: a model on its way to a file, its layers, parts of its graph."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from onnxqt.calibrate import Quantizers
from onnxqt.data import Samples, fixed_batch
from onnxqt.errors import ModelError
from onnxqt.export import quantized_model
from onnxqt.model import GraphIndex, Model, Node, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import IntegerNode, QuantPlan
from onnxqt.runtime import Session

BATCH = 32  # samples that run together; bounds the memory

Progress = Callable[[int, str], None]  # called with the number of layers done, and the name of the last one


def silent(done: int, name: str) -> None:
    """Progress that nobody looks at."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """Float weights with the quantizers that turn them into a file.

    Attributes:
        reference: the float model whose outputs the file should have.
        model: the float weights, equal or close to the reference's.
        plan: where the quantizers are; of both models, as they have the same graph.
        quantizers: their parameters.
    """

    reference: Model
    model: Model
    plan: QuantPlan
    quantizers: Quantizers

    def proto(self) -> onnx.ModelProto:
        """The QDQ model."""
        return quantized_model(self.model, self.plan, self.quantizers)


@dataclass(frozen=True, slots=True)
class Layer:
    """A node with a quantized weight.

    Attributes:
        node: its part of the plan.
        source: the node of the float graph.
        end: the node that gives out its sum, bias included: itself, or the Add fused behind a MatMul.
        clamp: the range of the activation fused behind it; infinite where there is none.
        axis: of the channels of its output.
    """

    node: IntegerNode
    source: Node
    end: str
    clamp: tuple[float, float]
    axis: int


def check_size(model: Model) -> None:
    """Refuse a model that cannot be held in memory several times.

    Raises:
        ModelError: if weights are too large to be in the model's file.
    """
    if model.is_large:
        raise ModelError(
            "the model keeps weights outside of its file: equalization, learned rounding and bias correction take "
            "models of at most 2 GB, so quantize it without them"
        )


def layers_of(model: Model, plan: QuantPlan) -> tuple[Layer, ...]:
    """The layers of a plan, in topological order.

    Raises:
        ModelError: if the model is too large.
    """
    check_size(model)
    nodes = {node.name: node for node in model.graph.nodes}
    layers = []
    for node in plan.integer_nodes:
        if node.weight is None:
            continue
        end, clamp = nodes[node.name], (-float("inf"), float("inf"))
        for follower in (nodes[name] for name in node.followers):
            if follower.op_type == "Add":
                end = follower
            else:
                clamp = _clamp(model.graph, follower)
        axis = 1 if node.op_type in ("Conv", "ConvTranspose") else -1
        layers.append(Layer(node, nodes[node.name], end.name, clamp, axis))
    return tuple(layers)


def _clamp(graph: GraphIndex, node: Node) -> tuple[float, float]:
    """The range that a Relu or a Clip with constant bounds keeps."""
    if node.op_type == "Relu":
        return 0.0, float("inf")
    bounds = [-float("inf"), float("inf")]
    for index, name in enumerate(node.inputs[1:3]):
        value = graph.constant(name)
        if value is not None:
            bounds[index] = float(value)
    return bounds[0], bounds[1]


def by_name(proto: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """The nodes of the main graph by their names, which the float model and its QDQ form share."""
    return {node.name: node for node in proto.graph.node}


def run_part(
    model: Model, proto: onnx.ModelProto, tensors: Sequence[str], samples: Samples
) -> Iterator[dict[str, Array]]:
    """Some tensors of `proto`, a form of `model`, batch by batch, without the samples that fill up a fixed batch."""
    session = Session(upto(proto, tensors), outputs=list(dict.fromkeys(tensors)))
    fixed = fixed_batch(input_specs(model))
    for batch in samples.batches(fixed or BATCH, pad=fixed is not None):
        values = session.run(batch.inputs)
        yield {name: batch.real(value) for name, value in values.items()}


def upto(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of a model that computes the named tensors, which become its outputs."""
    index = GraphIndex(proto)
    needed, kept = set(tensors), []
    for position in reversed(range(len(index.nodes))):
        node = index.nodes[position]
        if not needed.isdisjoint(node.outputs):
            needed.update((*node.inputs, *node.captured))
            kept.append(proto.graph.node[position])
    part = onnx.ModelProto()
    part.CopyFrom(proto)
    for field in ("node", "output", "initializer", "value_info"):
        part.graph.ClearField(field)
    part.graph.node.extend(reversed(kept))
    part.graph.initializer.extend(tensor for tensor in proto.graph.initializer if tensor.name in needed)
    part.graph.output.extend(onnx.helper.make_empty_tensor_value_info(tensor) for tensor in dict.fromkeys(tensors))
    return part
