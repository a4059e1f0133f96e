"""Every form of a file under a few schemes of every kind: it says what the parameters say, and it runs."""

import functools
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from helpers import Prepared, build, inputs_of, normal, operators, prepare, run, snr_db
from onnx import ModelProto, TensorProto, helper, numpy_helper

from onnxqt import __version__
from onnxqt.calibrate import Quantizers, bias_scale, has_integer_bias
from onnxqt.emulate import load_program
from onnxqt.errors import ExportError
from onnxqt.export import Form, lowest_opset, quantized_model
from onnxqt.model import Model, opset_of
from onnxqt.numerics import Array, Grid, QParams, dequantize, fake_quantize
from onnxqt.runtime import executed_graph
from onnxqt.schemes import parse_scheme
from onnxqt.verify import verify


@dataclass(frozen=True)
class Net:
    text: str
    constants: Mapping[str, Array]


NETS = {
    "conv": Net(
        """(float[n,20,7,7] x) => (float[] y) {
            c = Conv<pads = [1, 0, 1, 1], strides = [2, 1]>(x, w, b) r = Relu(c)
            d = Conv<group = 17>(r, u) e = Conv<pads = [0, 1, 1, 0]>(d, v, a) k = Clip(e, low, high)
            g = GlobalAveragePool(k) f = Flatten(g) y = Gemm<transB = 1>(f, m, h) }""",
        {
            "w": normal(17, 20, 3, 3),
            "b": normal(17, seed=1),
            "u": normal(17, 1, 2, 2, seed=2),
            "v": normal(18, 17, 1, 2, seed=3) / 4,
            "a": normal(18, seed=4),
            "low": np.array(-0.5, np.float32),
            "high": np.array(3.0, np.float32),
            "m": normal(5, 18, seed=5),
            "h": normal(5, seed=6),
        },
    ),
    "attention": Net(
        """(float[n,6,20] x) => (float[] y) {
            q = MatMul(x, w) p = Add(q, b) t = Transpose<perm = [0, 2, 1]>(p) s = MatMul(p, t)
            o = MatMul(s, p) r = Relu(o) y = MatMul(r, v) }""",
        {"w": normal(20, 18) / 4, "b": normal(18, seed=1), "v": normal(18, 5, seed=2)},
    ),
    "stack": Net(
        "(float[n,2,5,37] x) => (float[] y) { m = MatMul(x, w) a = Add(m, b) y = Relu(a) }",
        {"w": normal(2, 37, 4) * np.array([1, 0.2, 3, 0.5], np.float32), "b": normal(4, seed=1)},
    ),
    "gemm": Net(
        "(float[n,37] x) => (float[] y) { h = Gemm<transB = 1>(x, w) y = Gemm(h, v, b) }",
        {"w": normal(18, 37), "v": normal(18, 5, seed=1), "b": normal(1, seed=2)},
    ),
    "convtranspose": Net(
        """(float[n,20,4,4] x) => (float[] y) {
            c = ConvTranspose<strides = [2, 2]>(x, w, b) y = Conv(c, u) }""",
        {"w": normal(20, 17, 2, 3), "b": normal(17, seed=1), "u": normal(4, 17, 1, 1, seed=2)},
    ),
}
EACH_NET = pytest.mark.parametrize("name", NETS)

WEIGHT_ONLY = ["w4af-sym-b16", "w4af-asym-b32", "w8af-asym-b16", "w3af-sym-pt", "w5af-asym-pc", "w8af-sym-pc-pow2"]
STATIC = [
    "w8a8-sym-pc-narrow",
    "w8a8-asym-pt-pow2",
    "w4a8-asym-b16",
    "w8a8-sym-b16",
    "w6a4-asym-b16",
    "w4a4-sym-pc-pow2-narrow",
    "w8a16-sym-pc",
    "w4a16-asym-b16",
]
DYNAMIC = ["w8a8-asym-pc-dyn", "w4a8-asym-pt-dyn", "w4a8-asym-b16-dyn", "w7a8-asym-b16-dyn"]
OPERATORS = ["w8a8-sym-pc", "w8a8-asym-pt", "w4a8-asym-pc", "w8a4-sym-pc", "w8a8-sym-pt-narrow", "w8a8-sym-pc-pow2"]
CASES: list[tuple[str, Form]] = [
    *((scheme, "qdq") for scheme in (*WEIGHT_ONLY, *STATIC, *DYNAMIC)),
    *((scheme, "qoperator") for scheme in (*OPERATORS, "w8a8-asym-pc-dyn", "w4a8-asym-pt-dyn")),
]


