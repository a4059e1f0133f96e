"""Gives the files of `onnxqt.vendors` to the vendors' own readers, and writes a table of what they made of them.

    python tools/check_vendors.py --python ort=PATH --python aimet=PATH [--reader NAME] [--model FILE --data DIR]
                                  [--output FILE]

Random networks (`validation_networks.py`), or a model of yours, are quantized under some schemes; every format that has
a reader is written; the reader's script (`tools/vendors`) runs in an interpreter that has the reader, and tells what it
found. Exit code 1: a reader found other values than `EXPECTED` explains, or a script failed. A reader without an
interpreter is skipped, and said so. A further reader is a row of `READERS` and a script (`tools/vendors/cases.py`).
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import validation_networks as networks

from onnxqt.calibrate import Quantizers, calibrate, make_quantizers
from onnxqt.data import Samples, open_samples
from onnxqt.errors import OnnxqtError
from onnxqt.export import quantized_model
from onnxqt.files import write_model
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import QParams
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.schemes import parse_scheme
from onnxqt.table.build import build_table
from onnxqt.table.form import Table
from onnxqt.vendors import VENDORS, Request, baked_model, write_vendor

SCRIPTS = Path(__file__).parent / "vendors"
HEAD = """# What vendors' readers make of our files

Random networks, five schemes each, exported, written in each format, and read back by the tool's own reader:
"different" counts values that are not exactly (in float32) those of our table. `nox -s vendors` makes the table again
(`tools/check_vendors.py`). The rows of ncnn are checked by rules written from its documentation, not by its tools;
those of MNN and ncnn that differ are one grouped convolution with several outputs in each group: ncnn has one scale
for each group, which the writer says, and MNN's cause is not known yet.

"""
SCHEMES = ("w8a8-asym-pc", "w8a8-sym-pc", "w8a8-asym-pt", "w4a8-asym-pc", "w4a8-sym-pc")
OPERATORS = (
    *("Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Gelu", "Gemm", "GlobalAveragePool", "MatMul"),
    *("Relu", "Sigmoid", "Softmax"),
)
SEEDS = 4
SAMPLES, BATCH = 32, 4
STEM = "m"
REMARKS = 3  # of one kind that the table shows


@dataclass(frozen=True, slots=True)
class Reader:
    """A vendor's code that reads files.

    Attributes:
        title: for people.
        python: name under which its interpreter is given.
        script: in `tools/vendors`.
        formats: that it reads, with options behind a comma where a format is written with some.
    """

    title: str
    python: str
    script: str
    formats: tuple[str, ...]


READERS: tuple[Reader, ...] = (
    Reader("ONNX Runtime", "ort", "ort.py", ("ort-cache", "ort-overrides", "ort-overrides,form=range", "ort-trt")),
    Reader("AIMET", "aimet", "aimet.py", ("qualcomm", "qualcomm-1.0.0", "qualcomm-0.6.1")),
    Reader("ModelOpt", "modelopt", "modelopt_cache.py", ("tensorrt", "tensorrt,version=8601")),
    Reader("MNN", "mnn", "mnn.py", ("mnn",)),
    Reader("ncnn", "ncnn", "ncnn.py", ("ncnn", "ncnn-llm")),
    Reader("TPU-MLIR", "sophgo", "sophgo.py", ("sophgo",)),
    Reader("protobuf", "protobuf", "protobuf.py", ("ascend",)),
)


@dataclass(frozen=True, slots=True)
class Expected:
    """Cases that a reader may refuse, or find other values in.

    Attributes:
        format: of which format, without options.
        scheme: under which schemes: what their names hold.
        reason: why.
    """

    format: str
    scheme: str
    reason: str


EXPECTED: tuple[Expected, ...] = (
    Expected(
        "qualcomm-1.0.0",
        "-b",
        "blocks carry no axis in this version, and AIMET's converter does not look for it; it needs 2.0.0 for them",
    ),
)


@dataclass(slots=True)
class Row:
    """What one reader made of one format.

    Attributes:
        reader: its title and version.
        format: with its options.
        cases: how many there were.
        accepted: of them.
        checked: values that the reader gave out again.
        different: of them.
        explained: of those, under schemes that `EXPECTED` names.
        refused: cases that were refused though `EXPECTED` does not name them.
        effect: what the values are.
        lost: what the format cannot express, in the writer's words.
        remarks: what went wrong, or else is worth knowing.
        failures: cases whose check failed.
    """

    reader: str
    format: str
    cases: int = 0
    accepted: int = 0
    checked: int = 0
    different: int = 0
    explained: int = 0
    refused: int = 0
    effect: str = ""
    lost: dict[str, None] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model that was calibrated, with data for its inputs."""

    name: str
    model: Model
    plan: QuantPlan
    quantizers: Mapping[str, Quantizers]
    table: Table
    inputs: Mapping[str, Any]


