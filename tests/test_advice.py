"""Advice: models whose weak spot is known by construction, and every figure measured a second time in another way."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT, Digits, files
from helpers import build, ingested, normal, save
from onnx import ModelProto

from onnxqt.advice import AdviceSettings, Advised, Bench, advise, advised_json, effort, open_bench
from onnxqt.advice.bench import Part, Quality, Setup
from onnxqt.advice.facts import channel_spread, tail_of, weight_tail
from onnxqt.advice.sensitivity import joined, own_snr
from onnxqt.calibrate import RANGE_METHODS, RangeMethod, calibrate, float_nodes, make_quantizers, observe, overridden
from onnxqt.cli import main
from onnxqt.data import DataSource, Samples, open_samples
from onnxqt.errors import DataError, UsageError
from onnxqt.export import quantized_model
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, Grid, QParams, fake_quantize
from onnxqt.overrides import Override, Overrides, read_overrides
from onnxqt.plan import Rules, make_plan
from onnxqt.ptq import equalize
from onnxqt.ptq.improve import CALIBRATION_LIMIT
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT

SCHEMA = json.loads((ROOT / "onnxqt" / "advice.schema.json").read_text())
COUNT = 60  # samples, of which 6 are held out
CHANNELS = 6
NETWORK = """(float[n, 4] x) => (float[n, 5] y) {
    h1 = Gemm(x, w1, b1)
    r1 = Relu(h1)
    h2 = Gemm(r1, w2, b2)
    r2 = Relu(h2)
    y = Gemm(r2, w3, b3)
}"""


def constants(**changed: Array) -> dict[str, Array]:
    """Well-behaved layers, but for what is changed."""
    sizes = ((4, CHANNELS), (CHANNELS, CHANNELS), (CHANNELS, 5))
    values = {f"w{n}": normal(*size, seed=n) for n, size in enumerate(sizes, 1)}
    values |= {f"b{n}": np.zeros(size[1], np.float32) for n, size in enumerate(sizes, 1)}
    return {**values, **changed}


def opened(model: Model, count: int = COUNT, **arrays: Array) -> Samples:
    return open_samples(arrays or {"x": normal(count, 4, seed=9)}, input_specs(model))


def bench_of(proto: ModelProto, scheme: str, **settings: Any) -> Bench:
    model = ingested(proto)
    return open_bench(model, opened(model), AdviceSettings(parse_scheme(scheme), **settings))


def activation_outlier() -> ModelProto:
    """Channel 3 of r2 is always near 300 and read by nobody, so it only widens the grid of the others."""
    b2, w3 = np.zeros(CHANNELS, np.float32), normal(CHANNELS, 5, seed=3)
    b2[3], w3[3] = 300, 0
    return build(NETWORK, constants(b2=b2, w3=w3))


def unequal_channels() -> ModelProto:
    """Channel 2 of w2 is 200 times as large, and w3 reads it 200 times as small."""
    w2, w3 = normal(CHANNELS, CHANNELS, seed=2), normal(CHANNELS, 5, seed=3)
    w2[:, 2] *= 200
    w3[2] /= 200
    return build(NETWORK, constants(w2=w2, w3=w3))


def weight_outlier() -> ModelProto:
    """Channel 2 of w2 is 200 times as large, but 0 behind the Relu and read by nobody: it only widens w2's grid."""
    w2, w3, b2 = normal(CHANNELS, CHANNELS, seed=2), normal(CHANNELS, 5, seed=3), np.zeros(CHANNELS, np.float32)
    w2[:, 2] *= 200
    b2[2], w3[2] = -1e4, 0
    return build(NETWORK, constants(w2=w2, w3=w3, b2=b2))


def measured_again(
    bench: Bench, overrides: Overrides, ranges_by: RangeMethod = "mse", model: Model | None = None
) -> float:
    """The SNR of the outputs under overrides, by other means: numpy on what ONNX Runtime gives out."""
    settings, model = bench.settings, model or bench.model
    rest, held = opened(bench.model).split(HELD_FRACTION, HELD_LIMIT)
    plan = make_plan(model, rules=Rules(floats=float_nodes(model, overrides)))
    ranges = calibrate(model, plan, rest.take(CALIBRATION_LIMIT))
    grids = overridden(settings.scheme.grids, plan, overrides)
    quantized = quantized_model(model, plan, make_quantizers(model, plan, ranges, grids, ranges_by))
    return outputs_snr(bench, Session(quantized), held)


