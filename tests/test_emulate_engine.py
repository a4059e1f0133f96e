"""The integer program of QDQ files: against ONNX Runtime where it runs integer kernels, else within one LSB."""

import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxqt import numerics, requantize
from onnxqt.emulate import Result, load_program
from onnxqt.emulate.kernels import add as add_kernels
from onnxqt.emulate.kernels import pooling, products
from onnxqt.errors import EmulatorError
from onnxqt.numerics import Array

X86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="QLinearAdd is fixed-point on other machines"
)
TYPES = {"u8": TensorProto.UINT8, "s8": TensorProto.INT8, "u4": TensorProto.UINT4, "s4": TensorProto.INT4}
RANGES = {"u8": (0, 255), "s8": (-128, 127), "u4": (0, 15), "s4": (-8, 7)}


class Net:
    """Writes a QDQ graph line by line."""

    def __init__(self, kind: str, pow2: bool, seed: int = 0, opset: int = 17) -> None:
        self.kind, self.pow2, self.opset = kind, pow2, opset
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []

    def name(self) -> str:
        return f"t{len(self.nodes)}_{len(self.constants)}"

    def constant(self, value: Any, kind: int | None = None) -> str:
        value, name = np.asarray(value), self.name()
        if kind is None:
            self.constants.append(numpy_helper.from_array(value, name))
        else:
            self.constants.append(helper.make_tensor(name, kind, value.shape, value.ravel().tolist()))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        out = self.name()
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"n_{out}", **attributes))
        return out

    def scale(self, size: int | None, low: float, high: float) -> Array:
        s = self.rng.uniform(low, high, size)
        return np.asarray(2.0 ** np.round(np.log2(s)) if self.pow2 else s, np.float32)

    def input(self, *shape: int | str, name: str = "x", kind: int = TensorProto.FLOAT) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def qdq(self, x: str, scale: Any = None, zero_point: int | None = None, dq: bool = True) -> str:
        low, high = RANGES[self.kind]
        middle = int(self.rng.integers(low // 2, high // 2 + 1)) | 1
        z = self.constant(middle if zero_point is None else zero_point, TYPES[self.kind])
        s = self.constant(self.scale(None, 0.02, 0.1) if scale is None else np.float32(scale))
        q = self.node("QuantizeLinear", x, s, z)
        return self.node("DequantizeLinear", q, s, z) if dq else q

    def scale_of(self, dq: str) -> Array:
        node = next(n for n in self.nodes if n.output[0] == dq)
        return numpy_helper.to_array(next(c for c in self.constants if c.name == node.input[1]))

    def weights(
        self, shape: Sequence[int], axis: int | None, kind: str = "s8", fill: int | None = None, zero_point: int = 0
    ) -> str:
        low, high = RANGES[kind]
        codes = self.rng.integers(low + 1, high + 1, shape) if fill is None else np.full(shape, fill)
        size = None if axis is None else shape[axis]
        s = self.constant(self.scale(size, 0.002, 0.01))
        z = self.constant(np.full(size or (), zero_point), TYPES[kind])
        q = self.constant(codes, TYPES[kind])
        return self.node("DequantizeLinear", q, s, z, **({} if axis is None else {"axis": axis}))

    def bias(self, x: str, w: str, channels: int) -> str:
        s = np.asarray(self.scale_of(x) * self.scale_of(w), np.float32)
        codes = self.rng.integers(-3000, 3000, channels).astype(np.int32)
        attributes = {"axis": 0} if s.ndim else {}
        return self.node("DequantizeLinear", self.constant(codes), self.constant(s), **attributes)

    def output(self, *names: str, kind: int = TensorProto.FLOAT) -> ModelProto:
        self.outputs = [helper.make_tensor_value_info(name, kind, None) for name in names]
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model)
        del model.graph.output[:]
        model.graph.output.extend(inferred.graph.output)
        return model


def onnx_runtime(model: ModelProto, inputs: Mapping[str, Array], optimize: bool = True) -> tuple[list[Array], set[str]]:
    """Outputs, and the operators that really ran; not optimized, every node in float as the file says."""
    with tempfile.TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.add_session_config_entry("session.x64quantprecision", "1")
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        ran = {node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}
    return session.run(None, dict(inputs)), ran


def worst_lsb(model: ModelProto, inputs: Mapping[str, Array], optimize: bool = True) -> int:
    """Largest difference between the emulator, either way, and ONNX Runtime over all outputs, in LSB."""
    worst, expected = 0, onnx_runtime(model, inputs, optimize)[0]
    for reference in (False, True):
        result = load_program(model, reference=reference).run_codes(inputs)
        for value, real in zip(model.graph.output, expected, strict=True):
            codes = result.codes[value.name]
            theirs = np.rint(real / codes.params.scale).astype(np.int64) + codes.params.zero_point
            assert codes.codes.shape == theirs.shape
            worst = max(worst, int(np.abs(codes.codes - theirs).max()))
    return worst


def feed(model: ModelProto, batch: int = 6, seed: int = 1) -> dict[str, Array]:
    """Normal values, some far outside every range, some on ties."""
    rng = np.random.default_rng(seed)
    values = {}
    for value in model.graph.input:
        shape = [d.dim_value or batch for d in value.type.tensor_type.shape.dim]
        x = rng.normal(0, 3, shape)
        x.flat[::7] = np.rint(x.flat[::7] * 16) / 16
        x.flat[::11] *= 100
        values[value.name] = x.astype(np.float32)
    return values


KINDS = pytest.mark.parametrize("kind", ["u8", "s8"])
POW2 = pytest.mark.parametrize("pow2", [False, True], ids=["random", "pow2"])


# One operator at a time, where ONNX Runtime has an integer kernel


def conv(net: Net, **attributes: Any) -> str:
    x = net.qdq(net.input("N", 4, 9, 10))
    w = net.weights((6, 4 // attributes.get("group", 1), 3, 2), attributes.pop("axis", 0))
    return net.qdq(net.node("Conv", x, w, net.bias(x, w, 6), **attributes), net.scale(None, 0.05, 0.2))


def gemm(net: Net, trans: int) -> str:
    x = net.qdq(net.input("N", 30))
    w = net.weights((7, 30) if trans else (30, 7), 0 if trans else 1)
    y = net.node("Gemm", x, w, net.bias(x, w, 7), transB=trans)
    return net.qdq(y, net.scale(None, 0.05, 0.2))


def matmul(net: Net, axis: int | None) -> str:
    x = net.qdq(net.input("N", 5, 30))
    return net.qdq(net.node("MatMul", x, net.weights((30, 7), axis)), net.scale(None, 0.05, 0.2))


def two_matmul(net: Net) -> str:
    a, b = net.qdq(net.input("N", 3, 5, 30)), net.qdq(net.input("N", 3, 30, 4, name="y"))
    return net.qdq(net.node("MatMul", a, b), net.scale(None, 0.5, 2))


def add(net: Net) -> str:
    return net.qdq(net.node("Add", net.qdq(net.input("N", 3, 7)), net.qdq(net.input("N", 3, 7, name="y"))))


def concat(net: Net) -> str:
    a, b = net.qdq(net.input("N", 3, 4)), net.qdq(net.input("N", 2, 4, name="y"))
    return net.qdq(net.node("Concat", a, b, axis=-2))


def pool(net: Net, op: str, **attributes: Any) -> str:
    return net.qdq(net.node(op, net.qdq(net.input("N", 5, 9, 10)), **attributes))


INTEGER_IN_ORT: dict[str, tuple[str, Callable[[Net], str]]] = {
    "conv": ("QLinearConv", lambda net: conv(net, pads=[1, 0, 2, 1])),
    "conv per tensor": ("QLinearConv", lambda net: conv(net, axis=None, strides=[2, 1])),
    "conv groups": ("QLinearConv", lambda net: conv(net, group=2, strides=[2, 2], dilations=[2, 1])),
    "conv same": ("QLinearConv", lambda net: conv(net, auto_pad="SAME_UPPER", strides=[2, 2])),
    "gemm": ("QGemm", lambda net: gemm(net, 0)),
    "gemm transposed": ("QGemm", lambda net: gemm(net, 1)),
    "matmul": ("QLinearMatMul", lambda net: matmul(net, 1)),
    "matmul per tensor": ("QLinearMatMul", lambda net: matmul(net, None)),
    "matmul of activations": ("QLinearMatMul", two_matmul),
    "add": ("QLinearAdd", add),
    "concat": ("QLinearConcat", concat),
    "average": (
        "QLinearAveragePool",
        lambda net: pool(net, "AveragePool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    ),
    "average of padding": (
        "QLinearAveragePool",
        lambda net: pool(net, "AveragePool", kernel_shape=[2, 2], pads=[1, 1, 1, 1], count_include_pad=1),
    ),
    "global average": ("QLinearGlobalAveragePool", lambda net: pool(net, "GlobalAveragePool")),
}


@X86
@KINDS
@POW2
@pytest.mark.parametrize("name", INTEGER_IN_ORT)
def test_integer_kernels_are_bit_equal(name: str, kind: str, pow2: bool) -> None:
    operator, build = INTEGER_IN_ORT[name]
    for seed in range(3):
        net = Net(kind, pow2, seed)
        model = net.output(build(net))
        inputs = feed(model)
        assert operator in onnx_runtime(model, inputs)[1]
        program = load_program(model)
        assert program.float_nodes == ()
        assert worst_lsb(model, inputs) == 0
        codes = program.run_codes(inputs).codes[model.graph.output[0].name].codes
        assert len(np.unique(codes)) > 10  # not merely saturated


FLOAT_IN_ORT: dict[str, Callable[[Net], str]] = {
    "relu": lambda net: pool(net, "Relu"),
    "clip": lambda net: net.qdq(
        net.node("Clip", net.qdq(net.input("N", 9)), net.constant(np.float32(-0.3)), net.constant(np.float32(1)))
    ),
    "max pool": lambda net: pool(net, "MaxPool", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 1, 1]),
    "mean of the last axis": lambda net: pool(net, "ReduceMean", axes=[-1], keepdims=0),
    "mean of everything": lambda net: pool(net, "ReduceMean"),
    "conv transpose": lambda net: net.qdq(
        net.node(
            "ConvTranspose",
            net.qdq(net.input("N", 4, 5, 6)),
            net.weights((4, 3, 3, 2), 1),
            strides=[2, 2],
            group=2,
            pads=[1, 0, 1, 0],
        ),
        0.3,
    ),
    "1-D conv": lambda net: net.qdq(
        net.node("Conv", net.qdq(net.input("N", 4, 9)), net.weights((4, 1, 3), 0), group=4, pads=[2, 1]), 0.1
    ),
    "reshape": lambda net: net.qdq(
        net.node("Reshape", net.qdq(net.input("N", 4, 6)), net.constant(np.array([0, 3, -1])))
    ),
    "transpose": lambda net: pool(net, "Transpose", perm=[0, 2, 3, 1]),
    "flatten": lambda net: pool(net, "Flatten", axis=-2),
    "squeeze": lambda net: net.qdq(
        net.node("Squeeze", net.qdq(net.input("N", 1, 6, 1)), net.constant(np.array([1, -1])))
    ),
    "unsqueeze": lambda net: net.qdq(
        net.node("Unsqueeze", net.qdq(net.input("N", 6)), net.constant(np.array([-1, 1])))
    ),
    "slice": lambda net: net.qdq(
        net.node("Slice", net.qdq(net.input("N", 6)), *[net.constant(np.array([i])) for i in (4, 0, 1, -2)])
    ),
    "slice of the first axes": lambda net: net.qdq(
        net.node("Slice", net.qdq(net.input("N", 6)), *[net.constant(np.array(i)) for i in ([0, 1], [9, -1])])
    ),
    "pad": lambda net: net.qdq(
        net.node("Pad", net.qdq(net.input("N", 2, 3)), net.constant(np.array([0, 1, 0, 0, 2, 1])))
    ),
    "identity": lambda net: pool(net, "Identity"),
    "two grids": lambda net: net.qdq(net.qdq(net.input("N", 50))),
}


@KINDS
@POW2
@pytest.mark.parametrize("name", FLOAT_IN_ORT)
def test_other_integer_operators_are_within_one_lsb(name: str, kind: str, pow2: bool) -> None:
    net = Net(kind, pow2, 5)
    model = net.output(FLOAT_IN_ORT[name](net))
    program = load_program(model)
    assert program.float_nodes == ()
    assert worst_lsb(model, feed(model), optimize=False) <= (1 if "conv" in name or "mean" in name else 0)


# Fused activations and bias


@X86
@KINDS
@pytest.mark.parametrize("activation", ["Relu", "Clip", "none"])
@pytest.mark.parametrize("zero_point", ["lowest", "odd"])
def test_a_fused_activation_is_a_clamp_of_codes(kind: str, activation: str, zero_point: str) -> None:
    for pow2 in (False, True):
        net = Net(kind, pow2)
        x = net.qdq(net.input("N", 3, 8, 8))
        y = net.node("Conv", x, net.weights((5, 3, 3, 3), 0))
        if activation == "Clip":
            y = net.node("Clip", y, net.constant(np.float32(0)), net.constant(np.float32(6)))
        elif activation == "Relu":
            y = net.node("Relu", y)
        z = RANGES[kind][0] if zero_point == "lowest" else 7
        model = net.output(net.qdq(y, 0.0625, z))
        program = load_program(model)
        assert [info.op_type for info in program.integer_nodes] == ["Conv"]
        exact = "QLinearConv" in onnx_runtime(model, feed(model))[1]
        assert exact or activation != "none"
        assert worst_lsb(model, feed(model), exact) <= (0 if exact else 1)
        codes = program.run_codes(feed(model)).codes[model.graph.output[0].name].codes
        low = z if activation != "none" else RANGES[kind][0]
        high = min(z + 96, RANGES[kind][1]) if activation == "Clip" else RANGES[kind][1]
        assert (codes.min(), codes.max()) == (low, high)


def biased(bias: Callable[[Net, str, str], str], op: str = "Conv") -> ModelProto:
    net = Net("u8", False)
    x = net.qdq(net.input("N", 3, 4, 4) if op == "Conv" else net.input("N", 3))
    w = net.weights((5, 3, 1, 1), 0) if op == "Conv" else net.weights((3, 5), 1)
    if op == "MatMul":
        y = net.node("Relu", net.node("Add", bias(net, x, w), net.node("MatMul", x, w)))
    else:
        y = net.node(op, x, w, bias(net, x, w))
    return net.output(net.qdq(y, 0.1))


def float_bias(net: Net, x: str, w: str) -> str:
    return net.constant(np.array([0.3, -1, 2.5, 0, -0.7], np.float32))


def bias_on_another_grid(net: Net, x: str, w: str) -> str:
    codes, s = net.constant(np.array([3, -10, 25, 0, -7], np.int32)), net.constant(np.float32(0.1))
    return net.node("DequantizeLinear", codes, s)


@pytest.mark.parametrize("op", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("bias", [float_bias, bias_on_another_grid])
def test_a_bias_on_no_grid_is_rounded_to_the_accumulator_and_noted(
    bias: Callable[[Net, str, str], str], op: str
) -> None:
    model = biased(bias, op)
    if bias is float_bias:  # ONNX Runtime takes integer biases as they are, whatever their scale
        assert worst_lsb(model, feed(model)) <= 1
    (info,) = load_program(model).integer_nodes
    assert info.op_type == op
    assert "rounded to int32" in info.note


@X86
def test_a_bias_at_the_scale_of_the_accumulator_is_taken_as_it_is() -> None:
    for op in ("Conv", "Gemm", "MatMul"):
        model = biased(lambda net, x, w: net.bias(x, w, 5), op)
        assert load_program(model).integer_nodes[0].note == ""
        assert worst_lsb(model, feed(model)) <= (1 if op == "MatMul" else 0)


# Accumulators


def plain_conv(net: Net, x: str, channels: int, fill: int | None) -> str:
    w = net.weights((9, channels, 3, 3), 0, fill=fill)
    return net.node("Conv", x, w, net.bias(x, w, 9), pads=[1, 1, 1, 1])


def conv_of_unsigned_weights(net: Net, x: str, channels: int, fill: int | None) -> str:
    """Less their zero point, these weights go from -100 to 154."""
    w = net.weights((9, channels, 3, 3), 0, "u8", fill and fill + 101, 101)
    return net.node("Conv", x, w, net.bias(x, w, 9), pads=[1, 1, 1, 1])


def plain_conv_transpose(net: Net, x: str, channels: int, fill: int | None) -> str:
    w = net.weights((channels, 9, 3, 3), 1, fill=fill)
    return net.node("ConvTranspose", x, w, net.bias(x, w, 9), strides=[2, 1])


@pytest.mark.parametrize(
    ("channels", "build", "fill", "implementation"),
    [
        (64, plain_conv_transpose, None, "float32"),
        (128, plain_conv_transpose, 127, "float32 by nibbles"),
        (1024, plain_conv_transpose, 127, "float64"),
        (64, conv_of_unsigned_weights, None, "float32"),
        (128, conv_of_unsigned_weights, 139, "float32 by nibbles"),
        (1024, conv_of_unsigned_weights, 139, "float64"),
        (64, plain_conv, None, "ONNX Runtime QLinearConv"),
        (128, plain_conv, 127, "ONNX Runtime QLinearConv"),
        (1024, plain_conv, 127, "ONNX Runtime QLinearConv"),
    ],
)
def test_fast_accumulators_equal_the_definition(
    channels: int, build: Callable[[Net, str, int, int | None], str], fill: int | None, implementation: str
) -> None:
    net = Net("u8", False)
    x = net.qdq(net.input("N", channels, 7, 6), 0.05, 0)
    model = net.output(net.qdq(build(net, x, channels, fill), channels / 3 if fill else 2.0))
    program, reference = load_program(model), load_program(model, reference=True)
    (info,), (slow,) = program.integer_nodes, reference.integer_nodes
    assert (info.implementation, slow.implementation) == (implementation, "float64")
    assert info.bound is not None
    assert info.bound <= products.INT32_MAX
    got, expected = program.run(feed(model, 2)), reference.run(feed(model, 2))
    for name, value in expected.items():
        assert len(np.unique(value)) > 3
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.parametrize("reference", [False, True])
def test_overflow_wraps_as_in_onnx_runtime_and_is_counted(reference: bool) -> None:
    net = Net("u8", False)
    length = 70_000  # 70,000 x 255 x 127 > 2**31
    w = net.weights((length, 2), 1, fill=127)
    model = net.output(net.qdq(net.node("Gemm", net.qdq(net.input("N", length), 1.0, 0), w), 1e5, 128))
    inputs = {"x": np.full((2, length), 255, np.float32)}
    inputs["x"][1] = 3
    program = load_program(model, reference=reference)
    (info,) = program.integer_nodes
    assert info.bound == length * 255 * 127
    assert program.run_codes(inputs).overflows == {info.name: 2}
    assert "QGemm" in onnx_runtime(model, inputs)[1]
    assert worst_lsb(model, inputs) == 0
    assert program.run_codes({"x": inputs["x"] * 0}).overflows == {info.name: 0}


def test_overflow_of_two_activations_is_counted() -> None:
    net = Net("u8", False)
    a, b = net.qdq(net.input(1, 70_000), 1.0, 0), net.qdq(net.input(70_000, 1, name="y"), 1.0, 0)
    model = net.output(net.qdq(net.node("MatMul", a, b), 2e7, 0))
    ones = {"x": np.full((1, 70_000), 255, np.float32), "y": np.full((70_000, 1), 255, np.float32)}
    program = load_program(model)
    assert list(program.run_codes(ones).overflows.values()) == [1]
    assert list(program.run_codes(ones | {"y": ones["y"] / 255}).overflows.values()) == [0]


# Small networks


def network(kind: str, pow2: bool, weights: str = "s8") -> ModelProto:
    """Convolution, depthwise, residual, pools and classifier."""
    net = Net(kind, pow2, 3, opset=21)
    zero = RANGES[kind][0] if kind[0] == "u" else 0
    step = 16 if kind[1] == "4" else 1

    def block(x: str, shape: tuple[int, ...], scale: float, relu: bool, **attributes: Any) -> str:
        w = net.weights(shape, 0, weights)
        y = net.node("Conv", x, w, net.bias(x, w, shape[0]), **attributes)
        return net.qdq(net.node("Relu", y) if relu else y, scale * step, zero if relu else None)

    x = net.qdq(net.input("N", 3, 12, 11), 0.07 * step)
    x = block(x, (8, 3, 3, 3), 0.06, True, pads=[1, 1, 1, 1])
    y = block(x, (8, 1, 3, 3), 0.05, True, pads=[0, 1, 1, 1], group=8, strides=[2, 2])
    y = block(y, (8, 8, 1, 1), 0.05, False)
    x = net.qdq(net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2], ceil_mode=1), 0.06 * step, zero)
    x = net.qdq(net.node("Relu", net.node("Add", y, x)), 0.07 * step, zero)
    x = net.qdq(net.node("GlobalAveragePool", x), 0.03 * step, zero)
    w = net.weights((10, 8), 0, weights)
    bias = net.bias(x, w, 10)
    x = net.qdq(net.node("Flatten", x), net.scale_of(x), zero)
    return net.output(net.qdq(net.node("Gemm", x, w, bias, transB=1), 0.01 * step))


@X86
@POW2
def test_an_unsigned_network_is_bit_equal(pow2: bool) -> None:
    model = network("u8", pow2)
    program = load_program(model)
    inputs = feed(model, batch=3)
    ran = onnx_runtime(model, inputs)[1]
    assert {"QLinearConv", "QLinearAdd", "QLinearGlobalAveragePool", "QGemm"} <= ran
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Relu"} & ran
    assert program.float_nodes == ()
    assert worst_lsb(model, inputs) == 0


@pytest.mark.parametrize(("kind", "weights"), [("s8", "s8"), ("u8", "s4"), ("s8", "s4"), ("u4", "s4"), ("s4", "s4")])
def test_networks_that_onnx_runtime_runs_in_float_are_within_one_lsb(kind: str, weights: str) -> None:
    model = network(kind, False, weights)
    program = load_program(model)
    assert program.float_nodes == ()
    inputs = feed(model, batch=3)
    assert worst_lsb(model, inputs, optimize=False) <= 1
    expected = load_program(model, reference=True).run(inputs)
    for name, value in program.run(inputs).items():
        np.testing.assert_array_equal(value, expected[name])


def test_only_codes_flow_between_integer_nodes() -> None:
    model = network("u8", False)
    program = load_program(model)
    values: dict[str, Array] = {**program.constants, **feed(model)}
    for step in program.steps:
        outputs = step.run(*[values[name] for name in step.inputs])
        values.update(zip(step.outputs, outputs, strict=True))
        assert all(value.dtype.kind in "iu" for value in outputs)
        assert outputs[0].dtype == np.uint8  # the type in which the file stores them


# Programs


def test_codes_of_any_quantized_tensor_can_be_asked_for() -> None:
    model = network("u8", False)
    program = load_program(model)
    name = next(n for n in program.tensors if n != model.graph.output[0].name)
    result: Result = program.run_codes(feed(model), tensors=[name])
    assert set(result.codes) == {name, model.graph.output[0].name}
    assert result.codes[name].codes.dtype == np.int32
    out = result.codes[model.graph.output[0].name]
    np.testing.assert_array_equal(
        result.outputs[model.graph.output[0].name], numerics.dequantize(out.codes, out.params)
    )


def test_forced_codes_show_where_an_error_arises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("u8", False)
    program = load_program(model, reference=True)
    right = program.run_codes(feed(model), tuple(program.tensors))
    forced = {name: entry.codes for name, entry in right.codes.items()}
    one_off = {**add_kernels.RULES, "ort": lambda *args: add_kernels.add(*args) + 1}
    monkeypatch.setattr(add_kernels, "RULES", one_off)
    wrong = load_program(model, reference=True).run_codes(feed(model), tuple(program.tensors), forced)
    differing = [name for name, entry in wrong.codes.items() if (entry.codes != right.codes[name].codes).any()]
    (node,) = (n for n in program.steps if n.info.op_type == "Add")
    assert [program.tensors[name].codes for name in differing] == [node.outputs[0]]


def test_float_nodes_are_listed_with_their_reason_and_run() -> None:
    net = Net("u8", False)
    x = net.qdq(net.input("N", 3, 6, 6))
    y = net.qdq(net.node("LogSoftmax", net.qdq(net.node("Conv", x, net.weights((4, 3, 1, 1), 0))), axis=1), 0.02)
    model = net.output(y, net.node("Softmax", y, axis=1))
    program = load_program(model)
    assert [(op, why) for _, op, why in program.float_nodes] == [
        ("LogSoftmax", "no integer kernel for LogSoftmax"),
        ("Softmax", "the back end computes Softmax in float"),
    ]
    expected = onnx_runtime(model, feed(model))[0]
    got = program.run_codes(feed(model))
    assert set(got.codes) == {y}
    lsb = np.abs(expected[0] - got.outputs[y]) / got.codes[y].params.scale
    assert lsb.max() <= 1.01  # one LSB, and float32 noise of the division
    soft = got.outputs[model.graph.output[1].name]
    real = np.exp(got.outputs[y])
    # a sum of 4 and a quotient in float32: a few units of 2**-24
    np.testing.assert_allclose(soft, real / real.sum(1, keepdims=True), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda net: net.node("Conv", net.qdq(net.input("N", 3, 4, 4)), net.weights((2, 3, 1, 1), 0)), "output"),
        (lambda net: net.qdq(net.node("Conv", net.input("N", 3, 4), net.weights((2, 3, 1), 0))), "input 'x'"),
        (lambda net: net.qdq(net.node("Conv", net.qdq(net.input("N", 3, 4)), float_weights(net))), "weights"),
        (lambda net: net.qdq(net.node("MatMul", net.qdq(net.input("N", 3)), net.weights((3, 4), 0))), "along axis 0"),
        (
            lambda net: net.qdq(net.node("MatMul", net.qdq(net.input("N", 3)), net.weights((3,), None))),
            "are a vector",
        ),
        (lambda net: net.qdq(net.node("Gemm", net.qdq(net.input("N", 3)), net.weights((3, 4), 1), alpha=2.0)), "alpha"),
        (
            lambda net: net.qdq(net.node("Pad", net.qdq(net.input(2, 3)), net.constant(np.array([0, -1, 0, 0])))),
            "crops",
        ),
        (lambda net: net.qdq(net.node("Gemm", net.qdq(net.input(4, 3)), net.weights((3, 5), 1), column(net))), "shape"),
        (
            lambda net: net.qdq(
                net.node("Gemm", net.qdq(net.input(4, 3)), net.weights((3, 5), 1), net.input(5, name="b"))
            ),
            "bias",
        ),
        (lambda net: net.qdq(net.node("Clip", net.qdq(net.input(4, 3)), net.input(name="b"))), "not constant"),
        (lambda net: net.qdq(net.node("Add", net.qdq(net.input(4, 3)), net.constant(np.ones(3, np.float32)))), "input"),
        (
            lambda net: net.qdq(
                net.node("ConvTranspose", net.qdq(net.input(1, 2, 5)), net.weights((2, 2, 2), 1), auto_pad="SAME_UPPER")
            ),
            "auto_pad",
        ),
    ],
)
def test_a_node_without_integer_form_runs_in_float_and_says_why(build: Callable[[Net], str], reason: str) -> None:
    net = Net("u8", False, opset=18)
    model = net.output(build(net))
    program = load_program(model)
    ((_, _, why),) = program.float_nodes
    assert reason in why
    expected, _ = onnx_runtime(model, feed(model), optimize=False)
    # what is quantized may differ by one LSB (at most 0.1), what is not by float32 noise
    np.testing.assert_allclose(program.run(feed(model))[model.graph.output[0].name], expected[0], rtol=1e-6, atol=0.1)


def float_weights(net: Net) -> str:
    return net.constant(np.ones((2, 3, 1), np.float32))


def column(net: Net) -> str:
    return net.constant(np.ones((4, 1), np.float32))


def test_shapes_are_computed_without_float_nodes() -> None:
    net = Net("u8", False)
    x = net.qdq(net.input("N", 4, 6))
    batch = net.node("Gather", net.node("Shape", x), net.constant(np.array([0])))
    shape = net.node("Concat", batch, net.constant(np.array([-1])), axis=0)
    model = net.output(net.qdq(net.node("Reshape", x, shape)))
    program = load_program(model)
    assert program.float_nodes == ()
    assert [info.kind for info in program.nodes] == ["boundary", "shape", "shape", "shape", "integer", "boundary"]
    assert worst_lsb(model, feed(model, batch=3)) == 0


def test_weights_quantized_in_the_graph_are_folded() -> None:
    net = Net("s8", False)
    floats = net.node("Constant", value=numpy_helper.from_array(net.rng.normal(size=(5, 4)).astype(np.float32)))
    w = net.qdq(net.node("Transpose", floats), 0.02, 0)
    model = net.output(net.qdq(net.node("MatMul", net.qdq(net.input("N", 3, 4)), w), 0.3))
    program = load_program(model)
    assert [info.op_type for info in program.integer_nodes] == ["MatMul"]
    assert worst_lsb(model, feed(model)) == 0


def test_blocked_weights_run_in_float() -> None:
    net = Net("u8", False, opset=21)
    codes = net.constant(net.rng.integers(-8, 8, (32, 6)), TensorProto.INT4)
    w = net.node("DequantizeLinear", codes, net.constant(net.scale(12, 0.01, 0.1).reshape(2, 6)), axis=0, block_size=16)
    model = net.output(net.node("MatMul", net.qdq(net.input("N", 32)), w))
    program = load_program(model)
    assert "not constants quantized per tensor or channel" in program.float_nodes[0][2]
    expected, _ = onnx_runtime(model, feed(model))
    # sums of 32 products in another order
    np.testing.assert_allclose(program.run(feed(model))[model.graph.output[0].name], expected[0], rtol=1e-4, atol=1e-4)


@KINDS
def test_codes_may_enter_and_leave(kind: str) -> None:
    net = Net(kind, False)
    x = net.input("N", 3, 4, kind=TYPES[kind])
    s, z = net.constant(np.float32(0.05)), net.constant(3, TYPES[kind])
    y = net.node("Relu", net.node("DequantizeLinear", x, s, z))
    moved = net.node("Transpose", net.qdq(y, dq=False))  # a float node reads codes
    model = net.output(moved, kind=TYPES[kind])
    inputs = {"x": np.arange(-12, 12).reshape(2, 3, 4).astype(np.int8 if kind == "s8" else np.uint8)}
    (expected,), _ = onnx_runtime(model, inputs)
    (got,) = load_program(model).run(inputs).values()
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    again = Net(kind, False)
    model = again.output(again.qdq(again.input("N", 3), dq=False), kind=TYPES[kind])
    (expected,), _ = onnx_runtime(model, feed(model))
    (got,) = load_program(model).run(feed(model)).values()
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)


