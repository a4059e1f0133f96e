"""Grids in training of schemes that the training graph cannot hold as they are."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from helpers import Prepared, build, normal, prepare

from onnxqt.calibrate import overridden
from onnxqt.overrides import parse_overrides
from onnxqt.schemes import Grids, parse_scheme
from onnxqt.trim.quantizers import Feeds, prune_input, quantizer_inputs
from onnxqt.trim.ranges import Ranges
from onnxqt.trim.regimes import Regime, from_plain, to_plain
from onnxqt.trim.task import Task


@pytest.fixture(scope="module")
def net() -> Prepared:
    text = "(float[n,37] x) => (float[] y) { a = Gemm(x, w) r = Relu(a) y = Gemm(r, v) }"
    return prepare(build(text, {"w": normal(37, 16), "v": normal(16, 3, seed=1)}))


def settings(net: Prepared, *grids: Grids) -> list[Feeds]:
    """What the quantizers of the training graph get under each regime."""
    regimes = tuple(Regime(str(index), each, "minmax") for index, each in enumerate(grids))
    weights = {site.tensor: net.model.graph.constant(site.tensor) for site in net.plan.weights}
    shapes = {name: value.shape for name, value in weights.items() if value is not None}
    job = SimpleNamespace(regimes=regimes, prune="none", parameters=tuple(weights), prune_memory=0.9)
    task = SimpleNamespace(job=job, plan=net.plan, shapes=shapes, start=weights, ranges=net.ranges)
    return Ranges(cast(Task, task)).settings


def weights_of(feeds: Feeds, tensor: str) -> Mapping[str, Any]:
    return {name: feeds[name] for name in quantizer_inputs(tensor)}


def test_weights_with_blocks_are_rounded_per_channel(net: Prepared) -> None:
    blocked, per_channel = settings(net, *(parse_scheme(f"w4a8-asym-{form}").grids for form in ("b16", "pc")))
    assert blocked.keys() == per_channel.keys()
    for name, value in blocked.items():
        np.testing.assert_array_equal(value, per_channel[name])
    assert blocked[quantizer_inputs("w").scale].shape == (16,)
    assert np.isinf(blocked[prune_input("w")]).all()


def test_asymmetric_weights_of_a_scheme_of_weights_alone_are_carried_by_int8(net: Prepared) -> None:
    """UINT4 codes with zero point z are those of INT4 with z - 8."""
    (feeds,) = settings(net, parse_scheme("w4af-asym-pc").grids)
    found = quantizer_inputs("w")
    assert (int(feeds[found.qmin]), int(feeds[found.qmax])) == (-8, 7)
    weight = net.model.graph.constant("w")
    assert weight is not None
    scale = (weight.max(axis=0).astype(np.float64) - weight.min(axis=0)) / 15
    np.testing.assert_array_equal(feeds[found.scale], scale.astype(np.float32))
    np.testing.assert_array_equal(feeds[found.zero_point], np.rint(-weight.min(axis=0) / feeds[found.scale]) - 8)


def test_overrides_reach_the_training_graph(net: Prepared) -> None:
    base = parse_scheme("w4a4-sym-pc").grids
    given = {"w": {"weight_bits": 8}, "v": {"granularity": "pt"}, "r": {"activation_bits": 16}}
    plain, own = settings(net, base, overridden(base, net.plan, parse_overrides(given)))
    assert [int(feeds[quantizer_inputs("w").qmax]) for feeds in (plain, own)] == [7, 127]
    assert [len(np.unique(feeds[quantizer_inputs("v").scale])) for feeds in (plain, own)] == [3, 1]
    assert [int(feeds[quantizer_inputs("r").qmax]) for feeds in (plain, own)] == [7, 127]  # as wide as INT8 holds
    assert weights_of(plain, "x").keys() == weights_of(own, "x").keys()


def test_a_regime_of_a_new_scheme_comes_back_from_json(net: Prepared) -> None:
    base = parse_scheme("w4a8-asym-b32").grids
    grids = overridden(base, net.plan, parse_overrides({"w": {"weight_bits": 8, "granularity": "pt"}}))
    regime = Regime("own", grids, "mse", dynamic=True)
    assert from_plain(to_plain(regime)) == regime
