"""Every rounding rule against its definition in exact rational arithmetic."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from helpers import build, run
from test_requantize import f32

from onnxqt.numerics import (
    ROUNDINGS,
    Array,
    Grid,
    QParams,
    Rounding,
    affine,
    along_axis,
    dequantize,
    fake_quantize,
    quantize,
    round_half_even,
    saturated,
)
from onnxqt.requantize import Requantization, requantize

GRIDS = {
    "int8": Grid(8, signed=True),
    "uint8": Grid(8, signed=False),
    "int8-narrow": Grid(8, signed=True, narrow=True),
    "int4": Grid(4, signed=True),
    "uint4": Grid(4, signed=False),
    "int3-narrow": Grid(3, signed=True, narrow=True),
}
EACH_GRID = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
EACH_SCALE = pytest.mark.parametrize("pow2", [False, True], ids=["random", "pow2"])


def make_params(grid: Grid, pow2: bool, channels: int | None = None, axis: int | None = None) -> QParams:
    """Scales around 0.05 and odd zero points, off the middle of the grid."""
    rng = np.random.default_rng(channels or 0)
    scale = 2.0 ** rng.integers(-6, -3, channels) if pow2 else rng.uniform(0.02, 0.1, channels)
    zero_point = rng.integers(grid.qmin // 2, grid.qmax // 2 + 1, channels) | 1
    return QParams(np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), grid, axis)


def values_for(params: QParams, *shape: int) -> Array:
    """Values of which a third lie outside the grid, and a third on ties if the scale is a power of two."""
    rng = np.random.default_rng(3)
    lo, hi = params.range
    x = rng.uniform(2 * lo.min() - hi.max(), 2 * hi.max() - lo.min(), shape).astype(np.float32)
    ties = rng.integers(params.grid.qmin - 9, params.grid.qmax + 9, x.flat[::3].size) + 0.5
    x.flat[::3] = ties.astype(np.float32) * params.scale.max()
    x.flat[:4] = (0.0, -0.0, 1e30, -1e30)
    return x


def exact_code(x: float, scale: float, zero_point: int, grid: Grid) -> int:
    """Quotient rounded to float32, then exact; `round` of a Fraction takes ties to even."""
    steps = Fraction(float(np.float32(x) / np.float32(scale)))
    return max(grid.qmin, min(grid.qmax, round(steps) + zero_point))


@pytest.mark.parametrize(
    ("name", "qmin", "qmax"),
    [("int8", -128, 127), ("uint8", 0, 255), ("int8-narrow", -127, 127), ("int4", -8, 7), ("uint4", 0, 15)],
)
def test_ends_of_a_grid(name: str, qmin: int, qmax: int) -> None:
    assert (GRIDS[name].qmin, GRIDS[name].qmax) == (qmin, qmax)


def test_ties_round_to_even() -> None:
    x = np.array([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 2.49, -2.51], np.float32)
    np.testing.assert_array_equal(round_half_even(x), [-2, -2, 0, 0, 2, 2, 2, -3])


EXACT: Mapping[Rounding, Callable[[Fraction], int]] = {
    "even": round,
    "away": lambda x: math.floor(abs(x) + Fraction(1, 2)) * (1 if x > 0 else -1),
    "up": lambda x: math.floor(x + Fraction(1, 2)),
}


def edges(dtype: type[np.floating[Any]]) -> Array:
    """Ties, the numbers next to them, and numbers so large that they have no fraction."""
    ties = np.arange(-7, 8, dtype=dtype) / 2
    near = [np.nextafter(ties, dtype(side)) for side in (-np.inf, np.inf)]
    digits = np.finfo(dtype).nmant
    large = np.array([sign * (2.0 ** (digits + i) + 1) for sign in (1, -1) for i in (-1, 0, 1)], dtype)
    half = large[:2] * dtype(0.5)
    return np.concatenate([ties, *near, large, half, np.array([0.0, -0.0], dtype)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rounding", EXACT)
def test_each_rounding_is_its_definition(rounding: Rounding, dtype: type[np.floating[Any]]) -> None:
    x = edges(dtype)
    found = ROUNDINGS[rounding](x)
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, [EXACT[rounding](Fraction(float(value))) for value in x])


def test_each_rounding_has_a_definition_here() -> None:
    assert set(ROUNDINGS) == set(EXACT)


@EACH_GRID
@EACH_SCALE
@pytest.mark.parametrize("rounding", EXACT)
def test_quantize_rounds_as_it_is_told(rounding: Rounding, grid: Grid, pow2: bool) -> None:
    params = make_params(grid, pow2)
    x = values_for(params, 2, 3, 50)
    steps = [EXACT[rounding](Fraction(float(step))) for step in (x / params.scale).ravel()]
    expected = np.clip(np.array(steps, object) + int(params.zero_point), grid.qmin, grid.qmax)
    np.testing.assert_array_equal(quantize(x, params, rounding).ravel(), expected.astype(np.int64))


@dataclass(frozen=True)
class Affine:
    """The FakeQuantize of OpenVINO in exact fractions: every operation rounded to float32."""

    factor: Fraction
    shift: Fraction

    @classmethod
    def of(cls, params: QParams) -> "Affine":
        grid, scale, zero_point = params.grid, Fraction(float(params.scale)), int(params.zero_point)
        low, high = (f32(f32(end - zero_point) * scale) for end in (grid.qmin, grid.qmax))
        steps, span = grid.qmax - grid.qmin, f32(high - low)
        return cls(f32(steps / span), f32(f32(f32(-low * steps) / span) + grid.qmin))

    def code(self, x: float, grid: Grid) -> int:
        return max(grid.qmin, min(grid.qmax, round(f32(f32(Fraction(x) * self.factor) + self.shift))))


@EACH_GRID
@EACH_SCALE
def test_affine_quantization_is_its_formula(grid: Grid, pow2: bool) -> None:
    """And is another one than with the zero point after the rounding."""
    params = make_params(grid, pow2)
    x = values_for(params, 2, 3, 200)
    exact = Affine.of(params)
    factor, shift = affine(params)
    assert factor.dtype == shift.dtype == np.float32
    assert (Fraction(float(factor)), Fraction(float(shift))) == (exact.factor, exact.shift)
    found = quantize(x, params, "affine")
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found.ravel(), [exact.code(float(value), grid) for value in x.ravel()])
    other = quantize(x, params, "even")
    assert np.abs(found - other).max() <= 1
    assert np.any(found != other) or not pow2  # an odd zero point turns ties around
    assert {grid.qmin, grid.qmax} <= set(found.ravel().tolist())


def test_affine_ties_are_even_codes() -> None:
    params = QParams(np.array(0.25, np.float32), np.array(3, np.int32), GRIDS["uint8"])
    x = np.array([0.125, 0.375, 0.625, -0.125, -0.375], np.float32)  # codes 3.5, 4.5, 5.5, 2.5 and 1.5
    np.testing.assert_array_equal(quantize(x, params, "affine"), [4, 4, 6, 2, 2])
    np.testing.assert_array_equal(quantize(x, params, "even"), [3, 5, 5, 3, 1])


@EACH_GRID
def test_saturated_limits_integers_and_floats_of_any_size(grid: Grid) -> None:
    codes = np.array([0, grid.qmin, grid.qmin - 1, grid.qmax, grid.qmax + 1, 1 << 40, -(1 << 40), 300, -300])
    expected = np.clip(codes, grid.qmin, grid.qmax)
    for dtype in (np.int64, np.float32, np.float64):
        limited = saturated(codes.astype(dtype), grid)
        assert limited.dtype == np.int32
        np.testing.assert_array_equal(limited, expected)


def test_saturated_keeps_every_code_of_32_bits() -> None:
    codes = np.array([2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**31 - 2, 12345678901])
    expected = [2**31 - 1, 2**31 - 1, -(2**31), -(2**31), 2**31 - 2, 2**31 - 1]
    np.testing.assert_array_equal(saturated(codes, Grid(32, signed=True)), expected)


@EACH_GRID
@EACH_SCALE
def test_quantize_is_its_definition(grid: Grid, pow2: bool) -> None:
    params = make_params(grid, pow2)
    x = values_for(params, 2, 3, 50)
    codes = quantize(x, params)
    expected = [exact_code(v, float(params.scale), int(params.zero_point), grid) for v in x.ravel().tolist()]
    assert codes.dtype == np.int32
    np.testing.assert_array_equal(codes.ravel(), expected)
    assert {grid.qmin, grid.qmax} <= set(codes.ravel().tolist())


@EACH_GRID
@EACH_SCALE
@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_parameters_per_channel_belong_to_their_axis(grid: Grid, pow2: bool, axis: int) -> None:
    x = values_for(make_params(grid, pow2), 3, 4, 5)
    params = make_params(grid, pow2, x.shape[axis], axis)
    codes, real = quantize(x, params), fake_quantize(x, params)
    for channel in range(x.shape[axis]):
        alone = QParams(params.scale[channel], params.zero_point[channel], grid)
        one = np.take(x, channel, axis)
        np.testing.assert_array_equal(np.take(codes, channel, axis), quantize(one, alone))
        np.testing.assert_array_equal(np.take(real, channel, axis), fake_quantize(one, alone))


@EACH_GRID
@EACH_SCALE
def test_dequantize_is_its_definition(grid: Grid, pow2: bool) -> None:
    params = make_params(grid, pow2)
    codes = np.arange(grid.qmin, grid.qmax + 1)
    exact = [(code - int(params.zero_point)) * Fraction(float(params.scale)) for code in codes.tolist()]
    real = dequantize(codes, params)
    assert real.dtype == np.float32
    # A difference of codes has at most 9 bits and a scale 24: the product is exact in float64.
    np.testing.assert_array_equal(real, np.array([float(value) for value in exact]).astype(np.float32))


@EACH_GRID
@EACH_SCALE
def test_every_code_survives_the_way_through_its_value(grid: Grid, pow2: bool) -> None:
    params = make_params(grid, pow2)
    codes = np.arange(grid.qmin, grid.qmax + 1)
    np.testing.assert_array_equal(quantize(dequantize(codes, params), params), codes)


@pytest.mark.parametrize(("kind", "name"), [("int8", "int8"), ("uint8", "uint8")])
@EACH_SCALE
def test_quantize_is_that_of_onnx_runtime(kind: str, name: str, pow2: bool) -> None:
    params = make_params(GRIDS[name], pow2, channels=3, axis=1)
    x = values_for(make_params(GRIDS[name], pow2), 2, 3, 7)
    text = f"(float[2,3,7] x) => ({kind}[2,3,7] q, float[2,3,7] y) {{ q = QuantizeLinear<axis = 1>(x, s, z) "
    text += "y = DequantizeLinear<axis = 1>(q, s, z) }"
    model = build(text, {"s": params.scale, "z": params.zero_point.astype(kind)})
    outputs = run(model, {"x": x})
    np.testing.assert_array_equal(quantize(x, params), outputs["q"])
    np.testing.assert_array_equal(fake_quantize(x, params), outputs["y"])


def test_int32_codes_saturate_instead_of_wrapping() -> None:
    params = QParams(np.asarray(1.0, np.float32), np.asarray(0, np.int32), Grid(32, signed=True))
    x = np.array([3e9, -3e9, 2.0**31, 2.0**31 - 128], np.float32)
    np.testing.assert_array_equal(quantize(x, params), [2**31 - 1, -(2**31), 2**31 - 1, 2**31 - 128])


@EACH_GRID
@pytest.mark.parametrize("shift", [1, 4, 11])
def test_requantize_is_exact_where_the_multiplier_is_a_power_of_two(grid: Grid, shift: int) -> None:
    params = make_params(grid, pow2=True)
    limit = 2 * (grid.qmax - grid.qmin) << shift
    acc = np.random.default_rng(0).integers(-limit, limit, 500)
    acc[::2] = (acc[::2] >> shift << shift) + (1 << shift - 1)  # ties
    codes = requantize(acc, Requantization("float32_even", params, np.asarray(2.0**-shift, np.float32)))
    exact = [round(Fraction(value, 1 << shift)) + int(params.zero_point) for value in acc.tolist()]
    np.testing.assert_array_equal(codes, np.clip(exact, grid.qmin, grid.qmax))
    assert codes.dtype == np.int32


def test_requantize_rounds_large_accumulators_to_float32_first() -> None:
    params = QParams(np.asarray(1.0, np.float32), np.asarray(-3, np.int32), GRIDS["int8"])
    acc = np.array([2**24 + 2**17 + 1, 2**26 + 2**19 + 3, 2**24 - 1])
    multiplier = np.asarray(2.0**-18, np.float32)  # 64.5 + 2^-18 is a tie once the accumulator is a float32
    np.testing.assert_array_equal(
        requantize(acc, Requantization("float32_even", params, multiplier)), [64 - 3, 127, 64 - 3]
    )


def test_requantize_has_a_multiplier_per_channel() -> None:
    params = QParams(np.asarray(1.0, np.float32), np.asarray(5, np.int32), GRIDS["uint8"])
    acc = np.array([[[10, 11], [10, 11]]])
    multiplier = along_axis(np.array([0.5, 4.0], np.float32), 1, acc.ndim)
    np.testing.assert_array_equal(
        requantize(acc, Requantization("float32_even", params, multiplier)), [[[10, 11], [45, 49]]]
    )


def test_range_is_what_the_ends_of_the_grid_stand_for() -> None:
    params = QParams(np.asarray(0.5, np.float32), np.asarray(3, np.int32), GRIDS["uint4"])
    lo, hi = params.range
    assert (float(lo), float(hi)) == (-1.5, 6.0)


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan, np.inf])
def test_a_scale_is_finite_and_positive(scale: float) -> None:
    with pytest.raises(ValueError, match="scale must be finite and > 0"):
        QParams(np.array([1.0, scale], np.float32), np.zeros(2, np.int32), GRIDS["int8"], axis=0)
