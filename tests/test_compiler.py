"""Files as vendors' compilers make them: their grids obey the policy, and what they do not run stays float."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from conftest import Digits
from helpers import BATCH, SAMPLES, build, ingested, inputs_of, normal, operators, run, snr_db
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from onnxqt.calibrate import RangeMethod, RangeTable, calibrate, power_of_two_above, tensors_of
from onnxqt.compiler import ABSENT, compile_model, compiler_plan, grids_of
from onnxqt.data import open_samples
from onnxqt.errors import CalibrationError
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array, Grid
from onnxqt.plan import IntegerNode, QuantPlan, make_plan, tensors_of_group
from onnxqt.profiles import PROFILES, Policy, Precision, Profile, parse_precision

IMAGE = "(float[n,4,8,8] x) => (float[] y)"
ROWS = "(float[n,8] x) => (float[] y)"
SEQUENCE = "(float[n,5,8] x) => (float[] y)"
W = {
    "w": normal(6, 4, 3, 3),
    "b": normal(6, seed=1),
    "v": normal(6, 6, 3, 3, seed=2),
    "u": normal(6, 6, 1, 1, seed=3),
    "g": normal(6, 3, seed=4),
}
ATTENTION = {
    **{f"w{i}": normal(8, 8, seed=i) for i in range(3)},
    "w3": normal(8, 5, seed=3),
    "root": np.array(2.83, np.float32),
    "gamma": normal(8),
    "beta": normal(8, seed=5),
}

NETS: dict[str, tuple[str, Mapping[str, Array]]] = {
    "cnn": (
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) d = Conv<pads = [1, 1, 1, 1]>(r, v) a = Add(r, d) "
        "p = AveragePool<kernel_shape = [2, 2], strides = [2, 2]>(a) m = GlobalAveragePool(p) f = Flatten(m) "
        "y = Gemm(f, g) }",
        W,
    ),
    "silu": (f"{IMAGE} {{ c = Conv(x, w, b) s = Sigmoid(c) m = Mul(c, s) y = Conv(m, v) }}", W),
    "gate": (
        f"{IMAGE} {{ c = Conv(x, w, b) q = GlobalAveragePool(c) k = Conv(q, u) s = Sigmoid(k) m = Mul(c, s) "
        "y = Conv(m, v) }",
        W,
    ),
    "attention": (
        f"{SEQUENCE} {{ q = MatMul(x, w0) k = MatMul(x, w1) v = MatMul(x, w2) t = Transpose<perm = [0, 2, 1]>(k) "
        "s = MatMul(q, t) d = Div(s, root) p = Softmax(d) o = MatMul(p, v) a = Add(o, x) "
        "n = LayerNormalization(a, gamma, beta) y = MatMul(n, w3) }",
        ATTENTION,
    ),
    "concat": (
        f"{IMAGE} {{ c = Conv(x, w, b) s = Sigmoid(c) e = Conv(x, w) k = Concat<axis = 1>(s, e) y = Conv(k, t) }}",
        {**W, "t": normal(3, 12, 1, 1, seed=5)},
    ),
    "resize": (
        f'{IMAGE} {{ c = Conv(x, w, b) r = Resize<mode = "linear">(c, , scales) y = Conv(r, v) }}',
        {**W, "scales": np.array([1, 1, 2, 2], np.float32)},
    ),
    "split": (
        f"{IMAGE} {{ c = Conv(x, w, b) h, k = Split<axis = 1>(c, sizes) s = Sigmoid(h) m = Mul(s, k) y = Conv(m, t) }}",
        {**W, "sizes": np.array([3, 3]), "t": normal(3, 3, 1, 1, seed=5)},
    ),
    "constants": (
        f"{IMAGE} {{ c = Conv(x, w, b) a = Relu(c) m = Mul(a, k) t = Sub(m, l) p = PRelu(t, slope) r = LeakyRelu(p) "
        "y = Conv(r, v) }",
        {**W, "k": normal(6, 1, 1), "l": normal(6, 1, 1, seed=5), "slope": normal(6, 1, 1, seed=6)},
    ),
    "gather": (
        f"{SEQUENCE} {{ a = MatMul(x, w0) h = Gather<axis = 1>(a, first) t = Tanh(h) y = Gemm(t, w3) }}",
        {**ATTENTION, "first": np.array(0)},
    ),
}

# b bits over a range of 2 x 4 sigma leave 20 log10(sigma sqrt(12) (2^b - 1) / (8 sigma)) = 6.02 b - 7.3 dB per tensor;
# twelve such noises add up (11 dB), of activations, weights and constants. Symmetric codes waste half of them behind
# a Relu (6 dB), and a scale that is rounded up to a power of two up to half of them (6 dB).
PER_BIT, RANGE, NOISES, WASTE = 6.02, 7.3, 11.0, 6.0


def least_snr(policy: Policy, precision: Precision) -> float:
    bits = min(precision.weight_bits, precision.activation_bits)
    return PER_BIT * bits - RANGE - NOISES - WASTE * (policy.symmetric + (policy.power_of_two != "none"))


CASES = [(name, precision) for name, profile in PROFILES.items() for precision in profile.policy.precisions]
EACH_NET = pytest.mark.parametrize("net", NETS)
EACH_CASE = pytest.mark.parametrize(("name", "precision"), CASES)
EACH_PROFILE = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with the ranges that any profile needs, and inputs of other samples."""

    original: ModelProto
    model: Model
    ranges: RangeTable
    inputs: Mapping[str, Array]

    def compiled(self, policy: Policy, precision: Precision) -> ModelProto:
        return compile_model(self.model, self.ranges, compiler_plan(self.model, policy), policy, precision)


