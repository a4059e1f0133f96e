"""The stages in order: from a model file and a folder of samples to a run directory and its report."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate, make_quantizers
from onnxqt.data import Batch, InputSpec, Samples, check_labels, fixed_batch, open_samples, require
from onnxqt.emulate import load_program
from onnxqt.errors import UsageError
from onnxqt.export import file_sha256, make_folder, neutral_table, quantized_model, write_json, write_model
from onnxqt.metrics import Tally
from onnxqt.model import Model, ingest
from onnxqt.numerics import Array
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.report import Findings, Report, SchemeResult, build_report
from onnxqt.runtime import Session, check_trainer
from onnxqt.schemes import DEFAULT_SCHEMES, Scheme
from onnxqt.trim import DEFAULT_LEARNING_RATE, HELD_FRACTION, HELD_LIMIT, Trimmed, TrimSettings
from onnxqt.trim import trim as fine_tune
from onnxqt.trim.losses import LossName
from onnxqt.verify import Verdict, lsb_difference, verify

CALIBRATION_LIMIT = 512  # samples whose ranges are recorded
VERIFY_LIMIT = 64  # samples on which every exported file is checked
EVALUATION_BATCH = 64
_CACHE_LIMIT = 256 << 20  # bytes of reference outputs kept in memory
CALIBRATION_BATCH = 32
CHECKPOINT = "checkpoint.onnx"
TABLE = "table.json"
TRAINING_FOLDER = "training"
SCHEMES_FOLDER = "schemes"

Data = str | Path | Mapping[str, Array]
Run = Callable[[Mapping[str, Array]], Mapping[str, Array]]


class Progress(Protocol):
    """Told what a run is doing; the command line draws it, the default ignores it."""

    def stage(self, name: str, total: int | None = None) -> None:
        """A stage begins, of `total` parts if known."""

    def advance(self, done: int, note: str = "") -> None:
        """`done` parts of the stage are done."""


class Silent:
    """Progress that nobody looks at."""

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignore it."""

    def advance(self, done: int, note: str = "") -> None:
        """Ignore it."""


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides the model and the data.

    Attributes:
        schemes: what to quantize to, and to become robust to.
        steps: training updates; 0 skips training.
        batch_size: samples of an update.
        learning_rate: peak of AdamW's learning rate.
        seed: of the order of samples and schemes.
        loss: "distill" from the original model, "cross-entropy" with labels, or "auto": cross-entropy if the
            calibration data has labels.
        ranges: how the activations' clips are chosen.
    """

    schemes: tuple[Scheme, ...] = DEFAULT_SCHEMES
    steps: int = 1000
    batch_size: int = 64
    learning_rate: float = DEFAULT_LEARNING_RATE
    seed: int = 0
    loss: Literal["auto", "distill", "cross-entropy"] = "auto"
    ranges: RangeMethod = "mse"

    def __post_init__(self) -> None:
        limits = (("--steps", self.steps, 0), ("--batch-size", self.batch_size, 1), ("--seed", self.seed, 0))
        for name, value, least in limits:
            if value < least:
                raise UsageError(f"{name} is {value}: give a number of at least {least}")
        if not (0 < self.learning_rate < 1):
            raise UsageError(f"--lr is {self.learning_rate:g}: give a number between 0 and 1, such as 1e-4")
        if not self.schemes:
            raise UsageError("no scheme is given: name one with --scheme, such as w4a8-sym-pc")

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in the report."""
        return {**asdict(self), "schemes": [str(scheme) for scheme in self.schemes]}


@dataclass(frozen=True, eq=False)
class Source:
    """A model with its plan, and the samples it is calibrated and judged on."""

    model: Model
    plan: QuantPlan
    samples: Samples
    evaluation: Samples
    batch_size: int
    fixed_batch: int | None

    def batches(self, samples: Samples) -> Iterator[Batch]:
        """Samples as the model takes them: a model with a fixed batch axis gets padded batches."""
        return samples.batches(self.fixed_batch or EVALUATION_BATCH, pad=self.fixed_batch is not None)


def prepare(model: Path, data: Data, evaluation: Data | None = None, settings: Settings | None = None) -> Source:
    """Ingest a model, plan it, and open and check its samples.

    Without `evaluation` the part of `data` that training holds out is the evaluation data.

    Raises:
        ModelError, DataError: naming what is wrong and what to do.
    """
    settings = settings or Settings()
    ingested = ingest(model)
    plan = make_plan(ingested)
    specs = input_specs(ingested)
    fixed = fixed_batch(specs)
    samples = open_samples(data, specs)
    if evaluation is None:
        judged = samples.split(HELD_FRACTION, HELD_LIMIT)[1]
    else:
        judged = open_samples(evaluation, specs)
        require(judged, 1, "the evaluation")
    for labelled in (samples, judged):
        _check_labels(ingested, labelled)
    return Source(ingested, plan, samples, judged, fixed or settings.batch_size, fixed)


def _check_labels(model: Model, samples: Samples) -> None:
    """Labels must be classes of the first output, where it has classes."""
    shape = model.graph.shape(model.graph.outputs[0])
    if samples.has_labels and shape is not None and len(shape) == 2 and shape[1] is not None:
        check_labels(samples, shape[1])


