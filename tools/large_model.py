"""Take a model of 3 GB through inspect, calibrate and export, and measure the memory of each command.

    python tools/large_model.py --out large/ [--gib 3]

Writes the model (a token embedding, then residual blocks of LayerNormalization, MatMul, Gelu and MatMul; random
weights in one external file), runs each command in a process of its own, and prints its wall time, its peak resident
memory, and that as a multiple of the weights. Pages of the weights' file that are mapped into memory count.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

WIDTH = 4096
VOCABULARY = 32000
LENGTH = 16
LIMIT = 1.5  # peak memory as a multiple of the weights

Shape = tuple[int, ...]


def main() -> None:
    """Write the model and the samples, run the commands, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--gib", type=float, default=3.0)
    arguments = parser.parse_args()
    folder: Path = arguments.out
    folder.mkdir(parents=True, exist_ok=True)
    weights = write_model(folder, arguments.gib)
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, (8, LENGTH))
    (folder / "calib").mkdir(exist_ok=True)
    np.savez(folder / "calib" / "samples.npz", tokens=tokens)
    print(
        f"{weights / 2**30:.2f} GiB of weights\n\n| command | seconds | peak GiB | peak / weights |\n|---|--:|--:|--:|"
    )
    model, data = str(folder / "model.onnx"), ["--data", str(folder / "calib"), "--out", str(folder / "run")]
    worst = 0.0
    for command in (
        ["inspect", model],
        ["calibrate", model, *data],
        ["export", model, *data, "--scheme", "w8a8-sym-pc"],
        ["export", model, *data, "--scheme", "w4a8-asym-pt"],
        ["export", model, *data, "--scheme", "w4af-sym-b32"],
        ["export", model, *data, "--scheme", "w4af-asym-b128"],
        ["export", model, *data, "--scheme", "w8a8-asym-pc-dyn"],
    ):
        seconds, peak = run([str(Path(sys.executable).with_name("onnxqt")), *command])
        name = " ".join(part for part in command if part.startswith(("w", "inspect", "calibrate", "export")))
        print(f"| `onnxqt {name}` | {seconds:.0f} | {peak / 2**30:.2f} | {peak / weights:.2f} |", flush=True)
        worst = max(worst, peak / weights)
    sys.exit(f"more than {LIMIT} times the weights" if worst > LIMIT else 0)


def write_model(folder: Path, gib: float) -> int:
    """Write `model.onnx` and `model.data`; returns the bytes of the weights."""
    block = 2 * WIDTH * WIDTH * 4
    blocks = max(1, round((gib * 2**30 - VOCABULARY * WIDTH * 4) / block))
    shapes: dict[str, Shape] = {"embedding": (VOCABULARY, WIDTH), "gamma": (WIDTH,)}
    nodes = [helper.make_node("Gather", ["embedding", "tokens"], ["x0"])]
    for i in range(blocks):
        shapes |= {f"up{i}": (WIDTH, WIDTH), f"down{i}": (WIDTH, WIDTH)}
        nodes += [
            helper.make_node("LayerNormalization", [f"x{i}", "gamma"], [f"n{i}"]),
            helper.make_node("MatMul", [f"n{i}", f"up{i}"], [f"u{i}"]),
            helper.make_node("Gelu", [f"u{i}"], [f"g{i}"]),
            helper.make_node("MatMul", [f"g{i}", f"down{i}"], [f"d{i}"]),
            helper.make_node("Add", [f"x{i}", f"d{i}"], [f"x{i + 1}"]),
        ]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", LENGTH])
    output = helper.make_tensor_value_info(f"x{blocks}", TensorProto.FLOAT, ["batch", LENGTH, WIDTH])
    tensors = write_weights(folder / "model.data", shapes)
    graph = helper.make_graph(nodes, "large", [tokens], [output], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, folder / "model.onnx")
    return (folder / "model.data").stat().st_size


def write_weights(path: Path, shapes: dict[str, Shape]) -> list[TensorProto]:
    """Random weights, one behind the other in a file, as external tensors."""
    rng = np.random.default_rng(0)
    tensors = []
    with path.open("wb") as file:
        for name, shape in shapes.items():
            tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
            size = int(np.prod(shape)) * 4
            for key, value in (("location", path.name), ("offset", file.tell()), ("length", size)):
                tensor.external_data.add(key=key, value=str(value))
            tensors.append(tensor)
            scale = np.float32(1 if len(shape) == 1 else WIDTH**-0.5)
            for _ in range(shape[0] if len(shape) > 1 else 1):
                row = np.ones(shape, np.float32) if len(shape) == 1 else rng.standard_normal(shape[1], np.float32)
                file.write((row * scale).tobytes())
    return tensors


def run(command: Sequence[str]) -> tuple[float, int]:
    """Run a command; returns its wall time in seconds and its peak resident memory in bytes."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    errors = process.stderr.read() if process.stderr else b""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed:\n{errors.decode()}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024


if __name__ == "__main__":
    main()
