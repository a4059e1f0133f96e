"""Tables of numbers as text: which columns feed what, what is refused."""

import os
import tracemalloc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_files import F32, I64

from onnxqt.data import InputSpec, Samples, open_samples
from onnxqt.data import samples as stream
from onnxqt.data import text_files as module
from onnxqt.errors import DataError
from onnxqt.numerics import Array

ROW = InputSpec("x", F32, (None, 3))
AGE = InputSpec("age", F32, (None, 1))
ZIP = InputSpec("zip", I64, (None,))


def floats(values: Any) -> Array:
    return np.array(values, np.float32)


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def table(folder: Path, *lines: str) -> Path:
    return write(folder / "a.csv", *lines)


def whole(source: Path, *specs: InputSpec) -> Any:
    (batch,) = open_samples(source, specs).batches(1000)
    return batch


# Columns


def test_all_columns_feed_one_input(tmp_path: Path) -> None:
    batch = whole(table(tmp_path, "a,b,label,c", "1,2.5,7,-3", "4,5,8,6e1"), ROW)
    np.testing.assert_array_equal(batch.inputs["x"], floats([[1, 2.5, -3], [4, 5, 60]]), strict=True)
    np.testing.assert_array_equal(batch.labels, np.array([7, 8]), strict=True)


@pytest.mark.parametrize("shape", [(None, 3, 2), (None, 3, None), (None, None, 2)])
def test_columns_take_the_shape_of_the_input(tmp_path: Path, shape: Any) -> None:
    batch = whole(table(tmp_path, "a,b,c,d,e,f", "0,1,2,3,4,5"), InputSpec("x", F32, shape))
    np.testing.assert_array_equal(batch.inputs["x"], np.arange(6, dtype=np.float32).reshape(1, 3, 2), strict=True)


def test_columns_of_the_names_of_inputs_in_any_order(tmp_path: Path) -> None:
    batch = whole(table(tmp_path, "zip,x_1,age,x_2,x_0", "98765432101,1,50,2,0"), ROW, AGE, ZIP)
    np.testing.assert_array_equal(batch.inputs["x"], floats([[0, 1, 2]]), strict=True)
    np.testing.assert_array_equal(batch.inputs["age"], floats([[50]]), strict=True)
    np.testing.assert_array_equal(batch.inputs["zip"], np.array([98765432101]), strict=True)


@pytest.mark.parametrize("form", ["x.{}", "x[{}]", "x_{}"])
@pytest.mark.parametrize("first", [0, 1])
def test_numbered_columns(tmp_path: Path, form: str, first: int) -> None:
    names = [form.format(number) for number in range(first, first + 12)]  # 10 sorts behind 9, not behind 1
    order = np.random.default_rng(0).permutation(12)
    path = table(tmp_path, ",".join([*(names[k] for k in order), "age"]), ",".join([*map(str, order), "3"]))
    batch = whole(path, InputSpec("x", F32, (None, 12)), AGE)
    np.testing.assert_array_equal(batch.inputs["x"], np.arange(12, dtype=np.float32)[None], strict=True)


def test_a_name_that_is_an_input_itself_is_no_number_of_another(tmp_path: Path) -> None:
    specs = [InputSpec("x", F32, (None, 1)), InputSpec("x_0", F32, (None, 1))]
    batch = whole(table(tmp_path, "x_0,x", "1,2"), *specs)
    assert (batch.inputs["x"].item(), batch.inputs["x_0"].item()) == (2, 1)


def test_labels_of_every_kind(tmp_path: Path) -> None:
    path = table(tmp_path, "a,labels:price,b,c,labels", "1,0.5,2,3,1", "4,7,5,6,0")
    batch = whole(path, ROW)
    np.testing.assert_array_equal(batch.targets["labels:price"], floats([0.5, 7]), strict=True)
    np.testing.assert_array_equal(batch.labels, np.array([1, 0]), strict=True)
    batch = whole(table(tmp_path, "a,b,c,label", "1,2,3,1", "1,2,3,1.5"), ROW)
    assert batch.labels is None
    np.testing.assert_array_equal(batch.targets["labels"], floats([1, 1.5]), strict=True)


def test_no_header(tmp_path: Path) -> None:
    batch = whole(table(tmp_path, "1,2,3", "4,5,6"), ROW)
    np.testing.assert_array_equal(batch.inputs["x"], floats([[1, 2, 3], [4, 5, 6]]), strict=True)


