"""Rules of operators that compute each output value from the values at its place."""

import math
from collections.abc import Mapping

from onnxqt.trim.gradients.rule import Call, Rule, Vjp
from onnxqt.trim.gradients.text import number, sum_to


def _unary(derivative: str, **numbers: float) -> Rule:
    """The rule of y = f(x); `derivative` computes `slope`, dy/dx, from `x0` and `y0`."""
    constants = {name: number(value) for name, value in {"zero": 0.0, "one": 1.0, **numbers}.items()}

    def rule(call: Call) -> Vjp:
        return Vjp(f"{derivative}\n d0 = Mul(g0, slope)", constants)

    return rule


def _with_attributes(derivative: str, **defaults: float) -> Rule:
    """The same for an operator whose float attributes are constants of that name in the text."""

    def rule(call: Call) -> Vjp:
        return _unary(derivative, **{name: call.attributes.get(name, value) for name, value in defaults.items()})(call)

    return rule


_PIECEWISE = {
    "HardSigmoid": _with_attributes(
        """rest = Sub(one, y0) bend = Mul(y0, rest) inside = HardSigmoid<alpha = 3e38, beta = 0.0>(bend)
        slope = Mul(inside, alpha)""",
        alpha=0.2,
    ),
    "HardSwish": _unary(
        """gate = HardSigmoid<alpha = 0.16666667, beta = 0.5>(x0) rest = Sub(one, gate) bend = Mul(gate, rest)
        inside = HardSigmoid<alpha = 3e38, beta = 0.0>(bend) part = Mul(x0, inside) sixth_part = Mul(part, sixth)
        slope = Add(gate, sixth_part)""",
        sixth=1 / 6,
    ),
    "Shrink": _with_attributes("size = Abs(x0) kept = Greater(size, lambd) slope = Where(kept, one, zero)", lambd=0.5),
    "ThresholdedRelu": _with_attributes("kept = Greater(x0, alpha) slope = Where(kept, one, zero)", alpha=1.0),
}

_EXPONENTIAL = {
    "Celu": _with_attributes("""low = Min(x0, zero) scaled = Div(low, alpha) slope = Exp(scaled)""", alpha=1.0),
    "Elu": _with_attributes(
        "positive = Greater(x0, zero) curve = Add(y0, alpha) slope = Where(positive, one, curve)", alpha=1.0
    ),
    "Mish": _unary(
        """s = Softplus(x0) t = Tanh(s) p = Sigmoid(x0) tt = Mul(t, t) rest = Sub(one, tt)
        px = Mul(p, x0) bend = Mul(px, rest) slope = Add(t, bend)"""
    ),
    "Selu": _with_attributes(
        """positive = Greater(x0, zero) limit = Mul(alpha, gamma) curve = Add(y0, limit)
        slope = Where(positive, gamma, curve)""",
        alpha=1.67326319217681884765625,
        gamma=1.05070102214813232421875,
    ),
    "Softplus": _unary("slope = Sigmoid(x0)"),
    "Softsign": _unary("size = Abs(x0) wide = Add(size, one) square = Mul(wide, wide) slope = Reciprocal(square)"),
}

_TRIGONOMETRIC = {
    "Acos": _unary("xx = Mul(x0, x0) rest = Sub(one, xx) root = Sqrt(rest) slope = Div(minus, root)", minus=-1.0),
    "Acosh": _unary("xx = Mul(x0, x0) rest = Sub(xx, one) root = Sqrt(rest) slope = Reciprocal(root)"),
    "Asin": _unary("xx = Mul(x0, x0) rest = Sub(one, xx) root = Sqrt(rest) slope = Reciprocal(root)"),
    "Asinh": _unary("xx = Mul(x0, x0) sum = Add(xx, one) root = Sqrt(sum) slope = Reciprocal(root)"),
    "Atan": _unary("xx = Mul(x0, x0) sum = Add(xx, one) slope = Reciprocal(sum)"),
    "Atanh": _unary("xx = Mul(x0, x0) rest = Sub(one, xx) slope = Reciprocal(rest)"),
    "Cos": _unary("sine = Sin(x0) slope = Neg(sine)"),
    "Cosh": _unary("slope = Sinh(x0)"),
    "Reciprocal": _unary("yy = Mul(y0, y0) slope = Neg(yy)"),
    "Sin": _unary("slope = Cos(x0)"),
    "Sinh": _unary("slope = Cosh(x0)"),
    "Tan": _unary("yy = Mul(y0, y0) slope = Add(yy, one)"),
}


