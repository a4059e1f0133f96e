"""The commands about back ends: verify, profiles."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from onnxqt.cli.matrix_page import print_matrix
from onnxqt.cli.options import (
    DATA,
    JSON,
    MODEL,
    OUT,
    PREPROCESS,
    options,
    preprocessing_of,
    profile_named,
    profiles_named,
)
from onnxqt.cli.output import print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.errors import ModelError, UsageError
from onnxqt.files import make_folder
from onnxqt.ingest import ingest
from onnxqt.ingest.files import EMBED_LIMIT
from onnxqt.matrix import Subject, Task, make_matrix
from onnxqt.model import Model
from onnxqt.pipeline import CALIBRATION_BATCH, CALIBRATION_LIMIT, CHECKPOINT, Settings, prepare, run_folder
from onnxqt.profiles import PROFILES, parse_precision, profile_text
from onnxqt.schemes import parse_scheme

MATRIX = "matrix.json"


@click.command()
@click.argument("models", metavar="MODEL...", type=MODEL, nargs=-1, required=True)
@options(DATA, PREPROCESS)
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
@options(OUT, JSON)
def verify(
    models: Sequence[Path],
    data: Path,
    evaluation: Path | None,
    profiles: Sequence[str],
    out: Path | None,
    as_json: bool,
    **rest: Any,
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
    chosen = profiles_named(profiles) or tuple(PROFILES.values())
    precisions = tuple(dict.fromkeys(map(parse_precision, rest["precisions"])))
    schemes = tuple(dict.fromkeys(map(parse_scheme, rest["schemes"])))
    settings = Settings(preprocessing=preprocessing_of(rest["preprocess"]))
    files = [path / CHECKPOINT if path.is_dir() and (path / CHECKPOINT).is_file() else path for path in models]
    with Bar() as bar:
        bar.stage("read the models and the samples")
        place = out or run_folder(files[0])
        source = prepare(files[0], data, evaluation, settings, place)
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
        folder = make_folder(place)
        bar.stage("verify", len(task.columns) * len(task.subjects))
        matrix = make_matrix(task, folder / MATRIX, bar.advance)
    if as_json:
        print_json(matrix.as_json())
    else:
        print_matrix(matrix)
        click.echo(f"everything is in {folder / MATRIX}")
    if all(cell.result is None for cell in matrix.cells):
        raise click.exceptions.Exit(1)


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


@click.command(name="profiles")
@click.argument("name", required=False)
@options(JSON)
def list_profiles(name: str | None, as_json: bool) -> None:
    """List the back ends that are known, or show one as the file that --profile takes.

    'validated' means that the emulator was compared with that runtime, code by code; 'modelled' that it follows
    documents, and what they leave open was assumed.

    \b
    Examples:
        onnxqt profiles
        onnxqt profiles tflite_ref > my_npu.toml
    """
    chosen = [profile_named(name)] if name else list(PROFILES.values())
    if as_json:
        print_json([asdict(profile) for profile in chosen])
    elif name:
        (profile,) = chosen
        click.echo(f"# {profile.evidence}; the profile in a file of your own counts as modelled")
        click.echo(profile_text(profile), nl=False)
    else:
        rows = [(p.name, p.evidence, " ".join(p.policy.precisions), f"{p.title}\n{p.source}") for p in chosen]
        print_table("", [("name", "evidence", "precisions", "title and source"), *rows])
