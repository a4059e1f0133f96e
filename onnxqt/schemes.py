"""Quantization schemes and their names.

    w4a8-sym-b32-pow2-narrow-dyn
    |  | |   |   |    |      `-- activations get their scale at run time (with a8-asym alone)
    |  | |   |   |    `--------- signed activations without their most negative code: [-127, 127] at 8 bits
    |  | |   |   `-------------- all scales are powers of two
    |  | |   `------------------ granularity of the weights: pt per tensor, pc per output channel, b16, b32, b64 or
    |  | |                       b128 per block of so many values along the axis that a product sums over
    |  | `---------------------- sym (signed, zero point 0) or asym (unsigned, any zero point)
    |  `------------------------ bits of the activations, 4, 8 or 16, or f: they stay float
    `--------------------------- bits of the weights, 2 to 8

`sym` and `asym` speak of the activations, which are quantized per tensor; weights are symmetric on a narrow grid
([-127, 127] at 8 bits) then: the common ground of the compilers. With float activations they speak of the weights.
The model's own inputs and outputs keep at least 8 bits (`io_grid`), because the host exchanges bytes with the device.

A weight that has no blocks - its product sums over fewer values than one block, as that of a depthwise convolution -
is quantized per output channel.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from onnxqt.errors import UsageError
from onnxqt.numerics import Grid

FLOAT_BITS = 32  # what stands for activations that stay float32
BLOCK_SIZES = (16, 32, 64, 128)
SCHEME_NAME = re.compile(
    r"w(?P<weight>[2-8])a(?P<activation>4|8|16|f)-(?P<symmetry>sym|asym)-"
    r"(?P<granularity>pt|pc|b16|b32|b64|b128)(?P<pow2>-pow2)?(?P<narrow>-narrow)?(?P<dyn>-dyn)?"
)
GRANULARITIES = ("pt", "pc", *(f"b{size}" for size in BLOCK_SIZES))
_FORM = "w{2..8}a{4,8,16,f}-{sym,asym}-{pt,pc,b16,b32,b64,b128}[-pow2][-narrow][-dyn]"


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
class Granularity:
    """How many scales a weight has: one, one for each output channel, or one for each block of a channel."""

    per_channel: bool
    block_size: int | None = None

    def __str__(self) -> str:
        if self.block_size is not None:
            return f"b{self.block_size}"
        return "pc" if self.per_channel else "pt"


def parse_granularity(name: str) -> Granularity:
    """The granularity called pt, pc, b16, b32, b64 or b128.

    Raises:
        UsageError: if there is none of that name.
    """
    if name not in GRANULARITIES:
        raise UsageError(f"unknown granularity '{name}': expected one of {', '.join(GRANULARITIES)}")
    return Granularity(name != "pt", int(name[1:]) if name.startswith("b") else None)


@dataclass(frozen=True, slots=True)
class Grids:
    """The grids of a quantized model; only the ranges are missing to them.

    Attributes:
        weight: codes of the weights.
        weight_placement: how they are laid over a weight.
        per_channel: whether weights have one scale per output channel.
        search_clip: whether the scale of a weight per tensor is searched; else it follows from the extreme values.
        activation: codes of the activations inside the network, and of constant operands; `FLOAT_BITS` wide where
            activations stay float.
        io: codes of the model's inputs and outputs.
        activation_placement: how both are laid over a range.
        fixed_outputs: (scale, zero point) of operators whose output grid is prescribed.
        block_size: values that share a scale along the axis that a product sums over; None where there are no blocks.
        dynamic: whether the scales of activations are found at run time.
        name: of the scheme, for the files that are made under it.
        weight_bits: of single weights, by tensor, in place of those of `weight`.
        activation_bits: of single activations, by tensor; the widest of those that share a grid holds for all.
        granularity: of single weights, by tensor, in place of `per_channel` and `block_size`.
    """

    weight: Grid
    weight_placement: Placement
    per_channel: bool
    search_clip: bool
    activation: Grid
    io: Grid
    activation_placement: Placement
    fixed_outputs: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    block_size: int | None = None
    dynamic: bool = False
    name: str = ""
    weight_bits: Mapping[str, int] = field(default_factory=dict)
    activation_bits: Mapping[str, int] = field(default_factory=dict)
    granularity: Mapping[str, str] = field(default_factory=dict)

    @property
    def weight_only(self) -> bool:
        """Whether activations stay float."""
        return self.activation.bits >= FLOAT_BITS

    def weight_grid(self, tensor: str) -> Grid:
        """Codes of one weight."""
        return Grid(self.weight_bits.get(tensor, self.weight.bits), self.weight.signed, self.weight.narrow)

    def granularity_of(self, tensor: str) -> Granularity:
        """How many scales one weight is to have."""
        own = self.granularity.get(tensor)
        return Granularity(self.per_channel, self.block_size) if own is None else parse_granularity(own)

    def activation_grid(self, tensors: tuple[str, ...], io: bool) -> Grid:
        """Codes of the activations that share a grid; `io` where an input or output of the model is among them.

        More than 8 bits are never narrow, as ONNX Runtime 1.19 has no Clip for such codes.
        """
        grid = self.io if io else self.activation
        own = [self.activation_bits[tensor] for tensor in tensors if tensor in self.activation_bits]
        if not own:
            return grid
        bits = max(8, *own) if io else max(own)
        return Grid(bits, grid.signed, grid.narrow and bits <= 8)


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way to quantize a model; `str(scheme)` is its name.

    Attributes:
        weight_bits: 2 to 8.
        activation_bits: 4, 8, 16, or `FLOAT_BITS` where activations stay float.
        symmetric: of the activations; of the weights where activations stay float.
        per_channel: whether a weight has one scale per output channel, or more.
        block_size: values of a channel that share a scale; None where all of them do.
        power_of_two: whether all scales are powers of two.
        narrow: whether signed activations leave out their most negative code.
        dynamic: whether activations get their scale at run time.

    Raises:
        UsageError: if the parts of a name contradict each other.
    """

    weight_bits: int
    activation_bits: int
    symmetric: bool
    per_channel: bool
    block_size: int | None = None
    power_of_two: bool = False
    narrow: bool = False
    dynamic: bool = False

    def __post_init__(self) -> None:
        for contradicts, advice in _CONTRADICTIONS:
            if contradicts(self):
                raise UsageError(f"scheme '{self}' cannot be: {advice}")

    def __str__(self) -> str:
        activation = "f" if self.weight_only else self.activation_bits
        flags = (("-pow2", self.power_of_two), ("-narrow", self.narrow), ("-dyn", self.dynamic))
        return (
            f"w{self.weight_bits}a{activation}-{'sym' if self.symmetric else 'asym'}"
            f"-{Granularity(self.per_channel, self.block_size)}{''.join(flag for flag, given in flags if given)}"
        )

    @property
    def weight_only(self) -> bool:
        """Whether activations stay float."""
        return self.activation_bits >= FLOAT_BITS

    @property
    def weight_grid(self) -> Grid:
        """Codes of the weights."""
        signed = self.symmetric or not self.weight_only
        return Grid(self.weight_bits, signed, narrow=signed)

    @property
    def activation_grid(self) -> Grid:
        """Codes of the activations inside the network."""
        return Grid(self.activation_bits, signed=self.symmetric, narrow=self.narrow)

    @property
    def io_grid(self) -> Grid:
        """Codes of the model's inputs and outputs: never under 8 bits."""
        return Grid(max(8, self.activation_bits), signed=self.symmetric, narrow=self.narrow)

    @property
    def grids(self) -> Grids:
        """All of them, and how they are laid over ranges."""
        return Grids(
            weight=self.weight_grid,
            weight_placement=Placement(self.weight_grid.signed, self.power_of_two),
            per_channel=self.per_channel,
            search_clip=True,
            activation=self.activation_grid,
            io=self.io_grid,
            activation_placement=Placement(self.symmetric, self.power_of_two),
            block_size=self.block_size,
            dynamic=self.dynamic,
            name=str(self),
        )