def _gelu(call: Call) -> Vjp:
    """For y = x P(x) with P the normal distribution, p its density:  dy/dx = P + x p.

    With approximate = "tanh":  P = (1 + tanh u) / 2,  u = c (x + a x^3),  p = (1 - tanh^2 u) c (1 + 3 a x^2) / 2.
    """
    if call.attributes.get("approximate", "none") == "none":
        text = """scaled = Mul(x0, c) e = Erf(scaled) e1 = Add(e, one) P = Mul(e1, half)
            xx = Mul(x0, x0) power = Mul(xx, minus_half) bell = Exp(power) p = Mul(bell, peak)"""
        numbers = {"c": math.sqrt(0.5), "half": 0.5, "minus_half": -0.5, "peak": 1 / math.sqrt(2 * math.pi)}
    else:
        text = """xx = Mul(x0, x0) axx = Mul(xx, a) axx1 = Add(axx, one) inner = Mul(x0, axx1) u = Mul(inner, c)
            t = Tanh(u) t1 = Add(t, one) P = Mul(t1, half)
            tt = Mul(t, t) rest = Sub(one, tt) axx3 = Mul(axx, three) axx31 = Add(axx3, one)
            product = Mul(rest, axx31) p = Mul(product, half_c)"""
        c = math.sqrt(2 / math.pi)
        numbers = {"a": 0.044715, "c": c, "half": 0.5, "half_c": c / 2, "three": 3.0}
    return _unary(text + " xp = Mul(x0, p) slope = Add(P, xp)", **numbers)(call)


def _same(call: Call) -> Vjp:
    return Vjp("d0 = Identity(g0)")


# --- operands that broadcast ----------------------------------------------------------------------------


def _broadcasting(call: Call, terms: Mapping[int, str], text: str = "") -> Vjp:
    """A rule from the gradient of each operand before it is summed over the axes of broadcasting."""
    trained = [i for i, operand in enumerate(call.inputs) if operand is not None and operand.trained]
    sums = [sum_to(call.inputs[i], call.outputs[0], f"x{i}", terms[i], f"d{i}") for i in trained]
    return Vjp(text + "\n" + "\n".join(sums), {"zero": number(0), "one": number(1)})


def _sum(call: Call) -> Vjp:
    return _broadcasting(call, dict.fromkeys(range(len(call.inputs)), "g0"))


def _mean(call: Call) -> Vjp:
    count = len(call.inputs)
    terms = dict.fromkeys(range(count), "share")
    return _broadcasting(call, terms, f"count = Constant<value_float = {count}.0>() share = Div(g0, count)")


def _extreme(call: Call) -> Vjp:
    """Max and Min: the gradient goes to the first operand that has the value."""
    text = ["taken0 = Less(one, zero)", "free0 = Not(taken0)"]
    for i in range(len(call.inputs)):
        text.append(f"""
            equal{i} = Equal(x{i}, y0) first{i} = And(equal{i}, free{i}) term{i} = Where(first{i}, g0, zero)
            taken{i + 1} = Or(taken{i}, equal{i}) free{i + 1} = Not(taken{i + 1})""")
    return _broadcasting(call, {i: f"term{i}" for i in range(len(call.inputs))}, "\n".join(text))


def _clip(call: Call) -> Vjp:
    """min(max(x, low), high): outside, the gradient goes to the bound."""
    text, terms = "inside0 = LessOrEqual(zero, one)", {}
    inside = "inside0"
    for i, compare in ((1, "Less"), (2, "Greater")):
        if i < len(call.inputs) and call.inputs[i] is not None:
            text += f"""
                beyond{i} = {compare}(x0, x{i}) term{i} = Where(beyond{i}, g0, zero)
                within{i} = Not(beyond{i}) inside{i} = And({inside}, within{i})"""
            inside, terms[i] = f"inside{i}", f"term{i}"
    return _broadcasting(call, {0: "term0", **terms}, f"{text}\n term0 = Where({inside}, g0, zero)")


def _mod(call: Call) -> Vjp:
    """For y = x0 - x1 q with a whole q, which is constant almost everywhere."""
    text = "multiple = Sub(x0, y0) q = Div(multiple, x1) gq = Mul(g0, q) negative = Neg(gq)"
    return _broadcasting(call, {0: "g0", 1: "negative"}, text)


def _pow(call: Call) -> Vjp:
    """D x^e = e x^(e - 1) dx + x^e log(x) de; the logarithm of what is not positive counts as 0."""
    text = """less = Sub(x1, one) power = Pow(x0, less) slope = Mul(x1, power) base = Mul(g0, slope)
        positive = Greater(x0, zero) safe = Where(positive, x0, one) log = Log(safe) ylog = Mul(y0, log)
        exponent = Mul(g0, ylog)"""
    return _broadcasting(call, {0: "base", 1: "exponent"}, text)


def _p_relu(call: Call) -> Vjp:
    text = """negative = Less(x0, zero) scaled = Mul(g0, x1) data = Where(negative, scaled, g0)
        low = Min(x0, zero) slope = Mul(g0, low)"""
    return _broadcasting(call, {0: "data", 1: "slope"}, text)


def _where(call: Call) -> Vjp:
    return _broadcasting(call, {1: "chosen", 2: "other"}, "chosen = Where(x0, g0, zero) other = Where(x0, zero, g0)")


RULES: Mapping[str, Rule] = {
    **_PIECEWISE,
    **_EXPONENTIAL,
    **_TRIGONOMETRIC,
    "CastLike": _same,
    "Clip": _clip,
    "Dropout": _same,
    "Gelu": _gelu,
    "Max": _extreme,
    "Mean": _mean,
    "Min": _extreme,
    "Mod": _mod,
    "PRelu": _p_relu,
    "Pow": _pow,
    "Sum": _sum,
    "Where": _where,
}
