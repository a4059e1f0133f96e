"""Small architectures from every exporter (fixtures/zoo): what ingest makes of them, and the whole job."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from onnxqt.data import has_batch_axis
from onnxqt.ingest import ingest
from onnxqt.model import Model, input_specs
from onnxqt.numerics import Array
from onnxqt.pipeline import CHECKPOINT, Settings, scheme_file, trim
from onnxqt.plan import make_plan
from onnxqt.runtime import Session
from onnxqt.schemes import parse_scheme
from onnxqt.trim import TrimSettings, reach

ZOO = sorted((Path(__file__).resolve().parent.parent / "fixtures" / "zoo").glob("*.onnx"))
SAMPLES, STEPS, SCHEME = 20, 3, "w8a8-sym-pc"
# Relative to the largest output: what a float32 network may lose to another order of its sums.
FLOAT_PATH = 1e-5
HALF_PATH = 1e-2

EACH = pytest.mark.parametrize("path", ZOO, ids=lambda path: path.stem)


def samples(model: Model, count: int = SAMPLES) -> dict[str, Array]:
    """Random inputs: normal floats, small token ids, masks of ones."""
    rng = np.random.default_rng(0)
    specs = input_specs(model)
    assert has_batch_axis(specs)
    return {spec.name: values(spec.name, spec.dtype, (count, *(n or 1 for n in spec.shape[1:])), rng) for spec in specs}


def values(name: str, dtype: "np.dtype[np.generic]", shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    if dtype.kind in "iu":
        return np.ones(shape, dtype) if "mask" in name else rng.integers(0, 30, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def fed(original: onnx.ModelProto, inputs: dict[str, Array]) -> dict[str, Array]:
    """The inputs in the element types of the original model."""
    kinds = {value.name: value.type.tensor_type.elem_type for value in original.graph.input}
    return {name: x.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name])) for name, x in inputs.items()}


@EACH
def test_ingest_computes_what_the_original_computes(path: Path) -> None:
    model, original = ingest(path), onnx.load(path)
    inputs = samples(model, 4)
    limit = HALF_PATH if "half" in path.stem else FLOAT_PATH
    original.ir_version = min(original.ir_version, 10)
    expected = Session(original).run(fed(original, inputs))
    for name, output in Session(model.proto).run(inputs).items():
        if output.dtype.kind == "f":
            largest = np.abs(expected[name].astype(np.float64)).max()
            assert np.abs(output.astype(np.float64) - expected[name]).max() <= limit * largest
        else:
            np.testing.assert_array_equal(output, expected[name])


@EACH
def test_the_whole_job(path: Path, tmp_path: Path) -> None:
    model = ingest(path)
    plan = make_plan(model)
    assert plan.integer_nodes
    inputs = samples(model)
    settings = Settings(schemes=(parse_scheme(SCHEME),), training=TrimSettings(steps=STEPS, batch_size=4))
    report = trim(path, inputs, out=tmp_path / "out", settings=settings)
    training = report.content["training"]
    assert (training["steps"], training["reason"], training["diverged"]) == (STEPS, None, None)
    for file in (CHECKPOINT, scheme_file(SCHEME)):
        outputs = Session(tmp_path / "out" / file).run(inputs)
        assert all(np.isfinite(output).all() for output in outputs.values() if output.dtype.kind == "f")


def test_gradients_reach_every_weight_but_those_before_recurrent_nodes_and_subgraphs() -> None:
    behind = {}
    for path in ZOO:
        model = ingest(path)
        for reason in reach(model, make_plan(model)).untouched.values():
            behind[path.stem] = reason.split(" '")[0]
    assert behind == {
        "gru-dynamo": "no gradient passes GRU",
        "lstm-torchscript": "no gradient passes LSTM",
        "keras-lstm": "no gradient passes LSTM",
        "if-dynamo": "no gradient passes If",
        "loop-torchscript": "no gradient passes Loop",
    }
