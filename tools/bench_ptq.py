"""What post-training quantization alone reaches, step by step: the baseline that training has to beat.

    python tools/bench_ptq.py MODEL --data DIR [--schemes NAME...] [--json FILE]

DIR holds `calib/*.npz` and `eval/*.npz`. Under each scheme the model is quantized four times: as `onnxqt export` does
it, after cross-layer equalization and bias correction, with learned rounding (AdaRound) and bias correction, and with
all three steps; calibrated and learned on `calib`, run on all samples of `eval` in the integer emulator. Prints
Markdown, the share of right samples in percent. Rows that are in FILE already are not computed again.
"""

import argparse
import json
import pathlib
import time
from typing import Any

from onnxqt.calibrate import calibrate
from onnxqt.data import open_samples
from onnxqt.emulate import load_program
from onnxqt.evaluate import Reference, evaluate
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.plan import make_plan
from onnxqt.ptq import PtqSettings, Step, improve
from onnxqt.schemes import Scheme, parse_scheme

SCHEMES = tuple(
    f"{bits}-{symmetry}-{granularity}"
    for bits in ("w4a8", "w4a4")
    for symmetry in ("sym", "asym")
    for granularity in ("pt", "pc")
)
VARIANTS: dict[str, tuple[Step, ...]] = {
    "PTQ": (),
    "equalized, bias corrected": ("equalize", "bias"),
    "AdaRound, bias corrected": ("round", "bias"),
    "equalized, AdaRound, bias corrected": ("equalize", "round", "bias"),
}
BATCH = 64


class Bench:
    """A model with its samples.

    Args:
        model: an ONNX file.
        data: holds `calib` and `eval`.
    """

    def __init__(self, model: pathlib.Path, data: pathlib.Path) -> None:
        self._model: Model = ingest(model)
        self._plan = make_plan(self._model)
        specs = input_specs(self._model)
        self._calibration = open_samples(data / "calib", specs)
        evaluation = open_samples(data / "eval", specs)
        self._reference = Reference(self._model, lambda: evaluation.batches(BATCH))
        calibrate(self._model, self._plan, self._calibration.take(1), 1)  # refuses tensors without bounds at once

    def top1(self, scheme: Scheme, steps: tuple[Step, ...]) -> float:
        """Percent of the evaluation samples that are right."""
        improved = improve(self._model, self._plan, self._calibration, PtqSettings(scheme, "mse", steps))
        program = load_program(improved.quantized.proto())
        tallies = evaluate(lambda inputs: program.run_codes(inputs).outputs, self._reference)
        metrics: dict[str, float] = next(iter(tallies.values())).metrics()
        return 100 * metrics["top1"]


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [f"| scheme | {' | '.join(VARIANTS)} |", "|---|" + "--:|" * len(VARIANTS)]
    for scheme, row in rows.items():
        lines.append(f"| {scheme} | {' | '.join(f'{row[name]:.2f}' for name in VARIANTS if name in row)} |")
    return "\n".join(lines)


def main() -> None:
    """Run every scheme and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, metavar="NAME")
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    bench = Bench(args.model, args.data)
    rows: dict[str, dict[str, Any]] = {}
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())
    for name in args.schemes:
        row = rows.setdefault(name, {})
        for variant, steps in VARIANTS.items():
            if variant not in row:
                started = time.perf_counter()
                row[variant] = bench.top1(parse_scheme(name), steps)
                print(f"{name}, {variant}: {row[variant]:.2f} ({time.perf_counter() - started:.0f} s)", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(rows, indent=1))
    print(table({name: rows[name] for name in args.schemes}))


if __name__ == "__main__":
    main()
