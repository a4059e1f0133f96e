"""Two models tensor by tensor: what was planted is found where it was planted, and every figure follows from numpy."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from conftest import ROOT
from helpers import build, inputs_of, normal, prepare, save
from onnx import ModelProto, numpy_helper

from onnxqt import compare as module
from onnxqt.cli import main
from onnxqt.compare import CompareSettings, Comparison, Difference, Matched, compare, match_models, open_subject
from onnxqt.data import DataSource, open_samples
from onnxqt.errors import ModelError, UsageError
from onnxqt.export import quantized_model
from onnxqt.numerics import Array, fake_quantize
from onnxqt.runtime import Session

SCHEMA = json.loads((ROOT / "onnxqt" / "compare.schema.json").read_text())
SAMPLES = 5
NETWORK = """(float[n, 3, 6, 6] x) => (float[n, 4] y) {
    c1 = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w1, b1)
    r1 = Relu(c1)
    c2 = Conv<kernel_shape = [1, 1]>(r1, w2, b2)
    c3 = Conv<kernel_shape = [1, 1]>(r1, w3, b2)
    s = Add(c2, c3)
    p = GlobalAveragePool(s)
    f = Flatten(p)
    y = Gemm(f, w4, b4)
}"""
CONSTANTS: Mapping[str, Array] = {
    "w1": normal(5, 3, 3, 3, seed=1),
    "b1": normal(5, seed=2),
    "w2": normal(6, 5, 1, 1, seed=3),
    "w3": normal(6, 5, 1, 1, seed=4),
    "b2": normal(6, seed=5),
    "w4": normal(6, 4, seed=6),
    "b4": normal(4, seed=7),
}


def network(**changed: Array) -> ModelProto:
    return build(NETWORK, {**CONSTANTS, **changed})


def matched(folder: Path, first: ModelProto, second: ModelProto, settings: CompareSettings | None = None) -> Matched:
    ours, theirs = (open_subject(save(proto, folder, name)) for proto, name in ((first, "a.onnx"), (second, "b.onnx")))
    return match_models(ours, theirs, settings)


def compared(
    folder: Path, first: ModelProto, second: ModelProto, settings: CompareSettings | None = None
) -> Comparison:
    pairs = matched(folder, first, second, settings)
    return compare(pairs, open_samples(inputs_of(first, SAMPLES), pairs.specs))


def of(found: Comparison, tensor: str) -> Difference:
    return next(difference for difference in found.differences if difference.pair.tensor == tensor)


def snr(first: Array, second: Array) -> float:
    a, b = first.astype(np.float64), second.astype(np.float64)
    return float(10 * np.log10(np.sum(a**2) / np.sum((a - b) ** 2)))


# --- what is found ------------------------------------------------------------------------------------------


def test_a_model_is_exactly_itself(tmp_path: Path) -> None:
    found = compared(tmp_path, network(), network())
    assert found.first_differing is None
    assert {(d.snr_db, d.max_abs) for d in found.differences} == {(300.0, 0.0)}
    assert [d.pair.tensor for d in found.differences if d.pair.role != "constant"] == [
        "c1",
        "r1",
        *["c2", "c3", "s", "p", "f", "y"],
    ]
    assert {d.pair.tensor for d in found.differences if d.pair.role == "constant"} == set(CONSTANTS)
    assert found.matched.unmatched == found.unlike == ()


@pytest.mark.parametrize("planted", ["w1", "w2", "w3", "w4", "b4"])
def test_a_wrong_constant_differs_first(planted: str, tmp_path: Path) -> None:
    wrong = CONSTANTS[planted].copy()
    wrong.ravel()[2] += 5
    found = compared(tmp_path, network(), network(**{planted: wrong}))
    assert found.first_differing is of(found, planted)
    assert [d.pair.tensor for d in found.differences if d.arises] == [planted]
    reader = {"w1": "c1", "w2": "c2", "w3": "c3", "w4": "y", "b4": "y"}[planted]
    differing = {d.pair.tensor for d in found.differences if d.snr_db < 300}
    assert {planted, reader, "y"} <= differing
    before = {"w1": set[str](), "w2": {"c1", "r1", "c3"}, "w3": {"c1", "r1", "c2"}, "w4": {"f"}, "b4": {"f"}}[planted]
    assert differing.isdisjoint(before)
    assert of(found, planted).max_abs == np.abs(wrong - CONSTANTS[planted]).max()


def test_two_wrong_weights_of_two_branches_both_arise(tmp_path: Path) -> None:
    found = compared(tmp_path, network(), network(w2=CONSTANTS["w2"] * 2, w3=CONSTANTS["w3"] * 2))
    assert [d.pair.tensor for d in found.differences if d.arises] == ["w2", "w3"]
    assert not of(found, "s").arises
    assert of(found, "s").differs


def test_figures_are_those_of_numpy(tmp_path: Path) -> None:
    second = network(w4=CONSTANTS["w4"] + np.float32(0.01) * normal(6, 4, seed=8))
    found = compared(tmp_path, network(), second)
    inputs = inputs_of(network(), SAMPLES)
    a, b = (Session(proto).run(inputs)["y"].astype(np.float64) for proto in (network(), second))
    y = of(found, "y")
    # The same sums, of outputs that other kernels computed: float32 rounds each to 6e-8 of its size, and the
    # differences are a hundredth of that size, so 1e-5 of them.
    assert y.snr_db == pytest.approx(snr(a, b), abs=1e-3)
    assert y.max_abs == pytest.approx(np.abs(a - b).max(), rel=1e-3)
    cosine = np.sum(a * b) / np.sqrt(np.sum(a**2) * np.sum(b**2))
    assert y.cosine == pytest.approx(cosine, abs=1e-6)
    assert y.values == SAMPLES * 4
    assert found.samples == SAMPLES


def test_a_scaled_weight_has_a_known_ratio(tmp_path: Path) -> None:
    zero = np.zeros(4, np.float32)
    found = compared(tmp_path, network(b4=zero), network(b4=zero, w4=CONSTANTS["w4"] * np.float32(1.125)))
    assert of(found, "w4").snr_db == pytest.approx(20 * np.log10(8), abs=1e-5)  # 1/8 more, up to float32's rounding
    assert of(found, "y").snr_db == pytest.approx(20 * np.log10(8), abs=1e-4)
    assert of(found, "y").cosine == pytest.approx(1, abs=1e-9)


def test_the_limit_says_what_differs(tmp_path: Path) -> None:
    second = network(w4=CONSTANTS["w4"] * np.float32(1.125))  # 18 dB
    assert compared(tmp_path, network(), second, CompareSettings(limit_db=15)).first_differing is None
    found = compared(tmp_path, network(), second, CompareSettings(limit_db=20))
    assert found.first_differing is of(found, "w4")


def test_the_worst_comes_first(tmp_path: Path) -> None:
    found = compared(tmp_path, network(), network(w3=CONSTANTS["w3"] * 2, w4=CONSTANTS["w4"] * 3))
    ratios = [d.snr_db for d in found.worst_first]
    assert ratios == sorted(ratios)
    assert len(found.worst_first) == len(found.differences)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    bad = CONSTANTS["b4"].copy()
    bad[1] = np.nan
    found = compared(tmp_path, network(), network(b4=bad))
    assert of(found, "y").snr_db == -300
    assert of(found, "y").cosine is None
    assert of(found, "y").max_abs == np.inf
    content = found.as_json()
    jsonschema.validate(content, SCHEMA)
    json.dumps(content, allow_nan=False)


# --- float against quantized ----------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["w8a8-asym-pc", "w4a8-sym-pt", "w8a4-asym-pt", "w4af-sym-pc", "w8a8-asym-pc-dyn"])
def test_every_tensor_of_our_files_is_matched(scheme: str, tmp_path: Path) -> None:
    prepared = prepare(network())
    found = compared(tmp_path, network(), prepared.quantized(scheme))
    assert found.matched.match == "name"
    assert found.matched.unmatched == found.unlike == ()
    partners = {d.pair.tensor: d.pair.second for d in found.differences}
    weights = {site.tensor for site in prepared.plan.weights}
    assert weights <= partners.keys()
    for site in prepared.plan.activations if scheme in ("w8a8-asym-pc", "w4a8-sym-pt", "w8a4-asym-pt") else ():
        assert partners[site.tensor] == ("y" if site.tensor == "y" else f"{site.tensor}.dequantized")
    assert all(d.snr_db < 300 for d in found.differences if d.pair.tensor in weights)


def test_a_quantized_input_and_weight_have_the_errors_of_their_grids(tmp_path: Path) -> None:
    prepared = prepare(network())
    quantizers = prepared.quantizers("w4a8-asym-pc")
    found = compared(tmp_path, network(), prepared.quantized("w4a8-asym-pc"))
    x = inputs_of(network(), SAMPLES)["x"]
    expected = snr(x, fake_quantize(x, quantizers.activations["x"]))
    assert of(found, "x").pair.role == "input"
    # The same float32 codes times the same scale: only the order of the sums differs.
    assert of(found, "x").snr_db == pytest.approx(expected, abs=1e-6)
    w1 = CONSTANTS["w1"]
    assert of(found, "w1").snr_db == pytest.approx(snr(w1, fake_quantize(w1, quantizers.weights["w1"])), abs=1e-6)


@pytest.mark.parametrize("scheme", ["w8a8-asym-pc", "w8a8-sym-pc"])  # the second has the Relu as a Clip of codes
def test_integer_operators_are_dequantized(scheme: str, tmp_path: Path) -> None:
    prepared = prepare(network())
    quantizers = prepared.quantizers(scheme)
    proto = quantized_model(prepared.model, prepared.plan, quantizers, form="qoperator")
    found = compared(tmp_path, network(), proto)
    qdq = compared(tmp_path, network(), prepared.quantized(scheme))
    for tensor in ("r1", "c2", "c3"):
        assert of(found, tensor).snr_db == pytest.approx(of(qdq, tensor).snr_db, abs=0.5)  # codes next to ties differ
    assert "c1" in found.matched.unmatched  # the Relu is one of codes


def test_two_quantized_files(tmp_path: Path) -> None:
    prepared = prepare(network())
    found = compared(tmp_path, prepared.quantized("w8a8-asym-pc"), prepared.quantized("w3a8-asym-pc"))
    assert found.first_differing is not None
    assert found.first_differing.pair.role == "constant"
    assert of(found, "r1").pair.first == of(found, "r1").pair.second == "r1.dequantized"


# --- by position ----------------------------------------------------------------------------------------------


def renamed(proto: ModelProto) -> ModelProto:
    """Every tensor and node by another name."""
    other = ModelProto()
    other.CopyFrom(proto)
    for number, node in enumerate(other.graph.node):
        node.name = f"n{number}"
        for tensors in (node.input, node.output):
            tensors[:] = [f"t_{name}_" if name else "" for name in tensors]
    for value in (*other.graph.input, *other.graph.output, *other.graph.value_info, *other.graph.initializer):
        value.name = f"t_{value.name}_"
    return other


def test_models_of_other_names_are_matched_by_position(tmp_path: Path) -> None:
    wrong = CONSTANTS["w3"] * np.float32(1.5)
    found = compared(tmp_path, network(), renamed(network(w3=wrong)))
    assert found.matched.match == "position"
    assert found.first_differing is of(found, "w3")
    assert {d.pair.tensor: d.pair.second for d in found.differences}["s"] == "t_s_"
    assert of(found, "c2").snr_db == 300
    assert found.matched.unmatched == ()


def test_names_and_positions_say_the_same(tmp_path: Path) -> None:
    proto = prepare(network()).quantized("w8a8-asym-pc")
    found = [compared(tmp_path, network(), proto, CompareSettings(match=match)) for match in module.MATCHES]
    assert found[0].differences == found[1].differences


def test_a_relu_that_a_quantizer_made_superfluous(tmp_path: Path) -> None:
    """A tool leaves the Relu out, as the least code of the quantizer behind it stands for zero."""
    first = build(
        "(float[n, 4] x) => (float[n, 3] y) { h = MatMul(x, w1) r = Relu(h) y = MatMul(r, w2) }",
        {"w1": normal(4, 5), "w2": normal(5, 3, seed=1)},
    )
    second = build(
        """(float[n, 4] x) => (float[n, 3] y) {
            h = MatMul(x, w1)
            q = QuantizeLinear(h, scale, zero)
            d = DequantizeLinear(q, scale, zero)
            y = MatMul(d, w2)
        }""",
        {
            **{"w1": normal(4, 5), "w2": normal(5, 3, seed=1)},
            **{"scale": np.array(2**-5, np.float32), "zero": np.zeros((), np.uint8)},
        },
    )
    for proto in (second, renamed(second)):
        found = compared(tmp_path, first, proto)
        pair = of(found, "r").pair
        assert pair.second in ("d", "t_d_")
        # Nothing is as large as 255 / 32, so the error of a value is at most half a step: 2^-6.
        assert of(found, "r").max_abs <= 2**-6
        assert "h" in found.matched.unmatched


def test_a_node_that_only_one_model_has(tmp_path: Path) -> None:
    text = NETWORK.replace("f = Flatten(p)", "f0 = Flatten(p) f = Abs(f0)")
    found = compared(tmp_path, network(), renamed(build(text, CONSTANTS)))
    partners = {d.pair.tensor: d.pair.second for d in found.differences}
    assert (partners["p"], partners["f"], partners["y"]) == ("t_p_", "t_f0_", "t_y_")


# --- samples and memory -----------------------------------------------------------------------------------------


def test_little_memory_takes_more_passes_and_finds_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = matched(tmp_path, network(), network(w2=CONSTANTS["w2"] * 2))
    samples = open_samples(inputs_of(network(), SAMPLES), pairs.specs)
    totals = set()
    found = [compare(pairs, samples, lambda done, total: totals.add(total))]
    monkeypatch.setattr(module, "_MEMORY", 1)
    found.append(compare(pairs, samples, lambda done, total: totals.add(total)))
    assert totals == {SAMPLES, SAMPLES * 8}  # eight tensors, one at a time
    for a, b in zip(found[0].differences, found[1].differences, strict=True):
        assert (a.pair, a.values, a.max_abs) == (b.pair, b.values, b.max_abs)
        assert a.snr_db == pytest.approx(b.snr_db, abs=1e-9)  # float64 sums in another order


def test_a_fixed_batch_is_filled_and_the_filling_does_not_count(tmp_path: Path) -> None:
    second = network(w4=CONSTANTS["w4"] * 2)
    free = compared(tmp_path, network(), second)
    for value in (second.graph.input[0], second.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = 2
    fixed = compared(tmp_path, network(), second)  # five samples, two at a time
    assert fixed.matched.specs[0].shape[0] == 2
    assert of(fixed, "y").values == of(free, "y").values
    assert of(fixed, "y").snr_db == pytest.approx(of(free, "y").snr_db, abs=1e-3)  # other kernels for other batches


def test_so_many_samples_as_asked_for(tmp_path: Path) -> None:
    assert compared(tmp_path, network(), network(), CompareSettings(samples=3)).samples == 3


def test_tensors_of_one_name_and_other_shapes(tmp_path: Path) -> None:
    text = NETWORK.replace("p = GlobalAveragePool(s)", "p = ReduceMean<axes = [2, 3], keepdims = 0>(s)")
    found = compared(tmp_path, network(), build(text.replace("f = Flatten(p)", "f = Identity(p)"), CONSTANTS))
    assert found.unlike == ("p",)
    assert of(found, "y").snr_db > 100


# --- errors -------------------------------------------------------------------------------------------------------


def interface(inputs: str = "float[n, 4] x", output: str = "float[n, 3] y", inner: str = "x") -> ModelProto:
    name = output.split()[-1]
    width = int(output.split(",")[1].split("]")[0])
    depth = int(inputs.split(",")[1].split("]")[0])
    return build(f"({inputs}) => ({output}) {{ {name} = MatMul({inner}, w) }}", {"w": normal(depth, width)})


def test_other_inputs_are_refused_with_both_sides(tmp_path: Path) -> None:
    message = (
        r"the models have different inputs: 'a\.onnx' has 'x' float32 \(any, 4\) and 'b\.onnx' has 'x' float32 "
        r"\(any, 5\); compare two forms of one model$"
    )
    with pytest.raises(ModelError, match=message):
        matched(tmp_path, interface(), interface("float[n, 5] x"), CompareSettings("position"))
    with pytest.raises(ModelError, match=r"different inputs.*'x' float32.*'z' float32.*or match them with --match pos"):
        matched(tmp_path, interface(), interface("float[n, 4] z", inner="z"), CompareSettings("name"))
    two = build(
        "(float[n, 4] x, float[n, 4] z) => (float[n, 3] y) { s = Add(x, z) y = MatMul(s, w) }", {"w": normal(4, 3)}
    )
    with pytest.raises(ModelError, match=r"different inputs: .*'b\.onnx' has 'x' float32 \(any, 4\), 'z' float32"):
        matched(tmp_path, interface(), two)


def test_other_outputs_are_refused_with_both_sides(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"different outputs: 'a\.onnx' has 'y' float32 \(any, 3\) and 'b\.onnx' has 'y' flo"
    ):
        matched(tmp_path, interface(), interface(output="float[n, 7] y"))
    codes = build(
        """(float[n, 4] x) => (uint8[n, 3] y) { h = MatMul(x, w) y = QuantizeLinear(h, scale, zero) }""",
        {"w": normal(4, 3), "scale": np.array(0.1, np.float32), "zero": np.zeros((), np.uint8)},
    )
    with pytest.raises(ModelError, match=r"different outputs: .*'y' float32.*'y' uint8"):
        matched(tmp_path, interface(), codes)


def test_integer_operators_without_a_position(tmp_path: Path) -> None:
    prepared = prepare(interface())
    proto = quantized_model(prepared.model, prepared.plan, prepared.quantizers("w8a8-asym-pc-dyn"), form="qoperator")
    with pytest.raises(UsageError, match=r"'b\.onnx' has the integer operator MatMulInteger .*match by name"):
        matched(tmp_path, interface(), proto, CompareSettings("position"))
    assert compared(tmp_path, interface(), proto).matched.match == "name"


@pytest.mark.parametrize(
    ("settings", "message"), [({"samples": 0}, "--samples is 0"), ({"limit_db": np.inf}, "--limit is inf")]
)
def test_settings_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CompareSettings(**settings)  # type: ignore[arg-type]


def test_a_file_that_does_not_run_is_named(tmp_path: Path) -> None:
    second = build(
        """(float[n, 4] x) => (float[n, 3] y) {
            q = QuantizeLinear(x, s, z)
            d = DequantizeLinear(q, s, z)
            y = MatMul(d, w)
        }""",
        {"w": normal(5, 3), "s": np.array(0.1, np.float32), "z": np.zeros((), np.uint8)},
    )
    with pytest.raises(ModelError, match=r"'b\.onnx'"):
        compared(tmp_path, interface(), second)


def test_nothing_in_common(tmp_path: Path) -> None:
    one, other = (open_subject(save(interface(), tmp_path, name)) for name in ("a.onnx", "b.onnx"))
    with pytest.raises(UsageError, match=r"'a\.onnx' and 'b\.onnx' have no tensor in common: try --match position"):
        match_models(one, replace(other, tensors={}), CompareSettings("name"))


# --- the command --------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Result:
    """Run the command."""
    return CliRunner().invoke(main, ["compare", *map(str, arguments)])


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two models, whose w3 differ, and samples."""
    save(network(), tmp_path, "a.onnx")
    save(network(w3=CONSTANTS["w3"] * np.float32(1.5)), tmp_path, "b.onnx")
    np.savez(tmp_path / "x.npz", x=inputs_of(network(), SAMPLES)["x"])
    return tmp_path


