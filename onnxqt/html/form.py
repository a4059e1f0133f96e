"""What a page is made of, as data; the template page.html says how each part looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from onnxqt.html.svg import Picture

MOST_ROWS = 200  # of a table


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it says.
        number: whether it holds a number, which is aligned on the right.
        heat: the shade of a heat map, 0 (nothing lost) to 5; None for none.
        detail: a second, smaller line.
    """

    text: str
    number: bool = False
    heat: int | None = None
    detail: str = ""


def number(text: str) -> Cell:
    """A cell that holds a number."""
    return Cell(text, number=True)


Row = Sequence[Cell]


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first cell of each row is the row's header.

    Attributes:
        caption: what it shows.
        header: of each column.
        rows: as long as the header.
        groups: words over several columns, with how many; they add up to the columns behind the first.
        footer: rows that sum up the others.
    """

    kind: ClassVar[str] = "table"

    caption: str
    header: Sequence[str]
    rows: Sequence[Row]
    groups: Sequence[tuple[str, int]] = ()
    footer: Sequence[Row] = ()


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; `tone` is "" for plain text, "absent" for what was not measured, or "warning"."""

    kind: ClassVar[str] = "paragraph"

    text: str
    tone: str = ""


@dataclass(frozen=True, slots=True)
class Figures:
    """Pictures side by side, each with its caption, which explains its marks."""

    kind: ClassVar[str] = "figures"

    pictures: Sequence[tuple[Picture, str]]


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading inside a section."""

    kind: ClassVar[str] = "heading"

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """A command as it is typed, line by line."""

    kind: ClassVar[str] = "code"

    lines: Sequence[str]


@dataclass(frozen=True, slots=True)
class Notes:
    """Numbered notes; addresses of web pages in them become links."""

    kind: ClassVar[str] = "notes"

    texts: Sequence[str]


@dataclass(frozen=True, slots=True)
class Fold:
    """Blocks that are shown when their summary is clicked."""

    kind: ClassVar[str] = "fold"

    summary: str
    blocks: "Sequence[Block]"


Block = Table | Paragraph | Figures | Heading | Code | Notes | Fold


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the page; `name` is the target of links to it."""

    name: str
    title: str
    blocks: Sequence[Block]


def absent(what: str, remedy: str = "") -> Paragraph:
    """The paragraph that stands where nothing was measured."""
    return Paragraph(f"{what}: not measured in this run.{f' {remedy}' if remedy else ''}", "absent")


def rows_within(rows: Sequence[Row]) -> tuple[Sequence[Row], str]:
    """The first rows, and words for how many are not shown."""
    rest = len(rows) - MOST_ROWS
    return rows[:MOST_ROWS], f" ({rest:,} more are in the file)" if rest > 0 else ""
