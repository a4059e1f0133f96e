"""Constants of every form, nodes that only move them, branches, functions, and what else exporters leave behind."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import build, ingested, inputs_of, normal, operators, relative_error, run, save
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxqt.errors import ModelError
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.tensors import is_external

# Nothing here changes an operation; ONNX Runtime may sum in another order.
SUM_ERROR = 1e-6


def check(before: ModelProto, expected: list[str], batch: int = 2) -> Model:
    """Ingest leaves these operators, the same results, and nothing to do for itself."""
    model = ingested(before)
    onnx.checker.check_model(model.proto, full_check=True)
    assert sorted(operators(model.proto)) == sorted(expected)
    inputs = inputs_of(before, batch)
    actual = run(model.proto, {name: inputs[name] for name in model.graph.inputs})
    for name, value in run(before, inputs).items():
        assert (actual[name].shape, actual[name].dtype) == (value.shape, value.dtype)
        if value.size and value.any():
            assert relative_error(actual[name], value) <= SUM_ERROR
        else:
            np.testing.assert_array_equal(actual[name], value)
    assert not ingested(model.proto).changes
    return model


# --- constants --------------------------------------------------------------------------------------------


def sparse_constant(dims: list[int], indices: Array) -> onnx.NodeProto:
    values = numpy_helper.from_array(np.array([2.0, -3.0], np.float32))
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices), dims)
    return helper.make_node("Constant", [], ["w"], sparse_value=sparse)


@pytest.mark.parametrize("indices", [np.array([1, 7]), np.array([[0, 1], [2, 1]])], ids=["linear", "coordinates"])
def test_sparse_constants_become_dense(indices: Array) -> None:
    before = build("(float[n,4] x) => (float[n,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    del before.graph.initializer[:]
    before.graph.node.insert(0, sparse_constant([4, 3], indices))
    model = ingested(before)
    assert "wrote sparse constant 'w' as a dense one" in model.changes
    dense = np.zeros((4, 3), np.float32)
    dense[0, 1], dense[2, 1] = 2, -3
    np.testing.assert_array_equal(model.graph.constant("w"), dense)


@pytest.mark.parametrize("inside", [False, True], ids=["main-graph", "branch"])
def test_sparse_initializers_become_dense(inside: bool) -> None:
    branches = BRANCHES.format("p = MatMul(x, w)", "q = Neg(x)")
    text = (
        f"(float[n,4] x, bool c) => (float[n,4] y) {{ y = If(c) <{branches}> }}"
        if inside
        else "(float[n,4] x, bool c) => (float[n,4] y) { y = MatMul(x, w) }"
    )
    before = build(text)
    graph = before.graph.node[0].attribute[0].g if inside else before.graph
    sparse = sparse_constant([4, 4], np.array([1, 14])).attribute[0].sparse_tensor
    sparse.values.name, sparse.indices.name = "w", "w_indices"
    graph.sparse_initializer.append(sparse)
    model = ingested(before)
    assert model.changes[0] == "wrote sparse constant 'w' as a dense one"
    x = normal(2, 4)
    expected = np.stack([np.zeros(2), 2 * x[:, 0], -3 * x[:, 3], np.zeros(2)], 1)  # of two non-zero weights
    np.testing.assert_array_equal(run(model.proto, {"x": x, "c": np.array(True)})["y"], expected)


def test_a_sparse_constant_too_large_to_be_dense_is_refused() -> None:
    before = build("(float[n,4] x) => (float[n,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)})
    del before.graph.initializer[:]
    before.graph.node.insert(0, sparse_constant([1 << 16, 1 << 15], np.array([1, 7])))
    with pytest.raises(ModelError, match=r"sparse constant 'w' of shape \[65536, 32768\] has 2 GiB or more: make it"):
        ingested(before)


def test_weights_that_are_computed() -> None:
    nodes = (
        "s = Constant<value_ints = [4, 3]>() o = ConstantOfShape<value = float[1] {0.5}>(s) a = MatMul(x, o) "
        "t = Transpose(w) b = MatMul(a, t) r = Reshape(w, s) q = Squeeze(u) c = Mul(r, q) y = MatMul(b, c)"
    )
    before = build(f"(float[n,4] x) => (float[] y) {{ {nodes} }}", {"w": normal(4, 3), "u": normal(1, 1)})
    check(before, ["MatMul"] * 3)


def test_only_a_weight_may_grow_from_little() -> None:
    """A megabyte that is computed from two numbers is written out only where it is quantized."""
    text = (
        "(float[1,1024] x) => (float[] y, float[] z) { w = ConstantOfShape<value = float[1] {0.5}>(s) "
        "y = MatMul(x, w) e = Expand(one, s) z = Mul(x, e) }"
    )
    before = build(text, {"s": np.array([1024, 1024]), "one": np.array(1, np.float32)})
    model = check(before, ["MatMul", "Expand", "Mul"])
    assert set(model.graph.initializers) == {"w", "s", "one"}


def test_what_is_random_is_not_constant() -> None:
    nodes = (
        "r = RandomNormal<shape = [4]>() u = RandomUniformLike(w) b = Bernoulli(p) s = Add(r, u) t = Add(s, b) "
        "y = Add(x, t)"
    )
    constants = {"w": normal(4), "p": np.full(4, 0.5, np.float32)}
    before = build(f"(float[n,4] x) => (float[n,4] y) {{ {nodes} }}", constants)
    assert operators(ingested(before).proto) == operators(before)


def test_constants_that_onnx_runtime_cannot_compute_with_stay() -> None:
    text = "(float[n,4] x) => (float[n,4] y, float[4] z) { y = Relu(x) z = local.Odd(w) }"
    before = build(text, {"w": normal(4)}, domains=', "local": 1')
    assert operators(ingested(before).proto) == ["Relu", "Odd"]


def test_scalars_and_empty_tensors() -> None:
    before = build(
        "(float[n,4] x) => (float[] y, float[] s) { c = Concat<axis = 1>(x, none) m = Mul(c, scalar) "
        "k = Add(scalar, scalar) y = Add(m, k) s = Slice(y, zero, zero) }",
        {"none": np.zeros((2, 0), np.float32), "scalar": np.array(2, np.float32), "zero": np.array([0])},
    )
    check(before, ["Concat", "Mul", "Add", "Slice"])


def test_one_scalar_computed_from_another_keeps_its_shape() -> None:
    before = build("(float[n] x) => (float[n] y) { k = Neg(s) y = Mul(x, k) }", {"s": np.array(2, np.float32)})
    value = check(before, ["Mul"]).graph.constant("k")
    assert value is not None
    assert value.shape == ()


def test_a_large_result_of_a_constant_in_a_file_stays_a_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied embeddings: with a transposed copy in it, the model could have more than 2 GiB."""
    monkeypatch.setattr(sys.modules["onnxqt.ingest.files"], "EMBED_LIMIT", 1 << 16)
    monkeypatch.setattr(sys.modules["onnxqt.ingest.files"], "_LARGE", 1 << 16)
    monkeypatch.setattr(sys.modules["onnxqt.ingest.constants"], "_MOST_OF_FILE", 1 << 16)
    nodes = "e = Gather(table, ids) w = Transpose(table) y = MatMul(e, w) first = Slice(table, zero, one)"
    before = build(
        f"(int64[n,5] ids) => (float[] y, float[] first) {{ {nodes} }}",
        {"table": normal(300, 100), "zero": np.array([0]), "one": np.array([1])},
    )
    path = tmp_path / "model.onnx"
    inputs = inputs_of(before)
    expected = run(before, inputs)
    onnx.save(before, path, save_as_external_data=True, location="weights.bin", size_threshold=1024)
    model = ingest(path)
    assert operators(model.proto) == ["Gather", "Transpose", "MatMul"]
    assert {tensor.name for tensor in model.proto.graph.initializer if is_external(tensor)} == {"table"}
    for name, value in run(model.proto, inputs).items():
        assert relative_error(value, expected[name]) <= SUM_ERROR


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_inputs_too_are_named(ir_version: int) -> None:
    before = build("(float[n,4] x) => (float[n,3] y) { y = MatMul(x, w) }", {"w": normal(4, 3)}, 9, ir_version)
    before.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3)))
    model = ingested(before)
    assert model.changes[0] == "made constants of 1 initializer(s) that are inputs too, such as 'w'"
    assert model.graph.inputs == ("x",)


