"""Fine-tuning as a whole: the parent process, the training process, and what comes back."""

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Digits
from helpers import build, normal, prepare
from onnx import helper, numpy_helper

from onnxqt.data import Batch, DataSource, open_samples
from onnxqt.errors import InstallationError, TrainingError, UsageError
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.numerics import Array, Grid
from onnxqt.pipeline import Settings
from onnxqt.pipeline import trim as run_pipeline
from onnxqt.runtime import Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.trim import Progress, Regime, Subject, Trimmed, TrimSettings, scheme_regime, trim
from onnxqt.trim import job as jobs
from onnxqt.trim.history import read_history
from onnxqt.trim.losses import Losses, softmax
from onnxqt.trim.prune import choose_quantiles, clip_at, largest
from onnxqt.trim.schedule import Schedule
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT, PRUNE_MEMORY

STEPS = 40
CLASSES = 5  # of the models with two heads
BATCH = 32
SCHEMES = (parse_scheme("w4a8-sym-pc"), parse_scheme("w3a8-asym-pt"))
# float32: sums of a few hundred terms in ONNX Runtime and in numpy, each rounded by 2^-24; sqrt(300) < 18
RELATIVE = 18 * 2.0**-24 * 7  # through seven layers
NAMES = (*map(str, SCHEMES), "float")


QUANTIZED = Schedule(warmup=0, bend=0, full=0)  # lambda is 1 from the first step on
FLOAT = Schedule(warmup=1, bend=1, full=1)  # and here it stays 0
HALFWAY = Schedule(warmup=0, bend=0, full=0.5, knee=0.5)  # here it begins at 1/2


def settings(**changes: Any) -> TrimSettings:
    return TrimSettings(**{"steps": STEPS, "batch_size": BATCH, **changes})


def regimes(*schemes: Scheme) -> tuple[Regime, ...]:
    return tuple(scheme_regime(scheme, "mse") for scheme in schemes)


def subject(digits: Digits, schemes: tuple[Scheme, ...] = SCHEMES) -> Subject:
    source = DataSource(str(digits.calib))
    return Subject(digits.model, digits.model, digits.plan, digits.ranges, regimes(*schemes), source)


def run(
    digits: Digits,
    folder: Path,
    chosen: TrimSettings,
    progress: Progress = lambda report: None,
    schemes: tuple[Scheme, ...] = SCHEMES,
) -> Trimmed:
    folder.mkdir(exist_ok=True)
    return trim(subject(digits, schemes), chosen, folder, progress)


