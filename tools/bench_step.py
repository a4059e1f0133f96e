"""What quantization costs in training: time and memory of one step, float and quantized, here and in PyTorch.

    python tools/bench_step.py MODEL... --data DIR [--batch-size 64] [--steps 30] [--torch-python PYTHON]

DIR holds `calib/*.npz`. A step is the forward and backward pass of one batch and an update of all weights and biases
that onnxqt trains, by AdamW; the loss distils from the original model. Its outputs and the samples are in memory
before the clock runs.

    onnxqt float            the graph and its gradient without any quantizer or statistics
    onnxqt full             with every quantizer, statistics and their moving averages; and a share 1 / REFRESH_EVERY
                            of the time to lay all grids anew
    PyTorch float           the same network, in eager mode, channels last, with the fused AdamW
    PyTorch fake-quantize   the same weights and activations through fake_quantize_per_{channel,tensor}_affine, with
                            fixed scales: no observers

The last two need an interpreter with torch, onnx and numpy. Each is a process of its own, with as many threads as
there are cores; they wait for each other and make one step in turn. Memory is the largest resident memory of a whole
process. Before any time counts, PyTorch's outputs must equal ONNX Runtime's, and its float loss the trainer's.

Prints Markdown. The machine must be idle otherwise: threads that wait for each other in loops, as PyTorch's do, lose
far more time than others where they lack a core. "lost" is the share of the time in which threads were ready without
a core, or the whole process stood still, as a stopped one does. Exit code 1: it was above 10 % in some variant, and
the times mean nothing. Linux only.
"""

import argparse
import contextlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx

from onnxqt.calibrate import make_quantizers
from onnxqt.data import DataSource, require
from onnxqt.errors import InstallationError, OnnxqtError, TrainingError, UsageError
from onnxqt.files import write_model
from onnxqt.model import Model, editable
from onnxqt.numerics import Array, QParams
from onnxqt.pipeline import Settings, Workspace, calibrated, open_workspace
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import DEFAULT_SCHEMES
from onnxqt.trim import TrimSettings, finish_training, reach, trainable, training_graph
from onnxqt.trim import job as jobs
from onnxqt.trim.gradients import Registration, find_flow, make_differentiable, static_rules
from onnxqt.trim.losses import (
    LOSS,
    Losses,
    Term,
    find_terms,
    insert_loss,
    loss_feeds,
    measure_power,
    teacher_outputs,
    with_loss,
)
from onnxqt.trim.losses.terms import classes_input, original_input, power_input
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT, OBSERVE_MEMORY, PRUNE_MEMORY, REFRESH_EVERY

TOOLS = Path(__file__).parent
VARIANTS = ("onnxqt float", "onnxqt full", "PyTorch float", "PyTorch fake-quantize")
SCHEME = DEFAULT_SCHEMES[0]  # of PyTorch's quantizers, and of the first step of the full one
RATE = 1e-5  # the learning rate; no time depends on it
WARM_UP = 3  # steps that do not count
BATCHES = 4  # different ones, in turn
REFRESHES = 3
BUSY = 0.1  # share of lost time above which times mean nothing
TOLERANCE = 1e-4  # relative, of the first loss: float32 sums over a whole network in another order

Feeds = dict[str, Array]


@dataclass(frozen=True)
class Measured:
    """What one variant took.

    Attributes:
        losses: of the first and of the last step.
        step_ms: median over the steps.
        peak_mb: largest resident memory.
        cpu_ms: median of the time on a core, summed over threads.
        lost: share of the time in which threads lacked a core or the process stood still.
        refresh_ms: of laying the grids anew; 0 where there is nothing to lay.
    """

    losses: tuple[float, float]
    step_ms: float
    peak_mb: float
    cpu_ms: float
    lost: float
    refresh_ms: float = 0.0

    @property
    def ms(self) -> float:
        """A step with its share of what happens every few steps."""
        return self.step_ms + self.refresh_ms / REFRESH_EVERY


# --- what the processes read ----------------------------------------------------------------------------


