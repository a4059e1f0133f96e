"""Which weights a gradient reaches, decided on the float model before anything is edited.

From the weights on, the gradient passes a node where onnxruntime-training has its gradient or a rule gives one.
Where it cannot pass, what lies before is not trained through that node, and what lies behind trains on.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxqt.model import GraphIndex, Model, Node
from onnxqt.ops import Gradient, lookup
from onnxqt.trim.gradients.built_in import BUILT_IN, BuiltIn
from onnxqt.trim.gradients.elementwise import RULES as ELEMENTWISE
from onnxqt.trim.gradients.indexing import RULES as INDEXING
from onnxqt.trim.gradients.matrices import RULES as MATRICES
from onnxqt.trim.gradients.normalization import RULES as NORMALIZATION
from onnxqt.trim.gradients.reductions import RULES as REDUCTIONS
from onnxqt.trim.gradients.rule import Call, NoGradientError, Operand, Rule, Vjp
from onnxqt.trim.gradients.text import defined_names
from onnxqt.trim.gradients.windows import RULES as WINDOWS

RULES: Mapping[str, Rule] = {
    **ELEMENTWISE,
    **REDUCTIONS,
    **NORMALIZATION,
    **WINDOWS,
    **INDEXING,
    **MATRICES,
}

_FLOATS = ("float16", "float32", "float64")


@dataclass(frozen=True, eq=False)
class Passage:
    """How the gradient passes a node that reads trained values.

    Attributes:
        call: the node, as its rule sees it.
        open: positions of the inputs that get a gradient.
        closed: positions of the other trained inputs.
        gradient: what makes it pass; None if it passes nowhere.
        reason: why the closed inputs and captured tensors get none; completes "because it ...".
    """

    call: Call
    open: frozenset[int]
    closed: frozenset[int]
    gradient: BuiltIn | Vjp | None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Flow:
    """The way of the gradient through a model.

    Attributes:
        passages: by node name, for each node that gives out floats and reads a trained value or captures any.
        reached: tensors that get a gradient.
        lost: why the other tensors before the targets get none, by tensor.
    """

    passages: Mapping[str, Passage]
    reached: Collection[str]
    lost: Mapping[str, str]


def find_flow(model: Model, weights: Iterable[str], targets: Iterable[str]) -> Flow:
    """The way of the gradient from the outputs `targets` back to the initializers `weights`."""
    wanted = list(weights)
    first = _walk_back(model, _passages(model, wanted), targets)
    # Weights that nothing reaches are constants in training: rules need no gradients for their sake.
    passages = _passages(model, [weight for weight in wanted if weight in first.reached])
    return Flow(passages, _walk_back(model, passages, targets).reached, first.lost)


def _passages(model: Model, weights: Iterable[str]) -> dict[str, Passage]:
    graph = model.graph
    moving = set(weights)
    passages = {}
    for node in graph.nodes:
        results = [tensor for tensor in node.outputs if carries(graph, tensor)]
        # onnxruntime-training aborts where it comes from the loss to a subgraph that captures anything.
        if results and (node.captured or not moving.isdisjoint(node.inputs)):
            passage = _passage(model, node, moving)
            passages[node.name] = passage
            moving.update(results if passage.open else ())
    return passages


def _walk_back(model: Model, passages: Mapping[str, Passage], targets: Iterable[str]) -> Flow:
    """Follow the gradient and, where it stops, the reason, from the targets to the beginning of the graph."""
    before = set(targets)  # what the targets depend on
    reached = set(before)
    lost: dict[str, str] = {}
    for node in reversed(model.graph.nodes):
        if before.isdisjoint(node.outputs):
            continue
        before.update(node.inputs, node.captured)
        passage = passages.get(node.name)
        if passage is None:
            continue
        opened = [node.inputs[position] for position in passage.open]
        stopped = [*(node.inputs[position] for position in passage.closed), *node.captured]
        if not reached.isdisjoint(node.outputs):
            reached.update(opened)
        elif reasons := [lost[tensor] for tensor in node.outputs if tensor in lost]:
            lost.update(dict.fromkeys(opened, reasons[0]))
        lost.update(dict.fromkeys(stopped, f"no gradient passes {node.label}, because it {passage.reason}"))
    return Flow(passages, reached, lost)


def carries(graph: GraphIndex, tensor: str) -> bool:
    """Whether a gradient might pass a tensor: it holds floats, or nobody knows what it holds."""
    if not tensor:
        return False
    return graph.is_float(tensor) or not graph.is_typed(tensor) or _dtype(graph, tensor) in _FLOATS


def _dtype(graph: GraphIndex, tensor: str) -> str:
    value = graph.constant(tensor)
    return str(graph.dtype(tensor) if value is None else value.dtype)


def _passage(model: Model, node: Node, moving: Collection[str]) -> Passage:
    call = _call(model, node, moving)
    trained = frozenset(i for i, operand in enumerate(call.inputs) if operand is not None and operand.trained)
    try:
        gradient = _gradient(node, call)
    except NoGradientError as error:
        return Passage(call, frozenset(), trained, None, str(error))
    given = trained if isinstance(gradient, BuiltIn) else trained & _given(gradient)
    reason = "has none for this operand"
    return Passage(call, given, trained - given, gradient if given else None, reason)


def _given(vjp: Vjp) -> set[int]:
    return {int(name[1:]) for name in defined_names(vjp.body) if name[0] == "d" and name[1:].isdigit()}


def _gradient(node: Node, call: Call) -> BuiltIn | Vjp:
    row = lookup(node.op_type, node.domain)
    if row.gradient in (Gradient.STOPPED, Gradient.NOT_NEEDED):
        raise NoGradientError(row.reason)
    if row.gradient is Gradient.NATIVE:
        return BUILT_IN.get(node.op_type, _as_it_is)(call)
    rule = RULES[node.op_type]
    try:
        return BUILT_IN.get(node.op_type, rule)(call)
    except NoGradientError:
        return rule(call)


def _as_it_is(call: Call) -> BuiltIn:
    return BuiltIn()


def _call(model: Model, node: Node, moving: Collection[str]) -> Call:
    graph = model.graph
    read = {*graph.consumers, *graph.outputs}

    def operand(tensor: str, trained: bool) -> Operand:
        is_float = graph.is_float(tensor) or not graph.is_typed(tensor)  # most likely, behind foreign operators
        return Operand(graph.shape(tensor), graph.constant(tensor), is_float, trained)

    return Call(
        node.op_type,
        model.opset,
        {name: _text(value) for name, value in node.attributes.items()},
        tuple(operand(tensor, tensor in moving) if tensor else None for tensor in node.inputs),
        tuple(operand(tensor, carries(graph, tensor)) if tensor in read else None for tensor in node.outputs),
    )


def _text(value: Any) -> Any:
    """Strings of an attribute as `str`; ONNX has bytes."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
