"""Two models tensor by tensor, on the same samples: where do they first differ, and where most?

    SNR = 10 log10(sum(a^2) / sum((a - b)^2))   in decibels, a of the first model and b of the second

Float against quantized, original against fine-tuned, or two files of different tools. A quantized model counts with
its real values: those of a tensor behind QuantizeLinear are what DequantizeLinear makes of them, and codes that an
integer operator gives out are dequantized with its own scale. Weights and other constants are compared as well, where
both models have the node that reads them. Both run without ONNX Runtime's optimizations, which would fuse quantizers
away.

Batches are streamed. So many tensors as memory is meant to hold are compared in one pass over the samples; where
there are more, there are more passes.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from onnx import helper, inliner

from onnxqt.data import Batch, InputSpec, Samples, fixed_batch
from onnxqt.errors import ModelError, UsageError
from onnxqt.ingest import ingest
from onnxqt.ingest.files import read
from onnxqt.metrics import Tally
from onnxqt.model import GraphIndex, Model, Node, infer_shapes, input_specs, ir_version_for, nodes_of, opset_of
from onnxqt.numerics import Array
from onnxqt.opset import convert_opset
from onnxqt.runtime import MAX_OPSET, Session, with_outputs

Match = Literal["name", "position"]
MATCHES: tuple[Match, ...] = ("name", "position")
Role = Literal["input", "constant", "activation", "output"]
Progress = Callable[[int, int], None]  # called with the number of samples done, and how many there are in all passes

SCHEMA_VERSION = "1.0"
LIMIT_DB = 40.0  # a hundredth of the magnitude: what 8 bits leave of a tensor, or a bit less
SAMPLES_LIMIT = 256
_EXACT_DB = 300.0  # stands for no difference at all, and its negative for values that are not finite
_LEAST = 1e-30
_MEMORY = 256 << 20  # bytes of the tensors of both models that are held together
_LARGEST_BATCH = 32
_WINDOW = 16  # nodes that one model may have and the other not, one behind the other

_QUANTIZERS = frozenset(("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"))
# Integer operators: the float operator that each stands for, and where the scale and zero point of its output are
# (ONNX QLinearConv and QLinearMatMul, opset 10; ONNX Runtime's contrib operators of the domain com.microsoft).
_INTEGER: Mapping[str, tuple[str, tuple[int, int] | None]] = {
    "QLinearConv": ("Conv", (6, 7)),
    "QLinearMatMul": ("MatMul", (6, 7)),
    "QLinearAdd": ("Add", (6, 7)),
    "QLinearMul": ("Mul", (6, 7)),
    "QLinearAveragePool": ("AveragePool", (3, 4)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (3, 4)),
    "QLinearLeakyRelu": ("LeakyRelu", (3, 4)),
    "QLinearSigmoid": ("Sigmoid", (3, 4)),
    "QLinearSoftmax": ("Softmax", (3, 4)),
    "QGemm": ("Gemm", (7, 8)),
    "ConvInteger": ("Conv", None),
    "MatMulInteger": ("MatMul", None),
}
_CODES = (".clipped_codes", ".codes", "_quantized")  # how exporters call the codes of a tensor
_UNPLACED = frozenset(name for name, (_, place) in _INTEGER.items() if place is None)
_ONNX = ("", "ai.onnx")
_TRANSPARENT = frozenset(("Identity", "Cast", "Dropout"))  # what one exporter writes and another does not


@dataclass(frozen=True, slots=True)
class CompareSettings:
    """How to compare.

    Attributes:
        match: which tensors belong together: those of one name, those in the same position; None for the name where
            inputs, outputs and a tensor between them have the same names.
        limit_db: tensors whose SNR is below differ.
        samples: to run on, at most.

    Raises:
        UsageError: for a number out of its range.
    """

    match: Match | None = None
    limit_db: float = LIMIT_DB
    samples: int = SAMPLES_LIMIT

    def __post_init__(self) -> None:
        if not math.isfinite(self.limit_db):
            raise UsageError(f"--limit is {self.limit_db}: give decibels, such as {LIMIT_DB:g}")
        if self.samples < 1:
            raise UsageError(f"--samples is {self.samples}: give a number of at least 1")


@dataclass(frozen=True, eq=False, slots=True)
class _Tensor:
    """A tensor that one model computes from its inputs: the name it goes by, who makes it, what holds its values."""

    name: str
    node: Node | None  # None for an input of the model
    op_type: str
    value: str


@dataclass(frozen=True, eq=False)
class Subject:
    """One of the two models.

    Attributes:
        name: how messages call it.
        model: normalised if it is float, as it is if it is quantized.
        tensors: that it computes, in order, by the names they go by.
        constants: tensors that it computes from its constants alone.
    """

    name: str
    model: Model
    tensors: Mapping[str, _Tensor]
    constants: frozenset[str]

    @property
    def graph(self) -> GraphIndex:
        """Its graph."""
        return self.model.graph


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors that belong together.

    Attributes:
        tensor: its name in the first model.
        role: what it is.
        op_type: of the node that makes it, or reads a constant; empty for an input.
        first: the tensor of the first model that holds its values.
        second: that of the second.
        behind: the pairs that it is made of, by the names of their tensors.
    """

    tensor: str
    role: Role
    op_type: str
    first: str
    second: str
    behind: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Matched:
    """Two models that take the same samples, and what belongs together in them; made by `match_models`.

    Attributes:
        first: the reference.
        second: what is compared with it.
        settings: how to compare.
        match: how the tensors were matched.
        pairs: in the order of the first model's graph.
        unmatched: tensors of the first model that the second has no counterpart of.
    """

    first: Subject
    second: Subject
    settings: CompareSettings
    match: Match
    pairs: tuple[Pair, ...]
    unmatched: tuple[str, ...]

    @property
    def specs(self) -> list[InputSpec]:
        """What the samples must look like, by the names of the first model's inputs."""
        both = zip(input_specs(self.first.model), _inputs_like(self.first, self.second, self.match), strict=True)
        return [
            replace(
                a, shape=tuple(b_size if size is None else size for size, b_size in zip(a.shape, b.shape, strict=True))
            )
            for a, b in both
        ]


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two tensors are apart.

    Attributes:
        pair: which.
        order: place in the order of the first model's graph, from 0.
        values: number of values that were compared.
        snr_db: see above, within [-300, 300].
        max_abs: largest |a - b|; infinite where b is not finite.
        cosine: of the angle between both; None where one is all zeros or b is not finite.
        differs: whether the SNR is below the limit.
        arises: whether it differs though nothing that it is made of does.
    """

    pair: Pair
    order: int
    values: int
    snr_db: float
    max_abs: float
    cosine: float | None
    differs: bool
    arises: bool


@dataclass(frozen=True, eq=False)
class Comparison:
    """The differences of all tensors that belong together.

    Attributes:
        matched: the models.
        samples: that they were run on.
        differences: in the order of the first model's graph.
        unlike: tensors that belong together by name or position, but have different shapes.
    """

    matched: Matched
    samples: int
    differences: tuple[Difference, ...]
    unlike: tuple[str, ...]

    @property
    def worst_first(self) -> tuple[Difference, ...]:
        """Sorted by SNR, of equal ones the earlier first."""
        return tuple(sorted(self.differences, key=lambda found: (found.snr_db, found.order)))

    @property
    def first_differing(self) -> Difference | None:
        """The first tensor that differs; from there on the error grows. None where no tensor differs."""
        return next((found for found in self.differences if found.differs), None)

    def as_json(self) -> dict[str, Any]:
        """The form for machines (schema: onnxqt/compare.schema.json); the worst tensor comes first."""
        first = self.first_differing
        return {
            "schema_version": SCHEMA_VERSION,
            "models": [
                {"name": subject.name, "sha256": subject.model.sha256}
                for subject in (self.matched.first, self.matched.second)
            ],
            "match": self.matched.match,
            "limit_db": self.matched.settings.limit_db,
            "samples": self.samples,
            "first_differing": first.pair.tensor if first else None,
            "tensors": [_plain(found) for found in self.worst_first],
            "unmatched": list(self.matched.unmatched),
            "unlike": list(self.unlike),
        }


def _plain(found: Difference) -> dict[str, Any]:
    pair = found.pair
    return {
        "tensor": pair.tensor,
        "other": pair.second,
        "role": pair.role,
        "op_type": pair.op_type or None,
        "order": found.order,
        "values": found.values,
        "snr_db": found.snr_db,
        "max_abs": found.max_abs if math.isfinite(found.max_abs) else None,
        "cosine": found.cosine,
        "differs": found.differs,
        "arises": found.arises,
    }


# --- one model ------------------------------------------------------------------------------------------


def open_subject(path: Path, name: str | None = None) -> Subject:
    """A model to compare: a float one as `ingest` normalises it, a quantized one as it is.

    Args:
        path: of the ONNX file.
        name: how messages call it; by default the name of the file.

    Raises:
        ModelError: for a file that cannot be read or handled.
    """
    proto, digest = read(path)
    quantized = any(node.op_type in _QUANTIZERS or node.op_type in _INTEGER for node in nodes_of(proto.graph))
    model = _as_it_is(proto, digest) if quantized else ingest(path)
    return _subject(name or path.name, model)


def _as_it_is(proto: onnx.ModelProto, digest: str) -> Model:
    """A quantized model, with a DequantizeLinear behind each integer operator that gives out codes."""
    if proto.functions:
        proto = inliner.inline_local_functions(proto)
    if opset_of(proto) > MAX_OPSET:
        proto = convert_opset(proto, MAX_OPSET)
    proto.ir_version = ir_version_for(proto)
    graph = GraphIndex(proto)
    taken = {tensor for node in graph.nodes for tensor in (*node.inputs, *node.outputs)}
    for node in graph.nodes:
        place = _INTEGER.get(node.op_type, ("", None))[1]
        if place is None or len(node.inputs) <= place[1]:
            continue
        codes = _last_codes(graph, node.outputs[0])
        name = f"{codes}.compared"
        while name in taken:
            name += "_"
        taken.add(name)
        parameters = [node.inputs[index] for index in place]
        proto.graph.node.append(helper.make_node("DequantizeLinear", [codes, *parameters], [name], name))
    return Model(infer_shapes(proto), digest)


def _subject(name: str, model: Model) -> Subject:
    graph = model.graph
    computed = _computed(graph)
    constants = frozenset(tensor for tensor in graph.producer if tensor not in computed)
    inputs = [_Tensor(name, None, "", _dequantized(graph, name)) for name in graph.inputs if graph.is_float(name)]
    found = {tensor.name: tensor for tensor in inputs}
    for node in graph.nodes:
        if node.op_type in _QUANTIZERS:
            continue
        for output in node.outputs:
            tensor = _tensor(graph, node, output) if output in computed else None
            if tensor is not None:
                found.setdefault(tensor.name, tensor)
    return Subject(name, model, found, constants)


def _computed(graph: GraphIndex) -> set[str]:
    """Tensors that are made of the inputs, or drawn at random."""
    computed = set(graph.inputs)
    for node in graph.nodes:
        if node.op_type.startswith("Random") or not computed.isdisjoint((*node.inputs, *node.captured)):
            computed.update(tensor for tensor in node.outputs if tensor)
    return computed


def _tensor(graph: GraphIndex, node: Node, output: str) -> _Tensor | None:
    """An output of a node; None where it holds no real values."""
    op_type, place = _INTEGER.get(node.op_type, (node.op_type, None))
    if place is not None:
        codes = _last_codes(graph, output)
        value, called = _dequantized(graph, codes), _without_suffix(codes)
    elif graph.is_float(output) or (node.domain not in _ONNX and not graph.is_typed(output)):
        value, called = _dequantized(graph, output), output
    else:
        return None
    return _Tensor(value if value in graph.outputs else called, node, op_type, value)


def _last_codes(graph: GraphIndex, codes: str) -> str:
    """The codes behind a Clip of codes, which stands for an activation function or a narrower grid."""
    readers = graph.consumers.get(codes, ())
    return readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type == "Clip" else codes


def _dequantized(graph: GraphIndex, tensor: str) -> str:
    """The tensor that holds the real values of another: behind its quantizer, or behind codes; itself otherwise."""
    pending, last = [(tensor, 0)], tensor
    while pending:
        name, depth = pending.pop()
        for reader in graph.consumers.get(name, ()):
            if reader.op_type == "DequantizeLinear" and reader.inputs[0] == name:
                if last == tensor or reader.outputs[0] in graph.outputs:
                    last = reader.outputs[0]
            elif depth < 2 and _gives_codes(graph, reader, name):
                pending.append((reader.outputs[0], depth + 1))
    return last


def _gives_codes(graph: GraphIndex, node: Node, tensor: str) -> bool:
    """Whether a node quantizes a tensor, or clips its codes."""
    if node.inputs[0] != tensor:
        return False
    return node.op_type in ("QuantizeLinear", "DynamicQuantizeLinear") or (
        node.op_type == "Clip" and not graph.is_float(tensor)
    )


def _without_suffix(codes: str) -> str:
    return next((codes.removesuffix(end) for end in _CODES if codes.endswith(end) and codes != end), codes)


# --- what belongs together ------------------------------------------------------------------------------


def match_models(first: Subject, second: Subject, settings: CompareSettings | None = None) -> Matched:
    """Find which tensors of two models belong together.

    Raises:
        ModelError: if their inputs or outputs differ; the message has both sides.
        UsageError: if they have no tensor in common.
    """
    settings = settings or CompareSettings()
    match = settings.match or ("name" if _same_names(first, second) else "position")
    _check_ends(first, second, match)
    found = _by_name(first, second) if match == "name" else _by_position(first, second)
    partners = _past_clamps(first, second, found)
    if not partners:
        raise UsageError(f"'{first.name}' and '{second.name}' have no tensor in common: try --match position")
    pairs = tuple(_pairs(first, second, partners))
    known = {pair.tensor for pair in pairs}
    unmatched = tuple(t.name for t in first.tensors.values() if t.node is not None and t.name not in known)
    return Matched(first, second, settings, match, pairs, unmatched)


def _same_names(first: Subject, second: Subject) -> bool:
    ends = all(set(ours) == set(theirs) for ours, theirs in _both_ends(first, second))
    outer = {*first.graph.inputs, *first.graph.outputs}
    inner = [name for name in first.tensors if name not in outer]
    return ends and (not inner or any(name in second.tensors for name in inner))


def _both_ends(first: Subject, second: Subject) -> Iterator[tuple[tuple[str, ...], tuple[str, ...]]]:
    yield first.graph.inputs, second.graph.inputs
    yield first.graph.outputs, second.graph.outputs


def _check_ends(first: Subject, second: Subject, match: Match) -> None:
    for what, (ours, theirs) in zip(("inputs", "outputs"), _both_ends(first, second), strict=True):
        same = len(ours) == len(theirs) and (match == "position" or set(ours) == set(theirs))
        partners = zip(ours, theirs if match == "position" else ours, strict=False)
        if same and all(_alike(first.graph, a, second.graph, b) for a, b in partners):
            continue
        sides = " and ".join(
            f"'{s.name}' has {_shown(s.graph, names)}" for s, names in ((first, ours), (second, theirs))
        )
        hint = ", or match them with --match position" if match == "name" and len(ours) == len(theirs) else ""
        raise ModelError(f"the models have different {what}: {sides}; compare two forms of one model{hint}")


def _alike(first: GraphIndex, ours: str, second: GraphIndex, theirs: str) -> bool:
    """Whether two inputs or outputs take the same arrays, as far as is known."""
    a, b = first.shape(ours), second.shape(theirs)
    sizes = a is None or b is None or (len(a) == len(b) and all(_fit(x, y) for x, y in zip(a, b, strict=True)))
    typed = first.is_typed(ours) and second.is_typed(theirs)
    return sizes and (not typed or first.dtype(ours) == second.dtype(theirs))


def _fit(ours: int | None, theirs: int | None) -> bool:
    return ours is None or theirs is None or ours == theirs


def _shown(graph: GraphIndex, names: Sequence[str]) -> str:
    """Inputs or outputs in a message."""
    shown = []
    for name in names[:4]:
        sizes = ", ".join("any" if size is None else str(size) for size in graph.shape(name) or ())
        shown.append(f"'{name}' {graph.dtype(name) if graph.is_typed(name) else 'of unknown type'} ({sizes})")
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _inputs_like(first: Subject, second: Subject, match: Match) -> list[InputSpec]:
    """The inputs of the second model in the order of the first one's."""
    specs = input_specs(second.model)
    if match == "position":
        return specs
    named = {spec.name: spec for spec in specs}
    return [named[name] for name in first.graph.inputs]


