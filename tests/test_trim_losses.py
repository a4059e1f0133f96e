from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxqt.errors import TrainingError
from onnxqt.ingest import ingest
from onnxqt.model import Model, editable, finish
from onnxqt.numerics import Array
from onnxqt.pipeline import Settings
from onnxqt.pipeline import trim as run_pipeline
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.trim.losses import LossName, Target, add_loss, find_targets, softmax, target_feeds

# Each case sums at most 200 float32 terms; their rounding errors, 2^-24 each, partly cancel: sqrt(200) < 16.
RELATIVE = 16 * 2.0**-24
CLASSES = 5
SAMPLES = 8


@dataclass(frozen=True)
class Network:
    """One operator and one shape for each output y0, y1, ... of the inputs x0, x1, ..."""

    outputs: tuple[tuple[str, tuple[int | str, ...]], ...]
    element_type: int = TensorProto.FLOAT

    def model(self) -> Model:
        indices = range(len(self.outputs))
        graph = helper.make_graph(
            [helper.make_node(op, [f"x{i}"], [f"y{i}"], name=f"n{i}") for i, (op, _) in enumerate(self.outputs)],
            "network",
            [helper.make_tensor_value_info(f"x{i}", self.element_type, self.outputs[i][1]) for i in indices],
            [helper.make_tensor_value_info(f"y{i}", self.element_type, self.outputs[i][1]) for i in indices],
        )
        opsets = [helper.make_opsetid("", 17)]
        return Model(helper.make_model(graph, opset_imports=opsets, ir_version=MAX_IR_VERSION), "")


SCORES = ("Neg", ("n", CLASSES))
PROBABILITIES = ("Softmax", ("n", CLASSES))
IMAGES = ("Neg", ("n", 3, 4))
NETWORKS = {
    "scores": Network((SCORES,)),
    "probabilities": Network((PROBABILITIES,)),
    "values": Network((IMAGES,)),
    "all": Network((SCORES, PROBABILITIES, IMAGES)),
    "two-probabilities": Network((PROBABILITIES, PROBABILITIES)),
}


def inputs_of(network: Network, seed: int) -> dict[str, Array]:
    """Random inputs of 8 samples, on quite different scales."""
    rng = np.random.default_rng(seed)
    shapes = [(SAMPLES, *map(int, shape[1:])) for _, shape in network.outputs]
    return {f"x{i}": rng.normal(0, 1 + i, shape).astype(np.float32) for i, shape in enumerate(shapes)}


def run_loss(
    network: Network, loss: LossName, labels: Array | None = None
) -> tuple[float, dict[str, Array], dict[str, Array], dict[str, float]]:
    """The loss of the graph with the outputs that it saw, the original's outputs, and the powers it was fed."""
    model = network.model()
    targets = find_targets(model)
    graph = editable(model.proto)
    add_loss(graph, targets, loss)
    session = Session(model.proto)
    original, student = session.run(inputs_of(network, 1)), session.run(inputs_of(network, 2))
    power = {target.output: 0.5 + i for i, target in enumerate(targets)}
    fed = {**inputs_of(network, 2), **target_feeds(targets, original, labels, power)}
    proto = finish(graph)
    names = {value.name for value in proto.graph.input}
    outputs = Session(proto).run({name: value for name, value in fed.items() if name in names})
    (value,) = outputs.values()
    assert value.shape == ()
    return float(value), student, original, power


def log_softmax(y: Array) -> Array:
    shifted: Array = y - y.max(axis=1, keepdims=True)
    logarithm: Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logarithm


def distillation(target: Target, student: Array, original: Array, power: float) -> float:
    y, y0 = student.astype(np.float64), original.astype(np.float64)
    loss = np.mean((y - y0) ** 2) / power
    if target.kind == "scores":
        loss -= np.mean(np.sum(np.exp(log_softmax(y0)) * log_softmax(y), axis=1))
    if target.kind == "probabilities":
        loss -= np.mean(np.sum(y0 * np.log(y), axis=1))
    return float(loss)


@pytest.mark.parametrize("name", NETWORKS)
def test_distillation_against_its_definition(name: str) -> None:
    network = NETWORKS[name]
    value, student, original, power = run_loss(network, "distill")
    targets = find_targets(network.model())
    expected = sum(distillation(t, student[t.output], original[t.output], power[t.output]) for t in targets)
    # Of probabilities p the logarithm takes p + 1e-7.
    floor = sum(1e-7 / float(student[t.output].min()) for t in targets if t.kind == "probabilities")
    assert value == pytest.approx(expected, rel=RELATIVE, abs=floor)


@pytest.mark.parametrize("name", ["scores", "probabilities"])
def test_cross_entropy_against_its_definition(name: str) -> None:
    network = NETWORKS[name]
    labels = np.random.default_rng(3).integers(0, CLASSES, SAMPLES)
    value, student, _, _ = run_loss(network, "cross-entropy", labels)
    y = student["y0"].astype(np.float64)
    logarithm = log_softmax(y) if name == "scores" else np.log(y)
    expected = -np.mean(logarithm[np.arange(SAMPLES), labels])
    floor = 1e-7 / y.min() if name == "probabilities" else 0.0
    assert value == pytest.approx(float(expected), rel=RELATIVE, abs=floor)