@functools.cache
def calibrated(net: str) -> Calibrated:
    text, constants = NETS[net]
    original = build(text, constants)
    model = ingested(original)
    samples = open_samples(inputs_of(original, batch=SAMPLES), input_specs(model))
    plans = [compiler_plan(model, profile.policy) for profile in PROFILES.values()]
    return Calibrated(original, model, calibrate(model, tensors_of(plans), samples, BATCH), inputs_of(original, 8))


def file_of(net: str, name: str, precision: str) -> ModelProto:
    """The file of a profile, made once: read only."""
    return file_with(net, name, precision, PROFILES[name].policy.ranges)


@functools.cache
def file_with(net: str, name: str, precision: str, ranges: RangeMethod) -> ModelProto:
    """The same with clips of another kind."""
    policy = replace(PROFILES[name].policy, ranges=ranges)
    return calibrated(net).compiled(policy, parse_precision(precision))


def plan_of(text: str, constants: Mapping[str, Array], policy: Policy) -> QuantPlan:
    return compiler_plan(ingested(build(text, constants)), policy)


def reasons(plan: QuantPlan) -> dict[str, str]:
    """Why each operator stays float."""
    return {node.op_type: node.reason for node in plan.float_nodes}


def constant(model: ModelProto, name: str) -> Array:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return numpy_helper.to_array(tensor)


def kind_of(model: ModelProto, name: str) -> int:
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    return int(tensor.data_type)


def quantizers(model: ModelProto) -> dict[str, tuple[float, int, int]]:
    """(scale, zero point, element type) of each quantized activation, by its name in the float model."""
    return {
        node.name.removesuffix(".quantize"): (
            float(constant(model, node.input[1])),
            int(constant(model, node.input[2])),
            kind_of(model, node.input[2]),
        )
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }


def stored(model: ModelProto, suffix: str) -> Iterator[tuple[NodeProto, Array, Array, Array]]:
    """Each DequantizeLinear of constants whose name ends so, with codes, scale and zero point."""
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0].endswith(f"{suffix}.codes"):
            yield node, *(constant(model, name) for name in node.input)


# --- the file as a whole ------------------------------------------------------------------------------------------


@EACH_NET
@EACH_CASE
def test_a_compiled_file_is_near_the_float_model(net: str, name: str, precision: str) -> None:
    """With clips from the extreme values: other clips need more samples than these models are calibrated on."""
    case, asked = calibrated(net), parse_precision(precision)
    policy = replace(PROFILES[name].policy, ranges="minmax")
    model = file_with(net, name, precision, "minmax")
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version <= 21
    expected = run(case.original, case.inputs)
    # ONNX Runtime has no integer convolution for zero points that differ between the channels of a weight, but
    # chooses it; without its optimizations the file runs.
    for optimize in (False, True) if policy.weights_symmetric else (False,):
        actual = run(model, case.inputs, optimize)
        assert list(actual) == list(expected)
        for output, value in expected.items():
            assert snr_db(actual[output], value) > least_snr(policy, asked)


@EACH_PROFILE
def test_the_digits_keep_their_classes(torch_digits: Digits, profile: Profile) -> None:
    """At 8 bits at most one class in fifty changes; the clips are the profile's own."""
    model, policy = torch_digits.model, profile.policy
    plan = compiler_plan(model, policy)
    ranges = calibrate(model, plan, torch_digits.samples)
    expected = run(model.proto, torch_digits.inputs)
    for precision in policy.precisions:
        compiled = compile_model(model, ranges, plan, policy, parse_precision(precision))
        actual = run(compiled, torch_digits.inputs, optimize=policy.weights_symmetric)
        for output, value in expected.items():
            same = float(np.mean(actual[output].argmax(1) == value.argmax(1)))
            assert same >= (0.98 if precision.startswith("w8") else 0.9)


@EACH_NET
@EACH_CASE
def test_the_same_model_gives_the_same_bytes(net: str, name: str, precision: str) -> None:
    case, asked, policy = calibrated(net), parse_precision(precision), PROFILES[name].policy
    before = case.model.proto.SerializeToString(deterministic=True)
    files = file_of(net, name, precision), case.compiled(policy, asked)
    first, second = (file.SerializeToString(deterministic=True) for file in files)
    assert first == second
    assert case.model.proto.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    "change",
    [
        {"signed": False},
        {"symmetric": True},
        {"narrow": True},
        {"ranges": "percentile"},
        {"per_channel": False},
        {"weights_symmetric": False},
        {"power_of_two": "activations"},
        {"power_of_two": "all"},
        {"weights_float": True},
        {"operators": ("Conv", "Relu")},
        {"fixed_outputs": {"AveragePool": (0.25, 3)}},
        {"pools_share_grid": True},
    ],
    ids=str,
)
def test_every_field_of_a_policy_changes_the_file(change: dict[str, object]) -> None:
    policy = Policy(operators=("Conv", "Gemm", "Relu", "Add", "AveragePool", "GlobalAveragePool"))
    assert changes(policy, replace(policy, **change))  # type: ignore[arg-type]


