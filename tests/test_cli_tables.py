"""The commands about tables: vendors' files from a run, and other tools' files taken over."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Digits, Run, files, invoke

from onnxqt.cli.output import few
from onnxqt.numerics import dequantize, quantize
from onnxqt.table import read_table
from onnxqt.vendors import VENDORS, Request, write_vendor

SCHEME = "w8a8-sym-pc"


@pytest.fixture(scope="module")
def made(torch_digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a calibration, for two schemes."""
    folder = tmp_path_factory.mktemp("made")
    arguments = ("--data", torch_digits.calib, "--scheme", SCHEME, "--scheme", "w4a8-asym-pt")
    assert invoke("calibrate", torch_digits.file, *arguments, "--out", folder).exit_code == 0
    return folder


def test_formats_are_listed() -> None:
    text = invoke("tables", "--list").stdout
    content = {row["name"]: row for row in json.loads(invoke("tables", "--list", "--json").stdout)}
    assert content.keys() == VENDORS.keys()
    for name, vendor in VENDORS.items():
        assert f"{name}: {vendor.title}" in text
        assert content[name]["options"].keys() == vendor.options.keys()
        assert content[name]["takes_template"] == vendor.patches


def test_each_format_has_its_folder_with_the_model_that_goes_with_it(short_run: Run, tmp_path: Path) -> None:
    result = invoke("tables", short_run.folder, "--to", "tensorrt, ort-cache", "--scheme", SCHEME, "--out", tmp_path)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    table = read_table(short_run.folder / "table.json")
    for name in ("tensorrt", "ort-cache"):
        written = write_vendor(name, Request(table, SCHEME, "checkpoint"))
        assert files(tmp_path / name) == {*written.files, "checkpoint.baked.onnx"}
        assert all((tmp_path / name / file).read_bytes() == content for file, content in written.files.items())
        assert VENDORS[name].usage in result.stdout
        assert all(sentence in result.stdout for sentence in written.lost)
    assert files(tmp_path) == {
        f"{name}/{file}" for name in ("tensorrt", "ort-cache") for file in files(tmp_path / name)
    }
    before, after = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}
        for path in (short_run.folder / "checkpoint.onnx", tmp_path / "tensorrt" / "checkpoint.baked.onnx")
    )
    for entry, params in table.quantized(SCHEME, "weight"):
        expected = dequantize(quantize(before[entry.name], params), params)
        np.testing.assert_array_equal(after[entry.name], expected)
        assert (after[entry.name] != before[entry.name]).any()


def test_tables_for_machines_and_for_a_model_elsewhere(made: Path, torch_digits: Digits) -> None:
    arguments = ("--table", made / "table.json", "--scheme", "w4a8-asym-pt", "--json")
    options = ("--option", "version=8601", "--option", "float=fp32")
    result = invoke("tables", torch_digits.file, "--to", "tensorrt,ncnn", *arguments, *options)
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    content = json.loads(result.stdout)
    assert content["scheme"] == "w4a8-asym-pt"
    assert content["formats"].keys() == {"tensorrt", "ncnn"}
    for name, found in content["formats"].items():
        folder = made / "tables" / "w4a8-asym-pt" / name
        assert found["folder"] == str(folder)
        assert files(folder) == {*found["files"], found["model"]}
    cache = made / "tables" / "w4a8-asym-pt" / "tensorrt" / "model.cache"
    assert cache.read_text().startswith("TRT-8601-EntropyCalibration2\n")
    assert content["formats"]["ncnn"]["skipped"]


def test_what_is_left_out_is_said_once_per_reason(made: Path, torch_digits: Digits, tmp_path: Path) -> None:
    arguments = ("tables", torch_digits.file, "--to", "ncnn", "--table", made / "table.json", "--out", tmp_path)
    text = invoke(*arguments, "--scheme", SCHEME).stdout
    skipped = json.loads(invoke(*arguments, "--scheme", SCHEME, "--json").stdout)["formats"]["ncnn"]["skipped"]
    for reason in set(skipped.values()):
        names = [name for name, why in skipped.items() if why == reason]
        assert f"  left out  {few(names)}: {reason}\n" in text


