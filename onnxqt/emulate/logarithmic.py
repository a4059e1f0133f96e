"""Devices whose grid is logarithmic: codes are a sign and a power of two, as HiSilicon's NNIE has them.

With `z = round(16 log2(max |x|)) - 127` the levels of a tensor are 0 and

    +- 2^((k + z) / 16),   k = 0 ... 127 above zero, 1 ... 127 below

and a value takes the level nearest in its logarithm; values up to 2^((z - 16) / 16) above zero, or 2^((z - 15) / 16)
below, become 0. (MQBench, fake_quantize/nnie.py, and its table of hardware.) What is computed from the levels is
computed in float32: how the device adds up is not documented.
"""

import numpy as np
from onnx import NodeProto, numpy_helper

from onnxqt.emulate.graph import Graph, constant, is_constant, node_name, onnxruntime_run, per_tensor, read_names
from onnxqt.emulate.steps import NodeInfo, Step
from onnxqt.numerics import Array, FloatArray

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_KEEPING = ("Relu", "MaxPool", "Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Pad", "Identity")
_LAST = 127


def nearest_levels(x: Array, largest: float) -> FloatArray:
    """Each value at its level, float32, same shape; `largest` is the magnitude that the top level stands for.

    Raises:
        ValueError: if `largest` is not a positive number.
    """
    if not (np.isfinite(largest) and largest > 0):
        raise ValueError(f"the largest magnitude must be positive, got {largest}")
    zero = np.rint(16 * np.log2(np.float64(largest))) - _LAST
    magnitude = np.abs(x.astype(np.float64))
    with np.errstate(divide="ignore"):
        steps = np.rint(16 * np.log2(magnitude) - zero)
    positive = x > 0
    level = np.exp2((np.clip(steps, np.where(positive, 0, 1), _LAST) + zero) / 16)
    counts = magnitude > np.exp2((zero - np.where(positive, 16, 15)) / 16)
    return np.where(counts, np.copysign(level, x), 0).astype(np.float32)


def quantizer(graph: Graph, node: NodeProto) -> None:
    """Writes down the step of a QuantizeLinear or DequantizeLinear; the scale says what the largest value is."""
    params = per_tensor(graph, node)
    largest = float(params.scale) * params.grid.qmax

    def run(x: Array) -> tuple[Array, ...]:
        return (nearest_levels(x, largest) if node.op_type == "QuantizeLinear" else x,)

    info = NodeInfo(node_name(node), node.op_type, "boundary", rule="log16", implementation="levels in float32")
    graph.steps.append(Step(info, (node.input[0],), (node.output[0],), run))
    graph.levels.add(node.output[0])


def decide(graph: Graph, node: NodeProto) -> None:
    """Writes down the step of a node that computes."""
    on_levels = bool(node.input) and node.input[0] in graph.levels
    if on_levels and node.op_type in _WEIGHTED and is_constant(graph, node.input[1]):
        node = _with_levels(graph, node)
    names = [name for name in read_names(node) if not is_constant(graph, name)]
    if on_levels:
        info = NodeInfo(node_name(node), node.op_type, "integer", rule="log16", implementation="levels in float32")
    else:
        info = NodeInfo(
            node_name(node), node.op_type, "float", "its input is on no grid", implementation="ONNX Runtime"
        )
    outputs = tuple(filter(None, node.output))
    if on_levels and node.op_type in _KEEPING:
        graph.levels.update(outputs)
    graph.steps.append(Step(info, tuple(names), outputs, onnxruntime_run(graph, node, names)))


def _with_levels(graph: Graph, node: NodeProto) -> NodeProto:
    """The node with its constant weights at their levels."""
    weights = constant(graph, node.input[1])
    name = f"{node.input[1]}/levels"
    largest = float(np.abs(weights).max(initial=0)) or 1.0
    graph.constants[name] = numpy_helper.from_array(nearest_levels(weights, largest), name)
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[1] = name
    return copy
