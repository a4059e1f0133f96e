"""The tool that gives our files to vendors' readers counts what differs, and says what was not read."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

TOOLS = Path(__file__).parents[1] / "tools"
GRID = {"scale": [0.1], "zero_point": [3], "shape": [], "axis": None, "block_size": None}
GRID |= {"bits": 8, "signed": False, "qmin": 0, "qmax": 255}
NAMES = ("check_vendors", "validation_networks", "cases")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.syspath_prepend(TOOLS / "vendors")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def result(status: str = "accepted", different: int = 0, detail: str = "", case: str = "net@w8a8-sym-pc") -> Any:
    values = {"checked": 10, "different": different, "effect": "scales", "detail": detail}
    return {"case": case, "format": "quark", "status": status, **values}


def test_rows_add_up_and_name_what_is_wrong(load: Callable[[str], ModuleType]) -> None:
    tool = load("check_vendors")
    reader = tool.Reader("Tool", "tool", "tool.py", ("quark",))
    results = [
        result(),
        result(different=3, detail="x"),
        result("refused", detail="no"),
        result("failed", detail="bug"),
    ]
    (row,) = tool.rows_of(reader, {"version": "1", "results": results}, {"quark": {"widths": None}})
    assert (row.cases, row.accepted, row.checked, row.different) == (4, 2, 40, 3)
    assert tool.problems_of([row]) == [
        "quark: net@w8a8-sym-pc: bug",
        "quark: 1 case(s) refused",
        "quark: 3 values differ",
    ]
    text = tool.table_of([row], {"mnn": "no interpreter"})
    assert "| quark | Tool 1 | 4 | 2 | 40 | 3 | scales |" in text
    assert "| mnn | skipped: no interpreter |" in text
    assert "| quark | widths |" in text


def test_nothing_is_wrong_where_all_is_equal(load: Callable[[str], ModuleType]) -> None:
    tool = load("check_vendors")
    reader = tool.Reader("Tool", "tool", "tool.py", ("quark",))
    rows = tool.rows_of(reader, {"version": "1", "results": [result()]}, {"quark": {}})
    assert tool.problems_of(rows) == []
    rows = tool.rows_of(reader, {"version": "", "results": [], "error": "no module"}, {"quark": {}})
    assert tool.problems_of(rows) == ["quark: no module"]
    rows = tool.rows_of(reader, {"version": "", "results": []}, {"quark": {}})
    assert tool.problems_of(rows) == ["quark: no case was read"]


def test_expected_differences_are_explained(load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    tool = load("check_vendors")
    monkeypatch.setattr(tool, "EXPECTED", (tool.Expected("quark", "w4", "why"),))
    reader = tool.Reader("Tool", "tool", "tool.py", ("quark",))
    results = [result(different=2, case="my-net@w4a8-sym-pc")]
    told = {"version": "1", "results": results}
    assert tool.problems_of(tool.rows_of(reader, told, {"quark": {}})) == []
    results.append(result(different=2))
    assert tool.problems_of(tool.rows_of(reader, told, {"quark": {}})) == ["quark: 2 values differ"]


def test_the_whole_way_with_a_reader_of_our_own(
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tool = load("check_vendors")
    script = f"""import sys
sys.path.insert(0, {str(TOOLS / "vendors")!r})
import cases, json
def check(case):
    ranges = json.loads(case.file(".quark.json").read_text())["tensors_range"]
    far = {{name: abs(ranges[name][1] - grid.ends[1]) / grid.ends[1] for name, grid in case.activations.items()}}
    wrong = [name for name, part in far.items() if part > 1e-6]  # two roundings to float32
    assert (case.folder / "baked.onnx").exists() and case.inputs() and case.weights
    return cases.Outcome(len(case.activations), len(wrong), "ranges")
sys.exit(cases.main("mine", "7", {{"quark": check}}))
"""
    (tmp_path / "mine.py").write_text(script)
    monkeypatch.setattr(tool, "SCRIPTS", tmp_path)
    monkeypatch.setattr(tool, "READERS", (tool.Reader("Mine", "mine", "mine.py", ("quark", "quark,version=9")),))
    arguments = ["--seeds", "1", "--scheme", "w8a8-asym-pc", "--output", str(tmp_path / "table.md")]
    assert tool.main([*arguments, "--python", f"mine={sys.executable}"]) == 0
    text = (tmp_path / "table.md").read_text()
    assert "| quark | Mine 7 | 1 | 1 |" in text
    assert "| quark,version=9 | Mine 7 | 1 | 1 |" in text
    assert tool.main(arguments) == 0
    assert "skipped: no interpreter, give --python mine=PATH" in (tmp_path / "table.md").read_text()
    with pytest.raises(SystemExit):
        tool.main(["--python", "mine"])
    assert "--python takes NAME=PATH" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(["--model", "x.onnx"])
    assert "give --model and --data together" in capsys.readouterr().err


def test_readers_without_a_script_or_a_writer_are_skipped(load: Callable[[str], ModuleType]) -> None:
    tool = load("check_vendors")
    reader = tool.Reader("Tool", "tool", "absent.py", ("quark",))
    assert tool.why_skipped(reader, {"tool": "python"}) == "no absent.py"
    reader = tool.Reader("Tool", "tool", "absent.py", ("quark", "other,form=x"))
    assert tool.why_skipped(reader, {"tool": "python"}) == "no writer of other,form=x"


def test_a_script_that_breaks_is_one_line(load: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: Any) -> None:
    tool = load("check_vendors")
    (tmp_path / "bad.py").write_text("raise SystemExit('no such package')")
    monkeypatch.setattr(tool, "SCRIPTS", tmp_path)
    told = tool.run_reader(tmp_path, tool.Reader("Bad", "bad", "bad.py", ()), sys.executable)
    assert told["error"] == "no such package"


def test_grids_of_cases(load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = load("cases")
    grid = cases.grid_of(GRID)
    assert (grid.scale.dtype, grid.scale.shape, grid.scale) == (np.float32, (), np.float32(0.1))
    step = float(np.float32(0.1))
    assert [float(end) for end in grid.ends] == [-3 * step, 252 * step]
    assert grid.absmax == 252 * step
    centred = cases.grid_of({**GRID, "signed": True, "zero_point": [0], "qmin": -128, "qmax": 127})
    assert centred.absmax == 127 * step
    folder = tmp_path / "one" / "quark"
    folder.mkdir(parents=True)
    (folder / "m.json").write_text("{}")
    facts = {"activations": {"x": GRID}, "weights": {}, "absorbed": {}, "unreached": [], "groups": {"x": "g", "y": "g"}}
    written = {"folder": "quark", "files": ["m.json"], "options": {}}
    (tmp_path / "one" / "case.json").write_text(json.dumps({**facts, "formats": {"quark": written, "other": written}}))

    (case,) = cases.read_cases(tmp_path, ["quark"])
    assert (case.sharing("x"), case.sharing("z")) == (["y"], [])

    def refuse(case: Any) -> Any:
        raise cases.Refused("not today")

    def fail(case: Any) -> Any:
        raise ValueError("one\ntwo")

    for check, code, status, detail in ((refuse, 0, "refused", "not today"), (fail, 1, "failed", "ValueError: one")):
        assert cases.main("tool", "1", {"quark": check}, [str(tmp_path)]) == code
        (told,) = json.loads(capsys.readouterr().out)["results"]
        assert (told["status"], told["detail"], told["format"]) == (status, detail, "quark")
