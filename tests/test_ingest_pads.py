"""Pad becomes the padding of what reads it, only where that is exact."""

from collections.abc import Mapping

import numpy as np
import pytest
from helpers import build, ingested, inputs_of, normal, operators, relative_error, run

from onnxqt.numerics import Array

# The same products in the same order, padded elsewhere: ONNX Runtime may block its sums in another way.
PAD_ERROR = 1e-6

PADS: Mapping[str, Array] = {
    "sides": np.array([0, 0, 1, 2, 0, 0, 3, 0]),
    "batch": np.array([1, 0, 1, 1, 0, 0, 1, 1]),
    "channels": np.array([0, 1, 1, 1, 0, 0, 1, 1]),
    "crop": np.array([0, 0, -1, 0, 0, 0, 1, 1]),
    "ones": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    "width": np.array([1, 2]),
    "last": np.array([-1]),
    "zero": np.array(0, np.float32),
    "one": np.array(1, np.float32),
    "w": normal(3, 4, 3, 3),
    "w5": normal(3, 5, 3, 3),
}
X = "(float[n,4,6,6] x) => (float[] y)"


def check(nodes: str, expected: list[str], opset: int = 17) -> None:
    words = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    before = build(f"{X} {{ {nodes} }}", {name: value for name, value in PADS.items() if name in words}, opset)
    model = ingested(before)
    assert operators(model.proto) == expected
    inputs = inputs_of(before)
    for name, value in run(before, inputs).items():
        actual = run(model.proto, inputs)[name]
        assert actual.shape == value.shape
        assert relative_error(actual, value) <= PAD_ERROR
    assert not ingested(model.proto).changes


FOLDED = {
    "conv": ("p = Pad(x, sides) y = Conv(p, w)", ["Conv"]),
    "explicit-zero": ("p = Pad(x, sides, zero) y = Conv(p, w)", ["Conv"]),
    "conv-that-pads-too": ("p = Pad(x, sides) y = Conv<pads = [1, 0, 0, 2], strides = [2, 1]>(p, w)", ["Conv"]),
    "valid": ('p = Pad(x, sides) y = Conv<auto_pad = "VALID">(p, w)', ["Conv"]),
    "two-convs": ("p = Pad(x, sides) a = Conv(p, w) b = Conv(p, w) y = Add(a, b)", ["Conv", "Conv", "Add"]),
    "average-pool": (
        "p = Pad(x, ones) y = AveragePool<kernel_shape = [3, 3], strides = [2, 2]>(p)",
        ["AveragePool"],
    ),
    "average-pool-that-counts": (
        "p = Pad(x, ones) y = AveragePool<kernel_shape = [3, 3], pads = [1, 0, 0, 1], count_include_pad = 1>(p)",
        ["AveragePool"],
    ),
}


@pytest.mark.parametrize(("nodes", "expected"), FOLDED.values(), ids=FOLDED)
def test_padding_that_is_folded(nodes: str, expected: list[str]) -> None:
    check(nodes, expected)


def test_padding_of_named_axes() -> None:
    check("p = Pad(x, width, zero, last) y = Conv(p, w)", ["Conv"], opset=18)


KEPT = {
    "not-zero": "p = Pad(x, sides, one) y = Conv(p, w)",
    "batch": "p = Pad(x, batch) y = Conv(p, w)",
    "channels": "p = Pad(x, channels) y = Conv(p, w5)",
    "crop": "p = Pad(x, crop) y = Conv(p, w)",
    "reflect": 'p = Pad<mode = "reflect">(x, ones) y = Conv(p, w)',
    "same": 'p = Pad(x, sides) y = Conv<auto_pad = "SAME_UPPER">(p, w)',
    "another-reader": "p = Pad(x, sides) c = Conv(p, w) m = ReduceMax(p) y = Add(c, m)",
    "max-pool": "p = Pad(x, ones) y = MaxPool<kernel_shape = [3, 3]>(p)",
    "pool-that-does-not-count": (
        "p = Pad(x, ones) y = AveragePool<kernel_shape = [3, 3], pads = [1, 0, 0, 1], count_include_pad = 0>(p)"
    ),
    "pool-as-small-as-the-padding": "p = Pad(x, sides) y = AveragePool<kernel_shape = [3, 3]>(p)",
    "pool-that-rounds-up": (
        "p = Pad(x, ones) y = AveragePool<kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1>(p)"
    ),
}


@pytest.mark.parametrize("nodes", KEPT.values(), ids=KEPT)
def test_padding_that_stays(nodes: str) -> None:
    words = nodes.replace("(", " ").replace(")", " ").replace(",", " ").split()
    before = build(f"{X} {{ {nodes} }}", {name: value for name, value in PADS.items() if name in words})
    check(nodes, operators(before))


def test_padding_that_is_an_output_stays() -> None:
    text = "(float[n,4,6,6] x) => (float[] y, float[] p) { p = Pad(x, sides) y = Conv(p, w) }"
    before = build(text, {name: PADS[name] for name in ("sides", "w")})
    assert operators(ingested(before).proto) == ["Pad", "Conv"]
