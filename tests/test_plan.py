"""The plan: which tensors have a quantizer, which share a grid, what stays float and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers import batch_norm, build, ingested, normal

from onnxqt.numerics import Array
from onnxqt.plan import ActivationSite, IntegerNode, QuantPlan, WeightSite, make_plan, tensors_of_group

IMAGE = "(float[n,4,8,8] x) => (float[] y)"
ROWS = "(float[n,4] x) => (float[] y)"
SEQUENCE = "(float[n,5,4] x) => (float[] y)"
W = {"w": normal(3, 4, 3, 3), "v": normal(4, 3, 3, 3)}


def plan_of(text: str, constants: Mapping[str, Array] | None = None, domains: str = "") -> QuantPlan:
    return make_plan(ingested(build(text, constants, domains=domains)))


def reasons(plan: QuantPlan) -> dict[str, str]:
    """Why each operator stays float."""
    return {node.op_type: node.reason for node in plan.float_nodes}


def node_of(plan: QuantPlan, op_type: str) -> IntegerNode:
    (node,) = (node for node in plan.integer_nodes if node.op_type == op_type)
    return node


@dataclass(frozen=True)
class Case:
    """A graph, the groups of tensors that share a grid, and its integer and float operators."""

    text: str
    groups: list[str]
    integer: list[str]
    floats: list[str] = field(default_factory=list)
    constants: Mapping[str, Array] = field(default_factory=dict)


CASES = {
    "conv-relu": Case(
        f"{IMAGE} {{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }}", ["x", "r", "y"], ["Conv", "Conv"], [], W
    ),
    "conv-clip": Case(
        f"{IMAGE} {{ c = Conv(x, w) y = Clip(c, lo, hi) }}",
        ["x", "y"],
        ["Conv"],
        [],
        {**W, "lo": np.array(0, np.float32), "hi": np.array(6, np.float32)},
    ),
    "residual-add-relu": Case(
        f"{IMAGE} {{ c = Conv<pads = [1, 1, 1, 1]>(x, w) r = Relu(c) d = Conv<pads = [1, 1, 1, 1]>(r, v) "
        "a = Add(d, x) y = Relu(a) }",
        ["x", "r", "d", "y"],
        ["Conv", "Conv", "Add"],
        [],
        W,
    ),
    "movers-share-the-grid": Case(
        f"{IMAGE} {{ c = Conv(x, w) m = MaxPool<kernel_shape = [2, 2]>(c) t = Transpose<perm = [0, 2, 3, 1]>(m) "
        "s = Slice(t, zero, two, two) f = Flatten(s) y = Gemm(f, u) }",
        ["x", "c m t s f", "y"],
        ["Conv", "MaxPool", "Transpose", "Slice", "Flatten", "Gemm"],
        [],
        {**W, "zero": np.array([0]), "two": np.array([2]), "u": normal(30, 2)},
    ),
    "concat-shares-the-grid": Case(
        f"{IMAGE} {{ a = Conv(x, w) b = Conv(x, w) c = Concat<axis = 1>(a, b) y = Conv(c, u) }}",
        ["x", "a b c", "y"],
        ["Conv", "Conv", "Concat", "Conv"],
        [],
        {**W, "u": normal(2, 6, 1, 1)},
    ),
    "averages-have-their-own-grid": Case(
        f"{IMAGE} {{ a = Conv(x, w) b = AveragePool<kernel_shape = [2, 2]>(a) c = GlobalAveragePool(b) "
        "d = Flatten(c) y = Gemm(d, u) }",
        ["x", "a", "b", "c d", "y"],
        ["Conv", "AveragePool", "GlobalAveragePool", "Flatten", "Gemm"],
        [],
        {**W, "u": normal(3, 2)},
    ),
    "one-quantizer-for-two-readers": Case(
        f"{IMAGE} {{ r = Conv(x, w) a = Conv(r, v) b = Conv(r, v) y = Add(a, b) }}",
        ["x", "r", "a", "b", "y"],
        ["Conv", "Conv", "Conv", "Add"],
        [],
        W,
    ),
    "relu-with-two-readers": Case(
        f"{IMAGE} {{ c = Conv(x, w) r = Relu(c) a = Conv(r, v) b = Conv(r, v) y = Add(a, b) }}",
        ["x", "r", "a", "b", "y"],
        ["Conv", "Conv", "Conv", "Add"],
        [],
        W,
    ),
    "conv-read-by-relu-and-conv": Case(
        f"{IMAGE} {{ c = Conv(x, w) r = Relu(c) a = Conv(r, v) b = Conv(c, v) y = Add(a, b) }}",
        ["x", "c", "r", "a", "b", "y"],
        ["Conv", "Relu", "Conv", "Conv", "Add"],
        [],
        W,
    ),
    "conv-that-is-an-output": Case(
        "(float[n,4,8,8] x) => (float[] c, float[] y) { c = Conv(x, w) r = Relu(c) y = Conv(r, v) }",
        ["x", "c", "r", "y"],
        ["Conv", "Relu", "Conv"],
        [],
        W,
    ),
    "matmul-of-activations": Case(
        f"{SEQUENCE} {{ a = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(a) y = MatMul(x, t) }}",
        ["x", "a t", "y"],
        ["MatMul", "Transpose", "MatMul"],
        [],
        {"w": normal(4, 4)},
    ),
    "gelu-stays-float": Case(
        f"{ROWS} {{ a = Gemm(x, w) h = Mul(a, half) e = Erf(a) s = Add(e, one) g = Mul(h, s) y = Gemm(g, v) }}",
        ["x", "a", "g", "y"],
        ["Gemm", "Gemm"],
        ["Mul", "Erf", "Add", "Mul"],
        {"w": normal(4, 3), "v": normal(3, 2), "half": np.array(0.5, np.float32), "one": np.array(1, np.float32)},
    ),
    "attention-with-float-islands": Case(
        f"{SEQUENCE} {{ n = LayerNormalization(x, g, g) q = MatMul(n, w) t = Transpose<perm = [0, 2, 1]>(n) "
        "s = MatMul(q, t) p = Softmax(s) y = MatMul(p, n) }",
        ["n t", "q", "s", "p", "y"],
        ["MatMul", "Transpose", "MatMul", "MatMul"],
        ["LayerNormalization", "Softmax"],
        {"w": normal(4, 4), "g": normal(4)},
    ),
    "shape-chain-stays-float": Case(
        f"{IMAGE} {{ c = Conv(x, w) s = Shape(c) b = Gather(s, zero) d = Mul(b, two) u = Unsqueeze(d, zeros) "
        "k = Concat<axis = 0>(u, rest) f = Reshape(c, k) y = Gemm(f, m) }",
        ["x", "c f", "y"],
        ["Conv", "Reshape", "Gemm"],
        ["Shape", "Gather", "Mul", "Unsqueeze", "Concat"],
        {
            **W,
            **{"zero": np.array(0), "two": np.array(2), "zeros": np.array([0]), "rest": np.array([-1])},
            "m": normal(54, 2),
        },
    ),
    "nothing-between-float-nodes": Case(
        f"{ROWS} {{ a = Sigmoid(x) b = Add(a, x) c = Concat<axis = 1>(b, b) d = Relu(c) e = Tanh(d) y = Gemm(e, w) }}",
        ["e", "y"],
        ["Gemm"],
        ["Sigmoid", "Add", "Concat", "Relu", "Tanh"],
        {"w": normal(8, 3)},
    ),
    "nothing-to-multiply": Case(f"{ROWS} {{ a = Relu(x) y = Add(a, x) }}", [], [], ["Relu", "Add"]),
    "mover-before-a-float-node": Case(
        f"{IMAGE} {{ c = Conv(x, w) f = Flatten(c) y = Sigmoid(f) }}",
        ["x", "c"],
        ["Conv"],
        ["Flatten", "Sigmoid"],
        W,
    ),
    "movers-behind-an-input": Case(
        "(float[n,8,8,4] x) => (float[] y) { t = Transpose<perm = [0, 3, 1, 2]>(x) "
        "m = MaxPool<kernel_shape = [2, 2]>(t) y = Conv(m, w) }",
        ["x t m", "y"],
        ["Transpose", "MaxPool", "Conv"],
        [],
        W,
    ),
    "mover-between-an-input-and-a-float-node": Case(
        "(float[n,4] x, float[n,4] z) => (float[] y, float[] g) { t = Transpose(x) y = Sigmoid(t) g = Gemm(z, w) }",
        ["z", "g"],
        ["Gemm"],
        ["Transpose", "Sigmoid"],
        {"w": normal(4, 3)},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_quantizers_and_shared_grids(case: Case) -> None:
    plan = plan_of(case.text, case.constants)
    groups = {frozenset(tensors_of_group(plan, site.group)) for site in plan.activations}
    assert groups == {frozenset(group.split()) for group in case.groups}
    assert len(plan.activations) == len({site.tensor for site in plan.activations})
    assert [node.op_type for node in plan.integer_nodes] == case.integer
    assert [node.op_type for node in plan.float_nodes] == case.floats


# --- one node ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "constants", "weight", "bias", "followers"),
    [
        (f"{IMAGE} {{ c = Conv(x, w, b) y = Relu(c) }}", {"w": normal(3, 4, 1, 1), "b": normal(3)}, 0, "b", ["Relu"]),
        (f"{IMAGE} {{ y = ConvTranspose<group = 2>(x, w) }}", {"w": normal(4, 3, 2, 2)}, 1, None, []),
        (f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": normal(4, 3), "b": normal(3)}, 1, "b", []),
        (f"{ROWS} {{ y = Gemm<transB = 1>(x, w) }}", {"w": normal(3, 4)}, 0, None, []),
        (
            f"{ROWS} {{ m = MatMul(x, w) a = Add(b, m) y = Relu(a) }}",
            {"w": normal(4, 3), "b": normal(3)},
            1,
            "b",
            ["Add", "Relu"],
        ),
        (
            "(float[n,2,5,4] x) => (float[] y) { m = MatMul(x, w) y = Add(m, b) }",
            {"w": normal(2, 4, 3), "b": normal(1, 1, 3)},
            2,
            "b",
            ["Add"],
        ),
    ],
    ids=["conv", "convtranspose", "gemm", "gemm-transb", "matmul", "batched-matmul"],
)
def test_weight_axis_bias_and_followers(
    text: str, constants: Mapping[str, Array], weight: int, bias: str | None, followers: list[str]
) -> None:
    (node,) = plan_of(text, constants).integer_nodes
    assert node.weight is not None
    assert (node.weight.tensor, node.weight.axis) == ("w", weight)
    assert node.weight.batched == (constants["w"].ndim == 3)
    assert (node.inputs, node.output, node.bias) == (("x",), "y", bias)
    assert [name.split("_")[0] for name in node.followers] == followers
    assert node.groups == (2 if "group" in text else 1)


@pytest.mark.parametrize(
    ("add", "constants"),
    [
        ("Add(m, b)", {"b": normal(5, 3)}),
        ("Add(m, b)", {"b": normal(5, 1)}),
        ("Add(m, b)", {"b": normal(1)}),
        ("Add(m, b)", {"b": normal(1, 1, 1, 3)}),
        ("Add(m, m)", {}),
    ],
    ids=["per-row", "per-row-alone", "scalar", "higher-rank", "itself"],
)
def test_other_adds_behind_a_matmul_are_no_bias(add: str, constants: Mapping[str, Array]) -> None:
    plan = plan_of(f"{SEQUENCE} {{ m = MatMul(x, w) y = {add} }}", {"w": normal(4, 3), **constants})
    assert node_of(plan, "MatMul").bias is None
    assert node_of(plan, "MatMul").output == "m"


@pytest.mark.parametrize(
    ("text", "constants", "op_type", "reason"),
    [
        ("(float[n,4,8,8] x, float[3,4,3,3] w) => (float[] y) { y = Conv(x, w) }", {}, "Conv", "weight is computed"),
        (
            "(float[n,4,8,8] x, float[3] b) => (float[] y) { y = Conv(x, w, b) }",
            {"w": W["w"]},
            "Conv",
            "the bias is computed at run time",
        ),
        ("(int32[n,4] x) => (int32[] y) { y = MatMul(x, x2) }", {"x2": np.ones((4, 3), np.int32)}, "MatMul", "float32"),
        (f"{ROWS} {{ y = MatMul(x, w) }}", {"w": normal(4)}, "MatMul", "the weight is a vector"),
        ("(float[4,n] x) => (float[] y) { y = MatMul(w, x) }", {"w": normal(3, 4)}, "MatMul", "left operand"),
        ("(float[4,n] x) => (float[] y) { y = Gemm<transA = 1>(x, w) }", {"w": normal(4, 3)}, "", ""),
        ("(float[4,n] x) => (float[] y) { y = Gemm<transA = 1>(w, x) }", {"w": normal(4, 3)}, "Gemm", "left operand"),
        (
            "(float[2,4] x, float[3] b) => (float[] y) { y = Gemm<beta = 0.5>(x, w, b) }",
            {"w": normal(4, 3)},
            "Gemm",
            "alpha or beta scales a computed operand",
        ),
        (
            "(float[2,4] x) => (float[] y) { y = Gemm(x, w, b) }",
            {"w": normal(4, 3), "b": normal(2, 1)},
            "Gemm",
            "differs between rows",
        ),
        (f"{IMAGE} {{ c = Conv(x, w) y = Add(c, k) }}", {"w": W["w"], "k": normal(6, 6)}, "Add", "operand is constant"),
        (
            f"{IMAGE} {{ c = Conv(x, w) p = Pad(c, pads, one) y = Conv(p, v) }}",
            {**W, "pads": np.array([0, 0, 1, 1, 0, 0, 0, 0]), "one": np.array(1, np.float32)},
            "Pad",
            "pads with something else than zero",
        ),
        (
            "(float[n,4,8,8] x, float hi) => (float[] y) { c = Conv(x, w) y = Clip(c, , hi) }",
            {"w": W["w"]},
            "Clip",
            "a parameter is computed at run time",
        ),
        (
            f"{IMAGE} {{ c = Conv(x, w) m, i = MaxPool<kernel_shape = [2, 2]>(c) j = Cast<to = 1>(i) y = Sub(m, j) }}",
            {"w": W["w"]},
            "MaxPool",
            "has a second output",
        ),
        (
            "(float[n,4,8,8] x) => (int64[] y) { c = Conv(x, w) s = Shape(c) y = Slice(s, one, two) }",
            {"w": W["w"], "one": np.array([0]), "two": np.array([1])},
            "Slice",
            "moves values that are not float32",
        ),
        (f"{ROWS} {{ a = Gemm(x, w) y = Erf(a) }}", {"w": normal(4, 3)}, "Erf", "no integer form"),
        (f"{ROWS} {{ y = Gemm(x, w) z = Relu(x) }}", {"w": normal(4, 3)}, "", ""),
        (f"{ROWS} {{ s = Sigmoid(x) y = Relu(s) }}", {}, "Relu", "stands between float nodes"),
    ],
)
def test_what_stays_float_says_why(text: str, constants: Mapping[str, Array], op_type: str, reason: str) -> None:
    found = reasons(plan_of(text, constants))
    assert reason in found[op_type] if op_type else not found


def test_foreign_operators_stay_float() -> None:
    text = "(float[n,4] x) => (float[n,3] y) <float[n,4] g> { g = com.microsoft.Gelu(x) y = Gemm(g, w) }"
    plan = plan_of(text, {"w": normal(4, 3)}, domains=', "com.microsoft": 1')
    assert reasons(plan) == {"Gelu": "operator of the domain 'com.microsoft'"}
    assert [site.tensor for site in plan.activations] == ["g", "y"]


def test_subgraphs_read_tensors_too() -> None:
    """A Relu that an If reads as well is not fused away, and the If itself stays float."""
    text = f"""{IMAGE} {{ c = Conv(x, w) r = Relu(c) m = ReduceMax<keepdims = 0>(r) t = Greater(m, zero)
    i = If(t) <then_branch = a () => (float[n,3,6,6] p) {{ p = Neg(c) }},
               else_branch = o () => (float[n,3,6,6] q) {{ q = Relu(c) }}> y = Add(r, i) }}"""
    plan = plan_of(text, {"w": W["w"], "zero": np.array(0, np.float32)})
    assert node_of(plan, "Conv").output == "c"
    assert reasons(plan)["If"] == "no integer form"


def test_groups_of_inputs_and_outputs_are_marked() -> None:
    """Whatever shares a grid with an input or an output keeps 8 bits with it."""
    plan = plan_of(
        "(float[n,6,6,4] x) => (float[] y) { t = Transpose<perm = [0, 3, 1, 2]>(x) c = Conv(t, w) "
        "m = MaxPool<kernel_shape = [2, 2]>(c) d = Conv<pads = [1, 1, 1, 1]>(m, v) y = Flatten(d) }",
        W,
    )
    assert {site.tensor: site.io for site in plan.activations} == {
        **dict.fromkeys("xt", True),
        **dict.fromkeys("cm", False),
        **dict.fromkeys("dy", True),
    }


def test_sites_are_listed_once() -> None:
    plan = plan_of(f"{ROWS} {{ a = Gemm(x, w) y = Gemm(a, w) }}", {"w": normal(4, 4)})
    assert plan.weights == (WeightSite("w", 1),)
    assert plan.activations == tuple(ActivationSite(name, name, name != "a") for name in "xay")


def test_folding_leaves_no_batch_norm_between_quantizers() -> None:
    text = f"{IMAGE} {{ c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, var) y = Relu(n) }}"
    plan = plan_of(text, {"w": W["w"], **batch_norm(3)})
    assert [site.tensor for site in plan.activations] == ["x", "y"]
    assert not plan.float_nodes


def test_nodes_around_an_unbounded_tensor_stay_float() -> None:
    text = "(float[n,4] x, float[n,4] mask) => (float[] y) { a = Gemm(x, w) r = Add(a, mask) y = Gemm(r, w) }"
    model = ingested(build(text, {"w": normal(4, 4)}))
    assert [node.op_type for node in make_plan(model).integer_nodes] == ["Gemm", "Add", "Gemm"]
    plan = make_plan(model, ["mask"])
    assert [node.op_type for node in plan.integer_nodes] == ["Gemm", "Gemm"]
    assert "mask" not in {site.tensor for site in plan.activations}
    assert [node.reason for node in plan.float_nodes] == ["'mask' takes NaN or infinite values on the samples"]
    assert plan.unbounded == ("mask",)
