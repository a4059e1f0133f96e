"""Graph surgery for training: what is put behind every weight and every quantized tensor.

All of it is model-local ONNX functions, so the training graph stays readable and runs on any ONNX runtime. Grid,
scale and blend are inputs of the graph: one graph serves every scheme. A weight becomes

    W = unit * U              U is what the optimizer moves; `unit` is the size of W when training began
    ReversePrune(W, tau)      the few extreme weights are clipped while they can still learn
    ProgressiveQDQ(...)       a blend of the weight and its quantized value

so that a learning rate is a relative change of every weight, whatever its size.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper

from onnxqt.numerics import Array, FloatArray, QParams, along_axis
from onnxqt.ops import NON_NEGATIVE
from onnxqt.plan import QuantPlan
from onnxqt.trim.gradients import DOMAIN, through_sequence

WEIGHT_BLEND = "onnxqt.lambda:weights"
ACTIVATION_BLEND = "onnxqt.lambda:activations"
RUN_TIME = "onnxqt.run_time"  # 1 if the activations' scales follow from the batch, else 0
CENTRED = "onnxqt.centred"  # 1 if those scales are symmetric about zero, else 0
LOSS_SCALE = "onnxqt.loss_scale"
QUANTIZED = "onnxqt.quantized:"  # prefix of a quantized tensor's name
SAMPLE = 4096  # about as many values of each activation are given out in each step

Feeds = dict[str, Array]  # values of inputs of the training graph


class QuantizerInputs(NamedTuple):
    """Names of the graph inputs that set one quantizer."""

    scale: str
    zero_point: str
    qmin: str
    qmax: str


class Statistics(NamedTuple):
    """Names of the graph outputs that tell about the values of one activation."""

    low: str
    high: str
    sample: str


def quantizer_inputs(tensor: str) -> QuantizerInputs:
    """Names of the inputs that set the quantizer of `tensor`."""
    return QuantizerInputs(*(f"onnxqt.{field}:{tensor}" for field in QuantizerInputs._fields))


def statistics(tensor: str) -> Statistics:
    """Names of the outputs that tell about `tensor`: its least (or 0) and largest value, and some values of it."""
    return Statistics(*(f"onnxqt.{field}:{tensor}" for field in Statistics._fields))


def prune_input(weight: str) -> str:
    """Name of the input that holds the clip tau of a weight."""
    return f"onnxqt.tau:{weight}"


def relative(parameter: str) -> str:
    """Name of the initializer that the optimizer moves in place of a weight or bias."""
    return f"onnxqt.relative:{parameter}"


_PRUNE = "low = Neg(tau) above = Max(w, low) y = Min(above, tau)"

_BLEND = """
    wide = QuantizeLinear<axis: int = @axis>(x, scale, zero_point)
    codes = Clip(wide, qmin, qmax)
    share = Mul(scale, lambda)
    grid_part = DequantizeLinear<axis: int = @axis>(codes, share, zero_point)
    one = Constant<value_float = 1.0>()
    rest = Sub(one, lambda)
    float_part = Mul(x, rest)
    y = Add(float_part, grid_part)
"""

_LOW = "low = ReduceMin<keepdims = 0>(x)"
_ZERO = "low = Constant<value_float = 0.0>()"
_STATISTICS = f"""
    high = ReduceMax<keepdims = 0>(x)
    line = Constant<value = int64[1] {{-1}}>()
    begin = Constant<value = int64[1] {{0}}>()
    flat = Reshape(x, line)
    size = Shape(flat)
    pairs = Constant<value = int64[1] {{{2 * SAMPLE}}}>()
    two = Constant<value = int64[1] {{2}}>()
    one = Constant<value = int64[1] {{1}}>()
    half = Div(size, pairs)
    even = Mul(half, two)
    odd = Add(even, one)
    sample = Slice(flat, begin, size, begin, odd)