def _by_name(first: Subject, second: Subject) -> dict[str, str]:
    return {name: name for name in first.tensors if name in second.tensors}


def _by_position(first: Subject, second: Subject) -> dict[str, str]:
    """Tensors of the same operators in the same order; a few that one model lacks are passed over."""
    for subject in (first, second):
        if node := next((n for n in subject.graph.nodes if n.op_type in _UNPLACED), None):
            raise UsageError(
                f"'{subject.name}' has the integer operator {node.label}, with other nodes around it than its float "
                "form has: match by name"
            )
    ours, theirs = (
        [t for t in subject.tensors.values() if t.node is not None and t.op_type not in _TRANSPARENT]
        for subject in (first, second)
    )
    found = dict(zip(first.graph.inputs, second.graph.inputs, strict=True))
    at = [0, 0]
    while at[0] < len(ours) and at[1] < len(theirs):
        step = _next_alike((first.graph, ours[at[0] :][:_WINDOW]), (second.graph, theirs[at[1] :][:_WINDOW]))
        if step is None:
            at = [at[0] + 1, at[1] + 1]
            continue
        a, b = at[0] + step[0], at[1] + step[1]
        found[ours[a].name] = theirs[b].name
        at = [a + 1, b + 1]
    ends = dict(zip(first.graph.outputs, second.graph.outputs, strict=True))
    inner = {name: other for name, other in found.items() if name not in ends and other not in set(ends.values())}
    known = {name: other for name, other in ends.items() if name in first.tensors and other in second.tensors}
    return {**{name: other for name, other in inner.items() if name in first.tensors}, **known}


