"""What a user should know before a model is fine-tuned or quantized."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxqt.errors import InstallationError, ModelError
from onnxqt.ingest.files import EMBED_LIMIT
from onnxqt.model import input_specs
from onnxqt.numerics import Array
from onnxqt.runtime import Session
from onnxqt.survey.macs import bodies, multiplies
from onnxqt.survey.parts import Layer, Parameter, Parts
from onnxqt.tensors import without_large

OUTLIER_RATIO = 50  # of the largest magnitude to the quantile below
OUTLIER_QUANTILE = 0.999
_TOLD = 3  # names in a message


@dataclass(frozen=True)
class Problem:
    """Something that keeps a model from being trained or quantized well.

    Attributes:
        kind: a word for machines.
        message: one sentence for people.
        names: all tensors, nodes or operators that it is about.
    """

    kind: str
    message: str
    names: tuple[str, ...] = ()


def find_problems(parts: Parts, parameters: Sequence[Parameter], layers: Sequence[Layer]) -> tuple[Problem, ...]:
    """The problems of a model, those that stop everything first. Reads every weight, one at a time."""
    return (
        *_unable_to_run(parts),
        *_inputs(parts),
        *_nothing_done(parts),
        *_large(parts, parameters),
        *_unknown_shapes(parts, layers),
        *_subgraphs(parts),
        *_weights(parts, parameters),
    )


def _unable_to_run(parts: Parts) -> Iterator[Problem]:
    """Whether ONNX Runtime has a kernel for every node; large weights are not needed to know."""
    try:
        Session(without_large(parts.model.proto), optimize=False)
    except (ModelError, InstallationError) as error:
        foreign = tuple(dict.fromkeys(f"{node.domain}::{node.op_type}" for node in parts.graph.nodes if node.domain))
        yield Problem("cannot-run", str(error), foreign)


def _inputs(parts: Parts) -> Iterator[Problem]:
    try:
        specs = input_specs(parts.model)
    except ModelError as error:
        yield Problem("unusable-input", str(error))
        return
    if not specs:
        yield Problem("no-inputs", "the model has no inputs, so it cannot be fed samples")
    elif not parts.sizes.batched:
        names = tuple(spec.name for spec in specs)
        message = "the inputs have no common batch axis: the model takes one sample at a time"
        yield Problem("no-batch-axis", message, names)


def _nothing_done(parts: Parts) -> Iterator[Problem]:
    if not parts.plan.integer_nodes:
        yield Problem(
            "nothing-to-quantize",
            "nothing would be quantized: no Conv, ConvTranspose, Gemm or MatMul can run on integers",
        )
    if parts.reach.reason is not None:
        yield Problem("nothing-to-train", f"nothing would be trained: {parts.reach.reason}")


def _large(parts: Parts, parameters: Iterable[Parameter]) -> Iterator[Problem]:
    if parts.model.is_large:
        size = sum(parameter.bytes for parameter in parameters) / 2**30
        yield Problem(
            "large",
            f"the weights take {size:.1f} GiB: 'onnxqt export' quantizes the model, but from "
            f"{EMBED_LIMIT / 2**30:g} GiB of external data on it can neither be trained nor checked by the emulator",
        )


def _unknown_shapes(parts: Parts, layers: Iterable[Layer]) -> Iterator[Problem]:
    graph = parts.graph
    tensors = [name for name in graph.producer if graph.is_float(name) or not graph.is_typed(name)]
    shapes = {name: parts.sizes.graph.shape(name) for name in (*graph.inputs, *tensors)}
    ranks = tuple(name for name in tensors if shapes[name] is None)
    sizes = tuple(name for name in tensors if None in (shapes[name] or ()))
    if ranks:
        message = f"{_some('tensor', ranks)} of unknown rank, where gradients may stop: export the model with shapes"
        yield Problem("unknown-rank", message, ranks)
    if sizes:
        free = [name for name in graph.inputs if None in (shapes[name] or ())]
        origin = f", free in {_some('input', free)}" if free else ""
        blind = sum(layer.macs is None for layer in layers)
        effect = f": the MACs of {blind} layer{'' if blind == 1 else 's'} are unknown" if blind else ""
        message = f"{_some('tensor', sizes)} of a size that does not follow from the batch{origin}{effect}"
        yield Problem("unknown-size", message, sizes)


def _subgraphs(parts: Parts) -> Iterator[Problem]:
    nodes = [node for node in parts.graph.nodes if any(bodies(node))]
    heavy = tuple(node.name for node in nodes if multiplies(node))
    rest = tuple(node.name for node in nodes if not multiplies(node))
    if heavy:
        message = f"the subgraphs of {_some('node', heavy)} multiply: they stay float, and no gradient passes"
        yield Problem("subgraph", message, heavy)
    if rest:
        yield Problem("subgraph", f"the subgraphs of {_some('node', rest)} stay float, and no gradient passes", rest)


def _weights(parts: Parts, parameters: Iterable[Parameter]) -> Iterator[Problem]:
    broken, empty, spread = [], [], []
    used = {name for node in parts.graph.nodes if multiplies(node) for name in node.inputs}
    for parameter in parameters:
        value = parts.graph.constant(parameter.tensor)
        if value is None or not value.size:
            continue
        value = value if value.dtype in (np.float32, np.float64) else value.astype(np.float32)
        largest = max(float(value.max()), -float(value.min()))  # NaN if any value is
        # An infinity that is added or compared is a mask or an open bound.
        if np.isnan(largest) or (np.isinf(largest) and (parameter.kind != "float" or parameter.tensor in used)):
            broken.append(parameter.tensor)
        elif parameter.kind == "weight" and largest == 0:
            empty.append(parameter.tensor)
        elif parameter.kind == "weight" and _has_outliers(value, largest):
            spread.append(parameter.tensor)
    if broken:
        yield Problem("not-finite", f"{_some('weight', broken)} with NaN or infinities", tuple(broken))
    if empty:
        yield Problem("all-zero", f"{_some('weight', empty)} with nothing but zeros", tuple(empty))
    if spread:
        message = f"{_some('weight', spread)} with a value over {OUTLIER_RATIO} times the 99.9th percentile"
        yield Problem("outliers", f"{message}: a scale per tensor rounds the others coarsely", tuple(spread))


def _has_outliers(value: Array, largest: float) -> bool:
    """Whether the largest magnitude is over `OUTLIER_RATIO` times the quantile: counted, without sorting."""
    small = np.count_nonzero(np.abs(value) < largest / OUTLIER_RATIO)
    return bool(small > int(OUTLIER_QUANTILE * (value.size - 1)))


def _some(what: str, names: Sequence[str]) -> str:
    """`2 tensors ('a', 'b')`."""
    told = ", ".join(f"'{name}'" for name in names[:_TOLD]) + (", ..." if len(names) > _TOLD else "")
    return f"{len(names)} {what}{'' if len(names) == 1 else 's'} ({told})"
