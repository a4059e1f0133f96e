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
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import onnxruntime as ort

from onnxqt.data import Batch
from onnxqt.errors import OnnxqtError
from onnxqt.files import write_model
from onnxqt.numerics import Array
from onnxqt.trim import job as jobs
from onnxqt.trim import state as states
from onnxqt.trim.augment import SHRINKING, augmented
from onnxqt.trim.losses import least_loss
from onnxqt.trim.observe import Observer
from onnxqt.trim.quantizers import LOSS_SCALE, Feeds, number, relative
from onnxqt.trim.ranges import Ranges, blends
from onnxqt.trim.regimes import balanced
from onnxqt.trim.task import Task, Teacher, load_task
from onnxqt.trim.trainer import Trainer


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
                trainer.evaluate({**feeds, **grids, **blends(regime, 1.0), LOSS_SCALE: number(1)})
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
        drawn = int(np.random.default_rng([job.seed, step]).integers(len(job.regimes)))
        regime, scale = job.regimes[drawn], self._scales[drawn]
        settings = {**self._ranges.settings[drawn], **blends(regime, blend), LOSS_SCALE: number(scale)}
        rate = job.schedule.learning_rate(step, job.steps, job.learning_rate)
        kinds = [kind for kind in job.augment if blend == 1 or kind not in SHRINKING]  # ranges follow until then
        losses, taken = [], 0.0
        for place, batch in enumerate(batches):
            if kinds:
                random = np.random.default_rng([job.seed, step, place])
                batch = replace(batch, inputs=augmented(batch.inputs, kinds, self._task.specs, random))
            feeds = {**self._teacher.feeds(batch), **settings}
            before = time.perf_counter()
            loss, given_out = self._trainer.accumulate(feeds)
            taken += time.perf_counter() - before
            losses.append(loss / float(scale))
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
