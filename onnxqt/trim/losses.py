"""What training minimises: agreement with targets, added to the training graph as its only output.

For every output `y` of the model that holds class scores (N, C), with target probabilities `t`:

    mean over N of  -sum_c t_c log softmax(y)_c

The targets are the original model's own probabilities (distillation, no labels needed) or one-hot labels
(cross-entropy). For distillation every output, whatever its shape, also has the normalised squared error

    mean((y - y_original)^2) / var(y_original)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.trim.quantizers import QUANTIZED

LossName = Literal["distill", "cross-entropy"]
LOSS = "onnxqt.loss"
_FLOOR = 1e-7  # keeps the logarithm of a probability finite


@dataclass(frozen=True, slots=True)
class Target:
    """One output of the model and how it is compared.

    Attributes:
        output: its name.
        kind: "scores" before a softmax, "probabilities" after it, "values" for anything else.
    """

    output: str
    kind: Literal["scores", "probabilities", "values"]

    @property
    def classes_input(self) -> str:
        """Graph input for the target probabilities."""
        return f"onnxqt.target:{self.output}"

    @property
    def values_input(self) -> str:
        """Graph input for the original model's output."""
        return f"onnxqt.original:{self.output}"

    @property
    def power_input(self) -> str:
        """Graph input for the variance of the original model's output, a scalar."""
        return f"onnxqt.power:{self.output}"


def find_targets(model: Model) -> tuple[Target, ...]:
    """The float outputs of a model, with the kind of each."""
    graph = model.graph
    return tuple(Target(name, _kind(model, name)) for name in graph.outputs if graph.is_float(name))


def _kind(model: Model, output: str) -> Literal["scores", "probabilities", "values"]:
    shape = model.graph.shape(output)
    if shape is None or len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        return "values"
    producer = model.graph.producer.get(output)
    return "probabilities" if producer is not None and producer.op_type == "Softmax" else "scores"


def add_loss(graph: gs.Graph, targets: tuple[Target, ...], loss: LossName) -> None:
    """Replace the outputs of a training graph by the scalar loss, in place; whose name is `LOSS`."""
    outputs = {target.output: tensor for target, tensor in zip(targets, _matching(graph, targets), strict=True)}
    terms = []
    for target in targets:
        y = outputs[target.output]
        if target.kind != "values":
            terms.append(_cross_entropy(graph, target, y))
        if loss == "distill":
            terms.append(_squared_error(graph, target, y))
    total = terms[0]
    for term in terms[1:]:
        total = _apply(graph, "Add", [total, term])
    total.name, total.shape, total.dtype = LOSS, [], np.dtype(np.float32)
    graph.outputs = [total]
    graph.cleanup().toposort()


def _matching(graph: gs.Graph, targets: tuple[Target, ...]) -> list[gs.Tensor]:
    """The graph's output tensors of the targets; a quantized output carries the prefix of its quantizer."""
    by_name = {tensor.name.removeprefix(QUANTIZED): tensor for tensor in graph.outputs}
    return [by_name[target.output] for target in targets]


def _cross_entropy(graph: gs.Graph, target: Target, y: gs.Tensor) -> gs.Tensor:
    expected = gs.Variable(target.classes_input, np.float32, y.shape)
    graph.inputs.append(expected)
    if target.kind == "scores":
        logarithm = _apply(graph, "LogSoftmax", [y], axis=-1)
    else:
        logarithm = _apply(graph, "Log", [_apply(graph, "Add", [y, _scalar("floor", _FLOOR)])])
    weighted = _apply(graph, "Mul", [expected, logarithm])
    axes = gs.Constant(f"{target.classes_input}.axes", np.array([-1], np.int64))
    per_sample = _apply(graph, "ReduceSum", [weighted, axes], keepdims=0)
    return _apply(graph, "Neg", [_apply(graph, "ReduceMean", [per_sample], keepdims=0)])


def _squared_error(graph: gs.Graph, target: Target, y: gs.Tensor) -> gs.Tensor:
    original = gs.Variable(target.values_input, np.float32, y.shape)
    power = gs.Variable(target.power_input, np.float32, [])
    graph.inputs.extend([original, power])
    difference = _apply(graph, "Sub", [y, original])
    mean = _apply(graph, "ReduceMean", [_apply(graph, "Mul", [difference, difference])], keepdims=0)
    return _apply(graph, "Div", [mean, power])


def _scalar(name: str, value: float) -> gs.Constant:
    return gs.Constant(f"onnxqt.{name}", np.array(value, np.float32))


def _apply(graph: gs.Graph, op_type: str, inputs: list[gs.Tensor], **attributes: int) -> gs.Variable:
    name = f"onnxqt.loss.{len(graph.nodes)}"
    result = gs.Variable(f"{name}.out", np.float32)
    graph.nodes.append(gs.Node(op_type, name, attributes, inputs=inputs, outputs=[result]))
    return result


def softmax(scores: Array) -> Array:
    """Probabilities of class scores (N, C), float32."""
    shifted = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Array = (shifted / shifted.sum(axis=-1, keepdims=True)).astype(np.float32)
    return probabilities


def target_feeds(
    targets: tuple[Target, ...], original: dict[str, Array], labels: Array | None, power: dict[str, float]
) -> dict[str, Array]:
    """Values of the loss inputs for one batch.

    Args:
        targets: the outputs compared.
        original: the original model's outputs.
        labels: class numbers (N,) for cross-entropy, None for distillation.
        power: variance of each output of the original model.
    """
    values: dict[str, Array] = {}
    for target in targets:
        y = original[target.output]
        values[target.values_input] = y
        values[target.power_input] = np.array(power[target.output], np.float32)
        if target.kind != "values":
            probabilities = softmax(y) if target.kind == "scores" else y
            values[target.classes_input] = (
                probabilities if labels is None else np.eye(y.shape[1], dtype=np.float32)[labels]
            )
    return values
