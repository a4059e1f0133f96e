"""Runs the cases of the integer emulator in LiteRT (TensorFlow Lite) and writes down the codes that it computed.

    python tools/referees/litert.py CASES --kernels {ref,ruy,xnnpack}

Needs numpy and ai-edge-litert, nothing of onnxqt. Every folder below CASES with a `case.json` becomes a TFLite
flatbuffer, written from the schema, and is run with one kernel set. Beside the case appear

    result-KERNELS.npz    "codes:CODE" of every value that a node computes, in ONNX layout
    result-KERNELS.json   {"runtime", "version", "kernels", "status", "reason", "error",
                           "nodes": [{"name", "op_type", "executed_by", "integer", "operators", "delegated"}]}

`status` is "run", "not expressible" (`reason` has the first node that TFLite cannot say, and each such node its own
"not_expressible") or "failed" (`error` has what the runtime said); only a case that ran has codes. "operators" stand
for the node, "delegated" says of each whether XNNPACK ran it.

Values keep their ONNX layout, (N, C, H, W). Operators with a spatial window work on a transposed copy, (N, H, W, C).
Every value is an output of the TFLite graph, so that nothing is fused and each can be compared.
"""

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

KERNELS = {
    "ref": OpResolverType.BUILTIN_REF,
    "ruy": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES,
    "xnnpack": OpResolverType.AUTO,
}
TYPES = {
    (8, True): (schema.TensorType.INT8, np.int8),
    (8, False): (schema.TensorType.UINT8, np.uint8),
    (16, True): (schema.TensorType.INT16, np.int16),
}
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)  # (N, C, H, W) to (N, H, W, C) and back
NONE, RELU, RELU6 = (getattr(schema.ActivationFunctionType, name) for name in ("NONE", "RELU", "RELU6"))
VALID, SAME = schema.Padding.VALID, schema.Padding.SAME
UNARY = {"Sigmoid": "LOGISTIC", "Tanh": "TANH", "HardSwish": "HARD_SWISH", "Gelu": "GELU", "Elu": "ELU"}


class Inexpressible(Exception):  # noqa: N818 - a finding, not a failure
    """Why TFLite has no way to say a node."""


