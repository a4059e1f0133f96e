"""How close two sets of outputs are, and how right: sums that grow batch by batch.

mse       mean((a - b)^2)
snr_db    10 log10(sum(b^2) / sum((a - b)^2)),  b the reference
cosine    sum(a b) / sqrt(sum(a^2) sum(b^2))
agreement share of samples with the same largest class score
top1      share of samples whose largest class score is the label
"""

import math
from dataclasses import dataclass

import numpy as np

from onnxqt.numerics import Array


@dataclass(slots=True)
class Tally:
    """Running sums over the batches of one output; `add` is its only mutation."""

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
