"""A layer as matrix products: its weight, what multiplies it, and the grid of its codes.

A Conv, Gemm or MatMul computes, at each position of its output and for each group,

    y = W x + b,  W (outputs, inputs)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxqt.model import GraphIndex, Model, Node
from onnxqt.numerics import Array, FloatArray, QParams, spread
from onnxqt.ptq.layers import Layer


def no_matrices(graph: GraphIndex, layer: Layer) -> str | None:
    """Why a layer is no matrix product with a weight of its own; None if it is."""
    node = layer.node
    if node.weight is None or node.op_type == "ConvTranspose":
        return f"no learned rounding for {node.op_type}"
    if node.weight.batched:
        return "its weight is a stack of matrices"
    if len(graph.consumers[node.weight.tensor]) > 1:
        return f"shares its weight '{node.weight.tensor}' with other nodes"
    return None


@dataclass(frozen=True, eq=False, slots=True)
class SiteGrid:
    """Scale, and least and largest code counted from the zero point, of a weight as matrices.

    Each is (groups, outputs, 1), or (groups, outputs, inputs) where they differ along a row.
    """

    scale: FloatArray
    lo: FloatArray
    hi: FloatArray

    def rounded(self, values: FloatArray) -> FloatArray:
        """The nearest values on the grid."""
        return np.asarray(np.clip(np.rint(values / self.scale), self.lo, self.hi) * self.scale, np.float32)

    def column(self, index: int) -> "SiteGrid":
        """That of one input alone."""
        if self.scale.shape[2] == 1:
            return self
        one = slice(index, index + 1)
        return SiteGrid(self.scale[:, :, one], self.lo[:, :, one], self.hi[:, :, one])


@dataclass(frozen=True, eq=False, slots=True)
class Site:
    """A weight, seen as one matrix (outputs, inputs) for each group."""

    tensor: str
    values: Array
    groups: int
    output_first: bool

    def matrices(self, values: Array) -> Array:
        """(groups, outputs, inputs) of an array in the weight's shape."""
        return values.reshape(self.groups, values.shape[0] // self.groups, -1) if self.output_first else values.T[None]

    def whole(self, matrices: Array) -> Array:
        """The weight's shape again."""
        return matrices.reshape(self.values.shape) if self.output_first else matrices[0].T

    def grid(self, params: QParams) -> SiteGrid:
        """The grid of the weight in the shape of the matrices."""
        shape = self.values.shape
        width = None if params.block_size is not None else 1
        scale, zero_point = (
            self.matrices(np.broadcast_to(spread(values, params, shape), shape))[..., :width]
            for values in (params.scale, params.zero_point)
        )
        lo, hi = params.grid.qmin - zero_point, params.grid.qmax - zero_point
        return SiteGrid(scale, lo.astype(np.float32), hi.astype(np.float32))


def site_of(model: Model, layer: Layer) -> Site:
    """The weight of a layer that `no_matrices` has nothing against."""
    node, tensor = layer.node, layer.node.weight.tensor if layer.node.weight else ""
    output_first = node.op_type == "Conv" or bool(layer.source.attributes.get("transB", 0))
    return Site(tensor, np.asarray(model.graph.constant(tensor)), node.groups, output_first)


def read_rows(layer: Layer, x: Array, y: Array, kernel: Sequence[int]) -> tuple[Array, Array]:
    """What a layer reads and gives out as `positions_of` takes them.

    Args:
        layer: the layer.
        x: what its node reads.
        y: what it gives out.
        kernel: sizes of a convolution's kernel; not used for others.
    """
    if layer.node.op_type == "Conv":
        return windows(layer.source, kernel, x, y.shape[2:]), y
    return np.moveaxis(x, -1, 1), np.moveaxis(y, -1, 1)


def grouped(rows: Array, groups: int) -> FloatArray:
    """(rows, values) -> (groups, rows, values of a group)."""
    return np.ascontiguousarray(rows.reshape(len(rows), groups, -1).swapaxes(0, 1), np.float32)


def positions_of(x: Array, y: Array, count: int, rng: np.random.Generator) -> tuple[Array, Array]:
    """`count` random positions of each sample, or all if there are fewer: (rows, inputs) and (rows, outputs).

    Args:
        x: (samples, channels, *positions, ...).
        y: (samples, channels, *positions).
        count: positions of a sample.
        rng: what draws them.
    """
    sizes = y.shape[2:]
    chosen = np.argsort(rng.random((len(y), math.prod(sizes))), axis=1)[:, :count]
    sample = np.repeat(np.arange(len(y)), chosen.shape[1])
    place = np.unravel_index(chosen.ravel(), sizes) if sizes else ()
    at: Any = (sample, slice(None), *place)  # numpy puts the axis of the rows first
    return x[at].reshape(len(sample), -1), y[at]


def windows(node: Node, kernel: Sequence[int], x: Array, sizes: tuple[int, ...]) -> Array:
    """What each output position of a convolution reads: a view (samples, channels, *positions, *kernel)."""
    rank = len(kernel)
    strides = node.attributes.get("strides", [1] * rank)
    dilations = node.attributes.get("dilations", [1] * rank)
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    needed = [(o - 1) * s + r for o, s, r in zip(sizes, strides, reach, strict=True)]
    mode = node.attributes.get("auto_pad", b"NOTSET")
    pads = node.attributes.get("pads", [0] * 2 * rank)
    before = list(pads[:rank])
    if mode in (b"SAME_UPPER", b"SAME_LOWER"):
        total = [max(n - size, 0) for n, size in zip(needed, x.shape[2:], strict=True)]
        before = [(t + 1) // 2 if mode == b"SAME_LOWER" else t // 2 for t in total]
    after = [max(n - b - size, 0) for n, b, size in zip(needed, before, x.shape[2:], strict=True)]
    padded = np.pad(x, ((0, 0), (0, 0), *zip(before, after, strict=True)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + rank)))
    steps = [slice(0, n - r + 1, s) for n, r, s in zip(needed, reach, strides, strict=True)]
    taps = [slice(None, None, d) for d in dilations]
    return windows[(slice(None), slice(None), *steps, *taps)]
