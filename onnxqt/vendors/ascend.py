"""Huawei Ascend: the record of AMCT, which `convert_qat_model` and `save_model` read.

Protobuf text of `ScaleOffsetRecord` (documentation of AMCT, "record file"): by the name of a node, the scale and the
offset of its input and those of its weight. Offsets are signed zero points, those of weights must be 0, and scales
must lie in [FLT_EPSILON, 1/FLT_EPSILON]. Smaller scales of weights, which channels of zeros have, are raised.
"""

from collections.abc import Iterable

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import Array, QParams
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import Layer, layers, left_out, stored_wider, weight_problem
from onnxqt.vendors.lost import float_tensors, named
from onnxqt.vendors.names import CONTROL, check_names
from onnxqt.vendors.prototext import quoted

ALIAS = "ascend"
EPSILON = float(np.finfo(np.float32).eps)  # FLT_EPSILON

_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_BITS = 8


def write_record(request: Request) -> Written:
    """`<stem>.record.txt`: a record per layer whose input and weight are quantized.

    Raises:
        ExportError: if no layer can have a record, or a name cannot be used.
    """
    table, scheme = request.table, request.scheme
    skipped = float_tensors(table, scheme)
    records: list[str] = []
    written: list[Layer] = []
    for layer in layers(table, scheme):
        problem = _problem(layer)
        if problem is not None:
            skipped[layer.weight.name] = problem
            continue
        records.append(_record(layer))
        written.append(layer)
    if not records:
        raise ExportError(f"AMCT's record has no form for any weight that {scheme} quantizes: choose another scheme")
    check_names([(layer.node.node, layer.called(ALIAS)) for layer in written], ALIAS, [CONTROL])
    inside = {layer.input.name for layer in written if layer.input}
    return Written(
        {f"{request.stem}.record.txt": "".join(records).encode()},
        (*stored_wider(written, _BITS), *_raised(written)),
        {**skipped, **left_out(table, scheme, inside, "a record has the input of a layer with a weight only")},
    )


def _problem(layer: Layer) -> str | None:
    """Why a layer has no record; None if it has one."""
    params = layer.input_params
    if layer.node.op not in _OPERATORS:
        return f"AMCT has no record for a {layer.node.op}"
    if params is None:
        return "its input stays float"
    if params.grid.bits != _BITS or params.scale.ndim:
        return f"a record has one scale for an input of {_BITS} bits"
    if layer.weight_params.block_size or np.any(layer.weight_params.zero_point) or not layer.weight_params.grid.signed:
        return weight_problem(layer)
    if params.scale < EPSILON or max(params.scale, layer.weight_params.scale.max()) > 1 / EPSILON:
        return "AMCT takes scales from 2^-23 to 2^23 only"
    return None


def _raised(written: Iterable[Layer]) -> tuple[str, ...]:
    names = [layer.weight.name for layer in written if np.any(layer.weight_params.scale < EPSILON)]
    sentence = "AMCT takes scales from 2^-23 on: smaller ones, of channels that are nearly 0, are raised to that in"
    return (f"{sentence} {named(names)}",) if names else ()


def _record(layer: Layer) -> str:
    params = layer.input_params
    assert params is not None
    scales = np.maximum(np.ravel(layer.weight_params.scale), np.float32(EPSILON))
    lines = [
        "record {",
        f"  key: {quoted(layer.called(ALIAS))}",
        "  value {",
        f"    scale_d: {_number(params.scale)}",
        f"    offset_d: {signed_zero_point(params)}",
        *_repeated("scale_w", (_number(scale) for scale in scales)),
        *_repeated("offset_w", ("0" for _ in scales)),
        "  }",
        "}",
    ]
    return "".join(f"{line}\n" for line in lines)


def signed_zero_point(params: QParams) -> int:
    """The zero point of an activation with signed codes; unsigned ones move down by half their number."""
    return int(params.zero_point) - (0 if params.grid.signed else 1 << (params.grid.bits - 1))


def _repeated(field: str, values: Iterable[str]) -> list[str]:
    return [f"    {field}: {value}" for value in values]


def _number(value: Array | np.float32) -> str:
    return f"{float(value):.9g}"


FORMATS = (
    Vendor(
        "ascend",
        "Huawei AMCT, record of scales and offsets",
        write_record,
        baked=True,
        usage="amct_onnx.convert_qat_model(BAKED, OUT, 'STEM.record.txt')",
    ),
)