def weights(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def first_batch(digits: Digits, data: Path, seed: int) -> Batch:
    samples, _ = open_samples(data, input_specs(digits.model)).split(HELD_FRACTION, HELD_LIMIT)
    return next(samples.shuffled(BATCH, seed))


def events(trimmed: Trimmed, kind: str) -> list[dict[str, Any]]:
    return [report for report in trimmed.history if report["event"] == kind]


@pytest.fixture(scope="module")
def folder(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp(f"trim-{digits.folder.name}")


@pytest.fixture(scope="module")
def trimmed(digits: Digits, folder: Path) -> Trimmed:
    return run(digits, folder, settings())


def test_history_tells_every_step_and_evaluation(trimmed: Trimmed) -> None:
    kinds = [report["event"] for report in trimmed.history]
    assert (kinds[0], kinds[-1]) == ("start", "done")
    steps = events(trimmed, "step")
    assert [report["step"] for report in steps] == list(range(STEPS))
    # Ten times in a run, once lambda is 1: from step 10 of 40 on.
    assert [report["step"] for report in events(trimmed, "evaluate")] == [12, 16, 20, 24, 28, 32, 36, 40]
    schedule = Schedule()
    assert [report["blend"] for report in steps] == [schedule.blend(step, STEPS) for step in range(STEPS)]
    peak = settings().settled(rounds_well=False).learning_rate or 0
    rates = [schedule.learning_rate(step, STEPS, peak) for step in range(STEPS)]
    assert [report["lr"] for report in steps] == rates
    assert {report["regime"] for report in steps} == set(NAMES)
    assert all(len(report["losses"]) == len(NAMES) for report in trimmed.history if "losses" in report)


def test_history_is_on_disk(trimmed: Trimmed, folder: Path) -> None:
    assert tuple(read_history(folder)) == trimmed.history
    assert len((folder / jobs.HISTORY).read_text().splitlines()) == len(trimmed.history)


def test_outcome_follows_from_the_history(trimmed: Trimmed) -> None:
    (start,) = events(trimmed, "start")
    helped, best_step = dict.fromkeys(NAMES, False), 0
    for report in events(trimmed, "evaluate"):
        if report["best"]:
            pairs = zip(NAMES, start["losses"], report["losses"], strict=True)
            helped, best_step = {name: after < before for name, before, after in pairs}, report["step"]
    assert (trimmed.steps, trimmed.best_step) == (STEPS, best_step)
    assert trimmed.helped == helped
    assert trimmed.step_ms_median == np.median([report["ms"] for report in events(trimmed, "step")])
    assert 0 < trimmed.seconds == events(trimmed, "step")[-1]["seconds"]
    assert (trimmed.stopped, trimmed.diverged, trimmed.reason) == (False, None, None)


def test_best_is_the_least_mean_of_the_losses_where_all_count_alike(torch_digits: Digits, tmp_path: Path) -> None:
    result = run(torch_digits, tmp_path, settings(steps=20, balance=0.0, schedule=QUANTIZED))
    (start,) = events(result, "start")
    best = np.mean(start["losses"])
    evaluations = events(result, "evaluate")
    assert len(evaluations) == 10
    for report in evaluations:
        assert report["best"] == (np.mean(report["losses"]) < best)
        best = min(best, np.mean(report["losses"]))


def test_checkpoint_is_a_plain_float_model(digits: Digits, trimmed: Trimmed) -> None:
    before, after = digits.model, trimmed.model
    assert trimmed.best_step > 0
    assert [node.op_type for node in after.graph.nodes] == [node.op_type for node in before.graph.nodes]
    assert not after.proto.functions
    assert (after.graph.inputs, after.graph.outputs) == (before.graph.inputs, before.graph.outputs)
    assert (after.opset, after.sha256) == (before.opset, before.sha256)
    assert "onnxqt" not in [entry.domain for entry in after.proto.opset_import]
    old, new = weights(before.proto), weights(after.proto)
    assert {name: value.shape for name, value in new.items()} == {name: value.shape for name, value in old.items()}
    trained = {
        tensor for node in digits.plan.integer_nodes if node.weight for tensor in (node.weight.tensor, node.bias)
    }
    moved = {name for name in old if not np.array_equal(old[name], new[name])}
    assert moved
    assert moved <= trained
    assert {site.tensor for site in digits.plan.weights} <= moved


def test_training_leaves_the_model_as_it_was(digits: Digits, trimmed: Trimmed) -> None:
    assert trimmed.steps
    fresh = ingest(digits.file)
    assert digits.model.proto.SerializeToString(deterministic=True) == fresh.proto.SerializeToString(deterministic=True)


def test_best_and_last_checkpoint_are_on_disk(digits: Digits, trimmed: Trimmed, folder: Path) -> None:
    best = weights(onnx.load(folder / jobs.BEST))
    for name, value in weights(trimmed.model.proto).items():
        np.testing.assert_array_equal(best[name], value)
    outputs = Session(onnx.load(folder / jobs.LAST)).run(digits.inputs)
    assert all(np.isfinite(value).all() for value in outputs.values())


def test_the_first_step_sees_the_float_model(digits: Digits, trimmed: Trimmed) -> None:
    """Distillation from itself at lambda 0: the loss is the entropy of the model's own probabilities."""
    batch = first_batch(digits, digits.calib, seed=0)
    (y,) = Session(digits.model.proto).run(batch.inputs).values()
    p = softmax(y).astype(np.float64)
    entropy = -float(np.mean(np.sum(p * np.log(np.maximum(p, 1e-30)), axis=1)))
    # log p of the most likely class is a difference of logits of that size
    tolerance = RELATIVE * float(np.abs(y).max())
    assert events(trimmed, "step")[0]["loss"] == pytest.approx(entropy, rel=0, abs=tolerance)


def halves(folder: Path) -> Subject:
    """y = x w with w = +-1/2: its unit is 1/2, its scale 1/254, so training that moves nothing changes not a bit."""
    w = np.where(normal(6, 5) > 0, 0.5, -0.5).astype(np.float32)
    prepared = prepare(build("(float[n,6] x) => (float[] y) { y = MatMul(x, w) }", {"w": w}))
    np.savez(folder / "data.npz", x=normal(100, 6))
    scheme = parse_scheme("w8a8-sym-pc")
    model, source = prepared.model, DataSource(str(folder / "data.npz"))
    return Subject(model, model, prepared.plan, prepared.ranges, regimes(scheme), source)


NOTHING_MOVES: Mapping[str, Any] = {"learning_rate": 1e-12, "schedule": QUANTIZED, "batch_size": 8, "prune": "none"}


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_untouched_model_wins_where_nothing_is_better(average: float, tmp_path: Path) -> None:
    """A step of 1e-12 changes no weight in float32: the losses are equal."""
    before = halves(tmp_path)
    result = trim(before, settings(steps=2, average=average, **NOTHING_MOVES), tmp_path)
    (start,) = events(result, "start")
    assert all(report["losses"] == start["losses"] for report in events(result, "evaluate"))
    assert result.best_step == 0
    assert result.helped == {"w8a8-sym-pc": False, "float": False}
    assert result.model is before.model
    assert not (tmp_path / jobs.BEST).exists()


def test_patience_ends_training_early(tmp_path: Path) -> None:
    result = trim(halves(tmp_path), settings(steps=50, patience=2, **NOTHING_MOVES), tmp_path)
    assert [report["step"] for report in events(result, "evaluate")] == [5, 10]
    assert (result.steps, result.stopped, result.best_step) == (10, True, 0)
    assert [report["patience"] for report in events(result, "stopped")] == [2]


@pytest.mark.parametrize("mode", ["tensor", "channel"])
def test_reverse_pruning_is_folded_into_the_checkpoint(mode: Any, torch_digits: Digits, tmp_path: Path) -> None:
    """After one refresh the clip is a tenth of the way from the largest weight to the quantile; then it is frozen."""
    scheme = parse_scheme(f"w2a8-sym-{'pt' if mode == 'tensor' else 'pc'}")
    chosen = settings(steps=1, learning_rate=1e-12, schedule=HALFWAY, prune=mode, average=0.0)
    run(torch_digits, tmp_path, chosen, schemes=(scheme,))
    plan = torch_digits.plan
    old, new = weights(torch_digits.model.proto), weights(onnx.load(tmp_path / jobs.LAST))
    grids = {scheme.per_channel: Grid(2, signed=True, narrow=True)}
    quantiles = choose_quantiles(plan, {site.tensor: old[site.tensor] for site in plan.weights}, grids, mode)
    assert any(np.any(quantile.share < 1) for quantile in quantiles.values())
    for site in plan.weights:
        weight, quantile = old[site.tensor], quantiles[site.tensor]
        size, clip = largest(weight, site.axis, quantile), clip_at(weight, site.axis, quantile)
        tau = np.where(quantile.share < 1, PRUNE_MEMORY * size + (1 - PRUNE_MEMORY) * clip, np.inf)
        limit = tau.reshape([-1 if i == site.axis else 1 for i in range(weight.ndim)]) if tau.ndim else tau
        # Three roundings to float32 each, of the clip and of unit (w / unit); the learning rate moves nothing.
        np.testing.assert_allclose(new[site.tensor], np.clip(weight, -limit, limit), rtol=4 * 2.0**-24, atol=1e-11)


def test_tails_tell_what_was_clipped(torch_digits: Digits, tmp_path: Path) -> None:
    result = run(torch_digits, tmp_path, settings(steps=20, schedule=HALFWAY, learning_rate=5e-3))
    assert result.best_step
    assert result.tails.keys() == {site.tensor for site in torch_digits.plan.weights}
    old, new = weights(torch_digits.model.proto), weights(result.model.proto)
    for name, (before, after) in result.tails.items():
        assert (before.largest, after.largest) == (np.abs(old[name]).max(), np.abs(new[name]).max())
    assert any(before.clipped > 0 for before, _ in result.tails.values())
    assert all(after.clipped == 0 for _, after in result.tails.values())


def test_diverging_training_never_makes_it_worse(torch_digits: Digits, tmp_path: Path) -> None:
    result = run(torch_digits, tmp_path, settings(steps=10, learning_rate=0.9))
    (start,) = events(result, "start")
    evaluations = events(result, "evaluate")
    assert max(np.mean(report["losses"]) for report in evaluations) > 3 * np.mean(start["losses"])
    if result.best_step:
        assert [report["best"] for report in evaluations if report["step"] == result.best_step] == [True]
    else:
        assert result.model is torch_digits.model


@pytest.mark.parametrize(
    ("scale", "steps", "what"),
    [
        (1e20, 2, r"the loss became (inf|nan) at step [12]"),
        (1e38, 1, "the weight '.*' became NaN or infinite by step 1"),
    ],
)
def test_training_that_diverges_ends_early_and_says_so(
    scale: float, steps: int, what: str, torch_digits: Digits, tmp_path: Path
) -> None:
    """SGD follows a huge loss: the outputs leave float32, or the weights do at once."""
    losses = Losses({"distill": scale})
    last = steps if what.startswith("the weight") else steps + 1
    chosen = settings(steps=last, optimizer="sgd", learning_rate=0.9, losses=losses, schedule=QUANTIZED)
    result = run(torch_digits, tmp_path, chosen)
    assert result.diverged is not None
    assert re.fullmatch(f"{what}: use a smaller --lr than 0.9", result.diverged)
    assert result.steps <= steps
    assert result.history[-1]["event"] == "done"
    assert result.model is torch_digits.model


def test_frozen_weights_keep_every_bit(torch_digits: Digits, tmp_path: Path) -> None:
    patterns = ("/3/*", "11.bias")
    result = run(torch_digits, tmp_path, settings(steps=20, schedule=QUANTIZED, freeze=patterns))
    frozen = {name for name in result.untouched if result.untouched[name] == "it is frozen by --freeze"}
    assert {name for name in frozen if not name.startswith("/3/")} == {"11.bias"}
    assert len(frozen) == 5
    old = weights(torch_digits.model.proto)
    for new in (weights(result.model.proto), weights(onnx.load(tmp_path / jobs.LAST))):
        moved = {name for name in old if not np.array_equal(old[name], new[name])}
        assert not moved & frozen
        assert "11.weight" in moved


def test_everything_frozen_leaves_nothing_to_train(torch_digits: Digits, tmp_path: Path) -> None:
    result = run(torch_digits, tmp_path, settings(freeze=("*",)))
    assert (result.steps, result.reason) == (0, "all weights are frozen by --freeze")
    assert result.model is torch_digits.model
    assert set(result.untouched.values()) == {"it is frozen by --freeze"}


def test_pattern_that_freezes_nothing_is_refused(torch_digits: Digits, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--freeze head\* matches none of the weights and biases, such as \['/0/"):
        run(torch_digits, tmp_path, settings(freeze=("/3/*", "head*")))


def test_accumulated_batches_are_one_batch(torch_digits: Digits, tmp_path: Path) -> None:
    """Two batches of 16 and one of 32, by SGD on the float network: the same samples, the same mean gradient."""
    common: dict[str, Any] = {"optimizer": "sgd", "learning_rate": 0.5, "schedule": FLOAT, "average": 0.0, "steps": 1}
    losses = Losses({"distill": 1e4})  # so that a student that still is its teacher moves at all
    runs = {}
    for name, size, count in (("two", 16, 2), ("one", 32, 1), ("half", 16, 1)):
        chosen = settings(batch_size=size, accumulate=count, losses=losses, **common)
        run(torch_digits, tmp_path / name, chosen)
        runs[name] = weights(onnx.load(tmp_path / name / jobs.LAST))
    old = weights(torch_digits.model.proto)
    moved = False
    for name, two in runs["two"].items():
        step = np.abs(runs["one"][name] - old[name]).max()
        # The gradient is a sum in another order, off by RELATIVE of its terms, which cancel to about a hundredth of
        # their size in a mean over 32 samples; both weights are rounded to 2^-24 of themselves thrice.
        tolerance = 100 * RELATIVE * step + 6 * 2.0**-24 * np.abs(old[name]).max()
        np.testing.assert_allclose(two, runs["one"][name], rtol=0, atol=tolerance)
        moved |= bool(np.abs(two - runs["half"][name]).max() > 10 * tolerance)
    assert moved


def test_each_update_takes_its_own_batches(torch_digits: Digits, tmp_path: Path) -> None:
    """The second update of two batches begins with the third batch."""
    chosen: dict[str, Any] = {"schedule": FLOAT, "learning_rate": 1e-12, "balance": 0.0}
    single = run(torch_digits, tmp_path / "single", settings(steps=4, **chosen))
    double = run(torch_digits, tmp_path / "double", settings(steps=2, accumulate=2, **chosen))
    losses = [report["loss"] for report in events(single, "step")]
    assert len(set(losses)) == 4
    means = [report["loss"] for report in events(double, "step")]
    assert means == [np.mean(losses[:2]), np.mean(losses[2:])]


# --- TensorBoard ----------------------------------------------------------------------------------------


def test_tensorboard_without_its_package_is_one_line(
    torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    message = r"^--tensorboard needs the package tensorboardX: pip install tensorboardX$"
    with pytest.raises(InstallationError, match=message):
        run(torch_digits, tmp_path, settings(tensorboard=True))


class FakeWriter:
    """Keeps what would be drawn."""

    made: list["FakeWriter"]

    def __init__(self, folder: str) -> None:
        self.folder, self.drawn, self.closed = folder, list[tuple[str, float, int]](), False
        self.made.append(self)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.drawn.append((name, value, step))

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_the_curves(torch_digits: Digits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeWriter, "made", [], raising=False)
    monkeypatch.setitem(sys.modules, "tensorboardX", type("Module", (), {"SummaryWriter": FakeWriter}))
    result = run(torch_digits, tmp_path, settings(steps=2, tensorboard=True))
    (writer,) = FakeWriter.made
    assert writer.closed
    assert Path(writer.folder).parent == tmp_path
    steps, evaluations = events(result, "step"), events(result, "evaluate")
    curves = {"loss": "loss", "blend": "lambda", "lr": "learning rate", "ms": "step/ms"}
    expected = [(curve, report[field], report["step"]) for report in steps for field, curve in curves.items()]
    expected += [("held out", np.mean(report["losses"]), report["step"]) for report in evaluations]
    assert sorted(writer.drawn) == sorted(expected)


# --- the user ends it -----------------------------------------------------------------------------------


def check_stopped(result: Trimmed, folder: Path, step: int) -> None:
    """It ended after a step, with the best weights until then."""
    assert (result.stopped, result.diverged) == (True, None)
    assert step <= result.steps < STEPS
    (stop,) = events(result, "stopped")
    assert stop["step"] == result.steps
    assert [report["step"] for report in events(result, "step")] == list(range(result.steps))
    last = events(result, "evaluate")[-1]
    assert last["step"] == result.steps
    assert result.history[-1]["event"] == "done"
    if result.best_step:
        best, kept = weights(result.model.proto), weights(onnx.load(folder / jobs.BEST))
        assert all(np.array_equal(best[name], kept[name]) for name in best)
    assert not (folder / jobs.STOP).exists()
    assert (folder / jobs.LAST).exists()


def test_stop_file_ends_training(torch_digits: Digits, tmp_path: Path) -> None:
    def progress(report: dict[str, Any]) -> None:
        if report["event"] == "step" and report["step"] == 5:
            (tmp_path / jobs.STOP).touch()

    check_stopped(run(torch_digits, tmp_path, settings(schedule=QUANTIZED), progress), tmp_path, 6)


def test_stop_file_of_an_earlier_run_stops_nothing(torch_digits: Digits, tmp_path: Path) -> None:
    (tmp_path / jobs.STOP).touch()
    assert run(torch_digits, tmp_path, settings(steps=2)).steps == 2


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, also where the tests run in the background and would ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
@pytest.mark.usefixtures("interruptible")
def test_interrupt_ends_training_after_the_step_at_hand(torch_digits: Digits, tmp_path: Path) -> None:
    def progress(report: dict[str, Any]) -> None:
        if report["event"] == "step" and report["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    check_stopped(run(torch_digits, tmp_path, settings(schedule=QUANTIZED), progress), tmp_path, 6)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_in_a_thread_leaves_signals_alone(torch_digits: Digits, tmp_path: Path) -> None:
    results: list[Trimmed] = []
    thread = threading.Thread(target=lambda: results.append(run(torch_digits, tmp_path, settings(steps=1))))
    thread.start()
    thread.join()
    assert [result.steps for result in results] == [1]


# --- the training process dies --------------------------------------------------------------------------


class Recorded(subprocess.Popen[str]):
    """Remembers every process that is started."""

    started: list["Recorded"]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.started.append(self)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    monkeypatch.setattr(Recorded, "started", [], raising=False)
    monkeypatch.setattr(subprocess, "Popen", Recorded)
    return Recorded.started


def gone(process: Recorded) -> bool:
    """Neither running nor waiting to be reaped."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return True
    return False


def killing(processes: list[Recorded], event: str) -> Progress:
    def progress(report: dict[str, Any]) -> None:
        if report["event"] == event:
            processes[-1].kill()

    return progress


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
def test_killed_process_is_a_clear_error_and_keeps_its_last_checkpoint(
    torch_digits: Digits, tmp_path: Path, processes: list[Recorded]
) -> None:
    with pytest.raises(TrainingError) as caught:
        run(torch_digits, tmp_path, settings(steps=400, schedule=QUANTIZED), killing(processes, "evaluate"))
    last = tmp_path / jobs.LAST
    message = f"was killed by SIGKILL; its last checkpoint is '{last}', its messages in '{tmp_path / jobs.LOG}'"
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert gone(processes[-1])
    outputs = Session(onnx.load(last)).run(torch_digits.inputs)
    assert all(np.isfinite(value).all() for value in outputs.values())


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
def test_process_killed_before_its_first_checkpoint(
    torch_digits: Digits, tmp_path: Path, processes: list[Recorded]
) -> None:
    run(torch_digits, tmp_path, settings(steps=2))
    with pytest.raises(TrainingError, match="was killed by SIGKILL; it had saved nothing yet"):
        run(torch_digits, tmp_path, settings(steps=400), killing(processes, "start"))
    assert not (tmp_path / jobs.LAST).exists()  # that of the run before would be a lie


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signals")
@pytest.mark.usefixtures("interruptible")
def test_second_interrupt_ends_the_run(torch_digits: Digits, tmp_path: Path, processes: list[Recorded]) -> None:
    def progress(report: dict[str, Any]) -> None:
        if report["event"] == "step":
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(torch_digits, tmp_path, settings(steps=400), progress)
    assert gone(processes[-1])
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_error_in_the_callers_callback_ends_the_process(
    torch_digits: Digits, tmp_path: Path, processes: list[Recorded]
) -> None:
    def progress(report: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(torch_digits, tmp_path, settings(steps=400), progress)
    assert gone(processes[-1])


# --- other losses, models and batch sizes ---------------------------------------------------------------


def test_cross_entropy_with_labels(torch_digits: Digits, tmp_path: Path) -> None:
    """The loss of labelled samples, without being asked for."""
    data = torch_digits.folder / "eval"
    labels = open_samples(data, input_specs(torch_digits.model)).targets
    model, plan, ranges = torch_digits.model, torch_digits.plan, torch_digits.ranges
    given = Subject(model, model, plan, ranges, regimes(*SCHEMES), DataSource(str(data)), labels)
    result = trim(given, settings(steps=4), tmp_path)
    batch = first_batch(torch_digits, data, seed=0)
    assert batch.labels is not None
    (y,) = Session(torch_digits.model.proto).run(batch.inputs).values()
    p = softmax(y).astype(np.float64)[np.arange(BATCH), batch.labels]
    tolerance = RELATIVE * float(np.abs(y).max())
    assert events(result, "step")[0]["loss"] == pytest.approx(-float(np.mean(np.log(p))), rel=0, abs=tolerance)


def with_batch(model: Path, size: int, target: Path) -> Path:
    """A model file whose batch axis is fixed."""
    proto = onnx.load(model)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = size
    del proto.graph.value_info[:]
    onnx.save(proto, target)
    return target


@pytest.mark.parametrize("size", [1, 7])
def test_model_with_a_fixed_batch_axis(torch_digits: Digits, tmp_path: Path, size: int) -> None:
    """7 divides neither the number of samples nor that of the held-out ones."""
    model = with_batch(torch_digits.file, size, tmp_path / "model.onnx")
    chosen = Settings(SCHEMES[:1], TrimSettings(steps=10))
    report = run_pipeline(model, torch_digits.calib, out=tmp_path / "out", settings=chosen).content
    assert report["training"]["steps"] == 10
    assert report["data"]["evaluation"]["samples"] == 120
    assert report["schemes"]["w4a8-sym-pc"]["emulator"]["max_lsb"] <= 1
    checkpoint = ingest(tmp_path / "out" / "checkpoint.onnx")
    assert checkpoint.graph.shape(checkpoint.graph.inputs[0]) == (size, 1, 8, 8)


def test_arrays_in_memory_train_like_files(torch_digits: Digits, tmp_path: Path) -> None:
    specs = input_specs(torch_digits.model)
    batches = list(open_samples(torch_digits.calib, specs).batches(400))
    arrays = {"image": np.concatenate([batch.inputs["image"] for batch in batches])}
    chosen = Settings(SCHEMES[:1], TrimSettings(steps=4))
    report = run_pipeline(torch_digits.file, arrays, out=tmp_path / "out", settings=chosen).content
    assert report["training"]["steps"] == 4
    assert report["data"]["calibration"]["samples"] == 1200


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
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])],
        [
            helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", CLASSES]),
            helper.make_tensor_value_info(f"z{len(second)}", onnx.TensorProto.FLOAT, ["n", 4]),
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def samples() -> dict[str, Array]:
    return {"x": normal(200, 6, seed=1)}


@pytest.mark.parametrize("second", [(), ("Softmax",), ("Softmax", "Identity")], ids=["scores", "softmax", "identity"])
def test_model_with_two_outputs_trains(second: tuple[str, ...], tmp_path: Path) -> None:
    model = two_heads(tmp_path / "model.onnx", second)
    settings = Settings(training=TrimSettings(steps=4, batch_size=16))
    report = run_pipeline(model, samples(), out=tmp_path / "out", settings=settings).content
    assert report["training"]["steps"] == 4
    scheme = report["schemes"]["w8a8-sym-pc"]
    assert list(scheme["trim"]["outputs"]) == list(ingest(model).graph.outputs)


@pytest.mark.parametrize("array", ["labels", "labels:y", "labels:z0"])
def test_labels_belong_to_one_of_two_outputs(array: str, tmp_path: Path) -> None:
    """The loss of the first step at lambda 0 is the cross-entropy of that output alone."""
    model = two_heads(tmp_path / "model.onnx", ())
    classes = 4 if array == "labels:z0" else CLASSES
    labels = np.random.default_rng(2).integers(0, classes, 200)
    chosen = Settings(training=TrimSettings(steps=4, batch_size=180, losses=Losses({"cross-entropy": 1.0})))
    data = {**samples(), array: labels}
    report = run_pipeline(model, data, out=tmp_path / "out", settings=chosen).content
    assert report["training"]["steps"] == 4
    first = next(r for r in read_history(tmp_path / "out" / "training") if r["event"] == "step")
    # The 180 samples that are not held out are one batch, in any order.
    ingested = ingest(model)
    trained, _ = open_samples(data, input_specs(ingested)).split(HELD_FRACTION, HELD_LIMIT)
    (batch,) = trained.batches(180)
    y = Session(model).run(batch.inputs)["z0" if array == "labels:z0" else "y"]
    p = softmax(y).astype(np.float64)[np.arange(180), labels[batch.index]]
    tolerance = RELATIVE * float(np.abs(y).max())
    assert first["loss"] == pytest.approx(-float(np.mean(np.log(p))), rel=0, abs=tolerance)


def test_labels_of_an_output_that_holds_no_classes_for_them(tmp_path: Path) -> None:
    model = two_heads(tmp_path / "model.onnx", ())
    data = {**samples(), "labels": np.zeros((200, 3), np.int64)}
    losses = Losses({"cross-entropy": 1.0})
    chosen = Settings(training=TrimSettings(steps=4, batch_size=16, losses=losses))
    message = r"the array 'labels' has shape .*, but the output 'y' .*takes one class number for each place"
    with pytest.raises(TrainingError, match=message):
        run_pipeline(model, data, out=tmp_path / "out", settings=chosen)
