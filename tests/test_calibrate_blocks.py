"""Parameters of weights in blocks, of weights alone, and of powers of two."""

import numpy as np
import pytest
from helpers import build, normal, prepare

from onnxqt.calibrate import Quantizers, unblocked, weight_clip
from onnxqt.numerics import Array, Grid, QParams, fake_quantize
from onnxqt.schemes import parse_scheme

LARGE = 37  # two blocks of 16 and one of 5
NETS = {
    "gemm": ("(float[n,37] x) => (float[] y) { y = Gemm(x, w, b) }", (LARGE, 3), 0),
    "gemm-transposed": ("(float[n,37] x) => (float[] y) { y = Gemm<transB = 1>(x, w, b) }", (3, LARGE), 1),
    "matmul": ("(float[n,37] x) => (float[] y) { m = MatMul(x, w) y = Add(m, b) }", (LARGE, 3), 0),
    "stack": ("(float[n,2,5,37] x) => (float[] y) { m = MatMul(x, w) y = Add(m, b) }", (2, LARGE, 3), 1),
    "conv": ("(float[n,37,6,6] x) => (float[] y) { y = Conv(x, w, b) }", (3, LARGE, 3, 2), 1),
    "grouped-conv": ("(float[n,74,6,6] x) => (float[] y) { y = Conv<group = 2>(x, w, c) }", (4, LARGE, 1, 2), 1),
    "convtranspose": ("(float[n,37,4,4] x) => (float[] y) { y = ConvTranspose(x, w, b) }", (LARGE, 3, 2, 2), 0),
}
EACH_NET = pytest.mark.parametrize(("text", "shape", "axis"), NETS.values(), ids=NETS)
UNBLOCKED = {
    "depthwise": (
        "(float[n,37,6,6] x) => (float[] y) { y = Conv<group = 37>(x, w) }",
        (LARGE, 1, 3, 3),
        "the 1 values along axis 1 are fewer than a block of 16",
    ),
    "few-inputs": (
        "(float[n,15,6,6] x) => (float[] y) { y = Conv(x, w) }",
        (4, 15, 3, 3),
        "the 15 values along axis 1 are fewer than a block of 16",
    ),
    "grouped-convtranspose": (
        "(float[n,64,4,4] x) => (float[] y) { y = ConvTranspose<group = 2>(x, w) }",
        (64, 3, 2, 2),
        "the groups of a ConvTranspose share its channels",
    ),
}


def quantizers_of(text: str, scheme: str, weight: Array) -> Quantizers:
    constants = {"w": weight, "b": normal(3, seed=5), "c": normal(4, seed=5)}
    return prepare(build(text, constants)).quantizers(scheme)


