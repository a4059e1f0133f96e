"""Shapes that only a run shows: those of what operators of foreign domains give out."""

import numpy as np
import onnx
from onnx import TypeProto, ValueInfoProto, helper

from onnxqt.errors import ModelError
from onnxqt.model import infer_shapes, is_onnx
from onnxqt.numerics import Array
from onnxqt.runtime import Session, with_outputs
from onnxqt.tensors import is_external

_SIZES = (2, 3)  # of every free dimension, in two runs: what differs between them is free


def measure_foreign(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, list[str]]:
    """Element types and shapes of the outputs of foreign operators, from two runs on ones.

    Shape inference stops at them. A model that does not run on such inputs, or is large, stays as it is.
    """
    known = {value.name for value in (*proto.graph.value_info, *proto.graph.output)}
    foreign = [node for node in proto.graph.node if not is_onnx(node)]
    unknown = [name for node in foreign for name in node.output if name and name not in known]
    if not unknown or any(map(is_external, proto.graph.initializer)):
        return proto, []
    try:
        session = Session(with_outputs(proto, unknown), optimize=False, outputs=unknown)
        runs = [session.run(_ones(proto, size)) for size in _SIZES]
    except ModelError:
        return proto, []
    measured = [_value_info(name, *(run[name] for run in runs)) for name in unknown]
    found = [value for value in measured if value is not None]
    proto.graph.value_info.extend(found)
    return infer_shapes(proto), [
        f"measured the shape of '{value.name}', given by a foreign operator" for value in found
    ]


def _ones(proto: onnx.ModelProto, size: int) -> dict[str, Array]:
    constant = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for value in proto.graph.input:
        if value.name not in constant:
            kind = value.type.tensor_type
            shape = [dim.dim_value if dim.HasField("dim_value") else size for dim in kind.shape.dim]
            feeds[value.name] = np.ones(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds


def _value_info(name: str, first: Array, second: Array) -> ValueInfoProto | None:
    """What two runs show of a tensor; nothing of a sequence or of a rank that differs."""
    if not (isinstance(first, np.ndarray) and isinstance(second, np.ndarray)) or first.ndim != second.ndim:
        return None
    if first.dtype.kind not in "fiub":
        return None
    shape = [a if a == b else None for a, b in zip(first.shape, second.shape, strict=True)]
    kind: TypeProto = helper.make_tensor_type_proto(helper.np_dtype_to_tensor_dtype(first.dtype), shape)
    return helper.make_value_info(name, kind)