def changes(policy: Policy, other: Policy) -> bool:
    case, precision = calibrated("cnn"), Precision(8, 8)
    return case.compiled(policy, precision) != case.compiled(other, precision)


def test_narrow_weights_matter_where_they_are_asymmetric() -> None:
    """Symmetric codes never reach -128, as the scale follows from the largest magnitude."""
    policy = Policy(operators=("Conv", "Gemm", "Relu"), weights_symmetric=False)
    assert changes(policy, replace(policy, weights_narrow=False))
    policy = replace(policy, weights_symmetric=True)
    assert not changes(policy, replace(policy, weights_narrow=False))


def test_a_range_that_was_not_recorded_is_named() -> None:
    case, policy = calibrated("cnn"), PROFILES["tflite_ref"].policy
    ranges = RangeTable({name: seen for name, seen in case.ranges.tensors.items() if name != "a"}, SAMPLES)
    with pytest.raises(CalibrationError, match=r"^the range of 'a' was not recorded: calibrate with every plan"):
        compile_model(case.model, ranges, compiler_plan(case.model, policy), policy, Precision(8, 8))


# --- grids of the activations -------------------------------------------------------------------------------------

KINDS = {
    (8, True): TensorProto.INT8,
    (8, False): TensorProto.UINT8,
    (16, True): TensorProto.INT16,
    (16, False): TensorProto.UINT16,
}


@EACH_NET
@EACH_CASE
def test_activations_obey_the_policy(net: str, name: str, precision: str) -> None:
    """With clips from the extreme values every scale follows from what was seen."""
    case, asked = calibrated(net), parse_precision(precision)
    policy = replace(PROFILES[name].policy, ranges="minmax")
    plan, found = compiler_plan(case.model, policy), quantizers(file_with(net, name, precision, "minmax"))
    if asked.dynamic:
        assert not found
        return
    assert found.keys() == {site.tensor for site in plan.activations}
    prescribed = {node.output for node in plan.integer_nodes if node.op_type in policy.fixed_outputs}
    low = -(2 ** (asked.activation_bits - 1)) if policy.signed else 0
    high = low + 2**asked.activation_bits - 1
    low += policy.narrow and asked.activation_bits <= 8
    for site in plan.activations:
        scale, zero_point, kind = found[site.tensor]
        group = set(tensors_of_group(plan, site.group))
        assert kind == KINDS[asked.activation_bits, policy.signed]
        assert {found[tensor] for tensor in group} == {(scale, zero_point, kind)}
        if group & prescribed:
            continue
        lo = min(0.0, *(case.ranges.tensors[tensor].min for tensor in group))
        hi = max(0.0, *(case.ranges.tensors[tensor].max for tensor in group))
        if policy.symmetric or (asked.activation_bits == 16 and policy.signed):
            expected, zero = np.float32(max(-lo, hi) / high), 0
        else:
            expected, zero = np.float32((hi - lo) / (high - low)), None
        if policy.power_of_two != "none":
            assert np.frexp(scale)[0] == 0.5
            assert expected <= scale < 2 * expected
        else:
            assert scale == expected
        zero = round(low - lo / scale) if zero is None else zero
        assert zero_point == min(max(zero, low), high)


def test_narrow_codes_leave_one_out() -> None:
    """By a Clip of the codes between the pair, as QuantizeLinear gives out every code of its type."""
    case = calibrated("cnn")
    model = case.compiled(NARROW, Precision(8, 8))
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    assert len(clips) == operators(model).count("QuantizeLinear") > 0
    for clip in clips:
        limits = [constant(model, name) for name in clip.input[1:]]
        assert [int(limit) for limit in limits] == [-127, 127]
        assert {str(limit.dtype) for limit in limits} == {"int8"}
    # A value far below the range gets the least code.
    scale, _, _ = quantizers(model)["x"]
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    (seen,) = (node.output[0] for node in tapped.graph.node if node.name == "x.dequantize")
    tapped.graph.output.append(onnx.helper.make_empty_tensor_value_info(seen))
    low = run(tapped, {"x": np.full((1, 4, 8, 8), -1e6, np.float32)}, optimize=False)[seen]
    np.testing.assert_array_equal(low, np.float32(scale) * np.float32(-127))


NARROW = Policy(operators=("Conv", "Gemm", "Relu"), symmetric=True, narrow=True)


def test_codes_of_16_bits_are_never_narrow() -> None:
    """ONNX Runtime has no Clip of INT16, and one code of 65536 says nothing."""
    assert grids_of(NARROW, Precision(8, 16)).activation == Grid(16, True)
    case = calibrated("cnn")
    model = case.compiled(NARROW, Precision(8, 16))
    assert "Clip" not in operators(model)
    assert snr_db(run(model, case.inputs)["y"], run(case.original, case.inputs)["y"]) > least_snr(
        NARROW, Precision(8, 16)
    )


