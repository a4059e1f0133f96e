"""What a page is made of: report.json and, where they lie beside it, matrix.json, table.json and cost.json.

Whoever made these files, they are read with bounds, and checked field by field where they are used. A report that
cannot be used is an error; of the other files it is noted on the page why they are left out.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnxqt.errors import OnnxqtError, UsageError, first_line
from onnxqt.files import file_sha256
from onnxqt.html.text import short
from onnxqt.table import Table, read_table
from onnxqt.table.reading import FLAG, NAMES, NUMBER, OBJECT, OBJECTS, TEXT, Kind, is_number

MATRIX = "matrix.json"
TABLE = "table.json"
COST = "cost.json"
FILE_LIMIT = 64 << 20  # bytes of a JSON file

_SHOWN = 60  # characters of a name or value in a message
_VERSION = "1."  # of the forms that are read begin with it
_NUMBERS = Kind("a list of finite numbers", lambda value: isinstance(value, list) and all(map(is_number, value)))


@dataclass(frozen=True, slots=True)
class Facts:
    """An object of a JSON file. What it lacks, or has as null, is None or empty; what is of a wrong kind an error.

    Attributes:
        where: words that name it: "'report.json', training".
        content: the object.
    """

    where: str
    content: Mapping[str, Any]

    def __bool__(self) -> bool:
        return bool(self.content)

    def number(self, name: str) -> float | None:
        """A finite number."""
        found: float | None = self._get(name, NUMBER)
        return found

    def text(self, name: str) -> str | None:
        """A text."""
        found: str | None = self._get(name, TEXT)
        return found

    def flag(self, name: str) -> bool | None:
        """True or false."""
        found: bool | None = self._get(name, FLAG)
        return found

    def names(self, name: str) -> list[str]:
        """A list of texts."""
        found: list[str] = self._get(name, NAMES) or []
        return found

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers."""
        found: list[float] = self._get(name, _NUMBERS) or []
        return found

    def inner(self, name: str) -> "Facts":
        """An object inside."""
        return Facts(f"{self.where}, {short(name, _SHOWN)}", self._get(name, OBJECT) or {})

    def records(self, name: str) -> "list[Facts]":
        """The objects of a list."""
        found = self._get(name, OBJECTS) or []
        return [Facts(f"{self.where}, {name}[{index}]", content) for index, content in enumerate(found)]

    def parts(self) -> "Iterator[tuple[str, Facts]]":
        """The objects inside, by name."""
        for name in self.content:
            yield name, self.inner(name)

    def known_numbers(self) -> dict[str, float]:
        """The numbers inside, by name, without those that are null."""
        found = {name: self.number(name) for name in self.content}
        return {name: value for name, value in found.items() if value is not None}

    def texts(self) -> dict[str, str]:
        """The texts inside, by name."""
        found = {name: self.text(name) for name in self.content}
        return {name: value for name, value in found.items() if value is not None}

    def _get(self, name: str, kind: Kind) -> Any:
        value = self.content.get(name)
        if value is None or kind.fits(value):
            return value
        raise UsageError(
            f"{self.where}: '{short(name, _SHOWN)}' must be {kind.text}, not {short(repr(value), _SHOWN)}: give a file "
            "as onnxqt writes it"
        )


@dataclass(frozen=True, eq=False, slots=True)
class Run:
    """Everything that is known of a run.

    Attributes:
        report: what report.json holds.
        matrix: of the same model on back ends; empty if there is none.
        table: ranges, histograms and grids of its tensors; None if there is none.
        cost: of the same model on devices; empty if there is none.
        notes: why files beside the report are left out, or what to know of them.
    """

    report: Facts
    matrix: Facts
    table: Table | None
    cost: Facts
    notes: tuple[str, ...] = ()

    @property
    def schemes(self) -> list[tuple[str, Facts]]:
        """What the report says of each scheme."""
        return list(self.report.inner("schemes").parts())


