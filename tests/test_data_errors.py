"""What is refused, each with one line that says what, where and what to do."""

import errno
import os
import tracemalloc
import warnings
import zipfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sample_files import (
    F32,
    I32,
    IDS,
    X,
    header_bytes,
    npy_bytes,
    numbered,
    write_npz,
)

from onnxqt.data import InputSpec, Samples, check_labels, check_targets, open_samples, require
from onnxqt.errors import DataError
from onnxqt.numerics import Array

# What is refused


def test_no_such_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere does not exist; pass a directory"):
        open_samples(tmp_path / "nowhere", [X])


def test_source_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"a\.txt is neither a directory nor a \.npz or \.npy file"):
        open_samples(tmp_path / "a.txt", [X])


def test_directory_without_samples(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"has no \.npz or \.npy file directly in it, and no \.csv .* test_data_set folders; save some"
    ):
        open_samples(tmp_path, [X])


def test_directory_with_both_kinds(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=numbered(0, 1))
    np.save(tmp_path / "b.npy", numbered(0, 1))
    with pytest.raises(DataError, match=r"both \.npz and \.npy files: a\.npz, b\.npy; keep one kind"):
        open_samples(tmp_path, [X])


def test_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "a.npz").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"a\.npz is not a file \(a dangling link\?\); remove it"):
        open_samples(tmp_path, [X])


@pytest.mark.parametrize("name", ["a.npz", "a.npy", "a.csv", "a.png", "cat/a.png", "input_0.pb"])
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_pipes_are_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "cat").mkdir()
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=rf"{name} is not a file \(a dangling link\?\); remove it"):
        open_samples(tmp_path, [X])


def test_directory_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot be read \(.*Permission denied.*\); check it"):
        open_samples(tmp_path, [X])


def test_npy_for_several_inputs(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", numbered(0, 1))
    with pytest.raises(
        DataError, match=r"a \.npy file holds one array, .* inputs \['x', 'ids'\], and there is a\.npy; save"
    ):
        open_samples(tmp_path, [X, IDS])


ONES = np.ones((2, 3, 2), np.float32)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"arr_0": ONES[:, 0]},
            r"no array .* 'x': it has 'arr_0' float32 \(2, 2\), the model wants 'x' float32 \(samples, 3, 2\); name",
        ),
        (
            {"p": ONES, "q": ONES},
            r"no array for the model's input 'x': it has 'p' float32 .*, 'q' float32 .*, the model wants 'x'",
        ),
        (
            {"x": ONES, "y": ONES},
            r"array 'y' is no input .* it has 'x' .*, 'y' float32 \(2, 3, 2\), .* wants 'x' .*; remove or rename it",
        ),
        (
            {"x": ONES[0]},
            r"array 'x' has shape \(3, 2\), but the model wants \(samples, 3, 2\); save it in that",
        ),
        (
            {"x": np.ones((2, 2, 3))},
            r"array 'x' has shape \(2, 2, 3\), but the model wants \(samples, 3, 2\)",
        ),
        ({"x": np.float32(1)}, r"array 'x' has shape \(\), but"),
        ({"x": ONES[:0]}, r"array 'x' has shape \(0, 3, 2\) and so no samples; add some or remove it"),
        (
            {"x": ONES.astype(np.uint8)},
            "'x' is uint8, but the model wants float32; apply the model's preprocessing",
        ),
        (
            {"x": ONES.astype(np.int64)},
            "'x' is int64, but the model wants float32; apply the model's preprocessing",
        ),
        ({"x": ONES.astype(bool)}, "'x' is bool, but the model wants float32; save it as float32"),
        (
            {"x": ONES.astype(np.complex64)},
            "'x' is complex64, but the model wants float32; save it as float32",
        ),
        (
            {"x": ONES, "labels": np.array(["cat", "dog"])},
            r"'labels' is <U3 of shape \(2,\), but labels are numbers, .* save class numbers as a 1-D integer array",
        ),
        (
            {"x": ONES, "labels:y": np.array(1)},
            r"'labels:y' is int64 of shape \(\), but labels are numbers, with one row per sample",
        ),
        (
            {"x": ONES, "labels": np.arange(3)},
            "'labels' has 3 samples, but 'x' has 2; give all arrays .* same first",
        ),
    ],
)
@pytest.mark.parametrize("memory", [False, True])
def test_arrays_that_do_not_fit(tmp_path: Path, memory: bool, arrays: dict[str, Array], message: str) -> None:
    source: Path | Mapping[str, Array] = arrays if memory else write_npz(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=("the samples in memory" if memory else r"a\.npz") + ".*" + message) as error:
        open_samples(source, [X])
    assert "\n" not in str(error.value)


