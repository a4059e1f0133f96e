"""Test data as ONNX ships it: folders `test_data_set_N` of tensors in protobuf files."""

import tracemalloc
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from sample_files import F32, I64, IDS, X, numbered, numbers

from onnxqt.data import InputSpec, open_samples
from onnxqt.data import tensor_files as module
from onnxqt.errors import DataError
from onnxqt.numerics import Array


def write_set(folder: Path, arrays: Sequence[Array], names: Mapping[int, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, array in enumerate(arrays):
        tensor = numpy_helper.from_array(array, (names or {}).get(number))
        (folder / f"input_{number}.pb").write_bytes(tensor.SerializeToString())
    (folder / "output_0.pb").write_bytes(b"what the model makes of it")
    return folder


def test_sets_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in range(11):
        write_set(tmp_path / f"test_data_set_{number}", [numbered(2 * number, 2)])
    (tmp_path / "model.onnx").write_bytes(b"")
    samples = open_samples(tmp_path, [X])
    assert [numbers(batch) for batch in samples.batches(8)] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 22)),
    ]
    shuffled = [number for batch in islice(samples.shuffled(4, seed=0), 5) for number in numbers(batch)]
    assert len(set(shuffled)) == 20
    assert [numbers(batch) for batch in open_samples(tmp_path / "test_data_set_10", [X]).batches(8)] == [[20, 21]]


def test_files_by_number_or_by_the_names_of_their_tensors(tmp_path: Path) -> None:
    ids = np.arange(12).reshape(3, 4)
    write_set(tmp_path / "a" / "test_data_set_0", [numbered(0, 3), ids], {0: "other", 1: "names"})
    write_set(tmp_path / "b" / "test_data_set_0", [ids, numbered(0, 3)], {0: "ids", 1: "x"})
    for name in ("a", "b"):
        (batch,) = open_samples(tmp_path / name, [X, IDS]).batches(3)
        np.testing.assert_array_equal(batch.inputs["x"], numbered(0, 3), strict=True)
        np.testing.assert_array_equal(batch.inputs["ids"], ids, strict=True)


def test_a_model_without_a_batch_axis(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, (3, 2)), InputSpec("shape", I64, (2,)), InputSpec("scale", F32, ())]
    for number in range(2):
        arrays = [np.full((3, 2), number, np.float32), np.array([number, 5]), np.array(2.5, np.float32)]
        write_set(tmp_path / f"test_data_set_{number}", arrays)
    batches = list(open_samples(tmp_path, specs).batches(1))
    assert len(batches) == 2
    for number, batch in enumerate(batches):
        assert {name: array.shape for name, array in batch.inputs.items()} == {"x": (3, 2), "shape": (2,), "scale": ()}
        assert (batch.inputs["x"].max(), batch.inputs["shape"][0]) == (number, number)


def test_values_in_typed_fields(tmp_path: Path) -> None:
    tensor = onnx.helper.make_tensor("x", TensorProto.FLOAT, (1, 3, 2), list(range(6)))
    assert not tensor.raw_data
    write_set(tmp_path, [])
    (tmp_path / "input_0.pb").write_bytes(tensor.SerializeToString())
    (batch,) = open_samples(tmp_path, [X]).batches(1)
    np.testing.assert_array_equal(batch.inputs["x"].reshape(-1), np.arange(6, dtype=np.float32))


def test_sha256_depends_on_the_inputs(tmp_path: Path) -> None:
    def digest() -> str:
        return open_samples(tmp_path, [X]).sha256()

    folder = write_set(tmp_path / "test_data_set_0", [numbered(0, 2)])
    before = digest()
    (folder / "output_0.pb").write_bytes(b"another")
    assert digest() == before
    write_set(folder, [numbered(1, 2)])
    assert digest() != before


def test_memory_is_that_of_one_set(tmp_path: Path) -> None:
    for number in range(16):
        write_set(tmp_path / f"test_data_set_{number}", [np.full((8, 1 << 15), number, np.float32)])  # 1 MiB
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, 1 << 15))])
    tracemalloc.start()
    assert sum(len(batch.index) for batch in samples.batches(4)) == 128
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20  # the file, its tensor, its values, two batches; all of them would be 16 MiB


# What is refused


def raw(folder: Path, tensor: TensorProto | bytes) -> Path:
    folder.mkdir(exist_ok=True)
    content = tensor if isinstance(tensor, bytes) else tensor.SerializeToString()
    (folder / "input_0.pb").write_bytes(content)
    return folder


