"""Which terms a loss has for a model and its samples, decided before anything is edited or run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from onnxqt.data import LABELS, InputSpec
from onnxqt.errors import TrainingError
from onnxqt.model import GraphIndex, Model, Node
from onnxqt.plan import QuantPlan
from onnxqt.trim.losses.graph_file import find_bindings, load_loss_graph, shapes_agree
from onnxqt.trim.losses.terms import NAMES, SUPERVISED, Kind, Losses, Term, TermName

_FEATURES = 4  # tensors that "features" compares if none are named
_MOVES = ("Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # change no value and lose none
_BINARY = ("HardSigmoid", "Sigmoid")
_CLASSES: Mapping[str, Kind] = {"LogSoftmax": "scores", "Softmax": "probabilities"}  # of what gives out an output


def find_terms(model: Model, plan: QuantPlan, losses: Losses, labels: Sequence[InputSpec]) -> tuple[Term, ...]:
    """The terms of a loss.

    Args:
        model: the float model.
        plan: its quantizer sites, among which "features" chooses.
        losses: what the user asks for.
        labels: the arrays of labels that the samples have, as `Samples.targets` gives them.

    Returns:
        The terms; none if the model has no float output, which only leaves nothing to distil.

    Raises:
        TrainingError: for an output or feature that the model lacks, for labels that are missing or do not fit,
            and for a loss graph that does not fit the model.
        ModelError: for a loss graph that cannot be read.
    """
    terms: list[Term] = []
    for key, weight in losses.weights.items():
        part, _, output = key.partition(":")
        name = next(name for name in NAMES if name == part)
        if output:
            _check_output(model, key, output)
        if name == "features":
            found = _features(model, plan, losses)
        elif name == "graph":
            found = [_graph(model, losses, labels)]
        elif name == "distill":
            found = [_distill(model, tensor, losses) for tensor in _float_outputs(model, output)]
        else:
            found = list(_supervised(model, name, output, labels))
        share = weight / len(found) if name == "features" else weight
        terms += [replace(term, weight=share) for term in found]
    return tuple(terms)


def _float_outputs(model: Model, only: str = "") -> list[str]:
    return [name for name in model.graph.outputs if model.graph.is_float(name) and only in ("", name)]


def _check_output(model: Model, key: str, output: str) -> None:
    outputs = _float_outputs(model)
    if output not in outputs:
        raise TrainingError(
            f"the loss '{key}' names an output that is not among the model's {outputs}: name one of them"
        )


def _distill(model: Model, tensor: str, losses: Losses) -> Term:
    kind, axis = find_kind(model, tensor)
    return Term("distill", 1.0, tensor, kind, axis, _size(model.graph, tensor, axis), temperature=losses.temperature)


def find_kind(model: Model, output: str) -> tuple[Kind, int]:
    """What an output holds, and along which axis its classes lie.

    (N, C) with fixed C >= 2 are class scores, unless a Softmax or Sigmoid gives them out. Of any other shape, class
    scores cannot be told from other values: only what a Softmax or LogSoftmax gives out counts as classes.
    """
    graph = model.graph
    shape, producer = graph.shape(output), graph.producer.get(output)
    source = _behind_moves(graph, output)
    if source is not None and source.op_type in _BINARY:
        return "binary", -1
    if source is not None and source.op_type in _CLASSES and shape is not None:
        kind = _CLASSES[source.op_type]
        own = graph.shape(source.outputs[0])
        axis = source.attributes.get("axis", -1) % len(own) if own else 0
        if source is producer and axis and _size(graph, output, axis) > 1:
            return kind, axis
        if source is not producer and own and axis and len(shape) == 2 and own[axis] == _size(graph, output, 1) > 1:
            return kind, 1
        return "values", -1
    if shape is not None and len(shape) == 2 and _size(graph, output, 1) > 1:
        return "scores", 1
    return "values", -1


def _behind_moves(graph: GraphIndex, tensor: str) -> Node | None:
    """The node whose values a tensor has, in another layout perhaps."""
    node = graph.producer.get(tensor)
    while node is not None and node.op_type in _MOVES and node.inputs[0] in graph.producer:
        node = graph.producer[node.inputs[0]]
    return node


def _size(graph: GraphIndex, tensor: str, axis: int) -> int:
    """A dimension; 0 where it is not known."""
    shape = graph.shape(tensor)
    return (shape[axis] if shape else None) or 0


# --- labels -----------------------------------------------------------------------------------------------


def _supervised(model: Model, name: TermName, only: str, labels: Sequence[InputSpec]) -> Iterator[Term]:
    """A term for each output that has labels which fit."""
    outputs = _float_outputs(model)
    given = {_output_of(spec.name, outputs): spec for spec in labels}
    labelled = {output: given[output] for output in outputs if output in given and only in ("", output)}
    if not labelled:
        wanted = [only] if only else outputs
        have = f"they have {[spec.name for spec in labels]}" if labels else "they have no labels"
        raise TrainingError(
            f"the loss '{name}' needs labels of {_one_of(wanted, outputs)} in the samples, but {have}: add the array, "
            "or use the loss 'distill'"
        )
    fits = {output: _FITS[name](model, name, output, spec) for output, spec in labelled.items()}
    found = [term for term in fits.values() if isinstance(term, Term)]
    if not found:
        raise TrainingError(next(reason for reason in fits.values() if isinstance(reason, str)))
    yield from found


def _output_of(array: str, outputs: Sequence[str]) -> str:
    """The output whose labels an array holds."""
    return array.removeprefix(f"{LABELS}:") if array != LABELS else next(iter(outputs), "")


def _one_of(wanted: Iterable[str], outputs: Sequence[str]) -> str:
    arrays = [LABELS if output == outputs[0] else f"{LABELS}:{output}" for output in wanted]
    return " or ".join(f"'{array}'" for array in arrays) or "a float output, which the model lacks,"


def _class_numbers(model: Model, name: TermName, output: str, spec: InputSpec) -> Term | str:
    """A term for integer labels of the output's shape without its class axis."""
    shape = model.graph.shape(output)
    if spec.dtype.kind != "i":
        return (
            f"the array '{spec.name}' holds {spec.dtype}, but the loss '{name}' takes class numbers: save integers, "
            "or use the loss 'bce' for probabilities"
        )
    for axis in _class_axes(model, output):
        if shape and shapes_agree(spec.shape, (*shape[:axis], *shape[axis + 1 :])):
            kind, _ = find_kind(model, output)
            kind = "probabilities" if kind == "probabilities" else "scores"
            return Term(name, 1.0, output, kind, axis, _size(model.graph, output, axis), spec.name, integer=True)
    return (
        f"the array '{spec.name}' has shape {_shown(spec.shape)}, but the output '{output}' {_shown(shape)}: the loss "
        f"'{name}' takes one class number for each place, of the output's shape without its axis of classes (the "
        "argmax of one-hot rows)"
    )