def test_inputs_and_outputs_keep_8_bits() -> None:
    model = calibrated("cnn").compiled(Policy(operators=("Conv", "Gemm", "Relu", "Add")), Precision(8, 4))
    clipped = {node.name.removesuffix(".clip") for node in model.graph.node if node.op_type == "Clip"}
    assert clipped
    assert set(quantizers(model)) - clipped == {"x", "y"}


TFLITE = PROFILES["tflite_ref"].policy


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("w8a8", {"Sigmoid": (2.0**-8, -128), "Tanh": (2.0**-7, 0), "Softmax": (2.0**-8, -128)}),
        ("w8a16", dict.fromkeys(("Sigmoid", "Tanh", "Softmax"), (2.0**-15, 0))),
    ],
)
def test_prescribed_outputs(precision: str, expected: dict[str, tuple[float, int]]) -> None:
    """LOGISTIC, TANH and SOFTMAX of TensorFlow Lite, and what only moves their codes."""
    for net, op_type, tensors in (("gate", "Sigmoid", "s"), ("gather", "Tanh", "t"), ("attention", "Softmax", "p")):
        found = quantizers(calibrated(net).compiled(TFLITE, parse_precision(precision)))
        assert found[tensors][:2] == expected[op_type]
    text = f"{SEQUENCE} {{ a = MatMul(x, w0) s = Softmax(a) t = Transpose<perm = [0, 2, 1]>(s) y = MatMul(x, t) }}"
    plan = plan_of(text, ATTENTION, TFLITE)
    assert {site.group for site in plan.activations if site.tensor in ("s", "t")} == {"s"}


def test_a_prescribed_output_grid_is_not_imposed_on_its_neighbours() -> None:
    """Concat takes one operand on another grid then, and an activation function's last node is not its first."""
    found = quantizers(calibrated("concat").compiled(TFLITE, Precision(8, 8)))
    assert found["s"][:2] == (2.0**-8, -128)
    assert found["e"] == found["k"] != found["s"]
    found = quantizers(calibrated("silu").compiled(TFLITE, Precision(8, 8)))
    assert "s" not in found
    assert found["m"][:2] != (2.0**-8, -128)


def test_only_average_pool_keeps_its_input_grid() -> None:
    """TensorFlow Lite: MEAN, which a global pool becomes, has a grid of its own."""
    text, constants = NETS["cnn"]
    plan = plan_of(text, constants, TFLITE)
    groups = {frozenset(tensors_of_group(plan, site.group)) for site in plan.activations}
    assert groups == {frozenset(group) for group in ("x", "r", "d", "ap", "mf", "y")}
    plan = plan_of(text, constants, replace(TFLITE, pools_share_grid=False))
    groups = {frozenset(tensors_of_group(plan, site.group)) for site in plan.activations}
    assert groups == {frozenset(group) for group in ("x", "r", "d", "a", "p", "mf", "y")}


# --- weights, biases and constants --------------------------------------------------------------------------------


@EACH_NET
@EACH_CASE
def test_weights_obey_the_policy(net: str, name: str, precision: str) -> None:
    case, asked, policy = calibrated(net), parse_precision(precision), PROFILES[name].policy
    plan, model = compiler_plan(case.model, policy), file_of(net, name, precision)
    high = 2 ** (asked.weight_bits - 1) - 1
    low = -high if policy.weights_narrow else -high - 1
    if policy.weights_float:
        kept = {tensor.name for tensor in model.graph.initializer}
        assert kept.issuperset(site.tensor for site in plan.weights)
        assert kept.issuperset(node.bias for node in plan.integer_nodes if node.bias)
        assert not [*stored(model, "bias"), *(found for site in plan.weights for found in stored(model, site.tensor))]
        return
    for site in plan.weights:
        ((node, codes, scale, zero_point),) = stored(model, site.tensor)
        assert kind_of(model, node.input[0]) in (TensorProto.INT8, TensorProto.INT4)
        values = np.moveaxis(constant(case.model.proto, site.tensor), site.axis, 0).astype(np.float64)
        codes = np.moveaxis(codes.astype(np.int64), site.axis, 0)
        assert (low <= codes).all()
        assert (codes <= high).all()
        assert scale.shape == zero_point.shape == ((len(values),) if policy.per_channel else ())
        if policy.per_channel:
            assert node.attribute[0].i == site.axis
        else:
            values, codes = values[None], codes[None]
        for row, row_codes, s, z in zip(values, codes, np.atleast_1d(scale), np.atleast_1d(zero_point), strict=True):
            lo, hi = min(row.min(), 0.0), max(row.max(), 0.0)
            step = np.float32(max(-lo, hi) / high if policy.weights_symmetric else (hi - lo) / (high - low))
            if policy.power_of_two == "all":
                assert np.frexp(s)[0] == 0.5
                assert step <= s < 2 * step
            else:
                assert s == step
            # Half a step from rounding the value, half a step from the zero point's.
            inside = 0.5 if policy.weights_symmetric else 1.0
            assert np.abs((row_codes - int(z)) * float(s) - row).max() <= inside * s * (1 + 2.0**-10)
            assert (int(z) == 0) or not policy.weights_symmetric
            # Absmax, not a clip that was searched: the outermost code is taken.
            outermost = max(abs(int(row_codes.min())), int(row_codes.max()))
            assert outermost == high or policy.power_of_two == "all" or not policy.weights_symmetric


