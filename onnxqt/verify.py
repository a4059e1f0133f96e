"""Check an exported file: the emulator, and ONNX Runtime with its graph optimizations off and on, must agree.

Tensor by tensor, the emulator computes codes from the very codes that ONNX Runtime computed before it, so an
error shows where it arises. Without optimizations ONNX Runtime computes a quantized node in float: its sums of K
products carry a relative error of about sqrt(K) 2^-24, which moves a value across a rounding tie, and so a code
by one, for a small share of the values. More than one code, or one code for more than that share, is a
contradiction. With optimizations the outputs alone are visible. They must be equal where nothing runs in float on
either side; elsewhere such a rounding difference travels through the network, and the report counts what arrives.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxqt.emulate import load_program
from onnxqt.errors import ContradictionError
from onnxqt.numerics import Array
from onnxqt.runtime import Session, executed_graph, with_outputs

MAX_LSB = 1
MAX_SHARE = 0.01  # of the values of a tensor that may differ by MAX_LSB
_INTEGER_KERNELS = ("QLinear", "QGemm", "ConvInteger", "MatMulInteger", "QAttention")


@dataclass(frozen=True)
class TensorVerdict:
    """How many codes of a tensor differ from ONNX Runtime's by 0, 1 and more than 1 LSB."""

    tensor: str
    equal: int
    one_lsb: int
    more: int

    @property
    def total(self) -> int:
        """Number of codes compared."""
        return self.equal + self.one_lsb + self.more

    @property
    def allowed(self) -> bool:
        """Within the documented limit."""
        return self.more == 0 and self.one_lsb <= max(1.0, MAX_SHARE * self.total)


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
    program = load_program(model)
    codes = {tensor: entry.codes for tensor, entry in program.tensors.items()}
    plain = Session(with_outputs(model, codes.values()), optimize=False)
    optimized = Session(model, optimize=True)
    counts = {tensor: np.zeros(3, np.int64) for tensor in codes}
    worst, different, total = 0, 0, 0
    for inputs in batches:
        reference = plain.run(inputs)
        expected = {tensor: reference[code].astype(np.int32) for tensor, code in codes.items()}
        forced = program.run_codes(inputs, tuple(codes), expected)
        for tensor, seen in counts.items():
            difference = np.abs(forced.codes[tensor].codes - expected[tensor])
            seen += np.bincount(np.minimum(difference, 2).ravel(), minlength=3)
        free, outputs = program.run_codes(inputs), optimized.run(inputs)
        for output, result in free.codes.items():
            difference = lsb_difference(outputs[output], free.outputs[output], float(result.params.scale))
            worst = max(worst, int(difference.max(initial=0)))
            different, total = different + int(np.count_nonzero(difference)), total + difference.size
    verdicts = tuple(TensorVerdict(tensor, *map(int, seen)) for tensor, seen in counts.items())
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
                f"({verdict.one_lsb} codes by 1 LSB, {verdict.more} by more, of {verdict.total}; allowed are "
                f"{MAX_SHARE:.0%} by {MAX_LSB}): do not deploy this file, report the model"
            )