def _class_axes(model: Model, output: str) -> list[int]:
    """Where the classes may lie: along the axis of a softmax, else along axis 1, else along the last one."""
    shape = model.graph.shape(output) or ()
    kind, axis = find_kind(model, output)
    axes = [axis] if kind in ("scores", "probabilities") and len(shape) > 2 else [1, len(shape) - 1]
    return [axis for axis in dict.fromkeys(axes) if 0 < axis < len(shape) and (shape[axis] or 0) > 1]


def _same_shape(model: Model, name: TermName, output: str, spec: InputSpec) -> Term | str:
    """A term for labels of the output's shape."""
    shape = model.graph.shape(output)
    if not shapes_agree(spec.shape, shape):
        return (
            f"the array '{spec.name}' has shape {_shown(spec.shape)}, but the output '{output}' {_shown(shape)}: the "
            f"loss '{name}' takes labels of the output's shape"
        )
    kind, axis = find_kind(model, output)
    integer = spec.dtype.kind == "i"
    return Term(name, 1.0, output, kind, axis, labels=spec.name, integer=integer)


_FITS: Mapping[TermName, Callable[[Model, TermName, str, InputSpec], Term | str]] = {
    "cross-entropy": _class_numbers,
    **dict.fromkeys(SUPERVISED[1:], _same_shape),
}


def _shown(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "an unknown one"
    return f"({', '.join(['samples', *('any' if size is None else str(size) for size in shape[1:])])})"


# --- inner tensors ----------------------------------------------------------------------------------------


def _features(model: Model, plan: QuantPlan, losses: Losses) -> list[Term]:
    tensors = losses.features or choose_features(model, plan)
    if not tensors:
        raise TrainingError("the loss has the part 'features', but the model has no inner integer node: leave it out")
    computed = model.graph.producer
    for tensor in tensors:
        if tensor not in computed or not model.graph.is_float(tensor):
            known = [node.output for node in plan.integer_nodes]
            raise TrainingError(
                f"the feature '{tensor}' is no float tensor that the model computes: name tensors such as {known[:3]}"
            )
    return [Term("features", 1.0, tensor) for tensor in tensors]


def choose_features(model: Model, plan: QuantPlan, count: int = _FEATURES) -> tuple[str, ...]:
    """Inner tensors to compare: results of integer nodes, evenly spaced from the first to the last.

    Where there are enough of them, those of Adds of two computed tensors (residual connections, where a block ends).
    """
    graph = model.graph
    inner = [node for node in plan.integer_nodes if graph.is_float(node.output) and node.output not in graph.outputs]
    sums = [node for node in inner if node.op_type == "Add" and len(node.inputs) == 2]
    tensors = list(dict.fromkeys(node.output for node in (sums if len(sums) >= count else inner)))
    number = min(count, len(tensors))
    return tuple(tensors[(i + 1) * len(tensors) // number - 1] for i in range(number))


# --- a loss graph -----------------------------------------------------------------------------------------


def _graph(model: Model, losses: Losses, labels: Sequence[InputSpec]) -> Term:
    path = losses.graph or ""
    bindings = find_bindings(path, load_loss_graph(path, model.opset), model, labels)
    return Term("graph", bindings=bindings, path=path)
