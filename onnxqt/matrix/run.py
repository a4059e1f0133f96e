"""A quantized file in the arithmetic of a device, with what its compiler decided."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxqt.emulate import Program, load_program
from onnxqt.matrix.task import Column
from onnxqt.numerics import Array, dequantize
from onnxqt.plan import QuantPlan
from onnxqt.profiles import Precision, Profile

DYNAMIC = "only products with weights run on integers where scales are computed at run time"

Floats = Mapping[str, tuple[str, str]]  # operator and reason of a float node, by its name


@dataclass(frozen=True, eq=False)
class Run:
    """A program with what its compiler decided.

    Attributes:
        program: of the file.
        file: what the compiler made of the float model.
        plan: where it put quantizers.
        profile: the back end.
        column: the precision or the scheme.
    """

    program: Program
    file: onnx.ModelProto
    plan: QuantPlan
    profile: Profile
    column: Column

    @property
    def _dynamic(self) -> bool:
        return isinstance(self.column, Precision) and self.column.dynamic

    @property
    def _has_codes(self) -> bool:
        """Whether tensors on a grid are integer codes; on a logarithmic grid the emulator keeps their values."""
        return self.profile.arithmetic.levels == "uniform"

    @property
    def float_nodes(self) -> Floats:
        """Operator and reason of each node that runs in float.

        The emulator reads a file, where a float node between DequantizeLinear and QuantizeLinear looks like an
        integer one; that it is not is for the compiler to say.
        """
        reasons = {node.name: node.reason for node in self.plan.float_nodes}
        return {
            info.name: (info.op_type, reasons.get(info.name, DYNAMIC if self._dynamic else info.reason))
            for info in self.program.nodes
            if info.kind == "float" or (info.kind == "integer" and info.name in reasons)
        }

    @property
    def dynamic_boundaries(self) -> int:
        """With scales that are computed at run time, every product takes floats and gives out floats."""
        return 2 * len(self.program.integer_nodes) if self._dynamic else 0

    @functools.cached_property
    def tensors(self) -> dict[str, str]:
        """The name in the file of each tensor that is on a grid, by its name in the float model."""
        names = self.program.tensors if self._has_codes else _dequantized(self.file)
        return {_real_name(name): name for name in names}

    def values(self, inputs: Mapping[str, Array], tensors: Sequence[str]) -> dict[str, Array]:
        """What some of `tensors` hold, as reals, by their names in the float model."""
        names = {tensor: self.tensors[tensor] for tensor in tensors}
        if not self._has_codes:
            reals = self._tapped.run(inputs)
            return {tensor: reals[name] for tensor, name in names.items()}
        found = self.program.run_codes(inputs, tuple(names.values())).codes
        return {tensor: dequantize(found[name].codes, found[name].params) for tensor, name in names.items()}

    @functools.cached_property
    def _tapped(self) -> Program:
        """The program that gives out every tensor on a grid, and nothing else."""
        return replace(self.program, outputs=dict.fromkeys(self.tensors.values(), np.float32))


def open_run(file: onnx.ModelProto, plan: QuantPlan, profile: Profile, column: Column) -> Run:
    """The program of a file that the compiler of `profile` made as `plan` says.

    Raises:
        EmulatorError: if the emulator cannot read the file.
    """
    return Run(load_program(file, profile.arithmetic), file, plan, profile, column)


def _dequantized(file: onnx.ModelProto) -> list[str]:
    """The activations of a file that quantizers stand before."""
    constants = {tensor.name for tensor in file.graph.initializer}
    return [
        node.output[0]
        for node in file.graph.node
        if node.op_type == "DequantizeLinear" and node.input[0] not in constants
    ]


def _real_name(tensor: str) -> str:
    """The float model's name of a tensor of a quantized file (`onnxqt.export.qdq`)."""
    return tensor.rstrip("_").removesuffix(".dequantized") if ".dequantized" in tensor else tensor