@functools.cache
def prepared(name: str, opset: int = 17) -> Prepared:
    return prepare(build(NETS[name].text, NETS[name].constants, opset))


@functools.cache
def exported(name: str, scheme: str, form: Form = "qdq", opset: int | None = None) -> ModelProto:
    net = prepared(name)
    return quantized_model(net.model, net.plan, net.quantizers(scheme), form, opset)


def with_rounded_constants(net: Prepared, quantizers: Quantizers) -> Model:
    """The float model whose weights and INT32 biases lie on their grids, by numpy."""
    weights = {
        tensor: fake_quantize(net.model.graph.constant(tensor), params)  # type: ignore[arg-type]
        for tensor, params in quantizers.weights.items()
    }
    for node in net.plan.integer_nodes:
        if node.weight is None or node.bias is None or node.inputs[0] not in quantizers.activations:
            continue
        weight, bias = quantizers.weights[node.weight.tensor], net.model.graph.constant(node.bias)
        if bias is None or not has_integer_bias(weight):
            continue
        channels = net.model.graph.initializers[node.weight.tensor].dims[node.weight.axis]
        scale = bias_scale(weight, quantizers.activations[node.inputs[0]].scale, max(bias.size, channels))
        grid = QParams(scale, np.zeros(scale.shape, np.int32), Grid(32, signed=True), 0 if scale.ndim else None)
        weights[node.bias] = fake_quantize(bias, grid)
    return net.model.with_weights(weights)


@EACH_NET
@pytest.mark.parametrize("scheme", WEIGHT_ONLY)
def test_a_file_of_weights_alone_is_the_float_model_with_rounded_weights(name: str, scheme: str) -> None:
    """Bit for bit: the same float operators on the same values."""
    net, model = prepared(name), exported(name, scheme)
    inputs = inputs_of(net.original, batch=4)
    expected = run(with_rounded_constants(net, net.quantizers(scheme)).proto, inputs, optimize=False)
    for output, value in run(model, inputs, optimize=False).items():
        np.testing.assert_array_equal(value, expected[output])
    assert "QuantizeLinear" not in operators(model)
    assert operators(model).count("DequantizeLinear") == len(net.plan.weights)


@pytest.mark.parametrize("name", ["conv", "attention", "stack", "convtranspose"])
@pytest.mark.parametrize("scheme", STATIC)
def test_a_qdq_file_is_the_rounded_model_with_rounded_activations(name: str, scheme: str) -> None:
    """Bit for bit, without optimizations: constants rounded by numpy, then quantizers of activations alone."""
    net = prepared(name)
    quantizers = net.quantizers(scheme)
    bare = replace(
        net.plan, integer_nodes=tuple(replace(node, weight=None, bias=None) for node in net.plan.integer_nodes)
    )
    rounded = with_rounded_constants(net, quantizers)
    reference = quantized_model(rounded, bare, replace(quantizers, weights={}))
    inputs = inputs_of(net.original, batch=4)
    expected = run(reference, inputs, optimize=False)
    for output, value in run(exported(name, scheme), inputs, optimize=False).items():
        np.testing.assert_array_equal(value, expected[output])


@EACH_NET
@pytest.mark.parametrize(("scheme", "form"), CASES)
def test_every_form_is_valid_and_runs_with_optimizations_on_and_off(name: str, scheme: str, form: Form) -> None:
    net, model = prepared(name), exported(name, scheme, form)
    onnx.checker.check_model(model, full_check=True)
    inputs = inputs_of(net.original, batch=4)
    plain, optimized = run(model, inputs, optimize=False), run(model, inputs)
    found = net.quantizers(scheme).activations
    for output, value in plain.items():
        # Sums in another order move a value across a rounding tie, and a code by one, in each of a few layers; where
        # scales are found at run time, in every layer at once.
        step = float(found[output].scale) if output in found else 0.02 * float(np.abs(value).max())
        assert np.abs(optimized[output] - value).max() <= 4 * step + 1e-5
        assert snr_db(optimized[output], value) > 25 or scheme.startswith("w4a4")


