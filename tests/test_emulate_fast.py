"""The fast engine against the definition: equal codes for every operator, rule and width; and errors of one LSB."""

import functools
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import test_emulate_tflite as exact_kernels
from onnx import ModelProto, helper, numpy_helper
from test_emulate_engine import TYPES, X86, Net, feed, onnx_runtime
from test_requantize import EXACT, Scales

from onnxqt import requantize
from onnxqt.emulate import Codes, Program, fast, kernels, load_program, nodes
from onnxqt.emulate.kernels import (
    add,
    hardswish,
    leaky,
    moves,
    multiply,
    pooling,
    products,
    resize,
    softmax,
    tables,
    windows,
)
from onnxqt.emulate.nodes import moves as move_nodes
from onnxqt.emulate.nodes import products as product_nodes
from onnxqt.emulate.steps import storage
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.profiles import PROFILES, Accumulator, Arithmetic
from onnxqt.requantize import Requantization, requantization

ORT = Arithmetic()
KINDS = ("u8", "s8", "u4", "s4")
ARITHMETICS = {
    repr(profile.arithmetic): (name, profile.arithmetic)
    for name, profile in PROFILES.items()
    if profile.arithmetic.levels == Arithmetic().levels  # what computes with levels has no codes
}
EACH_ARITHMETIC = pytest.mark.parametrize(
    "arithmetic", [a for _, a in ARITHMETICS.values()], ids=[name for name, _ in ARITHMETICS.values()]
)
POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["random", "pow2"])


# A network with a branch for each operator


class Branches:
    """Writes one branch after the other; every branch begins and ends with quantizers of its own."""

    def __init__(self, kind: str, pow2: bool, weights: str, seed: int = 0) -> None:
        self.net = Net(kind, pow2, seed, opset=21)
        self.kind, self.weights, self.step = kind, weights, 16 if kind[1] == "4" else 1
        self.outputs: list[str] = []

    def q(self, x: str, low: float = 0.03, **rest: Any) -> str:
        return self.net.qdq(x, self.net.scale(None, low * self.step, 3 * low * self.step), **rest)

    def end(self, y: str, low: float = 0.03) -> None:
        self.outputs.append(self.q(y, low))

    def input(self, *shape: int | str) -> str:
        """Its default grid has an odd zero point."""
        return self.q(self.net.input(*shape, name=f"in{len(self.net.inputs)}"))

    def narrow(self, x: str) -> str:
        """A quantizer with a Clip of its codes, which leaves out the lowest one or a bit."""
        net, kind = self.net, TYPES[self.kind]
        low, high = {"s8": (-127, 127), "u8": (0, 127), "s4": (-7, 7), "u4": (0, 7)}[self.kind]
        s, z = net.constant(net.scale(None, 0.03 * self.step, 0.09 * self.step)), net.constant(3, kind)
        codes = net.node("QuantizeLinear", x, s, z)
        return net.node(
            "DequantizeLinear", net.node("Clip", codes, net.constant(low, kind), net.constant(high, kind)), s, z
        )

    def w(self, *shape: int, axis: int | None = 0, **rest: Any) -> str:
        return self.net.weights(shape, axis, **{"kind": self.weights, **rest})

    def convolutions(self) -> None:
        net, plain = self.net, self.input("N", 4, 9, 8)
        wide = 0.1 if self.weights == "s8" else 0.02
        for axis, attributes in (
            (0, {"pads": [1, 0, 2, 1]}),
            (None, {"strides": [2, 1], "pads": [0, 1, 0, 0]}),
            (0, {"group": 2, "strides": [2, 2], "dilations": [2, 1]}),
            (0, {"group": 4, "pads": [1, 1, 0, 2]}),
            (0, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
        ):
            w = self.w(12, 4 // int(str(attributes.get("group", 1))), 3, 2, axis=axis)
            self.end(net.node("Conv", plain, w, net.bias(plain, w, 12), **attributes), wide)
        w = self.w(5, 4, 1, 1)
        self.end(net.node("Relu", net.node("Conv", plain, w)), wide)
        clip = net.constant(np.float32(-0.7)), net.constant(np.float32(3))
        floats = net.constant(np.linspace(-2, 2, 5).astype(np.float32))
        self.end(net.node("Clip", net.node("Conv", plain, w, floats), *clip), wide)
        self.end(net.node("Conv", self.narrow(net.input("N", 4, 5, 5, name="narrow")), self.w(3, 4, 2, 2)), wide)
        limited = self.narrow(net.node("Conv", plain, w))
        self.outputs.append(limited)
        unsigned = self.w(3, 4, 2, 2, kind="u8", zero_point=101)
        self.end(net.node("Conv", plain, unsigned), 0.3)
        self.end(net.node("Conv", self.input("N", 4, 9), self.w(6, 2, 3), group=2, pads=[2, 1]), wide)
        volume = self.input("N", 2, 4, 5, 3)
        self.end(net.node("Conv", volume, self.w(3, 2, 2, 3, 2), strides=[1, 2, 1], pads=[1, 0, 1, 0, 2, 0]), wide)
        for axis in (1, None):
            t = self.w(4, 3, 3, 2, axis=axis)
            y = net.node("ConvTranspose", plain, t, group=2, strides=[2, 1], pads=[1, 0, 0, 1], output_padding=[1, 0])
            self.end(y, wide)

    def matrices(self) -> None:
        net, x = self.net, self.input("N", 3, 20)
        wide = 0.1 if self.weights == "s8" else 0.02
        rows = self.input("N", 20)
        for trans, axis in ((0, 1), (1, 0), (1, None)):
            w = self.w(*((7, 20) if trans else (20, 7)), axis=axis)
            self.end(net.node("Gemm", rows, w, net.bias(rows, w, 7), transB=trans), wide)
        for axis in (1, None):
            w = self.w(20, 11, axis=axis)
            self.end(net.node("MatMul", x, w), wide)
        self.end(net.node("Relu", net.node("Add", net.bias(x, w, 11), net.node("MatMul", x, w))), wide)
        self.end(net.node("MatMul", self.input("N", 2, 3, 20), self.w(2, 20, 5, axis=None)), wide)
        self.end(net.node("MatMul", self.input("N", 2, 5, 9), self.input("N", 2, 9, 4)), 1)
        self.end(net.node("MatMul", self.input("N", 3, 5, 9), self.input(9, 4)), 1)

    def pairs(self) -> None:
        net, a = self.net, self.input("N", 3, 6, 5)
        others = [self.input("N", 3, 6, 5), self.input(3, 1, 1), self.input("N", 1, 6, 1), self.input(1)]
        for op in ("Add", "Sub", "Mul"):
            for b in others:
                self.end(net.node(op, a, b))
        self.end(net.node("Add", others[1], a))
        self.end(net.node("Relu", net.node("Add", a, others[0])))
        self.end(net.node("Add", self.narrow(net.input("N", 3, 6, 5, name="narrow pair")), a))
        self.end(net.node("Add", a, self.q(net.constant(net.rng.normal(0, 2, (3, 1, 5)).astype(np.float32)))))
        self.end(net.node("Mul", a, net.constant(np.float32(0.7))))
        self.end(net.node("Add", a, a))
        self.end(net.node("Concat", a, others[0], axis=-3))

    def activations(self) -> None:
        net, x = self.net, self.input("N", 4, 7)
        for op, attributes in (
            ("LeakyRelu", {"alpha": 0.13}),
            ("HardSwish", {}),
            ("Sigmoid", {}),
            ("Softmax", {"axis": -1}),
            ("Softmax", {"axis": 1}),
        ):
            low = 0.03 if op in ("LeakyRelu", "HardSwish") else 0.004
            self.end(net.node(op, x, **attributes), low)
        slope = self.q(net.constant(net.rng.uniform(-0.5, 0.5, (4, 1)).astype(np.float32)), 0.003)
        self.end(net.node("PRelu", x, slope))
        self.end(net.node("Clip", x, net.constant(np.float32(-1)), net.constant(np.float32(0.5))))
        self.end(net.node("Tanh", self.narrow(net.input("N", 4, 7, name="narrow function"))), 0.01)

    def averages(self) -> None:
        net, x = self.net, self.input("N", 18, 8, 7)
        for attributes in (
            {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]},
            {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0], "count_include_pad": 1},
            {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1},
        ):
            self.end(net.node("AveragePool", x, **attributes))
        self.end(net.node("GlobalAveragePool", x), 0.005)
        self.end(net.node("Relu", net.node("ReduceMean", x, net.constant(np.array([-1])), keepdims=0)), 0.01)
        self.end(net.node("MaxPool", x, kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]))

    def moves(self) -> None:
        net, x = self.net, self.input("N", 4, 6, 2)

        def integers(*values: int) -> str:
            return net.constant(np.array(values, np.int64))

        self.end(net.node("Relu", x))
        self.end(net.node("Identity", x))
        self.end(net.node("Dropout", x))
        self.end(net.node("Reshape", x, integers(0, -1, 3)))
        self.end(net.node("Flatten", x, axis=-2))
        self.end(net.node("Transpose", x, perm=[0, 3, 1, 2]))
        self.end(net.node("Squeeze", net.node("Unsqueeze", x, integers(1, -1)), integers(-1)))
        self.end(net.node("Slice", x, integers(3, 0), integers(0, 5), integers(1, 2), integers(-1, 2)))
        self.end(net.node("Pad", x, integers(0, 1, 0, 0, 0, 0, 2, 1)))
        self.end(net.node("Gather", x, integers(2, 0, 2), axis=1))
        self.end(net.node("Tile", x, integers(1, 1, 2, 1)))
        self.end(net.node("Expand", net.node("Unsqueeze", x, integers(1)), integers(1, 3, 1, 1, 1)))
        split = [f"{net.name()}_{i}" for i in range(2)]
        net.nodes.append(helper.make_node("Split", [x], split, name="split", axis=1, num_outputs=2))
        for part in split:
            self.end(part)
        self.outputs.append(self.q(self.q(x, 0.05), 0.02))

    def runtime_moves(self) -> None:
        """What ONNX Runtime moves for 8-bit codes alone."""
        net, x = self.net, self.input("N", 4, 6, 2)
        self.end(net.node("DepthToSpace", x, blocksize=2))
        self.end(net.node("SpaceToDepth", x, blocksize=2))
        self.end(net.node("Resize", x, "", net.constant(np.array([1, 1, 2, 3], np.float32)), mode="nearest"))
        at = net.constant(net.rng.integers(0, 4, (1, 2, 6, 2)))
        self.end(net.node("GatherElements", self.input(1, 4, 6, 2), at, axis=1))
        self.end(net.node("GatherND", x, net.constant(np.array([[0, 3], [1, 2]], np.int64))))

    def model(self) -> ModelProto:
        return self.net.output(*self.outputs)


