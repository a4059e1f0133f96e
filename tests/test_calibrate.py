"""Ranges that merge exactly, and the scales that follow from them."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from helpers import build, ingested, normal, prepare

from onnxqt.calibrate import (
    BINS,
    RANGE_METHODS,
    Quantizers,
    RangeMethod,
    TensorRange,
    bias_scale,
    calibrate,
    clip_range,
    make_quantizers,
    observe,
    range_params,
    tensors_of,
    weight_clip,
)
from onnxqt.data import InputSpec, Samples, open_samples
from onnxqt.errors import CalibrationError, UnboundedError
from onnxqt.numerics import Array, Grid, QParams, fake_quantize
from onnxqt.plan import ActivationSite, QuantPlan, make_plan
from onnxqt.schemes import Placement, parse_scheme

INT8, UINT8 = Grid(8, signed=True), Grid(8, signed=False)
INT4, UINT4 = Grid(4, signed=True), Grid(4, signed=False)
GRIDS = {"int8": INT8, "uint8": UINT8, "int4": INT4, "uint4": UINT4}
# The search tries clips 1 % apart. The flat minimum of a distribution with tails hides that; at the sharp end of a
# uniform one, a clip 1 % inside costs up to 0.01^3 / 3 next to the 0.0079^2 / 12 of rounding: 6 % at most, 2.2 % here.
SEARCH_LOSS = {"uniform": 1.03}
OTHER_SEARCH_LOSS = 1.02
EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)


def heavy_tail(size: int = 20_000) -> Array:
    """Student's t with 3 degrees of freedom: a few values lie far outside the bulk."""
    return np.random.default_rng(0).standard_t(3, size).astype(np.float32)


DISTRIBUTIONS = {
    "heavy": heavy_tail(),
    "heavy-relu": np.maximum(heavy_tail(), 0),
    "heavy-negative": np.minimum(heavy_tail(), 0),
    "normal": normal(20_000),
    "shifted": normal(20_000) + 4,
    "uniform": np.random.default_rng(0).uniform(-1, 1, 20_000).astype(np.float32),
}


# --- ranges -------------------------------------------------------------------------------------------------------


def same(a: TensorRange, b: TensorRange) -> bool:
    fields = (a.count, a.min, a.max, a.limit) == (b.count, b.min, b.max, b.limit)
    return fields and np.array_equal(a.counts, b.counts)


@pytest.mark.parametrize(
    "sizes",
    [(1, 1), (1, 3), (1e-3, 1e3), (1e-20, 1e20), (1e-38, 1.0), (1.0, 5e37), (1e-30, 1.0, 1e30)],
    ids=lambda sizes: "-".join(f"{size:g}" for size in sizes),
)
def test_parts_merge_to_the_whole_in_any_order(sizes: Sequence[float]) -> None:
    parts = [normal(3000 + 7 * i, seed=i) * np.float32(size) for i, size in enumerate(sizes)]
    for i, part in enumerate(parts):
        part[:200] = np.ldexp(np.arange(-100, 100) / 64, i)  # many values on the edges of bins
    whole = observe(np.concatenate(parts))
    for order in itertools.permutations(map(observe, parts)):
        assert same(functools.reduce(TensorRange.merge, order), whole)


def test_a_histogram_counts_what_it_saw() -> None:
    x = heavy_tail()
    seen = observe(x)
    width = 2 * seen.limit / BINS
    edges = -seen.limit + width * np.arange(BINS + 1)
    np.testing.assert_array_equal(seen.counts, np.histogram(x.astype(np.float64), edges)[0])
    np.testing.assert_allclose(seen.centers, (edges[1:] + edges[:-1]) / 2, rtol=0, atol=width * 1e-6)
    assert (seen.count, seen.min, seen.max) == (x.size, x.min(), x.max())
    assert max(-seen.min, seen.max) < seen.limit <= 2.001 * max(-seen.min, seen.max)