def _past_clamps(first: Subject, second: Subject, partners: Mapping[str, str]) -> dict[str, str]:
    """The same, where a quantizer of the second model does what a Relu or Clip of the first one does.

    Quantizers whose least code stands for zero make a Relu before them superfluous, and some tools leave it out.
    """
    moved = {}
    for name, other in partners.items():
        reader, theirs = _only_clamp(first, name), second.tensors[other]
        rounded = theirs.node is not None and theirs.value not in theirs.node.outputs
        if reader is not None and reader not in partners and rounded and _only_clamp(second, other) is None:
            moved[reader] = other
        else:
            moved[name] = other
    return moved


def _only_clamp(subject: Subject, tensor: str) -> str | None:
    """What a Relu or Clip that alone reads a tensor gives out."""
    node = subject.tensors[tensor].node
    readers = [reader for name in (node.outputs if node else ()) for reader in subject.graph.consumers.get(name, ())]
    given = readers[0].outputs[0] if len(readers) == 1 and readers[0].op_type in ("Relu", "Clip") else None
    return given if given in subject.tensors else None


def _next_alike(
    first: tuple[GraphIndex, Sequence[_Tensor]], second: tuple[GraphIndex, Sequence[_Tensor]]
) -> tuple[int, int] | None:
    """The nearest two tensors of one operator and shape: how many to pass over on each side; None for none."""
    (graph, ours), (other, theirs) = first, second
    steps = ((a, total - a) for total in range(len(ours) + len(theirs) - 1) for a in range(total + 1))
    for a, b in steps:
        if a < len(ours) and b < len(theirs) and ours[a].op_type == theirs[b].op_type:
            x, y = graph.shape(ours[a].value), other.shape(theirs[b].value)
            if x is None or y is None or (len(x) == len(y) and all(_fit(p, q) for p, q in zip(x, y, strict=True))):
                return a, b
    return None


