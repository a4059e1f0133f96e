"""A matrix for people: its lines and tables."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import click

from onnxqt.cli.output import decibel, few, number, percent, print_table
from onnxqt.matrix import Matrix

Json = dict[str, Any]

SHOWN = 20  # rows of a table
_SHARES = {"top1": "top-1 %", "agreement": "agreement with the original, %"}
_NO_CLASSES = "signal-to-noise ratio to the original, dB"


def print_matrix(matrix: Matrix) -> None:
    """What people want to see of a matrix: accuracy, then why it is not better."""
    task, floats = matrix.task, matrix.floats
    names = [subject.name for subject in task.subjects]
    share = next((text for name, text in _SHARES.items() if name in floats[names[0]]["metrics"]), _NO_CLASSES)
    columns = list(dict.fromkeys(str(column) for _, column in task.columns))
    pairs: list[tuple[str, ...]] = [(names[0], other) for other in names[1:]]
    for pair in pairs or [(names[0],)]:
        rows = [
            (profile.name, profile.evidence, *(_cells(matrix, pair, profile.name, column) for column in columns))
            for profile in task.profiles
        ]
        before = " -> ".join(_share(floats[name]) for name in pair)
        print_table(f"{' -> '.join(pair)}: {share}; float {before}", [("profile", "evidence", *columns), *rows])
    for index, entry in enumerate(matrix.summary):
        if entry["mean_gap"] is not None:
            click.echo(
                f"{entry['model']}: mean gap to the original float model {100 * entry['mean_gap']:.2f} points, "
                f"spread {100 * entry['spread']:.2f} points, over {entry['cells']} back ends and precisions"
                f"{_by_evidence(matrix, index)}"
            )
    for title, table in _reasons(matrix):
        if len(table) > 1:
            click.echo()
        print_table(title, table)


def _cells(matrix: Matrix, models: Sequence[str], profile: str, column: str) -> str:
    """Accuracy of each model in a column of a profile."""
    cells = [matrix.cell(model, profile, column) for model in models]
    return "-" if None in cells else " -> ".join(_share(cell.result) for cell in cells if cell)


def _share(outcome: Json | None) -> str:
    """Top-1 or agreement; the signal-to-noise ratio of a model without classes."""
    if outcome is None:
        return "failed"
    return percent(outcome) if outcome["metrics"] else decibel(outcome["fidelity"])


def _by_evidence(matrix: Matrix, index: int) -> str:
    """The mean gap of a model on validated and on modelled back ends, where there are both."""
    entries = {
        evidence: matrix.summary_over([p.name for p in matrix.task.profiles if p.evidence == evidence])[index]
        for evidence in ("validated", "modelled")
    }
    if any(entry["mean_gap"] is None for entry in entries.values()):
        return ""
    gaps = (f"{name} {100 * entry['mean_gap']:.2f} over {entry['cells']}" for name, entry in entries.items())
    return f" ({', '.join(gaps)})"


def _reasons(matrix: Matrix) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows of the tables below the headline: the last model at the first precision of each profile."""
    task, last = matrix.task, matrix.task.subjects[-1].name
    firsts = {profile.name: str(columns[0]) for profile in task.profiles if (columns := task.columns_of(profile))}
    done = {
        profile: cell.result
        for profile, column in firsts.items()
        if (cell := matrix.cell(last, profile, column)) and cell.result is not None
    }
    layers: Groups = defaultdict(dict)
    floats: defaultdict[tuple[str, str], defaultdict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    advice: Groups = defaultdict(dict)
    failed: Groups = defaultdict(dict)
    worst_layers = {profile: worst for profile, result in done.items() if (worst := result["worst_layer"])}
    for profile, worst in sorted(worst_layers.items(), key=lambda item: item[1]["snr_db"]):
        layers[(worst["tensor"],)][f"{profile} {worst['snr_db']:.1f}"] = None
    for profile, result in done.items():
        for node in result["float_nodes"]:
            floats[node["op_type"], node["reason"]][profile].add(node["node"])
        if worst := result["costliest"]:
            values = f"{worst['values_per_sample']:,}"
            advice[worst["node"], worst["op_type"], values, worst["advice"] or "-"][profile] = None
    for cell in matrix.cells:
        if cell.error is not None:
            failed[cell.model, cell.error][f"{cell.profile} {cell.column}"] = None
    kept: Groups = {
        (op_type, few(dict.fromkeys(sorted(set().union(*by_profile.values())))), reason): dict.fromkeys(by_profile)
        for (op_type, reason), by_profile in floats.items()
    }
    overflows = [
        (cell.model, cell.profile, cell.column, node, f"{count:,}")
        for cell in matrix.cells
        for node, count in (cell.result or {"overflows": {}})["overflows"].items()
    ]
    titled = f"{last}, first precision of each profile"
    float_figures = ("float", "-", "-", *_figures(matrix.floats[last]))
    figures = [
        (name, number(result["integer_macs"], "{:.1f}", 100), str(result["boundaries"]), *_figures(result))
        for name, result in done.items()
    ]
    header = ("profile", "int. MACs %", "boundaries", "MSE", "dB", "Brier", "ECE %")
    return [
        (titled, [header, float_figures, *figures]),
        ("layer farthest from the float model", [("tensor", "dB"), *_grouped(layers, len(done))]),
        ("what stays float", [("operator", "nodes", "reason", "profiles"), *_grouped(kept, len(done))]),
        (
            "the costliest way through float, and what avoids it",
            [("node", "operator", "values", "change", "profiles"), *_grouped(advice, len(done))],
        ),
        ("accumulators that did not fit", [("model", "profile", "precision", "node", "count"), *overflows]),
        ("what failed", [("model", "reason", "where"), *_grouped(failed, 0)]),
    ]


Groups = dict[tuple[str, ...], dict[str, None]]  # what a row says -> of which profiles it is true


def _figures(outcome: Json) -> tuple[str, ...]:
    fidelity = outcome["fidelity"]
    return (
        number(fidelity["mse"], "{:.3g}"),
        decibel(fidelity),
        number(outcome["brier"], "{:.4f}"),
        number(outcome["ece"], "{:.2f}", 100),
    )


def _grouped(groups: Groups, total: int) -> list[tuple[str, ...]]:
    """Rows with the names that they are true of, "all" for `total` of them; not more rows than anyone reads."""
    rows = [
        (*row, "all" if len(names) == total and not any(" " in name for name in names) else few(names))
        for row, names in groups.items()
    ]
    if len(rows) > SHOWN:
        rest = (f"and {len(rows) - SHOWN} more: see --json", *[""] * (len(rows[0]) - 1))
        rows = [*rows[:SHOWN], rest]
    return rows
