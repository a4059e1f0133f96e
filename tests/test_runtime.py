"""The installation checks, and what a session says when it fails."""

from collections.abc import Iterator

import numpy as np
import onnx
import pytest

from onnxqt import runtime
from onnxqt.errors import InstallationError, ModelError
from onnxqt.runtime import Session, check_installation, check_trainer, executed_graph

RELU = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N, 3] x) => (float[N, 3] y) { y = Relu(x) }
"""


@pytest.fixture(autouse=True)
def _forget_the_installation() -> Iterator[None]:
    check_installation.cache_clear()
    yield
    check_installation.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, *distributions: str) -> None:
    monkeypatch.setattr(runtime, "installed", lambda name: "1.19.2" if name in distributions else None)


def test_two_distributions_that_overwrite_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "onnxruntime", runtime.TRAINER)
    with pytest.raises(InstallationError, match=r"both 'onnxruntime' and .* run 'pip uninstall -y onnxruntime onnxr"):
        Session(onnx.parser.parse_model(RELU))


def test_an_onnxruntime_that_cannot_be_imported_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "ort", None)
    with pytest.raises(InstallationError, match="'import onnxruntime' fails: run 'pip install --force-reinstall"):
        executed_graph(onnx.parser.parse_model(RELU))


def test_without_the_trainer_only_training_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "onnxruntime")
    x = np.array([[-1, 0, 2]], np.float32)
    np.testing.assert_array_equal(Session(onnx.parser.parse_model(RELU)).run({"x": x})["y"], [[0, 0, 2]])
    with pytest.raises(InstallationError, match=r"fine-tuning needs 'onnxruntime-training-cpu'.*other commands work"):
        check_trainer()


def test_failures_are_one_line() -> None:
    model = onnx.parser.parse_model(RELU.replace("Relu(x)", "foreign.Op(x)").replace("17]", '17, "foreign" : 1]'))
    with pytest.raises(ModelError, match=r"ONNX Runtime cannot run the model: .*foreign") as caught:
        Session(model)
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"the model fails on these inputs: .*Invalid.* rank") as caught:
        Session(onnx.parser.parse_model(RELU)).run({"x": np.zeros(3, np.float32)})
    assert "\n" not in str(caught.value)


def test_the_executed_graph_shows_fused_kernels() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 2] x) => (float[N, 2] y) <float s = {0.1}, uint8 z = {3}> {
            a = QuantizeLinear(x, s, z)  b = DequantizeLinear(a, s, z)  c = Sigmoid(b)
            d = QuantizeLinear(c, s, z)  y = DequantizeLinear(d, s, z)
        }
    """)
    assert "QLinearSigmoid" in [node.op_type for node in executed_graph(model).graph.node]


def test_every_operator_that_onnx_runtime_lacks_is_named() -> None:
    text = "(float[n,4] x) => (float[n,4] y) { a = my.domain.Foo(x) b = Neg(a) y = other.Bar(b) }"
    model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17, "my.domain": 1, "other": 1]> g {text}')
    with pytest.raises(ModelError, match=r"cannot run the model: .*\(it has no operators my.domain::Foo, other::Bar\)"):
        Session(model)
