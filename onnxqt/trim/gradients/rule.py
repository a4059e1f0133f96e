"""What a gradient rule is: the vector-Jacobian product of one node, in ONNX text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnxqt.numerics import Array
from onnxqt.ops import Attributes


@dataclass(frozen=True, eq=False)
class Operand:
    """What is known of an input or output of a node.

    Attributes:
        shape: dimensions, None where unknown; None altogether if not even the rank is known.
        value: of a constant that is small enough to be a parameter (axes, pads, scales); None for all others.
        is_float: whether it holds float32 values.
        trained: of an input, whether its gradient is wanted; of an output, whether a gradient could reach it.
    """

    shape: tuple[int | None, ...] | None
    value: Array | None = None
    is_float: bool = True
    trained: bool = False


@dataclass(frozen=True, eq=False)
class Call:
    """A node whose gradient is wanted; strings are `str`, a missing input and an output that nobody reads None."""

    op_type: str
    opset: int
    attributes: Attributes
    inputs: tuple[Operand | None, ...]
    outputs: tuple[Operand | None, ...]


@dataclass(frozen=True)
class Vjp:
    """Nodes that compute `d{i}`, the gradient of input i, from `g{i}`, the gradient of output i if it has one.

    Attributes:
        body: nodes in ONNX text; they may also read the inputs `x{i}`, the outputs `y{i}` and the constants.
        constants: tensors that the body reads by name.
    """

    body: str
    constants: Mapping[str, Array] = field(default_factory=dict)


class NoGradientError(Exception):
    """Raised by a rule for a node that it cannot differentiate; the message ends "... because it <message>"."""


Rule = Callable[[Call], Vjp]


@dataclass(frozen=True)
class Registration:
    """A gradient as onnxruntime-training takes it: one node.

    Attributes:
        key: the operator whose gradient it is, `domain::operator`.
        domain: of the node.
        op_type: of the node.
        inputs: `GO(i)`, the gradient of output i; `I(i)` and `O(i)`, inputs and outputs of the operator.
        outputs: `GI(i)`, the gradient of input i.
    """

    key: str
    domain: str
    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
