"""Ways to quantize a model, and how far its outputs are from the float model's under each.

    error = mean over the float outputs of  sum((y - y_float)^2) / sum(y_float^2)
    SNR   = -10 log10(error)    in decibels

on samples that no range was found on. A model that was measured once is not run again.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx

from onnxqt.calibrate import (
    Quantizers,
    RangeMethod,
    RangeTable,
    calibrate,
    float_nodes,
    make_quantizers,
    overridden,
    tensors_of,
)
from onnxqt.data import Batch, Samples, fixed_batch
from onnxqt.errors import UnboundedError, UsageError
from onnxqt.evaluate import Reference, Tallies, evaluate
from onnxqt.export import quantized_model
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, QParams
from onnxqt.ops import Kind, lookup
from onnxqt.overrides import Overrides
from onnxqt.plan import IntegerNode, QuantPlan, Rules, make_plan
from onnxqt.ptq import equalize
from onnxqt.ptq.improve import CALIBRATION_LIMIT
from onnxqt.ptq.layers import BATCH
from onnxqt.runtime import Session
from onnxqt.schemes import Scheme
from onnxqt.trim.prune import PruneMode, choose_quantiles, clip_at
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT

LEAST_MODELS = 10
_LEAST_ERROR, _LARGEST_ERROR = 1e-30, 1e30  # 300 dB stand for no error at all, -300 dB for outputs that are not finite
_HELD_BYTES = 256 << 20  # of the inputs of the samples to measure on, which stay in memory

Progress = Callable[[int, str], None]  # called with the number of models that were run, and what the last one was


@dataclass(frozen=True, slots=True)
class AdviceSettings:
    """What a model is to be quantized to, and how far to look for advice.

    Attributes:
        scheme: the grids.
        ranges: how the activations' clips are chosen.
        overrides: exceptions from the scheme that are settled already.
        top: pieces of advice, at most.
        samples: held-out samples to measure on, at most.
        models: quantized models to run, at most.

    Raises:
        UsageError: for a number out of its range.
    """

    scheme: Scheme
    ranges: RangeMethod = "mse"
    overrides: Overrides = field(default_factory=Overrides)
    top: int = 5
    samples: int = 64
    models: int = 400

    def __post_init__(self) -> None:
        for name, least in (("top", 1), ("samples", 1), ("models", LEAST_MODELS)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}: give a number of at least {least}")


@dataclass(frozen=True, slots=True)
class Quality:
    """How far the outputs are from the float model's.

    Attributes:
        error: see above, between 1e-30 and 1e30.
        agreement: share of samples with the same class; None for a model that gives no classes.
    """

    error: float
    agreement: float | None

    @property
    def snr_db(self) -> float:
        """Signal-to-noise ratio of the outputs, within [-300, 300]."""
        return -10 * math.log10(self.error)


@dataclass(frozen=True, slots=True)
class Setup:
    """A way to quantize the whole model.

    Attributes:
        overrides: exceptions from the scheme.
        ranges: how the activations' clips are chosen.
        equalized: whether cross-layer equalization comes first.
        prune: whether the largest weights are clipped, and over what their clip is found.
    """

    overrides: Overrides
    ranges: RangeMethod
    equalized: bool = False
    prune: PruneMode = "none"


@dataclass(frozen=True, slots=True)
class Part:
    """Tensors that are quantized, and nothing else is."""

    weights: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Bench:
    """A model with what it is calibrated and measured on; made by `open_bench`.

    Attributes:
        model: the float model.
        settings: what it is to be quantized to.
        start: the setup of these settings.
        plan: of that setup.
        quantizers: of that setup.
        ranges: of the activations of the float model.
        held: the batches that are measured on.
        seconds: that building and running the first quantized model took.
    """

    model: Model
    settings: AdviceSettings
    start: Setup
    plan: QuantPlan
    quantizers: Quantizers
    ranges: RangeTable
    held: tuple[Batch, ...]
    seconds: float
    _sources: "_Sources"
    _reference: Reference
    _known: dict[Setup | Part, Quality]

    @property
    def samples(self) -> int:
        """Number of samples that are measured on."""
        return sum(len(batch.index) for batch in self.held)

    @property
    def layers(self) -> tuple[IntegerNode, ...]:
        """The nodes that compute on integers: those with a weight, and those with an output grid of their own."""
        moves = (Kind.SAME_GRID, Kind.CONCAT)
        return tuple(
            node
            for node in self.plan.integer_nodes
            if node.weight or (self.quantizers.activations and lookup(node.op_type).kind not in moves)
        )

    @property
    def models(self) -> int:
        """Number of quantized models that were run."""
        return len(self._known)

    def knows(self, way: Setup | Part) -> bool:
        """Whether it was measured before."""
        return way in self._known

    def quality(self, way: Setup | Part) -> Quality:
        """How good the outputs are under a setup, or with nothing but a part quantized.

        Raises:
            UsageError: if an override speaks of what is not quantized in this setup.
            ModelError, ExportError: if no file says this, or ONNX Runtime cannot run it.
        """
        if way not in self._known:
            self._known[way] = _measured(self.proto(way), self._reference)
        return self._known[way]

    def proto(self, way: Setup | Part) -> onnx.ModelProto:
        """The quantized model of a setup, or the model with nothing but a part quantized.

        Raises:
            UsageError, ExportError: if no file says this.
        """
        if isinstance(way, Setup):
            return self._sources.quantized(way)
        plan, quantizers = _restricted(self.plan, self.quantizers, way)
        return quantized_model(self.model, plan, quantizers)


@dataclass(frozen=True, eq=False)
class _Sources:
    """What quantized models are made of; models and ranges are kept, as setups share them."""

    model: Model
    scheme: Scheme
    calibration: Samples
    unbounded: dict[str, None] = field(default_factory=dict)  # tensors that were found to take infinite values
    models: dict[tuple[bool, PruneMode], Model] = field(default_factory=dict)
    tables: dict[tuple[bool, PruneMode], RangeTable] = field(default_factory=dict)

    def plan(self, overrides: Overrides) -> QuantPlan:
        """The plan with what overrides keep float."""
        return make_plan(self.model, tuple(self.unbounded), Rules(floats=float_nodes(self.model, overrides)))

    def parts(self, setup: Setup) -> tuple[Model, QuantPlan, Quantizers]:
        """The model of a setup, its plan, and the parameters of its quantizers."""
        key = (setup.equalized, setup.prune)
        if key not in self.models:
            self.models[key] = self._changed(setup)
        model = self.models[key]
        self.record(key, setup.overrides, tensors_of([self.plan(setup.overrides)]))
        plan = self.plan(setup.overrides)
        grids = overridden(self.scheme.grids, plan, setup.overrides)
        return model, plan, make_quantizers(model, plan, self.tables[key], grids, setup.ranges)

    def quantized(self, setup: Setup) -> onnx.ModelProto:
        """The quantized model of a setup."""
        return quantized_model(*self.parts(setup))

    def record(self, key: tuple[bool, PruneMode], overrides: Overrides, tensors: tuple[str, ...]) -> None:
        """Find the ranges of these tensors, unless they are known; the plan changes where some are not finite."""
        known = self.tables.setdefault(key, RangeTable({}, 0))
        if self.scheme.weight_only or self.scheme.dynamic:
            return
        batch_size = fixed_batch(input_specs(self.model)) or BATCH
        samples = self.calibration.take(CALIBRATION_LIMIT)
        while missing := [name for name in tensors if name not in known.tensors and name not in self.unbounded]:
            try:
                found = calibrate(self.models[key], missing, samples, batch_size)
            except UnboundedError as error:
                self.unbounded.update(dict.fromkeys(error.tensors))
                tensors = (*tensors, *tensors_of([self.plan(overrides)]))
                continue
            known = self.tables[key] = RangeTable({**known.tensors, **found.tensors}, found.samples)

    def _changed(self, setup: Setup) -> Model:
        """The float model with the weights of a setup."""
        model = equalize(self.model).model if setup.equalized else self.model
        if setup.prune == "none":
            return model
        plan, grids = self.plan(setup.overrides), self.scheme.grids
        weights = {site.tensor: constant_of(model, site.tensor) for site in plan.weights}
        quantiles = choose_quantiles(plan, weights, {setup.prune == "channel": grids.weight}, setup.prune)
        for site in plan.weights:
            weight, axis = weights[site.tensor], site.axis
            clip = clip_at(weight, axis, quantiles[site.tensor])
            if clip.ndim:
                clip = clip.reshape([-1 if index == axis else 1 for index in range(weight.ndim)])
            weights[site.tensor] = np.clip(weight, -clip, clip)
        return model.with_weights(weights)


def constant_of(model: Model, tensor: str) -> Array:
    """The values of an initializer."""
    return np.asarray(model.graph.constant(tensor))


def open_bench(
    model: Model, samples: Samples, settings: AdviceSettings, progress: Callable[[str], None] = lambda stage: None
) -> Bench:
    """Calibrate a model on a part of its samples, and measure it as it is quantized without advice on others.

    Args:
        model: the float model.
        samples: of which the last step of `Samples.split` holds some out.
        settings: what to quantize to.
        progress: called with the name of each stage.

    Raises:
        UsageError: if nothing of the model is quantized, an override matches nothing, or it has no float output.
        DataError: if there are fewer than two samples.
    """
    if not any(model.graph.is_float(name) for name in model.graph.outputs):
        raise UsageError("the model has no float output, whose error could be measured: name bits with --overrides")
    rest, held = samples.split(HELD_FRACTION, HELD_LIMIT)
    sources = _Sources(model, settings.scheme, rest)
    start = Setup(settings.overrides, settings.ranges)
    plan = sources.plan(start.overrides)
    if not plan.integer_nodes:
        raise UsageError("nothing of the model is quantized, so there is nothing to advise: see 'onnxqt inspect'")
    overridden(settings.scheme.grids, plan, start.overrides)  # refuses what matches nothing
    progress("calibrate")
    sources.models[False, "none"] = model
    singles = (
        make_plan(model, (), Rules(floats=frozenset(plan.floats) | {node.name}))
        for node in plan.integer_nodes
        if node.weight
    )
    sources.record((False, "none"), start.overrides, tensors_of([plan, *singles]))
    progress("measure the model without advice")
    batches = tuple(_few(model, held.take(settings.samples)))
    reference = Reference(model, lambda: iter(batches))
    for _ in reference:  # so that the outputs of the float model are there when the clock starts
        pass
    begun = time.perf_counter()
    _, plan, quantizers = sources.parts(start)
    quality = _measured(quantized_model(model, plan, quantizers), reference)
    seconds = time.perf_counter() - begun
    known: dict[Setup | Part, Quality] = {start: quality}
    ranges = sources.tables[False, "none"]
    return Bench(model, settings, start, plan, quantizers, ranges, batches, seconds, sources, reference, known)


def _few(model: Model, samples: Samples) -> Iterator[Batch]:
    """Batches, as many as memory is meant to hold, and at least one."""
    fixed, held = fixed_batch(input_specs(model)), 0
    for batch in samples.batches(fixed or BATCH, pad=fixed is not None):
        size = sum(array.nbytes for array in batch.inputs.values())
        if held and held + size > _HELD_BYTES:
            return
        held += size
        yield batch


def _measured(proto: onnx.ModelProto, reference: Reference) -> Quality:
    return quality_of(evaluate(Session(proto).run, reference))


def quality_of(tallies: Tallies) -> Quality:
    """The figures of counted outputs; the agreement is that of the first output with classes."""
    errors = [
        _LARGEST_ERROR if tally.non_finite else tally.squared_error / max(tally.reference_power, _LEAST_ERROR)
        for tally in tallies.values()
        if tally.values
    ]
    error = sum(errors) / len(errors) if errors else 0.0
    ranked = next((tally for tally in tallies.values() if tally.ranked), None)
    agreement = None if ranked is None else ranked.agreeing / ranked.samples
    return Quality(min(max(error, _LEAST_ERROR), _LARGEST_ERROR), agreement)


def _restricted(plan: QuantPlan, quantizers: Quantizers, part: Part) -> tuple[QuantPlan, Quantizers]:
    """What is left of a plan where nothing but a part is quantized."""
    nodes = tuple(
        node if node.weight and node.weight.tensor in part.weights else replace(node, weight=None, bias=None)
        for node in plan.integer_nodes
    )
    return (
        replace(plan, integer_nodes=nodes),
        replace(
            quantizers,
            weights=_among(quantizers.weights, part.weights),
            activations=_among(quantizers.activations, part.activations),
        ),
    )


def _among(params: Mapping[str, QParams], names: frozenset[str]) -> dict[str, QParams]:
    return {name: value for name, value in params.items() if name in names}
