"""The commands that make files of a model: trim, calibrate, export."""

import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxqt.budget import WIDTHS, Budget, choose_bits
from onnxqt.candidates import Candidate
from onnxqt.cli.options import (
    DATA,
    DATA_IF_NEEDED,
    EQUALIZE_OPTION,
    FORM,
    JSON,
    MODEL,
    OPSET,
    OUT,
    OVERRIDES,
    PREPROCESS,
    PTQ,
    RANGES,
    ROBUST_ROUNDING,
    SCHEMES,
    STRIP_QDQ,
    options,
    ptq_steps,
    settings_of,
)
from onnxqt.cli.output import percent, print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.cli.training import ROBUST_TO, TRAINING, regimes_named, training_of
from onnxqt.cli.writing import overrides_text
from onnxqt.errors import UsageError
from onnxqt.files import write_bytes
from onnxqt.mixed import Mixed
from onnxqt.pictures import TAILS_PICTURE, TRAINING_PICTURE, tail_length
from onnxqt.pipeline import SCHEMES_FOLDER, TABLE, calibrated, export_table, keep_table, make_table, open_workspace
from onnxqt.pipeline import export as export_files
from onnxqt.pipeline import trim as run_trim
from onnxqt.table import read_table
from onnxqt.trim import TrimSettings
from onnxqt.trim.prune import Tails
from onnxqt.trim.schedule import Schedule
from onnxqt.verify import Verdict

OVERRIDES_FILE = "overrides.toml"


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, PREPROCESS, OUT, SCHEMES, OVERRIDES, RANGES, EQUALIZE_OPTION, ROBUST_ROUNDING, PTQ, FORM, OPSET)
@options(STRIP_QDQ, JSON)
@click.option(
    "--eval",
    "evaluation",
    type=MODEL,
    help="Samples for the report.  [default: what training holds out of --data to pick the checkpoint]",
)
@options(ROBUST_TO, *TRAINING)
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
    settings = settings_of(
        schemes,
        training=training_of(rest),
        robust_to=regimes_named(rest["robust_to"], rest["ranges"]),
        ranges=rest["ranges"],
        equalize=rest["equalize"],
        robust_rounding=rest["robust_rounding"],
        **{name: rest[name] for name in ("preprocess", "form", "opset", "overrides")},
        ptq=ptq_steps(rest["ptq"]),
        strip_qdq=rest["strip_qdq"],
    )
    folder = out or Path(f"{model.stem}-onnxqt")
    with Bar() as bar:
        report = run_trim(model, data, evaluation, folder, settings, bar)
    if as_json:
        print_json(report.content)
        return
    content = report.content
    share = "top-1 %" if "top1" in content["float"]["metrics"] else "agreement with the original, %"
    title = f"{model.name}: {share}; float {percent(content['float'])}, checkpoint {percent(content['checkpoint'])}"
    print_table(title, report.summary())
    training = content["training"]
    _tell_unbounded(content["plan"]["unbounded_tensors"])
    for line in _untrained(training):
        click.echo(line, err=True)
    pictures = ""
    if training["steps"]:
        for line in _course(training, settings.training):
            click.echo(line, err=True)
        pictures = f", the course of training in its {TRAINING_PICTURE} and {TAILS_PICTURE}"
    click.echo(
        f"{training['steps']} steps in {training['seconds']:.0f} s ({training['step_ms_median']:.0f} ms each), "
        f"best after {training['best_step']}; everything is in {folder}/{pictures}"
    )


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, PREPROCESS, OUT, SCHEMES, OVERRIDES, RANGES, STRIP_QDQ, JSON)
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
    settings = settings_of(schemes, training=TrimSettings(steps=0), **rest)
    with Bar() as bar:
        work, table = calibrated(open_workspace(model, data, None, out, settings, bar))
    found = make_table(work, Candidate(work.source.model, table))
    keep_table(work.folder, found)
    _tell_unbounded(work.source.plan.unbounded)
    if as_json:
        print_json(json.loads((work.folder / TABLE).read_text()))
        return
    rows = [
        (entry.name, entry.role, f"{entry.stats.min:.5g}", f"{entry.stats.max:.5g}")
        for entry in found.entries
        if entry.role != "bias" and entry.stats is not None
    ]
    print_table(f"{table.samples} samples", [("tensor", "role", "min", "max"), *rows])
    click.echo(f"wrote {work.folder / TABLE}")


