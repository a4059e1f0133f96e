"""What to change in a model, so that less of it stays float."""

from collections.abc import Callable
from dataclasses import dataclass

from onnxqt.model import GraphIndex, Node
from onnxqt.profiles import Policy

_When = Callable[[Node, GraphIndex], bool]


def _always(node: Node, graph: GraphIndex) -> bool:
    return True


def _with_constant(node: Node, graph: GraphIndex) -> bool:
    return any(tensor in graph.initializers for tensor in node.inputs)


def _without_constant(node: Node, graph: GraphIndex) -> bool:
    return not _with_constant(node, graph)


def _with_constant_second(node: Node, graph: GraphIndex) -> bool:
    return len(node.inputs) > 1 and node.inputs[1] in graph.initializers


def _at_the_end(node: Node, graph: GraphIndex) -> bool:
    return any(tensor in graph.outputs for tensor in node.outputs)


@dataclass(frozen=True, slots=True)
class _Advice:
    """What can stand in place of a float operator.

    Attributes:
        operators: of which it is true.
        text: what to do.
        needs: operators that the back end must run on integers.
        when: of which of their nodes it is true.
    """

    operators: tuple[str, ...]
    text: str
    needs: tuple[str, ...] = ()
    when: _When = _always


_SMOOTH = (
    *("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Elu", "Selu", "Celu", "Mish", "Softplus", "Softsign"),
    *("LeakyRelu", "PRelu", "Erf"),
)
_ADVICE = (
    _Advice(
        _SMOOTH,
        "Relu or Clip (Relu6) in its place limits the codes of the operator before it; needs retraining",
        ("Clip",),
    ),
    _Advice(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LRN"),
        "BatchNormalization in its place folds into the operator before it; needs retraining",
    ),
    _Advice(
        ("Softmax", "LogSoftmax"),
        "leave it out and compute it on the host: the order of the classes is the same",
        when=_at_the_end,
    ),
    _Advice(
        ("ArgMax", "ArgMin", "TopK", "NonMaxSuppression"), "leave it out and compute it on the host", when=_at_the_end
    ),
    _Advice(("ReduceMean",), "over height and width, GlobalAveragePool computes the same", ("GlobalAveragePool",)),
    _Advice(
        ("Mul", "Div"), "if constant per channel: scale the weights of the operator before it", when=_with_constant
    ),
    _Advice(("Add", "Sub"), "if constant per channel: put it into the bias before it", when=_with_constant),
    _Advice(
        ("Add",),
        "Conv of size 1 with identity weights over the Concat of both computes the same",
        ("Concat", "Conv"),
        _without_constant,
    ),
    _Advice(
        ("Sub",),
        "Add computes the same, with negated weights of the operator before its second operand",
        ("Add",),
        _without_constant,
    ),
    _Advice(("Split",), "Slice for each part moves codes and needs no float"),
    _Advice(
        ("Gather",), "if its indices are a range, Slice moves codes and needs no float", when=_with_constant_second
    ),
    _Advice(
        ("Resize", "Upsample"), "ConvTranspose in its place runs on integers; needs retraining", ("ConvTranspose",)
    ),
    _Advice(
        ("AveragePool", "GlobalAveragePool"),
        "a depthwise Conv with equal weights computes the same where nothing is padded",
        ("Conv",),
    ),
    _Advice(("LSTM", "GRU", "RNN", "If", "Loop", "Scan"), "export it unrolled into single operators"),
)


def advice_for(node: Node, graph: GraphIndex, policy: Policy) -> str | None:
    """What can stand in place of a float node on a back end; None if nothing general can be said."""
    operators = set(policy.operators)
    fitting = (advice for advice in _ADVICE if node.op_type in advice.operators and operators.issuperset(advice.needs))
    return next((advice.text for advice in fitting if advice.when(node, graph)), None)
