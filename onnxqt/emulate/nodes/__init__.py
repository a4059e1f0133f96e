"""One builder per ONNX operator: it checks that a node has an integer form and adds its step to the program."""

from collections.abc import Callable, Mapping

from onnx import NodeProto

from onnxqt.emulate.graph import Graph, NotIntegerError
from onnxqt.emulate.nodes import elementwise, joins, moves, pooling, products

_BUILDERS: Mapping[str, Callable[[Graph, NodeProto], None]] = {
    "Conv": products.conv,
    "ConvTranspose": products.conv,
    "Gemm": products.gemm,
    "MatMul": products.matmul,
    "Add": elementwise.binary,
    "Sub": elementwise.binary,
    "Mul": elementwise.binary,
    "LeakyRelu": elementwise.leaky_relu,
    "PRelu": elementwise.prelu,
    "HardSwish": elementwise.hard_swish,
    "Softmax": elementwise.softmax,
    "Clip": elementwise.clip,
    "Concat": joins.concat,
    "AveragePool": pooling.average_pool,
    "GlobalAveragePool": pooling.mean,
    "ReduceMean": pooling.mean,
}


def build(graph: Graph, node: NodeProto) -> None:
    """Adds the integer step of a node.

    Raises:
        NotIntegerError: if the node has no integer form; the message is the reason.
    """
    if node.domain not in ("", "ai.onnx"):
        raise NotIntegerError(f"it is an operator of the domain '{node.domain}'")
    if node.op_type in _BUILDERS:
        _BUILDERS[node.op_type](graph, node)
    elif node.op_type in moves.MOVES:
        moves.move(graph, node)
    elif node.op_type in elementwise.FUNCTIONS:
        elementwise.function(graph, node)
    else:
        raise NotIntegerError(f"no integer kernel for {node.op_type}")
