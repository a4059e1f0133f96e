"""Operators that only move codes: Pad, Slice, Reshape."""

import numpy as np

from onnxqt.numerics import Array, IntArray


def pad(codes: IntArray, pads: Array, axes: Array | None, mode: str, zero_point: int) -> IntArray:
    """ONNX Pad on codes; `mode` "constant" pads with the real 0, whose code is the zero point.

    `pads` holds the begins, then the ends of `axes` (all axes if None).
    """
    along = range(codes.ndim) if axes is None else [int(axis) % codes.ndim for axis in axes]
    widths = [(0, 0)] * codes.ndim
    for i, axis in enumerate(along):
        widths[axis] = (int(pads[i]), int(pads[len(along) + i]))
    if mode == "constant":
        return np.pad(codes, widths, constant_values=zero_point)
    return np.pad(codes, widths, mode=mode)  # type: ignore[call-overload, no-any-return]


def slice_along(x: Array, starts: Array, ends: Array, axes: Array, steps: Array) -> Array:
    """ONNX Slice (opset 13): bounds clamped to the tensor, negative ones counted from the end."""
    cut = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = x.shape[axis]
        first, last = (int(i) + size if i < 0 else int(i) for i in (start, end))
        if step > 0:
            cut[axis] = slice(max(first, 0), max(last, 0), int(step))
        else:
            cut[axis] = slice(max(min(first, size - 1), 0), None if last < 0 else last, int(step))
    return x[tuple(cut)]


def reshape(x: Array, shape: Array, allow_zero: bool) -> Array:
    """ONNX Reshape: a 0 keeps the size of that axis unless `allow_zero`."""
    sizes = [int(n) if n or allow_zero else x.shape[i] for i, n in enumerate(shape)]
    return x.reshape(sizes)
