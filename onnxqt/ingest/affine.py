"""Passes that fold affine maps of channels into the weights before or behind them."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.errors import ModelError
from onnxqt.model import Names, is_onnx
from onnxqt.numerics import Array
from onnxqt.ops import weight_axis


@dataclass(frozen=True, eq=False)
class _Scalable:
    """A node whose constant weight and bias can take an affine map of its output channels.

    Attributes:
        node: Conv, ConvTranspose, Gemm or MatMul.
        add: which adds the constant bias of a MatMul.
    """

    node: gs.Node
    add: gs.Node | None = None

    @property
    def last(self) -> gs.Node:
        """The node that gives out the result."""
        return self.add or self.node

    @property
    def channels(self) -> int:
        """Count of output channels."""
        weight = self.node.inputs[1]
        count = int(weight.shape[weight_axis(self.node.op, self.node.attrs, len(weight.shape))])
        return count * int(self.node.attrs.get("group", 1)) if self.node.op == "ConvTranspose" else count


def fold_batch_norm(graph: gs.Graph) -> list[str]:
    """BatchNormalization into the weights before it, or behind it where nothing is padded, else into Mul and Add.

    One whose scale, shift or statistics are computed stays.

    y = gamma (x - mean) / sqrt(var + eps) + beta = a x + b
    (ONNX BatchNormalization-15, inference form).
    """
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if is_onnx(node, "BatchNormalization")]:
        label = f"BatchNormalization '{node.name}'"
        factors = _statistics(node, label)
        if factors is None:
            continue
        a, b = factors
        target = _scalable_producer(graph, node.inputs[0])
        if target is not None and target.node.op == "MatMul" and len(node.inputs[0].shape or ()) != 2:
            target = None  # the channels are not the last axis
        if target is not None:
            changes.append(f"folded {label} into {target.node.op} '{target.node.name}'")
            if target.node.op == "MatMul" and target.add is None:
                _scale_output(names, target, a, None)
                bias = gs.Constant(names.new(f"{node.outputs[0].name}.bias"), b.astype(np.float32))
                node.op, node.attrs, node.inputs = "Add", {}, [node.inputs[0], bias]
                continue
            _scale_output(names, target, a, b)
            target.last.outputs, node.outputs = node.outputs[:], []
        elif (reader := _scalable_reader(graph, node.outputs[0])) is not None:
            _scale_input(names, reader, a, b)
            reader.inputs[0] = node.inputs[0]
            changes.append(f"folded {label} into {reader.op} '{reader.name}' behind it")
        else:
            _replace_by_affine(graph, names, node, (a, b))
            changes.append(f"wrote {label} as Mul and Add")
    graph.cleanup().toposort()
    return changes


def _statistics(node: gs.Node, label: str) -> tuple[Array, Array] | None:
    """The factors and summands of a BatchNormalization, one for each channel; None if they are computed.

    Raises:
        ModelError: if it is in training mode.
    """
    if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
        raise ModelError(f"{label} is in training mode: export the model in inference mode (model.eval())")
    if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
        return None
    gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:])
    a = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
    return a, beta - mean * a


def fold_affine(graph: gs.Graph) -> list[str]:
    """Mul, Div, Add and Sub by constants per channel into the weights before them.

    Exporters make them of a batch norm. The bias that is added to a MatMul is left to stand alone: ONNX has no
    other form of it.
    """
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if is_onnx(node, "Mul", "Div", "Add", "Sub")]:
        data, constant = node.inputs if isinstance(node.inputs[1], gs.Constant) else list(node.inputs)[::-1]
        if not isinstance(constant, gs.Constant) or (data is node.inputs[1] and node.op in ("Div", "Sub")):
            continue
        target = None if isinstance(data, gs.Constant) else _scalable_producer(graph, data)
        if target is None or (node.op in ("Add", "Sub") and target.node.op == "MatMul" and target.add is None):
            continue
        values = _per_channel(constant, target, data)
        if values is None or (node.op == "Div" and not values.all()):
            continue
        if node.op in ("Mul", "Div"):
            _scale_output(names, target, values if node.op == "Mul" else 1 / values, None)
        else:
            _scale_output(names, target, None, values if node.op == "Add" else -values)
        target.last.outputs, node.outputs = node.outputs[:], []
        changes.append(f"folded {node.op} '{node.name}' into {target.node.op} '{target.node.name}'")
    graph.cleanup().toposort()
    return changes


def split_transposed_gemm(graph: gs.Graph) -> list[str]:
    """The transposition that a Gemm makes of its computed left operand becomes a node: integer kernels have none."""
    changes = []
    names = Names(graph)
    for node in list(graph.nodes):
        if not is_onnx(node, "Gemm") or not node.attrs.get("transA", 0):
            continue
        data = node.inputs[0]
        if isinstance(data, gs.Constant) or data.dtype != np.float32:
            continue
        name = names.new(f"{data.name}.transposed")
        node.inputs[0] = gs.Variable(name, data.dtype, None if data.shape is None else list(data.shape)[::-1])
        graph.nodes.append(gs.Node("Transpose", f"{node.name}.transposed", {"perm": [1, 0]}, [data], [node.inputs[0]]))
        del node.attrs["transA"]
        changes.append(f"wrote the transposed left operand of Gemm '{node.name}' as Transpose")
    graph.toposort()
    return changes


def fold_gemm_factors(graph: gs.Graph) -> list[str]:
    """Gemm alpha and beta into constant weights and bias: alpha A B + beta C."""
    changes = []
    names = Names(graph)
    for node in graph.nodes:
        if not is_onnx(node, "Gemm"):
            continue
        for position, factor in ((1, "alpha"), (2, "beta")):
            value = node.attrs.get(factor, 1.0)
            operand = node.inputs[position] if position < len(node.inputs) else None
            if value == 1.0 or not isinstance(operand, gs.Constant) or operand.dtype != np.float32:
                continue
            _set_constant(names, node, position, operand.values * np.float32(value))
            node.attrs[factor] = 1.0
            changes.append(f"folded {factor} = {value:g} into Gemm '{node.name}'")
    return changes


def _per_channel(constant: gs.Constant, target: _Scalable, output: gs.Tensor) -> Array | None:
    """The values of a constant for each output channel; None if it has or varies along other axes."""
    op_type = target.node.op
    if op_type == "MatMul":
        if output.shape is None:
            return None
        rank, axis = len(output.shape), len(output.shape) - 1
    else:
        rank, axis = (2 if op_type == "Gemm" else len(target.node.inputs[1].shape)), 1
    shape = (*[1] * (rank - len(constant.shape)), *constant.shape)
    if len(shape) != rank or shape[axis] not in (1, target.channels):
        return None
    if any(size != 1 for i, size in enumerate(shape) if i != axis):
        return None
    return np.broadcast_to(constant.values.reshape(-1), (target.channels,)).astype(np.float64)


def _scalable_producer(graph: gs.Graph, tensor: gs.Tensor) -> _Scalable | None:
    """What computes a tensor that nobody else reads, if it has constant weights."""
    node = _only_producer(graph, tensor)
    if node is None:
        return None
    if is_onnx(node, "Add"):
        product, bias = node.inputs if isinstance(node.inputs[1], gs.Constant) else list(node.inputs)[::-1]
        target = None if isinstance(product, gs.Constant) else _scalable_producer(graph, product)
        if target is None or target.node.op != "MatMul" or target.add is not None or not isinstance(bias, gs.Constant):
            return None
        return _Scalable(target.node, node) if _per_channel(bias, target, product) is not None else None
    if not is_onnx(node, "Conv", "ConvTranspose", "Gemm", "MatMul") or not _has_constants(node):
        return None
    return _Scalable(node) if len(node.inputs[1].shape) > 1 else None


def _only_producer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    return tensor.inputs[0]


def _has_constants(node: gs.Node) -> bool:
    """Whether weight and bias are float32 constants; an omitted bias is dropped from the inputs."""
    while node.inputs[-1].is_empty():
        node.inputs.pop()
    return all(isinstance(operand, gs.Constant) and operand.dtype == np.float32 for operand in node.inputs[1:])


def _scalable_reader(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The only reader of a tensor, if an affine map of its input channels is one of its weights.

    Padding is zero behind the map, not before it: a Conv that pads is not.
    """
    if len(tensor.outputs) != 1 or any(tensor is output for output in graph.outputs):
        return None
    node = tensor.outputs[0]
    if not is_onnx(node, "Conv", "Gemm") or node.inputs[0] is not tensor or not _has_constants(node):
        return None
    if not any(node is other for other in graph.nodes):  # it belongs to a subgraph
        return None
    if node.op == "Gemm":
        return None if node.attrs.get("transA", 0) or tensor.shape is None else node
    pads = any(node.attrs.get("pads", ())) or node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return None if pads else node


