"""The commands that make files of a model: trim, calibrate, export."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxqt.cli.options import DATA, JSON, MODEL, OUT, RANGES, SCHEMES, STRIP_QDQ, options, settings_of
from onnxqt.cli.output import percent, print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.files import write_json
from onnxqt.pipeline import SCHEMES_FOLDER, TABLE, Candidate, Settings, calibrated, make_table, open_workspace
from onnxqt.pipeline import export as export_files
from onnxqt.pipeline import trim as run_trim
from onnxqt.verify import Verdict


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, OUT, SCHEMES, RANGES, STRIP_QDQ, JSON)
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
    settings = settings_of(
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
    click.echo(
        f"{training['steps']} steps in {training['seconds']:.0f} s ({training['step_ms_median']:.0f} ms each), "
        f"best after {training['best_step']}; everything is in {folder}/"
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
    settings = settings_of(schemes, steps=0, **rest)
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
@options(DATA, OUT, SCHEMES, RANGES, STRIP_QDQ, JSON)
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
    settings = settings_of(schemes, steps=0, **rest)
    with Bar() as bar:
        work, ranges = calibrated(open_workspace(model, data, None, out, settings, bar))
        checkpoint = Candidate(work.source.model, ranges)
        exported = export_files(work, checkpoint)
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


def _check_of(verdict: Verdict | None) -> dict[str, Any] | None:
    """What the check of a file found; None for one that was not checked."""
    if verdict is None:
        return None
    return {
        "max_lsb": verdict.max_lsb,
        "mismatch_fraction": verdict.mismatch_fraction,
        "integer_kernels": verdict.integer_kernels,
    }