def samples_of(x: Array) -> Samples:
    return open_samples({"x": x}, [InputSpec("x", np.dtype(np.float32), (None, *x.shape[1:]))])


def test_memory_does_not_grow_with_the_samples() -> None:
    model = ingested(build("(float[n,4] x) => (float[] y) { y = Gemm(x, w) }", {"w": normal(4, 3)}))
    for count in (3, 500):
        table = calibrate(model, make_plan(model), samples_of(normal(count, 4)), batch_size=7)
        assert table.samples == count
        assert {name: seen.count for name, seen in table.tensors.items()} == {"x": 4 * count, "y": 3 * count}
        assert all(seen.counts.shape == (BINS,) for seen in table.tensors.values())


def test_tables_of_two_halves_merge_to_the_table_of_all_samples() -> None:
    model = ingested(build("(float[n,4] x) => (float[] y) { y = Gemm(x, w) }", {"w": normal(4, 3)}))
    plan, x = make_plan(model), normal(32, 4) * np.logspace(-2, 1, 32, dtype=np.float32)[:, None]
    # Batches of one, because a matrix product may round otherwise in another batch.
    whole, *halves = (calibrate(model, plan, samples_of(part), batch_size=1) for part in (x, x[:16], x[16:]))
    merged = halves[0].merge(halves[1])
    assert merged.samples == 32
    assert all(same(merged.tensors[name], whole.tensors[name]) for name in ("x", "y"))


@pytest.mark.parametrize("dimension", ["n", "3"])
def test_a_number_of_samples_that_does_not_fill_the_last_batch(dimension: str) -> None:
    """With a fixed batch axis the last batch is filled up with copies, which leave the ends where they are."""
    model = ingested(build(f"(float[{dimension},4] x) => (float[] y) {{ y = Gemm(x, w) }}", {"w": normal(4, 3)}))
    x, done = normal(7, 4), list[int]()
    table = calibrate(model, make_plan(model), samples_of(x), 3, done.append)
    assert (table.tensors["x"].min, table.tensors["x"].max) == (x.min(), x.max())
    assert table.tensors["x"].count == (36 if dimension == "3" else 28)
    assert done == [3, 6, 7]
    assert table.samples == 7


def test_a_shared_grid_has_the_range_of_all_its_tensors() -> None:
    nodes = "a = Conv(x, w) b = Conv(x, v) c = Concat<axis = 1>(a, b) y = Conv(c, u)"
    weights = {"w": normal(3, 4, 1, 1), "v": 9 * normal(2, 4, 1, 1, seed=1), "u": normal(2, 5, 1, 1, seed=2)}
    prepared = prepare(build(f"(float[n,4,6,6] x) => (float[] y) {{ {nodes} }}", weights))
    (group,) = {site.group for site in prepared.plan.activations if site.tensor in "abc"}
    seen, ranges = prepared.ranges.of_group(prepared.plan, group), prepared.ranges.tensors
    assert seen.max == max(ranges[name].max for name in "abc")
    assert seen.count == sum(ranges[name].count for name in "abc")
    params = prepared.quantizers("w8a8-asym-pc").activations
    assert params["a"] is params["b"] is params["c"]