def prepare_folder(work: Workspace, folder: Path) -> None:
    """Write everything that the steps need.

    Raises:
        UsageError: unless the loss is the distillation of one output of class scores.
        TrainingError: if no weight can be trained.
    """
    work, ranges = calibrated(work)
    model, plan = work.source.model, work.source.plan
    terms = find_terms(model, plan, Losses(), ())
    if len(terms) != 1 or terms[0].kind != "scores":
        raise UsageError(f"the model has the outputs {list(model.graph.outputs)}: give one with one output of classes")
    scope = reach(model, plan, terms)
    if scope.reason is not None:
        raise TrainingError(f"nothing can be trained: {scope.reason}")
    job = make_job(work, terms, scope.trained)
    for name in ("plain", "full"):
        (folder / name).mkdir()
    graph, registrations, given_out = training_graph(model, plan, terms, scope.trained)
    write_graph(folder / "full", graph, replace(job, registrations=tuple(registrations), given_out=tuple(given_out)))
    jobs.write_ranges(folder / "full", ranges)
    for name in (jobs.START, jobs.REFERENCE):
        write_model(folder / "full" / name, model.proto)
    graph, registrations = plain_graph(model, trainable(plan), terms)
    write_graph(folder / "plain", graph, replace(job, registrations=tuple(registrations)))
    write_feeds(folder, batches_of(work, terms))
    quantizers = make_quantizers(model, plan, ranges, SCHEME, work.settings.ranges)
    write_model(folder / "model.onnx", model.proto)
    (term,) = terms
    content = {
        "batches": BATCHES,
        "inputs": list(model.graph.inputs),
        "output": term.tensor,
        "axis": term.axis,
        "classes": classes_input(term.tensor),
        "original": original_input(term.tensor),
        "power": power_input(term.tensor),
        "trained": list(scope.trained),
        "weights": {site.tensor: plain_params(quantizers.weights[site.tensor]) for site in plan.weights},
        "activations": {name: plain_params(params) for name, params in quantizers.activations.items()},
        "rate": RATE,
    }
    (folder / "step.json").write_text(json.dumps(content))


def make_job(work: Workspace, terms: tuple[Term, ...], trained: tuple[str, ...]) -> jobs.Job:
    """A run with the defaults, as its worker reads it."""
    training, source = work.settings.training.settled(rounds_well=False), work.source
    names = {field.name for field in fields(jobs.Job)} & {field.name for field in fields(training)}
    chosen: dict[str, Any] = {name: getattr(training, name) for name in names}
    chosen.update(
        data=DataSource(os.fspath(source.samples.source)),
        augment=(),
        learning_rate=RATE,
        terms=terms,
        regimes=work.settings.regimes,
        parameters=trained,
        registrations=(),
        given_out=(),
        held_fraction=HELD_FRACTION,
        held_limit=HELD_LIMIT,
        refresh_every=REFRESH_EVERY,
        observe_memory=OBSERVE_MEMORY,
        evaluate_every=training.steps,
        prune_memory=PRUNE_MEMORY,
        unbounded=source.plan.unbounded,
    )
    return jobs.Job(**chosen)


def plain_graph(
    model: Model, names: Sequence[str], terms: Sequence[Term]
) -> tuple[onnx.ModelProto, list[Registration]]:
    """The float model with its loss, and the gradients to register: `training_graph` without all quantization."""
    graph = editable(model.proto)
    insert_loss(graph, terms)
    flow = find_flow(with_loss(model, terms), list(names), [LOSS])
    registrations, wrappers = make_differentiable(graph, flow)
    return finish_training(graph, wrappers), [*static_rules(), *registrations]


def write_graph(folder: Path, graph: onnx.ModelProto, job: jobs.Job) -> None:
    """Write a training graph with its job."""
    write_model(folder / jobs.GRAPH, graph)
    jobs.write(folder, job)


def batches_of(work: Workspace, terms: Sequence[Term]) -> list[Feeds]:
    """The first batches, with what the loss compares them with."""
    source = work.source
    require(source.training, BATCHES * source.batch_size, f"{BATCHES} batches")
    size, pad = source.batch_size, source.fixed_batch is not None
    batches = list(itertools.islice(source.training.batches(size, pad), BATCHES))
    names = list(teacher_outputs(terms))
    teacher = Session(with_outputs(source.model.proto, names), outputs=names)
    originals = [teacher.run(batch.inputs) for batch in batches]
    power = measure_power(terms, originals)
    return [
        {**batch.inputs, **loss_feeds(terms, batch, original, power)}
        for batch, original in zip(batches, originals, strict=True)
    ]