def _pairs(first: Subject, second: Subject, partners: Mapping[str, str]) -> Iterator[Pair]:
    """The pairs in the order of the first model's graph, a constant before the node that reads it."""
    origin: dict[str, tuple[str, ...]] = {}  # the pairs that a tensor of the first model is made of
    done: set[str] = set()
    outputs = set(first.graph.outputs)
    for tensor in first.tensors.values():
        behind: list[str] = []
        partner = second.tensors[partners[tensor.name]] if tensor.name in partners else None
        if tensor.node is not None:
            for constant in _constants(first, second, tensor, partner):
                behind.append(constant.tensor)
                if constant.tensor not in done:
                    done.add(constant.tensor)
                    yield constant
            read = (*tensor.node.inputs, *tensor.node.captured)
            behind += [name for source in read for name in _origins(first.graph, source, origin)]
        made = tuple(dict.fromkeys(behind))
        compared = partner is not None and (tensor.node is not None or tensor.value != partner.value)
        mine = (tensor.name,) if compared else made
        origin.update(dict.fromkeys((tensor.name, tensor.value, *(tensor.node.outputs if tensor.node else ())), mine))
        if partner is not None and compared:
            role: Role = "input" if tensor.node is None else "output" if tensor.name in outputs else "activation"
            yield Pair(tensor.name, role, tensor.op_type, tensor.value, partner.value, made)


