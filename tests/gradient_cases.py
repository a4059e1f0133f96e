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
    ingested: bool = True  # not what `ingest` refuses or rewrites

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
        return onnx.shape_inference.infer_shapes(model, strict_mode=self.ingested)

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


def value_info(name: str, shape: tuple[int | str | None, ...]) -> onnx.ValueInfoProto:
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


def inside_one(*shape: int) -> Array:
    """In [-0.6, 0.6]."""
    return random(f"inside {shape}").uniform(-0.6, 0.6, shape).astype(np.float32)


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
    }


def smooth() -> dict[str, Case]:
    """Operators on one value each, and their attributes."""
    near, wide, bends = inside_one(3, 5), signed(3, 5), around_bends(4, 6)
    domains = {
        **dict.fromkeys(("Acos", "Asin", "Atanh", "Tan"), near),
        **{op: above_one(3, 5) + np.float32(0.5) for op in ("Acosh", "Reciprocal")},
        **dict.fromkeys(("Asinh", "Atan", "Cos", "Cosh", "Sin", "Sinh", "Softplus", "Softsign", "Mish"), wide),
        **dict.fromkeys(("Elu", "Selu", "Celu"), wide),
        **dict.fromkeys(("HardSwish", "HardSigmoid"), bends),
    }
    return {
        **{op: Case(op, (values,), opset=18) for op, values in domains.items()},
        "CastLike": Case("CastLike", (wide, scalar(1)), fixed=(1,), ingested=False),
        "Celu-alpha": Case("Celu", (wide,), {"alpha": 0.5}),
        "Dropout": Case("Dropout", (wide,), ingested=False),
        "Dropout-with-mask": Case("Dropout", (wide, scalar(0.5), np.array(False)), fixed=(1,), outputs=2),
        "Elu-alpha": Case("Elu", (wide,), {"alpha": 2.5}),
        "Gelu": Case("Gelu", (wide,), opset=20),
        "Gelu-tanh": Case("Gelu", (wide,), {"approximate": "tanh"}, opset=20),
        "HardSigmoid-mobilenet": Case("HardSigmoid", (bends,), {"alpha": 1 / 6, "beta": 0.5}),
        "Selu-constants": Case("Selu", (wide,), {"alpha": 1.25, "gamma": 0.75}),
        "Shrink": Case("Shrink", (around_clip(4, 5),), {"lambd": 1.0, "bias": 0.5}),
        "Shrink-default": Case("Shrink", (around_clip(4, 5) - np.float32(0.5),)),
        "ThresholdedRelu": Case("ThresholdedRelu", (around_clip(4, 5),)),
        "ThresholdedRelu-alpha": Case("ThresholdedRelu", (around_clip(4, 5),), {"alpha": -1.0}),
    }


def several() -> dict[str, Case]:
    """Operators on several values, with operands that broadcast."""
    x, row, column = signed(2, 3, 4), signed(4), signed(2, 1, 1)
    apart, condition = distinct(5, 3, 4), random("where").random((2, 1, 4)) < 0.5
    tie = np.array([[1, 2, 3], [3, 2, 1]], np.float32)
    return {
        **{f"{op}-three": Case(op, (x, row, column)) for op in ("Sum", "Mean")},
        **{f"{op}-one": Case(op, (x,)) for op in ("Sum", "Mean", "Max", "Min")},
        **{f"{op}-batch": Case(op, (signed(1, 3, 4), row), dynamic=True) for op in ("Sum", "Mean")},
        **{f"{op}-three": Case(op, (apart[:2], apart[2:3] - 1, apart[4, 0] + 1)) for op in ("Max", "Min")},
        **{f"{op}-scalar": Case(op, (tie, scalar(2.5))) for op in ("Max", "Min")},
        "Clip-trained-bounds": Case("Clip", (around_clip(4, 5), scalar(-1), scalar(1))),
        "Clip-trained-low": Case("Clip", (around_clip(4, 5), scalar(-1))),
        "Clip-trained-high": Case("Clip", (around_clip(4, 5), None, scalar(1))),
        "Mod": Case("Mod", (np.array([[2.7, -3.4], [4.6, -5.2]], np.float32), scalar(2)), {"fmod": 1}),
        "Mod-broadcast": Case("Mod", (scalar(5.3), np.array([2, -2, 3], np.float32)), {"fmod": 1}),
        "PRelu": Case("PRelu", (x, signed(2, 3, 4) / 2)),
        "PRelu-channels": Case("PRelu", (X, signed(4, 1, 1)), dynamic=True),
        "PRelu-scalar": Case("PRelu", (x, scalar(0.25))),
        "Pow-trained-exponent": Case("Pow", (above_one(2, 3, 4), signed(2, 3, 4))),
        "Pow-broadcast-both": Case("Pow", (above_one(2, 1, 1), signed(4))),
        "Pow-broadcast-base": Case("Pow", (above_one(4), signed(2, 3, 1)), fixed=(1,)),
        "Pow-scalar-base": Case("Pow", (scalar(1.5), signed(2, 3))),
        "Where-broadcast": Case("Where", (condition, signed(3, 1), signed(2, 3, 4))),
        "Where-scalar": Case("Where", (condition, scalar(0.5), signed(2, 1, 4))),
        "Where-broadcast-condition": Case("Where", (np.array(True), signed(3, 1), signed(1, 4)), fixed=(2,)),
        "Where-batch": Case("Where", (condition[:1], signed(1, 3, 4), row), dynamic=True),
    }