def write_feeds(folder: Path, batches: Sequence[Feeds]) -> None:
    """Write batches; names of tensors need not be names of files, so arrays are numbered."""
    names = list(batches[0])
    arrays = {f"{i}_{j}": batch[name] for i, batch in enumerate(batches) for j, name in enumerate(names)}
    np.savez(folder / "feeds.npz", names=np.array(names, np.str_), **arrays)  # type: ignore[arg-type]


def read_feeds(folder: Path) -> list[Feeds]:
    """What `write_feeds` wrote."""
    with np.load(folder / "feeds.npz", allow_pickle=False) as file:
        names = [str(name) for name in file["names"]]
        count = (len(file.files) - 1) // len(names)
        return [{name: file[f"{i}_{j}"] for j, name in enumerate(names)} for i in range(count)]


def plain_params(params: QParams) -> dict[str, Any]:
    """Parameters of a quantizer as JSON."""
    return {
        "scale": params.scale.tolist(),
        "zero_point": params.zero_point.tolist(),
        "qmin": params.grid.qmin,
        "qmax": params.grid.qmax,
        "axis": params.axis,
    }


# --- the processes --------------------------------------------------------------------------------------


class Stepper:
    """A process that makes steps when told to."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self._name, self._log = name, log
        try:
            with log.open("w") as errors:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
                )
        except OSError as error:
            advice = "give an interpreter with torch, onnx and numpy"
            raise InstallationError(f"'{command[0]}' cannot be run ({error.strerror}): {advice}") from error

    def wait(self) -> dict[str, Any]:
        """What it says next.

        Raises:
            TrainingError: if it ended.
        """
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            code = self._process.wait()
            last = (self._log.read_text().strip().splitlines() or [f"exit code {code}"])[-1]
            raise TrainingError(f"the process of '{self._name}' ended: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, job: str) -> dict[str, Any]:
        """Have it do a job."""
        if self._process.stdin:
            with contextlib.suppress(BrokenPipeError):  # the answer is missing then, and `wait` says why
                self._process.stdin.write(job + "\n")
                self._process.stdin.flush()
        return self.wait()

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()


@contextlib.contextmanager
def steppers(folder: Path, torch_python: Path | None) -> Iterator[dict[str, Stepper]]:
    """The processes of all variants, ready; set up one after the other."""
    own, other = (sys.executable, os.fspath(TOOLS / "step_onnx.py")), os.fspath(TOOLS / "step_torch.py")
    commands = {VARIANTS[0]: (*own, os.fspath(folder), "plain"), VARIANTS[1]: (*own, os.fspath(folder), "full")}
    if torch_python is not None:
        for name, kind in zip(VARIANTS[2:], ("float", "quantized"), strict=True):
            commands[name] = (os.fspath(torch_python), other, os.fspath(folder), kind)
    with contextlib.ExitStack() as stack:
        ready = {}
        for index, (name, command) in enumerate(commands.items()):
            tell(f"start {name}")
            ready[name] = Stepper(name, command, folder / f"{index}.log")
            stack.callback(ready[name].close)
            ready[name].wait()
        yield ready


def measure(processes: Mapping[str, Stepper], steps: int) -> dict[str, Measured]:
    """Let all make their steps in turn.

    Raises:
        TrainingError: if the float variants begin with different losses: then they are not the same network.
    """
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in processes}
    for step in range(WARM_UP + steps):
        for name, process in processes.items():
            answers[name].append(process.ask("step"))
        if step == 0:
            check_losses({name: said[0]["value"] for name, said in answers.items()})
        if (step + 1) % 5 == 0:
            tell(f"step {step + 1} of {WARM_UP + steps}")
    refreshes = [processes[VARIANTS[1]].ask("refresh") for _ in range(REFRESHES)]
    refresh_ms = {VARIANTS[1]: median(answer["ms"] for answer in refreshes)}
    return {name: summary(said, refresh_ms.get(name, 0.0)) for name, said in answers.items()}


def summary(answers: Sequence[Mapping[str, Any]], refresh_ms: float = 0.0) -> Measured:
    """One variant's figures, from what it answered; the first steps do not count for the times."""
    counted = answers[WARM_UP:]
    cpu, lost = sum(answer["cpu_ms"] for answer in counted), sum(map(lost_ms, counted))
    return Measured(
        losses=(answers[0]["value"], answers[-1]["value"]),
        step_ms=median(answer["ms"] for answer in counted),
        peak_mb=max(answer["peak_mb"] for answer in answers),
        cpu_ms=median(answer["cpu_ms"] for answer in counted),
        lost=lost / max(lost + cpu, 1e-9),
        refresh_ms=refresh_ms,
    )


