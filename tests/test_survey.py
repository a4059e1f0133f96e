"""What is found out about a model without data."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
from conftest import ROOT, Digits
from helpers import build, ingested, normal, save
from onnx import ModelProto, TensorProto, helper

from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.ops import Gradient
from onnxqt.plan import make_plan
from onnxqt.survey import Survey, survey, survey_json
from onnxqt.survey.page import ROWS, amount, headlines, short, tables
from onnxqt.survey.parts import Layer
from onnxqt.trim import reach

SCHEMA = json.loads((ROOT / "onnxqt" / "survey.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)

SMALL = """(float[n, 4] x) => (float[] y) {
    a = Gemm <transB = 1> (x, w, b)
    c = Relu (a)
    y = LayerNormalization (c, s)
}"""
SMALL_CONSTANTS = {"w": normal(6, 4), "b": normal(6), "s": normal(6)}


def surveyed(model: ModelProto | Model) -> Survey:
    model = model if isinstance(model, Model) else ingested(model)
    plan = make_plan(model)
    return survey(model, plan, reach(model, plan))


def layer_of(found: Survey, op_type: str) -> Layer:
    (layer,) = (layer for layer in found.layers if layer.op_type == op_type)
    return layer


def problem(found: Survey, kind: str) -> tuple[str, tuple[str, ...]]:
    """Message and names of the only problem of a kind."""
    ((message, names),) = ((p.message, p.names) for p in found.problems if p.kind == kind)
    return message, names


def page(found: Survey, width: int = 80, everything: bool = False) -> str:
    lines = [*headlines(found, "model.onnx", width, everything)]
    for table in tables(found, width, everything):
        lines += [table.title, *("  ".join(row) for row in table.rows)]
    return "\n".join(lines)


# --- multiply-accumulates -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A node and its MACs, counted by hand."""

    text: str
    shapes: Mapping[str, tuple[int, ...]]
    macs: int


