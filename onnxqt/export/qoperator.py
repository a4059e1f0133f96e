"""ONNX's own integer operators in place of QuantizeLinear/DequantizeLinear around float ones.

    Conv                         QLinearConv
    MatMul of two activations    QLinearMatMul
    MatMul, Gemm with a weight   QLinearMatMul; with a bias, which it has no place for, a stack of matrices or opset 21:
                                 MatMulInteger, Add of the INT32 bias, Cast, Mul by s_input s_weight, QuantizeLinear
    with scales at run time      ConvInteger or MatMulInteger, Cast, Mul by the scales, Add of the float bias

Other operators keep their pairs. ConvInteger has UINT8 weights with zero point 128, as ONNX Runtime 1.19 has no kernel
for others. (ONNX QLinearConv, QLinearMatMul, ConvInteger and MatMulInteger, opset 10; ONNX Runtime 1.19 has no kernel
for QLinearMatMul of opset 21.)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from onnxqt.calibrate import Quantizers
from onnxqt.export.qdq import INT4_OPSET, Surgery, clip_codes, storage_of, stored
from onnxqt.numerics import Array, FloatArray, QParams, quantize
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite
from onnxqt.tensors import values_of

_UNSIGNED = 128  # added to INT8 codes that are stored as UINT8


@dataclass(frozen=True, eq=False)
class _Rewrite:
    """A graph whose nodes become integer operators one by one."""

    surgery: Surgery
    quantizers: Quantizers
    nodes: dict[str, gs.Node]

    def weight_codes(self, site: WeightSite, transposed: bool = False) -> Array:
        """The codes of a weight, int32; those of a Gemm with transB the other way round."""
        values = values_of(self.surgery.model.graph.initializers[site.tensor])
        codes = quantize(values, self.quantizers.weights[site.tensor])
        return codes.T if transposed else codes


def use_integer_operators(surgery: Surgery, plan: QuantPlan, quantizers: Quantizers) -> int:
    """Replace what ONNX has integer operators for, in place; returns how many nodes were replaced."""
    rewrite = _Rewrite(surgery, quantizers, {node.name: node for node in surgery.graph.nodes})
    replaced = [node for node in plan.integer_nodes if node.op_type in ("Conv", "Gemm", "MatMul")]
    if quantizers.dynamic:
        weighted = [(node, node.weight) for node in replaced if node.weight is not None]
        for node, site in weighted:
            _at_run_time(rewrite, node, site)
        return len(weighted)
    for node in replaced:
        _replace(rewrite, node)
    return len(replaced)


def _replace(rewrite: _Rewrite, node: IntegerNode) -> None:
    """One node whose scales are known."""
    if node.op_type == "Conv":
        _linear_conv(rewrite, node)
        return
    weight = None if node.weight is None else rewrite.quantizers.weights[node.weight.tensor]
    stacked = node.weight is not None and node.weight.batched and weight is not None and weight.axis is not None
    if node.bias is None and not stacked and rewrite.surgery.target.opset < INT4_OPSET:
        _linear_matmul(rewrite, node)
    else:
        _integer_matmul(rewrite, node)


def _linear_conv(rewrite: _Rewrite, node: IntegerNode) -> None:
    """QLinearConv, whose bias is INT32 at the scale s_input s_weight."""
    conv = rewrite.nodes[node.name]
    data, weight, *bias = (_dequantizer(tensor).inputs for tensor in conv.inputs)
    inputs = [*data, *weight]
    _end_in_codes(rewrite, node, "QLinearConv", inputs, [codes for codes, *_ in bias])


def _linear_matmul(rewrite: _Rewrite, node: IntegerNode) -> None:
    """QLinearMatMul of two activations, or of one and a matrix that has no bias."""
    matmul = rewrite.nodes[node.name]
    data, other = (_dequantizer(tensor).inputs for tensor in matmul.inputs[:2])
    if matmul.attrs.get("transB", 0) and node.weight is not None:
        codes = rewrite.weight_codes(node.weight, transposed=True)
        other = [stored(rewrite.surgery.names.new(f"{node.name}.weight"), codes, TensorProto.INT8), *other[1:]]
    matmul.attrs.clear()
    _end_in_codes(rewrite, node, "QLinearMatMul", [*data, *other], [])


def _end_in_codes(
    rewrite: _Rewrite, node: IntegerNode, op_type: str, inputs: Sequence[gs.Tensor], bias: Sequence[gs.Tensor]
) -> None:
    """Let an operator that requantizes give out the codes that the QuantizeLinear behind a node and its clamps did.

    A clamp of reals before a quantizer is one of codes behind it, as rounding is monotone.
    """
    surgery, first = rewrite.surgery, rewrite.nodes[node.name]
    chain = [first, *(rewrite.nodes[name] for name in node.followers)]
    (quantizer,) = chain[-1].outputs[0].outputs
    codes = quantizer.outputs[0]
    params = rewrite.quantizers.activations[node.output]
    limits = _clamp(chain[1:], params)
    result = codes
    if limits != (params.grid.qmin, params.grid.qmax):
        result = surgery.variable(f"{node.name}.codes")
        kind = TensorProto.INT8 if storage_of(params.grid).signed else TensorProto.UINT8
        quantizer.outputs.clear()
        clip_codes(surgery, node.name, (result, codes), limits, kind)
    operands = [*inputs, *quantizer.inputs[1:], *bias]
    _detach([*chain, quantizer])
    integer = surgery.add(op_type, node.name, operands, [result])
    integer.attrs.update(first.attrs)


def _clamp(followers: Sequence[gs.Node], params: QParams) -> tuple[int, int]:
    """The codes that the activation functions fused behind a node leave."""
    low, high = params.grid.qmin, params.grid.qmax
    for node in followers:
        bounds: list[Array | None] = [np.zeros((), np.float32), None]
        if node.op == "Clip":
            given = [tensor if tensor.name else None for tensor in node.inputs[1:3]]
            bounds = [None if tensor is None else tensor.values for tensor in (*given, None, None)[:2]]
        first, last = (
            None if b is None else int(quantize(np.asarray(b, np.float32).reshape(()), params)) for b in bounds
        )
        low = low if first is None else max(low, first)
        high = high if last is None else max(low, min(high, last))
    return low, high


def _integer_matmul(rewrite: _Rewrite, node: IntegerNode) -> None:
    """MatMulInteger, an INT32 bias, and the real value of the sum; what follows stays as it is."""
    surgery, matmul = rewrite.surgery, rewrite.nodes[node.name]
    data, _, data_zero = _dequantizer(matmul.inputs[0]).inputs
    input_scale = rewrite.quantizers.activations[node.inputs[0]].scale
    acc = surgery.variable(f"{node.name}.accumulator")
    if node.weight is None:
        other, _, other_zero = _dequantizer(matmul.inputs[1]).inputs
        scale = rewrite.quantizers.activations[node.inputs[-1]].scale * input_scale
        surgery.add("MatMulInteger", node.name, [data, other, data_zero, other_zero], [acc])
    else:
        codes = rewrite.weight_codes(node.weight, bool(matmul.attrs.get("transB", 0)))
        constant = stored(surgery.names.new(f"{node.name}.weight"), codes, TensorProto.INT8)
        scale = rewrite.quantizers.weights[node.weight.tensor].scale * input_scale
        surgery.add("MatMulInteger", node.name, [data, constant, data_zero], [acc])
    end = matmul
    if node.bias is not None:
        if node.op_type == "Gemm":
            bias = matmul.inputs[2]
        else:
            end = rewrite.nodes[node.followers[0]]
            bias = next(tensor for tensor in end.inputs if tensor is not matmul.outputs[0])
        summed = surgery.variable(f"{node.name}.sum")
        surgery.add("Add", f"{node.name}.add", [acc, _dequantizer(bias).inputs[0]], [summed])
        acc = summed
    result = end.outputs[0]
    _detach([matmul, end])
    _real(surgery, node.name, (acc, result), surgery.constant(f"{node.name}.scale", np.asarray(scale, np.float32)))


def _at_run_time(rewrite: _Rewrite, node: IntegerNode, site: WeightSite) -> None:
    """ConvInteger or MatMulInteger, and the real value of the sum from the scale found at run time.

    A stack of matrices is multiplied by the two scales one by one: ONNX Runtime 1.19 fuses a product of both into a
    kernel that takes the scales of the first matrix for all.
    """
    surgery, source = rewrite.surgery, rewrite.nodes[node.name]
    data, data_scale, data_zero = _dequantizer(source.inputs[0]).inputs
    weight = rewrite.quantizers.weights[site.tensor]
    is_conv = node.op_type == "Conv"
    codes = rewrite.weight_codes(site, bool(source.attrs.get("transB", 0)))
    kind, shift = (TensorProto.UINT8, _UNSIGNED) if is_conv else (TensorProto.INT8, 0)
    name = surgery.names.new(f"{node.name}.weight")
    operands = [data, stored(name, codes + shift, kind), data_zero]
    if is_conv:
        operands.append(stored(surgery.names.new(f"{node.name}.zero_point"), np.asarray(shift), kind))
    acc = surgery.variable(f"{node.name}.accumulator")
    integer = surgery.add("ConvInteger" if is_conv else "MatMulInteger", node.name, operands, [acc])
    if is_conv:
        integer.attrs.update(source.attrs)
    spread = [1, -1] + [1] * (codes.ndim - 2) if is_conv and weight.axis is not None else list(weight.scale.shape)
    constant = surgery.constant(f"{node.name}.weight_scale", _shaped(weight.scale, spread))
    bias = source.inputs[2] if len(source.inputs) > 2 and source.inputs[2].name else None
    (result,) = source.outputs
    _detach([source])
    real = result if bias is None else surgery.variable(f"{node.name}.product")
    if site.batched and weight.axis is not None:
        per_unit = surgery.variable(f"{node.name}.per_unit")
        _real(surgery, node.name, (acc, per_unit), data_scale)
        surgery.add("Mul", f"{node.name}.scales", [per_unit, constant], [real])
    else:
        scale = surgery.variable(f"{node.name}.scale")
        surgery.add("Mul", f"{node.name}.scales", [data_scale, constant], [scale])
        _real(surgery, node.name, (acc, real), scale)
    if bias is None:
        return
    if is_conv:
        bias = surgery.constant(f"{node.name}.bias", _shaped(bias.values, [1, -1] + [1] * (codes.ndim - 2)))
    surgery.add("Add", f"{node.name}.add", [real, bias], [result])


def _shaped(values: Array, shape: Sequence[int]) -> FloatArray:
    return np.ascontiguousarray(np.asarray(values, np.float32).reshape(shape))


def _real(surgery: Surgery, name: str, ends: tuple[gs.Tensor, gs.Tensor], scale: gs.Tensor) -> None:
    """Accumulators as reals: Cast, then Mul by the scale of one unit."""
    floats = surgery.variable(f"{name}.float")
    cast = surgery.add("Cast", f"{name}.cast", [ends[0]], [floats])
    cast.attrs["to"] = int(TensorProto.FLOAT)
    surgery.add("Mul", f"{name}.rescale", [floats, scale], [ends[1]])


def _dequantizer(tensor: gs.Tensor) -> gs.Node:
    """The DequantizeLinear behind which a tensor stands, perhaps in another shape."""
    (node,) = tensor.inputs
    return _dequantizer(node.inputs[0]) if node.op == "Reshape" else node


def _detach(nodes: Sequence[gs.Node]) -> None:
    """Take nodes out of the graph; what they alone read goes with them when the graph is cleaned up."""
    for node in nodes:
        node.outputs.clear()
        node.inputs.clear()
