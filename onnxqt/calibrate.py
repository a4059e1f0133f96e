"""Stage 3, calibrate: what values each tensor takes, and the scales that follow.

One streaming pass over the samples keeps a histogram per activation, so memory does not grow with their
number. This is the only module where a scale is computed from a range.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from onnxqt.data import Samples, fixed_batch
from onnxqt.errors import CalibrationError, UnboundedError
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, FloatArray, Grid, QParams, fake_quantize
from onnxqt.plan import QuantPlan, tensors_of_group
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import Scheme

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
    def _params(self) -> dict[tuple[tuple[str, ...], Grid, RangeMethod], QParams]:
        """Parameters that were asked for before; schemes that differ in the weights alone share them."""
        return {}

    def params(self, plan: QuantPlan, group: str, grid: Grid, method: RangeMethod) -> QParams:
        """The parameters of all tensors that share a grid."""
        key = (tuple(tensors_of_group(plan, group)), grid, method)
        if key not in self._params:
            self._params[key] = range_params(*clip_range(self.of_group(plan, group), grid, method), grid)
        return self._params[key]

    def merge(self, other: "RangeTable") -> "RangeTable":
        """The table of both sets of samples together."""
        merged = {name: seen.merge(other.tensors[name]) for name, seen in self.tensors.items()}
        return RangeTable(merged, self.samples + other.samples)

    def of_group(self, plan: QuantPlan, group: str) -> TensorRange:
        """The range of all tensors that share a grid."""
        first, *rest = (self.tensors[tensor] for tensor in tensors_of_group(plan, group))
        for seen in rest:
            first = first.merge(seen)
        return first


def calibrate(
    model: Model,
    plan: QuantPlan,
    samples: Samples,
    batch_size: int = 32,
    progress: Callable[[int], None] = lambda done: None,
) -> RangeTable:
    """Run `model` over `samples` and record the range of every quantized activation.

    Args:
        model: the float model.
        plan: its quantizer sites.
        samples: the calibration data, read once in order.
        batch_size: samples run together; bounds the memory.
        progress: called with the number of samples done.

    Raises:
        UnboundedError: naming the tensors that take NaN or infinite values.
    """
    names = [site.tensor for site in plan.activations]
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


# --- range -> scale -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Quantizers:
    """The parameters of every quantizer of a plan under one scheme, by tensor."""

    activations: Mapping[str, QParams]
    weights: Mapping[str, QParams]


def make_quantizers(
    model: Model, plan: QuantPlan, ranges: RangeTable, scheme: Scheme, method: RangeMethod
) -> Quantizers:
    """Parameters for every quantizer of `plan` under `scheme`; `method` chooses the activations' clips."""
    activations = activation_params(plan, ranges, scheme, method)
    weights = weight_params(plan, functools.partial(_constant, model), scheme)
    for node in plan.integer_nodes:
        if node.weight and node.bias:
            name = node.weight.tensor
            input_scale = activations[node.inputs[0]].scale
            weights[name] = _raise_for_bias(weights[name], _constant(model, node.bias), input_scale)
    return Quantizers(activations, weights)


def activation_params(plan: QuantPlan, ranges: RangeTable, scheme: Scheme, method: RangeMethod) -> dict[str, QParams]:
    """Per-tensor parameters of every quantized activation, one set for each shared grid."""
    groups: dict[str, QParams] = {}
    for site in plan.activations:
        if site.group not in groups:
            grid = scheme.io_grid if site.io else scheme.activation_grid
            groups[site.group] = ranges.params(plan, site.group, grid, method)
    return {site.tensor: groups[site.group] for site in plan.activations}


def weight_params(plan: QuantPlan, value_of: Callable[[str], Array], scheme: Scheme) -> dict[str, QParams]:
    """Symmetric parameters of every quantized weight; `value_of` gives its values, one weight at a time."""
    params = {}
    for site in plan.weights:
        clip = weight_clip(value_of(site.tensor), site.axis, scheme.weight_grid, scheme.per_channel)
        scale = np.maximum(clip / np.float32(scheme.weight_grid.qmax), _MIN_SCALE).astype(np.float32)
        zero = np.zeros(scale.shape, np.int32)
        params[site.tensor] = QParams(scale, zero, scheme.weight_grid, site.axis if scheme.per_channel else None)
    return params


def range_params(lo: float, hi: float, grid: Grid) -> QParams:
    """The grid laid over a range, which always includes zero.

    Signed grids are symmetric: scale = max(|lo|, |hi|) / qmax, zero_point = 0.
    Unsigned: scale = (hi - lo) / (qmax - qmin), zero_point = round(qmin - lo / scale).
    """
    lo, hi = min(lo, 0.0), max(hi, 0.0)
    if grid.signed:
        scale = max(np.float32(max(-lo, hi) / grid.qmax), _MIN_SCALE)
        return QParams(np.asarray(scale, np.float32), np.asarray(0, np.int32), grid)
    scale = max(np.float32((hi - lo) / (grid.qmax - grid.qmin)), _MIN_SCALE)
    zero_point = int(np.clip(np.rint(grid.qmin - lo / float(scale)), grid.qmin, grid.qmax))
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid)


