"""The survey for people: lines and tables that fit a terminal."""

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from onnxqt.ops import Gradient
from onnxqt.survey import Survey
from onnxqt.survey.parts import Layer, Operator, Parameter
from onnxqt.survey.sizes import Value

ROWS = 20  # of a table that is not asked for in full
_LABEL = 12  # width of the words at the left
_GAP = 3  # between columns
_OPERATOR = 14  # most width of a layer's operator
_NAME = 22  # most width of an operator with its domain
_NODE = 24  # least width of a node's name, before other columns are left out
_ANONYMOUS = re.compile(r"unk__\d+")  # names that onnx gives to free dimensions
_GRADIENTS = {
    Gradient.NATIVE: "passes",
    Gradient.RULE: "passes",
    Gradient.NOT_NEEDED: "-",
    Gradient.STOPPED: "stops",
}

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table; the first row is its header, and no row is wider than the page."""

    title: str
    rows: Sequence[Row]


def headlines(found: Survey, name: str, width: int, everything: bool = False) -> Iterator[str]:
    """What matters most, one line each or a paragraph.

    Args:
        found: the survey.
        name: of the model's file.
        width: of the terminal, in characters.
        everything: leave nothing out.
    """
    opset = f"opset {found.original_opset}"
    if found.opset != found.original_opset:
        opset += f", read as {found.opset}"
    facts = [("model", f"{name}, {opset}, sha256 {found.sha256[:12]}")]
    facts += [("input", text) for text in _values(found.inputs, found.batch)]
    facts += [("output", text) for text in _values(found.outputs, found.batch)]
    facts += [("changes", change) for change in (found.changes if everything else _grouped(found.changes))]
    facts += [
        ("parameters", _parameters(found)),
        ("MACs", _macs(found)),
        ("quantized", _quantized(found)),
        ("training", _training(found)),
    ]
    facts += [("problems", f"- {problem.message}") for problem in found.problems] or [("problems", "none found")]
    before = ""
    for label, text in facts:
        yield _paragraph("" if label == before else label, text, width)
        before = label


def tables(found: Survey, width: int, everything: bool = False) -> Iterator[Table]:
    """The operators, the layers, and what stays float.

    Args:
        found: the survey.
        width: of the terminal, in characters.
        everything: all rows, and each float node by its name.
    """
    limit = None if everything else ROWS
    operators = found.operators[:limit]
    yield Table(
        _title("operators", len(operators), len(found.operators)),
        _aligned([("operator", "nodes", "integer", "fused", "float", "gradient"), *map(_operator, operators)], {0, 5}),
    )
    layers = _largest(found.layers, limit)
    yield Table(
        _title("layers", len(layers), len(found.layers), "those with most MACs"), _layers(layers, found.macs, width)
    )
    if everything:
        rows = [(node.name, node.op_type, node.reason) for node in found.plan.float_nodes]
        yield Table("float nodes", [("node", "operator", "reason"), *rows])
    else:
        yield Table("float nodes", [("nodes", "reason", "operators"), *_reasons(found)])
    kept = found.parameters_of("float")
    if everything:
        each = [(p.tensor, _shape(p.shape), amount(p.count), p.reason) for p in kept]
        yield Table("float parameters", _aligned([("tensor", "shape", "values", "reason"), *each], {0, 1, 3}))
    else:
        yield Table("float parameters", _aligned([("tensors", "values", "reason"), *_float_parameters(kept)], {2}))


def short(name: str, limit: int) -> str:
    """A name of at most `limit` characters; what is left out is in its middle."""
    if len(name) <= limit:
        return name
    head = (limit - 1) // 2
    return f"{name[:head]}…{name[len(name) - (limit - 1 - head) :]}"


def amount(count: int) -> str:
    """A count in at most 5 characters and a unit: 9,999 or 12.3 k."""
    if count < 10_000:
        return f"{count:,}"
    value = float(count)
    for unit in "kMGT":
        value /= 1000
        if value < 999.5 or unit == "T":
            break
    return f"{value:.{2 if value < 9.995 else 1 if value < 99.95 else 0}f} {unit}"


# --- lines ----------------------------------------------------------------------------------------------


def _paragraph(label: str, text: str, width: int) -> str:
    return textwrap.fill(
        text,
        max(width, 40),
        initial_indent=label.ljust(_LABEL),
        subsequent_indent=" " * _LABEL,
        break_on_hyphens=False,
    )


def _values(values: Sequence[Value], batch: int) -> Iterator[str]:
    names = max((len(value.name) for value in values), default=0)
    dtypes = max((len(value.dtype) for value in values), default=0)
    for value in values:
        yield f"{value.name:{names}}  {value.dtype:{dtypes}}  {_value_shape(value, batch)}".rstrip()


def _value_shape(value: Value, batch: int) -> str:
    if value.shape is None:
        return "of unknown rank"
    shape = "[" + ", ".join(_size(size) for size in value.shape) + "]"
    if value.batch_axis is None:
        return shape
    return f"{shape}, batch axis {value.batch_axis}" + (f" (always {batch})" if value.shape[0] == batch else "")


def _size(size: int | str | None) -> str:
    return "?" if size is None or (isinstance(size, str) and _ANONYMOUS.fullmatch(size)) else str(size)


def _grouped(changes: Iterable[str]) -> list[str]:
    """Changes of one kind as a single line with their number."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for change in changes:
        kinds[re.sub(r"\[[^]]*\]|\d+", "…", re.sub(r"'[^']*'", "'…'", change))].append(change)
    return [members[0] if len(members) == 1 else f"{len(members)} times: {members[0]}" for members in kinds.values()]


