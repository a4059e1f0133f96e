"""Passes that remove what a constant can replace, or nothing at all."""

import math
from collections.abc import Iterator

import numpy as np
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from onnxqt.errors import ModelError
from onnxqt.model import Names, is_onnx
from onnxqt.numerics import Array
from onnxqt.ops import Kind, lookup
from onnxqt.runtime import Session
from onnxqt.tensors import FileValues

_CONSTANT_TYPES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}
_NEVER_FOLDED = (
    *("RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"),
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant", "Dropout", "Identity"),
)
_GROUP = 64  # nodes that are computed together
_FREE_GROWTH = 1 << 20  # bytes that a folded result may always have
_MOST_OF_FILE = 1 << 26  # bytes of a result that are held in the model though an operand stays in its file
_MOST = (1 << 31) - (1 << 20)  # bytes that are never folded: a protobuf message holds 2 GiB


def fold_constants(graph: gs.Graph) -> list[str]:
    """What can be computed from constants, and the branch that an If with a constant condition takes.

    ONNX Runtime computes it; a node that it cannot run just stays. What gives out something else each time stays
    too, and so does what would take much more room than it is made of, unless it is a weight, and what is large and
    made of a weight that stays in its file: a copy in the model would be too large for a protobuf message.
    """
    folded, inlined = 0, list[str]()
    for part in (graph, *graph.subgraphs(recursive=True)):
        part.ir_version = graph.ir_version  # a subgraph has none, and the newest is refused by ONNX Runtime
    progress = True
    while progress:
        progress = False
        for part in (graph, *graph.subgraphs(recursive=True)):
            part.toposort(recurse_subgraphs=False)
            folded += sum(_lower_constant(node) for node in part.nodes) + _evaluate(graph, part)
            node = next((node for node in part.nodes if _has_constant_condition(node)), None)
            if node is not None:
                inlined.append(_inline(graph, part, node))
                progress = True
                break  # the parts are others now
    graph.cleanup().toposort()
    return ([f"folded {folded} constant node(s)"] if folded else []) + inlined


def _lower_constant(node: gs.Node) -> bool:
    """A Constant node as a constant tensor of the type that ONNX gives it; graphsurgeon would make it float64."""
    if not is_onnx(node, "Constant") or not node.outputs:
        return False
    ((name, value),) = node.attrs.items()
    if name in _CONSTANT_TYPES:
        _make_constant(node, [np.array(value, _CONSTANT_TYPES[name])])
    elif isinstance(value, gs.Constant):
        _make_constant(node, [value._values])  # unread: `.values` would load it
    else:
        return False
    return True


def _make_constant(node: gs.Node, values: list[Array]) -> None:
    for tensor, value in zip(list(node.outputs), values, strict=True):
        if not tensor.is_empty():
            tensor.to_constant(value)
    node.outputs.clear()
    node.inputs.clear()


def _evaluate(graph: gs.Graph, part: gs.Graph) -> int:
    """Replace the outputs of nodes by constants where that can and should be done; for how many it was."""
    count, failed = 0, set[int]()
    while ready := [node for node in part.nodes if id(node) not in failed and _is_foldable(node)]:
        for group in _groups(ready):
            if _run(graph, group):
                count += len(group)
                continue
            alone = {id(node) for node in group if len(group) > 1 and _run(graph, [node])}
            failed |= {id(node) for node in group} - alone
            count += len(alone)
    return count


def _groups(nodes: list[gs.Node]) -> Iterator[list[gs.Node]]:
    """Nodes to be computed together: a session for each would take milliseconds, one for all much memory."""
    group: list[gs.Node] = []
    for node in nodes:
        small = sum(map(_nbytes, node.inputs)) <= _FREE_GROWTH
        if not small or len(group) == _GROUP:
            if group:
                yield group
            group = []
        if not small:
            yield [node]
            continue
        group.append(node)
    if group:
        yield group


