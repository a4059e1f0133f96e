"""What `export` takes beyond schemes: forms, exceptions, chosen bits, tables; samples of other kinds."""

import json
import math
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import Digits, files, invoke
from helpers import build, normal, save

from onnxqt.budget import Budget, choose_bits, error_of
from onnxqt.candidates import Candidate
from onnxqt.cli.writing import overrides_text
from onnxqt.errors import ExportError, UsageError
from onnxqt.files import write_bytes
from onnxqt.overrides import Override, Overrides, read_overrides
from onnxqt.pipeline import Settings, calibrated, open_workspace
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings

SCHEME = "w8a8-sym-pc"
ONE = ("--scheme", SCHEME)


def exported(digits: Digits, out: Path, *options: object) -> dict[str, dict[str, int]]:
    result = invoke("export", digits.file, "--data", digits.calib, "--out", out, "--json", *options)
    assert result.exit_code == 0, result.stderr
    content: dict[str, dict[str, int]] = json.loads(result.stdout)
    return content


def weight_types(file: Path, digits: Digits) -> dict[str, int]:
    """The element types of the codes of weights, by the weight's name."""
    names = {f"{site.tensor}.codes": site.tensor for site in digits.plan.weights}
    return {names[t.name]: t.data_type for t in onnx.load(file).graph.initializer if t.name in names}


# --- form, operator set, exceptions ---------------------------------------------------------------------


def test_forms_and_operator_sets(torch_digits: Digits, tmp_path: Path) -> None:
    exported(torch_digits, tmp_path, *ONE, "--form", "qoperator", "--opset", 19)
    model = onnx.load(tmp_path / "schemes" / f"{SCHEME}.onnx")
    assert "QLinearConv" in {node.op_type for node in model.graph.node}
    assert [entry.version for entry in model.opset_import if not entry.domain] == [19]


def test_overrides_change_bits_and_keep_nodes_float(torch_digits: Digits, tmp_path: Path) -> None:
    first, *_, last = (node for node in torch_digits.plan.integer_nodes if node.weight)
    assert first.weight is not None
    assert last.weight is not None
    text = f'[overrides."{first.name}"]\nweight_bits = 4\n[overrides."{last.name}"]\nfloat = true\n'
    (tmp_path / "o.toml").write_text(text)
    exported(torch_digits, tmp_path, *ONE, "--overrides", tmp_path / "o.toml")
    types = weight_types(tmp_path / "schemes" / f"{SCHEME}.onnx", torch_digits)
    assert types[first.weight.tensor] == onnx.TensorProto.INT4
    assert last.weight.tensor not in types
    entries = {e["name"]: e for e in json.loads((tmp_path / "table.json").read_text())["tensors"]}
    assert not entries[last.weight.tensor]["quantize"]


def test_trim_trains_and_exports_with_overrides(torch_digits: Digits, tmp_path: Path) -> None:
    *_, last = (node for node in torch_digits.plan.integer_nodes if node.weight)
    assert last.weight is not None
    (tmp_path / "o.json").write_text(json.dumps({"overrides": {last.name: {"float": True}, "*": {"weight_bits": 3}}}))
    options = ("--overrides", tmp_path / "o.json", "--out", tmp_path, "--steps", 3, *ONE, "--json")
    result = invoke("trim", torch_digits.file, "--data", torch_digits.calib, *options)
    assert result.exit_code == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["settings"]["overrides"] == {last.name: {"float": True}, "*": {"weight_bits": 3}}
    job = json.loads((tmp_path / "training" / "job.json").read_text())
    assert job["floats"] == [last.name]
    (regime,) = (regime for regime in job["regimes"] if regime["name"] == SCHEME)
    assert set(regime["grids"]["weight_bits"].values()) == {3}
    types = weight_types(tmp_path / "schemes" / f"{SCHEME}.onnx", torch_digits)
    assert set(types.values()) == {onnx.TensorProto.INT4}
    assert last.weight.tensor not in types


# --- without samples ------------------------------------------------------------------------------------


def test_float_and_run_time_activations_need_no_samples(torch_digits: Digits, tmp_path: Path) -> None:
    schemes = ("w4af-sym-b16", "w8a8-asym-pc-dyn")
    options = [argument for name in schemes for argument in ("--scheme", name)]
    result = invoke("export", torch_digits.file, "--out", tmp_path / "without", *options)
    assert result.exit_code == 0, result.stderr
    assert "the files were not checked by the emulator: give samples with --data" in result.stderr
    exported(torch_digits, tmp_path / "with", *options)
    for name in schemes:
        without, given = (tmp_path / folder / "schemes" / f"{name}.onnx" for folder in ("without", "with"))
        assert without.read_bytes() == given.read_bytes()


