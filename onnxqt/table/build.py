"""The neutral table of a float model, and whether a table belongs to a model."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import onnx

from onnxqt.calibrate import Quantizers, RangeTable
from onnxqt.errors import ExportError
from onnxqt.model import GraphIndex, Model, Node
from onnxqt.numerics import Array, QParams
from onnxqt.ops import Kind, lookup
from onnxqt.plan import IntegerNode, QuantPlan
from onnxqt.runtime import installed
from onnxqt.table.form import Entry, NodeRef, Role, Table
from onnxqt.table.stats import constant_stats, stats_of
from onnxqt.table.views import merged_views, with_biases

CAPTURED = -1  # the input through which a node reads a tensor for its subgraphs


def build_table(
    model: Model, plan: QuantPlan, ranges: RangeTable, quantizers: Mapping[str, Quantizers], file: str
) -> Table:
    """The table of a float model under some schemes.

    It has an entry for each float32 activation that exists in a quantized network, with the reason where it stays
    float, and for each constant that Conv, ConvTranspose, Gemm or MatMul multiply by or add as their bias. Tensors
    that are fused into another one have none (see `Entry.fused_from`), nor have constant operands of other nodes.

    Args:
        model: the float model.
        plan: its quantizer sites.
        ranges: its calibrated activations; only those in it have statistics.
        quantizers: the parameters of each scheme, by its name; under a scheme of weights alone, without activations.
        file: the name of its file. `Table.model_sha256` is `model.sha256`: replace it where `file` is another file.
    """
    graph = model.graph
    schemes = tuple(quantizers)
    fused = _fused(graph, plan)
    entries = [
        *_activations(graph, plan, ranges, quantizers, fused),
        *_weights(graph, plan, quantizers),
        *_biases(graph, plan),
    ]
    return Table(
        entries=with_biases(entries),
        schemes=schemes,
        model_file=file,
        model_sha256=model.sha256,
        graph_sha256=graph_sha256(model),
        opset=model.opset,
        samples=ranges.samples,
        ranges=next((found.ranges for found in quantizers.values() if found.ranges), ""),
        producer=f"onnxqt {installed('onnxqt') or ''}".strip(),
    )


def check_belongs(table: Table, model: Model) -> None:
    """Make sure that a table was made for a model: for its names, its graph, and the values of its constants.

    Raises:
        ExportError: naming what differs.
    """
    graph = model.graph
    of = f"the table of '{table.model_file}'" if table.model_file else "the table"
    for entry in table.entries:
        if not _exists(graph, entry.name):
            raise ExportError(f"{of} has '{entry.name}', which the model lacks: give the table of this model")
        shape = graph.shape(entry.name)
        if entry.shape is not None and shape is not None and entry.shape != shape:
            raise ExportError(
                f"{of} has '{entry.name}' with the shape {list(entry.shape)}, but in the model it has {list(shape)}: "
                "give the table of this model"
            )
    if table.graph_sha256 and table.graph_sha256 != graph_sha256(model):
        raise ExportError(f"{of} was made for another graph with the same tensors: give the table of this model")
    for entry in table.entries:
        value = graph.constant(entry.name) if entry.sha256 else None
        if value is not None and constant_sha256(value) != entry.sha256:
            raise ExportError(
                f"{of} was made for other values of '{entry.name}': make the table of this model, or merge this one "
                "into it"
            )


def graph_sha256(model: Model) -> str:
    """SHA-256 of what a graph computes with, but for numbers.

    Of its inputs, outputs and initializers by name, element type and shape, and its nodes by name, operator, inputs,
    outputs and the names of their attributes.
    """
    proto, graph = model.proto.graph, model.graph
    content = {
        "inputs": [_kind(graph, value) for value in proto.input if value.name in graph.inputs],
        "outputs": [_kind(graph, value) for value in proto.output],
        "initializers": sorted([tensor.name, tensor.data_type, list(tensor.dims)] for tensor in proto.initializer),
        "nodes": [
            [node.name, node.domain, node.op_type, node.inputs, node.outputs, sorted(node.attributes)]
            for node in graph.nodes
        ],
    }
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()


def constant_sha256(value: Array) -> str:
    """SHA-256 of a constant's values, as little-endian float32 in C order."""
    return hashlib.sha256(np.ascontiguousarray(value, "<f4").data).hexdigest()


def _kind(graph: GraphIndex, value: onnx.ValueInfoProto) -> tuple[str, int, tuple[int | None, ...] | None]:
    """Name, element type and shape of an input or output."""
    return value.name, value.type.tensor_type.elem_type, graph.shape(value.name)


def _exists(graph: GraphIndex, tensor: str) -> bool:
    return tensor in graph.initializers or tensor in graph.producer or tensor in graph.inputs


def _fused(graph: GraphIndex, plan: QuantPlan) -> dict[str, tuple[str, ...]]:
    """By the output of an integer node, the outputs of what is fused before it, nearest first."""
    nodes = {node.name: node for node in graph.nodes}
    return {
        integer.output: tuple(nodes[name].outputs[0] for name in (integer.name, *integer.followers)[-2::-1])
        for integer in plan.integer_nodes
    }