def outputs_snr(bench: Bench, session: Session, held: Samples, change: Any = lambda inputs: inputs) -> float:
    (batch,) = held.batches(held.count)
    y = Session(bench.model.proto).run(batch.inputs)["y"].astype(np.float64)
    gap = session.run(change(batch.inputs))["y"] - y
    return float(10 * np.log10(np.sum(y**2) / np.sum(gap**2)))


TOLERANCE_DB = 1e-3  # the same float32 outputs, summed in another order: 1e-6 of the error, or 4e-6 dB


# --- what is found ---------------------------------------------------------------------------------------


def test_an_outlier_channel_of_an_activation_is_found_first() -> None:
    bench = bench_of(activation_outlier(), "w8a8-asym-pc", top=1)
    found = advise(bench)
    first = found.advice[0]
    assert (first.kind, first.subject) == ("activation-bits", "r2")
    assert first.override == Override("r2", activation_bits=16)
    assert "channel 3 reaches" in first.reason
    alone = {cost.tensor: cost.only.snr_db for cost in found.costs.tensors if cost.only}
    assert min(alone, key=lambda name: alone[name]) == "r2"
    # Were the errors of all tensors independent, the others' would be left; on few samples they are so only nearly.
    share = 10 ** ((found.baseline.snr_db - alone["r2"]) / 10)
    assert share > 0.5
    assert first.gain_db == pytest.approx(-10 * np.log10(1 - share), abs=3)


def test_an_outlier_channel_of_a_weight_is_found_first() -> None:
    bench = bench_of(weight_outlier(), "w8a8-asym-pt", top=1)
    found = advise(bench)
    (first,) = found.advice
    assert first.kind == "granularity"
    ratio = channel_spread(np.asarray(bench.model.graph.constant("w2")), 1)
    assert ratio > 100
    assert f"channel ranges differ by {ratio:.0f} times and the scheme is per tensor" in first.reason
    assert first.override in (Override("*", granularity="pc"), Override("w2", granularity="pc"))
    alone = {cost.tensor: cost.only.snr_db for cost in found.costs.tensors if cost.only}
    assert min(alone, key=lambda name: alone[name]) == "w2"


def test_unequal_channels_of_two_layers_are_equalized_first() -> None:
    bench = bench_of(unequal_channels(), "w8a8-asym-pt", top=1)
    (first,) = advise(bench).advice
    assert first.kind == "equalize"  # costs nothing when the model runs
    assert first.override is None
    assert first.option == "--equalize always (trim) or --ptq equalize (export)"
    ratio = channel_spread(np.asarray(bench.model.graph.constant("w2")), 1)
    assert first.reason == f"weights 'w2': channel ranges differ by {ratio:.0f} times"
    again = measured_again(bench, Overrides(), model=equalize(bench.model).model)
    assert first.quality.snr_db == pytest.approx(again, abs=TOLERANCE_DB)


def test_a_long_tail_asks_for_another_clip() -> None:
    wide = NETWORK.replace("[n, 4]", "[n, 40]")
    model = ingested(build(wide, constants(w1=normal(40, CHANNELS, seed=1))))
    x = normal(500, 40, seed=9)
    x[0, 0] = 1000  # sample 0 is not held out; one of 18 000 values is within the outer 0.01 %
    settings = AdviceSettings(parse_scheme("w8a8-sym-pc"), ranges="minmax", top=1)
    first = advise(open_bench(model, opened(model, x=x), settings)).advice[0]
    assert first.kind == "clip"
    assert first.option in ("--ranges percentile", "--ranges entropy")  # the least square keeps a value this large
    assert first.reason.startswith("the range of 'x' is ")
    largest, quantile = 1000, float(np.quantile(np.abs(x), 0.999))
    ratio = int(first.reason.split("is ")[1].split(" times")[0])
    # The quantile is known to one of the bins, of which 2 * 1024 / 8192 = 1/4 of it is the width.
    assert largest / (quantile + 0.25) - 1 <= ratio <= largest / (quantile - 0.25) + 1


