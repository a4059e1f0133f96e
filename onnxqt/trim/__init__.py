"""Stage 4, trim: fine-tune a float model so that it survives quantization.

The parent process writes a training graph and its settings into a folder, starts the worker there, follows its
reports and returns the best weights. The worker's process may die; the parent and the files do not.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqt.calibrate import RangeTable
from onnxqt.data import DataSource, InputSpec, has_classes
from onnxqt.errors import TrainingError
from onnxqt.model import Model, editable, finish, input_specs
from onnxqt.numerics import Grid, along_axis
from onnxqt.plan import QuantPlan
from onnxqt.runtime import check_trainer
from onnxqt.schemes import Grids, Placement
from onnxqt.trim import job as jobs
from onnxqt.trim import state as states
from onnxqt.trim.augment import Augmentation, choose_augmentations
from onnxqt.trim.gradients import DOMAIN, Flow, Registration, find_flow, make_differentiable, static_rules
from onnxqt.trim.history import History, before_step, read_history
from onnxqt.trim.losses import LOSS, Losses, Term, find_terms, insert_loss, with_loss
from onnxqt.trim.prune import Tails, tails
from onnxqt.trim.quantizers import functions, insert, scale_loss, units_of
from onnxqt.trim.regimes import Regime, scheme_regime
from onnxqt.trim.schedule import Schedule
from onnxqt.trim.settings import (
    EVALUATIONS,
    HELD_FRACTION,
    HELD_LIMIT,
    OBSERVE_MEMORY,
    PRUNE_MEMORY,
    REFRESH_EVERY,
    TrimSettings,
)

__all__ = ["Reach", "Regime", "Subject", "TrimSettings", "Trimmed", "check_trainable", "reach", "scheme_regime", "trim"]

_PLAIN = Grids(Grid(32, True), Placement(True), True, False, Grid(32, True), Grid(32, True), Placement(True))
FLOAT = Regime("float", _PLAIN)  # nothing is rounded: what the checkpoint itself is worth


@dataclass(frozen=True, eq=False)
class Trimmed:
    """The outcome of fine-tuning.

    Attributes:
        model: the float model with the best weights; the untouched one if nothing was better.
        steps: updates made.
        best_step: updates after which the weights were best; 0 is the untouched model.
        seconds: time spent in training.
        step_ms_median: time of a forward, backward and update, in milliseconds.
        helped: whether the best weights lose less than the untouched ones on the held-out samples, by regime.
        untouched: why a weight or bias was not trained, by its name; they are as they were, whatever the scheme.
        reason: why nothing was trained; None if something was.
        diverged: how training came to an early end, with the best weights until then; None if it did not.
        stopped: whether it was stopped before its last step, by the user or because nothing got better.
        tails: of each trained weight, before and after.
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
    stopped: bool = False
    tails: Mapping[str, tuple[Tails, Tails]] = field(repr=False, default_factory=dict)
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


@dataclass(frozen=True, eq=False)
class Subject:
    """What is fine-tuned, and on what.

    Attributes:
        model: the float weights that training starts from; the first candidate.
        reference: the model whose outputs it should have: the teacher.
        plan: its quantizer sites; of both models, as they have the same graph.
        ranges: its calibrated activation ranges.
        regimes: the ways to quantize it that it is to become robust to.
        data: where its samples are.
        labels: the arrays of labels that they have.
        rounds_well: whether the weights were moved to round well, see `TrimSettings.settled`.
    """

    model: Model
    reference: Model
    plan: QuantPlan
    ranges: RangeTable
    regimes: tuple[Regime, ...]
    data: DataSource
    labels: tuple[InputSpec, ...] = ()
    rounds_well: bool = False


Progress = Callable[[dict[str, Any]], None]


