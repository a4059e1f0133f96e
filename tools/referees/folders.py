"""Case folders: what a referee reads and what it writes.

A case folder holds `case.json`, `arrays.npz` and `model.onnx`. A referee adds

    result.npz    "codes:CODE" for every value that the runtime shows, integer, ONNX layout
    result.json   {"runtime", "version", "status", "reason", "error", "nodes": [{"name", "executed_by", "integer"}]}

`status` is "run", "not expressible" (with the reason, which begins with the name of the node) or "failed" (with the
error); only a case that ran has a `result.npz`.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class NotExpressible(Exception):  # noqa: N818 - a finding, not a failure
    """Why a runtime cannot run a node as the case says; begins with the name of the node."""


@dataclass(frozen=True, slots=True)
class Case:
    """One case as it lies on disk.

    Attributes:
        folder: where it lies.
        values: facts of each value, by code name.
        inputs: code names of the inputs.
        outputs: code names of the outputs.
        nodes: the nodes in the order of execution.
        arrays: `arrays.npz`.
    """

    folder: Path
    values: Mapping[str, Mapping[str, Any]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[Mapping[str, Any], ...]
    arrays: Mapping[str, Array]

    def clamp(self, node: Mapping[str, Any]) -> tuple[int, int]:
        """Limits of the codes of `node`: those of its activation, else of its grid."""
        value = self.values[node["output"]]
        low, high = node["clamp"] or (value["qmin"], value["qmax"])
        if node["op_type"] == "Relu":
            low = max(low, value["zero_point"])
        return max(low, value["qmin"]), min(high, value["qmax"])

    def array(self, kind: str, name: str) -> Array | None:
        """`arrays[kind:name]`, None where the case has none."""
        return self.arrays.get(f"{kind}:{name}")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a runtime made of one case.

    Attributes:
        codes: by code name.
        nodes: per node of the case its name, what executed it, and whether that was an integer kernel.
    """

    codes: Mapping[str, Array]
    nodes: tuple[Mapping[str, Any], ...] = field(default=())


def read_case(folder: Path) -> Case:
    """The case in `folder`."""
    facts = json.loads((folder / "case.json").read_text())
    with np.load(folder / "arrays.npz") as file:
        arrays = {name: file[name] for name in file.files}
    parts = (tuple(facts[name]) for name in ("inputs", "outputs", "nodes"))
    return Case(folder, facts["values"], *parts, arrays)


def code_type(value: Mapping[str, Any]) -> type[np.integer[Any]]:
    """The numpy type that holds the codes of `value`."""
    wide = value["bits"] > 8
    if value["signed"]:
        return np.int16 if wide else np.int8
    return np.uint16 if wide else np.uint8


def exact_codes(real: Array, value: Mapping[str, Any]) -> Array:
    """Codes of reals that lie on the grid of `value`.

    code = real / scale + zero point

    Raises:
        ValueError: if a real is not on the grid: then the runtime did not quantize it.
    """
    steps = real.astype(np.float64) / float(np.float32(value["scale"]))
    codes = np.rint(steps)
    off = np.abs(steps - codes) > 2e-6 * np.maximum(np.abs(codes), 1)  # two float32 roundings
    codes = codes + value["zero_point"]
    off |= (codes < value["qmin"]) | (codes > value["qmax"])
    if np.any(off):
        raise ValueError(f"{int(np.count_nonzero(off))} reals of '{value['tensor']}' are not on its grid")
    return codes.astype(code_type(value))


def same_kernels(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the same nodes ran on integers in two runs."""
    return [node["integer"] for node in first] == [node["integer"] for node in second]


def main(
    runtime: str,
    version: str,
    run: Callable[[Case], Outcome],
    parser: argparse.ArgumentParser | None = None,
) -> int:
    """Run every case below the folder of the command line; 1 if one failed.

    Args:
        runtime: its name.
        version: of the package that computes.
        run: one case to its outcome; raises `NotExpressible` where the runtime lacks something.
        parser: a parser with further options, which was read before.
    """
    parser = parser or argparse.ArgumentParser()
    parser.add_argument("cases", type=Path, help="folder with case folders below it")
    arguments = parser.parse_args()
    paths = sorted(arguments.cases.rglob("case.json"))
    if not paths:
        parser.error(f"no case.json below {arguments.cases}")
    failed = 0
    for path in paths:
        facts: dict[str, Any] = {"runtime": runtime, "version": version, "status": "run", "reason": "", "error": ""}
        facts["nodes"] = []
        case = read_case(path.parent)
        (case.folder / "result.npz").unlink(missing_ok=True)
        try:
            outcome = run(case)
            facts["nodes"] = [dict(node) for node in outcome.nodes]
            np.savez(case.folder / "result.npz", **{f"codes:{name}": codes for name, codes in outcome.codes.items()})
        except NotExpressible as reason:
            facts |= {"status": "not expressible", "reason": str(reason)}
        except Exception as error:  # noqa: BLE001 - one broken case must not hide the others
            print(f"{case.folder.name}: {type(error).__name__}: {error}", file=sys.stderr)
            facts |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            failed = 1
        (case.folder / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    return failed
