"""What `onnxqt trim` gains on real networks, without labels: the numbers of BENCHMARKS.md.

    python tools/bench_accuracy.py MODEL... --data DIR --out DIR

DIR holds `calib/*.npz` and `eval/*.npz`. Labels in `calib` are not used: training distils from the model itself,
and nothing is chosen on `eval`. Writes a run directory for each model and prints Markdown.
"""

import argparse
import json
import pathlib
from typing import Any

import onnxqt
from onnxqt.pipeline import Silent
from onnxqt.trim import TrimSettings
from onnxqt.trim.losses import Losses

EXTRA_SCHEMES = ("w4a4-sym-pc",)


class Printer(Silent):
    """Names the stages, for long runs in a log."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Print the stage's name."""
        print(f"... {name}", flush=True)


def bench(model: pathlib.Path, data: pathlib.Path, out: pathlib.Path, options: dict[str, Any]) -> dict[str, Any]:
    """Run the whole job with default settings and return its report."""
    schemes = (*onnxqt.DEFAULT_SCHEMES, *(onnxqt.parse_scheme(name) for name in EXTRA_SCHEMES))
    settings = onnxqt.Settings(schemes, TrimSettings(losses=Losses(), **options))
    report = onnxqt.trim(model, data / "calib", data / "eval", out / model.stem, settings, Printer())
    return report.content


def table(name: str, report: dict[str, Any]) -> str:
    """One model's results as Markdown."""
    training, settings = report["training"], report["settings"]
    lines = [
        f"### {name}",
        "",
        f"Float {_top1(report['float'])} %, checkpoint {_top1(report['checkpoint'])} % "
        f"({report['data']['evaluation']['samples']} evaluation samples). "
        f"{training['steps']} steps of {settings['training']['batch_size']}, {training['seconds']:.0f} s of training "
        f"({training['step_ms_median']:.0f} ms a step), {report['seconds']:.0f} s in all.",
        "",
        "| scheme | PTQ | checkpoint | written file | made of | emulator | PTQ dB | file dB | LSB | differing codes |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for scheme, result in report["schemes"].items():
        emulator = result["emulator"]
        cells = [
            scheme,
            *(_top1(result[kind]) for kind in ("ptq", "checkpoint", "trim")),
            result["weights"],
            _top1(emulator),
            *(f"{result[kind]['fidelity']['snr_db']:.1f}" for kind in ("ptq", "trim")),
            str(emulator["max_lsb"]),
            f"{emulator['mismatch_fraction']:.3%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _top1(outcome: dict[str, Any]) -> str:
    return f"{100 * outcome['metrics']['top1']:.2f}"


def main() -> None:
    """Run every model and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int)
    args = parser.parse_args()
    options = {name: value for name in ("steps", "seed") if (value := getattr(args, name)) is not None}
    for model in args.models:
        report = bench(model, args.data, args.out, options)
        print(table(model.stem, report))
        print(json.dumps(report["environment"]["packages"]))


if __name__ == "__main__":
    main()
