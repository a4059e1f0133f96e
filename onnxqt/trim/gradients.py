"""Gradients that onnxruntime-training lacks or computes wrongly, written in standard ONNX operators.

A rule is a list of nodes. Their operands may be `GO(i)`, the gradient of the forward node's output i, and
`I(i)` or `O(i)`, its inputs and outputs; `GI(i)` is the gradient of input i that they compute. Attributes are
constants, so an operator whose gradient depends on its attributes is wrapped into a model-local function of
its own for each node.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxqt.errors import TrainingError
from onnxqt.model import Node
from onnxqt.numerics import Array
from onnxqt.ops import Attributes, Gradient, lookup

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
    return [Rule(f"{DOMAIN}::{name}", (identity,)) for name in STRAIGHT_THROUGH]


def check_differentiable(node: Node) -> None:
    """Refuse a node through which no gradient passes.

    Raises:
        TrainingError: naming the node.
    """
    if lookup(node.op_type, node.domain).gradient is Gradient.NONE:
        operator = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
        raise TrainingError(
            f"no gradient for operator {operator} (node '{node.name}'), which lies between a weight and the "
            "output: use 'onnxqt export' for quantization without training"
        )


def make_differentiable(graph: gs.Graph) -> tuple[list[Rule], list[onnx.FunctionProto]]:
    """Rewrite the nodes of a training graph whose built-in gradient crashes; forward values do not change.

    MaxPool gets its second output, without which its gradient kernel reads a null pointer. AveragePool
    becomes a function with the rule of `_average_pool`.
    """
    rules: list[Rule] = []
    functions: list[onnx.FunctionProto] = []
    for node in graph.nodes:
        if node.op == "MaxPool" and len(node.outputs) == 1:
            node.outputs.append(gs.Variable(f"{node.outputs[0].name}.indices", np.int64))
        if node.op == "AveragePool":
            name = f"AveragePool_{len(rules)}"
            rule, share = _average_pool(f"{DOMAIN}::{name}", node)
            rules.append(rule)
            functions.append(_wrap(name, node, graph.opset))
            node.inputs.append(gs.Constant(f"{node.name}.share", share))
            node.op, node.domain, node.attrs = name, DOMAIN, {}
    return rules, functions


def _wrap(name: str, node: gs.Node, opset: int) -> onnx.FunctionProto:
    """A function that does what `node` does; it takes a second input, which only the gradient reads."""
    body = onnx.helper.make_node(node.op, ["x"], ["y"], **node.attrs)
    imports = [onnx.helper.make_opsetid("", opset)]
    return onnx.helper.make_function(DOMAIN, name, ["x", "share"], ["y"], [body], imports)


def _average_pool(key: str, node: gs.Node) -> tuple[Rule, Array]:
    """Each output gradient, divided by the number of values averaged, goes back to every value of its window.

    GI = ConvTranspose(GO * share, ones), on channels folded into the batch axis; share = 1 / count, returned
    with the rule, is float32 (1, 1, *output sizes).
    """
    size, out = _spatial(node, node.inputs[0]), _spatial(node, node.outputs[0])
    window = _Window.of(node.attrs, size, out)
    count = np.ones(())
    for axis in range(len(size)):
        count = np.multiply.outer(count, window.valid(axis))
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
    return rule, (1.0 / count).reshape(1, 1, *out).astype(np.float32)


def _constant(name: str, value: list[int] | float, kind: str) -> RuleNode:
    return RuleNode("Constant", (), (name,), {"value": (value, kind, True)})


def _spatial(node: gs.Node, tensor: gs.Tensor) -> list[int]:
    sizes = list(tensor.shape or [])[2:]
    if not sizes or not all(isinstance(size, int) for size in sizes):
        raise TrainingError(
            f"{node.op} '{node.name}' pools over sizes that are not known ({tensor.name}: {tensor.shape}): "
            "export the model with fixed height and width"
        )
    return sizes


@dataclass(frozen=True)
class _Window:
    """The geometry of a pooling operator."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    begin: list[int]
    end: list[int]
    size: list[int]
    out: list[int]
    include_pad: bool

    @classmethod
    def of(cls, attributes: Attributes, size: list[int], out: list[int]) -> "_Window":
        rank = len(size)
        kernel = list(attributes["kernel_shape"])
        strides = list(attributes.get("strides", [1] * rank))
        dilations = list(attributes.get("dilations", [1] * rank))
        begin, end = _pads(attributes, size, out, (kernel, strides, dilations))
        include_pad = bool(attributes.get("count_include_pad", 0))
        return cls(kernel, strides, dilations, begin, end, size, out, include_pad)

    def valid(self, axis: int) -> Array:
        """How many positions of the window count, for each output position along one axis."""
        lo, hi = (-self.begin[axis], self.size[axis] + self.end[axis]) if self.include_pad else (0, self.size[axis])
        starts = np.arange(self.out[axis]) * self.strides[axis] - self.begin[axis]
        taps = starts[:, None] + np.arange(self.kernel[axis]) * self.dilations[axis]
        counts: Array = ((taps >= lo) & (taps < hi)).sum(axis=1).astype(np.float64)
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
