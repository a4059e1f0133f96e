"""Gradients of operators that select, move, resample or overwrite values."""

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxqt.numerics import Array
from onnxqt.ops import Attributes
from onnxqt.runtime import Session
from onnxqt.trim.gradients.rule import Call, NoGradientError, Operand, Rule, Vjp

FLAT = "Constant<value_ints = [-1]>()"  # the shape that flattens


def attribute_text(attributes: Attributes, *, without: Sequence[str] = ()) -> str:
    """Attributes in ONNX text, in angle brackets; empty lists, which mean the default, are left out."""
    kept = {name: value for name, value in attributes.items() if name not in without and value != []}
    return f"<{', '.join(f'{name} = {json.dumps(value)}' for name, value in kept.items())}>" if kept else ""


def node_text(call: Call, first: str) -> str:
    """The node itself, reading `first` instead of its first input."""
    names = [first, *("" if operand is None else f"x{i}" for i, operand in enumerate(call.inputs) if i)]
    return f"{call.op_type}{attribute_text(call.attributes)}({', '.join(names)})"


def attribute(call: Call, name: str, default: Any) -> Any:
    """An attribute of a node, or its default."""
    return call.attributes.get(name, default)


def operand(operands: Sequence[Operand | None], index: int) -> Operand | None:
    """An input or output of a node, None if it is absent."""
    return operands[index] if index < len(operands) else None


def known_shape(tensor: Operand | None) -> tuple[int | None, ...]:
    """The shape of a tensor of known rank.

    Raises:
        NoGradientError: if the rank is not known.
    """
    if tensor is None or tensor.shape is None:
        raise NoGradientError("works on a tensor of unknown rank (export the model with shapes)")
    return tensor.shape


def known_sizes(sizes: Iterable[int | None]) -> list[int]:
    """Sizes, all of which are known.

    Raises:
        NoGradientError: if one is not known.
    """
    listed = list(sizes)
    known = [size for size in listed if size is not None]
    if len(known) < len(listed):
        raise NoGradientError("works on sizes that are not known (export the model with fixed height and width)")
    return known


def spatial_sizes(tensor: Operand | None) -> list[int]:
    """The sizes behind batch and channels.

    Raises:
        NoGradientError: if one is not known.
    """
    return known_sizes(known_shape(tensor)[2:])


# --- selecting and moving: each output is an element of the input, or a constant ------------------------


def moved(call: Call) -> Vjp:
    """Each output gradient goes back to where its value came from, found by moving positions instead of values.

    d x[p] = sum of g[q] over all q with y[q] = x[p]

    Positions count from 1; 0 is what the operator fills in, and its sum is dropped.
    """
    return Vjp(
        f"""
        shape = Shape(x0)
        size = Size(x0)
        one = Constant<value_int = 1>()
        slots = Add(size, one)
        numbers = Range(one, slots, one)
        numbered = Reshape(numbers, shape)
        moved = {node_text(call, "numbered")}
        flat = {FLAT}
        origins = Reshape(moved, flat)
        gradients = Reshape(g0, flat)
        slots_shape = Reshape(slots, flat)
        zeros = ConstantOfShape(slots_shape)
        sums = ScatterElements<axis = 0, reduction = "add">(zeros, origins, gradients)
        first = Constant<value_ints = [1]>()
        own = Slice(sums, first, slots_shape)
        d0 = Reshape(own, shape)
        """
    )


def _pad(call: Call) -> Vjp:
    """Of a constant: the padding is cut off, and what was cut off gets zero; else as for everything that moves.

    d value = sum(g) - sum(d x)
    """
    if attribute(call, "mode", "constant") != "constant":
        return moved(call)
    axes = "" if operand(call.inputs, 3) is None else ", , x3"
    body = f"""
        removed = Neg(x1)
        d0 = Pad(g0, removed{axes})
    """
    value = operand(call.inputs, 2)
    if value is not None and value.trained:
        body += """
            everything = ReduceSum<keepdims = 0>(g0)
            inside = ReduceSum<keepdims = 0>(d0)
            padding = Sub(everything, inside)
            value_shape = Shape(x2)
            d2 = Reshape(padding, value_shape)
        """
    return Vjp(body)


