"""Learned rounding: the file has the codes that were learned, and they serve the layer's output."""

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pytest
from helpers import SAMPLES, build, ingested, normal, run
from onnx import ModelProto, numpy_helper

from onnxqt.calibrate import bias_scale, calibrate, make_quantizers
from onnxqt.data import Samples, open_samples
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, along_axis, fake_quantize
from onnxqt.plan import make_plan
from onnxqt.ptq import Quantized, Rounded, RoundingSettings, round_weights
from onnxqt.runtime import with_outputs
from onnxqt.schemes import parse_scheme

QUICK = RoundingSettings(steps=1000, positions=1000, rows=256)  # every position of the networks here


@dataclass(frozen=True)
class Net:
    """One layer that reads x and gives out h, with what is fused behind it."""

    text: str
    constants: Mapping[str, Array]
    clamp: tuple[float, float] = (-np.inf, np.inf)


W = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=1)}
G = {"w": normal(8, 6), "b": normal(6, seed=1)}
BOUNDS = {"low": np.array(-0.5, np.float32), "high": np.array(1, np.float32)}
IMAGE = "(float[n,4,9,8] x) => (float[] y)"
NETS = {
    "conv": Net(f"{IMAGE} {{ h = Conv(x, w, b) y = Relu(h) }}", W, (0, np.inf)),
    "conv-strides-pads": Net(
        f"{IMAGE} {{ h = Conv<strides = [2, 1], pads = [0, 1, 2, 0]>(x, w, b) y = Clip(h, low, high) }}",
        {**W, **BOUNDS},
        (-0.5, 1),
    ),
    "conv-dilations": Net(
        f"{IMAGE} {{ h = Conv<dilations = [2, 3], strides = [1, 2]>(x, w) y = Relu(h) }}", W, (0, np.inf)
    ),
    "conv-groups": Net(
        f"{IMAGE} {{ h = Conv<group = 2, pads = [1, 1, 1, 1]>(x, w, b) y = Relu(h) }}",
        {**W, "w": normal(6, 2, 3, 3)},
        (0, np.inf),
    ),
    "conv-depthwise": Net(
        f"{IMAGE} {{ h = Conv<group = 4, strides = [2, 2]>(x, w, b) y = Relu(h) }}",
        {"w": normal(8, 1, 3, 2), "b": normal(8)},
        (0, np.inf),
    ),
    "conv-same-upper": Net(
        f'{IMAGE} {{ h = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w, b) y = Relu(h) }}',
        {**W, "w": normal(6, 4, 2, 3)},
        (0, np.inf),
    ),
    "conv-same-lower": Net(
        f'{IMAGE} {{ h = Conv<auto_pad = "SAME_LOWER">(x, w, b) y = Relu(h) }}',
        {**W, "w": normal(6, 4, 2, 4)},
        (0, np.inf),
    ),
    "conv-one-dimension": Net(
        "(float[n,4,16] x) => (float[] y) { h = Conv<strides = [2], pads = [1, 0]>(x, w, b) y = Relu(h) }",
        {"w": normal(5, 4, 3), "b": normal(5, seed=1)},
        (0, np.inf),
    ),
    "gemm": Net("(float[n,8] x) => (float[] y) { h = Gemm(x, w, b) y = Relu(h) }", G, (0, np.inf)),
    "gemm-transposed": Net(
        "(float[n,8] x) => (float[] y) { h = Gemm<transB = 1>(x, w, b) y = Relu(h) }",
        {"w": normal(6, 8), "b": normal(1)},
        (0, np.inf),
    ),
    "matmul": Net(
        "(float[n,3,8] x) => (float[] y) { m = MatMul(x, w) h = Add(b, m) y = Relu(h) }",
        {**G, "b": normal(1, 6)},
        (0, np.inf),
    ),
}
EACH_NET = pytest.mark.parametrize("name", NETS)
EACH_SCHEME = pytest.mark.parametrize("scheme", ["w3a8-sym-pc", "w3a8-asym-pt", "w8a8-sym-pc"])


def samples_of(model: Model) -> Samples:
    """Values of a sample move together: where they are independent, the nearest rounding is all but the best."""
    (spec,) = input_specs(model)
    values = normal(SAMPLES, *(size or 1 for size in spec.shape[1:]), seed=1)
    shared = 2 * normal(SAMPLES, *(1 for _ in spec.shape[1:]), seed=2)
    return open_samples({spec.name: values + shared}, [spec])


def quantized(proto: ModelProto, scheme: str) -> tuple[Quantized, Samples]:
    model = ingested(proto)
    plan, samples = make_plan(model), samples_of(model)
    ranges = calibrate(model, plan, samples)
    return Quantized(model, model, plan, make_quantizers(model, plan, ranges, parse_scheme(scheme), "minmax")), samples


