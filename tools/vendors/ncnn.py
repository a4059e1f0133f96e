"""ncnn's tables, read by rules of our own. `python ncnn.py CASES`; see `cases.py`.

No package has `ncnn2int8` or `ncnnllm2int`. So this is a check of the protocol, not of the tools: rows are read as
tools/quantize/{ncnn2int8,ncnnllm2int}.cpp read them, layers are those that ncnn makes of the baked model's nodes, and
weights are quantized as `quantize_to_int8` does, `round(w scale)` in float32 with ties away from zero. The codes must
be ours, and so must the scales of inputs.
"""

import sys

import cases
import numpy as np
import onnx
from onnx import numpy_helper

Array = cases.Array
BITS, BLOCKS = ("4", "6", "8"), ("32", "64", "128")


def rows(content: str) -> dict[str, Array]:
    """The rows of an int8 table: blanks part words, an empty line ends the file, a later row of a name wins."""
    found = {}
    for line in content.split("\n"):
        words = [word for word in line.rstrip("\r").split(" ") if word]
        if not words:
            break
        found[words[0][:255]] = np.array([float(word) for word in words[1:]], np.float32)
    return found


def rounded(values: Array) -> Array:
    """C's `roundf`, to integers."""
    return (np.sign(values) * np.floor(np.abs(values) + np.float32(0.5))).astype(np.int64)


def codes_of(weights: Array, grid: cases.Grid) -> Array:
    """Our codes of weights that lie on their grid."""
    scale = spread(grid, weights.shape)
    return np.rint(weights.astype(np.float64) / scale).astype(np.int64)


def spread(grid: cases.Grid, shape: tuple[int, ...]) -> Array:
    """The scale of each value, float64."""
    scale = grid.scale.astype(np.float64)
    if grid.block_size:
        assert grid.axis is not None
        return np.repeat(scale, grid.block_size, grid.axis)[tuple(slice(size) for size in shape)]
    if grid.axis is not None:
        scale = scale.reshape([-1 if i == grid.axis else 1 for i in range(len(shape))])
    return np.broadcast_to(scale, shape)


def symmetric(grid: cases.Grid) -> np.float32:
    """The reciprocal scale of an activation, 127 / absmax, and that of the grid itself where it has these codes."""
    if grid.signed and not grid.zero_point.any() and grid.bits == 8:
        return np.float32(1 / np.float64(grid.scale))
    return np.float32(1 / np.float64(np.float32(np.float32(grid.absmax) / np.float64(127))))


def by_output(node: onnx.NodeProto, weights: Array) -> Array:
    """Weights with their outputs first, each flat."""
    if node.op_type == "Conv":
        return weights.reshape(len(weights), -1)
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return weights if transposed else weights.T


def check_int8(case: cases.Case) -> cases.Outcome:
    """Codes of weights and scales of inputs of each layer with a row."""
    table = rows(case.file(".table").read_text())
    graph = onnx.load(case.folder / "baked.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    checked, wrong, used = 0, [], set()
    for node in graph.node:
        if node.name not in table:
            continue
        used |= {node.name, f"{node.name}_param_0"}
        weights, grid = by_output(node, constants[node.input[1]]), case.weights[node.input[1]]
        scales = table[f"{node.name}_param_0"]
        theirs = rounded(weights * np.repeat(scales, len(weights) // len(scales))[:, None])
        ours = by_output(node, codes_of(constants[node.input[1]], grid))
        checked += theirs.size + 1
        wrong += [f"{node.name}: codes"] if not np.array_equal(np.clip(theirs, -127, 127), ours) else []
        wrong += [f"{node.name}: input"] if table[node.name] != symmetric(case.activations[node.input[0]]) else []
    wrong += [f"row {name}: no layer" for name in table.keys() - used]
    detail = f"differ: {', '.join(wrong[:3])}" if wrong else ""
    return cases.Outcome(checked, len(wrong), "codes of weights and scales of inputs, by rules of our own", detail)


def check_blocks(case: cases.Case) -> cases.Outcome:
    """Codes of the weights of each Gemm with a row."""
    graph = onnx.load(case.folder / "baked.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    nodes = {node.name: node for node in graph.node}
    checked, wrong = 0, []
    for line in case.file(".llm.table").read_text().splitlines():
        key, *words = line.split()
        facts = dict(word.split("=", 1) for word in words if "=" in word)
        node = nodes[key.removesuffix("_param_1")]
        if facts["bits"] not in BITS or facts["block"] not in BLOCKS or facts["method"] != "minmax":
            raise cases.Refused(f"{key}: unsupported {' '.join(words[:3])}")
        weights, size = by_output(node, constants[node.input[1]]), int(facts["block"])
        blocks = -(-weights.shape[1] // size)
        scales = np.array([float(word) for word in words if "=" not in word], np.float32)
        if scales.size != len(weights) * blocks:
            raise cases.Refused(f"{key}: coefficient count mismatch expected={len(weights) * blocks} got={scales.size}")
        factors = np.repeat(scales.reshape(-1, blocks), size, axis=1)[:, : weights.shape[1]]
        limit = (1 << (int(facts["bits"]) - 1)) - 1
        theirs = np.clip(rounded(weights * factors), -limit, limit)
        ours = by_output(node, codes_of(constants[node.input[1]], case.weights[node.input[1]]))
        checked += theirs.size
        wrong += [key] if not np.array_equal(theirs, ours) else []
    detail = f"differ: {', '.join(wrong[:3])}" if wrong else ""
    return cases.Outcome(checked, len(wrong), "codes of weights, by rules of our own", detail)


if __name__ == "__main__":
    sys.exit(cases.main("ncnn's protocol", "a4d2ea1", {"ncnn": check_int8, "ncnn-llm": check_blocks}))
