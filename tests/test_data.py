import os
import tracemalloc
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_files import F32, I32, I64, IDS, X, numbered, numbers, same, write_npz, write_shards

from onnxqt.data import InputSpec, check_labels, fixed_batch, has_batch_axis, open_samples
from onnxqt.data import samples as stream
from onnxqt.errors import DataError, UsageError
from onnxqt.numerics import Array

# Opening and reading in order


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_directory_in_order_across_files(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "b.npz", x=numbered(3, 4), labels=np.arange(3, 7))
    save(tmp_path / "a.npz", x=numbered(0, 3), labels=np.arange(0, 3))
    samples = open_samples(tmp_path, [X])
    assert (samples.source, samples.count, samples.has_labels) == (str(tmp_path), 7, True)
    batches = list(samples.batches(2))
    assert [numbers(batch) for batch in batches] == [[0, 1], [2, 3], [4, 5], [6]]
    whole = np.concatenate([batch.inputs["x"] for batch in batches])
    assert np.array_equal(whole, np.concatenate([numbered(0, 3), numbered(3, 4)]))
    for batch in batches:
        assert batch.inputs["x"].dtype == F32
        assert batch.labels is not None
        assert batch.labels.dtype == batch.index.dtype == I64
        assert batch.labels.tolist() == batch.index.tolist() == numbers(batch)


def test_batch_larger_than_the_set(tmp_path: Path) -> None:
    (batch,) = open_samples(write_shards(tmp_path, [1, 2, 1]), [X]).batches(100)
    assert numbers(batch) == [0, 1, 2, 3]


def test_labels_of_every_kind(tmp_path: Path) -> None:
    """Labels of a named output, real values, and sizes that differ between files; `labels` alone is class numbers."""
    boxes, masks = numbered(0, 5), np.arange(20).reshape(5, 2, 2) % 2 == 0
    write_npz(
        tmp_path / "a.npz", x=numbered(0, 3), labels=np.arange(3), **{"labels:b": boxes[:3], "labels:m": masks[:3]}
    )
    second = {"labels:b": boxes[3:].astype(np.float16), "labels:m": np.ones((2, 2, 7), bool)}
    write_npz(tmp_path / "b.npz", x=numbered(3, 2), labels=np.arange(3, 5), **second)
    samples = open_samples(tmp_path, [X])
    assert samples.has_labels
    assert {target.name: (target.dtype, target.shape) for target in samples.targets} == {
        "labels": (I64, (None,)),
        "labels:b": (F32, (None, 3, 2)),
        "labels:m": (I64, (None, 2, None)),
    }
    batch = next(samples.batches(3))
    assert batch.labels is batch.targets["labels"]
    assert list(batch.inputs) == ["x"]
    np.testing.assert_array_equal(batch.targets["labels:b"], boxes[:3].astype(np.float32), strict=True)
    np.testing.assert_array_equal(batch.targets["labels:m"], masks[:3].astype(np.int64), strict=True)


@pytest.mark.parametrize("labels", [np.ones(3, np.float32), np.ones((3, 1), np.int64)], ids=["real", "two axes"])
def test_labels_that_are_no_class_numbers(labels: Array) -> None:
    samples = open_samples({"x": numbered(0, 3), "labels": labels}, [X])
    (batch,) = samples.batches(3)
    assert not samples.has_labels
    assert batch.labels is None
    np.testing.assert_array_equal(batch.targets["labels"], labels, strict=True)


def test_npy_directory_without_labels(tmp_path: Path) -> None:
    np.save(tmp_path / "0.npy", numbered(0, 2))
    np.save(tmp_path / "1.npy", numbered(2, 3))
    samples = open_samples(str(tmp_path), [X])
    assert not samples.has_labels
    batches = list(samples.batches(4))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4]]
    assert batches[0].labels is None


def test_single_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(0, 2))
    np.savez(tmp_path / "a.NPZ", x=numbered(0, 2))
    os.rename(tmp_path / "a.NPZ.npz", tmp_path / "a.NPZ")
    for name in ("a.npy", "a.NPZ"):
        assert [numbers(batch) for batch in open_samples(tmp_path / name, [X]).batches(9)] == [[0, 1]]


