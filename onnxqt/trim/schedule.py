"""What changes from step to step: the blend lambda and the learning rate. Pure functions."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schedule:
    """Shape of a run of `steps` steps; the other fields are fractions of it, or of lambda.

    lambda(u), with u = step / steps:
        0                                        u < warmup
        knee ((u - warmup) / (bend - warmup))^4  until bend     (gentle quartic ramp)
        knee + (1 - knee) ((u - bend) / (full - bend))^2  until full  (quadratic ramp)
        1                                        after
    (Quant-Trim, arXiv 2511.15300, gives the shape; the constants are this package's own choice. The last
    part stays at 1, so that training goes on against the grid itself.)
    """

    steps: int
    warmup: float = 0.1
    bend: float = 0.4
    full: float = 0.7
    knee: float = 0.2

    def blend(self, step: int) -> float:
        """Lambda at a step: 0 is the float network, 1 the quantized one."""
        u = step / max(self.steps, 1)
        if u < self.warmup:
            return 0.0
        if u < self.bend:
            return self.knee * ((u - self.warmup) / (self.bend - self.warmup)) ** 4
        if u < self.full:
            return self.knee + (1 - self.knee) * ((u - self.bend) / (self.full - self.bend)) ** 2
        return 1.0

    def learning_rate(self, step: int, peak: float) -> float:
        """Linear warm-up over the first twentieth of the run, then a cosine down to a hundredth of `peak`."""
        rise = max(1, self.steps // 20)
        if step < rise:
            return peak * (step + 1) / rise
        u = (step - rise) / max(1, self.steps - rise)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * u)))
