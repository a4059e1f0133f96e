"""Stage 5, export: the quantized form of a float checkpoint under a scheme, and the neutral table."""

from onnxqt.export.qdq import quantized_model
from onnxqt.export.table import neutral_table, table_quantizers

__all__ = ["neutral_table", "quantized_model", "table_quantizers"]