@pytest.mark.parametrize(
    "content",
    [b"a;b;c\n1;2;3\n", b"a\tb\tc\r\n1\t2\t3\r\n", b'\xef\xbb\xbf"a","b, too",c\n"1",2,3', b"\xef\xbb\xbf1,2,3\n\n\n"],
    ids=["semicolons", "tabs", "quotes and a byte order mark", "no header, empty lines at the end"],
)
def test_dialects(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.tsv").write_bytes(content)
    np.testing.assert_array_equal(whole(tmp_path, ROW).inputs["x"], floats([[1, 2, 3]]), strict=True)


def test_integers_are_exact_and_fit_the_type(tmp_path: Path) -> None:
    spec = InputSpec("x", np.dtype(np.uint8), (None, 2))
    np.testing.assert_array_equal(
        whole(table(tmp_path, "a,b", "0,255"), spec).inputs["x"], np.array([[0, 255]], np.uint8)
    )
    with pytest.raises(DataError, match=r"array 'x' is out of range for uint8 in sample 1 of the file"):
        whole(table(tmp_path, "a,b", "0,1", "2,256"), spec)
    large = (1 << 53) + 1  # no float64
    assert whole(table(tmp_path, "zip", str(large)), ZIP).inputs["zip"].item() == large


# Streams


def numbered(folder: Path, counts: list[int]) -> Samples:
    folder.mkdir(exist_ok=True)
    first = 0
    for number, count in enumerate(counts):
        rows = [f"{row},{row / 8},{-row},{row % 5}" for row in range(first, first + count)]
        write(folder / f"{number}.csv", "a,b,c,label", *rows)
        first += count
    return open_samples(folder, [ROW])


def numbers(samples: Any) -> list[int]:
    return [int(value) for batch in samples for value in batch.inputs["x"][:, 0]]


def test_rows_across_files_and_blocks(tmp_path: Path) -> None:
    samples = numbered(tmp_path, [700, 300])
    assert numbers(samples.batches(64)) == list(range(1000))
    assert numbers(samples.take(10).batches(3)) == list(range(50, 1000, 100))
    rest, held = samples.split(0.1, 50)
    assert sorted(numbers(rest.batches(7)) + numbers(held.batches(7))) == list(range(1000))


@pytest.mark.parametrize("window", [1 << 28, 1], ids=["loaded", "in its file"])
def test_shuffled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(stream, "WINDOW_LIMIT", window)
    batches = list(islice(numbered(tmp_path, [1000]).shuffled(50, seed=1), 20))
    assert sorted(numbers(batches)) == list(range(1000))
    for batch in batches:
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.inputs["x"][:, 0] % 5, batch.labels)
        np.testing.assert_array_equal(batch.inputs["x"][:, 0], batch.inputs["x"][:, 1] * 8)


def test_both_ways_to_shuffle_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = numbered(tmp_path, [600])
    loaded = numbers(islice(samples.shuffled(50, seed=1), 12))
    monkeypatch.setattr(stream, "WINDOW_LIMIT", 1)
    assert numbers(islice(samples.shuffled(50, seed=1), 12)) == loaded != list(range(600))


def test_memory_is_bounded(tmp_path: Path) -> None:
    line = ",".join(["0.12345678"] * 1000)
    path = table(tmp_path, *[line] * 500)  # 5.5 MB of text, 2 MB as float32
    tracemalloc.start()
    samples = open_samples(path, [InputSpec("x", F32, (None, 1000))])
    assert sum(len(batch.index) for batch in samples.batches(8)) == 500
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_sha256(tmp_path: Path) -> None:
    before = open_samples(table(tmp_path, "a,b,c", "1,2,3"), [ROW]).sha256()
    assert open_samples(table(tmp_path, "a,b,c", "1,2,4"), [ROW]).sha256() != before
    assert open_samples(table(tmp_path, "a,b,c", "1,2,3"), [ROW]).sha256() == before


# What is refused

