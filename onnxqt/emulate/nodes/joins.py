"""Operators that join tensors: Concat."""

import numpy as np
from onnx import NodeProto

from onnxqt.emulate.graph import Graph, attributes_of, quantized
from onnxqt.emulate.nodes.elementwise import regrid
from onnxqt.emulate.steps import Detail
from onnxqt.emulate.tail import emit, follow, integer
from onnxqt.numerics import Array


def concat(graph: Graph, node: NodeProto) -> None:
    """Each part on the grid of the result, one behind the other."""
    parts, tail = [quantized(graph, node, i) for i in range(len(node.input))], follow(graph, node)
    moves = [regrid(graph, part.params, tail.params)[0] for part in parts]
    axis = attributes_of(node)["axis"]

    def run(*codes: Array) -> tuple[Array, ...]:
        return (tail.stored(np.concatenate([move(c) for move, c in zip(moves, codes, strict=True)], axis)),)

    info = integer(node, graph.arithmetic.transfer, "tables of codes")
    emit(graph, parts, tail, run, (info, Detail({"axis": axis}, clamp=tail.clamp)))
