"""The neutral calibration table: every range and scale of a run in one JSON file.

Vendor tables are derived from it. The ends of a clip come from the grid, so that a consumer of ranges finds the
same scale again: `min = (qmin - zp) s`, `max = (qmax - zp) s`, and plus and minus `qmax s` on symmetric grids.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxqt.calibrate import Quantizers, RangeTable, bias_scale
from onnxqt.model import Model
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.plan import QuantPlan

FORMAT = "onnxqt.quant_table"
VERSION = "0.1"

Json = dict[str, Any]


def neutral_table(model: Model, plan: QuantPlan, ranges: RangeTable, quantizers: Mapping[str, Quantizers]) -> Json:
    """The table of a float checkpoint.

    Args:
        model: the checkpoint.
        plan: its quantizer sites.
        ranges: its calibrated activation ranges.
        quantizers: the parameters of each scheme, by its name.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "model_sha256": model.sha256,
        "num_samples": ranges.samples,
        "tensors": [
            *(_activation(model, site.tensor, ranges, quantizers) for site in plan.activations),
            *(_weight(model, site.tensor, quantizers) for site in plan.weights),
            *_biases(model, plan, quantizers),
        ],
    }


def _activation(model: Model, tensor: str, ranges: RangeTable, quantizers: Mapping[str, Quantizers]) -> Json:
    graph, seen = model.graph, ranges.tensors[tensor]
    role = "input" if tensor in graph.inputs else "output" if tensor in graph.outputs else "activation"
    views = {scheme: _view(params.activations[tensor]) for scheme, params in quantizers.items()}
    return _entry(tensor, role, graph.shape(tensor), (seen.min, seen.max), seen.count, views)


def _weight(model: Model, tensor: str, quantizers: Mapping[str, Quantizers]) -> Json:
    value = model.graph.constant(tensor)
    views = {scheme: _view(params.weights[tensor]) for scheme, params in quantizers.items()}
    return _constant_entry(tensor, "weight", value, views)


def _biases(model: Model, plan: QuantPlan, quantizers: Mapping[str, Quantizers]) -> list[Json]:
    entries = []
    for node in plan.integer_nodes:
        if node.weight is None or node.bias is None:
            continue
        size = math.prod(model.graph.initializers[node.bias].dims)
        views = {}
        for scheme, params in quantizers.items():
            scale = bias_scale(params.weights[node.weight.tensor], params.activations[node.inputs[0]].scale, size)
            zero = np.zeros(scale.shape, np.int32)
            views[scheme] = _view(QParams(scale, zero, Grid(32, signed=True), 0 if scale.ndim else None))
        entry = _constant_entry(node.bias, "bias", model.graph.constant(node.bias), views)
        entries.append({**entry, "node": node.name})
    return entries


def _constant_entry(tensor: str, role: str, value: Array | None, views: Mapping[str, Json]) -> Json:
    array = np.zeros(0) if value is None else value
    observed = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    return _entry(tensor, role, array.shape, observed, array.size, views)


def _entry(
    tensor: str,
    role: str,
    shape: tuple[int | None, ...] | None,
    observed: tuple[float, float],
    count: int,
    views: Mapping[str, Json],
) -> Json:
    return {
        "name": tensor,
        "role": role,
        "shape": None if shape is None else list(shape),
        "min": observed[0],
        "max": observed[1],
        "count": count,
        "qparams": _merged(views),
    }


def _view(params: QParams) -> Json:
    grid = params.grid
    lo, hi = params.range
    if grid.signed:
        lo = -hi
    return {
        "bits": grid.bits,
        "signed": grid.signed,
        "qmin": grid.qmin,
        "qmax": grid.qmax,
        "axis": params.axis,
        "scale": _numbers(params.scale),
        "zero_point": [int(z) for z in np.atleast_1d(params.zero_point)],
        "clip": {"min": _numbers(lo), "max": _numbers(hi)},
    }


def _numbers(values: FloatArray) -> list[float]:
    """Float32 values as JSON numbers that read back to the same float32."""
    return [float(str(value)) for value in np.atleast_1d(np.asarray(values, np.float32))]


def _merged(views: Mapping[str, Json]) -> list[Json]:
    """Each different view once, with the schemes that share it."""
    merged: list[Json] = []
    for scheme, view in views.items():
        for entry in merged:
            if {key: value for key, value in entry.items() if key != "schemes"} == view:
                entry["schemes"].append(scheme)
                break
        else:
            merged.append({"schemes": [scheme], **view})
    return merged