def blocks_of(weight: Array, axis: int, size: int) -> list[tuple[tuple[int, ...], Array]]:
    """Each block of a weight with its index among the scales."""
    count = -(-weight.shape[axis] // size)
    found = []
    for index in np.ndindex(*(count if d == axis else n for d, n in enumerate(weight.shape))):
        cut = [slice(i, i + 1) for i in index]
        cut[axis] = slice(index[axis] * size, (index[axis] + 1) * size)
        found.append((index, weight[tuple(cut)]))
    return found


@EACH_NET
@pytest.mark.parametrize("size", [16, 32])
def test_symmetric_blocks_have_the_scale_of_their_largest_magnitude(
    text: str, shape: tuple[int, ...], axis: int, size: int
) -> None:
    weight = normal(*shape)
    params = quantizers_of(text, f"w4a8-sym-b{size}", weight).weights["w"]
    assert (params.axis, params.block_size, params.grid) == (axis, size, Grid(4, signed=True, narrow=True))
    for index, block in blocks_of(weight, axis, size):
        assert params.scale[index] == np.float32(np.abs(block).max().astype(np.float64) / 7)
    assert not params.zero_point.any()


@EACH_NET
def test_asymmetric_blocks_span_their_extremes_and_zero(text: str, shape: tuple[int, ...], axis: int) -> None:
    weight = normal(*shape) + np.float32(0.5)
    params = quantizers_of(text, "w4af-asym-b16", weight).weights["w"]
    assert params.grid == Grid(4, signed=False)
    for index, block in blocks_of(weight, axis, 16):
        low, high = min(0.0, float(block.min())), max(0.0, float(block.max()))
        scale = np.float32((high - low) / 15)
        assert params.scale[index] == scale
        assert params.zero_point[index] == np.rint(-low / np.float64(scale))
    assert len(np.unique(params.zero_point)) > 1
    # Each value lies within half a step of its code, but for the ends, which the zero point moves by half a step more.
    assert (np.abs(fake_quantize(weight, params) - weight) <= 1.001 * params.scale.max()).all()


@EACH_NET
def test_blocks_are_finer_than_channels(text: str, shape: tuple[int, ...], axis: int) -> None:
    weight = normal(*shape) * np.linspace(0.1, 2, shape[axis]).reshape(
        [-1 if d == axis else 1 for d in range(len(shape))]
    )
    errors = [
        float(
            np.sum((fake_quantize(weight, quantizers_of(text, f"w4a8-sym-{form}", weight).weights["w"]) - weight) ** 2)
        )
        for form in ("b16", "b32", "pc")
    ]
    assert errors == sorted(errors)
    assert errors[0] < 0.8 * errors[2]


def test_a_block_of_zeros_borrows_the_largest_magnitude() -> None:
    weight = normal(LARGE, 3)
    weight[16:32, 1] = 0
    params = quantizers_of(NETS["matmul"][0], "w4a8-sym-b16", weight).weights["w"]
    assert params.scale[1, 1] == np.float32(np.float64(np.abs(weight).max()) / 7)
    everywhere = quantizers_of(NETS["matmul"][0], "w4af-asym-b16", np.zeros((LARGE, 3), np.float32)).weights["w"]
    assert np.isfinite(everywhere.scale).all()
    assert not fake_quantize(np.zeros((LARGE, 3), np.float32), everywhere).any()


@pytest.mark.parametrize(("text", "shape", "reason"), UNBLOCKED.values(), ids=UNBLOCKED)
def test_a_weight_without_blocks_is_per_channel_and_says_why(text: str, shape: tuple[int, ...], reason: str) -> None:
    weight = normal(*shape)
    found, per_channel = (quantizers_of(text, f"w4a8-sym-{form}", weight) for form in ("b16", "pc"))
    assert found.unblocked == {"w": reason}
    assert not per_channel.unblocked
    for field in ("scale", "zero_point"):
        np.testing.assert_array_equal(getattr(found.weights["w"], field), getattr(per_channel.weights["w"], field))
    assert (found.weights["w"].axis, found.weights["w"].block_size) == (per_channel.weights["w"].axis, None)


def test_a_weight_that_two_nodes_read_along_one_axis_has_blocks() -> None:
    text = "(float[n,37] x, float[n,37] z) => (float[] y, float[] u) { y = Gemm(x, w) u = MatMul(z, w) }"
    net = prepare(build(text, {"w": normal(LARGE, 3)}))
    assert net.quantizers("w4a8-sym-b16").weights["w"].block_size == 16
    assert not unblocked(net.plan, {"w": (LARGE, 3)}, parse_scheme("w4a8-sym-b16").grids)


# --- what is left out, and powers of two ----------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "dynamic"), [("w4af-sym-b16", False), ("w8a8-asym-pc-dyn", True)])
def test_activations_without_calibrated_scales_have_no_parameters(scheme: str, dynamic: bool) -> None:
    found = quantizers_of(NETS["conv"][0], scheme, normal(3, LARGE, 3, 2))
    assert (dict(found.activations), found.dynamic, found.ranges, found.scheme) == ({}, dynamic, "", scheme)


def test_a_large_bias_moves_no_scale_where_it_stays_float() -> None:
    text, shape, _ = NETS["gemm"]
    weight = normal(*shape) * np.float32(1e-6)
    net = prepare(build(text, {"w": weight, "b": np.array([1e5, 1, 0], np.float32)}))
    for scheme in ("w8a8-sym-b16", "w8af-sym-pc", "w8a8-asym-pc-dyn"):
        assert net.quantizers(scheme).weights["w"].scale.max() <= np.abs(weight).max() / 127 * 1.001
    assert net.quantizers("w8a8-sym-pc").weights["w"].scale.max() > np.abs(weight).max() / 127 * 2


@pytest.mark.parametrize("scheme", ["w8a8-sym-pc-pow2", "w4a8-asym-pt-pow2", "w4a8-sym-b16-pow2", "w8a16-sym-pc-pow2"])
def test_all_scales_are_powers_of_two(scheme: str) -> None:
    text, shape, _ = NETS["matmul"]
    found = quantizers_of(text, scheme, normal(*shape))
    for params in (*found.weights.values(), *found.activations.values()):
        mantissa, _ = np.frexp(params.scale)
        assert (mantissa == 0.5).all()
    weight = quantizers_of(text, scheme.removesuffix("-pow2"), normal(*shape)).weights["w"].scale
    if "-pt" not in scheme:  # per tensor the clip is searched among powers of two, which may lie below
        assert ((found.weights["w"].scale >= weight) & (found.weights["w"].scale < 2 * weight)).all()


def test_a_clip_is_searched_among_powers_of_two() -> None:
    """The least fourth power of the error over the scales that can be, not the next one above the best of all."""
    grid, weight = Grid(4, signed=True, narrow=True), normal(20_000)
    free = float(weight_clip(weight, 0, grid, per_channel=False)) / 7
    weight = weight * np.float32(1.05 * 0.25 / free)  # the best scale of all lies just above 1/4

    def error(scale: float) -> float:
        params = QParams(np.asarray(scale, np.float32), np.zeros((), np.int32), grid)
        return float(np.sum((fake_quantize(weight, params) - weight).astype(np.float64) ** 4))

    clip = float(weight_clip(weight, 0, grid, per_channel=False, power_of_two=True))
    chosen = 2.0 ** np.ceil(np.log2(clip / 7))
    # The clips that are tried reach down to 0.3 of the largest magnitude.
    tried = {2.0 ** np.ceil(np.log2(np.abs(weight).max() * f / 7)) for f in np.linspace(0.3, 1, 36)}
    assert len(tried) >= 2
    assert error(chosen) == min(map(error, tried))
    assert chosen == 0.25


def test_narrow_activations_leave_out_their_most_negative_code() -> None:
    text, shape, _ = NETS["matmul"]
    wide, narrow = (quantizers_of(text, f"w8a8-sym-pc{flag}", normal(*shape)) for flag in ("", "-narrow"))
    assert {params.grid.qmin for params in narrow.activations.values()} == {-127}
    for tensor, params in wide.activations.items():
        np.testing.assert_array_equal(params.scale, narrow.activations[tensor].scale)