def test_a_template_is_patched(made: Path, torch_digits: Digits, tmp_path: Path) -> None:
    table = read_table(made / "table.json")
    written = write_vendor("mnn", Request(table, SCHEME, "model"))
    (name,) = (name for name in written.files if name.endswith(".json"))
    template = tmp_path / "template.json"
    template.write_bytes(written.files[name])
    arguments = ("--table", made / "table.json", "--scheme", SCHEME, "--template", template, "--out", tmp_path / "out")
    result = invoke("tables", torch_digits.file, "--to", "mnn", *arguments)
    assert result.exit_code == 0, result.stderr
    expected = write_vendor("mnn", Request(table, SCHEME, "model", template.read_bytes()))
    assert (tmp_path / "out" / "mnn" / name).read_bytes() == expected.files[name]


@pytest.mark.parametrize("name", ["qualcomm", "ort-cache", "tensorrt", "quark"])
def test_files_of_vendors_come_back(name: str, made: Path, torch_digits: Digits, tmp_path: Path) -> None:
    """What was changed in the table since is as it was in the vendor's file."""
    model, table = torch_digits.file, made / "table.json"
    arguments = ("--table", table, "--scheme", SCHEME)
    assert invoke("tables", model, "--to", name, *arguments, "--out", tmp_path).exit_code == 0
    (file,) = (path for path in (tmp_path / name).iterdir() if path.suffix in (".encodings", ".cache") or
               path.name.endswith((".ort-cache.json", ".quark.json")))  # fmt: skip
    content = json.loads(table.read_text())
    for entry in content["tensors"]:
        for view in entry["qparams"]:
            if entry["role"] == "activation" and SCHEME in view["schemes"]:
                view["scale"] = [2 * scale for scale in view["scale"]]
                for derived in ("scale_f32_hex", "clip", "pow2_exponent"):
                    view.pop(derived)
    for edited in (tmp_path / "edited.json", tmp_path / "edited.safetensors"):
        edited.write_bytes((made / f"table{edited.suffix}").read_bytes())
    (tmp_path / "edited.json").write_text(json.dumps(content))
    options = ("--model", model, "--table", tmp_path / "edited.json", "--scheme", SCHEME, "--out", tmp_path / "back")
    result = invoke("import-table", file, *options, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.stderr
    told = json.loads(result.stdout)
    before, after = read_table(table), read_table(tmp_path / "back" / "table.json")
    activations = [entry.name for entry, _ in before.quantized(SCHEME, "activation")]
    assert set(told["changed"]) >= set(activations)
    for tensor in activations:
        ours, theirs = (found.entry(tensor) for found in (before, after))
        assert ours is not None
        assert theirs is not None
        one, other = ours.params(SCHEME), theirs.params(SCHEME)
        assert one is not None
        assert other is not None
        # ranges are ends in float32, each rounded once: their quotient is one unit in the last place off at most
        np.testing.assert_array_max_ulp(other.scale, one.scale, maxulp=1)
        assert (other.grid, other.zero_point) == (one.grid, one.zero_point)


def test_ranges_of_anybody_are_laid_over_a_calibration(torch_digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "ranges.json").write_text(json.dumps({"image": [0.0, 2.0], "stranger": [0, 1]}))
    options = ("--model", torch_digits.file, "--data", torch_digits.calib, "--scheme", SCHEME, "--out", tmp_path)
    result = invoke("import-table", tmp_path / "ranges.json", *options)
    assert result.exit_code == 0, result.stderr
    assert "not used: stranger, which the model lacks" in result.stderr
    assert f"1 tensors changed; wrote {tmp_path / 'table.json'}" in result.stdout
    entry = read_table(tmp_path / "table.json").entry("image")
    assert entry is not None
    params = entry.params(SCHEME)
    assert params is not None
    assert float(params.scale) == np.float32(2 / 127)
    assert entry.source == "imported"
    out = tmp_path / "out"
    result = invoke("export", torch_digits.file, "--table", tmp_path / "table.json", "--out", out)
    assert result.exit_code == 0, result.stderr
    assert (out / "schemes" / f"{SCHEME}.onnx").exists()


# --- one line for what is wrong -------------------------------------------------------------------------

TABLES: dict[str, tuple[list[Any], int, str]] = {
    "nothing": ([], 2, "give a MODEL or run directory, and formats with --to; --list shows the formats"),
    "no format": (["MODEL"], 2, "give a MODEL or run directory, and formats with --to"),
    "unknown format": (["RUN", "--to", "caffe"], 2, "--to caffe: there is no such format: name some of ort-cache"),
    "empty format": (["RUN", "--to", ","], 2, "--to names no format: name some of"),
    "no table": (["MODEL", "--to", "quark"], 2, "there is no table 'model-onnxqt/table.json': make one with"),
    "model elsewhere": (["RUN", "--to", "quark"], 2, "has no 'model.onnx', which its table belongs to: give that file"),
    "several schemes": (["MODEL", "TABLE", "--to", "quark"], 2, "the table has several schemes: name one of w8a8-sym"),
    "no such scheme": (
        ["MODEL", "TABLE", "--to", "quark", "--scheme", "w2a8-sym-pc"],
        2,
        "the table has no scheme w2a8-sym-pc: give one of",
    ),
    "unknown option": (
        ["RUN", "--to", "quark", "--option", "x=1"],
        2,
        r"--option x: no format here has it \(quark has",
    ),
    "option without value": (["RUN", "--to", "quark", "--option", "version"], 2, "--option version: write KEY=VALUE"),
    "template for two": (["RUN", "--to", "mnn,tidl", "--template", "t"], 2, "but --to names 2 formats: name one"),
    "no template": (["RUN", "--to", "tidl", "--template", "no.txt"], 2, "cannot read the template 'no.txt' .*: give"),
    "template needed": (
        ["MODEL", "TABLE", "--to", "tidl", "SCHEME"],
        2,
        "tidl: this format patches a file that TIDL writes: give it",
    ),
    "template refused": (["MODEL", "TABLE", "--to", "quark", "SCHEME", "--template", "t"], 2, "takes no template"),
    "bad template": (["MODEL", "TABLE", "--to", "tidl", "SCHEME", "--template", "t"], 1, "tidl: .*the template"),
    "cannot hold": (["MODEL", "TABLE", "--to", "ncnn-llm", "SCHEME"], 1, "ncnn-llm: "),
    "other model": (
        ["OTHER", "TABLE", "--to", "quark", "SCHEME"],
        1,
        "the table of 'model.onnx' has 'image' with the shape",
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_fails_with_one_line(
    name: str, made: Path, load_digits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t").write_text("nothing")
    options, code, message = TABLES[name]
    stands_for: dict[str, list[Any]] = {
        "MODEL": [load_digits("torch").file],
        "OTHER": [load_digits("keras").file],
        "RUN": [made],
        "TABLE": ["--table", made / "table.json"],
        "SCHEME": ["--scheme", SCHEME],
    }
    arguments = [part for option in options for part in stands_for.get(option, [option])]
    fails(invoke("tables", *arguments, "--out", "out"), code, message)
    assert not files(Path("out"))


IMPORTS: dict[str, tuple[list[Any], int, str]] = {
    "both": (["--table", "t", "--data", "d"], 2, "give either --data, to calibrate on, or --table, to put the values"),
    "neither": ([], 2, "scheme w8a8-sym-pc needs samples to find its ranges on: give --data"),
    "no scheme": (["TABLE", "--scheme", "w2a8-sym-pc"], 1, "the table has no scheme w2a8-sym-pc: name one of"),
    "no file": (["TABLE"], 1, "cannot read 'ranges.json' .*: give a calibration table"),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_import_fails_with_one_line(
    name: str, made: Path, torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, code, message = IMPORTS[name]
    given = [
        part for option in options for part in (["--table", made / "table.json"] if option == "TABLE" else [option])
    ]
    arguments = ["--model", torch_digits.file, "--out", "out", "--scheme", SCHEME, *given]
    fails(invoke("import-table", "ranges.json", *arguments), code, message)
    assert not files(Path("out"))


def fails(result: Any, code: int, message: str) -> None:
    __tracebackhide__ = True
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert re.search(message, line), line
