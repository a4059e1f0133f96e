"""The loss as nodes of a graph."""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.model import Model, editable, finish
from onnxqt.numerics import Array
from onnxqt.trim.losses.graph_file import inline, load_loss_graph
from onnxqt.trim.losses.terms import (
    FLOOR,
    LOSS,
    Term,
    TermName,
    classes_input,
    labels_input,
    original_input,
    power_input,
)
from onnxqt.trim.quantizers import QUANTIZED


def with_loss(model: Model, terms: Iterable[Term]) -> Model:
    """The float model with the loss `LOSS` as its only output: what `find_flow` finds the gradient's way through."""
    graph = editable(model.proto)
    insert_loss(graph, terms)
    return Model(finish(graph), model.sha256, model.changes)


def insert_loss(graph: gs.Graph, terms: Iterable[Term]) -> None:
    """Replace the outputs of a graph by the loss, a scalar of the name `LOSS`, in place.

    The loss is the sum of weight times value over the terms. With y a tensor, q the same one of the original model,
    t labels, and means over all elements (of classes: over all places):

        distill        T^2 mean(-sum_c softmax(q / T)_c log softmax(y / T)_c)   class scores (Hinton 2015, eq. 1)
                       + mean((y - q)^2) / var(q)                                 every output
        features       mean((y - q)^2) / var(q)
        cross-entropy  mean(-log softmax(y)_t)
        bce            mean(t softplus(-y) + (1 - t) softplus(y))
        mse            mean((y - t)^2)
        l1             mean(|y - t|)

    For outputs that are probabilities already, log softmax(y) is log(y + 1e-7), and likewise in bce, which also
    stands for the first line of distill where the outputs are binary probabilities. Every term is finite for finite y.

    Where the graph has quantizers, the terms read the quantized tensors.
    """
    builder = _Builder(graph)
    parts = []
    for term in terms:
        value = _PARTS[term.name](builder, term)
        parts.append(value if term.weight == 1 else builder.apply("Mul", value, builder.number(term.weight)))
    total = parts[0]
    for part in parts[1:]:
        total = builder.apply("Add", total, part)
    total.name, total.shape, total.dtype = LOSS, [], np.dtype(np.float32)
    graph.outputs = [total]
    graph.cleanup().toposort()


