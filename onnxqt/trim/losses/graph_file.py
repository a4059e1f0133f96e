"""A loss graph: an ONNX model of the user's that computes a loss, checked and made part of the training graph."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import compose, inliner

from onnxqt.data import LABELS, InputSpec
from onnxqt.errors import ModelError, TrainingError
from onnxqt.ingest import ingest
from onnxqt.ingest.files import read
from onnxqt.model import GraphIndex, Model, editable, infer_shapes, opset_of
from onnxqt.opset import convert_opset
from onnxqt.trim.gradients import find_flow
from onnxqt.trim.losses.terms import Binding

_PREFIX = "onnxqt.graph:"  # of every name in a loss graph
_ORIGINAL = "original:"
# Operators of ONNX that have no gradient here, but are defined by others that do.
_WRITTEN_OUT = (("", "SoftmaxCrossEntropyLoss"), ("", "NegativeLogLikelihoodLoss"))


def load_loss_graph(path: str | os.PathLike[str], opset: int) -> Model:
    """A loss graph, normalised as a model is and in the operator set of the model in training.

    Raises:
        ModelError: for a file that `onnxqt.ingest.ingest` refuses, or that cannot be written in this operator set.
    """
    newest = onnx.defs.onnx_opset_version()
    own = opset_of(read(Path(path))[0])
    if own > newest:
        raise ModelError(
            f"the loss graph '{path}' has opset {own}, but only those up to {newest} are known: export it with opset "
            f"{opset}"
        )
    loaded = ingest(Path(path))
    proto = loaded.proto
    if any((node.domain, node.op_type) in _WRITTEN_OUT for node in proto.graph.node):
        proto = infer_shapes(inliner.inline_selected_functions(proto, list(_WRITTEN_OUT), inline_schema_functions=True))
    if loaded.opset != opset:
        try:
            proto = infer_shapes(convert_opset(proto, opset))
        except ModelError as error:
            raise ModelError(f"the loss graph '{path}': {error}") from error
    return Model(_with_node_names(proto), loaded.sha256, loaded.changes)


def _with_node_names(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose nodes have names of their own; those that were written out have none."""
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    for index, node in enumerate(named.graph.node):
        node.name = f"{node.name or node.op_type}_{index}"
    return named


def find_bindings(path: str, loss: Model, model: Model, labels: Sequence[InputSpec]) -> tuple[Binding, ...]:
    """What the inputs of a loss graph are fed with.

    Raises:
        TrainingError: for an input that is neither an output of `model` nor an array of labels, or differs from it
            in type or shape; for a result that is no float scalar; for a node that no gradient passes.
    """
    where = f"the loss graph '{path}'"
    _check_result(where, loss.graph)
    arrays = {spec.name: spec for spec in labels}
    bindings = tuple(_binding(where, name, model, arrays) for name in loss.graph.inputs)
    for binding in bindings:
        _check_operand(where, binding, loss.graph, model.graph, arrays)
    _check_gradient(where, loss, [binding.name for binding in bindings if binding.source == "output"])
    return bindings


def _check_result(where: str, graph: GraphIndex) -> None:
    if len(graph.outputs) != 1:
        raise TrainingError(f"{where} has the outputs {list(graph.outputs)}: give it one, the loss")
    (name,) = graph.outputs
    shape = graph.shape(name)
    if not graph.is_float(name) or shape not in ((), (1,)):
        have = f"{graph.dtype(name)} of shape {shape}" if shape is not None else f"{graph.dtype(name)} of unknown rank"
        raise TrainingError(
            f"{where} gives out '{name}', {have}: end it in one float32 number, such as a ReduceMean over all axes"
        )


def _binding(where: str, name: str, model: Model, arrays: Mapping[str, InputSpec]) -> Binding:
    outputs = model.graph.outputs
    if name in outputs:
        return Binding(name, "output", name)
    if name.removeprefix(_ORIGINAL) in outputs:
        return Binding(name, "original", name.removeprefix(_ORIGINAL))
    if name in arrays:
        return Binding(name, "labels", name, arrays[name].dtype.kind == "i")
    have = f"the arrays {list(arrays)}" if arrays else f"no array '{LABELS}'"
    raise TrainingError(
        f"{where} has the input '{name}', but the model has the outputs {list(outputs)} (each also as "
        f"'{_ORIGINAL}NAME', of the original model) and the samples have {have}: rename the input"
    )


def _check_operand(
    where: str, binding: Binding, loss: GraphIndex, model: GraphIndex, arrays: Mapping[str, InputSpec]
) -> None:
    name, wanted, shape = binding.name, loss.dtype(binding.name), loss.shape(binding.name)
    spec = arrays.get(binding.of) if binding.source == "labels" else None
    have = spec.dtype if spec else model.dtype(binding.of)
    own = spec.shape if spec else model.shape(binding.of)
    if have != wanted and not (spec and have.kind == "i" and wanted.kind in "if"):
        raise TrainingError(f"{where} takes '{name}' as {wanted}, but it is {have}: change the input's type to {have}")
    if not shapes_agree(shape, own):
        raise TrainingError(f"{where} takes '{name}' of shape {shape}, but it has {own}: change the input's shape")


def shapes_agree(one: Sequence[int | None] | None, other: Sequence[int | None] | None) -> bool:
    """Whether two shapes can be the same, as far as they are known."""
    if one is None or other is None:
        return True
    return len(one) == len(other) and all(None in pair or pair[0] == pair[1] for pair in zip(one, other, strict=True))


def _check_gradient(where: str, loss: Model, trained: Sequence[str]) -> None:
    """Refuse a loss graph that would train nothing, or not as it says."""
    floats = [name for name in trained if loss.graph.is_float(name)]
    flow = find_flow(loss, floats, loss.graph.outputs)
    if flow.lost:
        reason = next(iter(flow.lost.values()))
        raise TrainingError(f"{where} cannot be trained with: {reason}; write it with other operators")
    if not any(name in flow.reached for name in floats):
        raise TrainingError(f"{where} does not depend on an output of the model: name an input like one of them")


def inline(graph: gs.Graph, loss: Model, values: Mapping[str, gs.Tensor]) -> gs.Variable:
    """Append a loss graph to a graph, in place, with a prefix before its names.

    Args:
        graph: to append to.
        loss: what `load_loss_graph` gave.
        values: what its inputs are fed with; integers become what it takes.

    Returns:
        The loss, a scalar, or a vector of one element.
    """
    part = editable(compose.add_prefix(loss.proto, _PREFIX))
    for tensor in part.inputs:
        name = tensor.name.removeprefix(_PREFIX)
        source = values[name]
        wanted = np.dtype(tensor.dtype)
        to = {"to": int(onnx.helper.np_dtype_to_tensor_dtype(wanted))} if source.dtype != wanted else {}
        op_type = "Cast" if to else "Identity"
        graph.nodes.append(gs.Node(op_type, f"{_PREFIX}input:{name}", to, inputs=[source], outputs=[tensor]))
    graph.nodes.extend(part.nodes)
    known = {entry.domain for entry in graph.import_domains}
    graph.import_domains = [*graph.import_domains, *(e for e in part.import_domains if e.domain not in known)]
    (result,) = part.outputs
    return result
