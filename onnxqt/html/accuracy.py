"""How accurate the run's models are: the verdict, and before and after per scheme."""

import math

from onnxqt.html.charts import ROW, Move, draw_moves
from onnxqt.html.form import MOST_ROWS, Block, Cell, Figures, Paragraph, Row, Section, Table, number, rows_within
from onnxqt.html.outcomes import decibel_of, share_name, share_of, snr_of
from onnxqt.html.source import Facts, Run
from onnxqt.html.svg import Picture
from onnxqt.html.text import NOTHING, SPACE, decibel, percent, plural, points, short, signed, whole

_WEIGHTS = {
    "checkpoint": "trained",
    "original": "original",
    "equalized": "equalized original",
    "rounded": "rounded original",
}


def verdict(run: Run) -> str:
    """The outcome of a run in one sentence."""
    share = share_name(run)
    judge, form = (snr_of, _decibels) if share is None else (share_of, _percents)
    word = "mean signal-to-noise ratio" if share is None else f"mean {share}"
    judged = [(name, judge(scheme.inner("trim")), judge(scheme.inner("ptq"))) for name, scheme in run.schemes]
    known = [(name, after, before) for name, after, before in judged if after is not None and before is not None]
    if not known:
        return f"The report does not say how accurate its files are ({plural(len(judged), 'scheme')})."
    after, before = sum(row[1] for row in known) / len(known), sum(row[2] for row in known) / len(known)
    reference = share_of(run.report.inner("float"))
    floating = "" if reference is None else f" and {form(reference)} in float"
    worst, least, least_before = min(known, key=lambda row: row[1])
    rest = f"; the worst of them, {short(worst)}, has {form(least)} against {form(least_before)}"
    which = plural(len(known), "scheme") if len(known) > 1 else f"the scheme {short(worst)}"
    checked = all(scheme.inner("self_check") for _, scheme in run.schemes)
    return (
        f"What was written for {which} has a {word} of {form(after)}, against {form(before)} for the original model "
        f"quantized without training{floating}{rest if len(known) > 1 else ''}"
        f"{'; each file passed its check against ONNX Runtime' if checked else ''}."
    )


def _percents(share: float) -> str:
    return f"{percent(share)}{SPACE}%"


def _decibels(ratio: float) -> str:
    return f"{decibel(ratio, None)}{SPACE}dB"


def schemes_section(run: Run) -> Section:
    """Before and after, per scheme."""
    share = share_name(run)
    baseline = any(scheme.inner("baseline") for _, scheme in run.schemes)
    shares = () if share is None else ("PTQ %", *(("better PTQ %",) if baseline else ()), "trim %", "gain, points")
    emulated = ("emulator dB",) if share is None else ("emulator %",)
    header = ("scheme", *shares, "PTQ dB", "trim dB", *emulated, "LSB", "made of")
    rows: list[Row] = []
    for name, scheme in run.schemes:
        before, better, after = (scheme.inner(key) for key in ("ptq", "baseline", "trim"))
        cells = [Cell(short(name))]
        if share is not None:
            cells += [number(percent(share_of(before)))]
            cells += [number(percent(share_of(better)))] if baseline else []
            cells += [
                number(percent(share_of(after))),
                number(points(_difference(share_of(after), share_of(before)), "+")),
            ]
        emulator = scheme.inner("emulator")
        cells += [number(decibel_of(before)), number(decibel_of(after))]
        cells += [number(decibel_of(emulator) if share is None else percent(share_of(emulator)))]
        cells += [number(whole(emulator.number("max_lsb"))), Cell(_made_of(scheme))]
        rows.append(cells)
    shown, more = rows_within(rows)
    blocks: list[Block] = [
        Paragraph(
            "PTQ is the original model quantized without training, trim the file that was written. dB is the "
            "signal-to-noise ratio of the output, with the original float model as the signal. The emulator runs the "
            "written file in integer arithmetic; LSB is how far its outputs are from those of ONNX Runtime at most."
        ),
        Paragraph(_samples_text(run)),
    ]
    if picture := _schemes_picture(run, share):
        blocks.append(picture)
    return Section(
        "schemes", "Before and after, per scheme", (*blocks, Table(f"Each scheme{more}", header, shown), _floats(run))
    )


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _made_of(scheme: Facts) -> str:
    weights = scheme.text("weights")
    return NOTHING if weights is None else _WEIGHTS.get(weights, short(weights))


def _samples_text(run: Run) -> str:
    evaluation = run.report.inner("data").inner("evaluation")
    count, share = evaluation.number("samples"), share_of(run.report.inner("float"))
    if not count:
        return "How many samples these figures are of is not in the report."
    text = f"All figures are of {whole(count)} evaluation {'sample' if count == 1 else 'samples'}"
    if evaluation.flag("held_out"):
        text += ", which training held out but which also chose the checkpoint: on others it may do a little worse"
    if share is not None and 0 <= share <= 1 <= count and share_name(run) == "top-1":
        error = 100 * math.sqrt(share * (1 - share) / count)
        text += f". The standard error of a single top-1 near {_percents(share)} is {error:.2f} points"
    return f"{text}."


def _floats(run: Run) -> Table:
    """The float models that all this is compared with."""
    share = share_name(run)
    rows = []
    for name, key in (("original", "float"), ("checkpoint", "checkpoint")):
        outcome = run.report.inner(key)
        shares = () if share is None else (number(percent(share_of(outcome))),)
        agreement = outcome.inner("fidelity").number("agreement")
        rows.append([Cell(name), *shares, number(decibel_of(outcome)), number(percent(agreement))])
    first = () if share is None else (f"{share} %",)
    return Table("The models in float", ("model", *first, "dB", "same class as the original %"), rows)


def _schemes_picture(run: Run, share: str | None) -> Figures | None:
    moves = []
    for name, scheme in run.schemes[:MOST_ROWS]:
        outcomes = [scheme.inner(key) for key in ("ptq", "trim", "baseline")]
        before, after, other = [snr_of(o) if share is None else _percent_of(o) for o in outcomes]
        if before is not None and after is not None:
            texts = (f"{value:.1f}" if share is None else f"{value:.2f}" for value in (before, after))
            moves.append(Move(name, before, after, signed(" \N{RIGHTWARDS ARROW} ".join(texts)), other))
    if not moves:
        return None
    unit, reference = ("dB", None) if share is None else (f"{share}, %", _percent_of(run.report.inner("float")))
    picture = Picture(
        "picture-schemes",
        ROW * len(moves) + 40,
        f"Before and after, per scheme ({unit})",
        f"{plural(len(moves), 'row')}, one for each scheme; the table has the same numbers.",
    )
    picture.text((4, 12), unit, "strong")
    draw_moves(picture, moves, 18, reference)
    others = " \N{WHITE DIAMOND} PTQ with the steps that were asked for." if any(m.other for m in moves) else ""
    dashed = " Upright stroke: the original in float." if reference is not None else ""
    return Figures([(picture, f"\N{WHITE CIRCLE} PTQ, \N{BLACK CIRCLE} trim.{others}{dashed}")])


def _percent_of(outcome: Facts) -> float | None:
    share = share_of(outcome)
    return None if share is None else 100 * share
