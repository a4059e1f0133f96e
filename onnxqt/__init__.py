"""Quant-Trim on ONNX alone: one float checkpoint that stays accurate on every low-bit back end.

The whole job is `trim`; the other names are its stages, in order.
"""

__version__ = "0.1.0"

from onnxqt.errors import OnnxqtError
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.pipeline import Candidate, Settings, Workspace, calibrated, export, open_workspace, record_ranges, trim
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.report import Report
from onnxqt.schemes import DEFAULT_SCHEMES, Scheme, parse_scheme
from onnxqt.verify import Verdict, verify

__all__ = [
    "DEFAULT_SCHEMES",
    "Candidate",
    "Model",
    "OnnxqtError",
    "QuantPlan",
    "Report",
    "Scheme",
    "Settings",
    "Verdict",
    "Workspace",
    "calibrated",
    "export",
    "ingest",
    "make_plan",
    "open_workspace",
    "parse_scheme",
    "record_ranges",
    "trim",
    "verify",
]
