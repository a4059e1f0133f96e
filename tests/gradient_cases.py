"""One-operator graphs for the tests of gradients, with data that stays away from kinks by more than `H`."""

import itertools
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxqt.numerics import Array
from onnxqt.runtime import MAX_IR_VERSION

H = 2.0**-4  # the largest step of the finite differences


@dataclass(frozen=True, eq=False)
class Case:
    """One operator: its float32 inputs are parameters, except those in `fixed`; other inputs are constants.

    The operator reads p + zero, where zero is an input of the graph: like the tensors of a real network, what it
    reads is computed. With `dynamic`, the first zero brings a batch axis of unknown size, fed with two samples.
    """

    op: str
    inputs: tuple[Array | None, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[int, ...] = ()
    outputs: int = 1
    opset: int = 17
    dynamic: bool = False

    @cached_property
    def names(self) -> list[str]:
        return ["" if value is None else f"p{i}" if self._moves(i) else f"c{i}" for i, value in enumerate(self.inputs)]

    def _moves(self, index: int) -> bool:
        value = self.inputs[index]
        return index not in self.fixed and value is not None and value.dtype == np.float32

    @property
    def parameters(self) -> dict[str, Array]:
        named = zip(self.names, self.inputs, strict=True)
        return {name: value for name, value in named if value is not None and name.startswith("p")}

    @property
    def zeros(self) -> dict[str, Array]:
        """Values of the zero of each parameter."""
        batch = (2, *[1] * (self.inputs[0].ndim - 1)) if self.dynamic and self.inputs[0] is not None else ()
        return {f"zero_{name}": np.zeros(batch if name == "p0" else (), np.float32) for name in self.parameters}

    def _zero_infos(self) -> list[onnx.ValueInfoProto]:
        return [value_info(name, ("n", *zero.shape[1:]) if zero.ndim else ()) for name, zero in self.zeros.items()]

    def nodes(self) -> list[onnx.NodeProto]:
        sums = [helper.make_node("Add", [name, f"zero_{name}"], [f"x_{name}"]) for name in self.parameters]
        read = [f"x_{name}" if name in self.parameters else name for name in self.names]
        raw = [f"raw{i}" for i in range(self.outputs)]
        casts = [helper.make_node("Cast", [name], [f"y{i}"], to=TensorProto.FLOAT) for i, name in enumerate(raw)]
        return [*sums, helper.make_node(self.op, read, raw, name="case", **self.attributes), *casts]

    def forward(self) -> onnx.ModelProto:
        """Parameters -> outputs y, as inference sees them."""
        inputs = [value_info(name, value.shape) for name, value in self.parameters.items()]
        outputs = [f"y{i}" for i in range(self.outputs)]
        return self._model(self.nodes(), [*inputs, *self._zero_infos()], outputs, {})

    def training(self, shapes: list[tuple[int, ...]]) -> onnx.ModelProto:
        """r -> loss, with the parameters as initializers."""
        nodes = self.nodes()
        for i in range(self.outputs):
            nodes.append(helper.make_node("Mul", [f"y{i}", f"r{i}"], [f"weighted{i}"]))
            nodes.append(helper.make_node("ReduceSum", [f"weighted{i}"], [f"loss{i}"], keepdims=0))
        total = "Identity" if self.outputs == 1 else "Add"
        nodes.append(helper.make_node(total, [f"loss{i}" for i in range(self.outputs)], ["loss"]))
        inputs = [value_info(f"r{i}", shape) for i, shape in enumerate(shapes)]
        model = self._model(nodes, [*inputs, *self._zero_infos()], ["loss"], self.parameters)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def _model(
        self,
        nodes: list[onnx.NodeProto],
        inputs: list[onnx.ValueInfoProto],
        outputs: list[str],
        parameters: Mapping[str, Array],
    ) -> onnx.ModelProto:
        fixed = {n: v for n, v in zip(self.names, self.inputs, strict=True) if v is not None and n.startswith("c")}
        constants = [numpy_helper.from_array(value, name) for name, value in {**fixed, **parameters}.items()]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
        if outputs == ["loss"]:
            results = [value_info("loss", ())]
        graph = helper.make_graph(nodes, "case", inputs, results, constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=MAX_IR_VERSION)


def value_info(name: str, shape: tuple[int | str, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


# --- data: away from kinks by more than h ---------------------------------------------------------------


def random(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


def above_one(*shape: int) -> Array:
    """In [1, 2]."""
    return random(f"above {shape}").uniform(1, 2, shape).astype(np.float32)


def signed(*shape: int) -> Array:
    """In [-1.5, -0.5] and [0.5, 1.5]."""
    rng = random(f"signed {shape}")
    return (rng.choice([-1, 1], shape) * rng.uniform(0.5, 1.5, shape)).astype(np.float32)


def around_clip(*shape: int) -> Array:
    """On both sides of -1 and of 1, at a distance of 0.25."""
    rng = random(f"clip {shape}")
    return (rng.choice([-1.5, -0.5, 0.5, 1.5], shape) + rng.uniform(-0.25, 0.25, shape)).astype(np.float32)


def around_bends(*shape: int) -> Array:
    """Below, between and above the bends of HardSwish and HardSigmoid, at 2.5 and 3."""
    rng = random(f"bends {shape}")
    low, high = np.array([-4, -2, 0.3, 3.5]), np.array([-3.5, -0.3, 2, 4])
    part = rng.integers(4, size=shape)
    return rng.uniform(low[part], high[part]).astype(np.float32)


def distinct(*shape: int) -> Array:
    """Multiples of 3 h in random order: no step of h changes which value of a window is the largest."""
    order = random(f"distinct {shape}").permutation(int(np.prod(shape))).reshape(shape)
    return ((order - order.size // 2) * 3 * H).astype(np.float32)


def scalar(value: float) -> Array:
    return np.array(value, np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


# --- the cases ------------------------------------------------------------------------------------------

X = signed(1, 4, 6, 7)


def convolutions() -> dict[str, Case]:
    def conv(x: Array, weight: tuple[int, ...], bias: bool = True, **attributes: Any) -> Case:
        return Case("Conv", (x, signed(*weight), *([signed(weight[0])] if bias else [])), attributes, dynamic=True)

    return {
        "Conv-plain": conv(X, (3, 4, 3, 3)),
        "Conv-no-bias": conv(X, (3, 4, 1, 1), bias=False),
        "Conv-stride-2-remainder": conv(X, (3, 4, 3, 3), strides=[2, 2]),
        "Conv-asymmetric-pads": conv(X, (3, 4, 3, 2), pads=[1, 0, 2, 1], strides=[2, 1]),
        "Conv-dilated": conv(X, (3, 4, 2, 2), dilations=[2, 3]),
        "Conv-two-groups": conv(X, (6, 2, 3, 3), group=2, pads=[1, 1, 1, 1]),
        "Conv-depthwise": conv(X, (4, 1, 3, 3), group=4, pads=[1, 1, 1, 1], strides=[2, 2]),
        "Conv-same-upper": conv(X, (3, 4, 2, 3), auto_pad="SAME_UPPER", strides=[2, 2]),
        "Conv-same-lower": conv(X, (3, 4, 2, 3), auto_pad="SAME_LOWER"),
        "Conv-1d": conv(signed(1, 3, 8), (4, 3, 3), pads=[1, 1], strides=[2]),
        "Conv-3d": conv(signed(1, 2, 3, 4, 3), (2, 2, 2, 2, 2)),
    }


def matrices() -> dict[str, Case]:
    def gemm(a: Array, b: Array, *c: Array, **attributes: Any) -> Case:
        return Case("Gemm", (a, b, *c), attributes)

    def matmul(a: Array, b: Array) -> Case:
        return Case("MatMul", (a, b))

    return {
        "Gemm-plain": gemm(signed(3, 5), signed(5, 4), signed(4)),
        "Gemm-transposed": gemm(signed(5, 3), signed(4, 5), signed(1, 4), transA=1, transB=1),
        "Gemm-factors": gemm(signed(3, 5), signed(4, 5), signed(3, 1), transB=1, alpha=0.5, beta=2.0),
        "Gemm-no-bias": gemm(signed(3, 5), signed(5, 4)),
        "Gemm-scalar-bias": gemm(signed(3, 5), signed(5, 4), scalar(0.5)),
        "MatMul-2d": matmul(signed(3, 5), signed(5, 4)),
        "MatMul-batch": matmul(signed(2, 3, 5), signed(2, 5, 4)),
        "MatMul-batch-matrix": matmul(signed(2, 3, 5), signed(5, 4)),
        "MatMul-broadcast": matmul(signed(2, 1, 3, 5), signed(3, 5, 2)),
    }


def elementwise() -> dict[str, Case]:
    x, row, column = above_one(2, 3, 4), above_one(4), above_one(2, 1, 1)
    unary = {
        **{op: signed(3, 5) for op in ("Neg", "Abs", "Exp", "Erf", "Sigmoid", "Tanh", "Relu", "LeakyRelu", "Identity")},
        **{op: above_one(3, 5) for op in ("Sqrt", "Log")},
    }
    binary = ("Add", "Sub", "Mul", "Div")
    return {
        **{op: Case(op, (values,)) for op, values in unary.items()},
        **{f"{op}-same-shape": Case(op, (x, above_one(2, 3, 4) + 1)) for op in binary},
        **{f"{op}-broadcast-right": Case(op, (x, row)) for op in binary},
        **{f"{op}-broadcast-both": Case(op, (column, row)) for op in binary},
        "Pow-square": Case("Pow", (signed(3, 5), scalar(2.0)), fixed=(1,)),
        "Pow-exponents": Case("Pow", (above_one(3, 5), above_one(5)), fixed=(1,)),
        "LeakyRelu-alpha": Case("LeakyRelu", (signed(3, 5),), {"alpha": 0.25}),
        "Clip": Case("Clip", (around_clip(4, 5), scalar(-1), scalar(1)), fixed=(1, 2)),
        "Clip-above": Case("Clip", (around_clip(4, 5), None, scalar(1)), fixed=(2,)),
        "Where-same-shape": Case("Where", (random("where").random((3, 4)) < 0.5, signed(3, 4), above_one(3, 4))),
        "Cast": Case("Cast", (signed(3, 4),), {"to": TensorProto.DOUBLE}),
        "Softmax": Case("Softmax", (signed(3, 5),), {"axis": -1}),
        "Softmax-inner-axis": Case("Softmax", (signed(2, 3, 4),), {"axis": 1}),
        "LogSoftmax": Case("LogSoftmax", (signed(3, 5),), {"axis": -1}),
        "LogSoftmax-inner-axis": Case("LogSoftmax", (signed(2, 3, 4),), {"axis": 1}),
        "HardSwish": Case("HardSwish", (around_bends(4, 6),)),
        "HardSigmoid-default": Case("HardSigmoid", (around_bends(4, 6),)),
        "HardSigmoid-mobilenet": Case("HardSigmoid", (around_bends(4, 6),), {"alpha": 1 / 6, "beta": 0.5}),
        "LayerNormalization-last": normalization(signed(3, 5), -1),
        "LayerNormalization-two": normalization(signed(2, 3, 4), 1),
    }


def normalization(x: Array, axis: int) -> Case:
    scale, shift = above_one(*x.shape[axis:]), signed(*x.shape[axis:])
    return Case("LayerNormalization", (x, scale, shift), {"axis": axis, "epsilon": 1e-3})


def reductions() -> dict[str, Case]:
    return {
        "GlobalAveragePool": Case("GlobalAveragePool", (X,), dynamic=True),
        "ReduceMean-attribute": Case("ReduceMean", (X,), {"axes": [-1, 2], "keepdims": 0}),
        "ReduceMean-input": Case("ReduceMean", (X, ints(1)), {"keepdims": 1}, opset=18),
        "ReduceMean-all": Case("ReduceMean", (X,), {"keepdims": 1}),
        "ReduceSum": Case("ReduceSum", (X, ints(1, -1)), {"keepdims": 0}),
        "ReduceSum-noop": Case("ReduceSum", (X, ints()), {"noop_with_empty_axes": 1}),
        "ReduceSum-keep": Case("ReduceSum", (X, ints(2)), {"keepdims": 1}),
    }


def moves() -> dict[str, Case]:
    x = signed(2, 3, 4)
    return {
        "Reshape": Case("Reshape", (x, ints(0, -1))),
        "Transpose": Case("Transpose", (x,), {"perm": [2, 0, 1]}),
        "Flatten": Case("Flatten", (x,), {"axis": 2}),
        "Squeeze": Case("Squeeze", (signed(2, 1, 3, 1), ints(1, -1))),
        "Unsqueeze": Case("Unsqueeze", (x, ints(0, -1))),
        "Slice": Case("Slice", (x, ints(1, 0), ints(3, 9), ints(1, 2), ints(1, 3))),
        "Pad": Case("Pad", (x, ints(0, 1, 0, 0, 0, 2))),
        "Pad-value": Case("Pad", (x, ints(0, 1, 0, 0, 0, 2), scalar(3.0)), fixed=(2,)),
        "Pad-negative": Case("Pad", (x, ints(0, -1, 2, 0, 1, -1))),
        "Transpose-default": Case("Transpose", (x,)),
        "Squeeze-all": Case("Squeeze", (signed(2, 1, 3, 1),)),
        "Flatten-negative": Case("Flatten", (x,), {"axis": -1}),
        "Gather-scalar": Case("Gather", (x, np.array(1)), {"axis": 2}),
        "Split-equal": Case("Split", (x,), {"axis": -1}, outputs=2),
        "Split-num-outputs": Case("Split", (x,), {"axis": 1, "num_outputs": 2}, outputs=2, opset=18),
        "Concat-negative": Case("Concat", (x, signed(2, 3, 1)), {"axis": -1}),
        "Concat": Case("Concat", (x, signed(2, 1, 4), signed(2, 2, 4)), {"axis": 1}),
        "Expand": Case("Expand", (signed(3, 1), ints(2, 3, 4))),
        "Tile": Case("Tile", (x, ints(1, 2, 3))),
        "Gather": Case("Gather", (x, ints(2, 0, 2, -1)), {"axis": 1}),
        "Split": Case("Split", (x, ints(1, 3)), {"axis": 2}, outputs=2),
    }


def max_pools() -> dict[str, Case]:
    x = distinct(1, 2, 6, 7)

    def pool(kernel: list[int], values: Array = x, **attributes: Any) -> Case:
        return Case("MaxPool", (values,), {"kernel_shape": kernel, **attributes}, dynamic=True)

    return {
        "MaxPool-2": pool([2, 2], strides=[2, 2]),
        "MaxPool-overlap": pool([3, 3], strides=[1, 2]),
        "MaxPool-overlap-pads": pool([3, 3], strides=[2, 2], pads=[1, 0, 0, 1]),
        "MaxPool-ceil": pool([2, 2], strides=[2, 2], ceil_mode=1),
        "MaxPool-column-major": pool([2, 2], strides=[2, 2], storage_order=1),
        "MaxPool-dilated": pool([2, 2], dilations=[2, 3]),
        "MaxPool-same-upper": pool([3, 2], strides=[2, 2], auto_pad="SAME_UPPER"),
        "MaxPool-same-lower": pool([2, 3], strides=[2, 1], auto_pad="SAME_LOWER"),
        "MaxPool-1d": pool([3], distinct(1, 3, 7), strides=[2], pads=[1, 0]),
        "MaxPool-3d": pool([2, 2, 2], distinct(1, 2, 3, 4, 3)),
    }


def average_pools() -> dict[str, Case]:
    x = signed(1, 2, 6, 7)  # an odd and an even size: every stride of 2 leaves a remainder somewhere

    def pool(kernel: list[int], values: Array = x, opset: int = 17, **attributes: Any) -> Case:
        return Case("AveragePool", (values,), {"kernel_shape": kernel, **attributes}, opset=opset, dynamic=True)

    cases = {}
    for kernel, stride, pads, include, ceil in itertools.product(
        (2, 3), (1, 2), ([0, 0, 0, 0], [1, 0, 0, 1]), (0, 1), (0, 1)
    ):
        name = f"AveragePool-k{kernel}-s{stride}-p{''.join(map(str, pads))}-include{include}-ceil{ceil}"
        cases[name] = pool([kernel] * 2, strides=[stride] * 2, pads=pads, count_include_pad=include, ceil_mode=ceil)
    for opset, include in itertools.product((17, 19), (0, 1)):
        name = f"AveragePool-ceil-opset{opset}-include{include}"
        pads = [1, 0, 0, 1]
        cases[name] = pool([3, 3], opset=opset, strides=[2, 2], pads=pads, ceil_mode=1, count_include_pad=include)
    for mode, kernel, stride, include in itertools.product(("SAME_UPPER", "SAME_LOWER"), (2, 3), (1, 2), (0, 1)):
        name = f"AveragePool-{mode.lower()}-k{kernel}-s{stride}-include{include}"
        cases[name] = pool([kernel] * 2, strides=[stride] * 2, auto_pad=mode, count_include_pad=include)
    return cases | {
        "AveragePool-valid": pool([3, 2], strides=[2, 2], auto_pad="VALID"),
        "AveragePool-1d": pool([3], signed(1, 3, 8), strides=[2], pads=[1, 1]),
        "AveragePool-3d": pool([2, 2, 2], signed(1, 2, 3, 4, 3), strides=[1, 2, 2]),
        "AveragePool-dilated": pool([2, 2], opset=19, dilations=[2, 3], strides=[2, 1], pads=[1, 0, 0, 1]),
    }


CASES = {
    **convolutions(),
    **matrices(),
    **elementwise(),
    **reductions(),
    **moves(),
    **max_pools(),
    **average_pools(),
}
