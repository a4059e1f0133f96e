"""Runs quantized files as a consumer does. `python consume.py ort|openvino CASES`.

A case folder holds `model.onnx` and `inputs.npz`, arrays by input name. This adds

    result.json    {"version", "loads", "runs", "error", "kernels": {kernel: how often}, "integer": how many of these}
    outputs.npz    arrays by output name, where the file ran

`kernels` are those of products: convolutions and matrix products, by the operator and, for OpenVINO, the primitive and
the precision of its operands; `integer` counts those on integer operands.
"""

import argparse
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# Of ONNX Runtime's optimized graph: what computes products, and what of it does so on integers.
PRODUCTS = ("Conv", "FusedConv", "MatMul", "FusedMatMul", "Gemm", "FusedGemm", "ConvTranspose", "MatMulNBits")
INTEGER_PRODUCTS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul"),
    *("MatMulIntegerToFloat", "ConvIntegerToFloat"),
)
OPENVINO_PRODUCTS = ("Convolution", "MatMul", "FullyConnected", "Deconvolution")


class Ort:
    """ONNX Runtime on one thread of the CPU, with all its defaults.

    Without VNNI, pairs of products saturate at 16 bits on such a processor (profile `x86_sat16`).
    """

    def __init__(self) -> None:
        import onnxruntime

        self._ort = onnxruntime
        self.version = onnxruntime.__version__

    def load(self, file: Path) -> None:
        """Make a session."""
        import onnx

        with tempfile.TemporaryDirectory() as folder:
            options = self._ort.SessionOptions()
            options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
            options.intra_op_num_threads = 1
            options.log_severity_level = 4  # fatal; an error is raised

            self._session = self._ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            self._graph = onnx.load(options.optimized_model_filepath, load_external_data=False).graph

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        names = [value.name for value in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))

    def kernels(self) -> tuple[Counter[str], int]:
        """What computes products, and how many of it on integers."""
        found = Counter(node.op_type for node in self._graph.node if node.op_type in (*PRODUCTS, *INTEGER_PRODUCTS))
        return found, sum(count for name, count in found.items() if name in INTEGER_PRODUCTS)


class OpenVino:
    """OpenVINO on one thread of the CPU; the hint f32 keeps bfloat16 out of what is not quantized."""

    def __init__(self) -> None:
        import openvino

        self._openvino = openvino
        self.version = openvino.__version__.split("-")[0]

    def load(self, file: Path) -> None:
        """Compile the file."""
        core = self._openvino.Core()
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        self._compiled = core.compile_model(core.read_model(file), "CPU", settings)

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs by name."""
        return {port.get_any_name(): np.array(value) for port, value in self._compiled(dict(inputs)).items()}

    def kernels(self) -> tuple[Counter[str], int]:
        """What computes products, and how many of it on integers."""
        found: Counter[str] = Counter()
        integer = 0
        for node in self._compiled.get_runtime_model().get_ordered_ops():
            info = node.get_rt_info()
            kind, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
            if kind in OPENVINO_PRODUCTS:
                found[f"{kind} {info['primitiveType'].astype(str)} {precision}"] += 1
                integer += precision in ("u8", "i8")
        return found, integer


RUNTIMES = {"ort": Ort, "openvino": OpenVino}


def consumed(runtime: Any, folder: Path) -> dict[str, Any]:
    """The result of one case."""
    facts: dict[str, Any] = {"version": runtime.version, "loads": False, "runs": False, "error": ""}
    facts |= {"kernels": {}, "integer": 0}
    with np.load(folder / "inputs.npz") as file:
        inputs = {name: file[name] for name in file.files}
    try:
        runtime.load(folder / "model.onnx")
        facts["loads"] = True
        np.savez(folder / "outputs.npz", **runtime.run(inputs))
        facts["runs"] = True
        kernels, facts["integer"] = runtime.kernels()
        facts["kernels"] = dict(sorted(kernels.items()))
    except Exception as error:  # noqa: BLE001 - one broken case must not hide the others
        lines = [line for line in str(error).strip().splitlines() if line] or [""]
        facts["error"] = f"{type(error).__name__}: {lines[-1].strip()}"
    return facts


def main(arguments: list[str] | None = None) -> int:
    """The command line; see the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runtime", choices=sorted(RUNTIMES))
    parser.add_argument("cases", type=Path, help="folder with case folders below it")
    options = parser.parse_args(arguments)
    runtime = RUNTIMES[options.runtime]()
    for path in sorted(options.cases.rglob("inputs.npz")):
        facts = consumed(runtime, path.parent)
        (path.parent / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