def test_outputs_that_are_initializers_or_inputs() -> None:
    before = build(
        "(float[n,4] x, float[n] z) => (float[] y, float[n] t) { y = MatMul(x, w) t = Identity(z) }",
        {"w": normal(4, 3)},
    )
    before.graph.output.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3)))
    check(before, ["MatMul", "Identity"])


# --- nodes ------------------------------------------------------------------------------------------------


def test_outputs_that_nobody_reads_and_outputs_that_are_left_out() -> None:
    before = build(
        "(float[n,4,6,6] x) => (float[] y, float[] z) { a, b, c = Split<axis = 1>(x, parts) d = Relu(b) "
        "y, unused = MaxPool<kernel_shape = [2, 2]>(d) z = Neg(d) }",
        {"parts": np.array([1, 2, 1])},
    )
    model = check(before, ["Split", "Relu", "MaxPool", "Neg"])
    assert model.graph.nodes[0].outputs == ("a", "b", "c")
    before.graph.node[2].output[1] = ""
    check(before, ["Split", "Relu", "MaxPool", "Neg"])


def test_inputs_that_are_left_out() -> None:
    before = build(
        "(float[5,n,4] x) => (float[] y) { y, h, c = LSTM<hidden_size = 3>(x, w, r, , , h0) }",
        {"w": normal(1, 12, 4), "r": normal(1, 12, 3), "h0": np.zeros((1, 2, 3), np.float32)},
    )
    check(before, ["LSTM"])


