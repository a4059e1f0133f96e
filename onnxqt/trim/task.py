"""What a training process works on: the job with everything that it names, and the original model as the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx

from onnxqt.calibrate import RangeTable
from onnxqt.data import Batch, InputSpec, Samples, fixed_batch, open_samples
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import QuantPlan, Rules, make_plan
from onnxqt.runtime import Session, with_outputs
from onnxqt.trim import job as jobs
from onnxqt.trim.losses import loss_feeds, measure_power, teacher_outputs
from onnxqt.trim.quantizers import Feeds, relative, units_of

_CACHE_LIMIT = 256 << 20  # bytes of the original model's outputs that are kept, by sample


@dataclass(frozen=True, eq=False)
class Task:
    """Everything fixed during a run."""

    job: jobs.Job
    model: Model
    reference: Model
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
    model, reference = (Model(onnx.load(folder / name), "") for name in (jobs.START, jobs.REFERENCE))
    specs = input_specs(model)
    training, held = open_samples(job.data, specs).split(job.held_fraction, job.held_limit)
    plan = make_plan(model, job.unbounded, Rules(floats=frozenset(job.floats)))
    return Task(job, model, reference, plan, specs, training, held, jobs.read_ranges(folder))


class Teacher:
    """The original model: what the loss compares with.

    Its outputs are kept by sample where they are small, so that each sample passes through it once.
    """

    def __init__(self, task: Task) -> None:
        self._terms = task.job.terms
        self._names = teacher_outputs(self._terms)
        self._session = (
            Session(with_outputs(task.reference.proto, self._names), outputs=list(self._names)) if self._names else None
        )
        held = task.held.batches(task.job.batch_size, task.pads)
        self._power = measure_power(self._terms, (self._outputs(batch) for batch in held))
        self._rows: dict[str, Array] = {}
        self._row_of: dict[int, int] = {}
        again = task.job.steps * task.job.batch_size * task.job.accumulate > task.training.count
        if again and not task.pads and not task.job.augment:
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
