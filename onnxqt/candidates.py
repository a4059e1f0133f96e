"""Float weights that a run may make its files of, and which of them to start from."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx

from onnxqt.calibrate import Quantizers, RangeMethod, RangeTable, make_quantizers
from onnxqt.data import Batch
from onnxqt.export import quantized_model
from onnxqt.metrics import Tally
from onnxqt.model import Model
from onnxqt.plan import QuantPlan
from onnxqt.runtime import Session
from onnxqt.schemes import Grids, Scheme

Origin = Literal["original", "equalized", "rounded", "checkpoint"]

_HARMLESS = 0.01  # error as a share of the power


@dataclass(frozen=True, eq=False)
class Candidate:
    """Float weights with the activation ranges that go with them.

    Attributes:
        model: the weights.
        ranges: of its activations.
        origin: where the weights come from; "rounded" ones may have been equalized before.
    """

    model: Model
    ranges: RangeTable
    origin: Origin = "original"

    def quantizers(self, plan: QuantPlan, scheme: Scheme | Grids, method: RangeMethod) -> Quantizers:
        """The parameters of every quantizer under a scheme."""
        return make_quantizers(self.model, plan, self.ranges, scheme, method)

    def quantized(self, plan: QuantPlan, scheme: Scheme | Grids, method: RangeMethod) -> onnx.ModelProto:
        """The QDQ model under a scheme."""
        return quantized_model(self.model, plan, self.quantizers(plan, scheme, method))


@dataclass(frozen=True, eq=False)
class Target:
    """What candidates are quantized to: the sites, the schemes, and how activations' clips are chosen."""

    plan: QuantPlan
    schemes: Sequence[Scheme | Grids]
    ranges: RangeMethod


def mean_error(candidate: Candidate, reference: Model, target: Target, batches: Iterable[Batch]) -> float:
    """How far the outputs of a candidate's quantized files are from a model's, in decibels; lower is better.

    error = mean over schemes of  10 log10(sum((y - y_float)^2) / sum(y_float^2) + 0.01)    (the first float output)

    An error under 1 % of the power, or 20 dB, seldom changes a result, so gains there weigh little against gains under
    coarser schemes.

    Args:
        candidate: the weights.
        reference: the float model, with a float output.
        target: what they are quantized to.
        batches: samples, none of which should have been used to find the weights.
    """
    output = next(name for name in reference.graph.outputs if reference.graph.is_float(name))
    original = Session(reference.proto)
    held = [(batch, original.run(batch.inputs)[output]) for batch in batches]
    plan, schemes, method = target.plan, target.schemes, target.ranges
    errors = []
    for scheme in schemes:
        session, tally = Session(candidate.quantized(plan, scheme, method)), Tally()
        for batch, expected in held:
            tally.add(batch.real(session.run(batch.inputs)[output]), batch.real(expected))
        ratio = tally.squared_error / max(tally.reference_power, 1e-30)
        errors.append(10 * np.log10(ratio + _HARMLESS))
    return float(np.mean(errors))