def test_asymmetric_weights_use_all_codes_and_keep_the_scale_of_the_bias() -> None:
    """Rows that lie on one side of zero: twice as fine as symmetric codes."""
    weight = (np.abs(normal(3, 8)) + np.float32(0.5)) * np.array([[1], [-1], [0]], np.float32)
    original = build(f"{ROWS} {{ y = Gemm<transB = 1>(x, w, b) }}", {"w": weight, "b": normal(3, seed=1)})
    model, policy = ingested(original), PROFILES["rknn_w8a8"].policy
    plan = compiler_plan(model, policy)
    ranges = calibrate(model, plan, open_samples(inputs_of(original, SAMPLES), input_specs(model)), BATCH)
    compiled = compile_model(model, ranges, plan, policy, Precision(8, 8))
    ((_, codes, scale, zero_point),) = stored(compiled, "w")
    assert zero_point.tolist()[:2] == [-128, 127]
    assert (codes[0].max(), codes[1].min()) == (127, -128)
    np.testing.assert_array_equal(codes[2], zero_point[2])  # a channel of zeros has a scale that fits its bias
    assert scale[2] == np.float32(2 * np.abs(weight).max() / 255)
    ((_, _, bias_scale, bias_zero),) = stored(compiled, "bias")
    input_scale = np.float32(quantizers(compiled)["x"][0])
    np.testing.assert_array_equal(bias_scale, input_scale * scale)
    assert not bias_zero.any()


@pytest.mark.parametrize(
    ("scale", "above"),
    [(1.0, 1.0), (0.75, 1.0), (2.0**-20, 2.0**-20), (2.0**-20 * (1 + 2.0**-23), 2.0**-19), (3.0, 4.0), (0.5, 0.5)],
)
def test_a_power_of_two_is_rounded_up(scale: float, above: float) -> None:
    assert power_of_two_above(np.asarray(scale, np.float32)) == np.float32(above)


def test_a_bias_that_does_not_fit_raises_a_power_of_two_to_one() -> None:
    original = build(f"{ROWS} {{ y = Gemm(x, w, b) }}", {"w": normal(8, 3) * np.float32(1e-7), "b": normal(3) * 1e5})
    for tensor in original.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    model, policy = ingested(original), PROFILES["dpu_pow2"].policy
    plan = compiler_plan(model, policy)
    ranges = calibrate(model, plan, open_samples(inputs_of(original, SAMPLES), input_specs(model)), BATCH)
    compiled = compile_model(model, ranges, plan, policy, Precision(8, 8))
    ((_, codes, scale, _),) = stored(compiled, "bias")
    assert 2**28 < np.abs(codes.astype(np.int64)).max() <= 2**30
    assert np.frexp(scale)[0] == 0.5


@pytest.mark.parametrize(("precision", "kind"), [("w8a8", "int8"), ("w8a16", "int16")])
def test_constant_operands_are_codes_on_a_grid_of_their_own(precision: str, kind: str) -> None:
    case = calibrated("constants")
    model = case.compiled(TFLITE, parse_precision(precision))
    found = list(stored(model, "constant"))
    assert len(found) == 3
    for (_, codes, scale, zero_point), name in zip(found, ("k", "l", "slope"), strict=True):
        values = constant(case.original, name)
        lo, hi = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
        step = np.float32((hi - lo) / 255) if kind == "int8" else np.float32(max(-lo, hi) / 32767)
        assert str(codes.dtype) == kind
        assert scale == step
        real = (codes.astype(np.int64) - int(zero_point)) * float(scale)
        # Half a step from rounding the value, half a step from the zero point's.
        assert np.abs(real - values).max() <= step


def test_a_division_by_a_constant_becomes_a_product() -> None:
    """A single value is code 127 (or -128 beside it) of its grid: nothing is lost but float32's own rounding."""
    case = calibrated("attention")
    model = case.compiled(TFLITE, Precision(8, 8))
    assert "Div" not in operators(model)
    ((_, codes, scale, zero_point),) = stored(model, "constant")
    assert (int(codes) - int(zero_point)) * float(scale) == pytest.approx(1 / 2.83, rel=2.0**-22)


@pytest.mark.parametrize(("name", "precision"), [case for case in CASES if case[1].endswith("-dyn")])
@EACH_NET
def test_a_dynamic_file_quantizes_weights_alone(net: str, name: str, precision: str) -> None:
    case, policy = calibrated(net), PROFILES[name].policy
    model = case.compiled(policy, parse_precision(precision))
    plan = compiler_plan(case.model, policy)
    assert operators(model).count("DequantizeLinear") == len(plan.weights) > 0
    assert "QuantizeLinear" not in operators(model)
    kept = {tensor.name for tensor in model.graph.initializer}
    biases = {node.bias for node in plan.integer_nodes if node.bias}
    assert biases <= kept


