"""NVIDIA TensorRT up to release 10, and DLA: the calibration cache, ranges, and what stays in a wider type.

A line of the cache is `name: hex`, the eight hexadecimal digits of the float32 `absmax / 127`, the sign first. Readers
want exactly one ": " in a line, all eight digits, and no empty line at the end (`import_scales_from_calib_cache` in
modelopt/onnx/quantization/calib_utils.py). TensorRT takes a cache only from its own release, which the first line
names. Release 11 has no calibration: give it the QDQ file. Weights are not in the cache; TensorRT quantizes them per
channel from their values.
"""

import re
from collections.abc import Sequence

from onnxqt.errors import UsageError
from onnxqt.table.form import Entry, Table
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.lost import asymmetry, float_nodes, float_tensors, named, other_widths, where
from onnxqt.vendors.names import COLON_SPACE, CONTROL, called, check_names
from onnxqt.vendors.ranges import calibrated, magnitude, symmetric_scale
from onnxqt.vendors.text import decimal, float32_hex, json_bytes, number

ALIAS = "tensorrt"
ALGORITHMS = ("EntropyCalibration2", "MinMaxCalibration", "EntropyCalibration", "LegacyCalibration")
FIRST_WITHOUT = 110000  # TensorRT 11, which reads no cache
_CLAMPS = ("Relu", "Clip")
_FLOATS = ("fp16", "fp32", "bf16")
_SEPARATORS = ",:*"  # of a list of layers, and the wild card in a layer's name


def write_tensorrt(request: Request) -> Written:
    """The calibration cache, the ranges as text and JSON, and the layers that stay float.

    `<stem>.cache`         the cache
    `<stem>.ranges.txt`    `name: absmax`, which NVIDIA's sampleINT8API reads
    `<stem>.ranges.json`   {"act_quant_info": {name: absmax}}, for `setDynamicRange`
    `<stem>.layers.txt`    arguments of trtexec for layers that stay float; absent where there are none

    Options: `version` of TensorRT as its header has it (major * 10000 + minor * 100 + patch from release 10 on,
    three or four digits before), `algorithm`, `float` (the type of what stays float).

    Raises:
        UsageError: if an option cannot be used.
        ExportError: if a name breaks a line, or an activation has several scales.
    """
    table, scheme = request.table, request.scheme
    header = _header(request)
    kind = _option(request, "float", _FLOATS)
    scales, magnitudes = {}, {}
    owners = []
    for entry, params in calibrated(table, scheme):
        for name in _names(entry):
            owners.append((entry.name, name))
            scales[name] = float32_hex(symmetric_scale(params, 127))
            magnitudes[name] = magnitude(params)
    check_names(owners, ALIAS, [CONTROL, COLON_SPACE])
    files = {
        f"{request.stem}.cache": "\n".join([header, *(f"{name}: {scale}" for name, scale in scales.items())]) + "\n",
        f"{request.stem}.ranges.txt": "".join(f"{name}: {decimal(value)}\n" for name, value in magnitudes.items()),
    }
    contents = {name: text.encode() for name, text in files.items()}
    ranges = {name: number(value) for name, value in magnitudes.items()}
    contents[f"{request.stem}.ranges.json"] = json_bytes({"act_quant_info": ranges})
    layers, unnamed = _layers(float_nodes(table, scheme))
    if layers:
        pairs = ",".join(f"{layer}:{kind}" for layer in layers)
        contents[f"{request.stem}.layers.txt"] = f"--precisionConstraints=prefer --layerPrecisions={pairs}\n".encode()
    return Written(contents, _lost(table, scheme, unnamed, list(scales)), float_tensors(table, scheme))


def _header(request: Request) -> str:
    """The first line of a cache, `TRT-<version>-<algorithm>`."""
    version = request.options.get("version", OPTIONS["version"][0])
    if not re.fullmatch("[1-9][0-9]{3,5}", version) or int(version) >= FIRST_WITHOUT:
        raise UsageError(
            f"version '{version}' of TensorRT reads no cache: give one under {FIRST_WITHOUT}, such as 8601 or 100300"
        )
    return f"TRT-{version}-{_option(request, 'algorithm', ALGORITHMS)}"


def _option(request: Request, name: str, allowed: Sequence[str]) -> str:
    value = request.options.get(name, allowed[0])
    if value not in allowed:
        raise UsageError(f"unknown {name} '{value}' for tensorrt: give {', '.join(allowed)}")
    return value


def _names(entry: Entry) -> tuple[str, ...]:
    """What a range is written for: the tensor, and what lies before its Relu or Clip, whose range may be the same.

    TensorRT fuses the two, and asks for both.
    """
    clamped = entry.producer is not None and entry.producer.op in _CLAMPS
    return (called(entry, ALIAS), *(entry.fused_from[:1] if clamped else ()))


def _layers(nodes: Sequence[str]) -> tuple[list[str], list[str]]:
    """The nodes that an argument of trtexec can name, and those that it cannot."""
    bad = [
        node
        for node in nodes
        if not node.isprintable() or any(letter in _SEPARATORS or letter.isspace() for letter in node)
    ]
    return [node for node in nodes if node not in bad], bad


def _lost(table: Table, scheme: str, unnamed: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    narrow = "TensorRT quantizes weights to 8 bits from the values of the baked model: {} have other codes there"
    per_tensor_weights = "TensorRT gives weights a scale per channel: {} have one for all"
    colon = [name for name in names if ":" in name]
    return (
        *asymmetry(table, scheme),
        *other_widths(table, scheme, 8),
        *where(table, scheme, ["weight"], lambda params: params.grid.bits != 8 or bool(params.block_size), narrow),
        *where(table, scheme, ["weight"], lambda params: params.axis is None, per_tensor_weights),
        *([f"layers {named(unnamed)} cannot be named in an argument: set their precision in code"] if unnamed else []),
        *(
            [f"ONNX Runtime's TensorRT provider ends the names {named(colon)} at their ':': give it ort-trt instead"]
            if colon
            else []
        ),
    )


OPTIONS = {
    "version": ("100300", "release of TensorRT as its header has it: 8601 is 8.6.1, 100300 is 10.3.0"),
    "algorithm": (ALGORITHMS[0], "calibrator that the header names"),
    "float": (_FLOATS[0], "type of the layers that stay float: fp16, fp32 or bf16"),
}

FORMATS = (
    Vendor(
        "tensorrt",
        "NVIDIA TensorRT 8 to 10 and DLA",
        write_tensorrt,
        baked=True,
        usage="trtexec --onnx=BAKED --int8 --fp16 --calib=STEM.cache and the arguments of STEM.layers.txt",
        options=OPTIONS,
    ),
)
