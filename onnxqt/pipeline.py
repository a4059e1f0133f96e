"""The stages in order: from a model file and a folder of samples to a run directory and its report."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import onnx

from onnxqt.calibrate import (
    Quantizers,
    RangeMethod,
    RangeTable,
    calibrate,
    float_nodes,
    make_quantizers,
    overridden,
)
from onnxqt.candidates import Candidate, Origin, Target, mean_error
from onnxqt.data import (
    Batch,
    Data,
    DataSource,
    InputSpec,
    Preprocessing,
    Samples,
    check_labels,
    fixed_batch,
    has_batch_axis,
    is_located,
    locate,
    open_samples,
    require,
)
from onnxqt.data.samples import join
from onnxqt.errors import ModelError, UnboundedError, UsageError
from onnxqt.evaluate import Reference, Tallies, evaluate, evaluate_file
from onnxqt.export import FORMS, Form, quantized_model
from onnxqt.files import file_sha256, make_folder, write_json, write_model
from onnxqt.ingest import ingest
from onnxqt.ingest.files import EMBED_LIMIT
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.overrides import Overrides
from onnxqt.pictures import TAILS_PICTURE, TRAINING_PICTURE, draw_tails, draw_training
from onnxqt.plan import QuantPlan, Rules, make_plan
from onnxqt.ptq import PtqSettings, Step, round_robustly
from onnxqt.ptq.equalize import equalize
from onnxqt.ptq.improve import improve
from onnxqt.report import Findings, Report, SchemeResult, build_report
from onnxqt.runtime import Session
from onnxqt.schemes import DEFAULT_SCHEMES, Grids, Scheme
from onnxqt.table import Table, build_table, check_belongs, table_quantizers, write_table
from onnxqt.trim import Regime, Subject, Trimmed, TrimSettings, check_trainable, scheme_regime
from onnxqt.trim import trim as fine_tune
from onnxqt.trim.job import SAMPLES
from onnxqt.trim.settings import HELD_FRACTION, HELD_LIMIT
from onnxqt.verify import Verdict, verify

CALIBRATION_LIMIT = 512  # samples whose ranges are recorded
CALIBRATION_BATCH = 32
VERIFY_LIMIT = 64  # samples on which every exported file is checked
EVALUATION_BATCH = 64
JUDGED_LIMIT = 256  # held-out samples on which starting points are judged

CHECKPOINT = "checkpoint.onnx"
TABLE = "table.json"
TABLE_ARRAYS = "table.safetensors"  # beside it, as `table.write_table` names it
REPORT = "report.json"
TRAINING_FOLDER = "training"
SCHEMES_FOLDER = "schemes"
SAMPLES_FOLDER = "samples"  # what a program made

Located = DataSource | Mapping[str, Array]
When = Literal["auto", "always", "never"]
WHEN: tuple[When, ...] = ("auto", "always", "never")


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
            less under the schemes on held-out samples.
        robust_rounding: then move the weights so that they round well under all of these (see
            `onnxqt.ptq.round_robustly`): "always", "never", or "auto" as above; except with "never" once more after
            training, where that is better.
        ptq: steps of post-training quantization for a baseline in the report of `trim`; see `onnxqt.ptq`.
        strip_qdq: take the quantizers out of a model that is quantized.
        preprocessing: of samples that are images.
        form: of the quantized files, see `export.quantized_model`.
        opset: of the quantized files; None for what each of them takes.
        overrides: exceptions from the schemes.
    """

    schemes: tuple[Scheme, ...] = DEFAULT_SCHEMES
    training: TrimSettings = field(default_factory=TrimSettings)
    robust_to: tuple[Regime, ...] = ()
    ranges: RangeMethod = "mse"
    equalize: When = "auto"
    robust_rounding: When = "auto"
    ptq: tuple[Step, ...] = ()
    strip_qdq: bool = False
    preprocessing: Preprocessing | None = None
    form: Form = "qdq"
    opset: int | None = None
    overrides: Overrides = field(default_factory=Overrides)

    def __post_init__(self) -> None:
        if not self.schemes:
            raise UsageError("no scheme is given: name one with --scheme, such as w4a8-sym-pc")
        if self.form not in FORMS:
            raise UsageError(f"unknown form '{self.form}': name one of {', '.join(FORMS)}")

    def check_data(self, data: Data | None) -> None:
        """Make sure that there are samples if a scheme needs some.

        Raises:
            UsageError: if there are none; naming such a scheme.
        """
        needing = [str(scheme) for scheme in self.schemes if not (scheme.weight_only or scheme.dynamic)]
        if data is None and (needing or self.ptq):
            what = f"scheme {needing[0]} needs samples to find its ranges on" if needing else "--ptq needs samples"
            raise UsageError(f"{what}: give --data (schemes of float activations, af, and -dyn need none)")

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
            "robust_rounding": self.robust_rounding,
            "ptq": list(self.ptq),
            "strip_qdq": self.strip_qdq,
            "form": self.form,
            "opset": self.opset,
            "overrides": self.overrides.as_json(),
            "training": asdict(self.training),
        }


