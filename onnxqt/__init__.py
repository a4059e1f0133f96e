"""Quant-Trim on ONNX alone: one float checkpoint that stays accurate on every low-bit back end.

The whole job is `trim`; the other names are its stages, in order.
"""

__version__ = "0.1.0"

from onnxqt.budget import Budget, choose_bits
from onnxqt.candidates import Candidate
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.data import DataSource, Preprocessing, parse_preprocessing
from onnxqt.emulate import Program, load_program
from onnxqt.errors import OnnxqtError
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.overrides import Override, Overrides, parse_overrides, read_overrides
from onnxqt.pipeline import (
    Settings,
    Workspace,
    calibrated,
    export,
    export_table,
    make_table,
    open_workspace,
    record_ranges,
    trim,
)
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.profiles import PROFILES, Profile, parse_precision, read_profile
from onnxqt.report import Report
from onnxqt.schemes import DEFAULT_SCHEMES, Scheme, parse_scheme
from onnxqt.table import Table, import_table, read_table, write_table
from onnxqt.trim import Regime, TrimSettings
from onnxqt.trim.losses import Losses, parse_losses
from onnxqt.trim.schedule import Schedule
from onnxqt.vendors import VENDORS, write_vendor
from onnxqt.verify import Verdict, verify

__all__ = [
    "DEFAULT_SCHEMES",
    "PROFILES",
    "VENDORS",
    "Budget",
    "Candidate",
    "DataSource",
    "Losses",
    "Model",
    "OnnxqtError",
    "Override",
    "Overrides",
    "Preprocessing",
    "Profile",
    "Program",
    "QuantPlan",
    "Regime",
    "Report",
    "Schedule",
    "Scheme",
    "Settings",
    "Table",
    "TrimSettings",
    "Verdict",
    "Workspace",
    "calibrated",
    "choose_bits",
    "compile_model",
    "compiler_plan",
    "export",
    "export_table",
    "import_table",
    "ingest",
    "load_program",
    "make_plan",
    "make_table",
    "open_workspace",
    "parse_losses",
    "parse_overrides",
    "parse_precision",
    "parse_preprocessing",
    "parse_scheme",
    "read_overrides",
    "read_profile",
    "read_table",
    "record_ranges",
    "trim",
    "verify",
    "write_table",
    "write_vendor",
]
