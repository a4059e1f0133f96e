"""The neutral calibration table: every range and scale of a run in one JSON file.

Vendor tables are derived from it. The ends of a clip come from the grid, so that a consumer of ranges finds the
same scale again: `min = (qmin - zp) s`, `max = (qmax - zp) s`, and plus and minus `qmax s` on symmetric grids.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxqt.calibrate import Quantizers, RangeTable, bias_scale
from onnxqt.errors import ExportError, first_line
from onnxqt.model import Model
from onnxqt.numerics import Array, FloatArray, Grid, QParams
from onnxqt.plan import QuantPlan

FORMAT = "onnxqt.quant_table"
VERSION = "0.1"
_LARGEST_FILE = 256 << 20  # bytes

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


def table_quantizers(path: Path, plan: QuantPlan, scheme: str) -> Quantizers:
    """The parameters that a table file has for every quantizer of a plan under one of its schemes.

    Args:
        path: a file that holds a `neutral_table`, perhaps edited since.
        plan: the sites of the model that the table describes.
        scheme: the name of a scheme in the table.

    Raises:
        ExportError: if the file is no table, or lacks a tensor of the plan or the scheme; naming it.
    """
    entries = {(entry["role"] == "weight", entry["name"]): entry for entry in _read(path) if entry["role"] != "bias"}

    def params(tensor: str, weight: bool) -> QParams:
        entry = entries.get((weight, tensor))
        if entry is None:
            raise ExportError(
                f"'{path}' has no tensor '{tensor}', which the model quantizes: give the table of this model"
            )
        view = next((view for view in entry["qparams"] if scheme in view["schemes"]), None)
        if view is None:
            raise ExportError(f"'{path}' has no scheme {scheme} for '{tensor}': name one that it has")
        return _params_of(path, tensor, view)

    return Quantizers(
        {site.tensor: params(site.tensor, weight=False) for site in plan.activations},
        {site.tensor: params(site.tensor, weight=True) for site in plan.weights},
    )


def _read(path: Path) -> list[Json]:
    """The tensors of a table file."""
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise ExportError(f"'{path}' is larger than {_LARGEST_FILE >> 20} MiB: give a table that onnxqt wrote")
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise ExportError(f"cannot read '{path}' ({error.strerror}): give a table that onnxqt wrote") from error
    except ValueError as error:
        raise ExportError(f"'{path}' is not JSON ({first_line(error)}): give a table that onnxqt wrote") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ExportError(f"'{path}' is not a table of version {VERSION} of {FORMAT}: give a table that onnxqt wrote")
    tensors = content.get("tensors")
    fields = {"name", "role", "qparams"}
    if not isinstance(tensors, list) or not all(isinstance(t, dict) and fields <= t.keys() for t in tensors):
        raise ExportError(f"'{path}': 'tensors' must be a list of objects with {', '.join(sorted(fields))}")
    return tensors


def _params_of(path: Path, tensor: str, view: Json) -> QParams:
    """A view of a tensor as parameters."""
    try:
        grid = Grid(int(view["bits"]), bool(view["signed"]))
        grid = replace(grid, narrow=int(view["qmin"]) == grid.qmin + 1)
        scale, zero_point = np.asarray(view["scale"], np.float32), np.asarray(view["zero_point"], np.int32)
        axis = None if view["axis"] is None else int(view["axis"])
        if (grid.qmin, grid.qmax) != (view["qmin"], view["qmax"]) or scale.ndim != 1 or scale.shape != zero_point.shape:
            raise ValueError("qmin and qmax must be those of the bits, scale and zero_point lists of one length")
        if axis is None:
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
        return QParams(scale, zero_point, grid, axis)
    except (KeyError, TypeError, ValueError) as error:
        raise ExportError(f"'{path}', tensor '{tensor}': {first_line(error)}: correct the entry") from error


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