def _gather_elements(call: Call) -> Vjp:
    """Each gradient goes back to its element.

    d x[index] += g
    """
    return Vjp(
        f"""
        shape = Shape(x0)
        zeros = ConstantOfShape(shape)
        d0 = ScatterElements<axis = {attribute(call, "axis", 0)}, reduction = "add">(zeros, x1, g0)
        """
    )


def _gather_nd(call: Call) -> Vjp:
    """Each gradient goes back to its slice.

    d x[index] += g
    """
    if attribute(call, "batch_dims", 0):
        return moved(call)
    return Vjp(
        """
        shape = Shape(x0)
        zeros = ConstantOfShape(shape)
        d0 = ScatterND<reduction = "add">(zeros, x1, g0)
        """
    )


def _scatter_elements(call: Call) -> Vjp:
    """See `_scattered`."""
    axis = f"<axis = {attribute(call, 'axis', 0)}>"
    return _scattered(call, f"ScatterElements{axis}", f"GatherElements{axis}")


def _scatter_nd(call: Call) -> Vjp:
    """See `_scattered`."""
    return _scattered(call, "ScatterND", "GatherND")


def _scattered(call: Call, scatter: str, gather: str) -> Vjp:
    """What was overwritten gets no gradient, what was added to keeps it.

    d x = g, with zeros at index unless it adds;  d updates = g[index]
    """
    reduction = attribute(call, "reduction", "none")
    if reduction not in ("none", "add"):
        raise NoGradientError(f"scatters with the reduction '{reduction}'")
    overwritten = f"""
        updates_shape = Shape(x2)
        zeros = ConstantOfShape(updates_shape)
        d0 = {scatter}(g0, x1, zeros)
    """
    data = "d0 = Identity(g0)\n" if reduction == "add" else overwritten
    return Vjp(data + f"d2 = {gather}(g0, x1)")


def _top_k(call: Call) -> Vjp:
    """The gradients of the values go back to their places.

    d x[index] = g
    """
    indices, again = "y1", ""
    if operand(call.outputs, 1) is None:
        indices, again = "indices", f"values, indices = {node_text(call, 'x0')}"
    return Vjp(
        f"""
        {again}
        shape = Shape(x0)
        zeros = ConstantOfShape(shape)
        d0 = ScatterElements<axis = {attribute(call, "axis", -1)}>(zeros, {indices}, g0)
        """
    )


def _depth_to_space(call: Call) -> Vjp:
    """The inverse move: SpaceToDepth, which leaves the channels block by block (DCR).

    CRD has the blocks of each channel together instead.
    """
    block = attribute(call, "blocksize", 1)
    if attribute(call, "mode", "DCR") == "DCR":
        return Vjp(f"d0 = SpaceToDepth<blocksize = {block}>(g0)")
    return Vjp(
        f"""
        deep = SpaceToDepth<blocksize = {block}>(g0)
        blocks = Constant<value_ints = [0, {block * block}]>()
        channels = Shape<start = 1, end = 2>(g0)
        flat = {FLAT}
        split_shape = Concat<axis = 0>(blocks, channels, flat)
        split = Reshape(deep, split_shape)
        together = Transpose<perm = [0, 2, 1, 3]>(split)
        shape = Shape(x0)
        d0 = Reshape(together, shape)
        """
    )


def _space_to_depth(call: Call) -> Vjp:
    """The inverse move."""
    return Vjp(f'd0 = DepthToSpace<blocksize = {attribute(call, "blocksize", 1)}, mode = "DCR">(g0)')


def _cum_sum(call: Call) -> Vjp:
    """The sum from the other end."""
    exclusive, reverse = attribute(call, "exclusive", 0), attribute(call, "reverse", 0)
    return Vjp(f"d0 = CumSum<exclusive = {exclusive}, reverse = {1 - reverse}>(g0, x1)")


