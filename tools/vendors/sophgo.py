"""TPU-MLIR, which imports calibration tables. `python sophgo.py CASES`; see `cases.py`. Python 3.10.

`model_transform.py` makes MLIR of the baked model, `tpuc-opt --import-calibration-table` puts the table into it, with
`asymmetric` where the scheme is. Its exit code says nothing, so the types of the result are read: `calibrated<lo:hi>`
of each tensor with a row, and the `scale` of each weight. Rows whose name no tensor has are told, not counted. Two
packages that the converter of ONNX files imports, and does not need for ONNX files, are stood in for. The wheel brings
a C library of its own, which must be moved away where the system's is newer.
"""

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import cases
import numpy as np
import onnx

STUBS = {
    "onnxruntime_extensions.py": """
class PyOp:
    dt_float = dt_int64 = dt_string = 1
class PyOrtFunction:
    pass
def onnx_op(*arguments, **options):
    return lambda function: function
def get_library_path():
    return ""
""",
    "torch.py": """
import sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
for name in ("torch", "torch.nn", "torch.nn.functional", "torch.fx"):
    sys.modules[name] = Anything(name)
""",
}
FIXED = ("_Softmax", "_Sigmoid")  # whose range the importer sets to [0, 1]
PRODUCTS = "_Mul"  # which it keeps symmetric when all else is asymmetric
LOCATION = re.compile(r'^(#loc\d*) = loc\("(.*)"\)$', re.MULTILINE)
OPERATION = re.compile(r'^ *(%\d+) = "top\.(\w+)"\((.*?)\) (.*) loc\((#loc\d*)\)$', re.MULTILINE)
CALIBRATED = re.compile(r"!quant\.calibrated<f32<([^:<>]+):([^:<>]+)>>")
SCALE = re.compile(r"scale = \[([^\]]*)\]")


@dataclass(frozen=True)
class Operation:
    """One line of the imported network."""

    name: str
    operands: tuple[str, ...]
    ends: tuple[float, float] | None
    scales: tuple[float, ...]


