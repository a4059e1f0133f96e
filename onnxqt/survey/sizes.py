"""The shapes of a model's tensors when it computes one batch of the smallest size that it takes."""

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from onnxqt.data import InputSpec, fixed_batch, has_batch_axis
from onnxqt.errors import ModelError
from onnxqt.model import GraphIndex, Model, infer_shapes, input_specs, is_onnx
from onnxqt.tensors import without_large

Dimension = int | str | None


@dataclass(frozen=True)
class Value:
    """An input or output of the model.

    Attributes:
        name: its name.
        dtype: element type, such as float32.
        shape: sizes, names of free dimensions, None for free ones without a name; None if not even the rank is known.
        batch_axis: the axis that counts samples; None where there is none or it is not known.
    """

    name: str
    dtype: str
    shape: tuple[Dimension, ...] | None
    batch_axis: int | None


@dataclass(frozen=True, eq=False)
class Sizes:
    """The shapes of one batch.

    Attributes:
        graph: the graph with these shapes.
        batch: samples of the batch: 1, or what the model prescribes.
        batched: whether the first axis of every input counts samples.
        names: of the free dimensions that are the batch.
    """

    graph: GraphIndex
    batch: int
    batched: bool
    names: frozenset[str]


def find_sizes(model: Model) -> Sizes:
    """Infer the shapes of `model` anew with a free batch axis of 1; other free dimensions stay unknown."""
    specs = _specs(model)
    batched = bool(specs) and has_batch_axis(specs)
    lean = onnx.ModelProto()
    lean.CopyFrom(without_large(model.proto))
    names = _bind(lean, set(model.graph.inputs)) if batched else frozenset[str]()
    return Sizes(GraphIndex(infer_shapes(lean)), (fixed_batch(specs) or 1) if batched else 1, batched, names)


def values_of_model(model: Model, sizes: Sizes) -> tuple[tuple[Value, ...], tuple[Value, ...]]:
    """The inputs and the outputs of a model."""
    names = set(model.graph.inputs)
    inputs = [_value(value, 0 if sizes.batched else None) for value in model.proto.graph.input if value.name in names]
    outputs = [_value(value, _batch_axis(sizes, value)) for value in model.proto.graph.output]
    return tuple(inputs), tuple(outputs)


def _specs(model: Model) -> Sequence[InputSpec]:
    try:
        return input_specs(model)
    except ModelError:  # one of the survey's problems
        return ()


def _bind(proto: onnx.ModelProto, inputs: set[str]) -> frozenset[str]:
    """Set the free first dimension of every input, and those of its name, to 1, in place; gives out the names."""
    first = [value.type.tensor_type.shape.dim[0] for value in proto.graph.input if value.name in inputs]
    free = [dim for dim in first if not dim.HasField("dim_value")]
    names = frozenset(dim.dim_param for dim in free) - {""}
    foreign = {tensor for node in proto.graph.node if not is_onnx(node) for tensor in node.output}
    for value in proto.graph.output:
        if value.name not in foreign:
            value.type.tensor_type.ClearField("shape")
    for value in (*proto.graph.input, *proto.graph.value_info, *proto.graph.output):
        free += [dim for dim in value.type.tensor_type.shape.dim if dim.dim_param in names]
    for dim in free:
        dim.dim_value = 1
    return names


def _value(value: onnx.ValueInfoProto, batch_axis: int | None) -> Value:
    tensor = value.type.tensor_type
    dtype = onnx.TensorProto.DataType.Name(tensor.elem_type)
    shape = tuple(_dimension(dim) for dim in tensor.shape.dim) if tensor.HasField("shape") else None
    return Value(value.name, {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype, dtype.lower()), shape, batch_axis)


def _dimension(dim: onnx.TensorShapeProto.Dimension) -> Dimension:
    return dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None


def _batch_axis(sizes: Sizes, value: onnx.ValueInfoProto) -> int | None:
    """0 where the first dimension of an output is the batch."""
    first = next((_dimension(dim) for dim in value.type.tensor_type.shape.dim), None)
    inferred = sizes.graph.shape(value.name) or (None,)
    return 0 if sizes.batched and (first in sizes.names or inferred[0] == sizes.batch) else None
