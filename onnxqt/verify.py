"""Check an exported file: the emulator, and ONNX Runtime with its graph optimizations off and on, must agree.

Tensor by tensor, the emulator computes codes from the very codes that ONNX Runtime computed before it, so an
error shows where it arises. Without optimizations ONNX Runtime computes a quantized node in float32 and rounds; its
float error carries a value that lies next to a rounding tie across it, which moves the code by one. How many values
lie there is a matter of the data: in a layer of equal weights it can be whole channels. What counts is where they
lie: a difference of one code is allowed where the value that ONNX Runtime rounded is as near to the tie between the
two codes as float error reaches (see `Rounding`). Anything else is a contradiction, and so is any difference where
both sides compute the same float operations: at nodes that stay float, and from one grid to another.

With optimizations the outputs alone are visible. They must be equal where nothing runs in float on either side;
elsewhere such a rounding difference travels through the network, and the report counts what arrives.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper

from onnxqt.emulate import Program, load_program
from onnxqt.emulate.graph import attributes_of, read_names
from onnxqt.errors import ContradictionError
from onnxqt.numerics import Array, QParams
from onnxqt.runtime import Session, executed_graph, with_outputs

MAX_LSB = 1
UNIT = 2.0**-24  # unit roundoff of float32
ROUNDINGS = 12  # by which float32 may miss the sum of magnitudes, in UNIT; see `Rounding`
_INTEGER_KERNELS = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "QAttention")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_SUMS = (*_PRODUCTS, "Add", "AveragePool", "GlobalAveragePool", "ReduceMean")
_CLAMPS = ("Relu", "Clip")


@dataclass(frozen=True)
class TensorVerdict:
    """How the codes of a tensor compare with ONNX Runtime's.

    Attributes:
        tensor: its name.
        equal: how many are equal.
        one_lsb: how many differ by 1 LSB.
        more: how many differ by more.
        tie_distance: the farthest that ONNX Runtime's value lies from the rounding tie where `one_lsb` counts, in
            units of what float error explains there; 0 where nothing differs.
    """

    tensor: str
    equal: int
    one_lsb: int
    more: int
    tie_distance: float = 0.0

    @property
    def total(self) -> int:
        """Number of codes compared."""
        return self.equal + self.one_lsb + self.more

    @property
    def allowed(self) -> bool:
        """Whether float error explains every difference."""
        return self.more == 0 and self.tie_distance <= 1


@dataclass(frozen=True)
class Verdict:
    """The check of one file.

    Attributes:
        tensors: each quantized tensor, in the order of execution.
        max_lsb: largest difference of an output code between the emulator and optimized ONNX Runtime.
        mismatch_fraction: share of output codes that differ.
        integer_kernels: integer kernels in the graph that ONNX Runtime executes.
        all_integer: whether each multiplying node runs on an integer kernel there.
    """

    tensors: tuple[TensorVerdict, ...]
    max_lsb: int
    mismatch_fraction: float
    integer_kernels: int
    all_integer: bool


def verify(name: str, model: onnx.ModelProto, batches: Iterable[Mapping[str, Array]]) -> Verdict:
    """Compare the emulator with ONNX Runtime on some batches of inputs.

    Raises:
        ContradictionError: naming the tensor, if they differ by more than is documented.
    """
    program = load_program(model, reference=True)  # which shares no kernel with ONNX Runtime
    codes = {tensor: entry.codes for tensor, entry in program.tensors.items()}
    plain = Session(with_outputs(model, codes.values()), optimize=False)
    optimized = Session(model, optimize=True)
    sums = roundings(model, program)
    checks = [_Check(tensor, sums.get(code)) for tensor, code in codes.items()]
    worst, different, total = 0, 0, 0
    for inputs in batches:
        reference = plain.run(inputs)
        expected = {tensor: reference[code].astype(np.int32) for tensor, code in codes.items()}
        forced = program.run_codes(inputs, tuple(codes), expected)
        known = {**inputs, **{code: reference[code] for code in codes.values()}}
        for check in checks:
            check.add(forced.codes[check.tensor].codes, expected[check.tensor], known)
        free, outputs = program.run_codes(inputs), optimized.run(inputs)
        for output, result in free.codes.items():
            difference = lsb_difference(outputs[output], free.outputs[output], float(result.params.scale))
            worst = max(worst, int(difference.max(initial=0)))
            different, total = different + int(np.count_nonzero(difference)), total + difference.size
    verdicts = tuple(check.verdict for check in checks)
    _judge(name, verdicts)
    kernels, all_integer = integer_kernels(model)
    if all_integer and not program.float_nodes and worst:
        raise ContradictionError(
            f"'{name}': the emulator and the integer kernels of ONNX Runtime differ by {worst} LSB at the output "
            f"({different} of {total} codes; allowed is none): do not deploy this file, report the model"
        )
    return Verdict(verdicts, worst, different / max(total, 1), kernels, all_integer)


def lsb_difference(a: Array, b: Array, scale: float) -> Array:
    """Distance in codes between two arrays of values on the same grid, int64."""
    return np.abs(np.rint((a.astype(np.float64) - b) / scale)).astype(np.int64)


def integer_kernels(model: onnx.ModelProto) -> tuple[int, bool]:
    """Integer kernels in the graph that ONNX Runtime executes; and whether no float Conv, Gemm or MatMul is left."""
    operators = [node.op_type for node in executed_graph(model).graph.node]
    kernels = sum(operator.startswith(_INTEGER_KERNELS) for operator in operators)
    floats = [op for op in operators if op in ("Conv", "FusedConv", "ConvTranspose", "Gemm", "MatMul", "FusedMatMul")]
    return kernels, bool(kernels) and not floats


def _judge(name: str, verdicts: Iterable[TensorVerdict]) -> None:
    for verdict in verdicts:
        if not verdict.allowed:
            raise ContradictionError(
                f"'{name}': the emulator and ONNX Runtime disagree on tensor '{verdict.tensor}' "
                f"({verdict.one_lsb} codes by 1 LSB, {verdict.more} by more, of {verdict.total}; allowed is {MAX_LSB} "
                f"within the float error of a rounding tie, the farthest is at {verdict.tie_distance:.3g} times "
                "that distance): do not deploy this file, report the model"
            )


class _Check:
    """The comparison of one tensor over all batches; `rounding` says what float error explains, None: nothing."""

    def __init__(self, tensor: str, rounding: "Rounding | None") -> None:
        self.tensor = tensor
        self._rounding = rounding
        self._counts = np.zeros(3, np.int64)
        self._tie_distance = 0.0

    def add(self, ours: Array, theirs: Array, known: Mapping[str, Array]) -> None:
        """Compare the codes of one batch; `known` are the inputs of the graph and the codes of all tensors."""
        difference = np.abs(ours - theirs)
        self._counts += np.bincount(np.minimum(difference, 2).ravel(), minlength=3)
        apart = difference == 1
        if not apart.any():
            return
        if self._rounding is None:
            self._tie_distance = math.inf
            return
        value, error = self._rounding.steps(known)
        distance = np.abs(value - np.minimum(ours, theirs) - 0.5)[apart]
        with np.errstate(divide="ignore"):
            self._tie_distance = max(self._tie_distance, float((distance / error[apart]).max()))

    @property
    def verdict(self) -> TensorVerdict:
        """What was seen so far."""
        equal, one_lsb, more = map(int, self._counts)
        return TensorVerdict(self.tensor, equal, one_lsb, more, self._tie_distance)


def roundings(model: ModelProto, program: Program) -> dict[str, "Rounding"]:
    """How float error comes to codes, by their name; not those for which both sides compute the same in float."""
    producers = {output: node for node in model.graph.node for output in node.output}
    grids = {tensor.codes: tensor.params for tensor in program.tensors.values()}
    sums = [step for step in program.steps if step.info.kind == "integer" and step.info.op_type in _SUMS]
    return {name: Rounding(model, producers, grids, name) for step in sums for name in step.outputs if name in grids}


class Rounding:
    """What ONNX Runtime rounds to the codes of one tensor, and how far float32 may have carried it.

    For a sum of K terms, `y = sum x_i w_i + b`, that is

        error <= u (K |S| + 12 M),    S = sum x_i w_i,  M = sum |x_i w_i| + |b|,  u = 2**-24

    because every float32 operation errs by at most u times its result, and these are made:

    - dequantizing x, w and b, the product and the division by the output scale; in the emulator the accumulator as
      float32, `s_in * s_w`, its division by the output scale and the product of the two: at most 8 u M;
    - K additions, each of which errs by u times the partial sum. That drifts from 0 to S and wanders about the
      drift. Along the drift all errors can have one sign, as they have for equal terms: at most K u |S|. Wandering,
      it is about M sqrt(k) / K after k terms and the errors have independent signs: with a standard deviation of
      0.4 u M in all, of which 4 u M are allowed. (Any terms in any order obey K u M, but where they cancel that is
      hundreds of times what occurs, and would hide a wrong bias.)

    A mean is such a sum with `w_i = 1 / K`. Where nothing is multiplied the emulator adds codes and zero points
    apart, so that M has `s |z|` of the inputs and of the output too. M and S come from ONNX Runtime: the same nodes
    on magnitudes, and the sum without its bias.

    Args:
        model: the file.
        producers: its nodes by the names of their outputs.
        grids: of all quantized tensors, by the names of their codes.
        codes: the name of the codes of the tensor.
    """

    def __init__(
        self, model: ModelProto, producers: Mapping[str, NodeProto], grids: Mapping[str, QParams], codes: str
    ) -> None:
        quantizer = producers[codes]
        if quantizer.op_type == "Clip":
            quantizer = producers[quantizer.input[0]]
        self._model, self._grids, self._params = model, grids, grids[codes]
        self._value = quantizer.input[0]
        self._node = _origin(producers, self._value)
        self._products = self._node.op_type in _PRODUCTS
        self._extra: list[NodeProto] = []
        self._magnitude = _add_magnitude(producers, self._value, self._extra)
        self._sum = f"{self._node.output[0]}/sum"
        self._extra.append(_like(self._node, self._node.input[: 2 if self._products else None], self._sum))
        self._shaped = [*self._node.input[: 2 if self._products else 1], self._node.output[0]]
        self._session: Session | None = None
        self._inputs: list[str] = []

    def steps(self, known: Mapping[str, Array]) -> tuple[Array, Array]:
        """The value that is rounded, on the axis of the codes, and the error that float32 may have made, float64.

        `known` are the inputs of the graph and the codes of all tensors, as ONNX Runtime has them.
        """
        if self._session is None:
            outputs = [self._value, self._sum, self._magnitude, *self._shaped]
            part = _part(self._model, self._extra, outputs, known)
            self._inputs = [value.name for value in part.graph.input]
            self._session = Session(part, optimize=False)
        values = self._session.run({name: known[name] for name in self._inputs})
        count = _terms(self._node, [values[name].shape for name in self._shaped])
        value, total, magnitude = (values[n].astype(np.float64) for n in (self._value, self._sum, self._magnitude))
        error = UNIT * (count * np.abs(total) + ROUNDINGS * (magnitude + self._offset()))
        scale = float(self._params.scale)
        return value / scale + int(self._params.zero_point), error / scale

    def _offset(self) -> float:
        """`s |z|` of the inputs and of the output, where they enter the sum."""
        if self._products:
            return 0.0
        grids = [self._params, *(self._grids[name] for name in self._inputs if name in self._grids)]
        return float(sum(float(grid.scale) * abs(int(grid.zero_point)) for grid in grids))


def _origin(producers: Mapping[str, NodeProto], tensor: str) -> NodeProto:
    """The sum before the clamps, and before the addition of its bias, that lead to `tensor`."""
    node = producers[tensor]
    if node.op_type in _CLAMPS:
        return _origin(producers, node.input[0])
    before = [producers[name] for name in node.input if name in producers]
    return next((n for n in before if node.op_type == "Add" and n.op_type == "MatMul"), node)


def _add_magnitude(producers: Mapping[str, NodeProto], tensor: str, nodes: list[NodeProto]) -> str:
    """Appends nodes that compute the sum of magnitudes behind a sum `tensor`; the name of their result."""
    node, result = producers.get(tensor), f"{tensor}/magnitude"
    if node is not None and node.op_type in _CLAMPS:
        return _add_magnitude(producers, node.input[0], nodes)
    if any(result in other.output for other in nodes):
        return result
    if node is None or node.op_type not in _SUMS:
        nodes.append(helper.make_node("Abs", [tensor], [result]))
        return result
    data = 1 if node.op_type == "ReduceMean" else len(node.input)
    inputs = [_add_magnitude(producers, name, nodes) if name else "" for name in node.input[:data]]
    nodes.append(_like(node, [*inputs, *node.input[data:]], result))
    return result


def _like(node: NodeProto, inputs: Iterable[str], output: str) -> NodeProto:
    """The node with other inputs."""
    copy = helper.make_node(node.op_type, list(inputs), [output])
    copy.attribute.extend(node.attribute)
    return copy


def _part(
    model: ModelProto, extra: Sequence[NodeProto], outputs: Sequence[str], known: Mapping[str, Array]
) -> ModelProto:
    """The part of a model, with `extra` nodes behind it, that computes `outputs` from what it needs of `known`."""
    needed, nodes = set(outputs), []
    for node in reversed([*model.graph.node, *extra]):
        if needed.intersection(node.output) and not known.keys() & set(node.output):
            nodes.append(node)
            needed.update(read_names(node))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), None)
        for name, array in known.items()
        if name in needed
    ]
    constants = [tensor for tensor in model.graph.initializer if tensor.name in needed]
    results = [helper.make_empty_tensor_value_info(name) for name in dict.fromkeys(outputs)]
    part = helper.make_graph(nodes[::-1], "part", inputs, results, constants)
    return helper.make_model(part, opset_imports=model.opset_import, ir_version=model.ir_version)


def _terms(node: NodeProto, shapes: Sequence[tuple[int, ...]]) -> int:
    """How many terms the sum of a node has, from the shapes of what it adds up and of its output."""
    attributes, (first, *_, output) = attributes_of(node), shapes
    if node.op_type == "Conv":
        return math.prod(shapes[1][1:])
    if node.op_type == "ConvTranspose":
        return int(math.prod(shapes[1]) // (shapes[1][1] * attributes.get("group", 1)))
    if node.op_type == "AveragePool":
        return int(math.prod(attributes["kernel_shape"]))
    if node.op_type == "Add":
        return 2
    return first[-1] if node.op_type in _PRODUCTS else math.prod(first) // math.prod(output)
