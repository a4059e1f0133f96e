"""The coverage tool puts every kind of ending into the right class."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import build, normal

import onnxqt
from onnxqt.errors import ContradictionError
from onnxqt.model import Model

TOOLS = Path(__file__).parents[1] / "tools"
UNIX = pytest.mark.skipif(sys.platform == "win32", reason="the tool ends process groups")
CONV = "(float[N, 2, 6, 6] x) => (float[] y) { c = Conv(x, w) y = Relu(c) }"


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    for name in ("coverage", "coverage_judge", "coverage_models", "coverage_report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("coverage")


def case(tool: ModuleType, folder: Path, model: onnx.ModelProto) -> Any:
    (folder / "inputs").mkdir()
    onnx.save(model, folder / "model.onnx")
    return tool.Case("zoo", "tiny", folder)


def conv() -> onnx.ModelProto:
    return build(CONV, {"w": normal(4, 2, 3, 3)})


def test_a_model_that_trains_and_exports_passes(tool: ModuleType, tmp_path: Path) -> None:
    stages: list[str] = []
    row = tool.judge(case(tool, tmp_path, conv()), stages.append)
    assert (row["outcome"], row["trained"], row["integer_nodes"]) == ("passes", 20, 1)
    assert stages == ["run", "inspect", "float path", "calibrate", "trim"]
    assert len(row["losses"]) == 2


def test_what_onnx_runtime_does_not_know_is_not_runnable(tool: ModuleType, tmp_path: Path) -> None:
    model = build("(float[N, 4] x) => (float[N, 4] y) { y = nowhere.Unknown(x) }", opset=17, domains=', "nowhere": 1')
    row = tool.judge(case(tool, tmp_path, model))
    assert (row["outcome"], row["stage"]) == ("not runnable", "run")


def test_an_error_of_the_package_is_a_refusal_with_what_it_names(tool: ModuleType, tmp_path: Path) -> None:
    text = "(float[N, 4] x) => (float[] y) { [noise] y = Dropout(x, ratio, on) }"
    model = build(text, {"ratio": np.array(0.5, np.float32), "on": np.array(True)})
    row = tool.judge(case(tool, tmp_path, model))
    assert (row["outcome"], row["stage"], row["error"]) == ("refused", "inspect", "ModelError")
    assert row["named"]
    assert row["remedy"]
    assert str(tmp_path) not in row["message"]


def test_any_other_exception_is_a_failure(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model: Model) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(onnxqt, "make_plan", broken)
    row = tool.judge(case(tool, tmp_path, conv()))
    assert (row["outcome"], row["stage"], row["error"]) == ("fails", "inspect", "KeyError")


def test_an_error_that_blames_the_package_is_a_failure(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contradicted(*_: Any, **__: Any) -> None:
        raise ContradictionError("the emulator and ONNX Runtime disagree")

    monkeypatch.setattr(onnxqt, "trim", contradicted)
    row = tool.judge(case(tool, tmp_path, conv()))
    assert (row["outcome"], row["stage"], row["error"]) == ("fails", "trim", "ContradictionError")


def test_the_float_path_of_a_model_without_its_quantizers_is_not_compared(tool: ModuleType, tmp_path: Path) -> None:
    text = "(float[N, 4] x) => (float[] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    model = build(text, {"s": np.array(0.1, np.float32), "z": np.array(0, np.int8)})
    row = tool.judge(case(tool, tmp_path, model))
    assert (row["outcome"], row["float_path"]) == ("passes", "its quantizers were taken out")


def test_another_float_result_is_a_failure(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxqt.ingest
    monkeypatch.setattr(
        onnxqt, "ingest", lambda path, strip_qdq: real(path).with_weights({"w": normal(4, 2, 3, 3, seed=5)})
    )
    row = tool.judge(case(tool, tmp_path, conv()))
    assert (row["outcome"], row["stage"], row["error"]) == ("fails", "float path", "Wrong")


@UNIX
@pytest.mark.parametrize(
    ("ending", "stage", "outcome", "error"),
    [
        ("os.kill(os.getpid(), 11)", "run", "not runnable", "crash"),
        ("os.kill(os.getpid(), 11)", "trim", "fails", "crash"),
        ("time.sleep(60)", "trim", "fails", "time-out"),
    ],
)
def test_a_crash_and_a_time_out_are_rows(
    tool: ModuleType, tmp_path: Path, ending: str, stage: str, outcome: str, error: str
) -> None:
    lines = [json.dumps({"ready": ""}), json.dumps({"stage": stage})]
    script = f"import os, sys, time\nprint({lines[0]!r}, flush=True)\nsys.stdin.readline()\n"
    script += f"print({lines[1]!r}, flush=True)\n{ending}"
    worker = tool.Worker([sys.executable, "-c", script], tmp_path / "log", timeout=1.0)
    rows: list[dict[str, Any]] = []
    tool.judge_all([tool.Case("zoo", "tiny", tmp_path)] * 2, [worker], rows.append)
    assert [(row["outcome"], row["stage"], row["error"]) for row in rows] == [(outcome, stage, error)] * 2


def test_samples_of_a_model_without_a_batch_axis_are_stacked(tool: ModuleType) -> None:
    make_samples = importlib.import_module("coverage_models").make_samples
    feeds = {"a": normal(2, 3), "b": normal(2, 3)}
    assert {name: array.shape for name, array in make_samples(feeds, True, 0).items()} == {"a": (8, 3), "b": (8, 3)}
    stacked = make_samples({**feeds, "b": normal(3)}, False, 0)
    assert {name: array.shape for name, array in stacked.items()} == {"a": (8, 2, 3), "b": (8, 3)}


def test_outputs_are_compared_with_their_type_and_what_is_not_finite(tool: ModuleType) -> None:
    difference = importlib.import_module("coverage_judge").difference
    x = np.array([1.0, np.nan, -4.0], np.float32)
    assert difference(x, x) == 0
    assert difference(x + np.float32(1), x) == 0.25
    assert difference(x.astype(np.float64), x) == 0  # ingest makes float32 of all floats
    assert difference(np.arange(3), np.arange(3).astype(np.int32)) == np.inf
    assert difference(np.nan_to_num(x), x) == np.inf
    assert difference([x], [x, x]) == np.inf
    assert difference(np.array(["a"]), np.array(["b"])) == np.inf


def test_inputs_that_float32_cannot_hold_are_replaced(tool: ModuleType, tmp_path: Path) -> None:
    """Test inputs of onnx can be memory that was never written."""
    model = build("(double[2] x, double[2] z) => (double[2] y) { y = Add(x, z) }")
    tiny = case(tool, tmp_path, model)
    for index, values in enumerate(([1e199, 6.9e-310], [1.0, np.inf])):
        stored = onnx.numpy_helper.from_array(np.array(values), "")
        (tmp_path / "inputs" / f"{index}.pb").write_bytes(stored.SerializeToString())
    row = tool.judge(tiny)
    assert row["replaced_inputs"] == ["x"]
    assert row["float_error"] <= np.finfo(np.float32).eps


def test_failures_with_the_same_cause_are_one_group(tool: ModuleType) -> None:
    report = importlib.import_module("coverage_report")
    base = {"set": "node", "outcome": "fails", "stage": "trim", "error": "ValueError", "where": "", "seconds": 0.1}
    messages = ("the model's input 'x' has 3", "the model's input 'y' has 14", "other")
    rows = [{**base, "name": str(index), "message": message} for index, message in enumerate(messages)]
    assert [len(group) for _, group in report.grouped(rows)] == [2, 1]
    assert report.summary(rows)[-1].startswith("| all | 3 | 3 | 0 |")
    assert "python tools/coverage.py" in report.document(rows, "python tools/coverage.py", {})