def test_arrays_in_memory() -> None:
    samples = open_samples({"x": numbered(0, 5, np.float64), "labels": np.arange(5, dtype=np.uint8)}, [X])
    assert (samples.count, samples.has_labels) == (5, True)
    batches = list(samples.batches(3))
    assert [numbers(batch) for batch in batches] == [[0, 1, 2], [3, 4]]
    assert batches[0].inputs["x"].dtype == F32
    assert batches[0].labels is not None
    assert batches[0].labels.dtype == I64


def test_batches_do_not_alias_arrays_in_memory() -> None:
    x = numbered(0, 4)
    for batch in open_samples({"x": x}, [X]).batches(2):
        batch.inputs["x"][:] = -1
    assert np.array_equal(x, numbered(0, 4))


def test_several_inputs_of_one_file(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", ids=np.arange(12).reshape(3, 4), x=numbered(0, 3))
    (batch,) = open_samples(tmp_path, [X, IDS]).batches(3)
    assert list(batch.inputs) == ["ids", "x"]
    assert np.array_equal(batch.inputs["ids"], np.arange(12).reshape(3, 4))


def test_input_names_with_punctuation(tmp_path: Path) -> None:
    spec = InputSpec("serving/input:0", F32, (None, 3, 2))
    write_npz(tmp_path / "a.npz", **{spec.name: numbered(0, 2)})
    (batch,) = open_samples(tmp_path, [spec]).batches(2)
    assert np.array_equal(batch.inputs[spec.name], numbered(0, 2))


def test_model_input_called_labels_is_an_input(tmp_path: Path) -> None:
    spec = InputSpec("labels", F32, (None, 3, 2))
    samples = open_samples(write_npz(tmp_path / "a.npz", labels=numbered(0, 2)), [spec])
    (batch,) = samples.batches(2)
    assert not samples.has_labels
    assert batch.labels is None
    assert np.array_equal(batch.inputs["labels"], numbered(0, 2))


@pytest.mark.parametrize("name", ["arr_0", "image"])
def test_an_array_of_another_name_that_alone_fits(tmp_path: Path, name: str) -> None:
    arrays = {name: numbered(0, 3), "ids": np.arange(12).reshape(3, 4), "labels": np.arange(3)}
    (batch,) = open_samples(write_npz(tmp_path / "a.npz", **arrays), [X, IDS]).batches(9)
    assert set(batch.inputs) == {"x", "ids"}
    np.testing.assert_array_equal(batch.inputs["x"], arrays[name], strict=True)
    assert batch.labels is not None
    assert batch.labels.tolist() == [0, 1, 2]


def test_names_go_before_shapes() -> None:
    """Both arrays fit both inputs; each goes where its name says, though the order is the other way round."""
    specs = [InputSpec("a", F32, (None, 2)), InputSpec("b", F32, (None, 2))]
    (batch,) = open_samples({"b": np.ones((3, 2)), "a": np.zeros((3, 2))}, specs).batches(3)
    assert batch.inputs["a"].max() == 0
    assert batch.inputs["b"].min() == 1


def test_a_npy_file_per_input(tmp_path: Path) -> None:
    spec = InputSpec("ids/0:1", I64, (None, 4))
    np.save(tmp_path / "x.npy", numbered(0, 5))
    np.save(tmp_path / "ids_0_1.npy", np.arange(20).reshape(5, 4))
    np.save(tmp_path / "labels.npy", np.arange(5))
    samples = open_samples(tmp_path, [X, spec])
    assert (samples.count, samples.has_labels) == (5, True)
    for batch in islice(samples.shuffled(2, seed=0), 4):
        assert batch.labels is not None
        assert batch.labels.tolist() == numbers(batch)
        np.testing.assert_array_equal(batch.inputs[spec.name], batch.labels[:, None] * 4 + np.arange(4), strict=True)


def test_a_npy_file_of_another_name_holds_samples(tmp_path: Path) -> None:
    """`x.npy` beside `y.npy`: these are two files of samples of the only input, as `y` is not another one."""
    np.save(tmp_path / "x.npy", numbered(0, 2))
    np.save(tmp_path / "y.npy", numbered(2, 3))
    assert open_samples(tmp_path, [X]).count == 5


def test_other_entries_are_passed_over_and_links_followed(tmp_path: Path) -> None:
    outside = write_shards(tmp_path / "outside", [2])
    directory = tmp_path / "calib"
    (directory / "sub.npz").mkdir(parents=True)
    write_npz(directory / "sub.npz" / "deep.npz", x=numbered(50, 1))
    (directory / "README.txt").write_text("no samples")
    (directory / "._a.npz").write_bytes(b"resource fork")
    (directory / "a.npz").symlink_to(outside / "shard00.npz")
    assert [numbers(batch) for batch in open_samples(directory, [X]).batches(9)] == [[0, 1]]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", ">f2"])
@pytest.mark.parametrize("kind", ["npz", "npy"])
def test_byte_order_memory_order_and_width(tmp_path: Path, order: Any, dtype: str, kind: str) -> None:
    x = np.array(numbered(0, 5, dtype), order=order)
    if kind == "npz":
        np.savez_compressed(tmp_path / "a.npz", x=x)
    else:
        np.save(tmp_path / "a.npy", x)
    samples = open_samples(tmp_path, [X])
    read = np.concatenate([batch.inputs["x"] for batch in samples.batches(2)])
    assert read.dtype == F32
    assert read.dtype.isnative
    assert np.array_equal(read, x.astype(np.float32))
    assert np.array_equal(next(samples.take(2).batches(2)).inputs["x"], x.astype(np.float32)[[1, 3]])


@pytest.mark.parametrize(("have", "want"), [(np.int32, I64), (">i8", I32), (np.int64, I32), (np.bool_, np.dtype(bool))])
def test_integers_and_booleans(tmp_path: Path, have: Any, want: np.dtype[Any]) -> None:
    ids = np.array([[1, 0, 1, 0], [0, 0, 1, 1]], have)
    (batch,) = open_samples(write_npz(tmp_path / "a.npz", ids=ids), [InputSpec("ids", want, (None, 4))]).batches(2)
    assert batch.inputs["ids"].dtype == want
    assert np.array_equal(batch.inputs["ids"], ids)


def test_npy_format_2(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as stream:
        np.lib.format.write_array(stream, numbered(0, 2), version=(2, 0))
    (batch,) = open_samples(tmp_path, [X]).batches(2)
    assert np.array_equal(batch.inputs["x"], numbered(0, 2))


def test_free_dims_may_differ_between_batches_but_not_within(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=np.ones((2, 5), np.float32))
    write_npz(tmp_path / "b.npz", x=np.ones((2, 7), np.float32))
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, None))])
    assert [batch.inputs["x"].shape for batch in samples.batches(2)] == [(2, 5), (2, 7)]
    with pytest.raises(DataError, match=r"b\.npz: array 'x' has samples of shape \(7,\).*\(5,\); .*--batch-size 1"):
        list(samples.batches(4))


