"""The command line: what it prints where, and what it writes."""

import json
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import pytest
from conftest import RUN_SCHEMES, Digits, Run, files, invoke

from onnxqt import __version__, numerics
from onnxqt.cli import main
from onnxqt.runtime import Session

COMMANDS = ("trim", "inspect", "calibrate", "export", "emulate")


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
    assert "Example:" in result.stdout
    assert f"onnxqt {command} " in result.stdout.split("Example:")[1]
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


def test_trim_writes_its_files_and_nothing_temporary(short_run: Run) -> None:
    outside_training = {name for name in files(short_run.folder) if not name.startswith("training")}
    schemes = {f"schemes/{name}.onnx" for name in RUN_SCHEMES}
    assert outside_training == {"checkpoint.onnx", "table.json", "report.json"} | schemes
    kept = {path.name for path in (short_run.folder / "training").iterdir()}
    assert kept - {"best.onnx"} == {"job.json", "last.onnx", "worker.log"}
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
    assert files(tmp_path) == {"table.json"}
    assert table["num_samples"] == 512
    entries = {entry["name"]: entry for entry in table["tensors"]}
    assert {site.tensor for site in digits.plan.activations} <= entries.keys()
    assert {site.tensor for site in digits.plan.weights} <= entries.keys()
    (image,) = digits.model.graph.inputs
    assert (entries[image]["min"], entries[image]["max"]) == (0.0, 1.0)  # fixtures/README.md
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
    assert files(tmp_path) == {"table.json", *(f"schemes/{name}.onnx" for name in content)}
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


def test_interrupt_is_one_line(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxqt.cli.ingest", interrupt)
    result = invoke("inspect", torch_digits.file)
    assert result.exit_code == 1
    assert result.stderr == "Interrupted: files already written are complete.\n"


# --- contradictions -------------------------------------------------------------------------------------


def test_contradiction_ends_with_3_and_writes_no_file(
    torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = numerics.requantize

    def wrong(acc: Any, multiplier: Any, params: Any) -> Any:
        return np.clip(right(acc, multiplier, params) + 1, params.grid.qmin, params.grid.qmax)

    monkeypatch.setattr(numerics, "requantize", wrong)
    result = invoke("export", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path)
    assert result.exit_code == 3
    assert result.stderr.startswith("Error: 'w8a8-sym-pc': the emulator and ONNX Runtime disagree on tensor ")
    assert files(tmp_path) == set()
