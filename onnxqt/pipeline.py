"""The stages in order: from a model file and a folder of samples to a run directory and its report."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import onnx

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate
from onnxqt.candidates import Candidate, mean_error
from onnxqt.data import Batch, Samples, check_labels, fixed_batch, open_samples, require
from onnxqt.errors import ModelError, UnboundedError, UsageError
from onnxqt.evaluate import Reference, Tallies, evaluate, evaluate_file
from onnxqt.export import neutral_table
from onnxqt.files import file_sha256, make_folder, write_json, write_model
from onnxqt.ingest import ingest
from onnxqt.ingest.files import EMBED_LIMIT
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.pictures import TAILS_PICTURE, TRAINING_PICTURE, draw_tails, draw_training
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.ptq import PtqSettings, Step, equalize, improve
from onnxqt.report import Findings, Report, SchemeResult, build_report
from onnxqt.runtime import Session
from onnxqt.schemes import DEFAULT_SCHEMES, Scheme
from onnxqt.trim import Regime, Subject, Trimmed, TrimSettings, check_trainable, scheme_regime
from onnxqt.trim import trim as fine_tune
from onnxqt.trim.job import SAMPLES
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT
from onnxqt.verify import Verdict, verify

CALIBRATION_LIMIT = 512  # samples whose ranges are recorded
CALIBRATION_BATCH = 32
VERIFY_LIMIT = 64  # samples on which every exported file is checked
EVALUATION_BATCH = 64
EQUALIZE_LIMIT = 128  # samples on which equalization is judged

CHECKPOINT = "checkpoint.onnx"
TABLE = "table.json"
REPORT = "report.json"
TRAINING_FOLDER = "training"
SCHEMES_FOLDER = "schemes"

Data = str | Path | Mapping[str, Array]
Equalize = Literal["auto", "always", "never"]
EQUALIZE: tuple[Equalize, ...] = ("auto", "always", "never")


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
        training: how to fine-tune.
        robust_to: further ways to quantize that the checkpoint is to become robust to.
        ranges: how the activations' clips are chosen.
        equalize: start from the weights after cross-layer equalization: "always", "never", or "auto": where they lose
            less under the schemes on calibration samples.
        ptq: steps of post-training quantization for a baseline in the report of `trim`; see `onnxqt.ptq`.
        strip_qdq: take the quantizers out of a model that is quantized.
    """

    schemes: tuple[Scheme, ...] = DEFAULT_SCHEMES
    training: TrimSettings = field(default_factory=TrimSettings)
    robust_to: tuple[Regime, ...] = ()
    ranges: RangeMethod = "mse"
    equalize: Equalize = "auto"
    ptq: tuple[Step, ...] = ()
    strip_qdq: bool = False

    def __post_init__(self) -> None:
        if not self.schemes:
            raise UsageError("no scheme is given: name one with --scheme, such as w4a8-sym-pc")

    @property
    def regimes(self) -> tuple[Regime, ...]:
        """What the checkpoint is to become robust to, each once."""
        own = [scheme_regime(scheme, self.ranges) for scheme in self.schemes]
        return tuple({regime.name: regime for regime in (*own, *self.robust_to)}.values())

    def as_json(self) -> dict[str, Any]:
        """The settings as they stand in the report."""
        return {
            "schemes": [str(scheme) for scheme in self.schemes],
            "robust_to": [regime.name for regime in self.robust_to],
            "ranges": self.ranges,
            "equalize": self.equalize,
            "ptq": list(self.ptq),
            "strip_qdq": self.strip_qdq,
            "training": {**asdict(self.training), "learning_rate": self.training.peak_rate},
        }


@dataclass(frozen=True, eq=False)
class Source:
    """A model with its plan, and the samples it is calibrated and judged on."""

    model: Model
    plan: QuantPlan
    samples: Samples
    own_evaluation: Samples | None
    batch_size: int
    fixed_batch: int | None

    @property
    def evaluation(self) -> Samples:
        """The samples that results are judged on: those given for it, else what training holds out."""
        return self.own_evaluation or self.samples.split(HELD_FRACTION, HELD_LIMIT)[1]

    @property
    def training(self) -> Samples:
        """The samples that training sees; it holds out the others."""
        return self.samples.split(HELD_FRACTION, HELD_LIMIT)[0]

    def batches(self, samples: Samples) -> Iterator[Batch]:
        """Samples as the model takes them: a model with a fixed batch axis gets padded batches."""
        return samples.batches(self.fixed_batch or EVALUATION_BATCH, pad=self.fixed_batch is not None)


