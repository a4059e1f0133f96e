"""Robust rounding: float weights that round well on many grids at once, without training.

What rounding to the nearest code does to a layer depends on where its real weights lie. A compiler picks the grid, so
one set of weights V is looked for that rounds well on all grids of interest, and serves as it is in float too. Layer
by layer, with W the original weights, Q_r(V) what grid r makes of V (in float V itself), and x what the layer reads:

    min over V of  sum over r of  share_r  mean |(Q_r(V) - W) x|^2
                 = sum over r of  share_r  tr((Q_r(V) - W) H (Q_r(V) - W)^T),  H = mean x x^T

It is minimised one weight of every output at a time, in turn: each tries values spread over one step of the coarsest
grid to either side of the original. For one grid this is the problem of learned rounding (Nagel et al. 2020, arXiv
2004.10568, equation 13; Frantar and Alistarh 2022, arXiv 2208.11580, have the same H); that several grids share one V
is this package's own.

The least and the largest weight of each output stay, so that scales from extremes stay. Layers do not make up for the
errors of those before them: those errors differ between grids, and making up for their mean was worse (with parts of
five layers, W4A8 per channel fell from 19.6 to 14.3 dB on held-out samples of ResNet-20).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from onnxqt.calibrate import weight_params
from onnxqt.data import Samples
from onnxqt.model import Model
from onnxqt.numerics import Array, FloatArray
from onnxqt.plan import QuantPlan
from onnxqt.ptq.layers import Layer, Progress, by_name, layers_of, run_part, silent
from onnxqt.ptq.matrices import Site, SiteGrid, grouped, no_matrices, positions_of, read_rows, site_of
from onnxqt.schemes import Grids

_BLOCK = 64  # inputs between two exact products with H
_SETTLED = 1e-3  # share of the weights below which nothing more is gained by another sweep
_MOMENT_BYTES = 512 << 20  # of the H and T that are measured in one pass over the samples
_MOST_INPUTS = 8192  # of an output: H is a matrix of this size squared

_GridsOf = Callable[[FloatArray], list[SiteGrid | None]]  # what is laid over a weight (groups, outputs, inputs)


@dataclass(frozen=True, slots=True)
class RobustSettings:
    """How robust rounding searches.

    Attributes:
        samples: that are used, at most.
        rows: positions that H is the mean over, for each input of an output.
        sweeps: over all weights of a layer, at most.
        choices: values that a weight tries.
        seed: of the choice of positions.
    """

    samples: int = 2048
    rows: int = 24
    sweeps: int = 4
    choices: int = 25
    seed: int = 0


_DEFAULT = RobustSettings()


@dataclass(frozen=True, eq=False, slots=True)
class RobustError:
    """Mean squared error of a layer's output, relative to its mean square: float64 (1 + kinds,), in float first."""

    before: Array
    after: Array


@dataclass(frozen=True, eq=False)
class Robust:
    """Float weights that round well.

    Attributes:
        model: the weights.
        errors: of each layer, by the name of its node.
        skipped: why a layer was left as it was, by the name of its node.
    """

    model: Model
    errors: Mapping[str, RobustError]
    skipped: Mapping[str, str]


def round_robustly(
    model: Model,
    plan: QuantPlan,
    grids: Sequence[Grids],
    samples: Samples,
    settings: RobustSettings = _DEFAULT,
    progress: Progress = silent,
) -> Robust:
    """Move the weights of every Conv, Gemm and MatMul so that they round well on all grids.

    Args:
        model: the float model.
        plan: its quantizer sites.
        grids: the ways in which it is quantized; those that lay the same codes over weights count together, and float
            counts as one more.
        samples: the calibration data, without labels.
        settings: see `RobustSettings`.
        progress: called with the number of layers done, and the name of the last one.

    Raises:
        ModelError: if the model is too large for it.
    """
    kinds = _kinds(grids)
    layers = layers_of(model, plan)
    skipped = {layer.node.name: reason for layer in layers if (reason := _reason(model, layer))}
    work = [layer for layer in layers if layer.node.name not in skipped]
    samples = samples.take(settings.samples)
    weights: dict[str, Array] = {}
    errors: dict[str, RobustError] = {}
    for part in _parts(model, work):
        for layer, h in zip(part, _measured(model, part, samples, settings), strict=True):
            site = site_of(model, layer)
            values, errors[layer.node.name] = _problem(site, layer, plan, kinds, h).solved(settings)
            weights[site.tensor] = np.asarray(site.whole(values), np.float32)
            progress(len(errors), layer.node.name)
    return Robust(model.with_weights(weights), errors, skipped)


