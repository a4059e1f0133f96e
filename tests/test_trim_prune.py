"""Reverse pruning: which tails are clipped, and what tails are."""

import numpy as np
import pytest

from onnxqt.calibrate import best_clip
from onnxqt.numerics import Array, FloatArray, Grid, QParams, fake_quantize
from onnxqt.plan import IntegerNode, QuantPlan, WeightSite
from onnxqt.trim.prune import UNCLIPPED, PruneMode, Quantile, choose_quantiles, clip_at, largest, tails

GRID = Grid(4, signed=True, narrow=True)
BOTH = {False: GRID, True: GRID}


def plan_of(axis: int = 0) -> QuantPlan:
    return QuantPlan((), (IntegerNode("n", "Conv", (), "y", WeightSite("w", axis)),), ())


def share_of(weight: Array, mode: PruneMode, grids: dict[bool, Grid], axis: int = 0) -> FloatArray:
    return choose_quantiles(plan_of(axis), {"w": weight}, grids, mode)["w"].share


def at(*shares: float, reach: float = 1.0) -> Quantile:
    """A quantile per channel, or per tensor for one share."""
    share = np.array(shares if len(shares) > 1 else shares[0])
    return Quantile(share, np.full(share.shape, reach))


def even(rows: int) -> FloatArray:
    """Values on the grid of their own absmax: any clip loses, none gains."""
    return np.tile(np.arange(-7, 8, dtype=np.float32), (rows, 1))


def normal(*shape: int) -> FloatArray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def with_outlier(weight: FloatArray, factor: float) -> FloatArray:
    """The first value becomes `factor` times the largest one."""
    changed = weight.copy()
    changed.flat[0] = factor * np.abs(weight).max()
    return changed


def fourth_power(weight: Array, clip: float) -> float:
    scale = np.asarray(clip / GRID.qmax, np.float32)
    return float(np.sum((fake_quantize(weight, QParams(scale, np.zeros((), np.int32), GRID)) - weight) ** 4))


@pytest.mark.parametrize("mode", ["tensor", "channel"])
def test_share_stays_1_where_clipping_does_not_pay(mode: PruneMode) -> None:
    share = share_of(even(3), mode, BOTH)
    assert share.shape == (() if mode == "tensor" else (3,))
    assert np.all(share == 1)


@pytest.mark.parametrize("mode", ["tensor", "channel"])
def test_an_outlier_is_left_out(mode: PruneMode) -> None:
    """At three times the largest of 400 normal values, all others lose by the outlier's wide grid."""
    weight = with_outlier(normal(1, 400), 3.0)
    largest_value = float(np.abs(weight).max())
    assert min(fourth_power(weight, f * largest_value) for f in (0.9, 0.8)) < fourth_power(weight, largest_value)
    assert np.squeeze(share_of(weight, mode, BOTH)) == 399 / 400


def test_each_channel_is_judged_by_itself() -> None:
    """Only the second row has an outlier: the search must look along the channel axis, wherever it is."""
    rows = np.concatenate([np.tile(even(1), 27)[:, :400], with_outlier(normal(1, 400), 3.0)])
    for axis, weight in ((0, rows), (1, rows.T)):
        first, second = share_of(np.ascontiguousarray(weight), "channel", BOTH, axis)
        assert first == 1 > second


@pytest.mark.parametrize(
    ("mode", "grids"),
    [("none", BOTH), ("tensor", {True: GRID}), ("channel", {False: GRID}), ("tensor", {}), ("channel", {})],
)
def test_nothing_is_clipped_where_no_regime_has_such_a_grid(mode: PruneMode, grids: dict[bool, Grid]) -> None:
    share = share_of(with_outlier(normal(2, 400), 3.0), mode, grids)
    assert share.shape == ()
    assert share == 1


@pytest.mark.parametrize("mode", ["tensor", "channel"])
def test_the_first_clip_is_the_best_one(mode: PruneMode) -> None:
    """A lone extreme value leaves a gap below it; the clip may lie in it."""
    weight = with_outlier(normal(1, 400), 3.0)
    quantile = choose_quantiles(plan_of(), {"w": weight}, BOTH, mode)["w"]
    best = best_clip(weight, GRID, power=4)
    # One rounding to float32 each.
    np.testing.assert_allclose(np.squeeze(clip_at(weight, 0, quantile)), best, rtol=2 * 2.0**-24)


