"""Logarithmic grids, against levels that are written out one by one with `math`."""

import math

import numpy as np
import pytest
from helpers import build, ingested, normal
from onnx import ModelProto, numpy_helper

from onnxqt.calibrate import calibrate, tensors_of
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.data import open_samples
from onnxqt.emulate import load_program
from onnxqt.emulate.logarithmic import nearest_levels
from onnxqt.model import input_specs
from onnxqt.numerics import Array
from onnxqt.profiles import PROFILES, Precision

NNIE = PROFILES["nnie_log"]
LARGEST = (1.0, 6.0, 0.37, 123.4, 2.0**-9)


def nearest(x: float, largest: float) -> float:
    """The level of one value: of all levels of its sign, the one whose logarithm is nearest."""
    z = round(16 * math.log2(largest)) - 127
    if x == 0 or abs(x) < 2 ** ((z - (16 if x > 0 else 15)) / 16):
        return 0.0
    levels = range(0 if x > 0 else 1, 128)
    k = min(levels, key=lambda k: abs(16 * math.log2(abs(x)) - (k + z)))
    return math.copysign(2 ** ((k + z) / 16), x)


def values(largest: float) -> Array:
    """Magnitudes from far below the lowest level to beyond the top one, some 7 for each level, of both signs."""
    magnitudes = largest * np.exp2(np.random.default_rng(2).uniform(0, 0.01, 1300) + np.linspace(-11, 1, 1300))
    ends = largest * np.array([1, 1.5, 0.96, 2.0**-12, 0])
    x = np.concatenate([magnitudes, -magnitudes, ends, -ends])
    return np.asarray(x, np.float32)


@pytest.mark.parametrize("largest", LARGEST)
def test_each_value_takes_the_level_nearest_in_its_logarithm(largest: float) -> None:
    x = values(largest)
    found = nearest_levels(x, largest)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, np.array([nearest(float(value), largest) for value in x], np.float32))
    assert len(np.unique(found[found > 0])) == 128
    assert len(np.unique(found[found < 0])) == 127
    assert 0 < np.count_nonzero(found == 0) < x.size / 2


@pytest.mark.parametrize("largest", LARGEST)
def test_levels_stay_where_they_are(largest: float) -> None:
    levels = np.unique(nearest_levels(values(largest), largest))
    np.testing.assert_array_equal(nearest_levels(levels, largest), levels)
    positive = levels[levels > 0].astype(np.float64)
    np.testing.assert_allclose(positive[1:] / positive[:-1], 2 ** (1 / 16), rtol=2.0**-22)  # two float32 roundings


def test_the_top_level_is_the_power_of_two_next_to_the_largest() -> None:
    x = np.array([8, 9, 1e30, -8, -1e30, 7.9], np.float32)
    np.testing.assert_array_equal(nearest_levels(x, 8.0), np.array([8, 8, 8, -8, -8, 8], np.float32))
    assert nearest_levels(np.array([9.0], np.float32), 9.0) == np.float32(2 ** (51 / 16))  # 16 log2 9 = 50.7


def test_the_band_of_zero_is_wider_above_than_below() -> None:
    """z = 15 - 127: values are 0 up to 2^-8 above zero, and up to 2^(-127 / 16) below."""
    largest, edge, below = 2 ** (15 / 16), np.float32(2.0**-8), np.float32(2 ** (-127 / 16))
    around = np.array([np.nextafter(edge, np.float32(0)), np.nextafter(edge, np.float32(1))])
    np.testing.assert_array_equal(nearest_levels(around, largest), np.array([0, 2.0**-7], np.float32))
    near = np.array([-below * np.float32(1 - 2.0**-20), -below * np.float32(1 + 2.0**-20)])
    np.testing.assert_array_equal(nearest_levels(near, largest), np.array([0, -(2 ** (-111 / 16))], np.float32))


@pytest.mark.parametrize("largest", [0.0, -1.0, math.nan, math.inf])
def test_a_largest_value_that_is_no_positive_number(largest: float) -> None:
    with pytest.raises(ValueError, match=f"the largest magnitude must be positive, got {largest}"):
        nearest_levels(np.ones(1, np.float32), largest)


# A network as the compiler of the profile makes it

WEIGHTS = {"w": normal(5, 3, 1, 1), "b": normal(5, seed=1), "g": normal(5, 4, seed=2), "c": normal(4, seed=3)}
TEXT = """(float[n,3,4,4] x) => (float[] y) {
    k = Conv(x, w, b) p = MaxPool<kernel_shape = [2, 2]>(k) m = GlobalAveragePool(p) f = Flatten(m) y = Gemm(f, g, c)
}"""


