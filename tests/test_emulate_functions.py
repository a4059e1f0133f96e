"""Activation functions of one node or of several: one table where only the two ends are quantized."""

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import pytest
from onnx import ModelProto
from test_emulate_engine import KINDS, POW2, Net, feed, onnx_runtime

from onnxqt import numerics
from onnxqt.emulate import load_program
from onnxqt.emulate.steps import Step
from onnxqt.numerics import Array
from onnxqt.profiles import Arithmetic


def number(net: Net, value: float) -> str:
    return net.constant(np.float32(value))


def silu(net: Net, x: str) -> str:
    return net.node("Mul", x, net.node("Sigmoid", x))


def silu_the_other_way_round(net: Net, x: str) -> str:
    return net.node("Mul", net.node("Sigmoid", x), x)


def hard_swish(net: Net, x: str) -> str:
    inner = net.node("Clip", net.node("Add", x, number(net, 3)), number(net, 0), number(net, 6))
    return net.node("Div", net.node("Mul", x, inner), number(net, 6))


def hard_swish_by_a_factor(net: Net, x: str) -> str:
    inner = net.node("Clip", net.node("Add", number(net, 3), x), number(net, 0), number(net, 6))
    return net.node("Mul", net.node("Mul", inner, number(net, 1 / 6)), x)


def gelu(net: Net, x: str) -> str:
    erf = net.node("Erf", net.node("Div", x, number(net, 2**0.5)))
    return net.node("Mul", net.node("Mul", x, net.node("Add", erf, number(net, 1))), number(net, 0.5))


def gelu_by_tanh(net: Net, x: str) -> str:
    cube = net.node("Mul", net.node("Pow", x, number(net, 3)), number(net, 0.044715))
    inner = net.node("Tanh", net.node("Mul", net.node("Add", x, cube), number(net, (2 / np.pi) ** 0.5)))
    return net.node("Mul", net.node("Mul", x, net.node("Add", inner, number(net, 1))), number(net, 0.5))


def gelu_in_two_branches(net: Net, x: str) -> str:
    erf = net.node("Erf", net.node("Div", x, number(net, 2**0.5)))
    return net.node("Mul", net.node("Mul", x, number(net, 0.5)), net.node("Add", erf, number(net, 1)))


def mish(net: Net, x: str) -> str:
    return net.node("Mul", x, net.node("Tanh", net.node("Softplus", x)))


ORT = Arithmetic()
UNITS: Mapping[str, tuple[Callable[[Net, str], str], str]] = {
    "silu": (silu, "Sigmoid Mul"),
    "silu, the other way round": (silu_the_other_way_round, "Sigmoid Mul"),
    "hard swish": (hard_swish, "Add Clip Mul Div"),
    "hard swish by a factor": (hard_swish_by_a_factor, "Add Clip Mul Mul"),
    "gelu": (gelu, "Div Erf Add Mul Mul"),
    "gelu by tanh": (gelu_by_tanh, "Pow Mul Add Mul Tanh Add Mul Mul"),
    "mish": (mish, "Softplus Tanh Mul"),
}
SINGLE = (
    "Abs",
    "Elu",
    "Erf",
    "Exp",
    "HardSwish",
    "HardSigmoid",
    "Mish",
    "Neg",
    "Sigmoid",
    "Softplus",
    "Softsign",
    "Tanh",
)


def model_of(net: Net, function: Callable[[Net, str], str], clamp: bool = False) -> ModelProto:
    """Every code of the input is met, between quantizers with odd zero points."""
    y = function(net, net.qdq(net.input("N", 300), 0.0371 if not net.pow2 else 0.03125, 9))
    y = net.node("Relu", y) if clamp else y
    return net.output(net.qdq(y, 0.0243 if not net.pow2 else 0.015625, 17))


def codes_and_real(model: ModelProto) -> tuple[Array, Array]:
    """The codes of the emulator, and the reals that ONNX Runtime has before the last quantizer."""
    inputs = {"x": np.linspace(-6, 6, 600, dtype=np.float32).reshape(2, 300)}
    copy = ModelProto()
    copy.CopyFrom(model)
    last = next(node for node in copy.graph.node if node.output[0] == copy.graph.output[0].name)
    quantizer = next(node for node in copy.graph.node if node.output[0] == last.input[0])
    copy.graph.output[0].name = quantizer.input[0]
    (real,), _ = onnx_runtime(copy, inputs, optimize=False)
    (entry,) = load_program(model).run_codes(inputs).codes.values()
    return entry.codes, real


def tables_of(model: ModelProto, arithmetic: Arithmetic = ORT) -> list[Step]:
    return [step for step in load_program(model, arithmetic).steps if step.info.kind == "integer"]


@KINDS
@POW2
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("name", UNITS)
def test_several_nodes_are_one_table(name: str, clamp: bool, kind: str, pow2: bool) -> None:
    build, operators = UNITS[name]
    net = Net(kind, pow2, opset=18)
    model = model_of(net, build, clamp)
    (step,) = tables_of(model)
    assert load_program(model).float_nodes == ()
    assert step.info.note == f"one table for {operators}"
    codes, real = codes_and_real(model)
    grid, scale = (-128, 127) if kind == "s8" else (0, 255), np.float32(0.015625 if pow2 else 0.0243)
    expected = np.clip(np.rint(real / scale).astype(int) + 17, *grid)
    np.testing.assert_array_equal(codes, expected)
    assert len(np.unique(codes)) > 50


