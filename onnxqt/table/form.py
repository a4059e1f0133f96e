"""What a calibration table says, as frozen data: one entry per tensor, one view per way of quantizing it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from onnxqt.numerics import Array, FloatArray, QParams

Role = Literal["input", "activation", "output", "weight", "bias"]
Source = Literal["observed", "derived", "user", "imported"]


@dataclass(frozen=True, slots=True)
class NodeRef:
    """One end of an edge of the graph: a node, its operator, and which of its inputs or outputs."""

    node: str
    op: str
    index: int


@dataclass(frozen=True, eq=False, slots=True)
class Stats:
    """What calibration saw of an activation, or what a constant holds.

    Attributes:
        count: values.
        min: the least.
        max: the largest.
        quantiles: values at shares such as 0.0001, by the share.
        counts: a histogram of equal bins, float64 (bins,); None where there is none.
        limit: the histogram spans [-limit, limit].
    """

    count: int
    min: float
    max: float
    quantiles: Mapping[float, float] = field(default_factory=dict)
    counts: Array | None = None
    limit: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class View:
    """One way in which a tensor is quantized, and the schemes that share it."""

    schemes: tuple[str, ...]
    params: QParams

    @property
    def clip(self) -> tuple[FloatArray, FloatArray]:
        """The ends that a consumer of ranges finds the same scale from, float32 of the scale's shape.

        [(qmin - zp) s, (qmax - zp) s], and [-qmax s, qmax s] where codes are signed and the zero point is 0
        """
        low, high = self.params.range
        centred = self.params.grid.signed and not np.any(self.params.zero_point)
        return (-high if centred else low), high


@dataclass(frozen=True, eq=False, slots=True)
class Entry:
    """One tensor of the float model.

    Attributes:
        name: in the ONNX file that the table belongs to.
        role: what it is there for.
        shape: None where unknown; a free axis is None.
        producer: the node that gives it out; None for inputs and constants.
        computed_by: the node that compilers run on integers to compute it: the first of the chain that ends in it, the
            Conv where the producer is a Relu behind it; None where it is not computed on integers.
        consumers: what reads it.
        fused_from: tensors that compilers fuse into this one and never materialise, nearest first: the output of a
            Conv whose Relu this is.
        aliases: what vendors' tools call it, by vendor.
        views: how it is quantized; empty where it stays float.
        reason: why it stays float; None where it does not.
        stats: what was seen of it; None for a table that knows only scales.
        source: where the views come from.
        sha256: of a constant's float32 values; None for an activation.
        rounding: "nearest", or what moved a weight's codes from there ("adaround").
        group: the tensor whose grid it shares, the same for all that share it; None where it has its own.
        product_of: of a bias, the activation and the weight whose scales multiply to its own; empty for all others.
    """

    name: str
    role: Role
    shape: tuple[int | None, ...] | None = None
    producer: NodeRef | None = None
    consumers: tuple[NodeRef, ...] = ()
    fused_from: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    views: tuple[View, ...] = ()
    reason: str | None = None
    stats: Stats | None = None
    source: Source = "observed"
    sha256: str | None = None
    rounding: str = "nearest"
    group: str | None = None
    product_of: tuple[str, ...] = ()
    computed_by: NodeRef | None = None

    def params(self, scheme: str) -> QParams | None:
        """How it is quantized under a scheme; None if it is not."""
        return next((view.params for view in self.views if scheme in view.schemes), None)


@dataclass(frozen=True, eq=False, slots=True)
class Table:
    """A calibration table.

    Attributes:
        entries: in the order of the graph, weights and biases behind the activations.
        schemes: the schemes that it has views for.
        model_file: name of the float ONNX file that it belongs to, without a folder.
        model_sha256: of that file.
        graph_sha256: of the graph's operators, names and shapes without the values of weights.
        opset: of the file.
        samples: of calibration.
        ranges: how clips were chosen ("mse", "minmax", ...).
        producer: program and version.
    """

    entries: tuple[Entry, ...]
    schemes: tuple[str, ...]
    model_file: str = ""
    model_sha256: str = ""
    graph_sha256: str = ""
    opset: int = 0
    samples: int = 0
    ranges: str = ""
    producer: str = ""

    def entry(self, name: str) -> Entry | None:
        """The entry of a tensor; None if it has none."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def quantized(self, scheme: str, *roles: Role) -> list[tuple[Entry, QParams]]:
        """The entries of these roles that a scheme quantizes, with their parameters."""
        found = [(entry, entry.params(scheme)) for entry in self.entries if entry.role in roles]
        return [(entry, params) for entry, params in found if params is not None]
