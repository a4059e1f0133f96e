"""Compares the emulator with the runtimes themselves, code by code, and writes the table of VALIDATION.md.

    python tools/validate.py --python litert=PATH --python tosa=PATH [--profile NAME] [--output FILE]

For each profile with a referee: random networks (`validation_networks.py`) are quantized as the profile's compiler
does, with its own scales and with powers of two; the emulator computes every value; the referee's script
(`tools/referees`) runs the same case in an interpreter that has the runtime. Exit code 1: codes differ that `EXPECTED`
does not explain, or a referee failed. A referee without an interpreter is skipped, and said so.
"""

import argparse
import dataclasses
import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import validation_networks as networks

from onnxqt.calibrate import calibrate
from onnxqt.compiler import compile_model, compiler_plan
from onnxqt.data import open_samples
from onnxqt.emulate import load_program
from onnxqt.ingest import ingest
from onnxqt.model import input_specs
from onnxqt.profiles import PROFILES, Precision, Profile, parse_precision

SCRIPTS = Path(__file__).parent / "referees"
BATCH = 8
SCALES = ("random", "power of two")
WHOLE = "whole networks"


@dataclass(frozen=True, slots=True)
class Referee:
    """What runs the cases of a profile.

    Attributes:
        title: of the runtime, for people.
        python: name under which its interpreter is given.
        script: in `tools/referees`.
        options: of the script.
        result: stem of the files that it writes.
        converts: whether it builds its graph from the listing, which must then be integer throughout; else it runs
            `model.onnx`.
    """

    title: str
    python: str
    script: str
    options: tuple[str, ...] = ()
    result: str = "result"
    converts: bool = True


REFEREES: Mapping[str, Referee] = {
    "tflite_ref": Referee("LiteRT", "litert", "litert.py", ("--kernels", "ref"), "result-ref"),
    "tflite_ruy": Referee("LiteRT", "litert", "litert.py", ("--kernels", "ruy"), "result-ruy"),
    "xnnpack": Referee("LiteRT", "litert", "litert.py", ("--kernels", "xnnpack"), "result-xnnpack"),
    "tosa_int": Referee("TOSA reference model", "tosa", "tosa_model.py"),
    "ort_cpu": Referee("ONNX Runtime", "ort", "ort.py", converts=False),
    "openvino_vnni": Referee("OpenVINO", "openvino", "openvino_cpu.py", converts=False),
    "x86_sat16": Referee("OpenVINO (AVX512_CORE)", "openvino", "openvino_cpu.py", ("--saturating",), converts=False),
    "ncnn_sym": Referee("ncnn", "ncnn", "ncnn_cpu.py"),
}


@dataclass(frozen=True, slots=True)
class Expected:
    """Codes that may differ.

    Attributes:
        profile: where.
        operator: of which node.
        most: how many in one run of this tool with its defaults.
        reason: why.
    """

    profile: str
    operator: str
    most: int
    reason: str


_ZEROS = (
    "OpenVINO's integer Reduce leaves half of a batch of 3-D tensors at 0, as far from the float model as from "
    "the emulator"
)
_HIDDEN = "the node behind such a mean, whose codes OpenVINO does not show"
_ADD16 = "one sum of 16-bit codes by one; what TensorFlow Lite's optimized 16-bit ADD does otherwise is not known"
EXPECTED: tuple[Expected, ...] = (
    *(Expected(name, "GlobalAveragePool", 32, _ZEROS) for name in ("openvino_vnni", "x86_sat16")),
    *(Expected(name, "ReduceMean", 30, _ZEROS) for name in ("openvino_vnni", "x86_sat16")),
    *(Expected(name, "Gemm", 60, _HIDDEN) for name in ("openvino_vnni", "x86_sat16")),
    *(Expected(name, WHOLE, 199, _ZEROS) for name in ("openvino_vnni", "x86_sat16")),
    Expected("tflite_ruy", "Add", 1, _ADD16),
    Expected("tflite_ruy", WHOLE, 4, _ADD16),
)


@dataclass(slots=True)
class Count:
    """What was compared under one heading.

    Attributes:
        compared: codes.
        different: of them.
        in_float: codes not compared because the runtime computed them in float.
    """

    compared: int = 0
    different: int = 0
    in_float: int = 0


