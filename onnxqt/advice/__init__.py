"""What to change so that a quantized model comes closer to the float one, measured: `onnxqt advise`.

`bench` builds and measures ways to quantize a model; `sensitivity` quantizes each layer and each tensor alone, and all
but one layer; `facts` says in words why a tensor is hard to quantize; `search` finds the few changes that help most.
"""

from onnxqt.advice.bench import AdviceSettings, Bench, Quality, open_bench
from onnxqt.advice.plain import advised_json
from onnxqt.advice.search import LEAST_GAIN, Advice, Advised, Effort, advise, effort
from onnxqt.advice.sensitivity import Costs, LayerCost, TensorCost

__all__ = [
    "LEAST_GAIN",
    "Advice",
    "AdviceSettings",
    "Advised",
    "Bench",
    "Costs",
    "Effort",
    "LayerCost",
    "Quality",
    "TensorCost",
    "advise",
    "advised_json",
    "effort",
    "open_bench",
]
