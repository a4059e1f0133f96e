"""Tables of numbers as text: `.csv` and `.tsv` files, one sample per line."""

import csv
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from onnxqt.data.content import Access, Stored, Take, Update, reading
from onnxqt.data.form import LABELS, Arrays, Index, InputSpec, is_label, listed, shown_shape
from onnxqt.data.numpy_files import digest_file
from onnxqt.errors import DataError

SUFFIXES = (".csv", ".tsv")
LINE_LIMIT = 16 << 20  # bytes of one line

_DELIMITERS = (",", ";", "\t")
_BLOCK = 256  # lines between two of which it is known where they begin
_LABEL_NAMES = ("label", LABELS)
_NUMBERED = re.compile(r"[._](\d{1,9})|\[(\d{1,9})\]")  # what follows the name of an array of several columns


@dataclass(frozen=True, slots=True)
class _Columns:
    """The columns of one array, and how their text is read: "i" or "f"."""

    places: tuple[int, ...]
    kind: str


@dataclass(frozen=True, eq=False, slots=True)
class TextContent:
    """A table; its lines are parsed when they are asked for.

    Attributes:
        name: the file.
        path: the same.
        delimiter: between the fields of a line.
        header: names of the columns; numbers where the file has no header.
        named: whether the first line is a header.
        columns: of each array.
        arrays: their shapes.
        blocks: the byte at which every line number 0, 256, 512 ... of the samples begins.
        access: see `Content`.
    """

    name: str
    path: Path
    delimiter: str
    header: tuple[str, ...]
    named: bool
    columns: Mapping[str, _Columns]
    arrays: Mapping[str, Stored]
    blocks: Sequence[int]
    access: Access = "seek"

    @contextmanager
    def open(self, names: Sequence[str]) -> Iterator[Take]:
        """See `Content.open`."""
        with self.path.open("rb") as stream:
            yield lambda rows: self._take(stream, rows, names)

    def _take(self, stream: IO[bytes], rows: Index, names: Sequence[str]) -> Arrays:
        chosen = {name: self.columns[name] for name in names}
        values = {name: np.empty((len(rows), len(c.places)), c.kind + "8") for name, c in chosen.items()}
        with reading(self.name, csv.Error):
            for place, (row, line) in enumerate(self._lines(stream, rows)):
                fields = _fields(line.decode(), self.delimiter)
                for name, columns in chosen.items():
                    values[name][place] = [self._number(fields, column, row, columns.kind) for column in columns.places]
        return {name: array.reshape(-1, *self.arrays[name].shape[1:]) for name, array in values.items()}

    def _lines(self, stream: IO[bytes], rows: Index) -> Iterator[tuple[int, bytes]]:
        position = -1  # the row at which the stream is, -1 for unknown
        for row in rows.tolist():
            if not 0 <= position <= row or row // _BLOCK > position // _BLOCK:
                position = row // _BLOCK * _BLOCK
                stream.seek(self.blocks[row // _BLOCK])
            line = b""
            while position <= row:
                line = _line(stream)
                position += 1
            if not line:
                raise EOFError("it ends early")
            yield row, line

    def _number(self, fields: Sequence[str], place: int, row: int, kind: str) -> float | int:
        try:
            return _parse(kind, fields[place])
        except ValueError as error:
            number = row + 1 + self.named
            what = "number" if kind == "f" else "whole number"
            raise DataError(
                f"{self.name}: line {number}, column {self.header[place]!r} is {fields[place][:40]!r}, which is no "
                f"{what}; correct or remove it"
            ) from error

    def digest(self, update: Update) -> None:
        """Hash name, size and bytes of the file."""
        digest_file(self.path, self.path.name, update)


def open_table(path: Path, specs: Sequence[InputSpec]) -> TextContent:
    """Read a table once: find its header, count its lines, and see which columns feed which input.

    An input of one value per sample takes the column of its name, one of more the columns NAME.0, NAME.1 ... (also
    NAME_0 and NAME[0]). A model with one input takes all columns in order if none has its name. Labels are in a column
    `label` or `labels`, those of another output in `labels:OUTPUT`. A first line of numbers alone is no header.

    Raises:
        DataError: naming the file and the line, or the columns and what the model wants.
    """
    name = str(path)
    with reading(name, csv.Error), path.open("rb") as stream:
        head = _line(stream)
        text = head.decode("utf-8-sig")
        delimiter = max(_DELIMITERS, key=text.count)
        header = tuple(field.strip() for field in _fields(text, delimiter))
        named = not all(_parses("f", field) for field in header)
        if not named:
            header = tuple(str(number) for number in range(len(header)))
            stream.seek(3 if head.startswith(b"\xef\xbb\xbf") else 0)
        places = _places(name, header, specs, named)
        labels = [place for key, found in places.items() if is_label(key) for place in found]
        blocks, count, whole = _scan(stream, delimiter, len(header), labels, 1 + named)
    if not count:
        raise DataError(f"{name} has no samples; write one per line below the header")
    columns, arrays = {}, {}
    for key, found in places.items():
        spec = next((spec for spec in specs if spec.name == key), None)
        if spec is None:
            kind = "i" if whole.issuperset(found) else "f"
            columns[key] = _Columns(found, kind)
            arrays[key] = Stored((count, len(found)) if len(found) > 1 else (count,), np.dtype(kind + "8"))
        else:
            shape = _shape(name, [header[place] for place in found], spec)
            columns[key] = _Columns(found, "i" if spec.dtype.kind in "iub" else "f")
            dtype = spec.dtype if spec.dtype.kind in "iubf" else np.dtype("f8")
            arrays[key] = Stored((count, *shape), dtype)
    return TextContent(name, path, delimiter, header, named, columns, arrays, blocks)


def _places(name: str, header: Sequence[str], specs: Sequence[InputSpec], named: bool) -> dict[str, tuple[int, ...]]:
    """The columns of each array."""
    column, times = Counter(header).most_common(1)[0]
    if times > 1 or "" in header:
        raise DataError(
            f"{name} has {f'the column {column!r} twice' if times > 1 else 'a column without a name'}; name it"
        )
    inputs = [spec.name for spec in specs]
    owners = [_owner(column, inputs) if named else None for column in header]
    found: dict[str, list[tuple[int, int]]] = {}
    for place, owner in enumerate(owners):
        if owner:
            found.setdefault(owner[0], []).append((owner[1], place))
    spare = [place for place, owner in enumerate(owners) if not owner]
    if spare and len(inputs) == 1 and inputs[0] not in found:
        found[inputs[0]] = list(enumerate(spare))
        spare = []
    missing = [name for name in inputs if name not in found]
    if missing or spare:
        what = (
            f"has no column for the model's input {missing[0]!r}"
            if missing
            else f"has a column {header[spare[0]]!r}, which is no input of the model"
        )
        wants = [f"{spec.name!r} {shown_shape(spec)}" for spec in specs]
        raise DataError(
            f"{name} {what}: it has {listed([repr(column) for column in header])}, the model wants {listed(wants)}; "
            "name columns as the inputs, NAME.0, NAME.1 ... for several of one input"
        )
    for key, columns in found.items():
        numbers = sorted(number for number, _ in columns)
        if numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1)), [_WHOLE]):
            raise DataError(
                f"{name}: the columns of {key!r} are {listed([repr(header[place]) for _, place in columns])}; "
                "number them from 0 without gaps"
            )
    return {key: tuple(place for _, place in sorted(columns)) for key, columns in found.items()}