# --- chosen bits ----------------------------------------------------------------------------------------


def test_chosen_bits_can_be_given_back(torch_digits: Digits, tmp_path: Path) -> None:
    result = invoke(
        *("export", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path / "a"), *ONE, "--mean-bits", 6
    )
    assert result.exit_code == 0, result.stderr
    match = re.search(r"weights: (\d) of 8 bits, (\d) of 4 bits, ([\d.]+) on average", result.stderr)
    assert match is not None
    types = weight_types(tmp_path / "a" / "schemes" / f"{SCHEME}.onnx", torch_digits)
    initializers = torch_digits.model.graph.initializers
    sizes = {site.tensor: math.prod(initializers[site.tensor].dims) for site in torch_digits.plan.weights}
    bits = {name: 4 if kind == onnx.TensorProto.INT4 else 8 for name, kind in types.items()}
    mean = sum(bits[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean <= 6
    assert f"{mean:.2f}" == match[3]
    assert [sum(value == width for value in bits.values()) for width in (8, 4)] == [int(match[1]), int(match[2])]
    exported(torch_digits, tmp_path / "b", *ONE, "--overrides", tmp_path / "a" / "overrides.toml")
    for name in (f"schemes/{SCHEME}.onnx", "table.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_smaller_error_takes_more_bits(torch_digits: Digits, tmp_path: Path) -> None:
    errors, bits = [], []
    for limit in (0.002, 0.02):
        options = ("--max-error", limit, "--widths", "8,6,4,3")
        folder = tmp_path / str(limit)
        arguments = (torch_digits.file, "--data", torch_digits.calib, "--out", folder, *ONE)
        result = invoke("export", *arguments, *options)
        assert result.exit_code == 0, result.stderr
        match = re.search(r"([\d.]+) on average, relative squared error ([\d.e-]+);", result.stderr)
        assert match is not None
        bits.append(float(match[1]))
        errors.append(float(match[2]))
        assert errors[-1] <= limit
    assert bits[0] > bits[1]


def test_overrides_of_the_user_stay_and_do_not_count(torch_digits: Digits, tmp_path: Path) -> None:
    weight = torch_digits.plan.weights[0].tensor
    settings = Settings(
        schemes=(parse_scheme(SCHEME),),
        training=TrimSettings(steps=0),
        overrides=Overrides((Override(weight, 3),)),
    )
    work, ranges = calibrated(open_workspace(torch_digits.file, torch_digits.calib, None, tmp_path, settings))
    candidate = Candidate(work.source.model, ranges)
    chosen, mixed = choose_bits(work, candidate, Budget(mean_bits=4))
    assert weight not in mixed.bits
    assert set(mixed.bits.values()) == {4}
    assert chosen.grids(parse_scheme(SCHEME)).weight_bits == {weight: 3, **mixed.bits}


def test_the_error_is_relative_to_the_outputs(torch_digits: Digits, tmp_path: Path) -> None:
    settings = Settings(schemes=(parse_scheme("w8af-sym-pc"),), training=TrimSettings(steps=0))
    work, ranges = calibrated(open_workspace(torch_digits.file, torch_digits.calib, None, tmp_path, settings))
    (scheme,) = settings.schemes
    candidate = Candidate(work.source.model, ranges)
    found = error_of(work, candidate, scheme)({})
    samples = work.source.samples.take(64)
    inputs = next(iter(samples.batches(64))).inputs
    session = Session(work.written(work.source.model, work.quantizers(candidate, scheme)))
    (y,), (x,) = session.run(inputs).values(), Session(work.source.model.proto).run(inputs).values()
    assert found == pytest.approx(float(np.sum((y - x) ** 2.0) / np.sum(x**2.0)), rel=1e-4)  # float32 sums


# --- a table --------------------------------------------------------------------------------------------


def test_a_table_gives_the_same_files_and_edits_change_them(torch_digits: Digits, tmp_path: Path) -> None:
    options = (*ONE, "--scheme", "w4af-sym-b16")
    exported(torch_digits, tmp_path / "a", *options)
    content = exported(torch_digits, tmp_path / "b", "--table", tmp_path / "a" / "table.json")
    assert set(content) == {SCHEME, "w4af-sym-b16"}
    for name in (*(f"schemes/{name}.onnx" for name in content), "table.json", "table.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    edited = json.loads((tmp_path / "a" / "table.json").read_text())
    (image,) = (entry for entry in edited["tensors"] if entry["role"] == "input")
    (view,) = image["qparams"]
    for name in ("scale_f32_hex", "clip", "pow2_exponent"):
        view.pop(name)
    view["scale"] = [0.5]
    (tmp_path / "a" / "table.json").write_text(json.dumps(edited))
    exported(torch_digits, tmp_path / "c", "--table", tmp_path / "a" / "table.json", *ONE)
    model = onnx.load(tmp_path / "c" / "schemes" / f"{SCHEME}.onnx")
    scales = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    quantize = next(node for node in model.graph.node if node.input[0] == image["name"])
    assert scales[quantize.input[1]] == np.float32(0.5)
    assert not (tmp_path / "c" / "schemes" / "w4af-sym-b16.onnx").exists()


def test_what_a_table_keeps_float_stays_float(tmp_path: Path) -> None:
    """An infinite tensor, found on the samples that are not there any more, and a node that was to stay float."""
    text = "(float[n,4] x) => (float[] y) { a = MatMul(x, w) b = Relu(a) c = Log(b) d = Add(a, c) y = MatMul(a, v) }"
    text = text.replace("=> (float[] y)", "=> (float[] y, float[] d, float[] z)").replace("}", "z = MatMul(a, u) }")
    file = save(build(text, {"w": normal(4, 4), "v": normal(4, 2), "u": normal(4, 2, seed=1)}), tmp_path)
    np.savez(tmp_path / "samples.npz", x=normal(20, 4))
    (tmp_path / "o.toml").write_text('[overrides."u"]\nfloat = true\n')
    common = ("export", file, "--data", tmp_path / "samples.npz", *ONE)
    first = invoke(*common, "--out", tmp_path / "a", "--overrides", tmp_path / "o.toml")
    second = invoke(*common, "--out", tmp_path / "b", "--table", tmp_path / "a" / "table.json")
    assert (first.exit_code, second.exit_code) == (0, 0), second.stderr
    name = f"schemes/{SCHEME}.onnx"
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- samples of other kinds -----------------------------------------------------------------------------


def test_samples_that_a_function_makes(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_samples.py").write_text(
        "import numpy as np\n"
        "def some():\n"
        "    for seed in range(4):\n"
        "        yield {'image': np.random.default_rng(seed).random((20, 1, 8, 8)).astype(np.float32)}\n"
    )
    for command in (["export"], ["trim", "--steps", 2, "--batch-size", 8], ["calibrate"]):
        result = invoke(*command, torch_digits.file, "--data", "my_samples:some", "--out", command[0], *ONE)
        assert result.exit_code == 0, result.stderr
        assert {name for name in files(Path(str(command[0]))) if name.startswith("samples/")} == {
            "samples/calibration/samples-000000.npz"
        }
    again = invoke("export", torch_digits.file, "--data", "export/samples/calibration", "--out", "again", *ONE)
    assert again.exit_code == 0, again.stderr
    name = f"schemes/{SCHEME}.onnx"
    assert Path("again", name).read_bytes() == Path("export", name).read_bytes()
    for arguments in (
        ("emulate", Path("export", name), "--data", "my_samples:some"),
        ("cost", torch_digits.file, "--measure", "--data", "my_samples:some"),
        ("verify", torch_digits.file, "--data", "my_samples:some", "--profile", "ort_cpu", "--out", "verified"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 0, result.stderr


def test_arrays_in_memory_leave_no_samples_behind(torch_digits: Digits, tmp_path: Path) -> None:
    from onnxqt.pipeline import trim

    settings = Settings(schemes=(parse_scheme(SCHEME),), training=TrimSettings(steps=2, batch_size=8))
    report = trim(torch_digits.file, dict(torch_digits.inputs), out=tmp_path, settings=settings)
    assert report.content["training"]["steps"] == 2
    assert not [name for name in files(tmp_path) if "samples" in name]


def test_images_with_a_preprocessing(torch_digits: Digits, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "images"
    folder.mkdir()
    for seed in range(20):
        pixels = np.random.default_rng(seed).integers(0, 256, (10, 12), np.uint8)
        image.fromarray(pixels).save(folder / f"{seed:02}.png")
    (tmp_path / "p.toml").write_text("crop = 8\nscale = 0.00390625\n")
    options = ("--preprocess", tmp_path / "p.toml", "--out", tmp_path / "out", "--batch-size", 4)
    result = invoke("trim", torch_digits.file, "--data", folder, *options, "--steps", 2, *ONE, "--json")
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)["data"]
    assert facts["calibration"]["samples"] == 20
    assert facts["calibration"]["preprocessing"]["crop"] == [8, 8]
    assert facts["evaluation"]["preprocessing"]["scale"] == 0.00390625
    entries = json.loads((tmp_path / "out" / "table.json").read_text())["tensors"]
    (entry,) = (entry for entry in entries if entry["role"] == "input")
    assert 0.9 < entry["stats"]["max"] <= 255 / 256
    file = tmp_path / "out" / "schemes" / f"{SCHEME}.onnx"
    result = invoke("emulate", file, "--data", folder, "--preprocess", tmp_path / "p.toml", "--json")
    assert result.exit_code == 0, result.stderr


# --- one line for what is wrong -------------------------------------------------------------------------

FAILURES: dict[str, tuple[list[object], int, str]] = {
    "no data": (list(ONE), 2, "scheme w8a8-sym-pc needs samples to find its ranges on: give --data"),
    "no data for ptq": (["--scheme", "w4af-sym-pc", "--ptq", "round"], 2, "--ptq needs samples: give --data"),
    "widths alone": (["--widths", "8,4"], 2, "--widths is for bits that are chosen: add --mean-bits or --max-error"),
    "widths of words": (["--mean-bits", 5, "--widths", "a"], 2, "--widths a: give numbers of bits with commas"),
    "one width": (["DATA", *ONE, "--mean-bits", 5, "--widths", "8"], 2, r"bits \[8\] leave no choice"),
    "both": (["--mean-bits", 5, "--max-error", 1], 2, "give either --mean-bits or --max-error"),
    "few bits": (["--mean-bits", 1], 2, "--mean-bits is 1: give a number from 2 to 8"),
    "no error": (["--max-error", 0], 2, "--max-error is 0: give a number above 0, such as 0.01"),
    "too few bits": (["DATA", *ONE, "--mean-bits", 3], 2, "a mean of 3 bits cannot be had, the least is 4"),
    "several schemes": (["DATA", "--mean-bits", 5], 2, "chosen for one scheme: name it with --scheme"),
    "bits without data": (["--scheme", "w4af-sym-pc", "--mean-bits", 5], 2, "chosen on samples: give --data"),
    "no overrides": (["DATA", "--overrides", "no.toml"], 2, "cannot read 'no.toml' .*: give a file of overrides"),
    "no match": (["DATA", "--overrides", "o.toml"], 2, "override 'nobody' matches no node and no tensor of the model"),
    "no preset": (["DATA", "--preprocess", "mnist"], 2, "unknown preprocessing 'mnist': give a TOML file or one of"),
    "no images": (["DATA", "--preprocess", "cifar"], 2, "--preprocess cifar is for images, but .* has .npz files"),
    "no function": (["--data", "no_module:none"], 2, "cannot import 'no_module' of 'no_module:none'"),
    "old opset": (["DATA", *ONE, "--opset", 12], 1, "opset 12 is not one of quantized files: choose one from 13 to 21"),
    "no table": (["--table", "no.json"], 1, "cannot read 'no.json' .*: give a calibration table"),
    "table and bits": (["--table", "t.json", "--mean-bits", 5], 2, "--table has the scales of every weight: leave out"),
    "other table": (["--table", "t.json"], 1, "the table of 'm.onnx' has 'x', which the model lacks"),
    "scheme of the table": (["--table", "t.json", "--scheme", "w2a8-sym-pc"], 1, "'x', which the model lacks"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_one_line(name: str, torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("o.toml").write_text('[overrides."nobody"]\nweight_bits = 4\n')
    table = {
        **{"format": "onnxqt.quant_table", "version": "1.0", "schemes": ["w8a8-sym-pc"]},
        **{"model": {"file": "m.onnx"}, "tensors": [{"name": "x", "role": "input", "qparams": []}]},
    }
    Path("t.json").write_text(json.dumps(table))
    options, code, message = FAILURES[name]
    given = [part for option in options for part in (["--data", torch_digits.calib] if option == "DATA" else [option])]
    result = invoke("export", torch_digits.file, *given, "--out", "out")
    assert result.exit_code == code, result.output
    (line,) = result.stderr.splitlines()
    assert re.search(message, line), line
    assert not [path for path in files(Path("out")) if path.endswith(".onnx")]


def test_a_form_that_is_not_known() -> None:
    with pytest.raises(UsageError, match=r"^unknown form 'other': name one of qdq, qoperator$"):
        Settings(form="other")  # type: ignore[arg-type]


# --- files ----------------------------------------------------------------------------------------------


def test_overrides_are_written_as_they_are_read(tmp_path: Path) -> None:
    rules = (
        Override('a"b\\c\n*', weight_bits=4, granularity="b32"),
        Override("é", keeps_float=True),
        Override("x", activation_bits=16),
        Override("x", weight_bits=2),
    )
    (tmp_path / "o.toml").write_text(overrides_text(Overrides(rules)), "utf-8")
    assert read_overrides(tmp_path / "o.toml").rules == (*rules[:2], Override("x", weight_bits=2, activation_bits=16))
    (tmp_path / "none.toml").write_text(overrides_text(Overrides()))
    assert read_overrides(tmp_path / "none.toml") == Overrides()


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"cannot write '.*o\.toml' \(No such file or directory\): free the disk"):
        write_bytes(tmp_path / "no" / "o.toml", b"")
