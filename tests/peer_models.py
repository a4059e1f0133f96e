"""Small models on which quantizers of ONNX files are known to fail, with samples for them and what to expect.

Each stands for one defect: a model that came out wrong, was refused, or had a part left float without a word.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx
from helpers import batch_norm, build, normal
from onnx import ModelProto, helper, numpy_helper

from onnxqt.numerics import Array, FloatArray

FREE_SIZE = 8  # of every free dimension but the batch


@dataclass(frozen=True)
class PeerModel:
    """A model in ONNX text and what is expected of it.

    Attributes:
        text: the graph, see `helpers.build`.
        integer: operators of the integer nodes, in the plan's order.
        constants: initializers by name.
        floats: operators that stay float, with the reason.
        scales: largest magnitudes of inputs where they are not 1.
        opset: of the file.
        change: what text cannot say.
        parts: sizes along axis 1 of the parts of the first output that are judged by themselves.
        untrained: what the message says where training refuses the model.
    """

    text: str
    integer: str
    constants: Mapping[str, Array] = field(default_factory=dict)
    floats: Mapping[str, str] = field(default_factory=dict)
    scales: Mapping[str, float] = field(default_factory=dict)
    opset: int = 17
    change: Callable[[ModelProto], None] = lambda model: None
    parts: tuple[int, ...] = ()
    untrained: str = ""

    def proto(self) -> ModelProto:
        """The model."""
        model = build(self.text, self.constants, self.opset)
        self.change(model)
        onnx.checker.check_model(model)
        return model


def samples(case: PeerModel, model: ModelProto, count: int, seed: int, free: int = FREE_SIZE) -> dict[str, Array]:
    """Values for every input that is no initializer, `count` samples of them.

    Floats are uniform and bounded, like pixels; integers from 0 to 3.
    """
    rng = np.random.default_rng(seed)
    stored = {tensor.name for tensor in model.graph.initializer}
    values: dict[str, Array] = {}
    for value in model.graph.input:
        if value.name in stored:
            continue
        shape = [count, *(dim.dim_value or free for dim in value.type.tensor_type.shape.dim[1:])]
        dtype = helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        real = rng.uniform(-1, 1, shape) * case.scales.get(value.name, 1.0)
        whole = rng.integers(0, 4, shape)
        values[value.name] = (real if np.issubdtype(dtype, np.floating) else whole).astype(dtype)
    return values


def weight(*shape: int, seed: int = 0) -> FloatArray:
    """Normally distributed weights with a variance of 1 / (number of values but for the largest axis)."""
    spread = np.sqrt(np.prod(shape) / max(shape))
    return normal(*shape, seed=seed) / np.float32(spread)


def _skewed(*shape: int, seed: int = 0) -> FloatArray:
    """Weights whose magnitude grows by 4 along each axis, so that scales of another axis show."""
    value = weight(*shape, seed=seed)
    for axis, size in enumerate(shape):
        factors = np.linspace(0.5, 2, size, dtype=np.float32)
        value = value * factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    return value


def _inputs_of_initializers(model: ModelProto) -> None:
    """As IR version 3 wants it: every initializer is an input too."""
    model.ir_version = 3
    model.graph.input.extend(
        helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in model.graph.initializer
    )


def _constant_nodes(model: ModelProto) -> None:
    """Every initializer becomes a Constant node."""
    nodes = [
        helper.make_node("Constant", [], [tensor.name], value=numpy_helper.from_array(numpy_helper.to_array(tensor)))
        for tensor in model.graph.initializer
    ]
    body = [*nodes, *model.graph.node]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(body)


def _unnamed(model: ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""


def f32(*values: float) -> FloatArray:
    """A vector of float32."""
    return np.array(values, np.float32)


def i64(*values: int) -> Array:
    """A vector of int64."""
    return np.array(values, np.int64)


def scalar(value: float) -> FloatArray:
    """A float32 of no dimensions."""
    return np.array(value, np.float32)


IMAGE = "(float[n,4,8,8] x) => (float[] y)"
ROWS = "(float[n,8] x) => (float[] y)"
TOKENS = "(float[n,5,8] x) => (float[] y)"
PADDED = "<pads = [1, 1, 1, 1]>"
W = {"w": weight(6, 4, 3, 3), "b": 0.3 * normal(6, seed=1), "v": weight(4, 6, 3, 3, seed=2), "k": weight(4, 6, 1, 1)}
FC = {"w": _skewed(8, 5), "b": normal(5, seed=1)}
FC_T = {"w": _skewed(5, 8), "b": normal(5, seed=1)}
NO_FORM = "no integer form"
APART = "stands between float nodes"
UNREAD = "no integer node reads its result"


def _gemm(attributes: str, bias: Array | None = None, transposed: bool = False, **expected: str) -> PeerModel:
    """A Gemm with these attributes and constant C, between two others."""
    constants: dict[str, Array] = {"w": (FC_T if transposed else FC)["w"], "last": weight(5, 3, seed=5)}
    operands = "x, w"
    if bias is not None:
        constants["c"], operands = bias, "x, w, c"
    text = f"{ROWS} {{ g = Gemm<{attributes}>({operands}) y = Gemm(g, last) }}"
    return PeerModel(text, "Gemm Gemm", constants, expected)


GEMMS = {
    "gemm-beta": _gemm("beta = 3.5", normal(5, seed=1)),
    "gemm-beta-zero": _gemm("beta = 0.0", normal(5, seed=1)),
    "gemm-alpha": _gemm("alpha = 0.2", normal(5, seed=1)),
    "gemm-alpha-without-c": _gemm("alpha = 0.2"),
    "gemm-alpha-beta": _gemm("alpha = 0.2, beta = 1.7", normal(5, seed=1)),
    "gemm-transb": _gemm("transB = 1", normal(5, seed=1), transposed=True),
    "gemm-alpha-beta-transb": _gemm("alpha = 0.2, beta = 1.7, transB = 1", normal(5, seed=1), transposed=True),
    "gemm-c-scalar": _gemm("beta = 1.0", scalar(1.5)),
    "gemm-c-1": _gemm("beta = 0.5", f32(1.5)),
    "gemm-c-1-n": _gemm("beta = 0.5", normal(1, 5, seed=1)),
    "gemm-c-1-1": _gemm("beta = 0.5", normal(1, 1, seed=1)),
}
_FIXED = "(float[4,8] x) => (float[] y) { g = Gemm<beta = 0.5>(x, w, c) y = Gemm(g, v) }"
GEMMS["gemm-c-m-1"] = PeerModel(
    _FIXED, "Gemm", {**FC, "c": normal(4, 1, seed=1), "v": weight(5, 3)}, {"Gemm": "the bias differs between rows"}
)
GEMMS["gemm-c-m-n"] = PeerModel(
    _FIXED, "Gemm", {**FC, "c": normal(4, 5, seed=1), "v": weight(5, 3)}, {"Gemm": "the bias differs between rows"}
)
_TRANSPOSED_A = (
    "{ t = Transpose<perm = [1, 0]>(x) g = Gemm<transA = 1, alpha = 0.5, beta = 2.0%s>(t, w, b) y = Gemm(g, v) }"
)
GEMMS["gemm-transa"] = PeerModel(ROWS + _TRANSPOSED_A % "", "Transpose Transpose Gemm Gemm", {**FC, "v": weight(5, 3)})
GEMMS["gemm-transa-transb"] = PeerModel(
    ROWS + _TRANSPOSED_A % ", transB = 1",
    "Transpose Transpose Gemm Gemm",
    {**FC_T, "v": weight(5, 3)},
)
GEMMS["gemm-computed-c"] = PeerModel(
    f"{ROWS} {{ c = Gemm(x, v) g = Gemm<beta = 0.5>(x, w, c) y = Gemm(g, u) }}",
    "Gemm Gemm",
    {"w": FC["w"], "v": weight(8, 5, seed=2), "u": weight(5, 3)},
    {"Gemm": "alpha or beta scales a computed operand"},
)
GEMMS["gemm-computed-bias"] = PeerModel(
    f"{ROWS} {{ c = Gemm(x, v) g = Gemm(x, w, c) y = Gemm(g, u) }}",
    "Gemm Gemm",
    {"w": FC["w"], "v": weight(8, 5, seed=2), "u": weight(5, 3)},
    {"Gemm": "the bias is computed at run time"},
)

WEIGHTS = {
    **{
        f"grouped-convtranspose-{group}": PeerModel(
            f"(float[n,6,5,5] x) => (float[] y) {{ c = ConvTranspose<group = {group}, strides = [2, 2]>(x, w, b) "
            "r = Relu(c) y = Conv(r, v) }",
            "ConvTranspose Conv",
            {
                "w": weight(6, channels, 3, 3) * np.linspace(0.1, 2, channels, dtype=np.float32).reshape(-1, 1, 1),
                "b": normal(group * channels, seed=1),
                "v": weight(4, group * channels, 1, 1, seed=2),
            },
            untrained="ConvTranspose",
        )
        for group, channels in ((1, 4), (2, 4), (3, 5))
    },
    "grouped-conv": PeerModel(
        f"{IMAGE} {{ c = Conv<group = 2>(x, w, b) r = Relu(c) y = Conv<group = 3>(r, v) }}",
        "Conv Conv",
        {"w": _skewed(6, 2, 3, 3), "b": normal(6, seed=1), "v": _skewed(9, 2, 3, 3, seed=2)},
    ),
    "batched-matmul-weight": PeerModel(
        "(float[n,3,5,8] x) => (float[] y) { m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v) }",
        "MatMul MatMul",
        {"w": _skewed(3, 8, 6), "b": normal(6, seed=1), "v": _skewed(3, 6, 4, seed=2)},
    ),
    "matmul-bias": PeerModel(
        f"{TOKENS} {{ m = MatMul(x, w) a = Add(b, m) r = Relu(a) n = MatMul(r, v) y = Add(n, c) }}",
        "MatMul MatMul",
        {"w": _skewed(8, 6), "b": normal(6, seed=1), "v": weight(6, 4, seed=2), "c": normal(4, seed=3)},
    ),
    "matmul-2d-bias": PeerModel(
        f"{ROWS} {{ m = MatMul(x, w) a = Add(m, b) y = MatMul(a, v) }}",
        "MatMul MatMul",
        {"w": _skewed(8, 6), "b": normal(1, 6, seed=1), "v": weight(6, 4, seed=2)},
    ),
    "matmul-bias-per-token": PeerModel(
        f"{TOKENS} {{ m = MatMul(x, w) a = Add(m, b) y = MatMul(a, v) }}",
        "MatMul MatMul",
        {"w": _skewed(8, 6), "b": normal(5, 6, seed=1), "v": weight(6, 4, seed=2)},
        {"Add": "an operand is constant"},
    ),
    "gemm-weight-along-both-axes": PeerModel(
        "(float[n,8] x) => (float[] y, float[] z) { y = Gemm(x, w) z = Gemm<transB = 1>(x, w) }",
        "Gemm Gemm",
        {"w": _skewed(8, 8)},
    ),
    "square-gemm-transb": PeerModel(
        f"{ROWS} {{ g = Gemm<transB = 1>(x, w, b) y = Gemm<transB = 1>(g, v) }}",
        "Gemm Gemm",
        {"w": _skewed(8, 8), "b": normal(8, seed=1), "v": _skewed(8, 8, seed=2)},
    ),
    "square-conv": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w) r = Relu(c) y = Conv(r, v) }}",
        "Conv Conv",
        {"w": _skewed(4, 4, 3, 3), "v": _skewed(4, 4, 3, 3, seed=1)},
    ),
    "tied-embedding": PeerModel(
        "(int64[n,5] x) => (float[] y) { e = Gather(w, x) h = MatMul(e, v) t = Transpose(w) y = MatMul(h, t) }",
        "MatMul MatMul",
        {"w": weight(7, 8), "v": weight(8, 8, seed=1)},
        {"Gather": NO_FORM},
    ),
    "conv-and-gemm-share-a-weight": PeerModel(
        """(float[n,4,3,3] x) => (float[] y) { c = Conv(x, w) r = Relu(c) g = GlobalAveragePool(c) f = Flatten(g)
        m = Reshape(w, s) d = Gemm(f, m) z = Reshape(d, q) a = Conv(z, w) y = Add(r, a) }""",
        "Conv Relu GlobalAveragePool Flatten Gemm Reshape Conv Add",
        {"w": _skewed(6, 4, 1, 1), "s": i64(6, 4), "q": i64(-1, 4, 1, 1)},
    ),
    "conv-and-matmul-share-a-weight": PeerModel(
        "(float[n,1,5,4] x, float[n,4,16] z) => (float[] y, float[] u) { y = MatMul(x, w) u = Conv(z, w) }",
        "MatMul Conv",
        {"w": _skewed(6, 4, 3)},
    ),
    "weight-that-is-a-bias-too": PeerModel(
        "(float[n,1] x, float[n,8] z) => (float[] y) { g = Gemm(x, w) h = Gemm(z, v, w) y = Add(g, h) }",
        "Gemm Gemm Add",
        {"w": weight(1, 5), "v": weight(8, 5, seed=3)},
    ),
    "shared-bias": PeerModel(
        "(float[n,8] x, float[n,8] z) => (float[] y, float[] u) { y = Gemm(x, w, b) u = Gemm(z, v, b) }",
        "Gemm Gemm",
        {"w": weight(8, 5), "v": 7 * weight(8, 5, seed=1), "b": 3 * normal(5, seed=2)},
        scales={"z": 0.1},
    ),
    "bias-beyond-int32": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) y = Conv(c, k) }}",
        "Conv Conv",
        {
            "w": weight(6, 4, 3, 3) * f32(1e-6, 1, 1, 1e-7, 1, 1).reshape(-1, 1, 1, 1),
            "b": f32(2, 1, -1, 1, 0.5, -0.2),
            "k": W["k"],
        },
        scales={"x": 0.01},
    ),
    "channel-of-zeros": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}",
        "Conv Conv",
        {**W, "w": W["w"] * f32(1, 0, 1, 1, 0, 1).reshape(-1, 1, 1, 1)},
    ),
    "constant-node-conv": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}", "Conv Conv", W, change=_constant_nodes
    ),
    "constant-node-matmul": PeerModel(
        f"{TOKENS} {{ m = MatMul(x, w) a = Add(m, b) r = Relu(a) y = MatMul(r, v) }}",
        "MatMul MatMul",
        {"w": _skewed(8, 6), "b": normal(6, seed=1), "v": weight(6, 4, seed=2)},
        change=_constant_nodes,
    ),
    "first-layer-of-1-channel": PeerModel(
        "(float[n,1,8,8] x) => (float[] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        "Conv Conv",
        {**W, "w": weight(6, 1, 3, 3)},
    ),
    "first-layer-of-3-channels": PeerModel(
        "(float[n,3,8,8] x) => (float[] y) { c = Conv<strides = [2, 2]>(x, w, b) r = Relu(c) y = Conv(r, v) }",
        "Conv Conv",
        {**W, "w": weight(6, 3, 3, 3)},
    ),
}

NORMS = {
    "batch-norm-behind-conv": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n) y = Conv(r, v) }}",
        "Conv Conv",
        {**W, **batch_norm(6)},
    ),
    "batch-norm-before-conv": PeerModel(
        f"{IMAGE} {{ n = BatchNormalization(x, gamma, beta, mean, var) y = Conv(n, w, b) }}",
        "Conv",
        {**W, **batch_norm(4)},
    ),
    "batch-norm-behind-relu": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) n = BatchNormalization(r, gamma, beta, mean, var) y = Conv(n, v) }}",
        "Conv Conv",
        {**W, **batch_norm(6)},
    ),
    "batch-norm-behind-matmul": PeerModel(
        f"{ROWS} {{ m = MatMul(x, w) n = BatchNormalization(m, gamma, beta, mean, var) y = MatMul(n, v) }}",
        "MatMul MatMul",
        {"w": _skewed(8, 6), "v": weight(6, 3), **batch_norm(6)},
    ),
    "batch-norm-before-padded-conv": PeerModel(
        f"{IMAGE} {{ n = BatchNormalization(x, gamma, beta, mean, var) y = Conv{PADDED}(n, w, b) }}",
        "Conv",
        {**W, **batch_norm(4)},
        {"Mul": NO_FORM, "Add": "an operand is constant"},
    ),
    "layer-norm-decomposed": PeerModel(
        f"""{TOKENS} {{ m = ReduceMean<axes = [-1]>(x) d = Sub(x, m) p = Pow(d, two) s = ReduceMean<axes = [-1]>(p)
        e = Add(s, eps) q = Sqrt(e) n = Div(d, q) g = Mul(n, gain) a = Add(g, shift)
        h = MatMul(a, w) y = Add(h, b) }}""",
        "MatMul",
        {
            **{"two": scalar(2), "eps": scalar(1e-5), "gain": normal(8, seed=4), "shift": normal(8, seed=5)},
            **{"w": weight(8, 6), "b": normal(6)},
        },
        {"LayerNormalization": NO_FORM},
    ),
    "layer-norm": PeerModel(
        f"{TOKENS} {{ n = LayerNormalization(x, gain, shift) h = MatMul(n, w) a = Add(h, b) y = MatMul(a, v) }}",
        "MatMul MatMul",
        {
            **{"gain": normal(8, seed=4), "shift": normal(8, seed=5)},
            **{"w": weight(8, 6), "b": normal(6), "v": weight(6, 4, seed=2)},
        },
        {"LayerNormalization": NO_FORM},
    ),
    "gelu-decomposed": PeerModel(
        f"""{TOKENS} {{ h = MatMul(x, w) a = Add(h, b) d = Div(a, root) e = Erf(d) o = Add(e, one) m = Mul(a, o)
        g = Mul(m, half) y = MatMul(g, v) }}""",
        "MatMul MatMul",
        {
            **{"root": scalar(2**0.5), "one": scalar(1), "half": scalar(0.5)},
            **{"w": weight(8, 6), "b": normal(6), "v": weight(6, 4, seed=2)},
        },
        {**dict.fromkeys(("Div", "Erf", "Mul"), NO_FORM), "Add": "an operand is constant"},
    ),
    "gelu": PeerModel(
        f"{TOKENS} {{ h = MatMul(x, w) a = Add(h, b) g = Gelu(a) y = MatMul(g, v) }}",
        "MatMul MatMul",
        {"w": weight(8, 6), "b": normal(6), "v": weight(6, 4, seed=2)},
        {"Gelu": NO_FORM},
        opset=20,
        untrained="Gelu",
    ),
}

_CLIP = {"lo": scalar(-0.5), "hi": scalar(0.8)}
_COUNT = {"times": np.array(3, np.int64), "yes": np.array(True)}

STRUCTURES = {
    "if-body": PeerModel(
        f"""{IMAGE} {{ c = Conv(x, w, b) m = ReduceMean<keepdims = 0>(x) t = Greater(m, zero)
        i = If(t) <then_branch = p () => (float[n,6,6,6] p) {{ p = Relu(c) }},
                   else_branch = q () => (float[n,6,6,6] q) {{ q = Conv(c, k) }}> a = Add(c, i) y = Conv(a, v) }}""",
        "Conv Add Conv",
        {**W, "zero": scalar(0), "k": weight(6, 6, 1, 1, seed=4)},
        {"ReduceMean": UNREAD, "Greater": "computes shapes or indices", "If": NO_FORM},
        untrained="If",
    ),
    "loop-body": PeerModel(
        """(float[n,4,8,8] x) => (float[n,4,4,4] y) { c = Conv(x, w, b) s = Mul(c, zero)
        l = Loop(times, yes, s) <body = body (int64 i, bool go, float[n,6,6,6] old) => (bool on, float[n,6,6,6] new)
            { on = Identity(go) f = Conv(old, k) new = Add(f, c) }>
        r = Relu(l) y = Conv(r, v) }""",
        "Conv Conv",
        {**W, **_COUNT, "zero": scalar(0), "k": 0.3 * weight(6, 6, 1, 1, seed=4)},
        {"Mul": NO_FORM, "Loop": NO_FORM, "Relu": APART},
        untrained="Loop",
    ),
    "scan": PeerModel(
        """(float[n,5,8] x) => (float[] y) { h = MatMul(x, w) t = Transpose<perm = [1, 0, 2]>(h) f = ReduceSum(h, one)
        z = Squeeze(f, one) last, all = Scan<num_scan_inputs = 1, body = body (float[n,6] old, float[n,6] now)
            => (float[n,6] new, float[n,6] out) { s = Add(old, now) new = Tanh(s) out = MatMul(new, k) }>(z, t)
        u = Transpose<perm = [1, 0, 2]>(all) y = MatMul(u, v) }""",
        "MatMul MatMul",
        {"w": weight(8, 6), "k": weight(6, 6, seed=4), "v": weight(6, 4, seed=2), "one": i64(1)},
        {"Scan": NO_FORM, "ReduceSum": NO_FORM, "Squeeze": APART, "Transpose": APART},
        untrained="Scan",
    ),
    "concat-of-unlike-ranges": PeerModel(
        f"{IMAGE} {{ a = Conv(x, w) b = Conv(x, small) c = Concat<axis = 1>(a, b) y = Conv(c, v) }}",
        "Conv Conv Concat Conv",
        {"w": 1.2 * weight(5, 4, 3, 3), "small": 0.1 * weight(3, 4, 3, 3, seed=2), "v": weight(4, 8, 1, 1, seed=3)},
    ),
    "concat-of-concats": PeerModel(
        f"""{IMAGE} {{ a = Conv(x, w) b = Conv(x, small) s = Sigmoid(b) c = Concat<axis = 1>(b, s)
        d = Concat<axis = 1>(s, a) e = Concat<axis = 1>(c, d) y = Conv(e, v) }}""",
        "Conv Conv Concat Concat Concat Conv",
        {"w": weight(5, 4, 3, 3), "small": weight(3, 4, 3, 3, seed=2), "v": weight(4, 14, 1, 1, seed=3)},
        {"Sigmoid": NO_FORM},
    ),
    "softmax-output": PeerModel(
        f"{ROWS} {{ g = Gemm(x, w, b) r = Relu(g) h = Gemm(r, v) y = Softmax(h) }}",
        "Gemm Gemm",
        {"w": weight(8, 12), "b": normal(12, seed=1), "v": weight(12, 5, seed=2)},
        {"Softmax": NO_FORM},
    ),
    "attention": PeerModel(
        f"""{TOKENS} {{ q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) q4 = Reshape(q, heads)
        k4 = Reshape(k, heads) v4 = Reshape(v, heads) qt = Transpose<perm = [0, 2, 1, 3]>(q4)
        kt = Transpose<perm = [0, 2, 3, 1]>(k4) vt = Transpose<perm = [0, 2, 1, 3]>(v4) s = MatMul(qt, kt)
        d = Mul(s, scale) p = Softmax(d) o = MatMul(p, vt) ot = Transpose<perm = [0, 2, 1, 3]>(o)
        m = Reshape(ot, merged) h = MatMul(m, wo) y = Add(h, x) }}""",
        "MatMul MatMul MatMul Reshape Reshape Reshape Transpose Transpose Transpose MatMul MatMul Transpose Reshape "
        "MatMul Add",
        {
            **{name: weight(8, 8, seed=seed) for seed, name in enumerate(("wq", "wk", "wv", "wo"))},
            **{"heads": i64(0, 5, 2, 4), "merged": i64(0, 5, 8), "scale": scalar(0.5)},
        },
        {"Mul": NO_FORM, "Softmax": NO_FORM},
    ),
    "matmul-of-activations": PeerModel(
        "(float[n,2,5,8] x, float[n,1,8,6] z) => (float[] y) { a = MatMul(x, w) m = MatMul(a, z) y = MatMul(m, v) }",
        "MatMul MatMul MatMul",
        {"w": weight(8, 8), "v": weight(6, 4, seed=1)},
    ),
    "pools": PeerModel(
        f"""{IMAGE} {{ c = Conv{PADDED}(x, w, b) m = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(c)
        a = AveragePool<kernel_shape = [2, 2]>(m) d = Conv(a, k) g = GlobalAveragePool(d) f = Flatten(g)
        y = Gemm(f, last) }}""",
        "Conv MaxPool AveragePool Conv GlobalAveragePool Flatten Gemm",
        {**W, "last": weight(4, 3, seed=4)},
    ),
    "resize": PeerModel(
        f'{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) u = Resize<mode = "nearest">(r, , s) y = Conv(u, v) }}',
        "Conv Conv",
        {**W, "s": f32(1, 1, 2, 2)},
        {"Resize": NO_FORM},
        untrained="Resize",
    ),
    "movers": PeerModel(
        f"""{IMAGE} {{ c = Conv(x, w, b) t = Transpose<perm = [0, 2, 3, 1]>(c) s = Slice(t, start, end, axes)
        r = Reshape(s, shape) m = MatMul(r, k) u = Unsqueeze(m, start) y = Squeeze(u, start) }}""",
        "Conv Transpose Slice Reshape MatMul Unsqueeze Squeeze",
        {**W, "start": i64(1), "end": i64(5), "axes": i64(1), "shape": i64(0, -1, 6), "k": weight(6, 4, seed=3)},
    ),
    "residual-add": PeerModel(
        f"{IMAGE} {{ c = Conv{PADDED}(x, w, b) r = Relu(c) d = Conv{PADDED}(r, v) a = Add(d, x) y = Relu(a) }}",
        "Conv Conv Add",
        W,
    ),
    "residual-add-of-unlike-ranges": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w) d = Conv(x, small) a = Add(c, d) y = Conv(a, v) }}",
        "Conv Conv Add Conv",
        {"w": 10 * weight(5, 4, 3, 3), "small": 0.1 * weight(5, 4, 3, 3, seed=2), "v": weight(4, 5, 1, 1, seed=3)},
    ),
    "relu-behind-conv": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) d = Conv(r, v) y = Clip(d, lo, hi) }}", "Conv Conv", {**W, **_CLIP}
    ),
    "output-that-others-read": PeerModel(
        "(float[n,4,8,8] x) => (float[] c, float[] r, float[] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }",
        "Conv Relu Conv",
        W,
    ),
    "two-inputs-of-unlike-scales": PeerModel(
        "(float[n,4,8,8] x, float[n,8] z) => (float[] y, float[] u) { c = Conv(x, w, b) g = GlobalAveragePool(c) "
        "f = Flatten(g) h = Gemm(z, m) y = Add(f, h) u = Gemm(z, v) }",
        "Conv Gemm Gemm GlobalAveragePool Flatten Add",
        {**W, "m": 1e-3 * weight(8, 6), "v": weight(8, 5, seed=4)},
        scales={"x": 0.02, "z": 300.0},
    ),
    "clip-without-a-bound": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Clip(c, , hi) d = Conv(r, v) y = Clip(d, lo) }}", "Conv Conv", {**W, **_CLIP}
    ),
    "conv-without-bias-by-an-empty-name": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, ) r = Relu(c) y = Conv(r, v, ) }}", "Conv Conv", W
    ),
    "unused-second-output": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) m, = MaxPool<kernel_shape = [2, 2]>(c) d, e = Dropout(m) y = Conv(d, v) }}",
        "Conv MaxPool Conv",
        W,
    ),
    "dynamic-sizes": PeerModel(
        "(float[n,4,height,width] x) => (float[] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }", "Conv Conv", W
    ),
    "fixed-batch": PeerModel(
        "(float[4,4,8,8] x) => (float[] y) { c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }", "Conv Conv", W
    ),
    "initializers-are-inputs": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}",
        "Conv Conv",
        W,
        opset=8,
        change=_inputs_of_initializers,
    ),
    "opset-13": PeerModel(
        f"""{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) m = ReduceMean<axes = [2, 3], keepdims = 0>(r)
        s, t = Split<axis = 1>(m) a = Add(s, t) y = Gemm(a, k) }}""",
        "Conv ReduceMean Gemm",
        {**W, "k": weight(3, 3)},
        {"Split": NO_FORM, "Add": APART},
        opset=13,
    ),
    "unnamed-nodes": PeerModel(
        f"{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) y = Conv(r, v) }}", "Conv Conv", W, change=_unnamed
    ),
    "lstm": PeerModel(
        """(float[n,5,8] x) => (float[] y) { h = MatMul(x, w) t = Transpose<perm = [1, 0, 2]>(h)
        all = LSTM<hidden_size = 4>(t, wi, wr) s = Squeeze(all, one) u = Transpose<perm = [1, 0, 2]>(s)
        y = MatMul(u, v) }""",
        "MatMul MatMul",
        {
            **{"w": weight(8, 6), "wi": weight(1, 16, 6), "wr": weight(1, 16, 4, seed=1)},
            **{"v": weight(4, 3, seed=2), "one": i64(1)},
        },
        {"LSTM": NO_FORM, "Squeeze": APART, "Transpose": APART},
        untrained="LSTM",
    ),
    "detector-head": PeerModel(
        f"""{IMAGE} {{ c = Conv(x, w, b) r = Relu(c) boxes = Conv(r, v) d = Conv(r, k) scores = Sigmoid(d)
        y = Concat<axis = 1>(boxes, scores) }}""",
        "Conv Conv Conv",
        {**W, "v": 200 * weight(4, 6, 1, 1, seed=2), "k": weight(3, 6, 1, 1, seed=3)},
        {"Sigmoid": NO_FORM, "Concat": UNREAD},
        parts=(4, 3),
    ),
}

SINGLES = {
    "only-conv": PeerModel(f"{IMAGE} {{ y = Conv(x, w, b) }}", "Conv", W),
    "only-convtranspose": PeerModel(
        f"{IMAGE} {{ y = ConvTranspose(x, w) }}", "ConvTranspose", {"w": weight(4, 5, 3, 3)}, untrained="ConvTranspose"
    ),
    "only-gemm": PeerModel(f"{ROWS} {{ y = Gemm(x, w, b) }}", "Gemm", FC),
    "only-matmul": PeerModel(f"{ROWS} {{ y = MatMul(x, w) }}", "MatMul", FC),
    "only-add": PeerModel(
        "(float[n,8] x, float[n,8] z) => (float[] y) { y = Add(x, z) }", "", {}, {"Add": APART}, untrained="to train"
    ),
    "only-relu": PeerModel(f"{ROWS} {{ y = Relu(x) }}", "", {}, {"Relu": APART}, untrained="to train"),
}

MODELS: Mapping[str, PeerModel] = {**GEMMS, **WEIGHTS, **NORMS, **STRUCTURES, **SINGLES}