REFUSED = {
    "too few": (["a,b", "1,2"], [ROW], r"a\.csv has 2 column\(s\) for .* 'x': 'a', 'b'; the model wants .*samples, 3"),
    "too many": (["a,b,c,d", "1,2,3,4"], [ROW], r"has 4 column\(s\) .* wants float32 \(samples, 3\); give one column"),
    "two free axes": (
        ["a,b", "1,2"],
        [InputSpec("x", F32, (None, None, None))],
        r"wants float32 \(samples, any, any\)",
    ),
    "no such input": (
        ["a,b,c", "1,2,3"],
        [ROW, AGE],
        r"has no column for the model's input 'x': it has 'a', 'b', 'c', the model wants 'x' \(samples, 3\), 'age'",
    ),
    "one more": (["age,zip,id", "1,2,3"], [AGE, ZIP], r"has a column 'id', which is no input of the model: it has"),
    "without a header": (["1,2,3,4"], [ROW, AGE], r"has no column for the model's input 'x': it has '0', '1'"),
    "a gap": (["x.0,x.2,x.3,age", "1,2,3,4"], [ROW, AGE], r"the columns of 'x' are 'x.0', 'x.2', 'x.3'; number them"),
    "twice": (["a,a,b", "1,2,3"], [ROW], r"has the column 'a' twice; name it"),
    "labels twice": (["a,b,c,label,labels", "1,2,3,4,5"], [ROW], r"the columns of 'labels' are 'label', 'labels'"),
    "no name": ([",a,b,c", "0,1,2,3"], [ROW], r"has a column without a name; name it"),
    "short line": (["a,b,c", "1,2,3", "4,5"], [ROW], r"cannot be read \(line 3 has 2 fields, the first line has 3\)"),
    "empty line": (["a,b,c", "1,2,3", "", "4,5,6"], [ROW], r"cannot be read \(line 3 is empty\)"),
    "no samples": (["a,b,c"], [ROW], r"has no samples; write one per line below the header"),
    "text": (["a,b,c", "1,2,3", "4,five,6"], [ROW], r"line 3, column 'b' is 'five', which is no number; correct"),
    "missing": (["a,b,c", "1,2,3", "4,,6"], [ROW], r"line 3, column 'b' is '', which is no number; correct"),
    "nan": (["a,b,c", "1,2,3", "4,nan,6"], [ROW], r"array 'x' is NaN, infinite or too large for float32 in sample 1"),
    "underscore": (["a,b,c", "1,2,1_000"], [ROW], r"line 2, column 'c' is '1_000', which is no number"),
    "no integer": (["zip", "1.0"], [ZIP], r"line 2, column 'zip' is '1\.0', which is no whole number"),
    "large integer": (["zip", str(1 << 64)], [ZIP], r"line 2, column 'zip' is '18446.*', which is no whole number"),
    "label": (["a,b,c,label", "1,2,3,cat"], [ROW], r"line 2, column 'label' is 'cat', which is no number"),
    "quotes": (['"a,b,c', "1,2,3"], [ROW], r"a\.csv cannot be read \(unexpected end of data\)"),
}


@pytest.mark.parametrize(("lines", "specs", "message"), REFUSED.values(), ids=REFUSED)
def test_tables_that_do_not_fit(tmp_path: Path, lines: list[str], specs: list[InputSpec], message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        whole(table(tmp_path, *lines), *specs)
    assert "\n" not in str(error.value)
    assert "a.csv" in str(error.value)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b,c\n1,2,\xff\n")
    with pytest.raises(DataError, match=r"a\.csv cannot be read \(.*codec can't decode"):
        whole(tmp_path, ROW)


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LINE_LIMIT", 100)
    with pytest.raises(DataError, match=r"a\.csv cannot be read \(a line has more than 100 bytes\)"):
        whole(table(tmp_path, "a,b,c", "1,2," + "3" * 100), ROW)


def test_a_file_that_shrinks_after_opening(tmp_path: Path) -> None:
    path = table(tmp_path, "a,b,c", "1,2,3", "4,5,6")
    samples = open_samples(path, [ROW])
    os.truncate(path, 12)
    with pytest.raises(DataError, match=r"a\.csv cannot be read \(it ends early\)"):
        list(samples.batches(2))


def test_a_header_of_many_columns_is_not_listed_in_full(tmp_path: Path) -> None:
    header = ",".join(f"c{number}" for number in range(50_000))
    with pytest.raises(DataError, match=r"has 50000 column\(s\) .* 'c11' and 49988 more; the model wants") as error:
        whole(table(tmp_path, header, ",".join(["1"] * 50_000)), ROW)
    assert len(str(error.value)) < 1000
