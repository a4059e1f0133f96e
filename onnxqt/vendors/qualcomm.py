"""Qualcomm encodings, which the converters of SNPE, QNN and QAIRT take, and AI Hub (`--quantization_overrides`).

Source: Docs/techniques/encoding_spec.rst of qualcomm/aimet. Three versions of one content:

    0.6.1   by tensor a list with one object per channel; `is_symmetric` is a string, a boolean would mean unsigned
    1.0.0   one object per tensor with lists of scales and offsets
    2.0.0   one object per tensor in the words of ONNX QuantizeLinear, with its axis

In the first two an offset belongs to unsigned codes whatever the type, `x = (code + offset) s` with code >= 0, so it
is at most 0: minus the zero point, and -128 for signed 8-bit codes about zero. Activations are written with unsigned
codes in all versions, as the converters want them; the reals are the same.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import Array, Grid, QParams
from onnxqt.table.form import Entry, Role, Table
from onnxqt.table.views import misfit, same_params
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.lost import float_tensors, named, where
from onnxqt.vendors.names import CONTROL, called, names_of
from onnxqt.vendors.ranges import ACTIVATIONS, is_centred
from onnxqt.vendors.text import json_bytes, nested, numbers

ALIAS = "qualcomm"
_WIDTHS = (4, 8, 16, 32)  # of codes, in bits
_ROLES: tuple[Role, ...] = (*ACTIVATIONS, "weight")
_FLOAT_BITS = 16  # what Hexagon computes with where there are no codes
Json = dict[str, Any]


def write_0_6_1(request: Request) -> Written:
    """Encodings of version 0.6.1, `<stem>-0.6.1.encodings`: no blocks, and no axes.

    Raises:
        ExportError: if two tensors have one name, or scales do not fit a tensor.
    """
    table, scheme = request.table, request.scheme
    skipped: dict[str, str] = {}
    activations = {name: _objects(params) for name, params in _activations(table, scheme)}
    floats = {"bitwidth": _FLOAT_BITS, "dtype": "float"}
    activations |= {name: [floats] for name in _float_names(table, scheme, *ACTIVATIONS)}
    constants = {name: [floats] for name in _float_names(table, scheme, "weight")}
    for entry, params in _constants(table, scheme, skipped):
        if params.block_size:
            skipped[entry.name] = "version 0.6.1 has no scales per block: write 'qualcomm'"
        else:
            constants[called(entry, ALIAS)] = _objects(params)
    content = {"version": "0.6.1", "activation_encodings": activations, "param_encodings": constants}
    files = {f"{request.stem}-0.6.1.encodings": json_bytes(content)}
    return Written(
        files, (*_lost(table, scheme), *_axes(table, scheme)), {**float_tensors(table, scheme, _ROLES), **skipped}
    )


def write_1_0_0(request: Request) -> Written:
    """Encodings of version 1.0.0, `<stem>-1.0.0.encodings`: blocks of equal size only, and no axes.

    Raises:
        ExportError: if two tensors have one name, or scales do not fit a tensor.
    """
    table, scheme = request.table, request.scheme
    skipped: dict[str, str] = {}
    activations = [{"name": name, **_lists(params)} for name, params in _activations(table, scheme)]
    floats = {"dtype": "FLOAT", "bw": _FLOAT_BITS, "enc_type": "PER_TENSOR"}
    activations += [{"name": name, **floats} for name in _float_names(table, scheme, *ACTIVATIONS)]
    constants = [{"name": name, **floats} for name in _float_names(table, scheme, "weight")]
    for entry, params in _constants(table, scheme, skipped):
        reason = _unblockable(entry, params)
        if reason:
            skipped[entry.name] = f"{reason}: write 'qualcomm'"
        else:
            constants.append({"name": called(entry, ALIAS), **_lists(params)})
    content = {"version": "1.0.0", "activation_encodings": activations, "param_encodings": constants}
    files = {f"{request.stem}-1.0.0.encodings": json_bytes(content)}
    blocks = "blocks have no axis in version 1.0.0, and AIMET's converter refuses {}: write 'qualcomm' for it"
    lost = (
        *_lost(table, scheme),
        *_axes(table, scheme),
        *where(table, scheme, ["weight"], lambda params: bool(params.block_size), blocks),
    )
    return Written(files, lost, {**float_tensors(table, scheme, _ROLES), **skipped})


def write_2_0_0(request: Request) -> Written:
    """Encodings of version 2.0.0, `<stem>.encodings`: everything but the tensors that stay float.

    Raises:
        ExportError: if two tensors have one name, or scales do not fit a tensor.
    """
    table, scheme = request.table, request.scheme
    skipped: dict[str, str] = {}
    encodings = [{"name": name, **_linear(params)} for name, params in _activations(table, scheme)]
    encodings += [
        {"name": called(entry, ALIAS), **_linear(params)} for entry, params in _constants(table, scheme, skipped)
    ]
    left = _float_names(table, scheme, *_ROLES)
    fallback = [f"float tensors are not in the file: the converter needs --float_fallback to leave {named(left)} so"]
    files = {f"{request.stem}.encodings": json_bytes({"version": "2.0.0", "encodings": encodings})}
    lost = (*_lost(table, scheme), *(fallback if left else []))
    return Written(files, lost, {**float_tensors(table, scheme, _ROLES), **skipped})


def _activations(table: Table, scheme: str) -> Iterator[tuple[str, QParams]]:
    """Names and parameters of the quantized activations, with unsigned codes."""
    found = table.quantized(scheme, *ACTIVATIONS)
    names = names_of((*(entry for entry, _ in found), *_once(table, scheme)), ALIAS, [CONTROL])
    for entry, params in found:
        yield names[entry.name], unsigned(_stored(entry, params))


def _once(table: Table, scheme: str) -> list[Entry]:
    """The quantized constants, each once: a bias has an entry for every node that adds it."""
    return list({entry.name: entry for entry, _ in table.quantized(scheme, "weight", "bias")}.values())


def _constants(table: Table, scheme: str, skipped: dict[str, str]) -> Iterator[tuple[Entry, QParams]]:
    """The quantized constants that the file can hold; why another is left out goes into `skipped`."""
    found = table.quantized(scheme, "weight", "bias")
    for entry in _once(table, scheme):
        first, *others = [params for each, params in found if each.name == entry.name]
        values = math.prod(size or 1 for size in entry.shape or ())
        if not all(same_params(first, other) for other in others):
            skipped[entry.name] = "several nodes add this bias, each on a grid of its own"
        elif entry.role == "bias" and entry.shape is not None and first.scale.size not in (1, values):
            skipped[entry.name] = f"{values} value(s) of a bias serve channels on {first.scale.size} grids"
        else:
            yield entry, _stored(entry, first)


def _stored(entry: Entry, params: QParams) -> QParams:
    """The same codes in the next of the widths that the format has.

    Raises:
        ExportError: if scales or zero points do not fit.
    """
    grid = params.grid
    wrong = misfit(params, entry)
    if wrong is None and np.any((params.zero_point < grid.qmin) | (params.zero_point > grid.qmax)):
        wrong = f"a zero point lies outside of [{grid.qmin}, {grid.qmax}]"
    if wrong:
        raise ExportError(f"'{entry.name}': {wrong}: make the table of this model")
    bits = next(width for width in _WIDTHS if width >= grid.bits)
    return replace(params, grid=Grid(bits, grid.signed))


def unsigned(params: QParams) -> QParams:
    """The same reals with unsigned codes: `code + 2^(bits - 1)` for signed ones."""
    if not params.grid.signed:
        return params
    shift = 1 << (params.grid.bits - 1)
    return replace(params, grid=Grid(params.grid.bits, signed=False), zero_point=params.zero_point + np.int32(shift))


def offsets(params: QParams) -> Array:
    """What versions 0.6.1 and 1.0.0 call so, int64: minus the zero point of unsigned codes.

    offset = -(zp + 2^(bits - 1)) for signed codes, -zp for unsigned ones
    """
    shift = 1 << (params.grid.bits - 1) if params.grid.signed else 0
    return -(params.zero_point.astype(np.int64) + shift)


def _objects(params: QParams) -> list[Json]:
    """Version 0.6.1: one object per scale.

    min = offset s, max = (2^bits - 1 + offset) s
    """
    steps = (1 << params.grid.bits) - 1
    pairs = zip(numbers(params.scale), offsets(params).ravel().tolist(), strict=True)
    return [
        {
            "bitwidth": params.grid.bits,
            "dtype": "int",
            "is_symmetric": str(is_centred(params)),
            "min": offset * scale,
            "max": (steps + offset) * scale,
            "scale": scale,
            "offset": offset,
        }
        for scale, offset in pairs
    ]


def _lists(params: QParams) -> Json:
    """Version 1.0.0: one object with flat lists. Blocks of a (in, out) matrix come in the order (out, in)."""
    scale, offset = params.scale, offsets(params)
    kind = "PER_TENSOR" if params.axis is None else "PER_BLOCK" if params.block_size else "PER_CHANNEL"
    if params.block_size and scale.ndim == 2 and params.axis in (0, -2):
        scale, offset = scale.T, offset.T
    content = {
        "dtype": "INT",
        "bw": params.grid.bits,
        "is_sym": is_centred(params),
        "enc_type": kind,
        "scale": numbers(scale),
        "offset": offset.ravel().tolist(),
    }
    return {**content, "block_size": params.block_size} if params.block_size else content


def _linear(params: QParams) -> Json:
    """Version 2.0.0: the words of ONNX QuantizeLinear; zero points are left out where all are 0."""
    content: Json = {
        "output_dtype": f"{'' if params.grid.signed else 'u'}int{params.grid.bits}",
        "y_scale": nested(params.scale),
    }
    if np.any(params.zero_point):
        content["y_zero_point"] = params.zero_point.tolist()
    if params.axis is not None:
        content["axis"] = params.axis
    if params.block_size:
        content["block_size"] = params.block_size
    return content


def _unblockable(entry: Entry, params: QParams) -> str | None:
    """Why version 1.0.0 cannot say the blocks of a weight; None where it can, or there are none."""
    if not params.block_size:
        return None
    if math.prod(params.scale.shape[2:]) > 1:
        return "version 1.0.0 has no blocks for each place of a kernel"
    size = None if entry.shape is None or params.axis is None else entry.shape[params.axis]
    if size is None or size % params.block_size:
        return f"version 1.0.0 has no last block that is shorter than {params.block_size}"
    return None


def _float_names(table: Table, scheme: str, *roles: Role) -> list[str]:
    """What the file calls the tensors of these roles that stay float."""
    left = float_tensors(table, scheme, roles)
    return [called(entry, ALIAS) for entry in table.entries if entry.name in left and entry.role in roles]


def _axes(table: Table, scheme: str) -> tuple[str, ...]:
    """Weights whose axis does not follow from their shape."""
    names = [
        entry.name
        for entry, params in table.quantized(scheme, "weight")
        if params.axis is not None and not params.block_size and (entry.shape or ()).count(params.scale.size) != 1
    ]
    sentence = (
        "the axis of scales is not in the file, and the shapes of {} do not tell it: the reader goes by operators"
    )
    return (sentence.format(named(names)),) if names else ()


def _lost(table: Table, scheme: str) -> tuple[str, ...]:
    few = "Hexagon has activations of 8 and 16 bits: the converter may refuse {}"
    odd = "codes have 4, 8, 16 or 32 bits: {} keep their scales in the next width"
    narrow = "codes fill their type: the grids of {} get the lowest code, which they leave out"
    return (
        *where(table, scheme, ACTIVATIONS, lambda params: params.grid.bits not in (8, 16), few),
        *where(table, scheme, _ROLES, lambda params: params.grid.bits not in _WIDTHS, odd),
        *where(table, scheme, ACTIVATIONS, lambda params: params.grid.narrow, narrow),
    )


def _vendor(name: str, title: str, write: Callable[[Request], Written], file: str) -> Vendor:
    return Vendor(
        name,
        f"Qualcomm SNPE, QNN, QAIRT and AI Hub{title}",
        write,
        baked=True,
        usage=f"qairt-converter --input_network BAKED --quantization_overrides {file} --float_fallback",
    )


FORMATS = (
    _vendor("qualcomm", "", write_2_0_0, "STEM.encodings"),
    _vendor("qualcomm-1.0.0", ", encodings 1.0.0", write_1_0_0, "STEM-1.0.0.encodings"),
    _vendor("qualcomm-0.6.1", ", encodings 0.6.1", write_0_6_1, "STEM-0.6.1.encodings"),
)
