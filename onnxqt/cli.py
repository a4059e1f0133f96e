"""The command line: the only module that prints, exits, or imports click.

Results go to standard output (as JSON with --json), everything else to standard error.
Exit codes: 0 ok, 1 failed, 2 usage, 3 the emulator contradicts an exported file.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import click
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from onnxqt import __version__
from onnxqt.calibrate import RANGE_METHODS
from onnxqt.data import InputSpec, fixed_batch, open_samples
from onnxqt.emulate import load_program
from onnxqt.errors import ModelError, OnnxqtError
from onnxqt.files import write_json
from onnxqt.ingest import ingest
from onnxqt.metrics import Tally
from onnxqt.pipeline import (
    EVALUATION_BATCH,
    SCHEMES_FOLDER,
    TABLE,
    Candidate,
    Settings,
    calibrated,
    make_table,
    open_workspace,
)
from onnxqt.pipeline import export as export_files
from onnxqt.pipeline import trim as run_trim
from onnxqt.plan import make_plan
from onnxqt.runtime import Session
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme
from onnxqt.survey import survey, survey_json
from onnxqt.survey.page import headlines, tables
from onnxqt.trim import reach
from onnxqt.verify import Verdict

MODEL = click.Path(path_type=Path)
Command = TypeVar("Command", bound=Callable[..., Any])


class _Commands(click.Group):
    """Turns the package's errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except OnnxqtError as error:
            click.echo(f"Error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("Interrupted: files already written are complete.", err=True)
            ctx.exit(1)


class _Bar:
    """Progress on standard error; silent where that is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def stage(self, name: str, total: int | None = None) -> None:
        """Finish the bar of the stage before and start another."""
        self._finish()
        self._task = self._bar.add_task(name, total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        """Move the bar."""
        if self._task is not None:
            self._bar.update(self._task, completed=done, note=note)

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bar.tasks[self._task].total
            self._bar.update(self._task, total=total or 1, completed=total or 1)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_DATA = click.option("--data", type=MODEL, required=True, help="Samples: a directory of .npz or .npy files.")
_SCHEMES = click.option(
    "--scheme",
    "schemes",
    multiple=True,
    metavar="ID",
    help="w{2..8}a{4,8}-{sym,asym}-{pt,pc}, repeatable. Default: w{8,4}a8-{sym,asym}-{pt,pc}.",
)
_RANGES = click.option(
    "--ranges",
    type=click.Choice(RANGE_METHODS),
    default="mse",
    show_default=True,
    help="How clips are chosen.",
)
_STRIP_QDQ = click.option("--strip-qdq", is_flag=True, help="Take the quantizers out of a quantized MODEL first.")
_JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
_OUT = click.option("--out", type=MODEL, help="Run directory.  [default: MODEL-onnxqt]")


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="onnxqt")
def main() -> None:
    """Make any ONNX model accurate on low-bit hardware, without its framework."""


@main.command()
@click.argument("model", type=MODEL)
@_options(_DATA, _OUT, _SCHEMES, _RANGES, _STRIP_QDQ, _JSON)
@click.option(
    "--eval",
    "evaluation",
    type=MODEL,
    help="Samples for the report.  [default: what training holds out of --data to pick the checkpoint]",
)
@click.option("--steps", type=int, default=Settings.steps, show_default=True, help="Training updates; 0 for none.")
@click.option("--batch-size", type=int, default=Settings.batch_size, show_default=True, help="Samples per update.")
@click.option("--lr", type=float, default=Settings.learning_rate, show_default=True, help="Peak learning rate.")
@click.option("--seed", type=int, default=0, show_default=True, help="Order of samples and schemes.")
@click.option(
    "--loss",
    type=click.Choice(["auto", "distill", "cross-entropy"]),
    default="auto",
    show_default=True,
    help="auto: cross-entropy if --data has labels, else distillation from the model itself.",
)
def trim(
    model: Path,
    data: Path,
    evaluation: Path | None,
    out: Path | None,
    schemes: Sequence[str],
    as_json: bool,
    **rest: Any,
) -> None:
    """Fine-tune MODEL and write its checkpoint, quantized files, table and report.

    \b
    Example:
        onnxqt trim model.onnx --data calib/ --eval eval/
    """
    settings = _settings(
        schemes,
        steps=rest["steps"],
        batch_size=rest["batch_size"],
        learning_rate=rest["lr"],
        seed=rest["seed"],
        loss=rest["loss"],
        ranges=rest["ranges"],
        strip_qdq=rest["strip_qdq"],
    )
    folder = out or Path(f"{model.stem}-onnxqt")
    with _Bar() as bar:
        report = run_trim(model, data, evaluation, folder, settings, bar)
    if as_json:
        _print_json(report.content)
        return
    content = report.content
    share = "top-1 %" if "top1" in content["float"]["metrics"] else "agreement with the original, %"
    title = f"{model.name}: {share}; float {_percent(content['float'])}, checkpoint {_percent(content['checkpoint'])}"
    _print_table(title, report.summary())
    training = content["training"]
    _tell_unbounded(content["plan"]["unbounded_tensors"])
    for line in _untrained(training):
        click.echo(line, err=True)
    click.echo(
        f"{training['steps']} steps in {training['seconds']:.0f} s ({training['step_ms_median']:.0f} ms each), "
        f"best after {training['best_step']}; everything is in {folder}/"
    )


@main.command()
@click.argument("model", type=MODEL)
@_options(_STRIP_QDQ, _JSON)
@click.option("--all", "everything", is_flag=True, help="Print every row of every table.")
def inspect(model: Path, strip_qdq: bool, as_json: bool, everything: bool) -> None:
    """Show what MODEL contains, what will be quantized and trained, and what not and why. Needs no data.

    \b
    Example:
        onnxqt inspect model.onnx
    """
    ingested = ingest(model, strip_qdq)
    plan = make_plan(ingested)
    found = survey(ingested, plan, reach(ingested, plan, "distill"))
    if as_json:
        _print_json(survey_json(found))
        return
    width = Console().width
    for line in headlines(found, model.name, width, everything):
        click.echo(line)
    for table in tables(found, width, everything):
        if len(table.rows) > 1:
            click.echo()
        _print_table(table.title, table.rows)


@main.command()
@click.argument("model", type=MODEL)
@_options(_DATA, _OUT, _SCHEMES, _RANGES, _STRIP_QDQ, _JSON)
def calibrate(
    model: Path,
    data: Path,
    out: Path | None,
    schemes: Sequence[str],
    as_json: bool,
    **rest: Any,
) -> None:
    """Record the range of every tensor of MODEL and write the neutral table.

    \b
    Example:
        onnxqt calibrate model.onnx --data calib/ --ranges percentile
    """
    settings = _settings(schemes, steps=0, **rest)
    with _Bar() as bar:
        work, table = calibrated(open_workspace(model, data, None, out, settings, bar))
    content = make_table(work, Candidate(work.source.model, table))
    write_json(work.folder / TABLE, content)
    _tell_unbounded(work.source.plan.unbounded)
    if as_json:
        _print_json(content)
        return
    rows = [
        (entry["name"], entry["role"], f"{entry['min']:.5g}", f"{entry['max']:.5g}")
        for entry in content["tensors"]
        if entry["role"] != "bias"
    ]
    _print_table(f"{table.samples} samples", [("tensor", "role", "min", "max"), *rows])
    click.echo(f"wrote {work.folder / TABLE}")


@main.command()
@click.argument("model", type=MODEL)
@_options(_DATA, _OUT, _SCHEMES, _RANGES, _STRIP_QDQ, _JSON)
def export(
    model: Path,
    data: Path,
    out: Path | None,
    schemes: Sequence[str],
    as_json: bool,
    **rest: Any,
) -> None:
    """Write the quantized files and the table of MODEL as it is, without training.

    \b
    Example:
        onnxqt export checkpoint.onnx --data calib/ --scheme w8a8-sym-pc
    """
    settings = _settings(schemes, steps=0, **rest)
    with _Bar() as bar:
        work, ranges = calibrated(open_workspace(model, data, None, out, settings, bar))
        checkpoint = Candidate(work.source.model, ranges)
        exported = export_files(work, checkpoint)
    content = {name: _check_of(scheme.verdict) for name, scheme in exported.items()}
    _tell_unbounded(work.source.plan.unbounded)
    if as_json:
        _print_json(content)
        return
    header = ("scheme", "max LSB", "differing codes", "integer kernels")
    rows = [
        (name, str(row["max_lsb"]), f"{row['mismatch_fraction']:.2%}", str(row["integer_kernels"]))
        for name, row in content.items()
        if row is not None
    ]
    _print_table("emulator against ONNX Runtime", [header, *rows])
    if work.source.model.is_large:
        click.echo("the files were not checked by the emulator, which would hold all weights in memory", err=True)
    click.echo(f"wrote {work.folder / SCHEMES_FOLDER} and {work.folder / TABLE}")


@main.command()
@click.argument("file", type=MODEL)
@_options(_DATA, _JSON)
@click.option("--reference", type=MODEL, help="Float model to compare with.")
def emulate(file: Path, data: Path, reference: Path | None, as_json: bool) -> None:
    """Run the quantized FILE in integer arithmetic.

    \b
    Example:
        onnxqt emulate schemes/w8a8-sym-pc.onnx --data eval/ --reference checkpoint.onnx
    """
    program = load_program(file)
    specs = [InputSpec(name, np.dtype(dtype), shape or ()) for name, (dtype, shape) in program.inputs.items()]
    samples = open_samples(data, specs)
    session = Session(reference) if reference else None
    if session and not set(program.outputs) <= set(session.outputs):
        raise ModelError(
            f"'{reference}' has the outputs {session.outputs}, '{file}' has {list(program.outputs)}: "
            "give the float model that it was made of"
        )
    compare = session.run if session else program.run
    tallies = {name: Tally() for name in program.outputs}
    fixed = fixed_batch(specs)
    with _Bar() as bar:
        bar.stage("emulate", samples.count)
        for batch in samples.batches(fixed or EVALUATION_BATCH, pad=fixed is not None):
            outputs, expected, real = program.run(batch.inputs), compare(batch.inputs), len(batch.index)
            for name, tally in tallies.items():
                tally.add(outputs[name][:real], expected[name][:real], batch.labels)
            bar.advance(next(iter(tallies.values())).samples)
    content = {
        "outputs": {
            name: {"metrics": tally.metrics(), "fidelity": tally.fidelity() if reference else None}
            for name, tally in tallies.items()
        },
        "integer_nodes": len(program.integer_nodes),
        "float_nodes": [{"node": n, "op_type": op, "reason": why} for n, op, why in program.float_nodes],
    }
    if as_json:
        _print_json(content)
        return
    header = ("output", "top-1 %", "agreement %", "SNR dB", "cosine")
    rows = [(name, *_emulated(tally, reference is not None)) for name, tally in tallies.items()]
    _print_table(f"{samples.count} samples in integer arithmetic", [header, *rows])
    _print_table("float nodes", [("node", "operator", "reason"), *program.float_nodes])


def _emulated(tally: Tally, compared: bool) -> tuple[str, ...]:
    fidelity, metrics = tally.fidelity(), tally.metrics()
    top1 = f"{100 * metrics['top1']:.2f}" if "top1" in metrics else "-"
    if not compared:
        return (top1, "-", "-", "-")
    agreement, snr, cosine = (fidelity[key] for key in ("agreement", "snr_db", "cosine"))
    return (
        top1,
        "-" if agreement is None else f"{100 * agreement:.2f}",
        "exact" if snr is None else f"{snr:.1f}",
        "-" if cosine is None else f"{cosine:.6f}",
    )


def _settings(schemes: Sequence[str], **rest: Any) -> Settings:
    chosen = tuple(dict.fromkeys(parse_scheme(name) for name in schemes)) or DEFAULT_SCHEMES
    return Settings(schemes=chosen, **rest)


def _percent(outcome: dict[str, Any]) -> str:
    return f"{100 * next(iter(outcome['metrics'].values())):.2f}" if outcome["metrics"] else "-"


def _tell_unbounded(tensors: Sequence[str]) -> None:
    if tensors:
        click.echo(
            f"{len(tensors)} tensor(s) such as '{tensors[0]}' take NaN or infinite values on the samples: they and the "
            "nodes around them stay float",
            err=True,
        )


def _untrained(training: dict[str, Any]) -> list[str]:
    """What training did not do: a line for an early end, and for each reason why weights are as they were."""
    if training["reason"] is not None:
        return [f"nothing was trained: {training['reason']}"]
    lines = [f"training ended early: {training['diverged']}"] if training["diverged"] else []
    by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in training["untouched"].items():
        by_reason[reason].append(name)
    return lines + [
        f"not trained: {len(names)} weight(s) such as '{names[0]}': {reason}" for reason, names in by_reason.items()
    ]


def _check_of(verdict: Verdict | None) -> dict[str, Any] | None:
    """What the check of a file found; None for one that was not checked."""
    if verdict is None:
        return None
    return {
        "max_lsb": verdict.max_lsb,
        "mismatch_fraction": verdict.mismatch_fraction,
        "integer_kernels": verdict.integer_kernels,
    }


def _print_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=1, allow_nan=False))


def _print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """A table on standard output; the first row is its header. Nothing is printed for a table without rows."""
    if len(rows) < 2:
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold", no_wrap=column == "scheme")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
