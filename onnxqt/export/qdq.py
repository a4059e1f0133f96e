"""One quantized ONNX file per scheme: QuantizeLinear/DequantizeLinear around every integer node.

Weights and biases are stored as integers with a DequantizeLinear behind them; an activation has one pair,
whoever reads it. The pair of a graph output produces the output itself. What has no parameters stays float: all
activations and biases where only weights are quantized. Scales at run time come from a DynamicQuantizeLinear before
each activation that a weight multiplies.

Activations of fewer than 8 bits are 8-bit codes with an integer Clip between the pair (the QCDQ form of
Brevitas), not INT4: ONNX Runtime 1.19 drops a Relu in front of an INT4 QuantizeLinear, refuses a Clip there, and
moves INT4 codes into operators that do not take them. The 8-bit form means the same and runs on integer kernels.
The same Clip leaves out the most negative code where a grid is narrow.

A MatMul by a weight of 4 bits in blocks needs no operator of its own: ONNX Runtime, from 1.19 on, makes its
MatMulNBits of it and the DequantizeLinear before it, where activations are float.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxqt import __version__
from onnxqt.calibrate import Quantizers, bias_scale, constant_operand, has_integer_bias
from onnxqt.errors import ExportError, first_line
from onnxqt.model import Model, Names, editable, finish
from onnxqt.numerics import Array, Grid, QParams, quantize
from onnxqt.opset import convert_opset
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite
from onnxqt.tensors import check_model, values_of

Form = Literal["qdq", "qoperator"]
FORMS: tuple[Form, ...] = ("qdq", "qoperator")

CHANNEL_OPSET = 13  # the first whose DequantizeLinear has scales per channel
INT4_OPSET = 21  # the first whose QuantizeLinear knows INT4 and UINT4, INT16 and UINT16, and blocks
METADATA = "onnxqt."  # what the keys of a file's metadata begin with
_BIAS_GRID = Grid(32, signed=True)
_STORAGE = {  # element types by (width, signed)
    (4, True): TensorProto.INT4,
    (4, False): TensorProto.UINT4,
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}
_PACKED = (TensorProto.INT4, TensorProto.UINT4)


@dataclass(frozen=True, slots=True)
class Target:
    """What a file is to be.

    Attributes:
        form: QuantizeLinear/DequantizeLinear around float operators, or ONNX's integer operators.
        opset: version of the default operator set.
        int4: whether weights of at most 4 bits are stored as INT4 or UINT4, else as INT8 or UINT8.
    """

    form: Form
    opset: int
    int4: bool


@dataclass(frozen=True, eq=False)
class Surgery:
    """A graph under change: the float model, its tensors by their name there, and names for new ones."""

    model: Model
    graph: gs.Graph
    tensors: Mapping[str, gs.Tensor]
    names: Names
    target: Target

    def constant(self, name: str, values: Array) -> gs.Constant:
        """A new constant."""
        return gs.Constant(self.names.new(name), values)

    def variable(self, name: str) -> gs.Variable:
        """A new value, of a type that shape inference finds."""
        return gs.Variable(self.names.new(name))

    def add(self, op_type: str, name: str, inputs: Sequence[gs.Tensor], outputs: Sequence[gs.Tensor]) -> gs.Node:
        """A new node."""
        node = gs.Node(op_type, name, {}, inputs=list(inputs), outputs=list(outputs))
        self.graph.nodes.append(node)
        return node


def quantize_graph(model: Model, plan: QuantPlan, quantizers: Quantizers, target: Target) -> Surgery:
    """The graph of a float model with QuantizeLinear/DequantizeLinear where a plan has them."""
    proto = model.proto if target.opset == model.opset else convert_opset(model.proto, target.opset)
    graph = editable(proto)
    surgery = Surgery(model, graph, graph.tensors(), Names(graph), target)
    for node in plan.integer_nodes:
        _quantize_bias(surgery, node, quantizers)
        _quantize_constant(surgery, node, quantizers)
    for weight in plan.weights:
        _quantize_weight(surgery, weight, quantizers)
    if quantizers.dynamic:
        _quantize_at_run_time(surgery, plan)
    for site in plan.activations:
        if site.tensor in quantizers.activations:
            _quantize_activation(surgery, site.tensor, quantizers.activations[site.tensor])
    if target.form == "qdq" and target.opset >= INT4_OPSET:
        for node in plan.integer_nodes:
            if becomes_integer_matmul(node, quantizers):
                _keep_from_quantizer(surgery, node)
    return surgery


def written(surgery: Surgery, quantizers: Quantizers) -> onnx.ModelProto:
    """The model of a graph that was changed, checked, with metadata that say how it was made.

    Raises:
        ExportError: if it is not valid ONNX.
    """
    surgery.graph.cleanup().toposort()
    quantized = finish(surgery.graph)
    own = _metadata(surgery, quantizers)
    kept = [entry for entry in surgery.model.proto.metadata_props if entry.key not in own]
    quantized.metadata_props.extend(kept)
    for key, value in own.items():
        quantized.metadata_props.add(key=key, value=value)
    try:
        check_model(quantized)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the quantized graph is not valid ONNX: {first_line(error)}") from error
    return quantized


def _metadata(surgery: Surgery, quantizers: Quantizers) -> dict[str, str]:
    """How a file was made; what is not known is left out."""
    unblocked = json.dumps(quantizers.unblocked, sort_keys=True) if quantizers.unblocked else ""
    values = {
        "version": __version__,
        "source_sha256": surgery.model.sha256,
        "scheme": quantizers.scheme,
        "form": surgery.target.form,
        "ranges": quantizers.ranges,
        "per_channel": unblocked,
    }
    return {METADATA + key: value for key, value in values.items() if value}


def becomes_integer_matmul(node: IntegerNode, quantizers: Quantizers) -> bool:
    """Whether ONNX Runtime fuses a node into QLinearMatMul: a MatMul of 8-bit codes, none in INT4 or blocks."""
    tensors = (*node.inputs, node.output)
    found = [quantizers.activations.get(tensor) for tensor in tensors]
    if node.op_type != "MatMul" or any(params is None or params.grid.bits > 8 for params in found):
        return False
    if node.weight is None:
        return True
    weight = quantizers.weights[node.weight.tensor]
    return weight.grid.bits > 4 and weight.block_size is None


def _keep_from_quantizer(surgery: Surgery, node: IntegerNode) -> None:
    """Put a Sum of one value, which changes nothing, behind a MatMul.

    ONNX Runtime 1.19 has no QLinearMatMul for opset 21 and refuses a file in which it would fuse one.
    """
    matmul = next(n for n in surgery.graph.nodes if n.name == node.name)
    (product,) = matmul.outputs
    result = gs.Variable(surgery.names.new(f"{node.name}.product"), np.float32, product.shape)
    matmul.outputs = [result]
    surgery.add("Sum", f"{node.name}.sum", [result], [product])


def _quantize_activation(surgery: Surgery, name: str, params: QParams) -> None:
    graph, names, source = surgery.graph, surgery.names, surgery.tensors[name]
    result = gs.Variable(names.new(f"{name}.dequantized"), np.float32, source.shape)
    redirect(list(source.outputs), source, result)
    if any(source is output for output in graph.outputs):
        # The user's name belongs to what the user sees: the dequantized values.
        graph.outputs = [result if output is source else output for output in graph.outputs]
        source.name, result.name = names.new(f"{name}.float"), name
    scale = gs.Constant(names.new(f"{name}.scale"), np.asarray(params.scale, np.float32))
    storage = storage_of(params.grid)
    kind = _STORAGE[storage.bits, storage.signed]
    zero_point = stored(names.new(f"{name}.zero_point"), params.zero_point, kind)
    wide = gs.Variable(names.new(f"{name}.codes"))
    graph.nodes.append(
        gs.Node("QuantizeLinear", f"{name}.quantize", inputs=[source, scale, zero_point], outputs=[wide])
    )
    codes = wide if params.grid == storage else gs.Variable(names.new(f"{name}.clipped_codes"))
    if codes is not wide:
        clip_codes(surgery, name, (wide, codes), (params.grid.qmin, params.grid.qmax), kind)
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}.dequantize", inputs=[codes, scale, zero_point], outputs=[result])
    )


def clip_codes(
    surgery: Surgery, name: str, ends: tuple[gs.Tensor, gs.Tensor], limits: tuple[int, int], kind: int
) -> None:
    """Add a Clip of codes of an element type between two values."""
    bounds = [
        stored(surgery.names.new(f"{name}.{bound}"), np.array(value), kind)
        for bound, value in zip(("qmin", "qmax"), limits, strict=True)
    ]
    surgery.add("Clip", f"{name}.clip", [ends[0], *bounds], [ends[1]])


def storage_of(grid: Grid) -> Grid:
    """The whole of the element type that holds codes of an activation."""
    return Grid(8 if grid.bits <= 8 else 16, grid.signed)


def _quantize_at_run_time(surgery: Surgery, plan: QuantPlan) -> None:
    """Put DynamicQuantizeLinear and DequantizeLinear before the activations that weights multiply.

    (ONNX DynamicQuantizeLinear, opset 11: UINT8, the scale from the least and the largest value of the tensor.)
    """
    readers: dict[str, list[str]] = {}
    for node in plan.integer_nodes:
        if node.weight is not None:
            readers.setdefault(node.inputs[0], []).append(node.name)
    by_name = {node.name: node for node in surgery.graph.nodes}
    for name, nodes in readers.items():
        source = surgery.tensors[name]
        codes, scale, zero_point = (surgery.variable(f"{name}.{part}") for part in ("codes", "scale", "zero_point"))
        result = gs.Variable(surgery.names.new(f"{name}.dequantized"), np.float32, source.shape)
        redirect([by_name[node] for node in nodes], source, result)
        surgery.add("DynamicQuantizeLinear", f"{name}.quantize", [source], [codes, scale, zero_point])
        surgery.add("DequantizeLinear", f"{name}.dequantize", [codes, scale, zero_point], [result])


def _quantize_constant(surgery: Surgery, node: IntegerNode, quantizers: Quantizers) -> None:
    """A constant operand as codes, for one node alone; a Div becomes a Mul by the reciprocal."""
    if node.constant is None or node.name not in quantizers.constants:
        return
    constant, params = surgery.tensors[node.constant], quantizers.constants[node.name]
    reader = next(n for n in constant.outputs if n.name == node.name)
    reader.op = "Mul" if reader.op == "Div" else reader.op
    storage = storage_of(params.grid)
    codes = quantize(constant_operand(surgery.model, node), params)
    kind = _STORAGE[storage.bits, storage.signed]
    redirect([reader], constant, _dequantized(surgery, f"{node.name}.constant", codes, params, kind))


def _quantize_weight(surgery: Surgery, site: WeightSite, quantizers: Quantizers) -> None:
    weight, params = surgery.tensors[site.tensor], quantizers.weights[site.tensor]
    readers = list(weight.outputs)
    bits = 4 if surgery.target.int4 and params.grid.bits <= 4 else 8
    kind = _STORAGE[bits, params.grid.signed]
    codes = quantize(values_of(surgery.model.graph.initializers[site.tensor]), params)
    if site.batched and params.axis is not None and params.block_size is None:
        rows = replace(params, axis=1)
        matrix = _dequantized(surgery, site.tensor, codes.reshape(-1, codes.shape[-1]), rows, kind)
        redirect(readers, weight, _reshaped(surgery, site.tensor, matrix, codes.shape))
        return
    result = _dequantized(surgery, site.tensor, codes, params, kind)
    if params.block_size is not None and bits > 4 and (quantizers.activations or quantizers.dynamic):
        result = _reshaped(surgery, site.tensor, result, codes.shape)
    redirect(readers, weight, result)


def _reshaped(surgery: Surgery, name: str, matrix: gs.Variable, shape: tuple[int, ...]) -> gs.Variable:
    """A weight in its own shape, through a Reshape that keeps its DequantizeLinear from the node that reads it.

    Per channel, a stack of matrices is stored as one matrix of all their rows. ONNX Runtime 1.19 fuses a MatMul right
    behind the DequantizeLinear of a stack into kernels that fail on scales per channel; and every product right
    behind an 8-bit weight with blocks into kernels that fail on those, as far as 1.32 for Conv.
    """
    names = surgery.names
    target = gs.Constant(names.new(f"{name}.shape"), np.array(shape, np.int64))
    result = gs.Variable(names.new(f"{name}.stack"), np.float32, shape)
    surgery.graph.nodes.append(gs.Node("Reshape", f"{name}.reshape", inputs=[matrix, target], outputs=[result]))
    return result


def _quantize_bias(surgery: Surgery, node: IntegerNode, quantizers: Quantizers) -> None:
    """INT32 bias with scale `s_input * s_weight` and zero point 0; each user of a shared bias has its own.

    It stays float where the input or the weight has no one scale for it.
    """
    if node.weight is None or node.bias is None or node.inputs[0] not in quantizers.activations:
        return
    if not has_integer_bias(quantizers.weights[node.weight.tensor]):
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
    redirect([reader], bias, _dequantized(surgery, f"{node.name}.bias", codes, params, TensorProto.INT32))


def _dequantized(surgery: Surgery, name: str, codes: Array, params: QParams, kind: int) -> gs.Variable:
    """Add codes stored as element type `kind` with a DequantizeLinear; returns its output."""
    names = surgery.names
    scale = gs.Constant(names.new(f"{name}.scale"), np.asarray(params.scale, np.float32))
    packed = stored(names.new(f"{name}.codes"), codes, kind)
    zero_point = stored(names.new(f"{name}.zero_point"), params.zero_point, kind)
    result = gs.Variable(names.new(f"{name}.dequantized"), np.float32, codes.shape)
    attributes = {} if params.axis is None else {"axis": params.axis}
    if params.block_size is not None:
        attributes["block_size"] = params.block_size
    surgery.graph.nodes.append(
        gs.Node(
            "DequantizeLinear",
            f"{name}.dequantize",
            attributes,
            inputs=[packed, scale, zero_point],
            outputs=[result],
        )
    )
    return result


def stored(name: str, codes: Array, kind: int) -> gs.Constant:
    """Codes in an element type. LazyValues because graphsurgeon would unpack 4-bit arrays."""
    if kind in _PACKED:
        nibbles = np.pad(codes.ravel(), (0, codes.size % 2)).astype(np.uint8) & 0x0F
        packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()  # the low nibble first
        return gs.Constant(name, LazyValues(helper.make_tensor(name, kind, codes.shape, packed, raw=True)))
    array = np.array(codes, helper.tensor_dtype_to_np_dtype(kind), order="C")
    return gs.Constant(name, LazyValues(numpy_helper.from_array(array, name)))


def redirect(readers: Sequence[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    """Let nodes read another tensor."""
    for node in readers:
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]
