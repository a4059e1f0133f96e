"""ONNX Runtime's own quantizer: its calibration cache, its overrides, and the table of its TensorRT provider.

The cache (`CalibrationCacheEncoder` in onnxruntime/quantization/calibrate.py, release 1.32) and the overrides
(`tensor_quant_overrides.py`) come with a file of the arguments that belong to them, since neither says of which
element type the codes are, nor what stays float. The provider's table (`ReadDynamicRange` in
tensorrt_execution_provider.cc) holds one magnitude per tensor as decimal text. ONNX Runtime's own
`write_calibration_table` writes the larger of the two ends there, so that a range such as [-3.5, 3.1] is cut at -3.1;
here it is max(|lo|, |hi|).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flatbuffers  # type: ignore[import-untyped]  # has no types
import numpy as np

from onnxqt.errors import ExportError, UsageError
from onnxqt.numerics import QParams
from onnxqt.ops import DEFAULT_OPERATORS
from onnxqt.table.form import Entry, Table
from onnxqt.table.views import misfit
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.lost import asymmetry, float_nodes, float_tensors, named, other_widths, where
from onnxqt.vendors.names import CONTROL, SPACE, called, check_names, names_of
from onnxqt.vendors.ranges import ACTIVATIONS, calibrated, magnitude, weight_ends
from onnxqt.vendors.text import decimal, json_bytes, number
from onnxqt.vendors.wide import wide_ends

ALIAS = "onnxruntime"
Json = dict[str, Any]

_TYPES = {  # of codes, as `QuantType` calls them, by (bits, signed)
    (4, True): "QInt4",
    (4, False): "QUInt4",
    (8, True): "QInt8",
    (8, False): "QUInt8",
    (16, True): "QInt16",
    (16, False): "QUInt16",
}
_CLAMPS = ("Relu", "Clip")  # what lies before them may have the range that lies behind
_SHARING = ("AveragePool",)  # whose output ONNX Runtime lays on the grid of their input; here it has its own
_SILENT = "OpTypesToExcludeOutputQuantization"  # operators that do not quantize their own outputs
_FORMS = ("scale", "range")


def write_cache(request: Request) -> Written:
    """The calibration cache that `quantize_static(calibration_cache_path=...)` reads instead of running samples.

    `<stem>.ort-cache.json` holds a range for every activation, and for what others absorb (the output of a Conv
    before its Relu), which ONNX Runtime asks for as well; `<stem>.ort-options.json` the arguments that go with it.

    Raises:
        ExportError: if two tensors have one name, or an activation has scales per channel.
    """
    table, scheme = request.table, request.scheme
    ranges = absorbing_ranges(table, scheme, ALIAS)
    content = {
        "CLS": "TensorsData",
        "data": {
            name: {"lowest": _array(low), "highest": _array(high), "CLS": "TensorData"}
            for name, (low, high) in ranges.items()
        },
        "calibration_method": {"CLS": "CalibrationMethod", "value": "CalibrationMethod.MinMax"},
        "smooth_quant": False,
    }
    files = {
        f"{request.stem}.ort-cache.json": json_bytes(content),
        f"{request.stem}.ort-options.json": json_bytes(options_of(table, scheme, 8)),
    }
    bits, _ = _storage(_activation_params(table, scheme))
    narrow = "the tool uses the lowest code of its type, which the grids of {} leave out"
    lost = (
        *other_widths(table, scheme, bits),
        *where(table, scheme, ACTIVATIONS, lambda params: params.grid.narrow, narrow),
        *_absorbed(table, scheme),
        *_left_float(table, scheme),
        *_weights(table, scheme),
    )
    return Written(files, lost, float_tensors(table, scheme))


def write_overrides(request: Request) -> Written:
    """Overrides for the tensors' quantization (`TensorQuantOverrides`), with a list entry per channel for weights.

    Options: `form`, "scale" (scale and zero point, as `static_quantize_runner` reads them from a file) or "range"
    (rmin and rmax, for `extra_options`, whose numbers must become numpy float32 scalars).

    Raises:
        UsageError: if there is no such form.
        ExportError: if an entry does not have the form that ONNX Runtime expects. Its own check ends with the first
            tensor, so all are checked here.
    """
    table, scheme = request.table, request.scheme
    form = request.options.get("form", _FORMS[0])
    if form not in _FORMS:
        raise UsageError(f"unknown form '{form}' of ort-overrides: give {' or '.join(_FORMS)}")
    overrides: dict[str, list[Json]] = {}
    owners: list[tuple[str, str]] = []
    skipped = float_tensors(table, scheme)
    weights = table.quantized(scheme, "weight")
    width, _ = _storage([params for _, params in weights], least=4)
    for entry, params in (*calibrated(table, scheme), *weights):
        if params.block_size:
            skipped[entry.name] = "overrides have no scales per block"
            continue
        check_override(entry, params)
        for name in (called(entry, ALIAS), *entry.fused_from):
            overrides[name] = _override(params, form, width if entry.role == "weight" else None)
            owners.append((entry.name, name))
    check_names(owners, ALIAS, [CONTROL])
    files = {
        f"{request.stem}.ort-overrides.json": json_bytes(overrides),
        f"{request.stem}.ort-options.json": json_bytes(options_of(table, scheme, width)),
    }
    bits, _ = _storage(_activation_params(table, scheme))
    wide = "codes beyond the grid of {} are not cut there, as the type holds more"
    changed = (
        where(table, scheme, ACTIVATIONS, lambda params: params.grid.bits < bits or params.grid.narrow, wide)
        if form == "scale"
        else other_widths(table, scheme, bits)
    )
    lost = (*changed, *_absorbed(table, scheme), *_left_float(table, scheme))
    return Written(files, lost, skipped)


def write_trt(request: Request) -> Written:
    """The table of ONNX Runtime's TensorRT provider, as flatbuffers (which it reads) and as text (for people).

    Raises:
        ExportError: if a name has white space, which ends it in the text.
    """
    table, scheme = request.table, request.scheme
    found = calibrated(table, scheme)
    names = names_of((entry for entry, _ in found), ALIAS, [CONTROL, SPACE])
    values = {names[entry.name]: decimal(magnitude(params)) for entry, params in found}
    text = "".join(f"{name} {value}\n" for name, value in sorted(values.items()))
    files = {
        f"{request.stem}.ort-trt.flatbuffers": trt_table(values),
        f"{request.stem}.ort-trt.cache": text.encode(),
    }
    lost = (*asymmetry(table, scheme), *other_widths(table, scheme, 8), *_weights(table, scheme))
    return Written(files, lost, float_tensors(table, scheme))


def trt_table(values: Mapping[str, str]) -> bytes:
    """The flatbuffers table `TrtTable {dict: [KeyValue {key: string, value: string}]}`, entries in order of names."""
    builder = flatbuffers.Builder(1024)
    entries = []
    for name, value in sorted(values.items()):
        key, text = builder.CreateString(name), builder.CreateString(value)
        builder.StartObject(2)
        builder.PrependUOffsetTRelativeSlot(0, key, 0)
        builder.PrependUOffsetTRelativeSlot(1, text, 0)
        entries.append(builder.EndObject())
    builder.StartVector(4, len(entries), 4)
    for offset in reversed(entries):  # a vector is written from its end
        builder.PrependUOffsetTRelative(offset)
    vector = builder.EndVector()
    builder.StartObject(1)
    builder.PrependUOffsetTRelativeSlot(0, vector, 0)
    builder.Finish(builder.EndObject())
    return bytes(builder.Output())


def options_of(table: Table, scheme: str, weight_bits: int) -> Json:
    """The arguments of `quantize_static` that belong to a table under a scheme, types by the names of `QuantType`.

    Weights have the bits that are given. Nodes are excluded that read or give out a tensor that stays float, that have
    no integer form in onnxqt, that average, since ONNX Runtime gives them one grid for input and output, or that add a
    bias behind a MatMul, which it would quantize to 8 bits.
    """
    activations = _activation_params(table, scheme)
    weights = [params for _, params in table.quantized(scheme, "weight")]
    bits, signed = _storage(activations)
    _, weight_signed = _storage(weights)
    biases = _bias_adds(table, scheme)
    extra: Json = {"ActivationSymmetric": False, "WeightSymmetric": weight_signed}
    if biases:
        extra[_SILENT] = ["MatMul"]
    return {
        "activation_type": _TYPES[bits, signed],
        "weight_type": _TYPES[weight_bits, weight_signed],
        "per_channel": any(params.axis is not None for params in weights),
        "calibrate_method": "MinMax",
        "nodes_to_exclude": list(dict.fromkeys((*float_nodes(table, scheme), *_quantized_otherwise(table), *biases))),
        "extra_options": extra,
    }


def check_override(entry: Entry, params: QParams) -> None:
    """Refuse what ONNX Runtime's rules for overrides forbid (`TensorQuantOverridesHelper`).

    Raises:
        ExportError: if an activation has several scales, or the scales of a weight do not fit its shape.
    """
    if params.axis is not None and entry.role in ACTIVATIONS:
        raise ExportError(f"activation '{entry.name}' has scales per channel, which no override can give")
    wrong = misfit(params, entry)
    if wrong:
        raise ExportError(f"weight '{entry.name}': {wrong}: make the table of this model")


def absorbing_ranges(table: Table, scheme: str, vendor: str) -> dict[str, tuple[np.float32, np.float32]]:
    """The ends of every activation, and of what each absorbs, by name: tools that calibrate tensors ask for both.

    Raises:
        ExportError: if two tensors have one name, or an activation has several scales.
    """
    found: dict[str, tuple[np.float32, np.float32]] = {}
    owners: list[tuple[str, str]] = []
    for entry, params in calibrated(table, scheme):
        for name in (called(entry, vendor), *entry.fused_from):
            found[name] = wide_ends(params)
            owners.append((entry.name, name))
    check_names(owners, vendor, [CONTROL])
    return found


def _activation_params(table: Table, scheme: str) -> list[QParams]:
    return [params for _, params in table.quantized(scheme, *ACTIVATIONS)]


def _storage(params: Sequence[QParams], least: int = 8) -> tuple[int, bool]:
    """(bits, signed) of the element type that holds the codes of all, signed where most are."""
    bits = max((each.grid.bits for each in params), default=8)
    signed = 2 * sum(each.grid.signed for each in params) >= len(params)
    return next(width for width in (4, 8, 16) if width >= max(bits, least)), signed


def _bias_adds(table: Table, scheme: str) -> list[str]:
    """Nodes that add a constant bias behind a MatMul."""
    producers = [entry.producer for entry, _ in table.quantized(scheme, *ACTIVATIONS) if entry.fused_from]
    return [node.node for node in producers if node is not None and node.op == "Add"]


def _quantized_otherwise(table: Table) -> list[str]:
    """Nodes around the table's activations that ONNX Runtime would quantize otherwise, or onnxqt does not."""
    nodes = (
        node
        for entry in table.entries
        if entry.role in ACTIVATIONS
        for node in (entry.producer, *entry.consumers)
        if node is not None
    )
    return list(dict.fromkeys(node.node for node in nodes if node.op not in DEFAULT_OPERATORS or node.op in _SHARING))


