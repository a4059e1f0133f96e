"""Rules of operators that reduce axes to one value."""

from collections.abc import Mapping

import numpy as np

from onnxqt.numerics import Array
from onnxqt.trim.gradients.rule import Call, NoGradientError, Rule, Vjp
from onnxqt.trim.gradients.text import number


class _Axes:
    """Which axes a node reduces: an attribute until opset 13 or 18, then an input."""

    def __init__(self, call: Call) -> None:
        given = call.inputs[1] if len(call.inputs) > 1 else None
        listed = call.attributes.get("axes", []) if given is None else given.value
        if listed is None:
            raise NoGradientError("reduces axes that are computed")
        self.axes = [int(axis) for axis in np.ravel(listed)]
        self.keeps = bool(call.attributes.get("keepdims", 1))
        self.is_identity = bool(call.attributes.get("noop_with_empty_axes", 0)) and not self.axes
        self._as_input = call.opset >= 18

    @property
    def constants(self) -> dict[str, Array]:
        return {"axes": np.array(self.axes, np.int64), "zero": number(0), "one": number(1)}

    def reduce(self, op_type: str, source: str, target: str) -> str:
        """Text that reduces the same axes, and keeps them."""
        if not self.axes:
            return f"{target} = {op_type}<keepdims = 1>({source})\n"
        if self._as_input or op_type == "ReduceSum":
            return f"{target} = {op_type}<keepdims = 1>({source}, axes)\n"
        return f"{target} = {op_type}<keepdims = 1, axes = {self.axes}>({source})\n"

    def keep(self, source: str, target: str) -> str:
        """Text that gives a reduced tensor its axes back, so that it broadcasts; one value does anyway."""
        if self.keeps or not self.axes:
            return f"{target} = Identity({source})\n"
        return f"{target} = Unsqueeze({source}, axes)\n"


def _reduction(text: str) -> Rule:
    """The rule of a reduction; `text` computes `slope`, dy/dx, from `x0` and `y`, which broadcasts."""

    def rule(call: Call) -> Vjp:
        axes = _Axes(call)
        if axes.is_identity:
            return Vjp("d0 = Identity(g0)")
        numbers = {"two": number(2)}
        return Vjp(
            f"{axes.keep('g0', 'g')} {axes.keep('y0', 'y')} {text}\n d0 = Mul(g, slope)", {**axes.constants, **numbers}
        )

    return rule


def _extreme(call: Call) -> Vjp:
    """Max and Min: values that are equal share the gradient."""
    axes = _Axes(call)
    if axes.is_identity:
        return Vjp("d0 = Identity(g0)")
    text = f"""{axes.keep("g0", "g")} {axes.keep("y0", "y")}
        equal = Equal(x0, y) chosen = Where(equal, one, zero) {axes.reduce("ReduceSum", "chosen", "count")}
        share = Div(chosen, count) d0 = Mul(g, share)"""
    return Vjp(text, axes.constants)


def _product(call: Call) -> Vjp:
    """The product of the others: y / x, but where one value is 0, the product of the rest, and 0 behind two."""
    axes = _Axes(call)
    if axes.is_identity:
        return Vjp("d0 = Identity(g0)")
    text = f"""{axes.keep("g0", "g")}
        is_zero = Equal(x0, zero) flag = Where(is_zero, one, zero) {axes.reduce("ReduceSum", "flag", "zeros")}
        nonzero = Where(is_zero, one, x0) {axes.reduce("ReduceProd", "nonzero", "product")}
        none = Equal(zeros, zero) single = Equal(zeros, one)
        beside = Div(product, nonzero) beside_nonzero = Where(none, beside, zero) at_zero = Where(single, product, zero)
        slope = Where(is_zero, at_zero, beside_nonzero) d0 = Mul(g, slope)"""
    return Vjp(text, axes.constants)


def _spatial(call: Call) -> Call:
    """A global pooling as the reduction of the axes behind the channels."""
    x = call.inputs[0]
    if x is None or x.shape is None:
        raise NoGradientError("pools a tensor of unknown rank")
    return Call(call.op_type, call.opset, {"axes": list(range(2, len(x.shape)))}, call.inputs, call.outputs)


def _global_max_pool(call: Call) -> Vjp:
    return _extreme(_spatial(call))


def _global_lp_pool(call: Call) -> Vjp:
    """For y = (sum |x|^p)^(1/p):  dy/dx = sign(x) (|x| / y)^(p - 1), 0 where y is."""
    power = call.attributes.get("p", 2) - 1
    text = f"""sign = Sign(x0) size = Abs(x0) is_zero = Equal(y, zero) safe = Where(is_zero, one, y)
        share = Div(size, safe) power = Constant<value_float = {power}.0>() raised = Pow(share, power)
        slope = Mul(sign, raised)"""
    return _reduction(text)(_spatial(call))


RULES: Mapping[str, Rule] = {
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": _global_max_pool,
    "ReduceL1": _reduction("slope = Sign(x0)"),
    "ReduceL2": _reduction("is_zero = Equal(y, zero) safe = Where(is_zero, one, y) slope = Div(x0, safe)"),
    "ReduceLogSum": _reduction("sum = Exp(y) each = Reciprocal(sum) shape = Shape(x0) slope = Expand(each, shape)"),
    "ReduceLogSumExp": _reduction("difference = Sub(x0, y) slope = Exp(difference)"),
    "ReduceMax": _extreme,
    "ReduceMin": _extreme,
    "ReduceProd": _product,
    "ReduceSumSquare": _reduction("slope = Mul(two, x0)"),
}
