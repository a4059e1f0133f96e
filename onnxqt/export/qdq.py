"""One quantized ONNX file per scheme: QuantizeLinear/DequantizeLinear around every integer node.

Weights and biases are stored as integers with a DequantizeLinear behind them; an activation has one pair,
whoever reads it. The pair of a graph output produces the output itself.

Activations of fewer than 8 bits are 8-bit codes with an integer Clip between the pair (the QCDQ form of
Brevitas), not INT4: ONNX Runtime 1.19 drops a Relu in front of an INT4 QuantizeLinear, refuses a Clip there, and
moves INT4 codes into operators that do not take them. The 8-bit form means the same and runs on integer kernels.
The same Clip leaves out the most negative code where a grid is narrow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxqt.calibrate import Quantizers, bias_scale, constant_operand
from onnxqt.errors import ExportError, first_line
from onnxqt.model import Model, Names, editable, finish
from onnxqt.numerics import Array, Grid, QParams, quantize
from onnxqt.opset import convert_opset
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite
from onnxqt.tensors import check_model, values_of

INT4_OPSET = 21  # the first whose QuantizeLinear knows INT4 and UINT4, and INT16 and UINT16
_BIAS_GRID = Grid(32, signed=True)
_STORAGE = {  # of activations: element types by (width, signed)
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}


@dataclass(frozen=True, eq=False)
class _Surgery:
    """A graph under change: the float model, its tensors by their name there, and names for new ones."""

    model: Model
    graph: gs.Graph
    tensors: Mapping[str, gs.Tensor]
    names: Names


def quantized_model(model: Model, plan: QuantPlan, quantizers: Quantizers) -> onnx.ModelProto:
    """The QDQ form of a float model.

    Weights of at most 4 bits are INT4, which takes opset 21, others INT8; odd widths use a narrower range of
    their type. Activations of 16 bits take opset 21 as well. A model that multiplies two activations of 8 bits stays
    below opset 21, with INT8 storage for all weights: ONNX Runtime 1.19 has no integer MatMul kernel for opset 21
    and fails on such a file.
    """
    proto = model.proto
    int4 = any(params.grid.bits <= 4 for params in quantizers.weights.values())
    int16 = any(params.grid.bits > 8 for params in quantizers.activations.values())
    if not int16 and any(_becomes_integer_matmul(node, quantizers) for node in plan.integer_nodes):
        int4 = False
        if model.opset >= INT4_OPSET:
            proto = convert_opset(proto, INT4_OPSET - 1)
    elif (int4 or int16) and model.opset < INT4_OPSET:
        proto = convert_opset(proto, INT4_OPSET)
    graph = editable(proto)
    surgery = _Surgery(model, graph, graph.tensors(), Names(graph))
    for node in plan.integer_nodes:
        _quantize_bias(surgery, node, quantizers)
        _quantize_constant(surgery, node, quantizers)
    for weight in plan.weights:
        _quantize_weight(surgery, weight, quantizers.weights[weight.tensor], int4)
    for site in plan.activations:
        _quantize_activation(surgery, site.tensor, quantizers.activations[site.tensor])
    graph.cleanup().toposort()
    quantized = finish(graph)
    quantized.metadata_props.extend(model.proto.metadata_props)
    try:
        check_model(quantized)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the quantized graph is not valid ONNX: {first_line(error)}") from error
    return quantized


def _becomes_integer_matmul(node: IntegerNode, quantizers: Quantizers) -> bool:
    """Whether ONNX Runtime fuses a node into QLinearMatMul: MatMul without 4-bit weights."""
    if node.op_type != "MatMul":
        return False
    return node.weight is None or quantizers.weights[node.weight.tensor].grid.bits > 4


def _quantize_activation(surgery: _Surgery, name: str, params: QParams) -> None:
    graph, names, source = surgery.graph, surgery.names, surgery.tensors[name]
    result = gs.Variable(names.new(f"{name}.dequantized"), np.float32, source.shape)
    _redirect(list(source.outputs), source, result)
    if any(source is output for output in graph.outputs):
        # The user's name belongs to what the user sees: the dequantized values.
        graph.outputs = [result if output is source else output for output in graph.outputs]
        source.name, result.name = names.new(f"{name}.float"), name
    scale = gs.Constant(names.new(f"{name}.scale"), np.asarray(params.scale, np.float32))
    storage = _storage(params.grid)
    kind = _STORAGE[storage.bits, storage.signed]
    zero_point = _stored(names.new(f"{name}.zero_point"), params.zero_point, kind)
    wide = gs.Variable(names.new(f"{name}.codes"))
    graph.nodes.append(
        gs.Node("QuantizeLinear", f"{name}.quantize", inputs=[source, scale, zero_point], outputs=[wide])
    )
    codes = wide if params.grid == storage else gs.Variable(names.new(f"{name}.clipped_codes"))
    if codes is not wide:
        bounds = [
            _stored(names.new(f"{name}.{bound}"), np.array(value), kind)
            for bound, value in (("qmin", params.grid.qmin), ("qmax", params.grid.qmax))
        ]
        graph.nodes.append(gs.Node("Clip", f"{name}.clip", inputs=[wide, *bounds], outputs=[codes]))
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}.dequantize", inputs=[codes, scale, zero_point], outputs=[result])
    )


def _storage(grid: Grid) -> Grid:
    """The whole of the element type that holds codes of an activation."""
    return Grid(8 if grid.bits <= 8 else 16, grid.signed)


def _quantize_constant(surgery: _Surgery, node: IntegerNode, quantizers: Quantizers) -> None:
    """A constant operand as codes, for one node alone; a Div becomes a Mul by the reciprocal."""
    if node.constant is None:
        return
    constant, params = surgery.tensors[node.constant], quantizers.constants[node.name]
    reader = next(n for n in constant.outputs if n.name == node.name)
    reader.op = "Mul" if reader.op == "Div" else reader.op
    storage = _storage(params.grid)
    codes = quantize(constant_operand(surgery.model, node), params)
    kind = _STORAGE[storage.bits, storage.signed]
    _redirect([reader], constant, _dequantized(surgery, f"{node.name}.constant", codes, params, kind))


def _quantize_weight(surgery: _Surgery, site: WeightSite, params: QParams, int4: bool) -> None:
    weight = surgery.tensors[site.tensor]
    readers = list(weight.outputs)
    kind = TensorProto.INT4 if int4 and params.grid.bits <= 4 else TensorProto.INT8
    codes = quantize(values_of(surgery.model.graph.initializers[site.tensor]), params)
    if site.batched and params.axis is not None:
        rows = replace(params, axis=1)
        matrix = _dequantized(surgery, site.tensor, codes.reshape(-1, codes.shape[-1]), rows, kind)
        _redirect(readers, weight, _stacked(surgery, site.tensor, matrix, codes.shape))
    else:
        _redirect(readers, weight, _dequantized(surgery, site.tensor, codes, params, kind))


def _stacked(surgery: _Surgery, name: str, matrix: gs.Variable, shape: tuple[int, ...]) -> gs.Variable:
    """A stack of matrices from one matrix of all their rows.

    Per channel, a stack is stored as that matrix: ONNX Runtime 1.19 fuses a MatMul right behind the
    DequantizeLinear of a stack into kernels that fail on scales per channel.
    """
    names = surgery.names
    target = gs.Constant(names.new(f"{name}.shape"), np.array(shape, np.int64))
    stack = gs.Variable(names.new(f"{name}.stack"), np.float32, shape)
    surgery.graph.nodes.append(gs.Node("Reshape", f"{name}.reshape", inputs=[matrix, target], outputs=[stack]))
    return stack


def _quantize_bias(surgery: _Surgery, node: IntegerNode, quantizers: Quantizers) -> None:
    """INT32 bias with scale `s_input * s_weight` and zero point 0; each user of a shared bias has its own."""
    if node.weight is None or node.bias is None:
        return
    bias, weight = surgery.tensors[node.bias], surgery.tensors[node.weight.tensor]
    names = {node.name, *node.followers}
    reader = next(n for n in bias.outputs if n.name in names)
    values = bias.values.reshape(-1)
    if values.size == 1:  # a Gemm takes one value for all its channels
        values = np.repeat(values, weight.shape[node.weight.axis])
    input_scale = quantizers.activations[node.inputs[0]].scale
    scale = bias_scale(quantizers.weights[node.weight.tensor], input_scale, values.size)
    params = QParams(scale, np.zeros(scale.shape, np.int32), _BIAS_GRID, 0 if scale.ndim else None)
    codes = quantize(values, params)
    _redirect([reader], bias, _dequantized(surgery, f"{node.name}.bias", codes, params, TensorProto.INT32))


def _dequantized(surgery: _Surgery, name: str, codes: Array, params: QParams, kind: int) -> gs.Variable:
    """Add codes stored as element type `kind` with a DequantizeLinear; returns its output."""
    names = surgery.names
    scale = gs.Constant(names.new(f"{name}.scale"), np.asarray(params.scale, np.float32))
    stored = _stored(names.new(f"{name}.codes"), codes, kind)
    zero_point = _stored(names.new(f"{name}.zero_point"), params.zero_point, kind)
    result = gs.Variable(names.new(f"{name}.dequantized"), np.float32, codes.shape)
    attributes = {} if params.axis is None else {"axis": params.axis}
    surgery.graph.nodes.append(
        gs.Node(
            "DequantizeLinear",
            f"{name}.dequantize",
            attributes,
            inputs=[stored, scale, zero_point],
            outputs=[result],
        )
    )
    return result


def _stored(name: str, codes: Array, kind: int) -> gs.Constant:
    """Codes in an element type. LazyValues because graphsurgeon would unpack 4-bit arrays."""
    if kind == TensorProto.INT4:
        nibbles = np.pad(codes.ravel(), (0, codes.size % 2)).astype(np.uint8) & 0x0F
        packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()  # the low nibble first
        return gs.Constant(name, LazyValues(helper.make_tensor(name, kind, codes.shape, packed, raw=True)))
    array = np.array(codes, helper.tensor_dtype_to_np_dtype(kind), order="C")
    return gs.Constant(name, LazyValues(numpy_helper.from_array(array, name)))


def _redirect(readers: Sequence[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    for node in readers:
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