def test_narrow_weights_are_advised_eight_bits() -> None:
    found = advise(bench_of(build(NETWORK, constants()), "w2a16-sym-pc", top=2))
    assert {item.kind for item in found.advice} <= {"weight-bits", "float", "equalize", "clip"}
    assert any(item.override and item.override.weight_bits == 8 for item in found.advice)


@pytest.mark.parametrize("scheme", ["w4af-sym-pc", "w4a8-asym-pc-dyn"])
def test_schemes_without_ranges(scheme: str) -> None:
    bench = bench_of(build(NETWORK, constants()), scheme, top=2)
    found = advise(bench)
    assert {cost.role for cost in found.costs.tensors} == {"weight"}
    assert not {item.kind for item in found.advice} & {"activation-bits"}
    assert found.quality.snr_db > found.baseline.snr_db


# --- what is measured ------------------------------------------------------------------------------------


def test_gains_are_those_of_the_exported_file() -> None:
    bench = bench_of(activation_outlier(), "w4a8-asym-pt", top=3)
    found = advise(bench)
    before, overrides = found.baseline.snr_db, Overrides()
    ranges: RangeMethod = "mse"
    model = bench.model
    assert before == pytest.approx(measured_again(bench, overrides), abs=TOLERANCE_DB)
    assert len(found.advice) == 3
    for item in found.advice:
        if item.override is not None:
            overrides = joined(overrides, item.override)
        elif item.kind == "equalize":
            model = equalize(model).model
        else:
            (ranges,) = [method for method in RANGE_METHODS if item.option == f"--ranges {method}"]
        after = measured_again(bench, overrides, ranges, model)
        assert item.quality.snr_db == pytest.approx(after, abs=TOLERANCE_DB)
        assert item.gain_db == pytest.approx(after - before, abs=TOLERANCE_DB)
        before = after
    assert overrides.rules
    assert found.overrides == overrides


def test_a_weight_alone_is_the_float_model_with_rounded_weights() -> None:
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pt")
    for name in ("w1", "w2", "w3"):
        weight = np.asarray(bench.model.graph.constant(name))
        rounded = bench.model.with_weights({name: fake_quantize(weight, bench.quantizers.weights[name])})
        held = opened(bench.model).split(HELD_FRACTION, HELD_LIMIT)[1]
        expected = outputs_snr(bench, Session(rounded.proto), held)
        assert bench.quality(Part(weights=frozenset([name]))).snr_db == pytest.approx(expected, abs=TOLERANCE_DB)


def test_the_input_alone_is_the_float_model_on_rounded_inputs() -> None:
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pt")

    def rounded(inputs: Mapping[str, Array]) -> dict[str, Array]:
        return {"x": fake_quantize(inputs["x"], bench.quantizers.activations["x"])}

    held = opened(bench.model).split(HELD_FRACTION, HELD_LIMIT)[1]
    expected = outputs_snr(bench, Session(bench.model.proto), held, rounded)
    assert bench.quality(Part(activations=frozenset(["x"]))).snr_db == pytest.approx(expected, abs=TOLERANCE_DB)


def test_all_but_one_is_the_file_with_that_node_in_float() -> None:
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pt", top=1)
    found = advise(bench)
    for cost in found.costs.layers:
        assert cost.without is not None
        again = measured_again(bench, Overrides((Override(cost.node, keeps_float=True),)))
        assert cost.without.snr_db == pytest.approx(again, abs=TOLERANCE_DB)


def test_what_is_settled_already_stays() -> None:
    settled = Overrides((Override("w1", weight_bits=8),))
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pc", overrides=settled, top=2)
    assert bench.quality(bench.start).snr_db == pytest.approx(measured_again(bench, settled), abs=TOLERANCE_DB)
    found = advise(bench)
    assert found.overrides.rules[0] == settled.rules[0]
    assert all(item.subject != "w1" for item in found.advice if item.kind == "weight-bits")


