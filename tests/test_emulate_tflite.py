"""Element-wise, pooling and activation kernels, rule by rule, against rational arithmetic written from the sources.

The rules of TensorFlow Lite and XNNPACK were compared with LiteRT by `tools/referees/litert.py`. Here every rule is
computed a second time, one value at a time, with Python integers and fractions.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from onnxqt import requantize
from onnxqt.emulate.kernels import add, hardswish, leaky, multiply, pooling, resize, softmax, tables
from onnxqt.emulate.kernels.windows import Window
from onnxqt.numerics import Array, Grid, IntArray, QParams
from onnxqt.profiles import Arithmetic

S8, S16 = Grid(8, signed=True), Grid(16, signed=True)
ARITHMETIC = Arithmetic(quantize="away")


@dataclass(frozen=True)
class Places:
    """Scales and zero points of two operands and a result."""

    scales: tuple[float, float, float]
    zero_points: tuple[int, int, int]

    @property
    def params(self) -> list[QParams]:
        return [qparams(scale, zero) for scale, zero in zip(self.scales, self.zero_points, strict=True)]


# Ratios of 1/6 and 1/2, where a multiplier's own rounding decides ties; random scales; powers of two and simple ratios,
# where ties are frequent; a result that saturates.
PLACES = (
    Places((0.01, 0.03, 0.06), (3, -7, 11)),
    Places((0.0213, 0.0371, 0.0457), (3, -7, 11)),
    Places((0.0571, 0.0123, 0.0391), (-101, 55, -3)),
    Places((0.03125, 0.015625, 0.0625), (3, -7, -11)),
    Places((0.0234375, 0.03125, 0.0625), (-1, 5, 7)),
    Places((0.5, 0.5, 0.25), (1, 1, -1)),
    Places((2 / 255, 0.01, 2 / 255), (-128, 3, -128)),  # the grid of a clip at 2: a factor that is not quite 1
)


def qparams(scale: float, zero_point: int, grid: Grid = S8) -> QParams:
    return QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), grid)


def codes(seed: int, shape: tuple[int, ...], grid: Grid = S8) -> IntArray:
    """Random codes, the first ones the ends of the grid."""
    drawn = np.random.default_rng(seed).integers(grid.qmin, grid.qmax + 1, shape).astype(np.int32)
    drawn.reshape(-1)[:2] = grid.qmin, grid.qmax
    return drawn


# The second computation: exact fractions, rounded where the source rounds


def half_up(x: Fraction) -> int:
    return (2 * x.numerator + x.denominator) // (2 * x.denominator)


def half_away(x: Fraction) -> int:
    return half_up(x) if x >= 0 else -half_up(-x)


def half_even(x: Fraction) -> int:
    return round(x)


def f32(x: Fraction | int) -> Fraction:
    """The nearest float32 of a number in the normal range, ties to even."""
    if x == 0:
        return Fraction(0)
    exponent = math.frexp(float(x))[1] - 24
    up, down = max(exponent, 0), max(-exponent, 0)
    over, under = x.numerator << down, x.denominator << up  # x in units of the last place
    whole, rest = divmod(over, under)
    whole += 2 * rest > under or (2 * rest == under and whole % 2)
    return Fraction(whole << up, 1 << down)


def exact(value: Any) -> Fraction:
    """A scale or zero point as a fraction."""
    return Fraction(float(value))


def fixed(real: Fraction) -> tuple[int, int]:
    """(q, e): `real = q 2^e / 2^31`, q of 31 bits."""
    fraction, exponent = math.frexp(float(real))
    q = half_away(Fraction(fraction) * 2**31)
    return (q // 2, exponent + 1) if q == 2**31 else (q, exponent)


def twice_rounded(x: int, multiplier: tuple[int, int], last: Callable[[Fraction], int] = half_away) -> int:
    q, e = multiplier
    high = half_up(Fraction(x * 2 ** max(e, 0) * q, 2**31))
    return last(Fraction(high, 2 ** max(-e, 0)))


def once_rounded(x: int, multiplier: tuple[int, int]) -> int:
    q, e = multiplier
    return half_up(Fraction(x) * q * Fraction(2) ** e / 2**31)


def clipped(code: int, grid: Grid = S8) -> int:
    return min(max(code, grid.qmin), grid.qmax)


def numbers(params: Iterable[QParams]) -> Iterator[tuple[Fraction, int]]:
    """(scale, zero point) of each."""
    return ((exact(p.scale), int(p.zero_point)) for p in params)


def same(found: Array, expected: Iterable[int], grid: Grid = S8) -> None:
    wanted = np.array([clipped(code, grid) for code in expected], np.int32).reshape(found.shape)
    assert found.dtype == np.int32
    np.testing.assert_array_equal(found, wanted)


# Two tensors


def added(rule: str, a: int, b: int, params: list[QParams]) -> int:
    (s_a, z_a), (s_b, z_b), (s, z) = numbers(params)
    r_a, r_b = f32(s_a / s), f32(s_b / s)
    if rule == "ort":
        up = 128 if params[2].grid.signed else 0  # signed codes run as unsigned ones
        offset = f32(z + up - f32(r_a * (z_a + up) + f32(r_b * (z_b + up))))
        return half_even(f32(r_a * (a + up) + f32(r_b * (b + up) + offset))) - up
    if rule == "xnnpack":
        shift = 20 - (math.frexp(float(max(r_a, r_b)))[1] - 1)
        total = (a - z_a) * half_even(r_a * 2**shift) + (b - z_b) * half_even(r_b * 2**shift)
        return half_up(Fraction(total) / Fraction(2) ** shift) + z
    if rule == "float":
        return half_away(f32(f32(f32((a - z_a) * s_a) + f32((b - z_b) * s_b)) / s)) + z
    shift = 20 if params[2].grid.bits == 8 else 15
    twice = 2 * max(s_a, s_b)
    ratios = [exact(float(s_a) / float(twice)), exact(float(s_b) / float(twice))]
    last = exact(float(twice) / (2.0**shift * float(s)))
    scaled = once_rounded if rule == "tosa" else twice_rounded
    parts = [scaled((c - zero) << shift, fixed(r)) for c, zero, r in zip((a, b), (z_a, z_b), ratios, strict=True)]
    return scaled(sum(parts), fixed(last)) + z


def multiplied(rule: str, a: int, b: int, params: list[QParams]) -> int:
    (s_a, z_a), (s_b, z_b), (s, z) = numbers(params)
    product, ratio = (a - z_a) * (b - z_b), f32(f32(s_a * s_b) / s)
    if rule == "ort":
        return half_even(f32(f32(f32(product) * ratio) + z))
    if rule == "xnnpack":
        return half_even(f32(f32(product) * ratio)) + z
    if rule == "float":
        return half_away(f32(f32(f32((a - z_a) * s_a) * f32((b - z_b) * s_b)) / s)) + z
    if rule == "tosa":
        return once_rounded(product, fixed(exact(float(s_a) * float(s_b) / float(s)))) + z
    return twice_rounded(product, fixed(ratio)) + z


def check_add(rule: str) -> None:
    for seed, places in enumerate(PLACES):
        a, b = codes(seed, (500,)), codes(100 + seed, (500,))
        found = add.RULES[rule](a, b, (places.params[0], places.params[1]), places.params[2], "away")
        same(found, (added(rule, int(i), int(j), places.params) for i, j in zip(a, b, strict=True)))


def check_multiply(rule: str) -> None:
    for seed, places in enumerate(PLACES):
        a, b = codes(seed, (500,)), codes(100 + seed, (500,))
        *sources, target = places.params
        target = qparams(float(target.scale) / 4, int(target.zero_point))
        found = multiply.RULES[rule](a, b, (sources[0], sources[1]), target, "away")
        same(found, (multiplied(rule, int(i), int(j), [*sources, target]) for i, j in zip(a, b, strict=True)))


# Means

WINDOW = Window((3, 2), (1, 2), (1, 1), (1, 0, 1, 1))
SQUARE = Window((2, 2), (1, 1), (1, 1), (0, 1, 1, 0))
DPU = {6: Fraction(85, 512), 4: Fraction(1, 4)}  # the nearest to 1/6 with a shift below log2(128 * 6)


def window_elements(x: IntArray, window: Window) -> Iterator[list[int | None]]:
    """The codes under each window, row-major; None in the padding."""
    (top, left, bottom, right), (rows, columns) = window.pads, x.shape[2:]
    for image in x.reshape(-1, rows, columns):
        for i in range((rows + top + bottom - window.kernel[0]) // window.strides[0] + 1):
            for j in range((columns + left + right - window.kernel[1]) // window.strides[1] + 1):
                y, x0 = i * window.strides[0] - top, j * window.strides[1] - left
                at = [(y + dy, x0 + dx) for dy in range(window.kernel[0]) for dx in range(window.kernel[1])]
                yield [int(image[p]) if 0 <= p[0] < rows and 0 <= p[1] < columns else None for p in at]


def averaged(rule: str, under: list[int | None], with_pad: bool, params: list[QParams]) -> int:
    (s_in, z_in), (s, z) = numbers(params)
    inside = [code for code in under if code is not None]
    n = len(under) if with_pad else len(inside)
    total = sum(code - z_in for code in inside)
    if rule == "ort":
        real = Fraction(0)
        for code in under:
            real = f32(real + (0 if code is None else f32((code - z_in) * s_in)))
        return half_even(f32(f32(f32(real / n) / s) + z))
    if rule == "tflite":
        codes_sum = sum(inside) + (z_in * (n - len(inside)))
        return half_away(Fraction(codes_sum, n))
    if rule == "tosa":
        bits = (n - 1).bit_length()
        return half_up(Fraction(total * (((2**30 + 1) << bits) // n), 2 ** (30 + bits))) + z
    if rule == "dpu":
        return half_up(total * DPU[len(under)] * s_in / s) + z
    if rule == "openvino":
        return openvino_mean(total, n, params)
    return half_away(f32(f32(f32(f32(total) * s_in) / n) / s)) + z


def openvino_mean(centred: int, n: int, params: list[QParams]) -> int:
    """The range of the output over the scale of the input, in float32 at each step."""
    (s_in, _), (s, z) = numbers(params)
    grid = params[1].grid
    low, high = (f32(f32((end - z) * s) / s_in) for end in (grid.qmin, grid.qmax))
    factor = f32(Fraction(grid.qmax - grid.qmin) / f32(high - low))
    return half_even(f32(f32(f32(Fraction(centred, n)) * factor) + z))


def check_average(rule: str) -> None:
    x = codes(5, (2, 5, 6, 7))
    for places in PLACES:
        source, _, target = places.params
        if rule in ("tflite", "tosa"):
            target = source
        if rule == "dpu":
            source, target = (qparams(2.0 ** round(math.log2(p.scale)), int(p.zero_point)) for p in (source, target))
        for window, with_pad in ((WINDOW, False), (WINDOW, True), (SQUARE, False), (SQUARE, True)):
            found = pooling.AVERAGE_RULES[rule](x, window, with_pad, (source, target), ARITHMETIC)
            same(found, (averaged(rule, under, with_pad, [source, target]) for under in window_elements(x, window)))


def meant(rule: str, values: list[int], params: list[QParams], channel: tuple[int, int] | None) -> int:
    """`channel` is (index, channels) where both spatial axes of a 4-D tensor are kept."""
    (s_in, z_in), (s, z) = numbers(params)
    n, total = len(values), sum(values)
    centred = total - n * z_in
    if rule == "ort":
        return half_even(f32(f32(centred) * f32(s_in / f32(s * n)))) + z
    if rule == "xnnpack":
        factor = f32(f32(s_in / s) * f32(Fraction(1, n)))
        return half_even(f32(f32(f32(total) * factor) + f32(z - f32(f32(n * z_in) * factor))))
    if rule == "float":
        return half_away(f32(f32(f32(f32(centred) * s_in) / n) / s)) + z
    if rule == "tosa":
        return once_rounded(centred, fixed(exact(float(s_in) * (1 / n) / float(s)))) + z
    if rule == "openvino":
        return openvino_mean(centred, n, params)
    if rule == "ruy" and channel is not None:
        moved = f32(f32(z_in * s_in) / s)
        offset = z - int(f32(moved + Fraction(1 if moved > 0 else -1, 2)))
        last = half_up if channel[0] < channel[1] - channel[1] % 16 else half_away
        return twice_rounded(total, fixed(f32(s_in / f32(n * s))), last) + offset
    q, e = fixed(exact(float(s_in) / float(s)))
    shift = min(n.bit_length() - 1, 32, 31 + e)
    return twice_rounded(centred, ((q << shift) // n, e - shift)) + z


def check_mean(rule: str) -> None:
    for seed, places in enumerate(PLACES):
        source, _, target = places.params
        for shape, axes, keepdims in (
            ((3, 35, 7, 7), (2, 3), True),
            ((2, 19, 4, 4), (2, 3), True),
            ((2, 19, 3, 5), (2, 3), False),
            ((40, 24), (1,), True),
        ):
            x = codes(seed, shape) // 2 - 20
            found = pooling.MEAN_RULES[rule](x, axes, keepdims, (source, target), ARITHMETIC)
            rows = np.moveaxis(x, axes, range(-len(axes), 0)).reshape(-1, math.prod(shape[axis] for axis in axes))
            kept = len(shape) == 4 and keepdims
            expected = (
                meant(rule, row.tolist(), [source, target], (i % shape[1], shape[1]) if kept else None)
                for i, row in enumerate(rows)
            )
            same(found, expected)


# Activations

ALPHAS = (0.01, 0.1, 0.25, 0.7, 1.5, -0.25)


def leaked(rule: str, code: int, alpha: Fraction, params: list[QParams]) -> int:
    (s_in, z_in), (s, z) = numbers(params)
    x, ratio = code - z_in, f32(s_in / s)
    below = f32(ratio * alpha)
    if rule == "xnnpack" and Fraction(1, 256) <= ratio <= 128 and Fraction(1, 256) <= abs(below) <= 127:
        return half_up(Fraction(x * half_even((ratio if x >= 0 else below) * 256), 256)) + z
    if rule == "tosa":
        size = Fraction(1) if x >= 0 else abs(alpha)
        steps = once_rounded(x, fixed(exact(float(s_in * size) / float(s))))  # the product is exact in float64
        return (-steps if x < 0 and alpha < 0 else steps) + z
    if x >= 0:
        return twice_rounded(x, fixed(ratio)) + z
    slope = f32(f32(s_in * alpha) / s)
    return (1 if alpha >= 0 else -1) * twice_rounded(x, fixed(abs(slope))) + z


def check_leaky(rule: str) -> None:
    every = np.arange(-128, 128, dtype=np.int32)
    for places in PLACES:
        source, _, target = places.params
        for alpha in map(np.float32, ALPHAS):
            found = leaky.RULES[rule](every, alpha, (source, None), target, "even")
            same(found, (leaked(rule, int(code), exact(alpha), [source, target]) for code in every))


def check_prelu(rule: str) -> None:
    x, alpha = codes(3, (2, 7, 20)), codes(4, (7, 1))
    for places in PLACES:
        source, slope, target = places.params
        (s_in, z_in), (s_a, z_a), (s, z) = numbers(places.params)
        above, below = fixed(f32(s_in / s)), fixed(f32(f32(s_in * s_a) / s))
        slopes = np.broadcast_to(alpha, x.shape)
        expected = (
            twice_rounded(int(c) - z_in, above) + z
            if c >= z_in
            else twice_rounded((int(c) - z_in) * (int(a) - z_a), below) + z
            for c, a in zip(x.ravel(), slopes.ravel(), strict=True)
        )
        same(leaky.PRELU_RULES[rule](x, alpha, (source, slope), target, "even"), expected)


def high(a: int, b: int) -> int:
    """Product of two Q0.31 numbers, rounded half up."""
    return half_up(Fraction(a * b, 2**31))


def exp_fixed(value: int) -> int:
    """exp of a Q5.26 number <= 0, Q0.31."""
    if value == 0:
        return 2**31 - 1
    quarters = -(value // 2**24) - 1  # whole quarters below the last one
    x = (value + (quarters * 2**24)) * 32 + 2**28
    square = high(x, x)
    cube, fourth = high(square, x), high(square, square)
    inner = high(half_away(Fraction(fourth, 4)) + cube, 715827883) + square
    result = 1895147668 + high(1895147668, x + half_away(Fraction(inner, 2)))
    for bit, constant in enumerate((1672461947, 1302514674, 790015084, 290630308, 39332535, 720401, 242)):
        if quarters >> bit & 1:
            result = high(result, constant)
    return result


def softmax_fixed(row: list[int], scale: Fraction) -> list[int]:
    q, e = fixed(min(scale * 2**26, Fraction(2**31 - 1)))
    largest = max(row)
    reach = math.floor(Fraction(31 * 2**26, 2**e))
    exps = [exp_fixed(twice_rounded(code - largest, (q, e))) if largest - code <= reach else None for code in row]
    total = sum(half_away(Fraction(value, 2**12)) for value in exps if value is not None)
    bits = total.bit_length()
    half = half_away(Fraction((total << (32 - bits)) - 2**31 + 2**31 - 1, 2))
    x = 1515870810 + high(half, -1010580540)
    for _ in range(3):
        x += high(x, 2**29 - high(half, x)) * 4
    reciprocal = min(x * 2, 2**31 - 1)
    shift = 12 - (32 - bits) + 31 - 8
    return [-128 if v is None else half_away(Fraction(high(reciprocal, v), 2**shift)) - 128 for v in exps]


def softmax_float(row: list[int], scale: Fraction) -> list[int]:
    largest, exps = max(row), []
    for code in row:
        exps.append(f32(Fraction(math.exp(f32((code - largest) * scale)))))
    total = Fraction(0)
    for value in exps:
        total = f32(total + value)
    inverse = f32(1 / f32(total / 256))
    return [half_away(f32(value * inverse)) - 128 for value in exps]


SOFTMAX_TARGET = qparams(2.0**-8, -128)
SOFTMAX_INPUTS = tuple((scale, spread) for scale in (0.013, 0.0625, 0.31, 1.7) for spread in (6, 60, 255))


# Where LiteRT's two kernels differ: (scale, row, codes of the reference kernel, codes of the optimized kernel).
SOFTMAX_OF_LITERT = (
    (
        0.0625,
        [-128, 127, -91, 116, 127, 127, 31, 127, -28, 127],
        [-128, -82, -128, -105, -82, -82, -128, -82, -128, -82],
        [-128, -81, -128, -105, -81, -81, -128, -81, -128, -81],
    ),
    (
        0.3125,
        [-49, -45, -73, -43, -42, -43, -43, -61, -90, -30],
        [-127, -126, -128, -124, -122, -124, -124, -128, -128, 107],
        [-127, -126, -128, -124, -122, -124, -124, -128, -128, 108],
    ),
    (
        0.1171875,
        [-2, 36, 2, 51, 45, 44, 0, 1, 35, 34],
        [-128, -110, -128, -22, -75, -81, -128, -128, -112, -113],
        [-128, -110, -128, -22, -75, -81, -128, -128, -112, -114],
    ),
)


def check_softmax(rule: str) -> None:
    row_of = softmax_fixed if rule == "tflite" else softmax_float
    inputs = [(scale, np.array([row], np.int32)) for scale, row, _, _ in SOFTMAX_OF_LITERT]
    for seed, (scale, spread) in enumerate(SOFTMAX_INPUTS):
        inputs.append((scale, np.random.default_rng(seed).integers(-128, spread - 127, (6, 23)).astype(np.int32)))
    for scale, drawn in inputs:
        source = qparams(scale, 5)
        found = softmax.RULES[rule](drawn, source, SOFTMAX_TARGET)
        same(found, [code for row in drawn for code in row_of(row.tolist(), exact(source.scale))])


def hard_swish_fixed(code: int, params: list[QParams]) -> int:
    (s_in, z_in), (s, z) = numbers(params)

    def short(real: Fraction) -> tuple[int, int]:
        q, e = fixed(real)
        return min(half_up(Fraction(q, 2**16)), 2**15 - 1), e

    def saturated(x: int) -> int:
        return min(max(x, -(2**15)), 2**15 - 1)

    x = (code - z_in) * 128
    fine = f32(s_in / 128)
    output, share = short(f32(fine / s)), short(f32(fine / f32(Fraction(3, 2**15))))
    moved = half_up(Fraction(x * output[0], 2**15))
    if share[1] > 0:
        part = saturated(x * 2 ** (share[1] - 1))
        part = saturated(half_up(Fraction(part * share[0], 2**15)) * 2)
    else:
        part = half_away(Fraction(half_up(Fraction(x * share[0], 2**15)), 2 ** -share[1]))
    part = (part + 2**15) // 2
    return half_away(Fraction(math.trunc(Fraction(part * moved, 2**15)), 2 ** -output[1])) + z


def check_hard_swish(rule: str) -> None:
    assert rule == "tflite"
    every = np.arange(-128, 128, dtype=np.int32)
    for places in (*PLACES, Places((0.4, 1, 0.2), (9, 0, -5)), Places((1e-3, 1, 1e-3), (-9, 0, 5))):
        source, _, target = places.params
        found = hardswish.hard_swish(every, source, target)
        same(found, (hard_swish_fixed(int(code), [source, target]) for code in every))


# Bilinear resizing

SIZES = (((5, 7), (10, 14)), ((5, 7), (11, 9)), ((5, 7), (3, 4)), ((9, 8), (4, 1)), ((2, 1), (7, 5)), ((6, 6), (6, 6)))


def centred(coordinates: str, out: int) -> bool:
    """ONNX Resize: pytorch_half_pixel puts a single element at position 0."""
    return coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and out > 1)


def place_tflite(i: int, size: int, out: int, coordinates: str) -> tuple[Fraction, int, int]:
    """(weight of the element after, element before, element after), all in steps of 1/1024; C division."""
    corners = int(coordinates == "align_corners" and out > 1)
    scale = (1024 * (size - corners) + (out - corners) // 2) // (out - corners)
    at = i * scale + (scale // 2 - 512 if centred(coordinates, out) else 0)
    before = max(math.trunc(Fraction(at, 1024)), 0)
    return Fraction(at - 1024 * before, 1024), before, min(math.trunc(Fraction(at + 1023, 1024)), size - 1)


def place_xnnpack(i: int, size: int, out: int, coordinates: str) -> tuple[Fraction, int, int]:
    """The same in float32, the weight in steps of 1/2048."""
    corners = int(coordinates == "align_corners" and out > 1)
    scale = f32(Fraction(size - corners, out - corners))
    at = f32(i * scale)
    if centred(coordinates, out):
        at = f32(at + f32(scale / 2 - Fraction(1, 2)))
    at = min(max(at, Fraction(0)), Fraction(size - 1))
    before = math.floor(at)
    return Fraction(round((at - before) * 2048), 2048), before, min(before + 1, size - 1)


def resized(rule: str, image: Array, sizes: tuple[int, int], coordinates: str) -> Iterator[int]:
    """Codes of one channel, row by row; every sum is exact, and rounded once."""
    place, last = {"tflite": (place_tflite, half_away), "xnnpack": (place_xnnpack, half_up)}[rule]
    for i in range(sizes[0]):
        v, up, down = place(i, image.shape[0], sizes[0], coordinates)
        for j in range(sizes[1]):
            h, left, right = place(j, image.shape[1], sizes[1], coordinates)
            top = int(image[up, left]) * (1 - h) + int(image[up, right]) * h
            bottom = int(image[down, left]) * (1 - h) + int(image[down, right]) * h
            yield last(top * (1 - v) + bottom * v)


def check_resize(rule: str) -> None:
    for seed, (size, sizes) in enumerate(SIZES):
        x = codes(seed, (2, 3, *size))
        for coordinates in resize.COORDINATES:
            found = resize.BILINEAR_RULES[rule](x, sizes, coordinates)
            assert found.shape == (2, 3, *sizes)
            same(found, (code for row in x for image in row for code in resized(rule, image, sizes, coordinates)))


# Tables


def moved(rule: str, code: int, params: list[QParams]) -> int:
    """A code of one grid on another."""
    (s_in, z_in), (s, z) = numbers(params)
    if rule == "xnnpack":
        return half_up(Fraction((code - z_in) * half_even(256 * f32(s_in / s)), 256)) + z
    real = f32((code - z_in) * s_in)
    if rule == "ort":
        return half_even(f32(real / s)) + z
    grid = params[1].grid
    low, high = (f32((end - z) * s) for end in (grid.qmin, grid.qmax))
    steps, span = grid.qmax - grid.qmin, f32(high - low)
    shift = f32(f32(f32(-low * steps) / span) + grid.qmin)
    return half_even(f32(f32(real * f32(steps / span)) + shift))


def check_transfer(rule: str) -> None:
    for places in PLACES:
        source, target, other = places.params
        for a, b in ((source, target), (other, source), (source, other)):
            found = tables.TRANSFER_RULES[rule](a, b)
            same(found, (moved(rule, code, [a, b]) for code in range(-128, 128)))


def entry(rule: str, real: Fraction, target: QParams) -> int:
    """The code of a value of a function."""
    ((s, z),) = numbers([target])
    inverse = f32(1 / s)
    if rule == "xnnpack":
        return half_even(f32(f32(real * inverse) + z))
    if rule == "tflite":
        return half_away(f32(real * inverse)) + z
    return {"even": half_even, "away": half_away, "up": half_up}[rule](f32(real / s)) + z


def check_table(rule: str) -> None:
    """Ties, values beyond the grid, and random values."""
    for seed, places in enumerate(PLACES):
        target = places.params[2]
        steps = np.concatenate([np.arange(-280, 281) / 2, np.random.default_rng(seed).normal(0, 90, 200)])
        real = steps.astype(np.float32) * target.scale
        same(tables.TABLE_RULES[rule](real, target), (entry(rule, exact(value), target) for value in real))


CHECKS: dict[str, tuple[Callable[[str], None], Any]] = {
    "add": (check_add, add.RULES),
    "multiply": (check_multiply, multiply.RULES),
    "average": (check_average, pooling.AVERAGE_RULES),
    "mean": (check_mean, pooling.MEAN_RULES),
    "leaky": (check_leaky, leaky.RULES),
    "prelu": (check_prelu, leaky.PRELU_RULES),
    "softmax": (check_softmax, softmax.RULES),
    "resize": (check_resize, resize.BILINEAR_RULES),
    "transfer": (check_transfer, tables.TRANSFER_RULES),
    "table": (check_table, tables.TABLE_RULES),
}
EVERY_RULE = pytest.mark.parametrize(
    ("kernel", "rule"), [(kernel, rule) for kernel, (_, rules) in CHECKS.items() for rule in rules]
)


@EVERY_RULE
def test_rule_is_the_exact_arithmetic_of_its_source(kernel: str, rule: str) -> None:
    CHECKS[kernel][0](rule)


def test_hard_swish_is_the_exact_arithmetic_of_its_source() -> None:
    check_hard_swish("tflite")


def off_by_one(kernel: Callable[..., IntArray]) -> Callable[..., IntArray]:
    """The same kernel, wrong by one LSB at one value."""

    def wrong(*arguments: Any) -> IntArray:
        result = kernel(*arguments).copy()
        middle = result.reshape(-1)[result.size // 2 :][:1]
        middle += np.where(middle == 127, -1, 1).astype(np.int32)
        return result

    return wrong


@EVERY_RULE
def test_kernel_that_is_one_lsb_off_is_caught(kernel: str, rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, rules = CHECKS[kernel]
    monkeypatch.setitem(rules, rule, off_by_one(rules[rule]))
    with pytest.raises(AssertionError, match="Mismatched elements: 1 "):
        check(rule)


def test_hard_swish_that_is_one_lsb_off_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hardswish, "hard_swish", off_by_one(hardswish.hard_swish))
    with pytest.raises(AssertionError, match="Mismatched elements: 1 "):
        check_hard_swish("tflite")


@pytest.mark.parametrize("kernel", [kernel for kernel in CHECKS if kernel != "prelu"])  # it has one rule, twice
def test_data_tells_the_rules_apart(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check, rules = CHECKS[kernel]
    for rule in rules:
        for other in rules:
            if other == rule or (kernel == "average" and "dpu" in (rule, other)):
                continue
            with monkeypatch.context() as patch:
                patch.setitem(rules, rule, rules[other])
                with pytest.raises((AssertionError, ValueError), match=r"Mismatched elements|one grid"):
                    check(rule)


# A rounding that is subtly wrong, instead of a result

PRIMITIVES = [
    ("add", "tflite", add, "multiply_by_quantized_multiplier", requantize.multiply_half_up),
    ("multiply", "tflite", multiply, "multiply_by_quantized_multiplier", requantize.multiply_half_up),
    ("mean", "tflite", pooling, "multiply_by_quantized_multiplier", requantize.multiply_half_up),
    ("mean", "ruy", pooling, "multiply_half_up", requantize.multiply_by_quantized_multiplier),
    ("leaky", "tflite", leaky, "multiply_by_quantized_multiplier", requantize.multiply_half_up),
    ("prelu", "tflite", leaky, "multiply_by_quantized_multiplier", requantize.multiply_half_up),
    ("add", "xnnpack", add, "shift_half_up", requantize.rounding_divide_by_power_of_two),
    ("leaky", "xnnpack", leaky, "shift_half_up", requantize.rounding_divide_by_power_of_two),
    ("average", "tosa", pooling, "shift_half_up", lambda values, shift: values >> shift),
    ("average", "dpu", pooling, "shift_half_up", requantize.rounding_divide_by_power_of_two),
    ("softmax", "tflite", softmax, "rounding_divide_by_power_of_two", lambda values, shift: values >> shift),
    ("mean", "tosa", requantize, "shift_half_up", requantize.rounding_divide_by_power_of_two),
    ("leaky", "tosa", requantize, "shift_half_up", requantize.rounding_divide_by_power_of_two),
    ("transfer", "xnnpack", tables, "shift_half_up", requantize.rounding_divide_by_power_of_two),
]


@pytest.mark.parametrize(("kernel", "rule", "module", "name", "wrong"), PRIMITIVES)
def test_tie_that_goes_the_other_way_is_caught(
    kernel: str, rule: str, module: Any, name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        CHECKS[kernel][0](rule)


# What one rule alone promises


@pytest.mark.parametrize("rule", resize.BILINEAR_RULES)
@pytest.mark.parametrize("coordinates", resize.COORDINATES)
def test_resized_codes_are_near_the_real_mean(rule: str, coordinates: str) -> None:
    """Positions by ONNX's definition, in float64; steps of 1/1024 are no more than that off, at each of 5 columns."""
    x, (rows, columns) = codes(1, (1, 1, 4, 5)), (9, 7)

    def weights(size: int, out: int) -> Array:
        places = np.arange(out) * (size - 1) / (out - 1)
        if coordinates != "align_corners":
            places = np.arange(out) * size / out + ((size / out - 1) / 2 if "half_pixel" in coordinates else 0)
        return np.asarray(np.maximum(0, 1 - np.abs(np.clip(places, 0, size - 1)[:, None] - np.arange(size))))

    real = weights(4, rows) @ x[0, 0] @ weights(5, columns).T
    found = resize.BILINEAR_RULES[rule](x, (rows, columns), coordinates)[0, 0]
    assert np.abs(found - real).max() <= 0.5 + 255 * (4 + 5) / 1024


