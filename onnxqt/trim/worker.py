"""The training process: the only module that imports onnxruntime.training.

It runs apart from the user's process because a kernel of the trainer can kill the process it runs in. It reads
`job.json` in its folder, writes `best.onnx` and `last.onnx` there, and reports one JSON object per line on
standard output; everything else that onnxruntime prints goes to standard error.
"""

import json
import os
import sys
import time
import types
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx
import onnxruntime as ort

from onnxqt.calibrate import Quantizers, best_clip, weight_params
from onnxqt.data import Batch, InputSpec, Samples, fixed_batch, open_samples
from onnxqt.errors import OnnxqtError
from onnxqt.files import write_model
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, FloatArray, QParams
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.trim import job as jobs
from onnxqt.trim.gradients.rule import Registration
from onnxqt.trim.losses import target_feeds
from onnxqt.trim.quantizers import BLEND, feeds, prune_feeds
from onnxqt.trim.schedule import Schedule

_TAU_MEMORY = 0.9  # exponential moving average of the reverse-pruning clip, per refresh
_TAU_POWER = 2  # training repairs what clipping breaks, so it may clip more than a model as it is would bear


def _import_training() -> tuple[Any, Any, Any]:
    """onnxruntime.training's artifacts, onnxblock and api, without its `__init__`, which needs torch."""
    package = types.ModuleType("onnxruntime.training")
    package.__path__ = [str(Path(ort.__file__).parent / "training")]
    sys.modules["onnxruntime.training"] = package
    from onnxruntime.training import api, artifacts, onnxblock

    return artifacts, onnxblock, api


def register(registrations: list[Registration]) -> None:
    """Make gradients known to the gradient builder of this process."""
    from onnxruntime.capi import _pybind_state as c_api

    for registration in registrations:
        definition = c_api.GradientNodeDefinition()
        definition.op_type, definition.domain = registration.op_type, registration.domain
        definition.inputs, definition.outputs = list(registration.inputs), list(registration.outputs)
        definition.attributes = []
        c_api.register_gradient_definition(registration.key, [definition])


class Trainer:
    """A training graph with its optimizer: forward, backward and update in one call."""

    def __init__(self, graph: Path, parameters: list[str], registrations: list[Registration]) -> None:
        artifacts, onnxblock, api = _import_training()

        class PassThrough(onnxblock.Block):  # type: ignore[misc, name-defined]  # the graph ends in its loss
            def build(self, loss: str) -> str:
                return loss

        register(registrations)
        folder = graph.parent
        artifacts.generate_artifacts(
            onnx.load(graph),
            requires_grad=parameters,
            loss=PassThrough(),
            optimizer=artifacts.OptimType.AdamW,
            artifact_directory=folder,
        )
        for name in ("training_model", "eval_model", "optimizer_model"):
            path = folder / f"{name}.onnx"
            proto = onnx.load(path)
            proto.ir_version = min(proto.ir_version, MAX_IR_VERSION)
            onnx.save(proto, path)
        self._state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
        self._module = api.Module(folder / "training_model.onnx", self._state, folder / "eval_model.onnx")
        self._optimizer = api.Optimizer(folder / "optimizer_model.onnx", self._module)
        self._parameters = parameters

    def step(self, values: dict[str, Array], learning_rate: float) -> float:
        """One update; returns the loss before it."""
        self._optimizer.set_learning_rate(learning_rate)
        loss = self._run(self._module.train(), values)
        self._optimizer.step()
        self._module.lazy_reset_grad()
        return loss

    def evaluate(self, values: dict[str, Array]) -> float:
        """The loss, without an update."""
        return self._run(self._module.eval(), values)

    def _run(self, module: Any, values: dict[str, Array]) -> float:
        return float(np.asarray(module(*(values[name] for name in module.input_names()))))

    def parameters(self) -> dict[str, Array]:
        """A copy of the trained parameters."""
        return {name: np.array(self._state.parameters[name].data) for name in self._parameters}

    def gradients(self) -> dict[str, Array]:
        """The gradients accumulated since the last update."""
        return {name: np.array(self._state.parameters[name].grad) for name in self._parameters}


