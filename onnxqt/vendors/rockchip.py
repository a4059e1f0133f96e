"""Rockchip: the `.quantization.cfg` of hybrid quantization, in which a user may edit ranges.

From Rockchip's public documents: step 1 writes the file, with an entry per tensor under `quantize_parameters`; step 2
reads it again after the user has edited `custom_quantize_layers` and the `min` and `max` of tensors, from which scale
and zero point follow. Only these two lists of numbers change here, in entries that the table knows; all other bytes
stay as they are. No software of Rockchip is needed, or was used, for this.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxqt.errors import ExportError
from onnxqt.numerics import QParams
from onnxqt.table.form import Entry
from onnxqt.vendors.form import Request, Vendor, Written
from onnxqt.vendors.layers import left_out, part_of
from onnxqt.vendors.lost import activations, float_tensors, named, where
from onnxqt.vendors.names import names_of
from onnxqt.vendors.patch import Edit, check_matches, edited, kept, template_text
from onnxqt.vendors.ranges import ACTIVATIONS, magnitude
from onnxqt.vendors.text import decimal
from onnxqt.vendors.wide import wide_ends

ALIAS = "rockchip"

_SECTION = "quantize_parameters"
_ITEM = re.compile(r" *- +(?P<value>[^\s#]+)\s*(?:#.*)?$")
_NUMBER = re.compile(r"[^\s,\[\]#]+")
_COMMENT = re.compile(r"(?:^|\s)#.*")


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the numbers of a list stand in the text."""

    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class _Key:
    """A line of a mapping: its indentation, the key without quotes, what is behind the colon, and where that begins."""

    indent: int
    name: str
    value: str
    start: int


@dataclass(frozen=True, slots=True)
class Parameters:
    """One entry of `quantize_parameters`.

    Attributes:
        name: of the tensor.
        min: where its lower ends stand.
        max: where its upper ends stand.
        dtype: as the file has it; empty where it has none.
    """

    name: str
    min: Numbers
    max: Numbers
    dtype: str


def write_config(request: Request) -> Written:
    """`<stem>.quantization.cfg`: the template with the ranges of the table.

    Raises:
        UsageError: without a template.
        ExportError: if the template has no such entries, or none of the table's tensors.
    """
    table, scheme = request.table, request.scheme
    text = template_text(request, "hybrid_quantization_step1")
    found = list(parameters(text))
    names = [entry.name for entry in found]
    tensors = [*activations(table), *(entry for entry in table.entries if entry.role == "weight")]
    by_name = {name: tensor for tensor, name in names_of(tensors, ALIAS).items()}
    edits: list[Edit] = []
    inside: set[str] = set()
    odd, other = [], []
    for place in found:
        entry = table.entry(by_name.get(place.name, ""))
        params = entry.params(scheme) if entry else None
        if entry is None or params is None:
            continue
        low, high = _ends(entry, params, len(place.min.spans))
        if not len(low) == len(high) == len(place.min.spans) == len(place.max.spans):
            odd.append(place.name)
            continue
        edits += [Edit(*span, value) for span, value in zip(place.min.spans, low, strict=True)]
        edits += [Edit(*span, value) for span, value in zip(place.max.spans, high, strict=True)]
        inside.add(entry.name)
        other += [place.name] if place.dtype not in ("int8", "") else []
    matched = [place.name for place in found if by_name.get(place.name) in inside]
    check_matches(matched, names, ALIAS)
    lost = [*kept([name for name in names if name not in odd], matched)]
    if odd:
        lost.append(f"as the template has it, since it has other numbers of ranges than the table: {named(odd)}")
    if other:
        lost.append(f"ranges of what the template does not keep in int8 have no effect: {named(other)}")
    used = part_of(table, inside)
    wide = "the toolkit's codes have 8 bits: {} keep their ranges with other steps"
    lost += where(used, scheme, ACTIVATIONS, lambda params: params.grid.bits != 8, wide)
    absent = part_of(table, {entry.name for entry in table.entries} - inside)
    weights = "scales of weights are not in the file: those of {} follow from the values of the baked model"
    lost += where(absent, scheme, ["weight"], lambda params: True, weights)
    skipped = {**float_tensors(table, scheme), **left_out(table, scheme, inside, "the template has no range for it")}
    return Written({f"{request.stem}.quantization.cfg": edited(text, edits).encode()}, tuple(lost), skipped)