# --- plans --------------------------------------------------------------------------------------------------------


@EACH_NET
@EACH_PROFILE
def test_what_a_back_end_does_not_run_stays_float(net: str, profile: Profile) -> None:
    """Nothing outside of the list is integer, and nothing on it is float for want of an integer form."""
    text, constants = NETS[net]
    policy = profile.policy
    plan = plan_of(text, constants, policy)
    moves = {"Flatten", "Transpose", "Split", "Gather"}
    allowed = {*policy.operators, *moves, *(["Div"] if "Mul" in policy.operators else [])}
    allowed |= {"MatMul"} if "Gemm" in policy.operators else set()
    assert {node.op_type for node in plan.integer_nodes} <= allowed
    absent = {node.op_type for node in plan.float_nodes if node.reason == f"{node.op_type} {ABSENT}"}
    assert absent.isdisjoint(allowed - {"MatMul"})
    paid = ("stands between float nodes", "no integer node reads its result")
    for node in plan.float_nodes:
        inside = "is part of an activation function" in node.reason or node.reason.startswith("follows '")
        assert node.op_type in absent or node.reason in paid or inside


def test_reasons_name_the_operator() -> None:
    found = reasons(plan_of(*NETS["attention"], PROFILES["ort_cpu"].policy))
    assert found["Softmax"] == "Softmax is not among the operators that the back end runs on integers"
    assert found["LayerNormalization"].startswith("LayerNormalization is not among")
    text = "(float[n,8] x) => (float[] y) { a = Gemm(x, w) s = Shape(a) k = Cast<to = 1>(s) y = Mul(a, k) }"
    found = reasons(plan_of(text, {"w": normal(8, 2)}, Policy(operators=("Gemm",))))
    assert found["Shape"] == "computes shapes or indices"


@pytest.mark.parametrize(
    ("operators", "text", "reason"),
    [
        (("Gemm", "PRelu"), "a = Gemm(x, w) s = Gemm(x, w) y = PRelu(a, s)", "computed at run time"),
        (("Gemm", "Mul"), "a = Gemm(x, w) s = Gemm(x, w) y = Div(a, s)", "computed at run time"),
        (("Gemm", "Add"), "a = Gemm(x, w) y = Add(a, k)", ""),
        (("Gemm", "LayerNormalization"), "a = Gemm(x, w) y, m = LayerNormalization(a, k)", "second output"),
        (("Gemm", "LayerNormalization"), "a = Gemm(x, w) s = Gemm(x, v) y = LayerNormalization(a, s)", "at run time"),
        (("Gemm", "Concat"), "a = Gemm(x, w) c = Concat<axis = 0>(a, w) y = Gemm(c, w)", "an operand is constant"),
        (("Gemm", "Resize"), 'a = Gemm(x, w) y = Resize<mode = "cubic">(a, , twice)', "cubic interpolation"),
        (
            ("Gemm", "Resize"),
            'a = Gemm(x, w) y = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(a, box, twice)',
            "crops while it resizes",
        ),
    ],
)
def test_forms_without_integers_say_why(operators: tuple[str, ...], text: str, reason: str) -> None:
    constants = {
        **{"w": normal(8, 8), "v": normal(8, 1), "k": normal(8), "twice": np.array([1, 2], np.float32)},
        "box": np.array([0, 0, 1, 1], np.float32),
    }
    outputs = "(float[] y, float[] m)" if "m =" in text else "(float[] y)"
    source = f"(float[8,8] x) => {outputs} {{ {text} }}"
    if "v)" in text:  # the scale has the shape of a row
        source = f"(float[1,8] x, float[8] s) => {outputs} {{ a = Gemm(x, w) y = LayerNormalization(a, s) }}"
    plan = plan_of(source, constants, Policy(operators=operators))
    found = [node.reason for node in plan.float_nodes]
    assert len(found) == bool(reason)
    assert all(reason in text for text in found)


def test_a_tail_follows_the_first_operator_that_is_not_run() -> None:
    """The other branch stays integer, and the first to stop is named."""
    text = (
        "(float[n,8] x) => (float[] y, float[] z) { a = Gemm(x, w) b = Elu(a) c = Gemm(b, w) d = Elu(c) y = Gemm(d, w) "
        "e = Relu(a) z = Gemm(e, w) }"
    )
    policy = Policy(operators=("Gemm", "Relu"), fallback="float_tail")
    model = ingested(build(text, {"w": normal(8, 8)}))
    plan = compiler_plan(model, policy)
    assert [node.op_type for node in plan.integer_nodes] == ["Gemm", "Relu", "Gemm"]
    first, *rest = plan.float_nodes
    assert first.reason == f"Elu {ABSENT}"
    assert [node.op_type for node in rest] == ["Gemm", "Elu", "Gemm"]
    assert {node.reason for node in rest} == {f"follows '{first.name}', where the back end stops"}
    plan = compiler_plan(model, replace(policy, fallback="float"))
    assert [node.op_type for node in plan.float_nodes] == ["Elu", "Elu"]


