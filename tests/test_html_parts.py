"""The parts of pages: numbers as text, hidden characters, axes, paths and histograms."""

import math
import re
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest

from onnxqt.calibrate import observe
from onnxqt.html.page import linked
from onnxqt.html.svg import Picture, Scale, line, spanning, staircase, ticks
from onnxqt.html.tensors import BARS, heights
from onnxqt.html.text import decibel, digits, percent, plural, points, short, visible
from onnxqt.table.form import Stats
from onnxqt.table.stats import stats_of

# --- text -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("conv/Ünïcode 層 🙂", "conv/Ünïcode 層 🙂"),
        ("a\x00b\x7f", "a\\x00b\\x7f"),
        ("a\nb\tc\r", "a\\x0ab\\x09c\\x0d"),
        ("\u202eabc\u2066\u200b\ufeff", "\\u202eabc\\u2066\\u200b\\ufeff"),
        ("\ud800", "\\ud800"),
        ("\ufffe\ufdd0\U0001ffff", "\\ufffe\\ufdd0\\U0001ffff"),
        ("\x85\xad", "\\x85\\xad"),
    ],
)
def test_hidden_characters_are_made_visible(text: str, shown: str) -> None:
    assert visible(text) == shown
    assert visible(shown) == shown


def test_long_names_lose_their_middle() -> None:
    assert short("a" * 96) == "a" * 96
    assert short("a" * 50 + "b" * 50) == "a" * 46 + "..." + "b" * 46
    assert short("\x00" * 40) == "\\x00" * 11 + "\\x" + "..." + "00" + "\\x00" * 11


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (percent(0.87604), "87.60"),
        (percent(None), "n/a"),
        (points(0.0251), "2.51"),
        (points(0.0251, "+"), "+2.51"),
        (points(-0.0251, "+"), "\N{MINUS SIGN}2.51"),
        (points(-0.00001, "+"), "0.00"),
        (points(None), "n/a"),
        (decibel(21.46, 0.2), "21.5"),
        (decibel(-3.0, 9.0), "\N{MINUS SIGN}3.0"),
        (decibel(None, 0.0), "exact"),
        (decibel(None, None), "n/a"),
        (digits(0.0), "0"),
        (digits(-0.0), "0"),
        (digits(0.00123456), "0.001235"),
        (digits(-9.313e-10), "\N{MINUS SIGN}9.313e\N{MINUS SIGN}10"),
        (digits(5203.2), "5203"),
        (digits(40551040), "4.055e+07"),
        (digits(12345.6), "12,346"),
        (digits(None), "n/a"),
        (plural(1, "step"), "1 step"),
        (plural(2400, "step"), "2,400 steps"),
    ],
)
def test_numbers(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("no address <b>", "no address &lt;b&gt;"),
        ("see https://a.org/x?a=1&b=2.", 'see <a href="https://a.org/x?a=1&amp;b=2" rel="noopener noreferrer">'
         "https://a.org/x?a=1&amp;b=2</a>."),
        ("(http://a.org/)", '(<a href="http://a.org/" rel="noopener noreferrer">http://a.org/</a>)'),
        ("javascript:alert(1)", "javascript:alert(1)"),
        ("ftp://a.org", "ftp://a.org"),
        ('https://a.org/"onclick="x', '<a href="https://a.org/" rel="noopener noreferrer">https://a.org/</a>&#34;onclick=&#34;x'),
        ("https://a\u202e.org", '<a href="https://a" rel="noopener noreferrer">https://a</a>\\u202e.org'),
    ],
)  # fmt: skip
def test_addresses_become_links(text: str, html: str) -> None:
    assert str(linked(text)) == html


# --- axes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (-2.1, 2.64), (71.48, 87.64), (1e-9, 2e-9), (0.0, 1e12), (-1e-3, 1e3), (5.0, 5.001)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    scale = Scale(low, high, 0, 100)
    found = scale.ticks
    assert 2 <= len(found) <= 6
    room = 1e-6 * (high - low)
    assert all(low - room <= tick <= high + room for tick in found)
    steps = np.diff(found)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)  # of sums of float64 that cancel by up to 1e4 steps
    assert round(steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9), 6) in (1, 2, 5)


@pytest.mark.parametrize(("low", "high"), [(1e-9, 0.5), (0.08, 0.9), (1e-12, 1e12), (1.0, 10.0), (3.0, 4.0)])
def test_logarithmic_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = Scale(low, high, 0, 100, logarithmic=True).ticks
    assert all(low * 0.99 <= tick <= high * 1.01 for tick in found)
    assert len(found) <= 9
    assert all(f"{tick:.0e}"[0] in "125" for tick in found)


def test_places_on_scales() -> None:
    even = Scale(-1, 3, 10, 50)
    assert [even.at(value) for value in (-1, 0, 3, 9, -9)] == [10, 20, 50, 50, 10]
    ratios = Scale(0.01, 100, 100, 0, logarithmic=True)
    assert [round(ratios.at(value), 9) for value in (0.01, 1, 100, 0)] == [100, 50, 0, 100]