@dataclass(frozen=True, eq=False)
class Source:
    """A model with its plan, and the samples it is calibrated and judged on.

    Attributes:
        model: the float model.
        plan: its quantizer sites.
        samples: for calibration and training; none where none were given.
        own_evaluation: those given for the report.
        batch_size: of training.
        fixed_batch: the batch size that the model prescribes.
        data: where the samples are, or their arrays.
        own_data: the same of `own_evaluation`.
    """

    model: Model
    plan: QuantPlan
    samples: Samples
    own_evaluation: Samples | None
    batch_size: int
    fixed_batch: int | None
    data: Located | None = None
    own_data: Located | None = None

    @property
    def evaluation(self) -> Samples:
        """The samples that results are judged on: those given for it, else what training holds out."""
        return self.own_evaluation or self.held

    @property
    def training(self) -> Samples:
        """The samples that training sees; it holds out the others."""
        return self.samples.split(HELD_FRACTION, HELD_LIMIT)[0]

    @property
    def held(self) -> Samples:
        """The samples that training holds out."""
        return self.samples.split(HELD_FRACTION, HELD_LIMIT)[1]

    def batches(self, samples: Samples) -> Iterator[Batch]:
        """Samples as the model takes them: a model with a fixed batch axis gets padded batches."""
        return samples.batches(self.fixed_batch or EVALUATION_BATCH, pad=self.fixed_batch is not None)


def prepare(
    model: Path,
    data: Data | None,
    evaluation: Data | None = None,
    settings: Settings | None = None,
    folder: Path | None = None,
) -> Source:
    """Ingest a model, plan it, and open and check its samples.

    Args:
        model: an ONNX file.
        data: samples; None for none.
        evaluation: samples to judge on.
        settings: of the run.
        folder: the run directory, where samples go that a program makes; by default that of the model.

    Raises:
        ModelError, DataError: naming what is wrong and what to do.
        UsageError: if an override or a preprocessing does not fit.
    """
    settings = settings or Settings()
    ingested = ingest(model, settings.strip_qdq)
    plan = make_plan(ingested, rules=Rules(floats=float_nodes(ingested, settings.overrides)))
    for scheme in settings.schemes:
        overridden(scheme.grids, plan, settings.overrides)  # refuses those that match nothing
    specs = input_specs(ingested)
    fixed = fixed_batch(specs)
    place = (folder or run_folder(model)) / SAMPLES_FOLDER
    where, own = (
        None if given is None else located(given, specs, place / name, settings.preprocessing)
        for name, given in (("calibration", data), ("evaluation", evaluation))
    )
    samples = _no_samples(specs) if where is None else open_samples(where, specs)
    own_evaluation = None if own is None else open_samples(own, specs)
    for labelled in (samples, own_evaluation):
        if labelled is not None:
            _check_labels(ingested, labelled)
    batch_size = fixed or settings.training.batch_size
    return Source(ingested, plan, samples, own_evaluation, batch_size, fixed, where, own)


def run_folder(model: Path) -> Path:
    """The run directory of a model where none is given."""
    return Path(f"{model.stem}-onnxqt")


def located(data: Data, specs: list[InputSpec], folder: Path, preprocessing: Preprocessing | None = None) -> Located:
    """Samples as `open_samples` takes them; what a program makes is written into a folder first.

    Raises:
        DataError, UsageError: see `data.locate`.
    """
    if isinstance(data, str | os.PathLike) and is_located(data):
        return DataSource(os.fspath(data), preprocessing)
    if isinstance(data, Mapping) and preprocessing is None:
        return data
    return locate(data, specs, folder, preprocessing)


def _no_samples(specs: list[InputSpec]) -> Samples:
    return join("no samples", (), specs, stacked=not has_batch_axis(specs))


