"""Grids with one scale per block of consecutive values along an axis (ONNX DequantizeLinear, opset 21)."""

import numpy as np
import pytest

from onnxqt.numerics import Array, Grid, QParams, dequantize, fake_quantize, quantize, spread

INT4, UINT4 = Grid(4, signed=True, narrow=True), Grid(4, signed=False)
SHAPES = {"rows": ((7, 3), 0), "columns": ((3, 7), 1), "conv": ((2, 7, 3, 2), 1), "stack": ((2, 7, 3), -2)}
EACH_SHAPE = pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
SIZE = 3  # so that the last of three blocks has a single value


def blocked(shape: tuple[int, ...], axis: int, grid: Grid = UINT4) -> QParams:
    rng = np.random.default_rng(0)
    blocks = [-(-size // SIZE) if i == axis % len(shape) else size for i, size in enumerate(shape)]
    scale = rng.choice([0.25, 0.5, 0.3], blocks).astype(np.float32)
    zero_point = rng.integers(0, 6, blocks) * (not grid.signed)
    return QParams(scale, zero_point.astype(np.int32), grid, axis, SIZE)


def one_by_one(x: Array, params: QParams) -> Array:
    """Codes by the definition, value by value: that of index i along the axis has the scale of block i // size."""
    codes = np.empty(x.shape, np.int32)
    axis = (params.axis or 0) % x.ndim
    for index in np.ndindex(x.shape):
        block = tuple(i // SIZE if d == axis else i for d, i in enumerate(index))
        steps = np.rint(x[index] / params.scale[block]) + params.zero_point[block]
        codes[index] = np.clip(steps, params.grid.qmin, params.grid.qmax)
    return codes


@EACH_SHAPE
@pytest.mark.parametrize("grid", [INT4, UINT4], ids=["int4", "uint4"])
def test_each_block_has_its_own_scale(shape: tuple[int, ...], axis: int, grid: Grid) -> None:
    params = blocked(shape, axis, grid)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32) * 3
    x.flat[:4] = [0.125, -0.125, 100, -100]  # ties and values outside the grid
    codes = quantize(x, params)
    np.testing.assert_array_equal(codes, one_by_one(x, params))
    scale, zero_point = (spread(values, params, shape) for values in (params.scale, params.zero_point))
    np.testing.assert_array_equal(dequantize(codes, params), (codes - zero_point).astype(np.float32) * scale)
    np.testing.assert_array_equal(fake_quantize(x, params), dequantize(codes, params))
    assert codes.dtype == np.dtype(np.int32)


@EACH_SHAPE
def test_values_on_the_grid_stay(shape: tuple[int, ...], axis: int) -> None:
    params = blocked(shape, axis)
    on_grid = dequantize(np.random.default_rng(2).integers(0, 16, shape), params)
    np.testing.assert_array_equal(fake_quantize(on_grid, params), on_grid)


def test_a_block_as_long_as_the_axis_is_a_channel() -> None:
    x = np.random.default_rng(3).normal(size=(5, 4)).astype(np.float32)
    scale, zero = np.array([0.1, 0.2, 0.3, 0.4], np.float32), np.zeros(4, np.int32)
    block = QParams(scale[None], zero[None], INT4, 0, 5)
    np.testing.assert_array_equal(quantize(x, block), quantize(x, QParams(scale, zero, INT4, 1)))


@pytest.mark.parametrize(
    ("axis", "size", "zero_point", "message"),
    [
        (None, 3, (3, 3), "blocks of 3 along axis None: expected an axis and a size >= 1"),
        (0, 0, (3, 3), "blocks of 0 along axis 0: expected an axis and a size >= 1"),
        (0, 3, (3,), r"blocks have scales \(3, 3\) and zero points \(3,\): expected one shape, of the rank of the ten"),
    ],
)
def test_blocks_that_cannot_be_are_refused(
    axis: int | None, size: int, zero_point: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        QParams(np.ones((3, 3), np.float32), np.zeros(zero_point, np.int32), INT4, axis, size)


@pytest.mark.parametrize("shape", [(7, 4), (6, 3), (10, 3), (7, 3, 1)])
def test_blocks_must_cover_the_tensor(shape: tuple[int, ...]) -> None:
    params = QParams(np.ones((3, 3), np.float32), np.zeros((3, 3), np.int32), INT4, 0, 3)
    assert quantize(np.zeros((7, 3), np.float32), params).shape == (7, 3)
    with pytest.raises(ValueError, match=r"blocks of 3 along axis 0 of .* take scales .*: got \(3, 3\)$"):
        quantize(np.zeros(shape, np.float32), params)
