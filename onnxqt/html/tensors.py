"""Tensor by tensor: histograms with observed ranges, clips and grids."""

from collections.abc import Sequence

import numpy as np

from onnxqt.html.form import Block, Cell, Figures, Fold, Paragraph, Row, Section, Table, absent, number
from onnxqt.html.layers import ranked
from onnxqt.html.source import Run
from onnxqt.html.svg import WIDTH, Picture, Scale, draw_across, line, spanning, staircase, ticks
from onnxqt.html.text import digits, percent, plural, sentence, short
from onnxqt.numerics import Array
from onnxqt.table import Entry, Stats, View

MOST_TENSORS = 500  # that are shown
MOST_VIEWS = 12  # of a tensor
BARS = 80  # of a histogram
_ENDS = (8, WIDTH - 8)
_HEIGHT = 70  # of a histogram, in pixels
_ROW = 26  # pixels of an interval with its words
_MOST_TICKS = 33  # of a grid
_WIDEST = 32  # bits of a code; the grid of such a tensor, a bias, says nothing
_FEW = 2  # schemes that are named


def tensors_section(run: Run) -> Section:
    """Every tensor of the table: what was seen of it, where it is clipped, and its grid."""
    title = "Tensors: observed range, clip and grid"
    table = run.table
    if table is None:
        return Section("tensors", title, (absent("Ranges and grids", "They are in the table.json of a run."),))
    entries = [entry for entry in table.entries if entry.role != "bias"]
    order = {tensor: index for index, tensor in enumerate(ranked(run))}
    entries.sort(key=lambda entry: order.get(entry.name, len(order)))
    biases = len(table.entries) - len(entries)
    words = ", those with the lowest signal-to-noise ratio first" if order else ", in the order of the graph"
    blocks: list[Block] = [
        Paragraph(
            f"{plural(len(entries), 'tensor')}{words}; calibration saw {plural(table.samples, 'sample')}. Open one to "
            "see its histogram (heights are logarithmic) above its observed range and, for each way of quantizing "
            "it, the clip with the values of its grid. Of a weight with a scale per channel or block, the wide bar is "
            "the widest clip and the thick one the narrowest."
            + (
                f" {plural(biases, 'bias').replace('biass', 'biases')} have the product of two scales."
                if biases
                else ""
            )
        )
    ]
    shown, more = entries[:MOST_TENSORS], len(entries) - MOST_TENSORS
    blocks += [_tensor(f"tensor-{index}", entry) for index, entry in enumerate(shown)]
    if more > 0:
        blocks.append(Paragraph(f"{plural(more, 'more tensor')}: see table.json."))
    return Section("tensors", title, blocks)


def _tensor(name: str, entry: Entry) -> Fold:
    shape = "" if entry.shape is None else f" {'x'.join('?' if size is None else str(size) for size in entry.shape)}"
    seen = "" if entry.stats is None else f", {digits(entry.stats.min)} to {digits(entry.stats.max)}"
    summary = f"{short(entry.name)}: {entry.role}{shape}{seen}"
    views = [view for view in entry.views if view.params.grid.bits < _WIDEST][:MOST_VIEWS]
    blocks: list[Block] = []
    if entry.reason:
        blocks.append(Paragraph(f"Stays float: {sentence(entry.reason)}"))
    if entry.stats is not None or views:
        blocks.append(Figures([(_histogram(name, entry, views), _caption(entry.stats))]))
    if views:
        header = ("schemes", "bits", "scales", "scale", "zero point", "clip", "outside %")
        blocks.append(Table("Grids", header, [_view_row(view, entry.stats) for view in views]))
    return Fold(summary, blocks)


def _caption(stats: Stats | None) -> str:
    if stats is None:
        return "Nothing was observed of this tensor."
    unseen = "" if stats.counts is not None else "; no histogram is kept of constants"
    return f"{plural(stats.count, 'value')} from {digits(stats.min)} to {digits(stats.max)}{unseen}."


def _view_row(view: View, stats: Stats | None) -> Row:
    params, (low, high) = view.params, view.clip
    scales = plural(params.scale.size, "scale") if params.scale.ndim else "1 scale"
    return [
        Cell(_named(view.schemes)),
        number(f"{params.grid.bits} {'signed' if params.grid.signed else 'unsigned'}"),
        number(scales),
        number(_spread(params.scale)),
        number(_spread(params.zero_point)),
        number(f"{digits(float(np.min(low)))} to {digits(float(np.max(high)))}"),
        number(percent(_outside(view, stats))),
    ]


