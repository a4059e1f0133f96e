"""What each layer and each tensor costs by itself, and what leaving a layer in float would save."""

import glob
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from onnxqt.advice.bench import Bench, Part, Progress, Quality, Setup, constant_of
from onnxqt.errors import OnnxqtError, UsageError
from onnxqt.numerics import Array, QParams, fake_quantize
from onnxqt.overrides import Override, Overrides
from onnxqt.plan import IntegerNode

Role = Literal["weight", "activation"]


@dataclass(frozen=True, slots=True)
class TensorCost:
    """A quantized tensor.

    Attributes:
        tensor: its name.
        role: what it is.
        node: that multiplies by the weight or gives out the activation; empty for an input of the model.
        bits: of its codes.
        own_db: signal-to-noise ratio of its own values, see `own_snr`.
        only: the outputs where nothing else is quantized; None where that was not measured.
    """

    tensor: str
    role: Role
    node: str
    bits: int
    own_db: float
    only: Quality | None = None


@dataclass(frozen=True, slots=True)
class LayerCost:
    """A node that computes on integers.

    Attributes:
        node: its name.
        op_type: of the node.
        weight: its weight, if it has one.
        output: the activation that it gives out.
        only: the outputs where nothing but its weight, its inputs and its output is quantized.
        without: where all but this node is quantized; None also where that cannot be.
    """

    node: str
    op_type: str
    weight: str | None
    output: str
    only: Quality | None = None
    without: Quality | None = None


@dataclass(frozen=True, slots=True)
class Costs:
    """What was measured.

    Attributes:
        layers: in the order of the graph.
        tensors: in the order of the graph, the weight of a node before its output.
        left_out: number of layers that were not measured, see `measure_costs`.
    """

    layers: tuple[LayerCost, ...]
    tensors: tuple[TensorCost, ...]
    left_out: int


def own_snr(values: Array, params: QParams, counts: Array | None = None) -> float:
    """How much larger values are than their rounding errors, in decibels within [-300, 300].

    SNR = 10 log10(sum(n x^2) / sum(n (q(x) - x)^2))

    Args:
        values: x.
        params: of q.
        counts: n; 1 for each value by default.
    """
    n = np.ones(1) if counts is None else counts.astype(np.float64)
    x = values.astype(np.float64)
    noise = float(np.sum(n * (fake_quantize(values, params).astype(np.float64) - x) ** 2))
    power = float(np.sum(n * x**2))
    return float(np.clip(10 * math.log10(max(power, 1e-30) / max(noise, 1e-30)), -300, 300))


def find_tensors(bench: Bench) -> tuple[TensorCost, ...]:
    """Every weight, and every activation that a layer gives out or that is an input of the model; not measured yet."""
    quantizers, found = bench.quantizers, {}
    computed = {node.output for node in bench.layers}
    for site in bench.plan.activations:
        if site.tensor in quantizers.activations and site.tensor in bench.model.graph.inputs:
            found[site.tensor] = _activation(bench, site.tensor, "")
    for node in bench.plan.integer_nodes:
        if node.weight is not None and node.weight.tensor not in found:
            weight = node.weight.tensor
            params = quantizers.weights[weight]
            own = own_snr(constant_of(bench.model, weight), params)
            found[weight] = TensorCost(weight, "weight", node.name, params.grid.bits, own)
        if node.output in quantizers.activations and node.output in computed and node.output not in found:
            found[node.output] = _activation(bench, node.output, node.name)
    return tuple(found.values())


def _activation(bench: Bench, tensor: str, node: str) -> TensorCost:
    params, seen = bench.quantizers.activations[tensor], bench.ranges.tensors[tensor]
    occupied = seen.counts > 0
    own = own_snr(seen.centers[occupied], params, seen.counts[occupied])
    return TensorCost(tensor, "activation", node, params.grid.bits, own)


def float_override(node: str) -> Override:
    """What keeps a node float."""
    return Override(glob.escape(node), keeps_float=True)


def joined(overrides: Overrides, rule: Override) -> Overrides:
    """Overrides with one more, which is put together with an earlier one of the same pattern, as a file has it.

    Raises:
        UsageError: if the two contradict each other.
    """
    same = next((other for other in overrides.rules if other.pattern == rule.pattern), None)
    others = tuple(other for other in overrides.rules if other is not same)
    if same is None:
        return Overrides((*others, rule))
    return Overrides(
        (
            *others,
            replace(
                rule,
                weight_bits=rule.weight_bits or same.weight_bits,
                activation_bits=rule.activation_bits or same.activation_bits,
                keeps_float=rule.keeps_float or same.keeps_float,
                granularity=rule.granularity or same.granularity,
            ),
        )
    )