def test_wanted_shape_shows_free_dims() -> None:
    with pytest.raises(DataError, match=r"wants \(samples, any, 2\)"):
        open_samples({"x": ONES[0]}, [InputSpec("x", F32, (None, None, 2))])


def test_integer_types_that_are_not_converted() -> None:
    with pytest.raises(DataError, match="'ids' is int16, but the model wants int64; save it as int64"):
        open_samples({"ids": np.ones((1, 4), np.int16)}, [IDS])
    with pytest.raises(DataError, match="'ids' is float32, but the model wants int64; save it as int64"):
        open_samples({"ids": np.ones((1, 4), np.float32)}, [IDS])


def test_inputs_of_unequal_length() -> None:
    with pytest.raises(DataError, match="'ids' has 3 samples, but 'x' has 2; give all arrays"):
        open_samples({"x": ONES, "ids": np.ones((3, 4), np.int64)}, [X, IDS])


def test_ragged_lists_in_memory() -> None:
    ragged: Any = {"x": [[1.0], [1.0, 2.0]]}
    with pytest.raises(DataError, match=r"the samples in memory cannot be read \(.*inhomogeneous"):
        open_samples(ragged, [X])


def test_labels_in_some_files_only(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=ONES, labels=np.arange(2))
    write_npz(tmp_path / "b.npz", x=ONES)
    with pytest.raises(DataError, match=r"b\.npz has no array 'labels', but .*a\.npz has one; add it to every"):
        open_samples(tmp_path, [X])


def test_labels_of_an_output_in_some_files_only(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=ONES, labels=np.arange(2), **{"labels:y": np.ones(2)})
    write_npz(tmp_path / "b.npz", x=ONES, labels=np.arange(2))
    with pytest.raises(DataError, match=r"b\.npz has no array 'labels:y', but .*a\.npz has one; add it to every"):
        open_samples(tmp_path, [X])


@pytest.mark.parametrize("other", [np.ones((2, 3), np.float32), np.ones((2, 3, 1), np.int64)], ids=["type", "rank"])
def test_labels_that_differ_between_files(tmp_path: Path, other: Array) -> None:
    write_npz(tmp_path / "a.npz", x=ONES, labels=np.ones((2, 3), np.int64))
    write_npz(tmp_path / "b.npz", x=ONES, labels=other)
    with pytest.raises(DataError, match=r"b\.npz: array 'labels' is .* but in .*a\.npz int64 .* same kind of labels"):
        open_samples(tmp_path, [X])


def test_labels_outside_their_limits(tmp_path: Path) -> None:
    write_npz(tmp_path / "a.npz", x=ONES, **{"labels:y": np.array([[0.0, 1.0], [0.5, 1.5]])})
    samples = open_samples(tmp_path, [X])
    check_targets(samples, "labels:y", (0, 1.5), "but no")
    with pytest.raises(DataError, match=r"a\.npz: the label of sample 1 of the file is 1\.5, but no$"):
        check_targets(samples, "labels:y", (0, 1), "but no")


def test_python_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return pytest.fail, ("unpickled",)

    bombs = np.array([Bomb(), Bomb()], dtype=object)
    np.save(tmp_path / "a.npy", bombs, allow_pickle=True)
    write_npz(tmp_path / "b.npz", x=bombs)
    for name in ("a.npy", "b.npz"):
        with pytest.raises(DataError, match=f"{name}.* holds Python objects, which are never unpickled"):
            open_samples(tmp_path / name, [X])


@pytest.mark.parametrize("shape", ["(1000000000000, 3, 2)", "(-1, 3, 2)", "(0, 3, 2)", "(3, 3, 2)", "(1, 3, 2)"])
@pytest.mark.parametrize("version", [(1, 0), (2, 0)])
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_header_that_claims_another_size(tmp_path: Path, shape: str, version: tuple[int, int], kind: str) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}"
    write_raw(tmp_path / f"a.{kind}", header_bytes(header, version) + bytes(48))
    with pytest.raises(DataError, match=r"has 48 bytes of values, but float32 of shape .*damaged, write it again"):
        open_samples(tmp_path, [X])


def write_raw(path: Path, content: bytes) -> None:
    """`content` as a `.npy` file, or as the array `x` of a `.npz` file."""
    if path.suffix == ".npy":
        path.write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", content)


def test_negative_axes_are_no_samples(tmp_path: Path) -> None:
    header = header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': (-2, -2)}")
    (tmp_path / "a.npy").write_bytes(header + bytes(16))
    with pytest.raises(DataError, match=r"shape \(-2, -2\) and so no samples"):
        open_samples(tmp_path, [InputSpec("x", F32, (None, None))])


