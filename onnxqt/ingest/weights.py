"""Passes that give every weight one channel axis."""

from collections import defaultdict
from copy import copy

import onnx_graphsurgeon as gs
from onnx import TensorProto
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxqt.model import Names
from onnxqt.ops import Kind, lookup, weight_axis


def separate_weights(graph: gs.Graph) -> list[str]:
    """A weight whose users disagree about its channel axis gets one copy for each axis.

    Per-channel scales belong to one axis: Gemm with transB=1 and with transB=0 read the same matrix along
    different ones. Biases shared with a weight, and weights read by other operators, are copied likewise.
    """
    changes = []
    names = Names(graph)
    constants = [tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant)]
    for constant in constants:
        users: defaultdict[int | None, list[tuple[gs.Node, int]]] = defaultdict(list)
        for node in dict.fromkeys(map(_ById, constant.outputs)):
            for position, tensor in enumerate(node.node.inputs):
                if tensor is constant:
                    users[_axis_of_use(node.node, position, constant)].append((node.node, position))
        for axis in list(users)[1:]:
            name = f"{constant.name}.axis_{'none' if axis is None else axis}"
            own = copied(constant, names.new(name))
            for node, position in users[axis]:
                node.inputs[position] = own
            changes.append(f"duplicated weight '{constant.name}' for {users[axis][0][0].op} (other axis)")
    return changes


def copied(constant: gs.Constant, name: str) -> gs.Constant:
    """A constant of the same values under another name; what is not loaded yet stays so."""
    values = constant._values
    if isinstance(values, LazyValues):
        values = copy(values)
        values.tensor = TensorProto()
        values.tensor.CopyFrom(constant._values.tensor)  # the exporter writes the name into it
    return gs.Constant(name, values)


class _ById:
    """A graph node hashed by identity (gs.Node compares by value and does not hash)."""

    def __init__(self, node: gs.Node) -> None:
        self.node = node

    def __hash__(self) -> int:
        return id(self.node)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ById) and other.node is self.node


def _axis_of_use(node: gs.Node, position: int, constant: gs.Constant) -> int | None:
    """Channel axis along which a node reads a constant as its weight; None for any other use."""
    if position != 1 or lookup(node.op, node.domain or "").kind is not Kind.WEIGHTED:
        return None
    return weight_axis(node.op, node.attrs, len(constant.shape))