def test_the_same_name_for_several_nodes_and_none_for_others() -> None:
    before = build(
        "(float[n,4] x, bool c) => (float[n,4] y) { a = Relu(x) b = Neg(a) d = If(c) <"
        "then_branch = t () => (float[n,4] p) { o = Abs(b) p = Neg(o) }, "
        "else_branch = e () => (float[n,4] q) { q = Neg(b) }> y = Add(d, a) }"
    )
    expected = run(before, inputs := inputs_of(before))["y"]
    for node in before.graph.node[:2]:
        node.name = "twin"  # which ONNX Runtime refuses
    model = ingested(before)
    names = [node.name for node in model.graph.nodes]
    assert len(set(names)) == len(names)
    np.testing.assert_array_equal(run(model.proto, inputs)["y"], expected)


def test_a_tied_embedding_behind_an_identity_keeps_one_table() -> None:
    """Exporters of torch write the second use of a weight as an Identity of the first."""
    nodes = "e = Gather(table, ids) i = Identity(table) w = Transpose(i) y = MatMul(e, w)"
    text = f"(int64[n,5] ids) => (float[] y) {{ {nodes} }}"
    model = check(build(text, {"table": normal(7, 6)}), ["Gather", "MatMul"])
    assert [tuple(tensor.dims) for tensor in model.graph.initializers.values()] == [(7, 6), (6, 7)]


def test_a_tied_weight_of_gemm_is_copied_and_the_copy_is_not_renamed_with_it() -> None:
    text = "(int64[n] ids) => (float[] y) { e = Gather(table, ids) y = Gemm<transB = 1>(e, table) }"
    model = check(build(text, {"table": normal(7, 6)}), ["Gather", "Gemm"])
    assert set(model.graph.initializers) == {"table", "table.axis_0"}


def test_a_bias_that_two_read() -> None:
    text = "(float[n,4] x) => (float[] y) { a = Gemm(x, w, b) c = Gemm(x, v, b) y = Mul(a, c) }"
    check(build(text, {"w": normal(4, 3), "v": normal(4, 3, seed=1), "b": normal(3)}), ["Gemm", "Gemm", "Mul"])


def test_a_gemm_whose_bias_is_computed() -> None:
    text = "(float[n,4] x) => (float[] y) { c = Neg(x) y = Gemm<alpha = 0.5, beta = 2.0>(x, w, c) }"
    check(build(text, {"w": normal(4, 4)}), ["Neg", "Gemm"])


# --- If -----------------------------------------------------------------------------------------------------

BRANCHES = "then_branch = t () => (float[n,4] p) {{ {} }}, else_branch = e () => (float[n,4] q) {{ {} }}"


