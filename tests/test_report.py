import copy
import json
from collections.abc import Callable, Mapping
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import ROOT, RUN_SCHEMES, RUN_STEPS, Digits, Run, files, invoke

from onnxqt.data import Batch, open_samples
from onnxqt.emulate import load_program
from onnxqt.files import file_sha256
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.numerics import Array
from onnxqt.report import SCHEMA_VERSION, Report
from onnxqt.runtime import Session

SCHEMA = json.loads((ROOT / "onnxqt" / "report.schema.json").read_text())
# The report sums batch by batch in float64, the test all at once: 6000 terms, 2^-53 each.
RELATIVE = 1e-11


def paths(value: Any, prefix: str = "") -> list[str]:
    """Dotted paths of all keys."""
    if not isinstance(value, dict):
        return []
    return [path for key, inner in value.items() for path in (f"{prefix}{key}", *paths(inner, f"{prefix}{key}."))]


def test_report_follows_its_schema(short_run: Run) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.Draft202012Validator(SCHEMA).validate(short_run.report)
    assert short_run.report["schema_version"] == SCHEMA_VERSION


SCHEME_KEYS = [
    *(f"{kind}.{key}" for kind in ("ptq", "trim") for key in ("metrics", "fidelity")),
    *(f"emulator.{key}" for key in ("metrics", "fidelity", "max_lsb", "mismatch_fraction", "float_nodes")),
]
REQUIRED = [
    *("schema_version", "model.sha256", "settings", "environment", "float.metrics", "files"),
    *(f"training.{key}" for key in ("steps", "seconds", "step_ms_median", "best_step", "stopped", "curves", "tails")),
    *(f"schemes.{name}.{key}" for name in RUN_SCHEMES for key in SCHEME_KEYS),
]


@pytest.mark.parametrize("path", REQUIRED)
def test_required_keys_are_there_and_the_schema_insists_on_them(path: str, short_run: Run) -> None:
    assert path in paths(short_run.report)
    broken = copy.deepcopy(short_run.report)
    *parents, last = path.split(".")
    inner = broken
    for key in parents:
        inner = inner[key]
    del inner[last]
    with pytest.raises(jsonschema.ValidationError, match=f"'{last}' is a required property"):
        jsonschema.Draft202012Validator(SCHEMA).validate(broken)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("schema_version",), "0.9"),
        (("model", "sha256"), "abc"),
        (("float", "metrics", "top1"), 98.5),
        (("float", "fidelity", "mse"), -1.0),
        (("training", "best_step"), -1),
        (("schemes", "w9a8-sym-pc"), {}),
        (("extra",), 1),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_schema_refuses_wrong_values(path: tuple[str, ...], value: object, short_run: Run) -> None:
    broken = copy.deepcopy(short_run.report)
    inner = broken
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(broken)


def test_json_has_no_nan(short_run: Run) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    json.loads((short_run.folder / "report.json").read_text(), parse_constant=refuse)


def test_hashes_are_those_of_the_files(short_run: Run) -> None:
    listed = short_run.report["files"]
    assert listed == {name: file_sha256(short_run.folder / name) for name in listed}
    schemes = {f"schemes/{name}.onnx" for name in RUN_SCHEMES}
    assert listed.keys() == {"checkpoint.onnx", "table.json", "table.safetensors"} | schemes
    written = {name for name in files(short_run.folder) if not name.startswith("training/")}
    assert written == {*listed, "report.json", "training.svg", "tails.svg"}
    assert short_run.report["model"]["sha256"] == file_sha256(short_run.digits.file)