@dataclass(frozen=True, eq=False)
class _Kind:
    """One way to lay codes over weights, None for float, and how often it counts."""

    grids: Grids | None
    share: float = 1.0


def _kinds(grids: Sequence[Grids]) -> list[_Kind]:
    """The different ways to lay codes over weights, that of float first."""
    kinds = [_Kind(None)]
    for one in grids:
        own = replace(one, activation=one.weight, io=one.weight, activation_placement=one.weight_placement)
        own = replace(own, fixed_outputs={}, dynamic=False, name="", activation_bits={})
        at = next((i for i, kind in enumerate(kinds) if kind.grids == own), None)
        if at is None:
            kinds.append(_Kind(own))
        else:
            kinds[at] = _Kind(own, kinds[at].share + 1)
    return kinds


def _reason(model: Model, layer: Layer) -> str | None:
    reason = no_matrices(model.graph, layer)
    if reason is not None or layer.node.weight is None:
        return reason
    inputs = _matrices(site_of(model, layer)).shape[2]
    return f"{inputs} inputs of an output are more than {_MOST_INPUTS}" if inputs > _MOST_INPUTS else None


def _matrices(site: Site) -> FloatArray:
    return np.asarray(site.matrices(site.values), np.float32)


def _parts(model: Model, layers: Sequence[Layer]) -> Iterator[list[Layer]]:
    """The layers in order, in parts whose H fit into memory."""
    part: list[Layer] = []
    size = 0
    for layer in layers:
        groups, _, inputs = _matrices(site_of(model, layer)).shape
        more = 8 * groups * inputs**2
        if part and size + more > _MOMENT_BYTES:
            yield part
            part, size = [], 0
        part, size = [*part, layer], size + more
    if part:
        yield part


# --- what layers read ---------------------------------------------------------------------------------------------


def _measured(model: Model, layers: Sequence[Layer], samples: Samples, settings: RobustSettings) -> list[FloatArray]:
    """H of each layer: the mean of x x^T over what it reads, float32 (groups, inputs, inputs)."""
    rows = [_Rows(model, layer, settings, samples.count) for layer in layers]
    tensors = [name for r in rows for name in (r.read, r.end)]
    for values in run_part(model, model.proto, tensors, samples):
        for r in rows:
            r.add(values)
    return [r.mean for r in rows]


