"""Graph surgery for training: ReversePrune on every weight, ProgressiveQDQ on every quantized tensor.

Both are model-local ONNX functions, so the training graph stays readable and runs on any ONNX runtime. Grid,
scale and blend are inputs of the graph: one graph serves every scheme.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import AttributeProto, helper

from onnxqt.calibrate import Quantizers
from onnxqt.numerics import Array, FloatArray, QParams, along_axis
from onnxqt.plan import QuantPlan
from onnxqt.trim.gradients import DOMAIN

BLEND = "onnxqt.lambda"
QUANTIZED = "onnxqt.quantized:"  # prefix of a quantized tensor's name


class QuantizerInputs(NamedTuple):
    """Names of the graph inputs that set one quantizer."""

    scale: str
    zero_point: str
    qmin: str
    qmax: str


def quantizer_inputs(tensor: str) -> QuantizerInputs:
    """Names of the inputs that set the quantizer of `tensor`."""
    return QuantizerInputs(*(f"onnxqt.{field}:{tensor}" for field in QuantizerInputs._fields))


def prune_input(weight: str) -> str:
    """Name of the input that holds the clip tau of a weight."""
    return f"onnxqt.tau:{weight}"


def functions(opset: int) -> list[onnx.FunctionProto]:
    """ReversePrune and ProgressiveQDQ.

    ReversePrune(w, tau) = min(max(w, -tau), tau)

    ProgressiveQDQ(x, scale, zero_point, qmin, qmax, lambda) = (1 - lambda) x + lambda dq(clip(q(x), qmin, qmax))

    with the INT8 QuantizeLinear/DequantizeLinear q and dq along the attribute `axis`. The blend is exactly x at
    lambda = 0 and exactly the quantized value at lambda = 1.
    """
    imports = [helper.make_opsetid("", opset)]
    prune = [
        helper.make_node("Neg", ["tau"], ["low"]),
        helper.make_node("Max", ["w", "low"], ["above"]),
        helper.make_node("Min", ["above", "tau"], ["y"]),
    ]
    blend = [
        _along_axis(helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["wide"])),
        helper.make_node("Clip", ["wide", "qmin", "qmax"], ["codes"]),
        _along_axis(helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["grid"])),
        helper.make_node("Constant", [], ["one"], value_float=1.0),
        helper.make_node("Sub", ["one", "lambda"], ["rest"]),
        helper.make_node("Mul", ["x", "rest"], ["float_part"]),
        helper.make_node("Mul", ["grid", "lambda"], ["grid_part"]),
        helper.make_node("Add", ["float_part", "grid_part"], ["y"]),
    ]
    inputs = ["x", "scale", "zero_point", "qmin", "qmax", "lambda"]
    return [
        helper.make_function(DOMAIN, "ReversePrune", ["w", "tau"], ["y"], prune, imports),
        helper.make_function(DOMAIN, "ProgressiveQDQ", inputs, ["y"], blend, imports, ["axis"]),
    ]


def _along_axis(node: onnx.NodeProto) -> onnx.NodeProto:
    node.attribute.append(AttributeProto(name="axis", ref_attr_name="axis", type=AttributeProto.INT))
    return node


def insert(graph: gs.Graph, plan: QuantPlan) -> None:
    """Put the quantizers of `plan` into a float graph, in place."""
    tensors = graph.tensors()
    blend = gs.Variable(BLEND, np.float32, [])
    graph.inputs.append(blend)
    for site in plan.weights:
        weight = tensors[site.tensor]
        channels = weight.shape[site.axis]
        tau = gs.Variable(
            prune_input(site.tensor), np.float32, along_axis_shape(channels, site.axis, len(weight.shape))
        )
        graph.inputs.append(tau)
        pruned = gs.Variable(f"onnxqt.pruned:{site.tensor}", np.float32, weight.shape)
        readers = list(weight.outputs)
        graph.nodes.append(
            gs.Node(
                "ReversePrune", f"onnxqt.prune:{site.tensor}", domain=DOMAIN, inputs=[weight, tau], outputs=[pruned]
            )
        )
        quantized = _quantizer(graph, pruned, site.tensor, [channels], site.axis)
        _redirect(readers, weight, quantized)
    for activation in plan.activations:
        tensor = tensors[activation.tensor]
        readers = list(tensor.outputs)
        quantized = _quantizer(graph, tensor, activation.tensor, [], 0)
        _redirect(readers, tensor, quantized)
        graph.outputs = [quantized if output is tensor else output for output in graph.outputs]
    graph.cleanup().toposort()


def _quantizer(graph: gs.Graph, x: gs.Variable, name: str, scale_shape: list[int], axis: int) -> gs.Variable:
    """Add ProgressiveQDQ behind `x`, with its own graph inputs; returns its output."""
    names = quantizer_inputs(name)
    settings = [
        gs.Variable(names.scale, np.float32, scale_shape),
        gs.Variable(names.zero_point, np.int8, scale_shape),
        gs.Variable(names.qmin, np.int8, []),
        gs.Variable(names.qmax, np.int8, []),
    ]
    graph.inputs.extend(settings)
    y = gs.Variable(f"{QUANTIZED}{name}", np.float32, x.shape)
    blend = next(tensor for tensor in graph.inputs if tensor.name == BLEND)
    graph.nodes.append(
        gs.Node(
            "ProgressiveQDQ",
            f"onnxqt.quantizer:{name}",
            {"axis": axis},
            inputs=[x, *settings, blend],
            outputs=[y],
            domain=DOMAIN,
        )
    )
    return y


def _redirect(readers: list[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    for node in readers:
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]


def along_axis_shape(channels: int, axis: int, rank: int) -> list[int]:
    """Shape of per-channel values that broadcast along `axis`."""
    return [channels if i == axis else 1 for i in range(rank)]


def feeds(plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], quantizers: Quantizers) -> dict[str, Array]:
    """Values of the inputs of every quantizer; `shapes` are those of the weights."""
    values: dict[str, Array] = {}
    for site in plan.activations:
        values.update(_settings(site.tensor, quantizers.activations[site.tensor], ()))
    for weight in plan.weights:
        channels = shapes[weight.tensor][weight.axis]
        values.update(_settings(weight.tensor, quantizers.weights[weight.tensor], (channels,)))
    return values


def _settings(tensor: str, params: QParams, shape: tuple[int, ...]) -> dict[str, Array]:
    """One quantizer as INT8: an unsigned grid is the signed one of the same width, shifted."""
    shift = 0 if params.grid.signed else 1 << (params.grid.bits - 1)
    names = quantizer_inputs(tensor)
    return {
        names.scale: np.array(np.broadcast_to(params.scale, shape), np.float32),
        names.zero_point: np.array(np.broadcast_to(params.zero_point - shift, shape), np.int8),
        names.qmin: np.array(params.grid.qmin - shift, np.int8),
        names.qmax: np.array(params.grid.qmax - shift, np.int8),
    }


def prune_feeds(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], clips: Mapping[str, FloatArray]
) -> dict[str, Array]:
    """Values of the tau inputs: clips, () or (channels,), broadcast along each weight's channel axis."""
    values: dict[str, Array] = {}
    for site in plan.weights:
        shape = shapes[site.tensor]
        per_channel = np.broadcast_to(clips[site.tensor], (shape[site.axis],)).astype(np.float32)
        values[prune_input(site.tensor)] = np.ascontiguousarray(along_axis(per_channel, site.axis, len(shape)))
    return values
