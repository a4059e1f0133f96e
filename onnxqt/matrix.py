"""How accurate models are on every back end: {original, trimmed ...} x {profiles} x {precisions}.

In a cell, the compiler of the profile quantizes the float model (`onnxqt.compiler`), the emulator computes as its
device does, and the outputs over the evaluation samples are compared with those of the original float model:

    top-1          share of right samples (with labels); agreement with the original float model (without)
    gap            top-1 of the original float model - top-1 of the cell; with agreement: 1 - agreement
    mean gap       over all cells of a model
    spread         largest - smallest top-1 (or agreement) of its cells

A cell that is done is in the file at once; a run with the same inputs goes on from there. What makes inputs the same
is the key of a cell: hashes of the models, the samples, the profile and the code of this package.
"""

import contextlib
import functools
import hashlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate, make_quantizers
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.data import Batch, Samples
from onnxqt.emulate import Program, load_program
from onnxqt.errors import EmulatorError, ModelError, OnnxqtError, UnboundedError, UsageError, first_line
from onnxqt.evaluate import Reference, Tallies, evaluate
from onnxqt.export import quantized_model
from onnxqt.files import write_json
from onnxqt.metrics import Tally
from onnxqt.model import GraphIndex, Model, Node, input_specs
from onnxqt.numerics import Array, dequantize
from onnxqt.ops import Kind, lookup
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.profiles import Policy, Precision, Profile, parse_precision
from onnxqt.report import environment
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import Scheme
from onnxqt.survey.macs import UnknownMacsError, macs
from onnxqt.survey.sizes import find_sizes

SCHEMA_VERSION = "1.0"
DYNAMIC = "only products with weights run on integers where scales are computed at run time"
LAYER_SAMPLES = 64  # on which layers are compared one by one
SCHEME_RANGES: RangeMethod = "mse"  # how the clips of schemes are chosen, as `onnxqt export` does by default

Json = dict[str, Any]
Column = Precision | Scheme
Advance = Callable[[int, str], None]
_Floats = dict[str, tuple[str, str]]  # operator and reason of a float node, by its name


@dataclass(frozen=True, eq=False)
class Subject:
    """A float model and how it is called."""

    name: str
    model: Model


@dataclass(frozen=True, eq=False)
class Task:
    """What a matrix is made of.

    Attributes:
        subjects: the models, the original first.
        calibration: samples whose ranges are recorded.
        evaluation: samples that the results are judged on.
        batches: makes batches of samples, as the models take them.
        calibration_batch: samples that are calibrated at once.
        profiles: the back ends.
        precisions: asked of every profile that has them; empty: see `columns_of`.
        schemes: ways to quantize without a compiler, run in the arithmetic of every profile.
    """

    subjects: tuple[Subject, ...]
    calibration: Samples
    evaluation: Samples
    batches: Callable[[Samples], Iterator[Batch]]
    calibration_batch: int
    profiles: tuple[Profile, ...]
    precisions: tuple[Precision, ...] = ()
    schemes: tuple[Scheme, ...] = ()

    @property
    def columns(self) -> tuple[tuple[Profile, Column], ...]:
        """Each profile with each of its columns."""
        return tuple((profile, column) for profile in self.profiles for column in self.columns_of(profile))

    @functools.cached_property
    def data(self) -> Json:
        """What the samples are."""
        both = {"calibration": self.calibration, "evaluation": self.evaluation}
        return {name: {"samples": samples.count, "sha256": samples.sha256()} for name, samples in both.items()}

    def columns_of(self, profile: Profile) -> tuple[Column, ...]:
        """What is asked of a profile; without a choice its default precision, the dynamic ones, and w4a8."""
        offered = tuple(map(parse_precision, profile.policy.precisions))
        if self.precisions:
            return (*(precision for precision in self.precisions if precision in offered), *self.schemes)
        if self.schemes:
            return self.schemes
        return tuple(p for p in offered if p == offered[0] or p.dynamic or p == Precision(4, 8))

    def check(self) -> None:
        """Make sure that there is something to do, and that the models can be compared.

        Raises:
            UsageError, ModelError: if not.
        """
        if not self.columns:
            names = ", ".join(map(str, self.precisions))
            raise UsageError(f"no profile has the precision {names}: see 'onnxqt profiles' for those that they have")
        original = self.subjects[0]
        wanted = [name for name in original.model.graph.outputs if original.model.graph.is_float(name)]
        if not wanted:
            raise ModelError(f"'{original.name}' has no float output, so nothing can be compared: give it one")
        for other in self.subjects[1:]:
            if input_specs(other.model) != input_specs(original.model):
                raise ModelError(
                    f"'{other.name}' has other inputs ({_shown(other.model.graph.inputs)}) than '{original.name}' "
                    f"({_shown(original.model.graph.inputs)}), or of other shapes: give models of the same network"
                )
            missing = set(wanted) - set(other.model.graph.outputs)
            if missing:
                raise ModelError(
                    f"'{other.name}' has no output {_shown(sorted(missing))}, which '{original.name}' has: "
                    "give models of the same network"
                )


