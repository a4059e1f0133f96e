"""Referee: ONNX Runtime on `model.onnx`, with all its optimizations. `python ort.py CASES`.

A node ran on integers where a QLinear kernel stands for it in the optimized graph, or it moves codes.
"""

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import folders
import onnx
import onnxruntime
from onnx import ModelProto

MOVES = (
    "Reshape",
    "Transpose",
    "Slice",
    "Split",
    "Concat",
    "Gather",
    "Squeeze",
    "Unsqueeze",
    "Flatten",
    "Pad",
    "MaxPool",
    "Resize",
)
INTEGER = ("QLinear", "QGemm", "NhwcMaxPool")


def run(case: folders.Case) -> folders.Outcome:
    """Codes of every value, or of the outputs alone where the others cannot be shown.

    They are read off the real outputs of the DequantizeLinears. More graph outputs can keep ONNX Runtime from fusing
    (on x86 it makes signed codes unsigned for its integer kernels, but not those that leave the graph); what is told of
    the nodes holds for the file as it is.
    """
    model = onnx.load(case.folder / "model.onnx")
    names = quantized_tensors(model, case)
    feeds = inputs(case, model)
    plain, nodes = executed_with(model, case, {code: names[code] for code in case.outputs}, feeds)
    shown = {value.name for value in model.graph.output}
    for _, real in names.values():
        if real not in shown:
            model.graph.output.append(onnx.helper.make_tensor_value_info(real, onnx.TensorProto.FLOAT, None))
            shown.add(real)
    every, others = executed_with(model, case, names, feeds)
    return folders.Outcome(every if folders.same_kernels(nodes, others) else plain, nodes)


def executed_with(
    model: ModelProto, case: folders.Case, names: dict[str, tuple[str, str]], feeds: dict[str, folders.Array]
) -> tuple[dict[str, folders.Array], tuple[dict[str, Any], ...]]:
    """Codes of the values in `names`, and what executed each node of the case."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    reals = session.run([real for _, real in names.values()], feeds)
    codes = {code: folders.exact_codes(real, case.values[code]) for code, real in zip(names, reals, strict=True)}
    return codes, tuple({"name": node["name"], **executed(node, optimized)} for node in case.nodes)


def inputs(case: folders.Case, model: ModelProto) -> dict[str, folders.Array]:
    """Real inputs by the names of the graph's inputs."""
    constants = {value.name for value in model.graph.initializer}
    free = [value.name for value in model.graph.input if value.name not in constants]
    reals = [case.arrays.get(f"real:{code}") for code in case.inputs]
    return dict(zip(free, [real for real in reals if real is not None], strict=True))


def quantized_tensors(model: ModelProto, case: folders.Case) -> dict[str, tuple[str, str]]:
    """Of each value the tensors of the file that hold its codes and its reals."""
    pairs: dict[str, tuple[str, str]] = {}
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            pairs[node.input[0]] = pairs[node.output[0]] = node.input[0], node.output[0]
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.output[0] in pairs:
            pairs.setdefault(node.input[0], pairs[node.output[0]])
    found = {}
    for code, value in case.values.items():
        pair = pairs.get(code) or pairs.get(value["tensor"])
        if pair is None:
            continue  # codes that only the emulator has, behind a move
        found[code] = pair
    return found


def executed(node: Mapping[str, Any], optimized: ModelProto) -> dict[str, Any]:
    """What executes `node` in the optimized graph, and whether on integers.

    ONNX Runtime keeps the name of a node that it replaces, with an ending where it changed the layout too.
    """
    name = re.compile(re.escape(node["name"]) + r"(_token_\d+|_nchwc|_quant)*")
    found = [each for each in optimized.graph.node if name.fullmatch(each.name)]
    if not found:
        boundary = node["op_type"] == "QuantizeLinear"
        return {
            "executed_by": "nothing: merged" if boundary else "not found in the optimized graph",
            "integer": boundary,
        }
    kernel = found[0]
    floats = {output for each in optimized.graph.node if each.op_type == "DequantizeLinear" for output in each.output}
    moves = kernel.op_type in MOVES and kernel.input[0] not in floats
    integer = kernel.op_type.startswith(INTEGER) or "Integer" in kernel.op_type or moves
    return {"executed_by": kernel.op_type, "integer": integer or node["op_type"] == "QuantizeLinear"}


if __name__ == "__main__":
    sys.exit(folders.main("onnxruntime", onnxruntime.__version__, run))