def _left_float(table: Table, scheme: str) -> tuple[str, ...]:
    """Quantized tensors around which ONNX Runtime quantizes no node."""
    options = options_of(table, scheme, 8)
    excluded, silent = set(options["nodes_to_exclude"]), options["extra_options"].get(_SILENT, ())
    names = [
        entry.name
        for entry, _ in table.quantized(scheme, *ACTIVATIONS)
        if (entry.producer is not None and (entry.producer.node in excluded or entry.producer.op in silent))
        and all(node.node in excluded for node in entry.consumers)
    ]
    sentence = "ONNX Runtime leaves {} float, since all nodes around them are excluded: give it the QDQ file for them"
    return (sentence.format(named(names)),) if names else ()


def _absorbed(table: Table, scheme: str) -> tuple[str, ...]:
    """What ONNX Runtime may quantize between nodes that are one here, but for what lies before a Relu or Clip."""
    names: list[str] = []
    for entry, _ in table.quantized(scheme, *ACTIVATIONS):
        clamped = entry.producer is not None and entry.producer.op in _CLAMPS
        names += entry.fused_from[1 if clamped else 0 :]
    sentence = "{} lie inside of what is one node here: where ONNX Runtime quantizes them, it is with the range behind"
    return (sentence.format(named(names)),) if names else ()