GROUPS = ("convolutions", "matrices", "pairs", "activations", "averages", "moves", "runtime_moves")


@functools.cache
def branches(kind: str, pow2: bool, weights: str, groups: tuple[str, ...] = GROUPS, seed: int = 0) -> ModelProto:
    writer = Branches(kind, pow2, weights, seed)
    for group in groups:
        getattr(writer, group)()
    return writer.model()


def both(model: ModelProto, arithmetic: Arithmetic = ORT) -> tuple[Program, Program]:
    """The fast program and the definition, which say the same of every node but how it is implemented."""
    programs = load_program(model, arithmetic), load_program(model, arithmetic, reference=True)
    quick, slow = ([replace(info, implementation="") for info in program.nodes] for program in programs)
    assert quick == slow
    return programs


def same_codes(programs: tuple[Program, Program], inputs: Mapping[str, Array]) -> Mapping[str, Codes]:
    """The codes of every tensor, which both programs agree on."""
    quick, slow = (program.run_codes(inputs, tuple(program.tensors)) for program in programs)
    assert quick.codes.keys() == slow.codes.keys()
    for name, entry in slow.codes.items():
        np.testing.assert_array_equal(quick.codes[name].codes, entry.codes, err_msg=name)
    assert quick.overflows == slow.overflows
    for name, value in slow.outputs.items():
        np.testing.assert_array_equal(quick.outputs[name], value)
    return slow.codes


@EACH_ARITHMETIC
@POW2
@pytest.mark.parametrize(("kind", "weights"), [("u8", "s8"), ("s8", "s8"), ("u8", "s4"), ("s4", "s4"), ("u4", "s8")])
def test_every_operator_gives_the_codes_of_the_definition(
    kind: str, weights: str, pow2: bool, arithmetic: Arithmetic
) -> None:
    groups = tuple(group for group in GROUPS if group != "runtime_moves" or kind[1] == "8")
    model = branches(kind, pow2, weights, groups)
    codes = same_codes(both(model, arithmetic), feed(model, 2))
    if kind[1] == "8":
        values = [entry.codes for name, entry in codes.items() if entry.codes.size > 12]
        assert np.mean([len(np.unique(value)) > 6 for value in values]) > 0.95  # not merely saturated


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["u8", "s8"])
def test_other_random_networks(kind: str, seed: int) -> None:
    for arithmetic in (Arithmetic(), PROFILES["tflite_ref"].arithmetic, PROFILES["tosa_int"].arithmetic):
        model = branches(kind, bool(seed % 2), "s8", ("convolutions", "matrices", "pairs"), 7 + seed)
        same_codes(both(model, arithmetic), feed(model, 3, seed))


