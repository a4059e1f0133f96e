"""The scripts that read files for edge vendors see a value that is not ours."""

import importlib.util
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import flatbuffers  # type: ignore[import-untyped]  # has no types
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxqt.numerics import Array

SCRIPTS = Path(__file__).parents[1] / "tools" / "vendors"


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A script under a name of its own, as some are called like the package that they check."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "cases", raising=False)
    spec = importlib.util.spec_from_file_location(f"vendors_{name}", SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def grid(scale: Any, zero_point: int = 0, signed: bool = True, **facts: Any) -> SimpleNamespace:
    scales = np.asarray(scale, np.float32)
    low, high = (-128, 127) if signed else (0, 255)
    ends = {"absmax": np.float64(max(zero_point - low, high - zero_point)) * scales.astype(np.float64)}
    zero = np.full(scales.shape, zero_point, np.int64)
    known = {"scale": scales, "zero_point": zero, "bits": 8, "signed": signed, "axis": None, "block_size": None}
    return SimpleNamespace(**{**known, **ends, **facts})


def case(folder: Path, files: dict[str, str], nodes: list[onnx.NodeProto], constants: dict[str, Array]) -> Any:
    graph = onnx.helper.make_graph(
        nodes, "g", [], [], [numpy_helper.from_array(value, name) for name, value in constants.items()]
    )
    for name in ("baked.onnx", "float.onnx"):
        onnx.save(onnx.helper.make_model(graph), folder / name)
    for name, content in files.items():
        (folder / name).write_text(content)
    found = SimpleNamespace(folder=folder, activations={}, weights={})
    found.file = lambda end: next(path for path in folder.iterdir() if path.name.endswith(end))
    return found


CONV = onnx.helper.make_node("Conv", ["x", "w"], ["y"], name="conv")


def int8_case(folder: Path, rows: str) -> Any:
    found = case(folder, {"m.table": rows}, [CONV], {"w": np.array([2, -1, 2, 127], np.float32).reshape(2, 2, 1, 1)})
    scales = np.array([1.0, 1.0], np.float32)
    found.weights["w"], found.activations["x"] = grid(scales, axis=0), grid(0.125)
    return found


@pytest.mark.parametrize(
    ("rows", "different", "detail"),
    [
        ("conv_param_0 1 1\nconv 8\n", 0, ""),
        ("conv_param_0 1 0.5\nconv 8\n", 1, "differ: conv: codes"),
        ("conv_param_0 1 1\nconv 8.000001\n", 1, "differ: conv: input"),
        ("conv_param_0 1 1\nconv 8\nother 1\n", 1, "differ: row other: no layer"),
    ],
)
def test_rows_of_ncnn(rows: str, different: int, detail: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome = script("ncnn", monkeypatch).check_int8(int8_case(tmp_path, rows))
    assert (outcome.checked, outcome.different, outcome.detail) == (5, different, detail)


def test_an_empty_line_ends_a_table_of_ncnn(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(script("ncnn", monkeypatch).rows("a 1\n\nb 2\n")) == ["a"]


def test_ncnn_rounds_ties_away(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.array([-2.5, -0.5, 0.5, 1.5], np.float32)
    np.testing.assert_array_equal(script("ncnn", monkeypatch).rounded(values), [-3, -1, 1, 2])


@pytest.mark.parametrize(("scales", "different"), [("1 2", 0), ("1 4", 1)])
def test_blocks_of_ncnn(scales: str, different: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.full((33, 1), 3, np.float32)
    weights[32] = 2.5
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"], name="mm")
    row = f"mm_param_1 bits=4 block=32 method=minmax {scales}\n"
    found = case(tmp_path, {"m.llm.table": row}, [node], {"w": weights})
    found.weights["w"] = grid([[1.0], [0.5]], axis=0, block_size=32)
    outcome = script("ncnn", monkeypatch).check_blocks(found)
    assert (outcome.checked, outcome.different) == (33, different)


RECORD = (
    'record {{ key: "conv" value {{ scale_d: 0.125 offset_d: {} scale_w: 1 scale_w: 1 offset_w: 0 offset_w: 0 }} }}'
)


@pytest.mark.parametrize(("offset", "different"), [(-125, 0), (3, 1)])
def test_records_of_ascend(offset: int, different: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = case(tmp_path, {"m.record.txt": RECORD.format(offset)}, [CONV], {})
    found.weights["w"], found.activations["x"] = grid([1.0, 1.0]), grid(0.125, 3, signed=False)
    outcome = script("protobuf", monkeypatch).check(found)
    assert (outcome.checked, outcome.different) == (4, different)


def test_text_that_protobuf_does_not_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("protobuf", monkeypatch)
    with pytest.raises(module.cases.Refused, match="Expected string"):
        module.check(case(tmp_path, {"m.record.txt": "record { key: 1 }"}, [CONV], {}))


def test_lines_of_mlir_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("sophgo", monkeypatch)
    text = (
        '    %2 = "top.Weight"() {scale = [1.250000e-01, 5.000000e-01]} : () -> tensor<2x1xf32> loc(#loc2)\n'
        '    %4 = "top.Conv"(%1, %2, %3) {scale = 1} : (tensor<1x!quant.calibrated<f32<-9:9>>>) -> '
        "tensor<1x!quant.calibrated<f32<-1.2E-6:3.000000e+00>>> loc(#loc4)\n"
        '#loc2 = loc("w")\n#loc4 = loc("r_Relu")\n'
    )
    found = module.operations(text)
    assert found["w"].scales == (0.125, 0.5)
    assert found["r_Relu"].operands == ("%1", "%2", "%3")
    assert found["r_Relu"].ends == (-1.2e-6, 3.0)


def test_ranges_of_tpu_mlir_are_held_against_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    agrees = script("sophgo", monkeypatch).agrees
    assert agrees(grid(0.5), (-63.5, 63.5), asymmetric=False)
    assert agrees(grid(0.5), (0.0, 63.5), asymmetric=False)
    assert not agrees(grid(0.5), (-64.0, 63.5), asymmetric=False)
    assert not agrees(grid(0.25), (-63.5, 63.5), asymmetric=False)
    assert agrees(grid(0.5, 100, signed=False), (-50.0, 77.5), asymmetric=True)
    assert not agrees(grid(0.5, 99, signed=False), (-50.0, 77.5), asymmetric=True)


def test_sections_of_a_table_of_sophgo(monkeypatch: pytest.MonkeyPatch) -> None:
    ranges, weights = script("sophgo", monkeypatch).sections(
        "# c\nx 1 -1 1\n#asym_op\n#weight_scale\nx_weight 2 0.1 0.2\n"
    )
    assert ranges == {"x": ["1", "-1", "1"]}
    assert weights == {"x_weight": ["0.1", "0.2"]}


def test_flatbuffers_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table with a number, a default, a vector of floats, a text in a vector, and a table in a vector."""
    builder = flatbuffers.Builder(0)
    name = builder.CreateString("näme")
    builder.StartObject(1)
    builder.PrependFloat32Slot(0, 2.5, 0.0)
    inner = builder.EndObject()
    vectors = []
    for reference in (name, inner):
        builder.StartVector(4, 1, 4)
        builder.PrependUOffsetTRelative(reference)
        vectors.append(builder.EndVector())
    builder.StartVector(4, 2, 4)
    builder.PrependFloat32(0.25)
    builder.PrependFloat32(0.5)
    floats = builder.EndVector()
    builder.StartObject(6)
    builder.PrependInt32Slot(0, -7, 0)
    builder.PrependUOffsetTRelativeSlot(2, floats, 0)
    builder.PrependUOffsetTRelativeSlot(3, vectors[0], 0)
    builder.PrependUOffsetTRelativeSlot(4, vectors[1], 0)
    builder.PrependUOffsetTRelativeSlot(5, inner, 0)
    builder.Finish(builder.EndObject())
    data = bytes(builder.Output())
    table = script("mnn", monkeypatch).Table(data, struct.unpack_from("<I", data, 0)[0])
    assert (table.scalar(0, "i", 0), table.scalar(1, "i", 9), table.scalar(8, "i", 5)) == (-7, 9, 5)
    assert table.numbers(2, "f") == [0.5, 0.25]
    assert table.numbers(1, "f") == []
    assert table.texts(3) == ["näme"]
    assert [each.scalar(0, "f", 0) for each in table.tables(4)] == [2.5]
    assert table.table(5).scalar(0, "f", 0) == 2.5
