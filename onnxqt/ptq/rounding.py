"""Learned rounding (AdaRound): each weight goes up or down, whichever serves the layer's output.

Layer by layer (Nagel et al. 2020, "Up or down? Adaptive rounding for post-training quantization", arXiv 2004.10568,
equations 21 to 25):

    W_q = s clip(floor(W / s) + h(V), qmin, qmax)
    h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1),  zeta = 1.1, gamma = -0.1
    min over V of  |f(W x + b) - f(W_q x_q + b)|^2 + lambda sum(1 - |2 h(V) - 1|^beta)

with f the activation fused behind the layer, x what it reads in the float model and x_q in the quantized model whose
layers before it are rounded already. The regularizer is off for the first fifth of the steps; then beta falls from 20,
where h is free, to 2, where every h is 0 or 1.

Lambda is relative (ours): for N weights, and the error E that rounding to the nearest makes,

    lambda = 300 E / N

The paper's lambda = 0.01 is 0.1 to 600 in place of 300 for layers of small and of large outputs. Where it is less
than about 30, weights stay undecided until the last step, and what they are rounded to then can be worse than the
nearest. From 30 to 1000 the errors differ by a tenth at most (on calibration data).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from onnxqt.data import Samples
from onnxqt.numerics import Array, FloatArray, fake_quantize
from onnxqt.ptq.layers import Layer, Progress, Quantized, by_name, layers_of, run_part, silent
from onnxqt.ptq.matrices import SiteGrid, grouped, no_matrices, positions_of, read_rows, site_of

ZETA, GAMMA = 1.1, -0.1  # of the rectified sigmoid (equation 23)
_BETA = (20.0, 2.0)  # first and last (equation 24)
_LEAST_ROWS, _ROWS_PER_WEIGHT = 256, 4  # positions of a step, for each weight of an output
_PART = 4096  # rows whose error is computed together
_MOMENTS = (0.9, 0.999)  # Adam's (Kingma and Ba 2015, arXiv 1412.6980)
_TINY = 1e-8


@dataclass(frozen=True, slots=True)
class RoundingSettings:
    """How rounding is learned.

    Attributes:
        samples: that are used, evenly spaced over those given.
        positions: of each sample that are used: of a convolution's output, or rows of a matrix.
        pool_bytes: of the inputs of a layer that are kept; fewer positions are used where it takes more.
        steps: of Adam, for each layer.
        rows: most positions of a step; fewer where an output has few weights, as in depthwise convolutions.
        learning_rate: of Adam.
        regularization: of which lambda is made (see above).
        warm_up: share of the steps without the regularizer.
        seed: of the choice of positions and their order.
    """

    samples: int = 1024
    positions: int = 32
    pool_bytes: int = 256 << 20
    steps: int = 2000
    rows: int = 1024
    learning_rate: float = 1e-2
    regularization: float = 300.0
    warm_up: float = 0.2
    seed: int = 0


_DEFAULT = RoundingSettings()


@dataclass(frozen=True, slots=True)
class LayerError:
    """Mean squared error of a layer's output on its pool of inputs, summed over the channels.

    Attributes:
        nearest: with every weight rounded to the nearest code.
        learned: with learned rounding; what was chosen has the smaller of the two.
    """

    nearest: float
    learned: float


@dataclass(frozen=True, eq=False)
class Rounded:
    """A quantized model with learned rounding.

    Attributes:
        quantized: the model; all its quantized weights lie on the grids of its quantizers, which are what they were.
            A file must be made with these, as other scales would round the weights anew.
        errors: of each layer, by the name of its node.
        skipped: why the weight of a layer is rounded to the nearest code, by the name of its node.
    """

    quantized: Quantized
    errors: Mapping[str, LayerError]
    skipped: Mapping[str, str]


def round_weights(
    quantized: Quantized, samples: Samples, settings: RoundingSettings = _DEFAULT, progress: Progress = silent
) -> Rounded:
    """Learn the rounding of every Conv, Gemm and MatMul of a plan that has a weight of its own.

    Args:
        quantized: the model, with the reference whose outputs it should have.
        samples: the calibration data, read twice for each layer.
        settings: see `RoundingSettings`.
        progress: called with the number of layers done, and the name of the last one.

    Raises:
        ModelError: if the model is too large for it.
    """
    layers = layers_of(quantized.model, quantized.plan)
    skipped = {layer.node.name: reason for layer in layers if (reason := no_matrices(quantized.model.graph, layer))}
    samples = samples.take(settings.samples)
    errors = {}
    for done, layer in enumerate(layer for layer in layers if layer.node.name not in skipped):
        rng = np.random.default_rng([settings.seed, done])
        site = site_of(quantized.model, layer)
        pool = _draw(quantized, layer, samples, settings, rng)
        grid = site.grid(quantized.quantizers.weights[site.tensor])
        problem = _Problem(site.matrices(site.values), grid, pool, layer.clamp)
        weight, errors[layer.node.name] = _learned(problem, settings, rng)
        quantized = _with_weights(quantized, {site.tensor: site.whole(weight)})
        progress(done + 1, layer.node.name)
    kept = {layer.node.weight.tensor for layer in layers if layer.node.name in skipped and layer.node.weight}
    nearest = {name: _nearest(quantized, name) for name in kept}
    return Rounded(_with_weights(quantized, nearest), errors, skipped)


def _with_weights(quantized: Quantized, weights: dict[str, Array]) -> Quantized:
    return replace(quantized, model=quantized.model.with_weights(weights))


def _nearest(quantized: Quantized, tensor: str) -> FloatArray:
    values = quantized.model.graph.constant(tensor)
    return fake_quantize(np.asarray(values), quantized.quantizers.weights[tensor])


# --- what a layer reads and should give out -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Pool:
    """Rows that a layer reads in the quantized model, and what the float model gives out there.

    Attributes:
        inputs: (groups, rows, inputs).
        targets: before the activation, (groups, rows, outputs).
        bias: (groups, 1, outputs).
    """

    inputs: FloatArray
    targets: FloatArray
    bias: FloatArray

    @property
    def count(self) -> int:
        """Number of rows."""
        return int(self.inputs.shape[1])

    def part(self, rows: slice | Array) -> "_Pool":
        """Some of the rows."""
        return _Pool(self.inputs[:, rows], self.targets[:, rows], self.bias)


def _draw(
    quantized: Quantized, layer: Layer, samples: Samples, settings: RoundingSettings, rng: np.random.Generator
) -> _Pool:
    """Random positions of every sample."""
    node, proto = layer.node, quantized.proto()
    read = by_name(proto)[node.name].input[0]
    end = by_name(quantized.reference.proto)[layer.end].output[0]
    sources = run_part(quantized.model, proto, [read], samples)
    wanted = run_part(quantized.reference, quantized.reference.proto, [end], samples)
    dims = quantized.model.graph.initializers[node.weight.tensor].dims if node.weight else ()
    width = 4 * math.prod(dims) * node.groups // dims[node.weight.axis] if node.weight else 1  # bytes of a row
    count = max(1, min(settings.positions, settings.pool_bytes // (samples.count * width)))
    rows = []
    for source, target in zip(sources, wanted, strict=True):
        x, y = read_rows(layer, source[read], target[end], dims[2:])
        rows.append(positions_of(x, y, count, rng))
    inputs, targets = (np.concatenate(parts) for parts in zip(*rows, strict=True))
    bias = quantized.model.graph.constant(node.bias) if node.bias else np.zeros(1, np.float32)
    spread = np.broadcast_to(np.asarray(bias).reshape(1, -1), (1, targets.shape[1]))
    return _Pool(grouped(inputs, node.groups), grouped(targets, node.groups), grouped(spread, node.groups))


# --- one layer ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, slots=True)
class _Problem:
    """The weight of a layer (groups, outputs, inputs), its grid, and what it should compute."""

    weight: FloatArray
    grid: SiteGrid
    pool: _Pool
    clamp: tuple[float, float]

    @property
    def steps(self) -> FloatArray:
        """W / s, in float32, as `numerics.quantize` divides."""
        return np.asarray(self.weight / self.grid.scale, np.float32)

    @property
    def free(self) -> Array:
        """Where rounding has a choice; elsewhere the clip decides."""
        floor = np.floor(self.steps)
        return np.asarray((floor >= self.grid.lo) & (floor < self.grid.hi))

    def error(self, weight: Array, part: _Pool) -> tuple[FloatArray, FloatArray]:
        """(f(W_q x_q + b) - f(y), what of it depends on W_q), (groups, rows, outputs) each."""
        outputs = part.inputs @ weight.swapaxes(1, 2) + part.bias
        lo, hi = np.float32(self.clamp[0]), np.float32(self.clamp[1])
        error = np.clip(outputs, lo, hi) - np.clip(part.targets, lo, hi)
        return error, np.where((outputs > lo) & (outputs < hi), error, np.float32(0))

    def mean_error(self, weight: Array) -> float:
        """Mean over the whole pool of the squared error, summed over the outputs."""
        count = self.pool.count
        parts = (self.pool.part(slice(first, first + _PART)) for first in range(0, count, _PART))
        errors = (self.error(weight, part)[0] for part in parts)
        return float(sum(np.sum(error * error, dtype=np.float64) for error in errors)) / count


def _learned(problem: _Problem, settings: RoundingSettings, rng: np.random.Generator) -> tuple[FloatArray, LayerError]:
    """The weight on its grid that gives the smaller error of learned and nearest rounding, and both errors."""
    grid, steps = problem.grid, problem.steps
    nearest = np.clip(np.rint(steps), grid.lo, grid.hi) * grid.scale
    error = problem.mean_error(nearest)
    strength = settings.regularization * error / max(int(problem.free.sum()), 1)
    h = _optimized(problem, strength, settings, rng)
    learned = np.clip(np.floor(steps) + (h >= 0.5), grid.lo, grid.hi) * grid.scale
    errors = LayerError(error, problem.mean_error(learned))
    return (learned if errors.learned < errors.nearest else nearest), errors


def _optimized(problem: _Problem, strength: float, settings: RoundingSettings, rng: np.random.Generator) -> FloatArray:
    """h(V) after the last step, starting where W_q = W; `strength` is lambda."""
    grid, free, floor = problem.grid, problem.free.astype(np.float32), np.floor(problem.steps)
    slope = free * grid.scale
    base = np.clip(floor, grid.lo, grid.hi) * grid.scale
    h = np.where(problem.free, problem.steps - floor, np.float32(0.5))
    v = -np.log((ZETA - GAMMA) / (h - GAMMA) - 1).astype(np.float32)
    first, second = np.zeros_like(v), np.zeros_like(v)
    for step, part in enumerate(_parts(problem.pool, settings, rng)):
        sigmoid = 1 / (1 + np.exp(-v))
        stretched = sigmoid * np.float32(ZETA - GAMMA) + np.float32(GAMMA)
        h = np.clip(stretched, 0, 1)
        _, error = problem.error(base + slope * h, part)
        gradient = slope * (error.swapaxes(1, 2) @ part.inputs) * np.float32(2 / error.shape[1])
        beta = _beta(step, settings)
        if beta is not None:
            gradient += free * _regularizer_slope(h, beta) * np.float32(strength)
        gradient *= ((stretched > 0) & (stretched < 1)) * sigmoid * (1 - sigmoid) * np.float32(ZETA - GAMMA)
        first += (gradient - first) * np.float32(1 - _MOMENTS[0])
        second += (gradient * gradient - second) * np.float32(1 - _MOMENTS[1])
        size = settings.learning_rate / (1 - _MOMENTS[0] ** (step + 1))
        root = math.sqrt(1 - _MOMENTS[1] ** (step + 1))
        v -= np.float32(size) * first / (np.sqrt(second) / np.float32(root) + np.float32(_TINY))
    return np.asarray(h, np.float32)


def _parts(pool: _Pool, settings: RoundingSettings, rng: np.random.Generator) -> Iterator[_Pool]:
    """Random rows for each step; every row comes once before any comes again."""
    count, order, position = pool.count, np.zeros(0, np.int64), 0
    size = min(settings.rows, max(_LEAST_ROWS, _ROWS_PER_WEIGHT * pool.inputs.shape[2]), count)
    for _ in range(settings.steps):
        if position + size > len(order):
            order, position = rng.permutation(count), 0
        yield pool.part(order[position : position + size])
        position += size


def _beta(step: int, settings: RoundingSettings) -> float | None:
    """The regularizer's exponent, which falls in a line from 20 to 2; None in the warm-up."""
    begin = settings.warm_up * settings.steps
    if step < begin:
        return None
    first, last = _BETA
    return first + (last - first) * (step - begin) / (settings.steps - begin)


def _regularizer_slope(h: Array, beta: float) -> FloatArray:
    """d/dh of 1 - |2 h - 1|^beta: -2 beta |2 h - 1|^(beta - 1) sign(2 h - 1)."""
    centred = 2 * h - 1
    return np.asarray(-2 * beta * np.abs(centred) ** (beta - 1) * np.sign(centred), np.float32)
