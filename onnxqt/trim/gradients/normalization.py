"""Rules of operators that shift and scale values by statistics.

With z = (x - mean) / s over some axes, and the gradient h of z:

    dx = (h - mean(h) - z mean(h z)) / s
"""

from collections.abc import Mapping

from onnxqt.trim.gradients.rule import Call, NoGradientError, Rule, Vjp
from onnxqt.trim.gradients.text import number, sum_to


def _mean(call: Call, source: str, target: str, axes: list[int]) -> str:
    if call.opset < 18:
        return f"{target} = ReduceMean<axes = {axes}>({source})\n"
    return f"{target}_axes = Constant<value_ints = {axes}>() {target} = ReduceMean({source}, {target}_axes)\n"


def _standardize(call: Call, axes: list[int], epsilon: float) -> str:
    """Text that computes `z` and `inverse`, 1 / s, from `x`."""
    return f"""epsilon = Constant<value_float = {epsilon!r}>()
        {_mean(call, "x", "mean", axes)} centred = Sub(x, mean) square = Mul(centred, centred)
        {_mean(call, "square", "variance", axes)} shifted = Add(variance, epsilon)
        deviation = Sqrt(shifted) inverse = Reciprocal(deviation) z = Mul(centred, inverse)
    """


def _back(call: Call, axes: list[int]) -> str:
    """Text that computes `dx` from `h`, `z` and `inverse`."""
    return f"""{_mean(call, "h", "mean_h", axes)} hz = Mul(h, z) {_mean(call, "hz", "mean_hz", axes)}
        along = Mul(z, mean_hz) level = Sub(h, mean_h) across = Sub(level, along) dx = Mul(across, inverse)
    """


def _layer_normalization(call: Call) -> Vjp:
    x, y = call.inputs[0], call.outputs[0]
    if any(output is not None for output in call.outputs[1:]):
        raise NoGradientError("also gives out its statistics")
    if x is None or x.shape is None:
        raise NoGradientError("normalizes a tensor of unknown rank")
    axis = call.attributes.get("axis", -1)
    axes = list(range(axis - len(x.shape) if axis >= 0 else axis, 0))
    text = f"""x = Identity(x0) {_standardize(call, axes, call.attributes.get("epsilon", 1e-5))}
        h = Mul(g0, x1) {_back(call, axes)} d0 = Identity(dx)
        gz = Mul(g0, z) {sum_to(call.inputs[1], y, "x1", "gz", "d1")}"""
    if len(call.inputs) > 2 and call.inputs[2] is not None:
        text += sum_to(call.inputs[2], y, "x2", "g0", "d2")
    return Vjp(text)


def _instance_normalization(call: Call) -> Vjp:
    return _per_channel(call, groups=0)


def _group_normalization(call: Call) -> Vjp:
    """The form of opset 21, with a scale per channel; the one before is deprecated, and no checker lets it pass."""
    return _per_channel(call, call.attributes["num_groups"])


def _per_channel(call: Call, groups: int) -> Vjp:
    """Values normalized within each of `groups`, 0 for each channel of its own, and scaled per channel."""
    epsilon = call.attributes.get("epsilon", 1e-5)
    text = f"""groups = Constant<value_ints = [0, {groups}, -1]>() channels = Constant<value_ints = [0, 0, -1]>()
        column = Constant<value_ints = [-1, 1]>() outside = Constant<value_ints = [0, 2]>()
        x = Reshape(x0, groups) {_standardize(call, [-1], epsilon)}
        g = Reshape(g0, channels) scale = Reshape(x1, column) scaled = Mul(g, scale)
        grouped = Shape(x) h = Reshape(scaled, grouped) {_back(call, [-1])}
        own = Shape(x0) d0 = Reshape(dx, own)
        listed = Shape(g) zc = Reshape(z, listed) gz = Mul(g, zc)
        d1 = ReduceSum<keepdims = 0>(gz, outside) d2 = ReduceSum<keepdims = 0>(g, outside)"""
    return Vjp(text)


def _batch_normalization(call: Call) -> Vjp:
    """The inference form: mean x3 and variance x4 are given."""
    if call.attributes.get("training_mode", 0):
        raise NoGradientError("takes its statistics from the batch")
    text = f"""epsilon = Constant<value_float = {call.attributes.get("epsilon", 1e-5)!r}>()
        listed = Constant<value_ints = [0, 0, -1]>() column = Constant<value_ints = [-1, 1]>()
        outside = Constant<value_ints = [0, 2]>() minus_half = Constant<value_float = -0.5>()
        shifted = Add(x4, epsilon) deviation = Sqrt(shifted) inverse = Reciprocal(deviation) factor = Mul(x1, inverse)
        g = Reshape(g0, listed) factors = Reshape(factor, column) dx = Mul(g, factors) own = Shape(x0)
        d0 = Reshape(dx, own)
        x = Reshape(x0, listed) means = Reshape(x3, column) centred = Sub(x, means) gc = Mul(g, centred)
        g_sum = ReduceSum<keepdims = 0>(g, outside) gc_sum = ReduceSum<keepdims = 0>(gc, outside)
        d1 = Mul(gc_sum, inverse) d2 = Identity(g_sum)
        down = Neg(g_sum) d3 = Mul(down, factor)
        bend = Div(factor, shifted) half = Mul(bend, minus_half) d4 = Mul(gc_sum, half)"""
    return Vjp(text)


def _mean_variance_normalization(call: Call) -> Vjp:
    axes = list(call.attributes.get("axes", [0, 2, 3]))
    text = (
        f"""x = Identity(x0) {_standardize(call, axes, 0.0)} h = Identity(g0) {_back(call, axes)} d0 = Identity(dx)"""
    )
    return Vjp(text)


def _lp_normalization(call: Call) -> Vjp:
    """For y = x / n:  dx = (g - n' sum(g y)) / n, where n' is sign(x) for p = 1 and y for p = 2."""
    axis = call.attributes.get("axis", -1)
    if call.attributes.get("p", 2) == 1:
        norm = "size = Abs(x0) n = ReduceSum(size, axis) slope = Sign(x0)"
    else:
        norm = "size = Mul(x0, x0) total = ReduceSum(size, axis) n = Sqrt(total) slope = Identity(y0)"
    text = f"""axis = Constant<value_ints = [{axis}]>() {norm}
        gy = Mul(g0, y0) along = ReduceSum(gy, axis) change = Mul(slope, along) rest = Sub(g0, change)
        is_zero = Equal(n, zero) safe = Where(is_zero, one, n) quotient = Div(rest, safe)
        d0 = Where(is_zero, zero, quotient)"""
    return Vjp(text, {"zero": number(0), "one": number(1)})


RULES: Mapping[str, Rule] = {
    "BatchNormalization": _batch_normalization,
    "GroupNormalization": _group_normalization,
    "InstanceNormalization": _instance_normalization,
    "LayerNormalization": _layer_normalization,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance_normalization,
}
