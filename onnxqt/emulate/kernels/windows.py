"""Sliding windows: the geometry that convolutions and pooling share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt.numerics import Array


@dataclass(frozen=True, slots=True)
class Window:
    """Geometry of Conv, ConvTranspose, MaxPool and AveragePool over the spatial axes.

    `pads` holds the begins, then the ends (ONNX order); it is read only where `auto_pad` is NOTSET.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str = "NOTSET"
    ceil_mode: bool = False


def place(window: Window, spatial: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(padding before, output size) of each spatial axis for an input of size `spatial`.

    NOTSET  output = floor((size + pads - span) / stride) + 1,  span = dilation * (kernel - 1) + 1
    SAME_*  output = ceil(size / stride); an odd pad goes to the end (UPPER) or to the beginning (LOWER)

    With `ceil_mode` the quotient is rounded up. Up to opset 21 this keeps a last window that starts beyond
    the input, where it holds no element.
    """
    begins, sizes = [], []
    rank = len(spatial)
    for axis, size in enumerate(spatial):
        stride = window.strides[axis]
        span = window.dilations[axis] * (window.kernel[axis] - 1) + 1
        if window.auto_pad.startswith("SAME"):
            count = -(-size // stride)
            total = max((count - 1) * stride + span - size, 0)
            begin = (total + (window.auto_pad == "SAME_LOWER")) // 2
        else:
            padded = window.auto_pad == "NOTSET"
            begin = window.pads[axis] if padded else 0
            room = size + (begin + window.pads[rank + axis] if padded else 0) - span
            count = (-(-room // stride) if window.ceil_mode else room // stride) + 1
        begins.append(begin)
        sizes.append(count)
    return tuple(begins), tuple(sizes)


def taps(x: Array, window: Window, fill: float) -> Iterator[tuple[tuple[int, ...], Array]]:
    """Every kernel position with the values that it meets, in row-major order.

    Args:
        x: (batch, channels, *spatial).
        window: geometry.
        fill: what stands in the padding.

    Yields:
        (position in the kernel, view (batch, channels, *output)).
    """
    spatial = x.shape[2:]
    begins, sizes = place(window, spatial)
    margins = [(0, 0), (0, 0)]
    for axis, size in enumerate(spatial):
        last = (sizes[axis] - 1) * window.strides[axis] + window.dilations[axis] * (window.kernel[axis] - 1)
        margins.append((begins[axis], max(last + 1 - begins[axis] - size, 0)))
    padded = np.pad(x, margins, constant_values=fill) if any(map(any, margins)) else x
    for tap in np.ndindex(*window.kernel):
        yield tap, padded[met(tap, window, sizes)]


def met(tap: tuple[int, ...], window: Window, sizes: tuple[int, ...]) -> tuple[Any, ...]:
    """Index of the padded values that kernel position `tap` meets on its way over `sizes` places."""
    begins = [at * dilation for at, dilation in zip(tap, window.dilations, strict=True)]
    ways = zip(begins, sizes, window.strides, strict=True)
    return (..., *[slice(begin, begin + (size - 1) * stride + 1, stride) for begin, size, stride in ways])