@pytest.mark.parametrize("name", ["conv", "attention", "stack", "gemm", "convtranspose"])
@pytest.mark.parametrize("scheme", OPERATORS)
def test_integer_operators_give_what_float_operators_between_quantizers_give(name: str, scheme: str) -> None:
    """Up to codes that lie within float32's error of a rounding tie, of which random data have next to none."""
    net = prepared(name)
    inputs = inputs_of(net.original, batch=8)
    expected = run(exported(name, scheme), inputs, optimize=False)
    step = net.quantizers(scheme).activations["y"].scale
    for output, value in run(exported(name, scheme, "qoperator"), inputs, optimize=False).items():
        assert np.mean(np.abs(value - expected[output]) > 1e-5) <= 0.02
        assert np.abs(value - expected[output]).max() <= 4 * step + 1e-5


@EACH_NET
@pytest.mark.parametrize("scheme", ["w8a8-asym-pc-dyn", "w4a8-asym-pt-dyn"])
def test_integer_operators_with_scales_at_run_time_differ_by_roundings_of_float32(name: str, scheme: str) -> None:
    """The codes are equal until a difference of the last bits moves one across a tie, which costs a step in 255."""
    net = prepared(name)
    inputs = inputs_of(net.original, batch=8)
    expected = run(exported(name, scheme), inputs, optimize=False)
    for output, value in run(exported(name, scheme, "qoperator"), inputs, optimize=False).items():
        assert snr_db(value, expected[output]) > 40
        assert np.mean(np.abs(value - expected[output]) > 1e-4 * np.abs(value).max()) <= 0.05


@EACH_NET
@pytest.mark.parametrize(
    ("scheme", "form"),
    [("w8a8-asym-pc", "qdq"), *((scheme, form) for scheme, form in CASES if scheme.startswith("w8"))],
)
def test_eight_bits_are_close_to_the_float_model(name: str, scheme: str, form: Form) -> None:
    """41 dB for one rounding to 8 bits (see test_export); up to seven add up, and sums that cancel take 3 dB."""
    net = prepared(name)
    if name == "attention" and "a4" in scheme:
        pytest.skip("products of activations of 4 bits are far from the float model")
    inputs = inputs_of(net.original, batch=8)
    for output, value in run(net.original, inputs).items():
        quantized = run(exported(name, scheme, form), inputs)[output]
        assert snr_db(quantized, value) > (8 if "a4" in scheme else 27)


# --- what the files hold ----------------------------------------------------------------------------


