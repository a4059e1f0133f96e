"""Bilinear Resize of integer codes on one grid, along the last two axes.

| rule | code |
|---|---|
| tflite | sum of four codes times weights in 1/1024, / 2^20 rounded half away from zero |
| xnnpack | weights in 1/2048: ((t 2^11 + (b - t) v) + 2^21) >> 22, t = l 2^11 + (r - l) h above, b the same below |

Positions: tflite counts in 1/1024, `p = i s` or (half_pixel) `i s + s/2 - 512`, with `s` the ratio of the sizes in
1/1024, rounded; xnnpack in float32, `p = i s` or `i s + (s/2 - 1/2)`, clipped to the input.

Sources: TensorFlow Lite's reference/resize_bilinear.h (tflite, reference and optimized kernels); XNNPACK's
src/indirection.c and s8-ibilinear (xnnpack). Measured with LiteRT 2.3.0: 0 of 48,180 for each kernel set, with
half_pixel, asymmetric and align_corners.
"""

from collections.abc import Callable, Mapping

import numpy as np

from onnxqt.numerics import Array, IntArray

Rule = Callable[[IntArray, tuple[int, int], str], IntArray]


def bilinear_tflite(codes: IntArray, sizes: tuple[int, int], coordinates: str) -> IntArray:
    """Codes of the resized tensor as TensorFlow Lite computes them; `coordinates` as in ONNX Resize."""
    (y, up, down), (x, left, right) = (
        _steps(n, out, coordinates) for n, out in zip(codes.shape[-2:], sizes, strict=True)
    )
    v, h = (y - 1024 * up)[:, None], (x - 1024 * left)[None]
    rows = codes.astype(np.int64)
    upper, lower = rows[..., up, :], rows[..., down, :]
    total = (upper[..., left] * (1024 - v) + lower[..., left] * v) * (1024 - h)
    total = total + (upper[..., right] * (1024 - v) + lower[..., right] * v) * h
    return np.asarray(np.sign(total) * ((np.abs(total) + (1 << 19)) >> 20), np.int32)


def _steps(size: int, out: int, coordinates: str) -> tuple[Array, Array, Array]:
    """(position in 1/1024, element before it, element after it) of each output."""
    n, m = (size - 1, out - 1) if coordinates == "align_corners" and out > 1 else (size, out)
    scale = (1024 * n + m // 2) // m
    places = np.arange(out, dtype=np.int64) * scale
    if _is_centred(coordinates, out):
        places = places + scale // 2 - 512
    # C division truncates: from below zero to 0. A scale that was rounded up can point behind the last element.
    before = np.clip(places, 0, 1024 * (size - 1)) >> 10
    after = np.minimum(np.maximum(places + 1023, 0) >> 10, size - 1)
    return places, before, after


def bilinear_xnnpack(codes: IntArray, sizes: tuple[int, int], coordinates: str) -> IntArray:
    """Codes of the resized tensor as XNNPACK computes them; `coordinates` as in ONNX Resize."""
    (v, up, down), (h, left, right) = (
        _weights(n, out, coordinates) for n, out in zip(codes.shape[-2:], sizes, strict=True)
    )
    rows = codes.astype(np.int64)
    upper, lower = rows[..., up, :], rows[..., down, :]
    top = (upper[..., left] << 11) + (upper[..., right] - upper[..., left]) * h
    bottom = (lower[..., left] << 11) + (lower[..., right] - lower[..., left]) * h
    return np.asarray(((top << 11) + (bottom - top) * v[:, None] + (1 << 21)) >> 22, np.int32)


def _weights(size: int, out: int, coordinates: str) -> tuple[Array, Array, Array]:
    """(weight of the element after, in 1/2048; element before; element after) of each output."""
    n, m = (size - 1, out - 1) if coordinates == "align_corners" and out > 1 else (size, out)
    scale = np.float32(n) / np.float32(m)
    places = np.arange(out, dtype=np.float32) * scale
    if _is_centred(coordinates, out):
        places = places + (np.float32(0.5) * scale - np.float32(0.5))
    places = np.clip(places, np.float32(0), np.float32(size - 1))
    before = places.astype(np.int64)
    weight = np.rint((places - before.astype(np.float32)) * np.float32(2048)).astype(np.int64)
    return weight, before, np.minimum(before + 1, size - 1)


def _is_centred(coordinates: str, out: int) -> bool:
    """Whether positions are those of the middles of elements; PyTorch puts a single one at the beginning."""
    return coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and out > 1)


COORDINATES = ("half_pixel", "pytorch_half_pixel", "asymmetric", "align_corners")
BILINEAR_RULES: Mapping[str, Rule] = {"tflite": bilinear_tflite, "xnnpack": bilinear_xnnpack}
