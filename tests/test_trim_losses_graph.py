"""A user's loss graph: its value, its gradient, how it is bound, and every refusal."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from helpers import build, normal, save
from onnx import helper

from onnxqt.data import Batch, InputSpec
from onnxqt.errors import ModelError, TrainingError
from onnxqt.model import Model, infer_shapes
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.runtime import Session
from onnxqt.trim.losses import (
    LOSS,
    Binding,
    Losses,
    Term,
    find_terms,
    least_loss,
    loss_feeds,
    teacher_outputs,
    with_loss,
)

I64, F32 = np.dtype(np.int64), np.dtype(np.float32)
N = 4
# Values sum at most 24 float32 terms of about 8 roundings each, which partly cancel: 8 sqrt(24) < 40.
RELATIVE = 40 * 2.0**-24
LABELS = (InputSpec("labels", I64, (None,)), InputSpec("labels:z", F32, (None, 2)))


def model(opset: int = 17) -> Model:
    """x + p -> y (4, 6) and z (4, 2); the names of its nodes and tensors also occur in the loss graphs."""
    text = (
        f"(float[{N},6] x) => (float[{N},6] y, float[{N},2] z, int64[{N},1] i)"
        "{ h = Add(x, p)\n y = Neg(h)\n z = MatMul(h, w)\n i = ArgMax<axis = 1>(h) }"
    )
    proto = infer_shapes(build(text, {"p": np.zeros((N, 6), np.float32), "w": normal(6, 2)}, opset=opset))
    for index, node in enumerate(proto.graph.node):
        node.name = f"n{index}"
    return Model(proto, "")


def terms_of(folder: Path, text: str, opset: int = 17, weight: float = 1.0, **constants: Array) -> tuple[Term, ...]:
    path = str(save(build(text, constants, opset), folder, "loss.onnx"))
    return find_terms(model(), make_plan(model()), Losses({"graph": weight}, graph=path), LABELS)


def x(seed: int) -> Array:
    return normal(N, 6, seed=seed)


TARGETS = {"labels": np.array([5, 0, 2, 2]), "labels:z": normal(N, 2, seed=9)}


def feeds(terms: tuple[Term, ...], seed: int = 1) -> dict[str, Array]:
    original = Session(model().proto).run({"x": x(2)})
    batch = Batch({"x": x(seed)}, None, np.arange(N), N, TARGETS)
    return {"x": x(seed), **loss_feeds(terms, batch, original, {})}


def value(terms: tuple[Term, ...], seed: int = 1, lossy: Model | None = None) -> float:
    (loss,) = Session((lossy or with_loss(model(), terms)).proto).run(feeds(terms, seed)).values()
    assert loss.shape == ()
    return float(loss)


# 0.1 mean((y - y0)^2) - mean(log softmax(y) of the labels) + mean(|z - t|)
EVERYTHING = """
    (float[n,6] y, float[n,6] original_y, int64[n] labels, float[n,2] z, float[n,2] labels_z) => (float loss) {
        h = Sub(y, original_y)
        p = Mul(h, h)
        squared = ReduceMean<keepdims = 0>(p)
        scaled = Mul(squared, w)
        entropy = SoftmaxCrossEntropyLoss(y, labels)
        away = Sub(z, labels_z)
        far = Abs(away)
        distance = ReduceMean<keepdims = 0>(far)
        both = Add(scaled, entropy)
        loss = Add(both, distance)
    }
