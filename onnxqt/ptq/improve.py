"""The steps of post-training quantization together: what to beat before anything is trained."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate, make_quantizers
from onnxqt.data import Samples, fixed_batch
from onnxqt.errors import UsageError
from onnxqt.model import Model, input_specs
from onnxqt.plan import QuantPlan
from onnxqt.ptq.bias import correct_biases
from onnxqt.ptq.equalize import equalize
from onnxqt.ptq.layers import BATCH, Progress, Quantized, silent
from onnxqt.ptq.rounding import RoundingSettings, round_weights
from onnxqt.schemes import Grids, Scheme

Step = Literal["equalize", "round", "bias"]
STEPS: tuple[Step, ...] = ("equalize", "round", "bias")  # in the order in which they run
CALIBRATION_LIMIT = 512  # samples whose ranges are recorded, and on which biases are corrected


@dataclass(frozen=True, slots=True)
class PtqSettings:
    """What to quantize to, and how.

    Attributes:
        scheme: the grids.
        ranges: how the activations' clips are chosen.
        steps: which of `STEPS` to take; their order is always the same.
        rounding: how rounding is learned.
    """

    scheme: Scheme | Grids
    ranges: RangeMethod = "mse"
    steps: tuple[Step, ...] = STEPS
    rounding: RoundingSettings = field(default_factory=RoundingSettings)

    def __post_init__(self) -> None:
        for step in self.steps:
            if step not in STEPS:
                raise UsageError(
                    f"unknown step '{step}' of post-training quantization: name some of {', '.join(STEPS)}"
                )


@dataclass(frozen=True, eq=False)
class Improved:
    """The outcome of post-training quantization.

    Attributes:
        quantized: the weights and the quantizers to make the file with.
        ranges: of the activations, after equalization.
        skipped: by step, why a layer was left out, by the name of its node.
    """

    quantized: Quantized
    ranges: RangeTable
    skipped: Mapping[str, Mapping[str, str]]


def improve(
    model: Model, plan: QuantPlan, samples: Samples, settings: PtqSettings, progress: Progress = silent
) -> Improved:
    """Quantize a model after training, with the chosen steps.

    Args:
        model: the float model.
        plan: where its quantizers go.
        samples: the calibration data.
        settings: see `PtqSettings`.
        progress: called with the number of layers done in a step, and the name of the last one.

    Raises:
        UnboundedError: naming tensors that take NaN or infinite values.
        ModelError: if the model is too large for a step.
    """
    skipped: dict[str, Mapping[str, str]] = {}
    if "equalize" in settings.steps:
        model = equalize(model).model
    few = samples.take(CALIBRATION_LIMIT)
    ranges = calibrate(model, plan, few, fixed_batch(input_specs(model)) or BATCH)
    quantized = Quantized(model, model, plan, make_quantizers(model, plan, ranges, settings.scheme, settings.ranges))
    if "round" in settings.steps:
        rounded = round_weights(quantized, samples, settings.rounding, progress)
        quantized, skipped["round"] = rounded.quantized, rounded.skipped
    if "bias" in settings.steps:
        corrected = correct_biases(quantized, few, progress)
        quantized, skipped["bias"] = corrected.quantized, corrected.skipped
    return Improved(quantized, ranges, skipped)
