"""Which part of the method brings what: models trained with and without it, under every scheme.

    python tools/bench_ablation.py MODEL --data DIR --out DIR [--seeds 3] [--steps N] [--schemes NAME...] [--rows R...]

DIR of the data holds `calib/*.npz` and, with labels, `eval/*.npz`. Rows:

    ptq              not trained
    rounded          not trained: robust rounding, after equalization where that loses less on held-out samples
    progressive      progressive fake quantization for one scheme, w4a8-sym-pt; no reverse pruning
    reverse-pruning  the same with reverse pruning per tensor
    scheme-robust    progressive fake quantization for all schemes; no reverse pruning
    both             the same with reverse pruning per tensor
    mixup            the same, with samples blended
    full             the same from robustly rounded weights on, with the gentle settings that `trim` then has
    no-mixup         full, but no samples are blended
    no-average       full, but the checkpoint is the last weights and no average of them

"All schemes" are those of --schemes, by default {w8a8, w4a8, w4a4} x {sym, asym} x {pt, pc}. Training distils from the
original model, so labels in `calib` are not used; nothing is chosen on `eval`. Every trained model is judged there by
top-1, as it is and as the exported QDQ model of each scheme, by ONNX Runtime with all its optimizations. Unlike
`onnxqt trim`, no scheme falls back to the original weights.

OUT gets ROW-SEED.onnx and ROW-SEED.json. What is there is not done again, and a training run that was broken off goes
on from the state that it saved last. Prints Markdown: the drop from the original float model in points of top-1, as
the mean over the seeds +- half of (largest - smallest), by families of schemes; then top-1 under every scheme as
mean (smallest..largest).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import onnx

from onnxqt.candidates import Candidate
from onnxqt.data import DataSource, has_classes
from onnxqt.errors import OnnxqtError, TrainingError, UsageError
from onnxqt.evaluate import Reference, evaluate
from onnxqt.files import file_sha256, make_folder, write_json, write_model
from onnxqt.model import Model
from onnxqt.pipeline import Settings, Workspace, calibrated, open_workspace, record_ranges, starting_point
from onnxqt.runtime import Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.trim import Subject, TrimSettings, scheme_regime, trim
from onnxqt.trim import state as states
from onnxqt.trim.losses import Losses

ONE = parse_scheme("w4a8-sym-pt")
ALL = tuple(
    Scheme(weight_bits, activation_bits, symmetric, per_channel)
    for weight_bits, activation_bits in ((8, 8), (4, 8), (4, 4))
    for symmetric in (True, False)
    for per_channel in (True, False)
)
FLOAT = "float"


@dataclass(frozen=True)
class Row:
    """One way to train.

    Attributes:
        trained: whether it is trained at all.
        rounded: whether it starts from robustly rounded weights.
        robust: whether for all schemes, or for `ONE`.
        changes: of the settings.
    """

    trained: bool = True
    rounded: bool = False
    robust: bool = True
    changes: Mapping[str, Any] = field(default_factory=dict)


_PLAIN: Mapping[str, Any] = {"augment": ()}
ROWS: Mapping[str, Row] = {
    "ptq": Row(trained=False),
    "rounded": Row(trained=False, rounded=True),
    "progressive": Row(robust=False, changes={**_PLAIN, "prune": "none"}),
    "reverse-pruning": Row(robust=False, changes=_PLAIN),
    "scheme-robust": Row(changes={**_PLAIN, "prune": "none"}),
    "both": Row(changes=_PLAIN),
    "mixup": Row(),
    "full": Row(rounded=True),
    "no-mixup": Row(rounded=True, changes=_PLAIN),
    "no-average": Row(rounded=True, changes={"average": 0.0}),
}


def _bits(weight: int, activation: int) -> Callable[[Scheme], bool]:
    return lambda scheme: (scheme.weight_bits, scheme.activation_bits) == (weight, activation)


FAMILIES: Mapping[str, Callable[[Scheme], bool]] = {
    "w8a8": _bits(8, 8),
    "w4a8 pc": lambda scheme: _bits(4, 8)(scheme) and scheme.per_channel,
    "w4a8 pt": lambda scheme: _bits(4, 8)(scheme) and not scheme.per_channel,
    "w4a4 asym pc": lambda scheme: _bits(4, 4)(scheme) and scheme.per_channel and not scheme.symmetric,
    "w4a4 rest": lambda scheme: _bits(4, 4)(scheme) and not (scheme.per_channel and not scheme.symmetric),
}

Shares = dict[str, float]  # top-1 by scheme, and of the float checkpoint as `FLOAT`


@dataclass(frozen=True, eq=False)
class Bench:
    """What all rows share.

    Attributes:
        work: the model, its plan and its samples.
        original: the model with its activation ranges.
        rounded: robustly rounded weights with theirs.
        data: where the calibration samples are.
        out: where the results go.
        schemes: what the rows are judged under, and trained for.
        settings: how to train; a row changes them.
    """

    work: Workspace
    original: Candidate
    rounded: Candidate
    data: DataSource
    out: Path
    schemes: tuple[Scheme, ...]
    settings: TrimSettings

    def settings_of(self, row: Row, seed: int) -> TrimSettings:
        """How to train a row."""
        return replace(self.settings, seed=seed, **row.changes).settled(row.rounded)

    def start_of(self, row: Row) -> Candidate:
        """The weights that a row begins with."""
        return self.rounded if row.rounded else self.original

    def schemes_of(self, row: Row) -> tuple[Scheme, ...]:
        """What a row is trained for."""
        if not row.trained:
            return ()
        return self.schemes if row.robust else (ONE,)

    def made_of(self, row: Row, seed: int) -> dict[str, Any]:
        """Everything that a result depends on, as JSON has it."""
        source = self.work.source
        facts: dict[str, Any] = {
            "model": source.model.sha256,
            "calibration": source.samples.sha256(),
            "evaluation": source.evaluation.sha256(),
            "judged": [str(scheme) for scheme in self.schemes],
            "rounded": row.rounded,
            "trained for": [str(scheme) for scheme in self.schemes_of(row)],
            "training": asdict(self.settings_of(row, seed)) if row.trained else None,
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain


def open_bench(model: Path, data: Path, out: Path, schemes: Sequence[Scheme] = ALL, steps: int | None = None) -> Bench:
    """Read and check everything, and calibrate the original.

    Raises:
        UsageError: if the evaluation samples have no labels.
    """
    training = TrimSettings(losses=Losses())
    training = training if steps is None else replace(training, steps=steps)
    settings = Settings(tuple(schemes), training, robust_rounding="always")
    work = open_workspace(model, data / "calib", data / "eval", out, settings)
    if not has_classes(work.source.evaluation.targets):
        raise UsageError(f"'{data / 'eval'}' has no labels to judge by: add an array 'labels' to every file")
    tell("calibrate")
    work, ranges = calibrated(work)
    training = replace(training, batch_size=work.source.batch_size)
    original = Candidate(work.source.model, ranges)
    tell("round robustly")
    rounded = starting_point(work, original)
    return Bench(work, original, rounded, DataSource(str(data / "calib")), out, tuple(schemes), training)


def reference_of(bench: Bench) -> Reference:
    """The evaluation samples with the original model's outputs."""
    source = bench.work.source
    return Reference(source.model, lambda: source.batches(source.evaluation))


