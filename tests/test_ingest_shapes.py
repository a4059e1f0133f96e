"""Shapes are computed ahead of time: exactly, or not at all."""

import re
from collections.abc import Mapping

import numpy as np
import pytest
from helpers import build, ingested, inputs_of, operators, run

from onnxqt.numerics import Array

INTEGERS: Mapping[str, Array] = {
    **{"i0": np.array(0), "i1": np.array(1), "i2": np.array(2), "v0": np.array([0]), "v1": np.array([1])},
    **{
        "v2": np.array([2]),
        "v3": np.array([3]),
        "minus": np.array([-1]),
        "twelve": np.array(12),
        "pair": np.array([0, 1]),
    },
    **{"v4": np.array([4]), "v6": np.array([6]), "v12": np.array([12]), "v24": np.array([24]), "half": np.array(3)},
}


def check(text: str, expected: list[str], target: list[int] | None = None, opset: int = 17) -> None:
    """Ingest leaves these operators, and the same result for several batch sizes."""
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    before = build(text, {name: value for name, value in INTEGERS.items() if name in words}, opset)
    model = ingested(before)
    assert sorted(operators(model.proto)) == sorted(expected)
    for batch in (1, 2, 5):
        inputs = inputs_of(before, batch)
        for name, value in run(before, inputs).items():
            np.testing.assert_array_equal(run(model.proto, inputs)[name], value)
    if target is not None:
        shape = next(node.inputs[1] for node in model.graph.nodes if node.op_type == "Reshape")
        np.testing.assert_array_equal(model.graph.constant(shape), target)
    assert not ingested(model.proto).changes


IMAGE = "(float[n,4,6,6] x) => (float[] y)"
TOKENS = "(float[n,s,24] x) => (float[] y)"
BATCH = "s = Shape(x) b = Gather(s, i0) u = Unsqueeze(b, v0)"

RESHAPES = {
    "torch-flatten": (f"{IMAGE} {{ {BATCH} t = Concat<axis = 0>(u, minus) y = Reshape(x, t) }}", [0, -1]),
    "torch-view": (f"{IMAGE} {{ {BATCH} t = Concat<axis = 0>(u, v4, v6, v6) y = Reshape(x, t) }}", [0, 4, 6, 6]),
    "channels-computed": (
        f"{IMAGE} {{ {BATCH} c = Gather(s, i1) k = Div(c, half) l = Unsqueeze(k, v0) "
        "t = Concat<axis = 0>(u, l, minus) y = Reshape(x, t) }",
        [0, 1, -1],
    ),
    "keras": (
        f"{IMAGE} {{ s = Shape(x) b = Slice(s, v0, v1, v0) t = Concat<axis = 0>(b, minus) y = Reshape(x, t) }}",
        [0, -1],
    ),
    "shape-attributes": (
        f"{IMAGE} {{ b = Shape<start = 0, end = 1>(x) t = Concat<axis = 0>(b, minus) y = Reshape(x, t) }}",
        [0, -1],
    ),
    "through-int32": (
        f"{IMAGE} {{ s = Shape(x) c = Cast<to = 6>(s) b = Slice(c, v0, v1) d = Cast<to = 7>(b) "
        "t = Concat<axis = 0>(d, minus) y = Reshape(x, t) }",
        [0, -1],
    ),
    "heads": (
        f"{TOKENS} {{ z = Shape(x) b = Gather(z, v0) l = Gather(z, v1) "
        "t = Concat<axis = 0>(b, l, v4, v6) y = Reshape(x, t) }",
        [0, 0, 4, 6],
    ),
    "batch-moves": (
        f"{IMAGE} {{ {BATCH} t = Concat<axis = 0>(v24, u, v6) y = Reshape(x, t) }}",
        [24, -1, 6],
    ),
    "batch-times-channels": (
        f"{IMAGE} {{ s = Shape(x) b = Gather(s, i0) c = Gather(s, i1) m = Mul(b, c) u = Unsqueeze(m, v0) "
        "t = Concat<axis = 0>(u, v6, v6) y = Reshape(x, t) }",
        [-1, 6, 6],
    ),
    "of-another-tensor-with-the-same-batch": (
        "(float[n,4] z, float[n,2,2] x) => (float[] y) { s = Shape(z) y = Reshape(x, s) }",
        [0, 4],
    ),
}


@pytest.mark.parametrize(("text", "target"), RESHAPES.values(), ids=RESHAPES)
def test_targets_of_reshape(text: str, target: list[int]) -> None:
    check(text, ["Reshape"], target)