def test_settings_training_and_environment(short_run: Run) -> None:
    report = short_run.report
    settings, training = report["settings"], report["training"]
    assert settings == {**settings, "schemes": list(RUN_SCHEMES), "robust_to": [], "ranges": "mse"}
    asked_for = {"steps": RUN_STEPS, "batch_size": 64, "learning_rate": 1.5e-3, "seed": 0, "prune": "tensor"}
    assert settings["training"] == {**settings["training"], **asked_for}
    assert (training["optimizer"], training["learning_rate"]) == ("adamw", 1.5e-3)
    assert training["losses"]["weights"] == {"distill": 1.0}  # the fixture's calibration samples have no labels
    assert training["regimes"] == [*RUN_SCHEMES, "float"]
    assert training["curves"]["step"] == list(range(RUN_STEPS))
    assert len(training["tails"]) == report["plan"]["quantized_weights"]
    assert training["steps"] == RUN_STEPS
    best = [evaluation["step"] for evaluation in training["evaluations"] if evaluation["best"]]
    assert training["best_step"] == (best[-1] if best else 0)
    assert 0 < training["step_ms_median"] / 1e3 < training["seconds"] < report["seconds"]
    assert {"onnxqt", "onnx", "numpy", "onnxruntime-training-cpu"} <= report["environment"]["packages"].keys()
    assert (report["data"]["calibration"]["samples"], report["data"]["evaluation"]["samples"]) == (1200, 597)
    assert report["data"]["evaluation"]["held_out"] is False


# --- every figure again, from the files -----------------------------------------------------------------

Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]


@pytest.fixture(scope="module")
def batch(short_run: Run) -> Batch:
    """All evaluation samples at once."""
    samples = open_samples(short_run.evaluation, input_specs(short_run.digits.model))
    return next(samples.batches(samples.count))


def outcome(digits: Digits, batch: Batch, run: Runner) -> dict[str, Any]:
    """Metrics and fidelity of the one output, from their definitions."""
    (a,), (b,) = run(batch.inputs).values(), Session(digits.model.proto).run(batch.inputs).values()
    a, b = a.astype(np.float64), b.astype(np.float64)
    noise = np.sum((a - b) ** 2)
    return {
        "metrics": {"top1": np.mean(a.argmax(axis=1) == batch.labels)},
        "fidelity": {
            "mse": pytest.approx(noise / a.size, rel=RELATIVE, abs=0),
            "snr_db": pytest.approx(10 * np.log10(np.sum(b**2) / noise), rel=RELATIVE, abs=0) if noise else None,
            "cosine": pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), rel=RELATIVE, abs=0),
            "agreement": np.mean(a.argmax(axis=1) == b.argmax(axis=1)),
            "non_finite": 0,
        },
    }