@pytest.mark.parametrize("operator", SINGLE)
def test_one_node_is_one_table(operator: str) -> None:
    model = model_of(Net("s8", False, opset=18), lambda net, x: net.node(operator, x))
    (step,) = tables_of(model)
    assert (step.info.op_type, step.info.note) == (operator, "")
    codes, real = codes_and_real(model)
    np.testing.assert_array_equal(codes, np.clip(np.rint(real / np.float32(0.0243)).astype(int) + 17, -128, 127))


@pytest.mark.parametrize("rounding", ["even", "away", "up"])
def test_entries_are_rounded_as_the_back_end_does(rounding: Literal["even", "away", "up"]) -> None:
    """`0.5 x` of codes on a power of two lies on ties."""

    def halved(net: Net, x: str) -> str:
        return net.node("Mul", x, number(net, 0.5))

    net = Net("s8", True)
    y = halved(net, net.qdq(net.input("N", 300), 0.25, 3))
    model = net.output(net.qdq(y, 0.25, -5))
    (step,) = tables_of(model, Arithmetic(table=rounding))
    assert step.info.rule.endswith(f" {rounding}")
    assert step.detail is not None
    table = step.detail.table
    assert table is not None
    for code, entry in zip(range(-128, 128), table.tolist(), strict=True):
        twice = code - 3
        half, odd = divmod(twice, 2)
        tie = {"up": half + 1, "away": half + (twice > 0), "even": half + half % 2}[rounding]
        assert entry == min(max((tie if odd else half) - 5, -128), 127)


@pytest.mark.parametrize("reference", [False, True])
def test_a_quantizer_inside_parts_the_function(reference: bool) -> None:
    net = Net("u8", False)
    x = net.qdq(net.input("N", 30))
    model = net.output(net.qdq(net.node("Mul", x, net.qdq(net.node("Sigmoid", x), 1 / 256, 0))))
    infos = load_program(model, reference=reference).integer_nodes
    assert [(info.op_type, info.note) for info in infos] == [("Sigmoid", ""), ("Mul", "")]


def test_a_value_inside_that_is_read_elsewhere_parts_the_function() -> None:
    net = Net("u8", False)
    x = net.qdq(net.input("N", 30))
    sigmoid = net.node("Sigmoid", x)
    model = net.output(net.qdq(net.node("Mul", x, sigmoid)), sigmoid)
    program = load_program(model)
    assert {op for _, op, _ in program.float_nodes} == {"Sigmoid", "Mul"}
    assert all(reason for _, _, reason in program.float_nodes)
    expected, _ = onnx_runtime(model, feed(model), optimize=False)
    for value, found in zip(expected, program.run(feed(model)).values(), strict=True):
        np.testing.assert_array_equal(found, value)


def test_two_functions_of_one_tensor_are_two_tables() -> None:
    net = Net("s8", False)
    x = net.qdq(net.input("N", 30))
    model = net.output(net.qdq(silu(net, x)), net.qdq(hard_swish(net, x)))
    notes = [step.info.note for step in tables_of(model)]
    assert notes == ["one table for Sigmoid Mul", "one table for Add Clip Mul Div"]


def test_a_constant_per_channel_is_no_table() -> None:
    net = Net("s8", False)
    x = net.qdq(net.input("N", 3, 5))
    slopes = net.constant(np.array([[0.5], [2], [3]], np.float32))
    model = net.output(net.qdq(net.node("Mul", net.node("Sigmoid", x), slopes)))
    program = load_program(model)
    assert program.integer_nodes == ()
    expected, _ = onnx_runtime(model, feed(model), optimize=False)
    (found,) = program.run(feed(model)).values()
    np.testing.assert_array_equal(found, expected[0])


def test_branches_that_read_the_tensor_alone_are_joined() -> None:
    model = model_of(Net("s8", False, opset=18), gelu_in_two_branches)
    program = load_program(model)
    assert program.float_nodes == ()
    assert len(program.integer_nodes) == 1
    codes, real = codes_and_real(model)
    np.testing.assert_array_equal(codes, np.clip(np.rint(real / np.float32(0.0243)).astype(int) + 17, -128, 127))


def test_a_function_without_a_value_for_some_code_is_float_and_says_why() -> None:
    model = model_of(Net("s8", False), lambda net, x: net.node("Log", x))
    ((_, operator, reason),) = load_program(model).float_nodes
    assert operator == "Log"
    assert "no finite value for some codes" in reason


def test_hard_swish_between_quantizers_is_that_of_onnx_runtime() -> None:
    for kind in ("u8", "s8"):
        model = model_of(Net(kind, False), lambda net, x: net.node("HardSwish", x))
        codes, real = codes_and_real(model)
        params = load_program(model).tensors[model.graph.output[0].name].params
        np.testing.assert_array_equal(codes, numerics.quantize(real, params))