@functools.cache
def rounded(name: str, scheme: str) -> tuple[Quantized, Rounded]:
    start, samples = quantized(build(NETS[name].text, NETS[name].constants), scheme)
    return start, round_weights(start, samples, QUICK)


def stored_codes(proto: ModelProto, weight: str) -> Array:
    """The codes of a weight in a file, as its DequantizeLinear reads them."""
    node = next(n for n in proto.graph.node if n.name == f"{weight}.dequantize")
    tensor = next(t for t in proto.graph.initializer if t.name == node.input[0])
    return np.asarray(numpy_helper.to_array(tensor)).astype(np.int32)


def weight_of(model: Model) -> Array:
    return np.asarray(model.graph.constant("w"))


@EACH_SCHEME
@EACH_NET
def test_the_file_has_the_codes_that_were_learned(name: str, scheme: str) -> None:
    start, outcome = rounded(name, scheme)
    params = start.quantizers.weights["w"]
    scale = along_axis(params.scale, params.axis, weight_of(start.model).ndim)
    codes = stored_codes(outcome.quantized.proto(), "w")
    assert outcome.quantized.quantizers is start.quantizers
    np.testing.assert_array_equal(weight_of(outcome.quantized.model), codes.astype(np.float32) * scale)
    exact = weight_of(start.model) / scale  # float32, as codes are made
    lowest, highest = params.grid.qmin, params.grid.qmax
    up, down = np.clip(np.ceil(exact), lowest, highest), np.clip(np.floor(exact), lowest, highest)
    assert ((codes == up) | (codes == down)).all()
    assert weight_of(outcome.quantized.reference) is not weight_of(outcome.quantized.model)
    np.testing.assert_array_equal(weight_of(start.model), weight_of(outcome.quantized.reference))


@EACH_SCHEME
@EACH_NET
def test_the_errors_are_those_of_the_layer_in_the_file(name: str, scheme: str) -> None:
    """The pool holds every position of every sample here. The file differs by the rounding of its bias alone, by up to
    half a step in each channel, so the root of the error does by at most the root of the squared half steps (the
    triangle inequality), and by float32, whose sums of at most 36 products err by 1e-5 of an output at most.
    """
    start, outcome = rounded(name, scheme)
    (node,) = (n for n in start.plan.integer_nodes if n.weight)
    (errors,) = outcome.errors.values()
    exact = clamped(name, start.model.proto, start)
    chosen = min(errors.nearest, errors.learned)
    for found, proto in ((errors.nearest, start.proto()), (chosen, outcome.quantized.proto())):
        measured = float(np.sum((clamped(name, proto, start) - exact) ** 2, axis=1).mean())
        steps = np.zeros(1, np.float32)
        if node.bias:
            scale = start.quantizers.activations[node.inputs[0]].scale
            steps = bias_scale(start.quantizers.weights["w"], scale, exact.shape[1])
        slack = np.sqrt(np.sum(np.broadcast_to(steps / 2, exact.shape[1]) ** 2)) + 1e-5 * np.abs(exact).max()
        assert abs(np.sqrt(found) - np.sqrt(measured)) <= slack


def clamped(name: str, proto: ModelProto, start: Quantized) -> Array:
    """The layer's output behind its activation, in float64: (rows, channels)."""
    (batch,) = samples_of(start.model).batches(SAMPLES)
    values = run(with_outputs(proto, ["h"]), batch.inputs, optimize=False)["h"].astype(np.float64)
    axis = 1 if name.startswith("conv") else -1
    rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
    return np.clip(rows, *NETS[name].clamp)


@pytest.mark.parametrize("scheme", ["w3a8-sym-pc", "w3a8-asym-pt"])
@EACH_NET
def test_learned_rounding_is_better_than_the_nearest(name: str, scheme: str) -> None:
    (errors,) = rounded(name, scheme)[1].errors.values()
    assert errors.learned < errors.nearest


def test_rounding_that_is_learned_badly_is_not_taken() -> None:
    """One huge step from the first 16 rows."""
    start, samples = quantized(build(NETS["conv"].text, NETS["conv"].constants), "w3a8-sym-pc")
    outcome = round_weights(start, samples, RoundingSettings(steps=2, rows=16, learning_rate=10))
    (errors,) = outcome.errors.values()
    assert errors.learned > errors.nearest
    nearest = fake_quantize(weight_of(start.model), start.quantizers.weights["w"])
    np.testing.assert_array_equal(weight_of(outcome.quantized.model), nearest)