KEPT = {
    "two-free": (
        f"{TOKENS} {{ z = Shape(x) b = Gather(z, v0) l = Gather(z, v1) "
        "t = Concat<axis = 0>(l, b, v24) y = Reshape(x, t) }"
    ),
    "free-and-minus-one": f"{IMAGE} {{ {BATCH} t = Concat<axis = 0>(minus, u) y = Reshape(x, t) }}",
    "zero-allowed": f"{IMAGE} {{ {BATCH} t = Concat<axis = 0>(u, minus) y = Reshape<allowzero = 1>(x, t) }}",
    "by-value": "(float[n,4] x, int64[2] t) => (float[n,m] y) { y = Reshape(x, t) }",
}


@pytest.mark.parametrize("text", KEPT.values(), ids=KEPT)
def test_targets_that_could_be_another_are_left(text: str) -> None:
    words = text.replace("(", " ").replace(")", " ").replace(",", " ").split()
    before = build(text, {name: value for name, value in INTEGERS.items() if name in words})
    model = ingested(before)
    assert operators(model.proto) == operators(before)
    assert not model.changes


FOLDED = {
    "size": "(float[2,4] x) => (float[] y) { s = Size(x) f = Cast<to = 1>(s) y = Mul(x, f) }",
    "one-known-dimension": f"{IMAGE} {{ s = Shape(x) c = Gather(s, i1) f = Cast<to = 1>(c) y = Div(x, f) }}",
    "range": (
        "(float[4,6] x) => (float[] y) { s = Shape(x) l = Gather(s, i0) r = Range(i0, l, i1) f = Cast<to = 1>(r) "
        "u = Unsqueeze(f, v1) y = Mul(x, u) }"
    ),
    "difference": (
        f"{IMAGE} {{ s = Shape(x) a = Gather(s, i1) b = Gather(s, i2) d = Sub(b, a) "
        "f = Cast<to = 1>(d) y = Mul(x, f) }"
    ),
}


@pytest.mark.parametrize("text", FOLDED.values(), ids=FOLDED)
def test_known_dimensions(text: str) -> None:
    check(text, ["Div" if "y = Div" in text else "Mul"])


def test_a_squeeze_that_an_exporter_makes_depend_on_the_shape() -> None:
    """`torch.squeeze` of an axis of unknown size becomes an If; here the size is known."""
    text = (
        "(float[n,1,6] x) => (float[n,6] y) { s = Shape(x) c = Gather(s, i1) q = Equal(c, i1) y = If(q) <"
        "then_branch = a () => (float[n,6] p) { p = Squeeze(x, v1) }, "
        "else_branch = o () => (float[n,1,6] r) { r = Identity(x) }> }"
    )
    check(text, ["Squeeze"])


def test_what_is_not_known_stays() -> None:
    check(f"{IMAGE} {{ s = Shape(x) c = Cast<to = 1>(s) y = ReduceSum(c) }}", ["Shape", "Cast", "ReduceSum"])


def test_a_negative_quotient_is_not_guessed() -> None:
    """ONNX divides integers towards zero, Python downwards."""
    nodes = "s = Shape(x) a = Gather(s, i1) b = Sub(a, twelve) d = Div(b, half) f = Cast<to = 1>(d) y = Mul(x, f)"
    check(f"{IMAGE} {{ {nodes} }}", ["Mul"])


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("limit = Abs(m) y = Range(i0, limit, i1)", ["Abs", "Squeeze", "Range"]),
        ("zero = Sub(m, m) start = Squeeze(zero) y = Range(start, five, v1)", ["Sub", "Squeeze", "Range"]),
    ],
    ids=["computed", "constant"],
)
def test_bounds_of_range_become_scalars(nodes: str, expected: list[str]) -> None:
    """ONNX Runtime takes a vector of one element only where it does not know the shape."""
    constants = {**{name: INTEGERS[name] for name in ("i0", "i1", "v1")}, "five": np.array([5])}
    model = ingested(build(f"(int64[1] m) => (int64[k] y) {{ {nodes} }}", constants))
    assert operators(model.proto) == expected
    assert any(re.match(r"made scalars of [12] operand\(s\) of Range 'Range_", change) for change in model.changes)
    np.testing.assert_array_equal(run(model.proto, {"m": np.array([5])})["y"], np.arange(5))
    assert not ingested(model.proto).changes
