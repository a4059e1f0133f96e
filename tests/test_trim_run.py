"""Fine-tuning as a whole: the parent process, the training process, and what comes back."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import Digits
from onnx import numpy_helper

from onnxqt.data import Batch, open_samples
from onnxqt.errors import TrainingError
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.numerics import Array
from onnxqt.pipeline import Settings
from onnxqt.pipeline import trim as run_pipeline
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import HELD_FRACTION, HELD_LIMIT, Progress, Trimmed, TrimSettings, trim
from onnxqt.trim import job as jobs
from onnxqt.trim.losses import softmax
from onnxqt.trim.schedule import Schedule

STEPS = 40
BATCH = 32
SCHEMES = (parse_scheme("w4a8-sym-pc"), parse_scheme("w3a8-asym-pt"))
# float32: sums of a few hundred terms in ONNX Runtime and in numpy, each rounded by 2^-24; sqrt(300) < 18
RELATIVE = 18 * 2.0**-24 * 7  # through seven layers


def settings(**changes: Any) -> TrimSettings:
    return TrimSettings(**{"schemes": SCHEMES, "steps": STEPS, "batch_size": BATCH, **changes})


def run(digits: Digits, folder: Path, chosen: TrimSettings, progress: Progress = lambda report: None) -> Trimmed:
    folder.mkdir(exist_ok=True)
    return trim(digits.model, digits.plan, digits.ranges, digits.calib, chosen, folder, progress)


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
    assert [report["step"] for report in events(trimmed, "evaluate")] == list(range(4, STEPS + 1, 4))
    schedule = Schedule(STEPS)
    assert [report["blend"] for report in steps] == [schedule.blend(step) for step in range(STEPS)]
    assert [report["lr"] for report in steps] == [schedule.learning_rate(step, 1e-4) for step in range(STEPS)]
    assert all(len(report["losses"]) == len(SCHEMES) for report in trimmed.history if "losses" in report)


def test_outcome_follows_from_the_history(trimmed: Trimmed) -> None:
    (start,) = events(trimmed, "start")
    best, best_step, losses = np.mean(start["losses"]), 0, start["losses"]
    for report in events(trimmed, "evaluate"):
        better = np.mean(report["losses"]) < best
        assert report["best"] == better
        if better:
            best, best_step, losses = np.mean(report["losses"]), report["step"], report["losses"]
    assert (trimmed.steps, trimmed.best_step) == (STEPS, best_step)
    expected = {str(s): after < before for s, before, after in zip(SCHEMES, start["losses"], losses, strict=True)}
    assert trimmed.helped == expected
    assert trimmed.step_ms_median == np.median([report["ms"] for report in events(trimmed, "step")])
    assert 0 < trimmed.seconds == events(trimmed, "step")[-1]["seconds"]


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


def test_same_seed_same_bytes(torch_digits: Digits, tmp_path: Path) -> None:
    seeds = {"a": 7, "again": 7, "other": 8}
    runs = {name: run(torch_digits, tmp_path / name, settings(steps=12, seed=seed)) for name, seed in seeds.items()}
    bytes_of = {name: (tmp_path / name / jobs.LAST).read_bytes() for name in runs}
    assert bytes_of["a"] == bytes_of["again"]
    assert bytes_of["a"] != bytes_of["other"]
    losses = {name: [report["loss"] for report in events(result, "step")] for name, result in runs.items()}
    assert losses["a"] == losses["again"]
    assert losses["a"][0] != losses["other"][0]


def test_untouched_model_wins_where_nothing_is_better(torch_digits: Digits, tmp_path: Path) -> None:
    """A step of 1e-12 changes no weight in float32, and per channel nothing is pruned: the losses are equal."""
    chosen = settings(schemes=(parse_scheme("w8a8-sym-pc"),), steps=2, learning_rate=1e-12)
    result = run(torch_digits, tmp_path, chosen)
    assert result.best_step == 0
    assert result.helped == {"w8a8-sym-pc": False}
    assert not (tmp_path / jobs.BEST).exists()
    old, new = weights(torch_digits.model.proto), weights(result.model.proto)
    assert all(np.array_equal(old[name], new[name]) for name in old)


def test_reverse_pruning_is_folded_into_the_checkpoint(torch_digits: Digits, tmp_path: Path) -> None:
    chosen = settings(schemes=(parse_scheme("w2a8-sym-pt"),), steps=2, learning_rate=1e-12)
    run(torch_digits, tmp_path, chosen)
    old, new = weights(torch_digits.model.proto), weights(onnx.load(tmp_path / jobs.LAST))
    names = [site.tensor for site in torch_digits.plan.weights]
    assert any(np.abs(new[name]).max() < np.abs(old[name]).max() for name in names)
    for name in names:
        tau = np.abs(new[name]).max()
        # clipping alone: the learning rate moves nothing else by more than 1e-11
        np.testing.assert_allclose(new[name], np.clip(old[name], -tau, tau), rtol=0, atol=1e-11)


def test_diverging_training_never_makes_it_worse(torch_digits: Digits, tmp_path: Path) -> None:
    result = run(torch_digits, tmp_path, settings(steps=10, learning_rate=0.9))
    (start,) = events(result, "start")
    evaluations = events(result, "evaluate")
    assert max(np.mean(report["losses"]) for report in evaluations) > 10 * np.mean(start["losses"])
    if result.best_step:
        (best,) = [report for report in evaluations if report["step"] == result.best_step]
        assert np.mean(best["losses"]) < np.mean(start["losses"])
    else:
        assert result.model is torch_digits.model


@pytest.mark.parametrize("rate", [1e25, 1e38], ids=["loss", "weights"])
def test_training_that_diverges_ends_early_and_says_so(torch_digits: Digits, tmp_path: Path, rate: float) -> None:
    result = run(torch_digits, tmp_path, settings(steps=10, learning_rate=rate))
    assert result.diverged is not None
    assert re.search(
        r"became (inf|nan|NaN or infinite) (at|by) step \d+: use a smaller --lr than 1e\+", result.diverged
    )
    assert result.steps < 10 or "weight" in result.diverged
    assert result.model is torch_digits.model


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
        run(torch_digits, tmp_path, settings(steps=400), killing(processes, "evaluate"))
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
    data = torch_digits.folder / "eval"
    chosen = settings(steps=4, loss="cross-entropy", schemes=(parse_scheme("w8a8-sym-pc"),))
    result = trim(torch_digits.model, torch_digits.plan, torch_digits.ranges, data, chosen, tmp_path)
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
    chosen = Settings(schemes=SCHEMES[:1], steps=10)
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
    chosen = Settings(schemes=SCHEMES[:1], steps=4)
    report = run_pipeline(torch_digits.file, arrays, out=tmp_path / "out", settings=chosen).content
    assert report["training"]["steps"] == 4
    assert report["data"]["calibration"]["samples"] == 1200
