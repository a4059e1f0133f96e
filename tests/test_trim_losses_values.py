"""Every term of the loss, its value and its gradient as onnxruntime-training computes it, against numpy in float64.

The model is y = operator(x + p) with the parameter p = 0, so the gradient by p is that by x. The reference is the
derivative of a float64 definition by central differences with the step h = 1e-4: their error is h^2 / 6 times the
third derivative, which is below 10 times the largest gradient here, so below 2e-8 of it.
"""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import build
from onnx import helper

from onnxqt.data import Batch, InputSpec
from onnxqt.model import Model, infer_shapes
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.runtime import Session, with_outputs
from onnxqt.trim.losses import (
    LOSS,
    Losses,
    Term,
    find_terms,
    least_loss,
    loss_feeds,
    measure_power,
    teacher_outputs,
    with_loss,
)

# A term sums at most 200 float32 products of up to 8 roundings each, 2^-24 each, which partly cancel: 8 sqrt(200).
RELATIVE = 8 * 16 * 2.0**-24
STEP = 1e-4
N = 4
FLOOR = 1e-7

Definition = Callable[[Array, Array, Array], float]  # y, y of the original model, labels -> the loss


def softmax(y: Array, axis: int) -> Array:
    shifted = np.exp(y - y.max(axis=axis, keepdims=True))
    p: Array = shifted / shifted.sum(axis=axis, keepdims=True)
    return p


def entropy(expected: Array, p: Array, axis: int) -> float:
    return -float(np.mean(np.sum(expected * np.log(p), axis=axis)))


def binary(expected: Array, p: Array) -> float:
    return -float(np.mean(expected * np.log(p + FLOOR) + (1 - expected) * np.log(1 - p + FLOOR)))


def normalised(y: Array, original: Array) -> float:
    return float(np.mean((y - original) ** 2) / np.var(original))


def one_hot(labels: Array, classes: int, axis: int) -> Array:
    return np.moveaxis(np.eye(classes)[labels], -1, axis)


def logits(y: Array, labels: Array) -> float:
    return float(np.mean(np.maximum(y, 0) - y * labels + np.log1p(np.exp(-np.abs(y)))))


@dataclass(frozen=True, eq=False)
class Case:
    """One loss of one output: y = operator(x + p).

    Attributes:
        losses: asked for.
        shape: of x and y, without the batch.
        definition: the loss in numpy.
        operator: ONNX text of the operator.
        apply: the same in numpy.
        labels: of the samples.
    """

    losses: Losses
    shape: tuple[int, ...]
    definition: Definition
    operator: str = "Neg(h)"
    apply: Callable[[Array], Array] = np.negative
    labels: Array = field(default_factory=lambda: np.zeros(0, np.int64))

    def model(self) -> Model:
        dims = ",".join(map(str, (N, *self.shape)))
        text = f"(float[{dims}] x) => (float[{dims}] y) {{ h = Add(x, p)\n y = {self.operator} }}"
        proto = infer_shapes(build(text, {"p": np.zeros((N, *self.shape), np.float32)}))
        for index, node in enumerate(proto.graph.node):
            node.name = f"n{index}"
        return Model(proto, "")

    def targets(self) -> tuple[InputSpec, ...]:
        if not self.labels.size:
            return ()
        return (InputSpec("labels", self.labels.dtype, (None, *self.labels.shape[1:])),)

    def terms(self) -> tuple[Term, ...]:
        model = self.model()
        return find_terms(model, make_plan(model), self.losses, self.targets())

    def x(self, seed: int) -> Array:
        """Inputs away from 0 by more than the step."""
        rng = np.random.default_rng(seed)
        shape = (N, *self.shape)
        return (rng.choice([-1, 1], shape) * rng.uniform(0.05, 2.5, shape)).astype(np.float32)

    def feeds(self, x: Array) -> dict[str, Array]:
        terms = self.terms()
        tensors = teacher_outputs(terms)
        session = Session(with_outputs(self.model().proto, tensors), outputs=tensors or None)
        original = session.run({"x": self.x(1)})
        targets = {"labels": self.labels} if self.labels.size else {}
        batch = Batch({"x": x}, None, np.arange(N), N, targets)
        return {"x": x, **loss_feeds(terms, batch, original, measure_power(terms, [original]))}

    def expected(self, x: Array) -> float:
        original = self.apply(self.x(1).astype(np.float64))
        return self.definition(self.apply(x), original, self.labels)


def sigmoid(x: Array) -> Array:
    y: Array = 1 / (1 + np.exp(-x))
    return y


def at(temperature: float, axis: int, probabilities: bool = False) -> Definition:
    """Distillation of class scores, or of probabilities."""

    def loss(y: Array, q: Array, _: Array) -> float:
        scores = [np.log(part + FLOOR) if probabilities else part for part in (y, q)]
        if probabilities and temperature == 1:
            return entropy(q, y + FLOOR, axis) + normalised(y, q)
        student, teacher = (softmax(part / temperature, axis) for part in scores)
        return temperature**2 * entropy(teacher, student, axis) + normalised(y, q)

    return loss