def compiled() -> ModelProto:
    model = ingested(build(TEXT, WEIGHTS))
    plan = compiler_plan(model, NNIE.policy)
    samples = open_samples({"x": normal(64, 3, 4, 4, seed=4)}, input_specs(model))
    ranges = calibrate(model, tensors_of([plan]), samples)
    return compile_model(model, ranges, plan, NNIE.policy, Precision(8, 8))


def tops(model: ModelProto) -> dict[str, float]:
    """What the top code of each quantizer stands for, by the tensor that it reads."""
    constants = {c.name: numpy_helper.to_array(c) for c in model.graph.initializer}
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert all(constants[node.input[2]].dtype == np.int8 for node in quantizers)
    return {node.input[0]: float(constants[node.input[1]]) * 127 for node in quantizers}


def on_levels(x: Array, largest: float) -> Array:
    return np.array([nearest(float(value), largest) for value in x.ravel()], np.float32).reshape(x.shape)


def expected(model: ModelProto, x: Array) -> Array:
    """The network by hand, in float64 between the levels."""
    top = tops(model)
    weights = {name: on_levels(WEIGHTS[name], float(np.abs(WEIGHTS[name]).max())).astype(np.float64) for name in "wg"}
    x = on_levels(x, top["x"])
    conv = np.einsum("nchw,oc->nohw", x, weights["w"][:, :, 0, 0]) + WEIGHTS["b"][:, None, None]
    conv = on_levels(conv.astype(np.float32), top["k"])
    windows = [conv[:, :, i : i + 3, j : j + 3] for i in range(2) for j in range(2)]
    mean = np.maximum.reduce(windows).mean((2, 3), dtype=np.float64)
    mean = on_levels(mean.astype(np.float32), top["m"]).astype(np.float64)
    return on_levels((mean @ weights["g"] + WEIGHTS["c"]).astype(np.float32), top["y.float"])


def test_program_computes_with_levels() -> None:
    model = compiled()
    top = tops(model)
    assert set(top) == {"x", "k", "p", "m", "f", "y.float"}
    assert (top["p"], top["f"]) == (top["k"], top["m"])  # codes that only move keep their levels
    x = normal(6, 3, 4, 4, seed=5)
    (found,) = load_program(model, NNIE.arithmetic).run({"x": x}).values()
    # Levels are 4 % apart: what differs in the last bits of float32 sums is rounded away, unless it stands on a tie.
    np.testing.assert_array_equal(found, expected(model, x))
    (other,) = load_program(model).run({"x": x}).values()
    assert not np.array_equal(found, other)


def test_program_says_what_runs_on_levels() -> None:
    model = compiled()
    infos = load_program(model, NNIE.arithmetic).nodes
    assert {info.op_type: info.kind for info in infos} == {
        "QuantizeLinear": "boundary",
        "DequantizeLinear": "boundary",
        **dict.fromkeys(("Conv", "MaxPool", "GlobalAveragePool", "Flatten", "Gemm"), "integer"),
    }
    for info in infos:
        assert (info.rule, info.implementation) == ("log16", "levels in float32")


def test_weights_of_the_file_are_float_and_the_program_moves_them_to_levels() -> None:
    """Of unit vectors, a Conv without bias makes its weights."""
    model = ingested(build("(float[n,3,1,1] x) => (float[] y) { y = Conv(x, w) }", WEIGHTS))
    plan = compiler_plan(model, NNIE.policy)
    ranges = calibrate(model, tensors_of([plan]), open_samples({"x": normal(64, 3, 1, 1)}, input_specs(model)))
    file = compile_model(model, ranges, plan, NNIE.policy, Precision(8, 8))
    steps = load_program(file, NNIE.arithmetic).steps
    (step,) = (step for step in steps if step.info.op_type == "Conv")
    largest = float(np.abs(WEIGHTS["w"]).max())
    levels = on_levels(WEIGHTS["w"], largest)
    assert not np.array_equal(levels, WEIGHTS["w"])
    (found,) = step.run(np.eye(3, dtype=np.float32).reshape(3, 3, 1, 1))
    np.testing.assert_array_equal(found[:, :, 0, 0], levels[:, :, 0, 0].T)


def test_what_is_on_no_grid_is_float_and_says_so() -> None:
    file = build("(float[2,3] x) => (float[] y) { a = Tanh(x) y = Mul(a, a) }")
    infos = load_program(file, NNIE.arithmetic).nodes
    assert [(info.op_type, info.kind, info.reason) for info in infos] == [
        ("Tanh", "float", "its input is on no grid"),
        ("Mul", "float", "its input is on no grid"),
    ]
