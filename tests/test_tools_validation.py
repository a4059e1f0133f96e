"""The validation tool counts what differs, says what is missing, and ends accordingly."""

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from onnxqt.numerics import Array
from onnxqt.profiles import PROFILES
from onnxqt.runtime import Session

TOOLS = Path(__file__).parents[1] / "tools"
VALUE = {
    "bits": 8,
    "signed": True,
    "qmin": -128,
    "qmax": 127,
    "scale": 0.5,
    "zero_point": 3,
    "tensor": "t",
    "shape": [2, 3],
}


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.syspath_prepend(TOOLS / "referees")
    for name in ("validate", "validation_networks", "folders"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("validate")


def node(name: str, op_type: str, source: str, output: str) -> dict[str, Any]:
    return {"name": name, "op_type": op_type, "inputs": [source], "output": output}


def case(root: Path, found: dict[str, Array], nodes: list[dict[str, Any]], scales: str = "random", **told: Any) -> Path:
    """A case of two nodes whose codes are 0 to 5, and what a referee found."""
    folder = root / scales / "net-0"
    folder.mkdir(parents=True)
    facts = {
        "values": dict.fromkeys("xab", VALUE),
        "inputs": ["x"],
        "outputs": ["b"],
        "nodes": [node("first", "Conv", "x", "a"), node("second", "Add", "a", "b")],
        "float_nodes": [],
    }
    (folder / "case.json").write_text(json.dumps(facts))
    right = np.arange(6, dtype=np.int8).reshape(2, 3)
    for file, arrays in (("arrays", dict.fromkeys("xab", right)), ("result", found)):
        named: dict[str, Any] = {f"codes:{name}": value for name, value in arrays.items()}
        named |= {"real:x": right.astype(np.float32)} if file == "arrays" else {}
        np.savez(folder / f"{file}.npz", **named)
    result = {"version": "1.2", "status": "run", "reason": "", "error": "", "nodes": nodes, **told}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def codes(*changes: int) -> Array:
    values = np.arange(6, dtype=np.int8).reshape(2, 3)
    for index in changes:
        values.flat[index] += 1
    return values


def numbers(comparison: Any) -> dict[tuple[str, str], tuple[int, int, int]]:
    return {key: (c.compared, c.different, c.in_float) for key, c in comparison.counts.items()}


def test_equal_codes_are_counted_under_their_operator(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(), "b": codes()}, [])
    case(tmp_path, {"a": codes(), "b": codes()}, [], scales="power_of_two")
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    rows = ("Conv", "Add", tool.WHOLE)
    assert numbers(comparison) == {(row, scales): (6, 0, 0) for row in rows for scales in tool.SCALES}
    assert tool.unexplained(comparison) == []
    assert comparison.version == "1.2"


def test_a_wrong_code_is_counted_where_it_arises(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(1, 4), "b": codes(0, 1, 2)}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    expected = {("Conv", "random"): (6, 2, 0), ("Add", "random"): (0, 0, 0), (tool.WHOLE, "random"): (6, 3, 0)}
    assert numbers(comparison) == expected
    assert tool.unexplained(comparison) == ["tosa_int: Conv: 2 codes differ, 0 expected"]


def test_one_code_off_by_one_is_enough(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(), "b": codes(5)}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert tool.unexplained(comparison) == ["tosa_int: Add: 1 codes differ, 0 expected"]


def test_codes_of_another_shape_all_differ(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(), "b": codes().T}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert comparison.count("Add", "random").different == 6


def test_expected_differences_are_allowed_up_to_their_count(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(1, 4), "b": codes()}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    rows = [tool.Expected("tosa_int", "Conv", most, "a kernel of its own") for most in (1, 2)]
    assert tool.unexplained(comparison, rows[:1]) == ["tosa_int: Conv: 2 codes differ, 1 expected"]
    assert tool.unexplained(comparison, rows[1:]) == []
    assert "| tosa_int | Conv | 2 | a kernel of its own |" in tool.table([comparison], rows[1:])
    other = [tool.Expected("ncnn_sym", "Conv", 2, "another profile")]
    assert tool.unexplained(comparison, other) == ["tosa_int: Conv: 2 codes differ, 0 expected"]


def test_what_ran_in_float_is_not_compared(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(1), "b": codes()}, [{"name": "first", "executed_by": "FusedConv", "integer": False}])
    comparison = tool.Comparison("ort_cpu")
    tool.compare(tmp_path, comparison)
    assert numbers(comparison)["Conv", "random"] == (0, 0, 6)
    assert (tool.WHOLE, "random") not in comparison.counts


def test_what_follows_a_difference_behind_a_hidden_value_is_not_compared(tool: ModuleType, tmp_path: Path) -> None:
    folder = case(tmp_path, {"a": codes(1), "b": codes(2)}, [])
    facts = json.loads((folder / "case.json").read_text())
    facts["values"]["hidden"] = VALUE
    facts["nodes"] = [
        node("first", "Conv", "x", "a"),
        node("move", "Slice", "a", "hidden"),
        node("second", "Add", "hidden", "b"),
    ]
    (folder / "case.json").write_text(json.dumps(facts))
    comparison = tool.Comparison("openvino_vnni")
    tool.compare(tmp_path, comparison)
    assert numbers(comparison)["Add", "random"] == (0, 0, 0)
    assert tool.unexplained(comparison) == ["openvino_vnni: Conv: 1 codes differ, 0 expected"]


def test_a_result_without_an_output_is_a_failure(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes()}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert tool.unexplained(comparison) == ["tosa_int: net-0: no codes of b"]