def _parameters(found: Survey) -> str:
    weights, biases, kept = (_total(found.parameters_of(kind)) for kind in ("weight", "bias", "float"))
    count = weights[0] + biases[0] + kept[0]
    size = weights[1] + biases[1] + kept[1]
    if not count:
        return "none"
    return (
        f"{count:,} ({_bytes(size)}): {weights[0]:,} in quantized weights ({_bytes(weights[0])} at 8 bits), "
        f"{biases[0]:,} in their biases (INT32), {kept[0]:,} stay float"
    )


def _total(parameters: Iterable[Parameter]) -> tuple[int, int]:
    each = list(parameters)
    return sum(parameter.count for parameter in each), sum(parameter.bytes for parameter in each)


def _bytes(size: int) -> str:
    return f"{amount(size)}{'' if amount(size)[-1].isalpha() else ' '}B"


def _macs(found: Survey) -> str:
    unknown = found.unknown_macs
    if not unknown:
        return f"{found.macs:,} per sample"
    reasons = Counter(layer.macs_reason for layer in found.layers if layer.macs is None)
    (reason, _), *_ = reasons.most_common(1)
    known = f"at least {found.macs:,} per sample; " if found.macs else ""
    return (
        f"{known}unknown for {len(unknown)} of {_plural(len(found.layers), 'layer')}, because {reason}"
        f"{'' if len(reasons) == 1 else ', or the like'}"
    )


def _quantized(found: Survey) -> str:
    plan = found.plan
    fused = sum(len(node.followers) for node in plan.integer_nodes)
    return (
        f"{_plural(len(plan.activations), 'activation')} and {_plural(len(plan.weights), 'weight')}; "
        f"{_plural(len(plan.integer_nodes), 'integer node')} with {fused} more fused into them, "
        f"{_plural(len(plan.float_nodes), 'float node')}"
    )


def _training(found: Survey) -> str:
    reach = found.reach
    total = len(reach.trained) + len(reach.untouched)
    if reach.reason is not None:
        return "moves nothing, see below"
    if not reach.untouched:
        return f"moves all {_plural(total, 'weight')} and biases"
    by_reason = Counter(reach.untouched.values()).most_common()
    told = "; ".join(f"{count} stay as they are: {reason}" for reason, count in by_reason[:3])
    more = f"; and {len(by_reason) - 3} more reasons" if len(by_reason) > 3 else ""
    return f"moves {len(reach.trained)} of {_plural(total, 'weight')} and biases; {told}{more}"


