"""ONNX Runtime's quantizer and the readers of its files. `python ort.py CASES`; see `cases.py`.

The files are given to `quantize_static` with the arguments that lie beside them; then the quantized model is read:
every activation must carry our scale and zero point, every weight our codes.
"""

import json
import logging
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cases
import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import load_tensors_data
from onnxruntime.quantization.CalTableFlatBuffers.TrtTable import TrtTable
from onnxruntime.quantization.static_quantize_runner import get_tensor_quant_overrides

Array = cases.Array
RENAMED = "_QuantizeLinear_Input"  # what the quantizer puts behind the name of a quantized output of the model
WEIGHT = "_quantized"  # and behind that of a quantized weight


class Once(CalibrationDataReader):  # type: ignore[misc]
    """One set of inputs."""

    def __init__(self, inputs: Mapping[str, Array]) -> None:
        self._runs = iter([dict(inputs)])

    def get_next(self) -> dict[str, Array] | None:
        """The inputs; None the second time."""
        return next(self._runs, None)


def quantized(case: cases.Case, data: CalibrationDataReader | None, extra: Mapping[str, Any], **others: Any) -> Any:
    """What `quantize_static` makes of the baked model."""
    options = json.loads(case.file(".ort-options.json").read_text())
    extra_options = {**options.pop("extra_options"), **extra}
    for key in ("activation_type", "weight_type"):
        options[key] = QuantType[options[key]]
    options["calibrate_method"] = CalibrationMethod[options["calibrate_method"]]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.onnx"
        try:
            quantize_static(case.folder / "baked.onnx", path, data, extra_options=extra_options, **options, **others)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise cases.Refused(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
        return onnx.load(path)


def compared(case: cases.Case, model: onnx.ModelProto) -> cases.Outcome:
    """Grids of activations and codes of weights in a quantized model against ours."""
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    grids = {
        node.input[0].removesuffix(RENAMED): (constants[node.input[1]], constants[node.input[2]])
        for node in model.graph.node
        if node.op_type == "QuantizeLinear"
    }
    behind = {absorbing: name for name, absorbing in case.absorbed.items()}  # a Relu's grid moves before it
    wrong = []
    activations = dict(case.activations)
    if case.format == "ort-cache" or case.options.get("form") == "range":  # ranges fit codes of one width
        widest = max(grid.bits for grid in activations.values())
        activations = {name: grid for name, grid in activations.items() if grid.bits == widest}
    around = left_float(case)
    left = [name for name in activations if name in around and name not in grids]
    activations = {name: grid for name, grid in activations.items() if name not in left}
    for name, grid in activations.items():
        found = grids.get(name) or grids.get(behind.get(name, ""))
        if found is None:  # what only moves codes may carry the quantizer for its input
            found = next((grids[other] for other in case.sharing(name) if other in grids), None)
        if found is None or not same_grid(grid, *found):
            wrong.append(name)
    baked = onnx.load(case.folder / "baked.onnx")
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in baked.graph.initializer}
    weights = {name: grid for name, grid in case.weights.items() if not grid.block_size}
    if case.format == "ort-cache":  # without scales the quantizer finds those of 8-bit codes that reach their ends
        weights = {name: grid for name, grid in weights.items() if grid.bits == 8 and name not in case.unreached}
    for name, grid in weights.items():
        codes = constants.get(name + WEIGHT)
        if codes is None or not np.array_equal(codes.astype(np.int64), codes_of(values[name], grid)):
            wrong.append(name)
    absorbed = [name for name in grids if name in case.absorbed and case.absorbed[name] in grids]
    others = [name for name in grids if name not in case.activations and name not in case.absorbed]
    detail = "; ".join(
        f"{title}: {', '.join(names[:4])}"
        for title, names in (
            ("differ", wrong),
            ("left float", left),
            ("quantized inside of a node", absorbed),
            ("quantized besides", others),
        )
        if names
    )
    return cases.Outcome(
        len(case.activations) + len(weights),
        len(wrong),
        "grids of activations, codes of weights, in its QDQ model",
        detail,
    )


