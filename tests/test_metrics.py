import math

import numpy as np
import pytest

from onnxqt.metrics import Tally
from onnxqt.numerics import Array

RELATIVE = 1e-12  # float64 sums of 250 terms, in two orders: 250 * 2^-53 = 3e-14 of the sum of their sizes


def scores(seed: int, samples: int = 25, classes: int = 10) -> Array:
    return np.random.default_rng(seed).normal(size=(samples, classes)).astype(np.float32)


def tally_of(output: Array, reference: Array, labels: Array | None = None, cuts: tuple[int, ...] = ()) -> Tally:
    tally = Tally()
    for part in np.split(np.arange(len(output)), cuts):
        tally.add(output[part], reference[part], None if labels is None else labels[part])
    return tally


@pytest.mark.parametrize("cuts", [(), (1, 8, 24)], ids=["at-once", "in-batches"])
def test_fidelity_against_its_definitions(cuts: tuple[int, ...]) -> None:
    output, reference = scores(1), scores(2)
    a, b = output.astype(np.float64), reference.astype(np.float64)
    assert tally_of(output, reference, cuts=cuts).fidelity() == {
        "mse": pytest.approx(np.mean((a - b) ** 2), rel=RELATIVE, abs=0),
        "snr_db": pytest.approx(10 * math.log10(np.sum(b**2) / np.sum((a - b) ** 2)), rel=RELATIVE, abs=0),
        "cosine": pytest.approx(np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b), rel=RELATIVE, abs=0),
        "agreement": np.mean(a.argmax(axis=1) == b.argmax(axis=1)),
        "non_finite": 0,
    }


@pytest.mark.parametrize("cuts", [(), (1, 8, 24)], ids=["at-once", "in-batches"])
def test_top1_against_its_definition(cuts: tuple[int, ...]) -> None:
    output = scores(1)
    labels = np.where(np.arange(25) < 18, output.argmax(axis=1), (output.argmax(axis=1) + 1) % 10)
    assert tally_of(output, scores(2), labels, cuts).metrics() == {"top1": 18 / 25}


def test_agreement_stands_in_for_top1_without_labels() -> None:
    reference = scores(2)
    output = reference.copy()
    output[:5] = -output[:5]
    assert tally_of(output, reference).metrics() == {"agreement": 20 / 25}


def test_equal_outputs_have_no_ratio() -> None:
    output = scores(1)
    fidelity = tally_of(output, output.copy()).fidelity()
    assert fidelity["snr_db"] is None
    assert (fidelity["mse"], fidelity["agreement"]) == (0.0, 1.0)
    assert fidelity["cosine"] == pytest.approx(1.0, rel=RELATIVE, abs=0)


def test_zero_reference() -> None:
    fidelity = tally_of(scores(1), np.zeros((25, 10), np.float32)).fidelity()
    assert fidelity["snr_db"] is None
    assert fidelity["cosine"] is None
    assert fidelity["mse"] == pytest.approx(np.mean(scores(1).astype(np.float64) ** 2), rel=RELATIVE, abs=0)


def test_zero_output() -> None:
    fidelity = tally_of(np.zeros((25, 10), np.float32), scores(1)).fidelity()
    assert fidelity["snr_db"] == pytest.approx(0.0, rel=0, abs=10 * RELATIVE)  # decibel of a ratio of 1
    assert fidelity["cosine"] is None


def test_nothing_counted() -> None:
    nothing = {"mse": None, "snr_db": None, "cosine": None, "agreement": None, "non_finite": 0}
    assert Tally().fidelity() == nothing
    assert tally_of(np.zeros((0, 10), np.float32), np.zeros((0, 10), np.float32)).fidelity() == nothing
    assert Tally().metrics() == {}


def test_values_without_a_finite_reference_do_not_count() -> None:
    reference = np.array([1.0, np.nan, np.inf], np.float32)
    fidelity = tally_of(np.array([1.0, 2.0, 3.0], np.float32), reference).fidelity()
    assert (fidelity["mse"], fidelity["non_finite"]) == (0.0, 0)


def test_broken_values_are_counted() -> None:
    reference = np.array([1.0, 2.0, np.inf], np.float32)
    fidelity = tally_of(np.array([np.nan, -np.inf, np.inf], np.float32), reference).fidelity()
    assert (fidelity["mse"], fidelity["snr_db"], fidelity["non_finite"]) == (None, None, 2)


def test_scalar_output() -> None:
    tally = Tally()
    tally.add(np.array(1.5, np.float32), np.array(1.0, np.float32))
    fidelity = tally.fidelity()
    assert (fidelity["mse"], fidelity["agreement"]) == (0.25, None)


@pytest.mark.parametrize("shape", [(6, 1), (6,), (6, 3, 4)], ids=["one-value", "vector", "image"])
def test_outputs_without_classes(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    output, reference = (rng.normal(size=shape).astype(np.float32) for _ in range(2))
    tally = tally_of(output, reference, np.zeros(6, np.int64))
    assert tally.metrics() == {}
    assert tally.fidelity()["agreement"] is None
    assert tally.fidelity()["mse"] == pytest.approx(
        np.mean((output.astype(np.float64) - reference) ** 2), rel=RELATIVE, abs=0
    )


def test_sums_are_float64() -> None:
    """1e8 + 1 is 1e8 in float32."""
    output = np.array([[1e4, 1.0]] * 3, np.float32)
    reference = np.zeros((3, 2), np.float32)
    assert tally_of(output, reference).squared_error == 3 * (1e8 + 1)