def _same_again(call: Call) -> Vjp:
    """Operators that are linear and their own transpose."""
    return Vjp(f"d0 = {node_text(call, 'g0')}")


def _col2im(call: Call) -> Vjp:
    """The columns of the gradient: a convolution by each unit block, with the channels in the batch.

    d x[n, c k + j, l] = g[n, c, position j of the block at l]
    """
    block = operand(call.inputs, 2)
    if block is None or block.value is None:
        raise NoGradientError("has a computed block shape")
    sizes = [int(size) for size in block.value]
    count = prod(sizes)
    return Vjp(
        f"""
        spatial = Shape<start = 2>(g0)
        folded_start = Constant<value_ints = [-1, 1]>()
        folded_shape = Concat<axis = 0>(folded_start, spatial)
        folded = Reshape(g0, folded_shape)
        columns = Conv{attribute_text(call.attributes)}(folded, units)
        shape = Shape(x0)
        d0 = Reshape(columns, shape)
        """,
        {"units": np.eye(count, dtype=np.float32).reshape(count, 1, *sizes)},
    )


def _affine_grid(call: Call) -> Vjp:
    """The grid is linear in theta; `base` is the grid of the unit transformation.

    y = (base, 1) theta^T:  d theta = g^T (base, 1)
    """
    *_, rank, _ = known_sizes(known_shape(call.inputs[0])[1:])
    unit = np.eye(rank, rank + 1, dtype=np.float32)[None]
    # Not `value_ints` in the text: shape inference inside functions takes that for a scalar, which Pad refuses.
    bordered = np.array([0, 0, 0, 1], np.int64)
    return Vjp(
        f"""
        spatial = Shape<start = 1, end = {1 + rank}>(g0)
        single = Constant<value_ints = [1, 1]>()
        size = Concat<axis = 0>(single, spatial)
        base = AffineGrid{attribute_text(call.attributes)}(unit, size)
        points = Constant<value_ints = [-1, {rank}]>()
        base_points = Reshape(base, points)
        one = Constant<value_float = 1.0>()
        homogeneous = Pad(base_points, bordered, one)
        batched = Constant<value_ints = [0, -1, {rank}]>()
        gradients = Reshape(g0, batched)
        transposed = Transpose<perm = [0, 2, 1]>(gradients)
        d0 = MatMul(transposed, homogeneous)
        """,
        {"unit": unit, "bordered": bordered},
    )


# --- Resize: along each axis a multiplication by an interpolation matrix --------------------------------


@dataclass(frozen=True)
class _ResizedAxis:
    """One axis that Resize changes.

    Attributes:
        axis: its number.
        size: of the input.
        out: of the output.
        scale: None where the node has sizes instead of scales.
        roi: the part of the input that is kept, in [0, 1] if it lies inside.
    """

    axis: int
    size: int
    out: int
    scale: float | None
    roi: tuple[float, float]


def _resize(call: Call) -> Vjp:
    """Each axis is multiplied by a matrix (out, in) of its own, and the gradient by the transposed ones.

    y = M_1 ... M_k x:  d x = M_1^T ... M_k^T g

    What ONNX Runtime makes of unit vectors is the matrix. A nearest-neighbour enlargement by a whole number
    repeats values, and its transposed sums.
    """
    axes = _resized_axes(call)
    first = axes[-1].axis if axes else 0
    sizes = known_sizes(known_shape(call.inputs[0])[first:]) if axes else []
    constants: dict[str, Array] = {}
    body, last = "", "g0"
    for resized in axes:
        step = _resize_step(_interpolation(call, resized), prod(sizes[resized.axis - first + 1 :]))
        body += step.body.replace("#", str(resized.axis)).replace("@", last)
        constants |= {name.replace("#", str(resized.axis)): value for name, value in step.constants.items()}
        last = f"back{resized.axis}"
    return Vjp(body + f"shape = Shape(x0)\nd0 = Reshape({last}, shape)", constants)


