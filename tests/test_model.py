"""Ingest: each pass changes what it should, nothing else, and never what the model computes."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import batch_norm, build, ingested, inputs_of, normal, operators, relative_error, run, save
from onnx import ModelProto, TensorProto, helper

from onnxqt.ingest import ingest
from onnxqt.numerics import Array

# Folded weights are products of float64 rounded once to float32 (2^-24 = 6e-8 each), and sums of K <= 100 products
# move by about sqrt(K) 2^-24 < 1e-6 of their largest value. 1e-5 leaves a decade and is far from any real change.
FOLD_ERROR = 1e-5

CONV = "(float[n,4,6,6] x) => (float[] y)"
ROWS = "(float[n,4] x) => (float[] y)"


@dataclass(frozen=True)
class Case:
    """A graph and the operators that ingest leaves of it."""

    text: str
    operators: list[str]
    constants: Mapping[str, Array] = field(default_factory=dict)
    opset: int = 17


def affine(**constants: Array) -> dict[str, Array]:
    return {"w": normal(3, 4, 3, 3), "b": normal(3, seed=1), **constants}


CASES = {
    # constant folding
    "weight-computed-from-constants": Case(
        f"{CONV} {{ s = Add(u, v) w = Mul(s, u) y = Conv(x, w) }}",
        ["Conv"],
        {"u": normal(3, 4, 3, 3), "v": normal(3, 4, 3, 3, seed=1)},
    ),
    "constant-nodes-of-every-form": Case(
        "(float[n,4] x) => (float[n,1] y) { f = Constant<value_float = 2.5>() a = Mul(x, f) "
        "fs = Constant<value_floats = [1.0, -2.0, 3.0, 4.0]>() c = Add(a, fs) "
        "i = Constant<value_int = 1>() is = Constant<value_ints = [-1]>() u = Unsqueeze(i, is) d = ReduceSum(c, u) "
        "t = Constant<value = float[2, 1] {3.0, -1.0}>() y = Add(d, t) }",
        ["Mul", "Add", "ReduceSum", "Add"],
    ),
    "shape-of-known-dimensions": Case(
        "(float[2,4,6] x) => (float[] y) { r = Relu(x) s = Shape(r) k = Shape<start = 1, end = -1>(r) "
        "p = Concat<axis = 0>(k, s) y = Expand(x, p) }",
        ["Expand"],
    ),
    "shape-of-free-dimensions-stays": Case(f"{ROWS} {{ s = Shape(x) y = Cast<to = 1>(s) }}", ["Shape", "Cast"]),
    "fraction-of-an-integer-is-not-folded-to-zero": Case(
        "(int64[n,3] x) => (float[] y) "
        "{ f = Cast<to = 1>(x) h = Mul(f, half) i = Cast<to = 7>(h) y = Cast<to = 1>(i) }",
        ["Cast", "Mul", "Cast", "Cast"],
        {"half": np.array(0.5, np.float32)},
    ),
    # Identity and Dropout
    "identity-and-dropout": Case(
        f"{CONV} {{ a = Identity(x) b, mask = Dropout(a) c = Identity(b) d = Relu(c) y = Neg(d) }}", ["Relu", "Neg"]
    ),
    "identity-that-names-an-output": Case(f"{CONV} {{ a = Relu(x) y = Identity(a) }}", ["Relu"]),
    "identity-that-names-an-output-read-elsewhere": Case(
        "(float[n,4] x) => (float[] y, float[] z) { a = Relu(x) y = Identity(a) z = Neg(a) }",
        ["Relu", "Identity", "Neg"],
    ),
    "identity-of-an-input-that-is-an-output": Case(f"{CONV} {{ y = Identity(x) }}", ["Identity"]),
    "identity-of-a-constant-that-is-an-output": Case(
        "(float[n,4] x) => (float[] y, float[] z) { y = Relu(x) z = Identity(w) }",
        ["Relu", "Identity"],
        {"w": normal(2)},
    ),
    "dropout-whose-mask-is-read": Case(
        f"{CONV} {{ a, mask = Dropout(x) m = Cast<to = 1>(mask) y = Add(a, m) }}", ["Dropout", "Cast", "Add"]
    ),
    "dropout-whose-mask-is-an-output": Case(
        "(float[n,4] x) => (float[] y, bool[] mask) { a, mask = Dropout(x) y = Relu(a) }", ["Dropout", "Relu"]
    ),
    "dropout-told-not-to-train": Case(
        f"{ROWS} {{ a = Dropout(x, ratio, no) y = Relu(a) }}",
        ["Relu"],
        {"ratio": np.array(0.5, np.float32), "no": np.array(False)},
    ),
    # BatchNormalization
    "bn-conv": Case(
        f"{CONV} {{ c = Conv(x, w) y = BatchNormalization<epsilon = 0.1>(c, gamma, beta, mean, var) }}",
        ["Conv"],
        {"w": normal(3, 4, 3, 3), **batch_norm(3)},
    ),
    "bn-conv-groups-bias": Case(
        f"{CONV} {{ c = Conv<group = 2>(x, w, b) y = BatchNormalization(c, gamma, beta, mean, var) }}",
        ["Conv"],
        {"w": normal(6, 2, 3, 3), "b": normal(6, seed=1), **batch_norm(6)},
    ),
    **{
        f"bn-convtranspose-{groups}-groups": Case(
            f"{CONV} {{ c = ConvTranspose<group = {groups}, strides = [2, 1]>(x, w, b) "
            "y = BatchNormalization(c, gamma, beta, mean, var) }",
            ["ConvTranspose"],
            {"w": normal(4, 3, 3, 3), "b": normal(3 * groups, seed=1), **batch_norm(3 * groups)},
        )
        for groups in (1, 2)
    },
    **{
        f"bn-gemm-transb-{trans}-factors-{alpha}-{beta}": Case(
            f"{ROWS} {{ c = Gemm<transB = {trans}, alpha = {alpha}, beta = {beta}>(x, w, b) "
            "y = BatchNormalization(c, gamma, beta, mean, var) }",
            ["Gemm"],
            {"w": normal(3, 4) if trans else normal(4, 3), "b": normal(3, seed=1), **batch_norm(3)},
        )
        for trans, (alpha, beta) in itertools.product((0, 1), ((1.0, 1.0), (0.3, 2.5)))
    },
    "bn-alone": Case(
        f"{CONV} {{ r = Relu(x) y = BatchNormalization(r, gamma, beta, mean, var) }}",
        ["Relu", "Mul", "Add"],
        batch_norm(4),
    ),
    "bn-behind-a-convolution-read-twice": Case(
        f"{CONV} {{ c = Conv(x, w) d = BatchNormalization(c, gamma, beta, mean, var) y = Add(c, d) }}",
        ["Conv", "Mul", "Add", "Add"],
        {"w": normal(3, 4, 3, 3), **batch_norm(3)},
    ),
    "bn-behind-a-convolution-that-an-if-reads": Case(
        f"{CONV} {{ c = Conv(x, w) d = BatchNormalization(c, gamma, beta, mean, var) "
        "m = ReduceMax<keepdims = 0>(c) t = Greater(m, zero) "
        "e = If(t) <then_branch = a () => (float[n,3,4,4] p) { p = Relu(c) }, "
        "else_branch = o () => (float[n,3,4,4] q) { q = Neg(c) }> y = Sub(d, e) }",
        ["Conv", "ReduceMax", "Mul", "Greater", "Add", "If", "Sub"],
        {"w": normal(3, 4, 3, 3), "zero": np.array(0, np.float32), **batch_norm(3)},
    ),
    "bn-behind-a-computed-weight": Case(
        "(float[n,4,6,6] x, float[3,4,3,3] w) => (float[] y) "
        "{ c = Conv(x, w) y = BatchNormalization(c, gamma, beta, mean, var) }",
        ["Conv", "Mul", "Add"],
        batch_norm(3),
    ),
    # Mul and Add per channel
    "mul-then-add": Case(
        f"{CONV} {{ c = Conv(x, w, b) d = Mul(m, c) y = Add(d, a) }}",
        ["Conv"],
        affine(m=normal(1, 3, 1, 1, seed=2), a=normal(3, 1, 1, seed=3)),
    ),
    "add-of-a-scalar": Case(f"{CONV} {{ c = Conv(x, w) y = Add(c, a) }}", ["Conv"], affine(a=normal(1, seed=2))),
    "mul-behind-a-gemm": Case(
        f"{ROWS} {{ c = Gemm<transB = 1>(x, w) y = Mul(c, m) }}", ["Gemm"], {"w": normal(3, 4), "m": normal(3, seed=1)}
    ),
    "mul-along-width-stays": Case(
        f"{CONV} {{ c = Conv(x, w) y = Mul(c, m) }}", ["Conv", "Mul"], affine(m=normal(4, seed=2))
    ),
    "add-along-the-batch-stays": Case(
        "(float[2,4,6,6] x) => (float[] y) { c = Conv(x, w) y = Add(c, a) }",
        ["Conv", "Add"],
        affine(a=normal(2, 1, 1, 1, seed=2)),
    ),
    "mul-that-adds-channels-stays": Case(
        f"{CONV} {{ c = Conv(x, w) y = Mul(c, m) }}",
        ["Conv", "Mul"],
        {"w": normal(1, 4, 3, 3), "m": normal(1, 5, 1, 1, seed=2)},
    ),
    "add-that-adds-an-axis-stays": Case(
        f"{CONV} {{ c = Conv(x, w) y = Add(c, a) }}", ["Conv", "Add"], affine(a=normal(1, 1, 3, 1, 1, seed=2))
    ),
    "mul-behind-a-convolution-read-twice-stays": Case(
        f"{CONV} {{ c = Conv(x, w) d = Mul(c, m) y = Sub(c, d) }}", ["Conv", "Mul", "Sub"], affine(m=normal(1, seed=2))
    ),
    "mul-behind-an-output-stays": Case(
        "(float[n,4,6,6] x) => (float[] c, float[] y) { c = Conv(x, w) y = Mul(c, m) }",
        ["Conv", "Mul"],
        affine(m=normal(1, seed=2)),
    ),
    # Gemm alpha and beta
    "gemm-factors": Case(
        f"{ROWS} {{ y = Gemm<alpha = 0.3, beta = -2.5>(x, w, b) }}",
        ["Gemm"],
        {"w": normal(4, 3), "b": normal(3, seed=1)},
    ),
    "gemm-factors-of-a-weight-that-others-read": Case(
        "(float[n,4] x) => (float[] fc, float[] y) { fc = Gemm<alpha = 0.5>(x, fc_weight) y = MatMul(x, fc_weight) }",
        ["Gemm", "MatMul"],
        {"fc_weight": normal(4, 3)},
    ),
    # opsets
    "opset-11": Case(
        f"{CONV} {{ c = Conv(x, w) d = BatchNormalization(c, gamma, beta, mean, var) e = Dropout<ratio = 0.3>(d) "
        "f = Unsqueeze<axes = [0]>(e) g = ReduceSum<axes = [3], keepdims = 0>(f) y = Softmax<axis = 2>(g) }",
        ["Conv", "Unsqueeze", "ReduceSum", "Flatten", "Softmax", "Reshape"],
        {"w": normal(3, 4, 3, 3), **batch_norm(3)},
        opset=11,
    ),
    "opset-22": Case(f"{CONV} {{ c = Conv(x, w) y = Relu(c) }}", ["Conv", "Relu"], affine(), opset=21),
}


def changed_factors(model: ModelProto) -> set[str]:
    return {a.name for node in model.graph.node for a in node.attribute if a.name in ("alpha", "beta") and a.f != 1.0}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_passes_keep_what_the_model_computes(case: Case) -> None:
    before = build(case.text, case.constants, case.opset)
    after = ingested(before).proto
    assert operators(after) == case.operators
    assert not changed_factors(after)
    inputs = inputs_of(before)
    expected, actual = run(before, inputs), run(after, inputs)
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype)
        assert relative_error(actual[name], value) <= FOLD_ERROR


# --- weights that several nodes read ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "copies"),
    [
        ("y = Gemm(x, w) z = Gemm<transB = 1>(x, w)", 2),
        ("y = Gemm<transB = 1>(x, w) z = MatMul(x, w)", 2),
        ("y = Gemm(x, w) z = Add(x, w)", 2),
        ("y = Gemm(x, w) z = MatMul(w, x)", 2),
        ("y = Gemm(x, w) z = Gemm(x, w)", 1),
        ("y = Gemm(x, w) z = MatMul(x, w)", 1),
        ("y = Gemm<transB = 1>(x, w) a = Relu(x) z = Gemm<transB = 1>(a, w)", 1),
    ],
)
def test_a_weight_has_one_copy_for_each_channel_axis(nodes: str, copies: int) -> None:
    before = build(f"(float[4,4] x) => (float[] y, float[] z) {{ {nodes} }}", {"w": normal(4, 4)})
    model = ingested(before)
    assert len(model.graph.initializers) == copies
    assert sum("duplicated weight 'w'" in change for change in model.changes) == copies - 1
    inputs = inputs_of(before)
    for name, value in run(before, inputs).items():
        np.testing.assert_array_equal(run(model.proto, inputs)[name], value)


def test_a_tied_embedding_becomes_a_table_and_a_weight() -> None:
    text = "(int64[n,5] ids) => (float[] y) { e = Gather(table, ids) w = Transpose(table) y = MatMul(e, w) }"
    before = build(text, {"table": normal(7, 6)})
    model = ingested(before)
    assert [tuple(tensor.dims) for tensor in model.graph.initializers.values()] == [(7, 6), (6, 7)]
    inputs = inputs_of(before)
    np.testing.assert_array_equal(run(model.proto, inputs)["y"], run(before, inputs)["y"])


def rename(model: ModelProto, old: str, new: str) -> None:
    """Rename an initializer to what ONNX text has no word for."""
    for tensor in model.graph.initializer:
        tensor.name = new if tensor.name == old else tensor.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]


@pytest.mark.parametrize(
    ("nodes", "name"),
    [
        ("fc = Gemm<alpha = 0.5>(x, w) y = Gemm(x, w)", "fc.weight"),
        ("fc = Gemm<beta = 0.5>(x, x, w) y = Gemm(x, x, w)", "fc.bias"),
        ("fc = BatchNormalization(x, w, w, w, v) y = Mul(x, w)", "fc.scale"),
        ("fc = Gemm(x, w) y = Gemm<transB = 1>(x, w) z = Mul(x, u)", "w.axis_0"),
    ],
)
def test_new_constants_take_no_name_that_is_in_use(nodes: str, name: str) -> None:
    """Exporters do call an output `fc` and its weight `fc.weight`."""
    constants = {"w": normal(4, 4) if "BatchN" not in nodes else normal(4), "v": normal(4) ** 2, "u": normal(4, seed=2)}
    before = build(f"(float[4,4] x) => (float[] fc, float[] y) {{ {nodes} }}", constants)
    rename(before, "u" if name == "w.axis_0" else "w", name)
    inputs = inputs_of(before)
    expected, actual = run(before, inputs), run(ingested(before).proto, inputs)
    for output, value in expected.items():
        assert relative_error(actual[output], value) <= FOLD_ERROR


# --- what the user sees -------------------------------------------------------------------------------------


def test_inputs_and_outputs_stay_as_they_are() -> None:
    """Names, types and order, with an unused input, an output per kind of node, and one that is constant."""
    before = build(
        "(float[n,3] z, int64[n] unused, float[n,2] a, bool[n] m) "
        "=> (float[] last, float[] first, bool[] copy, float[] fixed, float[] normed) "
        "{ last = Relu(z) b = Identity(a) first = Neg(b) copy = Identity(m) fixed = Add(c, c) "
        "g = Gemm(z, w) normed = BatchNormalization(g, gamma, beta, mean, var) }",
        {"c": normal(2), "w": normal(3, 4), **batch_norm(4)},
    )
    model = ingested(before)
    after = model.proto.graph
    for theirs, ours in ((before.graph.input, after.input), (before.graph.output, after.output)):
        assert [(value.name, value.type) for value in ours] == [(value.name, value.type) for value in theirs]
    assert model.graph.inputs == ("z", "unused", "a", "m")
    assert model.graph.outputs == ("last", "first", "copy", "fixed", "normed")
    assert [str(model.graph.dtype(name)) for name in model.graph.inputs] == ["float32", "int64", "float32", "bool"]
    inputs = inputs_of(before)
    np.testing.assert_array_equal(run(model.proto, inputs)["fixed"], run(before, inputs)["fixed"])


def test_initializers_that_are_inputs_too_are_constants() -> None:
    """IR version 3 lists every initializer among the inputs."""
    text = "(float[n,4,6,6] x) => (float[n,3,4,4] y) { w = Add(u, u) y = Conv(x, w) }"
    before = build(text, {"u": normal(3, 4, 3, 3)}, opset=9, ir_version=3)
    before.graph.input.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, (3, 4, 3, 3)))
    model = ingested(before)
    assert model.graph.inputs == ("x",)
    assert operators(model.proto) == ["Conv"]


@pytest.mark.parametrize(
    ("opset", "expected"), [(7, 17), (11, 17), (16, 17), (17, 17), (19, 19), (21, 21), (22, 21), (24, 21)]
)
def test_opset_is_between_17_and_21(opset: int, expected: int) -> None:
    before = build(f"{CONV} {{ c = Conv(x, w) y = Relu(c) }}", {"w": normal(3, 4, 3, 3)}, opset)
    model = ingested(before)
    assert model.opset == expected
    note = f"converted opset {opset} to {expected}"
    assert (note in model.changes) == (opset != expected)


@pytest.mark.parametrize(("ir_version", "opset", "expected"), [(13, 17, 10), (4, 17, 8), (9, 18, 9), (8, 21, 10)])
def test_ir_version_is_read_by_onnx_runtime_and_knows_the_opset(ir_version: int, opset: int, expected: int) -> None:
    """Constants are folded whatever the version, in subgraphs too: ONNX Runtime 1.19 refuses more than 10."""
    before = build(
        f"{CONV} {{ w = Add(u, u) c = Conv(x, w) m = ReduceMax<keepdims = 0>(c) t = Cast<to = 9>(m) "
        "y = If(t) <then_branch = a () => (float[n,3,4,4] p) { k = Add(u, u) p = Conv(x, k) }, "
        "else_branch = o () => (float[n,3,4,4] q) { q = Neg(c) }> }",
        {"u": normal(3, 4, 3, 3)},
        opset,
        ir_version,
    )
    after = ingested(before).proto
    assert after.ir_version == expected
    branch = next(a.g for a in after.graph.node[-1].attribute if a.name == "then_branch")
    assert operators(after) == ["Conv", "ReduceMax", "Cast", "If"]
    assert [node.op_type for node in branch.node] == ["Conv"]


def test_nodes_get_unique_names_and_keep_those_they_have() -> None:
    nodes = "a = Relu(x) b = Neg(a) c = Abs(b) d = Relu(c) y = BatchNormalization(d, gamma, beta, mean, var)"
    before = build(f"{ROWS} {{ {nodes} }}", batch_norm(4))
    for node, name in zip(before.graph.node, ("", "twin", "twin", "bn.scale", "bn"), strict=True):
        node.name = name
    names = [node.name for node in ingested(before).graph.nodes]
    assert len(set(names)) == len(names)
    assert all(names)
    assert names[1] == "twin"


def test_foreign_operators_keep_the_types_that_the_file_gives() -> None:
    """onnx cannot infer what they give out, and without a type nothing behind them could be quantized."""
    text = "(float[n,3] x) => (float[n,2] y) <float[n,3] g> { g = com.microsoft.QuickGelu(x) y = Gemm(g, w) }"
    model = ingested(build(text, {"w": normal(3, 2)}, domains=', "com.microsoft": 1'))
    assert model.graph.is_float("g")
    assert model.graph.shape("g") == (None, 3)


def test_functions_of_the_model_are_inlined() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    main (float[n,3] x) => (float[n,3] y) { y = local.twice(x) }
    <domain: "local", opset_import: ["": 17]> twice (a) => (b) { t = Add(a, a) b = Neg(t) }"""
    before = onnx.parser.parse_model(text)
    model = ingested(before)
    assert operators(model.proto) == ["Add", "Neg"]
    assert not model.proto.functions
    assert "inlined 1 model-local function(s)" in model.changes


