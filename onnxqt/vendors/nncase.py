"""nncase (Kendryte K230): the quantization scheme that `ptq_options.quant_scheme` names.

Documented in docs/MixQuant.md of nncase. An entry has the name of a tensor after import, a data type and a range, by
tensor or by channel. Constants are renamed by the compiler (`Const_90`), so weights need a template, which it writes
with `export_quant_scheme`, and aliases in the table; activations keep their names.
"""

from typing import Any

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry, Table
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import part_of
from onnxqt.vendors.lost import activations, float_tensors, named, where
from onnxqt.vendors.names import CONTROL, called, names_of
from onnxqt.vendors.patch import check_matches, kept, template_json
from onnxqt.vendors.ranges import ACTIVATIONS, magnitude
from onnxqt.vendors.text import json_bytes, number
from onnxqt.vendors.wide import wide_ends

ALIAS = "nncase"
VERSION = "1.0"

Json = dict[str, Any]


def write_scheme(request: Request) -> Written:
    """`<stem>.QuantScheme.json`: a range for each quantized activation, and for weights with an alias.

    With a template its entries are patched, in its order; without one the file has the table's entries alone.

    Raises:
        ExportError: if nothing can be written, a name cannot be used, or the template has no tensor of the table.
    """
    table, scheme = request.table, request.scheme
    chosen, skipped = _entries(table, scheme)
    names = names_of([entry for entry in table.entries if entry.name in chosen], ALIAS, [CONTROL])
    ours = {names[name]: entry for name, entry in chosen.items()}
    lost: list[str] = []
    if request.template is None:
        if not ours:
            raise ExportError(f"{scheme} quantizes no activation: choose another scheme")
        content: Json = {"Version": VERSION, "Model": None, "Outputs": list(ours.values())}
        inside = set(names)
    else:
        content, matched, others = _patched(template_json(request, "nncase"), ours)
        lost += others
        inside = {name for name, told in names.items() if told in matched}
        skipped.update({name: "the template has no entry for it" for name in names if name not in inside})
    used = part_of(table, inside)
    steps = "nncase's codes have 8 or 16 bits: {} keep their ranges with other steps"
    lost += where(used, scheme, ACTIVATIONS, lambda params: params.grid.bits not in (8, 16), steps)
    absent = [entry.name for entry, _ in table.quantized(scheme, "weight") if entry.name not in inside]
    if absent:
        lost.append(f"scales of {named(absent)} are not in the file: nncase finds its own from the baked model")
    return Written({f"{request.stem}.QuantScheme.json": json_bytes(content)}, tuple(lost), skipped)


def _entries(table: Table, scheme: str) -> tuple[dict[str, Json], dict[str, str]]:
    """The entry of each tensor by its name in the ONNX file, and why others have none."""
    chosen: dict[str, Json] = {}
    skipped = float_tensors(table, scheme)
    for entry in activations(table):
        params = entry.params(scheme)
        if params is not None and params.scale.ndim:
            skipped[entry.name] = "the format has one range for an activation"
        elif params is not None:
            low, high = wide_ends(params)
            kind = "u8" if params.grid.bits <= 8 else "i16"
            chosen[entry.name] = _entry(entry, kind, [(low, high)], by_channel=False)
    for entry, params in table.quantized(scheme, "weight"):
        problem = _weight_problem(entry, params)
        if problem is not None:
            skipped[entry.name] = problem
            continue
        wide = np.atleast_1d(magnitude(params))
        chosen[entry.name] = _entry(
            entry, "i8", [(-value, value) for value in wide], by_channel=params.axis is not None
        )
    return chosen, skipped


def _weight_problem(entry: Entry, params: QParams) -> str | None:
    if params.block_size:
        return "the format has no ranges per block"
    if ALIAS not in entry.aliases:
        return f"nncase gives constants names of its own: give it an alias for '{ALIAS}' in the table"
    return None


def _entry(entry: Entry, kind: str, ranges: list[tuple[np.float32, np.float32]], by_channel: bool) -> Json:
    return {
        "Name": called(entry, ALIAS),
        "DataType": kind,
        "DataRange": [{"Min": number(low), "Max": number(high), "IsFull": False} for low, high in ranges],
        "DataRangeMode": "by_channel" if by_channel else "by_tensor",
    }


def _patched(template: Json, ours: dict[str, Json]) -> tuple[Json, set[str], list[str]]:
    """A template with our entries in place of its own, their names, and what is to be said of the others."""
    outputs = template.get("Outputs")
    if not isinstance(outputs, list) or not all(isinstance(each, dict) and "Name" in each for each in outputs):
        raise ExportError("the template has no list 'Outputs' of named entries: give the file that nncase wrote")
    names = [str(each["Name"]) for each in outputs]
    matched = [name for name in names if name in ours]
    check_matches(matched, names, ALIAS)
    for each, name in zip(outputs, names, strict=True):
        each.update(ours.get(name, {}))
    return template, set(matched), list(kept(names, matched))


FORMATS = (
    Vendor(
        "nncase",
        "nncase (Kendryte K230), quantization scheme",
        write_scheme,
        baked=True,
        patches=True,
        usage="ptq_options.quant_scheme='STEM.QuantScheme.json'; ptq_options.set_tensor_data([]); a template comes "
        "from ptq_options.export_quant_scheme=True with compile_options.dump_ir=True",
    ),
)