# Fixed batch axis


def test_padding_repeats_the_last_sample(tmp_path: Path) -> None:
    samples = open_samples(write_shards(tmp_path, [3, 2]), [InputSpec("x", F32, (4, 3, 2))])
    first, last = samples.batches(4, pad=True)
    assert numbers(first) == [0, 1, 2, 3]
    assert numbers(last) == [4, 4, 4, 4]
    assert last.index.tolist() == [4]
    assert last.labels is not None
    assert last.labels.tolist() == [4]


def test_padding_nothing_when_the_count_is_a_multiple() -> None:
    batches = list(open_samples({"x": numbered(0, 4)}, [X]).batches(2, pad=True))
    assert [numbers(batch) for batch in batches] == [[0, 1], [2, 3]]


def test_fixed_batch() -> None:
    assert fixed_batch([X, IDS]) is None
    assert fixed_batch([X, InputSpec("y", F32, (8, 1)), InputSpec("z", F32, (8, 3))]) == 8


I64 = np.dtype(np.int64)
WITHOUT_BATCH_AXIS = {
    "scalar": [InputSpec("x", F32, (None, 2)), InputSpec("y", F32, ())],
    "different": [InputSpec("x", F32, (3, 2)), InputSpec("y", F32, (2,))],
    "shape": [InputSpec("x", F32, (2, 2)), InputSpec("y", I64, (2,))],
    "empty": [InputSpec("x", F32, (0, 2))],
}


