"""Other versions of the operator set: the same function, or a refusal that names the operator."""

import numpy as np
import onnx
import pytest
from helpers import build, inputs_of

from onnxqt.errors import ModelError
from onnxqt.model import opset_of
from onnxqt.opset import convert_opset
from onnxqt.runtime import Session

ROUNDINGS = 1e-5  # float32 roundings of a few operations


@pytest.mark.parametrize(
    ("opset", "text", "expected"),
    [
        (7, "(float[2,4] x) => (float[] y) { y = Dropout<ratio = 0.5>(x) }", lambda x: x),
        (7, "(float[2,1,4] x) => (float[] y) { y = Squeeze<axes = [1]>(x) }", lambda x: x[:, 0]),
        (9, "(float[2,4] x) => (float[] y) { y = Clip<min = -0.5, max = 0.5>(x) }", lambda x: np.clip(x, -0.5, 0.5)),
        (11, "(float[2,4] x) => (float[] y) { y = ReduceSum<axes = [1], keepdims = 0>(x) }", lambda x: x.sum(axis=1)),
        (12, "(float[2,3,4] x) => (float[] y) { y = Softmax<axis = 1>(x) }", lambda x: softmax(x.reshape(2, 12))),
        (22, "(float[2,4,5] x) => (float[] y) { y = GlobalMaxPool(x) }", lambda x: x.max(axis=2, keepdims=True)),
        (24, "(float[2,4] x) => (float[] y) { y = Swish(x) }", lambda x: x / (1 + np.exp(-x))),
        (24, "(float[2,4] x) => (float[] y) { y = Swish<alpha = 2.0>(x) }", lambda x: x / (1 + np.exp(-2 * x))),
    ],
)
def test_the_same_function(opset: int, text: str, expected: object) -> None:
    model = build(text, opset=opset)
    target = 21 if opset > 21 else 17
    converted = convert_opset(model, target)
    assert opset_of(converted) == target
    feeds = inputs_of(model)
    assert callable(expected)
    want = expected(feeds["x"])
    got = Session(converted).run(feeds)["y"].reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=ROUNDINGS, atol=ROUNDINGS)


def softmax(x: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    e = np.exp(x - x.max(axis=1, keepdims=True))
    result: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = e / e.sum(axis=1, keepdims=True)
    return result.reshape(2, 3, 4)


def test_newer_operators_in_subgraphs_keep_their_default_attributes() -> None:
    text = """(bool c, float[2,3] x) => (float[2,3] y) {
        y = If(c) <then_branch = a () => (float[2,3] t) { t = Swish(x) },
                   else_branch = b () => (float[2,3] u) { u = Neg(x) }>
    }"""
    feeds = {"c": np.array(True), "x": np.linspace(-2, 2, 6, dtype=np.float32).reshape(2, 3)}
    got = Session(convert_opset(build(text, opset=24), 21)).run(feeds)["y"]
    np.testing.assert_allclose(got, feeds["x"] / (1 + np.exp(-feeds["x"])), rtol=ROUNDINGS)


def test_large_weights_are_not_lost() -> None:
    weight = np.random.default_rng(0).normal(size=(160, 160)).astype(np.float32)
    model = build("(float[2,160] x) => (float[2,160] y) { h = MatMul(x, w) y = Dropout(h) }", {"w": weight}, opset=8)
    converted = convert_opset(model, 17)
    x = np.ones((2, 160), np.float32)
    np.testing.assert_allclose(Session(converted).run({"x": x})["y"], x @ weight, rtol=1e-4, atol=1e-4)
    assert [value.name for value in converted.graph.input] == ["x"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("(float[2,4] x) => (int32[2,4] y) { y = BitCast<to = 6>(x) }", "BitCast 'y' does not exist there"),
        ('(int8[2,4] x) => (int8[2,4] y) { y = BitShift<direction = "LEFT">(x, x) }', "BitShift 'y'"),
    ],
)
def test_what_has_no_older_form_is_refused(text: str, named: str) -> None:
    with pytest.raises(ModelError, match=f"opset 28 cannot be converted to 21 .*{named}.*: export the model with"):
        convert_opset(build(text, opset=28, ir_version=onnx.IR_VERSION), 21)


def test_scan_of_opset_8_is_refused() -> None:
    text = """(float[1,2] s, float[1,3,2] x) => (float[1,2] last, float[1,3,2] all) {
        last, all = Scan<num_scan_inputs = 1, body = b (float[2] a, float[2] c) => (float[2] d, float[2] e) {
            d = Add(a, c)
            e = Identity(d)
        }>("", s, x)
    }"""
    model = onnx.parser.parse_model(f'<ir_version: 3, opset_import: ["": 8]> g {text}')
    with pytest.raises(ModelError, match=r"opset 8 cannot be converted to 17 .Scan had a batch axis.*newer opset"):
        convert_opset(model, 17)
