"""All cells, and the file that holds them: a run goes on from the cells that are done."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from onnxqt.evaluate import Reference, evaluate
from onnxqt.files import write_json
from onnxqt.matrix.bench import Bench, outcome
from onnxqt.matrix.cells import Cell, Matrix
from onnxqt.matrix.task import Column, Subject, Task
from onnxqt.report import environment

Advance = Callable[[int, str], None]


def make_matrix(task: Task, path: Path, advance: Advance = lambda done, note: None) -> Matrix:
    """Compute every cell that `path` does not hold already, and write each there as soon as it is done.

    Args:
        task: what to compute; `Task.check` passed.
        path: the JSON file, the same for the same inputs; what it holds of another task is dropped.
        advance: called with the number of cells done and what is going on.
    """
    advance(0, "float models")
    original = task.subjects[0]
    reference = Reference(original.model, lambda: task.batches(task.evaluation))
    benches = [Bench(task, subject, reference) for subject in task.subjects]
    floats = {bench.subject.name: outcome(evaluate(bench.float_run, reference)) for bench in benches}
    inputs = [_code_digest(), environment(), _identity(original), task.data]
    earlier = _earlier(path)
    cells: list[Cell] = []
    for profile, column in task.columns:
        for bench in benches:
            key = _digest(
                [*inputs, _identity(bench.subject), asdict(profile.policy), asdict(profile.arithmetic)], column
            )
            name, done = f"{profile.name} {column} {bench.subject.name}", len(cells)
            advance(done, name)
            if key in earlier:
                found = replace(earlier[key], model=bench.subject.name, profile=profile.name, column=str(column))
            else:
                found = bench.cell(profile, column, key, functools.partial(_tell, advance, done, name))
            cells.append(found)
            write_json(path, Matrix(task, floats, tuple(cells)).as_json())
    advance(len(cells), "")
    return Matrix(task, floats, tuple(cells))


def _tell(advance: Advance, done: int, name: str, samples: int) -> None:
    advance(done, f"{name} {samples}")


def _earlier(path: Path) -> dict[str, Cell]:
    """The cells of a file that did not fail, by key; none where there is no file, or it is none of ours."""
    try:
        cells = [Cell(**cell) for cell in json.loads(path.read_bytes())["cells"]]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}
    return {cell.key: cell for cell in cells if cell.result is not None}


def _identity(subject: Subject) -> list[Any]:
    return [subject.model.sha256, list(subject.model.changes)]


def _digest(inputs: list[Any], column: Column) -> str:
    text = json.dumps([*inputs, type(column).__name__, str(column)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_digest() -> str:
    """Of the source of this package: what other code computed is not taken over."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
