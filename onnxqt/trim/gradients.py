"""Gradients that onnxruntime-training lacks or computes wrongly, written in standard ONNX operators.

A rule is a list of nodes. Their operands may be `GO(i)`, the gradient of the forward node's output i, and
`I(i)` or `O(i)`, its inputs and outputs; `GI(i)` is the gradient of input i that they compute. Attributes are
constants, so an operator whose gradient depends on its attributes is wrapped into a model-local function of
its own for each node.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqt.errors import TrainingError
from onnxqt.model import GraphIndex, Node
from onnxqt.numerics import Array
from onnxqt.ops import Attributes, Gradient, lookup
from onnxqt.runtime import Session

DOMAIN = "onnxqt"

STRAIGHT_THROUGH = ("ProgressiveQDQ", "ReversePrune")  # d output / d first input = 1 everywhere


@dataclass(frozen=True)
class RuleNode:
    """One node of a gradient rule; `attributes` maps a name to (value, onnx type name, is it a tensor)."""

    op_type: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, tuple[Any, str, bool]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """The gradient of one operator: `key` is `domain::operator`."""

    key: str
    nodes: tuple[RuleNode, ...]


def static_rules() -> list[Rule]:
    """The rules that no attribute changes."""
    identity = RuleNode("Identity", ("GO(0)",), ("GI(0)",))
    return [*(Rule(f"{DOMAIN}::{name}", (identity,)) for name in STRAIGHT_THROUGH), _hard_swish()]


def _hard_swish() -> Rule:
    """For y = x max(0, min(1, x / 6 + 1/2)):  dy/dx = x / 3 + 1/2 where |x| < 3, else 1 above and 0 below."""
    return Rule(
        "::HardSwish",
        (
            _constant("three", 3.0, "float"),
            _constant("half", 0.5, "float"),
            RuleNode("Div", ("I(0)", "three"), ("third",)),
            RuleNode("Add", ("third", "half"), ("slope",)),
            RuleNode("Abs", ("I(0)",), ("size",)),
            RuleNode("Less", ("size", "three"), ("bent",)),
            RuleNode("Greater", ("I(0)", "three"), ("above",)),
            RuleNode("Cast", ("above",), ("one_or_zero",), {"to": (1, "int", False)}),
            RuleNode("Where", ("bent", "slope", "one_or_zero"), ("derivative",)),
            RuleNode("Mul", ("GO(0)", "derivative"), ("GI(0)",)),
        ),
    )


def _hard_sigmoid(key: str, alpha: float) -> Rule:
    """For y = max(0, min(1, alpha x + beta)):  dy/dx = alpha where 0 < y < 1, else 0."""
    return Rule(
        key,
        (
            _constant("zero", 0.0, "float"),
            _constant("one", 1.0, "float"),
            _constant("alpha", alpha, "float"),
            RuleNode("Greater", ("O(0)", "zero"), ("above",)),
            RuleNode("Less", ("O(0)", "one"), ("below",)),
            RuleNode("And", ("above", "below"), ("inside",)),
            RuleNode("Where", ("inside", "alpha", "zero"), ("derivative",)),
            RuleNode("Mul", ("GO(0)", "derivative"), ("GI(0)",)),
        ),
    )


def check_differentiable(node: Node, graph: GraphIndex, moving: Collection[str]) -> None:
    """Refuse a node through which no correct gradient passes.

    Args:
        node: a node that reads a trained value.
        graph: the graph it stands in.
        moving: the tensors that depend on a trained parameter.

    Raises:
        TrainingError: naming the node.
    """
    reason = _obstacle(node, graph, moving)
    if reason is not None:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise TrainingError(
            f"no gradient for operator {operator} (node '{node.name}'){reason}; it lies between a weight and the "
            "output: use 'onnxqt export' for quantization without training"
        )


def _obstacle(node: Node, graph: GraphIndex, moving: Collection[str]) -> str | None:
    """What keeps a gradient from passing: "" for the operator itself, else the case; None if nothing does."""
    if lookup(node.op_type, node.domain).gradient is Gradient.NONE:
        return ""
    shapes = [graph.shape(tensor) for tensor in node.inputs]
    if node.op_type == "Pad" and node.attributes.get("mode", b"constant") != b"constant":
        return ", which repeats values"
    if node.op_type == "Slice" and _steps_backwards(node, graph):
        return ", which steps backwards"
    if node.op_type == "MatMul" and any(shape is not None and len(shape) < 2 for shape in shapes):
        return ", which multiplies by a vector"
    if node.op_type == "Pow" and node.inputs[1] in moving:
        return ", whose exponent is trained"
    if node.op_type == "Where" and len(set(shapes)) > 1:
        return ", which broadcasts"
    return None


def _steps_backwards(node: Node, graph: GraphIndex) -> bool:
    if len(node.inputs) < 5 or not node.inputs[4]:
        return False
    steps = graph.constant(node.inputs[4])
    return steps is None or bool((steps < 0).any())


def make_differentiable(graph: gs.Graph) -> tuple[list[Rule], list[onnx.FunctionProto]]:
    """Rewrite the nodes of a training graph whose built-in gradient fails; forward values do not change.

    * Conv: its gradient ignores `auto_pad`, so the pads are written out.
    * MaxPool: its gradient needs the second output, and that in row-major order.
    * Transpose: its gradient needs the permutation written out.
    * LayerNormalization: its gradient needs the mean and the inverse standard deviation as outputs.
    * AveragePool, whose gradient crashes, and HardSigmoid, which has none, become functions with rules of their own.
    """
    rules: list[Rule] = []
    functions: list[onnx.FunctionProto] = []
    for node in graph.nodes:
        if node.op == "Conv" and node.attrs.get("auto_pad", "NOTSET") != "NOTSET":
            _write_pads(node)
        elif node.op == "MaxPool" and len(node.outputs) == 1:
            node.outputs.append(gs.Variable(f"{node.outputs[0].name}.indices", np.int64))
            node.attrs.pop("storage_order", None)
        elif node.op == "Transpose" and "perm" not in node.attrs:
            node.attrs["perm"] = list(reversed(range(len(_known_shape(node, node.inputs[0])))))
        elif node.op == "LayerNormalization" and len(node.outputs) == 1:
            for statistic in ("mean", "inverse_deviation"):
                node.outputs.append(gs.Variable(f"onnxqt.{statistic}:{node.outputs[0].name}", np.float32))
        elif node.op in ("AveragePool", "HardSigmoid"):
            key = f"{DOMAIN}::{node.op}_{len(rules)}"
            if node.op == "AveragePool":
                rule, share = _average_pool(key, node, graph.opset)
                node.inputs.append(gs.Constant(f"onnxqt.share:{node.outputs[0].name}", share))
            else:
                rule = _hard_sigmoid(key, float(node.attrs.get("alpha", 0.2)))
            rules.append(rule)
            functions.append(_wrap(node, graph.opset, len(rules) - 1))
    return rules, functions


def _write_pads(node: gs.Node) -> None:
    """`auto_pad` as explicit pads."""
    kernel = list(_known_shape(node, node.inputs[1]))[2:]
    window = _Window.of(
        {**node.attrs, "kernel_shape": kernel}, _spatial(node, node.inputs[0]), _spatial(node, node.outputs[0])
    )
    node.attrs.pop("auto_pad")
    node.attrs["pads"] = [*window.begin, *window.end]


def _wrap(node: gs.Node, opset: int, number: int) -> onnx.FunctionProto:
    """Turn a node into a call of a function that does the same; inputs behind the first are for its gradient."""
    name = f"{node.op}_{number}"
    body = onnx.helper.make_node(node.op, ["x"], ["y"], **node.attrs)
    inputs = ["x", *(f"for_gradient_{i}" for i in range(1, len(node.inputs)))]
    imports = [onnx.helper.make_opsetid("", opset)]
    node.op, node.domain, node.attrs = name, DOMAIN, {}
    return onnx.helper.make_function(DOMAIN, name, inputs, ["y"], [body], imports)


def _average_pool(key: str, node: gs.Node, opset: int) -> tuple[Rule, Array]:
    """Each output gradient, divided by the number of values averaged, goes back to every value of its window.

    GI = ConvTranspose(GO * share, ones), on channels folded into the batch axis; share = 1 / count, returned
    with the rule, is float32 (1, 1, *output sizes). What ONNX Runtime divides by where windows reach beyond the
    input differs from the ONNX standard, so it is measured: the average of ones is (values inside) / count.
    """
    size, out = _spatial(node, node.inputs[0]), _spatial(node, node.outputs[0])
    window = _Window.of(node.attrs, size, out)
    inside = np.ones(())
    for axis in range(len(size)):
        inside = np.multiply.outer(inside, window.inside(axis))
    share = _average_of_ones(node, size, opset) / np.maximum(inside, 1)
    surplus = [
        (o - 1) * s + (k - 1) * d + 1 - p - n
        for o, s, k, d, p, n in zip(
            out, window.strides, window.kernel, window.dilations, window.begin, size, strict=True
        )
    ]
    rule = Rule(
        key,
        (
            RuleNode("Shape", ("I(0)",), ("x_shape",)),
            _constant("folded", [-1, 1, *out], "int"),
            RuleNode("Reshape", ("GO(0)", "folded"), ("g",)),
            RuleNode("Mul", ("g", "I(1)"), ("g_share",)),
            _constant("one", 1.0, "float"),
            _constant("ones_shape", [1, 1, *window.kernel], "int"),
            RuleNode("Expand", ("one", "ones_shape"), ("ones",)),
            RuleNode(
                "ConvTranspose",
                ("g_share", "ones"),
                ("spread",),
                {
                    "strides": (window.strides, "int", False),
                    "dilations": (window.dilations, "int", False),
                    "pads": ([*window.begin, *(max(0, extra) for extra in surplus)], "int", False),
                    "output_padding": ([max(0, -extra) for extra in surplus], "int", False),
                },
            ),
            RuleNode("Reshape", ("spread", "x_shape"), ("GI(0)",)),
        ),
    )
    return rule, share.reshape(1, 1, *out).astype(np.float32)


def _average_of_ones(node: gs.Node, size: list[int], opset: int) -> Array:
    """What `node` makes of an input of ones, float32 (*output sizes)."""
    pool = onnx.helper.make_node(node.op, ["x"], ["y"], **node.attrs)
    value = onnx.helper.make_tensor_value_info
    kind, shape = onnx.TensorProto.FLOAT, [1, 1, *size]
    inner = onnx.helper.make_graph([pool], "ones", [value("x", kind, shape)], [value("y", kind, None)])
    model = onnx.helper.make_model(inner, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=8)
    ones: Array = Session(model).run({"x": np.ones(shape, np.float32)})["y"][0, 0]
    return ones


def _constant(name: str, value: list[int] | float, kind: str) -> RuleNode:
    return RuleNode("Constant", (), (name,), {"value": (value, kind, True)})


def _spatial(node: gs.Node, tensor: gs.Tensor) -> list[int]:
    sizes = _known_shape(node, tensor)[2:]
    known = [size for size in sizes if isinstance(size, int)]
    if len(known) < len(sizes):
        raise TrainingError(
            f"{node.op} '{node.name}' works on sizes that are not known ({tensor.name}: {tensor.shape}): "
            "export the model with fixed height and width"
        )
    return known


def _known_shape(node: gs.Node, tensor: gs.Tensor) -> tuple[int | str, ...]:
    if tensor.shape is None:
        raise TrainingError(
            f"{node.op} '{node.name}' works on a tensor of unknown rank ({tensor.name}): export the model with shapes"
        )
    return tuple(tensor.shape)


@dataclass(frozen=True)
class _Window:
    """The geometry of a sliding window."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    size: list[int]
    out: list[int]

    @classmethod
    def of(cls, attributes: Attributes, size: list[int], out: list[int]) -> "_Window":
        rank = len(size)
        kernel = list(attributes["kernel_shape"])
        strides = list(attributes.get("strides", [1] * rank))
        dilations = list(attributes.get("dilations", [1] * rank))
        begin, end = _pads(attributes, size, out, (kernel, strides, dilations))
        return cls(kernel, strides, dilations, begin, end, size, out)

    def inside(self, axis: int) -> Array:
        """How many positions of the window lie inside the input, for each output position along one axis."""
        starts = np.arange(self.out[axis]) * self.strides[axis] - self.begin[axis]
        taps = starts[:, None] + np.arange(self.kernel[axis]) * self.dilations[axis]
        counts: Array = ((taps >= 0) & (taps < self.size[axis])).sum(axis=1).astype(np.float64)
        return counts


def _pads(
    attributes: Attributes, size: list[int], out: list[int], geometry: tuple[list[int], list[int], list[int]]
) -> tuple[list[int], list[int]]:
    rank = len(size)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max(0, (o - 1) * s + (k - 1) * d + 1 - n) for o, n, k, s, d in zip(out, size, *geometry, strict=True)]
        small = [total // 2 for total in totals]
        large = [total - half for total, half in zip(totals, small, strict=True)]
        return (small, large) if mode == "SAME_UPPER" else (large, small)
    pads = list(attributes.get("pads", [0] * 2 * rank))
    return pads[:rank], pads[rank:]