def _ends(entry: Entry, params: QParams, places: int) -> tuple[list[str], list[str]]:
    """The lower and the upper ends as text, one for each scale; that of a whole weight for each place."""
    if entry.role != "weight":
        low, high = wide_ends(params)
        return [decimal(low)], [decimal(high)]
    wide = np.ravel(magnitude(params))
    wide = np.repeat(wide, places) if wide.size == 1 else wide
    return [decimal(-value) for value in wide], [decimal(value) for value in wide]


def parameters(text: str) -> Iterator[Parameters]:
    """The entries of a configuration that have a `min` and a `max`, in order.

    It reads mappings by indentation, with lists of numbers in brackets or one number a line: what YAML writers make
    of such a file. Anything else in it is not looked at.

    Raises:
        ExportError: if there is no section of parameters.
    """
    lines = _lines(text)
    start = next((i for i, (_, line) in enumerate(lines) if line.rstrip() == f"{_SECTION}:"), None)
    if start is None:
        raise ExportError(f"the template has no '{_SECTION}:': give the file that hybrid_quantization_step1 wrote")
    section = []
    for offset, line in lines[start + 1 :]:
        if line.strip() and not line.lstrip().startswith("#") and not line[0].isspace():
            break
        section.append((offset, line))
    keys = [(i, key) for i, (_, line) in enumerate(section) if (key := _key(line))]
    outer = min((key.indent for _, key in keys), default=0)
    starts = [(i, key) for i, key in keys if key.indent == outer]
    for number, (i, key) in enumerate(starts):
        end = starts[number + 1][0] if number + 1 < len(starts) else len(section)
        fields = _fields(section[i + 1 : end])
        if "min" in fields and "max" in fields:
            dtype = fields.get("dtype", (Numbers(()), ""))[1]
            yield Parameters(key.name, fields["min"][0], fields["max"][0], dtype)


def _fields(lines: Sequence[tuple[int, str]]) -> dict[str, tuple[Numbers, str]]:
    """By the name of a field, where its numbers stand, and the text behind its colon."""
    found: dict[str, tuple[Numbers, str]] = {}
    spans: list[tuple[int, int]] = []
    current, value = "", ""
    for offset, line in [*lines, (0, "end:")]:
        item = _ITEM.match(line)
        if item:
            spans.append((offset + item.start("value"), offset + item.end("value")))
            continue
        key = _key(line)
        if key is None:
            if current:  # a list in brackets that goes on
                spans += _spans(line, offset)
            continue
        if current:
            found[current] = Numbers(tuple(spans)), value
        current, value = key.name, _COMMENT.sub("", key.value).strip()
        spans = _spans(key.value, offset + key.start)
    return found


def _spans(text: str, offset: int) -> list[tuple[int, int]]:
    """Where the words of a list stand, without a comment behind it."""
    return [(offset + word.start(), offset + word.end()) for word in _NUMBER.finditer(_COMMENT.sub("", text))]


def _lines(text: str) -> list[tuple[int, str]]:
    """Each line with the position where it begins."""
    found, position = [], 0
    for line in text.splitlines(keepends=True):
        found.append((position, line))
        position += len(line)
    return found


def _key(line: str) -> _Key | None:
    """A line that begins with a key; None for items, comments, and what goes on from the line before.

    A key ends at the first colon with a blank or nothing behind it, so it may hold others: `onnx::Conv_1`.
    """
    body = line.strip(" \t\r\n")
    indent = line.find(body)
    if not body or body[0] == "#" or body.startswith("- "):
        return None
    if body[0] in "'\"":
        close = body.replace("''", "__").find(body[0], 1) if body[0] == "'" else body.find('"', 1)
        name, end = body[1:close].replace("''", "'"), close + 1
        if close < 0 or body[end : end + 1] != ":":
            return None
    else:
        end = body.find(": ") if ": " in body else len(body) - 1
        name = body[:end].rstrip()
        if body[end] != ":":
            return None
    value = body[end + 1 :].lstrip()
    return _Key(indent, name, value, indent + len(body) - len(value))


FORMATS = (
    Vendor(
        "rockchip",
        "Rockchip RKNN-Toolkit2, hybrid quantization",
        write_config,
        baked=True,
        patches=True,
        usage="hybrid_quantization_step1 on BAKED writes the file to be patched; then hybrid_quantization_step2 with "
        "STEM.quantization.cfg",
    ),
)
