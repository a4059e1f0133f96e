"""Where the grids of all regimes lie while the network moves: weights, their clips, and activations."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxqt.calibrate import RangeTable, activation_params, weight_params
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.schemes import Grids
from onnxqt.trim.prune import UNCLIPPED, choose_quantiles, clip_at, largest
from onnxqt.trim.quantizers import (
    ACTIVATION_BLEND,
    CENTRED,
    RUN_TIME,
    WEIGHT_BLEND,
    Feeds,
    activation_feeds,
    number,
    prune_feeds,
    weight_feeds,
)
from onnxqt.trim.regimes import CARRIER_BITS, Regime
from onnxqt.trim.task import Task


class Ranges:
    """The grids of all regimes, from those of the untrained model on."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._plan = task.plan
        grids = [regime.grids for regime in task.job.regimes if regime.rounds_weights]
        coarsest = {
            per_channel: min(found, key=lambda grid: grid.bits)
            for per_channel in (False, True)
            if (found := [g.weight for g in grids if g.per_channel is per_channel])
        }
        trained = {name: task.start[name] for name in task.shapes}
        chosen = choose_quantiles(task.plan, trained, coarsest, task.job.prune)
        moving = set(task.job.parameters)
        self._quantiles = {name: found if name in moving else UNCLIPPED for name, found in chosen.items()}
        self._largest = {
            site.tensor: largest(trained[site.tensor], site.axis, self._quantiles[site.tensor])
            for site in task.plan.weights
        }
        self.clips: dict[str, FloatArray] = {
            name: np.asarray(np.where(self._quantiles[name].share < 1, size, np.inf), np.float32)
            for name, size in self._largest.items()
        }
        self.activations: list[dict[str, QParams]] = []
        self.follow(task.ranges)
        self.settings = self.settings_at(task.start)

    def follow(self, ranges: RangeTable) -> None:
        """Lay the activations' grids over new ranges."""
        regimes = self._task.job.regimes
        self.activations = [
            activation_params(self._plan, ranges, _carried(regime.grids), regime.ranges) for regime in regimes
        ]

    @property
    def kept(self) -> float:
        """Mean over the weights of how much of the largest value at the start the clip keeps, in (0, 1]."""
        shares = [
            np.minimum(clip / np.maximum(self._largest[name], np.finfo(np.float32).tiny), 1).mean()
            for name, clip in self.clips.items()
        ]
        return float(np.mean(shares)) if shares else 1.0

    def refresh(self, values: Mapping[str, Array], follow_clips: bool) -> None:
        """Follow the weights: move each clip towards its quantile, if it still may, then lay every grid anew."""
        memory = np.float32(self._task.job.prune_memory)
        for site in self._plan.weights if follow_clips else ():
            new = clip_at(values[site.tensor], site.axis, self._quantiles[site.tensor])
            moved = memory * self.clips[site.tensor] + (1 - memory) * new
            self.clips[site.tensor] = np.asarray(moved, np.float32)
        self.settings = self.settings_at(values)

    def settings_at(self, values: Mapping[str, Array]) -> list[Feeds]:
        """The inputs of all quantizers under each regime, with weights of these values."""
        task, plan = self._task, self._plan
        pruned = self.folded({name: values[name] for name in task.shapes})
        taus = prune_feeds(plan, task.shapes, self.clips)
        known: dict[tuple[object, ...], Feeds] = {}
        settings = []
        for regime, activations in zip(task.job.regimes, self.activations, strict=True):
            grids = _carried(regime.grids)
            own = (*sorted(grids.weight_bits.items()), *sorted(grids.granularity.items()))
            key = (grids.weight, grids.weight_placement, grids.per_channel, grids.search_clip, own)
            if key not in known:
                known[key] = weight_feeds(plan, task.shapes, weight_params(plan, pruned.__getitem__, grids))
            settings.append({**activation_feeds(activations), **known[key], **taus, **_run_time(regime)})
        return settings

    def folded(self, values: Mapping[str, Array]) -> dict[str, Array]:
        """Weights as ReversePrune passes them on; biases as they are."""
        taus = prune_feeds(self._plan, self._task.shapes, self.clips)
        limits = dict(zip((site.tensor for site in self._plan.weights), taus.values(), strict=True))
        return {
            name: np.clip(value, -limits[name], limits[name]) if name in limits else value
            for name, value in values.items()
        }


def _carried(grids: Grids) -> Grids:
    """The grids as the training graph can hold them.

    Wider ones are not used, see `blends`; those of single activations are as wide as it holds. Weights with blocks are
    rounded per channel, which is coarser.
    """

    def narrowed(grid: Grid) -> Grid:
        return grid if grid.bits <= CARRIER_BITS else replace(grid, bits=CARRIER_BITS)

    return replace(
        grids,
        weight=narrowed(grids.weight),
        activation=narrowed(grids.activation),
        io=narrowed(grids.io),
        fixed_outputs=grids.fixed_outputs if grids.activation.bits <= CARRIER_BITS else {},
        block_size=None,
        activation_bits={name: min(bits, CARRIER_BITS) for name, bits in grids.activation_bits.items()},
        granularity={name: "pt" if own == "pt" else "pc" for name, own in grids.granularity.items()},
    )


def _run_time(regime: Regime) -> Feeds:
    centred = regime.grids.activation_placement.symmetric
    return {RUN_TIME: number(regime.dynamic), CENTRED: number(centred)}


def blends(regime: Regime, value: float) -> Feeds:
    """Lambda of weights and activations; what a regime does not round stays at 0."""
    return {
        WEIGHT_BLEND: number(value * regime.rounds_weights),
        ACTIVATION_BLEND: number(value * regime.rounds_activations),
    }
