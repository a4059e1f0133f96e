"""Multiply-accumulates (MACs) of a node, from its shapes and ONNX's operator definitions (opset 21).

With `Y` the output, `|.|` the number of elements, `W` (O, I/g, k...) the weight of a convolution of `g` groups:

    Conv                 |Y| |W| / O                    strides, dilations and pads are in the shape of Y
    ConvTranspose        |X| |W| / I                    W is (I, O/g, k...)
    Gemm                 |Y| K                          K = columns of A, its rows with transA
    MatMul               |Y| K                          K = last dimension of A; stacks and broadcasts are in Y
    Einsum               (operands - 1) x the product of the sizes of all indices, as one nest of loops
    LSTM, GRU, RNN       T N (|W| + |R| + |P|)          T steps, N sequences; P the peepholes of LSTM

Products with padding count; adding a bias, elementwise operators, normalisation and pooling do not.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import onnx

from onnxqt.model import Node, is_onnx, nodes_of

Shapes = Callable[[str], tuple[int | None, ...] | None]


class UnknownMacsError(Exception):
    """Why the MACs of a node are not known; completes "not known, because ..."."""


def multiplies(node: Node) -> bool:
    """Whether a node has MACs, known or not."""
    return node.domain not in ("", "ai.onnx") or node.op_type in _FORMULAS or any(map(_multiplies, bodies(node)))


def macs(node: Node, shapes: Shapes) -> int:
    """MACs of one run of a node with tensors of these shapes; 0 for operators that have none.

    Raises:
        UnknownMacsError: if they are not known.
    """
    if node.domain not in ("", "ai.onnx"):
        raise UnknownMacsError(f"'{node.op_type}' is an operator of the domain '{node.domain}'")
    if any(map(_multiplies, bodies(node))):
        raise UnknownMacsError("they are in a subgraph")
    formula = _FORMULAS.get(node.op_type)
    return formula(node, shapes) if formula else 0


def bodies(node: Node) -> Iterable[onnx.GraphProto]:
    """The subgraphs of a node."""
    for value in node.attributes.values():
        graphs = value if isinstance(value, list) else [value]
        yield from (graph for graph in graphs if isinstance(graph, onnx.GraphProto))


def _multiplies(graph: onnx.GraphProto) -> bool:
    return any(not is_onnx(node) or node.op_type in _FORMULAS for node in nodes_of(graph))


def _conv(node: Node, shapes: Shapes) -> int:
    return math.prod(_known(shapes, node.outputs[0])) * math.prod(_known(shapes, node.inputs[1])[1:])


def _conv_transpose(node: Node, shapes: Shapes) -> int:
    return math.prod(_known(shapes, node.inputs[0])) * math.prod(_known(shapes, node.inputs[1])[1:])


def _gemm(node: Node, shapes: Shapes) -> int:
    rows, columns = _known(shapes, node.inputs[0])
    return math.prod(_known(shapes, node.outputs[0])) * (rows if node.attributes.get("transA", 0) else columns)


def _matmul(node: Node, shapes: Shapes) -> int:
    return math.prod(_known(shapes, node.outputs[0])) * _known(shapes, node.inputs[0])[-1]


def _einsum(node: Node, shapes: Shapes) -> int:
    equation = node.attributes["equation"].decode().replace(" ", "")
    sizes: dict[str, int] = {}
    for term, tensor in zip(equation.split("->")[0].split(","), node.inputs, strict=True):
        shape = _known(shapes, tensor)
        for index, size in zip(_indices(term, len(shape)), shape, strict=True):
            sizes[index] = max(size, sizes.get(index, 0))
    return (len(node.inputs) - 1) * math.prod(sizes.values())


def _indices(term: str, rank: int) -> list[str]:
    """The index of each dimension of an operand; those of an ellipsis are numbered from the right."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f"...{number}" for number in range(hidden, 0, -1) if dots), *after]


def _recurrent(node: Node, shapes: Shapes) -> int:
    steps = math.prod(_known(shapes, node.inputs[0])[:2])
    peepholes = node.inputs[7] if node.op_type == "LSTM" and len(node.inputs) > 7 else ""
    operands = (*node.inputs[1:3], *([peepholes] if peepholes else []))
    return steps * sum(math.prod(_known(shapes, tensor)) for tensor in operands)


def _known(shapes: Shapes, tensor: str) -> tuple[int, ...]:
    shape = shapes(tensor)
    if shape is None:
        raise UnknownMacsError(f"the rank of '{tensor}' is unknown")
    sizes = tuple(size for size in shape if size is not None)
    if len(sizes) != len(shape):
        raise UnknownMacsError(f"a size of '{tensor}' is unknown")
    return sizes


_FORMULAS: Mapping[str, Callable[[Node, Shapes], int]] = {
    **dict.fromkeys(("Conv", "ConvInteger", "DeformConv"), _conv),
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    **dict.fromkeys(("MatMul", "MatMulInteger"), _matmul),
    "Einsum": _einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
}
