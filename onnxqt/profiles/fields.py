"""What a profile consists of."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnxqt.errors import UsageError
from onnxqt.numerics import Rounding

ProductRule = Literal[
    "float32_even",
    "float32_away",
    "float64_away",
    "gemmlowp_double",
    "ruy_double",
    "ruy_vectors",
    "fixed31_single",
    "fixed15_single",
    "fixed16_away",
    "shift_up",
    "ncnn",
    "float32_bias",
    "openvino",
]
ElementwiseRule = Literal["ort", "tflite", "xnnpack", "tosa", "float", "none"]  # "none": in float between codes
Overflow = Literal["wrap", "saturate", "error"]


@dataclass(frozen=True, slots=True)
class Precision:
    """Widths that a back end takes, and when activation scales are known; `str(precision)` is its name.

    Attributes:
        weight_bits: of the weights.
        activation_bits: of the activations.
        dynamic: whether activation scales are computed at run time, from each input.
    """

    weight_bits: int
    activation_bits: int
    dynamic: bool = False

    def __str__(self) -> str:
        return f"w{self.weight_bits}a{self.activation_bits}{'-dyn' if self.dynamic else ''}"


_PRECISION = re.compile(r"w([2-8])a(4|8|16)(-dyn)?")


def parse_precision(name: str) -> Precision:
    """The precision called `name`, such as w8a8, w4a8, w8a16 or w8a8-dyn.

    Raises:
        UsageError: if `name` is not of the form `w{2..8}a{4,8,16}[-dyn]`.
    """
    match = _PRECISION.fullmatch(name)
    if match is None:
        raise UsageError(f"unknown precision '{name}': expected w{{2..8}}a{{4,8,16}}[-dyn], such as w8a8 or w8a8-dyn")
    weight_bits, activation_bits, dynamic = match.groups()
    return Precision(int(weight_bits), int(activation_bits), dynamic is not None)


@dataclass(frozen=True, slots=True)
class Policy:
    """How a compiler quantizes a float model that it is given with calibration data.

    Attributes:
        precisions: what it can be asked for, its own default first.
        ranges: how it clips activations.
        signed: whether activation codes are signed.
        symmetric: whether activations have zero point 0 (signed) in the middle of the grid.
        narrow: whether activation codes leave out the most negative one ([-127, 127]).
        per_channel: whether weights have one scale per output channel.
        weights_symmetric: whether weights have zero point 0.
        weights_narrow: whether weight codes leave out the most negative one.
        power_of_two: which scales are rounded up to a power of two.
        operators: ONNX operators that it runs on integers, besides those that only move codes.
        fallback: what happens to the others: "float" alone, or "float_tail": the first of them and everything
            behind it.
        fixed_outputs: (scale, zero point) of operators whose output grid is prescribed at 8 bits.
        weights_float: whether the file keeps float weights, which the device rounds by itself.
        pools_share_grid: whether pooling and mean keep the grid of their input.
    """

    precisions: tuple[str, ...] = ("w8a8",)
    ranges: Literal["minmax", "percentile", "mse", "entropy"] = "minmax"
    signed: bool = True
    symmetric: bool = False
    narrow: bool = False
    per_channel: bool = True
    weights_symmetric: bool = True
    weights_narrow: bool = True
    power_of_two: Literal["none", "activations", "all"] = "none"
    operators: tuple[str, ...] = ()
    fallback: Literal["float", "float_tail"] = "float"
    fixed_outputs: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    weights_float: bool = False
    pools_share_grid: bool = False


@dataclass(frozen=True, slots=True)
class Accumulator:
    """The register that sums products.

    Attributes:
        bits: its width.
        overflow: what it does beyond: "wrap" (two's complement), "saturate" or "error" (the run ends).
        pair_bits: where not 0, the sum of two products of adjacent input channels saturates to this width before
            it is added (x86 without VNNI).
    """

    bits: int = 32
    overflow: Overflow = "wrap"
    pair_bits: int = 0


@dataclass(frozen=True, slots=True)
class Arithmetic:
    """How a device computes, one rule per kind of operator. The rules are defined where they are computed.

    Attributes:
        product: accumulators to codes, for Conv, ConvTranspose and MatMul (`onnxqt.requantize`).
        dense: the same for a product with a constant matrix (Gemm, MatMul); empty: as `product`.
        depthwise: the same for depthwise and transposed convolutions; empty: as `product`.
        grouped: the same for other grouped convolutions; empty: as `product`.
        batched: the same for a product of two activations; empty: as `product`; "none": in float between codes;
            "xnnpack": float32_even where the zero point of the second is 0, which XNNPACK asks for, else
            gemmlowp_double.
        product16: the same for 16-bit activations; empty: as for 8 bits.
        dense16: the same for 16-bit activations and a constant matrix; empty: as `product16`.
        accumulator: what sums the products.
        add: Add and Sub (`onnxqt.emulate.kernels.add`).
        multiply: Mul (`onnxqt.emulate.kernels.multiply`).
        average: AveragePool (`onnxqt.emulate.kernels.pooling`).
        mean: GlobalAveragePool and ReduceMean (`onnxqt.emulate.kernels.pooling`).
        leaky: LeakyRelu and PRelu (`onnxqt.emulate.kernels.leaky`); "ort": a table.
        hard_swish: HardSwish; "table": a table of the exact function.
        softmax: Softmax (`onnxqt.emulate.kernels.softmax`); "float": in float between codes.
        resize: Resize that interpolates linearly (`onnxqt.emulate.kernels.resize`); "float": in float between codes.
        transfer: codes from one grid to another: a rule of `onnxqt.requantize`, or one of
            `onnxqt.emulate.kernels.tables`.
        table: rounding of the entries of activation tables; "tflite": away from zero, of the value times the float32
            reciprocal of the scale; "xnnpack": the same with its zero point, to even; "float": activation functions
            are computed in float between codes.
        quantize: rounding of floats to codes.
        levels: "uniform" grids, or "log16": a sign and a power of two with 4 fractional bits of exponent.
        dynamic: how float activations meet quantized weights: "float", in float; "tensor", rounded at run time to
            unsigned codes per tensor (ONNX DynamicQuantizeLinear); "row", to symmetric codes per row of a matrix or
            sample of a convolution (TensorFlow Lite's hybrid kernels).
    """

    product: ProductRule = "float32_even"
    dense: ProductRule | Literal[""] = ""
    depthwise: ProductRule | Literal[""] = ""
    grouped: ProductRule | Literal[""] = ""
    batched: ProductRule | Literal["", "none", "xnnpack"] = ""
    product16: ProductRule | Literal[""] = ""
    dense16: ProductRule | Literal[""] = ""
    accumulator: Accumulator = Accumulator()
    add: ElementwiseRule = "ort"
    multiply: ElementwiseRule = "ort"
    average: Literal["ort", "tflite", "tosa", "dpu", "openvino", "float"] = "ort"
    mean: Literal["ort", "tflite", "ruy", "xnnpack", "tosa", "openvino", "float"] = "ort"
    leaky: Literal["ort", "tflite", "xnnpack", "tosa", "float"] = "ort"
    hard_swish: Literal["table", "tflite"] = "table"
    softmax: Literal["tflite", "ruy", "float"] = "float"
    resize: Literal["tflite", "xnnpack", "float"] = "float"
    transfer: Literal["ort", "xnnpack", "affine"] | ProductRule = "ort"
    table: Literal["even", "away", "up", "tflite", "xnnpack", "float"] = "even"
    quantize: Rounding = "even"
    levels: Literal["uniform", "log16"] = "uniform"
    dynamic: Literal["float", "tensor", "row"] = "float"


@dataclass(frozen=True, slots=True)
class Profile:
    """One back end.

    Attributes:
        name: how it is asked for.
        title: what it stands for, for people.
        evidence: "validated" against the runtime itself, or "modelled" from documents.
        source: where its rules are documented.
        assumed: what the documents leave open and was decided here, else empty.
        policy: how its compiler quantizes.
        arithmetic: how it computes.
    """

    name: str
    title: str
    evidence: Literal["validated", "modelled"]
    source: str
    policy: Policy
    arithmetic: Arithmetic
    assumed: str = ""