def _check_labels(model: Model, samples: Samples) -> None:
    """Labels must be classes of the first output, where it has classes."""
    shape = model.graph.shape(model.graph.outputs[0])
    if samples.has_labels and shape is not None and len(shape) == 2 and shape[1] is not None:
        check_labels(samples, shape[1])


@dataclass(frozen=True, eq=False)
class Workspace:
    """What every stage of a run works on.

    Attributes:
        source: the model and its samples.
        settings: of the run.
        folder: the run directory.
        progress: told what is done.
        model_file: the float model that the table belongs to.
    """

    source: Source
    settings: Settings
    folder: Path
    progress: Progress
    model_file: Path

    def grids(self, scheme: Scheme) -> Grids:
        """The grids of a scheme, with the exceptions from it."""
        return overridden(scheme.grids, self.source.plan, self.settings.overrides)

    def quantizers(self, candidate: Candidate, scheme: Scheme) -> Quantizers:
        """The parameters of every quantizer of a candidate under a scheme, with the exceptions from it."""
        return self.quantizers_of(candidate, self.grids(scheme))

    def quantizers_of(self, candidate: Candidate, grids: Grids) -> Quantizers:
        """The parameters of every quantizer of a candidate on these grids."""
        return make_quantizers(candidate.model, self.source.plan, candidate.ranges, grids, self.settings.ranges)

    def written(self, model: Model, quantizers: Quantizers) -> onnx.ModelProto:
        """The quantized model of some weights, in the form that the settings ask for."""
        return quantized_model(model, self.source.plan, quantizers, self.settings.form, self.settings.opset)


@dataclass(frozen=True, eq=False)
class ExportedScheme:
    """A quantized model that was written, what it was made of, and the check that it passed.

    A large model (see `Model.is_large`) is not checked: the emulator holds all its weights in memory. Without samples
    none is. What is made of a table was made of no candidate.
    """

    model: onnx.ModelProto
    made_of: Candidate | None
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
        data: samples for calibration and training: a path, arrays by input name, an iterable of such arrays or a
            function that gives one; see `onnxqt.data`.
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
    settings = replace(settings, training=settings.training.settled(start.origin == "rounded"))
    work = replace(work, settings=settings)
    trimmed = _train(work, source.data, start)
    if trimmed.best_step:
        checkpoint = Candidate(trimmed.model, record_ranges(work, trimmed.model), "checkpoint")
        if settings.robust_rounding != "never":
            checkpoint = _best(work, [checkpoint, _rounded(work, checkpoint, "checkpoint")])
    write_model(folder / CHECKPOINT, checkpoint.model.proto)
    work = replace(work, model_file=folder / CHECKPOINT)
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
        files={
            file: file_sha256(folder / file)
            for file in (CHECKPOINT, TABLE, TABLE_ARRAYS, *map(scheme_file, exported))
            if (folder / file).exists()
        },
        seconds=time.perf_counter() - started,
    )
    report = build_report(findings)
    write_json(folder / REPORT, report.content)
    return report