@dataclass(slots=True)
class Comparison:
    """Everything about one profile.

    Attributes:
        profile: its name.
        version: of the referee.
        counts: by (operator, kind of scales).
        inexpressible: reasons, and how many cases each kept from running.
        failures: cases that did not run though they should have.
        skipped: why nothing was compared, else empty.
    """

    profile: str
    version: str = ""
    counts: dict[tuple[str, str], Count] = field(default_factory=dict)
    inexpressible: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def count(self, operator: str, scales: str) -> Count:
        """The count under one heading."""
        return self.counts.setdefault((operator, scales), Count())


def make_case(
    folder: Path, model: onnx.ModelProto, seed: int, profile: Profile, precision: Precision
) -> tuple[str, ...]:
    """Writes the case of one float model, and returns the names of the nodes that are not integer.

    The one place that knows how onnxqt compiles, emulates and lists; the format is what `tools/referees` read.
    """
    folder.mkdir(parents=True)
    float_file = folder / "float.onnx"
    onnx.save(model, float_file)
    ingested = ingest(float_file)
    data = open_samples(networks.samples(model, 4 * BATCH, seed), input_specs(ingested))
    plan = compiler_plan(ingested, profile.policy)
    compiled = compile_model(ingested, calibrate(ingested, plan, data, BATCH), plan, profile.policy, precision)
    onnx.save(compiled, folder / "model.onnx")

    program = load_program(compiled, profile.arithmetic)
    content, arrays = program.listing()
    feeds = networks.samples(model, BATCH, seed + 1)
    computed = program.run_values(feeds)
    tensors = {tensor.codes: name for name, tensor in reversed(program.tensors.items())}
    sources = {node["output"]: node["inputs"][0] for node in content["nodes"] if node["kind"] == "boundary"}
    values = {
        code: {**facts, "tensor": tensors.get(code, code), "shape": list(computed[code].shape)}
        for code, facts in content["values"].items()
    }
    arrays |= {f"codes:{code}": computed[code] for code in values}
    arrays |= {f"real:{code}": feeds[sources[code]] for code in content["inputs"] if sources[code] in feeds}
    nodes = [
        {**node, "inputs": [name for name in node["inputs"] if name in values]}
        for node in content["nodes"]
        if node["output"] in values and node["inputs"][0] in values
    ]
    others = tuple(node["name"] for node in content["nodes"] if node["kind"] == "float")
    case = {**content, "profile": profile.name, "values": values, "nodes": nodes, "float_nodes": list(others)}
    (folder / "case.json").write_text(json.dumps(case))
    np.savez(folder / "arrays.npz", **arrays)
    return others


def make_cases(root: Path, profile: Profile, converts: bool, seeds: int) -> None:
    """Networks around each layer that the profile runs on integers, and of all of them, on both kinds of scales."""
    precisions = [parse_precision(name) for name in profile.policy.precisions]
    layers: list[tuple[str, Collection[str] | None]] = [("all", None)]
    allowed = {*profile.policy.operators, *networks.MOVES}
    layers += [(name, (name, "conv")) for name, (needs, _) in networks.BUILDERS.items() if allowed.issuperset(needs)]
    for precision in precisions:
        if precision.dynamic:
            continue
        for scales in SCALES:
            policy = profile.policy
            if scales != "random":
                policy = dataclasses.replace(policy, power_of_two="all")
            for name, chosen in layers:
                for seed in range(seeds):
                    folder = root / str(precision) / scales.replace(" ", "_") / f"{name}-{seed}"
                    model = networks.network(seed, profile.policy.operators, chosen, one_dimensional=seed % 4 == 3)
                    others = make_case(folder, model, seed, dataclasses.replace(profile, policy=policy), precision)
                    if others and converts:
                        print(f"{folder}: left out, in float: {', '.join(others)}", file=sys.stderr)
                        (folder / "case.json").unlink()


def run_referee(root: Path, referee: Referee, python: str) -> None:
    """Runs the script; it leaves a result in every case folder, also where it fails."""
    command = [python, str(SCRIPTS / referee.script), str(root), *referee.options]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)