def clip_range(seen: TensorRange, grid: Grid, method: RangeMethod) -> Interval:
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
    return _search(seen, grid, (lo, hi), cost)


def _percentile(seen: TensorRange, lo: float, hi: float) -> Interval:
    cumulative = np.cumsum(seen.counts) / seen.count
    tail = 1 - PERCENTILE / 100
    width = 2 * seen.limit / BINS
    low = -seen.limit + width * int(np.searchsorted(cumulative, tail, side="right"))
    high = -seen.limit + width * (int(np.searchsorted(cumulative, 1 - tail)) + 1)
    return min(0.0, max(lo, low)), max(0.0, min(hi, high))


def _search(
    seen: TensorRange,
    grid: Grid,
    observed: Interval,
    cost: Callable[[TensorRange, Grid, Interval], float],
) -> Interval:
    """The cheapest shrunken interval: both ends together first, then each end by itself."""
    best = _cheapest(seen, grid, [(observed[0] * f, observed[1] * f) for f in _FRACTIONS], cost)
    if grid.signed or 0.0 in observed:
        return best
    for _ in range(2):
        best = _cheapest(seen, grid, [best, *((observed[0] * f, best[1]) for f in _FRACTIONS)], cost)
        best = _cheapest(seen, grid, [best, *((best[0], observed[1] * f) for f in _FRACTIONS)], cost)
    return best


def _cheapest(
    seen: TensorRange,
    grid: Grid,
    intervals: list[Interval],
    cost: Callable[[TensorRange, Grid, Interval], float],
) -> Interval:
    return min(intervals, key=lambda interval: cost(seen, grid, interval))


def _squared_error(seen: TensorRange, grid: Grid, interval: Interval) -> float:
    occupied = seen.counts > 0
    x = seen.centers[occupied]
    error = fake_quantize(x, range_params(*interval, grid)) - x
    return float(np.dot(seen.counts[occupied], error * error))


def _divergence(seen: TensorRange, grid: Grid, interval: Interval) -> float:
    """KL(P || Q): P the histogram with the clipped tails added at the ends, Q what the grid keeps of it."""
    params = range_params(*interval, grid)
    lo, hi = (float(end) for end in params.range)
    x = seen.centers
    inside = (x >= lo) & (x <= hi)
    counts = seen.counts.astype(np.float64)
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
    p, q = p / p.sum(), q / max(q.sum(), 1.0)
    mask = p > 0
    return float(np.sum(p[mask] * np.log(p[mask] / np.maximum(q[mask], 1e-12))))


def weight_clip(weight: Array, axis: int, grid: Grid, per_channel: bool) -> FloatArray:
    """Largest magnitude that the grid keeps of a weight: float32 () per tensor, (channels,) per channel.

    Per channel it is absmax, as compilers have it; channels of zeros borrow the largest of the others, so that
    their bias fits. Per tensor it is the clip with the least fourth power of the error (see `best_clip`). The
    second power clips so much that the common sign of the clipped errors costs more than the finer grid saves.
    """
    if not per_channel:
        return best_clip(weight, grid, power=4)
    absmax = np.abs(np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)).max(axis=1)
    return np.where(absmax > 0, absmax, absmax.max() or 1.0).astype(np.float32)


def best_clip(weight: Array, grid: Grid, power: int) -> FloatArray:
    """The fraction of absmax, 1 included, that a symmetric grid should keep of a whole weight: float32 ().

    clip = argmin over c of  sum |fake_quantize(w, c / qmax) - w|^power

    The sum runs over at most 2^20 values, evenly spaced.
    """
    largest = np.float32(np.abs(weight).max() or 1.0)
    weight = weight.ravel()[:: -(-weight.size // _CLIP_SAMPLE)]
    zero = np.zeros((), np.int32)

    def cost(clip: np.float32) -> float:
        scale = np.asarray(max(clip / np.float32(grid.qmax), _MIN_SCALE), np.float32)
        error = np.abs(fake_quantize(weight, QParams(scale, zero, grid)) - weight)
        return float(np.sum(error**power))

    return np.asarray(min((largest * np.float32(f) for f in _WEIGHT_FRACTIONS), key=cost), np.float32)


def _raise_for_bias(params: QParams, bias: Array, input_scale: FloatArray) -> QParams:
    """Scales large enough for the bias, quantized with `input_scale * scale`, to fit into INT32."""
    needed = np.abs(bias).reshape(-1) / (input_scale * np.float32(_MAX_BIAS_CODE))
    if params.axis is None or needed.size == 1:
        needed = needed.max()
    elif needed.size != params.scale.size:  # grouped ConvTranspose: each scale serves one channel of every group
        needed = needed.reshape(-1, params.scale.size).max(axis=0)
    scale = np.maximum(params.scale, needed).astype(np.float32).reshape(params.scale.shape)
    return QParams(scale, params.zero_point, params.grid, params.axis)


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
