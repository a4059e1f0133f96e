"""Bias correction: mean outputs as in the float model, and every step of PTQ together."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from helpers import SAMPLES, build, ingested, normal, run
from onnx import ModelProto, TensorProto

from onnxqt.calibrate import bias_scale, calibrate, make_quantizers
from onnxqt.data import Samples, fixed_batch, open_samples
from onnxqt.errors import ModelError, UsageError
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.ptq import STEPS, PtqSettings, Quantized, RoundingSettings, Step, correct_biases, improve
from onnxqt.runtime import with_outputs
from onnxqt.schemes import parse_scheme

FLOAT_ERROR = 1e-5  # of a mean of outputs, of which each is a float32 sum of at most 60 products: 60 * 2^-24 = 4e-6
IMAGE = "(float[n,4,8,8] x) => (float[] y)"
W = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=1), "v": normal(5, 6, 1, 1, seed=2), "c": normal(5, seed=3)}
NETS: dict[str, tuple[str, Mapping[str, Array]]] = {
    "conv-relu-conv": (f"{IMAGE} {{ h = Conv(x, w, b) r = Relu(h) y = Conv(r, v, c) }}", W),
    "depthwise-clip-conv": (
        f"{IMAGE} {{ h = Conv<group = 4>(x, w, b) r = Clip(h, low, high) y = Conv(r, v, c) }}",
        {
            **W,
            "w": normal(4, 1, 3, 3),
            "b": normal(4),
            "v": normal(5, 4, 1, 1),
            "low": np.array(0, np.float32),
            "high": np.array(2, np.float32),
        },
    ),
    "convtranspose": (
        f"{IMAGE} {{ h = ConvTranspose<group = 2>(x, w, b) y = Conv(h, v, c) }}",
        {**W, "w": normal(4, 3, 3, 3)},
    ),
    "gemm": (
        "(float[n,8] x) => (float[] y) { h = Gemm(x, w, b) r = Relu(h) y = Gemm<transB = 1>(r, v, c) }",
        {"w": normal(8, 6), "b": normal(6, seed=1), "v": normal(5, 6, seed=2), "c": normal(1, 5, seed=3)},
    ),
    "matmul": (
        "(float[n,3,8] x) => (float[] y) { m = MatMul(x, w) h = Add(m, b) r = Relu(h) k = MatMul(r, v) y = Add(k, c) }",
        {"w": normal(8, 6), "b": normal(6, seed=1), "v": normal(6, 5, seed=2), "c": normal(1, 5, seed=3)},
    ),
}


def samples_of(model: Model, seed: int = 1) -> Samples:
    specs = input_specs(model)
    values = {spec.name: normal(SAMPLES, *(size or 1 for size in spec.shape[1:]), seed=seed) for spec in specs}
    return open_samples(values, specs)


def quantized(proto: ModelProto, scheme: str = "w3a8-sym-pc") -> tuple[Quantized, Samples]:
    model = ingested(proto)
    plan, samples = make_plan(model), samples_of(model)
    ranges = calibrate(model, plan, samples, fixed_batch(input_specs(model)) or SAMPLES)
    return Quantized(model, model, plan, make_quantizers(model, plan, ranges, parse_scheme(scheme), "minmax")), samples


def means(proto: ModelProto, tensor: str, axis: int, samples: Samples) -> Array:
    (batch,) = samples.batches(SAMPLES)
    values = run(with_outputs(proto, [tensor]), batch.inputs)[tensor]
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    return np.asarray(rows.mean(axis=1, dtype=np.float64))


@pytest.mark.parametrize("scheme", ["w3a8-sym-pc", "w3a8-asym-pt"])
@pytest.mark.parametrize("name", NETS)
def test_mean_outputs_are_those_of_the_float_model(name: str, scheme: str) -> None:
    """Up to half a step of the INT32 bias before and after, and the error of float32."""
    start, samples = quantized(build(*NETS[name]), scheme)
    before = start.model.proto.SerializeToString()
    corrected = correct_biases(start, samples)
    assert start.model.proto.SerializeToString() == before
    assert corrected.quantized.quantizers is start.quantizers
    assert not corrected.skipped
    assert list(corrected.shifts) == ["b", "c"]
    worst = 0.0
    for node in start.plan.integer_nodes:
        if node.weight is None:
            continue
        axis = 1 if "Conv" in node.op_type else -1
        tensor = {"b": "h", "c": "y"}[node.bias or ""]
        exact = means(start.model.proto, tensor, axis, samples)
        # An output's own quantizer stands behind it: its name means the codes' values, `y.float` what they come from.
        inner = tensor if tensor == "h" else "y.float"
        now = means(corrected.quantized.proto(), inner, axis, samples)
        was = means(start.proto(), inner, axis, samples)
        params, input_scale = (
            start.quantizers.weights[node.weight.tensor],
            start.quantizers.activations[node.inputs[0]].scale,
        )
        step = bias_scale(params, input_scale, len(exact))
        assert (np.abs(now - exact) <= step + FLOAT_ERROR * np.abs(exact).max()).all()
        worst = max(worst, float(np.abs(was - exact).max() / np.max(step)))
    assert worst > 3  # so the uncorrected model would fail


def test_the_mean_of_the_reference_is_what_counts() -> None:
    start, samples = quantized(build(*NETS["gemm"]))
    shifted = np.asarray(start.model.graph.constant("c")) + np.float32(3)
    moved = replace(start, model=start.model.with_weights({"c": shifted}))
    expected, actual = (
        np.asarray(correct_biases(q, samples).quantized.model.graph.constant("c")) for q in (start, moved)
    )
    last = start.plan.integer_nodes[-1]
    assert last.weight is not None
    steps = start.quantizers.weights[last.weight.tensor].scale * start.quantizers.activations[last.inputs[0]].scale
    assert (np.abs(actual - expected) <= steps * (1 + FLOAT_ERROR)).all()  # half a step for the rounding of either bias


SKIPPED = {
    "has no bias": (f"{IMAGE} {{ y = Conv(x, w) }}", W),
    "shares its bias 'b' with other nodes": (
        "(float[n,8] x) => (float[] y, float[] z) { y = Gemm(x, w, b) z = Gemm(x, v, b) }",
        {"w": normal(8, 6), "v": normal(8, 6, seed=2), "b": normal(6, seed=1)},
    ),
    "has one bias 'b' for all its channels": (
        "(float[n,8] x) => (float[] y) { y = Gemm(x, w, b) }",
        {"w": normal(8, 6), "b": normal(1)},
    ),
}


@pytest.mark.parametrize("reason", SKIPPED)
def test_what_is_not_corrected_is_named(reason: str) -> None:
    start, samples = quantized(build(*SKIPPED[reason]))
    corrected = correct_biases(start, samples)
    assert set(corrected.skipped.values()) == {reason}
    assert set(corrected.skipped) == {node.name for node in start.plan.integer_nodes if node.weight}
    assert corrected.quantized.model is start.model


def test_padded_samples_do_not_count() -> None:
    """The model takes 48 samples at a time, and there are 64: the last one is repeated 32 times."""
    text, constants = NETS["gemm"]
    free, samples = quantized(build(text, constants))
    fixed, padded = quantized(build(text.replace("n,8", "48,8"), constants))
    one, other = (correct_biases(q, s).shifts["c"] for q, s in ((free, samples), (fixed, padded)))
    np.testing.assert_allclose(other, one, atol=1e-5)  # of means of values up to 10, in float32


def test_progress_counts_the_layers() -> None:
    start, samples = quantized(build(*NETS["gemm"]))
    seen: list[tuple[int, str]] = []
    correct_biases(start, samples, lambda done, name: seen.append((done, name)))
    assert seen == [(i + 1, node.name) for i, node in enumerate(n for n in start.plan.integer_nodes if n.weight)]


def test_a_model_with_weights_in_other_files_is_refused() -> None:
    start, samples = quantized(build(*NETS["gemm"]))
    proto = build(*NETS["gemm"])
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(
        ModelError, match="learned rounding and bias correction take models of at most 2 GB, so quantize it without"
    ):
        correct_biases(replace(start, model=Model(proto, "")), samples)


# --- all steps together -------------------------------------------------------------------------------------------


def error(proto: ModelProto, model: Model, samples: Samples) -> float:
    (batch,) = samples.batches(SAMPLES)
    return float(np.mean((run(proto, batch.inputs)["y"] - run(model.proto, batch.inputs)["y"]) ** 2))


def test_each_step_brings_the_file_closer_to_the_model() -> None:
    """On samples that no step saw; the scales are as unequal as equalization is for."""
    text, constants = NETS["conv-relu-conv"]
    factors = np.array([1 / 8, 8, 1, 2, 1 / 4, 4], np.float32)
    ill = {**constants, "w": constants["w"] * factors.reshape(6, 1, 1, 1), "b": constants["b"] * factors}
    model = ingested(build(text, {**ill, "v": constants["v"] / factors.reshape(1, 6, 1, 1)}))
    plan, samples, others = make_plan(model), samples_of(model), samples_of(model, seed=9)
    errors = []
    for taken in range(len(STEPS) + 1):
        settings = PtqSettings(parse_scheme("w4a8-sym-pt"), "mse", STEPS[:taken], RoundingSettings(steps=300))
        outcome = improve(model, plan, samples, settings)
        assert outcome.quantized.reference.graph.outputs == model.graph.outputs
        errors.append(error(outcome.quantized.proto(), model, others))
    assert errors[1] < errors[0] / 4
    assert errors[2] < errors[1]
    assert errors[3] < errors[2] * 1.05  # rounding leaves little to a bias


@pytest.mark.parametrize("step", STEPS)
def test_a_step_can_be_taken_alone(step: Step) -> None:
    model = ingested(build(*NETS["conv-relu-conv"]))
    plan, samples = make_plan(model), samples_of(model)
    settings = PtqSettings(parse_scheme("w4a8-sym-pt"), "mse", (step,), RoundingSettings(steps=300))
    now = improve(model, plan, samples, settings).quantized.model
    changed = {name for name in ("w", "b", "v", "c") if not np.array_equal(constant(now, name), constant(model, name))}
    assert changed == {"equalize": {"w", "b", "v"}, "round": {"w", "v"}, "bias": {"b", "c"}}[step]


def constant(model: Model, name: str) -> Array:
    return np.asarray(model.graph.constant(name))


def test_an_unknown_step_is_refused() -> None:
    with pytest.raises(UsageError, match="unknown step 'prune' of post-training quantization: name some of equalize"):
        PtqSettings(parse_scheme("w4a8-sym-pt"), steps=("prune",))  # type: ignore[arg-type]