def compare(root: Path, comparison: Comparison, result: str = "result") -> None:
    """Counts the codes of every case below `root` that has a result, under the operator that made them."""
    for file in sorted(root.rglob("case.json")):
        folder = file.parent
        scales = SCALES[1] if SCALES[1].replace(" ", "_") in folder.relative_to(root).parts else SCALES[0]
        path = folder / f"{result}.json"
        if not path.exists():
            comparison.failures.append(f"{folder.relative_to(root)}: the referee left no result")
            continue
        told = json.loads(path.read_text())
        comparison.version = told.get("version", "")
        if told["status"] == "not expressible":
            comparison.inexpressible.update(reasons_of(told))
        elif told["status"] != "run":
            comparison.failures.append(f"{folder.relative_to(root)}: {told.get('error') or told['status']}")
        else:
            compare_case(folder, told, f"{result}.npz", comparison, scales)


def reasons_of(told: Mapping[str, Any]) -> Iterable[str]:
    """Why a case cannot be expressed, without the names of nodes."""
    nodes = [node["not_expressible"] for node in told["nodes"] if "not_expressible" in node]
    return nodes or [told["reason"].partition(": ")[2] or told["reason"]]


def compare_case(folder: Path, told: Mapping[str, Any], file: str, comparison: Comparison, scales: str) -> None:
    """Counts the codes of one case, where a node had the same inputs in both: so an error shows where it arises."""
    case = json.loads((folder / "case.json").read_text())
    floats = {node["name"] for node in told["nodes"] if node.get("integer") is False}
    with np.load(folder / "arrays.npz") as ours, np.load(folder / file) as theirs:
        given = {*ours.files}
        found = {key.partition(":")[2]: theirs[key] for key in theirs.files}
        wrong = {code: differing(ours[f"codes:{code}"], codes) for code, codes in found.items()}
    # Codes that are the same in both: shown and equal, or computed on integers from such codes.
    same = {code for code in case["inputs"] if f"real:{code}" in given} | {code for code, n in wrong.items() if not n}
    for node in case["nodes"]:
        code, inputs_same = node["output"], same.issuperset(node["inputs"])
        count = comparison.count(node["op_type"], scales)
        if node["name"] in floats:
            count.in_float += math.prod(case["values"][code]["shape"])
        elif code in found and inputs_same:
            count.compared += found[code].size
            count.different += wrong[code]
        elif inputs_same:
            same.add(code)
    missing = [code for code in case["outputs"] if code not in found]
    if missing:
        comparison.failures.append(f"{folder.name}: no codes of {', '.join(missing)}")
    elif not floats and not case["float_nodes"]:
        whole = comparison.count(WHOLE, scales)
        whole.compared += sum(found[code].size for code in case["outputs"])
        whole.different += sum(wrong[code] for code in case["outputs"])


def differing(ours: np.ndarray[Any, Any], theirs: np.ndarray[Any, Any]) -> int:
    """How many codes differ; all of them where the shapes do."""
    if ours.shape != theirs.shape:
        return int(ours.size)
    return int(np.count_nonzero(ours.astype(np.int64) != theirs.astype(np.int64)))


def unexplained(comparison: Comparison, expected: Sequence[Expected] = EXPECTED) -> list[str]:
    """What is wrong and not expected, one line each."""
    found: Counter[str] = Counter()
    for (operator, _), count in comparison.counts.items():
        found[operator] += count.different
    allowed = {row.operator: row.most for row in expected if row.profile == comparison.profile}
    lines = [
        f"{comparison.profile}: {operator}: {number} codes differ, {allowed.get(operator, 0)} expected"
        for operator, number in sorted(found.items())
        if number > allowed.get(operator, 0)
    ]
    lines = [line for line in lines if WHOLE not in line] or lines  # a wrong operator explains its networks
    return lines + [f"{comparison.profile}: {failure}" for failure in comparison.failures]


HEADER = """# Validation of the emulator against the runtimes themselves

Written by `nox -s validate` (`tools/validate.py`); do not edit.

Seeded random networks of 4 to 10 layers are quantized as each profile's compiler does it, once with the scales that
come out and once with all scales rounded up to powers of two, where rounding ties are frequent. The emulator's fast
engine and the runtime compute the same samples. A node is compared where its inputs have equal codes in both, so a
difference counts where it arises; whole networks are compared at their outputs where the runtime ran every node on
integers. Nodes that a runtime ran in float are counted apart and not compared.

Each runtime is a release from the package index, in an environment of its own. ONNX Runtime here is the current
release, not the one that onnxqt trains and computes with. x86-64 only: builds for other processors have other kernels.
"""


