"""Quant-Trim on ONNX alone: one float checkpoint that stays accurate on every low-bit back end.

The whole job is `trim`; the other names are its stages, in order.
"""

__version__ = "0.1.0"

from onnxqt.candidates import Candidate
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.emulate import Program, load_program
from onnxqt.errors import OnnxqtError
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.pipeline import Settings, Workspace, calibrated, export, open_workspace, record_ranges, trim
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.profiles import PROFILES, Profile, parse_precision, read_profile
from onnxqt.report import Report
from onnxqt.schemes import DEFAULT_SCHEMES, Scheme, parse_scheme
from onnxqt.trim import Regime, TrimSettings
from onnxqt.trim.losses import Losses, parse_losses
from onnxqt.trim.schedule import Schedule
from onnxqt.verify import Verdict, verify

__all__ = [
    "DEFAULT_SCHEMES",
    "PROFILES",
    "Candidate",
    "Losses",
    "Model",
    "OnnxqtError",
    "Profile",
    "Program",
    "QuantPlan",
    "Regime",
    "Report",
    "Schedule",
    "Scheme",
    "Settings",
    "TrimSettings",
    "Verdict",
    "Workspace",
    "calibrated",
    "compile_model",
    "compiler_plan",
    "export",
    "ingest",
    "load_program",
    "make_plan",
    "open_workspace",
    "parse_losses",
    "parse_precision",
    "parse_scheme",
    "read_profile",
    "record_ranges",
    "trim",
    "verify",
]
