"""The command about speed, energy and price on edge devices: cost."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from onnxqt.cli.edge_page import Timing, print_cost
from onnxqt.cli.options import JSON, KINDS, MODEL, PREPROCESS, opened, options
from onnxqt.cli.output import print_json
from onnxqt.cli.progress import Bar
from onnxqt.cost import BATCHES, Workload, estimate, measure, workload
from onnxqt.data import InputSpec, fixed_batch, has_batch_axis
from onnxqt.devices import DEVICES, Device
from onnxqt.errors import DataError, ModelError, UsageError
from onnxqt.files import file_sha256
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.report import environment

SCHEMA_VERSION = "1.0"
BITS = range(2, 17)


@click.command()
@click.argument("model", type=MODEL)
@click.option("--device", "devices", multiple=True, metavar="NAME", help="Device, repeatable.  [default: all]")
@click.option("--weight-bits", type=int, default=8, show_default=True, help="Width of quantized weights, 2 to 16.")
@click.option(
    "--activation-bits", type=int, default=8, show_default=True, help="Width of quantized activations, 2 to 16."
)
@click.option("--batch", type=int, default=1, show_default=True, help="Samples per run: 1 or 8.")
@click.option("--measure", "measured", is_flag=True, help="Time MODEL and --file on this CPU, in ONNX Runtime.")
@click.option("--file", type=MODEL, help="Quantized file to time as well.")
@click.option("--data", type=MODEL, help=f"Samples to time with: {KINDS}.  [default: random numbers]")
@options(PREPROCESS, JSON)
def cost(model: Path, devices: Sequence[str], batch: int, measured: bool, as_json: bool, **rest: Any) -> None:
    """Model how fast MODEL runs on edge devices, and at which energy and price. Needs no data.

    These figures are modelled from published ones; notes below the table give the source of each. --measure adds
    what is measured on the CPU of this machine.

    \b
    Examples:
        onnxqt cost model.onnx --batch 8
        onnxqt cost model.onnx --device "Coral Edge TPU" --measure --file schemes/w8a8-sym-pc.onnx --data calib/
    """
    chosen = {device.name: device for device in map(_device, devices)} or DEVICES
    file, data = rest["file"], rest["data"]
    _check(batch, measured, rest)
    ingested = ingest(model)
    load = workload(ingested, make_plan(ingested), rest["weight_bits"], rest["activation_bits"])
    estimates = [estimate(load, device, batch) for device in chosen.values()]
    timed: list[Timing] = []
    if measured:
        subjects = [_Subject(model.name, model, ingested)] + ([_Subject(file.name, file, None)] if file else [])
        inputs = _inputs(ingested, data, rest["preprocess"], batch)
        with Bar() as bar:
            bar.stage("measure", len(subjects))
            for timing in _timed(subjects, inputs):
                timed.append(timing)
                bar.advance(len(timed))
    if not as_json:
        print_cost(model.name, load, estimates, timed, str(data) if data else None)
        return
    print_json(
        {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "model": {"name": model.name, "sha256": ingested.sha256},
            "workload": _facts(load),
            "batch": batch,
            "estimates": [found.as_json() for found in estimates],
            "measured": [timing.as_json() for timing in timed],
            "measured_on": None if not timed else "samples" if data else "random numbers",
        }
    )


def _device(name: str) -> Device:
    """A device by its name, however that is capitalised."""
    for device in DEVICES.values():
        if device.name.casefold() == name.casefold():
            return device
    raise UsageError(f"unknown device '{name}': give one of {', '.join(DEVICES)}")


def _check(batch: int, measured: bool, rest: dict[str, Any]) -> None:
    """Check what does not depend on the model.

    Raises:
        UsageError, ModelError: naming the option.
    """
    if batch not in BATCHES:
        raise UsageError(f"--batch is {batch}: give 1 or 8, for which measurements are published")
    for name in ("weight_bits", "activation_bits"):
        if rest[name] not in BITS:
            raise UsageError(f"--{name.replace('_', '-')} is {rest[name]}: give {BITS[0]} to {BITS[-1]}")
    for name in ("file", "data", "preprocess"):
        if rest[name] is not None and not measured:
            raise UsageError(f"--{name} is for what is measured: add --measure")
    if rest["file"] is not None and not rest["file"].is_file():
        raise ModelError(f"'{rest['file']}' is not a file: give the path of a quantized ONNX model")


def _facts(load: Workload) -> dict[str, Any]:
    return {
        "macs": load.macs,
        "weight_bytes": load.weight_bytes,
        "weight_bits": load.weight_bits,
        "activation_bits": load.activation_bits,
        "network_class": load.network_class,
        "unknown": list(load.unknown),
    }


@dataclass(frozen=True, eq=False)
class _Subject:
    """A file to time; `model` is the float model as ingested, which ONNX Runtime surely reads."""

    name: str
    path: Path
    model: Model | None


def _timed(subjects: Sequence[_Subject], inputs: dict[str, Array]) -> Iterator[Timing]:
    """How fast each model is on this machine, the float model first."""
    first: float | None = None
    for subject in subjects:
        digest = subject.model.sha256 if subject.model else file_sha256(subject.path)
        try:
            found = measure(subject.model.proto if subject.model else subject.path, inputs)
        except ModelError as error:
            raise ModelError(f"'{subject.path}': {error}") from error
        first = first or found.latency_s
        yield Timing(subject.name, digest, found, first / found.latency_s)


def _inputs(model: Model, data: Path | None, preprocess: str | None, batch: int) -> dict[str, Array]:
    """One batch of samples, or of random numbers."""
    specs = input_specs(model)
    size = fixed_batch(specs) or batch
    if data is None:
        return {spec.name: _random(spec, size if has_batch_axis(specs) else None) for spec in specs}
    with opened(data, preprocess, specs) as samples:
        if samples.count < size:
            raise DataError(f"{samples.source} has {samples.count} samples, --batch needs {size}: give more")
        return dict(next(iter(samples.batches(size))).inputs)


def _random(spec: InputSpec, size: int | None) -> Array:
    """Standard normal numbers; zeros for what is no float.

    Raises:
        DataError: if an axis other than the first has no size.
    """
    shape = spec.shape if size is None else (size, *spec.shape[1:])
    known = tuple(axis for axis in shape if axis is not None)
    if len(known) < len(shape):
        raise DataError(f"input '{spec.name}' has a free dimension: give samples with --data")
    values = np.random.default_rng(0).normal(size=known)
    return np.asarray(values if spec.dtype.kind == "f" else np.zeros(known)).astype(spec.dtype)