def test_what_holds_no_floats_of_the_input_does_not_stop_a_tail() -> None:
    """A class token that is spread over the batch, and shapes."""
    text = (
        f"{SEQUENCE} {{ a = MatMul(x, w0) s = Shape<start = 0, end = 1>(x) k = Concat<axis = 0>(s, rest) "
        "t = Expand(token, k) c = Concat<axis = 1>(t, a) y = MatMul(c, w1) }"
    )
    constants = {**ATTENTION, "token": normal(1, 1, 8), "rest": np.array([1, 8])}
    plan = plan_of(text, constants, replace(PROFILES["edgetpu"].policy, operators=("MatMul", "Concat")))
    assert [node.op_type for node in plan.integer_nodes] == ["MatMul", "Concat", "MatMul"]


@pytest.mark.parametrize(
    ("operators", "integer"),
    [
        (("Gemm", "Gelu"), True),
        (("Gemm", "Div", "Erf", "Add", "Mul"), True),
        (("Gemm", "Mul", "Add"), False),
        (("Gemm", "Mish"), False),
    ],
)
def test_a_spelled_out_gelu_is_one_node_or_none(operators: tuple[str, ...], integer: bool) -> None:
    text = (
        f"{ROWS} {{ a = Gemm(x, w) d = Div(a, root) e = Erf(d) s = Add(e, one) m = Mul(a, s) h = Mul(m, half) "
        "y = Gemm(h, w) }"
    )
    numbers = {"root": np.sqrt(2), "one": 1, "half": 0.5}
    constants = {"w": normal(8, 8), **{name: np.array(value, np.float32) for name, value in numbers.items()}}
    plan = plan_of(text, constants, Policy(operators=operators))
    assert [site.tensor for site in plan.activations] == ["x", "a", "h", "y"]
    if integer:
        assert not plan.float_nodes
        _, unit, _ = plan.integer_nodes
        assert (unit.op_type, unit.inputs, unit.output, len(unit.followers)) == ("Div", ("a",), "h", 4)
    else:
        assert [node.op_type for node in plan.float_nodes] == ["Div", "Erf", "Add", "Mul", "Mul"]
        runs = "Mul" in operators
        assert (reasons(plan)["Add"] == "is part of an activation function of 'a'") == runs


def test_a_polynomial_is_no_gelu() -> None:
    """It takes the error function or tanh as well."""
    text = f"{ROWS} {{ a = Gemm(x, w) m = Mul(a, a) h = Mul(a, half) s = Add(m, h) y = Gemm(s, w) }}"
    constants = {"w": normal(8, 8), "half": np.array(0.5, np.float32)}
    plan = plan_of(text, constants, Policy(operators=("Gemm", "Gelu")))
    assert [node.op_type for node in plan.float_nodes] == ["Mul", "Mul", "Add"]


SILU = Policy(operators=("Gemm", "Sigmoid", "Mul", "Tanh", "Add"))


@pytest.mark.parametrize(
    ("text", "sites", "integer"),
    [
        # One table for all of it.
        ("a = Gemm(x, w) s = Sigmoid(a) m = Mul(a, s) y = Gemm(m, w)", "x a m y", 3),
        # The gate is read elsewhere as well: two functions.
        ("a = Gemm(x, w) s = Sigmoid(a) m = Mul(a, s) h = Gemm(s, w) y = Add(m, h)", "x a s m h y", 5),
        ("a = Gemm(x, w) z = Sigmoid(a) m = Mul(a, z) y = Gemm(m, w)", "x a z m y", 4),
        # What follows in a row is a function of its own.
        ("a = Gemm(x, w) s = Sigmoid(a) t = Tanh(s) y = Gemm(t, w)", "x a s t y", 4),
        # One function of another is a function.
        ("a = Gemm(x, w) s = Sigmoid(a) m = Mul(a, s) t = Tanh(m) h = Mul(m, t) y = Add(m, h)", "x a y", 2),
        # Its middle is read elsewhere: one function ends there, and another begins.
        ("a = Gemm(x, w) s = Sigmoid(a) m = Mul(a, s) t = Tanh(m) y = Gemm(t, w) z = Gemm(m, w)", "x a m t y z", 5),
        # Constants that differ between channels make no table.
        ("a = Gemm(x, w) s = Sigmoid(a) t = Mul(s, k) m = Mul(a, t) y = Gemm(m, w)", "x a s t m y", 5),
        # Two tensors.
        ("a = Gemm(x, w) b = Gemm(x, w) s = Sigmoid(a) m = Mul(b, s) y = Gemm(m, w)", "x a b s m y", 5),
    ],
)
def test_where_activation_functions_begin_and_end(text: str, sites: str, integer: int) -> None:
    outputs = "float[] y, float[] z" if "z =" in text else "float[] y"
    plan = plan_of(f"(float[n,8] x) => ({outputs}) {{ {text} }}", {"w": normal(8, 8), "k": normal(8)}, SILU)
    assert {site.tensor for site in plan.activations} == set(sites.split())
    assert not plan.float_nodes
    assert len(plan.integer_nodes) == integer


