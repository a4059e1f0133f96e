"""What is brought into a form that a graph can be edited in, and what has none and is refused."""

import math

import numpy as np
import onnx
from onnx import AttributeProto, numpy_helper

from onnxqt.errors import ModelError
from onnxqt.model import graphs_of, nodes_of

_MOST = 1 << 31  # bytes of a constant in a model
_LOST = ("TENSORS", "GRAPHS", "SPARSE_TENSOR", "SPARSE_TENSORS", "TYPE_PROTO", "TYPE_PROTOS")


def write_dense(proto: onnx.ModelProto) -> list[str]:
    """Write sparse initializers, and sparse values of Constant nodes, as dense ones, in place.

    Raises:
        ModelError: if one has 2 GiB or more.
    """
    changes = []
    for graph in graphs_of(proto.graph):
        for sparse in graph.sparse_initializer:
            name = sparse.values.name
            graph.initializer.append(numpy_helper.from_array(_dense(sparse, name), name))
            changes.append(f"wrote sparse constant '{name}' as a dense one")
        del graph.sparse_initializer[:]
    for node in nodes_of(proto.graph):
        for attribute in node.attribute:
            if node.op_type == "Constant" and attribute.name == "sparse_value":
                dense = _dense(attribute.sparse_tensor, node.output[0])
                attribute.CopyFrom(onnx.helper.make_attribute("value", numpy_helper.from_array(dense)))
                changes.append(f"wrote sparse constant '{node.output[0]}' as a dense one")
    return changes


def _dense(sparse: onnx.SparseTensorProto, name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    values, indices = numpy_helper.to_array(sparse.values), numpy_helper.to_array(sparse.indices)
    if math.prod(sparse.dims) * values.itemsize >= _MOST:
        raise ModelError(f"sparse constant '{name}' of shape {list(sparse.dims)} has 2 GiB or more: make it smaller")
    dense = np.zeros(tuple(sparse.dims), values.dtype)
    place = tuple(indices.T) if indices.ndim == 2 else np.unravel_index(indices, dense.shape)
    dense[place] = values
    return dense


def drop_default_inputs(proto: onnx.ModelProto) -> list[str]:
    """Say which initializers are inputs too, by which a caller could replace them: they become constants."""
    initializers = {tensor.name for tensor in proto.graph.initializer}
    names = [value.name for value in proto.graph.input if value.name in initializers]
    if not names:
        return []
    return [f"made constants of {len(names)} initializer(s) that are inputs too, such as '{names[0]}'"]


def check_supported(proto: onnx.ModelProto) -> None:
    """Refuse what the editing of graphs would lose.

    Raises:
        ModelError: naming the input, output or node.
    """
    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        for value in values:
            form = value.type.WhichOneof("value") or "tensor_type"
            if form != "tensor_type":
                form = form.removesuffix("_type").replace("_", " ")
                raise ModelError(
                    f"{kind} '{value.name}' is {'an' if form[0] in 'aeiou' else 'a'} {form}, not a tensor: export the "
                    f"model with tensors as inputs and outputs{_hint(proto)}"
                )
    for node in nodes_of(proto.graph):
        label = f"{node.op_type} '{node.name or node.output[0]}'"
        if node.op_type == "Optional" and not node.domain:
            raise ModelError(f"{label} makes an optional value, which is not supported: export the model without it")
        for attribute in node.attribute:
            if AttributeProto.AttributeType.Name(attribute.type) in _LOST or not _is_text(attribute):
                raise ModelError(
                    f"{label} has an attribute '{attribute.name}' of a form that is not supported: "
                    "export the model without this node"
                )


def _hint(proto: onnx.ModelProto) -> str:
    """What a user of scikit-learn can do about outputs that are no tensors."""
    classical = any(entry.domain == "ai.onnx.ml" for entry in proto.opset_import)
    return " (scikit-learn: without ZipMap)" if classical else ""


def _is_text(attribute: AttributeProto) -> bool:
    """Whether the strings of an attribute are text."""
    try:
        for value in (attribute.s, *attribute.strings):
            value.decode()
    except UnicodeDecodeError:
        return False
    return True
