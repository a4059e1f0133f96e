"""The quantized form of a float model: which operator set it takes, and in which form it is written."""

import onnx

from onnxqt.calibrate import Quantizers
from onnxqt.errors import ExportError
from onnxqt.export.qdq import (
    CHANNEL_OPSET,
    FORMS,
    INT4_OPSET,
    Form,
    Target,
    becomes_integer_matmul,
    quantize_graph,
    written,
)
from onnxqt.export.qoperator import use_integer_operators
from onnxqt.model import Model
from onnxqt.numerics import QParams
from onnxqt.plan import QuantPlan
from onnxqt.runtime import MAX_OPSET


def quantized_model(
    model: Model, plan: QuantPlan, quantizers: Quantizers, form: Form = "qdq", opset: int | None = None
) -> onnx.ModelProto:
    """The quantized form of a float model.

    Weights of at most 4 bits are INT4 or UINT4, which takes opset 21, others INT8 or UINT8; odd widths use a narrower
    range of their type. Blocks and activations of 16 bits take opset 21 as well. A model that multiplies two
    activations of 8 bits stays below opset 21, with INT8 storage for all weights: ONNX Runtime 1.19 has no integer
    MatMul kernel for opset 21. Its metadata say how the file was made.

    Args:
        model: the float model.
        plan: where its quantizers go.
        quantizers: their parameters; what has none stays float.
        form: "qdq" has QuantizeLinear/DequantizeLinear around float operators; "qoperator" has QLinearConv,
            QLinearMatMul, ConvInteger and MatMulInteger, and QuantizeLinear/DequantizeLinear around the operators that
            have no such form. Its weights are stored in 8 bits.
        opset: version of the default operator set; by default that of the model, or the least above it that the
            parameters take. Below 21, weights of at most 4 bits are stored in 8.

    Raises:
        ExportError: if the form or the operator set cannot say what the parameters say.
        ModelError: if the model has an operator that the operator set lacks.
    """
    target = _target(model, plan, quantizers, form, opset)
    surgery = quantize_graph(model, plan, quantizers, target)
    if form == "qoperator" and not use_integer_operators(surgery, plan, quantizers):
        raise ExportError(
            "no node of the model has an integer operator of ONNX (Conv, Gemm and MatMul have): write the form qdq"
        )
    return written(surgery, quantizers)


def lowest_opset(quantizers: Quantizers) -> int:
    """The least version of the default operator set in which a file can say these parameters: 13 or 21."""
    return CHANNEL_OPSET if _newest_feature(quantizers) is None else INT4_OPSET


def _newest_feature(quantizers: Quantizers) -> str | None:
    """What takes opset 21 in any storage; None where nothing does."""
    if any(params.block_size is not None for params in quantizers.weights.values()):
        return "blocks of weights"
    if any(params.grid.bits > 8 for params in quantizers.activations.values()):
        return "activations of 16 bits"
    return None


def _target(model: Model, plan: QuantPlan, quantizers: Quantizers, form: Form, opset: int | None) -> Target:
    """What the file is to be.

    Raises:
        ExportError: if it cannot be.
    """
    feature = _newest_feature(quantizers)
    if form not in FORMS:
        raise ExportError(f"unknown form '{form}': expected one of {', '.join(FORMS)}")
    if form == "qoperator" and feature is not None:
        raise ExportError(f"ONNX has no integer operator for {feature}: write the form qdq")
    if form == "qoperator" and not (quantizers.activations or quantizers.dynamic):
        raise ExportError("integer operators take quantized activations, and these stay float: write the form qdq")
    if form == "qoperator" and not all(_is_symmetric(params) for params in quantizers.weights.values()):
        raise ExportError("integer operators are written with signed weights of zero point 0: write the form qdq")
    if opset is not None:
        _check_opset(opset, feature)
        return Target(form, opset, form == "qdq" and opset >= INT4_OPSET)
    if feature is None and any(becomes_integer_matmul(node, quantizers) for node in plan.integer_nodes):
        return Target(form, min(model.opset, INT4_OPSET - 1), int4=False)
    if form == "qoperator":
        return Target(form, model.opset, int4=False)
    int4 = any(params.grid.bits <= 4 for params in quantizers.weights.values())
    needed = INT4_OPSET if int4 or feature is not None else model.opset
    return Target(form, max(model.opset, needed), int4)


def _is_symmetric(params: QParams) -> bool:
    """Whether codes are signed and zero is the middle of them."""
    return params.grid.signed and not params.zero_point.any()


def _check_opset(opset: int, feature: str | None) -> None:
    """Refuse a version of the operator set that a file cannot have."""
    if not CHANNEL_OPSET <= opset <= MAX_OPSET:
        raise ExportError(
            f"opset {opset} is not one of quantized files: choose one from {CHANNEL_OPSET} to {MAX_OPSET}"
        )
    if feature is not None and opset < INT4_OPSET:
        raise ExportError(f"opset {opset} cannot say {feature}: choose opset {INT4_OPSET}, or another scheme")
