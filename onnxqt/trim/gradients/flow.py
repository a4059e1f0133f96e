"""Which weights a gradient reaches, decided on the float model before anything is edited.

From the weights on, the gradient passes a node where onnxruntime-training has its gradient or a rule gives one.
Where it cannot pass, what lies before is not trained through that node, and what lies behind trains on.
"""

import contextlib
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from onnxqt.model import Model, Node
from onnxqt.ops import Gradient, lookup
from onnxqt.trim.gradients.built_in import BUILT_IN, BuiltIn
from onnxqt.trim.gradients.elementwise import RULES as ELEMENTWISE
from onnxqt.trim.gradients.faster import FASTER
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

_LONGEST = 1 << 12  # elements of a constant that a rule may read as a parameter
_FLOATS = ("float16", "float64", "bfloat16")  # besides float32; around foreign operators


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
    tensors, ends, wanted = _Tensors(model), tuple(targets), tuple(weights)
    first = _walk_back(model, _passages(tensors, wanted), ends)
    # Weights that nothing reaches are constants in training: rules need no gradients for their sake.
    passages = _passages(tensors, [weight for weight in wanted if weight in first.reached])
    return Flow(passages, _walk_back(model, passages, ends).reached, first.lost)


class _Tensors:
    """What is known of the tensors of a model."""

    def __init__(self, model: Model) -> None:
        self.opset = model.opset
        self.graph = model.graph
        proto = model.proto.graph
        values = (*proto.input, *proto.output, *proto.value_info)
        self._others = {value.name for value in values if value.type.WhichOneof("value") not in (None, "tensor_type")}

    def may_hold_floats(self, name: str) -> bool:
        """Whether a value holds floats, in a sequence perhaps, or nobody knows what it holds."""
        graph = self.graph
        return bool(name) and (not graph.is_typed(name) or graph.is_float(name) or str(graph.dtype(name)) in _FLOATS)

    def operand(self, name: str, trained: bool) -> Operand:
        """What a rule may know of a tensor."""
        graph = self.graph
        is_float = graph.is_float(name) or not graph.is_typed(name)  # most likely, behind foreign operators
        constant = graph.initializers.get(name)
        value = graph.constant(name) if constant is not None and math.prod(constant.dims) <= _LONGEST else None
        return Operand(graph.shape(name), value, is_float, trained)

    def result(self, name: str) -> Operand | None:
        """The same for an output; None for one that nobody reads."""
        if name not in self.graph.consumers and name not in self.graph.outputs:
            return None
        return self.operand(name, self.may_hold_floats(name) and name not in self._others)


def _passages(tensors: _Tensors, weights: Iterable[str]) -> dict[str, Passage]:
    moving = set(weights)
    passages = {}
    for node in tensors.graph.nodes:
        results = [name for name in node.outputs if tensors.may_hold_floats(name)]
        # onnxruntime-training aborts where it comes from the loss to a subgraph that captures anything.
        if results and (node.captured or not moving.isdisjoint(node.inputs)):
            passage = _passage(tensors, node, moving)
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


def _passage(tensors: _Tensors, node: Node, moving: Collection[str]) -> Passage:
    call = _call(tensors, node, moving)
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
    if node.op_type in FASTER:
        with contextlib.suppress(NoGradientError):
            return FASTER[node.op_type](call)
    if row.gradient is Gradient.NATIVE:
        return BUILT_IN.get(node.op_type, _as_it_is)(call)
    rule = RULES[node.op_type]
    try:
        return BUILT_IN.get(node.op_type, rule)(call)
    except NoGradientError:
        return rule(call)


def _as_it_is(call: Call) -> BuiltIn:
    return BuiltIn()


def _call(tensors: _Tensors, node: Node, moving: Collection[str]) -> Call:
    return Call(
        node.op_type,
        tensors.opset,
        {name: _text(value) for name, value in node.attributes.items()},
        tuple(tensors.operand(name, name in moving) if name else None for name in node.inputs),
        tuple(tensors.result(name) for name in node.outputs),
    )


def _text(value: Any) -> Any:
    """Strings of an attribute as `str`; ONNX has bytes."""
    if isinstance(value, list):
        return [_text(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value