"""

_RUN_TIME = """
    nothing = Constant<value_float = 0.0>()
    tiny = Constant<value_float = 1e-12>()
    below = Min(low, nothing)
    above = Max(high, nothing)
    under = Neg(below)
    size = Max(under, above)
    first = Cast<to = 1>(qmin)
    last = Cast<to = 1>(qmax)
    span = Sub(above, below)
    steps = Sub(last, first)
    one_sided = Div(span, steps)
    one = Constant<value_float = 1.0>()
    two_sided = Div(size, last)
    uncentred = Sub(one, centred)
    a = Mul(two_sided, centred)
    b = Mul(one_sided, uncentred)
    either = Add(a, b)
    own = Max(either, tiny)
    calibrated = Sub(one, run_time)
    c = Mul(own, run_time)
    d = Mul(scale, calibrated)
    used = Add(c, d)
    offset = Div(below, own)
    exact = Sub(first, offset)
    code = Mul(exact, uncentred)
    whole = Round(code)
    bounded = Clip(whole, first, last)
    given = Cast<to = 1>(zero_point)
    e = Mul(bounded, run_time)
    f = Mul(given, calibrated)
    both = Add(e, f)
    used_zero_point = Cast<to = 3>(both)
"""


def functions(opset: int) -> list[onnx.FunctionProto]:
    """The functions of a training graph.

    ReversePrune(w, tau) = min(max(w, -tau), tau)

    ProgressiveQDQ(x, scale, zero_point, qmin, qmax, lambda) = (1 - lambda) x + lambda dq(clip(q(x), qmin, qmax))

    with the INT8 QuantizeLinear/DequantizeLinear q and dq along the attribute `axis`. The blend is exactly x at
    lambda = 0 and exactly the quantized value at lambda = 1.

    Statistics(x) = min(x), max(x), every k-th value of x with an odd k

    NonNegativeStatistics(x) = the same with 0 for min(x), for an x that is never negative

    RunTimeGrid(low, high, ...) = the calibrated scale and zero point, or those of the range [low, high] of a batch

        scale = (high - low) / (qmax - qmin), zero_point = round(qmin - low / scale)
        or, centred: scale = max(-low, high) / qmax, zero_point = 0, the middle of every grid that INT8 carries
    """
    grid = ["low", "high", "scale", "zero_point", "qmin", "qmax", "run_time", "centred"]
    return [
        _function("ReversePrune", ["w", "tau"], ["y"], _PRUNE, opset),
        _function("ProgressiveQDQ", ["x", "scale", "zero_point", "qmin", "qmax", "lambda"], ["y"], _BLEND, opset),
        _function("Statistics", ["x"], ["low", "high", "sample"], _LOW + _STATISTICS, opset),
        _function("NonNegativeStatistics", ["x"], ["low", "high", "sample"], _ZERO + _STATISTICS, opset),
        _function("RunTimeGrid", grid, ["used", "used_zero_point"], _RUN_TIME, opset),
    ]


def _function(name: str, inputs: list[str], outputs: list[str], body: str, opset: int) -> onnx.FunctionProto:
    attributes = ["axis"] if "@axis" in body else []
    head = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}]>\nf {"<axis>" if attributes else ""} () => ()'
    nodes = onnx.parser.parse_function(f"{head} {{\n{body}\n}}").node
    imports = [helper.make_opsetid("", opset)]
    return helper.make_function(DOMAIN, name, inputs, outputs, nodes, imports, attributes)


def insert(graph: gs.Graph, plan: QuantPlan, units: Mapping[str, Array]) -> list[str]:
    """Put the quantizers of `plan` into a float graph, in place.

    Args:
        graph: to edit.
        plan: where quantizers go.
        units: the unit of each weight and bias that is to be trained, see `units_of`.

    Returns:
        The names of the statistics, tensors of the graph that are to become outputs.
    """
    tensors = graph.tensors()
    for name in (WEIGHT_BLEND, ACTIVATION_BLEND, RUN_TIME, CENTRED):
        graph.inputs.append(gs.Variable(name, np.float32, []))
    inputs = {tensor.name: tensor for tensor in graph.inputs}
    for site in plan.weights:
        weight = tensors[site.tensor]
        channels = weight.shape[site.axis]
        tau = gs.Variable(
            prune_input(site.tensor), np.float32, along_axis_shape(channels, site.axis, len(weight.shape))
        )
        graph.inputs.append(tau)
        readers = list(weight.outputs)
        pruned = _apply(graph, "ReversePrune", f"pruned:{site.tensor}", [weight, tau], weight.shape)
        settings = _settings_inputs(graph, site.tensor, [channels])
        blend = [pruned, *settings, inputs[WEIGHT_BLEND]]
        quantized = _apply(graph, "ProgressiveQDQ", f"quantized:{site.tensor}", blend, weight.shape, axis=site.axis)
        _redirect(readers, weight, quantized)
    given_out = []
    for activation in plan.activations:
        tensor = tensors[activation.tensor]
        readers = list(tensor.outputs)
        low, high, sample = (gs.Variable(name, np.float32) for name in statistics(activation.tensor))
        low.shape = high.shape = []
        given_out += [low.name, high.name, sample.name]
        name = f"onnxqt.statistics:{activation.tensor}"
        above_zero = any(node.op in NON_NEGATIVE for node in tensor.inputs)
        function = "NonNegativeStatistics" if above_zero else "Statistics"
        graph.nodes.append(gs.Node(function, name, {}, [tensor], [low, high, sample], domain=DOMAIN))
        settings = _settings_inputs(graph, activation.tensor, [])
        used = (
            gs.Variable(f"onnxqt.used_scale:{activation.tensor}", np.float32, []),
            gs.Variable(f"onnxqt.used_zero_point:{activation.tensor}", np.int8, []),
        )
        operands = [low, high, *settings, inputs[RUN_TIME], inputs[CENTRED]]
        name = f"onnxqt.grid:{activation.tensor}"
        graph.nodes.append(gs.Node("RunTimeGrid", name, {}, operands, list(used), domain=DOMAIN))
        scale = gs.Variable(f"onnxqt.scale_now:{activation.tensor}", np.float32, [])
        graph.nodes.extend(through_sequence(used[0], scale))
        blend = [tensor, scale, used[1], *settings[2:], inputs[ACTIVATION_BLEND]]
        quantized = _apply(graph, "ProgressiveQDQ", f"quantized:{activation.tensor}", blend, tensor.shape, axis=0)
        _redirect(readers, tensor, quantized)
        graph.outputs = [quantized if output is tensor else output for output in graph.outputs]
    _make_relative(graph, units)
    graph.cleanup().toposort()
    return given_out


def scale_loss(graph: gs.Graph) -> None:
    """Multiply the output of a training graph, its loss, by the input `LOSS_SCALE`, in place."""
    (loss,) = graph.outputs
    scale = gs.Variable(LOSS_SCALE, np.float32, [])
    graph.inputs.append(scale)
    scaled = gs.Variable("onnxqt.scaled_loss", np.float32, [])
    graph.nodes.append(gs.Node("Mul", scaled.name, {}, [loss, scale], [scaled]))
    graph.outputs = [scaled]


def _settings_inputs(graph: gs.Graph, name: str, scale_shape: list[int]) -> list[gs.Variable]:
    """Add the graph inputs that set the quantizer of a tensor."""
    names = quantizer_inputs(name)
    settings = [
        gs.Variable(names.scale, np.float32, scale_shape),
        gs.Variable(names.zero_point, np.int8, scale_shape),
        gs.Variable(names.qmin, np.int8, []),
        gs.Variable(names.qmax, np.int8, []),
    ]
    graph.inputs.extend(settings)
    return settings


def _apply(
    graph: gs.Graph, function: str, name: str, inputs: list[gs.Tensor], shape: list[int | str] | None, **attributes: int
) -> gs.Variable:
    """Add a call of one of the functions with one output; it and the node are called `onnxqt.<name>`."""
    y = gs.Variable(f"onnxqt.{name}", np.float32, shape)
    graph.nodes.append(gs.Node(function, y.name, attributes, inputs, [y], domain=DOMAIN))
    return y


def _make_relative(graph: gs.Graph, units: Mapping[str, Array]) -> None:
    """Compute each trained weight and bias as a product of its unit and what is trained."""
    tensors = graph.tensors()
    for name, unit in units.items():
        parameter = tensors[name]
        values = np.asarray(parameter.values, np.float32)
        product = gs.Variable(name, np.float32, list(values.shape))
        _redirect(list(parameter.outputs), parameter, product)
        parameter.name = f"onnxqt.was:{name}"
        moved = gs.Constant(relative(name), np.asarray(values / unit, np.float32))
        constant = gs.Constant(f"onnxqt.unit:{name}", np.asarray(unit, np.float32))
        graph.nodes.append(gs.Node("Mul", f"onnxqt.scaled:{name}", {}, [moved, constant], [product]))


def _redirect(readers: list[gs.Node], old: gs.Tensor, new: gs.Tensor) -> None:
    for node in readers:
        node.inputs = [new if tensor is old else tensor for tensor in node.inputs]


def units_of(plan: QuantPlan, values: Mapping[str, Array]) -> dict[str, Array]:
    """The unit of each weight and bias: what a relative change is relative to.

    For a weight, the root mean square of each output channel, at least a hundredth of that of the whole weight; it
    broadcasts along the channel axis. A bias b takes those of its weight, r, times the root mean square of b / r if
    that is above 1.

    Args:
        plan: which bias belongs to which weight.
        values: of the weights and biases to be trained, by name.
    """
    units: dict[str, Array] = {}
    for node in plan.integer_nodes:
        if node.weight is None or node.weight.tensor not in values:
            continue
        weight = values[node.weight.tensor]
        per_channel = _channel_sizes(weight, node.weight.axis)
        units.setdefault(node.weight.tensor, along_axis(per_channel, node.weight.axis, weight.ndim))
        if node.bias and node.bias in values and node.bias not in units:
            units[node.bias] = _bias_unit(values[node.bias], per_channel)
    rest = {name: value for name, value in values.items() if name not in units}
    return {**units, **{name: _whole_size(value) for name, value in rest.items()}}


def _channel_sizes(weight: Array, axis: int) -> FloatArray:
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    sizes = np.sqrt(np.mean(rows.astype(np.float64) ** 2, axis=1))
    whole = np.sqrt(np.mean(sizes**2)) or 1.0
    return np.asarray(np.maximum(sizes, 0.01 * whole), np.float32)


def _whole_size(values: Array) -> FloatArray:
    return np.asarray(np.sqrt(np.mean(values.astype(np.float64) ** 2)) or 1.0, np.float32)


def _bias_unit(bias: Array, sizes: FloatArray) -> FloatArray:
    if bias.size % sizes.size:
        return _whole_size(bias)
    unit = np.tile(sizes, bias.size // sizes.size).reshape(bias.shape)
    spread = np.sqrt(np.mean((bias / unit).astype(np.float64) ** 2))
    return np.asarray(unit * max(spread, 1.0), np.float32)


def number(value: float) -> Array:
    """A scalar as the training graph takes it."""
    return np.array(value, np.float32)


def along_axis_shape(channels: int, axis: int, rank: int) -> list[int]:
    """Shape of per-channel values that broadcast along `axis`."""
    return [channels if i == axis else 1 for i in range(rank)]


def activation_feeds(activations: Mapping[str, QParams]) -> dict[str, Array]:
    """Values of the inputs of the activations' quantizers."""
    values: dict[str, Array] = {}
    for tensor, params in activations.items():
        values.update(_settings(tensor, params, ()))
    return values


def weight_feeds(
    plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, QParams]
) -> dict[str, Array]:
    """Values of the inputs of the weights' quantizers; `shapes` are those of the weights."""
    values: dict[str, Array] = {}
    for site in plan.weights:
        values.update(_settings(site.tensor, weights[site.tensor], (shapes[site.tensor][site.axis],)))
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
