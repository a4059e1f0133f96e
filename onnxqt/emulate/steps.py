"""What an integer program is made of: steps, what they compute with, and the values between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from onnxqt.numerics import Array, FloatArray, Grid, IntArray, QParams
from onnxqt.requantize import Requantization

Run = Callable[..., tuple[Array, ...]]


@dataclass(frozen=True, eq=False, slots=True)
class Detail:
    """What an integer node computes with: enough to build the same node for another runtime.

    Attributes:
        attributes: of the ONNX operator, defaults filled in where they matter.
        weights: codes less their zero point, in the layout of the operator (matrices as (inputs, channels)); for PRelu
            the codes of the slope, whose zero point is `weight_zero_point`.
        weight_scale: float32 () or (channels,).
        weight_bits: width of their grid.
        weight_zero_point: what is still to be taken from `weights`.
        bias: in accumulator units, (channels,).
        requantization: how accumulators become codes; holds the bias where that is added in float.
        clamp: the limits of the codes, where an activation narrows them.
        table: the code that each code of the input grid becomes, from its qmin on.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    weights: IntArray | None = None
    weight_scale: FloatArray | None = None
    weight_bits: int = 0
    weight_zero_point: int = 0
    bias: Array | None = None
    requantization: Requantization | None = None
    clamp: tuple[int, int] | None = None
    table: Array | None = None


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """How one node runs.

    Attributes:
        name: the node's name, or the name of its output where it has none.
        op_type: its operator.
        kind: "integer" on codes; "float" through ONNX Runtime; "boundary" for a quantizer that stands
            between floats and codes or between two grids; "shape" for what only computes sizes.
        reason: why the node is float, else empty.
        note: what the file leaves open and was decided here, else empty.
        rule: by which rule of the arithmetic it computes, else empty.
        accumulator: the register that sums products, such as "int32 wrap", else empty.
        bound: limit of the accumulator and of all its partial sums, None where nothing is accumulated.
        implementation: how the result is computed.
    """

    name: str
    op_type: str
    kind: Literal["integer", "float", "boundary", "shape"]
    reason: str = ""
    note: str = ""
    rule: str = ""
    accumulator: str = ""
    bound: int | None = None
    implementation: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to execute: `outputs = run(*inputs)`, values by name.

    Codes are passed in the type that stores them (`storage`). `overflows` names the output, if any, that counts
    the accumulators that did not fit.
    """

    info: NodeInfo
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run
    overflows: str = ""
    detail: Detail | None = None


@dataclass(frozen=True, slots=True)
class Tensor:
    """A real tensor that exists as codes: the value `codes` on the grid `params`."""

    codes: str
    params: QParams


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes (int32) and their grid."""

    codes: IntArray
    params: QParams


def storage(grid: Grid) -> np.dtype[Any]:
    """The numpy type that holds the codes of a grid."""
    return np.dtype(f"{'' if grid.signed else 'u'}int{8 if grid.bits <= 8 else 16 if grid.bits <= 16 else 32}")
