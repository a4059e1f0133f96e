"""ONNX text of gradient rules: helpers to write it, and how it becomes a function."""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxqt.numerics import Array
from onnxqt.trim.gradients.rule import Operand

DOMAIN = "onnxqt"


def parse(body: str, opset: int) -> list[onnx.NodeProto]:
    """The nodes of a rule's text."""
    text = f'<domain: "{DOMAIN}", opset_import: ["" : {opset}, "com.microsoft" : 1]>\nrule () => () {{\n{body}\n}}'
    return list(onnx.parser.parse_function(text).node)


def defined_names(body: str) -> set[str]:
    """The tensors that a rule's text computes."""
    return {name for node in parse(body, opset=17) for name in node.output}


def constant_nodes(constants: Mapping[str, Array]) -> list[onnx.NodeProto]:
    """A Constant node for each value."""
    return [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value, name))
        for name, value in constants.items()
    ]


def read_names(nodes: Iterable[onnx.NodeProto]) -> set[str]:
    """The tensors that nodes read."""
    return {name for node in nodes for name in node.input}


def needed(nodes: list[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that `outputs` depend on; the trainer would run the others too."""
    wanted = set(outputs)
    kept = []
    for node in reversed(nodes):
        if not wanted.isdisjoint(node.output):
            kept.append(node)
            wanted.update(node.input)
    return kept[::-1]


def sum_to(operand: Operand | None, full: Operand | None, x: str, gradient: str, result: str) -> str:
    """Text that sums `gradient` over the axes along which an operand was broadcast.

    Args:
        operand: the operand.
        full: the tensor of the shape of `gradient`.
        x: name of the operand in the text.
        gradient: name of a gradient of the shape that the operand was broadcast to.
        result: name of the sum, of the operand's shape.
    """
    shapes = [tensor.shape for tensor in (operand, full) if tensor is not None]
    if len(shapes) == 2 and shapes[0] == shapes[1] and shapes[0] is not None and None not in shapes[0]:
        return f"{result} = Identity({gradient})\n"
    p = f"{result}_"  # prefix of the names in between
    return f"""
        {p}own = Shape({x})
        {p}shape = Shape({gradient})
        {p}rank = Size({p}own)
        {p}full_rank = Size({p}shape)
        {p}missing = Sub({p}full_rank, {p}rank)
        {p}zero = Constant<value = int64[1] {{0}}>()
        {p}one = Constant<value = int64 {{1}}>()
        {p}count = Unsqueeze({p}missing, {p}zero)
        {p}ones = ConstantOfShape<value = int64[1] {{1}}>({p}count)
        {p}aligned = Concat<axis = 0>({p}ones, {p}own)
        {p}broadcast = Equal({p}aligned, {p}one)
        {p}axes = NonZero({p}broadcast)
        {p}flat_axes = Squeeze({p}axes, {p}zero)
        {p}sum = ReduceSum<keepdims = 1, noop_with_empty_axes = 1>({gradient}, {p}flat_axes)
        {result} = Reshape({p}sum, {p}own)
    """


def number(value: float) -> Array:
    """A float32 scalar."""
    return np.array(value, np.float32)
