"""Layer by layer: signal-to-noise ratios and sensitivities, the worst first."""

from collections.abc import Mapping, Sequence

from onnxqt.html.form import Block, Cell, Figures, Heading, Paragraph, Row, Section, Table, absent, number, rows_within
from onnxqt.html.source import Facts, Run
from onnxqt.html.svg import Picture, draw_across, spanning
from onnxqt.html.text import decibel, digits, plural, short

MOST_BARS = 30  # rows of a picture
_ROW = 26  # pixels of a bar with its words

Values = Mapping[str, float]  # by tensor


def layers_section(run: Run) -> Section:
    """Signal-to-noise ratio and sensitivity of each layer, the worst first."""
    ratios = {name: _ratios(scheme.records("layers")) for name, scheme in run.schemes}
    errors = {name: scheme.inner("sensitivity").known_numbers() for name, scheme in run.schemes}
    blocks: list[Block] = [Heading("Signal-to-noise ratio of each tensor")]
    if any(ratios.values()):
        blocks += [_bars(ratios), _by_scheme("Signal-to-noise ratio, dB, lowest first", ratios, lowest=True)]
    else:
        blocks.append(absent("The signal-to-noise ratio of each tensor"))
    blocks.append(Heading("Sensitivity of each weight"))
    if any(errors.values()):
        blocks.append(
            Paragraph("Squared error of the outputs, relative to their power, with this weight alone quantized.")
        )
        blocks.append(_by_scheme("Sensitivity, highest first", errors, lowest=False))
    else:
        blocks.append(absent("The sensitivity of each weight"))
    return Section("layers", "Layers, worst first", (*blocks, *_worst_layers(run)))


def ranked(run: Run) -> list[str]:
    """Tensors by their lowest signal-to-noise ratio under any scheme, the lowest first; empty if none was measured."""
    return _worst_first({name: _ratios(scheme.records("layers")) for name, scheme in run.schemes}, lowest=True)


def _ratios(layers: Sequence[Facts]) -> Values:
    found = [(layer.text("tensor"), layer.number("snr_db")) for layer in layers]
    return {tensor: ratio for tensor, ratio in found if tensor is not None and ratio is not None}


def _worst_first(found: Mapping[str, Values], lowest: bool) -> list[str]:
    """Tensors by their worst value under any scheme."""
    worst: dict[str, float] = {}
    for values in found.values():
        for tensor, value in values.items():
            known = worst.get(tensor, value)
            worst[tensor] = min(known, value) if lowest else max(known, value)
    return sorted(worst, key=lambda tensor: worst[tensor] if lowest else -worst[tensor])


def _by_scheme(caption: str, found: Mapping[str, Values], lowest: bool) -> Table:
    schemes = [scheme for scheme, values in found.items() if values]
    rows: list[Row] = []
    for tensor in _worst_first(found, lowest):
        values = [found[scheme].get(tensor) for scheme in schemes]
        texts = [decibel(value, None) if lowest else digits(value) for value in values]
        rows.append([Cell(short(tensor)), *map(number, texts)])
    shown, more = rows_within(rows)
    return Table(f"{caption}{more}", ("tensor", *map(short, schemes)), shown)


def _bars(found: Mapping[str, Values]) -> Figures:
    """The worst tensors under the scheme that has the worst of all."""
    scheme = min((name for name in found if found[name]), key=lambda name: min(found[name].values()))
    values = found[scheme]
    tensors = sorted(values, key=lambda tensor: values[tensor])[:MOST_BARS]
    picture = Picture(
        "picture-layers",
        _ROW * len(tensors) + 40,
        f"Worst tensors under {short(scheme)}",
        f"{plural(len(tensors), 'bar')}, the shortest first; the table has the same numbers.",
    )
    scale = spanning([0.0, *(values[tensor] for tensor in tensors)], 12, 348)
    picture.text((4, 12), "dB", "strong")
    draw_across(picture, scale, (18, 18 + _ROW * len(tensors)))
    for index, tensor in enumerate(tensors):
        y = 18 + _ROW * index
        picture.text((4, y + 11), short(tensor, 52), "small")
        picture.text((356, y + 11), decibel(values[tensor], None), "small", "end")
        start, end = sorted((scale.at(0), scale.at(values[tensor])))
        picture.rectangle((start, y + 15), (max(end - start, 1), 7), "bar")
    return Figures([(picture, f"The lowest ratios under {short(scheme)}, in dB.")])


def _worst_layers(run: Run) -> list[Block]:
    """The layer farthest from the float model on each back end, for the last model at the first precision."""
    models = [model.text("name") for model in run.matrix.records("models")]
    firsts = {p.text("name"): (p.names("columns") or [""])[0] for p in run.matrix.records("profiles")}
    rows: list[tuple[float, Row]] = []
    for cell in run.matrix.records("cells"):
        worst = cell.inner("result").inner("worst_layer")
        ratio, profile, column = worst.number("snr_db"), cell.text("profile"), cell.text("column")
        if ratio is not None and cell.text("model") == models[-1] and firsts.get(profile) == column:
            names = (short(profile or ""), short(column or ""), short(worst.text("tensor") or ""))
            rows.append((ratio, [*map(Cell, names), number(decibel(ratio, None))]))
    if not rows:
        return []
    rows.sort(key=lambda row: row[0])
    shown, more = rows_within([row for _, row in rows])
    caption = f"Of {short(models[-1] or '')}: the layer farthest from the float model{more}"
    return [Heading("On the back ends"), Table(caption, ("back end", "precision", "tensor", "dB"), shown)]
