"""Pictures as inline SVG: small, drawn with the page's own colours, and with words for those who do not see them."""

import math
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from onnxqt.html.text import visible

WIDTH = 360  # of every picture, in pixels, as a phone shows it
_TEXT_HEIGHT = 11
_LARGEST = 1e6  # of a coordinate
_FARTHEST = 1e30  # number on an axis
_NARROWEST = 1e-12  # of an axis, as a share of its numbers

Point = tuple[float, float]


class Picture:
    """A picture that is being drawn; classes of its marks are those of page.css.

    Args:
        name: of the picture, unlike that of any other on the page.
        height: in pixels.
        title: what it is, in a few words.
        description: what it shows, in a sentence.
    """

    def __init__(self, name: str, height: float, title: str, description: str) -> None:
        self.height = height
        self._root = ET.Element(
            "svg",
            {
                "viewBox": f"0 0 {WIDTH} {_number(height)}",
                "role": "img",
                "aria-labelledby": f"{name}-title {name}-desc",
            },
        )
        for kind, text in (("title", title), ("desc", description)):
            ET.SubElement(self._root, kind, {"id": f"{name}-{kind}"}).text = visible(text)

    def text(self, at: Point, text: str, look: str = "", anchor: str = "start") -> None:
        """Write a text whose baseline starts (or ends, or has its middle) at a point."""
        attributes = {"x": _number(at[0]), "y": _number(at[1])}
        if anchor != "start":
            attributes["text-anchor"] = anchor
        self._add("text", attributes, look).text = visible(text)

    def path(self, steps: str, look: str) -> None:
        """Draw a path; see `line`, `ticks` and `staircase` for its steps."""
        if steps:
            self._add("path", {"d": steps}, look)

    def rectangle(self, corner: Point, size: Point, look: str) -> None:
        """Fill a rectangle."""
        x, y, width, height = map(_number, (*corner, *size))
        self._add("rect", {"x": x, "y": y, "width": width, "height": height}, look)

    def mark(self, at: Point, shape: str, look: str) -> None:
        """Draw a mark; `shape` is "circle", "square", "triangle", "diamond" or "cross"."""
        x, y = at
        if shape == "circle":
            self._add("circle", {"cx": _number(x), "cy": _number(y), "r": "3.5"}, look)
        else:
            self.path(f"M{_number(x)} {_number(y)}{_SHAPES[shape]}", look)

    def markup(self) -> str:
        """The picture as an element of HTML."""
        return ET.tostring(self._root, encoding="unicode")

    def _add(self, tag: str, attributes: dict[str, str], look: str) -> ET.Element:
        return ET.SubElement(self._root, tag, {**attributes, **({"class": look} if look else {})})


_SHAPES = {
    "square": "m-3-3h6v6h-6z",
    "triangle": "m0-4l4 7h-8z",
    "diamond": "m0-4.5l4.5 4.5l-4.5 4.5l-4.5-4.5z",
    "cross": "m-3-3l6 6m0-6l-6 6",
}
SHAPES = ("circle", *_SHAPES)


def line(points: Iterable[Point]) -> str:
    """The steps of a line through some points."""
    return "".join(f"{'L' if index else 'M'}{_number(x)} {_number(y)}" for index, (x, y) in enumerate(points))


def ticks(places: Iterable[float], top: float, length: float) -> str:
    """The steps of vertical strokes, of one height, at some places."""
    return "".join(f"M{_number(x)} {_number(top)}v{_number(length)}" for x in places)


def staircase(left: float, width: float, bottom: float, heights: Sequence[float]) -> str:
    """The steps of the outline of bars that stand side by side on a line."""
    if not len(heights):
        return ""
    steps, at = [f"M{_number(left)} {_number(bottom)}"], 0.0
    for height in heights:
        rise = round(height, 1) - at
        steps.append(f"{f'v{_number(-rise)}' if rise else ''}h{width:.2f}")
        at += rise
    return "".join((*steps, f"v{_number(at)}z"))


def _number(value: float) -> str:
    """A coordinate with one digit behind the point; what lies far outside of the picture is moved nearer."""
    text = f"{min(max(value, -_LARGEST), _LARGEST):.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


@dataclass(frozen=True, slots=True)
class Scale:
    """Where numbers lie along an axis.

    Attributes:
        low: the number at its start.
        high: the number at its end, above `low`.
        start: place of `low`.
        end: place of `high`.
        logarithmic: whether equal steps are equal ratios; then both ends are above 0.
    """

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """The place of a number; the nearer end where it lies outside."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    @property
    def ticks(self) -> list[float]:
        """Round numbers along the axis, two to six of them."""
        return _log_ticks(self.low, self.high) if self.logarithmic else _even_ticks(self.low, self.high)


def spanning(values: Iterable[float], start: float, end: float, logarithmic: bool = False) -> Scale:
    """A scale that some numbers fit on; only those above 0 count on a logarithmic one."""
    known = [min(max(value, -_FARTHEST), _FARTHEST) for value in values if not logarithmic or value > 0]
    low, high = min(known, default=1.0 if logarithmic else 0.0), max(known, default=1.0)
    size = max(abs(low), abs(high))
    if logarithmic:
        high = max(high, 1 / _FARTHEST)
        low = max(low, high * _NARROWEST)
        high = high if high > low * (1 + _NARROWEST) else 2 * low
    elif not high - low > max(size, 1 / _FARTHEST) * _NARROWEST:
        room = size if size > 1 / _FARTHEST else 1.0
        low, high = low - room / 2, high + room / 2
    return Scale(low, high, start, end, logarithmic)


def _even_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(powers) > 4 else (1, 2, 5)
    step = max(1, len(powers) // 5)
    found = [factor * 10.0**power for power in powers[::step] for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def tick_text(value: float) -> str:
    """A number at an axis."""
    return "0" if abs(value) < 1e-300 else f"{value:.4g}".replace("-", "\N{MINUS SIGN}")


def draw_axes(picture: Picture, across: Scale, up: Scale, label: str) -> None:
    """Draw grid lines with their numbers on both axes, and the words for the vertical one above."""
    for value in up.ticks:
        y = up.at(value)
        picture.path(line(((across.start, y), (across.end, y))), "grid")
        picture.text((across.start - 4, y + _TEXT_HEIGHT / 3), tick_text(value), "small", "end")
    draw_across(picture, across, (up.end, up.start))
    picture.text((4, up.end - 8), label, "strong")


def draw_across(picture: Picture, across: Scale, ends: Point) -> None:
    """Draw the numbers of the horizontal axis below, with vertical lines between two heights."""
    top, bottom = ends
    for value in across.ticks:
        x = across.at(value)
        picture.path(line(((x, top), (x, bottom))), "grid")
        picture.text((x, bottom + _TEXT_HEIGHT + 2), tick_text(value), "small", "middle")
