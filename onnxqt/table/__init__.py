"""The neutral calibration table: every range and scale of a model in one file, which vendors' files derive from.

    table = build_table(model, plan, ranges, {"w8a8-sym-pc": quantizers}, "model.onnx")
    write_table(table, Path("table.json"))
    table_quantizers(read_table(Path("table.json")), plan, "w8a8-sym-pc")

docs/table.md describes the file.
"""

from onnxqt.table.build import build_table, check_belongs
from onnxqt.table.files import read_table, write_table
from onnxqt.table.form import Entry, NodeRef, Stats, Table, View
from onnxqt.table.imports import import_table
from onnxqt.table.merge import merge_tables
from onnxqt.table.quantizers import table_quantizers
from onnxqt.table.stats import merge_stats

__all__ = [
    "Entry",
    "NodeRef",
    "Stats",
    "Table",
    "View",
    "build_table",
    "check_belongs",
    "import_table",
    "merge_stats",
    "merge_tables",
    "read_table",
    "table_quantizers",
    "write_table",
]
