"""What is put into a training graph: each function against numpy, and whole networks against the float and int ones."""

import itertools
from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from conftest import Digits
from helpers import build, ingested, normal
from onnx import TensorProto, helper

from onnxqt.calibrate import Quantizers
from onnxqt.export import quantized_model
from onnxqt.model import Model, editable
from onnxqt.numerics import Array, Grid, QParams, along_axis, fake_quantize
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite, make_plan
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.trim import finish_training
from onnxqt.trim.quantizers import (
    ACTIVATION_BLEND,
    CENTRED,
    QUANTIZED,
    RUN_TIME,
    SAMPLE,
    WEIGHT_BLEND,
    activation_feeds,
    functions,
    insert,
    prune_feeds,
    prune_input,
    quantizer_inputs,
    relative,
    statistics,
    units_of,
    weight_feeds,
)

LAMBDA = "lambda"

GRIDS = {
    "int8": Grid(8, signed=True),
    "int8-narrow": Grid(8, signed=True, narrow=True),
    "uint8": Grid(8, signed=False),
    "int4": Grid(4, signed=True),
    "int4-narrow": Grid(4, signed=True, narrow=True),
    "uint4": Grid(4, signed=False),
    "int2-narrow": Grid(2, signed=True, narrow=True),
}
POWER_OF_TWO = {True: "power-of-two", False: "random"}


def params(grid: Grid, channels: int | None, axis: int | None, power_of_two: bool) -> QParams:
    """A scale and an odd or zero zero point, for the whole tensor or for each channel."""
    rng = np.random.default_rng(grid.bits)
    shape = () if channels is None else (channels,)
    scale: Array = rng.uniform(0.05, 0.2, shape)
    if power_of_two:
        scale = 2.0 ** np.round(np.log2(scale))
    zero_point = np.zeros(shape) if grid.narrow else rng.integers(grid.qmin, grid.qmax, shape) | 1
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid, axis)


def values(shape: tuple[int, ...], grid: Grid, power_of_two: bool) -> Array:
    """Inside and far outside of every grid, half of them on ties of power-of-two scales."""
    rng = np.random.default_rng(len(shape))
    reach = 2.0**grid.bits * 0.25
    x = rng.uniform(-reach, reach, shape)
    ties = rng.integers(-(2**grid.bits), 2**grid.bits, shape) / 32 + 1 / 64
    x = np.where(rng.random(shape) < 0.5, ties, x)
    x.flat[:4] = [1e6, -1e6, 0.0, -0.0]
    return x.astype(np.float32)


def number(value: float) -> Array:
    return np.array(value, np.float32)


