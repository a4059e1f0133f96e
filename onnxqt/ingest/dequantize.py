"""Quantized models: which are refused, and the pass that recovers the float model from pairs of quantizers."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqt.errors import ModelError
from onnxqt.model import nodes_of
from onnxqt.numerics import Array

_DOMAINS = ("", "ai.onnx", "com.microsoft")
_PAIR = ("QuantizeLinear", "DequantizeLinear")
_INTEGER = (
    *("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "ConvTransposeInteger", "MulInteger", "ReduceSumInteger"),
    *("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QGemm"),
    *("QEmbedLayerNormalization", "QOrderedMatMul", "QOrderedAttention", "QOrderedGelu", "QOrderedLayerNormalization"),
)


def check_quantized(proto: onnx.ModelProto, strip_qdq: bool) -> None:
    """Refuse a quantized model from which the float model is not, or shall not be, recovered.

    Raises:
        ModelError: naming the first quantized operator.
    """
    for node in nodes_of(proto.graph):
        if node.domain not in _DOMAINS:
            continue
        label = f"{node.op_type} '{node.name or node.output[0]}'"
        if node.op_type in _INTEGER or node.op_type.startswith("QLinear"):
            raise ModelError(
                f"{label} computes with integers, from which no float model can be recovered: give the float model"
            )
        if node.op_type in _PAIR and not strip_qdq:
            raise ModelError(
                f"{label} shows that the model is already quantized: give the float model instead, or take the "
                "quantizers out with --strip-qdq"
            )


def remove_qdq(graph: gs.Graph) -> list[str]:
    """QuantizeLinear and DequantizeLinear that follow each other become nothing, quantized constants real ones.

    real = (code - zero_point) scale   (ONNX DequantizeLinear-21)

    A Clip of the codes between the two, by which a narrower grid is written, goes too.
    """
    removed, constants = 0, 0
    for part in (graph, *graph.subgraphs(recursive=True)):
        for node in part.nodes:
            if node.op != "DequantizeLinear" or (node.domain or "") not in _DOMAINS:
                continue
            codes, *parameters = node.inputs
            if isinstance(codes, gs.Constant):
                if all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in parameters):
                    value = _real(codes, parameters, node)
                    result, node.outputs = node.outputs[0], []
                    result.to_constant(value)
                    constants += 1
                continue
            quantize = _quantizer(codes)
            if quantize is not None:
                node.op, node.domain, node.attrs, node.inputs = "Identity", None, {}, [quantize.inputs[0]]
                removed += 1
    graph.cleanup().toposort()
    told = [f"removed {removed} pair(s) of QuantizeLinear and DequantizeLinear"] if removed else []
    return told + ([f"wrote {constants} quantized constant(s) as real numbers"] if constants else [])


def kept_quantizers(proto: onnx.ModelProto) -> list[str]:
    """What is left to say of quantizers at the ends of a model, whose inputs or outputs are codes.

    Raises:
        ModelError: naming a quantizer that stands elsewhere and could not be removed.
    """
    inputs = {value.name for value in proto.graph.input}
    outputs = {value.name for value in proto.graph.output}
    changes = []
    for node in nodes_of(proto.graph):
        if node.op_type not in _PAIR or node.domain not in _DOMAINS:
            continue
        label = f"{node.op_type} '{node.name}'"
        if node.op_type == "DequantizeLinear" and node.input[0] in inputs:
            changes.append(f"kept {label}: input '{node.input[0]}' of the model is quantized")
        elif node.op_type == "QuantizeLinear" and node.output[0] in outputs:
            changes.append(f"kept {label}: output '{node.output[0]}' of the model is quantized")
        else:
            raise ModelError(
                f"{label} is not one of a pair: what stands between it and its counterpart computes with integers, "
                "so the float model cannot be recovered; give the float model"
            )
    return changes


def _quantizer(codes: gs.Tensor) -> gs.Node | None:
    """The QuantizeLinear that gives out these codes, be it through a Clip."""
    node = codes.inputs[0] if codes.inputs else None
    if node is not None and node.op == "Clip":
        node = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
    return node if node is not None and node.op == "QuantizeLinear" and (node.domain or "") in _DOMAINS else None


def _real(codes: gs.Constant, parameters: list[gs.Tensor], node: gs.Node) -> Array:
    """The real values of a quantized constant, per tensor, per axis or per block, in ONNX Runtime's precision."""
    scale = parameters[0].values.astype(np.float32)
    shape, axis = codes.shape, node.attrs.get("axis", 1)
    value = codes.values
    whole = np.issubdtype(value.dtype, np.integer) or "int" in value.dtype.name
    value = value.astype(np.int64 if whole else np.float32)
    if len(parameters) > 1 and not parameters[1].is_empty():
        zero_point = parameters[1].values.astype(value.dtype)
        value = value - _along(zero_point, shape, axis, node.attrs.get("block_size", 0))
    real: Array = value.astype(np.float32) * _along(scale, shape, axis, node.attrs.get("block_size", 0))
    return real


def _along(parameter: Array, shape: list[int], axis: int, block: int) -> Array:
    """A scale or zero point in a form that is broadcast to the shape of the codes."""
    if parameter.size == 1:
        return parameter.reshape(())
    if block:
        return np.repeat(parameter, block, axis).take(range(shape[axis]), axis)
    return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
