"""How the pipeline ends on one model, for `coverage.py`."""

from __future__ import annotations

import math
import os
import re
import shutil
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from coverage_models import BATCH, Case, Feeds, make_samples, read_feeds
from onnx import TensorProto

SCHEME = "w8a8-sym-pc"
STEPS = 20
MAX_OPSET, MAX_IR_VERSION = 21, 10  # what ONNX Runtime 1.19.2 reads
MIN_OPSET = 17  # what older models are converted to if it has no kernels for them
FLOAT_LIMIT, HALF_LIMIT = 1e-5, 1e-2  # of max|a - b| / max|b|; the second for models with 16-bit floats

# Two runs of these differ, so the float path cannot be compared.
RANDOM = {
    "Bernoulli": "draws its output",
    "Multinomial": "draws its output",
    "RandomNormal": "draws its output",
    "RandomNormalLike": "draws its output",
    "RandomUniform": "draws its output",
    "RandomUniformLike": "draws its output",
    "Dropout": "draws its mask in training mode",
}
UNDEFINED = {
    "test_reversesequence_batch": "ONNX Runtime does not write the row of a sequence of length 0",
}
VERBS = (
    "add apply ask bring check choose convert correct export feed fix give install keep make move name number pass "
    "put raise remove rename replace report run save set simplify split train use write"
)
ADMISSIONS = ("the training process ended", "the training process was killed", "a pass broke the graph")
REMEDY = re.compile(rf"[:;,]\s+(?:or |and |then |please )?(?:{'|'.join(VERBS.split())})\b")

Row = dict[str, Any]


# --- ONNX Runtime alone ---------------------------------------------------------------------------------


def runnable_forms(proto: onnx.ModelProto) -> Iterator[onnx.ModelProto]:
    """The model with opsets and an IR version that ONNX Runtime 1.19.2 reads: as it is, or converted."""
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), MAX_OPSET)
    if opset <= MAX_OPSET:
        yield _with_versions(proto, opset)
    if opset < MIN_OPSET:
        yield _with_versions(onnx.version_converter.convert_version(proto, MIN_OPSET), MIN_OPSET)
    if opset > MAX_OPSET:
        try:
            form = onnx.version_converter.convert_version(proto, MAX_OPSET)
        except Exception:  # the converter raises whatever C++ throws
            if not _unchanged_since(proto, opset):
                raise
            form = proto  # every operator is the same in both versions
        yield _with_versions(form, MAX_OPSET)


