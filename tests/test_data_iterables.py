"""Sources as plain data: paths, and what a program makes, written to files."""

import itertools
import json
import os
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_files import F32, I64, IDS, X, numbered, numbers, write_shards

from onnxqt.data import (
    PRESETS,
    DataSource,
    InputSpec,
    Preprocessing,
    Samples,
    is_function,
    is_located,
    locate,
    open_samples,
)
from onnxqt.data import iterables as module
from onnxqt.errors import DataError, UsageError
from onnxqt.numerics import Array

Item = dict[str, Array]


def items(counts: list[int]) -> Iterator[Item]:
    """Batches, numbered throughout."""
    first = 0
    for count in counts:
        yield {"x": numbered(first, count), "labels": np.arange(first, first + count)}
        first += count


def written(data: Any, folder: Path, *specs: InputSpec) -> Samples:
    return open_samples(locate(data, specs or [X], folder), specs or [X])


def all_numbers(samples: Samples) -> list[int]:
    return [number for batch in samples.batches(4) for number in numbers(batch)]


# Plain data


@pytest.mark.parametrize("preprocessing", [None, PRESETS["imagenet"], Preprocessing("p", crop=(3, 4), colour="bgr")])
def test_a_source_goes_through_json(preprocessing: Preprocessing | None) -> None:
    source = DataSource("/data/images", preprocessing)
    assert DataSource.from_plain(json.loads(json.dumps(source.plain()))) == source


def test_another_process_opens_the_same(tmp_path: Path) -> None:
    for number in range(3):
        image = np.random.default_rng(number).integers(0, 256, (6, 7, 3), np.uint8)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    source = DataSource(str(tmp_path), Preprocessing("p", resize=(4, 4), colour="bgr", mean=(3.0,)))
    spec = InputSpec("x", F32, (None, 3, 4, 4))
    program = (
        "import json, sys, numpy as np\n"
        "from onnxqt.data import DataSource, InputSpec, open_samples\n"
        "source = DataSource.from_plain(json.loads(sys.argv[1]))\n"
        "samples = open_samples(source, [InputSpec('x', np.dtype('f4'), (None, 3, 4, 4))])\n"
        "print(samples.sha256(), float(next(samples.batches(3)).inputs['x'].sum(dtype='f8')))\n"
    )
    command = [sys.executable, "-c", program, json.dumps(source.plain())]
    sha256, total = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    samples = open_samples(source, [spec])
    assert sha256 == samples.sha256()
    assert float(total) == next(samples.batches(3)).inputs["x"].sum(dtype=np.float64)


def test_paths_are_left_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_shards(tmp_path / "data", [2])
    monkeypatch.chdir(tmp_path)
    for data in ("data", Path("data"), DataSource(str(folder))):
        assert is_located(data)
        assert locate(data, [X], tmp_path / "out") == DataSource(str(folder))
    assert locate("data", [X], tmp_path / "out", PRESETS["cifar"]) == DataSource(str(folder), PRESETS["cifar"])
    chosen = locate(DataSource("a", PRESETS["none"]), [X], tmp_path / "out", PRESETS["cifar"])
    assert chosen == DataSource("a", PRESETS["cifar"])
    assert locate(chosen, [X], tmp_path / "out") is chosen
    assert not (tmp_path / "out").exists()


# What is written


def test_arrays_in_memory(tmp_path: Path) -> None:
    data = {"x": numbered(0, 5), "labels": np.arange(5), "labels:file": np.ones((5, 2))}
    assert not is_located(data)
    samples = written(data, tmp_path / "out")
    (batch,) = samples.batches(5)
    assert numbers(batch) == list(range(5))
    assert {target.name for target in samples.targets} == {"labels", "labels:file"}
    assert os.listdir(tmp_path / "out") == ["samples-000000.npz"]


def test_an_input_called_file(tmp_path: Path) -> None:
    """`numpy.savez(file, **arrays)` cannot save such an array."""
    spec = InputSpec("file", F32, (None, 2))
    (batch,) = written({"file": np.ones((3, 2))}, tmp_path, spec).batches(3)
    assert batch.inputs["file"].shape == (3, 2)


