"""JSON that somebody else may have written: bounded, and checked field by field with one line for what is wrong."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqt.errors import ExportError, first_line

Json = dict[str, Any]

FILE_LIMIT = 128 << 20  # bytes of a file of text


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        ExportError: if it cannot be read, is too large, or is not UTF-8.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_LIMIT + 1)
        if len(raw) > FILE_LIMIT:
            raise ExportError(f"'{path}' is larger than {FILE_LIMIT >> 20} MiB: give a calibration table")
        return raw.decode()
    except OSError as error:
        raise ExportError(f"cannot read '{path}' ({error.strerror}): give a calibration table") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"'{path}' is not text: give a calibration table") from error


def parse_json(path: Path, text: str) -> Json:
    """The JSON object that a text holds; a name may stand in an object only once, and numbers are finite.

    Raises:
        ExportError: naming the file and what is wrong.
    """
    try:
        content = json.loads(text, object_pairs_hook=_object, parse_constant=_refuse)
    except RecursionError as error:
        raise ExportError(f"'{path}' nests too deep: give a calibration table") from error
    except ValueError as error:
        raise ExportError(f"'{path}' is not JSON ({first_line(error)}): give a calibration table") from error
    if not isinstance(content, dict):
        raise ExportError(f"'{path}' holds no JSON object: give a calibration table")
    return content


def _object(pairs: list[tuple[str, Any]]) -> Json:
    content: Json = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"'{key[:60]}' stands twice in one object")
        content[key] = value
    return content


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


@dataclass(frozen=True, slots=True)
class Part:
    """An object of a file, with the words that name it in messages.

    Attributes:
        where: "'table.json', tensor 'x'".
        content: the object.
    """

    where: str
    content: Mapping[str, Any]

    def wrong(self, problem: str) -> ExportError:
        """The error that says what is wrong in this object."""
        return ExportError(f"{self.where}: {problem}: correct the entry")

    def check(self, kinds: "Mapping[str, Kind]", needed: Iterable[str] = ()) -> None:
        """Make sure that it has no field but these, each of its kind, and has those that are needed.

        Raises:
            ExportError: naming the field.
        """
        for name in self.content:
            if name not in kinds:
                raise self.wrong(f"there is no field '{name[:60]}'")
            self.get(name, kinds[name])
        for name in needed:
            self.get(name, kinds[name])

    def get(self, name: str, kind: "Kind") -> Any:
        """A field of a kind, of an object that may have others.

        Raises:
            ExportError: naming the field.
        """
        if name not in self.content:
            raise self.wrong(f"'{name}' is missing")
        value = self.content[name]
        if not kind.fits(value):
            raise self.wrong(f"'{name}' must be {kind.text}, not {_shown(value)}")
        return value

    def inner(self, name: str) -> "Part":
        """An object inside of it; an empty one where it is absent or null."""
        return Part(f"{self.where}, {name}", self.content.get(name) or {})


@dataclass(frozen=True, slots=True)
class Kind:
    """What a field may hold, and the words for it."""

    text: str
    fits: Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a double can hold."""
    if isinstance(value, float):
        return math.isfinite(value)
    return _is_int(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


OBJECT = Kind("an object", lambda value: isinstance(value, dict))
OBJECTS = Kind("a list of objects", lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value))
TEXT = Kind("a text", _is_text)
NAME = Kind("a text that is not empty", lambda value: _is_text(value) and value != "")
NAMES = Kind("a list of texts", lambda value: isinstance(value, list) and all(_is_text(v) for v in value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
COUNT = Kind("a whole number of at least 0", lambda value: _is_int(value) and value >= 0)
INTEGER = Kind("a whole number", _is_int)
NUMBER = Kind("a finite number", is_number)
SHA256 = Kind("64 hexadecimal digits", lambda value: _is_text(value) and _is_hex(value, 64))


def optional(kind: Kind) -> Kind:
    """The same kind, or null."""
    return Kind(f"{kind.text} or null", lambda value: value is None or kind.fits(value))


def one_of(*values: str) -> Kind:
    """One of these texts."""
    return Kind(f"one of {', '.join(values)}", lambda value: _is_text(value) and value in values)


def mapping_of(kind: Kind) -> Kind:
    """An object whose values are all of a kind."""
    return Kind(
        f"an object, each value {kind.text}",
        lambda value: isinstance(value, dict) and all(kind.fits(v) for v in value.values()),
    )


def _is_hex(value: str, digits: int) -> bool:
    return len(value) == digits and set(value) <= set("0123456789abcdef")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
