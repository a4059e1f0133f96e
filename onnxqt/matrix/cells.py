"""The cells of a matrix, and what they say of each model."""

import functools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass

from onnxqt.matrix.task import Json, Task
from onnxqt.report import environment

SCHEMA_VERSION = "1.0"


@dataclass(frozen=True)
class Cell:
    """A model on a back end.

    Attributes:
        model: name of the subject.
        profile: name of the back end.
        column: name of the precision or the scheme.
        key: hash of everything that the result depends on.
        result: what was found (see matrix.schema.json), None if it failed.
        error: why it failed, else None.
    """

    model: str
    profile: str
    column: str
    key: str
    result: Json | None
    error: str | None

    @property
    def accuracy(self) -> float | None:
        """Top-1, or agreement without labels; None if the cell failed or the model has no classes."""
        return _accuracy(self.result)


@dataclass(frozen=True, eq=False)
class Matrix:
    """All cells that are done.

    Attributes:
        task: what was asked.
        floats: what the float models do, by name of the subject.
        cells: in the order of the columns of the task, of each the subjects.
    """

    task: Task
    floats: Mapping[str, Json]
    cells: tuple[Cell, ...]

    def cell(self, model: str, profile: str, column: str) -> Cell | None:
        """One cell; None where it is not asked for or not done."""
        return self._by_place.get((model, profile, column))

    @functools.cached_property
    def _by_place(self) -> dict[tuple[str, str, str], Cell]:
        return {(cell.model, cell.profile, cell.column): cell for cell in self.cells}

    @property
    def summary(self) -> tuple[Json, ...]:
        """Per model, over the columns in which no model failed: mean gap to the original float model, and spread."""
        return self.summary_over(tuple(profile.name for profile in self.task.profiles))

    def summary_over(self, profiles: Collection[str]) -> tuple[Json, ...]:
        """The summary of some profiles alone."""
        names = [subject.name for subject in self.task.subjects]
        places = [(profile.name, str(column)) for profile, column in self.task.columns if profile.name in profiles]
        rows = [[self.cell(name, *place) for name in names] for place in places]
        complete = [row for row in rows if all(cell and cell.accuracy is not None for cell in row)]
        target = _accuracy(self.floats[names[0]])
        summary = []
        for index, name in enumerate(names):
            shares = [cell.accuracy for row in complete if (cell := row[index]) and cell.accuracy is not None]
            known = bool(shares) and target is not None
            summary.append(
                {
                    "model": name,
                    "cells": len(shares),
                    "mean_gap": (target or 0.0) - math.fsum(shares) / len(shares) if known else None,
                    "spread": max(shares) - min(shares) if shares else None,
                }
            )
        return tuple(summary)

    def as_json(self) -> Json:
        """The form for machines (schema: onnxqt/matrix.schema.json)."""
        task = self.task
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": environment(),
            "models": [
                {"name": subject.name, "sha256": subject.model.sha256, "float": self.floats[subject.name]}
                for subject in task.subjects
            ],
            "data": task.data,
            "profiles": [
                {
                    **{key: getattr(profile, key) for key in ("name", "title", "evidence", "source", "assumed")},
                    "columns": [str(column) for column in task.columns_of(profile)],
                }
                for profile in task.profiles
            ],
            "cells": [asdict(cell) for cell in self.cells],
            "summary": list(self.summary),
        }


def _accuracy(outcome: Json | None) -> float | None:
    metrics = outcome["metrics"] if outcome else {}
    share: float | None = metrics.get("top1", metrics.get("agreement"))
    return share