def test_resize_does_not_read_beyond_the_last_element() -> None:
    """33 * 1024 / 513, rounded up, times 512 is 33 * 1024: behind the last of 33 elements."""
    x = codes(2, (1, 1, 2, 33))
    found = resize.bilinear_tflite(x, (2, 513), "asymmetric")
    np.testing.assert_array_equal(found[..., -1], x[..., -1])


@pytest.mark.parametrize("rule", add.RULES)
def test_difference_is_the_sum_with_negated_codes(rule: str) -> None:
    (s_a, s_b, s), (z_a, z_b, z) = PLACES[4].scales, PLACES[4].zero_points
    a, b = codes(1, (400,)), codes(2, (400,))
    negated = qparams(s_b, -z_b)
    found = add.RULES[rule](a, -b, (qparams(s_a, z_a), negated), qparams(s, z), "even")
    real = (a - z_a) * s_a - (b - z_b) * s_b
    distance = np.abs(np.clip(real / s + z, -128, 127) - found)
    assert distance.max() <= 0.5 + 2**-10


@pytest.mark.parametrize("kernel", ["add", "multiply"])
def test_16_bit_codes_add_and_multiply_as_tflite_does(kernel: str) -> None:
    params = [qparams(scale, 0, S16) for scale in (0.0021, 0.0034, 0.0040)]
    if kernel == "multiply":
        params[2] = qparams(0.11, 0, S16)
    a, b = codes(1, (600,), S16), codes(2, (600,), S16)
    module: Any = {"add": add, "multiply": multiply}[kernel]
    one = {"add": added, "multiply": multiplied}[kernel]
    found = module.RULES["tflite"](a, b, (params[0], params[1]), params[2], "even")
    same(found, (one("tflite", int(i), int(j), params) for i, j in zip(a, b, strict=True)), S16)