def test_distillation_is_least_at_the_original() -> None:
    network = NETWORKS["scores"]
    model = network.model()
    targets = find_targets(model)
    graph = editable(model.proto)
    add_loss(graph, targets, "distill")
    session = Session(finish(graph))
    original = Session(model.proto).run(inputs_of(network, 1))
    fed = target_feeds(targets, original, None, {"y0": 1.0})

    def loss(x: Array) -> float:
        return float(next(iter(session.run({"x0": x, **fed}).values())))

    x = inputs_of(network, 1)["x0"]
    p = softmax(original["y0"]).astype(np.float64)
    entropy = -float(np.mean(np.sum(p * np.log(p), axis=1)))
    assert loss(x) == pytest.approx(entropy, rel=RELATIVE, abs=0)
    moved = [loss(x + step * np.eye(CLASSES, dtype=np.float32)[c]) for step in (-0.25, 0.25) for c in range(CLASSES)]
    assert min(moved) > entropy * (1 + RELATIVE)


@pytest.mark.parametrize(
    ("output", "kind"),
    [
        (SCORES, "scores"),
        (PROBABILITIES, "probabilities"),
        (IMAGES, "values"),
        (("Neg", ("n", 1)), "values"),
        (("Neg", ("n", "m")), "values"),
        (("Softmax", ("n", 3, CLASSES)), "values"),
    ],
    ids=["scores", "probabilities", "images", "one-value", "unknown-width", "softmax-of-pixels"],
)
def test_kinds_of_outputs(output: tuple[str, tuple[int | str, ...]], kind: str) -> None:
    (target,) = find_targets(Network((output,)).model())
    assert (target.output, target.kind) == ("y0", kind)


def test_integer_outputs_are_no_targets() -> None:
    assert find_targets(Network((SCORES,), TensorProto.INT64).model()) == ()


def test_targets_of_distillation_are_probabilities_and_those_of_labels_one_hot() -> None:
    (target,) = find_targets(NETWORKS["scores"].model())
    y = inputs_of(NETWORKS["scores"], 1)["x0"]
    soft = target_feeds((target,), {"y0": y}, None, {"y0": 2.0})
    np.testing.assert_allclose(soft[target.classes_input].sum(axis=1), 1.0, rtol=RELATIVE, atol=0)
    np.testing.assert_array_equal(soft[target.values_input], y)
    assert soft[target.power_input] == 2.0
    hard = target_feeds((target,), {"y0": y}, np.array([4, 0, 1, 1, 2, 3, 0, 4]), {"y0": 2.0})
    np.testing.assert_array_equal(hard[target.classes_input].argmax(axis=1), [4, 0, 1, 1, 2, 3, 0, 4])
    np.testing.assert_array_equal(np.sort(hard[target.classes_input], axis=1), [[0, 0, 0, 0, 1]] * SAMPLES)


# --- trained, with outputs of every kind ----------------------------------------------------------------


def two_heads(path: Path, second: tuple[str, ...]) -> Path:
    """x (n, 6) -> scores (n, 5), and through the operators `second` another output (n, 4)."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(6, CLASSES)).astype(np.float32),
        "v": rng.normal(size=(6, 4)).astype(np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("MatMul", ["x", "v"], ["z0"])]
    nodes += [helper.make_node(op, [f"z{i}"], [f"z{i + 1}"]) for i, op in enumerate(second)]
    graph = helper.make_graph(
        nodes,
        "two heads",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6])],
        [
            helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES]),
            helper.make_tensor_value_info(f"z{len(second)}", TensorProto.FLOAT, ["n", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def samples(labels: bool = False) -> dict[str, Array]:
    rng = np.random.default_rng(1)
    arrays: dict[str, Array] = {"x": rng.normal(size=(200, 6)).astype(np.float32)}
    return {**arrays, "labels": rng.integers(0, CLASSES, 200)} if labels else arrays


@pytest.mark.parametrize("second", [(), ("Softmax",), ("Softmax", "Identity")], ids=["scores", "softmax", "identity"])
def test_model_with_two_outputs_trains(second: tuple[str, ...], tmp_path: Path) -> None:
    model = two_heads(tmp_path / "model.onnx", second)
    settings = Settings(steps=4, batch_size=16)
    report = run_pipeline(model, samples(), out=tmp_path / "out", settings=settings).content
    assert report["training"]["steps"] == 4
    scheme = report["schemes"]["w8a8-sym-pc"]
    assert list(scheme["trim"]["outputs"]) == list(ingest(model).graph.outputs)


def test_labels_need_one_output_of_class_scores(tmp_path: Path) -> None:
    model = two_heads(tmp_path / "model.onnx", ())
    settings = Settings(steps=4, batch_size=16)
    with pytest.raises(TrainingError, match=r"exactly one output of class scores .* has 2: use --loss distill"):
        run_pipeline(model, samples(labels=True), out=tmp_path / "out", settings=settings)