def tensor_of(dims: Sequence[int], content: bytes = bytes(24), data_type: int = TensorProto.FLOAT) -> TensorProto:
    return TensorProto(dims=dims, raw_data=content, data_type=data_type)


def external() -> TensorProto:
    tensor = tensor_of((1, 3, 2), b"")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret")
    return tensor


REFUSED = {
    "no protobuf": (b"\xff" * 40, r"input_0\.pb cannot be read \(.*pars.*\); check it"),
    "empty": (b"", r"input_0\.pb holds no tensor of numbers"),
    "text": (numpy_helper.from_array(np.array(["a"])), r"input_0\.pb holds no tensor of numbers"),
    "another file": (external(), r"input_0\.pb names another file for its values, which is not followed"),
    "negative": (tensor_of((-1, 3, 2)), r"input_0\.pb has a tensor of shape \(-1, 3, 2\); the file is damaged"),
    "too large": (tensor_of((1 << 40, 3, 2)), r"input_0\.pb cannot be read \(.*\); check it"),
    "too small": (tensor_of((1, 3, 2), bytes(20)), r"input_0\.pb cannot be read \(.*\); check it"),
    "unknown type": (tensor_of((1, 3, 2), data_type=99), r"input_0\.pb cannot be read \(.*\); check it"),
    "scalar": (tensor_of((), bytes(4)), r"input_0\.pb holds a scalar, but the model wants samples along"),
    "shape": (tensor_of((1, 2, 3)), r"array 'x' has shape \(1, 2, 3\), but the model wants \(samples, 3, 2\)"),
    "type": (numpy_helper.from_array(np.ones((1, 3, 2), np.uint8)), r"array 'x' is uint8, but the model wants float32"),
}


@pytest.mark.parametrize(("tensor", "message"), REFUSED.values(), ids=REFUSED)
def test_tensors_that_do_not_fit(tmp_path: Path, tensor: TensorProto | bytes, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        open_samples(raw(tmp_path, tensor), [X])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("count", [1, 3])
def test_another_number_of_inputs(tmp_path: Path, count: int) -> None:
    folder = write_set(tmp_path / "test_data_set_0", [numbered(0, 1)] * count)
    message = r"_0 has input_0\.pb.*, the model wants input_0\.pb for 'x' \(samples, 3, 2\), input_1\.pb for 'ids'"
    with pytest.raises(DataError, match=message):
        open_samples(folder, [X, IDS])


def test_a_set_without_inputs(tmp_path: Path) -> None:
    (tmp_path / "test_data_set_0").mkdir()
    with pytest.raises(DataError, match=r"_0 has no input, the model wants input_0\.pb for 'x'"):
        open_samples(tmp_path, [X])


def test_sets_beside_numpy_files(tmp_path: Path) -> None:
    write_set(tmp_path / "test_data_set_0", [numbered(0, 1)])
    np.savez(tmp_path / "test_data_0.npz", inputs=numbered(0, 1))
    with pytest.raises(DataError, match=r"both \.npz and test_data_set files: test_data_0\.npz, test_data_set_0; keep"):
        open_samples(tmp_path, [X])


def test_files_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TENSOR_LIMIT", 30)
    with pytest.raises(DataError, match=r"input_0\.pb has more than 30 bytes; save the samples as \.npz files"):
        open_samples(raw(tmp_path, tensor_of((1, 3, 2))), [X])


def test_a_file_that_changes_after_opening(tmp_path: Path) -> None:
    samples = open_samples(raw(tmp_path, tensor_of((1, 3, 2))), [X])
    raw(tmp_path, tensor_of((1, 2, 3)))
    with pytest.raises(DataError, match=r"cannot be read \(input_0\.pb has changed\)"):
        list(samples.batches(1))


def test_random_damage_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = np.frombuffer(numpy_helper.from_array(numbered(0, 2), "x").SerializeToString(), np.uint8)
    for trial in range(300):
        bad = good.copy()
        places = rng.integers(0, 20 if trial % 2 else len(bad), size=1 + trial % 4)
        bad[places] = rng.integers(0, 256, size=len(places))
        raw(tmp_path, bad[: None if trial % 3 else int(rng.integers(0, len(bad)))].tobytes())
        try:
            list(open_samples(tmp_path, [X]).batches(2))
        except DataError as error:
            assert "\n" not in str(error)  # noqa: PT017 - damage need not be noticed
