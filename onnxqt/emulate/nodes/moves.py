"""Operators that move or select codes and keep their grid."""

from collections.abc import Callable, Mapping

import numpy as np
from onnx import NodeProto

from onnxqt.emulate.graph import (
    Graph,
    NotIntegerError,
    attributes_of,
    fixed,
    is_constant,
    node_name,
    onnxruntime_run,
    quantized,
    window_of,
)
from onnxqt.emulate.kernels import moves, pooling, resize
from onnxqt.emulate.steps import Detail, NodeInfo, Step, Tensor
from onnxqt.numerics import Array, IntArray, QParams

_Move = Callable[..., Array | tuple[Array, ...]]


def move(graph: Graph, node: NodeProto) -> None:
    """The step of an operator that moves or selects codes."""
    x = quantized(graph, node, 0)
    outputs = tuple(filter(None, node.output))
    if len(outputs) > 1 and node.op_type != "Split":
        raise NotIntegerError("it has more than one output")
    run = MOVES[node.op_type](graph, node, x.params)
    others = [name for name in node.input[1:] if name and node.op_type in _SHAPED and not is_constant(graph, name)]
    if node.op_type in ("Reshape", "Slice"):
        others = [name for name in node.input[1:] if name]
    rule = graph.arithmetic.resize if attributes_of(node).get("mode") == "linear" else ""
    info = NodeInfo(node_name(node), node.op_type, "integer", rule=rule, implementation="codes")

    def step(codes: IntArray, *rest: Array) -> tuple[Array, ...]:
        moved = run(codes, *rest)
        return moved if isinstance(moved, tuple) else (moved,)

    for output in outputs:
        graph.tensors[output] = Tensor(output, x.params)
    detail = Detail(_described(graph, node))
    graph.steps.append(Step(info, (x.codes, *others), outputs, step, detail=detail))


def _described(graph: Graph, node: NodeProto) -> dict[str, object]:
    """Attributes, and constant inputs by the names that ONNX gives them."""
    names = _INPUTS.get(node.op_type, ())
    given = {
        name: fixed(graph, node, i).tolist()
        for i, name in enumerate(names, 1)
        if i < len(node.input) and node.input[i] and is_constant(graph, node.input[i])
    }
    return {**attributes_of(node), **given}


def _relu(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    zero = np.asarray(params.zero_point)
    return lambda codes: np.maximum(codes, zero.astype(codes.dtype))


def _max_pool(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    attributes = attributes_of(node)
    window = window_of(attributes, attributes["kernel_shape"])
    return lambda codes: pooling.max_pool(codes, window, params.grid.qmin)


def _identity(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    if fixed(graph, node, 2, False):
        raise NotIntegerError("it drops values at random")
    return lambda codes: codes


def _reshape(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    allow_zero = bool(attributes_of(node).get("allowzero", 0))
    return lambda codes, shape: moves.reshape(codes, shape, allow_zero)


def _flatten(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    axis = attributes_of(node).get("axis", 1)
    return lambda codes: codes.reshape(int(np.prod(codes.shape[: axis if axis >= 0 else codes.ndim + axis])), -1)


def _transpose(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    order = attributes_of(node).get("perm")
    return lambda codes: np.transpose(codes, order)


def _squeeze(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    given = fixed(graph, node, 1)
    axes = None if given is None else tuple(int(a) for a in given)
    if node.op_type == "Squeeze":
        return lambda codes: np.squeeze(codes, axes)
    return lambda codes: np.expand_dims(codes, axes or ())


def _slice(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    axes, steps = fixed(graph, node, 3), fixed(graph, node, 4)

    def run(codes: IntArray, starts: Array, ends: Array, *_: Array) -> Array:
        along = np.arange(len(starts)) if axes is None else axes
        return moves.slice_along(codes, starts, ends, along, np.ones_like(starts) if steps is None else steps)

    return run


def _pad(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    pads, value, axes = (fixed(graph, node, i) for i in (1, 2, 3))
    mode = attributes_of(node).get("mode", "constant")
    if (mode == "constant" and value is not None and np.any(value != 0)) or np.any(pads < 0) or mode == "wrap":
        raise NotIntegerError("it pads with another value than 0, or crops")
    return lambda codes: moves.pad(codes, pads, axes, mode, int(params.zero_point))


def _by_runtime(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    """ONNX Runtime moves codes of 8 bits as it moves floats."""
    if params.grid.bits > 8 and node.op_type == "Resize":
        raise NotIntegerError(f"{node.op_type} of codes of more than 8 bits")
    names = [node.input[0], *(name for name in node.input[1:] if name and not is_constant(graph, name))]
    return onnxruntime_run(graph, node, names)


def _through_floats(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    """ONNX Runtime moves floats alone here; they hold every code of 16 bits."""
    run = onnxruntime_run(graph, node, [node.input[0]])
    return lambda codes: run(codes.astype(np.float32))[0].astype(codes.dtype)


def _resize(graph: Graph, node: NodeProto, params: QParams) -> _Move:
    attributes = attributes_of(node)
    mode, rule = attributes.get("mode", "nearest"), graph.arithmetic.resize
    if mode == "nearest":
        return _by_runtime(graph, node, params)
    if mode != "linear" or rule == "float":
        raise NotIntegerError(f"the back end interpolates ({mode}) in float")
    scales, sizes = fixed(graph, node, 2), fixed(graph, node, 3)
    coordinates = attributes.get("coordinate_transformation_mode", "half_pixel")
    if coordinates not in resize.COORDINATES or attributes.get("antialias", 0) or "axes" in attributes:
        raise NotIntegerError(f"it interpolates in a way ({coordinates}) that the back end has not")

    def run(codes: IntArray) -> Array:
        wanted = sizes if sizes is not None else np.floor(np.asarray(codes.shape) * scales)
        height, width = (int(n) for n in wanted[-2:])
        if codes.ndim != 4 or tuple(wanted[:2]) != codes.shape[:2]:
            raise ValueError("expected a 4-D tensor resized along its last two axes")
        return resize.BILINEAR_RULES[rule](codes, (height, width), coordinates).astype(codes.dtype)

    return run


_SHAPED = ("Gather", "GatherElements", "GatherND", "Split", "Expand", "Tile", "Resize")
_INPUTS = {
    "Reshape": ("shape",),
    "Slice": ("starts", "ends", "axes", "steps"),
    "Pad": ("pads", "constant_value", "axes"),
    "Squeeze": ("axes",),
    "Unsqueeze": ("axes",),
    "Gather": ("indices",),
    "Split": ("split",),
    "Expand": ("shape",),
    "Tile": ("repeats",),
    "Resize": ("roi", "scales", "sizes"),
}
MOVES: Mapping[str, Callable[[Graph, NodeProto, QParams], _Move]] = {
    "Relu": _relu,
    "MaxPool": _max_pool,
    "Identity": _identity,
    "Dropout": _identity,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _squeeze,
    "Slice": _slice,
    "Pad": _pad,
    "Resize": _resize,
    **dict.fromkeys(("Gather", "GatherElements", "GatherND", "Split", "Expand", "Tile"), _by_runtime),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _through_floats),
}