def input_specs(model: Model) -> list[InputSpec]:
    """What the samples must look like."""
    graph = model.graph
    return [InputSpec(name, graph.dtype(name), graph.shape(name) or ()) for name in graph.inputs]


def trim(
    model: str | Path,
    data: Data,
    evaluation: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """The whole job: fine-tune a model and write its checkpoint, quantized files, table and report.

    Args:
        model: an ONNX file.
        data: samples for calibration and training: a directory of .npz or .npy files, or arrays by input name.
        evaluation: samples for the report; by default the part of `data` that training does not see.
        out: the run directory; by default `<model>-onnxqt` in the current directory.
        settings: see `Settings`.
        progress: see `Progress`.

    Returns:
        The report; the files are in the run directory.

    Raises:
        OnnxqtError: one line that names what is wrong, where, and what to do.
    """
    settings, progress = settings or Settings(), progress or Silent()
    started = time.perf_counter()
    if settings.steps:
        check_trainer()
    progress.stage("read the model and the samples")
    source = prepare(Path(model), data, evaluation, settings)
    folder = make_folder(Path(out) if out is not None else Path(f"{Path(model).stem}-onnxqt"))
    ranges = record_ranges(source, source.model, progress)
    trimmed = _train(source, data, ranges, settings, folder, progress)
    after = record_ranges(source, trimmed.model, progress) if trimmed.best_step else ranges
    write_model(folder / CHECKPOINT, trimmed.model.proto)
    exported = export(source, trimmed.model, after, settings, folder, progress)
    reference = Reference(source)
    quantizers = {
        str(scheme): make_quantizers(source.model, source.plan, ranges, scheme, settings.ranges)
        for scheme in settings.schemes
    }
    results = {}
    for name, scheme in exported.items():
        untouched = quantized_model(source.model, source.plan, quantizers[name])
        results[name] = _judge(name, untouched, scheme, reference, progress)
    findings = Findings(
        model=source.model,
        plan=source.plan,
        settings=settings.as_json(),
        data={
            "calibration": {"samples": source.samples.count, "sha256": source.samples.sha256()},
            "evaluation": {
                "samples": source.evaluation.count,
                "sha256": source.evaluation.sha256(),
                "held_out": evaluation is None,
            },
        },
        original=evaluate(Session(source.model.proto).run, reference),
        checkpoint=evaluate(Session(trimmed.model.proto).run, reference),
        trimmed=trimmed,
        schemes=results,
        files={
            str(file): file_sha256(folder / file)
            for file in (Path(CHECKPOINT), Path(TABLE), *(scheme_file(name) for name in exported))
        },
        seconds=time.perf_counter() - started,
    )
    report = build_report(findings)
    write_json(folder / "report.json", report.content)
    return report


def record_ranges(source: Source, model: Model, progress: Progress | None = None) -> RangeTable:
    """Calibrate a model of the graph that `source` was planned for, on at most 512 samples."""
    progress = progress or Silent()
    samples = source.samples.take(CALIBRATION_LIMIT)
    progress.stage("calibrate", samples.count)
    return calibrate(model, source.plan, samples, source.fixed_batch or CALIBRATION_BATCH, progress.advance)


def export(
    source: Source,
    model: Model,
    ranges: RangeTable,
    settings: Settings,
    folder: Path,
    progress: Progress | None = None,
) -> dict[str, "ExportedScheme"]:
    """Write the quantized file of each scheme and the neutral table; each file is checked before it is written.

    Args:
        source: the plan, and the samples to check with.
        model: the float checkpoint, of the graph that the plan was made for.
        ranges: the checkpoint's activation ranges.
        settings: the schemes, and how clips are chosen.
        folder: an existing folder.
        progress: see `Progress`.

    Returns:
        The quantized models with their checks, by scheme name.

    Raises:
        ContradictionError: if the emulator and ONNX Runtime disagree on a file, which is then not written.
    """
    progress = progress or Silent()
    progress.stage("export and check", len(settings.schemes))
    make_folder(folder / SCHEMES_FOLDER)
    quantizers, exported = {}, {}
    checked = source.samples.take(VERIFY_LIMIT)
    for index, scheme in enumerate(settings.schemes):
        name = str(scheme)
        quantizers[name] = make_quantizers(model, source.plan, ranges, scheme, settings.ranges)
        quantized = quantized_model(model, source.plan, quantizers[name])
        verdict = verify(name, quantized, (batch.inputs for batch in source.batches(checked)))
        write_model(folder / scheme_file(name), quantized)
        exported[name] = ExportedScheme(quantized, verdict)
        progress.advance(index + 1, name)
    write_json(folder / TABLE, neutral_table(model, source.plan, ranges, quantizers))
    return exported


@dataclass(frozen=True, eq=False)
class ExportedScheme:
    """A quantized model that was written, and the check it passed."""

    model: onnx.ModelProto
    verdict: Verdict


def evaluate(run: Run, reference: "Reference", progress: Progress | None = None) -> dict[str, Tally]:
    """Compare a way to run a model with the original over the evaluation samples, per float output."""
    progress = progress or Silent()
    tallies = {name: Tally() for name in reference.outputs}
    for batch, expected in reference:
        outputs = run(batch.inputs)
        for name, tally in tallies.items():
            tally.add(outputs[name][: len(batch.index)], expected[name], batch.labels)
        progress.advance(next(iter(tallies.values())).samples)
    return tallies


class Reference:
    """The evaluation batches with the original model's outputs; kept in memory if they are small."""

    def __init__(self, source: Source) -> None:
        graph = source.model.graph
        self.outputs = tuple(name for name in graph.outputs if graph.is_float(name))
        self.count = source.evaluation.count
        self._source = source
        self._session = Session(source.model.proto)
        self._kept: list[dict[str, Array]] = []
        self._complete = False

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Array]]]:
        for index, batch in enumerate(self._source.batches(self._source.evaluation)):
            if self._complete:
                yield batch, self._kept[index]
                continue
            outputs = self._session.run(batch.inputs)
            expected = {name: outputs[name][: len(batch.index)] for name in self.outputs}
            if index == len(self._kept) and self._bytes(expected) * (index + 1) < _CACHE_LIMIT:
                self._kept.append(expected)
            yield batch, expected
        self._complete = len(self._kept) == index + 1

    @staticmethod
    def _bytes(outputs: Mapping[str, Array]) -> int:
        return sum(output.nbytes for output in outputs.values())


