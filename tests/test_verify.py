import importlib
import platform
from collections.abc import Callable, Mapping

import numpy as np
import onnx
import pytest
from conftest import FIXTURES, Digits
from onnx import numpy_helper

from onnxqt import numerics
from onnxqt.emulate import Program, load_program
from onnxqt.errors import ContradictionError
from onnxqt.numerics import Array, FloatArray, IntArray, QParams
from onnxqt.plan import IntegerNode
from onnxqt.schemes import DEFAULT_SCHEMES, parse_scheme
from onnxqt.verify import MAX_SHARE, TensorVerdict, verify

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


def tampered(model: onnx.ModelProto, weight: str) -> onnx.ModelProto:
    """The model with the sign of the largest code of one weight turned."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    (stored,) = (tensor for tensor in copy.graph.initializer if tensor.name == f"{weight}.codes")
    codes = numpy_helper.to_array(stored).copy()
    position = np.unravel_index(np.abs(codes.astype(np.int32)).argmax(), codes.shape)
    codes[position] = -codes[position]
    stored.CopyFrom(numpy_helper.from_array(codes, stored.name))
    return copy


def weighted_nodes(digits: Digits) -> dict[str, IntegerNode]:
    return {node.weight.tensor: node for node in digits.plan.integer_nodes if node.weight}


@pytest.mark.parametrize("position", [0, 2, -1])
def test_one_changed_weight_code_is_a_contradiction(
    digits: Digits, position: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed behind the emulator's back, it shows in the tensor that the weight goes into and in no other."""
    model = digits.quantized(INTEGER)
    weight, node = list(weighted_nodes(digits).items())[position]
    monkeypatch.setattr(MODULE, "load_program", lambda _: load_program(model))
    tensor = node.output if node.output in digits.model.graph.outputs else f"{node.output}.dequantized"
    with pytest.raises(ContradictionError) as caught:
        verify("w8a8-asym-pc", tampered(model, weight), few(digits, 48))
    assert caught.value.exit_code == 3
    assert f"'w8a8-asym-pc': the emulator and ONNX Runtime disagree on tensor '{tensor}'" in str(caught.value)
    assert "do not deploy this file" in str(caught.value)


def test_same_change_in_both_copies_is_no_contradiction(digits: Digits) -> None:
    model = tampered(digits.quantized(INTEGER), next(iter(weighted_nodes(digits))))
    verify("file", model, few(digits))


@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize("name", SCHEMES)
def test_off_by_one_in_requantization_is_caught(
    name: str, fixture: str, load_digits: Callable[[str], Digits], monkeypatch: pytest.MonkeyPatch
) -> None:
    digits = load_digits(fixture)
    model, right = digits.quantized(parse_scheme(name)), numerics.requantize
    verify(name, model, few(digits))

    def wrong(acc: Array, multiplier: FloatArray, params: QParams) -> IntArray:
        return np.clip(right(acc, multiplier, params) + 1, params.grid.qmin, params.grid.qmax)

    monkeypatch.setattr(numerics, "requantize", wrong)
    with pytest.raises(ContradictionError, match=name):
        verify(name, model, few(digits))


class Shifted:
    """A program whose outputs are some codes too high."""

    def __init__(self, program: Program, codes: int) -> None:
        self.tensors, self._program, self._codes = program.tensors, program, codes

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
    monkeypatch.setattr(MODULE, "load_program", lambda model: Shifted(load_program(model), codes))
    monkeypatch.setattr(MODULE, "integer_kernels", lambda model: (0, False))
    verdict = verify("file", torch_digits.quantized(INTEGER), few(torch_digits))
    assert verdict.max_lsb == codes
    assert verdict.mismatch_fraction == float(codes > 0)


@pytest.mark.parametrize(
    ("one_lsb", "more", "allowed"),
    [(0, 0, True), (10, 0, True), (11, 0, False), (0, 1, False)],
)
def test_what_is_allowed(one_lsb: int, more: int, allowed: bool) -> None:
    assert MAX_SHARE == 0.01
    assert TensorVerdict("t", 1000 - one_lsb - more, one_lsb, more).allowed is allowed


def test_one_code_may_differ_in_a_tiny_tensor() -> None:
    assert TensorVerdict("t", 9, 1, 0).allowed
    assert not TensorVerdict("t", 8, 2, 0).allowed
