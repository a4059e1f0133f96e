"""Each gradient rule by itself, against differences of what ONNX Runtime computes for the operator.

The derivative of sum(r y) by each element of an input: central differences D(h), extrapolated (Richardson) as
(4 D(h/2) - D(h)) / 3, which leaves an error of h^4/480 times the fifth derivative.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import onnx
import pytest
from gradient_cases import CASES, Case, H, ints, random, scalar, signed
from gradient_cases_fast import CASES_FAST, LEFT, TAKEN
from gradient_cases_spatial import CASES_SPATIAL
from onnx import helper

from onnxqt.numerics import Array
from onnxqt.runtime import MAX_IR_VERSION, Session
from onnxqt.trim.gradients import indexing, matrices, windows
from onnxqt.trim.gradients.faster import FASTER
from onnxqt.trim.gradients.rule import Call, NoGradientError, Operand, Rule, Vjp
from onnxqt.trim.gradients.text import parse

RULES = {**indexing.RULES, **matrices.RULES, **windows.RULES}
RULE_CASES = {name: case for name, case in {**CASES, **CASES_SPATIAL}.items() if case.op in RULES}
FAST_CASES = {**TAKEN, **{name: CASES[name] for name in ("Relu", "Clip", "Clip-above", "Conv-plain", "Conv-no-bias")}}

# Inference is off by about four float32 roundings of the largest value (sums have at most 20 terms, and sqrt(20)
# is about 4); the differences divide that by h/2 with weight 4/3 and by h with weight 1/3, from two values each.
ROUNDING = 4 * 2.0**-24 * 3 / H
# The largest fifth derivatives by an element x: that of (x^3 + s)^(1/3) for x and s from 1, and that of
# x (1.5 + x^2 / 6)^-0.75 for x from 0.5. All other operators are linear in each element, and their differences exact.
FIFTH_DERIVATIVE = {"LpPool": 15.0, "LRN": 0.5}


def values_of(case: Case) -> list[Array | None]:
    """The inputs of the operator, the first with two samples if its batch is dynamic."""
    zeros = case.zeros
    values: list[Array | None] = []
    for name, value in zip(case.names, case.inputs, strict=True):
        moved = value is not None and f"zero_{name}" in zeros
        values.append(np.asarray(value + zeros[f"zero_{name}"]) if moved else value)
    return values


def session_of(nodes: list[onnx.NodeProto], feeds: dict[str, Array], outputs: list[str], opset: int) -> Session:
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
        for name, value in feeds.items()
    ]
    results = [helper.make_empty_tensor_value_info(name) for name in outputs]
    graph = helper.make_graph(nodes, "graph", inputs, results)
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)],
        ir_version=MAX_IR_VERSION,
    )
    return Session(model, optimize=False)


class Evaluated:
    """A case, run once forward."""

    def __init__(self, name: str, case: Case) -> None:
        values = values_of(case)
        self.case = case
        self.feeds = {f"x{i}": value for i, value in enumerate(values) if value is not None}
        names = [f"y{i}" for i in range(case.outputs)]
        inputs = [f"x{i}" if value is not None else "" for i, value in enumerate(values)]
        node = helper.make_node(case.op, inputs, names, **case.attributes)
        self._session = session_of([node], self.feeds, names, case.opset)
        self.outputs = self._session.run(self.feeds)
        rng = random(name)
        self.weights = {
            f"g{output[1:]}": np.asarray(rng.choice([-1, 1], y.shape) * rng.uniform(0.5, 1.5, y.shape), np.float32)
            for output, y in self.outputs.items()
            if y.dtype == np.float32
        }

    @property
    def trained(self) -> list[int]:
        return [i for i, name in enumerate(self.case.names) if name.startswith("p")]

    def call(self) -> Call:
        """The node as a rule sees it; the size of a dynamic batch is not known."""

        def operand(name: str, value: Array) -> Operand:
            free = self.case.dynamic and (name == "x0" or name.startswith("y"))
            index = int(name[1:])
            trained = name.startswith("x") and index in self.trained
            shape = (None, *value.shape[1:]) if free else value.shape
            known = None if trained or name.startswith("y") else value
            return Operand(shape, known, value.dtype == np.float32, trained)

        inputs = [self.feeds.get(f"x{i}") for i in range(len(self.case.inputs))]
        return Call(
            self.case.op,
            self.case.opset,
            dict(self.case.attributes),
            tuple(None if value is None else operand(f"x{i}", value) for i, value in enumerate(inputs)),
            tuple(operand(name, value) for name, value in self.outputs.items()),
        )

    def gradients(self, vjp: Vjp) -> dict[str, Array]:
        """What a rule's text computes."""
        nodes = parse(vjp.body, self.case.opset)
        defined = {name for node in nodes for name in node.output}
        results = [f"d{i}" for i in self.trained if f"d{i}" in defined]
        feeds = {**self.feeds, **self.outputs, **self.weights, **vjp.constants}
        return session_of(nodes, feeds, results, self.case.opset).run(feeds)

    def differences(self, index: int) -> tuple[Array, Array]:
        """Derivative of sum(r y) by each element of an input, and how far off it may be."""
        value = self.feeds[f"x{index}"]
        derivative, tolerance = np.zeros(value.shape), np.zeros(value.shape)
        truncation = FIFTH_DERIVATIVE.get(self.case.op, 0) * H**4 / 480

        def moved(position: tuple[int, ...], step: float) -> dict[str, Array]:
            changed = value.copy()
            changed[position] += np.float32(step)
            return self._session.run({**self.feeds, f"x{index}": changed})

        for position in np.ndindex(value.shape):
            wide, narrow = ([moved(position, step) for step in (h, -h)] for h in (H, H / 2))
            for name, weight in self.weights.items():
                output = f"y{name[1:]}"
                (up, down), (near_up, near_down) = (
                    [result[output].astype(np.float64) for result in pair] for pair in (wide, narrow)
                )
                slope = (4 * (near_up - near_down) / H - (up - down) / (2 * H)) / 3
                derivative[position] += np.sum(weight * slope)
                reach = np.sum(np.abs(weight)[up != down])
                tolerance[position] += reach * (ROUNDING * np.abs(up).max() + truncation)
        return derivative, tolerance