_WHOLE = -1  # number of a column that is an array by itself


def _owner(column: str, inputs: Sequence[str]) -> tuple[str, int] | None:
    """The array that a column belongs to, and its number in it."""
    if column in inputs:
        return column, _WHOLE
    if column in _LABEL_NAMES:
        return LABELS, _WHOLE
    for name in inputs:
        match = _NUMBERED.fullmatch(column, len(name)) if column.startswith(name) else None
        if match:
            return name, int(match[1] or match[2])
    if is_label(column):
        return column, _WHOLE
    return None


def _scan(
    stream: IO[bytes], delimiter: str, width: int, labels: Sequence[int], number: int
) -> tuple[list[int], int, set[int]]:
    """Where each block of lines begins, how many there are, and which columns of labels are whole numbers.

    Args:
        stream: at the first line of samples.
        delimiter: between fields.
        width: fields of every line.
        labels: columns of labels.
        number: of the first line, for messages.
    """
    blocks: list[int] = []
    count, ended, whole = 0, False, set(labels)
    while True:
        start = stream.tell()
        line = _line(stream)
        if not line:
            return blocks, count, whole
        if not line.strip(b"\r\n"):
            ended = True
            continue
        fields = _fields(line.decode(), delimiter)
        if ended:
            raise ValueError(f"line {number + count} is empty")
        if len(fields) != width:
            raise ValueError(f"line {number + count} has {len(fields)} fields, the first line has {width}")
        whole = {place for place in whole if _parses("i", fields[place])}
        if count % _BLOCK == 0:
            blocks.append(start)
        count += 1


def _shape(name: str, columns: Sequence[str], spec: InputSpec) -> tuple[int, ...]:
    """The shape of a sample that is made of some columns."""
    free = [axis for axis, size in enumerate(spec.shape[1:]) if size is None]
    known = math.prod(size for size in spec.shape[1:] if size is not None)
    shown = listed([repr(column) for column in columns])
    size, rest = divmod(len(columns), known) if known else (0, 1)
    if rest or len(free) > 1 or (not free and size != 1):
        raise DataError(
            f"{name} has {len(columns)} column(s) for the model's input {spec.name!r}: {shown}; "
            f"the model wants {spec.dtype} {shown_shape(spec)}; give one column per value"
        )
    return tuple(size if have is None else have for have in spec.shape[1:])


def _line(stream: IO[bytes]) -> bytes:
    line = stream.readline(LINE_LIMIT + 1)
    if len(line) > LINE_LIMIT:
        raise ValueError(f"a line has more than {LINE_LIMIT} bytes")
    return line


def _fields(text: str, delimiter: str) -> list[str]:
    text = text.rstrip("\r\n")
    return next(csv.reader([text], delimiter=delimiter, strict=True)) if '"' in text else text.split(delimiter)


def _parse(kind: str, field: str) -> float | int:
    """A number; raises ValueError where Python's own rules take what no other program does."""
    if "_" in field:
        raise ValueError("underscores")
    if kind == "f":
        return float(field)
    value = int(field)
    if not -(1 << 63) <= value < 1 << 63:
        raise ValueError("more than 64 bits")
    return value


def _parses(kind: str, field: str) -> bool:
    try:
        _parse(kind, field)
    except ValueError:
        return False
    return True