def open_workspace(
    model: Path,
    data: Data | None,
    evaluation: Data | None = None,
    out: str | Path | None = None,
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> Workspace:
    """Read and check everything before the work begins, and only then create the run directory."""
    settings, progress = settings or Settings(), progress or Silent()
    progress.stage("read the model and the samples")
    folder = Path(out) if out is not None else run_folder(model)
    source = prepare(model, data, evaluation, settings, folder)
    training = settings.training
    if training.steps:
        samples = source.samples
        if check_trainable(source.model, source.plan, training, samples.targets).reason is None:
            require(source.training, source.batch_size, "one training batch")
    return Workspace(source, settings, make_folder(folder), progress, model)


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
            rules = Rules(floats=frozenset(source.plan.floats))
            plan = make_plan(source.model, (*source.plan.unbounded, *error.tensors), rules)
            work = replace(work, source=replace(source, plan=plan))


def record_ranges(work: Workspace, model: Model) -> RangeTable:
    """Calibrate a model of the graph that the workspace was planned for, on at most 512 samples.

    Raises:
        UsageError: if there are none, but a scheme needs ranges.
    """
    source = work.source
    if source.data is None:
        work.settings.check_data(None)
        return RangeTable({}, 0)
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
    candidates = {str(scheme): (kept or {}).get(str(scheme), checkpoint) for scheme in work.settings.schemes}
    exported = _exported(work, lambda scheme: _quantized(work, candidates[str(scheme)], scheme, ptq))
    keep_table(work.folder, make_table(work, checkpoint))
    return {name: replace(scheme, made_of=candidates[name]) for name, scheme in exported.items()}


def export_table(work: Workspace, table: Table) -> dict[str, ExportedScheme]:
    """Write the quantized file of each scheme with the parameters of a table; each is checked before it is written.

    Args:
        work: the plan, the settings with schemes of the table, the samples to check with, if any, and the folder.
        table: perhaps edited since it was made.

    Raises:
        ExportError: if the table is not of this model, or lacks a scheme or tensor.
        ContradictionError: if the emulator and ONNX Runtime disagree on a file, which is then not written.
    """
    source = work.source
    check_belongs(table, source.model)
    plan = plan_of(table, source.model, source.plan)
    work = replace(work, source=replace(source, plan=plan))
    quantizers = {str(scheme): table_quantizers(table, plan, str(scheme)) for scheme in work.settings.schemes}
    return _exported(work, lambda scheme: work.written(source.model, quantizers[str(scheme)]))


def _exported(work: Workspace, make: Callable[[Scheme], onnx.ModelProto]) -> dict[str, ExportedScheme]:
    """Make the file of each scheme, check it and write it."""
    source, schemes = work.source, work.settings.schemes
    work.progress.stage("export and check", len(schemes))
    make_folder(work.folder / SCHEMES_FOLDER)
    exported = {}
    for index, scheme in enumerate(schemes):
        name, quantized = str(scheme), make(scheme)
        verdict = None
        if source.samples.count and not source.model.is_large:
            checked = source.batches(source.samples.take(VERIFY_LIMIT))
            verdict = verify(name, quantized, (batch.inputs for batch in checked))
        write_model(work.folder / scheme_file(name), quantized)
        exported[name] = ExportedScheme(quantized, None, verdict)
        work.progress.advance(index + 1)
    return exported


def _quantized(work: Workspace, candidate: Candidate, scheme: Scheme, ptq: tuple[Step, ...]) -> onnx.ModelProto:
    """The quantized model of a candidate under a scheme, after these steps of post-training quantization."""
    if not ptq:
        return work.written(candidate.model, work.quantizers(candidate, scheme))
    chosen = PtqSettings(work.grids(scheme), work.settings.ranges, ptq)
    improved = improve(candidate.model, work.source.plan, work.source.samples, chosen).quantized
    return work.written(improved.model, improved.quantizers)


def make_table(work: Workspace, checkpoint: Candidate) -> Table:
    """The neutral table of a checkpoint under every scheme of the settings."""
    quantizers = {str(scheme): work.quantizers(checkpoint, scheme) for scheme in work.settings.schemes}
    file = work.model_file
    table = build_table(checkpoint.model, work.source.plan, checkpoint.ranges, quantizers, file.name)
    return replace(table, model_sha256=file_sha256(file))


def keep_table(folder: Path, table: Table) -> None:
    """Write a table into a run directory, in place of an earlier one."""
    if folder / TABLE_ARRAYS not in write_table(table, folder / TABLE):
        (folder / TABLE_ARRAYS).unlink(missing_ok=True)


def plan_of(table: Table, model: Model, plan: QuantPlan | None = None) -> QuantPlan:
    """The plan that a table was made for: what it keeps float under every scheme stays float.

    Args:
        table: of the model.
        model: the float model.
        plan: what is known of it otherwise; by default the model's own plan.
    """
    plan = plan or make_plan(model)
    floats = {entry.name for entry in table.entries if not entry.views}
    weighted = frozenset(node.name for node in plan.integer_nodes if node.weight and node.weight.tensor in floats)
    bounded = any(entry.views for entry in table.entries if entry.role in ("input", "activation", "output"))
    unbounded = [site.tensor for site in plan.activations if bounded and site.tensor in floats]
    if not weighted and not unbounded:
        return plan
    return make_plan(model, (*plan.unbounded, *unbounded), Rules(floats=weighted.union(plan.floats)))


def scheme_file(name: str) -> str:
    """Where the quantized file of a scheme lies in a run directory."""
    return f"{SCHEMES_FOLDER}/{name}.onnx"


def starting_point(work: Workspace, original: Candidate) -> Candidate:
    """What to train or to export: the original weights, or those after equalization and robust rounding."""
    source, settings = work.source, work.settings
    candidates = [original]
    if settings.equalize != "never" and (equalized := equalize(source.model)).pairs:
        work.progress.stage("equalize")
        candidate = Candidate(equalized.model, record_ranges(work, equalized.model), "equalized")
        candidates = [candidate] if settings.equalize == "always" else [original, candidate]
    if settings.robust_rounding != "never":
        rounded = [_rounded(work, candidate) for candidate in candidates]
        candidates = rounded if settings.robust_rounding == "always" else [*candidates, *rounded]
    return _best(work, candidates)


def _best(work: Workspace, candidates: Sequence[Candidate]) -> Candidate:
    """The candidate that loses least under the schemes on held-out samples; the first where nothing can be compared."""
    source, settings = work.source, work.settings
    graph = source.model.graph
    if len(candidates) == 1 or not any(graph.is_float(name) for name in graph.outputs):
        return candidates[0]
    work.progress.stage("compare the weights", len(candidates))
    samples = source.held.take(JUDGED_LIMIT)
    target = Target(source.plan, [work.grids(scheme) for scheme in settings.schemes], settings.ranges)
    errors = []
    for candidate in candidates:
        errors.append(mean_error(candidate, source.model, target, source.batches(samples)))
        work.progress.advance(len(errors), candidate.origin)
    return candidates[errors.index(min(errors))]


def _rounded(work: Workspace, candidate: Candidate, origin: Origin = "rounded") -> Candidate:
    source = work.source
    layers = [node for node in source.plan.integer_nodes if node.weight]
    work.progress.stage("round robustly", len(layers))
    grids = [regime.grids for regime in _regimes(work)]
    found = round_robustly(candidate.model, source.plan, grids, source.training, progress=work.progress.advance)
    return Candidate(found.model, record_ranges(work, found.model), origin)


def _train(work: Workspace, data: Located | None, start: Candidate) -> Trimmed:
    source, settings = work.source, work.settings
    if not settings.training.steps:
        return Trimmed(start.model, 0, 0, 0.0, 0.0, {})
    folder = make_folder(work.folder / TRAINING_FOLDER)
    work.progress.stage("trim", settings.training.steps)
    where = _on_disk(work, data, folder)
    targets = source.samples.targets
    subject = Subject(
        start.model, source.model, source.plan, start.ranges, _regimes(work), where, targets, start.origin == "rounded"
    )
    training = replace(settings.training, batch_size=source.batch_size)
    return fine_tune(subject, training, folder, _shown(work.progress))


def _on_disk(work: Workspace, data: Located | None, folder: Path) -> DataSource:
    """Where the training process finds the samples; arrays in memory are written into its folder."""
    return locate(data or {}, input_specs(work.source.model), folder / SAMPLES)


def _regimes(work: Workspace) -> tuple[Regime, ...]:
    """What the checkpoint is to become robust to; the schemes of its files with the exceptions from them."""
    own = {str(scheme): work.grids(scheme) for scheme in work.settings.schemes}
    return tuple(replace(regime, grids=own.get(regime.name, regime.grids)) for regime in work.settings.regimes)


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
    work.progress.stage(f"evaluate {scheme}", work.source.evaluation.count)
    file = evaluate_file(exported.model, reference, work.progress.advance)

    baseline = None
    if work.settings.ptq:
        baseline = evaluate(Session(_quantized(work, original, scheme, work.settings.ptq)).run, reference)

    def outcome(candidate: Candidate) -> Tallies:
        if candidate is exported.made_of:
            return file.runtime
        return evaluate(Session(_quantized(work, candidate, scheme, ())).run, reference)

    before, after = outcome(original), outcome(checkpoint)
    if exported.verdict is None or exported.made_of is None:
        raise AssertionError("a model that is trimmed is small enough to be checked")
    return SchemeResult(before, after, exported.made_of.origin, file, exported.verdict, baseline)


def _data_facts(source: Source, held_out: bool) -> dict[str, Any]:
    samples, judged = source.samples, source.evaluation
    return {
        "calibration": {"samples": samples.count, "sha256": samples.sha256(), **_preprocessed(source.data)},
        "evaluation": {
            "samples": judged.count,
            "sha256": judged.sha256(),
            "held_out": held_out,
            **_preprocessed(source.data if held_out else source.own_data),
        },
    }


def _preprocessed(data: Located | None) -> dict[str, Any]:
    """What was done to images; nothing is said of other samples."""
    steps = data.preprocessing if isinstance(data, DataSource) else None
    return {} if steps is None else {"preprocessing": steps.plain()}
