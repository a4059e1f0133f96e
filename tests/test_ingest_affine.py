"""Affine maps of channels around MatMul, ConvTranspose, and Conv that does not pad."""

import itertools

import numpy as np
import pytest
from helpers import batch_norm, build, ingested, inputs_of, normal, operators, relative_error, run

from onnxqt.numerics import Array
from onnxqt.plan import make_plan

# As in test_model: folded weights are rounded once to float32, and sums of at most 100 products move by 1e-6.
FOLD_ERROR = 1e-5

ROWS = "(float[n,4] x) => (float[] y)"
TOKENS = "(float[n,5,4] x) => (float[] y)"
IMAGE = "(float[n,4,6,6] x) => (float[] y)"
CONSTANTS: dict[str, Array] = {
    **{"w": normal(4, 3), "b": normal(3, seed=1), "m": normal(3, seed=2), "a": normal(3, seed=3)},
    **{"scalar": np.array(0.3, np.float32), "row": normal(1, 1, 3, seed=4), "tall": normal(5, 1, seed=5)},
    **{"stack": normal(2, 4, 3, seed=6), "b1": normal(1, 3, seed=7), "deep": normal(1, 1, 1, 3, seed=8)},
    **{"integers": np.arange(12).reshape(4, 3), "factor": np.array(3)},
}


def check(text: str, expected: list[str], constants: dict[str, Array] | None = None) -> None:
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    chosen = constants or {name: value for name, value in CONSTANTS.items() if name in words}
    before = build(text, chosen)
    model = ingested(before)
    assert operators(model.proto) == expected
    inputs = inputs_of(before)
    # Unoptimized: ONNX Runtime 1.19 makes a Gemm of any MatMul before a BatchNormalization, whatever its rank.
    for name, value in run(before, inputs, optimize=False).items():
        actual = run(model.proto, inputs)[name]
        assert actual.shape == value.shape
        assert relative_error(actual, value) <= FOLD_ERROR
    assert not ingested(model.proto).changes


MATMUL = {
    "mul": (f"{TOKENS} {{ p = MatMul(x, w) y = Mul(p, m) }}", ["MatMul"]),
    "mul-by-a-scalar": (f"{TOKENS} {{ p = MatMul(x, w) y = Mul(scalar, p) }}", ["MatMul"]),
    "mul-with-leading-axes": (f"{TOKENS} {{ p = MatMul(x, w) y = Mul(p, row) }}", ["MatMul"]),
    "div": (f"{TOKENS} {{ p = MatMul(x, w) y = Div(p, m) }}", ["MatMul"]),
    "bias-then-mul": (f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b) y = Mul(s, m) }}", ["MatMul", "Add"]),
    "bias-first-then-mul": (f"{TOKENS} {{ p = MatMul(x, w) s = Add(b, p) y = Mul(m, s) }}", ["MatMul", "Add"]),
    "mul-then-bias": (f"{TOKENS} {{ p = MatMul(x, w) s = Mul(p, m) y = Add(s, b) }}", ["MatMul", "Add"]),
    "two-biases": (f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b) y = Add(s, a) }}", ["MatMul", "Add"]),
    "bias-then-sub": (f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b) y = Sub(s, a) }}", ["MatMul", "Add"]),
    "bias-of-rank-two": (f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b1) y = Mul(s, m) }}", ["MatMul", "Add"]),
    "affine-between": (
        f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b) t = Mul(s, m) y = Add(t, a) }}",
        ["MatMul", "Add"],
    ),
    "stack-of-weights": ("(float[2,5,4] x) => (float[] y) { p = MatMul(x, stack) y = Mul(p, m) }", ["MatMul"]),
    "mul-along-tokens-stays": (f"{TOKENS} {{ p = MatMul(x, w) y = Mul(p, tall) }}", ["MatMul", "Mul"]),
    "mul-that-adds-an-axis-stays": (f"{TOKENS} {{ p = MatMul(x, w) y = Mul(p, deep) }}", ["MatMul", "Mul"]),
    "bias-along-tokens-stays": (
        f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, tall) y = Mul(s, m) }}",
        ["MatMul", "Add", "Mul"],
    ),
    "constant-less-product-stays": (
        f"{TOKENS} {{ p = MatMul(x, w) s = Add(p, b) y = Sub(a, s) }}",
        ["MatMul", "Add", "Sub"],
    ),
    "constant-over-product-stays": (f"{TOKENS} {{ p = MatMul(x, w) y = Div(m, p) }}", ["MatMul", "Div"]),
    "read-twice-stays": (
        f"{TOKENS} {{ p = MatMul(x, w) s = Mul(p, m) y = Add(s, p) }}",
        ["MatMul", "Mul", "Add"],
    ),
    "integers-stay": (
        "(int64[n,4] x) => (int64[] y) { p = MatMul(x, integers) y = Div(p, factor) }",
        ["MatMul", "Div"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), MATMUL.values(), ids=MATMUL)