def constants(model: ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def params_of(model: ModelProto, weight: str) -> tuple[int, Array, QParams]:
    """Element type, codes and grid of the weight called so in the float model, as the file has them."""
    stored = constants(model)
    (node,) = (n for n in model.graph.node if n.name == f"{weight}.dequantize")
    codes, scale, zero_point = (numpy_helper.to_array(stored[name]) for name in node.input)
    attributes = {a.name: a.i for a in node.attribute}
    grid = Grid(8, signed=True)
    params = QParams(
        scale, zero_point.astype(np.int32), grid, attributes.get("axis"), attributes.get("block_size") or None
    )
    return stored[node.input[0]].data_type, codes.astype(np.int32), params


@EACH_NET
@pytest.mark.parametrize(
    ("scheme", "kind"),
    [
        ("w4af-sym-b16", TensorProto.INT4),
        ("w3af-asym-b16", TensorProto.UINT4),
        ("w8af-asym-b16", TensorProto.UINT8),
        ("w5af-sym-b16", TensorProto.INT8),
        ("w2a8-asym-b16", TensorProto.INT4),
        ("w7a8-sym-b16", TensorProto.INT8),
        ("w4a8-asym-b16-dyn", TensorProto.INT4),
    ],
)
def test_weights_are_stored_in_the_next_type_with_the_scales_of_their_blocks(name: str, scheme: str, kind: int) -> None:
    net, model = prepared(name), exported(name, scheme)
    quantizers = net.quantizers(scheme)
    for tensor, params in quantizers.weights.items():
        found, codes, stored = params_of(model, tensor)
        assert found == kind
        assert params.grid.qmin <= codes.min() < codes.max() <= params.grid.qmax
        if params.block_size is None and name == "stack":
            continue  # a matrix of all rows
        assert (stored.axis, stored.block_size) == (params.axis, params.block_size)
        np.testing.assert_array_equal(stored.scale, params.scale)
        np.testing.assert_array_equal(stored.zero_point, params.zero_point)
        values = net.model.graph.constant(tensor)
        assert values is not None
        np.testing.assert_array_equal(dequantize(codes, stored), fake_quantize(values, params))
    assert any(params.block_size == 16 for params in quantizers.weights.values())


def test_weights_without_blocks_are_named_with_the_reason() -> None:
    (entry,) = (e for e in exported("conv", "w4af-sym-b16").metadata_props if e.key == "onnxqt.per_channel")
    assert json.loads(entry.value) == {"u": "the 1 values along axis 1 are fewer than a block of 16"}


@pytest.mark.parametrize(
    ("name", "scheme", "expected"),
    [
        ("conv", "w8a8-sym-pc", {"QLinearConv": 3, "MatMulInteger": 1, "Conv": 0, "Gemm": 0}),
        ("conv", "w8a8-asym-pc-dyn", {"ConvInteger": 3, "MatMulInteger": 1, "Conv": 0, "Gemm": 0}),
        ("attention", "w8a8-asym-pt", {"QLinearMatMul": 3, "MatMulInteger": 1, "MatMul": 0}),
        ("attention", "w8a8-asym-pt-dyn", {"MatMulInteger": 2, "MatMul": 2}),
        ("stack", "w8a8-sym-pc", {"MatMulInteger": 1, "MatMul": 0}),
        ("gemm", "w8a8-sym-pc", {"QLinearMatMul": 1, "MatMulInteger": 1, "Gemm": 0}),
        ("convtranspose", "w8a8-sym-pc", {"QLinearConv": 1, "ConvTranspose": 1}),
    ],
)
def test_integer_operators_of_a_file(name: str, scheme: str, expected: Mapping[str, int]) -> None:
    found = operators(exported(name, scheme, "qoperator"))
    assert {operator: found.count(operator) for operator in expected} == dict(expected)


def test_a_clamp_behind_a_convolution_is_one_of_its_codes() -> None:
    """A Relu on signed codes keeps those from the zero point on; a Clip those between its rounded bounds."""
    model = exported("conv", "w8a8-sym-pc", "qoperator")
    stored, quantizers = constants(model), prepared("conv").quantizers("w8a8-sym-pc")
    clips = {
        node.name: tuple(int(numpy_helper.to_array(stored[name])) for name in node.input[1:])
        for node in model.graph.node
        if node.op_type == "Clip"
    }
    scale = float(quantizers.activations["k"].scale)
    assert sorted(clips.values()) == sorted([(0, 127), (round(-0.5 / scale), min(127, round(3 / scale)))])


@pytest.mark.parametrize("scheme", ["w8a8-asym-pc-dyn", "w4a8-asym-b16-dyn"])
def test_scales_at_run_time_are_those_of_the_batch(scheme: str) -> None:
    """ONNX DynamicQuantizeLinear, opset 11: scale = (max - min) / 255 with 0 in the range, zero point by rounding."""
    model, net = exported("gemm", scheme), prepared("gemm")
    counted = operators(model)
    assert (counted.count("DynamicQuantizeLinear"), counted.count("QuantizeLinear")) == (2, 0)
    (node,) = (n for n in model.graph.node if n.op_type == "DynamicQuantizeLinear" and n.input[0] == "x")
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    tapped.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in node.output)
    for factor in (1, 7):
        x = inputs_of(net.original)["x"] * np.float32(factor)
        _, scale, zero_point = list(run(tapped, {"x": x}, optimize=False).values())[1:]
        assert scale == (np.maximum(x.max(), 0) - np.minimum(x.min(), 0)) / np.float32(255)
        assert zero_point == np.rint(-x.min() / scale)


def test_only_what_weights_multiply_is_quantized_at_run_time() -> None:
    model = exported("attention", "w8a8-asym-pc-dyn")
    dynamic = [node.input[0] for node in model.graph.node if node.op_type == "DynamicQuantizeLinear"]
    assert sorted(dynamic) == ["r", "x"]