def environment(folder: Path) -> dict[str, str]:
    """Where the tools find their parts."""
    spec = importlib.util.find_spec("tpu_mlir")
    if spec is None or spec.origin is None:
        raise cases.Refused("tpu_mlir is not installed")
    root = Path(spec.origin).parent
    for name, text in STUBS.items():
        (folder / name).write_text(text)
    paths = [str(root / part) for part in ("bin", "python/tools", "python/utils")]
    return {
        **os.environ,
        "TPUC_ROOT": str(root),
        "PATH": os.pathsep.join([*paths, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([str(folder), str(root.parent), str(root / "python")]),
    }


def run(command: list[str], folder: Path, made: str) -> str:
    """The text of the file that a tool makes."""
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment(folder))
    if not (folder / made).exists():
        lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
        raise cases.Refused(f"{Path(command[-1]).name}: {lines[-1]}")
    return (folder / made).read_text()


def imported(case: cases.Case, asymmetric: bool) -> dict[str, Operation]:
    """The network of a case with its table, by the name and by the value of each operation."""
    root = Path(environment_root())
    model = onnx.load(case.folder / "baked.onnx")
    shapes = [[dim.dim_value or 1 for dim in value.type.tensor_type.shape.dim] for value in model.graph.input]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        transform = [sys.executable, str(root / "python/tools/model_transform.py"), "--model_name", "m"]
        transform += ["--model_def", str((case.folder / "baked.onnx").absolute()), "--input_shapes", str(shapes)]
        run([*transform, "--mlir", "m.mlir"], folder, "m.mlir")
        table = case.file("_cali_table").absolute()
        options = ["--processor-assign=chip=bm1688 mode=INT8 num_device=1 num_core=1"]
        options += [f"--import-calibration-table=file={table} asymmetric={str(asymmetric).lower()}"]
        text = run([str(root / "bin/tpuc-opt"), "m.mlir", *options, "-o", "out.mlir"], folder, "out.mlir")
    return operations(text)


def operations(text: str) -> dict[str, Operation]:
    """The operations of a network, by name and by value."""
    names = dict(LOCATION.findall(text))
    found = {}
    for value, _, operands, rest, location in OPERATION.findall(text):
        ends = CALIBRATED.search(rest.rpartition("->")[2])
        numbers = SCALE.search(rest) if "->" in rest else None
        operation = Operation(
            names.get(location, ""),
            tuple(operands.split(", ")),
            (float(ends[1]), float(ends[2])) if ends else None,
            tuple(float(number) for number in numbers[1].split(",")) if numbers else (),
        )
        found[value] = found[operation.name] = operation
    return found


def environment_root() -> str:
    """Where the package lies."""
    with tempfile.TemporaryDirectory() as folder:
        return environment(Path(folder))["TPUC_ROOT"]


def sections(text: str) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The words of the ranges and of the scales of weights, by name."""
    ranges: dict[str, list[str]] = {}
    weights: dict[str, list[str]] = {}
    title = ""
    for line in text.splitlines():
        if line.startswith("#"):
            title = line
            continue
        name, *words = line.split(" ")
        if "weight_scale" in title:
            weights[name] = words[1:]
        elif len(words) == 3:
            ranges[name] = words
    return ranges, weights


def check(case: cases.Case) -> cases.Outcome:
    """Scales and zero points that the types of tensors say, and scales of weights."""
    asymmetric = any(not grid.signed for grid in case.activations.values())
    network = imported(case, asymmetric)
    ranges, weights = sections(case.file("_cali_table").read_text())
    producers = {name: node for node in onnx.load(case.folder / "float.onnx").graph.node for name in node.output}
    names = {
        tensor: f"{tensor}_{producers[tensor].op_type}" if tensor in producers else tensor
        for tensor in case.activations
    }
    checked, wrong, absent = 0, [], []
    for tensor, name in names.items():
        operation = network.get(name)
        if name not in ranges or operation is None or operation.ends is None:
            absent += [name] if name in ranges else []
            continue
        if not name.endswith(FIXED):
            checked += 1
            grid, ends = case.activations[tensor], operation.ends
            symmetric = (
                name.endswith(PRODUCTS) and ends[0] == -ends[1] and np.float32(ends[1]) == np.float32(grid.absmax)
            )
            wrong += [name] if not (symmetric or agrees(grid, ends, asymmetric)) else []
    grids = {name.removesuffix("_weight"): words for name, words in weights.items()}
    for name, words in grids.items():
        operation = network.get(name)
        if operation is None:
            absent.append(f"{name}_weight")
            continue
        checked += 1
        theirs = network[operation.operands[1]].scales
        same = np.array_equal(np.float32(theirs), np.array([float(word) for word in words], np.float32))
        wrong += [f"{name}_weight"] if not (same and is_ours(case, theirs)) else []
    detail = f"differ: {', '.join(wrong[:3])}" if wrong else ""
    detail += f"{len(absent)} rows without a tensor: {', '.join(absent[:3])}" if absent else ""
    return cases.Outcome(checked, len(wrong), "scales and zero points of tensors and weights in its MLIR", detail)


def agrees(grid: cases.Grid, ends: tuple[float, float], asymmetric: bool) -> bool:
    """Whether a range gives our scale and zero point, in the codes of the mode."""
    low, high = ends
    if not asymmetric:
        return bool(np.float32(high / 127) == grid.scale and low in (-high, 0))
    scale = (high - low) / 255
    return bool(np.float32(scale) == grid.scale and round(-low / scale) == grid.zero_point)


def is_ours(case: cases.Case, scales: tuple[float, ...]) -> bool:
    """Whether some weight of the case has these scales."""
    found = np.float32(scales)
    return any(
        np.array_equal(np.broadcast_to(grid.scale.ravel(), found.shape), found)
        for grid in case.weights.values()
        if grid.scale.size in (1, found.size)
    )


if __name__ == "__main__":
    sys.exit(cases.main("TPU-MLIR", importlib.metadata.version("tpu_mlir"), {"sophgo": check}))