def test_batches(tmp_path: Path) -> None:
    samples = written(items([3, 1, 5]), tmp_path)
    assert (all_numbers(samples), samples.has_labels) == (list(range(9)), True)


def test_single_samples_and_lists_of_them(tmp_path: Path) -> None:
    single = [{"x": numbered(number, 1)[0], "labels": np.array(number)} for number in range(5)]
    samples = written(single, tmp_path)
    assert [batch.labels.tolist() for batch in samples.batches(3) if batch.labels is not None] == [[0, 1, 2], [3, 4]]
    assert all_numbers(samples) == list(range(5))


def test_names_that_are_none_of_the_model(tmp_path: Path) -> None:
    single = [{"image": numbered(number, 1)[0], "ids": np.full(4, number)} for number in range(3)]
    (batch,) = written(single, tmp_path, X, IDS).batches(9)
    assert numbers(batch) == batch.inputs["ids"][:, 0].tolist() == [0, 1, 2]


def test_a_function(tmp_path: Path) -> None:
    def samples() -> Iterator[Item]:
        return items([2, 2])

    assert not is_located(samples)
    assert all_numbers(written(samples, tmp_path)) == [0, 1, 2, 3]


def test_a_model_without_a_batch_axis(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, (3, 2)), InputSpec("shape", I64, (2,))]
    single = [{"x": np.full((3, 2), number, np.float32), "shape": np.array([number, 1])} for number in range(3)]
    batches = list(written(single, tmp_path, *specs).batches(1))
    assert [batch.inputs["shape"].tolist() for batch in batches] == [[0, 1], [1, 1], [2, 1]]


def test_files_are_small_and_equal_samples_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_LIMIT", 5 * (24 + 8))
    for folder in ("a", "b"):
        samples = written(items([2, 2, 12, 1]), tmp_path / folder)
        assert all_numbers(samples) == list(range(17))
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("a", "b"))
    assert first == second
    sizes = [len(np.load(tmp_path / "a" / name)["x"]) for name in sorted(first)]
    assert sizes == [4, 5, 5, 3]


def test_samples_of_several_shapes(tmp_path: Path) -> None:
    spec = InputSpec("x", F32, (None, None))
    data = [{"x": np.full(size, size, np.float32)} for size in (3, 3, 5)]
    batches = list(written(data, tmp_path, spec).batches(1))
    assert [batch.inputs["x"].shape for batch in batches] == [(1, 3), (1, 3), (1, 5)]


def test_memory_is_that_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_LIMIT", 1 << 20)
    spec = InputSpec("x", F32, (None, 1 << 15))
    made = ({"x": np.full(1 << 15, number, np.float32)} for number in range(256))  # 32 MiB
    tracemalloc.start()
    source = locate(made, [spec], tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 << 20  # the samples of a file, the same put together, and what is written
    assert open_samples(source, [spec]).count == 256


def test_earlier_files_are_replaced_only_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_LIMIT", 1)
    (tmp_path / "notes.txt").write_text("mine")
    written(items([1] * 4), tmp_path)

    def broken() -> Iterator[Item]:
        yield {"x": numbered(7, 1)}
        raise KeyError("label")

    with pytest.raises(DataError, match=r"'broken' raised KeyError: 'label'; correct it"):
        locate(broken, [X], tmp_path)
    assert all_numbers(open_samples(tmp_path, [X])) == [0, 1, 2, 3]
    assert all_numbers(written(items([1] * 2), tmp_path)) == [0, 1]
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "samples-000000.npz", "samples-000001.npz"]


# Functions by name

