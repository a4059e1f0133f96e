"""Cross-layer equalization: the channels between two layers get the same range in both weights.

Two layers with a positively homogeneous function between them compute the same for every scale of the channels:
W2 f(W1 x + b1) = (W2 s) f(W1 / s x + b1 / s) (Nagel et al. 2019, "Data-free quantization through weight equalization
and bias correction", arXiv 1906.04721, section 4.1). With the ranges r1 and r2 of a channel in W1 and W2,

    s = sqrt(r1 r2) / r2

gives both the range sqrt(r1 r2) (equations 9 to 11).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxqt.model import GraphIndex, Model, Node
from onnxqt.numerics import Array
from onnxqt.ptq.layers import check_size

# Functions of single values or of windows for which f(s x) = s f(x), s > 0, channel by channel.
_HOMOGENEOUS = frozenset(("Dropout", "Identity", "LeakyRelu", "PRelu", "Relu"))
_WINDOWS = frozenset(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"))  # channels along axis 1
_REDUCING = frozenset(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"))
_FLATTENING = frozenset(("Flatten", "Reshape", "Squeeze"))

_ROUNDS = 100
_SETTLED = 1e-4  # relative change of the scales at which the rounds end
_BIAS_SHARE = 2.0**-5  # of a bias that counts as a weight
_LEAST_SHARE = 2.0**-20  # of a layer's range, under which a channel counts as zeros


@dataclass(frozen=True, slots=True)
class Member:
    """A layer of a pair: a node with a constant weight of its own.

    Its weight is seen as (groups, first, second, taps); (groups, first) or (groups, second) are its output channels,
    the other its input channels.

    Attributes:
        node: its name.
        weight: its weight.
        bias: its bias, if it has one.
        groups: group count of a convolution.
        output_axis: 1 or 2, where the output channels are.
    """

    node: str
    weight: str
    bias: str | None
    groups: int
    output_axis: int

    @property
    def input_axis(self) -> int:
        """1 or 2, where the input channels are."""
        return 3 - self.output_axis


@dataclass(frozen=True, slots=True)
class Pair:
    """Two layers whose common channels can be scaled.

    Attributes:
        first: the layer that gives out the channels.
        second: the layer that reads them.
        repeat: input channels of `second` for each of them: the positions that a Flatten puts side by side.
    """

    first: Member
    second: Member
    repeat: int = 1


@dataclass(frozen=True, eq=False)
class Equalized:
    """A model with equalized weights.

    Attributes:
        model: computes the same function.
        pairs: the pairs of layers.
        scales: what the outputs of the first layer of each pair were divided by, float64 (channels,).
    """

    model: Model
    pairs: tuple[Pair, ...]
    scales: tuple[Array, ...]


def find_pairs(model: Model) -> tuple[Pair, ...]:
    """Every two layers between which only positively homogeneous functions stand, which nobody else reads."""
    graph = model.graph
    layers = {node.name: layer for node in graph.nodes if (layer := _layer(graph, node)) is not None}
    pairs = []
    for node in graph.nodes:
        first = layers.get(node.name)
        if first is None:
            continue
        found = _reader(graph, *_behind_bias(graph, node, first))
        second = layers.get(found[0].name) if found else None
        if found and second is not None:
            pairs.append(Pair(first, second, found[1]))
    return tuple(pairs)


def equalize(model: Model, pairs: Sequence[Pair] | None = None) -> Equalized:
    """Give the channels of every pair of layers equal ranges, all pairs in turn until nothing changes.

    Chains of layers are pairs that share a layer: the two pairs around a depthwise convolution settle together.
    Where a bias is far larger than the weights of its channel, it makes the activation's range, so it counts instead
    (ours): r1 = max(|w|, |b| / 32). A channel of which r1 or r2 is zero, or less than 2^-20 of the largest in its
    layer, stays as it is.

    Args:
        model: the float model.
        pairs: what to equalize; all that `find_pairs` finds by default.

    Raises:
        ModelError: if the model is too large for it.
    """
    check_size(model)
    pairs = find_pairs(model) if pairs is None else tuple(pairs)
    weights = {layer.weight: _view(model, layer) for pair in pairs for layer in (pair.first, pair.second)}
    biases = {pair.first.bias: _values(model, pair.first.bias) for pair in pairs if pair.first.bias}
    scales = [np.ones(_channels(weights[pair.first.weight], pair.first.output_axis)) for pair in pairs]
    for _ in range(_ROUNDS):
        change = 1.0
        for index, pair in enumerate(pairs):
            scale = _scale(pair, weights, biases)
            _apply(pair, scale, weights, biases)
            scales[index] = scales[index] * scale
            change = max(change, float(np.maximum(scale, 1 / scale).max()))
        if change <= 1 + _SETTLED:
            break
    changed = {name: values.reshape(model.graph.initializers[name].dims) for name, values in (weights | biases).items()}
    return Equalized(model.with_weights(changed), pairs, tuple(scales))


# --- one pair -----------------------------------------------------------------------------------------------------


def _scale(pair: Pair, weights: Mapping[str, Array], biases: Mapping[str, Array]) -> Array:
    """The scale of each channel, float64; 1 where a range is all but zero."""
    r1 = _ranges(weights[pair.first.weight], pair.first.output_axis)
    if pair.first.bias:
        r1 = np.maximum(r1, np.abs(biases[pair.first.bias]) * _BIAS_SHARE)
    r2 = _ranges(weights[pair.second.weight], pair.second.input_axis).reshape(-1, pair.repeat).max(axis=1)
    alive = (r1 > _LEAST_SHARE * r1.max()) & (r2 > _LEAST_SHARE * r2.max())
    r1, r2 = np.where(alive, r1, 1.0), np.where(alive, r2, 1.0)
    return np.asarray(np.sqrt(r1 / r2))


def _apply(pair: Pair, scale: Array, weights: dict[str, Array], biases: dict[str, Array]) -> None:
    first, second = pair.first, pair.second
    weights[first.weight] = weights[first.weight] / _along(scale, first.groups, first.output_axis)
    if first.bias:
        biases[first.bias] = biases[first.bias] / scale
    repeated = np.repeat(scale, pair.repeat)
    weights[second.weight] = weights[second.weight] * _along(repeated, second.groups, second.input_axis)


def _along(scale: Array, groups: int, axis: int) -> Array:
    """Values per channel in the shape of a weight's view."""
    return scale.reshape((groups, -1, 1, 1) if axis == 1 else (groups, 1, -1, 1))