@pytest.mark.parametrize("name", RULE_CASES)
def test_rule_equals_differences(name: str) -> None:
    check_rule(Evaluated(name, RULE_CASES[name]), RULES)


@pytest.mark.parametrize("name", FAST_CASES)
def test_faster_rule_equals_differences(name: str) -> None:
    check_rule(Evaluated(name, FAST_CASES[name]), FASTER)


def check_rule(evaluated: Evaluated, rules: Mapping[str, Rule]) -> None:
    results = evaluated.gradients(rules[evaluated.case.op](evaluated.call()))
    assert {f"d{i}" for i in evaluated.trained} == results.keys()
    for index in evaluated.trained:
        derivative, tolerance = evaluated.differences(index)
        result = results[f"d{index}"]
        assert result.shape == derivative.shape
        assert np.any(derivative != 0)
        # The rule itself rounds as the forward pass does.
        wrong = np.abs(result - derivative) > tolerance
        assert not wrong.any(), f"d{index}: {result[wrong][:5]} instead of {derivative[wrong][:5]}"


@pytest.mark.parametrize("name", RULE_CASES)
def test_rule_without_known_sizes_is_the_same_or_refuses(name: str) -> None:
    evaluated = Evaluated(name, RULE_CASES[name])
    call = evaluated.call()

    def blind(operand: Operand | None) -> Operand | None:
        if operand is None or operand.shape is None or operand.value is not None:
            return operand
        return replace(operand, shape=(None,) * len(operand.shape))

    inputs, outputs = tuple(map(blind, call.inputs)), tuple(map(blind, call.outputs))
    try:
        vjp = RULES[call.op_type](replace(call, inputs=inputs, outputs=outputs))
    except NoGradientError as error:
        reason = str(error)
    else:
        expected, results = (evaluated.gradients(each) for each in (RULES[call.op_type](call), vjp))
        for result, value in results.items():
            np.testing.assert_array_equal(value, expected[result])  # exactly: the same products and sums
        return
    assert "sizes that are not known" in reason