def trim(subject: Subject, settings: TrimSettings, folder: Path, progress: Progress = lambda report: None) -> Trimmed:
    """Fine-tune a model.

    A first Ctrl-C ends training after the step at hand, with the best weights until then; a second one ends the run.

    Args:
        subject: the model and its samples.
        settings: how to train.
        folder: an existing folder for the run's files.
        progress: called with each report of the worker, a dict with `event`: start, resume, step, evaluate, saved,
            stopped, diverged, done.

    Returns:
        The outcome; without a step, and with the reason, if no gradient reaches a weight.

    Raises:
        TrainingError: if the process dies, or a run cannot be resumed; the last and the best checkpoint until then
            are `last.onnx` and `best.onnx` in `folder`.
    """
    model, plan, regimes = subject.model, subject.plan, (*subject.regimes, FLOAT)
    settings = settings.settled(subject.rounds_well)
    scope = check_trainable(model, plan, settings, subject.labels)
    if scope.reason is not None:
        return _nothing_trained(model, regimes, scope)
    terms = _terms(model, plan, settings, subject.labels)
    graph, registrations, given_out = training_graph(model, plan, terms, scope.trained)
    job = _job(replace(subject, regimes=regimes), settings, terms, scope.trained)
    job = replace(job, registrations=tuple(registrations), given_out=tuple(given_out))
    kept = _resumed(folder, job) if settings.resume else []
    if not settings.resume:
        states.discard(folder)
        for stale in (jobs.BEST, jobs.LAST, jobs.HISTORY):
            (folder / stale).unlink(missing_ok=True)
        jobs.write(folder, job)
    onnx.save(graph, folder / jobs.GRAPH)
    onnx.save(model.proto, folder / jobs.START)
    onnx.save(subject.reference.proto, folder / jobs.REFERENCE)
    jobs.write_ranges(folder, subject.ranges)
    (folder / jobs.STOP).unlink(missing_ok=True)
    with History(folder, kept, settings.tensorboard) as history:
        for report in _reports(folder):
            if report["event"] != "resume":
                history.add(report)
            progress(report)
    trimmed = _outcome(model, regimes, folder, history.reports)
    jobs.tidy(folder)
    if not any(report["event"] == "stopped" and "patience" not in report for report in history.reports):
        states.discard(folder)
    return replace(trimmed, untouched=scope.untouched, tails=_tails(model, trimmed.model, plan, folder))


def check_trainable(model: Model, plan: QuantPlan, settings: TrimSettings, labels: Sequence[InputSpec] = ()) -> Reach:
    """What training can move; refuses what cannot be fine-tuned as asked, before any work is done.

    Raises:
        InstallationError: if the training package is absent.
        TrainingError: if the loss does not fit the model's outputs or the labels.
        UsageError: if a pattern of frozen weights matches nothing.
    """
    check_trainer()
    free = settings.unfrozen(trainable(plan))
    terms = _terms(model, plan, settings, labels)
    _augmentations(model, settings, terms)
    found = reach(model, plan, terms)
    frozen = dict.fromkeys((name for name in found.trained if name not in free), "it is frozen by --freeze")
    trained = tuple(name for name in found.trained if name in free)
    reason = "all weights are frozen by --freeze" if found.trained and not trained else found.reason
    return Reach(trained, {**found.untouched, **frozen}, reason)


def _augmentations(model: Model, settings: TrimSettings, terms: Sequence[Term]) -> tuple[Augmentation, ...]:
    return choose_augmentations(settings.augment, input_specs(model), _labelled(terms))


def _labelled(terms: Sequence[Term]) -> bool:
    return any(term.labels or any(b.source == "labels" for b in term.bindings) for term in terms)


def _terms(model: Model, plan: QuantPlan, settings: TrimSettings, labels: Sequence[InputSpec]) -> tuple[Term, ...]:
    return find_terms(model, plan, settings.loss(has_classes(labels)), labels)


def reach(model: Model, plan: QuantPlan, terms: Sequence[Term] | None = None) -> Reach:
    """Which weights and biases training can move, and why not the others; nothing is edited or run for it.

    Args:
        model: the float model.
        plan: its quantizer sites.
        terms: the loss; by default distillation.
    """
    names = trainable(plan)
    if not names:
        return Reach((), {}, "the model has no Conv, ConvTranspose, Gemm or MatMul with a constant weight to train")
    terms = find_terms(model, plan, Losses(), ()) if terms is None else terms
    if not terms:
        reason = "the model has no float output to compare with the original's"
        return Reach((), dict.fromkeys(names, reason), reason)
    flow = _flow(model, plan, terms)
    trained = tuple(name for name in names if name in flow.reached)
    elsewhere = "no output that is compared depends on it"
    untouched = {name: flow.lost.get(name, elsewhere) for name in names if name not in flow.reached}
    if trained:
        return Reach(trained, untouched)
    return Reach((), untouched, f"no gradient reaches a weight: {untouched[names[0]]}")


def _flow(model: Model, plan: QuantPlan, terms: Sequence[Term]) -> Flow:
    return find_flow(with_loss(model, terms), trainable(plan), [LOSS])


def trainable(plan: QuantPlan) -> list[str]:
    """Initializers that training moves where a gradient reaches them: the weights and biases of integer nodes."""
    nodes = [node for node in plan.integer_nodes if node.weight]
    names = [name for node in nodes for name in (node.weight.tensor if node.weight else None, node.bias) if name]
    return list(dict.fromkeys(names))


def training_graph(
    model: Model, plan: QuantPlan, terms: Sequence[Term], trained: Sequence[str]
) -> tuple[onnx.ModelProto, list[Registration], list[str]]:
    """The float model with its quantizers and loss, the gradients to register, and the statistics it computes."""
    graph = editable(model.proto)
    values = {name: value for name in trained if (value := model.graph.constant(name)) is not None}
    given_out = insert(graph, plan, units_of(plan, values))
    insert_loss(graph, terms)
    scale_loss(graph)
    left = graph.tensors()  # without the outputs that the loss does not read, and what only they depend on
    given_out = [name for name in given_out if name in left]
    registrations, wrappers = make_differentiable(graph, _flow(model, plan, terms))
    proto = finish_training(graph, [*functions(model.opset), *wrappers])
    return proto, [*static_rules(), *registrations], given_out


