"""What every profile promises of a quantized network; and registers, saturation and run-time scales, by counting."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, helper, numpy_helper
from test_emulate_engine import TYPES, Net, feed

from onnxqt.emulate import NodeInfo, Program, Result, load_program
from onnxqt.emulate.kernels import add, leaky, multiply, pooling, resize, softmax
from onnxqt.errors import EmulatorError
from onnxqt.numerics import Array
from onnxqt.profiles import PROFILES, Accumulator, Arithmetic, Overflow, Profile

EACH = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
EITHER = pytest.mark.parametrize("reference", [False, True], ids=["fast", "definition"])
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SHIFTS = [name for name, profile in PROFILES.items() if profile.arithmetic.product == "shift_up"]
REASONS = ("powers of two", "the back end computes", "is not quantized", "is on no grid")
LEVELS = [name for name, profile in PROFILES.items() if profile.arithmetic.levels != "uniform"]


def network(profile: Profile, pow2: bool) -> ModelProto:
    """Convolution, depthwise, residual, pools, a gate, a concatenation and a classifier, on grids of the profile."""
    policy = profile.policy
    net = Net("s8" if policy.signed else "u8", pow2, 3, opset=17)
    zero = (0 if policy.signed else 128) if policy.symmetric else None
    axis = 0 if policy.per_channel else None

    def q(x: str, scale: float, z: int | None = zero) -> str:
        return net.qdq(x, scale if pow2 else scale * 1.13, z)

    def conv(x: str, shape: tuple[int, ...], scale: float, **attributes: Any) -> str:
        w = net.weights(shape, axis)
        return q(net.node("Relu", net.node("Conv", x, w, net.bias(x, w, shape[0]), **attributes)), scale)

    x = q(net.input("N", 3, 10, 9), 2.0**-4)
    x = conv(x, (8, 3, 3, 3), 2.0**-4, pads=[1, 1, 1, 1])
    y = conv(x, (8, 1, 3, 3), 2.0**-4, pads=[0, 1, 1, 1], group=8, strides=[2, 2])
    y = q(net.node("Conv", y, net.weights((8, 8, 1, 1), axis)), 2.0**-4)
    x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1)
    x = q(net.node("Relu", net.node("Add", y, x)), 2.0**-4)
    gate = q(net.node("GlobalAveragePool", x), 2.0**-5)
    gate = q(net.node("Sigmoid", q(net.node("Conv", gate, net.weights((8, 8, 1, 1), axis)), 2.0**-4)), 2.0**-8)
    gated = q(net.node("Mul", x, gate), 2.0**-5)
    averaged = q(net.node("AveragePool", x, kernel_shape=[2, 2], pads=[1, 0, 0, 1]), 2.0**-4)
    x = q(net.node("Concat", gated, averaged, axis=1), 2.0**-4)
    mean, w = q(net.node("GlobalAveragePool", x), 2.0**-5), net.weights((10, 16), axis)
    x = net.node("Flatten", mean)
    return net.output(q(net.node("Gemm", x, w, net.bias(mean, w, 10), transB=1), 2.0**-4))


def sensible(info: NodeInfo, profile: Profile) -> None:
    """What a node says of itself."""
    assert "\n" not in info.reason + info.note
    assert bool(info.reason) is (info.kind == "float")
    assert info.implementation
    if info.kind == "integer" and info.op_type in PRODUCTS and profile.name not in LEVELS:
        register = profile.arithmetic.accumulator
        assert info.accumulator.startswith(f"int{register.bits} {register.overflow}")
        assert info.bound
    if info.kind == "integer" and info.op_type not in ("MaxPool", "Flatten"):
        assert info.rule


@EACH
@pytest.mark.parametrize("pow2", [False, True], ids=["random", "pow2"])
def test_profile_runs_a_network_both_ways_with_equal_codes(profile: Profile, pow2: bool) -> None:
    model = network(profile, pow2)
    arithmetic = profile.arithmetic
    if arithmetic.accumulator.overflow == "error":
        arithmetic = replace(arithmetic, accumulator=replace(arithmetic.accumulator, overflow="wrap"))
    programs = [load_program(model, arithmetic, reference=reference) for reference in (False, True)]
    quick, slow = ([replace(info, implementation="") for info in program.nodes] for program in programs)
    assert quick == slow
    for info in programs[0].nodes:
        sensible(info, replace(profile, arithmetic=arithmetic))
    results = [program.run_codes(feed(model, 3), tuple(program.tensors)) for program in programs]
    assert results[0].overflows == results[1].overflows
    for name, entry in results[1].codes.items():
        np.testing.assert_array_equal(results[0].codes[name].codes, entry.codes, err_msg=name)
        grid = entry.params.grid
        assert grid.qmin <= entry.codes.min() <= entry.codes.max() <= grid.qmax
    (output,), (expected,) = (list(result.outputs.values()) for result in results)
    np.testing.assert_array_equal(output, expected)
    assert len(np.unique(output)) > 10


@EACH
def test_what_is_float_needs_powers_of_two(profile: Profile) -> None:
    model = network(profile, pow2=False)
    program = load_program(model, profile.arithmetic)
    reasons = {op: reason for _, op, reason in program.float_nodes}
    assert all(any(part in reason for part in REASONS) for reason in reasons.values())
    of_scales = {op for op, reason in reasons.items() if "powers of two" in reason}
    assert ({"Conv", "Gemm"} <= of_scales) is (profile.name in SHIFTS)
    of_choice = {op for op, reason in reasons.items() if "the back end computes" in reason}
    a = profile.arithmetic
    in_float = {"Add": a.add == "none", "Mul": a.multiply == "none", "Sigmoid": a.table == "float"}
    assert of_choice == {op for op, is_float in in_float.items() if is_float and profile.name not in LEVELS}
    kept = {op for _, op, _ in load_program(network(profile, pow2=True), profile.arithmetic).float_nodes}
    assert kept == {op for op in reasons if op not in of_scales} or profile.name in SHIFTS
    assert not kept & {"Conv", "Gemm", "AveragePool", "GlobalAveragePool"} or profile.name in LEVELS


@EACH
def test_integer_nodes_use_the_rules_of_the_profile(profile: Profile) -> None:
    if profile.name in LEVELS:
        pytest.skip("its nodes compute with levels")
    a = profile.arithmetic
    expected: dict[str, str] = {"Add": a.add, "Mul": a.multiply, "AveragePool": a.average, "GlobalAveragePool": a.mean}
    expected = {op: rule for op, rule in expected.items() if rule != "none"} | {"Gemm": a.dense or a.product}
    expected |= {"Concat": a.transfer} | ({} if a.table == "float" else {"Sigmoid": f"table {a.table}"})
    infos = load_program(network(profile, pow2=True), a).integer_nodes
    seen = {info.op_type: info.rule for info in infos}
    assert {op: seen[op] for op in expected} == expected
    assert {info.rule for info in infos if info.op_type == "Conv"} == {a.product, a.depthwise or a.product}


# Registers


def overflowing(op: str, fill: int | None = None) -> ModelProto:
    """Accumulators of some 2^17, with a bias."""
    net = Net("u8", True, 1)
    if op == "MatMul":
        x, y = net.qdq(net.input("N", 4, 30), 0.03125, 3), net.qdq(net.input("N", 30, 5, name="y"), 0.0625, 101)
        return net.output(net.qdq(net.node("MatMul", x, y), 2.0, 131))
    shape, weights = (("N", 90), (90, 7)) if op == "Gemm" else (("N", 6, 5, 4), (7, 6, 3, 2))
    x = net.qdq(net.input(*shape), 2.0**-6, 3)
    w = net.weights(weights, None, fill=fill)
    return net.output(net.qdq(net.node(op, x, w, net.bias(x, w, 7)), 2.0, 131))


def accumulators(model: ModelProto, result: Result, names: Sequence[str]) -> Array:
    """Exact sums with their bias, by numpy's int64, from the codes of the inputs; channels last."""
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    (node,) = (node for node in model.graph.node if node.op_type in PRODUCTS)
    codes = [result.codes[name].codes.astype(np.int64) - int(result.codes[name].params.zero_point) for name in names]
    if node.op_type == "MatMul":
        return np.asarray(codes[0] @ codes[1])
    w = constants[made[node.input[1]].input[0]].astype(np.int64)
    bias = constants[made[node.input[2]].input[0]].astype(np.int64)
    if node.op_type == "Gemm":
        return np.asarray(codes[0] @ w + bias)
    (x,) = codes
    rows, columns = x.shape[2] - 2, x.shape[3] - 1
    patches = np.stack([x[:, :, i : i + rows, j : j + columns] for i in range(3) for j in range(2)], 2)
    return np.asarray(np.einsum("nctij,mct->nijm", patches, w.reshape(7, 6, 6)) + bias)


