"""Stage 3, calibrate: what values each tensor takes, and the scales that follow.

One streaming pass over the samples keeps a histogram per activation, so memory does not grow with their
number. This is the only module where a scale is computed from a range.
"""

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from onnxqt.data import Samples, fixed_batch
from onnxqt.errors import CalibrationError, UnboundedError
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, FloatArray, Grid, QParams, fake_quantize
from onnxqt.overrides import Override, Overrides
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite, fixed_site, tensors_of_group
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import Grids, Placement, Scheme

RangeMethod = Literal["minmax", "percentile", "mse", "entropy"]
RANGE_METHODS: tuple[RangeMethod, ...] = ("minmax", "percentile", "mse", "entropy")

BINS = 8192  # 16 or more bins for each step of an 8-bit grid, whatever the range was when it last doubled
PERCENTILE = 99.99
_MIN_SCALE = np.float32(2.0**-40)  # so that the product of two scales stays a normal float32
_MAX_BIAS_CODE = 2**30  # leaves the other half of INT32 to the products
_FRACTIONS = np.linspace(1.0, 0.1, 91)  # of the observed range: the clips that a search tries
_MIN_LIMIT = 2.0**-60
_CLIP_SAMPLE = 1 << 20  # values of a weight that a search for its clip looks at
_WEIGHT_FRACTIONS = np.linspace(1.0, 0.3, 36)

Interval = tuple[float, float]


@dataclass(frozen=True, eq=False)
class TensorRange:
    """What was seen of one activation.

    Attributes:
        count: number of values.
        min: smallest value.
        max: largest value.
        limit: the histogram covers [-limit, limit), a power of two.
        counts: values per bin, int64 (BINS,).
    """

    count: int
    min: float
    max: float
    limit: float
    counts: Array

    def merge(self, other: "TensorRange") -> "TensorRange":
        """The range of both sets of values together; exact, in any order."""
        limit = max(self.limit, other.limit)
        return TensorRange(
            self.count + other.count,
            min(self.min, other.min),
            max(self.max, other.max),
            limit,
            _widen(self, limit) + _widen(other, limit),
        )

    @property
    def centers(self) -> Array:
        """Middle of each bin, float64 (BINS,)."""
        width = 2 * self.limit / BINS
        return -self.limit + width * (np.arange(BINS) + 0.5)