# --- what has no gradient -------------------------------------------------------------------------------

REFUSED = {
    "Det-13": (Case("Det", (signed(13, 13),)), "larger than 12 x 12"),
    "Col2Im-computed-block": (Case("Col2Im", (signed(1, 12, 12), ints(4, 5), None), opset=18), "computed block shape"),
    "Resize-computed-scale": (Case("Resize", (signed(1, 3, 4, 5), None, scalar(2.0))), "computed scale"),
    "Resize-aspect-ratio": (
        Case("Resize", (signed(1, 3, 4, 5),), {"keep_aspect_ratio_policy": "not_larger"}, opset=18),
        "keeps the aspect ratio",
    ),
    "ScatterND-max": (
        Case("ScatterND", (signed(3, 2), ints(1).reshape(1, 1), signed(1, 2)), {"reduction": "max"}, opset=18),
        "reduction 'max'",
    ),
    "ConvTranspose-output-shape": (
        Case("ConvTranspose", (signed(1, 2, 3), signed(2, 3, 2)), {"output_shape": [8], "strides": [2]}),
        "a stride or more",
    ),
    "ConvTranspose-output-padding": (
        Case("ConvTranspose", (signed(1, 2, 3), signed(2, 3, 2)), {"output_padding": [1], "dilations": [2]}),
        "a stride or more",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_is_refused(name: str) -> None:
    case, reason = REFUSED[name]
    inputs = tuple(None if value is None else Operand(value.shape, None, trained=True) for value in case.inputs)
    call = Call(case.op, case.opset, dict(case.attributes), inputs, (Operand((1, 3, 8, 10)),))
    with pytest.raises(NoGradientError, match=reason):
        RULES[case.op](call)


def test_unknown_rank_is_refused() -> None:
    call = Call("Einsum", 17, {"equation": "...i->..."}, (Operand(None, trained=True),), (Operand(None),))
    with pytest.raises(NoGradientError, match="unknown rank"):
        RULES["Einsum"](call)


# --- rules that replace slow gradients ------------------------------------------------------------------


@pytest.mark.parametrize("name", LEFT)
def test_what_a_faster_rule_leaves_to_the_trainer(name: str) -> None:
    case, reason = LEFT[name]
    with pytest.raises(NoGradientError, match=reason):
        FASTER[case.op](Evaluated(name, case).call())


@pytest.mark.parametrize("unknown", ["inputs", "outputs"])
def test_faster_rule_of_a_convolution_needs_sizes(unknown: str) -> None:
    call = Evaluated("Conv-plain", CASES["Conv-plain"]).call()
    blind = Operand((None, 4, None, None), trained=True)
    inputs = (blind, *call.inputs[1:]) if unknown == "inputs" else call.inputs
    outputs = (blind,) if unknown == "outputs" else call.outputs
    with pytest.raises(NoGradientError, match="sizes that are not known"):
        FASTER["Conv"](replace(call, inputs=inputs, outputs=outputs))


def test_every_faster_rule_is_compared() -> None:
    assert {case.op for case in FAST_CASES.values()} == set(FASTER)
    assert {case.op for case in CASES_FAST.values()} == set(FASTER)


def test_step_function_of_relu_is_exact_from_the_smallest_normal_number_on() -> None:
    """And zero at zero, where the trainer's own gradient is zero too."""
    x = np.array([-np.inf, -1, -1e-38, -0.0, 0.0, 2.0**-126, 1.0, 3e38, np.inf], np.float32)
    g = np.linspace(-2, 3, x.size, dtype=np.float32)
    feeds: dict[str, Array] = {"y0": np.maximum(x, 0), "g0": g}
    body = FASTER["Relu"](Call("Relu", 17, {}, (Operand(x.shape, trained=True),), (Operand(x.shape),))).body
    found = session_of(parse(body, 17), feeds, ["d0"], 17).run(feeds)["d0"]
    np.testing.assert_array_equal(found, np.where(x > 0, g, 0))