def finish_training(graph: gs.Graph, local: list[onnx.FunctionProto]) -> onnx.ModelProto:
    """ONNX form of a graph that uses model-local functions."""
    proto = finish(graph)
    proto.functions.extend(local)
    if all(entry.domain != DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return proto


def _job(subject: Subject, settings: TrimSettings, terms: tuple[Term, ...], trained: tuple[str, ...]) -> jobs.Job:
    return jobs.Job(
        data=replace(subject.data, path=os.path.abspath(subject.data.path)),
        steps=settings.steps,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        optimizer=settings.optimizer,
        learning_rate=settings.learning_rate or 0.0,
        schedule=settings.schedule or Schedule(),
        seed=settings.seed,
        terms=terms,
        regimes=subject.regimes,
        parameters=trained,
        registrations=(),
        given_out=(),
        held_fraction=HELD_FRACTION,
        held_limit=HELD_LIMIT,
        refresh_every=REFRESH_EVERY,
        observe_memory=OBSERVE_MEMORY,
        average=settings.average,
        balance=settings.balance,
        augment=_augmentations(subject.model, settings, terms),
        evaluate_every=max(1, settings.steps // EVALUATIONS),
        patience=settings.patience,
        prune=settings.prune,
        prune_memory=PRUNE_MEMORY,
        save_every=settings.save_every,
        save_minutes=settings.save_minutes,
        unbounded=subject.plan.unbounded,
        floats=subject.plan.floats,
    )


def _resumed(folder: Path, job: jobs.Job) -> list[dict[str, Any]]:
    """The reports of the run that is to be resumed.

    Raises:
        TrainingError: if there is none, or it is another run.
    """
    saved = states.find(folder)
    if saved is None:
        raise TrainingError(f"there is nothing to resume in '{folder}': run without --resume")
    changed = jobs.difference(folder, job)
    if changed is not None:
        raise TrainingError(
            f"the run in '{folder}' has another {changed.replace('_', ' ')}: give the settings and samples that it "
            "was started with, or run without --resume"
        )
    return before_step(read_history(folder), saved.progress["step"])


def _reports(folder: Path) -> Iterator[dict[str, Any]]:
    """Run the worker and yield what it reports, until it ends well."""
    command = [sys.executable, "-m", "onnxqt.trim.worker", os.fspath(folder)]
    with (
        (folder / jobs.LOG).open("w") as log,
        # in a session of its own, so that Ctrl-C reaches this process alone
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True) as process,
    ):
        message = None
        try:
            with _stopped_by_interrupt(folder / jobs.STOP):
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


@contextlib.contextmanager
def _stopped_by_interrupt(file: Path) -> Iterator[None]:
    """A first Ctrl-C makes the file that asks the worker to stop; a second one does what it did before."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        file.touch()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _obituary(folder: Path, code: int) -> str:
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    kept = folder / jobs.LAST
    rest = f"its last checkpoint is '{kept}'" if kept.exists() else "it had saved nothing yet"
    return f"the training process {how}; {rest}, its messages in '{folder / jobs.LOG}'"


def _nothing_trained(model: Model, regimes: Sequence[Regime], scope: Reach) -> Trimmed:
    """The model as it is."""
    return Trimmed(
        model,
        steps=0,
        best_step=0,
        seconds=0.0,
        step_ms_median=0.0,
        helped={regime.name: False for regime in regimes},
        untouched=scope.untouched,
        reason=scope.reason,
    )


def _outcome(model: Model, regimes: Sequence[Regime], folder: Path, history: list[dict[str, Any]]) -> Trimmed:
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
        helped={r.name: after < before for r, before, after in zip(regimes, untouched, losses, strict=True)},
        diverged=next((report["message"] for report in history if report["event"] == "diverged"), None),
        stopped=any(report["event"] == "stopped" for report in history),
        history=tuple(history),
    )


def _tails(before: Model, after: Model, plan: QuantPlan, folder: Path) -> dict[str, tuple[Tails, Tails]]:
    """The tails of each weight before and after; the clipped share is that of the original beyond the final clip."""
    clips = states.read_clips(folder)
    found = {}
    for site in plan.weights:
        old, new = (model.graph.constant(site.tensor) for model in (before, after))
        if old is not None and new is not None:
            clip = clips.get(site.tensor)
            if clip is not None:
                clip = along_axis(clip, site.axis if clip.ndim else None, old.ndim)
            found[site.tensor] = (tails(old, clip), tails(new))
    return found
