"""Random small float networks for the validation of back ends; the same seed gives the same network.

A network holds only operators that its caller allows, besides those that move values, so that one can be made of what
a back end runs on integers. Inputs are (N, channels, height, width), or (N, channels, width) for networks in one
dimension. Scales that are powers of two are the compiler's business: `Policy.power_of_two`.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET = 17
FloatArray = npt.NDArray[np.float32]


class Network:
    """A network that grows from its input; `last` and `shape` (without N) are where it stands."""

    def __init__(self, rng: np.random.Generator, shape: tuple[int, ...], allowed: Collection[str]):
        self.rng = rng
        self.allowed = frozenset(allowed)
        self.last, self.shape = "x", shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []

    def constant(self, values: npt.NDArray[np.generic]) -> str:
        """The name of a new constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(values, name))
        return name

    def weights(self, *shape: int, fan: int) -> str:
        """Normal weights that keep the variance, with one scale per first axis that differs up to 4 times."""
        spread = self.rng.uniform(0.5, 2.0, (shape[0], *[1] * (len(shape) - 1)))
        return self.constant((self.rng.normal(size=shape) * spread / np.sqrt(fan)).astype(np.float32))

    def bias(self, size: int) -> str:
        """A small bias."""
        return self.constant(self.rng.normal(scale=0.3, size=size).astype(np.float32))

    def add(self, op_type: str, inputs: list[str], shape: tuple[int, ...], **attributes: object) -> str:
        """A node behind `inputs`; the network goes on from its output."""
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"t{len(self.nodes)}"], name, **attributes))
        self.last, self.shape = self.nodes[-1].output[0], shape
        return self.last

    def choice(self, *options: int) -> int:
        """One of some numbers."""
        return int(self.rng.choice(options))

    def activation(self) -> None:
        """Relu, Clip or none behind a sum of products."""
        options = [name for name in ("Relu", "Clip") if name in self.allowed]
        kind = self.rng.integers(len(options) + 1)
        if kind == len(options):
            return
        if options[kind] == "Relu":
            self.add("Relu", [self.last], self.shape)
        else:
            limits = [self.constant(np.array(limit, np.float32)) for limit in (0, 2)]
            self.add("Clip", [self.last, *limits], self.shape)


