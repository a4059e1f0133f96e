"""Operators that exporters take apart: put together where that is exact, and never quantized inside."""

from collections.abc import Mapping

import numpy as np
import pytest
from helpers import build, ingested, inputs_of, normal, operators, relative_error, run

from onnxqt.numerics import Array
from onnxqt.plan import make_plan

# A handful of float32 operations in another order: each rounds by 2^-24 = 6e-8 of values of the result's size.
ORDER_ERROR = 1e-5

SCALARS: Mapping[str, Array] = {
    name: np.array(value, np.float32)
    for name, value in {
        **{"half": 0.5, "one": 1.0, "two": 2.0, "three": 3.0, "six": 6.0, "sixth": 1 / 6, "zero": 0.0},
        **{"root2": np.sqrt(2), "unroot2": np.sqrt(0.5), "minus": -np.sqrt(0.5), "eps": 1e-5},
        **{"cubic": 0.044715, "tanhs": np.sqrt(2 / np.pi), "mhalf": -0.5, "mthree": -3.0},
    }.items()
}


def used(text: str, **constants: Array) -> dict[str, Array]:
    """The named constants that the text mentions."""
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    return {name: value for name, value in {**SCALARS, **constants}.items() if name in words}


def check(text: str, expected: list[str], opset: int = 17, **constants: Array) -> None:
    """Ingest leaves these operators, the same result, and nothing to do for itself."""
    before = build(text, used(text, **constants), opset)
    model = ingested(before)
    assert sorted(operators(model.proto)) == sorted(expected)
    inputs = {name: 3 * value for name, value in inputs_of(before).items()}
    actual = run(model.proto, inputs)
    for name, value in run(before, inputs).items():
        assert actual[name].shape == value.shape
        assert relative_error(actual[name], value) <= ORDER_ERROR
    assert not ingested(model.proto).changes


X = "(float[n,3,8] x) => (float[] y)"

GELU = {
    "torch": "a = Div(x, root2) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half)",
    "dynamo": "h = Mul(x, half) a = Mul(x, unroot2) e = Erf(a) s = Add(e, one) y = Mul(h, s)",
    "keras": "h = Mul(half, x) a = Div(x, root2) e = Erf(a) s = Add(one, e) y = Mul(h, s)",
    "bert": "a = Div(x, root2) e = Erf(a) s = Add(e, one) m = Mul(s, half) y = Mul(x, m)",
    "divided-by-two": "a = Mul(x, unroot2) e = Erf(a) s = Add(e, one) h = Div(x, two) y = Mul(s, h)",
    "distributed": "a = Mul(x, unroot2) e = Erf(a) h = Mul(e, half) s = Add(h, half) y = Mul(x, s)",
    "erfc": "a = Mul(x, minus) e = Erf(a) s = Sub(one, e) h = Mul(x, half) y = Mul(h, s)",
    "negated": "g = Neg(x) a = Div(g, root2) e = Erf(a) s = Sub(one, e) m = Mul(x, s) y = Mul(m, half)",
    "scaled-before": "b = Mul(v, three) a = Div(b, root2) e = Erf(a) s = Add(e, one) m = Mul(b, s) y = Mul(m, half)",
}
TANH = {
    "hugging-face": (
        "p = Pow(x, three) c = Mul(p, cubic) s = Add(x, c) a = Mul(s, tanhs) t = Tanh(a) o = Add(t, one) "
        "h = Mul(x, half) y = Mul(h, o)"
    ),
    "fast": (
        "q = Mul(x, x) c = Mul(q, cubic) s = Add(c, one) b = Mul(x, tanhs) a = Mul(b, s) t = Tanh(a) "
        "o = Add(one, t) h = Mul(half, x) y = Mul(h, o)"
    ),
    "cube-by-products": (
        "q = Mul(x, x) p = Mul(x, q) c = Mul(cubic, p) s = Add(x, c) a = Mul(tanhs, s) t = Tanh(a) o = Add(t, one) "
        "m = Mul(x, o) y = Mul(m, half)"
    ),
}


@pytest.mark.parametrize("nodes", GELU.values(), ids=GELU)
def test_gelu_by_erf(nodes: str) -> None:
    text = f"{X} {{ {nodes} }}"
    if "v," in nodes:
        text = text.replace("] x)", "] v)")
    check(text, ["Mul", "Gelu"] if "v," in nodes else ["Gelu"], opset=20)