def test_header_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    content = np.lib.format.magic(2, 0) + (64 << 20).to_bytes(4, "little") + bytes(64 << 20)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("x.npy", content)
    del content
    tracemalloc.start()
    with pytest.raises(DataError, match=r"a\.npz cannot be read \(EOF: reading array header"):
        open_samples(tmp_path, [X])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no array",
        np.lib.format.magic(3, 0) + bytes(100),
        header_bytes("{'descr': '<f4', 'fortran_order': False}"),
        header_bytes("{'descr': 'nonsense', 'fortran_order': False, 'shape': (2,)}"),
        header_bytes("{'descr': ('<f4', ('a', 'b')), 'fortran_order': False, 'shape': (2,)}"),
        header_bytes("{'descr': [()], 'fortran_order': False, 'shape': (2,)}"),
        header_bytes("{'descr': '<f4', 'fortran_order': False, 'shape': ('2',)}"),
        header_bytes("(" * 9000),
        header_bytes("-" * 9000 + "1"),
        header_bytes("'''"),
        header_bytes("\0\n\\"),
        header_bytes("__import__('os').getpid()"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_malformed_arrays(tmp_path: Path, content: bytes, kind: str) -> None:
    write_raw(tmp_path / f"a.{kind}", content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(DataError, match=rf"a\.{kind} cannot be read \(.+\); check it or write it") as error:
            open_samples(tmp_path, [X])
    assert "\n" not in str(error.value)


def test_random_damage_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    np.savez_compressed(tmp_path / "good.npz", x=numbered(0, 4), labels=np.arange(4))
    np.save(tmp_path / "good.npy", numbered(0, 4))
    for name in ("good.npz", "good.npy"):
        good = np.fromfile(tmp_path / name, np.uint8)
        for trial in range(300):
            bad = good.copy()
            places = rng.integers(0, min(len(bad), 128 if name == "good.npy" else len(bad)), size=1 + trial % 4)
            bad[places] = rng.integers(0, 256, size=len(places))
            path = tmp_path / f"bad{Path(name).suffix}"
            path.write_bytes(bad[: None if trial % 3 else int(rng.integers(0, len(bad)))].tobytes())
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    read(open_samples(path, [X]))
                except DataError as error:
                    assert "\n" not in str(error)  # noqa: PT017 - damage need not be noticed


def read(samples: Samples) -> None:
    for _ in samples.batches(2):
        pass


def test_arrays_above_the_limit(tmp_path: Path) -> None:
    header = header_bytes(f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({(4 << 30) + 1},)}}")
    path = tmp_path / "a.npy"
    path.write_bytes(header)
    os.truncate(path, len(header) + (4 << 30) + 1)  # sparse
    with pytest.raises(DataError, match=r"a\.npy has 4294967297 bytes, more than 4294967296 .*smaller files"):
        open_samples(path, [InputSpec("x", np.dtype(np.uint8), (None,))])


def test_truncated_files(tmp_path: Path) -> None:
    content = npy_bytes(ONES)
    (tmp_path / "a.npy").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"a\.npy has 47 bytes of values, .* which needs 48; the file is damaged"):
        open_samples(tmp_path / "a.npy", [X])
    path = write_npz(tmp_path / "a.npz", x=ONES)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"a\.npz cannot be read \(File is not a zip file\)"):
        open_samples(path, [X])