def picked(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {"metrics": figures["metrics"], "fidelity": figures["fidelity"]}


def test_float_figures(short_run: Run, batch: Batch) -> None:
    digits, report = short_run.digits, short_run.report
    original = outcome(digits, batch, Session(digits.model.proto).run)
    assert report["float"]["metrics"] == original["metrics"] == {"top1": 588 / 597}  # fixtures/README.md
    # Batches of 64 and one of 597 may go through other kernels: not exactly zero.
    assert report["float"]["fidelity"]["agreement"] == 1.0
    checkpoint = outcome(digits, batch, Session(ingest(short_run.folder / "checkpoint.onnx").proto).run)
    assert report["checkpoint"]["metrics"] == checkpoint["metrics"]


def test_the_run_tells_before_from_after(short_run: Run) -> None:
    """Else the tests here could not tell them apart either."""
    scheme = short_run.report["schemes"]["w2a8-asym-pt"]
    assert scheme["weights"] == "checkpoint"
    assert scheme["ptq"]["fidelity"] != scheme["trim"]["fidelity"] == scheme["checkpoint"]["fidelity"]


@pytest.mark.parametrize("name", RUN_SCHEMES)
def test_figures_of_the_written_files(name: str, short_run: Run, batch: Batch) -> None:
    scheme, file = short_run.report["schemes"][name], short_run.scheme_file(name)
    assert picked(scheme["trim"]) == outcome(short_run.digits, batch, Session(file).run)
    program = load_program(file)
    assert picked(scheme["emulator"]) == outcome(short_run.digits, batch, program.run)
    (grid,) = (entry.params for entry in program.run_codes(batch.inputs).codes.values())
    (a,), (b,) = (run(batch.inputs).values() for run in (Session(file).run, program.run))
    lsb = np.abs(np.rint((a.astype(np.float64) - b) / float(grid.scale)))
    assert scheme["emulator"]["max_lsb"] == lsb.max()
    assert scheme["emulator"]["mismatch_fraction"] == np.mean(lsb > 0)
    assert scheme["emulator"]["float_nodes"] == []


@pytest.fixture(scope="module")
def exports(short_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same schemes of the original model and of the checkpoint, exported without training."""
    root = tmp_path_factory.mktemp("exports")
    for name, model in (("original", short_run.digits.file), ("checkpoint", short_run.folder / "checkpoint.onnx")):
        schemes = [argument for scheme in RUN_SCHEMES for argument in ("--scheme", scheme)]
        result = invoke("export", model, "--data", short_run.digits.calib, "--out", root / name, *schemes)
        assert result.exit_code == 0, result.stderr
    return Run(short_run.digits, root, short_run.result)


@pytest.mark.parametrize("name", RUN_SCHEMES)
def test_ptq_is_the_export_of_the_original(name: str, short_run: Run, exports: Run, batch: Batch) -> None:
    scheme = short_run.report["schemes"][name]
    for key, folder in (("ptq", "original"), ("checkpoint", "checkpoint")):
        file = exports.folder / folder / "schemes" / f"{name}.onnx"
        assert picked(scheme[key]) == outcome(short_run.digits, batch, Session(file).run)
    made_of = exports.folder / scheme["weights"] / "schemes" / f"{name}.onnx"
    files = [onnx.load(file) for file in (short_run.scheme_file(name), made_of)]
    for file in files:
        file.ClearField("metadata_props")  # the hash of the file that each was made from
    assert files[0] == files[1]


def test_table_is_the_export_of_the_checkpoint(short_run: Run, exports: Run) -> None:
    tables = [
        json.loads((folder / "table.json").read_text()) for folder in (short_run.folder, exports.folder / "checkpoint")
    ]
    assert tables[0]["tensors"] == tables[1]["tensors"]


# --- the table for people -------------------------------------------------------------------------------


def figures(share: float, snr_db: float | None, **metrics: float) -> dict[str, Any]:
    return {"metrics": metrics or {"top1": share}, "fidelity": {"mse": 0.1, "snr_db": snr_db}}


def test_summary_rows() -> None:
    one = {
        "ptq": figures(0.5, 12.345),
        "baseline": None,
        "trim": figures(0.75, None),
        "emulator": {**figures(0.7512, 20.0), "max_lsb": 1},
        "weights": "checkpoint",
    }
    other = {
        "ptq": {"metrics": {}, "fidelity": {"mse": 1.0, "snr_db": -3.0}},
        "baseline": None,
        "trim": figures(0, 0.04, agreement=1.0),
        "emulator": {**figures(0, 1.0, agreement=0.25), "max_lsb": None},
        "weights": "original",
    }
    header, *rows = Report({"schemes": {"w8a8-sym-pc": one, "w2a4-asym-pt": other}}).summary()
    assert [dict(zip(header, row, strict=True)) for row in rows] == [
        {
            **{"scheme": "w8a8-sym-pc", "PTQ": "50.00", "trim": "75.00", "emulator": "75.12"},
            **{"PTQ dB": "12.3", "trim dB": "exact", "LSB": "1", "made of": "checkpoint"},
        },
        {
            **{"scheme": "w2a4-asym-pt", "PTQ": "-", "trim": "100.00", "emulator": "25.00"},
            **{"PTQ dB": "-3.0", "trim dB": "0.0", "LSB": "-", "made of": "original"},
        },
    ]
    both = {
        "w8a8-sym-pc": {**one, "baseline": figures(0.625, 1.0)},
        "w2a4-asym-pt": {**other, "baseline": figures(0, 1.0)},
    }
    header, *rows = Report({"schemes": both}).summary()
    assert header[:4] == ("scheme", "PTQ", "better PTQ", "trim")
    assert [row[:4] for row in rows] == [
        ("w8a8-sym-pc", "50.00", "62.50", "75.00"),
        ("w2a4-asym-pt", "-", "0.00", "100.00"),
    ]
