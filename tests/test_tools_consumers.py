"""The tool that has current runtimes run our files counts what differs, and says what was not run."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from helpers import build, normal, save

TOOLS = ROOT / "tools"
# A consumer that answers with what a file of its own says, for a model whose output is its input.
SCRIPT = """
import json, pathlib, sys
import numpy as np
import onnx, onnxruntime
for path in sorted(pathlib.Path(sys.argv[2]).rglob("inputs.npz")):
    session = onnxruntime.InferenceSession(str(path.parent / "model.onnx"), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    outputs = dict(zip(names, session.run(names, dict(np.load(path)))))
    np.savez(path.parent / "outputs.npz", **outputs)
    facts = {"version": "7", "loads": True, "runs": True, "error": "", "kernels": {"QGemm": 1, "Gemm": 1}, "integer": 1}
    (path.parent / "result.json").write_text(json.dumps(facts))
"""


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.syspath_prepend(TOOLS / "consumers")
    for name in ("check_consumers", "consume"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


@pytest.fixture
def model(tmp_path: Path) -> list[str]:
    """Arguments that name a small model and its samples."""
    proto = build("(float[n,4] x) => (float[] y) { h = Gemm(x, w) y = Relu(h) }", {"w": normal(4, 3)})
    np.savez(tmp_path / "samples.npz", x=normal(40, 4))
    return ["--model", str(save(proto, tmp_path)), "--data", str(tmp_path / "samples.npz")]


def row(tool: ModuleType, **facts: Any) -> Any:
    return tool.Row("m", facts.pop("kind", "w8a8-sym-pc"), "ONNX Runtime 1", "ort", **facts)


def test_what_counts_as_a_problem(load: Callable[[str], ModuleType]) -> None:
    tool = load("check_consumers")
    ran = {"loads": True, "runs": True}
    assert row(tool, remark="no kernel").problem == "no kernel"
    assert row(tool).problem == "it did not run"
    assert row(tool, **ran, max_lsb=1, different=0.01, error=0.1).problem == ""
    assert row(tool, **ran, max_lsb=3, different=0.5, error=0.1).problem == (
        "50.0% of the output codes differ, by up to 3"
    )
    assert row(tool, **ran, error=2.0**-12).problem == ""
    assert row(tool, **ran, error=2.0**-11).problem == "outputs differ by 0.00049 of the largest"


def test_what_is_expected_is_bounded(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("check_consumers")
    monkeypatch.setattr(tool, "EXPECTED", (tool.Expected("ort", "*af-*", 0.01, "why"),))
    ran = {"loads": True, "runs": True}
    assert row(tool, kind="w4af-sym-pc", **ran, error=0.01).reason == "why"
    assert row(tool, kind="w4af-sym-pc", **ran, error=0.02).reason == ""
    assert row(tool, kind="w4a8-sym-pc", **ran, error=0.01).reason == ""
    assert row(tool, kind="w4af-sym-pc", remark="it does not load").reason == ""


def test_the_whole_way_with_a_consumer_of_our_own(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    model: list[str],
) -> None:
    tool = load("check_consumers")
    (tmp_path / "mine.py").write_text(SCRIPT)
    monkeypatch.setattr(tool, "SCRIPT", tmp_path / "mine.py")
    monkeypatch.setattr(tool, "CONSUMERS", (tool.Consumer("Mine", "mine", "ort_cpu"),))
    monkeypatch.setattr(tool, "KINDS", ("w8a8-asym-pc", "w8a8-asym-pc,qoperator", "w4af-sym-b16", "w8af-sym-pc"))
    arguments = [*model, "--output", str(tmp_path / "table.md")]
    assert tool.main([*arguments, "--python", f"mine={sys.executable}"]) == 0
    text = (tmp_path / "table.md").read_text()
    name = f"{tmp_path.name}-model"
    assert f"| {name} | w8a8-asym-pc | Mine 7 | yes | yes | 1 of 2 | 0 | 0.00% |" in text
    for kind in ("w8a8-asym-pc,qoperator", "w8af-sym-pc"):
        assert f"| {name} | {kind} | Mine 7 | yes | yes | 1 of 2 | - | - |" in text
    assert tool.main(arguments) == 0
    assert "Mine: skipped, no interpreter: give --python mine=PATH" in (tmp_path / "table.md").read_text()
    capsys.readouterr()
    (tmp_path / "mine.py").write_text("raise SystemExit('broken')")
    assert tool.main([*arguments, "--python", f"mine={sys.executable}"]) == 1
    assert "Mine: broken" in capsys.readouterr().err


def test_arguments_that_do_not_fit(load: Callable[[str], ModuleType], capsys: pytest.CaptureFixture[str]) -> None:
    tool = load("check_consumers")
    for arguments, message in (
        (["--model", "m", "--data", "d", "--python", "ort"], "--python takes NAME=PATH, each name once"),
        (["--model", "m", "--model", "n", "--data", "d"], "give one --data for each --model"),
    ):
        with pytest.raises(SystemExit):
            tool.main(arguments)
        assert message in capsys.readouterr().err


def test_the_script_runs_onnx_runtime(load: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """The ONNX Runtime of this environment is a consumer too."""
    script = load("consume")
    good, broken = tmp_path / "good", tmp_path / "broken"
    for folder in (good, broken):
        folder.mkdir()
        np.savez(folder / "inputs.npz", x=normal(2, 4))
    save(build("(float[n,4] x) => (float[] y) { y = Gemm(x, w) }", {"w": normal(4, 3)}), good)
    (broken / "model.onnx").write_bytes(b"no model")
    assert script.main(["ort", str(tmp_path)]) == 0
    told = json.loads((good / "result.json").read_text())
    assert (told["loads"], told["runs"], told["kernels"], told["integer"]) == (True, True, {"Gemm": 1}, 0)
    with np.load(good / "outputs.npz") as file:
        assert file["y"].shape == (2, 3)
    told = json.loads((broken / "result.json").read_text())
    assert (told["loads"], told["runs"]) == (False, False)
    assert told["error"]