def against_labels(classes: int, axis: int, probabilities: bool = False) -> Definition:
    def loss(y: Array, _: Array, labels: Array) -> float:
        return entropy(one_hot(labels, classes, axis), y + FLOOR if probabilities else softmax(y, axis), axis)

    return loss


RNG = np.random.default_rng(3)
CLASSES = RNG.integers(0, 5, N)
PIXELS = RNG.integers(0, 5, (N, 2, 3))
TOKENS = RNG.integers(0, 5, (N, 3))
HARD = RNG.integers(0, 2, (N, 5))
SOFT = RNG.uniform(0, 1, (N, 5)).astype(np.float32)
REAL = RNG.normal(size=(N, 3, 4)).astype(np.float32)
DISTILL = Losses()
WARM = Losses(temperature=3.0)


def only(name: str) -> Losses:
    return Losses({name: 1.0})


SOFTMAX = ("Softmax<axis = -1>(h)", lambda x: softmax(x, -1))
CASES = {
    "distill-scores": Case(DISTILL, (5,), at(1, 1)),
    "distill-scores-warm": Case(WARM, (5,), at(3, 1)),
    "distill-probabilities": Case(DISTILL, (5,), at(1, 1, True), *SOFTMAX),
    "distill-probabilities-warm": Case(WARM, (5,), at(3, 1, True), *SOFTMAX),
    "distill-pixels": Case(DISTILL, (5, 2, 3), at(1, 1, True), "Softmax<axis = 1>(h)", lambda x: softmax(x, 1)),
    "distill-log-probabilities": Case(
        DISTILL, (3, 5), at(1, -1), "LogSoftmax<axis = -1>(h)", lambda x: np.log(softmax(x, -1))
    ),
    "distill-binary": Case(DISTILL, (3, 2), lambda y, q, _: binary(q, y) + normalised(y, q), "Sigmoid(h)", sigmoid),
    "distill-values": Case(DISTILL, (3, 4), lambda y, q, _: normalised(y, q)),
    "features": Case(
        Losses({"features": 1.0}, features=("h",)),
        (3, 4),
        lambda y, q, _: normalised(np.log(y), np.log(q)),
        "Exp(h)",
        np.exp,
    ),
    "cross-entropy": Case(only("cross-entropy"), (5,), against_labels(5, 1), labels=CLASSES),
    "cross-entropy-pixels": Case(only("cross-entropy"), (5, 2, 3), against_labels(5, 1), labels=PIXELS),
    "cross-entropy-tokens": Case(only("cross-entropy"), (3, 5), against_labels(5, 2), labels=TOKENS),
    "cross-entropy-probabilities": Case(
        only("cross-entropy"), (5,), against_labels(5, 1, True), *SOFTMAX, labels=CLASSES
    ),
    "bce": Case(only("bce"), (5,), lambda y, _, t: logits(y, t), labels=HARD),
    "bce-soft": Case(only("bce"), (5,), lambda y, _, t: logits(y, t), labels=SOFT),
    "bce-probabilities": Case(only("bce"), (5,), lambda y, _, t: binary(t, y), "Sigmoid(h)", sigmoid, labels=SOFT),
    "mse": Case(only("mse"), (3, 4), lambda y, _, t: float(np.mean((y - t) ** 2)), labels=REAL),
    "l1": Case(only("l1"), (3, 4), lambda y, _, t: float(np.mean(np.abs(y - t))), labels=REAL),
    "mixed": Case(
        Losses({"distill": 0.25, "cross-entropy": 3.0}),
        (5,),
        lambda y, q, t: 0.25 * at(1, 1)(y, q, t) + 3 * against_labels(5, 1)(y, q, t),
        labels=CLASSES,
    ),
}


def run(case: Case, x: Array) -> float:
    (value,) = Session(with_loss(case.model(), case.terms()).proto).run(case.feeds(x)).values()
    assert value.shape == ()
    return float(value)


@pytest.mark.parametrize("name", CASES)
def test_value(name: str) -> None:
    case = CASES[name]
    x = case.x(2)
    assert run(case, x) == pytest.approx(case.expected(x.astype(np.float64)), rel=RELATIVE, abs=0)


# --- gradients --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Array]:
    if sys.platform == "win32":
        pytest.skip("the training process of the tests forks")
    root = tmp_path_factory.mktemp("losses")
    for name, case in CASES.items():
        write_training(root / name, with_loss(case.model(), case.terms()).proto, case.feeds(case.x(2)))
    zero = np.zeros((N, 5), np.float32)
    bce = CASES["bce"]
    write_training(root / "bce-at-zero", with_loss(bce.model(), bce.terms()).proto, bce.feeds(zero))
    folders = [str(folder) for folder in root.iterdir()]
    subprocess.run([sys.executable, Path(__file__).with_name("trainer_process.py"), *folders], check=True)
    found = {}
    for folder in root.iterdir():
        assert (folder / "gradients.npz").exists(), (folder / "log").read_text(errors="replace")[-1000:]
        with np.load(folder / "gradients.npz") as file:
            found[folder.name] = file["p"]
    return found


