"""Small models written as text, data for them, and how far two results are apart."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

from onnxqt.calibrate import Quantizers, RangeTable, calibrate, make_quantizers
from onnxqt.data import InputSpec, open_samples
from onnxqt.export import quantized_model
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.numerics import Array, FloatArray
from onnxqt.plan import QuantPlan, make_plan
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme

BATCH = 2
SAMPLES = 64


def build(
    text: str, constants: Mapping[str, Array] | None = None, opset: int = 17, ir_version: int = 8, domains: str = ""
) -> ModelProto:
    """A model from `(inputs) => (outputs) { nodes }` in ONNX text.

    Args:
        text: the graph; an output written `float[] y` gets the shape that onnx infers.
        constants: initializers by name.
        opset: version of the default operator set.
        ir_version: IR version of the file.
        domains: further entries of the operator set imports, such as `, "com.microsoft": 1`.
    """
    header = f'<ir_version: {ir_version}, opset_import: ["": {opset}{domains}]>'
    model = onnx.parser.parse_model(f"{header} test {text}")
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in (constants or {}).items())
    inferred = {value.name: value for value in onnx.shape_inference.infer_shapes(model, data_prop=True).graph.output}
    for output in model.graph.output:
        if not output.type.tensor_type.HasField("shape"):
            output.CopyFrom(inferred[output.name])
    return model


def normal(*shape: int, seed: int = 0) -> FloatArray:
    """Normally distributed values."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def batch_norm(channels: int, seed: int = 0) -> dict[str, Array]:
    """The constants gamma, beta, mean and var of a BatchNormalization."""
    gamma, beta, mean, spread = normal(4, channels, seed=seed)
    return {"gamma": gamma, "beta": beta, "mean": mean, "var": spread**2 + np.float32(0.5)}


def inputs_of(model: ModelProto, batch: int = BATCH, seed: int = 1) -> dict[str, Array]:
    """Values for every input: normal floats, integers from 0 to 3; `batch` stands for every free dimension."""
    rng = np.random.default_rng(seed)
    values: dict[str, Array] = {}
    for value in model.graph.input:
        shape = [dim.dim_value or batch for dim in value.type.tensor_type.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        real = np.issubdtype(dtype, np.floating)
        values[value.name] = (rng.normal(size=shape) if real else rng.integers(0, 4, shape)).astype(dtype)
    return values


def save(model: ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def ingested(model: ModelProto) -> Model:
    with tempfile.TemporaryDirectory() as folder:
        return ingest(save(model, Path(folder)))


def operators(model: ModelProto) -> list[str]:
    """Operators of the main graph, in order."""
    return [node.op_type for node in model.graph.node]


def run(model: ModelProto, inputs: Mapping[str, Array], optimize: bool = True) -> dict[str, Array]:
    return Session(model, optimize).run(inputs)


def relative_error(actual: Array, expected: Array) -> float:
    """Largest difference over the largest expected magnitude."""
    difference = np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()
    return float(difference / np.abs(expected.astype(np.float64)).max())


def snr_db(actual: Array, expected: Array) -> float:
    """Signal-to-noise ratio, `10 log10(sum(expected^2) / sum((actual - expected)^2))`."""
    noise = np.sum((actual.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(np.sum(expected.astype(np.float64) ** 2) / noise)) if noise else np.inf


@dataclass(frozen=True, eq=False)
class Prepared:
    """A model, planned and calibrated on `SAMPLES` samples."""

    original: ModelProto
    model: Model
    plan: QuantPlan
    ranges: RangeTable

    def quantizers(self, scheme: str) -> Quantizers:
        return make_quantizers(self.model, self.plan, self.ranges, parse_scheme(scheme), "mse")

    def quantized(self, scheme: str) -> ModelProto:
        return quantized_model(self.model, self.plan, self.quantizers(scheme))


def prepare(original: ModelProto) -> Prepared:
    model = ingested(original)
    graph = model.graph
    specs = [InputSpec(name, graph.dtype(name), graph.shape(name) or ()) for name in graph.inputs]
    samples = open_samples(inputs_of(original, batch=SAMPLES), specs)
    plan = make_plan(model)
    return Prepared(original, model, plan, calibrate(model, plan, samples, BATCH))