def run_rows(bench: Bench, rows: Sequence[str], seeds: int, reference: Reference) -> dict[str, list[Shares]]:
    """Train and judge what is not there yet; shares by row, one for each seed."""
    return {
        name: [run_row(bench, name, seed, reference) for seed in range(seeds if ROWS[name].trained else 1)]
        for name in rows
    }


def run_row(bench: Bench, name: str, seed: int, reference: Reference) -> Shares:
    """One row with one seed: its result on disk, or a new one.

    Raises:
        UsageError: if the result on disk was made of something else.
        TrainingError: if training is stopped by the user.
    """
    row, file = ROWS[name], bench.out / f"{name}-{seed}.json"
    made_of = bench.made_of(row, seed)
    if file.exists():
        stored = json.loads(file.read_text())
        other = [key for key, value in made_of.items() if stored["made of"].get(key) != value]
        if other:
            raise UsageError(f"'{file}' has another {other[0]}: give the same options as then, or another --out")
        tell(f"{name} {seed}: is there")
        shares: Shares = stored["top1"]
        return shares
    model, told = checkpoint(bench, name, seed)
    shares = judge(bench, model, reference, f"{name} {seed}")
    write_json(file, {"made of": made_of, "training": told, "top1": shares})
    return shares


def checkpoint(bench: Bench, name: str, seed: int) -> tuple[Model, dict[str, Any] | None]:
    """Train a row; the model and what is worth knowing about the run."""
    row, source = ROWS[name], bench.work.source
    start = bench.start_of(row)
    if not row.trained:
        write_model(bench.out / f"{name}-{seed}.onnx", start.model.proto)
        return start.model, None
    folder = make_folder(bench.out / f"{name}-{seed}.training")
    settings = bench.settings_of(row, seed)
    settings = replace(settings, resume=states.find(folder) is not None)
    regimes = tuple(scheme_regime(scheme, bench.work.settings.ranges) for scheme in bench.schemes_of(row))
    targets = source.samples.targets
    subject = Subject(start.model, source.model, source.plan, start.ranges, regimes, bench.data, targets, row.rounded)
    trimmed = trim(subject, settings, folder, lambda report: show(report, f"{name} {seed}", settings.steps))
    if trimmed.reason is not None:
        raise TrainingError(f"nothing can be trained: {trimmed.reason}")
    if trimmed.stopped:
        raise TrainingError(f"{name} {seed} was stopped: give the same command to go on")
    path = bench.out / f"{name}-{seed}.onnx"
    write_model(path, trimmed.model.proto)
    told = {
        "steps": trimmed.steps,
        "best step": trimmed.best_step,
        "seconds": trimmed.seconds,
        "step ms": trimmed.step_ms_median,
        "diverged": trimmed.diverged,
        "sha256": file_sha256(path),
    }
    return trimmed.model, told