def write_training(folder: Path, proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> None:
    """A case for the training process of the tests, which wants its loss to be called `loss`."""
    named = onnx.ModelProto()
    named.CopyFrom(proto)
    named.graph.node.append(helper.make_node("Identity", [LOSS], ["loss"], name="named"))
    named.graph.output[0].name = "loss"
    folder.mkdir()
    onnx.save(named, folder / "forward.onnx")
    np.savez(folder / "feeds.npz", **feeds)  # type: ignore[arg-type]  # numpy's stub takes names for options


@pytest.mark.parametrize("name", CASES)
def test_gradient(name: str, gradients: Mapping[str, Array]) -> None:
    case = CASES[name]
    x = case.x(2).astype(np.float64)
    expected = np.zeros(x.shape)
    for index in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[index] = STEP
        expected[index] = (case.expected(x + step) - case.expected(x - step)) / (2 * STEP)
    largest = np.abs(expected).max()
    np.testing.assert_allclose(gradients[name], expected, rtol=0, atol=(RELATIVE + 2e-8) * largest)


def test_binary_cross_entropy_has_its_gradient_where_a_score_is_zero(gradients: Mapping[str, Array]) -> None:
    """A quantized score is often exactly 0: d/dx mean(bce(-x, t)) = (t - 1/2) / count there."""
    np.testing.assert_allclose(gradients["bce-at-zero"], (HARD - 0.5) / HARD.size, rtol=RELATIVE, atol=0)


# --- what else the values must be ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["distill-scores", "distill-scores-warm", "distill-probabilities", "distill-binary"])
def test_least_loss_of_distillation_is_that_of_the_original(name: str) -> None:
    """The floor of the logarithm moves the loss of probabilities p by at most 1e-7 times classes."""
    case = CASES[name]
    feeds = case.feeds(case.x(1))
    assert least_loss(case.terms(), feeds) == pytest.approx(run(case, case.x(1)), rel=RELATIVE, abs=5 * FLOOR)
    assert run(case, case.x(2)) > 1.01 * least_loss(case.terms(), feeds)


def test_least_loss_of_labels() -> None:
    """0 where labels can be met; the entropy of soft labels for bce."""
    case = CASES["bce-soft"]
    expected = binary(SOFT.astype(np.float64), SOFT.astype(np.float64))
    found = least_loss(case.terms(), case.feeds(case.x(2)))
    assert found == pytest.approx(expected, rel=0, abs=2 * FLOOR)
    for name in ("cross-entropy", "mse", "l1", "bce"):
        assert least_loss(CASES[name].terms(), CASES[name].feeds(CASES[name].x(2))) == 0
    mixed, distilled = CASES["mixed"], CASES["distill-scores"]
    least = [least_loss(case.terms(), case.feeds(case.x(2))) for case in (mixed, distilled)]
    assert least[0] == pytest.approx(0.25 * least[1], rel=1e-12, abs=0)


@pytest.mark.parametrize("name", CASES)
def test_every_term_is_finite_for_extreme_outputs(name: str) -> None:
    case = CASES[name]
    if case.operator == "Exp(h)":
        return  # its own output is not finite
    x = np.where(case.x(2) > 0, np.float32(1e4), np.float32(-1e4))
    assert np.isfinite(run(case, x))


def test_probabilities_that_rounding_brings_beyond_one_are_finite() -> None:
    """A quantized Sigmoid can give out 1 + s/2: here its output is fed directly."""
    case = CASES["bce-probabilities"]
    loss = with_loss(case.model(), case.terms()).proto
    cut = onnx.utils.Extractor(loss).extract_model(["y", "onnxqt.labels:labels"], [LOSS])
    y = np.full((N, 5), 1.004, np.float32)
    (value,) = Session(cut).run({"y": y, "onnxqt.labels:labels": HARD.astype(np.float32)}).values()
    assert np.isfinite(value)


def test_variance_is_that_of_all_batches_together() -> None:
    rng = np.random.default_rng(0)
    batches = [{"y": (rng.normal(1e3, 1, (n, 5))).astype(np.float32)} for n in (8, 8, 3)]
    terms = (Term("distill", 1.0, "y"), Term("features", 1.0, "y"), Term("l1", 1.0, "z"))
    whole = np.concatenate([batch["y"] for batch in batches]).astype(np.float64)
    # Float64 moments: the squares of values near 1e3 would cost 6 digits, the merged deviations cost none.
    assert measure_power(terms, batches) == {"y": pytest.approx(np.var(whole), rel=1e-12, abs=0)}
    assert measure_power(terms, [{"y": np.ones((4, 5), np.float32)}]) == {"y": 1e-12}
    assert measure_power(terms[2:], batches) == {}


def test_labels_of_a_filled_batch_are_repeated() -> None:
    terms = (Term("cross-entropy", 1.0, "y", "scores", 1, 5, "labels", integer=True),)
    batch = Batch({"x": np.zeros((4, 2))}, None, np.arange(2), 4, {"labels": np.array([3, 1])})
    assert loss_feeds(terms, batch, {}, {})["onnxqt.labels:labels"].tolist() == [3, 1, 1, 1]
