"""Passes that compute shapes ahead of time, as far as they are known."""

import math
from collections.abc import Callable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto

from onnxqt.model import Names, is_onnx

# Elements of a shape: a number, the name of a free dimension, or None where nothing is known.
Symbolic = NDArray[np.object_]
_LONGEST = 64  # elements of a vector that could be a shape


def fold_shapes(graph: gs.Graph) -> list[str]:
    """Integers computed from known dimensions become constants, and so do the targets of Reshape.

    A free dimension that Reshape copies from the same place of its input is written as 0, and one that remains as
    -1 (ONNX Reshape-14). The shape folding of graphsurgeon is not used: it takes Cast to float, Mul by 0.5, Cast
    to integer for an integer product, and multiplies by 0.
    """
    names = Names(graph)
    values = _Values()
    folded, changes = 0, []
    for part in (graph, *graph.subgraphs(recursive=True)):
        for node in part.nodes:
            folded += _fold(values, node)
        for node in part.nodes:
            target = _target(values, node) if is_onnx(node, "Reshape") else None
            if target is not None:
                node.inputs[1] = gs.Constant(names.new(f"{node.outputs[0].name}.shape"), target)
                changes.append(f"wrote the target of Reshape '{node.name}' as {target.tolist()}")
    graph.cleanup().toposort()
    return [*([f"folded {folded} node(s) that compute shapes"] if folded else []), *changes]


def write_scalar_bounds(graph: gs.Graph) -> list[str]:
    """Bounds and step of Range that are vectors of one element become scalars, as ONNX Range-11 has them.

    ONNX Runtime takes such vectors only as long as it does not know their shape.
    """
    names = Names(graph)
    changes = []
    for part in (graph, *graph.subgraphs(recursive=True)):
        for node in [node for node in part.nodes if is_onnx(node, "Range")]:
            vectors = [position for position, tensor in enumerate(node.inputs) if tuple(tensor.shape or ()) == (1,)]
            for position in vectors:
                node.inputs[position] = _scalar(part, names, node.inputs[position])
            changes += [f"made scalars of {len(vectors)} operand(s) of Range '{node.name}'"] if vectors else []
        part.toposort(recurse_subgraphs=False)
    return changes


def _scalar(part: gs.Graph, names: Names, vector: gs.Tensor) -> gs.Tensor:
    """The only element of a vector."""
    name = names.new(f"{vector.name}.scalar")
    if isinstance(vector, gs.Constant):
        return gs.Constant(name, vector.values.reshape(()))
    element = gs.Variable(name, vector.dtype, ())
    axes = gs.Constant(names.new(f"{name}.axes"), np.array([0]))
    part.nodes.append(gs.Node("Squeeze", name, inputs=[vector, axes], outputs=[element]))
    return element


def _fold(values: "_Values", node: gs.Node) -> bool:
    if node.op not in _RULES or not is_onnx(node) or len(node.outputs) != 1:
        return False
    (tensor,) = node.outputs
    value = values.of(tensor)
    if value is None or not all(isinstance(element, int) for element in value.reshape(-1)):
        return False
    tensor.to_constant(value.astype(np.int64 if tensor.dtype is None else tensor.dtype))
    node.inputs.clear()
    node.outputs.clear()
    return True


def _target(values: "_Values", node: gs.Node) -> NDArray[np.int64] | None:
    """What the computed target of a Reshape can be replaced by; None if that is not exact."""
    data, wanted = node.inputs
    value = None if isinstance(wanted, gs.Constant) or node.attrs.get("allowzero", 0) else values.of(wanted)
    if value is None or value.ndim != 1:
        return None
    source = _dimensions(data) or []
    target = [
        0 if isinstance(size, str) and i < len(source) and source[i] == size else size for i, size in enumerate(value)
    ]
    free = [i for i, size in enumerate(target) if not isinstance(size, int)]
    if len(free) + target.count(-1) > 1:
        return None
    return np.array([-1 if i in free else size for i, size in enumerate(target)], np.int64)


def _dimensions(tensor: gs.Tensor) -> list[int | str] | None:
    """Sizes of a tensor; a free one by its name in the model, else by a name that no other dimension has."""
    if tensor.shape is None:
        return None
    return [
        int(size)
        if isinstance(size, int | np.integer) and size >= 0
        else size
        if isinstance(size, str) and size
        else f"{tensor.name}/{axis}"
        for axis, size in enumerate(tensor.shape)
    ]


