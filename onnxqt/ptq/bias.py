"""Bias correction: what rounding the weights shifts a layer's mean output by is taken out of its bias.

    b' = b + E[y] - E[y_q]

with y the output of a layer in the float model and y_q in the quantized one, channel by channel, before the
activation (Nagel et al. 2019, arXiv 1906.04721, section 4.2; the means over samples, as in their appendix D).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxqt.data import Samples
from onnxqt.model import GraphIndex, Model
from onnxqt.numerics import Array
from onnxqt.plan import IntegerNode
from onnxqt.ptq.layers import Layer, Progress, Quantized, by_name, layers_of, run_part, silent


@dataclass(frozen=True, eq=False)
class Corrected:
    """A quantized model with corrected biases.

    Attributes:
        quantized: the model; its quantizers are what they were.
        shifts: what was added to each bias, float64 (channels,), by its name.
        skipped: why a layer was not corrected, by the name of its node.
    """

    quantized: Quantized
    shifts: Mapping[str, Array]
    skipped: Mapping[str, str]


def correct_biases(quantized: Quantized, samples: Samples, progress: Progress = silent) -> Corrected:
    """Correct the bias of every layer, in topological order, each behind the layers corrected before it.

    Args:
        quantized: the model, with the reference whose mean outputs it should have.
        samples: the calibration data, read twice for each layer.
        progress: called with the number of layers done, and the name of the last one.

    Raises:
        ModelError: if the model is too large for it.
    """
    layers = layers_of(quantized.model, quantized.plan)
    skipped = {layer.node.name: reason for layer in layers if (reason := _reason(quantized.model.graph, layer))}
    shifts = {}
    for done, layer in enumerate(layer for layer in layers if layer.node.name not in skipped):
        name = layer.node.bias or ""
        expected = _means(quantized.reference, quantized.reference.proto, layer, samples)
        shifts[name] = expected - _means(quantized.model, quantized.proto(), layer, samples)
        bias = np.asarray(quantized.model.graph.constant(name))
        corrected = bias + shifts[name].reshape(bias.shape)
        quantized = replace(quantized, model=quantized.model.with_weights({name: corrected}))
        progress(done + 1, layer.node.name)
    return Corrected(quantized, shifts, skipped)


def _reason(graph: GraphIndex, layer: Layer) -> str | None:
    """Why the bias of a layer cannot be corrected; None if it can."""
    bias = layer.node.bias
    if bias is None:
        return "has no bias"
    if len(graph.consumers[bias]) > 1 or bias in graph.outputs:
        return f"shares its bias '{bias}' with other nodes"
    if math.prod(graph.initializers[bias].dims) < _channels(graph, layer.node):
        return f"has one bias '{bias}' for all its channels"
    return None


def _channels(graph: GraphIndex, node: IntegerNode) -> int:
    """Output channels of a layer; the weight of a grouped ConvTranspose holds those of one group."""
    if node.weight is None:
        return 0
    channels = int(graph.initializers[node.weight.tensor].dims[node.weight.axis])
    return channels * node.groups if node.op_type == "ConvTranspose" else channels


def _means(model: Model, proto: onnx.ModelProto, layer: Layer, samples: Samples) -> Array:
    """Mean of each channel of a layer's output in `proto`, a form of `model`: float64 (channels,)."""
    end = by_name(proto)[layer.end].output[0]
    total, count = np.zeros(1), 0
    for values in run_part(model, proto, [end], samples):
        rows = np.moveaxis(values[end], layer.axis, 0)
        rows = rows.reshape(len(rows), -1)
        total = total + rows.sum(axis=1, dtype=np.float64)
        count += rows.shape[1]
    return total / count