def test_an_empty_array_has_an_empty_range() -> None:
    empty, full = observe(np.zeros((0, 3), np.float32)), observe(np.array([-1.0, 2.0], np.float32))
    assert (empty.count, empty.min, empty.max) == (0, 0.0, 0.0)
    merged = empty.merge(full)
    assert (merged.count, merged.min, merged.max, merged.counts.sum()) == (2, -1.0, 2.0, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_tensors_that_take_values_that_are_not_finite_are_named(value: float) -> None:
    text = "(float[n,4] x) => (float[] y) { a = Gemm(x, w) c = Mul(a, b) y = Gemm(c, w) }"
    broken = np.array([1, 1, value, 1], np.float32)
    with pytest.raises(UnboundedError, match="tensor 'c' takes NaN or infinite values on the samples: check") as error:
        prepare(build(text, {"w": normal(4, 4), "b": broken}))
    assert error.value.tensors[0] == "c"
    assert "\n" not in str(error.value)


# --- range -> clip ------------------------------------------------------------------------------------------------


def clipped(x: Array, grid: Grid, method: RangeMethod) -> tuple[float, float]:
    lo, hi = clip_range(observe(x), grid, method)
    return float(lo), float(hi)


def squared_error(x: Array, lo: float, hi: float, grid: Grid) -> float:
    return float(np.mean((fake_quantize(x, range_params(lo, hi, grid)).astype(np.float64) - x) ** 2))


@EACH_GRID
@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_clip_lies_within_the_observed_range_and_includes_zero(name: str, method: RangeMethod, grid: Grid) -> None:
    x = DISTRIBUTIONS[name]
    lo, hi = clipped(x, grid, method)
    assert min(0.0, float(x.min())) <= lo <= 0.0 <= hi <= max(0.0, float(x.max()))
    assert lo < hi


@EACH_GRID
def test_minmax_is_what_was_seen(grid: Grid) -> None:
    x = heavy_tail()
    assert clipped(x, grid, "minmax") == (x.min(), x.max())


@EACH_GRID
@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_the_other_methods_clip_a_heavy_tail(method: RangeMethod, grid: Grid) -> None:
    x = heavy_tail()
    lo, hi = clipped(x, grid, method)
    assert hi - lo < 0.95 * float(x.max() - x.min())


def test_percentile_leaves_a_ten_thousandth_outside_on_each_side() -> None:
    x = np.random.default_rng(0).permutation(np.linspace(-1, 3, 100_001)).astype(np.float32)
    width = 2 * observe(x).limit / BINS
    np.testing.assert_allclose(clipped(x, INT8, "percentile"), np.quantile(x, [1e-4, 1 - 1e-4]), rtol=0, atol=width)


def candidates(x: Array, grid: Grid) -> Iterator[tuple[float, float]]:
    """A search off the path of the one under test, and beyond its ends."""
    lo, hi = min(0.0, float(x.min())), max(0.0, float(x.max()))
    if grid.signed:
        yield from ((lo * f, hi * f) for f in np.linspace(0.05, 1, 150))
    else:
        steps = np.linspace(0.05, 1, 40)
        yield from itertools.product(lo * steps if lo else [0.0], hi * steps if hi else [0.0])


@EACH_GRID
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_mse_is_close_to_the_best_clip_of_the_raw_samples(name: str, grid: Grid) -> None:
    x = DISTRIBUTIONS[name]
    best = min(squared_error(x, lo, hi, grid) for lo, hi in candidates(x, grid))
    assert squared_error(x, *clipped(x, grid, "mse"), grid) <= SEARCH_LOSS.get(name, OTHER_SEARCH_LOSS) * best


def divergence(x: Array, clip: float, grid: Grid) -> float:
    """KL(P || Q) as TensorRT defines it, over the histogram of a symmetric grid, written out bin by bin."""
    seen, scale = observe(x), clip / grid.qmax
    kept: dict[int, list[tuple[float, int]]] = {}
    outside = [0, 0]
    lo, hi = grid.qmin * np.float32(scale), grid.qmax * np.float32(scale)
    for center, count in zip(seen.centers, seen.counts, strict=True):
        if lo <= center <= hi:
            kept.setdefault(int(np.rint(center / np.float32(scale))), []).append((center, int(count)))
        else:
            outside[int(center > hi)] += int(count)
    p = [count for level in kept.values() for _, count in level]
    q = [
        sum(n for _, n in level) / sum(n > 0 for _, n in level) if count else 0.0
        for level in kept.values()
        for _, count in level
    ]
    p[0], p[-1] = p[0] + outside[0], p[-1] + outside[1]
    pairs = [(a / sum(p), max(b / sum(q), 1e-12)) for a, b in zip(p, q, strict=True) if a]
    return float(sum(a * np.log(a / b) for a, b in pairs))


@pytest.mark.parametrize("grid", [INT8, INT4], ids=["int8", "int4"])
def test_entropy_has_the_least_divergence(grid: Grid) -> None:
    x = heavy_tail()
    largest = float(np.abs(x).max())
    chosen = max(map(abs, clipped(x, grid, "entropy")))
    found = divergence(x, chosen, grid)
    for fraction in (0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0):
        # The 1e-9 is for the order of the sums.
        assert found <= divergence(x, fraction * largest, grid) + 1e-9


@pytest.mark.parametrize("grid", [INT8, UINT8], ids=["int8", "uint8"])
@pytest.mark.parametrize("seed", range(3))
def test_entropy_is_not_misled_by_the_zeros_behind_a_relu(seed: int, grid: Grid) -> None:
    """With the bins next to zero as they are, the clips of these values were 1.4 to 2.2, of |x| 4.3 to 4.9."""
    x = normal(100_000, seed=seed)
    rectified = np.maximum(x, 0)
    clip = max(map(abs, clipped(rectified, grid, "entropy")))
    assert clip >= 0.5 * float(rectified.max())
    folded = max(map(abs, clipped(np.abs(x), grid, "entropy")))
    assert 0.8 <= clip / folded <= 1.25


# --- clip -> scale ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lo", "hi", "grid", "scale", "zero_point"),
    [
        (-1.0, 2.54, INT8, 0.02, 0),
        (-2.54, 1.0, INT8, 0.02, 0),
        (-1.0, 1.55, UINT8, 0.01, 100),
        (0.0, 2.55, UINT8, 0.01, 0),
        (-2.55, 0.0, UINT8, 0.01, 255),
        (1.0, 2.55, UINT8, 0.01, 0),
        (-2.55, -1.0, UINT8, 0.01, 255),
        (-0.5, 1.0, UINT4, 0.1, 5),
        (-0.7, 0.2, INT4, 0.1, 0),
    ],
)
def test_a_grid_is_laid_over_the_range_and_zero(
    lo: float, hi: float, grid: Grid, scale: float, zero_point: int
) -> None:
    params = range_params(lo, hi, grid)
    assert params.scale == np.float32(scale)
    assert params.zero_point == zero_point
    assert params.axis is None