@pytest.mark.parametrize("specs", WITHOUT_BATCH_AXIS.values(), ids=WITHOUT_BATCH_AXIS)
def test_models_without_a_batch_axis_take_one_sample_at_a_time(specs: list[InputSpec]) -> None:
    assert not has_batch_axis(specs)
    assert fixed_batch(specs) == 1
    arrays = {spec.name: np.random.default_rng(0).random((5, *(n or 0 for n in spec.shape))) for spec in specs}
    arrays = {spec.name: arrays[spec.name].astype(spec.dtype) for spec in specs}
    samples = open_samples(arrays, specs)
    batches = list(samples.batches(1, pad=True))
    assert (samples.stacked, samples.count, len(batches)) == (True, 5, 5)
    for number, batch in enumerate(batches):
        assert (batch.fed, batch.index.tolist()) == (0, [number])
        for name, array in arrays.items():
            np.testing.assert_array_equal(batch.inputs[name], array[number])
    output = np.zeros((4, 3))
    assert batches[0].real(output) is output


def test_a_batch_axis() -> None:
    assert has_batch_axis([X, IDS])
    assert has_batch_axis([InputSpec("x", F32, (None, 3)), InputSpec("ids", I64, (None,))])
    assert has_batch_axis([InputSpec("x", F32, (1, 3)), InputSpec("length", I64, (1,))])


def test_labels_need_a_batch_axis() -> None:
    specs = WITHOUT_BATCH_AXIS["different"]
    arrays = {"x": np.ones((4, 3, 2)), "y": np.ones((4, 2)), "labels": np.zeros(4, np.int64)}
    with pytest.raises(DataError, match=r"has an array 'labels', but the model has no batch axis.*remove it"):
        open_samples(arrays, specs)


def test_outputs_lose_the_rows_of_repeated_samples() -> None:
    samples = open_samples({"x": np.ones((5, 3))}, [InputSpec("x", F32, (4, 3))])
    first, last = samples.batches(4, pad=True)
    rows = np.arange(8).reshape(4, 2)
    assert first.real(rows) is rows
    np.testing.assert_array_equal(last.real(rows), rows[:1])
    scalar, other = np.array(1.0), np.zeros((7, 2))
    assert last.real(scalar) is scalar
    assert last.real(other) is other


def test_models_that_cannot_be_fed() -> None:
    with pytest.raises(DataError, match="the model has no inputs"):
        open_samples({}, [])


# Shuffled


def test_shuffled_epochs_cover_every_sample_once(tmp_path: Path) -> None:
    samples = open_samples(write_shards(tmp_path, [5, 1, 7, 3]), [X])
    stream = samples.shuffled(3, seed=1)
    epochs = [list(islice(stream, 5)) for _ in range(3)]  # 16 samples: 5 batches and one sample dropped
    orders = []
    for epoch in epochs:
        for batch in epoch:
            assert batch.labels is not None
            assert numbers(batch) == batch.index.tolist() == batch.labels.tolist()
        orders.append([number for batch in epoch for number in numbers(batch)])
        assert len(set(orders[-1])) == 15
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert orders[0] != sorted(orders[0])


@pytest.mark.parametrize("window", [1, 6 * 24, 1 << 20])
def test_windows_keep_coverage_and_batches_cross_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(stream, "WINDOW_LIMIT", window)
    samples = open_samples(write_shards(tmp_path, [2, 3, 1, 4, 2]), [X])
    order = [number for batch in islice(samples.shuffled(4, seed=0), 3) for number in numbers(batch)]
    assert sorted(order) == list(range(12))


