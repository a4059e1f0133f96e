"""How far the accuracy of a float model depends on who quantizes it: plain compiler policies, and ONNX Runtime's own.

    python tools/bench_policies.py MODEL... --data DIR [--bits w8a8] [--runtime-python PYTHON] [--json FILE]

A MODEL is a path or label=path; the first is the original. DIR holds `calib/*.npz` and `eval/*.npz`. Policies:

    {min/max, percentile 99.99, mse, entropy, power of two, dynamic} x {pt, pc} x {sym, asym}

pt, pc      one scale per tensor of weights, or per output channel; weights are symmetric, their clip is absmax
sym, asym   activations on a signed grid with zero point 0, or on an unsigned one with any
power of two    min/max, all scales rounded up to powers of two
dynamic     activation scales from each input at run time: sym per sample or row of a matrix (TensorFlow Lite's hybrid
            kernels), asym per tensor of a whole batch (ONNX DynamicQuantizeLinear)

What runs on integers and how it is computed is that of one profile; clips come from at most 512 samples of `calib`.
With --runtime-python, an interpreter with onnxruntime and onnx, also ONNX Runtime's `quantize_static` with its own
defaults: {MinMax, Percentile, Entropy} x {pt, pc} x {s8 sym, u8 asym} on 256 of these samples. It gets the models as
onnxqt ingests them, and the same interpreter runs its files.

Prints Markdown: the share of right samples of `eval` in percent (without labels: of the samples on which the original
float model agrees); then over the rows in which no model failed

    spread = largest - smallest
    worst gap = float of the original - smallest

Exit code 1: some row failed.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.data import fixed_batch
from onnxqt.errors import InstallationError, OnnxqtError, UsageError
from onnxqt.evaluate import Reference, Tallies, evaluate
from onnxqt.files import write_json, write_model
from onnxqt.matrix import Subject, Task
from onnxqt.matrix.bench import Bench
from onnxqt.metrics import Tally
from onnxqt.model import input_specs
from onnxqt.pipeline import CALIBRATION_BATCH, CALIBRATION_LIMIT, prepare
from onnxqt.profiles import PROFILES, Policy, Precision, Profile, parse_precision
from onnxqt.report import environment
from onnxqt.schemes import Scheme

REFEREE = Path(__file__).parent / "referees" / "ort_static.py"
PROFILE = "ort_cpu"
RUNTIME_SAMPLES = 256  # that `quantize_static` is calibrated on: it keeps all their activations in memory
GRANULARITIES: Mapping[str, bool] = {"pt": False, "pc": True}
STATIC: Mapping[str, Mapping[str, str]] = {
    "min/max": {"ranges": "minmax"},
    "percentile 99.99": {"ranges": "percentile"},
    "mse": {"ranges": "mse"},
    "entropy": {"ranges": "entropy"},
    "power of two": {"ranges": "minmax", "power_of_two": "all"},
}
DYNAMIC = "dynamic"
SYMMETRIES: Mapping[str, Mapping[str, bool]] = {
    "sym": {"signed": True, "symmetric": True},
    "asym": {"signed": False, "symmetric": False},
}
DYNAMIC_RULES: Mapping[str, str] = {"sym": "row", "asym": "tensor"}
RUNTIME_CALIBRATIONS = ("MinMax", "Percentile", "Entropy")
RUNTIME_TYPES: Mapping[str, str] = {"s8": "sym", "u8": "asym"}

Shares = dict[str, float | None]  # by label of the model; None where it failed


@dataclass(slots=True)
class Results:
    """What was measured.

    Attributes:
        measure: what the shares are of: "top1", or "agreement" without labels.
        floats: of the float models, by label, the original first.
        rows: of the quantized ones, by row and label.
        errors: why cells failed, one line each.
    """

    measure: str
    floats: dict[str, float]
    rows: dict[str, Shares] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    @property
    def complete(self) -> dict[str, dict[str, float]]:
        """The rows in which no model failed."""
        known = {
            name: {label: share for label, share in row.items() if share is not None} for name, row in self.rows.items()
        }
        return {name: row for name, row in known.items() if row.keys() == self.floats.keys()}

    def put(self, row: str, label: str, share: float | None, error: str | None) -> None:
        """Note one cell."""
        self.rows.setdefault(row, {})[label] = share
        if share is None:
            self.errors.append(f"{row}, {label}: {error or 'the model has no classes'}")


def named_models(texts: Sequence[str]) -> dict[str, Path]:
    """Paths by label: `label=path`, or a path alone, whose label is its stem.

    Raises:
        UsageError: if two have the same label.
    """
    found: dict[str, Path] = {}
    for text in texts:
        label, given, path = text.partition("=")
        if not given or Path(text).exists():
            label, path = Path(text).stem, text
        if label in found:
            raise UsageError(f"two models are called '{label}': give each a label of its own, as in label=path")
        found[label] = Path(path)
    return found


def make_task(
    models: Mapping[str, Path], data: Path, profiles: Sequence[Profile], schemes: Sequence[Scheme] = ()
) -> Task:
    """Models and samples, read and checked; the first model says how the samples are read."""
    sources = {label: prepare(path, data / "calib", data / "eval") for label, path in models.items()}
    first = next(iter(sources.values()))
    task = Task(
        subjects=tuple(Subject(label, source.model) for label, source in sources.items()),
        calibration=first.samples.take(CALIBRATION_LIMIT),
        evaluation=first.evaluation,
        batches=first.batches,
        calibration_batch=first.fixed_batch or CALIBRATION_BATCH,
        profiles=tuple(profiles),
        schemes=tuple(schemes),
    )
    task.check()
    return task


def reference_of(task: Task) -> Reference:
    """The evaluation samples with the original model's outputs."""
    return Reference(task.subjects[0].model, lambda: task.batches(task.evaluation))