def normalizations() -> dict[str, Case]:
    x, image = signed(2, 3, 4), signed(2, 4, 3, 2)

    def layer(x: Array, axis: int, bias: bool = True, opset: int = 17) -> Case:
        shape = x.shape[axis:]
        operands = (x, above_one(*shape), *([signed(*shape)] if bias else []))
        return Case("LayerNormalization", operands, {"axis": axis, "epsilon": 1e-3}, opset=opset)

    def per_channel(op: str, x: Array, size: int, opset: int = 17, **attributes: Any) -> Case:
        return Case(op, (x, above_one(size), signed(size)), {"epsilon": 1e-3, **attributes}, opset=opset)

    statistics = (above_one(4), signed(4), signed(4) + 1, above_one(4))
    return {
        "LayerNormalization-last": layer(signed(3, 5), -1),
        "LayerNormalization-two": layer(x, 1),
        "LayerNormalization-two-negative": layer(x, -2),
        "LayerNormalization-no-bias": layer(x, -1, bias=False),
        "LayerNormalization-no-bias-two": layer(x, 1, bias=False, opset=18),
        "InstanceNormalization": per_channel("InstanceNormalization", image, 4),
        "InstanceNormalization-1d": per_channel("InstanceNormalization", signed(2, 3, 5), 3),
        "InstanceNormalization-opset-18": per_channel("InstanceNormalization", image, 4, opset=18),
        "GroupNormalization": per_channel("GroupNormalization", image, 4, opset=21, num_groups=2),
        "GroupNormalization-one": per_channel("GroupNormalization", signed(2, 3, 5), 3, opset=21, num_groups=1),
        "BatchNormalization": Case("BatchNormalization", (image, *statistics), {"epsilon": 1e-3}, ingested=False),
        "BatchNormalization-default": Case(
            "BatchNormalization", (signed(3, 4), *statistics), fixed=(3, 4), ingested=False
        ),
        "LpNormalization": Case("LpNormalization", (x,)),
        "LpNormalization-1": Case("LpNormalization", (x,), {"p": 1, "axis": 1}),
        "LpNormalization-inner": Case("LpNormalization", (x,), {"p": 2, "axis": -2}),
        "MeanVarianceNormalization": Case("MeanVarianceNormalization", (image,), ingested=False),
        "MeanVarianceNormalization-axes": Case("MeanVarianceNormalization", (image,), {"axes": [1, -1]}),
    }


def reductions() -> dict[str, Case]:
    return {
        "GlobalAveragePool": Case("GlobalAveragePool", (X,), dynamic=True),
        "ReduceMean-attribute": Case("ReduceMean", (X,), {"axes": [-1, 2], "keepdims": 0}),
        "ReduceMean-input": Case("ReduceMean", (X, ints(1)), {"keepdims": 1}, opset=18),
        "ReduceMean-all": Case("ReduceMean", (X,), {"keepdims": 1}),
        "ReduceSum": Case("ReduceSum", (X, ints(1, -1)), {"keepdims": 0}),
        "ReduceSum-noop": Case("ReduceSum", (X, ints()), {"noop_with_empty_axes": 1}),
        "ReduceSum-keep": Case("ReduceSum", (X, ints(2)), {"keepdims": 1}),
        "ReduceMean-noop": Case("ReduceMean", (X, ints()), {"noop_with_empty_axes": 1}, opset=18),
        "GlobalMaxPool": Case("GlobalMaxPool", (distinct(1, 2, 3, 4),), dynamic=True),
        "GlobalMaxPool-1d": Case("GlobalMaxPool", (distinct(2, 3, 4),)),
        "GlobalLpPool": Case("GlobalLpPool", (above_one(1, 2, 3, 2),), dynamic=True),
        "GlobalLpPool-3": Case("GlobalLpPool", (signed(1, 2, 3, 2),), {"p": 3}),
        "GlobalLpPool-1": Case("GlobalLpPool", (signed(1, 2, 3, 2),), {"p": 1}),
        **{f"{op}-{name}": case for op in REDUCED for name, case in reduced(op).items()},
        "ReduceProd-one-zero": Case("ReduceProd", (np.array([[2, 0, 3], [1, 2, 0.5]], np.float32),), {"axes": [1]}),
        "ReduceProd-two-zeros": Case("ReduceProd", (np.array([[2, 0, 0], [1, 2, 0.5]], np.float32),), {"axes": [1]}),
        "ReduceL2-large": Case("ReduceL2", (signed(2, 3, 4) + 2,), {"axes": [0]}),
    }


REDUCED = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMin", "ReduceProd"),
    "ReduceSumSquare",
)


def reduced(op: str) -> dict[str, Case]:
    """The forms of a reduction: axes as attribute and as input, kept or not, none and negative."""
    x = distinct(2, 3, 4) if op in ("ReduceMax", "ReduceMin") else above_one(2, 3, 4)
    return {
        "default": Case(op, (x,)),
        "axes": Case(op, (x,), {"axes": [1]}),
        "negative-axes": Case(op, (x,), {"axes": [-1, 0], "keepdims": 0}),
        "all": Case(op, (x,), {"keepdims": 0}),
        "input": Case(op, (x, ints(-2)), opset=18),
        "input-not-kept": Case(op, (x, ints(2, 0)), {"keepdims": 0}, opset=18),
        "input-empty": Case(op, (x, ints()), {"keepdims": 0}, opset=18),
        "noop": Case(op, (x, ints()), {"noop_with_empty_axes": 1}, opset=18),
        "batch": Case(op, (x[:1],), {"axes": [1, 2], "keepdims": 0}, dynamic=True),
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
    **smooth(),
    **several(),
    **normalizations(),
    **reductions(),
    **moves(),
    **max_pools(),
    **average_pools(),
}
