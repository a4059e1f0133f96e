"""Referee: ncnn's int8 layers, from the integer codes and scales of a case. `python ncnn_cpu.py CASES`.

Each product is a network of one layer, from int8 codes to int8 codes, so that every value can be compared. ncnn has
reciprocal scales. A grouped convolution that is not depthwise is one layer per group: its own layer has one scale each.
InnerProduct gives floats; a Quantize layer behind it makes them codes. Moves of codes are done here, in numpy.

ConvolutionDepthWise runs without ncnn's packed layout unless `--packed` is given: on x86 its packed kernel scales
accumulators with a relative error of about 2^-12, as if it used the approximate reciprocal of the instruction set.
"""

import argparse
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import folders
import ncnn
import numpy as np

INT8 = 0x000D4B38  # tag in front of int8 weights in a .bin file
ONE = np.float32(1)
PARSER = argparse.ArgumentParser()
PARSER.add_argument("--packed", action="store_true", help="leave the packed layout on for depthwise convolutions")
Node = Mapping[str, Any]


def run(case: folders.Case) -> folders.Outcome:
    """Codes of every value."""
    codes = {name: case.arrays[f"codes:{name}"].astype(np.int8) for name in case.inputs}
    nodes = []
    for node in case.nodes:
        layer = LAYERS.get(node["op_type"])
        if layer is None:
            raise folders.NotExpressible(f"{node['name']}: {node['op_type']} has no int8 layer")
        for name in (*node["inputs"], node["output"]):
            if case.values[name]["zero_point"] or case.values[name]["bits"] != 8:
                raise folders.NotExpressible(f"{node['name']}: '{name}' is not symmetric and 8 bits wide")
        codes[node["output"]], kernel = layer(case, node, [codes[name] for name in node["inputs"]])
        nodes.append({"name": node["name"], "executed_by": kernel, "integer": True})
    return folders.Outcome(codes, tuple(nodes))