@dataclass(frozen=True)
class Cell:
    """A model on a back end.

    Attributes:
        model: name of the subject.
        profile: name of the back end.
        column: name of the precision or the scheme.
        key: hash of everything that the result depends on.
        seconds: that it took.
        result: what was found (see matrix.schema.json), None if it failed.
        error: why it failed, else None.
    """

    model: str
    profile: str
    column: str
    key: str
    seconds: float
    result: Json | None
    error: str | None

    @property
    def accuracy(self) -> float | None:
        """Top-1, or agreement without labels; None if the cell failed or the model has no classes."""
        return _accuracy(self.result)


@dataclass(frozen=True, eq=False)
class Matrix:
    """All cells that are done.

    Attributes:
        task: what was asked.
        floats: what the float models do, by name of the subject.
        cells: in the order of the columns of the task, of each the subjects.
    """

    task: Task
    floats: Mapping[str, Json]
    cells: tuple[Cell, ...]

    def cell(self, model: str, profile: str, column: str) -> Cell | None:
        """One cell; None where it is not asked for or not done."""
        return self._by_place.get((model, profile, column))

    @functools.cached_property
    def _by_place(self) -> dict[tuple[str, str, str], Cell]:
        return {(cell.model, cell.profile, cell.column): cell for cell in self.cells}

    @property
    def summary(self) -> tuple[Json, ...]:
        """Per model, over the columns in which no model failed: mean gap to the original float model, and spread."""
        names = [subject.name for subject in self.task.subjects]
        places = [(profile.name, str(column)) for profile, column in self.task.columns]
        rows = {place: [self.cell(name, *place) for name in names] for place in places}
        complete = [row for row in rows.values() if all(cell and cell.accuracy is not None for cell in row)]
        target = _accuracy(self.floats[names[0]])
        summary = []
        for index, name in enumerate(names):
            shares = [cell.accuracy for row in complete if (cell := row[index]) and cell.accuracy is not None]
            known = bool(shares) and target is not None
            summary.append(
                {
                    "model": name,
                    "cells": len(shares),
                    "mean_gap": (target or 0.0) - math.fsum(shares) / len(shares) if known else None,
                    "spread": max(shares) - min(shares) if shares else None,
                }
            )
        return tuple(summary)

    def as_json(self) -> Json:
        """The form for machines (schema: onnxqt/matrix.schema.json)."""
        task = self.task
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "models": [
                {"name": subject.name, "sha256": subject.model.sha256, "float": self.floats[subject.name]}
                for subject in task.subjects
            ],
            "data": task.data,
            "profiles": [
                {
                    **{key: getattr(profile, key) for key in ("name", "title", "evidence", "source", "assumed")},
                    "columns": [str(column) for column in task.columns_of(profile)],
                }
                for profile in task.profiles
            ],
            "cells": [asdict(cell) for cell in self.cells],
            "summary": list(self.summary),
        }