IDEMPOTENT = [
    *("weight-computed-from-constants", "shape-of-known-dimensions", "bn-conv-groups-bias", "bn-alone"),
    *("bn-behind-a-convolution-that-an-if-reads", "mul-then-add", "gemm-factors", "opset-11"),
]


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_ingest_of_its_own_result_changes_nothing(name: str) -> None:
    once = ingested(build(CASES[name].text, CASES[name].constants, CASES[name].opset))
    twice = ingested(once.proto)
    assert once.changes
    assert not twice.changes
    assert twice.proto == once.proto


# --- the ingested model ---------------------------------------------------------------------------------------


def test_sha256_is_of_the_file_and_its_external_data(tmp_path: Path) -> None:
    before = build(f"{ROWS} {{ y = Gemm(x, w) }}", {"w": normal(4, 3)})
    digests = [ingest(save(before, tmp_path)).sha256 for _ in range(2)]
    assert digests[0] == digests[1]
    path = tmp_path / "external.onnx"
    onnx.save(before, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    external = ingest(path)
    np.testing.assert_array_equal(external.graph.constant("w"), normal(4, 3))
    (tmp_path / "weights.bin").write_bytes(normal(4, 3, seed=1).tobytes())
    assert len({*digests, external.sha256, ingest(path).sha256}) == 3


def test_with_weights_leaves_the_model_alone() -> None:
    model = ingested(build(f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": normal(4, 3), "b": normal(3)}))
    untouched = model.proto.SerializeToString()
    changed = model.with_weights({"w": np.ones((4, 3), np.float64)})
    assert model.proto.SerializeToString() == untouched
    np.testing.assert_array_equal(changed.graph.constant("w"), np.ones((4, 3), np.float32))
    np.testing.assert_array_equal(changed.graph.constant("b"), normal(3))


def test_graph_index_knows_producers_readers_and_types() -> None:
    case = CASES["bn-behind-a-convolution-that-an-if-reads"]
    graph = ingested(build(case.text, case.constants)).graph
    assert graph.producer["c"].op_type == "Conv"
    assert {node.op_type for node in graph.consumers["c"]} == {"Mul", "ReduceMax", "If"}
    assert next(node for node in graph.nodes if node.op_type == "If").captured == ("c",)
    assert graph.shape("c") == (None, 3, 4, 4)
    assert graph.shape("w") == (3, 4, 3, 3)
    assert graph.is_float("c")
    assert not graph.is_float("t")
    assert graph.constant("c") is None
    np.testing.assert_array_equal(graph.constant("zero"), np.float32(0))


def test_metadata_of_the_model_is_kept(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> net (float[n,2] x) => (float[n,2] y) { y = Relu(x) }'
    )
    onnx.helper.set_model_props(model, {"labels": "cat,dog"})
    onnx.save(model, tmp_path / "model.onnx")
    assert [(p.key, p.value) for p in ingest(tmp_path / "model.onnx").proto.metadata_props] == [("labels", "cat,dog")]
