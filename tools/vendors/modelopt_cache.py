"""NVIDIA ModelOpt's reader of TensorRT calibration caches. `python modelopt_cache.py CASES`; see `cases.py`.

Only the function `import_scales_from_calib_cache` is taken from the package's source: the package needs torch, the
function nothing. TensorRT itself needs a GPU and is not run.
"""

import ast
import importlib.metadata
import logging
import struct
import sys
from pathlib import Path
from typing import Any

import cases
import numpy as np

PACKAGE = "nvidia-modelopt"
FILE = "modelopt/onnx/quantization/calib_utils.py"
FUNCTION = "import_scales_from_calib_cache"


def reader() -> Any:
    """The function, from the installed source."""
    distribution = importlib.metadata.distribution(PACKAGE)
    source = Path(str(distribution.locate_file(FILE))).read_text()
    (node,) = (n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name == FUNCTION)
    names: dict[str, Any] = {"struct": struct, "logger": logging.getLogger(PACKAGE)}
    exec(compile(ast.Module([node], []), FILE, "exec"), names)
    return names[FUNCTION]


def check(case: cases.Case) -> cases.Outcome:
    """The cache's scales: the table's own where codes are signed, 8 bits wide and about zero, else absmax / 127."""
    logging.disable()
    try:
        found = reader()(str(case.file(".cache")))
    except ValueError as error:
        raise cases.Refused(str(error)) from error
    expected = {}
    for name, grid in case.activations.items():
        own = grid.signed and grid.qmax == 127 and not grid.zero_point.any()
        expected[f"{name}_scale"] = (
            grid.scale if own else (np.float64(np.float32(grid.absmax)) / 127).astype(np.float32)
        )
    for name, absorbing in case.absorbed.items():
        if f"{name}_scale" in found:
            expected[f"{name}_scale"] = expected[f"{absorbing}_scale"]
    wrong = [name for name in expected.keys() | found.keys() if np.float32(found.get(name, -1)) != expected.get(name)]
    return cases.Outcome(len(expected), len(wrong), "scales of activations", ", ".join(sorted(wrong)[:3]))


if __name__ == "__main__":
    sys.exit(cases.main("ModelOpt", importlib.metadata.version(PACKAGE), {"tensorrt": check}))