@pytest.mark.parametrize("rule", ["tflite", "tosa"])
def test_average_on_two_grids_is_refused(rule: str) -> None:
    params = (qparams(0.02, 3), qparams(0.03, 3))
    with pytest.raises(ValueError, match=r"needs one grid for input and output, got scales 0\.02 and 0\.03"):
        pooling.AVERAGE_RULES[rule](codes(1, (1, 1, 4, 4)), WINDOW, False, params, ARITHMETIC)


def test_dpu_average_refuses_other_scales_than_powers_of_two() -> None:
    params = (qparams(0.02, 0), qparams(0.03, 0))
    with pytest.raises(ValueError, match=r"needs scales that are powers of two, got 0\.02 and 0\.03"):
        pooling.average_pool_dpu(codes(1, (1, 1, 4, 4)), WINDOW, False, params, ARITHMETIC)


@pytest.mark.parametrize(
    ("kernel", "fraction"),
    [((3, 3), (7, 6)), ((5, 5), (10, 8)), ((6, 3), (7, 7)), ((14, 14), (21, 12)), ((2, 2), (1, 2)), ((2, 3), (85, 9))],
)
def test_dpu_fraction(kernel: tuple[int, ...], fraction: tuple[int, int]) -> None:
    assert pooling.dpu_fraction(kernel) == fraction


