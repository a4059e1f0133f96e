"""Where a run came from: settings, samples, versions, hashes, and the command that repeats it."""

from collections.abc import Iterator
from typing import Any

from onnxqt.html.command import command_lines
from onnxqt.html.form import Block, Cell, Code, Fold, Paragraph, Row, Section, Table, number, rows_within
from onnxqt.html.source import Facts, Run
from onnxqt.html.text import NOTHING, sentence, short, whole

_DEEPEST = 8  # levels of settings


def provenance_section(run: Run) -> Section:
    """What to know to repeat the run."""
    report = run.report
    blocks: list[Block] = [
        Paragraph(
            "The command below repeats the run. Words in capitals stand for files that the report knows by their "
            "hash alone; settings that it does not have are left at their defaults."
        ),
        Code(command_lines(report)),
        _table("Inputs", ("what", "samples", "SHA-256"), _inputs(report)),
        _table("Files of the run", ("file", "SHA-256"), _pairs(report.inner("files").texts())),
        _table("Versions", ("what", "version"), _pairs(_versions(report))),
        Fold("All settings", [_table("Settings", ("setting", "value"), _settings(report))]),
    ]
    return Section("provenance", "Settings, versions, hashes", blocks)


def _table(caption: str, header: tuple[str, ...], rows: list[Row]) -> Table:
    shown, more = rows_within(rows)
    return Table(f"{caption}{more}", header, shown)


def _pairs(texts: dict[str, str]) -> list[Row]:
    return [[Cell(short(name)), Cell(short(text))] for name, text in texts.items()]


def _inputs(report: Facts) -> list[Row]:
    model, data = report.inner("model"), report.inner("data")
    rows: list[Row] = [[Cell("model"), number(""), Cell(short(model.text("sha256") or NOTHING))]]
    for name, samples in data.parts():
        digest = samples.text("sha256") or NOTHING
        rows.append([Cell(f"{short(name)} samples"), number(whole(samples.number("samples"))), Cell(short(digest))])
    return rows


def _versions(report: Facts) -> dict[str, str]:
    environment = report.inner("environment")
    opset, seconds = report.inner("model").number("opset"), report.number("seconds")
    system = {name: text for name in ("python", "system") if (text := environment.text(name)) is not None}
    return {
        **system,
        **environment.inner("packages").texts(),
        "opset of the model": whole(opset),
        "form of the report": report.text("schema_version") or NOTHING,
        "seconds of the run": whole(seconds),
    }


def _settings(report: Facts) -> list[Row]:
    """Every setting by its dotted name, preprocessing of images among them."""
    settings = dict(report.inner("settings").content)
    for name, samples in report.inner("data").parts():
        if samples.inner("preprocessing"):
            settings[f"preprocessing of {name}"] = samples.inner("preprocessing").content
    return [[Cell(short(name)), Cell(sentence(text))] for name, text in _flat(settings, "", _DEEPEST)]


def _flat(value: Any, name: str, levels: int) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and levels:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), levels - 1)
    elif isinstance(value, list):
        yield name, ", ".join(_text(item) for item in value) or "none"
    else:
        yield name, _text(value)


def _text(value: Any) -> str:
    if value is None or value == {}:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
