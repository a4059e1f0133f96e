"""The command that compares two models tensor by tensor: compare."""

from collections.abc import Sequence
from pathlib import Path

import click

from onnxqt.cli.options import DATA, JSON, MODEL, PREPROCESS, opened, options
from onnxqt.cli.output import few, number, print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.compare import (
    LIMIT_DB,
    MATCHES,
    SAMPLES_LIMIT,
    CompareSettings,
    Comparison,
    Difference,
    Match,
    Subject,
    match_models,
    open_subject,
)
from onnxqt.compare import compare as compare_models
from onnxqt.errors import UsageError

_EXACT = 300.0


@click.command()
@click.argument("first", metavar="A.onnx", type=MODEL)
@click.argument("second", metavar="B.onnx", type=MODEL)
@options(DATA, PREPROCESS)
@click.option(
    "--match",
    type=click.Choice(MATCHES),
    help="Which tensors belong together.  [default: name; position where names differ]",
)
@click.option(
    "--limit",
    "limit_db",
    type=float,
    default=LIMIT_DB,
    show_default=True,
    metavar="DB",
    help="Tensors whose signal-to-noise ratio is below differ.",
)
@click.option("--samples", type=int, default=SAMPLES_LIMIT, show_default=True, help="Samples to run on, at most.")
@click.option("--top", type=int, default=15, show_default=True, help="Rows of the table.")
@options(JSON)
def compare(
    first: Path,
    second: Path,
    data: Path,
    preprocess: str | None,
    match: Match | None,
    limit_db: float,
    samples: int,
    top: int,
    as_json: bool,
) -> None:
    """Compare two forms of one model tensor by tensor, on samples: A.onnx is the reference.

    A float model with its quantized file, an original with a fine-tuned one, or files of different tools. The worst
    tensor comes first; the first in the graph that differs is marked: from there on the error grows.

    \b
    Examples:
        onnxqt compare model.onnx model-onnxqt/schemes/w8a8-sym-pc.onnx --data calib/
        onnxqt compare model.onnx foreign-int8.onnx --data calib/ --match position
    """
    if top < 1:
        raise UsageError(f"--top is {top}: give a number of at least 1")
    settings = CompareSettings(match, limit_db, samples)
    matched = match_models(*_subjects(first, second), settings)
    with opened(data, preprocess, matched.specs) as given, Bar() as bar:
        stages = 0

        def advance(done: int, total: int) -> None:
            nonlocal stages
            if not stages:
                stages = 1
                bar.stage("compare", total)
            bar.advance(done)

        found = compare_models(matched, given, advance)
    if as_json:
        print_json(found.as_json())
        return
    _print(found, top)


def _subjects(first: Path, second: Path) -> tuple[Subject, Subject]:
    """Both models, by the names of their files or, where these are the same, by their paths."""
    names = (str(first), str(second)) if first.name == second.name else (first.name, second.name)
    return open_subject(first, names[0]), open_subject(second, names[1])


def _print(found: Comparison, top: int) -> None:
    """The worst tensors, and where they begin to differ."""
    matched, first = found.matched, found.first_differing
    a, b = matched.first.name, matched.second.name
    rows = [_row(difference, difference is first) for difference in found.worst_first[:top]]
    if first is not None and first not in found.worst_first[:top]:
        rows.append(_row(first, True))
    header = ("SNR dB", "max |a - b|", "cosine", "place", "tensor", "")
    title = f"{b} against {a}: {len(found.differences)} tensors by {matched.match}, {found.samples} samples"
    print_table(title, [header, *rows])
    differing = sum(difference.differs for difference in found.differences)
    limit = f"{matched.settings.limit_db:g} dB"
    if first is None:
        click.echo(f"no tensor is below {limit}")
    else:
        what = "constant" if first.pair.role == "constant" else first.pair.op_type or first.pair.role
        click.echo(f"{differing} tensors are below {limit}; the first is {what} '{first.pair.tensor}'")
    for names, text in ((matched.unmatched, "without a counterpart"), (found.unlike, "of different shapes")):
        if names:
            click.echo(f"not compared, {text}: {few(names)}", err=True)


def _row(found: Difference, is_first: bool) -> Sequence[str]:
    marks = "first to differ" if is_first else "error arises here" if found.arises else ""
    snr = "exact" if found.snr_db >= _EXACT else "not finite" if found.snr_db <= -_EXACT else f"{found.snr_db:.1f}"
    what = "constant of " if found.pair.role == "constant" else ""
    label = f"{found.pair.tensor} ({what}{found.pair.op_type or 'input'})"
    return (snr, f"{found.max_abs:.3g}", number(found.cosine, "{:.6f}"), str(found.order), label, marks)