def without(bench: Bench, node: str) -> Setup | None:
    """All but one node quantized; None where an override contradicts that."""
    try:
        return replace(bench.start, overrides=joined(bench.start.overrides, float_override(node)))
    except UsageError:
        return None


def questions(bench: Bench, layer: IntegerNode) -> tuple[Setup | Part, ...]:
    """What is measured for a layer: it alone, its weight alone, its output alone, all but it."""
    alone, weight, output = _alone(bench, layer)
    found = [alone, *([weight] if layer.weight else []), *([output] if output.activations else [])]
    rest = without(bench, layer.name)
    return (*found, *([] if rest is None else [rest]))


def _alone(bench: Bench, layer: IntegerNode) -> tuple[Part, Part, Part]:
    weight = frozenset([layer.weight.tensor] if layer.weight else [])
    given = bench.quantizers.activations.keys()
    output = frozenset([layer.output]).intersection(given)
    return (
        Part(weight, frozenset((*layer.inputs, *layer.outputs)).intersection(given)),
        Part(weight),
        Part(activations=output),
    )


def choose_layers(bench: Bench, limit: int) -> tuple[IntegerNode, ...]:
    """The layers whose measurement takes at most `limit` models; those with the largest errors of their own first."""
    own = {cost.tensor: 10 ** (-cost.own_db / 10) for cost in find_tensors(bench)}

    def error(layer: IntegerNode) -> float:
        return own.get(layer.weight.tensor if layer.weight else "", 0.0) + own.get(layer.output, 0.0)

    wanted: set[Setup | Part] = set()
    chosen: set[str] = set()
    for layer in sorted(bench.layers, key=error, reverse=True):
        more = {*wanted, *(way for way in questions(bench, layer) if not bench.knows(way))}
        if len(more) > limit:
            break
        wanted = more
        chosen.add(layer.name)
    return tuple(layer for layer in bench.layers if layer.name in chosen)


def input_questions(bench: Bench) -> tuple[Part, ...]:
    """The quantized inputs of the model, each alone."""
    given = bench.quantizers.activations.keys()
    return tuple(Part(activations=frozenset([name])) for name in bench.model.graph.inputs if name in given)


def count_models(bench: Bench, layers: Iterable[IntegerNode]) -> int:
    """How many models `measure_costs` has to run for these layers."""
    asked = {way for layer in layers for way in questions(bench, layer)} | set(input_questions(bench))
    return sum(not bench.knows(way) for way in asked)


def measure_costs(bench: Bench, layers: tuple[IntegerNode, ...], progress: Progress) -> Costs:
    """Run one model for each question about these layers and the inputs.

    Args:
        bench: the model.
        layers: a part of its layers, see `choose_layers`.
        progress: called after each model.
    """
    for part in input_questions(bench):
        bench.quality(part)
        progress(bench.models, "inputs")
    for layer in layers:
        for way in questions(bench, layer):
            _asked(bench, way)
            progress(bench.models, layer.name)
    return Costs(
        layers=tuple(_layer_cost(bench, layer) for layer in bench.layers),
        tensors=tuple(_with_quality(bench, find_tensors(bench))),
        left_out=len(bench.layers) - len(layers),
    )


def _asked(bench: Bench, way: Setup | Part) -> Quality | None:
    """What was measured; None where the setup cannot be, as where an override matches nothing without that node."""
    try:
        return bench.quality(way)
    except OnnxqtError:
        if isinstance(way, Setup):
            return None
        raise


def _known(bench: Bench, way: Setup | Part | None) -> Quality | None:
    return bench.quality(way) if way is not None and bench.knows(way) else None


def _layer_cost(bench: Bench, layer: IntegerNode) -> LayerCost:
    only, rest = _known(bench, _alone(bench, layer)[0]), _known(bench, without(bench, layer.name))
    weight = layer.weight.tensor if layer.weight else None
    return LayerCost(layer.name, layer.op_type, weight, layer.output, only, rest)


def _with_quality(bench: Bench, tensors: Iterable[TensorCost]) -> Iterator[TensorCost]:
    for cost in tensors:
        alone = frozenset([cost.tensor])
        way = Part(weights=alone) if cost.role == "weight" else Part(activations=alone)
        yield replace(cost, only=_known(bench, way))