def convolution(net: Network, group: int, outputs: int, kernel: int, stride: int, gain: float = 1.0) -> str:
    """A Conv with the pads of one side larger where the kernel is even or drawn so; `gain` scales its result."""
    channels, rank = net.shape[0], len(net.shape) - 1
    before = net.choice(*range(kernel))
    after = kernel - 1 - before
    sizes = tuple((size + kernel - 1 - kernel) // stride + 1 for size in net.shape[1:])
    return net.add(
        "Conv",
        [
            net.last,
            net.weights(outputs, channels // group, *[kernel] * rank, fan=channels // group * kernel**rank / gain**2),
            net.bias(outputs),
        ],
        (outputs, *sizes),
        kernel_shape=[kernel] * rank,
        pads=[before] * rank + [after] * rank,
        strides=[stride] * rank,
        dilations=[1] * rank,
        group=group,
    )


def plain(net: Network) -> None:
    """Conv with a 1, 2 or 3 wide kernel and stride 1 or 2."""
    stride = net.choice(1, 1, 2) if min(net.shape[1:]) >= 6 else 1
    convolution(net, 1, net.choice(3, 5, 8, 12, 16), net.choice(1, 2, 3), stride)
    net.activation()


def depthwise(net: Network) -> None:
    """Conv with one filter per channel."""
    convolution(net, net.shape[0], net.shape[0], 3, 1)
    net.activation()


def grouped(net: Network) -> None:
    """Conv with two groups."""
    if net.shape[0] % 2:
        convolution(net, 1, 8, 1, 1)
    convolution(net, 2, net.choice(4, 6, 10), 3, 1)


def transposed(net: Network) -> None:
    """ConvTranspose that doubles the size."""
    channels, outputs, rank = net.shape[0], net.choice(3, 6), len(net.shape) - 1
    if max(net.shape[1:]) > 12:
        return plain(net)
    weights = net.weights(channels, outputs, *[2] * rank, fan=channels)
    shape = (outputs, *[2 * size for size in net.shape[1:]])
    net.add("ConvTranspose", [net.last, weights, net.bias(outputs)], shape, kernel_shape=[2] * rank, strides=[2] * rank)
    return None


def branched(op_type: str) -> Callable[[Network], None]:
    """A Conv of the same shape, combined with its input by `op_type`."""

    def build(net: Network) -> None:
        before = net.last
        convolution(net, 1, net.shape[0], 3, 1)
        if op_type == "Mul" and "Sigmoid" in net.allowed:
            net.add("Sigmoid", [net.last], net.shape)
        net.add(op_type, [before, net.last], net.shape)

    return build


def concatenated(net: Network) -> None:
    """Two Convs side by side."""
    before, shape = net.last, net.shape
    first = convolution(net, 1, 3, 1, 1)
    net.last, net.shape = before, shape
    second = convolution(net, 1, 5, 3, 1)
    net.add("Concat", [first, second], (8, *shape[1:]), axis=1)


def sliced(net: Network) -> None:
    """All channels but the last."""
    if net.shape[0] < 4:
        return plain(net)
    bounds = [net.constant(np.array([value], np.int64)) for value in (0, net.shape[0] - 1, 1)]
    net.add("Slice", [net.last, *bounds], (net.shape[0] - 1, *net.shape[1:]))
    return None


def pooled(op_type: str) -> Callable[[Network], None]:
    """MaxPool or AveragePool that halves the size."""

    def build(net: Network) -> None:
        if min(net.shape[1:]) < 4:
            return depthwise(net)
        rank = len(net.shape) - 1
        sizes = tuple(size // 2 for size in net.shape[1:])
        net.add(op_type, [net.last], (net.shape[0], *sizes), kernel_shape=[2] * rank, strides=[2] * rank)
        return None

    return build


def unary(op_type: str, **attributes: object) -> Callable[[Network], None]:
    """An activation behind a Conv."""

    def build(net: Network) -> None:
        convolution(net, 1, net.shape[0], 3, 1)
        net.add(op_type, [net.last], net.shape, **attributes)

    return build


def prelu(net: Network) -> None:
    """PRelu with one slope per channel."""
    convolution(net, 1, net.shape[0], 3, 1)
    slopes = net.rng.uniform(0.05, 0.4, (net.shape[0], *[1] * (len(net.shape) - 1))).astype(np.float32)
    net.add("PRelu", [net.last, net.constant(slopes)], net.shape)


def gelu(net: Network) -> None:
    """Gelu as x / 2 (1 + erf(x / sqrt 2))."""
    convolution(net, 1, net.shape[0], 3, 1)
    x = net.last
    root, one, half = (net.constant(np.array(value, np.float32)) for value in (np.sqrt(2), 1, 0.5))
    net.add("Div", [x, root], net.shape)
    net.add("Erf", [net.last], net.shape)
    net.add("Add", [net.last, one], net.shape)
    net.add("Mul", [x, net.last], net.shape)
    net.add("Mul", [net.last, half], net.shape)


def softmax(net: Network) -> None:
    """Softmax over the last axis."""
    net.add("Softmax", [net.last], net.shape, axis=-1)


def resized(net: Network) -> None:
    """Nearest neighbours at twice the size."""
    if max(net.shape[1:]) > 12:
        return plain(net)
    scales = net.constant(np.array([1, 1, *[2] * (len(net.shape) - 1)], np.float32))
    shape = (net.shape[0], *[2 * size for size in net.shape[1:]])
    options = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    net.add("Resize", [net.last, "", scales], shape, **options)
    return None


def attention(net: Network) -> None:
    """The product of two activations: (positions, channels) times its transpose, times itself.

    It takes the third power of what comes in, so that is made small.
    """
    channels, places = net.shape[0], int(np.prod(net.shape[1:]))
    shape, before = net.shape, convolution(net, 1, net.shape[0], 1, 1, gain=1 / places)
    flat = net.constant(np.array([0, channels, places], np.int64))
    rows = net.add("Reshape", [before, flat], (channels, places))
    columns = net.add("Transpose", [rows], (places, channels), perm=[0, 2, 1])
    net.add("MatMul", [rows, columns], (channels, channels))
    net.add("MatMul", [net.last, rows], (channels, places))
    net.add("Reshape", [net.last, net.constant(np.array([0, *shape], np.int64))], shape)


def head(net: Network) -> None:
    """A mean over the positions where one is allowed, then Gemm."""
    rank, channels = len(net.shape) - 1, net.shape[0]
    means = [name for name in ("GlobalAveragePool", "ReduceMean") if name in net.allowed]
    if means:
        if means[net.rng.integers(len(means))] == "ReduceMean":
            net.add("ReduceMean", [net.last], (channels, *[1] * rank), axes=list(range(2, 2 + rank)), keepdims=1)
        else:
            net.add("GlobalAveragePool", [net.last], (channels, *[1] * rank))
    inputs = int(np.prod(net.shape))
    net.add("Flatten", [net.last], (inputs,), axis=1)
    if "Gemm" in net.allowed:
        net.add("Gemm", [net.last, net.weights(10, inputs, fan=inputs), net.bias(10)], (10,), transB=1)


BUILDERS: Mapping[str, tuple[tuple[str, ...], Callable[[Network], None]]] = {
    "conv": (("Conv",), plain),
    "depthwise": (("Conv",), depthwise),
    "grouped": (("Conv",), grouped),
    "transposed": (("ConvTranspose",), transposed),
    "residual": (("Add",), branched("Add")),
    "difference": (("Sub",), branched("Sub")),
    "gate": (("Mul",), branched("Mul")),
    "concat": (("Concat",), concatenated),
    "slice": (("Slice",), sliced),
    "maxpool": (("MaxPool",), pooled("MaxPool")),
    "avgpool": (("AveragePool",), pooled("AveragePool")),
    "leaky": (("LeakyRelu",), unary("LeakyRelu", alpha=0.1)),
    "prelu": (("PRelu",), prelu),
    "sigmoid": (("Sigmoid",), unary("Sigmoid")),
    "tanh": (("Tanh",), unary("Tanh")),
    "hardswish": (("HardSwish",), unary("HardSwish")),
    "gelu": (("Gelu",), gelu),
    "softmax": (("Softmax",), softmax),
    "resize": (("Resize",), resized),
    "attention": (("MatMul",), attention),
}
MOVES = ("Slice", "MaxPool", "Reshape", "Transpose", "Flatten")


def network(
    seed: int, allowed: Collection[str], layers: Collection[str] | None = None, one_dimensional: bool = False
) -> ModelProto:
    """A network of 4 to 10 layers, each drawn from `BUILDERS`, with a head.

    Args:
        seed: of all that is drawn.
        allowed: the ONNX operators that it may have besides `MOVES`; Conv must be one.
        layers: names of `BUILDERS` to draw from, all of them by default; the first comes for certain.
        one_dimensional: whether the input is (N, channels, width).

    Raises:
        ValueError: if `allowed` leaves none of `layers`.
    """
    rng = np.random.default_rng(seed)
    operators = frozenset(allowed).union(MOVES)
    names = [name for name in layers or BUILDERS if operators.issuperset(BUILDERS[name][0])]
    if not names or "Conv" not in operators:
        raise ValueError(
            f"no layer of {sorted(layers or BUILDERS)} can be built: allow Conv and the operators it needs"
        )
    size = int(rng.integers(8, 13))
    shape = (int(rng.integers(3, 9)), *[size] * (1 if one_dimensional else 2))
    net = Network(rng, shape, operators)
    plain(net)
    if layers:
        BUILDERS[names[0]][1](net)
    for _ in range(int(rng.integers(3, 8))):
        name = names[rng.integers(len(names))]
        if name == "attention" and any(node.op_type == "MatMul" for node in net.nodes):
            continue  # each one takes the third power of what comes in
        BUILDERS[name][1](net)
    head(net)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])]
    outputs = [helper.make_tensor_value_info(net.last, TensorProto.FLOAT, ["N", *net.shape])]
    graph = helper.make_graph(net.nodes, f"network_{seed}", inputs, outputs, net.constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def samples(model: ModelProto, count: int, seed: int) -> dict[str, FloatArray]:
    """Normal inputs for `model`."""
    rng = np.random.default_rng(seed)
    value = model.graph.input[0]
    shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
    return {value.name: rng.normal(size=(count, *shape)).astype(np.float32)}