@click.command()
@click.argument("model", type=MODEL)
@options(DATA_IF_NEEDED, PREPROCESS, OUT, SCHEMES, OVERRIDES)
@click.option("--mean-bits", type=float, help="Choose the bits of each weight: at most so many on average.")
@click.option(
    "--max-error",
    type=float,
    help="Choose the bits of each weight: the fewest with which the outputs' squared error is at most this share of "
    "their power.",
)
@click.option("--widths", metavar="BITS,...", help="Bits to choose from.  [default: 8,4]")
@click.option("--table", type=MODEL, help="Take scales and zero points from this table.json, perhaps edited.")
@options(RANGES, PTQ, FORM, OPSET, STRIP_QDQ, JSON)
def export(
    model: Path,
    data: Path | None,
    out: Path | None,
    schemes: Sequence[str],
    as_json: bool,
    **rest: Any,
) -> None:
    """Write the quantized files and the table of MODEL as it is, without training.

    \b
    Examples:
        onnxqt export checkpoint.onnx --data calib/ --scheme w8a8-sym-pc
        onnxqt export model.onnx --scheme w4af-sym-b32
        onnxqt export model.onnx --data calib/ --scheme w8a8-sym-pc --mean-bits 6
        onnxqt export model.onnx --table edited/table.json --data calib/
    """
    budget = _budget(rest.pop("mean_bits"), rest.pop("max_error"), rest.pop("widths"))
    file = rest.pop("table")
    table = None if file is None else read_table(file)
    if table is not None and (budget or rest["ptq"]):
        raise UsageError("--table has the scales of every weight: leave out --mean-bits, --max-error and --ptq")
    steps = ptq_steps(rest.pop("ptq"))
    named = schemes if table is None else schemes or table.schemes
    settings = settings_of(named, training=TrimSettings(steps=0), ptq=steps, **rest)
    if table is None:
        settings.check_data(data)
    with Bar() as bar:
        work = open_workspace(model, data, None, out, settings, bar)
        mixed = None
        if table is not None:
            exported = export_table(work, table)
            keep_table(work.folder, table)
        else:
            work, ranges = calibrated(work)
            checkpoint = Candidate(work.source.model, ranges)
            if budget is not None:
                work, mixed = choose_bits(work, checkpoint, budget)
                write_bytes(work.folder / OVERRIDES_FILE, overrides_text(work.settings.overrides).encode())
            exported = export_files(work, checkpoint, ptq=steps)
    content = {name: _check_of(scheme.verdict) for name, scheme in exported.items()}
    _tell_unbounded(work.source.plan.unbounded)
    if mixed is not None:
        _tell_bits(mixed, work.folder / OVERRIDES_FILE)
    if as_json:
        print_json(content)
        return
    header = ("scheme", "max LSB", "differing codes", "integer kernels")
    rows = [
        (name, str(row["max_lsb"]), f"{row['mismatch_fraction']:.2%}", str(row["integer_kernels"]))
        for name, row in content.items()
        if row is not None
    ]
    print_table("emulator against ONNX Runtime", [header, *rows])
    if data is None:
        click.echo("the files were not checked by the emulator: give samples with --data for that", err=True)
    elif work.source.model.is_large:
        click.echo("the files were not checked by the emulator, which would hold all weights in memory", err=True)
    click.echo(f"wrote {work.folder / SCHEMES_FOLDER} and {work.folder / TABLE}")


def _budget(mean_bits: float | None, max_error: float | None, widths: str | None) -> Budget | None:
    """What the bits of weights are to keep to; None where they are not to be chosen."""
    if mean_bits is None and max_error is None:
        if widths is not None:
            raise UsageError("--widths is for bits that are chosen: add --mean-bits or --max-error")
        return None
    names = [] if widths is None else [name.strip() for name in widths.split(",")]
    if not all(name.isascii() and name.isdigit() for name in names):
        raise UsageError(f"--widths {widths}: give numbers of bits with commas, such as 8,6,4")
    return Budget(mean_bits, max_error, tuple(map(int, names)) or WIDTHS)


def _tell_bits(mixed: Mixed, file: Path) -> None:
    counts = sorted(Counter(mixed.bits.values()).items(), reverse=True)
    weights = ", ".join(f"{count} of {bits} bits" for bits, count in counts)
    click.echo(
        f"weights: {weights}, {mixed.mean_bits:.2f} on average, relative squared error {mixed.error:.3g}; "
        f"--overrides {file} gives the same again",
        err=True,
    )


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


def _course(training: dict[str, Any], asked: TrimSettings) -> list[str]:
    """The phases of the schedule, and what reverse pruning did to the weights' tails."""
    steps, schedule = asked.steps, Schedule(**training["schedule"])
    ends = [round(share * steps) for share in (schedule.warmup, schedule.bend, schedule.full)]
    ramp = (
        "lambda is 1 from the start"
        if not ends[2]
        else f"float until {ends[0]}, quartic to {ends[1]} (lambda {schedule.knee:g}), "
        f"quadratic to {ends[2]} (lambda 1), hold to {steps}"
    )
    lines = [f"schedule: {ramp}"]
    if training["stopped"]:
        lines.append(f"training was stopped after {training['steps']} of {steps} steps")
    tails = training["tails"]
    if asked.prune == "none" or not tails:
        return lines
    clipped = [name for name, tail in tails.items() if tail["before"]["clipped"]]
    worst = max(tails, key=lambda name: _length(tails[name]["before"]))
    before, after = (_length(tails[worst][when]) for when in ("before", "after"))
    lines.append(
        f"reverse pruning acted on {len(clipped)} of {len(tails)} weights: the longest tail (max|W| / 0.999 quantile), "
        f"of '{worst}', was {before:.3g} before, {after:.3g} after"
    )
    return lines


def _length(tails: dict[str, Any]) -> float:
    return tail_length(Tails(**tails))


def _check_of(verdict: Verdict | None) -> dict[str, Any] | None:
    """What the check of a file found; None for one that was not checked."""
    if verdict is None:
        return None
    return {
        "max_lsb": verdict.max_lsb,
        "mismatch_fraction": verdict.mismatch_fraction,
        "integer_kernels": verdict.integer_kernels,
    }
