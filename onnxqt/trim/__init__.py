"""Stage 4, trim: fine-tune a float model so that it survives quantization.

The parent process writes a training graph and its settings into a folder, starts the worker there, follows its
reports and returns the best weights. The worker's process may die; the parent and the files do not.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqt.calibrate import RangeMethod, RangeTable, activation_params
from onnxqt.errors import TrainingError
from onnxqt.model import Model, editable, finish
from onnxqt.plan import QuantPlan
from onnxqt.runtime import check_trainer
from onnxqt.schemes import Scheme
from onnxqt.trim import job as jobs
from onnxqt.trim.gradients import DOMAIN, Flow, Registration, find_flow, make_differentiable, static_rules
from onnxqt.trim.losses import LossName, Target, add_loss, find_targets
from onnxqt.trim.quantizers import functions, insert

DEFAULT_LEARNING_RATE = 1e-4
HELD_FRACTION = 0.1
HELD_LIMIT = 512
REFRESH_EVERY = 20
EVALUATIONS = 10


@dataclass(frozen=True)
class TrimSettings:
    """How to fine-tune.

    Attributes:
        schemes: the schemes to become robust to; one is drawn for each step.
        steps: optimizer updates.
        batch_size: samples of an update.
        learning_rate: peak of AdamW's learning rate.
        seed: of the order of samples and schemes.
        loss: "distill" (no labels) or "cross-entropy".
        method: how the activations' ranges are chosen.
    """

    schemes: tuple[Scheme, ...]
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = DEFAULT_LEARNING_RATE
    seed: int = 0
    loss: LossName = "distill"
    method: RangeMethod = "mse"


@dataclass(frozen=True, eq=False)
class Trimmed:
    """The outcome of fine-tuning.

    Attributes:
        model: the float model with the best weights; the untouched one if nothing was better.
        steps: updates made.
        best_step: updates after which the weights were best; 0 is the untouched model.
        seconds: time spent in training.
        step_ms_median: time of a forward, backward and update, in milliseconds.
        helped: whether the best weights lose less than the untouched ones on the held-out samples, by scheme.
        untouched: why a weight or bias was not trained, by its name; they are as they were, whatever the scheme.
        reason: why nothing was trained; None if something was.
        diverged: how training came to an early end, with the best weights until then; None if it did not.
        history: the worker's reports.
    """

    model: Model
    steps: int
    best_step: int
    seconds: float
    step_ms_median: float
    helped: Mapping[str, bool]
    untouched: Mapping[str, str] = field(default_factory=dict)
    reason: str | None = None
    diverged: str | None = None
    history: tuple[dict[str, Any], ...] = field(repr=False, default=())


@dataclass(frozen=True)
class Reach:
    """What training can move.

    Attributes:
        trained: the weights and biases that it moves.
        untouched: why not, for each of the others by its name.
        reason: why it moves nothing at all; None if it moves something.
    """

    trained: tuple[str, ...]
    untouched: Mapping[str, str]
    reason: str | None = None


Progress = Callable[[dict[str, Any]], None]


def trim(
    model: Model,
    plan: QuantPlan,
    ranges: RangeTable,
    data: Path,
    settings: TrimSettings,
    folder: Path,
    progress: Progress = lambda report: None,
) -> Trimmed:
    """Fine-tune `model` on the samples in `data`.

    Args:
        model: the float model; also the teacher and the first candidate.
        plan: its quantizer sites.
        ranges: its calibrated activation ranges.
        data: samples, as `onnxqt.data.open_samples` takes them.
        settings: how to train.
        folder: an existing folder for the run's files.
        progress: called with each report of the worker, a dict with `event`: start, step, evaluate, diverged,
            done.

    Returns:
        The outcome; without a step, and with the reason, if no gradient reaches a weight.

    Raises:
        TrainingError: if the process dies; the last and the best checkpoint until then
            are `last.onnx` and `best.onnx` in `folder`.
    """
    scope = check_trainable(model, plan, settings.loss)
    if scope.reason is not None:
        return _nothing_trained(model, settings.schemes, scope)
    graph, registrations = training_graph(model, plan, settings.loss)
    targets = _targets(model, settings.loss)
    onnx.save(graph, folder / jobs.GRAPH)
    onnx.save(model.proto, folder / jobs.START)
    for index, scheme in enumerate(settings.schemes):
        jobs.write_activations(folder, index, activation_params(plan, ranges, scheme.grids, settings.method))
    for stale in (jobs.BEST, jobs.LAST):
        (folder / stale).unlink(missing_ok=True)
    job = _job(data, settings, targets, scope.trained, tuple(registrations))
    jobs.write(folder, replace(job, unbounded=plan.unbounded))
    history: list[dict[str, Any]] = []
    for report in _reports(folder):
        history.append(report)
        progress(report)
    trimmed = _outcome(model, settings.schemes, folder, history)
    jobs.tidy(folder)
    return replace(trimmed, untouched=scope.untouched)


def check_trainable(model: Model, plan: QuantPlan, loss: LossName) -> Reach:
    """What training can move; refuses what cannot be fine-tuned as asked, before any work is done.

    Raises:
        InstallationError: if the training package is absent.
        TrainingError: if the loss does not fit the model's outputs.
    """
    check_trainer()
    return reach(model, plan, loss)


def reach(model: Model, plan: QuantPlan, loss: LossName) -> Reach:
    """Which weights and biases training can move, and why not the others; nothing is edited or run for it.

    Raises:
        TrainingError: if the loss does not fit the model's outputs.
    """
    names = trainable(plan)
    if not names:
        return Reach((), {}, "the model has no Conv, ConvTranspose, Gemm or MatMul with a constant weight to train")
    if not _targets(model, loss):
        reason = "the model has no float output to compare with the original's"
        return Reach((), dict.fromkeys(names, reason), reason)
    flow = _flow(model, plan, loss)
    trained = tuple(name for name in names if name in flow.reached)
    elsewhere = "no output that is compared depends on it"
    untouched = {name: flow.lost.get(name, elsewhere) for name in names if name not in flow.reached}
    if trained:
        return Reach(trained, untouched)
    return Reach((), untouched, f"no gradient reaches a weight: {untouched[names[0]]}")


def _flow(model: Model, plan: QuantPlan, loss: LossName) -> Flow:
    return find_flow(model, trainable(plan), [target.output for target in _targets(model, loss)])


def trainable(plan: QuantPlan) -> list[str]:
    """Initializers that training moves where a gradient reaches them: the weights and biases of integer nodes."""
    nodes = [node for node in plan.integer_nodes if node.weight]
    names = [name for node in nodes for name in (node.weight.tensor if node.weight else None, node.bias) if name]
    return list(dict.fromkeys(names))


def training_graph(model: Model, plan: QuantPlan, loss: LossName) -> tuple[onnx.ModelProto, list[Registration]]:
    """The float model with its quantizers and loss, and the gradients to register."""
    graph = editable(model.proto)
    insert(graph, plan)
    add_loss(graph, _targets(model, loss), loss)
    registrations, wrappers = make_differentiable(graph, _flow(model, plan, loss))
    proto = finish_training(graph, [*functions(model.opset), *wrappers])
    return proto, [*static_rules(), *registrations]


def finish_training(graph: gs.Graph, local: list[onnx.FunctionProto]) -> onnx.ModelProto:
    """ONNX form of a graph that uses model-local functions."""
    proto = finish(graph)
    proto.functions.extend(local)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return proto


def _targets(model: Model, loss: LossName) -> tuple[Target, ...]:
    targets = find_targets(model)
    if loss == "distill":
        return targets
    scores = [target for target in targets if target.kind != "values"]
    if len(scores) != 1:
        raise TrainingError(
            f"cross-entropy needs exactly one output of class scores (N, classes), the model has {len(scores)}: "
            "use --loss distill"
        )
    return tuple(scores)


def _job(
    data: Path,
    settings: TrimSettings,
    targets: tuple[Target, ...],
    parameters: tuple[str, ...],
    registrations: tuple[Registration, ...],
) -> jobs.Job:
    return jobs.Job(
        data=os.fspath(data.resolve()),
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        loss=settings.loss,
        schemes=tuple(str(scheme) for scheme in settings.schemes),
        targets=targets,
        parameters=parameters,
        registrations=registrations,
        held_fraction=HELD_FRACTION,
        held_limit=HELD_LIMIT,
        refresh_every=REFRESH_EVERY,
        evaluate_every=max(1, settings.steps // EVALUATIONS),
    )


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    """Run the worker and yield what it reports, until it ends well."""
    command = [sys.executable, "-m", "onnxqt.trim.worker", os.fspath(folder)]
    with (
        (folder / jobs.LOG).open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            message = None
            for line in process.stdout or ():
                report = json.loads(line)
                if report["event"] == "error":
                    message = report["message"]
                else:
                    yield report
            code = process.wait()
        finally:
            process.kill()
    if code:
        raise TrainingError(message or _obituary(folder, code))


def _obituary(folder: Path, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    kept = folder / jobs.LAST
    rest = f"its last checkpoint is '{kept}'" if kept.exists() else "it had saved nothing yet"
    return f"the training process {how}; {rest}, its messages in '{folder / jobs.LOG}'"


def _nothing_trained(model: Model, schemes: tuple[Scheme, ...], scope: Reach) -> Trimmed:
    """The model as it is."""
    return Trimmed(
        model,
        steps=0,
        best_step=0,
        seconds=0.0,
        step_ms_median=0.0,
        helped={str(scheme): False for scheme in schemes},
        untouched=scope.untouched,
        reason=scope.reason,
    )


def _outcome(model: Model, schemes: tuple[Scheme, ...], folder: Path, history: list[dict[str, Any]]) -> Trimmed:
    steps = [report for report in history if report["event"] == "step"]
    bests = [report for report in history if report["event"] == "evaluate" and report["best"]]
    untouched = next(report["losses"] for report in history if report["event"] == "start")
    losses = bests[-1]["losses"] if bests else untouched
    best = Model(onnx.load(folder / jobs.BEST), model.sha256, model.changes) if bests else model
    return Trimmed(
        best,
        steps=len(steps),
        best_step=bests[-1]["step"] if bests else 0,
        seconds=steps[-1]["seconds"] if steps else 0.0,
        step_ms_median=float(np.median([report["ms"] for report in steps])) if steps else 0.0,
        helped={str(s): after < before for s, before, after in zip(schemes, untouched, losses, strict=True)},
        diverged=next((report["message"] for report in history if report["event"] == "diverged"), None),
        history=tuple(history),
    )
