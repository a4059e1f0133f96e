"""The op table: one row per operator, with everything the stages need to know about it.

Every operator of ONNX up to opset 21 has a row. What is listed nowhere below has `Kind.FLOAT`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Attributes = Mapping[str, Any]


class Kind(str, Enum):
    """How an operator takes part in an integer network."""

    WEIGHTED = "weighted"  # multiplies by a weight: quantized wherever it stands
    ARITHMETIC = "arithmetic"  # of two operands, each on its own grid, like the output
    CONCAT = "concat"  # its inputs and output share one grid
    AVERAGE = "average"  # output on a grid of its own
    FUNCTION = "function"  # of one activation; output on a grid of its own
    SAME_GRID = "same grid"  # only selects or moves codes: output on the input's grid
    CLAMP = "clamp"  # Relu and Clip: fused into the operator before, else on a grid of their own
    FLOAT = "float"  # has no integer form here


class Gradient(str, Enum):
    """Where the gradient of an operator comes from."""

    NATIVE = "native"  # onnxruntime-training has it
    RULE = "rule"  # onnxqt.trim.gradients has it, at least for the cases that onnxruntime-training has not
    NOT_NEEDED = "not needed"  # it reads or gives out no floats, so nothing that is trained lies behind it
    STOPPED = "stopped"  # none: what lies before it is not trained through it


@dataclass(frozen=True, slots=True)
class Op:
    """One row of the table.

    Attributes:
        kind: how it takes part in an integer network.
        gradient: where its gradient comes from.
        reason: why gradients stop; completes "no gradient passes it because it ...".
    """

    kind: Kind = Kind.FLOAT
    gradient: Gradient = Gradient.STOPPED
    reason: str = ""


# Functions of single values: a chain of them that begins and ends in one tensor is an activation function.
ELEMENTWISE = frozenset(
    (
        *("Abs", "Celu", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log"),
        *("Mish", "Mul", "Neg", "Pow", "Reciprocal", "Selu", "Sigmoid", "Sin", "Softplus", "Softsign", "Sqrt", "Sub"),
        *("Tanh", "ThresholdedRelu"),
    )
)

_KINDS = {
    Kind.WEIGHTED: "Conv ConvTranspose Gemm MatMul",
    Kind.ARITHMETIC: "Add Div Mul Sub",
    Kind.CONCAT: "Concat",
    Kind.AVERAGE: "AveragePool GlobalAveragePool ReduceMean",
    Kind.SAME_GRID: (
        "DepthToSpace Expand Flatten Gather GatherElements GatherND Identity MaxPool Pad Reshape Resize Slice "
        "SpaceToDepth Split Squeeze Tile Transpose Unsqueeze"
    ),
    Kind.CLAMP: "Clip Relu",
    Kind.FUNCTION: (
        "Celu Elu Erf Exp Gelu HardSigmoid HardSwish LayerNormalization LeakyRelu Mish PRelu Selu Sigmoid Softmax "
        "Softplus Softsign Sqrt Tanh ThresholdedRelu"
    ),
}

# Whose results are never negative.
NON_NEGATIVE = frozenset(("Abs", "Exp", "HardSigmoid", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt"))

# What onnxqt's own schemes make integer.
DEFAULT_OPERATORS = frozenset(
    (
        *("Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "GlobalAveragePool"),
        *("Identity", "MatMul", "MaxPool", "Pad", "ReduceMean", "Relu", "Reshape", "Slice", "Squeeze", "Transpose"),
        "Unsqueeze",
    )
)

# What every back end runs, as it only selects or moves codes.
MOVES = frozenset(_KINDS[Kind.SAME_GRID].split()) - {"Resize"}

_GRADIENTS = {
    Gradient.NATIVE: (
        "Abs Add Cast Concat Div Erf Exp Expand Flatten Gather Gemm GlobalAveragePool Identity LeakyRelu Log "
        "LogSoftmax Mul Neg ReduceMean ReduceSum Relu Reshape Sigmoid Softmax Split Sqrt Squeeze Sub Tanh Tile "
        "Transpose Unsqueeze"
    ),
    Gradient.RULE: (
        # elementwise
        "Acos Acosh Asin Asinh Atan Atanh CastLike Celu Clip Cos Cosh Dropout Elu Gelu HardSigmoid HardSwish Max Mean "
        "Min Mish Mod PRelu Pow Reciprocal Selu Shrink Sin Sinh Softplus Softsign Sum Tan ThresholdedRelu Where "
        # reductions
        "GlobalLpPool GlobalMaxPool ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMin ReduceProd "
        "ReduceSumSquare "
        # normalization
        "BatchNormalization GroupNormalization InstanceNormalization LayerNormalization LpNormalization "
        "MeanVarianceNormalization "
        # windows
        "AveragePool Conv ConvTranspose LRN LpPool MaxPool MaxUnpool "
        # indexing
        "AffineGrid CenterCropPad Col2Im Compress CumSum DepthToSpace GatherElements GatherND GridSample Pad Resize "
        "ReverseSequence ScatterElements ScatterND Slice SpaceToDepth TopK Trilu "
        # matrices
        "Det Einsum MatMul"
    ),
    Gradient.NOT_NEEDED: (
        "And ArgMax ArgMin BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor BlackmanWindow Constant "
        "ConstantOfShape ConvInteger Equal Greater GreaterOrEqual HammingWindow HannWindow ImageDecoder IsInf IsNaN "
        "Less LessOrEqual MatMulInteger Multinomial NonMaxSuppression NonZero Not OptionalHasElement Or QLinearConv "
        "QLinearMatMul QuantizeLinear RandomNormal RandomUniform RegexFullMatch SequenceEmpty SequenceLength Shape "
        "Size StringConcat StringNormalizer StringSplit TfIdfVectorizer Xor"
    ),
}

_STOPPED = {  # completes "because it ..."
    "has a derivative of zero everywhere": "Ceil Floor Hardmax Round Sign",
    "draws random numbers": "Bernoulli RandomNormalLike RandomUniformLike",
    "reads only the shape of its input": "EyeLike",
    "takes its values from a few settings": "MelWeightMatrix OneHot Range",
    "runs a subgraph": "If Loop Scan SequenceMap",
    "has a state that no rule covers": "GRU LSTM RNN",
    "works on a sequence or an optional value": (
        "ConcatFromSequence Optional OptionalGetElement SequenceAt SequenceConstruct SequenceErase SequenceInsert "
        "SplitToSequence"
    ),
    "works on quantized values": "DequantizeLinear DynamicQuantizeLinear",
    "is a loss of its own": "NegativeLogLikelihoodLoss SoftmaxCrossEntropyLoss",
    "has no gradient rule": "DFT DeformConv MaxRoiPool RoiAlign STFT Unique",
}


def _table() -> dict[str, Op]:
    kinds = {name: kind for kind, names in _KINDS.items() for name in names.split()}
    found = [(name, gradient, "") for gradient, names in _GRADIENTS.items() for name in names.split()]
    stopped = [(name, Gradient.STOPPED, reason) for reason, names in _STOPPED.items() for name in names.split()]
    return {
        name: Op(kinds.get(name, Kind.FLOAT), gradient, reason) for name, gradient, reason in sorted(found + stopped)
    }


OPS: Mapping[str, Op] = _table()


def lookup(op_type: str, domain: str = "") -> Op:
    """The row of an operator; one without a row, or of a foreign domain, stays float and stops gradients."""
    if domain not in ("", "ai.onnx"):
        return Op(reason=f"is an operator of the domain '{domain}'")
    return OPS.get(op_type) or Op(reason="is no operator of ONNX up to opset 21")


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