def test_the_best_of_all_roundings_is_found() -> None:
    """Eight weights of one output: 256 roundings. Inputs that move together make the nearest a bad one."""
    start, samples = correlated()
    outcome = round_weights(start, samples, QUICK)
    (batch,) = samples.batches(SAMPLES)
    x = fake_quantize(batch.inputs["x"], start.quantizers.activations["x"]).astype(np.float64)
    scale = start.quantizers.weights["w"].scale.astype(np.float64)
    exact = weight_of(start.model)[:, 0] / scale
    target = batch.inputs["x"].astype(np.float64) @ weight_of(start.model)

    def error(codes: Array) -> float:
        return float(np.mean((x @ (codes * scale)[:, None] - target) ** 2))

    every = [error(np.floor(exact) + up) for up in itertools.product((0, 1), repeat=8)]
    found = error(np.rint(weight_of(outcome.quantized.model)[:, 0] / scale))
    assert found <= 1.5 * min(every)
    assert error(np.rint(exact)) > 100 * min(every)


def correlated() -> tuple[Quantized, Samples]:
    rng = np.random.default_rng(3)
    weight = (rng.integers(-6, 6, 8) + 0.4).astype(np.float32).reshape(8, 1)
    weight[0] = 7
    model = ingested(build("(float[n,8] x) => (float[] y) { y = MatMul(x, w) }", {"w": weight}))
    together = rng.normal(size=(SAMPLES, 1)) + 0.05 * rng.normal(size=(SAMPLES, 8))
    samples = open_samples({"x": together.astype(np.float32)}, input_specs(model))
    plan = make_plan(model)
    ranges = calibrate(model, plan, samples)
    made = make_quantizers(model, plan, ranges, parse_scheme("w4a8-sym-pc"), "minmax")
    return Quantized(model, model, plan, made), samples


def test_a_later_layer_makes_up_for_the_ones_before() -> None:
    """Its inputs come from the quantized layers, its target from the float ones."""
    text = "(float[n,8] x) => (float[] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm(r, v) }"
    start, samples = quantized(build(text, {**G, "v": normal(6, 5, seed=2)}), "w3a8-sym-pc")
    outcome = round_weights(start, samples, QUICK)
    (batch,) = samples.batches(SAMPLES)
    exact = run(start.model.proto, batch.inputs)["y"]
    last = list(outcome.errors.values())[-1]
    measured = np.sum((run(outcome.quantized.proto(), batch.inputs)["y"] - exact) ** 2, axis=1).mean()
    step = start.quantizers.activations["y"].scale  # the file rounds its output as well, which the layer's error lacks
    slack = np.sqrt(5) * step / 2 + 1e-5 * np.abs(exact).max()
    assert abs(np.sqrt(measured) - np.sqrt(min(last.learned, last.nearest))) <= slack


def test_the_same_seed_gives_the_same_codes() -> None:
    start, samples = quantized(build(NETS["conv"].text, NETS["conv"].constants), "w3a8-sym-pc")
    settings = RoundingSettings(steps=50, positions=4, rows=64)
    first, second = (round_weights(start, samples, settings).quantized.model.proto for _ in range(2))
    assert first == second


def test_a_pool_of_few_bytes_has_fewer_positions() -> None:
    """A row of the convolution is 4 * 3 * 3 values of 4 bytes."""
    start, samples = quantized(build(NETS["conv"].text, NETS["conv"].constants), "w3a8-sym-pc")
    small = RoundingSettings(steps=20, rows=64, pool_bytes=SAMPLES * 36 * 4 * 3 - 1)
    limited, few = (round_weights(start, samples, s).errors for s in (small, replace(small, positions=2)))
    assert limited == few
    assert limited != round_weights(start, samples, replace(small, pool_bytes=small.pool_bytes + 1)).errors


SKIPPED = {
    "no learned rounding for ConvTranspose": (
        f"{IMAGE} {{ h = ConvTranspose(x, w) y = Conv(h, v) }}",
        {"w": normal(4, 6, 3, 3), "v": normal(5, 6, 1, 1)},
    ),
    "its weight is a stack of matrices": (
        "(float[n,3,5,8] x) => (float[] y) { h = MatMul(x, w) y = MatMul(h, v) }",
        {"w": normal(3, 8, 6), "v": normal(6, 5)},
    ),
    "shares its weight 'w' with other nodes": (
        "(float[n,8] x) => (float[] y) { h = Gemm(x, w) r = Gemm(h, w) y = Gemm(r, v) }",
        {"w": normal(8, 8), "v": normal(8, 5)},
    ),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_other_weights_are_rounded_to_the_nearest_code(reason: str) -> None:
    start, samples = quantized(build(*SKIPPED[reason]), "w4a8-sym-pc")
    seen: list[int] = []
    outcome = round_weights(start, samples, QUICK, lambda done, name: seen.append(done))
    assert set(outcome.skipped.values()) == {reason}
    assert len(outcome.errors) == 1
    assert seen == [1]
    nearest = fake_quantize(weight_of(start.model), start.quantizers.weights["w"])
    np.testing.assert_array_equal(weight_of(outcome.quantized.model), nearest)
    before, after = (stored_codes(q.proto(), "w") for q in (start, outcome.quantized))
    np.testing.assert_array_equal(after, before)