def conv(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """Convolution or ConvolutionDepthWise with requantization (int8_scale_term 101)."""
    weights = case.arrays[f"weights:{node['name']}"]
    if weights.ndim != 4:
        raise folders.NotExpressible(f"{node['name']}: only two-dimensional convolutions")
    attributes = node["attributes"]
    group = int(attributes.get("group", 1))
    outputs = len(weights)
    scale = np.broadcast_to(case.arrays[f"weight_scale:{node['name']}"], outputs).astype(np.float32)
    bias = float_bias(case, node, scale)
    depthwise = group == outputs == inputs[0].shape[1] and group > 1
    parts = [slice(0, outputs)] if depthwise or group == 1 else rows_of_groups(outputs, group)
    results = []
    for i, part in enumerate(parts):
        x = inputs[0] if len(parts) == 1 else np.split(inputs[0], group, axis=1)[i]
        kind = "ConvolutionDepthWise" if depthwise else "Convolution"
        own = f" 7={group}" if depthwise else ""
        geometry = convolution_geometry(attributes, weights.shape[2:])
        size = weights[part].size
        text = f"0={outputs // len(parts)} {geometry} 5={int(bias is not None)} 6={size}{own} 8=101"
        data = [tagged(weights[part]), b"" if bias is None else bias[part].tobytes(), (ONE / scale[part]).tobytes()]
        data += [reciprocal(case, node["inputs"][0]), reciprocal(case, node["output"])]
        text += activation(case, node)
        results.append(execute(f"{kind} y 1 1 x y {text}", b"".join(data), x))
    return np.concatenate(results, axis=1), "ConvolutionDepthWise int8" if depthwise else "Convolution int8"


def dense(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """InnerProduct with int8 weights, then Quantize."""
    weights = case.arrays.get(f"weights:{node['name']}")
    if weights is None or weights.ndim != 2:
        raise folders.NotExpressible(f"{node['name']}: only rows times a constant matrix")
    outputs = weights.shape[1]
    scale = np.broadcast_to(case.arrays[f"weight_scale:{node['name']}"], outputs).astype(np.float32)
    bias = float_bias(case, node, scale)
    text = f"InnerProduct h 1 1 x h 0={outputs} 1={int(bias is not None)} 2={weights.size} 8=1" + activation(case, node)
    data = [tagged(weights.T), b"" if bias is None else bias.tobytes(), (ONE / scale).tobytes()]
    data += [reciprocal(case, node["inputs"][0]), reciprocal(case, node["output"])]
    rows = inputs[0].reshape(-1, len(weights))
    result = execute(f"{text}\nQuantize y 1 1 h y 0=1", b"".join(data), rows)
    return result.reshape(*inputs[0].shape[:-1], outputs), "InnerProduct int8, Quantize"


def max_pool(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """Pooling on the codes as floats, which are exact."""
    attributes = node["attributes"]
    if max(attributes.get("dilations", [1])) > 1 or attributes.get("ceil_mode", 0):
        raise folders.NotExpressible(f"{node['name']}: only windows without dilation, rounded down")
    (top, left, bottom, right), (h, w) = attributes.get("pads", [0] * 4), attributes["kernel_shape"]
    v, u = attributes.get("strides", [1, 1])
    text = f"Pooling y 1 1 x y 0=0 1={w} 11={h} 2={u} 12={v} 3={left} 14={right} 13={top} 15={bottom} 5=1"
    return execute(text, b"", inputs[0].astype(np.float32)), "Pooling on codes"


def moved(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """A change of shape."""
    x = inputs[0].transpose(node["attributes"]["perm"]) if node["op_type"] == "Transpose" else inputs[0]
    return x.reshape(case.values[node["output"]]["shape"]), "numpy"


def sliced(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """A part of the codes."""
    attributes, cut = node["attributes"], [slice(None)] * inputs[0].ndim
    axes = attributes.get("axes") or range(len(attributes["starts"]))
    steps = attributes.get("steps") or [1] * len(axes)
    for axis, start, end, step in zip(axes, attributes["starts"], attributes["ends"], steps, strict=True):
        cut[axis] = slice(start, end, step)
    return inputs[0][tuple(cut)], "numpy"


def clamped(case: folders.Case, node: Node, inputs: list[folders.Array]) -> tuple[folders.Array, str]:
    """Relu, Clip or a quantizer that changes nothing, on one grid."""
    if case.values[node["inputs"][0]]["scale"] != case.values[node["output"]]["scale"]:
        raise folders.NotExpressible(f"{node['name']}: its input and output have different grids")
    return np.clip(inputs[0], *case.clamp(node)).astype(np.int8), "numpy"


LAYERS: Mapping[str, Callable[..., tuple[folders.Array, str]]] = {
    "Conv": conv,
    "Gemm": dense,
    "MatMul": dense,
    "MaxPool": max_pool,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity"), moved),
    **dict.fromkeys(("Relu", "Clip", "QuantizeLinear"), clamped),
    "Slice": sliced,
}


def rows_of_groups(outputs: int, group: int) -> list[slice]:
    """The output channels of each group."""
    size = outputs // group
    return [slice(i * size, (i + 1) * size) for i in range(group)]


def convolution_geometry(attributes: Mapping[str, Any], kernel: tuple[int, ...]) -> str:
    """Window parameters of Convolution."""
    (top, left, bottom, right), (h, w) = attributes.get("pads", [0] * 4), kernel
    (v, u), (d, e) = attributes.get("strides", [1, 1]), attributes.get("dilations", [1, 1])
    return f"1={w} 11={h} 2={e} 12={d} 3={u} 13={v} 4={left} 15={right} 14={top} 16={bottom}"


def activation(case: folders.Case, node: Node) -> str:
    """The fused activation as a parameter: none, ReLU or a clip of reals."""
    value = case.values[node["output"]]
    low, high = case.clamp(node)
    if low <= value["qmin"] and high >= value["qmax"]:
        return ""
    if low == 0 and high >= value["qmax"]:
        return " 9=1"
    scale = np.float32(value["scale"])
    return f" 9=3 -23310=2,{float(low * scale):.9e},{float(high * scale):.9e}"


def float_bias(case: folders.Case, node: Node, scale: folders.Array) -> folders.Array | None:
    """The bias in reals."""
    bias = case.array("float_bias", node["name"])
    if bias is None and (codes := case.array("bias", node["name"])) is not None:
        bias = codes.astype(np.float32) * (np.float32(case.values[node["inputs"][0]]["scale"]) * scale)
    return None if bias is None else bias.astype(np.float32)


def reciprocal(case: folders.Case, name: str) -> bytes:
    """The reciprocal scale of a value."""
    return np.float32(ONE / np.float32(case.values[name]["scale"])).tobytes()


def tagged(weights: folders.Array) -> bytes:
    """int8 weights as they stand in a .bin file: a tag, the codes, filled up to four bytes."""
    codes = np.ascontiguousarray(weights, np.int8).tobytes()
    return struct.pack("<I", INT8) + codes + bytes(-len(codes) % 4)


def execute(layers: str, weights: bytes, x: folders.Array) -> folders.Array:
    """The blob `y` for every sample of the blob `x`."""
    lines = ["Input x 0 1 x", *layers.split("\n")]
    with tempfile.TemporaryDirectory() as folder:
        param, binary = Path(folder) / "net.param", Path(folder) / "net.bin"
        param.write_text("\n".join(["7767517", f"{len(lines)} {len(lines)}", *lines]) + "\n")
        binary.write_bytes(weights)
        net = ncnn.Net()
        net.opt.num_threads = 1
        net.opt.use_packing_layout = PARSER.parse_known_args()[0].packed or "DepthWise" not in layers
        if net.load_param(str(param)) or net.load_model(str(binary)):
            raise RuntimeError(f"ncnn does not load {layers}")
    results = []
    for sample in x:
        extractor = net.create_extractor()
        extractor.input("x", ncnn.Mat(np.ascontiguousarray(sample)).clone())
        status, blob = extractor.extract("y")
        if status:
            raise RuntimeError(f"ncnn returns {status} for {layers}")
        results.append(np.array(blob))
    return np.stack(results).astype(np.int8)  # the codes come out as floats


if __name__ == "__main__":
    sys.exit(folders.main("ncnn", version("ncnn"), run, PARSER))
