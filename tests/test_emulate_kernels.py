"""Kernels against exact arithmetic and ONNX Runtime's integer operators, called by name: certainly integer."""

import platform
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from onnxqt import numerics, requantize
from onnxqt.emulate.graph import open_graph
from onnxqt.emulate.kernels import add, moves, pooling, products
from onnxqt.emulate.kernels.products import Product
from onnxqt.emulate.kernels.windows import Window
from onnxqt.emulate.nodes.elementwise import regrid
from onnxqt.numerics import Array, Grid, IntArray, QParams
from onnxqt.profiles import Arithmetic
from onnxqt.requantize import requantization

U8, S8 = Grid(8, signed=False), Grid(8, signed=True)
X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason="QLinearAdd is fixed-point on other machines",
)


def ort_node(op: str, inputs: Mapping[str, Any], domain: str = "", opset: int = 17, **attributes: Any) -> Array:
    """The output of one operator; an input named "" is left out."""
    node = helper.make_node(op, list(inputs), ["out"], domain=domain, **attributes)
    fed = {name: value for name, value in inputs.items() if name}
    constants = [numpy_helper.from_array(np.asarray(value), name) for name, value in fed.items()]
    out = onnx.ValueInfoProto(name="out")
    graph = helper.make_graph([node], "g", [], [out], constants)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", "1")
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    result: Array = session.run(None, {})[0]
    return result


def qparams(scale: float, zero_point: int, grid: Grid = U8) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), grid)


def stored(codes: Any, grid: Grid) -> Array:
    return np.asarray(codes).astype(np.int8 if grid.signed else np.uint8)


def random_codes(rng: np.random.Generator, shape: tuple[int, ...], grid: Grid = U8) -> IntArray:
    return rng.integers(grid.qmin, grid.qmax + 1, shape).astype(np.int32)


GRIDS = pytest.mark.parametrize("grid", [U8, S8], ids=["u8", "s8"])
# Random scales; powers of two and simple ratios, where ties are frequent.
SCALES = pytest.mark.parametrize(
    ("s_in", "s_other", "s_out"),
    [(0.0213, 0.0371, 0.0457), (0.25, 0.125, 0.5), (0.03, 0.045, 0.06), (0.0625, 0.5, 0.0625)],
)

WINDOWS = pytest.mark.parametrize(
    ("size", "window"),
    [
        ((9, 7), Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))),
        ((9, 8), Window((3, 2), (2, 1), (1, 1), (0, 1, 2, 0))),
        ((11, 9), Window((2, 3), (2, 2), (3, 1), (1, 0, 0, 2))),
        ((8, 9), Window((3, 4), (2, 3), (1, 1), (0, 0, 0, 0), "SAME_UPPER")),
        ((8, 9), Window((4, 3), (3, 2), (1, 1), (0, 0, 0, 0), "SAME_LOWER")),
        ((8, 9), Window((2, 2), (1, 2), (1, 1), (0, 0, 0, 0), "VALID")),
        ((10,), Window((3,), (2,), (1,), (1, 0))),
    ],
)


def onnx_window(window: Window) -> dict[str, Any]:
    attributes: dict[str, Any] = {"kernel_shape": window.kernel, "strides": window.strides}
    attributes |= {"dilations": window.dilations, "auto_pad": window.auto_pad}
    return attributes | ({"pads": window.pads} if window.auto_pad == "NOTSET" else {})


