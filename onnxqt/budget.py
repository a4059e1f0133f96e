"""How many bits each weight of a run gets, within a size or an error of the outputs (see `onnxqt.mixed`)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from onnxqt.candidates import Candidate
from onnxqt.errors import UsageError
from onnxqt.metrics import Tally
from onnxqt.mixed import Measure, Mixed, measure_sensitivities, within_error, within_size
from onnxqt.overrides import Overrides
from onnxqt.pipeline import Workspace
from onnxqt.runtime import Session
from onnxqt.schemes import Scheme

WIDTHS = (8, 4)  # that files store as they are
SAMPLES_LIMIT = 64  # samples on which the error of the outputs is measured


@dataclass(frozen=True, slots=True)
class Budget:
    """What the bits of the weights have to keep to: exactly one of the first two is given.

    Attributes:
        mean_bits: over all values of the weights.
        max_error: of the outputs, relative to their power, see `error_of`.
        widths: bits to choose from, at least two of 2 to 8.

    Raises:
        UsageError: if not exactly one is given, or one cannot be.
    """

    mean_bits: float | None = None
    max_error: float | None = None
    widths: tuple[int, ...] = WIDTHS

    def __post_init__(self) -> None:
        if (self.mean_bits is None) == (self.max_error is None):
            raise UsageError("give either --mean-bits or --max-error, which the bits of the weights are to keep to")
        if self.mean_bits is not None and not 2 <= self.mean_bits <= 8:
            raise UsageError(f"--mean-bits is {self.mean_bits:g}: give a number from 2 to 8")
        if self.max_error is not None and not 0 < self.max_error < math.inf:
            raise UsageError(f"--max-error is {self.max_error:g}: give a number above 0, such as 0.01")


def choose_bits(work: Workspace, candidate: Candidate, budget: Budget) -> tuple[Workspace, Mixed]:
    """Choose the bits of each weight for the only scheme of a run, on its calibration samples.

    Weights whose bits are given by overrides keep them, and do not count.

    Args:
        work: with one scheme and with samples; its progress is told of each weight.
        candidate: the weights and the ranges.
        budget: what the bits have to keep to.

    Returns:
        The workspace with the choice among its overrides, and the choice.

    Raises:
        UsageError: if there are several schemes or no samples, or the budget cannot be kept to.
    """
    if len(work.settings.schemes) != 1:
        raise UsageError("the bits of weights are chosen for one scheme: name it with --scheme")
    if not work.source.samples.count:
        raise UsageError("the bits of weights are chosen on samples: give --data")
    (scheme,) = work.settings.schemes
    given = work.grids(scheme).weight_bits
    initializers = candidate.model.graph.initializers
    sizes = {
        site.tensor: math.prod(initializers[site.tensor].dims)
        for site in work.source.plan.weights
        if site.tensor not in given
    }
    measure = error_of(work, candidate, scheme)
    work.progress.stage("measure weights", len(sizes))
    found = measure_sensitivities(sizes, budget.widths, measure, work.progress.advance)
    if budget.mean_bits is not None:
        mixed = within_size(found, budget.mean_bits, measure)
    else:
        mixed = within_error(found, budget.max_error or 0.0, measure)
    rules = (*work.settings.overrides.rules, *mixed.overrides(scheme.weight_bits).rules)
    return replace(work, settings=replace(work.settings, overrides=Overrides(rules))), mixed


def error_of(work: Workspace, candidate: Candidate, scheme: Scheme) -> Measure:
    """The error of a candidate's quantized model, by the bits of its weights.

    error = mean over the float outputs of  sum((y - y_float)^2) / sum(y_float^2)

    on at most 64 calibration samples.
    """
    source, grids = work.source, work.grids(scheme)
    reference = Session(candidate.model.proto)
    outputs = [name for name in candidate.model.graph.outputs if candidate.model.graph.is_float(name)]
    if not outputs:
        raise UsageError("the model has no float output, whose error could be measured: name bits with --overrides")
    batches = source.batches(source.samples.take(SAMPLES_LIMIT))
    held = [(batch, reference.run(batch.inputs)) for batch in batches]

    def measure(bits: Mapping[str, int]) -> float:
        mixed = replace(grids, weight_bits={**grids.weight_bits, **bits})
        session = Session(work.written(candidate.model, work.quantizers_of(candidate, mixed)))
        tallies = {name: Tally() for name in outputs}
        for batch, expected in held:
            found = session.run(batch.inputs)
            for name, tally in tallies.items():
                tally.add(batch.real(found[name]), batch.real(expected[name]))
        return sum(t.squared_error / max(t.reference_power, 1e-30) for t in tallies.values()) / len(tallies)

    return measure