def test_each_builder_is_in_the_network() -> None:
    ran = {info.op_type for info in load_program(branches("u8", True, "s8")).nodes}
    float_here = {"Softmax"}  # of ONNX Runtime; other back ends have it
    assert {*nodes._BUILDERS, *move_nodes.MOVES} <= ran | float_here
    softmax_node = load_program(branches("u8", True, "s8", ("activations",)), Arithmetic(softmax="tflite"))
    assert "Softmax" in {info.op_type for info in softmax_node.integer_nodes}


@X86
def test_each_implementation_is_in_the_network() -> None:
    model, ran = branches("s8", True, "s8"), set()
    for arithmetic in (Arithmetic(), PROFILES["tflite_ref"].arithmetic):
        ran |= {info.implementation for info in load_program(model, arithmetic).integer_nodes}
    names = ("QLinearConv", "QGemm", "QLinearAdd", "ConvInteger", "MatMulInteger")
    assert {f"ONNX Runtime {name}" for name in names} <= ran
    assert {"table of pairs of codes", "table of codes", "float32"} <= ran


@EACH_ARITHMETIC
def test_16_bit_activations(arithmetic: Arithmetic) -> None:
    net = Net("s8", False, opset=21)
    z = net.constant(np.int16(0))

    def q(x: str, scale: float) -> str:
        s = net.constant(np.float32(scale))
        return net.node("DequantizeLinear", net.node("QuantizeLinear", x, s, z), s, z)

    x, rows = q(net.input("N", 4, 6, 5), 0.0003), q(net.input("N", 9, name="rows"), 0.0003)
    outputs = [
        q(net.node("Conv", x, net.weights((6, 4, 3, 2), 0), pads=[1, 0, 0, 1]), 0.0007),
        q(net.node("Relu", net.node("Gemm", rows, net.weights((9, 7), 1))), 0.0005),
        q(net.node("Add", x, q(net.input("N", 4, 1, 5, name="other"), 0.0004)), 0.0005),
        q(net.node("Sigmoid", x), 2.0**-15),
        q(net.node("MaxPool", x, kernel_shape=[2, 2]), 0.0004),
    ]
    model = net.output(*outputs)
    codes = same_codes(both(model, arithmetic), feed(model, 6))
    assert all(len(np.unique(codes[name].codes)) > 12 for name in outputs if name in codes)
    assert {outputs[2], outputs[4]} <= codes.keys()


# Parts of the fast engine


@pytest.mark.parametrize("grid", [Grid(8, True), Grid(8, False), Grid(4, True), Grid(7, True, narrow=True)])
def test_signed_codes_are_moved_to_unsigned_ones_and_back(grid: Grid) -> None:
    params = grid_params(0.1, 3, grid)
    codes = tables.every_code(params).astype(storage(grid))
    moved = fast.unsigned(codes)
    assert moved.dtype == np.uint8
    np.testing.assert_array_equal(moved, codes.astype(np.int32) + fast.offset(params))
    back = fast.restored(moved, params)
    assert back.dtype == codes.dtype
    np.testing.assert_array_equal(back, codes)
    np.testing.assert_array_equal(fast.unsigned(codes[::2]), moved[::2])  # not contiguous


def grid_params(scale: float, zero_point: int, grid: Grid) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), grid)


@pytest.mark.parametrize("target", [Grid(8, True), Grid(8, False), Grid(16, True), Grid(4, False)])
@pytest.mark.parametrize(
    "source", [Grid(8, True), Grid(8, False), Grid(8, True, True), Grid(4, True), Grid(4, False), Grid(16, True)]
)
def test_a_table_has_an_entry_for_every_code_of_the_storage(source: Grid, target: Grid) -> None:
    a, b = grid_params(0.1, 1, source), grid_params(0.2, 3, target)
    rng = np.random.default_rng(0)
    table = rng.integers(target.qmin, target.qmax + 1, source.qmax - source.qmin + 1)
    limits = np.iinfo(storage(source))
    codes = np.arange(limits.min, limits.max + 1, dtype=np.int64)
    found = fast.lookup(table, a, b)(codes.astype(storage(source)).reshape(4, -1)[:, ::3])
    assert found.dtype == storage(target)
    expected = table[np.clip(codes, source.qmin, source.qmax) - source.qmin].reshape(4, -1)[:, ::3]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shapes", [((2, 3, 4), (2, 3, 4)), ((2, 3, 4), (3, 1)), ((1,), (2, 5)), ((), (4,))])
def test_a_table_of_pairs_broadcasts(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    rng = np.random.default_rng(1)
    a, b = grid_params(0.1, 1, Grid(8, True)), grid_params(0.1, 3, Grid(4, False))
    kernel: Callable[[Array, Array], Array] = lambda x, y: (3 * x + 7 * y) % 200  # noqa: E731
    x = rng.integers(-128, 128, shapes[0]).astype(np.int8)
    y = rng.integers(0, 16, shapes[1]).astype(np.uint8)
    found = fast.pairs(kernel, a, b, grid_params(1, 0, Grid(8, False)))(x, y)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, kernel(x.astype(np.int32), y.astype(np.int32)))


# The guess of the requantizer

GUESSED = fast._GUESSED
UNIT = np.array(1, np.float32)