def read_run(path: Path) -> Run:
    """Read a report, and what lies beside it.

    Args:
        path: the report.json of a run, or the directory of the run.

    Raises:
        UsageError: if it is no report of a run.
    """
    path = path / "report.json" if path.is_dir() else path
    report = _read(path, "the report.json of a run")
    for name in ("model", "schemes", "float"):
        if not report.inner(name):
            raise UsageError(f"{report.where} has no '{name}', so it is no report: give the report.json of a run")
    notes: list[str] = []
    matrix = _beside(path, MATRIX, notes)
    if matrix:
        matrix = _matrix_of(report, matrix, notes)
    cost = _beside(path, COST, notes)
    if cost and cost.inner("model").text("sha256") not in _models(report):
        notes.append(f"{COST} is left out: it is about another model.")
        cost = Facts(cost.where, {})
    return Run(report, matrix, _table(path, report, notes), cost, tuple(notes))


def _read(path: Path, wanted: str) -> Facts:
    """A JSON object.

    Raises:
        UsageError: if there is none, or it is of another version.
    """
    remedy = f"give {wanted}"
    try:
        with path.open("rb") as file:
            raw = file.read(FILE_LIMIT + 1)
        if len(raw) > FILE_LIMIT:
            raise UsageError(f"'{path}' is larger than {FILE_LIMIT >> 20} MiB: {remedy}")
        content = json.loads(raw, parse_constant=_refuse)
    except OSError as error:
        raise UsageError(f"cannot read '{path}' ({error.strerror}): {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"'{path}' is not JSON ({first_line(error)}): {remedy}") from error
    if not isinstance(content, dict):
        raise UsageError(f"'{path}' holds no JSON object: {remedy}")
    facts = Facts(f"'{path.name}'", content)
    version = facts.text("schema_version")
    if version is None or not version.startswith(_VERSION):
        raise UsageError(f"'{path}' has the version {short(str(version), 20)}, not {_VERSION}x: {remedy}")
    return facts


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _beside(path: Path, name: str, notes: list[str]) -> Facts:
    """The JSON file of that name beside the report; empty, with a note, if it cannot be read."""
    file = path.with_name(name)
    if file.is_file():
        try:
            return _read(file, f"the {name} of a run")
        except UsageError as error:
            notes.append(f"{name} is left out: {_without_folder(error, file)}.")
    return Facts(f"'{name}'", {})


def _models(report: Facts) -> Sequence[str]:
    """Hashes of the original model and of the checkpoint."""
    found = (report.inner("model").text("sha256"), report.inner("files").text("checkpoint.onnx"))
    return [digest for digest in found if digest]


def _matrix_of(report: Facts, matrix: Facts, notes: list[str]) -> Facts:
    """The matrix if it begins with the report's model."""
    own, digests = _models(report), [model.text("sha256") for model in matrix.records("models")]
    if not digests or digests[0] != report.inner("model").text("sha256"):
        notes.append(f"{MATRIX} is left out: its first model is not the original model of this run.")
        return Facts(matrix.where, {})
    for model, digest in list(zip(matrix.records("models"), digests, strict=True))[1:]:
        if digest not in own:
            notes.append(f"{MATRIX}: '{short(model.text('name') or '')}' is not the checkpoint of this run.")
    return matrix


def _table(path: Path, report: Facts, notes: list[str]) -> Table | None:
    """The table beside the report; None, with a note, if it cannot be read."""
    file = path.with_name(TABLE)
    if not file.is_file():
        return None
    try:
        table = read_table(file)
        digest = report.inner("files").text(TABLE)
        if digest and file_sha256(file) != digest:
            notes.append(f"{TABLE} is not as this run wrote it: it was edited since, or is of another run.")
        return table
    except (OnnxqtError, OSError) as error:
        notes.append(f"{TABLE} is left out: {_without_folder(error, file)}.")
        return None


def _without_folder(error: BaseException, file: Path) -> str:
    """What an error says of a file, which the page, unlike a terminal, names without its folder."""
    return first_line(error).replace(f"{file.parent}{os.sep}", "")