@pytest.mark.parametrize(
    ("value", "expected"), [(True, ["Relu", "Neg", "Sub"]), (False, ["Relu", "Abs", "Exp", "Sub"])]
)
def test_the_branch_of_a_constant_condition_takes_the_place_of_the_if(value: bool, expected: list[str]) -> None:
    branches = BRANCHES.format("p = Neg(a)", "b = Abs(a) q = Exp(b)")
    text = f"(float[n,4] x) => (float[] y) {{ a = Relu(x) c = Not(no) d = If(c) <{branches}> y = Sub(d, x) }}"
    model = check(build(text, {"no": np.array(not value)}), expected)
    assert any("branch of If 'If_2', whose condition is constant" in change for change in model.changes)


def test_branches_with_the_same_names_inside() -> None:
    branches = BRANCHES.format("b = Neg(a) p = Abs(b)", "b = Abs(a) q = Exp(b)")
    text = (
        f"(float[n,4] x, bool g) => (float[] y) {{ a = Relu(x) d = If(yes) <{branches}> e = If(yes) <{branches}> "
        f"f = If(g) <{branches}> s = Add(d, e) y = Add(s, f) }}"
    )
    check(build(text, {"yes": np.array(True)}), ["Relu", "Neg", "Neg", "Abs", "Abs", "If", "Add", "Add"])


def test_a_branch_whose_nodes_differ_in_their_outputs_alone() -> None:
    """Once those are gone, graphsurgeon takes nodes without names for the same."""
    branches = (
        "then_branch = t () => (float[n,4] p, float[n,4] q, float[n,4] r) "
        "{ p = Identity(a) q = Identity(a) r = Identity(a) }, "
        "else_branch = e () => (float[n,4] p2, float[n,4] q2, float[n,4] r2) { p2 = Neg(a) q2 = Abs(a) r2 = Exp(a) }"
    )
    text = (
        f"(float[n,4] x) => (float[n,4] y) {{ a = Relu(x) d, e, f = If(yes) <{branches}> s = Add(f, e) y = Mul(s, d) }}"
    )
    model = ingested(build(text, {"yes": np.array(True)}))
    assert operators(model.proto) == ["Relu", "Add", "Mul"]
    x = normal(2, 4)
    np.testing.assert_array_equal(run(model.proto, {"x": x})["y"], 2 * np.maximum(x, 0) ** 2)


def test_an_if_inside_a_branch() -> None:
    inner = BRANCHES.format("b = Neg(a) p = Abs(b)", "q = Exp(a)").replace(" p)", " r)").replace("p =", "r =")
    branches = BRANCHES.format(f"z = Relu(a) i = If(yes) <{inner}> p = Add(i, z)", "q = Exp(a)")
    text = f"(float[n,4] x, bool g) => (float[] y) {{ a = Relu(x) y = If(g) <{branches}> }}"
    model = check(build(text, {"yes": np.array(True)}), ["Relu", "If"])
    (node,) = (node for node in model.proto.graph.node if node.op_type == "If")
    branch = next(a.g for a in node.attribute if a.name == "then_branch")
    assert sorted(node.op_type for node in branch.node) == ["Abs", "Add", "Neg", "Relu"]
    check(
        build(text.replace("bool g", "bool unused").replace("If(g)", "If(yes)"), {"yes": np.array(True)}),
        ["Relu", "Relu", "Neg", "Abs", "Add"],
    )


def test_a_branch_that_gives_out_a_constant() -> None:
    branches = (
        "then_branch = t () => (float[4] p) { p = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>() }, "
        "else_branch = e () => (float[4] q) { q = Neg(w) }"
    )
    text = f"(float[n,4] x) => (float[] y, float[4] d) {{ d = If(yes) <{branches}> y = Sub(x, d) }}"
    check(build(text, {"yes": np.array(True), "w": normal(4)}), ["Identity", "Sub"])


