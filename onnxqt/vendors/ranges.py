"""The numbers that consumers of ranges are given, so that they find the table's scales again."""

from collections.abc import Iterator

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import FloatArray, QParams
from onnxqt.table.form import Entry, Role, Table

ACTIVATIONS: tuple[Role, ...] = ("input", "activation", "output")


def per_tensor(table: Table, scheme: str) -> Iterator[tuple[Entry, QParams]]:
    """The activations that a scheme quantizes, for formats that have one scale for each.

    Raises:
        ExportError: if one has several scales.
    """
    for entry, params in table.quantized(scheme, *ACTIVATIONS):
        if params.scale.ndim:
            raise ExportError(f"activation '{entry.name}' has several scales, where the format has one for a tensor")
        yield entry, params


def calibrated(table: Table, scheme: str) -> list[tuple[Entry, QParams]]:
    """The same, for formats that say nothing without them.

    Raises:
        ExportError: if there is none, or one has several scales.
    """
    found = list(per_tensor(table, scheme))
    if not found:
        raise ExportError(f"{scheme} quantizes no activation, and the format holds nothing else: give another scheme")
    return found


def is_centred(params: QParams) -> bool:
    """Whether the codes lie about zero: signed, with zero point 0."""
    return params.grid.signed and not np.any(params.zero_point)


def is_asymmetric(params: QParams) -> bool:
    """Whether zero is not in the middle of the codes; unsigned codes have theirs at `(qmax + 1) / 2`."""
    middle = 0 if params.grid.signed else (params.grid.qmax + 1) // 2
    return bool(np.any(params.zero_point != middle))


def is_power_of_two(params: QParams) -> bool:
    """Whether all scales are powers of two."""
    return bool(np.all(np.frexp(params.scale)[0] == 0.5))


def magnitude(params: QParams) -> FloatArray:
    """The clip that a symmetric consumer is told, float32 of the scale's shape.

    max(|lo|, |hi|), and qmax s where the codes lie about zero
    """
    low, high = params.range
    return high if is_centred(params) else np.maximum(-low, high)


def symmetric_scale(params: QParams, qmax: int) -> FloatArray:
    """The scale of a symmetric consumer with codes in [-qmax, qmax], float32 of the scale's shape.

    magnitude / qmax, which is the table's own scale where that has the same codes
    """
    if is_centred(params) and params.grid.qmax == qmax:
        return params.scale
    wide = np.asarray(magnitude(params), np.float64)
    return np.asarray(np.maximum(wide / qmax, np.finfo(np.float32).tiny), np.float32)


def ends(params: QParams) -> tuple[np.float32, np.float32]:
    """(lo, hi) of a grid per tensor, from which a consumer of ranges finds scale and zero point again.

    lo = (qmin - zp) s, hi = (qmax - zp) s, in float32, with
    float32((hi - lo) / (qmax - qmin)) = s and round(qmin - lo (qmax - qmin) / (hi - lo)) = zp in float64

    which is how ONNX Runtime computes them (`compute_scale_zp` in onnxruntime/quantization/quant_utils.py). Rounding
    both ends to float32 can miss the scale by a unit in its last place. Then the end that is nearer to zero, whose
    own units are small enough, makes up for the other: half a unit of an end of at most (qmax - qmin) s / 2 changes
    the scale by at most half of one of its units.
    """
    low, high = (np.float32(end) for end in params.range)
    if _gives_back(params, low, high):
        return low, high
    if -low > high:
        mirrored = _from_largest(-low, params)
        return -mirrored[1], -mirrored[0]
    return _from_largest(high, params)


def _from_largest(high: np.float32, params: QParams) -> tuple[np.float32, np.float32]:
    """(lo, hi) of the width of a grid, lo <= 0; hi moves down by one unit in its last place where it must for that."""
    width = (params.grid.qmax - params.grid.qmin) * float(params.scale)
    if float(high) > width:
        high = np.nextafter(high, np.float32(0))
    return np.float32(float(high) - width), high


def weight_ends(params: QParams, bits: int) -> tuple[FloatArray, FloatArray]:
    """(lo, hi) for each scale of a weight, from which ONNX Runtime finds the scales again; float32 of their shape.

    Codes about zero: -+ s (qmax' - qmin') / 2 with the codes [qmin', qmax'] that ONNX Runtime gives symmetric weights
    of so many bits, [-8, 7] for 4 and [-qmax, qmax] for 8 and 16. Others: the ends of the grid.
    """
    if not is_centred(params):
        return params.range
    half = 7.5 if bits == 4 else (1 << (bits - 1)) - 1
    high = np.asarray(params.scale * np.float32(half), np.float32)
    return -high, high


def _gives_back(params: QParams, low: np.float32, high: np.float32) -> bool:
    scale = (float(high) - float(low)) / (params.grid.qmax - params.grid.qmin)
    zero_point = np.rint(params.grid.qmin - float(low) / scale)
    return bool(np.float32(scale) == params.scale and zero_point == params.zero_point)