def emulated(task: Task, reference: Reference) -> Results:
    """Every model in float, and under every column of the task in the emulator.

    Raises:
        UsageError: if the models have no class scores.
    """
    benches = {subject.name: Bench(task, subject, reference) for subject in task.subjects}
    floats = {}
    for label, bench in benches.items():
        tell(f"float {label}")
        measure, floats[label] = share_of(evaluate(bench.float_run, reference))
    results = Results(measure, floats)
    for label, bench in benches.items():
        for profile, column in task.columns:
            row = str(column) if isinstance(column, Scheme) else profile.name
            tell(f"{row} {label}")
            cell = bench.cell(profile, column, "", lambda done: None)
            results.put(row, label, cell.accuracy, cell.error)
    return results


def share_of(tallies: Tallies) -> tuple[str, float]:
    """What is counted of the first output, and its share.

    Raises:
        UsageError: if it has no classes.
    """
    name, tally = next(iter(tallies.items()))
    for measure, share in tally.metrics().items():
        return measure, share
    raise UsageError(f"output '{name}' has no class scores to count right ones: give a classifier")


def policies(bits: Precision, profile: Profile) -> tuple[Profile, ...]:
    """One profile for each policy, called as its row is; integer operators and arithmetic as those of `profile`.

    Activations of other than 8 bits have no dynamic policies, as no back end that is known has them.

    Raises:
        UsageError: if `bits` is dynamic itself, or its activations have 16 bits, which are never unsigned.
    """
    if bits.dynamic or bits.activation_bits > 8:
        raise UsageError(f"--bits is {bits}: give one with static scales and at most 8 bits, such as w8a8 or w4a8")
    kinds: dict[str, Mapping[str, str]] = {**STATIC}
    if bits.activation_bits == 8:
        kinds[DYNAMIC] = {}
    found = []
    for (kind, clips), granularity, symmetry in itertools.product(kinds.items(), GRANULARITIES, SYMMETRIES):
        facts: dict[str, Any] = {**clips, **SYMMETRIES[symmetry], "per_channel": GRANULARITIES[granularity]}
        arithmetic = profile.arithmetic
        if kind == DYNAMIC:
            rule: Any = DYNAMIC_RULES[symmetry]
            arithmetic = dataclasses.replace(arithmetic, dynamic=rule)
        policy = Policy(
            precisions=(str(dataclasses.replace(bits, dynamic=kind == DYNAMIC)),),
            operators=profile.policy.operators,
            fallback=profile.policy.fallback,
            pools_share_grid=profile.policy.pools_share_grid,
            **facts,
        )
        name = f"{kind}, {granularity}, {symmetry}"
        found.append(dataclasses.replace(profile, name=name, policy=policy, arithmetic=arithmetic))
    return tuple(found)


