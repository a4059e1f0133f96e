"""Hailo: a model script (.alls) that forces ranges and chooses precisions.

The commands are those of Hailo's own scripts (hailo_model_zoo/cfg/alls). A layer has the name of Hailo's network (HN),
such as `net/conv1`; which nodes of the ONNX file it stands for is in the `original_names` of the HN JSON that a
translated model holds. That JSON is the template. `force_range_out` is the range behind the layer's activation.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry, Table
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import layers, left_out, part_of
from onnxqt.vendors.lost import activations, float_tensors, other_widths, where
from onnxqt.vendors.names import Trap, check_names
from onnxqt.vendors.patch import check_matches, kept, template_json
from onnxqt.vendors.ranges import ACTIVATIONS
from onnxqt.vendors.text import decimal
from onnxqt.vendors.wide import wide_ends

ALIAS = "hailo"

_NAME = re.compile(r"[A-Za-z0-9_./-]+")
_TRAP = Trap("letters that a model script has a meaning for", lambda name: not _NAME.fullmatch(name))
_INPUT = "input_layer"

Json = Mapping[str, Any]


def write_script(request: Request) -> Written:
    """`<stem>.alls`: forced ranges, and precisions other than 8 bits for both weights and activations.

    A range goes to the layer whose output it is; those of the model's inputs to the layers that read them. Layers with
    weights of up to 4 bits become a8_w4, those with activations of 16 bits a16_w16. Without a template layers are
    called like the nodes of the ONNX file, which Hailo's are not.

    Raises:
        ExportError: if the template is no HN or has no layer of the table, if nothing is quantized, or if a name
            cannot stand in a script.
    """
    table, scheme = request.table, request.scheme
    owners, inputs, lost = _named_by_hn(request) if request.template is not None else _named_by_nodes(table)
    lines: list[str] = []
    inside: set[str] = set()
    used: list[tuple[str, str]] = []
    for entry in activations(table):
        params = entry.params(scheme)
        if params is None:
            continue
        places = [(owners[entry.name], "force_range_out", "")] if entry.name in owners else inputs.get(entry.name, [])
        for name, command, index in places:
            lines.append(f"quantization_param([{name}], {command}={_interval(params)}{index})")
            used.append((name, name))
        inside |= {entry.name} if places else set()
    precisions = dict(_precisions(table, scheme, owners))
    lines += [f"quantization_param([{name}], precision_mode={mode})" for name, mode in precisions.items()]
    if not lines:
        raise ExportError(
            f"no layer has a range or precision under {scheme}: choose a scheme that quantizes activations"
        )
    check_names([*used, *((name, name) for name in precisions)], ALIAS, [_TRAP])
    blocks = "Hailo's groups of weights are not set: {} are quantized again per channel"
    calibrated = "the compiler still calibrates and corrects: ranges are forced, scales of weights are its own"
    written = part_of(table, inside)
    all_lost = (
        *lost,
        *other_widths(part_of(table, _narrow(table, scheme, inside)), scheme, 8),
        *where(table, scheme, ["weight"], lambda params: bool(params.block_size), blocks),
        *where(written, scheme, ACTIVATIONS, lambda params: True, calibrated),
    )
    skipped = {**float_tensors(table, scheme), **left_out(table, scheme, inside, "no layer computes or reads it alone")}
    return Written({f"{request.stem}.alls": "".join(f"{line}\n" for line in lines).encode()}, all_lost, skipped)


def _named_by_nodes(table: Table) -> tuple[dict[str, str], dict[str, list[tuple[str, str, str]]], list[str]]:
    owners = {
        entry.name: entry.aliases.get(ALIAS, entry.producer.node if entry.producer else entry.name)
        for entry in activations(table)
        if entry.producer or ALIAS in entry.aliases
    }
    lost = []
    if any(ALIAS not in entry.aliases for entry in activations(table)):
        lost.append(
            "layers are called like nodes of the ONNX file, which the compiler does not know: give the HN JSON as the "
            "template, or aliases in the table"
        )
    return owners, {}, lost


def _named_by_hn(request: Request) -> tuple[dict[str, str], dict[str, list[tuple[str, str, str]]], list[str]]:
    """The HN layer of each activation that one computes, where inputs of the model are read, and what is left."""
    found = template_json(request, "Hailo's parser (the HN of the .har file)").get("layers")
    if not isinstance(found, dict) or not all(isinstance(layer, dict) for layer in found.values()):
        raise ExportError("the template has no object 'layers': give the HN JSON of a translated model")
    layer_of = {original: name for name, layer in found.items() for original in _strings(layer, "original_names")}
    owners, fed = {}, {}
    for entry in activations(request.table):
        name = entry.aliases.get(ALIAS) or _layer(entry, layer_of)
        if name not in found:
            continue
        if str(found[name].get("type", "")).startswith(_INPUT):
            fed[name] = entry.name
        else:
            owners[entry.name] = name
    inputs: dict[str, list[tuple[str, str, str]]] = {}
    for name, layer in found.items():
        sources = _strings(layer, "input")
        for index, source in enumerate(sources):
            if source in fed:
                suffix = f", force_range_index={index}" if len(sources) > 1 else ""
                inputs.setdefault(fed[source], []).append((name, "force_range_in", suffix))
    matched = [*owners.values(), *fed]
    counted = [name for name, layer in found.items() if not str(layer.get("type", "")).startswith("output_layer")]
    check_matches(matched, counted, ALIAS)
    return owners, inputs, list(kept(counted, matched))


def _layer(entry: Entry, layer_of: Mapping[str, str]) -> str:
    """The HN layer that stands for the node that computes an activation, or for the input of that name."""
    return layer_of.get(entry.producer.node if entry.producer else entry.name) or layer_of.get(entry.name, "")


def _strings(layer: Json, key: str) -> list[str]:
    value = layer.get(key)
    return [text for text in value if isinstance(text, str)] if isinstance(value, Sequence) else []


def _interval(params: QParams) -> str:
    low, high = wide_ends(params)
    return f"[{decimal(low)}, {decimal(high)}]"


def _precisions(table: Table, scheme: str, owners: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The precision of each layer with a weight, where it is not the compiler's default of 8 bits for both."""
    for layer in layers(table, scheme):
        name = owners.get(layer.output.name) if layer.output else None
        weight = 4 if layer.weight_params.grid.bits <= 4 else 8
        wide = any(params and params.grid.bits > 8 for params in (layer.input_params, layer.output_params))
        if name and wide:
            yield name, "a16_w16"
        elif name and weight == 4:
            yield name, "a8_w4"


def _narrow(table: Table, scheme: str, inside: set[str]) -> set[str]:
    """The activations of fewer than 8 bits."""
    return {entry.name for entry, params in table.quantized(scheme, *ACTIVATIONS) if params.grid.bits < 8} & inside


FORMATS = (
    Vendor(
        "hailo",
        "Hailo Dataflow Compiler, model script",
        write_script,
        baked=True,
        patches=True,
        usage="hailo optimize BAKED.har --model-script STEM.alls --calib-set-path SAMPLES; the template is the HN JSON "
        "inside BAKED.har",
    ),
)
