"""Gradients of operators that slide a window: pooling, transposed convolution, normalization over channels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
from onnx import helper

from onnxqt.numerics import Array
from onnxqt.trim.gradients.indexing import (
    FLAT,
    attribute,
    attribute_text,
    known_shape,
    known_sizes,
    operand,
    run_node,
    spatial_sizes,
)
from onnxqt.trim.gradients.rule import Call, NoGradientError, Rule, Vjp


@dataclass(frozen=True)
class Window:
    """The geometry of a sliding window: one number per spatial axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    size: list[int]
    out: list[int]

    @classmethod
    def of(cls, call: Call, kernel: list[int]) -> "Window":
        """The window of a pooling operator or a convolution."""
        size, out = spatial_sizes(call.inputs[0]), spatial_sizes(call.outputs[0])
        strides = list(attribute(call, "strides", [1] * len(size)))
        dilations = list(attribute(call, "dilations", [1] * len(size)))
        spans = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(out, strides, kernel, dilations, strict=True)]
        totals = [max(0, span - n) for span, n in zip(spans, size, strict=True)]
        mode = attribute(call, "auto_pad", "NOTSET")
        if mode == "NOTSET":
            begin = list(attribute(call, "pads", [0] * len(size)))[: len(size)]
        else:
            begin = _same_begin(mode, totals)
        return cls(kernel, strides, dilations, begin, size, out)

    def inside(self, axis: int) -> Array:
        """How many positions of the window lie inside the input, for each output position along one axis."""
        starts = np.arange(self.out[axis]) * self.strides[axis] - self.begin[axis]
        taps = starts[:, None] + np.arange(self.kernel[axis]) * self.dilations[axis]
        counts: Array = ((taps >= 0) & (taps < self.size[axis])).sum(axis=1)
        return counts

    def surplus(self) -> list[int]:
        """How far the last window reaches beyond the input; negative where it ends before."""
        geometry = zip(self.out, self.strides, self.kernel, self.dilations, self.begin, self.size, strict=True)
        return [(o - 1) * s + (k - 1) * d + 1 - p - n for o, s, k, d, p, n in geometry]


