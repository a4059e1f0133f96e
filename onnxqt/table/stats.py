"""Statistics of tensors: from what calibration recorded, and of two calibrations together."""

import math
from collections.abc import Mapping

import numpy as np

from onnxqt.calibrate import BINS, TensorRange
from onnxqt.numerics import Array
from onnxqt.table.form import Stats

SHARES = (0.0001, 0.001, 0.01, 0.5, 0.99, 0.999, 0.9999)


def stats_of(seen: TensorRange) -> Stats:
    """The statistics of an activation that calibration recorded."""
    counts = seen.counts.astype(np.float64)
    found = Stats(seen.count, seen.min, seen.max, {}, counts, seen.limit)
    return Stats(seen.count, seen.min, seen.max, quantiles(found), counts, seen.limit)


def constant_stats(value: Array) -> Stats | None:
    """The number of values and the extremes of a constant; None where they are not finite."""
    low, high = (float(value.min()), float(value.max())) if value.size else (0.0, 0.0)
    return Stats(value.size, low, high) if math.isfinite(low) and math.isfinite(high) else None


def quantiles(stats: Stats) -> Mapping[float, float]:
    """Values under which the `SHARES` of all values lie, by the share; empty without a histogram.

    Values count as evenly spread inside their bin, so each is off by at most the width of a bin, 2 limit / bins.
    """
    counts = stats.counts
    if counts is None or not counts.any():
        return {}
    cumulative = np.cumsum(counts)
    width = 2 * stats.limit / counts.size
    found = {}
    for share in SHARES:
        target = share * cumulative[-1]
        index = int(np.searchsorted(cumulative, target))
        inside = 1 - (cumulative[index] - target) / counts[index]
        value = -stats.limit + width * (index + inside)
        found[share] = float(min(max(value, stats.min), stats.max))
    return found


def merge_stats(one: Stats, other: Stats) -> Stats:
    """The statistics of both sets of values together, exact where both have histograms as calibration makes them.

    Where either has none, or one of another kind, only the number of values and the extremes remain.
    """
    if not (one.count and other.count):
        return one if one.count else other
    first, second = _range(one), _range(other)
    if first is not None and second is not None:
        return stats_of(first.merge(second))
    return Stats(one.count + other.count, min(one.min, other.min), max(one.max, other.max))


def _range(stats: Stats) -> TensorRange | None:
    """What calibration recorded; None where the histogram is not one of `BINS` bins up to a power of two."""
    if stats.counts is None or stats.counts.size != BINS or math.frexp(stats.limit)[0] != 0.5:
        return None
    return TensorRange(stats.count, stats.min, stats.max, stats.limit, stats.counts.astype(np.int64))