class _Rows:
    """What a layer reads at some positions of each sample."""

    def __init__(self, model: Model, layer: Layer, settings: RobustSettings, samples: int) -> None:
        groups, _, inputs = _matrices(site_of(model, layer)).shape
        tensor = layer.node.weight.tensor if layer.node.weight else ""
        self.read, self.end = layer.source.inputs[0], by_name(model.proto)[layer.end].output[0]
        self._layer, self._groups = layer, groups
        self._kernel = model.graph.initializers[tensor].dims[2:]
        self._positions = -(-settings.rows * inputs // samples)
        self._random = np.random.default_rng(settings.seed)
        self._sum: Array = np.zeros((groups, inputs, inputs))
        self._count = 0

    def add(self, values: Mapping[str, Array]) -> None:
        """Look at the tensors of a batch."""
        x, y = read_rows(self._layer, values[self.read], values[self.end], self._kernel)
        drawn = grouped(positions_of(x, y, self._positions, self._random)[0], self._groups)
        self._sum += drawn.swapaxes(1, 2) @ drawn
        self._count += drawn.shape[1]

    @property
    def mean(self) -> FloatArray:
        """The mean of x x^T over everything seen, float32 (groups, inputs, inputs)."""
        return np.asarray(self._sum / max(self._count, 1), np.float32)


# --- one layer ----------------------------------------------------------------------------------------------------


def _problem(site: Site, layer: Layer, plan: QuantPlan, kinds: Sequence[_Kind], h: FloatArray) -> "_Problem":
    alone = replace(plan, integer_nodes=(layer.node,))

    def grids_of(values: FloatArray) -> list[SiteGrid | None]:
        whole = site.whole(values)
        return [
            None if kind.grids is None else site.grid(weight_params(alone, lambda _: whole, kind.grids)[site.tensor])
            for kind in kinds
        ]

    shares = np.array([kind.share for kind in kinds], np.float32)
    return _Problem(_matrices(site), h, grids_of, shares / shares.sum())


@dataclass(frozen=True, eq=False, slots=True)
class _Problem:
    """The weight of a layer (groups, outputs, inputs), its H, and the grids with how much each counts, float first."""

    weight: FloatArray
    h: FloatArray
    grids_of: _GridsOf
    shares: FloatArray

    def solved(self, settings: RobustSettings) -> tuple[FloatArray, RobustError]:
        """The best weights found, and the errors before and after."""
        before = after = self._errors(self.weight)
        best = values = self.weight
        for _ in range(settings.sweeps):
            values, moved = self._swept(values, settings.choices)
            errors = self._errors(values)
            if self.shares @ errors < self.shares @ after:
                best, after = values, errors
            if moved < _SETTLED * values.size:
                break
        power = float(np.sum(self.weight * (self.weight @ self.h), dtype=np.float64)) or 1.0
        return best, RobustError(before / power, after / power)

    def _errors(self, values: FloatArray) -> Array:
        """tr((Q_r(V) - W) H (Q_r(V) - W)^T) by kind, float64."""
        errors = [_rounded(values, grid) - self.weight for grid in self.grids_of(values)]
        return np.array([np.sum(e * (e @ self.h), dtype=np.float64) for e in errors])

    def _swept(self, values: FloatArray, choices: int) -> tuple[FloatArray, int]:
        """All weights once in turn: the new ones, and how many moved."""
        weight, h, grids = self.weight, self.h, self.grids_of(values)
        errors = [_rounded(values, grid) - weight for grid in grids]
        low, high = weight.min(axis=2, keepdims=True), weight.max(axis=2, keepdims=True)
        fixed = (weight == low) | (weight == high)
        widest = np.max([grid.scale.max(axis=2, keepdims=True) + 0 * low for grid in grids if grid], axis=0)
        offsets = widest * np.linspace(-1, 1, choices, dtype=np.float32)
        values, moved = values.copy(), 0
        for first in range(0, weight.shape[2], _BLOCK):
            block = slice(first, first + _BLOCK)
            slopes = [e @ h[:, :, block] for e in errors]  # half of each error's slope
            for i in range(first, min(first + _BLOCK, weight.shape[2])):
                tried = np.clip(weight[:, :, i, None] + offsets, low, high)
                tried = np.concatenate([values[:, :, i, None], tried], axis=2)
                tried[fixed[:, :, i]] = values[:, :, i, None][fixed[:, :, i]]
                steps = [
                    _rounded(tried, grid and grid.column(i)) - (weight[:, :, i, None] + e[:, :, i, None])
                    for grid, e in zip(grids, errors, strict=True)
                ]
                cost = sum(
                    share * d * (2 * slope[:, :, i - first, None] + d * h[:, i, i, None, None])
                    for share, d, slope in zip(self.shares, steps, slopes, strict=True)
                )
                chosen = np.argmin(cost, axis=2)[..., None]
                moved += int(np.count_nonzero(chosen))
                for d, e, slope in zip(steps, errors, slopes, strict=True):
                    taken = np.take_along_axis(d, chosen, 2)
                    e[:, :, i] += taken[..., 0]
                    slope += taken * h[:, None, i, block]
                values[:, :, i] = np.take_along_axis(tried, chosen, 2)[..., 0]
        return values, moved


def _rounded(values: FloatArray, grid: SiteGrid | None) -> FloatArray:
    """What a grid makes of weights; the weights themselves where there is none."""
    return values if grid is None else grid.rounded(values)