def _ranges(view: Array, axis: int) -> Array:
    """The largest magnitude of each channel along an axis of the view."""
    return np.asarray(np.abs(view).max(axis=(3 - axis, 3)).reshape(-1))


def _channels(view: Array, axis: int) -> int:
    return int(view.shape[0] * view.shape[axis])


def _view(model: Model, layer: Member) -> Array:
    """A weight as float64 (groups, first, second, taps)."""
    values = _values_of(model, layer.weight)
    _, second = values.shape[:2]
    return values.reshape(layer.groups, values.shape[0] // layer.groups, second, -1)


def _values(model: Model, bias: str) -> Array:
    return _values_of(model, bias).reshape(-1)


def _values_of(model: Model, tensor: str) -> Array:
    return np.asarray(model.graph.constant(tensor), np.float64)


# --- which layers, which pairs ------------------------------------------------------------------------------------


def _layer(graph: GraphIndex, node: Node) -> Member | None:
    """A node as a layer; None if it has no weight of its own that can be scaled."""
    if node.domain or node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
        return None
    weight, *rest = node.inputs[1:]
    bias = rest[0] if rest and rest[0] else None
    if node.attributes.get("transA", 0) or not _is_own(graph, weight):
        return None
    if node.op_type == "MatMul":
        if len(graph.initializers[weight].dims) != 2:
            return None
        bias = _added(graph, node)
    output_first = node.op_type == "Conv" or bool(node.attributes.get("transB", 0))
    return Member(node.name, weight, bias, node.attributes.get("group", 1), 1 if output_first else 2)


def _is_own(graph: GraphIndex, tensor: str) -> bool:
    """Whether a tensor is a float constant that one node reads, once."""
    if tensor not in graph.initializers or not graph.is_float(tensor) or tensor in graph.outputs:
        return False
    readers = graph.consumers.get(tensor, ())
    return len(readers) == 1 and readers[0].inputs.count(tensor) == 1


def _added(graph: GraphIndex, node: Node) -> str | None:
    """The constant of an Add behind a MatMul that has a value per channel."""
    reader = _only_reader(graph, node.outputs[0])
    if reader is None or reader.op_type != "Add" or reader.domain:
        return None
    other = reader.inputs[1] if reader.inputs[0] == node.outputs[0] else reader.inputs[0]
    rank = len(graph.shape(node.outputs[0]) or ())
    constant = graph.initializers.get(other)
    return other if constant is not None and len(constant.dims) <= rank else None


def _only_reader(graph: GraphIndex, tensor: str) -> Node | None:
    """The single node that reads a tensor, once, which nobody else sees."""
    readers = graph.consumers.get(tensor, ())
    if len(readers) != 1 or tensor in graph.outputs or tensor in readers[0].captured:
        return None
    return readers[0] if readers[0].inputs.count(tensor) == 1 else None


def _behind_bias(graph: GraphIndex, node: Node, layer: Member) -> tuple[str | None, int]:
    """Where the channels of a layer come out, and along which axis; None if its bias cannot be scaled with them."""
    output, rank = node.outputs[0], len(graph.shape(node.outputs[0]) or ())
    axis = 1 if node.op_type in ("Conv", "ConvTranspose") else rank - 1
    if axis < 1:
        return None, axis
    if layer.bias is not None:
        channels = (graph.shape(output) or ())[axis]
        dims = graph.initializers[layer.bias].dims if layer.bias in graph.initializers else ()
        if not _is_own(graph, layer.bias) or math.prod(dims) != channels or not dims or dims[-1] != channels:
            return None, axis
        if node.op_type == "MatMul":
            output = graph.consumers[output][0].outputs[0]
    return output, axis


def _reader(graph: GraphIndex, tensor: str | None, axis: int) -> tuple[Node, int] | None:
    """The layer that reads the channels of a tensor, and the values it reads for each; None if there is none."""
    repeat = 1
    while tensor is not None:
        node = _only_reader(graph, tensor)
        if node is None or node.domain or node.inputs[0] != tensor:
            return None
        if node.op_type in ("Conv", "ConvTranspose"):
            return (node, repeat) if axis == 1 else None
        if node.op_type in ("Gemm", "MatMul"):
            return (node, repeat) if axis == len(graph.shape(tensor) or ()) - 1 else None
        moved = _passed(graph, node, axis)
        if moved is None:
            return None
        tensor, axis, repeat = node.outputs[0], moved[0], repeat * moved[1]
    return None


def _passed(graph: GraphIndex, node: Node, axis: int) -> tuple[int, int] | None:
    """Where a homogeneous node leaves the channels: (axis, positions side by side); None if the node is none."""
    if any(node.outputs[1:]):
        return None
    if node.op_type in _HOMOGENEOUS or (node.op_type in _WINDOWS and axis == 1):
        return axis, 1
    if node.op_type == "Pad":
        return (axis, 1) if _pads_zeros(graph, node, axis) else None
    if node.op_type in _REDUCING:
        return _reduced(graph, node, axis)
    if node.op_type in _FLATTENING:
        return _flattened(graph.shape(node.inputs[0]), graph.shape(node.outputs[0]), axis)
    return None


def _pads_zeros(graph: GraphIndex, node: Node, axis: int) -> bool:
    """Whether a Pad adds zeros, and none to the channels."""
    pads, value, axes = (*(graph.constant(name) if name else None for name in node.inputs[1:]), None, None, None)[:3]
    rank = len(graph.shape(node.inputs[0]) or ())
    if pads is None or any(name and name not in graph.initializers for name in node.inputs[1:]):
        return False
    if node.attributes.get("mode", b"constant") != b"constant" or (value is not None and value.any()):
        return False
    chosen = list(range(rank)) if axes is None else [int(a) % rank for a in axes]
    return axis not in chosen or not pads.reshape(2, -1)[:, chosen.index(axis)].any()


def _reduced(graph: GraphIndex, node: Node, axis: int) -> tuple[int, int] | None:
    """Where a reduction over the axes behind the channels leaves them; None for others."""
    rank = len(graph.shape(node.inputs[0]) or ())
    given = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else node.attributes.get("axes")
    if given is None or not len(given):
        return None
    return (axis, 1) if all(int(a) % rank > axis for a in given) else None


def _flattened(
    before: tuple[int | None, ...] | None, after: tuple[int | None, ...] | None, axis: int
) -> tuple[int, int] | None:
    """Where the channels of (batch, channels, ...) are in (batch, channels * positions); None for other shapes."""
    if before is None or after is None or axis != 1 or len(after) != 2 or before[0] != after[0]:
        return None
    positions = before[2:]
    if before[1] is None or any(size is None for size in positions):
        return None
    repeat = math.prod(size for size in positions if size is not None)
    return (1, repeat) if after[1] == before[1] * repeat else None