def test_shuffled_holds_one_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(tmp_path, [])
    for shard in range(16):
        write_npz(tmp_path / f"{shard}.npz", x=np.zeros((8, 1 << 15), np.float32))  # 1 MiB
    monkeypatch.setattr(stream, "WINDOW_LIMIT", 2 << 20)
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, 1 << 15))])
    tracemalloc.start()
    for _ in islice(samples.shuffled(4, seed=0), 40):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20  # the window, what is read, two batches; all shards would be 16 MiB


def test_shuffled_leaves_a_large_npy_file_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((512, 1 << 14), np.float32)  # 32 MiB
    x[:, 0] = np.arange(512)
    np.save(tmp_path / "x.npy", x)
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, 1 << 14))])
    whole = [batch.inputs["x"][:, 0].tolist() for batch in islice(samples.shuffled(8, seed=3), 64)]
    monkeypatch.setattr(stream, "WINDOW_LIMIT", 1 << 20)
    tracemalloc.start()
    parts = [batch.inputs["x"][:, 0].tolist() for batch in islice(samples.shuffled(8, seed=3), 64)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert parts == whole
    assert sorted(number for part in parts for number in part) == list(range(512))
    assert peak < 8 << 20  # two batches of 512 KiB and what is read


@pytest.mark.parametrize("memory", [False, True])
def test_shuffled_is_deterministic_and_resumable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: bool) -> None:
    monkeypatch.setattr(stream, "WINDOW_LIMIT", 6 * 24)
    source: Path | Mapping[str, Array] = write_shards(tmp_path, [5, 1, 7, 3])
    if memory:
        source = {"x": numbered(0, 16)}
    samples = open_samples(source, [X])
    whole = list(islice(samples.shuffled(3, seed=7), 14))
    for skip in (0, 1, 4, 5, 6, 11):
        resumed = list(islice(open_samples(source, [X]).shuffled(3, seed=7, skip=skip), 14 - skip))
        assert all(same(a, b) for a, b in zip(whole[skip:], resumed, strict=True))
    assert not all(same(a, b) for a, b in zip(whole, samples.shuffled(3, seed=8), strict=False))


def test_skipping_reads_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = open_samples(write_shards(tmp_path, [4] * 8), [X])
    monkeypatch.setattr(stream, "WINDOW_LIMIT", 1)
    opened: list[str] = []
    zip_file = zipfile.ZipFile

    def spy(path: Path) -> zipfile.ZipFile:
        opened.append(path.name)
        return zip_file(path)

    monkeypatch.setattr(zipfile, "ZipFile", spy)
    next(samples.shuffled(4, seed=0, skip=8 * 1000 + 7))
    assert len(opened) == 1


def test_shuffled_needs_a_full_batch() -> None:
    samples = open_samples({"x": numbered(0, 3)}, [X])
    with pytest.raises(DataError, match=r"number of samples is 3, but one batch needs 4; .* --batch-size 3"):
        samples.shuffled(4, seed=0)


# Subsets


def test_split_is_disjoint_complete_and_spread(tmp_path: Path) -> None:
    samples = open_samples(write_shards(tmp_path, [10, 10, 10, 10]), [X])
    rest, held = samples.split(0.1, limit=100)
    a, b = ([n for batch in part.batches(3) for n in numbers(batch)] for part in (rest, held))
    assert b == [5, 15, 25, 35]
    assert sorted(a + b) == list(range(40))
    assert (rest.count, held.count) == (36, 4)
    first = [batch.index.tolist() for batch in held.batches(4)]
    assert first == [b]
    again = samples.split(0.1, limit=100)
    assert np.array_equal(again[1]._chosen, held._chosen)


@pytest.mark.parametrize(
    ("count", "fraction", "limit", "held"),
    [(100, 0.5, 7, 7), (10, 0.01, 5, 1), (2, 0.99, 5, 1), (10, 0.99, 50, 9)],
)
def test_split_sizes(count: int, fraction: float, limit: int, held: int) -> None:
    rest, part = open_samples({"x": numbered(0, count)}, [X]).split(fraction, limit)
    assert (rest.count, part.count) == (count - held, held)