def test_a_constant_output_and_a_quantized_constant_operand() -> None:
    net = Net("u8", False)
    position = net.qdq(net.constant(net.rng.normal(size=(3, 4)).astype(np.float32)))
    y = net.qdq(net.node("Add", net.qdq(net.input("N", 3, 4)), position))
    model = net.output(y, position)
    program = load_program(model)
    assert program.float_nodes == ()
    expected, _ = onnx_runtime(model, feed(model))
    for value, got in zip(expected, program.run(feed(model)).values(), strict=True):
        np.testing.assert_array_equal(got, value)


def test_a_file_is_read_like_a_model(tmp_path: Path) -> None:
    model = network("u8", False)
    onnx.save(model, tmp_path / "net.onnx")
    for name, value in load_program(tmp_path / "net.onnx").run(feed(model)).items():
        np.testing.assert_array_equal(value, load_program(model).run(feed(model))[name])


@X86
@pytest.mark.parametrize("kernel", ["add", "mean", "max_pool"])
def test_a_kernel_off_by_one_lsb_is_noticed(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the definition; `test_emulate_fast` does the same for every kernel, either way."""
    model = network("u8", False)

    def one_off(right: Callable[..., Array]) -> Callable[..., Array]:
        return lambda *args: right(*args) + 1

    if kernel == "add":
        monkeypatch.setattr(add_kernels, "RULES", {"ort": one_off(add_kernels.add)})
    elif kernel == "mean":
        monkeypatch.setattr(pooling, "MEAN_RULES", {"ort": one_off(pooling.mean)})
    else:
        monkeypatch.setattr(pooling, kernel, one_off(pooling.max_pool))
    assert worst_lsb(model, feed(model)) > 0


@X86
@pytest.mark.parametrize("rule", ["half away", "floor", "plus one"])
def test_another_requantization_is_noticed(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Net("u8", True, 2)
    model = net.output(conv(net))
    assert worst_lsb(model, feed(model)) == 0
    wrong: dict[str, Callable[[Array], Array]] = {
        "half away": lambda x: np.asarray(np.trunc(x + np.copysign(0.5, x))),
        "floor": np.floor,
        "plus one": lambda x: np.rint(x) + 1,
    }
    monkeypatch.setattr(requantize, "round_half_even", wrong[rule])
    assert worst_lsb(model, feed(model)) == 1


# Errors


def broken(change: Callable[[ModelProto], object]) -> ModelProto:
    net = Net("u8", False)
    model = net.output(net.qdq(net.node("Relu", net.qdq(net.input("N", 3, 4), 0.1, 3)), 0.1, 3))
    change(model)
    return model


def set_opset(model: ModelProto) -> None:
    model.opset_import[0].version = 12


def replace_constant(index: int, value: Array) -> Callable[[ModelProto], object]:
    def change(model: ModelProto) -> None:
        name = model.graph.initializer[index].name
        model.graph.initializer[index].CopyFrom(numpy_helper.from_array(value, name))

    return change


def test_quantizers_with_a_scale_computed_at_run_time_are_float() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 4] x, float s) => (float[N, 3] y, uint8[N, 4] codes)
            <uint8 z = {7}, float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
            codes = QuantizeLinear(x, s, z)
            real = DequantizeLinear(codes, s, z)
            h = MatMul(real, w)
            hc = QuantizeLinear(h, s, z)
            y = DequantizeLinear(hc, s, z)
        }
    """)
    program = load_program(model)
    assert [op_type for _, op_type, _ in program.float_nodes] == [node.op_type for node in model.graph.node]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {"x": np.array([[1, 2, 3, 4], [0, -1, 0.5, 2]], np.float32), "s": np.array(0.25, np.float32)}
    outputs = program.run(feeds)
    for name, expected in zip(("y", "codes"), session.run(["y", "codes"], feeds), strict=True):
        np.testing.assert_array_equal(outputs[name], expected)


