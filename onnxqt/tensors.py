"""Constants of a model that stay in their file until they are read.

A model too large for one protobuf message keeps its weights in files beside it. Ingest leaves large ones there:
their `TensorProto` holds the absolute path of the file, which ONNX Runtime maps into memory, and whoever needs the
values reads just this tensor.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import Message
from onnx import TensorProto, helper, numpy_helper
from onnx_graphsurgeon.ir.tensor import LazyValues

from onnxqt.numerics import Array

_PACKED = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)  # two values in a byte
_LARGE = 1 << 16  # bytes; smaller constants can be shapes, whose values matter to shape inference


def is_external(tensor: TensorProto) -> bool:
    """Whether the values of a tensor are in another file."""
    return bool(tensor.data_location == TensorProto.EXTERNAL)


def external_field(tensor: TensorProto, key: str) -> str:
    """One field of an external tensor: location, offset or length; empty if absent."""
    return next((entry.value for entry in tensor.external_data if entry.key == key), "")


def set_external(tensor: TensorProto, location: str, offset: int) -> None:
    """Let a tensor's values be those in the file `location`, from byte `offset` on."""
    length = nbytes(tensor)
    tensor.ClearField("raw_data")
    tensor.ClearField("external_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def nbytes(tensor: TensorProto) -> int:
    """Size of a tensor's values by its shape and element type, in bytes."""
    bits = 4 if tensor.data_type in _PACKED else 8 * int(_dtype(tensor).itemsize)
    return (int(math.prod(tensor.dims)) * bits + 7) // 8


def values_of(tensor: TensorProto) -> Array:
    """The values of a constant, read from its file if they are there."""
    if not is_external(tensor):
        return numpy_helper.to_array(tensor)
    if tensor.data_type in _PACKED:
        read = TensorProto(dims=tensor.dims, data_type=tensor.data_type, raw_data=raw_bytes(tensor))
        return numpy_helper.to_array(read)
    offset = int(external_field(tensor, "offset") or 0)
    dtype = _dtype(tensor).newbyteorder("<")
    values = np.fromfile(external_field(tensor, "location"), dtype, math.prod(tensor.dims), offset=offset)
    return values.reshape(tensor.dims)


def raw_bytes(tensor: TensorProto) -> bytes:
    """The values of an external tensor as they lie in its file."""
    with Path(external_field(tensor, "location")).open("rb") as file:
        file.seek(int(external_field(tensor, "offset") or 0))
        return file.read(nbytes(tensor))


class FileValues(LazyValues):  # type: ignore[misc]  # graphsurgeon has no types
    """Values of an external tensor in a graph to edit; left alone, they stay in their file."""

    def load(self) -> Array:
        """The values, read anew."""
        return values_of(self.tensor)


def without_large(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its large initializers as inputs: for tools that need no values and would copy them."""
    large = [tensor for tensor in proto.graph.initializer if _is_large(tensor)]
    if not large:
        return proto
    lean = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name != "graph":
            _copy_field(lean, field.name, value)
    for field, value in proto.graph.ListFields():
        if field.name != "initializer":
            _copy_field(lean.graph, field.name, value)
    lean.graph.initializer.extend(tensor for tensor in proto.graph.initializer if not _is_large(tensor))
    lean.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in large)
    return lean


def with_large(lean: onnx.ModelProto, proto: onnx.ModelProto) -> onnx.ModelProto:
    """Undo `without_large` with the large initializers of `proto`; changes and returns `lean`."""
    large = [tensor for tensor in proto.graph.initializer if _is_large(tensor)]
    names = {tensor.name for tensor in large}
    inputs = [value for value in lean.graph.input if value.name not in names]
    del lean.graph.input[:]
    lean.graph.input.extend(inputs)
    lean.graph.initializer.extend(large)
    return lean


def check_model(proto: onnx.ModelProto, full: bool = False) -> None:
    """Run onnx's checker, without the values of large weights; `full` infers and compares all types too.

    Raises:
        onnx.checker.ValidationError: if the model is not valid ONNX.
        onnx.shape_inference.InferenceError: if types or shapes contradict each other.
    """
    onnx.checker.check_model(without_large(proto), full_check=full)


def _is_large(tensor: TensorProto) -> bool:
    return is_external(tensor) or len(tensor.raw_data) > _LARGE


def _copy_field(target: Message, name: str, value: Any) -> None:
    if isinstance(value, int | float | str | bytes):
        setattr(target, name, value)
    elif isinstance(value, Message):
        getattr(target, name).CopyFrom(value)
    else:
        getattr(target, name).extend(value)


def _dtype(tensor: TensorProto) -> np.dtype[np.generic]:
    return np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