class Graph:
    """A TFLite graph under construction, for one case."""

    def __init__(self, case: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.case, self.arrays = case, arrays
        self.buffers = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: list[int] = []  # builtin operator of each operator code
        self.used: list[str] = []  # operators since the node began
        self.plain: dict[str, int] = {}  # value: its tensor in ONNX layout
        self.last: dict[str, int] = {}  # value: its tensor with the channels last

    def tensor(self, kind: int, shape: Any, grid: Any = None, data: np.ndarray | None = None) -> int:
        """Adds a tensor; `grid` is (scales, zero points, axis)."""
        tensor = schema.TensorT()
        tensor.name = f"t{len(self.tensors)}"
        tensor.type, tensor.shape, tensor.hasRank = kind, [int(n) for n in shape], True
        if grid is not None:
            scales, zero_points, axis = grid
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.atleast_1d(np.asarray(scales, np.float32))
            tensor.quantization.zeroPoint = np.atleast_1d(np.asarray(zero_points, np.int64))
            tensor.quantization.quantizedDimension = axis
        if data is not None:
            tensor.buffer = len(self.buffers)
            self.buffers.append(schema.BufferT(data=np.frombuffer(np.ascontiguousarray(data).tobytes(), np.uint8)))
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def integers(self, values: Any) -> int:
        """A constant int32 tensor (axes, shapes)."""
        array = np.asarray(values, np.int32)
        return self.tensor(schema.TensorType.INT32, array.shape, data=array)

    def scalar(self, value: int) -> int:
        """A constant int32 scalar."""
        return self.tensor(schema.TensorType.INT32, (), data=np.asarray(value, np.int32))

    def operator(self, name: str, inputs: list[int], outputs: list[int], options: Any = None) -> None:
        """Adds an operator; `options` is an object of the schema."""
        builtin = getattr(schema.BuiltinOperator, name)
        if builtin not in self.codes:
            self.codes.append(builtin)
        entry = schema.OperatorT()
        entry.opcodeIndex, entry.inputs, entry.outputs = self.codes.index(builtin), inputs, outputs
        if options is not None:
            kind = type(options).__name__[:-1]
            entry.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
            entry.builtinOptions = options
        self.operators.append(entry)
        self.used.append(name)

    def grid(self, code: str) -> Any:
        """(scale, zero point, axis) of a value."""
        value = self.case["values"][code]
        return value["scale"], value["zero_point"], 0

    def shape(self, code: str) -> list[int]:
        """Its shape in ONNX layout."""
        return list(self.case["values"][code]["shape"])

    def type(self, code: str) -> Any:
        """(TFLite type, numpy type) of its codes."""
        value = self.case["values"][code]
        kind = TYPES.get((value["bits"], value["signed"]))
        if kind is None:
            raise Inexpressible(f"no activations of {value['bits']} bits")
        return kind

    def like(self, code: str, shape: Any = None, grid: Any = None) -> int:
        """A new tensor on the grid of a value."""
        return self.tensor(self.type(code)[0], self.shape(code) if shape is None else shape, grid or self.grid(code))

    def constant(self, code: str, codes: np.ndarray) -> int:
        """A constant tensor on the grid of a value."""
        kind, dtype = self.type(code)
        return self.tensor(kind, codes.shape, self.grid(code), codes.astype(dtype))

    def read(self, code: str) -> int:
        """The tensor of a value in ONNX layout."""
        if code not in self.plain:
            if code not in self.last:
                if f"codes:{code}" not in self.arrays:
                    raise Inexpressible(f"value {code} was not computed")
                self.plain[code] = self.constant(code, self.arrays[f"codes:{code}"])
                return self.plain[code]
            self.plain[code] = self.like(code)
            self.transpose(self.last[code], self.plain[code], TO_FIRST)
        return self.plain[code]

    def read_last(self, code: str) -> int:
        """The tensor of a value with the channels last."""
        if code not in self.last:
            source = self.read(code)
            if len(self.shape(code)) != 4:
                raise Inexpressible(f"rank {len(self.shape(code))}: only two spatial axes")
            self.last[code] = self.like(code, moved(self.shape(code)))
            self.transpose(source, self.last[code], TO_LAST)
        return self.last[code]

    def write(self, code: str) -> int:
        """A new tensor for a value, in ONNX layout."""
        self.plain[code] = self.like(code)
        return self.plain[code]

    def write_last(self, code: str) -> int:
        """A new tensor for a value, with the channels last."""
        self.last[code] = self.like(code, moved(self.shape(code)))
        return self.last[code]

    def transpose(self, source: int, target: int, order: Any) -> None:
        """Adds a TRANSPOSE."""
        self.operator("TRANSPOSE", [source, self.integers(order)], [target], schema.TransposeOptionsT())

    def on_grid(self, code: str, target: str, tensor: int) -> int:
        """`tensor` of value `code` on the grid of `target`, through QUANTIZE where they differ."""
        if self.grid(code) == self.grid(target):
            return tensor
        moved_to = self.like(target, self.tensors[tensor].shape)
        self.operator("QUANTIZE", [tensor], [moved_to], schema.QuantizeOptionsT())
        return moved_to

    def limited(self, node: dict[str, Any], target: int) -> tuple[int, int]:
        """(fused activation, tensor to write to) that clamp to `node["clamp"]`, with MAXIMUM and MINIMUM if need be.

        The tensor to write to is `target` unless operators must follow; `finish` adds those.
        """
        value = self.case["values"][node["output"]]
        lo, hi = node.get("clamp") or (value["qmin"], value["qmax"])
        zero, full = value["zero_point"], full_range(value)
        six = min(full[1], zero + math.floor(np.float32(6) / np.float32(value["scale"]) + np.float32(0.5)))
        for kind, ends in ((NONE, full), (RELU, (max(full[0], zero), full[1])), (RELU6, (max(full[0], zero), six))):
            if (lo, hi) == ends:
                return kind, target
        return NONE, self.like(node["output"], self.tensors[target].shape)

    def finish(self, node: dict[str, Any], source: int, target: int) -> None:
        """Clamps `source` into `target` where they differ; exact on codes of one grid."""
        if source == target:
            return
        lo, hi = node["clamp"]
        between = self.like(node["output"], self.tensors[target].shape)
        ends = [self.constant(node["output"], np.full((1,) * len(self.tensors[target].shape), end)) for end in (lo, hi)]
        self.operator("MAXIMUM", [source, ends[0]], [between], schema.MaximumMinimumOptionsT())
        self.operator("MINIMUM", [between, ends[1]], [target], schema.MaximumMinimumOptionsT())

    def model(self) -> bytes:
        """The flatbuffer; every value that has a tensor is an output."""
        subgraph = schema.SubGraphT()
        subgraph.tensors, subgraph.operators = self.tensors, self.operators
        subgraph.inputs = [self.plain[code] for code in self.case["inputs"]]
        subgraph.outputs = [tensor for _, tensor, _ in self.results()]
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers = 3, [subgraph], self.buffers
        model.operatorCodes = [operator_code(builtin) for builtin in self.codes]
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def results(self) -> list[tuple[str, int, bool]]:
        """(value, tensor, whether its channels are last) of every value that a node computed."""
        made = [code for node in self.case["nodes"] for code in node.get("outputs") or [node["output"]]]
        return [
            (code, self.last[code] if code in self.last else self.plain[code], code in self.last)
            for code in dict.fromkeys(made)
            if code in self.last or code in self.plain
        ]


def operator_code(builtin: int) -> Any:
    """The entry of an operator in the list that the operators refer to."""
    code = schema.OperatorCodeT()
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 1
    return code


def moved(shape: list[int]) -> list[int]:
    """A shape with the channels last."""
    return [shape[i] for i in TO_LAST]


def full_range(value: dict[str, Any]) -> tuple[int, int]:
    """Ends of the integer type of a value, which TFLite's kernels saturate to."""
    half = 1 << (value["bits"] - 1)
    return (-half, half - 1) if value["signed"] else (0, 2 * half - 1)


def window(graph: Graph, node: dict[str, Any]) -> dict[str, Any]:
    """Kernel, strides, dilations, pads (begins, ends) and whether they are those of SAME."""
    attributes = node["attributes"]
    if len(graph.shape(node["inputs"][0])) != 4:
        raise Inexpressible(f"rank {len(graph.shape(node['inputs'][0]))}: only two spatial axes")
    kernel = attributes.get("kernel_shape") or graph.arrays[f"weights:{node['name']}"].shape[2:]
    kernel = [int(n) for n in kernel]
    strides, dilations = attributes.get("strides") or [1, 1], attributes.get("dilations") or [1, 1]
    size, out = graph.shape(node["inputs"][0])[2:], graph.shape(node["output"])[2:]
    spans = [dilation * (k - 1) + 1 for dilation, k in zip(dilations, kernel, strict=True)]
    same = [max((-(-n // s) - 1) * s + span - n, 0) for n, s, span in zip(size, strides, spans, strict=True)]
    auto = attributes.get("auto_pad") or "NOTSET"
    if auto.startswith("SAME"):
        begins = [(total + (auto == "SAME_LOWER")) // 2 for total in same]
    else:
        begins = list((attributes.get("pads") or [0, 0, 0, 0])[:2]) if auto == "NOTSET" else [0, 0]
    ends = [
        max((o - 1) * s + span - n - begin, 0)
        for o, s, span, n, begin in zip(out, strides, spans, size, begins, strict=True)
    ]
    is_same = begins == [total // 2 for total in same] and out == [
        -(-n // s) for n, s in zip(size, strides, strict=True)
    ]
    return {
        "kernel": kernel,
        "strides": strides,
        "dilations": dilations,
        "begins": begins,
        "ends": ends,
        "same": is_same,
        "padded": any(begins) or any(ends),
    }


def padded_input(graph: Graph, node: dict[str, Any], place: dict[str, Any], fill: int | None) -> tuple[int, int]:
    """(tensor, padding) for a window operator: SAME where its pads are those, else explicit PAD and VALID."""
    code = node["inputs"][0]
    source = graph.read_last(code)
    if place["same"] and place["padded"]:
        return source, SAME
    if not place["padded"]:
        return source, VALID
    begins, ends = place["begins"], place["ends"]
    widths = [[0, 0], [begins[0], ends[0]], [begins[1], ends[1]], [0, 0]]
    shape = [n + sum(width) for n, width in zip(moved(graph.shape(code)), widths, strict=True)]
    target = graph.like(code, shape)
    if fill is None:
        graph.operator("PAD", [source, graph.integers(widths)], [target], schema.PadOptionsT())
    else:
        constant = graph.constant(code, np.asarray([fill]))
        graph.operator("PADV2", [source, graph.integers(widths), constant], [target], schema.PadV2OptionsT())
    return target, VALID


def weights(graph: Graph, node: dict[str, Any], codes: np.ndarray, axis: int) -> int:
    """A constant tensor of weights, int8 or packed int4 (low nibble first)."""
    scale = np.atleast_1d(graph.arrays[f"weight_scale:{node['name']}"])
    zero = graph.arrays.get(f"weight_zero_point:{node['name']}", np.zeros(1, np.int32))
    if np.any(zero):
        raise Inexpressible("weights with a zero point")
    grid = (scale, np.zeros(scale.shape, np.int64), axis if scale.size > 1 else 0)
    if node.get("weight_bits", 8) == 4:
        flat = codes.astype(np.int8).reshape(-1) & 15
        flat = np.concatenate([flat, np.zeros(flat.size % 2, np.int8)])
        packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
        return graph.tensor(schema.TensorType.INT4, codes.shape, grid, packed)
    return graph.tensor(schema.TensorType.INT8, codes.shape, grid, codes.astype(np.int8))


def bias(graph: Graph, node: dict[str, Any], channels: int) -> int:
    """The constant bias, int32 or (16-bit activations) int64; zeros where the node has none."""
    if f"float_bias:{node['name']}" in graph.arrays:
        raise Inexpressible("a bias that is added in float")
    codes = graph.arrays.get(f"bias:{node['name']}", np.zeros(channels, np.int32))
    wide = graph.case["values"][node["inputs"][0]]["bits"] == 16
    kind, dtype = (schema.TensorType.INT64, np.int64) if wide else (schema.TensorType.INT32, np.int32)
    scale = np.atleast_1d(graph.arrays[f"weight_scale:{node['name']}"]).astype(np.float32)
    scale = np.float32(graph.grid(node["inputs"][0])[0]) * scale
    return graph.tensor(kind, codes.shape, (scale, np.zeros(scale.shape, np.int64), 0), codes.astype(dtype))


def conv(graph: Graph, node: dict[str, Any]) -> None:
    """CONV_2D, with groups too, or DEPTHWISE_CONV_2D."""
    codes = graph.arrays[f"weights:{node['name']}"]
    group, place = node["attributes"].get("group") or 1, window(graph, node)
    channels = graph.shape(node["inputs"][0])[1]
    depthwise = group == channels and codes.shape[1] == 1 and group > 1
    source, padding = padded_input(graph, node, place, None)
    target = graph.write_last(node["output"])
    options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
    options.padding, (options.strideH, options.strideW) = padding, place["strides"]
    options.dilationHFactor, options.dilationWFactor = place["dilations"]
    options.fusedActivationFunction, first = graph.limited(node, target)
    if depthwise:
        options.depthMultiplier = codes.shape[0] // channels
        kernel = weights(graph, node, codes.transpose(1, 2, 3, 0), 3)
    else:
        kernel = weights(graph, node, codes.transpose(0, 2, 3, 1), 0)
    name = "DEPTHWISE_CONV_2D" if depthwise else "CONV_2D"
    graph.operator(name, [source, kernel, bias(graph, node, codes.shape[0])], [first], options)
    graph.finish(node, first, target)


def conv_transpose(graph: Graph, node: dict[str, Any]) -> None:
    """TRANSPOSE_CONV without padding, then a SLICE of what the pads leave."""
    codes, attributes = graph.arrays[f"weights:{node['name']}"], node["attributes"]
    if (attributes.get("group") or 1) != 1:
        raise Inexpressible("TRANSPOSE_CONV has no groups")
    if node["weight_bits"] < 8:
        raise Inexpressible("TRANSPOSE_CONV has no 4-bit weights")
    if any(n != 1 for n in attributes.get("dilations") or [1, 1]):
        raise Inexpressible("TRANSPOSE_CONV has no dilations")
    source, out = graph.read_last(node["inputs"][0]), moved(graph.shape(node["output"]))
    strides, begins = attributes.get("strides") or [1, 1], list((attributes.get("pads") or [0] * 4)[:2])
    size = graph.shape(node["inputs"][0])[2:]
    full = [(n - 1) * s + k for n, s, k in zip(size, strides, codes.shape[2:], strict=True)]
    if any(begin + o > f for begin, o, f in zip(begins, out[1:3], full, strict=True)):
        raise Inexpressible("output padding beyond the last window")
    target = graph.write_last(node["output"])
    options = schema.TransposeConvOptionsT()
    options.padding, (options.strideH, options.strideW) = VALID, strides
    cut = full != out[1:3]
    shape = [out[0], *full, out[3]]
    whole = graph.like(node["output"], shape) if cut else target
    options.fusedActivationFunction, first = graph.limited(node, whole)
    kernel = weights(graph, node, codes.transpose(1, 2, 3, 0), 0)
    inputs = [graph.integers(shape), kernel, source, bias(graph, node, codes.shape[1])]
    graph.operator("TRANSPOSE_CONV", inputs, [first], options)
    graph.finish(node, first, whole)
    if cut:
        starts, sizes = graph.integers([0, *begins, 0]), graph.integers(out)
        graph.operator("SLICE", [whole, starts, sizes], [target], schema.SliceOptionsT())


def dense(graph: Graph, node: dict[str, Any]) -> None:
    """FULLY_CONNECTED: Gemm, or MatMul with constant weights."""
    codes = graph.arrays[f"weights:{node['name']}"]
    if codes.ndim != 2:
        raise Inexpressible("a stack of weight matrices")
    target = graph.write(node["output"])
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = len(graph.shape(node["output"])) > 2
    options.fusedActivationFunction, first = graph.limited(node, target)
    inputs = [graph.read(node["inputs"][0]), weights(graph, node, codes.T, 0), bias(graph, node, codes.shape[1])]
    graph.operator("FULLY_CONNECTED", inputs, [first], options)
    graph.finish(node, first, target)


def matmul(graph: Graph, node: dict[str, Any]) -> None:
    """FULLY_CONNECTED with constant weights, else BATCH_MATMUL."""
    if f"weights:{node['name']}" in graph.arrays:
        dense(graph, node)
        return
    target = graph.write(node["output"])
    inner = target
    if tuple(node.get("clamp") or full_range(graph.case["values"][node["output"]])) != full_range(
        graph.case["values"][node["output"]]
    ):
        inner = graph.like(node["output"])
    graph.operator("BATCH_MATMUL", [graph.read(code) for code in node["inputs"]], [inner], schema.BatchMatMulOptionsT())
    graph.finish(node, inner, target)


def elementwise(graph: Graph, node: dict[str, Any]) -> None:
    """ADD, SUB or MUL."""
    options = {"Add": schema.AddOptionsT, "Sub": schema.SubOptionsT, "Mul": schema.MulOptionsT}[node["op_type"]]()
    if hasattr(options, "potScaleInt16"):
        options.potScaleInt16 = False
    target = graph.write(node["output"])
    options.fusedActivationFunction, first = graph.limited(node, target)
    graph.operator(node["op_type"].upper(), [graph.read(code) for code in node["inputs"]], [first], options)
    graph.finish(node, first, target)


def concat(graph: Graph, node: dict[str, Any]) -> None:
    """CONCATENATION of values that QUANTIZE brought onto one grid."""
    target = graph.write(node["output"])
    options = schema.ConcatenationOptionsT()
    options.axis = int(node["attributes"]["axis"]) % len(graph.shape(node["output"]))
    inputs = [graph.on_grid(code, node["output"], graph.read(code)) for code in node["inputs"]]
    first = unfused(graph, node, target)
    graph.operator("CONCATENATION", inputs, [first], options)
    graph.finish(node, first, target)


def unfused(graph: Graph, node: dict[str, Any], target: int) -> int:
    """Where an operator without a fused activation writes to."""
    ends = full_range(graph.case["values"][node["output"]])
    if tuple(node.get("clamp") or ends) == ends:
        return target
    return graph.like(node["output"], graph.tensors[target].shape)


def pool(graph: Graph, node: dict[str, Any]) -> None:
    """MAX_POOL_2D or AVERAGE_POOL_2D, both on one grid."""
    place, largest = window(graph, node), node["op_type"] == "MaxPool"
    if place["dilations"] != [1, 1]:
        raise Inexpressible("pooling with dilations")
    value = graph.case["values"][node["inputs"][0]]
    if graph.grid(node["inputs"][0]) != graph.grid(node["output"]):
        raise Inexpressible("pooling from one grid to another")
    counted = bool(node["attributes"].get("count_include_pad"))
    if not largest and place["padded"] and not counted and not place["same"]:
        raise Inexpressible("average over asymmetric padding that is not counted")
    if not largest and place["padded"] and counted:
        place = {**place, "same": False}
    source, padding = padded_input(graph, node, place, full_range(value)[0] if largest else None)
    target = graph.write_last(node["output"])
    options = schema.Pool2DOptionsT()
    options.padding, (options.strideH, options.strideW) = padding, place["strides"]
    options.filterHeight, options.filterWidth = place["kernel"]
    options.fusedActivationFunction, first = graph.limited(node, target)
    graph.operator("MAX_POOL_2D" if largest else "AVERAGE_POOL_2D", [source], [first], options)
    graph.finish(node, first, target)


def mean(graph: Graph, node: dict[str, Any]) -> None:
    """MEAN, with the channels last where both spatial axes are kept."""
    source, rank = node["inputs"][0], len(graph.shape(node["inputs"][0]))
    keep = len(graph.shape(node["output"])) == rank
    if node["op_type"] == "GlobalAveragePool":
        axes = list(range(2, rank))
    else:
        axes = sorted(int(axis) % rank for axis in node["attributes"].get("axes") or range(rank))
    options = schema.ReducerOptionsT()
    options.keepDims = keep
    if keep and rank == 4 and axes == [2, 3]:
        target, tensor, axes = graph.write_last(node["output"]), graph.read_last(source), [1, 2]
    else:
        target, tensor = graph.write(node["output"]), graph.read(source)
    first = unfused(graph, node, target)
    graph.operator("MEAN", [tensor, graph.integers(axes)], [first], options)
    graph.finish(node, first, target)


def clip(graph: Graph, node: dict[str, Any]) -> None:
    """A Relu or Clip alone: RELU or RELU6, or MAXIMUM and MINIMUM on one grid."""
    source, target = graph.read(node["inputs"][0]), graph.write(node["output"])
    kind, _ = graph.limited(node, target)
    if kind in (RELU, RELU6):
        graph.operator("RELU" if kind == RELU else "RELU6", [source], [target])
        return
    source = graph.on_grid(node["inputs"][0], node["output"], source)
    value = graph.case["values"][node["output"]]
    graph.finish({"clamp": full_range(value), **node}, source, target)


def leaky_relu(graph: Graph, node: dict[str, Any]) -> None:
    """LEAKY_RELU."""
    target = graph.write(node["output"])
    first = unfused(graph, node, target)
    options = schema.LeakyReluOptionsT()
    options.alpha = float(node["attributes"].get("alpha", 0.01))
    graph.operator("LEAKY_RELU", [graph.read(node["inputs"][0])], [first], options)
    graph.finish(node, first, target)


def prelu(graph: Graph, node: dict[str, Any]) -> None:
    """PRELU; its slope is the second input or the weights of the node."""
    target = graph.write(node["output"])
    first = unfused(graph, node, target)
    if len(node["inputs"]) > 1:
        slope = graph.read(node["inputs"][1])
    else:
        codes, scale = (graph.arrays[f"{key}:{node['name']}"] for key in ("weights", "weight_scale"))
        zero = graph.arrays.get(f"weight_zero_point:{node['name']}", np.int32(0))
        kind, dtype = graph.type(node["inputs"][0])
        slope = graph.tensor(kind, codes.shape, (scale, zero, 0), codes.astype(dtype))
    graph.operator("PRELU", [graph.read(node["inputs"][0]), slope], [first])
    graph.finish(node, first, target)


def unary(graph: Graph, node: dict[str, Any]) -> None:
    """A function of one value (`UNARY`)."""
    target = graph.write(node["output"])
    first = unfused(graph, node, target)
    options = None
    if node["op_type"] == "HardSwish":
        options = schema.HardSwishOptionsT()
    elif node["op_type"] == "Gelu":
        options = schema.GeluOptionsT()
        options.approximate = node["attributes"].get("approximate") == "tanh"
    elif node["op_type"] == "Elu" and node["attributes"].get("alpha", 1.0) != 1.0:
        raise Inexpressible("ELU with another alpha than 1")
    graph.operator(UNARY[node["op_type"]], [graph.read(node["inputs"][0])], [first], options)
    graph.finish(node, first, target)


def softmax(graph: Graph, node: dict[str, Any]) -> None:
    """SOFTMAX, between two TRANSPOSEs where the axis is not the last."""
    shape = graph.shape(node["output"])
    axis = int(node["attributes"].get("axis", -1)) % len(shape)
    order = [i for i in range(len(shape)) if i != axis] + [axis]
    source, target = graph.read(node["inputs"][0]), graph.write(node["output"])
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    if axis == len(shape) - 1:
        graph.operator("SOFTMAX", [source], [target], options)
        return
    inside = [shape[i] for i in order]
    before, after = graph.like(node["inputs"][0], inside), graph.like(node["output"], inside)
    graph.transpose(source, before, order)
    graph.operator("SOFTMAX", [before], [after], options)
    graph.transpose(after, target, np.argsort(order))


def nearest_positions(size: int, out: int, coordinates: str, rounding: str) -> list[int]:
    """Which element ONNX Resize takes for each of `out` outputs, exactly."""
    found = []
    for i in range(out):
        if coordinates == "asymmetric":
            x = Fraction(i * size, out)
        elif coordinates == "align_corners":
            x = Fraction(i * (size - 1), out - 1) if out > 1 else Fraction(0)
        elif coordinates in ("half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"):
            x = (i + Fraction(1, 2)) * size / out - Fraction(1, 2)
            x = Fraction(0) if coordinates == "pytorch_half_pixel" and out == 1 else x
        else:
            raise Inexpressible(f"coordinates {coordinates}")
        up = {"floor": math.floor(x), "ceil": math.ceil(x), "round_prefer_ceil": math.floor(x + Fraction(1, 2))}
        taken = up.get(rounding, math.ceil(x - Fraction(1, 2)))
        found.append(min(max(taken, 0), size - 1))
    return found


def tflite_positions(size: int, out: int, align: bool, half: bool) -> list[int]:
    """Which element RESIZE_NEAREST_NEIGHBOR takes (reference/resize_nearest_neighbor.h), in its float32."""
    scale = np.float32(size - 1) / np.float32(out - 1) if align and out > 1 else np.float32(size) / np.float32(out)
    places = (np.arange(out, dtype=np.float32) + np.float32(0.5 if half else 0)) * np.float32(scale)
    taken = np.floor(places + np.float32(0.5)) if align else np.floor(places)
    return [int(n) for n in np.clip(taken, 0, size - 1)]


def resize(graph: Graph, node: dict[str, Any]) -> None:
    """RESIZE_NEAREST_NEIGHBOR where it takes the same elements, or RESIZE_BILINEAR."""
    attributes, code = node["attributes"], node["inputs"][0]
    size, out = graph.shape(code), graph.shape(node["output"])
    if len(size) != 4 or size[:2] != out[:2]:
        raise Inexpressible("only two spatial axes can be resized")
    coordinates = attributes.get("coordinate_transformation_mode") or "half_pixel"
    mode = attributes.get("mode") or "nearest"
    if mode == "nearest":
        rounding = attributes.get("nearest_mode") or "round_prefer_floor"
        wanted = [nearest_positions(size[i], out[i], coordinates, rounding) for i in (2, 3)]
        ways = [(False, False), (False, True), (True, False)]
        fitting = [w for w in ways if [tflite_positions(size[i], out[i], *w) for i in (2, 3)] == wanted]
        if not fitting:
            raise Inexpressible(f"nearest with {coordinates} and {rounding}")
        options, (align, half) = schema.ResizeNearestNeighborOptionsT(), fitting[0]
    elif mode == "linear":
        options = schema.ResizeBilinearOptionsT()
        align, half = coordinates == "align_corners", coordinates in ("half_pixel", "pytorch_half_pixel")
        if not (align or half or coordinates == "asymmetric"):
            raise Inexpressible(f"bilinear with {coordinates}")
    else:
        raise Inexpressible(f"mode {mode}")
    options.alignCorners, options.halfPixelCenters = align, half
    source = graph.on_grid(code, node["output"], graph.read_last(code))
    target = graph.write_last(node["output"])
    name = "RESIZE_NEAREST_NEIGHBOR" if mode == "nearest" else "RESIZE_BILINEAR"
    graph.operator(name, [source, graph.integers(out[2:])], [target], options)


def pad(graph: Graph, node: dict[str, Any]) -> None:
    """PADV2 or MIRROR_PAD."""
    attributes, code = node["attributes"], node["inputs"][0]
    rank, pads = len(graph.shape(code)), [int(n) for n in attributes["pads"]]
    axes = [int(axis) % rank for axis in attributes.get("axes") or range(rank)]
    widths = [[0, 0] for _ in range(rank)]
    for i, axis in enumerate(axes):
        widths[axis] = [pads[i], pads[len(axes) + i]]
    if min(pads) < 0:
        raise Inexpressible("negative pads")
    mode = attributes.get("mode") or "constant"
    source = graph.on_grid(code, node["output"], graph.read(code))
    target = graph.write(node["output"])
    if mode == "constant":
        fill = attributes.get("value_code", graph.case["values"][node["output"]]["zero_point"])
        constant = graph.constant(node["output"], np.asarray([fill]))
        graph.operator("PADV2", [source, graph.integers(widths), constant], [target], schema.PadV2OptionsT())
    elif mode == "reflect":
        options = schema.MirrorPadOptionsT()
        options.mode = schema.MirrorPadMode.REFLECT
        graph.operator("MIRROR_PAD", [source, graph.integers(widths)], [target], options)
    else:
        raise Inexpressible(f"mode {mode}")


def reshape(graph: Graph, node: dict[str, Any]) -> None:
    """RESHAPE."""
    source, target = graph.read(node["inputs"][0]), graph.write(node["output"])
    shape = graph.shape(node["output"])
    options = schema.ReshapeOptionsT()
    options.newShape = shape
    graph.operator("RESHAPE", [source, graph.integers(shape)], [target], options)


def transposed(graph: Graph, node: dict[str, Any]) -> None:
    """TRANSPOSE."""
    rank = len(graph.shape(node["output"]))
    order = node["attributes"].get("perm") or list(range(rank))[::-1]
    graph.transpose(graph.read(node["inputs"][0]), graph.write(node["output"]), order)


def cut(graph: Graph, node: dict[str, Any]) -> None:
    """STRIDED_SLICE."""
    attributes, shape = node["attributes"], graph.shape(node["inputs"][0])
    starts = attributes["starts"]
    axes = attributes.get("axes") or list(range(len(starts)))
    steps = attributes.get("steps") or [1] * len(starts)
    begin, end, stride, open_end = [0] * len(shape), list(shape), [1] * len(shape), 0
    for start, stop, axis, step in zip(starts, attributes["ends"], axes, steps, strict=True):
        axis = axis % len(shape)
        first, last, stride[axis] = slice(start, stop, step).indices(shape[axis])
        begin[axis], end[axis] = first, last
        open_end |= (1 << axis) if last < 0 else 0
    options = schema.StridedSliceOptionsT()
    options.endMask = open_end
    inputs = [graph.read(node["inputs"][0]), *[graph.integers(values) for values in (begin, end, stride)]]
    graph.operator("STRIDED_SLICE", inputs, [graph.write(node["output"])], options)


def split(graph: Graph, node: dict[str, Any]) -> None:
    """SPLIT_V, or the SLICE of one result where the node names its "start"."""
    attributes, outputs = node["attributes"], node.get("outputs") or [node["output"]]
    shape = graph.shape(node["inputs"][0])
    axis = int(attributes.get("axis", 0)) % len(shape)
    if len(outputs) > 1:
        sizes = graph.integers([graph.shape(code)[axis] for code in outputs])
        options = schema.SplitVOptionsT()
        options.numSplits = len(outputs)
        inputs = [graph.read(node["inputs"][0]), sizes, graph.scalar(axis)]
        graph.operator("SPLIT_V", inputs, [graph.write(code) for code in outputs], options)
        return
    if "start" not in attributes:
        raise Inexpressible("which part of the split is not said")
    begin, size = [0] * len(shape), graph.shape(outputs[0])
    begin[axis] = int(attributes["start"])
    inputs = [graph.read(node["inputs"][0]), graph.integers(begin), graph.integers(size)]
    graph.operator("SLICE", inputs, [graph.write(outputs[0])], schema.SliceOptionsT())


def gather(graph: Graph, node: dict[str, Any]) -> None:
    """GATHER with constant indices."""
    shape = graph.shape(node["inputs"][0])
    axis = int(node["attributes"].get("axis", 0)) % len(shape)
    indices = graph.arrays.get(f"indices:{node['name']}", node["attributes"].get("indices"))
    if indices is None:
        raise Inexpressible("the indices are not constant")
    options = schema.GatherOptionsT()
    options.axis = axis
    where = graph.integers(np.asarray(indices) % shape[axis])
    graph.operator("GATHER", [graph.read(node["inputs"][0]), where], [graph.write(node["output"])], options)


def requantize(graph: Graph, node: dict[str, Any]) -> None:
    """QUANTIZE from one grid to another."""
    target = graph.write(node["output"])
    first = unfused(graph, node, target)
    graph.operator("QUANTIZE", [graph.read(node["inputs"][0])], [first], schema.QuantizeOptionsT())
    graph.finish(node, first, target)


BUILDERS: dict[str, Callable[[Graph, dict[str, Any]], None]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": dense,
    "MatMul": matmul,
    **dict.fromkeys(("Add", "Sub", "Mul"), elementwise),
    "Concat": concat,
    **dict.fromkeys(("MaxPool", "AveragePool"), pool),
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), mean),
    **dict.fromkeys(("Relu", "Clip"), clip),
    "LeakyRelu": leaky_relu,
    "PRelu": prelu,
    **dict.fromkeys(UNARY, unary),
    "Softmax": softmax,
    "Resize": resize,
    "Pad": pad,
    **dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze"), reshape),
    "Transpose": transposed,
    "Slice": cut,
    "Split": split,
    "Gather": gather,
    **dict.fromkeys(("QuantizeLinear", "Requantize", "Identity"), requantize),
}


def express(case: dict[str, Any], arrays: dict[str, np.ndarray]) -> tuple[Graph, list[dict[str, Any]]]:
    """The TFLite graph of a case, and per node what stands for it ("span" into the operators) or why nothing does."""
    graph, nodes = Graph(case, arrays), []
    for code in case["inputs"]:
        graph.plain[code] = graph.like(code)
    for node in case["nodes"]:
        line: dict[str, Any] = {"name": node["name"], "op_type": node["op_type"]}
        graph.used, first = [], len(graph.operators)
        try:
            if node["op_type"] not in BUILDERS:
                raise Inexpressible(f"no TFLite operator is known here for {node['op_type']}")
            BUILDERS[node["op_type"]](graph, node)
            line |= {"operators": graph.used, "span": (first, len(graph.operators))}
        except Inexpressible as why:
            line["not_expressible"] = str(why)
        nodes.append(line)
    return graph, nodes


def execute(graph: Graph, kernels: str) -> tuple[dict[str, np.ndarray], list[bool]]:
    """Codes of every value, and whether the delegate ran each operator."""
    interpreter = Interpreter(
        model_content=graph.model(), num_threads=1, experimental_op_resolver_type=KERNELS[kernels]
    )
    interpreter.allocate_tensors()
    for code, detail in zip(graph.case["inputs"], interpreter.get_input_details(), strict=True):
        interpreter.set_tensor(detail["index"], graph.arrays[f"codes:{code}"].astype(graph.type(code)[1]))
    interpreter.invoke()
    found = {}
    for code, tensor, is_last in graph.results():
        codes = interpreter.get_tensor(tensor)
        found[code] = (codes.transpose(TO_FIRST) if is_last else codes).astype(np.int32)
    return found, delegated_operators(graph, interpreter._get_ops_details())


def delegated_operators(graph: Graph, details: list[dict[str, Any]]) -> list[bool]:
    """Per operator of the graph, whether the delegate ran it.

    It did if one of its outputs leaves the delegate, or is used inside without entering it.
    """
    entries = [entry for entry in details if entry["op_name"] == "DELEGATE"]
    entering = {int(tensor) for entry in entries for tensor in entry["inputs"]}
    inside = {int(tensor) for entry in entries for tensor in entry["outputs"]}
    taken = []
    for operator in reversed(graph.operators):
        is_taken = any(tensor in inside for tensor in operator.outputs)
        if is_taken:
            inside.update(tensor for tensor in operator.inputs if tensor not in entering)
        taken.append(is_taken)
    return taken[::-1]


def run_case(folder: Path, kernels: str) -> None:
    """Writes the results of one case beside it."""
    case = json.loads((folder / "case.json").read_text())
    with np.load(folder / "arrays.npz") as stored:
        arrays = {name: stored[name] for name in stored.files}
    graph, nodes = express(case, arrays)
    reasons = [
        f"node '{line['name']}' ({line['op_type']}): {line['not_expressible']}"
        for line in nodes
        if "not_expressible" in line
    ]
    report = {**header(kernels), "nodes": nodes}
    if reasons:
        report |= {"status": "not expressible", "reason": reasons[0]}
    if not reasons:
        try:
            found, delegated = execute(graph, kernels)
        except (RuntimeError, ValueError) as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            report |= {"status": "failed", "error": lines[0] if lines else repr(error)}
        else:
            for line in nodes:
                describe(line, delegated)
            np.savez(folder / f"result-{kernels}.npz", **{f"codes:{code}": codes for code, codes in found.items()})
    for line in nodes:
        line.pop("span", None)
    write_report(folder, kernels, report)


def header(kernels: str) -> dict[str, Any]:
    """What every report begins with."""
    version = importlib.metadata.version("ai-edge-litert")
    return {
        "runtime": "LiteRT",
        "version": version,
        "kernels": kernels,
        "status": "run",
        "reason": "",
        "error": "",
        "nodes": [],
    }


def describe(line: dict[str, Any], delegated: list[bool]) -> None:
    """Adds who ran the operators of a node; every kernel for integer tensors is an integer one."""
    first, end = line["span"]
    line["delegated"] = delegated[first:end]
    by = ["XNNPACK" if taken else "LiteRT" for taken in line["delegated"]]
    line["executed_by"] = ", ".join(f"{name} ({who})" for name, who in zip(line["operators"], by, strict=True))
    line["integer"] = True


def write_report(folder: Path, kernels: str, report: dict[str, Any]) -> None:
    """Writes `result-KERNELS.json`."""
    (folder / f"result-{kernels}.json").write_text(json.dumps(report, indent=1) + "\n")


def main() -> int:
    """Runs every case in a process of its own: a failed check inside the runtime ends its process."""
    parser = argparse.ArgumentParser(description="Run emulator cases in LiteRT.")
    parser.add_argument("cases", type=Path, help="a folder; every case.json below it is a case")
    parser.add_argument("--kernels", choices=sorted(KERNELS), required=True)
    arguments = parser.parse_args()
    folders = sorted(path.parent for path in arguments.cases.rglob("case.json"))
    if not folders:
        parser.error(f"no case.json below {arguments.cases}")
    counts: dict[str, int] = {}
    for folder in folders:
        for kind in ("npz", "json"):
            (folder / f"result-{arguments.kernels}.{kind}").unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=run_case, args=(folder, arguments.kernels))
        process.start()
        process.join()
        path = folder / f"result-{arguments.kernels}.json"
        if not path.exists():
            why = f"the process ended with {process.exitcode}"
            write_report(folder, arguments.kernels, {**header(arguments.kernels), "status": "failed", "error": why})
        report = json.loads(path.read_text())
        status = report["status"]
        counts[status] = counts.get(status, 0) + 1
        if status != "run":
            print(f"{folder}: {status}: {report['error'] or report['reason']}", file=sys.stderr)
    print(json.dumps({"kernels": arguments.kernels, "cases": len(folders), **counts}))
    return 1 if counts.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
