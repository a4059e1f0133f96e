"""Nodes with a quantized weight as compilers see them: with what they read, and what is fused behind them."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxqt.numerics import FloatArray, QParams
from onnxqt.table.form import Entry, NodeRef, Table
from onnxqt.vendors.lost import activations, named
from onnxqt.vendors.names import called
from onnxqt.vendors.ranges import ACTIVATIONS

# How exporters name the only output of a node: PyTorch, TensorFlow, and tools that keep one name for both.
_OUTPUTS_OF_NODES = ("{}_output_0", "{}:0", "{}")


@dataclass(frozen=True, eq=False, slots=True)
class Layer:
    """A node with a quantized weight.

    Attributes:
        node: the node, and which of its inputs the weight is.
        weight: its weight.
        weight_params: how it is quantized.
        input: the activation that it multiplies; None where the table has none.
        output: what it computes, after what is fused behind it; None where the table does not tell.
        bias: its bias; None where it has none, or the Add behind it has it.
        scheme: under which all of this holds.
    """

    node: NodeRef
    weight: Entry
    weight_params: QParams
    input: Entry | None
    output: Entry | None
    bias: Entry | None
    scheme: str

    @property
    def input_params(self) -> QParams | None:
        """How its input is quantized; None if it is not."""
        return self.input.params(self.scheme) if self.input else None

    @property
    def output_params(self) -> QParams | None:
        """How its output is quantized; None if it is not."""
        return self.output.params(self.scheme) if self.output else None

    def called(self, vendor: str) -> str:
        """What a vendor's tool calls the layer: the alias of its output, else of its weight, else the node's name."""
        named = [entry for entry in (self.output, self.weight) if entry and vendor in entry.aliases]
        return called(named[0], vendor) if named else self.node.node

    @property
    def channels(self) -> int | None:
        """How many outputs have a scale of their own where scales are per channel; None where unknown."""
        shape, params = self.weight.shape, self.weight_params
        if params.axis is not None and not params.block_size:
            return int(params.scale.size)
        if self.node.op == "Conv" and shape:
            return shape[0]
        if self.node.op == "MatMul" and shape:
            return shape[-1]
        others = [entry.shape[-1] for entry in (self.output, self.bias) if entry and entry.shape]
        return others[0] if others and self.node.op == "Gemm" else None

    @property
    def channel_scales(self) -> FloatArray | None:
        """The scale of each output channel, float32 (channels,); None where the weight has blocks or none is known."""
        channels = self.channels
        if self.weight_params.block_size or channels is None:
            return None
        return np.broadcast_to(self.weight_params.scale, channels).astype(np.float32)

    @property
    def groups(self) -> int | None:
        """The number of groups of a convolution, from its shapes; None where they are unknown."""
        inputs = self.input.shape if self.input else None
        if not inputs or not self.weight.shape or len(inputs) < 3:
            return None
        total, own = inputs[1], self.weight.shape[1]
        return total // own if total and own else None


def layers(table: Table, scheme: str) -> list[Layer]:
    """The nodes whose weights a scheme quantizes, in the order of their weights in the table."""
    found = []
    for entry, params in table.quantized(scheme, "weight"):
        for node in entry.consumers:
            data = 0 if node.index else 1
            source = _reader_of(table, node.node, data, *ACTIVATIONS)
            bias = _reader_of(table, node.node, 2, "bias")
            found.append(Layer(node, entry, params, source, _output(table, node), bias, scheme))
    return found


def weight_problem(layer: Layer) -> str | None:
    """Why a weight has no place in a format with one symmetric scale per output channel; None where it has one."""
    if layer.weight_params.block_size:
        return "the format has no scales per block"
    if np.any(layer.weight_params.zero_point) or not layer.weight_params.grid.signed:
        return "the format has no zero points of weights"
    if layer.channel_scales is None:
        return "the table does not tell how many output channels it has"
    return None


def stored_wider(found: Iterable[Layer], bits: int) -> tuple[str, ...]:
    """For tools that store weights with more bits than they need, and keep their codes."""
    names = [layer.weight.name for layer in found if layer.weight_params.grid.bits < bits]
    return (
        (f"the tool stores weights with {bits} bits: {named(names)} keep their codes, not their size",) if names else ()
    )


def part_of(table: Table, names: Collection[str]) -> Table:
    """A table with the entries of these names alone: what a file holds, so that only that counts as lost."""
    return replace(table, entries=tuple(entry for entry in table.entries if entry.name in names))


def left_out(table: Table, scheme: str, names: Collection[str], reason: str) -> dict[str, str]:
    """`reason` for each activation that a scheme quantizes and that is not among these names."""
    quantized = (entry for entry in activations(table) if entry.params(scheme))
    return {entry.name: reason for entry in quantized if entry.name not in names}


def _reader_of(table: Table, node: str, index: int, *roles: str) -> Entry | None:
    """The entry that a node reads as its input of this index."""
    for entry in table.entries:
        if entry.role in roles and any(ref.node == node and ref.index == index for ref in entry.consumers):
            return entry
    return None


def _output(table: Table, node: NodeRef) -> Entry | None:
    """What a node computes, after fusion.

    Where a table does not say what is computed by the node: a tensor that is fused into another may have no entry that
    tells its producer; then it is known by the name that exporters give to the output of a node.
    """
    computed = [entry for entry in table.entries if entry.computed_by and entry.computed_by.node == node.node]
    if computed:
        return computed[0]
    own = [entry.name for entry in table.entries if entry.producer and entry.producer.node == node.node]
    names = own or [form.format(node.node) for form in _OUTPUTS_OF_NODES]
    return next((entry for name in names for entry in _holders(table, name)), None)


def _holders(table: Table, name: str) -> Iterator[Entry]:
    """The entry that a tensor is fused into, or its own."""
    yield from (entry for entry in table.entries if name in entry.fused_from)
    yield from (entry for entry in table.entries if entry.name == name and entry.producer)
