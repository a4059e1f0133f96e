"""Weights that stay in their file."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from conftest import invoke
from helpers import build, normal
from onnx import TensorProto

from onnxqt.errors import ModelError
from onnxqt.files import write_model
from onnxqt.ingest import files as ingest_files
from onnxqt.ingest import ingest
from onnxqt.model import Model
from onnxqt.numerics import Array
from onnxqt.plan import make_plan
from onnxqt.runtime import Session
from onnxqt.tensors import external_field, is_external, nbytes, values_of

SIZE = 160  # a weight of more than 64 KiB
TWO_LAYERS = f"""
    (float[n, {SIZE}] x) => (float[n, {SIZE}] y) {{
        h = Gemm<transB = 1>(x, w0, b0)
        r = Relu(h)
        y = MatMul(r, w1)
    }}"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model with external data that ingest treats as one of more than a gigabyte."""
    monkeypatch.setattr(ingest_files, "EMBED_LIMIT", SIZE * SIZE)
    monkeypatch.setattr(ingest_files, "_LARGE", SIZE * SIZE)
    weights = {"w0": normal(SIZE, SIZE), "b0": normal(SIZE), "w1": normal(SIZE, SIZE)}
    path = tmp_path / "model" / "model.onnx"
    path.parent.mkdir()
    proto = build(TWO_LAYERS, weights)
    onnx.save(proto, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def stored(model: onnx.ModelProto) -> dict[str, bool]:
    return {tensor.name: is_external(tensor) for tensor in model.graph.initializer}


def run(model: Model | Path) -> Array:
    x = normal(3, SIZE)
    return Session(model if isinstance(model, Path) else model.proto).run({"x": x})["y"]


def test_large_weights_stay_in_their_file_and_give_the_same_outputs(path: Path) -> None:
    model = ingest(path)
    assert stored(model.proto) == {"w0": True, "b0": False, "w1": True}
    np.testing.assert_array_equal(run(model), run(path))
    for name, value in {"w0": normal(SIZE, SIZE), "w1": normal(SIZE, SIZE)}.items():
        np.testing.assert_array_equal(model.graph.constant(name), value)
    assert {site.tensor for site in make_plan(model).weights} == {"w0", "w1"}


def test_more_rewritten_weights_than_one_file_holds_are_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        half = onnx.numpy_helper.to_array(tensor).astype(np.float16)
        tensor.CopyFrom(onnx.numpy_helper.from_array(half, tensor.name))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(proto, path, save_as_external_data=True, location="half.data", size_threshold=0)
    assert not any(stored(ingest(path).proto).values())
    monkeypatch.setattr(sys.modules["onnxqt.ingest"], "MAX_EMBEDDED", SIZE * SIZE)
    with pytest.raises(ModelError, match=r"GiB of weights would have to be rewritten .*: save the model in float32"):
        ingest(path)


def test_small_models_are_read_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["onnxqt.ingest.files"], "EMBED_LIMIT", 1 << 30)
    assert not any(stored(ingest(path).proto).values())


def test_a_written_model_has_its_weights_beside_it(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "out" / "checkpoint.onnx"
    target.parent.mkdir()
    write_model(target, ingest(path).proto)
    path.with_name("model.data").unlink()
    written = onnx.load(target, load_external_data=False)
    locations = {external_field(tensor, "location") for tensor in written.graph.initializer if is_external(tensor)}
    assert locations == {"checkpoint.data"}
    assert sorted(file.name for file in target.parent.iterdir()) == ["checkpoint.data", "checkpoint.onnx"]
    np.testing.assert_array_equal(run(ingest(target)), run(target))


def test_a_large_model_is_exported_like_a_small_one(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exported(folder: Path) -> tuple[bytes, str]:
        result = invoke("export", path, "--data", samples(tmp_path), "--out", folder, "--scheme", "w4a8-sym-pt")
        assert result.exit_code == 0, result.stderr
        return (folder / "schemes" / "w4a8-sym-pt.onnx").read_bytes(), result.stderr

    large, message = exported(tmp_path / "large")
    assert "not checked by the emulator" in message
    monkeypatch.setattr(ingest_files, "EMBED_LIMIT", 1 << 30)
    small, message = exported(tmp_path / "small")
    assert "emulator" not in message
    assert large == small


def test_a_large_model_is_not_trained(path: Path, tmp_path: Path) -> None:
    result = invoke("trim", path, "--data", samples(tmp_path), "--out", tmp_path / "out", "--batch-size", 4)
    assert result.exit_code == 1
    assert "which the trainer and the emulator cannot hold: use 'onnxqt export'" in result.stderr


def samples(folder: Path) -> Path:
    np.savez(folder / "samples.npz", x=normal(64, SIZE, seed=3))
    return folder / "samples.npz"


@pytest.mark.parametrize(
    ("kind", "dims", "size"),
    [
        (TensorProto.FLOAT, [2, 3], 24),
        (TensorProto.INT4, [3], 2),
        (TensorProto.INT8, [], 1),
        (TensorProto.BOOL, [0], 0),
    ],
)
def test_sizes(kind: int, dims: list[int], size: int) -> None:
    assert nbytes(TensorProto(data_type=kind, dims=dims)) == size


def test_values_of_an_embedded_tensor() -> None:
    value = normal(2, 3)
    np.testing.assert_array_equal(values_of(onnx.numpy_helper.from_array(value)), value)
