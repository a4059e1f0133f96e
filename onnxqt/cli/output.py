"""What commands print on standard output: JSON, tables, and the figures in them."""

import json
from collections.abc import Collection, Sequence
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

FEW = 4  # names in a cell of a table


def print_json(content: Any) -> None:
    """JSON on standard output."""
    click.echo(json.dumps(content, indent=1, allow_nan=False))


def print_table(title: str, rows: Sequence[Sequence[str]]) -> None:
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


def percent(outcome: dict[str, Any]) -> str:
    """The share of right or agreeing samples."""
    return f"{100 * next(iter(outcome['metrics'].values())):.2f}" if outcome["metrics"] else "-"


def number(value: float | None, form: str, factor: float = 1) -> str:
    """`factor * value` in a form, "-" for None."""
    return "-" if value is None else form.format(factor * value)


def decibel(fidelity: dict[str, Any]) -> str:
    """The signal-to-noise ratio; "exact" where there is no error."""
    if fidelity["mse"] is None:
        return "-"
    return "exact" if fidelity["snr_db"] is None else f"{fidelity['snr_db']:.1f}"


def few(names: Collection[str]) -> str:
    """Some names, and how many there are besides."""
    first = list(names)[:FEW]
    return ", ".join(first) + (f" and {len(names) - len(first)} more" if len(names) > len(first) else "")
