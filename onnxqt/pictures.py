"""Pictures of a training run: its curves, and the tails of its weights.

The files are SVG, or PNG where the path says so; the same data gives the same bytes. Matplotlib is imported when
something is drawn, not before: importing it takes longer than most commands.
"""

import io
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import Array
from onnxqt.trim.prune import Tails

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAINING_PICTURE = "training.svg"
TAILS_PICTURE = "tails.svg"

MOST_WEIGHTS = 40
DECADES = 3  # of the loss that are shown, below its largest value
_WINDOW = 50  # a running median spans this part of a run
_LONGEST = 44  # characters of a name
_MARKERS = "osD^vPX*<>pH"
_DARK, _LIGHT = "black", "0.72"
_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "onnxqt",  # else ids are random
    "svg.fonttype": "none",  # text stays text: smaller, and can be searched
    "font.size": 9.0,
    "axes.labelsize": 8.0,
    "axes.grid": True,
    "grid.color": "0.9",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

Report = dict[str, Any]
Pair = tuple[Tails, Tails]

# Panels under the loss: field of a step's report, label of the axis.
_CURVES = (
    ("blend", "lambda\n(0 float, 1 quantized)"),
    ("lr", "learning rate\n(share of a weight's size)"),
    ("tau", "tau, mean clip\n(share of max|W|)"),
)
# Panels of the tails: title, value of a weight's tails.
_PROPERTIES: tuple[tuple[str, Callable[[Tails], float]], ...] = (
    ("max|W|", lambda tails: tails.largest),
    ("p = 0.999 quantile of |W|", lambda tails: tails.quantiles["0.999"]),
    ("excess kurtosis (normal: 0)", lambda tails: tails.kurtosis),
)


def draw_training(history: Iterable[Report], regimes: Sequence[str], path: Path) -> None:
    """Draw a run over its steps: loss, lambda, learning rate, and the mean clip where the reports have it.

    The held-out losses are means over the regimes of a family, such as w4a8, at lambda = 1 and above the least
    possible loss; the loss of a step is that of one regime, at the step's lambda.

    Args:
        history: the reports of the training process.
        regimes: names of the regimes, in the order of the reports' losses.
        path: the file to write; its suffix is the format, .svg or .png.

    Raises:
        ExportError: if the file cannot be written.
    """
    reports = list(history)
    steps = [report for report in reports if report["event"] == "step"]
    panels = [(field, label) for field, label in _CURVES if any(field in report for report in steps)]

    def draw(figure: "Figure") -> None:
        figure.set_size_inches(9, 3.6 + 1.7 * len(panels))
        heights = [2.2, *(1 for _ in panels)]
        top, *rest = every = figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        _draw_losses(top, steps, family_losses(reports, regimes))
        for axes, (field, label) in zip(rest, panels, strict=True):
            x, y = _column([report for report in steps if field in report], field)
            axes.plot(x, y, color=_DARK, linewidth=1.2)
            axes.set_ylabel(label)
        for axes in every:
            _mark_events(axes, reports, steps, named=axes is top)
        every[-1].set_xlabel("step")
        top.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0)
        figure.align_ylabels()

    _write(path, draw)


def _draw_losses(axes: "Axes", steps: Sequence[Report], held_out: Mapping[str, tuple[Array, Array]]) -> None:
    x, y = _column(steps, "loss")
    shown = np.concatenate([y, *(losses for _, losses in held_out.values())])
    shown = shown[np.isfinite(shown)]
    top = float(shown.max(initial=0.0))
    bottom = max(float(shown[shown > 0].min(initial=top)), top / 10**DECADES)
    axes.plot(x, y, color=_LIGHT, linewidth=0.6, label="step")
    axes.plot(x, running_median(y), color=_DARK, linewidth=1.4, label="step, median")
    for number, (family, (at, losses)) in enumerate(held_out.items()):
        axes.plot(
            at,
            np.maximum(losses, bottom),  # what lies below the axis is drawn on its edge
            linestyle="none",
            marker=_MARKERS[number % len(_MARKERS)],
            markersize=5,
            markerfacecolor=("white", "0.4")[number % 2],
            markeredgecolor=_DARK,
            markeredgewidth=0.8,
            clip_on=False,
            zorder=3,
            label=f"held out, {family}",
        )
    if bottom > 0:
        axes.set_yscale("log")
        axes.set_ylim(bottom=bottom, top=max(top, 1.01 * bottom) * 1.2)
    axes.set_ylabel("loss\n(log scale)" if bottom > 0 else "loss")


def family_losses(reports: Iterable[Report], regimes: Sequence[str]) -> dict[str, tuple[Array, Array]]:
    """Where held-out losses were measured, step 0 being before training, and their mean over each family of regimes."""
    rows = [report for report in reports if report["event"] in ("start", "evaluate")]
    members: dict[str, list[int]] = {}
    for index, name in enumerate(regimes if rows else ()):
        members.setdefault(family_of(name), []).append(index)
    at = np.array([row.get("step", 0) for row in rows], np.float64)
    losses = np.array([row["losses"] for row in rows], np.float64)
    return {family: (at, losses[:, indices].mean(axis=1)) for family, indices in members.items()}