def _run(graph: gs.Graph, nodes: list[gs.Node]) -> bool:
    """Compute nodes of constants by ONNX Runtime, if it can."""
    results = [tensor for node in nodes for tensor in node.outputs if not tensor.is_empty()]
    operands = {tensor.name: tensor for node in nodes for tensor in node.inputs if not tensor.is_empty()}
    proto = helper.make_graph(
        [OnnxExporter.export_node(node) for node in nodes],
        "folded",
        [],
        [helper.make_empty_tensor_value_info(tensor.name) for tensor in results],
        [numpy_helper.from_array(_read(tensor), name) for name, tensor in operands.items()],
    )
    model = helper.make_model(proto, opset_imports=graph.import_domains, ir_version=graph.ir_version)
    try:
        values = Session(model, optimize=False).run({})
    except ModelError:
        return False
    if not all(np.issubdtype(value.dtype, np.number) or value.dtype == bool for value in values.values()):
        return False
    for node in nodes:
        _make_constant(node, [values.get(tensor.name, np.zeros(0)) for tensor in node.outputs])
    return True


def _read(constant: gs.Constant) -> Array:
    """The values of a constant; what stays in its file is read anew and not kept."""
    return constant._values.load() if isinstance(constant._values, FileValues) else constant.values


def _is_foldable(node: gs.Node) -> bool:
    if not is_onnx(node) or node.op in _NEVER_FOLDED or not node.inputs or not node.outputs or list(node.subgraphs()):
        return False
    if not all(isinstance(tensor, gs.Constant) or tensor.is_empty() for tensor in node.inputs):
        return False
    if any(tensor.type != "tensor_type" or not _is_plain(tensor.dtype) for tensor in node.outputs):
        return False
    if not all(_is_plain(tensor.dtype) for tensor in node.inputs):
        return False
    result = sum(_nbytes(tensor) for tensor in node.outputs)
    source = sum(_nbytes(tensor) for tensor in node.inputs)
    if (result or source) > _MOST_OF_FILE and any(map(_is_in_file, node.inputs)):
        return False
    return max(source, result) < _MOST and (result <= max(_FREE_GROWTH, 2 * source) or _is_weight(node.outputs[0]))


def _is_plain(dtype: object) -> bool:
    """Whether NumPy has the type, and it is a number; the unknown type of an empty or new tensor may be one."""
    return dtype is None or (not isinstance(dtype, int) and np.dtype(dtype).kind in "biuf")  # type: ignore[call-overload]


def _nbytes(tensor: gs.Tensor) -> int:
    """Size of a tensor; 0 where its shape is not known."""
    shape, dtype = tensor.shape, tensor.dtype
    if shape is None or dtype is None or not all(isinstance(size, int) for size in shape):
        return 0
    return int(math.prod(shape) * np.dtype(dtype).itemsize)


