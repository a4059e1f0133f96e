"""What values the activations take while the weights move: moving averages of what the training graph gives out.

In each step the graph gives out the least and the largest value of every quantized tensor, and some values evenly
spaced over it. With a memory m of about 0.99:

    low <- m low + (1 - m) min,  high <- m high + (1 - m) max       (Jacob et al. 2018, section 3.1)
    histogram <- m histogram + (1 - m) share of the values in each bin

The result is a `RangeTable`, so ranges of extremes, of quantiles, or with the least error follow as in calibration.
"""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxqt.calibrate import RangeTable, TensorRange, observe
from onnxqt.numerics import Array
from onnxqt.trim.quantizers import statistics


class Observer:
    """Moving averages of the ranges of all activations, from those of calibration on."""

    def __init__(self, start: RangeTable, memory: float) -> None:
        self._memory = memory
        self._samples = start.samples
        self._seen = {
            name: replace(seen, count=1, counts=seen.counts / max(seen.count, 1))
            for name, seen in start.tensors.items()
        }

    @property
    def table(self) -> RangeTable:
        """The ranges as they are now; each histogram sums up to 1."""
        return RangeTable(dict(self._seen), self._samples)

    def update(self, outputs: Mapping[str, Array]) -> None:
        """Follow what a step gave out; tensors that the loss does not depend on stay as they were."""
        for name, seen in self._seen.items():
            names = statistics(name)
            if names.low in outputs:
                self._seen[name] = self._moved(
                    seen, float(outputs[names.low]), float(outputs[names.high]), outputs[names.sample]
                )

    def _moved(self, seen: TensorRange, low: float, high: float, sample: Array) -> TensorRange:
        m = self._memory
        old = replace(seen, counts=m * seen.counts)
        values = sample[np.isfinite(sample)]
        new = observe(values)
        new = replace(new, counts=(1 - m) / max(values.size, 1) * new.counts)
        merged = old.merge(new)
        return replace(merged, count=1, min=m * seen.min + (1 - m) * low, max=m * seen.max + (1 - m) * high)

    def arrays(self) -> dict[str, Array]:
        """Everything that the averages are, to be stored."""
        seen = self._seen.values()
        return {
            "ends": np.array([(s.min, s.max, s.limit) for s in seen], np.float64).reshape(-1, 3),
            "counts": np.stack([s.counts for s in seen]) if seen else np.zeros((0, 0)),
        }

    def restore(self, arrays: Mapping[str, Array]) -> None:
        """Go back to what `arrays` gave."""
        for name, (low, high, limit), counts in zip(self._seen, arrays["ends"], arrays["counts"], strict=True):
            self._seen[name] = TensorRange(1, float(low), float(high), float(limit), counts)
