"""The steps of onnxqt's trainer that `bench_step.py` measures. `python step_onnx.py FOLDER {plain,full}`.

FOLDER is what `bench_step.prepare_folder` wrote. A "step" is a forward and a backward pass and an update by AdamW;
for "full" with every quantizer at lambda = 1, under each regime in turn, and with the moving averages of the
activations' ranges, as in the ramp of lambda. A "refresh" lays the grids of all regimes anew.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from bench_step import RATE, read_feeds
from step_server import serve, take_report

from onnxqt.trim import job as jobs
from onnxqt.trim.observe import Observer
from onnxqt.trim.quantizers import LOSS_SCALE, relative
from onnxqt.trim.ranges import Ranges, blends
from onnxqt.trim.task import load_task
from onnxqt.trim.trainer import Trainer

Jobs = dict[str, Callable[[], float]]


def plain(folder: Path) -> Jobs:
    """The float graph: no quantizers, no statistics."""
    job, batches = jobs.read(folder / "plain"), read_feeds(folder)
    trainer = Trainer(folder / "plain" / jobs.GRAPH, job.parameters, job.registrations, (), job.optimizer)
    count = 0

    def step() -> float:
        nonlocal count
        loss = trainer.step(batches[count % len(batches)], RATE)
        count += 1
        return loss

    return {"step": step}


def full(folder: Path) -> Jobs:
    """The training graph of `trim`, and what its worker does around it."""
    task, batches = load_task(folder / "full"), read_feeds(folder)
    job = task.job
    names = [relative(name) for name in job.parameters]
    trainer = Trainer(folder / "full" / jobs.GRAPH, names, job.registrations, job.given_out, job.optimizer)
    ranges, observer = Ranges(task), Observer(task.ranges, job.observe_memory)
    count = 0

    def step() -> float:
        nonlocal count
        number = count % len(job.regimes)
        settings = {**ranges.settings[number], **blends(job.regimes[number], 1.0), LOSS_SCALE: np.array(1, np.float32)}
        loss, given_out = trainer.accumulate({**batches[count % len(batches)], **settings})
        observer.update(given_out)
        trainer.update(RATE)
        count += 1
        return loss

    def refresh() -> float:
        ranges.refresh(task.values(trainer.parameters()), follow_clips=True)
        return 0.0

    return {"step": step, "refresh": refresh}


if __name__ == "__main__":
    answers = take_report()
    ort.set_default_logger_severity(3)
    serve({"plain": plain, "full": full}[sys.argv[2]](Path(sys.argv[1])), answers)
