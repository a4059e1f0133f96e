"""Operators that average: AveragePool, GlobalAveragePool, ReduceMean."""

import numpy as np
from onnx import NodeProto

from onnxqt.emulate.graph import Graph, NotIntegerError, attributes_of, fixed, quantized, window_of
from onnxqt.emulate.kernels import pooling
from onnxqt.emulate.kernels.tables import same_grid
from onnxqt.emulate.nodes.elementwise import regrid
from onnxqt.emulate.steps import Detail, storage
from onnxqt.emulate.tail import emit, follow, integer, widened
from onnxqt.numerics import IntArray

_ONE_GRID = ("tflite", "tosa")  # rules that average codes, whatever their grid means


def average_pool(graph: Graph, node: NodeProto) -> None:
    """Means under a sliding window."""
    x, tail, attributes = quantized(graph, node, 0), follow(graph, node), attributes_of(node)
    window, count = window_of(attributes, attributes["kernel_shape"]), bool(attributes.get("count_include_pad", 0))
    rule = graph.arithmetic.average
    target = x.params if rule in _ONE_GRID else tail.params
    if rule == "dpu" and np.frexp(np.float64(x.params.scale) / np.float64(target.scale))[0] != 0.5:
        raise NotIntegerError("its scales are not powers of two, which the back end's average needs")
    move, _ = regrid(graph, target, tail.params)

    def kernel(codes: IntArray) -> IntArray:
        means = pooling.AVERAGE_RULES[rule](codes, window, count, (x.params, target), graph.arithmetic)
        return move(means.astype(storage(target.grid)))

    note = "" if same_grid(target, tail.params) else "averaged on the grid of its input, then moved to its own"
    about = (integer(node, rule, "numpy", note), Detail(attributes, clamp=tail.clamp))
    emit(graph, (x,), tail, widened(kernel, tail), about)


def mean(graph: Graph, node: NodeProto) -> None:
    """Means over whole axes."""
    x, tail, attributes = quantized(graph, node, 0), follow(graph, node), attributes_of(node)
    given = attributes.get("axes") or fixed(graph, node, 1, ())
    noop = bool(attributes.get("noop_with_empty_axes", 0))
    first = 2 if node.op_type == "GlobalAveragePool" else 0
    keepdims = bool(attributes.get("keepdims", 1))
    rule = graph.arithmetic.mean

    def kernel(codes: IntArray) -> IntArray:
        axes = tuple(int(a) % codes.ndim for a in given) or tuple(range(codes.ndim if noop else first, codes.ndim))
        return pooling.MEAN_RULES[rule](codes, axes, keepdims, (x.params, tail.params), graph.arithmetic)

    detail = Detail({**attributes, "axes": [int(a) for a in given], "keepdims": int(keepdims)}, clamp=tail.clamp)
    emit(graph, (x,), tail, widened(kernel, tail), (integer(node, rule, "numpy"), detail))
