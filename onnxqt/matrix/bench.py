"""One cell: a model on a back end, measured."""

import contextlib
import functools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import onnx

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate, make_quantizers, tensors_of
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.errors import EmulatorError, OnnxqtError, UnboundedError, first_line
from onnxqt.evaluate import Reference, Tallies, evaluate
from onnxqt.export import quantized_model
from onnxqt.matrix.cells import Cell
from onnxqt.matrix.floats import costliest, ends_of
from onnxqt.matrix.run import Floats, Run, open_run
from onnxqt.matrix.task import Column, Json, Subject, Task
from onnxqt.metrics import Tally
from onnxqt.model import GraphIndex, Model
from onnxqt.numerics import Array
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.profiles import Policy, Profile
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import Scheme
from onnxqt.survey.macs import UnknownMacsError, macs
from onnxqt.survey.sizes import find_sizes

LAYER_SAMPLES = 64  # on which layers are compared one by one
SCHEME_RANGES: RangeMethod = "mse"  # how the clips of schemes are chosen, as `onnxqt export` does by default


class Bench:
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
            task = self._task
            tensors = tensors_of(self._plan(profile, column, unbounded) for profile, column in task.columns)
            try:
                return calibrate(self._model, tensors, task.calibration, task.calibration_batch), unbounded
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
        ranges, unbounded = self._calibrated
        result, failure = None, None
        try:
            with _as_reason():
                plan = self._plan(profile, column, unbounded)
                file = _quantized(self._model, ranges, plan, profile.policy, column)
                result = self._judged(open_run(file, plan, profile, column), progress)
        except OnnxqtError as error:
            failure = str(error)
        return Cell(self.subject.name, profile.name, str(column), key, result, failure)

    def _judged(self, run: Run, progress: Callable[[int], None]) -> Json:
        overflows: Counter[str] = Counter()
        lock = threading.Lock()

        def outputs(inputs: Mapping[str, Array]) -> dict[str, Array]:
            result = run.program.run_codes(inputs)
            with lock:
                overflows.update(result.overflows)
            return result.outputs

        tallies = evaluate(outputs, self._reference, progress)
        floats = run.float_nodes
        ends = ends_of(self._graph, floats, run.tensors)
        return {
            **outcome(tallies),
            "worst_layer": self._worst_layer(run),
            "integer_macs": self._integer_macs(run, floats),
            "boundaries": run.dynamic_boundaries + len({end for crossing in ends.values() for end in crossing}),
            "float_nodes": [
                {"node": name, "op_type": op_type, "reason": reason} for name, (op_type, reason) in floats.items()
            ],
            "costliest": costliest(self._graph, floats, ends, run.profile.policy),
            "overflows": dict(sorted((+overflows).items())),
        }

    def _worst_layer(self, run: Run) -> Json | None:
        """The quantized tensor that is farthest from the float model's, in terms of its signal-to-noise ratio."""
        known = {*self._model.graph.producer, *self._model.graph.inputs}
        names = [name for name in run.tensors if name in known]
        if not names:
            return None
        inside = [name for name in names if name not in self._model.graph.inputs]
        session = Session(with_outputs(self._model.proto, inside), outputs=inside)
        tallies = {name: Tally() for name in names}
        for batch in self._task.batches(self._task.evaluation.take(LAYER_SAMPLES)):
            expected = {**batch.inputs, **session.run(batch.inputs)}
            for name, values in run.values(batch.inputs, names).items():
                tallies[name].add(batch.real(values), batch.real(expected[name]))
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

    def _integer_macs(self, run: Run, floats: Floats) -> float | None:
        """Share of the known multiply-accumulates that run on integers; None if there are none."""
        total = sum(self._macs.values())
        integer = sum(self._macs.get(info.name, 0) for info in run.program.integer_nodes if info.name not in floats)
        return integer / total if total else None


def outcome(tallies: Tallies) -> Json:
    """What the first output is worth."""
    first = next(iter(tallies.values()))
    return {"metrics": first.metrics(), "fidelity": first.fidelity(), **first.confidence()}


def _quantized(model: Model, ranges: RangeTable, plan: QuantPlan, policy: Policy, column: Column) -> onnx.ModelProto:
    if isinstance(column, Scheme):
        return quantized_model(model, plan, make_quantizers(model, plan, ranges, column, SCHEME_RANGES))
    return compile_model(model, ranges, plan, policy, column)


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