def test_agreement_is_counted(torch_digits: Digits) -> None:
    settings = AdviceSettings(parse_scheme("w2a8-sym-pt"), top=1, samples=20, models=12)
    bench = open_bench(torch_digits.model, torch_digits.samples, settings)
    (output,) = torch_digits.model.graph.outputs
    held = [batch.inputs for batch in bench.held]
    float_run, quantized = Session(torch_digits.model.proto), Session(bench.proto(bench.start))
    agreeing = [
        np.mean(float_run.run(inputs)[output].argmax(1) == quantized.run(inputs)[output].argmax(1)) for inputs in held
    ]
    assert bench.samples == 10  # a tenth of 100
    assert bench.quality(bench.start).agreement == pytest.approx(agreeing[0], abs=1e-12)  # one division in float64


def test_an_exact_output_counts_as_300_decibels() -> None:
    bench = bench_of(build(NETWORK, constants()), "w8a8-sym-pc")
    assert bench.quality(Part()) == Quality(1e-30, 1.0)


# --- how much is run ---------------------------------------------------------------------------------------


def test_no_more_models_than_asked_for() -> None:
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pt", models=10, top=2)
    ahead = effort(bench)
    assert ahead.models == 9
    assert ahead.left_out > 0
    found = advise(bench)
    assert found.models <= 10
    assert found.costs.left_out == ahead.left_out
    unmeasured = [cost for cost in found.costs.layers if cost.only is None]
    assert len(unmeasured) == found.costs.left_out


def test_the_effort_is_what_is_run() -> None:
    bench = bench_of(build(NETWORK, constants()), "w4a8-sym-pt")
    ahead = effort(bench)
    done: list[int] = []
    found = advise(bench, lambda count, note: done.append(count))
    assert found.models <= ahead.models + 1
    assert ahead.left_out == found.costs.left_out == 0
    assert done == sorted(done)
    assert done[-1] == found.models
    assert ahead.seconds == pytest.approx(ahead.models * bench.seconds)


def test_the_same_call_gives_the_same_answer() -> None:
    first, second = (
        advised_json(bench, advise(bench))
        for bench in (bench_of(weight_outlier(), "w4a8-sym-pt", top=2) for _ in range(2))
    )
    assert first == second
    jsonschema.validate(first, SCHEMA)


# --- facts -------------------------------------------------------------------------------------------------


def test_tail_of_a_histogram() -> None:
    values = np.ones(10_000, np.float32)
    values[:5] = 64  # under 0.1 %
    seen = observe(values)
    # One lies in the middle of a bin at most 64 * 2 / 8192 / 2 off: 0.8 % of it, and one more for the bin's width.
    assert tail_of(seen.counts, seen.centers, seen.max) == pytest.approx(64, rel=0.016)
    seen = observe(np.concatenate([np.zeros(9_999, np.float32), [np.float32(5)]]))
    assert tail_of(seen.counts, seen.centers, seen.max) == 0.0  # nearly all zeros have no tail to speak of


def test_tail_and_spread_of_a_weight() -> None:
    weight = np.ones((4, 1000), np.float32)
    weight[0, 0] = 30
    assert weight_tail(weight) == 30
    assert channel_spread(weight, 0) == 30
    weight[1] = 0
    assert channel_spread(weight, 0) == 30  # zeros do not count
    assert weight_tail(np.zeros((2, 2), np.float32)) == 0


def test_own_snr() -> None:
    params = QParams(np.float32(1), np.int32(0), Grid(8, signed=True))  # type: ignore[arg-type]
    values = np.array([10.25, -10.25, 4.0], np.float32)
    expected = 10 * np.log10((2 * 10.25**2 + 3 * 16) / (2 * 0.0625))
    assert own_snr(values, params, np.array([1, 1, 3])) == pytest.approx(expected, abs=1e-9)  # exact in float64
    assert own_snr(np.array([4.0], np.float32), params) == 300


DETECTOR = """(float[n, 3, 8, 8] x) => (float[n, 6, 64] y) {
    h = Conv<kernel_shape = [1, 1]>(x, w1)
    r = Relu(h)
    z = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(r, w2)
    y = Reshape(z, shape)
}"""


def test_a_head_and_a_first_layer_are_called_so() -> None:
    values: dict[str, Array] = {
        "w1": normal(4, 3, 1, 1),
        "w2": normal(6, 4, 3, 3, seed=1),
        "shape": np.array([0, 6, 64], np.int64),
    }
    model = ingested(build(DETECTOR, values))
    samples = opened(model, x=normal(COUNT, 3, 8, 8))
    found = advise(open_bench(model, samples, AdviceSettings(parse_scheme("w3a8-sym-pc"), top=3)))
    reasons = {item.subject: item.reason for item in found.advice}
    assert "first layer" in reasons["w1"]
    assert "head of a detector or segmentation network" in reasons["w2"]