def left_float(case: cases.Case) -> set[str]:
    """Tensors that no node quantizes, as its options exclude all around them; an output's reader is nobody."""
    options = json.loads(case.file(".ort-options.json").read_text())
    excluded = set(options["nodes_to_exclude"])
    silent = options["extra_options"].get("OpTypesToExcludeOutputQuantization", [])
    nodes = onnx.load(case.folder / "baked.onnx").graph.node
    quiet = {output for node in nodes if node.name in excluded or node.op_type in silent for output in node.output}
    return {name for name in quiet if all(node.name in excluded for node in nodes if name in node.input)}


def same_grid(grid: cases.Grid, scale: Array, zero_point: Array) -> bool:
    """Whether a quantizer has our scale and, with its own sign of codes, our zero point."""
    signed = np.issubdtype(zero_point.dtype, np.signedinteger)
    width = 8 * zero_point.dtype.itemsize
    shift = (int(grid.signed) - int(signed)) << (max(width, 8) - 1)
    return bool(scale == grid.scale and int(zero_point) == int(grid.zero_point) + shift)


def codes_of(values: Array, grid: cases.Grid) -> Array:
    """Codes of values that lie on a grid."""
    shape = [1] * values.ndim
    if grid.axis is not None:
        shape[grid.axis] = -1
    scale, zero_point = (part.reshape(shape) if part.ndim else part for part in (grid.scale, grid.zero_point))
    return np.rint(values / scale).astype(np.int64) + zero_point


def check_cache(case: cases.Case) -> cases.Outcome:
    """`load_tensors_data`, then `quantize_static` without samples."""
    path = case.file(".ort-cache.json")
    loaded = load_tensors_data(path)
    raw = json.loads(path.read_text())["data"]
    for name, data in raw.items():
        for end in ("lowest", "highest"):
            if getattr(loaded[name], end) != np.float32(data[end]["data"]):
                return cases.Outcome(1, 1, f"load_tensors_data gives another range for '{name}'")
    return compared(case, quantized(case, None, {}, calibration_cache_path=path))


def check_overrides(case: cases.Case) -> cases.Outcome:
    """The runner's reader for the form with scales; the numbers as scalars for that with ranges."""
    path = case.file(".ort-overrides.json")
    if case.options.get("form") == "range":
        content = json.loads(path.read_text())
        overrides = {
            name: [
                {key: value if key == "axis" else np.float32(value) for key, value in item.items()} for item in items
            ]
            for name, items in content.items()
        }
    else:
        overrides = get_tensor_quant_overrides(path)
    return compared(case, quantized(case, Once(case.inputs()), {"TensorQuantOverrides": overrides}))


def check_trt(case: cases.Case) -> cases.Outcome:
    """The flatbuffers class that ONNX Runtime generates for its TensorRT provider, and the text beside it."""
    table = TrtTable.GetRootAs(case.file(".flatbuffers").read_bytes())
    found = {}
    for index in range(table.DictLength()):
        entry = table.Dict(index)
        found[entry.Key().decode()] = np.float32(float(entry.Value()))
    lines = (line.split(" ") for line in case.file(".cache").read_text().splitlines())
    text = {name: np.float32(float(value)) for name, value in lines}
    expected = {name: np.float32(grid.absmax) for name, grid in case.activations.items()}
    wrong = [name for name in expected.keys() | found.keys() if found.get(name) != expected.get(name) or found != text]
    return cases.Outcome(len(expected), len(wrong), "magnitudes of activations", ", ".join(sorted(wrong)[:3]))


CHECKS = {"ort-cache": check_cache, "ort-overrides": check_overrides, "ort-trt": check_trt}

if __name__ == "__main__":
    logging.disable(logging.WARNING)
    sys.exit(cases.main("ONNX Runtime", onnxruntime.__version__, CHECKS))