def prepare(model: Path, data: Data, evaluation: Data | None = None, settings: Settings | None = None) -> Source:
    """Ingest a model, plan it, and open and check its samples.

    Raises:
        ModelError, DataError: naming what is wrong and what to do.
    """
    settings = settings or Settings()
    ingested = ingest(model, settings.strip_qdq)
    plan = make_plan(ingested)
    specs = input_specs(ingested)
    fixed = fixed_batch(specs)
    samples = open_samples(data, specs)
    own_evaluation = None if evaluation is None else open_samples(evaluation, specs)
    for labelled in (samples, own_evaluation):
        if labelled is not None:
            _check_labels(ingested, labelled)
    return Source(ingested, plan, samples, own_evaluation, fixed or settings.training.batch_size, fixed)


def _check_labels(model: Model, samples: Samples) -> None:
    """Labels must be classes of the first output, where it has classes."""
    shape = model.graph.shape(model.graph.outputs[0])
    if samples.has_labels and shape is not None and len(shape) == 2 and shape[1] is not None:
        check_labels(samples, shape[1])


@dataclass(frozen=True, eq=False)
class Workspace:
    """What every stage of a run works on."""

    source: Source
    settings: Settings
    folder: Path
    progress: Progress


@dataclass(frozen=True, eq=False)
class ExportedScheme:
    """A quantized model that was written, what it was made of, and the check that it passed.

    A large model (see `Model.is_large`) is not checked: the emulator holds all its weights in memory.
    """

    model: onnx.ModelProto
    made_of: Candidate
    verdict: Verdict | None