def run(model: ModelProto, arithmetic: Arithmetic, reference: bool) -> tuple[Program, Result, list[str]]:
    program = load_program(model, arithmetic, reference=reference)
    names = [name for name in program.tensors if name != model.graph.output[0].name]
    return program, program.run_codes(feed(model, 3), names), names


def held(acc: Array, bits: int, overflow: Overflow) -> Array:
    low, span = -(1 << (bits - 1)), 1 << bits
    return (acc - low) % span + low if overflow == "wrap" else np.clip(acc, low, low + span - 1)


@EITHER
@pytest.mark.parametrize("bits", [16, 17, 18])
@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_a_narrow_register_is_counted_and_changes_the_codes(
    op: str, overflow: Overflow, bits: int, reference: bool
) -> None:
    model = overflowing(op)
    program, result, names = run(model, Arithmetic(accumulator=Accumulator(bits, overflow)), reference)
    acc = accumulators(model, result, names)
    (info,) = (info for info in program.integer_nodes if info.op_type == op)
    count = int(np.count_nonzero(held(acc, bits, overflow) != acc))
    assert result.overflows == {info.name: count}
    assert count > 0 or bits == 18
    assert info.accumulator == f"int{bits} {overflow}"
    entry = result.codes[model.graph.output[0].name]
    (step,) = (step for step in program.steps if step.info.op_type == op)
    assert step.detail is not None
    assert step.detail.requantization is not None
    multiplier = float(step.detail.requantization.multiplier)  # a power of two: every product is exact
    expected = np.clip(np.rint(held(acc, bits, overflow) * multiplier) + 131, 0, 255)
    np.testing.assert_array_equal(np.moveaxis(entry.codes, 1, -1) if op == "Conv" else entry.codes, expected)


