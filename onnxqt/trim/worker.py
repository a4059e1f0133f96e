"""The training process: `python -m onnxqt.trim.worker FOLDER`.

It runs apart from the user's process because a kernel of the trainer can kill the process it runs in. It reads
`job.json` in its folder, writes `best.onnx`, `last.onnx` and `state/` there, and reports one JSON object per line on
standard output; everything else that onnxruntime prints goes to standard error. Where `state/` is there, it goes on
from it, and the rest of the run is bit for bit what it would have been.
"""

import json
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnx
import onnxruntime as ort

from onnxqt.calibrate import RangeTable, activation_params, weight_params
from onnxqt.data import Batch, InputSpec, Samples, fixed_batch, open_samples
from onnxqt.errors import OnnxqtError
from onnxqt.files import write_model
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import Grids
from onnxqt.trim import job as jobs
from onnxqt.trim import state as states
from onnxqt.trim.losses import least_loss, loss_feeds, measure_power, teacher_outputs
from onnxqt.trim.observe import Observer
from onnxqt.trim.prune import UNCLIPPED, choose_quantiles, clip_at, largest
from onnxqt.trim.quantizers import (
    ACTIVATION_BLEND,
    CENTRED,
    LOSS_SCALE,
    RUN_TIME,
    WEIGHT_BLEND,
    activation_feeds,
    prune_feeds,
    relative,
    units_of,
    weight_feeds,
)
from onnxqt.trim.regimes import CARRIER_BITS, Regime, balanced
from onnxqt.trim.trainer import Trainer

_CACHE_LIMIT = 256 << 20  # bytes of the original model's outputs that are kept, by sample

Feeds = dict[str, Array]


