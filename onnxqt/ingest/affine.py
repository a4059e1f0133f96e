"""Passes that fold affine maps of channels into the weights before them."""

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.errors import ModelError
from onnxqt.model import Names, is_onnx
from onnxqt.numerics import Array
from onnxqt.ops import weight_axis


def fold_batch_norm(graph: gs.Graph) -> list[str]:
    """BatchNormalization into the weights before it, else into Mul and Add.

    y = gamma (x - mean) / sqrt(var + eps) + beta = a x + b
    (ONNX BatchNormalization-15, inference form).
    """
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if is_onnx(node, "BatchNormalization")]:
        label = f"BatchNormalization '{node.name}'"
        if node.attrs.get("training_mode", 0) or len(node.outputs) > 1:
            raise ModelError(f"{label} is in training mode: export the model in inference mode (model.eval())")
        if not all(isinstance(tensor, gs.Constant) for tensor in node.inputs[1:]):
            raise ModelError(f"{label} has computed statistics: export the model in inference mode")
        gamma, beta, mean, variance = (tensor.values.astype(np.float64) for tensor in node.inputs[1:])
        a = gamma / np.sqrt(variance + node.attrs.get("epsilon", 1e-5))
        b = beta - mean * a
        target = _scalable_producer(graph, node.inputs[0])
        if target is None:
            _replace_by_affine(graph, names, node, (a, b))
            changes.append(f"wrote {label} as Mul and Add")
            continue
        _scale_output(names, target, a, b)
        target.outputs, node.outputs = node.outputs[:], []
        changes.append(f"folded {label} into {target.op} '{target.name}'")
    graph.cleanup().toposort()
    return changes


def fold_affine(graph: gs.Graph) -> list[str]:
    """Mul and Add by constants per channel, which exporters make of a batch norm, into the weights before them."""
    changes = []
    names = Names(graph)
    for node in [node for node in graph.nodes if is_onnx(node, "Mul", "Add")]:
        constant = next((tensor for tensor in node.inputs if isinstance(tensor, gs.Constant)), None)
        data = next((tensor for tensor in node.inputs if not isinstance(tensor, gs.Constant)), None)
        target = _scalable_producer(graph, data) if constant is not None and data is not None else None
        if target is None or (factors := _per_channel(constant, target)) is None:
            continue
        ones, zeros = np.ones(factors.shape), np.zeros(factors.shape)
        _scale_output(names, target, *((factors, zeros) if node.op == "Mul" else (ones, factors)))
        target.outputs, node.outputs = node.outputs[:], []
        changes.append(f"folded {node.op} '{node.name}' into {target.op} '{target.name}'")
    graph.cleanup().toposort()
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
            has_constant = position < len(node.inputs) and isinstance(node.inputs[position], gs.Constant)
            if value == 1.0 or not has_constant:
                continue
            _set_constant(names, node, position, node.inputs[position].values * np.float32(value))
            node.attrs[factor] = 1.0
            changes.append(f"folded {factor} = {value:g} into Gemm '{node.name}'")
    return changes


def _per_channel(constant: gs.Constant, node: gs.Node) -> Array | None:
    """The values of a constant for each output channel of `node`; None if it has or varies along other axes."""
    weight = node.inputs[1]
    channels = weight.shape[weight_axis(node.op, node.attrs, len(weight.shape))]
    channels *= node.attrs.get("group", 1) if node.op == "ConvTranspose" else 1
    rank, behind = (2, 0) if node.op == "Gemm" else (len(weight.shape), len(weight.shape) - 2)
    shape = (*[1] * (rank - len(constant.shape)), *constant.shape)
    if len(shape) != rank or shape[1] not in (1, channels):
        return None
    if any(size != 1 for size in (*shape[:1], *shape[rank - behind :])):
        return None
    return np.broadcast_to(constant.values.reshape(-1), (channels,)).astype(np.float64)


def _scalable_producer(graph: gs.Graph, tensor: gs.Tensor) -> gs.Node | None:
    """The node whose constant weight and bias can take an affine map of its output channels."""
    if len(tensor.inputs) != 1 or len(tensor.outputs) != 1 or any(tensor is t for t in graph.outputs):
        return None
    node = tensor.inputs[0]
    if not is_onnx(node, "Conv", "ConvTranspose", "Gemm"):
        return None
    return node if all(isinstance(operand, gs.Constant) for operand in node.inputs[1:]) else None


def _scale_output(names: Names, node: gs.Node, a: Array, b: Array) -> None:
    """Give `node` new constants so that channel c of its output becomes `a[c] y + b[c]`."""
    weight = node.inputs[1].values.astype(np.float64)
    bias = node.inputs[2].values.astype(np.float64) if len(node.inputs) > 2 else np.zeros(1)
    if node.op == "ConvTranspose":  # weight (I, O / groups, ...): channel o of group g is row block g, column o
        groups = node.attrs.get("group", 1)
        blocks = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        weight = (blocks * a.reshape(groups, 1, -1, 1)).reshape(weight.shape)
    else:
        axis = weight_axis(node.op, node.attrs, weight.ndim)
        weight = weight * a.reshape([-1 if i == axis else 1 for i in range(weight.ndim)])
    if node.op == "Gemm":
        weight, bias = weight * node.attrs.pop("alpha", 1.0), bias * node.attrs.pop("beta", 1.0)
    _set_constant(names, node, 1, weight)
    _set_constant(names, node, 2, a * bias + b)


def _set_constant(names: Names, node: gs.Node, position: int, value: Array) -> None:
    """Give one node a constant of its own, of the weight's type; other users of the old one keep it."""
    suffix = ("weight", "bias")[position - 1]
    constant = gs.Constant(names.new(f"{node.outputs[0].name}.{suffix}"), value.astype(node.inputs[1].dtype))
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