# --- ONNX Runtime's own quantizer -----------------------------------------------------------------------


def runtime_cells() -> list[dict[str, Any]]:
    """What ONNX Runtime's quantizer is asked for."""
    every = itertools.product(RUNTIME_CALIBRATIONS, GRANULARITIES.values(), RUNTIME_TYPES)
    return [dict(zip(("calibration", "per_channel", "activations"), each, strict=True)) for each in every]


def run_runtime(
    task: Task, reference: Reference, python: Path, cells: Sequence[Mapping[str, Any]], results: Results
) -> None:
    """Add a row for each of `cells`.

    Raises:
        InstallationError: if the interpreter cannot run them.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        labels = write_job(folder, task, cells)
        tell("quantize_static")
        told = call_referee(folder, python)
        for cell in told["cells"]:
            granularity = "pc" if cell["per_channel"] else "pt"
            kind = f"{cell['activations']} {RUNTIME_TYPES[cell['activations']]}"
            row = f"onnxruntime {told['version']} {cell['calibration']}, {granularity}, {kind}"
            share = None
            if not cell["error"]:
                _, share = share_of(counted(folder / cell["outputs"], reference))
            results.put(row, labels[cell["model"]], share, cell["error"])


def write_job(folder: Path, task: Task, cells: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Write what the referee reads; the labels of the models by their files."""
    labels = {}
    for index, subject in enumerate(task.subjects):
        file = f"model{index}.onnx"
        write_model(folder / file, subject.model.proto)
        labels[file] = subject.name
    fixed = fixed_batch(input_specs(task.subjects[0].model))
    # One sample at a time where that is possible: the quantizer's histograms want runs of one shape.
    calibration = task.calibration.take(RUNTIME_SAMPLES).batches(fixed or 1, pad=fixed is not None)
    for part, batches in (("calib", calibration), ("eval", task.batches(task.evaluation))):
        (folder / part).mkdir()
        for index, batch in enumerate(batches):
            arrays: dict[str, Any] = batch.inputs
            np.savez(folder / part / f"{index:06}.npz", **arrays)
    (folder / "job.json").write_text(json.dumps({"models": list(labels), "cells": [dict(cell) for cell in cells]}))
    return labels


def call_referee(folder: Path, python: Path) -> dict[str, Any]:
    """Run the referee's script and read its result."""
    advice = "give an interpreter with onnxruntime and onnx"
    try:
        command = [str(python), str(REFEREE), str(folder)]
        ended = subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    except OSError as error:
        raise InstallationError(f"--runtime-python: '{python}' cannot be run ({error.strerror}): {advice}") from error
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"])[-1]
        raise InstallationError(f"--runtime-python: '{python}' fails ({last}): {advice}")
    told: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return told


def counted(file: Path, reference: Reference) -> Tallies:
    """Outputs that the referee left, against the evaluation samples."""
    tallies = {name: Tally() for name in reference.outputs}
    with np.load(file) as outputs:
        for index, (batch, expected) in enumerate(reference):
            for name, tally in tallies.items():
                tally.add(batch.real(outputs[f"{index:06}:{name}"]), expected[name], batch.labels)
    return tallies