INT16 = Grid(16, signed=True)
SYMMETRIC, ASYMMETRIC = Placement(symmetric=True), Placement(symmetric=False)


@pytest.mark.parametrize(
    ("lo", "hi", "grid", "placement", "scale", "zero_point"),
    [
        (-1.0, 1.55, INT8, ASYMMETRIC, 0.01, -28),
        (0.0, 2.55, INT8, ASYMMETRIC, 0.01, -128),
        (-2.55, -1.0, INT8, ASYMMETRIC, 0.01, 127),
        (-1.27, 1.27, Grid(8, True, narrow=True), ASYMMETRIC, 0.01, 0),
        (-0.5, 2.54, UINT8, SYMMETRIC, 0.02, 128),
        (-3.2767, 1.0, INT16, SYMMETRIC, 1e-4, 0),
        (-1.0, 2.54, INT8, Placement(True, power_of_two=True), 2.0**-5, 0),
        (-1.0, 1.0 + 2.0**-20, INT8, Placement(False, power_of_two=True), 2.0**-6, -64),
        (-1.0, 127 * 2.0**-6, INT8, Placement(True, power_of_two=True), 2.0**-6, 0),
    ],
)
def test_a_placement_says_where_zero_lies(
    lo: float, hi: float, grid: Grid, placement: Placement, scale: float, zero_point: int
) -> None:
    params = range_params(lo, hi, grid, placement)
    assert params.scale == np.float32(scale)
    assert params.zero_point == zero_point
    assert (params.scale.dtype, params.zero_point.dtype) == (np.dtype(np.float32), np.dtype(np.int32))


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy"])
def test_clips_of_signed_asymmetric_codes_are_those_of_unsigned_ones(method: RangeMethod) -> None:
    seen = observe(np.maximum(heavy_tail(3000), -1))
    assert clip_range(seen, INT8, method, ASYMMETRIC) == clip_range(seen, UINT8, method)
    assert clip_range(seen, UINT8, method, ASYMMETRIC) == clip_range(seen, UINT8, method)