def make_matrix(task: Task, path: Path, advance: Advance = lambda done, note: None) -> Matrix:
    """Compute every cell that `path` does not hold already, and write each there as soon as it is done.

    Args:
        task: what to compute; `Task.check` passed.
        path: the JSON file; what it holds of another task is dropped.
        advance: called with the number of cells done and what is going on.
    """
    advance(0, "float models")
    original = task.subjects[0]
    reference = Reference(original.model, lambda: task.batches(task.evaluation))
    benches = [_Bench(task, subject, reference) for subject in task.subjects]
    floats = {bench.subject.name: _outcome(evaluate(bench.float_run, reference)) for bench in benches}
    inputs = [_code_digest(), _identity(original), task.data]
    earlier = _earlier(path)
    cells: list[Cell] = []
    for profile, column in task.columns:
        for bench in benches:
            key = _digest(
                [*inputs, _identity(bench.subject), asdict(profile.policy), asdict(profile.arithmetic)], column
            )
            name, done = f"{profile.name} {column} {bench.subject.name}", len(cells)
            advance(done, name)
            if key in earlier:
                found = replace(earlier[key], model=bench.subject.name, profile=profile.name, column=str(column))
            else:
                found = bench.cell(profile, column, key, functools.partial(_tell, advance, done, name))
            cells.append(found)
            write_json(path, Matrix(task, floats, tuple(cells)).as_json())
    advance(len(cells), "")
    return Matrix(task, floats, tuple(cells))


def _tell(advance: Advance, done: int, name: str, samples: int) -> None:
    advance(done, f"{name} {samples}")