@pytest.mark.parametrize(
    "values", [[], [0.0], [3.0], [-2.0, -2.0], [5e-324], [1.0, 1.0 + 2**-50], [-1.7e308, 1.7e308], [1e-320, 1e300]]
)
@pytest.mark.parametrize("logarithmic", [False, True])
def test_scales_of_few_or_equal_numbers(values: list[float], logarithmic: bool) -> None:
    scale = spanning(values, 0, 100, logarithmic)
    assert scale.high > scale.low
    assert all(0 <= scale.at(value) <= 100 for value in values)
    assert all(math.isfinite(tick) for tick in scale.ticks)


# --- pictures -------------------------------------------------------------------------------------------


def test_pictures_have_words_and_escape_them() -> None:
    picture = Picture("p", 50, "<b>", "d & \x00")
    picture.text((1, 2), "</text><script>", "small", "end")
    picture.mark((3, 4), "circle", "before")
    picture.mark((3, 4), "cross", "after")
    picture.path("", "grid")
    root = fromstring(picture.markup())
    assert [child.tag for child in root] == ["title", "desc", "text", "circle", "path"]
    assert [child.text for child in root][:3] == ["<b>", "d & \\x00", "</text><script>"]
    assert root.attrib == {"viewBox": "0 0 360 50", "role": "img", "aria-labelledby": "p-title p-desc"}
    assert root[2].attrib == {"x": "1", "y": "2", "text-anchor": "end", "class": "small"}


def test_paths() -> None:
    assert line([(0, 1), (2.04, 3.06), (-0.01, 1e30)]) == "M0 1L2 3.1L0 1000000"
    assert ticks([1, 2.55], 3, 8) == "M1 3v8M2.5 3v8" or ticks([1, 2.55], 3, 8) == "M1 3v8M2.6 3v8"
    assert staircase(0, 10, 50, []) == ""


def test_stairs_have_the_heights_that_they_are_given() -> None:
    given = [0.0, 3.33, 3.33, 70.0, 0.04, 0.0]
    steps = staircase(5, 12.5, 80, given)
    at, heights_found = 0.0, []
    for kind, value in re.findall(r"([vh])(-?[\d.]+)", steps)[:-1]:
        if kind == "v":
            at -= float(value)
        else:
            assert value == "12.50"
            heights_found.append(at)
    np.testing.assert_allclose(heights_found, given, rtol=0, atol=0.05 + 1e-9)  # one digit behind the point
    assert steps.startswith("M5 80")


# --- histograms -----------------------------------------------------------------------------------------


def test_histogram_keeps_every_value() -> None:
    """log(1 + count) of each bar; bars are the sums of the bins whose middles they hold."""
    values = np.random.default_rng(0).normal(size=5000).astype(np.float32)
    stats = stats_of(observe(values))
    found = heights(stats, stats.min, stats.max)
    assert len(found) == BARS
    counts, edges = np.histogram(values, BARS, (stats.min, stats.max))
    largest = np.log1p(counts).max()
    counted = np.expm1(np.array(found) * np.log1p(_largest(stats, BARS)))
    assert round(float(counted.sum())) == 5000
    assert max(found) == 1
    # A bin whose middle lies on the other side of an edge moves with its values, at most a bin on either side.
    width = 2 * stats.limit / 8192
    moved = [np.count_nonzero(np.abs(values - edge) <= width) for edge in edges]
    assert np.all(np.abs(counted - counts) <= np.array(moved[:-1]) + moved[1:] + 1e-6)
    assert largest > 0


def _largest(stats: Stats, bars: int) -> float:
    assert stats.counts is not None
    centres = -stats.limit + 2 * stats.limit / stats.counts.size * (np.arange(stats.counts.size) + 0.5)
    edges = np.linspace(stats.min, stats.max, bars + 1)
    index = np.clip(np.searchsorted(edges, np.clip(centres, stats.min, stats.max), side="right") - 1, 0, bars - 1)
    return float(np.bincount(index, stats.counts, bars).max())


def test_histogram_of_a_narrow_range_has_no_gaps() -> None:
    """No more bars than bins: values near 5 within 0.02 of them fill 10 of 8192 bins of [-8, 8]."""
    values = np.linspace(5, 5.02, 999, dtype=np.float32)
    found = heights(stats_of(observe(values)), 5, 5.02)
    assert 8 <= len(found) <= 10
    assert min(found) > 0.5


def test_histogram_of_one_value_or_none() -> None:
    assert heights(stats_of(observe(np.full(9, 2.0, np.float32))), 1.5, 2.5)[BARS // 2] == 1
    assert heights(Stats(0, 0.0, 0.0), 0, 1) == []
    assert set(heights(Stats(4, 0.0, 1.0, {}, np.zeros(16), 1.0), 0, 1)) == {0.0}