@pytest.mark.parametrize(("scale", "grid"), [(2.0**-11, S8), (256.0, S8), (0.25, S16)])
def test_xnnpack_leaves_other_sums_and_products_to_tflite(scale: float, grid: Grid) -> None:
    a, b = codes(1, (300,), grid), codes(2, (300,), grid)
    source, wide, target = qparams(scale, 0, grid), qparams(0.75, 0, grid), qparams(1.0, 0, grid)
    expected = add.add_tflite(a, b, (source, wide), target)
    np.testing.assert_array_equal(add.add_xnnpack(a, b, (source, wide), target), expected)
    factor = qparams(scale * (2.0**-6 if scale < 1 else 2.0) if grid is S8 else scale, 0, grid)
    expected = multiply.multiply_tflite(a, b, (factor, wide), target)
    np.testing.assert_array_equal(multiply.multiply_xnnpack(a, b, (factor, wide), target), expected)


def test_xnnpack_leaves_16_bit_means_to_tflite() -> None:
    x, params = codes(1, (40, 13), S16), (qparams(0.03, 0, S16), qparams(0.01, 0, S16))
    expected = pooling.mean_tflite(x, (1,), True, params, ARITHMETIC)
    np.testing.assert_array_equal(pooling.mean_xnnpack(x, (1,), True, params, ARITHMETIC), expected)