def test_file_truncated_after_opening(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", ONES)
    samples = open_samples(tmp_path, [X])
    os.truncate(tmp_path / "a.npy", 150)
    with pytest.raises(DataError, match=r"a\.npy cannot be read \(it ends early\)"):
        read(samples)


def test_file_removed_after_opening(tmp_path: Path) -> None:
    samples = open_samples(write_npz(tmp_path / "a.npz", x=ONES), [X])
    (tmp_path / "a.npz").unlink()
    for use in (read, Samples.sha256, lambda s: next(s.shuffled(1, 0))):
        with pytest.raises(DataError, match=r"a\.npz cannot be read \(.*No such file"):
            use(samples)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_corrupt_contents_are_found_by_their_checksum(tmp_path: Path, save: Any) -> None:
    save(tmp_path / "a.npz", x=np.zeros((40, 3, 2), np.float32))
    samples = open_samples(tmp_path, [X])
    content = bytearray((tmp_path / "a.npz").read_bytes())
    content[content.index(b"PK\x01\x02") - 9] ^= 1  # near the end of the array
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz cannot be read \((Bad CRC-32|Error -3|it ends early).*\); check"):
        read(samples)


def patched_flags(path: Path, flag: int) -> None:
    """Set a general purpose flag in the local and the central header of the only member."""
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x03\x04") + 6] |= flag
    content[content.index(b"PK\x01\x02") + 8] |= flag
    path.write_bytes(content)


def test_encrypted_file(tmp_path: Path) -> None:
    path = write_npz(tmp_path / "a.npz", x=ONES)
    patched_flags(path, 1)
    with pytest.raises(DataError, match=r"a\.npz cannot be read \(.*encrypted, password required.*\)"):
        open_samples(path, [X])


def test_other_zip_compression(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("x.npy", npy_bytes(ONES))
    with pytest.raises(DataError, match=r"array 'x' has zip compression 12, not 0 or 8"):
        open_samples(tmp_path, [X])


def test_array_twice_in_one_file(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes(ONES))
        archive.writestr("x", npy_bytes(ONES))
    with pytest.raises(DataError, match=r"a\.npz cannot be read \(array 'x' is in it twice\)"):
        open_samples(tmp_path, [X])


# Values


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
@pytest.mark.parametrize("memory", [False, True])
def test_values_that_are_not_finite(tmp_path: Path, value: float, memory: bool) -> None:
    x = np.ones((7, 3, 2))
    x[5, 2, 1] = value
    write_npz(tmp_path / "a.npz", x=np.ones((2, 3, 2)))
    source: Any = {"x": x} if memory else write_npz(tmp_path / "b.npz", x=x).parent
    where = "the samples in memory" if memory else r"b\.npz"
    samples = open_samples(source, [X])
    message = rf"{where}: array 'x' is NaN, infinite or too large for float32 in sample 5 of the file; correct"
    for use in (read, lambda s: list(islice(s.shuffled(7, 0), 2))):
        with pytest.raises(DataError, match=message):
            use(samples)


def test_integers_that_do_not_fit() -> None:
    ids = np.zeros((3, 4), np.int64)
    ids[1, 3] = 1 << 31
    samples = open_samples({"ids": ids}, [InputSpec("ids", I32, (None, 4))])
    with pytest.raises(DataError, match="array 'ids' is out of range for int32 in sample 1 of the file"):
        read(samples)


def test_labels_that_do_not_fit() -> None:
    samples = open_samples({"x": ONES, "labels": np.array([0, (1 << 64) - 1], np.uint64)}, [X])
    with pytest.raises(DataError, match="array 'labels' is out of range for int64 in sample 1 of the file"):
        read(samples)


@pytest.mark.parametrize("value", [-1, 10])
def test_labels_are_class_numbers(tmp_path: Path, value: int) -> None:
    write_npz(tmp_path / "a.npz", x=ONES, labels=np.array([0, 9]))
    write_npz(tmp_path / "b.npz", x=ONES, labels=np.array([0, value]))
    samples = open_samples(tmp_path, [X])
    message = rf"b\.npz: the label of sample 1 of the file is {value}, .* has 10 classes; .* from 0 to 9"
    with pytest.raises(DataError, match=message):
        check_labels(samples, 10)
    check_labels(samples.take(1), 10)  # sample 2, the first of b.npz


def test_checking_labels_that_are_not_there() -> None:
    with pytest.raises(DataError, match="has no labels; add an array 'labels' to every file"):
        check_labels(open_samples({"x": ONES}, [X]), 10)


def test_require() -> None:
    samples = open_samples({"x": ONES}, [X])
    require(samples, 2, "calibration")
    with pytest.raises(DataError, match="in memory: the number of samples is 2, but calibration needs 3; add"):
        require(samples, 3, "calibration")


# Names and shapes


def test_arrays_that_could_be_either_input() -> None:
    specs = [InputSpec("a", F32, (None, 2)), InputSpec("b", F32, (None, 2))]
    message = r"no array for the model's input 'a': it has 'p' float64 \(3, 2\), 'q' .*, the model wants 'a' .*, 'b'"
    with pytest.raises(DataError, match=message):
        open_samples({"p": np.ones((3, 2)), "q": np.ones((3, 2))}, specs)


def test_one_array_for_two_inputs() -> None:
    specs = [InputSpec("a", F32, (None, 2)), InputSpec("b", F32, (None, 2))]
    with pytest.raises(DataError, match=r"no array for the model's input 'a': it has 'p' float64 \(3, 2\), the model"):
        open_samples({"p": np.ones((3, 2))}, specs)


def test_many_arrays_are_not_all_listed() -> None:
    with pytest.raises(DataError, match=r"it has 'a0' .* and 88 more, the model wants 'x'") as error:
        open_samples({f"a{number}": ONES for number in range(100)}, [X])
    assert len(str(error.value)) < 1000


def test_both_npy_and_table(tmp_path: Path) -> None:
    """Numpy files count, as always; what lies beside them is passed over."""
    np.save(tmp_path / "a.npy", ONES)
    (tmp_path / "notes.csv").write_text("a,b\n1,2\n")
    (tmp_path / "picture.png").write_bytes(b"")
    assert open_samples(tmp_path, [X]).count == 2


def test_both_tables_and_images(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("a,b\n1,2\n")
    (tmp_path / "cat.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"has both \.csv and image files: labels\.csv, cat\.png; keep one kind"):
        open_samples(tmp_path, [X])