def one_quantizer(axis: int, channels: tuple[int, ...]) -> onnx.ModelProto:
    """x -> y, and the settings of the quantizer of "x" as inputs."""
    names = quantizer_inputs("x")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info(names.scale, TensorProto.FLOAT, channels),
        helper.make_tensor_value_info(names.zero_point, TensorProto.INT8, channels),
        helper.make_tensor_value_info(names.qmin, TensorProto.INT8, ()),
        helper.make_tensor_value_info(names.qmax, TensorProto.INT8, ()),
        helper.make_tensor_value_info(LAMBDA, TensorProto.FLOAT, ()),
    ]
    node = helper.make_node("ProgressiveQDQ", ["x", *names, LAMBDA], ["y"], domain="onnxqt", axis=axis)
    graph = helper.make_graph([node], "q", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("onnxqt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION, functions=functions(17))


def run_quantizer(x: Array, settings: QParams, blend: float, optimize: bool) -> Array:
    """ProgressiveQDQ of an activation (per tensor) or a weight (per channel) with these parameters."""
    if settings.axis is None:
        fed = activation_feeds({"x": settings})
        model = one_quantizer(0, ())
    else:
        site = WeightSite("x", settings.axis)
        plan = QuantPlan((), (IntegerNode("n", "Conv", (), "y", site),), ())
        fed = weight_feeds(plan, {"x": x.shape}, {"x": settings})
        model = one_quantizer(settings.axis, (x.shape[settings.axis],))
    return Session(model, optimize).run({"x": x, LAMBDA: number(blend), **fed})["y"]


def check_quantizer(x: Array, settings: QParams, optimize: bool = False) -> None:
    quantized = fake_quantize(x, settings)
    assert len(np.unique(quantized)) > 2
    np.testing.assert_array_equal(run_quantizer(x, settings, 1.0, optimize), quantized)
    np.testing.assert_array_equal(run_quantizer(x, settings, 0.0, optimize), x)
    blend = 0.3
    expected = (1 - blend) * x.astype(np.float64) + blend * quantized
    # float32: lambda, 1 - lambda, both products and the sum are rounded, each by at most 2^-24 of its size.
    tolerance = 5 * 2.0**-24 * (np.abs(x) + np.abs(quantized))
    assert np.all(np.abs(run_quantizer(x, settings, blend, optimize) - expected) <= tolerance)


@pytest.mark.parametrize("power_of_two", POWER_OF_TWO, ids=POWER_OF_TWO.get)
@pytest.mark.parametrize("grid", GRIDS)
def test_quantizer_of_an_activation(grid: str, power_of_two: bool) -> None:
    check_quantizer(values((2, 3, 5, 4), GRIDS[grid], power_of_two), params(GRIDS[grid], None, None, power_of_two))


@pytest.mark.parametrize("power_of_two", POWER_OF_TWO, ids=POWER_OF_TWO.get)
@pytest.mark.parametrize("axis", [0, 1, 3])
@pytest.mark.parametrize("grid", ["int8-narrow", "int4-narrow", "int2-narrow", "uint8"])
def test_quantizer_of_a_weight(grid: str, axis: int, power_of_two: bool) -> None:
    x = values((6, 3, 5, 4), GRIDS[grid], power_of_two)
    check_quantizer(x, params(GRIDS[grid], x.shape[axis], axis, power_of_two))


@pytest.mark.parametrize("grid", ["int8", "uint4"])
def test_quantizer_with_optimizations(grid: str) -> None:
    x = values((2, 3, 5, 4), GRIDS[grid], True)
    check_quantizer(x, params(GRIDS[grid], None, None, True), optimize=True)


def test_weight_of_a_per_tensor_scheme_gets_one_scale_for_all_channels() -> None:
    plan = QuantPlan((), (IntegerNode("n", "Conv", (), "y", WeightSite("x", 1)),), ())
    settings = params(GRIDS["int8-narrow"], None, None, False)
    fed = weight_feeds(plan, {"x": (2, 3, 1)}, {"x": settings})
    np.testing.assert_array_equal(fed[quantizer_inputs("x").scale], np.repeat(settings.scale, 3))


def test_reverse_prune_clips_along_the_channel_axis() -> None:
    w = values((3, 4, 2), GRIDS["int4"], False)
    plan = QuantPlan((), (IntegerNode("n", "Conv", (), "y", WeightSite("w", 1)),), ())
    tau = np.array([0.5, 1.0, 2.0, np.inf], np.float32)
    fed = prune_feeds(plan, {"w": w.shape}, {"w": tau})
    node = helper.make_node("ReversePrune", ["w", prune_input("w")], ["y"], domain="onnxqt")
    limit = along_axis(tau, 1, 3)
    np.testing.assert_array_equal(run_function(node, {"w": w, **fed})["y"], np.clip(w, -limit, limit))


def run_function(node: onnx.NodeProto, fed: Mapping[str, Array]) -> dict[str, Array]:
    """One call of a function, with inputs of any shape."""
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None)
        for name, value in fed.items()
    ]
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output]
    graph = helper.make_graph([node], "function", inputs, outputs)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("onnxqt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION, functions=functions(17))
    return Session(model).run(fed)


# --- statistics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2 * SAMPLE - 1,), (2 * SAMPLE,), (50, 1000), (7, 3, 5, 999)])
def test_statistics_of_an_activation(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    node = helper.make_node("Statistics", ["x"], ["low", "high", "sample"], domain="onnxqt")
    found = run_function(node, {"x": np.asarray(x)})
    assert (found["low"], found["high"]) == (x.min(), x.max())
    assert found["low"].shape == found["high"].shape == ()
    apart = 2 * (x.size // (2 * SAMPLE)) + 1
    np.testing.assert_array_equal(found["sample"], x.ravel()[::apart])
    # The distance is odd, so that it divides no even number of channels, and gives up to two times SAMPLE values.
    assert min(x.size, SAMPLE * 2 // 3) <= found["sample"].size <= 2 * SAMPLE


def test_statistics_of_an_activation_that_is_never_negative() -> None:
    x = np.abs(np.random.default_rng(0).normal(size=(7, 30))).astype(np.float32) + 1
    nodes = [
        helper.make_node(name, ["x"], ["low", "high", "sample"], domain="onnxqt")
        for name in ("Statistics", "NonNegativeStatistics")
    ]
    every, found = (run_function(node, {"x": x}) for node in nodes)
    assert found["low"].tolist() == 0
    assert found["high"].tolist() == x.max()
    np.testing.assert_array_equal(found["sample"], every["sample"])


# --- grids of the batch ---------------------------------------------------------------------------------


def run_time_grid(low: float, high: float, settings: QParams, run_time: bool, centred: bool) -> tuple[Array, Array]:
    """The scale and zero point that RunTimeGrid gives, the zero point as a code of the grid itself."""
    names = quantizer_inputs("x")
    operands = ["low", "high", *names, RUN_TIME, CENTRED]
    node = helper.make_node("RunTimeGrid", operands, ["scale", "zero_point"], domain="onnxqt")
    fed = {"low": number(low), "high": number(high), RUN_TIME: number(run_time), CENTRED: number(centred)}
    found = run_function(node, {**fed, **activation_feeds({"x": settings})})
    assert found["zero_point"].dtype == np.int8
    shift = 0 if settings.grid.signed else 1 << (settings.grid.bits - 1)
    return found["scale"], found["zero_point"].astype(np.int32) + shift


def grid_of_batch(low: float, high: float, grid: Grid, centred: bool) -> tuple[Array, int]:
    """The same in numpy; float32 divisions, as ONNX DynamicQuantizeLinear has them, the rest exact."""
    lo, hi = np.float32(min(low, 0.0)), np.float32(max(high, 0.0))
    if centred:
        middle = 0 if grid.signed else 1 << (grid.bits - 1)
        return np.maximum(max(-lo, hi) / np.float32(grid.qmax - middle), np.float32(1e-12)), middle
    scale = np.maximum((hi - lo) / np.float32(grid.qmax - grid.qmin), np.float32(1e-12))
    return scale, int(np.clip(np.rint(grid.qmin - float(lo / scale)), grid.qmin, grid.qmax))


RUN_TIME_GRIDS = ["int8", "uint8", "int4", "uint4", "int8-narrow", "int4-narrow"]
# On ties of the zero point: 255 / 4 wide at 8 bits and 15 / 4 at 4 bits, the scale is 1/4 and 1/8 is half a step.
INTERVALS = {
    **{"positive": (0.5, 3.0), "negative": (-3.0, -0.5), "both": (-1.0, 2.7), "mostly-negative": (-2.9, 0.3)},
    **{"tie-8": (-10.125, 255 / 4 - 10.125), "tie-8-odd": (-10.375, 255 / 4 - 10.375)},
    **{"tie-4": (-1.125, 15 / 4 - 1.125), "tie-4-odd": (-1.375, 15 / 4 - 1.375)},
    **{"nothing": (0.0, 0.0), "tiny": (-1e-20, 1e-20), "large": (-3e30, 1e30)},
}


@pytest.mark.parametrize("centred", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", RUN_TIME_GRIDS)
@pytest.mark.parametrize("interval", INTERVALS.values(), ids=list(INTERVALS))
def test_grid_of_a_batch(interval: tuple[float, float], name: str, centred: bool) -> None:
    """Unsigned grids are carried as INT8."""
    low, high = (float(np.float32(end)) for end in interval)
    given = params(GRIDS[name], None, None, power_of_two=False)
    scale, zero_point = run_time_grid(low, high, given, run_time=True, centred=centred)
    expected_scale, expected_zero_point = grid_of_batch(low, high, GRIDS[name], centred)
    assert scale == expected_scale
    assert zero_point == expected_zero_point


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("name", RUN_TIME_GRIDS)
def test_calibrated_grid_stays_as_it_is(name: str, centred: bool) -> None:
    given = params(GRIDS[name], None, None, power_of_two=False)
    scale, zero_point = run_time_grid(-1.0, 2.7, given, run_time=False, centred=centred)
    assert (scale, zero_point) == (given.scale, given.zero_point)


@pytest.mark.parametrize("seed", range(20))
def test_grid_of_a_batch_is_that_of_dynamic_quantize_linear(seed: int) -> None:
    """The scale exactly; the zero point but for ties: -128 - low / scale is rounded to 2^-17 before it is rounded."""
    rng = np.random.default_rng(seed)
    x = rng.normal(rng.uniform(-2, 2), 10.0 ** rng.uniform(-3, 3), 50).astype(np.float32)
    node = helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero_point"])
    expected = run_function(node, {"x": x})
    given = params(GRIDS["uint8"], None, None, power_of_two=False)
    scale, zero_point = run_time_grid(float(x.min()), float(x.max()), given, run_time=True, centred=False)
    assert scale == expected["scale"]
    exact = float(-min(x.min(), np.float32(0)) / scale)
    if abs(exact - np.floor(exact) - 0.5) > 2.0**-16:
        assert zero_point == expected["zero_point"]
    else:
        assert abs(int(zero_point) - int(expected["zero_point"])) <= 1


@pytest.mark.parametrize("batch", [1, 7])
def test_network_with_grids_of_the_batch_equals_dynamic_quantize_linear(batch: int) -> None:
    """x and y = x w with the grid of each batch; only the weight has none."""
    w = normal(6, 5)
    model = ingested(build("(float[n,6] x) => (float[] y) { y = MatMul(x, w) }", {"w": w}))
    plan = make_plan(model)
    (site,) = plan.weights
    given = {name: params(GRIDS["uint8"], None, None, power_of_two=False) for name in ("x", "y")}
    values = {site.tensor: w}
    fed = {
        **activation_feeds(given),
        **weight_feeds(plan, {site.tensor: w.shape}, {site.tensor: params(GRIDS["int8-narrow"], None, None, False)}),
        **prune_feeds(plan, {site.tensor: w.shape}, {site.tensor: number(np.inf)}),
        **{WEIGHT_BLEND: number(0), ACTIVATION_BLEND: number(1), RUN_TIME: number(1), CENTRED: number(0)},
    }
    session = Session(training_model(model, plan, powers_of_two(units_of(plan, values))), optimize=False)
    wanted = Session(
        build(
            """(float[n,6] x, float[6,5] w) => (float[] y) {
                cx, sx, zx = DynamicQuantizeLinear(x) qx = DequantizeLinear(cx, sx, zx) h = MatMul(qx, w)
                cy, sy, zy = DynamicQuantizeLinear(h) y = DequantizeLinear(cy, sy, zy)
            }"""
        ),
        optimize=False,
    )
    for seed in range(3):
        x = 5 * normal(batch, 6, seed=seed) + 1
        (found,), (expected,) = session.run({"x": x, **fed}).values(), wanted.run({"x": x, "w": w}).values()
        assert len(np.unique(found)) > batch
        np.testing.assert_array_equal(found, expected)


# --- units of what is trained ---------------------------------------------------------------------------


def node_of(weight: str, axis: int, bias: str | None = None, name: str = "n") -> IntegerNode:
    return IntegerNode(name, "Conv", (), f"{name}_y", WeightSite(weight, axis), bias)


def units(nodes: tuple[IntegerNode, ...], **values: Array) -> dict[str, Array]:
    return units_of(QuantPlan((), nodes, ()), values)


def rms(values: Array, axis: int | tuple[int, ...] | None = None) -> Array:
    return np.asarray(np.sqrt(np.mean(np.square(values, dtype=np.float64), axis=axis)))


@pytest.mark.parametrize("axis", [0, 1])
def test_unit_of_a_weight_is_the_root_mean_square_of_its_channel(axis: int) -> None:
    w = normal(4, 3, 2) * np.float32(10)
    others = tuple(i for i in range(3) if i != axis)
    found = units((node_of("w", axis),), w=w)["w"]
    assert found.shape == tuple(n if i == axis else 1 for i, n in enumerate(w.shape))
    np.testing.assert_array_equal(found.ravel(), rms(w, others).astype(np.float32))


def test_channel_of_zeros_has_a_hundredth_of_the_whole() -> None:
    w = np.array([[3, 4], [0, 0], [1e-6, 0]], np.float32)
    found = units((node_of("w", 0),), w=w)["w"].ravel()
    whole = 0.01 * np.sqrt(25 / 6)
    assert found == pytest.approx([np.sqrt(12.5), whole, whole], rel=2.0**-23)


def test_weight_of_zeros_has_the_unit_of_one() -> None:
    found = units((node_of("w", 0, "b"),), w=np.zeros((2, 3), np.float32), b=np.zeros(2, np.float32))
    assert found["w"].ravel() == pytest.approx([0.01, 0.01])
    assert found["b"].ravel() == pytest.approx([0.01, 0.01])


def test_unit_of_a_bias_is_that_of_its_channel_times_its_spread() -> None:
    w = np.array([[1, 1], [2, 2]], np.float32)  # root mean squares 1 and 2
    small, large = np.array([0.1, 0.2], np.float32), np.array([3, 8], np.float32)
    np.testing.assert_array_equal(units((node_of("w", 0, "b"),), w=w, b=small)["b"], [1, 2])
    spread = np.sqrt((3**2 + 4**2) / 2)
    np.testing.assert_allclose(units((node_of("w", 0, "b"),), w=w, b=large)["b"], [spread, 2 * spread], rtol=2.0**-22)


def test_bias_of_a_grouped_transposed_convolution_repeats_the_channels_of_each_group() -> None:
    w = np.array([[1, 2, 3], [1, 2, 3]], np.float32).reshape(2, 3, 1)  # 2 groups of 3 output channels
    found = units((node_of("w", 1, "b"),), w=w, b=np.zeros(6, np.float32))["b"]
    np.testing.assert_array_equal(found, [1, 2, 3, 1, 2, 3])


def test_bias_that_does_not_follow_the_channels_has_one_unit() -> None:
    w = np.ones((3, 2), np.float32)
    found = units((node_of("w", 0, "b"),), w=w, b=np.array([-7], np.float32))["b"]
    assert found.shape == ()
    assert found == 7


def test_bias_of_a_weight_that_is_not_trained_and_a_shared_weight_have_units() -> None:
    nodes = (node_of("w", 0, name="first"), node_of("w", 1, "c", name="second"), node_of("v", 0, "b", name="third"))
    w = np.array([[1, 1], [2, 2]], np.float32)
    found = units(nodes, w=w, b=np.array([3, 4], np.float32), c=np.zeros(2, np.float32))
    assert found.keys() == {"w", "b", "c"}
    assert found["w"].shape == (2, 1)  # of the first node that reads it
    assert found["b"] == np.float32(np.sqrt(12.5))


def powers_of_two(found: Mapping[str, Array]) -> dict[str, Array]:
    """Units of which no product or quotient is rounded."""
    return {name: np.exp2(np.round(np.log2(unit))).astype(np.float32) for name, unit in found.items()}


# --- whole networks -------------------------------------------------------------------------------------

SCHEMES = [
    f"w{w}a{a}-{symmetry}-{granularity}"
    for (w, a), symmetry, granularity in itertools.product(((8, 8), (4, 4)), ("sym", "asym"), ("pt", "pc"))
]


def trained_values(model: Model, plan: QuantPlan) -> dict[str, Array]:
    """All weights and biases that training may move."""
    names = [name for node in plan.integer_nodes if node.weight for name in (node.weight.tensor, node.bias) if name]
    found = {name: model.graph.constant(name) for name in names}
    return {name: value for name, value in found.items() if value is not None}


def training_model(model: Model, plan: QuantPlan, units: Mapping[str, Array]) -> onnx.ModelProto:
    """The float model with its quantizers, without a loss."""
    graph = editable(model.proto)
    insert(graph, plan, units)
    return finish_training(graph, functions(model.opset))


def run_training_model(
    digits: Digits, model: Model, quantizers: Quantizers, blend: float, exact_units: bool, clip: float = np.inf
) -> dict[str, Array]:
    """Outputs under the names of the float model; `clip` is a fraction of the largest value of each weight."""
    plan = digits.plan
    found = units_of(plan, trained_values(model, plan))
    shapes = {site.tensor: tuple(model.graph.initializers[site.tensor].dims) for site in plan.weights}
    fed = {
        **activation_feeds(quantizers.activations),
        **weight_feeds(plan, shapes, quantizers.weights),
        **prune_feeds(plan, shapes, clips(digits, clip)),
        **dict.fromkeys((WEIGHT_BLEND, ACTIVATION_BLEND), number(blend)),
        **dict.fromkeys((RUN_TIME, CENTRED), number(0)),
    }
    proto = training_model(model, plan, powers_of_two(found) if exact_units else found)
    outputs = Session(proto, optimize=False).run({**digits.inputs, **fed})
    return {name.removeprefix(QUANTIZED): value for name, value in outputs.items()}


def clips(digits: Digits, fraction: float) -> dict[str, Array]:
    weights = {site.tensor: digits.model.graph.constant(site.tensor) for site in digits.plan.weights}
    return {name: number(fraction * np.abs(w).max()) for name, w in weights.items() if w is not None}


@pytest.mark.parametrize("clip", [np.inf, 0.4])
def test_training_graph_without_blend_is_the_float_model(digits: Digits, clip: float) -> None:
    """With clips, the float model whose weights are clipped: what a checkpoint is made of."""
    quantizers = digits.quantizers(parse_scheme("w4a4-asym-pc"))
    weights = {site.tensor: digits.model.graph.constant(site.tensor) for site in digits.plan.weights}
    limits = clips(digits, clip)
    clipped = {n: np.clip(w, -limits[n], limits[n]) for n, w in weights.items() if w is not None}
    assert any(np.abs(w).max() > limits[n] for n, w in weights.items() if w is not None) == np.isfinite(clip)
    expected = Session(digits.model.with_weights(clipped).proto, optimize=False).run(digits.inputs)
    outputs = run_training_model(digits, digits.model, quantizers, 0.0, exact_units=False, clip=clip)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        # (1 - 0) x + 0 q = x exactly. Kernels may sum in another order: K <= 300 products in 7 layers,
        # each sum off by about sqrt(K) 2^-24 = 1e-6 of its largest value, and independently of the others;
        # unit (w / unit) is off by 2^-23 of w, also independently.
        np.testing.assert_allclose(outputs[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


def test_what_is_trained_is_relative_to_its_unit(digits: Digits) -> None:
    plan, values = digits.plan, trained_values(digits.model, digits.plan)
    found = units_of(plan, values)
    graph = editable(digits.model.proto)
    given_out = insert(graph, plan, found)
    assert given_out == [name for site in plan.activations for name in statistics(site.tensor)]
    tensors = graph.tensors()
    for name, value in values.items():
        moved = tensors[relative(name)].values
        np.testing.assert_array_equal(moved, value / found[name])
        # Every channel of a weight has size 1, or less where its unit is that of the whole.
        site = next((site for site in plan.weights if site.tensor == name), None)
        if site is not None:
            others = tuple(i for i in range(value.ndim) if i != site.axis)
            assert rms(moved, others).max() == pytest.approx(1, rel=2.0**-20)


def on_bias_grid(digits: Digits, scheme: Scheme) -> Model:
    """The model with biases that an INT32 bias represents exactly."""
    quantizers = digits.quantizers(scheme)
    snapped: dict[str, Array] = {}
    for node in digits.plan.integer_nodes:
        bias = digits.model.graph.constant(node.bias) if node.bias else None
        if node.weight is not None and node.bias is not None and bias is not None:
            scale = quantizers.weights[node.weight.tensor].scale * quantizers.activations[node.inputs[0]].scale
            snapped[node.bias] = np.rint(bias / scale.astype(np.float64)).astype(np.float32) * scale
    assert snapped
    return digits.model.with_weights(snapped)


@pytest.mark.parametrize("name", SCHEMES)
def test_training_graph_with_full_blend_is_the_exported_file(name: str, digits: Digits) -> None:
    """The file's one difference is its INT32 bias; where the biases lie on that grid, all bits are equal.

    So they are with units that are powers of two: others may round a weight by a bit, here and there across a tie.
    """
    scheme = parse_scheme(name)
    quantizers, model = digits.quantizers(scheme), on_bias_grid(digits, scheme)
    exported = Session(quantized_model(model, digits.plan, quantizers), optimize=False).run(digits.inputs)
    outputs = run_training_model(digits, model, quantizers, 1.0, exact_units=True)
    assert outputs.keys() == exported.keys()
    for output, value in exported.items():
        np.testing.assert_array_equal(outputs[output], value)
