"""The command line: the only module that prints, exits, or imports click.

Results go to standard output (as JSON with --json), everything else to standard error.
Exit codes: 0 ok, 1 failed, 2 usage, 3 the emulator contradicts an exported file.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict
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
from onnxqt.data import InputSpec, Samples, check_labels, fixed_batch, open_samples
from onnxqt.emulate import Program, load_program
from onnxqt.errors import ModelError, OnnxqtError, UsageError
from onnxqt.evaluate import in_order
from onnxqt.files import make_folder, write_json
from onnxqt.ingest import ingest
from onnxqt.ingest.files import EMBED_LIMIT
from onnxqt.matrix import Cell, Matrix, Subject, Task, make_matrix
from onnxqt.metrics import Tally
from onnxqt.model import Model
from onnxqt.pipeline import (
    CALIBRATION_BATCH,
    CALIBRATION_LIMIT,
    CHECKPOINT,
    EVALUATION_BATCH,
    SCHEMES_FOLDER,
    TABLE,
    Candidate,
    Settings,
    calibrated,
    make_table,
    open_workspace,
    prepare,
)
from onnxqt.pipeline import export as export_files
from onnxqt.pipeline import trim as run_trim
from onnxqt.plan import make_plan
from onnxqt.profiles import PROFILES, Profile, parse_precision, profile_text, read_profile
from onnxqt.runtime import Session
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme
from onnxqt.survey import survey, survey_json
from onnxqt.survey.page import headlines, tables
from onnxqt.trim import reach
from onnxqt.verify import Verdict

MODEL = click.Path(path_type=Path)
MATRIX = "matrix.json"
SHOWN = 20  # rows of a table
FEW = 4  # names in a cell of a table
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
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@_options(_DATA)
@click.option("--eval", "evaluation", type=MODEL, help="Samples to judge on.  [default: a part of --data]")
@click.option("--profile", "profiles", multiple=True, metavar="NAME|FILE", help="Back end, repeatable.  [default: all]")
@click.option(
    "--precision",
    "precisions",
    multiple=True,
    metavar="ID",
    help="w{2..8}a{4,8,16}[-dyn], repeatable. Default: what the back end does unasked, dynamic scales and w4a8.",
)
@click.option(
    "--scheme", "schemes", multiple=True, metavar="ID", help="Files as 'export' writes them, instead of a compiler's."
)
@_options(_OUT, _JSON)
def verify(
    models: Sequence[Path],
    data: Path,
    evaluation: Path | None,
    profiles: Sequence[str],
    out: Path | None,
    as_json: bool,
    **columns: Sequence[str],
) -> None:
    """Measure how accurate float models are on every back end: the first MODEL is the original.

    Each further MODEL, a file or the run directory of 'trim', is compared with the original. The profile of a back
    end (see 'onnxqt profiles') quantizes as its compiler does and computes in its integer arithmetic. Results are in
    matrix.json in the run directory; an interrupted run goes on there.

    \b
    Examples:
        onnxqt verify model.onnx --data calib/ --eval eval/
        onnxqt verify model.onnx model-onnxqt/ --data calib/ --profile tflite_ref --profile my_npu.toml
    """
    chosen = _profiles(profiles) or tuple(PROFILES.values())
    precisions = tuple(dict.fromkeys(map(parse_precision, columns["precisions"])))
    schemes = tuple(dict.fromkeys(map(parse_scheme, columns["schemes"])))
    files = [path / CHECKPOINT if path.is_dir() and (path / CHECKPOINT).is_file() else path for path in models]
    with _Bar() as bar:
        bar.stage("read the models and the samples")
        source = prepare(files[0], data, evaluation)
        task = Task(
            subjects=_subjects(files, source.model),
            calibration=source.samples.take(CALIBRATION_LIMIT),
            evaluation=source.evaluation,
            batches=source.batches,
            calibration_batch=source.fixed_batch or CALIBRATION_BATCH,
            profiles=chosen,
            precisions=precisions,
            schemes=schemes,
        )
        task.check()
        folder = make_folder(out or Path(f"{files[0].stem}-onnxqt"))
        bar.stage("verify", len(task.columns) * len(task.subjects))
        matrix = make_matrix(task, folder / MATRIX, bar.advance)
    if as_json:
        _print_json(matrix.as_json())
    else:
        _print_matrix(matrix)
        click.echo(f"everything is in {folder / MATRIX}")
    if all(cell.result is None for cell in matrix.cells):
        raise click.exceptions.Exit(1)


def _profiles(names: Sequence[str]) -> tuple[Profile, ...]:
    """The profiles that are named, each once."""
    found: dict[str, Profile] = {}
    for name in names:
        profile = _profile(name)
        if found.setdefault(profile.name, profile) != profile:
            raise UsageError(f"--profile {name}: another one is called '{profile.name}' too: change 'name' in the file")
    return tuple(found.values())


def _profile(name: str) -> Profile:
    """A profile by its name or its file."""
    if name in PROFILES:
        return PROFILES[name]
    if name.endswith(".toml") or Path(name).is_file():
        return read_profile(name)
    raise UsageError(f"unknown profile '{name}': give a TOML file or one of {', '.join(PROFILES)}")


def _subjects(files: Sequence[Path], original: Model) -> tuple[Subject, ...]:
    """The models by the names of their files, or by their paths where these are the same."""
    if len({file.resolve() for file in files}) < len(files):
        raise UsageError("a MODEL is given twice: give the original and others to compare with it")
    names = [file.name for file in files]
    names = [str(file) if names.count(file.name) > 1 else file.name for file in files]
    subjects = (
        Subject(names[0], original),
        *(Subject(n, ingest(f)) for n, f in zip(names[1:], files[1:], strict=True)),
    )
    for subject in subjects:
        if subject.model.is_large:
            raise ModelError(
                f"'{subject.name}' has more than {EMBED_LIMIT / 2**30:g} GiB of weights, which the emulator cannot "
                "hold: verify a smaller model"
            )
    return subjects


def _print_matrix(matrix: Matrix) -> None:
    """What people want to see of a matrix: accuracy, then why it is not better."""
    task, floats = matrix.task, matrix.floats
    names = [subject.name for subject in task.subjects]
    labelled = "top1" in floats[names[0]]["metrics"]
    share = "top-1 %" if labelled else "agreement with the original, %"
    columns = list(dict.fromkeys(str(column) for _, column in task.columns))
    pairs: list[tuple[str, ...]] = [(names[0], other) for other in names[1:]]
    for pair in pairs or [(names[0],)]:
        rows = [
            (profile.name, profile.evidence, *(_cells(matrix, pair, profile.name, column) for column in columns))
            for profile in task.profiles
        ]
        before = " -> ".join(_percent(floats[name]) for name in pair)
        _print_table(f"{' -> '.join(pair)}: {share}; float {before}", [("profile", "evidence", *columns), *rows])
    for entry in matrix.summary:
        if entry["mean_gap"] is not None:
            click.echo(
                f"{entry['model']}: mean gap to the original float model {100 * entry['mean_gap']:.2f} points, "
                f"spread {100 * entry['spread']:.2f} points, over {entry['cells']} back ends and precisions"
            )
    for title, table in _reasons(matrix):
        if len(table) > 1:
            click.echo()
        _print_table(title, table)


def _cells(matrix: Matrix, models: Sequence[str], profile: str, column: str) -> str:
    """Accuracy of each model in a column of a profile."""
    cells = [matrix.cell(model, profile, column) for model in models]
    return "-" if None in cells else " -> ".join(_share(cell) for cell in cells if cell)


def _share(cell: Cell) -> str:
    if cell.result is None:
        return "failed"
    return _percent(cell.result)


def _reasons(matrix: Matrix) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows of the tables below the headline: the last model at the first precision of each profile."""
    task, last = matrix.task, matrix.task.subjects[-1].name
    firsts = {profile.name: str(columns[0]) for profile in task.profiles if (columns := task.columns_of(profile))}
    done = {
        profile: cell.result
        for profile, column in firsts.items()
        if (cell := matrix.cell(last, profile, column)) and cell.result is not None
    }
    layers: _Groups = defaultdict(dict)
    floats: defaultdict[tuple[str, str], defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    advice: _Groups = defaultdict(dict)
    failed: _Groups = defaultdict(dict)
    for profile, result in done.items():
        if worst := result["worst_layer"]:
            layers[(worst["tensor"],)][f"{profile} {worst['snr_db']:.1f}"] = None
        for node in result["float_nodes"]:
            floats[node["op_type"], node["reason"]][profile].add(node["node"])
        if worst := result["costliest"]:
            values = f"{worst['values_per_sample']:,}"
            advice[worst["node"], worst["op_type"], values, worst["advice"] or "-"][profile] = None
    for cell in matrix.cells:
        if cell.error is not None:
            failed[cell.model, cell.error][f"{cell.profile} {cell.column}"] = None
    kept: _Groups = {
        (op_type, _few(dict.fromkeys(sorted(set().union(*by_profile.values())))), reason): dict.fromkeys(by_profile)
        for (op_type, reason), by_profile in floats.items()
    }
    overflows = [
        (cell.model, cell.profile, cell.column, node, f"{count:,}")
        for cell in matrix.cells
        for node, count in (cell.result or {"overflows": {}})["overflows"].items()
    ]
    titled = f"{last}, first precision of each profile"
    float_figures = ("float", "-", "-", *_figures(matrix.floats[last]))
    figures = [
        (name, _number(result["integer_macs"], "{:.1f}", 100), str(result["boundaries"]), *_figures(result))
        for name, result in done.items()
    ]
    header = ("profile", "int. MACs %", "boundaries", "MSE", "dB", "Brier", "ECE %")
    return [
        (titled, [header, float_figures, *figures]),
        ("layer farthest from the float model", [("tensor", "dB"), *_grouped(layers, len(done))]),
        ("what stays float", [("operator", "nodes", "reason", "profiles"), *_grouped(kept, len(done))]),
        (
            "the costliest way through float, and what avoids it",
            [("node", "operator", "values", "change", "profiles"), *_grouped(advice, len(done))],
        ),
        ("accumulators that did not fit", [("model", "profile", "precision", "node", "count"), *overflows]),
        ("what failed", [("model", "reason", "where"), *_grouped(failed, 0)]),
    ]


_Groups = dict[tuple[str, ...], dict[str, None]]  # what a row says -> of which profiles it is true


def _figures(outcome: dict[str, Any]) -> tuple[str, ...]:
    fidelity = outcome["fidelity"]
    return (
        _number(fidelity["mse"], "{:.3g}"),
        _decibel(fidelity),
        _number(outcome["brier"], "{:.4f}"),
        _number(outcome["ece"], "{:.2f}", 100),
    )


def _number(value: float | None, form: str, factor: float = 1) -> str:
    return "-" if value is None else form.format(factor * value)


def _decibel(fidelity: dict[str, Any]) -> str:
    if fidelity["mse"] is None:
        return "-"
    return "exact" if fidelity["snr_db"] is None else f"{fidelity['snr_db']:.1f}"


def _grouped(groups: _Groups, total: int) -> list[tuple[str, ...]]:
    """Rows with the names that they are true of, "all" for `total` of them; not more rows than anyone reads."""
    rows = [
        (*row, "all" if len(names) == total and not any(" " in name for name in names) else _few(names))
        for row, names in groups.items()
    ]
    if len(rows) > SHOWN:
        rest = (f"and {len(rows) - SHOWN} more: see --json", *[""] * (len(rows[0]) - 1))
        rows = [*rows[:SHOWN], rest]
    return rows


def _few(names: Collection[str]) -> str:
    """Some names, and how many there are besides."""
    first = list(names)[:FEW]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")


@main.command(name="profiles")
@click.argument("name", required=False)
@_options(_JSON)
def list_profiles(name: str | None, as_json: bool) -> None:
    """List the back ends that are known, or show one as the file that --profile takes.

    'validated' means that the emulator was compared with that runtime, code by code; 'modelled' that it follows
    documents, and what they leave open was assumed.

    \b
    Examples:
        onnxqt profiles
        onnxqt profiles tflite_ref > my_npu.toml
    """
    chosen = [_profile(name)] if name else list(PROFILES.values())
    if as_json:
        _print_json([asdict(profile) for profile in chosen])
    elif name:
        (profile,) = chosen
        click.echo(f"# {profile.evidence}; the profile in a file of your own counts as modelled")
        click.echo(profile_text(profile), nl=False)
    else:
        rows = [(p.name, p.evidence, " ".join(p.policy.precisions), f"{p.title}\n{p.source}") for p in chosen]
        _print_table("", [("name", "evidence", "precisions", "title and source"), *rows])


@main.command()
@click.argument("file", type=MODEL)
@click.option("--data", type=MODEL, help="Samples: a directory of .npz or .npy files; not needed with --dump.")
@_options(_JSON)
@click.option("--reference", type=MODEL, help="Float model to compare with.")
@click.option(
    "--profile", default="ort_cpu", show_default=True, metavar="NAME|FILE", help="Whose arithmetic; see 'profiles'."
)
@click.option("--dump", is_flag=True, help="Print the integer program: rules, multipliers, accumulators, node by node.")
def emulate(file: Path, data: Path | None, reference: Path | None, profile: str, dump: bool, as_json: bool) -> None:
    """Run the quantized FILE in the integer arithmetic of a back end, or print the program that does.

    \b
    Examples:
        onnxqt emulate schemes/w8a8-sym-pc.onnx --data eval/ --reference checkpoint.onnx
        onnxqt emulate schemes/w8a8-sym-pc.onnx --profile tflite_ref --dump
    """
    if data is None and not dump:
        raise UsageError("nothing to do: give samples with --data, or print the program with --dump")
    chosen = _profile(profile)
    program = load_program(file, chosen.arithmetic)
    content: dict[str, Any] = {"profile": chosen.name}
    if data is not None:
        tallies, overflows, count = _emulated(program, file, data, reference)
        content["outputs"] = {
            name: {
                "metrics": tally.metrics(),
                "fidelity": tally.fidelity() if reference else None,
                **tally.confidence(),
            }
            for name, tally in tallies.items()
        }
        content["overflows"] = overflows
    content["integer_nodes"] = len(program.integer_nodes)
    content["float_nodes"] = [{"node": n, "op_type": op, "reason": why} for n, op, why in program.float_nodes]
    if as_json:
        _print_json({**content, "program": _everything(program)} if dump else content)
        return
    if dump:
        _print_program(program, chosen)
    if data is not None:
        header = ("output", "top-1 %", "agreement %", "SNR dB", "cosine", "Brier", "ECE %")
        rows = [(name, *_compared(tally, reference is not None)) for name, tally in tallies.items()]
        title = f"{count} samples in integer arithmetic, {chosen.name} ({chosen.evidence})"
        _print_table(title, [header, *rows])
        _print_table(
            "accumulators that did not fit", [("node", "count"), *((n, f"{c:,}") for n, c in overflows.items())]
        )
    if not dump:
        _print_table("float nodes", [("node", "operator", "reason"), *program.float_nodes])


def _emulated(
    program: Program, file: Path, data: Path, reference: Path | None
) -> tuple[dict[str, Tally], dict[str, int], int]:
    """What the program makes of the samples: by output; overflows by node; how many samples."""
    specs = [InputSpec(name, np.dtype(dtype), shape or ()) for name, (dtype, shape) in program.inputs.items()]
    samples = open_samples(data, specs)
    session = Session(reference) if reference else None
    if session and not set(program.outputs) <= set(session.outputs):
        raise ModelError(
            f"'{reference}' has the outputs {session.outputs}, '{file}' has {list(program.outputs)}: "
            "give the float model that it was made of"
        )
    tallies = {name: Tally() for name in program.outputs}
    overflows: Counter[str] = Counter()
    fixed = fixed_batch(specs)
    batches = samples.batches(fixed or EVALUATION_BATCH, pad=fixed is not None)
    with _Bar() as bar:
        bar.stage("emulate", samples.count)
        for batch, result in in_order(lambda batch: program.run_codes(batch.inputs), batches):
            expected = session.run(batch.inputs) if session else result.outputs
            for name, tally in tallies.items():
                if not tally.samples:
                    _check_labels(samples, result.outputs[name])
                tally.add(batch.real(result.outputs[name]), batch.real(expected[name]), batch.labels)
            overflows.update(result.overflows)
            bar.advance(next(iter(tallies.values())).samples)
    return tallies, dict(+overflows), samples.count


def _print_program(program: Program, profile: Profile) -> None:
    """The integer program for people: a paragraph per node, a line per fact."""
    click.echo(
        f"{len(program.integer_nodes)} nodes on integers, {len(program.float_nodes)} in float: "
        f"{profile.title} ({profile.evidence})"
    )
    listing, arrays = program.listing()
    for node in listing["nodes"]:
        if node["kind"] != "shape":
            click.echo(f"\n{node['name']}: {node['op_type']}, {node['kind']}")
            for label, fact in (*_operands(node, listing["values"], arrays), *_manner(node)):
                click.echo(f"    {label:<12}{fact}")


def _operands(
    node: dict[str, Any], values: dict[str, dict[str, Any]], arrays: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """What a node reads and gives out: types, scales and zero points."""
    name = node["name"]
    for value in node["inputs"]:
        yield "input", f"{_grid(values.get(value))}  {value}"
    if f"weights:{name}" in arrays and f"weight_scale:{name}" in arrays:
        yield "weights", f"int{node['weight_bits'] or 8}, scale {_span(arrays[f'weight_scale:{name}'])}"
    for key, kind in (("bias", "int32"), ("float_bias", "float32")):
        if f"{key}:{name}" in arrays:
            yield "bias", f"{kind}, {_span(arrays[f'{key}:{name}'])}"
    for value in node["outputs"]:
        yield "output", f"{_grid(values.get(value))}  {value}"


def _grid(codes: dict[str, Any] | None) -> str:
    if codes is None:
        return "float"
    kind = f"{'' if codes['signed'] else 'u'}int{codes['bits']}"
    return f"{kind}, scale {codes['scale']:.6g}, zero point {codes['zero_point']}"


def _manner(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How a node computes."""
    how = node["requantize"]
    if node["reason"]:
        yield "reason", node["reason"]
    if node["accumulator"]:
        yield (
            "accumulator",
            node["accumulator"] + ("" if node["bound"] is None else f", at most {node['bound']:,} here"),
        )
    if node["rule"]:
        yield "rule", node["rule"]
    if how and how["mantissa"]:
        yield "multiplier", f"mantissa {_span(how['mantissa'])}, exponent {_span(how['exponent'])}"
    elif how:
        yield "multiplier", _span(how["multiplier"])
    if node["clamp"]:
        yield "clamp", "{} to {}".format(*node["clamp"])
    if node["implementation"]:
        yield "computed by", node["implementation"]
    if node["note"]:
        yield "note", node["note"]


def _span(values: Any) -> str:
    """One value, or the ends of those of the channels."""
    values = np.asarray(values)
    form = "{}" if np.issubdtype(values.dtype, np.integer) else "{:.6g}"
    low, high = form.format(values.min()), form.format(values.max())
    return (low if low == high else f"{low} to {high}") + (f" ({values.size} channels)" if values.size > 1 else "")


def _everything(program: Program) -> dict[str, Any]:
    """The integer program for machines, its arrays as lists."""
    listing, arrays = program.listing()
    return {**listing, "arrays": {name: array.tolist() for name, array in arrays.items()}}


def _check_labels(samples: Samples, output: Any) -> None:
    """Labels must be classes of an output that has classes."""
    if samples.has_labels and output.ndim == 2 and output.shape[1] > 1:
        check_labels(samples, output.shape[1])


def _compared(tally: Tally, with_reference: bool) -> tuple[str, ...]:
    fidelity, metrics, confidence = tally.fidelity(), tally.metrics(), tally.confidence()
    rated = (_number(confidence["brier"], "{:.4f}"), _number(confidence["ece"], "{:.2f}", 100))
    top1 = f"{100 * metrics['top1']:.2f}" if "top1" in metrics else "-"
    if not with_reference:
        return (top1, "-", "-", "-", *rated)
    return (
        top1,
        _number(fidelity["agreement"], "{:.2f}", 100),
        "exact" if fidelity["snr_db"] is None else f"{fidelity['snr_db']:.1f}",
        _number(fidelity["cosine"], "{:.6f}"),
        *rated,
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
    if title:
        click.echo(title)  # a title of the table itself would be folded at its width
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in rows[0]:
        table.add_column(column, overflow="fold", no_wrap=column == "scheme")
    for row in rows[1:]:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)
