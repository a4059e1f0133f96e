"""What runs on integers and what does not, on each back end, and what that costs on devices."""

from collections import defaultdict
from collections.abc import Collection, Sequence

from onnxqt.html.form import (
    Block,
    Cell,
    Fold,
    Paragraph,
    Row,
    Section,
    Table,
    absent,
    number,
    rows_within,
)
from onnxqt.html.source import Facts, Run
from onnxqt.html.text import NOTHING, percent, plural, sentence, short, whole

MOST_NAMES = 400  # in a list
_FEW = 4  # names in a cell


def quantized_section(run: Run) -> Section:
    """What is quantized, what not, and why."""
    plan = run.report.inner("plan")
    integers, floats = plan.names("integer_nodes"), plan.records("float_nodes")
    counts = [
        ("tensors on a grid", plan.number("quantized_tensors")),
        ("weights on a grid", plan.number("quantized_weights")),
        ("nodes on integers", float(len(integers))),
        ("nodes that stay float", float(len(floats))),
    ]
    blocks: list[Block] = [
        Table("Counts", ("what", "number"), [[Cell(words), number(whole(count))] for words, count in counts])
    ]
    if floats:
        header = ("operator", "nodes", "reason", "which")
        shown, more = rows_within(_grouped(floats))
        blocks.append(Table(f"What stays float, and why{more}", header, shown))
    else:
        blocks.append(Paragraph("No node of the plan stays float."))
    if unbounded := plan.names("unbounded_tensors"):
        blocks.append(
            Paragraph(f"Float because they take infinite values on the samples: {_listed(unbounded)}.", "warning")
        )
    blocks += [_operators(plan), *_untouched(run), _files(run)]
    if integers:
        names = integers[:MOST_NAMES]
        more = f" and {len(integers) - len(names):,} more" if len(integers) > len(names) else ""
        blocks.append(
            Fold(
                f"The {plural(len(integers), 'node')} on integers",
                [Paragraph(", ".join(map(short, names)) + f"{more}.")],
            )
        )
    changes = run.report.inner("model").names("changes")
    if changes:
        rows, more = rows_within(
            [[Cell(str(index)), Cell(sentence(change))] for index, change in enumerate(changes, 1)]
        )
        blocks.append(Table(f"What was changed in the model before{more}", ("number", "change"), rows))
    return Section("quantized", "What is quantized, what not, and why", blocks)


def _grouped(nodes: Sequence[Facts]) -> list[Row]:
    """Float nodes by operator and reason, the most frequent first."""
    groups: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for node in nodes:
        groups[node.text("op_type") or NOTHING, node.text("reason") or NOTHING].append(node.text("node") or NOTHING)
    ordered = sorted(groups.items(), key=lambda item: -len(item[1]))
    return [
        [Cell(short(op)), number(str(len(names))), Cell(sentence(reason)), Cell(_listed(names))]
        for (op, reason), names in ordered
    ]


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - _FEW
    return ", ".join(map(short, names[:_FEW])) + (f" and {rest} more" if rest > 0 else "")


def _operators(plan: Facts) -> Block:
    """How many nodes of each operator run on integers, are fused into one that does, or stay float."""
    kinds = ("integer", "fused", "float")
    found = [(name, [counts.number(kind) or 0.0 for kind in kinds]) for name, counts in plan.inner("operators").parts()]
    if not found:
        return absent("Coverage by operator")
    rows: list[Row] = []
    for name, counts in sorted(found, key=lambda item: (-sum(item[1]), item[0])):
        covered = (counts[0] + counts[1]) / sum(counts) if sum(counts) else None
        rows.append([Cell(short(name)), *(number(whole(count)) for count in counts), number(percent(covered))])
    shown, more = rows_within(rows)
    return Table(f"Coverage by operator{more}", ("operator", *kinds, "on integers %"), shown)


