"""Passes that put operators together which exporters take apart, so that no quantizer comes between the parts.

Activation functions are recognised by algebra: what surrounds their one non-linear node `f` is written as a
polynomial in the input `x` and in `f`, in which the order of the exporter's nodes no longer shows.
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.model import Names, is_onnx
from onnxqt.numerics import Array
from onnxqt.ops import Attributes

Polynomial = Mapping[tuple[int, int], float]  # coefficient of each (power of x, power of f)

_X, _F = (1, 0), (0, 1)
_CLOSE = 5e-4  # relative; exporters in half precision round the constants by 2^-11
_DEPTH = 8  # nodes between the input or output of a unit and its non-linear node
_DEGREE = 4
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow")


@dataclass(frozen=True)
class Unit:
    """An operator, and how it is written in terms of a non-linear node.

    Attributes:
        op_type: of the unit.
        argument: of the non-linear node, a polynomial in x.
        result: the unit, a polynomial in x and the non-linear node.
        opset: in which ONNX has the unit.
        attributes: of the unit.
    """

    op_type: str
    argument: Polynomial
    result: Polynomial
    opset: int
    attributes: Attributes = field(default_factory=dict)


_HALF_SUM = {(1, 0): 0.5, (1, 1): 0.5}  # x (1 + f) / 2
_TANH = {(1, 0): math.sqrt(2 / math.pi), (3, 0): 0.044715 * math.sqrt(2 / math.pi)}
_GELU = {
    "Erf": (
        Unit("Gelu", {_X: math.sqrt(0.5)}, _HALF_SUM, 20),
        Unit("Gelu", {_X: -math.sqrt(0.5)}, {(1, 0): 0.5, (1, 1): -0.5}, 20),
    ),
    "Tanh": (Unit("Gelu", _TANH, _HALF_SUM, 20, {"approximate": "tanh"}),),
}
_HARD_SIGMOID = {"alpha": 1 / 6, "beta": 0.5}


def fuse_activations(graph: gs.Graph) -> list[str]:
    """Gelu, HardSigmoid and HardSwish from their parts, where the model's opset has them.

    Gelu(x) = x (1 + erf(x / sqrt(2))) / 2, or x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (ONNX Gelu-20);
    HardSigmoid(x) = max(0, min(1, x / 6 + 1 / 2)) (ONNX HardSigmoid-6); HardSwish(x) = x HardSigmoid(x)
    (ONNX HardSwish-14).
    """
    changes = []
    for node in list(graph.nodes):
        for unit in _units_of(node) if node.outputs else ():
            place = _find(node, unit) if graph.opset >= unit.opset else None
            if place is not None:
                changes.append(_replace(graph, place, unit))
                break
    graph.cleanup().toposort()
    return changes


def _units_of(node: gs.Node) -> tuple[Unit, ...]:
    """The units that a node could be the non-linear part of; larger ones first."""
    if is_onnx(node, *_GELU):
        return _GELU[node.op]
    if is_onnx(node, "HardSigmoid"):
        alpha, beta = node.attrs.get("alpha", 0.2), node.attrs.get("beta", 0.5)
        known = _same({_X: alpha, (0, 0): beta}, {_X: 1 / 6, (0, 0): 0.5})
        return (Unit("HardSwish", {_X: 1.0}, {(1, 1): 1.0}, 14),) if known else ()
    bounds = _bounds(node) if is_onnx(node, "Clip") else None
    if bounds is None or not all(map(math.isfinite, bounds)) or bounds[0] >= bounds[1]:
        return ()
    low, width = bounds[0], bounds[1] - bounds[0]
    argument = {_X: width / 6, (0, 0): width / 2 + low}  # (argument - low) / width = x / 6 + 1 / 2
    sigmoid = {_F: 1 / width, (0, 0): -low / width}
    return (
        Unit("HardSwish", argument, {(1, 1): 1 / width, (1, 0): -low / width}, 14),
        Unit("HardSigmoid", argument, sigmoid, 6, _HARD_SIGMOID),
    )


def _find(node: gs.Node, unit: Unit) -> tuple[gs.Tensor, gs.Tensor] | None:
    """Input and output of a unit around its non-linear node."""
    result = node.outputs[0]
    for x in _cone(node.inputs[0], upwards=True):
        if not _same(_polynomial(node.inputs[0], x, None), unit.argument):
            continue
        for y in _cone(result, upwards=False):
            rank = None if x.shape is None else len(x.shape)
            if rank is None or y.shape is None or len(y.shape) != rank:  # a scalar of shape (1, 1) may add axes
                continue
            if _same(_polynomial(y, x, result), unit.result):
                return x, y
    return None


def _replace(graph: gs.Graph, place: tuple[gs.Tensor, gs.Tensor], unit: Unit) -> str:
    x, y = place
    (last,) = y.inputs
    label = f"{unit.op_type} '{last.name}'"
    y.inputs.clear()
    graph.nodes.append(gs.Node(unit.op_type, last.name, dict(unit.attributes), [x], [y]))
    return f"put {label} together"


def _cone(tensor: gs.Tensor, upwards: bool) -> Iterator[gs.Tensor]:
    """A tensor and those from which it is computed, or that are computed from it, by arithmetic alone."""
    layer, seen = [tensor], {id(tensor)}
    for _ in range(_DEPTH):
        yield from layer
        reached = []
        for near in layer:
            for node in near.inputs if upwards else near.outputs:
                if is_onnx(node, *_ARITHMETIC):
                    reached += list(node.inputs if upwards else node.outputs)
        layer = [t for t in {id(t): t for t in reached}.values() if id(t) not in seen and not _is_constant(t)]
        seen.update(map(id, layer))


def _is_constant(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant)


# --- polynomials ------------------------------------------------------------------------------------------


def _polynomial(tensor: gs.Tensor, x: gs.Tensor, f: gs.Tensor | None, depth: int = 0) -> Polynomial | None:
    """A tensor as a polynomial in two others; None if it is none, or too large."""
    if tensor is x or tensor is f:
        return {_X if tensor is x else _F: 1.0}
    if _is_constant(tensor):
        value = scalar(tensor)
        return None if value is None else {(0, 0): value}
    node = tensor.inputs[0] if tensor.inputs else None
    if node is None or not is_onnx(node, *_ARITHMETIC) or depth > _DEPTH:
        return None
    operands = [_polynomial(operand, x, f, depth + 1) for operand in node.inputs]
    known = [operand for operand in operands if operand is not None]
    return _combine(node.op, known) if len(known) == len(operands) else None


def _combine(op_type: str, operands: list[Polynomial]) -> Polynomial | None:
    a, b = (*operands, {(0, 0): -1.0})[:2]
    if op_type in ("Mul", "Neg"):
        return _product(a, b)
    if op_type in ("Add", "Sub"):
        sign = 1 if op_type == "Add" else -1
        return {power: a.get(power, 0.0) + sign * b.get(power, 0.0) for power in {**a, **b}}
    if set(b) != {(0, 0)}:  # division, or a power, by something that is not constant
        return None
    value = b[0, 0]
    if op_type == "Div":
        return _product(a, {(0, 0): 1 / value}) if value else None
    if value not in (1, 2, 3):
        return None
    power: Polynomial | None = {(0, 0): 1.0}
    for _ in range(int(value)):
        power = _product(power, a) if power is not None else None
    return power


def _product(a: Polynomial, b: Polynomial) -> Polynomial | None:
    product: dict[tuple[int, int], float] = {}
    for (i, j), left in a.items():
        for (k, m), right in b.items():
            product[i + k, j + m] = product.get((i + k, j + m), 0.0) + left * right
    return product if max(map(max, product)) <= _DEGREE else None


def _same(a: Polynomial | None, b: Polynomial) -> bool:
    if a is None:
        return False
    return all(math.isclose(a.get(p, 0.0), b.get(p, 0.0), rel_tol=_CLOSE, abs_tol=1e-7) for p in {**a, **b})


def scalar(tensor: gs.Tensor) -> float | None:
    """The value of a constant with one element; None for any other tensor."""
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) != 1:
        return None
    return float(tensor.values.reshape(-1)[0])


# --- Clip -------------------------------------------------------------------------------------------------


def merge_clamps(graph: gs.Graph) -> list[str]:
    """Min and Max with a constant, and chains of them with Relu and Clip, as one Relu or Clip.

    clip(clip(x, a, b), c, d) = clip(x, clip(a, c, d), clip(b, c, d))
    """
    changes = []
    names = Names(graph)
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in list(graph.nodes):
        bounds = _bounds(node)
        if bounds is None:
            continue
        data = _data(node)
        before = (
            data.inputs[0] if len(data.inputs) == 1 and len(data.outputs) == 1 and id(data) not in outputs else None
        )
        inner = _bounds(before) if before is not None else None
        if before is not None and inner is not None:
            bounds = (_clip(inner[0], bounds), _clip(inner[1], bounds))
            changes.append(f"merged {before.op} '{before.name}' into {node.op} '{node.name}'")
            data = _data(before)
        elif is_onnx(node, "Relu", "Clip"):
            continue
        else:
            changes.append(f"wrote {node.op} '{node.name}' as a clamp")
        _write_clamp(node, names, data, bounds)
    graph.cleanup().toposort()
    return changes


def _clip(value: float, bounds: tuple[float, float]) -> float:
    return min(max(value, bounds[0]), bounds[1])


def _data(node: gs.Node) -> gs.Tensor:
    """The operand of a clamp that is not one of its bounds."""
    return node.inputs[1] if isinstance(node.inputs[0], gs.Constant) else node.inputs[0]


def _bounds(node: gs.Node) -> tuple[float, float] | None:
    """Between which values a node keeps a tensor of real numbers; None if it does something else."""
    if not is_onnx(node, "Relu", "Clip", "Min", "Max") or isinstance(data := _data(node), gs.Constant):
        return None
    if data.dtype != np.float32 or data.shape is None:
        return None
    if node.op == "Relu":
        return 0.0, math.inf
    if node.op == "Clip":
        low, high = (
            scalar(b) if not b.is_empty() else None for b in (*node.inputs[1:], *[gs.Variable.empty()] * 2)[:2]
        )
        given = [not bound.is_empty() for bound in node.inputs[1:]]
        if given != [bound is not None for bound in (low, high)[: len(given)]]:
            return None  # computed at run time
        return -math.inf if low is None else low, math.inf if high is None else high
    other = [tensor for tensor in node.inputs if tensor is not data]
    value = scalar(other[0]) if len(node.inputs) == 2 and len(other) == 1 else None
    if value is None or len(other[0].shape) > len(data.shape):
        return None
    return (value, math.inf) if node.op == "Max" else (-math.inf, value)


def _write_clamp(node: gs.Node, names: Names, data: gs.Tensor, bounds: tuple[float, float]) -> None:
    if bounds == (0.0, math.inf):
        node.op, node.inputs = "Relu", [data]
        return
    limits = [
        gs.Constant(names.new(f"{node.outputs[0].name}.{name}"), np.array(value, np.float32))
        if math.isfinite(value)
        else gs.Variable.empty()
        for name, value in zip(("min", "max"), bounds, strict=True)
    ]
    while limits and limits[-1].is_empty():
        limits.pop()
    node.op, node.inputs = "Clip", [data, *limits]


# --- LayerNormalization -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Normalised:
    """A tensor less its mean, over its standard deviation, and what follows.

    Attributes:
        x: the tensor.
        epsilon: added to its variance.
        axes: over which mean and variance go.
        result: what comes out.
        gamma: factors that `result` has already.
        beta: what is already added to it.
    """

    x: gs.Tensor
    epsilon: float
    axes: tuple[int, ...]
    result: gs.Tensor
    gamma: gs.Tensor | None = None
    beta: gs.Tensor | None = None


def fuse_layer_norm(graph: gs.Graph) -> list[str]:
    """LayerNormalization from its parts, where it normalises the last axes.

    y = (x - E[x]) / sqrt(E[(x - E[x])^2] + epsilon) gamma + beta   (ONNX LayerNormalization-17)
    """
    changes = []
    names = Names(graph)
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in list(graph.nodes):
        found = (_divided(node) or _rearranged(node)) if node.outputs else None
        dims = _trailing(found) if found else None
        if found is None or dims is None:
            continue
        y, gamma, beta = found.result, found.gamma, found.beta
        if beta is None:
            gamma, y = _follower(y, "Mul", dims, outputs)
            beta, y = _follower(y, "Add", dims, outputs)
        values = {"gamma": np.ones(dims, np.float32) if gamma is None else _spread(gamma, dims)}
        if beta is not None:
            values["beta"] = _spread(beta, dims)
        parameters = [gs.Constant(names.new(f"{y.name}.{name}"), value) for name, value in values.items()]
        (last,) = y.inputs
        attributes = {"axis": -len(dims), "epsilon": found.epsilon}
        y.inputs.clear()
        graph.nodes.append(gs.Node("LayerNormalization", last.name, attributes, [found.x, *parameters], [y]))
        changes.append(f"put LayerNormalization '{last.name}' together")
    graph.cleanup().toposort()
    return changes


def _divided(node: gs.Node) -> _Normalised | None:
    """The form (x - mean) / deviation, or (x - mean) times its reciprocal."""
    if not is_onnx(node, "Div", "Mul"):
        return None
    for centred, scale in _orders(node) if node.op == "Mul" else [node.inputs]:
        sub = _producer(centred, "Sub")
        if sub is None:
            continue
        x, mean = sub.inputs
        moments = _moments(x, mean, _under_root(scale, inverse=node.op == "Mul"))
        if moments:
            return _Normalised(x, *moments, node.outputs[0])
    return None


def _rearranged(node: gs.Node) -> _Normalised | None:
    """The form x k + (beta - mean k) with k = gamma / deviation, which TensorFlow writes."""
    if not is_onnx(node, "Add"):
        return None
    for scaled, shift in _orders(node):
        product, sub = _producer(scaled, "Mul"), _producer(shift, "Sub")
        other = _producer(sub.inputs[1], "Mul") if sub else None
        if product is None or sub is None or other is None or not isinstance(sub.inputs[0], gs.Constant):
            continue
        for (x, k), (mean, same) in itertools.product(_orders(product), _orders(other)):
            factor = _producer(k, "Mul") if same is k else None
            gamma = next((t for t in factor.inputs if isinstance(t, gs.Constant)), None) if factor else None
            inverse = next((t for t in factor.inputs if t is not gamma), k) if factor and gamma else k
            moments = _moments(x, mean, _under_root(inverse, inverse=True)) if same is k else None
            if moments:
                return _Normalised(x, *moments, node.outputs[0], gamma, sub.inputs[0])
    return None


def _orders(node: gs.Node) -> list[list[gs.Tensor]]:
    """The two operands of a commutative node, both ways round."""
    return [list(node.inputs), list(node.inputs)[::-1]]


def _moments(x: gs.Tensor, mean: gs.Tensor, shifted: gs.Tensor | None) -> tuple[float, tuple[int, ...]] | None:
    """Epsilon and the axes, if `mean` is of `x` and `shifted` its variance plus epsilon over the same axes."""
    add = _producer(shifted, "Add") if shifted is not None else None
    axes = _axes(_producer(mean, "ReduceMean"), x)
    if add is None or axes is None:
        return None
    for variance, constant in _orders(add):
        epsilon, average = scalar(constant), _producer(variance, "ReduceMean")
        if epsilon is None or average is None or _axes(average, average.inputs[0]) != axes:
            continue
        centred = _producer(_under_square(average.inputs[0]), "Sub")
        if centred and centred.inputs[0] is x and _axes(_producer(centred.inputs[1], "ReduceMean"), x) == axes:
            return epsilon, axes
    return None


def _producer(tensor: gs.Tensor | None, *op_types: str) -> gs.Node | None:
    """The node that computes a tensor, if it is one of these operators."""
    node = tensor.inputs[0] if tensor is not None and tensor.inputs else None
    return node if node is not None and is_onnx(node, *op_types) else None


def _under_root(tensor: gs.Tensor, inverse: bool) -> gs.Tensor | None:
    """What the tensor is the square root of, or the reciprocal of the square root."""
    if not inverse:
        root = _producer(tensor, "Sqrt")
        return root.inputs[0] if root else _power(tensor, 0.5)
    if (node := _producer(tensor, "Reciprocal")) is not None:
        return _under_root(node.inputs[0], inverse=False)
    if (node := _producer(tensor, "Div")) is not None and scalar(node.inputs[0]) == 1:
        return _under_root(node.inputs[1], inverse=False)
    return _power(tensor, -0.5)


def _under_square(tensor: gs.Tensor) -> gs.Tensor | None:
    """What the tensor is the square of."""
    node = _producer(tensor, "Mul")
    return node.inputs[0] if node is not None and node.inputs[0] is node.inputs[1] else _power(tensor, 2.0)


def _power(tensor: gs.Tensor, exponent: float) -> gs.Tensor | None:
    node = _producer(tensor, "Pow")
    return node.inputs[0] if node is not None and scalar(node.inputs[1]) == exponent else None


def _axes(node: gs.Node | None, data: gs.Tensor) -> tuple[int, ...] | None:
    """The axes over which a ReduceMean of `data` that keeps them goes, in order and not negative."""
    if node is None or node.inputs[0] is not data or data.shape is None or not node.attrs.get("keepdims", 1):
        return None
    axes = node.attrs.get("axes")
    if len(node.inputs) > 1 and not node.inputs[1].is_empty():
        if not isinstance(node.inputs[1], gs.Constant):
            return None
        axes = node.inputs[1].values.tolist()
    rank = len(data.shape)
    return tuple(sorted(axis % rank for axis in axes)) if axes else None


def _trailing(found: _Normalised) -> tuple[int, ...] | None:
    """Sizes of the normalised axes, if they are the last ones, and known, and the constants have them."""
    rank = len(found.x.shape)
    dims = tuple(found.x.shape[axis] for axis in found.axes)
    if found.axes != tuple(range(rank - len(dims), rank)) or not all(isinstance(size, int) for size in dims):
        return None
    given = [constant for constant in (found.gamma, found.beta) if constant is not None]
    return dims if all(_fits(constant, dims, rank) for constant in given) else None


def _fits(constant: gs.Constant, dims: tuple[int, ...], rank: int) -> bool:
    """Whether a constant varies along the last axes, `dims`, alone and adds no axis to a tensor of `rank`."""
    ours = constant.shape[-len(dims) :]
    return (
        len(constant.shape) <= rank
        and all(size == 1 for size in constant.shape[: -len(dims)])
        and all(size in (1, whole) for size, whole in zip(ours[::-1], dims[::-1], strict=False))
    )


def _follower(
    tensor: gs.Tensor, op_type: str, dims: tuple[int, ...], outputs: set[int]
) -> tuple[gs.Constant | None, gs.Tensor]:
    """The constant that the only reader of a tensor multiplies it by or adds, and what comes out of that."""
    reader = tensor.outputs[0] if len(tensor.outputs) == 1 and id(tensor) not in outputs else None
    if reader is None or not is_onnx(reader, op_type) or tensor.shape is None:
        return None, tensor
    constant = next((other for other in reader.inputs if isinstance(other, gs.Constant)), None)
    if constant is None or not _fits(constant, dims, len(tensor.shape)):
        return None, tensor
    return constant, reader.outputs[0]


def _spread(constant: gs.Constant, dims: tuple[int, ...]) -> Array:
    values = constant.values.reshape(constant.shape[-len(dims) :])
    return np.ascontiguousarray(np.broadcast_to(values, dims), np.float32)
