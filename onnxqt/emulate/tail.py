"""What follows a node, up to the quantizer that makes codes of its result."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from onnx import NodeProto

from onnxqt import numerics
from onnxqt.emulate.graph import Graph, NotIntegerError, fixed, is_constant, node_name, per_tensor
from onnxqt.emulate.steps import Detail, NodeInfo, Run, Step, Tensor, storage
from onnxqt.numerics import Array, Grid, QParams


@dataclass(frozen=True, slots=True)
class Tail:
    """The quantizer that a node feeds, the clamp and the bias before it, and the nodes that all this took."""

    codes: str
    params: QParams
    low: int
    high: int
    bias: str
    taken: tuple[str, ...]

    @property
    def clamp(self) -> tuple[int, int] | None:
        """The limits of the codes where an activation narrows them, else None."""
        limits = (self.low, self.high)
        return None if limits == (self.params.grid.qmin, self.params.grid.qmax) else limits

    def limit(self, codes: Array) -> Array:
        """The activation, on codes."""
        return np.clip(codes, self.low, self.high) if self.clamp else codes

    def within(self, codes: Array) -> Array:
        """Stored codes that fill their storage, limited to the grid and the activation."""
        storage_limits = np.iinfo(codes.dtype)
        if (self.low, self.high) == (storage_limits.min, storage_limits.max):
            return codes
        return np.clip(codes, self.low, self.high)

    def stored(self, codes: Array) -> Array:
        """The activation, on codes that are then stored."""
        return self.limit(codes).astype(storage(self.params.grid), copy=False)


def follow(graph: Graph, node: NodeProto, with_bias: bool = False) -> Tail:
    """Follows the output of `node` to its quantizer.

    Raises:
        NotIntegerError: if anything else reads a value on the way.
    """
    name, bias, taken = node.output[0], "", []
    clips = [node] if node.op_type == "Clip" else []
    while True:
        users = graph.consumers.get(name, [])
        if len(users) != 1 or users[0].op_type not in ("QuantizeLinear", "Relu", "Clip", "Add"):
            raise NotIntegerError("its output goes elsewhere than to one quantizer")
        user = users[0]
        taken.append(user.output[0])
        if user.op_type == "QuantizeLinear":
            if not is_static(graph, user):
                raise NotIntegerError("its output goes to a quantizer whose scale is computed at run time")
            break
        if user.op_type == "Add":
            other = user.input[1 - list(user.input).index(name)]
            if not with_bias or bias or clips or not is_constant(graph, other):
                raise NotIntegerError("its output goes elsewhere than to one quantizer")
            bias = other
        else:
            clips.append(user)
        name = user.output[0]
    codes, params, clip_of_codes = narrowed(graph, user)
    taken += clip_of_codes
    low, high = params.grid.qmin, params.grid.qmax
    for clip in clips:
        first, last = _clamp(graph, clip, params)
        low, high = (min(max(code, first), last) for code in (low, high))
    return Tail(codes, params, low, high, bias, tuple(taken))


def narrowed(graph: Graph, node: NodeProto) -> tuple[str, QParams, tuple[str, ...]]:
    """The codes that a QuantizeLinear makes, their grid, and the Clip of codes behind it, if there is one."""
    params, codes = per_tensor(graph, node), node.output[0]
    users = graph.consumers.get(codes, [])
    if (
        len(users) != 1
        or users[0].op_type != "Clip"
        or not all(is_constant(graph, name) for name in users[0].input[1:])
    ):
        return codes, params, ()
    low, high = (fixed(graph, users[0], i, end) for i, end in ((1, params.grid.qmin), (2, params.grid.qmax)))
    for bits in range(2, params.grid.bits + 1):
        for narrow in (False, True):
            grid = Grid(bits, params.grid.signed, narrow and params.grid.signed)
            if (grid.qmin, grid.qmax) == (int(low), int(high)):
                clipped = users[0].output[0]
                return clipped, replace(params, grid=grid), (clipped,)
    return codes, params, ()


def is_static(graph: Graph, quantizer: NodeProto) -> bool:
    """Whether the grid of a QuantizeLinear or DequantizeLinear is constant."""
    return all(is_constant(graph, name) for name in quantizer.input[1:] if name)


def _clamp(graph: Graph, node: NodeProto, params: QParams) -> tuple[int, int]:
    """Codes of the bounds of a Relu or Clip."""
    bounds = [0.0, None] if node.op_type == "Relu" else [fixed(graph, node, i) for i in (1, 2)]
    rounding = graph.arithmetic.quantize
    codes = [None if b is None else int(numerics.quantize(np.asarray(b, np.float32), params, rounding)) for b in bounds]
    low, high = codes
    return params.grid.qmin if low is None else low, params.grid.qmax if high is None else high


def emit(graph: Graph, inputs: Sequence[Tensor], tail: Tail, run: Run, about: tuple[NodeInfo, Detail]) -> None:
    """Adds an integer step up to the quantizer of `tail`.

    `run` gives stored codes and, where there is an accumulator, how many did not fit.
    """
    info, detail = about
    graph.done.update(tail.taken)
    graph.grids[tail.codes] = tail.params.grid
    counter = f"{tail.codes}/overflows" if info.accumulator else ""
    outputs = tuple(filter(None, (tail.codes, counter)))
    graph.steps.append(Step(info, tuple(x.codes for x in inputs), outputs, run, counter, detail))


def integer(node: NodeProto, rule: str, implementation: str, note: str = "") -> NodeInfo:
    """How an integer node without an accumulator runs."""
    return NodeInfo(node_name(node), node.op_type, "integer", note=note, rule=rule, implementation=implementation)


def widened(kernel: Callable[..., Array], tail: Tail) -> Run:
    """A step of a kernel that computes with int32 codes."""
    return lambda *codes: (tail.stored(kernel(*(c.astype(np.int32) for c in codes))),)