def _same_begin(mode: str, totals: list[int]) -> list[int]:
    """The pads at the beginning: half of all, the odd one at the end for SAME_UPPER, none for VALID."""
    if mode == "VALID":
        return [0] * len(totals)
    return [total // 2 if mode == "SAME_UPPER" else total - total // 2 for total in totals]


# --- pooling --------------------------------------------------------------------------------------------


def _spread(window: Window, source: str) -> Vjp:
    """Give each value of `source`, of the output's shape, to all positions of its window: `spread`.

    spread = ConvTranspose(source, ones), with the channels in the batch
    """
    surplus = window.surplus()
    attributes = {
        "strides": window.strides,
        "dilations": window.dilations,
        "pads": [*window.begin, *(max(0, extra) for extra in surplus)],
        "output_padding": [max(0, -extra) for extra in surplus],
    }
    body = f"""
        folded_shape = Constant<value_ints = {[-1, 1, *window.out]}>()
        folded = Reshape({source}, folded_shape)
        folded_spread = ConvTranspose{attribute_text(attributes)}(folded, ones)
        shape = Shape(x0)
        spread = Reshape(folded_spread, shape)
    """
    return Vjp(body, {"ones": np.ones([1, 1, *window.kernel], np.float32)})


def _average_pool(call: Call) -> Vjp:
    """Each output gradient, divided by the number of values averaged, goes back to every value of its window.

    d x = ConvTranspose(g * share, ones), share = 1 / count

    What ONNX Runtime divides by where windows reach beyond the input differs from the ONNX standard, so it is
    measured: the average of ones is (values inside) / count.
    """
    window = Window.of(call, call.attributes["kernel_shape"])
    inside = reduce(np.multiply.outer, (window.inside(axis) for axis in range(len(window.size))))
    pool = helper.make_node(call.op_type, ["x"], ["y"], **call.attributes)
    average = run_node(pool, call.opset, {"x": np.ones([1, 1, *window.size], np.float32)})
    share = (average / np.maximum(inside, 1)).astype(np.float32)
    spread = _spread(window, "shares")
    body = f"shares = Mul(g0, share)\n{spread.body}\nd0 = Identity(spread)"
    return Vjp(body, {**spread.constants, "share": share})


def _lp_pool(call: Call) -> Vjp:
    """For y = (sum |x|^p)^(1/p):  d x = sign(x) |x|^(p-1) (sum of g y^(1-p) over the windows around x).

    Where y = 0 so is x, and the gradient is set to zero.
    """
    p = attribute(call, "p", 2)
    spread = _spread(Window.of(call, call.attributes["kernel_shape"]), "shares")
    body = f"""
        zero = Constant<value_float = 0.0>()
        one = Constant<value_float = 1.0>()
        down = Constant<value_float = {float(1 - p)}>()
        up = Constant<value_float = {float(p - 1)}>()
        positive = Greater(y0, zero)
        norm = Where(positive, y0, one)
        scale = Pow(norm, down)
        shares = Mul(g0, scale)
        {spread.body}
        size = Abs(x0)
        power = Pow(size, up)
        sign = Sign(x0)
        slope = Mul(sign, power)
        d0 = Mul(slope, spread)
    """
    return Vjp(body, spread.constants)


def _max_pool(call: Call) -> Vjp:
    """Each gradient goes back to the largest value of its window.

    d x[index] += g, with row-major positions in the whole tensor
    """
    indices, again = "y1", ""
    if operand(call.outputs, 1) is None or attribute(call, "storage_order", 0):
        indices = "indices"
        again = f"largest, indices = MaxPool{attribute_text(call.attributes, without=['storage_order'])}(x0)"
    return Vjp(
        f"""
        {again}
        flat = {FLAT}
        origins = Reshape({indices}, flat)
        gradients = Reshape(g0, flat)
        size = Size(x0)
        flat_shape = Reshape(size, flat)
        zeros = ConstantOfShape(flat_shape)
        sums = ScatterElements<axis = 0, reduction = "add">(zeros, origins, gradients)
        shape = Shape(x0)
        d0 = Reshape(sums, shape)
        """
    )


def _max_unpool(call: Call) -> Vjp:
    """Of two values put into the same place, both get its gradient.

    d x = g[index]
    """
    return Vjp(
        f"""
        flat = {FLAT}
        gradients = Reshape(g0, flat)
        d0 = Gather<axis = 0>(gradients, x1)
        """
    )


# --- convolution ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Geometry:
    """The geometry of a convolution or a transposed convolution, between its large and its small side.

    Attributes:
        strides: of the windows on the large side.
        dilations: of the kernel.
        begin: pads at the beginning of the large side.
        end: pads at its end.
        extra: how far the large side reaches beyond the windows, less than a stride.
    """

    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    extra: list[int]

    @classmethod
    def of_convolution(cls, call: Call) -> "_Geometry":
        """The large side is the input."""
        window = Window.of(call, spatial_sizes(call.inputs[1]))
        surplus = window.surplus()
        end, extra = [max(0, n) for n in surplus], [max(0, -n) for n in surplus]
        return cls(window.strides, window.dilations, window.begin, end, extra)

    @classmethod
    def of_transposed(cls, call: Call) -> "_Geometry":
        """The large side is the output; with `output_shape` or SAME, its pads are what is left over."""
        kernel = spatial_sizes(call.inputs[1])
        strides = list(attribute(call, "strides", [1] * len(kernel)))
        dilations = list(attribute(call, "dilations", [1] * len(kernel)))
        padding = list(attribute(call, "output_padding", [0] * len(kernel)))
        spans = [(k - 1) * d + 1 + o for k, d, o in zip(kernel, dilations, padding, strict=True)]
        begin, end = _transposed_pads(call, strides, spans)
        extra = [o + max(0, -pad) for o, pad in zip(padding, end, strict=True)]
        if any(beyond >= s for beyond, s in zip(extra, strides, strict=True)):
            # ONNX Runtime 1.19 reads memory behind its buffer there, and the forward values are not defined.
            raise NoGradientError("gives out a stride or more than its windows reach")
        return cls(strides, dilations, begin, [max(0, pad) for pad in end], extra)

    @property
    def pads(self) -> list[int]:
        """In the order of the attribute."""
        return [*self.begin, *self.end]

    def attributes(self, call: Call) -> dict[str, Any]:
        """Those that a convolution from the large to the small side shares with the transposed one back."""
        shared = {"strides": self.strides, "dilations": self.dilations, "pads": self.pads}
        return {"group": attribute(call, "group", 1), **shared}


def _transposed_pads(call: Call, strides: list[int], spans: list[int]) -> tuple[list[int], list[int]]:
    """The pads that ONNX Runtime uses, begin and end; negative where `output_shape` asks for more than there is."""
    rank = len(strides)
    mode, shape = attribute(call, "auto_pad", "NOTSET"), list(attribute(call, "output_shape", []))
    if shape:
        size = spatial_sizes(call.inputs[0])
        full = [(n - 1) * s + span for n, s, span in zip(size, strides, spans, strict=True)]
        totals = [f - target for f, target in zip(full, shape[-rank:], strict=True)]
    elif mode in ("NOTSET", "VALID"):
        pads = list(attribute(call, "pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    else:
        totals = [max(0, span - s) for span, s in zip(spans, strides, strict=True)]
    begin = _same_begin("SAME_UPPER" if mode == "SAME_UPPER" else "SAME_LOWER", [max(0, n) for n in totals])
    return begin, [total - pad for total, pad in zip(totals, begin, strict=True)]


def _conv(call: Call) -> Vjp:
    """The gradient of the input is a transposed convolution.

    d x = ConvTranspose(g, W);  d W[o, i] = the convolution of x[:, i] by g[:, o] over the batch;  d bias = sum(g)
    """
    geometry = _Geometry.of_convolution(call)
    attributes = {**geometry.attributes(call), "output_padding": geometry.extra}
    to_x = f"d0 = ConvTranspose{attribute_text(attributes)}(g0, x1)"
    return _convolution_gradients(call, to_x, _to_weights(call, geometry, "x0", "g0"))


def _conv_transpose(call: Call) -> Vjp:
    """The gradient of the input is a convolution.

    d x = Conv(g, W);  d W[i, o] = the convolution of g[:, o] by x[:, i] over the batch;  d bias = sum(g)
    """
    geometry = _Geometry.of_transposed(call)
    to_x = f"d0 = Conv{attribute_text(geometry.attributes(call))}(g0, x1)"
    return _convolution_gradients(call, to_x, _to_weights(call, geometry, "g0", "x0"))


def _convolution_gradients(call: Call, to_x: str, to_weights: str) -> Vjp:
    axes = [0, *range(2, len(known_shape(call.inputs[1])))]
    to_bias = f"""
        all_but_channels = Constant<value_ints = {axes}>()
        d2 = ReduceSum<keepdims = 0>(g0, all_but_channels)
    """
    texts = zip(call.inputs, (to_x, to_weights, to_bias), strict=False)
    return Vjp("\n".join(text for tensor, text in texts if tensor is not None and tensor.trained))


def _to_weights(call: Call, geometry: _Geometry, large: str, small: str) -> str:
    """The gradient of the weights: the convolution of the large side by the small one, over the batch.

    Batch and channels change places, and so do stride and dilation; each batch of a group is a group.
    """
    group, rank = attribute(call, "group", 1), len(geometry.strides)
    (channels,) = known_sizes(known_shape(call.inputs[1])[1:2])
    attributes = {
        "group": group,
        "strides": geometry.dilations,
        "dilations": geometry.strides,
        "pads": geometry.pads,
    }
    swap = f"<perm = {[1, 0, *range(2, 2 + rank)]}>"
    body = f"""
        kernel = Transpose{swap}({small})
        group_shape = Constant<value_ints = [0, {group}, {channels}, -1]>()
        grouped = Reshape({large}, group_shape)
        channels_first = Transpose<perm = [2, 1, 0, 3]>(grouped)
        folded_start = Constant<value_ints = [{channels}, -1]>()
        spatial = Shape<start = 2>({large})
        folded_shape = Concat<axis = 0>(folded_start, spatial)
        folded = Reshape(channels_first, folded_shape)
        windows = Conv{attribute_text(attributes)}(folded, kernel)
        to_weight = Transpose{swap}(windows)
    """
    if all(extra < d for extra, d in zip(geometry.extra, geometry.dilations, strict=True)):
        return f"{body}\nd1 = Identity(to_weight)"
    # The kernel too has gone on beyond the windows.
    return f"""
        {body}
        starts = Constant<value_ints = {[0] * (2 + rank)}>()
        ends = Shape(x1)
        d1 = Slice(to_weight, starts, ends)
    """


# --- normalization over channels ------------------------------------------------------------------------


def _lrn(call: Call) -> Vjp:
    """For s = bias + alpha mean(x^2) and y = x s^-beta:  d x = g s^-beta - 2 alpha beta x mean(g y / s).

    The mean goes over `size` channels around each, with zeros beyond the first and the last; size is odd in
    ONNX Runtime, so the windows of the second mean are those of the first.
    """
    alpha, beta, bias = attribute(call, "alpha", 1e-4), attribute(call, "beta", 0.75), attribute(call, "bias", 1.0)
    size = attribute(call, "size", 1)
    pads = [size // 2, 0, size // 2, 0]
    mean = f"AveragePool<kernel_shape = [{size}, 1], pads = {pads}, count_include_pad = 1>"
    return Vjp(
        f"""
        alpha = Constant<value_float = {float(alpha)}>()
        bias = Constant<value_float = {float(bias)}>()
        down = Constant<value_float = {-float(beta)}>()
        factor = Constant<value_float = {2 * float(alpha) * float(beta)}>()
        plane_shape = Constant<value_ints = [0, 0, -1]>()
        image_axis = Constant<value_ints = [1]>()
        flat_x = Reshape(x0, plane_shape)
        x = Unsqueeze(flat_x, image_axis)
        flat_g = Reshape(g0, plane_shape)
        g = Unsqueeze(flat_g, image_axis)
        squares = Mul(x, x)
        mean_square = {mean}(squares)
        scaled = Mul(mean_square, alpha)
        s = Add(scaled, bias)
        power = Pow(s, down)
        direct = Mul(g, power)
        product = Mul(direct, x)
        ratio = Div(product, s)
        mean_ratio = {mean}(ratio)
        through_mean = Mul(mean_ratio, x)
        indirect = Mul(through_mean, factor)
        total = Sub(direct, indirect)
        shape = Shape(x0)
        d0 = Reshape(total, shape)
        """
    )


RULES: Mapping[str, Rule] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "LRN": _lrn,
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
    "MaxUnpool": _max_unpool,
}
