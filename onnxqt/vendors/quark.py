"""AMD Quark: ranges that its ONNX quantizer takes instead of running samples (`SaveAndRestore`).

The form is that of `save_and_restore_func` in quark/onnx/utils/file_utils.py, release 0.13.
"""

from onnxqt.table.form import Table
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.lost import float_nodes, float_tensors, named, where
from onnxqt.vendors.onnxruntime import absorbing_ranges
from onnxqt.vendors.ranges import ACTIVATIONS, is_power_of_two
from onnxqt.vendors.text import json_bytes, number

ALIAS = "quark"
VERSION = "0.13"


def write_quark(request: Request) -> Written:
    """`<stem>.quark.json`: a range for every activation, and for what others absorb, which Quark asks for as well.

    Raises:
        ExportError: if two tensors have one name, or an activation has several scales.
    """
    table, scheme = request.table, request.scheme
    ranges = {name: [number(low), number(high)] for name, (low, high) in absorbing_ranges(table, scheme, ALIAS).items()}
    content = {"quark_version": request.options.get("version", VERSION), "tensors_range": ranges}
    return Written(
        {f"{request.stem}.quark.json": json_bytes(content)}, _lost(table, scheme), float_tensors(table, scheme)
    )


def _lost(table: Table, scheme: str) -> tuple[str, ...]:
    nodes = float_nodes(table, scheme)
    powers = "scales of {} are no powers of two: XINT8 configurations round them to such"
    widths = "widths of codes are not in the file: give {} theirs in Quark's configuration"
    weights = "scales of weights are not in the file: those of {} follow from the values of the baked model"
    return (
        *where(table, scheme, ACTIVATIONS, lambda params: not is_power_of_two(params), powers),
        *where(table, scheme, ACTIVATIONS, lambda params: params.grid.bits != 8, widths),
        *where(table, scheme, ["weight"], lambda params: True, weights),
        *([f"what stays float is not in the file: exclude {named(nodes)} in Quark's configuration"] if nodes else []),
    )


FORMATS = (
    Vendor(
        "quark",
        "AMD Quark, Vitis AI and Ryzen AI",
        write_quark,
        baked=True,
        usage="extra_options={'SaveAndRestore': 'STEM.quark.json'} of Quark's ONNX quantizer",
        options={"version": (VERSION, "of Quark, which the file names")},
    ),
)
