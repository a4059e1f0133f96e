"""Stage 5, export: the quantized form of a float checkpoint under a scheme."""

from onnxqt.export.qdq import FORMS, Form
from onnxqt.export.quantized import lowest_opset, quantized_model

__all__ = ["FORMS", "Form", "lowest_opset", "quantized_model"]
