"""What ONNX Runtime's own quantizer makes of float models, and what its files give. `python ort_static.py JOB`.

JOB is a folder:

    job.json        {"models": [file, ...], "cells": [{"calibration", "per_channel", "activations"}, ...]}
    *.onnx          the models, float32, normalised: `quantize_static` gets them as they are
    calib/*.npz     inputs of one run each, in the order of their names
    eval/*.npz      likewise

"calibration" is MinMax, Percentile or Entropy with the quantizer's own defaults. In onnxruntime 1.32 Percentile is
99.999, and Entropy has 128 bins for 128 levels, so that it keeps the whole range, as MinMax does. "activations" is "u8"
(asymmetric) or "s8" (symmetric). Of each model and cell this adds the quantized file and its outputs on the runs in
`eval`:

    result.json     {"version", "cells": [{"model", (the cell's), "file", "outputs", "error"}]}
    FILE.npz        "RUN:OUTPUT", RUN the stem of the file in `eval`

A cell that failed has its error and no outputs.
"""

import argparse
import inspect
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static

Array = npt.NDArray[Any]
TYPES = {"u8": QuantType.QUInt8, "s8": QuantType.QInt8}
SYMMETRIC = {"u8": False, "s8": True}
CACHE = "calibration_cache_path"  # which newer quantizers take: cells that differ in their grids share ranges


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """The inputs of all runs of a folder, once."""

    def __init__(self, folder: Path) -> None:
        self._runs = (inputs for _, inputs in runs_in(folder))

    def get_next(self) -> dict[str, Array] | None:
        """The inputs of the next run; None behind the last."""
        return next(self._runs, None)


def runs_in(folder: Path) -> Iterator[tuple[str, dict[str, Array]]]:
    """Name and inputs of each run, in order."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path) as file:
            yield path.stem, {name: file[name] for name in file.files}


def name_of(model: str, cell: Mapping[str, Any]) -> str:
    """The stem of the files of a model and a cell."""
    granularity = "pc" if cell["per_channel"] else "pt"
    return "-".join((Path(model).stem, cell["calibration"], granularity, cell["activations"]))


def quantize(folder: Path, model: str, cell: Mapping[str, Any], file: str) -> None:
    """Write the quantized file."""
    options: dict[str, Any] = {}
    if CACHE in inspect.signature(quantize_static).parameters:
        options[CACHE] = folder / f"{Path(model).stem}-{cell['calibration']}-ranges.json"
    quantize_static(
        folder / model,
        folder / file,
        Reader(folder / "calib"),
        quant_format=QuantFormat.QDQ,
        per_channel=cell["per_channel"],
        activation_type=TYPES[cell["activations"]],
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[cell["calibration"]],
        extra_options={"ActivationSymmetric": SYMMETRIC[cell["activations"]], "WeightSymmetric": True},
        **options,
    )


def outputs_of(folder: Path, file: str) -> dict[str, Any]:
    """All outputs of a file on all runs, with all optimizations on."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # fatal; an error is raised
    # Without it, u8 x s8 products saturate at 16 bits on processors without VNNI.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    found: dict[str, Any] = {}
    for run, inputs in runs_in(folder / "eval"):
        for name, value in zip(names, session.run(names, inputs), strict=True):
            found[f"{run}:{name}"] = value
    return found


def done(folder: Path, model: str, cell: Mapping[str, Any]) -> dict[str, Any]:
    """One model and cell; its files and its line of the result."""
    name = name_of(model, cell)
    facts = {"model": model, **cell, "file": f"{name}.onnx", "outputs": f"{name}.npz", "error": ""}
    try:
        quantize(folder, model, cell, facts["file"])
        np.savez(folder / facts["outputs"], **outputs_of(folder, facts["file"]))
    except Exception as error:  # noqa: BLE001 - one cell that fails must not hide the others
        lines = str(error).strip().splitlines() or [""]
        facts |= {"outputs": "", "error": f"{type(error).__name__}: {lines[0]}"}
    return facts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("job", type=Path, help="folder with job.json")
    folder = parser.parse_args(arguments).job
    logging.disable(logging.WARNING)
    job = json.loads((folder / "job.json").read_text())
    cells = [done(folder, model, cell) for model in job["models"] for cell in job["cells"]]
    result = {"version": onnxruntime.__version__, "cells": cells}
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
