"""Quantization schemes and their names.

    w4a8-sym-pc
    |  |  |   `-- granularity of the weights: pc per output channel, pt per tensor
    |  |  `------ activations: sym (signed, zero point 0) or asym (unsigned, any zero point)
    |  `--------- bits of the activations, 4 or 8
    `------------ bits of the weights, 2 to 8

Weights are always symmetric on a narrow grid ([-127, 127] at 8 bits) and activations per tensor: the
common ground of the compilers. The model's own inputs and outputs keep at least 8 bits (`io_bits`),
because the host exchanges bytes with the device.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxqt.errors import UsageError
from onnxqt.numerics import Grid

SCHEME_NAME = re.compile(r"w([2-8])a([48])-(sym|asym)-(pt|pc)")


@dataclass(frozen=True, slots=True)
class Placement:
    """How codes are laid over a range of reals.

    Attributes:
        symmetric: the zero point is the middle of the grid, which is 0 for signed codes.
        power_of_two: the scale is rounded up to a power of two.
    """

    symmetric: bool
    power_of_two: bool = False


@dataclass(frozen=True, slots=True)
class Grids:
    """The grids of a quantized model; only the ranges are missing to them.

    Attributes:
        weight: codes of the weights.
        weight_placement: how they are laid over a weight.
        per_channel: whether weights have one scale per output channel.
        search_clip: whether the scale of a weight per tensor is searched; else it follows from the extreme values.
        activation: codes of the activations inside the network, and of constant operands.
        io: codes of the model's inputs and outputs.
        activation_placement: how both are laid over a range.
        fixed_outputs: (scale, zero point) of operators whose output grid is prescribed.
    """

    weight: Grid
    weight_placement: Placement
    per_channel: bool
    search_clip: bool
    activation: Grid
    io: Grid
    activation_placement: Placement
    fixed_outputs: Mapping[str, tuple[float, int]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantize a model; `str(scheme)` is its name."""

    weight_bits: int
    activation_bits: int
    symmetric: bool
    per_channel: bool

    def __str__(self) -> str:
        return (
            f"w{self.weight_bits}a{self.activation_bits}"
            f"-{'sym' if self.symmetric else 'asym'}-{'pc' if self.per_channel else 'pt'}"
        )

    @property
    def weight_grid(self) -> Grid:
        """Codes of the weights."""
        return Grid(self.weight_bits, signed=True, narrow=True)

    @property
    def activation_grid(self) -> Grid:
        """Codes of the activations inside the network."""
        return Grid(self.activation_bits, signed=self.symmetric)

    @property
    def io_grid(self) -> Grid:
        """Codes of the model's inputs and outputs: never under 8 bits."""
        return Grid(max(8, self.activation_bits), signed=self.symmetric)

    @property
    def grids(self) -> Grids:
        """All of them, and how they are laid over ranges."""
        return Grids(
            weight=self.weight_grid,
            weight_placement=Placement(symmetric=True),
            per_channel=self.per_channel,
            search_clip=True,
            activation=self.activation_grid,
            io=self.io_grid,
            activation_placement=Placement(symmetric=self.symmetric),
        )


def parse_scheme(name: str) -> Scheme:
    """The scheme called `name`.

    Raises:
        UsageError: if `name` is not of the form `w{2..8}a{4,8}-{sym,asym}-{pt,pc}`.
    """
    match = SCHEME_NAME.fullmatch(name)
    if match is None:
        raise UsageError(
            f"unknown scheme '{name}': expected w{{2..8}}a{{4,8}}-{{sym,asym}}-{{pt,pc}}, such as w4a8-sym-pc"
        )
    weight_bits, activation_bits, symmetry, granularity = match.groups()
    return Scheme(int(weight_bits), int(activation_bits), symmetry == "sym", granularity == "pc")


DEFAULT_SCHEMES = tuple(
    Scheme(weight_bits, 8, symmetric, per_channel)
    for weight_bits in (8, 4)
    for symmetric in (True, False)
    for per_channel in (True, False)
)
