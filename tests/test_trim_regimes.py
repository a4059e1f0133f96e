"""What training makes robust to: schemes and the precisions of every back end."""

import json
from dataclasses import replace

import numpy as np
import pytest

from onnxqt.compiler import grids_of, profile_regimes
from onnxqt.errors import UsageError
from onnxqt.numerics import Grid
from onnxqt.pipeline import Settings
from onnxqt.profiles import PROFILES, parse_precision
from onnxqt.schemes import Grids, Placement, parse_scheme
from onnxqt.trim import Regime, scheme_regime
from onnxqt.trim.quantizers import ACTIVATION_BLEND, WEIGHT_BLEND
from onnxqt.trim.ranges import blends
from onnxqt.trim.regimes import CARRIER_BITS, balanced, from_plain, to_plain

UNIFORM = [name for name, profile in PROFILES.items() if profile.arithmetic.levels == "uniform"]
LOGARITHMIC = sorted(set(PROFILES) - set(UNIFORM))
# Nothing in it is as in another regime, so that a field that is lost or mixed up shows.
ODD = Regime(
    "odd",
    Grids(
        weight=Grid(3, signed=True, narrow=True),
        weight_placement=Placement(symmetric=False, power_of_two=True),
        per_channel=True,
        search_clip=False,
        activation=Grid(4, signed=False),
        io=Grid(8, signed=True),
        activation_placement=Placement(symmetric=True),
        fixed_outputs={"Softmax": (0.1, 3), "Tanh": (2.0**-7, 0)},  # 0.1 is no finite binary fraction
    ),
    "entropy",
    dynamic=True,
)
REGIMES = [
    ODD,
    *(scheme_regime(parse_scheme(name), "percentile") for name in ("w2a4-asym-pt", "w8a8-sym-pc")),
    *(regime for name in UNIFORM for regime in profile_regimes(PROFILES[name])),
]


@pytest.mark.parametrize("regime", REGIMES, ids=lambda regime: regime.name)
def test_regime_comes_back_from_json(regime: Regime) -> None:
    back = from_plain(json.loads(json.dumps(to_plain(regime))))
    assert back == regime
    assert isinstance(back.grids.weight, Grid)
    assert isinstance(back.grids.activation_placement, Placement)


def test_scheme_regime_has_the_grids_of_the_scheme() -> None:
    scheme = parse_scheme("w4a8-asym-pt")
    regime = scheme_regime(scheme, "minmax")
    assert (regime.name, regime.ranges, regime.dynamic) == ("w4a8-asym-pt", "minmax", False)
    assert regime.grids == scheme.grids


@pytest.mark.parametrize(("weight_bits", "activation_bits"), [(8, 8), (4, 16), (8, 16), (16, 8), (32, 32)])
def test_what_is_wider_than_the_carrier_stays_float(weight_bits: int, activation_bits: int) -> None:
    grids = replace(ODD.grids, weight=Grid(weight_bits, True), activation=Grid(activation_bits, True))
    fed = blends(replace(ODD, grids=grids), 0.75)
    assert fed[WEIGHT_BLEND] == (0.75 if weight_bits <= CARRIER_BITS else 0.0)
    assert fed[ACTIVATION_BLEND] == (0.75 if activation_bits <= CARRIER_BITS else 0.0)
    assert all(value.dtype == np.float32 and value.shape == () for value in fed.values())


@pytest.mark.parametrize("name", UNIFORM)
def test_back_end_gives_a_regime_for_each_precision(name: str) -> None:
    profile = PROFILES[name]
    regimes = profile_regimes(profile)
    assert [regime.name for regime in regimes] == [f"{name}/{precision}" for precision in profile.policy.precisions]
    for regime, precision in zip(regimes, map(parse_precision, profile.policy.precisions), strict=True):
        by_row = precision.dynamic and profile.arithmetic.dynamic == "row"  # such kernels are symmetric
        grids = grids_of(profile.policy, precision)
        assert regime.grids == (replace(grids, activation_placement=Placement(True)) if by_row else grids)
        assert (regime.ranges, regime.dynamic) == (profile.policy.ranges, precision.dynamic)
        assert regime.rounds_activations == (precision.activation_bits <= 8)
        assert regime.rounds_weights


def test_some_back_ends_are_dynamic_and_some_have_wide_activations() -> None:
    """Else the tests above would show nothing."""
    assert any(regime.dynamic for regime in REGIMES[1:])
    assert any(not regime.rounds_activations for regime in REGIMES)


def test_logarithmic_levels_are_refused() -> None:
    assert LOGARITHMIC == ["nnie_log"]
    message = r"^--robust-to nnie_log: training cannot round to its logarithmic levels: name another back end$"
    with pytest.raises(UsageError, match=message):
        profile_regimes(PROFILES["nnie_log"])


def test_settings_have_each_regime_once() -> None:
    schemes = (parse_scheme("w8a8-sym-pc"), parse_scheme("w4a8-sym-pc"))
    doubled = (scheme_regime(schemes[0], "mse"), *profile_regimes(PROFILES["ort_cpu"]))
    names = [regime.name for regime in Settings(schemes, robust_to=doubled).regimes]
    assert names == ["w8a8-sym-pc", "w4a8-sym-pc", "ort_cpu/w8a8", "ort_cpu/w8a8-dyn"]


# --- how much each counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_losses_are_balanced_about_their_geometric_mean(strength: float) -> None:
    losses = np.array([0.5, 1.0, 2.0])
    np.testing.assert_allclose(balanced(losses, strength), losses**-strength, rtol=2.0**-23)


def test_balance_is_bounded() -> None:
    np.testing.assert_array_equal(balanced(np.array([1e-3, 1.0, 1e3]), 1.0), [4, 1, 0.25])


def test_what_loses_nothing_counts_most_and_moves_no_other() -> None:
    """Rounding may bring the loss of the float network a little below the least possible one."""
    for nothing in (0.0, -1e-9):
        found = balanced(np.array([0.5, 2.0, nothing]), 0.5)
        np.testing.assert_allclose(found[:2], [2**0.5, 0.5**0.5], rtol=2.0**-23)
        assert found[2] == 4
    np.testing.assert_array_equal(balanced(np.zeros(2), 0.0), [1, 1])
    assert balanced(np.zeros(2), 1.0).dtype == np.float32