@EITHER
@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
def test_a_register_whose_overflow_is_an_error_ends_the_run(op: str, reference: bool) -> None:
    model = overflowing(op)
    _, result, names = run(model, Arithmetic(accumulator=Accumulator(16, "wrap")), reference)
    acc = accumulators(model, result, names)
    count = int(np.count_nonzero(held(acc, 16, "wrap") != acc))
    program = load_program(model, Arithmetic(accumulator=Accumulator(16, "error")), reference=reference)
    (name,) = (info.name for info in program.integer_nodes if info.op_type == op)
    message = rf"node '{name}' \({op}\): {count} accumulators do not fit int16 error.*use smaller scales"
    with pytest.raises(EmulatorError, match=message) as caught:
        program.run(feed(model, 3))
    assert "\n" not in str(caught.value)


@EITHER
def test_a_register_that_is_wide_enough_is_no_error(reference: bool) -> None:
    model = overflowing("Gemm")
    result = load_program(model, Arithmetic(accumulator=Accumulator(32, "error")), reference=reference)
    assert list(result.run_codes(feed(model, 3)).overflows.values()) == [0]


# Pairs of products


def strong(op: str, kind: str, **attributes: Any) -> ModelProto:
    net = Net(kind, True, 2)
    if op == "Conv":
        group = int(attributes.get("group", 1))
        x, w = net.qdq(net.input("N", 6, 4, 3), 2.0**-7, 5), net.weights((4, 6 // group, 2, 1), None)
    else:
        x, w = net.qdq(net.input("N", 7), 2.0**-7, 5), net.weights((7, 4), None)
    return net.output(net.qdq(net.node(op, x, w, **attributes), 2.0**-6, 3))


def saturated_pairs(rows: Sequence[Sequence[int]], columns: Sequence[Sequence[int]]) -> tuple[list[list[int]], int]:
    """Sums of pairs of raw codes times weights, each pair limited to 16 bits; and how many were."""
    count, sums = 0, []
    for row in rows:
        sums.append([0] * len(columns))
        for m, column in enumerate(columns):
            for k in range(0, len(row), 2):
                pair = sum(u * w for u, w in zip(row[k : k + 2], column[k : k + 2], strict=True))
                limited = min(max(pair, -(2**15)), 2**15 - 1)
                count, sums[-1][m] = count + (limited != pair), sums[-1][m] + limited
    return sums, count


@EITHER
@pytest.mark.parametrize("kind", ["u8", "s8"])
@pytest.mark.parametrize(("op", "group"), [("Gemm", 1), ("Conv", 1), ("Conv", 2)])
def test_pairs_that_saturate_are_counted(op: str, group: int, kind: str, reference: bool) -> None:
    model = strong(op, kind, **({"group": group} if op == "Conv" else {}))
    program, result, names = run(model, Arithmetic(accumulator=Accumulator(32, "wrap", 16)), reference)
    (entry,) = (result.codes[name] for name in names)
    moved = 128 if kind == "s8" else 0
    raw, zero = entry.codes.astype(np.int64) + moved, int(entry.params.zero_point) + moved
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    weights = next(c for c in constants.values() if c.size > 1).astype(np.int64)
    if op == "Gemm":
        sums, count = saturated_pairs(raw.tolist(), weights.T.tolist())
        acc = np.array(sums) - zero * weights.sum(0)
    else:
        batch, _, height, width = raw.shape
        acc, count = np.zeros((batch, 4, height - 1, width), np.int64), 0
        for g in range(group):
            channels, outs = slice(g * 6 // group, (g + 1) * 6 // group), slice(g * 4 // group, (g + 1) * 4 // group)
            for t in range(2):
                rows = np.moveaxis(raw[:, channels, t : t + height - 1], 1, -1).reshape(-1, 6 // group)
                tap = weights[outs, :, t, 0]
                sums, more = saturated_pairs(rows.tolist(), tap.tolist())
                part = np.array(sums) - zero * tap.sum(1)
                acc[:, outs] += np.moveaxis(part.reshape(batch, height - 1, width, -1), -1, 1)
                count += more
    (info,) = (info for info in program.integer_nodes if info.op_type == op)
    assert result.overflows == {info.name: count}
    assert count > 0
    assert "pairs saturate at int16" in info.accumulator
    (step,) = (step for step in program.steps if step.info is info)
    assert step.detail is not None
    assert step.detail.requantization is not None
    multiplier = float(step.detail.requantization.multiplier)
    output = result.codes[model.graph.output[0].name]
    grid = output.params.grid
    expected = np.clip(np.rint(acc * multiplier) + int(output.params.zero_point), grid.qmin, grid.qmax)
    np.testing.assert_array_equal(output.codes, expected)


def test_the_profile_without_vnni_counts_the_same_pairs() -> None:
    counted = []
    for arithmetic in (PROFILES["x86_sat16"].arithmetic, Arithmetic(accumulator=Accumulator(32, "wrap", 16))):
        arithmetic = replace(arithmetic, quantize="even")  # of the input, so that both get the same codes
        counted.append(run(strong("Conv", "u8"), arithmetic, reference=False)[1].overflows)
    assert counted[0] == counted[1]
    assert sum(counted[0].values()) > 0


# Scales at run time


def dynamic(op: str, pow2: bool, bias: bool) -> tuple[ModelProto, Array, Array, Array | None]:
    """A product of a float input with quantized weights; its codes, scales and bias."""
    net = Net("s8", pow2, 4)
    shape: tuple[int | str, ...]
    weights: tuple[int, ...]
    shape, weights, axis = (("N", 5, 9), (9, 7), 1) if op == "MatMul" else (("N", 9), (9, 7), 1)
    if op == "Conv":
        shape, weights, axis = ("N", 4, 5, 3), (7, 4, 2, 3), 0
    w = net.weights(weights, axis)
    values = net.rng.normal(0, 1, 7).astype(np.float32) if bias else None
    y = net.node(op, net.input(*shape), w, *([net.constant(values)] if bias else []))
    model = net.output(y)
    (dq,) = (node for node in model.graph.node if node.op_type == "DequantizeLinear")
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    return model, constants[dq.input[0]].astype(np.int64), constants[dq.input[1]], values


def inputs_with_edges(model: ModelProto) -> dict[str, Array]:
    """One row of zeros, one of small values, values on ties of their own scale."""
    x = feed(model, 4)["x"]
    x[1] = 0
    x[2] *= np.float32(1e-3)
    x[3] = np.rint(x[3] * 2) / 2
    x[3].flat[0] = 127
    return {"x": x}


def product(op: str, codes: Array, w: Array) -> Array:
    """Exact sums, channels last."""
    if op != "Conv":
        return np.asarray(codes @ w)
    rows = codes.shape[2] - 1
    patches = np.stack([codes[:, :, i : i + rows, j : j + 1] for i in range(2) for j in range(3)], 2)
    return np.asarray(np.einsum("nctij,mct->nijm", patches, w.reshape(7, 4, 6)))


def dynamic_quantize_linear(x: Array) -> list[Array]:
    """ONNX Runtime's DynamicQuantizeLinear: codes, scale and zero point."""
    names = ["codes", "scale", "zero"]
    node = helper.make_node("DynamicQuantizeLinear", ["x"], names)
    infos = [helper.make_tensor_value_info("x", 1, None)]
    graph = helper.make_graph([node], "g", infos, [helper.make_empty_tensor_value_info(name) for name in names])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    results: list[Array] = session.run(None, {"x": x})
    return results


def by_tensor(x: Array, _: str) -> tuple[Array, Array]:
    codes, scale, zero = dynamic_quantize_linear(x)
    return codes.astype(np.int64) - int(zero), np.asarray(scale)


def by_row(x: Array, op: str) -> tuple[Array, Array]:
    """Of each row of a matrix, or each sample of a convolution, one value at a time."""
    rows = x.reshape(len(x), -1) if op == "Conv" else x.reshape(-1, x.shape[-1])
    codes, scales = np.zeros(rows.shape, np.int64), np.ones(len(rows), np.float32)
    for i, row in enumerate(rows):
        largest = max(abs(float(value)) for value in row)
        if largest == 0:
            continue
        scales[i] = np.float32(largest) / np.float32(127)
        inverse = np.float32(127) / np.float32(largest)
        for j, value in enumerate(row):
            step = float(np.float32(value) * inverse)
            codes[i, j] = int(abs(step) + 0.5) * (1 if step > 0 else -1)  # exact in float64
    kept = (len(x), 1, 1, 1) if op == "Conv" else (*x.shape[:-1], 1)
    return codes.reshape(x.shape), scales.reshape(kept)


WAYS: dict[str, Callable[[Array, str], tuple[Array, Array]]] = {"tensor": by_tensor, "row": by_row}


@EITHER
@pytest.mark.parametrize("pow2", [False, True], ids=["random", "pow2"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "bias"), [("Gemm", True), ("Gemm", False), ("MatMul", False), ("Conv", True)])
def test_scales_at_run_time(op: str, bias: bool, way: Literal["tensor", "row"], pow2: bool, reference: bool) -> None:
    model, w, scale, values = dynamic(op, pow2, bias)
    inputs = inputs_with_edges(model)
    program = load_program(model, Arithmetic(dynamic=way), reference=reference)
    (info,) = program.integer_nodes
    assert (info.op_type, info.rule) == (op, f"dynamic {way}")
    assert way in info.note
    codes, s = WAYS[way](inputs["x"], op)
    acc = product(op, codes, w)
    expected = acc.astype(np.float32) * (s * scale)
    expected = expected + values if values is not None else expected
    assert expected.dtype == np.float32
    (found,) = program.run(inputs).values()
    np.testing.assert_array_equal(np.moveaxis(found, 1, -1) if op == "Conv" else found, expected)


def test_a_back_end_without_scales_at_run_time_computes_in_float() -> None:
    model, *_ = dynamic("Gemm", pow2=False, bias=True)
    ((_, operator, reason),) = load_program(model).float_nodes
    assert operator == "Gemm"
    assert "is not quantized per tensor" in reason


def test_profiles_say_how_they_find_scales_at_run_time() -> None:
    """Where a profile takes a dynamic precision, its arithmetic has one."""
    for profile in PROFILES.values():
        takes = any(precision.endswith("-dyn") for precision in profile.policy.precisions)
        assert not takes or profile.arithmetic.dynamic in WAYS


# Every field of the arithmetic changes what runs

REASON = {
    "MatMul": "the back end multiplies two activations in float",
    "Add": "the back end computes Add in float",
    "Mul": "the back end computes Mul in float",
    "table": "the back end computes activation functions in float",
    "PRelu": "the back end computes PRelu in float",
    "Softmax": "the back end computes Softmax in float",
    "Resize": "the back end interpolates (linear) in float",
    "Gemm": "its input 'x' is not quantized per tensor",
}


@dataclass(frozen=True, eq=False)
class Changed:
    """A field of `Arithmetic`, and what the node of one operator says for each of its values: its rule, or why it is
    float."""

    name: str
    op_type: str
    build: Callable[[Net], str]
    says: Mapping[Any, str]
    rest: Mapping[str, Any] = field(default_factory=dict)


def wide(net: Net, x: str, scale: float) -> str:
    """A quantizer of 16 bits."""
    s, z = net.constant(np.float32(scale)), net.constant(np.int16(0))
    return net.node("DequantizeLinear", net.node("QuantizeLinear", x, s, z), s, z)


def source(net: Net, *shape: int, scale: float = 0.0625, zero_point: int = 3, name: str = "x") -> str:
    return net.qdq(net.input("N", *shape, name=name), scale, zero_point)


def convolved(net: Net, op: str, shape: tuple[int, ...], group: int = 1) -> str:
    w = net.constant(net.rng.integers(-127, 128, shape), TYPES["s8"])
    w = net.node("DequantizeLinear", w, net.constant(np.float32(2.0**-7)), net.constant(0, TYPES["s8"]))
    return net.qdq(net.node(op, source(net, 4, 12, 9), w, group=group), 0.5, -5)


def dense(net: Net, bits: int) -> str:
    w = net.weights((12, 400), None)
    if bits == 16:
        return wide(net, net.node("Gemm", wide(net, net.input("N", 12), 0.001), w), 0.002)
    return net.qdq(net.node("Gemm", source(net, 12), w), 0.125, -5)


def two_activations(net: Net, zero_point: int) -> str:
    x = source(net, 6, 12)
    y = net.qdq(net.input("N", 12, 8, name="y"), 0.25, zero_point)
    return net.qdq(net.node("MatMul", x, y), 2.0, -5)


def two_tensors(net: Net, op: str, scale: float) -> str:
    x, y = source(net, 900, scale=0.01), source(net, 900, scale=0.03, zero_point=-7, name="y")
    return net.qdq(net.node(op, x, y), scale, 11)


def through(
    net: Net, op: str, *constants: Any, shape: tuple[int, ...] = (300,), scale: float = 0.125, **attributes: Any
) -> str:
    x = source(net, *shape)
    return net.qdq(net.node(op, x, *(net.constant(value) for value in constants), **attributes), scale, -5)


def prelu(net: Net) -> str:
    x, slope = source(net, 4, 75), net.qdq(net.constant(np.linspace(-0.5, 0.7, 4, dtype=np.float32)[:, None]), 0.01, 3)
    return net.qdq(net.node("PRelu", x, slope), 0.125, -5)


def softened(net: Net) -> str:
    return net.qdq(net.node("Softmax", source(net, 40, 10)), 2.0**-8, -128)


def resized(net: Net) -> str:
    x, scales = source(net, 3, 5, 7), net.constant(np.array([1, 1, 2, 2], np.float32))
    return net.qdq(net.node("Resize", x, "", scales, mode="linear"), 0.0625, 3)


def same(*rules: str) -> Mapping[str, str]:
    return dict(zip(rules, rules, strict=True))


def wide_conv(net: Net) -> str:
    return wide(net, net.node("Conv", wide(net, net.input("N", 4, 5, 5), 0.001), net.weights((8, 4, 3, 3), 0)), 0.002)


DOUBLE = {"": "float32_even", "gemmlowp_double": "gemmlowp_double"}
TWO = {**DOUBLE, "none": REASON["MatMul"]}
CHANGED = (
    Changed("product", "Conv", lambda n: convolved(n, "Conv", (8, 4, 3, 3)), same("float32_even", "gemmlowp_double")),
    Changed("dense", "Gemm", lambda n: dense(n, 8), DOUBLE),
    Changed("depthwise", "Conv", lambda n: convolved(n, "Conv", (8, 1, 3, 3), 4), DOUBLE),
    Changed("depthwise", "ConvTranspose", lambda n: convolved(n, "ConvTranspose", (4, 8, 3, 3)), DOUBLE),
    Changed("depthwise", "ConvTranspose", lambda n: convolved(n, "ConvTranspose", (4, 3, 3, 3), 2), DOUBLE),
    Changed("grouped", "Conv", lambda n: convolved(n, "Conv", (8, 2, 3, 3), 2), DOUBLE),
    Changed("batched", "MatMul", lambda n: two_activations(n, 0), {**TWO, "xnnpack": "float32_even"}),
    Changed("batched", "MatMul", lambda n: two_activations(n, 7), {**TWO, "xnnpack": "gemmlowp_double"}),
    Changed("product16", "Conv", wide_conv, {"": "float32_even", "fixed15_single": "fixed15_single"}),
    Changed(
        "dense16",
        "Gemm",
        lambda n: dense(n, 16),
        {"": "fixed15_single", "float64_away": "float64_away"},
        {"product16": "fixed15_single"},
    ),
    Changed("add", "Add", lambda n: two_tensors(n, "Add", 0.06), {**same(*add.RULES), "none": REASON["Add"]}),
    Changed(
        "multiply", "Mul", lambda n: two_tensors(n, "Mul", 0.015), {**same(*multiply.RULES), "none": REASON["Mul"]}
    ),
    Changed(
        "average",
        "AveragePool",
        lambda n: through(n, "AveragePool", kernel_shape=[2, 3], shape=(5, 9, 9), scale=0.0625),
        same(*pooling.AVERAGE_RULES),
    ),
    Changed(
        "mean",
        "GlobalAveragePool",
        lambda n: through(n, "GlobalAveragePool", shape=(70, 4, 4), scale=0.03125),
        same(*pooling.MEAN_RULES),
        {"quantize": "away"},
    ),
    Changed(
        "leaky",
        "LeakyRelu",
        lambda n: through(n, "LeakyRelu", alpha=0.3),
        {**same(*leaky.RULES), "ort": "table even", "float": "table even"},
    ),
    Changed("leaky", "PRelu", prelu, {"tflite": "tflite", "xnnpack": "xnnpack", "float": REASON["PRelu"]}),
    Changed("hard_swish", "HardSwish", lambda n: through(n, "HardSwish"), {"table": "table even", "tflite": "tflite"}),
    Changed("softmax", "Softmax", softened, {**same(*softmax.RULES), "float": REASON["Softmax"]}),
    Changed("resize", "Resize", resized, {"tflite": "tflite", "xnnpack": "xnnpack", "float": REASON["Resize"]}),
    Changed(
        "transfer",
        "Clip",
        lambda n: through(n, "Clip", np.float32(-100), np.float32(100), scale=0.25),
        same("ort", "affine", "xnnpack", "gemmlowp_double"),
    ),
    Changed(
        "table",
        "Mul",
        lambda n: through(n, "Mul", np.float32(0.5)),
        {**{rule: f"table {rule}" for rule in ("even", "away", "up", "xnnpack")}, "float": REASON["table"]},
    ),
    Changed(
        "quantize",
        "QuantizeLinear",
        lambda n: source(n, 300),
        {rule: f"half {rule}" for rule in ("even", "away", "up", "affine")},
    ),
    Changed("levels", "Gemm", lambda n: dense(n, 8), {"uniform": "float32_even", "log16": "log16"}),
    Changed(
        "dynamic",
        "Gemm",
        lambda n: n.node("Gemm", n.input("N", 12), n.weights((12, 40), None)),
        {"float": REASON["Gemm"], "tensor": "dynamic tensor", "row": "dynamic row"},
    ),
)
SAME_CODES = {("leaky", "PRelu")}  # one rule under two names
# On powers of two, which the dpu needs, none of these rounds before the end; test_emulate_tflite tells them apart.
SAME_ON_POWERS = ({"ort", "openvino"}, {"xnnpack", "openvino"})


def ran(case: Changed, value: Any) -> tuple[str, Array]:
    """What the node says of itself, and what comes out."""
    model = case.build(net := Net("s8", True, 6, opset=21))
    file = net.output(model)
    program = load_program(file, Arithmetic(**{**case.rest, case.name: value}))
    infos = [info for info in program.nodes if info.op_type == case.op_type]
    inputs = {name: x / 4 for name, x in feed(file, 20).items()}
    for x in inputs.values():
        x.flat[::5] = np.rint(x.flat[::5] * 32) / 32
    (found,) = program.run(inputs).values()
    return infos[0].reason or infos[0].rule, found


@pytest.mark.parametrize("case", CHANGED, ids=[f"{case.name}-{case.op_type}-{i}" for i, case in enumerate(CHANGED)])
def test_a_field_of_the_arithmetic_changes_what_runs(case: Changed) -> None:
    found = {value: ran(case, value) for value in case.says}
    assert {value: says for value, (says, _) in found.items()} == case.says
    results = {says: result for says, result in found.values() if says not in REASON.values()}
    for first, second in itertools.combinations(results, 2):
        if (case.name, case.op_type) not in SAME_CODES and {first, second} not in SAME_ON_POWERS:
            assert not np.array_equal(results[first], results[second]), (first, second)


def test_each_field_of_the_arithmetic_is_changed() -> None:
    """The register has tests of its own, above."""
    assert {case.name for case in CHANGED} | {"accumulator"} == {f.name for f in fields(Arithmetic)}


@pytest.mark.parametrize("depthwise", ["", "ruy_double"])
@pytest.mark.parametrize("grouped", ["", "gemmlowp_double"])
def test_groups_and_channels_are_told_apart(depthwise: Any, grouped: Any) -> None:
    arithmetic = Arithmetic(depthwise=depthwise, grouped=grouped)
    rules = {}
    for name, op, shape, group in (
        ("plain", "Conv", (8, 4, 3, 3), 1),
        ("grouped", "Conv", (8, 2, 3, 3), 2),
        ("depthwise", "Conv", (4, 1, 3, 3), 4),
        ("transposed", "ConvTranspose", (4, 8, 3, 3), 1),
    ):
        net = Net("s8", True, opset=21)
        infos = load_program(net.output(convolved(net, op, shape, group)), arithmetic).integer_nodes
        (rules[name],) = (info.rule for info in infos)
    special, other = depthwise or "float32_even", grouped or "float32_even"
    assert rules == {"plain": "float32_even", "grouped": other, "depthwise": special, "transposed": special}


@pytest.mark.parametrize("rule", resize.BILINEAR_RULES)
@pytest.mark.parametrize("coordinates", resize.COORDINATES)
def test_a_resize_on_codes_is_that_of_the_back_end(rule: Literal["tflite", "xnnpack"], coordinates: str) -> None:
    net = Net("s8", True, opset=21)
    x, sizes = source(net, 3, 5, 7), net.constant(np.array([2, 3, 8, 13], np.int64))
    how = {"mode": "linear", "coordinate_transformation_mode": coordinates}
    y = net.node("Resize", x, "", "", sizes, **how)
    model = net.output(net.qdq(y, 0.0625, 3))
    result = load_program(model, Arithmetic(resize=rule)).run_codes(feed(model, 2), (x,))
    found = result.codes[model.graph.output[0].name].codes
    np.testing.assert_array_equal(found, resize.BILINEAR_RULES[rule](result.codes[x].codes, (8, 13), coordinates))
    (other,) = {"tflite", "xnnpack"} - {rule}
    assert np.any(found != resize.BILINEAR_RULES[other](result.codes[x].codes, (8, 13), coordinates))


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"mode": "cubic"}, "the back end interpolates (cubic) in float"),
        (
            {"mode": "linear", "coordinate_transformation_mode": "half_pixel_symmetric"},
            "it interpolates in a way (half_pixel_symmetric) that the back end has not",
        ),
        ({"mode": "linear", "antialias": 1}, "it interpolates in a way (half_pixel) that the back end has not"),
    ],
)
def test_other_ways_to_interpolate_are_float(attributes: dict[str, Any], reason: str) -> None:
    net = Net("s8", True, opset=21)
    x, scales = source(net, 3, 6, 8), net.constant(np.array([1, 1, 0.5, 0.5], np.float32))
    model = net.output(net.qdq(net.node("Resize", x, "", scales, **attributes), 0.0625, 3))
    ((_, operator, why),) = load_program(model, Arithmetic(resize="tflite")).float_nodes
    assert (operator, why) == ("Resize", reason)


