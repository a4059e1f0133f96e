"""What changes from step to step: the blend lambda and the learning rate. Pure functions."""

import math
from dataclasses import dataclass

from onnxqt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shape of a run; every number is a fraction, of the run or of lambda.

    lambda(u), with u = step / steps:
        0                                                 u < warmup
        knee ((u - warmup) / (bend - warmup))^4           until bend     (gentle quartic ramp)
        knee + (1 - knee) ((u - bend) / (full - bend))^2  until full     (quadratic ramp)
        1                                                 after          (hold)

    (Quant-Trim, arXiv 2511.15300, gives the shape; the constants are this package's own choice.) The ranges of the
    activations follow the network until `full` and then stay.

    Attributes:
        warmup: where the ramp begins.
        bend: where it turns from quartic to quadratic.
        full: where lambda reaches 1.
        knee: lambda at `bend`.
        rise: the part of the run in which the learning rate rises from 0 to its peak.
        floor: the learning rate at the end, as a fraction of the peak.

    Raises:
        UsageError: unless 0 <= warmup <= bend <= full <= 1, and knee, rise and floor lie within [0, 1].
    """

    warmup: float = 0.02
    bend: float = 0.1
    full: float = 0.25
    knee: float = 0.2
    rise: float = 0.05
    floor: float = 0.01

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= self.bend <= self.full <= 1:
            raise UsageError(
                f"the schedule has warmup {self.warmup:g}, bend {self.bend:g}, full {self.full:g}: "
                "give fractions of the run in this order, between 0 and 1"
            )
        for name in ("knee", "rise", "floor"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"the schedule has {name} {getattr(self, name):g}: give a number between 0 and 1")

    def blend(self, step: int, steps: int) -> float:
        """Lambda at a step: 0 is the float network, 1 the quantized one."""
        u = step / max(steps, 1)
        if u < self.warmup:
            return 0.0
        if u < self.bend:
            return self.knee * ((u - self.warmup) / (self.bend - self.warmup)) ** 4
        if u < self.full:
            return self.knee + (1 - self.knee) * ((u - self.bend) / (self.full - self.bend)) ** 2
        return 1.0

    def learning_rate(self, step: int, steps: int, peak: float) -> float:
        """A linear rise to `peak`, then a cosine down to `floor * peak`."""
        rise = max(1, round(self.rise * steps))
        if step < rise:
            return peak * (step + 1) / rise
        u = (step - rise) / max(1, steps - rise)
        return peak * (self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * u)))