def test_a_search_knows_that_scales_are_powers_of_two() -> None:
    """The chosen power of two has an error no larger than its neighbours'."""
    values, placement = heavy_tail(3000), Placement(True, power_of_two=True)
    found = float(range_params(*clip_range(observe(values), INT8, "mse", placement), INT8, placement).scale)

    def error(scale: float) -> float:
        params = QParams(np.asarray(scale, np.float32), np.asarray(0, np.int32), INT8)
        return float(np.mean((fake_quantize(values, params).astype(np.float64) - values) ** 2))

    assert np.frexp(found)[0] == 0.5
    assert error(found) <= min(error(found / 2), error(2 * found)) * 1.01  # the histogram stands for the values


def test_several_plans_are_calibrated_together() -> None:
    text = "(float[n,4] x) => (float[] y) { a = Gemm(x, w) b = Relu(a) y = Gemm(b, w) }"
    model = ingested(build(text, {"w": normal(4, 4)}))
    plan, x = make_plan(model), normal(8, 4)
    other = replace(plan, activations=(ActivationSite("a", "a", False), *plan.activations))
    names = tensors_of([plan, other])
    assert names == ("x", "b", "y", "a")
    table = calibrate(model, names, samples_of(x))
    assert set(table.tensors) == set(names)
    single = calibrate(model, plan, samples_of(x))
    for name in ("x", "b", "y"):
        np.testing.assert_array_equal(table.tensors[name].counts, single.tensors[name].counts)
    with pytest.raises(CalibrationError, match=r"^the range of 'a' was not recorded: calibrate with every plan"):
        single.of_group(other, "a")


