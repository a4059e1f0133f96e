"""Shapes behind operators of foreign domains."""

import onnx
from helpers import build, ingested, normal

from onnxqt.plan import make_plan

SCALER = """(float[n,4] x) => (float[n,3] y) {
    s = ai.onnx.ml.Scaler<offset = [1.0], scale = [2.0]>(x)
    h = MatMul(s, w)
    y = Add(h, b)
}"""
DOMAIN = ', "ai.onnx.ml": 1'


def test_shapes_behind_a_foreign_operator_are_measured() -> None:
    model = ingested(build(SCALER, {"w": normal(4, 3), "b": normal(3)}, domains=DOMAIN))
    assert (model.graph.is_float("s"), model.graph.shape("s")) == (True, (None, 4))
    assert any("measured the shape of 's'" in change for change in model.changes)
    assert [node.op_type for node in make_plan(model).integer_nodes] == ["MatMul"]


def test_a_shape_that_the_file_tells_is_not_measured() -> None:
    proto = build(SCALER, {"w": normal(4, 3), "b": normal(3)}, domains=DOMAIN)
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("s", onnx.TensorProto.FLOAT, ["n", 4]))
    assert not any("measured" in change for change in ingested(proto).changes)


def test_a_model_that_does_not_run_on_ones_stays_as_it_is() -> None:
    text = """(float[n,4] x, int64[1] size) => (float[m] y) {
        s = ai.onnx.ml.Scaler<offset = [1.0], scale = [2.0]>(x)
        r = Reshape(s, size)
        y = Neg(r)
    }"""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17{DOMAIN}]> g {text}')
    assert not any("measured" in change for change in ingested(proto).changes)