def family_of(regime: str) -> str:
    """w4a8 for the scheme w4a8-sym-pt, the back end for BACK_END/PRECISION."""
    backend, slash, _ = regime.partition("/")
    return backend if slash else regime.partition("-")[0]


def running_median(values: Array) -> Array:
    """The median of a window around each value: a fiftieth of all but at least five, fewer at the ends."""
    half = max(2, len(values) // _WINDOW // 2)
    medians: Array = np.array([np.median(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])
    return medians


def _mark_events(axes: "Axes", reports: Iterable[Report], steps: Sequence[Report], named: bool) -> None:
    """Vertical lines: where lambda leaves 0 and reaches 1, and which step was kept."""
    rising = [step["step"] for step in steps if step["blend"] > 0][:1]
    full = [step["step"] for step in steps if step["blend"] == 1][:1]
    for step in {*rising, *full}:
        axes.axvline(step, color="0.5", linestyle=":", linewidth=1)
    best = [report["step"] for report in reports if report["event"] == "evaluate" and report["best"]][-1:]
    for step in best:
        axes.axvline(step, color=_DARK, linestyle="--", linewidth=1, label="checkpoint" if named else None)


def _column(steps: Sequence[Report], field: str) -> tuple[Array, Array]:
    return np.array([step["step"] for step in steps], float), np.array([step[field] for step in steps], float)


def draw_tails(tails: Mapping[str, Pair], path: Path) -> None:
    """Draw the extreme values of each weight before and after, those with the longest tails first, at most 40.

    Args:
        tails: of each weight, before and after.
        path: the file to write; its suffix is the format, .svg or .png.

    Raises:
        ExportError: if the file cannot be written.
    """
    names = worst_first(tails)[:MOST_WEIGHTS]

    def draw(figure: "Figure") -> None:
        figure.set_size_inches(11, 1.6 + 0.22 * max(len(names), 4))
        (row,) = figure.subplots(1, len(_PROPERTIES), sharey=True, squeeze=False)
        for axes, (title, value) in zip(row, _PROPERTIES, strict=True):
            before, after = (np.array([value(tails[name][i]) for name in names], np.float64) for i in (0, 1))
            _draw_moves(axes, before, after)
            axes.set_title(title, fontsize=9)
        labels = [_label(name, tails[name][0].clipped) for name in names]
        row[0].set_yticks(range(len(names)), labels, fontsize=7, parse_math=False)  # a $ is a $
        row[0].set_ylim(max(len(names), 1) - 0.5, -0.5)
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
        more = len(tails) - len(names)
        rest = f"; {more} more with shorter tails are not shown" if more else ""
        figure.suptitle(f"Tails of the weights, longest (max|W| / quantile) first{rest}", fontsize=10)

    _write(path, draw)


def worst_first(tails: Mapping[str, Pair]) -> list[str]:
    """The weights by the length of their tails before training, the longest first."""
    return sorted(tails, key=lambda name: -tail_length(tails[name][0]))


def tail_length(tails: Tails) -> float:
    """How far the largest value is from the bulk: max |W| / quantile of |W| at 0.999; 1 for a weight of zeros."""
    bulk = tails.quantiles["0.999"]
    if bulk > 0:
        return tails.largest / bulk
    return float("inf") if tails.largest > 0 else 1.0


def _draw_moves(axes: "Axes", before: Array, after: Array) -> None:
    """A row for each weight: a hollow mark before, a full one after, a line between them."""
    rows = np.arange(len(before))
    axes.hlines(rows, before, after, color=_LIGHT, linewidth=1.5, zorder=1)
    axes.plot(before, rows, "o", markersize=5, markerfacecolor="white", markeredgecolor=_DARK, label="before")
    axes.plot(after, rows, "o", markersize=3.5, color=_DARK, label="after")
    values = np.concatenate([before, after])
    largest = float(np.abs(values).max(initial=0.0))
    if values.min(initial=1.0) > 0:
        if largest > 10 * values.min(initial=largest):
            axes.set_xscale("log")
    elif largest > 10:
        axes.set_xscale("symlog", linthresh=1.0)


def _label(name: str, clipped: float) -> str:
    """A name short enough to be shown, in characters that every font has."""
    name = ascii(name)[1:-1]
    if len(name) > _LONGEST:
        half = (_LONGEST - 3) // 2
        name = f"{name[:half]}...{name[-half:]}"
    return f"{name}  ({clipped:.2%} clipped)" if clipped else name


def _write(path: Path, draw: Callable[["Figure"], None]) -> None:
    """Draw into a figure of its own, under settings of its own, and write it under a temporary name first."""
    import matplotlib
    from matplotlib.figure import Figure

    kind = path.suffix[1:]
    buffer = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(layout="constrained")
        draw(figure)
        facts = {"Date": None, "Creator": "onnxqt"} if kind == "svg" else {"Software": "onnxqt"}
        figure.savefig(buffer, format=kind, metadata=facts, dpi=110)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(buffer.getvalue())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ExportError(f"cannot write '{path}' ({error.strerror}): choose another --out") from error