@dataclass(frozen=True, eq=False)
class Task:
    """Everything fixed during a run."""

    job: jobs.Job
    model: Model
    plan: QuantPlan
    specs: list[InputSpec]
    training: Samples
    held: Samples
    ranges: RangeTable

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the quantized weights."""
        return {site.tensor: tuple(self.model.graph.initializers[site.tensor].dims) for site in self.plan.weights}

    @cached_property
    def start(self) -> dict[str, Array]:
        """The values of all quantized weights and all trained parameters before training."""
        names = dict.fromkeys([*self.shapes, *self.job.parameters])
        values = {name: self.model.graph.constant(name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @cached_property
    def units(self) -> dict[str, Array]:
        """What a relative parameter is multiplied by."""
        return units_of(self.plan, {name: self.start[name] for name in self.job.parameters})

    @property
    def pads(self) -> bool:
        """Whether batches are filled up to a fixed size."""
        return fixed_batch(self.specs) is not None

    def values(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """All weights and biases at these relative parameters."""
        moved = {name: parameters[relative(name)] * self.units[name] for name in self.job.parameters}
        return {**self.start, **moved}


def load_task(folder: Path) -> Task:
    """Read a job and everything it names."""
    job = jobs.read(folder)
    model = Model(onnx.load(folder / jobs.START), "")
    specs = input_specs(model)
    training, held = open_samples(job.data, specs).split(job.held_fraction, job.held_limit)
    return Task(job, model, make_plan(model, job.unbounded), specs, training, held, jobs.read_ranges(folder))


class Teacher:
    """The original model: what the loss compares with.

    Its outputs are kept by sample where they are small, so that each sample passes through it once.
    """

    def __init__(self, task: Task) -> None:
        self._terms = task.job.terms
        self._names = teacher_outputs(self._terms)
        self._session = (
            Session(with_outputs(task.model.proto, self._names), outputs=list(self._names)) if self._names else None
        )
        held = task.held.batches(task.job.batch_size, task.pads)
        self._power = measure_power(self._terms, (self._outputs(batch) for batch in held))
        self._rows: dict[str, Array] = {}
        self._row_of: dict[int, int] = {}
        if task.job.steps * task.job.batch_size * task.job.accumulate > task.training.count and not task.pads:
            self._remember(task)

    def _remember(self, task: Task) -> None:
        """Run all training samples in their order, so that what is kept does not depend on how batches are drawn."""
        kept: list[Feeds] = []
        index: list[int] = []
        size = 0
        for batch in task.training.batches(task.job.batch_size):
            outputs = self._outputs(batch)
            size += sum(output.nbytes for output in outputs.values())
            rows = len(batch.index)
            if size > _CACHE_LIMIT or any(not y.ndim or len(y) != rows for y in outputs.values()):
                return
            kept.append(outputs)
            index += batch.index.tolist()
        self._rows = {name: np.concatenate([outputs[name] for outputs in kept]) for name in self._names}
        self._row_of = {sample: row for row, sample in enumerate(index)}

    def _outputs(self, batch: Batch) -> Feeds:
        return self._session.run(batch.inputs) if self._session else {}

    def feeds(self, batch: Batch) -> Feeds:
        """Inputs of the model and of the loss for a batch."""
        rows = [self._row_of.get(sample, -1) for sample in batch.index.tolist()]
        if min(rows) >= 0:
            original = {name: values[rows] for name, values in self._rows.items()}
        else:
            original = self._outputs(batch)
        return {**batch.inputs, **loss_feeds(self._terms, batch, original, self._power)}


class Ranges:
    """Where the grids of all regimes lie while the network moves: weights, their clips, and activations."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._plan = task.plan
        grids = [regime.grids for regime in task.job.regimes if regime.rounds_weights]
        coarsest = {
            per_channel: min(found, key=lambda grid: grid.bits)
            for per_channel in (False, True)
            if (found := [g.weight for g in grids if g.per_channel is per_channel])
        }
        trained = {name: task.start[name] for name in task.shapes}
        chosen = choose_quantiles(task.plan, trained, coarsest, task.job.prune)
        moving = set(task.job.parameters)
        self._quantiles = {name: found if name in moving else UNCLIPPED for name, found in chosen.items()}
        self._largest = {
            site.tensor: largest(trained[site.tensor], site.axis, self._quantiles[site.tensor])
            for site in task.plan.weights
        }
        self.clips: dict[str, FloatArray] = {
            name: np.asarray(np.where(self._quantiles[name].share < 1, size, np.inf), np.float32)
            for name, size in self._largest.items()
        }
        self.activations: list[dict[str, QParams]] = []
        self.follow(task.ranges)
        self.settings = self.settings_at(task.start)

    def follow(self, ranges: RangeTable) -> None:
        """Lay the activations' grids over new ranges."""
        regimes = self._task.job.regimes
        self.activations = [
            activation_params(self._plan, ranges, _carried(regime.grids), regime.ranges) for regime in regimes
        ]

    @property
    def kept(self) -> float:
        """Mean over the weights of how much of the largest value at the start the clip keeps, in (0, 1]."""
        shares = [
            np.minimum(clip / np.maximum(self._largest[name], np.finfo(np.float32).tiny), 1).mean()
            for name, clip in self.clips.items()
        ]
        return float(np.mean(shares)) if shares else 1.0

    def refresh(self, values: Mapping[str, Array], follow_clips: bool) -> None:
        """Follow the weights: move each clip towards its quantile, if it still may, then lay every grid anew."""
        memory = np.float32(self._task.job.prune_memory)
        for site in self._plan.weights if follow_clips else ():
            new = clip_at(values[site.tensor], site.axis, self._quantiles[site.tensor])
            moved = memory * self.clips[site.tensor] + (1 - memory) * new
            self.clips[site.tensor] = np.asarray(moved, np.float32)
        self.settings = self.settings_at(values)

    def settings_at(self, values: Mapping[str, Array]) -> list[Feeds]:
        """The inputs of all quantizers under each regime, with weights of these values."""
        task, plan = self._task, self._plan
        pruned = self.folded({name: values[name] for name in task.shapes})
        taus = prune_feeds(plan, task.shapes, self.clips)
        known: dict[tuple[object, ...], Feeds] = {}
        settings = []
        for regime, activations in zip(task.job.regimes, self.activations, strict=True):
            grids = _carried(regime.grids)
            key = (grids.weight, grids.weight_placement, grids.per_channel, grids.search_clip)
            if key not in known:
                known[key] = weight_feeds(plan, task.shapes, weight_params(plan, pruned.__getitem__, grids))
            settings.append({**activation_feeds(activations), **known[key], **taus, **_run_time(regime)})
        return settings

    def folded(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Weights as ReversePrune passes them on; biases as they are."""
        taus = prune_feeds(self._plan, self._task.shapes, self.clips)
        limits = dict(zip((site.tensor for site in self._plan.weights), taus.values(), strict=True))
        return {
            name: np.clip(value, -limits[name], limits[name]) if name in limits else value
            for name, value in values.items()
        }


def _carried(grids: Grids) -> Grids:
    """The grids as the training graph can hold them; wider ones are not used, see `blends`."""

    def narrowed(grid: Grid) -> Grid:
        return grid if grid.bits <= CARRIER_BITS else replace(grid, bits=CARRIER_BITS)

    return replace(
        grids,
        weight=narrowed(grids.weight),
        activation=narrowed(grids.activation),
        io=narrowed(grids.io),
        fixed_outputs=grids.fixed_outputs if grids.activation.bits <= CARRIER_BITS else {},
    )


def _run_time(regime: Regime) -> Feeds:
    centred = regime.grids.activation_placement.symmetric
    return {RUN_TIME: _number(regime.dynamic), CENTRED: _number(centred)}


def blends(regime: Regime, value: float) -> Feeds:
    """Lambda of weights and activations; what a regime does not round stays at 0."""
    return {
        WEIGHT_BLEND: _number(value * regime.rounds_weights),
        ACTIVATION_BLEND: _number(value * regime.rounds_activations),
    }


class HeldOut:
    """The held-out samples, and the loss under every regime on them, above the least possible loss."""

    def __init__(self, task: Task, teacher: Teacher) -> None:
        self._task = task
        held = task.held.batches(task.job.batch_size, task.pads)
        batches = [(teacher.feeds(batch), len(batch.index)) for batch in held]
        self._batches = [feeds for feeds, _ in batches]
        self._weights = np.array([count for _, count in batches], np.float64) / task.held.count
        self._floor = float(self._weights @ [least_loss(task.job.terms, feeds) for feeds in self._batches])

    def losses(self, trainer: Trainer, settings: list[Feeds]) -> Array:
        """Loss of each regime on the grid (lambda = 1), float64 (regimes,)."""
        rows = [
            [
                trainer.evaluate({**feeds, **grids, **blends(regime, 1.0), LOSS_SCALE: _number(1)})
                for feeds in self._batches
            ]
            for regime, grids in zip(self._task.job.regimes, settings, strict=True)
        ]
        losses: Array = np.array(rows) @ self._weights - self._floor
        return losses


class _DivergedError(Exception):
    """The loss or a weight is no longer finite; the message says which, where, and what to do."""


@dataclass
class Progress:
    """Where a run is; what a resumed run needs besides the trainer's own state.

    Attributes:
        step: updates made.
        best: least held-out loss, the mean over the regimes in which each counts as it does in training.
        waited: evaluations since then.
        seconds: time spent.
    """

    step: int = 0
    best: float = float("inf")
    waited: int = 0
    seconds: float = 0.0


class Run:
    """A run of training."""

    def __init__(self, folder: Path, report: TextIO) -> None:
        self._folder, self._report = folder, report
        self._task = task = load_task(folder)
        self._job = job = task.job
        saved = states.find(folder)
        self._trainer = Trainer(
            folder / jobs.GRAPH,
            [relative(name) for name in job.parameters],
            job.registrations,
            job.given_out,
            job.optimizer,
            None if saved is None else saved.trainer,
        )
        self._teacher = Teacher(task)
        self._held = HeldOut(task, self._teacher)
        self._ranges = Ranges(task)
        self._observer = Observer(task.ranges, job.observe_memory)
        self._average: dict[str, Array] = {}
        self._progress = Progress()
        self._scales: Array = np.ones(len(job.regimes), np.float32)
        if saved is None:
            losses = self._held.losses(self._trainer, self._ranges.settings)
            self._scales = balanced(losses, job.balance)
            self._progress.best = float(np.mean(self._scales * losses))
            self._send(event="start", losses=losses.tolist())
        else:
            self._restore(saved)
            self._send(event="resume", step=self._progress.step)
        self._saved_at = self._started = time.monotonic() - self._progress.seconds
        self._saved_at = time.monotonic()

    def train(self) -> None:
        """Make the updates that are left."""
        job, task = self._job, self._task
        batches = task.training.shuffled(job.batch_size, job.seed, self._progress.step * job.accumulate)
        while self._progress.step < job.steps:
            if (self._folder / jobs.STOP).exists():
                self._save()
                self._evaluate()
                self._send(event="stopped", step=self._progress.step)
                return
            step = self._progress.step
            blend = job.schedule.blend(step, job.steps)
            self._lay_grids(step, blend)
            self._update(step, blend, [next(batches) for _ in range(job.accumulate)])
            self._progress.step = step + 1
            self._progress.seconds = time.monotonic() - self._started
            last = self._progress.step == job.steps
            if last or (blend == 1 and self._progress.step % job.evaluate_every == 0):
                self._evaluate()
                if 0 < job.patience <= self._progress.waited:
                    self._send(event="stopped", step=self._progress.step, patience=job.patience)
                    return
            if not last:
                self._save_if_due()

    def _lay_grids(self, step: int, blend: float) -> None:
        """Follow weights and activations as the schedule has it; at lambda = 1 clips and ranges are frozen."""
        job = self._job
        before = job.schedule.blend(step - 1, job.steps) if step else 0.0
        moved = step > 0 and before < 1 and blend > 0 and (step % job.evaluate_every == 0 or blend == 1)
        if moved:
            self._ranges.follow(self._observer.table)
        if moved or (blend > 0 and step % job.refresh_every == 0):
            self._ranges.refresh(self._values(self._trainer.parameters()), follow_clips=blend < 1)

    def _update(self, step: int, blend: float, batches: list[Batch]) -> None:
        job = self._job
        number = int(np.random.default_rng([job.seed, step]).integers(len(job.regimes)))
        regime, settings = job.regimes[number], {**self._ranges.settings[number], **blends(job.regimes[number], blend)}
        rate = job.schedule.learning_rate(step, job.steps, job.learning_rate)
        losses, taken = [], 0.0
        for batch in batches:
            feeds = {**self._teacher.feeds(batch), **settings, LOSS_SCALE: _number(float(self._scales[number]))}
            before = time.perf_counter()
            loss, given_out = self._trainer.accumulate(feeds)
            taken += time.perf_counter() - before
            losses.append(loss / float(self._scales[number]))
            if blend < 1:
                self._observer.update(given_out)
        loss = float(np.mean(losses))
        if not np.isfinite(loss):
            raise _DivergedError(
                f"the loss became {loss} at step {step}: use a smaller --lr than {job.learning_rate:g}"
            )
        before = time.perf_counter()
        self._trainer.update(rate / len(batches) if job.optimizer == "sgd" else rate)  # AdamW has no scale
        taken += time.perf_counter() - before
        if job.average and blend == 1:
            self._follow_average()
        self._send(
            event="step", step=step, loss=loss, blend=blend, lr=rate, regime=regime.name, tau=self._ranges.kept,
            ms=1e3 * taken, seconds=time.monotonic() - self._started,
        )  # fmt: skip

    def _follow_average(self) -> None:
        """Average the weights over the last part of the run, from the first step at lambda = 1 on."""
        now = self._trainer.parameters()
        keep = np.float32(1 - 1 / max(1.0, self._job.average * self._job.steps))
        self._average = {
            name: keep * self._average[name] + (1 - keep) * value if self._average else value
            for name, value in now.items()
        }

    def _evaluate(self) -> None:
        """Measure the held-out loss at the average of the weights, and keep them if they are the best."""
        job, trainer, progress = self._job, self._trainer, self._progress
        current = trainer.parameters()
        candidate = self._average or current
        values = self._values(candidate)
        trainer.set_parameters(candidate)
        losses = self._held.losses(trainer, self._ranges.settings_at(values))
        trainer.set_parameters(current)
        folded = self._ranges.folded(values)
        checkpoint = self._task.model.with_weights({name: folded[name] for name in {*job.parameters}}).proto
        write_model(self._folder / jobs.LAST, checkpoint)
        mean = float(np.mean(self._scales * losses))
        better = mean < progress.best
        progress.waited = 0 if better else progress.waited + 1
        if better:
            progress.best = mean
            write_model(self._folder / jobs.BEST, checkpoint)
            states.write_clips(self._folder, self._ranges.clips)
        self._send(event="evaluate", step=progress.step, losses=losses.tolist(), best=better)

    def _values(self, parameters: Mapping[str, Array]) -> dict[str, Array]:
        """All weights and biases at these parameters, if all are finite."""
        values = self._task.values(parameters)
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise _DivergedError(
                    f"the weight '{name}' became NaN or infinite by step {self._progress.step}: "
                    f"use a smaller --lr than {self._job.learning_rate:g}"
                )
        return values

    def _save_if_due(self) -> None:
        job = self._job
        by_steps = job.save_every and self._progress.step % job.save_every == 0
        by_time = job.save_minutes and time.monotonic() - self._saved_at >= 60 * job.save_minutes
        if by_steps or by_time:
            self._save()

    def _save(self) -> None:
        """Write everything that a run needs to go on from here."""
        arrays = {
            "clips": self._ranges.clips,
            "observed": self._observer.arrays(),
            "average": self._average,
            "scales": {"all": self._scales},
            **{f"settings_{i}": feeds for i, feeds in enumerate(self._ranges.settings)},
            **{f"activations_{i}": jobs.params_arrays(p) for i, p in enumerate(self._ranges.activations)},
        }
        states.save(self._folder, self._trainer.save, arrays, vars(self._progress))
        self._saved_at = time.monotonic()
        self._send(event="saved", step=self._progress.step)

    def _restore(self, saved: states.Saved) -> None:
        states.restore_best(self._folder)
        self._progress = Progress(**saved.progress)
        self._ranges.clips = dict(saved.arrays["clips"])
        self._observer.restore(saved.arrays["observed"])
        self._average = dict(saved.arrays.get("average", {}))
        self._scales = saved.arrays["scales"]["all"]
        count = len(self._job.regimes)
        self._ranges.settings = [dict(saved.arrays[f"settings_{i}"]) for i in range(count)]
        self._ranges.activations = [
            jobs.params_of(arrays) if (arrays := saved.arrays.get(f"activations_{i}")) else {} for i in range(count)
        ]

    def _send(self, **message: Any) -> None:
        _send(self._report, **message)


def run(folder: Path, report: TextIO) -> None:
    """Train the job in `folder`, reporting to `report`; where training diverges it ends early."""
    training = Run(folder, report)
    try:
        training.train()
    except _DivergedError as error:
        _send(report, event="diverged", message=str(error))
    _send(report, event="done")


def _number(value: float) -> Array:
    return np.array(value, np.float32)


def _send(report: TextIO, **message: Any) -> None:
    report.write(json.dumps(message) + "\n")
    report.flush()


def main() -> None:
    """Entry point of the process."""
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