def prepared(name: str, file: Path, samples: Samples | None, schemes: Sequence[str], seed: int) -> Prepared:
    """Ingest, plan and calibrate one model."""
    model = ingest(file)
    specs = input_specs(model)
    data = samples or open_samples(networks.samples(model.proto, SAMPLES, seed), specs)
    plan = make_plan(model)
    ranges = calibrate(model, plan, data, BATCH)
    quantizers = {scheme: make_quantizers(model, plan, ranges, parse_scheme(scheme), "mse") for scheme in schemes}
    table = build_table(model, plan, ranges, quantizers, file.name)
    inputs = next(iter(data.batches(BATCH))).inputs
    return Prepared(name, model, plan, quantizers, table, inputs)


def make_cases(root: Path, source: Prepared, formats: Sequence[str]) -> dict[str, dict[str, None]]:
    """Write one case per scheme; returns what each format loses."""
    lost: dict[str, dict[str, None]] = {}
    for scheme, quantizers in source.quantizers.items():
        folder = root / f"{source.name}@{scheme}"
        folder.mkdir(parents=True)
        baked = baked_model(source.model, source.plan, quantizers)
        write_model(folder / "float.onnx", source.model.proto)
        write_model(folder / "baked.onnx", baked.proto)
        write_model(folder / "qdq.onnx", quantized_model(source.model, source.plan, quantizers))
        np.savez(folder / "inputs.npz", **source.inputs)
        written = {}
        for name in formats:
            try:
                written[name], sentences = write_format(folder, source.table, scheme, name)
            except OnnxqtError as error:
                sentences = (f"not written: {error}",)
            lost.setdefault(name, {}).update(dict.fromkeys(sentences))
        case = {
            "scheme": scheme,
            "formats": written,
            "activations": {name: grid(params) for name, params in quantizers.activations.items()},
            "weights": {name: grid(params) for name, params in quantizers.weights.items()},
            "unreached": list(baked.unreached),
            "groups": {entry.name: entry.group for entry in source.table.entries if entry.group},
            "absorbed": {name: entry.name for entry in source.table.entries for name in entry.fused_from},
        }
        (folder / "case.json").write_text(json.dumps(case))
    return lost