def observe(values: Array) -> TensorRange:
    """The range of an array of finite values."""
    if not values.size:
        return TensorRange(0, 0.0, 0.0, _MIN_LIMIT, np.zeros(BINS, np.int64))
    lo, hi = float(values.min()), float(values.max())
    limit = 2.0 ** np.ceil(np.log2(max(abs(lo), abs(hi), _MIN_LIMIT) * (1 + 2.0**-20)))
    steps = values.ravel() * np.float32(BINS / 2 / limit)  # exact, as the factor is a power of two
    bins = np.floor(steps).astype(np.int32)  # so that each bin is a pair of bins of half the limit
    bins[(steps == 0) & (values.ravel() < 0)] = -1  # unless the product is too small for float32
    counts = np.bincount(np.clip(bins + BINS // 2, 0, BINS - 1), minlength=BINS)
    return TensorRange(values.size, lo, hi, float(limit), counts.astype(np.int64))


def _widen(seen: TensorRange, limit: float) -> Array:
    """Counts of the same values over [-limit, limit): each doubling adds up pairs of bins."""
    counts = seen.counts
    half = seen.limit
    while half < limit:
        pairs = counts.reshape(-1, 2).sum(axis=1)
        counts = np.pad(pairs, BINS // 4)
        half *= 2
    return counts


@dataclass(frozen=True, eq=False)
class RangeTable:
    """Ranges of the quantized activations, by tensor, over `samples` samples."""

    tensors: Mapping[str, TensorRange]
    samples: int

    @cached_property
    def _params(self) -> dict[tuple[tuple[str, ...], Grid, Placement, RangeMethod], QParams]:
        """Parameters that were asked for before; schemes that differ in the weights alone share them."""
        return {}

    def params(
        self, plan: QuantPlan, group: str, grid: Grid, method: RangeMethod, placement: Placement | None = None
    ) -> QParams:
        """The parameters of all tensors that share a grid."""
        placement = placement or _own_placement(grid)
        key = (tuple(tensors_of_group(plan, group)), grid, placement, method)
        if key not in self._params:
            clip = clip_range(self.of_group(plan, group), grid, method, placement)
            self._params[key] = range_params(*clip, grid, placement)
        return self._params[key]

    def merge(self, other: "RangeTable") -> "RangeTable":
        """The table of both sets of samples together."""
        merged = {name: seen.merge(other.tensors[name]) for name, seen in self.tensors.items()}
        return RangeTable(merged, self.samples + other.samples)

    def of_group(self, plan: QuantPlan, group: str) -> TensorRange:
        """The range of all tensors that share a grid.

        Raises:
            CalibrationError: if a tensor was not recorded.
        """
        names = tuple(tensors_of_group(plan, group))
        for name in names:
            if name not in self.tensors:
                raise CalibrationError(f"the range of '{name}' was not recorded: calibrate with every plan to be used")
        first, *rest = (self.tensors[name] for name in names)
        for seen in rest:
            first = first.merge(seen)
        return first


def tensors_of(plans: Iterable[QuantPlan]) -> tuple[str, ...]:
    """The quantized activations of several plans together, each once: what to calibrate for all of them."""
    return tuple(dict.fromkeys(site.tensor for plan in plans for site in plan.activations))


def calibrate(
    model: Model,
    plan: QuantPlan | Iterable[str],
    samples: Samples,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> RangeTable:
    """Run `model` over `samples` and record the range of every quantized activation.

    Args:
        model: the float model.
        plan: its quantizer sites, or the tensors to record (see `tensors_of`).
        samples: the calibration data, read once in order.
        batch_size: samples run together; bounds the memory.
        progress: called with the number of samples done.

    Raises:
        UnboundedError: naming the tensors that take NaN or infinite values.
    """
    names = tensors_of([plan]) if isinstance(plan, QuantPlan) else tuple(plan)
    inside = [name for name in names if name not in model.graph.inputs]
    session = Session(with_outputs(model.proto, inside), outputs=inside)
    seen: dict[str, TensorRange] = {}
    unbounded: dict[str, None] = {}
    done = 0
    pad = fixed_batch(input_specs(model)) is not None
    for batch in samples.batches(batch_size, pad):
        values = {**batch.inputs, **session.run(batch.inputs)}
        for name in names:
            if not np.isfinite(values[name]).all():
                unbounded[name] = None
                continue
            new = observe(values[name])
            seen[name] = seen[name].merge(new) if name in seen else new
        done += len(batch.index)
        progress(done)
    if unbounded:
        raise UnboundedError(list(unbounded))
    return RangeTable(seen, samples.count)


# --- overrides ------------------------------------------------------------------------------------------


def float_nodes(model: Model, overrides: Overrides) -> frozenset[str]:
    """The nodes that overrides keep float, for `plan.Rules.floats`: those that match, and those around tensors that do.

    Raises:
        UsageError: if the pattern of any override matches neither a node nor a tensor of the model.
    """
    nodes = model.graph.nodes
    names = {name for node in nodes for name in (node.name, *node.inputs, *node.outputs) if name}
    overrides.check(names)
    return frozenset(
        node.name
        for node in nodes
        for rule in overrides.rules
        if rule.keeps_float and any(rule.matches(name) for name in (node.name, *node.inputs, *node.outputs) if name)
    )


def overridden(grids: Grids, plan: QuantPlan, overrides: Overrides) -> Grids:
    """The grids with what overrides say of single tensors; the last that matches holds.

    An override that matches a node speaks of its weight, and of the activations that it reads and gives out, among
    them those behind the bias and the activation function that are fused into it.

    Raises:
        UsageError: if an override sets something of weights or activations and matches none.
    """
    by_weight = _users(plan)
    by_activation: dict[str, list[IntegerNode]] = {site.tensor: [] for site in plan.activations}
    for node in plan.integer_nodes:
        for tensor in (*node.inputs, *node.outputs):
            by_activation[tensor].append(node)
    weight_bits, activation_bits, granularity = (
        dict(grids.weight_bits),
        dict(grids.activation_bits),
        dict(grids.granularity),
    )
    for rule in overrides.rules:
        weights, activations = _matched(rule, by_weight), _matched(rule, by_activation)
        rule.check_used(weights, activations)
        weight_bits.update(dict.fromkeys(weights, rule.weight_bits) if rule.weight_bits is not None else {})
        activation_bits.update(
            dict.fromkeys(activations, rule.activation_bits) if rule.activation_bits is not None else {}
        )
        granularity.update(dict.fromkeys(weights, rule.granularity) if rule.granularity is not None else {})
    return replace(grids, weight_bits=weight_bits, activation_bits=activation_bits, granularity=granularity)


def _matched(rule: Override, tensors: Mapping[str, Collection[IntegerNode]]) -> list[str]:
    """The tensors that an override matches, by their own names or those of the nodes around them."""
    return [
        tensor
        for tensor, nodes in tensors.items()
        if rule.matches(tensor) or any(rule.matches(name) for node in nodes for name in (node.name, *node.followers))
    ]


# --- range -> scale -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Quantizers:
    """The parameters of every quantizer of a plan under one scheme.

    Attributes:
        activations: of the quantized activations, by tensor; none where activations stay float or get their scales
            at run time.
        weights: of the quantized weights, by tensor.
        constants: of the constant operands (see `constant_operand`), by the node that reads them.
        dynamic: whether activations that weights multiply get their scales at run time.
        unblocked: why a weight has one scale per channel under a scheme with blocks, by tensor.
        scheme: its name; empty where the grids have none.
        ranges: how the activations' clips were chosen; empty where there are none.
    """

    activations: Mapping[str, QParams]
    weights: Mapping[str, QParams]
    constants: Mapping[str, QParams] = field(default_factory=dict)
    dynamic: bool = False
    unblocked: Mapping[str, str] = field(default_factory=dict)
    scheme: str = ""
    ranges: str = ""


def make_quantizers(
    model: Model, plan: QuantPlan, ranges: RangeTable, scheme: Scheme | Grids, method: RangeMethod
) -> Quantizers:
    """Parameters for every quantizer of `plan` on the grids of `scheme`.

    Args:
        model: the float model.
        plan: its quantizer sites.
        ranges: its calibrated ranges; not looked at where activations stay float or get their scales at run time.
        scheme: the grids.
        method: chooses the activations' clips.

    Raises:
        CalibrationError: if `ranges` lacks a tensor of the plan.
    """
    grids = scheme.grids if isinstance(scheme, Scheme) else scheme
    weights = weight_params(plan, functools.partial(_constant, model), grids)
    shapes = {site.tensor: tuple(model.graph.initializers[site.tensor].dims) for site in plan.weights}
    reasons = unblocked(plan, shapes, grids)
    if grids.weight_only or grids.dynamic:
        return Quantizers({}, weights, dynamic=grids.dynamic, unblocked=reasons, scheme=grids.name)
    activations = activation_params(plan, ranges, grids, method)
    for node in plan.integer_nodes:
        if node.weight and node.bias and has_integer_bias(weights[node.weight.tensor]):
            name = node.weight.tensor
            input_scale = activations[node.inputs[0]].scale
            weights[name] = _raise_for_bias(weights[name], _constant(model, node.bias), input_scale, grids)
    constants = {
        node.name: _constant_params(constant_operand(model, node), grids)
        for node in plan.integer_nodes
        if node.constant is not None
    }
    return Quantizers(activations, weights, constants, unblocked=reasons, scheme=grids.name, ranges=method)


def has_integer_bias(weight: QParams) -> bool:
    """Whether a bias beside this weight has a scale `s_input * s_weight`; blocks of a channel have no common one."""
    return weight.block_size is None


def weight_quantizers(model: Model, plan: QuantPlan, grids: Grids) -> Quantizers:
    """Parameters for the weights of `plan` alone."""
    return Quantizers({}, weight_params(plan, functools.partial(_constant, model), grids))


def activation_params(plan: QuantPlan, ranges: RangeTable, grids: Grids, method: RangeMethod) -> dict[str, QParams]:
    """Per-tensor parameters of every quantized activation, one set for each shared grid."""
    prescribed = {
        node.output: grids.fixed_outputs[node.op_type]
        for node in plan.integer_nodes
        if fixed_site(node, grids.fixed_outputs)
    }
    groups: dict[str, QParams] = {}
    for site in plan.activations:  # a prescribed output comes first in its group: only moves follow it
        if site.group in groups:
            continue
        grid = grids.activation_grid(tuple(tensors_of_group(plan, site.group)), site.io)
        if site.tensor in prescribed:
            scale, zero_point = prescribed[site.tensor]
            groups[site.group] = QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid)
        else:
            groups[site.group] = ranges.params(plan, site.group, grid, method, grids.activation_placement)
    return {site.tensor: groups[site.group] for site in plan.activations}


def weight_params(plan: QuantPlan, value_of: Callable[[str], Array], grids: Grids) -> dict[str, QParams]:
    """Parameters of every quantized weight; `value_of` gives its values, one weight at a time."""
    users = _users(plan)
    return {
        site.tensor: _weight_param(value_of(site.tensor), site, grids, users.get(site.tensor, []))
        for site in plan.weights
    }


def _users(plan: QuantPlan) -> dict[str, list[IntegerNode]]:
    """The nodes that multiply by each weight."""
    users: dict[str, list[IntegerNode]] = {}
    for node in plan.integer_nodes:
        if node.weight is not None:
            users.setdefault(node.weight.tensor, []).append(node)
    return users


def _weight_param(weight: Array, site: WeightSite, grids: Grids, users: list[IntegerNode]) -> QParams:
    """The parameters of one weight, whose values are given with the nodes that multiply by it."""
    grid, wanted = grids.weight_grid(site.tensor), grids.granularity_of(site.tensor)
    along = _blocked_axis(weight.shape, wanted.block_size, users) if wanted.block_size is not None else ""
    if isinstance(along, int) and wanted.block_size is not None:
        lo, hi = _block_ends(weight, along, wanted.block_size)
        scale, zero_point = _laid(lo, hi, grid, grids.weight_placement)
        return QParams(scale, zero_point, grid, along, wanted.block_size)
    own = replace(grids, weight=grid, per_channel=wanted.per_channel)
    scale, zero_point = _laid(*_weight_ends(weight, site.axis, own), grid, grids.weight_placement)
    return QParams(scale, zero_point, grid, site.axis if own.per_channel else None)


def unblocked(plan: QuantPlan, shapes: Mapping[str, tuple[int, ...]], grids: Grids) -> dict[str, str]:
    """Why weights have one scale per channel though blocks were asked for, by tensor.

    Args:
        plan: the weights, and the nodes that multiply by them.
        shapes: of the weights.
        grids: what was asked for.
    """
    reasons = {}
    for tensor, users in _users(plan).items():
        size = grids.granularity_of(tensor).block_size
        along = _blocked_axis(shapes[tensor], size, users) if size is not None else 0
        if isinstance(along, str):
            reasons[tensor] = along
    return reasons


def _blocked_axis(shape: tuple[int, ...], size: int, users: list[IntegerNode]) -> int | str:
    """The axis along which a weight has blocks of `size` values, or why it has none."""
    axes = {_reduced_axis(node, len(shape)) for node in users}
    axis = axes.pop() if len(axes) == 1 else None
    if axis is None:
        return "the groups of a ConvTranspose share its channels"
    if shape[axis] < size:
        return f"the {shape[axis]} values along axis {axis} are fewer than a block of {size}"
    return axis


def _reduced_axis(node: IntegerNode, rank: int) -> int | None:
    """The axis of a node's weight that its product sums over; None where groups cut through it.

    Conv (O, I/g, ...) 1; ConvTranspose (I, O/g, ...) 0; Gemm the one that is not its output's; MatMul (..., K, N) the
    last but one. (ONNX operator definitions, opset 21.)
    """
    if node.op_type == "Conv":
        return 1
    if node.op_type == "ConvTranspose":
        return 0 if node.groups == 1 else None
    if node.op_type == "Gemm" and node.weight is not None:
        return 1 - node.weight.axis
    return rank - 2


def _block_ends(weight: Array, axis: int, size: int) -> tuple[Array, Array]:
    """Least and largest value of each block; a block of zeros borrows the largest magnitude of the others."""
    starts = np.arange(0, weight.shape[axis], size)
    lo, hi = np.minimum.reduceat(weight, starts, axis=axis), np.maximum.reduceat(weight, starts, axis=axis)
    return _filled(lo, hi)


def _filled(lo: Array, hi: Array) -> tuple[Array, Array]:
    """The ends of ranges, where those that hold nothing but zeros borrow the largest magnitude of the others."""
    width = np.maximum(-lo, hi)
    empty, largest = width <= 0, width.max() or 1.0
    return np.where(empty, -largest, lo), np.where(empty, largest, hi)


def _weight_ends(weight: Array, axis: int, grids: Grids) -> tuple[Array, Array]:
    """The ends of the range that a weight's grid covers: () per tensor, (channels,) per channel."""
    if grids.weight_placement.symmetric and (grids.per_channel or grids.search_clip):
        clip = weight_clip(weight, axis, grids.weight, grids.per_channel, grids.weight_placement.power_of_two)
        return -clip, clip
    rows = np.moveaxis(weight, axis, 0).reshape(weight.shape[axis] if grids.per_channel else 1, -1)
    lo, hi = _filled(rows.min(axis=1), rows.max(axis=1))
    return (lo, hi) if grids.per_channel else (lo[0], hi[0])


def constant_operand(model: Model, node: IntegerNode) -> Array:
    """The values of a node's constant operand. A divisor gives its reciprocal, as back ends multiply by that."""
    values = _constant(model, node.constant or "")
    return np.asarray(np.float32(1) / values, np.float32) if node.op_type == "Div" else values


def _constant_params(values: Array, grids: Grids) -> QParams:
    """Parameters of a constant operand: per tensor, over all its values."""
    return range_params(float(values.min()), float(values.max()), grids.activation, grids.activation_placement)


def range_params(lo: float, hi: float, grid: Grid, placement: Placement | None = None) -> QParams:
    """The grid laid over a range, which always includes zero.

    Symmetric: scale = max(|lo|, |hi|) / (qmax - middle), zero_point = middle,
    with middle = 0 for signed codes, else (qmax + 1) / 2.
    Asymmetric: scale = (hi - lo) / (qmax - qmin), zero_point = round(qmin - lo / scale).

    Without a `placement`, signed grids are symmetric and unsigned ones are not.
    """
    scale, zero_point = _laid(np.asarray(lo), np.asarray(hi), grid, placement or _own_placement(grid))
    return QParams(scale, zero_point, grid)


def _own_placement(grid: Grid) -> Placement:
    """How onnxqt's own schemes lay a grid over a range."""
    return Placement(symmetric=grid.signed)


def _laid(lo: Array, hi: Array, grid: Grid, placement: Placement) -> tuple[FloatArray, Array]:
    """Scale and zero point of a grid over each of several ranges."""
    lo, hi = np.minimum(lo.astype(np.float64), 0.0), np.maximum(hi.astype(np.float64), 0.0)
    middle = 0 if grid.signed else (grid.qmax + 1) // 2
    steps = np.maximum(-lo, hi) / (grid.qmax - middle) if placement.symmetric else (hi - lo) / (grid.qmax - grid.qmin)
    scale = np.asarray(np.maximum(steps.astype(np.float32), _MIN_SCALE))
    if placement.power_of_two:
        scale = power_of_two_above(scale)
    if placement.symmetric:
        return scale, np.full(scale.shape, middle, np.int32)
    zero_point = np.clip(np.rint(grid.qmin - lo / scale.astype(np.float64)), grid.qmin, grid.qmax)
    return scale, np.asarray(zero_point, np.int32)


def power_of_two_above(scale: FloatArray) -> FloatArray:
    """The least power of two that is not under each scale, exactly."""
    mantissa, exponent = np.frexp(scale)  # scale = mantissa * 2^exponent, mantissa in [1/2, 1)
    return np.asarray(np.ldexp(np.float32(1), exponent - (mantissa == np.float32(0.5))), np.float32)


def clip_range(seen: TensorRange, grid: Grid, method: RangeMethod, placement: Placement | None = None) -> Interval:
    """The interval that a grid should cover.

    minmax: what was observed. percentile: without the outer 0.01 % on each side. mse: the least expected
    squared quantization error. entropy: the least Kullback-Leibler divergence between the histogram and its
    quantized form (Migacz, "8-bit inference with TensorRT", GTC 2017).
    """
    lo, hi = min(seen.min, 0.0), max(seen.max, 0.0)
    if lo == hi or method == "minmax":
        return lo, hi
    if method == "percentile":
        return _percentile(seen, lo, hi)
    cost = _squared_error if method == "mse" else _divergence
    return _search(seen, _Laying(grid, placement or _own_placement(grid)), (lo, hi), cost)


def _percentile(seen: TensorRange, lo: float, hi: float) -> Interval:
    cumulative = np.cumsum(seen.counts) / seen.count
    tail = 1 - PERCENTILE / 100
    width = 2 * seen.limit / BINS
    low = -seen.limit + width * int(np.searchsorted(cumulative, tail, side="right"))
    high = -seen.limit + width * (int(np.searchsorted(cumulative, 1 - tail)) + 1)
    return min(0.0, max(lo, low)), max(0.0, min(hi, high))


@dataclass(frozen=True, slots=True)
class _Laying:
    """A grid and how it is laid over a range."""

    grid: Grid
    placement: Placement

    def over(self, interval: Interval) -> QParams:
        return range_params(*interval, self.grid, self.placement)


def _search(
    seen: TensorRange,
    laying: _Laying,
    observed: Interval,
    cost: Callable[[TensorRange, _Laying, Interval], float],
) -> Interval:
    """The cheapest shrunken interval: both ends together first, then each end by itself."""
    best = _cheapest(seen, laying, [(observed[0] * f, observed[1] * f) for f in _FRACTIONS], cost)
    if laying.placement.symmetric or 0.0 in observed:
        return best
    for _ in range(2):
        best = _cheapest(seen, laying, [best, *((observed[0] * f, best[1]) for f in _FRACTIONS)], cost)
        best = _cheapest(seen, laying, [best, *((best[0], observed[1] * f) for f in _FRACTIONS)], cost)
    return best


def _cheapest(
    seen: TensorRange,
    laying: _Laying,
    intervals: list[Interval],
    cost: Callable[[TensorRange, _Laying, Interval], float],
) -> Interval:
    return min(intervals, key=lambda interval: cost(seen, laying, interval))


def _squared_error(seen: TensorRange, laying: _Laying, interval: Interval) -> float:
    occupied = seen.counts > 0
    x = seen.centers[occupied]
    error = fake_quantize(x, laying.over(interval)) - x
    return float(np.dot(seen.counts[occupied], error * error))


def _divergence(seen: TensorRange, laying: _Laying, interval: Interval) -> float:
    """KL(P || Q): P the histogram with the clipped tails added at the ends, Q what the grid keeps of it.

    The bins next to zero count as the ones beside them: zero is on every grid, and the many exact zeros behind a Relu
    would make the finest grid look best, whatever it clips.
    """
    params = laying.over(interval)
    lo, hi = (float(end) for end in params.range)
    x = seen.centers
    inside = (x >= lo) & (x <= hi)
    counts = seen.counts.astype(np.float64)
    middle = BINS // 2
    counts[middle - 1], counts[middle] = counts[middle - 2], counts[middle + 1]
    if not inside.any():
        return float("inf")
    p = counts[inside].copy()
    level = np.rint(x[inside] / float(params.scale)).astype(np.int64)
    level -= level.min()
    occupied = p > 0
    total = np.bincount(level, weights=p)
    share = np.bincount(level, weights=occupied)
    q = np.where(occupied, (total / np.maximum(share, 1))[level], 0.0)
    p[0] += counts[x < lo].sum()
    p[-1] += counts[x > hi].sum()
    p, q = p / p.sum(), q / (q.sum() or 1.0)
    mask = p > 0
    return float(np.sum(p[mask] * np.log(p[mask] / np.maximum(q[mask], 1e-12))))


def weight_clip(weight: Array, axis: int, grid: Grid, per_channel: bool, power_of_two: bool = False) -> FloatArray:
    """Largest magnitude that the grid keeps of a weight: float32 () per tensor, (channels,) per channel.

    Per channel it is absmax, as compilers have it; channels of zeros borrow the largest of the others, so that
    their bias fits. Per tensor it is the clip with the least fourth power of the error (see `best_clip`). The
    second power clips so much that the common sign of the clipped errors costs more than the finer grid saves.
    With `power_of_two` the scale is rounded up to one before the error is looked at.
    """
    if not per_channel:
        return best_clip(weight, grid, 4, power_of_two)
    absmax = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1)
    return np.where(absmax > 0, absmax, absmax.max() or 1.0).astype(np.float32)


def best_clip(weight: Array, grid: Grid, power: int, power_of_two: bool = False) -> FloatArray:
    """The fraction of absmax, 1 included, that a symmetric grid should keep of a whole weight: float32 ().

    clip = argmin over c of  sum |fake_quantize(w, c / qmax) - w|^power

    The sum runs over at most 2^20 values, evenly spaced.
    """
    largest = np.float32(np.abs(weight).max() or 1.0)
    weight = weight.ravel()[:: -(-weight.size // _CLIP_SAMPLE)]
    zero = np.zeros((), np.int32)

    def cost(clip: np.float32) -> float:
        scale = np.asarray(max(clip / np.float32(grid.qmax), _MIN_SCALE), np.float32)
        scale = power_of_two_above(scale) if power_of_two else scale
        error = np.abs(fake_quantize(weight, QParams(scale, zero, grid)) - weight)
        return float(np.sum(error**power))

    return np.asarray(min((largest * np.float32(f) for f in _WEIGHT_FRACTIONS), key=cost), np.float32)


def _raise_for_bias(params: QParams, bias: Array, input_scale: FloatArray, grids: Grids) -> QParams:
    """Scales large enough for the bias, quantized with `input_scale * scale`, to fit into INT32."""
    needed = np.abs(bias).reshape(-1) / (input_scale * np.float32(_MAX_BIAS_CODE))
    if params.axis is None or needed.size == 1:
        needed = needed.max()
    elif needed.size != params.scale.size:  # grouped ConvTranspose: each scale serves one channel of every group
        needed = needed.reshape(-1, params.scale.size).max(axis=0)
    scale = np.maximum(params.scale, needed).astype(np.float32).reshape(params.scale.shape)
    if grids.weight_placement.power_of_two:
        scale = power_of_two_above(scale)
    return replace(params, scale=scale)


def bias_scale(weight: QParams, input_scale: FloatArray, size: int) -> FloatArray:
    """Scale of an INT32 bias of `size` values, `s_input * s_weight`: float32 () per tensor, (channels,) per channel.

    The scales of a grouped ConvTranspose weight repeat for each group; a bias of one value serves all channels.
    """
    scale = (input_scale * weight.scale).astype(np.float32)
    return np.tile(scale, max(1, size // scale.size)) if scale.ndim else scale


def _constant(model: Model, tensor: str) -> Array:
    value = model.graph.constant(tensor)
    if value is None:
        raise CalibrationError(f"'{tensor}' is not a constant of the model")
    return value