def _is_in_file(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and isinstance(tensor._values, FileValues)


def _is_weight(tensor: gs.Tensor) -> bool:
    return any(
        node.inputs[1] is tensor
        for node in tensor.outputs
        if len(node.inputs) > 1 and lookup(node.op, node.domain or "").kind is Kind.WEIGHTED
    )


# --- If ---------------------------------------------------------------------------------------------------


def _has_constant_condition(node: gs.Node) -> bool:
    return is_onnx(node, "If") and isinstance(node.inputs[0], gs.Constant)


def _inline(graph: gs.Graph, part: gs.Graph, node: gs.Node) -> str:
    """Put the branch that an If takes in its place, under names of its own."""
    taken = bool(node.inputs[0].values.reshape(-1)[0])
    branch = node.attrs["then_branch" if taken else "else_branch"]
    part.nodes = [other for other in part.nodes if other is not node]
    names = Names(graph)
    results = list(node.outputs)
    node.inputs.clear()
    node.outputs.clear()
    inner = {id(other) for sub in (branch, *branch.subgraphs(recursive=True)) for other in sub.nodes}
    for tensor in branch.tensors().values():
        produced = any(id(producer) in inner for producer in tensor.inputs)
        local = isinstance(tensor, gs.Constant) and all(id(reader) in inner for reader in tensor.outputs)
        if produced or local:
            tensor.name = names.new(tensor.name)
    part.nodes.extend(branch.nodes)
    around = graph.tensors()
    for result, value in zip(results, list(branch.outputs), strict=True):
        if not value.inputs and not isinstance(value, gs.Constant):  # a tensor of the graph around it
            value = around.get(value.name, value)
        if not result.is_empty():
            part.nodes.append(gs.Node("Identity", f"{node.name}.{result.name}", inputs=[value], outputs=[result]))
    return f"inlined the {'then' if taken else 'else'} branch of If '{node.name}', whose condition is constant"


def name_inner_nodes(graph: gs.Graph) -> None:
    """Give every node of a subgraph a name that no other node of the model has, in place.

    Graphsurgeon takes two nodes for the same one if name, inputs and outputs are equal, and then loses track of who
    reads a tensor: nodes without a name in a branch that is inlined would be such.
    """
    taken = {node.name for node in graph.nodes}
    for part in graph.subgraphs(recursive=True):
        for node in part.nodes:
            name = stem = node.name or f"{node.op}_inner"
            number = 0
            while name in taken:
                number += 1
                name = f"{stem}_{number}"
            taken.add(name)
            node.name = name


# --- Identity and Dropout ---------------------------------------------------------------------------------


def remove_identities(graph: gs.Graph) -> list[str]:
    """Identity, Dropout in its inference form, and Cast to the same type, between two tensors of a graph."""
    removed = 0
    for part in (graph, *graph.subgraphs(recursive=True)):
        removed += sum(_bypass(part, node) for node in part.nodes)
    graph.cleanup()
    return [f"removed {removed} Identity/Dropout/Cast node(s)"] if removed else []


def _bypass(part: gs.Graph, node: gs.Node) -> bool:
    """Let the readers of a node read its input, if that is the same."""
    if not is_onnx(node, "Identity", "Dropout", "Cast", "CastLike") or not node.outputs:
        return False
    if node.op == "Dropout" and _trains(node):
        raise ModelError(f"Dropout '{node.name}' is in training mode: export the model in inference mode")
    source, (result, *mask) = node.inputs[0], node.outputs
    if node.op in ("Cast", "CastLike") and not _same_type(source, result):
        return False
    visible = {tensor.name for tensor in part.outputs}
    if any(tensor.outputs or tensor.name in visible for tensor in mask):
        return False
    if result.name in visible:
        return _name_source(part, node)
    for reader in list(result.outputs):
        reader.inputs = [source if tensor is result else tensor for tensor in reader.inputs]
    node.outputs.clear()
    return True


def _same_type(source: gs.Tensor, result: gs.Tensor) -> bool:
    known = source.dtype is not None and result.dtype is not None
    return known and source.dtype == result.dtype and source.type == result.type == "tensor_type"


def _name_source(part: gs.Graph, node: gs.Node) -> bool:
    """Let the node before give out the output of `part` that `node` only copies, where nobody else reads it."""
    source, result = node.inputs[0], node.outputs[0]
    if isinstance(source, gs.Constant) or len(source.inputs) != 1 or len(source.outputs) != 1:
        return False
    (producer,) = source.inputs
    local = any(other is producer for other in part.nodes)
    if not local or any(tensor.name == source.name for tensor in (*part.inputs, *part.outputs)):
        return False
    node.outputs.clear()
    producer.outputs = [result if tensor is source else tensor for tensor in producer.outputs]
    return True


def _trains(dropout: gs.Node) -> bool:
    """Whether the third input of a Dropout, `training_mode`, is or could be true."""
    if len(dropout.inputs) < 3 or dropout.inputs[2].is_empty():
        return False
    mode = dropout.inputs[2]
    return not isinstance(mode, gs.Constant) or bool(mode.values.any())
