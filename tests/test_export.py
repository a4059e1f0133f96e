"""Quantized files: close to the float model with ONNX Runtime's optimizations on and off, and built as promised."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from helpers import Prepared, batch_norm, build, inputs_of, normal, operators, prepare, run, snr_db
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnxqt.emulate import load_program
from onnxqt.numerics import Array

# 8 bits over a range of 2 x 4 sigma leave 20 log10(sigma / (8 sigma / 255 / sqrt(12))) = 41 dB per tensor. Up to six
# such noises add up (8 dB), and a Relu or a sum that cancels takes some of the signal.
LEAST_SNR = 30.0
INT8_SCHEMES = [f"w8a8-{symmetry}-{form}" for symmetry, form in itertools.product(("sym", "asym"), ("pt", "pc"))]


@dataclass(frozen=True)
class Net:
    """A graph that some quantizer of others gets wrong."""

    text: str
    constants: Mapping[str, Array] = field(default_factory=dict)


IMAGE = "(float[n,4,8,8] x) => (float[] y)"
ROWS = "(float[n,8] x) => (float[] y)"
W = {"w": normal(6, 4, 3, 3), "b": normal(6, seed=1), "v": normal(4, 6, 3, 3, seed=2), "u": normal(5, 4, 1, 1, seed=3)}
UNEQUAL = np.array([1, 0.1, 3], np.float32).reshape(3, 1, 1)  # channels
SKEWED = (normal(8, 8) * np.linspace(0.2, 1, 8)[:, None]).astype(np.float32)  # rows and columns differ

NETS = {
    "gemm-beta": Net(f"{ROWS} {{ y = Gemm<beta = 3.5>(x, w, b) }}", {"w": normal(8, 5), "b": normal(5, seed=1)}),
    "gemm-alpha": Net(
        f"{ROWS} {{ y = Gemm<alpha = 0.2, transB = 1>(x, w, b) }}", {"w": normal(5, 8), "b": normal(5, seed=1)}
    ),
    "gemm-bias-of-one-value": Net(f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": normal(8, 5), "b": normal(1, seed=1)}),
    "weight-along-both-axes": Net(
        "(float[n,8] x) => (float[] y, float[] z) { y = Gemm(x, w) z = Gemm<transB = 1>(x, w) }", {"w": SKEWED}
    ),
    "batched-matmul": Net(
        "(float[n,3,5,8] x) => (float[] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }",
        {"w": normal(3, 8, 4), "b": normal(4, seed=1)},
    ),
    "matmul-bias-of-higher-rank": Net(
        f"{ROWS} {{ m = MatMul(x, w) y = Add(m, b) }}", {"w": normal(8, 5), "b": normal(1, 1, 5, seed=1)}
    ),
    "matmul-of-activations": Net(
        "(float[n,5,8] x) => (float[] y) { a = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(x) y = MatMul(a, t) }",
        {"w": normal(8, 8)},
    ),
    "grouped-convtranspose": Net(
        f"{IMAGE} {{ y = ConvTranspose<group = 2, strides = [2, 2]>(x, w, b) }}",
        {"w": normal(4, 3, 3, 3) * UNEQUAL, "b": normal(6, seed=1)},
    ),
    "constant-node-weight": Net(
        "(float[n,3] x) => (float[n,2] y) { w = Constant<value = float[3, 2] {0.9, -0.3, 0.2, 0.7, -0.5, 0.1}>() "
        "b = Constant<value_floats = [0.25, -0.5]>() y = Gemm(x, w, b) }"
    ),
    "tied-embedding": Net(
        "(int64[n,5] x) => (float[] y) { e = Gather(w, x) t = Transpose(w) y = MatMul(e, t) }", {"w": normal(7, 8)}
    ),
    "batch-norm-behind-conv": Net(
        f"{IMAGE} {{ c = Conv(x, w, b) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n) y = Conv(r, v) }}",
        {**W, **batch_norm(6)},
    ),
    "batch-norm-before-conv": Net(
        f"{IMAGE} {{ c = BatchNormalization(x, gamma, beta, mean, var) y = Conv(c, w, b) }}", {**W, **batch_norm(4)}
    ),
    "concat": Net(
        f"{IMAGE} {{ a = Conv(x, w) b1 = Conv(x, u) c = Concat<axis = 1>(a, b1) y = Conv(c, k) }}",
        {**W, "u": normal(5, 4, 3, 3, seed=3), "k": normal(3, 11, 1, 1, seed=4)},
    ),
    "residual-add": Net(
        f"{IMAGE} {{ c = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(c) d = Conv<pads = [1, 1, 1, 1]>(r, v) "
        "a = Add(d, x) y = Relu(a) }",
        W,
    ),
    "pools": Net(
        f"{IMAGE} {{ c = Conv(x, w, b) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c) "
        "a = AveragePool<kernel_shape = [2, 2]>(m) g = GlobalAveragePool(a) f = Flatten(g) y = Gemm(f, k) }",
        {**W, "k": normal(6, 3, seed=4)},
    ),
    "if-body": Net(
        f"""{IMAGE} {{ c = Conv(x, w, b) m = ReduceMean<keepdims = 0>(x) t = Greater(m, zero)
        i = If(t) <then_branch = p () => (float[n,6,6,6] p) {{ p = Relu(c) }},
                   else_branch = q () => (float[n,6,6,6] q) {{ q = Conv(c, k) }}> a = Add(c, i) y = Conv(a, v) }}""",
        {**W, "zero": np.array(0, np.float32), "k": normal(6, 6, 1, 1, seed=4)},
    ),
    "weight-that-an-if-reads-too": Net(
        f"""{IMAGE} {{ c = Conv(x, k) m = ReduceMean<keepdims = 0>(x) t = Greater(m, zero)
        i = If(t) <then_branch = p () => (float[n,4,8,8] p) {{ p = Relu(c) }},
                   else_branch = q () => (float[n,4,8,8] q) {{ q = Conv(c, k) }}> a = Add(c, i) y = Conv(a, k) }}""",
        {"zero": np.array(0, np.float32), "k": normal(4, 4, 1, 1, seed=4)},
    ),
    "depthwise-conv": Net(
        f"{IMAGE} {{ c = Conv<group = 4, strides = [2, 2], pads = [0, 1, 1, 0]>(x, w, b) r = Relu(c) y = Conv(r, u) }}",
        {"w": normal(4, 1, 3, 3), "b": normal(4, seed=1), "u": W["u"]},
    ),
    "one-dimensional-conv": Net(
        "(float[n,4,16] x) => (float[] y) { c = Conv<strides = [2], pads = [1, 0]>(x, w, b) y = Relu(c) }",
        {"w": normal(5, 4, 3), "b": normal(5, seed=1)},
    ),
    "output-that-others-read": Net(
        "(float[n,4,8,8] x) => (float[] c, float[] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }", W
    ),
}
EACH_NET = pytest.mark.parametrize("name", NETS)


@functools.cache
def prepared(name: str) -> Prepared:
    return prepare(build(NETS[name].text, NETS[name].constants))


@EACH_NET
@pytest.mark.parametrize("scheme", INT8_SCHEMES)
def test_int8_files_are_close_to_the_float_model(name: str, scheme: str) -> None:
    net = prepared(name)
    quantized = net.quantized(scheme)
    inputs = inputs_of(net.original, batch=8)
    expected = run(net.original, inputs)
    for optimize in (True, False):
        actual = run(quantized, inputs, optimize)
        assert list(actual) == list(expected)
        for output, value in expected.items():
            assert actual[output].shape == value.shape
            assert snr_db(actual[output], value) > LEAST_SNR


@EACH_NET
@pytest.mark.parametrize("scheme", ["w4a8-asym-pc", "w4a4-sym-pt"])
def test_narrow_files_say_the_same_with_optimizations_on_and_off(name: str, scheme: str) -> None:
    """At 4 bits the distance to the float model says little. The two ways to run a file differ by roundings."""
    net = prepared(name)
    quantized = net.quantized(scheme)
    inputs = inputs_of(net.original, batch=8)
    plain, optimized = run(quantized, inputs, optimize=False), run(quantized, inputs)
    for output, value in plain.items():
        step = net.quantizers(scheme).activations[output].scale if quantizes(net, output) else 0.0
        # Sums in another order move a value across a rounding tie, and a code by one, in each of a few layers.
        assert np.mean(np.abs(optimized[output] - value) > 1e-5) <= 0.02
        assert np.abs(optimized[output] - value).max() <= 4 * step + 1e-5


def quantizes(net: Prepared, tensor: str) -> bool:
    return tensor in {site.tensor for site in net.plan.activations}


# --- what the file holds ----------------------------------------------------------------------


def constants(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def producer(model: ModelProto, tensor: str) -> NodeProto:
    nodes: list[NodeProto] = [node for node in model.graph.node if tensor in node.output]
    (node,) = nodes
    return node


def weights(model: ModelProto, *op_types: str) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Each node of these types with the DequantizeLinear of its constant weight."""
    for node in model.graph.node:
        if node.op_type in op_types:
            dequantize = producer(model, node.input[1])
            if dequantize.input[0] in constants(model):
                yield node, dequantize


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("opset", [17, 20, 21])
def test_storage_of_the_weights(bits: int, opset: int) -> None:
    """Up to 4 bits as INT4, two codes to a byte, which takes opset 21 and IR version 10."""
    constants_of = {"w": normal(5, 4, 3, 3), "b": normal(5), "u": normal(3, 5, 1, 1)}
    net = prepare(build(f"{IMAGE} {{ c = Conv(x, w, b) y = Conv(c, u) }}", constants_of, opset))
    model = net.quantized(f"w{bits}a8-sym-pc")
    found = [constants(model)[dequantize.input[0]] for _, dequantize in weights(model, "Conv")]
    assert [tuple(codes.dims) for codes in found] == [(5, 4, 3, 3), (3, 5, 1, 1)]
    for codes in found:
        values = numpy_helper.to_array(codes).astype(np.int32)
        assert np.abs(values).max() == 2 ** (bits - 1) - 1
        assert codes.data_type == (TensorProto.INT4 if bits <= 4 else TensorProto.INT8)
        stored = len(codes.raw_data) or len(codes.int32_data)  # of INT4, one byte in each of the latter
        assert stored == ((values.size + 1) // 2 if bits <= 4 else values.size)
    assert model.opset_import[0].version == (21 if bits <= 4 else opset)
    assert model.ir_version >= (10 if bits <= 4 or opset == 21 else 8)


@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("scheme", ["w4a8-sym-pc", "w8a8-asym-pt"])
def test_a_product_of_activations_keeps_the_file_below_opset_21(scheme: str, opset: int) -> None:
    """ONNX Runtime 1.19 has no integer MatMul for it; the weights are stored as INT8 then."""
    net = prepare(build(NETS["matmul-of-activations"].text, NETS["matmul-of-activations"].constants, opset))
    model = net.quantized(scheme)
    assert model.opset_import[0].version == min(opset, 20)
    ((_, dequantize),) = weights(model, "MatMul")
    codes = constants(model)[dequantize.input[0]]
    assert codes.data_type == TensorProto.INT8
    assert np.abs(numpy_helper.to_array(codes)).max() == (7 if "w4" in scheme else 127)


@pytest.mark.parametrize(
    ("scheme", "kind", "bounds"),
    [
        ("w8a4-sym-pc", TensorProto.INT8, (-8, 7)),
        ("w8a4-asym-pc", TensorProto.UINT8, (0, 15)),
        ("w8a8-sym-pc", TensorProto.INT8, None),
        ("w8a8-asym-pc", TensorProto.UINT8, None),
    ],
)
def test_codes_of_activations(scheme: str, kind: int, bounds: tuple[int, int] | None) -> None:
    """4 bits are 8-bit codes with a Clip between the pair, but not for what enters and leaves the model."""
    net = prepared("residual-add")
    model, stored = net.quantized(scheme), constants(net.quantized(scheme))
    pairs = {}
    for quantize in (node for node in model.graph.node if node.op_type == "QuantizeLinear"):
        assert stored[quantize.input[2]].data_type == kind
        (reader,) = (node for node in model.graph.node if quantize.output[0] in node.input)
        if reader.op_type == "Clip":
            limits = tuple(int(numpy_helper.to_array(stored[name])) for name in reader.input[1:])
            assert all(stored[name].data_type == kind for name in reader.input[1:])
            (reader,) = (node for node in model.graph.node if reader.output[0] in node.input)
        else:
            limits = None
        assert reader.op_type == "DequantizeLinear"
        assert list(reader.input[1:]) == list(quantize.input[1:])
        pairs[quantize.name.removesuffix(".quantize")] = limits
    assert pairs == {"x": None, "r": bounds, "d": bounds, "y": None}


@pytest.mark.parametrize("scheme", INT8_SCHEMES)
@pytest.mark.parametrize(
    "name", ["gemm-beta", "gemm-bias-of-one-value", "batched-matmul", "grouped-convtranspose", "residual-add"]
)
def test_biases_are_int32_at_the_scale_of_the_accumulator(name: str, scheme: str) -> None:
    net = prepared(name)
    quantizers, model = net.quantizers(scheme), net.quantized(scheme)
    stored, seen = constants(model), 0
    for node in net.plan.integer_nodes:
        if node.weight is None or node.bias is None:
            continue
        dequantize = producer(model, f"{node.name}.bias.dequantized")
        codes, scale, zero_point = (numpy_helper.to_array(stored[name]) for name in dequantize.input)
        weight = quantizers.weights[node.weight.tensor].scale
        product = (quantizers.activations[node.inputs[0]].scale * weight).astype(np.float32)
        repeats = node.groups if node.op_type == "ConvTranspose" else 1
        np.testing.assert_array_equal(scale, np.tile(product, repeats) if product.ndim else product)
        channels = net.model.graph.initializers[node.weight.tensor].dims[node.weight.axis] * repeats
        assert (codes.dtype, codes.shape) == (np.dtype(np.int32), (channels,))
        assert not zero_point.any()
        bias = numpy_helper.to_array(net.model.graph.initializers[node.bias])
        # Rounded to the nearest code, and the quotient to float32 (2^-24 of up to 2^20 codes).
        np.testing.assert_allclose(
            codes * scale.astype(np.float64),
            np.broadcast_to(bias.ravel(), codes.shape),
            rtol=1e-7,
            atol=0.57 * scale.max(),
        )
        seen += 1
    assert seen


@EACH_NET
def test_no_pair_stands_twice_and_names_of_outputs_stay(name: str) -> None:
    net = prepared(name)
    model = net.quantized("w8a8-sym-pc")
    assert operators(model).count("QuantizeLinear") == len(net.plan.activations)
    assert [value.name for value in model.graph.output] == [value.name for value in net.original.graph.output]
    assert [value.name for value in model.graph.input] == [value.name for value in net.original.graph.input]
    onnx.checker.check_model(model, full_check=True)


@EACH_NET
@pytest.mark.parametrize("scheme", ["w8a8-sym-pc", "w4a4-asym-pt"])
def test_the_same_model_gives_the_same_bytes(name: str, scheme: str) -> None:
    net = prepared(name)
    before = net.model.proto.SerializeToString(deterministic=True)
    first, second = (net.quantized(scheme).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
    assert net.model.proto.SerializeToString(deterministic=True) == before


def test_new_tensors_take_no_name_of_the_model() -> None:
    """A tensor `x.scale` of the user's stays what it is."""
    original = build(
        f"{ROWS} {{ h = Relu(x) y = Gemm(h, w) z = Mul(h, s) }}".replace("(float[] y)", "(float[] y, float[] z)"),
        {"w": normal(8, 5), "s": normal(8)},
    )
    for tensor in original.graph.initializer:
        tensor.name = {"s": "h.scale", "w": "h.codes"}[tensor.name]
    for node in original.graph.node:
        node.input[:] = [{"s": "h.scale", "w": "h.codes"}.get(name, name) for name in node.input]
    net = prepare(original)
    inputs = inputs_of(original)
    expected, actual = run(original, inputs), run(net.quantized("w8a8-sym-pc"), inputs)
    assert all(snr_db(actual[name], value) > LEAST_SNR for name, value in expected.items())


def test_a_shared_bias_has_a_grid_at_each_of_its_users() -> None:
    text = "(float[n,8] x, float[n,8] z) => (float[] y, float[] u) { y = Gemm(x, w, b) u = Gemm(z, v, b) }"
    original = build(text, {"w": normal(8, 5), "v": 7 * normal(8, 5, seed=1), "b": 3 * normal(5, seed=2)})
    net = prepare(original)
    inputs = inputs_of(original)
    for name, value in run(original, inputs).items():
        assert snr_db(run(net.quantized("w8a8-sym-pc"), inputs)[name], value) > LEAST_SNR


def test_a_stack_of_matrices_has_one_scale_per_output_channel() -> None:
    """Also in the emulator, which reads the stack through the Reshape behind it."""
    net = prepared("batched-matmul")
    model = net.quantized("w8a8-asym-pc")
    (node,) = net.plan.integer_nodes
    assert node.weight is not None
    dims = net.model.graph.initializers[node.weight.tensor].dims
    dequantize = producer(model, f"{node.weight.tensor}.dequantized")
    scale = numpy_helper.to_array(constants(model)[dequantize.input[1]])
    assert (len(dims), scale.shape, dequantize.attribute[0].i) == (3, (dims[-1],), 1)
    assert len(set(scale.tolist())) == dims[-1]
    emulated = load_program(model).integer_nodes
    assert [(info.name, info.op_type) for info in emulated] == [(node.name, "MatMul")]