@dataclass(frozen=True, eq=False)
class Task:
    """Everything fixed during a run."""

    job: jobs.Job
    model: Model
    plan: QuantPlan
    specs: list[InputSpec]
    teacher: Session
    schemes: tuple[Scheme, ...]
    activations: tuple[dict[str, QParams], ...]
    shapes: dict[str, tuple[int, ...]]
    training: Samples
    held: Samples
    power: dict[str, float]

    @cached_property
    def fixed(self) -> dict[str, Array]:
        """The quantized weights that no gradient reaches."""
        values = {name: self.model.graph.constant(name) for name in self.shapes}
        return {name: value for name, value in values.items() if value is not None and name not in self.job.parameters}

    def batch_feeds(self, batch: Batch) -> dict[str, Array]:
        """Model inputs and targets of a batch."""
        original = self.teacher.run(batch.inputs)
        labels = batch.labels if self.job.loss == "cross-entropy" else None
        if labels is not None:  # a padded batch repeats its last sample
            rows = len(next(iter(batch.inputs.values())))
            labels = np.pad(labels, (0, rows - len(labels)), mode="edge")
        return {**batch.inputs, **target_feeds(self.job.targets, original, labels, self.power)}


def load_task(folder: Path) -> Task:
    """Read a job and everything it names."""
    job = jobs.read(folder)
    model = Model(onnx.load(folder / jobs.START), "")
    plan = make_plan(model, job.unbounded)
    specs = input_specs(model)
    training, held = open_samples(job.data, specs).split(job.held_fraction, job.held_limit)
    teacher = Session(model.proto)
    schemes = tuple(parse_scheme(name) for name in job.schemes)
    activations = tuple(jobs.read_activations(folder, index) for index in range(len(schemes)))
    shapes = {site.tensor: tuple(model.graph.initializers[site.tensor].dims) for site in plan.weights}
    power = _output_power(teacher, held, job, pad=fixed_batch(specs) is not None)
    return Task(job, model, plan, specs, teacher, schemes, activations, shapes, training, held, power)


def _output_power(teacher: Session, held: Samples, job: jobs.Job, pad: bool) -> dict[str, float]:
    """Variance of each output over the held-out samples."""
    outputs = [teacher.run(batch.inputs) for batch in held.batches(job.batch_size, pad)]
    return {
        target.output: max(float(np.var(np.concatenate([out[target.output].ravel() for out in outputs]))), 1e-12)
        for target in job.targets
    }


class Ranges:
    """Scales of the weights and reverse-pruning clips, followed while the weights move."""

    def __init__(self, task: Task, parameters: dict[str, Array]) -> None:
        self._task = task
        weights = {**task.fixed, **parameters}
        self.clips = {name: np.asarray(np.abs(weights[name]).max(), np.float32) for name in task.shapes}
        self.settings: list[dict[str, Array]] = []
        self._refresh_settings(parameters)

    def refresh(self, parameters: dict[str, Array]) -> None:
        """Follow the trained weights: move each clip towards its new best value, then recompute every scale.

        tau <- 0.9 tau + 0.1 best
        """
        for name, clip in self.clips.items():
            if name in self._task.fixed:
                continue
            best = self._best_clip(parameters[name])
            self.clips[name] = np.asarray(_TAU_MEMORY * clip + (1 - _TAU_MEMORY) * best, np.float32)
        self._refresh_settings(parameters)

    def _best_clip(self, weight: Array) -> FloatArray:
        """The clip that pays at the fewest bits asked for; absmax where none does.

        Only per-tensor schemes gain from it: a channel's own scale already follows its largest weight.
        """
        grids = [scheme.weight_grid for scheme in self._task.schemes if not scheme.per_channel]
        if not grids:
            return np.asarray(np.abs(weight).max(), np.float32)
        return best_clip(weight, min(grids, key=lambda grid: grid.bits), _TAU_POWER)

    def _refresh_settings(self, parameters: dict[str, Array]) -> None:
        task = self._task
        values = {**task.fixed, **parameters}
        weights = {name: values[name] for name in task.shapes}
        pruned = folded(task, weights, self.clips)
        taus = prune_feeds(task.plan, task.shapes, self.clips)
        known: dict[tuple[int, bool], dict[str, QParams]] = {}
        self.settings = []
        for scheme, activations in zip(task.schemes, task.activations, strict=True):
            key = (scheme.weight_bits, scheme.per_channel)
            if key not in known:
                known[key] = weight_params(task.plan, pruned.__getitem__, scheme.grids)
            self.settings.append({**feeds(task.plan, task.shapes, Quantizers(activations, known[key])), **taus})


def folded(task: Task, weights: dict[str, Array], clips: dict[str, FloatArray]) -> dict[str, Array]:
    """Weights as ReversePrune passes them on."""
    taus = prune_feeds(task.plan, task.shapes, clips)
    limits = dict(zip((site.tensor for site in task.plan.weights), taus.values(), strict=True))
    return {
        name: np.clip(value, -limits[name], limits[name]) if name in limits else value
        for name, value in weights.items()
    }