def _with_versions(proto: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A copy that states an opset, and an IR version that ONNX Runtime reads."""
    form = onnx.ModelProto()
    form.CopyFrom(proto)
    form.ir_version = min(form.ir_version, MAX_IR_VERSION)
    for entry in form.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = opset
    return form


def _unchanged_since(proto: onnx.ModelProto, version: int) -> bool:
    """Whether every operator was last changed in opset 21 or before."""
    schemas = (onnx.defs.get_schema(node.op_type, version) for node in _nodes(proto) if not node.domain)
    return all(schema.since_version <= MAX_OPSET for schema in schemas)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, with those of subgraphs and functions."""
    pending = [*proto.graph.node, *(node for function in proto.functions for node in function.node)]
    while pending:
        node = pending.pop()
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                pending.extend(graph.node)


def run_float(proto: onnx.ModelProto | str, feeds: Feeds, optimize: bool) -> dict[str, Any]:
    """Outputs by name, by ONNX Runtime with or without its graph optimizations."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    source = proto if isinstance(proto, str) else proto.SerializeToString()
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    wanted = {value.name: value.type for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    values = session.run(names, {name: _fed(feed, wanted[name]) for name, feed in feeds.items() if name in wanted})
    return dict(zip(names, values, strict=True))


def _fed(feed: Any, kind: str) -> Any:
    """A feed as the model takes it: ingest makes float16 and float64 inputs float32."""
    if isinstance(feed, list | None):
        return feed
    array = np.asarray(feed)
    return array.astype(np.float32) if kind == "tensor(float)" and array.dtype.kind == "f" else array


def run_both(proto: onnx.ModelProto, feeds: Feeds) -> list[dict[str, Any]]:
    """Outputs with and without graph optimizations; of the one alone where the other does not run.

    Raises:
        Exception: of ONNX Runtime, if neither runs.
    """
    results: list[dict[str, Any]] = []
    problem: Exception | None = None
    for optimize in (True, False):
        try:
            results.append(run_float(proto, feeds, optimize))
        except Exception as error:  # noqa: BLE001 (onnxruntime has a private class per status code)
            problem = error
    if not results:
        raise problem or RuntimeError("nothing ran")
    return results


def run_original(proto: onnx.ModelProto, feeds: Feeds) -> list[dict[str, Any]]:
    """What `run_both` gives for the first form of the model that runs.

    Raises:
        Exception: of the first form, if none runs.
    """
    problem: Exception | None = None
    try:
        for form in runnable_forms(proto):
            try:
                return run_both(form, feeds)
            except Exception as error:  # noqa: BLE001 (onnxruntime has a private class per status code)
                problem = problem or error
    except Exception as error:  # noqa: BLE001 (so has onnx, for what cannot be converted)
        problem = problem or error
    raise problem or RuntimeError("nothing ran")


def difference(actual: Any, expected: Any) -> float:
    """How far an output is from what it should be: max|a - b| / max|b|, infinite for another shape or type."""
    if isinstance(expected, list):
        if not isinstance(actual, list) or len(actual) != len(expected):
            return math.inf
        return max((difference(a, b) for a, b in zip(actual, expected, strict=True)), default=0.0)
    if expected is None or actual is None:
        return 0.0 if expected is actual else math.inf
    a, b = np.asarray(actual), np.asarray(expected)
    if a.shape != b.shape or (a.dtype != b.dtype and not a.dtype.kind == b.dtype.kind == "f"):
        return math.inf  # (ingest makes float32 of all floats)
    if a.dtype.kind not in "fc":
        return 0.0 if np.array_equal(a, b) else math.inf
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    a, b = a.astype(wide), b.astype(wide)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True):
        return math.inf
    if not finite.any():
        return 0.0
    scale = float(np.abs(b[finite]).max())
    error = float(np.abs(a[finite] - b[finite]).max())
    return math.inf if math.isnan(error) else error / scale if scale else error


def worst_output(actual: Mapping[str, Any], expected: Mapping[str, Any]) -> tuple[float, str]:
    """The output that is farthest from what it should be, and how far; a missing one is infinitely far."""
    errors = [
        (difference(actual[name], value) if name in actual else math.inf, name) for name, value in expected.items()
    ]
    return max(errors, default=(0.0, ""))


def holds_quantizers(proto: onnx.ModelProto) -> bool:
    """Whether a model is run with --strip-qdq, as the package asks for."""
    return any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in _nodes(proto))


def randomness(proto: onnx.ModelProto) -> str | None:
    """Why two runs of a model differ; None if they do not."""
    for node in _nodes(proto):
        if node.op_type not in RANDOM or (node.op_type == "Dropout" and not (len(node.input) > 2 and node.input[2])):
            continue
        return f"{node.op_type} {RANDOM[node.op_type]}"
    return None


def float_limit(proto: onnx.ModelProto) -> float:
    """How far the ingested model may be from the original."""
    half = {TensorProto.FLOAT16, TensorProto.BFLOAT16}
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    kinds |= {v.type.tensor_type.elem_type for v in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)}
    for node in _nodes(proto):
        kinds |= {attribute.i for attribute in node.attribute if attribute.name in ("to", "dtype", "stash_type")}
        kinds |= {attribute.t.data_type for attribute in node.attribute}
    return HALF_LIMIT if kinds & half else FLOAT_LIMIT


# --- one model ------------------------------------------------------------------------------------------


class Wrong(Exception):  # noqa: N818 (a finding, raised to end the judging)
    """The package finished a stage without an error, but its result is wrong."""


def within_float32(feeds: Feeds) -> Feeds:
    """The feeds, with standard normal values for those of float64 that float32 cannot hold.

    Some of onnx's test inputs were never written: they are what lay in memory.
    """
    rng = np.random.default_rng(0)
    return {name: feed if _is_held(feed) else rng.standard_normal(feed.shape) for name, feed in feeds.items()}


def _is_held(feed: Any) -> bool:
    """Whether float32 holds every finite number of an array, none of them as zero or with fewer digits."""
    if not isinstance(feed, np.ndarray) or feed.dtype != np.float64:
        return True
    sizes = np.abs(feed[np.isfinite(feed) & (feed != 0)])
    limits = np.finfo(np.float32)
    return not sizes.size or bool(limits.tiny <= sizes.min() and sizes.max() <= limits.max)


class Original(NamedTuple):
    """The user's model, what it is fed, and what it gives, with graph optimizations and without."""

    proto: onnx.ModelProto
    feeds: Feeds
    outputs: list[dict[str, Any]]


class Watch:
    """Progress of a run: keeps the losses."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def stage(self, name: str, total: int | None = None) -> None:
        """Ignore it."""

    def advance(self, done: int, note: str = "") -> None:
        """Read the loss out of the note."""
        if found := re.match(r"loss (\S+)", note):
            self.losses.append(float(found[1]))


def judge(case: Case, enter: Callable[[str], None] = lambda stage: None) -> Row:
    """Run every stage on a model and say how it ends.

    Args:
        case: the model.
        enter: told the name of each stage before it begins.
    """
    started = time.perf_counter()
    row: Row = {"set": case.group, "name": case.name, "outcome": "passes"}

    def begin(stage: str) -> None:
        row["stage"] = stage
        enter(stage)

    try:
        begin("run")
        proto = onnx.load(case.model)
        given = read_feeds(case, proto)
        feeds = within_float32(given)
        if replaced := [name for name in feeds if feeds[name] is not given[name]]:
            row["replaced_inputs"] = replaced
        original = Original(proto, feeds, run_original(proto, feeds))
    except Exception as error:  # noqa: BLE001 (whatever happens is the result)
        row |= {"outcome": "not runnable", **_error(error, case)}
    else:
        _judge_stages(case, original, row, begin)
    shutil.rmtree(case.folder / "run", ignore_errors=True)
    if row["outcome"] == "passes":
        del row["stage"]
    return {**row, "seconds": round(time.perf_counter() - started, 2)}


def _judge_stages(case: Case, original: Original, row: Row, begin: Callable[[str], None]) -> None:
    from onnxqt import OnnxqtError

    try:
        _stages(case, original, row, begin)
    except OnnxqtError as error:
        row |= {"outcome": "refused", **_error(error, case), **quality(str(error), original.proto)}
        if is_own_fault(error):
            log = case.folder / "run" / "training" / "worker.log"
            row |= {"outcome": "fails", "message": f"{row['message']}{_last_error(log)}"}
        elif row["stage"] == "trim":
            _judge_untrained(case, original, row)
    except Exception as error:  # noqa: BLE001 (whatever happens is the result)
        row |= {"outcome": "fails", **_error(error, case)}


def _judge_untrained(case: Case, original: Original, row: Row) -> None:
    """What is refused by the training may still be exported without it; it fails if that fails."""
    from onnxqt import OnnxqtError

    try:
        _export(case, original, 0)
        row["untrained"] = "passes"
    except OnnxqtError as error:
        row["untrained"] = _error(error, case)["message"]
        if is_own_fault(error):
            row |= {"outcome": "fails", "stage": "export without training", **_error(error, case)}
    except Exception as error:  # noqa: BLE001 (whatever happens is the result)
        row |= {"outcome": "fails", "stage": "export without training", **_error(error, case)}


def _stages(case: Case, original: Original, row: Row, begin: Callable[[str], None]) -> None:
    """Inspect, compare the float path, calibrate, trim and export; adds what it finds to `row`."""
    from onnxqt import Candidate, Settings, calibrated, ingest, make_plan, open_workspace, parse_scheme
    from onnxqt.data import has_batch_axis
    from onnxqt.model import input_specs
    from onnxqt.pipeline import make_table
    from onnxqt.trim import TrimSettings

    begin("inspect")
    strip = holds_quantizers(original.proto)
    row["stripped"] = strip
    model = ingest(case.model, strip_qdq=strip)
    plan = make_plan(model)
    row["integer_nodes"] = len(plan.integer_nodes)
    begin("float path")
    row |= _float_path(original, model.proto)
    begin("calibrate")
    data = case.folder / "samples"
    shutil.rmtree(data, ignore_errors=True)
    data.mkdir()
    batched = has_batch_axis(input_specs(model))
    samples = make_samples(original.feeds, batched, zlib.crc32(case.name.encode()))
    np.savez(data / "samples.npz", **samples)  # type: ignore[arg-type]
    settings = Settings((parse_scheme(SCHEME),), TrimSettings(steps=0, batch_size=BATCH), strip_qdq=strip)
    work, ranges = calibrated(open_workspace(case.model, data, out=case.folder / "run", settings=settings))
    make_table(work, Candidate(work.source.model, ranges))
    begin("trim")
    row |= _export(case, original, STEPS)


def _float_path(original: Original, ingested: onnx.ModelProto) -> Row:
    """Compare the ingested model with the original.

    Raises:
        Wrong: if it does not run, or is farther away than allowed.
    """
    proto = original.proto
    if holds_quantizers(proto) and not holds_quantizers(ingested):
        return {"float_path": "its quantizers were taken out"}
    if reason := randomness(proto) or UNDEFINED.get(proto.graph.name):
        return {"float_path": reason}
    try:
        actual = run_both(ingested, original.feeds)
    except Exception as error:
        raise Wrong(f"the ingested model does not run: {first_line(error)}") from error
    apart, output = min(worst_output(a, b) for a in actual for b in original.outputs)
    limit = float_limit(proto)
    if not apart <= limit:
        raise Wrong(f"the ingested model's output '{output}' differs by {apart:.1e}, more than {limit:g}")
    return {"float_error": float(f"{apart:.2g}")}


def _export(case: Case, original: Original, steps: int) -> Row:
    """The whole job with a number of training steps; then run what it wrote.

    Raises:
        Wrong: if a loss or an output is not finite.
        OnnxqtError: if the package refuses the model.
    """
    from onnxqt import Settings, parse_scheme, trim
    from onnxqt.trim import TrimSettings

    watch = Watch()
    run = case.folder / "run"
    strip = holds_quantizers(original.proto)
    settings = Settings((parse_scheme(SCHEME),), TrimSettings(steps=steps, batch_size=BATCH), strip_qdq=strip)
    report = trim(case.model, case.folder / "samples", out=run, settings=settings, progress=watch)
    if not all(map(math.isfinite, watch.losses)):
        raise Wrong(f"a loss is not finite: {watch.losses}")
    for file in (run / "checkpoint.onnx", run / "schemes" / f"{SCHEME}.onnx"):
        try:
            outputs = run_float(str(file), original.feeds, optimize=True)
        except Exception as error:
            raise Wrong(f"the exported {file.name} does not run: {first_line(error)}") from error
        for name, value in original.outputs[0].items():
            if name not in outputs:
                raise Wrong(f"the exported {file.name} has no output '{name}'")
            if original.proto.graph.name not in UNDEFINED and is_finite(value) and not is_finite(outputs[name]):
                raise Wrong(f"the output '{name}' of the exported {file.name} is not finite")
    trained = int(report.content["training"]["steps"])
    return {"trained": trained, "losses": [watch.losses[0], watch.losses[-1]] if watch.losses else None}


def is_finite(value: Any) -> bool:
    """Whether all numbers of an output are finite."""
    if isinstance(value, list):
        return all(map(is_finite, value))
    array = np.asarray(value)
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())


def first_line(error: BaseException) -> str:
    """The first line of an error's text; the name of its class if it has none."""
    text = str(error).strip()
    return text.splitlines()[0].strip() if text else type(error).__name__


def is_own_fault(error: BaseException) -> bool:
    """Whether an error of the package admits that the package, not the model, is to blame."""
    from onnxqt.errors import ContradictionError

    return isinstance(error, ContradictionError) or any(words in str(error) for words in ADMISSIONS)


def _last_error(log: Path) -> str:
    """The exception that ended a process, if its messages tell."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    said = [line[:200] for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return f": {said[-1]}" if said else ""


def _error(error: BaseException, case: Case) -> Row:
    """Class, first line and place of an error, without the folder of the model."""
    message = first_line(error).replace(f"{case.folder}{os.sep}", "")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "onnxqt" in Path(frame.filename).parts]
    where = f"{Path(own[-1].filename).stem}.{own[-1].name}" if own else ""
    return {"error": type(error).__name__, "message": message[:600], "where": where}


def quality(message: str, proto: onnx.ModelProto) -> Row:
    """Whether a refusal names something of the model, and says what to do."""
    names = {value.name for value in proto.graph.input}
    kinds = set()
    for node in _nodes(proto):
        names.update((node.name, *node.input, *node.output))
        kinds.add(node.op_type)
    quoted = re.findall(r"(?<!\w)'([^']+)'", message)
    named = any(word in names or re.sub(r"_\d+$", "", word) in kinds for word in quoted)
    return {"named": named, "remedy": bool(REMEDY.search(message))}