# --- operator sets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "least", "default"),
    [
        ("w8a8-sym-pc", 13, 17),
        ("w4a8-sym-pc", 13, 21),
        ("w4af-asym-pc", 13, 21),
        ("w8af-sym-pt", 13, 17),
        ("w8a8-asym-pc-dyn", 13, 17),
        ("w8a16-sym-pc", 21, 21),
        ("w8a8-sym-b16", 21, 21),
        ("w4af-sym-b16", 21, 21),
    ],
)
def test_the_operator_set_is_no_newer_than_it_must_be(scheme: str, least: int, default: int) -> None:
    assert lowest_opset(prepared("conv").quantizers(scheme)) == least
    assert opset_of(exported("conv", scheme)) == default
    assert opset_of(exported("conv", scheme, "qdq", least)) == least


@pytest.mark.parametrize("opset", [13, 15, 20, 21])
@pytest.mark.parametrize(
    ("name", "scheme", "form"),
    [
        ("conv", "w4a8-asym-pc", "qdq"),
        ("conv", "w8a8-sym-pc", "qoperator"),
        ("attention", "w4a8-asym-pc", "qdq"),
        ("attention", "w8a8-sym-pc", "qdq"),
        ("attention", "w8a8-asym-pt", "qoperator"),
        ("stack", "w4af-asym-pc", "qdq"),
    ],
)
def test_a_chosen_operator_set_says_the_same(name: str, scheme: str, form: Form, opset: int) -> None:
    """ONNX Runtime 1.19, which has no QLinearMatMul for opset 21, runs these files as well."""
    net, model = prepared(name), exported(name, scheme, form, opset)
    assert opset_of(model) == opset
    inputs = inputs_of(net.original, batch=4)
    expected = run(exported(name, scheme, form), inputs, optimize=False)["y"]
    step = net.quantizers(scheme).activations["y"].scale if "af" not in scheme else 0.0
    for optimize in (True, False):
        assert np.abs(run(model, inputs, optimize)["y"] - expected).max() <= 4 * step + 1e-5
    int4 = any(tensor.data_type == TensorProto.INT4 for tensor in model.graph.initializer)
    assert int4 == (opset == 21 and scheme == "w4a8-asym-pc")


def test_a_product_of_activations_beside_blocks_runs() -> None:
    """Blocks take opset 21, for which ONNX Runtime 1.19 has no QLinearMatMul: a Sum keeps it from making one."""
    model = exported("attention", "w4a8-asym-b16")
    assert (opset_of(model), operators(model).count("Sum")) == (21, 2)
    executed = operators(executed_graph(model))
    assert "QLinearMatMul" not in executed
    assert "MatMulIntegerToFloat" in executed
    assert "Sum" not in operators(exported("attention", "w8a8-asym-pc"))


@pytest.mark.parametrize(
    ("scheme", "form", "opset", "message"),
    [
        ("w8a16-sym-pc", "qdq", 20, "^opset 20 cannot say activations of 16 bits: choose opset 21, or another scheme$"),
        ("w4af-sym-b16", "qdq", 17, "^opset 17 cannot say blocks of weights: choose opset 21, or another scheme$"),
        ("w8a8-sym-pc", "qdq", 12, "^opset 12 is not one of quantized files: choose one from 13 to 21$"),
        ("w8a8-sym-pc", "qdq", 22, "^opset 22 is not one of quantized files: choose one from 13 to 21$"),
        ("w8a16-sym-pc", "qoperator", None, "^ONNX has no integer operator for activations of 16 bits: .* form qdq$"),
        ("w4a8-sym-b16", "qoperator", None, "^ONNX has no integer operator for blocks of weights: write the form qdq$"),
        ("w8af-sym-pc", "qoperator", None, "^integer operators take quantized activations, and these stay float: "),
        ("w8a8-sym-pc", "qop", None, "^unknown form 'qop': expected one of qdq, qoperator$"),
    ],
)
def test_what_a_file_cannot_say_is_refused(scheme: str, form: Form, opset: int | None, message: str) -> None:
    net = prepared("conv")
    with pytest.raises(ExportError, match=message):
        quantized_model(net.model, net.plan, net.quantizers(scheme), form, opset)


