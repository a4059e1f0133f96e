"""Rows of marks that move from one number to another: before and after."""

from collections.abc import Sequence
from dataclasses import dataclass

from onnxqt.html.svg import Picture, draw_across, line, spanning
from onnxqt.html.text import short

ROW = 30  # pixels of a row of `draw_moves`


@dataclass(frozen=True, slots=True)
class Move:
    """A row of `draw_moves`.

    Attributes:
        name: what moves.
        before: where from.
        after: where to.
        text: both numbers, in words.
        other: a third place, if any.
    """

    name: str
    before: float
    after: float
    text: str
    other: float | None = None


def draw_moves(picture: Picture, moves: Sequence[Move], top: float, reference: float | None = None) -> None:
    """Draw a row for each move: its name above a hollow mark before, a full one after and a line between them.

    A stroke stands at `reference`, a diamond at the third place of a move.
    """
    places = [value for move in moves for value in (move.before, move.after, move.other) if value is not None]
    scale = spanning([*places, *(() if reference is None else (reference,))], 12, 348)
    bottom = top + ROW * len(moves)
    draw_across(picture, scale, (top, bottom))
    for index, move in enumerate(moves):
        y = top + ROW * index + 22
        before, after = scale.at(move.before), scale.at(move.after)
        picture.text((4, y - 9), short(move.name, 34), "small")
        picture.text((356, y - 9), short(move.text, 34), "small", "end")
        if reference is not None:
            picture.path(line(((scale.at(reference), y - 6), (scale.at(reference), y + 7))), "reference")
        picture.path(line(((before, y), (after, y))), "between")
        if move.other is not None:
            picture.mark((scale.at(move.other), y), "diamond", "before")
        picture.mark((before, y), "circle", "before")
        picture.mark((after, y), "circle", "after")
