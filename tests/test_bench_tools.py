"""The benchmark tools measure what they say: their shares are counted again here, their figures by hand."""

import importlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from bench_samples import write_samples
from conftest import Digits
from onnx import numpy_helper

from onnxqt.calibrate import calibrate, make_quantizers, weight_quantizers
from onnxqt.compiler import compiler_plan
from onnxqt.data import open_samples
from onnxqt.emulate import load_program
from onnxqt.errors import InstallationError, UsageError
from onnxqt.evaluate import Run
from onnxqt.export import quantized_model
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.numerics import Array, Grid
from onnxqt.plan import make_plan
from onnxqt.profiles import PROFILES, Precision, parse_precision
from onnxqt.runtime import Session
from onnxqt.schemes import Grids, Placement, parse_scheme

TOOLS = Path(__file__).parents[1] / "tools"
CALIBRATED, JUDGED = 48, 130  # samples; 130 are two batches of 64 and two samples
ORT = PROFILES["ort_cpu"]


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    for name in ("bench_policies", "bench_schemes"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("bench_policies")


@pytest.fixture
def scheme_tool(tool: ModuleType) -> ModuleType:
    assert tool
    return importlib.import_module("bench_schemes")


@pytest.fixture(scope="session")
def data(torch_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few samples of the fixture, as the tools want them."""
    counts = {"calib": CALIBRATED, "eval": JUDGED}
    return write_samples(torch_digits.folder, tmp_path_factory.mktemp("samples"), counts)


def batches(data: Path) -> Iterator[tuple[dict[str, Array], Array]]:
    """Inputs and labels of the evaluation samples, 64 at a time."""
    with np.load(data / "eval" / "samples.npz") as file:
        image, labels = file["image"], file["labels"]
    for start in range(0, JUDGED, 64):
        yield {"image": image[start : start + 64]}, labels[start : start + 64]


def right(run: Run, data: Path) -> float:
    """Share of the evaluation samples whose largest class score is the label."""
    count = 0
    for inputs, labels in batches(data):
        (scores,) = run(inputs).values()
        count += int(np.sum(scores.argmax(axis=1) == labels))
    return count / JUDGED


def rows_of(tool: ModuleType, digits: Digits, data: Path, profiles: Any) -> Any:
    task = tool.make_task({"original": digits.file}, data, profiles)
    return tool.emulated(task, tool.reference_of(task))


# --- policies -------------------------------------------------------------------------------------------


def test_every_policy_is_there_once_and_has_one_column(tool: ModuleType) -> None:
    rows = {profile.name: profile for profile in tool.policies(Precision(8, 8), ORT)}
    kinds = ("min/max", "percentile 99.99", "mse", "entropy", "power of two", "dynamic")
    every = itertools.product(kinds, ("pt", "pc"), ("sym", "asym"))
    assert list(rows) == [", ".join(parts) for parts in every]
    methods = dict(zip(kinds, ("minmax", "percentile", "mse", "entropy", "minmax"), strict=False))
    assert {len(profile.policy.precisions) for profile in rows.values()} == {1}
    for name, profile in rows.items():
        policy, (kind, size, grid) = profile.policy, name.split(", ")
        assert policy.per_channel == (size == "pc")
        assert policy.weights_symmetric
        assert policy.power_of_two == ("all" if kind == "power of two" else "none")
        assert policy.operators == ORT.policy.operators
        if kind == "dynamic":
            assert policy.precisions == ("w8a8-dyn",)
            assert profile.arithmetic.dynamic == {"sym": "row", "asym": "tensor"}[grid]
        else:
            assert policy.precisions == ("w8a8",)
            assert (policy.signed, policy.symmetric) == ((True, True) if grid == "sym" else (False, False))
            assert policy.ranges == methods[kind]


def test_prescriptions_of_the_profile_do_not_reach_into_a_policy(tool: ModuleType) -> None:
    for name in ("tflite_ref", "nnie_log", "rknn_w8a8", "ncnn_sym"):
        for profile in tool.policies(Precision(8, 8), PROFILES[name]):
            policy = profile.policy
            assert not policy.fixed_outputs  # zero points of signed codes, on unsigned grids too
            assert not policy.weights_float
            assert (policy.weights_narrow, policy.narrow) == (True, False)
            assert policy.operators == PROFILES[name].policy.operators


def test_four_bits_of_activations_have_no_dynamic_policy(tool: ModuleType) -> None:
    assert not [profile for profile in tool.policies(Precision(4, 4), ORT) if "dynamic" in profile.name]
    assert len(tool.policies(Precision(4, 4), ORT)) == 20


@pytest.mark.parametrize("bits", ["w8a8-dyn", "w8a16"])
def test_bits_that_have_no_policies_are_refused(tool: ModuleType, bits: str) -> None:
    with pytest.raises(UsageError, match=rf"^--bits is {bits}: give one with static scales"):
        tool.policies(parse_precision(bits), ORT)


@pytest.mark.parametrize(
    ("name", "signed", "per_channel", "method", "power_of_two"),
    [
        ("min/max, pt, sym", True, False, "minmax", False),
        ("percentile 99.99, pt, asym", False, False, "percentile", False),
        ("entropy, pc, asym", False, True, "entropy", False),
        ("power of two, pc, sym", True, True, "minmax", True),
    ],
)
def test_a_static_row_is_the_share_of_a_file_made_by_hand(
    tool: ModuleType,
    torch_digits: Digits,
    data: Path,
    name: str,
    signed: bool,
    per_channel: bool,
    method: Any,
    power_of_two: bool,
) -> None:
    profiles = [profile for profile in tool.policies(Precision(3, 4), ORT) if profile.name == name]
    results = rows_of(tool, torch_digits, data, profiles)
    model = torch_digits.model
    plan = compiler_plan(model, ORT.policy)
    grids = Grids(
        weight=Grid(3, signed=True, narrow=True),
        weight_placement=Placement(True, power_of_two),
        per_channel=per_channel,
        search_clip=False,
        activation=Grid(4, signed),
        io=Grid(8, signed),
        activation_placement=Placement(signed, power_of_two),
    )
    ranges = calibrate(model, plan, open_samples(data / "calib", input_specs(model)))
    file = quantized_model(model, plan, make_quantizers(model, plan, ranges, grids, method))
    share = right(load_program(file, ORT.arithmetic).run, data)
    assert results.rows == {name: {"original": share}}
    assert results.measure == "top1"
    assert results.floats == {"original": right(Session(model.proto).run, data)}
    assert share != results.floats["original"]  # else the bits are too many to show a difference


@pytest.mark.parametrize("grid", ["sym", "asym"])
def test_a_dynamic_row_is_the_share_of_a_file_with_integer_weights_alone(
    tool: ModuleType, torch_digits: Digits, data: Path, grid: str
) -> None:
    name = f"dynamic, pt, {grid}"
    profiles = [profile for profile in tool.policies(Precision(2, 8), ORT) if profile.name == name]
    results = rows_of(tool, torch_digits, data, profiles)
    model = torch_digits.model
    unused, placement = Grid(8, signed=True), Placement(symmetric=True)
    grids = Grids(Grid(2, signed=True, narrow=True), placement, False, False, unused, unused, placement)
    whole = compiler_plan(model, ORT.policy)
    nodes = tuple(replace(node, bias=None) for node in whole.integer_nodes)
    plan = replace(whole, activations=(), integer_nodes=tuple(node for node in nodes if node.weight))
    file = quantized_model(model, plan, weight_quantizers(model, plan, grids))
    program = load_program(file, profiles[0].arithmetic)
    rules = {"sym": "dynamic row", "asym": "dynamic tensor"}
    assert {info.rule for info in program.integer_nodes} == {rules[grid]}
    assert results.rows == {name: {"original": right(program.run, data)}}


def test_a_row_that_fails_is_told_and_the_others_are_not_lost(
    tool: ModuleType, torch_digits: Digits, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, other = tool.policies(Precision(8, 8), ORT)[:2]
    bad = replace(other, arithmetic=replace(other.arithmetic, product="nonsense"))
    results = rows_of(tool, torch_digits, data, [good, bad])
    assert results.rows[good.name]["original"] is not None
    assert results.rows[bad.name] == {"original": None}
    assert [line.partition(": ")[0] for line in results.errors] == [f"{bad.name}, original"]
    capsys.readouterr()
    assert tool.report("the table", {"errors": results.errors}, None) == 1
    told = capsys.readouterr()
    assert told.out == "the table\n"
    assert told.err == f"{results.errors[0]}\n"


# --- figures and tables ---------------------------------------------------------------------------------


def hand_made(tool: ModuleType) -> Any:
    """Shares that float64 holds exactly; one row in which a model failed."""
    results = tool.Results("top1", {"original": 0.875, "checkpoint": 0.75})
    for row, original, checkpoint in (("a", 0.25, 0.5), ("b", 0.75, 0.625), ("c", 0.125, None)):
        results.put(row, "original", original, None)
        results.put(row, "checkpoint", checkpoint, "c: no kernel")
    return results


def test_figures_are_those_of_complete_rows_against_the_original_float(tool: ModuleType) -> None:
    results = hand_made(tool)
    assert tool.summary(results) == {
        "min": {"original": 0.25, "checkpoint": 0.5},
        "max": {"original": 0.75, "checkpoint": 0.625},
        "spread": {"original": 0.5, "checkpoint": 0.125},
        "worst gap": {"original": 0.625, "checkpoint": 0.375},
    }
    assert results.errors == ["c, checkpoint: c: no kernel"]
    assert tool.summary(tool.Results("top1", {"original": 0.875})) == {}


def test_the_table_is_markdown_in_percent(tool: ModuleType) -> None:
    assert tool.table("policy", hand_made(tool), {"min": {"original": 0.25, "checkpoint": 0.5}}).splitlines() == [
        "| policy | original | checkpoint |",
        "|---|--:|--:|",
        "| float | 87.50 | 75.00 |",
        "| a | 25.00 | 50.00 |",
        "| b | 75.00 | 62.50 |",
        "| c | 12.50 | failed |",
        "| **min** | 25.00 | 50.00 |",
    ]


def test_models_have_the_labels_that_they_are_given(tool: ModuleType, tmp_path: Path) -> None:
    odd = tmp_path / "a=b.onnx"
    odd.touch()
    found = tool.named_models(["original=x/net.onnx", "net.onnx", str(odd)])
    assert found == {"original": Path("x/net.onnx"), "net": Path("net.onnx"), "a=b": odd}
    with pytest.raises(UsageError, match=r"^two models are called 'net': give each a label of its own"):
        tool.named_models(["net=a.onnx", "b/net.onnx"])


# --- schemes --------------------------------------------------------------------------------------------


def test_each_of_the_twelve_schemes_is_in_one_family(scheme_tool: ModuleType) -> None:
    schemes = [parse_scheme(name) for name in scheme_tool.SCHEMES]
    assert len(set(schemes)) == 12
    families = Counter(name for name, belongs in scheme_tool.FAMILIES.items() for scheme in schemes if belongs(scheme))
    assert families == {"w8a8": 4, "w4a8 pc": 2, "w4a8 pt": 2, "w4a4 asym pc": 1, "w4a4 rest": 3, "all": 12}
    assert scheme_tool.FAMILIES["w4a4 asym pc"](parse_scheme("w4a4-asym-pc"))


def test_a_mean_drop_is_that_of_its_family_from_the_original_float(tool: ModuleType, scheme_tool: ModuleType) -> None:
    results = tool.Results("top1", {"original": 0.875, "checkpoint": 0.75})
    shares = {
        "w8a8-sym-pc": (0.75, 0.5),
        "w8a8-sym-pt": (0.5, 0.25),
        "w4a8-sym-pc": (0.25, None),
        "w5a8-sym-pc": (0.0, 0.0),
    }
    for row, both in shares.items():
        for label, share in zip(results.floats, both, strict=True):
            results.put(row, label, share, "no kernel")
    assert scheme_tool.mean_drops(results) == {
        "mean drop, w8a8": {"original": 0.25, "checkpoint": 0.5},
        "mean drop, all": {"original": (0.125 + 0.375 + 0.875) / 3, "checkpoint": (0.375 + 0.625 + 0.875) / 3},
    }


def test_the_schemes_of_two_models_are_those_of_the_export(
    scheme_tool: ModuleType, torch_digits: Digits, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = onnx.load(torch_digits.file)
    weight = next(tensor for tensor in checkpoint.graph.initializer if len(tensor.dims) == 4)
    values = numpy_helper.to_array(weight).copy()
    values[0] *= -1  # another network, so that columns cannot be mixed up
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(checkpoint, tmp_path / "checkpoint.onnx")
    names = ("w2a4-asym-pt", "w8a8-sym-pc")
    arguments = ["--original", torch_digits.file, f"trimmed={tmp_path / 'checkpoint.onnx'}", "--data", data]
    arguments += ["--json", tmp_path / "found.json", "--schemes", *names]
    assert scheme_tool.main([str(each) for each in arguments]) == 0
    found = json.loads((tmp_path / "found.json").read_text())

    models = {"original": torch_digits.model, "trimmed": ingest(tmp_path / "checkpoint.onnx")}
    expected: dict[str, dict[str, float]] = {name: {} for name in names}
    for label, model in models.items():
        plan = make_plan(model)
        ranges = calibrate(model, plan, open_samples(data / "calib", input_specs(model)))
        for name in names:
            file = quantized_model(model, plan, make_quantizers(model, plan, ranges, parse_scheme(name), "mse"))
            expected[name][label] = right(load_program(file).run, data)
    assert {row["name"]: row["shares"] for row in found["rows"]} == expected
    assert len({tuple(row.values()) for row in expected.values()}) == 2
    assert [model["label"] for model in found["models"]] == ["original", "trimmed"]
    printed = capsys.readouterr().out
    assert f"Top-1 in percent, {JUDGED} evaluation samples; emulated as ort_cpu." in printed
    assert "| scheme | original | trimmed |" in printed


def test_an_error_is_one_line_with_its_exit_code(
    tool: ModuleType, scheme_tool: ModuleType, torch_digits: Digits, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--data", "nowhere"]
    assert scheme_tool.main(["--original", "a.onnx", *common, "--schemes", "w9a9"]) == 2
    assert capsys.readouterr().err.startswith("Error: unknown scheme 'w9a9'")
    assert tool.main([str(torch_digits.file), *common]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert tool.main([str(torch_digits.file), *common, "--bits", "w4a8", "--runtime-python", "python"]) == 2
    assert capsys.readouterr().err.startswith("Error: --bits is w4a8, but --runtime-python quantizes to w8a8 alone")


# --- ONNX Runtime's own quantizer -----------------------------------------------------------------------

CELLS = [
    {"calibration": "MinMax", "per_channel": False, "activations": "s8"},
    {"calibration": "MinMax", "per_channel": True, "activations": "u8"},
    {"calibration": "Nonsense", "per_channel": True, "activations": "u8"},
]


def test_every_cell_of_the_runtime_is_asked_for_once(tool: ModuleType) -> None:
    cells = tool.runtime_cells()
    assert len(cells) == len({tuple(cell.values()) for cell in cells}) == 12
    assert CELLS[0] in cells
    assert CELLS[1] in cells


def test_the_referee_quantizes_as_it_is_told_and_its_outputs_are_counted(
    tool: ModuleType, torch_digits: Digits, data: Path, tmp_path: Path
) -> None:
    task = tool.make_task({"original": torch_digits.file}, data, [ORT])
    reference = tool.reference_of(task)
    tool.write_job(tmp_path, task, CELLS)
    assert len(list((tmp_path / "calib").iterdir())) == CALIBRATED
    told = tool.call_referee(tmp_path, Path(sys.executable))
    assert [bool(cell["error"]) for cell in told["cells"]] == [False, False, True]
    for cell in told["cells"][:2]:
        file = onnx.load(tmp_path / cell["file"])
        constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in file.graph.initializer}
        points = [constants[node.input[2]] for node in file.graph.node if node.op_type == "QuantizeLinear"]
        scales = [constants[node.input[1]] for node in file.graph.node if node.op_type == "DequantizeLinear"]
        signed = cell["activations"] == "s8"
        assert {point.dtype for point in points} == {np.dtype(np.int8 if signed else np.uint8)}
        assert any(point.any() for point in points) != signed
        assert any(scale.size > 1 for scale in scales) == cell["per_channel"]
        _, share = tool.share_of(tool.counted(tmp_path / cell["outputs"], reference))
        # The same release, session options and batches.
        assert share == right(Session(tmp_path / cell["file"]).run, data)

    results = tool.Results("top1", {"original": 1.0})
    tool.run_runtime(task, reference, Path(sys.executable), CELLS[1:], results)
    names = [f"onnxruntime {told['version']} {kind}, pc, u8 asym" for kind in ("MinMax", "Nonsense")]
    assert results.rows == {names[0]: {"original": share}, names[1]: {"original": None}}
    assert results.errors == [f"{names[1]}, original: KeyError: 'Nonsense'"]


def test_an_interpreter_that_cannot_run_the_referee_is_told(tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(InstallationError, match=r"^--runtime-python: '.*nowhere' cannot be run \(No such file"):
        tool.call_referee(tmp_path, tmp_path / "nowhere")
    with pytest.raises(InstallationError, match=r"^--runtime-python: '.*' fails \(.*job\.json'\): give an interpreter"):
        tool.call_referee(tmp_path, Path(sys.executable))