@WINDOWS
@pytest.mark.parametrize(("channels", "out", "group"), [(4, 6, 1), (4, 6, 2), (5, 5, 5)])
def test_conv_is_conv_integer(size: tuple[int, ...], window: Window, channels: int, out: int, group: int) -> None:
    rng = np.random.default_rng(0)
    x = random_codes(rng, (2, channels, *size))
    w = random_codes(rng, (out, channels // group, *window.kernel), S8)
    feeds = {"x": stored(x, U8), "w": stored(w + 128, U8), "zx": np.uint8(77), "zw": np.uint8(128)}
    expected = ort_node("ConvInteger", feeds, group=group, **onnx_window(window))
    for dtype in (np.int64, np.float64):
        np.testing.assert_array_equal(products.conv(x - 77, w, window, group, dtype), expected)


@pytest.mark.parametrize(("channels", "out", "group"), [(4, 6, 1), (4, 6, 2), (5, 5, 5)])
@pytest.mark.parametrize(
    ("size", "window", "extra"),
    [
        ((5, 4), Window((3, 3), (2, 2), (1, 1), (1, 1, 1, 1)), (1, 1)),
        ((5, 4), Window((2, 3), (1, 3), (2, 1), (1, 0, 0, 2)), (0, 2)),
        ((6,), Window((4,), (2,), (1,), (1, 1)), (0,)),
    ],
)
def test_conv_transpose_is_onnx_runtime_on_integers(
    size: tuple[int, ...], window: Window, extra: tuple[int, ...], channels: int, out: int, group: int
) -> None:
    rng = np.random.default_rng(1)
    x = random_codes(rng, (2, channels, *size)) - 101
    w = random_codes(rng, (channels, out // group, *window.kernel), S8)
    # 5 channels x 9 taps x 154 x 128 < 2**24: float32 is exact
    expected = ort_node(
        "ConvTranspose",
        {"x": x.astype(np.float32), "w": w.astype(np.float32)},
        group=group,
        output_padding=extra,
        **onnx_window(window),
    )
    for dtype in (np.int64, np.float64):
        np.testing.assert_array_equal(products.conv_transpose(x, w, window, extra, group, dtype), expected)


@pytest.mark.parametrize("bound_is", ["float32", "float64", "int64"])
def test_matmul_is_exact_in_each_type(bound_is: str) -> None:
    rng = np.random.default_rng(2)
    top = {"float32": 100, "float64": 1 << 20, "int64": 1 << 30}[bound_is]
    a = rng.integers(-top, top + 1, (2, 3, 7))
    b = rng.integers(-top, top + 1, (2, 7, 5))
    expected = a.astype(object) @ b.astype(object)
    np.testing.assert_array_equal(products.matmul(a, b, 7 * top * top), expected)


def test_float32_is_allowed_up_to_24_bits_and_no_further() -> None:
    for total, parts in ((1 << 16, 1), ((1 << 16) + 1, 2)):
        weights = np.array([[total - 65000, 65000], [1, -2]], np.int32)
        assert len(products.exact_parts(weights, 0, 256)) == parts
    assert products.exact_parts(np.full((1, 200_000), 127, np.int32), 0, 255) == ()


def test_parts_add_up_and_stay_within_24_bits() -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(-255, 256, (3, 900)).astype(np.int32)
    weights[0] = np.arange(900) % 511 - 255
    parts = products.exact_parts(weights, 0, 255)
    assert [factor for factor, _ in parts] == [16, 1]
    np.testing.assert_array_equal(sum(factor * part for factor, part in parts), weights)
    for _, part in parts:
        assert int(np.abs(part).sum(axis=1).max()) * 255 <= 1 << 24


def test_channels_of_a_bound_follow_the_axis() -> None:
    weights = np.array([[[1, -2], [3, 4]], [[-5, 6], [7, 8]]], np.int32)
    np.testing.assert_array_equal(products.channel_sums(weights, 0), [10, 26])
    np.testing.assert_array_equal(products.channel_sums(weights, 1), [14, 22])
    np.testing.assert_array_equal(products.channel_sums(weights, -1), [16, 20])
    bias = np.array([100, -1], np.int32)
    assert products.accumulator_bound(np.array([10, 26]), 3, bias) == 130


@pytest.mark.parametrize(("zero_point", "grid", "expected"), [(0, U8, 255), (200, U8, 200), (-3, S8, 130)])
def test_reach_is_the_longer_side_of_the_grid(zero_point: int, grid: Grid, expected: int) -> None:
    assert products.reach(qparams(0.1, zero_point, grid)) == expected


@pytest.mark.parametrize("taps", [40, 2_000, 200_000])
def test_every_accumulator_is_the_definition(taps: int) -> None:
    rng = np.random.default_rng(4)
    weights = rng.integers(-127, 128, (taps, 3)).astype(np.int32)
    x = random_codes(rng, (2, taps))

    def float32(part: IntArray) -> Any:
        return lambda values: values @ part.astype(np.float32)

    product = Product(
        weights,
        np.array(1, np.float32),
        1,
        -1,
        float32,
        lambda v, dtype: v.astype(dtype) @ weights.astype(dtype),
    )
    bound = products.accumulator_bound(products.channel_sums(weights, 1), 255, None)
    expected = x.astype(np.int64) @ weights.astype(np.int64)
    names = []
    for reference in (False, True):
        accumulate, name = products.accumulator(product, 255, bound, reference)
        names.append(name)
        np.testing.assert_array_equal(accumulate(x), expected)
    assert names == [{40: "float32", 2_000: "float32 by nibbles", 200_000: "float64"}[taps], "float64"]


def test_beyond_53_bits_the_definition_accumulates_in_int64() -> None:
    weights = np.full((3, 1), (1 << 30) + 1, np.int32)
    product = Product(
        weights,
        np.array(1, np.float32),
        1,
        -1,
        lambda part: lambda x: x @ part,
        lambda v, dtype: v.astype(dtype) @ weights.astype(dtype),
    )
    x = np.full((1, 3), (1 << 30) + 1, np.int32)
    for bound, exact, name in (((1 << 53) + 1, True, "int64"), (1 << 53, False, "float64")):
        accumulate, implementation = products.accumulator(product, 255, bound, reference=True)
        assert implementation == name
        assert (int(accumulate(x)[0, 0]) == 3 * ((1 << 30) + 1) ** 2) is exact  # float64 drops the last bits


def test_wrapping_is_twos_complement_and_counted() -> None:
    acc = np.array([0, (1 << 31) - 1, 1 << 31, -(1 << 31), -(1 << 31) - 1, 5 << 32], np.int64)
    wrapped, count = products.accumulate_within(acc, 32, "wrap")
    np.testing.assert_array_equal(wrapped, [0, (1 << 31) - 1, -(1 << 31), -(1 << 31), (1 << 31) - 1, 0])
    assert count == 3


def test_multiplier_rounds_to_float32_at_each_step() -> None:
    rng = np.random.default_rng(5)
    s_in, s_out = (np.array(rng.uniform(0.01, 0.1), np.float32) for _ in "io")
    s_w = rng.uniform(0.001, 0.01, 1000).astype(np.float32)
    got = requantization("float32_even", s_in, s_w, qparams(float(s_out), 0)).multiplier
    assert got.dtype == np.float32
    product = (s_in.astype(np.float64) * s_w).astype(np.float32)  # exact in float64, then one rounding
    expected = [np.float32(Fraction(float(p)) / Fraction(float(s_out))) for p in product]
    np.testing.assert_array_equal(got, expected)
    assert np.any(got != (s_w.astype(np.float64) * s_in / s_out).astype(np.float32))


def test_blocks_change_nothing() -> None:
    rng = np.random.default_rng(6)
    a, b = (random_codes(rng, (5, 3, 100, 101)) for _ in "ab")
    np.testing.assert_array_equal(products.in_blocks(np.subtract, a, b), a - b)
    np.testing.assert_array_equal(products.in_blocks(np.subtract, a, b[:1]), a - b[:1])
    np.testing.assert_array_equal(products.in_blocks(np.negative, a[0, 0, 0]), -a[0, 0, 0])


@GRIDS
@SCALES
def test_transfer_is_dequantize_then_quantize(grid: Grid, s_in: float, s_other: float, s_out: float) -> None:
    source, target = qparams(s_in, 13, grid), qparams(s_out, 57, grid)
    every = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int32)
    real = ort_node("DequantizeLinear", {"c": stored(every, grid), "s": source.scale, "z": stored(13, grid)})
    expected = ort_node("QuantizeLinear", {"r": real, "s": target.scale, "z": stored(57, grid)})
    graph = open_graph(onnx.ModelProto(), Arithmetic(), reference=True)
    move, table = regrid(graph, source, target)
    moved = move(stored(every, grid))
    assert moved.dtype == stored(every, grid).dtype
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(table, expected)
    same, none = regrid(graph, source, source)
    assert same(every) is every
    assert none is None


@X86
@GRIDS
@SCALES
@pytest.mark.parametrize("zeros", [(0, 0, 0), (13, 101, 57)])
def test_add_is_qlinear_add_on_every_pair(
    grid: Grid, s_in: float, s_other: float, s_out: float, zeros: tuple[int, int, int]
) -> None:
    """Signed codes as ONNX Runtime runs them on x86: as unsigned ones, 128 higher (QDQS8ToU8Transformer)."""
    pa, pb, pc = (qparams(s, z, grid) for s, z in zip((s_in, s_other, s_out), zeros, strict=True))
    every = np.arange(grid.qmin, grid.qmax + 1, dtype=np.int32)
    a, b = np.meshgrid(every, every, indexing="ij")
    raised = 128 if grid.signed else 0
    feeds: dict[str, Array] = {}
    for name, codes, params in (("a", a, pa), ("b", b, pb)):
        feeds |= {name: stored(codes + raised, U8), f"s{name}": params.scale}
        feeds |= {f"z{name}": stored(params.zero_point + raised, U8)}
    feeds |= {"sc": pc.scale, "zc": stored(pc.zero_point + raised, U8)}
    expected = ort_node("QLinearAdd", feeds, "com.microsoft").astype(np.int32) - raised
    np.testing.assert_array_equal(add.add(a, b, (pa, pb), pc), expected)


@X86
def test_add_keeps_the_order_of_a_broadcast_sum() -> None:
    rng = np.random.default_rng(13)
    for _ in range(150):
        full = rng.integers(1, 6, 4)
        shapes = [tuple(np.where(rng.random(4) < 0.4, 1, full))[rng.integers(0, 4) :] for _ in "ab"]
        pa, pb, pc = (qparams(s, 2 * int(rng.integers(0, 100)) + 1) for s in (0.045, 0.03, 0.1))
        a, b = (random_codes(rng, shape) for shape in shapes)
        feeds: dict[str, Any] = {"a": stored(a, U8), "sa": pa.scale, "za": stored(pa.zero_point, U8)}
        feeds |= {"b": stored(b, U8), "sb": pb.scale, "zb": stored(pb.zero_point, U8)}
        feeds |= {"sc": pc.scale, "zc": stored(pc.zero_point, U8)}
        expected = ort_node("QLinearAdd", feeds, "com.microsoft")
        np.testing.assert_array_equal(add.add(a, b, (pa, pb), pc), expected)


@pytest.mark.parametrize("ratios", [(1.3, 0.7), (1e-5, 0.9), (250.0, 0.002), (1.0, 2.0**-17)])
def test_fma_in_float64_is_exact_before_its_one_rounding(ratios: tuple[float, float]) -> None:
    r_a, r_b = (np.array(r, np.float32) for r in ratios)
    rng = np.random.default_rng(7)
    fixed: Any = np.float32(57) - add._fma(np.array(13), r_a, np.array(r_b * np.float32(101)))
    for a, b in rng.integers(-128, 256, (200, 2)):
        inner = add._fma(b, r_b, fixed)
        for code, ratio, term in ((b, r_b, fixed), (a, r_a, inner)):
            in_float64 = np.float64(code) * np.float64(ratio) + np.float64(term)
            exact = Fraction(int(code)) * Fraction(float(ratio)) + Fraction(float(term))
            assert Fraction(float(in_float64)) == exact


@WINDOWS
@GRIDS
def test_max_pool_is_onnx_runtime(size: tuple[int, ...], window: Window, grid: Grid) -> None:
    x = random_codes(np.random.default_rng(8), (2, 3, *size), grid)
    expected = ort_node("MaxPool", {"x": stored(x, grid)}, **onnx_window(window))
    np.testing.assert_array_equal(pooling.max_pool(x, window, grid.qmin), expected)


@GRIDS
@SCALES
@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize(
    "window",
    [
        Window((3, 3), (1, 1), (1, 1), (1, 0, 1, 2)),
        Window((2, 2), (2, 2), (1, 1), (0, 0, 0, 0)),
        Window((3, 2), (2, 2), (1, 1), (1, 1, 1, 0), "NOTSET", ceil_mode=True),
        Window((4, 3), (3, 2), (1, 1), (0, 0, 0, 0), "SAME_UPPER"),
    ],
)
def test_average_pool_is_qlinear_average_pool(
    window: Window, include: bool, grid: Grid, s_in: float, s_other: float, s_out: float
) -> None:
    source, target = qparams(s_in, 13, grid), qparams(s_out, 57, grid)
    x = random_codes(np.random.default_rng(9), (2, 5, 9, 10), grid)
    attributes = onnx_window(window) | {"ceil_mode": window.ceil_mode, "count_include_pad": include}
    del attributes["dilations"]
    feeds = {"x": stored(x, grid), "sx": source.scale, "zx": stored(13, grid)}
    feeds |= {"sy": target.scale, "zy": stored(57, grid)}
    expected = ort_node("QLinearAveragePool", feeds, "com.microsoft", **attributes)
    np.testing.assert_array_equal(pooling.average_pool(x, window, include, (source, target), Arithmetic()), expected)


def test_a_window_without_elements_gives_zero() -> None:
    window = Window((2,), (3,), (1,), (1, 1), "NOTSET", ceil_mode=True)  # the last window starts at 5
    x = np.full((1, 1, 5), 50, np.int32)
    params = qparams(0.1, 7)
    np.testing.assert_array_equal(
        pooling.average_pool(x, window, False, (params, params), Arithmetic()), [[[50, 50, 7]]]
    )
    expected = ort_node(
        "AveragePool", {"x": x.astype(np.float32)}, kernel_shape=[2], strides=[3], pads=[1, 1], ceil_mode=1
    )
    assert expected.shape == (1, 1, 3)


@GRIDS
@SCALES
def test_mean_is_qlinear_global_average_pool(grid: Grid, s_in: float, s_other: float, s_out: float) -> None:
    source, target = qparams(s_in, 13, grid), qparams(s_out, 57, grid)
    x = random_codes(np.random.default_rng(10), (2, 50, 4, 5), grid)
    x[:, :9] = x[:, :9] // 8 + 40  # some means inside the output grid whatever the scales
    feeds = {"x": stored(x, grid), "sx": source.scale, "zx": stored(13, grid)}
    feeds |= {"sy": target.scale, "zy": stored(57, grid)}
    expected = ort_node("QLinearGlobalAveragePool", feeds, "com.microsoft", channels_last=0)
    np.testing.assert_array_equal(pooling.mean(x, (2, 3), True, (source, target), Arithmetic()), expected)
    np.testing.assert_array_equal(
        pooling.mean(x, (-1, -2), False, (source, target), Arithmetic()), expected[:, :, 0, 0]
    )


@pytest.mark.parametrize("axes", [None, (2, -3)])
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect"])
def test_pad_is_onnx_runtime(mode: str, axes: tuple[int, ...] | None) -> None:
    x = random_codes(np.random.default_rng(11), (2, 3, 4, 5))
    pads = np.array([0, 2, 1, 0, 0, 1, 0, 3] if axes is None else [1, 2, 0, 1])
    along = None if axes is None else np.array(axes)
    feeds: dict[str, Any] = {"x": x, "pads": pads, "value": np.int32(7)}
    expected = ort_node("Pad", feeds | ({} if along is None else {"axes": along}), opset=18, mode=mode)
    np.testing.assert_array_equal(moves.pad(x, pads, along, mode, 7), expected)


def test_slice_is_onnx_runtime() -> None:
    rng = np.random.default_rng(12)
    x = random_codes(rng, (6, 7))
    limit = np.iinfo(np.int64)
    extremes = [limit.min, -9, -7, -6, -1, 0, 1, 5, 6, 7, 9, limit.max]
    for _ in range(150):
        starts, ends = rng.choice(extremes, 2), rng.choice(extremes, 2)
        steps, axes = rng.choice([-3, -2, -1, 1, 2, 3], 2), rng.permutation([0, -1])
        ends[(steps < 0) & (ends == limit.max)] = 9  # there ONNX Runtime stops at the front, against ONNX
        expected = ort_node("Slice", {"x": x, "s": starts, "e": ends, "a": axes, "t": steps})
        np.testing.assert_array_equal(moves.slice_along(x, starts, ends, axes, steps), expected)


@pytest.mark.parametrize(("shape", "allow_zero"), [([0, -1], False), ([-1, 2, 6], False), ([2, 12], True)])
def test_reshape_is_onnx_runtime(shape: list[int], allow_zero: bool) -> None:
    x = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    expected = ort_node("Reshape", {"x": x, "shape": np.array(shape)}, allowzero=int(allow_zero))
    np.testing.assert_array_equal(moves.reshape(x, np.array(shape), allow_zero), expected)


def test_a_kernel_off_by_one_lsb_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numerics, "round_half_even", lambda x: np.rint(x) + 1)
    monkeypatch.setattr(requantize, "round_half_even", lambda x: np.rint(x) + 1)
    with pytest.raises(AssertionError):
        test_average_pool_is_qlinear_average_pool(
            Window((2, 2), (2, 2), (1, 1), (0, 0, 0, 0)), False, U8, 0.0213, 0.0371, 0.0457
        )
    with pytest.raises(AssertionError):
        test_mean_is_qlinear_global_average_pool(U8, 0.0213, 0.0371, 0.0457)