def _origins(graph: GraphIndex, tensor: str, origin: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """The pairs that a tensor is made of, through the quantizers before it."""
    while tensor not in origin:
        node = graph.producer.get(tensor)
        if node is None or not node.inputs:
            return ()
        tensor = node.inputs[0]
    return origin[tensor]


def _constants(first: Subject, second: Subject, tensor: _Tensor, partner: _Tensor | None) -> Iterator[Pair]:
    """The constants that the nodes of a pair read in the same place."""
    ours, theirs = tensor.node, partner.node if partner else None
    if ours is None or theirs is None or ours.op_type != theirs.op_type:
        return
    for a, b in zip(ours.inputs, theirs.inputs, strict=False):
        if a and b and _is_constant(first, a) and _is_constant(second, b):
            yield Pair(a, "constant", tensor.op_type, a, b, ())


def _is_constant(subject: Subject, tensor: str) -> bool:
    return subject.graph.is_float(tensor) and (tensor in subject.graph.initializers or tensor in subject.constants)


# --- what they compute ----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sum:
    """Running sums of one pair."""

    tally: Tally = field(default_factory=Tally)
    max_abs: float = 0.0
    unlike: bool = False

    def add(self, first: Array, second: Array) -> None:
        """Count one batch."""
        if first.shape != second.shape:
            self.unlike = True
            return
        self.tally.add(second.reshape(-1), first.reshape(-1))
        finite = np.isfinite(first)
        if finite.any():
            gap = np.abs(np.subtract(second, first, dtype=np.float64)[finite]).max()
            self.max_abs = max(self.max_abs, math.inf if math.isnan(gap) else float(gap))


def compare(matched: Matched, samples: Samples, progress: Progress = lambda done, total: None) -> Comparison:
    """Run both models over the same samples and measure how far their tensors are apart.

    Args:
        matched: see `match_models`.
        samples: opened for `matched.specs`.
        progress: called after each batch.

    Raises:
        ModelError: if ONNX Runtime cannot run one of the models; naming it.
    """
    samples = samples.take(matched.settings.samples)
    fixed = fixed_batch(matched.specs)
    constant = [pair for pair in matched.pairs if pair.role == "constant"]
    computed = [pair for pair in matched.pairs if pair.role != "constant"]
    bytes_of = _sizes(matched, next(samples.batches(fixed or 1, pad=fixed is not None)))
    total = sum(bytes_of[pair.tensor] for pair in computed)
    batch = fixed or max(1, min(_LARGEST_BATCH, _MEMORY // max(total, 1)))
    passes = [*_chunks(computed, {name: size * (1 if fixed else batch) for name, size in bytes_of.items()})]
    sums = {pair.tensor: _Sum() for pair in matched.pairs}
    done = 0
    for pairs in _chunks(constant, bytes_of):
        few = islice(samples.batches(fixed or 1, pad=fixed is not None), 1)
        for _ in _counted(matched, pairs, few, sums):
            pass
    for pairs in passes:
        for count in _counted(matched, pairs, samples.batches(batch, pad=fixed is not None), sums):
            done += count
            progress(done, samples.count * len(passes))
    unlike = tuple(name for name, found in sums.items() if found.unlike)
    return Comparison(matched, samples.count, tuple(_differences(matched, sums)), unlike)


def _chunks(pairs: Sequence[Pair], bytes_of: Mapping[str, int]) -> Iterator[list[Pair]]:
    """Pairs that fit into memory together, in order; at least one at a time."""
    chunk: list[Pair] = []
    room = _MEMORY
    for pair in pairs:
        if chunk and bytes_of[pair.tensor] > room:
            yield chunk
            chunk, room = [], _MEMORY
        chunk.append(pair)
        room -= bytes_of[pair.tensor]
    if chunk:
        yield chunk


def _sizes(matched: Matched, batch: Batch) -> dict[str, int]:
    """Bytes that each pair takes for one batch, from the sizes of the first model's tensors."""
    subject = matched.first
    names = list(dict.fromkeys(pair.first for pair in matched.pairs))
    fed = {name: batch.inputs[name].size for name in names if name in batch.inputs}
    known = {
        name: math.prod(subject.graph.initializers[name].dims) for name in names if name in subject.graph.initializers
    }
    measured = [name for name in names if name not in fed and name not in known]
    proto = onnx.ModelProto()
    proto.CopyFrom(subject.model.proto)
    for index, name in enumerate(measured):
        proto.graph.node.append(helper.make_node("Size", [name], [f"compared.size.{index}"], f"compared.size.{index}"))
        proto.graph.output.append(helper.make_empty_tensor_value_info(f"compared.size.{index}"))
    found: dict[str, int] = {}
    if measured:
        outputs = [f"compared.size.{index}" for index in range(len(measured))]
        values = _run(subject, _session(subject, proto, outputs), batch.inputs)
        found = {name: int(values[output]) for name, output in zip(measured, outputs, strict=True)}
    sizes = {**fed, **known, **found}
    return {pair.tensor: 2 * 4 * sizes[pair.first] for pair in matched.pairs}


def _counted(
    matched: Matched, pairs: Sequence[Pair], batches: Iterable[Batch], sums: Mapping[str, _Sum]
) -> Iterator[int]:
    """Add batches to the sums of some pairs; gives the number of samples of each."""
    first, second = matched.first, matched.second
    renamed = {a: b.name for a, b in zip(first.graph.inputs, _inputs_like(first, second, matched.match), strict=True)}
    sides = ((first, [pair.first for pair in pairs]), (second, [pair.second for pair in pairs]))
    sessions = [_tapped(subject, names) for subject, names in sides]
    for batch in batches:
        fed = (batch.inputs, {renamed[name]: array for name, array in batch.inputs.items()})
        ours, theirs = (
            {} if session is None else _run(subject, session, inputs)
            for (subject, _), session, inputs in zip(sides, sessions, fed, strict=True)
        )
        for pair in pairs:
            a, b = _value(first, pair.first, ours, fed[0]), _value(second, pair.second, theirs, fed[1])
            if pair.role != "constant":
                a, b = batch.real(a), batch.real(b)
            sums[pair.tensor].add(a, b)
        yield len(batch.index)


def _tapped(subject: Subject, names: Iterable[str]) -> Session | None:
    """A session that gives out these tensors, as far as they are computed; None where none is."""
    graph = subject.graph
    wanted = [name for name in dict.fromkeys(names) if name not in graph.initializers and name not in graph.inputs]
    return _session(subject, with_outputs(subject.model.proto, wanted), wanted) if wanted else None


def _session(subject: Subject, proto: onnx.ModelProto, outputs: Sequence[str]) -> Session:
    try:
        return Session(proto, optimize=False, outputs=outputs)
    except ModelError as error:
        raise ModelError(f"'{subject.name}': {error}") from error


def _run(subject: Subject, session: Session, inputs: Mapping[str, Array]) -> dict[str, Array]:
    try:
        return session.run(inputs)
    except ModelError as error:
        raise ModelError(f"'{subject.name}': {error}") from error


def _value(subject: Subject, name: str, values: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
    if name in values:
        return values[name]
    return inputs[name] if name in inputs else np.asarray(subject.graph.constant(name))


def _differences(matched: Matched, sums: Mapping[str, _Sum]) -> Iterator[Difference]:
    differing: set[str] = set()
    kept = (pair for pair in matched.pairs if not sums[pair.tensor].unlike)
    for order, pair in enumerate(kept):
        found = sums[pair.tensor]
        snr_db = _snr(found.tally)
        differs = snr_db < matched.settings.limit_db
        if differs:
            differing.add(pair.tensor)
        yield Difference(
            pair,
            order,
            found.tally.values,
            snr_db,
            found.max_abs,
            found.tally.fidelity()["cosine"],
            differs,
            differs and differing.isdisjoint(pair.behind),
        )


def _snr(tally: Tally) -> float:
    """Within [-300, 300]."""
    if tally.non_finite:
        return -_EXACT_DB
    ratio = max(tally.reference_power, _LEAST) / max(tally.squared_error, _LEAST)
    return _EXACT_DB if not tally.squared_error else float(np.clip(10 * math.log10(ratio), -_EXACT_DB, _EXACT_DB))
