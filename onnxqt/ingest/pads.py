"""The pass that gives explicit padding to the operators that can pad themselves."""

import numpy as np
import onnx_graphsurgeon as gs

from onnxqt.model import is_onnx


def fold_pads(graph: gs.Graph) -> list[str]:
    """Pad with zeros into the Convs, and the average pools that count padding, that read it.

    Only where that is exact: no padding of batch or channels, nothing cropped, and no reader of another kind
    (ONNX Pad-13 and Conv-11; AveragePool-19 with count_include_pad = 1).
    """
    changes = []
    outputs = {id(tensor) for tensor in graph.outputs}
    for node in graph.nodes:
        pads = _zero_pads(node) if is_onnx(node, "Pad") and node.outputs else None
        if pads is None or id(node.outputs[0]) in outputs:
            continue
        padded = node.outputs[0]
        readers = list(padded.outputs)
        if not readers or not all(_can_pad(reader, padded, pads) for reader in readers):
            continue
        for reader in readers:
            own = reader.attrs.get("pads", [0] * len(pads))
            reader.attrs["pads"] = [a + b for a, b in zip(own, pads, strict=True)]
            reader.attrs.pop("auto_pad", None)
            if reader.op == "AveragePool":
                reader.attrs["count_include_pad"] = 1
            reader.inputs[0] = node.inputs[0]
            changes.append(f"folded Pad '{node.name}' into {reader.op} '{reader.name}'")
        node.outputs.clear()
    graph.cleanup().toposort()
    return changes


def _zero_pads(node: gs.Node) -> list[int] | None:
    """Zeros that a Pad puts before and behind each spatial axis; None if it does anything else."""
    data, pads, *rest = node.inputs
    value, axes = (*rest, gs.Variable.empty(), gs.Variable.empty())[:2]
    parameters = [tensor for tensor in (pads, value, axes) if not tensor.is_empty()]
    if node.attrs.get("mode", "constant") != "constant" or data.shape is None or len(data.shape) < 3:
        return None
    if not all(isinstance(tensor, gs.Constant) for tensor in parameters):
        return None
    if not value.is_empty() and value.values.any():
        return None
    rank = len(data.shape)
    chosen = list(range(rank)) if axes.is_empty() else [int(axis) % rank for axis in axes.values]
    amounts = np.zeros((2, rank), np.int64)
    amounts[:, chosen] = pads.values.reshape(2, -1)
    if amounts[:, :2].any() or (amounts < 0).any():
        return None
    return [int(amount) for amount in amounts[:, 2:].reshape(-1)]


def _can_pad(reader: gs.Node, padded: gs.Tensor, pads: list[int]) -> bool:
    if not is_onnx(reader, "Conv", "AveragePool") or any(tensor is padded for tensor in reader.inputs[1:]):
        return False
    if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return False
    if reader.op == "Conv":
        return True
    kernel = reader.attrs["kernel_shape"]
    own = reader.attrs.get("pads", [0] * len(pads))
    whole = [a + b for a, b in zip(own, pads, strict=True)]
    counted = bool(reader.attrs.get("count_include_pad", 0)) or not any(own)
    # ONNX Runtime refuses pads of a pool that are as large as its kernel.
    small = all(amount < size for amount, size in zip(whole, [*kernel, *kernel], strict=True))
    return counted and small and not reader.attrs.get("ceil_mode", 0)
