r"""Protocol buffers as text: where each value of a message stands, and how a string is written.

The grammar is that of the specification "Text Format Language" (protobuf.dev/reference/protobuf/textformat-spec), as
far as messages of numbers, words and strings need it: no extensions, no `Any`, strings of one piece.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from onnxqt.errors import ExportError

_DEEPEST = 16
_TOKEN = re.compile(
    r"""
    (?P<blank>(?:\s|\#[^\n]*)+)
    |(?P<word>[A-Za-z_][A-Za-z0-9_]*)
    |(?P<number>[-+]?(?:\d|\.\d)[A-Za-z0-9_.+-]*|-[A-Za-z]+)
    |(?P<string>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')
    |(?P<mark>[{}<>\[\]:,;])
    """,
    re.VERBOSE,
)
_ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|x([0-9A-Fa-f]{1,2})|(.))")
_CLOSES = {"{": "}", "<": ">"}
_LETTERS = {"n": "\n", "t": "\t", "r": "\r"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a message.

    Attributes:
        name: of the field.
        start: of its value in the text.
        end: behind its value.
        text: the value as it is written; empty for a message.
        fields: those of the message, if it is one.
        message: whether it is one.
    """

    name: str
    start: int
    end: int
    text: str = ""
    fields: tuple["Field", ...] = ()
    message: bool = False

    def all(self, name: str) -> list["Field"]:
        """Its fields of a name, in order."""
        return [field for field in self.fields if field.name == name]

    def value(self, name: str) -> str | None:
        """The last scalar of a name as text, a string without its quotes; None if it has none."""
        found = [field.text for field in self.all(name) if not field.message]
        return unquoted(found[-1]) if found else None


@dataclass(frozen=True, slots=True)
class _Token:
    kind: str
    text: str
    start: int


def parse(text: str) -> Field:
    """A message as a tree with positions; its own name is empty.

    Raises:
        ExportError: if the text is no message; naming the line.
    """
    tokens = list(_tokens(text))
    fields, rest = _fields(text, tokens, 0, "", 0)
    if rest < len(tokens):
        raise _unexpected(text, tokens, rest)
    return Field("", 0, len(text), fields=fields, message=True)


def quoted(value: str) -> str:
    """A string as the text format has it, in double quotes."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def unquoted(text: str) -> str:
    """What a string of the text format says; other values as they are."""
    if text[:1] not in ("'", '"'):
        return text
    parts, position, body = [], 0, text[1:-1]
    for match in _ESCAPE.finditer(body):
        octal, hexadecimal, letter = match.groups()
        code = int(octal, 8) & 255 if octal else int(hexadecimal, 16) if hexadecimal else None
        escaped = bytes([code]) if code is not None else _LETTERS.get(letter, letter).encode()
        parts += [body[position : match.start()].encode(), escaped]
        position = match.end()
    return b"".join([*parts, body[position:].encode()]).decode(errors="replace")


def _tokens(text: str) -> Iterator[_Token]:
    position = 0
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise _error(text, position)
        if match.lastgroup and match.lastgroup != "blank":
            yield _Token(match.lastgroup, match.group(), position)
        position = match.end()


def _fields(text: str, tokens: list[_Token], at: int, closing: str, depth: int) -> tuple[tuple[Field, ...], int]:
    """The fields up to a closing mark, and the token that it is."""
    if depth > _DEEPEST:
        raise ExportError(
            f"line {_line(text, tokens[at - 1].start)} of the template nests more than {_DEEPEST} messages"
        )
    fields: list[Field] = []
    while at < len(tokens) and tokens[at].text != closing:
        if tokens[at].text in (",", ";") and fields:
            at += 1
            continue
        if tokens[at].kind != "word":
            raise _unexpected(text, tokens, at)
        name, at = tokens[at].text, at + 1
        colon = at < len(tokens) and tokens[at].text == ":"
        at += int(colon)
        found, at = _values(text, tokens, at, (name, colon), depth)
        fields += found
    return tuple(fields), at


def _values(text: str, tokens: list[_Token], at: int, field: tuple[str, bool], depth: int) -> tuple[list[Field], int]:
    """The value behind a field's name, or the values of a list in brackets, and the token behind them."""
    if at < len(tokens) and tokens[at].text == "[" and field[1]:
        found: list[Field] = []
        at += 1
        while at < len(tokens) and tokens[at].text != "]":
            if tokens[at].text == "," and found:
                at += 1
                continue
            value, at = _value(text, tokens, at, field, depth)
            found.append(value)
        if at == len(tokens):
            raise _unexpected(text, tokens, at)
        return found, at + 1
    value, at = _value(text, tokens, at, field, depth)
    return [value], at


def _value(text: str, tokens: list[_Token], at: int, field: tuple[str, bool], depth: int) -> tuple[Field, int]:
    name, colon = field
    token = tokens[at] if at < len(tokens) else None
    if token and token.text in _CLOSES:
        closing = _CLOSES[token.text]
        inner, end = _fields(text, tokens, at + 1, closing, depth + 1)
        if end == len(tokens):
            raise _unexpected(text, tokens, end)
        return Field(name, token.start, tokens[end].start + 1, "", inner, message=True), end + 1
    if token and colon and token.kind != "mark":
        return Field(name, token.start, token.start + len(token.text), token.text), at + 1
    raise _unexpected(text, tokens, at)


def _unexpected(text: str, tokens: list[_Token], at: int) -> ExportError:
    return _error(text, tokens[at].start if at < len(tokens) else len(text))


def _error(text: str, position: int) -> ExportError:
    near = text[position : position + 12].split("\n")[0]
    what = f"near '{near}'" if near else "as it ends too early"
    return ExportError(f"line {_line(text, position)} of the template is not protobuf text, {what}: correct it")


def _line(text: str, position: int) -> int:
    return text.count("\n", 0, position) + 1