def _weights(table: Table, scheme: str) -> tuple[str, ...]:
    """What becomes of weights that the tool quantizes from their values alone."""
    sentence = "scales of weights are not in the file: those of {} follow from the values of the baked model"
    blocks = "the tool has no scales per block: {} are quantized again per channel"
    narrow = "the tool gives weights codes of 8 bits: {} are rounded again"
    return (
        *where(table, scheme, ["weight"], lambda params: params.grid.bits == 8 and not params.block_size, sentence),
        *where(table, scheme, ["weight"], lambda params: params.grid.bits != 8 and not params.block_size, narrow),
        *where(table, scheme, ["weight"], lambda params: bool(params.block_size), blocks),
    )


def _override(params: QParams, form: str, weight_bits: int | None) -> list[Json]:
    """One object per scale; the first says the axis. `weight_bits` are those of all weights, None for an activation."""
    items: list[Json]
    if form == "scale":
        pairs = zip(np.ravel(params.scale), np.ravel(params.zero_point), strict=True)
        items = [{"scale": number(scale), "zero_point": int(zero_point)} for scale, zero_point in pairs]
    else:
        low, high = weight_ends(params, weight_bits) if weight_bits else wide_ends(params)
        items = [{"rmin": number(a), "rmax": number(b)} for a, b in zip(np.ravel(low), np.ravel(high), strict=True)]
    if params.axis is not None:
        items[0]["axis"] = params.axis
    return items


def _array(value: np.float32) -> Json:
    return {"data": number(value), "dtype": "float32", "CLS": "numpy.array"}


FORMATS = (
    Vendor(
        "ort-cache",
        "ONNX Runtime, calibration cache",
        write_cache,
        baked=True,
        usage="quantize_static(BAKED, OUT, None, calibration_cache_path='STEM.ort-cache.json', and the arguments of "
        "STEM.ort-options.json); onnxruntime 1.32 or later",
    ),
    Vendor(
        "ort-overrides",
        "ONNX Runtime, overrides of the tensors' quantization",
        write_overrides,
        baked=True,
        usage="python -m onnxruntime.quantization.static_quantize_runner --tensor_quant_overrides "
        "STEM.ort-overrides.json, and the arguments of STEM.ort-options.json",
        options={"form": ("scale", "scale: scale and zero point; range: rmin and rmax")},
    ),
    Vendor(
        "ort-trt",
        "ONNX Runtime, TensorRT provider",
        write_trt,
        baked=True,
        usage="provider options trt_int8_enable=1, trt_int8_calibration_table_name=STEM.ort-trt.flatbuffers, "
        "trt_int8_use_native_calibration_table=0",
    ),
)