def test_a_failed_or_missing_result_is_a_failure(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {}, [], status="failed", error="ValueError: bad graph")
    (case(tmp_path, {}, [], scales="power_of_two") / "result.json").unlink()
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert tool.unexplained(comparison) == [
        "tosa_int: power_of_two/net-0: the referee left no result",
        "tosa_int: random/net-0: ValueError: bad graph",
    ]


def test_what_cannot_be_expressed_is_listed_and_no_failure(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {}, [], status="not expressible", reason="first: Conv has no kernel")
    nodes = [{"node": "second", "not_expressible": "no addition"}]
    case(tmp_path, {}, nodes, scales="power_of_two", status="not expressible")
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert comparison.inexpressible == {"Conv has no kernel": 1, "no addition": 1}
    assert tool.unexplained(comparison) == []
    assert "| tosa_int | no addition | 1 |" in tool.table([comparison])


def test_the_table_has_one_row_per_operator_and_kind_of_scales(tool: ModuleType, tmp_path: Path) -> None:
    case(tmp_path, {"a": codes(2), "b": codes()}, [])
    comparison = tool.Comparison("tosa_int")
    tool.compare(tmp_path, comparison)
    assert "| tosa_int | Conv | random | 6 | 1 | 0 |" in tool.table([comparison]).splitlines()
    assert "| tosa_int | TOSA reference model 1.2 | 1 | 6 | 1 |" in tool.summary([comparison]).splitlines()


def test_a_missing_referee_is_reported(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--profile", "tosa_int"]) == 0
    told = capsys.readouterr()
    assert told.err == "tosa_int: skipped, no interpreter: give --python tosa=PATH\n"
    assert "tosa_int: skipped" in told.out


def test_an_interpreter_without_a_name_is_refused(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        tool.main(["--python", "/usr/bin/python"])
    assert "--python takes NAME=PATH" in capsys.readouterr().err


@pytest.mark.parametrize(("changes", "code"), [((), 0), ((3,), 1)])
def test_an_unexplained_difference_ends_with_1(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: tuple[int, ...], code: int
) -> None:
    monkeypatch.setattr(tool, "make_cases", lambda root, *_: case(root, {"a": codes(), "b": codes(*changes)}, []))
    monkeypatch.setattr(tool, "run_referee", lambda *_: None)
    arguments = ["--profile", "tosa_int", "--python", "tosa=python", "--output", str(tmp_path / "table.md")]
    assert tool.main(arguments) == code
    assert f"| Add | random | 6 | {len(changes)} |" in (tmp_path / "table.md").read_text()


def test_a_case_holds_what_the_referees_read(tool: ModuleType, tmp_path: Path) -> None:
    profile = PROFILES["tosa_int"]
    model = tool.networks.network(2, profile.policy.operators, ("residual", "maxpool"))
    others = tool.make_case(tmp_path / "case", model, 2, profile, tool.Precision(8, 8))
    folders = importlib.import_module("folders")
    read = folders.read_case(tmp_path / "case")
    assert others == ()
    for code, value in read.values.items():
        codes = read.array("codes", code)
        assert list(codes.shape) == value["shape"]
        assert codes.min() >= value["qmin"]
        assert codes.max() <= value["qmax"]
    for each in read.nodes:
        assert {*each["inputs"], each["output"]} <= set(read.values)
        low, high = read.clamp(each)
        assert low <= read.array("codes", each["output"]).min() <= read.array("codes", each["output"]).max() <= high
        if each["op_type"] == "Conv":
            assert read.array("weights", each["name"]).ndim == 4
    assert {f"real:{code}" for code in read.inputs} <= set(read.arrays)


def test_codes_are_read_off_reals_that_lie_on_the_grid_and_no_others(tool: ModuleType) -> None:
    assert tool.REFEREES
    folders = importlib.import_module("folders")
    value = {**VALUE, "scale": 0.037, "zero_point": -7}
    every = np.arange(-128, 128)
    real = (every + 7).astype(np.float32) * np.float32(0.037)
    np.testing.assert_array_equal(folders.exact_codes(real, value), every)
    with pytest.raises(ValueError, match=r"^1 reals of 't' are not on its grid"):
        folders.exact_codes(np.where(every == 5, real + np.float32(0.001), real), value)
    with pytest.raises(ValueError, match="not on its grid"):
        folders.exact_codes(np.array([200 * 0.037], np.float32), value)


@pytest.mark.parametrize("seed", range(4))
def test_networks_run_and_hold_only_what_is_allowed(tool: ModuleType, seed: int) -> None:
    allowed = ("Conv", "Relu", "Add", "Gemm", "ReduceMean", "LeakyRelu")
    model = tool.networks.network(seed, allowed, one_dimensional=seed == 3)
    assert {each.op_type for each in model.graph.node} <= {*allowed, *tool.networks.MOVES}
    assert (
        model.SerializeToString() == tool.networks.network(seed, allowed, one_dimensional=seed == 3).SerializeToString()
    )
    inputs = tool.networks.samples(model, 3, seed)
    outputs = Session(model).run(inputs)
    assert np.isfinite(next(iter(outputs.values()))).all()


@pytest.mark.parametrize("name", ["transposed", "gate", "concat", "prelu", "gelu", "softmax", "resize", "attention"])
def test_a_layer_that_is_asked_for_is_there(tool: ModuleType, name: str) -> None:
    needed = tool.networks.BUILDERS[name][0]
    allowed = ("Conv", "Gemm", "Sigmoid", *needed)
    found = {each.op_type for each in tool.networks.network(1, allowed, (name,)).graph.node}
    assert found >= set(needed if name != "gelu" else ("Erf",))
    onnx.checker.check_model(tool.networks.network(1, allowed, (name,)), full_check=True)


def test_a_network_without_a_possible_layer_is_refused(tool: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"^no layer of \['gate'\] can be built: allow Conv"):
        tool.networks.network(0, ("Conv",), ("gate",))