class _Bench:
    """A subject with what all its cells share."""

    def __init__(self, task: Task, subject: Subject, reference: Reference) -> None:
        self.subject = subject
        self._task, self._model, self._reference = task, subject.model, reference
        self._plans: dict[tuple[str, tuple[str, ...]], QuantPlan] = {}

    @functools.cached_property
    def float_run(self) -> Callable[[Mapping[str, Array]], dict[str, Array]]:
        """The float model."""
        return Session(self._model.proto).run

    @functools.cached_property
    def _calibrated(self) -> tuple[RangeTable, tuple[str, ...]]:
        """The ranges of all tensors that any profile quantizes, and the tensors that no grid can hold."""
        unbounded: tuple[str, ...] = ()
        while True:
            sites = {
                site.tensor: site
                for profile, column in self._task.columns
                for site in self._plan(profile, column, unbounded).activations
            }
            plan = QuantPlan(tuple(sites.values()), (), (), unbounded)
            try:
                task = self._task
                return calibrate(self._model, plan, task.calibration, task.calibration_batch), unbounded
            except UnboundedError as error:
                unbounded = (*unbounded, *error.tensors)

    def _plan(self, profile: Profile, column: Column, unbounded: tuple[str, ...]) -> QuantPlan:
        """Where quantizers go: as the compiler puts them or, for a scheme, as this package's own export does."""
        own = isinstance(column, Scheme)
        key = ("" if own else profile.name, unbounded)
        if key not in self._plans:
            model = self._model
            self._plans[key] = make_plan(model, unbounded) if own else compiler_plan(model, profile.policy, unbounded)
        return self._plans[key]

    def cell(self, profile: Profile, column: Column, key: str, progress: Callable[[int], None]) -> Cell:
        """What one back end makes of the subject; why it fails, if it does."""
        started = time.perf_counter()
        ranges, unbounded = self._calibrated
        result, failure = None, None
        try:
            with _as_reason():
                plan = self._plan(profile, column, unbounded)
                quantized = _quantized(self._model, ranges, plan, profile.policy, column)
                run = _Run(load_program(quantized, profile.arithmetic), plan, profile.policy, column)
                result = self._judged(run, progress)
        except OnnxqtError as error:
            failure = str(error)
        seconds = time.perf_counter() - started
        return Cell(self.subject.name, profile.name, str(column), key, seconds, result, failure)

    def _judged(self, run: "_Run", progress: Callable[[int], None]) -> Json:
        overflows: Counter[str] = Counter()
        lock = threading.Lock()

        def outputs(inputs: Mapping[str, Array]) -> dict[str, Array]:
            result = run.program.run_codes(inputs)
            with lock:
                overflows.update(result.overflows)
            return result.outputs

        tallies = evaluate(outputs, self._reference, progress)
        floats = run.float_nodes
        ends = self._ends(run, floats)
        return {
            **_outcome(tallies),
            "worst_layer": self._worst_layer(run.program),
            "integer_macs": self._integer_macs(run.program, floats),
            "boundaries": run.dynamic_boundaries + len({end for crossing in ends.values() for end in crossing}),
            "float_nodes": [
                {"node": name, "op_type": op_type, "reason": reason} for name, (op_type, reason) in floats.items()
            ],
            "costliest": self._costliest(run, floats, ends),
            "overflows": dict(sorted((+overflows).items())),
        }

    def _worst_layer(self, program: Program) -> Json | None:
        """The quantized tensor that is farthest from the float model's, in terms of its signal-to-noise ratio."""
        known = {*self._model.graph.producer, *self._model.graph.inputs}
        names = {real: name for name in program.tensors if (real := _real_name(name)) in known}
        if not names:
            return None
        inside = [real for real in names if real not in self._model.graph.inputs]
        session = Session(with_outputs(self._model.proto, inside), outputs=inside)
        tallies = {real: Tally() for real in names}
        for batch in self._task.batches(self._task.evaluation.take(LAYER_SAMPLES)):
            expected = {**batch.inputs, **session.run(batch.inputs)}
            found = program.run_codes(batch.inputs, tuple(names.values())).codes
            for real, name in names.items():
                values = dequantize(found[name].codes, found[name].params)
                tallies[real].add(batch.real(values), batch.real(expected[real]))
        ratios = {name: ratio for name, tally in tallies.items() if (ratio := tally.fidelity()["snr_db"]) is not None}
        worst = min(ratios, key=lambda name: ratios[name], default=None)
        return None if worst is None else {"tensor": worst, "snr_db": ratios[worst]}

    @functools.cached_property
    def _graph(self) -> GraphIndex:
        """The graph with the shapes of one sample."""
        return find_sizes(self._model).graph

    @functools.cached_property
    def _macs(self) -> dict[str, int]:
        """Multiply-accumulates of each node for which they are known."""
        graph = self._graph
        known = {}
        for node in graph.nodes:
            with contextlib.suppress(UnknownMacsError):
                known[node.name] = macs(node, graph.shape)
        return known

    def _integer_macs(self, program: Program, floats: _Floats) -> float | None:
        """Share of the known multiply-accumulates that run on integers; None if there are none."""
        total = sum(self._macs.values())
        integer = sum(self._macs.get(info.name, 0) for info in program.integer_nodes if info.name not in floats)
        return integer / total if total else None

    def _ends(self, run: "_Run", floats: _Floats) -> dict[str, list[tuple[str, bool]]]:
        """Where codes become floats and back: (tensor, whether it becomes floats) by the name of the float node."""
        graph, quantized = self._graph, {_real_name(name) for name in run.program.tensors}
        ends = {}
        for node in graph.nodes:
            if node.name in floats:
                read = [t for t in node.inputs if t in quantized and graph.producer.get(t, node).name not in floats]
                written = [
                    t
                    for t in node.outputs
                    if t in quantized and any(reader.name not in floats for reader in graph.consumers.get(t, ()))
                ]
                ends[node.name] = [*((tensor, True) for tensor in read), *((tensor, False) for tensor in written)]
        return ends

    def _costliest(self, run: "_Run", floats: _Floats, ends: Mapping[str, Sequence[tuple[str, bool]]]) -> Json | None:
        """The island of float nodes across whose ends most values go between codes and floats, and what to change.

        Of its nodes the first one is named for which there is advice, or else the first that computes something.
        """
        graph = self._graph
        best, most = None, 0
        for island in _islands(graph, floats):
            crossing = {end for node in island for end in ends[node.name]}
            values = sum(math.prod(size or 1 for size in graph.shape(tensor) or ()) for tensor, _ in crossing)
            if values > most:
                best, most = island, values
        if best is None:
            return None
        advice = {node.name: advice_for(node, graph, run.policy) for node in best}
        computes = [node for node in best if lookup(node.op_type, node.domain).kind is not Kind.SAME_GRID]
        node = next((node for node in best if advice[node.name]), (computes or best)[0])
        op_type, reason = floats[node.name]
        return {
            **{"node": node.name, "op_type": op_type, "reason": reason},
            **{"values_per_sample": most, "advice": advice[node.name]},
        }