def test_a_model_without_integer_operators_has_no_such_form() -> None:
    net = prepare(build("(float[n,4,4,4] x) => (float[] y) { y = ConvTranspose(x, w) }", {"w": normal(4, 3, 2, 2)}))
    with pytest.raises(ExportError, match=r"^no node of the model has an integer operator .*: write the form qdq$"):
        quantized_model(net.model, net.plan, net.quantizers("w8a8-sym-pc"), "qoperator")


def test_integer_operators_take_symmetric_weights() -> None:
    net = prepared("gemm")
    quantizers = net.quantizers("w8a8-sym-pc")
    shifted = {
        name: replace(params, zero_point=params.zero_point + np.int32(1)) for name, params in quantizers.weights.items()
    }
    with pytest.raises(ExportError, match="signed weights of zero point 0: write the form qdq"):
        quantized_model(net.model, net.plan, replace(quantizers, weights=shifted), "qoperator")


# --- bytes, metadata, the emulator --------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "form"), CASES[::3])
def test_the_same_model_gives_the_same_bytes(scheme: str, form: Form) -> None:
    net = prepared("conv")
    before = net.model.proto.SerializeToString(deterministic=True)
    files = [quantized_model(net.model, net.plan, net.quantizers(scheme), form) for _ in range(2)]
    assert len({file.SerializeToString(deterministic=True) for file in files}) == 1
    assert net.model.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("scheme", "form", "ranges"),
    [("w4af-asym-b32", "qdq", None), ("w8a8-sym-pc", "qoperator", "mse"), ("w8a8-asym-pc-dyn", "qdq", None)],
)
def test_metadata_say_how_a_file_was_made(scheme: str, form: Form, ranges: str | None) -> None:
    net = prepared("gemm")
    original = onnx.ModelProto()
    original.CopyFrom(net.model.proto)
    for key, value in (("author", "somebody"), ("onnxqt.scheme", "w2a4-sym-pt")):
        original.metadata_props.add(key=key, value=value)
    model = replace(net.model, proto=original)
    file = quantized_model(model, net.plan, net.quantizers(scheme), form)
    found = {entry.key: entry.value for entry in file.metadata_props}
    assert len(found) == len(file.metadata_props)
    unblocked = found.pop("onnxqt.per_channel", None)
    assert (unblocked is not None) == ("b32" in scheme)
    expected = {
        "author": "somebody",
        "onnxqt.version": __version__,
        "onnxqt.scheme": scheme,
        "onnxqt.form": form,
        "onnxqt.source_sha256": net.model.sha256,
    }
    assert found == (expected if ranges is None else {**expected, "onnxqt.ranges": ranges})


@EACH_NET
@pytest.mark.parametrize(("scheme", "form"), CASES)
def test_the_emulator_reads_every_form(name: str, scheme: str, form: Form) -> None:
    """What it has no integers for stays float, as in ONNX Runtime without optimizations."""
    net, model = prepared(name), exported(name, scheme, form)
    inputs = inputs_of(net.original, batch=4)
    program = load_program(model)
    expected = run(model, inputs, optimize=False)
    found = program.run(inputs)
    params = net.quantizers(scheme).activations
    for output, value in expected.items():
        step = float(params[output].scale) if output in params else 0.02 * float(np.abs(value).max())
        assert np.abs(found[output] - value).max() <= 4 * step + 1e-5
    reasons = {step.info.reason for step in program.steps if step.info.kind == "float"}
    assert "" not in reasons


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("conv", "w4af-sym-b16"),
        ("attention", "w4af-sym-b16"),
        ("attention", "w8af-sym-pc"),
        *itertools.product(("conv", "attention"), ("w4a8-asym-b16", "w8a8-asym-pc-dyn", "w8a16-sym-pc")),
    ],
)
def test_the_check_of_exported_files_passes(name: str, scheme: str) -> None:
    net = prepared(name)
    verify(scheme, exported(name, scheme), [inputs_of(net.original, batch=4)])


def test_every_kind_of_scheme_is_among_the_cases() -> None:
    schemes = [parse_scheme(scheme) for scheme, _ in CASES]
    for field, values in (
        ("weight_bits", {3, 4, 5, 6, 7, 8}),
        ("activation_bits", {4, 8, 16, 32}),
        ("block_size", {None, 16, 32}),
        *itertools.product(("symmetric", "per_channel", "power_of_two", "narrow", "dynamic"), [{True, False}]),
    ):
        assert {getattr(scheme, field) for scheme in schemes} == values
