"""The whole job on models that are unlike a classifier with a batch axis."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import invoke
from helpers import build, normal, save

from onnxqt.numerics import Array
from onnxqt.pipeline import Settings, scheme_file, trim
from onnxqt.report import Report
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings

SCHEME = "w8a8-sym-pc"


def run(model: onnx.ModelProto, data: Mapping[str, Array], folder: Path, steps: int = 5) -> Report:
    settings = Settings(schemes=(parse_scheme(SCHEME),), training=TrimSettings(steps=steps, batch_size=4))
    return trim(save(model, folder), data, out=folder / "out", settings=settings)


def written(folder: Path) -> Session:
    return Session(folder / "out" / scheme_file(SCHEME))


def test_a_mask_of_minus_infinity_stays_float(tmp_path: Path) -> None:
    """Two of five keys are masked: their probability must stay zero."""
    model = build(
        """(float[n,5,4] x, float[n,5,5] mask) => (float[] y) {
            q = MatMul(x, wq)  kt = MatMul(x, wk)  k = Transpose<perm = [0, 2, 1]>(kt)
            s = MatMul(q, k)  m = Add(s, mask)  p = Softmax(m)  v = MatMul(p, x)  y = MatMul(v, wo)
        }""",
        {"wq": normal(4, 4, seed=1), "wk": normal(4, 4, seed=2), "wo": normal(4, 4, seed=3)},
    )
    mask = np.zeros((5, 5), np.float32)
    mask[:, 3:] = -np.inf
    open_mask = Session(model).run  # samples have to be finite, so the mask is computed from a finite one
    model = build(
        """(float[n,5,4] x, float[n,5,5] kept) => (float[] y) {
            none = Constant<value_float = 0.0>()  one = Constant<value_float = 1.0>()
            mask = Log(kept)
            q = MatMul(x, wq)  kt = MatMul(x, wk)  k = Transpose<perm = [0, 2, 1]>(kt)
            s = MatMul(q, k)  m = Add(s, mask)  p = Softmax(m)  v = MatMul(p, x)  y = MatMul(v, wo)
        }""",
        {"wq": normal(4, 4, seed=1), "wk": normal(4, 4, seed=2), "wo": normal(4, 4, seed=3)},
    )
    x, kept = normal(40, 5, 4), np.broadcast_to(np.exp(mask), (40, 5, 5)).copy()
    report = run(model, {"x": x, "kept": kept}, tmp_path)
    reasons = {node["op_type"]: node["reason"] for node in report.content["plan"]["float_nodes"]}
    assert "takes NaN or infinite values" in reasons["Add"]
    assert "mask" in report.content["plan"]["unbounded_tensors"]
    assert report.content["training"]["steps"] == 5
    outputs = written(tmp_path).run({"x": x, "kept": kept})["y"]
    expected = open_mask({"x": x, "mask": np.broadcast_to(mask, (40, 5, 5)).copy()})["y"]
    noise = np.sum((outputs - expected) ** 2) / np.sum(expected**2)
    assert 10 * np.log10(1 / noise) > 30


def test_the_command_line_tells_what_stays_float_because_of_its_values(tmp_path: Path) -> None:
    text = "(float[n,4] x) => (float[] y) { a = MatMul(x, w) b = Relu(x) c = Log(b) d = Add(a, c) y = MatMul(d, v) }"
    file = save(build(text, {"w": normal(4, 4), "v": normal(4, 2)}), tmp_path)
    np.savez(tmp_path / "samples.npz", x=normal(20, 4))
    for command in ("calibrate", "export"):
        result = invoke(command, file, "--data", tmp_path / "samples.npz", "--out", tmp_path / command)
        assert result.exit_code == 0, result.stderr
        assert "such as 'c' take NaN or infinite values on the samples" in result.stderr


def test_a_model_without_a_batch_axis(tmp_path: Path) -> None:
    model = build(
        "(float[3,4] x, float gain) => (float[] y) { h = MatMul(x, w) r = Relu(h) g = Mul(r, gain) y = MatMul(g, v) }",
        {"w": normal(4, 6, seed=1), "v": normal(6, 2, seed=2)},
    )
    x, gain = normal(30, 3, 4), np.linspace(0.5, 1.5, 30, dtype=np.float32)
    report = run(model, {"x": x, "gain": gain}, tmp_path)
    assert report.content["training"]["steps"] == 5
    assert written(tmp_path).run({"x": x[0], "gain": gain[0, ...]})["y"].shape == (3, 2)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(float[n,4] x) => (float[] y) { y = Neg(x) }", "no Conv, ConvTranspose, Gemm or MatMul"),
        ("(float[n,4] x) => (int64[] y) { h = MatMul(x, w) y = ArgMax<axis = 1>(h) }", "no float output"),
        ("(float[n,4] x) => (float[] y) { h = MatMul(x, w) y = Floor(h) }", "Floor"),
    ],
)
def test_a_model_that_nothing_trains_is_quantized_all_the_same(text: str, reason: str, tmp_path: Path) -> None:
    report = run(build(text, {"w": normal(4, 3)} if "w" in text else None), {"x": normal(10, 4)}, tmp_path)
    training = report.content["training"]
    assert (training["steps"], reason in training["reason"]) == (0, True)
    assert written(tmp_path).run({"x": normal(2, 4)})["y"].shape[0] == 2


def test_recurrent_nodes_with_activations_written_out_do_not_stop_training(tmp_path: Path) -> None:
    """onnxruntime-training replaces LSTM by a kernel that knows no such attribute."""
    model = build(
        """(float[n,3,4] x) => (float[] y) {
            h = MatMul(x, w)  t = Transpose<perm = [1, 0, 2]>(h)
            all, last = LSTM<hidden_size = 5, activations = ["Sigmoid", "Tanh", "Tanh"]>(t, wi, wr)
            s = Squeeze(last, zero)  y = MatMul(s, v)
        }""",
        {
            **{"w": normal(4, 6, seed=1), "v": normal(5, 3, seed=2), "zero": np.array([0])},
            **{"wi": normal(1, 20, 6, seed=3), "wr": normal(1, 20, 5, seed=4)},
        },
    )
    report = run(model, {"x": normal(20, 3, 4)}, tmp_path)
    training = report.content["training"]
    assert training["steps"] == 5
    assert {name: "LSTM" in reason for name, reason in training["untouched"].items()} == {"w": True}


def test_outputs_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    model = build("(float[n,4] x) => (float[] y) { h = MatMul(x, w) y = Log(h) }", {"w": normal(4, 3)})
    report = run(model, {"x": normal(10, 4)}, tmp_path, steps=0)
    fidelity = report.content["schemes"][SCHEME]["trim"]["fidelity"]
    assert fidelity["non_finite"] >= 0