class _Builder:
    """Adds nodes to a graph, with names that depend on the terms alone."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self._tensors = graph.tensors()
        self._count = 0

    def tensor(self, name: str) -> gs.Tensor:
        """A tensor of the model, quantized where it has a quantizer."""
        return self._tensors.get(f"{QUANTIZED}{name}", self._tensors.get(name))

    def input(self, name: str, shape: list[int | str] | None, dtype: type[np.generic] = np.float32) -> gs.Variable:
        """An input of the graph, made when it is first asked for."""
        if name not in self._tensors:
            self._tensors[name] = gs.Variable(name, dtype, shape)
            self.graph.inputs.append(self._tensors[name])
        return self._tensors[name]

    def number(self, value: float) -> gs.Constant:
        """A float32 scalar."""
        return self.constant(np.array(value, np.float32))

    def constant(self, value: Array) -> gs.Constant:
        """A constant."""
        self._count += 1
        return gs.Constant(f"onnxqt.loss.constant_{self._count}", value)

    def apply(self, op_type: str, *inputs: gs.Tensor, **attributes: int) -> gs.Variable:
        """The float result of an operator."""
        self._count += 1
        result = gs.Variable(f"onnxqt.loss.{self._count}.out", np.float32)
        self.graph.nodes.append(
            gs.Node(op_type, f"onnxqt.loss.{self._count}", attributes, inputs=list(inputs), outputs=[result])
        )
        return result

    def mean(self, x: gs.Tensor) -> gs.Variable:
        """Mean over all elements."""
        return self.apply("ReduceMean", x, keepdims=0)

    def labels(self, term: Term, y: gs.Tensor) -> gs.Variable:
        """The labels of a term that have the shape of `y`, as floats."""
        given = self.input(labels_input(term.labels), y.shape, np.int64 if term.integer else np.float32)
        return self.apply("Cast", given, to=1) if term.integer else given

    def one_minus(self, x: gs.Tensor) -> gs.Variable:
        """1 - x."""
        return self.apply("Sub", self.number(1.0), x)


def _distill(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    error = _normalised_error(builder, term)
    if term.distils_classes:
        expected = builder.input(classes_input(term.tensor), y.shape)
        entropy = _cross_entropy(builder, _log_probabilities(builder, term), expected, term.axis)
        if term.temperature != 1:
            entropy = builder.apply("Mul", entropy, builder.number(term.temperature**2))
        return builder.apply("Add", entropy, error)
    if term.kind == "binary":
        expected = builder.input(original_input(term.tensor), y.shape)
        return builder.apply("Add", _binary_of_probabilities(builder, y, expected), error)
    return error


def _log_probabilities(builder: _Builder, term: Term) -> gs.Variable:
    """Logarithm of the class probabilities, at the temperature of the term."""
    y = builder.tensor(term.tensor)
    if term.kind == "probabilities":
        y = builder.apply("Log", builder.apply("Add", y, builder.number(FLOOR)))
        if term.temperature == 1:
            return y
    if term.temperature != 1:
        y = builder.apply("Mul", y, builder.number(1 / term.temperature))
    return builder.apply("LogSoftmax", y, axis=term.axis)


def _cross_entropy(builder: _Builder, logarithm: gs.Tensor, expected: gs.Tensor, axis: int) -> gs.Variable:
    weighted = builder.apply("Mul", expected, logarithm)
    summed = builder.apply("ReduceSum", weighted, builder.constant(np.array([axis], np.int64)), keepdims=0)
    return builder.apply("Neg", builder.mean(summed))


def _normalised_error(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    original = builder.input(original_input(term.tensor), y.shape)
    return builder.apply("Div", _squared_error(builder, y, original), builder.input(power_input(term.tensor), []))


def _squared_error(builder: _Builder, y: gs.Tensor, expected: gs.Tensor) -> gs.Variable:
    difference = builder.apply("Sub", y, expected)
    return builder.mean(builder.apply("Mul", difference, difference))


def _labelled_classes(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    places = None if y.shape is None else [size for axis, size in enumerate(y.shape) if axis != term.axis]
    labels = builder.input(labels_input(term.labels), places, np.int64)
    depth = builder.constant(np.array(term.classes, np.int64))
    expected = builder.apply("OneHot", labels, depth, builder.constant(np.array([0, 1], np.float32)), axis=term.axis)
    return _cross_entropy(builder, _log_probabilities(builder, term), expected, term.axis)


def _binary(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    labels = builder.labels(term, y)
    if term.kind in ("binary", "probabilities"):
        return _binary_of_probabilities(builder, y, labels)
    # As often written, max(y, 0) - y t + log(1 + exp(-|y|)): the same, but its parts have no gradient at y = 0.
    yes = builder.apply("Mul", labels, builder.apply("Softplus", builder.apply("Neg", y)))
    no = builder.apply("Mul", builder.one_minus(labels), builder.apply("Softplus", y))
    return builder.mean(builder.apply("Add", yes, no))


def _binary_of_probabilities(builder: _Builder, y: gs.Tensor, expected: gs.Tensor) -> gs.Variable:
    """mean(-t log(y + floor) - (1 - t) log(1 - y + floor)); rounding may bring y a little beyond 1."""

    def logarithm(p: gs.Tensor) -> gs.Variable:
        return builder.apply("Log", builder.apply("Add", builder.apply("Relu", p), builder.number(FLOOR)))

    yes = builder.apply("Mul", expected, logarithm(y))
    no = builder.apply("Mul", builder.one_minus(expected), logarithm(builder.one_minus(y)))
    return builder.apply("Neg", builder.mean(builder.apply("Add", yes, no)))


def _mse(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    return _squared_error(builder, y, builder.labels(term, y))


def _l1(builder: _Builder, term: Term) -> gs.Variable:
    y = builder.tensor(term.tensor)
    return builder.mean(builder.apply("Abs", builder.apply("Sub", y, builder.labels(term, y))))


def _graph(builder: _Builder, term: Term) -> gs.Variable:
    """The user's graph, brought to shape ()."""
    loss = load_loss_graph(term.path, builder.graph.opset)
    shapes = {tensor: loss.graph.shape(tensor) for tensor in loss.graph.inputs}
    values: dict[str, gs.Tensor] = {}
    for name, source, of, integer in term.bindings:
        if source == "labels":
            free = [f"{labels_input(of)}.{i}" if size is None else size for i, size in enumerate(shapes[name] or ())]
            values[name] = builder.input(labels_input(of), free, np.int64 if integer else np.float32)
            continue
        y = builder.tensor(of)
        values[name] = y if source == "output" else builder.input(original_input(of), y.shape, y.dtype)
    return builder.mean(inline(builder.graph, loss, values))


_PARTS: Mapping[TermName, Callable[[_Builder, Term], gs.Variable]] = {
    "distill": _distill,
    "features": _normalised_error,
    "cross-entropy": _labelled_classes,
    "bce": _binary,
    "mse": _mse,
    "l1": _l1,
    "graph": _graph,
}
