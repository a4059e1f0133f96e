"""What `coverage.py` writes: tables, and groups of models that end the same way."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from coverage_judge import Row
from coverage_models import SETS


def pattern(row: Row) -> str:
    """What rows with the same cause have in common: class and message without names and numbers."""
    message = re.sub(r"(?<!\w)'[^']*'", "'…'", row["message"])
    message = re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", message)
    message = re.sub(r"(#|'…'|'…': ?#)(, ?\1)+", r"\1, …", message)
    return f"{row['error']}: {message}"


def grouped(rows: Iterable[Row]) -> list[tuple[str, list[Row]]]:
    """Rows by their pattern, the most frequent first."""
    groups: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[pattern(row)].append(row)
    return sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))


def summary(rows: Sequence[Row]) -> list[str]:
    """A Markdown table: how many models of each set end how."""
    lines = [
        "| set | models | run in ONNX Runtime | pass | of these quantized | of these trained | refused | fail "
        "| pass, % of those that run |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    present = [group for group in SETS if any(row["set"] == group for row in rows)]
    for group in [*present, "all"]:
        own = [row for row in rows if group in (row["set"], "all")]
        counts = Counter(row["outcome"] for row in own)
        passed = [row for row in own if row["outcome"] == "passes"]
        runnable = len(own) - counts["not runnable"]
        cells = (
            *(group, len(own), runnable, counts["passes"]),
            sum(row.get("integer_nodes", 0) > 0 for row in passed),
            sum(row.get("trained", 0) > 0 for row in passed),
            *(counts["refused"], counts["fails"]),
            f"{100 * counts['passes'] / runnable:.1f}" if runnable else "-",
        )
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def failures(rows: Sequence[Row]) -> str:
    """For those who fix them: what failed or was refused, grouped, with one example of each group."""
    lines = ["# Failures and refusals", "", *summary(rows), ""]
    for outcome in ("fails", "refused"):
        chosen = [row for row in rows if row["outcome"] == outcome]
        lines += [f"## {outcome}: {len(chosen)}", ""]
        for name, group in grouped(chosen):
            first = group[0]
            stages = Counter(row["stage"] for row in group)
            lines += [
                f"- **{len(group)}** `{name}`",
                f"  - stages {dict(stages)}, where {dict(Counter(row['where'] for row in group))}",
                f"  - example {first['set']}/{first['name']}: {first['message']}",
                f"  - {', '.join(row['name'] for row in group[:8])}{', ...' if len(group) > 8 else ''}",
            ]
        lines.append("")
    tried = [row for row in rows if row.get("untrained", "passes") != "passes"]
    lines += [f"## refused with training and without: {len(tried)}", ""]
    for name, group in grouped({**row, "message": row["untrained"]} for row in tried):
        names = ", ".join(row["name"] for row in group[:8])
        lines += [f"- **{len(group)}** `{name}`", f"  - example {group[0]['message']}", f"  - {names}"]
    return "\n".join(lines)


def document(rows: Sequence[Row], command: str, unexported: Mapping[str, str]) -> str:
    """COVERAGE.md; `unexported` are the zoo's models that an exporter could not write, with its messages."""
    lines = [
        "# Coverage",
        "",
        "How the whole pipeline (inspect, calibrate, 20 steps of trim, export and check at w8a8-sym-pc) ends on the",
        "models of ONNX's own test suites and on a zoo of small architectures from the common exporters.",
        "A model counts where ONNX Runtime 1.19.2 itself runs it in float, as it is or converted to opset 17 or 21.",
        "*pass*: every stage ends well, the ingested model computes what the original computes (relative difference",
        "at most 1e-5; 1e-2 with 16-bit floats), and the exported file runs with finite outputs.",
        "Models with QuantizeLinear or DequantizeLinear are run with --strip-qdq.",
        "*refused*: an error of the package's own. *fail*: everything else.",
        "",
        *summary(rows),
        "",
    ]
    refused = [row for row in rows if row["outcome"] == "refused"]
    integer = [row for row in refused if re.search(r"is already quantized|computes with integers", row["message"])]
    runs = sum(row["outcome"] != "not runnable" for row in rows)
    passed = sum(row["outcome"] == "passes" for row in rows)
    lines += [
        f"{len(integer)} of the refused consist of integer operators (QuantizeLinear, QLinearConv, ...), not of float",
        f"ones. Of the {runs - len(integer)} others that ONNX Runtime runs, "
        f"{100 * passed / max(1, runs - len(integer)):.1f} % go through.",
        "",
    ]
    vague = [row for row in refused if not (row["named"] and row["remedy"])]
    exported = sum(row.get("untrained") == "passes" for row in refused)
    if exported:
        lines += [f"Of the {len(refused)} refused, {exported} are quantized without training."]
    if refused:
        lines += [
            f"{len(refused) - len(vague)} of the {len(refused)} refusals name a node, tensor or input and a remedy.",
            "",
        ]
    for outcome, title in (("fails", "Failed"), ("refused", "Refused"), ("not runnable", "Not run by ONNX Runtime")):
        lines += _listed(title, [row for row in rows if row["outcome"] == outcome])
    excluded = defaultdict(list)
    for row in rows:
        if "float_path" in row:
            excluded[row["float_path"]].append(row["name"])
    lines += ["## Float path not compared", "", *(f"- {why}: {', '.join(names)}" for why, names in excluded.items())]
    lines += ["", "## Not exported", "", *(f"- {name}: {message}" for name, message in unexported.items())]
    lines += ["", "## How to regenerate it", "", "```sh", command, "```", "", _versions(), ""]
    return "\n".join(lines)


def _listed(title: str, rows: Sequence[Row]) -> list[str]:
    lines = [f"## {title} ({len(rows)})", ""]
    for _, group in grouped(rows):
        example = group[0]
        names = ", ".join(f"{row['set']}/{row['name']}" for row in group)
        lines += [f"- {len(group)} x `{example['error']}` at {example['stage']}: {example['message']}", f"  - {names}"]
    return [*lines, ""]


def _versions() -> str:
    found = []
    for name in ("onnxqt", "onnx", "onnx-graphsurgeon", "onnxruntime-training-cpu", "numpy"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}, {platform.system()} {platform.machine()}."


def write_report(rows: Sequence[Row], folder: Path, command: str, unexported: Mapping[str, str]) -> None:
    """Write COVERAGE.md and coverage.json, one row per line."""
    (folder / "COVERAGE.md").write_text(document(rows, command, unexported))
    lines = ",\n".join(json.dumps(row) for row in rows)
    (folder / "coverage.json").write_text(f'{{"versions": {json.dumps(_versions())}, "models": [\n{lines}\n]}}\n')