def test_an_if_that_reads_a_quantized_tensor_is_a_float_island() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        net (float[N, 4] x) => (float[N, 4] y) <float s = {0.1}, uint8 z = {7}, float zero = {0}> {
            codes = QuantizeLinear(x, s, z)
            real = DequantizeLinear(codes, s, z)
            sum = ReduceSum <keepdims = 0> (real)
            positive = Greater(sum, zero)
            y = If (positive) <
                then_branch = above () => (float[N, 4] a) { a = Neg(real) },
                else_branch = below () => (float[N, 4] b) { b = Abs(real) }
            >
        }
    """)
    program = load_program(model)
    assert [op_type for _, op_type, _ in program.float_nodes] == ["ReduceSum", "Greater", "If"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for sign in (1, -1):
        x = np.array([[1, 2, 3, 4], [0, -1, 0.5, 2]], np.float32) * np.float32(sign)
        np.testing.assert_array_equal(program.run({"x": x})["y"], session.run(None, {"x": x})[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_opset, "the model has opset 12: expected 13 to 21; convert it with onnx.version_converter"),
        (lambda m: m.graph.node[0].ClearField("input"), "cannot read the model as ONNX"),
        (replace_constant(1, np.array([0.1, 0.2, 0.3], np.float32)), "quantizes an activation per channel or block"),
        (replace_constant(1, np.array(-0.1, np.float32)), "scale must be finite and > 0"),
        (replace_constant(1, np.array(0.1, np.float16)), "type UINT8 and a float16 scale: expected 4, 8 or 16-bit"),
    ],
)
def test_files_without_integer_meaning_are_refused(change: Callable[[ModelProto], object], message: str) -> None:
    with pytest.raises(EmulatorError, match=message) as caught:
        load_program(broken(change))
    assert "\n" not in str(caught.value)


def test_what_is_not_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    for name in ("text.onnx", "absent.onnx"):
        with pytest.raises(EmulatorError, match=f"cannot read '.*{name}' as ONNX"):
            load_program(tmp_path / name)


def test_inputs_that_do_not_fit_are_refused() -> None:
    program = load_program(broken(lambda model: None))
    x = np.zeros((2, 3, 4), np.float32)
    with pytest.raises(EmulatorError, match=r"inputs \['y'\] do not fit the graph: expected \['x'\]"):
        program.run({"y": x})
    for wrong in (x[0], x[:, :2]):
        with pytest.raises(EmulatorError, match=r"input 'x' has shape .*: expected \[\?, 3, 4\]"):
            program.run({"x": wrong})
    with pytest.raises(EmulatorError, match="tensor 'nothing' is not quantized in this file"):
        program.run_codes({"x": x}, tensors=["nothing"])


def test_a_failing_node_is_named() -> None:
    net = Net("u8", False)
    y = net.node("Reshape", net.qdq(net.input("N", 3)), net.constant(np.array([4, -1])))
    model = helper.make_model(
        helper.make_graph(net.nodes, "g", net.inputs, [onnx.ValueInfoProto(name=y)], net.constants),
        opset_imports=[helper.make_opsetid("", 17)],
    )
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(y, TensorProto.FLOAT, [4, "M"]))
    with pytest.raises(EmulatorError, match=rf"node 'n_{y}' \(Reshape\) failed: cannot reshape"):
        load_program(model).run(feed(model))
