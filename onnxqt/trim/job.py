"""The files through which the parent tells the training process what to do. No pickle: JSON, ONNX and npz."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.numerics import Grid, QParams
from onnxqt.trim.gradients.rule import Registration
from onnxqt.trim.losses import LossName, Target

START = "start.onnx"
GRAPH = "graph.onnx"
BEST = "best.onnx"
LAST = "last.onnx"
LOG = "worker.log"
SAMPLES = "samples.npz"
_JOB = "job.json"
_ARTIFACTS = ("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")  # of the trainer


@dataclass(frozen=True)
class Job:
    """Settings of one training run; every field is plain data."""

    data: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    loss: LossName
    schemes: tuple[str, ...]
    targets: tuple[Target, ...]
    parameters: tuple[str, ...]
    registrations: tuple[Registration, ...]
    held_fraction: float
    held_limit: int
    refresh_every: int
    evaluate_every: int
    unbounded: tuple[str, ...] = ()


def write(folder: Path, job: Job) -> None:
    """Write the settings."""
    (folder / _JOB).write_text(json.dumps(asdict(job), indent=1))


def read(folder: Path) -> Job:
    """Read the settings."""
    plain = json.loads((folder / _JOB).read_text())
    plain["schemes"] = tuple(plain["schemes"])
    plain["parameters"] = tuple(plain["parameters"])
    plain["unbounded"] = tuple(plain["unbounded"])
    plain["targets"] = tuple(Target(**target) for target in plain["targets"])
    plain["registrations"] = tuple(_registration(fields) for fields in plain["registrations"])
    return Job(**plain)


def _registration(fields: dict[str, Any]) -> Registration:
    lists = {name: tuple(fields[name]) for name in ("inputs", "outputs")}
    return Registration(**{**fields, **lists})


def tidy(folder: Path) -> None:
    """Remove what only the training process needed; the checkpoints, the settings and the log stay."""
    needless = [folder / name for name in (START, GRAPH, SAMPLES, *_ARTIFACTS)]
    for path in (*needless, *folder.glob("activations_*.npz")):
        path.unlink(missing_ok=True)


def write_activations(folder: Path, index: int, params: Mapping[str, QParams]) -> None:
    """Write the activations' parameters of scheme number `index`: per-tensor arrays in the order of the names."""
    grids = [(p.grid.bits, p.grid.signed, p.grid.narrow) for p in params.values()]
    np.savez(
        folder / f"activations_{index}.npz",
        names=np.array(list(params)),
        scale=np.array([p.scale for p in params.values()], np.float32),
        zero_point=np.array([p.zero_point for p in params.values()], np.int32),
        grid=np.array(grids, np.int32).reshape(-1, 3),
    )


def read_activations(folder: Path, index: int) -> dict[str, QParams]:
    """What `write_activations` wrote."""
    with np.load(folder / f"activations_{index}.npz", allow_pickle=False) as file:
        rows = zip(file["names"], file["scale"], file["zero_point"], file["grid"], strict=True)
        return {
            str(name): QParams(scale, zero_point, Grid(int(bits), bool(signed), bool(narrow)))
            for name, scale, zero_point, (bits, signed, narrow) in rows
        }
