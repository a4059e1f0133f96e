"""Qualcomm's AIMET, which reads encodings. `python aimet.py CASES`; see `cases.py`.

`encodings_to_onnx_qdq` makes a quantized model of the baked model and the encodings. Run by ONNX Runtime without
optimizations, it must give the same bits as ours.
"""

import importlib.metadata
import logging
import sys
import warnings
from typing import Any

import cases
import numpy as np
import onnx
import onnxruntime
from aimet_onnx.quantsim import encodings_to_onnx_qdq
from onnx import numpy_helper

Array = cases.Array
OPTIMIZATIONS = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL


def outputs_of(model: bytes, inputs: dict[str, Array]) -> dict[str, Array]:
    """All outputs of a model."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level, options.log_severity_level = OPTIMIZATIONS, 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def check(case: cases.Case) -> cases.Outcome:
    """Grids of all tensors in AIMET's model, and its outputs."""
    baked = onnx.load(case.folder / "baked.onnx")
    try:
        model = encodings_to_onnx_qdq(baked, str(case.file(".encodings")), prequantize_constants=True)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise cases.Refused(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    text = case.file(".encodings").read_text()  # versions without blocks leave such weights out
    left = {name for name, grid in case.weights.items() if grid.block_size and f'"{name}"' not in text}
    wrong = [name for name in grids_that_differ(case, model) if name not in left]
    if left:
        return cases.Outcome(
            len(case.activations) + len(case.weights) - len(left), len(wrong), "grids in its QDQ model"
        )
    inputs = case.inputs()
    theirs = outputs_of(model.SerializeToString(), inputs)
    ours = outputs_of((case.folder / "qdq.onnx").read_bytes(), inputs)
    bits = sum(int(np.count_nonzero(ours[name].view(np.int32) != theirs[name].view(np.int32))) for name in ours)
    detail = [f"differ: {', '.join(wrong[:3])}"] if wrong else []
    detail += [f"{bits} values of outputs differ"] if bits else []
    values = sum(value.size for value in ours.values())
    return cases.Outcome(
        len(case.activations) + len(case.weights) + values,
        len(wrong) + bits,
        "grids of all tensors in its QDQ model, bits of outputs",
        "; ".join(detail),
    )


def grids_that_differ(case: cases.Case, model: onnx.ModelProto) -> list[str]:
    """Names of the tensors whose quantizer is not ours; activations have unsigned codes."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, tuple[Array, int]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":  # that of an output of the model has the output's name
            source = node.output[0].removesuffix("_qdq")
            scale = numpy_helper.to_array(constants[node.input[1]])
            zero_point = integers(constants[node.input[2]]) if len(node.input) > 2 else np.zeros(scale.shape, np.int64)
            found[source] = scale, zero_point
    wrong = []
    for name, grid in (*case.activations.items(), *case.weights.items()):
        width = next(bits for bits in (4, 8, 16) if bits >= grid.bits)
        shift = 1 << (width - 1) if grid.signed and name in case.activations else 0
        pair = found.get(name)
        if pair is None or not (np.array_equal(pair[0], grid.scale) and np.all(pair[1] == grid.zero_point + shift)):
            wrong.append(name)
    return wrong


def integers(tensor: Any) -> Array:
    """Integer values, 4-bit ones too."""
    return numpy_helper.to_array(tensor).astype(np.int64)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    formats = ("qualcomm", "qualcomm-1.0.0", "qualcomm-0.6.1")
    sys.exit(cases.main("AIMET", importlib.metadata.version("aimet-onnx"), dict.fromkeys(formats, check)))
