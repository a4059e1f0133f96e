"""How the command line fails: one line, the right exit code, no files."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import Result
from conftest import Digits, Run, files, invoke
from helpers import build, normal, save

from onnxqt.schemes import parse_scheme


@dataclass(frozen=True)
class Place:
    """Where a failing command is prepared: a fixture, and an empty folder for broken files."""

    digits: Digits
    folder: Path

    @property
    def image(self) -> np.ndarray[Any, np.dtype[Any]]:
        """Four samples."""
        return self.digits.inputs["image"][:4]

    def data(self, **arrays: Any) -> Path:
        """A folder with one file of these arrays."""
        folder = self.folder / "data"
        folder.mkdir()
        np.savez(folder / "0.npz", **arrays)
        return folder

    def file(self, content: bytes) -> Path:
        path = self.folder / "broken.onnx"
        path.write_bytes(content)
        return path


Arguments = list[object]
Prepare = Callable[[Place], Arguments]


def with_model(prepare: Callable[[Place], Path]) -> Prepare:
    return lambda place: [prepare(place), "--data", place.digits.calib]


def with_data(prepare: Callable[[Place], Path]) -> Prepare:
    return lambda place: [place.digits.file, "--data", prepare(place)]


def with_options(*options: object) -> Prepare:
    return lambda place: [place.digits.file, "--data", place.digits.calib, *options]


def json_model(place: Place) -> Path:
    path = place.folder / "broken.json"
    path.write_text("{}")
    return path


def truncated(place: Place) -> Path:
    return place.file(place.digits.file.read_bytes()[:20_000])


def without_external_data(place: Place) -> Path:
    model = onnx.load(place.digits.file)
    path = place.folder / "external.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    (place.folder / "weights.bin").unlink()
    return path


def quantized(place: Place) -> Path:
    return place.file(place.digits.quantized(parse_scheme("w8a8-sym-pc")).SerializeToString())


def damaged(place: Place) -> Path:
    folder = place.data(image=place.image)
    path = folder / "0.npz"
    path.write_bytes(path.read_bytes()[:-100])
    return folder


def labelled(labels: list[int]) -> Prepare:
    return with_data(lambda place: place.data(image=place.image, labels=np.array(labels)))


FAILURES: dict[str, tuple[Prepare, str]] = {
    "no-model": (with_model(lambda place: place.folder / "nothing.onnx"), r"nothing\.onnx' is not a file: give"),
    "model-is-a-folder": (with_model(lambda place: place.folder), r"' is not a file: give"),
    "model-is-empty": (with_model(lambda place: place.file(b"")), r"broken\.onnx' is not an ONNX model"),
    "model-is-text": (
        with_model(lambda place: place.file(b"import torch\n")),
        r"broken\.onnx' is not .*export it again",
    ),
    "model-is-truncated": (with_model(truncated), r"broken\.onnx' is not .*truncated: export it again"),
    "model-is-json": (with_model(json_model), r"broken\.json' is not an ONNX model"),
    "model-is-quantized": (with_model(quantized), r"broken\.onnx.*quantized"),
    "no-external-data": (with_model(without_external_data), r"external\.onnx.*weights\.bin"),
    "no-data": (with_data(lambda place: place.folder / "nothing"), "nothing does not exist; pass a directory"),
    "empty-data": (with_data(lambda place: place.folder), r"has no \.npz or \.npy file .* save some"),
    "data-is-a-model": (with_data(lambda place: place.digits.file), r"model\.onnx is neither .* pass"),
    "wrong-name": (with_data(lambda place: place.data(picture=place.image[:, 0])), r"0\.npz.*'picture'.*'image'"),
    "wrong-shape": (with_data(lambda place: place.data(image=place.image[:, 0])), r"0\.npz.*'image'.*shape"),
    "wrong-size": (with_data(lambda place: place.data(image=place.image[..., :7])), r"0\.npz.*'image'.*7"),
    "wrong-dtype": (with_data(lambda place: place.data(image=place.image.astype(np.int32))), r"0\.npz.*'image'.*int32"),
    "nan": (with_data(lambda place: place.data(image=np.full((80, 1, 8, 8), np.nan, np.float32))), r"0\.npz.*NaN"),
    "damaged-data": (with_data(damaged), r"0\.npz"),
    "few-samples": (with_data(lambda place: place.data(image=place.image)), r"data.* samples .*needs 64.*--batch-size"),
    "label-too-large": (labelled([0, 1, 2, 10]), r"0\.npz.*label of sample 3 .*is 10.*10 classes"),
    "label-negative": (labelled([0, -1, 2, 3]), r"0\.npz.*label of sample 1 .*is -1"),
    "labels-missing": (with_options("--loss", "cross-entropy"), "labels"),
    "label-of-the-evaluation": (
        lambda place: [
            *(place.digits.file, "--data", place.digits.calib),
            *("--eval", place.data(image=place.image, labels=np.array([0, 1, 2, 10]))),
        ],
        r"0\.npz.*label of sample 3 .*is 10",
    ),
    "bad-evaluation": (
        lambda place: [place.digits.file, "--data", place.digits.calib, "--eval", place.folder / "nothing"],
        "nothing does not exist",
    ),
}


def check_failure(result: Result, exit_code: int, message: str, out: Path) -> None:
    __tracebackhide__ = True
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == exit_code, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ")
    assert "Traceback" not in line
    pytest.raises(ValueError, raise_error, line).match(message)
    assert not files(out)


def raise_error(message: str) -> None:
    raise ValueError(message)


@pytest.mark.parametrize("name", FAILURES)
def test_failure_is_one_line_that_says_what_to_do(name: str, torch_digits: Digits, tmp_path: Path) -> None:
    place = Place(torch_digits, tmp_path / "in")
    place.folder.mkdir()
    prepare, message = FAILURES[name]
    out = tmp_path / "out"
    result = invoke("trim", *prepare(place), "--out", out, "--steps", 1, "--scheme", "w8a8-sym-pc")
    check_failure(result, 1, message, out)


def test_process_ends_with_the_exit_code(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from onnxqt.cli import main; main()", "inspect", str(tmp_path / "no.onnx")]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == f"Error: '{tmp_path / 'no.onnx'}' is not a file: give the path of an ONNX model\n"


@pytest.mark.parametrize("command", ["trim", "calibrate", "export"])
def test_output_below_a_file_cannot_be_written(command: str, torch_digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    out = tmp_path / "file" / "run"
    result = invoke(command, torch_digits.file, "--data", torch_digits.calib, "--out", out)
    check_failure(result, 1, r"cannot write into .*file.run' \(.*\): choose another --out", out)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_model_that_nothing_trains_is_quantized_and_says_so(torch_digits: Digits, tmp_path: Path) -> None:
    text = "(float[n,1,8,8] image) => (float[] y) { a = Conv(image, w) y = Round(a) }"
    file = save(build(text, {"w": normal(4, 1, 3, 3)}), tmp_path)
    out = tmp_path / "out"
    result = invoke("trim", file, "--data", torch_digits.calib, "--out", out, "--steps", 1, "--scheme", "w8a8-sym-pc")
    assert result.exit_code == 0, result.stderr
    assert re.search(r"nothing was trained: .*Round '", result.stderr)
    assert (out / "schemes" / "w8a8-sym-pc.onnx").exists()


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
    "unknown-scheme": (["--scheme", "w9a8-sym-pc"], "unknown scheme 'w9a8-sym-pc': expected w.*such as w4a8-sym-pc"),
    "negative-steps": (["--steps", -1], "--steps is -1: give a number of at least 0"),
    "no-batch": (["--batch-size", 0], "--batch-size is 0: give a number of at least 1"),
    "negative-seed": (["--seed", -1], "--seed is -1: give a number of at least 0"),
    "no-learning-rate": (["--lr", 0], "--lr is 0: give a number between 0 and 1"),
    "negative-learning-rate": (["--lr", -0.1], "--lr is -0.1: give"),
    "learning-rate-of-1": (["--lr", 1], "--lr is 1: give"),
    "learning-rate-nan": (["--lr", "nan"], "--lr is nan: give"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option_ends_with_2(name: str, torch_digits: Digits, tmp_path: Path) -> None:
    options, message = BAD_OPTIONS[name]
    out = tmp_path / "out"
    result = invoke("trim", torch_digits.file, "--data", torch_digits.calib, "--out", out, *options)
    check_failure(result, 2, message, out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trim", "model.onnx"], "Missing option '--data'"),
        (["trim", "model.onnx", "--data", "calib", "--speed", "3"], "No such option '--speed'"),
        (["trim", "model.onnx", "--data", "calib", "--steps", "many"], "'many' is not a valid integer"),
        (["export", "model.onnx", "--data", "calib", "--ranges", "best"], "'best' is not one of 'minmax'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["verify", "--data", "calib"], "Missing argument 'MODEL..."),
        (["verify", "model.onnx"], "Missing option '--data'"),
        (["quantize"], "No such command 'quantize'"),
    ],
    ids=[
        *("no-data", "unknown-option", "not-a-number", "unknown-choice", "no-model"),
        *("no-model-to-verify", "no-data-to-verify", "unknown-command"),
    ],
)
def test_usage_error_ends_with_2(arguments: list[object], message: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    *usage, error = result.stderr.splitlines()
    assert error.startswith("Error: ")
    assert message in error
    assert "Traceback" not in result.stderr
    assert usage[0].startswith("Usage: ")


EMULATE_FAILURES: dict[str, tuple[Callable[[Run, Path], Arguments], str]] = {
    "no-file": (lambda run, folder: [folder / "no.onnx", "--data", run.evaluation], r"no\.onnx"),
    "not-a-model": (lambda run, folder: [run.folder / "table.json", "--data", run.evaluation], r"table\.json.*ONNX"),
    "no-data": (lambda run, folder: [run.scheme_file("w8a8-sym-pc"), "--data", folder], r"has no \.npz"),
    "no-reference": (
        lambda run, folder: [
            *(run.scheme_file("w8a8-sym-pc"), "--data", run.evaluation, "--reference", folder / "no.onnx")
        ],
        r"no\.onnx",
    ),
    "other-reference": (
        lambda run, folder: [
            *(run.scheme_file("w8a8-sym-pc"), "--data", run.evaluation, "--reference", renamed_output(run, folder))
        ],
        r"other\.onnx.*logits",
    ),
}


def renamed_output(run: Run, folder: Path) -> Path:
    model = onnx.load(run.digits.file)
    model.graph.node[-1].output[0] = model.graph.output[0].name = "scores"
    path = folder / "other.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("name", EMULATE_FAILURES)
def test_emulate_fails_with_one_line(name: str, short_run: Run, tmp_path: Path) -> None:
    prepare, message = EMULATE_FAILURES[name]
    check_failure(invoke("emulate", *prepare(short_run, tmp_path)), 1, message, tmp_path / "out")


EMULATE_USAGE: dict[str, tuple[Arguments, str]] = {
    "nothing-to-do": ([], "nothing to do: give samples with --data, or print the program with --dump"),
    "unknown-profile": (["--dump", "--profile", "tpu"], "unknown profile 'tpu': give a TOML file or one of tflite_ref"),
    "no-profile-file": (["--dump", "--profile", "no.toml"], r"cannot read the profile 'no\.toml' \(No such file"),
}


@pytest.mark.parametrize("name", EMULATE_USAGE)
def test_emulate_used_wrongly_ends_with_2(name: str, short_run: Run, tmp_path: Path) -> None:
    options, message = EMULATE_USAGE[name]
    check_failure(invoke("emulate", short_run.scheme_file("w8a8-sym-pc"), *options), 2, message, tmp_path / "out")


def test_emulate_checks_the_labels(short_run: Run, tmp_path: Path) -> None:
    image = short_run.digits.inputs["image"][:4]
    np.savez(tmp_path / "0.npz", image=image, labels=np.array([0, 1, 10, 3]))
    result = invoke("emulate", short_run.scheme_file("w8a8-sym-pc"), "--data", tmp_path)
    check_failure(result, 1, r"0\.npz.*label of sample 2 .*is 10.*10 classes", tmp_path / "out")


def profile_file(place: Place, text: str, name: str = "npu.toml") -> Path:
    path = place.folder / name
    path.write_text(text)
    return path


def other_network(place: Place) -> Path:
    text = "(float[n,1,8,8] image) => (float[] y) { y = Conv(image, w) }"
    return save(build(text, {"w": normal(4, 1, 3, 3)}), place.folder, "other.onnx")


VERIFY_FAILURES: dict[str, tuple[Callable[[Place], Arguments], int, str]] = {
    "no-model": (lambda place: [place.folder / "no.onnx"], 1, r"no\.onnx' is not a file: give"),
    "no-second-model": (lambda place: [place.digits.file, place.folder / "no.onnx"], 1, r"no\.onnx' is not a file"),
    "folder-without-checkpoint": (lambda place: [place.digits.file, place.folder], 1, "is not a file: give"),
    "quantized-model": (lambda place: [quantized(place)], 1, r"broken\.onnx.*quantized"),
    "same-model-twice": (lambda place: [place.digits.file, place.digits.file], 2, "a MODEL is given twice: give the"),
    "other-network": (
        lambda place: [place.digits.file, other_network(place)],
        1,
        r"'other\.onnx' has no output 'logits', which 'model\.onnx' has: give models of the same network",
    ),
    "no-data": (lambda place: [place.digits.file, "--data", place.folder / "no"], 1, "no does not exist; pass"),
    "unknown-profile": (
        lambda place: [place.digits.file, "--profile", "tpu"],
        2,
        "unknown profile 'tpu': give a TOML file or one of tflite_ref, tflite_ruy, ",
    ),
    "profile-file-broken": (
        lambda place: [place.digits.file, "--profile", profile_file(place, "[arithmetic]\nadd = 3")],
        2,
        r"npu\.toml': arithmetic\.add is 3: expected one of 'ort'",
    ),
    "profiles-of-one-name": (
        lambda place: [
            *(place.digits.file, "--profile", "ncnn_sym"),
            *("--profile", profile_file(place, 'base = "ort_cpu"', "ncnn_sym.toml")),
        ],
        2,
        "another one is called 'ncnn_sym' too: change 'name' in the file",
    ),
    "unknown-precision": (
        lambda place: [place.digits.file, "--precision", "int8"],
        2,
        "unknown precision 'int8': expected w",
    ),
    "precision-that-no-profile-has": (
        lambda place: [place.digits.file, "--precision", "w2a4", "--profile", "htp"],
        2,
        "no profile has the precision w2a4: see 'onnxqt profiles'",
    ),
    "unknown-scheme": (lambda place: [place.digits.file, "--scheme", "w8a8"], 2, "unknown scheme 'w8a8': expected w"),
}


@pytest.mark.parametrize("name", VERIFY_FAILURES)
def test_verify_fails_with_one_line(name: str, torch_digits: Digits, tmp_path: Path) -> None:
    place = Place(torch_digits, tmp_path / "in")
    place.folder.mkdir()
    prepare, exit_code, message = VERIFY_FAILURES[name]
    arguments = prepare(place)
    data = [] if "--data" in arguments else ["--data", torch_digits.calib]
    out = tmp_path / "out"
    check_failure(invoke("verify", *arguments, *data, "--out", out), exit_code, message, out)
    assert not out.exists()


def test_verify_below_a_file_cannot_write(torch_digits: Digits, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    result = invoke("verify", torch_digits.file, "--data", torch_digits.calib, "--out", tmp_path / "file" / "run")
    check_failure(result, 1, r"cannot write into .*file.run' \(.*\): choose another --out", tmp_path / "run")


def test_unknown_profile_to_show(tmp_path: Path) -> None:
    check_failure(invoke("profiles", "tpu"), 2, "unknown profile 'tpu': give a TOML file or one of", tmp_path / "out")


COST_FAILURES: dict[str, tuple[Callable[[Place], Arguments], int, str]] = {
    "no-model": (lambda place: [place.folder / "no.onnx"], 1, r"no\.onnx' is not a file: give"),
    "quantized-model": (lambda place: [quantized(place)], 1, r"broken\.onnx.*quantized"),
    "unknown-device": (
        lambda place: [place.digits.file, "--device", "Hailo-9"],
        2,
        "unknown device 'Hailo-9': give one of Hailo-8, Hailo-8L, ",
    ),
    "weight-bits": (lambda place: [place.digits.file, "--weight-bits", 1], 2, "--weight-bits is 1: give 2 to 16"),
    "activation-bits": (
        lambda place: [place.digits.file, "--activation-bits", 17],
        2,
        "--activation-bits is 17: give 2 to 16",
    ),
    "batch": (lambda place: [place.digits.file, "--batch", 2], 2, "--batch is 2: give 1 or 8, for which measurements"),
    "file-without-measure": (
        lambda place: [place.digits.file, "--file", place.digits.file],
        2,
        "--file is for what is measured: add --measure",
    ),
    "data-without-measure": (
        lambda place: [place.digits.file, "--data", place.digits.calib],
        2,
        "--data is for what is measured: add --measure",
    ),
    "no-file": (
        lambda place: [place.digits.file, "--measure", "--file", place.folder / "no.onnx"],
        1,
        r"no\.onnx' is not a file: give the path of a quantized ONNX model",
    ),
    "not-a-file": (
        lambda place: [place.digits.file, "--measure", "--file", place.file(b"text")],
        1,
        r"broken\.onnx': ONNX Runtime cannot run the model",
    ),
    "file-of-another-network": (
        lambda place: [place.digits.file, "--measure", "--file", other_inputs(place)],
        1,
        r"other\.onnx': the model fails on these inputs: .*picture",
    ),
    "no-data": (
        lambda place: [place.digits.file, "--measure", "--data", place.folder / "no"],
        1,
        "no does not exist; pass a directory",
    ),
    "few-samples": (
        lambda place: [place.digits.file, "--measure", "--batch", 8, "--data", place.data(image=place.image)],
        1,
        "has 4 samples, --batch needs 8: give more",
    ),
    "free-dimension": (
        lambda place: [free_dimension(place), "--measure"],
        1,
        "input 'z' has a free dimension: give samples with --data",
    ),
    "no-macs": (
        lambda place: [save(build("(float[n,4] x) => (float[] y) { y = Relu(x) }", {}), place.folder)],
        1,
        "no layer whose multiply-accumulates are known",
    ),
}


def other_inputs(place: Place) -> Path:
    text = "(float[n,1,8,8] picture) => (float[] logits) { logits = Conv(picture, w) }"
    return save(build(text, {"w": normal(4, 1, 3, 3)}), place.folder, "other.onnx")


def free_dimension(place: Place) -> Path:
    text = "(float[n,4] x, float[n,k,4] z) => (float[] y, float[] v) { y = Gemm(x, w) v = MatMul(z, w) }"
    return save(build(text, {"w": normal(4, 6)}), place.folder)


@pytest.mark.parametrize("name", COST_FAILURES)
def test_cost_fails_with_one_line(name: str, torch_digits: Digits, tmp_path: Path) -> None:
    place = Place(torch_digits, tmp_path / "in")
    place.folder.mkdir()
    prepare, exit_code, message = COST_FAILURES[name]
    check_failure(invoke("cost", *prepare(place)), exit_code, message, tmp_path / "out")