"""


def everything() -> onnx.ModelProto:
    return renamed(build(EVERYTHING, {"w": np.array(0.1, np.float32)}))


def renamed(proto: onnx.ModelProto) -> onnx.ModelProto:
    """`original_y` becomes `original:y`, and likewise labels: ONNX text has no names with a colon."""

    def colon(name: str) -> str:
        return name.replace("original_", "original:").replace("labels_", "labels:")

    for node in proto.graph.node:
        names = [colon(name) for name in node.input]
        del node.input[:]
        node.input.extend(names)
    for entry in proto.graph.input:
        entry.name = colon(entry.name)
    return proto


def everything_terms(folder: Path, weight: float = 1.0) -> tuple[Term, ...]:
    path = str(save(everything(), folder, "loss.onnx"))
    return find_terms(model(), make_plan(model()), Losses({"graph": weight}, graph=path), LABELS)


def definition(given: Array, original: Array) -> float:
    w = normal(6, 2).astype(np.float64)
    y, q, z = -given, -original, given @ w
    logarithm = y - y.max(axis=1, keepdims=True)
    logarithm = logarithm - np.log(np.exp(logarithm).sum(axis=1, keepdims=True))
    entropy = -np.mean(logarithm[np.arange(N), TARGETS["labels"]])
    return float(0.1 * np.mean((y - q) ** 2) + entropy + np.mean(np.abs(z - TARGETS["labels:z"])))


def test_bindings(tmp_path: Path) -> None:
    (term,) = everything_terms(tmp_path)
    assert term.bindings == (
        Binding("y", "output", "y"),
        Binding("original:y", "original", "y"),
        Binding("labels", "labels", "labels", integer=True),
        Binding("z", "output", "z"),
        Binding("labels:z", "labels", "labels:z"),
    )
    assert teacher_outputs([term]) == ("y",)


def test_value(tmp_path: Path) -> None:
    terms = everything_terms(tmp_path, weight=2.0)
    expected = 2 * definition(x(1).astype(np.float64), x(2).astype(np.float64))
    assert value(terms) == pytest.approx(expected, rel=RELATIVE, abs=0)
    assert least_loss(terms, feeds(terms)) == 0


def test_mixed_with_other_terms(tmp_path: Path) -> None:
    """Inputs that two terms need are there once."""
    path = str(save(everything(), tmp_path, "loss.onnx"))
    losses = Losses({"graph": 1.0, "cross-entropy": 0.5, "l1": 3.0}, graph=path)
    terms = find_terms(model(), make_plan(model()), losses, LABELS)
    parts = [value((term,)) for term in terms]
    assert value(terms) == pytest.approx(sum(parts), rel=RELATIVE, abs=0)
    assert len(parts) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="the training process of the tests forks")
def test_gradient(tmp_path: Path) -> None:
    """Against central differences of the float64 definition, whose error is below 2e-8 of the largest."""
    terms = everything_terms(tmp_path)
    proto = with_loss(model(), terms).proto
    proto.graph.node.append(helper.make_node("Identity", [LOSS], ["loss"], name="named"))
    proto.graph.output[0].name = "loss"
    folder = tmp_path / "training"
    folder.mkdir()
    onnx.save(proto, folder / "forward.onnx")
    np.savez(folder / "feeds.npz", **feeds(terms))  # type: ignore[arg-type]
    subprocess.run([sys.executable, Path(__file__).with_name("trainer_process.py"), str(folder)], check=True)
    assert (folder / "gradients.npz").exists(), (folder / "log").read_text(errors="replace")[-1000:]
    with np.load(folder / "gradients.npz") as file:
        found = file["p"]
    given, expected, h = x(1).astype(np.float64), np.zeros((N, 6)), 1e-4
    for index in np.ndindex(given.shape):
        step = np.zeros(given.shape)
        step[index] = h
        moved = [definition(given + sign * step, x(2).astype(np.float64)) for sign in (1, -1)]
        expected[index] = (moved[0] - moved[1]) / (2 * h)
    np.testing.assert_allclose(found, expected, rtol=0, atol=(RELATIVE + 2e-8) * np.abs(expected).max())


def test_loss_of_one_element_and_integer_labels_taken_as_floats(tmp_path: Path) -> None:
    terms = terms_of(
        tmp_path,
        f"(float[{N},6] y, float[n] labels) => (float[1] loss) {{"
        "a = ReduceSum<keepdims = 0>(y)\n b = ReduceSum<keepdims = 0>(labels)\n c = Mul(a, b)\n"
        "loss = Unsqueeze(c, zero) }",
        zero=np.array([0]),
    )
    expected = -float(x(1).astype(np.float64).sum()) * 9
    # a sum of 24 terms that cancel in part: relative to the sum of their magnitudes
    assert value(terms) == pytest.approx(expected, rel=0, abs=RELATIVE * 9 * float(np.abs(x(1)).sum()))


@pytest.mark.parametrize(("loss_opset", "model_opset"), [(13, 17), (21, 17), (17, 21), (18, 17)])
def test_operator_sets_are_matched(tmp_path: Path, loss_opset: int, model_opset: int) -> None:
    text = "(float[n,6] y) => (float loss) { a = Mul(y, y)\n loss = ReduceMean<keepdims = 0>(a) }"
    path = str(save(build(text, opset=loss_opset), tmp_path, "loss.onnx"))
    plain = model(model_opset)
    terms = find_terms(plain, make_plan(plain), Losses({"graph": 1.0}, graph=path), ())
    expected = float(np.mean(x(1).astype(np.float64) ** 2))
    assert value(terms, lossy=with_loss(plain, terms)) == pytest.approx(expected, rel=RELATIVE, abs=0)


# --- refusals -----------------------------------------------------------------------------------------------

MEAN = "loss = ReduceMean<keepdims = 0>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            f"(float[n,6] score) => (float loss) {{ {MEAN}(score) }}",
            r"has the input 'score', but the model has the outputs \['y', 'z', 'i'\] \(each also as 'original:NAME', "
            r".*\) and the samples have the arrays \['labels', 'labels:z'\]: rename the input",
        ),
        (
            f"(float[n,6] y) => (float loss, float[n,6] b) {{ {MEAN}(y)\n b = Neg(y) }}",
            r"has the outputs \['loss', 'b'\]: give it one, the loss",
        ),
        (
            "(float[n,6] y) => (float[n] loss) { loss = ReduceMean<axes = [1], keepdims = 0>(y) }",
            r"gives out 'loss', float32 of shape \(None,\): end it in one float32 number, such as a ReduceMean",
        ),
        (
            "(float[n,6] y) => (int64 loss) { a = ReduceMean<keepdims = 0>(y)\n loss = Cast<to = 7>(a) }",
            r"gives out 'loss', int64 of shape \(\): end it in one float32 number",
        ),
        (f"(float[n,5] y) => (float loss) {{ {MEAN}(y) }}", r"takes 'y' of shape \(None, 5\), but it has \(4, 6\)"),
        (f"(float[n,6,1] y) => (float loss) {{ {MEAN}(y) }}", r"takes 'y' of shape .* change the input's shape"),
        (
            f"(float[n,6] y, int64[n,2] labels) => (float loss) {{ {MEAN}(y) }}",
            r"takes 'labels' of shape \(None, 2\), but it has \(None,\)",
        ),
        (
            f"(float[n,6] y, float[n,1] i) => (float loss) {{ {MEAN}(y) }}",
            "takes 'i' as float32, but it is int64: change the input's type to int64",
        ),
        (
            f"(float[n,6] y) => (float loss) {{ a = Round(y)\n {MEAN}(a) }}",
            "cannot be trained with: no gradient passes Round '.*', because it has a derivative of zero everywhere; wr",
        ),
        (
            f"(float[n,6] y, int64[n] labels) => (float loss) {{ a = Cast<to = 1>(labels)\n {MEAN}(a) }}",
            "does not depend on an output of the model: name an input like one of them",
        ),
    ],
)
def test_graph_that_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(TrainingError, match=r"the loss graph '.*loss\.onnx' " + message) as error:
        terms_of(tmp_path, text)
    assert "\n" not in str(error.value)


def test_labels_of_reals_taken_as_integers(tmp_path: Path) -> None:
    proto = renamed(build(f"(float[n,2] z, int64[n,2] labels_z) => (float loss) {{ {MEAN}(z) }}"))
    losses = Losses({"graph": 1.0}, graph=str(save(proto, tmp_path, "loss.onnx")))
    with pytest.raises(TrainingError, match="takes 'labels:z' as int64, but it is float32: change the input's type"):
        find_terms(model(), make_plan(model()), losses, LABELS)


def test_no_labels_for_a_graph(tmp_path: Path) -> None:
    path = str(save(build(f"(float[n,6] y, int64[n] labels) => (float loss) {{ {MEAN}(y) }}"), tmp_path, "loss.onnx"))
    with pytest.raises(TrainingError, match=r"'labels', but .* and the samples have no array 'labels': rename the in"):
        find_terms(model(), make_plan(model()), Losses({"graph": 1.0}, graph=path), ())


def broken(folder: Path, kind: str) -> Path:
    path = folder / "loss.onnx"
    if kind == "garbage":
        path.write_bytes(b"no model at all")
    elif kind == "outside":
        proto = build("(float[1,6] y) => (float loss) { a = Mul(y, w)\n loss = ReduceMean<keepdims = 0>(a) }")
        weight: Any = proto.graph.initializer.add()
        weight.name, weight.data_type, weight.data_location = "w", onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
        weight.dims.extend([1, 6])
        entry = weight.external_data.add()
        entry.key, entry.value = "location", "../secret"
        save(proto, folder, "loss.onnx")
    elif kind in ("opset", "ir"):
        proto = build("(float[n,6] y) => (float loss) { loss = ReduceMean<keepdims = 0>(y) }")
        if kind == "opset":
            proto.opset_import[0].version = 99
        else:
            proto.ir_version = 99
        save(proto, folder, "loss.onnx")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", r"loss\.onnx' is not a file"),
        ("garbage", r"loss\.onnx' is not an ONNX model or is truncated"),
        ("outside", r"weight 'w' of '.*loss\.onnx' points to '\.\./secret', outside the model's folder"),
        ("opset", r"loss\.onnx' has opset 99, but only those up to \d+ are known: export it with opset 17"),
        ("ir", r"loss\.onnx' is not a valid ONNX model \(.*ir_version.*\): export it again"),
    ],
)
def test_file_that_cannot_be_used(tmp_path: Path, kind: str, message: str) -> None:
    path = broken(tmp_path, kind)
    losses = Losses({"graph": 1.0}, graph=str(path))
    with pytest.raises(ModelError, match=message) as error:
        find_terms(model(), make_plan(model()), losses, LABELS)
    assert "\n" not in str(error.value)


def test_operator_set_that_cannot_be_matched(tmp_path: Path) -> None:
    """BitwiseNot came with opset 18."""
    text = (
        "(float[n,6] y, int64[n] labels) => (float loss) { a = BitwiseNot(labels)\n b = CastLike(a, y)\n"
        "c = ReduceMean<keepdims = 0>(b)\n d = ReduceMean<keepdims = 0>(y)\n loss = Mul(c, d) }"
    )
    path = str(save(build(text, opset=18), tmp_path, "loss.onnx"))
    with pytest.raises(ModelError, match=r"the loss graph '.*loss\.onnx': opset 18 cannot be converted to 17 \(.*Bitw"):
        find_terms(model(), make_plan(model()), Losses({"graph": 1.0}, graph=path), LABELS)
