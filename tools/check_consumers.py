"""Has current runtimes load and run every kind of file that we write, and writes a table of what they made of it.

    python tools/check_consumers.py --python ort=PATH --python openvino=PATH --model FILE --data DIR [--output FILE]

Models are quantized under every default scheme and one of each further kind, in both forms. A consumer's script
(`tools/consumers/consume.py`) loads each file and runs it; its outputs are compared with those of the emulator under
the profile that stands for the consumer. Exit code 1: a file did not load or run, or differs by more than `EXPECTED`
explains. A consumer without an interpreter is skipped, and said so.
"""

import argparse
import fnmatch
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.calibrate import calibrate, make_quantizers
from onnxqt.data import open_samples
from onnxqt.emulate import load_program
from onnxqt.errors import OnnxqtError
from onnxqt.export import quantized_model
from onnxqt.files import write_model
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.plan import make_plan
from onnxqt.profiles import PROFILES
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme
from onnxqt.verify import lsb_difference

SCRIPT = Path(__file__).parent / "consumers" / "consume.py"
SAMPLES, BATCH = 64, 16
MOST = 0.02  # share of output codes that may differ; see `Row.problem`

# One of each further kind, and the other form: SCHEME or SCHEME,FORM.
KINDS = (
    *map(str, DEFAULT_SCHEMES),
    *("w3a8-sym-pc", "w8a4-asym-pc", "w8a16-sym-pc", "w8a8-sym-pc-pow2", "w8a8-sym-pc-narrow"),
    *("w4a8-sym-b16", "w8a8-asym-pc-dyn", "w4a8-asym-pc-dyn", "w8af-sym-pc", "w4af-asym-pc", "w4af-sym-b16"),
    *("w8a8-sym-pc,qoperator", "w8a8-asym-pc,qoperator", "w8a8-asym-pc-dyn,qoperator"),
)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A runtime, under the name that its interpreter and its script have, and the profile that stands for it."""

    title: str
    name: str
    profile: str


CONSUMERS = (Consumer("ONNX Runtime", "ort", "ort_cpu"), Consumer("OpenVINO", "openvino", "openvino_vnni"))


@dataclass(frozen=True, slots=True)
class Expected:
    """Files that a consumer may refuse, or compute otherwise.

    Attributes:
        consumer: its name.
        kind: a pattern of the names of these kinds.
        most: the largest relative difference of an output; infinite where the file does not load.
        reason: why.
    """

    consumer: str
    kind: str
    most: float
    reason: str


_EIGHT_BITS = (
    "a DequantizeLinear in front of a Gemm or MatMul becomes MatMulNBits, which rounds activations to 8 bits at run "
    "time; not so with the session option session.qdq_matmulnbits_accuracy_level=1"
)
_GROUPS = (
    "the CPU plugin rounds activations of such matrix products to 8 bits at run time; not so with "
    "DYNAMIC_QUANTIZATION_GROUP_SIZE=0"
)
_FUSED = (
    "nodes are fused across the quantizers between them, so that codes inside differ by one; with every value asked "
    "for as an output, no code differed"
)
EXPECTED: tuple[Expected, ...] = (
    Expected("ort", "*a16-*", 0.01, _EIGHT_BITS),
    Expected("ort", "*af-*", 0.01, _EIGHT_BITS),
    Expected("openvino", "*-b*", math.inf, "it has no scales of blocks in DequantizeLinear of opset 21"),
    Expected("openvino", "w8a8-*sym-pc,qoperator", math.inf, "it has no QLinearConv"),
    Expected("openvino", "*-dyn*", 0.02, f"{_GROUPS}; the rest, 0.005, comes from its own DynamicQuantizeLinear"),
    Expected("openvino", "*af-*", 0.01, _GROUPS),
    Expected("openvino", "*a16-*", 0.1, "it has no kernels of 16 bits; what it does with such quantizers is not known"),
    Expected("openvino", "w8a4-*", 0.2, f"{_FUSED}, here of 4 bits"),
    Expected("openvino", "w?a8-*", 0.04, _FUSED),
)


@dataclass(frozen=True, slots=True)
class Row:
    """What a consumer made of one kind of file of one model.

    Attributes:
        model: its name.
        kind: the scheme, with the form behind a comma.
        consumer: title and version.
        name: of the consumer.
        loads: whether it loaded.
        runs: whether it ran.
        products: convolutions and matrix products that it executed.
        integer: those of them on integer operands.
        max_lsb: largest difference of an output code; None where no output is quantized.
        different: share of the output codes that differ; None likewise.
        error: largest difference of an output, relative to the largest magnitude of the emulator's.
        remark: what went wrong.
    """

    model: str
    kind: str
    consumer: str
    name: str
    loads: bool = False
    runs: bool = False
    products: int = 0
    integer: int = 0
    max_lsb: int | None = None
    different: float | None = None
    error: float | None = None
    remark: str = ""

    @property
    def reason(self) -> str:
        """What `EXPECTED` says of it; empty where it does not explain as much."""
        difference = math.inf if self.error is None else self.error
        for row in EXPECTED:
            if row.consumer == self.name and fnmatch.fnmatchcase(self.kind, row.kind) and difference <= row.most:
                return row.reason
        return ""

    @property
    def problem(self) -> str:
        """What is wrong; empty if nothing is.

        A product in float may round to the next code where the emulator's lies on a tie or its sum is not exact, and
        one code more or less upstream moves others: few codes may differ, by little. Outputs that are float may differ
        by the rounding of sums of at most 2^12 products, 2^-12 relative to the largest output.
        """
        if not self.runs:
            return self.remark or "it did not run"
        if self.max_lsb is not None and self.different is not None and self.different > MOST:
            return f"{self.different:.1%} of the output codes differ, by up to {self.max_lsb}"
        if self.max_lsb is None and self.error is not None and self.error > 2**-12:
            return f"outputs differ by {self.error:.2g} of the largest"
        return ""


def make_cases(root: Path, file: Path, data: Path) -> list[str]:
    """Write a case folder for each kind of file; returns what could not be written."""
    model = ingest(file)
    plan, specs = make_plan(model), input_specs(model)
    samples = open_samples(data, specs)
    ranges = calibrate(model, plan, samples.take(SAMPLES), BATCH)
    inputs = next(iter(samples.take(BATCH).batches(BATCH, pad=True))).inputs
    refused = []
    for kind in KINDS:
        scheme, _, form = kind.partition(",")
        folder = root / f"{file.parent.name}-{file.stem}@{kind}"
        try:
            quantizers = make_quantizers(model, plan, ranges, parse_scheme(scheme), "mse")
            proto = quantized_model(model, plan, quantizers, "qoperator" if form == "qoperator" else "qdq")
        except OnnxqtError as error:
            refused.append(f"{folder.name}: {error}")
            continue
        folder.mkdir(parents=True)
        write_model(folder / "model.onnx", proto)
        np.savez(folder / "inputs.npz", **inputs)  # type: ignore[arg-type]  # numpy's stub takes names for options
    return refused


def consume(root: Path, consumer: Consumer, python: str) -> list[Row]:
    """Have a consumer run every case, and compare."""
    command = [python, str(SCRIPT), consumer.name, str(root)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    rows = []
    for path in sorted(root.rglob("inputs.npz"), key=_place):
        model, _, kind = path.parent.name.partition("@")
        result = path.parent / "result.json"
        if not result.exists():
            words = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            rows.append(Row(model, kind, consumer.title, consumer.name, remark=words))
            continue
        told = json.loads(result.read_text())
        rows.append(_row(path.parent, consumer, told))
        result.unlink()
    return rows


def _place(path: Path) -> tuple[str, int]:
    model, _, kind = path.parent.name.partition("@")
    return model, KINDS.index(kind)


def _row(folder: Path, consumer: Consumer, told: Mapping[str, Any]) -> Row:
    model, _, kind = folder.name.partition("@")
    common = {"model": model, "kind": kind, "consumer": f"{consumer.title} {told['version']}", "name": consumer.name}
    facts = {"loads": told["loads"], "runs": told["runs"], "remark": told["error"]}
    facts |= {"products": sum(told["kernels"].values()), "integer": told["integer"]}
    if told["runs"]:
        facts |= compared(folder, consumer.profile)
    return Row(**common, **facts)


def compared(folder: Path, profile: str) -> dict[str, Any]:
    """How far the outputs of a case are from those of the emulator under a profile."""
    arithmetic = replace(PROFILES[profile].arithmetic, dynamic="float")  # files of our own ask for no run-time scales
    if "a16" in folder.name.partition("@")[2]:  # which the profiles of these runtimes do not have
        program = load_program(folder / "model.onnx")
    else:
        program = load_program(folder / "model.onnx", arithmetic)
    with np.load(folder / "inputs.npz") as file:
        result = program.run_codes({name: file[name] for name in file.files})
    worst, different, total, error = 0, 0, 0, 0.0
    with np.load(folder / "outputs.npz") as file:
        for name, expected in result.outputs.items():
            found = file[name]
            error = max(error, float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-30)))
            if name in result.codes:
                lsb = lsb_difference(found, expected, float(result.codes[name].params.scale))
                worst, total = max(worst, int(lsb.max(initial=0))), total + lsb.size
                different += int(np.count_nonzero(lsb))
    return {
        "max_lsb": worst if total else None,
        "different": different / total if total else None,
        "error": error,
    }


HEADER = """# What current runtimes make of the files

