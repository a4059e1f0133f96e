"""MNN's converter, which reads compression parameters. `python mnn.py CASES`; see `cases.py`.

The converter runs on the baked model; what it wrote is read from the flatbuffer itself, as its own dump in JSON rounds
floats. Compared are, bit by bit, the scales of weights, inputs and outputs of each layer, the zero points of both, and
the clamps of each output's tensor. It is called through its extension module, since the console script installs a
package and reports each call to a server.
"""

import importlib.metadata
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import cases
import numpy as np

CONVERT = "import sys, _tools; _tools.mnnconvert(['mnnconvert', *sys.argv[1:]])"
CONVERTED = "__matmul_converted"
EXTRA, OPERATORS, TENSORS = 1, 3, 7  # fields of Net in schema/default/MNN.fbs
MAIN, OUTPUTS = 2, 4  # of Op
INDEX, QUANT = 1, 4  # of TensorDescribe; QUANT has scale, zero, min, max
QUANTIZED, SYMMETRIC = 3, 4  # of Convolution2D: an IDSTQuan, a QuantizedFloatParam
ZERO_IN = 6  # of QuantizedFloatParam
ALPHA, SCALE_IN, SCALE_OUT = 1, 5, 6  # of IDSTQuan
CONVOLUTIONS = {"Convolution2D": 9}  # of the union OpParameter: what `Op.main_type` says


class Table:
    """A table of a flatbuffer; fields by their number."""

    def __init__(self, data: bytes, at: int) -> None:
        """The table that begins at `at`."""
        self.data, self.at = data, at
        self.types = at - struct.unpack_from("<i", data, at)[0]
        self.fields = (struct.unpack_from("<H", data, self.types)[0] - 4) // 2

    def place(self, field: int) -> int:
        """Where a field stands; 0 where it has its default."""
        offset = struct.unpack_from("<H", self.data, self.types + 4 + 2 * field)[0] if field < self.fields else 0
        return self.at + offset if offset else 0

    def scalar(self, field: int, form: str, default: float) -> Any:
        """A number."""
        at = self.place(field)
        return struct.unpack_from(f"<{form}", self.data, at)[0] if at else default

    def table(self, field: int) -> "Table":
        """A table that it refers to."""
        return Table(self.data, self.follow(self.place(field)))

    def follow(self, at: int) -> int:
        """Where a reference leads."""
        return at + int(struct.unpack_from("<I", self.data, at)[0])

    def items(self, field: int) -> list[int]:
        """Where the elements of a vector of four bytes each stand."""
        if not self.place(field):
            return []
        at = self.follow(self.place(field))
        return [at + 4 * i for i in range(1, struct.unpack_from("<I", self.data, at)[0] + 1)]

    def numbers(self, field: int, form: str) -> list[Any]:
        """A vector of numbers of four bytes."""
        return [struct.unpack_from(f"<{form}", self.data, at)[0] for at in self.items(field)]

    def tables(self, field: int) -> list["Table"]:
        """A vector of tables."""
        return [Table(self.data, self.follow(at)) for at in self.items(field)]

    def texts(self, field: int) -> list[str]:
        """A vector of strings."""
        found = []
        for at in map(self.follow, self.items(field)):
            size = struct.unpack_from("<I", self.data, at)[0]
            found.append(self.data[at + 4 : at + 4 + size].decode())
        return found


def converted(model: Path, parameters: Path) -> Table:
    """The network that the converter makes of a model and its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.mnn"
        arguments = ["-f", "ONNX", "--modelFile", str(model), "--MNNModel", str(out), "--bizCode", "onnxqt"]
        command = [sys.executable, "-c", CONVERT, *arguments, "--compressionParamsFile", str(parameters)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not out.exists():
            lines = (done.stdout + done.stderr).strip().splitlines() or [f"exit code {done.returncode}"]
            raise cases.Refused(lines[-1])
        data = out.read_bytes()
    return Table(data, struct.unpack_from("<I", data, 0)[0])


def check(case: cases.Case) -> cases.Outcome:
    """Scales, zero points and clamps in the converted network."""
    network = converted(case.folder / "baked.onnx", case.file(".mnn.json"))
    content = json.loads(case.file(".mnn.json").read_text())
    names = network.texts(TENSORS)
    quantized = {}
    for operator in network.tables(OPERATORS):
        outputs = operator.numbers(OUTPUTS, "i")
        if outputs and operator.scalar(1, "B", 0) == CONVOLUTIONS["Convolution2D"]:
            main = operator.table(MAIN)
            if main.place(QUANTIZED):
                quantized[names[outputs[0]].removesuffix(CONVERTED)] = main
    described = {
        names[each.scalar(INDEX, "i", 0)].removesuffix(CONVERTED): each.table(QUANT)
        for each in network.tables(EXTRA)
        if each.place(QUANT)
    }
    checked, wrong = 0, []
    for layer in content["algo"][0]["quantParams"]["layer"]:
        if "output" not in layer:
            continue  # of its weight alone, whose scales MNN finds itself
        values = compared(case, layer, quantized, described)
        checked += len(values)
        wrong += [f"{layer['opName']}: {what}" for what, same in values.items() if not same]
    detail = f"differ: {', '.join(wrong[:3])}" if wrong else ""
    return cases.Outcome(checked, len(wrong), "scales, zero points and clamps of layers in its network", detail)


def compared(
    case: cases.Case, layer: dict[str, Any], quantized: dict[str, Table], described: dict[str, Table]
) -> dict[str, bool]:
    """By what was looked at, whether it is ours."""
    source, output = (layer[kind][0]["name"] for kind in ("input", "output"))
    weight = case.weights[layer["weight"][0]["name"]]
    if output not in quantized or output not in described:
        return {"the layer": False}
    into, out = case.activations[source], case.activations[output]
    made, tensor = quantized[output].table(QUANTIZED), described[output]
    alpha = np.array(made.numbers(ALPHA, "f"), np.float32)
    moved_in, moved_out = (0 if grid.signed else 1 << (grid.bits - 1) for grid in (into, out))
    zero_in = quantized[output].table(SYMMETRIC).scalar(ZERO_IN, "b", 0)
    ends = [tensor.scalar(2, "f", -128), tensor.scalar(3, "f", 127)]
    return {
        "scales of the weight": np.array_equal(alpha, np.broadcast_to(weight.scale, alpha.shape)),
        "scale of the input": made.scalar(SCALE_IN, "f", 0) == into.scale,
        "scale of the output": made.scalar(SCALE_OUT, "f", 0) == out.scale == tensor.scalar(0, "f", 0),
        "zero point of the input": zero_in == into.zero_point - moved_in,
        "zero point of the output": tensor.scalar(1, "f", 0) == out.zero_point - moved_out,
        "clamps of the output": ends == [out.qmin - moved_out, out.qmax - moved_out],
    }


if __name__ == "__main__":
    sys.exit(cases.main("MNN", importlib.metadata.version("MNN"), {"mnn": check}))
