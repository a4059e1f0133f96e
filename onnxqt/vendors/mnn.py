"""MNN: the parameters of `mnnconvert --compressionParamsFile`, as JSON.

The message is `MNN.Compression.Pipeline` (tools/converter/source/compression/MNN_compression.proto). The converter
looks for a layer whose `output` is called like the tensor that a convolution computes, activation included, and takes
its scales; MatMul and Gemm become convolutions whose name ends in `__matmul_converted`, which it knows. Where only
`opName` matches it takes the bits and finds scales of its own, so none are written then. Codes are signed.

Without a template the layers are written from the table. A template is what the converter itself writes where the file
does not exist; its layers are completed, in its order.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import Layer, layers, left_out, stored_wider, weight_problem
from onnxqt.vendors.lost import float_tensors, named
from onnxqt.vendors.names import CONTROL, called, check_names
from onnxqt.vendors.patch import check_matches, kept, template_json
from onnxqt.vendors.text import json_bytes, number, numbers

ALIAS = "mnn"
CHECKED_VERSION = "3.6.1"  # of the converter that tools/vendors/mnn.py runs

_CONVERTED = "__matmul_converted"
_BITS = 8

Json = dict[str, Any]


def write_parameters(request: Request) -> Written:
    """`<stem>.mnn.json`: for each layer the scales of its input, weight and output; those of weights per channel.

    A layer whose activations stay float has the bits of its weight alone, for which the converter finds the scales
    from the values of the baked model.

    Raises:
        ExportError: if no layer can be written, a name cannot be used, or the template has no layer of the table.
    """
    table, scheme = request.table, request.scheme
    skipped = float_tensors(table, scheme)
    chosen: dict[str, Json] = {}
    full: list[Layer] = []
    weights_only: list[Layer] = []
    for layer in layers(table, scheme):
        problem = _problem(layer)
        if problem is not None or layer.output is None:
            skipped[layer.weight.name] = problem or "the table does not tell which tensor its node computes"
            continue
        has_activations = layer.input_params is not None and layer.output_params is not None
        (full if has_activations else weights_only).append(layer)
        chosen[_operator(layer)] = _full(layer) if has_activations else _weight_only(layer)
    if not chosen:
        raise ExportError(f"MNN has no form for any weight that {scheme} quantizes: choose another scheme")
    check_names([(layer.node.node, _operator(layer)) for layer in (*full, *weights_only)], ALIAS, [CONTROL])
    if request.template is None:
        content: Json = {"version": CHECKED_VERSION, "forGuide": False, "algo": [_quantize(list(chosen.values()))]}
        lost: list[str] = []
    else:
        content, lost = _completed(template_json(request, "mnnconvert"), chosen)
    lost += stored_wider(full, _BITS)
    if weights_only:
        names = named(layer.weight.name for layer in weights_only)
        lost.append(f"scales of {names} are not in the file: MNN finds them from the values of the baked model")
    inside = {entry.name for layer in full for entry in (layer.input, layer.output) if entry}
    reason = "no convolution that MNN runs on integers reads or computes it"
    return Written(
        {f"{request.stem}.mnn.json": json_bytes(content)},
        tuple(lost),
        {**skipped, **left_out(table, scheme, inside, reason)},
    )


def _problem(layer: Layer) -> str | None:
    """Why a layer has no place in the file; None if it has one."""
    if layer.node.op not in ("Conv", "Gemm", "MatMul"):
        return f"MNN does not quantize the weight of a {layer.node.op} this way"
    if layer.node.op != "Conv" and (layer.node.index != 1 or len(layer.weight.shape or ()) != 2):
        return "MNN makes a convolution only of a product with one matrix from the right"
    for params in (layer.input_params, layer.output_params):
        if params is not None and (params.scale.ndim or params.grid.bits > _BITS):
            return f"MNN has activations of at most {_BITS} bits with one scale only"
    if layer.input_params is None and layer.output_params is None and layer.weight_params.block_size:
        return None
    return weight_problem(layer)


def _operator(layer: Layer) -> str:
    """What MNN calls the operator: like the tensor that the node alone computes."""
    output = layer.output
    assert output is not None
    if ALIAS in output.aliases:
        return output.aliases[ALIAS]
    return output.fused_from[-1] if output.fused_from else output.name


def _full(layer: Layer) -> Json:
    scales, grid = layer.channel_scales, layer.weight_params.grid
    assert scales is not None  # see _problem
    weight = {
        "name": layer.weight.name,
        "bits": grid.bits,
        "scales": numbers(scales),
        "clampMin": grid.qmin,
        "clampMax": grid.qmax,
        "asymmetric": False,
    }
    return {
        "opName": _operator(layer),
        "input": [_activation(layer.input, layer.input_params)],
        "weight": [weight],
        "output": [_activation(layer.output, layer.output_params)],
    }


def _weight_only(layer: Layer) -> Json:
    params = layer.weight_params
    weight: Json = {"name": layer.weight.name, "bits": params.grid.bits, "asymmetric": bool(np.any(params.zero_point))}
    if params.block_size:
        weight["blockSize"] = params.block_size
    return {"opName": _operator(layer) + (_CONVERTED if layer.node.op != "Conv" else ""), "weight": [weight]}


def _activation(entry: Entry | None, params: QParams | None) -> Json:
    """Parameters of an activation with signed codes; unsigned ones move down by half their number."""
    assert entry is not None  # both of a layer that is written in full
    assert params is not None
    grid, shift = params.grid, 0 if params.grid.signed else 1 << (params.grid.bits - 1)
    return {
        "name": called(entry, ALIAS) if not entry.fused_from else entry.name,
        "bits": grid.bits,
        "scales": [number(params.scale)],
        "zeroPoint": int(params.zero_point) - shift,
        "clampMin": grid.qmin - shift,
        "clampMax": grid.qmax - shift,
    }


def _quantize(found: list[Json]) -> Json:
    return {"type": "QUANTIZE", "quantParams": {"layer": found}}


def _completed(template: Json, chosen: Mapping[str, Json]) -> tuple[Json, list[str]]:
    """A template with the layers of the table in it, and what is to be said about the others."""
    try:
        found = [layer for algo in template["algo"] for layer in algo["quantParams"]["layer"]]
        names = [str(layer["opName"]) for layer in found]
    except (KeyError, TypeError) as error:
        raise ExportError(
            "the template has no algo[].quantParams.layer[].opName: give the file that mnnconvert wrote"
        ) from error
    matched = []
    for layer, name in zip(found, names, strict=True):
        ours = chosen.get(name) or chosen.get(name.removesuffix(_CONVERTED))
        if ours is not None:
            layer.update({key: value for key, value in ours.items() if key != "opName"})
            matched.append(name)
    check_matches(matched, names, ALIAS)
    template["forGuide"] = False
    absent = [name for name in chosen if name not in matched and name + _CONVERTED not in matched]
    lost = [f"not in the template, so not in the file: {named(absent)}"] if absent else []
    return template, [*kept(names, matched), *lost]


FORMATS = (
    Vendor(
        "mnn",
        "MNN, mnnconvert",
        write_parameters,
        baked=True,
        patches=True,
        usage="mnnconvert -f ONNX --modelFile BAKED.onnx --MNNModel OUT.mnn --compressionParamsFile STEM.mnn.json",
    ),
)