class _Values:
    """Values of small integer tensors, computed once."""

    def __init__(self) -> None:
        self._known: dict[int, Symbolic | None] = {}

    def of(self, tensor: gs.Tensor) -> Symbolic | None:
        """The elements of a tensor, None if it is not computed by operators of which shapes are made."""
        if isinstance(tensor, gs.Constant):
            return _constant(tensor)
        if id(tensor) not in self._known:
            self._known[id(tensor)] = None
            self._known[id(tensor)] = self._computed(tensor)
        return self._known[id(tensor)]

    def _computed(self, tensor: gs.Tensor) -> Symbolic | None:
        node = tensor.inputs[0] if tensor.inputs else None
        if node is None or not is_onnx(node) or node.op not in _RULES:
            return None
        if node.op in ("Shape", "Size"):
            return _shape(node) if node.op == "Shape" else _size(node)
        operands = [None if operand.is_empty() else self.of(operand) for operand in node.inputs]
        if any(value is None for value, operand in zip(operands, node.inputs, strict=True) if not operand.is_empty()):
            return None
        try:
            return np.asarray(_RULES[node.op](node, operands), object)
        except (ValueError, IndexError, TypeError):  # it fails at run time, or takes a free dimension for a number
            return None


def _constant(tensor: gs.Constant) -> Symbolic | None:
    small = len(tensor.shape) <= 1 and all(size <= _LONGEST for size in tensor.shape)
    if not small or isinstance(tensor.dtype, int) or np.dtype(tensor.dtype) not in (np.int64, np.int32):
        return None
    return _objects(tensor.values)


def _objects(values: NDArray[np.integer]) -> Symbolic:
    return np.array(values.tolist(), object).reshape(values.shape)


def _shape(node: gs.Node) -> Symbolic | None:
    dimensions = _dimensions(node.inputs[0])
    if dimensions is None:
        return None
    return np.array(dimensions[node.attrs.get("start", 0) : node.attrs.get("end", len(dimensions))], object)


def _size(node: gs.Node) -> Symbolic | None:
    dimensions = _dimensions(node.inputs[0])
    if dimensions is None or any(isinstance(size, str) for size in dimensions):
        return None
    return np.array(math.prod(map(int, dimensions)), object)


Operands = list[Symbolic | None]


def _given(value: Symbolic | None) -> Symbolic:
    """An operand that is there.

    Raises:
        ValueError: if it is omitted.
    """
    return _fail() if value is None else value


def _whole(value: Symbolic | None) -> NDArray[np.int64]:
    """A parameter whose elements are all numbers.

    Raises:
        ValueError: if one is not.
    """
    if value is None or not all(isinstance(element, int) for element in value.reshape(-1)):
        raise ValueError("a free dimension")
    return value.astype(np.int64)


def _gather(node: gs.Node, operands: Operands) -> Symbolic:
    data = _given(operands[0])
    return np.asarray(data[_whole(operands[1])], object) if data.ndim == 1 else _fail()


def _slice(node: gs.Node, operands: Operands) -> Symbolic:
    data, starts, ends, axes, steps = (*operands, None, None)[:5]
    data = _given(data)
    if axes is not None and _whole(axes).tolist() not in ([0], [-1]):
        return _fail()
    (start,), (end,) = _whole(starts), _whole(ends)
    step = 1 if steps is None else int(_whole(steps)[0])
    return data[start:end:step] if step > 0 and data.ndim == 1 else _fail()


def _unsqueeze(node: gs.Node, operands: Operands) -> Symbolic:
    data = _given(operands[0])
    return data.reshape(1) if data.ndim == 0 and _whole(operands[1]).size == 1 else _fail()


def _squeeze(node: gs.Node, operands: Operands) -> Symbolic:
    data = _given(operands[0])
    return data.reshape(()) if data.shape == (1,) else _fail()


def _concat(node: gs.Node, operands: Operands) -> Symbolic:
    return np.concatenate([_given(operand) for operand in operands])


def _cast(node: gs.Node, operands: Operands) -> Symbolic:
    return _given(operands[0]) if node.attrs["to"] in (TensorProto.INT64, TensorProto.INT32) else _fail()


def _arithmetic(function: Callable[[int, int], int]) -> Callable[[gs.Node, Operands], Symbolic]:
    def compute(node: gs.Node, operands: Operands) -> Symbolic:
        def element(a: object, b: object) -> int | None:
            return function(a, b) if isinstance(a, int) and isinstance(b, int) else None

        return np.asarray(np.frompyfunc(element, 2, 1)(*map(_given, operands)), object)

    return compute


def _divide(a: int, b: int) -> int:
    """Integer division as ONNX Div-14 has it, towards zero; dimensions are not negative, so both agree."""
    if a < 0 or b <= 0:
        raise ValueError("not a dimension")
    return a // b


def _fail() -> Symbolic:
    raise ValueError("not a shape")


_RULES: dict[str, Callable[[gs.Node, Operands], Symbolic]] = {
    **dict.fromkeys(("Shape", "Size"), lambda node, operands: _fail()),  # read no value, see `_Values`
    "Gather": _gather,
    "Slice": _slice,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Concat": _concat,
    "Cast": _cast,
    "Add": _arithmetic(lambda a, b: a + b),
    "Sub": _arithmetic(lambda a, b: a - b),
    "Mul": _arithmetic(lambda a, b: a * b),
    "Div": _arithmetic(_divide),
}
