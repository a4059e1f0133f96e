"""Which few changes bring the outputs closest to the float model's: greedy, each measured on top of those before.

A step measures every change that is likely to help. It takes the largest gain; but of the changes that reach half of
it, one of the cheapest kind, in this order: another way to find ranges and weights, which costs nothing when the model
runs; one scale per channel; wider codes; float. What is likely to help is what costs the outputs most by itself.
"""

import glob
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from onnxqt.advice.bench import Bench, Progress, Quality, Setup, constant_of
from onnxqt.advice.facts import (
    LONG_TAIL,
    Surroundings,
    activation_facts,
    channel_spread,
    is_depthwise,
    layer_facts,
    reason,
    tail_of,
    weight_facts,
    weight_tail,
)
from onnxqt.advice.sensitivity import (
    Costs,
    TensorCost,
    choose_layers,
    count_models,
    float_override,
    input_questions,
    joined,
    measure_costs,
)
from onnxqt.calibrate import RANGE_METHODS, RangeMethod
from onnxqt.errors import ExportError, ModelError, UsageError
from onnxqt.overrides import Override, Overrides
from onnxqt.ptq import find_pairs
from onnxqt.trim.prune import PruneMode

AdviceKind = Literal["clip", "equalize", "granularity", "activation-bits", "weight-bits", "float"]
KINDS: tuple[AdviceKind, ...] = ("clip", "equalize", "granularity", "activation-bits", "weight-bits", "float")
_COST = {"clip": 0, "equalize": 0, "granularity": 1, "activation-bits": 2, "weight-bits": 2, "float": 3}
_ENOUGH = 0.5  # of the largest gain, for a cheaper kind
LEAST_GAIN = 0.2  # decibels, under which nothing is advised
_TRIED = 4  # changes of one kind that a step measures, if the models suffice
_KINDS_TRIED = 5  # of the functions in `_likely`
_ALL_PER_CHANNEL = Override("*", granularity="pc")
WIDE_ACTIVATION, WIDE_WEIGHT = 16, 8


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, and what it brings on top of those before it.

    Attributes:
        kind: what is changed.
        subject: the node or tensor; empty for the whole model.
        text: what to do, in a few words.
        reason: why it helps.
        gain_db: by which the outputs come closer to the float model's.
        quality: of the outputs with this change and those before it.
        override: how a file of overrides says it; None where it takes an option.
        option: of `export` or `trim`; None where it takes an override.
    """

    kind: AdviceKind
    subject: str
    text: str
    reason: str
    gain_db: float
    quality: Quality
    override: Override | None
    option: str | None


@dataclass(frozen=True, slots=True)
class Advised:
    """All that was found.

    Attributes:
        baseline: the outputs without advice.
        advice: in the order in which it was measured.
        overrides: what the settings had, and all advice that overrides say.
        options: of `export` or `trim` that say the rest.
        costs: of layers and tensors.
        models: number of quantized models that were run.
        samples: that they were run on.
    """

    baseline: Quality
    advice: tuple[Advice, ...]
    overrides: Overrides
    options: tuple[str, ...]
    costs: Costs
    models: int
    samples: int

    @property
    def quality(self) -> Quality:
        """The outputs with all advice."""
        return self.advice[-1].quality if self.advice else self.baseline


@dataclass(frozen=True, slots=True)
class Effort:
    """What `advise` is going to do.

    Attributes:
        models: quantized models to run, at most, besides the one that was run.
        seconds: that this may take, from the time of the one.
        layers: that are measured one by one.
        left_out: layers that are not, as the models are limited.
    """

    models: int
    seconds: float
    layers: int
    left_out: int


@dataclass(frozen=True, slots=True)
class _Change:
    """A change that may help."""

    kind: AdviceKind
    subject: str
    text: str
    override: Override | None = None
    option: str | None = None
    ranges: RangeMethod | None = None  # these three: what `Setup` has in place of what it had
    equalized: bool | None = None
    prune: PruneMode | None = None

    def applied(self, setup: Setup) -> Setup:
        """A setup with this change.

        Raises:
            UsageError: if the setup has one that contradicts it.
        """
        return Setup(
            setup.overrides if self.override is None else joined(setup.overrides, self.override),
            self.ranges or setup.ranges,
            setup.equalized if self.equalized is None else self.equalized,
            self.prune or setup.prune,
        )


def effort(bench: Bench) -> Effort:
    """How many models `advise` runs, and how long that takes."""
    layers = choose_layers(bench, _room(bench))
    models = min(bench.settings.models - 1, count_models(bench, layers) + _search_models(bench))
    return Effort(models, models * bench.seconds, len(layers), len(bench.layers) - len(layers))


def _width(bench: Bench) -> int:
    """Changes of one kind that a step measures: so many that the search needs half of the models at most."""
    return max(1, min(_TRIED, bench.settings.models // 2 // (_KINDS_TRIED * bench.settings.top)))


def _search_models(bench: Bench) -> int:
    """Models that the search needs, at most."""
    return (_KINDS_TRIED * _width(bench) + 1) * bench.settings.top


def _room(bench: Bench) -> int:
    """Models for the costs of layers and tensors: what the search leaves, and at least a third."""
    inputs = len(input_questions(bench))
    return max(bench.settings.models // 3, bench.settings.models - 1 - _search_models(bench)) - inputs


def advise(bench: Bench, progress: Progress = lambda done, note: None) -> Advised:
    """Measure what layers and tensors cost, then find the changes that help most, one after the other.

    Args:
        bench: see `open_bench`.
        progress: called after each model, with the number that were run.
    """
    costs = measure_costs(bench, choose_layers(bench, _room(bench)), progress)
    around = Surroundings(bench)
    setup, advice, taken = bench.start, list[Advice](), set[_Change]()
    while len(advice) < bench.settings.top:
        before = bench.quality(setup)
        waiting = [change for change in _likely(bench, costs, taken) if change not in taken]
        tried = _tried(bench, setup, waiting, progress)
        best = _best(tried, before)
        if best is None:
            break
        change, quality = best
        setup = change.applied(setup)
        taken.add(change)
        taken.update(other for other in waiting if _replaces(change, other))
        advice.append(
            Advice(
                change.kind,
                change.subject,
                change.text,
                _reason(around, costs, change),
                quality.snr_db - before.snr_db,
                quality,
                change.override,
                change.option,
            )
        )
    return Advised(
        bench.quality(bench.start),
        tuple(advice),
        setup.overrides,
        tuple(item.option for item in advice if item.option is not None),
        costs,
        bench.models,
        bench.samples,
    )


def _tried(bench: Bench, setup: Setup, changes: Sequence[_Change], progress: Progress) -> list[tuple[_Change, Quality]]:
    """The changes that can be, each measured on top of a setup, as far as the models suffice."""
    found = []
    for change in changes:
        try:
            changed = change.applied(setup)
            if bench.models >= bench.settings.models and not bench.knows(changed):
                break
            found.append((change, bench.quality(changed)))
        except (UsageError, ExportError, ModelError):  # it says something of what an earlier one left in float
            continue
        progress(bench.models, change.text)
    return found


def _best(tried: Sequence[tuple[_Change, Quality]], before: Quality) -> tuple[_Change, Quality] | None:
    gains = [(quality.snr_db - before.snr_db, change, quality) for change, quality in tried]
    largest = max((gain for gain, _, _ in gains), default=0.0)
    if largest < LEAST_GAIN:
        return None
    enough = [row for row in gains if row[0] >= max(LEAST_GAIN, _ENOUGH * largest)]
    cheapest = min(_COST[change.kind] for _, change, _ in enough)
    _, change, quality = max((row for row in enough if _COST[row[1].kind] == cheapest), key=lambda row: row[0])
    return change, quality


def _replaces(change: _Change, other: _Change) -> bool:
    """Whether another change says anew what one says: a second way to find ranges, or scales per channel again."""
    same_way = change.ranges is not None and other.ranges is not None
    return same_way or (change.override == _ALL_PER_CHANNEL and other.kind == "granularity")


# --- what may help --------------------------------------------------------------------------------------


def _likely(bench: Bench, costs: Costs, taken: set[_Change]) -> Iterator[_Change]:
    """The changes that a step measures: of each kind the likeliest that were not taken."""
    makers: tuple[Callable[[Bench, Costs], Iterator[_Change]], ...] = (
        _whole,
        _per_channel,
        _wide_activations,
        _wide_weights,
        _floats,
    )
    for make in makers:
        waiting = (change for change in make(bench, costs) if change not in taken)
        yield from islice(waiting, _width(bench) + (make is _whole))


def _whole(bench: Bench, costs: Costs) -> Iterator[_Change]:
    """Other ways to find ranges and weights."""
    if bench.quantizers.activations:
        for method in RANGE_METHODS:
            if method != bench.start.ranges:
                yield _Change(
                    "clip",
                    "",
                    f"find the ranges of activations by {method}",
                    option=f"--ranges {method}",
                    ranges=method,
                )
    if bench.model.is_large:
        return
    if find_pairs(bench.model):
        yield _Change(
            "equalize",
            "",
            "equalize the channels between layers",
            option="--equalize always (trim) or --ptq equalize (export)",
            equalized=True,
        )
    grids = bench.settings.scheme.grids
    if grids.per_channel and grids.block_size is None and grids.weight_placement.symmetric:
        yield _Change(
            "clip",
            "",
            "clip the largest weights of each channel",
            option="--prune channel (trim)",
            prune="channel",
        )


def _sorted(costs: Costs, role: str) -> list[TensorCost]:
    """The tensors of a role that were measured, those first that cost the outputs most by themselves."""
    measured = [cost for cost in costs.tensors if cost.role == role and cost.only is not None]
    return sorted(measured, key=lambda cost: cost.only.error if cost.only else 0.0, reverse=True)


def _per_channel(bench: Bench, costs: Costs) -> Iterator[_Change]:
    wide = [params.axis is None for params in bench.quantizers.weights.values()]
    if sum(wide) > 1:
        yield _Change("granularity", "", "one scale per channel for all weights", _ALL_PER_CHANNEL)
    for cost in _sorted(costs, "weight"):
        if bench.quantizers.weights[cost.tensor].axis is None:
            override = Override(glob.escape(cost.tensor), granularity="pc")
            yield _Change("granularity", cost.tensor, f"one scale per channel for weight '{cost.tensor}'", override)


def _wide_activations(bench: Bench, costs: Costs) -> Iterator[_Change]:
    groups = {site.tensor: site.group for site in bench.plan.activations}
    seen = set()
    for cost in _sorted(costs, "activation"):
        if cost.bits < WIDE_ACTIVATION and groups[cost.tensor] not in seen:
            seen.add(groups[cost.tensor])
            override = Override(glob.escape(cost.tensor), activation_bits=WIDE_ACTIVATION)
            yield _Change("activation-bits", cost.tensor, f"16 bits for activation '{cost.tensor}'", override)


def _wide_weights(bench: Bench, costs: Costs) -> Iterator[_Change]:
    for cost in _sorted(costs, "weight"):
        if cost.bits < WIDE_WEIGHT:
            override = Override(glob.escape(cost.tensor), weight_bits=WIDE_WEIGHT)
            yield _Change("weight-bits", cost.tensor, f"8 bits for weight '{cost.tensor}'", override)


def _floats(bench: Bench, costs: Costs) -> Iterator[_Change]:
    measured = [(cost.without.error, cost) for cost in costs.layers if cost.without is not None]
    for _, cost in sorted(measured, key=lambda pair: pair[0]):
        text = f"leave {cost.op_type} '{cost.node}' in float"
        yield _Change("float", cost.node, text, float_override(cost.node))


# --- why ------------------------------------------------------------------------------------------------


def _reason(around: Surroundings, costs: Costs, change: _Change) -> str:
    """Why a change helps."""
    if not change.subject:
        return _whole_reason(around, change)
    if change.kind == "float":
        layer = next(cost for cost in costs.layers if cost.node == change.subject)
        node = next(node for node in around.bench.plan.integer_nodes if node.name == change.subject)
        return reason(layer_facts(around, node), _alone(layer.only))
    cost = next(cost for cost in costs.tensors if cost.tensor == change.subject)
    if cost.role == "activation":
        return reason(activation_facts(around, cost.tensor), _alone(cost.only))
    site = next(site for site in around.bench.plan.weights if site.tensor == cost.tensor)
    return reason(weight_facts(around, site), _alone(cost.only))


def _alone(only: Quality | None) -> str:
    if only is None or not math.isfinite(only.snr_db):
        return "not measured alone"
    return f"quantized alone it leaves the outputs at {only.snr_db:.1f} dB"


_PER_TENSOR = {"equalize": "", "granularity": " and the scheme is per tensor"}


def _whole_reason(around: Surroundings, change: _Change) -> str:
    """Why a change of the whole model helps: the worst of what it is meant for."""
    bench = around.bench
    if change.kind in ("equalize", "granularity"):
        spread = {
            node.weight.tensor: (channel_spread(constant_of(bench.model, node.weight.tensor), node.weight.axis), node)
            for node in around.weighted
            if node.weight
        }
        worst = max(spread, key=lambda name: spread[name][0])
        ratio, node = spread[worst]
        what = "depthwise weights" if is_depthwise(bench, node) else "weights"
        return f"{what} '{worst}': channel ranges differ by {ratio:.0f} times{_PER_TENSOR[change.kind]}"
    if change.prune is not None:
        tails = {site.tensor: weight_tail(constant_of(bench.model, site.tensor)) for site in bench.plan.weights}
        return f"the largest weight of '{_largest(tails)}' is {max(tails.values()):.0f} times its 99.9 % quantile"
    seen = {name: bench.ranges.tensors[name] for name in bench.quantizers.activations}
    tails = {name: tail_of(r.counts, r.centers, max(abs(r.min), abs(r.max))) for name, r in seen.items()}
    if max(tails.values()) < LONG_TAIL:
        return f"no tensor has a long tail, but {bench.start.ranges} fits these samples less well"
    return f"the range of '{_largest(tails)}' is {max(tails.values()):.0f} times its 99.9 % quantile"


def _largest(values: dict[str, float]) -> str:
    return max(values, key=lambda name: values[name])