def wide_slope(net: Net) -> str:
    slope = net.qdq(net.constant(np.linspace(-0.5, 0.7, 4, dtype=np.float32)[:, None]), 0.01, 3)
    return net.node("PRelu", wide(net, net.input("N", 4, 30), 2.0**-12), slope)


WIDE: Mapping[str, tuple[Callable[[Net], str], str]] = {
    "Sigmoid": (
        lambda n: n.node("Sigmoid", wide(n, n.input("N", 30), 2.0**-12)),
        "the back end interpolates in a table for 16-bit codes, which is not modelled",
    ),
    "PRelu": (wide_slope, "the back end has PRelu for 8-bit codes alone"),
    "HardSwish": (
        lambda n: n.node("HardSwish", wide(n, n.input("N", 30), 2.0**-12)),
        "the back end has HardSwish for 8-bit codes alone",
    ),
    "Softmax": (
        lambda n: n.node("Softmax", wide(n, n.input("N", 30), 2.0**-12)),
        "the back end has Softmax for 8-bit codes alone",
    ),
}


@pytest.mark.parametrize("name", ["tflite_ref", "tflite_ruy"])
@pytest.mark.parametrize("operator", WIDE)
def test_functions_of_16_bits_are_float_for_tflite(operator: str, name: str) -> None:
    build, reason = WIDE[operator]
    net = Net("s8", True, opset=21)
    model = net.output(wide(net, build(net), 2.0**-13))
    program = load_program(model, PROFILES[name].arithmetic)
    assert [(op, why) for _, op, why in program.float_nodes] == [(operator, reason)]
    (found,) = program.run(feed(model, 4)).values()
    assert len(np.unique(found)) > 12
