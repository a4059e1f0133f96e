"""Stage 7, report: one JSON document with everything a run found; the terminal table derives from it."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from onnxqt.candidates import Origin
from onnxqt.evaluate import FileResult, Tallies
from onnxqt.metrics import Tally
from onnxqt.model import Model
from onnxqt.plan import QuantPlan
from onnxqt.runtime import TRAINER, installed
from onnxqt.trim import Trimmed
from onnxqt.trim.losses import Losses
from onnxqt.verify import Verdict

SCHEMA_VERSION = "1.1"
CURVE_POINTS = 200  # steps of a run whose figures the report has

# Of a step: the field of the training process's reports, and the report's name for it.
_CURVES = (("step", "step"), ("loss", "loss"), ("blend", "lambda"), ("lr", "lr"), ("tau", "tau"))
_SETTINGS = ("optimizer", "learning_rate", "schedule")

Json = dict[str, Any]


@dataclass(frozen=True, eq=False)
class SchemeResult:
    """What was found out about one scheme.

    Attributes:
        ptq: the original model quantized to it, run by ONNX Runtime.
        checkpoint: the trained checkpoint quantized to it, run by ONNX Runtime.
        weights: what the written file is made of: the checkpoint, the original or the equalized original.
        file: the written file, run by ONNX Runtime and the emulator.
        verdict: the check of that file.
        baseline: the original model after the steps of post-training quantization that were asked for; None for none.
    """

    ptq: Tallies
    checkpoint: Tallies
    weights: Origin
    file: FileResult
    verdict: Verdict
    baseline: Tallies | None = None


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything that goes into a report.

    Attributes:
        model: the original.
        plan: where its quantizers are.
        settings: of the run, as JSON.
        data: the samples, as JSON.
        original: the original float model, run.
        checkpoint: the trained float model, run.
        trimmed: the outcome of training.
        schemes: what was found out about each.
        files: SHA-256 of each file, by its path in the run directory.
        seconds: time that the run took.
        losses: what training minimised; None if it was not to train.
    """

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
    losses: Losses | None = None


@dataclass(frozen=True)
class Report:
    """The report of a run; `content` is what report.json holds (schema: onnxqt/report.schema.json)."""

    content: Json

    def summary(self) -> Sequence[tuple[str, ...]]:
        """Rows for people, the header first: one scheme each, before and after.

        Shares are percent: top-1 where there are labels, else agreement with the original model. `trim` is the
        written file; `emulator` the same file in integer arithmetic; `LSB` how far the two are apart at most;
        `better PTQ` the original after the steps of post-training quantization that were asked for, if any.
        """
        baseline = any(scheme["baseline"] for scheme in self.content["schemes"].values())
        better = ("better PTQ",) if baseline else ()
        rows = [("scheme", "PTQ", *better, "trim", "emulator", "PTQ dB", "trim dB", "LSB", "made of")]
        for name, scheme in self.content["schemes"].items():
            emulator = scheme["emulator"]
            rows.append(
                (
                    name,
                    _share(scheme["ptq"]["metrics"]),
                    *((_share(scheme["baseline"]["metrics"]),) if baseline else ()),
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
    plan = findings.plan
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
            "training": _training(findings),
            "schemes": {name: _scheme(result) for name, result in findings.schemes.items()},
            "files": dict(findings.files),
            "seconds": findings.seconds,
        }
    )


def _training(findings: Findings) -> Json:
    """How training went: its settings, its course, and what it did to the weights."""
    trimmed, settings = findings.trimmed, findings.settings["training"]
    regimes = list(trimmed.helped)
    return {
        **{name: settings[name] for name in _SETTINGS},
        "losses": None if findings.losses is None else asdict(findings.losses),
        "regimes": regimes,
        "steps": trimmed.steps,
        "best_step": trimmed.best_step,
        "seconds": trimmed.seconds,
        "step_ms_median": trimmed.step_ms_median,
        "reason": trimmed.reason,
        "diverged": trimmed.diverged,
        "stopped": trimmed.stopped,
        "untouched": dict(trimmed.untouched),
        "curves": _curves(trimmed.history),
        "evaluations": _evaluations(trimmed.history, regimes),
        "tails": {
            name: {"before": asdict(before), "after": asdict(after)} for name, (before, after) in trimmed.tails.items()
        },
    }


def _curves(history: Sequence[Json]) -> dict[str, list[Any]]:
    """Figures of evenly spaced steps, the first and the last among them, in columns."""
    steps = [report for report in history if report["event"] == "step"]
    picked = np.linspace(0, len(steps) - 1, min(len(steps), CURVE_POINTS)).round().astype(int)
    known = [(field, name) for field, name in _CURVES if all(field in step for step in steps)]
    return {name: [steps[i][field] for i in picked] for field, name in known}


def _evaluations(history: Sequence[Json], regimes: Sequence[str]) -> list[Json]:
    """The held-out losses by regime; step 0 is the untouched model."""
    return [
        {
            "step": report.get("step", 0),
            "losses": {
                name: loss if np.isfinite(loss) else None for name, loss in zip(regimes, report["losses"], strict=True)
            },
            "best": report.get("best", False),
        }
        for report in history
        if report["event"] in ("start", "evaluate")
    ]


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
        "baseline": None if result.baseline is None else _outcome(result.baseline),
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
