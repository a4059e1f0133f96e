"""How accurate the run's models are on every back end, as a heat map."""

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from onnxqt.html.form import Block, Cell, Paragraph, Section, Table, absent, number, rows_within
from onnxqt.html.outcomes import decibel_of, share_of
from onnxqt.html.source import Facts, Run
from onnxqt.html.text import percent, points, short

HEATS = (0.005, 0.01, 0.02, 0.05, 0.10)  # ends of the shades of a heat map, as shares that are lost
_EVIDENCE = ("validated", "modelled")

Place = tuple[str, str]  # a back end and one of its columns


@dataclass(frozen=True, eq=False, slots=True)
class Matrix:
    """A matrix.json, as the heat map needs it.

    Attributes:
        models: names, the original first.
        words: what the heat map calls each: "original", "trimmed" for the run's checkpoint, or else its name.
        profiles: by name.
        columns: precisions and schemes, each once.
        cells: results by model, back end and column; empty facts where one failed.
        target: the share of the original float model; None without classes.
    """

    models: Sequence[str]
    words: Mapping[str, str]
    profiles: Mapping[str, Facts]
    columns: Sequence[str]
    cells: Mapping[tuple[str, str, str], Facts]
    target: float | None

    def share(self, model: str, place: Place) -> float | None:
        """The share of a cell; None where there is none."""
        cell = self.cells.get((model, *place))
        return None if cell is None else share_of(cell)

    def places(self, profiles: Collection[str], columns: Collection[str]) -> list[Place]:
        """Those in which every model has a share."""
        found = [(profile, column) for profile in profiles for column in columns]
        return [place for place in found if all(self.share(model, place) is not None for model in self.models)]

    def mean_and_spread(self, model: str, places: Collection[Place]) -> tuple[float | None, float | None]:
        """Mean of what is lost to the original float model, and the largest less the smallest share."""
        shares = [share for place in places if (share := self.share(model, place)) is not None]
        if not shares or self.target is None:
            return None, None
        return self.target - sum(shares) / len(shares), max(shares) - min(shares)


def read_matrix(run: Run) -> Matrix | None:
    """The matrix of a run; None where there is none."""
    content, checkpoint = run.matrix, run.report.inner("files").text("checkpoint.onnx")
    models = [model.text("name") or "" for model in content.records("models")]
    digests = [model.text("sha256") for model in content.records("models")]
    words = {
        name: "original" if not index else "trimmed" if digest == checkpoint else short(name, 40)
        for index, (name, digest) in enumerate(zip(models, digests, strict=True))
    }
    profiles = {profile.text("name") or "": profile for profile in content.records("profiles")}
    if not models or not profiles:
        return None
    cells = {
        (cell.text("model") or "", cell.text("profile") or "", cell.text("column") or ""): cell.inner("result")
        for cell in content.records("cells")
    }
    columns = dict.fromkeys(column for profile in profiles.values() for column in profile.names("columns"))
    return Matrix(models, words, profiles, list(columns), cells, share_of(content.records("models")[0].inner("float")))


def matrix_section(run: Run) -> Section:
    """The original and the trained model on every back end, under every precision or scheme."""
    title = "On every back end"
    matrix = read_matrix(run)
    if matrix is None:
        remedy = (
            "'onnxqt verify MODEL RUN --data DATA --out RUN' measures it; write the page anew when its matrix.json "
            "lies beside the report."
        )
        return Section("back-ends", title, (absent("Accuracy on the back ends", remedy),))
    return Section("back-ends", title, (*_explained(matrix), *_summaries(matrix), _heat_map(matrix), _legend()))


def _explained(matrix: Matrix) -> list[Block]:
    what = (
        "points lost to the original float model (below 0: gained)"
        if matrix.target is not None
        else "signal-to-noise ratio in dB"
    )
    return [
        Paragraph(
            "The compiler of each back end quantizes the float model by its own rules, and the emulator computes in "
            "its arithmetic. 'validated' means that the emulator was compared with that runtime code by code, "
            f"'modelled' that it follows documents. In each cell: {what}"
            + (", and below it the share itself in percent." if matrix.target is not None else ".")
        )
    ]


def _summaries(matrix: Matrix) -> list[Block]:
    if matrix.target is None:
        return []
    groups: list[tuple[str, list[str]]] = [("all", list(matrix.profiles))]
    evidence = {name: profile.text("evidence") for name, profile in matrix.profiles.items()}
    if len(set(evidence.values())) > 1:
        groups += [(kind, [name for name, found in evidence.items() if found == kind]) for kind in _EVIDENCE]
    rows = []
    for model in matrix.models:
        for words, profiles in groups:
            places = matrix.places(profiles, matrix.columns)
            mean, spread = matrix.mean_and_spread(model, places)
            cells = [number(str(len(places))), number(points(mean)), number(percent(spread))]
            word = matrix.words[model]
            rows.append([Cell(word, detail="" if word == model else short(model)), Cell(words), *cells])
    header = ("model", "back ends", "cells", "mean drop, points", "spread, points")
    return [Table("Mean drop and spread, over the cells in which no model failed", header, rows)]


def _heat_map(matrix: Matrix) -> Table:
    columns = [(column, model) for column in matrix.columns for model in matrix.models]
    rows = []
    for name, profile in matrix.profiles.items():
        first = Cell(short(name), detail=short(profile.text("evidence") or ""))
        offered = profile.names("columns")
        rows.append(
            [first, *(_heat_cell(matrix, model, (name, column), column in offered) for column, model in columns)]
        )
    footer = []
    if matrix.target is not None:
        found = [matrix.mean_and_spread(m, matrix.places(matrix.profiles, [column])) for column, m in columns]
        footer = [
            [Cell("mean drop"), *(Cell(points(mean), True, heat_of(mean)) for mean, _ in found)],
            [Cell("spread"), *(number(percent(spread)) for _, spread in found)],
        ]
    shown, more = rows_within(rows)
    return Table(
        f"Back ends by precision or scheme{more}",
        ("back end", *(matrix.words[model] for _, model in columns)),
        shown,
        [(short(column), len(matrix.models)) for column in matrix.columns],
        footer,
    )


def _heat_cell(matrix: Matrix, model: str, place: Place, offered: bool) -> Cell:
    result = matrix.cells.get((model, *place))
    if result is None:
        return Cell("", number=True, detail="not done" if offered else "not offered")
    if not result:
        return Cell("", number=True, detail="failed")
    share = share_of(result)
    if share is None or matrix.target is None:
        return number(decibel_of(result))
    drop = matrix.target - share
    return Cell(points(drop), True, heat_of(drop), percent(share))


def heat_of(drop: float | None) -> int | None:
    """The shade for a share that is lost."""
    return None if drop is None else sum(drop > end for end in HEATS)


def _legend() -> Table:
    """What the shades mean."""
    ends = [f"{100 * end:g}" for end in HEATS]
    words = [
        f"to {ends[0]}",
        *(f"{low} to {high}" for low, high in itertools.pairwise(ends)),
        f"over {ends[-1]}",
    ]
    cells = [Cell(text, True, heat) for heat, text in enumerate(words)]
    return Table(
        "Shades, in points lost", ("shade", *(str(heat) for heat in range(len(words)))), [[Cell("points"), *cells]]
    )
