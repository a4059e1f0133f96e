"""Rules for operators whose gradients in onnxruntime-training are right but slow on a CPU.

A rule that raises `NoGradientError` leaves the node to the gradient that the trainer has.
"""

import math
from collections.abc import Mapping

from onnxqt.trim.gradients.indexing import attribute_text
from onnxqt.trim.gradients.rule import Call, NoGradientError, Operand, Rule, Vjp

_STEP = 3e38  # times a positive float32 that is not subnormal: at least 1


def _relu(call: Call) -> Vjp:
    """D x = g where y is positive: HardSigmoid with a steep slope is a step function, in vector instructions."""
    return Vjp(f"inside = HardSigmoid<alpha = {_STEP}, beta = 0.0>(y0)\n d0 = Mul(g0, inside)")


def _clip(call: Call) -> Vjp:
    """D x = g where nothing was clipped."""
    if any(bound is not None and bound.trained for bound in call.inputs[1:]):
        raise NoGradientError("has computed bounds")
    return Vjp("kept = Equal(x0, y0) inside = Cast<to = 1>(kept) d0 = Mul(g0, inside)")


def _conv(call: Call) -> Vjp:
    """The gradients of a two-dimensional convolution of stride 1 without groups.

    d x = Conv(g, W turned by 180 degrees, input and output channels swapped)
    d W[:, :, i, j] = sum over samples of  g_n (channels, positions)  x_n shifted by (i, j) (channels, positions)^T
    d bias = sum(g)

    The second runs as matrix products of each sample with each shift; where a sample has fewer positions than
    there are output channels, these products would need more memory than the shifted inputs.
    """
    x, weight, *_ = call.inputs
    out, inputs, height, width = _sizes(weight)
    positions = math.prod(_sizes(call.outputs[0])[2:])
    attributes = call.attributes
    if attributes.get("auto_pad", "NOTSET") != "NOTSET" or attributes.get("group", 1) != 1:
        raise NoGradientError("is grouped or finds its pads itself")
    if any(n != 1 for name in ("strides", "dilations") for n in attributes.get(name, ())):
        raise NoGradientError("leaves out positions")
    top, left, bottom, right = attributes.get("pads", [0] * 4)
    reach = [height - 1 - top, width - 1 - left, height - 1 - bottom, width - 1 - right]
    if min(reach) < 0 or positions < out:
        raise NoGradientError("has wide pads or few positions")
    rows, columns = _sizes(x)[2:]
    results = (rows + top + bottom - height + 1, columns + left + right - width + 1)
    to_x = f"""
        turned_axes = Constant<value_ints = [2, 3]>()
        last = Constant<value_ints = [-1, -1]>()
        first = Constant<value_ints = [{-height - 1}, {-width - 1}]>()
        swapped = Transpose<perm = [1, 0, 2, 3]>(x1)
        turned = Slice(swapped, last, first, turned_axes, last)
        d0 = Conv{attribute_text({"kernel_shape": [height, width], "pads": reach})}(g0, turned)
    """
    texts = (to_x, _to_weight(call, (out, inputs, height, width), results), _TO_BIAS)
    wanted = [
        text for operand, text in zip(call.inputs, texts, strict=False) if operand is not None and operand.trained
    ]
    return Vjp("\n".join(wanted))


_TO_BIAS = """
    all_but_channels = Constant<value_ints = [0, 2, 3]>()
    d2 = ReduceSum<keepdims = 0>(g0, all_but_channels)
"""


def _to_weight(call: Call, shape: tuple[int, ...], results: tuple[int, int]) -> str:
    out, inputs, height, width = shape
    top, left, bottom, right = call.attributes.get("pads", [0] * 4)
    source = "x0" if not any((top, left, bottom, right)) else "padded"
    text = f"""
        around = Constant<value = int64[8] {{0, 0, {top}, {left}, 0, 0, {bottom}, {right}}}>()
        padded = Pad(x0, around)
        flat = Constant<value_ints = [0, 0, -1]>()
        image_axes = Constant<value_ints = [2, 3]>()
        samples = Constant<value_ints = [0]>()
        flat_g = Reshape(g0, flat)
    """
    products = []
    for i in range(height):
        for j in range(width):
            at = f"{i}_{j}"
            products.append(f"product_{at}")
            text += f"""
        from_{at} = Constant<value_ints = [{i}, {j}]>()
        to_{at} = Constant<value_ints = [{i + results[0]}, {j + results[1]}]>()
        shifted_{at} = Slice({source}, from_{at}, to_{at}, image_axes)
        flat_{at} = Reshape(shifted_{at}, flat)
        product_{at} = com.microsoft.FusedMatMul<transB = 1>(flat_g, flat_{at})
            """
    return f"""{text}
        all_products = Concat<axis = 2>({", ".join(products)})
        total = ReduceSum<keepdims = 0>(all_products, samples)
        by_position = Constant<value_ints = [{out}, {height}, {width}, {inputs}]>()
        shaped = Reshape(total, by_position)
        d1 = Transpose<perm = [0, 3, 1, 2]>(shaped)
    """


def _sizes(operand: Operand | None) -> list[int]:
    """The sizes of a tensor of four axes; that of the first may be unknown and is then 0."""
    shape = None if operand is None else operand.shape
    if shape is None or len(shape) != 4 or None in shape[1:]:
        raise NoGradientError("works on sizes that are not known")
    return [size or 0 for size in shape]


FASTER: Mapping[str, Rule] = {"Clip": _clip, "Conv": _conv, "Relu": _relu}
