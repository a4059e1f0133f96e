"""Stage 7, report: one JSON document with everything a run found; the terminal table derives from it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from onnxqt.evaluate import FileResult, Tallies
from onnxqt.metrics import Tally
from onnxqt.model import Model
from onnxqt.plan import QuantPlan
from onnxqt.runtime import TRAINER, installed
from onnxqt.trim import Trimmed
from onnxqt.verify import Verdict

SCHEMA_VERSION = "1.0"

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class SchemeResult:
    """What was found out about one scheme.

    Attributes:
        ptq: the original model quantized to it, run by ONNX Runtime.
        checkpoint: the trained checkpoint quantized to it, run by ONNX Runtime.
        weights: of which of the two the written file is made.
        file: the written file, run by ONNX Runtime and the emulator.
        verdict: the check of that file.
    """

    ptq: Tallies
    checkpoint: Tallies
    weights: Literal["checkpoint", "original"]
    file: FileResult
    verdict: Verdict


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that goes into a report."""

    model: Model
    plan: QuantPlan
    settings: Json
    data: Json
    original: Tallies
    checkpoint: Tallies
    trimmed: Trimmed
    schemes: Mapping[str, SchemeResult]
    files: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Report:
    """The report of a run; `content` is what report.json holds (schema: onnxqt/report.schema.json)."""

    content: Json

    def summary(self) -> Sequence[tuple[str, ...]]:
        """Rows for people, the header first: one scheme each, before and after.

        Shares are percent: top-1 where there are labels, else agreement with the original model. `trim` is the
        written file; `emulator` the same file in integer arithmetic; `LSB` how far the two are apart at most.
        """
        rows = [("scheme", "PTQ", "trim", "emulator", "PTQ dB", "trim dB", "LSB", "made of")]
        for name, scheme in self.content["schemes"].items():
            emulator = scheme["emulator"]
            rows.append(
                (
                    name,
                    _share(scheme["ptq"]["metrics"]),
                    _share(scheme["trim"]["metrics"]),
                    _share(emulator["metrics"]),
                    _decibel(scheme["ptq"]["fidelity"]),
                    _decibel(scheme["trim"]["fidelity"]),
                    "-" if emulator["max_lsb"] is None else str(emulator["max_lsb"]),
                    scheme["weights"],
                )
            )
        return rows


def build_report(findings: Findings) -> Report:
    """Put the findings of a run into their JSON form."""
    plan, trimmed = findings.plan, findings.trimmed
    return Report(
        {
            "schema_version": SCHEMA_VERSION,
            "model": {
                "sha256": findings.model.sha256,
                "opset": findings.model.opset,
                "inputs": list(findings.model.graph.inputs),
                "outputs": list(findings.model.graph.outputs),
                "changes": list(findings.model.changes),
            },
            "settings": findings.settings,
            "data": findings.data,
            "environment": environment(),
            "plan": {
                "quantized_tensors": len(plan.activations),
                "quantized_weights": len(plan.weights),
                "unbounded_tensors": list(plan.unbounded),
                "integer_nodes": [node.name for node in plan.integer_nodes],
                "float_nodes": [{"node": n.name, "op_type": n.op_type, "reason": n.reason} for n in plan.float_nodes],
            },
            "float": _outcome(findings.original),
            "checkpoint": _outcome(findings.checkpoint),
            "training": {
                "steps": trimmed.steps,
                "best_step": trimmed.best_step,
                "seconds": trimmed.seconds,
                "step_ms_median": trimmed.step_ms_median,
                "reason": trimmed.reason,
                "diverged": trimmed.diverged,
                "untouched": dict(trimmed.untouched),
                "evaluations": [report for report in trimmed.history if report["event"] == "evaluate"],
            },
            "schemes": {name: _scheme(result) for name, result in findings.schemes.items()},
            "files": dict(findings.files),
            "seconds": findings.seconds,
        }
    )


def environment() -> Json:
    """Versions of what computed the results."""
    packages = ("onnxqt", "onnx", "onnx_graphsurgeon", "numpy", "onnxruntime", TRAINER)
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version for name in packages if (version := installed(name))},
    }


def _scheme(result: SchemeResult) -> Json:
    verdict, file = result.verdict, result.file
    return {
        "ptq": _outcome(result.ptq),
        "checkpoint": _outcome(result.checkpoint),
        "trim": _outcome(file.runtime),
        "weights": result.weights,
        "emulator": {
            **_outcome(file.emulator),
            "max_lsb": file.max_lsb,
            "mismatch_fraction": file.mismatch_fraction,
            "float_nodes": [{"node": n, "op_type": op, "reason": why} for n, op, why in file.float_nodes],
            "overflows": file.overflows,
        },
        "self_check": {
            "tensors": len(verdict.tensors),
            "codes": sum(tensor.total for tensor in verdict.tensors),
            "one_lsb": sum(tensor.one_lsb for tensor in verdict.tensors),
            "tie_distance": max((tensor.tie_distance for tensor in verdict.tensors), default=0.0),
            "max_lsb": verdict.max_lsb,
            "mismatch_fraction": verdict.mismatch_fraction,
            "integer_kernels": verdict.integer_kernels,
            "all_integer": verdict.all_integer,
        },
    }


def _outcome(tallies: Tallies) -> Json:
    """Metrics and fidelity of the first output, and fidelity of each where there are several."""
    first = next(iter(tallies.values()), Tally())
    outcome: Json = {"metrics": first.metrics(), "fidelity": first.fidelity()}
    if len(tallies) > 1:
        outcome["outputs"] = {name: tally.fidelity() for name, tally in tallies.items()}
    return outcome


def _share(metrics: Json) -> str:
    return f"{100 * next(iter(metrics.values())):.2f}" if metrics else "-"


def _decibel(fidelity: Json) -> str:
    if fidelity["mse"] is None:
        return "-"
    return "exact" if fidelity["snr_db"] is None else f"{fidelity['snr_db']:.1f}"