def _untouched(run: Run) -> list[Block]:
    reasons: defaultdict[str, list[str]] = defaultdict(list)
    for name, reason in run.report.inner("training").inner("untouched").texts().items():
        reasons[reason].append(name)
    rows = [
        [Cell(sentence(reason)), number(str(len(names))), Cell(_listed(names))] for reason, names in reasons.items()
    ]
    shown, more = rows_within(rows)
    return [Table(f"What training left as it was{more}", ("reason", "weights", "which"), shown)] if rows else []


def _files(run: Run) -> Table:
    """How the written file of each scheme runs."""
    header = (
        *("scheme", "integer kernels", "all products on integers", "float nodes", "overflows"),
        *("codes compared", "off by 1 LSB", "LSB at most in the check"),
    )
    rows: list[Row] = []
    for name, scheme in run.schemes:
        check, emulator = scheme.inner("self_check"), scheme.inner("emulator")
        all_integer = check.flag("all_integer")
        overflows = emulator.inner("overflows").known_numbers()
        rows.append(
            [
                Cell(short(name)),
                number(whole(check.number("integer_kernels"))),
                Cell(NOTHING if all_integer is None else "yes" if all_integer else "no"),
                number(str(len(emulator.records("float_nodes")))),
                number(whole(sum(overflows.values()))),
                *(number(whole(check.number(key))) for key in ("codes", "one_lsb", "max_lsb")),
            ]
        )
    shown, more = rows_within(rows)
    return Table(f"How ONNX Runtime and the emulator run each file{more}", header, shown)


# --- back ends ------------------------------------------------------------------------------------------


def coverage_section(run: Run) -> Section:
    """Integer share of the multiply-accumulates on each back end, and what stays float there."""
    title = "Integer share on each back end"
    matrix = run.matrix
    names = [model.text("name") or "" for model in matrix.records("models")]
    results = {
        (cell.text("profile"), cell.text("column")): cell.inner("result")
        for cell in matrix.records("cells")
        if names and cell.text("model") == names[-1]
    }
    rows: list[Row] = []
    kept: defaultdict[tuple[str, str], dict[str, int]] = defaultdict(dict)
    for profile in matrix.records("profiles"):
        name = profile.text("name") or ""
        for column in profile.names("columns"):
            result = results.get((name, column))
            if not result:
                continue
            floats = result.records("float_nodes")
            figures = (percent(result.number("integer_macs")), whole(result.number("boundaries")), str(len(floats)))
            rows.append(
                [
                    Cell(short(name)),
                    Cell(short(column)),
                    *map(number, figures),
                    Cell(short(profile.text("evidence") or NOTHING)),
                ]
            )
            for node in floats:
                by_profile = kept[node.text("op_type") or NOTHING, node.text("reason") or NOTHING]
                by_profile[f"{short(name)} {short(column)}"] = by_profile.get(f"{short(name)} {short(column)}", 0) + 1
    if not rows:
        remedy = "'onnxqt verify' measures it into a matrix.json."
        return Section("coverage", title, (absent("The integer share on the back ends", remedy),))
    header = ("back end", "precision", "integer MACs %", "conversions", "float nodes", "evidence")
    shown, more = rows_within(rows)
    blocks: list[Block] = [
        Paragraph(
            f"Of {short(names[-1])}. MACs are multiply-accumulates; conversions are between floats and codes inside "
            "the model."
        ),
        Table(f"Integer share{more}", header, shown),
    ]
    if kept:
        reasons = sorted(kept.items(), key=lambda item: -len(item[1]))
        lines, more = rows_within(
            [
                [Cell(short(op)), Cell(sentence(reason)), number(_between(found.values())), Cell(_listed(list(found)))]
                for (op, reason), found in reasons
            ]
        )
        blocks.append(Table(f"What stays float there, and why{more}", ("operator", "reason", "nodes", "where"), lines))
    return Section("coverage", title, blocks)


def _between(counts: Collection[int]) -> str:
    low, high = min(counts), max(counts)
    return str(low) if low == high else f"{low} to {high}"