def tie_accumulators(how: Requantization, span: int = 100) -> Array:
    """(channels, values): the integers at and next to `(k + 1/2) / M`, for the exact M and for the one of the rule."""
    rows = []
    for real, effective in zip(
        np.atleast_1d(how.multiplier).tolist(),
        np.atleast_1d(requantize.effective_multiplier(how)).tolist(),
        strict=True,
    ):
        near = set(range(-4, 5))
        for m in (Fraction(real), Fraction(effective)):
            if m:
                near |= {
                    math.floor((k + Fraction(1, 2)) / m) + i for k in range(-span, span, 3) for i in (-2, -1, 0, 1, 2)
                }
        rows.append(sorted(acc for acc in near if abs(acc) < 1 << 31)[: 12 * span])
    least = min(map(len, rows))
    return np.array([row[:: max(1, len(row) // least)][:least] for row in rows], np.int64)


def guessed_cases(rule: str) -> list[Requantization]:
    """Random multipliers of all sizes where a guess is worth it, and powers of two; per tensor and per channel."""
    rng = np.random.default_rng(5)
    cases = []
    for grid in (Grid(8, True), Grid(8, False), Grid(4, True)):
        target = grid_params(1.0, 3, grid)
        shifts = 2.0 ** -rng.integers(7, 18, 9)
        scales = [shifts]
        if rule != "shift_up":
            scales += [
                shifts * rng.uniform(0.6, 1, 9),
                np.exp2(-rng.uniform(6, 15, 9)),
                np.exp2(-rng.uniform(16, 23, 9)),
            ]
        for weight in scales:
            parts = weight.astype(np.float32)
            cases.append(requantization(rule, UNIT, parts, target))
            cases += [requantization(rule, UNIT, np.asarray(one), target) for one in parts[:3]]
    return cases


def guessed_and_exact(how: Requantization) -> tuple[Array, Array]:
    acc = tie_accumulators(how)[:, :, None]
    rng = np.random.default_rng(6)
    drawn = rng.integers(-(1 << 31), 1 << 31, (acc.shape[0], 50, 1))
    batch = np.stack([np.concatenate([acc, drawn], 1)] * 2)  # (2, channels, values, 1)
    grid, z = how.target.grid, int(how.target.zero_point)
    steps = fast.requantizer(how, 1)(batch.astype(np.int32))
    return np.clip(steps + z, grid.qmin, grid.qmax), requantize.requantize(batch, how.spread(1, 4))


@pytest.mark.parametrize("rule", GUESSED)
def test_a_guess_next_to_a_tie_is_the_rule(rule: str) -> None:
    for how in guessed_cases(rule):
        found, expected = guessed_and_exact(how)
        np.testing.assert_array_equal(found, expected)
        assert len(np.unique(expected)) > 10


# Products with a power of two, or of 24-bit and 15-bit integers, are rounded once: they are on the right side of a tie.
MARGIN_MATTERS = [rule for rule in GUESSED if rule not in ("shift_up", "fixed16_away")]


@pytest.mark.parametrize("rule", MARGIN_MATTERS)
def test_a_guess_with_a_wrong_margin_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_ERRORS", -1.0)
    results = [guessed_and_exact(how) for how in guessed_cases(rule)]
    assert any(np.any(found != expected) for found, expected in results)


@pytest.mark.parametrize("rule", GUESSED)
def test_a_guess_that_stands_on_a_tie_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "rounded", lambda acc, how: np.rint(acc * requantize.effective_multiplier(how)))
    results = [guessed_and_exact(how) for how in guessed_cases(rule)]
    assert any(np.any(found != expected) for found, expected in results)


@pytest.mark.parametrize("rule", ["gemmlowp_double", "ruy_double"])
def test_a_guess_without_the_second_rounding_in_its_margin_is_noticed(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast, "_DOUBLE", ())
    results = [guessed_and_exact(how) for how in guessed_cases(rule)]
    assert any(np.any(found != expected) for found, expected in results)


@pytest.mark.parametrize("rule", [rule for rule in requantize.RULES if rule != "shift_up"])
def test_where_no_guess_is_worth_it_the_rule_itself_runs(rule: str) -> None:
    channels = np.array([0.7, 0.3, 1.9, 0.011, 0.5], np.float32)
    for target in (grid_params(1.0, 3, Grid(8, True)), grid_params(1.0, 3, Grid(16, True))):
        how = requantization(rule, UNIT, channels, target)
        acc = np.random.default_rng(7).integers(-3000, 3000, (2, 5, 40))
        steps = fast.requantizer(how, 1)(acc)
        np.testing.assert_array_equal(steps, requantize.rounded(acc, how.spread(1, 3)))


# Every kernel off by one LSB


def plus_one(right: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel whose arrays, or the arrays of the function that it returns, are one too high."""

    def moved(value: Any) -> Any:
        if callable(value):
            return plus_one(value)
        if isinstance(value, tuple):
            return (moved(value[0]), *value[1:])
        return value + np.asarray(1, np.asarray(value).dtype)

    return lambda *args, **rest: moved(right(*args, **rest))


Oracle = Callable[[ModelProto, Mapping[str, Array], Mapping[str, Codes], Sequence[Codes], QParams], Array | None]


@dataclass(frozen=True)
class Mutant:
    """A kernel, where it is looked up, a network that uses it, and the codes of that network by other means.

    Attributes:
        build: a node between quantizers; returns its output.
        places: modules (attribute) or tables (key) that hold the kernel under `name`.
        name: of the kernel there.
        oracle: the right codes of the output; None: the definition and the fast engine share no code here.
        arithmetic: under which it runs.
        wrong: the kernel that is wrong.
    """

    build: Callable[[Branches], str]
    places: tuple[Any, ...]
    name: str
    oracle: Oracle | None = None
    arithmetic: dict[str, Any] = field(default_factory=dict)
    wrong: Callable[[Callable[..., Any]], Callable[..., Any]] = plus_one
    kind: str = "s8"


def noticed(mutant: Mutant) -> bool:
    """Whether the definition differs from the independent codes, or the fast engine from the definition."""
    writer = Branches(mutant.kind, True, "s8", 3)
    model = writer.net.output(mutant.build(writer))
    arithmetic = Arithmetic(**mutant.arithmetic)
    inputs, output = feed(model, 2), model.graph.output[0].name
    quick, slow = (load_program(model, arithmetic, reference=reference) for reference in (False, True))
    assert not slow.float_nodes
    expected = slow.run_codes(inputs, tuple(slow.tensors)).codes
    found = quick.run_codes(inputs, tuple(quick.tensors)).codes
    if any(np.any(found[name].codes != entry.codes) for name, entry in expected.items()):
        return True
    if mutant.oracle is None:
        return False
    by_codes = {slow.tensors[name].codes: entry for name, entry in expected.items()}
    (step,) = (step for step in slow.steps if slow.tensors[output].codes in step.outputs)
    operands = [by_codes[name] for name in step.inputs if name in by_codes]
    exact = mutant.oracle(model, inputs, expected, operands, expected[output].params)
    return bool(np.any(exact != expected[output].codes))


# Independent codes


def by_runtime(model: ModelProto, inputs: Mapping[str, Array], _: Any, __: Any, target: QParams) -> Array:
    """ONNX Runtime, every node in float as the file says."""
    (real,), _ran = onnx_runtime(model, inputs, optimize=False)
    return np.asarray(np.rint(real / target.scale).astype(np.int64) + target.zero_point)


def clipped(steps: Any, target: QParams) -> Array:
    limited: Array = np.clip(np.array(steps, object), target.grid.qmin, target.grid.qmax).astype(np.int64)
    return limited


def of_pairs(function: Callable[..., int], rule: str) -> Oracle:
    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        a, b = np.broadcast_arrays(*(entry.codes for entry in operands))
        params = [*(entry.params for entry in operands), target]
        codes = [function(rule, int(x), int(y), params) for x, y in zip(a.ravel(), b.ravel(), strict=True)]
        return clipped(codes, target).reshape(a.shape)

    return oracle


def of_each(function: Callable[[int, list[QParams]], int]) -> Oracle:
    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        codes = [function(int(code), [x.params, target]) for code in x.codes.ravel()]
        return clipped(codes, target).reshape(x.codes.shape)

    return oracle


def of_windows(rule: str) -> Oracle:
    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        params = [x.params, target]
        windows_of = exact_kernels.window_elements(x.codes, exact_kernels.WINDOW)
        codes = [exact_kernels.averaged(rule, under, False, params) for under in windows_of]
        shape = [(x.codes.shape[2] + 1 + 1 - 3) + 1, (x.codes.shape[3] + 1 - 2) // 2 + 1]
        return clipped(codes, target).reshape(*x.codes.shape[:2], *shape)

    return oracle


def of_means(rule: str) -> Oracle:
    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        batch, channels = x.codes.shape[:2]
        rows = x.codes.reshape(batch * channels, -1).tolist()
        params = [x.params, target]
        codes = [exact_kernels.meant(rule, row, params, (i % channels, channels)) for i, row in enumerate(rows)]
        return clipped(codes, target).reshape(batch, channels, 1, 1)

    return oracle


def of_rows(function: Callable[[list[int], Fraction], list[int]]) -> Oracle:
    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        scale = Fraction(float(x.params.scale))
        rows = x.codes.reshape(-1, x.codes.shape[-1]).tolist()
        return clipped([function(row, scale) for row in rows], target).reshape(x.codes.shape)

    return oracle


def constants_of(model: ModelProto, node_type: str) -> tuple[Array, Array]:
    """Codes and scale of the weights of the one node of a type."""
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == node_type)
    (dq,) = (other for other in model.graph.node if other.output[0] == node.input[1])
    return constants[dq.input[0]].astype(np.int64), constants[dq.input[1]]


def of_products(rule: str, register: Callable[[int], int] = int) -> Oracle:
    """A matrix product in Python integers, its codes by the rule of `test_requantize`."""

    def oracle(model: ModelProto, _: Any, __: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        w, scale = constants_of(model, "Gemm")
        acc = (x.codes.astype(object) - int(x.params.zero_point)) @ w.astype(object)
        return steps_of(rule, np.vectorize(register, otypes=[object])(acc), (x.params, scale), target)

    return oracle


def steps_of(rule: str, acc: Array, scales: tuple[QParams, Array], target: QParams) -> Array:
    """Codes of accumulators whose channels are the last axis."""
    x, weight = scales
    channels = acc.shape[-1]
    weights = np.broadcast_to(weight, channels).tolist()
    source, scale, zero = Fraction(float(x.scale)), Fraction(float(target.scale)), int(target.zero_point)
    parts = [Scales(source, Fraction(w), scale, zero, target.grid, None, i, channels) for i, w in enumerate(weights)]
    rows = acc.reshape(-1, channels).tolist()
    steps = [[EXACT[rule](int(value), part) + zero for value, part in zip(row, parts, strict=True)] for row in rows]
    return clipped(steps, target).reshape(acc.shape)


def saturated16(value: int) -> int:
    return min(max(value, -(2**15)), 2**15 - 1)


def of_saturated_pairs(model: ModelProto, _: Any, __: Any, operands: Sequence[Codes], target: QParams) -> Array:
    """A matrix product or a 1 x 1 convolution whose pairs of products saturate at 16 bits, in Python integers."""
    (x,) = operands
    node_type = next(node.op_type for node in model.graph.node if node.op_type in ("Conv", "Gemm"))
    w, scale = constants_of(model, node_type)
    codes, matrix = (x.codes, w) if node_type == "Gemm" else (np.moveaxis(x.codes, 1, -1), w[:, :, 0, 0].T)
    raw = codes.astype(object) + (128 if x.params.grid.signed else 0)
    zero = int(x.params.zero_point) + (128 if x.params.grid.signed else 0)
    rows = raw.reshape(-1, raw.shape[-1]).tolist()
    columns = matrix.T.tolist()
    acc = [
        [
            sum(
                saturated16(sum(u * v for u, v in zip(row[k : k + 2], column[k : k + 2], strict=True)))
                for k in range(0, len(row), 2)
            )
            - zero * sum(column)
            for column in columns
        ]
        for row in rows
    ]
    found = steps_of("float32_even", np.array(acc, object).reshape(*raw.shape[:-1], -1), (x.params, scale), target)
    return found if node_type == "Gemm" else np.moveaxis(found, -1, 1)


# The networks: a step of an accumulator is a good part of a step of the codes


def gemm(b: Branches, scale: float | None = None, fill: int | None = None) -> str:
    x = b.net.qdq(b.net.input("N", 16), 0.25, 3)
    w = b.net.weights((16, 11), 1, "s4", fill=fill)
    s = 0.25 * float(np.median(b.net.scale_of(w))) * 2
    return b.net.qdq(b.net.node("Gemm", x, w), s if scale is None else scale, 5)


def conv(b: Branches, op: str = "Conv", kind: str = "s4", gain: float = 1, **rest: Any) -> str:
    x = b.net.qdq(b.net.input("N", 2, 5, 4), 0.25, 3)
    axis = None if op == "ConvTranspose" else 0
    w = b.net.weights((2, 5, 2, 1) if axis is None else (5, 2, 2, 1), axis, kind, **rest)
    return b.net.qdq(b.net.node(op, x, w), gain * 0.25 * float(np.median(b.net.scale_of(w))), 5)


def strong(b: Branches, op: str) -> str:
    """Weights and codes so large that pairs of products saturate."""
    conv_like = op == "Conv"
    x = b.net.qdq(b.net.input(*(("N", 5, 3, 3) if conv_like else ("N", 5))), 0.05, 3)
    w = b.net.weights((3, 5, 1, 1) if conv_like else (5, 3), None)
    return b.net.qdq(b.net.node(op, x, w), 0.05 * float(b.net.scale_of(w)) * 256, 5)


def two(b: Branches, op: str) -> str:
    a, other = (
        b.net.qdq(b.net.input("N", 3, 7, name=name), s, z) for name, s, z in (("a", 0.0625, 3), ("b", 0.125, -5))
    )
    return b.net.qdq(b.net.node(op, a, other), 0.125, 7)


def products_of_two(b: Branches) -> str:
    x, y = b.net.qdq(b.net.input("N", 3, 4, name="a"), 0.25, 3), b.net.qdq(b.net.input("N", 4, 5, name="b"), 0.25, -5)
    return b.net.qdq(b.net.node("MatMul", x, y), 0.25, 1)


def one(b: Branches, op: str, *constants: Any, scale: float = 0.125, source: float = 0.0625, **attributes: Any) -> str:
    x = b.net.qdq(b.net.input("N", 18, 5, 7), source, 3)
    inputs = [b.net.constant(value) for value in constants]
    return b.net.qdq(b.net.node(op, x, *inputs, **attributes), scale, 7)


def average(b: Branches) -> str:
    x = b.net.qdq(b.net.input("N", 3, 5, 7), 0.0625, 3)
    y = b.net.node("AveragePool", x, kernel_shape=[3, 2], strides=[1, 2], pads=[1, 0, 1, 1])
    return b.net.qdq(y, 0.0625, 3)


def prelu(b: Branches) -> str:
    x = b.net.qdq(b.net.input("N", 3, 7), 0.0625, 3)
    slope = b.net.qdq(b.net.constant(np.array([[-0.4], [0.3], [0.9]], np.float32)), 0.01, 1)
    return b.net.qdq(b.net.node("PRelu", x, slope), 0.125, 7)


def of_slopes(
    model: ModelProto, _: Any, tensors: Mapping[str, Codes], operands: Sequence[Codes], target: QParams
) -> Array:
    (x,) = operands
    slopes = np.clip(
        np.rint(np.array([[-0.4], [0.3], [0.9]], np.float32) / np.float32(0.01)).astype(int) + 1, -128, 127
    )
    s_in, s = (Fraction(float(p.scale)) for p in (x.params, target))
    z_in, z, f32, fixed = int(x.params.zero_point), int(target.zero_point), exact_kernels.f32, exact_kernels.fixed
    s_a = Fraction(float(np.float32(0.01)))
    above, below = fixed(f32(s_in / s)), fixed(f32(f32(s_in * s_a) / s))
    pairs = zip(x.codes.ravel(), np.broadcast_to(slopes, x.codes.shape).ravel(), strict=True)
    twice = exact_kernels.twice_rounded
    codes = [
        (twice(int(c) - z_in, above) if c >= z_in else twice((int(c) - z_in) * (int(a) - 1), below)) + z
        for c, a in pairs
    ]
    return clipped(codes, target).reshape(x.codes.shape)


def softened(b: Branches) -> str:
    return b.net.qdq(b.net.node("Softmax", b.net.qdq(b.net.input("N", 3, 9), 0.0625, 3), axis=-1), 2.0**-8, -128)


def regridded(b: Branches) -> str:
    return b.net.qdq(b.net.qdq(b.net.input("N", 60), 0.05, 3), 0.07, 9)


def unsigned_weights(b: Branches) -> str:
    return conv(b, kind="u8", gain=16, zero_point=51)


def wide_gemm(b: Branches) -> str:
    """Accumulators that a register of 16 bits does not hold."""
    x = b.net.qdq(b.net.input("N", 16), 0.02, 3)
    w = b.net.weights((16, 11), None)
    return b.net.qdq(b.net.node("Gemm", x, w), 0.02 * float(b.net.scale_of(w)) * 300, 5)


def wrapped16(value: int) -> int:
    return (value + 2**15) % 2**16 - 2**15


def shrunk(right: Callable[..., Any]) -> Callable[..., Any]:
    """A geometry whose windows begin one element earlier."""
    return lambda *args: (tuple(begin + 1 for begin in right(*args)[0]), right(*args)[1])


def a_code_more(right: Callable[..., Any]) -> Callable[..., Any]:
    """Accumulators of `strong` that are higher by what makes one code."""
    return lambda *args: (right(*args)[0] + 256, right(*args)[1])


def a_code_more_later(right: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: a_code_more(right(*args))


def always(right: Callable[..., Any]) -> Callable[..., bool]:
    return lambda *args: True


def of_halves(rule: str) -> Oracle:
    """Entries of the table of `0.5 x`, which lie on ties."""
    f32 = exact_kernels.f32

    def entry(code: int, params: list[QParams]) -> int:
        (s_in, z_in), (s, z) = exact_kernels.numbers(params)
        real = (code - z_in) * s_in / 2
        if rule == "xnnpack":
            return round(f32(f32(real * f32(1 / s)) + z))
        rounded = {"even": exact_kernels.half_even, "up": exact_kernels.half_up}.get(rule, exact_kernels.half_away)
        return rounded(f32(real * f32(1 / s)) if rule == "tflite" else f32(real / s)) + z

    return of_each(entry)


def transferred(rule: str) -> Oracle:
    """Codes on another grid; of unsigned grids, for `affine`."""
    f32 = exact_kernels.f32

    def code_of(code: int, params: list[QParams]) -> int:
        (s_in, z_in), (s, z) = exact_kernels.numbers(params)
        real = f32((code - z_in) * s_in)
        if rule == "ort":
            return exact_kernels.half_even(f32(real / s)) + z
        if rule == "xnnpack":
            return exact_kernels.half_up(Fraction((code - z_in) * round(256 * f32(s_in / s)), 256)) + z
        grid = params[1].grid
        low, high = f32((grid.qmin - z) * s), f32((grid.qmax - z) * s)
        span, steps = f32(high - low), grid.qmax - grid.qmin
        shift = f32(f32(f32(-low * steps) / span) + grid.qmin)
        return round(f32(real * f32(steps / span) + shift))

    return of_each(code_of)


def resized(b: Branches) -> str:
    x, scales = b.net.qdq(b.net.input("N", 3, 4, 5), 0.0625, 3), b.net.constant(np.array([1, 1, 2, 2], np.float32))
    how = {"mode": "linear", "coordinate_transformation_mode": "asymmetric"}
    return b.net.qdq(b.net.node("Resize", x, "", scales, **how), 0.0625, 3)


def of_resized(rule: str) -> Oracle:
    """Twice the size: means of one, two or four codes, exact."""
    last = exact_kernels.half_up if rule == "xnnpack" else exact_kernels.half_away

    def oracle(_: Any, __: Any, tensors: Mapping[str, Codes], ___: Any, target: QParams) -> Array:
        x = next(entry.codes for entry in tensors.values() if entry.codes.shape[-1] == 5)
        found = np.zeros((*x.shape[:2], 8, 10), np.int64)
        for at in np.ndindex(*found.shape):
            rows, columns = ((i // 2, min((i + 1) // 2, n - 1)) for i, n in zip(at[2:], x.shape[2:], strict=True))
            found[at] = last(Fraction(sum(int(x[(*at[:2], i, j)]) for i in rows for j in columns), 4))
        return clipped(found, target)

    return oracle


def by_libm(name: str, x: np.float32) -> np.float32:
    one, half = np.float32(1), np.float32(0.5)
    if name == "Gelu":
        return half * x * np.float32(math.erfc(float(-x * np.float32(math.sqrt(0.5)))))
    return np.float32(math.tanh(float(x))) if name == "Tanh" else one / (one + np.float32(math.exp(float(-x))))


def of_function(name: str) -> Oracle:
    """Values of the C library, times the reciprocal of the scale, all float32."""

    def entry(code: int, params: list[QParams]) -> int:
        (s_in, z_in), (s, z) = exact_kernels.numbers(params)
        real = by_libm(name, np.float32(float((code - z_in) * s_in)))
        return exact_kernels.half_away(Fraction(float(real * np.float32(1 / float(s))))) + z

    return of_each(entry)


def called(b: Branches, name: str) -> str:
    return b.net.qdq(b.net.node(name, b.net.qdq(b.net.input("N", 60), 0.0625, 3)), 2.0**-7, 7)


def mean_of(rule: str) -> Oracle:
    if rule != "tosa":
        return of_means(rule)

    def oracle(_: Any, __: Any, ___: Any, operands: Sequence[Codes], target: QParams) -> Array:
        (x,) = operands
        count = x.codes.shape[2] * x.codes.shape[3]
        real = float(x.params.scale) * (1 / count) / float(target.scale)
        fixed = exact_kernels.fixed(Fraction(real))
        total = (x.codes.astype(np.int64) - int(x.params.zero_point)).sum((2, 3), keepdims=True)
        steps = [exact_kernels.once_rounded(int(t), fixed) + int(target.zero_point) for t in total.ravel()]
        return clipped(steps, target).reshape(total.shape)

    return oracle


def leaky_entry(rule: str, alpha: Fraction, code: int, params: list[QParams]) -> int:
    if rule != "tosa":
        return exact_kernels.leaked(rule, code, alpha, params)
    (s_in, z_in), (s, z) = exact_kernels.numbers(params)
    slope = Fraction(1) if code >= z_in else alpha
    real = float(s_in * slope) / float(s)  # the product of two float32 is exact
    return exact_kernels.once_rounded(code - z_in, exact_kernels.fixed(Fraction(real))) + z


def rule_mutants() -> dict[str, Mutant]:
    """One for each entry of each table of rules."""
    return {**sum_mutants(), **mean_mutants(), **activation_mutants(), **table_mutants()}


def sum_mutants() -> dict[str, Mutant]:
    mutants: dict[str, Mutant] = {}
    for rule in requantize.RULES:
        mutants[f"requantize {rule}"] = Mutant(gemm, (requantize._RULES,), rule, of_products(rule), {"product": rule})
    for op, rules, function, parameter in (
        ("Add", add.RULES, exact_kernels.added, "add"),
        ("Mul", multiply.RULES, exact_kernels.multiplied, "multiply"),
    ):
        for rule in rules:
            build: Callable[[Branches], str] = functools.partial(two, op=op)
            settings = {parameter: rule, "quantize": "away"}
            mutants[f"{parameter} {rule}"] = Mutant(build, (rules,), rule, of_pairs(function, rule), settings)
    return mutants


def mean_mutants() -> dict[str, Mutant]:
    mutants: dict[str, Mutant] = {}
    for rule in pooling.AVERAGE_RULES:
        settings = {"average": rule, "quantize": "away"}
        mutants[f"average {rule}"] = Mutant(average, (pooling.AVERAGE_RULES,), rule, of_windows(rule), settings)
    for rule in pooling.MEAN_RULES:
        mutants[f"mean {rule}"] = Mutant(
            lambda b: one(b, "GlobalAveragePool", scale=0.03125),
            (pooling.MEAN_RULES,),
            rule,
            mean_of(rule),
            {"mean": rule, "quantize": "away"},
        )
    return mutants


def activation_mutants() -> dict[str, Mutant]:
    mutants: dict[str, Mutant] = {}
    alpha = Fraction(float(np.float32(0.3)))
    for rule in leaky.RULES:
        oracle = of_each(functools.partial(leaky_entry, rule, alpha))
        build: Callable[[Branches], str] = functools.partial(one, op="LeakyRelu", alpha=0.3)
        mutants[f"leaky {rule}"] = Mutant(build, (leaky.RULES,), rule, oracle, {"leaky": rule})
    for rule in leaky.PRELU_RULES:
        mutants[f"prelu {rule}"] = Mutant(prelu, (leaky.PRELU_RULES,), rule, of_slopes, {"leaky": rule})
    rows = {"tflite": exact_kernels.softmax_fixed, "ruy": exact_kernels.softmax_float}
    for rule in softmax.RULES:
        mutants[f"softmax {rule}"] = Mutant(softened, (softmax.RULES,), rule, of_rows(rows[rule]), {"softmax": rule})
    return mutants


def table_mutants() -> dict[str, Mutant]:
    mutants: dict[str, Mutant] = {}
    for rule in tables.TRANSFER_RULES:
        settings = {"transfer": rule}
        mutants[f"transfer {rule}"] = Mutant(
            regridded, (tables.TRANSFER_RULES,), rule, transferred(rule), settings, kind="u8"
        )
    for rule in tables.TABLE_RULES:
        mutants[f"table {rule}"] = Mutant(
            lambda b: one(b, "Mul", np.float32(0.5)), (tables.TABLE_RULES,), rule, of_halves(rule), {"table": rule}
        )
    for name in tables.FUNCTIONS:
        call: Callable[[Branches], str] = functools.partial(called, name=name)
        mutants[f"function {name}"] = Mutant(call, (tables.FUNCTIONS,), name, of_function(name), {"table": "tflite"})
    for rule in resize.BILINEAR_RULES:
        settings = {"resize": rule}
        mutants[f"resize {rule}"] = Mutant(resized, (resize.BILINEAR_RULES,), rule, of_resized(rule), settings)
    return mutants


TFLITE = {"product": "gemmlowp_double"}
PAIRED = {"accumulator": Accumulator(32, "wrap", 16)}
KERNELS: Mapping[str, Mutant] = {
    "products.conv": Mutant(conv, (products,), "conv"),
    "products.conv_transpose": Mutant(lambda b: conv(b, "ConvTranspose"), (products,), "conv_transpose"),
    "products.matmul": Mutant(products_of_two, (products,), "matmul"),
    "products.accumulator": Mutant(gemm, (products,), "accumulator"),
    "products.exact_parts": Mutant(
        unsigned_weights,
        (products,),
        "exact_parts",
        wrong=lambda right: lambda *args: tuple((factor, part + 1) for factor, part in right(*args)),
    ),
    "products.saturating_conv": Mutant(
        lambda b: strong(b, "Conv"), (products,), "saturating_conv", of_saturated_pairs, PAIRED, a_code_more
    ),
    "products.saturating_matmul": Mutant(
        lambda b: strong(b, "Gemm"), (products,), "saturating_matmul", of_saturated_pairs, PAIRED, a_code_more
    ),
    "products.accumulate_within": Mutant(
        wide_gemm,
        (products,),
        "accumulate_within",
        of_products("float32_even", wrapped16),
        {"accumulator": Accumulator(16, "wrap")},
        lambda right: lambda acc, bits, overflow: right(acc, bits + 1, overflow),
    ),
    "products.in_blocks": Mutant(
        gemm, (product_nodes,), "in_blocks", of_products("float64_away"), {"product": "float64_away"}
    ),
    "pooling.max_pool": Mutant(lambda b: one(b, "MaxPool", kernel_shape=[2, 3]), (pooling,), "max_pool", by_runtime),
    "pooling.dpu_fraction": Mutant(average, (pooling,), "dpu_fraction", of_windows("dpu"), {"average": "dpu"}),
    "windows.place": Mutant(
        lambda b: one(b, "MaxPool", kernel_shape=[2, 3], pads=[0, 1, 1, 0]),
        (windows,),
        "place",
        by_runtime,
        wrong=shrunk,
    ),
    "windows.taps": Mutant(
        lambda b: one(b, "MaxPool", kernel_shape=[2, 3], pads=[0, 1, 1, 0]),
        (pooling,),
        "taps",
        by_runtime,
        wrong=lambda right: lambda *args: ((tap, view + 1) for tap, view in right(*args)),
    ),
    "windows.met": Mutant(
        conv,
        (windows,),
        "met",
        wrong=lambda right: lambda tap, window, sizes: right(tuple(0 for _ in tap), window, sizes),
    ),
    "moves.pad": Mutant(lambda b: one(b, "Pad", np.array([0, 1, 0, 2, 0, 0, 1, 1])), (moves,), "pad", by_runtime),
    "moves.slice_along": Mutant(
        lambda b: one(b, "Slice", np.array([1]), np.array([9]), np.array([1])), (moves,), "slice_along", by_runtime
    ),
    "moves.reshape": Mutant(lambda b: one(b, "Reshape", np.array([0, -1])), (moves,), "reshape", by_runtime),
    "hardswish.hard_swish": Mutant(
        lambda b: one(b, "HardSwish"),
        (hardswish,),
        "hard_swish",
        of_each(exact_kernels.hard_swish_fixed),
        {"hard_swish": "tflite"},
    ),
    "softmax.exp_of_negative": Mutant(
        softened,
        (softmax,),
        "exp_of_negative",
        of_rows(exact_kernels.softmax_fixed),
        {"softmax": "tflite"},
        lambda right: lambda values: right(values) + (1 << 24),  # its last bit is no LSB of the codes
    ),
    "add.apply_scale_32": Mutant(
        lambda b: two(b, "Add"), (add,), "apply_scale_32", of_pairs(exact_kernels.added, "tosa"), {"add": "tosa"}
    ),
    "tables.every_code": Mutant(lambda b: one(b, "Sigmoid", scale=2.0**-8), (tables,), "every_code", by_runtime),
    "tables.same_grid": Mutant(regridded, (tables,), "same_grid", by_runtime, wrong=always),
    "fast.operator": Mutant(conv, (fast,), "operator"),
    "fast.unsigned": Mutant(conv, (fast,), "unsigned"),
    "fast.restored": Mutant(conv, (fast,), "restored"),
    "fast.offset": Mutant(conv, (fast,), "offset"),
    "fast.conv_integer": Mutant(conv, (fast,), "conv_integer", arithmetic=TFLITE),
    "fast.matmul_integer": Mutant(gemm, (fast,), "matmul_integer", arithmetic=TFLITE),
    "fast.saturating_conv": Mutant(
        lambda b: strong(b, "Conv"), (fast,), "saturating_conv", of_saturated_pairs, PAIRED, a_code_more_later
    ),
    "fast.saturating_matmul": Mutant(
        lambda b: strong(b, "Gemm"), (fast,), "saturating_matmul", of_saturated_pairs, PAIRED, a_code_more_later
    ),
    "fast.matmul_codes": Mutant(products_of_two, (fast,), "matmul_codes"),
    "fast.qlinear_conv": Mutant(conv, (fast,), "qlinear_conv"),
    "fast.qgemm": Mutant(gemm, (fast,), "qgemm"),
    "fast.requantizer": Mutant(gemm, (fast,), "requantizer", arithmetic=TFLITE),
    "fast.lookup": Mutant(lambda b: one(b, "Sigmoid", scale=2.0**-8), (fast,), "lookup", by_runtime),
    "fast.pairs": Mutant(lambda b: two(b, "Mul"), (fast,), "pairs"),
    "fast.qlinear_add": Mutant(lambda b: two(b, "Add"), (fast,), "qlinear_add"),
    "fast.has_qlinear_add": Mutant(
        lambda b: two(b, "Add"), (fast,), "has_qlinear_add", arithmetic={"add": "xnnpack"}, wrong=always
    ),
}
NO_CODES = {
    "products.reach": "a bound; tested by name",
    "products.channel_sums": "a bound; tested by name",
    "products.accumulator_bound": "a bound; tested by name",
    "fast.has_qlinear": "says which widths have an operator; without it the operator fails",
}
MODULES = (add, fast, hardswish, leaky, moves, multiply, pooling, products, resize, softmax, tables, windows)
MUTANTS = {**rule_mutants(), **KERNELS}


def public_functions() -> set[str]:
    """The functions that modules of kernels define, but for those that stand in a table of rules."""
    rules = {
        id(f) for m in MODULES for n, t in vars(m).items() if n.endswith(("RULES", "FUNCTIONS")) for f in t.values()
    }
    return {
        f"{module.__name__.rsplit('.', 1)[1]}.{name}"
        for module in MODULES
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__ and not name.startswith("_") and id(function) not in rules
    }


def test_each_kernel_has_a_mutant() -> None:
    assert public_functions() == {*KERNELS, *NO_CODES}


TABLES = {
    "requantize": requantize._RULES,
    "add": add.RULES,
    "multiply": multiply.RULES,
    "average": pooling.AVERAGE_RULES,
    "mean": pooling.MEAN_RULES,
    "leaky": leaky.RULES,
    "prelu": leaky.PRELU_RULES,
    "softmax": softmax.RULES,
    "transfer": tables.TRANSFER_RULES,
    "table": tables.TABLE_RULES,
    "function": tables.FUNCTIONS,
    "resize": resize.BILINEAR_RULES,
}


def test_each_rule_has_a_mutant() -> None:
    """Of every table of rules of every module of kernels."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{info.name}") for info in pkgutil.iter_modules(kernels.__path__)
    ]
    assert {*modules, fast} == set(MODULES)
    found = [
        table
        for m in (*modules, requantize)
        for name, table in vars(m).items()
        if name.endswith(("RULES", "FUNCTIONS"))
    ]
    assert {id(table) for table in found if isinstance(table, dict)} == {id(table) for table in TABLES.values()}
    assert set(rule_mutants()) == {f"{name} {rule}" for name, table in TABLES.items() for rule in table}


@X86
@pytest.mark.parametrize("name", MUTANTS)
def test_a_kernel_off_by_one_lsb_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = MUTANTS[name]
    assert not noticed(mutant)
    used: list[bool] = []
    for place in mutant.places:
        right = place[mutant.name] if isinstance(place, dict) else getattr(place, mutant.name)
        wrong = mutant.wrong(right)

        def marked(*args: Any, wrong: Callable[..., Any] = wrong, **rest: Any) -> Any:
            used.append(True)
            return wrong(*args, **rest)

        if isinstance(place, dict):
            monkeypatch.setitem(place, mutant.name, marked)
        else:
            monkeypatch.setattr(place, mutant.name, marked)
    assert noticed(mutant)
    assert used