# --- activations ----------------------------------------------------------------------------------------


def _activations(
    graph: GraphIndex,
    plan: QuantPlan,
    ranges: RangeTable,
    quantizers: Mapping[str, Quantizers],
    fused: Mapping[str, tuple[str, ...]],
) -> Iterator[Entry]:
    groups = {site.tensor: site.group for site in plan.activations}
    sizes = Counter(groups.values())
    reasons = {node.name: node.reason for node in plan.float_nodes}
    starts = {node.output: NodeRef(node.name, node.op_type, 0) for node in plan.integer_nodes}
    inside = {tensor for tensors in fused.values() for tensor in tensors}
    outputs = [tensor for node in graph.nodes for tensor in node.outputs]
    for tensor in (*graph.inputs, *outputs):
        if not tensor or tensor in inside or not graph.is_float(tensor):
            continue
        producer = graph.producer.get(tensor)
        entry = Entry(
            tensor,
            _role(graph, tensor),
            graph.shape(tensor),
            _producer(producer, tensor),
            _consumers(graph, tensor),
            fused.get(tensor, ()),
            stats=stats_of(ranges.tensors[tensor]) if tensor in ranges.tensors else None,
            computed_by=starts.get(tensor),
        )
        if tensor not in groups:
            reason = reasons.get(producer.name) if producer else None
            yield replace(entry, reason=reason or "no integer node reads it")
            continue
        found = {name: q.activations[tensor] for name, q in quantizers.items() if tensor in q.activations}
        yield replace(
            entry,
            views=merged_views(found),
            reason=None if found else "no scheme quantizes activations",
            group=groups[tensor] if sizes[groups[tensor]] > 1 else None,
        )


def _role(graph: GraphIndex, tensor: str) -> Role:
    return "input" if tensor in graph.inputs else "output" if tensor in graph.outputs else "activation"


def _producer(node: Node | None, tensor: str) -> NodeRef | None:
    return None if node is None else NodeRef(node.name, node.op_type, node.outputs.index(tensor))


def _consumers(graph: GraphIndex, tensor: str) -> tuple[NodeRef, ...]:
    found = []
    for node in graph.consumers.get(tensor, ()):
        indices = [index for index, name in enumerate(node.inputs) if name == tensor]
        indices += [CAPTURED] if tensor in node.captured else []
        found += [NodeRef(node.name, node.op_type, index) for index in indices]
    return tuple(found)


# --- constants ------------------------------------------------------------------------------------------


def _weights(graph: GraphIndex, plan: QuantPlan, quantizers: Mapping[str, Quantizers]) -> Iterator[Entry]:
    quantized = dict.fromkeys(site.tensor for site in plan.weights)
    for tensor in quantized:
        found = {name: q.weights[tensor] for name, q in quantizers.items() if tensor in q.weights}
        yield _constant(graph, tensor, found, "no scheme quantizes weights")
    nodes = {node.name: node for node in graph.nodes}
    floats: dict[str, str] = {}
    for node in plan.float_nodes:
        weight = (*nodes[node.name].inputs, "", "")[1]
        weighted = lookup(node.op_type, nodes[node.name].domain).kind is Kind.WEIGHTED
        if weighted and weight in graph.initializers and graph.is_float(weight) and weight not in quantized:
            floats.setdefault(weight, node.reason)
    for tensor, reason in floats.items():
        yield _constant(graph, tensor, {}, reason)


def _constant(graph: GraphIndex, tensor: str, params: Mapping[str, QParams], reason: str) -> Entry:
    value = _value(graph, tensor)
    return Entry(
        tensor,
        "weight",
        graph.shape(tensor),
        consumers=_consumers(graph, tensor),
        views=merged_views(params),
        reason=None if params else reason,
        stats=constant_stats(value),
        source="derived",
        sha256=constant_sha256(value),
    )


def _biases(graph: GraphIndex, plan: QuantPlan) -> Iterator[Entry]:
    for node in plan.integer_nodes:
        if node.weight is None or node.bias is None:
            continue
        value = _value(graph, node.bias)
        yield Entry(
            node.bias,
            "bias",
            graph.shape(node.bias),
            consumers=(_adder(graph, node, node.bias),),
            stats=constant_stats(value),
            source="derived",
            sha256=constant_sha256(value),
            product_of=(node.inputs[0], node.weight.tensor),
        )


def _adder(graph: GraphIndex, node: IntegerNode, bias: str) -> NodeRef:
    """Where an integer node, or the Add fused into it, reads its bias."""
    names = {node.name, *node.followers}
    return next(ref for ref in _consumers(graph, bias) if ref.node in names)


def _value(graph: GraphIndex, tensor: str) -> Array:
    value = graph.constant(tensor)
    return np.zeros(0, np.float32) if value is None else value