def lost_ms(answer: Mapping[str, Any]) -> float:
    """Time without a core: some thread of a step always runs or is queued, unless the process stands still."""
    queued, cpu, taken = (float(answer[name]) for name in ("queued_ms", "cpu_ms", "ms"))
    return queued + max(0.0, taken - cpu - queued)


def check_losses(losses: Mapping[str, float]) -> None:
    """The float variants must begin with the same loss.

    Raises:
        TrainingError: if they do not.
    """
    own, other = losses[VARIANTS[0]], losses.get(VARIANTS[2])
    if other is not None and not abs(own - other) <= TOLERANCE * abs(own):
        raise TrainingError(
            f"the first loss is {own:.6f} here and {other:.6f} in PyTorch, so that they are not the same network: "
            "compare what step_torch.py makes of its operators"
        )


def bench(model: Path, data: Path, settings: Settings, steps: int, torch_python: Path | None) -> dict[str, Measured]:
    """Measure one model and print its table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tell(f"prepare {model.stem}")
        work = open_workspace(model, data / "calib", None, folder / "run", settings)
        prepare_folder(work, folder)
        with steppers(folder, torch_python) as processes:
            measured = measure(processes, steps)
    print(f"### {model.stem}\n\n{table(measured)}\n\n{remarks(measured, work.source.batch_size, steps)}\n", flush=True)
    return measured


def busy(measured: Mapping[str, Measured]) -> list[str]:
    """The variants whose times mean nothing, as other processes took their cores."""
    return [name for name, row in measured.items() if row.lost > BUSY]


# --- what is printed ------------------------------------------------------------------------------------


def table(measured: Mapping[str, Measured]) -> str:
    """The variants, each against the float step of onnxqt and, where there are some, against PyTorch's."""
    base = measured[VARIANTS[0]]
    others = [name for name in VARIANTS[2:] if name in measured]
    heads = [
        "step",
        "ms",
        "ratio",
        "peak MB",
        "ratio",
        *(f"ms / {name}" for name in others),
        "CPU ms",
        "lost",
        "first loss",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'--:|' * (len(heads) - 1)}"]
    for name, row in measured.items():
        cells = [
            name,
            f"{row.ms:.1f}",
            f"{row.ms / base.ms:.2f}",
            f"{row.peak_mb:.0f}",
            f"{row.peak_mb / base.peak_mb:.2f}",
            *(f"{row.ms / measured[other].ms:.2f}" for other in others),
            f"{row.cpu_ms:.1f}",
            f"{row.lost:.0%}",
            f"{row.losses[0]:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def remarks(measured: Mapping[str, Measured], batch_size: int, steps: int) -> str:
    """How the numbers came about."""
    full, spoilt = measured[VARIANTS[1]], busy(measured)
    warning = f"**Not valid: the machine was busy with other work ({', '.join(spoilt)}).** " if spoilt else ""
    return (
        f"{warning}Median of {steps} steps of {batch_size} samples, one of each in turn. The full step takes "
        f"{full.step_ms:.1f} ms, and {full.refresh_ms:.1f} ms every {REFRESH_EVERY} steps to lay the grids of all "
        "regimes anew."
    )


def tell(line: str) -> None:
    """Tell a person who waits."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, help="folder with calib")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30, help="that count (30)")
    parser.add_argument("--torch-python", type=Path, metavar="PYTHON", help="interpreter with torch, onnx and numpy")
    args = parser.parse_args(arguments)
    try:
        if args.steps < 1:
            raise UsageError(f"--steps is {args.steps}: give a number of at least 1")
        training = TrimSettings(steps=args.steps, batch_size=args.batch_size, losses=Losses())
        settings = Settings(training=training)
        measured = [bench(model, args.data, settings, args.steps, args.torch_python) for model in args.models]
    except OnnxqtError as error:
        tell(f"Error: {error}")
        return error.exit_code
    if any(map(busy, measured)):
        tell("Error: other processes took the cores, the times mean nothing: stop them and measure again")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