def test_clip_of_a_tensor_is_a_quantile_of_its_sizes() -> None:
    weight = np.array([[-5, 1, 2], [3, -4, 0]], np.float32)
    assert clip_at(weight, 0, at(1)) == np.inf  # nothing is clipped, however it grows
    assert clip_at(weight, 0, at(0.6)) == pytest.approx(3, rel=1e-6)  # 0.6 of five gaps: 3 gaps
    assert clip_at(weight, 0, at(0.5)) == 2.5
    assert clip_at(weight, 0, at(0.5, reach=1.5)) == 3.75


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_clip_of_channels_lies_along_their_axis(axis: int) -> None:
    rows = np.array([[0, -1, 2, -3, 4], [10, 30, 20, 50, -40]], np.float32).reshape(2, 1, 5)
    weight, shares = np.moveaxis(rows, 0, axis), at(0.5, 1)
    clips = clip_at(weight, axis, shares)
    np.testing.assert_array_equal(clips, [2, np.inf])
    assert clips.dtype == np.float32
    np.testing.assert_array_equal(largest(weight, axis, shares), [4, 50])
    assert largest(weight, axis, UNCLIPPED) == 50


def test_tails_against_their_definitions() -> None:
    """Two sizes of values: kurtosis = mean of d^4 / (mean of d^2)^2 - 3, computed by hand for k large of n values."""
    n, k, large = 1000, 10, 9.0
    weight = np.repeat(np.array([-large, -1, 1, large], np.float32), [k // 2, (n - k) // 2, (n - k) // 2, k // 2])
    found = tails(weight, np.asarray(2.0, np.float32))
    second, fourth = (k * large**2 + n - k) / n, (k * large**4 + n - k) / n
    assert found.kurtosis == pytest.approx(fourth / second**2 - 3, rel=1e-12)
    assert (found.largest, found.clipped) == (large, k / n)
    # 999 gaps: 0.99 of them end at value number 989.01 of 990 small ones, so 1 % of a gap from 1 to 9
    assert found.quantiles == {"0.5": 1.0, "0.99": pytest.approx(1 + 0.01 * 8), "0.999": large}


def test_tails_of_known_distributions() -> None:
    """Excess kurtosis: 0 of the normal distribution, -6/5 of the uniform, 3 of Laplace's."""
    rng, n = np.random.default_rng(0), 200_000
    # Standard error of the sample kurtosis of a normal distribution is sqrt(24 / n) = 0.011; Laplace's has heavier
    # tails: its eighth moment 8! makes it sqrt((8! - 4! 4!) / 4 / n) < 0.25.
    assert tails(rng.normal(size=n)).kurtosis == pytest.approx(0, abs=4 * 0.011)
    assert tails(rng.uniform(-1, 1, n)).kurtosis == pytest.approx(-1.2, abs=4 * 0.011)
    assert tails(rng.laplace(size=n)).kurtosis == pytest.approx(3, abs=4 * 0.25)


def test_tails_of_a_shifted_weight_are_those_about_its_mean() -> None:
    weight = normal(1000)
    moved = tails(weight.astype(np.float64) + 100)
    assert moved.kurtosis == pytest.approx(tails(weight).kurtosis, abs=1e-9)  # float64, numbers near 100
    assert moved.clipped == 0.0


def test_tails_of_a_constant() -> None:
    found = tails(np.zeros((2, 3), np.float32), np.zeros((2, 1), np.float32))
    assert (found.largest, found.kurtosis, found.clipped) == (0.0, 0.0, 0.0)


def test_a_clip_per_channel_counts_what_lies_beyond_it() -> None:
    weight = np.array([[1, 2, 3, 4], [10, 20, 30, 40]], np.float32)
    assert tails(weight, np.array([[3], [10]], np.float32)).clipped == 4 / 8
