"""What every scheme promises, on every fixture."""

import itertools
from collections.abc import Callable

import numpy as np
import onnx
import pytest
from conftest import FIXTURES, Digits
from onnx import TensorProto, helper, numpy_helper

from onnxqt.emulate import load_program
from onnxqt.numerics import Array
from onnxqt.runtime import Session
from onnxqt.schemes import Scheme, parse_scheme
from onnxqt.verify import MAX_LSB, verify

SCHEMES = [
    f"w{weight}a{activation}-{symmetry}-{granularity}"
    for weight, activation, symmetry, granularity in itertools.product(
        range(2, 9), (8, 4), ("sym", "asym"), ("pt", "pc")
    )
]
CASES = [pytest.param(scheme, name, id=f"{scheme}-{name}") for scheme in SCHEMES for name in FIXTURES]


def weight_codes(model: onnx.ModelProto) -> list[Array]:
    """The stored codes behind every DequantizeLinear of a constant, without the INT32 biases."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    read = [node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"]
    tensors = [stored[name] for name in read if name in stored and stored[name].data_type != TensorProto.INT32]
    return [numpy_helper.to_array(tensor).astype(np.int32) for tensor in tensors]


def runtime_codes(model: onnx.ModelProto, digits: Digits) -> dict[str, Array]:
    """Codes of every quantized activation, by the name of its real tensor, as ONNX Runtime computes them plainly."""
    codes = {name: tensor.codes for name, tensor in load_program(model).tensors.items()}
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(codes.values()))
    values = Session(tapped, optimize=False).run(digits.inputs)
    return {name: values[code].astype(np.int32) for name, code in codes.items()}


def check_codes(scheme: Scheme, model: onnx.ModelProto, digits: Digits, activations: dict[str, Array]) -> None:
    limit = 2 ** (scheme.weight_bits - 1) - 1
    weights = weight_codes(model)
    assert len(weights) == len(digits.plan.weights)
    for codes in weights:
        assert -limit <= codes.min() < codes.max() <= limit
    sites = {name: site for site in digits.plan.activations for name in (site.tensor, f"{site.tensor}.dequantized")}
    assert len(activations) == len(digits.plan.activations)
    for name, codes in activations.items():
        bits = 8 if sites[name].io else scheme.activation_bits
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if scheme.symmetric else (0, 2**bits - 1)
        assert low <= codes.min() < codes.max() <= high


@pytest.mark.parametrize(("name", "fixture"), CASES)
def test_scheme(name: str, fixture: str, load_digits: Callable[[str], Digits]) -> None:
    scheme, digits = parse_scheme(name), load_digits(fixture)
    model = digits.quantized(scheme)
    activations = runtime_codes(model, digits)
    check_codes(scheme, model, digits, activations)

    verdict = verify(name, model, [digits.inputs])  # raises where a tensor's own arithmetic differs
    assert {tensor.tensor for tensor in verdict.tensors} == set(activations)
    if verdict.all_integer:
        assert verdict.max_lsb == 0
    elif scheme.activation_bits == 8:
        assert verdict.max_lsb <= MAX_LSB

    # With fewer bits, one code that rounds the other way in the middle can move an output by any number of codes.
    # So the bound holds for the samples on which nothing rounded differently before the output.
    emulated = load_program(model).run_codes(digits.inputs, tuple(activations)).codes
    apart = {tensor: np.abs(emulated[tensor].codes - codes) for tensor, codes in activations.items()}
    worst = {tensor: lsb.reshape(len(lsb), -1).max(axis=1) for tensor, lsb in apart.items()}
    outputs = digits.model.graph.outputs
    undisturbed = np.all([lsb == 0 for tensor, lsb in worst.items() if tensor not in outputs], axis=0)
    assert undisturbed.mean() > 0.5
    assert all(worst[output][undisturbed].max() <= MAX_LSB for output in outputs)
