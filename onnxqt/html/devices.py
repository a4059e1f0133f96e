"""Speed, energy and price on edge devices."""

from collections.abc import Sequence

from onnxqt.html.form import Block, Cell, Heading, Notes, Paragraph, Row, Section, Table, absent, number, rows_within
from onnxqt.html.source import Facts, Run
from onnxqt.html.text import NOTHING, digits, percent, sentence, short, whole


def devices_section(run: Run) -> Section:
    """Speed, energy and price on edge devices, each figure with its source."""
    title = "Edge devices: modelled speed, energy and price"
    estimates = run.cost.records("estimates")
    if not estimates:
        remedy = "'onnxqt cost MODEL --json > RUN/cost.json' models it; then write the page anew."
        return Section("devices", title, (absent("Speed, energy and price on devices", remedy),))
    notes: dict[str, int] = {}
    for found in estimates:
        for text in found.names("sources"):
            notes.setdefault(text, len(notes) + 1)
    load = run.cost.inner("workload")
    blocks: list[Block] = [
        Paragraph(
            f"Everything in this table is modelled from published figures, nothing was measured on a device: "
            f"{whole(load.number('macs'))} multiply-accumulates per sample, {whole(load.number('weight_bytes'))} bytes "
            f"of weights of {whole(load.number('weight_bits'))} bits, batch {whole(run.cost.number('batch'))}. Where "
            "the basis is an upper bound, throughput is at most, latency and board energy at least what is shown."
        ),
        _estimates(estimates, notes),
        Heading("Sources"),
        Notes(list(map(sentence, notes))),
    ]
    return Section("devices", title, (*blocks, *_measured(run.cost)))


def _estimates(estimates: Sequence[Facts], notes: dict[str, int]) -> Table:
    columns = (
        ("latency_s", 1e3, "latency ms, modelled"),
        ("throughput_hz", 1.0, "samples/s, modelled"),
        ("energy_j", 1e3, "energy mJ, modelled"),
        ("board_energy_j", 1e3, "board mJ, modelled"),
        ("price_usd", 1.0, "price USD"),
    )
    rows: list[Row] = []
    for found in estimates:
        values = [(found.number(key), factor) for key, factor, _ in columns]
        rows.append(
            [
                Cell(short(found.text("device") or NOTHING), detail=short(found.text("basis") or "")),
                *(number(digits(None if value is None else factor * value)) for value, factor in values),
                number(percent(found.number("integer_share_of_macs"))),
                Cell(_ranges([notes[text] for text in found.names("sources")])),
            ]
        )
    shown, more = rows_within(rows)
    header = ("device", *(words for *_, words in columns), "integer MACs %, modelled", "sources")
    return Table(f"Modelled, not measured{more}", header, shown)


def _measured(cost: Facts) -> list[Block]:
    """What was timed on the machine itself."""
    rows: list[Row] = []
    for found in cost.records("measured"):
        latency, speed = found.number("latency_s"), found.number("throughput_hz")
        figures = (None if latency is None else 1e3 * latency, speed, found.number("times_as_fast"))
        rows.append(
            [
                Cell(short(found.text("name") or NOTHING), detail=short(found.text("processor") or "")),
                *map(number, map(digits, figures)),
            ]
        )
    header = ("model", "latency ms, measured", "samples/s, measured", "times as fast")
    return [Table("Measured in ONNX Runtime on the processor named", header, rows)] if rows else []


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers, those in a row as a range: 1-3, 7."""
    runs: list[list[int]] = []
    for value in sorted(set(numbers)):
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