def _plural(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


# --- tables ---------------------------------------------------------------------------------------------


def _title(what: str, shown: int, total: int, which: str = "the first") -> str:
    return what if shown == total else f"{what}: {which}, {shown} of {total} (--all and --json have all)"


def _largest(layers: Sequence[Layer], limit: int | None) -> list[Layer]:
    """The largest layers, in the order of the graph."""
    order = sorted(range(len(layers)), key=lambda i: (-(layers[i].macs or 0), -layers[i].parameters))
    return [layers[i] for i in sorted(order[:limit])]


def _operator(operator: Operator) -> Row:
    name = short(f"{operator.domain}.{operator.op_type}" if operator.domain else operator.op_type, _NAME)
    gradient = _GRADIENTS[operator.gradient]
    if operator.stopped:
        some = "" if operator.stopped == operator.count else f" at {operator.stopped}"
        gradient = f"stops{some}: {operator.reason}" if operator.reason else f"stops{some}"
    if operator.trained:
        gradient = f"{operator.trained} trained" + (f"; {gradient}" if operator.stopped else "")
    counts = (operator.count, operator.integer, operator.fused, operator.float)
    return (name, *(str(count) if count else "-" for count in counts), gradient)


def _layers(layers: Sequence[Layer], total: int, width: int) -> list[Row]:
    """The rows of the layers, with as many columns as fit; `total` is the MACs of all layers."""
    columns: dict[str, tuple[Callable[[Layer], str], bool]] = {
        "operator": (lambda layer: short(layer.op_type, _OPERATOR), True),
        "output": (lambda layer: _shape(layer.output_shape), True),
        "weight": (lambda layer: _shape(layer.weight_shape) if layer.weight else "-", True),
        "parameters": (lambda layer: amount(layer.parameters) if layer.parameters else "-", False),
        "MACs": (lambda layer: "?" if layer.macs is None else amount(layer.macs) if layer.macs else "-", False),
        "share": (lambda layer: f"{100 * (layer.macs or 0) / total:.1f} %" if layer.macs else "-", False),
        "treatment": (_treatment, True),
    }
    longest = max((len(layer.node) for layer in layers), default=0)
    for optional in ("", "share", "output", "weight"):
        columns.pop(optional, None)
        rest = [(name, *(cell(layer) for layer in layers)) for name, (cell, _) in columns.items()]
        room = width - sum(_GAP + max(map(len, column)) for column in rest)
        if room >= min(longest, _NODE):
            break
    nodes = ("node", *(short(layer.node, max(room, 8)) for layer in layers))
    left = {0, *(i for i, (_, left) in enumerate(columns.values(), 1) if left)}
    return _aligned(list(zip(nodes, *rest, strict=True)), left)


def _treatment(layer: Layer) -> str:
    kind = "int" if layer.quantized else "float"
    return f"{kind}, trained" if layer.trained else kind


def _shape(shape: Sequence[int | None] | None) -> str:
    if shape is None:
        return "?"
    return "x".join("?" if size is None else str(size) for size in shape) or "scalar"


def _reasons(found: Survey) -> list[Row]:
    """Why nodes stay float: how many, and which operators."""
    by_reason: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for node in found.plan.float_nodes:
        by_reason[node.reason][node.op_type] += 1
    ordered = sorted(by_reason.items(), key=lambda item: -item[1].total())
    return [
        (str(counts.total()), reason, ", ".join(f"{op} {count}" for op, count in counts.most_common()))
        for reason, counts in ordered
    ]


def _float_parameters(parameters: Iterable[Parameter]) -> list[Row]:
    """Why parameters stay float, by the operator that reads them: how many, and how many values."""
    by_reason: defaultdict[str, list[int]] = defaultdict(list)
    for parameter in parameters:
        by_reason[re.sub(r" '[^']*'", "", parameter.reason)].append(parameter.count)
    ordered = sorted(by_reason.items(), key=lambda item: -sum(item[1]))
    return [(str(len(counts)), amount(sum(counts)), reason) for reason, counts in ordered]


def _aligned(rows: Sequence[Row], left: set[int]) -> list[Row]:
    """The cells of the columns that are not in `left` filled up on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [tuple(cell if i in left else cell.rjust(widths[i]) for i, cell in enumerate(row)) for row in rows]