@pytest.mark.parametrize("nodes", TANH.values(), ids=TANH)
def test_gelu_by_tanh(nodes: str) -> None:
    check(f"{X} {{ {nodes} }}", ["Gelu"], opset=20)


@pytest.mark.parametrize("nodes", [GELU["torch"], TANH["fast"]], ids=["erf", "tanh"])
def test_gelu_stays_in_parts_before_opset_20(nodes: str) -> None:
    text = f"{X} {{ {nodes} }}"
    before = build(text, used(text), 19)
    assert sorted(operators(ingested(before).proto)) == sorted(operators(before))


NOT_GELU = {
    "other-scale": "a = Mul(x, half) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half)",
    "no-half": "a = Div(x, root2) e = Erf(a) s = Add(e, one) y = Mul(x, s)",
    "other-factor": "a = Div(x, root2) e = Erf(a) s = Add(e, one) z = Abs(x) m = Mul(z, s) y = Mul(m, half)",
    "difference": "a = Div(x, root2) e = Erf(a) s = Sub(one, e) m = Mul(x, s) y = Mul(m, half)",
    "sigmoid-approximation": "a = Mul(x, unroot2) t = Tanh(a) s = Add(t, one) m = Mul(x, s) y = Mul(m, half)",
    "vector": "a = Div(x, root2) e = Erf(a) s = Add(e, row) m = Mul(x, s) y = Mul(m, half)",
    "more-axes": "a = Div(x, root2) e = Erf(a) s = Add(e, deep) m = Mul(x, s) y = Mul(m, half)",
}


@pytest.mark.parametrize("nodes", NOT_GELU.values(), ids=NOT_GELU)
def test_what_only_looks_like_gelu(nodes: str) -> None:
    text = f"{X} {{ {nodes} }}"
    row, deep = np.ones(8, np.float32), np.ones((1, 1, 1, 1), np.float32)
    before = build(text, used(text, row=row, deep=deep), 20)
    check(text, operators(before), 20, row=row, deep=deep)


def test_gelu_whose_parts_others_read() -> None:
    text = (
        "(float[n,3] x) => (float[] y, float[] s) "
        "{ a = Div(x, root2) e = Erf(a) s = Add(e, one) m = Mul(x, s) y = Mul(m, half) }"
    )
    check(text, ["Div", "Gelu", "Erf", "Add"], opset=20)


HARD = {
    "sigmoid-torch": ("a = Add(x, three) c = Clip(a, zero, six) y = Div(c, six)", "HardSigmoid"),
    "sigmoid-multiplied": ("a = Add(three, x) c = Clip(a, zero, six) y = Mul(c, sixth)", "HardSigmoid"),
    "sigmoid-relu6": ("a = Add(x, three) r = Relu(a) c = Min(r, six) y = Mul(c, sixth)", "HardSigmoid"),
    "sigmoid-min-max": ("a = Add(x, three) r = Min(six, a) c = Max(zero, r) y = Div(c, six)", "HardSigmoid"),
    "sigmoid-scaled-first": ("a = Mul(x, sixth) b = Add(a, half) y = Clip(b, zero, one)", "HardSigmoid"),
    "sigmoid-clip-first": ("c = Clip(x, mthree, three) a = Add(c, three) y = Div(a, six)", "HardSigmoid"),
    "swish-torch": ("a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) y = Mul(x, d)", "HardSwish"),
    "swish-product-first": ("a = Add(x, three) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)", "HardSwish"),
    "swish-relu6": ("a = Add(x, three) r = Relu(a) c = Min(r, six) d = Mul(c, sixth) y = Mul(d, x)", "HardSwish"),
    "swish-of-hardsigmoid": ("s = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x) y = Mul(x, s)", "HardSwish"),
}


@pytest.mark.parametrize(("nodes", "unit"), HARD.values(), ids=HARD)
def test_hard_activations(nodes: str, unit: str) -> None:
    check(f"{X} {{ {nodes} }}", [unit])


