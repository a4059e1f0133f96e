"""Equalization: the same function, equal ranges, and only where both are certain."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pytest
from helpers import build, ingested, inputs_of, normal, run
from onnx import ModelProto, TensorProto

from onnxqt.errors import ModelError
from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.ptq import Pair, equalize, find_pairs

UNIT = 2.0**-24  # of float32 rounding
SETTLED = 1.001  # the rounds end where no scale changes by 1e-4; a chain is then that far from its limit, times a few
POOL = 64  # more than the values that any pool here averages


@dataclass(frozen=True)
class Net:
    """A graph with the pairs of layers that it has."""

    text: str
    constants: Mapping[str, Array]
    pairs: tuple[tuple[str, str], ...] = ()  # their weights
    repeat: int = 1
    opset: int = 17


def weight(*shape: int, seed: int = 0, axis: int = 0) -> Array:
    """A weight whose channels along `axis` are log-uniform between 1/16 and 16 times as large as each other."""
    rng = np.random.default_rng(seed)
    factors = 16 ** rng.uniform(-1, 1, shape[axis])
    return (rng.normal(size=shape) * factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])).astype("f4")


IMAGE = "(float[n,4,8,8] x) => (float[] y)"
ROWS = "(float[n,8] x) => (float[] y)"
CONVS = {"w": weight(6, 4, 3, 3), "b": normal(6, seed=1), "v": normal(5, 6, 1, 1, seed=2), "c": normal(5, seed=3)}
GEMMS = {"w": weight(8, 6, axis=1), "b": normal(6, seed=1), "v": normal(6, 5, seed=2)}
PAIR = (("w", "v"),)


def between(*nodes: str) -> str:
    """Two convolutions with nodes between them that read h and give out z."""
    return f"{IMAGE} {{ h = Conv<kernel_shape = [3, 3]>(x, w, b) {' '.join(nodes)} y = Conv(z, v, c) }}"


NETS = {
    "conv-relu-conv": Net(between("z = Relu(h)"), CONVS, PAIR),
    "nothing-between": Net(f"{IMAGE} {{ h = Conv(x, w, b) y = Conv(h, v, c) }}", CONVS, PAIR),
    "leaky-relu": Net(between("z = LeakyRelu<alpha = 0.1>(h)"), CONVS, PAIR),
    "prelu": Net(between("z = PRelu(h, p)"), {**CONVS, "p": np.linspace(-1, 1, 6, dtype="f4").reshape(6, 1, 1)}, PAIR),
    "max-pool": Net(between("r = Relu(h)", "z = MaxPool<kernel_shape = [2, 2], pads = [1, 0, 0, 1]>(r)"), CONVS, PAIR),
    "average-pool": Net(between("z = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(h)"), CONVS, PAIR),
    "global-average-pool": Net(between("r = Relu(h)", "z = GlobalAveragePool(r)"), CONVS, PAIR),
    "reduce-mean": Net(between("z = ReduceMean<axes = [2, -1]>(h)"), CONVS, PAIR),
    "zero-pad": Net(between("z = Pad(h, pads)"), {**CONVS, "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64)}, PAIR),
    "reflecting-pad": Net(
        between('z = Pad<mode = "reflect">(h, pads)'),
        {**CONVS, "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64)},
        (),  # positively homogeneous, but not what the tables name
    ),
    "grouped": Net(
        f"{IMAGE} {{ h = Conv<group = 2>(x, w, b) z = Relu(h) y = Conv<group = 3>(z, v, c) }}",
        {"w": weight(6, 2, 3, 3), "b": normal(6, seed=1), "v": normal(9, 2, 1, 1, seed=2), "c": normal(9, seed=3)},
        PAIR,
    ),
    "depthwise-chain": Net(
        f"{IMAGE} {{ h = Conv(x, w, b) r = Relu(h) d = Conv<group = 6>(r, u, a) s = Relu(d) y = Conv(s, v, c) }}",
        {**CONVS, "u": weight(6, 1, 3, 3, seed=5), "a": normal(6, seed=6)},
        (("w", "u"), ("u", "v")),
    ),
    "transposed": Net(
        f"{IMAGE} {{ h = ConvTranspose<group = 2, strides = [2, 2]>(x, w, b) z = Relu(h) "
        "y = ConvTranspose<group = 3>(z, v) }",
        {"w": weight(4, 3, 3, 3, axis=1), "b": normal(6, seed=1), "v": normal(6, 2, 2, 2, seed=2)},
        PAIR,
    ),
    "flattened": Net(
        "(float[n,4,4,4] x) => (float[] y) { h = Conv(x, w, b) r = Relu(h) f = Flatten(r) y = Gemm(f, v) }",
        {**CONVS, "v": normal(24, 5, seed=2)},
        PAIR,
        repeat=4,
    ),
    "pooled-and-reshaped": Net(
        f"{IMAGE} {{ h = Conv(x, w, b) g = GlobalAveragePool(h) f = Reshape(g, shape) y = Gemm<transB = 1>(f, v) }}",
        {**CONVS, "shape": np.array([0, -1], np.int64), "v": normal(5, 6, seed=2)},
        PAIR,
    ),
    "gemm": Net(f"{ROWS} {{ h = Gemm(x, w, b) z = Relu(h) y = Gemm(z, v) }}", GEMMS, PAIR),
    "gemm-transposed-without-bias": Net(
        f"{ROWS} {{ h = Gemm<transB = 1>(x, w) y = Gemm(h, v) }}", {**GEMMS, "w": weight(6, 8)}, PAIR
    ),
    "matmul": Net(
        "(float[n,3,8] x) => (float[] y) { m = MatMul(x, w) h = Add(b, m) z = Relu(h) y = MatMul(z, v) }", GEMMS, PAIR
    ),
}
EACH_NET = pytest.mark.parametrize("name", NETS)


def weights_of(pair: Pair) -> tuple[str, str]:
    return pair.first.weight, pair.second.weight


def constants(model: Model) -> dict[str, Array]:
    return {name: np.asarray(model.graph.constant(name)) for name in model.graph.initializers}


def built(net: Net) -> ModelProto:
    return build(net.text, net.constants, net.opset)


@EACH_NET
def test_the_pairs_are_found(name: str) -> None:
    pairs = find_pairs(ingested(built(NETS[name])))
    assert tuple(map(weights_of, pairs)) == NETS[name].pairs
    assert all(pair.repeat == NETS[name].repeat for pair in pairs)


@EACH_NET
def test_the_function_stays_the_same(name: str) -> None:
    """The bound: a sum of n products errs by at most (n + 1) units of the sum of their magnitudes (Higham 2002,
    equation 3.4), a scaled weight by one more; both models err, and errors grow as the network of magnitudes does.
    """
    model = ingested(built(NETS[name]))
    before = model.proto.SerializeToString()
    equalized = equalize(model)
    assert model.proto.SerializeToString() == before
    inputs = inputs_of(model.proto, batch=8)
    magnitudes = model.with_weights({n: np.abs(v) for n, v in constants(model).items() if v.dtype == np.float32})
    limits = run(magnitudes.proto, {n: np.abs(v) for n, v in inputs.items()})["y"]
    terms = sum(math.prod(v.shape) / min(v.shape[:2]) + 3 for v in constants(model).values() if v.ndim > 1)
    bound = 2 * UNIT * (terms + POOL) * limits.max()
    expected, actual = run(model.proto, inputs)["y"], run(equalized.model.proto, inputs)["y"]
    assert np.abs(actual - expected).max() <= bound
    assert bound < 1e-2 * np.abs(expected).max()  # so a wrong scale shows


@pytest.mark.parametrize("name", [name for name in NETS if NETS[name].pairs])
def test_the_channels_of_a_pair_have_equal_ranges(name: str) -> None:
    net = NETS[name]
    model = ingested(build(net.text, {n: v * 0 if n in ("a", "b") else v for n, v in net.constants.items()}))
    equalized = equalize(model)
    for pair in equalized.pairs:
        r1, r2 = ranges(equalized.model, pair)
        assert np.maximum(r1 / r2, r2 / r1).max() < SETTLED
        r1, r2 = ranges(model, pair)
        assert np.maximum(r1 / r2, r2 / r1).max() > 1.5


def ranges(model: Model, pair: Pair) -> tuple[Array, Array]:
    """Largest magnitudes of each channel, read off the weights as the operators define them."""
    found = []
    for layer, is_output in ((pair.first, True), (pair.second, False)):
        node = next(n for n in model.graph.nodes if n.name == layer.node)
        values = np.abs(np.asarray(model.graph.constant(layer.weight)))
        group = node.attributes.get("group", 1)
        if node.op_type in ("Gemm", "MatMul"):
            values = values if node.attributes.get("transB", 0) else values.T
            found.append(values.max(axis=1 if is_output else 0))
            continue
        values = values.reshape(*values.shape[:2], -1).max(axis=2)
        parts = np.split(values, group)
        along_first = (node.op_type == "Conv") == is_output
        found.append(np.concatenate([part.max(axis=1 if along_first else 0) for part in parts]))
    first, second = found
    return first, second.reshape(len(first), -1).max(axis=1)


def test_the_scale_is_the_one_of_the_paper() -> None:
    model = ingested(built(NETS["gemm"]))
    (scale,) = equalize(model).scales
    r1, r2 = np.abs(GEMMS["w"]).max(axis=0), np.abs(GEMMS["v"]).max(axis=1)
    assert (np.abs(GEMMS["b"]) < 32 * r1).all()  # the weights decide, not the bias
    np.testing.assert_allclose(scale, np.sqrt(r1 * r2) / r2, rtol=4 * UNIT)  # r1 and r2 are float32


def test_scales_that_were_put_in_come_out_again() -> None:
    """The scales of both models lead to the same weights; each weight was rounded once on the way in."""
    net = NETS["conv-relu-conv"]
    factors = (8 ** np.random.default_rng(7).uniform(-1, 1, 6)).astype("f4")
    ill = {
        **net.constants,
        "w": CONVS["w"] * factors.reshape(6, 1, 1, 1),
        "b": CONVS["b"] * factors,
        "v": CONVS["v"] / factors.reshape(1, 6, 1, 1),
    }
    well = constants(equalize(ingested(built(net))).model)
    undone = constants(equalize(ingested(build(net.text, ill))).model)
    for name in ("w", "b", "v"):
        np.testing.assert_allclose(undone[name], well[name], rtol=8 * UNIT)


@pytest.mark.parametrize(("tensor", "size"), [("w", 0.0), ("v", 0.0), ("w", 1e-30), ("v", 1e-30)])
def test_channels_of_zeros_stay_as_they_are(tensor: str, size: float) -> None:
    values = {**CONVS, "b": CONVS["b"] * (np.arange(6, dtype="f4") != 2)}
    values[tensor] = values[tensor].copy()
    values[tensor][(2,) if tensor == "w" else (slice(None), 2)] *= np.float32(size)
    equalized = equalize(ingested(build(NETS["conv-relu-conv"].text, values)))
    (scale,) = equalized.scales
    assert scale[2] == 1
    assert np.count_nonzero(scale == 1) == 1
    assert all(np.isfinite(value).all() for value in constants(equalized.model).values())


def test_a_layer_of_zeros_stays_as_it_is() -> None:
    equalized = equalize(
        ingested(build(NETS["conv-relu-conv"].text, {**CONVS, "w": CONVS["w"] * 0, "b": CONVS["b"] * 0}))
    )
    assert (equalized.scales[0] == 1).all()


@pytest.mark.parametrize("size", [1e-4, 1e-30, 0.0])
def test_a_bias_that_makes_the_range_counts_as_a_weight(size: float) -> None:
    values = dict(CONVS)
    values["w"] = values["w"].copy()
    values["w"][2] *= np.float32(size)
    values["b"] = np.full(6, 2, np.float32)
    (scale,) = equalize(ingested(build(NETS["conv-relu-conv"].text, values))).scales
    r2 = np.abs(values["v"][:, 2]).max()
    np.testing.assert_allclose(scale[2], np.sqrt(2 / 32 / r2), rtol=4 * UNIT)


@dataclass(frozen=True)
class Refused:
    """A graph without a pair, for one reason."""

    text: str
    constants: Mapping[str, Array] = field(default_factory=lambda: CONVS)


REFUSED = {
    "clip": Refused(
        between("z = Clip(h, low, high)"), {**CONVS, "low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    ),
    "hard-swish": Refused(between("z = HardSwish(h)")),
    "sigmoid": Refused(between("z = Sigmoid(h)")),
    "constant-pad": Refused(
        between("z = Pad(h, pads, value)"),
        {**CONVS, "pads": np.array([0, 0, 1, 0, 0, 0, 0, 2], np.int64), "value": np.array(1, np.float32)},
    ),
    "padded-channels": Refused(
        between("z = Pad(h, pads)"),
        {**CONVS, "pads": np.array([0, 1, 0, 0, 0, 2, 0, 0], np.int64), "v": normal(5, 9, 1, 1)},
    ),
    "read-twice": Refused(
        "(float[n,4,8,8] x) => (float[] y, float[] q) { h = Conv(x, w, b) z = Relu(h) y = Conv(z, v, c) q = Exp(h) }"
    ),
    "given-out": Refused("(float[n,4,8,8] x) => (float[] y, float[] h) { h = Conv(x, w, b) y = Conv(h, v, c) }"),
    "shared-weight": Refused(
        "(float[n,4,8,8] x) => (float[] y, float[] q) { h = Conv(x, w, b) q = Conv(x, w) y = Conv(h, v, c) }"
    ),
    "shared-bias": Refused(
        f"{IMAGE} {{ h = Conv(x, w, b) y = Conv(h, v, b) }}", {**CONVS, "v": normal(6, 6, 1, 1, seed=2)}
    ),
    "bias-of-one-value": Refused(
        f"{ROWS} {{ h = Gemm(x, w, b) y = Gemm(h, v) }}", {**GEMMS, "b": np.ones(1, np.float32)}
    ),
    "bias-per-position": Refused(
        "(float[n,3,8] x) => (float[] y) { m = MatMul(x, w) h = Add(m, b) y = MatMul(h, v) }",
        {**GEMMS, "b": normal(3, 6)},
    ),
    "stack-of-matrices": Refused(
        "(float[n,3,5,8] x) => (float[] y) { h = MatMul(x, w) y = MatMul(h, v) }", {**GEMMS, "w": normal(3, 8, 6)}
    ),
    "channels-along-another-axis": Refused(
        "(float[n,4,8,6] x) => (float[] y) { h = Conv(x, w) y = MatMul(h, v) }",
        {"w": normal(6, 4, 3, 1), "v": normal(6, 5)},
    ),
    "reduced-channels": Refused(
        f"{IMAGE} {{ h = Conv(x, w, b) m = ReduceMean<axes = [1]>(h) y = Conv(m, v) }}",
        {**CONVS, "v": normal(5, 1, 1, 1)},
    ),
    "weight-at-run-time": Refused(
        "(float[n,4,8,8] x, float[6,4,3,3] k) => (float[] y) { h = Conv(x, k, b) y = Conv(h, v, c) }"
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_there_is_no_pair(name: str) -> None:
    case = REFUSED[name]
    model = ingested(build(case.text, case.constants))
    assert find_pairs(model) == ()
    assert equalize(model).model.proto == model.proto


def test_only_the_given_pairs_are_equalized() -> None:
    model = ingested(built(NETS["depthwise-chain"]))
    pair = find_pairs(model)[1]
    before, after = constants(model), constants(equalize(model, [pair]).model)
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"u", "a", "v"}


def test_a_model_with_weights_in_other_files_is_refused() -> None:
    proto = built(NETS["gemm"])
    proto.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(
        ModelError, match="equalization, learned rounding and bias correction take models of at most 2 GB"
    ):
        equalize(Model(proto, ""))
