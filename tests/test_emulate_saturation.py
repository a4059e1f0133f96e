"""Sums of products that saturate, against the same sums in Python integers."""

import itertools

import numpy as np
import pytest

from onnxqt.emulate.kernels.products import accumulate_within, conv, saturating_conv, saturating_matmul
from onnxqt.emulate.kernels.windows import Window
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.requantize import Requantization, openvino_scaling, requantization, requantize

WINDOW = Window((2, 3), (2, 1), (1, 2), (1, 2, 0, 1))


def clipped(value: int) -> int:
    return max(-(2**15), min(2**15 - 1, value))


def pairs_of(products: list[int]) -> tuple[int, int]:
    """The sum of the products by saturating pairs, and how many pairs saturated."""
    sums = [sum(products[i : i + 2]) for i in range(0, len(products), 2)]
    return sum(map(clipped, sums)), sum(clipped(value) != value for value in sums)


def codes(*shape: int, seed: int) -> Array:
    """Unsigned codes, most of them near the ends."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < 0.7, rng.integers(240, 256, shape), rng.integers(0, 256, shape))


def weights(*shape: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    return np.asarray(rng.choice([-127, -120, 120, 127, 3], shape))


def defined(x: Array, w: Array, group: int, zero_point: int) -> tuple[Array, int]:
    """The convolution value by value: padding adds nothing, the zero point leaves the finished sum."""
    batch, _, height, width = x.shape
    outputs, depth = w.shape[:2]
    rows = (height + 1 - 2) // 2 + 1
    columns = (width + 3 - 5) // 1 + 1
    acc, count = np.zeros((batch, outputs, rows, columns), np.int64), 0
    for n, m, i, j in itertools.product(range(batch), range(outputs), range(rows), range(columns)):
        first = m // (outputs // group) * depth
        for a, b in itertools.product(range(2), range(3)):
            row, column = 2 * i + a - 1, j + 2 * b - 2
            if 0 <= row < height and 0 <= column < width:
                taps = [int(w[m, c, a, b]) for c in range(depth)]
                values = [int(x[n, first + c, row, column]) for c in range(depth)]
                total, saturated = pairs_of([u * v for u, v in zip(taps, values, strict=True)])
                acc[n, m, i, j] += total - zero_point * sum(taps)
                count += saturated
    return acc, count


@pytest.mark.parametrize(
    ("channels", "outputs", "group"), [(16, 3, 1), (3, 4, 1), (1, 2, 1), (5, 3, 1), (6, 4, 2), (10, 4, 2), (4, 8, 4)]
)
@pytest.mark.parametrize("zero_point", [0, 37, 255])
def test_pairs_of_adjacent_channels_saturate(channels: int, outputs: int, group: int, zero_point: int) -> None:
    x, w = codes(2, channels, 5, 6, seed=channels), weights(outputs, channels // group, 2, 3, seed=outputs)
    acc, count = saturating_conv(x, w, WINDOW, group, zero_point)
    expected, saturated = defined(x, w, group, zero_point)
    np.testing.assert_array_equal(acc, expected)
    assert count == saturated
    assert (count > 0) == (channels // group > 1)


def test_without_saturation_the_sums_are_those_of_a_convolution() -> None:
    x, w = codes(2, 7, 5, 6, seed=0), weights(4, 7, 2, 3, seed=1) // 2
    acc, count = saturating_conv(x, w, WINDOW, 1, 101)
    np.testing.assert_array_equal(acc, conv(x - 101, w, WINDOW, 1))
    assert count == 0


def test_the_zero_point_is_not_subtracted_before_the_product() -> None:
    x, w = np.full((1, 2, 1, 1), 200), np.full((1, 2, 1, 1), 127)
    acc, count = saturating_conv(x, w, Window((1, 1), (1, 1), (1, 1), (0, 0, 0, 0)), 1, 200)
    assert (int(acc[0, 0, 0, 0]), count) == (32767 - 200 * 254, 1)


@pytest.mark.parametrize("depth", [1, 2, 7, 32])
def test_a_matrix_product_saturates_by_pairs(depth: int) -> None:
    x, w = codes(6, depth, seed=depth), weights(depth, 5, seed=2)
    acc, count = saturating_matmul(x, w)
    rows = [[pairs_of([int(u) * int(v) for u, v in zip(a, b, strict=True)]) for b in w.T] for a in x]
    np.testing.assert_array_equal(acc, [[total for total, _ in row] for row in rows])
    assert count == sum(saturated for row in rows for _, saturated in row)


@pytest.mark.parametrize("off", [-1, 1])
def test_the_limits_of_a_pair_are_exact(off: int) -> None:
    # 255 * 127 + 255 * 1 + 127 = 32767 is the last sum that fits, 255 * -127 - 255 - 128 = -32768 the first
    top = saturating_matmul(np.array([[255, 127 + off]]), np.array([[128], [1]]))
    assert (int(top[0][0, 0]), top[1]) == (min(255 * 128 + 127 + off, 32767), int(off == 1))
    low = saturating_matmul(np.array([[255, 128 + off]]), np.array([[-128], [-1]]))
    assert (int(low[0][0, 0]), low[1]) == (max(-255 * 128 - 128 - off, -32768), int(off == 1))


@pytest.mark.parametrize("bits", [16, 20, 32, 34, 48])
def test_narrow_registers(bits: int) -> None:
    edge = 1 << (bits - 1)
    values = [0, edge - 1, edge, -edge, -edge - 1, 3 * edge + 5, -5 * edge - 7]
    acc = np.array(values, np.int64)
    wrapped, count = accumulate_within(acc, bits, "wrap")
    assert wrapped.tolist() == [(value + edge) % (2 * edge) - edge for value in values]
    assert count == 4
    saturated, count = accumulate_within(acc, bits, "saturate")
    assert saturated.tolist() == [max(-edge, min(edge - 1, value)) for value in values]
    assert count == 4
    unchanged, count = accumulate_within(acc, bits, "error")
    assert (unchanged.tolist(), count) == (values, 4)


def grid_of(zero_point: int, scale: float, signed: bool) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), Grid(8, signed))


def openvino(zero_point: int, scale: float, signed: bool, bias: float | None) -> Requantization:
    added = None if bias is None else np.array([bias], np.float32)
    weight = np.array([0.25], np.float32)
    return requantization("openvino", np.array(0.5, np.float32), weight, grid_of(zero_point, scale, signed), added)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bias", [None, 0.0, 0.25])
def test_openvino_adds_the_zero_point_before_it_rounds(signed: bool, bias: float | None) -> None:
    # accumulators of 1/8 on a grid of 1/4: every second one is a tie, which an odd zero point turns the other way
    acc = np.arange(-40, 41)
    for zero_point in (7, 8):
        actual = requantize(acc, openvino(zero_point, 0.25, signed, bias))
        eighths = [int(value) + int(8 * (bias or 0)) + 2 * zero_point for value in acc]
        low, high = (-128, 127) if signed else (0, 255)
        expected = [max(low, min(high, round(value / 2))) for value in eighths]
        assert actual.tolist() == expected


def test_openvino_scales_by_the_ends_of_the_grid() -> None:
    moved = 0
    for scale in np.random.default_rng(0).uniform(0.001, 0.1, 50).astype(np.float32):
        factor, shift = openvino_scaling(openvino(165, float(scale), False, 0.0))
        low, high = np.float32(-165) * scale, np.float32(255 - 165) * scale
        assert factor == np.float32(255) / (high - low)
        assert shift == np.float32(-low * np.float32(255)) / (high - low)  # the product first
        assert abs(float(shift) - 165) < 1e-4  # a few float32 roundings of values below 256
        moved += bool(shift != -low * factor)
    assert moved > 0
