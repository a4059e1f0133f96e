import importlib
import platform
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from conftest import FIXTURES, Digits
from onnx import numpy_helper
from test_emulate_engine import FLOAT_IN_ORT, INTEGER_IN_ORT, KINDS, POW2, Net, feed

from onnxqt import numerics
from onnxqt.emulate import Program, load_program
from onnxqt.emulate.kernels import pooling
from onnxqt.emulate.nodes import products
from onnxqt.errors import ContradictionError
from onnxqt.numerics import Array, IntArray
from onnxqt.plan import IntegerNode
from onnxqt.requantize import Requantization
from onnxqt.runtime import Session, with_outputs
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme
from onnxqt.verify import TensorVerdict, roundings, verify

MODULE = importlib.import_module("onnxqt.verify")  # `onnxqt.verify` itself is the function

INTEGER = parse_scheme("w8a8-asym-pc")  # the scheme that ONNX Runtime runs on integer kernels from end to end
SCHEMES = (*map(str, DEFAULT_SCHEMES), "w8a4-sym-pt", "w4a4-asym-pc", "w2a4-sym-pc")
X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="which kernels exist depends on the processor"
)


def few(digits: Digits, count: int = 16) -> list[Mapping[str, Array]]:
    """Some samples in two batches of unequal size."""
    cut = count // 3
    return [{name: array[part] for name, array in digits.inputs.items()} for part in (slice(cut), slice(cut, count))]


def test_verdict_of_an_exported_file(digits: Digits) -> None:
    model = digits.quantized(INTEGER)
    verdict = verify("file", model, few(digits))
    sites = [site.tensor for site in digits.plan.activations]
    outputs = digits.model.graph.outputs
    expected = {tensor if tensor in outputs else f"{tensor}.dequantized" for tensor in sites}
    assert {tensor.tensor for tensor in verdict.tensors} == expected
    sizes = {tensor.tensor: tensor.total for tensor in verdict.tensors}
    (image,) = digits.inputs.values()
    assert sizes[f"{digits.model.graph.inputs[0]}.dequantized"] == 16 * image[0].size
    assert sizes[outputs[0]] == 16 * 10


@X86
def test_verdict_counts_integer_kernels(digits: Digits) -> None:
    """Every Conv, Gemm and MatMul on integers with 8-bit weights; with 4-bit ones ONNX Runtime computes floats."""
    weighted = len(digits.plan.weights)
    verdict = verify("file", digits.quantized(INTEGER), few(digits))
    assert verdict.all_integer
    assert verdict.integer_kernels >= weighted
    assert (verdict.max_lsb, verdict.mismatch_fraction) == (0, 0.0)
    verdict = verify("file", digits.quantized(parse_scheme("w4a8-asym-pc")), few(digits))
    assert not verdict.all_integer
    assert verdict.integer_kernels < weighted


def changed(model: onnx.ModelProto, constant: str, change: Callable[[Array], Array]) -> onnx.ModelProto:
    """The model with another value of one constant."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (stored,) = (tensor for tensor in copy.graph.initializer if tensor.name == constant)
    value = numpy_helper.to_array(stored)
    stored.CopyFrom(numpy_helper.from_array(change(value).astype(value.dtype), constant))
    return copy


def turned(codes: Array) -> Array:
    """The codes with the sign of the largest one turned."""
    turned = codes.copy()
    position = np.unravel_index(np.abs(codes.astype(np.int32)).argmax(), codes.shape)
    turned[position] = -codes[position]
    return turned


def weighted_nodes(digits: Digits) -> dict[str, IntegerNode]:
    return {node.weight.tensor: node for node in digits.plan.integer_nodes if node.weight}


ERRORS: Mapping[str, tuple[str, Callable[[Array], Array]]] = {
    "a weight code": ("weight.codes", turned),
    "a weight scale": ("weight.scale", lambda scale: scale * np.float32(1 + 2**-10)),
    "the codes of a bias": ("bias.codes", lambda codes: codes + 4),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("position", [0, 2, -1])
def test_an_error_in_one_node_is_a_contradiction(
    digits: Digits, position: int, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed behind the emulator's back, it shows in the tensor that the node computes and in no other."""
    model = digits.quantized(INTEGER)
    weight, node = list(weighted_nodes(digits).items())[position]
    constant, change = ERRORS[error]
    constant = constant.replace("weight", weight).replace("bias", f"{node.name}.bias")
    monkeypatch.setattr(
        MODULE, "load_program", lambda _, reference: load_program(changed(model, constant, change), reference=reference)
    )
    tensor = node.output if node.output in digits.model.graph.outputs else f"{node.output}.dequantized"
    with pytest.raises(ContradictionError) as caught:
        verify("w8a8-asym-pc", model, few(digits, 100))
    assert caught.value.exit_code == 3
    assert f"'w8a8-asym-pc': the emulator and ONNX Runtime disagree on tensor '{tensor}'" in str(caught.value)
    assert "do not deploy this file" in str(caught.value)


def test_same_change_in_both_copies_is_no_contradiction(digits: Digits) -> None:
    weight = next(iter(weighted_nodes(digits)))
    verify("file", changed(digits.quantized(INTEGER), f"{weight}.codes", turned), few(digits))


