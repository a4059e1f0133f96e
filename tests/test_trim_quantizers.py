import itertools

import numpy as np
import onnx
import pytest
from conftest import Digits
from onnx import TensorProto, helper

from onnxqt.calibrate import Quantizers
from onnxqt.export import quantized_model
from onnxqt.model import Model, editable
from onnxqt.numerics import Array, Grid, QParams, along_axis, fake_quantize
from onnxqt.plan import ActivationSite, IntegerNode, QuantPlan, WeightSite
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.trim import finish_training
from onnxqt.trim.quantizers import (
    BLEND,
    QUANTIZED,
    feeds,
    functions,
    insert,
    prune_feeds,
    prune_input,
    quantizer_inputs,
)

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


def one_quantizer(axis: int, channels: tuple[int, ...]) -> onnx.ModelProto:
    """x -> y, and the settings of the quantizer of "x" as inputs."""
    names = quantizer_inputs("x")
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, None),
        helper.make_tensor_value_info(names.scale, TensorProto.FLOAT, channels),
        helper.make_tensor_value_info(names.zero_point, TensorProto.INT8, channels),
        helper.make_tensor_value_info(names.qmin, TensorProto.INT8, ()),
        helper.make_tensor_value_info(names.qmax, TensorProto.INT8, ()),
        helper.make_tensor_value_info(BLEND, TensorProto.FLOAT, ()),
    ]
    node = helper.make_node("ProgressiveQDQ", ["x", *names, BLEND], ["y"], domain="onnxqt", axis=axis)
    graph = helper.make_graph([node], "q", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("onnxqt", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION, functions=functions(17))


def run_quantizer(x: Array, settings: QParams, blend: float, optimize: bool) -> Array:
    """ProgressiveQDQ of an activation (per tensor) or a weight (per channel) with these parameters."""
    if settings.axis is None:
        plan = QuantPlan((ActivationSite("x", "x", False),), (), ())
        fed = feeds(plan, {}, Quantizers({"x": settings}, {}))
        model = one_quantizer(0, ())
    else:
        site = WeightSite("x", settings.axis)
        plan = QuantPlan((), (IntegerNode("n", "Conv", (), "y", site),), ())
        fed = feeds(plan, {"x": x.shape}, Quantizers({}, {"x": settings}))
        model = one_quantizer(settings.axis, (x.shape[settings.axis],))
    return Session(model, optimize).run({"x": x, BLEND: np.array(blend, np.float32), **fed})["y"]


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
    fed = feeds(plan, {"x": (2, 3, 1)}, Quantizers({}, {"x": settings}))
    np.testing.assert_array_equal(fed[quantizer_inputs("x").scale], np.repeat(settings.scale, 3))


def test_reverse_prune_clips_along_the_channel_axis() -> None:
    w = values((3, 4, 2), GRIDS["int4"], False)
    plan = QuantPlan((), (IntegerNode("n", "Conv", (), "y", WeightSite("w", 1)),), ())
    tau = np.array([0.5, 1.0, 2.0, np.inf], np.float32)
    fed = prune_feeds(plan, {"w": w.shape}, {"w": tau})
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("w", prune_input("w"))]
    node = helper.make_node("ReversePrune", ["w", prune_input("w")], ["y"], domain="onnxqt")
    graph = helper.make_graph([node], "p", inputs, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("onnxqt", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION, functions=functions(17))
    limit = along_axis(tau, 1, 3)
    np.testing.assert_array_equal(Session(model).run({"w": w, **fed})["y"], np.clip(w, -limit, limit))


# --- whole networks -------------------------------------------------------------------------------------

SCHEMES = [
    f"w{w}a{a}-{symmetry}-{granularity}"
    for (w, a), symmetry, granularity in itertools.product(((8, 8), (4, 4)), ("sym", "asym"), ("pt", "pc"))
]


def training_model(model: Model, plan: QuantPlan) -> onnx.ModelProto:
    """The float model with its quantizers, without a loss."""
    graph = editable(model.proto)
    insert(graph, plan)
    return finish_training(graph, functions(model.opset))


def run_training_model(digits: Digits, model: Model, quantizers: Quantizers, blend: float) -> dict[str, Array]:
    """Outputs under the names of the float model."""
    shapes = {site.tensor: tuple(model.graph.initializers[site.tensor].dims) for site in digits.plan.weights}
    fed = feeds(digits.plan, shapes, quantizers)
    untouched = prune_feeds(digits.plan, shapes, {name: np.asarray(np.inf, np.float32) for name in shapes})
    session = Session(training_model(model, digits.plan), optimize=False)
    outputs = session.run({**digits.inputs, **fed, **untouched, BLEND: np.array(blend, np.float32)})
    return {name.removeprefix(QUANTIZED): value for name, value in outputs.items()}


def test_training_graph_without_blend_is_the_float_model(digits: Digits) -> None:
    quantizers = digits.quantizers(parse_scheme("w4a4-asym-pc"))
    expected = Session(digits.model.proto, optimize=False).run(digits.inputs)
    outputs = run_training_model(digits, digits.model, quantizers, blend=0.0)
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        # (1 - 0) x + 0 q = x exactly. Kernels may sum in another order: K <= 300 products in 7 layers,
        # each sum off by about sqrt(K) 2^-24 = 1e-6 of its largest value, and independently of the others.
        np.testing.assert_allclose(outputs[name], value, rtol=0, atol=1e-5 * np.abs(value).max())


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
    """The file's one difference is its INT32 bias; where the biases lie on that grid, all bits are equal."""
    scheme = parse_scheme(name)
    quantizers, model = digits.quantizers(scheme), on_bias_grid(digits, scheme)
    exported = Session(quantized_model(model, digits.plan, quantizers), optimize=False).run(digits.inputs)
    outputs = run_training_model(digits, model, quantizers, blend=1.0)
    assert outputs.keys() == exported.keys()
    for output, value in exported.items():
        np.testing.assert_array_equal(outputs[output], value)
