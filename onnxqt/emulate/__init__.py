"""Stage 6, emulate: runs a quantized ONNX file in true integer arithmetic, as an integer device does."""

from onnxqt.emulate.engine import load_program
from onnxqt.emulate.program import Codes, NodeInfo, Program, Result

__all__ = ["Codes", "NodeInfo", "Program", "Result", "load_program"]
