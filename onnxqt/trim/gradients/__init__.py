"""Gradients: what onnxruntime-training has, what is written here, and where they stop.

`flow` decides on the float model which weights a gradient reaches; `surgery` edits the training graph to match.
The rules are ONNX text, one function each, grouped by what the operators do.
"""

from onnxqt.trim.gradients.flow import Flow, find_flow
from onnxqt.trim.gradients.rule import Registration
from onnxqt.trim.gradients.surgery import make_differentiable, static_rules, through_sequence
from onnxqt.trim.gradients.text import DOMAIN

__all__ = ["DOMAIN", "Flow", "Registration", "find_flow", "make_differentiable", "static_rules", "through_sequence"]
