"""The command that says what to change in the quantization of a model: advise."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from onnxqt.advice import (
    LEAST_GAIN,
    AdviceSettings,
    Advised,
    Bench,
    Effort,
    LayerCost,
    Quality,
    TensorCost,
    advised_json,
    effort,
    open_bench,
)
from onnxqt.advice import (
    advise as find_advice,
)
from onnxqt.cli.options import DATA, JSON, MODEL, OVERRIDES, PREPROCESS, RANGES, STRIP_QDQ, opened, options
from onnxqt.cli.output import print_json, print_table
from onnxqt.cli.progress import Bar
from onnxqt.cli.writing import overrides_text
from onnxqt.errors import UsageError
from onnxqt.files import make_folder, write_bytes
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.overrides import Overrides, read_overrides
from onnxqt.schemes import parse_scheme

DEFAULT_SCHEME = "w8a8-sym-pc"
_SPREAD = 1.0  # decibels that all advice gains together, under which no few tensors are to blame


@click.command()
@click.argument("model", type=MODEL)
@options(DATA, PREPROCESS)
@click.option("--scheme", metavar="ID", default=DEFAULT_SCHEME, show_default=True, help="What to quantize to.")
@options(OVERRIDES, RANGES)
@click.option(
    "--out", type=MODEL, help="Write the advice as a TOML or JSON file, which --overrides of trim and export takes."
)
@click.option("--top", type=int, default=5, show_default=True, help="Pieces of advice, and rows of a table.")
@click.option("--samples", type=int, default=64, show_default=True, help="Held-out samples to measure on, at most.")
@click.option("--models", type=int, default=400, show_default=True, help="Quantized models to run, at most.")
@options(STRIP_QDQ, JSON)
def advise(
    model: Path,
    data: Path,
    preprocess: str | None,
    scheme: str,
    overrides: Path | None,
    out: Path | None,
    as_json: bool,
    **rest: Any,
) -> None:
    """Find the few changes that bring the quantized MODEL closest to the float one, and measure what each gains.

    Every layer and tensor is quantized alone, and every layer left in float alone. Then the change that gains most is
    taken, and the next is measured on top of it. A cheaper kind of change is preferred if it reaches half the gain:
    other ranges or weights, one scale per channel, wider codes, float. Nothing is trained.

    \b
    Examples:
        onnxqt advise model.onnx --data calib/ --scheme w4a8-sym-pc --out overrides.toml
        onnxqt export model.onnx --data calib/ --scheme w4a8-sym-pc --overrides overrides.toml
    """
    strip_qdq, ranges = rest.pop("strip_qdq"), rest.pop("ranges")
    given = Overrides() if overrides is None else read_overrides(overrides)
    settings = AdviceSettings(parse_scheme(scheme), ranges, given, **rest)
    ingested = ingest(model, strip_qdq)
    with opened(data, preprocess, input_specs(ingested)) as samples, Bar() as bar:
        if out is not None:
            _check_file(out)
        bench = open_bench(ingested, samples, settings, bar.stage)
        ahead = effort(bench)
        click.echo(_ahead(bench, ahead), err=True)
        bar.stage("measure", ahead.models + 1)
        found = find_advice(bench, bar.advance)
    if out is not None:
        write_bytes(out, _file(found, str(settings.scheme), out.suffix.lower()).encode())
    if as_json:
        print_json(advised_json(bench, found))
        return
    _print(found, model.name, settings)
    if out is not None:
        click.echo(f"wrote {out}")


def _check_file(out: Path) -> None:
    """Make sure that a file can be written before anything is measured."""
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder: give the name of a file, such as {out / 'overrides.toml'}")
    make_folder(out.parent)


def _ahead(bench: Bench, ahead: Effort) -> str:
    """What is going to be done, and how long it may take."""
    seconds = ahead.seconds
    time = f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
    text = f"runs at most {ahead.models} quantized models on {bench.samples} samples: about {time}"
    if ahead.left_out:
        text += f"; {ahead.left_out} layers with the least errors of their own are left out, more --models take them in"
    return text


def _file(found: Advised, scheme: str, suffix: str) -> str:
    """The overrides, as JSON or as TOML after comments that say where they come from."""
    if suffix == ".json":
        return json.dumps({"overrides": found.overrides.as_json()}, indent=1) + "\n"
    lines = [
        f"found by 'onnxqt advise' for {scheme}: {found.baseline.snr_db:.1f} dB without, {_snr(found.quality)} with"
    ]
    for item in found.advice:
        how = f" [option {item.option}]" if item.option else ""
        lines.append(f"{item.gain_db:+.1f} dB: {item.text}{how}: {item.reason}")
    return "".join(f"# {_one_line(line)}\n" for line in lines) + overrides_text(found.overrides)


def _one_line(text: str) -> str:
    """Without characters that a comment of TOML cannot hold; names in a model may be anything."""
    return "".join("?" if unicodedata.category(character) in ("Cc", "Cs") else character for character in text)


def _snr(quality: Quality | None) -> str:
    if quality is None:
        return "-"
    return "exact" if quality.snr_db >= 300 else f"{quality.snr_db:.1f} dB"


def _print(found: Advised, name: str, settings: AdviceSettings) -> None:
    """The advice, then what costs most by itself."""
    baseline = _outputs(found.baseline)
    click.echo(f"{name} under {settings.scheme}: {baseline} on {found.samples} held-out samples")
    for place, item in enumerate(found.advice, 1):
        option = f"  [{item.option}]" if item.option else ""
        click.echo(f"{place}  {item.gain_db:+.1f} dB  {item.text}{option}: {_outputs(item.quality)}")
        click.echo(f"   {item.reason}")
    if len(found.advice) < settings.top:
        click.echo(f"no {'other ' if found.advice else ''}change that was measured gains {LEAST_GAIN:g} dB")
    if found.quality.snr_db - found.baseline.snr_db < _SPREAD:
        click.echo("the error is spread over many tensors: 'onnxqt trim' or another scheme may help more")
    click.echo()
    layers = sorted(found.costs.layers, key=_without)[: settings.top]
    print_table("layers, those first without which the outputs are best", [_LAYERS, *map(_layer_row, layers)])
    tensors = sorted(found.costs.tensors, key=_only)[: settings.top]
    print_table("tensors, those first that cost the outputs most alone", [_TENSORS, *map(_tensor_row, tensors)])
    if found.costs.left_out:
        click.echo(f"{found.costs.left_out} layers were not measured: give more --models")
    if found.options:
        click.echo(f"options of export or trim that say a part of the advice: {'; '.join(found.options)}")


def _outputs(quality: Quality) -> str:
    agreement = "" if quality.agreement is None else f", agreement {100 * quality.agreement:.1f} %"
    return _snr(quality) + agreement


_LAYERS = ("layer", "operator", "quantized alone", "all but it")
_TENSORS = ("tensor", "kind", "bits", "own", "quantized alone")


def _without(cost: LayerCost) -> float:
    return cost.without.error if cost.without else float("inf")


def _only(cost: TensorCost) -> float:
    return -cost.only.error if cost.only else float("inf")


def _layer_row(cost: LayerCost) -> Sequence[str]:
    return (cost.node, cost.op_type, _snr(cost.only), _snr(cost.without))


def _tensor_row(cost: TensorCost) -> Sequence[str]:
    return (cost.tensor, cost.role, str(cost.bits), f"{cost.own_db:.1f} dB", _snr(cost.only))