def write_format(folder: Path, table: Table, scheme: str, name: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Write the files of one format into a folder of its name."""
    vendor, *pairs = name.split(",")
    options = dict(pair.split("=", 1) for pair in pairs)
    written = write_vendor(vendor, Request(table, scheme, STEM, options=options))
    place = folder / name.replace(",", "-")
    place.mkdir()
    for file, content in written.files.items():
        (place / file).write_bytes(content)
    return {"folder": place.name, "files": list(written.files), "options": options}, written.lost


def grid(params: QParams) -> dict[str, Any]:
    """The JSON form of a grid; its numbers read back to the same float32."""
    codes = params.grid
    return {
        "scale": [float(scale) for scale in params.scale.ravel()],
        "zero_point": params.zero_point.ravel().tolist(),
        "shape": list(params.scale.shape),
        "axis": params.axis,
        "block_size": params.block_size,
        **{"bits": codes.bits, "signed": codes.signed, "qmin": codes.qmin, "qmax": codes.qmax},
    }


def run_reader(root: Path, reader: Reader, python: str) -> dict[str, Any]:
    """What a script tells of all cases below `root`."""
    command = [python, str(SCRIPTS / reader.script), str(root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    begin = done.stdout.find("{")
    try:
        told: dict[str, Any] = json.loads(done.stdout[max(begin, 0) :])
    except ValueError:
        words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"version": "", "results": [], "error": words}
    return told


def rows_of(reader: Reader, told: Mapping[str, Any], lost: Mapping[str, Mapping[str, None]]) -> list[Row]:
    """One row per format of a reader."""
    title = f"{reader.title} {told['version']}".strip()
    rows = {name: Row(title, name, lost=dict(lost.get(name, {}))) for name in lost}
    if "error" in told:
        for row in rows.values():
            row.failures.append(told["error"])
    for result in told["results"]:
        row = rows[result["format"]]
        row.cases += 1
        row.checked += result["checked"]
        row.different += result["different"]
        row.effect = result["effect"] or row.effect
        if result["status"] == "failed":
            row.failures.append(f"{result['case']}: {result['detail']}")
            continue
        row.accepted += result["status"] == "accepted"
        if is_expected(result):
            row.explained += result["different"]
        elif result["status"] == "refused":
            row.refused += 1
        if result["detail"]:
            row.remarks.append(f"{result['case']}: {result['detail']}")
    return list(rows.values())


def is_expected(result: Mapping[str, Any]) -> bool:
    """Whether the differences of a case are explained."""
    vendor = result["format"].partition(",")[0]
    scheme = result["case"].partition("@")[2]
    return any(row.format == vendor and row.scheme in scheme for row in EXPECTED)


def table_of(rows: Sequence[Row], skipped: Mapping[str, str]) -> str:
    """The tables: what was read, what is lost, what is worth knowing."""
    lines = [
        "| format | reader | cases | accepted | values compared | different | what is compared |",
        "|---|---|--:|--:|--:|--:|---|",
    ]
    for row in rows:
        numbers = f"{row.cases} | {row.accepted} | {row.checked:,} | {row.different:,}"
        lines.append(f"| {row.format} | {row.reader} | {numbers} | {row.effect} |")
    lines += [f"| {name} | skipped: {reason} | | | | | |" for name, reason in skipped.items()]
    explained = [row for row in EXPECTED if row.format in {each.format.partition(",")[0] for each in rows}]
    if explained:
        lines += ["", "| format | schemes | why cases are refused or values differ |", "|---|---|---|"]
        lines += [f"| {row.format} | {row.scheme or 'all'} | {row.reason} |" for row in explained]
    lines += ["", "| format | what it cannot express, of the cases here |", "|---|---|"]
    lines += [f"| {row.format} | {sentence} |" for row in rows for sentence in list(row.lost)[:REMARKS]]
    remarks = [(row.format, remark) for row in rows for remark in (*row.failures, *row.remarks)[:REMARKS]]
    if remarks:
        lines += ["", "| format | remark |", "|---|---|", *(f"| {name} | {remark} |" for name, remark in remarks)]
    return "\n".join(lines) + "\n"


def problems_of(rows: Sequence[Row]) -> list[str]:
    """What is wrong and not expected, one line each."""
    problems = []
    for row in rows:
        problems += [f"{row.format}: {failure}" for failure in row.failures]
        if row.refused:
            problems.append(f"{row.format}: {row.refused} case(s) refused")
        if row.different > row.explained:
            problems.append(f"{row.format}: {row.different - row.explained} values differ")
        if not row.cases and not row.failures and not row.lost:
            problems.append(f"{row.format}: no case was read")
    return problems


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a reader")
    parser.add_argument("--reader", action="append", choices=sorted(r.python for r in READERS), help="default: all")
    parser.add_argument("--scheme", action="append", help=f"default: {', '.join(SCHEMES)}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="random networks")
    parser.add_argument("--model", type=Path, help="this model instead of random networks")
    parser.add_argument("--data", type=Path, help="samples for it; a few are enough")
    parser.add_argument("--work", type=Path, help="keep the cases in this new folder")
    parser.add_argument("--output", type=Path, help="write the tables there instead of printing them")
    options = parser.parse_args(arguments)
    pythons = dict(pair.split("=", 1) for pair in options.python if "=" in pair)
    if len(pythons) != len(options.python):
        parser.error("--python takes NAME=PATH, each name once")
    if (options.model is None) != (options.data is None):
        parser.error("give --model and --data together")
    chosen = [reader for reader in READERS if reader.python in (options.reader or [r.python for r in READERS])]
    rows: list[Row] = []
    skipped: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        sources = [*sources_of(options, work)]
        for reader in chosen:
            reason = why_skipped(reader, pythons)
            if reason:
                skipped |= dict.fromkeys(reader.formats, reason)
                continue
            root = work / reader.python
            lost: dict[str, dict[str, None]] = {name: {} for name in reader.formats}
            for source in sources:
                for name, sentences in make_cases(root, source, reader.formats).items():
                    lost[name].update(sentences)
            rows += rows_of(reader, run_reader(root, reader, pythons[reader.python]), lost)
    text = table_of(rows, skipped)
    if options.output:
        options.output.write_text(HEAD + text)
    else:
        print(text, end="")
    problems = problems_of(rows)
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


def why_skipped(reader: Reader, pythons: Mapping[str, str]) -> str:
    """Why a reader is not asked; empty if it is."""
    if reader.python not in pythons:
        return f"no interpreter, give --python {reader.python}=PATH"
    absent = [name for name in reader.formats if name.partition(",")[0] not in VENDORS]
    if absent or not (SCRIPTS / reader.script).exists():
        return f"no writer of {absent[0]}" if absent else f"no {reader.script}"
    return ""


def sources_of(options: argparse.Namespace, work: Path) -> list[Prepared]:
    """The model of the command line, else random networks."""
    schemes = options.scheme or SCHEMES
    if options.model:
        model = ingest(options.model)
        samples = open_samples(options.data, input_specs(model))
        return [prepared(options.model.stem, options.model, samples, schemes, 0)]
    found = []
    for seed in range(options.seeds):
        file = work / f"network{seed}.onnx"
        onnx.save(networks.network(seed, OPERATORS), file)
        found.append(prepared(file.stem, file, None, schemes, seed))
    return found


if __name__ == "__main__":
    sys.exit(main())
