"""What devices are modelled to need, and what was measured, for people."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console

from onnxqt.cli.output import print_table
from onnxqt.cost import Estimate, Measured, Workload
from onnxqt.runtime import TRAINER, installed

_SECONDARY = "(2)"  # as `onnxqt.devices` marks it
WIDE = 150  # characters of a terminal that the table fits in; it is printed in two parts on narrower ones


@dataclass(frozen=True)
class Timing:
    """A model that was timed.

    Attributes:
        name: of its file.
        sha256: of its file.
        measured: how fast it is.
        times_as_fast: latency of the float model over its latency.
    """

    name: str
    sha256: str
    measured: Measured
    times_as_fast: float

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        own = {"name": self.name, "sha256": self.sha256, "times_as_fast": self.times_as_fast}
        return {**own, **self.measured.as_json()}


def print_cost(
    name: str, load: Workload, estimates: Sequence[Estimate], timed: Sequence[Timing], data: str | None
) -> None:
    """The page.

    Args:
        name: of the model's file.
        load: what was estimated.
        estimates: of each device.
        timed: what was measured, the float model first.
        data: where the samples are from that it was measured on; None for random numbers.
    """
    notes: dict[str, int] = {}
    for found in estimates:
        for text in found.sources:
            notes.setdefault(text, len(notes) + 1)
    width = Console().width
    click.echo(
        f"{name}: {load.macs:,} MACs per sample, {load.weight_bytes:,} bytes of weights, w{load.weight_bits}"
        f"a{load.activation_bits}, {load.network_class}"
    )
    click.echo(f"modelled, not measured; batch {estimates[0].batch}, energy and MACs per sample")
    numbers: _Column = ("notes", lambda found: _ranges([notes[text] for text in found.sources]))
    rest = (*_REST, numbers)
    for part in ((*_SPEED, *rest),) if width >= WIDE else (_SPEED, rest):
        header = ("device", *(heading for heading, _ in part))
        print_table("", [header, *((found.device, *(cell(found) for _, cell in part)) for found in estimates)])
        click.echo()
    for line in load.unknown:
        _print_note("not counted:", line, width)
    for text, number in notes.items():
        _print_note(f"[{number}]", text, width)
    if any(_SECONDARY in text for text in notes):
        click.echo(f"{_SECONDARY}: a secondary source, someone other than the maker")
    if any(_is_bound(found) for found in estimates):
        click.echo("<, >: bounds, as the rate is the published peak and no real network reaches it")
    if timed:
        click.echo()
        _print_measured(timed, data)


def _print_measured(timed: Sequence[Timing], data: str | None) -> None:
    first = timed[0].measured
    version = installed(TRAINER) or installed("onnxruntime")
    what = f"samples of {data}" if data else "random numbers"
    click.echo(
        f"measured on this machine: {first.processor}, {first.processors} logical processors, ONNX Runtime {version}, "
        f"batch {first.batch}, {what}"
    )
    header = ("model", "measured\nlatency ms", "measured\n10 to 90 %", "measured\nsamples/s", "runs", "times as\nfast")
    rows = [
        (
            timing.name,
            _digits(1e3 * timing.measured.latency_s),
            f"{_digits(1e3 * timing.measured.p10_s)} to {_digits(1e3 * timing.measured.p90_s)}",
            _digits(timing.measured.throughput_hz),
            f"{timing.measured.runs:,}",
            f"{timing.times_as_fast:.2f}",
        )
        for timing in timed
    ]
    print_table("", [header, *rows])


def _print_note(label: str, text: str, width: int) -> None:
    """A note, its further lines below its text."""
    click.echo(textwrap.fill(text, width, initial_indent=f"{label} ", subsequent_indent=" " * (len(label) + 1)))


def _digits(value: float | None) -> str:
    """Three digits, or all before the point; millions from one million on."""
    if value is None:
        return "-"
    if value >= 1e6:
        return f"{_digits(value / 1e6)} M"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _is_bound(found: Estimate) -> bool:
    """Whether throughput is at most what is modelled: without measurements of the device."""
    return found.basis == "upper bound"


def _at_most(found: Estimate, value: float | None) -> str:
    return f"{'< ' if _is_bound(found) and value is not None else ''}{_digits(value)}"


def _at_least(found: Estimate, value: float | None) -> str:
    return f"{'> ' if _is_bound(found) and value is not None else ''}{_digits(_milli(value))}"


def _band(found: Estimate) -> str:
    """Where 80 % of the networks lie that the rates were not fitted on."""
    band = found.throughput_band_hz
    return "-" if band is None else f"{_digits(band[0])} to {_digits(band[1])}"


def _milli(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers, those in a row as a range: 1-3 7."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


_Column = tuple[str, Callable[[Estimate], str]]
_SPEED: tuple[_Column, ...] = (
    ("modelled\nlatency ms", lambda found: _at_least(found, found.latency_s)),
    ("modelled\nsamples/s", lambda found: _at_most(found, found.throughput_hz)),
    ("modelled\n80 % band", _band),
    ("modelled\nbound by", lambda found: found.bound_by),
    ("basis", lambda found: found.basis),
)
_REST: tuple[_Column, ...] = (
    ("modelled\nenergy mJ", lambda found: _digits(_milli(found.energy_j))),
    ("modelled\nboard mJ", lambda found: _at_least(found, found.board_energy_j)),
    ("price\nUSD", lambda found: _digits(found.price_usd)),
    ("modelled\ninteger\nMACs %", lambda found: f"{100 * found.integer_share_of_macs:.1f}"),
    ("modelled\nboundaries", lambda found: str(found.boundaries)),
)
