"""What training makes a checkpoint robust to: the ways in which schemes and compilers quantize it."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxqt.calibrate import RangeMethod
from onnxqt.numerics import Array, FloatArray, Grid
from onnxqt.schemes import Grids, Placement, Scheme

CARRIER_BITS = 8  # the training graph quantizes through INT8; wider activations are as good as float there
_LEAST_LOSS = 1e-6
_MOST_SCALE = 4.0


@dataclass(frozen=True, slots=True)
class Regime:
    """One way to quantize the checkpoint; training draws one for each step.

    Attributes:
        name: of the scheme, or PROFILE/PRECISION.
        grids: of weights and activations.
        ranges: how the activations' ranges are chosen.
        dynamic: whether the activations' scales follow from the values of each batch, as `DynamicQuantizeLinear` has
            them, instead of calibrated ranges.
    """

    name: str
    grids: Grids
    ranges: RangeMethod = "mse"
    dynamic: bool = False

    @property
    def rounds_weights(self) -> bool:
        """Whether weights are rounded in training."""
        return self.grids.weight.bits <= CARRIER_BITS

    @property
    def rounds_activations(self) -> bool:
        """Whether activations are rounded in training."""
        return self.grids.activation.bits <= CARRIER_BITS


def balanced(losses: Array, strength: float) -> FloatArray:
    """The factors of the losses of the regimes in training: float32 (regimes,).

    With L_r what the untrained model loses under a regime, and G the geometric mean of all that are not 0:

        factor_r = (G / L_r)^strength, within [1/4, 4]

    Hard regimes would drown the easy ones otherwise: an optimizer such as AdamW divides all of their gradients by the
    same mean size.
    """
    losses = np.maximum(losses, _LEAST_LOSS)
    middle = np.exp(np.mean(np.log(losses[losses > _LEAST_LOSS]))) if (losses > _LEAST_LOSS).any() else 1.0
    return np.clip((middle / losses) ** strength, 1 / _MOST_SCALE, _MOST_SCALE).astype(np.float32)


def scheme_regime(scheme: Scheme, ranges: RangeMethod) -> Regime:
    """The regime of one of this package's own schemes."""
    return Regime(str(scheme), scheme.grids, ranges, scheme.dynamic)


def to_plain(regime: Regime) -> dict[str, Any]:
    """The regime as JSON has it."""
    return asdict(regime)


def from_plain(plain: Mapping[str, Any]) -> Regime:
    """What `to_plain` gave."""
    grids = dict(plain["grids"])
    for name in ("weight", "activation", "io"):
        grids[name] = Grid(**grids[name])
    for name in ("weight_placement", "activation_placement"):
        grids[name] = Placement(**grids[name])
    grids["fixed_outputs"] = {op: (float(s), int(z)) for op, (s, z) in grids["fixed_outputs"].items()}
    return Regime(plain["name"], Grids(**grids), plain["ranges"], plain["dynamic"])