def test_take_is_evenly_spaced_and_nests(tmp_path: Path) -> None:
    samples = open_samples(write_shards(tmp_path, [10, 1, 9]), [X])
    part = samples.take(5)
    assert [n for batch in part.batches(2) for n in numbers(batch)] == [2, 6, 10, 14, 18]
    assert [n for batch in part.take(2).batches(2) for n in numbers(batch)] == [6, 14]
    assert samples.take(1000).count == 20


def test_shuffled_subset_stays_in_the_subset(tmp_path: Path) -> None:
    part = open_samples(write_shards(tmp_path, [10, 1, 9]), [X]).take(6)
    chosen = part._chosen.tolist()
    order = [n for batch in islice(part.shuffled(2, seed=0), 3) for n in numbers(batch)]
    assert sorted(order) == chosen


def test_splitting_one_sample() -> None:
    with pytest.raises(DataError, match="holds 1 sample, which cannot be split in two; add samples"):
        open_samples({"x": numbered(0, 1)}, [X]).split(0.5, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.batches(0), "batch size is 0; pass a number of at least 1"),
        (lambda s: s.shuffled(0, 0), "batch size is 0"),
        (lambda s: s.shuffled(1, -1), "seed is -1; pass a number of at least 0"),
        (lambda s: s.shuffled(1, 0, skip=-1), "number of batches to skip is -1"),
        (lambda s: s.take(0), "limit of samples is 0"),
        (lambda s: s.split(0.5, 0), "limit of held-out samples is 0"),
        (lambda s: s.split(0, 1), "held-out fraction is 0; pass a number between 0 and 1"),
        (lambda s: s.split(1.0, 1), "held-out fraction is 1.0"),
    ],
)
def test_arguments_out_of_range(call: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        call(open_samples({"x": numbered(0, 4)}, [X]))


# Hash


def test_sha256_depends_on_names_contents_and_choice(tmp_path: Path) -> None:
    def digest(source: Path) -> str:
        return open_samples(source, [X]).sha256()

    a = write_shards(tmp_path / "a", [3, 4])
    before = digest(a)
    moved = a.rename(tmp_path / "moved")
    assert digest(moved) == before
    samples = open_samples(moved, [X])
    assert samples.take(7).sha256() == before
    assert len({before, samples.take(3).sha256(), *(part.sha256() for part in samples.split(0.3, 9))}) == 4
    (moved / "shard01.npz").rename(moved / "shard02.npz")
    renamed = digest(moved)
    write_npz(moved / "shard02.npz", x=numbered(9, 4), labels=np.arange(4))
    assert len({before, renamed, digest(moved)}) == 3


def test_sha256_of_arrays_in_memory() -> None:
    def digest(x: Array) -> str:
        return open_samples({"x": x}, [X]).sha256()

    x = numbered(0, 3)
    assert digest(x) == digest(np.asfortranarray(x))
    assert len({digest(x), digest(x + 1), digest(x.astype(np.float64)), digest(x[:2])}) == 4


# Memory


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_batches_stream_a_shard(tmp_path: Path, save: Any) -> None:
    rows, width = 1024, 16384  # 64 MiB
    x = np.zeros((rows, width), np.float32)
    x[:, 0] = np.arange(rows)
    save(tmp_path / "a.npz", x=x)
    del x
    tracemalloc.start()
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, width))])
    seen = [value for batch in samples.batches(16) for value in batch.inputs["x"][:, 0].tolist()]
    seen += next(samples.take(1).batches(1)).inputs["x"][:, 0].tolist()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seen == [*range(rows), rows // 2]
    assert peak < 8 << 20


def test_labels_are_checked_without_reading_the_inputs(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=np.zeros((64, 1 << 15), np.float32), labels=np.arange(64))  # 8 MiB
    samples = open_samples(tmp_path, [InputSpec("x", F32, (None, 1 << 15))])
    tracemalloc.start()
    check_labels(samples, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20