def judge(bench: Bench, model: Model, reference: Reference, title: str) -> Shares:
    """Top-1 of a model, as it is and under every scheme, on ranges of its own."""
    work = bench.work
    known = next((c for c in (bench.original, bench.rounded) if c.model is model), None)
    candidate = known or Candidate(model, record_ranges(work, model))
    shares = {FLOAT: top1(model.proto, reference)}
    for scheme in bench.schemes:
        quantized = candidate.quantized(work.source.plan, scheme, work.settings.ranges)
        shares[str(scheme)] = top1(quantized, reference)
        tell(f"{title}: {scheme} {100 * shares[str(scheme)]:.2f}")
    return shares


def top1(model: onnx.ModelProto, reference: Reference) -> float:
    """Share of the evaluation samples whose largest class score is the label."""
    tally = evaluate(Session(model).run, reference)[reference.outputs[0]]
    return tally.metrics()["top1"]


def show(report: Mapping[str, Any], title: str, steps: int) -> None:
    """Tell about a training run, some twenty times."""
    if report["event"] == "step" and (report["step"] + 1) % max(1, steps // 20) == 0:
        tell(f"{title}: step {report['step'] + 1} of {steps}, loss {report['loss']:.4f}, {report['seconds']:.0f} s")
    elif report["event"] == "evaluate":
        tell(f"{title}: held out {fmean(report['losses']):.4f}{', the best' if report['best'] else ''}")
    elif report["event"] in ("resume", "diverged"):
        tell(f"{title}: {report['event']} {report.get('message', '')}")


# --- what is printed ------------------------------------------------------------------------------------


def drops(shares: Shares, target: float, schemes: Sequence[Scheme]) -> dict[str, float]:
    """Mean drop from `target` in points, of the float model and by family; families without a scheme are absent."""
    found = {FLOAT: 100 * (target - shares[FLOAT])}
    for name, belongs in FAMILIES.items():
        members = [shares[str(scheme)] for scheme in schemes if belongs(scheme)]
        if members:
            found[name] = 100 * (target - fmean(members))
    return found


def family_table(results: Mapping[str, Sequence[Shares]], target: float, schemes: Sequence[Scheme]) -> str:
    """Rows by families: mean drop +- half of what the seeds differ by; Markdown."""
    by_row = {name: [drops(shares, target, schemes) for shares in found] for name, found in results.items()}
    columns = list(next(iter(by_row.values()))[0])
    cells = {name: [spread_of([drop[key] for drop in found]) for key in columns] for name, found in by_row.items()}
    return "\n".join(markdown(["row", *columns], cells))


def spread_of(values: Sequence[float]) -> str:
    """Mean +- half of (largest - smallest)."""
    half = (max(values) - min(values)) / 2
    return f"{fmean(values):.2f}" + (f" ± {half:.2f}" if len(values) > 1 else "")


def scheme_table(results: Mapping[str, Sequence[Shares]]) -> str:
    """Top-1 in percent, schemes by rows: mean (smallest..largest) over the seeds; Markdown."""
    names = list(next(iter(results.values()))[0])
    cells = {name: [range_of([100 * shares[name] for shares in found]) for found in results.values()] for name in names}
    return "\n".join(markdown(["scheme", *results], cells))


def range_of(values: Sequence[float]) -> str:
    """Mean (smallest..largest)."""
    return f"{fmean(values):.2f}" + (f" ({min(values):.2f}..{max(values):.2f})" if len(values) > 1 else "")


def markdown(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Lines of a table."""
    yield f"| {' | '.join(heads)} |"
    yield f"|---|{'--:|' * (len(heads) - 1)}"
    for name, cells in rows.items():
        yield f"| {' | '.join((name, *cells))} |"


def tell(line: str) -> None:
    """Tell a person who waits."""
    print(line, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--data", type=Path, required=True, help="folder with calib and eval")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--seeds", type=int, default=3, help="of each trained row (3)")
    parser.add_argument("--steps", type=int, help=f"of training ({TrimSettings().steps})")
    parser.add_argument("--schemes", nargs="+", metavar="NAME", help="all twelve")
    parser.add_argument("--rows", nargs="+", metavar="NAME", choices=list(ROWS), default=list(ROWS), help="all")
    args = parser.parse_args(arguments)
    try:
        for name in ("seeds", "steps"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise UsageError(f"--{name} is {getattr(args, name)}: give a number of at least 1")
        schemes = tuple(map(parse_scheme, args.schemes)) if args.schemes else ALL
        bench = open_bench(args.model, args.data, args.out, schemes, args.steps)
        reference = reference_of(bench)
        target = top1(bench.original.model.proto, reference)
        results = run_rows(bench, args.rows, args.seeds, reference)
    except OnnxqtError as error:
        tell(f"Error: {error}")
        return error.exit_code
    judged, training = bench.work.source.evaluation.count, bench.settings
    print(
        f"### {args.model.stem}\n\nFloat {100 * target:.2f} %, {judged} evaluation samples; {training.steps} steps of "
        f"{training.batch_size}, {args.seeds} seeds. Drop in points:\n\n"
        f"{family_table(results, target, schemes)}\n\nTop-1 in percent:\n\n{scheme_table(results)}\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
