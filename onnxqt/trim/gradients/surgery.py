"""Edits of a training graph that let gradients pass, or stop, where `flow` decided it; forward values stay."""

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from onnxqt.trim.gradients.built_in import BuiltIn
from onnxqt.trim.gradients.flow import Flow, Passage
from onnxqt.trim.gradients.rule import Registration, Vjp
from onnxqt.trim.gradients.text import DOMAIN, constant_nodes, needed, number, parse, read_names

_REPLACED = ("LSTM", "GRU")  # by kernels of onnxruntime-training that do not take all attributes
STRAIGHT_THROUGH = ("ProgressiveQDQ", "ReversePrune")  # d output / d first input = 1 everywhere


def static_rules() -> list[Registration]:
    """The gradients of the quantizers' functions."""
    return [Registration(f"{DOMAIN}::{name}", "", "Identity", ("GO(0)",), ("GI(0)",)) for name in STRAIGHT_THROUGH]


def make_differentiable(graph: gs.Graph, flow: Flow) -> tuple[list[Registration], list[onnx.FunctionProto]]:
    """Edit a training graph, in place, so that onnxruntime-training takes the way of `flow`.

    A node with a rule becomes a call of a function of its own; the rule is a function too. Where the gradient
    must stop, the tensor goes through a sequence of one element: gradients do not pass sequences.

    Returns:
        What to register, and the functions.
    """
    registrations: list[Registration] = []
    functions: list[onnx.FunctionProto] = []
    nodes: list[gs.Node] = []
    for node in list(graph.nodes):
        if node.op == "MeanVarianceNormalization":
            node.attrs.setdefault("axes", [0, 2, 3])  # onnx's checker fails on its own default
        passage = flow.passages.get(node.name)
        before, after = _stops(node, passage)
        nodes += [*before, node, *after]
        if node.op in _REPLACED:
            functions.append(_call(node, f"{node.op}_{len(nodes)}", graph.opset))
        if passage is None or not any(tensor.name in flow.reached for tensor in node.outputs):
            continue
        if isinstance(passage.gradient, BuiltIn):
            _prepare(node, passage.gradient)
        elif passage.gradient is not None:
            name = f"{node.op}_{len(registrations)}"
            registration, pair = _wrap(node, passage, name, graph.opset)
            registrations.append(registration)
            functions += pair
    graph.nodes[:] = nodes
    return registrations, functions


def _prepare(node: gs.Node, needs: BuiltIn) -> None:
    node.attrs.update(needs.attributes)
    for position, dtype in enumerate(needs.outputs, start=1):
        missing = gs.Variable(f"onnxqt.output_{position}:{node.outputs[0].name}", dtype)
        if position == len(node.outputs):
            node.outputs.append(missing)
        elif node.outputs[position].is_empty():
            node.outputs[position] = missing


def _stops(node: gs.Node, passage: Passage | None) -> tuple[list[gs.Node], list[gs.Node]]:
    """Nodes before and behind `node` that stop the gradient."""
    if passage is None:
        return [], []
    if passage.open:
        return [stop for position in passage.closed for stop in _stop_operand(node, position)], []
    outputs = zip(range(len(node.outputs)), passage.call.outputs, strict=False)
    wanted = [position for position, output in outputs if output is not None and output.trained]
    return [], [stop for position in wanted for stop in _stop_output(node, position)]


def _stop_operand(node: gs.Node, position: int) -> Iterator[gs.Node]:
    x = node.inputs[position]
    stopped = gs.Variable(f"onnxqt.stopped_{position}:{node.name}", x.dtype, x.shape)
    node.inputs[position] = stopped
    return through_sequence(x, stopped)


def _stop_output(node: gs.Node, position: int) -> Iterator[gs.Node]:
    y = node.outputs[position]
    passed = gs.Variable(f"onnxqt.passed:{y.name}", y.dtype, y.shape)
    node.outputs[position] = passed
    return through_sequence(passed, y)


def through_sequence(source: gs.Tensor, target: gs.Variable) -> Iterator[gs.Node]:
    """Nodes that make `target` a copy of `source` which no gradient passes."""
    name = target.name
    sequence = gs.Variable(f"onnxqt.sequence:{name}")
    first = gs.Constant(f"onnxqt.first:{name}", np.array(0, np.int64))
    yield gs.Node("SequenceConstruct", f"onnxqt.stop:{name}", inputs=[source], outputs=[sequence])
    yield gs.Node("SequenceAt", f"onnxqt.go_on:{name}", inputs=[sequence, first], outputs=[target])


def _wrap(node: gs.Node, passage: Passage, name: str, opset: int) -> tuple[Registration, list[onnx.FunctionProto]]:
    """Turn a node into a call of the function `name`, in place, and write its gradient as another function.

    In both, `x{i}` and `y{i}` are the operands of the node, without those that are missing.
    """
    vjp = passage.gradient
    assert isinstance(vjp, Vjp)
    inputs, outputs = _operand_names(node)
    forward = _call(node, name, opset)
    body = needed([*constant_nodes(vjp.constants), *parse(vjp.body, opset)], [f"d{i}" for i in passage.open])
    # onnxruntime-training takes result number j for the gradient of input number j, so there is one for each.
    gives = [f"d{i}" if i in passage.open else f"no_d{i}" for i, x in enumerate(inputs) if x]
    body = [*body, *constant_nodes({give: number(0) for give in gives if give[0] == "n"})]
    reads = sorted(read_names(body) - {"", *(result for part in body for result in part.output)})
    gradient = _function(f"{name}_gradient", opset, body, (reads, gives))
    operands = _operands([x for x in inputs if x], [y for y in outputs if y])
    registration = Registration(
        f"{DOMAIN}::{name}",
        DOMAIN,
        gradient.name,
        tuple(operands[read] for read in reads),
        tuple(f"GI({i})" for i in range(len(gives))),
    )
    return registration, [forward, gradient]


def _call(node: gs.Node, name: str, opset: int) -> onnx.FunctionProto:
    """Turn a node into a call of the function `name`, in place; returns the function."""
    inputs, outputs = _operand_names(node)
    attributes = {key: value for key, value in node.attrs.items() if value != []}
    forward = _function(name, opset, [helper.make_node(node.op, inputs, outputs, **attributes)], (inputs, outputs))
    node.inputs = [x for x in node.inputs if not x.is_empty()]
    node.outputs = [y for y in node.outputs if not y.is_empty()]
    node.op, node.domain, node.attrs = name, DOMAIN, {}
    return forward


def _operand_names(node: gs.Node) -> tuple[list[str], list[str]]:
    inputs = [f"x{i}" if not x.is_empty() else "" for i, x in enumerate(node.inputs)]
    outputs = [f"y{i}" if not y.is_empty() else "" for i, y in enumerate(node.outputs)]
    return inputs, outputs


def _function(
    name: str, opset: int, nodes: list[onnx.NodeProto], operands: tuple[list[str], list[str]]
) -> onnx.FunctionProto:
    inputs, outputs = ([operand for operand in side if operand] for side in operands)
    return helper.make_function(
        DOMAIN, name, inputs, outputs, nodes, [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    )


def _operands(inputs: list[str], outputs: list[str]) -> dict[str, str]:
    """What onnxruntime-training calls the operands of a function and the gradients of its outputs."""
    return {
        **{x: f"I({i})" for i, x in enumerate(inputs)},
        **{y: f"O({i})" for i, y in enumerate(outputs)},
        **{f"g{y[1:]}": f"GO({i})" for i, y in enumerate(outputs)},
    }