def test_what_is_fused_does_not_stop_a_tail() -> None:
    """A bias, a clamp and the inner nodes of an activation function."""
    text = (
        f"{ROWS} {{ a = MatMul(x, w) b = Add(a, k) r = Relu(b) g = MatMul(r, w) s = Sigmoid(g) m = Mul(g, s) "
        "y = MatMul(m, w) }"
    )
    policy = Policy(operators=("MatMul", "Relu", "Sigmoid", "Mul"), fallback="float_tail")
    plan = plan_of(text, {"w": normal(8, 8), "k": normal(8)}, policy)
    assert not plan.float_nodes
    assert [node.op_type for node in plan.integer_nodes] == ["MatMul", "MatMul", "Sigmoid", "MatMul"]


def test_a_product_with_a_constant_matrix_is_a_gemm() -> None:
    text = f"{SEQUENCE} {{ a = MatMul(x, w) t = Transpose<perm = [0, 2, 1]>(a) y = MatMul(x, t) }}"
    plan = plan_of(text, {"w": normal(8, 8)}, Policy(operators=("Gemm",)))
    assert [node.output for node in plan.integer_nodes] == ["a"]
    assert reasons(plan)["MatMul"] == f"MatMul {ABSENT}"
    plan = plan_of(text, {"w": normal(8, 8)}, Policy(operators=("MatMul",)))
    assert not plan.float_nodes


def test_a_clamp_is_fused_behind_a_product_of_activations() -> None:
    text = f"{ROWS} {{ a = Gemm(x, w) b = Gemm(x, w) m = Mul(a, b) r = Relu(m) y = Gemm(r, w) }}"
    plan = plan_of(text, {"w": normal(8, 8)}, Policy(operators=("Gemm", "Mul", "Relu")))
    (node,) = (node for node in plan.integer_nodes if node.op_type == "Mul")
    assert (node.inputs, node.output, len(node.followers)) == (("a", "b"), "r", 1)
    plan = plan_of(text, {"w": normal(8, 8)}, Policy(operators=("Gemm", "Mul")))
    assert [node.op_type for node in plan.float_nodes] == ["Relu"]


def test_codes_reach_computing_nodes_through_moves() -> None:
    """Split and Gather share a grid; all of Split's outputs are quantized."""
    plan = plan_of(*NETS["split"], TFLITE)
    groups = {frozenset(tensors_of_group(plan, site.group)) for site in plan.activations}
    assert frozenset("chk") in groups
    (split,) = (node for node in plan.integer_nodes if node.op_type == "Split")
    assert split.outputs == ("h", "k")
    plan = plan_of(*NETS["gather"], TFLITE)
    assert frozenset("ah") in {frozenset(tensors_of_group(plan, site.group)) for site in plan.activations}
    text = f"{ROWS} {{ a = Gemm(x, w) h, k = Split<axis = 1>(a, sizes) y = Elu(h) }}"
    plan = plan_of(text, {"w": normal(8, 8), "sizes": np.array([4, 4])}, TFLITE)
    assert reasons(plan)["Split"] == "no integer node reads its result"


@EACH_NET
def test_the_own_plan_does_not_change(net: str) -> None:
    """What compilers run in addition stays float in the plan of onnxqt's own schemes."""
    text, constants = NETS[net]
    plan = make_plan(ingested(build(text, constants)))
    own = {"Conv", "Gemm", "MatMul", "Add", "AveragePool", "GlobalAveragePool", "Flatten", "Transpose", "Concat"}
    assert {node.op_type for node in plan.integer_nodes} <= own
    assert all(node.constant is None and node.others == () for node in plan.integer_nodes)


def test_unbounded_tensors_stay_float() -> None:
    text = "(float[n,8] x, float[n,8] mask) => (float[] y) { a = Gemm(x, w) m = Mul(a, mask) y = Gemm(m, w) }"
    model = ingested(build(text, {"w": normal(8, 8)}))
    plan = compiler_plan(model, TFLITE, ["mask"])
    assert [node.op_type for node in plan.integer_nodes] == ["Gemm", "Gemm"]
    assert plan.unbounded == ("mask",)


# --- grids as data ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("signed", "bits", "narrow"), list(itertools.product((True, False), (4, 8, 16), (True, False)))
)
def test_grids_of_a_policy(signed: bool, bits: int, narrow: bool) -> None:
    policy = Policy(signed=signed, narrow=narrow and signed, power_of_two="activations", per_channel=False)
    grids = grids_of(policy, Precision(4, bits))
    narrow = narrow and signed and bits <= 8
    assert grids.activation == Grid(bits, signed, narrow)
    assert grids.io == Grid(max(8, bits), signed, narrow)
    assert grids.weight == Grid(4, True, True)
    assert grids.activation_placement.symmetric == (signed and bits == 16)
    assert (grids.activation_placement.power_of_two, grids.weight_placement.power_of_two) == (True, False)
    assert not grids.per_channel


def test_an_integer_node_lists_all_its_outputs() -> None:
    assert IntegerNode("n", "Split", ("x",), "a", others=("b", "c")).outputs == ("a", "b", "c")
