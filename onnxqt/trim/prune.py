"""Reverse pruning: how far the extreme values of a weight are clipped, and what its tails look like.

Where ordinary pruning removes the smallest weights, this clips the largest: a few of them set the scale of all.
(Quant-Trim, arXiv 2511.15300.) How much pays differs from layer to layer, so each has its own quantile p:

    best = argmin over clips of  sum |fake_quantize(W) - W|^4
    p = the share of |W| that is not above `best`,  reach = best / quantile(|W|, p)     when training begins
    tau <- memory tau + (1 - memory) reach quantile(|W|, p)                             every few steps
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxqt.calibrate import best_clip
from onnxqt.numerics import Array, FloatArray, Grid
from onnxqt.plan import QuantPlan

PruneMode = Literal["tensor", "channel", "none"]
PRUNE_MODES: tuple[PruneMode, ...] = ("tensor", "channel", "none")
_POWER = 4  # of the error: the second power clips up to two thirds of the largest weights, which no training repaired


@dataclass(frozen=True)
class Tails:
    """What the extreme values of a weight are like.

    Attributes:
        largest: max |W|.
        quantiles: of |W|, by share: 0.5, 0.99, 0.999.
        kurtosis: excess kurtosis, 0 for a normal distribution.
        clipped: share of the values that reverse pruning clips.
    """

    largest: float
    quantiles: Mapping[str, float]
    kurtosis: float
    clipped: float


def tails(weight: Array, clip: FloatArray | None = None) -> Tails:
    """The tails of a weight; `clip` broadcasts along it."""
    values = weight.astype(np.float64)
    size = np.abs(values)
    centred = values - values.mean()
    variance = float(np.mean(centred**2))
    kurtosis = float(np.mean(centred**4)) / variance**2 - 3 if variance > 0 else 0.0
    quantiles = {f"{share:g}": float(np.quantile(size, share)) for share in (0.5, 0.99, 0.999)}
    clipped = 0.0 if clip is None else float(np.mean(size > clip))
    return Tails(float(size.max(initial=0.0)), quantiles, kurtosis, clipped)


@dataclass(frozen=True, eq=False, slots=True)
class Quantile:
    """Where the clip of a weight lies, in terms of its values: float64 () per tensor, (channels,) per channel.

    Attributes:
        share: p, the share of |W| that is kept as it is; 1 where clipping does not pay.
        reach: the clip, as a multiple of that quantile: lone extreme values leave a gap below them.
    """

    share: Array
    reach: Array


UNCLIPPED = Quantile(np.ones(()), np.ones(()))


def choose_quantiles(
    plan: QuantPlan, weights: Mapping[str, Array], grids: Mapping[bool, Grid], mode: PruneMode
) -> dict[str, Quantile]:
    """How far each weight is to be clipped.

    Args:
        plan: the weights and their channel axes.
        weights: their values.
        grids: the coarsest grid that weights are to have, by whether it is laid per channel. A tensor's clip is
            judged by the grid that is laid per tensor, a channel's by the one per channel: per channel, the scale
            follows the largest weight of the channel alone.
        mode: whether to clip per tensor, per channel, or not.
    """
    chosen = dict.fromkeys((site.tensor for site in plan.weights), UNCLIPPED)
    per_channel = mode == "channel"
    if mode == "none" or per_channel not in grids:
        return chosen
    for site in plan.weights:
        weight = weights[site.tensor]
        rows = _channels(weight, site.axis) if per_channel else [weight]
        found = [_quantile(row, grids[per_channel]) for row in rows]
        share, reach = (np.array(each, np.float64) for each in zip(*found, strict=True))
        chosen[site.tensor] = Quantile(share, reach) if per_channel else Quantile(share[0, ...], reach[0, ...])
    return chosen


def _quantile(values: Array, grid: Grid) -> tuple[float, float]:
    size, best = np.abs(values), float(best_clip(values, grid, _POWER))
    share = float(np.mean(size <= best))
    below = float(np.quantile(size, share))
    return (share, best / below) if share < 1 and below > 0 else (1.0, 1.0)


def _channels(weight: Array, axis: int) -> Array:
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def largest(weight: Array, axis: int, quantile: Quantile) -> FloatArray:
    """The largest |W|, in the form of a quantile: float32 () per tensor, (channels,) per channel."""
    size = np.abs(weight)
    if not quantile.share.ndim:
        return np.asarray(size.max(initial=0), np.float32)
    return np.asarray(_channels(size, axis).max(axis=1, initial=0), np.float32)


def clip_at(weight: Array, axis: int, quantile: Quantile) -> FloatArray:
    """The clip of a weight, infinite where its share is 1: float32 () per tensor, (channels,) per channel."""
    size = np.abs(weight)
    if not quantile.share.ndim:
        return _clip(size, quantile.share, quantile.reach)
    rows = zip(_channels(size, axis), quantile.share, quantile.reach, strict=True)
    return np.array([_clip(*row) for row in rows], np.float32)


def _clip(size: Array, share: Array, reach: Array) -> FloatArray:
    return np.asarray(reach * np.quantile(size, float(share)) if share < 1 else np.inf, np.float32)
