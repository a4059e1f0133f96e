"""An integer program as plain data: for people, for JSON, and to build the same program for another runtime.

    {"values": {CODE: {"bits", "signed", "qmin", "qmax", "scale", "zero_point"}},
     "inputs": [CODE], "outputs": [CODE],
     "nodes": [{"name", "op_type", "kind", "reason", "note", "rule", "accumulator", "bound", "implementation",
                "inputs": [VALUE], "output": VALUE, "outputs": [VALUE], "attributes": {}, "weight_bits", "clamp",
                "requantize": {"rule", "multiplier": [], "mantissa": [], "exponent": []} or null}]}

CODE is the name of a value that is codes, VALUE of any value. The arrays are named `weights:NODE`, `weight_scale:NODE`,
`weight_zero_point:NODE` (absent: 0), `bias:NODE`, `float_bias:NODE` and `table:NODE`.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from onnxqt.emulate.steps import Detail, Step, Tensor
from onnxqt.numerics import Array, QParams
from onnxqt.requantize import Requantization

Json = dict[str, Any]


def listing_of(
    steps: Iterable[Step], values: Mapping[str, QParams], outputs: Mapping[str, Any]
) -> tuple[Json, dict[str, Array]]:
    """The listing of a program, and the arrays that it names."""
    arrays: dict[str, Array] = {}
    nodes = []
    for step in steps:
        nodes.append(_node(step))
        if step.detail is not None:
            arrays |= _arrays(step.info.name, step.detail)
    content = {
        "values": {name: _grid(params) for name, params in values.items()},
        "inputs": [
            step.outputs[0]
            for step in steps
            if step.info.kind == "boundary" and step.outputs[0] in values and step.inputs[0] not in values
        ],
        "outputs": [value.codes for value in outputs.values() if isinstance(value, Tensor)],
        "nodes": nodes,
    }
    return content, arrays


def _grid(params: QParams) -> Json:
    grid = params.grid
    return {
        "bits": grid.bits,
        "signed": grid.signed,
        "qmin": grid.qmin,
        "qmax": grid.qmax,
        "scale": float(params.scale),
        "zero_point": int(params.zero_point),
    }


def _node(step: Step) -> Json:
    info, detail = step.info, step.detail or Detail()
    how = detail.requantization
    return {
        "name": info.name,
        "op_type": info.op_type,
        "kind": info.kind,
        "reason": info.reason,
        "note": info.note,
        "rule": info.rule,
        "accumulator": info.accumulator,
        "bound": info.bound,
        "implementation": info.implementation,
        "inputs": list(step.inputs),
        "output": step.outputs[0],
        "outputs": [name for name in step.outputs if name != step.overflows],
        "attributes": {name: _plain(value) for name, value in detail.attributes.items()},
        "weight_bits": detail.weight_bits,
        "clamp": None if detail.clamp is None else list(detail.clamp),
        "requantize": None if how is None else _requantize(how),
    }


def _requantize(how: Requantization) -> Json:
    parts = {"multiplier": how.multiplier, "mantissa": how.mantissa, "exponent": how.exponent}
    numbers = {name: [] if value is None else np.atleast_1d(value).tolist() for name, value in parts.items()}
    return {"rule": how.rule, **numbers}


def _plain(value: Any) -> Any:
    """An attribute as JSON can hold it; what holds tensors or graphs is named by its type."""
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, bool | int | float | str) else type(value).__name__


def _arrays(name: str, detail: Detail) -> dict[str, Array]:
    how = detail.requantization
    parts = {
        "weights": detail.weights,
        "weight_scale": detail.weight_scale,
        "weight_zero_point": np.asarray(detail.weight_zero_point) if detail.weight_zero_point else None,
        "bias": detail.bias,
        "float_bias": None if how is None else how.bias,
        "table": detail.table,
    }
    return {f"{part}:{name}": np.asarray(value) for part, value in parts.items() if value is not None}