def _islands(graph: GraphIndex, floats: Collection[str]) -> list[list[Node]]:
    """Groups of float nodes that hand each other their results, each in topological order."""
    island_of: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.name not in floats:
            continue
        before = [island_of[p.name] for t in node.inputs if (p := graph.producer.get(t)) and p.name in island_of]
        merged = list({member.name: member for island in before for member in island}.values())
        merged.append(node)
        island_of.update((member.name, merged) for member in merged)
    return list({id(island): island for island in island_of.values()}.values())


@contextlib.contextmanager
def _as_reason() -> Iterator[None]:
    """Makes an error that nobody foresaw the reason why one cell failed: the others must not be lost to it."""
    try:
        yield
    except OnnxqtError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise EmulatorError(f"this should not happen ({text}): report the model and the profile") from error


@dataclass(frozen=True, eq=False)
class _Run:
    """A program with what its compiler decided."""

    program: Program
    plan: QuantPlan
    policy: Policy
    column: Column

    @property
    def _dynamic(self) -> bool:
        return isinstance(self.column, Precision) and self.column.dynamic

    @property
    def float_nodes(self) -> _Floats:
        """Operator and reason of each node that runs in float.

        The emulator reads a file, where a float node between DequantizeLinear and QuantizeLinear looks like an
        integer one; that it is not is for the compiler to say.
        """
        reasons = {node.name: node.reason for node in self.plan.float_nodes}
        return {
            info.name: (info.op_type, reasons.get(info.name, DYNAMIC if self._dynamic else info.reason))
            for info in self.program.nodes
            if info.kind == "float" or (info.kind == "integer" and info.name in reasons)
        }

    @property
    def dynamic_boundaries(self) -> int:
        """With scales that are computed at run time, every product takes floats and gives out floats."""
        return 2 * len(self.program.integer_nodes) if self._dynamic else 0


def _quantized(model: Model, ranges: RangeTable, plan: QuantPlan, policy: Policy, column: Column) -> onnx.ModelProto:
    if isinstance(column, Scheme):
        return quantized_model(model, plan, make_quantizers(model, plan, ranges, column, SCHEME_RANGES))
    return compile_model(model, ranges, plan, policy, column)


def _real_name(tensor: str) -> str:
    """The float model's name of a tensor of a quantized file (`onnxqt.export.qdq`)."""
    return tensor.rstrip("_").removesuffix(".dequantized") if ".dequantized" in tensor else tensor


def _outcome(tallies: Tallies) -> Json:
    """What the first output is worth."""
    first = next(iter(tallies.values()))
    return {"metrics": first.metrics(), "fidelity": first.fidelity(), **first.confidence()}


def _accuracy(outcome: Json | None) -> float | None:
    metrics = outcome["metrics"] if outcome else {}
    share: float | None = metrics.get("top1", metrics.get("agreement"))
    return share


# --- resuming -------------------------------------------------------------------------------------------


