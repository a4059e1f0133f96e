"""A table as JSON and arrays."""

import json
import struct
from typing import Any

import numpy as np

from onnxqt.numerics import Array, QParams
from onnxqt.table.form import Entry, NodeRef, Stats, View
from onnxqt.table.reading import Json

FORMAT = "onnxqt.quant_table"
VERSION = "1.0"
NUMERICS = {"rounding": "half_even", "saturation": "clamp", "scale_dtype": "float32"}
INLINE = 256  # values of an array that stands in the JSON file itself
WIDEST = 32  # bits of a code; a clip of so many codes says nothing


def entry_json(entry: Entry, key: str, arrays: dict[str, Array]) -> Json:
    """An entry as JSON; arrays of more than `INLINE` values go into `arrays`, under names that begin with `key`."""
    return {
        "name": entry.name,
        "role": entry.role,
        "shape": None if entry.shape is None else list(entry.shape),
        "producer": None if entry.producer is None else _node_json(entry.producer),
        "computed_by": None if entry.computed_by is None else _node_json(entry.computed_by),
        "consumers": [_node_json(node) for node in entry.consumers],
        "fused_from": list(entry.fused_from),
        "group": entry.group,
        "product_of": list(entry.product_of),
        "aliases": dict(sorted(entry.aliases.items())),
        "quantize": bool(entry.views),
        "reason": entry.reason,
        "source": entry.source,
        "sha256": entry.sha256,
        "rounding": entry.rounding,
        "stats": None if entry.stats is None else _stats_json(entry.stats, key, arrays),
        "qparams": [_view_json(view, f"{key}.{index}", arrays) for index, view in enumerate(entry.views)],
    }


def _node_json(node: NodeRef) -> Json:
    return {"node": node.node, "op": node.op, "index": node.index}


def _stats_json(stats: Stats, key: str, arrays: dict[str, Array]) -> Json:
    hist = None
    if stats.counts is not None:
        counts = np.asarray(stats.counts, np.float64)
        whole = bool((counts == np.floor(counts)).all()) and counts.max(initial=0) < 1 << 32
        values = _array_json(counts.astype(np.uint32) if whole else counts, f"{key}.counts", arrays)
        hist = {"lo": -stats.limit, "hi": stats.limit, "bins": stats.counts.size, "counts": values}
    return {
        "count": stats.count,
        "min": stats.min,
        "max": stats.max,
        "absmax": max(abs(stats.min), abs(stats.max)),
        "quantiles": {repr(share): value for share, value in sorted(stats.quantiles.items())},
        "hist": hist,
    }


def _view_json(view: View, key: str, arrays: dict[str, Array]) -> Json:
    """A view; of arrays that are not inline, what follows from the scale is left out, and zero points of zero."""
    params = view.params
    grid, scale, zero_point = params.grid, np.atleast_1d(params.scale), np.atleast_1d(params.zero_point)
    content: Json = {
        "schemes": list(view.schemes),
        "bits": grid.bits,
        "signed": grid.signed,
        "narrow": grid.narrow,
        "qmin": grid.qmin,
        "qmax": grid.qmax,
        "symmetric": is_symmetric(params),
        "granularity": granularity(params),
        "axis": params.axis,
        "block_size": params.block_size,
        "scale": _array_json(scale, f"{key}.scale", arrays),
    }
    inline = scale.size <= INLINE
    if inline:
        content["scale_f32_hex"] = [float32_hex(value) for value in scale.ravel()]
    if inline or zero_point.any():
        content["zero_point"] = _array_json(zero_point, f"{key}.zero_point", arrays)
    if inline:
        exponent = exponents(scale)
        content["pow2_exponent"] = None if exponent is None else exponent.tolist()
        if grid.bits < WIDEST:
            low, high = view.clip
            content["clip"] = {"min": _shortest(np.atleast_1d(low)), "max": _shortest(np.atleast_1d(high))}
    return content


def _array_json(values: Array, key: str, arrays: dict[str, Array]) -> Any:
    if values.size > INLINE:
        arrays[key] = np.ascontiguousarray(values)
        return {"$ref": key}
    return _shortest(values) if values.dtype == np.float32 else values.tolist()


def _shortest(values: Array) -> Any:
    """Float32 values as nested lists of JSON numbers with as few digits as give the same float32 back."""
    numbers = [float(str(value)) for value in np.asarray(values, np.float32).ravel()]
    return np.array(numbers, np.float64).reshape(values.shape).tolist()


def float32_hex(value: np.float32) -> str:
    """The bits of a float32, the sign first: eight hexadecimal digits."""
    return struct.pack(">f", value).hex()


def exponents(scale: Array) -> Array | None:
    """The n where each scale is 2^n, None where one is not."""
    mantissa, exponent = np.frexp(scale)
    return exponent - 1 if bool((mantissa == 0.5).all()) else None


def granularity(params: QParams) -> str:
    """What has one scale: "tensor", "channel" or "block"."""
    return "tensor" if params.axis is None else "block" if params.block_size else "channel"


def is_symmetric(params: QParams) -> bool:
    """Whether codes are signed and zero stands for zero."""
    return params.grid.signed and not params.zero_point.any()


def json_text(value: Any, indent: int = 0) -> str:
    """JSON with an object or list on one line where it holds no other that does not fit there."""
    line: str = json.dumps(value, allow_nan=False, ensure_ascii=False)
    if not isinstance(value, dict | list) or (len(line) + indent <= 120 and "\n" not in line):
        return line
    if isinstance(value, list) and not any(isinstance(item, dict | list) for item in value):
        return line
    inner = " " * (indent + 1)
    if isinstance(value, dict):
        parts = [f"{inner}{json_text(key)}: {json_text(item, indent + 1)}" for key, item in value.items()]
    else:
        parts = [f"{inner}{json_text(item, indent + 1)}" for item in value]
    opening, closing = ("{", "}") if isinstance(value, dict) else ("[", "]")
    return opening + "\n" + ",\n".join(parts) + "\n" + " " * indent + closing