def _named(schemes: Sequence[str]) -> str:
    rest = len(schemes) - _FEW
    return ", ".join(map(short, schemes[:_FEW])) + (f" and {rest} more" if rest > 0 else "")


def _spread(values: Array) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return digits(low) if low == high else f"{digits(low)} to {digits(high)}"


def _outside(view: View, stats: Stats | None) -> float | None:
    """The share of the values in a histogram that lie outside of a clip, counted by the middles of its bins."""
    if stats is None or stats.counts is None or not stats.counts.any():
        return None
    (low, high), centres = view.clip, _centres(stats)
    within = (centres >= float(np.min(low))) & (centres <= float(np.max(high)))
    return float(stats.counts[~within].sum() / stats.counts.sum())


def _centres(stats: Stats) -> Array:
    """The middle of each bin of a histogram, float64."""
    size = 0 if stats.counts is None else stats.counts.size
    centres: Array = stats.limit * ((2 * np.arange(size) + 1) / max(size, 1) - 1)
    return centres


def _histogram(name: str, entry: Entry, views: Sequence[View]) -> Picture:
    stats = entry.stats
    observed = () if stats is None else (stats.min, stats.max)
    ends = [float(end) for view in views for end in (np.min(view.clip[0]), np.max(view.clip[1]))]
    scale = spanning([*observed, *ends], *_ENDS)
    drawn = stats is not None and stats.counts is not None and bool(stats.counts.any())
    top = 8 + (_HEIGHT if drawn else 0)
    height = top + 24 + _ROW * (len(views) + (stats is not None)) + 4
    picture = Picture(
        f"picture-{name}",
        height,
        f"Values and grids of {short(entry.name)}",
        f"{'A histogram, the' if drawn else 'The'} observed range and {plural(len(views), 'clip')}; the table has the "
        "numbers.",
    )
    draw_across(picture, scale, (8, top))
    if stats is not None and drawn:
        bars = heights(stats, scale.low, scale.high)
        width = (scale.end - scale.start) / len(bars)
        picture.path(staircase(scale.start, width, top, [_HEIGHT * bar for bar in bars]), "bar")
    y = top + 24.0
    if stats is not None:
        picture.text((_ENDS[0], y + 9), "observed", "small")
        _interval(picture, scale, (stats.min, stats.max), y + 18, "observed")
        y += _ROW
    for view in views:
        grid = view.params.grid
        picture.text((_ENDS[0], y + 9), f"{_named(view.schemes)}: {grid.bits} bits", "small")
        _draw_view(picture, scale, view, y + 18)
        y += _ROW
    return picture


def _interval(picture: Picture, scale: Scale, ends: tuple[float, float], y: float, look: str) -> None:
    picture.path(line(((scale.at(ends[0]), y), (scale.at(ends[1]), y))), look)


def _draw_view(picture: Picture, scale: Scale, view: View, y: float) -> None:
    """The clip as a bar; on it the values of the grid, or the narrowest of several clips."""
    low, high = view.clip
    _interval(picture, scale, (float(np.min(low)), float(np.max(high))), y, "clip")
    if view.params.scale.size == 1:
        picture.path(ticks(map(scale.at, grid_values(view)), y - 4, 8), "grid-values")
    else:
        _interval(picture, scale, (float(np.max(low)), float(np.min(high))), y, "narrowest")


def grid_values(view: View) -> list[float]:
    """Values that a grid of one scale can hold: all of them, or where they are many every 2nd, 4th ... and the last."""
    params = view.params
    grid, step = params.grid, 1
    while (grid.qmax - grid.qmin) / step >= _MOST_TICKS:
        step *= 2
    codes = [*range(grid.qmin, grid.qmax, step), grid.qmax]
    zero_point, scale = int(params.zero_point.ravel()[0]), float(params.scale.ravel()[0])
    return [(code - zero_point) * scale for code in codes]


def heights(stats: Stats, low: float, high: float) -> list[float]:
    """A histogram over [low, high] in at most `BARS` bars, as shares of the largest: log(1 + count)."""
    if stats.counts is None:
        return []
    width = stats.limit / stats.counts.size * 2
    bars = int(min(max((high - low) / width, 1), BARS)) if width > 0 else 1
    centres = np.clip(_centres(stats), low, high)
    counts, _ = np.histogram(centres, bins=bars, range=(low, high), weights=stats.counts)
    sizes = np.log1p(counts)
    return [float(size) for size in sizes / max(float(sizes.max()), 1e-300)]