_CONTRADICTIONS: tuple[tuple[Callable[[Scheme], bool], str], ...] = (
    (lambda s: s.weight_only and s.dynamic, "float activations have no scale, leave out -dyn"),
    (lambda s: s.weight_only and s.narrow, "float activations have no codes, leave out -narrow"),
    (
        lambda s: s.dynamic and (s.activation_bits != 8 or s.symmetric),
        "scales at run time come from DynamicQuantizeLinear, which gives UINT8 codes, write a8-asym",
    ),
    (
        lambda s: s.dynamic and s.power_of_two,
        "the scales of DynamicQuantizeLinear are no powers of two, leave out -pow2 or -dyn",
    ),
    (
        lambda s: s.narrow and not s.symmetric,
        "-narrow leaves out the most negative code of signed activations, write sym",
    ),
    (
        lambda s: s.narrow and s.activation_bits > 8,
        "ONNX Runtime 1.19 has no Clip that would make 16-bit codes narrow, leave out -narrow",
    ),
    (lambda s: s.block_size is not None and not s.per_channel, "blocks are parts of channels, set per_channel"),
)


def parse_scheme(name: str) -> Scheme:
    """The scheme called `name`.

    Raises:
        UsageError: if `name` is not of the form
            `w{2..8}a{4,8,16,f}-{sym,asym}-{pt,pc,b16,b32,b64,b128}[-pow2][-narrow][-dyn]`, or its parts contradict
            each other.
    """
    match = SCHEME_NAME.fullmatch(name)
    if match is None:
        raise UsageError(f"unknown scheme '{name}': expected {_FORM}, such as w4a8-sym-pc")
    granularity = parse_granularity(match["granularity"])
    return Scheme(
        weight_bits=int(match["weight"]),
        activation_bits=FLOAT_BITS if match["activation"] == "f" else int(match["activation"]),
        symmetric=match["symmetry"] == "sym",
        per_channel=granularity.per_channel,
        block_size=granularity.block_size,
        power_of_two=match["pow2"] is not None,
        narrow=match["narrow"] is not None,
        dynamic=match["dyn"] is not None,
    )


DEFAULT_SCHEMES = tuple(
    Scheme(weight_bits, 8, symmetric, per_channel)
    for weight_bits in (8, 4)
    for symmetric in (True, False)
    for per_channel in (True, False)
)