def _scale_output(names: Names, target: _Scalable, a: Array | None, b: Array | None) -> None:
    """New constants so that channel c of the output becomes `a[c] y + b[c]`; None stands for 1 or 0."""
    node = target.node
    if a is not None:
        _set_constant(names, node, 1, _scaled_weight(node, a))
    place = _bias_of(target)
    old = None if place is None else place[0].inputs[place[1]].values.astype(np.float64)
    if old is None and b is None:
        return
    beta = node.attrs.pop("beta", 1.0) if node.op == "Gemm" else 1.0
    old = None if old is None else old * beta
    new = (0.0 if old is None else old if a is None else a * old) + (0.0 if b is None else b)
    _set_constant(names, *(place or (node, 2)), np.asarray(new))


def _bias_of(target: _Scalable) -> tuple[gs.Node, int] | None:
    """The node that reads the bias, and at which place."""
    if target.add is not None:
        return target.add, 1 if isinstance(target.add.inputs[1], gs.Constant) else 0
    return (target.node, 2) if len(target.node.inputs) > 2 else None


def _scaled_weight(node: gs.Node, a: Array) -> Array:
    weight = node.inputs[1].values.astype(np.float64)
    if node.op == "ConvTranspose":  # weight (I, O / groups, ...): channel o of group g is row block g, column o
        groups = node.attrs.get("group", 1)
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        scaled: Array = (blocks * a.reshape(groups, 1, -1, 1)).reshape(weight.shape)
        return scaled
    axis = weight_axis(node.op, node.attrs, weight.ndim)
    weight = weight * a.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    result: Array = weight * (node.attrs.pop("alpha", 1.0) if node.op == "Gemm" else 1.0)
    return result