NOT_HARD = {
    "other-bound": ("a = Add(x, three) c = Clip(a, zero, three) y = Div(c, six)", ["Add", "Clip", "Div"]),
    "other-offset": ("a = Add(x, two) c = Clip(a, zero, six) y = Div(c, six)", ["Add", "Clip", "Div"]),
    "other-slope": ("s = HardSigmoid<alpha = 0.2, beta = 0.5>(x) y = Mul(x, s)", ["HardSigmoid", "Mul"]),
    "other-factor": (
        "a = Add(x, three) c = Clip(a, zero, six) d = Div(c, six) z = Abs(x) y = Mul(z, d)",
        ["HardSigmoid", "Abs", "Mul"],
    ),
}


@pytest.mark.parametrize(("nodes", "expected"), NOT_HARD.values(), ids=NOT_HARD)
def test_what_only_looks_like_a_hard_activation(nodes: str, expected: list[str]) -> None:
    before = build(f"{X} {{ {nodes} }}", used(nodes))
    assert sorted(operators(ingested(before).proto)) == sorted(expected)
    inputs = inputs_of(before)
    assert relative_error(run(ingested(before).proto, inputs)["y"], run(before, inputs)["y"]) <= ORDER_ERROR


CLAMPS = {
    "relu6": ("r = Relu(x) y = Min(r, six)", ["Clip"]),
    "max-of-zero": ("y = Max(x, zero)", ["Relu"]),
    "max": ("y = Max(half, x)", ["Clip"]),
    "empty-between": ("a = Clip(x, three, six) y = Clip(a, zero, one)", ["Clip"]),
    "one-bound-each": ("a = Clip(x, half) y = Min(a, two)", ["Clip"]),
    "relu-twice": ("a = Relu(x) y = Relu(a)", ["Relu"]),
    "max-of-two": ("a = Neg(x) y = Max(x, a)", ["Neg", "Max"]),
    "max-of-three": ("y = Max(x, zero, half)", ["Max"]),
    "vector": ("y = Max(x, row)", ["Max"]),
    "more-axes": ("y = Max(x, deep)", ["Max"]),
    "read-between": ("r = Relu(x) m = Min(r, six) y = Add(r, m)", ["Relu", "Clip", "Add"]),
}


@pytest.mark.parametrize(("nodes", "expected"), CLAMPS.values(), ids=CLAMPS)
def test_clamps(nodes: str, expected: list[str]) -> None:
    row, deep = np.ones(8, np.float32), np.ones((1, 1, 1, 1), np.float32)
    check(f"{X} {{ {nodes} }}", expected, row=row, deep=deep)


def test_integers_are_not_clamped() -> None:
    text = "(int64[n,3] x) => (int64[] y) { y = Max(x, k) }"
    model = ingested(build(text, {"k": np.array(0)}))
    assert operators(model.proto) == ["Max"]


# --- LayerNormalization -----------------------------------------------------------------------------------

MEAN = "m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) "
NORM = {
    "pow": MEAN + "q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(d, s)",
    "mul": MEAN + "q = Mul(d, d) v = ReduceMean<axes = [-1]>(q) e = Add(eps, v) s = Sqrt(e) n = Div(d, s)",
    "reciprocal": (
        MEAN + "q = Mul(d, d) v = ReduceMean<axes = [2]>(q) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) n = Mul(d, r)"
    ),
    "one-over": MEAN
    + "q = Mul(d, d) v = ReduceMean<axes = [2]>(q) e = Add(v, eps) s = Sqrt(e) r = Div(one, s) n = Mul(r, d)",
    "power": MEAN + "q = Mul(d, d) v = ReduceMean<axes = [2]>(q) e = Add(v, eps) r = Pow(e, mhalf) n = Mul(d, r)",
    "two-differences": (
        MEAN + "c = Sub(x, m) q = Pow(c, two) v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(d, s)"
    ),
    "two-axes": (
        "m = ReduceMean<axes = [1, 2]>(x) d = Sub(x, m) q = Pow(d, two) v = ReduceMean<axes = [-1, -2]>(q) "
        "e = Add(v, eps) s = Sqrt(e) n = Div(d, s)"
    ),
}


