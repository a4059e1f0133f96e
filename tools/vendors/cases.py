"""Case folders: what a reader of vendors' files gets, and what it tells.

A case folder holds

    case.json      {"formats": {FORMAT: {"folder", "files", "options"}}, "activations": {NAME: GRID}, "weights": {NAME:
                   GRID}, "absorbed": {NAME: the activation that absorbs it}, "unreached": [weights with scales that do
                   not follow from their values], "groups": {NAME: what the grid that it shares is called}}, with GRID
                   {"scale", "zero_point", "bits", "signed", "qmin", "qmax", "axis", "block_size"}: scales and zero
                   points flat, "shape" theirs
    float.onnx     the model
    baked.onnx     the same with its weights on their grids
    qdq.onnx       its quantized form
    inputs.npz     values for its inputs
    FORMAT/        the files

FORMAT is the name of a format, with options behind it where it was written with some (`ort-overrides,form=range`). A
script prints JSON:

    {"reader", "version", "results": [{"case", "format", "status", "checked", "different", "effect", "detail"}]}

`status` is "accepted", "refused" (by the vendor's code, with its words in `detail`), or "failed" (the check itself).
`checked` counts values that the vendor's code gave out again, `different` those that are not ours; `effect` says what
they are.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Refused(Exception):  # noqa: N818 - a finding, not a failure
    """The vendor's code does not take the files; its words."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How a tensor is quantized.

    Attributes:
        scale: float32, of the shape that QuantizeLinear has it.
        zero_point: int64, likewise.
        bits: of the codes.
        signed: whether they are.
        qmin: the least code.
        qmax: the largest code.
        axis: None per tensor.
        block_size: None where there are no blocks.
    """

    scale: Array
    zero_point: Array
    bits: int
    signed: bool
    qmin: int
    qmax: int
    axis: int | None
    block_size: int | None

    @property
    def ends(self) -> tuple[Array, Array]:
        """The reals of the least and the largest code, float64."""
        scale = self.scale.astype(np.float64)
        return (self.qmin - self.zero_point) * scale, (self.qmax - self.zero_point) * scale

    @property
    def absmax(self) -> Array:
        """The magnitude for symmetric consumers, float64: that of qmax where the codes lie about zero."""
        low, high = self.ends
        return high if self.signed and not self.zero_point.any() else np.maximum(-low, high)


@dataclass(frozen=True, slots=True)
class Case:
    """One case as it lies on disk.

    Attributes:
        folder: where it lies.
        format: which is to be read.
        files: of the format.
        options: with which it was written.
        activations: their grids by name.
        weights: their grids by name.
        absorbed: which activation absorbs a tensor.
        unreached: weights with scales that do not follow from their values.
        groups: by activation that shares its grid, what the grid is called.
    """

    folder: Path
    format: str
    files: tuple[Path, ...]
    options: Mapping[str, str]
    activations: Mapping[str, Grid]
    weights: Mapping[str, Grid]
    absorbed: Mapping[str, str]
    unreached: tuple[str, ...]
    groups: Mapping[str, str]

    def sharing(self, name: str) -> list[str]:
        """The other activations on the grid of one."""
        group = self.groups.get(name)
        return [other for other, shared in self.groups.items() if shared == group and other != name]

    def file(self, end: str) -> Path:
        """The one file whose name ends so."""
        (found,) = (path for path in self.files if path.name.endswith(end))
        return found

    def inputs(self) -> dict[str, Array]:
        """Values for the inputs of the model."""
        with np.load(self.folder / "inputs.npz") as file:
            return {name: file[name] for name in file.files}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was compared: how many values, how many are not ours, and what they are."""

    checked: int
    different: int
    effect: str
    detail: str = ""


Check = Callable[[Case], Outcome]


def grid_of(facts: Mapping[str, Any]) -> Grid:
    """A grid from its JSON form."""
    scale = np.array(facts["scale"], np.float32).reshape(facts["shape"])
    zero_point = np.array(facts["zero_point"], np.int64).reshape(facts["shape"])
    others = (facts[key] for key in ("bits", "signed", "qmin", "qmax", "axis", "block_size"))
    return Grid(scale, zero_point, *others)


def read_cases(root: Path, formats: Sequence[str]) -> list[Case]:
    """The cases below `root` of these formats."""
    found = []
    for path in sorted(root.rglob("case.json")):
        facts = json.loads(path.read_text())
        grids = {
            kind: {name: grid_of(grid) for name, grid in facts[kind].items()} for kind in ("activations", "weights")
        }
        for name, written in facts["formats"].items():
            if name.partition(",")[0] not in formats:
                continue
            files = tuple(path.parent / written["folder"] / file for file in written["files"])
            shared = (
                files,
                written["options"],
                grids["activations"],
                grids["weights"],
                facts["absorbed"],
                tuple(facts["unreached"]),
                facts["groups"],
            )
            found.append(Case(path.parent, name, *shared))
    return found


def checked(case: Case, check: Check) -> dict[str, Any]:
    """The result of one case."""
    facts: dict[str, Any] = {"case": case.folder.name, "format": case.format, "status": "accepted"}
    facts |= {"checked": 0, "different": 0, "effect": "", "detail": ""}
    try:
        outcome = check(case)
        facts |= {key: getattr(outcome, key) for key in ("checked", "different", "effect", "detail")}
    except Refused as words:
        facts |= {"status": "refused", "detail": str(words)}
    except Exception as error:  # noqa: BLE001 - one broken case must not hide the others
        lines = str(error).strip().splitlines() or [""]
        facts |= {"status": "failed", "detail": f"{type(error).__name__}: {lines[0]}"}
    return facts


def main(reader: str, version: str, checks: Mapping[str, Check], arguments: Sequence[str] | None = None) -> int:
    """Run every check below the folder of the command line, and print what came out; 1 if one failed.

    Args:
        reader: its name.
        version: of the package that reads.
        checks: by format.
        arguments: of the command line.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", type=Path, help="folder with case folders below it")
    root = parser.parse_args(arguments).cases
    cases = read_cases(root, list(checks))
    results = [checked(case, checks[case.format.partition(",")[0]]) for case in cases]
    json.dump({"reader": reader, "version": version, "results": results}, sys.stdout, indent=1)
    print()
    return int(any(result["status"] == "failed" for result in results))