def test_a_softmax_input_is_called_so() -> None:
    text = """(float[n, 5, 8] x) => (float[n, 5, 4] y) {
        q = MatMul(x, wq)
        k = MatMul(x, wk)
        t = Transpose<perm = [0, 2, 1]>(k)
        s = MatMul(q, t)
        p = Softmax(s)
        v = MatMul(x, wv)
        y = MatMul(p, v)
    }"""
    values = {f"w{name}": normal(8, 4, seed=seed) for seed, name in enumerate("qkv")}
    values["wq"] = values["wq"] * np.float32(40)  # scores of a few hundred, whose steps are larger than one
    model = ingested(build(text, values))
    samples = opened(model, x=normal(COUNT, 5, 8))
    found = advise(open_bench(model, samples, AdviceSettings(parse_scheme("w8a8-sym-pc"), top=3)))
    (reason,) = [item.reason for item in found.advice if item.subject == "s"]
    assert "Softmax input" in reason


# --- overrides ---------------------------------------------------------------------------------------------


def test_overrides_of_one_pattern_become_one() -> None:
    both = joined(Overrides((Override("a", weight_bits=8), Override("b", keeps_float=True))), Override("a", None, 16))
    assert both == Overrides((Override("b", keeps_float=True), Override("a", 8, 16)))
    with pytest.raises(UsageError, match="override 'b' keeps nodes float"):
        joined(both, Override("b", weight_bits=8))


def test_setups_are_told_apart() -> None:
    assert Setup(Overrides(), "mse") != Setup(Overrides(), "mse", equalized=True)
    assert hash(Setup(Overrides(), "mse")) == hash(Setup(Overrides(), "mse"))


# --- errors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"), [("top", 0), ("samples", 0), ("models", 9)], ids=["top", "samples", "models"]
)
def test_numbers_out_of_range(name: str, value: int) -> None:
    with pytest.raises(UsageError, match=f"--{name} is {value}: give a number of at least"):
        AdviceSettings(parse_scheme("w8a8-sym-pc"), **{name: value})  # type: ignore[arg-type]


def test_one_sample_is_too_few() -> None:
    model = ingested(build(NETWORK, constants()))
    with pytest.raises(DataError, match="holds 1 sample, which cannot be split"):
        open_bench(model, opened(model, 1), AdviceSettings(parse_scheme("w8a8-sym-pc")))


def test_nothing_is_quantized() -> None:
    model = ingested(build("(float[n, 4] x) => (float[n, 4] y) { y = Exp(x) }"))
    with pytest.raises(UsageError, match=r"nothing of the model is quantized.*see 'onnxqt inspect'"):
        open_bench(model, opened(model), AdviceSettings(parse_scheme("w8a8-sym-pc")))


def test_no_float_output() -> None:
    text = "(float[n, 4] x) => (int64[n, 1] y) { h = MatMul(x, w) y = ArgMax<axis = 1>(h) }"
    model = ingested(build(text, {"w": normal(4, 5)}))
    with pytest.raises(UsageError, match="no float output, whose error could be measured"):
        open_bench(model, opened(model), AdviceSettings(parse_scheme("w8a8-sym-pc")))


def test_an_override_that_matches_nothing() -> None:
    with pytest.raises(UsageError, match=r"override 'w9' matches no node and no tensor of the model: correct"):
        bench_of(build(NETWORK, constants()), "w4a8-sym-pc", overrides=Overrides((Override("w9", 8),)))


# --- the command -------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["advise", *map(str, arguments)])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a model and samples."""
    save(activation_outlier(), tmp_path)
    np.save(tmp_path / "x.npy", normal(COUNT, 4, seed=9))
    return tmp_path