def scheme_file(name: str) -> Path:
    """Where the quantized file of a scheme lies in a run directory."""
    return Path(SCHEMES_FOLDER) / f"{name}.onnx"


def _train(
    source: Source, data: Data, ranges: RangeTable, settings: Settings, folder: Path, progress: Progress
) -> Trimmed:
    if not settings.steps:
        return Trimmed(source.model, 0, 0, 0.0, 0.0, ())
    seen, _ = source.samples.split(HELD_FRACTION, HELD_LIMIT)
    require(seen, source.batch_size, "one training batch")
    automatic: LossName = "cross-entropy" if source.samples.has_labels else "distill"
    loss = automatic if settings.loss == "auto" else settings.loss
    workplace = make_folder(folder / TRAINING_FOLDER)
    run = TrimSettings(
        settings.schemes,
        settings.steps,
        source.batch_size,
        settings.learning_rate,
        settings.seed,
        loss,
        settings.ranges,
    )
    progress.stage("trim", settings.steps)
    where = _on_disk(data, workplace)
    return fine_tune(source.model, source.plan, ranges, where, run, workplace, _shown(progress))


def _on_disk(data: Data, folder: Path) -> Path:
    """Where the training process finds the samples; arrays in memory are written into its folder."""
    if isinstance(data, str | Path):
        return Path(data)
    path = folder / "samples.npz"
    np.savez(path, **{name: np.asarray(array) for name, array in data.items()})  # type: ignore[arg-type]
    return path


def _shown(progress: Progress) -> Callable[[dict[str, Any]], None]:
    """Progress in terms of steps, from the training process's reports."""

    def show(report: dict[str, Any]) -> None:
        if report["event"] == "step":
            note = f"loss {report['loss']:.4f}  lambda {report['blend']:.2f}"
            progress.advance(report["step"] + 1, note)

    return show


def _judge(
    name: str, untouched: onnx.ModelProto, exported: ExportedScheme, reference: Reference, progress: Progress
) -> SchemeResult:
    """Run a scheme's files over the evaluation samples: before and after training, and by the emulator."""
    program = load_program(exported.model)
    session = Session(exported.model)
    progress.stage(f"evaluate {name}", 2 * reference.count)
    before = evaluate(Session(untouched).run, reference, progress)
    tallies = {kind: {output: Tally() for output in reference.outputs} for kind in ("trim", "emulator")}
    differences: list[tuple[int, int, int]] = []
    overflows: Counter[str] = Counter()
    for batch, expected in reference:
        optimized, emulated = session.run(batch.inputs), program.run_codes(batch.inputs)
        real = len(batch.index)
        for output in reference.outputs:
            tallies["trim"][output].add(optimized[output][:real], expected[output], batch.labels)
            tallies["emulator"][output].add(emulated.outputs[output][:real], expected[output], batch.labels)
        for output, codes in emulated.codes.items():
            lsb = lsb_difference(optimized[output], emulated.outputs[output], float(codes.params.scale))
            differences.append((int(lsb.max(initial=0)), int(np.count_nonzero(lsb)), lsb.size))
        overflows.update(emulated.overflows)
        progress.advance(reference.count + tallies["trim"][reference.outputs[0]].samples)
    return SchemeResult(
        ptq=before,
        trim=tallies["trim"],
        emulator=tallies["emulator"],
        max_lsb=max(worst for worst, _, _ in differences) if differences else None,
        mismatch_fraction=(
            sum(n for _, n, _ in differences) / sum(n for _, _, n in differences) if differences else None
        ),
        float_nodes=program.float_nodes,
        overflows=dict(+overflows),
        verdict=exported.verdict,
    )
