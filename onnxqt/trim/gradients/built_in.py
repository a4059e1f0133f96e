"""Where the gradients that onnxruntime-training has are right, and what they need of their nodes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxqt.trim.gradients.rule import Call, NoGradientError, Operand


@dataclass(frozen=True)
class BuiltIn:
    """What the gradient of a node needs; none of it changes the forward values.

    Attributes:
        attributes: to set.
        outputs: element types of the optional outputs that must be there.
    """

    attributes: Mapping[str, Any] = field(default_factory=dict)
    outputs: tuple[type[np.generic], ...] = ()


AS_IT_IS = BuiltIn()


def _conv(call: Call) -> BuiltIn:
    """The gradient ignores `auto_pad`, so the pads are written out; that of grouped 3-D weights is zero."""
    weight = call.inputs[1]
    if call.attributes.get("group", 1) > 1 and (weight is None or weight.shape is None or len(weight.shape) > 4):
        raise NoGradientError("has groups in three dimensions")
    mode = call.attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return AS_IT_IS
    if mode == "VALID":
        return BuiltIn({"auto_pad": "NOTSET"})
    return BuiltIn({"auto_pad": "NOTSET", "pads": _same_pads(call, upper=mode == "SAME_UPPER")})


def _same_pads(call: Call, upper: bool) -> list[int]:
    """The pads of auto_pad: half of what the windows reach beyond the input, the odd one at the end if `upper`."""
    size, out, kernel = (_spatial(operand) for operand in (call.inputs[0], call.outputs[0], call.inputs[1]))
    strides = call.attributes.get("strides", [1] * len(size))
    dilations = call.attributes.get("dilations", [1] * len(size))
    geometry = zip(size, out, kernel, strides, dilations, strict=True)
    totals = [max(0, (o - 1) * s + (k - 1) * d + 1 - n) for n, o, k, s, d in geometry]
    small = [total // 2 for total in totals]
    large = [total - half for total, half in zip(totals, small, strict=True)]
    return [*small, *large] if upper else [*large, *small]


def _spatial(operand: Operand | None) -> list[int]:
    sizes = None if operand is None or operand.shape is None else operand.shape[2:]
    known = [size for size in sizes or () if size is not None]
    if sizes is None or len(known) < len(sizes):
        raise NoGradientError("works on sizes that are not known (export the model with fixed height and width)")
    return known


def _layer_normalization(call: Call) -> BuiltIn:
    """The gradient reads the mean and the inverse standard deviation, and always gives one to the bias."""
    if len(call.inputs) < 3 or call.inputs[2] is None:
        raise NoGradientError("has no bias")
    if any(output is not None for output in call.outputs[1:]):
        raise NoGradientError("also gives out its statistics")
    return BuiltIn(outputs=(np.float32, np.float32))


def _mat_mul(call: Call) -> BuiltIn:
    if any(operand is None or operand.shape is None or len(operand.shape) < 2 for operand in call.inputs):
        raise NoGradientError("multiplies by a vector")
    return AS_IT_IS


def _max_pool(call: Call) -> BuiltIn:
    """The gradient reads the indices, and those in row-major order."""
    if call.attributes.get("storage_order", 0) and len(call.outputs) > 1 and call.outputs[1] is not None:
        raise NoGradientError("also gives out its indices, in column-major order")
    return BuiltIn({"storage_order": 0}, (np.int64,))


def _pad(call: Call) -> BuiltIn:
    if call.attributes.get("mode", "constant") != "constant":
        raise NoGradientError("repeats values")
    if len(call.inputs) > 3 and call.inputs[3] is not None:
        raise NoGradientError("pads only some axes")
    if any(operand is not None and operand.trained for operand in call.inputs[1:]):
        raise NoGradientError("pads with a computed value")
    return AS_IT_IS


def _pow(call: Call) -> BuiltIn:
    """The gradient is not reduced to the shape of a base that broadcasts, and the exponent gets none."""
    base, exponent = call.inputs
    if exponent is None or exponent.trained:
        raise NoGradientError("has a computed exponent")
    if exponent.shape != () and not _is_full(base, call.outputs[0]):
        raise NoGradientError("may broadcast its base")
    return AS_IT_IS


def _is_full(x: Operand | None, y: Operand | None) -> bool:
    """Whether an operand surely has the shape of the output."""
    return x is not None and y is not None and x.shape == y.shape and x.shape is not None and None not in x.shape


def _slice(call: Call) -> BuiltIn:
    steps = call.inputs[4] if len(call.inputs) > 4 else None
    if steps is not None and (steps.value is None or bool((steps.value < 0).any())):
        raise NoGradientError("steps backwards")
    return AS_IT_IS


def _transpose(call: Call) -> BuiltIn:
    """The gradient needs the permutation written out."""
    if "perm" in call.attributes:
        return AS_IT_IS
    (x,) = call.inputs
    if x is None or x.shape is None:
        raise NoGradientError("reverses the axes of a tensor of unknown rank")
    return BuiltIn({"perm": list(reversed(range(len(x.shape))))})


def _where(call: Call) -> BuiltIn:
    """The gradient is not reduced to the shape of an operand that broadcasts."""
    if not all(_is_full(operand, call.outputs[0]) for operand in call.inputs):
        raise NoGradientError("may broadcast an operand")
    return AS_IT_IS


# Operators that are not named here have a gradient that is right wherever `ops` calls it native.
BUILT_IN: Mapping[str, Callable[[Call], BuiltIn]] = {
    "Conv": _conv,
    "LayerNormalization": _layer_normalization,
    "MatMul": _mat_mul,
    "MaxPool": _max_pool,
    "Pad": _pad,
    "Pow": _pow,
    "Slice": _slice,
    "Transpose": _transpose,
    "Where": _where,
}