def test_the_file_is_read_back(place: Path) -> None:
    file = place / "advice" / "overrides.toml"
    arguments = (place / "model.onnx", "--data", place / "x.npy", "--scheme", "w8a8-asym-pc", "--top", 1, "--json")
    result = invoke(*arguments, "--out", file)
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    jsonschema.validate(content, SCHEMA)
    assert read_overrides(file).as_json() == content["overrides"]
    assert content["overrides"]["r2"] == {"activation_bits": 16}
    assert files(file.parent) == {"overrides.toml"}
    as_json = file.with_suffix(".json")
    assert invoke(*arguments, "--out", as_json).exit_code == 0
    assert read_overrides(as_json) == read_overrides(file)


def test_export_takes_the_file(place: Path) -> None:
    file, out = place / "overrides.toml", place / "out"
    common = (place / "model.onnx", "--data", place / "x.npy", "--scheme", "w8a8-asym-pc")
    assert invoke(*common, "--top", 1, "--out", file).exit_code == 0
    arguments = ["export", *common, "--overrides", file, "--out", out, "--json"]
    result = CliRunner().invoke(main, list(map(str, arguments)))
    assert result.exit_code == 0, result.output
    assert "w8a8-asym-pc" in json.loads(result.stdout)


def test_for_people(place: Path) -> None:
    result = invoke(place / "model.onnx", "--data", place / "x.npy", "--scheme", "w8a8-asym-pc", "--top", 2)
    assert result.exit_code == 0
    assert "runs at most" in result.stderr
    assert "quantized models on 6 samples: about" in result.stderr
    assert "16 bits for activation 'r2'" in result.stdout
    assert "channel 3 reaches" in result.stdout
    assert "layers, those first without which the outputs are best" in result.stdout


def test_names_may_be_anything(tmp_path: Path) -> None:
    proto = activation_outlier()
    name = 'a"b\\c[1]*?\n# é'
    for node in proto.graph.node:
        for tensors in (node.input, node.output):
            tensors[:] = [name if tensor == "r2" else tensor for tensor in tensors]
    model, file = save(proto, tmp_path), tmp_path / "o.toml"
    np.save(tmp_path / "x.npy", normal(COUNT, 4, seed=9))
    result = invoke(
        model, "--data", tmp_path / "x.npy", "--scheme", "w8a8-asym-pc", "--top", 1, "--out", file, "--json"
    )
    assert result.exit_code == 0, result.output
    (rule,) = [rule for rule in read_overrides(file).rules if rule.activation_bits == 16][:1]
    assert rule.matches(name)
    assert not rule.matches(name.replace("*", "x"))


def test_an_error_without_a_weak_spot_is_called_so(place: Path) -> None:
    """Sixteen bits leave nothing to widen but weights, and those have eight already."""
    arguments = (place / "model.onnx", "--data", place / "x.npy", "--scheme", "w8a16-sym-pc", "--top", 3)
    result = invoke(*arguments)
    assert result.exit_code == 0
    assert "change that was measured gains 0.2 dB" in result.stdout
    assert "the error is spread over many tensors: 'onnxqt trim' or another scheme may help more" in result.stdout


def test_everything_in_float_is_one_line(place: Path) -> None:
    (place / "o.json").write_text(json.dumps({"overrides": {"*": {"float": True}}}))
    result = invoke(place / "model.onnx", "--data", place / "x.npy", "--overrides", place / "o.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing of the model is quantized" in result.stderr


FAILURES: dict[str, tuple[tuple[object, ...], int, str]] = {
    "scheme": (("--scheme", "w9a8-sym-pc"), 2, "unknown scheme 'w9a8-sym-pc'"),
    "models": (("--models", 1), 2, "--models is 1: give a number of at least 10"),
    "no-overrides": (("--overrides", "nothing.toml"), 2, "cannot read 'nothing.toml'"),
    "out-is-a-folder": (("--out", "/"), 2, "--out / is a folder: give the name of a file"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(name: str, place: Path) -> None:
    options, code, message = FAILURES[name]
    result = invoke(place / "model.onnx", "--data", place / "x.npy", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {message}")


def test_a_data_source_is_taken(place: Path) -> None:
    model = ingested(activation_outlier())
    samples = open_samples(DataSource(str(place / "x.npy")), input_specs(model))
    settings = AdviceSettings(parse_scheme("w8a8-asym-pc"), top=1)
    found: list[Advised] = [advise(open_bench(model, given, settings)) for given in (samples, opened(model))]
    assert found[0].advice == found[1].advice
