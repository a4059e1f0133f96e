"""The op table: one row per operator, with everything the stages need to know about it.

A new operator is one row here (with a gradient rule and an integer kernel where it needs them).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Attributes = Mapping[str, Any]


class Kind(str, Enum):
    """How an operator takes part in an integer network."""

    WEIGHTED = "weighted"  # multiplies by a weight: quantized wherever it stands
    ADD = "add"  # adds two activations, each on its own grid
    CONCAT = "concat"  # its inputs and output share one grid
    AVERAGE = "average"  # output on a grid of its own
    SAME_GRID = "same grid"  # only selects or moves codes: output on the input's grid
    CLAMP = "clamp"  # Relu and Clip: fused into the operator before, else on a grid of their own
    FLOAT = "float"  # has no integer form here


class Gradient(str, Enum):
    """Where the gradient of an operator comes from."""

    NATIVE = "native"  # onnxruntime-training has it
    RULE = "rule"  # onnxqt.trim.gradients writes it
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Op:
    """One row of the table."""

    kind: Kind = Kind.FLOAT
    gradient: Gradient = Gradient.NONE


_SAME_GRID = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity")
_NATIVE_FLOAT = (
    *("Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Erf", "Sigmoid", "Tanh", "Softmax"),
    *("LogSoftmax", "LeakyRelu", "ReduceSum", "Expand", "Where", "Cast", "Gather", "Split", "Tile"),
)

OPS: Mapping[str, Op] = {
    "Conv": Op(Kind.WEIGHTED, Gradient.NATIVE),
    "ConvTranspose": Op(Kind.WEIGHTED),
    "Gemm": Op(Kind.WEIGHTED, Gradient.NATIVE),
    "MatMul": Op(Kind.WEIGHTED, Gradient.NATIVE),
    "Add": Op(Kind.ADD, Gradient.NATIVE),
    "Concat": Op(Kind.CONCAT, Gradient.NATIVE),
    "AveragePool": Op(Kind.AVERAGE, Gradient.RULE),
    "GlobalAveragePool": Op(Kind.AVERAGE, Gradient.NATIVE),
    "ReduceMean": Op(Kind.AVERAGE, Gradient.NATIVE),
    "MaxPool": Op(Kind.SAME_GRID, Gradient.RULE),
    **{name: Op(Kind.SAME_GRID, Gradient.NATIVE) for name in _SAME_GRID},
    "Relu": Op(Kind.CLAMP, Gradient.NATIVE),
    "Clip": Op(Kind.CLAMP, Gradient.NATIVE),
    **{name: Op(Kind.FLOAT, Gradient.NATIVE) for name in _NATIVE_FLOAT},
    **{name: Op(Kind.FLOAT, Gradient.RULE) for name in ("HardSwish", "HardSigmoid", "LayerNormalization")},
}

_UNKNOWN = Op()


def lookup(op_type: str, domain: str = "") -> Op:
    """The row of an operator; operators without a row, or of a foreign domain, stay float and have no gradient."""
    return OPS.get(op_type, _UNKNOWN) if domain in ("", "ai.onnx") else _UNKNOWN


def weight_axis(op_type: str, attributes: Attributes, rank: int) -> int:
    """The output-channel axis of a weight of `rank` dimensions (ONNX operator definitions, opset 21).

    Conv (O, I/g, ...) 0; ConvTranspose (I, O/g, ...) 1; Gemm (K, N) 1, with transB (N, K) 0;
    MatMul (..., K, N) the last.
    """
    if op_type == "Gemm":
        return 0 if attributes.get("transB", 0) else 1
    if op_type == "MatMul":
        return rank - 1
    return 1 if op_type == "ConvTranspose" else 0
