"""The commands that make files of a model: trim, calibrate, export."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxqt.candidates import Candidate
from onnxqt.cli.options import (
    DATA,
    EQUALIZE_OPTION,
    JSON,
    MODEL,
    OUT,
    PTQ,
    RANGES,
    SCHEMES,
    STRIP_QDQ,
    options,
    ptq_steps,
    settings_of,
)
from onnxqt.cli.output import percent, print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.cli.training import ROBUST_TO, TRAINING, regimes_named, training_of
from onnxqt.files import write_json
from onnxqt.pictures import TAILS_PICTURE, TRAINING_PICTURE, tail_length
from onnxqt.pipeline import SCHEMES_FOLDER, TABLE, calibrated, make_table, open_workspace
from onnxqt.pipeline import export as export_files
from onnxqt.pipeline import trim as run_trim
from onnxqt.trim import TrimSettings
from onnxqt.trim.prune import Tails
from onnxqt.verify import Verdict


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, OUT, SCHEMES, RANGES, EQUALIZE_OPTION, PTQ, STRIP_QDQ, JSON)
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
@options(DATA, OUT, SCHEMES, RANGES, STRIP_QDQ, JSON)
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
    content = make_table(work, Candidate(work.source.model, table))
    write_json(work.folder / TABLE, content)
    _tell_unbounded(work.source.plan.unbounded)
    if as_json:
        print_json(content)
        return
    rows = [
        (entry["name"], entry["role"], f"{entry['min']:.5g}", f"{entry['max']:.5g}")
        for entry in content["tensors"]
        if entry["role"] != "bias"
    ]
    print_table(f"{table.samples} samples", [("tensor", "role", "min", "max"), *rows])
    click.echo(f"wrote {work.folder / TABLE}")


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, OUT, SCHEMES, RANGES, PTQ, STRIP_QDQ, JSON)
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
    ptq = ptq_steps(rest.pop("ptq"))
    settings = settings_of(schemes, training=TrimSettings(steps=0), **rest)
    with Bar() as bar:
        work, ranges = calibrated(open_workspace(model, data, None, out, settings, bar))
        checkpoint = Candidate(work.source.model, ranges)
        exported = export_files(work, checkpoint, ptq=ptq)
    content = {name: _check_of(scheme.verdict) for name, scheme in exported.items()}
    _tell_unbounded(work.source.plan.unbounded)
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
    if work.source.model.is_large:
        click.echo("the files were not checked by the emulator, which would hold all weights in memory", err=True)
    click.echo(f"wrote {work.folder / SCHEMES_FOLDER} and {work.folder / TABLE}")


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
    steps, schedule = asked.steps, asked.schedule
    ends = [round(share * steps) for share in (schedule.warmup, schedule.bend, schedule.full)]
    lines = [
        f"schedule: float until {ends[0]}, quartic to {ends[1]} (lambda {schedule.knee:g}), "
        f"quadratic to {ends[2]} (lambda 1), hold to {steps}"
    ]
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