def test_matmul(text: str, expected: list[str]) -> None:
    check(text, expected)


BATCH_NORM = {
    "matmul": (f"{ROWS} {{ p = MatMul(x, w) y = BatchNormalization(p, gamma, beta, mean, var) }}", ["MatMul", "Add"]),
    "matmul-and-bias": (
        f"{ROWS} {{ p = MatMul(x, w) s = Add(p, b) y = BatchNormalization(s, gamma, beta, mean, var) }}",
        ["MatMul", "Add"],
    ),
    "matmul-of-tokens": (
        "(float[n,3,4] x) => (float[] y) { p = MatMul(x, w) y = BatchNormalization(p, gamma, beta, mean, var) }",
        ["MatMul", "Mul", "Add"],
    ),
}


@pytest.mark.parametrize(("text", "expected"), BATCH_NORM.values(), ids=BATCH_NORM)
def test_batch_norm_behind_a_matmul(text: str, expected: list[str]) -> None:
    constants = {name: value for name, value in CONSTANTS.items() if name in ("w", "b") and f" {name})" in text}
    check(text, expected, {**constants, **batch_norm(3)})


@pytest.mark.parametrize(("groups", "bias"), list(itertools.product((1, 2), (True, False))))
def test_batch_norm_before_a_convolution_that_does_not_pad(groups: int, bias: bool) -> None:
    text = (
        f"{IMAGE} {{ r = Relu(x) n = BatchNormalization(r, gamma, beta, mean, var) "
        f"y = Conv<group = {groups}, strides = [2, 1]>(n, w{', b' if bias else ''}) }}"
    )
    constants = {"w": normal(6, 4 // groups, 3, 3), **({"b": normal(6, seed=1)} if bias else {}), **batch_norm(4)}
    check(text, ["Relu", "Conv"], constants)


@pytest.mark.parametrize("padding", ["pads = [0, 0, 1, 0]", 'auto_pad = "SAME_UPPER"'])
def test_batch_norm_before_a_convolution_that_pads(padding: str) -> None:
    text = f"{IMAGE} {{ r = Relu(x) n = BatchNormalization(r, gamma, beta, mean, var) y = Conv<{padding}>(n, w) }}"
    check(text, ["Relu", "Mul", "Add", "Conv"], {"w": normal(6, 4, 3, 3), **batch_norm(4)})


@pytest.mark.parametrize(("trans", "factors"), list(itertools.product((0, 1), ("", ", alpha = 0.3, beta = 2.5"))))
def test_batch_norm_before_a_gemm(trans: int, factors: str) -> None:
    text = (
        f"{ROWS} {{ r = Relu(x) n = BatchNormalization(r, gamma, beta, mean, var) "
        f"y = Gemm<transB = {trans}{factors}>(n, w, b) }}"
    )
    weight = normal(3, 4) if trans else normal(4, 3)
    check(text, ["Relu", "Gemm"], {"w": weight, "b": normal(3, seed=1), **batch_norm(4)})


def test_batch_norm_that_two_read_stays() -> None:
    text = (
        f"{IMAGE} {{ r = Relu(x) n = BatchNormalization(r, gamma, beta, mean, var) "
        "c = Conv(n, w) d = Conv(n, w) y = Add(c, d) }"
    )
    check(text, ["Relu", "Mul", "Add", "Conv", "Conv", "Add"], {"w": normal(6, 4, 3, 3), **batch_norm(4)})


@pytest.mark.parametrize(
    ("groups", "bias", "op"), list(itertools.product((1, 2), (True, False), ("Mul", "Div", "Add", "Sub")))
)
def test_transposed_convolutions(groups: int, bias: bool, op: str) -> None:
    channels = 3 * groups
    text = (
        f"{IMAGE} {{ c = ConvTranspose<group = {groups}, strides = [2, 1], pads = [1, 0, 0, 1]>"
        f"(x, w{', b' if bias else ''}) y = {op}(c, m) }}"
    )
    constants = {"w": normal(4, 3, 3, 3), "m": normal(channels, 1, 1, seed=2)}
    check(text, ["ConvTranspose"], {**constants, **({"b": normal(channels, seed=1)} if bias else {})})


@pytest.mark.parametrize("op", ["Mul", "Add"])
@pytest.mark.parametrize("bias", [True, False])
def test_gemm_factors_and_what_follows(op: str, bias: bool) -> None:
    text = f"{ROWS} {{ g = Gemm<alpha = 0.3, beta = 2.5>(x, w{', b' if bias else ''}) y = {op}(g, m) }}"
    check(text, ["Gemm"])


def test_an_omitted_bias_is_no_obstacle() -> None:
    before = build(f"{IMAGE} {{ c = Conv(x, w) y = Mul(c, m) }}", {"w": normal(3, 4, 3, 3), "m": normal(3, 1, 1)})
    before.graph.node[0].input.append("")
    assert operators(ingested(before).proto) == ["Conv"]


def test_a_sum_leaves_the_weight_alone() -> None:
    """A weight in a file of its own is not to be read for that."""
    before = build(f"{IMAGE} {{ c = Conv(x, w) y = Add(c, m) }}", {"w": normal(3, 4, 3, 3), "m": normal(3, 1, 1)})
    assert "w" in ingested(before).graph.initializers


@pytest.mark.parametrize("computed", ["gamma", "beta", "mean", "var"])
def test_batch_norm_with_computed_statistics_stays(computed: str) -> None:
    operands = ", ".join("s" if name == computed else name for name in ("gamma", "beta", "mean", "var"))
    text = (
        "(float[n,4,6,6] x, float[6] t) => (float[] y) "
        f"{{ s = Abs(t) c = Conv(x, w) n = BatchNormalization(c, {operands}) y = Relu(n) }}"
    )
    constants = {name: value for name, value in batch_norm(6).items() if name != computed}
    check(text, ["Abs", "Conv", "BatchNormalization", "Relu"], {"w": normal(6, 4, 3, 3), **constants})


@pytest.mark.parametrize("trans", [0, 1])
def test_the_transposed_operand_of_a_gemm_becomes_a_node(trans: int) -> None:
    """So the Gemm is quantized, and a batch norm before it is folded."""
    text = (
        f"(float[4,n] x) => (float[] y) {{ r = Relu(x) y = Gemm<transA = 1, transB = {trans}, alpha = 0.3>(r, w, b) }}"
    )
    weight = normal(3, 4) if trans else normal(4, 3)
    check(text, ["Relu", "Transpose", "Gemm"], {"w": weight, "b": normal(3, seed=1)})
    model = ingested(build(text, {"w": weight, "b": normal(3, seed=1)}))
    assert "wrote the transposed left operand of Gemm 'Gemm_1' as Transpose" in model.changes
    assert "Gemm" in {node.op_type for node in make_plan(model).integer_nodes}


def test_a_gemm_that_transposes_a_constant_stays() -> None:
    check("(float[4,n] x) => (float[] y) { y = Gemm<transA = 1>(w, x) }", ["Gemm"], {"w": normal(4, 3)})