CASES = {
    # 5 x 7 places, 6 channels, 3 inputs each, window of 3 x 3
    "Conv": Case("(float[n, 3, 7, 9] x) => (float[] y) { y = Conv (x, w) }", {"w": (6, 3, 3, 3)}, 35 * 6 * 3 * 9),
    # 8 x 8 places from strides of 2 with pads of 1, 8 channels, 4 / 2 inputs each
    "Conv-groups-strides-pads": Case(
        "(float[n, 4, 16, 16] x) => (float[] y) { y = Conv <group = 2, strides = [2, 2], pads = [1, 1, 1, 1]> (x, w) }",
        {"w": (8, 2, 3, 3)},
        64 * 8 * 2 * 9,
    ),
    # a window of 3 with dilation 2 covers 5: 6 places
    "Conv-dilations": Case(
        "(float[n, 2, 10] x) => (float[] y) { y = Conv <dilations = [2]> (x, w) }", {"w": (5, 2, 3)}, 6 * 5 * 2 * 3
    ),
    "Conv-depthwise": Case(
        "(float[n, 4, 5, 5] x) => (float[] y) { y = Conv <group = 4> (x, w) }", {"w": (4, 1, 3, 3)}, 9 * 4 * 9
    ),
    # each of the 4 x 25 inputs meets 6 / 2 channels and a window of 2 x 2
    "ConvTranspose": Case(
        "(float[n, 4, 5, 5] x) => (float[] y) { y = ConvTranspose <group = 2, strides = [2, 2]> (x, w) }",
        {"w": (4, 3, 2, 2)},
        100 * 3 * 4,
    ),
    "Gemm": Case("(float[n, 4] x) => (float[] y) { y = Gemm (x, w) }", {"w": (4, 6)}, 24),
    "Gemm-transB": Case("(float[n, 4] x) => (float[] y) { y = Gemm <transB = 1> (x, w) }", {"w": (6, 4)}, 24),
    "Gemm-transA": Case(
        "(float[1, 3] x, float[1, 4] z) => (float[] y) { y = Gemm <transA = 1> (x, z) }", {}, 3 * 1 * 4
    ),
    "MatMul": Case("(float[n, 5, 4] x) => (float[] y) { y = MatMul (x, w) }", {"w": (4, 6)}, 5 * 4 * 6),
    "MatMul-stack": Case("(float[n, 3, 5, 4] x) => (float[] y) { y = MatMul (x, w) }", {"w": (3, 4, 6)}, 3 * 5 * 4 * 6),
    "MatMul-activations": Case(
        "(float[n, 2, 5, 4] x, float[n, 2, 4, 7] z) => (float[] y) { y = MatMul (x, z) }", {}, 2 * 5 * 4 * 7
    ),
    "MatMul-broadcast": Case(
        "(float[n, 1, 5, 4] x, float[n, 3, 4, 7] z) => (float[] y) { y = MatMul (x, z) }", {}, 3 * 5 * 4 * 7
    ),
    "MatMul-vector": Case("(float[n, 4] x) => (float[] y) { y = MatMul (x, w) }", {"w": (4,)}, 4),
    "Einsum": Case(
        '(float[n, 5, 4] x, float[n, 6, 4] z) => (float[] y) { y = Einsum <equation = "bik,bjk->bij"> (x, z) }',
        {},
        5 * 4 * 6,
    ),
    "Einsum-ellipsis": Case(
        '(float[n, 3, 5, 4] x) => (float[] y) { y = Einsum <equation = "...ik, kj -> ...ij"> (x, w) }',
        {"w": (4, 7)},
        3 * 5 * 4 * 7,
    ),
    "Einsum-three": Case(
        '(float[n, 2] x, float[n, 3] z) => (float[] y) { y = Einsum <equation = "ni,nj,ij->n"> (x, z, w) }',
        {"w": (2, 3)},
        2 * 2 * 3,
    ),
    "Einsum-one": Case('(float[n, 5, 4] x) => (float[] y) { y = Einsum <equation = "bik->bki"> (x) }', {}, 0),
    # 7 steps; four gates of 3 from 5 inputs and 3 states, in two directions
    "LSTM": Case(
        """(float[n, 7, 5] x) => (float[] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            y = LSTM <hidden_size = 3, direction = "bidirectional"> (t, w, r)
        }""",
        {"w": (2, 12, 5), "r": (2, 12, 3)},
        7 * 2 * 4 * 3 * (5 + 3),
    ),
    "LSTM-peepholes": Case(
        """(float[n, 7, 5] x) => (float[] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            y = LSTM <hidden_size = 3> (t, w, r, , , , , p)
        }""",
        {"w": (1, 12, 5), "r": (1, 12, 3), "p": (1, 9)},
        7 * (4 * 3 * (5 + 3) + 9),
    ),
    "GRU": Case(
        """(float[n, 7, 5] x) => (float[] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            y = GRU <hidden_size = 3> (t, w, r)
        }""",
        {"w": (1, 9, 5), "r": (1, 9, 3)},
        7 * 3 * 3 * (5 + 3),
    ),
    "RNN": Case(
        """(float[n, 7, 5] x) => (float[] y) {
            t = Transpose <perm = [1, 0, 2]> (x)
            y = RNN <hidden_size = 3> (t, w, r)
        }""",
        {"w": (1, 3, 5), "r": (1, 3, 3)},
        7 * 3 * (5 + 3),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_macs(name: str) -> None:
    case = CASES[name]
    found = surveyed(build(case.text, {key: normal(*shape) for key, shape in case.shapes.items()}))
    layer = layer_of(found, name.split("-")[0])
    assert layer.macs == found.macs == case.macs
    assert layer.macs_reason is None
    assert found.unknown_macs == ()


def test_macs_are_those_of_a_sample_of_a_fixed_batch() -> None:
    found = surveyed(build("(float[8, 4] x) => (float[] y) { y = Gemm (x, w) }", {"w": normal(4, 6)}))
    assert (found.batch, found.macs) == (8, 24)
    assert [value.batch_axis for value in (*found.inputs, *found.outputs)] == [0, 0]
    assert "[8, 4], batch axis 0 (always 8)" in page(found)


def test_macs_follow_the_batch_through_computed_shapes() -> None:
    text = """(float[n, 3, 4] x) => (float[] y) {
        a = Reshape (x, target)
        y = MatMul (a, w)
    }"""
    found = surveyed(build(text, {"target": np.array([-1, 4], np.int64), "w": normal(4, 6)}))
    assert layer_of(found, "MatMul").output_shape == (3, 6)
    assert found.macs == 3 * 4 * 6


def test_macs_of_a_free_dimension_are_unknown() -> None:
    text = "(float[n, 3, h, 8] x) => (float[] y) { a = Conv (x, w) b = GlobalAveragePool (a) y = Conv (b, v) }"
    found = surveyed(build(text, {"w": normal(4, 3, 3, 3), "v": normal(5, 4, 1, 1)}))
    assert [layer.macs for layer in found.layers] == [None, 20]
    assert found.layers[0].macs_reason is not None
    assert "unknown" in found.layers[0].macs_reason
    content = survey_json(found)
    assert content["macs"] == {"per_sample": 20, "complete": False, "unknown": [found.layers[0].node]}
    assert content["inputs"][0]["shape"] == ["n", 3, "h", 8]
    assert "at least 20 per sample; unknown for 1 of 2 layers" in page(found)
    message, names = problem(found, "unknown-size")
    assert "a" in names
    assert "free in 1 input ('x')" in message
    assert "the MACs of 1 layer are unknown" in message


# --- parameters -----------------------------------------------------------------------------------------


def test_parameters_and_bytes() -> None:
    content = survey_json(surveyed(build(SMALL, SMALL_CONSTANTS)))["parameters"]
    assert content["weights"] == {"tensors": 1, "count": 24, "bytes": 96}
    assert content["biases"] == {"tensors": 1, "count": 6, "bytes": 24}
    assert content["float"] == {"tensors": 1, "count": 6, "bytes": 24}
    assert content["total"] == {"tensors": 3, "count": 36, "bytes": 144}
    (kept,) = content["float_tensors"]
    assert (kept["tensor"], kept["shape"], kept["count"]) == ("s", [6], 6)
    assert kept["reason"].startswith("LayerNormalization '")
    assert kept["reason"].endswith(": no integer form")


def test_shared_parameters_count_once() -> None:
    text = "(float[n, 4] x) => (float[] y) { a = MatMul (x, w) b = Relu (a) y = MatMul (b, w) }"
    found = surveyed(build(text, {"w": normal(4, 4)}))
    assert survey_json(found)["parameters"]["total"] == {"tensors": 1, "count": 16, "bytes": 64}
    assert [layer.parameters for layer in found.layers] == [16, 16]
    assert found.macs == 32


def conditional() -> ModelProto:
    """An If whose branches multiply by a weight of their own."""
    text = """(float[n, 4] x, bool c) => (float[n, 4] y) {
        y = If (c) <
            then_branch = yes () => (float[n, 4] p) { p = Mul (x, factor) },
            else_branch = no () => (float[n, 4] q) { k = Constant <value = float[4] {1, 2, 3, 4}> () q = Add (x, k) }
        >
    }"""
    return build(text, {"factor": normal(4)})


def test_parameters_of_subgraphs_count_and_stay_float() -> None:
    found = surveyed(conditional())
    assert survey_json(found)["parameters"]["float"]["count"] == 8
    assert any("subgraph of If" in parameter.reason for parameter in found.parameters)
    assert layer_of(found, "If").parameters == 8
    assert layer_of(found, "If").macs == 0


# --- what happens to each node --------------------------------------------------------------------------


def test_layers_say_why() -> None:
    found = surveyed(build(SMALL, SMALL_CONSTANTS))
    gemm, norm = found.layers
    assert (gemm.op_type, gemm.weight, gemm.weight_shape, gemm.parameters) == ("Gemm", "w", (6, 4), 30)
    assert (gemm.quantized, gemm.quantized_reason, gemm.trained, gemm.trained_reason) == (True, None, True, None)
    assert gemm.output_shape == (1, 6)
    assert (norm.op_type, norm.weight, norm.parameters, norm.macs) == ("LayerNormalization", "s", 6, 0)
    assert (norm.quantized, norm.quantized_reason) == (False, "no integer form")
    assert norm.trained_reason == "stays float: only weights and biases of integer nodes are trained"


def test_operators_say_how_they_are_treated() -> None:
    found = {operator.op_type: operator for operator in surveyed(build(SMALL, SMALL_CONSTANTS)).operators}
    assert list(found) == ["Gemm", "Relu", "LayerNormalization"]
    assert (found["Gemm"].integer, found["Gemm"].trained, found["Gemm"].stopped) == (1, 1, 0)
    assert (found["Relu"].fused, found["Relu"].gradient) == (1, Gradient.NATIVE)
    assert (found["LayerNormalization"].float, found["LayerNormalization"].gradient) == (1, Gradient.RULE)


STOPPED = """(float[n, 4] x) => (float[] y) {
    a = MatMul (x, w)
    b = Round (a)
    y = MatMul (b, v)
}"""


def test_what_stops_gradients_is_named() -> None:
    found = surveyed(build(STOPPED, {"w": normal(4, 4), "v": normal(4, 4)}))
    (stopping,) = (operator for operator in found.operators if operator.op_type == "Round")
    assert (stopping.stopped, stopping.reason) == (1, "has a derivative of zero everywhere")
    first, last = (layer for layer in found.layers if layer.op_type == "MatMul")
    assert (first.trained, last.trained) == (False, True)
    assert first.trained_reason is not None
    assert "no gradient passes Round" in first.trained_reason
    assert "moves 1 of 2 weights and biases; 1 stay as they are: no gradient passes Round" in " ".join(
        page(found).split()
    )
    assert survey_json(found)["training"] == {
        "trained": ["v"],
        "untouched": {"w": first.trained_reason},
        "reason": None,
    }


def test_inputs_outputs_and_opset(tmp_path: Path) -> None:
    model = build("(float[batch, 4] x, int64[batch, seq] i) => (float[] y) { y = Relu (x) }", opset=15)
    found = surveyed(ingest(save(model, tmp_path)))
    assert (found.original_opset, found.opset) == (15, 17)
    assert [(v.name, v.dtype, v.shape, v.batch_axis) for v in found.inputs] == [
        ("x", "float32", ("batch", 4), 0),
        ("i", "int64", ("batch", "seq"), 0),
    ]
    assert [(v.name, v.shape, v.batch_axis) for v in found.outputs] == [("y", ("batch", 4), 0)]
    assert "opset 15, read as 17" in page(found)


# --- problems -------------------------------------------------------------------------------------------


def test_no_problems(digits: Digits) -> None:
    found = surveyed(digits.model)
    assert found.problems == ()
    assert "none found" in page(found)
    assert len(found.reach.trained) == len(found.parameters_of("weight")) + len(found.parameters_of("bias"))
    assert f"moves all {len(found.reach.trained)} weights and biases" in page(found)


PROBLEMS: dict[str, tuple[str, Mapping[str, Array], str, set[str]]] = {
    "nothing-to-quantize": ("(float[n, 4] x) => (float[] y) { y = Sin (x) }", {}, "nothing would be quantized", set()),
    "nothing-to-train": ("(float[n, 4] x) => (float[] y) { y = Sin (x) }", {}, "nothing would be trained", set()),
    "no-batch-axis": ("(float[2, 4] x, float[4] z) => (float[] y) { y = Mul (x, z) }", {}, "one sample", {"x", "z"}),
    "no-inputs": ("() => (float[4] y) { y = RandomNormal <shape = [4]> () }", {}, "no inputs", set()),
    "unknown-size": (
        "(float[n, 4] x) => (float[] y) { i = NonZero (x) f = Cast <to = 1> (i) y = Sin (f) }",
        {},
        "of a size that does not follow from the batch",
        {"f", "y"},
    ),
    "not-finite": (
        "(float[n, 4] x) => (float[] y) { y = MatMul (x, w) }",
        {"w": np.array([[1, np.nan]] * 4, np.float32)},
        r"1 weight ('w') with NaN",
        {"w"},
    ),
    "all-zero": (
        "(float[n, 4] x) => (float[] y) { y = MatMul (x, w) }",
        {"w": np.zeros((4, 2), np.float32)},
        "nothing but zeros",
        {"w"},
    ),
    "outliers": (
        "(float[n, 40] x) => (float[] y) { y = MatMul (x, w) }",
        {"w": np.concatenate([np.full((40, 29), 0.5), np.eye(40, 1) * -25.1], axis=1).astype(np.float32)},
        "over 50 times the 99.9th percentile",
        {"w"},
    ),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_problem(kind: str) -> None:
    text, constants, words, names = PROBLEMS[kind]
    found = surveyed(build(text, constants))
    message, named = problem(found, kind)
    assert words in message
    assert set(named) == names
    assert " ".join(message.split()) in " ".join(page(found).split())
    VALIDATOR.validate(survey_json(found))


def test_just_below_the_limit_is_no_outlier() -> None:
    weight = np.concatenate([np.full((40, 29), 0.5), np.eye(40, 1) * -24.9], axis=1).astype(np.float32)
    found = surveyed(build("(float[n, 40] x) => (float[] y) { y = MatMul (x, w) }", {"w": weight}))
    assert found.problems == ()


def test_infinities_that_are_added_are_masks() -> None:
    constants = {"w": normal(4, 2), "mask": np.array([[0, -np.inf]], np.float32)}
    text = "(float[n, 4] x) => (float[] y) { a = MatMul (x, w) b = Sin (a) c = Add (b, mask) y = Softmax (c) }"
    assert surveyed(build(text, constants)).problems == ()


def test_infinite_weight_is_a_problem() -> None:
    weight = np.full((4, 2), -np.inf, np.float32)
    found = surveyed(build("(float[n, 4] x) => (float[] y) { y = MatMul (x, w) }", {"w": weight}))
    assert problem(found, "not-finite")[1] == ("w",)


def test_subgraph_is_a_problem() -> None:
    message, names = problem(surveyed(conditional()), "subgraph")
    assert len(names) == 1
    assert "stay float, and no gradient passes" in message


def test_input_that_takes_no_numbers_is_a_problem() -> None:
    text = '(string[n] x) => (int64[n] y) { y = LabelEncoder <keys_strings = ["a"], values_int64s = [1]> (x) }'
    found = surveyed(build(text.replace("LabelEncoder", "ai.onnx.ml.LabelEncoder"), domains=', "ai.onnx.ml": 2'))
    assert "input 'x' takes strings" in problem(found, "unusable-input")[0]
    assert (found.inputs[0].dtype, found.inputs[0].shape, found.inputs[0].batch_axis) == ("string", ("n",), None)
    VALIDATOR.validate(survey_json(found))


def test_tensors_of_unknown_rank_are_a_problem() -> None:
    found = surveyed(build("(float[n, 4] x) => (float[n, 6] y) { a = acme.Fold (x) y = acme.Fold (a) }", domains=ACME))
    assert problem(found, "unknown-rank")[1] == ("a",)


ACME = ', "acme": 1'


def foreign() -> ModelProto:
    text = "(float[n, 4] x) => (float[n, 6] y) { a = acme.Fold (x) y = MatMul (a, w) }"
    return build(text, {"w": normal(4, 6)}, domains=ACME)


def test_operators_that_onnx_runtime_lacks_are_named() -> None:
    found = surveyed(foreign())
    message, names = problem(found, "cannot-run")
    assert message.startswith("ONNX Runtime cannot run the model: ")
    assert "\n" not in message
    assert names == ("acme::Fold",)
    assert "acme::Fold" in message
    assert layer_of(found, "Fold").macs is None
    assert layer_of(found, "Fold").macs_reason == "'Fold' is an operator of the domain 'acme'"
    VALIDATOR.validate(survey_json(found))


def test_large_models_are_surveyed_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["onnxqt.ingest.files"], "EMBED_LIMIT", 1 << 20)
    weight = normal(512, 1024)
    weight[0, 0] = np.nan
    model = build("(float[n, 512] x) => (float[] y) { y = MatMul (x, w) }", {"w": weight})
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    found = surveyed(ingest(path))
    assert "'onnxqt export' quantizes the model" in problem(found, "large")[0]
    assert problem(found, "not-finite")[1] == ("w",)
    assert found.macs == 512 * 1024


# --- its forms ------------------------------------------------------------------------------------------


def test_json_follows_its_schema(digits: Digits) -> None:
    VALIDATOR.check_schema(SCHEMA)
    content = json.loads(json.dumps(survey_json(surveyed(digits.model)), allow_nan=False))
    VALIDATOR.validate(content)
    for key in SCHEMA["required"]:
        with pytest.raises(jsonschema.ValidationError, match=f"'{key}' is a required property"):
            VALIDATOR.validate({name: value for name, value in content.items() if name != key})


def test_schema_wants_reasons(digits: Digits) -> None:
    content: dict[str, Any] = survey_json(surveyed(digits.model))
    content["layers"][0]["quantized"] = False
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(content)


def deep(layers: int) -> Survey:
    names = [f"t{index}" for index in range(layers + 1)]
    nodes = [
        helper.make_node(
            op, ["x" if index == 0 else names[index - 1], "w"], [names[index]], f"/a/very/long/name/{index}"
        )
        for index, op in enumerate(["MatMul"] * layers)
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])
    y = helper.make_tensor_value_info(names[layers - 1], TensorProto.FLOAT, ["n", 4])
    weight = onnx.numpy_helper.from_array(normal(4, 4), "w")
    graph = helper.make_graph(nodes, "g", [x], [y], [weight])
    return surveyed(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_long_tables_are_cut_and_say_so() -> None:
    found = deep(ROWS + 5)
    cut = next(table for table in tables(found, 80) if table.title.startswith("layers"))
    assert len(cut.rows) == 1 + ROWS
    assert cut.title == f"layers: those with most MACs, {ROWS} of {ROWS + 5} (--all and --json have all)"
    full = next(table for table in tables(found, 80, everything=True) if table.title.startswith("layers"))
    assert full.title == "layers"
    assert len(full.rows) == 1 + ROWS + 5
    assert len(survey_json(found)["layers"]) == ROWS + 5


@pytest.mark.parametrize("width", [60, 80, 160])
def test_page_fits_the_terminal(width: int) -> None:
    found = deep(30)
    assert all(len(line) <= width for text in headlines(found, "model.onnx", width) for line in text.splitlines())
    layers = next(table for table in tables(found, width) if table.title.startswith("layers"))
    assert all(sum(map(len, row)) + 3 * (len(row) - 1) <= width for row in layers.rows)
    assert ("output" in layers.rows[0]) == (width == 160)


def test_changes_of_one_kind_are_one_line() -> None:
    model = ingested(build(SMALL, SMALL_CONSTANTS))
    changes = ("folded 2 nodes", *(f"wrote the target of Reshape '{name}' as [0, {name}]" for name in ("1", "2", "3")))
    found = surveyed(Model(model.proto, model.sha256, changes))
    assert "3 times: wrote the target of Reshape '1' as [0, 1]" in page(found, 160)
    assert all(change in page(found, 160, everything=True) for change in changes)
    assert survey_json(found)["changes"] == list(changes)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (9999, "9,999"), (10_000, "10.0 k"), (123_456, "123 k"), (999_600, "1.00 M"), (4_089_284_608, "4.09 G")],
)
def test_amounts_are_short(count: int, text: str) -> None:
    assert amount(count) == text


def test_short_names_keep_both_ends() -> None:
    assert short("/blocks.0/attention/query/MatMul", 16) == "/blocks…y/MatMul"
    assert len(short("/blocks.0/attention/query/MatMul", 16)) == 16
    assert short("conv", 16) == "conv"
