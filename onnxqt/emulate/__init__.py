"""Runs a quantized ONNX file in true integer arithmetic: what an integer device computes, bit by bit."""

from onnxqt.emulate.engine import (
    Codes,
    NodeInfo,
    Program,
    Result,
    load_program,
)

__all__ = ["Codes", "NodeInfo", "Program", "Result", "load_program"]