Written by `nox -s consumers` (`tools/check_consumers.py`); do not edit.

Each file is one of our own: a scheme, written as QDQ or, behind a comma, in another form. `integer` is how many of the
convolutions and matrix products ran on integer operands; others are right as well, in float. `max LSB` is the largest
difference of an output code from the emulator under the profile that stands for the runtime; outputs that are no codes
have the largest difference relative to the largest output instead. x86-64 only.
"""


def table_of(rows: Sequence[Row], refused: Sequence[str], skipped: Sequence[str]) -> str:
    """The tables."""
    lines = [
        "| model | file | consumer | loads | runs | integer | max LSB | differing codes | relative difference |",
        "|---|---|---|---|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        lsb = "-" if row.max_lsb is None else str(row.max_lsb)
        share = "-" if row.different is None else f"{row.different:.2%}"
        error = "-" if row.error is None else f"{row.error:.1e}"
        told = ("yes" if row.loads else "no", "yes" if row.runs else "no", f"{row.integer} of {row.products}")
        lines.append(f"| {' | '.join((row.model, row.kind, row.consumer, *told, lsb, share, error))} |")
    lines += ["", *(f"{line}\n" for line in skipped)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.problem:
            reasons.setdefault((row.consumer, row.reason or row.problem), []).append(row.kind)
    if reasons:
        lines += ["", "| consumer | files | why they are not loaded, or other than the emulator |", "|---|---|---|"]
        lines += [f"| {who} | {', '.join(dict.fromkeys(kinds))} | {why} |" for (who, why), kinds in reasons.items()]
    if refused:
        lines += ["", "Not written:", "", *(f"- {line}" for line in refused)]
    return "\n".join(lines).rstrip() + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a consumer")
    parser.add_argument("--model", action="append", type=Path, required=True, help="float model, repeatable")
    parser.add_argument("--data", action="append", type=Path, required=True, help="samples of each, in the same order")
    parser.add_argument("--work", type=Path, help="keep the cases in this new folder")
    parser.add_argument("--output", type=Path, help="write the tables there instead of printing them")
    options = parser.parse_args(arguments)
    pythons = dict(pair.split("=", 1) for pair in options.python if "=" in pair)
    if len(pythons) != len(options.python):
        parser.error("--python takes NAME=PATH, each name once")
    if len(options.model) != len(options.data):
        parser.error("give one --data for each --model")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        refused = [line for pair in zip(options.model, options.data, strict=True) for line in make_cases(root, *pair)]
        for consumer in CONSUMERS:
            if consumer.name in pythons:
                rows += consume(root, consumer, pythons[consumer.name])
    skipped = [
        f"{consumer.title}: skipped, no interpreter: give --python {consumer.name}=PATH"
        for consumer in CONSUMERS
        if consumer.name not in pythons
    ]
    text = table_of(rows, refused, skipped)
    if options.output:
        options.output.write_text(f"{HEADER}\n{text}")
    else:
        print(text, end="")
    problems = [
        f"{row.model}@{row.kind}, {row.consumer}: {row.problem}" for row in rows if row.problem and not row.reason
    ]
    for line in (*skipped, *problems):
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
