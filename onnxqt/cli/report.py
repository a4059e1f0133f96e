"""The command that writes the page of a run: report."""

from pathlib import Path

import click

from onnxqt.cli.options import MODEL
from onnxqt.errors import UsageError
from onnxqt.files import write_bytes
from onnxqt.html import make_page, read_run

PAGE = "report.html"


@click.command()
@click.argument("source", metavar="REPORT.json|DIR", type=MODEL)
@click.option("--out", type=MODEL, help=f"The page.  [default: {PAGE} beside the report]")
def report(source: Path, out: Path | None) -> None:
    """Write one page that explains a run, from its report.json and the files beside it.

    The page needs no network and no other file. It has more to say where matrix.json of 'verify', table.json of the
    run, or the output of 'cost --json' as cost.json lie beside the report.

    \b
    Examples:
        onnxqt report model-onnxqt/report.json
        onnxqt report model-onnxqt/ --out page.html
    """
    path = out or (source if source.is_dir() else source.parent) / PAGE
    if path.exists() and source.exists() and path.samefile(source):
        raise UsageError(f"--out {path} is the report itself: choose another file")
    run = read_run(source)
    page = make_page(run).encode()
    write_bytes(path, page)
    for note in run.notes:
        click.echo(note, err=True)
    click.echo(f"wrote {path}")
