"""An integer program: steps in order, each a function from values to values, and how they are executed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt import numerics
from onnxqt.emulate import listing
from onnxqt.emulate.steps import Codes, NodeInfo, Step, Tensor, storage
from onnxqt.errors import EmulatorError, first_line
from onnxqt.numerics import Array, QParams


@dataclass(frozen=True, slots=True)
class Result:
    """What a run returns.

    Attributes:
        outputs: real values of each graph output; codes where the file's output is itself an integer.
        codes: codes of each graph output that is quantized, and of the tensors asked for.
        overflows: accumulators that did not fit their register, by node name.
    """

    outputs: dict[str, Array]
    codes: dict[str, Codes]
    overflows: dict[str, int]


@dataclass(frozen=True, eq=False, slots=True)
class Program:
    """The integer program of one file. Its runs share nothing, so several threads may run it at once.

    Attributes:
        steps: in the order of execution.
        inputs: numpy type and shape (None where dynamic) of each graph input.
        outputs: each graph output as codes, or the numpy type of one that is not quantized (None: any).
        tensors: the tensors of the file that are quantized, by name: outputs of DequantizeLinear.
        values: every value of the program that is codes, by the name of the codes: constants are not among them.
        constants: constant values that steps read.
        overflow: what happens to accumulators that do not fit; see `onnxqt.profiles.Accumulator`.
    """

    steps: tuple[Step, ...]
    inputs: Mapping[str, tuple[Any, tuple[int | None, ...] | None]]
    outputs: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    values: Mapping[str, QParams]
    constants: Mapping[str, Array]
    overflow: str = "wrap"

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

    def listing(self) -> tuple[dict[str, Any], dict[str, Array]]:
        """The program as JSON can hold it, and the arrays that it names; see `onnxqt.emulate.listing`."""
        return listing.listing_of(self.steps, self.values, self.outputs)

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
            EmulatorError: if the inputs do not fit the graph, a tensor named is not quantized, a node fails, or an
                accumulator overflows whose device leaves the result open.
        """
        for name in (*tensors, *(forced or ())):
            if name not in self.tensors:
                raise EmulatorError(f"tensor '{name}' is not quantized in this file: name one that is")
        wanted = {name: value for name, value in self.outputs.items() if isinstance(value, Tensor)}
        wanted |= {name: self.tensors[name] for name in tensors}
        replaced = {
            self.tensors[name].codes: codes.astype(storage(self.tensors[name].params.grid))
            for name, codes in (forced or {}).items()
        }
        values = {**self.constants, **_checked_inputs(self.inputs, inputs)}
        computed = self._execute(values, {*self.outputs, *(t.codes for t in wanted.values())}, replaced)
        codes = {name: Codes(computed[tensor.codes].astype(np.int32), tensor.params) for name, tensor in wanted.items()}
        outputs = {
            name: numerics.dequantize(codes[name].codes, codes[name].params)
            if name in wanted
            else _typed(computed[name], dtype)
            for name, dtype in self.outputs.items()
        }
        overflows = {s.info.name: int(computed[s.overflows]) for s in self.steps if s.overflows}
        return Result(outputs, codes, overflows)

    def run_values(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Every value of the program that is codes, by the name of the codes, int32; see `run_codes`."""
        values = {**self.constants, **_checked_inputs(self.inputs, inputs)}
        computed = self._execute(values, set(self.values), {})
        return {name: computed[name].astype(np.int32) for name in self.values}

    def _execute(self, values: dict[str, Array], keep: set[str], replaced: Mapping[str, Array]) -> dict[str, Array]:
        """Runs all steps on `values` (inputs and constants); the values in `keep`, and the overflow counters."""
        computed = {name: values[name] for name in keep & values.keys()}
        for step, unused in zip(self.steps, _last_uses(self.steps), strict=True):
            results = dict(zip(step.outputs, execute(step, values), strict=True))
            if step.overflows and self.overflow == "error" and (count := int(results[step.overflows])):
                raise EmulatorError(
                    f"node '{step.info.name}' ({step.info.op_type}): {count} accumulators do not fit "
                    f"{step.info.accumulator}, where the device's result is undefined: use smaller scales for its "
                    "input or fewer bits for its weights"
                )
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


__all__ = ["Codes", "NodeInfo", "Program", "Result", "Step", "Tensor", "execute", "storage"]
