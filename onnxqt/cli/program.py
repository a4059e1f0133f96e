"""The command that runs a quantized file: emulate."""

from collections import Counter
from pathlib import Path
from typing import Any

import click
import numpy as np
from onnx import ModelProto

from onnxqt.cli.options import JSON, KINDS, MODEL, PREPROCESS, opened, options, profile_named
from onnxqt.cli.output import number, print_json, print_table
from onnxqt.cli.program_page import everything, print_program
from onnxqt.cli.progress import Bar
from onnxqt.data import InputSpec, Samples, check_labels, fixed_batch
from onnxqt.emulate import Program, load_program
from onnxqt.errors import ModelError, UsageError
from onnxqt.evaluate import in_order
from onnxqt.export import quantized_model
from onnxqt.ingest import ingest
from onnxqt.metrics import Tally
from onnxqt.pipeline import EVALUATION_BATCH, plan_of
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.table import check_belongs, read_table, table_quantizers


@click.command()
@click.argument("file", type=MODEL)
@click.option("--data", type=MODEL, help=f"Samples: {KINDS}; not needed with --dump.")
@options(PREPROCESS, JSON)
@click.option("--reference", type=MODEL, help="Float model to compare with.")
@click.option(
    "--profile", default="ort_cpu", show_default=True, metavar="NAME|FILE", help="Whose arithmetic; see 'profiles'."
)
@click.option("--table", type=MODEL, help="FILE is a float model; quantize it as this table.json says first.")
@click.option("--scheme", metavar="ID", help="Which scheme of the table.")
@click.option("--dump", is_flag=True, help="Print the integer program: rules, multipliers, accumulators, node by node.")
def emulate(
    file: Path, data: Path | None, reference: Path | None, profile: str, dump: bool, as_json: bool, **rest: Any
) -> None:
    """Run the quantized FILE in the integer arithmetic of a back end, or print the program that does.

    \b
    Examples:
        onnxqt emulate schemes/w8a8-sym-pc.onnx --data eval/ --reference checkpoint.onnx
        onnxqt emulate schemes/w8a8-sym-pc.onnx --profile tflite_ref --dump
        onnxqt emulate checkpoint.onnx --table table.json --scheme w4a8-sym-pc --data eval/
    """
    if data is None and not dump:
        raise UsageError("nothing to do: give samples with --data, or print the program with --dump")
    chosen = profile_named(profile)
    program = load_program(_quantized(file, rest["table"], rest["scheme"]), chosen.arithmetic)
    content: dict[str, Any] = {"profile": chosen.name}
    if data is not None:
        with opened(data, rest["preprocess"], _specs(program)) as samples:
            tallies, overflows, count = _emulated(program, file, samples, reference)
        content["outputs"] = {
            name: {
                "metrics": tally.metrics(),
                "fidelity": tally.fidelity() if reference else None,
                **tally.confidence(),
            }
            for name, tally in tallies.items()
        }
        content["overflows"] = overflows
    content["integer_nodes"] = len(program.integer_nodes)
    content["float_nodes"] = [{"node": n, "op_type": op, "reason": why} for n, op, why in program.float_nodes]
    if as_json:
        print_json({**content, "program": everything(program)} if dump else content)
        return
    if dump:
        print_program(program, chosen)
    if data is not None:
        header = ("output", "top-1 %", "agreement %", "SNR dB", "cosine", "Brier", "ECE %")
        rows = [(name, *_compared(tally, reference is not None)) for name, tally in tallies.items()]
        title = f"{count} samples in integer arithmetic, {chosen.name} ({chosen.evidence})"
        print_table(title, [header, *rows])
        print_table(
            "accumulators that did not fit", [("node", "count"), *((n, f"{c:,}") for n, c in overflows.items())]
        )
    if not dump:
        print_table("float nodes", [("node", "operator", "reason"), *program.float_nodes])


def _quantized(file: Path, table: Path | None, scheme: str | None) -> Path | ModelProto:
    """The quantized file, or what a table makes of a float one."""
    if (table is None) != (scheme is None):
        raise UsageError("--table and --scheme go together: which table, and which of its schemes")
    if table is None or scheme is None:
        return file
    model, content = ingest(file), read_table(table)
    check_belongs(content, model)
    plan = plan_of(content, model)
    return quantized_model(model, plan, table_quantizers(content, plan, str(parse_scheme(scheme))))


def _emulated(
    program: Program, file: Path, samples: Samples, reference: Path | None
) -> tuple[dict[str, Tally], dict[str, int], int]:
    """What the program makes of the samples: by output; overflows by node; how many samples."""
    session = Session(reference) if reference else None
    if session and not set(program.outputs) <= set(session.outputs):
        raise ModelError(
            f"'{reference}' has the outputs {session.outputs}, '{file}' has {list(program.outputs)}: "
            "give the float model that it was made of"
        )
    tallies = {name: Tally() for name in program.outputs}
    overflows: Counter[str] = Counter()
    fixed = fixed_batch(_specs(program))
    batches = samples.batches(fixed or EVALUATION_BATCH, pad=fixed is not None)
    with Bar() as bar:
        bar.stage("emulate", samples.count)
        for batch, result in in_order(lambda batch: program.run_codes(batch.inputs), batches):
            expected = session.run(batch.inputs) if session else result.outputs
            for name, tally in tallies.items():
                if not tally.samples:
                    _check_labels(samples, result.outputs[name])
                tally.add(batch.real(result.outputs[name]), batch.real(expected[name]), batch.labels)
            overflows.update(result.overflows)
            bar.advance(next(iter(tallies.values())).samples)
    return tallies, dict(+overflows), samples.count


def _specs(program: Program) -> list[InputSpec]:
    return [InputSpec(name, np.dtype(dtype), shape or ()) for name, (dtype, shape) in program.inputs.items()]


def _check_labels(samples: Samples, output: Any) -> None:
    """Labels must be classes of an output that has classes."""
    if samples.has_labels and output.ndim == 2 and output.shape[1] > 1:
        check_labels(samples, output.shape[1])


def _compared(tally: Tally, with_reference: bool) -> tuple[str, ...]:
    fidelity, metrics, confidence = tally.fidelity(), tally.metrics(), tally.confidence()
    rated = (number(confidence["brier"], "{:.4f}"), number(confidence["ece"], "{:.2f}", 100))
    top1 = f"{100 * metrics['top1']:.2f}" if "top1" in metrics else "-"
    if not with_reference:
        return (top1, "-", "-", "-", *rated)
    return (
        top1,
        number(fidelity["agreement"], "{:.2f}", 100),
        "exact" if fidelity["snr_db"] is None else f"{fidelity['snr_db']:.1f}",
        number(fidelity["cosine"], "{:.6f}"),
        *rated,
    )