def test_json(place: Path) -> None:
    result = invoke(place / "a.onnx", place / "b.onnx", "--data", place / "x.npz", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    jsonschema.validate(content, SCHEMA)
    pairs = match_models(open_subject(place / "a.onnx"), open_subject(place / "b.onnx"))
    found = compare(pairs, open_samples(DataSource(str(place / "x.npz")), pairs.specs))
    assert content == found.as_json()
    assert content["first_differing"] == "w3"
    assert [row["tensor"] for row in content["tensors"] if row["arises"]] == ["w3"]


def test_for_people(place: Path) -> None:
    result = invoke(place / "a.onnx", place / "b.onnx", "--data", place / "x.npz", "--top", 2)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "b.onnx against a.onnx: 15 tensors by name, 5 samples" in result.stdout
    assert "the first is constant 'w3'" in result.stdout
    (marked,) = [line for line in result.stdout.splitlines() if "first to" in line]
    assert "w3" in marked
    same = invoke(place / "a.onnx", place / "a.onnx", "--data", place / "x.npz")
    assert "no tensor is below 40 dB" in same.stdout
    assert "exact" in same.stdout


FAILURES: dict[str, tuple[tuple[object, ...], int, str]] = {
    "top": (("--top", 0), 2, "--top is 0: give a number of at least 1"),
    "samples": (("--samples", -1), 2, "--samples is -1: give a number of at least 1"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(name: str, place: Path) -> None:
    options, code, message = FAILURES[name]
    result = invoke(place / "a.onnx", place / "b.onnx", "--data", place / "x.npz", *options)
    assert (result.exit_code, result.stdout) == (code, "")
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"Error: {message}")


def test_a_missing_model_is_one_line(place: Path) -> None:
    result = invoke(place / "a.onnx", place / "nothing.onnx", "--data", place / "x.npz")
    assert result.exit_code == 1
    assert "nothing.onnx' is not a file" in result.stderr


def test_external_weights_outside_the_folder_are_refused(place: Path) -> None:
    proto = onnx.load(place / "b.onnx")
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "w1")
    weight.CopyFrom(numpy_helper.from_array(CONSTANTS["w1"], "w1"))
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../etc/passwd")
    (place / "c.onnx").write_bytes(proto.SerializeToString())
    result = invoke(place / "a.onnx", place / "c.onnx", "--data", place / "x.npz")
    assert result.exit_code == 1
    assert "outside the model's folder" in result.stderr
