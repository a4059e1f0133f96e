"""The command line: what it prints where, and what it writes."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import jsonschema
import numpy as np
import onnx
import pytest
from conftest import ROOT, RUN_SCHEMES, Digits, Run, files, invoke
from helpers import build, normal, save

from onnxqt import __version__, numerics
from onnxqt.cli import main
from onnxqt.cost import Measured, estimate, workload
from onnxqt.devices import DEVICES
from onnxqt.emulate import load_program
from onnxqt.errors import EmulatorError
from onnxqt.files import file_sha256
from onnxqt.profiles import PROFILES, read_profile
from onnxqt.runtime import Session

COMMANDS = (
    *("trim", "report", "inspect", "advise", "compare", "calibrate", "export", "tables", "import-table"),
    *("verify", "profiles", "emulate", "cost"),
)
COST_SCHEMA = json.loads((ROOT / "onnxqt" / "cost.schema.json").read_text())
MATRIX_SCHEMA = json.loads((ROOT / "onnxqt" / "matrix.schema.json").read_text())


# --- help -----------------------------------------------------------------------------------------------


def test_commands() -> None:
    assert tuple(main.commands) == COMMANDS
    result = invoke("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_explains_every_option(command: str, flag: str) -> None:
    result = invoke(command, flag)
    assert result.exit_code == 0
    _, example = re.split("Examples?:", result.stdout)
    assert f"onnxqt {command} " in example
    for parameter in main.commands[command].params:
        if isinstance(parameter, click.Option):
            assert parameter.help
            assert parameter.opts[0] in result.stdout


def test_version() -> None:
    assert invoke("--version").stdout == f"onnxqt, version {__version__}\n"


# --- trim -----------------------------------------------------------------------------------------------


def test_trim_prints_only_json(short_run: Run) -> None:
    assert json.loads(short_run.result.stdout) == short_run.report
    assert short_run.result.stderr == ""


PICTURES = ("training.svg", "tails.svg")


def test_trim_writes_its_files_and_nothing_temporary(short_run: Run) -> None:
    outside_training = {name for name in files(short_run.folder) if not name.startswith("training/")}
    schemes = {f"schemes/{name}.onnx" for name in RUN_SCHEMES}
    tables = {"table.json", "table.safetensors"}
    assert outside_training == {"checkpoint.onnx", "report.json", *tables, *PICTURES} | schemes
    kept = {path.name for path in (short_run.folder / "training").iterdir()}
    assert kept - {"best.onnx", "clips.npz"} == {"history.jsonl", "job.json", "last.onnx", "worker.log"}
    assert ("best.onnx" in kept) == ("clips.npz" in kept)
    assert not [name for name in files(short_run.folder) if "tmp" in name]


@pytest.mark.parametrize("name", ["checkpoint.onnx", *(f"schemes/{name}.onnx" for name in RUN_SCHEMES)])
def test_written_models_need_nothing_but_onnx(name: str, short_run: Run) -> None:
    model = onnx.load(short_run.folder / name)
    onnx.checker.check_model(model, full_check=True)
    assert [entry.domain for entry in model.opset_import] == [""]
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_trim_prints_a_table(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ("--data", torch_digits.calib, "--steps", 0, "--scheme", "w8a8-sym-pc", "--scheme", "w2a4-asym-pt")
    result = invoke("trim", torch_digits.file, *arguments)
    assert result.exit_code == 0
    assert result.stderr == ""
    assert "agreement with the original, %" in result.stdout
    assert "float 100.00, checkpoint 100.00" in result.stdout
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line.split()}
    report = json.loads((tmp_path / "model-onnxqt" / "report.json").read_text())
    for name, scheme in report["schemes"].items():
        shares = [100 * scheme[key]["metrics"]["agreement"] for key in ("ptq", "trim", "emulator")]
        assert rows[name][1:4] == [f"{share:.2f}" for share in shares]
        assert rows[name][-1] == scheme["weights"]
    assert report["training"]["steps"] == 0
    assert report["data"]["evaluation"] | {"sha256": ""} == {"samples": 120, "sha256": "", "held_out": True}


def test_repeated_scheme_counts_once(torch_digits: Digits, tmp_path: Path) -> None:
    arguments = ("--data", torch_digits.calib, "--out", tmp_path, "--scheme", "w8a8-sym-pc", "--scheme", "w8a8-sym-pc")
    result = invoke("export", torch_digits.file, *arguments, "--json")
    assert list(json.loads(result.stdout)) == ["w8a8-sym-pc"]


# --- the other commands ---------------------------------------------------------------------------------


def test_inspect(digits: Digits) -> None:
    result = invoke("inspect", digits.file, "--json")
    content = json.loads(result.stdout)
    assert (result.exit_code, result.stderr) == (0, "")
    graph, plan = digits.model.graph, digits.plan
    assert content["sha256"] == digits.model.sha256
    assert content["opset"] == content["original_opset"] == 17
    assert [value["name"] for value in content["inputs"]] == list(graph.inputs)
    assert content["outputs"][0]["shape"][1:] == [10]
    assert content["changes"] == list(digits.model.changes)
    assert sum(operator["count"] for operator in content["operators"]) == len(graph.nodes)
    assert [node["node"] for node in content["integer_nodes"]] == [node.name for node in plan.integer_nodes]
    assert [node["reason"] for node in content["float_nodes"]] == [node.reason for node in plan.float_nodes]
    assert content["quantized_tensors"] == [site.tensor for site in plan.activations]
    assert content["quantized_weights"] == [{"tensor": site.tensor, "axis": site.axis} for site in plan.weights]
    assert content["macs"]["complete"]
    assert content["problems"] == []


def test_inspect_for_people(digits: Digits) -> None:
    result = invoke("inspect", digits.file)
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80
    page = " ".join(result.stdout.split())
    content = json.loads(invoke("inspect", digits.file, "--json").stdout)
    assert f"input {digits.model.graph.inputs[0]} float32 [" in page
    assert f"MACs {content['macs']['per_sample']:,} per sample" in page
    assert f"training moves all {len(content['training']['trained'])} weights and biases" in page
    assert all(operator["op_type"] in page for operator in content["operators"])


def test_inspect_prints_everything_if_asked(digits: Digits) -> None:
    page = " ".join(invoke("inspect", digits.file, "--all").stdout.split())
    assert all(change in page for change in digits.model.changes)
    assert all(node.name in page for node in digits.plan.float_nodes)


def test_inspect_needs_no_trainer(torch_digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxqt.runtime.installed", lambda distribution: None)
    assert invoke("inspect", torch_digits.file).exit_code == 0


def test_calibrate_writes_the_table_it_prints(digits: Digits, tmp_path: Path) -> None:
    arguments = ("--data", digits.calib, "--out", tmp_path, "--ranges", "minmax", "--scheme", "w8a8-sym-pc", "--json")
    result = invoke("calibrate", digits.file, *arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    table = json.loads(result.stdout)
    assert table == json.loads((tmp_path / "table.json").read_text())
    assert files(tmp_path) == {"table.json", "table.safetensors"}
    assert table["calibration"] == {"samples": 512, "ranges": "minmax"}
    assert table["model"]["file"] == "model.onnx"
    assert table["model"]["sha256"] == digits.model.sha256
    entries = {entry["name"]: entry for entry in table["tensors"]}
    assert {site.tensor for site in digits.plan.activations} <= entries.keys()
    assert {site.tensor for site in digits.plan.weights} <= entries.keys()
    (image,) = digits.model.graph.inputs
    stats = entries[image]["stats"]
    assert (stats["min"], stats["max"]) == (0.0, 1.0)  # fixtures/README.md
    assert entries[image]["qparams"][0]["schemes"] == ["w8a8-sym-pc"]
    assert entries[image]["qparams"][0]["clip"] == {"min": [-1.0], "max": [1.0]}


def test_calibrate_for_people(torch_digits: Digits, tmp_path: Path) -> None:
    result = invoke("calibrate", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path)
    assert result.exit_code == 0
    assert "512 samples" in result.stdout
    assert "logits" in result.stdout
    assert f"wrote {tmp_path / 'table.json'}" in "".join(result.stdout.splitlines())


def test_ranges_change_the_clips(torch_digits: Digits, tmp_path: Path) -> None:
    clips = {}
    for method in ("minmax", "percentile", "mse", "entropy"):
        arguments = ("--data", torch_digits.calib, "--out", tmp_path, "--scheme", "w4a4-sym-pt", "--ranges", method)
        table = json.loads(invoke("calibrate", torch_digits.file, *arguments, "--json").stdout)
        clips[method] = [
            e["qparams"][0]["clip"]["max"][0]
            for e in table["tensors"]
            if e["role"] in ("input", "output", "activation")
        ]
    assert len({tuple(clip) for clip in clips.values()}) == 4
    assert all(clip <= widest for clip, widest in zip(clips["mse"], clips["minmax"], strict=True))


def test_export_writes_checked_files(digits: Digits, tmp_path: Path) -> None:
    arguments = ("--data", digits.calib, "--out", tmp_path, "--scheme", "w4a8-sym-pc", "--scheme", "w8a4-asym-pt")
    result = invoke("export", digits.file, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    assert files(tmp_path) == {"table.json", "table.safetensors", *(f"schemes/{name}.onnx" for name in content)}
    assert content.keys() == {"w4a8-sym-pc", "w8a4-asym-pt"}
    for name, verdict in content.items():
        assert verdict.keys() == {"max_lsb", "mismatch_fraction", "integer_kernels"}
        model = onnx.load(tmp_path / "schemes" / f"{name}.onnx")
        onnx.checker.check_model(model)
        assert [value.name for value in model.graph.output] == list(digits.model.graph.outputs)
        assert Session(model).run(digits.inputs)[model.graph.output[0].name].shape == (100, 10)


def test_export_for_people(torch_digits: Digits, tmp_path: Path) -> None:
    result = invoke("export", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path)
    assert result.exit_code == 0
    assert len(files(tmp_path / "schemes")) == 8
    assert all(Path(name).stem in result.stdout for name in files(tmp_path / "schemes"))
    assert f"wrote {tmp_path / 'schemes'}" in "".join(result.stdout.splitlines())


# --- verify ---------------------------------------------------------------------------------------------


def few(digits: Digits, folder: Path) -> Path:
    """A folder with the first labelled samples, so that a back end takes no time."""
    with np.load(digits.folder / "eval" / "000.npz") as arrays:
        folder.mkdir()
        np.savez(folder / "0.npz", **{name: array[:70] for name, array in arrays.items()})
    return folder


def rows_of(text: str) -> dict[str, list[str]]:
    """The rows of the first table by their first words."""
    table = text.split("\n\n")[0]
    return {line.split()[0]: re.split(r"\s{2,}", line.strip()) for line in table.splitlines() if line.strip()}


def test_verify_prints_the_matrix_that_it_writes(short_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--data", short_run.digits.calib, "--eval", few(short_run.digits, tmp_path / "eval"), "--out", out)
    options = ("--profile", "ort_cpu", "--profile", "ncnn_sym", "--json")
    result = invoke("verify", short_run.digits.file, short_run.folder, *arguments, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    jsonschema.validate(content, MATRIX_SCHEMA)
    assert files(out) == {"matrix.json"}
    assert content == json.loads((out / "matrix.json").read_text())
    assert [model["name"] for model in content["models"]] == ["model.onnx", "checkpoint.onnx"]
    assert [entry["columns"] for entry in content["profiles"]] == [["w8a8", "w8a8-dyn"], ["w8a8"]]
    assert {cell["error"] for cell in content["cells"]} == {None}
    assert content["data"]["evaluation"]["samples"] == 70
    again = invoke("verify", short_run.digits.file, short_run.folder / "checkpoint.onnx", *arguments, *options)
    assert again.stdout == result.stdout


def test_verify_for_people(short_run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("--data", short_run.digits.calib, "--eval", few(short_run.digits, tmp_path / "eval"), "--out", out)
    options = ("--profile", "ncnn_sym", "--profile", "htp")
    result = invoke("verify", short_run.digits.file, short_run.folder, *arguments, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads((out / "matrix.json").read_text())
    top1 = {
        (cell["model"], cell["profile"], cell["column"]): f"{100 * cell['result']['metrics']['top1']:.2f}"
        for cell in content["cells"]
    }
    names = ("model.onnx", "checkpoint.onnx")
    rows = rows_of(result.stdout)
    assert rows["profile"] == ["profile", "evidence", "w8a8", "w4a8"]
    for name, evidence, columns in (("ncnn_sym", "validated", ["w8a8"]), ("htp", "modelled", ["w8a8", "w4a8"])):
        cells = [" -> ".join(top1[model, name, column] for model in names) for column in columns]
        assert rows[name] == [name, evidence, *cells, *["-"] * (2 - len(columns))]
    page = " ".join(result.stdout.split())
    assert "model.onnx -> checkpoint.onnx: top-1 %; float" in page
    target = content["models"][0]["float"]["metrics"]["top1"]
    shares = {
        (name, evidence): [
            cell["result"]["metrics"]["top1"]
            for cell in content["cells"]
            if cell["model"] == name and PROFILES[cell["profile"]].evidence == evidence
        ]
        for name in names
        for evidence in ("validated", "modelled")
    }
    gaps = {key: 100 * (target - sum(found) / len(found)) for key, found in shares.items()}
    for entry in content["summary"]:
        assert (
            f"{entry['model']}: mean gap to the original float model {100 * entry['mean_gap']:.2f} points, "
            f"spread {100 * entry['spread']:.2f} points, over 3 back ends and precisions "
            f"(validated {gaps[entry['model'], 'validated']:.2f} over 1, "
            f"modelled {gaps[entry['model'], 'modelled']:.2f} over 2)"
        ) in page
    floats = page.split("what stays float")[1]
    assert "/3/Add, /8/Add" in floats
    assert str(out / "matrix.json") in "".join(result.stdout.splitlines())


def test_verify_of_one_model_without_labels(
    torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--precision", "w4a8", "--precision", "w8a8", "--profile", "tflite_ref", "--profile", "ncnn_sym")
    result = invoke("verify", torch_digits.file, "--data", torch_digits.calib, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads((tmp_path / "model-onnxqt" / "matrix.json").read_text())
    rows = rows_of(result.stdout)
    shares = [f"{100 * cell['result']['metrics']['agreement']:.2f}" for cell in content["cells"]]
    assert rows["profile"][2:] == ["w4a8", "w8a8"]
    assert rows["tflite_ref"][2:] == shares[:2]
    assert rows["ncnn_sym"][2:] == ["-", shares[2]]
    assert "agreement with the original, %; float 100.00" in result.stdout


def test_verify_of_a_model_without_classes(tmp_path: Path) -> None:
    file = save(build("(float[n,3,6] x) => (float[] y) { y = Conv(x, w) }", {"w": normal(4, 3, 1)}), tmp_path)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / "0.npz", x=normal(32, 3, 6))
    options = ("--data", tmp_path / "data", "--out", tmp_path / "out", "--profile", "ort_cpu", "--precision", "w8a8")
    result = invoke("verify", file, *options)
    assert (result.exit_code, result.stderr) == (0, "")
    (cell,) = json.loads((tmp_path / "out" / "matrix.json").read_text())["cells"]
    assert cell["result"]["metrics"] == {}
    assert "signal-to-noise ratio to the original, dB; float exact" in result.stdout
    assert rows_of(result.stdout)["ort_cpu"][2:] == [f"{cell['result']['fidelity']['snr_db']:.1f}"]
    assert "mean gap" not in result.stdout


def test_verify_takes_profiles_from_files_and_schemes(torch_digits: Digits, tmp_path: Path) -> None:
    profile = tmp_path / "npu.toml"
    profile.write_text('base = "ncnn_sym"\n[arithmetic.accumulator]\nbits = 16\n')
    arguments = ("--data", torch_digits.calib, "--out", tmp_path / "out", "--profile", profile)
    result = invoke("verify", torch_digits.file, *arguments, "--scheme", "w8a8-sym-pc", "--json")
    (cell,) = json.loads(result.stdout)["cells"]
    assert (cell["profile"], cell["column"]) == ("npu", "w8a8-sym-pc")
    assert cell["result"]["overflows"]
    page = invoke("verify", torch_digits.file, *arguments, "--scheme", "w8a8-sym-pc").stdout
    assert "accumulators that did not fit" in page
    assert all(f"{count:,}" in page for count in cell["result"]["overflows"].values())


def test_verify_shows_what_failed(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(model: Any, arithmetic: Any) -> Any:
        if arithmetic == PROFILES["ncnn_sym"].arithmetic:
            raise EmulatorError("node 'x' (Conv) failed: on purpose")
        return load_program(model, arithmetic)

    monkeypatch.setattr("onnxqt.matrix.run.load_program", fail)
    arguments = ("--data", torch_digits.calib, "--out", tmp_path, "--precision", "w8a8", "--profile", "ncnn_sym")
    result = invoke("verify", torch_digits.file, *arguments, "--profile", "ort_cpu")
    assert result.exit_code == 0
    assert rows_of(result.stdout)["ncnn_sym"][2:] == ["failed"]
    assert "node 'x' (Conv) failed: on purpose" in " ".join(result.stdout.split())
    assert invoke("verify", torch_digits.file, *arguments).exit_code == 1


# --- profiles -------------------------------------------------------------------------------------------


def test_profiles_lists_every_profile() -> None:
    result = invoke("profiles")
    assert (result.exit_code, result.stderr) == (0, "")
    page = " ".join(result.stdout.split())
    assert all(f"{name} {profile.evidence} " in page for name, profile in PROFILES.items())
    content = json.loads(invoke("profiles", "--json").stdout)
    assert [entry["name"] for entry in content] == list(PROFILES)
    assert all(entry["policy"]["precisions"] for entry in content)


@pytest.mark.parametrize("name", PROFILES)
def test_profile_is_printed_as_the_file_that_makes_it(name: str, tmp_path: Path) -> None:
    result = invoke("profiles", name)
    assert result.exit_code == 0
    assert PROFILES[name].evidence in result.stdout.splitlines()[0]
    file = tmp_path / "x.toml"
    file.write_text(result.stdout, "utf-8")
    assert read_profile(file) == replace(PROFILES[name], evidence="modelled")
    again = invoke("profiles", file).stdout
    assert again.splitlines()[1:] == result.stdout.splitlines()[1:]


# --- emulate --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ort_cpu", "tflite_ref", "dpu_pow2"])
def test_emulate_computes_as_the_profile_does(name: str, short_run: Run) -> None:
    file = short_run.scheme_file("w8a8-sym-pc")
    arguments = ("--data", short_run.evaluation, "--reference", short_run.digits.file, "--profile", name, "--json")
    result = invoke("emulate", file, *arguments)
    if name == "dpu_pow2":  # the scales of the file are no powers of two
        assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    program = load_program(file, PROFILES[name].arithmetic)
    assert content["profile"] == name
    assert content["integer_nodes"] == len(program.integer_nodes)
    assert [node["reason"] for node in content["float_nodes"]] == [reason for _, _, reason in program.float_nodes]
    with np.load(short_run.evaluation / "000.npz") as first, np.load(short_run.evaluation / "001.npz") as second:
        image, labels = (np.concatenate([first[key], second[key]]) for key in ("image", "labels"))
    # Float nodes, where there are any, may depend on the size of the batch.
    choice = np.concatenate([program.run({"image": part})["logits"] for part in np.split(image, range(64, 597, 64))])
    assert content["outputs"]["logits"]["metrics"] == {"top1": np.mean(choice.argmax(axis=1) == labels)}
    assert 0 < content["outputs"]["logits"]["brier"] < 0.1
    assert content["overflows"] == {}


def test_dump_needs_no_samples_and_shows_every_node(short_run: Run) -> None:
    file = short_run.scheme_file("w8a8-sym-pc")
    result = invoke("emulate", file, "--dump", "--profile", "tflite_ref")
    assert (result.exit_code, result.stderr) == (0, "")
    program = load_program(file, PROFILES["tflite_ref"].arithmetic)
    first, *paragraphs = result.stdout.rstrip("\n").split("\n\n")
    title = "TensorFlow Lite, reference kernels (validated)"
    assert first == f"{len(program.integer_nodes)} nodes on integers, 0 in float: {title}"
    assert len(paragraphs) == len(program.steps)
    for step, paragraph in zip(program.steps, paragraphs, strict=True):
        assert paragraph.startswith(f"{step.info.name}: {step.info.op_type}, {step.info.kind}\n")
        if step.info.op_type == "Conv":
            assert step.detail is not None
            how = step.detail.requantization
            assert how is not None
            assert how.mantissa is not None
            assert how.exponent is not None
            assert "    rule        gemmlowp_double\n" in paragraph
            assert f"mantissa {how.mantissa.min()} to {how.mantissa.max()} ({how.mantissa.size} channels)" in paragraph
            assert f"exponent {how.exponent.min()} to {how.exponent.max()}" in paragraph
            assert f"accumulator int32 wrap, at most {step.info.bound:,} here\n" in paragraph
            assert re.search(r"input       int8, scale [\d.e-]+, zero point 0  ", paragraph)
            assert re.search(r"weights     int8, scale [\d.e-]+ to [\d.e-]+ \(\d+ channels\)", paragraph)


def test_dump_says_why_a_node_is_float(short_run: Run) -> None:
    result = invoke("emulate", short_run.scheme_file("w8a8-sym-pc"), "--dump", "--profile", "dpu_pow2")
    assert "scales are not powers of two" in result.stdout
    assert re.search(r": Conv, float\n", result.stdout)


def test_dump_for_machines_holds_everything(short_run: Run) -> None:
    file = short_run.scheme_file("w8a8-sym-pc")
    content = json.loads(invoke("emulate", file, "--dump", "--profile", "tflite_ref", "--json").stdout)
    listing, arrays = load_program(file, PROFILES["tflite_ref"].arithmetic).listing()
    found = content["program"].pop("arrays")
    assert content["program"] == json.loads(json.dumps(listing))
    assert found == {name: array.tolist() for name, array in arrays.items()}
    assert any(name.startswith("weights:") for name in found)
    assert "outputs" not in content


@pytest.mark.parametrize("name", RUN_SCHEMES)
def test_emulate_repeats_the_figures_of_the_report(name: str, short_run: Run) -> None:
    arguments = ("--data", short_run.evaluation, "--reference", short_run.digits.file)
    result = invoke("emulate", short_run.scheme_file(name), *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    emulator = short_run.report["schemes"][name]["emulator"]
    assert content["outputs"]["logits"]["metrics"] == emulator["metrics"]
    # The reference of the report is the ingested model, with its batch norms folded: float32 apart, 7 layers of
    # sums of at most 300 products, sqrt(300) 2^-24 each.
    fidelity = {key: pytest.approx(value, rel=1e-4, abs=0) for key, value in emulator["fidelity"].items()}
    assert content["outputs"]["logits"]["fidelity"] == fidelity
    assert content["float_nodes"] == []
    assert content["integer_nodes"] == 12


def test_emulate_takes_a_float_model_and_a_table(short_run: Run) -> None:
    checkpoint, table = short_run.folder / "checkpoint.onnx", short_run.folder / "table.json"
    arguments = ["--data", short_run.evaluation, "--json"]
    result = invoke("emulate", checkpoint, "--table", table, "--scheme", "w2a8-asym-pt", *arguments)
    (found,) = json.loads(result.stdout)["outputs"].values()
    assert short_run.report["schemes"]["w2a8-asym-pt"]["weights"] == "checkpoint"
    assert found["metrics"] == short_run.report["schemes"]["w2a8-asym-pt"]["emulator"]["metrics"]
    lone = invoke("emulate", checkpoint, "--table", table, *arguments)
    assert (lone.exit_code, lone.stderr) == (
        2,
        "Error: --table and --scheme go together: which table, and which of its schemes\n",
    )


def test_emulate_without_reference(short_run: Run) -> None:
    result = invoke("emulate", short_run.scheme_file("w8a8-sym-pc"), "--data", short_run.digits.calib, "--json")
    content = json.loads(result.stdout)
    assert content["outputs"]["logits"]["fidelity"] is None


def test_emulate_for_people(short_run: Run) -> None:
    arguments = ("--data", short_run.evaluation, "--reference", short_run.digits.file)
    result = invoke("emulate", short_run.scheme_file("w8a8-sym-pc"), *arguments)
    assert result.exit_code == 0
    assert "597 samples in integer arithmetic" in result.stdout
    top1 = short_run.report["schemes"]["w8a8-sym-pc"]["emulator"]["metrics"]["top1"]
    assert f"{100 * top1:.2f}" in result.stdout


# --- cost -----------------------------------------------------------------------------------------------


def test_cost_is_the_estimate_of_every_device(digits: Digits) -> None:
    result = invoke("cost", digits.file, "--weight-bits", 4, "--batch", 8, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    jsonschema.validate(content, COST_SCHEMA)
    load = workload(digits.model, digits.plan, 4, 8)
    expected = [estimate(load, device, 8).as_json() for device in DEVICES.values()]
    assert content["estimates"] == json.loads(json.dumps(expected))
    assert (content["workload"]["macs"], content["workload"]["weight_bytes"]) == (load.macs, load.weight_bytes)
    assert content["model"] == {"name": "model.onnx", "sha256": digits.model.sha256}
    assert (content["batch"], content["measured"], content["measured_on"]) == (8, [], None)


def notes_of(page: str) -> dict[str, str]:
    """The numbered notes of a page, each on one line."""
    parts = re.split(r"^\[(\d+)\] +", page, flags=re.MULTILINE)[1:]
    return {number: " ".join(text.split()) for number, text in zip(parts[::2], parts[1::2], strict=True)}


@pytest.mark.parametrize("columns", [80, 200])
def test_cost_for_people(columns: int, torch_digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    result = invoke("cost", torch_digits.file, "--device", "hailo-8", "--device", "Ryzen AI 300")
    assert (result.exit_code, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= columns
    hailo, ryzen = (
        estimate(workload(torch_digits.model, torch_digits.plan, 8, 8), DEVICES[name])
        for name in ("Hailo-8", "Ryzen AI 300")
    )
    page = " ".join(result.stdout.split())
    assert f"model.onnx: {workload(torch_digits.model, torch_digits.plan, 8, 8).macs:,} MACs per sample" in page
    assert "modelled, not measured; batch 1" in page
    latency = f"{1e3 * hailo.latency_s:.3g} {hailo.throughput_hz:,.0f} - compute extrapolated"
    assert f"Hailo-8 {latency}" in page
    # a peak is a bound, which no real network reaches
    assert (
        f"Ryzen AI 300 > {1e3 * ryzen.latency_s:.3g} < {ryzen.throughput_hz / 1e6:.3g} M - compute upper bound" in page
    )
    notes = notes_of(result.stdout.split("\n(2)")[0])
    assert set(notes.values()) == {*hailo.sources, *ryzen.sources}
    assert list(notes) == [str(number) for number in range(1, len(notes) + 1)]
    assert f"1-{len(hailo.sources)}" in page
    assert "measured on this machine" not in page


def test_cost_of_a_network_like_the_measured_ones_has_a_band(tmp_path: Path) -> None:
    text = "(float[n,3,224,224] x) => (float[] y) { y = Conv<pads = [1, 1, 1, 1]>(x, w) }"
    file = save(build(text, {"w": normal(70, 3, 3, 3)}), tmp_path)
    page = " ".join(invoke("cost", file, "--device", "Hailo-8").stdout.split())
    (found,) = json.loads(invoke("cost", file, "--device", "Hailo-8", "--json").stdout)["estimates"]
    low, high = found["throughput_band_hz"]
    assert low < found["throughput_hz"] < high
    assert f" {found['throughput_hz']:,.0f} {low:,.0f} to {high:,.0f} compute fitted " in page


def test_cost_measures_the_model_and_a_file_on_the_same_samples(
    short_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = []

    def measured(model: Any, inputs: Any) -> Measured:
        timed.append((model, inputs["image"]))
        latency = 4e-3 if len(timed) == 1 else 1e-3
        return Measured(latency, latency / 2, latency * 2, 8 / latency, 8, 100, "a processor", 2)

    monkeypatch.setattr("onnxqt.cli.edge.measure", measured)
    file = short_run.scheme_file("w8a8-sym-pc")
    arguments = ("--measure", "--file", file, "--data", short_run.digits.calib, "--batch", 8)
    result = invoke("cost", short_run.digits.file, *arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    jsonschema.validate(content, COST_SCHEMA)
    first, second = content["measured"]
    assert (first["name"], second["name"]) == ("model.onnx", "w8a8-sym-pc.onnx")
    assert (first["times_as_fast"], second["times_as_fast"]) == (1, 4)
    assert (first["sha256"], second["sha256"]) == (short_run.digits.model.sha256, file_sha256(file))
    assert content["measured_on"] == "samples"
    assert timed[1][0] == file
    with np.load(short_run.digits.calib / "000.npz") as arrays:
        expected = arrays["image"][:8]
    for _, image in timed:
        np.testing.assert_array_equal(image, expected)
    timed.clear()
    page = " ".join(invoke("cost", short_run.digits.file, *arguments).stdout.split())
    assert "measured on this machine: a processor, 2 logical processors" in page
    assert "model.onnx 4 2 to 8 2,000 100 1.00" in page
    assert "1 0.5 to 2 8,000 100 4.00" in page


def test_cost_measures_really_without_samples(tmp_path: Path) -> None:
    file = save(
        build(
            "(float[n,4] x, int64[n,4] i) => (float[] y) { c = Cast<to = 1>(i) a = Add(x, c) y = MatMul(a, w) }",
            {"w": normal(4, 3)},
        ),
        tmp_path,
    )
    result = invoke("cost", file, "--measure", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    content = json.loads(result.stdout)
    jsonschema.validate(content, COST_SCHEMA)
    (timing,) = content["measured"]
    assert (timing["batch"], timing["times_as_fast"], timing["evidence"]) == (1, 1, "measured")
    assert content["measured_on"] == "random numbers"


def test_cost_says_what_is_not_counted(tmp_path: Path) -> None:
    text = "(float[n,4] x, float[n,k,4] z) => (float[] y, float[] v) { y = Gemm(x, w) v = MatMul(z, w) }"
    file = save(build(text, {"w": normal(4, 6)}), tmp_path)
    result = invoke("cost", file, "--device", "RK3588")
    assert result.exit_code == 0
    assert re.search(r"^not counted: MatMul '.*is unknown$", result.stdout, re.MULTILINE)


def test_interrupt_is_one_line(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxqt.cli.survey.ingest", interrupt)
    result = invoke("inspect", torch_digits.file)
    assert result.exit_code == 1
    assert result.stderr == "Interrupted: files already written are complete.\n"


# --- contradictions -------------------------------------------------------------------------------------


def test_contradiction_ends_with_3_and_writes_no_file(
    torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(codes: Any, grid: Any) -> Any:
        return right(codes + 1, grid)

    right = numerics.saturated
    monkeypatch.setattr(numerics, "saturated", wrong)
    result = invoke("export", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: 'w8a8-sym-pc': the emulator and ONNX Runtime disagree on tensor ")
    assert files(tmp_path) == set()