# --- what is printed ------------------------------------------------------------------------------------


def summary(results: Results) -> dict[str, dict[str, float]]:
    """Figures over the complete rows, by label of the model; empty if there is none."""
    rows = results.complete.values()
    if not rows:
        return {}
    target = next(iter(results.floats.values()))
    found: dict[str, dict[str, float]] = {name: {} for name in ("min", "max", "spread", "worst gap")}
    for label in results.floats:
        low, high = min(row[label] for row in rows), max(row[label] for row in rows)
        for name, value in zip(found, (low, high, high - low, target - low), strict=True):
            found[name][label] = value
    return found


def table(heading: str, results: Results, ends: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the float models, the rows, and the figures in `ends` below them, all in percent."""
    labels = list(results.floats)
    lines = [f"| {heading} | {' | '.join(labels)} |", f"|---|{'--:|' * len(labels)}"]
    lines += line_of("float", results.floats, labels)
    for name, shares in results.rows.items():
        lines += line_of(name, shares, labels)
    for name, values in ends.items():
        lines += line_of(f"**{name}**", values, labels)
    return "\n".join(lines)


def line_of(name: str, values: Mapping[str, float | None], labels: Sequence[str]) -> Iterator[str]:
    """One line of a table."""
    shown = ("failed" if (value := values.get(label)) is None else f"{100 * value:.2f}" for label in labels)
    yield f"| {name} | {' | '.join(shown)} |"


def caption(task: Task, results: Results, how: str) -> str:
    """What the numbers are."""
    measure = {"top1": "Top-1", "agreement": "Agreement with the original float model"}[results.measure]
    return f"{measure} in percent, {task.evaluation.count} evaluation samples; {how}.\n"


def as_json(task: Task, results: Results, ends: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Everything for machines; shares are between 0 and 1."""
    return {
        "environment": environment(),
        "data": task.data,
        "measure": results.measure,
        "models": [
            {"label": subject.name, "sha256": subject.model.sha256, "float": results.floats[subject.name]}
            for subject in task.subjects
        ],
        "rows": [{"name": name, "shares": shares} for name, shares in results.rows.items()],
        "summary": ends,
        "errors": results.errors,
    }


def report(text: str, content: Mapping[str, Any], file: Path | None) -> int:
    """Print the table, write the JSON, say what failed; the exit code."""
    print(text)
    if file is not None:
        write_json(file, content)
    for line in content["errors"]:
        tell(line)
    return 1 if content["errors"] else 0


def tell(line: str) -> None:
    """Tell a person who waits."""
    print(line, file=sys.stderr, flush=True)


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """The options that benchmarks of quantized accuracy share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with calib and eval")
    parser.add_argument("--profile", choices=list(PROFILES), default=PROFILE, help=f"of the emulator; {PROFILE}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = parser_of(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="path or label=path, the original first")
    parser.add_argument("--bits", default="w8a8", help="such as w8a8 (default) or w4a8")
    parser.add_argument("--runtime-python", type=Path, help="interpreter with onnxruntime and onnx, for w8a8")
    args = parser.parse_args(arguments)
    try:
        bits = parse_precision(args.bits)
        if args.runtime_python and bits != Precision(8, 8):
            raise UsageError(f"--bits is {bits}, but --runtime-python quantizes to w8a8 alone: leave one of them out")
        task = make_task(named_models(args.models), args.data, policies(bits, PROFILES[args.profile]))
        reference = reference_of(task)
        results = emulated(task, reference)
        if args.runtime_python:
            run_runtime(task, reference, args.runtime_python, runtime_cells(), results)
        ends = summary(results)
        text = caption(task, results, f"{bits}, emulated as {args.profile}") + "\n" + table("policy", results, ends)
        return report(text, {"bits": str(bits), **as_json(task, results, ends)}, args.json)
    except OnnxqtError as error:
        tell(f"Error: {error}")
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
