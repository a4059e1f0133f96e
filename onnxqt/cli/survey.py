"""The command that looks at a model: inspect."""

from pathlib import Path

import click
from rich.console import Console

from onnxqt.cli.options import JSON, MODEL, STRIP_QDQ, options
from onnxqt.cli.output import print_json, print_table
from onnxqt.ingest import ingest
from onnxqt.plan import make_plan
from onnxqt.survey import survey, survey_json
from onnxqt.survey.page import headlines, tables
from onnxqt.trim import reach


@click.command()
@click.argument("model", type=MODEL)
@options(STRIP_QDQ, JSON)
@click.option("--all", "everything", is_flag=True, help="Print every row of every table.")
def inspect(model: Path, strip_qdq: bool, as_json: bool, everything: bool) -> None:
    """Show what MODEL contains, what will be quantized and trained, and what not and why. Needs no data.

    \b
    Example:
        onnxqt inspect model.onnx
    """
    ingested = ingest(model, strip_qdq)
    plan = make_plan(ingested)
    found = survey(ingested, plan, reach(ingested, plan))
    if as_json:
        print_json(survey_json(found))
        return
    width = Console().width
    for line in headlines(found, model.name, width, everything):
        click.echo(line)
    for table in tables(found, width, everything):
        if len(table.rows) > 1:
            click.echo()
        print_table(table.title, table.rows)
