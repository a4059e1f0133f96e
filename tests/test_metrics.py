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


def softmax(values: Array) -> Array:
    powers = np.exp(values.astype(np.float64))
    shares: Array = powers / np.sum(powers, axis=1, keepdims=True)
    return shares


def labels_of(samples: int = 25, classes: int = 10) -> Array:
    return np.random.default_rng(3).integers(0, classes, samples)


@pytest.mark.parametrize("cuts", [(), (1, 8, 24)], ids=["at-once", "in-batches"])
@pytest.mark.parametrize("given", ["scores", "probabilities"])
def test_brier_score_and_calibration_error_against_their_definitions(given: str, cuts: tuple[int, ...]) -> None:
    p, reference, labels = softmax(3 * scores(1)), scores(2), labels_of()
    output = np.log(p) if given == "scores" else p
    confidence = tally_of(
        output, softmax(reference) if given == "probabilities" else reference, labels, cuts
    ).confidence()
    brier = sum(sum((p[i, k] - (k == labels[i])) ** 2 for k in range(10)) for i in range(25)) / 25
    ece = 0.0
    for m in range(1, 16):
        inside = [i for i in range(25) if (m - 1) / 15 < p[i].max() <= m / 15]
        if inside:
            correct = np.mean([p[i].argmax() == labels[i] for i in inside])
            ece += len(inside) / 25 * abs(correct - np.mean([p[i].max() for i in inside]))
    assert confidence == {
        "brier": pytest.approx(brier, rel=RELATIVE, abs=0),
        "ece": pytest.approx(ece, rel=RELATIVE, abs=0),
    }


def test_calibration_error_in_numbers() -> None:
    """Three samples at 0.75, of which one is right, and one at 0.5, which is right: 3/4 |1/3 - 3/4| + 1/4 |1 - 1/2|."""
    p = np.array([[0.75, 0.25]] * 3 + [[0.5, 0.5]])
    confidence = tally_of(p, p, np.array([0, 1, 1, 0])).confidence()
    assert confidence["ece"] == pytest.approx(0.75 * (0.75 - 1 / 3) + 0.125, rel=RELATIVE, abs=0)
    assert confidence["brier"] == (2 * 0.25**2 + 2 * 2 * 0.75**2 + 2 * 0.5**2) / 4


def test_the_bin_of_a_probability_includes_its_upper_end() -> None:
    p = np.array([[2 / 3, 1 / 3], [1.0, 0.0]])
    tally = tally_of(p, p, np.array([0, 0]))
    assert np.flatnonzero(tally.bins[:, 0]).tolist() == [9, 14]


def test_the_reference_decides_what_probabilities_are() -> None:
    """Quantized probabilities may miss the sum of 1: they stay probabilities where the model's own have it."""
    quantized, reference = np.array([[0.5, 0.25]]), np.array([[0.6, 0.4]])
    assert tally_of(quantized, reference, np.array([0])).confidence()["brier"] == 0.5**2 + 0.25**2
    assert tally_of(quantized, quantized, np.array([0])).confidence()["brier"] != 0.5**2 + 0.25**2


@pytest.mark.parametrize(("miss", "given"), [(0.0009, True), (0.0011, False)])
def test_rows_of_probabilities_sum_to_1_within_a_thousandth(miss: float, given: bool) -> None:
    p = np.array([[0.5, 0.5 + miss]])
    brier = 0.5**2 + (0.5 - miss) ** 2
    assert (abs(tally_of(p, p, np.array([1])).confidence()["brier"] - brier) < 1e-9) is given  # type: ignore[operator]


def test_confidence_needs_labels_and_finite_scores() -> None:
    nothing = {"brier": None, "ece": None}
    assert tally_of(scores(1), scores(2)).confidence() == nothing
    assert Tally().confidence() == nothing
    broken = scores(1)
    broken[3, 4] = np.nan
    assert tally_of(broken, scores(2), labels_of()).confidence() == nothing


def test_a_class_that_is_masked_out_is_no_broken_score() -> None:
    masked = np.array([[0.0, -np.inf]])
    assert tally_of(masked, masked, np.array([0])).confidence() == {"brier": 0.0, "ece": 0.0}


def test_large_scores_do_not_overflow() -> None:
    large = np.array([[1e4, 0.0]])
    assert tally_of(large, large, np.array([0])).confidence() == {"brier": 0.0, "ece": 0.0}


def test_labels_of_another_output_rate_nothing() -> None:
    tally = tally_of(scores(1, classes=4), scores(2, classes=4), np.full(25, 4))
    assert tally.confidence() == {"brier": None, "ece": None}


def test_tallies_of_parts_merge_to_the_whole() -> None:
    output, reference, labels = scores(1), scores(2), labels_of()
    whole, merged = tally_of(output, reference, labels, (8,)), tally_of(output[:8], reference[:8], labels[:8])
    merged.merge(tally_of(output[8:], reference[8:], labels[8:]))
    assert (merged.metrics(), merged.fidelity(), merged.confidence()) == (
        *(whole.metrics(), whole.fidelity(), whole.confidence()),
    )
    assert merged.samples == 25
    assert merged.ranked is True