class HeldOut:
    """The held-out samples, and the loss of every scheme on them, above the least possible loss."""

    def __init__(self, task: Task) -> None:
        pad = fixed_batch(task.specs) is not None
        batches = [(task.batch_feeds(batch), len(batch.index)) for batch in task.held.batches(task.job.batch_size, pad)]
        self._batches = [values for values, _ in batches]
        self._weights = np.array([count for _, count in batches], np.float64) / task.held.count
        self._floor = float(self._weights @ [_entropy(task, values) for values in self._batches])

    def losses(self, trainer: Trainer, ranges: "Ranges") -> Array:
        """Loss of each scheme on the integer grid (lambda = 1), float64 (schemes,)."""
        on_grid = {BLEND: _blend(1.0)}
        rows = [
            [trainer.evaluate({**values, **settings, **on_grid}) for values in self._batches]
            for settings in ranges.settings
        ]
        losses: Array = np.array(rows) @ self._weights - self._floor
        return losses


class _DivergedError(Exception):
    """The loss or a weight is no longer finite; the message says which, where, and what to do."""


def run(folder: Path, report: TextIO) -> None:
    """Train the job in `folder`, reporting to `report`; where training diverges it ends early."""
    task = load_task(folder)
    trainer = Trainer(folder / jobs.GRAPH, list(task.job.parameters), list(task.job.registrations))
    try:
        _train(task, trainer, folder, report)
    except _DivergedError as error:
        _send(report, event="diverged", message=str(error))
    _send(report, event="done")


def _train(task: Task, trainer: Trainer, folder: Path, report: TextIO) -> None:
    job, schedule = task.job, Schedule(task.job.steps)
    ranges, held = Ranges(task, trainer.parameters()), HeldOut(task)
    losses = held.losses(trainer, ranges)
    best = float(losses.mean())
    _send(report, event="start", losses=losses.tolist())
    pick = np.random.default_rng(job.seed)
    started = time.perf_counter()
    for step, batch in zip(range(job.steps), task.training.shuffled(job.batch_size, job.seed), strict=False):
        if schedule.blend(step) > 0 and step % job.refresh_every == 0:
            ranges.refresh(_finite(trainer.parameters(), step, job))
        blend, rate = schedule.blend(step), schedule.learning_rate(step, job.learning_rate)
        settings = ranges.settings[int(pick.integers(len(ranges.settings)))]
        values = {**task.batch_feeds(batch), **settings, BLEND: _blend(blend)}
        before = time.perf_counter()
        loss = trainer.step(values, rate)
        now = time.perf_counter()
        if not np.isfinite(loss):
            raise _DivergedError(
                f"the loss became {loss} at step {step}: use a smaller --lr than {job.learning_rate:g}"
            )
        timing = {"ms": 1e3 * (now - before), "seconds": now - started}
        _send(report, event="step", step=step, loss=loss, blend=blend, lr=rate, **timing)
        if step == job.steps - 1 or (step + 1) % job.evaluate_every == 0:
            parameters = _finite(trainer.parameters(), step, job)
            ranges.refresh(parameters)
            losses = held.losses(trainer, ranges)
            checkpoint = task.model.with_weights(folded(task, parameters, ranges.clips)).proto
            write_model(folder / jobs.LAST, checkpoint)
            better = float(losses.mean()) < best
            if better:
                best = float(losses.mean())
                write_model(folder / jobs.BEST, checkpoint)
            _send(report, event="evaluate", step=step + 1, losses=losses.tolist(), best=better)


def _finite(parameters: dict[str, Array], step: int, job: jobs.Job) -> dict[str, Array]:
    """The parameters as they are, if all are finite."""
    for name, value in parameters.items():
        if not np.isfinite(value).all():
            raise _DivergedError(
                f"the weight '{name}' became NaN or infinite by step {step}: "
                f"use a smaller --lr than {job.learning_rate:g}"
            )
    return parameters


def _entropy(task: Task, values: dict[str, Array]) -> float:
    """The least loss of a batch: the entropy of its targets."""
    entropy = 0.0
    for target in task.job.targets:
        if target.classes_input in values:
            p = values[target.classes_input]
            entropy -= float(np.mean(np.sum(p * np.log(np.maximum(p, 1e-30)), axis=-1)))
    return entropy


def _blend(value: float) -> Array:
    return np.array(value, np.float32)


def _send(report: TextIO, **message: Any) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()


def main() -> None:
    """Entry point of the process: `python -m onnxqt.trim.worker FOLDER`."""
    report = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    ort.set_default_logger_severity(3)
    try:
        run(Path(sys.argv[1]), report)
    except OnnxqtError as error:
        _send(report, event="error", message=str(error))
        sys.exit(1)


if __name__ == "__main__":
    main()
