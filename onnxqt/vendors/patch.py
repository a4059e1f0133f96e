"""Templates: files that a vendor's tool made, in which only some values are replaced."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxqt.errors import ExportError, UsageError
from onnxqt.vendors.form import Request
from onnxqt.vendors.lost import named

_LARGEST = 16 << 20  # bytes of a template


@dataclass(frozen=True, slots=True)
class Edit:
    """The text that comes in place of `[start, end)`, in characters."""

    start: int
    end: int
    text: str


def edited(text: str, edits: Sequence[Edit]) -> str:
    """`text` with all edits made; what lies between them stays as it is.

    Raises:
        ValueError: if edits overlap or reach beyond the text.
    """
    parts, position = [], 0
    for edit in sorted(edits, key=lambda edit: edit.start):
        if not position <= edit.start <= edit.end <= len(text):
            raise ValueError(f"edit [{edit.start}, {edit.end}) overlaps another or lies outside the text")
        parts += [text[position : edit.start], edit.text]
        position = edit.end
    return "".join([*parts, text[position:]])


def template_text(request: Request, tool: str) -> str:
    """The template of a request as text; encoded again it gives the same bytes.

    Args:
        request: with a template.
        tool: what makes it, to be named where there is none.

    Raises:
        UsageError: if there is no template.
        ExportError: if it is too large or not UTF-8.
    """
    if request.template is None:
        raise UsageError(f"this format patches a file that {tool} writes: give it as the template")
    if len(request.template) > _LARGEST:
        raise ExportError(f"the template is larger than {_LARGEST >> 20} MiB: give the file that {tool} wrote")
    try:
        return request.template.decode()
    except UnicodeDecodeError as error:
        raise ExportError(f"the template is not UTF-8 text: give the file that {tool} wrote") from error


def template_json(request: Request, tool: str) -> dict[str, Any]:
    """The template of a request as a JSON object.

    Raises:
        UsageError: if there is no template.
        ExportError: if it is too large, not JSON, or no object.
    """
    text = template_text(request, tool)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ExportError(f"the template is not JSON: give the file that {tool} wrote") from error
    if not isinstance(content, dict):
        raise ExportError(f"the template is not a JSON object: give the file that {tool} wrote")
    return content


def check_matches(matched: Sequence[str], entries: Sequence[str], vendor: str) -> None:
    """Make sure that a template has something that the table knows.

    Raises:
        ExportError: if nothing matched.
    """
    if not matched:
        raise ExportError(
            f"the table has none of the names of the template ({named(entries) or 'it has none'}): give the template "
            f"of this model, or aliases for '{vendor}' in the table"
        )


def kept(entries: Sequence[str], matched: Sequence[str]) -> tuple[str, ...]:
    """What to say of the entries of a template that were not recognised; nothing where all were."""
    known = set(matched)
    others = [name for name in entries if name not in known]
    return (f"not in the table, so as the template has it: {named(others)}",) if others else ()