@EACH_GRID
@pytest.mark.parametrize("method", RANGE_METHODS)
def test_a_tensor_of_zeros_has_a_valid_scale(method: RangeMethod, grid: Grid) -> None:
    zeros = np.zeros(10, np.float32)
    params = range_params(*clipped(zeros, grid, method), grid)
    assert np.isfinite(params.scale)
    assert params.scale > 0
    np.testing.assert_array_equal(fake_quantize(zeros, params), zeros)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_weight_per_channel_keeps_its_absmax_and_channels_of_zeros_borrow(axis: int) -> None:
    weight = np.moveaxis(normal(3, 4, 5), axis, 0)
    weight[1] = 0
    weight = np.moveaxis(weight, 0, axis)
    expected = [np.abs(np.take(weight, i, axis)).max() for i in range(weight.shape[axis])]
    expected[1] = max(expected)
    np.testing.assert_array_equal(weight_clip(weight, axis, INT8, per_channel=True), np.array(expected, np.float32))


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_weight_of_zeros_has_a_clip(per_channel: bool) -> None:
    assert (weight_clip(np.zeros((3, 4), np.float32), 0, INT8, per_channel) == 1.0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_weight_per_tensor_has_the_least_fourth_power_of_the_error(bits: int) -> None:
    grid, weight = Grid(bits, signed=True, narrow=True), heavy_tail(3000).reshape(60, 50)
    absmax = np.abs(weight).max()

    def cost(clip: float) -> float:
        codes = np.clip(np.rint(weight / (clip / grid.qmax)), grid.qmin, grid.qmax)
        return float(np.sum((codes * clip / grid.qmax - weight.astype(np.float64)) ** 4))

    fractions = np.linspace(0.3, 1.0, 36)
    # Float32 errors, summed, are good to about 1e-6; the steps are 2 % of absmax.
    assert (
        cost(float(weight_clip(weight, 0, grid, per_channel=False))) <= min(cost(absmax * f) for f in fractions) * 1.001
    )


# --- bias ---------------------------------------------------------------------------------------------------------


def quantizers_of(text: str, scheme: str, constants: dict[str, Array]) -> tuple[Quantizers, QuantPlan]:
    prepared = prepare(build(text, constants))
    found = make_quantizers(prepared.model, prepared.plan, prepared.ranges, parse_scheme(scheme), "minmax")
    return found, prepared.plan


TINY = np.float32(1e-7)
BIASED = {
    "conv": ("(float[n,4,6,6] x) => (float[] y) { y = Conv(x, w, b) }", (3, 4, 3, 3), 3),
    "gemm": ("(float[n,4] x) => (float[] y) { y = Gemm(x, w, b) }", (4, 3), 3),
    "gemm-one-value": ("(float[n,4] x) => (float[] y) { y = Gemm(x, w, b) }", (4, 3), 1),
    "matmul": ("(float[n,4] x) => (float[] y) { m = MatMul(x, w) y = Add(m, b) }", (4, 3), 3),
    "grouped-convtranspose": (
        "(float[n,4,6,6] x) => (float[] y) { y = ConvTranspose<group = 2>(x, w, b) }",
        (4, 3, 2, 2),
        6,
    ),
}


@pytest.mark.parametrize("scheme", ["w8a8-sym-pc", "w8a8-asym-pt", "w4a8-sym-pc"])
@pytest.mark.parametrize(("text", "shape", "size"), BIASED.values(), ids=BIASED)
def test_a_large_bias_fits_into_int32(text: str, shape: tuple[int, ...], size: int, scheme: str) -> None:
    """A large bias behind tiny weights: the weights' scales grow until it does, where they have to."""
    bias = np.array([1e5, 0.0, -3e5, 2e5, 1e-3, -1e5], np.float32)[:size]
    small = {"w": normal(*shape) * TINY, "b": bias}
    found, plan = quantizers_of(text, scheme, small)
    scale = bias_scale(found.weights["w"], found.activations["x"].scale, size)
    codes = bias.astype(np.float64) / scale
    assert np.abs(codes).max() <= 2**30 * (1 + 2**-20)
    assert np.abs(codes).max() > 2**29  # no larger than it must be
    found, plan = quantizers_of(text, scheme, {"w": normal(*shape), "b": normal(size)})
    unbiased, _ = quantizers_of(text, scheme, {"w": normal(*shape), "b": np.zeros(size, np.float32)})
    np.testing.assert_array_equal(found.weights["w"].scale, unbiased.weights["w"].scale)
    assert plan.integer_nodes[0].bias == "b"


def test_bias_scales_of_a_grouped_convtranspose_repeat_for_each_group() -> None:
    half, scale = np.asarray(0.5, np.float32), np.array([0.5, 0.25, 2.0], np.float32)
    weight = QParams(scale, np.zeros(3, np.int32), INT8, axis=1)
    np.testing.assert_array_equal(bias_scale(weight, half, 6), [0.25, 0.125, 1.0, 0.25, 0.125, 1.0])
    np.testing.assert_array_equal(bias_scale(weight, half, 1), [0.25, 0.125, 1.0])
    per_tensor = QParams(half, np.asarray(0, np.int32), INT8)
    assert bias_scale(per_tensor, half, 6).shape == ()


def test_a_stack_of_matrices_has_one_scale_per_output_channel() -> None:
    text = "(float[n,2,5,4] x) => (float[] y) { y = MatMul(x, w) }"
    found, _ = quantizers_of(text, "w8a8-sym-pc", {"w": normal(2, 4, 3)})
    assert (found.weights["w"].scale.shape, found.weights["w"].axis) == ((3,), 2)