def test_constants_in_branches_and_loops() -> None:
    text = (
        "(float[2,4] x, int64 m, bool c) => (float[2,4] y) "
        "{ y = Loop(m, c, x) <body = b (int64 i, bool g, float[2,4] s) => (bool k, float[2,4] t) "
        "{ k = Identity(g) one = Constant<value_float = 1.0>() two = Add(one, one) u = Mul(s, two) "
        "t = MatMul(u, w) }> }"
    )
    model = check(build(text, {"w": normal(4, 4)}), ["Loop"])
    (body,) = (attribute.g for attribute in model.proto.graph.node[0].attribute)
    assert sorted(node.op_type for node in body.node) == ["Identity", "MatMul", "Mul"]


# --- functions ------------------------------------------------------------------------------------------------


def test_nested_functions() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    main (float[n,3] x) => (float[n,3] y) { a = local.outer<slope = 0.5>(x) y = local.inner(a) }
    <domain: "local", opset_import: ["": 17]> inner (a) => (b) { t = Add(a, a) b = Neg(t) }
    <domain: "local", opset_import: ["": 17, "local": 1]> outer <slope: float> (a) => (b)
    { t = local.inner(a) b = LeakyRelu<alpha: float = @slope>(t) }"""
    check(onnx.parser.parse_model(text), ["Add", "Neg", "LeakyRelu", "Add", "Neg"])


def test_functions_with_several_overloads() -> None:
    text = """<ir_version: 10, opset_import: ["": 21, "local": 1]>
    main (float[n,3] x) => (float[n,3] y) { a = local.f:one(x) y = local.f:two(a) }
    <domain: "local", overload: "one", opset_import: ["": 21]> f (a) => (b) { b = Neg(a) }
    <domain: "local", overload: "two", opset_import: ["": 21]> f (a) => (b) { b = Abs(a) }"""
    model = ingested(onnx.parser.parse_model(text))
    assert operators(model.proto) == ["Neg", "Abs"]


# --- what is refused --------------------------------------------------------------------------------------------


def refused(before: ModelProto, folder: Path, message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        ingest(save(before, folder))
    assert "\n" not in str(error.value)


def test_outputs_that_are_no_tensors(tmp_path: Path) -> None:
    before = build("(float[n,4] x) => (float[n,4] y) { y = Relu(x) s = SequenceConstruct(x) }")
    before.graph.output.append(helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, ["n", 4]))
    refused(before, tmp_path, "output 's' is a sequence, not a tensor: export the model with tensors as .* outputs$")


def test_inputs_that_are_no_tensors(tmp_path: Path) -> None:
    before = build("(float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["n", 4]))
    before.graph.input.append(helper.make_value_info("o", kind))
    refused(before, tmp_path, "input 'o' is an optional, not a tensor: export the model with tensors as .* outputs$")


def test_outputs_of_scikit_learn_that_are_no_tensors(tmp_path: Path) -> None:
    domain = ', "ai.onnx.ml": 3'
    before = build("(float[n,2] x) => (float[n,2] y) { y = Relu(x) z = ai.onnx.ml.ZipMap(x) }", domains=domain)
    before.graph.node[1].attribute.append(helper.make_attribute("classlabels_int64s", [0, 1]))
    entry = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    before.graph.output.append(helper.make_value_info("z", helper.make_sequence_type_proto(entry)))
    refused(before, tmp_path, r"output 'z' is a sequence, not a tensor: .* \(scikit-learn: without ZipMap\)$")


def test_sequences_inside_are_kept() -> None:
    text = (
        "(float[n,4] x) => (float[] y) { a = Neg(x) s = SequenceConstruct(x, a) y = ConcatFromSequence<axis = 1>(s) }"
    )
    check(build(text), ["Neg", "SequenceConstruct", "ConcatFromSequence"])


def test_optional_values(tmp_path: Path) -> None:
    before = build("(float[n,4] x) => (float[n,4] y) { o = Optional(x) y = OptionalGetElement(o) }", opset=18)
    refused(before, tmp_path, "Optional 'o' makes an optional value, which is not supported: export the model without")


def test_attributes_that_are_no_text(tmp_path: Path) -> None:
    before = build("(float[n,4] x) => (float[n,4] y) { y = vendor.Engine(x) }", domains=', "vendor": 1')
    before.graph.node[0].attribute.add(name="plan", type=onnx.AttributeProto.STRING, s=b"\xff\xfe\x00")
    refused(before, tmp_path, "Engine 'y' has an attribute 'plan' of a form that is not supported: export the model")