def trim(
    model: str | Path,
    data: Data,
    evaluation: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Report:
    """The whole job: fine-tune a model and write its checkpoint, quantized files, table and report.

    Each quantized file is made of the weights that lose less under its scheme on the held-out samples: the
    checkpoint's or, where training did not help, the original ones.

    Args:
        model: an ONNX file.
        data: samples for calibration and training: a directory of .npz or .npy files, or arrays by input name.
        evaluation: samples for the report; by default the part of `data` that training holds out (which also
            picks the checkpoint, so prefer samples of their own).
        out: the run directory; by default `<model>-onnxqt` in the current directory.
        settings: see `Settings`.
        progress: see `Progress`.

    Returns:
        The report; the files are in the run directory.

    Raises:
        OnnxqtError: one line that names what is wrong, where, and what to do.
    """
    started = time.perf_counter()
    work = open_workspace(Path(model), data, evaluation, out, settings, progress)
    if work.source.model.is_large:
        raise ModelError(
            f"'{model}' has more than {EMBED_LIMIT / 2**30:g} GiB of weights, which the trainer and the emulator "
            "cannot hold: use 'onnxqt export' for quantization without training"
        )
    work, ranges = calibrated(work)
    source, settings, folder = work.source, work.settings, work.folder
    original = Candidate(source.model, ranges)
    start = checkpoint = starting_point(work, original)
    trimmed = _train(work, data, start)
    if trimmed.best_step:
        checkpoint = Candidate(trimmed.model, record_ranges(work, trimmed.model), "checkpoint")
    write_model(folder / CHECKPOINT, checkpoint.model.proto)
    if trimmed.steps:
        draw_training(trimmed.history, list(trimmed.helped), folder / TRAINING_PICTURE)
        draw_tails(trimmed.tails, folder / TAILS_PICTURE)
    kept = {name: start for name, helped in trimmed.helped.items() if not helped}
    exported = export(work, checkpoint, kept)
    reference = Reference(source.model, lambda: source.batches(source.evaluation))
    findings = Findings(
        model=source.model,
        plan=source.plan,
        settings=settings.as_json(),
        data=_data_facts(source, held_out=evaluation is None),
        original=evaluate(Session(source.model.proto).run, reference),
        checkpoint=evaluate(Session(checkpoint.model.proto).run, reference),
        trimmed=trimmed,
        losses=settings.training.loss(source.samples.has_labels) if settings.training.steps else None,
        schemes={
            str(scheme): _judge(work, (original, checkpoint), scheme, exported[str(scheme)], reference)
            for scheme in settings.schemes
        },
        files={file: file_sha256(folder / file) for file in (CHECKPOINT, TABLE, *map(scheme_file, exported))},
        seconds=time.perf_counter() - started,
    )
    report = build_report(findings)
    write_json(folder / REPORT, report.content)
    return report


def open_workspace(
    model: Path,
    data: Data,
    evaluation: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Workspace:
    """Read and check everything before the work begins, and only then create the run directory."""
    settings, progress = settings or Settings(), progress or Silent()
    progress.stage("read the model and the samples")
    source = prepare(model, data, evaluation, settings)
    training = settings.training
    if training.steps:
        samples = source.samples
        if check_trainable(source.model, source.plan, training, samples.targets).reason is None:
            require(source.training, source.batch_size, "one training batch")
    folder = make_folder(Path(out) if out is not None else Path(f"{model.stem}-onnxqt"))
    return Workspace(source, settings, folder, progress)


def calibrated(work: Workspace) -> tuple[Workspace, RangeTable]:
    """Calibrate the original model.

    Nodes around tensors that take NaN or infinite values, such as a mask of minus infinity, become float nodes of
    the plan in the workspace that is returned.
    """
    while True:
        source = work.source
        try:
            return work, record_ranges(work, source.model)
        except UnboundedError as error:
            plan = make_plan(source.model, (*source.plan.unbounded, *error.tensors))
            work = replace(work, source=replace(source, plan=plan))


def record_ranges(work: Workspace, model: Model) -> RangeTable:
    """Calibrate a model of the graph that the workspace was planned for, on at most 512 samples."""
    source = work.source
    samples = source.samples.take(CALIBRATION_LIMIT)
    work.progress.stage("calibrate", samples.count)
    batch_size = source.fixed_batch or CALIBRATION_BATCH
    return calibrate(model, source.plan, samples, batch_size, work.progress.advance)


def export(
    work: Workspace,
    checkpoint: Candidate,
    kept: Mapping[str, Candidate] | None = None,
    ptq: tuple[Step, ...] = (),
) -> dict[str, ExportedScheme]:
    """Write the quantized file of each scheme and the neutral table; each file is checked before it is written.

    Args:
        work: the plan, the settings, the samples to check with and the folder to write to.
        checkpoint: what the files are made of; the table describes it under every scheme.
        kept: for some schemes, what their files are made of instead.
        ptq: steps of post-training quantization to take for each file; the table knows nothing of them.

    Returns:
        The quantized models with their checks, by scheme name.

    Raises:
        ContradictionError: if the emulator and ONNX Runtime disagree on a file, which is then not written.
    """
    source, settings = work.source, work.settings
    work.progress.stage("export and check", len(settings.schemes))
    make_folder(work.folder / SCHEMES_FOLDER)
    exported = {}
    for index, scheme in enumerate(settings.schemes):
        name = str(scheme)
        candidate = (kept or {}).get(name, checkpoint)
        quantized = _quantized(work, candidate, scheme, ptq)
        checked = source.batches(source.samples.take(VERIFY_LIMIT))
        verdict = None
        if not source.model.is_large:
            verdict = verify(name, quantized, (batch.inputs for batch in checked))
        write_model(work.folder / scheme_file(name), quantized)
        exported[name] = ExportedScheme(quantized, candidate, verdict)
        work.progress.advance(index + 1)
    write_json(work.folder / TABLE, make_table(work, checkpoint))
    return exported


def _quantized(work: Workspace, candidate: Candidate, scheme: Scheme, ptq: tuple[Step, ...]) -> onnx.ModelProto:
    """The QDQ model of a candidate under a scheme, after these steps of post-training quantization."""
    source, method = work.source, work.settings.ranges
    if not ptq:
        return candidate.quantized(source.plan, scheme, method)
    chosen = PtqSettings(scheme, method, ptq)
    return improve(candidate.model, source.plan, source.samples, chosen).quantized.proto()


def make_table(work: Workspace, checkpoint: Candidate) -> dict[str, Any]:
    """The neutral table of a checkpoint under every scheme of the settings."""
    plan, settings = work.source.plan, work.settings
    quantizers = {str(scheme): checkpoint.quantizers(plan, scheme, settings.ranges) for scheme in settings.schemes}
    return neutral_table(checkpoint.model, plan, checkpoint.ranges, quantizers)


def scheme_file(name: str) -> str:
    """Where the quantized file of a scheme lies in a run directory."""
    return f"{SCHEMES_FOLDER}/{name}.onnx"


def starting_point(work: Workspace, original: Candidate) -> Candidate:
    """What to train or to export: the original weights, or those after cross-layer equalization."""
    source, settings = work.source, work.settings
    if settings.equalize == "never":
        return original
    equalized = equalize(source.model)
    if not equalized.pairs:
        return original
    work.progress.stage("equalize")
    candidate = Candidate(equalized.model, record_ranges(work, equalized.model), "equalized")
    if settings.equalize == "always":
        return candidate
    samples = source.samples.take(EQUALIZE_LIMIT)
    before, after = (
        mean_error(found, source.plan, settings.schemes, settings.ranges, source.batches(samples))
        for found in (original, candidate)
    )
    return candidate if after < before else original


def _train(work: Workspace, data: Data, start: Candidate) -> Trimmed:
    source, settings = work.source, work.settings
    if not settings.training.steps:
        return Trimmed(start.model, 0, 0, 0.0, 0.0, {})
    folder = make_folder(work.folder / TRAINING_FOLDER)
    work.progress.stage("trim", settings.training.steps)
    where = _on_disk(data, folder)
    subject = Subject(start.model, source.plan, start.ranges, settings.regimes, where, source.samples.targets)
    training = replace(settings.training, batch_size=source.batch_size)
    return fine_tune(subject, training, folder, _shown(work.progress))


def _on_disk(data: Data, folder: Path) -> Path:
    """Where the training process finds the samples; arrays in memory are written into its folder."""
    if isinstance(data, str | Path):
        return Path(data)
    path = folder / SAMPLES
    np.savez(path, **{name: np.asarray(array) for name, array in data.items()})  # type: ignore[arg-type]
    return path


def _shown(progress: Progress) -> Callable[[dict[str, Any]], None]:
    """Progress in terms of steps, from the training process's reports."""

    def show(report: dict[str, Any]) -> None:
        if report["event"] == "step":
            progress.advance(report["step"] + 1, f"loss {report['loss']:.4f}  lambda {report['blend']:.2f}")

    return show


def _judge(
    work: Workspace,
    candidates: tuple[Candidate, Candidate],
    scheme: Scheme,
    exported: ExportedScheme,
    reference: Reference,
) -> SchemeResult:
    """Run a scheme over the evaluation samples: original and checkpoint, and the written file by the emulator."""
    original, checkpoint = candidates
    plan, method = work.source.plan, work.settings.ranges
    work.progress.stage(f"evaluate {scheme}", work.source.evaluation.count)
    file = evaluate_file(exported.model, reference, work.progress.advance)

    baseline = None
    if work.settings.ptq:
        baseline = evaluate(Session(_quantized(work, original, scheme, work.settings.ptq)).run, reference)

    def outcome(candidate: Candidate) -> Tallies:
        if candidate is exported.made_of:
            return file.runtime
        return evaluate(Session(candidate.quantized(plan, scheme, method)).run, reference)

    before, after = outcome(original), outcome(checkpoint)
    if exported.verdict is None:
        raise AssertionError("a model that is trimmed is small enough to be checked")
    return SchemeResult(before, after, exported.made_of.origin, file, exported.verdict, baseline)


def _data_facts(source: Source, held_out: bool) -> dict[str, Any]:
    samples, judged = source.samples, source.evaluation
    return {
        "calibration": {"samples": samples.count, "sha256": samples.sha256()},
        "evaluation": {"samples": judged.count, "sha256": judged.sha256(), "held_out": held_out},
    }