@pytest.mark.parametrize("alpha", [1e-3, 600.0])
def test_xnnpack_leaves_extreme_slopes_to_tflite(alpha: float) -> None:
    every, params, target = np.arange(-128, 128, dtype=np.int32), (qparams(0.5, 3), None), qparams(0.25, -5)
    slope = np.float32(alpha)
    expected = leaky.leaky_relu_tflite(every, slope, params, target)
    np.testing.assert_array_equal(leaky.leaky_relu_xnnpack(every, slope, params, target), expected)


@pytest.mark.parametrize(("scale", "row", "reference", "optimized"), SOFTMAX_OF_LITERT)
def test_softmax_gives_the_codes_of_litert(
    scale: float, row: list[int], reference: list[int], optimized: list[int]
) -> None:
    drawn, source = np.array([row], np.int32), qparams(scale, 0)
    same(softmax.RULES["tflite"](drawn, source, SOFTMAX_TARGET), reference)
    same(softmax.RULES["ruy"](drawn, source, SOFTMAX_TARGET), optimized)


@pytest.mark.parametrize("rule", softmax.RULES)
def test_softmax_is_within_one_code_of_the_real_function(rule: str) -> None:
    for seed, (scale, spread) in enumerate(SOFTMAX_INPUTS):
        drawn = np.random.default_rng(seed).integers(-spread // 2, spread // 2 + 1, (40, 31)).astype(np.int32)
        exps = np.exp((drawn - drawn.max(axis=-1, keepdims=True)) * float(np.float32(scale)))
        real = np.clip(exps / exps.sum(axis=-1, keepdims=True) * 256 - 128, -128, 127)
        found = softmax.RULES[rule](drawn, qparams(scale, -3), SOFTMAX_TARGET)
        assert np.abs(found - real).max() <= 0.51  # a rounding, and the error of the fixed point


def test_exp_is_exact_to_its_last_bits_for_every_difference() -> None:
    differences = np.arange(-(31 << 26) + 1, 1, 999_983, dtype=np.int64)
    real = np.exp(differences / 2.0**26) * 2.0**31
    found = softmax.exp_of_negative(differences)
    assert np.abs(found - real).max() <= 512  # 2^-22
    assert found.tolist()[-3:] == [exp_fixed(int(value)) for value in differences[-3:]]


def test_hard_swish_is_not_the_rounded_function() -> None:
    source, target = qparams(0.05, 3), qparams(0.04, -5)
    every = np.arange(-128, 128, dtype=np.int32)
    x = (every - 3) * float(source.scale)
    real = np.clip(x * np.clip(x + 3, 0, 6) / 6 / float(target.scale) - 5, -128, 127)
    distance = np.abs(hardswish.hard_swish(every, source, target) - real)
    assert 0.5 < distance.max() < 1.0


def test_hard_swish_refuses_a_result_finer_than_its_16_bits() -> None:
    with pytest.raises(ValueError, match=r"output scale over 1/128 of the input's, got 0\.001 for 0\.5"):
        hardswish.hard_swish(codes(1, (4,)), qparams(0.5, 0), qparams(0.001, 0))


def decimal_of(name: str, x: float) -> Decimal:
    """The real function with 60 digits: exp of `decimal`, and the Taylor series of erf."""
    value = Decimal(x)
    if name == "Sigmoid":
        return 1 / (1 + (-value).exp())
    if name == "Tanh":
        return 1 - 2 / ((2 * value).exp() + 1)
    z = value * Decimal("0.5").sqrt()
    term, total, n = z, z, 0
    while abs(term) > Decimal("1e-55"):
        n += 1
        term = -term * z * z / n
        total += term / (2 * n + 1)
    pi = Decimal("3.14159265358979323846264338327950288419716939937510582097494")
    return value / 2 * (1 + 2 / pi.sqrt() * total)


@pytest.mark.parametrize(("name", "roundings"), [("Tanh", 1), ("Sigmoid", 3), ("Gelu", 3)])
def test_function_is_the_real_one_but_for_its_roundings(name: str, roundings: int) -> None:
    """Each rounding is 2^-24 of the value: of Sigmoid its exp, sum and quotient; of Gelu its erfc and product.

    The argument of Gelu is rounded twice, which above zero changes erfc by 2 * 0.48 of that at most. Below zero it
    grows with the slope of erfc: see the next test.
    """
    x = np.concatenate([np.arange(-160, 160) / 16, np.random.default_rng(1).normal(0, 4, 300)]).astype(np.float32)
    x = x[(np.abs(x) < 10) & (x >= (0 if name == "Gelu" else -10))]
    with localcontext() as context:
        context.prec = 80
        for value, found in zip(x, tables.FUNCTIONS[name](x), strict=True):
            real = decimal_of(name, float(value))
            assert abs(Decimal(float(found)) - real) <= abs(real) * roundings * Decimal(2.0**-24), float(value)


def test_gelu_below_zero_is_near_the_real_function() -> None:
    x = (-np.arange(1, 120) / 16).astype(np.float32)
    with localcontext() as context:
        context.prec = 80
        real = np.array([float(decimal_of("Gelu", float(value))) for value in x])
    assert np.abs(tables.gelu(x) - real).max() <= 2.0**-24
    t = -x * np.float32(math.sqrt(0.5))  # given its own argument it is one ulp off at most
    own = np.array([0.5 * float(a) * math.erfc(float(b)) for a, b in zip(x, t, strict=True)])
    assert (np.abs(tables.gelu(x) - own) <= np.spacing(np.abs(own.astype(np.float32)))).all()


@pytest.mark.parametrize("name", tables.FUNCTIONS)
def test_function_far_from_zero_is_finite(name: str) -> None:
    found = tables.FUNCTIONS[name](np.array([-1e4, -100, 100, 1e4], np.float32))
    low, top = {"Gelu": (0, 1e4), "Sigmoid": (0, 1), "Tanh": (-1, 1)}[name]
    np.testing.assert_allclose(found[[0, 1, 3]], [low, low, top], rtol=0, atol=2.0**-100)
    assert found.dtype == np.float32


SOURCE_SCALE = np.array(0.37, np.float32)


def test_ruy_vectors_round_leftover_channels_differently() -> None:
    channels = 19
    weight = (np.random.default_rng(4).uniform(0.3, 1, channels) * 0.01).astype(np.float32)
    target = qparams(0.11, -7)
    acc = np.random.default_rng(5).integers(-12000, 12000, (2, channels, 400)).astype(np.int32)
    how = requantize.requantization("ruy_vectors", SOURCE_SCALE, weight, target)
    found = requantize.requantize(acc, how.spread(1, 3))
    expected = []
    for values in acc:
        for c, row in enumerate(values):
            real = exact(float(SOURCE_SCALE) * float(weight[c]) / float(target.scale))
            last = half_up if c < 16 else half_away
            expected += [twice_rounded(int(value), fixed(real), last) - 7 for value in row]
    same(found, expected)
    for other in ("ruy_double", "gemmlowp_double"):
        wrong = requantize.requantization(other, SOURCE_SCALE, weight, target)
        assert np.any(requantize.requantize(acc, wrong.spread(1, 3)) != found)


def test_ruy_vectors_need_a_scale_per_channel() -> None:
    weight = np.full((2, 3), 0.01, np.float32)
    how = requantize.requantization("ruy_vectors", SOURCE_SCALE, weight, qparams(0.1, 0))
    with pytest.raises(ValueError, match=r"needs one scale per channel along one axis, got shape \(2, 3\)"):
        requantize.requantize(np.ones((2, 3), np.int32), how)