def _scale_input(names: Names, node: gs.Node, a: Array, b: Array) -> None:
    """Give `node` new constants so that it computes of x what it computed of `a[c] x + b[c]`."""
    weight = node.inputs[1].values.astype(np.float64)
    bias = node.inputs[2].values.astype(np.float64) if len(node.inputs) > 2 else np.zeros(1)
    if node.op == "Gemm":
        axis = 1 - weight_axis(node.op, node.attrs, 2)
        weight = weight * node.attrs.pop("alpha", 1.0)
        shift = np.tensordot(b, weight, (0, axis))
        weight, bias = weight * np.expand_dims(a, 1 - axis), bias * node.attrs.pop("beta", 1.0)
    else:  # weight (O, I / groups, ...): output channel o reads the inputs of its group
        groups = node.attrs.get("group", 1)
        a, b = (
            np.repeat(values.reshape(groups, -1), weight.shape[0] // groups, 0).reshape(
                *weight.shape[:2], *[1] * (weight.ndim - 2)
            )
            for values in (a, b)
        )
        shift = (weight * b).reshape(weight.shape[0], -1).sum(1)
        weight = weight * a
    _set_constant(names, node, 1, weight)
    _set_constant(names, node, 2, bias + shift)


def _set_constant(names: Names, node: gs.Node, position: int, value: Array) -> None:
    """Give one node a constant of its own, of the weight's type; other users of the old one keep it."""
    suffix = "weight" if position == 1 and node.op != "Add" else "bias"
    constant = gs.Constant(names.new(f"{node.outputs[0].name}.{suffix}"), np.asarray(value, np.float32))
    if position < len(node.inputs):
        node.inputs[position] = constant
    else:
        node.inputs.append(constant)


def _replace_by_affine(graph: gs.Graph, names: Names, node: gs.Node, factors: tuple[Array, Array]) -> None:
    x, y = node.inputs[0], node.outputs[0]
    if x.shape is None:
        raise ModelError(f"BatchNormalization '{node.name}' has an input of unknown rank: export with shapes")
    shape = [-1] + [1] * (len(x.shape) - 2)
    scale, shift = (
        gs.Constant(names.new(f"{y.name}.{name}"), value.reshape(shape).astype(x.dtype))
        for name, value in zip(("scale", "shift"), factors, strict=True)
    )
    scaled = gs.Variable(names.new(f"{y.name}.scaled"), x.dtype)
    node.outputs = []
    graph.nodes.append(gs.Node("Mul", f"{node.name}.scale", inputs=[x, scale], outputs=[scaled]))
    graph.nodes.append(gs.Node("Add", f"{node.name}.shift", inputs=[scaled, shift], outputs=[y]))