def summary(comparisons: Sequence[Comparison]) -> str:
    """One row a profile."""
    lines = ["| profile | referee | operators | codes compared | different |", "|---|---|--:|--:|--:|"]
    for each in comparisons:
        operators = {operator for (operator, _), count in each.counts.items() if count.compared and operator != WHOLE}
        compared = sum(count.compared for (operator, _), count in each.counts.items() if operator != WHOLE)
        different = sum(count.different for (operator, _), count in each.counts.items() if operator != WHOLE)
        runtime = each.skipped or f"{REFEREES[each.profile].title} {each.version.split('-')[0]}"
        lines.append(f"| {each.profile} | {runtime} | {len(operators)} | {compared:,} | {different:,} |")
    return "\n".join(lines) + "\n"


def table(comparisons: Sequence[Comparison], expected: Sequence[Expected] = EXPECTED) -> str:
    """The tables of VALIDATION.md."""
    lines = [
        "| profile | operator | scales | codes compared | different | in float |",
        "|---|---|---|--:|--:|--:|",
    ]
    for each in comparisons:
        for (operator, scales), count in sorted(each.counts.items()):
            if not count.compared and not count.in_float:
                continue  # moves that the runtime does not show
            numbers = f"{count.compared:,} | {count.different:,} | {count.in_float:,}"
            lines.append(f"| {each.profile} | {operator} | {scales} | {numbers} |")
    lines += [f"\n{each.profile}: skipped, {each.skipped}" for each in comparisons if each.skipped]
    if expected:
        lines += ["", "| profile | operator | at most | why |", "|---|---|--:|---|"]
        lines += [f"| {row.profile} | {row.operator} | {row.most} | {row.reason} |" for row in expected]
    reasons = [(each.profile, reason, n) for each in comparisons for reason, n in sorted(each.inexpressible.items())]
    if reasons:
        lines += ["", "| profile | what the referee cannot express | cases |", "|---|---|--:|"]
        lines += [f"| {profile} | {reason} | {number} |" for profile, reason, number in reasons]
    return "\n".join(lines) + "\n"


def validate(name: str, pythons: Mapping[str, str], root: Path, seeds: int) -> Comparison:
    """Makes the cases of one profile, has them run, compares."""
    referee, comparison = REFEREES[name], Comparison(name)
    if referee.python not in pythons:
        comparison.skipped = f"no interpreter: give --python {referee.python}=PATH"
        return comparison
    make_cases(root, PROFILES[name], referee.converts, seeds)
    run_referee(root, referee, pythons[referee.python])
    compare(root, comparison, referee.result)
    return comparison


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--python", action="append", default=[], metavar="NAME=PATH", help="interpreter of a referee")
    parser.add_argument("--profile", action="append", choices=sorted(REFEREES), help="default: all that have a referee")
    parser.add_argument("--seeds", type=int, default=6, help="networks of each kind")
    parser.add_argument("--work", type=Path, help="keep the cases in this new folder")
    parser.add_argument("--output", type=Path, help="write the tables there instead of printing them")
    options = parser.parse_args(arguments)
    pythons = dict(pair.split("=", 1) for pair in options.python if "=" in pair)
    if len(pythons) != len(options.python):
        parser.error("--python takes NAME=PATH, each name once")
    with tempfile.TemporaryDirectory() as temporary:
        root = options.work or Path(temporary)
        names = options.profile or list(REFEREES)
        comparisons = [validate(name, pythons, root / name, options.seeds) for name in names]
    text = table(comparisons)
    if options.output:
        options.output.write_text(f"{HEADER}\n{summary(comparisons)}\n## By operator\n\n{text}")
    else:
        print(text, end="")
    for each in comparisons:
        if each.skipped:
            print(f"{each.profile}: skipped, {each.skipped}", file=sys.stderr)
    problems = [line for each in comparisons for line in unexplained(each)]
    for line in problems:
        print(line, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
