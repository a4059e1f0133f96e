"""An integer program: steps in order, each a function from values to values, and how they are executed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxqt import numerics
from onnxqt.errors import EmulatorError, first_line
from onnxqt.numerics import Array, IntArray, QParams

Run = Callable[..., tuple[Array, ...]]


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """How one node runs.

    Attributes:
        name: the node's name, or the name of its output where it has none.
        op_type: its operator.
        kind: "integer" on codes; "float" through ONNX Runtime; "boundary" for a quantizer that stands
            between floats and codes or between two grids; "shape" for what only computes sizes.
        reason: why the node is float, else empty.
        note: what the file leaves open and was decided here, else empty.
        bound: limit of the accumulator and of all its partial sums, None where nothing is accumulated.
        implementation: how the result is computed.
    """

    name: str
    op_type: str
    kind: Literal["integer", "float", "boundary", "shape"]
    reason: str = ""
    note: str = ""
    bound: int | None = None
    implementation: str = ""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to execute: `outputs = run(*inputs)`, values by name.

    `overflows` names the output, if any, that counts the accumulators that wrapped.
    """

    info: NodeInfo
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Run
    overflows: str = ""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A real tensor that exists as codes: the value `codes` on the grid `params`."""

    codes: str
    params: QParams


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes (int32) and their grid."""

    codes: IntArray
    params: QParams


@dataclass(frozen=True, slots=True)
class Result:
    """What a run returns.

    Attributes:
        outputs: real values of each graph output; codes where the file's output is itself an integer.
        codes: codes of each graph output that is quantized, and of the tensors asked for.
        overflows: accumulators that did not fit 32 bits and wrapped, by node name.
    """

    outputs: dict[str, Array]
    codes: dict[str, Codes]
    overflows: dict[str, int]


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """The integer program of one file.

    Attributes:
        steps: in the order of execution.
        inputs: numpy type and shape (None where dynamic) of each graph input.
        outputs: each graph output as codes, or the numpy type of one that is not quantized (None: any).
        tensors: the tensors of the file that are quantized, by name: outputs of DequantizeLinear.
        constants: constant values that steps read.
    """

    steps: tuple[Step, ...]
    inputs: Mapping[str, tuple[Any, tuple[int | None, ...] | None]]
    outputs: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    constants: Mapping[str, Array]

    @property
    def nodes(self) -> tuple[NodeInfo, ...]:
        """How each node runs, in the order of execution."""
        return tuple(step.info for step in self.steps)

    @property
    def integer_nodes(self) -> tuple[NodeInfo, ...]:
        """The nodes that run on integers."""
        return tuple(info for info in self.nodes if info.kind == "integer")

    @property
    def float_nodes(self) -> tuple[tuple[str, str, str], ...]:
        """(name, op_type, reason) of each node that runs in float."""
        return tuple((info.name, info.op_type, info.reason) for info in self.nodes if info.kind == "float")

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Real values of the graph outputs; see `run_codes`."""
        return self.run_codes(inputs).outputs

    def run_codes(
        self,
        inputs: Mapping[str, Array],
        tensors: Sequence[str] = (),
        forced: Mapping[str, Array] | None = None,
    ) -> Result:
        """Executes the program.

        Args:
            inputs: every graph input by name, float32 (or what the file declares).
            tensors: names of further quantized tensors whose codes to return.
            forced: codes of quantized tensors with which to go on in place of those computed, so that an
                error shows only where it arises. The result holds the computed ones.

        Raises:
            EmulatorError: if the inputs do not fit the graph, a tensor named is not quantized, or a node
                fails.
        """
        for name in (*tensors, *(forced or ())):
            if name not in self.tensors:
                raise EmulatorError(f"tensor '{name}' is not quantized in this file: name one that is")
        wanted = {name: value for name, value in self.outputs.items() if isinstance(value, Tensor)}
        wanted |= {name: self.tensors[name] for name in tensors}
        replaced = {self.tensors[name].codes: codes for name, codes in (forced or {}).items()}
        values = {**self.constants, **_checked_inputs(self.inputs, inputs)}
        computed = self._execute(values, {*self.outputs, *(t.codes for t in wanted.values())}, replaced)
        codes = {name: Codes(computed[tensor.codes], tensor.params) for name, tensor in wanted.items()}
        outputs = {
            name: numerics.dequantize(codes[name].codes, codes[name].params)
            if name in wanted
            else _typed(computed[name], dtype)
            for name, dtype in self.outputs.items()
        }
        overflows = {s.info.name: int(computed[s.overflows]) for s in self.steps if s.overflows}
        return Result(outputs, codes, overflows)

    def _execute(self, values: dict[str, Array], keep: set[str], replaced: Mapping[str, Array]) -> dict[str, Array]:
        """Runs all steps on `values` (inputs and constants); the values in `keep`, and the overflow counters."""
        computed = {name: values[name] for name in keep & values.keys()}
        for step, unused in zip(self.steps, _last_uses(self.steps), strict=True):
            results = dict(zip(step.outputs, execute(step, values), strict=True))
            computed |= {name: value for name, value in results.items() if name in keep or name == step.overflows}
            values.update((name, _value(replaced.get(name, value))) for name, value in results.items())
            for name in unused:
                del values[name]
        return computed


def _value(value: Any) -> Any:
    """Numpy makes a scalar of a calculation with arrays without axes; a sequence stays a list."""
    return np.asarray(value) if isinstance(value, np.generic) else value


def _typed(value: Any, dtype: Any) -> Any:
    """An output in the type that the file declares; sequences as they are."""
    return value.astype(dtype or value.dtype) if isinstance(value, np.ndarray) else value


def _last_uses(steps: Sequence[Step]) -> list[set[str]]:
    """For each step, the values that no later step reads."""
    seen: set[str] = set()
    unused = []
    for step in reversed(steps):
        unused.append(set(step.inputs) - seen)
        seen |= unused[-1]
    return unused[::-1]


def execute(step: Step, values: Mapping[str, Array]) -> tuple[Array, ...]:
    """The outputs of one step.

    Raises:
        EmulatorError: naming the node, if it fails.
    """
    try:
        return step.run(*[values[name] for name in step.inputs])
    except Exception as error:
        raise EmulatorError(f"node '{step.info.name}' ({step.info.op_type}) failed: {first_line(error)}") from error


def _checked_inputs(
    expected: Mapping[str, tuple[Any, tuple[int | None, ...] | None]], given: Mapping[str, Array]
) -> dict[str, Array]:
    """The graph inputs in the types that the file declares.

    Raises:
        EmulatorError: if a name is missing or unknown, or a shape does not fit.
    """
    if given.keys() != expected.keys():
        raise EmulatorError(f"inputs {sorted(given)} do not fit the graph: expected {sorted(expected)}")
    for name, (_, shape) in expected.items():
        actual = np.shape(given[name])
        if shape is not None and (
            len(actual) != len(shape) or any(n not in (None, m) for n, m in zip(shape, actual, strict=True))
        ):
            raise EmulatorError(f"input '{name}' has shape {list(actual)}: expected {_shown(shape)}")
    return {name: np.asarray(given[name]).astype(dtype) for name, (dtype, _) in expected.items()}


def _shown(shape: tuple[int | None, ...]) -> str:
    return f"[{', '.join('?' if n is None else str(n) for n in shape)}]"
