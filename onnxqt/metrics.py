"""How close two sets of outputs are, and how right: sums that grow batch by batch.

mse       mean((a - b)^2)
snr_db    10 log10(sum(b^2) / sum((a - b)^2)),  b the reference
cosine    sum(a b) / sqrt(sum(a^2) sum(b^2))
agreement share of samples with the same largest class score
top1      share of samples whose largest class score is the label
brier     mean over samples of sum over classes of (p - [class is the label])^2     (Brier 1950)
ece       sum over bins of |B| / N |share correct in B - mean of max(p) in B|        (Guo et al. 2017, equation 3)

p are the scores themselves where the reference's are probabilities (within [0, 1], with the sum 1 up to 0.001), else
their softmax. Bin m of 15 holds the samples with (m - 1) / 15 < max(p) <= m / 15.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from onnxqt.numerics import Array

ECE_BINS = 15  # Guo et al. 2017, section 4
_SUM_TOLERANCE = 1e-3  # of a row of probabilities


@dataclass(slots=True)
class Tally:
    """Running sums over the batches of one output; `add` and `merge` are its only mutations.

    `bins` has a row per bin of the largest probability: samples, sum of these probabilities, correct ones.
    """

    values: int = 0
    non_finite: int = 0
    samples: int = 0
    squared_error: float = 0.0
    power: float = 0.0
    reference_power: float = 0.0
    product: float = 0.0
    agreeing: int = 0
    correct: int = 0
    labelled: int = 0
    ranked: bool = False
    squared_miss: float = 0.0
    bins: Array = field(default_factory=lambda: np.zeros((ECE_BINS, 3)))

    def add(self, output: Array, reference: Array, labels: Array | None = None) -> None:
        """Count one batch: outputs and reference outputs of the same shape, class numbers (N,) if known.

        Values that the reference has as NaN or infinity are left out; `non_finite` counts those of the output alone.
        """
        a, b = output.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
        finite = np.isfinite(b)
        a, b = a[finite], b[finite]
        self.non_finite += int(np.count_nonzero(~np.isfinite(a)))
        self.values += a.size
        self.squared_error += float(np.sum((a - b) ** 2))
        self.power += float(a @ a)
        self.reference_power += float(b @ b)
        self.product += float(a @ b)
        if output.ndim == 2 and output.shape[1] > 1 and len(output):
            self.ranked = True
            self.samples += len(output)
            choice = output.argmax(axis=1)
            self.agreeing += int(np.sum(choice == reference.argmax(axis=1)))
            if labels is not None:
                self.labelled += len(labels)
                self.correct += int(np.sum(choice == labels))
                if labels.max(initial=0) < output.shape[1]:  # else they are classes of another output
                    self._rate(_probabilities(output, reference), labels)

    def _rate(self, p: Array, labels: Array) -> None:
        """Count probabilities (N, classes) against class numbers (N,)."""
        rows = np.arange(len(labels))
        self.squared_miss += float(np.sum(p**2) + np.sum(1 - 2 * p[rows, labels]))  # (p - 1)^2 = p^2 + 1 - 2p
        choice = p.argmax(axis=1)
        top = np.nan_to_num(p[rows, choice])
        index = np.clip(np.ceil(top * ECE_BINS) - 1, 0, ECE_BINS - 1).astype(np.int64)
        np.add.at(self.bins, index, np.stack([np.ones(len(top)), top, choice == labels], axis=1))

    def merge(self, other: "Tally") -> None:
        """Count what `other` counted."""
        for name in self.__slots__:
            both = (getattr(self, name), getattr(other, name))
            setattr(self, name, any(both) if name == "ranked" else both[0] + both[1])

    def fidelity(self) -> dict[str, float | None]:
        """Distance to the reference; None where a figure is not defined (no classes, no error at all, no values)."""
        if self.non_finite or not self.values:
            return {**dict.fromkeys(("mse", "snr_db", "cosine", "agreement")), "non_finite": self.non_finite}
        norm = math.sqrt(self.power * self.reference_power)
        exact = self.squared_error == 0.0 or self.reference_power == 0.0
        return {
            "mse": self.squared_error / max(self.values, 1),
            "snr_db": None if exact else 10 * math.log10(self.reference_power / self.squared_error),
            "cosine": self.product / norm if norm else None,
            "agreement": self.agreeing / self.samples if self.ranked else None,
            "non_finite": 0,
        }

    def metrics(self) -> dict[str, float]:
        """What is right: `top1` with labels; `agreement` with the reference without; empty if there are no classes."""
        if self.labelled:
            return {"top1": self.correct / self.labelled}
        return {"agreement": self.agreeing / self.samples} if self.ranked else {}

    def confidence(self) -> dict[str, float | None]:
        """`brier` and `ece`, with labels; None without, and where a score is NaN or plus infinity."""
        samples, confidence, correct = self.bins.T
        rated = float(samples.sum())
        if not rated or not math.isfinite(self.squared_miss):
            return {"brier": None, "ece": None}
        return {"brier": self.squared_miss / rated, "ece": float(np.abs(correct - confidence).sum()) / rated}


def _probabilities(scores: Array, reference: Array) -> Array:
    """Class probabilities, float64 (N, classes); which rows of `reference` are probabilities, those of `scores` are."""
    scores, reference = scores.astype(np.float64), reference.astype(np.float64)
    within = ((reference >= 0) & (reference <= 1)).all(axis=1)
    given = within & (np.abs(reference.sum(axis=1) - 1) <= _SUM_TOLERANCE)
    with np.errstate(invalid="ignore"):
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        return np.where(given[:, np.newaxis], scores, powers / powers.sum(axis=1, keepdims=True))
