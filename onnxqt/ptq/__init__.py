"""Post-training quantization without training: equalization, learned rounding, bias correction."""

from onnxqt.ptq.bias import Corrected, correct_biases
from onnxqt.ptq.equalize import Equalized, Pair, equalize, find_pairs
from onnxqt.ptq.improve import STEPS, Improved, PtqSettings, Step, improve
from onnxqt.ptq.layers import Quantized
from onnxqt.ptq.robust import Robust, RobustError, RobustSettings, round_robustly
from onnxqt.ptq.rounding import LayerError, Rounded, RoundingSettings, round_weights

__all__ = [
    "STEPS",
    "Corrected",
    "Equalized",
    "Improved",
    "LayerError",
    "Pair",
    "PtqSettings",
    "Quantized",
    "Robust",
    "RobustError",
    "RobustSettings",
    "Rounded",
    "RoundingSettings",
    "Step",
    "correct_biases",
    "equalize",
    "find_pairs",
    "improve",
    "round_robustly",
    "round_weights",
]
