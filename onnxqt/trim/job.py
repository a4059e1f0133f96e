"""The files through which the parent and the training process talk. No pickle: JSON, ONNX and npz."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from onnxqt.calibrate import BINS, RangeTable, TensorRange
from onnxqt.data import DataSource
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.trim.augment import Augmentation
from onnxqt.trim.gradients.rule import Registration
from onnxqt.trim.losses import Term, read_term
from onnxqt.trim.prune import PruneMode
from onnxqt.trim.regimes import Regime, from_plain
from onnxqt.trim.schedule import Schedule

Optimizer = Literal["adamw", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "sgd")

START = "start.onnx"
REFERENCE = "reference.onnx"
GRAPH = "graph.onnx"
RANGES = "ranges.npz"
BEST = "best.onnx"
LAST = "last.onnx"
LOG = "worker.log"
HISTORY = "history.jsonl"
SAMPLES = "samples"
STATE = "state"
STOP = "stop"
_JOB = "job.json"
_ARTIFACTS = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")  # of the trainer


@dataclass(frozen=True)
class Job:
    """Settings of one training run; every field is plain data.

    Attributes:
        data: where the samples are.
        steps: updates.
        batch_size: samples of a batch.
        accumulate: batches of an update.
        optimizer: adamw or sgd.
        learning_rate: its peak.
        schedule: of lambda and of the learning rate.
        seed: of the order of samples and regimes.
        terms: the loss.
        regimes: what to become robust to.
        parameters: the weights and biases to train.
        registrations: the gradients to register.
        given_out: the statistics in the training graph.
        held_fraction: share of the samples held out.
        held_limit: at most so many.
        refresh_every: steps between two looks at the weights: scales and clips.
        observe_memory: of the activations' moving averages, per step.
        average: share of the run that the average of the weights remembers; 0 for none.
        balance: how far the losses of the regimes are brought together, see `regimes.balanced`.
        augment: how new samples are made of those at hand.
        evaluate_every: updates between evaluations.
        patience: evaluations without a better one after which training ends; 0 for never.
        prune: how reverse pruning clips.
        prune_memory: of its moving average, per refresh.
        save_every: updates between two saved states; 0 for never.
        save_minutes: minutes between two saved states; 0 for never.
        unbounded: tensors that no grid can hold.
        floats: nodes that stay float.
    """

    data: DataSource
    steps: int
    batch_size: int
    accumulate: int
    optimizer: Optimizer
    learning_rate: float
    schedule: Schedule
    seed: int
    terms: tuple[Term, ...]
    regimes: tuple[Regime, ...]
    parameters: tuple[str, ...]
    registrations: tuple[Registration, ...]
    given_out: tuple[str, ...]
    held_fraction: float
    held_limit: int
    refresh_every: int
    observe_memory: float
    average: float
    balance: float
    augment: tuple[Augmentation, ...]
    evaluate_every: int
    patience: int
    prune: PruneMode
    prune_memory: float
    save_every: int
    save_minutes: float
    unbounded: tuple[str, ...] = ()
    floats: tuple[str, ...] = ()


def write(folder: Path, job: Job) -> None:
    """Write the settings."""
    (folder / _JOB).write_text(json.dumps(asdict(job), indent=1))


def read(folder: Path) -> Job:
    """Read the settings."""
    plain = json.loads((folder / _JOB).read_text())
    for name in ("parameters", "given_out", "augment", "unbounded", "floats"):
        plain[name] = tuple(plain[name])
    plain["data"] = DataSource.from_plain(plain["data"])
    plain["schedule"] = Schedule(**plain["schedule"])
    plain["terms"] = tuple(read_term(term) for term in plain["terms"])
    plain["regimes"] = tuple(from_plain(regime) for regime in plain["regimes"])
    plain["registrations"] = tuple(_registration(fields) for fields in plain["registrations"])
    return Job(**plain)


def _registration(plain: dict[str, Any]) -> Registration:
    lists = {name: tuple(plain[name]) for name in ("inputs", "outputs")}
    return Registration(**{**plain, **lists})


def difference(folder: Path, job: Job) -> str | None:
    """The first setting in which the job in `folder` differs from `job`; None if it is the same."""
    stored = read(folder)
    changed = [field.name for field in fields(job) if getattr(stored, field.name) != getattr(job, field.name)]
    return changed[0] if changed else None


def tidy(folder: Path) -> None:
    """Remove what only the training process needed; the checkpoints, the settings and the logs stay."""
    for name in (START, REFERENCE, GRAPH, RANGES, STOP, *_ARTIFACTS):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / SAMPLES, ignore_errors=True)


def write_ranges(folder: Path, ranges: RangeTable) -> None:
    """Write calibrated ranges: arrays in the order of the names."""
    seen = ranges.tensors.values()
    np.savez(
        folder / RANGES,
        names=np.array(list(ranges.tensors), np.str_),
        samples=np.array(ranges.samples),
        ends=np.array([(s.min, s.max, s.limit) for s in seen], np.float64).reshape(-1, 3),
        count=np.array([s.count for s in seen], np.int64),
        counts=np.array([s.counts for s in seen]).reshape(-1, BINS),
    )


def read_ranges(folder: Path) -> RangeTable:
    """What `write_ranges` wrote."""
    with np.load(folder / RANGES, allow_pickle=False) as file:
        rows = zip(file["names"], file["count"], file["ends"], file["counts"], strict=True)
        tensors = {
            str(name): TensorRange(int(count), float(low), float(high), float(limit), counts)
            for name, count, (low, high, limit), counts in rows
        }
        return RangeTable(tensors, int(file["samples"]))


def params_arrays(params: Mapping[str, QParams]) -> dict[str, Array]:
    """Per-tensor parameters as arrays, in the order of the names."""
    grids = [(p.grid.bits, p.grid.signed, p.grid.narrow) for p in params.values()]
    return {
        "names": np.array(list(params), np.str_),
        "scale": np.array([p.scale for p in params.values()], np.float32),
        "zero_point": np.array([p.zero_point for p in params.values()], np.int32),
        "grid": np.array(grids, np.int32).reshape(-1, 3),
    }


def params_of(arrays: Mapping[str, Array]) -> dict[str, QParams]:
    """What `params_arrays` took apart."""
    rows = zip(arrays["names"], arrays["scale"], arrays["zero_point"], arrays["grid"], strict=True)
    return {
        str(name): QParams(np.asarray(scale), np.asarray(zero_point), Grid(int(bits), bool(signed), bool(narrow)))
        for name, scale, zero_point, (bits, signed, narrow) in rows
    }