@pytest.mark.parametrize("opset", [17, 18])
@pytest.mark.parametrize("tail", ["g-and-b", "g", "b", "nothing", "scalar"])
@pytest.mark.parametrize("nodes", NORM.values(), ids=NORM)
def test_layer_norm(nodes: str, tail: str, opset: int) -> None:
    ends = {
        "g-and-b": "k = Mul(n, g) y = Add(k, b)",
        "g": "y = Mul(g, n)",
        "b": "y = Add(b, n)",
        "nothing": "y = Identity(n)",
        "scalar": "k = Mul(n, three) y = Add(k, b)",
    }
    text = f"{X} {{ {nodes} {ends[tail]} }}"
    axes = {"last": np.array([-1]), "both": np.array([1, 2])}
    if opset >= 18:
        for form, name in (("[-1]", "last"), ("[2]", "last"), ("[1, 2]", "both"), ("[-1, -2]", "both")):
            for tensor in ("x", "q"):
                text = text.replace(f"<axes = {form}>({tensor})", f"({tensor}, {name})")
    check(text, ["LayerNormalization"], opset, g=normal(8), b=normal(8, seed=1), **axes)


def test_layer_norm_as_tensorflow_writes_it() -> None:
    tail = "q = Mul(d, d) v = ReduceMean<axes = [2]>(q) e = Add(v, eps) s = Sqrt(e) r = Reciprocal(s) "
    forms: dict[str, dict[str, Array]] = {
        "k = Mul(r, g) ": {"g": normal(8), "b": normal(8, seed=1)},
        "k = Identity(r) ": {"b": normal(8, seed=1)},
    }
    for factor, constants in forms.items():
        text = f"{X} {{ {MEAN} {tail} {factor} f = Mul(x, k) o = Mul(m, k) t = Sub(b, o) y = Add(f, t) }}"
        check(text, ["LayerNormalization"], 17, **constants)


NOT_NORM = {
    "rms-norm": (
        "q = Pow(x, two) v = ReduceMean<axes = [-1]>(q) e = Add(v, eps) s = Sqrt(e) n = Div(x, s) y = Mul(n, g)"
    ),
    "other-axis": NORM["pow"].replace("[-1]", "[1]") + " y = Mul(n, g)",
    "axes-differ": NORM["two-axes"].replace("[-1, -2]", "[-1]") + " y = Mul(n, g)",
    "no-epsilon": MEAN + "q = Pow(d, two) v = ReduceMean<axes = [-1]>(q) s = Sqrt(v) n = Div(d, s) y = Mul(n, g)",
    "cubed": NORM["pow"].replace("(d, two)", "(d, three)") + " t = Abs(n) y = Mul(t, g)",
    "other-tensor": NORM["pow"].replace("q = Pow(d, two)", "z = Abs(d) q = Pow(z, two)") + " y = Mul(n, g)",
}


@pytest.mark.parametrize("nodes", NOT_NORM.values(), ids=NOT_NORM)
def test_what_only_looks_like_layer_norm(nodes: str) -> None:
    text = f"{X} {{ {nodes} }}"
    before = build(text, used(text, g=normal(8)))
    assert "LayerNormalization" not in operators(ingested(before).proto)


def test_layer_norm_behind_which_something_varies_along_other_axes() -> None:
    text = f"{X} {{ {NORM['pow']} y = Mul(n, g) }}"
    check(text, ["LayerNormalization", "Mul"], g=normal(3, 1))


# --- chains that stay in parts ----------------------------------------------------------------------------

CHAINS = {
    "gelu-erf": GELU["torch"],
    "gelu-tanh": TANH["hugging-face"],
    "gelu-fast": TANH["fast"],
    "silu": "s = Sigmoid(x) y = Mul(x, s)",
    "mish": "p = Softplus(x) t = Tanh(p) y = Mul(x, t)",
    "mish-by-exp": "e = Exp(x) o = Add(e, one) l = Log(o) t = Tanh(l) y = Mul(x, t)",
    "hard-swish-of-another-slope": "a = Add(x, two) c = Clip(a, zero, six) p = Mul(x, c) y = Div(p, six)",
}


@pytest.mark.parametrize("nodes", CHAINS.values(), ids=CHAINS)
def test_no_quantizer_stands_inside_an_activation(nodes: str) -> None:
    """Between two matrix products, both of whose operands are quantized."""
    inner = nodes.replace("y = ", "act = ")
    text = f"(float[n,8] i) => (float[] y) {{ x = MatMul(i, w) {inner} y = MatMul(act, v) }}"
    model = ingested(build(text, used(text, w=normal(8, 8), v=normal(8, 3))))
    assert {site.tensor for site in make_plan(model).activations} == {"i", "x", "act", "y"}
