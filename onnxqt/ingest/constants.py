"""Passes that remove what a constant can replace, or nothing at all."""

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.errors import ModelError
from onnxqt.model import is_onnx

_CONSTANT_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


def fold_constants(graph: gs.Graph) -> list[str]:
    """What can be computed from constants and known shapes.

    The shape folding of graphsurgeon stays off: it takes Cast to float, Mul by 0.5, Cast to integer for an
    integer product, and multiplies by 0.
    """
    before = len(graph.nodes)
    for part in (graph, *graph.subgraphs(recursive=True)):
        part.ir_version = graph.ir_version  # a subgraph has none, and the newest is refused by ONNX Runtime
        for node in part.nodes:
            _type_constant(node)
            _fold_shape(node)
    graph.fold_constants(fold_shapes=False, error_ok=True).cleanup().toposort()
    folded = before - len(graph.nodes)
    return [f"folded {folded} constant node(s)"] if folded else []


def _type_constant(node: gs.Node) -> None:
    """Numbers of a Constant node as a tensor of the type that ONNX gives them; graphsurgeon makes them float64."""
    if not is_onnx(node, "Constant"):
        return
    for name, dtype in _CONSTANT_TYPES.items():
        if name in node.attrs:
            node.attrs["value"] = gs.Constant("", np.array(node.attrs.pop(name), dtype))


def _fold_shape(node: gs.Node) -> None:
    if not is_onnx(node, "Shape"):
        return
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, int) for size in shape):
        return
    end = node.attrs.get("end", len(shape))
    node.outputs[0].to_constant(np.array(shape[node.attrs.get("start", 0) : end], np.int64))
    node.outputs.clear()


def remove_identities(graph: gs.Graph) -> list[str]:
    """Identity, and Dropout in its inference form, between two tensors of the same graph."""
    kept_names = {tensor.name for tensor in graph.outputs}
    removed = 0
    for node in graph.nodes:
        if not is_onnx(node, "Identity", "Dropout"):
            continue
        if node.op == "Dropout" and _trains(node):
            raise ModelError(f"Dropout '{node.name}' is in training mode: export the model in inference mode")
        source, (result, *mask) = node.inputs[0], node.outputs
        if result.name in kept_names or isinstance(source, gs.Constant):
            continue
        if any(tensor.outputs or tensor.name in kept_names for tensor in mask):
            continue
        for consumer in list(result.outputs):
            consumer.inputs = [source if tensor is result else tensor for tensor in consumer.inputs]
        node.outputs.clear()
        removed += 1
    graph.cleanup()
    return [f"removed {removed} Identity/Dropout node(s)"] if removed else []


def _trains(dropout: gs.Node) -> bool:
    """Whether the third input of a Dropout, `training_mode`, is or could be true."""
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return False
    mode = dropout.inputs[2]
    return not isinstance(mode, gs.Constant) or bool(mode.values.any())
