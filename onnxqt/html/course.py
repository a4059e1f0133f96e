"""How training went: its curves, its held-out losses, and what it did to the tails of the weights."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from onnxqt.html.charts import ROW, Move, draw_moves
from onnxqt.html.form import Block, Cell, Figures, Paragraph, Row, Section, Table, absent, number, rows_within
from onnxqt.html.source import Facts, Run
from onnxqt.html.svg import SHAPES, WIDTH, Picture, Scale, draw_across, draw_axes, line, spanning
from onnxqt.html.text import digits, percent, plural, sentence, short, whole
from onnxqt.numerics import Array
from onnxqt.pictures import DECADES, family_of, running_median

MOST_MOVES = 40  # rows of a picture
Drawn = tuple[Picture, str]  # with its caption

_LEFT, _RIGHT = 46, WIDTH - 8
_PANELS = (
    ("lambda", "lambda: 0 float, 1 quantized"),
    ("lr", "learning rate, share of a weight's size"),
    ("tau", "tau, mean clip, share of max|W|"),
)


def training_section(run: Run) -> Section:
    """Loss, lambda, learning rate and tau over the steps, and what was held out."""
    training, title = run.report.inner("training"), "Training"
    reason = training.text("reason")
    if not training.number("steps"):
        words = f"Nothing was trained: {sentence(reason or 'no steps were asked for')}."
        return Section("training", title, (Paragraph(words, "warning" if reason else ""),))
    blocks: list[Block] = [Paragraph(_course(training))]
    if diverged := training.text("diverged"):
        blocks.append(Paragraph(f"Training came to an early end: {sentence(diverged)}", "warning"))
    curves = training.inner("curves")
    held_out, table = _held_out(training)
    if pictures := [*_curves(curves, training.number("best_step")), *held_out]:
        blocks.append(Figures(pictures))
    else:
        blocks.append(absent("The course of the steps"))
    return Section("training", title, (*blocks, table))


def _course(training: Facts) -> str:
    best, steps = training.number("best_step"), training.number("steps")
    kept = (
        "the untouched model was best and was kept" if best == 0 else f"the weights after step {whole(best)} were kept"
    )
    early = ", and it was stopped early" if training.flag("stopped") else ""
    optimizer = short(training.text("optimizer") or "an optimizer")
    return (
        f"{whole(steps)} {'step' if steps == 1 else 'steps'} of {optimizer} in "
        f"{whole(training.number('seconds'))} s ({whole(training.number('step_ms_median'))} ms each); {kept}{early}."
    )


def _curves(curves: Facts, best: float | None) -> list[Drawn]:
    """A picture for each figure that the steps have."""
    steps = curves.numbers("step")
    known = {name: values for name, _ in (("loss", ""), *_PANELS) if (values := curves.numbers(name))}
    if not steps or "loss" not in known or any(len(values) != len(steps) for values in known.values()):
        return []
    across = spanning(steps, _LEFT, _RIGHT)
    marks = [] if best is None else [best]
    pictures: list[Drawn] = [(_loss_picture(across, steps, known["loss"], marks), _LOSS_CAPTION)]
    for name, label in _PANELS:
        if name in known:
            picture = _panel(f"picture-{name}", f"{label}, over the steps", known[name])
            up = spanning([0.0, *known[name]], 146, 26)
            _frame(picture, across, up, label, marks)
            picture.path(_through(across, up, steps, known[name]), "curve")
            pictures.append((picture, "Dashed line: the step whose weights were kept."))
    return pictures


_LOSS_CAPTION = (
    "Thin: loss of each step, which is that of the one scheme drawn for it; thick: running median. Logarithmic. Dashed "
    "line: the step whose weights were kept."
)


def _panel(name: str, title: str, values: Sequence[float]) -> Picture:
    shown = (
        f"From {digits(values[0])} to {digits(values[-1])}; least {digits(min(values))}, most {digits(max(values))}."
    )
    return Picture(name, 176, title, shown)


def _loss_picture(across: Scale, steps: Sequence[float], losses: Sequence[float], marks: Sequence[float]) -> Picture:
    picture = _panel("picture-loss", "Loss over the steps", losses)
    up = _loss_scale(losses)
    _frame(picture, across, up, "loss, logarithmic" if up.logarithmic else "loss", marks)
    picture.path(_through(across, up, steps, losses), "thin")
    medians: Array = running_median(np.array(losses, np.float64))
    picture.path(_through(across, up, steps, [float(value) for value in medians]), "curve")
    return picture


def _loss_scale(losses: Sequence[float]) -> Scale:
    """Logarithmic over at most three decades, where any loss is above 0."""
    top = max(losses, default=0.0)
    shown = [max(loss, top / 10**DECADES) for loss in losses if loss > 0]
    return spanning(shown or losses, 146, 26, logarithmic=bool(shown))


def _frame(picture: Picture, across: Scale, up: Scale, label: str, marks: Sequence[float]) -> None:
    draw_axes(picture, across, up, label)
    draw_across(picture, across, (up.end, up.start))
    for step in marks:
        x = across.at(step)
        picture.path(line(((x, up.end), (x, up.start))), "reference")


def _through(across: Scale, up: Scale, steps: Sequence[float], values: Sequence[float]) -> str:
    return line((across.at(x), up.at(y)) for x, y in zip(steps, values, strict=True))


def _held_out(training: Facts) -> tuple[list[Drawn], Block]:
    """The held-out losses, their means over the schemes of the same bits: pictures and a table."""
    evaluations = training.records("evaluations")
    if not evaluations:
        return [], absent("Held-out losses")
    families: dict[str, list[str]] = {}
    for regime in training.names("regimes"):
        families.setdefault(family_of(regime), []).append(regime)
    rows: list[Row] = []
    series: dict[str, list[tuple[float, float]]] = {family: [] for family in families}
    for evaluation in evaluations:
        losses = evaluation.inner("losses").known_numbers()
        step = evaluation.number("step") or 0.0
        cells = [Cell(f"{whole(step)}{', better than all before' if evaluation.flag('best') else ''}")]
        for family, members in families.items():
            found = [losses[name] for name in members if name in losses]
            mean = sum(found) / len(found) if found and len(found) == len(members) else None
            cells.append(number(digits(mean)))
            if mean is not None:
                series[family].append((step, mean))
        rows.append(cells)
    shown, more = rows_within(rows)
    table = Table(
        f"Held-out loss above the least possible, mean over the schemes of the same bits{more}",
        ("step", *(short(family, 40) for family in families)),
        shown,
    )
    return _held_out_picture(series), table


def _held_out_picture(series: dict[str, list[tuple[float, float]]]) -> list[Drawn]:
    values = [value for points in series.values() for _, value in points]
    steps = [step for points in series.values() for step, _ in points]
    if not values:
        return []
    across, up = spanning(steps, _LEFT, _RIGHT), _loss_scale(values)
    picture = Picture(
        "picture-held-out",
        176,
        "Held-out losses over the steps",
        f"{plural(len(series), 'curve')}, one for the schemes of the same bits; the table has the same numbers.",
    )
    _frame(picture, across, up, "held-out loss, logarithmic" if up.logarithmic else "held-out loss", ())
    words = []
    for index, (family, points) in enumerate(series.items()):
        shape, look = SHAPES[index % len(SHAPES)], ("before", "after")[index // len(SHAPES) % 2]
        picture.path(line((across.at(x), up.at(y)) for x, y in points), "thin")
        for x, y in points:
            picture.mark((across.at(x), up.at(y)), shape, look)
        words.append(f"{short(family, 40)}: {'full ' if look == 'after' else ''}{shape}")
    return [(picture, "; ".join(words) + ".")]


# --- weight tails ---------------------------------------------------------------------------------------

_TAILS: tuple[tuple[str, Callable[[Facts], float | None]], ...] = (
    ("max|W|", lambda tails: tails.number("largest")),
    ("0.999 quantile of |W|", lambda tails: tails.inner("quantiles").number("0.999")),
    ("excess kurtosis", lambda tails: tails.number("kurtosis")),
)


def tails_section(run: Run) -> Section:
    """The extreme values of the weights before and after reverse pruning and training."""
    title, training = "Tails of the weights", run.report.inner("training")
    tails = [(name, pair.inner("before"), pair.inner("after")) for name, pair in training.inner("tails").parts()]
    if not tails:
        return Section("tails", title, (absent("Tails of the weights"),))
    tails.sort(key=lambda row: -_length(row[1]))
    rows: list[Row] = []
    for name, before, after in tails:
        cells = [number(digits(value(found))) for _, value in _TAILS for found in (before, after)]
        rows.append([Cell(short(name)), *cells, number(percent(before.number("clipped")))])
    shown, more = rows_within(rows)
    table = Table(
        f"Longest tails first{more}",
        ("weight", *("before", "after") * len(_TAILS), "%"),
        shown,
        [*((words, 2) for words, _ in _TAILS), ("clipped", 1)],
    )
    text = (
        "Reverse pruning clips the largest weights, a few of which set the scale of all. The length of a tail is "
        "max|W| over the 0.999 quantile of |W|; excess kurtosis is 0 for a normal distribution."
    )
    return Section("tails", title, (Paragraph(text), *_tails_picture(tails), table))


def _length(tails: Facts) -> float:
    largest, bulk = tails.number("largest") or 0.0, tails.inner("quantiles").number("0.999") or 0.0
    return largest / bulk if bulk > 0 else (math.inf if largest > 0 else 1.0)


def _tails_picture(tails: Sequence[tuple[str, Facts, Facts]]) -> list[Block]:
    moves = []
    for name, *pair in tails[:MOST_MOVES]:
        before, after = map(_length, pair)
        if math.isfinite(before) and math.isfinite(after):
            moves.append(Move(name, before, after, f"{before:.2f} \N{RIGHTWARDS ARROW} {after:.2f}"))
    if not moves:
        return []
    picture = Picture(
        "picture-tails",
        ROW * len(moves) + 40,
        "Length of the tails before and after",
        f"{plural(len(moves), 'row')}, one for each weight, the longest first; the table has the numbers behind them.",
    )
    picture.text((4, 12), "max|W| / 0.999 quantile", "strong")
    draw_moves(picture, moves, 18)
    rest = len(tails) - len(moves)
    more = f" {plural(rest, 'weight')} with shorter tails are not drawn." if rest else ""
    return [Figures([(picture, f"\N{WHITE CIRCLE} before, \N{BLACK CIRCLE} after.{more}")])]