RULES: Mapping[str, Callable[[Array], Array]] = {
    "plus one": lambda x: np.rint(x) + 1,
    "down": np.floor,
    "ties moved": lambda x: np.rint(x + np.float32(2**-7)),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize("name", SCHEMES)
def test_another_rounding_rule_is_caught(
    name: str, fixture: str, rule: str, load_digits: Callable[[str], Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_digits(fixture)
    model = digits.quantized(parse_scheme(name))
    verify(name, model, few(digits))

    def wrong(acc: Array, how: Requantization) -> IntArray:
        assert how.rule == "float32_even"
        steps = RULES[rule](acc.astype(np.float32) * how.multiplier)
        grid = how.target.grid
        return np.clip(steps + how.target.zero_point, grid.qmin, grid.qmax).astype(np.int32)

    monkeypatch.setattr(products, "requantize", wrong)
    monkeypatch.setattr(pooling, "requantize", wrong)
    with pytest.raises(ContradictionError, match=name):
        verify(name, model, few(digits))


# What float error explains


def activated(net: Net) -> str:
    """A Relu of codes before the sum, and one behind it."""
    x = net.node("Relu", net.qdq(net.input("N", 4, 9, 10)))
    return net.qdq(net.node("Relu", net.node("Conv", x, net.weights((6, 4, 3, 2), 0))), 0.2)


def biased(net: Net) -> str:
    """The bias in an Add of its own."""
    x, w = net.qdq(net.input("N", 3, 30)), net.weights((30, 7), 1)
    return net.qdq(net.node("Clip", net.node("Add", net.node("MatMul", x, w), net.bias(x, w, 7))), 0.1)


OPERATORS: Mapping[str, Callable[[Net], str]] = {
    **{name: build for name, (_, build) in INTEGER_IN_ORT.items()},
    **FLOAT_IN_ORT,
    "activations": activated,
    "bias": biased,
}


def known_values(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
    """The inputs and the codes of all tensors, as ONNX Runtime has them."""
    codes = [tensor.codes for tensor in load_program(model).tensors.values()]
    return {**inputs, **Session(with_outputs(model, codes), optimize=False).run(inputs)}


@X86
@KINDS
@POW2
@pytest.mark.parametrize("name", OPERATORS)
def test_every_integer_operator_is_explained(name: str, kind: str, pow2: bool) -> None:
    """The value that float error is told of is the one that ONNX Runtime rounds, also on ties."""
    net = Net(kind, pow2, 5)
    model = net.output(OPERATORS[name](net))
    inputs, program = feed(model), load_program(model)
    verify(name, model, [inputs])
    known = known_values(model, inputs)
    for code, rounding in roundings(model, program).items():
        value, error = rounding.steps(known)
        low, high = (np.iinfo(known[code].dtype).min, np.iinfo(known[code].dtype).max)
        assert value.shape == error.shape == known[code].shape
        assert 0 < error.max() < 0.01
        assert np.all(np.abs(np.clip(value, low, high) - known[code]) <= 0.5 + error)


def test_only_sums_have_float_errors() -> None:
    def explained(build: Callable[[Net], str]) -> bool:
        net = Net("u8", False)
        model = net.output(build(net))
        return bool(roundings(model, load_program(model)))

    tables = ("concat", "two grids", "relu", "clip", "max pool", "reshape", "transpose", "flatten", "squeeze")
    moves = ("unsqueeze", "slice", "slice of the first axes", "pad", "identity")
    assert {name for name, build in OPERATORS.items() if not explained(build)} == {*tables, *moves}


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("activations", 4 * 3 * 2),
        ("1-D conv", 1 * 3),
        ("conv transpose", 2 * 3 * 2),
        ("matmul", 30),
        ("matmul of activations", 30),
        ("add", 2),
        ("average", 3 * 2),
        ("global average", 9 * 10),
        ("mean of the last axis", 10),
    ],
)
def test_the_bound_counts_the_terms_of_the_sum(name: str, terms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the other roundings the bound is `K |S|` units; these sums have no bias, so that S is the value."""
    monkeypatch.setattr(MODULE, "ROUNDINGS", 0)
    net = Net("u8", False)
    model = net.output(OPERATORS[name](net))
    program = load_program(model)
    params = {tensor.codes: tensor.params for tensor in program.tensors.values()}
    ((code, rounding),) = roundings(model, program).items()
    value, error = rounding.steps(known_values(model, feed(model)))
    real = np.abs(value - params[code].zero_point)
    seen = real > 0.001  # a Relu clamps the value and not the sum
    np.testing.assert_allclose(error[seen], terms * 2.0**-24 * real[seen], rtol=1e-9)  # float64, less the zero point


def test_the_bound_has_magnitudes_and_the_sum_without_bias() -> None:
    net = Net("s8", False)
    x, w = net.qdq(net.input(1, 4), 0.5, 0), net.constant(np.array([[8], [-8], [4], [4]]), onnx.TensorProto.INT8)
    scale, zero = net.constant(np.float32(0.25)), net.constant(np.int8(0))
    w = net.node("DequantizeLinear", w, scale, zero)
    bias = net.node("DequantizeLinear", net.constant(np.array([-24], np.int32)), net.constant(np.float32(0.125)))
    model = net.output(net.qdq(net.node("Gemm", x, w, bias), 0.5, 1))
    inputs = {"x": np.array([[1, 2, 3, -1]], np.float32)}
    ((_, rounding),) = roundings(model, load_program(model)).items()
    value, error = rounding.steps(known_values(model, inputs))
    assert value.item() == (2 - 4 + 3 - 1 - 3) / 0.5 + 1
    assert error.item() == 2.0**-24 * (4 * 0 + 12 * (2 + 4 + 3 + 1 + 3)) / 0.5


def on_a_tie(seed: int, terms: int = 1000) -> tuple[onnx.ModelProto, Mapping[str, Array]]:
    """A product of equal inputs with equal weights whose every value is 20.5 codes, but for rounding errors."""
    net = Net("s8", False, seed)
    scale = net.scale(None, 0.02, 0.1)
    x, w = net.qdq(net.input(1, terms), scale, 0), net.weights((terms, 50), None, fill=7)
    total = float(scale) * float(net.scale_of(w)) * terms * 11 * 7
    model = net.output(net.qdq(net.node("MatMul", x, w), total / 20.5, 3))
    return model, {"x": np.full((1, terms), np.float32(11) * scale)}


def test_any_share_of_codes_may_differ_next_to_a_tie() -> None:
    """Errors of equal terms have one sign, so that the bound must grow with their number."""
    shares = []
    for seed in range(12):
        model, inputs = on_a_tie(seed)
        *_, verdict = verify("tie", model, [inputs]).tensors
        shares.append(verdict.one_lsb / verdict.total)
        assert (verdict.tie_distance > 0) == (verdict.one_lsb > 0)
    assert max(shares) == 1


def test_float_nodes_run_on_the_same_kernels() -> None:
    """Optimized, ONNX Runtime computes this Conv in blocks of channels and in another order."""
    net = Net("s8", False)
    weights = net.constant(net.rng.normal(0, 0.05, (64, 64, 3, 3)).astype(np.float32))
    node = net.node("Conv", net.input(4, 64, 24, 24), weights, pads=[1, 1, 1, 1])
    model = net.output(net.qdq(node, 0.02))
    (verdict,) = verify("file", model, [{"x": net.rng.normal(0, 1, (4, 64, 24, 24)).astype(np.float32)}]).tensors
    assert verdict.equal == verdict.total


def test_quantized_weights_of_a_float_input_are_no_contradiction() -> None:
    """No scale is found at run time unless a back end is asked for it."""
    net = Net("s8", False)
    node = net.node("Conv", net.input("N", 3, 6), net.weights((2, 3, 3), 0))
    model = net.output(net.qdq(node, 0.1))
    (verdict,) = verify("file", model, [feed(model)]).tensors
    assert verdict.equal == verdict.total


def test_float_operations_of_both_sides_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("s8", False)
    model = net.output(FLOAT_IN_ORT["two grids"](net))
    right = numerics.quantize
    verify("file", model, [feed(model, 200)])
    monkeypatch.setattr(numerics, "quantize", lambda x, *rest: right(x * np.float32(1 + 2**-12), *rest))
    with pytest.raises(ContradictionError, match="inf times"):
        verify("file", model, [feed(model, 200)])


# Outputs


class Shifted:
    """A program whose outputs are some codes too high."""

    def __init__(self, program: Program, codes: int) -> None:
        self.tensors, self.steps, self._program, self._codes = program.tensors, program.steps, program, codes

    def run_codes(self, inputs: Mapping[str, Array], *rest: object) -> object:
        result = self._program.run_codes(inputs, *rest)  # type: ignore[arg-type]  # passed on as it came
        if not rest:
            for name, entry in result.codes.items():
                result.outputs[name] = result.outputs[name] + np.float32(self._codes * entry.params.scale)
        return result


@pytest.mark.parametrize("codes", [0, 1, 3])
def test_outputs_are_compared_with_optimized_onnxruntime(
    codes: int, torch_digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The distance at the outputs is measured in codes, apart from that tensor by tensor."""
    monkeypatch.setattr(
        MODULE, "load_program", lambda model, reference: Shifted(load_program(model, reference=reference), codes)
    )
    monkeypatch.setattr(MODULE, "integer_kernels", lambda model: (0, False))
    verdict = verify("file", torch_digits.quantized(INTEGER), few(torch_digits))
    assert verdict.max_lsb == codes
    assert verdict.mismatch_fraction == float(codes > 0)


@pytest.mark.parametrize(
    ("one_lsb", "more", "tie_distance", "allowed"),
    [(0, 0, 0, True), (1000, 0, 1, True), (1, 0, 1.01, False), (0, 1, 0, False), (1, 0, float("inf"), False)],
)
def test_what_is_allowed(one_lsb: int, more: int, tie_distance: float, allowed: bool) -> None:
    assert TensorVerdict("t", 1000 - one_lsb - more, one_lsb, more, tie_distance).allowed is allowed
