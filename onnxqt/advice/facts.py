"""Why a layer or tensor is hard to quantize, in plain words: rows of tables, each a condition and what it says."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxqt.advice.bench import Bench, constant_of
from onnxqt.model import GraphIndex, Node
from onnxqt.numerics import Array
from onnxqt.ops import Kind, lookup
from onnxqt.plan import IntegerNode, WeightSite, tensors_of_group
from onnxqt.runtime import Session, with_outputs

LONG_TAIL = 4.0  # times the 99.9 % quantile: a normal distribution of a million values reaches 1.5 times
UNLIKE_CHANNELS = 8.0  # times the median channel: three bits of a common grid
UNLIKE_TENSORS = 4.0  # between the ranges of tensors that share a grid
_QUANTILE = 0.999
_MOST = 3  # facts in a reason

# What may stand between a layer and an output of the model that is still the layer's.
_PASSING = frozenset((Kind.SAME_GRID, Kind.CONCAT, Kind.CLAMP))
_SCORES = frozenset(("Sigmoid", "Softmax", "LogSoftmax", "Softplus", "Exp"))


@dataclass(frozen=True, eq=False)
class Surroundings:
    """What a model's graph says of its layers.

    Attributes:
        bench: the model and its plan.
    """

    bench: Bench

    @property
    def graph(self) -> GraphIndex:
        """The graph of the float model."""
        return self.bench.model.graph

    @cached_property
    def weighted(self) -> tuple[IntegerNode, ...]:
        """The nodes with a quantized weight, in order."""
        return tuple(node for node in self.bench.plan.integer_nodes if node.weight)

    @cached_property
    def ends(self) -> frozenset[str]:
        """Tensors that reach an output of the model without another layer on the way."""
        reached = set(self.graph.outputs)
        for node in reversed(self.graph.nodes):
            passes = lookup(node.op_type, node.domain).kind in _PASSING or node.op_type in _SCORES
            if passes and not reached.isdisjoint(node.outputs):
                reached.update(node.inputs)
        return frozenset(reached)

    @cached_property
    def dense(self) -> bool:
        """Whether the model gives a score or box for each place, as detectors and segmentation do."""
        return any(len(self.graph.shape(name) or ()) >= 3 for name in self.graph.outputs)


def tail_of(counts: Array, centers: Array, largest: float) -> float:
    """How many times the 99.9 % quantile of |x| the largest |x| is, from a histogram of x; 0 where most are zeros."""
    size = np.abs(centers)
    order = np.argsort(size, kind="stable")
    total = np.cumsum(counts[order])
    quantile = float(size[order][int(np.searchsorted(total, _QUANTILE * total[-1]))])
    # Zeros lie in the bins beside zero, whose centers are not zero.
    return largest / quantile if quantile > 2 * float(size.min()) else 0.0


def weight_tail(weight: Array) -> float:
    """How many times the 99.9 % quantile of |W| the largest |W| is."""
    size = np.abs(weight).ravel()
    quantile = float(np.quantile(size, _QUANTILE, method="lower"))
    return float(size.max()) / quantile if quantile > 0 else 0.0


def channel_spread(weight: Array, axis: int) -> float:
    """How many times the median range of the output channels the largest is; channels of zeros do not count."""
    rows = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1)
    return _spread(rows)


def _spread(ranges: Array) -> float:
    alive = ranges[ranges > 0]
    return float(alive.max() / np.median(alive)) if alive.size > 1 else 1.0


def is_depthwise(bench: Bench, node: IntegerNode) -> bool:
    """Whether every channel of a convolution has a filter of its own."""
    if node.op_type != "Conv" or node.weight is None:
        return False
    return node.groups > 1 and bench.model.graph.initializers[node.weight.tensor].dims[1] == 1


# --- activations ----------------------------------------------------------------------------------------

Say = Callable[[Surroundings, str], str | None]


def _tail(around: Surroundings, tensor: str) -> str | None:
    seen = around.bench.ranges.tensors[tensor]
    ratio = tail_of(seen.counts, seen.centers, max(abs(seen.min), abs(seen.max)))
    return f"its range is {ratio:.0f} times its 99.9 % quantile" if ratio >= LONG_TAIL else None


def _channels(around: Surroundings, tensor: str) -> str | None:
    found = _channel_ranges(around, tensor)
    ratio = _spread(found) if found is not None else 1.0
    if found is None or ratio < UNLIKE_CHANNELS:
        return None
    return f"channel {int(found.argmax())} reaches {ratio:.0f} times the median channel"


def _channel_ranges(around: Surroundings, tensor: str) -> Array | None:
    """The largest magnitude of each channel over the held-out samples; None for a tensor without channels."""
    graph, axis = around.graph, _channel_axis(around.graph, tensor)
    if axis is None:
        return None
    session = None
    if tensor not in graph.inputs:
        session = Session(with_outputs(around.bench.model.proto, [tensor]), outputs=[tensor])
    largest: Array | None = None
    for batch in around.bench.held:
        values = batch.inputs[tensor] if session is None else session.run(batch.inputs)[tensor]
        if values.ndim <= axis or not values.size:
            return None
        found = np.abs(np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)).max(axis=1)
        if largest is not None and largest.shape != found.shape:
            return None
        largest = found if largest is None else np.maximum(largest, found)
    return largest


def _channel_axis(graph: GraphIndex, tensor: str) -> int | None:
    """Where the channels of an activation are: axis 1 behind convolutions, else the last."""
    rank = len(graph.shape(tensor) or ())
    if rank < 2:
        return None
    node: Node | None = graph.producer.get(tensor)
    while node is not None:
        kind = lookup(node.op_type, node.domain).kind
        if kind is Kind.WEIGHTED:
            return 1 if node.op_type.startswith("Conv") else rank - 1
        if kind not in (Kind.CLAMP, Kind.ARITHMETIC, Kind.FUNCTION, Kind.AVERAGE) or not node.inputs:
            break
        node = graph.producer.get(node.inputs[0])
    return 1 if rank >= 4 else rank - 1


def _sharing(around: Surroundings, tensor: str) -> str | None:
    plan, seen = around.bench.plan, around.bench.ranges.tensors
    group = next(site.group for site in plan.activations if site.tensor == tensor)
    width = {name: max(abs(seen[name].min), abs(seen[name].max)) for name in tensors_of_group(plan, group)}
    widest = max(width, key=lambda name: width[name])
    ratio = width[widest] / width[tensor] if width[tensor] > 0 else 1.0
    return f"it shares a grid with '{widest}', whose range is {ratio:.0f} times its own" if ratio >= 4 else None


def _softmax(around: Surroundings, tensor: str) -> str | None:
    pending, seen = [tensor], {tensor}
    while pending:
        for reader in around.graph.consumers.get(pending.pop(), ()):
            if reader.op_type in ("Softmax", "LogSoftmax"):
                return "Softmax input"
            if reader.op_type in ("Add", "Div", "Mul", "Where") and reader.outputs[0] not in seen:  # masks and factors
                seen.add(reader.outputs[0])
                pending.append(reader.outputs[0])
    return None


def _end(around: Surroundings, tensor: str) -> str | None:
    if tensor not in around.ends:
        return None
    return "output of a detector or segmentation head" if around.dense else "output of the model"


def _input(around: Surroundings, tensor: str) -> str | None:
    return "input of the model" if tensor in around.graph.inputs else None


def _first_output(around: Surroundings, tensor: str) -> str | None:
    return "output of the first layer" if around.weighted and around.weighted[0].output == tensor else None


_OF_ACTIVATIONS: tuple[Say, ...] = (_tail, _channels, _sharing, _softmax, _end, _input, _first_output)


def activation_facts(around: Surroundings, tensor: str) -> list[str]:
    """What is known of an activation, the most telling first."""
    return [fact for say in _OF_ACTIVATIONS if (fact := say(around, tensor)) is not None]


# --- weights and layers ---------------------------------------------------------------------------------


def weight_facts(around: Surroundings, site: WeightSite) -> list[str]:
    """What is known of a weight, the most telling first."""
    bench = around.bench
    weight, params = constant_of(bench.model, site.tensor), bench.quantizers.weights[site.tensor]
    users = [node for node in around.weighted if node.weight and node.weight.tensor == site.tensor]
    depthwise = any(is_depthwise(bench, node) for node in users)
    facts = []
    spread = channel_spread(weight, site.axis)
    what = "depthwise weights" if depthwise else "weights"
    if params.axis is None and spread >= UNLIKE_CHANNELS:
        facts.append(f"{what}: channel ranges differ by {spread:.0f} times and the scheme is per tensor")
    elif depthwise:
        facts.append("depthwise weights: few products average out their rounding errors")
    tail = weight_tail(weight)
    if tail >= LONG_TAIL:
        facts.append(f"its largest weight is {tail:.0f} times the 99.9 % quantile")
    return facts + _place(around, users)


def _place(around: Surroundings, nodes: Iterable[IntegerNode]) -> list[str]:
    facts = []
    for node in nodes:
        if node == around.weighted[0]:
            facts.append("first layer")
        if node.output in around.ends:
            facts.append("head of a detector or segmentation network" if around.dense else "last layer")
    return facts


def layer_facts(around: Surroundings, node: IntegerNode) -> list[str]:
    """What is known of a layer, its weight first, then its output."""
    facts = weight_facts(around, node.weight) if node.weight else []
    if node.output in around.bench.quantizers.activations:
        shown = {"output of the first layer"} | ({"output of the model"} if node.weight else set())
        facts += [f"output: {fact}" for fact in activation_facts(around, node.output) if fact not in shown]
    return facts


def reason(facts: list[str], measured: str) -> str:
    """The first facts, and what was measured."""
    return "; ".join([*facts[:_MOST], measured])