def _earlier(path: Path) -> dict[str, Cell]:
    """The cells of a file that did not fail, by key; none where there is no file, or it is none of ours."""
    try:
        cells = [Cell(**cell) for cell in json.loads(path.read_bytes())["cells"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return {cell.key: cell for cell in cells if cell.result is not None}


def _identity(subject: Subject) -> list[Any]:
    return [subject.model.sha256, list(subject.model.changes)]


def _digest(inputs: list[Any], column: Column) -> str:
    text = json.dumps([*inputs, type(column).__name__, str(column)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_digest() -> str:
    """Of the source of this package: what other code computed is not taken over."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _shown(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names)


# --- what to change in a model --------------------------------------------------------------------------


_When = Callable[[Node, GraphIndex], bool]


def _always(node: Node, graph: GraphIndex) -> bool:
    return True


def _with_constant(node: Node, graph: GraphIndex) -> bool:
    return any(tensor in graph.initializers for tensor in node.inputs)


def _without_constant(node: Node, graph: GraphIndex) -> bool:
    return not _with_constant(node, graph)


def _with_constant_second(node: Node, graph: GraphIndex) -> bool:
    return len(node.inputs) > 1 and node.inputs[1] in graph.initializers


def _at_the_end(node: Node, graph: GraphIndex) -> bool:
    return any(tensor in graph.outputs for tensor in node.outputs)


@dataclass(frozen=True, slots=True)
class _Advice:
    """What can stand in place of a float operator.

    Attributes:
        operators: of which it is true.
        text: what to do.
        needs: operators that the back end must run on integers.
        when: of which of their nodes it is true.
    """

    operators: tuple[str, ...]
    text: str
    needs: tuple[str, ...] = ()
    when: _When = _always


_SMOOTH = (
    *("HardSwish", "HardSigmoid", "Sigmoid", "Tanh", "Gelu", "Elu", "Selu", "Celu", "Mish", "Softplus", "Softsign"),
    *("LeakyRelu", "PRelu", "Erf"),
)
_ADVICE = (
    _Advice(
        _SMOOTH,
        "Relu or Clip (Relu6) in its place limits the codes of the operator before it; needs retraining",
        ("Clip",),
    ),
    _Advice(
        ("LayerNormalization", "InstanceNormalization", "GroupNormalization", "LRN"),
        "BatchNormalization in its place folds into the operator before it; needs retraining",
    ),
    _Advice(
        ("Softmax", "LogSoftmax"),
        "leave it out and compute it on the host: the order of the classes is the same",
        when=_at_the_end,
    ),
    _Advice(
        ("ArgMax", "ArgMin", "TopK", "NonMaxSuppression"), "leave it out and compute it on the host", when=_at_the_end
    ),
    _Advice(("ReduceMean",), "over height and width, GlobalAveragePool computes the same", ("GlobalAveragePool",)),
    _Advice(
        ("Mul", "Div"), "if constant per channel: scale the weights of the operator before it", when=_with_constant
    ),
    _Advice(("Add", "Sub"), "if constant per channel: put it into the bias before it", when=_with_constant),
    _Advice(
        ("Add",),
        "Conv of size 1 with identity weights over the Concat of both computes the same",
        ("Concat", "Conv"),
        _without_constant,
    ),
    _Advice(
        ("Sub",),
        "Add computes the same, with negated weights of the operator before its second operand",
        ("Add",),
        _without_constant,
    ),
    _Advice(("Split",), "Slice for each part moves codes and needs no float"),
    _Advice(
        ("Gather",), "if its indices are a range, Slice moves codes and needs no float", when=_with_constant_second
    ),
    _Advice(
        ("Resize", "Upsample"), "ConvTranspose in its place runs on integers; needs retraining", ("ConvTranspose",)
    ),
    _Advice(
        ("AveragePool", "GlobalAveragePool"),
        "a depthwise Conv with equal weights computes the same where nothing is padded",
        ("Conv",),
    ),
    _Advice(("LSTM", "GRU", "RNN", "If", "Loop", "Scan"), "export it unrolled into single operators"),
)


def advice_for(node: Node, graph: GraphIndex, policy: Policy) -> str | None:
    """What can stand in place of a float node on a back end; None if nothing general can be said."""
    operators = set(policy.operators)
    fitting = (advice for advice in _ADVICE if node.op_type in advice.operators and operators.issuperset(advice.needs))
    return next((advice.text for advice in fitting if advice.when(node, graph)), None)