def _resize_step(matrix: Array, rest: int) -> Vjp:
    """Multiply `@` by the transposed of `matrix` (out, in) along the axis #; behind it lie `rest` values."""
    out, size = matrix.shape
    constants: dict[str, Array] = {}
    if np.array_equal(matrix, np.repeat(np.eye(size), out // size, axis=0)):
        # Without an axis of size 1 at the end: with it, ReduceSum takes many times as long.
        split = [-1, size, out // size, *([rest] if rest > 1 else [])]
        step = "ReduceSum<keepdims = 0>(split#, repeats#)"
        constants["repeats#"] = np.array([2], np.int64)
    elif rest == 1:
        split, step = [-1, out], "MatMul(split#, matrix#)"
        constants["matrix#"] = matrix
    else:
        split, step = [-1, out, rest], "MatMul(matrix#, split#)"
        constants["matrix#"] = np.ascontiguousarray(matrix.T)
    body = f"""
        shape# = Constant<value_ints = {split}>()
        split# = Reshape(@, shape#)
        back# = {step}
    """
    return Vjp(body, constants)


_WHOLE = (0.0, 1.0)  # the region that is not cropped


def _resized_axes(call: Call) -> list[_ResizedAxis]:
    """The axes that change, the last first: behind them all sizes are those of the input again."""
    shape, out = known_shape(call.inputs[0]), known_shape(call.outputs[0])
    if attribute(call, "keep_aspect_ratio_policy", "stretch") != "stretch":
        raise NoGradientError("keeps the aspect ratio")
    named = [axis % len(shape) for axis in attribute(call, "axes", list(range(len(shape))))]
    cropped = attribute(call, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    scales = _scales(call)
    roi = _constant(call, 1, "region") if cropped else np.repeat(_WHOLE, len(named))
    found = []
    for i, axis in enumerate(named):
        size, target, scale = shape[axis], out[axis], None if scales is None else float(scales[i])
        region = (float(roi[i]), float(roi[i + len(named)]))
        if not _keeps_size(axis, size, target, scale) or region != _WHOLE:
            size, target = known_sizes((size, target))
            found.append(_ResizedAxis(axis, size, target, scale, region))
    return sorted(found, key=lambda resized: -resized.axis)


def _keeps_size(axis: int, size: int | None, target: int | None, scale: float | None) -> bool:
    """Whether Resize leaves an axis alone; a batch or channel axis of unknown size does not become a given one."""
    if scale is not None:
        return scale == 1
    return axis < 2 if size is None else size == target


def _scales(call: Call) -> Array | None:
    """The scales of Resize, None if it has sizes."""
    if operand(call.inputs, 3) is not None:
        return None
    return _constant(call, 2, "scale")


def _constant(call: Call, index: int, what: str) -> Array:
    tensor = operand(call.inputs, index)
    if tensor is None or tensor.value is None:
        raise NoGradientError(f"has a computed {what}")
    return tensor.value


def _interpolation(call: Call, resized: _ResizedAxis) -> Array:
    """What ONNX Runtime's Resize makes of the unit vectors of one axis, float32 (out, in)."""
    attributes = {name: value for name, value in call.attributes.items() if name not in ("axes", "extrapolation_value")}
    size, (start, end) = resized.size, resized.roi
    feeds: dict[str, Array] = {
        "x": np.eye(size, dtype=np.float32).reshape(size, 1, size, 1),
        "roi": np.array([0, 0, start, 0, 1, 1, end, 1], np.float32),
    }
    if resized.scale is None:
        feeds["sizes"] = np.array([size, 1, resized.out, 1], np.int64)
    else:
        feeds["scales"] = np.array([1, 1, resized.scale, 1], np.float32)
    inputs = ["x", "roi", "scales"] if "scales" in feeds else ["x", "roi", "", "sizes"]
    node = helper.make_node("Resize", inputs, ["y"], **attributes)
    return run_node(node, call.opset, feeds)[:, 0, :, 0].T


def run_node(node: onnx.NodeProto, opset: int, feeds: Mapping[str, Array]) -> Array:
    """What ONNX Runtime computes as the first output of a node; all inputs but the first are constants."""
    first, *others = [name for name in node.input if name]
    value = helper.make_tensor_value_info(first, TensorProto.FLOAT, feeds[first].shape)
    result = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    constants = [onnx.numpy_helper.from_array(feeds[name], name) for name in others]
    graph = helper.make_graph([node], "one node", [value], [result], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    return Session(model).run({first: feeds[first]})[node.output[0]]


# --- GridSample -----------------------------------------------------------------------------------------

_MODES = {"bilinear": "linear", "bicubic": "cubic"}  # their names before opset 20
_CUBIC = -0.75  # a of the cubic convolution


def _grid_sample(call: Call) -> Vjp:
    """Each output gradient goes back to the pixels around its point, with their weights; the grid gets none.

    d x[pixel] += g[point] weight(pixel, point), where a weight is a product of one weight per axis
    """
    rank = len(known_shape(call.inputs[0])) - 2
    mode = attribute(call, "mode", "linear")
    mode = _MODES.get(mode, mode)
    taps = {"nearest": 1, "linear": 2, "cubic": 4}[mode]
    body = "".join(_grid_axis(call, axis, rank) + _TAPS[mode].replace("#", str(axis)) for axis in range(rank))
    body += "".join(_grid_tap(call, axis, tap) for axis in range(rank) for tap in range(taps))
    picks = list(itertools.product(range(taps), repeat=rank))
    body += "".join(_grid_pixel(number, pick) for number, pick in enumerate(picks))
    return Vjp(
        f"""
        points = Constant<value_ints = [0, 1, -1]>()
        pixels = Constant<value_ints = [0, 0, -1]>()
        gradients = Reshape(g0, pixels)
        zero = Constant<value_float = 0.0>()
        one = Constant<value_float = 1.0>()
        two = Constant<value_float = 2.0>()
        half = Constant<value_float = 0.5>()
        a = Constant<value_float = {_CUBIC}>()
        {body}
        all_updates = Concat<axis = 2>({", ".join(f"update{number}" for number in range(len(picks)))})
        all_indices = Concat<axis = 2>({", ".join(f"index{number}" for number in range(len(picks)))})
        updates_shape = Shape(all_updates)
        indices = Expand(all_indices, updates_shape)
        shape = Shape(x0)
        image = ConstantOfShape(shape)
        zeros = Reshape(image, pixels)
        sums = ScatterElements<axis = 2, reduction = "add">(zeros, indices, all_updates)
        d0 = Reshape(sums, shape)
        """
    )


def _grid_axis(call: Call, axis: int, rank: int) -> str:
    """The points along one axis, in pixels: p#, float32 (n, 1, points). The grid names the last axis first."""
    corners = attribute(call, "align_corners", 0)
    text = f"""
        component# = Constant<value_int = {rank - 1 - axis}>()
        flat_point# = Gather<axis = -1>(x1, component#)
        point# = Reshape(flat_point#, points)
        size# = Shape<start = {2 + axis}, end = {3 + axis}>(x0)
        length# = Cast<to = {TensorProto.FLOAT}>(size#)
        top# = Sub(length#, one)
        up# = Add(point#, one)
    """
    if corners:
        text += """
            share# = Mul(up#, half)
            p# = Mul(share#, top#)
            low# = Identity(zero)
            high# = Identity(top#)
        """
    else:
        text += """
            double# = Mul(up#, length#)
            shifted# = Sub(double#, one)
            p# = Mul(shifted#, half)
            low# = Neg(half)
            high# = Sub(length#, half)
        """
    return text.replace("#", str(axis))


# The pixels t# around the points p# and their weights w#, per mode.
_TAPS: Mapping[str, str] = {
    "nearest": """
        t#_0 = Round(p#)
        w#_0 = Identity(one)
    """,
    "linear": """
        t#_0 = Floor(p#)
        t#_1 = Add(t#_0, one)
        w#_1 = Sub(p#, t#_0)
        w#_0 = Sub(one, w#_1)
    """,
    "cubic": """
        t#_1 = Floor(p#)
        t#_0 = Sub(t#_1, one)
        t#_2 = Add(t#_1, one)
        t#_3 = Add(t#_2, one)
        right#_1 = Sub(p#, t#_1)
        right#_2 = Sub(one, right#_1)
        beyond#_1 = Mul(right#_1, right#_2)
        a_beyond# = Mul(beyond#_1, a)
        w#_0 = Mul(a_beyond#, right#_2)
        w#_3 = Mul(a_beyond#, right#_1)
        a2# = Add(a, two)
        a3# = Add(a2#, one)
        square#_1 = Mul(right#_1, right#_1)
        slope#_1 = Mul(a2#, right#_1)
        bend#_1 = Sub(slope#_1, a3#)
        fall#_1 = Mul(bend#_1, square#_1)
        w#_1 = Add(fall#_1, one)
        square#_2 = Mul(right#_2, right#_2)
        slope#_2 = Mul(a2#, right#_2)
        bend#_2 = Sub(slope#_2, a3#)
        fall#_2 = Mul(bend#_2, square#_2)
        w#_2 = Add(fall#_2, one)
    """,
}


def _grid_tap(call: Call, axis: int, tap: int) -> str:
    """A pixel moved into the image by the padding mode, i#, and its weight, v#: zero outside a zero padding."""
    padding = attribute(call, "padding_mode", "zeros")
    text = ""
    if padding == "reflection":  # within [low, high], a triangle wave
        text = """
            range# = Sub(high@, low@)
            period# = Mul(range#, two)
            above# = Sub(t#, low@)
            turns# = Div(above#, period#)
            whole# = Floor(turns#)
            passed# = Mul(whole#, period#)
            phase# = Sub(above#, passed#)
            back# = Sub(period#, phase#)
            height# = Min(phase#, back#)
            inner# = Add(height#, low@)
        """
    source = "inner" if padding == "reflection" else "t"
    text += f"""
        raised# = Max({source}#, zero)
        inside# = Min(raised#, top@)
        i# = Cast<to = {TensorProto.INT64}>(inside#)
    """
    text += (
        """
            is_inside# = Equal(t#, inside#)
            v# = Where(is_inside#, w#, zero)
        """
        if padding == "zeros"
        else "v# = Identity(w#)\n"
    )
    return text.replace("#", f"{axis}_{tap}").replace("@", str(axis))


def _grid_pixel(number: int, pick: tuple[int, ...]) -> str:
    """One of the pixels around the points: its position in the flat image, and what goes back to it."""
    index, weight, text = f"i0_{pick[0]}", f"v0_{pick[0]}", ""
    for axis, tap in list(enumerate(pick))[1:]:
        p = f"m{number}_{axis}"
        text += f"""
            {p}_row = Mul({index}, size{axis})
            {p}_index = Add({p}_row, i{axis}_{tap})
            {p}_weight = Mul({weight}, v{axis}_{tap})
        """
        index, weight = f"{p}_index", f"{p}_weight"
    return f"""
        {text}
        index{number} = Identity({index})
        update{number} = Mul(gradients, {weight})
    """


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("CenterCropPad", "Compress", "Slice"), moved),
    **dict.fromkeys(("ReverseSequence", "Trilu"), _same_again),
    "AffineGrid": _affine_grid,
    "Col2Im": _col2im,
    "CumSum": _cum_sum,
    "DepthToSpace": _depth_to_space,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "GridSample": _grid_sample,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "SpaceToDepth": _space_to_depth,
    "TopK": _top_k,
}