MODULE = """
import numpy as np

mark = open("imported", "w")
number = 3

def samples():
    for number in range(4):
        yield {"x": np.full((3, 2), number, np.float32)}

def broken():
    raise ValueError("no file")
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_samples.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_samples", raising=False)
    return tmp_path


def test_a_function_by_its_name(here: Path) -> None:
    before = list(sys.path)
    assert is_function("my_samples:samples")
    assert not is_located("my_samples:samples")
    assert not (here / "imported").exists()  # to ask is not to import
    assert all_numbers(written("my_samples:samples", here / "out")) == [0, 1, 2, 3]
    assert sys.path == before


def test_nothing_is_imported_for_opening(here: Path) -> None:
    with pytest.raises(DataError, match=r"my_samples:samples does not exist; pass a directory"):
        open_samples("my_samples:samples", [X])
    with pytest.raises(DataError, match=r"my_samples:samples does not exist"):
        open_samples(DataSource.from_plain({"path": "my_samples:samples"}), [X])
    assert not (here / "imported").exists()


def test_a_path_goes_before_a_function(here: Path) -> None:
    write_shards(here / "my_samples:samples", [2])
    assert not is_function("my_samples:samples")
    assert all_numbers(written("my_samples:samples", here / "out")) == [0, 1]
    assert not (here / "imported").exists()


@pytest.mark.parametrize("text", ["calib", "a/b:c", "a.b:c.d", "a:b:c", ":a", "a:", "a b:c", "../a:b"])
def test_what_is_no_function(text: str) -> None:
    assert not is_function(text)


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("no_such_module:f", UsageError, r"cannot import 'no_such_module' of .*ModuleNotFoundError: No module named"),
        ("my_samples:nothing", UsageError, r"'my_samples' has no function 'nothing': define one that gives dicts"),
        ("my_samples:number", UsageError, r"'my_samples' has no function 'number'"),
        ("my_samples:broken", DataError, r"my_samples:broken raised ValueError: no file; correct it"),
    ],
)
def test_functions_that_do_not_work(here: Path, text: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        locate(text, [X], here / "out")


def test_a_module_that_does_not_load(here: Path) -> None:
    (here / "my_samples.py").write_text("1 / 0")
    with pytest.raises(UsageError, match=r"cannot import 'my_samples' of .*ZeroDivisionError: division by zero"):
        locate("my_samples:samples", [X], here / "out")


def test_a_text_that_names_no_function() -> None:
    with pytest.raises(UsageError, match=r"'a\.py:b c' names no function: write module:function"):
        module.function_named("a.py:b c")


# What is refused


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], r"'list' gives no samples; give at least one dict of arrays"),
        (
            [(ones := np.ones((3, 2), np.float32), 1)],
            r"'list', item 0, is a tuple; give a dict of arrays by input name",
        ),
        (
            [{"x": ones[None]}, {"x": ones[None, :2]}],
            r"'list', item 1: array 'x' has shape \(1, 2, 2\), but the model wants",
        ),
        ([{"x": ones}, {"y": ones[:2]}], r"'list', item 1 has no array for the model's input 'x'"),
        ([{"x": [[1.0], [1.0, 2.0]]}], r"'list', item 0 cannot be read \(.*inhomogeneous"),
        ([{"x": np.full((3, 2), None)}], r"array 'x' is object, but the model wants float32"),
        ([{"x": ones, "labels": "cat"}], r"array 'labels' is <U3 of shape \(1,\), but labels are numbers"),
        ([{"x": ones * np.nan}], r"'list', item 0: array 'x' is NaN, infinite or too large for float32 in sample 0"),
        (3, r"'int' raised TypeError: 'int' object is not callable; correct it"),
    ],
)
def test_items_that_do_not_fit(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        locate(data, [X], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not any((tmp_path / "out").iterdir())


def test_an_iterable_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOTAL_LIMIT", 1000)
    with pytest.raises(DataError, match=r"gives more than 1000 bytes; let it end earlier"):
        locate(({"x": numbered(number, 1)} for number in itertools.count()), [X], tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_preprocessing_for_arrays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--preprocess cifar is for files of images, but 'items' gives arrays"):
        locate(items([1]), [X], tmp_path, PRESETS["cifar"])


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(
        DataError, match=r"cannot write samples into .*out \(File exists\); free the disk or choose another --out"
    ):
        locate(items([1]), [X], tmp_path / "out")
